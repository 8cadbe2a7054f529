"""The exact selection: against a stable sort, on both of its paths, sharded, and beyond 2**32."""

import functools
import math
import os
import subprocess
import sys
from fractions import Fraction
from unittest import mock

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from marks import OLDER, thorough_but

import fwt
from fwt import _apart
from fwt.pruning import chosen
from fwt.selection import counts as _counts
from fwt.selection import keys, sample
from fwt.selection import select as _select
from fwt.selection.counts import Wide

DTYPES = ["float32", "float16", "bfloat16", "float8_e4m3fn", "int8", "uint8", "int32", "uint32"]
PATHS = ["numpy", "concrete", "traced", "batched"]


def dtype_of(name):
    return np.dtype(getattr(ml_dtypes, name, name))


def order_of(x, signed):
    """The order by a stable NumPy sort: worth first, then the later index."""
    wide = x.ravel().astype(np.float64)
    nan = np.isnan(wide)
    worth = np.where(nan, 0, wide if signed else np.abs(wide))
    return np.lexsort((-np.arange(x.size), worth, nan))


def expected_mask(x, k, signed=False):
    keep = np.ones(x.size, bool)
    keep[order_of(x, signed)[:k]] = False
    return keep.reshape(x.shape)


def near(path):
    """Small leaves at hand are searched by NumPy on its own path alone."""
    return mock.patch.object(keys, "_NEAR", keys._NEAR if path == "numpy" else -1)


def kept(found, cuts):
    return [_select.kept(s, _apart.own(c)) for s, c in zip(found, cuts, strict=True)]


@functools.cache
def compiled(signed):
    @jax.jit
    def select(leaves, k):
        found = keys.sources(leaves, signed)
        return kept(found, _select.smallest([found], [k]))

    return select, jax.jit(jax.vmap(select, (None, 0)))


def select(leaves, k, signed=False, path="traced"):
    """The masks of one selection over all leaves."""
    one, several = compiled(signed)
    if path == "traced":
        return [np.asarray(m) for m in one(leaves, _counts.wide(jnp.uint32(k)))]
    if path == "batched":
        n = sum(np.size(x) for x in leaves)
        ks = jnp.array([0, k, n - k, n // 2], jnp.uint32)
        return [np.asarray(m[1]) for m in several(leaves, jax.vmap(_counts.wide)(ks))]
    found = keys.sources([x if path == "numpy" else jnp.asarray(x) for x in leaves], signed)
    with near(path):
        cuts = _select.smallest([found], [int(k)])
        found = [s.on_host() for s in found] if path == "numpy" else found
    return [np.asarray(m) for m in kept(found, cuts)]


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize(
    ("name", "signed", "path"),
    thorough_but(
        2 * len(PATHS),
        [(*kind, path) for kind in
         (("float32", False), ("float16", True), ("float32", True),
          *((name, place % 2 == 0) for place, name in enumerate(DTYPES[2:]))) for path in PATHS],
        most=11,
    ),
)  # fmt: skip
def test_against_a_stable_sort_on_random_bits(name, signed, path):
    rng = np.random.default_rng(0)
    dtype = dtype_of(name)
    bits = rng.integers(0, 1 << (8 * dtype.itemsize), size=6510, dtype=np.uint64)
    x = bits.astype(f"u{dtype.itemsize}").view(dtype)
    x[:100] = x[100]
    x[200:260] = np.zeros((), dtype)
    if dtype.kind in "iu":
        x[300:310], x[310:315] = np.iinfo(dtype).max, np.iinfo(dtype).min
    x = x.reshape(70, 93)
    for k in (0, 1, 57, 3255, 5859, 6502, 6509, 6510):
        (mask,) = select([x], k, signed, path)
        assert np.array_equal(mask, expected_mask(x, k, signed)), k


SPECIAL = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1e-40, np.inf, -np.inf, np.nan, -np.nan, 3.4e38]


@pytest.mark.parametrize("path", PATHS)
@given(
    hnp.arrays(np.float32, st.sampled_from([1, 6, 40]), elements=st.sampled_from(SPECIAL)),
    st.integers(0, 40),
    st.booleans(),
)
def test_specials_against_a_stable_sort(path, x, k, signed):
    k = min(k, x.size)
    (mask,) = select([x], k, signed, path)
    assert np.array_equal(mask, expected_mask(x, k, signed))


@pytest.mark.parametrize("path", thorough_but(lambda p: p in ("numpy", "traced"), PATHS))
@given(
    st.sampled_from([(1,), (12,), (0, 5), (3, 0, 7, 1), (9, 9, 2, 4, 5000), (20_011, 9, 6144)]),
    st.floats(0, 1),
    st.integers(0, 2**32 - 1),
    st.sampled_from(["ties", "normal", "scales", "equal", "half zeros"]),
)
def test_many_leaves_are_one_selection(path, sizes, share, seed, kind):
    rng = np.random.default_rng(seed)
    draw = {
        "ties": lambda n: rng.integers(-3, 4, size=n),
        "normal": lambda n: rng.normal(size=n),
        "scales": lambda n: rng.normal(size=n) * 10.0 ** rng.integers(-30, 30),
        "equal": lambda n: np.full(n, 0.25),
        "half zeros": lambda n: np.where(rng.random(n) < 0.5, 0, rng.normal(size=n)),
    }[kind]
    leaves = [draw(n).astype(np.float32) for n in sizes]
    k = round(share * sum(sizes))
    joined = np.concatenate(select(leaves, k, False, path))
    assert np.array_equal(joined, expected_mask(np.concatenate(leaves), k))


@pytest.mark.parametrize("path", PATHS)
def test_mixed_float_dtypes_share_one_scale(path):
    rng = np.random.default_rng(0)
    leaves = [
        rng.normal(size=50).astype(np.float32),
        rng.normal(size=50).astype(np.float16),
        (rng.normal(size=50) * 1e-39).astype(ml_dtypes.bfloat16),
        np.array([1e-45, 0, -1e-40], np.float32),
        np.array([6e-8, 0, -1e-7], np.float16),
    ]
    joined = np.concatenate([x.astype(np.float32) for x in leaves])
    for k in (1, 3, 40, 60, 100):
        masks = select(leaves, k, False, path)
        assert np.array_equal(np.concatenate(masks), expected_mask(joined, k))
    with pytest.raises(fwt.FwtError, match="common exact scale"):
        keys.sources([np.ones(2, np.int32), np.ones(2, np.float32)], False)


@pytest.mark.parametrize("path", thorough_but(lambda p: p in ("numpy", "traced"), PATHS))
def test_float64_under_x64(path):
    with jax.enable_x64(True):
        big = np.random.default_rng(1).normal(size=(93, 70))
        (mask,) = select([big], 6000, False, path)
        assert np.array_equal(mask, expected_mask(big, 6000))
        x = np.random.default_rng(0).normal(size=101) * 10.0 ** np.arange(-300, 302, 6)[:101]
        x[3], x[4] = 5e-324, np.nan
        for k in (1, 50, 100):
            (mask,) = select([x], k, False, path)
            assert np.array_equal(mask, expected_mask(x, k))
        mixed = [x, np.array([1e-45, 1e-3, np.inf], np.float32)]
        joined = np.concatenate([a.astype(np.float64) for a in mixed])
        masks = select(mixed, 30, False, path)
        assert np.array_equal(np.concatenate(masks), expected_mask(joined, 30))


@pytest.mark.parametrize("path", PATHS[:3])
def test_one_selection_for_each_leaf(path):
    rng = np.random.default_rng(0)
    leaves = [rng.normal(size=s).astype(np.float32) for s in ((70, 90), (9, 2), (1,), (0, 3))]
    leaves.append(np.ones((80, 80), np.float32))
    ks = [630, 17, 1, 0, 6000]

    def run(leaves, ks):
        found = keys.sources(leaves, False)
        cuts = _select.smallest([[s] for s in found], ks)
        return kept(found, cuts)

    if path in PATHS[:2]:
        with near(path):
            masks = run([jnp.asarray(x) for x in leaves], ks)
    else:
        masks = jax.jit(run)(leaves, [_counts.wide(jnp.uint32(k)) for k in ks])
    for x, k, mask in zip(leaves, ks, masks, strict=True):
        assert np.array_equal(mask, expected_mask(x, k))


@pytest.mark.parametrize("path", PATHS[:3])
def test_all_ties_may_stay(path):
    x = np.array([3, 1, 1, 2, 1, 0], np.float32)

    def run(x, k):
        found = keys.sources([x], False)
        return kept(found, _select.smallest([found], [k], "all"))[0]

    for k, keep in ((0, 6), (1, 5), (2, 5), (3, 5), (4, 2), (5, 1), (6, 0)):
        with near(path):
            mask = run(x, k) if path in PATHS[:2] else jax.jit(run)(x, _counts.wide(jnp.uint32(k)))
        assert int(mask.sum()) == keep


@pytest.mark.parametrize(
    ("apart", "count"),
    thorough_but(1, [(True, 11), (False, 11), (False, 2), (False, 0), (True, 4)], most=2),
)
def test_several_counts_of_the_same_leaves(apart, count):
    rng = np.random.default_rng(0)
    leaves = [rng.normal(size=(70, 93)), rng.integers(-2, 3, size=(3, 45, 100)), rng.normal(size=8)]
    leaves = [x.astype(np.float32) for x in leaves]
    leaves[0][3] = np.nan

    def masks(leaves, ks):
        found = keys.sources(leaves, False)
        groups = [[s] for s in found] if apart else [found]
        cuts = _select.smallest(groups, [Wide(*each) for each in zip(ks.high, ks.low, strict=True)])
        return kept(found, cuts)

    sizes = [x.size for x in leaves] if apart else [sum(x.size for x in leaves)]
    ks = np.stack([rng.integers(0, n + 1, size=count) for n in sizes], 1)
    ks[:1], ks[1:][-1:] = 0, sizes
    wide = jax.vmap(jax.vmap(_counts.wide))(jnp.asarray(ks, jnp.uint32))
    many = jax.vmap(masks, (None, 0))
    found = jax.jit(many)(leaves, wide)
    for row, k in enumerate(ks):
        if apart:
            expected = [expected_mask(x, n) for x, n in zip(leaves, k, strict=True)]
        else:
            flat = expected_mask(np.concatenate([x.ravel() for x in leaves]), k[0])
            parts = np.split(flat, np.cumsum([x.size for x in leaves])[:-1])
            expected = [m.reshape(x.shape) for m, x in zip(parts, leaves, strict=True)]
        for mask, m in zip(found, expected, strict=True):
            assert np.array_equal(mask[row], m)
    assert all(len(m) == count for m in found)
    if count in (2, 4):  # of several nets, and the other way round
        nets = [np.stack([x, x[::-1]]) for x in leaves]
        inner = jax.jit(jax.vmap(many, (0, None)))(nets, wide)
        outer = jax.jit(jax.vmap(jax.vmap(masks, (0, None)), (None, 0)))(nets, wide)
        for a, b, mask in zip(inner, outer, found, strict=True):
            assert np.array_equal(a, np.swapaxes(b, 0, 1))
            assert np.array_equal(a[0], mask)
        each = jax.jit(jax.vmap(masks))(nets, jax.tree.map(lambda k: k[:2], wide))
        for a, b in zip(each, inner, strict=True):
            assert np.array_equal(a, np.stack([b[0, 0], b[1, 1]]))


def test_several_counts_share_their_passes():
    x, passes = np.random.default_rng(0).normal(size=40_000).astype(np.float32), []

    def key(x):
        jax.debug.callback(lambda: passes.append(1))
        return keys.magnitude_key(x)

    def value(x, k):
        return _select.one_cut(keys.Source(key, (x,)), k).value

    ks = jax.vmap(_counts.wide)(jnp.arange(100, 40_000, 5000, dtype=jnp.uint32))
    jax.block_until_ready(jax.jit(value)(x, jax.tree.map(lambda k: k[3], ks)))
    jax.effects_barrier()
    one = len(passes)
    passes.clear()
    found = jax.block_until_ready(jax.jit(jax.vmap(value, (None, 0)))(x, ks))
    jax.effects_barrier()
    order = np.sort(np.abs(x)).view(np.uint32)
    assert found.shape == (8,)
    assert all(order[k - 1] <= v <= order[k] for k, v in zip(range(100, 40_000, 5000), found))
    assert len(passes) < 4 * one


def test_without_jit():
    x = np.random.default_rng(0).normal(size=(40, 110)).astype(np.float32)
    with jax.disable_jit(), near("concrete"):
        found = keys.sources([jnp.asarray(x)], False)
        (mask,) = kept(found, _select.smallest([found], [1000]))
        assert np.array_equal(mask, expected_mask(x, 1000))


@pytest.mark.parametrize("name", ["float32", "int32"])
def test_rows_of_a_batch(name):
    x = np.random.default_rng(0).integers(-4, 5, size=(30, 17)).astype(name)
    for k in range(18):
        each = jax.vmap(lambda row, k=k: _select.row_kept(keys.magnitude_key(row), jnp.uint32(k)))
        masks = each(x)
        assert all(np.array_equal(m, expected_mask(row, k)) for m, row in zip(masks, x))


# -- counts -----------------------------------------------------------------------------------


def number(wide):
    return (int(wide.high) << 16) + int(wide.low)


traced_count = jax.jit(_counts.count)
sizes = st.integers(0, 2**46) | st.integers(0, 300)


@given(st.floats(0, 1, width=32), sizes)
def test_a_traced_count_is_exact(s, n):
    assert number(traced_count(jnp.float32(s), _counts.wide(n))) == round(Fraction(s) * n)
    assert _counts.count(jnp.float32(s), n) == round(Fraction(s) * n)


@given(st.integers(0, 64), sizes)
def test_a_traced_count_rounds_half_to_even(parts, n):
    s = parts / 64
    assert number(traced_count(jnp.float32(s), _counts.wide(n))) == round(Fraction(s) * n)


@pytest.mark.parametrize("s", [0.0, 0.1, 0.15, 0.3, 0.5, 2 / 3, 0.9, 0.999, 1 - 2**-53, 1.0, 1e-12])
def test_a_python_number_counts_as_in_python_where_n_is_traced(s):
    count = jax.jit(lambda n: _counts.count(s, n))
    rng = np.random.default_rng(0)
    for n in [
        *range(60),
        *map(int, rng.integers(0, 2**32, 40)),
        *map(int, rng.integers(0, 2**40, 9)),
    ]:
        assert number(count(_counts.wide(n))) == round(s * n), n


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40), st.floats(0, 1))
def test_totals_beyond_32_bits(counts, share):
    array = jnp.asarray(np.array(counts, np.uint32))
    everything = sum(counts)
    total = _counts.total(array)
    assert number(total) == everything
    part = int(share * everything)
    assert number(_counts.minus(total, _counts.wide(part))) == everything - part
    assert bool(_counts.less(_counts.wide(part), total)) == (part < everything)
    difference = float(_counts.difference(total, _counts.wide(part)))
    assert math.isclose(difference, everything - part, rel_tol=1e-6, abs_tol=0.5)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=3, max_size=3), st.floats(0, 1))
def test_ties_are_shared_out_beyond_32_bits(tied, share):
    kept = int(share * sum(tied))
    stays = jax.jit(_select._stays)(_counts.wide(kept), jnp.asarray(np.array(tied, np.uint32)))
    rest = kept
    for stay, size in zip(stays, tied, strict=True):
        assert int(stay) == min(rest, size)
        rest -= int(stay)


@given(st.integers(1, 10**11), st.integers(0, 2**31), st.integers(1, 2**20))
def test_the_search_beyond_32_bits(k, first, step):
    """Keys ``first + i * step``, each three million times, counted by a formula."""
    many, kinds = 3_000_000, 40_000
    k = k % (many * kinds) + 1
    guess = jnp.array([0, 2**31, 2**32 - 1], jnp.uint32)

    def below(trial):
        return min(max(-(-(trial - first) // step), 0), kinds) * many

    everything = _counts.wide(many * kinds)
    state = _select._start_jit(guess, jnp.float32(1e9), _counts.wide(k), everything)
    passes = 0
    last = first + (kinds - 1) * step
    if last >= 2**32 - 1:
        return  # such keys don't exist
    while not state.done:
        state = _select._step_jit(state, _counts.wide(below(int(state.trial))), _counts.wide(k))
        passes += 1
        assert passes < 100
    # The k-th key is the one below the bracket's upper end.
    assert below(int(state.hi)) >= k > below(int(state.lo)) or below(int(state.hi)) == k


def test_leaves_beyond_32_bits_are_refused():
    big = jax.ShapeDtypeStruct((1 << 16, 1 << 16), np.float32)
    with pytest.raises(fwt.FwtError, match=r"2\*\*32"):
        jax.eval_shape(fwt.prune(0.5), {"d": {"kernel": big}})


# -- how it works -----------------------------------------------------------------------------


def tree(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {
        f"d{i}": {"kernel": jnp.asarray(rng.normal(size=s).astype(np.float32))}
        for i, s in enumerate(shapes)
    }


@pytest.mark.optimised
def test_nothing_is_sorted_joined_or_stored():
    params = tree([(512, 300)] * 5)
    low = jax.jit(fwt.prune(0.9, scope="global")).lower(params).compile()
    text = low.as_text()
    assert " sort(" not in text
    assert "concatenate(f32" not in text
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    assert low.memory_analysis().temp_size_in_bytes < 0.3 * size


@pytest.mark.parametrize("settings", thorough_but(1, [{"scope": "erk"}, {}, {"scope": "global"}]))
def test_outside_a_jit_it_compiles_once_for_each_shape(settings, monkeypatch):
    cached = (_select._below_jit, sample.strided, chosen._pruned)
    shape = {"layer": (67, 91), "global": (69, 91), "erk": (71, 91)}[settings.get("scope", "layer")]
    jax.clear_caches()  # JAX holds so many functions in all, and drops the oldest of a full cache
    monkeypatch.setattr(keys, "_NEAR", -1)
    before = [f._cache_size() for f in cached]
    fwt.prune(0.9, **settings)(tree([shape] * 3))
    once = [f._cache_size() for f in cached]
    assert all(b < a <= b + 1 for b, a in zip(before, once, strict=True))
    fwt.prune(0.8, **settings)(tree([shape] * 9, seed=1))
    assert [f._cache_size() for f in cached] == once


@pytest.mark.optimised
def test_counts_are_exact_of_weights_that_the_same_jit_makes():
    """A product that is added in two places may be rounded in two ways: the search and the masks
    have to read the same numbers."""

    @jax.jit
    def step(w, g, s):
        tree = {"a": {"kernel": w - 0.1 * g}, "b": {"kernel": (w * 0.9 + g * s)[:5]}}
        new = fwt.prune(s, scope="global")(tree)
        return sum(jnp.sum(x == 0) for x in jax.tree.leaves(new))

    rng = np.random.default_rng(0)
    for _ in range(60):
        w, g = rng.normal(size=(2, 3, 40, 30)).astype(np.float32)
        assert step(w[0], g[0], 0.5) == 675
        assert jax.vmap(step, (0, 0, None))(w, g, 0.5).tolist() == [675] * 3


def test_few_passes(monkeypatch):
    passes = []
    step = _select._step_jit
    monkeypatch.setattr(_select, "_step_jit", lambda *a: passes.append(1) or step(*a))
    rng = np.random.default_rng(0)
    for draw in (rng.normal, rng.laplace, lambda size: rng.uniform(size=size)):
        x = jnp.asarray(draw(size=1_000_000).astype(np.float32))
        for k in (500_000, 900_000, 990_000):
            passes.clear()
            _select.smallest([keys.sources([x], False)], [k])
            assert len(passes) <= 20
    for atoms in (jnp.ones(1_000_000), jnp.round(x * 4)):
        passes.clear()
        _select.smallest([keys.sources([atoms], False)], [900_000])
        assert len(passes) <= 60


SHARDED = """
import re, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import fwt

rng = np.random.default_rng(0)


def put(x, spec):
    return jax.device_put(x.astype("f"), NamedSharding(mesh, spec))


def elements(dims):
    return np.prod([int(d or 1) for d in dims.split(",")])


# Shards that 8 divides, shards that it doesn't, and one axis split by two.
CASES = [((1024, 512), P("x", "y")), ((1000, 504), P("x", "y")), ((40, 24), P("y", "x")),
         ((300, 256), P(None, "x")), ((96, 1024), P("x", None)), ((64, 2), P()),
         ((3, 3, 16, 64), P(None, None, None, "x")), ((136, 8, 256), P(("x", "y"), None, None))]
moves = r" (all-gather|all-to-all|collective-permute|reduce-scatter)[-a-z]*\\("
for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    with jax.set_mesh(mesh):
        params = {
            f"d{i}": {"kernel": put(rng.normal(size=s), spec)} for i, (s, spec) in enumerate(CASES)
        }
        host = {p: np.asarray(x) for p, x in fwt.select(params).items()}
        n = sum(x.size for x in host.values())
        for scope in sys.argv[1:]:
            t = fwt.prune(0.9, scope=scope)
            compiled = jax.jit(t).lower(params).compile()
            text = compiled.as_text()
            assert not re.search(moves, text), (kind, scope, re.findall(moves, text))
            sizes = re.findall(r"= \\(?[a-z0-9]+\\[([0-9,]*)\\][^=]* all-reduce", text)
            assert sizes and all(elements(dims) <= 3 for dims in sizes), sizes
            for new in (compiled(params), t(params)):  # under a jit and outside
                new = fwt.select(new)
                for path, x in new.items():
                    assert x.sharding.is_equivalent_to(fwt.select(params)[path].sharding, x.ndim)
                zero = {p: np.asarray(x) == 0 for p, x in new.items()}
                if scope == "layer":
                    assert all(z.sum() == round(0.9 * z.size) for z in zero.values())
                else:
                    assert sum(z.sum() for z in zero.values()) == round(0.9 * n)
                if scope == "global":
                    gone = max(np.abs(host[p][z]).max() for p, z in zero.items() if z.any())
                    kept = min(np.abs(host[p][~z]).min() for p, z in zero.items() if not z.all())
                    assert gone <= kept
                else:
                    for p, z in zero.items():
                        if z.any() and not z.all():
                            assert np.abs(host[p][z]).max() <= np.abs(host[p][~z]).min()
        some = {p: params[p] for p in ("d0", "d1", "d3")}
        shares = jnp.array([0.2, 0.9])
        t = jax.vmap(lambda p, s: fwt.prune(s, scope="global")(p), (None, 0))
        compiled = jax.jit(t).lower(some, shares).compile()
        assert not re.search(moves, compiled.as_text())
        many = compiled(some, shares)
        for i, s in enumerate((0.2, 0.9)):
            one = fwt.select(fwt.prune(jnp.float32(s), scope="global")(some))
            for path, x in fwt.select(many).items():
                assert np.array_equal(x[i], one[path])
        ties = {"d": {"kernel": put(np.ones((1000, 8)), P("x", None))}}
        flat = np.asarray(jax.jit(fwt.prune(0.3))(ties)["d"]["kernel"]).ravel()
        assert flat[:5600].all() and not flat[5600:].any()
print("fine")
"""


@pytest.mark.thorough
def test_on_a_mesh_only_counts_cross_devices(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SHARDED, "global", "layer", "erk"],
        env={
            **{n: v for n, v in os.environ.items() if not n.startswith("COVERAGE_")},
            "XLA_FLAGS": f"--xla_force_host_platform_device_count=8 {OLDER}",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        },
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.stdout.strip() == "fine", done.stderr[-3000:]
