"""Rows of layers with weights: dense, convolution, normalisation, embedding."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from fwt import layers as fl
from fwt.converters.rows import lower
from fwt.converters.rows.padding import ConvPadding, Transposed
from fwt.converters.rows.row import (
    At,
    AxesSetting,
    AxisSetting,
    Framework,
    Layer,
    P,
    Row,
    S,
    Size,
    Special,
    Take,
    each,
    flag,
    number,
    whole,
)
from fwt.converters.rows.special import (
    AxesNorm,
    BatchNormAffine,
    ChannelNorm,
    EmbeddingSettings,
    Slopes,
)

LETTERS = {1: "w", 2: "h w", 3: "d h w"}

# Of a Keras layer that is neither quantised nor adapted.
_AS_MADE = {"quantization_config": None, "lora_rank": None, "lora_alpha": None}
DENSE = Row(
    nn.Dense,
    "Linear",
    "Dense",
    axes="*b i -> *b o",
    settings=(
        S("features", "out_features", "units", normal=whole),
        S("use_bias", "bias", "use_bias", True, normal=flag),
        Size("in_features", "i"),
    ),
    params=(
        P("kernel: i o", "weight: o i", "kernel: i o"),
        P("bias: o", "bias: o", "bias: o", when="use_bias"),
    ),
    keras_defaults=_AS_MADE,
    fused_activation=True,
)


_CONV_DEFAULTS = {"padding": "valid", "data_format": "channels_last", **_AS_MADE}


def _axes(r: int) -> dict[str, Any]:
    s = LETTERS[r]
    return {
        "axes": f"n {s} i -> n {s} o",
        "torch_axes": f"n i {s} -> n o {s}",
        "ranks": (r + 2,),
        "rank_of": "kernel_size",
        "channel": "i",
    }


def _window(r: int) -> tuple[S | Size, ...]:
    """The settings that a convolution and a transposed one share."""
    return (
        S("features", "out_channels", "filters", normal=whole),
        S("kernel_size", "kernel_size", "kernel_size", normal=each(r)),
        S("strides", "stride", "strides", (1,) * r, normal=each(r)),
        S("kernel_dilation", "dilation", "dilation_rate", (1,) * r, normal=each(r)),
        S("use_bias", "bias", "use_bias", True, normal=flag),
        Size("in_channels", "i"),
    )


def _conv(r: int) -> Row:
    return Row(
        nn.Conv,
        f"Conv{r}d",
        f"Conv{r}D",
        **_axes(r),
        settings=(
            *_window(r),
            S("feature_group_count", "groups", "groups", 1, normal=whole),
        ),
        params=(
            P("kernel: *k j o", "weight: o j *k", "kernel: *k j o"),
            P("bias: o", "bias: o", "bias: o", when="use_bias"),
        ),
        keras_defaults=_CONV_DEFAULTS,
        special=ConvPadding(),
        fused_activation=True,
        lower=lower.either(lower.channels_first(), lower.padding_mode),
    )


def _conv_transpose(r: int) -> Row:
    return Row(
        nn.ConvTranspose,
        f"ConvTranspose{r}d",
        f"Conv{r}DTranspose",
        **_axes(r),
        settings=_window(r),
        params=(
            P("kernel: *k o i", "weight: i o *k", "kernel: *k o i"),
            P("bias: o", "bias: o", "bias: o", when="use_bias"),
        ),
        keras_defaults={**_CONV_DEFAULTS, "output_padding": None},
        special=Transposed(r),
        note="with torch's groups a GroupedConvTranspose; Keras has none, so that the kernel holds "
        "zeros between them and the name ends in their number",
        fused_activation=True,
        lower=lower.either(lower.channels_first(), lower.transposed),
    )


def _grouped_transpose(r: int) -> Row:
    # Neither torch nor Keras has a class of this name: what has groups is lowered to it.
    return Row(
        fl.GroupedConvTranspose,
        f"GroupedConvTranspose{r}d",
        f"GroupedConv{r}DTranspose",
        **_axes(r),
        settings=(
            *_window(r),
            S("feature_group_count", "groups", "groups", normal=whole),
        ),
        params=(
            P("kernel: *k j o", "weight: j o *k", "kernel: *k o j"),
            P("bias: o", "bias: o", "bias: o", when="use_bias"),
        ),
        keras_defaults={**_CONV_DEFAULTS, "output_padding": None},
        special=Transposed(r, groups=True),
        fused_activation=True,
    )


def _depthwise(r: int) -> Row:
    # Not (..., in, out): under Keras 2's name, so that nothing takes it for that.
    return Row(
        None,
        None,
        f"DepthwiseConv{r}D",
        params=(
            P("depthwise_kernel: *k g m", "-", "kernel: *k g m"),
            P("bias: o", "-", "bias: o", when="use_bias"),
        ),
        settings=(S("use_bias", None, "use_bias", True),),
        keras_defaults={"data_format": "channels_last"},
        fused_activation=True,
        lower=lower.either(lower.channels_first(), lower.depthwise),
        note="a Conv with as many groups as inputs, and back",
    )


def _separable(r: int) -> Row:
    return Row(
        None,
        None,
        f"SeparableConv{r}D",
        params=(
            P("depthwise_kernel: *k g m", "-", "depthwise_kernel: *k g m"),
            P("pointwise_kernel: *k i o", "-", "pointwise_kernel: *k i o"),
            P("bias: o", "-", "bias: o", when="use_bias"),
        ),
        settings=(S("use_bias", None, "use_bias", True),),
        fused_activation=True,
        lower=lower.either(lower.channels_first(), lower.separable),
        note="two convolutions, and back",
    )


def _sizes(shape: Any) -> Any:
    """A shape, or the one size that stands for it."""
    return (shape,) if isinstance(shape, int) else fl.tuples(shape)


def _complement(momentum: Any) -> Any:
    return None if momentum is None else round(1.0 - momentum, 12)  # 0.1 comes back as 0.1


_NORM_SETTINGS = (
    S("epsilon", "eps", "epsilon", 1e-3, normal=number),
    S("momentum", "momentum", "momentum", 0.99, torch_io=(_complement, _complement)),
    S("use_scale", "affine", "scale", True, normal=flag),
    S("use_bias", "affine", "center", True, normal=flag),
)
_NORM_PARAMS = (
    P("scale: c", "weight: c", "gamma: c", when="use_scale", fill=1.0),
    P("bias: c", "bias: c", "beta: c", when="use_bias", fill=0.0),
    P("mean: c", "running_mean: c", "moving_mean: c", collection="batch_stats"),
    P("var: c", "running_var: c", "moving_variance: c", collection="batch_stats"),
)


def _batch_norm(torch: str, ranks: tuple[int, ...], channel: str | None) -> Row:
    return Row(
        nn.BatchNorm,
        torch,
        "BatchNormalization",
        torch_axes="n c *s -> n c *s",
        ranks=ranks,
        channel=channel,
        settings=(
            AxisSetting("axis", None, "axis", torch_fixed=1, letter="c"),
            *_NORM_SETTINGS,
            Size("num_features", "c"),
        ),
        params=_NORM_PARAMS,
        keras_defaults={
            "synchronized": False,
            "renorm": False,
            "renorm_clipping": None,
            "renorm_momentum": 0.99,
        },
        special=BatchNormAffine(),
        note="torch's running variance is unbiased, so further training differs there",
    )


SYNC_BATCH_NORM = Row(
    None,
    "SyncBatchNorm",
    params=_NORM_PARAMS,
    lower=lower.one_device,
    note="the BatchNorm that it is at inference",
)
LAYER_NORM = Row(
    nn.LayerNorm,
    "LayerNorm",
    "LayerNormalization",
    settings=(
        AxesSetting("reduction_axes", "axis"),
        S("epsilon", "eps", "epsilon", 1e-3, normal=number),
        S("use_scale", "", "scale", True, normal=flag),
        S("use_bias", "", "center", True, normal=flag),
    ),
    params=(
        P("scale: *a", "weight: *a", "gamma: *a", when="use_scale", fill=1.0),
        P("bias: *a", "bias: *a", "beta: *a", when="use_bias"),
    ),
    keras_defaults={"rms_scaling": False},
    special=AxesNorm(),
)
RMS_NORM = Row(
    nn.RMSNorm,
    "RMSNorm",
    "RMSNormalization",
    settings=(
        AxesSetting("reduction_axes", "axis", keras_last=True),
        S("epsilon", "eps", "epsilon", 1e-6),
        S("use_scale", "", None),
    ),
    params=(P("scale: *a", "weight: *a", "scale: *a", when="use_scale", fill=1.0),),
    special=AxesNorm(bias=False),
    lacks={"keras": "its RMSNormalization always has a scale"},
)


def _all_groups(framework: Framework, layer: Layer) -> bool:
    if framework == "torch":
        return not layer.settings.get("track_running_stats")
    return framework != "keras" or layer.settings.get("groups") == -1


def _tracked(framework: Framework, layer: Layer) -> bool:
    return framework == "flax" or bool(layer.settings.get("track_running_stats"))


def _some_groups(framework: Framework, layer: Layer) -> bool:
    return framework != "keras" or layer.settings.get("groups") != -1


_CHANNEL_SETTINGS = (
    S("epsilon", "eps", "epsilon", 1e-3, normal=number),
    S("use_scale", "affine", "scale", True, normal=flag),
    S("use_bias", "affine", "center", True, normal=flag),
)
_CHANNEL_PARAMS = (
    P("scale: c", "weight: c", "gamma: c", when="use_scale", fill=1.0),
    P("bias: c", "bias: c", "beta: c", when="use_bias", fill=0.0),
)
GROUP_NORM = Row(
    nn.GroupNorm,
    "GroupNorm",
    "GroupNormalization",
    axes="n *s c -> n *s c",
    torch_axes="n c *s -> n c *s",
    channel="c",
    settings=(
        S("num_groups", "num_groups", "groups", 32, normal=whole),
        *_CHANNEL_SETTINGS,
        Size("num_channels", "c"),
    ),
    params=_CHANNEL_PARAMS,
    keras_defaults={"axis": -1},
    special=ChannelNorm(groups=True),
    ordered=True,
    fits=_some_groups,
)


def _tracked_instance_norm(r: int) -> Row:
    return Row(
        fl.TrackedInstanceNorm,
        f"InstanceNorm{r}d",
        axes="n *s c -> n *s c",
        torch_axes="n c *s -> n c *s",
        ranks=(r + 2,),
        channel="c",
        settings=(*_NORM_SETTINGS, Size("num_features", "c")),
        params=_NORM_PARAMS,
        special=BatchNormAffine(tracks=True),
        fits=_tracked,
        note="with track_running_stats=True a TrackedInstanceNorm, in Keras the BatchNormalization "
        "that it is at inference",
    )


def _instance_norm(r: int) -> Row:
    return Row(
        nn.InstanceNorm,
        f"InstanceNorm{r}d",
        "GroupNormalization",
        axes="n *s c -> n *s c",
        torch_axes="n c *s -> n c *s",
        ranks=(r + 2,),
        channel="c",
        settings=(*_CHANNEL_SETTINGS, Size("num_features", "c")),
        params=_CHANNEL_PARAMS,
        keras_defaults={"axis": -1},
        special=ChannelNorm(groups=False),
        fits=_all_groups,
    )


EMBED = Row(
    nn.Embed,
    "Embedding",
    "Embedding",
    axes="*b -> *b f",
    settings=(
        S("num_embeddings", "num_embeddings", "input_dim", normal=whole),
        S("features", "embedding_dim", "output_dim", normal=whole),
    ),
    params=(P("embedding: v f", "weight: v f", "embeddings: v f"),),
    keras_defaults={**_AS_MADE, "input_length": None},
    special=EmbeddingSettings(),
    ordered=True,
    note="padding_idx, which is for training, is dropped, and so is mask_zero, which is refused "
    "before a layer that uses the mask; max_norm is refused",
)
PRELU = Row(
    fl.PReLU,
    "PReLU",
    "PReLU",
    settings=(AxesSetting("axes", None, torch_second=True),),
    params=(P("negative_slope: *a", "weight: *a", "alpha: *a"),),
    keras_defaults={"shared_axes": None},
    special=Slopes(),
    lower=lower.own_slopes,
)


class ArrayShapes(Special):
    """What torch is told beside the equation of an einsum: the shapes of its arrays."""

    def read(self, framework: Framework, take: Take, fields: dict[str, Any], at: At) -> None:
        if framework == "torch":
            take("weight_shape")
            take("bias_shape")

    def finish(
        self, framework: Framework, layer: Layer, fields: Mapping[str, Any], sizes: Any, at: At
    ) -> Layer:
        if framework == "torch":
            for name, value in layer.arrays.items():
                layer.settings[f"{name}_shape"] = value.shape
        return layer


EINSUM_DENSE = Row(
    fl.EinsumDense,
    "EinsumDense",
    "EinsumDense",
    settings=(
        S("equation", "equation", "equation"),
        S("output_shape", "output_shape", "output_shape", normal=_sizes),
        S("bias_axes", "bias_axes", "bias_axes", None),
    ),
    params=(
        P("kernel: *k", "weight: *k", "kernel: *k"),
        P("bias: *e", "bias: *e", "bias: *e", when="bias_axes"),
    ),
    kind="einsum",
    keras_defaults={**_AS_MADE, "gptq_unpacked_column_size": None},
    special=ArrayShapes(),
    fused_activation=True,
    lower=lower.einsum,
    note="over the last axis alone: a Dense",
)

ROWS: tuple[Row, ...] = (
    DENSE,
    *(_conv(r) for r in (1, 2, 3)),
    *(_conv_transpose(r) for r in (1, 2, 3)),
    *(_grouped_transpose(r) for r in (1, 2, 3)),
    *(_depthwise(r) for r in (1, 2)),
    *(_separable(r) for r in (1, 2)),
    _batch_norm("BatchNorm1d", (2, 3), None),
    _batch_norm("BatchNorm2d", (4,), "c"),
    _batch_norm("BatchNorm3d", (5,), "c"),
    SYNC_BATCH_NORM,
    LAYER_NORM,
    GROUP_NORM,
    *(_tracked_instance_norm(r) for r in (1, 2, 3)),
    *(_instance_norm(r) for r in (1, 2, 3)),
    RMS_NORM,
    EMBED,
    PRELU,
    EINSUM_DENSE,
)
