"""fwt.optim: what lands after optax.apply_updates."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fwt

C = fwt.constraints
ball = fwt.project(C.max_norm(0.5))


def weights(dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "a": {"kernel": rng.normal(size=(5, 3)).astype(dtype), "bias": np.ones(3, dtype)},
        "b": {"kernel": rng.normal(size=(3, 2)).astype(dtype)},
    }


def norms(params):
    return [
        np.linalg.norm(np.asarray(x, np.float64), axis=0)
        for x in fwt.select(params, fwt.kernels).values()
    ]


OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.3, momentum=0.9),
    "adam": lambda: optax.adam(0.3),
    "adamw": lambda: optax.adamw(0.3),
    "lion": lambda: optax.lion(0.1),
    "adafactor": lambda: optax.adafactor(0.3),
    "multi_steps": lambda: optax.MultiSteps(optax.adam(0.3), 2).gradient_transformation(),
    "injected": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=0.3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_step_lands_in_the_set(name):
    plain, tx = OPTIMIZERS[name](), fwt.optim.constrain(OPTIMIZERS[name](), ball)
    params = ball(weights())
    state, other = tx.init(params), plain.init(params)
    assert jax.tree.structure(state) == jax.tree.structure(other)
    step = jax.jit(lambda g, s, p: tx.update(g, s, p))
    for number in range(5):
        grads = weights(seed=number + 1)
        expected, other = plain.update(grads, other, params)
        updates, state = step(grads, state, params)
        np.testing.assert_allclose(updates["a"]["bias"], expected["a"]["bias"], rtol=1e-5)
        landed = ball(optax.apply_updates(params, expected))
        params = optax.apply_updates(params, updates)
        for path, x in fwt.select(params, "**").items():
            np.testing.assert_allclose(x, fwt.select(landed, path)[path], atol=3e-7)
        assert all((n <= 0.5 + 1e-6).all() for n in norms(params))


def test_leaves_left_alone_get_their_step_to_the_bit():
    tx = fwt.optim.constrain(optax.adam(0.1), ball)
    plain = optax.adam(0.1)
    params, grads = weights(), weights(seed=1)
    ours = tx.update(grads, tx.init(params), params)[0]["a"]["bias"]
    theirs = plain.update(grads, plain.init(params), params)[0]["a"]["bias"]
    assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("constraint", [C.max_norm(0.5), C.non_negative(), C.box(-0.1, 0.37)])
def test_half_precision_lands_to_the_bit(dtype, constraint):
    t = fwt.project(constraint)
    tx = fwt.optim.constrain(optax.sgd(0.3), t)
    for seed in range(20):
        params, grads = weights(dtype, seed), weights(dtype, 100 + seed)
        updates, _ = tx.update(grads, tx.init(params), params)
        assert updates["a"]["kernel"].dtype == np.float32
        new = optax.apply_updates(params, updates)
        plain = optax.sgd(0.3)
        steps, _ = plain.update(grads, plain.init(params), params)
        wanted = t(optax.apply_updates(params, steps))
        for path, x in fwt.select(new, fwt.kernels).items():
            assert x.dtype == dtype
            assert np.asarray(x).tobytes() == np.asarray(fwt.select(wanted, path)[path]).tobytes()


numbers = st.builds(
    lambda sign, size, power: sign * size * 10.0**power,
    st.sampled_from([-1, 0, 1]), st.floats(1, 10), st.integers(-30, 29),
)  # fmt: skip


@given(numbers, numbers)
def test_float32_lands_as_near_as_it_says(old, new):
    old, new = np.float32(old), np.float32(new)
    tx = fwt.optim.constrain(optax.sgd(0.0), lambda p: {"w": jnp.asarray(new)})
    params = {"w": jnp.asarray(old)}
    updates, _ = tx.update({"w": jnp.zeros(())}, tx.init(params), params)
    found = np.asarray(optax.apply_updates(params, updates)["w"])
    if new == 0 or (
        (old > 0) == (new > 0) and old != 0 and 0.5 <= abs(float(new) / float(old)) <= 2
    ):
        assert found == new
    assert abs(float(found) - float(new)) <= max(
        float(np.spacing(np.abs(old))), float(np.spacing(np.abs(new)))
    )


@given(st.floats(0.5, 8), st.integers(0, 15), st.booleans())
def test_half_precision_lands_as_near_as_it_says(mantissa, down, half):
    dtype, limit = (np.float16, 12) if half else (ml_dtypes.bfloat16, 15)
    old = np.asarray(mantissa, dtype)
    new = np.asarray(float(old) * 2.0 ** -min(down, limit), dtype)
    tx = fwt.optim.constrain(optax.sgd(0.0), lambda p: {"w": jnp.asarray(new)})
    params = {"w": jnp.asarray(old)}
    updates, _ = tx.update({"w": jnp.zeros((), dtype)}, tx.init(params), params)
    found = np.asarray(optax.apply_updates(params, updates)["w"])
    assert found == new


def test_under_scan_and_vmap():
    tx = fwt.optim.constrain(optax.adam(0.3), ball)

    def run(params, key):
        def step(carry, key):
            params, state = carry
            grads = jax.tree.map(lambda x: jax.random.normal(key, x.shape), params)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), jnp.linalg.norm(params["a"]["kernel"], axis=0).max()

        return jax.lax.scan(step, (params, tx.init(params)), jax.random.split(key, 6))[1]

    params = jax.tree.map(jnp.asarray, weights())
    assert (jax.jit(run)(params, jax.random.key(0)) <= 0.5 + 1e-6).all()
    several = jax.vmap(run, (None, 0))(params, jax.random.split(jax.random.key(0), 3))
    assert (several <= 0.5 + 1e-6).all()


def test_pruned_weights_stay_zero():
    params = fwt.prune(0.5)(weights())
    keep = fwt.chain(ball, fwt.apply_masks(fwt.masks_of(params)))
    tx = fwt.optim.constrain(optax.adamw(0.3), keep)
    state = tx.init(params)
    zeros = [np.asarray(x) == 0 for x in fwt.select(params, fwt.kernels).values()]
    for seed in range(3):
        updates, state = tx.update(weights(seed=seed), state, params)
        params = optax.apply_updates(params, updates)
    for was, x in zip(zeros, fwt.select(params, fwt.kernels).values(), strict=True):
        assert np.array_equal(was, np.asarray(x) == 0)


def test_inside_multi_transform_and_masked():
    params, grads = weights(), weights(seed=1)
    labels = {"a": {"kernel": "ours", "bias": "plain"}, "b": {"kernel": "plain"}}
    tx = optax.multi_transform(
        {"ours": fwt.optim.constrain(optax.adam(0.3), ball), "plain": optax.sgd(0.3)}, labels
    )
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    new = optax.apply_updates(params, updates)
    assert (np.linalg.norm(new["a"]["kernel"], axis=0) <= 0.5 + 1e-6).all()
    np.testing.assert_allclose(
        new["b"]["kernel"], params["b"]["kernel"] - 0.3 * grads["b"]["kernel"]
    )
    tx = optax.masked(fwt.optim.constrain(optax.adam(0.3), ball), {"a": True, "b": False})
    updates, _ = tx.update(grads, tx.init(params), params)
    new = optax.apply_updates(params, updates)
    assert (np.linalg.norm(new["a"]["kernel"], axis=0) <= 0.5 + 1e-6).all()


def test_inject_hyperparams():
    params, grads = weights(), weights(seed=1)
    tx = optax.inject_hyperparams(fwt.optim.constrain, static_args=fwt.optim.constrain.static_args)(
        tx=optax.sgd(0.3), transform=ball
    )
    updates, _ = tx.update(grads, tx.init(params), params)
    assert all((n <= 0.5 + 1e-6).all() for n in norms(optax.apply_updates(params, updates)))

    @optax.inject_hyperparams
    def bounded(learning_rate, radius):
        return fwt.optim.constrain(optax.sgd(learning_rate), fwt.project(C.max_norm(radius)))

    tx = bounded(learning_rate=0.3, radius=optax.linear_schedule(0.5, 0.1, 4))
    state = tx.init(params)
    step = jax.jit(tx.update)
    for _ in range(5):
        updates, state = step(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert all((n <= 0.1 + 1e-6).all() for n in norms(params))


def test_extra_arguments_reach_the_optimizer():
    tx = fwt.optim.constrain(optax.contrib.reduce_on_plateau(), ball)
    params = weights()
    tx.update(weights(seed=1), tx.init(params), params, value=1.0)


def test_what_the_docs_say_breaks_does():
    """If optax comes to behave otherwise, the docstring has to."""
    params, grads = ball(weights()), weights(seed=1)
    tx = optax.chain(fwt.optim.constrain(optax.sgd(3.0), ball), optax.scale(3.0))
    updates, _ = tx.update(grads, tx.init(params), params)
    assert any((n > 0.6).any() for n in norms(optax.apply_updates(params, updates)))
    start = weights()
    inside = fwt.optim.constrain(
        optax.MultiSteps(optax.sgd(0.3), 2).gradient_transformation(), ball
    )
    updates, _ = inside.update(grads, inside.init(start), start)
    assert all((n <= 0.5 + 1e-6).all() for n in norms(optax.apply_updates(start, updates)))
    outside = optax.MultiSteps(fwt.optim.constrain(optax.sgd(0.3), ball), 2)
    start = weights()
    state = outside.init(start)
    for number in range(2):
        updates, state = outside.update(grads, state, start)
        start = optax.apply_updates(start, updates)
        inside = all((n <= 0.5 + 1e-6).all() for n in norms(start))
        assert inside == (number == 1)


@pytest.mark.parametrize(
    ("transform", "said"),
    [
        (lambda tree: {}, "keep the tree"),
        (lambda tree: jax.tree.map(jnp.sum, tree), "keep shape and dtype"),
    ],
)
def test_transforms_that_change_the_tree(transform, said):
    params = weights()
    tx = fwt.optim.constrain(optax.sgd(1.0), transform)
    state = tx.init(params)
    with pytest.raises(fwt.FwtError, match=said):
        tx.update(params, state, params)


def test_wrong_calls():
    params = weights()
    tx = fwt.optim.constrain(optax.sgd(1.0), ball)
    with pytest.raises(fwt.FwtError, match="params"):
        tx.update(params, tx.init(params))
    with pytest.raises(TypeError, match="optimizer"):
        fwt.optim.constrain(ball, optax.sgd(1.0))
    with pytest.raises(TypeError, match=r"fwt.project\(fwt.constraints.max_norm"):
        fwt.optim.constrain(optax.sgd(1.0), C.max_norm(1.0))
    with pytest.raises(fwt.WhereError, match="static_args"):
        optax.inject_hyperparams(fwt.optim.constrain)(optax.sgd(1.0), ball).init(params)
    with pytest.raises(TypeError, match="function of the params"):
        fwt.optim.constrain(optax.sgd(1.0), 0.5)


def without_biases(tx):
    def labels(params):
        return jax.tree_util.tree_map_with_path(
            lambda keys, _: not keys[-1].key.endswith("bias"), params
        )

    return optax.masked(tx, labels)


def test_a_bias_that_optax_hides_could_have_told_the_axes():
    rng = np.random.default_rng(0)
    bounded = fwt.project(fwt.constraints.max_norm(0.5))
    weight = {"fc": {"weight": rng.normal(size=(8, 4)), "bias": np.ones(4)}}
    stack = {"mlp": {"kernel": rng.normal(size=(4, 6, 5)), "bias": np.ones((4, 5))}}
    for tree, rule in (
        (weight, fwt.optim.constrain(optax.sgd(0.1), bounded)),
        (
            {"l.weight": np.ones((5, 4)), "l.bias": np.ones(4)},
            fwt.optim.constrain(optax.sgd(0.1), bounded),
        ),
        (stack, fwt.optim.constrain(optax.sgd(0.1), bounded)),
        (stack, fwt.optim.sparsify(optax.sgd(0.1), 0.5)),
    ):
        params = jax.tree.map(jnp.float32, tree)

        def step(params, rule):
            tx = without_biases(rule)
            return tx.update(params, tx.init(params), params)

        with pytest.raises(fwt.FwtError, match=r"say (so with )?axes="):
            step(params, rule)
    said = fwt.project(fwt.constraints.max_norm(0.5), axes={"**/weight": "in out"})
    params = jax.tree.map(jnp.float32, weight)
    tx = without_biases(fwt.optim.constrain(optax.sgd(0.0), said))
    updates, _ = tx.update(params, tx.init(params), params)
    norms = np.linalg.norm(optax.apply_updates(params, updates)["fc"]["weight"], axis=0)
    np.testing.assert_allclose(norms, 0.5, rtol=1e-5)


@pytest.mark.parametrize("jitted", [False, True])
def test_what_a_constraint_leaves_alone_takes_the_step_to_the_bit(jitted):
    bound = fwt.project(fwt.constraints.max_norm(0.5))
    params = {"d": {"kernel": jnp.ones((3, 2)), "bias": jnp.array([0, -jnp.inf])}}
    grads = {"d": {"kernel": jnp.ones((3, 2)), "bias": jnp.array([0.7, 0.1])}}
    tx = fwt.optim.constrain(optax.sgd(0.1), jax.jit(bound) if jitted else bound)
    updates, _ = tx.update(grads, tx.init(params), params)
    plain, _ = optax.sgd(0.1).update(grads, optax.sgd(0.1).init(params), params)
    assert np.array_equal(updates["d"]["bias"], plain["d"]["bias"])
    assert np.linalg.norm(optax.apply_updates(params, updates)["d"]["kernel"][:, 0]) < 0.51
