"""The sets of matrices, and their mathematics.

A leaf is a matrix whose columns are its output units and whose rows are everything else.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fwt._axes import Axes
from fwt._types import Array, FwtError, LeafError, noun
from fwt.constraints._bound import Bound, Kind, bound, check, whole
from fwt.constraints._vectors import power_of_two, wide

_HIGHEST = lax.Precision.HIGHEST


def _matmul(*factors: Array) -> Array:
    """A product in full float32, which accelerators don't give unless asked."""
    return functools.reduce(lambda a, b: jnp.matmul(a, b, precision=_HIGHEST), factors)


def _as_matrix(leaf: Any, axes: Axes, square: str = "") -> tuple[Array, Callable[[Array], Array]]:
    """The leaf as (rest, outputs) over a power of two, and the way back."""
    w = wide(leaf, axes.path)
    plain = not axes.known and w.ndim == 2
    columns = (1,) if plain else axes.outputs
    rows = (0,) if plain else axes.reduced
    order = (*rows, *columns)
    sizes = tuple(w.shape[i] for i in order)
    flat = (math.prod(sizes[: len(rows)]), math.prod(sizes[len(rows) :]))
    if square and flat[0] != flat[1]:
        raise LeafError(
            f"{axes.path} of shape {axes.shape} is a {flat[0]} x {flat[1]} matrix, but {square} "
            "is for square ones: narrow where= to them"
        )

    def back(matrix: Array) -> Array:
        turned = matrix.reshape(sizes).transpose([order.index(i) for i in range(len(order))])
        return turned.astype(leaf.dtype)

    return w.transpose(order).reshape(flat), back


def _scale(matrix: Array) -> Array:
    return power_of_two(lax.stop_gradient(jnp.max(jnp.abs(matrix), initial=0)))


def _over(matrix: Array, c: Any) -> tuple[Array, Array, Array]:
    """The matrix and a number of its unit over a power of two, and that power."""
    scale = _scale(matrix)
    return matrix / scale, jnp.asarray(c, matrix.dtype) / scale, scale


# What a set does to the singular (or eigen-) values, largest first; c is the set's number.
def _ones(s: Array, c: Any) -> Array:
    return jnp.ones_like(s)


def _at_most(s: Array, c: Any) -> Array:
    return jnp.minimum(s, c)


def _not_negative(s: Array, c: Any) -> Array:
    return jnp.maximum(s, 0)


def _first(s: Array, c: Any) -> Array:
    return jnp.where(jnp.arange(s.size) < c, s, 0)


def _slopes(f: Any, s: Array, c: Array) -> tuple[Array, Array, Array]:
    value, by_s = jax.jvp(lambda x: f(x, c), (s,), (jnp.ones_like(s),))
    _, by_c = jax.jvp(lambda x: f(s, x), (c,), (jnp.ones_like(c),))
    return value, by_s, by_c


def _ratio(difference: Array, gap: Array, slope: Array, tiny: Array) -> Array:
    """A divided difference, and the slope where the gap is none."""
    near = jnp.abs(gap) <= tiny
    return jnp.where(near, slope, difference / jnp.where(near, 1, gap))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _on_singular_values(f: Any, a: Array, c: Array) -> Array:
    """U f(S) V^T for the singular value decomposition U S V^T of ``a``.

    The derivative of the decomposition is not finite at values that are equal or zero; that of
    the whole is, wherever it exists, by divided differences (Daleckii and Krein, 1965).
    """
    u, s, vt = jnp.linalg.svd(a, full_matrices=False)
    return _matmul(u * f(s, c), vt)


@_on_singular_values.defjvp
def _(f: Any, primals: Any, tangents: Any) -> Any:
    a, c = primals
    da, dc = tangents
    u, s, vt = jnp.linalg.svd(a, full_matrices=False)
    value, by_s, by_c = _slopes(f, s, c)
    tiny = jnp.finfo(a.dtype).eps * jnp.max(s, initial=0)
    inner = _matmul(u.T, da, vt.T)
    mean = (by_s[:, None] + by_s) / 2
    same = _ratio(value[:, None] - value, s[:, None] - s, mean, tiny)
    sums = _ratio(value[:, None] + value, s[:, None] + s, mean, tiny)
    turned = same * (inner + inner.T) / 2 + sums * (inner - inner.T) / 2
    tangent = _matmul(u, turned + jnp.diag(by_c * dc), vt)
    outer = _ratio(value, s, by_s, tiny)
    if a.shape[0] > a.shape[1]:
        rest = _matmul(da, vt.T) - _matmul(u, inner)
        tangent = tangent + _matmul(rest * outer, vt)
    if a.shape[1] > a.shape[0]:
        rest = _matmul(u.T, da) - _matmul(inner, vt)
        tangent = tangent + _matmul(u * outer, rest)
    return _matmul(u * value, vt), tangent


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _on_eigenvalues(f: Any, a: Array, c: Array) -> Array:
    """Q f(L) Q^T for the eigendecomposition of a symmetric ``a``; the derivative as above."""
    values, q = jnp.linalg.eigh(a)
    return _matmul(q * f(values, c), q.T)


@_on_eigenvalues.defjvp
def _(f: Any, primals: Any, tangents: Any) -> Any:
    a, c = primals
    values, q = jnp.linalg.eigh(a)
    value, by_s, by_c = _slopes(f, values, c)
    tiny = jnp.finfo(a.dtype).eps * jnp.max(jnp.abs(values), initial=0)
    mean = (by_s[:, None] + by_s) / 2
    same = _ratio(value[:, None] - value, values[:, None] - values, mean, tiny)
    inner = same * _matmul(q.T, tangents[0], q) + jnp.diag(by_c * tangents[1])
    return _matmul(q * value, q.T), _matmul(q, inner, q.T)


def _empty(leaf: Any) -> bool:
    return 0 in leaf.shape


def _orthogonal(leaf: Any, axes: Axes, method: str, steps: int) -> Array:
    matrix, back = _as_matrix(leaf, axes)
    if _empty(leaf):
        return back(matrix)
    matrix = matrix / _scale(matrix)
    if method == "svd":
        return back(_on_singular_values(_ones, matrix, jnp.zeros((), matrix.dtype)))
    tall = matrix.shape[0] >= matrix.shape[1]
    turned = (_q if method == "qr" else functools.partial(_newton_schulz, steps))(
        matrix if tall else matrix.T
    )
    return back(turned if tall else turned.T)


@jax.custom_jvp
def _q(a: Array) -> Array:
    """The Q of a = QR with a positive diagonal of R."""
    q, r = jnp.linalg.qr(a)
    return q * jnp.where(jnp.diagonal(r) < 0, -1, 1).astype(a.dtype)


@_q.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (a,), (da,) = primals, tangents
    q, r = jnp.linalg.qr(a)
    signs = jnp.where(jnp.diagonal(r) < 0, -1, 1).astype(a.dtype)
    q, r = q * signs, r * signs[:, None]
    # Where R has no inverse the derivative does not exist; what does not depend on it is given.
    diagonal = jnp.diagonal(r)
    tiny = jnp.finfo(a.dtype).eps * jnp.max(jnp.abs(diagonal), initial=0)
    singular = diagonal <= tiny
    regular = jnp.where(singular[:, None], jnp.eye(len(diagonal), dtype=a.dtype), r)
    known = jnp.where(singular, 0, da)
    x = jax.scipy.linalg.solve_triangular(regular, known.T, trans="T", lower=False).T
    inner = _matmul(q.T, x)
    low = jnp.tril(inner, -1)
    return q, _matmul(q, low - low.T - inner) + x


def _newton_schulz(steps: int, a: Array) -> Array:
    # At most 1 after this: the smaller of two bounds on the largest singular value.
    squares = jnp.sum(a * a)
    frobenius = jnp.sqrt(jnp.where(squares > 0, squares, 1))
    size = jnp.abs(a)
    product = jnp.max(size.sum(0), initial=0) * jnp.max(size.sum(1), initial=0)
    bound = jnp.minimum(frobenius, jnp.sqrt(jnp.where(product > 0, product, 1)))

    def step(_: Any, x: Array) -> Array:
        return 1.5 * x - 0.5 * _matmul(x, _matmul(x.T, x))

    turned = lax.fori_loop(0, steps, step, a / bound)
    return jnp.where(squares == 0, 0, turned)  # at zero the derivative would be 1.5**steps


def _spectral_ball(leaf: Any, axes: Axes, scale: Any) -> Array:
    matrix, back = _as_matrix(leaf, axes)
    if _empty(leaf):
        return back(matrix)
    scaled, c, unit = _over(matrix, scale)
    largest = jnp.linalg.svd(lax.stop_gradient(scaled), compute_uv=False)[0]
    # Below the rounding of the values themselves a radius would be lost in the product.
    least = 2.0**-60
    clipped = _on_singular_values(_at_most, scaled, jnp.maximum(c, least))
    clipped *= jnp.where(c > least, unit, jnp.asarray(scale, matrix.dtype) / least)
    return back(jnp.where(largest <= c, matrix, clipped))


def _low_rank(leaf: Any, axes: Axes, rank: Any) -> Array:
    matrix, back = _as_matrix(leaf, axes)
    if _empty(leaf):
        return back(matrix)
    scale = _scale(matrix)
    rank = jnp.asarray(rank, matrix.dtype)
    new = _on_singular_values(_first, matrix / scale, rank) * scale
    return back(jnp.where(rank >= min(matrix.shape), matrix, new))


def _symmetric(leaf: Any, axes: Axes) -> Array:
    matrix, back = _as_matrix(leaf, axes, "symmetric")
    return back(matrix / 2 + matrix.T / 2)


def _positive_semidefinite(leaf: Any, axes: Axes) -> Array:
    matrix, back = _as_matrix(leaf, axes, "positive_semidefinite")
    if _empty(leaf):
        return back(matrix)
    scale = _scale(matrix)
    scaled = matrix / scale
    even = (scaled + scaled.T) / 2
    new = _on_eigenvalues(_not_negative, even, jnp.zeros((), matrix.dtype))
    new = (new + new.T) / 2
    inside = jnp.linalg.eigvalsh(lax.stop_gradient(even))[0] >= 0
    return back(jnp.where(inside, even, new) * scale)


def _doubly_stochastic(leaf: Any, axes: Axes, steps: int) -> Array:
    matrix, back = _as_matrix(leaf, axes, "doubly_stochastic")
    if _empty(leaf):
        return back(matrix)
    # What is below the rounding of the largest is raised to it: derivatives would be infinite.
    x = jnp.maximum(matrix / _scale(matrix), jnp.finfo(matrix.dtype).eps)

    def divided(x: Array, axis: int, at_most: bool = False) -> Array:
        sums = x.sum(axis, keepdims=True)
        limit = jnp.maximum(sums, 1) if at_most else jnp.where(sums > 0, sums, 1)
        return x / limit

    x = lax.fori_loop(0, steps, lambda _, x: divided(divided(x, 0), 1), x)
    # Then exactly into the set: nothing above 1, and what is missing added as one rank.
    x = divided(divided(x, 0, at_most=True), 1, at_most=True)
    rows, columns = (jnp.maximum(1 - x.sum(i, keepdims=True), 0) for i in (1, 0))
    missing = rows.sum()
    return back(x + rows * columns / jnp.where(missing > 0, missing, 1))


# -- sets of matrices -------------------------------------------------------------------------


@noun
def orthogonal(method: str = "svd", steps: int = 30) -> Bound:
    """The columns are orthonormal, or the rows where they are fewer (a Stiefel manifold).

    Args:
        method: "svd", a projection: the polar factor, argmin of ``|V - W|``, unique for full
            rank and otherwise one of the nearest. "qr", a retraction: Q with a positive diagonal
            of R. "newton_schulz", for a loop on an accelerator, where products are cheap: the
            cubic iteration towards the polar factor, a normalisation. A singular value of
            s times the bound on the largest is 1 after about ``log(1/s)/log(1.5) + 5`` steps,
            one that is 0 stays 0.
        steps: of "newton_schulz".

    Cost for m x n, n <= m: O(m n²) each; the decompositions are slow on accelerators. Source:
    Higham, 1986 (polar); Absil, Mahony and Sepulchre, 2008 (QR); Björck and Bowie, 1971.

    Example:
        >>> w = orthogonal()(jnp.array([[3.0, 0.0], [0.0, -2.0], [0.0, 0.0]]), "in out")
        >>> abs(w.round(4)).tolist()
        [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]
    """
    kinds: dict[str, Kind] = {
        "svd": "projection",
        "qr": "retraction",
        "newton_schulz": "normalisation",
    }
    if method not in kinds:
        raise FwtError(f"method must be one of {', '.join(map(repr, kinds))}; found {method!r}")
    whole("steps", steps, 1)
    return bound(_orthogonal, kinds[method], None, method=method, steps=steps)


@noun
def spectral_ball(scale: Any = 1.0) -> Bound:
    """The largest singular value is at most ``scale``.

    A projection, unique: larger singular values are clipped; inside the identity. (Spectral
    normalisation divides all by the largest instead.) Cost: an SVD, and the values of one.
    Source: Lefkimmiatis, Ward and Unser, 2013.

    Args:
        scale: the radius, may be traced.

    Example:
        >>> print(spectral_ball(2.0)(jnp.diag(jnp.array([3.0, 1.0])), "in out").round(4))
        [[2. 0.]
         [0. 1.]]
    """
    check("scale", scale, 0)
    return bound(_spectral_ball, "projection", None, scale=scale)


def low_rank(rank: Any) -> Bound:
    """The rank is at most ``rank``.

    A projection: the ``rank`` largest singular values stay; of equal ones those that the SVD puts
    first. Cost: one SVD. Source: Eckart and Young, 1936.

    Args:
        rank: a whole number, may be traced.

    Example:
        >>> print(abs(low_rank(1)(jnp.diag(jnp.array([3.0, 1.0])), "in out").round(4)))
        [[3. 0.]
         [0. 0.]]
    """
    if not isinstance(rank, jax.Array):
        whole("rank", rank, 0)
    return bound(_low_rank, "projection", None, rank=rank)


@noun
def symmetric() -> Bound:
    """The matrix equals its transpose; for square ones.

    A projection, unique: the mean of both. Source: Higham, 1988.

    Example:
        >>> symmetric()(jnp.array([[1.0, 2.0], [4.0, 3.0]]), "in out").tolist()
        [[1.0, 3.0], [3.0, 3.0]]
    """
    return bound(_symmetric, "projection", None)


@noun
def positive_semidefinite() -> Bound:
    """The matrix is symmetric and has no negative eigenvalue; for square ones.

    A projection, unique: the symmetric part, whose negative eigenvalues become 0. Cost: an
    eigendecomposition, and the values of one. Source: Higham, 1988.

    Example:
        >>> print(positive_semidefinite()(jnp.diag(jnp.array([3.0, -1.0])), "in out").round(4))
        [[3. 0.]
         [0. 0.]]
    """
    return bound(_positive_semidefinite, "projection", None)


@noun
def doubly_stochastic(steps: int = 50) -> Bound:
    """The weights are >= 0 and each row and column sums to 1; for square matrices.

    A retraction, not the nearest point: negative weights become 0, rows and columns are divided
    by their sums in turn, and what ``steps`` rounds have not settled is moved exactly into the
    set. Cost: ``steps`` passes. Source: Sinkhorn, 1964; Altschuler, Weed and Rigollet, 2017.

    Args:
        steps: how many rounds.

    Example:
        >>> print(doubly_stochastic()(jnp.array([[4.0, 0.0], [-1.0, 9.0]]), "in out").round(4))
        [[1. 0.]
         [0. 1.]]
    """
    whole("steps", steps, 0)
    return bound(_doubly_stochastic, "retraction", None, steps=steps)
