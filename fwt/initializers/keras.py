"""Keras's initializers under Keras's names, with Keras's fans.

They are JAX initializers, ``(key, shape, dtype) -> array``, without Keras's ``seed``.
:func:`fwt.initialize` tells them the axes of a leaf, and they count its fans as Keras does for the
layer that it is of: swapped for a transposed convolution, per channel for a depthwise one, (n, n)
for a vector. Called by themselves they read a shape as (..., in, out), which is Keras's own order.

Source of the distributions: ``keras.initializers`` of Keras 3; every one is tested against it.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import initializers as _jax

from fwt._axes import Axes
from fwt._types import noun
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
    numbers,
    shifted_normal,
)

__all__ = [
    "constant",
    "glorot_normal",
    "glorot_uniform",
    "he_normal",
    "he_uniform",
    "identity",
    "lecun_normal",
    "lecun_uniform",
    "ones",
    "orthogonal",
    "random_normal",
    "random_uniform",
    "truncated_normal",
    "variance_scaling",
    "zeros",
]

# The standard deviation of a standard normal cut at two of them.
_CUT = 0.87962566103423978


def _constant(key: Any, shape: Any, dtype: Any, axes: Axes, value: Any) -> Any:
    return jnp.broadcast_to(jnp.asarray(value, dtype), shape)


def _identity(key: Any, shape: Any, dtype: Any, axes: Axes, gain: float) -> Any:
    if len(shape) != 2:
        raise no_matrix("identity", axes, "matrices (two axes)")
    return (gain * jnp.eye(*shape)).astype(dtype)


@gives_each
def _random_normal(dtype: Any, axes: Axes, mean: float, stddev: float) -> Each:
    floating("random_normal", dtype)
    return Each(shifted_normal, (mean, stddev))


@gives_each
def _random_uniform(dtype: Any, axes: Axes, minval: float, maxval: float) -> Each:
    floating("random_uniform", dtype)
    return Each(jax.random.uniform, (minval, maxval))


@gives_each
def _truncated_normal(dtype: Any, axes: Axes, mean: float, stddev: float) -> Each:
    floating("truncated_normal", dtype)
    return Each(_cut_normal_numbers, (mean, stddev))


def _cut_normal_numbers(key: Any, shape: Any, dtype: Any, mean: Any, stddev: Any) -> Any:
    return mean + stddev * jax.random.truncated_normal(key, -2, 2, shape, dtype)


@gives_each
def _variance_scaling(
    dtype: Any,
    axes: Axes,
    scale: float,
    mode: str,
    distribution: str,
    input_axes: tuple[int, ...] | None,
    output_axes: tuple[int, ...] | None,
) -> Each:
    if input_axes is None or output_axes is None:
        fan_in, fan_out = axes.fans("keras")
    else:
        fan_in, fan_out = (math.prod(axes.shape[i] for i in a) for a in (input_axes, output_axes))
    fan = {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}[mode]
    variance = scale / max(1.0, fan)
    if distribution == "uniform":
        limit = math.sqrt(3 * variance)
        return _random_uniform(dtype, axes, -limit, limit)
    if distribution == "untruncated_normal":
        return _random_normal(dtype, axes, 0.0, math.sqrt(variance))
    return _truncated_normal(dtype, axes, 0.0, math.sqrt(variance) / _CUT)


def _orthogonal(key: Any, shape: Any, dtype: Any, axes: Axes, gain: float) -> Any:
    if len(shape) < 2:
        raise no_matrix("orthogonal", axes, "two axes or more")
    floating("orthogonal", dtype)
    draw = _jax.orthogonal(gain)
    order = axes.layout("keras")
    if axes.channels:  # which Keras has beside the window, and the multiplier alone as columns
        sizes = tuple(axes.shape[i] for i in order)
        times = sizes[-1] // axes.channels
        drawn = draw(key, (math.prod(sizes) // times, times), dtype)
        return in_layout(drawn.reshape(sizes), order).astype(dtype)
    return as_matrix(lambda s: draw(key, s, dtype), axes, order, len(order) - 1).astype(dtype)


@noun
def zeros() -> Bound:
    """All zeros.

    Example:
        >>> zeros()(None, (2,)).tolist()
        [0.0, 0.0]
    """
    return bound(_constant, whole=True, value=0.0)


@noun
def ones() -> Bound:
    """All ones.

    Example:
        >>> ones()(None, (2,)).tolist()
        [1.0, 1.0]
    """
    return bound(_constant, whole=True, value=1.0)


@noun
def constant(value: Any = 0.0) -> Bound:
    """Every element is ``value``.

    Example:
        >>> constant(0.5)(None, (2,)).tolist()
        [0.5, 0.5]
    """
    return bound(_constant, whole=True, value=numbers("value", value))


@noun
def identity(gain: float = 1.0) -> Bound:
    """The identity matrix times ``gain``; for two axes only, square or not.

    Example:
        >>> identity(2.0)(None, (2, 3)).tolist()
        [[2.0, 0.0, 0.0], [0.0, 2.0, 0.0]]
    """
    return bound(_identity, gain=number("gain", gain))


@noun
def random_normal(mean: float = 0.0, stddev: float = 0.05) -> Bound:
    """Normal, not truncated.

    Example:
        >>> import jax
        >>> bool(abs(random_normal(3.0)(jax.random.key(0), (100,)).mean() - 3) < 0.1)
        True
    """
    return bound(_random_normal, mean=number("mean", mean), stddev=number("stddev", stddev, 0))


@noun
def random_uniform(minval: float = -0.05, maxval: float = 0.05) -> Bound:
    """Uniform on [minval, maxval).

    Example:
        >>> import jax
        >>> bool(abs(random_uniform()(jax.random.key(0), (100,))).max() <= 0.05)
        True
    """
    return bound(
        _random_uniform,
        minval=number("minval", minval),
        maxval=number("maxval", maxval, minval),
    )


@noun
def truncated_normal(mean: float = 0.0, stddev: float = 0.05) -> Bound:
    """Normal cut at two ``stddev`` from the mean; the stddev is not corrected for the cut.

    Example:
        >>> import jax
        >>> bool(abs(truncated_normal()(jax.random.key(0), (100,))).max() <= 0.1)
        True
    """
    return bound(_truncated_normal, mean=number("mean", mean), stddev=number("stddev", stddev, 0))


@noun
def variance_scaling(
    scale: float = 1.0,
    mode: str = "fan_in",
    distribution: str = "truncated_normal",
    input_axes: Any = None,
    output_axes: Any = None,
) -> Bound:
    """Variance ``scale / fan``.

    Args:
        scale: the factor, positive.
        mode: "fan_in", "fan_out" or "fan_avg".
        distribution: "truncated_normal" (cut at two stddev, which is corrected for the cut),
            "normal" (the same, as in Keras; JAX's is not cut), "untruncated_normal", "uniform".
        input_axes: with ``output_axes``, the axes whose sizes make the fans, instead of what the
            leaf's axes say.
        output_axes: see ``input_axes``.

    Example:
        >>> variance_scaling(2.0).name
        'variance_scaling'
    """
    return bound(
        _variance_scaling,
        scale=number("scale", scale, float(np.finfo(np.float64).tiny)),
        mode=choice("mode", mode, ("fan_in", "fan_out", "fan_avg")),
        distribution=choice(
            "distribution",
            distribution,
            ("truncated_normal", "normal", "untruncated_normal", "uniform"),
        ),
        input_axes=input_axes,
        output_axes=output_axes,
    )


@noun
def glorot_uniform() -> Bound:
    """``variance_scaling(1, "fan_avg", "uniform")`` (Glorot and Bengio, 2010)."""
    return variance_scaling(1.0, "fan_avg", "uniform")


@noun
def glorot_normal() -> Bound:
    """``variance_scaling(1, "fan_avg", "truncated_normal")`` (Glorot and Bengio, 2010)."""
    return variance_scaling(1.0, "fan_avg", "truncated_normal")


@noun
def he_uniform() -> Bound:
    """``variance_scaling(2, "fan_in", "uniform")`` (He et al., 2015)."""
    return variance_scaling(2.0, "fan_in", "uniform")


@noun
def he_normal() -> Bound:
    """``variance_scaling(2, "fan_in", "truncated_normal")`` (He et al., 2015)."""
    return variance_scaling(2.0, "fan_in", "truncated_normal")


@noun
def lecun_uniform() -> Bound:
    """``variance_scaling(1, "fan_in", "uniform")`` (LeCun et al., 1998)."""
    return variance_scaling(1.0, "fan_in", "uniform")


@noun
def lecun_normal() -> Bound:
    """``variance_scaling(1, "fan_in", "truncated_normal")`` (LeCun et al., 1998)."""
    return variance_scaling(1.0, "fan_in", "truncated_normal")


@noun
def orthogonal(gain: float = 1.0) -> Bound:
    """A random matrix with orthonormal rows or columns, whichever are fewer, times ``gain``.

    The leaf is a matrix whose columns are the last axis that it has in Keras: the outputs, or the
    inputs of a transposed convolution. Source: Saxe, McClelland and Ganguli, 2014.

    Example:
        >>> import jax
        >>> w = orthogonal()(jax.random.key(0), (5, 3))
        >>> bool(abs(w.T @ w - jnp.eye(3)).max() < 1e-5)
        True
    """
    return bound(_orthogonal, gain=number("gain", gain))
