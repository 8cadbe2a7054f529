"""LAYERS: one declarative row per layer, which says the same thing in each framework.

A row names the layer's class in Flax, torch and Keras, the axes that it maps, its settings and
its arrays. Everything else follows: :mod:`fwt.converters._convert` reads a layer's settings into
Flax names and writes them out for another framework, and permutes its arrays by comparing axes.
A setting that no row takes and that is off its default, and an array that no row claims, raise,
so a row can't forget one.

To add a layer, add its row here.
"""

import functools
from typing import Any

import flax.linen as nn
from fwt.converters._row import (
    AxisSetting,
    Framework,
    P,
    Row,
    S,
    Size,
    each,
    flag,
    number,
    whole,
)
from fwt.converters._special import (
    BatchNormAffine,
    ConvPadding,
    GlobalPool,
    InferenceFlag,
    PadAmounts,
    PermuteDims,
    PoolPadding,
    TorchSoftmaxDim,
    UnflattenDim,
)

from fwt import layers as fl
from fwt._axes import Known

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
    keras_defaults={"quantization_config": None, "lora_rank": None, "lora_alpha": None},
    fused_activation=True,
)
CONV = Row(
    nn.Conv,
    "Conv2d",
    "Conv2D",
    axes="n h w i -> n h w o",
    torch_axes="n i h w -> n o h w",
    ranks=(4,),
    channel="i",
    settings=(
        S("features", "out_channels", "filters", normal=whole),
        S("kernel_size", "kernel_size", "kernel_size", normal=each(2)),
        S("strides", "stride", "strides", (1, 1), normal=each(2)),
        S("kernel_dilation", "dilation", "dilation_rate", (1, 1), normal=each(2)),
        S("feature_group_count", "groups", "groups", 1, normal=whole),
        S("use_bias", "bias", "use_bias", True, normal=flag),
        Size("in_channels", "i"),
    ),
    params=(
        P("kernel: *k j o", "weight: o j *k", "kernel: *k j o"),
        P("bias: o", "bias: o", "bias: o", when="use_bias"),
    ),
    keras_defaults={
        "padding": "valid",
        "data_format": "channels_last",
        "lora_rank": None,
        "lora_alpha": None,
        "quantization_config": None,
    },
    special=ConvPadding(),
    fused_activation=True,
)


def _batch_norm(torch: str, ranks: tuple[int, ...], channel: str | None) -> Row:
    def complement(momentum: Any) -> Any:
        if momentum is None:
            return None
        return round(1.0 - momentum, 12)  # so that 0.1 comes back as 0.1

    return Row(
        nn.BatchNorm,
        torch,
        "BatchNormalization",
        torch_axes="n c *s -> n c *s",
        ranks=ranks,
        channel=channel,
        settings=(
            AxisSetting("axis", None, "axis", torch_fixed=1, letter="c"),
            S("epsilon", "eps", "epsilon", 1e-3, normal=number),
            S("momentum", "momentum", "momentum", 0.99, torch_io=(complement, complement)),
            S("use_scale", "affine", "scale", True, normal=flag),
            S("use_bias", "affine", "center", True, normal=flag),
            Size("num_features", "c"),
        ),
        params=(
            P("scale: c", "weight: c", "gamma: c", when="use_scale", fill=1.0),
            P("bias: c", "bias: c", "beta: c", when="use_bias", fill=0.0),
            P("mean: c", "running_mean: c", "moving_mean: c", collection="batch_stats"),
            P("var: c", "running_var: c", "moving_variance: c", collection="batch_stats"),
        ),
        keras_defaults={
            "synchronized": False,
            "renorm": False,
            "renorm_clipping": None,
            "renorm_momentum": 0.99,
        },
        special=BatchNormAffine(),
    )


def _pool(flax: type, torch: str, keras: str, average: bool) -> Row:
    return Row(
        flax,
        torch,
        keras,
        axes="n h w c -> n h w c",
        torch_axes="n c h w -> n c h w",
        ranks=(4,),
        channel="c",
        settings=(
            S("window_shape", "kernel_size", "pool_size", normal=each(2)),
            S("strides", "stride", "strides", None, normal=each(2)),
        ),
        keras_defaults={"padding": "valid", "data_format": "channels_last"},
        special=PoolPadding(average),
    )


def _global_pool(flax: type, torch: str, keras: str) -> Row:
    return Row(
        flax,
        torch,
        keras,
        axes="n h w c -> n c",
        torch_axes="n c h w -> n c",
        ranks=(4,),
        channel="c",
        keras_defaults={"keepdims": False, "data_format": "channels_last"},
        special=GlobalPool(),
    )


def _function(
    flax: type, torch: str | None, keras: str | None, function: str | None, *settings: S, **at: Any
) -> Row:
    """An activation: Keras's layer class, and its function for ``Activation(...)``."""
    return Row(
        flax,
        torch,
        keras,
        settings=settings,
        function=(function, at) if function else None,
        keras_defaults={"max_value": None, "negative_slope": 0.0, "threshold": 0.0}
        if keras == "ReLU"
        else {},
    )


FLATTEN = Row(
    fl.Flatten,
    "Flatten",
    "Flatten",
    kind="flatten",
    keras_defaults={"data_format": "channels_last"},
)
RESHAPE = Row(
    fl.Reshape,
    "Unflatten",
    "Reshape",
    kind="reshape",
    settings=(S("shape", "unflattened_size", "target_shape", normal=fl.tuples),),
    special=UnflattenDim(),
)
PERMUTE = Row(fl.Permute, "Permute", "Permute", kind="permute", special=PermuteDims())
ZERO_PAD = Row(
    fl.ZeroPad,
    "ZeroPad2d",
    "ZeroPadding2D",
    axes="n h w c -> n h w c",
    torch_axes="n c h w -> n c h w",
    ranks=(4,),
    channel="c",
    keras_defaults={"padding": (1, 1), "data_format": "channels_last"},
    special=PadAmounts(),
)
CONSTANT_PAD = Row(
    fl.ConstantPad,
    "ConstantPad2d",
    None,
    axes="n h w c -> n h w c",
    torch_axes="n c h w -> n c h w",
    ranks=(4,),
    channel="c",
    settings=(S("value", "value", None),),
    special=PadAmounts(),
)

LAYERS: tuple[Row, ...] = (
    DENSE,
    CONV,
    _batch_norm("BatchNorm1d", (2, 3), None),
    _batch_norm("BatchNorm2d", (4,), "c"),
    _batch_norm("BatchNorm3d", (5,), "c"),
    _pool(fl.MaxPool, "MaxPool2d", "MaxPooling2D", average=False),
    _pool(fl.AvgPool, "AvgPool2d", "AveragePooling2D", average=True),
    _global_pool(fl.GlobalAvgPool, "AdaptiveAvgPool2d", "GlobalAveragePooling2D"),
    _global_pool(fl.GlobalMaxPool, "AdaptiveMaxPool2d", "GlobalMaxPooling2D"),
    FLATTEN,
    RESHAPE,
    PERMUTE,
    ZERO_PAD,
    CONSTANT_PAD,
    Row(
        nn.Dropout,
        "Dropout",
        "Dropout",
        settings=(S("rate", "p", "rate", normal=number),),
        keras_defaults={"noise_shape": None},
        special=InferenceFlag(),
    ),
    _function(fl.Identity, "Identity", "Identity", "linear"),
    _function(fl.ReLU, "ReLU", "ReLU", "relu"),
    _function(fl.ReLU6, "ReLU6", None, "relu6"),
    _function(
        fl.LeakyReLU,
        "LeakyReLU",
        "LeakyReLU",
        "leaky_relu",
        S("negative_slope", "negative_slope", "negative_slope", 0.3, normal=number),
        negative_slope=0.2,
    ),
    _function(
        fl.ELU, "ELU", "ELU", "elu", S("alpha", "alpha", "alpha", 1.0, normal=number), alpha=1.0
    ),
    _function(fl.SELU, "SELU", None, "selu"),
    _function(
        fl.GELU,
        "GELU",
        None,
        "gelu",
        S(
            "approximate",
            "approximate",
            None,
            torch_io=(lambda a: a == "tanh", lambda a: "tanh" if a else "none"),
        ),
        approximate=False,
    ),
    _function(fl.SiLU, "SiLU", None, "silu"),
    _function(fl.Mish, "Mish", None, "mish"),
    _function(fl.Sigmoid, "Sigmoid", None, "sigmoid"),
    _function(fl.LogSigmoid, "LogSigmoid", None, "log_sigmoid"),
    _function(fl.HardSigmoid, "Hardsigmoid", None, "hard_sigmoid"),
    _function(fl.HardSwish, "Hardswish", None, "hard_silu"),
    _function(fl.Tanh, "Tanh", None, "tanh"),
    _function(fl.Softplus, "Softplus", None, "softplus"),
    _function(fl.Softsign, "Softsign", None, "softsign"),
    _function(fl.Exponential, None, None, "exponential"),
    Row(
        fl.Softmax,
        "Softmax",
        "Softmax",
        settings=(AxisSetting("axis", "dim", "axis"),),
        function=("softmax", {"axis": -1}),
        special=TorchSoftmaxDim(),
    ),
    Row(
        fl.LogSoftmax,
        "LogSoftmax",
        None,
        settings=(AxisSetting("axis", "dim", None),),
        function=("log_softmax", {"axis": -1}),
        special=TorchSoftmaxDim(),
    ),
)

# Names of arrays in live models, for layers that have no row of their own yet.
NAMES: tuple[Row, ...] = (
    *(
        Row(
            None,
            f"Conv{r}d",
            f"Conv{r}D",
            params=(
                P("kernel: *k j o", "weight: o j *k", "kernel: *k j o"),
                P("bias: o", "bias: o", "bias: o"),
            ),
        )
        for r in (1, 3)
    ),
    *(
        Row(
            nn.ConvTranspose,
            f"ConvTranspose{r}d",
            f"Conv{r}DTranspose",
            params=(
                P("kernel: *k i o", "weight: i o *k", "kernel: *k o i"),
                P("bias: o", "bias: o", "bias: o"),
            ),
        )
        for r in (1, 2, 3)
    ),
    Row(
        nn.Embed,
        "Embedding",
        "Embedding",
        params=(P("embedding: v f", "weight: v f", "embeddings: v f"),),
    ),
    Row(None, "EmbeddingBag", None, params=(P("embedding: v f", "weight: v f", "-"),)),
    # Not (..., in, out): under Keras 2's name, so that nothing takes it for that.
    *(
        Row(
            None,
            None,
            f"DepthwiseConv{r}D",
            params=(
                P("depthwise_kernel: *k g m", "-", "kernel: *k g m"),
                P("bias: o", "-", "bias: o"),
            ),
        )
        for r in (1, 2)
    ),
    *(
        Row(
            None,
            torch,
            keras,
            params=(
                P("scale: *c", "weight: *c", "gamma: *c"),
                P("bias: *c", "bias: *c", "beta: *c"),
            ),
        )
        for torch, keras in (
            ("LayerNorm", "LayerNormalization"),
            ("GroupNorm", "GroupNormalization"),
            ("InstanceNorm1d", None),
            ("InstanceNorm2d", None),
            ("InstanceNorm3d", None),
        )
    ),
    Row(None, "RMSNorm", "RMSNormalization", params=(P("scale: *c", "weight: *c", "scale: *c"),)),
)
# keras.activations under another name
ALIASES = {"swish": "silu", "hard_swish": "hard_silu"}


@functools.cache
def rows_of(framework: Framework, kind: str) -> tuple[Row, ...]:
    """The rows of a class; several where its rank decides."""
    return tuple(row for row in LAYERS if row.class_in(framework) == kind)


@functools.cache
def row_of_function(name: str) -> Row | None:
    """The row of a function in keras.activations."""
    name = ALIASES.get(name, name)
    return next((r for r in LAYERS if r.function and r.function[0] == name), None)


def axis_names(letters: list[str], rank: int) -> tuple[str, ...] | None:
    """The letters of one Flax array as names of axes; None where none is an input or output."""
    fill = rank - sum(not x.startswith("*") for x in letters)
    full = [y for x in letters for y in ([x[1:]] * fill if x.startswith("*") else [x])]
    words = {"i": "in", "j": "in", "o": "out", "c": "out", "g": "group", "m": "out"}
    names = tuple(words.get(x, x) for x in full)
    return names if {"in", "out"} & set(names) else None


def is_transposed(framework: Framework, letters: list[str]) -> bool:
    """Whether these are the axes of a transposed convolution's kernel in a framework."""
    if not {"i", "o"} <= set(letters) or len(letters) < 3:
        return False
    return (letters.index("i") < letters.index("o")) == (framework == "torch")


def einsum_names(equation: str) -> tuple[str, ...] | None:
    """The axes of an einsum's second operand; None where one is neither input nor output."""
    operands, _, output = equation.replace(" ", "").replace("...", "").partition("->")
    inputs, _, kernel = operands.partition(",")
    sides = {(True, False): "in", (False, True): "out"}
    names = [sides.get((letter in inputs, letter in output)) for letter in kernel]
    return None if None in names else tuple(n for n in names if n)


def known(layer: Any, leaf: str, rank: int) -> Known:
    """What a Flax layer tells of its leaf."""
    kind = type(layer).__name__
    if type(layer) is nn.DenseGeneral and leaf == "kernel" and not layer.batch_dims:
        outs = 1 if isinstance(layer.features, int) else len(layer.features)
        return Known((*["in"] * (rank - outs), *["out"] * outs), False, kind, layer)
    for row in (*rows_of("flax", kind), *(r for r in NAMES if r.flax is type(layer))):
        for p in row.params:
            name, letters = p.of("flax")
            if name == leaf and row.flax is type(layer):
                if getattr(layer, "transpose_kernel", False) and leaf == "kernel":
                    letters = ["*k", "o", "i"]
                transposed = is_transposed("keras", p.of("keras")[1])
                return Known(axis_names(letters, rank), transposed, kind, layer)
    return Known(None, False, kind, layer)


def live(
    framework: Framework,
    layer: Any,
    kind: str,
    letters: list[str],
    flax_letters: list[str],
    rank: int,
) -> Known:
    """What a live layer tells of an array that has these axes there and in Flax."""
    names = axis_names(flax_letters, rank) if letters else None
    if kind in ("Layer", "Model", "Module"):  # a class of the user's own, of which nothing is known
        kind = ""
    return Known(names, is_transposed(framework, letters), kind, layer)


def leaf_names(framework: Framework, kind: str) -> dict[str, tuple[str, list[str], list[str], str]]:
    """For arrays of a live layer: name -> (Flax name, its axes there, axes in Flax, collection)."""
    for row in (*rows_of(framework, kind), *(r for r in NAMES if r.class_in(framework) == kind)):
        out = {}
        for p in row.params:
            name, letters = p.of(framework)
            flax_name, flax_letters = p.of("flax")
            out[name] = (flax_name, letters, flax_letters, p.collection)
        return out
    return {}
