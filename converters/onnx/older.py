"""Files of opsets below those that are read, raised by onnx's own version converter.

It refuses what it has no way for. What it needs or passes over is settled here first: it takes no
free sizes, and before opset 7 an array went along an axis that its operator named.
"""

import math
from pathlib import Path
from typing import Any

from fwt._types import FileFormatError
from fwt.converters.rows.row import refuse

_SIZE = 7919  # in place of a free size, until the file is raised: a prime that no model has
_ALONG = ("Add", "Sub", "Mul", "Div", "Pow", "PRelu")


def raised(proto: Any, version: int, target: int, path: Path) -> Any:
    """The same model with a newer opset.

    Args:
        proto: a model, which is changed.
        version: its opset.
        target: the opset that is wanted.
        path: its file, for errors.
    """
    import onnx.version_converter

    if any(t.data_location == onnx.TensorProto.EXTERNAL for t in proto.graph.initializer):
        raise FileFormatError(f"{path}: opset {version} with its arrays in another file: only from "
                              f"opset {target} on")  # fmt: skip
    for node in proto.graph.node:
        if node.domain in ("", "ai.onnx") and not onnx.defs.has(node.op_type, version):
            raise refuse(f"{path}: {node.name or node.op_type}",
                         f"{node.op_type!r} is no operator of ONNX's opset {version}")  # fmt: skip
    ends = onnx.GraphProto()
    ends.input.extend(proto.graph.input)
    ends.output.extend(proto.graph.output)
    proto.ir_version = max(proto.ir_version, 4)  # from which on weights are no inputs
    del proto.graph.value_info[:]
    for value in proto.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if not (dim.HasField("dim_value") and dim.dim_value > 0):
                dim.dim_value = _SIZE
    try:
        for node in proto.graph.node:
            told = {a.name for a in node.attribute}
            if version < 6 and node.op_type == "Selu":  # it had other defaults
                for name, value in (("alpha", 1.6732), ("gamma", 1.0507)):
                    if name not in told:
                        node.attribute.append(onnx.helper.make_attribute(name, value))
        if version < 6:  # in which more shapes are known
            proto = onnx.version_converter.convert_version(proto, 6)
        if version < 7:
            _broadcast(proto)
        new = onnx.version_converter.convert_version(proto, target)
    except Exception as error:  # of several kinds, for it checks nothing first
        why = " ".join(str(error).split()).rpartition("failed: ")[2].replace("$", "")[:200]
        raise FileFormatError(
            f"{path}: opset {version}, and onnx's version converter does not bring it to opset "
            f"{target} ({why}): export the model again with opset {target} or later"
        ) from error
    for given, kept in ((new.graph.input, ends.input), (new.graph.output, ends.output)):
        old = {value.name: value for value in kept}
        for value in given:
            if value.name in old:
                value.CopyFrom(old[value.name])
    del new.graph.value_info[:]
    return new


def _broadcast(proto: Any) -> None:
    """Gives arrays that go along a named axis, or along the channels, the axes of what they meet,
    as since opset 7."""
    import onnx

    nodes = [n for n in proto.graph.node if n.op_type in _ALONG]
    named = {id(n): a for n in nodes for a in n.attribute if a.name == "axis"}
    if not any(id(n) in named or n.op_type == "PRelu" for n in nodes):
        return
    weights = {t.name: t for t in proto.graph.initializer}
    shapes = onnx.shape_inference.infer_shapes(proto).graph
    ranks = {
        v.name: len(v.type.tensor_type.shape.dim)
        for v in (*shapes.value_info, *shapes.input)
        if v.type.tensor_type.HasField("shape")
    }
    made: dict[tuple[str, int], str] = {}
    for node in nodes:
        axis = named.get(id(node))
        if axis is None and node.op_type != "PRelu":
            continue
        first, second = node.input
        tensor = weights.get(second)
        if tensor is None or first not in ranks:
            raise ValueError(f"{node.op_type} of arrays along an axis, whose ranks are not known")
        count = len(tensor.dims)
        if math.prod(tensor.dims) == 1:
            if axis is not None:
                node.attribute.remove(axis)
            continue
        start = 1 if axis is None else axis.i % ranks[first]
        if count != 1 and node.op_type == "PRelu":
            raise ValueError(f"PRelu with a slope of shape {list(tensor.dims)}")
        after = ranks[first] - start - count
        if after < 0:
            raise ValueError(f"{node.op_type} with {count} axes from axis {start} on")
        if axis is not None:
            node.attribute.remove(axis)
        if after:
            if (second, after) not in made:
                name = f"{second}/{after}"
                while name in ranks or name in weights:
                    name += "_"
                new = proto.graph.initializer.add()
                new.CopyFrom(tensor)
                new.name = made[second, after] = name
                new.dims.extend([1] * after)
            node.input[1] = made[second, after]
