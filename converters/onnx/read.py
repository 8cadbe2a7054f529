"""ONNX in: a graph of operators as layers in torch's terms, from which the walk goes on."""

import os
from typing import Any

import jax

from fwt._types import FileFormatError, Model
from fwt.converters import io as _io
from fwt.converters.frameworks import flax as _flax
from fwt.converters.frameworks import torch_layers
from fwt.converters.onnx import (
    blocks,
    functions,
    recurrent,
    several,
    shapes,
    shared,
    weights,
)
from fwt.converters.onnx import graph as _graph
from fwt.converters.onnx import ours as _ours
from fwt.converters.onnx.graph import IN_REGIONS, Graph
from fwt.converters.onnx.numbers import POINTWISE, Node
from fwt.converters.onnx.reader import Reader
from fwt.converters.rows.row import refuse
from fwt.converters.walk import convert
from fwt.converters.walk.net import Net, folded

# Attributes that exporters write at their defaults, whether or not they matter.
_HARMLESS = {"allowzero": 0, "noop_with_empty_axes": 0, "saturate": 1}
# What ONNX cuts to whole numbers where it takes these.
_FRACTIONS = ("ReduceMean", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "Div")
OPS = {**weights.OPS, **shapes.OPS, **functions.OPS, **recurrent.OPS}


def from_onnx(
    path: str | os.PathLike[str],
    *,
    layout: str = "source",
    external_data: bool = False,
) -> Model:
    """An ONNX file as a Flax model of this library, with the same outputs.

    A file of :func:`to_onnx` gives back the model that it was written from, bit for bit. Any other
    may have branches, several inputs and several outputs, as ``torch.onnx.export`` (both
    exporters), tf2onnx, Keras and :func:`to_onnx` write models: a straight line becomes a
    :class:`fwt.Sequential`, anything else a :class:`fwt.Graph`. The batch is the first axis of each
    input. Needs onnx: ``pip install 'fwt[onnx]'``.

    A power of 0.5 is read as the square root: of -inf it gives NaN, where ONNX's Pow gives inf, and
    of -0 it gives -0, where Pow gives 0.

    Args:
        path: the file.
        layout: "source", by default: the input and output are those of the file. "channels_last"
            or "channels_first" moves an end's axes where a layer proves which holds the channels.
        external_data: whether arrays may be read from another file in the same folder.

    Returns:
        ``Model(module, variables)`` with NumPy leaves. Layers take the names of their weights
        where these tell one.

    Raises:
        FileFormatError: for a file that is missing, broken or hostile, and for an operator that
            can't be converted exactly, by the node's name. It is a ``ConversionError``.

    Example:
        >>> import os, tempfile
        >>> import fwt, torch
        >>> path = os.path.join(tempfile.mkdtemp(), "net.onnx")
        >>> fwt.converters.save(path, *fwt.converters.from_torch(torch.nn.Sequential(
        ...     torch.nn.Conv1d(3, 2, 5), torch.nn.ReLU()), (3, 9)))
        >>> [type(named.layer).__name__ for named in from_onnx(path).module.layers]
        ['Conv', 'ReLU']
    """
    path = _io.given_path(path)
    if not path.is_file():
        raise FileFormatError(f"{path}: no such file")
    with _io.reading(path):
        proto = _graph.proto_of(path)
        ours = _ours.described(proto, path, external_data)
        if ours is not None:
            del proto
            model = ours()
            if layout == "source":
                return model
            net = _flax.read_flax(*model)
        else:
            graph = Graph(proto, path, external_data)
            if 11 in graph.dtypes.values() and not jax.config.read("jax_enable_x64"):
                raise FileFormatError(f"{path}: it computes in float64: set jax_enable_x64")
            net = folded(_net(graph), torch_layers.with_selected)
        source: Any = "torch" if ours is None else "flax"
        model = _flax.write_flax(convert.convert(net, source, "flax", layout))
        if ours is None:
            _check_dtype(graph, model)
        return model


def _net(graph: Graph) -> Net:
    """The layers of a graph, in torch's terms."""
    reader = Reader(graph)
    for node in graph.nodes:
        if id(node) in reader.done:
            continue
        names = several.given(reader, node)
        if not names:
            raise refuse(str(node), f"the operator {node.op!r} of numbers alone is not known")
        if all(n in reader.env for n in names):  # else it was read with those before it
            reader.constants = tuple(n for n in node.inputs if n in graph.known)
            _read(reader, node, names)
    for name in graph.outputs:
        if name not in reader.env:
            raise refuse(str(graph.path), f"the output {name!r} does not come from the input")
    ends = [reader.at_end(reader.env[n], f"the output {n!r}").name for n in graph.outputs]
    for node in graph.nodes:
        unknown = [n for n, v in node.attributes.items()
                   if n not in node.taken and _HARMLESS.get(n) != v]  # fmt: skip
        if unknown:
            raise refuse(str(node), f"its {unknown[0]}={node.attributes[unknown[0]]!r:.60}")
    inputs: dict[str, Any] = {name: tuple(graph.shapes[name][1:]) for name in graph.inputs}
    outputs: Any = ends[0] if len(ends) == 1 else tuple(ends)
    return Net(shared.called_again(reader, ends), inputs, outputs)


def _read(reader: Reader, node: Node, names: list[str]) -> None:
    at = names[0]
    plain = reader.env[at].is_plain
    if len(names) == 1 and node.op in IN_REGIONS and (plain or node.op in POINTWISE):
        reader.start(at, node, plain=plain)
        if (end := blocks.read(reader, node, plain)) is not None:
            value = reader.env[at]
            reader.end(end, *(() if plain else (value.axes, value.shape)))
            return
    if node.op in several.OF_ONE and len(node.inputs) > 1:
        raise refuse(str(node), f"its input {node.inputs[1]!r} is not known")
    if node.op in several.OPS and several.OPS[node.op](reader, node):
        return
    if node.op in _FRACTIONS and not reader.graph.has_floats(at):
        raise refuse(str(node), "it makes whole numbers of fractions")
    if node.op not in OPS:
        raise refuse(str(node), f"the operator {node.op!r} can't be converted")
    if len(names) > 1:
        said = ", ".join(map(repr, names))
        raise refuse(str(node), f"its inputs {said} follow from the graph's, expected one")
    value = reader.env[at]
    each = node.op in functions.EACH
    reader.start(at, node, plain=not each)
    end = OPS[node.op](reader, node)
    if end is None:
        _check(reader, node, at)
    same = each and end is None and value.shape
    if (end or node.outputs[0]) not in reader.env:
        reader.end(end or node.outputs[0], *((value.axes, value.shape) if same else ()))


def _check_dtype(graph: Graph, model: Model) -> None:
    """Raises where the layers give another dtype: of whole numbers, many become floating ones."""
    import onnx

    def dtype(kind: int) -> Any:
        return jax.dtypes.canonicalize_dtype(onnx.helper.tensor_dtype_to_np_dtype(kind))

    single = onnx.TensorProto.FLOAT
    there = [graph.types.get(name, single) for name in graph.outputs]
    if {*graph.dtypes.values(), *there} == {single}:
        return
    shapes = [graph.shapes[name] for name in graph.inputs]
    if any(None in shape[1:] for shape in shapes):
        return
    xs = [jax.ShapeDtypeStruct((2, *shape[1:]), dtype(kind))
          for shape, kind in zip(shapes, graph.dtypes.values(), strict=True)]  # fmt: skip
    try:
        found = jax.tree.leaves(jax.eval_shape(model.__call__, *xs))
    except (TypeError, ValueError) as error:
        raise refuse(str(graph.path), f"it computes whole numbers, and layers others "
                     f"({error})") from error  # fmt: skip
    for kind, array, name in zip(there, found, graph.outputs, strict=True):
        if array.dtype != dtype(kind):
            raise refuse(str(graph.path), f"its output {name!r} is {dtype(kind)}, and that of "
                         f"layers {array.dtype}")  # fmt: skip


def _check(reader: Reader, node: Node, at: str) -> None:
    """Raises for another output than the first, and for an input that the handler left alone."""
    other = next((n for n in node.outputs[1:] if n in reader.graph.users), None)
    if other is not None:
        raise refuse(str(node), f"its output {other!r} is used, expected the first")
    for index, name in enumerate(node.inputs):
        if name and name != at and index not in node.taken:
            raise refuse(str(node), f"its input {name!r} is not known")
