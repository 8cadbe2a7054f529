"""JAX's primitives of one value for each value, as ONNX's own operators.

TensorFlow and tf2onnx would rewrite them, as Select into a sum of products: so they never see them.
``t`` is the tracer.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from fwt.converters.rows.row import refuse

if TYPE_CHECKING:
    from fwt.converters.onnx.trace import Tracer

CAST = "fwt.Cast"  # under a name of ours till the end, for tf2onnx drops one of two casts in a row
# What onnxruntime has its Where, Max and Min in, for dtypes in which it has not.
_WIDER = {tf.int8: tf.int32, tf.int16: tf.int32, tf.uint16: tf.int32, tf.uint32: tf.int64}


def like(x: Any, value: float) -> Any:
    return tf.constant(value, x.dtype)


def cast(t: "Tracer", x: Any, dtype: Any) -> Any:
    """ONNX's Cast, which says nothing of numbers that the dtype doesn't hold."""
    import onnx

    if x.dtype == dtype:
        return x
    kind = np.dtype(tf.as_dtype(dtype).as_numpy_dtype)
    return t.op(CAST, x, dtype=dtype, to=int(onnx.helper.np_dtype_to_tensor_dtype(kind)))


def where(t: "Tracer", which: Any, yes: Any, no: Any) -> Any:
    """ONNX's Where: what is not taken does not count, be it NaN."""
    yes, no = t.tensor(yes), t.tensor(no)
    dtype = yes.dtype
    if dtype == tf.bool:
        return t.op("Or", t.op("And", which, yes), t.op("And", t.op("Not", which), no))
    wide = _WIDER.get(dtype, dtype)
    out = t.op("Where", which, cast(t, yes, wide), cast(t, no, wide), dtype=wide)
    return cast(t, out, dtype)


def _extreme(op: str, logical: str) -> Callable[..., Any]:
    """ONNX's Max or Min."""

    def function(t: "Tracer", x: Any, y: Any) -> Any:
        if x.dtype == tf.bool:
            return t.op(logical, x, y)
        wide = _WIDER.get(x.dtype, x.dtype)
        return cast(t, t.op(op, cast(t, x, wide), cast(t, y, wide)), x.dtype)

    return function


_max, _min = _extreme("Max", "Or"), _extreme("Min", "And")


def _single(function: Callable[..., Any]) -> Callable[..., Any]:
    """In float32 for float16, where what is between would overflow or lose its digits."""

    def in_single(t: "Tracer", x: Any) -> Any:
        wide = tf.float32 if x.dtype == tf.float16 else x.dtype
        return cast(t, function(t, cast(t, x, wide)), x.dtype)

    return in_single


def is_nan(t: "Tracer", x: Any) -> Any:
    return t.op("Not", t.op("Equal", x, x, dtype=tf.bool))


def _whole(t: "Tracer", x: Any, dtype: Any) -> Any:
    """Numbers without their fraction. As in JAX, those that the dtype doesn't hold become its
    least or its largest, and NaN 0."""
    info = np.iinfo(dtype.as_numpy_dtype)
    if dtype == tf.uint64:
        raise refuse(t.place, "it makes uint64 of floating numbers")
    x = x if x.dtype == tf.float64 else cast(t, x, tf.float32)
    wide = tf.int32 if np.can_cast(info.dtype, np.int32) else tf.int64
    low, high = like(x, float(info.min)), like(x, float(info.max) + 1)
    under = t.op("Less", x, low, dtype=tf.bool)
    over = t.op("GreaterOrEqual", x, high, dtype=tf.bool)
    outside = t.op("Or", t.op("Or", under, over), is_nan(t, x))
    y = cast(t, where(t, outside, like(x, 0), x), wide)
    y = where(t, over, like(y, info.max), y)
    return cast(t, where(t, under, like(y, info.min), y), dtype)


def converted(t: "Tracer", x: Any, dtype: Any) -> Any:
    """A tensor in another dtype, as JAX converts it."""
    if x.dtype == dtype:
        return x
    if dtype == tf.bool:
        return t.op("Not", t.op("Equal", x, like(x, 0), dtype=tf.bool))
    if x.dtype.is_floating and dtype.is_integer:
        return _whole(t, x, dtype)
    return cast(t, x, dtype)


@_single
def _log1p(t: "Tracer", x: Any) -> Any:
    """Also near 0, where 1 + x loses the digits of x."""
    part = t.op("Div", x, t.op("Add", x, like(x, 2)))
    small = t.op("Mul", t.op("Atanh", part), like(x, 2))
    near = t.op("Less", t.op("Abs", x), like(x, 0.1), dtype=tf.bool)
    return where(t, near, small, t.op("Log", t.op("Add", x, like(x, 1))))


@_single
def _expm1(t: "Tracer", x: Any) -> Any:
    half = t.op("Tanh", t.op("Mul", x, like(x, 0.5)))
    twice = t.op("Mul", half, like(x, 2))
    small = t.op("Div", twice, t.op("Sub", like(x, 1), half))
    near = t.op("Less", t.op("Abs", x), like(x, 0.5), dtype=tf.bool)
    return where(t, near, small, t.op("Sub", t.op("Exp", x), like(x, 1)))


def _sign(t: "Tracer", x: Any) -> Any:
    """NaN and the sign of a zero stay."""
    if not x.dtype.is_floating:
        return t.op("Sign", x)
    some = t.op("Greater", t.op("Abs", x), like(x, 0), dtype=tf.bool)
    return where(t, some, t.op("Sign", x), x)


@_single
def _logistic(t: "Tracer", x: Any) -> Any:
    """Not ONNX's Sigmoid, which runtimes round to 0 from -18 on: a logarithm may follow."""
    return t.op("Reciprocal", t.op("Add", t.op("Exp", t.op("Neg", x)), like(x, 1)))


# exp(-x^2 + sum of c t^i) t with t = 1 / (1 + x / 2), to 1.2e-7 of the value (Press et al., 1992);
# rounded to float32, to 5e-7.
_ERFC = (0.17087277, -0.82215223, 1.48851587, -1.13520398, 0.27886807, -0.18628806, 0.09678418,
         0.37409196, 1.00002368, -1.26551223)  # fmt: skip


@_single
def _erfc(t: "Tracer", x: Any) -> Any:
    """Also far out, where 1 - erf(x) has no digits left."""
    if x.dtype == tf.float64:
        raise refuse(t.place, "it computes erfc in float64, which fwt writes to 7 digits only",
                     "compute it in float32, or as 1 - erf(x)")  # fmt: skip
    size = t.op("Min", t.op("Abs", x), like(x, 12))  # from where on it is 0
    part = t.op("Reciprocal", t.op("Add", t.op("Mul", size, like(x, 0.5)), like(x, 1)))
    power = like(x, _ERFC[0])
    for c in _ERFC[1:]:
        power = t.op("Add", t.op("Mul", power, part), like(x, c))
    # The square of a few leading bits is exact, and the rest of x^2 is small.
    lead = t.op("Mul", t.op("Floor", t.op("Mul", size, like(x, 16))), like(x, 1 / 16))
    rest = t.op("Mul", t.op("Sub", size, lead), t.op("Add", size, lead))
    tail = t.op("Exp", t.op("Neg", t.op("Mul", lead, lead)))
    tail = t.op("Mul", t.op("Mul", part, tail), t.op("Exp", t.op("Sub", power, rest)))
    far = t.op("Greater", x, like(x, 0.5), dtype=tf.bool)
    return where(t, far, tail, t.op("Sub", like(x, 1), t.op("Erf", x)))


def _same(op: str, dtype: Any = None) -> Callable[..., Any]:
    return lambda t, *x: t.op(op, *x, dtype=dtype)


def _logical(op: str) -> Callable[..., Any]:
    def function(t: "Tracer", *x: Any) -> Any:
        if any(v.dtype != tf.bool for v in x):
            raise refuse(t.place, "it works on the bits of whole numbers")
        return t.op(op, *x)

    return function


def _identity(t: "Tracer", x: Any) -> Any:
    return tf.identity(x)


POINTWISE: dict[str, Callable[..., Any]] = {
    "neg": _same("Neg"), "exp": _same("Exp"), "log": _same("Log"), "tanh": _same("Tanh"),
    "abs": _same("Abs"), "log1p": _log1p, "expm1": _expm1, "logistic": _logistic,
    "erf": _same("Erf"), "sqrt": _same("Sqrt"), "sin": _same("Sin"), "cos": _same("Cos"),
    "rsqrt": lambda t, x: t.op("Reciprocal", t.op("Sqrt", x)),
    "erfc": _erfc, "tan": _same("Tan"), "asin": _same("Asin"), "acos": _same("Acos"),
    "atan": _same("Atan"), "sinh": _same("Sinh"), "cosh": _same("Cosh"), "asinh": _same("Asinh"),
    "acosh": _same("Acosh"), "atanh": _same("Atanh"),
    "sign": _sign, "floor": _same("Floor"), "ceil": _same("Ceil"),
    "square": lambda t, x: t.op("Mul", x, x),
    "is_finite": lambda t, x: t.op("Less", t.op("Abs", x), like(x, math.inf), dtype=tf.bool),
    "not": _logical("Not"), "and": _logical("And"), "or": _logical("Or"), "xor": _logical("Xor"),
    "copy": _identity, "copy_p": _identity, "stop_gradient": _identity,
    "optimization_barrier": _identity,
    "add": _same("Add"), "add_any": _same("Add"), "sub": _same("Sub"), "mul": _same("Mul"),
    "max": _max, "min": _min,
    "pow": lambda t, x, y: t.op("Pow", x, cast(t, y, x.dtype)),
    "eq": _same("Equal", tf.bool),
    "ne": lambda t, x, y: t.op("Not", t.op("Equal", x, y, dtype=tf.bool)),
    "lt": _same("Less", tf.bool), "le": _same("LessOrEqual", tf.bool),
    "gt": _same("Greater", tf.bool), "ge": _same("GreaterOrEqual", tf.bool),
    "clamp": lambda t, low, x, high: _min(t, _max(t, x, low), high),
}  # fmt: skip
