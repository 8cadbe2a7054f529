"""ONNX's operators with weights: products, convolutions, norms, and arithmetic with numbers."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fwt.converters.onnx.numbers import ZEROS, Node
from fwt.converters.onnx.reader import (
    Handler,
    Reader,
    array,
    axis_or_none,
    one_axis,
    spatial,
    window_of,
)
from fwt.converters.rows.row import refuse

# -- products --------------------------------------------------------------------------------------


def _linear(reader: Reader, node: Node, weight: np.ndarray, bias: Any, name: str) -> None:
    if weight.ndim != 2:
        raise refuse(str(node), f"weights of shape {weight.shape}, expected two axes")
    outputs, inputs = weight.shape
    if bias is not None:
        if bias.size not in (1, outputs) or bias.size != max(bias.shape, default=1):
            raise refuse(str(node), f"a bias of shape {bias.shape} for {outputs} outputs")
        bias = np.ascontiguousarray(np.broadcast_to(bias.reshape(-1), outputs))
    reader.add(
        name, "Linear", {"weight": np.ascontiguousarray(weight), "bias": bias},
        in_features=inputs, out_features=outputs, bias=bias is not None,
    )  # fmt: skip
    reader.lacks = "bias" if bias is None else None


def _gemm(reader: Reader, node: Node) -> None:
    reader.only(node)
    weight, bias = array(reader, node, 1), reader.graph.const(node, 2)
    if node("transA", 0):
        raise refuse(str(node), "transA=1: the batch would be its second axis")
    if bias is ZEROS:
        bias = None
    if bias is not None and bias.ndim > 1 and (bias.ndim > 2 or bias.shape[0] != 1):
        raise refuse(str(node), f"a bias of shape {bias.shape}: one for each example")
    weight = _times(node, "alpha", weight)
    beta = node("beta", 1.0)
    bias = None if bias is None or beta == 0 else _times(node, "beta", bias)
    _linear(reader, node, weight if node("transB", 0) else weight.T, bias,
            reader.name(node, node.inputs[1]))  # fmt: skip


def _times(node: Node, name: str, value: np.ndarray) -> np.ndarray:
    """An array times a factor of its node, where that rounds each number once and no more."""
    factor = node(name, 1.0)
    if factor == 1:
        return value
    if not factor:
        raise refuse(str(node), f"{name}=0: expected another number")
    with np.errstate(all="ignore"):
        new = (value.astype(np.float64) * factor).astype(value.dtype)
    size, least = np.abs(new), np.finfo(value.dtype).tiny
    if not np.array_equal(np.isfinite(new), np.isfinite(value)) or np.any(
        (size < least) & (value != 0)
    ):  # fmt: skip
        raise refuse(str(node), f"{name}={factor}: its products with the weights are beyond "
                     f"{value.dtype}")  # fmt: skip
    return new


def _matmul(reader: Reader, node: Node) -> None:
    reader.only(node)
    _linear(reader, node, array(reader, node, 1).T, None, reader.name(node, node.inputs[1]))


def _conv(reader: Reader, node: Node) -> None:
    weight, bias, groups, window, r = _kernel(reader, node)
    reader.add(
        reader.name(node, node.inputs[1]), f"Conv{r}d", {"weight": weight, "bias": bias},
        in_channels=weight.shape[1] * groups, out_channels=weight.shape[0], kernel_size=window,
        groups=groups, bias=bias is not None, padding_mode="zeros",
        **window_of(reader, node, window),
    )  # fmt: skip
    reader.lacks = "bias" if bias is None else None


def _kernel(reader: Reader, node: Node) -> tuple[np.ndarray, Any, int, tuple[int, ...], int]:
    """The kernel, bias, groups, window and number of spatial axes of a convolution."""
    reader.only(node)
    weight, bias = array(reader, node, 1), reader.graph.const(node, 2)
    window = weight.shape[2:]
    said, pads = node("kernel_shape"), node("pads") or ()
    if tuple(said or window) != window or any(p < 0 for p in pads):
        raise refuse(str(node), f"kernel_shape={said}, pads={pads} with a kernel of {window}")
    return weight, bias, node("group", 1), window, spatial(node, weight.ndim)


def _conv_transpose(reader: Reader, node: Node) -> None:
    weight, bias, groups, window, r = _kernel(reader, node)
    extra = tuple(node("output_padding") or (0,) * r)
    auto, asked = node("auto_pad", "NOTSET"), node("output_shape")
    plain = {k: v for k, v in node.attributes.items() if k != "auto_pad"}
    given = Node(node.op, node.name, node.inputs, node.outputs, plain, node.taken)
    settings = window_of(reader, given, window)
    if asked is not None or auto in ("SAME_UPPER", "SAME_LOWER"):
        sizes = reader.shape(node)[2:]
        spread = zip(sizes, window, settings["stride"], settings["dilation"], extra, strict=True)
        pads = []
        for i, (n, k, s, d, e) in enumerate(spread):
            assert n is not None
            wanted = n * s if asked is None else asked[-r:][i]
            total = s * (n - 1) + e + (k - 1) * d + 1 - wanted
            small = total // 2
            pads.append((small, total - small) if auto == "SAME_UPPER" else (total - small, small))
        if any(lo < 0 or hi < 0 for lo, hi in pads):
            raise refuse(str(node), f"auto_pad={auto}, output_shape={asked}: larger than what it "
                         "computes")  # fmt: skip
        settings["padding"] = tuple(pads)
    reader.add(
        reader.name(node, node.inputs[1]), f"ConvTranspose{r}d", {"weight": weight, "bias": bias},
        in_channels=weight.shape[0], out_channels=weight.shape[1] * groups, kernel_size=window,
        groups=groups, bias=bias is not None, output_padding=extra, padding_mode="zeros",
        **settings,
    )  # fmt: skip


def _embedding(reader: Reader, node: Node) -> None:
    where = [i for i, n in enumerate(node.inputs) if n == reader.at]
    if where == [0]:
        raise refuse(str(node), "it takes a part of its input")
    table = array(reader, node, 0)
    if node("axis", 0) != 0 or table.ndim != 2:
        raise refuse(str(node), f"it gathers along axis {node('axis', 0)} of {table.shape}")
    reader.add(
        reader.name(node, node.inputs[0]), "Embedding", {"weight": table},
        num_embeddings=table.shape[0], embedding_dim=table.shape[1], padding_idx=None,
        max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False,
    )  # fmt: skip


# -- norms -----------------------------------------------------------------------------------------


def _batch_norm(reader: Reader, node: Node) -> None:
    reader.only(node)
    if node("training_mode", 0) or len([o for o in node.outputs if o]) > 1:
        raise refuse(str(node), "it is in training mode")
    scale, bias, mean, var = (array(reader, node, i) for i in (1, 2, 3, 4))
    add_batch_norm(
        reader, reader.name(node, node.inputs[1]), reader.rank(node),
        {"weight": scale, "bias": bias, "running_mean": mean, "running_var": var},
        node("epsilon", 1e-5), round(1 - node("momentum", 0.9), 7),
    )  # fmt: skip


def add_batch_norm(
    reader: Reader, name: str, rank: int, arrays: Mapping[str, Any], epsilon: float, momentum: float
) -> None:
    kind = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}.get(rank)
    if kind is None:
        raise refuse(name, f"a BatchNorm of rank {rank}")
    reader.add(
        name, kind, arrays, num_features=arrays["running_mean"].size, eps=epsilon,
        momentum=momentum, affine=True,
    )  # fmt: skip


def _layer_norm(reader: Reader, node: Node) -> None:
    reader.only(node)
    axis = node("axis", -1) % reader.rank(node)
    if axis == 0:
        raise refuse(str(node), "it norms the batch")
    shape = reader.sizes_from(node, axis)
    scale, bias = array(reader, node, 1), reader.graph.const(node, 2)
    node("stash_type")
    if any(v is not None and v.ndim > len(shape) for v in (scale, bias)):
        raise refuse(str(node), f"a scale of shape {scale.shape} for the axes {shape}")
    add_layer_norm(reader, reader.name(node, node.inputs[1]), shape, scale, bias,
                    node("epsilon", 1e-5))  # fmt: skip


def add_layer_norm(
    reader: Reader, name: str, shape: Any, scale: Any, bias: Any, epsilon: float, kind: str = ""
) -> None:
    arrays = {"weight": scale, "bias": bias}
    arrays = {k: None if v is None else np.ascontiguousarray(np.broadcast_to(v, shape))
              for k, v in arrays.items()}  # fmt: skip
    settings = {"normalized_shape": tuple(shape), "eps": epsilon,
                "elementwise_affine": scale is not None}  # fmt: skip
    if kind != "RMSNorm":
        settings["bias"] = bias is not None
    reader.add(name, kind or "LayerNorm", arrays, **settings)
    reader.lacks = "scale" if scale is None else None


def _rms_norm(reader: Reader, node: Node) -> None:
    reader.only(node)
    rank = reader.rank(node)
    axis = node("axis", -1) % rank
    if node("stash_type", 1) != 1 or axis == 0:
        raise refuse(str(node), "it computes in half precision" if axis else "it norms the batch")
    shape, scale = reader.sizes_from(node, axis), array(reader, node, 1)
    if scale.ndim > len(shape):
        raise refuse(str(node), f"a scale of shape {scale.shape} for the axes {shape}")
    add_layer_norm(reader, reader.name(node, node.inputs[1]), shape, scale, None,
                   node("epsilon", 1e-5), "RMSNorm")  # fmt: skip


def _group_norm(reader: Reader, node: Node) -> None:
    reader.only(node)
    groups, size = node("num_groups"), reader.shape(node)[1]
    scale, bias = array(reader, node, 1), array(reader, node, 2)
    if scale.size == groups != size:  # as before opset 21
        scale, bias = (np.repeat(v, size // groups) for v in (scale, bias))
    name = reader.name(node, node.inputs[1])
    add_group_norm(reader, name, groups, scale, bias, node("epsilon", 1e-5))


def add_group_norm(
    reader: Reader, name: str, groups: int, scale: np.ndarray, bias: np.ndarray, epsilon: float
) -> None:
    reader.add(name, "GroupNorm", {"weight": scale, "bias": bias}, num_groups=groups,
               num_channels=scale.size, eps=epsilon, affine=True)  # fmt: skip


def _instance_norm(reader: Reader, node: Node) -> None:
    reader.only(node)
    scale, bias = array(reader, node, 1), array(reader, node, 2)
    plain = bool(np.all(scale == 1) and np.all(bias == 0))
    reader.add(
        reader.name(node, node.inputs[1]), f"InstanceNorm{spatial(node, reader.rank(node))}d",
        {} if plain else {"weight": scale, "bias": bias}, num_features=scale.size,
        eps=node("epsilon", 1e-5), momentum=0.1, affine=not plain,
    )  # fmt: skip
    reader.lacks = "scale" if plain else None


def _arithmetic(reader: Reader, node: Node) -> str | None:
    """Numbers added to or multiplied with the line: a bias, a scale, or a layer of its own."""
    where = node.inputs.index(reader.at)
    if node.op == "Mul" and node.inputs == [reader.at] * 2:
        reader.add(reader.name(node), "Pointwise", function="square")
        return None
    value, op = array(reader, node, 1 - where), node.op
    rank = reader.rank(node)
    if where == 1 and op in ("Sub", "Div"):
        raise refuse(str(node), "its input is what is taken away or divided by")
    if value.dtype.kind != "f":
        raise refuse(str(node), f"arithmetic of {value.dtype}")
    if value.ndim > rank:
        raise refuse(str(node), f"an array of shape {value.shape} for rank {rank}")
    if op == "Div":
        with np.errstate(divide="ignore"):
            value = 1 / value
        if not np.all((np.abs(value) >= np.finfo(value.dtype).tiny) & np.isfinite(value)):
            raise refuse(str(node), "it divides by 0, or by what has no float32 reciprocal")
    value = -value if op == "Sub" else value
    adds = op in ("Add", "Sub")
    if joined(reader, value, adds, rank):
        return None
    axis = one_axis(node, value, rank)
    name = reader.name(node)
    if axis is not None and (size := reader.graph.shapes[reader.at][axis]) != value.size:
        raise refuse(str(node), f"{value.size} numbers along an axis of {size}")
    if axis is None:
        number = float(value.reshape(-1)[0])
        reader.add(name, "Rescaling", scale=1.0 if adds else number, offset=number if adds else 0.0)
        return None
    flat = np.ascontiguousarray(value.reshape(-1))
    ones, zeros = np.ones_like(flat), np.zeros_like(flat)
    arrays = {"weight": ones if adds else flat, "bias": flat if adds else zeros,
              "running_mean": zeros, "running_var": ones}  # fmt: skip
    end = None
    users = reader.graph.users.get(node.outputs[0], [])
    if not adds and len(users) == 1 and users[0].op in ("Add", "Sub"):
        # A BatchNorm whose statistics are in its scale and bias already.
        there = users[0].inputs.index(node.outputs[0])
        shift = reader.graph.known.get(users[0].inputs[1 - there])
        if isinstance(shift, np.ndarray) and shift.size == flat.size and not (
            there and users[0].op == "Sub") and axis_or_none(shift, rank) == axis:  # fmt: skip
            shift = -shift if users[0].op == "Sub" else shift
            arrays["bias"] = np.ascontiguousarray(shift.reshape(-1), flat.dtype)
            end = users[0].outputs[0]
    # x * 1 / sqrt(1 + 0): exactly the product and the sum.
    reader.with_second(
        axis, rank, name, lambda: add_batch_norm(reader, name, rank, arrays, 0.0, 0.1)
    )
    return end


def joined(reader: Reader, value: np.ndarray, adds: bool, rank: int) -> bool:
    """Puts a sum or product into the layer before it, if it lacks just this."""
    lacks = reader.lacks
    if lacks is None or adds == (lacks == "scale"):
        return False
    index, layer = next((i, x) for i, x in enumerate(reader.layers) if x.name == reader.tip)
    settings, arrays = dict(layer.settings), dict(layer.arrays)
    if layer.kind in ("LayerNorm", "RMSNorm"):
        shape = settings["normalized_shape"]
        if value.shape[-len(shape) :] != shape or value.size != math.prod(shape):
            return False
    else:
        size = next(settings[n] for n in ("out_features", "out_channels", "num_channels",
                                          "num_features") if n in settings)  # fmt: skip
        shape, axis = (size,), axis_or_none(value, rank)
        if axis != (rank - 1 if layer.kind == "Linear" else 1) or value.size != size:
            return False
    value = np.ascontiguousarray(value.reshape(shape))
    if lacks == "scale":
        arrays = {"weight": value, "bias": np.zeros_like(value)}
        if layer.kind == "RMSNorm":
            del arrays["bias"]
        settings["elementwise_affine" if "normalized_shape" in settings else "affine"] = True
    else:
        arrays["bias"] = value
    if layer.kind in ("LayerNorm", "Linear") or layer.kind.startswith("Conv"):
        settings["bias"] = True
    reader.layers[index] = dataclasses.replace(layer, settings=settings, arrays=arrays)
    reader.sources[layer.name] = (*reader.sources.get(layer.name, ()), *reader.constants)
    reader.lacks = "shift" if lacks == "scale" and layer.kind != "RMSNorm" else None
    return True


def fits_norm(reader: Reader, name: str, value: np.ndarray) -> bool:
    """Whether an array may be what the LayerNorm before a value lacks, along all its axes."""
    layer = next((x for x in reader.layers if x.name == reader.env[name].name), None)
    shape = layer.settings.get("normalized_shape") if layer is not None else None
    return (
        layer is not None and layer.name in reader.lacking and shape is not None
        and len(reader.graph.users.get(name, ())) == 1
        and value.shape[-len(shape) :] == tuple(shape) and value.size == math.prod(shape)
    )  # fmt: skip


OPS: Mapping[str, Handler] = {
    "Gemm": _gemm, "MatMul": _matmul, "Conv": _conv, "ConvTranspose": _conv_transpose,
    "Gather": _embedding, "BatchNormalization": _batch_norm, "LayerNormalization": _layer_norm,
    "RMSNormalization": _rms_norm,
    "GroupNormalization": _group_norm, "InstanceNormalization": _instance_norm,
    "Add": _arithmetic, "Sub": _arithmetic, "Mul": _arithmetic, "Div": _arithmetic,
}  # fmt: skip
