"""torch.nn.init under its names (without the final underscore), with torch's fans.

They are JAX initializers, ``(key, shape, dtype) -> array``. :func:`fwt.initialize` tells them the
axes of a leaf, and they do to it what torch does to the same weight in its own order, (out, in,
*k), or (in, out, *k) for a transposed convolution. Called by themselves they read a shape as
(..., in, out), as every JAX initializer does, and not as torch would.

Source of the distributions: ``torch.nn.init`` of torch 2; every one is tested against it.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import initializers as _jax

from fwt._axes import Axes
from fwt._types import FwtError, noun
from fwt.initializers._bound import (
    Bound,
    Each,
    as_matrix,
    bound,
    choice,
    floating,
    gives_each,
    in_layout,
    no_matrix,
    number,
    shifted_normal,
)

__all__ = [
    "calculate_gain",
    "constant",
    "dirac",
    "eye",
    "kaiming_normal",
    "kaiming_uniform",
    "normal",
    "ones",
    "orthogonal",
    "sparse",
    "trunc_normal",
    "uniform",
    "xavier_normal",
    "xavier_uniform",
    "zeros",
]

_GAINS = {
    "linear": 1.0,
    **{f"conv{t}{r}d": 1.0 for t in ("", "_transpose") for r in (1, 2, 3)},
    "sigmoid": 1.0,
    "tanh": 5 / 3,
    "relu": math.sqrt(2.0),
    "leaky_relu": 0.0,  # of its slope
    "selu": 3 / 4,
}


def calculate_gain(nonlinearity: str, param: float | None = None) -> float:
    """The gain for a nonlinearity.

    Args:
        nonlinearity: "linear", "conv2d" and the like, "sigmoid", "tanh", "relu", "leaky_relu" or
            "selu".
        param: the negative slope of "leaky_relu"; None is 0.01.

    Example:
        >>> calculate_gain("leaky_relu", 0.0) == 2**0.5
        True
    """
    choice("nonlinearity", nonlinearity, tuple(_GAINS))
    if nonlinearity != "leaky_relu":
        return _GAINS[nonlinearity]
    slope = 0.01 if param is None else float(number("param", param))
    return math.sqrt(2.0 / (1 + slope**2))


@gives_each
def _uniform(dtype: Any, axes: Axes, a: float, b: float) -> Each:
    floating("uniform", dtype)
    return Each(jax.random.uniform, (a, b))


@gives_each
def _normal(dtype: Any, axes: Axes, mean: float, std: float) -> Each:
    floating("normal", dtype)
    return Each(shifted_normal, (mean, std))


@gives_each
def _trunc_normal(dtype: Any, axes: Axes, mean: float, std: float, a: float, b: float) -> Each:
    floating("trunc_normal", dtype)
    return Each(_cut_normal_numbers, fixed=(mean, std, a, b))


def _cut_normal_numbers(
    key: Any, shape: Any, dtype: Any, mean: float, std: float, a: float, b: float
) -> Any:
    if std == 0:
        return jnp.full(shape, min(max(mean, a), b), dtype)
    low, high = (a - mean) / std, (b - mean) / std
    # In the lower half, where the distribution function keeps its relative precision.
    flipped = low + high > 0
    if flipped:
        low, high = -high, -low
    share = jax.random.uniform(key, shape, dtype)
    x = _between(share, jnp.asarray(low, dtype), jnp.asarray(high, dtype), far=high < -5)
    x = jnp.clip(x, low, high)
    return jnp.clip(mean + std * (-x if flipped else x), a, b).astype(dtype)


def _between(share: Any, low: Any, high: Any, far: bool) -> Any:
    """Where a share of the standard normal's mass between two points is reached."""
    if not far:
        below, above = jax.scipy.special.ndtr(low), jax.scipy.special.ndtr(high)
        u = below + share * (above - below)
        return jax.scipy.special.ndtri(jnp.maximum(u, above * 1e-8))  # 0 is an outlier of any size
    # Both are far in the lower tail, where the mass itself underflows: by its logarithm.
    log_ndtr = jax.scipy.special.log_ndtr
    log_u = jnp.logaddexp(log_ndtr(high) + jnp.log(share), log_ndtr(low) + jnp.log1p(-share))
    x = -jnp.sqrt(-2 * log_u)
    for _ in range(6):  # Newton; the slope of the logarithm is the hazard
        slope = jnp.exp(-0.5 * x * x - 0.5 * math.log(2 * math.pi) - log_ndtr(x))
        x = jnp.clip(x - (log_ndtr(x) - log_u) / slope, low, high)
    return x


def _constant(key: Any, shape: Any, dtype: Any, axes: Axes, val: Any) -> Any:
    return jnp.full(shape, val, dtype)


def _eye(key: Any, shape: Any, dtype: Any, axes: Axes) -> Any:
    if not axes.inputs or axes.spatial:
        raise no_matrix("eye", axes, "the weights of a Linear (two axes)")
    order = axes.layout("torch")
    cut = len(axes.outputs)
    return as_matrix(lambda s: jnp.eye(*s, dtype=dtype), axes, order, cut)


def _torchs(axes: Axes) -> tuple[int, ...]:
    """The shape that torch keeps: (out, in, *k), or (in, out / groups, *k) if transposed."""
    first, second, *window = (axes.shape[i] for i in axes.layout("torch"))
    return first * axes.groups, second // axes.groups, *window


def _from_torchs(value: Any, axes: Axes) -> Any:
    """An array of that shape as the leaf keeps it: each group has its own outputs."""
    groups, (first, second, *window) = axes.groups, value.shape
    split = value.reshape(groups, first // groups, second, *window).swapaxes(0, 1)
    whole = split.reshape(first // groups, second * groups, *window)
    return in_layout(whole, axes.layout("torch"))


def _dirac(key: Any, shape: Any, dtype: Any, axes: Axes, groups: int) -> Any:
    sizes = _torchs(axes) if len(shape) > 1 else shape
    if len(sizes) != 2 + len(axes.spatial) or not 1 <= len(axes.spatial) <= 3:
        raise no_matrix("dirac", axes, "the kernel of a convolution over 1 to 3 axes")
    if sizes[0] % groups:
        raise FwtError(
            f"{axes.path}: dirac(groups={groups}) must divide the {sizes[0]} units of torch's "
            "first axis"
        )
    new = np.zeros(sizes, np.float32)
    centre = tuple(k // 2 for k in sizes[2:])
    share = sizes[0] // groups
    for group in range(groups):
        for unit in range(min(share, sizes[1])):
            new[(group * share + unit, unit, *centre)] = 1
    return _from_torchs(jnp.asarray(new, dtype), axes)


@gives_each
def _xavier(dtype: Any, axes: Axes, gain: float, distribution: str) -> Each:
    std = gain * math.sqrt(2.0 / max(sum(axes.fans("torch")), 1))
    return _scaled(dtype, axes, std, distribution)


@gives_each
def _kaiming(
    dtype: Any, axes: Axes, a: float, mode: str, nonlinearity: str, distribution: str
) -> Each:
    fan = axes.fans("torch")[mode == "fan_out"]
    std = calculate_gain(nonlinearity, a) / math.sqrt(max(fan, 1))
    return _scaled(dtype, axes, std, distribution)


def _scaled(dtype: Any, axes: Axes, std: float, distribution: str) -> Each:
    if distribution == "normal":
        return _normal(dtype, axes, 0.0, std)
    limit = math.sqrt(3.0) * std
    return _uniform(dtype, axes, -limit, limit)


def _orthogonal(key: Any, shape: Any, dtype: Any, axes: Axes, gain: float) -> Any:
    order = axes.layout("torch")
    cut = len(axes.inputs if axes.transposed else axes.outputs)
    if not 0 < cut < len(order):
        raise no_matrix("orthogonal", axes, "two axes or more")
    floating("orthogonal", dtype)
    draw = _jax.orthogonal(gain)
    if axes.groups > 1:
        first, *rest = _torchs(axes)
        drawn = draw(key, (first, math.prod(rest)), dtype).reshape(first, *rest)
        return _from_torchs(drawn, axes).astype(dtype)
    return as_matrix(lambda s: draw(key, s, dtype), axes, order, cut).astype(dtype)


def _sparse(key: Any, shape: Any, dtype: Any, axes: Axes, sparsity: float, std: float) -> Any:
    if not axes.inputs or axes.spatial:
        raise no_matrix("sparse", axes, "the weights of a Linear (two axes)")
    values, places = jax.random.split(key)
    floating("sparse", dtype)

    def draw(flat: tuple[int, int]) -> Any:
        zeros = math.ceil(sparsity * flat[0])
        order = jax.random.permutation(
            places, jnp.broadcast_to(jnp.arange(flat[0])[:, None], flat), axis=0, independent=True
        )
        return jnp.where(order < zeros, 0, std * jax.random.normal(values, flat, dtype))

    return as_matrix(draw, axes, axes.layout("torch"), len(axes.outputs)).astype(dtype)


@noun
def uniform(a: float = 0.0, b: float = 1.0) -> Bound:
    """Uniform on [a, b).

    Example:
        >>> import jax
        >>> bool(abs(uniform(-2.0, 2.0)(jax.random.key(0), (100,))).max() > 1)
        True
    """
    return bound(_uniform, whole=True, a=number("a", a), b=number("b", b, a))


@noun
def normal(mean: float = 0.0, std: float = 1.0) -> Bound:
    """Normal, not truncated.

    Example:
        >>> import jax
        >>> bool(abs(normal(3.0, 0.1)(jax.random.key(0), (100,)).mean() - 3) < 0.1)
        True
    """
    return bound(_normal, whole=True, mean=number("mean", mean), std=number("std", std, 0))


@noun
def trunc_normal(mean: float = 0.0, std: float = 1.0, a: float = -2.0, b: float = 2.0) -> Bound:
    """Normal cut at the values ``a`` and ``b``, whatever the ``std``.

    Example:
        >>> import jax
        >>> w = trunc_normal(std=10.0)(jax.random.key(0), (1000,))
        >>> bool(abs(w).max() <= 2), bool(abs(w).max() > 1.9)
        (True, True)
    """
    return bound(
        _trunc_normal,
        mean=number("mean", mean),
        std=number("std", std, 0),
        a=number("a", a),
        b=number("b", b, a),
    )


@noun
def zeros() -> Bound:
    """All zeros.

    Example:
        >>> zeros()(None, (2,)).tolist()
        [0.0, 0.0]
    """
    return constant(0.0)


@noun
def ones() -> Bound:
    """All ones.

    Example:
        >>> ones()(None, (2,)).tolist()
        [1.0, 1.0]
    """
    return constant(1.0)


def constant(val: float) -> Bound:
    """Every element is ``val``.

    Example:
        >>> constant(0.5)(None, (2,)).tolist()
        [0.5, 0.5]
    """
    return bound(_constant, whole=True, val=number("val", val))


@noun
def eye() -> Bound:
    """The identity matrix; for the weights of a Linear, square or not.

    Example:
        >>> eye()(None, (2, 3)).tolist()
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    """
    return bound(_eye)


@noun
def dirac(groups: int = 1) -> Bound:
    """A convolution that passes its inputs on: 1 at the centre ``k // 2`` where input = output.

    For kernels over 1 to 3 axes. JAX's delta has another centre for an even window.

    Args:
        groups: in how many groups the outputs are; each passes on all inputs that it has.

    Example:
        >>> dirac()(None, (3, 2, 2))[1].tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
        raise FwtError(f"groups must be a whole number of at least 1, found {groups!r}")
    return bound(_dirac, groups=groups)


@noun
def xavier_uniform(gain: float = 1.0) -> Bound:
    """Uniform with variance ``gain² · 2 / (fan_in + fan_out)`` (Glorot and Bengio, 2010)."""
    return _named(
        "xavier_uniform",
        bound(_xavier, gain=number("gain", gain), distribution="uniform"),
    )


@noun
def xavier_normal(gain: float = 1.0) -> Bound:
    """Normal with variance ``gain² · 2 / (fan_in + fan_out)``, not truncated, unlike Keras's."""
    made = bound(_xavier, gain=number("gain", gain), distribution="normal")
    return _named("xavier_normal", made)


@noun
def kaiming_uniform(
    a: float = 0.0, mode: str = "fan_in", nonlinearity: str = "leaky_relu"
) -> Bound:
    """Uniform with variance ``gain² / fan`` (He et al., 2015).

    Args:
        a: the negative slope of "leaky_relu". ``kaiming_uniform(5**0.5)`` is what torch gives the
            weights of a new Linear and convolution.
        mode: "fan_in" or "fan_out".
        nonlinearity: as in :func:`calculate_gain`.

    Example:
        >>> import jax
        >>> w = kaiming_uniform(5**0.5)(jax.random.key(0), (100, 30))
        >>> bool(0.09 < abs(w).max() <= 0.1)
        True
    """
    return _kaiming_of("kaiming_uniform", a, mode, nonlinearity, "uniform")


@noun
def kaiming_normal(a: float = 0.0, mode: str = "fan_in", nonlinearity: str = "leaky_relu") -> Bound:
    """Normal with variance ``gain² / fan``, not truncated, unlike Keras's (He et al., 2015).

    Args:
        a: the negative slope of "leaky_relu".
        mode: "fan_in" or "fan_out".
        nonlinearity: as in :func:`calculate_gain`.

    Example:
        >>> import jax
        >>> w = kaiming_normal(nonlinearity="relu")(jax.random.key(0), (200, 300))
        >>> bool(abs(w.std() - 0.1) < 0.002)
        True
    """
    return _kaiming_of("kaiming_normal", a, mode, nonlinearity, "normal")


def _kaiming_of(name: str, a: float, mode: str, nonlinearity: str, distribution: str) -> Bound:
    calculate_gain(nonlinearity, a)
    return _named(
        name,
        bound(
            _kaiming,
            a=number("a", a),
            mode=choice("mode", mode, ("fan_in", "fan_out")),
            nonlinearity=nonlinearity,
            distribution=distribution,
        ),
    )


def _named(name: str, made: Bound) -> Bound:
    return dataclasses.replace(made, name=name)


@noun
def orthogonal(gain: float = 1.0) -> Bound:
    """A random matrix with orthonormal rows or columns, whichever are fewer, times ``gain``.

    The leaf is a matrix whose rows are the first axis that it has in torch: the outputs, or the
    inputs of a transposed convolution. Source: Saxe, McClelland and Ganguli, 2014.

    Example:
        >>> import jax
        >>> w = orthogonal()(jax.random.key(0), (5, 3))
        >>> bool(abs(w.T @ w - jnp.eye(3)).max() < 1e-5)
        True
    """
    return bound(_orthogonal, gain=number("gain", gain))


def sparse(sparsity: float, std: float = 0.01) -> Bound:
    """Normal, but for each input exactly ``ceil(sparsity · outputs)`` weights are zero.

    For the weights of a Linear. Source: Martens, 2010.

    Args:
        sparsity: the share of zeros, 0 to 1.
        std: of the weights that are not zero.

    Example:
        >>> import jax
        >>> (sparse(0.5)(jax.random.key(0), (3, 5)) == 0).sum(1).tolist()
        [3, 3, 3]
    """
    return bound(_sparse, sparsity=number("sparsity", sparsity, 0, 1), std=number("std", std, 0))
