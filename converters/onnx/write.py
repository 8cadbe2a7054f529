"""ONNX out: a Flax model as a file for onnxruntime and whatever else reads ONNX."""

import contextlib
import importlib.util
import json
import logging
import os
import secrets
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export

from fwt import _tree
from fwt._graph import Graph
from fwt._nodes import unboxed
from fwt._sequential import Sequential
from fwt._types import ConversionError
from fwt.converters import io as _io
from fwt.converters.frameworks import flax as _flax
from fwt.converters.frameworks import given as _given
from fwt.converters.frameworks import linen_trace
from fwt.converters.onnx import check as _check
from fwt.converters.onnx import ends, ours
from fwt.converters.onnx.layers import through
from fwt.converters.rows.row import joined, refuse

OPSETS = range(15, 19)  # tf2onnx knows no newer one
LIMIT = 2**31 - 2**20  # of a protobuf message, less what is around the weights


def to_onnx(
    module: Any,
    variables: Any = None,
    path: str | os.PathLike[str] | None = None,
    input_shape: Sequence[int] | None = None,
    opset: int = 17,
    *,
    input_dtype: Any = None,
    external_data: bool | None = None,
    check: bool = True,
) -> None:
    """Writes a Flax model as an ONNX file with the same outputs, whole or not at all.

    The inputs and outputs have the layout of the module, its order and any batch size. Several
    keep their names: the keys of a dict, else those in the Graph. One input is called "input", and
    one output "output". The weights are
    initializers under the paths that :func:`fwt.paths` gives, their values bit for bit (of a
    recurrent layer in ONNX's order of gates), so that zeros stay zeros. It needs TensorFlow,
    tf2onnx and onnx: ``pip install 'fwt[onnx]'``.

    Operations become ONNX's that mean the same, NaN and infinities included; only that
    onnxruntime's MaxPool passes over NaN, and makes of a window of -inf the least float32, and that
    its LSTM and GRU, and its RNN with relu, make finite numbers of NaN.

    Args:
        module: a :class:`fwt.Sequential`, a :class:`fwt.Graph`, or any linen module; or a ``Model``
            of one or an nnx module, ``to_onnx(model, path)``. It may take and give several arrays.
        variables: its variables, or its params; a Model has its own.
        path: where to, such as ``"net.onnx"``.
        input_shape: the shape of one input without the batch axis; that of the module by default.
            Of several inputs a list of shapes, or a dict of them where they have keys. An example
            of an input, batch first, tells its dtype too.
        opset: the version of ONNX's operators, 15 to 18.
        input_dtype: of the input, or a list or dict of those of several: by default float32, or
            int32 where layers take whole numbers.
        external_data: whether the weights go into a file of their own beside it, as ONNX wants for
            more than 2 GB; by default where they must.
        check: whether onnxruntime, if it is installed, must give the same outputs before anything
            is written: for ordinary inputs, zeros, ones, large and small ones. Each row is judged
            by itself, as :func:`verify` does; a file that gives the same NaN is written.

    Raises:
        ConversionError: for what can't be said in ONNX exactly, by the layer's name; nothing is
            written then.
        FileFormatError: if it can't be written there.

    Source: ONNX operators, https://onnx.ai/onnx/operators.

    Example:
        >>> import os, tempfile
        >>> import fwt, jax, flax.linen as nn
        >>> net = fwt.Sequential([("dense", nn.Dense(2)), nn.relu], input_shape=(3,))
        >>> variables = net.init(jax.random.key(0), jax.numpy.ones((1, 3)))
        >>> path = os.path.join(tempfile.mkdtemp(), "net.onnx")
        >>> to_onnx(net, variables, path)
        >>> import onnxruntime
        >>> session = onnxruntime.InferenceSession(path)
        >>> session.run(None, {"input": np.ones((5, 3), np.float32)})[0].shape
        (5, 2)
    """
    if path is None and isinstance(variables, str | os.PathLike):  # after one model
        variables, path = None, variables
    call = "to_onnx(model, path)"
    module, variables, input_shape = _given.given(module, variables, call, input_shape)
    path = _io.given_path(path)
    given = _Given(module, variables, input_shape, opset, input_dtype)
    proto, weights = given.converted()
    total = sum(w.nbytes for w in weights.values())
    if external_data is None:
        external_data = total > LIMIT
    elif not external_data and total > LIMIT:
        raise ConversionError(f"to_onnx: {total:,} bytes need external_data=True")
    _write(path, proto, weights, external_data, given.check if check else lambda *_: None)


def save_onnx(file: Any, module: Any, variables: Any, layout: str | None) -> None:
    """An .onnx file whose weights are inside."""
    given = _Given(module, variables)
    proto, weights = given.converted()
    if (total := sum(w.nbytes for w in weights.values())) > LIMIT:
        raise ConversionError(f"{total:,} bytes are too many for one .onnx file; use to_onnx")
    _written(file, proto, weights)
    given.check(file.path)


class _Given:
    """What is to be written, checked."""

    def __init__(
        self, module: Any, variables: Any, input_shape: Any = None, opset: int = 17,
        input_dtype: Any = None,
    ):  # fmt: skip
        self.opset = opset
        self.module, self.variables = _checked(module, variables, opset)
        self.inputs = ends.inputs(self.module, self.variables, input_shape, input_dtype)

    def converted(self) -> tuple[Any, dict[str, np.ndarray]]:
        return _converted(self.module, self.variables, self.inputs, self.opset)

    def check(self, file: Path) -> None:
        if importlib.util.find_spec("onnxruntime") is not None:
            _check.compare(file, self.module, self.variables, self.inputs)


def _checked(module: Any, variables: Any, opset: int) -> tuple[Any, Any]:
    if type(opset) is not int or opset not in OPSETS:
        raise ConversionError(
            f"opset={opset!r}: tf2onnx writes {OPSETS.start} to {OPSETS.stop - 1} well"
        )
    module = _flax.sequential_of(module)
    if not isinstance(variables, Mapping):
        raise ConversionError(f"expected a variables dict, found {type(variables).__name__}")
    variables = unboxed(_tree.as_variables(variables))
    if isinstance(module, Sequential | Graph):
        _flax.read_flax(module, variables)  # which checks the names
    elif not hasattr(module, "apply"):
        raise ConversionError(f"expected a linen module, found {type(module).__name__}")
    return module, variables


# -- TensorFlow, quietly ---------------------------------------------------------------------------


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """TensorFlow and tf2onnx without what they print, which native code writes past Python: to the
    process's standard error, which is nobody's meanwhile."""
    loggers = [logging.getLogger(n) for n in ("tensorflow", "tf2onnx", "absl")]
    levels = [x.level for x in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    before = os.environ.get("TF_CPP_MIN_LOG_LEVEL")
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    sys.stderr.flush()
    try:
        saved = os.dup(2)
        with tempfile.TemporaryFile() as sink:
            os.dup2(sink.fileno(), 2)
            try:
                yield
            finally:
                sys.stderr.flush()
                os.dup2(saved, 2)
                os.close(saved)
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if before is None:
            del os.environ["TF_CPP_MIN_LOG_LEVEL"]
        else:
            os.environ["TF_CPP_MIN_LOG_LEVEL"] = before


def _needed() -> Any:
    for name in ("tensorflow", "tf2onnx", "onnx"):
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"to_onnx needs {name}: pip install 'fwt[onnx]'", name=name)
    import tensorflow as tf

    return tf


def _converted(
    module: Any, variables: Any, inputs: Sequence[ends.Input], opset: int
) -> tuple[Any, dict[str, np.ndarray]]:
    """The graph as a protobuf message whose weights are still inputs, and the weights."""
    with quiet():
        tf = _needed()
        import onnx
        import tf2onnx

        from fwt.converters.onnx.primitives import Weight
        from fwt.converters.onnx.trace import MARK, Tracer

        tree = _weights(variables, Weight)
        (batch,) = export.symbolic_shape("batch")
        symbols = [jax.ShapeDtypeStruct((batch, *x.shape), x.dtype) for x in inputs]
        found: list[Any] = []
        specs = [
            tf.TensorSpec((None, *x.shape), tf.as_dtype(x.dtype), f"input_{i}")
            for i, x in enumerate(inputs)
        ]

        taken: list[Any] = []

        def traced(*xs: Any) -> Any:
            graph = tf.compat.v1.get_default_graph()

            # A mark says which weight is meant, so that none goes through TensorFlow: for a
            # placeholder, TensorFlow's optimizer makes an array of its size that is never freed.
            def take(weight: Any) -> Any:
                taken.append(weight)
                with graph.as_default():  # also where a body of a loop asks
                    shape, dtype = list(weight.value.shape), tf.as_dtype(weight.value.dtype)
                    token = json.dumps({"weight": len(taken) - 1, "shape": shape})
                    (made,) = tf.raw_ops.PyFunc(input=[], token=token, Tout=[dtype])
                    return tf.ensure_shape(made, shape)

            tracer = Tracer(tf.shape(xs[0])[0], take, opset)
            ys, names, outs = through(tracer, module, tree, xs, symbols)
            found[:] = [names, outs]
            return [tf.identity(y) for y in ys]

        with _plain_transposes():
            proto, _ = tf2onnx.convert.from_function(
                tf.function(traced, autograph=False),
                input_signature=specs,
                opset=opset,
                custom_op_handlers={MARK: (_marked, [])},
            )
        used: set[str] = set()
        takes = list(ends.unlike([x.name for x in inputs], used))
        gives = list(ends.unlike(found[0], used))
        names = list(ends.unlike([w.name for w in taken], used))
        weights = {n: w.value for n, w in zip(names, taken, strict=True)}
        _finish(proto, takes, gives, names, inputs, found[1])
        for value in proto.graph.input[len(takes) :]:  # tf2onnx takes bfloat16 for float16
            kind = onnx.helper.np_dtype_to_tensor_dtype(weights[value.name].dtype)
            value.type.tensor_type.elem_type = kind
        undo = {n: w.undo for n, w in zip(names, taken, strict=True)}
        leaves = {leaf for w in jax.tree.leaves(tree) for leaf in w.undo}
        if leaves == {leaf for told in undo.values() for leaf in told}:
            ours.describe(proto, *_of_layers(module, variables, inputs, undo))
        try:
            onnx.checker.check_model(proto, full_check=False)
        except onnx.checker.ValidationError as error:
            why = " ".join(str(error).split())
            raise ConversionError(f"to_onnx: {why:.300}") from error
    for node in _nodes(proto.graph):
        if node.domain not in ("", "ai.onnx"):
            raise refuse(node.name, f"{node.domain}.{node.op_type} is no operator of standard ONNX")
    return proto, weights


@contextlib.contextmanager
def _plain_transposes() -> Iterator[None]:
    """Without the step of tf2onnx that makes a Reshape of a Transpose which only moves axes of size
    1: it goes by shapes of before it moved other ones."""
    from tf2onnx.optimizer.transpose_optimizer import TransposeOptimizer

    step = TransposeOptimizer.post_optimize_action
    TransposeOptimizer.post_optimize_action = lambda self: None
    try:
        yield
    finally:
        TransposeOptimizer.post_optimize_action = step


def _of_layers(
    module: Any, variables: Any, inputs: Sequence[ends.Input], undo: Any
) -> tuple[Any, Any]:
    """A module of one's own as the Graph of the same weights that it can be, and how these come
    back for it; else both as they are."""
    if not linen_trace.is_own(module):
        return module, undo
    examples = [np.zeros((2, *x.shape), x.dtype) for x in inputs]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of arrays that it lacks
            graph, kept = linen_trace.traced(module, variables, examples, sizes=False)
    except ConversionError:
        return module, undo
    old, new = (_tree.Tree({"params": dict(v)}, whole=True).leaves for v in (variables, kept))
    places: dict[str, tuple[str, list[Any]]] = {}
    for path, value in new.items():
        collection, *parts = _tree.split(path)
        # A layer by itself has a name in the Graph, and weights of another rank may be a Dense's.
        for own in (path, "/".join((collection, *parts[1:]))):
            there = np.asarray(old[own]) if own in old and own not in places else np.zeros(0)
            flat = there.reshape(value.shape) if there.size == value.size else None
            if flat is not None and np.array_equal(flat, value, equal_nan=True):
                same = there.shape == value.shape
                places[own] = path, [] if same else [["reshape", list(value.shape)]]
                break
    if places.keys() != old.keys() or len(places) != len(new):
        return module, undo
    return graph, {
        name: {places[leaf][0]: [*steps, *places[leaf][1]] for leaf, steps in told.items()}
        for name, told in undo.items()
    }


def _weights(variables: Any, make: Any, inside: tuple[str, ...] = ()) -> Any:
    """The tree of arrays as a tree of weights with their paths."""
    out = {}
    for name, value in variables.items():
        parts = (*inside, str(name))
        if isinstance(value, Mapping):
            out[name] = _weights(value, make, parts)
        else:
            array = np.asarray(value)
            if array.dtype != jax.dtypes.canonicalize_dtype(array.dtype):
                raise refuse(joined(parts), f"{array.dtype} weights: JAX computes with 32 bits",
                             "set jax_enable_x64, or cast them")  # fmt: skip
            # Named without the collection: no layer has one name in two of them.
            out[name] = make(joined(parts[1:]), array, {joined(parts): []})
    return out


def _marked(graph: Any, node: Any, name: str, _: Any) -> None:
    """Puts the operator, or the weight, that a mark stands for in its place."""
    told = json.loads(node.get_attr("token").s)
    if "weight" in told:
        (output,), new = node.output, f"weight_{told['weight']}"
        dtype = graph.get_dtype(output)
        graph.remove_node(name)
        graph.add_graph_input(new, dtype, told["shape"])
        graph.replace_all_inputs(output, new)
        return
    inputs = [node.input[i] if i is not None else "" for i in told["inputs"]]
    outputs, dtypes = list(node.output), node.output_dtypes
    skip = told["skip"]
    spare = [f"{name}__{i}" for i in range(skip)]
    graph.remove_node(name)
    graph.make_node(
        told["op"],
        inputs,
        attr=told["attributes"],
        outputs=[*spare, *outputs],
        shapes=[*([None] * skip), *told["shapes"]],
        dtypes=[*(dtypes[:1] * skip), *dtypes],
        name=name,
    )


def _nodes(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)


def _unlike(name: str, taken: set[str]) -> str:
    """The name, longer where it is taken, as TensorFlow's own may be."""
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def _finish(
    proto: Any,
    takes: Sequence[str],
    gives: Sequence[str],
    names: Sequence[str],
    inputs: Sequence[ends.Input],
    outs: Sequence[Any],
) -> None:
    """Gives inputs, outputs and weights their names, and the batch axis its own."""
    import onnx

    from fwt.converters.onnx.trace import MARK

    graph = proto.graph
    renamed = {f"weight_{i}": name for i, name in enumerate(names)}
    renamed |= {f"input_{i}": name for i, name in enumerate(takes)}
    renamed |= {value.name: name for value, name in zip(graph.output, gives, strict=True)}
    taken = {name for node in _nodes(graph) for name in node.output}
    new = set(renamed.values())
    taken |= {tensor.name for tensor in graph.initializer} | new
    for tensor in graph.initializer:
        if tensor.name in new:
            renamed[tensor.name] = tensor.name = _unlike(tensor.name, taken)
    nodes = {node.name for node in _nodes(graph) if MARK not in node.name}
    for node in _nodes(graph):
        node.op_type = node.op_type.removeprefix("fwt.")  # see CAST
        if MARK in node.name:
            node.name = _unlike(node.name.replace(MARK, node.op_type), nodes)
        for name in node.output:
            if name not in renamed and (MARK in name or name in new):
                renamed[name] = _unlike(name.replace(MARK, node.op_type), taken)
    for node in _nodes(graph):
        for listed in (node.input, node.output):
            for i, name in enumerate(listed):
                listed[i] = renamed.get(name, name)
    there = {renamed.get(value.name, value.name): value for value in graph.input}
    values = []
    for name, given in zip(takes, inputs, strict=True):  # one that no layer takes is one too
        kind = onnx.helper.np_dtype_to_tensor_dtype(given.dtype)
        values.append(onnx.helper.make_tensor_value_info(name, kind, ("batch", *given.shape)))
    for name in names:
        there[name].name = name
        values.append(there[name])
    del graph.input[:]
    graph.input.extend(values)
    for value, shape in zip(graph.output, (out.shape for out in outs), strict=True):
        value.name = renamed[value.name]
        dims = value.type.tensor_type.shape.dim
        del dims[:]
        for i, size in enumerate(shape):
            batch = {"dim_param": "batch"} if not i and str(size) == "batch" else {}
            dims.add(**({"dim_value": size} if isinstance(size, int) else batch))
    del graph.value_info[:]  # it may be wrong about the batch
    kept = [o for o in proto.opset_import if o.domain in ("", "ai.onnx")]
    del proto.opset_import[:]
    proto.opset_import.extend(kept)
    graph.name = "fwt"
    proto.producer_name, proto.producer_version = "fwt", ""


# -- the file --------------------------------------------------------------------------------------


def _written(
    file: Any, proto: Any, weights: dict[str, np.ndarray], outside: "_Outside | None" = None
) -> list[np.ndarray]:
    """Writes the message with its weights, one after the other, so that there is no copy of all;
    gives those that are to be written into another file."""
    import onnx

    kept: list[np.ndarray] = []
    inside: list[tuple[bytes, np.ndarray | None]] = []
    inputs = list(proto.graph.input)
    start = len(inputs) - len(weights)
    del proto.graph.input[start:]
    for value in inputs[start:]:
        array = _io.native(weights[value.name])
        kind = value.type.tensor_type.elem_type
        tensor = onnx.TensorProto(name=value.name, dims=array.shape, data_type=kind)
        if outside is None or array.nbytes < 1024:
            told = tensor.SerializeToString() + _field(onnx.TensorProto, "raw_data", array.nbytes)
            inside.append((told, array))
            continue
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, there in outside.place(array.nbytes):
            tensor.external_data.add(key=key, value=str(there))
        kept.append(array)
        inside.append((tensor.SerializeToString(), None))
    sizes = [len(told) + (0 if array is None else array.nbytes) for told, array in inside]
    heads = [_field(onnx.GraphProto, "initializer", size) for size in sizes]
    graph = proto.graph.SerializeToString()
    proto.ClearField("graph")
    file.write(proto.SerializeToString())
    file.write(_field(onnx.ModelProto, "graph", len(graph) + sum(sizes) + sum(map(len, heads))))
    file.write(graph)
    for head, (told, raw) in zip(heads, inside, strict=True):
        file.write(head + told)
        if raw is not None:
            _io.write_array(file, raw)
    file.flush()
    return kept


def _field(message: Any, name: str, size: int) -> bytes:
    """What stands before the bytes of a field in protobuf: its number, its kind and its size."""
    number = message.DESCRIPTOR.fields_by_name[name].number
    return _varint(number << 3 | 2) + _varint(size)


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


class _Outside:
    """Where arrays stand in a file of their own: aligned, so that it can be mapped."""

    def __init__(self, name: str):
        self.name, self.end = name, 0

    def place(self, size: int) -> list[tuple[str, Any]]:
        start = -(-self.end // 4096) * 4096
        self.end = start + size
        return [("location", self.name), ("offset", start), ("length", size)]


def _write(
    path: Path,
    proto: Any,
    weights: dict[str, np.ndarray],
    external: bool,
    check: Callable[[Path], None],
) -> None:
    # A name of its own, so that the file that is there now keeps its weights until it is replaced.
    # Nothing is removed: another file may name the data of the one that is replaced.
    path = path.resolve()
    outside = _Outside(f"{path.name}.{secrets.token_hex(4)}.data") if external else None

    def write(file: Any) -> None:
        arrays = _written(file, proto, weights, outside)
        if outside is not None:
            _io.write_atomically(beside, lambda data: write_data(data, arrays))
        check(file.path)

    def write_data(file: Any, arrays: list[np.ndarray]) -> None:
        at = 0
        for array in arrays:
            file.write(bytes(-at % 4096))
            _io.write_array(file, array)
            at += -at % 4096 + array.nbytes

    if outside is None:
        _io.write_atomically(path, write)
        return
    beside = path.parent / outside.name
    try:
        _io.write_atomically(path, write)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
