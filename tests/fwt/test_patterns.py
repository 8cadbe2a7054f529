"""Scopes, patterns and other libraries' counts, each against its definition or its library."""

import itertools
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
import torch
import torch.nn.utils.prune as torch_prune
from hypothesis import given
from hypothesis import strategies as st
from marks import DRAWS, thorough_but

import fwt
from fwt import converters
from fwt import layers as fl

P, S = fwt.patterns, fwt.scores
SHAPES = {"conv": (3, 3, 8, 16), "dense_1": (24, 12), "dense_2": (12, 8)}


def tree(seed=0, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return {n: {"kernel": rng.normal(size=s).astype(np.float32)} for n, s in shapes.items()}


def zeros(params):
    return {p: int((np.asarray(x) == 0).sum()) for p, x in fwt.select(params).items()}


# -- every score with every scope and every pattern --------------------------------------------

SCORES = {
    "magnitude": S.magnitude,
    "random": S.random(key=0),
    "saliency": S.saliency(grads=tree(1)),
    "movement": S.movement(grads=tree(1)),
    "a user's": lambda params: jax.tree.map(jnp.sin, params),
}
SCOPES = ["layer", "global", "normalized", "erk", "lamp", {"conv/*": 0.25, "**": 0.5}, "output"]
PATTERNS = {
    "unstructured": (P.unstructured, {n: np.prod(s) for n, s in SHAPES.items()}),
    "n_m": (P.n_m(2, 4), {n: np.prod(s) for n, s in SHAPES.items()}),
    "block": (P.block((4, 2)), {n: np.prod(s) // 8 for n, s in SHAPES.items()}),
    "channel": (P.channel, {n: s[-1] for n, s in SHAPES.items()}),
    "in": (P.channel("in", pool="l2"), {n: s[-2] for n, s in SHAPES.items()}),
}


# Of each score, scope and pattern every pair stands in some case, of which half are thorough.
PRODUCT = [
    ((i + j + 2 * k) % 5 or (i + k) % 2, score, pattern, scope)
    for (i, score), (j, pattern), (k, scope) in itertools.product(
        enumerate(SCORES), enumerate(PATTERNS), enumerate(SCOPES)
    )
    if (i + j + 2 * k) % 5 < DRAWS
]


@pytest.mark.parametrize(
    ("score", "pattern", "scope"),
    [
        pytest.param(
            score, pattern, scope,
            id=f"{score}-{pattern}-{scope if isinstance(scope, str) else 'dict'}",
            marks=pytest.mark.thorough if turn else [],
        )
        for turn, score, pattern, scope in PRODUCT
    ],
)  # fmt: skip
def test_each_score_goes_with_each_scope_and_pattern(score, pattern, scope):
    params, s = tree(), None if isinstance(scope, dict) else 0.5
    kind, units = PATTERNS[pattern]
    if pattern == "n_m" and scope in ("erk", "lamp"):
        with pytest.raises(fwt.FwtError, match=r"more zeros than fwt.patterns.n_m\(2, 4\)"):
            fwt.prune(s, SCORES[score], scope=scope, pattern=kind)
        return
    if scope == "output" and pattern not in ("unstructured", "n_m"):
        with pytest.raises(fwt.LeafError, match=r"within each output, and .* has no two units of"):
            fwt.prune(s, SCORES[score], scope=scope, pattern=kind)(params)
        return
    t = fwt.prune(s, SCORES[score], scope=scope, pattern=kind)
    new = t(params)
    size = {n: np.prod(SHAPES[n]) // u for n, u in units.items()}
    gone = {n: zeros(new)[f"{n}/kernel"] / size[n] for n in SHAPES}
    assert all(g == int(g) for g in gone.values())  # whole units
    if scope == "output":
        for n, shape in SHAPES.items():
            columns = np.asarray(new[n]["kernel"]).reshape(-1, shape[-1])
            assert set((columns == 0).sum(0)) == {round(0.5 * len(columns))}
    elif scope == "layer":
        assert gone == {n: round(0.5 * int(u)) for n, u in units.items()}
    elif isinstance(scope, dict):
        share = {"conv": 0.25, "dense_1": 0.5, "dense_2": 0.5}
        assert gone == {n: round(share[n] * int(u)) for n, u in units.items()}
    else:
        assert sum(gone.values()) == round(0.5 * int(sum(units.values())))
    if score == "magnitude":  # a traced sparsity is the same, compiled or not
        again = jax.jit(lambda p, s: fwt.prune(s, scope=scope, pattern=kind)(p))(params, s)
        assert jax.tree.all(jax.tree.map(jnp.array_equal, again, new))


# -- scopes -----------------------------------------------------------------------------------


OUTPUTS: dict = {  # the shape of a leaf, and the axes of its outputs
    "d/kernel": ((9, 4), (1,)),
    "query/kernel": ((6, 2, 3), (1, 2)),
    "c/kernel": ((3, 2, 5, 4), (3,)),
    "depthwise/kernel": ((3, 3, 1, 4), (3,)),
    "out/kernel": ((2, 3, 6), (2,)),
    "t/weight": ((4, 7), (0,)),
}


@pytest.mark.parametrize("path", thorough_but(1, OUTPUTS))
def test_the_scope_of_an_output_compares_what_one_output_has(path):
    shape, axes = OUTPUTS[path]
    layer, leaf = path.split("/")
    kernel = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    params = {layer: {leaf: kernel}}
    t = fwt.prune(0.4, scope="output")
    traced = jax.jit(lambda p, s: fwt.prune(s, scope="output")(p))
    for new in (t(params), traced(params, 0.4)):
        count = np.prod([shape[i] for i in axes])
        rows, found = (
            np.moveaxis(x, axes, range(len(axes))).reshape(count, -1)
            for x in (kernel, np.asarray(new[layer][leaf]))
        )
        k = round(0.4 * rows.shape[1])
        for row, left in zip(rows, found, strict=True):
            assert {*np.flatnonzero(left == 0)} == {*np.argsort(np.abs(row))[:k]}


@pytest.mark.thorough
def test_the_scope_of_an_output_with_stacks_and_patterns():
    kernel = np.random.default_rng(0).normal(size=(3, 8, 4)).astype(np.float32)
    new = fwt.prune(0.25, scope="output", axes={"kernel": "stack in out"})({"kernel": kernel})
    assert ((np.asarray(new["kernel"]) == 0).sum(1) == 2).all()
    blocks = fwt.prune(0.5, scope="output", pattern=P.block((4, 1)))({"kernel": kernel[0]})
    gone = np.asarray(blocks["kernel"]).reshape(2, 4, 4) == 0
    assert (gone.all(1).sum(0) == 1).all()
    assert (gone.any(1).sum(0) == 1).all()


def test_the_scope_of_an_output_says_where_it_compares_nothing():
    params = {"d": {"kernel": np.ones((8, 4), np.float32), "bias": np.ones(4, np.float32)}}
    for settings, said in (
        ({"where": "d/bias"}, r"d/bias of shape \(4,\) has no two there: leave it out"),
        ({"pattern": P.block((1, 2))}, "or take another scope or pattern"),
    ):
        with pytest.raises(fwt.LeafError, match=said):
            fwt.prune(0.6, scope="output", **settings)(params)
    with pytest.raises(fwt.FwtError, match="output, erk and lamp say nothing"):
        fwt.prune(threshold=0.1, scope="output")


def test_global_and_normalized_compare_leaves():
    params = {
        "a": {"kernel": np.array([[1.0, 2.0]], "f")},
        "b": {"kernel": np.array([[30.0, 9.0]], "f")},
    }
    assert zeros(fwt.prune(0.5, scope="global")(params)) == {"a/kernel": 2, "b/kernel": 0}
    assert zeros(fwt.prune(0.5, scope="normalized")(params)) == {"a/kernel": 1, "b/kernel": 1}
    silent = {"a": {"kernel": np.zeros((1, 2), "f")}, "b": {"kernel": np.full((1, 2), 1e-30, "f")}}
    assert zeros(fwt.prune(0.5, scope="normalized")(silent)) == {"a/kernel": 2, "b/kernel": 0}


# Densities of the published implementation for 90 % over these shapes.
ERK = {
    "conv": ((3, 3, 16, 32), 0.819386),
    "small": ((100, 10), 0.0),
    "large": ((512, 256), 0.909693),
}


def test_erk_gives_the_published_densities():
    params = tree(0, {n: s for n, (s, _) in ERK.items()})
    total = sum(int(np.prod(s)) for s, _ in ERK.values())
    found = zeros(fwt.prune(0.9, scope="erk")(params))
    assert sum(found.values()) == round(0.9 * total)
    for name, (shape, sparsity) in ERK.items():
        assert abs(found[f"{name}/kernel"] / np.prod(shape) - sparsity) < 1e-3
    like = zeros(fwt.prune(0.9, scope="erk", like="jaxpruner")(params))
    for name, (shape, sparsity) in ERK.items():
        n = int(np.prod(shape))
        assert abs(like[f"{name}/kernel"] - sparsity * n) <= max(1, 1e-6 * n)
    traced = jax.jit(lambda p, s: fwt.prune(s, scope="erk")(p))(params, 0.9)
    assert sum(zeros(traced).values()) == round(0.9 * total)


# From jaxpruner's own tests: shapes, sparsity, and the sparsities to two places.
@pytest.mark.parametrize(
    ("shapes", "s", "expected"),
    [
        ({"a": (2, 4)}, 0.5, {"a": 0.5}),
        ({"a": (2, 4), "c": (3, 6, 7), "d": (7, 4)}, 0.5, {"a": 0.0, "c": 0.64, "d": 0.0}),
        ({"a": (2, 4), "c": (3, 6, 7)}, 0.5, {"a": 0.0, "c": 0.53}),
        ({"a": (2, 4), "b": (3, 6), "c": (2, 4, 6)}, 0.5, {"a": 0.0, "b": 0.31, "c": 0.655}),
        ({"a": (2, 4), "b": (3, 6), "c": (2, 4, 6)}, 0.8, {"a": 0.556, "b": 0.70, "c": 0.85}),
    ],
)
def test_erk_against_published_vectors(shapes, s, expected):
    params = tree(0, shapes)
    for like in (None, "jaxpruner"):
        found = zeros(fwt.prune(s, scope="erk", like=like)(params))
        for name, share in expected.items():
            n = int(np.prod(shapes[name]))
            assert abs(found[f"{name}/kernel"] - share * n) <= 1 + 0.006 * n, (like, name)


sizes = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6)


@given(sizes, st.floats(0, 1, width=32), st.sampled_from(["erk", "lamp"]))
def test_counts_sum_up_to_the_whole(shapes, s, scope):
    params = tree(0, {f"d{i}": shape for i, shape in enumerate(shapes)})
    total = sum(a * b for a, b in shapes)
    assert sum(zeros(fwt.prune(float(s), scope=scope)(params)).values()) == round(float(s) * total)


@given(st.floats(0, 1, width=32))
def test_counts_sum_up_to_the_whole_when_traced(s):
    params = tree(0, {"a": (7, 5), "b": (3, 3), "c": (1, 9), "d": (40, 2)})
    for scope, compiled in TRACED.items():
        found = sum(zeros(compiled(params, s)).values())
        assert found == round(float(s) * 133), scope


TRACED = {
    scope: jax.jit(lambda p, s, scope=scope: fwt.prune(s, scope=scope)(p))
    for scope in ("erk", "lamp")
}


def lamp(params, k):
    """By the paper: sort, divide by the sum of what is not smaller, and prune the least."""
    scores, places = [], []
    for name, leaf in params.items():
        w = np.sort(np.abs(leaf["kernel"].ravel().astype(np.float64))) ** 2
        scores.append(w / np.cumsum(w[::-1])[::-1])
        places += [name] * w.size
    order = np.argsort(np.concatenate(scores), kind="stable")
    gone = [places[i] for i in order[:k]]
    return {f"{n}/kernel": gone.count(n) for n in params}


@pytest.mark.parametrize("s", [0.3, 0.7, 0.95])
def test_lamp_by_the_paper(s):
    params = tree(0)
    params["dense_2"]["kernel"] *= 50
    total = sum(x.size for x in fwt.select(params).values())
    assert zeros(fwt.prune(s, scope="lamp")(params)) == lamp(params, round(s * total))


def test_a_mapping_takes_the_first_glob_that_matches():
    params = tree()
    found = zeros(fwt.prune(scope={"dense_2/*": 0.0, "dense_*/kernel": 0.5, "**": 0.25})(params))
    assert found == {"conv/kernel": 288, "dense_1/kernel": 144, "dense_2/kernel": 0}
    half = zeros(fwt.prune(0.5, scope={"**": 0.5})(params))  # a factor on all
    assert half == {"conv/kernel": 288, "dense_1/kernel": 72, "dense_2/kernel": 24}
    with pytest.raises(fwt.WhereError, match=r"'dense/\*'.*matches no selected leaf.*dense_1"):
        fwt.prune(scope={"dense/*": 0.5, "**": 0.1})(params)
    with pytest.raises(fwt.WhereError, match="no sparsity for 'conv/kernel'"):
        fwt.prune(scope={"dense_*/*": 0.5})(params)


# -- n:m --------------------------------------------------------------------------------------


def groups_of(kernel, m):
    """The groups of m inputs of each output, for (..., in, out)."""
    moved = np.moveaxis(np.asarray(kernel), -2, -1)
    return moved.reshape(-1, m)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 2), (3, 8), (7, 8)])
def test_n_m_keeps_the_largest_of_each_group(n, m):
    params = tree(0, {"conv": (3, 1, 16, 5), "d": (24, 7)})
    new = fwt.prune(pattern=P.n_m(n, m))(params)
    for name, leaf in params.items():
        for old, now in zip(groups_of(leaf["kernel"], m), groups_of(new[name]["kernel"], m)):
            keep = np.argsort(-np.abs(old), kind="stable")[:n]
            assert set(np.flatnonzero(now)) == set(keep)


def test_n_m_ties_and_nans():
    row = np.array([1, 1, 1, 1, np.nan, np.inf, np.nan, 2], np.float32)[:, None]
    kept = np.asarray(fwt.masks(pattern=P.n_m(2, 4))({"d": {"kernel": row}})["d"]["kernel"]).ravel()
    assert kept.tolist() == [True, True, False, False, True, False, True, False]
    last = fwt.masks(pattern=P.n_m(2, 4), like="jaxpruner")({"d": {"kernel": row}})["d"]["kernel"]
    assert np.asarray(last).ravel()[:4].tolist() == [False, False, True, True]


def test_a_lower_sparsity_prunes_the_least_of_what_may_go():
    params = tree()
    for scope in ("layer", "global"):
        new = fwt.prune(0.25, scope=scope, pattern=P.n_m(2, 4))(params)
        whole = fwt.masks(pattern=P.n_m(2, 4))(params)
        worst, best = [], []
        for path, x in fwt.select(new).items():
            gone, may = np.asarray(x) == 0, ~np.asarray(fwt.select(whole)[path])
            assert not (gone & ~may).any()
            old = np.abs(fwt.select(params)[path])
            worst.append(old[gone].max())
            best.append(old[may & ~gone].min())
            assert scope == "global" or worst[-1] <= best[-1]
        assert max(worst) <= min(best) or scope == "layer"


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_n_m_of_other_layouts():
    heads = {"query": {"kernel": normal(0, 8, 2, 3)},
             "out": {"kernel": normal(1, 2, 4, 5)}}  # fmt: skip
    new = fwt.prune(pattern=P.n_m(2, 4))(heads)
    assert (
        np.count_nonzero(np.asarray(new["query"]["kernel"]).reshape(2, 4, 6), axis=1) == 2
    ).all()
    assert (np.count_nonzero(np.asarray(new["out"]["kernel"]).reshape(2, 4, 5), axis=1) == 2).all()
    weight = {"fc": {"weight": normal(2, 3, 8)}}  # torch's
    new = fwt.prune(pattern=P.n_m(2, 4))(weight)
    assert (np.count_nonzero(np.asarray(new["fc"]["weight"]).reshape(3, 2, 4), axis=2) == 2).all()
    conv = {"c": {"weight": normal(3, 3, 8, 2, 2)}}
    with pytest.raises(fwt.AxesError, match="axes="):
        fwt.prune(pattern=P.n_m(2, 4))(conv)
    new = fwt.prune(pattern=P.n_m(2, 4), axes={"c/weight": "out in h w"})(conv)
    found = np.asarray(new["c"]["weight"]).reshape(3, 2, 4, 4)
    assert (np.count_nonzero(found, axis=2) == 2).all()


def test_an_indivisible_leaf_says_which_where_leaves_it_out():
    params = tree(0, {"conv_1": (3, 3, 1, 8), "conv_2": (3, 3, 8, 8), "a*b": (8, 3)})
    with pytest.raises(fwt.LeafError) as caught:
        fwt.prune(pattern=P.n_m(2, 4))(params)
    said = str(caught.value)
    assert "conv_1/kernel of shape (3, 3, 1, 8) has 1 inputs, which 4 does not divide" in said
    where = eval(said.split("where=")[1])
    new = fwt.prune(pattern=P.n_m(2, 4), where=where)(params)
    assert zeros(new) == {"conv_1/kernel": 0, "conv_2/kernel": 288, r"a\*b/kernel": 12}
    with pytest.raises(fwt.LeafError, match="no leaf is left"):
        fwt.prune(pattern=P.n_m(2, 4), where="conv_1/*")(params)
    with pytest.raises(fwt.LeafError, match="not tiled by blocks"):
        fwt.prune(0.5, pattern=P.block((3, 2)))(params)


def flattened_net():
    layers = [("c", nn.Conv(8, (3, 3))), ("f", fl.Flatten()), ("drop", nn.Dropout(0.5))]
    layers += [("d", nn.Dense(6)), ("e", nn.Dense(4))]
    net = fwt.Sequential(layers, input_shape=(4, 3, 4))
    return fwt.Model(net, net.init(jax.random.key(0), jnp.ones((1, 4, 3, 4))))


@pytest.mark.parametrize("how", ["module", "flattened"])
def test_n_m_in_the_other_order_behind_a_flatten(how):
    """In torch the kernel's inputs are (c, h, w), here (h, w, c)."""
    model = flattened_net()
    pattern, subject = P.n_m(2, 4, order="chw"), model
    if how == "flattened":
        pattern = P.n_m(2, 4, order="chw", flattened={"d/kernel": (4, 3, 8)})
        subject = model.variables
    t = fwt.prune(pattern=pattern, where=["c/kernel", "d/kernel"])
    new = fwt.select(t(subject))
    kernel = np.asarray(new["d/kernel"]).reshape(4, 3, 8, 6)
    theirs = kernel.transpose(2, 0, 1, 3).reshape(24, 4, 6)
    assert (np.count_nonzero(theirs, axis=1) == 2).all()
    assert not (np.count_nonzero(kernel.reshape(24, 4, 6), axis=1) == 2).all()
    assert (np.count_nonzero(np.asarray(new["c/kernel"]).reshape(3, 3, 1, 4, 8), axis=3) == 2).all()
    with pytest.raises(fwt.FwtError, match="input_shape=, or"):
        fwt.prune(pattern=P.n_m(2, 4, order="chw"))(model.variables)
    with pytest.raises(fwt.LeafError, match="96 inputs, which are not 2 x 2"):
        fwt.prune(pattern=P.n_m(2, 4, order="chw", flattened={"d/*": (2, 2)}), where="d/*")(
            {"d": {"kernel": np.ones((96, 2), "f")}}
        )


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: P.n_m(4, 4), "0 < n < m"),
        (lambda: P.n_m(0, 4), "at least 1"),
        (lambda: P.n_m(2.0, 4), "whole number"),
        (lambda: P.n_m(2, 4, order="cwh"), "'chw' or 'hwc'"),
        (lambda: P.n_m(2, 4, flattened={"d": 3}), "sizes"),
        (lambda: P.block(4), "inputs by outputs"),
        (lambda: P.block((0, 4)), "at least 1"),
        (lambda: P.block((4, 4), pool="avg"), "'mean', 'max'"),
        (lambda: P.channel(3), "name of an axis"),
    ],
)
def test_patterns_check_their_settings(call, said):
    with pytest.raises(fwt.FwtError, match=said):
        call()


# -- blocks and channels ----------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["mean", "max", "sum", "l2"])
def test_blocks_go_by_their_pool(pool):
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(3, 2, 6, 8)).astype(np.float32)
    new = np.asarray(
        fwt.prune(0.3, pattern=P.block((3, 2), pool=pool))({"c": {"kernel": kernel}})["c"]["kernel"]
    )
    parts = np.abs(kernel).reshape(3, 2, 2, 3, 4, 2).astype(np.float64)
    worth = {"mean": parts.mean((3, 5)), "max": parts.max((3, 5)), "sum": parts.sum((3, 5)),
             "l2": np.sqrt((parts**2).sum((3, 5)))}[pool]  # fmt: skip
    gone = (new.reshape(3, 2, 2, 3, 4, 2) == 0).all((3, 5))
    k = round(0.3 * worth.size)
    assert gone.sum() == k
    assert (new == 0).sum() == 6 * k
    assert worth[gone].max() <= worth[~gone].min()


def test_blocks_of_each_axis_and_named_axes():
    params = {"c": {"kernel": normal(0, 3, 3, 2, 4)}}
    new = np.asarray(fwt.prune(0.5, pattern=P.block((3, 3, 1, 1)))(params)["c"]["kernel"])
    assert (np.count_nonzero(new.reshape(9, 8), axis=0) % 9 == 0).all()
    assert (new == 0).sum() == 36
    heads = {"query": {"kernel": normal(1, 6, 4, 3)}}
    new = np.asarray(fwt.prune(0.5, pattern=P.channel("heads"))(heads)["query"]["kernel"])
    assert (~new.any((0, 2))).sum() == 2
    assert (new == 0).sum() == 36
    with pytest.raises(fwt.AxesError, match="no axis 'tails'"):
        fwt.prune(0.5, pattern=P.channel("tails"))(heads)
    with pytest.raises(fwt.AxesError, match="2 output axes"):
        fwt.prune(0.5, pattern=P.block((2, 2)))(heads)
    with pytest.raises(fwt.LeafError, match="3 axes, the block 4"):
        fwt.prune(0.5, pattern=P.block((1, 1, 1, 1)))(heads)


def attention(heads=4, dim=3, **more):
    layer = nn.MultiHeadDotProductAttention(num_heads=heads, qkv_features=heads * dim, **more)
    x = normal(5, 2, 7, 6)
    params = layer.init(jax.random.key(1), x)["params"]
    return layer, {**params, "key": {**params["key"], "kernel": params["key"]["kernel"] * 3}}, x


@pytest.mark.parametrize("pool", ["mean", "sum", "max", "l2"])
def test_a_head_goes_from_all_of_an_attention(pool):
    """What is left computes what Flax's layer of fewer heads does."""
    layer, params, x = attention()
    pruned = fwt.prune(0.5, pattern=P.channel("heads", pool=pool))({"a": params})["a"]
    at = {"query": 1, "key": 1, "value": 1, "out": 0}
    kernels = {n: np.moveaxis(np.asarray(pruned[n]["kernel"]), i, 0) for n, i in at.items()}
    worth = {n: np.abs(np.moveaxis(np.asarray(params[n]["kernel"]), i, 0)).reshape(4, -1)
             for n, i in at.items()}  # fmt: skip
    every = np.concatenate([*worth.values()], 1).astype(np.float64)
    each = {"mean": every.mean(1), "sum": every.sum(1), "max": every.max(1),
            "l2": (every**2).sum(1)}[pool]  # fmt: skip
    left = np.sort(np.argsort(each)[2:])
    for name, kernel in kernels.items():
        assert np.flatnonzero(kernel.any((1, 2))).tolist() == left.tolist(), name
        assert kernel[left].all()
    fewer, _, _ = attention(2)
    small = jax.tree.map(np.asarray, params)
    for name in ("query", "key", "value"):
        small[name] = {n: np.take(v, left, v.ndim - 2) for n, v in small[name].items()}
    small["out"] = {**small["out"], "kernel": small["out"]["kernel"][left]}
    found, expected = layer.apply({"params": pruned}, x), fewer.apply({"params": small}, x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_shares_that_would_tear_a_head_apart_are_refused():
    _, params, _ = attention()
    heads = P.channel("heads")
    with pytest.raises(fwt.FwtError, match="different shares: one glob for all"):
        fwt.prune(scope={"**/query/kernel": 0.25, "**": 0.75}, pattern=heads)({"a": params})
    found = fwt.prune(scope={"a/**": 0.5}, pattern=heads)({"a": params})["a"]
    gone = {n: ~np.asarray(found[n]["kernel"]).any((0, 2) if n != "out" else (1, 2)) for n in found}
    assert len({tuple(x) for x in gone.values()}) == 1
    assert gone["out"].sum() == 2


def test_heads_of_stacks_of_masks_in_training_and_of_live_models():
    """Wherever heads are counted."""

    def gone(kernels):
        zeros = {p: ~np.asarray(x).any(tuple(i for i in range(x.ndim) if i != a))
                 for p, x, a in kernels}  # fmt: skip
        return {tuple(z) for z in zeros.values()}

    def by_axis(tree):
        return [(n, np.asarray(tree[n]["kernel"]), 0 if n == "out" else 1)
                for n in ("query", "key", "value", "out")]  # fmt: skip

    heads = P.channel("heads")
    _, params, _ = attention()
    stacked = jax.tree.map(
        lambda *xs: jnp.stack(xs), params, jax.tree.map(lambda x: x[::-1], params)
    )
    for trees in (
        [fwt.prune(0.5, pattern=heads)(params)],
        [jax.jit(fwt.prune(0.5, pattern=heads))(params)],
        [fwt.masks(0.25, pattern=heads)(params)],
        [fwt.prune(threshold=0.3, pattern=heads)(params)],
        [fwt.prune(0.5, lambda p: jax.tree.map(jnp.abs, p), pattern=heads)(params)],
        [fwt.chain(*[fwt.prune(0.5, pattern=heads, like="torch")] * 2)(params)],
    ):
        for tree in trees:
            assert len(gone(by_axis(tree))) == 1
    (three,) = gone(by_axis(trees[0]))
    assert sum(three) == 3
    names = {f"**/{n}/kernel": "stack in heads dim" for n in ("query", "key", "value")}
    names["**/out/kernel"] = "stack heads dim out"
    both = fwt.prune(0.5, pattern=heads, axes=names)({"a": stacked})["a"]
    for one in (jax.tree.map(lambda x: x[0], both), jax.tree.map(lambda x: x[1], both)):
        assert len(gone(by_axis(one))) == 1
    tx = fwt.optim.sparsify(optax.sgd(0.1), 0.5, pattern=heads)
    state = tx.init(params)
    for _ in range(2):
        updates, state = jax.jit(tx.update)(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
    assert len(gone(by_axis(params))) == 1
    assert len(gone(by_axis(state.masks))) == 1

    ends = keras.Input((5, 6))
    net = keras.Model(ends, keras.layers.MultiHeadAttention(4, 3, name="mha")(ends, ends))
    converters.transform(net, fwt.prune(0.5, pattern=heads))
    layer = net.get_layer("mha")
    kernels = [(d.name, np.asarray(d.kernel), 1) for d in
               (layer.query_dense, layer.key_dense, layer.value_dense)]  # fmt: skip
    (found,) = gone([*kernels, ("out", np.asarray(layer.output_dense.kernel), 0)])
    assert sum(found) == 2


def test_heads_that_can_not_go_together_are_refused():
    _, params, _ = attention()
    heads = P.channel("heads")
    for scope in ("global", "normalized", "erk", "lamp", "output"):
        with pytest.raises(fwt.FwtError, match=r"take scope='layer', or where="):
            fwt.prune(0.5, pattern=heads, scope=scope)({"a": params})
    other = {"a": {**params, "key": {"kernel": normal(1, 6, 2, 3)}}}
    with pytest.raises(fwt.LeafError, match=r"where=\['a/out/kernel', 'a/query/kernel', 'a/value"):
        fwt.prune(0.5, pattern=heads)(other)


def test_a_nan_keeps_its_block_in_sight():
    kernel = np.full((4, 2), 5.0, np.float32)
    kernel[0, 0], kernel[1, 0] = np.nan, 0
    new = np.asarray(fwt.prune(0.5, pattern=P.channel)({"d": {"kernel": kernel}})["d"]["kernel"])
    assert np.isnan(new[0, 0])
    assert not new[:, 1].any()


def test_thresholds_of_channels():
    params = {"d": {"kernel": np.array([[1.0, 3.0], [1.0, 5.0]], np.float32)}}
    new = fwt.prune(threshold=2.0, pattern=P.channel)(params)["d"]["kernel"]
    assert new.tolist() == [[0.0, 3.0], [0.0, 5.0]]


# -- like other libraries ---------------------------------------------------------------------


def torch_counts(sizes, *calls):
    """How many of each layer torch prunes, call after call."""
    layers = [torch.nn.Linear(n, 1, bias=False) for n in sizes]
    for layer, weights in zip(layers, torch_weights(sizes), strict=True):
        layer.weight.data = torch.from_numpy(weights.T.copy())
    found = []
    for call in calls:
        call(layers)
        found.append([int((layer.weight == 0).sum()) for layer in layers])
    return found


def torch_weights(sizes):
    rng = np.random.default_rng(0)
    return [
        rng.permutation(np.arange(1, n + 1)).astype("f")[:, None] + 0.1 * i
        for i, n in enumerate(sizes)
    ]


SIZES = (5, 12, 33, 101)


@pytest.mark.parametrize("amount", thorough_but(4, [0.3, 0.85, 1, 4, 0.0, 0.1, 0.5, 1.0], most=2))
def test_torchs_counts_again_and_again(amount):
    def each(layers):
        for layer in layers:
            torch_prune.l1_unstructured(layer, "weight", amount)

    rounds = 1 if isinstance(amount, int) and amount > 1 else 3
    theirs = torch_counts(SIZES, *[each] * rounds)
    t = fwt.prune(amount, like="torch")
    params = {f"d{i}": {"kernel": w} for i, w in enumerate(torch_weights(SIZES))}
    compiled = jax.jit(t)
    for expected in theirs:
        traced, params = compiled(params), t(params)
        assert list(zeros(params).values()) == expected
        assert zeros(traced) == zeros(params)


@pytest.mark.parametrize("amount", [0.2, 0.5, 7])
def test_torchs_global_counts(amount):
    def joint(layers):
        torch_prune.global_unstructured(
            [(layer, "weight") for layer in layers], torch_prune.L1Unstructured, amount=amount
        )

    theirs = torch_counts(SIZES, joint, joint)
    params = {f"d{i}": {"kernel": w} for i, w in enumerate(torch_weights(SIZES))}
    t = fwt.prune(amount, scope="global", like="torch")
    for expected in theirs:
        params = t(params)
        assert list(zeros(params).values()) == expected


def test_torchs_random_and_structured_counts():
    layer = torch.nn.Conv2d(3, 14, 2, bias=False)
    weight = layer.weight.detach().numpy().copy()
    params = {"c": {"weight": weight}}
    axes = {"c/weight": "out in h w"}
    pattern = P.channel(pool="l2")
    for amount in (0.3, 0.3, 0.5):
        torch_prune.ln_structured(layer, "weight", amount, n=2, dim=0)
        params = fwt.prune(amount, pattern=pattern, like="torch", axes=axes)(params)
        assert np.array_equal(np.asarray(params["c"]["weight"]), layer.weight.detach().numpy())
    other = torch.nn.Linear(37, 5)
    torch_prune.random_unstructured(other, "weight", 0.33)
    new = fwt.prune(0.33, S.random, key=0, like="torch")({"d": {"weight": np.ones((5, 37), "f")}})
    assert zeros(new)["d/weight"] == int((other.weight == 0).sum())
    with pytest.raises(fwt.FwtError, match="only 3 of 3 are left"):
        fwt.prune(4, like="torch")({"d": {"kernel": np.ones((1, 3), "f")}})


ONES = np.ones(8)
MIXED = np.array([1, 0.5, 0.3, 0.2, 1, 1.5, 1.8, 2.0, 1, 1])
GRID = np.array(
    [
        [69, 37, 96, 81, 79, 55, 88, 53, 66, 88, 40, 83, 13, 80, 91, 96],
        [34, 17, 7, 74, 13, 13, 83, 76, 13, 92, 25, 75, 37, 42, 65, 46],
    ]
)


@pytest.mark.parametrize(
    ("scores", "s", "expected"),
    [
        (GRID, 0.8, "0010001001000011 0000000001000000"),
        (ONES, 0.5, "11110000"),
        (MIXED, 0.5, "1000111100"),
        (np.stack([MIXED, MIXED]), 0.5, "1000111111 0000011100"),
    ],
)
def test_jaxpruners_published_masks(scores, s, expected):
    params = {"d": {"kernel": np.atleast_2d(scores).astype(np.float32)}}
    for run in (fwt.masks(s, like="jaxpruner"), jax.jit(fwt.masks(s, like="jaxpruner"))):
        mask = np.asarray(run(params)["d"]["kernel"])
        assert "".join("01"[int(m)] for m in mask.ravel()) == expected.replace(" ", "")


@pytest.mark.parametrize(
    ("scores", "expected"),
    [(GRID, "0011101001010011 1001001101010011"), (ONES, "00110011")],
)
def test_jaxpruners_published_n_m_masks(scores, expected):
    """Their groups are along the last axis; ours along the inputs."""
    params = {"d": {"weight": np.atleast_2d(scores).astype(np.float32)}}
    mask = np.asarray(fwt.masks(pattern=P.n_m(2, 4), like="jaxpruner")(params)["d"]["weight"])
    assert "".join("01"[int(m)] for m in mask.ravel()) == expected.replace(" ", "")


@pytest.mark.parametrize("like", ["jaxpruner", "tfmot"])
def test_one_weight_always_stays_and_halves_are_kept(like):
    compiled = jax.jit(lambda p, s: fwt.prune(s, like=like)(p))
    for n, s in itertools.product((1, 5, 50), (0.0, 0.1, 0.5, 0.75, 1.0)):
        params = {"d": {"kernel": np.arange(1, n + 1, dtype=np.float32)[None]}}
        kept = max(1, int(np.round(np.float32(n) * (np.float32(1) - np.float32(s)))))
        assert zeros(fwt.prune(s, like=like)(params)) == {"d/kernel": n - kept}
        assert zeros(compiled(params, s)) == {"d/kernel": n - kept}
    assert zeros(fwt.prune(0.5, like=like)({"d": {"kernel": np.ones((0, 3), "f")}})) == {
        "d/kernel": 0
    }


def test_tfmot_keeps_all_ties():
    params = {"d": {"kernel": np.array([[1, 1, 1, 2, 3, 1]], np.float32)}}
    assert zeros(fwt.prune(0.5, like="tfmot")(params)) == {"d/kernel": 0}
    assert zeros(jax.jit(fwt.prune(0.5, like="tfmot"))(params)) == {"d/kernel": 0}
    assert zeros(fwt.prune(0.7, like="tfmot")(params)) == {"d/kernel": 4}


@pytest.mark.thorough
def test_a_vmap_over_sparsities_is_one_after_the_other():
    params = tree()
    many = jnp.array([0.0, 0.3, 0.5, 1.0])
    for scope in ("global", "layer", "lamp"):
        found = jax.vmap(lambda s, scope=scope: fwt.prune(s, scope=scope)(params))(many)
        for i, s in enumerate(many):
            one = fwt.prune(s, scope=scope)(params)
            assert jax.tree.all(
                jax.tree.map(lambda a, b, i=i: jnp.array_equal(a[i], b), found, one)
            )


def test_conversion_reports_groups_that_another_order_breaks():
    model = flattened_net()
    where = ["c/kernel", "d/kernel"]
    here = fwt.prune(pattern=P.n_m(2, 4), where=where)(model)
    with pytest.warns(UserWarning, match=r"d \(Dense\).*2:4 sparse.*n_m\(2, 4, order='chw'\)"):
        converters.to_torch(*here)
    there = fwt.prune(pattern=P.n_m(2, 4, order="chw"), where=where)(model)
    import keras  # whose own imports may warn

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net = converters.to_torch(*there)
        assert isinstance(converters.to_keras(*here), keras.Model)
        converters.to_torch(*model)
    groups = net.d.weight.detach().numpy().reshape(6, 24, 4)
    assert (np.count_nonzero(groups, axis=2) == 2).all()
    with pytest.warns(UserWarning, match=r"2:4 sparse.*order='hwc'"):
        converters.from_torch(net, input_shape=(4, 4, 3))


# -- what a reader found ----------------------------------------------------------------------


def test_more_weights_than_a_float32_holds():
    """float32(2**24 + 3) is more than that: nothing may wrap around."""
    params = {"d": {"kernel": jnp.ones((1, (1 << 24) + 3))}}
    for like in ("jaxpruner", "tfmot"):
        run = jax.jit(lambda p, s, like=like: fwt.prune(s, like=like)(p)["d"]["kernel"].sum())
        assert run(params, 0.0) > 1 << 24
        assert fwt.prune(0.0, like=like)(params)["d"]["kernel"].sum() > 1 << 24


def test_torchs_whole_numbers_are_no_shares():
    params = tree(0, {"d": (8, 4)})
    assert zeros(fwt.prune(scope={"**": 1}, like="torch")(params)) == {"d/kernel": 32}
    with pytest.raises(fwt.FwtError, match="gives shares"):
        fwt.prune(5, scope={"**": 0.5}, like="torch")
    assert zeros(fwt.prune(5, pattern=P.n_m(2, 4), like="torch")(params)) == {"d/kernel": 5}


def test_erk_leaves_the_dead_where_they_are():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(10, 10)).astype("f")
    a.ravel()[:80] = 0
    params = {"a": {"kernel": a}, "b": {"kernel": rng.normal(size=(10, 10)).astype("f")}}
    for t in (
        fwt.prune(0.1, scope="erk", like="torch"),
        jax.jit(fwt.prune(0.1, scope="erk", like="torch")),
    ):
        new = t(params)
        assert sum(zeros(new).values()) == 92
        assert not np.asarray(new["a"]["kernel"]).ravel()[:80].any()


def test_integer_leaves():
    params = {
        "a": {"kernel": np.array([[-128, -128]], np.int8)},
        "b": {"kernel": np.array([[5, 5]], np.int8)},
    }
    assert zeros(fwt.prune(0.5, scope="lamp")(params)) == {"a/kernel": 1, "b/kernel": 1}
    blocks = fwt.prune(0.5, pattern=P.block((1, 1)))(
        {"d": {"kernel": np.array([[-128, 1], [2, 3]], np.int8)}}
    )
    assert blocks["d"]["kernel"].tolist() == [[-128, 0], [0, 3]]
    many = {"d": {"kernel": np.arange(-50, 50, dtype=np.int8).reshape(10, 10)}}
    kept = np.asarray(fwt.masks(0.5, S.random, key=0)(many)["d"]["kernel"])
    assert 0 < kept[:5].sum() < 50
    with pytest.raises(fwt.LeafError, match="d/kernel is int8: the score saliency needs floating"):
        fwt.prune(0.5, S.saliency, grads=many)(many)


def test_a_nan_sparsity_prunes_nothing():
    for scope in ("layer", "global", "erk", "lamp"):
        new = jax.jit(lambda p, s, scope=scope: fwt.prune(s, scope=scope)(p))(tree(), jnp.nan)
        assert sum(zeros(new).values()) == 0


def test_empty_leaves_in_patterns():
    params = {"a": {"kernel": np.zeros((0, 4), "f")}, "b": {"kernel": np.ones((4, 4), "f")}}
    half: list = [{"pattern": P.channel}, {"pattern": P.block((2, 2))}, {"scope": "lamp"}]
    for settings in (*({"sparsity": 0.5, **s} for s in half), {"pattern": P.n_m(2, 4)}):
        new = fwt.prune(**settings)(params)
        assert new["a"]["kernel"].shape == (0, 4)
        assert int((new["b"]["kernel"] == 0).sum()) == 8


def test_globs_of_flattened_that_match_nothing():
    with pytest.raises(fwt.LeafError, match=r"flattened=.*'typo/kernel'.*matches no selected leaf"):
        fwt.prune(pattern=P.n_m(2, 4, order="chw", flattened={"typo/kernel": (2, 2, 2)}))(tree())


def test_the_exact_name_of_one_leaf_is_that_leaf():
    """Another leaf has the same name in the spelling of files."""
    w = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    params = {"a.b": {"kernel": w}, "a": {"b": {"kernel": w.copy()}}}
    told = {"a.b/kernel": (2, 2, 2)}
    found = fwt.masks(pattern=P.n_m(1, 2, order="chw", flattened=told))(params)
    plain = fwt.masks(pattern=P.n_m(1, 2))(params)
    assert np.array_equal(found["a"]["b"]["kernel"], plain["a"]["b"]["kernel"])
    turned = w.reshape(2, 2, 2, 3).transpose(2, 0, 1, 3).reshape(8, 3)  # as torch counts them
    own = fwt.masks(pattern=P.n_m(1, 2))({"kernel": turned})["kernel"]
    back = np.asarray(own).reshape(2, 2, 2, 3).transpose(1, 2, 0, 3).reshape(8, 3)
    assert np.array_equal(found["a.b"]["kernel"], back)
    assert not np.array_equal(back, plain["a.b"]["kernel"])
