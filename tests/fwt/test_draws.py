"""Random numbers: independent for each purpose of a key, and drawn wide for narrow leaves."""

import functools
import itertools
import typing

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from marks import thorough_but
from scipy import stats

import fwt
from fwt import _keys

init, S, C = fwt.initializers, fwt.scores, fwt.constraints
SHAPE = (64, 65)
PATH = "d/kernel"


def tree(value=0.0):
    return {"d": {"kernel": jnp.full(SHAPE, value, jnp.float32)}}


# -- one seed, many purposes ------------------------------------------------------------------


def by_hand(verb):
    """What a score of a user's own draws with the key that a verb hands to it."""
    seen = []

    def score(params, *, key):
        seen.append(jax.random.uniform(key, SHAPE))
        return params

    verb(score)
    return seen[-1]


def one_update(seed, **settings):
    tx = fwt.optim.sparsify(optax.sgd(0.1), 0.5, every=1, **settings, key=seed)
    params = tree(1.0)
    _, state = tx.update(tree(0.0), tx.init(params), params)
    return state.masks["d"]["kernel"]


def lsuv(seed):
    net = fwt.Sequential([("d", nn.Dense(SHAPE[1], use_bias=False))])
    x = jax.random.normal(jax.random.key(99), (80, SHAPE[0]))
    return fwt.lsuv(net, {"params": tree()}, x, seed)["params"]["d"]["kernel"]


def pruned(score, seed):
    return fwt.prune(0.5, score, key=seed)(tree(1.0))["d"]["kernel"]


# By purpose, what it draws at a seed for one and the same leaf. An orthogonal matrix is made of
# normal numbers, with which it correlates.
DRAWS = {
    "raw": [lambda seed: jax.random.normal(jax.random.key(seed), SHAPE)],
    "initialize": [
        lambda seed: fwt.initialize(init.normal(1.0), seed)(tree())["d"]["kernel"],
        lambda seed: fwt.initialize(jax.nn.initializers.uniform(), seed)(tree())["d"]["kernel"],
        lambda seed: fwt.initialize(init.keras.orthogonal, seed)(tree())["d"]["kernel"],
    ],
    "reset": [lambda seed: fwt.reset(seed, like="torch")(tree())["d"]["kernel"]],
    "lsuv": [lsuv],
    "random": [lambda seed: S.random(tree(), key=seed)["d"]["kernel"]],
    "prune": [
        lambda seed: pruned(S.random, seed),
        lambda seed: by_hand(lambda score: pruned(score, seed)),
    ],
    "sparsify": [
        lambda seed: one_update(seed, score=S.random),
        lambda seed: by_hand(lambda score: one_update(seed, score=score)),
    ],
    "regrow": [
        # Of equal weights the first are kept: what comes in their place is what grows.
        lambda seed: one_update(seed, regrow="set", regrow_fraction=1.0),
        lambda seed: by_hand(lambda score: one_update(seed, regrow=score)),
    ],
}


def test_each_purpose_has_its_own_draws():
    """Drawn at one seed, no two purposes correlate; nor does any with what the key itself draws."""
    assert set(DRAWS) == {"raw", *typing.get_args(_keys.Purpose)}
    found = {
        (name, i): np.asarray(draw(0), np.float64).ravel()
        for name, draws in DRAWS.items()
        for i, draw in enumerate(draws)
    }
    n = SHAPE[0] * SHAPE[1]
    for (one, x), (other, y) in itertools.combinations(found.items(), 2):
        if one[0] != other[0]:
            for a, b in ((x, y), (abs(x - np.median(x)), abs(y - np.median(y)))):
                # A mask of half the weights has no spread about its median.
                rho = stats.spearmanr(a, b).statistic if a.std() * b.std() else 0.0
                assert abs(rho) < 4.5 / n**0.5, (one, other, rho)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_random_pruning_does_not_see_the_values(scope):
    for fresh in (fwt.initialize(init.normal(1.0), 0), fwt.reset(0, "keras"), fwt.reset(0, "flax")):
        kept = np.asarray(
            fwt.prune(0.5, S.random, key=0, scope=scope)(fresh(tree()))["d"]["kernel"]
        )
        assert abs((kept[kept != 0] > 0).mean() - 0.5) < 0.05


def test_the_score_and_what_regrows_get_other_keys():
    keys = []

    def score(params, *, key):
        keys.append(key)
        return params

    one_update(0, score=score, regrow=score)
    assert len({tuple(jax.random.key_data(k).tolist()) for k in keys}) == 2


@pytest.mark.parametrize("seed", [7, np.int32(7), jax.random.key(7), jax.random.PRNGKey(7)])
def test_a_seed_and_its_key_are_the_same(seed):
    legacy = hasattr(seed, "dtype") and seed.dtype == np.uint32
    for t in (
        lambda key: fwt.initialize(init.normal, key),
        lambda key: fwt.prune(0.5, S.random, key=key),
        lambda key: fwt.reset(key, "flax"),
    ):
        a, b = t(seed)(tree(1.0))["d"]["kernel"], t(7)(tree(1.0))["d"]["kernel"]
        assert legacy or jnp.array_equal(a, b)
    keys = []

    def score(params, *, key):
        keys.append(key)
        return params

    fwt.prune(0.5, score, key=seed)(tree(1.0))
    jax.random.uniform(keys[0])  # a JAX key, whatever was given


# -- narrow floats ----------------------------------------------------------------------------

NARROW = (np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)
ARGUMENTS = {"constant": (0.3,), "sparse": (0.5,), "variance_scaling": (2.0, "fan_in", "normal")}
EVERY = [
    (space, name)
    for space in (init, init.keras, init.torch)
    for name in space.__all__
    if name != "calculate_gain"
]


@pytest.mark.parametrize(
    ("space", "name"),
    thorough_but(9, EVERY[::4] + EVERY[1::4] + EVERY[2::4] + EVERY[3::4]),
    ids=[f"{s.__name__}.{n}" for s, n in EVERY[::4] + EVERY[1::4] + EVERY[2::4] + EVERY[3::4]],
)
def test_narrow_floats_are_drawn_in_float32_and_rounded(space, name):
    """The truth is NumPy's rounding of what a float32 leaf gets."""
    shape = (3, 4, 12) if name in ("delta_orthogonal", "dirac") else (12, 16)
    layer = "conv" if len(shape) == 3 else "d"
    noun = getattr(space, name)(*ARGUMENTS.get(name, ()))
    wide = np.asarray(
        fwt.initialize(noun, 0)({layer: {"kernel": np.zeros(shape, np.float32)}})[layer]["kernel"]
    )
    first = EVERY.index((space, name))
    for dtype in (NARROW[first % 4], NARROW[(first + 2) % 4]):
        leaf = {layer: {"kernel": np.zeros(shape, dtype)}}
        found = np.asarray(fwt.initialize(noun, 0)(leaf)[layer]["kernel"])
        assert found.dtype == dtype
        assert found.tobytes() == wide.astype(dtype).tobytes()


def test_half_precision_has_few_zeros_and_many_values():
    leaf = {"d": {"kernel": np.zeros((512, 512), ml_dtypes.bfloat16)}}
    module = fwt.Sequential([("d", nn.Dense(512, use_bias=False))])
    for t in (
        fwt.initialize(init.normal(1.0), 0),
        fwt.initialize(jax.nn.initializers.normal(1.0), 0),
        fwt.initialize(jax.nn.initializers.he_normal(), 0),
        fwt.reset(0, like="flax"),
        fwt.reset(0, like="flax", module=module),
    ):
        w = np.asarray(t(leaf)["d"]["kernel"])
        assert w.dtype == ml_dtypes.bfloat16
        assert len(np.unique(w.astype(np.float32))) > 1500
        assert (w == 0).sum() == 0


def test_a_users_own_initializer_gets_the_dtype_of_the_leaf():
    asked = []

    def own(key, shape, dtype):
        asked.append(dtype)
        return jnp.zeros(shape, dtype)

    fwt.initialize(own, 0)({"d": {"kernel": np.zeros((2, 2), ml_dtypes.bfloat16)}})
    assert asked == [ml_dtypes.bfloat16]


def test_what_an_8_bit_float_can_not_hold_is_no_nan():
    leaf = {"d": {"kernel": np.ones((9, 9), ml_dtypes.float8_e4m3fn)}}
    w = np.asarray(fwt.initialize(init.normal(1e4), 0)(leaf)["d"]["kernel"].astype(np.float32))
    assert np.abs(w).max() == 448
    assert np.isfinite(w).all()


@pytest.mark.parametrize("space", [init, init.keras, init.torch])
@pytest.mark.parametrize(
    ("dtype", "value"),
    [(ml_dtypes.int4, 8), (np.int8, 300), (np.uint8, -1), (np.int8, 0.5), (np.float16, 1e5),
     (ml_dtypes.float8_e4m3fn, 1e3), (ml_dtypes.float8_e4m3fn, np.inf)],
)  # fmt: skip
def test_a_constant_that_the_dtype_can_not_hold_is_refused(space, dtype, value):
    leaf = {"d": {"kernel": np.ones((2, 2), dtype)}}
    with pytest.raises(fwt.LeafError, match="d/kernel: no "):
        fwt.initialize(space.constant(value), 0)(leaf)
    assert fwt.initialize(space.constant(3), 0)(leaf)["d"]["kernel"].tolist() == [[3, 3]] * 2


def test_scores_are_computed_in_float32():
    """In half precision 1e-4 times 1e-4 is nothing, and 300 times 300 too much."""
    w = np.array([[1e-4, 2e-4, 300.0, 200.0]])
    for dtype in (np.float16, ml_dtypes.float8_e5m2):
        params = {"d": {"kernel": w.astype(dtype)}}
        wide = {"d": {"kernel": w.astype(dtype).astype(np.float32)}}
        for score in (S.saliency, S.taylor, S.movement, S.fisher, S.gradient):
            found = score(params, grads=params)["d"]["kernel"]
            assert jnp.array_equal(found, score(wide, grads=wide)["d"]["kernel"])
        mixed = fwt.prune(0.5, S.saliency, grads=wide)(params)["d"]["kernel"]
        assert (np.asarray(mixed) == 0).tolist() == [[True, True, False, False]]


def test_8_bit_floats_are_not_trained():
    """JAX adds no float32 to them, so optax can't; plainly said instead of deep in optax."""
    params = {"d": {"kernel": np.ones((4, 4), ml_dtypes.float8_e4m3fn)}}
    grads = {"d": {"kernel": np.ones((4, 4), np.float32)}}
    for tx in (
        fwt.optim.sparsify(optax.sgd(0.1), 0.5),
        fwt.optim.constrain(optax.sgd(0.1), fwt.project(C.unit_norm)),
    ):
        with pytest.raises(fwt.LeafError, match="d/kernel is float8_e4m3fn"):
            tx.update(grads, tx.init(params), params)
    own = jax.tree.map(jnp.asarray, params)
    state = tx.init(own)
    with pytest.raises(fwt.FwtError, match="no update of float8_e4m3fn"):
        tx.update(own, state, own)


def test_lsuv_of_8_bit_floats():
    net = nn.Dense(9, dtype=jnp.float32, param_dtype=jnp.float8_e4m3fn)
    x = jax.random.normal(jax.random.key(1), (64, 16))
    new = fwt.lsuv(net, net.init(jax.random.key(0), x), x, 0)
    assert new["params"]["kernel"].dtype == jnp.float8_e4m3fn
    assert abs(net.apply(new, x).var() - 1) < 0.125


SCALE = ml_dtypes.float8_e8m0fnu


@pytest.mark.parametrize(
    "run",
    [
        fwt.prune(0.5),
        fwt.masks(0.5),
        fwt.masks_of,
        fwt.project(C.max_norm(1.0)),
        fwt.initialize(init.normal, 0),
        fwt.reset(0, "keras"),
        fwt.apply_masks({"d": {"kernel": np.zeros((4, 4), bool)}}),
        lambda p: fwt.optim.sparsify(optax.sgd(0.1), 0.5).init(p),
        lambda p: C.non_negative()(p["d"]["kernel"]),
        lambda p: init.normal()(jax.random.key(0), (4, 4), SCALE),
        lambda p: fwt.prune(0.5, dtype=SCALE)({"d": {"kernel": np.ones((4, 4), np.float32)}}),
    ],
)
def test_scales_are_no_weights(run):
    """float8_e8m0fnu has no zero: what was pruned of it would be NaN."""
    params = {"d": {"kernel": np.ones((4, 4), SCALE)}}
    with pytest.raises(fwt.LeafError, match="float8_e8m0fnu"):
        run(params)
    # Beside a leaf that is selected they pass through.
    both = {**params, "e": {"kernel": np.ones((4, 4), np.float32)}}
    assert fwt.prune(0.5, where="e/*")(both)["d"]["kernel"] is params["d"]["kernel"]
    new = fwt.assign({"d/kernel": np.full((4, 4), 2, SCALE)})(params)["d"]["kernel"]
    assert new.dtype == SCALE


@pytest.mark.parametrize("dtype", [ml_dtypes.int4, ml_dtypes.uint4, np.int8, np.uint8, np.int32])
def test_whole_numbers(dtype):
    """Magnitudes are exact at both ends of the dtype; what draws fractions is refused."""
    low, high = int(ml_dtypes.iinfo(dtype).min), int(ml_dtypes.iinfo(dtype).max)
    w = np.array([[low, high, 1, 0]]).astype(dtype)
    params = {"d": {"kernel": w}}
    for score in (S.magnitude, lambda p: S.magnitude(p)):
        most = fwt.prune(0.75, score)(params)["d"]["kernel"]
        kept = [low, 0, 0, 0] if low else [0, high, 0, 0]
        assert np.asarray(most).astype(np.int64).tolist() == [kept]
    found = np.asarray(S.magnitude(params)["d"]["kernel"]).astype(np.int64)
    assert found.tolist() == [[abs(low), high, 1, 0]]
    with pytest.raises(fwt.LeafError, match="d/kernel"):
        fwt.initialize(init.normal, 0)(params)
    with pytest.raises(fwt.LeafError, match="d/kernel"):
        fwt.project(C.unit_norm)(params)
    new = np.asarray(fwt.project(C.non_negative)(params)["d"]["kernel"]).astype(np.int64)
    assert new.tolist() == [[max(low, 0), high, 1, 0]]


KEYS = {
    "a seed": lambda: 0,
    "a key": lambda: jax.random.key(0),
    "raw": lambda: jax.random.PRNGKey(0),
}


@pytest.mark.parametrize("name", thorough_but(lambda n: n != "raw", KEYS))
def test_a_key_from_outside_draws_the_same_in_any_trace(name):
    params, key = {f"a{i}": {"kernel": jnp.ones((i + 3, 3))} for i in range(6)}, KEYS[name]()
    for draw in (fwt.initialize(fwt.initializers.he_normal, key), fwt.reset(key, "torch")):
        found = [
            jax.jit(draw)(params),
            jax.lax.scan(lambda p, _, draw=draw: (draw(p), 0), params, None, length=1)[0],
        ]
        for tree in found:
            assert jax.tree.all(jax.tree.map(jnp.array_equal, tree, draw(params)))
        jax.eval_shape(draw, params)


SHAPES = [(1, 1), (5, 7), (7, 5), (3, 3, 2, 9), (33, 17), (64, 64), (64, 64), (300, 301), (9, 200)]
EACH = {
    "uniform": init.uniform(0.3),
    "truncated_normal": init.truncated_normal(0.7, -1, 2),
    "fan_geo_avg": init.variance_scaling(2.0, "fan_geo_avg", "normal"),
    "glorot_uniform": init.glorot_uniform(),
    "he_normal": init.he_normal(),
    "keras.he_normal": init.keras.he_normal(),
    "keras.random_normal": init.keras.random_normal(0.3, 0.2),
    "torch.xavier_uniform": init.torch.xavier_uniform(0.3),
    "torch.trunc_normal": init.torch.trunc_normal(0.1, 0.5, -0.3, 2.0),
    "orthogonal": init.orthogonal(),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *thorough_but(1, [("he_normal", "threefry2x32"), ("he_normal", "rbg"),
                          ("orthogonal", "not partitionable")]),
        *thorough_but(0, [("he_normal", "not partitionable"), ("orthogonal", "rbg"),
                          *((n, "threefry2x32") for n in EACH if n != "he_normal")], most=4),
    ],
)  # fmt: skip
def test_what_stands_beside_a_leaf_changes_none_of_its_numbers(name, kind):
    dtypes = itertools.cycle(["float32", "bfloat16", "float32", "float16"])
    params = {
        f"l{i}": {"kernel": jnp.zeros(shape, dtype)}
        for (i, shape), dtype in zip(enumerate(SHAPES), dtypes, strict=False)
    }
    with jax.threefry_partitionable(kind != "not partitionable"):
        key = jax.random.key(3, impl="rbg" if kind == "rbg" else "threefry2x32")
        draw = fwt.initialize(EACH[name], key)
        together, traced = draw(params), jax.jit(draw)(params)
        for layer, leaves in params.items():
            shape, dtype = leaves["kernel"].shape, leaves["kernel"].dtype
            names = " ".join([*"hw"[: len(shape) - 2], "in", "out"])
            axes = fwt._axes.Axes(f"{layer}/kernel", shape, tuple(names.split()))
            [own] = _keys.leaf_keys(key, "initialize", [axes.path])
            alone = functools.partial(EACH[name].at(axes), shape=shape, dtype=dtype)
            wanted = jax.jit(alone)(own)
            for found in (together, traced):
                np.testing.assert_array_equal(found[layer]["kernel"], wanted, err_msg=str(shape))


# -- threefry, written out ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wide", "draw"),
    [
        *((False, lambda key, d=d: jax.random.bits(key, (3, 7), d)) for d in ("uint8", "uint16")),
        (False, lambda key: jax.random.normal(key, (3, 7))),
        (True, lambda key: jax.random.bits(key, (3, 7), "uint64")),
        (True, lambda key: jax.random.uniform(key, (3, 7), "float64")),
    ],
)
def test_a_quick_key_draws_what_jaxs_own_does(wide, draw):
    with jax.enable_x64(wide):
        for key in (jax.random.key(5), jax.random.PRNGKey(5)):
            found, own = draw(_keys.quick(key, 21)), draw(key)
            assert found.dtype == own.dtype
            assert np.array_equal(found, own)


@pytest.mark.parametrize("wide", [False, True])
def test_a_seed_is_jaxs_key_of_it(wide):
    with jax.enable_x64(wide):
        for seed in (0, 5, -1, -(2**31), 2**32 - 1, np.int32(-1), np.int64(-1)):
            found, own = _keys.one_key(seed), jax.random.key(seed)
            assert np.array_equal(jax.random.key_data(found), jax.random.key_data(own))


def test_a_seed_counts_from_where_jax_is_told():
    before = jax.config.jax_random_seed_offset
    try:
        jax.config.update("jax_random_seed_offset", 7)
        own = jax.random.key_data(jax.random.key(1))
        assert np.array_equal(jax.random.key_data(_keys.one_key(1)), own)
    finally:
        jax.config.update("jax_random_seed_offset", before)


def test_words_are_folded_as_jax_does():
    for key in (jax.random.key(3), jax.random.PRNGKey(3), jax.random.key(3, impl="rbg")):
        here = _keys.leaf_keys(key, "reset", ["a", "b"])
        there = jax.jit(lambda key: _keys.leaf_keys(key, "reset", ["a", "b"]))(key)
        own = key
        for word in (*_keys._words("purpose reset"), *_keys._words("b")):
            own = jax.random.fold_in(own, word)
        assert bool((here[1] == own).all())
        assert bool((there == here).all())
