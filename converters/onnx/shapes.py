"""ONNX's operators without weights: windows, shapes and functions."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fwt.converters.onnx import blocks, recurrent, weights
from fwt.converters.onnx.line import Handler, Reader, array, spatial, window_of
from fwt.converters.onnx.numbers import Node, axes_of, slices_of
from fwt.converters.rows.padding import pairs_in
from fwt.converters.rows.row import refuse

# -- windows ---------------------------------------------------------------------------------------


def _pool(kind: str) -> Callable[[Reader, Node], None]:
    def op(reader: Reader, node: Node) -> None:
        reader.only(node)
        r = spatial(node, reader.rank(node))
        window = tuple(node("kernel_shape"))
        if node("storage_order", 0) or len([o for o in node.outputs if o]) > 1:
            raise refuse(str(node), "it gives the places of the maxima too")
        settings = window_of(reader, node, window)
        if kind == "Avg":
            if any(d != 1 for d in settings.pop("dilation")):
                raise refuse(str(node), "an average over a window with holes")
            settings["count_include_pad"] = bool(node("count_include_pad", 0))
            if r > 1:
                settings["divisor_override"] = None
        else:
            settings["return_indices"] = False
        ceil = bool(node("ceil_mode", 0))
        if ceil and any(lo != hi for lo, hi in settings["padding"]):
            raise refuse(str(node), "ceil_mode=1 with other pads before than after")
        if ceil:
            settings["padding"] = tuple(lo for lo, _ in settings["padding"])
        reader.add(reader.name(node), f"{kind}Pool{r}d", kernel_size=window, ceil_mode=ceil,
                   **settings)  # fmt: skip

    return op


def _lp_pool(reader: Reader, node: Node) -> None:
    reader.only(node)
    window = tuple(node("kernel_shape"))
    settings = window_of(reader, node, window)
    if any(d != 1 for d in settings["dilation"]):
        raise refuse(str(node), "a power average over a window with holes")
    r = spatial(node, reader.rank(node))
    if node("ceil_mode", 0):
        raise refuse(str(node), "ceil_mode=1")
    power, name = node("p", 2), reader.name(node)
    if not power >= 1:
        raise refuse(str(node), f"p={power}: expected at least 1")
    if any(lo or hi for lo, hi in settings["padding"]):
        pads = pairs_in("torch", settings["padding"])
        reader.add(f"{name}__pad", f"ZeroPad{r}d", padding=pads)
    if power % 2:  # ONNX takes magnitudes, torch's own layer does not
        reader.add(f"{name}__abs", "Pointwise", function="abs")
    reader.add(name, f"LPPool{r}d", norm_type=float(power), kernel_size=window,
               stride=settings["stride"])  # fmt: skip


def _global_pool(kind: str) -> Callable[[Reader, Node], None]:
    def op(reader: Reader, node: Node) -> None:
        reader.only(node)
        r = spatial(node, reader.rank(node))
        reader.add(reader.name(node), f"Adaptive{kind}Pool{r}d", output_size=(1,) * r,
                   **({"return_indices": False} if kind == "Max" else {}))  # fmt: skip

    return op


def _pad(reader: Reader, node: Node) -> None:
    reader.only(node)
    rank = reader.rank(node)
    flat = node("pads") or np.ravel(array(reader, node, 1)).tolist()
    fill = node("value", 0.0)
    if "pads" not in node.attributes:
        given = reader.graph.const(node, 2)
        fill = 0.0 if given is None else float(np.ravel(given)[0])
        if (axes := reader.graph.const(node, 3)) is not None:
            half, full = len(flat) // 2, [0] * (2 * rank)
            for i, axis in enumerate(np.ravel(axes)):
                full[axis % rank], full[rank + axis % rank] = flat[i], flat[half + i]
            flat = full
    mode = node("mode", "constant")
    kinds = {"constant": "ZeroPad" if fill == 0 else "ConstantPad", "reflect": "ReflectionPad",
             "edge": "ReplicationPad", "wrap": "CircularPad"}  # fmt: skip
    if len(flat) != 2 * rank or mode not in kinds:
        raise refuse(str(node), f"mode={mode!r} with pads {flat}")
    more = {"value": fill} if kinds[mode] == "ConstantPad" else {}
    _padded(reader, node, [(flat[a], flat[rank + a]) for a in range(rank)], kinds[mode], more)


def _padded(
    reader: Reader, node: Node, pairs: Sequence[tuple[int, int]], kind: str, more: Mapping[str, Any]
) -> None:
    """A pad, or a crop of negative amounts, of any axes but the batch's."""
    rank, name = len(pairs), reader.name(node)
    still = [a for a in range(1, rank) if tuple(pairs[a]) == (0, 0)]
    if tuple(pairs[0]) != (0, 0):
        raise refuse(str(node), "it pads or cuts the batch")
    if rank not in (3, 4, 5) or not still:
        raise refuse(str(node), f"it pads or cuts {rank - 1} axes by {pairs[1:]}")

    channel = still[0] if still[0] == 1 else still[-1]
    moved = [pairs[a] for a in range(1, rank) if a != channel]

    def add() -> None:
        reader.add(name, f"{kind}{rank - 2}d", padding=pairs_in("torch", tuple(moved)), **more)

    reader.with_second(channel, rank, name, add)


def _slice(reader: Reader, node: Node) -> None:
    reader.only(node)
    shape = reader.shape(node)
    pairs = []
    for axis, (size, cut) in enumerate(zip(shape, slices_of(reader.graph, node, len(shape)))):
        if cut == slice(None) or cut == slice(0, None, 1) or cut == slice(None, None, 1):
            pairs.append((0, 0))
            continue
        if axis == 0 or size is None or cut.step not in (None, 1):
            raise refuse(str(node), f"it takes {cut} of axis {axis}")
        start, stop, _ = cut.indices(size)
        if stop <= start:
            raise refuse(str(node), f"nothing is left of axis {axis}")
        pairs.append((-start, stop - size))
    _padded(reader, node, pairs, "ZeroPad", {})


def _resize(reader: Reader, node: Node) -> None:
    reader.only(node)
    shape = reader.shape(node)
    rank = len(shape)
    r = spatial(node, rank)
    old = node.op == "Upsample"
    scales = node("scales") if old and node("scales") else reader.graph.const(node, 1 if old else 2)
    sizes = None if old else reader.graph.const(node, 3)
    mode = node("mode", "nearest")
    how = node("coordinate_transformation_mode", "asymmetric" if old else "half_pixel")
    for name in ("cubic_coeff_a", "extrapolation_value", "nearest_mode"):
        node(name)  # of other modes
    if node("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise refuse(str(node), "keep_aspect_ratio_policy")
    if not old:
        reader.graph.const(node, 1)  # a region, of another mode
    if node("antialias", 0) or node("axes") is not None or node("exclude_outside", 0):
        raise refuse(str(node), "antialias, axes or exclude_outside")
    settings: dict[str, Any] = {"size": None, "scale_factor": None, "align_corners": None}
    if sizes is not None and np.size(sizes):
        target = [int(s) for s in np.ravel(sizes)]
        if target[1] != shape[1] or target[0] not in (-1, shape[0]):
            raise refuse(str(node), f"it resizes {shape} to {target}")
        settings["size"] = tuple(target[2:])
        factors = [m / n for m, n in zip(target[2:], shape[2:], strict=True)]
    else:
        given = [float(s) for s in np.ravel(scales)]
        if len(given) != rank or given[:2] != [1.0, 1.0]:
            raise refuse(str(node), f"it resizes by {given}")
        factors = given[2:]
        settings["scale_factor"] = tuple(factors)
    whole = all(f == int(f) for f in factors)
    if mode == "nearest":
        rounding = node("nearest_mode", "floor" if old else "round_prefer_floor")
        centred = how in ("half_pixel", "pytorch_half_pixel") and "round" in rounding
        if not (how == "asymmetric" and rounding == "floor") and not (whole and centred):
            raise refuse(str(node), f"nearest with {how} and {rounding}")
        settings["mode"] = "nearest"
    elif mode == "linear" and how in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        if how == "pytorch_half_pixel" and any(f * n <= 1 for f, n in zip(factors, shape[2:])):
            raise refuse(str(node), "pytorch_half_pixel to one pixel")
        settings["mode"] = ("linear", "bilinear", "trilinear")[r - 1]
        settings["align_corners"] = corners = how == "align_corners"
        if corners and any(f * n != int(f * n) for f, n in zip(factors, shape[2:], strict=True)):
            raise refuse(str(node), f"align_corners to sizes of {factors} times {shape[2:]}")
    else:
        raise refuse(str(node), f"mode={mode!r} with {how!r}")
    reader.add(reader.name(node), "Upsample", recompute_scale_factor=None, **settings)


def _depth_to_space(reader: Reader, node: Node) -> None:
    reader.only(node)
    size, name = node("blocksize"), reader.name(node)
    if node("mode", "DCR") != "CRD":  # the places of a block come before the channels
        reader.add(f"{name}__order", "ChannelShuffle", groups=size**2)
    reader.add(name, "PixelShuffle", upscale_factor=size)


def _space_to_depth(reader: Reader, node: Node) -> None:
    reader.only(node)
    size, name = node("blocksize"), reader.name(node)
    channels = reader.shape(node)[1]
    reader.add(name, "PixelUnshuffle", downscale_factor=size)
    if node("mode", "DCR") != "CRD":
        reader.add(f"{name}__order", "ChannelShuffle", groups=channels)


def _lrn(reader: Reader, node: Node) -> None:
    reader.only(node)
    if node("size") % 2 == 0:
        raise refuse(str(node), f"size={node('size')}: an even window lies otherwise in torch")
    reader.add(reader.name(node), "LocalResponseNorm", size=node("size"), alpha=node("alpha", 1e-4),
               beta=node("beta", 0.75), k=node("bias", 1.0))  # fmt: skip


# -- shapes ----------------------------------------------------------------------------------------


def _flatten(reader: Reader, node: Node) -> None:
    reader.only(node)
    rank, axis = reader.rank(node), node("axis", 1)
    if axis % rank != 1:
        raise refuse(str(node), f"axis={axis}: it flattens the batch too")
    if rank > 2:
        reader.add(reader.name(node), "Flatten", start_dim=1, end_dim=-1)


def _reshape(reader: Reader, node: Node) -> str | None:
    reader.only(node)
    shape = reader.shape(node)
    if (found := _grouped(reader, node, shape)) is not None:
        return found
    if (found := _product(reader, node, shape)) is not None:
        return found
    new = _new_shape(reader, node, shape)
    reader.graph.shapes[node.outputs[0]] = (shape[0], *new)
    if new == shape[1:]:
        return None
    if (found := blocks.grouped(reader, node, new)) is not None:
        return found
    name = reader.name(node)
    if len(new) == 1:
        reader.add(name, "Flatten", start_dim=1, end_dim=-1)
        return None
    if len(shape) > 2:
        reader.add(f"{name}__flatten", "Flatten", start_dim=1, end_dim=-1)
    reader.add(name, "Unflatten", dim=1, unflattened_size=new)
    return None


def _new_shape(reader: Reader, node: Node, shape: Any) -> tuple[int, ...]:
    """The sizes after a Reshape, Squeeze or Unsqueeze, which must leave the batch alone."""
    if node.op != "Reshape":
        axes = axes_of(reader.graph, node)
        if axes is None:
            raise refuse(str(node), "without axes it drops a batch of 1 too")
        rank = len(shape) + (len(axes) if node.op == "Unsqueeze" else 0)
        chosen = sorted(a % rank for a in axes)
        if 0 in chosen:
            raise refuse(str(node), "it moves the batch axis")
        if node.op == "Squeeze":
            return tuple(s for i, s in enumerate(shape) if i and i not in chosen)
        new = list(shape)
        for axis in chosen:
            new.insert(axis, 1)
        return tuple(new[1:])
    target = [int(s) for s in np.ravel(array(reader, node, 1))]
    if not node("allowzero", 0):
        target = [shape[i] if s == 0 and i < len(shape) else s for i, s in enumerate(target)]
    inner, rest = math.prod(shape[1:]), list(target[1:])
    first = target[0]
    if not target or first not in (-1, None, shape[0]):
        raise refuse(str(node), f"it reshapes {shape} to {target}: the batch must stay")
    if -1 in rest:
        others = math.prod(s for s in rest if s != -1)
        rest[rest.index(-1)] = inner // max(others, 1)
    if math.prod(rest) != inner or any(s < 1 for s in rest):
        raise refuse(str(node), f"it reshapes {shape} to {target}: the batch must stay")
    return tuple(rest)


def _grouped(reader: Reader, node: Node, shape: Any) -> str | None:
    """A GroupNorm, which older exporters say as an InstanceNormalization of groups."""
    graph = reader.graph
    users = graph.users.get(node.outputs[0], [])
    if len(users) != 1 or users[0].op != "InstanceNormalization" or len(shape) < 3:
        return None
    norm = users[0]
    after = graph.users.get(norm.outputs[0], [])
    new = _new_shape(reader, node, shape)
    scale, bias = array(reader, norm, 1), array(reader, norm, 2)
    if len(after) != 1 or after[0].op != "Reshape" or len(new) != 2 or np.any(scale != 1) or (
        np.any(bias != 0) or shape[1] % new[0]
    ):  # fmt: skip
        return None
    if _new_shape(reader, after[0], (shape[0], *new)) != shape[1:]:
        return None
    reader.add(reader.name(norm), "GroupNorm", num_groups=new[0], num_channels=shape[1],
               eps=norm("epsilon", 1e-5), affine=False)  # fmt: skip
    reader.lacks = "scale"
    return after[0].outputs[0]


def _product(reader: Reader, node: Node, shape: Any) -> str | None:
    """A product over the last axis of more than two, which TensorFlow writes between two Reshapes
    that take the others for the batch."""
    graph = reader.graph
    target = graph.known.get(node.inputs[1]) if len(node.inputs) > 1 else None
    users = graph.users.get(node.outputs[0], [])
    if len(shape) < 3 or node.op != "Reshape" or not isinstance(target, np.ndarray) or (
        np.ravel(target).tolist() != [-1, shape[-1]] or len(users) != 1
        or users[0].op not in ("MatMul", "Gemm") or users[0].inputs[0] != node.outputs[0]
    ):  # fmt: skip
        return None
    after = graph.users.get(users[0].outputs[0], [])
    if len(after) != 1 or after[0].op != "Reshape":
        return None
    if tuple(graph.shape(after[0].outputs[0], after[0])[1:-1]) != tuple(shape[1:-1]):
        return None
    reader.at = node.outputs[0]
    weights.OPS[users[0].op](reader, users[0])
    return after[0].outputs[0]


def _tile(reader: Reader, node: Node) -> None:
    """Copies along axes of size 1."""
    reader.only(node)
    shape = reader.shape(node)
    given = np.ravel(array(reader, node, 1)).tolist()
    if node.op == "Tile":
        times = given
    else:
        times = [1 if m in (1, n) else m for n, m in zip(shape, given)]
        times[:1] = [1 if given[:1] in ([1], [-1], [shape[0]]) else 0]
    new = given
    wide = [a for a, k in enumerate(times) if k != 1]
    still = [a for a in range(1, len(shape)) if a not in wide]
    if len(given) != len(shape) or 0 in wide or any(shape[a] != 1 for a in wide) or not still or (
        len(shape) not in (3, 4, 5)
    ):  # fmt: skip
        raise refuse(str(node), f"it repeats {shape} to {new}: only axes of size 1")
    if not wide:
        return
    name = reader.name(node)
    scale = tuple(float(times[a]) for a in range(1, len(shape)) if a != still[-1])
    reader.with_second(still[-1], len(shape), name, lambda: reader.add(
        name, "Upsample", scale_factor=scale, mode="nearest"))  # fmt: skip


def _transpose(reader: Reader, node: Node) -> str | None:
    reader.only(node)
    rank = reader.rank(node)
    order = tuple(node("perm") or reversed(range(rank)))
    if order == (1, 0, 2):
        users = reader.graph.users.get(node.outputs[0], [])
        if recurrent.are_recurrent(users):
            return recurrent.recurrent(reader, users[0])
    if order[0] != 0:
        raise refuse(str(node), f"perm={list(order)} moves the batch axis")
    reader.permute(order, reader.name(node))
    return None


OPS: Mapping[str, Handler] = {
    "MaxPool": _pool("Max"), "AveragePool": _pool("Avg"), "LpPool": _lp_pool,
    "GlobalAveragePool": _global_pool("Avg"), "GlobalMaxPool": _global_pool("Max"),
    "Pad": _pad, "Slice": _slice,
    "Resize": _resize, "Upsample": _resize, "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth, "LRN": _lrn,
    "Flatten": _flatten, "Reshape": _reshape, "Squeeze": _reshape, "Unsqueeze": _reshape,
    "Transpose": _transpose, "Tile": _tile, "Expand": _tile,
}  # fmt: skip
