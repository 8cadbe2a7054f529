"""Constraints: ``(leaf, axes) -> leaf``, each with what it declares itself to be.

A *projection* gives the nearest point of the set, a *retraction* some point of it, a
*normalisation* has no exact set. Norms are per output unit, over every axis but the output's;
``axis=`` names other axes to sum over, as in Keras.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from fwt._axes import Axes
from fwt._types import Array, AxesError, FwtError, LeafError, noun

__all__ = ["max_norm", "min_max_norm", "non_negative", "unit_norm"]

Axis = int | Sequence[int] | None


@dataclasses.dataclass(frozen=True)
class Bound:
    """One constraint with its settings.

    Attributes:
        name: its name in ``fwt.constraints``.
        kind: "projection", "retraction" or "normalisation".
        keeps_zeros: whether pruned zeros stay zero, so that ``project(..., masks=...)`` works.
        settings: the arguments, sorted by name.
    """

    name: str
    kind: Literal["projection", "retraction", "normalisation"]
    keeps_zeros: bool
    function: Callable[..., Any]
    settings: tuple[tuple[str, Any], ...] = ()

    def __call__(self, leaf: Any, axes: Axes | str | None = None) -> Any:
        if not isinstance(axes, Axes):
            names = tuple(axes.split()) if isinstance(axes, str) else None
            axes = Axes("the leaf", jnp.shape(leaf), names)
        return self.function(leaf, axes, **dict(self.settings))


def _check(name: str, value: Any, low: float, high: float = float("inf")) -> None:
    """Numbers are checked at once; traced and array settings can't be."""
    if isinstance(value, jax.Array | np.ndarray):
        return
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise FwtError(f"{name} must be a number, found {value!r}")
    if not low <= value <= high:
        limit = f"at least {low:g}" if high == float("inf") else f"{low:g} to {high:g}"
        raise FwtError(f"{name} must be {limit}, found {value}")


def _bound(function: Callable[..., Any], kind: Any, keeps_zeros: bool, **settings: Any) -> Bound:
    axis = settings.get("axis")
    if isinstance(axis, Sequence):
        settings["axis"] = tuple(axis)
    name = function.__name__.lstrip("_")
    return Bound(name, kind, keeps_zeros, function, tuple(sorted(settings.items())))


def _over(axes: Axes, axis: Axis) -> tuple[int, ...]:
    if axis is None:
        return axes.reduced
    rank = len(axes.shape)
    listed = (axis,) if isinstance(axis, int) else tuple(axis)
    if not all(isinstance(a, int) for a in listed):
        raise AxesError(f"axis must be a number or several, found {axis!r}")
    if any(not -rank <= a < rank for a in listed):
        raise AxesError(
            f"{axes.path} has shape {axes.shape}, so axis={axis} is not one of its axes"
        )
    return tuple(a % rank for a in listed)


def _polar(leaf: Any, axes: Axes, axis: Axis) -> tuple[Array, Array, Array]:
    """The leaf in at least float32, its norms, and its directions (zero for a zero vector).

    Scaled by the largest magnitude against over- and underflow, so that values and derivatives
    are finite at zero and at 1e+-30.
    """
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise LeafError(f"{axes.path} is {leaf.dtype}: a norm needs a floating dtype")
    w = jnp.asarray(leaf)
    w = w.astype(jnp.promote_types(w.dtype, jnp.float32))
    over = _over(axes, axis)
    big = jax.lax.stop_gradient(jnp.max(jnp.abs(w), axis=over, keepdims=True, initial=0))
    scale = jnp.where((big > 0) & jnp.isfinite(big), big, 1)
    scaled = w / scale
    squares = jnp.sum(scaled**2, axis=over, keepdims=True)
    nonzero = squares != 0  # a NaN stays one, and shows
    length = jnp.sqrt(jnp.where(nonzero, squares, 1))
    return w, jnp.where(nonzero, scale * length, 0), jnp.where(nonzero, scaled / length, 0)


def _non_negative(leaf: Any, axes: Axes) -> Array:
    return jnp.maximum(jnp.asarray(leaf), jnp.zeros((), leaf.dtype))


def _max_norm(leaf: Any, axes: Axes, max_value: Any, axis: Axis) -> Array:
    w, norm, direction = _polar(leaf, axes, axis)
    return jnp.where(norm <= max_value, w, direction * max_value).astype(leaf.dtype)


def _unit_norm(leaf: Any, axes: Axes, axis: Axis) -> Array:
    _, _, direction = _polar(leaf, axes, axis)
    return direction.astype(leaf.dtype)


def _min_max_norm(
    leaf: Any, axes: Axes, min_value: Any, max_value: Any, rate: Any, axis: Axis
) -> Array:
    w, norm, direction = _polar(leaf, axes, axis)
    target = rate * jnp.clip(norm, min_value, max_value) + (1 - rate) * norm
    inside = (norm >= min_value) & (norm <= max_value)
    return jnp.where(inside, w, direction * target).astype(leaf.dtype)


@noun
def non_negative() -> Bound:
    """The set of weights >= 0: each negative weight becomes 0.

    A projection: argmin of ``|v - w|`` over v >= 0, unique. Any shape and real dtype.
    Source: Keras ``NonNeg``.

    Example:
        >>> non_negative()(jnp.array([-1.0, 2.0])).tolist()
        [0.0, 2.0]
    """
    return _bound(_non_negative, "projection", True)


@noun
def max_norm(max_value: Any = 2.0, axis: Axis = None) -> Bound:
    """The weights of each output unit have an L2 norm of at most ``max_value``.

    A projection: argmin of ``|v - w|`` over the ball of each unit, unique; inside the ball the
    identity. Source: Srebro and Shraibman, 2005; Keras ``MaxNorm``, which also shrinks by 1e-7
    inside the ball and sums over axis 0 unless told otherwise.

    Args:
        max_value: the radius, may be traced.
        axis: the axes to sum over; None is every axis but the output's.

    Example:
        >>> print(max_norm(1.0)(jnp.array([[3.0, 0.1], [4.0, 0.2]]), "in out"))
        [[0.6 0.1]
         [0.8 0.2]]
    """
    _check("max_value", max_value, 0)
    return _bound(_max_norm, "projection", True, max_value=max_value, axis=axis)


@noun
def unit_norm(axis: Axis = None) -> Bound:
    """The weights of each output unit have an L2 norm of 1.

    A projection onto the sphere of each unit; a zero vector, whose nearest point is not unique,
    stays zero. Source: Keras ``UnitNorm``.

    Args:
        axis: the axes to sum over; None is every axis but the output's.

    Example:
        >>> unit_norm()(jnp.array([[3.0], [4.0]]), "in out").tolist()
        [[0.6000000238418579], [0.800000011920929]]
    """
    return _bound(_unit_norm, "projection", True, axis=axis)


@noun
def min_max_norm(
    min_value: Any = 0.0, max_value: Any = 1.0, rate: Any = 1.0, axis: Axis = None
) -> Bound:
    """The weights of each output unit have an L2 norm between ``min_value`` and ``max_value``.

    With ``rate=1`` a projection; a zero vector stays zero. With a smaller rate only that share of
    the way is gone, a normalisation. Source: Keras ``MinMaxNorm``.

    Args:
        min_value: the smallest norm.
        max_value: the largest norm.
        rate: the share of the way, 0 to 1.
        axis: the axes to sum over; None is every axis but the output's.

    Example:
        >>> print(min_max_norm(1.0, 2.0)(jnp.array([[0.3], [0.4]]), "in out"))
        [[0.6]
         [0.8]]
    """
    _check("min_value", min_value, 0)
    _check("max_value", max_value, 0)
    _check("rate", rate, 0, 1)
    if isinstance(min_value, int | float) and isinstance(max_value, int | float):
        _check("max_value", max_value, min_value)
    kind = "projection" if isinstance(rate, int | float) and rate == 1 else "normalisation"
    return _bound(
        _min_max_norm,
        kind,
        True,
        min_value=min_value,
        max_value=max_value,
        rate=rate,
        axis=axis,
    )
