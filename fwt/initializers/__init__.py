"""JAX's initializers under JAX's names, which also carry the axes that their fans need.

Each factory returns ``(key, shape, dtype) -> array``, JAX's own protocol, so that it works
wherever a JAX initializer does (``nn.Dense(kernel_init=...)``). :func:`fwt.initialize` tells it
which axes of the leaf are inputs and outputs. One without required arguments may be written bare
or called: ``fwt.initializers.zeros`` or ``fwt.initializers.zeros()``.

Source of the mathematics: ``jax.nn.initializers``.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import initializers as _jax

from fwt._axes import Axes
from fwt._types import AxesError, noun
from fwt.initializers import keras as keras
from fwt.initializers import torch as torch
from fwt.initializers._bound import Bound as Bound
from fwt.initializers._bound import (
    Each,
    as_matrix,
    bound,
    choice,
    gives_each,
    in_layout,
    is_traced,
    numbers,
)

__all__ = [
    "constant",
    "delta_orthogonal",
    "glorot_normal",
    "glorot_uniform",
    "he_normal",
    "he_uniform",
    "kaiming_normal",
    "kaiming_uniform",
    "lecun_normal",
    "lecun_uniform",
    "normal",
    "ones",
    "orthogonal",
    "truncated_normal",
    "uniform",
    "variance_scaling",
    "xavier_normal",
    "xavier_uniform",
    "zeros",
]


# The standard deviation of a standard normal cut at two of them.
_CUT = 0.87962566103423978


def _zeros(key: Any, shape: Any, dtype: Any, axes: Axes) -> Any:
    return _jax.zeros(key, shape, dtype)


def _ones(key: Any, shape: Any, dtype: Any, axes: Axes) -> Any:
    return _jax.ones(key, shape, dtype)


def _constant(key: Any, shape: Any, dtype: Any, axes: Axes, value: Any) -> Any:
    return _jax.constant(jnp.asarray(value, dtype))(key, shape, dtype)


@gives_each
def _uniform(dtype: Any, axes: Axes, scale: float) -> Each:
    return Each(_uniform_numbers, (scale,))


def _uniform_numbers(key: Any, shape: Any, dtype: Any, scale: Any) -> Any:
    return _jax.uniform(scale)(key, shape, dtype)


@gives_each
def _normal(dtype: Any, axes: Axes, stddev: float) -> Each:
    return Each(_normal_numbers, (stddev,))


def _normal_numbers(key: Any, shape: Any, dtype: Any, stddev: Any) -> Any:
    return _jax.normal(stddev)(key, shape, dtype)


@gives_each
def _truncated_normal(dtype: Any, axes: Axes, stddev: float, lower: float, upper: float) -> Each:
    return Each(_cut_normal_numbers, (stddev,), (lower, upper))


def _cut_normal_numbers(
    key: Any, shape: Any, dtype: Any, lower: float, upper: float, stddev: Any
) -> Any:
    return _jax.truncated_normal(stddev, lower=lower, upper=upper)(key, shape, dtype)


@gives_each
def _variance_scaling(dtype: Any, axes: Axes, scale: float, mode: Any, distribution: Any) -> Each:
    if not axes.outputs or not (axes.inputs or "group" in (axes.names or ())):
        raise AxesError(
            f"{axes.path} of shape {axes.shape} has no input and output axis, so it has no fans: "
            "take an initializer without them, such as zeros or normal"
        )
    size = axes.size(axes.all)
    fan_in, fan_out = size / axes.size(axes.outputs), size / axes.size(axes.inputs)
    fans = {
        "fan_in": fan_in,
        "fan_out": fan_out,
        "fan_avg": (fan_in + fan_out) / 2,
        "fan_geo_avg": (fan_in * fan_out) ** 0.5,
    }
    variance = scale / fans[mode]
    if not jnp.issubdtype(dtype, jnp.floating):
        return Each(_scaled_numbers, (variance,), (distribution,))
    exact: Any = jnp if is_traced(scale) else np
    if distribution == "uniform":
        return Each(_symmetric_numbers, (exact.sqrt(exact.asarray(3 * variance, dtype)),))
    std = exact.sqrt(exact.asarray(variance, dtype))
    if distribution == "normal":
        return Each(_normal_numbers, (std,))
    return Each(_cut_normal_numbers, (std / exact.asarray(_CUT, dtype),), (-2, 2))


def _symmetric_numbers(key: Any, shape: Any, dtype: Any, limit: Any) -> Any:
    return jax.random.uniform(key, shape, dtype, -1) * limit


def _scaled_numbers(key: Any, shape: Any, dtype: Any, distribution: Any, variance: Any) -> Any:
    """JAX's own, told that all axes are those of a batch, so that both fans are 1."""
    none: tuple[int, ...] = ()
    draw = _jax.variance_scaling(variance, "fan_in", distribution, none, none, range(len(shape)))
    return draw(key, shape, dtype)


def _orthogonal(key: Any, shape: Any, dtype: Any, axes: Axes, scale: float) -> Any:
    if len(axes.outputs) == 1:
        return _jax.orthogonal(scale, column_axis=axes.outputs[0])(key, shape, dtype)
    if not axes.reduced:
        raise AxesError(f"{axes.path} of shape {shape}: orthogonal needs an axis beside the output")
    # Several output axes (attention heads) are one: JAX takes a single column axis.
    order = (*axes.reduced, *axes.outputs)
    make = _jax.orthogonal(scale)
    return as_matrix(lambda s: make(key, s, dtype), axes, order, len(axes.reduced))


def _delta_orthogonal(key: Any, shape: Any, dtype: Any, axes: Axes, scale: float) -> Any:
    order = (*axes.spatial, *axes.inputs, *axes.outputs)
    if len(axes.inputs) != 1 or len(axes.outputs) != 1 or not 1 <= len(axes.spatial) <= 3:
        raise AxesError(
            f"{axes.path} of shape {shape}: delta_orthogonal is for the kernel of a convolution "
            "over 1 to 3 axes; for a dense kernel take orthogonal"
        )
    make = _jax.delta_orthogonal(scale)
    return in_layout(make(key, tuple(shape[i] for i in order), dtype), order)


zeros = Bound("zeros", _zeros, whole=True)
"""All zeros: ``zeros(key, shape, dtype)``."""
ones = Bound("ones", _ones, whole=True)
"""All ones: ``ones(key, shape, dtype)``."""


def constant(value: Any) -> Bound:
    """Every element is ``value``.

    Example:
        >>> constant(0.5)(None, (2,)).tolist()
        [0.5, 0.5]
    """
    return bound(_constant, whole=True, value=numbers("value", value))


@noun
def uniform(scale: float = 1e-2) -> Bound:
    """Uniform on [0, scale).

    Example:
        >>> import jax
        >>> w = uniform(1.0)(jax.random.key(0), (100,))
        >>> bool((w >= 0).all() and (w < 1).all())
        True
    """
    return bound(_uniform, whole=True, scale=scale)


@noun
def normal(stddev: float = 1e-2) -> Bound:
    """Normal with mean 0, not truncated.

    Example:
        >>> import jax
        >>> bool(normal(2.0)(jax.random.key(0), (1000,)).std() > 1.8)
        True
    """
    return bound(_normal, whole=True, stddev=stddev)


@noun
def truncated_normal(stddev: float = 1e-2, lower: float = -2.0, upper: float = 2.0) -> Bound:
    """Normal cut at ``lower`` and ``upper`` standard deviations; the stddev is not corrected.

    Example:
        >>> import jax
        >>> bool(abs(truncated_normal(0.5)(jax.random.key(0), (1000,))).max() <= 1.0)
        True
    """
    return bound(_truncated_normal, stddev=stddev, lower=lower, upper=upper)


def variance_scaling(scale: float, mode: str, distribution: str) -> Bound:
    """Variance ``scale / fan``.

    Args:
        scale: the factor.
        mode: "fan_in", "fan_out", "fan_avg" or "fan_geo_avg".
        distribution: "normal" (not truncated), "truncated_normal" (stddev corrected), "uniform".

    Example:
        >>> variance_scaling(2.0, "fan_in", "normal") == he_normal()
        False
    """
    choice("mode", mode, ("fan_in", "fan_out", "fan_avg", "fan_geo_avg"))
    choice("distribution", distribution, ("normal", "truncated_normal", "uniform"))
    return bound(_variance_scaling, scale=scale, mode=mode, distribution=distribution)


@noun
def orthogonal(scale: float = 1.0) -> Bound:
    """A matrix with orthonormal columns (or rows), times ``scale``; outputs are the columns.

    Source: Saxe, McClelland and Ganguli, 2013.

    Example:
        >>> import jax
        >>> w = orthogonal()(jax.random.key(0), (5, 3))
        >>> bool(abs(w.T @ w - jax.numpy.eye(3)).max() < 1e-5)
        True
    """
    return bound(_orthogonal, scale=scale)


@noun
def delta_orthogonal(scale: float = 1.0) -> Bound:
    """A convolution that is orthogonal: zero but at its centre, where it is an orthogonal matrix.

    For the kernels of convolutions over 1 to 3 axes with no fewer outputs than inputs; any other
    is refused. The centre of an even window is ``(k - 1) // 2``. Source: Xiao et al., 2018.

    Example:
        >>> import jax
        >>> w = delta_orthogonal()(jax.random.key(0), (3, 3, 2, 4))
        >>> bool(abs(w[1, 1] @ w[1, 1].T - jax.numpy.eye(2)).max() < 1e-5), int((w != 0).sum()) <= 8
        (True, True)
    """
    return bound(_delta_orthogonal, scale=scale)


@noun
def glorot_uniform() -> Bound:
    """``variance_scaling(1, "fan_avg", "uniform")`` (Glorot and Bengio, 2010).

    Example:
        >>> import jax
        >>> w = glorot_uniform()(jax.random.key(0), (30, 10))
        >>> float(abs(w).max()) <= (6 / 40) ** 0.5
        True
    """
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


xavier_uniform, xavier_normal = glorot_uniform, glorot_normal
kaiming_uniform, kaiming_normal = he_uniform, he_normal


def is_jaxs(initializer: Any) -> bool:
    """Whether this is one of JAX's own initializers."""
    return getattr(initializer, "__module__", "") == _jax.normal().__module__


def foreign_axis_free(initializer: Any) -> bool:
    """Whether this is one of JAX's own initializers whose values don't depend on the axes."""
    name = getattr(initializer, "__qualname__", "").split(".")[0]
    return is_jaxs(initializer) and name in (
        "zeros",
        "ones",
        "constant",
        "normal",
        "uniform",
        "truncated_normal",
    )
