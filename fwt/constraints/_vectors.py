"""The mathematics of the sets of vectors: what :mod:`fwt.constraints` names and documents.

Everything is computed in at least float32 and comes back in the leaf's dtype. Each function takes
``(leaf, axes, **settings)``, and ``mask=`` where the nearest point within a support differs from
that of the masked leaf.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fwt import _mesh, _tree
from fwt._axes import Axes
from fwt._types import Array, AxesError, LeafError
from fwt.selection import keys, select

Axis = int | Sequence[int] | Literal["all"] | None


def wide(leaf: Any, path: str) -> Array:
    """The leaf in at least float32."""
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise LeafError(f"{path} is {leaf.dtype}: this constraint needs a floating dtype")
    w = jnp.asarray(leaf)
    return w.astype(_tree.wide_dtype(w.dtype))


def over(axes: Axes, axis: Axis) -> tuple[int, ...]:
    """The axes of one vector: None is every axis but the output's, "all" the whole leaf."""
    rank = len(axes.shape)
    if axis is None:
        return axes.reduced
    if isinstance(axis, str):
        return axes.all
    listed = (axis,) if isinstance(axis, int) else tuple(axis)
    if any(not -rank <= a < rank for a in listed):
        said = listed[0] if len(listed) == 1 else listed
        raise AxesError(
            f"{axes.path} has shape {axes.shape}, so axis={said} is not one of its axes"
        )
    dims = tuple(sorted({a % rank for a in listed}))
    mixed = [i for i in dims if i in axes.stack]
    if mixed:  # a leaf whose axes are not numbered comes here as one slice
        raise AxesError(
            f"{axes.path} of shape {axes.shape} is a stack of layers along axis {mixed[0]}, which "
            f"axis={axis} would mix: number the axes of each layer alone, from the end, such as "
            "axis=-2, or leave axis out; if it is no stack, say what its axes are with axes="
        )
    return dims


def check_fits(axes: Axes, name: str, shape: tuple[int, ...]) -> None:
    """A setting must broadcast to the leaf."""
    pairs = zip(shape[::-1], axes.shape[::-1], strict=False)
    if len(shape) > len(axes.shape) or any(n not in (1, m) for n, m in pairs):
        raise LeafError(
            f"{axes.path} of shape {axes.shape}: {name} of shape {shape} does not broadcast to "
            "it; give one number, or one for each weight of a unit, such as shape (in, 1)"
        )


def power_of_two(big: Array) -> Array:
    """The power of two at or below each magnitude, 1 for none: a scale that rounds nothing."""
    usable = (big > 0) & jnp.isfinite(big)
    info = jnp.finfo(big.dtype)
    # Within what its inverse can hold too.
    held = jnp.clip(big, 2.0 ** (info.minexp + 1), 2.0 ** (info.maxexp - 2))
    # What is left without the fraction.
    bits = lax.bitcast_convert_type(held, f"uint{info.bits}")
    bits &= np.array(-1 << info.nmant).astype(bits.dtype)
    power = lax.bitcast_convert_type(bits, big.dtype)
    return lax.stop_gradient(jnp.where(usable, power, 1))


def _largest(w: Array, dims: tuple[int, ...]) -> Array:
    """The largest magnitude; beside a NaN it may be that of another (XLA on CPUs, seen)."""
    return lax.stop_gradient(jnp.max(jnp.abs(w), axis=dims, keepdims=True, initial=0))


def polar(leaf: Any, axes: Axes, axis: Axis) -> tuple[Array, Array, Array]:
    """The leaf in at least float32, its norms, and its directions (zero for a zero vector).

    Scaled by the largest magnitude against over- and underflow, so that values and derivatives
    are finite at zero and at 1e+-30.
    """
    w = wide(leaf, axes.path)
    dims = over(axes, axis)
    scale = power_of_two(_largest(w, dims))
    scaled = w / scale
    squares = jnp.sum(scaled**2, axis=dims, keepdims=True)
    nonzero = squares != 0  # a NaN stays one, and shows
    length = jnp.sqrt(jnp.where(nonzero, squares, 1))
    norm = jnp.minimum(scale * length, jnp.finfo(w.dtype).max)  # an infinite one makes 0 * inf
    return w, jnp.where(nonzero, norm, 0), jnp.where(nonzero, scaled / length, 0)


def _at_length(leaf: Any, axes: Axes, axis: Axis, wanted: Callable[[Any], Any]) -> Any:
    """Each vector as it is, or at a length: ``wanted(norm)`` says both.

    An array of NumPy, of at most 32 bits, is computed there, in float64.
    """
    if not isinstance(leaf, np.ndarray):
        w, norm, direction = polar(leaf, axes, axis)
        stays, length = wanted(norm)
        return jnp.where(stays, w, direction * length).astype(leaf.dtype)
    x, least = leaf.astype(np.float64), np.finfo(np.float32).tiny
    x[np.abs(x) < least] = 0  # as XLA takes subnormal numbers
    size = np.sqrt(np.sum(x * x, axis=over(axes, axis), keepdims=True))
    stays, length = wanted(np.minimum(size, np.finfo(np.float32).max).astype(np.float32))
    x *= length / np.where(size == 0, 1, size)
    x[np.abs(x) < least] = 0
    return np.where(stays, leaf, x.astype(leaf.dtype))


def max_norm(leaf: Any, axes: Axes, max_value: Any, axis: Axis) -> Any:
    return _at_length(leaf, axes, axis, lambda norm: (norm <= max_value, max_value))


def unit_norm(leaf: Any, axes: Axes, axis: Axis) -> Any:
    return _at_length(leaf, axes, axis, lambda norm: (False, 1))


def min_max_norm(
    leaf: Any, axes: Axes, min_value: Any, max_value: Any, rate: Any, axis: Axis
) -> Any:
    def wanted(norm: Any) -> tuple[Any, Any]:
        clipped = (np if isinstance(norm, np.ndarray) else jnp).clip(norm, min_value, max_value)
        inside = (norm >= min_value) & (norm <= max_value)
        return inside, rate * clipped + (1 - rate) * norm

    return _at_length(leaf, axes, axis, wanted)


# -- elementwise sets -------------------------------------------------------------------------


def non_negative(leaf: Any, axes: Axes) -> Array:
    w = jnp.asarray(leaf)
    if jnp.issubdtype(w.dtype, jnp.complexfloating):
        raise LeafError(f"{axes.path} is {w.dtype}: complex numbers have no order")
    return jnp.maximum(w, jnp.zeros((), w.dtype))


def box(leaf: Any, axes: Axes, lower: Any, upper: Any) -> Array:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise LeafError(f"{axes.path} is {leaf.dtype}: this constraint needs a floating dtype")
    bounds = [jnp.asarray(b, leaf.dtype) for b in (lower, upper)]
    for name, b in zip(("lower", "upper"), bounds, strict=True):
        check_fits(axes, name, b.shape)
    from optax.projections import projection_box  # which takes half of the time that fwt starts in

    return projection_box(jnp.asarray(leaf), *bounds)


# -- one vector a unit ------------------------------------------------------------------------


def _rows(
    function: Callable[..., Array], leaf: Any, axes: Axes, axis: Axis, mask: Any, *others: Any
) -> Array:
    """``function(row, mask, *others)`` on each vector of the leaf, over its last axis."""
    w = wide(leaf, axes.path)
    dims = over(axes, axis)
    order = (*(i for i in axes.all if i not in dims), *dims)
    cut = len(order) - len(dims)

    def rows(x: Any) -> Array:
        turned = jnp.broadcast_to(x, w.shape).transpose(order)
        return turned.reshape(math.prod(turned.shape[:cut]), math.prod(turned.shape[cut:]))

    # Of w, so that it has its sharding.
    kept = jnp.ones_like(w, bool) if mask is None else mask
    given = [rows(x) for x in (w, kept, *others)]
    new = given[0] if 0 in w.shape else jax.vmap(function)(*given)
    sizes = tuple(w.shape[i] for i in order)
    back = tuple(order.index(i) for i in axes.all)
    return new.reshape(sizes).transpose(back).astype(leaf.dtype)


def _sum(row: Array) -> Array:
    """The sum of a vector, in an order that does not depend on how it is spread over devices: of a
    ``jnp.sum`` XLA adds up each shard first, and what is left decides what is exactly zero."""
    while row.size > 1:
        ways = min(row.size, 16)
        parts = jnp.pad(row, (0, -row.size % ways)).reshape(ways, -1)
        row = functools.reduce(jnp.add, list(parts))
    return row[0]


def _support(row: Array) -> Array:
    """Where the projection of a vector, 0 at its largest, on the unit simplex is not 0: what is
    below the threshold that all others have is left out, until nothing is (Michelot, 1986)."""

    def above(found: tuple[Array, Array]) -> tuple[Array, Array]:
        active, many = found
        new = active & (row > (_sum(jnp.where(active, row, 0)) - 1) / many.astype(row.dtype))
        return new, jnp.maximum(jnp.sum(new), 1)

    def changes(found: Any) -> Array:
        (_, before), (_, after) = found
        return before != after

    first = row > -1
    start = first, jnp.maximum(jnp.sum(first), 1)
    body, start = _mesh.carried(lambda found: (found[1], above(found[1])), (start, above(start)))
    return lax.while_loop(changes, body, start)[1][0]


def _simplex(row: Array, kept: Array, scale: Any) -> Array:
    """Held against over- and cancellation: the projection does not see a common shift, and what
    is more than ``scale`` below the largest is 0 in any case."""
    scale = jnp.asarray(scale, row.dtype)
    top = lax.stop_gradient(jnp.max(jnp.where(kept, row, -jnp.inf), initial=-jnp.inf))
    top = jnp.where(jnp.any(kept), top, 0)
    positive = jnp.where(scale > 0, scale, 1)
    shifted = jnp.where(kept, jnp.maximum((row - top) / positive, -1), -1)
    support = _support(lax.stop_gradient(shifted))
    many = jnp.maximum(jnp.sum(support), 1).astype(row.dtype)
    unit = jnp.where(support, shifted - (_sum(jnp.where(support, shifted, 0)) - 1) / many, 0)
    # One correction of the sum.
    rest = lax.stop_gradient((1 - _sum(unit)) / many)
    nothing = jnp.where(jnp.isnan(shifted), shifted, 0)  # a NaN shows
    unit = jnp.where(support, jnp.maximum(unit + rest, 0), nothing)
    return jnp.where(kept, unit * scale, 0)


def simplex(leaf: Any, axes: Axes, scale: Any, axis: Axis, mask: Any = None) -> Array:
    return _rows(lambda row, kept: _simplex(row, kept, scale), leaf, axes, axis, mask)


def _signs(row: Array) -> Array:
    """+1 for zeros, so that a sphere has a point for each."""
    return jnp.where(row < 0, jnp.ones((), row.dtype) * -1, 1)


def l1_sphere(leaf: Any, axes: Axes, scale: Any, axis: Axis, mask: Any = None) -> Array:
    def project(row: Array, kept: Array) -> Array:
        signs = _signs(row)
        return signs * _simplex(signs * row, kept, scale)

    return _rows(project, leaf, axes, axis, mask)


def l1_ball(leaf: Any, axes: Axes, scale: Any, axis: Axis, mask: Any = None) -> Array:
    def project(row: Array, kept: Array) -> Array:
        signs = _signs(row)
        unit = power_of_two(_largest(row, (0,))[0])
        inside = _sum(jnp.abs(row / unit)) <= scale / unit
        return jnp.where(inside, row, signs * _simplex(signs * row, kept, scale))

    return _rows(project, leaf, axes, axis, mask)


def l2_sphere(leaf: Any, axes: Axes, scale: Any, axis: Axis, mask: Any = None) -> Array:
    _, norm, direction = polar(leaf, axes, axis)
    dims = over(axes, axis)
    kept = jnp.broadcast_to(True if mask is None else mask, direction.shape)
    many = jnp.sum(kept, axis=dims, keepdims=True, dtype=direction.dtype)
    anywhere = jnp.where(kept, 1 / jnp.sqrt(jnp.maximum(many, 1)), 0)
    return (jnp.where(norm == 0, anywhere, direction) * scale).astype(leaf.dtype)


def linf_sphere(leaf: Any, axes: Axes, scale: Any, axis: Axis, mask: Any = None) -> Array:
    def project(row: Array, kept: Array) -> Array:
        s = jnp.asarray(scale, row.dtype)
        size = jnp.where(kept, jnp.abs(row), -1)
        first = jnp.arange(row.size) == jnp.argmax(size)
        moved = first & kept & (jnp.max(size, initial=-1) < s)
        return jnp.where(moved, _signs(row) * s, jnp.clip(row, -s, s))

    return _rows(project, leaf, axes, axis, mask)


def hyperplane(
    leaf: Any, axes: Axes, normal: Any, offset: Any, axis: Axis, mask: Any = None
) -> Array:
    return _to_plane(leaf, axes, normal, offset, axis, mask, lambda excess: excess)


def halfspace(
    leaf: Any, axes: Axes, normal: Any, offset: Any, axis: Axis, mask: Any = None
) -> Array:
    return _to_plane(leaf, axes, normal, offset, axis, mask, lambda excess: jnp.maximum(excess, 0))


def _to_plane(
    leaf: Any, axes: Axes, normal: Any, offset: Any, axis: Axis, mask: Any, part: Any
) -> Array:
    """Along the normal by a part of what ``<normal, w>`` exceeds the offset by.

    Without rows, which optax.projections would need: that is 5 times slower.
    """
    w = wide(leaf, axes.path)
    dims = over(axes, axis)
    a = jnp.asarray(normal, w.dtype)
    check_fits(axes, "normal", a.shape)
    a = a.reshape((1,) * (w.ndim - a.ndim) + a.shape)
    a = a if mask is None else jnp.where(mask, a, 0)
    size = jnp.max(jnp.abs(a), axis=dims, keepdims=True, initial=0)
    somewhere = size > 0  # no normal, no plane
    size = jnp.where(somewhere, size, 1)
    a, b = a / size, jnp.asarray(offset, w.dtype) / size
    # The power of two keeps the sums in range; the second step corrects what the first rounded.
    unit = power_of_two(jnp.maximum(_largest(w, dims), lax.stop_gradient(jnp.abs(b))))
    new, b = w / unit, b / unit
    # The normal is not broadcast: XLA would fold that constant of the leaf's size.
    repeats = math.prod(w.shape[i] for i in dims if a.shape[i] == 1)
    squares = jnp.where(somewhere, jnp.sum(a * a, axis=dims, keepdims=True) * repeats, 1)
    for _ in range(2):
        excess = jnp.sum(a * new, axis=dims, keepdims=True) - b
        new = new - part(excess) / squares * a
    return jnp.where(somewhere, new * unit, w).astype(leaf.dtype)


# -- means ------------------------------------------------------------------------------------


def _centred(w: Array, dims: tuple[int, ...]) -> tuple[Array, Array]:
    """Without their mean, over a power of two; and that power."""
    scale = power_of_two(_largest(w, dims))
    scaled = w / scale
    for _ in range(2):
        scaled = scaled - jnp.mean(scaled, axis=dims, keepdims=True)
    return scaled, scale


def zero_mean(leaf: Any, axes: Axes, axis: Axis) -> Array:
    w = wide(leaf, axes.path)
    if w.size == 0:
        return w.astype(leaf.dtype)
    centred, scale = _centred(w, over(axes, axis))
    return (centred * scale).astype(leaf.dtype)


def weight_standardization(leaf: Any, axes: Axes, epsilon: Any, axis: Axis) -> Array:
    w = wide(leaf, axes.path)
    if w.size == 0:
        return w.astype(leaf.dtype)
    dims = over(axes, axis)
    centred, scale = _centred(w, dims)
    # What is left of a constant after rounding is no signal.
    noise = jnp.finfo(w.dtype).eps * 2
    variance = jnp.mean(centred**2, axis=dims, keepdims=True)
    flat = (_largest(centred, dims) <= noise) & ~jnp.isnan(variance)
    deviation = jnp.sqrt(jnp.where(flat, 1, variance))
    return jnp.where(flat, 0, centred / (deviation + epsilon / scale)).astype(leaf.dtype)


# -- discrete sets ----------------------------------------------------------------------------


def k_sparse(leaf: Any, axes: Axes, k: Any, axis: Axis) -> Array:
    def project(row: Array, _: Array, key: Array) -> Array:
        drop = jnp.clip(row.size - jnp.asarray(k, jnp.int32), 0, row.size).astype(jnp.uint32)
        return jnp.where(select.row_kept(key, drop), row, 0)

    wide(leaf, axes.path)  # refuses what has no magnitudes to order
    key = keys.magnitude_key(jnp.asarray(leaf))
    return _rows(project, leaf, axes, axis, None, key)


def quantized(
    leaf: Any, axes: Axes, bits: int, symmetric: bool, scale: Any, zero_point: Any, axis: Axis
) -> Array:
    w = wide(leaf, axes.path)
    if w.size == 0:
        return w.astype(leaf.dtype)
    dims = over(axes, axis)

    def nearest(x: Array) -> Array:
        return jnp.floor(x + 0.5)  # so that a whole number added before or after is the same

    levels = 2**bits - 2 if symmetric else 2**bits - 1
    bottom: Any = -jnp.inf
    top: Any = jnp.inf
    if scale is not None:
        step = jnp.asarray(scale, w.dtype)
        low = jnp.asarray(-(levels // 2) if symmetric else -zero_point, w.dtype)
    elif symmetric:
        step = _largest(w, dims) / (levels // 2)
        low = jnp.asarray(-(levels // 2), w.dtype)
    else:
        bottom = jnp.minimum(jnp.min(w, axis=dims, keepdims=True), 0)
        top = jnp.maximum(jnp.max(w, axis=dims, keepdims=True), 0)
        step = top / levels - bottom / levels
        low = nearest(bottom / jnp.where(step > 0, step, 1))
    if scale is None:  # which a largest weight may hide
        step = jnp.where(jnp.any(jnp.isnan(w), axis=dims, keepdims=True), jnp.nan, step)
    step, low = (lax.stop_gradient(x) for x in (jnp.where(step == 0, 1, step), low))
    level = jnp.clip(nearest(w / step), low, low + levels)
    # Rounding at half a step must not keep the ends of the range from the ends of the grid.
    ends = jnp.where(w >= top, low + levels, jnp.where(w <= bottom, low, level))
    level = jnp.where(jnp.asarray(top) > bottom, ends, level)
    return (level * step).astype(leaf.dtype)


# -- windows ----------------------------------------------------------------------------------


def radial(leaf: Any, axes: Axes) -> Array:
    w = wide(leaf, axes.path)
    if not axes.spatial:
        raise AxesError(
            f"{axes.path} of shape {axes.shape} has no window: radial is for the kernels of "
            "convolutions; narrow where= to them"
        )
    distance = np.zeros(())
    for i in axes.spatial:
        shape = tuple(-1 if j == i else 1 for j in axes.all)
        here = np.abs(np.arange(axes.shape[i]) - (axes.shape[i] - 1) / 2)
        distance = np.maximum(distance, here.reshape(shape))
    new = jnp.zeros_like(w)
    for ring in np.unique(distance):
        inside = jnp.broadcast_to(distance == ring, w.shape)
        mean = jnp.mean(w, axis=axes.spatial, keepdims=True, where=inside)
        new = jnp.where(inside, mean, new)
    return new.astype(leaf.dtype)


NORMS = max_norm, unit_norm, min_max_norm
# Of these, zeros behind a leaf change nothing but the rounding of a sum.
PADS = *NORMS, k_sparse
