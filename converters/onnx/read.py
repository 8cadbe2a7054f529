"""ONNX in: a straight line of operators as layers in torch's terms, from which the walk goes on."""

import os
from typing import Any

import jax

from fwt._types import FileFormatError, Model
from fwt.converters import io as _io
from fwt.converters.frameworks import flax as _flax
from fwt.converters.frameworks import torch_layers
from fwt.converters.onnx import blocks, functions, recurrent, shapes, weights
from fwt.converters.onnx import graph as _graph
from fwt.converters.onnx import ours as _ours
from fwt.converters.onnx.graph import Graph
from fwt.converters.onnx.line import Reader
from fwt.converters.onnx.numbers import Node
from fwt.converters.rows.row import Layer, refuse
from fwt.converters.walk import convert
from fwt.converters.walk.net import Net, folded

# Attributes that exporters write at their defaults, whether or not they matter.
_HARMLESS = {"allowzero": 0, "noop_with_empty_axes": 0, "saturate": 1}
OPS = {**weights.OPS, **shapes.OPS, **functions.OPS, **recurrent.OPS}


def from_onnx(
    path: str | os.PathLike[str],
    *,
    layout: str = "source",
    external_data: bool = False,
) -> Model:
    """An ONNX file as a Flax model of this library, with the same outputs.

    A file of :func:`to_onnx` gives back the model that it was written from, bit for bit. Any other
    graph must be a straight line: one input, one output, each operator after the other, as
    ``torch.onnx.export`` (both exporters), tf2onnx, Keras and :func:`to_onnx` write models of
    layers. Needs onnx: ``pip install 'fwt[onnx]'``.

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
        if ours is not None and layout == "source":
            return ours
        if ours is not None:
            net = _flax.read_flax(*ours)
        else:
            graph = Graph(proto, path, external_data)
            if graph.dtype == 11 and not jax.config.read("jax_enable_x64"):
                raise FileFormatError(f"{path}: it computes in float64: set jax_enable_x64")
            net = folded(Net.line(_layers(graph), graph.shapes[graph.input][1:]),
                         torch_layers.with_selected)  # fmt: skip
        source: Any = "torch" if ours is None else "flax"
        model = _flax.write_flax(convert.convert(net, source, "flax", layout))
        if ours is None:
            _check_dtype(graph, model)
        return model


def _layers(graph: Graph) -> list[Layer]:
    reader = Reader(graph)
    while graph.users.get(reader.at):
        block, end = graph.block(reader.at)
        node = block[0]
        parts = (blocks.function_of, blocks.softmax_of, blocks.centred_of)
        found = next((f for part in parts if (f := part(reader, block, end))), None)
        if found is not None:
            end = found
        elif len(block) > 1:
            blocks.several(reader, block, end)
        elif node.op in OPS:
            found = OPS[node.op](reader, node)
            if found is None:
                _check(node, reader.at, end)
            end = found or end
        else:
            raise refuse(str(node), f"the operator {node.op!r} can't be converted")
        reader.at = end
    if reader.at != graph.output:
        raise refuse(str(graph.path), f"the output {graph.output!r} does not come from the input")
    for node in graph.nodes:
        unknown = [n for n, v in node.attributes.items()
                   if n not in node.taken and _HARMLESS.get(n) != v]  # fmt: skip
        if unknown:
            raise refuse(str(node), f"its {unknown[0]}={node.attributes[unknown[0]]!r:.60}")
    return reader.layers


def _check_dtype(graph: Graph, model: Model) -> None:
    """Raises where the layers give another dtype: of whole numbers, many become floating ones."""
    import onnx

    def dtype(kind: int) -> Any:
        return jax.dtypes.canonicalize_dtype(onnx.helper.tensor_dtype_to_np_dtype(kind))

    there = graph.types.get(graph.output, onnx.TensorProto.FLOAT)
    shape = model.module.input_shape
    if shape is None or {graph.dtype, there} == {onnx.TensorProto.FLOAT}:
        return
    x = jax.ShapeDtypeStruct((1, *(s or 1 for s in shape)), dtype(graph.dtype))
    found = jax.eval_shape(model.__call__, x).dtype
    if found != dtype(there):
        raise refuse(str(graph.path), f"its output is {dtype(there)}, and that of layers {found}")


def _check(node: Node, at: str, end: str) -> None:
    """Raises for another output than the first, and for an input that the handler left alone."""
    if end != node.outputs[0]:
        raise refuse(str(node), f"its output {end!r} is used, expected the first")
    for index, name in enumerate(node.inputs):
        if name and name != at and index not in node.taken:
            raise refuse(str(node), f"its input {name!r} is not known")
