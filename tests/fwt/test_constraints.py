"""Every constraint keeps what it declares: one table of rows, and the real libraries."""

import dataclasses
import functools
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import OLDER, thorough_but

import fwt
from fwt import _axes

C = fwt.constraints

VECTORS = (("d/kernel", (5, 3)), ("conv/kernel", (3, 2, 4, 5)), ("d/weight", (3, 7)))
MATRICES = (("d/kernel", (7, 3)), ("d/weight", (6, 4)), ("conv/kernel", (2, 2, 1, 5)))
SQUARE = (("d/kernel", (5, 5)), ("conv/kernel", (2, 1, 2, 4)), ("d/weight", (1, 1)))
WINDOWS = (("conv/kernel", (3, 3, 2, 4)), ("conv/kernel", (4, 2, 3, 1)), ("conv/kernel", (5, 2, 3)))


def rows(v, axes):
    """(units, n), float64."""
    order = (*axes.outputs, *axes.reduced)
    units = int(np.prod([axes.shape[i] for i in axes.outputs]))
    return np.asarray(v, np.float64).transpose(order).reshape(units, -1)


def matrix(v, axes):
    return rows(v, axes).T


def biggest(x):
    return max(np.abs(x).max(), 1e-300)


def norm_between(low, high):
    def violation(v, axes):
        n = np.linalg.norm(rows(v, axes), axis=1)
        return max(0, (n / high - 1).max(), *(1 - n[n > 0] / low if low else [0]))

    return violation


def sums_to(scale, magnitudes=False):
    def violation(v, axes):
        r = rows(v, axes)
        r = np.abs(r) if magnitudes else r
        return max(np.abs(r.sum(1) / scale - 1).max(), -r.min() / scale)

    return violation


def box_of(low, high):
    def violation(v, axes):
        x = np.asarray(v, np.float64)
        return max(0, (low - x).max(), (x - high).max()) / max(abs(low), abs(high), 1e-300)

    return violation


def largest_is(scale):
    return lambda v, axes: np.abs(np.abs(rows(v, axes)).max(1) / scale - 1).max()


def rings(v, axes):
    x = np.asarray(v, np.float64)
    x = np.moveaxis(x, axes.spatial, range(len(axes.spatial)))
    spatial = x.shape[: len(axes.spatial)]
    groups = {}
    for place in np.ndindex(*spatial):
        far = max(abs(p - (k - 1) / 2) for p, k in zip(place, spatial, strict=True))
        groups.setdefault(far, []).append(x[place])
    return max(np.ptp(np.stack(g), axis=0).max() for g in groups.values()) / biggest(x)


NORMAL = np.array([0.5, -1.0, 0.0, 2.0, 1.5], np.float32)


def plane(normal, offset, equal):
    def violation(v, axes):
        r = rows(v, axes)
        a = rows(np.broadcast_to(normal, axes.shape), axes)
        distance = (r * a).sum(1) - offset
        size = np.linalg.norm(a, axis=1) * np.linalg.norm(r, axis=1) + abs(offset)
        return ((np.abs(distance) if equal else distance) / size).max()

    return violation


def orthonormal(v, axes):
    m = matrix(v, axes)
    m = m.T if m.shape[0] < m.shape[1] else m
    return np.abs(np.linalg.svd(m, compute_uv=False) - 1).max()


def singular(limit):
    def violation(v, axes):
        return np.linalg.svd(matrix(v, axes), compute_uv=False)[0] / limit - 1

    return violation


def rank_at_most(k):
    def violation(v, axes):
        s = np.linalg.svd(matrix(v, axes), compute_uv=False)
        return s[k] / biggest(s) if k < len(s) else 0

    return violation


def is_symmetric(v, axes):
    m = matrix(v, axes)
    return np.abs(m - m.T).max() / biggest(m)


def is_psd(v, axes):
    m = matrix(v, axes)
    return max(is_symmetric(v, axes), -np.linalg.eigvalsh((m + m.T) / 2)[0] / biggest(m))


def is_doubly_stochastic(v, axes):
    m = matrix(v, axes)
    return max(-m.min(), *np.abs(m.sum(0) - 1), *np.abs(m.sum(1) - 1))


def mean_and_deviation(deviation):
    def violation(v, axes):
        r = rows(v, axes)
        out = np.abs(r.mean(1)).max() / biggest(r)
        std = r.std(1)
        return max([out, *np.abs(std[std > 0] / deviation - 1)]) if deviation else out

    return violation


def sparse_rows(k):
    return lambda v, axes: float(((rows(v, axes) != 0).sum(1) > k).any())


def on_a_grid(bits, symmetric, per_unit, step=None, low=None):
    def violation(v, axes):
        worst = 0
        for r in rows(v, axes) if per_unit else [np.asarray(v, np.float64).ravel()]:
            levels = 2**bits - 2 if symmetric else 2**bits - 1
            if step is not None:
                size = step
            elif symmetric:
                size = np.abs(r).max() / (levels // 2)
            else:
                size = (max(r.max(), 0) - min(r.min(), 0)) / levels
            if size == 0:
                continue
            worst = max(worst, np.abs(r - np.round(r / size) * size).max() / biggest(r))
            assert np.ptp(np.round(r / size)) <= levels
        return worst

    return violation


# -- members, made without the constraints ----------------------------------------------------


def from_rows(r, axes):
    order = (*axes.outputs, *axes.reduced)
    turned = r.reshape([axes.shape[i] for i in order])
    return turned.transpose([order.index(i) for i in range(len(order))]).astype(np.float32)


def gaussian(rng, n):
    return rng.normal(size=n)


def of_norm(low, high):
    def sample(rng, at):
        r = gaussian(rng, len(at))
        return r / np.linalg.norm(r) * rng.uniform(low, high)

    return sample


def uniform(low, high):
    return lambda rng, at: rng.uniform(low, high, len(at)).astype(np.float32)


def dirichlet(scale, ball=False, signed=False):
    def sample(rng, at):
        r = rng.dirichlet(np.full(len(at), 0.7)) * scale
        r = r * rng.random() if ball else r
        return r * rng.choice([-1, 1], len(at)) if signed else r

    return sample


def on_plane(normal, offset, below=False):
    """A solution of the one equation, and anything of its null space."""

    def sample(rng, at):
        a = normal[at % len(normal)] if np.ndim(normal) else np.full(len(at), normal)
        if not a.any():
            return np.zeros(len(at))
        _, _, vt = np.linalg.svd(a[None].astype(np.float64))
        r = np.linalg.lstsq(a[None].astype(np.float64), [offset], rcond=None)[0]
        r = r + vt[1:].T @ rng.normal(size=len(at) - 1)
        return r - a * abs(rng.normal()) * below

    return sample


def touching(scale):
    def sample(rng, at):
        r = rng.uniform(-scale, scale, len(at))
        r[rng.integers(len(at))] = scale * rng.choice([-1, 1])
        return r

    return sample


def centred(rng, at):
    r = gaussian(rng, len(at))
    r[-1] = -r[:-1].sum()
    return r


def standardised(rng, at):
    half = len(at) // 2
    r = np.zeros(len(at))
    r[: 2 * half] = np.repeat([1.0, -1.0], half) * np.sqrt(len(at) / (2 * half))
    return rng.permutation(r)


def sparse(k):
    def sample(rng, at):
        r = np.zeros(len(at))
        where = rng.choice(len(at), min(k, len(at)), replace=False)
        r[where] = gaussian(rng, len(where))
        return r

    return sample


def levels(low, high, step):
    return lambda rng, at: (rng.integers(low, high + 1, len(at)) * np.float32(step)).astype(
        np.float32
    )


def rotation(rng, m, n):
    q, _ = np.linalg.qr(rng.normal(size=(max(m, n), min(m, n))))
    return q if m >= n else q.T


def of_singular_values(most, rank=None):
    def sample(rng, m, n):
        k = min(m, n)
        s = rng.uniform(0, most, k)
        s[k if rank is None else rank :] = 0
        return rotation(rng, m, k) * s @ rotation(rng, k, n)

    return sample


def even(rng, m, n):
    a = rng.normal(size=(m, n))
    return a + a.T


def gram(rng, m, n):
    a = rng.normal(size=(m, rng.integers(1, n + 1)))
    return a @ a.T


def of_permutations(rng, m, n):
    return sum(w * np.eye(n)[rng.permutation(n)] for w in rng.dirichlet(np.ones(4)))


def of_rings(rng, axes):
    spatial = [axes.shape[i] for i in axes.spatial]
    values = rng.normal(size=(20, *(axes.shape[i] for i in (*axes.inputs, *axes.outputs))))
    out = np.zeros((*spatial, *values.shape[1:]), np.float32)
    for place in np.ndindex(*spatial):
        far = max(abs(2 * p - (k - 1)) for p, k in zip(place, spatial, strict=True))
        out[place] = values[far]
    return out


def member(row, rng, axes, mask=None):
    """A point of the set, and of the support."""
    if row.sample is of_rings:
        return of_rings(rng, axes)
    if row.places is not VECTORS and row.name != "hyperplane-array":
        m, n = matrix(np.zeros(axes.shape), axes).shape
        return from_rows(row.sample(rng, m, n).T, axes)
    kept = rows(np.ones(axes.shape) if mask is None else mask, axes) != 0
    out = np.zeros(kept.shape)
    for unit, on in zip(out, kept, strict=True):
        at = np.flatnonzero(on)
        if at.size:
            unit[at] = row.sample(rng, at)
    return from_rows(out, axes)


@dataclasses.dataclass
class Row:
    name: str
    constraint: Any
    violation: Callable[..., float]
    sample: Callable[..., Any]
    places: tuple = VECTORS
    elementwise: bool = False
    zero_stays: bool = False  # a zero vector is no point of the set and stays

    def __repr__(self):
        return self.name


TABLE = [
    Row("non_negative", C.non_negative(), box_of(0, np.inf), uniform(0, 3), elementwise=True),
    Row("max_norm", C.max_norm(0.7), norm_between(0, 0.7), of_norm(0, 0.7)),
    Row("unit_norm", C.unit_norm(), norm_between(1, 1), of_norm(1, 1), zero_stays=True),
    Row(
        "min_max_norm",
        C.min_max_norm(0.5, 0.9),
        norm_between(0.5, 0.9),
        of_norm(0.5, 0.9),
        zero_stays=True,
    ),
    Row("min_max_norm-rate", C.min_max_norm(0.5, 0.9, 0.3), None, of_norm(0.5, 0.9)),
    Row("radial", C.radial(), rings, of_rings, WINDOWS),
    Row("box", C.box(-0.3, 0.5), box_of(-0.3, 0.5), uniform(-0.3, 0.5), elementwise=True),
    Row("box-off-zero", C.box(0.3, 0.5), box_of(0.3, 0.5), uniform(0.3, 0.5), elementwise=True),
    Row("hypercube", C.hypercube(0.5), box_of(0, 0.5), uniform(0, 0.5), elementwise=True),
    Row("linf_ball", C.linf_ball(0.4), box_of(-0.4, 0.4), uniform(-0.4, 0.4), elementwise=True),
    Row("linf_sphere", C.linf_sphere(0.6), largest_is(0.6), touching(0.6)),
    Row("l2_ball", C.l2_ball(0.8), norm_between(0, 0.8), of_norm(0, 0.8)),
    Row("l2_sphere", C.l2_sphere(0.8), norm_between(0.8, 0.8), of_norm(0.8, 0.8)),
    Row(
        "l1_ball",
        C.l1_ball(0.9),
        lambda v, a: (np.abs(rows(v, a)).sum(1) / 0.9 - 1).max(),
        dirichlet(0.9, ball=True, signed=True),
    ),
    Row("l1_sphere", C.l1_sphere(0.9), sums_to(0.9, magnitudes=True), dirichlet(0.9, signed=True)),
    Row("simplex", C.simplex(1.5), sums_to(1.5), dirichlet(1.5)),
    Row("hyperplane", C.hyperplane(1.0, 0.5), plane(1.0, 0.5, equal=True), on_plane(1.0, 0.5)),
    Row(
        "hyperplane-array",
        C.hyperplane(NORMAL[:, None], -2.0),
        plane(NORMAL[:, None], -2.0, True),
        on_plane(NORMAL, -2.0),
        (("d/kernel", (5, 3)), ("conv/kernel", (2, 5, 4))),
    ),
    Row(
        "halfspace",
        C.halfspace(-2.0, 0.5),
        plane(-2.0, 0.5, equal=False),
        on_plane(-2.0, 0.5, below=True),
    ),
    Row("zero_mean", C.zero_mean(), mean_and_deviation(None), centred),
    Row(
        "weight_standardization",
        C.weight_standardization(),
        mean_and_deviation(1),
        standardised,
        zero_stays=True,
    ),
    Row("weight_standardization-epsilon", C.weight_standardization(1e-05), None, None),
    Row("k_sparse", C.k_sparse(3), sparse_rows(3), sparse(3)),
    Row("quantized", C.quantized(4), on_a_grid(4, True, False), None),
    Row("quantized-channel", C.quantized(3, axis=None), on_a_grid(3, True, True), None),
    Row("quantized-affine", C.quantized(4, symmetric=False), on_a_grid(4, False, False), None),
    Row(
        "quantized-affine-channel",
        C.quantized(2, False, axis=None),
        on_a_grid(2, False, True),
        None,
    ),
    Row(
        "quantized-grid",
        C.quantized(4, scale=0.125),
        on_a_grid(4, True, False, 0.125),
        levels(-7, 7, 0.125),
        elementwise=True,
    ),
    Row(
        "quantized-affine-grid",
        C.quantized(4, False, 0.1, 3),
        on_a_grid(4, False, False, np.float32(0.1)),
        levels(-3, 12, 0.1),
        elementwise=True,
    ),
    Row("orthogonal", C.orthogonal(), orthonormal, rotation, (*MATRICES, *SQUARE)),
    Row("orthogonal-qr", C.orthogonal("qr"), orthonormal, rotation, (*MATRICES, *SQUARE)),
    Row(
        "orthogonal-newton_schulz",
        C.orthogonal("newton_schulz"),
        None,
        rotation,
        (*MATRICES, *SQUARE),
    ),
    Row(
        "spectral_ball",
        C.spectral_ball(0.7),
        singular(0.7),
        of_singular_values(0.7),
        (*MATRICES, *SQUARE),
    ),
    Row("low_rank", C.low_rank(2), rank_at_most(2), of_singular_values(1, 2), (*MATRICES, *SQUARE)),
    Row("symmetric", C.symmetric(), is_symmetric, even, SQUARE),
    Row("positive_semidefinite", C.positive_semidefinite(), is_psd, gram, SQUARE),
    Row("doubly_stochastic", C.doubly_stochastic(), is_doubly_stochastic, of_permutations, SQUARE),
]
every = pytest.mark.parametrize("row", TABLE, ids=repr)
half = pytest.mark.parametrize("row", thorough_but(lambda r: r in TABLE[::2], TABLE), ids=repr)
with_members = pytest.mark.parametrize("row", [r for r in TABLE if r.sample is not None], ids=repr)
# A normal of five numbers fits no empty and no single leaf.
any_size = pytest.mark.parametrize(
    "row", [r for r in TABLE if r.name != "hyperplane-array"], ids=repr
)
SCALES = [1.0, 1e-3, 30.0, 1e30, 1e-30]


def draw(place, seed, scale, kind):
    path, shape = place
    rng = np.random.default_rng(seed)
    w = rng.normal(size=shape) * scale
    if kind == "zero":
        w = w * 0
    if kind == "a zero unit":
        w[..., 0] = 0
    if kind == "constant":
        w = np.full(shape, scale)
    if kind == "sparse":
        w = w * (rng.random(shape) < 0.4)
    if kind == "ones":
        w = np.round(rng.normal(size=shape)) * scale
    return w.astype(np.float32), _axes.axes_of(path, shape)


KINDS = ["normal", "zero", "a zero unit", "constant", "sparse", "ones"]
weights = {
    "seed": st.integers(0, 2**31),
    "scale": st.sampled_from(SCALES),
    "kind": st.sampled_from(KINDS),
    "which": st.integers(0, 5),
}


@functools.cache
def compiled(name, path, shape):
    """One compiled constraint for each row and place: operation by operation is slow."""
    row = next(row for row in TABLE if row.name == name)
    axes = _axes.axes_of(path, shape)
    return jax.jit(lambda w: row.constraint(w, axes))


@every
@given(**weights)
def test_in_the_set_and_idempotent(row, seed, scale, kind, which):
    place = row.places[which % len(row.places)]
    w, axes = draw(place, seed, scale, kind)
    before = w.copy()
    project = compiled(row.name, *place)
    v = np.asarray(project(w))
    assert np.array_equal(w, before)
    assert v.dtype == w.dtype
    assert v.shape == w.shape
    assert np.isfinite(v).all()
    if row.violation is None:
        return
    assert row.violation(v, axes) <= 1e-6
    again = np.asarray(project(v))
    if row.elementwise:
        assert again.tobytes() == v.tobytes()
    else:
        np.testing.assert_allclose(again, v, rtol=1e-6, atol=1e-6 * biggest(v))


@with_members
def test_the_identity_inside(row):
    for place in row.places:
        axes = _axes.axes_of(*place)
        project = compiled(row.name, *place)
        for seed in range(20):
            v = member(row, np.random.default_rng(seed), axes)
            if row.violation is not None:
                assert row.violation(v, axes) <= 1e-6  # of the sample, not of ours
            found = np.asarray(project(v))
            if row.elementwise:
                assert found.tobytes() == v.tobytes()
            else:
                np.testing.assert_allclose(found, v, rtol=2e-6, atol=2e-6 * biggest(v))


@pytest.mark.thorough
@every
@settings(max_examples=settings().max_examples // 3)  # each place and dtype is compiled
@given(seed=st.integers(0, 2**31), which=st.integers(0, 5), half=st.booleans())
def test_half_precision(row, seed, which, half):
    dtype = np.float16 if half else ml_dtypes.bfloat16
    place = row.places[which % len(row.places)]
    w, axes = draw(place, seed, 1.0, "normal")
    w = w.astype(dtype)
    v = compiled(row.name, *place)(w)
    assert v.dtype == dtype
    assert v.shape == w.shape
    if row.violation is not None:
        eps = float(ml_dtypes.finfo(dtype).eps)
        assert row.violation(np.asarray(v, np.float32), axes) <= 4 * eps * w.size**0.5


TINY = (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float8_e4m3b11fnuz)


@pytest.mark.thorough
def test_8_bit_floats_are_computed_in_float32_and_rounded():
    """The truth is NumPy's rounding of what the float32 leaf becomes."""
    for index, row in enumerate(TABLE):
        place = row.places[index % len(row.places)]
        w, axes = draw(place, index, 1.0, "normal")
        dtype = TINY[index % len(TINY)]
        leaf = w.astype(dtype)
        found = np.asarray(row.constraint(leaf, axes))
        wide = np.asarray(row.constraint(leaf.astype(np.float32), axes))
        assert found.dtype == dtype
        assert found.tobytes() == wide.astype(dtype).tobytes(), row
    t = fwt.project(C.max_norm(1.0), masks={"d": {"kernel": np.eye(3, dtype=bool)}})
    new = t({"d": {"kernel": np.full((3, 3), 2, TINY[0])}})["d"]["kernel"]
    assert np.asarray(new, np.float32).tolist() == np.eye(3).tolist()
    # Too large for the dtype, which has a NaN in the place of infinity.
    big = np.full((1, 1), 300, TINY[0])
    assert float(C.l2_sphere(1000.0)(big, "in out").astype(np.float32)[0, 0]) == 448
    assert float(C.box(-1000.0, 1000.0)(big, "in out").astype(np.float32)[0, 0]) == 288


PROJECTIONS = [row for row in TABLE if row.constraint.kind == "projection"]


@pytest.mark.parametrize("row", PROJECTIONS, ids=repr)
@pytest.mark.parametrize(
    ("kind", "number"),
    thorough_but(1, [("normal", 0), ("small", 0), ("normal", 1), ("zero", 1)], most=2),
)
def test_no_feasible_point_is_nearer(row, kind, number):
    """1000 members made without it, and 1000 of its own images, which are near."""
    place = row.places[number % len(row.places)]
    w, axes = draw(place, number, 0.1 if kind == "small" else 1.0, kind)
    rng = np.random.default_rng(number)
    project = compiled(row.name, *place)
    v = np.asarray(project(w))
    steps = 10.0 ** rng.uniform(-4, 1, (1000, *[1] * w.ndim))
    start = np.where(rng.random(steps.shape) < 0.5, w, v)
    tried = (start + rng.normal(size=(1000, *w.shape)) * steps).astype(np.float32)
    points = np.asarray(jax.vmap(project)(tried))
    for point in points[::50]:
        assert row.violation(point, axes) <= 2e-6
    distance = np.linalg.norm(np.float64(v - w))
    members = np.stack([member(row, rng, axes) for _ in range(1000)])
    points = np.concatenate([points, members])
    others = np.linalg.norm((np.float64(points) - w).reshape(len(points), -1), axis=1)
    if not row.zero_stays or kind in ("normal", "small"):
        assert distance <= others.min() * (1 + 1e-5) + 1e-6


@every
def test_derivatives_are_finite(row):
    w, axes = draw(row.places[0], 3, 1.0, "normal")
    tangent = np.random.default_rng(4).normal(size=w.shape).astype(np.float32)
    both = jax.jit(
        lambda x, t: (
            jax.jvp(lambda y: row.constraint(y, axes), (x,), (t,))[1],
            jax.vjp(lambda y: row.constraint(y, axes), x)[1](t)[0],
        )
    )
    project = compiled(row.name, *row.places[0])
    for kind in KINDS:
        for scale in (1.0, 1e30, 1e-30):
            w, _ = draw(row.places[0], 3, scale, kind)
            for x in (w, np.asarray(project(w))):  # outside the set and inside
                for derivative in both(x, tangent):
                    assert np.isfinite(derivative).all(), (kind, scale)


SMOOTH = [
    row for row in TABLE if not row.name.startswith(("quantized", "k_sparse", "doubly", "non_neg"))
]


@pytest.mark.parametrize(
    "row",
    thorough_but(7, SMOOTH[::4] + SMOOTH[1::4] + SMOOTH[2::4] + SMOOTH[3::4], most=12),
    ids=repr,
)
def test_derivatives_are_right(row):
    """Against differences, in float64, at a point where the derivative exists."""
    with jax.enable_x64(True):
        for number, place in enumerate(row.places[:2]):
            w, axes = draw(place, 10 + number, 1.0, "normal")
            w = w.astype(np.float64)
            t = np.random.default_rng(number).normal(size=w.shape)
            other = np.random.default_rng(9).normal(size=w.shape)
            f = functools.partial(row.constraint, axes=axes)

            @jax.jit
            def all_of_it(w, t, other, f=f):
                nearby = jax.lax.map(f, jnp.stack([w + 1e-6 * t, w - 1e-6 * t]))
                slopes = jax.lax.map(lambda v: jax.jvp(f, (w,), (v,))[1], jnp.stack([t, other]))
                return nearby, slopes, jax.vjp(f, w)[1](t)[0]

            (after, before), (found, forward), back = map(np.asarray, all_of_it(w, t, other))
            expected = (after - before) / 2e-6
            np.testing.assert_allclose(found, expected, atol=2e-5 * max(1, biggest(expected)))
            np.testing.assert_allclose(
                (back * other).sum(), (forward * t).sum(), rtol=1e-6, atol=1e-8
            )


@half
def test_the_same_under_every_transformation(row):
    place = row.places[0]
    ws = np.stack([draw(place, seed, 1.0, "normal")[0] for seed in range(3)])
    axes = _axes.axes_of(*place)
    project = compiled(row.name, *place)
    plain = np.stack([project(w) for w in ws])
    close = {"rtol": 1e-5, "atol": 1e-6 * biggest(plain)}
    np.testing.assert_allclose(jax.jit(jax.vmap(project))(ws), plain, **close)
    with jax.disable_jit():
        np.testing.assert_allclose(row.constraint(ws[0], axes), plain[0], **close)


@any_size
def test_empty_and_single(row):
    window = row.places is WINDOWS
    empty = (0, 0) if row.places is SQUARE else (3, 3, 0, 4) if window else (0, 5)
    axes = _axes.axes_of("d/kernel", empty)
    assert row.constraint(np.zeros(empty, np.float32), axes).shape == empty
    single = (1, 1, 1, 1) if window else (1, 1)
    axes = _axes.axes_of("d/kernel", single)
    v = np.asarray(row.constraint(np.full(single, -2.5, np.float32), axes))
    assert np.isfinite(v).all()
    if row.violation is not None:
        assert row.violation(v, axes) <= 1e-6


# -- masks ------------------------------------------------------------------------------------

NO_MASKS = {
    "radial", "zero_mean", "weight_standardization", "orthogonal", "spectral_ball", "low_rank",
    "symmetric", "positive_semidefinite", "doubly_stochastic",
}  # fmt: skip


@half
def test_masks_are_kept_or_refused(row):
    path, shape = row.places[0]
    w, axes = draw(row.places[0], 1, 1.0, "normal")
    layer, leaf = path.split("/")
    tree = {layer: {leaf: w}}
    mask = np.random.default_rng(0).random(shape) < 0.6
    masks = {layer: {leaf: mask}}
    if row.constraint.name in NO_MASKS or row.name == "box-off-zero":
        assert not row.constraint.keeps_zeros
        with pytest.raises(fwt.FwtError, match="refill"):
            fwt.project(row.constraint, masks=masks)
        return
    v = np.asarray(fwt.project(row.constraint, masks=masks)(tree)[layer][leaf])
    assert not v[~mask].any()
    if row.violation is None:
        return
    live = rows(mask, axes).any(1)
    if live.all():
        assert row.violation(v, axes) <= 1e-6
    if row.constraint.kind != "projection":
        return
    # The nearest of 1000 points of the set within the support that others make, and of 1000 of
    # its own from other weights.
    rng = np.random.default_rng(2)
    project = fwt.project(row.constraint, masks=masks)
    tried = w + rng.normal(size=(1000, *shape)) * 10.0 ** rng.uniform(-4, 1, (1000, *[1] * w.ndim))
    f = jax.vmap(lambda x: project({layer: {leaf: x}})[layer][leaf])
    points = np.asarray(f(jnp.asarray(tried, jnp.float32)))
    kept = np.where(mask, w, 0)
    members = np.stack([member(row, rng, axes, mask) for _ in range(1000)])
    inside = np.asarray(jax.jit(project)({layer: {leaf: members[0]}})[layer][leaf])
    np.testing.assert_allclose(inside, members[0], atol=2e-6)
    points = np.concatenate([points, members])
    others = np.linalg.norm((np.float64(points) - kept).reshape(len(points), -1), axis=1)
    assert np.linalg.norm(np.float64(v) - kept) <= others.min() * (1 + 1e-5) + 1e-6


def test_a_unit_without_weights_is_zero():
    w = np.ones((4, 2), np.float32)
    mask = np.ones((4, 2), bool)
    mask[:, 0] = False
    for row in TABLE:
        if row.constraint.support is not None and row.places is VECTORS:
            t = fwt.project(row.constraint, masks={"d": {"kernel": mask}})
            v = np.asarray(t({"d": {"kernel": w}})["d"]["kernel"])
            assert np.isfinite(v).all(), row
            assert not v[:, 0].any(), row


# -- the real libraries -----------------------------------------------------------------------

P = optax.projections
OPTAX = [
    (C.non_negative(), P.projection_non_negative),
    (C.box(-0.3, 0.5), lambda w: P.projection_box(w, -0.3, 0.5)),
    (C.hypercube(0.5), lambda w: P.projection_hypercube(w, 0.5)),
    (C.simplex(1.5, axis="all"), lambda w: P.projection_simplex(w, 1.5)),
    (C.l1_ball(1.5, axis="all"), lambda w: P.projection_l1_ball(w, 1.5)),
    (C.l1_sphere(1.5, axis="all"), lambda w: P.projection_l1_sphere(w, 1.5)),
    (C.l2_ball(1.5, axis="all"), lambda w: P.projection_l2_ball(w, 1.5)),
    (C.l2_sphere(1.5, axis="all"), lambda w: P.projection_l2_sphere(w, 1.5)),
    (C.linf_ball(0.5), lambda w: P.projection_linf_ball(w, 0.5)),
]  # fmt: skip
if hasattr(P, "projection_hyperplane"):  # since optax 0.2.6
    OPTAX += [
        (C.hyperplane(0.3, 2.0, "all"), lambda w: P.projection_hyperplane(w, w * 0 + 0.3, 2.0)),
        (C.halfspace(0.3, -2.0, "all"), lambda w: P.projection_halfspace(w, w * 0 + 0.3, -2.0)),
    ]


RANKS = [pytest.param(s, marks=pytest.mark.thorough) for s in [(2, 3, 1, 4, 5), (11,)]]


@pytest.mark.parametrize(("ours", "theirs"), OPTAX, ids=[o.name for o, _ in OPTAX])
@pytest.mark.parametrize("shape", [(3, 2, 4, 5), *RANKS])
def test_constraints_equal_optax(ours, theirs, shape):
    w = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    found = fwt.project(ours, "**")({"a": {"kernel": w}})["a"]["kernel"]
    np.testing.assert_allclose(found, theirs(jnp.asarray(w)), atol=1e-6)


def keras_layers():
    import keras

    k = keras.layers
    return [
        (k.Dense(3), (1, 5), [0]),
        (k.Conv1D(3, 5), (1, 9, 4), [0, 1]),
        (k.Conv2D(3, (3, 2)), (1, 9, 7, 4), [0, 1, 2]),
        (k.Conv3D(3, (3, 2, 1)), (1, 9, 7, 5, 4), [0, 1, 2, 3]),
        (k.Conv1DTranspose(3, 5), (1, 9, 4), [0, 2]),
        (k.Conv2DTranspose(3, (3, 2)), (1, 9, 7, 4), [0, 1, 3]),
        (k.Conv3DTranspose(3, (3, 2, 1)), (1, 9, 7, 5, 4), [0, 1, 2, 4]),
        (k.DepthwiseConv2D((3, 2), depth_multiplier=3), (1, 9, 7, 4), [0, 1]),
    ]


@pytest.mark.parametrize("number", range(8))
def test_constraints_equal_keras(number):
    """On live layers, by output unit; their axis is the one that the Keras layout asks for."""
    import keras

    from fwt import converters

    layer, shape, axis = keras_layers()[number]
    layer.build(shape)
    k = keras.constraints
    rng = np.random.default_rng(0)
    for ours, theirs in (
        (C.non_negative(), k.NonNeg()),
        (C.max_norm(1.5), k.MaxNorm(1.5, axis=axis)),
        (C.unit_norm(), k.UnitNorm(axis=axis)),
        (C.min_max_norm(0.5, 1.5, 0.3), k.MinMaxNorm(0.5, 1.5, 0.3, axis=axis)),
        (C.min_max_norm(2.0, 9.0), k.MinMaxNorm(2.0, 9.0, axis=axis)),
    ):
        w = rng.normal(size=layer.kernel.shape).astype(np.float32)
        layer.kernel.assign(w)
        converters.transform(layer, fwt.project(ours, "**/*kernel"))
        expected = np.asarray(keras.ops.convert_to_numpy(theirs(layer.kernel * 0 + w)))
        np.testing.assert_allclose(np.asarray(layer.kernel), expected, atol=1e-6)
    w = rng.normal(size=(3, 4)).astype(np.float32)  # Keras's own axis, said
    np.testing.assert_allclose(
        C.max_norm(0.5, axis=1)(w), np.asarray(k.MaxNorm(0.5, axis=1)(w)), atol=1e-6
    )


def test_newton_schulz_reaches_the_polar_factor():
    rng = np.random.default_rng(0)
    for shape in ((40, 30), (30, 40), (64, 64)):
        u, _, vt = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
        s = np.geomspace(1e-3, 1, min(shape))
        w = ((u * s) @ vt).astype(np.float32)
        found = np.asarray(C.orthogonal("newton_schulz")(w, "in out"))
        np.testing.assert_allclose(found, u @ vt, atol=2e-4)
        assert np.abs(np.linalg.svd(found, compute_uv=False) - 1).max() < 2e-6
        near = (u @ vt + rng.normal(size=shape) * 1e-3).astype(np.float32)
        few = np.asarray(C.orthogonal("newton_schulz", steps=15)(near, "in out"))
        np.testing.assert_allclose(few, C.orthogonal()(near, "in out"), atol=2e-6)


def test_half_precision_is_computed_in_float32():
    w = np.full((4096, 1), 1.0, np.float16)
    v = np.asarray(C.l2_sphere()(w, "in out"), np.float32)
    np.testing.assert_allclose((v**2).sum(), 1, atol=1e-3)
    np.testing.assert_allclose(np.asarray(C.simplex()(w, "in out"), np.float64).sum(), 1, atol=1e-3)


@pytest.mark.thorough
def test_large_vectors_stay_in_the_set():
    rng = np.random.default_rng(0)
    for size in (10_000, 200_000):
        w = rng.normal(size=(size, 1)).astype(np.float32)
        for c, total in ((C.simplex(), 1), (C.l1_sphere(2.0), 2)):
            v = np.asarray(c(w * 1e-4, "in out"), np.float64)
            assert abs(np.abs(v).sum() / total - 1) < 1e-6
        assert abs(np.asarray(C.zero_mean()(w + 100, "in out"), np.float64).mean()) < 1e-4
        v = np.asarray(C.weight_standardization()(w + 5, "in out"), np.float64)
        assert abs(v.std() - 1) < 1e-5


SETTINGS = ["l1_ball", "simplex", "spectral_ball", "low_rank", "k_sparse"]


@pytest.mark.parametrize("name", thorough_but(3, SETTINGS))
def test_settings_may_be_traced(name):
    w = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)

    traces = []

    @jax.jit
    def f(w, c):
        traces.append(c)
        return fwt.project(getattr(C, name)(c))({"d": {"kernel": w}})["d"]["kernel"]

    for c in (1, 2, 3):
        expected = fwt.project(getattr(C, name)(c))({"d": {"kernel": w}})["d"]["kernel"]
        np.testing.assert_allclose(f(w, c), expected, atol=1e-5)
    assert len(traces) == 1
    g = jax.grad(lambda c: C.spectral_ball(c)(w, "in out").sum() + C.l1_ball(c)(w, "in out").sum())
    assert np.isfinite(g(0.5))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: C.max_norm(-1.0), "at least 0"),
        (lambda: C.max_norm(float("nan")), "at least 0"),
        (lambda: C.max_norm("2"), "must be a number"),
        (lambda: C.max_norm(np.array([1.0, 2.0])), r"max_value must be one number.*\(2,\)"),
        (lambda: C.l2_ball(jnp.ones((1, 3))), r"scale must be one number.*\(1, 3\)"),
        (lambda: C.l2_sphere(np.ones(3)), "scale must be one number"),
        (lambda: C.min_max_norm(np.zeros(3), 1.0), "min_value must be one number"),
        (lambda: C.weight_standardization(np.ones(3)), "epsilon must be one number"),
        (lambda: C.min_max_norm(2.0, 1.0), "at least 2"),
        (lambda: C.min_max_norm(rate=5), "0 to 1"),
        (lambda: C.max_norm(1.0, axis="unit"), '"all"'),
        (lambda: C.max_norm(1.0, axis=1.5), "axis must be"),
        (lambda: C.box(1.0, 0.0), "at least lower"),
        (lambda: C.k_sparse(-1), "whole number"),
        (lambda: C.k_sparse(1.5), "whole number"),
        (lambda: C.low_rank(True), "whole number"),
        (lambda: C.quantized(1), "2 to 16"),
        (lambda: C.quantized(8, False, 0.1), "zero_point"),
        (lambda: C.quantized(8, scale=0.0), "scale must be"),
        (lambda: C.orthogonal("polar"), "'svd', 'qr'"),
        (lambda: C.doubly_stochastic(-1), "steps"),
    ],
)
def test_settings_are_checked(make, said):
    with pytest.raises(fwt.FwtError, match=said):
        make()


@pytest.mark.parametrize(
    ("constraint", "shape", "said"),
    [
        (C.radial, (4, 3), "narrow where="),
        (C.symmetric, (4, 3), "4 x 3 matrix"),
        (C.positive_semidefinite, (3, 3, 2, 4), "18 x 4 matrix"),
        (C.doubly_stochastic, (4, 3), "narrow where="),
        (C.hyperplane(np.ones(5)), (4, 3), r"normal of shape \(5,\)"),
        (C.max_norm(1.0, axis=4), (4, 3), "axis="),
    ],
)
def test_what_does_not_fit_is_refused(constraint, shape, said):
    with pytest.raises(fwt.FwtError, match=said):
        fwt.project(constraint)({"d": {"kernel": np.ones(shape, np.float32)}})


def test_integers_are_refused():
    for row in TABLE:
        if row.name != "non_negative":
            with pytest.raises(fwt.LeafError, match="floating"):
                row.constraint(np.ones(row.places[0][1], np.int32), _axes.axes_of(*row.places[0]))
    assert C.non_negative()(np.array([-1, 2])).tolist() == [0, 2]


@pytest.mark.parametrize("shape", [(1, 3), (3, 1), (1, 1), (3,)])
def test_a_unit_of_one_weight_at_any_magnitude(shape):
    """XLA leaves a reduction of one number out."""
    w = np.resize(np.float32([-1e-30, 1e30, -3e25]), shape)
    for c, wanted in ((C.unit_norm(axis=0), np.sign(w)), (C.max_norm(1.0, axis=0), np.where(
        abs(w) > 1, np.sign(w), w))):  # fmt: skip
        if shape[:1] == (1,):
            for found in (c(w), jax.jit(c)(w)):
                np.testing.assert_array_equal(found, wanted)
    norms = np.linalg.norm(np.asarray(C.unit_norm(axis="all")(w), np.float64))
    np.testing.assert_allclose(norms, 1, rtol=1e-6)


def test_what_the_hostile_found():
    big = np.full((2, 1), 3e38, np.float32)
    np.testing.assert_allclose(C.min_max_norm(0.0, 1.0)(big, "in out"), 0.5**0.5, rtol=1e-6)
    weights = jnp.arange(4.0).reshape(2, 2)
    for x in ([[1e10, 1e-10], [1.0, 1e-10]], [[1e30, 1e-30], [1e-30, 1.0]]):
        grad = jax.grad(lambda w: (C.doubly_stochastic()(w, "in out") * weights).sum())
        assert np.isfinite(grad(jnp.array(x))).all()
    half = jnp.zeros((2, 2), jnp.float16)
    f = C.orthogonal("newton_schulz")
    assert np.isfinite(jax.grad(lambda w: f(w, "in out").astype("float32").sum())(half)).all()
    w = np.array([0.3, np.nan, 0.7], np.float32)
    assert np.isnan(C.quantized()(w)).all()
    with pytest.raises(fwt.LeafError, match="complex"):
        C.non_negative()(np.array([1 + 2j], np.complex64))
    with pytest.raises(fwt.LeafError, match="lower of shape"):
        fwt.project(C.box(np.zeros(7), 1.0))({"d": {"kernel": np.ones((4, 3), np.float32)}})
    assert hash(C.hyperplane(np.ones((4, 1)))) == hash(C.hyperplane(np.ones((4, 1))))
    assert C.hyperplane(np.ones((4, 1))) == C.hyperplane(np.ones((4, 1)))
    assert C.max_norm(1.0, axis=np.int64(0)) == C.max_norm(1.0, axis=0)
    with pytest.raises(fwt.FwtError, match="finite"):
        C.max_norm(float("inf"))
    with pytest.raises(fwt.FwtError, match="refill"):
        C.orthogonal()(np.eye(2), "in out", np.eye(2, dtype=bool))
    masked = C.max_norm(9.0)(np.ones((2, 2), np.float32), "in out", np.eye(2, dtype=bool))
    assert np.array_equal(masked, np.eye(2))
    for wrong in (fwt.initializers.zeros, C.low_rank, C.box):
        with pytest.raises(TypeError, match="constraint"):
            fwt.project(wrong)


@pytest.mark.optimised
def test_pruned_weights_are_zero_beside_a_nan():
    w = np.array([[np.nan, 1.0], [2.0, 3.0], [4.0, 5.0]], np.float32)
    mask = np.array([[True, True], [False, True], [True, False]])
    for row in TABLE:
        if row.constraint.keeps_zeros and row.name != "hyperplane-array":
            t = fwt.project(row.constraint, masks={"d": {"kernel": mask}})
            v = np.asarray(t({"d": {"kernel": w}})["d"]["kernel"])
            assert (v[~mask] == 0).all(), row
            assert not np.signbit(v[~mask]).any(), row


@pytest.mark.thorough
def test_sharded_leaves_on_an_explicit_mesh():
    code = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
import fwt
mesh = jax.make_mesh((4,), ("x",))
w = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
sharded = jax.device_put(w, jax.sharding.NamedSharding(mesh, P(None, "x")))
C = fwt.constraints
with jax.set_mesh(mesh):
    for c in (C.simplex(), C.l1_ball(), C.l1_sphere(), C.linf_sphere(), C.max_norm(1.0),
              C.hyperplane(), C.zero_mean(), C.quantized(axis=None)):
        found = fwt.project(c)({"d": {"kernel": sharded}})["d"]["kernel"]
        np.testing.assert_allclose(found, c(w, "in out"), atol=1e-6, err_msg=c.name)
"""
    flags = f"--xla_force_host_platform_device_count=4 {OLDER}"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "XLA_FLAGS": flags})


def test_a_nan_shows():
    for row in TABLE:
        shape = row.places[0][1]
        w = np.ones(shape, np.float32) / 3
        w[(0,) * len(shape)] = np.nan
        assert np.isnan(compiled(row.name, *row.places[0])(w)).any(), row


@pytest.mark.parametrize("c", [C.simplex(), C.l1_ball(), C.l1_sphere()], ids=lambda c: c.name)
def test_what_has_no_projection_is_nan_and_no_number(c):
    for column in ([-np.inf, -np.inf], [np.inf, 1.0], [np.nan, 1.0]):
        new = fwt.project(c)({"d": {"kernel": np.array(column, np.float32)[:, None]}})
        assert np.isnan(new["d"]["kernel"][0, 0]), column


@pytest.mark.parametrize(("size", "radius"), [(2e37, 0.8), (1e36, 0.8), (1e20, 1e-18), (1, 1e-36)])
def test_a_spectral_ball_far_smaller_than_the_matrix(size, radius):
    w = (np.random.default_rng(0).normal(size=(7, 5)) * size).astype(np.float32)
    u, s, vt = np.linalg.svd(w.astype(np.float64), full_matrices=False)
    want = u * np.minimum(s, radius) @ vt
    found = C.spectral_ball(radius)(w, "in out")
    tiny = float(np.finfo(np.float32).tiny)  # below which numbers count as zero
    np.testing.assert_allclose(found, want, rtol=0, atol=max(2e-6 * np.abs(want).max(), tiny))
    slope = jax.grad(lambda r: C.spectral_ball(r)(w, "in out").sum())(radius)
    np.testing.assert_allclose(slope, (u @ vt).sum(), rtol=1e-4)
