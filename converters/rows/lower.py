"""Layers as simpler ones of the same framework, which a row then handles."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from fwt.converters.rows import grouped
from fwt.converters.rows.row import Framework, Layer, each, refuse

Lower = Callable[[Framework, Layer, int | None], "list[Layer] | None"]


def either(*functions: Lower) -> Lower:
    """The first that has something to lower."""

    def lower(framework: Framework, layer: Layer, rank: int | None) -> list[Layer] | None:
        for function in functions:
            found = function(framework, layer, rank)
            if found is not None:
                return found
        return None

    return lower


def _changed(layer: Layer, arrays: Any = None, **settings: Any) -> Layer:
    return dataclasses.replace(
        layer,
        settings={**layer.settings, **settings},
        arrays=layer.arrays if arrays is None else arrays,
    )


def channels_first(back: bool = True) -> Lower:
    """Keras's data_format="channels_first": a transposition, the layer, and back."""

    def lower(framework: Framework, layer: Layer, rank: int | None) -> list[Layer] | None:
        if framework != "keras" or layer.settings.get("data_format") != "channels_first":
            return None
        if rank is None:
            raise refuse(str(layer), "the rank of its input is not known", "give input_shape=")
        to_last, to_first = (*range(2, rank), 1), (rank - 1, *range(1, rank - 1))
        inner = _changed(layer, data_format="channels_last")
        there = Layer(f"{layer.name}__last", "Permute", {"dims": to_last}, fused=True)
        here = Layer(f"{layer.name}__first", "Permute", {"dims": to_first}, fused=True)
        keeps = back or layer.settings.get("keepdims")
        return [there, inner, here] if keeps else [there, inner]

    return lower


_MODES = {"reflect": "ReflectionPad", "replicate": "ReplicationPad", "circular": "CircularPad"}


def padding_mode(framework: Framework, layer: Layer, rank: int | None) -> list[Layer] | None:
    """A convolution that pads with anything but zeros: a pad, and the convolution."""
    settings = layer.settings
    if framework == "torch" and settings.get("padding_mode", "zeros") != "zeros":
        mode = settings["padding_mode"]
        window = settings["kernel_size"]
        count = len(window)
        dilation = each(count)(settings["dilation"])
        if mode not in _MODES:
            raise refuse(str(layer), f"padding_mode={mode!r} is not known")
        if settings["padding"] == "same":
            totals = [(k - 1) * d for k, d in zip(window, dilation, strict=True)]
            pads = [(t // 2, t - t // 2) for t in totals]
        elif settings["padding"] == "valid":
            pads = [(0, 0)] * count
        else:
            pads = [(p, p) for p in each(count)(settings["padding"])]
        flat = tuple(n for pair in reversed(pads) for n in pair)
        plain = _changed(layer, padding=(0,) * count, padding_mode="zeros")
        return [Layer(f"{layer.name}__pad", f"{_MODES[mode]}{count}d", {"padding": flat}), plain]
    if framework == "flax" and settings.get("padding") in ("CIRCULAR", "REFLECT"):
        window = settings["kernel_size"]
        dilation = each(len(window))(settings["kernel_dilation"] or 1)
        totals = [(k - 1) * d for k, d in zip(window, dilation, strict=True)]
        kind = "CircularPad" if settings["padding"] == "CIRCULAR" else "ReflectPad"
        pairs = tuple((t // 2, t - t // 2) for t in totals)
        pad = Layer(f"{layer.name}__pad", kind, {"padding": pairs})
        return [pad, _changed(layer, padding="VALID")]
    return None


def depthwise(framework: Framework, layer: Layer, rank: int | None) -> list[Layer] | None:
    """Keras's DepthwiseConv as a Conv with as many groups as inputs."""
    settings = dict(layer.settings)
    kernel = layer.arrays.get("kernel")
    if kernel is None:
        raise refuse(str(layer), "the array 'kernel' is missing")
    *window, inputs, times = kernel.shape
    if settings.pop("depth_multiplier", 1) != times:
        raise refuse(str(layer), f"kernel has shape {kernel.shape}, expected another depth")
    settings |= {"filters": inputs * times, "groups": inputs}
    arrays = {**layer.arrays, "kernel": kernel.reshape(*window, 1, inputs * times)}
    return [Layer(layer.name, f"Conv{len(window)}D", settings, arrays)]


def separable(framework: Framework, layer: Layer, rank: int | None) -> list[Layer] | None:
    """Keras's SeparableConv as a depthwise convolution and one of a window of 1."""
    arrays = dict(layer.arrays)
    try:
        first, second = arrays.pop("depthwise_kernel"), arrays.pop("pointwise_kernel")
    except KeyError as error:
        raise refuse(str(layer), f"the array {error} is missing") from error
    shared = ("strides", "padding", "dilation_rate", "kernel_size", "depth_multiplier")
    settings = {k: v for k, v in layer.settings.items() if not k.startswith("depthwise_")}
    settings = {k: v for k, v in settings.items() if not k.startswith("pointwise_")}
    if missing := [k for k in shared if k not in settings]:
        raise refuse(str(layer), f"the setting {missing[0]!r} is missing")
    deep = {k: settings.pop(k) for k in shared} | {"use_bias": False}
    count = first.ndim - 2
    settings |= {"kernel_size": (1,) * count, "strides": 1, "padding": "valid", "dilation_rate": 1}
    return [
        Layer(f"{layer.name}__depthwise", f"DepthwiseConv{count}D", deep, {"kernel": first}),
        Layer(layer.name, f"Conv{count}D", settings, {**arrays, "kernel": second}),
    ]


def transposed(framework: Framework, layer: Layer, rank: int | None) -> list[Layer] | None:
    """One form of a transposed convolution: the kernel as Keras has it, or one with groups."""
    kernel = "weight" if framework == "torch" else "kernel"
    value = layer.arrays.get(kernel)
    if value is None:
        raise refuse(str(layer), f"the array {kernel!r} is missing")
    if framework == "flax" and not layer.settings.get("transpose_kernel"):
        axes = tuple(range(value.ndim - 2))
        turned = np.flip(value, axes).swapaxes(-1, -2)
        return [_changed(layer, {**layer.arrays, kernel: turned}, transpose_kernel=True)]
    if framework == "flax":
        return None
    found = grouped.lowered(framework, layer)
    return None if found is None else [found]


def inner_layer(framework: Framework, layer: Layer, rank: int | None) -> list[Layer] | None:
    """A wrapper whose inner layer stands alone at inference."""
    return [dataclasses.replace(layer.inner[0], name=layer.name)] if layer.inner else None


def one_device(framework: Framework, layer: Layer, rank: int | None) -> list[Layer] | None:
    """Torch's SyncBatchNorm, which gathers its statistics in training only, as a BatchNorm."""
    if rank is None:
        raise refuse(str(layer), "the rank of its input is not known", "give input_shape=")
    settings = {k: v for k, v in layer.settings.items() if k != "process_group"}
    return [dataclasses.replace(layer, kind=f"BatchNorm{max(rank - 2, 1)}d", settings=settings)]


def random_relu(framework: Framework, layer: Layer, rank: int | None) -> list[Layer] | None:
    """RReLU draws its slope in training; at inference it is the middle one."""
    slope = (layer.settings["lower"] + layer.settings["upper"]) / 2
    return [Layer(layer.name, "LeakyReLU", {"negative_slope": slope})]


def fixed_dim(kind: str, dim: int) -> Lower:
    def lower(framework: Framework, layer: Layer, rank: int | None) -> list[Layer] | None:
        return [Layer(layer.name, kind, {"dim": dim})]

    return lower


def own_slopes(framework: Framework, layer: Layer, rank: int | None) -> list[Layer] | None:
    """A PReLU without the axes of size 1 along which a slope is shared."""
    weight = layer.arrays.get("weight")
    if framework == "torch" and weight is not None and weight.shape == (1,):
        return [_changed(layer, {"weight": weight.reshape(())})]
    if framework != "keras" or "axes" in layer.settings:
        return None
    alpha = layer.arrays.get("alpha")
    if alpha is None:
        raise refuse(str(layer), "the array 'alpha' is missing")
    shared = layer.settings.get("shared_axes") or []
    shared = [shared] if isinstance(shared, int) else list(shared)
    if any(not isinstance(a, int) for a in shared):
        raise refuse(str(layer), f"shared_axes={shared}: expected numbers of axes")
    if any(not 1 <= a <= alpha.ndim or alpha.shape[a - 1] != 1 for a in shared):
        raise refuse(str(layer), f"shared_axes={shared} do not fit alpha of shape {alpha.shape}")
    axes = tuple(a for a in range(1, alpha.ndim + 1) if a not in shared)
    alpha = alpha.reshape([alpha.shape[a - 1] for a in axes])
    return [_changed(layer, {"alpha": alpha}, axes=axes, shared_axes=None)]


def upsample_kind(framework: Framework, layer: Layer, rank: int | None) -> list[Layer] | None:
    """Torch's two named kinds of Upsample."""
    kinds = {"UpsamplingNearest2d": "nearest", "UpsamplingBilinear2d": "bilinear"}
    mode = kinds[layer.kind]
    settings = {**layer.settings, "mode": mode}
    settings["align_corners"] = True if mode == "bilinear" else None
    settings.setdefault("recompute_scale_factor", None)
    defaults: dict[str, Any] = {"size": None, "align_corners": None, "recompute_scale_factor": None}
    defaults |= {"scale_factor": None, "mode": "nearest"}
    return [Layer(layer.name, "Upsample", settings, {}, defaults)]


def einsum(framework: Framework, layer: Layer, rank: int | None) -> list[Layer] | None:
    """Keras's EinsumDense over the last axis is a Dense."""
    if framework != "keras":
        return None
    settings = dict(layer.settings)
    equation = str(settings.pop("equation", "")).replace(" ", "")
    operands, _, output = equation.partition("->")
    first, _, second = operands.partition(",")
    bias = settings.pop("bias_axes", None)
    settings.pop("output_shape", None)
    one = len(second) == 2 and first.endswith(second[0]) and output == first[:-1] + second[1]
    if not one or bias not in (None, second[1]) or second[1] in first:
        return None
    kernel = layer.arrays.get("kernel")
    if kernel is None or kernel.ndim != 2:
        raise refuse(str(layer), "the array 'kernel' of two axes is missing")
    settings |= {"units": kernel.shape[-1], "use_bias": bias is not None}
    return [Layer(layer.name, "Dense", settings, layer.arrays)]


def own_statistics(framework: Framework, layer: Layer, rank: int | None) -> list[Layer] | None:
    """Keras's Normalization with its statistics as arrays, wherever they stand."""
    given = layer.settings.get("mean"), layer.settings.get("variance")
    arrays = {k: v for k, v in layer.arrays.items() if k != "count"}
    if framework != "keras" or (given == (None, None) and len(arrays) == len(layer.arrays)):
        return None
    if given != (None, None):
        arrays = {
            k: np.asarray(v, np.float32) for k, v in zip(("mean", "variance"), given, strict=True)
        }
        axes = layer.settings.get("axis")
        count = len(axes) if isinstance(axes, list | tuple) else 1
        kept = [n for n in arrays["mean"].shape if n != 1]
        if axes is None or len(kept) > count or not arrays["mean"].ndim:
            raise refuse(
                str(layer),
                "one mean for all is not converted",
                "give mean and variance as lists, one for each entry of the axis",
            )
        arrays = {k: v.reshape(kept or [1] * count) for k, v in arrays.items()}
    return [_changed(layer, arrays, mean=None, variance=None)]


def found_bins(framework: Framework, layer: Layer, rank: int | None) -> list[Layer] | None:
    """Keras's Discretization whose boundaries ``adapt`` has found: how many it looked for, and how
    closely, is past."""
    told = layer.settings
    if framework != "keras" or told.get("num_bins") is None or told.get("bin_boundaries") is None:
        return None
    return [_changed(layer, num_bins=None, epsilon=0.01)]


def time_first(layer: Layer, back: bool = True) -> list[Layer] | None:
    """A torch layer with batch_first=False between two transpositions."""
    if layer.settings["batch_first"]:
        return None
    there = Layer(f"{layer.name}__batch", "Permute", {"dims": (1, 0, 2)}, fused=True)
    here = Layer(f"{layer.name}__time", "Permute", {"dims": (1, 0, 2)}, fused=True)
    inner = _changed(layer, batch_first=True)
    return [there, inner, here] if back else [there, inner]
