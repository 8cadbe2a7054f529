"""Pruning by magnitude: exact counts, ties, odd floats; masks."""

import warnings
from unittest import mock

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from marks import thorough_but

import fwt
from fwt.selection import keys


def dtype_of(name):
    return np.dtype(getattr(ml_dtypes, name, name))


@given(st.floats(0, 1), st.sampled_from([1, 2, 5, 10, 99, 1000]))
def test_counts_are_pythons(s, n):
    w = {"a": {"kernel": np.arange(1, n + 1, dtype=np.float32).reshape(1, n)}}
    assert int((np.asarray(fwt.prune(s)(w)["a"]["kernel"]) == 0).sum()) == round(s * n)


def zeros(tree):
    return {p: int((np.asarray(x) == 0).sum()) for p, x in fwt.select(tree, fwt.kernels).items()}


def test_scopes(params):
    layer = fwt.prune(0.25)(params)
    assert zeros(layer) == {"dense_2/kernel": 3, "dense_10/kernel": 5}
    whole = fwt.prune(0.25, scope="global")(params)
    assert sum(zeros(whole).values()) == 8
    kept = [
        np.abs(x[x != 0]).min() for x in map(np.asarray, fwt.select(whole, fwt.kernels).values())
    ]
    joined = np.sort(
        np.abs(np.concatenate([np.ravel(x) for x in fwt.select(params, fwt.kernels).values()]))
    )
    assert min(kept) == joined[8]
    for other in ("norm/scale", "dense_2/bias", "embed/embedding"):
        assert fwt.select(whole, other)[other] is fwt.select(params, other)[other]


@pytest.mark.parametrize("scope", thorough_but(1, ["layer", "global"]))
def test_traced_and_python_sparsity_agree(params, scope):
    traces = []

    @jax.jit
    def f(p, s):
        traces.append(s)
        return fwt.prune(s, scope=scope)(p)

    for s in (0.0, 0.25, 0.5, 0.75, 1.0):
        ours = fwt.prune(s, scope=scope)(params)
        assert jax.tree.all(jax.tree.map(jnp.array_equal, f(params, s), ours))
    assert len(traces) == 1
    batch = jax.vmap(lambda s: fwt.prune(s, scope=scope)(params)["dense_2"]["kernel"])(
        jnp.array([0.0, 0.5, 1.0])
    )
    for i, s in enumerate((0.0, 0.5, 1.0)):
        assert jnp.array_equal(batch[i], fwt.prune(s, scope=scope)(params)["dense_2"]["kernel"])


def test_vmap_over_models_prunes_each(params):
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x[::-1]]), params)
    out = jax.vmap(fwt.prune(0.5))(stacked)["dense_10"]["kernel"]
    assert jnp.array_equal(out[0], fwt.prune(0.5)(params)["dense_10"]["kernel"])
    assert int((out[1] == 0).sum()) == 10


def test_scan_and_grad(params):
    def body(p, s):
        return fwt.prune(s)(p), (p["dense_2"]["kernel"] == 0).sum()

    _, counts = jax.lax.scan(body, jax.tree.map(jnp.asarray, params), jnp.array([0.25, 0.5, 0.75]))
    assert counts.tolist() == [0, 3, 6]
    grad = jax.grad(lambda p: (fwt.prune(0.5)(p)["dense_2"]["kernel"] ** 2).sum())(params)
    kept = np.asarray(fwt.masks(0.5)(params)["dense_2"]["kernel"])
    np.testing.assert_allclose(
        grad["dense_2"]["kernel"], np.where(kept, 2 * params["dense_2"]["kernel"], 0), rtol=1e-6
    )
    through = jax.grad(lambda p: fwt.straight_through(fwt.prune(0.5))(p)["dense_2"]["kernel"].sum())
    assert (through(params)["dense_2"]["kernel"] == 1).all()


def test_donated_arguments_are_reused(params):
    on_device = jax.tree.map(jnp.array, params)
    compiled = jax.jit(fwt.prune(0.5), donate_argnums=0).lower(on_device).compile()
    assert "input_output_alias" in compiled.as_text()


def test_threshold():
    w = np.array([[0.1, -0.1, 0.10000001, np.nan], [-np.inf, 1e-45, 0.0, -0.0]], np.float32)
    tree = {"a": {"kernel": w, "bias": np.full(4, 0.01, np.float32)}}
    new = fwt.prune(threshold=0.1)(tree)
    kept = np.array([[False, False, True, True], [True, False, False, False]])
    assert np.array_equal(np.asarray(fwt.masks(threshold=0.1)(tree)["a"]["kernel"]), kept)
    out = np.asarray(new["a"]["kernel"])
    assert np.array_equal(out[kept], w[kept], equal_nan=True)
    assert (out[~kept].view(np.uint32) == 0).all()  # exactly +0.0
    assert new["a"]["bias"] is tree["a"]["bias"]
    assert bool(fwt.masks(threshold=-1.0)(tree)["a"]["kernel"].all())
    assert not fwt.masks(threshold=0.0)(tree)["a"]["kernel"][1, 3]
    assert fwt.masks(threshold=0.0)(tree)["a"]["kernel"][1, 1]  # a denormal is above zero
    half = {"a": {"kernel": np.array([[0.1]], ml_dtypes.bfloat16)}}
    assert not fwt.masks(threshold=0.1)(half)["a"]["kernel"][0, 0]
    traced = jax.jit(lambda p, t: fwt.prune(threshold=t)(p))
    assert jnp.array_equal(traced(tree, 0.1)["a"]["kernel"], out, equal_nan=True)


def test_user_scores():
    tree = {"a": {"kernel": np.array([[1.0, -5.0, 3.0]], np.float32)}}

    def value(params):
        return params

    assert fwt.prune(1 / 3, value)(tree)["a"]["kernel"].tolist() == [[1.0, 0.0, 3.0]]
    assert fwt.prune(1 / 3, fwt.scores.magnitude)(tree)["a"]["kernel"].tolist() == [
        [0.0, -5.0, 3.0]
    ]
    assert fwt.prune(1 / 3, fwt.scores.magnitude())(tree)["a"]["kernel"].tolist() == [
        [0.0, -5.0, 3.0]
    ]
    assert fwt.prune(threshold=2, score=value)(tree)["a"]["kernel"].tolist() == [[0.0, 0.0, 3.0]]

    def needs(params, *, grads):
        return grads

    with pytest.raises(fwt.FwtError, match="grads"):
        fwt.prune(0.5, needs)
    with pytest.raises(fwt.LeafError, match="a/kernel"):
        fwt.prune(0.5, lambda p: {"b": p["a"]["kernel"]})(tree)
    with pytest.raises(fwt.LeafError, match="shape"):
        fwt.prune(0.5, lambda p: {"a": {"kernel": np.ones(2, np.float32)}})(tree)


def test_masks_are_values():
    tree = {"a": {"kernel": np.array([[0.0, np.nan, -0.0, 1e-45]], np.float32), "bias": np.ones(4)}}
    masks = fwt.masks_of(tree)
    assert masks["a"]["kernel"].tolist() == [[False, True, False, True]]
    assert masks["a"]["bias"].shape == ()
    assert masks["a"]["bias"].dtype == bool
    new = fwt.apply_masks({"a": {"kernel": ~masks["a"]["kernel"], "bias": masks["a"]["bias"]}})(
        tree
    )
    assert not np.asarray(new["a"]["kernel"]).view(np.uint32)[0, [1, 3]].any()
    assert new["a"]["bias"] is tree["a"]["bias"]  # float64, and never touched

    def bad(masks, said):
        with pytest.raises(fwt.LeafError, match=said):
            fwt.apply_masks(masks)(tree)

    bad({"a": {"kernel": np.ones((1, 4), bool)}}, "no mask for 'a/bias'")
    bad({"a": {"kernel": np.ones((4, 1), bool), "bias": np.ones((), bool)}}, "expected shape")
    bad({"a": {"kernel": np.ones((1, 4)), "bias": np.ones((), bool)}}, "expected bool")
    bad({"a": {"kernel": np.zeros((), bool), "bias": np.ones((), bool)}}, "rank-0 False")
    bad({"a": {"kernel": np.ones((1, 4), bool)}}, r"{'a/bias': mask}, may leave leaves out")


def test_masks_by_path_leave_the_other_leaves_alone():
    kernel = np.arange(1, 7, dtype=np.float32).reshape(2, 3)
    tree = {
        "a": {"kernel": kernel, "bias": np.ones(3, np.float32)},
        "b": {"kernel": (other := kernel.copy())},
    }
    mask = np.array([[True, False, True], [False, True, False]])
    kept = np.where(mask, kernel, 0)
    both = {"a/kernel": mask, "b/kernel": np.True_}
    for masks in ({"a/kernel": mask}, {"a.kernel": mask}, both):
        for params in (tree, {"params": tree}, fwt.Model(None, {"params": tree})):
            new = fwt.apply_masks(masks)(params)
            assert type(new) is type(params)
            found = fwt.select(new)
            np.testing.assert_array_equal(found["a/kernel"], kept)
            assert found["b/kernel"] is other
            assert found["a/bias"] is tree["a"]["bias"]
    ball = fwt.project(fwt.constraints.max_norm(100.0), masks={"a/kernel": mask})
    np.testing.assert_array_equal(ball(tree)["a"]["kernel"], kept)
    jitted = jax.jit(lambda tree, mask: fwt.apply_masks({"a/kernel": mask})(tree))
    np.testing.assert_array_equal(jitted(tree, mask)["a"]["kernel"], kept)
    np.testing.assert_array_equal(
        fwt.apply_masks(fwt.select(fwt.masks_of(new)))(tree)["a"]["kernel"], kept
    )
    flat = fwt.apply_masks({"w": mask})({"w": kernel, "v": other})
    np.testing.assert_array_equal(flat["w"], kept)
    assert flat["v"] is other
    tied = {"a": {"kernel": kernel}, "b": {"kernel": kernel}}
    new = fwt.apply_masks({"b/kernel": mask})(tied)  # one of its paths stands for all
    np.testing.assert_array_equal(new["a"]["kernel"], kept)
    for masks, said in (
        ({"a/kernl": mask}, "'a/kernl' is no leaf of the tree; close: 'a/kernel'"),
        ({"*/kernel": mask}, r"'\*/kernel' is no leaf"),
        ({"a/weight": mask}, "in the names of Flax that is 'a/kernel'"),
        ({"a/kernel": mask.T}, r"a/kernel expected shape \(2, 3\), found \(3, 2\)"),
        ({"a/kernel": mask, "a.kernel": mask}, "given twice"),
    ):
        with pytest.raises(fwt.LeafError, match=said):
            fwt.apply_masks(masks)(tree)
    with pytest.raises(fwt.LeafError, match=r"'a/kernel' is a leaf that at\(...\) left out"):
        fwt.at("b/*", fwt.apply_masks({"a/kernel": mask}))(tree)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "sparsity or a threshold"),
        ({"sparsity": 0.5, "threshold": 0.5}, "one of the two"),
        ({"sparsity": 80}, "0 to 1; found 80"),
        ({"sparsity": -0.1}, "0 to 1"),
        ({"sparsity": "0.8"}, "must be a number"),
        ({"sparsity": True}, "must be a number"),
        ({"sparsity": float("nan")}, "must be a number"),
        ({"sparsity": jnp.ones(3)}, "vmap"),
        ({"sparsity": 0.5, "scope": "layers"}, "'layer', 'output', 'global'"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "pattern"),
        ({"sparsity": 0.5, "score": "magnitude"}, "score"),
        ({"sparsity": 0.5, "like": "keras"}, "'torch', 'jaxpruner'"),
        ({"sparsity": -3, "like": "torch"}, "number of weights"),
        ({"sparsity": 0.5, "score": fwt.scores.saliency}, "needs grads="),
        ({"sparsity": 0.5, "score": fwt.scores.random}, "needs key="),
        ({"sparsity": 0.5, "score": fwt.scores.obd}, "bind it"),
        ({"threshold": 0.5, "like": "torch"}, "counts nothing"),
        ({"threshold": 0.5, "scope": "erk"}, "counts nothing"),
        ({"threshold": 0.5, "pattern": fwt.patterns.n_m(2, 4)}, "one of the two"),
        ({"scope": {}}, "gives no leaf"),
        ({"scope": {"a": 2}}, "from 0 to 1"),
        ({"sparsity": 0.6, "pattern": fwt.patterns.n_m(2, 4)}, "can't be had"),
        ({"scope": {"**": 0.6}, "pattern": fwt.patterns.n_m(2, 4)}, "can't be had"),
        ({"sparsity": 0.5, "pattern": fwt.patterns.n_m(2, 4), "scope": "erk"}, "'layer'"),
    ],
)
def test_wrong_arguments_say_so_at_once(arguments, said):
    with pytest.raises(fwt.FwtError) as caught:
        fwt.prune(**arguments)
    assert said in str(caught.value)


def test_64_bit_leaves_are_refused_not_rounded():
    tree = {"a": {"kernel": np.ones((2, 3)), "bias": np.ones(3)}}
    for t in (
        fwt.prune(0.5),
        fwt.masks(0.5),
        fwt.initialize(fwt.initializers.ones, 0),
        fwt.project(fwt.constraints.non_negative),
    ):
        with pytest.raises(fwt.LeafError, match=r"a/kernel is float64.*enable_x64.*dtype="):
            t(tree)
        with jax.enable_x64(True):
            new = t(tree)
            assert new["a"]["kernel"].dtype in (np.float64, bool)
            assert new["a"]["bias"] is tree["a"]["bias"] or new["a"]["bias"].dtype == bool
    assert fwt.prune(0.5, dtype="float32")(tree)["a"]["kernel"].dtype == np.float32


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_dtypes_stay(dtype):
    tree = {"a": {"kernel": np.arange(-4, 4).reshape(2, 4).astype(dtype_of(dtype))}}
    new = fwt.prune(0.5)(tree)["a"]["kernel"]
    assert new.dtype == dtype_of(dtype)
    assert int((new == 0).sum()) == 4


def test_odd_leaves():
    tree = {"a": {"kernel": np.zeros((0, 3), np.float32)}, "b": {"kernel": np.ones((1, 1), "f")}}
    assert fwt.prune(1.0)(tree)["b"]["kernel"].tolist() == [[0.0]]
    assert fwt.prune(1.0, scope="global")(tree)["a"]["kernel"].shape == (0, 3)
    assert fwt.prune(0.5)({"a": {"kernel": np.ones((2, 2), "f")}})["a"]["kernel"].tolist() == [
        [1.0, 1.0],
        [0.0, 0.0],
    ]
    with pytest.raises(fwt.LeafError, match="complex"):
        fwt.prune(0.5)({"a": {"kernel": np.ones((2, 2), np.complex64)}})


THRESHOLDS = ("float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8", "int32",
              "uint8")  # fmt: skip


@pytest.mark.parametrize("name", THRESHOLDS)
def test_what_is_at_most_a_traced_threshold_is_pruned(name):
    """As Python compares numbers: nothing is at most a NaN, and all but a NaN at most infinity."""
    values = [1, 2.5, 3, 100, *([] if "int" in name else [np.nan, -1])]
    w = np.array([values]).astype(dtype_of(name))
    prune = jax.jit(lambda p, t, sign: fwt.prune(threshold=t, score=sign)(p), static_argnums=2)

    def signed(params):
        return jax.tree.map(lambda x: -jnp.abs(x.astype(jnp.float32)), params)

    for t in (np.nan, 2, -1, np.inf, -np.inf, 5e9):
        for score, own in ((fwt.scores.magnitude, np.abs), (signed, lambda x: -np.abs(x))):
            new = np.asarray(prune({"a": {"kernel": w}}, jnp.float32(t), score)["a"]["kernel"])
            expected = np.where(own(w.astype(np.float64)) <= t, 0, w.astype(np.float64))
            assert np.array_equal(new.astype(np.float64), expected, equal_nan=True), (t, own)


@pytest.mark.parametrize("dtype", ["int32", "uint32", "int8"])
@pytest.mark.parametrize("other", ["int32", "uint32"])
def test_whole_thresholds_keep_all_their_bits(dtype, other):
    most = np.iinfo(dtype).max
    w = np.array([[most, most - 1, most - 47, min(16777217, most), 5, 0]], dtype)
    prune = jax.jit(lambda p, t: fwt.prune(threshold=t)(p))
    for t in (2147483600, 16777217, 16777216, 5, 0, 127):
        new = np.asarray(prune({"a": {"kernel": w}}, jnp.asarray(t, other))["a"]["kernel"])
        assert np.array_equal(new, np.where(w.astype(np.int64) <= t, 0, w)), t


def test_a_threshold_beyond_the_dtype():
    w = np.array([[1, np.nan, 6e4]], np.float16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new = fwt.prune(threshold=70000)({"a": {"kernel": w}})["a"]["kernel"]
    assert np.array_equal(new, [[0, np.nan, 0]], equal_nan=True)


def test_integer_thresholds_and_concrete_arrays():
    def kept(w, t):
        return np.asarray(fwt.masks(threshold=t)({"a": {"kernel": w}})["a"]["kernel"]).tolist()

    w = np.array([[1, -128, 100, 127, 0]], np.int8)
    assert kept(w, 127.5) == [[False, True, False, False, False]]
    assert kept(w, 128) == [[False] * 5]
    assert kept(w, 300) == [[False] * 5]
    assert kept(w, -0.5) == [[True] * 5]
    assert kept(w.astype(np.uint8), -1) == [[True] * 5]
    assert kept(w, 0.7) == [[True, True, True, True, False]]
    assert kept(w, jnp.float32(100)) == [[False, True, False, True, False]]
    for bad in (80.0, -1.0, np.nan):
        with pytest.raises(fwt.FwtError):
            fwt.prune(jnp.float32(bad))
    tree = {"a": {"kernel": np.arange(10, dtype=np.float32).reshape(2, 5)}}
    assert int((fwt.prune(jnp.float32(0.5))(tree)["a"]["kernel"] == 0).sum()) == 5


def test_masks_leave_scalars_alone():
    tree = {"d": {"kernel": np.ones((2, 2), np.float32)}, "step": np.array(5, np.int64)}
    new = fwt.apply_masks(fwt.masks(0.5)(tree))(tree)
    assert new["step"] is tree["step"]
    shapes = {"d": {"kernel": jax.ShapeDtypeStruct((2, 2), np.float32)}}
    with pytest.raises(fwt.LeafError, match="eval_shape"):
        fwt.prune(0.5)(shapes)
    assert jax.eval_shape(fwt.prune(0.5), shapes)["d"]["kernel"].shape == (2, 2)


@pytest.mark.parametrize("count", [1, np.int64(1), np.int8(7), jnp.int32(7)])
def test_a_whole_number_is_a_count_for_torch_whatever_holds_it(count):
    params = {"d": {"kernel": np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)}}
    new = fwt.prune(count, like="torch")(params)["d"]["kernel"]
    assert int((new == 0).sum()) == int(count)


SHAPES = [(0, 3), (3, 5), (5, 3), (4, 4), (17,), (1, 1), (2, 3, 2, 2), (24, 2), (47,), (8, 6)]


@pytest.mark.parametrize(
    ("scope", "kinds"),
    thorough_but(
        1,
        [("layer", "float32 float16"), ("global", "float32 float16"), ("erk", "float32 float16"),
         ("lamp", "float32 float16"), ("lamp", "float32")],
        most=2,
    ),
)  # fmt: skip
def test_small_leaves_that_are_searched_together(scope, kinds):
    """Under jit those of about one size are rows of one array; outside NumPy prunes them."""
    rng, kinds = np.random.default_rng(0), kinds.split()
    params = {
        f"{i}": {"kernel": (rng.integers(-3, 4, s) / 4).astype(kinds[i % len(kinds)])}
        for i, s in enumerate(SHAPES)
    }
    params["1"]["kernel"][2, 1] = np.nan
    shares = np.array([0.0, 0.2, 0.37, 0.9, 1.0], np.float32)
    found = jax.jit(jax.vmap(lambda s: fwt.prune(s, scope=scope)(params)))(shares)
    for i, share in enumerate(shares):
        one = fwt.prune(jnp.float32(share), scope=scope)(params)
        assert_equal(one, jax.tree.map(lambda x, i=i: x[i], found))
    traced, at_hand = jax.jit(fwt.masks(0.37, scope=scope))(params), fwt.masks(0.37, scope=scope)
    assert_equal(traced, at_hand(params))
    with mock.patch.object(keys, "_NEAR", -1):
        assert_equal(traced, at_hand(params))


def assert_equal(a, b):
    same = jax.tree.map(lambda x, y: np.array_equal(np.asarray(x), np.asarray(y), True), a, b)
    assert jax.tree.all(same), same


def test_what_is_no_sparsity_says_where_it_goes():
    for wrong, way in (
        (fwt.schedules.cubic(0.9, 0, 10), "fwt.optim.sparsify takes a schedule"),
        ({"a/*": 0.5}, "scope= takes a dict"),
    ):
        with pytest.raises(fwt.FwtError, match=f"must be a number.*: {way}"):
            fwt.prune(wrong)
    with pytest.raises(fwt.FwtError, match=r"needs grads=, which fwt\.optim\.sparsify gives it"):
        fwt.prune(0.5, fwt.scores.movement)({"a": {"kernel": np.ones((3, 2), np.float32)}})
