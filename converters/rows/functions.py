"""Rows of activations: Keras's layer class, and its function for ``Activation(...)``."""

from typing import Any

from fwt import layers as fl
from fwt.converters.rows import lower
from fwt.converters.rows.row import AxesSetting, AxisSetting, Framework, Layer, Row, S, number
from fwt.converters.rows.special import Halves, TorchSoftmaxDim

_NO_LAYER = {
    "torch": "torch.nn has no such layer",
    "keras": "keras.layers has no layer with this setting",
}


def _function(
    flax: type, torch: str | None, keras: str | None, function: str | None, *settings: S, **at: Any
) -> Row:
    return Row(
        flax,
        torch,
        keras,
        settings=settings,
        function=(function, at) if function else None,
        lacks=_NO_LAYER,
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
            S("max_value", None, "max_value", None, normal=_maybe),
            _number("negative_slope", None, "negative_slope", 0.0),
            _number("threshold", None, "threshold", 0.0),
        ),
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
    _function(fl.CELU, "CELU", None, "celu", _number("alpha", "alpha", None), alpha=1.0),
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
    _function(
        fl.HardTanh,
        "Hardtanh",
        None,
        "hard_tanh",
        _number("min_value", "min_val", None),
        _number("max_value", "max_val", None),
        min_value=-1.0,
        max_value=1.0,
    ),
    _function(
        fl.Softplus,
        "Softplus",
        None,
        "softplus",
        _number("beta", "beta", None),
        # Above torch's default of 20 the two branches are the same float32.
        S(
            "threshold",
            "threshold",
            None,
            torch_io=(lambda t: None if t == 20 else t, lambda t: 20 if t is None else t),
        ),
        beta=1.0,
        threshold=None,
    ),
    _function(fl.Softsign, "Softsign", None, "softsign"),
    _function(fl.Exponential, None, None, "exponential"),
    _function(
        fl.HardShrink,
        "Hardshrink",
        None,
        "hard_shrink",
        _number("threshold", "lambd", None),
        threshold=0.5,
    ),
    _function(
        fl.SoftShrink,
        "Softshrink",
        None,
        "soft_shrink",
        _number("threshold", "lambd", None),
        threshold=0.5,
    ),
    _function(fl.TanhShrink, "Tanhshrink", None, "tanh_shrink"),
    Row(
        fl.Threshold,
        "Threshold",
        None,
        settings=(_number("threshold", "threshold", None), _number("value", "value", None)),
        lacks=_NO_LAYER,
    ),
    _function(fl.SquarePlus, None, None, "squareplus", _number("b", None, None), b=4.0),
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
        None,
        settings=(S("function", "function", None),),
        lacks=_NO_LAYER,
        note="in torch a small module of fwt's",
    ),
    Row(
        fl.Reduce,
        "Reduce",
        None,
        settings=(S("function", "function", None), AxisSetting("axis", "dim", None)),
        single="axis",
        lacks=_NO_LAYER,
        note="in torch a small module of fwt's",
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
