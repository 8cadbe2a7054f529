"""ONNX's operators without weights: windows, shapes and functions."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fwt.converters.onnx.numbers import Node, slices_of
from fwt.converters.onnx.reader import Handler, Reader, array, spatial, window_of
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
    if not still and rank < 5:  # an axis of one entry stands for the channels
        size = reader.shape(node)[1]
        reader.add(f"{name}__split", "Unflatten", dim=1, unflattened_size=(1, size))
        reader.add(name, f"{kind}{rank - 1}d", padding=pairs_in("torch", tuple(pairs[1:])), **more)
        reader.add(f"{name}__joined", "Flatten", start_dim=1, end_dim=2)
        return
    if rank not in (3, 4, 5) or not still:
        raise refuse(str(node), f"it pads or cuts {rank - 1} axes by {pairs[1:]}")
    channel = still[0] if still[0] == 1 else still[-1]
    moved = [pairs[a] for a in range(1, rank) if a != channel]

    def add() -> None:
        reader.add(name, f"{kind}{rank - 2}d", padding=pairs_in("torch", tuple(moved)), **more)

    reader.with_second(channel, rank, name, add)


def cropped(reader: Reader, node: Node) -> bool:
    """A Slice of the axes of an image, as a pad of negative amounts."""
    shape = reader.shape(node)
    pairs = []
    for axis, (size, cut) in enumerate(zip(shape, slices_of(reader.graph, node, len(shape)))):
        if cut in (slice(None), slice(0, None, 1), slice(None, None, 1)):
            pairs.append((0, 0))
            continue
        if axis == 0 or size is None or cut.step not in (None, 1):
            return False
        start, stop, _ = cut.indices(size)
        if stop <= start:
            raise refuse(str(node), f"nothing is left of axis {axis}")
        pairs.append((-start, stop - size))
    if len(shape) not in (4, 5) or (0, 0) not in pairs[1:]:
        return False
    _padded(reader, node, pairs, "ZeroPad", {})
    return True


def _resize(reader: Reader, node: Node) -> None:
    reader.only(node)
    rank = reader.rank(node)
    r = spatial(node, rank)
    old = node.op == "Upsample" or reader.graph.opset == 10  # (x, scales)
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
        target, shape = [int(s) for s in np.ravel(sizes)], reader.shape(node)
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
        if old and min(factors, default=1.0) < 1:
            why = f"it resizes by {given}, and only from opset 11 on is it told to which pixels"
            raise refuse(str(node), why, "export the model again with opset 11 or later")
    whole = all(f == int(f) for f in factors)
    if mode == "nearest":
        rounding = node("nearest_mode", "floor" if old else "round_prefer_floor")
        centred = how in ("half_pixel", "pytorch_half_pixel") and "round" in rounding
        if not (how == "asymmetric" and rounding == "floor") and not (whole and centred):
            raise refuse(str(node), f"nearest with {how} and {rounding}")
        settings["mode"] = "nearest"
    elif mode == "linear" and how in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        exact = how == "half_pixel"  # whatever the sizes are
        here = [] if exact else list(zip(factors, reader.shape(node)[2:], strict=True))
        if how == "pytorch_half_pixel" and any(f * n <= 1 for f, n in here):
            raise refuse(str(node), "pytorch_half_pixel to one pixel")
        settings["mode"] = ("linear", "bilinear", "trilinear")[r - 1]
        settings["align_corners"] = corners = how == "align_corners"
        if corners and any(f * n != int(f * n) for f, n in here):
            raise refuse(str(node), f"align_corners to sizes of {factors} times what it takes")
    else:
        raise refuse(str(node), f"mode={mode!r} with {how!r}")
    if settings["scale_factor"] and not (whole and mode == "nearest"):  # which repeats pixels
        settings["copies"] = False
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


OPS: Mapping[str, Handler] = {
    "MaxPool": _pool("Max"), "AveragePool": _pool("Avg"), "LpPool": _lp_pool,
    "GlobalAveragePool": _global_pool("Avg"), "GlobalMaxPool": _global_pool("Max"),
    "Pad": _pad,
    "Resize": _resize, "Upsample": _resize, "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth, "LRN": _lrn,
}  # fmt: skip
