"""Rows of activations: Keras's layer class, and its function for ``Activation(...)``."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from fwt import layers as fl
from fwt.converters.rows import lower
from fwt.converters.rows.row import (
    At,
    AxesSetting,
    AxisSetting,
    Framework,
    Layer,
    Row,
    S,
    Special,
    number,
)
from fwt.converters.rows.special import Halves, TorchSoftmaxDim

_NO_LAYER = {
    "torch": "torch.nn has no such layer",
    "keras": "keras.layers has no layer with this setting",
}


def _function(
    flax: type,
    torch: str | None,
    keras: str | None,
    function: str | None,
    *settings: S,
    special: Special | None = None,
    note: str = "",
    **at: Any,
) -> Row:
    return Row(
        flax,
        torch,
        keras,
        settings=settings,
        function=(function, at) if function else None,
        special=special or Special(),
        lacks=_NO_LAYER,
        note=note,
    )


def _along(flax: type, torch: str | None, keras: str | None, function: str, **more: Any) -> Row:
    """An activation along an axis."""
    return Row(
        flax,
        torch,
        keras,
        settings=(AxisSetting("axis", "dim" if torch else None, "axis" if keras else None),),
        function=(function, {"axis": -1}) if function else None,
        lacks=_NO_LAYER,
        **{"special": TorchSoftmaxDim(), **more},
    )


def _plain(framework: Framework, layer: Layer) -> bool:
    """Keras's ReLU as others have it."""
    usual = {"max_value": None, "negative_slope": 0.0, "threshold": 0.0}
    return framework != "keras" or all(
        layer.settings.get(k, v) in (v, None if v is None else float(v)) for k, v in usual.items()
    )


def _number(name: str, torch: str | None, keras: str | None, default: Any = ...) -> S:
    if default is ...:
        return S(name, torch, keras, normal=number)
    return S(name, torch, keras, default, normal=number)


def _maybe(x: Any) -> Any:
    return None if x is None else number(x)


def _bound(x: Any) -> float:
    """A number, or an infinite one where there is no bound."""
    return float(x) if x in (math.inf, -math.inf) else number(x)


def _chain(name: str, *parts: tuple[str, dict[str, Any]]) -> list[Layer]:
    """Layers one after the other, the first under the name and the others beside it."""
    return [Layer(name if not i else f"{name}__{i}", kind, settings)
            for i, (kind, settings) in enumerate(parts)]  # fmt: skip


_SCALED = "in keras any other setting by a Rescaling before and after"
_NEGATED: tuple[str, dict[str, Any]] = ("Rescaling", {"scale": -1.0, "offset": 0.0})


class Clipped(Special):
    """Keras's ReLU with settings, as one or two layers of torch."""

    def finish(
        self, framework: Framework, layer: Layer, fields: Mapping[str, Any], sizes: Any, at: At
    ) -> Layer | list[Layer]:
        if framework != "torch":
            return layer
        most, slope, start = (fields[k] for k in ("max_value", "negative_slope", "threshold"))
        below: tuple[str, dict[str, Any]] | None = None
        if (start and slope) or (most is not None and most <= 0):
            return layer  # which is refused
        if start:
            below = "Threshold", {"threshold": start, "value": 0.0}
        elif slope:
            below = "LeakyReLU", {"negative_slope": slope}
        above: tuple[str, dict[str, Any]] | None = None
        if most == 6 and not slope:
            above = "ReLU6", {}
        elif most is not None:
            above = "Hardtanh", {"min_val": -math.inf if slope else 0.0, "max_val": most}
        return _chain(layer.name, *filter(None, (below, above))) or Layer(layer.name, "ReLU", {})


def _between(low: float, high: float) -> list[tuple[str, dict[str, Any]]]:
    """Keras's layers that keep what is between two numbers; one may be infinite."""
    if low > 0 or high < 0:  # moved to where one end is zero
        edge = low if low > 0 else high
        inner = _between(low - edge, high - edge)
        return [("Rescaling", {"scale": 1.0, "offset": -edge}), *inner,
                ("Rescaling", {"scale": 1.0, "offset": edge})]  # fmt: skip

    def upto(most: float, slope: float) -> tuple[str, dict[str, Any]]:
        told = {"max_value": None if most == math.inf else most}
        return "ReLU", {**told, "negative_slope": slope, "threshold": 0.0}

    if low == 0:
        return [upto(high, 0.0)]
    if high == 0:
        return [_NEGATED, upto(-low, 0.0), _NEGATED]
    above = [] if high == math.inf else [upto(high, 1.0)]
    return above + ([] if low == -math.inf else [_NEGATED, upto(-low, 1.0), _NEGATED])


class Ends(Special):
    """What lies between two numbers, in Keras by its ReLU."""

    def finish(
        self, framework: Framework, layer: Layer, fields: Mapping[str, Any], sizes: Any, at: At
    ) -> Layer | list[Layer]:
        low, high = fields["min_value"], fields["max_value"]
        if framework != "keras" or layer.kind or not low < high:
            return layer
        return _chain(layer.name, *_between(low, high))


class Replaced(Special):
    """torch's Threshold, in Keras where it replaces by zero or by its threshold."""

    def finish(
        self, framework: Framework, layer: Layer, fields: Mapping[str, Any], sizes: Any, at: At
    ) -> Layer | list[Layer]:
        start, value = fields["threshold"], fields["value"]
        if framework != "keras":
            return layer
        if start == value:
            return _chain(layer.name, *_between(value, math.inf))
        if start > 0 == value:
            told = {"max_value": None, "negative_slope": 0.0, "threshold": start}
            return Layer(layer.name, "ReLU", told)
        return layer


class Between(Special):
    """A function with a setting as Keras's own, whose setting is fixed, between two factors.

    Args:
        function: its name in keras.activations.
        factor: of the fields: what the function takes is divided by it, what it gives multiplied.
        jumps: whether the function does, so that the factor must round nothing: a power of two.
    """

    def __init__(
        self, function: str, factor: Callable[[Mapping[str, Any]], float], jumps: bool = False
    ):
        self.function, self.factor, self.jumps = function, factor, jumps

    def finish(
        self, framework: Framework, layer: Layer, fields: Mapping[str, Any], sizes: Any, at: At
    ) -> Layer | list[Layer]:
        if framework != "keras" or layer.kind:
            return layer
        by = self.factor(fields)
        if not by > 0 or (self.jumps and math.frexp(by)[0] != 0.5):
            return layer
        return [
            Layer(f"{layer.name}__divided", "Rescaling", {"scale": 1 / by, "offset": 0.0}),
            Layer(layer.name, "Activation", {"activation": self.function}),
            Layer(f"{layer.name}__multiplied", "Rescaling", {"scale": by, "offset": 0.0}),
        ]


class Named(Special):
    """A function that torch has, but no layer of it: a small module of fwt's calls it."""

    def __init__(self, function: str):
        self.function = function

    def finish(
        self, framework: Framework, layer: Layer, fields: Mapping[str, Any], sizes: Any, at: At
    ) -> Layer | list[Layer]:
        if framework != "torch":
            return layer
        return Layer(layer.name, "Pointwise", {"function": self.function})


ROWS: tuple[Row, ...] = (
    _function(fl.Identity, "Identity", "Identity", "linear"),
    Row(
        fl.ReLU,
        "ReLU",
        "ReLU",
        function=("relu", {}),
        keras_defaults={"max_value": None, "negative_slope": 0.0, "threshold": 0.0},
        fits=_plain,
    ),
    Row(
        fl.ClippedReLU,
        None,
        "ReLU",
        settings=(
            S("max_value", "", "max_value", None, normal=_maybe),
            _number("negative_slope", "", "negative_slope", 0.0),
            _number("threshold", "", "threshold", 0.0),
        ),
        special=Clipped(),
        note="with settings in torch a ReLU6, Hardtanh, LeakyReLU or Threshold, which keeps NaN; "
        "a threshold with a slope is refused",
        fits=lambda framework, layer: not _plain(framework, layer) or framework == "flax",
        lacks=_NO_LAYER,
    ),
    _function(fl.ReLU6, "ReLU6", None, "relu6"),
    _function(
        fl.LeakyReLU,
        "LeakyReLU",
        "LeakyReLU",
        "leaky_relu",
        _number("negative_slope", "negative_slope", "negative_slope", 0.3),
        negative_slope=0.2,
    ),
    Row(None, "RReLU", None, lower=lower.random_relu, note="at inference a LeakyReLU"),
    _function(fl.ELU, "ELU", "ELU", "elu", _number("alpha", "alpha", "alpha", 1.0), alpha=1.0),
    _function(
        fl.CELU,
        "CELU",
        None,
        "celu",
        _number("alpha", "alpha", ""),
        alpha=1.0,
        special=Between("celu", lambda f: f["alpha"]),
        note=_SCALED,
    ),
    _function(fl.SELU, "SELU", None, "selu"),
    _function(
        fl.GELU,
        "GELU",
        "ops.Gelu",
        "gelu",
        S(
            "approximate",
            "approximate",
            "approximate",
            torch_io=(lambda a: a == "tanh", lambda a: "tanh" if a else "none"),
        ),
        note="by tanh in keras an operation, keras.ops.gelu",
        approximate=False,
    ),
    _function(fl.SiLU, "SiLU", None, "silu"),
    _function(fl.Mish, "Mish", None, "mish"),
    _function(fl.Sigmoid, "Sigmoid", None, "sigmoid"),
    _function(fl.LogSigmoid, "LogSigmoid", None, "log_sigmoid"),
    _function(fl.HardSigmoid, "Hardsigmoid", None, "hard_sigmoid"),
    _function(fl.HardSwish, "Hardswish", None, "hard_silu"),
    _function(fl.Tanh, "Tanh", None, "tanh"),
    _function(
        fl.HardTanh,
        "Hardtanh",
        None,
        "hard_tanh",
        S("min_value", "min_val", "", normal=_bound),
        S("max_value", "max_val", "", normal=_bound),
        special=Ends(),
        note="in keras other ends by ReLU with a max_value",
        min_value=-1.0,
        max_value=1.0,
    ),
    _function(
        fl.Softplus,
        "Softplus",
        None,
        "softplus",
        _number("beta", "beta", ""),
        # Above torch's default of 20 the two branches are the same float32.
        S(
            "threshold",
            "threshold",
            None,
            torch_io=(lambda t: None if t == 20 else t, lambda t: 20 if t is None else t),
        ),
        special=Between("softplus", lambda f: 1 / f["beta"] if f["beta"] else 0),
        note=_SCALED,
        beta=1.0,
        threshold=None,
    ),
    _function(fl.Softsign, "Softsign", None, "softsign"),
    _function(
        fl.Exponential,
        None,
        None,
        "exponential",
        special=Named("exp"),
        note="in torch a small module of fwt's",
    ),
    _function(
        fl.HardShrink,
        "Hardshrink",
        None,
        "hard_shrink",
        _number("threshold", "lambd", ""),
        special=Between("hard_shrink", lambda f: 2 * f["threshold"], jumps=True),
        note="in keras lambd is 0.5 times a power of 2",
        threshold=0.5,
    ),
    _function(
        fl.SoftShrink,
        "Softshrink",
        None,
        "soft_shrink",
        _number("threshold", "lambd", ""),
        special=Between("soft_shrink", lambda f: 2 * f["threshold"]),
        note=_SCALED,
        threshold=0.5,
    ),
    _function(fl.TanhShrink, "Tanhshrink", None, "tanh_shrink"),
    Row(
        fl.Threshold,
        "Threshold",
        None,
        settings=(_number("threshold", "threshold", ""), _number("value", "value", "")),
        special=Replaced(),
        lacks=_NO_LAYER,
        note="in keras where value is 0 or the threshold",
    ),
    _function(
        fl.SquarePlus,
        None,
        None,
        "squareplus",
        _number("b", None, ""),
        b=4.0,
        special=Between("squareplus", lambda f: max(f["b"], 0) ** 0.5 / 2),
        note=_SCALED,
    ),
    _function(fl.SparsePlus, None, None, "sparse_plus"),
    _function(fl.SparseSigmoid, None, None, "sparse_sigmoid"),
    _along(fl.Softmax, "Softmax", "Softmax", "softmax"),
    _along(fl.LogSoftmax, "LogSoftmax", None, "log_softmax"),
    _along(fl.Sparsemax, None, None, "sparsemax", note="as Keras 3.15 computes it"),
    Row(
        fl.Softmin,
        "Softmin",
        None,
        settings=(AxisSetting("axis", "dim", None),),
        special=TorchSoftmaxDim(),
        lacks=_NO_LAYER,
    ),
    _along(
        fl.GLU,
        "GLU",
        None,
        "glu",
        ordered=True,
        halves="axis",
        special=Halves(),
        note="in keras only from: its Activation('glu') tells the next layer another shape",
    ),
    Row(
        fl.Pointwise,
        "Pointwise",
        "ops.Pointwise",
        settings=(S("function", "function", "function"),),
        note="in torch a small module of fwt's, in keras an operation",
    ),
    Row(
        fl.Reduce,
        "Reduce",
        "ops.Reduce",
        settings=(S("function", "function", "function"), AxisSetting("axis", "dim", "axis")),
        single="axis",
        note="in torch a small module of fwt's, in keras an operation",
    ),
    Row(None, "Softmax2d", None, lower=lower.fixed_dim("Softmax", -3), note="a Softmax"),
    Row(
        fl.UnitNorm,
        None,
        "UnitNormalization",
        settings=(AxesSetting("axes", "axis"),),
        lacks=_NO_LAYER,
    ),
)
