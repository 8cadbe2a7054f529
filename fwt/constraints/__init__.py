"""Constraints: ``(leaf, axes) -> leaf``, each with what it declares itself to be.

A *projection* gives the nearest point of the set (the argmin of ``|v - w|`` over its v), a
*retraction* some point of it, a *normalisation* has no exact set. Inside the set each is the
identity, up to rounding; first derivatives are finite everywhere (in half precision, up to what
the dtype can hold); shape and dtype stay. Half precision and 8-bit floats are computed in float32
and rounded, so that they keep what is promised as well as the dtype can say it. A NaN is never
hidden: it stays, and so does what depends on it. Any shape is taken unless said; the cost is
a few passes over the leaf unless said. Numbers are checked at once, traced settings can't be.

**Vectors.** A set of vectors holds for each output unit by itself: the sums go over every axis but
the output's. ``axis="all"`` takes the whole leaf as one vector, numbers are axes as in Keras.
Of a stack of layers, each slice is a leaf of its own, but for numbers, which count the axes of all.
**Matrices.** A leaf is a matrix whose columns are its output units and whose rows are the rest.

With ``fwt.project(..., masks=)`` the result is the nearest point within the support, or it is
refused: ``constraint.keeps_zeros`` says which.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from fwt._types import FwtError, noun
from fwt.constraints import _vectors
from fwt.constraints._bound import Bound as Bound
from fwt.constraints._bound import Kind, bound, check, whole
from fwt.constraints._matrices import (
    doubly_stochastic,
    low_rank,
    orthogonal,
    positive_semidefinite,
    spectral_ball,
    symmetric,
)
from fwt.constraints._vectors import Axis

__all__ = [
    "box",
    "doubly_stochastic",
    "halfspace",
    "hypercube",
    "hyperplane",
    "k_sparse",
    "l1_ball",
    "l1_sphere",
    "l2_ball",
    "l2_sphere",
    "linf_ball",
    "linf_sphere",
    "low_rank",
    "max_norm",
    "min_max_norm",
    "non_negative",
    "orthogonal",
    "positive_semidefinite",
    "quantized",
    "radial",
    "simplex",
    "spectral_ball",
    "symmetric",
    "unit_norm",
    "weight_standardization",
    "zero_mean",
]

# -- Keras's ----------------------------------------------------------------------------------


@noun
def non_negative() -> Bound:
    """The weights are >= 0: each negative one becomes 0.

    A projection: argmin of ``|v - w|`` over v >= 0, unique. Any shape and real dtype.
    Source: Keras ``NonNeg``, optax ``projection_non_negative``.

    Example:
        >>> non_negative()(jax.numpy.array([-1.0, 2.0])).tolist()
        [0.0, 2.0]
    """
    return bound(_vectors.non_negative, "projection", "plain")


@noun
def max_norm(max_value: Any = 2.0, axis: Axis = None) -> Bound:
    """The weights of each output unit have an L2 norm of at most ``max_value``.

    A projection: argmin of ``|v - w|`` over the ball of each unit, unique; inside the ball the
    identity. Source: Srebro and Shraibman, 2005; Keras ``MaxNorm``, which also shrinks by 1e-7
    inside the ball and sums over axis 0 unless told otherwise: over the height of an image's
    kernel, where ``keras.constraints.MaxNorm(axis=[0, 1, 2])`` bounds what this does.

    Args:
        max_value: the radius, may be traced.
        axis: the axes of one vector; None is every axis but the output's.

    Example:
        >>> print(max_norm(1.0)(jax.numpy.array([[3.0, 0.1], [4.0, 0.2]]), "in out"))
        [[0.6 0.1]
         [0.8 0.2]]
    """
    check("max_value", max_value, 0)
    return bound(_vectors.max_norm, "projection", "plain", max_value=max_value, axis=axis)


@noun
def unit_norm(axis: Axis = None) -> Bound:
    """The weights of each output unit have an L2 norm of 1.

    A projection onto the sphere of each unit; a zero vector, whose nearest point is not unique,
    stays zero, as in Keras (:func:`l2_sphere` moves it). Source: Keras ``UnitNorm``.

    Args:
        axis: the axes of one vector; None is every axis but the output's.

    Example:
        >>> unit_norm()(jax.numpy.array([[3.0], [4.0]]), "in out").tolist()
        [[0.6000000238418579], [0.800000011920929]]
    """
    return bound(_vectors.unit_norm, "projection", "plain", axis=axis)


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
        axis: the axes of one vector; None is every axis but the output's.

    Example:
        >>> print(min_max_norm(1.0, 2.0)(jax.numpy.array([[0.3], [0.4]]), "in out"))
        [[0.6]
         [0.8]]
    """
    check("min_value", min_value, 0)
    check("max_value", max_value, 0)
    check("rate", rate, 0, 1)
    if isinstance(min_value, int | float) and isinstance(max_value, int | float):
        check("max_value", max_value, min_value)
    kind: Kind = "projection" if isinstance(rate, int | float) and rate == 1 else "normalisation"
    settings = {"min_value": min_value, "max_value": max_value, "rate": rate, "axis": axis}
    return bound(_vectors.min_max_norm, kind, "plain", **settings)


@noun
def radial() -> Bound:
    """The weights of a window are equal at equal distance from its centre, in square rings.

    A projection: the mean of each ring, unique. For the kernels of convolutions; the distance is
    the largest one along any axis. Source: the set is that of ``RadialConstraint`` in Keras 2,
    which copies one weight of a ring instead, and counts the rings from another weight.

    Example:
        >>> w = jax.numpy.arange(9.0).reshape(3, 3, 1, 1) + jax.numpy.eye(3).reshape(3, 3, 1, 1)
        >>> radial()(w, "h w in out")[:, :, 0, 0].tolist()
        [[4.25, 4.25, 4.25], [4.25, 5.0, 4.25], [4.25, 4.25, 4.25]]
    """
    return bound(_vectors.radial, "projection", None)


# -- sets of vectors --------------------------------------------------------------------------


def box(lower: Any, upper: Any) -> Bound:
    """Each weight is between ``lower`` and ``upper``.

    A projection, unique, bit for bit the identity inside. Any shape; one pass.
    Source: optax ``projection_box``.

    Args:
        lower: a number, or an array that broadcasts to the leaf; may be traced.
        upper: the same, not below ``lower``.

    Example:
        >>> box(-1.0, 0.5)(jax.numpy.array([-3.0, 0.25, 2.0])).tolist()
        [-1.0, 0.25, 0.5]
    """
    check("lower", lower, float("-inf"), arrays=True)
    check("upper", upper, float("-inf"), arrays=True)
    plain = not any(isinstance(x, jax.Array | np.ndarray) for x in (lower, upper))
    if plain and lower > upper:
        raise FwtError(f"upper must be at least lower={lower:g}, found {upper:g}")
    holds_zero = plain and lower <= 0 <= upper
    return bound(
        _vectors.box, "projection", "plain" if holds_zero else None, lower=lower, upper=upper
    )


@noun
def hypercube(scale: Any = 1.0) -> Bound:
    """Each weight is between 0 and ``scale``.

    A projection, unique, bit for bit the identity inside. Source: optax ``projection_hypercube``.

    Args:
        scale: the side, may be traced.

    Example:
        >>> hypercube()(jax.numpy.array([-3.0, 0.25, 2.0])).tolist()
        [0.0, 0.25, 1.0]
    """
    check("scale", scale, 0, arrays=True)
    made = bound(_vectors.box, "projection", "plain", lower=0.0, upper=scale)
    return dataclasses.replace(made, name="hypercube")


@noun
def linf_ball(scale: Any = 1.0) -> Bound:
    """Each weight is at most ``scale`` in magnitude.

    A projection, unique, bit for bit the identity inside. Source: optax ``projection_linf_ball``.

    Args:
        scale: the radius, may be traced.

    Example:
        >>> linf_ball(0.5)(jax.numpy.array([-3.0, 0.25, 2.0])).tolist()
        [-0.5, 0.25, 0.5]
    """
    check("scale", scale, 0, arrays=True)
    made = bound(_vectors.box, "projection", "plain", lower=-scale, upper=scale)
    return dataclasses.replace(made, name="linf_ball")


@noun
def linf_sphere(scale: Any = 1.0, axis: Axis = None) -> Bound:
    """The largest magnitude of each unit is ``scale``.

    A projection: outside each weight is clipped, inside the largest one is moved out; of several
    the first, upwards if it is 0. Source: none known to us; clipping and one argmax.

    Args:
        scale: the radius, may be traced.
        axis: the axes of one vector; None is every axis but the output's, "all" the leaf.

    Example:
        >>> linf_sphere()(jax.numpy.array([[-0.5, 0.25], [3.0, 0.1]]), "out in").tolist()
        [[-1.0, 0.25], [1.0, 0.10000000149011612]]
    """
    check("scale", scale, 0)
    return bound(_vectors.linf_sphere, "projection", "mask", scale=scale, axis=axis)


@noun
def l2_ball(scale: Any = 1.0, axis: Axis = None) -> Bound:
    """Each unit has an L2 norm of at most ``scale``: :func:`max_norm` under optax's name.

    A projection, unique; inside the ball the identity. Linear cost.
    Source: optax ``projection_l2_ball``.

    Args:
        scale: the radius, may be traced.
        axis: the axes of one vector; None is every axis but the output's, "all" the leaf.

    Example:
        >>> l2_ball(2.5, axis="all")(jax.numpy.array([3.0, 4.0])).tolist()
        [1.5, 2.0]
    """
    check("scale", scale, 0)
    made = bound(_vectors.max_norm, "projection", "plain", max_value=scale, axis=axis)
    return dataclasses.replace(made, name="l2_ball")


@noun
def l2_sphere(scale: Any = 1.0, axis: Axis = None) -> Bound:
    """Each unit has an L2 norm of ``scale``.

    A projection; a zero vector, to which all points are equally near, goes to the one whose
    weights are equal and positive. Linear cost. Source: optax ``projection_l2_sphere``.

    Args:
        scale: the radius, may be traced.
        axis: the axes of one vector; None is every axis but the output's, "all" the leaf.

    Example:
        >>> l2_sphere(2.5, axis="all")(jax.numpy.array([3.0, 4.0])).tolist()
        [1.5, 2.0]
    """
    check("scale", scale, 0)
    return bound(_vectors.l2_sphere, "projection", "mask", scale=scale, axis=axis)


@noun
def l1_ball(scale: Any = 1.0, axis: Axis = None) -> Bound:
    """The magnitudes of each unit sum to at most ``scale``.

    A projection, unique; inside the ball the identity. What is zero is so on any mesh of devices.
    Source: Duchi et al., 2008; optax ``projection_l1_ball``.

    Args:
        scale: the radius, may be traced.
        axis: the axes of one vector; None is every axis but the output's, "all" the leaf.

    Example:
        >>> l1_ball(axis="all")(jax.numpy.array([3.0, -2.5])).tolist()
        [0.75, -0.25]
    """
    check("scale", scale, 0)
    return bound(_vectors.l1_ball, "projection", "mask", scale=scale, axis=axis)


@noun
def l1_sphere(scale: Any = 1.0, axis: Axis = None) -> Bound:
    """The magnitudes of each unit sum to ``scale``.

    A projection; a zero, which may go either way, goes upwards. What the projection makes zero
    is so on any mesh of devices.
    Source: Duchi et al., 2008; optax ``projection_l1_sphere``, which keeps zeros and so misses
    the sphere from inside.

    Args:
        scale: the radius, may be traced.
        axis: the axes of one vector; None is every axis but the output's, "all" the leaf.

    Example:
        >>> l1_sphere(axis="all")(jax.numpy.array([0.0, -0.5])).tolist()
        [0.25, -0.75]
    """
    check("scale", scale, 0)
    return bound(_vectors.l1_sphere, "projection", "mask", scale=scale, axis=axis)


@noun
def simplex(scale: Any = 1.0, axis: Axis = None) -> Bound:
    """The weights of each unit are >= 0 and sum to ``scale``.

    A projection, unique; what is zero is so on any mesh of devices. Under masks, a unit without a
    kept weight is zero. Source: Michelot, 1986; Duchi et al., 2008; optax ``projection_simplex``.

    Args:
        scale: the sum, may be traced.
        axis: the axes of one vector; None is every axis but the output's, "all" the leaf.

    Example:
        >>> simplex(axis="all")(jax.numpy.array([3.0, 2.5, -1.0])).tolist()
        [0.75, 0.25, 0.0]
    """
    check("scale", scale, 0)
    return bound(_vectors.simplex, "projection", "mask", scale=scale, axis=axis)


@noun
def hyperplane(normal: Any = 1.0, offset: Any = 0.0, axis: Axis = None) -> Bound:
    """The weights v of each unit have ``<normal, v> = offset``.

    A projection, unique. A unit whose normal is zero has no plane and stays. Linear cost.
    Source: optax ``projection_hyperplane``.

    Args:
        normal: a number, or an array that broadcasts to the leaf, such as one of shape (in, 1).
        offset: a number, may be traced.
        axis: the axes of one vector; None is every axis but the output's, "all" the leaf.

    Example:
        >>> hyperplane(1.0, 4.0, axis="all")(jax.numpy.array([1.0, 2.0])).tolist()
        [1.5, 2.5]
    """
    check("normal", normal, float("-inf"), arrays=True)
    check("offset", offset, float("-inf"), arrays=True)
    return bound(_vectors.hyperplane, "projection", "mask", normal=normal, offset=offset, axis=axis)


@noun
def halfspace(normal: Any = 1.0, offset: Any = 0.0, axis: Axis = None) -> Bound:
    """The weights v of each unit have ``<normal, v> <= offset``.

    A projection, unique; inside the identity. A unit whose normal is zero stays. Linear cost.
    Source: optax ``projection_halfspace``.

    Args:
        normal: a number, or an array that broadcasts to the leaf, such as one of shape (in, 1).
        offset: a number, may be traced.
        axis: the axes of one vector; None is every axis but the output's, "all" the leaf.

    Example:
        >>> halfspace(1.0, 2.0, axis="all")(jax.numpy.array([1.0, 2.0])).tolist()
        [0.5, 1.5]
    """
    check("normal", normal, float("-inf"), arrays=True)
    check("offset", offset, float("-inf"), arrays=True)
    return bound(_vectors.halfspace, "projection", "mask", normal=normal, offset=offset, axis=axis)


@noun
def zero_mean(axis: Axis = None) -> Bound:
    """The weights of each unit have mean 0.

    A projection, unique: the mean is taken off. Linear cost. It would refill pruned weights, so
    masks are refused; :func:`hyperplane` with its defaults is the same set and keeps to a
    support. Source: Yong et al., 2020, who take this set for gradients.

    Args:
        axis: the axes of one vector; None is every axis but the output's, "all" the leaf.

    Example:
        >>> zero_mean(axis="all")(jax.numpy.array([1.0, 3.0])).tolist()
        [-1.0, 1.0]
    """
    return bound(_vectors.zero_mean, "projection", None, axis=axis)


@noun
def weight_standardization(epsilon: Any = 0.0, axis: Axis = None) -> Bound:
    """The weights of each unit have mean 0 and variance 1.

    A projection with ``epsilon=0``; a constant unit, whose nearest point is not unique, becomes
    zero. With an ``epsilon``, which the paper adds to the standard deviation, a normalisation.
    Linear cost. Source: Qiao et al., 2019 (epsilon=1e-5).

    Args:
        epsilon: added to the standard deviation, which is that of the population.
        axis: the axes of one vector; None is every axis but the output's, "all" the leaf.

    Example:
        >>> weight_standardization(axis="all")(jax.numpy.array([1.0, 3.0, 1.0, 3.0])).tolist()
        [-1.0, 1.0, -1.0, 1.0]
    """
    check("epsilon", epsilon, 0)
    exact = isinstance(epsilon, int | float) and epsilon == 0
    kind: Kind = "projection" if exact else "normalisation"
    return bound(_vectors.weight_standardization, kind, None, epsilon=epsilon, axis=axis)


def k_sparse(k: Any, axis: Axis = None) -> Bound:
    """Each unit has at most ``k`` weights that are not zero.

    A projection: the k largest magnitudes stay, of equal ones the first; a NaN counts as the
    largest. No sort, but a counting pass for each bit; the derivative is that of the weights
    that stay.
    Source: iterative hard thresholding (Blumensath and Davies, 2009).

    Args:
        k: how many, may be traced.
        axis: the axes of one vector; None is every axis but the output's, "all" the leaf.

    Example:
        >>> k_sparse(2, axis="all")(jax.numpy.array([1.0, -3.0, 2.0])).tolist()
        [0.0, -3.0, 2.0]
    """
    if not isinstance(k, jax.Array):
        whole("k", k, 0)
    return bound(_vectors.k_sparse, "projection", "plain", k=k, axis=axis)


@noun
def quantized(
    bits: int = 8,
    symmetric: bool = True,
    scale: Any = None,
    zero_point: int | None = None,
    axis: Axis = "all",
) -> Bound:
    """The weights are whole multiples of one step, as ``bits``-bit integers would hold them.

    Symmetric levels go from ``-(2**(bits-1) - 1)`` to its opposite, affine ones are 2**bits
    around a zero point; 0 is always a level. With a ``scale`` a projection onto the grid (half
    way goes up), bit for bit. Without one a retraction: the step is the least that holds the
    largest weight (symmetric) or the range with 0 in it (affine). Linear cost. The derivative is
    0: train through it with :func:`fwt.straight_through`. Source: Jacob et al., 2018.

    Args:
        bits: 2 to 16 (1 for affine).
        symmetric: whether the levels are symmetric about 0.
        scale: the step; None takes it from the weights.
        zero_point: with a scale and affine levels, how many levels are below 0.
        axis: what has one step: "all" is the leaf (per tensor), None each output unit
            (per channel).

    Example:
        >>> quantized(2, axis="all")(jax.numpy.array([-3.0, 1.0, 2.0])).tolist()
        [-3.0, 0.0, 3.0]
        >>> quantized(2, symmetric=False)(jax.numpy.array([-1.0, 0.4, 2.0])).tolist()
        [-1.0, 0.0, 2.0]
    """
    whole("bits", bits, 2 if symmetric else 1, 16)
    if scale is not None:
        check("scale", scale, float(np.finfo(np.float32).tiny), arrays=True)
    affine_grid = scale is not None and not symmetric
    if affine_grid != (zero_point is not None):
        raise FwtError("zero_point goes with a scale and symmetric=False, and they with it")
    if zero_point is not None:
        whole("zero_point", zero_point, 0, 2**bits - 1)
    kind: Kind = "projection" if scale is not None else "retraction"
    settings = {"symmetric": symmetric, "scale": scale, "zero_point": zero_point, "axis": axis}
    return bound(_vectors.quantized, kind, "plain", bits=bits, **settings)
