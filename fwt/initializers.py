"""JAX's initializers under JAX's names, which also carry the axes that their fans need.

Each factory returns ``(key, shape, dtype) -> array``, JAX's own protocol, so that it works
wherever a JAX initializer does (``nn.Dense(kernel_init=...)``). :func:`fwt.initialize` tells it
which axes of the leaf are inputs and outputs. One without required arguments may be written bare
or called: ``fwt.initializers.zeros`` or ``fwt.initializers.zeros()``.

Source of the mathematics: ``jax.nn.initializers``.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.nn import initializers as _jax

from fwt._axes import Axes
from fwt._types import AxesError, noun

__all__ = [
    "constant",
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


@dataclasses.dataclass(frozen=True)
class Bound:
    """One initializer with its settings: hashable, comparable, picklable."""

    name: str
    settings: tuple[tuple[str, Any], ...] = ()
    axes: Axes | None = None

    def __call__(self, key: Any = None, shape: Any = None, dtype: Any = jnp.float32) -> Any:
        if shape is None and key is None:  # a noun may be written bare or called
            return self
        if shape is None:
            raise TypeError(f"{self.name}(key, shape, dtype) needs a shape, found only {key!r}")
        return _MAKE[self.name](self.axes, **dict(self.settings))(key, tuple(shape), dtype)

    def at(self, axes: Axes) -> "Bound":
        """The same initializer for a leaf with these axes."""
        return dataclasses.replace(self, axes=axes if self.name in _USES_AXES else None)


def _scaling(axes: Axes | None, scale: float, mode: Any, distribution: Any) -> Any:
    if axes is None:
        return _jax.variance_scaling(scale, mode, distribution)
    if not axes.inputs or not axes.outputs:
        raise AxesError(
            f"{axes.path} of shape {axes.shape} has no input and output axis, so it has no fans: "
            "take an initializer without them, such as zeros or normal"
        )
    return _jax.variance_scaling(
        scale, mode, distribution, in_axis=axes.inputs, out_axis=axes.outputs
    )


def _orthogonal(axes: Axes | None, scale: float) -> Any:
    column = -1
    if axes is not None:
        if len(axes.outputs) != 1:
            # Several output axes (attention heads) are one: JAX takes a single column axis.
            return _flattened(_jax.orthogonal(scale), axes)
        column = axes.outputs[0]
    return _jax.orthogonal(scale, column_axis=column)


def _flattened(initializer: Callable[..., Any], axes: Axes) -> Callable[..., Any]:
    def init(key: Any, shape: Any, dtype: Any) -> Any:
        order = (*axes.reduced, *axes.outputs)
        sizes = tuple(shape[i] for i in order)
        cut = len(axes.reduced)
        flat = (math.prod(sizes[:cut]), math.prod(sizes[cut:]))
        back = sorted(range(len(order)), key=lambda i: order[i])
        return initializer(key, flat, dtype).reshape(sizes).transpose(back)

    return init


_MAKE: dict[str, Callable[..., Any]] = {
    "zeros": lambda axes: _jax.zeros,
    "ones": lambda axes: _jax.ones,
    "constant": lambda axes, value: _jax.constant(value),
    "uniform": lambda axes, scale: _jax.uniform(scale),
    "normal": lambda axes, stddev: _jax.normal(stddev),
    "truncated_normal": lambda axes, stddev, lower, upper: _jax.truncated_normal(
        stddev, lower=lower, upper=upper
    ),
    "variance_scaling": _scaling,
    "orthogonal": _orthogonal,
}
_USES_AXES = {"variance_scaling", "orthogonal"}

zeros = Bound("zeros")
"""All zeros: ``zeros(key, shape, dtype)``."""
ones = Bound("ones")
"""All ones: ``ones(key, shape, dtype)``."""


def _frozen(value: Any) -> Any:
    """Arrays as nested tuples, so that the initializer can be hashed."""
    listed = value.tolist() if hasattr(value, "tolist") else value
    return tuple(map(_frozen, listed)) if isinstance(listed, list | tuple) else listed


def constant(value: Any) -> Bound:
    """Every element is ``value``.

    Example:
        >>> constant(0.5)(None, (2,)).tolist()
        [0.5, 0.5]
    """
    return Bound("constant", (("value", _frozen(value)),))


@noun
def uniform(scale: float = 1e-2) -> Bound:
    """Uniform on [0, scale).

    Example:
        >>> import jax
        >>> w = uniform(1.0)(jax.random.key(0), (100,))
        >>> bool((w >= 0).all() and (w < 1).all())
        True
    """
    return Bound("uniform", (("scale", scale),))


@noun
def normal(stddev: float = 1e-2) -> Bound:
    """Normal with mean 0, not truncated.

    Example:
        >>> import jax
        >>> bool(normal(2.0)(jax.random.key(0), (1000,)).std() > 1.8)
        True
    """
    return Bound("normal", (("stddev", stddev),))


@noun
def truncated_normal(stddev: float = 1e-2, lower: float = -2.0, upper: float = 2.0) -> Bound:
    """Normal cut at ``lower`` and ``upper`` standard deviations; the stddev is not corrected.

    Example:
        >>> import jax
        >>> bool(abs(truncated_normal(0.5)(jax.random.key(0), (1000,))).max() <= 1.0)
        True
    """
    return Bound("truncated_normal", (("stddev", stddev), ("lower", lower), ("upper", upper)))


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
    return Bound(
        "variance_scaling", (("scale", scale), ("mode", mode), ("distribution", distribution))
    )


@noun
def orthogonal(scale: float = 1.0) -> Bound:
    """A matrix with orthonormal columns (or rows), times ``scale``; outputs are the columns.

    Source: Saxe, McClelland and Ganguli, 2013.

    Example:
        >>> import jax
        >>> w = orthogonal()(jax.random.key(0), (5, 3))
        >>> bool(abs(w.T @ w - jnp.eye(3)).max() < 1e-5)
        True
    """
    return Bound("orthogonal", (("scale", scale),))


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


def foreign_axis_free(initializer: Any) -> bool:
    """Whether this is one of JAX's own initializers whose values don't depend on the axes."""
    name = getattr(initializer, "__qualname__", "").split(".")[0]
    return getattr(initializer, "__module__", "") == _jax.normal().__module__ and name in (
        "zeros",
        "ones",
        "constant",
        "normal",
        "uniform",
        "truncated_normal",
    )
