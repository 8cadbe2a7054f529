"""Leaves that are gone through a piece at a time: the same to the bit as in memory."""

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fwt
from fwt import _stored
from fwt import constraints as C
from fwt import patterns as P
from fwt._types import does_stream
from fwt.selection import stored as selection

DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16, np.int8, np.int32)
SHAPES = ((7, 5), (13, 11), (3, 3, 5, 7), (40, 30))
SPARSITIES = (0.0, 0.1, 0.5, 0.77, 0.99, 1.0)

PRUNES = {
    **{f"{scope} {s}": fwt.prune(s, scope=scope) for scope in ("layer", "global", "output")
       for s in SPARSITIES},
    **{f"threshold {t}": fwt.prune(threshold=t) for t in (0, 0.3, 0.5, -1, float("inf"))},
    "n_m": fwt.prune(pattern=P.n_m(1, 2), where="d3/kernel"),
    "block": fwt.prune(0.4, pattern=P.block((1, 1))),
    "channel": fwt.prune(0.4, pattern=P.channel),
    "dict": fwt.prune(scope={"d0/*": 0.3, "**": 0.6}),
    "factor": fwt.prune(0.5, scope={"d0/*": 0.3, "**": 0.6}),
    "erk": fwt.prune(0.5, scope="erk"),
    "lamp": fwt.prune(0.5, scope="lamp"),
    "random": fwt.prune(0.5, fwt.scores.random, key=3),
    "random, global": fwt.prune(0.5, fwt.scores.random, key=3, scope="global"),
    "torch": fwt.prune(0.5, like="torch"),
    "jaxpruner": fwt.prune(0.5, like="jaxpruner"),
    "tfmot": fwt.prune(0.5, like="tfmot"),
    "all": fwt.prune(0.5, where="**"),
    "axes": fwt.prune(0.5, scope="output", axes={"d0/kernel": "out in", "d3/kernel": "in out"}),
    "an array": fwt.prune(jax.numpy.float32(0.37)),
    "at": fwt.at("d1/*", fwt.prune(0.3)),
    "chain": fwt.chain(
        fwt.prune(0.3), fwt.prune(0.6, scope="global"), fwt.prune(threshold=0.2)
    ),
}  # fmt: skip
OTHERS = {
    "max_norm": fwt.project(C.max_norm(1.0)),
    "max_norm of rows": fwt.project(C.max_norm(1.0), axes={"d3/kernel": "out in"}),
    "max_norm along an axis": fwt.project(C.max_norm(1.0, axis=0), axes={"d3/kernel": "out in"}),
    "unit_norm": fwt.project(C.unit_norm),
    "non_negative": fwt.project(C.non_negative),
    "normal": fwt.initialize(fwt.initializers.he_normal, 0),
    "normalized": fwt.prune(0.5, scope="normalized"),
    "then global": fwt.chain(fwt.project(C.max_norm(1.0)), fwt.prune(0.5, scope="global")),
    "another dtype": fwt.prune(0.5, dtype="float16"),
}


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch):
    """Pieces and rows so short that each leaf has many."""
    monkeypatch.setattr(_stored, "PIECE", 1 << 8)
    monkeypatch.setattr(selection, "PIECE", 1 << 8)
    monkeypatch.setattr("fwt._project._ROWS", 1 << 10)


def tree(dtype, coarse=False):
    """Params, ``coarse`` with many equal magnitudes."""
    rng = np.random.default_rng(0)

    def one(*shape):
        x = rng.normal(size=shape)
        x = np.round(x * 2) / 2 if coarse else x
        return (x * 20 if np.dtype(dtype).kind == "i" else x).astype(dtype)

    held = {f"d{i}": {"kernel": one(*s), "bias": one(s[-1])} for i, s in enumerate(SHAPES)}
    if dtype is np.float32:
        held["d1"]["kernel"][:2, :3] = [[np.nan, np.inf, -np.inf], [0.0, -0.0, 1e-41]]
    return {"params": held}


def stored(params, parts=True):
    """The same, of leaves that are gone through; without parts in order only."""

    def one(leaf):
        found = _stored.of(leaf)
        found.part = found.part if parts else None
        return found

    return jax.tree.map(one, params)


def check(transform, params, parts):
    assert does_stream(transform)
    expected = transform(params)
    found = transform(stored(params, parts))
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(found), strict=True
    ):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape) == (y.dtype, y.shape), path
        assert x.tobytes() == y.tobytes(), path


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PRUNES)
def test_pruned_as_in_memory(name, dtype, coarse):
    check(PRUNES[name], tree(dtype, coarse), parts=not coarse)


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("name", OTHERS)
def test_changed_as_in_memory(name, dtype):
    check(OTHERS[name], tree(dtype), parts=True)


@settings(max_examples=60)
@given(
    st.lists(st.integers(0, 400), min_size=1, max_size=4),
    st.floats(0, 1),
    st.integers(1, 30),
    st.integers(0, 1 << 30),
)
def test_as_many_go_as_are_asked_for(sizes, share, values, seed):
    """Of a few values, whose ties are cut between leaves, and of many."""
    rng = np.random.default_rng(seed)
    params = {}
    for i, n in enumerate(sizes):
        kernel = (rng.integers(0, values, (n, 1)) - values // 2) * rng.choice([1, 1e-30])
        params[f"d{i}"] = {"kernel": kernel.astype(np.float32)}
    for scope in ("layer", "global"):
        check(fwt.prune(share, scope=scope), params, parts=bool(seed % 2))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_short_leaves_beside_many_weights(share, monkeypatch):
    """A leaf shorter than a run of the sample, of which the sample wants next to nothing."""
    monkeypatch.setattr(selection, "_SAMPLE", 64)
    rng = np.random.default_rng(0)
    sizes = range(1, 2 * selection._RUN + 2)
    params = {f"d{n}": {"kernel": rng.normal(size=(n, 1)).astype(np.float32)} for n in sizes}
    pruned = fwt.prune(share, scope="global")
    check(pruned, params, parts=True)
    whole = np.concatenate([x["kernel"].ravel() for x in params.values()])
    edge = np.sort(np.abs(whole))[round(share * whole.size)]
    for name, leaf in pruned(stored(params)).items():
        old = params[name]["kernel"]
        assert np.array_equal(leaf["kernel"], np.where(np.abs(old) < edge, 0, old)), name


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_leaves_of_several_dtypes_are_counted_on_one_scale(scope):
    dtypes = (np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn)
    rng = np.random.default_rng(0)
    params = {f"d{i}": {"kernel": rng.normal(size=(9 - i, 5)).astype(dtype)}
              for i, dtype in enumerate(dtypes)}  # fmt: skip
    for sparsity in SPARSITIES:
        check(fwt.prune(sparsity, scope=scope), params, parts=True)


def test_a_sample_that_lies_costs_passes_alone(monkeypatch):
    """Whatever the sample says, the cut is exact."""
    params = tree(np.float32)
    for wrong in (0, 1, 1 << 31, (1 << 32) - 1):
        monkeypatch.setattr(
            selection, "_sampled", lambda leaf, key, total, x=wrong: np.full(64, x, np.uint32)
        )
        for sparsity in SPARSITIES:
            check(fwt.prune(sparsity, scope="global"), params, parts=True)


def test_nothing_is_held_that_memory_may_not_hold():
    params = stored(tree(np.float32))
    limit = params["params"]["d3"]["kernel"].nbytes
    token = _stored.LIMIT.set(limit)
    try:
        jax.tree.map(np.asarray, fwt.prune(0.5, scope="global")(params))
        jax.tree.map(np.asarray, fwt.prune(0.5, pattern=P.channel)(params))  # one at a time
        with pytest.raises(fwt.LeafError, match=r"scope='lamp' .* 4 weights in memory at once"):
            fwt.prune(0.5, scope="lamp")(params)
        _stored.LIMIT.set(limit - 1)
        with pytest.raises(fwt.LeafError, match=r"needs d3/kernel in memory .*max_memory="):
            jax.tree.map(np.asarray, fwt.project(C.zero_mean)(params))
        # Rows of outputs are projected some at a time.
        rows = fwt.project(C.max_norm(1.0), where="d3/kernel", axes={"d3/kernel": "out in"})
        jax.tree.map(np.asarray, rows(params))
    finally:
        _stored.LIMIT.reset(token)


def test_what_a_user_wrote_does_not_stream():
    assert not does_stream(lambda params: params)
    assert not does_stream(fwt.chain(fwt.prune(0.5), lambda params: params))
    assert not does_stream(fwt.at("**", lambda params: params))
    assert not does_stream(fwt.reset(0, "torch"))
    assert not does_stream(fwt.prune(0.5, lambda params: params))  # which may look at all of them
    assert not does_stream(fwt.project(lambda leaf, axes: leaf))
    assert not does_stream(fwt.initialize(jax.nn.initializers.normal(), 0))


def test_a_summary_counts_zeros_once():
    found = fwt.prune(0.5)(stored(tree(np.float32)))
    kernel = found["params"]["d0"]["kernel"]
    assert kernel.zeros is None
    lines = {line.path: line for line in fwt.summary(found).lines}
    assert lines["d0/kernel"].zeros == kernel.zeros == int((np.asarray(kernel) == 0).sum())
