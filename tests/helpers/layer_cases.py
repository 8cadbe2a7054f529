"""One strategy for each class: ``(rng) -> (input shape without the batch axis, layer)``.

``rng`` is :class:`Drawn`, hypothesis under the names of NumPy's generator, so that a failure
shrinks; the random stacks give a plain generator. Settings are drawn away from their defaults,
sizes odd and even. A new entry is tested in every direction by ``test_layers.py``. ``refused``
says, for the other framework, which refusals are right.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import torch
from hypothesis import strategies as st

from fwt.converters.frameworks import torch_modules as ours

k, t = keras.layers, torch.nn


class Drawn:
    """What hypothesis draws, under the names of NumPy's generator."""

    def __init__(self, data):
        self.draw = data.draw

    def integers(self, low, high=None, size=None):
        low, high = (0, low) if high is None else (low, high)
        one = st.integers(int(low), int(high) - 1)
        if size is None:
            return self.draw(one)
        count = int(np.prod(size))
        return np.reshape(self.draw(st.lists(one, min_size=count, max_size=count)), size)

    def permutation(self, count):
        return np.array(self.draw(st.permutations(range(count))))

    def normal(self, size):
        return np.random.default_rng(self.draw(st.integers(0, 2**32 - 1))).normal(size=size)


LETTER = {1: "1", 2: "2", 3: "3"}


@dataclasses.dataclass
class Case:
    make: Callable[[Any], Any]
    refused: str | None = None  # a pattern that the other framework's refusal matches
    integers: int | None = None  # the input is integers below this
    outcomes: dict[str, int] = dataclasses.field(default_factory=dict)


TORCH: dict[str, Case] = {}
KERAS: dict[str, Case] = {}


def case(table, name, refused=None, integers=None):
    def add(make):
        table[name] = Case(make, refused, integers)
        return make

    return add


def pick(rng, *values):
    return values[rng.integers(len(values))]


def ints(rng, count, low, high):
    return tuple(int(v) for v in rng.integers(low, high + 1, size=count))


def yes(rng):
    return bool(rng.integers(2))


def spatial(rng, rank, low=5, high=9):
    return ints(rng, rank, low, high if rank < 3 else min(high, low + 2))


def add_torch_spatial():
    for r in (1, 2, 3):

        @case(TORCH, f"Conv{r}d")
        def conv(rng, r=r):
            groups = pick(rng, 1, 1, 2, 3)
            i, o = groups * int(rng.integers(1, 3)), groups * int(rng.integers(1, 4))
            same = yes(rng)
            settings = {
                "kernel_size": ints(rng, r, 1, 3),
                "stride": 1 if same else ints(rng, r, 1, 2),
                "padding": "same" if same else ints(rng, r, 0, 2),
                "dilation": ints(rng, r, 1, 2),
                "groups": groups,
                "bias": yes(rng),
                "padding_mode": pick(rng, "zeros", "zeros", "reflect", "replicate", "circular"),
            }
            if not same and max(settings["stride"]) > 1:
                settings["dilation"] = 1
            layer = getattr(t, f"Conv{r}d")(i, o, **settings)
            return (i, *spatial(rng, r)), layer

        TORCH[f"Conv{r}d"].refused = "its pads are of zeros only"

        @case(TORCH, f"ConvTranspose{r}d", refused="can't extend|can't say strides and dilation")
        def conv_transpose(rng, r=r):
            groups = pick(rng, 1, 1, 2)
            i, o = groups * int(rng.integers(1, 3)), groups * int(rng.integers(1, 4))
            stride, window = ints(rng, r, 1, 3), ints(rng, r, 1, 4)
            dilation = (1,) * r if max(stride) > 1 and yes(rng) else ints(rng, r, 1, 2)
            padding = tuple(int(rng.integers(0, (w - 1) * d // 2 + 1))
                            for w, d in zip(window, dilation, strict=True))  # fmt: skip
            extra = tuple(int(rng.integers(0, max(s, d)))
                          for s, d in zip(stride, dilation, strict=True))  # fmt: skip
            layer = getattr(t, f"ConvTranspose{r}d")(
                i, o, window, stride, padding, extra, groups, yes(rng), dilation
            )
            return (i, *spatial(rng, r, 3, 6)), layer

        @case(TORCH, f"MaxPool{r}d", refused="Keras can't say|keras has no MaxPool")
        def max_pool(rng, r=r):
            window = ints(rng, r, 1, 3)
            pad = tuple(int(rng.integers(0, w // 2 + 1)) for w in window)
            stride = pick(rng, None, ints(rng, r, 1, 3))
            dilation = pick(rng, 1, 1, 2)
            layer = getattr(t, f"MaxPool{r}d")(window, stride, pad, dilation, ceil_mode=yes(rng))
            return (3, *spatial(rng, r)), layer

        @case(TORCH, f"AvgPool{r}d", refused="Keras can't say|keras has no AvgPool")
        def avg_pool(rng, r=r):
            window = ints(rng, r, 1, 3)
            pad = tuple(int(rng.integers(0, w // 2 + 1)) for w in window)
            stride = pick(rng, None, ints(rng, r, 1, 3))
            ceil, include = yes(rng), yes(rng)
            if ceil and any(pad):
                include = False
            more = {"divisor_override": pick(rng, None, None, 5)} if r > 1 else {}
            layer = getattr(t, f"AvgPool{r}d")(window, stride, pad, ceil, include, **more)
            return (3, *spatial(rng, r)), layer

        @case(TORCH, f"LPPool{r}d", refused="keras has no LPPool")
        def lp_pool(rng, r=r):
            window = ints(rng, r, 1, 3)
            layer = getattr(t, f"LPPool{r}d")(
                2.0, window if r > 1 else window[0], pick(rng, None, 2)
            )
            return (3, *spatial(rng, r)), layer

        for kind in ("Avg", "Max"):

            @case(TORCH, f"Adaptive{kind}Pool{r}d", refused="adaptive (pools round|max pool of)")
            def adaptive(rng, r=r, kind=kind):
                size = pick(rng, 1, ints(rng, r, 1, 4), ints(rng, r, 2, 3))
                if r > 1 and yes(rng):
                    size = (None, *ints(rng, r - 1, 1, 3))
                return (3, *spatial(rng, r)), getattr(t, f"Adaptive{kind}Pool{r}d")(size)

        for kind in ("Zero", "Constant", "Reflection", "Replication", "Circular"):

            @case(
                TORCH,
                f"{kind}Pad{r}d",
                refused=None if kind == "Zero" else "its pads are of zeros only",
            )
            def pad(rng, r=r, kind=kind):
                amounts = ints(rng, 2 * r, -1 if kind != "Circular" else 0, 2)
                if rng.integers(4) == 0:
                    amounts = int(rng.integers(0, 3))
                more = (1.5,) if kind == "Constant" else ()
                return (2, *spatial(rng, r)), getattr(t, f"{kind}Pad{r}d")(amounts, *more)

        @case(TORCH, f"BatchNorm{r}d")
        def batch_norm(rng, r=r):
            layer = getattr(t, f"BatchNorm{r}d")(
                3, eps=pick(rng, 1e-5, 0.01), momentum=pick(rng, 0.3, None), affine=yes(rng)
            )
            shape = (3,) if r == 1 and yes(rng) else (3, *spatial(rng, r, 1, 4))
            return shape, layer

        @case(TORCH, f"InstanceNorm{r}d")
        def instance_norm(rng, r=r):
            layer = getattr(t, f"InstanceNorm{r}d")(3, eps=pick(rng, 1e-5, 0.01), affine=yes(rng))
            return (3, *spatial(rng, r, 2, 4)), layer

        @case(TORCH, f"InstanceNorm{r}d_tracked")
        def tracked_norm(rng, r=r):
            layer = getattr(t, f"InstanceNorm{r}d")(
                3, eps=pick(rng, 1e-5, 0.01), momentum=pick(rng, 0.3, None), affine=yes(rng),
                track_running_stats=True,
            )  # fmt: skip
            return (3, *spatial(rng, r, 1, 4)), layer

        @case(TORCH, f"Dropout{r}d")
        def dropout(rng, r=r):
            return (3, *spatial(rng, r)), getattr(t, f"Dropout{r}d")(0.4)

        @case(
            TORCH, f"Upsample_{r}", refused="Keras resizes images only|Keras's nearest|Keras can't"
        )
        def upsample(rng, r=r):
            mode = pick(rng, "nearest", "nearest", "nearest-exact",
                        ("linear", "bilinear", "trilinear")[r - 1])  # fmt: skip
            more = {"align_corners": yes(rng)} if mode.endswith("linear") else {}
            size = pick(rng, {"scale_factor": 2}, {"scale_factor": ints(rng, r, 1, 3)},
                        {"size": ints(rng, r, 2, 9)}, {"scale_factor": 1.7})  # fmt: skip
            if isinstance(size.get("scale_factor"), tuple):
                size["scale_factor"] = tuple(float(v) for v in size["scale_factor"])
            return (2, *spatial(rng, r, 3, 6)), t.Upsample(**size, mode=mode, **more)


add_torch_spatial()


@case(TORCH, "SyncBatchNorm")
def _(rng):
    layer = t.SyncBatchNorm(3, pick(rng, 1e-5, 0.01), pick(rng, 0.3, None), affine=yes(rng))
    return (3, *spatial(rng, int(rng.integers(0, 4)), 1, 4)), layer


@case(TORCH, "Linear")
def _(rng):
    i = int(rng.integers(1, 7))
    return (*ints(rng, rng.integers(3), 1, 4), i), t.Linear(i, int(rng.integers(1, 6)), yes(rng))


@case(TORCH, "Embedding", integers=7)
def _(rng):
    return ints(rng, rng.integers(1, 3), 1, 4), t.Embedding(7, 3, padding_idx=pick(rng, None, 2))


@case(TORCH, "LayerNorm")
def _(rng):
    shape = ints(rng, rng.integers(1, 4), 2, 5)
    count = int(rng.integers(1, len(shape) + 1))
    layer = t.LayerNorm(
        shape[-count:], eps=pick(rng, 1e-5, 0.01), elementwise_affine=yes(rng), bias=yes(rng)
    )
    return shape, layer


@case(TORCH, "RMSNorm", refused="always has a scale")
def _(rng):
    shape = ints(rng, rng.integers(1, 4), 2, 5)
    count = int(rng.integers(1, len(shape) + 1))
    return shape, t.RMSNorm(shape[-count:], pick(rng, None, 0.01), elementwise_affine=yes(rng))


@case(TORCH, "GroupNorm")
def _(rng):
    groups = int(rng.integers(1, 4))
    c = groups * int(rng.integers(1, 4))
    layer = t.GroupNorm(groups, c, eps=pick(rng, 1e-5, 0.01), affine=yes(rng))
    return (c, *spatial(rng, int(rng.integers(1, 4)), 2, 4)), layer


@case(TORCH, "LocalResponseNorm", refused="keras has no LocalResponseNorm")
def _(rng):
    layer = t.LocalResponseNorm(int(rng.integers(1, 6)), 0.3, 0.6, 1.5)
    return (int(rng.integers(2, 7)), *spatial(rng, int(rng.integers(1, 4)), 2, 4)), layer


FUNCTIONS = ("abs", "acos", "acosh", "asin", "asinh", "atan", "atanh", "ceil", "cos", "cosh", "erf",
             "exp", "expm1", "floor", "log", "log1p", "reciprocal", "round", "sign", "sin", "sinh",
             "sqrt", "square", "tan")  # fmt: skip


@case(TORCH, "Pointwise", refused="keras has no Pointwise")
def _(rng):
    return ints(rng, rng.integers(1, 4), 2, 4), ours.Pointwise(pick(rng, *FUNCTIONS))


@case(TORCH, "Reduce", refused="keras has no Reduce")
def _(rng):
    shape = ints(rng, rng.integers(1, 4), 2, 4)
    function = pick(rng, "sum", "mean", "max", "min", "prod", "logsumexp")
    return shape, ours.Reduce(function, pick(rng, -1, int(rng.integers(1, len(shape) + 1))))


@case(TORCH, "PReLU")
def _(rng):
    shape = (3, *ints(rng, rng.integers(0, 4), 2, 4))
    return shape, t.PReLU(pick(rng, 1, 3))


@case(TORCH, "PixelShuffle", refused="keras has no PixelShuffle")
def _(rng):
    r = int(rng.integers(1, 4))
    return (r * r * int(rng.integers(1, 3)), *spatial(rng, 2, 2, 4)), t.PixelShuffle(r)


@case(TORCH, "PixelUnshuffle", refused="keras has no PixelUnshuffle")
def _(rng):
    r = int(rng.integers(1, 4))
    h, w = ints(rng, 2, 1, 3)
    return (int(rng.integers(1, 4)), h * r, w * r), t.PixelUnshuffle(r)


@case(TORCH, "ChannelShuffle", refused="keras has no ChannelShuffle")
def _(rng):
    g = int(rng.integers(1, 4))
    return (g * int(rng.integers(1, 4)), *spatial(rng, 2, 2, 4)), t.ChannelShuffle(g)


@case(TORCH, "UpsamplingNearest2d", refused="Keras's nearest")
def _(rng):
    more = pick(rng, {"scale_factor": 2}, {"size": ints(rng, 2, 2, 9)})
    return (2, *spatial(rng, 2)), t.UpsamplingNearest2d(**more)


@case(TORCH, "UpsamplingBilinear2d", refused="align_corners")
def _(rng):
    more = pick(rng, {"scale_factor": 2}, {"size": ints(rng, 2, 2, 9)})
    return (2, *spatial(rng, 2)), t.UpsamplingBilinear2d(**more)


@case(TORCH, "Unflatten")
def _(rng):
    shape = list(ints(rng, 3, 2, 4))
    dim = int(rng.integers(1, 4))
    a, b = ints(rng, 2, 1, 3)
    shape[dim - 1] = a * b
    sizes = pick(rng, (a, b), (a, -1), (-1, b))
    return tuple(shape), t.Unflatten(pick(rng, dim, dim - 4), sizes)


@case(TORCH, "Flatten")
def _(rng):
    shape = ints(rng, 4, 1, 4)
    start = int(rng.integers(1, 4))
    return shape, t.Flatten(start, pick(rng, -1, int(rng.integers(start, 5))))


def add_torch_functions():
    def shape(rng):
        return ints(rng, rng.integers(1, 4), 2, 5)

    for name in (
        "ELU", "CELU", "GELU", "Hardshrink", "Softshrink", "Hardtanh", "Softplus", "LeakyReLU",
        "Identity", "ReLU", "ReLU6", "SELU", "SiLU", "Mish", "Sigmoid", "LogSigmoid",
        "Hardsigmoid", "Hardswish", "Tanh", "Tanhshrink", "Softsign", "RReLU", "Threshold",
    ):  # fmt: skip
        given = {
            "ELU": [{}, {"alpha": 0.7}],
            "CELU": [{}, {"alpha": 0.7}],
            "GELU": [{}, {"approximate": "tanh"}],
            "Hardshrink": [{}, {"lambd": 0.3}, {"lambd": 0.125}],
            "Softshrink": [{}, {"lambd": 0.3}],
            "Hardtanh": [{}]
            + [
                dict(zip(("min_val", "max_val"), ends, strict=True))
                for ends in (
                    (-0.4, 2.0),
                    (0.0, 0.7),
                    (-0.7, 0.0),
                    (0.3, 0.8),
                    (-0.8, -0.3),
                    (-math.inf, 0.4),
                    (-0.4, math.inf),
                )
            ],
            "Softplus": [{}, {"beta": 2.0, "threshold": 1.0}, {"beta": 0.3}],
            "LeakyReLU": [{}, {"negative_slope": 0.3}],
            "RReLU": [{}, {"lower": 0.1, "upper": 0.5}],
            "Threshold": [
                {"threshold": a, "value": b}
                for a, b in ((0.2, -0.5), (0.2, 0.0), (0.3, 0.3), (0.0, 0.0), (-0.3, -0.3))
            ],
        }.get(name, [{}])

        @case(TORCH, name, refused=f"keras has no {name}|keras has no .* with")
        def function(rng, name=name, given=given):
            return shape(rng), getattr(t, name)(**given[rng.integers(len(given))])

    for name in ("Softmax", "LogSoftmax", "Softmin"):

        @case(TORCH, name, refused="keras has no (LogSoftmax|Softmin)")
        def along(rng, name=name):
            sizes = shape(rng)
            dim = int(rng.integers(1, len(sizes) + 1))
            return sizes, getattr(t, name)(dim=pick(rng, dim, dim - len(sizes) - 1))

    @case(TORCH, "GLU", refused="keras has no GLU")
    def glu(rng):
        sizes = tuple(2 * n for n in shape(rng))
        dim = int(rng.integers(1, len(sizes) + 1))
        return sizes, t.GLU(dim)

    @case(TORCH, "Softmax2d")
    def softmax2d(rng):
        return (3, *spatial(rng, 2)), t.Softmax2d()

    for name in ("Dropout", "AlphaDropout", "FeatureAlphaDropout"):

        @case(TORCH, name)
        def dropout(rng, name=name):
            return shape(rng), getattr(t, name)(0.4)


add_torch_functions()


def add_keras_spatial():
    for r in (1, 2, 3):

        def geometry(rng, r):
            strides = ints(rng, r, 1, 2)
            dilation = (1,) * r if max(strides) > 1 else ints(rng, r, 1, 2)
            paddings = ("valid", "same", "causal") if r == 1 else ("valid", "same")
            return strides, dilation, pick(rng, *paddings)

        @case(KERAS, f"Conv{r}D")
        def conv(rng, r=r):
            groups = pick(rng, 1, 1, 2)
            i, o = groups * int(rng.integers(1, 3)), groups * int(rng.integers(1, 4))
            strides, dilation, padding = geometry(rng, r)
            layer = getattr(k, f"Conv{r}D")(
                o, ints(rng, r, 1, 3), strides=strides, padding=padding, dilation_rate=dilation,
                groups=groups, use_bias=yes(rng), activation=pick(rng, None, "relu", "tanh"),
            )  # fmt: skip
            return (*spatial(rng, r), i), layer

        @case(KERAS, f"Conv{r}DTranspose", refused="can't extend")
        def conv_transpose(rng, r=r):
            strides, window = ints(rng, r, 1, 3), ints(rng, r, 1, 4)
            dilation = (1,) * r if max(strides) > 1 else ints(rng, r, 1, 2)
            extra = pick(rng, None, tuple(int(rng.integers(0, s)) for s in strides))
            padding = pick(rng, "valid", "same")
            even = [not w % 2 and not e for w, e in zip(window, extra or strides, strict=True)]
            if padding == "same" and any(even) and keras.backend.backend() == "tensorflow":
                extra = None  # which TensorFlow has no output of that size for
            layer = getattr(k, f"Conv{r}DTranspose")(
                int(rng.integers(1, 4)), window, strides=strides, dilation_rate=dilation,
                padding=padding, output_padding=extra, use_bias=yes(rng),
                activation=pick(rng, None, "sigmoid"),
            )  # fmt: skip
            return (*spatial(rng, r, 3, 6), int(rng.integers(1, 4))), layer

        if r < 3:

            @case(KERAS, f"DepthwiseConv{r}D")
            def depthwise(rng, r=r):
                stride = int(rng.integers(1, 3))
                dilation = 1 if stride > 1 else int(rng.integers(1, 3))
                layer = getattr(k, f"DepthwiseConv{r}D")(
                    ints(rng, r, 1, 3), strides=stride, padding=pick(rng, "valid", "same"),
                    depth_multiplier=int(rng.integers(1, 4)), dilation_rate=dilation,
                    use_bias=yes(rng), activation=pick(rng, None, "relu"),
                )  # fmt: skip
                return (*spatial(rng, r), int(rng.integers(1, 4))), layer

            @case(KERAS, f"SeparableConv{r}D")
            def separable(rng, r=r):
                stride = int(rng.integers(1, 3))
                dilation = 1 if stride > 1 else int(rng.integers(1, 3))
                layer = getattr(k, f"SeparableConv{r}D")(
                    int(rng.integers(1, 4)), ints(rng, r, 1, 3), strides=stride,
                    padding=pick(rng, "valid", "same"), dilation_rate=dilation,
                    depth_multiplier=int(rng.integers(1, 4)), use_bias=yes(rng),
                    activation=pick(rng, None, "relu"),
                )  # fmt: skip
                return (*spatial(rng, r), int(rng.integers(1, 4))), layer

        for kind in ("Max", "Average"):

            @case(KERAS, f"{kind}Pooling{r}D", refused="torch can't say a mean")
            def pool(rng, r=r, kind=kind):
                layer = getattr(k, f"{kind}Pooling{r}D")(
                    ints(rng, r, 1, 3), strides=pick(rng, None, int(rng.integers(1, 4))),
                    padding=pick(rng, "valid", "same"),
                )  # fmt: skip
                return (*spatial(rng, r), 3), layer

            @case(KERAS, f"Global{kind}Pooling{r}D")
            def global_pool(rng, r=r, kind=kind):
                return (*spatial(rng, r), 3), getattr(k, f"Global{kind}Pooling{r}D")(
                    keepdims=yes(rng)
                )

            @case(KERAS, f"Adaptive{kind}Pooling{r}D")
            def adaptive(rng, r=r, kind=kind):
                # On TensorFlow a last axis of 1 ends the process where Keras takes maxima.
                size = *ints(rng, r - 1, 1, 4), *ints(rng, 1, 2 if kind == "Max" else 1, 4)
                return (*spatial(rng, r), 3), getattr(k, f"Adaptive{kind}Pooling{r}D")(size)

        @case(KERAS, f"ZeroPadding{r}D")
        def pad(rng, r=r):
            pairs = tuple(ints(rng, 2, 0, 2) for _ in range(r))
            return (*spatial(rng, r), 2), getattr(k, f"ZeroPadding{r}D")(
                pick(rng, pairs[0] if r == 1 else pairs, 1)
            )

        @case(KERAS, f"Cropping{r}D")
        def crop(rng, r=r):
            pairs = tuple(ints(rng, 2, 0, 2) for _ in range(r))
            return (*spatial(rng, r), 2), getattr(k, f"Cropping{r}D")(
                pick(rng, pairs[0] if r == 1 else pairs, 1)
            )

        @case(KERAS, f"UpSampling{r}D")
        def upsample(rng, r=r):
            size = ints(rng, r, 1, 3)
            more = {"interpolation": pick(rng, "nearest", "bilinear")} if r == 2 else {}
            return (*spatial(rng, r, 2, 5), 2), getattr(k, f"UpSampling{r}D")(
                size[0] if r == 1 else size, **more
            )

        @case(KERAS, f"SpatialDropout{r}D")
        def dropout(rng, r=r):
            return (*spatial(rng, r), 2), getattr(k, f"SpatialDropout{r}D")(0.4)


add_keras_spatial()


@case(KERAS, "Dense")
def _(rng):
    layer = k.Dense(
        int(rng.integers(1, 6)), use_bias=yes(rng), activation=pick(rng, None, "gelu", "softmax")
    )
    return ints(rng, rng.integers(1, 4), 1, 4), layer


@case(KERAS, "EinsumDense")
def _(rng):
    equation, rank = pick(rng, ("ab,bc->ac", 1), ("abc,cd->abd", 2), ("...x,xy->...y", 2))
    shape = ints(rng, rank, 2, 4)
    out = 5 if rank == 1 or equation[0] == "." else (shape[0], 5)
    bias = pick(rng, None, equation[-1])
    return shape, k.EinsumDense(equation, output_shape=out, bias_axes=bias, activation="relu")


# Those of Keras's own tests, with other sizes: (equation, input, output, axes of a bias).
EINSUMS = (
    ("ab,b->a", (3,), (), None), ("abc,cde->abde", (2, 3), (2, 4, 5), None),
    ("abc,cde->abde", (2, 3), (2, 4, 5), "e"), ("abc,cde->abde", (2, 3), (2, 4, 5), "d"),
    ("abc,cde->abde", (2, 3), (2, 4, 5), "be"), ("BFNH,NHD->BFD", (3, 2, 5), (3, 4), None),
    ("abc,cd->adb", (2, 3), (4, 2), "d"), ("i,d->id", (), 4, None),
    ("ibd,nd->ibn", (2, 3), (None, 4), None), ("...bc,bc->...b", (4, 2, 3), 2, "b"),
    ("...bc,bc->...c", (4, 2, 3), 3, None), ("...c,cde->...de", (2, 3), (4, 5), "de"),
    ("...c,cde->...de", (2, 3), (4, 5), "d"), ("bc...,cd->bd...", (3, 2, 4), (5, 2, 4), "d"),
    ("bc...,cde->bde...", (3, 2), (4, 5), "d"), ("abcd,be->aecd", (4, 5, 3), (7, 5, 3), "ec"),
)  # fmt: skip


@case(KERAS, "EinsumDense_any")
def _(rng):
    equation, shape, out, bias = pick(rng, *EINSUMS)
    activation = pick(rng, "tanh", None)
    return shape, k.EinsumDense(equation, out, activation, bias_axes=bias)


@case(KERAS, "Embedding", integers=7)
def _(rng):
    return ints(rng, rng.integers(1, 3), 1, 4), k.Embedding(7, 3)


@case(KERAS, "ReversibleEmbedding", integers=7)
def _(rng):
    return ints(rng, rng.integers(1, 3), 1, 4), k.ReversibleEmbedding(7, 3)


@case(KERAS, "BatchNormalization")
def _(rng):
    shape = ints(rng, rng.integers(1, 5), 2, 4)
    axis = pick(rng, -1, int(rng.integers(1, len(shape) + 1)))
    layer = k.BatchNormalization(
        axis=axis, epsilon=pick(rng, 1e-3, 0.02), center=yes(rng), scale=yes(rng)
    )
    return shape, layer


@case(KERAS, "LayerNormalization")
def _(rng):
    shape = ints(rng, rng.integers(1, 4), 2, 5)
    axes = sorted({int(a) for a in rng.integers(1, len(shape) + 1, size=2)})
    layer = k.LayerNormalization(
        axis=pick(rng, -1, axes), epsilon=pick(rng, 1e-3, 0.02), center=yes(rng), scale=yes(rng)
    )
    return shape, layer


@case(KERAS, "RMSNormalization")
def _(rng):
    return ints(rng, rng.integers(1, 4), 2, 5), k.RMSNormalization(epsilon=pick(rng, 1e-6, 0.02))


@case(KERAS, "UnitNormalization", refused="torch has no UnitNorm")
def _(rng):
    shape = ints(rng, rng.integers(1, 4), 2, 5)
    axes = sorted({int(a) for a in rng.integers(1, len(shape) + 1, size=2)})
    return shape, k.UnitNormalization(axis=pick(rng, -1, axes))


@case(KERAS, "GroupNormalization")
def _(rng):
    groups = int(rng.integers(1, 4))
    c = groups * int(rng.integers(1, 4))
    layer = k.GroupNormalization(
        pick(rng, groups, -1), epsilon=pick(rng, 1e-3, 0.02), center=yes(rng), scale=yes(rng)
    )
    return (*ints(rng, rng.integers(1, 4), 2, 4), c), layer


@case(KERAS, "PReLU", refused="along one axis only")
def _(rng):
    shape = ints(rng, rng.integers(1, 4), 2, 4)
    every = list(range(1, len(shape) + 1))
    return shape, k.PReLU(shared_axes=pick(rng, None, every, every[:-1] or None, every[1:] or None))


@case(KERAS, "ReLU", refused="torch has no ClippedReLU")
def _(rng):
    given = [{}, {"max_value": 1.0}, {"max_value": 6}, {"threshold": 0.3}, {"negative_slope": 0.2},
             {"max_value": 0.7, "negative_slope": 0.2}, {"max_value": 0.7, "threshold": 0.3},
             {"negative_slope": 0.2, "threshold": 0.3}]  # fmt: skip
    return ints(rng, rng.integers(1, 4), 2, 4), k.ReLU(**pick(rng, *given))


@case(KERAS, "LeakyReLU")
def _(rng):
    return ints(rng, rng.integers(1, 4), 2, 4), k.LeakyReLU(pick(rng, 0.3, 0.05))


@case(KERAS, "ELU")
def _(rng):
    return ints(rng, rng.integers(1, 4), 2, 4), k.ELU(pick(rng, 1.0, 0.6))


@case(KERAS, "Softmax")
def _(rng):
    shape = ints(rng, rng.integers(1, 4), 2, 4)
    return shape, k.Softmax(axis=pick(rng, -1, int(rng.integers(1, len(shape) + 1))))


@case(KERAS, "Identity")
def _(rng):
    return ints(rng, rng.integers(1, 4), 2, 4), k.Identity()


@case(KERAS, "Activation", refused="torch has no")
def _(rng):
    names = (
        "relu", "leaky_relu", "relu6", "softmax", "celu", "elu", "selu", "softplus", "softsign",
        "squareplus", "soft_shrink", "sparse_plus", "silu", "gelu", "tanh", "tanh_shrink",
        "sigmoid", "exponential", "hard_sigmoid", "hard_silu", "hard_tanh", "hard_shrink",
        "linear", "mish", "log_softmax", "log_sigmoid", "sparsemax", "sparse_sigmoid",
    )  # fmt: skip
    return (*ints(rng, rng.integers(0, 3), 2, 4), 4), k.Activation(pick(rng, *names))


@case(KERAS, "RepeatVector")
def _(rng):
    return ints(rng, 1, 1, 4), k.RepeatVector(int(rng.integers(1, 4)))


@case(KERAS, "Reshape")
def _(rng):
    a, b, c = ints(rng, 3, 1, 4)
    return (a, b * c), k.Reshape(pick(rng, (a * b, c), (c, b, a), (-1, c), (a * b * c,)))


@case(KERAS, "Permute")
def _(rng):
    shape = ints(rng, rng.integers(1, 4), 1, 4)
    return shape, k.Permute(tuple(int(a) + 1 for a in rng.permutation(len(shape))))


@case(KERAS, "Flatten")
def _(rng):
    return ints(rng, rng.integers(1, 4), 1, 4), k.Flatten()


@case(KERAS, "Resizing")
def _(rng):
    layer = k.Resizing(*ints(rng, 2, 2, 9), interpolation=pick(rng, "bilinear", "nearest"))
    return (*spatial(rng, 2, 2, 6), 2), layer


@case(KERAS, "CenterCrop")
def _(rng):
    return (*spatial(rng, 2), 2), k.CenterCrop(*ints(rng, 2, 1, 5))


for _name, _make in {
    "Dropout": lambda: k.Dropout(0.3, noise_shape=None),
    "AlphaDropout": lambda: k.AlphaDropout(0.3),
    "GaussianDropout": lambda: k.GaussianDropout(0.3),
    "GaussianNoise": lambda: k.GaussianNoise(0.3),
    "ActivityRegularization": lambda: k.ActivityRegularization(0.1, 0.2),
}.items():
    case(KERAS, _name)(lambda rng, m=_make: (ints(rng, rng.integers(1, 4), 2, 4), m()))


MOVES = "batch axis would have to move"  # of a layer with the time first, which Keras has not


def add_recurrent():
    for kind in ("RNN", "LSTM", "GRU"):
        lacks = f"Keras's LSTM has no projection|gives two outputs|{MOVES}"

        @case(TORCH, kind, refused=lacks)
        def torch_rnn(rng, kind=kind):
            from fwt.converters import Select

            both = yes(rng)
            more = {"nonlinearity": pick(rng, "tanh", "relu")} if kind == "RNN" else {}
            if kind == "LSTM" and rng.integers(3) == 0:
                more = {"proj_size": 2}
            layer = getattr(t, kind)(
                3, 4, num_layers=int(rng.integers(1, 4)), bias=yes(rng), dropout=0.0,
                batch_first=(first := pick(rng, True, False)), bidirectional=both, **more,
            )  # fmt: skip
            merge = pick(rng, None, "sum", "mul", "ave") if both else None
            what = pick(rng, "sequence", "last")
            if what == "last" and both:
                merge = merge or "concat"
            return (int(rng.integers(1, 5)), 3), [layer, Select(what, merge, first)]

    shared = {"SimpleRNN": {}, "LSTM": {"recurrent_activation": "hard_sigmoid"},
              "GRU": {"reset_after": False}}  # fmt: skip
    for kind, odd in shared.items():

        def build(rng, kind=kind, odd=odd, **more):
            settings = {"use_bias": yes(rng), **pick(rng, {}, odd, {"activation": "relu"})}
            return getattr(k, kind)(4, return_sequences=yes(rng), **settings, **more)

        lacks = "torch's (RNN|LSTM|GRU) has no|backward one"

        @case(KERAS, kind, refused=lacks)
        def keras_rnn(rng, build=build):
            return (int(rng.integers(1, 5)), 3), build(rng, go_backwards=yes(rng))

        @case(KERAS, f"Bidirectional_{kind}", refused=lacks)
        def both(rng, build=build):
            merge = pick(rng, "concat", "sum", "mul", "ave")
            layer = build(rng)
            return (int(rng.integers(1, 5)), 3), k.Bidirectional(layer, merge_mode=merge)

        @case(KERAS, f"RNN_{kind}", refused=lacks)
        def over_cell(rng, kind=kind):
            cell = getattr(k, f"{kind}Cell")(4, use_bias=yes(rng))
            return (int(rng.integers(1, 5)), 3), k.RNN(cell, return_sequences=yes(rng))

    for r in (1, 2, 3):

        @case(KERAS, f"ConvLSTM{r}D", refused="torch has no ConvLSTM")
        def conv_lstm(rng, r=r):
            strides = ints(rng, r, 1, 2)
            layer = getattr(k, f"ConvLSTM{r}D")(
                2, ints(rng, r, 1, 3), strides=strides, padding=pick(rng, "same", "valid"),
                return_sequences=yes(rng), go_backwards=yes(rng), use_bias=yes(rng),
                recurrent_activation=pick(rng, "sigmoid", "hard_sigmoid"),
            )  # fmt: skip
            return (int(rng.integers(1, 4)), *spatial(rng, r, 3, 5), 2), layer

    @case(KERAS, "TimeDistributed")
    def distributed(rng):
        inner = pick(rng, k.Dense(3, activation="tanh"), k.LayerNormalization(), k.Softmax())
        return ints(rng, rng.integers(2, 4), 2, 4), k.TimeDistributed(inner)

    @case(KERAS, "SpectralNormalization")
    def spectral(rng):
        return (6, 5, 3), k.SpectralNormalization(k.Conv2D(4, 3, activation="relu"))


add_recurrent()


@case(TORCH, "MultiheadAttention", refused=MOVES)
def _(rng):
    from fwt.converters.frameworks.torch_modules import SelfAttention

    heads = int(rng.integers(1, 4))
    layer = SelfAttention(heads * 2, heads, bias=yes(rng), batch_first=yes(rng))
    return (int(rng.integers(1, 5)), heads * 2), layer


@case(TORCH, "TransformerEncoderLayer", refused=MOVES)
def _(rng):
    heads = int(rng.integers(1, 4))
    layer = t.TransformerEncoderLayer(
        heads * 2, heads, 5, activation=pick(rng, "relu", "gelu"), layer_norm_eps=0.01,
        batch_first=yes(rng), norm_first=yes(rng), bias=yes(rng),
    )  # fmt: skip
    return (int(rng.integers(1, 5)), heads * 2), layer


@case(TORCH, "TransformerEncoder", refused=MOVES)
def _(rng):
    one = t.TransformerEncoderLayer(4, 2, 5, batch_first=yes(rng), norm_first=yes(rng))
    norm = pick(rng, None, t.LayerNorm(4))
    return (int(rng.integers(1, 5)), 4), t.TransformerEncoder(one, 2, norm, False)


@case(KERAS, "Rescaling")
def _(rng):
    shape = (*ints(rng, rng.integers(0, 3), 2, 4), 3)
    return shape, k.Rescaling(pick(rng, 0.3, [0.1, 0.2, 0.3]), pick(rng, 0.0, -1.5))


@case(KERAS, "Masking", integers=3)
def _(rng):
    return (int(rng.integers(1, 9)), int(rng.integers(1, 3))), k.Masking(pick(rng, 0.0, 1.0))


@case(KERAS, "Normalization", refused="along one axis only")
def _(rng):
    shape = ints(rng, rng.integers(1, 4), 2, 4)
    axis = pick(rng, -1, int(rng.integers(1, len(shape) + 1)), tuple(range(1, len(shape) + 1)))
    if axis == -1 and yes(rng):
        values = rng.normal(size=shape[-1:]).astype(np.float32)
        return shape, k.Normalization(mean=values, variance=np.abs(values), invert=yes(rng))
    layer = k.Normalization(axis=axis, invert=yes(rng))
    layer.adapt(rng.normal(size=(6, *shape)).astype(np.float32))
    return shape, layer


@case(KERAS, "Discretization", refused="torch has no Discretization")
def _(rng):
    return ints(rng, rng.integers(1, 3), 2, 4), k.Discretization([-0.5, 0.1, 1.0])


@case(KERAS, "CategoryEncoding", refused="torch has no CategoryEncoding", integers=5)
def _(rng):
    mode = pick(rng, "multi_hot", "count", "one_hot")
    return ints(rng, 1, 1, 1 if mode == "one_hot" else 4), k.CategoryEncoding(5, mode)


def add_inert():
    given = {"RandomBrightness": (0.2,), "RandomContrast": (0.2,), "RandomRotation": (0.2,),
             "RandomTranslation": (0.1, 0.1), "RandomZoom": (0.2,), "RandomHue": (0.2,),
             "RandomPosterization": (4,), "RandomSaturation": (0.2,), "RandomSharpness": (0.2,),
             "RandomColorDegeneration": (0.2,), "RandomFlip": ("horizontal",)}  # fmt: skip
    for name in (
        "RandomBrightness", "RandomColorDegeneration", "RandomColorJitter", "RandomContrast",
        "RandomElasticTransform", "RandomErasing", "RandomFlip", "RandomGaussianBlur",
        "RandomGrayscale", "RandomHue", "RandomInvert", "RandomPerspective",
        "RandomPosterization", "RandomRotation", "RandomSaturation", "RandomSharpness",
        "RandomShear", "RandomTranslation", "RandomZoom", "AugMix", "CutMix", "MixUp",
        "RandAugment",
    ):  # fmt: skip

        @case(KERAS, name)
        def inert(rng, name=name):
            return (*spatial(rng, 2), 3), getattr(k, name)(*given.get(name, ()))


add_inert()
