"""Activations, shapes and other layers that compute a function of their input."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fwt._types import Array, FwtError
from fwt.layers.base import Layer
from fwt.layers.windows import AvgPool, MaxPool


class Identity(Layer):
    """Its input."""

    def __call__(self, x: Array) -> Array:
        return x


class Flatten(Layer):
    """(n, ...) -> (n, product of the rest), or only the axes ``start`` to ``end`` as one."""

    start: int = 1
    end: int = -1

    def __call__(self, x: Array) -> Array:
        start, stop = self.start % x.ndim, self.end % x.ndim + 1
        merged = math.prod(x.shape[start:stop])
        return x.reshape(*x.shape[:start], merged, *x.shape[stop:])


class Reshape(Layer):
    """(n, ...) -> (n, *shape); one entry of ``shape`` may be -1."""

    shape: tuple[int, ...]

    def __call__(self, x: Array) -> Array:
        return x.reshape(x.shape[0], *self.shape)


class Permute(Layer):
    """Moves axes: output axis i is input axis ``dims[i]``, the batch axis 0 included."""

    dims: tuple[int, ...]

    def __call__(self, x: Array) -> Array:
        return jnp.transpose(x, self.dims)


class ReLU(Layer):
    """max(x, 0)."""

    def __call__(self, x: Array) -> Array:
        return jax.nn.relu(x)


class ReLU6(Layer):
    """min(max(x, 0), 6)."""

    def __call__(self, x: Array) -> Array:
        return jax.nn.relu6(x)


class LeakyReLU(Layer):
    """x, or ``negative_slope`` x below zero."""

    negative_slope: float = 0.01

    def __call__(self, x: Array) -> Array:
        return jax.nn.leaky_relu(x, self.negative_slope)


class ELU(Layer):
    """x, or ``alpha`` (exp(x) - 1) below zero."""

    alpha: float = 1.0

    def __call__(self, x: Array) -> Array:
        return jax.nn.elu(x, self.alpha)


class SELU(Layer):
    """Scaled ELU (Klambauer et al., 2017)."""

    def __call__(self, x: Array) -> Array:
        return jax.nn.selu(x)


class GELU(Layer):
    """x times the normal distribution function; ``approximate`` uses tanh.

    The default is exact, as in Keras and torch; ``jax.nn.gelu``'s is approximate.
    """

    approximate: bool = False

    def __call__(self, x: Array) -> Array:
        return jax.nn.gelu(x, approximate=self.approximate)


class SiLU(Layer):
    """x sigmoid(x), also called swish."""

    def __call__(self, x: Array) -> Array:
        return jax.nn.silu(x)


class Mish(Layer):
    """x tanh(softplus(x))."""

    def __call__(self, x: Array) -> Array:
        return jax.nn.mish(x)


class Sigmoid(Layer):
    """1 / (1 + exp(-x))."""

    def __call__(self, x: Array) -> Array:
        return jax.nn.sigmoid(x)


class LogSigmoid(Layer):
    """log(sigmoid(x))."""

    def __call__(self, x: Array) -> Array:
        return jax.nn.log_sigmoid(x)


class HardSigmoid(Layer):
    """relu6(x + 3) / 6."""

    def __call__(self, x: Array) -> Array:
        return jax.nn.hard_sigmoid(x)


class HardSwish(Layer):
    """x relu6(x + 3) / 6."""

    def __call__(self, x: Array) -> Array:
        return jax.nn.hard_swish(x)


class Tanh(Layer):
    """tanh(x)."""

    def __call__(self, x: Array) -> Array:
        return jnp.tanh(x)


class Softplus(Layer):
    """log(1 + exp(``beta`` x)) / ``beta``; x where ``beta`` x is above ``threshold``."""

    beta: float = 1.0
    threshold: float | None = None

    def __call__(self, x: Array) -> Array:
        y = jax.nn.softplus(x * self.beta) / self.beta
        return y if self.threshold is None else jnp.where(x * self.beta > self.threshold, x, y)


class Softsign(Layer):
    """x / (1 + |x|)."""

    def __call__(self, x: Array) -> Array:
        return jax.nn.soft_sign(x)


class Exponential(Layer):
    """exp(x)."""

    def __call__(self, x: Array) -> Array:
        return jnp.exp(x)


class PReLU(Layer):
    """x, or a learned slope times x below zero, ``negative_slope``, one for each entry of ``axes``.

    No axes: one slope for all. They start at 0.25.
    """

    axes: tuple[int, ...] = (-1,)

    @nn.compact
    def __call__(self, x: Array) -> Array:
        where = sorted(a % x.ndim for a in self.axes)
        shape = tuple(x.shape[a] for a in where)
        slope = self.param("negative_slope", nn.initializers.constant(0.25), shape)
        full = [x.shape[a] if a in where else 1 for a in range(x.ndim)]
        return jnp.where(x >= 0, x, x * slope.reshape(full))


class ClippedReLU(Layer):
    """x above ``threshold`` and up to ``max_value``, ``negative_slope`` (x - threshold) below."""

    max_value: float | None = None
    negative_slope: float = 0.0
    threshold: float = 0.0

    def __call__(self, x: Array) -> Array:
        y = jnp.where(x > self.threshold, x, 0)
        if self.max_value is not None:
            y = jnp.clip(y, 0, self.max_value)
        if self.negative_slope:
            y = y - self.negative_slope * jax.nn.relu(self.threshold - x)
        return y


class HardTanh(Layer):
    """x between ``min_value`` and ``max_value``."""

    min_value: float = -1.0
    max_value: float = 1.0

    def __call__(self, x: Array) -> Array:
        return jnp.clip(x, self.min_value, self.max_value)


class CELU(Layer):
    """max(x, 0) + min(0, ``alpha`` (exp(x / ``alpha``) - 1)) (Barron, 2017)."""

    alpha: float = 1.0

    def __call__(self, x: Array) -> Array:
        return jax.nn.celu(x, self.alpha)


class HardShrink(Layer):
    """x, or 0 where abs(x) is at most ``threshold``."""

    threshold: float = 0.5

    def __call__(self, x: Array) -> Array:
        return jnp.where(jnp.abs(x) <= self.threshold, 0, x)  # NaN stays


class SoftShrink(Layer):
    """x moved towards 0 by ``threshold``, and no further."""

    threshold: float = 0.5

    def __call__(self, x: Array) -> Array:
        return jnp.sign(x) * jnp.maximum(jnp.abs(x) - self.threshold, 0)


class TanhShrink(Layer):
    """x - tanh(x)."""

    def __call__(self, x: Array) -> Array:
        return x - jnp.tanh(x)


class Threshold(Layer):
    """x, or ``value`` where x is at most ``threshold``."""

    threshold: float
    value: float

    def __call__(self, x: Array) -> Array:
        return jnp.where(x <= self.threshold, self.value, x)  # NaN stays


class SquarePlus(Layer):
    """(x + sqrt(x² + ``b``)) / 2 (Barron, 2021)."""

    b: float = 4.0

    def __call__(self, x: Array) -> Array:
        return jax.nn.squareplus(x, self.b)


class SparsePlus(Layer):
    """0 below -1, x above 1, (x + 1)² / 4 between."""

    def __call__(self, x: Array) -> Array:
        return jax.nn.sparse_plus(x)


class SparseSigmoid(Layer):
    """x / 2 + 1 / 2 between 0 and 1."""

    def __call__(self, x: Array) -> Array:
        return jax.nn.sparse_sigmoid(x)


class GLU(Layer):
    """The first half along ``axis`` times the sigmoid of the second (Dauphin et al., 2017)."""

    axis: int = -1

    def __call__(self, x: Array) -> Array:
        return jax.nn.glu(x, axis=self.axis)


class Softmin(Layer):
    """Softmax of -x along ``axis``."""

    axis: int = -1

    def __call__(self, x: Array) -> Array:
        return jax.nn.softmax(-x, axis=self.axis)


class Sparsemax(Layer):
    """x less a threshold, from 0 on, as Keras 3.15 computes it along ``axis``.

    Keras's threshold sums partial sums: where several entries stay, it is not the nearest point
    of the simplex that Martins and Astudillo (2016) call sparsemax.
    """

    axis: int = -1

    def __call__(self, x: Array) -> Array:
        z = jnp.moveaxis(x, self.axis, -1)
        falling = -jnp.sort(-z, axis=-1)
        sums = jnp.cumsum(falling, axis=-1)
        ranks = jnp.arange(1, z.shape[-1] + 1)
        stays = falling - (sums - 1) / ranks > 0
        count = jnp.sum(stays, axis=-1, keepdims=True)
        total = jnp.sum(jnp.where(stays, sums, 0), axis=-1, keepdims=True)
        return jnp.moveaxis(jnp.maximum(z - (total - 1) / count, 0), -1, self.axis)


class UnitNorm(Layer):
    """x divided by its Euclidean norm along ``axes``; a norm below 1e-6 counts as that."""

    axes: tuple[int, ...] = (-1,)

    def __call__(self, x: Array) -> Array:
        square = jnp.sum(x * x, axis=self.axes, keepdims=True)
        return x * jax.lax.rsqrt(jnp.maximum(square, 1e-12))


class LocalResponseNorm(Layer):
    """x / (k + alpha mean(x² of ``size`` channels around))^beta over the last axis.

    The mean counts channels beyond the ends as zero (Krizhevsky et al., 2012; torch's form).
    """

    size: int
    alpha: float = 1e-4
    beta: float = 0.75
    k: float = 1.0

    def __call__(self, x: Array) -> Array:
        pads = [(0, 0)] * (x.ndim - 1) + [(self.size // 2, (self.size - 1) // 2)]
        squares = jnp.pad(x * x, pads)
        n = x.shape[-1]
        total = sum(squares[..., i : i + n] for i in range(self.size))
        return x / (self.k + self.alpha * total / self.size) ** self.beta


class RepeatVector(Layer):
    """(n, c) -> (n, ``times``, c)."""

    times: int

    def __call__(self, x: Array) -> Array:
        return jnp.repeat(x[:, None], self.times, axis=1)


class TrainingOnly(Layer):
    """The identity: a layer of ``framework`` that acts in training only, kept for the way back.

    ``settings`` is JSON.
    """

    framework: str
    kind: str
    settings: str = "{}"

    def __call__(self, x: Array) -> Array:
        return x


class Softmax(Layer):
    """exp(x) normalised to sum 1 along ``axis``."""

    axis: int = -1

    def __call__(self, x: Array) -> Array:
        return jax.nn.softmax(x, axis=self.axis)


class LogSoftmax(Layer):
    """The logarithm of softmax along ``axis``."""

    axis: int = -1

    def __call__(self, x: Array) -> Array:
        return jax.nn.log_softmax(x, axis=self.axis)


_FUNCTIONS: Sequence[tuple[Callable[..., Any], type[Layer], dict[str, Any]]] = (
    (jax.nn.relu, ReLU, {}),
    (jax.nn.relu6, ReLU6, {}),
    (jax.nn.leaky_relu, LeakyReLU, {}),
    (jax.nn.elu, ELU, {}),
    (jax.nn.selu, SELU, {}),
    (jax.nn.gelu, GELU, {"approximate": True}),
    (jax.nn.silu, SiLU, {}),
    (jax.nn.mish, Mish, {}),
    (jax.nn.sigmoid, Sigmoid, {}),
    (jax.nn.log_sigmoid, LogSigmoid, {}),
    (jax.nn.hard_sigmoid, HardSigmoid, {}),
    (jax.nn.hard_silu, HardSwish, {}),
    (jnp.tanh, Tanh, {}),
    (jax.nn.softplus, Softplus, {}),
    (jax.nn.soft_sign, Softsign, {}),
    (jnp.exp, Exponential, {}),
    (jax.nn.softmax, Softmax, {}),
    (jax.nn.celu, CELU, {}),
    (jax.nn.glu, GLU, {}),
    (jax.nn.hard_tanh, HardTanh, {}),
    (jax.nn.squareplus, SquarePlus, {}),
    (jax.nn.sparse_plus, SparsePlus, {}),
    (jax.nn.sparse_sigmoid, SparseSigmoid, {}),
    (jax.nn.log_softmax, LogSoftmax, {}),
)


def from_function(function: Callable[..., Any]) -> Layer:
    """The layer that stands for a plain function such as ``nn.relu``, or for a ``partial`` of one
    with keywords, such as ``partial(nn.leaky_relu, negative_slope=0.2)``."""
    if isinstance(function, functools.partial):
        return _from_partial(function)
    for known, layer, settings in _FUNCTIONS:
        if function is known:
            return layer(**settings)
    raise FwtError(
        f"{getattr(function, '__name__', function)!r} is no linen module and no activation that "
        "fwt.layers knows; wrap it in a linen module of your own"
    )


def _from_partial(function: "functools.partial[Any]") -> Layer:
    given, name = dict(function.keywords), getattr(function.func, "__name__", function.func)
    if function.args:
        raise FwtError(f"partial({name}, {function.args[0]!r}, ...): give its arguments by name")
    if function.func in (nn.max_pool, nn.avg_pool):
        window = tuple(given.pop("window_shape"))
        # Where they are not given, a plain pool moves by one, and counts its padding.
        strides = given.pop("strides", None) or (1,) * len(window)
        pool: dict[str, Any] = {"window_shape": window, "strides": tuple(strides), **given}
        if function.func is nn.max_pool:
            return MaxPool(**pool)
        return AvgPool(**{"count_include_pad": True, **pool})
    for known, layer, settings in _FUNCTIONS:
        if function.func is known:
            fields = layer.__dataclass_fields__
            if unknown := [k for k in given if k not in fields or k in ("parent", "name")]:
                raise FwtError(f"partial({name}, {unknown[0]}=...): its layer has no such setting")
            return layer(**{**settings, **given})
    return from_function(function.func)
