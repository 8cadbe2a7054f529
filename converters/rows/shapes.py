"""Rows of layers without weights but pools: pads, resizing, shapes, training only."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from fwt import layers as fl
from fwt.converters.rows import lower
from fwt.converters.rows.padding import PadAmounts
from fwt.converters.rows.pooling import NO_LAYER, same_axes
from fwt.converters.rows.row import (
    At,
    AxesSetting,
    Framework,
    Layer,
    P,
    Row,
    S,
    Special,
    each,
    flag,
    number,
    refuse,
    whole,
)
from fwt.converters.rows.special import (
    INERT,
    Centred,
    FlattenAxes,
    Inert,
    InferenceFlag,
    OneNumber,
    PermuteDims,
    ResizeSettings,
    Statistics,
    UnflattenDim,
)


def _pad(r: int, flax: type, torch: str, keras: str | None = None, *settings: S) -> Row:
    return Row(
        flax,
        f"{torch}{r}d",
        f"{keras}{r}D" if keras and not keras.startswith("ops.") else keras,
        **same_axes(r),
        rank_of="padding",
        settings=settings,
        keras_defaults={"padding": (1,) * r if r > 1 else 1, "data_format": "channels_last"},
        special=PadAmounts(r),
        lower=lower.channels_first(),
        lacks={} if keras else {"keras": "its pads are of zeros only"},
    )


def _crop(r: int) -> Row:
    return Row(
        fl.Crop,
        None,
        f"Cropping{r}D",
        **same_axes(r),
        rank_of="cropping",
        keras_defaults={"data_format": "channels_last"} if r > 1 else {},
        special=PadAmounts(r, "cropping"),
        note="in torch a ZeroPad of negative amounts",
        lower=lower.channels_first(),
    )


def _repeats(r: int) -> Any:
    """Nearest, a whole number of times."""

    def fits(framework: Framework, layer: Layer) -> bool:
        if framework == "keras":
            return layer.settings.get("interpolation", "nearest") == "nearest"
        if framework == "torch":
            scale = layer.settings.get("scale_factor")
            scales = scale if isinstance(scale, list | tuple) else (scale,)
            whole_ones = all(s is not None and s == int(s) for s in scales)
            return whole_ones and layer.settings.get("mode", "nearest") == "nearest"
        return True

    return fits


def _upsample(r: int) -> Row:
    io = (lambda x: tuple(int(v) for v in x) if isinstance(x, list | tuple) else int(x),
          lambda x: tuple(float(v) for v in x))  # fmt: skip
    fits = _repeats(r)
    return Row(
        fl.UpSample,
        "Upsample",
        f"UpSampling{r}D",
        **same_axes(r),
        rank_of="size",
        settings=(S("size", "scale_factor", "size", 2, normal=each(r), torch_io=io),),
        keras_defaults={"data_format": "channels_last", "interpolation": "nearest"}
        if r > 1
        else {},
        special=OneNumber() if r == 1 else Special(),
        fits=fits,
        lower=lower.channels_first(),
    )


def _resize(r: int) -> Row:
    modes = {"linear": 1, "bilinear": 2, "trilinear": 3}
    fits_repeat = _repeats(r)

    def fits(framework: Framework, layer: Layer) -> bool:
        if framework == "torch":
            mode = layer.settings.get("mode", "nearest")
            return modes.get(mode, r) == r and not fits_repeat(framework, layer)
        if framework == "keras" and layer.kind.startswith("UpSampling"):
            return not fits_repeat(framework, layer)
        return True

    return Row(
        fl.Resize,
        "Upsample",
        "UpSampling2D" if r == 2 else None,
        **same_axes(r),
        rank_of="shape",
        keras_defaults={"data_format": "channels_last", **_RESIZING},
        special=ResizeSettings(r),
        note="nearest and linear; bicubic and area are refused",
        fits=fits,
        lower=lower.channels_first(),
    )


_RESIZING = {
    "crop_to_aspect_ratio": False,
    "pad_to_aspect_ratio": False,
    "fill_mode": "constant",
    "fill_value": 0.0,
    "antialias": False,
}
RESIZING = Row(
    fl.Resize,
    None,
    "Resizing",
    **same_axes(2),
    keras_defaults={"data_format": "channels_last", "interpolation": "bilinear", **_RESIZING},
    special=ResizeSettings(2),
    note="nearest and bilinear, without antialiasing",
    lower=lower.channels_first(),
    fits=lambda framework, layer: framework == "keras",
)
CENTER_CROP = Row(
    fl.CenterCrop,
    None,
    "CenterCrop",
    **same_axes(2),
    settings=(),
    keras_defaults={"data_format": "channels_last"},
    special=Centred(),
    note="where the input is not smaller; in torch a ZeroPad of negative amounts",
    lower=lower.channels_first(),
)


def _pixels(flax: type, torch: str, field: str) -> Row:
    return Row(
        flax,
        torch,
        None,
        axes="n h w c -> n h w o",
        torch_axes="n c h w -> n o h w",
        ranks=(4,),
        channel="c",
        settings=(S("factor", field, None, normal=whole),),
        ordered=True,
        lacks=NO_LAYER,
    )


def _numbers(x: Any) -> Any:
    """A number, or one for each channel."""
    return tuple(number(v) for v in x) if isinstance(x, list | tuple) else number(x)


def _mode(x: Any) -> str:
    if x not in ("multi_hot", "one_hot", "count"):
        raise ValueError("expected multi_hot, one_hot or count")
    return str(x)


def _shape(x: Any) -> Any:
    many = tuple(x) if isinstance(x, list | tuple) else (x,)
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= -1 and n for n in many):
        raise ValueError("expected whole numbers, one of them -1 perhaps")
    if many.count(-1) > 1:
        raise ValueError("expected -1 once at most")
    return many


FLATTEN = Row(
    fl.Flatten,
    "Flatten",
    "Flatten",
    kind="flatten",
    keras_defaults={"data_format": "channels_last"},
    special=FlattenAxes(),
    lower=lower.channels_first(back=False),
)
RESHAPE = Row(
    fl.Reshape,
    "Unflatten",
    "Reshape",
    kind="reshape",
    settings=(S("shape", "unflattened_size", "target_shape", normal=_shape),),
    special=UnflattenDim(),
)
PERMUTE = Row(fl.Permute, "Permute", "Permute", kind="permute", special=PermuteDims())
REPEAT = Row(
    fl.RepeatVector,
    "RepeatVector",
    "RepeatVector",
    axes="n c -> n t c",
    ranks=(2,),
    settings=(S("times", "times", "n", normal=whole),),
    lacks=NO_LAYER,
)
CHANNEL_SHUFFLE = Row(
    fl.ChannelShuffle,
    "ChannelShuffle",
    None,
    axes="n *s c -> n *s c",
    torch_axes="n c *s -> n c *s",
    channel="c",
    settings=(S("groups", "groups", None, normal=whole),),
    ordered=True,
    lacks=NO_LAYER,
)
LOCAL_RESPONSE_NORM = Row(
    fl.LocalResponseNorm,
    "LocalResponseNorm",
    None,
    axes="n *s c -> n *s c",
    torch_axes="n c *s -> n c *s",
    channel="c",
    settings=(
        S("size", "size", None, normal=whole),
        S("alpha", "alpha", None, normal=number),
        S("beta", "beta", None, normal=number),
        S("k", "k", None, normal=number),
    ),
    ordered=True,
    lacks=NO_LAYER,
)


def _keeps_noise_shape(framework: Framework, layer: Layer) -> bool:
    return framework != "keras" or layer.settings.get("noise_shape") is None


DROPOUT = Row(
    nn.Dropout,
    "Dropout",
    "Dropout",
    settings=(S("rate", "p", "rate", normal=number),),
    keras_defaults={"noise_shape": None},
    special=InferenceFlag(),
    fits=_keeps_noise_shape,
)
RESCALING = Row(
    fl.Rescaling,
    "Rescaling",
    "Rescaling",
    axes="n *s c -> n *s c",
    torch_axes="n c *s -> n c *s",
    settings=(
        S("scale", "scale", "scale", normal=_numbers),
        S("offset", "offset", "offset", 0.0, normal=_numbers),
    ),
    ordered=True,
)
MASKING = Row(
    fl.Masking,
    "Masking",
    "Masking",
    axes="n *s c -> n *s c",
    torch_axes="n c *s -> n c *s",
    settings=(S("mask_value", "mask_value", "mask_value", 0.0, normal=number),),
    note="refused before a layer that uses the mask",
)
NORMALIZATION = Row(
    fl.Normalization,
    "Normalization",
    "Normalization",
    settings=(
        AxesSetting("axes", "axis", torch_second=True),
        S("invert", "invert", "invert", False, normal=flag),
    ),
    params=tuple(P.alike(f"{name}: *a", collection="batch_stats") for name in ("mean", "variance")),
    keras_defaults={"mean": None, "variance": None},
    special=Statistics(),
    note="its statistics become settings on the way back",
    lower=lower.own_statistics,
)
_NUMBERS = {"torch": "torch.nn has no layer from numbers to categories"}
DISCRETIZATION = Row(
    fl.Discretization,
    None,
    "Discretization",
    settings=(S("bin_boundaries", None, "bin_boundaries", normal=_numbers),),
    keras_defaults={"num_bins": None, "epsilon": 0.01, "output_mode": "int", "sparse": False},
    lower=lower.found_bins,
    lacks=_NUMBERS,
)


class OneCategory(Special):
    """CategoryEncoding, whose "one_hot" of several numbers keeps them apart in Keras."""

    def finish(
        self, framework: Framework, layer: Layer, fields: Mapping[str, Any], sizes: Any, at: At
    ) -> Layer:
        count = sizes.get("k")
        known = count if framework == "flax" else count or 1  # Flax's takes one column alone
        if fields["output_mode"] == "one_hot" and known != 1:
            many = "an unknown number of" if count is None else count
            raise refuse(
                at.place,
                f"output_mode='one_hot' of {many} columns gives an axis of them, and only one "
                "column can be converted",
                "encode each column by a layer of its own",
            )
        return layer


CATEGORY_ENCODING = Row(
    fl.CategoryEncoding,
    None,
    "CategoryEncoding",
    axes="n k -> n o",
    ranks=(2,),
    settings=(
        S("num_tokens", None, "num_tokens", normal=whole),
        S("output_mode", None, "output_mode", "multi_hot", normal=_mode),
    ),
    keras_defaults={"sparse": False},
    lacks=_NUMBERS,
    special=OneCategory(),
    sizes=lambda fields: {"o": fields["num_tokens"]},
    ordered=True,
)
_PAIRS: tuple[tuple[Any, ...], ...] = (
    (fl.ZeroPad, "ZeroPad", "ZeroPadding"),
    (fl.ConstantPad, "ConstantPad", None, S("value", "value", None)),
    (fl.ReflectPad, "ReflectionPad", "ops.ReflectPad"),
    (fl.ReplicatePad, "ReplicationPad"),
    (fl.CircularPad, "CircularPad"),
)

ROWS: tuple[Row, ...] = (
    FLATTEN,
    RESHAPE,
    PERMUTE,
    REPEAT,
    *(_pad(r, *pair) for pair in _PAIRS for r in (1, 2, 3)),
    *(_crop(r) for r in (1, 2, 3)),
    *(_upsample(r) for r in (1, 2, 3)),
    *(_resize(r) for r in (1, 2, 3)),
    RESIZING,
    *(
        Row(None, name, None, lower=lower.upsample_kind, note="an Upsample")
        for name in ("UpsamplingNearest2d", "UpsamplingBilinear2d")
    ),
    CENTER_CROP,
    _pixels(fl.PixelShuffle, "PixelShuffle", "upscale_factor"),
    _pixels(fl.PixelUnshuffle, "PixelUnshuffle", "downscale_factor"),
    CHANNEL_SHUFFLE,
    LOCAL_RESPONSE_NORM,
    RESCALING,
    MASKING,
    NORMALIZATION,
    DISCRETIZATION,
    CATEGORY_ENCODING,
    DROPOUT,
    *(
        Row(
            fl.TrainingOnly,
            kind if framework == "torch" else None,
            kind if framework == "keras" else None,
            special=Inert(framework, kind),
            note="the identity at inference, kept for the way back",
        )
        for framework, kinds in INERT.items()
        for kind in kinds
    ),
)
