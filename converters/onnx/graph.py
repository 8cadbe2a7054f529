"""An ONNX file as checked nodes and arrays: nothing runs, and sizes are checked first."""

import dataclasses
import functools
import importlib.util
import itertools
import math
import mmap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fwt._types import FileFormatError
from fwt.converters import io as _io
from fwt.converters.rows.row import refuse

OPSETS = range(9, 29)
MOST_NODES = 100_000
# What is computed from numbers alone may not grow beyond what files of models hold of it.
MOST_FOLDED = 1 << 24
ZEROS = object()  # an array of zeros of any shape, such as the first state of an LSTM


@dataclasses.dataclass
class Node:
    """One operator, its attributes as Python values."""

    op: str
    name: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, Any]
    taken: set[Any] = dataclasses.field(default_factory=set)  # what was asked for, see check

    def __str__(self) -> str:
        return f"{self.name or self.outputs[0]} ({self.op})"

    def __call__(self, name: str, default: Any = None) -> Any:
        self.taken.add(name)
        return self.attributes.get(name, default)


class Graph:
    """The nodes between one input and one output, and what is known of the values between them.

    Attributes:
        nodes: those that compute with the input.
        known: the arrays by name: initializers, and what is computed from numbers alone. A size
            that is the batch's is -1 in them.
        shapes: of each value as far as known; None for a size that is not.
    """

    def __init__(self, proto: Any, path: Path, external: bool):
        self.path = path
        self.opset = _opset(proto, path)
        graph = proto.graph
        if len(graph.node) > MOST_NODES:
            raise FileFormatError(f"{path}: it has {len(graph.node):,} nodes, at most "
                                  f"{MOST_NODES:,} are read")  # fmt: skip
        if graph.sparse_initializer:
            raise FileFormatError(f"{path}: it has sparse arrays")
        self.known: dict[str, Any] = {}
        self.of_batch: set[str] = set()  # the numbers in which the batch's size is -1
        self.left = (64 << 20) + 4 * path.stat().st_size  # bytes that folding may take
        for tensor in graph.initializer:
            self.known[tensor.name] = array_of(tensor, path, external)
        inputs = [v for v in graph.input if v.name not in self.known]
        if len(inputs) != 1 or len(graph.output) != 1:
            names = [v.name for v in inputs], [v.name for v in graph.output]
            raise FileFormatError(
                f"{path}: only a graph of one input and one output is read, found the inputs "
                f"{names[0]} and the outputs {names[1]}"
            )
        self.input, self.output = inputs[0].name, graph.output[0].name
        self.shapes, self.types = _shapes(proto, path, {})
        self.dtype = inputs[0].type.tensor_type.elem_type
        shape = self.shapes.get(self.input)
        if not shape:
            raise FileFormatError(f"{path}: it does not say the rank of its input {self.input!r}")
        self.batch = shape[0]
        self.nodes: list[Node] = []
        given, extra = set(self.known), 0
        nodes = _needed([_node(n, path) for n in graph.node], self.output)
        while True:
            self.nodes = []
            for node in nodes:
                self._take(node)
            # Shapes may hang on numbers that were computed now.
            small = {n: v for n, v in self.known.items() if n not in given and v is not ZEROS
                     and v.dtype == np.int64 and v.size <= 64
                     and (n not in self.of_batch or _only_reshapes(nodes, n))}  # fmt: skip
            if len(small) <= extra:
                break
            extra = len(small)
            self.shapes, self.types = _shapes(proto, path, small)
        self.nodes = _needed(self.nodes, self.output)
        self.place = {id(n): i for i, n in enumerate(self.nodes)}
        self.users: dict[str, list[Node]] = {}
        for n in self.nodes:
            for name in dict.fromkeys(n.inputs):
                self.users.setdefault(name, []).append(n)

    def _take(self, node: Node) -> None:
        if node.op == "Constant":
            value = node("value")
            for other in ("value_float", "value_int", "value_floats", "value_ints"):
                if value is None and node(other) is not None:
                    kind = np.float32 if "float" in other else np.int64
                    value = np.asarray(node(other), kind)
            if not isinstance(value, np.ndarray):
                raise refuse(str(node), "a constant of no known kind")
            self.known[node.outputs[0]] = value
            return
        if node.op == "CastLike" and node.inputs[1] in self.types:
            node = Node("Cast", node.name, node.inputs[:1], node.outputs,
                        {**node.attributes, "to": self.types[node.inputs[1]]})  # fmt: skip
        shape = self.shapes.get(node.inputs[0]) if node.inputs else None
        if node.op == "Shape" and shape is not None and shape.count(None) < 2:
            sizes = [-1 if s is None else s for s in shape]
            value = np.array(sizes[node("start", 0) : node("end")], np.int64)
            self._know(node.outputs[0], value, None in shape)
            return
        given = [self.known.get(n) if n else None for n in node.inputs]
        numbers = given and all(g is not None or not n for g, n in zip(given, node.inputs))
        batch = any(n in self.of_batch for n in node.inputs)
        if numbers and not (batch and node.op not in _MOVES):
            value = _folded(self, node, given)
            if value is not None:
                self._know(node.outputs[0], value, batch)
                return
        self.nodes.append(node)

    def _know(self, name: str, value: Any, batch: bool) -> None:
        if value is not ZEROS:
            self.left -= value.nbytes
            if self.left < 0:
                raise FileFormatError(f"{self.path}: its constants grow beyond what it holds")
            if batch and np.any(value == -1):
                self.of_batch.add(name)
        self.known[name] = value

    def const(self, node: Node, index: int, default: Any = None) -> Any:
        """The array that an input is; None where it is left out."""
        node.taken.add(index)
        if index >= len(node.inputs) or not node.inputs[index]:
            return default
        value = self.known.get(node.inputs[index])
        if value is None:
            raise refuse(
                str(node), f"its input {node.inputs[index]!r} is computed, expected numbers"
            )
        return value

    def shape(self, name: str, node: Node) -> tuple[Any, ...]:
        """The sizes of a value; all but the batch's must be known."""
        shape = self.shapes.get(name)
        if shape is None or None in shape[1:]:
            raise refuse(str(node), f"the shape of {name!r} is not known, found {shape}",
                         "export it with fixed sizes (but for the batch)")  # fmt: skip
        return shape

    def block(self, start: str) -> tuple[list[Node], str]:
        """The nodes from a value to the next one through which everything goes, and that one."""
        inside, inner = {start}, []
        users = self.users.get(start, ())
        left = {start: len(users)}
        first = min((self.place[id(n)] for n in users), default=0)
        for node in itertools.islice(self.nodes, first, None):
            taken = [n for n in dict.fromkeys(node.inputs) if n in inside]
            if not taken:
                continue
            inner.append(node)
            for name in taken:
                left[name] -= 1
            for name in node.outputs:
                if name in self.users or name == self.output:
                    inside.add(name)
                    left[name] = len(self.users.get(name, ()))
            live = [n for n, count in left.items() if count or n == self.output]
            if len(live) == 1 and live[0] != start:
                return inner, live[0]
        names = ", ".join(str(n) for n in inner[:3]) or start
        raise refuse(str(self.path), f"what follows {start!r} does not come together ({names})")


def proto_of(path: Path) -> Any:
    if importlib.util.find_spec("onnx") is None:
        raise ImportError("ONNX files need onnx: pip install 'fwt[onnx]'", name="onnx")
    import onnx
    import onnx.inliner

    size = path.stat().st_size
    if size > 2**31:
        raise FileFormatError(f"{path}: {size:,} bytes are more than an ONNX file can have")
    proto = onnx.ModelProto.FromString(path.read_bytes())
    if not proto.HasField("graph") or not (proto.graph.node or proto.graph.output):
        raise FileFormatError(f"{path}: no ONNX file: it has no graph")
    if not proto.functions:
        return proto
    _check_functions(proto, path)
    return onnx.inliner.inline_local_functions(proto)


def _check_functions(proto: Any, path: Path) -> None:
    """Raises if what functions call is more than a graph may have."""
    bodies = {(f.domain, f.name): f for f in proto.functions}
    counts: dict[Any, int] = {}

    def count(nodes: Any, inside: tuple[Any, ...]) -> int:
        total = 0
        for node in nodes:
            key = (node.domain, node.op_type)
            if key not in bodies:
                total += 1
                continue
            if key in inside or len(inside) > 50:
                raise FileFormatError(f"{path}: the function {node.op_type!r} calls itself")
            if key not in counts:
                counts[key] = count(bodies[key].node, (*inside, key))
            total += counts[key]
        return total

    if count(proto.graph.node, ()) > MOST_NODES:
        raise FileFormatError(f"{path}: its functions make more than {MOST_NODES:,} nodes")


def _only_reshapes(nodes: list[Node], name: str) -> bool:
    """Whether numbers are the target of Reshapes alone, where -1 may stand for the batch."""
    return all(n.op == "Reshape" and n.inputs[1:2] == [name] for n in nodes if name in n.inputs)


def _needed(nodes: list[Node], output: str) -> list[Node]:
    """The nodes that the output hangs on."""
    names, kept = {output}, []
    for node in reversed(nodes):
        if names.intersection(node.outputs):
            names.update(node.inputs)
            kept.append(node)
    return kept[::-1]


def _opset(proto: Any, path: Path) -> int:
    found = {o.domain: o.version for o in proto.opset_import}
    version = found.get("", found.get("ai.onnx"))
    if version not in OPSETS:
        raise FileFormatError(
            f"{path}: opset {version}, known are {OPSETS.start} to {OPSETS.stop - 1}"
        )
    assert version is not None
    return version


def _node(node: Any, path: Path) -> Node:
    import onnx

    name = node.name or (node.output[0] if node.output else "")
    if node.domain not in ("", "ai.onnx"):
        raise refuse(f"{path}: {name}", f"{node.domain}.{node.op_type} is no standard operator")
    attributes: dict[str, Any] = {}
    for a in node.attribute:
        kind = onnx.AttributeProto
        if a.type in (kind.GRAPH, kind.GRAPHS):
            raise refuse(f"{path}: {name} ({node.op_type})", "it has a graph of its own")
        if a.type == kind.TENSOR:
            attributes[a.name] = array_of(a.t, path, False)
        elif a.type in (kind.FLOAT, kind.INT, kind.FLOATS, kind.INTS, kind.STRING, kind.STRINGS):
            value = onnx.helper.get_attribute_value(a)
            if a.type == kind.STRING:
                value = value.decode(errors="replace")
            elif a.type == kind.STRINGS:
                value = [v.decode(errors="replace") for v in value]
            attributes[a.name] = list(value) if isinstance(value, Sequence) and not isinstance(
                value, str) else value  # fmt: skip
        else:
            raise refuse(f"{path}: {name} ({node.op_type})", f"its attribute {a.name!r}")
    if not node.output:
        raise refuse(f"{path}: {name} ({node.op_type})", "it has no output")
    return Node(node.op_type, node.name, list(node.input), list(node.output), attributes)


def _shapes(
    proto: Any, path: Path, known: Mapping[str, np.ndarray]
) -> tuple[dict[str, tuple[int | None, ...]], dict[str, int]]:
    """The sizes and the dtypes of values."""
    import onnx

    # Without the arrays (only small ones, which may be shapes, are looked at) and without what the
    # file says itself, which may be wrong.
    light = onnx.ModelProto()
    light.CopyFrom(proto) if proto.ByteSize() < 1 << 22 else _copy(proto, light)
    del light.graph.value_info[:]
    for i in reversed(range(len(light.graph.node))):
        if any(o in known for o in light.graph.node[i].output):
            del light.graph.node[i]
    for name, value in known.items():
        light.graph.initializer.add().CopyFrom(onnx.numpy_helper.from_array(value, name))
    inferred = onnx.shape_inference.infer_shapes(light).graph
    out: dict[str, tuple[int | None, ...]] = {}
    types = {name: int(onnx.helper.np_dtype_to_tensor_dtype(v.dtype)) for name, v in known.items()}
    for told in (*inferred.value_info, *inferred.input, *inferred.output):
        if told.type.HasField("tensor_type") and told.type.tensor_type.HasField("shape"):
            dims = told.type.tensor_type.shape.dim
            out[told.name] = tuple(
                int(d.dim_value) if d.HasField("dim_value") and d.dim_value > 0 else None
                for d in dims
            )
            types[told.name] = told.type.tensor_type.elem_type
    return out, types


def _copy(proto: Any, light: Any) -> None:
    """A model with its large arrays as inputs."""
    light.ir_version = max(proto.ir_version, 4)
    light.opset_import.extend(proto.opset_import)
    light.graph.node.extend(proto.graph.node)
    light.graph.input.extend(proto.graph.input)
    light.graph.output.extend(proto.graph.output)
    light.graph.name = "g"
    named = {v.name for v in proto.graph.input}
    for tensor in proto.graph.initializer:
        if tensor.ByteSize() < 4096:
            light.graph.initializer.add().CopyFrom(tensor)
        elif tensor.name not in named:
            value = light.graph.input.add(name=tensor.name)
            value.type.tensor_type.elem_type = tensor.data_type
            for d in tensor.dims:
                value.type.tensor_type.shape.dim.add(dim_value=d)


def array_of(tensor: Any, path: Path, external: bool) -> np.ndarray:
    """The array of a tensor: its size is checked before anything is made."""
    import onnx

    place = f"{path}: the array {tensor.name!r}"
    if tensor.data_type in (0, onnx.TensorProto.STRING):
        raise FileFormatError(f"{place} holds no numbers")
    dims = tuple(tensor.dims)
    if len(dims) > 32 or any(d < 0 for d in dims):
        raise FileFormatError(f"{place} has the shape {dims}")
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    if dtype.name.startswith(("int4", "uint4", "float4", "int2", "uint2")):
        raise FileFormatError(f"{place} holds numbers of less than a byte")
    size = math.prod(dims) * dtype.itemsize
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return _outside(tensor, path, external, dtype, dims, size)
    if tensor.HasField("raw_data"):
        if len(tensor.raw_data) != size:
            raise FileFormatError(
                f"{place} has {len(tensor.raw_data):,} bytes, expected {size:,} for {dims}"
            )
    elif size > 16 * tensor.ByteSize():
        raise FileFormatError(f"{place} has fewer values than its shape {dims} says")
    _io.progress(size)
    return np.asarray(onnx.numpy_helper.to_array(tensor))


def _outside(
    tensor: Any, path: Path, external: bool, dtype: np.dtype, dims: tuple[int, ...], size: int
) -> np.ndarray:
    told = {e.key: e.value for e in tensor.external_data}
    if not external:
        raise FileFormatError(
            f"{path}: the array {tensor.name!r} is in another file, {told.get('location')!r}; give "
            "external_data=True if you trust it to be read"
        )
    there = _io.sibling(path, told.get("location"))
    start, length = int(told.get("offset", 0)), int(told.get("length", size))
    if start < 0 or length != size or start + length > there.stat().st_size:
        raise FileFormatError(
            f"{path}: the array {tensor.name!r} takes {length:,} bytes from {start:,} on, of "
            f"{there.stat().st_size:,} in {there.name}; expected {size:,}"
        )
    _io.progress(size)
    if not size:
        return np.zeros(dims, dtype)
    with open(there, "rb") as file:
        whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(whole, dtype, math.prod(dims), start).reshape(dims)


# -- numbers ---------------------------------------------------------------------------------------


def axes_of(graph: Graph, node: Node, index: int = 1) -> list[int] | None:
    """The axes of an operator, which newer versions have as an input."""
    value = node("axes")
    if value is None:
        value = graph.const(node, index)
    if value is None:
        return None
    return [int(a) for a in np.ravel(np.asarray(value))]


def slices_of(graph: Graph, node: Node, rank: int) -> list[slice]:
    starts, ends = (node(n) for n in ("starts", "ends"))
    if starts is None:
        starts, ends = (np.ravel(graph.const(node, i)).tolist() for i in (1, 2))
    axes = node("axes") if node("starts") is not None else graph.const(node, 3)
    steps = graph.const(node, 4) if node("starts") is None else None
    axes = range(len(starts)) if axes is None else np.ravel(axes).tolist()
    steps = [1] * len(starts) if steps is None else np.ravel(steps).tolist()
    out = [slice(None)] * rank
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if not -rank <= axis < rank or step == 0:
            raise refuse(str(node), f"it slices axis {axis} by {step}")
        # What exporters write for the end.
        stop = None if (end >= 10**9 and step > 0) or (end <= -(10**9) and step < 0) else end
        whole = start == 0 and stop is None and step == 1
        out[axis] = slice(None) if whole else slice(start, stop, step)
    return out


def _folded(graph: Graph, node: Node, given: list[Any]) -> Any:
    """What a node makes of numbers alone, or None where that is not known."""
    x = given[0]
    if node.op == "ConstantOfShape":
        value = node("value")
        large = np.any(x < 0) or math.prod(map(int, x)) > 1 << 12
        if value is None or not np.any(value):
            dtype = np.float32 if value is None else value.dtype
            return ZEROS if large else np.zeros(tuple(map(int, x)), dtype)
        return None if large else np.full(tuple(map(int, x)), np.ravel(value)[0])
    if any(g is ZEROS for g in given):
        moves = ("Expand", "Reshape", "Unsqueeze", "Squeeze", "Slice", "Concat", "Identity", "Cast",
                 "Transpose", "Split", "Gather")  # fmt: skip
        return ZEROS if node.op in moves else None
    if node.op == "Expand" and not np.any(x):
        return ZEROS
    if node.op in POINTWISE and not (node.op == "Erf" and np.size(x) > 1 << 16):
        sizes = [np.shape(g) for g in given]
        if math.prod(np.broadcast_shapes(*sizes)) > max(
            MOST_FOLDED, *(math.prod(s) for s in sizes)
        ):
            return None
        with np.errstate(all="ignore"):
            out = POINTWISE[node.op](node, *given)
        return np.asarray(out).astype(np.result_type(*given), copy=False) if (
            np.asarray(out).dtype == np.float64 and all(g.dtype != np.float64 for g in given)
        ) else out  # fmt: skip
    if node.op == "Transpose":
        return np.transpose(x, node("perm"))
    if node.op == "Cast":
        import onnx

        return x.astype(onnx.helper.tensor_dtype_to_np_dtype(node("to")))
    if node.op == "Reshape":
        shape = [x.shape[i] if s == 0 and i < x.ndim else int(s) for i, s in enumerate(given[1])]
        return x.reshape(shape)
    if node.op == "Unsqueeze":
        rank = x.ndim + len(axes_of(graph, node) or ())
        for axis in sorted(a % rank for a in axes_of(graph, node) or ()):
            x = np.expand_dims(x, axis)
        return x
    if node.op == "Squeeze":
        axes = axes_of(graph, node)
        return np.squeeze(x, None if axes is None else tuple(axes))
    if node.op == "Concat" and sum(g.nbytes for g in given) <= graph.left:
        return np.concatenate(given, node("axis"))
    if node.op == "Gather" and np.size(given[1]) <= 1 << 16:
        axis = node("axis", 0)
        if math.prod(x.shape[:axis]) * math.prod(x.shape[axis + 1 :]) * np.size(given[1]) > max(
            MOST_FOLDED, x.size
        ):
            return None
        return np.take(x, given[1], axis)
    if node.op == "Size":
        return np.array(np.size(x), np.int64)
    if node.op == "Range" and all(np.size(g) == 1 for g in given):
        first, end, step = (np.ravel(g)[0] for g in given)
        return np.arange(first, end, step) if step and (end - first) / step < 1 << 12 else None
    if node.op == "Slice":
        return x[tuple(slices_of(graph, node, x.ndim))]
    return None


def _erf(x: Any) -> Any:
    return np.vectorize(math.erf, otypes=[float])(x)


# What may be done with the batch's size: no arithmetic.
_MOVES = ("Cast", "Gather", "Slice", "Concat", "Unsqueeze", "Squeeze", "Reshape", "Identity",
          "Expand", "ConstantOfShape", "Size")  # fmt: skip

# One value for each value; they tell what a block of such nodes is, and fold numbers.
POINTWISE: Mapping[str, Callable[..., Any]] = {
    "Identity": lambda n, x: x,
    "Add": lambda n, a, b: a + b,
    "Sub": lambda n, a, b: a - b,
    "Mul": lambda n, a, b: a * b,
    "Div": lambda n, a, b: a / b if np.issubdtype(np.result_type(a, b), np.floating) else a // b,
    "Pow": lambda n, a, b: a**b,
    "Mod": lambda n, a, b: np.mod(a, b),
    "Neg": lambda n, x: -x,
    "Abs": lambda n, x: np.abs(x),
    "Sqrt": lambda n, x: np.sqrt(x),
    "Reciprocal": lambda n, x: 1 / x,
    "Exp": lambda n, x: np.exp(x),
    "Log": lambda n, x: np.log(x),
    "Erf": lambda n, x: _erf(x),
    "Tanh": lambda n, x: np.tanh(x),
    "Sigmoid": lambda n, x: np.where(x >= 0, 1 / (1 + np.exp(-np.abs(x))),
                                     np.exp(-np.abs(x)) / (1 + np.exp(-np.abs(x)))),
    "Softplus": lambda n, x: np.logaddexp(x, 0),
    "Relu": lambda n, x: np.maximum(x, 0),
    "Max": lambda n, *xs: functools.reduce(np.maximum, xs),
    "Min": lambda n, *xs: functools.reduce(np.minimum, xs),
    "Clip": lambda n, x, lo=None, hi=None: np.clip(
        x, n("min", -np.inf) if lo is None else lo, n("max", np.inf) if hi is None else hi),
    "Greater": lambda n, a, b: a > b,
    "GreaterOrEqual": lambda n, a, b: a >= b,
    "Less": lambda n, a, b: a < b,
    "LessOrEqual": lambda n, a, b: a <= b,
    "Equal": lambda n, a, b: a == b,
    "Not": lambda n, x: np.logical_not(x),
    "And": lambda n, a, b: np.logical_and(a, b),
    "Or": lambda n, a, b: np.logical_or(a, b),
    "Where": lambda n, c, a, b: np.where(c, a, b),
    "Elu": lambda n, x: np.where(x > 0, x, n("alpha", 1.0) * np.expm1(np.minimum(x, 0))),
    "LeakyRelu": lambda n, x: np.where(x >= 0, x, n("alpha", 0.01) * x),
    "HardSigmoid": lambda n, x: np.clip(n("alpha", 0.2) * x + n("beta", 0.5), 0, 1),
    "Softsign": lambda n, x: x / (1 + np.abs(x)),
    "Sign": lambda n, x: np.sign(x),
}  # fmt: skip
