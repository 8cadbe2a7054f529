"""What JAX computes at zeros, extremes, NaN and infinities, and what onnxruntime makes of it."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest
from jax import lax
from marks import thorough_but

from fwt import converters

POINTS = [0, -0.0, 1e-30, -1e-30, 1e-4, -1e-4, 0.3, -0.3, 0.5, -0.5, 0.7, 1, -1, 1.5, -1.5, 2.5,
          -2.5, 3, -3, 5.5, -5.5, 9, -9, 17, -17, 30, -30, 60, -60, 87, -87, 90, -90, 126.5, 127.5,
          -128.5, 255.5, 256, 3e4, 7e4, -7e4, 1e5 + 0.125, 1e7, 1e8, -1e8, 2147483520, 2147483648,
          -2147483648, -3e9, 1e13, -1e13, 1e20, 3e38, -3e38, np.inf, -np.inf, np.nan]  # fmt: skip
ROWS = [[0, 0, 0], [1, 3, 2], [3, 1, 3], [-90, 0, 90], [1, np.nan, 3], [np.nan, 2, 1],
        [3, 2, np.nan], [np.inf, 1, 0], [-np.inf, 1, np.inf], [-np.inf, -np.inf, -np.inf],
        [np.inf, np.nan, -np.inf], [1e8, -90, 1], [2.5, 2.5, 2.5], [-0.0, 0, -1],
        [np.nan, 5, np.nan]]  # fmt: skip


class Of(nn.Module):
    """Functions of one input, side by side."""

    functions: tuple

    def __call__(self, x):
        return jnp.concatenate([jnp.asarray(f(x), jnp.float32) for f in self.functions], -1)


def both(path, functions, x, **how):
    """What each function gives in JAX and in the file, a list for each."""
    module = Of(tuple(functions))
    converters.to_onnx(module, {}, path, x.shape[1:], input_dtype=x.dtype, **how)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"input": x})
    ends, at = [np.asarray(f(jnp.asarray(x)), np.float32) for f in functions], 0
    for wanted in ends:
        yield found[:, at : at + wanted.shape[-1]], wanted
        at += wanted.shape[-1]


def agree(found, wanted, x, rtol=2e-6):
    for a, b, given in zip(found, wanted, x, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-37, err_msg=f"at {given}")


def whole(x):
    return x.astype(jnp.int32)


# Functions of one entry, whose values at POINTS are exact to a few roundings.
POINTWISE = {
    "log1p": jnp.log1p, "expm1": jnp.expm1, "exp": jnp.exp, "log": jnp.log, "sqrt": jnp.sqrt,
    "rsqrt": lax.rsqrt, "sign": jnp.sign, "1 / sign": lambda x: 1 / jnp.sign(x),
    "abs": jnp.abs, "floor": jnp.floor, "ceil": jnp.ceil, "round": jnp.round,
    "square": jnp.square, "reciprocal": lambda x: 1 / x, "erf": jax.scipy.special.erf,
    "elu by hand": lambda x: jnp.where(x > 0, x, jnp.exp(x) - 1),
    "mish by hand": lambda x: x * jnp.tanh(jnp.log1p(jnp.exp(x))),
    "safe division": lambda x: jnp.where(x == 0, 0.0, 1 / x),
    "safe root": lambda x: jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1.0)), 0.0),
    "entropy": lambda x: jnp.where(x > 0, x * jnp.log(x), 0.0),
    "nan_to_num": jnp.nan_to_num, "nan_to_num to 7": lambda x: jnp.nan_to_num(x, nan=7.0),
    "isfinite": jnp.isfinite, "isnan": jnp.isnan, "isinf": jnp.isinf, "signbit": lambda x: x < 0,
    "maximum": lambda x: jnp.maximum(x, 0.5), "minimum": lambda x: jnp.minimum(0.5, x),
    "clip": lambda x: jnp.clip(x, -1, 2), "clamp": lambda x: lax.clamp(-1.0, x, 2.0),
    "relu": jax.nn.relu, "relu6": jax.nn.relu6, "leaky_relu": jax.nn.leaky_relu,
    "elu": jax.nn.elu, "selu": jax.nn.selu, "celu": jax.nn.celu, "softplus": jax.nn.softplus,
    "soft_sign": jax.nn.soft_sign, "hard_tanh": jax.nn.hard_tanh, "squareplus": jax.nn.squareplus,
    "hard_sigmoid": jax.nn.hard_sigmoid, "hard_silu": jax.nn.hard_silu, "mish": jax.nn.mish,
    "sparse_plus": jax.nn.sparse_plus, "sparse_sigmoid": jax.nn.sparse_sigmoid,
    "log_sigmoid": jax.nn.log_sigmoid,
    "to int32": whole, "to int8": lambda x: x.astype(jnp.int8),
    "to uint8": lambda x: x.astype(jnp.uint8), "to int16": lambda x: x.astype(jnp.int16),
    "to uint16": lambda x: x.astype(jnp.uint16), "to uint32": lambda x: x.astype(jnp.uint32),
    "to bool": lambda x: x.astype(bool), "to int32 to bool": lambda x: whole(x).astype(bool),
    "int32 to int8": lambda x: whole(x).astype(jnp.int8),
    "int32 to uint8": lambda x: whole(x).astype(jnp.uint8),
    "to half and back": lambda x: x.astype(jnp.float16).astype(jnp.float32),
    "remainder by 3": lambda x: whole(x) % 3, "quotient by 3": lambda x: whole(x) // 3,
    "rem by -3": lambda x: lax.rem(whole(x), -3), "div by -3": lambda x: lax.div(whole(x), -3),
    "float remainder": lambda x: jnp.where(jnp.abs(x) < 1e6, x, 1.0) % 2.5,
    "power 3": lambda x: x**3, "power -2": lambda x: x**-2,
    "power 5": lambda x: lax.integer_pow(x, 5), "power 0": lambda x: lax.integer_pow(x, 0),
    "power 2.5": lambda x: x**2.5, "power of -2": lambda x: jnp.power(-2.0, jnp.clip(x, -90, 90)),
    "int power": lambda x: jnp.clip(whole(x), -9, 9) ** 3,
    "select": lambda x: lax.select_n(jnp.clip(whole(x), 0, 2), x, 2 * x, jnp.full_like(x, 7.0)),
    "select of bool": lambda x: jnp.where(x > 0, x > 1, x < -1),
    "select of int8": lambda x: jnp.where(x > 0, x.astype(jnp.int8), jnp.int8(-3)),
    "select of int16": lambda x: jnp.where(x > 0, x.astype(jnp.int16), jnp.int16(-3)),
    "logic": lambda x: (x > 1) & ~(x < 9) | (x == 0) ^ (x != x),
    "rounded by a sum": lambda x: (x + 12582912.0) - 12582912.0,
    "over the largest": lambda x: (x * 1e30) * 1e-30,
    "times zero": lambda x: x * 0.0, "less itself": lambda x: x - x,
    "largest of two": lambda x: jnp.maximum(0.2 * x, x),
}  # fmt: skip
# These are less exact in float32 themselves: to 1e-4 of their value, also far out.
FAR = {
    "sigmoid": jax.nn.sigmoid, "log of sigmoid": lambda x: jnp.log(jax.nn.sigmoid(x)),
    "silu": jax.nn.silu, "erfc": jax.scipy.special.erfc,
    "log of erfc": lambda x: jnp.log(jax.scipy.special.erfc(x)), "tanh": jnp.tanh,
    "asinh": lambda x: jnp.arcsinh(jnp.clip(x, -1e4, 1e4)), "atan": jnp.arctan,
    "asin": jnp.arcsin, "acos": jnp.arccos, "acosh": lambda x: jnp.arccosh(jnp.clip(x, -9, 1e4)),
    "atanh": jnp.arctanh, "sinh": jnp.sinh, "cosh": jnp.cosh,
    "tan": lambda x: jnp.tan(jnp.clip(x, -9, 9)), "sin": lambda x: jnp.sin(jnp.clip(x, -90, 90)),
    "cos": lambda x: jnp.cos(jnp.clip(x, -90, 90)),
    "gelu with erf": lambda x: jax.nn.gelu(x, approximate=False),
}  # fmt: skip


QUICK = (
    "log1p", "expm1", "1 / sign", "safe division", "entropy", "nan_to_num", "isnan", "to int32",
    "to int8", "to bool", "int32 to int8", "remainder by 3", "power 3", "power of -2", "select",
    "select of bool", "select of int16", "rounded by a sum",
)  # fmt: skip


def parts(table, quick):
    """Of a table, those of the names, and the rest."""
    return {k: table[k] for k in quick}, {k: f for k, f in table.items() if k not in quick}


def all_agree(path, table, points, rtol=2e-6):
    x = np.array(points, np.float32)
    with np.errstate(all="ignore"):
        pairs = both(path, table.values(), x, check=False)
        wrong = {}
        for name, (found, wanted) in zip(table, pairs, strict=True):
            try:
                agree(found, wanted, points, rtol)
            except AssertionError as error:
                wrong[name] = str(error)
    assert not wrong, "\n".join(f"{n}: {e}" for n, e in wrong.items())


@pytest.mark.parametrize("part", thorough_but(1, ["quick", "rest", "far"]))
def test_functions_of_each_entry(tmp_path, part):
    quick, rest = parts(POINTWISE, QUICK)
    table, rtol = {"quick": (quick, 2e-6), "rest": (rest, 2e-6), "far": (FAR, 1e-4)}[part]
    all_agree(tmp_path / "a.onnx", table, [[p] for p in POINTS], rtol)


def test_extremes_of_whole_numbers(tmp_path):
    x = np.array([[-300], [-3], [0], [2], [3], [5], [127], [40000]], np.int32)
    functions = [lambda x: jnp.maximum(x > 0, x < -9), lambda x: jnp.minimum(x > 0, x < 9)]
    for dtype in ("int16", "uint16", "uint32", "float16"):
        functions += [
            lambda x, d=dtype: jnp.maximum(x.astype(d), jnp.asarray(3, d)),
            lambda x, d=dtype: jnp.minimum(x.astype(d), jnp.asarray(3, d)),
            lambda x, d=dtype: lax.clamp(jnp.asarray(2, d), x.astype(d), jnp.asarray(4, d)),
        ]
    for found, wanted in both(tmp_path / "a.onnx", functions, x, check=False):
        np.testing.assert_array_equal(found, wanted)


def test_sums_of_whole_numbers_go_round_as_in_jax(tmp_path):
    x = np.array([[2**30, 2**30, 2**30, 5], [-(2**30)] * 4, [32768, 32768, 7, 5]], np.int32)
    ((found, wanted),) = both(
        tmp_path / "a.onnx", [lambda x: jnp.sum(x, -1, keepdims=True)], x, check=False
    )
    np.testing.assert_array_equal(found, wanted)
    with pytest.raises(converters.ConversionError, match="product of whole numbers"):
        list(both(tmp_path / "b.onnx", [lambda x: jnp.prod(x, -1, keepdims=True)], x))


def test_functions_in_half(tmp_path):
    """To the digits that float16 has, also below 6e-5, where it has fewer."""
    x = np.array([[-30], [-16], [-12], [-11], [-3], [-1e-3], [0], [2e-3], [0.6], [2], [3.5], [40]],
                 np.float16)  # fmt: skip
    functions = [jax.nn.sigmoid, jax.scipy.special.erfc, jnp.expm1, lambda x: jnp.log1p(abs(x))]
    wide = x.astype(float)
    with np.errstate(over="ignore"):
        wanted = [1 / (1 + np.exp(-wide)), np.vectorize(math.erfc)(wide),
                  np.expm1(wide).astype(np.float16), np.log1p(abs(wide))]  # fmt: skip
    pairs = both(tmp_path / "a.onnx", functions, x, check=False)
    for (found, _), true in zip(pairs, wanted, strict=True):
        np.testing.assert_allclose(found, true, rtol=1e-3, atol=6e-8)


def test_the_digits_of_erfc(tmp_path):
    x = np.linspace(0.5, 9, 3001, dtype=np.float32)[:, None]
    erfc = jax.scipy.special.erfc
    ((found, _),) = both(tmp_path / "a.onnx", [erfc], x, check=False)
    np.testing.assert_allclose(found, np.vectorize(math.erfc)(x), rtol=6e-7)
    with jax.enable_x64(True), pytest.raises(converters.ConversionError, match="erfc in float64"):
        list(both(tmp_path / "b.onnx", [erfc], x.astype(float), check=False))


def test_what_is_poisoned_is_not_written(tmp_path, monkeypatch):
    """A Where as a sum of products, which differs at zeros or far out only."""
    from fwt.converters.onnx import pointwise

    def products(t, which, yes, no):
        which = pointwise.cast(t, which, yes.dtype)
        other = t.op("Sub", pointwise.like(yes, 1), which)
        return t.op("Add", t.op("Mul", which, yes), t.op("Mul", other, no))

    monkeypatch.setattr("fwt.converters.onnx.primitives.where", products)
    for name, match in (
        ("safe division", "differs by"),
        ("elu by hand", "differs by"),
    ):
        module = Of((POINTWISE[name],))
        with pytest.raises(converters.ConversionError, match=match):
            converters.to_onnx(module, {}, tmp_path / "a.onnx", (5,))
        assert not list(tmp_path.iterdir())


def test_what_has_no_like_is_refused_by_name(tmp_path):
    functions = {
        "divides whole numbers by what may be 0": lambda x: whole(x) // whole(x),
        "works on the bits": lambda x: whole(x) & 3,
        "halves away from zero": lambda x: lax.round(x, lax.RoundingMethod.AWAY_FROM_ZERO),
        "'reduce'": lambda x: lax.reduce(x, 0.0, lambda a, b: a + 2 * b, (1,))[:, None],
        "maximum of a window starts": lambda x: lax.reduce_window(
            x[:, :, None], 0.0, lax.max, (1, 2, 1), (1, 1, 1), "VALID")[..., 0],
    }  # fmt: skip
    for match, function in functions.items():
        with pytest.raises(converters.ConversionError, match=match):
            converters.to_onnx(Of((function,)), {}, tmp_path / "a.onnx", (5,))


def rows(function):
    """A function along an axis as one of the same rank."""
    return lambda x: jnp.reshape(function(x), (x.shape[0], -1))


ALONG = {
    "max": rows(lambda x: x.max(-1)), "min": rows(lambda x: x.min(-1)),
    "sum": rows(lambda x: x.sum(-1)), "prod": rows(lambda x: x.prod(-1)),
    "mean": rows(lambda x: x.mean(-1)), "any": rows(lambda x: (x > 1).any(-1)),
    "all": rows(lambda x: (x > 0).all(-1)), "argmax": rows(lambda x: x.argmax(-1)),
    "argmin": rows(lambda x: x.argmin(-1)), "nanmax": rows(lambda x: jnp.nanmax(x, -1)),
    "nanmean": rows(lambda x: jnp.nanmean(x, -1)),
    "max of int": rows(lambda x: whole(x).max(-1)),
    "logsumexp": rows(lambda x: jax.nn.logsumexp(x, -1)), "softmax": jax.nn.softmax,
    "log_softmax": jax.nn.log_softmax, "sort": lambda x: jnp.sort(x, -1),
    "sort of int": lambda x: jnp.sort(whole(x), -1), "cumsum": lambda x: jnp.cumsum(x, -1),
    "cumsum of int": lambda x: jnp.cumsum(whole(x.clip(-9, 9)), -1), "median of first": lambda x: (
        jnp.sort(x, -1)[:, 1:2]),
    "safe norm": lambda x: jnp.where((x * x).sum(-1, keepdims=True) > 0,
                                     x / jnp.linalg.norm(x, axis=-1, keepdims=True), 0.0),
    "standardize": lambda x: jax.nn.standardize(jnp.where(jnp.isfinite(x), x, 0).clip(-9, 9)),
    "take, clipped": lambda x: jnp.take(jnp.array([5.0, 6, 7]), whole(x), mode="clip"),
    "take, filled": lambda x: jnp.take(jnp.array([5.0, 6, 7]), whole(x), mode="fill"),
    "take, filled with 9": lambda x: jnp.take(jnp.array([5.0, 6, 7]), whole(x), mode="fill",
                                              fill_value=9),
    "take of rows": rows(lambda x: jnp.take(jnp.arange(6.0).reshape(3, 2), whole(x), axis=0)),
    "index": lambda x: jnp.array([5.0, 6, 7])[whole(x)],
    "one_hot": rows(lambda x: jax.nn.one_hot(whole(x), 4)),
    "flip": lambda x: x[:, ::-1], "column": lambda x: x[:, -1:],
}  # fmt: skip


@pytest.mark.parametrize("part", thorough_but(1, [0, 1]))
def test_functions_along_an_axis(tmp_path, part):
    # The any and the median together: TensorFlow's operations and ours once had the same names.
    quick = ("any", "median of first", "argmax", "nanmax", "logsumexp", "take, filled", "index")
    all_agree(tmp_path / "a.onnx", parts(ALONG, quick)[part], ROWS)
