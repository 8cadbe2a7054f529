"""initialize, project, assign, chain, at, straight_through."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import thorough_but

import fwt
from fwt import _axes, _keys, _project

inits, C = fwt.initializers, fwt.constraints


SHAPES = [(30, 20), (3, 5, 10, 20), (2, 1, 3, 4, 7)]
CASES = [
    (name, shape)
    for name in inits.__all__
    for shape in (SHAPES[1:] if name == "delta_orthogonal" else SHAPES)
]


@pytest.mark.parametrize(("name", "shape"), thorough_but(lambda c: c in CASES[::3], CASES, most=19))
def test_initializers_equal_jaxs(name, shape):
    """On (..., in, out) they are JAX's own, to the bit, under the leaf's folded key."""
    arguments = {"constant": (0.3,), "variance_scaling": (2.0, "fan_out", "normal")}.get(name, ())
    theirs = getattr(jax.nn.initializers, name)
    noun = getattr(inits, name)
    plain = name in ("zeros", "ones")
    theirs = theirs if plain else theirs(*arguments)
    tree = {"dense": {"kernel": np.ones(shape, np.float32)}}
    (key,) = _keys.leaf_keys(5, "initialize", ["dense/kernel"])
    expected = theirs(key, shape, jnp.float32)
    # An older jaxlib (0.8.1) rounds a decomposition another way once it is compiled.
    atol = 2e-7 if "orthogonal" in name and jax.__version_info__ < (0, 10) else 1e-9
    for written in [noun(*arguments)] + ([noun] if not arguments else []):
        found = fwt.initialize(written, 5)(tree)["dense"]["kernel"]
        np.testing.assert_allclose(found, expected, rtol=3e-7, atol=atol)
    assert noun(*arguments) == noun(*arguments)
    assert hash(noun(*arguments)) == hash(noun(*arguments))


def test_fans_follow_the_axes():
    shapes = {
        "conv/kernel": ((3, 5, 8, 16), 3 * 5 * 8),
        "query/kernel": ((12, 4, 6), 12),
        "out/kernel": ((4, 6, 12), 24),
        "torch/weight": ((7, 11), 11),
    }
    for path, (shape, fan_in) in shapes.items():
        layer, leaf = path.split("/")
        tree = {layer: {leaf: np.zeros(shape, np.float32)}}
        w = np.asarray(fwt.initialize(inits.lecun_uniform(), 0)(tree)[layer][leaf])
        bound = (3 / fan_in) ** 0.5
        assert np.abs(w).max() <= bound
        assert np.abs(w).max() > 0.9 * bound
    tree = {"a": {"weight": np.zeros((16, 8, 3, 3), np.float32)}}
    with pytest.raises(fwt.AxesError, match=r"a/weight.*axes="):
        fwt.initialize(inits.he_normal, 0)(tree)
    named = fwt.initialize(inits.lecun_uniform, 0, axes={"**/weight": "out in h w"})(tree)
    assert np.abs(named["a"]["weight"]).max() <= (3 / 72) ** 0.5
    assert fwt.initialize(inits.normal, 0)(tree)["a"]["weight"].shape == (16, 8, 3, 3)
    with pytest.raises(fwt.AxesError, match="names 2 axes"):
        fwt.initialize(inits.he_normal, 0, axes={"**": "out in"})(tree)
    with pytest.raises(fwt.AxesError, match="matches no leaf"):
        fwt.initialize(inits.he_normal, 0, axes={"b/*": "out in h w"})(tree)


def test_orthogonal_is_orthogonal_on_every_layout():
    for layer, leaf, shape in (
        ("d", "kernel", (9, 4)),
        ("d", "kernel", (4, 9)),
        ("d", "weight", (4, 9)),
        ("c", "kernel", (3, 3, 2, 5)),
        ("query", "kernel", (12, 2, 3)),
    ):
        tree = {layer: {leaf: np.zeros(shape, np.float32)}}
        w = np.asarray(fwt.initialize(inits.orthogonal(2.0), 0)(tree)[layer][leaf])
        axes = _axes.axes_of(f"{layer}/{leaf}", shape)
        w = w.transpose((*axes.reduced, *axes.outputs))
        w = w.reshape(int(np.prod([shape[i] for i in axes.reduced])), -1)
        gram = w.T @ w if w.shape[0] >= w.shape[1] else w @ w.T
        np.testing.assert_allclose(gram, 4 * np.eye(len(gram)), atol=1e-5)


def test_foreign_initializers():
    dense = {"d": {"kernel": np.zeros((3, 4), np.float32)}}
    w = fwt.initialize(jax.nn.initializers.he_normal(), 0)(dense)["d"]["kernel"]
    assert jnp.array_equal(w, fwt.initialize(inits.he_normal, 0)(dense)["d"]["kernel"])
    query = {"query": {"kernel": np.zeros((4, 2, 3), np.float32)}}
    with pytest.raises(fwt.AxesError, match=r"fwt\.initializers"):
        fwt.initialize(jax.nn.initializers.he_normal(), 0)(query)
    fwt.initialize(jax.nn.initializers.normal(1.0), 0)(query)
    with pytest.raises(fwt.LeafError, match="called first"):
        fwt.initialize(jax.nn.initializers.he_normal, 0)(dense)
    with pytest.raises(fwt.LeafError, match="expected float32"):
        fwt.initialize(lambda k, s, d: np.ones(3, np.float32), 0)(dense)
    with pytest.raises(TypeError, match="initializer"):
        fwt.initialize("zeros", 0)


def test_keys_come_from_the_path(params):
    t = fwt.initialize(inits.normal(1.0), jax.random.key(7))
    one = t(params)
    two = t({**params, "another": {"kernel": np.ones((9, 9), np.float32)}})
    for path, value in fwt.select(one, fwt.kernels).items():
        assert jnp.array_equal(value, fwt.select(two, path)[path])
    leaves = list(fwt.select(fwt.initialize(inits.normal(1.0), 0, "**")(params)).values())
    flat = [np.asarray(x).ravel()[:3] for x in leaves]
    assert len({tuple(x) for x in flat}) == len(flat)
    by_key = jax.vmap(lambda k: fwt.initialize(inits.normal(1.0), k)(params)["dense_2"]["kernel"])(
        jax.random.split(jax.random.key(0), 3)
    )
    assert by_key.shape == (3, 4, 3)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    fresh = fwt.initialize(inits.normal(1.0), jax.random.key(7))(shapes)
    assert jnp.array_equal(fresh["dense_2"]["kernel"], one["dense_2"]["kernel"])


def test_initializers_inside_flax():
    net = nn.Dense(3, kernel_init=inits.he_uniform(), bias_init=inits.zeros)
    variables = net.init(jax.random.key(0), jnp.ones((1, 4)))
    assert variables["params"]["kernel"].shape == (4, 3)
    assert not variables["params"]["bias"].any()


# -- constraints ------------------------------------------------------------------------------


def test_project_refuses_what_it_can_not_know():
    bare = {"a": {"weight": np.ones((2, 3, 4, 4), np.float32)}}
    with pytest.raises(fwt.AxesError, match=r"a/weight.*axes="):
        fwt.project(C.max_norm(1.0))(bare)
    new = fwt.project(C.max_norm(1.0), axes={"a/weight": "o i h w"})(bare)["a"]["weight"]
    np.testing.assert_allclose(np.sqrt((new**2).sum((1, 2, 3))), 1, rtol=1e-6)
    assert fwt.project(C.non_negative)(bare)["a"]["weight"].shape == (2, 3, 4, 4)
    with pytest.raises(fwt.AxesError, match="axis=4"):
        fwt.project(C.max_norm(1.0, axis=4))(bare)
    with pytest.raises(fwt.LeafError, match="floating"):
        fwt.project(C.unit_norm)({"a": {"kernel": np.ones((2, 2), np.int32)}})
    with pytest.raises(fwt.LeafError, match="keeps shape and dtype"):
        fwt.project(lambda w, axes: w.sum())({"a": {"kernel": np.ones((2, 2), np.float32)}})
    with pytest.raises(fwt.FwtError, match="refill"):
        fwt.project(lambda w, axes: w + 1, masks=bare)


def test_project_within_masks(params):
    masks = fwt.masks(0.5)(params)
    new = fwt.project(C.unit_norm(), masks=masks)(params)["dense_10"]["kernel"]
    kept = np.asarray(masks["dense_10"]["kernel"])
    assert not np.asarray(new)[~kept].any()
    norms = np.sqrt((np.asarray(new) ** 2).sum(0))
    np.testing.assert_allclose(norms[kept.any(0)], 1, rtol=1e-6)


def small(shapes, dtype=np.float32):
    rng = np.random.default_rng(0)
    return {
        f"l{i}": {"kernel": jnp.asarray(rng.normal(size=s), dtype)} for i, s in enumerate(shapes)
    }


DENSE = [(33 + i, 50 + i % 7) for i in range(8)]
WINDOWS = [(3, 3, 5 + i, 9 + i % 3) for i in range(6)]
NORMS = [
    C.max_norm(1.0), C.unit_norm(), C.min_max_norm(0.5, 2.0, 0.7), C.l2_ball(2.0, axis="all"),
    C.max_norm(0.5, axis=-1),
]  # fmt: skip


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("constraint", [*NORMS, C.k_sparse(3)])
def test_small_leaves_are_projected_as_each_alone(constraint, masked):
    """With zeros behind them, so that leaves of about one shape share a program."""
    exact = constraint.name == "k_sparse"
    for shapes, axes, dtype in (
        (DENSE, {}, np.float32),
        (DENSE, {}, jnp.bfloat16),
        (WINDOWS, {}, np.float32),
        ([(2 + i % 2, 3, 8 + i) for i in range(5)], {"**": "stack in out"}, np.float32),
    ):
        params = small(shapes, dtype)
        params["l0"]["kernel"] *= jnp.asarray(1e30, dtype)
        params["l1"]["kernel"] *= 0
        params["l2"]["kernel"] = params["l2"]["kernel"].at[..., 1, 1].set(jnp.nan)
        masks = jax.tree.map(lambda x: jnp.abs(x) > 0.3, params) if masked else None
        found = jax.jit(fwt.project(constraint, masks=masks, axes=axes))(params)
        for name, one in params.items():
            mask = {name: masks[name]} if masked else None
            t = fwt.project(constraint, masks=mask, axes=axes)
            new, alone = (
                np.asarray(x["kernel"]) for x in (found[name], jax.jit(t)({name: one})[name])
            )
            ulp = 0 if exact else 4 * float(jnp.finfo(dtype).eps)
            np.testing.assert_allclose(
                new.astype(np.float32), alone.astype(np.float32), rtol=ulp, err_msg=name
            )
            assert new.dtype == alone.dtype


def test_small_leaves_of_about_one_shape_are_compiled_once():
    def reductions(params):
        return jax.jit(fwt.project(C.max_norm())).lower(params).as_text().count("stablehlo.reduce")

    assert reductions(small(DENSE)) == reductions(small(DENSE[:1]))
    large = [(200 + i, 100) for i in range(8)]  # whose copies would take longer than they save
    assert reductions(small(large)) == 8 * reductions(small(large[:1]))


def test_derivatives_of_small_leaves():
    params = small(DENSE)

    def loss(project, tree):
        return sum((x["kernel"] ** 2).sum(0)[3] for x in project(tree).values())

    for constraint in NORMS[:3]:
        each = jax.grad(functools.partial(loss, fwt.project(constraint)))
        found = jax.jit(each)(params)
        for name, one in params.items():
            np.testing.assert_allclose(
                found[name]["kernel"], each({name: one})[name]["kernel"], rtol=1e-4, atol=1e-6
            )


@pytest.mark.parametrize("constraint", NORMS)
def test_what_numpy_projects_outside_jit(constraint, monkeypatch):
    """The nearest point, to within the rounding of the dtype, and no program."""
    shapes = [(40, 30), (3, 3, 5, 9), (1, 7), (0, 4)]
    for dtype in (np.float32, np.float16, jnp.bfloat16):
        params = small(shapes, dtype)
        params["l2"]["kernel"] = jnp.asarray([[0, 1, -2, 1e-3, jnp.nan, jnp.inf, -0.0]], dtype)
        for masks in (None, jax.tree.map(lambda x: jnp.abs(x) > 0.3, params)):
            t = fwt.project(constraint, masks=masks)
            wanted = jax.jit(t)(params)
            with monkeypatch.context() as patch:
                patch.setattr(_project, "_projected_compiled", None)
                found = t(params)
            for new, old in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
                assert (type(new), new.dtype) == (type(old), old.dtype)
                new, old = (np.asarray(x, np.float32) for x in (new, old))
                np.testing.assert_allclose(new, old, rtol=4 * float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize(
    "constraint",
    [C.weight_standardization(), C.quantized(), C.quantized(4, False), C.quantized(4, axis=None)],
)
def test_a_nan_among_many_rows_shows(constraint):
    """XLA's maximum over 64 rows loses it on a CPU."""
    for shape in ((64, 64), (33, 50), (8, 16)):
        params = small([shape])
        params["l0"]["kernel"] = params["l0"]["kernel"].at[1, 1].set(jnp.nan)
        found = jax.jit(fwt.project(constraint))(params)["l0"]["kernel"]
        assert jnp.isnan(found[:, 1]).all(), shape


def test_projection_with_a_traced_setting(params):
    traces = []

    @jax.jit
    def f(p, c):
        traces.append(c)
        return fwt.project(C.max_norm(c))(p)["dense_2"]["kernel"]

    for c in (0.1, 0.5):
        np.testing.assert_allclose(np.sqrt((f(params, c) ** 2).sum(0)), c, rtol=1e-5)
    assert len(traces) == 1


# -- assign and the compositions --------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"dense_2/kernel": np.ones((3, 4), np.float32)}, "expected shape (4, 3), found (3, 4)"),
        ({"dense_2/kernel": np.ones((4, 3))}, "expected dtype float32, found float64"),
        ({"dense_3/kernel": np.ones((4, 3))}, "no leaf 'dense_3/kernel'; close: 'dense_2/kernel'"),
        ({"*/kernel": np.ones((4, 3))}, "no leaf"),
        ({"dense_2/bias": "text"}, "expected shape"),
    ],
)
def test_assign_names_path_expected_and_found(params, values, said):
    with pytest.raises(fwt.LeafError) as caught:
        fwt.assign(values)(params)
    assert said in str(caught.value)


def test_assign(params):
    value = np.ones((4, 3), np.float32)
    new = fwt.assign({"dense_2/kernel": value})(params)
    assert np.array_equal(new["dense_2"]["kernel"], value)
    assert (
        new["dense_10"] == params["dense_10"]
        or new["dense_10"]["bias"] is params["dense_10"]["bias"]
    )
    value[:] = 5
    assert (new["dense_2"]["kernel"] == 1).all()
    wide = {"a": np.ones(2)}
    assert fwt.assign({"a": np.zeros(2)})(wide)["a"].dtype == np.float64
    jitted = jax.jit(fwt.assign({"dense_2/kernel": np.ones((4, 3), np.float32)}))(params)
    assert (jitted["dense_2"]["kernel"] == 1).all()
    with pytest.raises(TypeError):
        fwt.assign([1])


def test_chain_runs_left_to_right(params):
    one = fwt.initialize(inits.ones, 0)
    half = fwt.prune(0.5)
    assert (fwt.chain(one, half)(params)["dense_2"]["kernel"] == 0).sum() == 6
    assert (fwt.chain(half, one)(params)["dense_2"]["kernel"] == 1).all()
    assert fwt.chain()(params) is params
    with pytest.raises(TypeError):
        fwt.chain(one, 3)


def test_at_intersects(params):
    zero = fwt.initialize(inits.zeros, 0)
    new = fwt.at("dense_2/*", zero)(params)
    assert not new["dense_2"]["kernel"].any()
    assert new["dense_2"]["bias"] is params["dense_2"]["bias"]  # the default where is the kernels
    assert new["dense_10"]["kernel"] is params["dense_10"]["kernel"]
    everything = fwt.at("dense_2/*", fwt.initialize(inits.zeros, 0, "**"))(params)
    assert not everything["dense_2"]["bias"].any()
    nested = fwt.at("dense_*/*", fwt.at("**/kernel", fwt.prune(1.0, where="dense_2/*")))(params)
    assert not nested["dense_2"]["kernel"].any()
    assert nested["dense_2"]["bias"] is params["dense_2"]["bias"]
    plain = fwt.at("*/bias", lambda tree: jax.tree.map(lambda x: x * 0 + 9, tree))(params)
    assert (plain["dense_2"]["bias"] == 9).all()
    assert plain["dense_2"]["kernel"] is params["dense_2"]["kernel"]
    drawn = fwt.at("dense_2/*", fwt.initialize(inits.normal, 3))(params)
    assert jnp.array_equal(
        drawn["dense_2"]["kernel"], fwt.initialize(inits.normal, 3)(params)["dense_2"]["kernel"]
    )
    assert jax.jit(fwt.at("dense_2/*", zero))(params)["norm"]["scale"].shape == (4,)


def test_at_says_which_where_narrowed_to_nothing(params):
    with pytest.raises(fwt.WhereError, match=r"where='dense_3/\*' matches none"):
        fwt.at("dense_3/*", fwt.prune(0.5))(params)
    with pytest.raises(fwt.WhereError, match=r"inner transform.*left out.*'dense_10/kernel'"):
        fwt.at("dense_2/*", fwt.prune(0.5, where="dense_10/kernel"))(params)
    with pytest.raises(fwt.WhereError, match="inner transform matches nothing"):
        fwt.at("dense_2/*", fwt.prune(0.5, where="dense_11/kernel"))(params)
    with pytest.raises(fwt.LeafError, match="keep the tree"):
        fwt.at("dense_2/*", lambda tree: {})(params)


def test_straight_through_has_the_exact_values(params):
    t = fwt.straight_through(fwt.prune(0.5))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, t(params), fwt.prune(0.5)(params)))
    grads = jax.jit(jax.grad(lambda p: jax.tree.reduce(jnp.add, jax.tree.map(jnp.sum, t(p)))))(
        params
    )
    assert jax.tree.all(jax.tree.map(lambda g: bool((g == 1).all()), grads))


def test_a_users_own_functions_are_not_frozen(params):
    limit = [1.0]

    def clip(w, axes):
        return jnp.clip(w, -limit[0], limit[0])

    t = fwt.project(clip)
    for value in (0.5, 0.1):
        limit[0] = value
        assert float(jnp.abs(t(params)["dense_2"]["kernel"]).max()) <= value + 1e-7
    rng = np.random.default_rng(0)

    def draw(key, shape, dtype):
        return rng.normal(size=shape).astype(dtype)

    t = fwt.initialize(draw, 0)
    assert not np.array_equal(t(params)["dense_2"]["kernel"], t(params)["dense_2"]["kernel"])


@pytest.mark.parametrize(
    "key", [None, 0.5, 2**40, "0", True, np.ones(2), np.ones((3, 2), np.uint32)]
)
def test_keys_are_one_key_or_a_seed(params, key):
    with pytest.raises(fwt.FwtError):
        fwt.initialize(inits.normal, key)(params)


def test_fans_need_two_sides(params):
    with pytest.raises(fwt.AxesError, match=r"bias.*no fans"):
        fwt.initialize(inits.he_normal, 0, "**/bias")(params)
    with pytest.raises(TypeError, match="shape"):
        inits.zeros(jax.random.key(0))
    with pytest.raises(fwt.LeafError, match="a/kernel"):
        fwt.initialize(inits.uniform, 0)({"a": {"kernel": np.ones((2, 2), np.int32)}})
    legacy = fwt.initialize(inits.normal, jax.random.PRNGKey(3))(params)
    assert legacy["dense_2"]["kernel"].shape == (4, 3)


def test_straight_through_leaves_the_rest_alone():
    tree = {
        "d": {"kernel": np.ones((2, 2), np.float32)},
        "n": np.array(2**40),
        "b": np.array([1.123456789012345]),
    }
    new = fwt.straight_through(fwt.prune(0.5))(tree)
    assert new["n"] is tree["n"]
    assert new["b"] is tree["b"]


@pytest.mark.parametrize(
    ("verb", "make", "own"),
    [
        ("initialize", lambda k, t: k.initializers.HeNormal(), "initializers.keras.he_normal"),
        ("initialize", lambda k, t: k.initializers.GlorotUniform, "keras.glorot_uniform"),
        ("initialize", lambda k, t: k.initializers.Orthogonal(), "initializers.keras.orthogonal"),
        ("initialize", lambda k, t: t.nn.init.xavier_uniform_, "torch.xavier_uniform"),
        ("initialize", lambda k, t: t.nn.init.trunc_normal_, "initializers.torch.trunc_normal"),
        ("initialize", lambda k, t: "he_normal", "fwt.initializers.he_normal or fwt"),
        ("initialize", lambda k, t: "HeNormal", "fwt.initializers.keras.he_normal"),
        ("project", lambda k, t: k.constraints.MaxNorm(1.0), "fwt.constraints.max_norm"),
        ("project", lambda k, t: k.constraints.NonNeg(), "fwt.constraints.non_negative"),
        ("project", lambda k, t: type("Mine", (k.constraints.Constraint,), {})(), r"\(leaf, axes"),
        ("project", lambda k, t: "unit_norm", "fwt.constraints.unit_norm"),
        ("score", lambda k, t: "magnitude", "fwt.scores.magnitude"),
        ("score", lambda k, t: t.nn.utils.prune.L1Unstructured, "fwt.scores.magnitude"),
        ("pattern", lambda k, t: "unstructured", "fwt.patterns.unstructured"),
    ],
)
def test_a_noun_of_another_library_is_told_under_its_name_here(verb, make, own):
    import keras
    import torch
    import torch.nn.utils.prune

    noun = make(keras, torch)
    call = {
        "initialize": lambda: fwt.initialize(noun, 0),
        "project": lambda: fwt.project(noun),
        "score": lambda: fwt.prune(0.5, noun),
        "pattern": lambda: fwt.prune(0.5, pattern=noun),
    }[verb]
    with pytest.raises((TypeError, fwt.FwtError), match=own):
        call()


def test_a_function_of_one_argument_may_be_wrapped():
    def halved(w):
        return w / 2

    @functools.wraps(halved)
    def taken(*args):
        return halved(args[0])

    params = {"d": {"kernel": np.ones((3, 4), np.float32)}}
    assert float(fwt.project(taken)(params)["d"]["kernel"][0, 0]) == 0.5


@pytest.mark.parametrize(
    "verb",
    [
        lambda: fwt.project(lambda w: w),
        lambda: fwt.project(jnp.abs),
        lambda: fwt.prune(0.5, where=lambda path: True),
        lambda: fwt.prune(0.5, where=lambda path, leaf, more: True),
    ],
)
def test_a_function_of_ones_own_is_told_what_it_takes(verb):
    with pytest.raises(TypeError, match=r"takes (leaf, axes|path, leaf); found one of \("):
        verb()({"d": {"kernel": np.ones((3, 4), np.float32)}})


@pytest.mark.optimised  # LLVM is what compares them as floats
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_subnormal_numbers_under_jit_and_outside(dtype):
    least = float(jnp.finfo(dtype).smallest_subnormal)
    x = np.array([[least, -2 * least, 1.0], [4 * least, 0.0, -0.0]], dtype)
    tree = {"d": {"kernel": x}}
    wanted = np.where(np.abs(x.astype(np.float64)) > 0, x, np.zeros((), x.dtype)).tobytes()
    for t in (fwt.prune(threshold=0.0), lambda tree: fwt.apply_masks(fwt.masks_of(tree))(tree)):
        for run in (t, jax.jit(t)):
            assert np.asarray(run(tree)["d"]["kernel"]).tobytes() == wanted
    if dtype == "float16":  # whose subnormals are ordinary numbers of float32
        return
    for constraint in (fwt.constraints.unit_norm, fwt.constraints.min_max_norm(0.5, 1.0)):
        t = fwt.project(constraint)
        small = {"d": {"kernel": np.full((5, 3), 1e-40, dtype)}}
        found, expected = t(small)["d"]["kernel"], jax.jit(t)(small)["d"]["kernel"]
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


def test_the_derivative_of_pruning_is_its_mask():
    x = np.array([[3.0, -0.1], [0.2, 4.0]], np.float32)
    loss = lambda tree: jnp.sum(fwt.prune(0.5)(tree)["d"]["kernel"] ** 2)  # noqa: E731 - short
    for grad in (jax.grad(loss), jax.jit(jax.grad(loss))):
        found = grad({"d": {"kernel": jnp.asarray(x)}})["d"]["kernel"]
        np.testing.assert_array_equal(found, [[6, 0], [0, 8]])
    _, out = jax.jvp(fwt.prune(0.5), *[({"d": {"kernel": jnp.asarray(x)}},)] * 2)
    np.testing.assert_array_equal(out["d"]["kernel"], [[3, 0], [0, 4]])
