"""fwt.optim.sparsify: what is pruned when, by whom, and what it leaves alone."""

import functools
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from marks import thorough_but

import fwt

S, C = fwt.scores, fwt.constraints
sparsify = fwt.optim.sparsify


def weights(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {
        "a": {
            "kernel": jnp.asarray(rng.normal(size=(12, 7)).astype(dtype)),
            "bias": jnp.ones(7, dtype),
        },
        "b": {"kernel": jnp.asarray(rng.normal(size=(7, 8)).astype(dtype))},
    }


def kernels(tree):
    return {p: np.asarray(x) for p, x in fwt.select(tree, fwt.kernels).items()}


def gone(masks):
    return {p: int((~m).sum()) for p, m in kernels(masks).items()}


def run(tx, steps, params=None, grads=lambda n: weights(100 + n), compiled=True):
    """The params and states after each update; the gradient pulls on the params too."""
    params = weights() if params is None else params
    update = jax.jit(tx.update) if compiled else tx.update
    state = tx.init(params)
    seen = [(params, state)]
    for n in range(1, steps + 1):
        pull = jax.tree.map(lambda g, p: (g + p).astype(p.dtype), grads(n), params)
        updates, state = update(pull, state, params)
        params = optax.apply_updates(params, updates)
        for path, mask in kernels(state.masks).items():
            if mask.shape:
                assert not kernels(params)[path][~mask].any()
        seen.append((params, state))
    return seen


OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": lambda: optax.adam(0.05),
    "adamw": lambda: optax.adamw(0.05, weight_decay=0.1),
    "lion": lambda: optax.lion(0.01),
    "adafactor": lambda: optax.adafactor(0.05, min_dim_size_to_factor=4),
    "multi_steps": lambda: optax.MultiSteps(optax.adam(0.05), 2),
    "injected": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=0.05),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.05)),
}


def ramp(n):
    return 0.6 * jnp.clip(n / 10, 0, 1)


@pytest.mark.parametrize("name", thorough_but(3, OPTIMIZERS, most=2))
def test_pruned_weights_are_zero_whatever_the_optimizer(name):
    seen = run(sparsify(OPTIMIZERS[name](), ramp, every=3), 12)  # run() asserts it at each step
    assert gone(seen[-1][1].masks) == {"a/kernel": round(0.6 * 84), "b/kernel": round(0.6 * 56)}
    assert seen[-1][0]["a"]["bias"].any()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *thorough_but(2, [(n, {}) for n in OPTIMIZERS], most=3),
        *thorough_but(1, [("adamw", {"score": S.gradient}), ("adamw", {"regrow": "rigl"})]),
    ],
)
def test_steps_made_again_in_the_loop_draw_the_same_masks_as_stored_ones(name, settings):
    tx = sparsify(OPTIMIZERS[name](), ramp, every=3, **settings)
    compiled, plain = (run(tx, 7, compiled=c)[-1] for c in (True, False))
    for a, b in zip(*map(jax.tree.leaves, (compiled, plain)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_steps_made_again_in_half_precision():
    start = weights(dtype=ml_dtypes.bfloat16)
    tx = sparsify(optax.adamw(0.05, weight_decay=0.1), ramp, every=3)
    ends = [
        run(tx, 7, start, lambda n: weights(n, ml_dtypes.bfloat16), compiled)[-1]
        for compiled in (True, False)
    ]
    (a, mine), (b, theirs) = ends
    assert gone(mine.masks) == gone(theirs.masks) == {"a/kernel": 30, "b/kernel": 20}
    for x, y in zip(*map(jax.tree.leaves, ((a, mine.masks), (b, theirs.masks))), strict=True):
        np.testing.assert_allclose(x.astype("f"), y.astype("f"), rtol=0.02, atol=0.02)


def test_an_optimizer_whose_state_holds_more_than_arrays():
    adam = optax.adam(0.05)
    named = optax.GradientTransformation(
        lambda params: {"name": "adam", "inner": adam.init(params), "rate": 0.5},
        lambda g, s, p=None: (lambda u, i: (u, {**s, "inner": i}))(*adam.update(g, s["inner"], p)),
    )
    params, seen = weights(), []
    tx = sparsify(named, ramp, every=3)
    state = tx.init(params)

    @jax.jit
    def step(count, inner):
        mine = state._replace(count=count, inner={**state.inner, "inner": inner})
        updates, new = tx.update(weights(5), mine, params)
        seen.append((new.inner["name"], new.inner["rate"]))
        return updates, new.inner["inner"]

    updates, inner = step(state.count, state.inner["inner"])
    expected, there = tx.update(weights(5), state, params)
    assert seen == [("adam", 0.5)]
    pairs = zip(*map(jax.tree.leaves, ((updates, inner), (expected, there.inner["inner"]))))
    for a, b in pairs:
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_what_is_made_again_and_what_is_stored(monkeypatch):
    monkeypatch.setattr(fwt._again, "_SMALL", 0)  # as large leaves are
    rate, w, g, m = jnp.float32(0.1), *(jnp.arange(6.0) + i for i in range(3))

    def step():
        new = 0.9 * m + g
        part = {
            "moment": -rate * new + w,  # from what is stored
            "clipped": jnp.where(new > 1, jnp.clip(new, 1, 2), 0),  # which JAX puts in a jit
            "gradient": -rate * g,  # from what isn't
            "old": m * new,  # from what the new moments are written over
            "normed": new + 1,  # read by a sum, so it is stored
            "dear": jnp.cumsum(new),
        }
        return part, {"m": new}, (part, jnp.sum(part["normed"]))

    def loop(carry):
        kept, rest, again = fwt.optim._again.twice(step, [w])
        made, carry = again(carry)
        return kept, rest, made, carry

    kept, rest, made, carry = jax.jit(loop)(jnp.float32(3))
    part, expected, total = step()
    assert list(made) == ["clipped", "moment"]
    assert carry == 3
    for name, value in made.items():
        np.testing.assert_allclose(value, part[name], rtol=1e-6)
    np.testing.assert_allclose(kept["m"], expected["m"], rtol=1e-6)
    np.testing.assert_allclose(rest[1], total[1], rtol=1e-6)
    # The loop reads the weights, the new moments and the rate, and nothing else of step().
    barrier = next(e for e in jax.make_jaxpr(loop)(0.0).eqns if "barrier" in e.primitive.name)
    assert len(barrier.invars) == 4


@pytest.mark.parametrize("every", [1, 3, 4, 100])
def test_after_update_n_the_sparsity_is_that_of_the_last_due_update(every):
    seen = run(sparsify(optax.adam(0.05), ramp, every=every), 14)
    due = 0
    for n in range(1, 15):
        if n % every == 0 or n == 10:  # from the tenth on the schedule stands still
            due = n
        expected = round(float(np.float32(ramp(due))) * 84)
        assert gone(seen[n][1].masks)["a/kernel"] == expected, n
        assert int(seen[n][1].count) == n
    assert float(seen[-1][1].sparsity) == np.float32(0.6)


def test_a_number_is_reached_at_once_and_a_traced_one_too():
    assert gone(run(sparsify(optax.sgd(0.1), 0.5), 1)[1][1].masks) == {
        "a/kernel": 42,
        "b/kernel": 28,
    }

    @jax.jit
    def step(s):
        tx = sparsify(optax.sgd(0.1), s)
        params = weights()
        return tx.update(weights(1), tx.init(params), params)[1].masks

    assert gone(step(0.25)) == {"a/kernel": 21, "b/kernel": 14}


@pytest.mark.thorough
def test_what_is_pruned_stays_so_until_the_sparsity_falls():
    for score in (S.magnitude, S.random, S.saliency, S.movement):
        seen = run(sparsify(optax.adam(0.05), ramp, score, key=0, every=2), 12)
        for (_, before), (_, after) in itertools.pairwise(seen):
            for path, mask in kernels(after.masks).items():
                assert not (mask & ~kernels(before.masks)[path]).any()
    falling = run(sparsify(optax.adam(0.05), lambda n: 0.8 - ramp(n), every=2), 12)
    assert gone(falling[2][1].masks)["a/kernel"] == round(float(np.float32(0.8 - ramp(2))) * 84)
    assert gone(falling[-1][1].masks)["a/kernel"] == round(float(np.float32(0.2)) * 84)


def moments(state):
    return [x for x in jax.tree.leaves(state) if getattr(x, "shape", None) == (12, 7)]


def smallest_first(params):
    return jax.tree.map(lambda x: -jnp.abs(x), params)


@pytest.mark.parametrize(
    ("scope", "regrow"),
    thorough_but(
        lambda case: case[0] == "global",
        [*(("global", regrow) for regrow in ("set", "rigl", S.gradient, smallest_first)),
         ("layer", "rigl"), ("layer", smallest_first), ("erk", "set"), ("erk", S.gradient)],
    ),
)  # fmt: skip
def test_regrowth_keeps_the_count_and_grows_from_zero(regrow, scope):
    tx = sparsify(
        optax.adam(0.05), 0.5, regrow=regrow, regrow_fraction=0.3, key=0, every=4, scope=scope
    )
    seen = run(tx, 9)
    count = sum(gone(seen[1][1].masks).values())
    assert count == 70
    changed = 0
    for n in range(2, 10):
        (_, before), (params, after) = seen[n - 1], seen[n]
        assert sum(gone(after.masks).values()) == count
        old, new = kernels(before.masks)["a/kernel"], kernels(after.masks)["a/kernel"]
        grown = new & ~old
        assert n % 4 == 0 or not grown.any()
        changed += int(grown.sum())
        assert not kernels(params)["a/kernel"][grown].any()
    assert changed > 0


def test_rigl_grows_where_the_gradient_is_largest():
    tx = sparsify(
        optax.sgd(0.0), 0.5, regrow="rigl", regrow_fraction=0.25, every=2, where="a/kernel"
    )
    params = weights()
    state = tx.init(params)
    grads = weights(5)
    for _ in range(2):
        before = kernels(state.masks)["a/kernel"]
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    after, g = kernels(state.masks)["a/kernel"], np.abs(kernels(grads)["a/kernel"])
    w = np.abs(kernels(weights())["a/kernel"])
    dropped = round(0.25 * 42)
    kept = np.sort(w[before])[dropped:]
    stay = before & (w >= kept[0])
    assert int(stay.sum()) == 42 - dropped
    assert (after & stay).sum() == stay.sum()
    grown, others = after & ~stay, ~after
    assert g[grown].min() >= g[others].max()


@pytest.mark.parametrize(
    "name", thorough_but(3, [n for n in OPTIMIZERS if n != "adafactor"], most=2)
)
def test_moments_are_zero_where_nothing_was_kept(name):
    tx = sparsify(OPTIMIZERS[name](), 0.5, regrow="rigl", regrow_fraction=0.5, every=4)
    seen = run(tx, 8)
    for n in (4, 8):
        before, after = seen[n - 1][1], seen[n][1]
        grown = kernels(after.masks)["a/kernel"] & ~kernels(before.masks)["a/kernel"]
        assert grown.any()
        assert moments(after.inner)
        for x in moments(after.inner):
            assert not np.asarray(x)[grown].any()
        assert any(np.asarray(x)[~grown].any() for x in moments(after.inner))


def test_factored_moments_are_left_as_they_are():
    tx = sparsify(OPTIMIZERS["adafactor"](), 0.5, regrow="rigl", every=2)
    plain = OPTIMIZERS["adafactor"]()
    shapes = [x.shape for x in jax.tree.leaves(plain.init(weights()))]
    for _, state in run(tx, 5):
        assert [x.shape for x in jax.tree.leaves(state.inner)] == shapes
    assert "factored moments" in sparsify.__doc__


def test_straight_through_moves_the_dense_weights():
    plain, tx = optax.adam(0.05), sparsify(optax.adam(0.05), 0.5, straight_through=True, every=1)
    params = dense = weights()
    state, other = tx.init(params), plain.init(dense)
    for n in range(6):
        grads = weights(10 + n)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        steps, other = plain.update(grads, other, dense)
        dense = optax.apply_updates(dense, steps)
        for path, x in kernels(fwt.prune(0.5)(dense)).items():
            np.testing.assert_allclose(kernels(params)[path], x, atol=1e-6)
            np.testing.assert_allclose(kernels(state.dense)[path], kernels(dense)[path], atol=1e-6)
            assert not kernels(params)[path][~kernels(state.masks)[path]].any()
    came_back = [
        ~kernels(fwt.masks(0.5)(weights()))[p] & m for p, m in kernels(state.masks).items()
    ]
    assert any(m.any() for m in came_back)


@pytest.mark.parametrize("rewind", [0, 3])
def test_lottery_tickets_go_back(rewind):
    steps = optax.piecewise_constant_schedule(0.2, {6: 2.0})
    seen = run(
        sparsify(optax.adam(0.05), lambda n: jnp.where(n < 4, 0.0, steps(n)), rewind=rewind), 9
    )
    start = seen[rewind]
    for n in (4, 6):  # the schedule changes and stands still
        params, state = seen[n]
        assert gone(state.masks) == {
            p: round(float(np.float32(0.2 if n == 4 else 0.4)) * x.size)
            for p, x in kernels(params).items()
        }
        for path, mask in kernels(state.masks).items():
            old = kernels(start[0])[path]
            np.testing.assert_allclose(kernels(params)[path], np.where(mask, old, 0), atol=1e-6)
        np.testing.assert_allclose(params["a"]["bias"], start[0]["a"]["bias"], atol=1e-6)
        same = jax.tree.map(np.array_equal, state.inner, start[1].inner)
        assert jax.tree.all(same)
    assert not np.allclose(seen[3][0]["a"]["bias"], weights()["a"]["bias"])


def test_iterative_pruning_of_what_remains():
    seen = run(sparsify(optax.adam(0.05), 0.5, like="torch", every=3), 9)
    counts = [gone(state.masks)["a/kernel"] for _, state in seen]
    assert counts == [0, 0, 0, 42, 42, 42, 63, 63, 63, 63 + round(0.5 * 21)]


def test_static_masks_given_or_found():
    pruned = fwt.prune(0.7)(weights())
    for masks in (fwt.masks_of, fwt.masks_of(pruned)):
        seen = run(sparsify(optax.adam(0.05), masks=masks), 3, params=pruned)
        assert gone(seen[-1][1].masks) == gone(fwt.masks_of(pruned))
    random = fwt.masks(0.9, S.random, key=3, scope="erk")
    seen = run(sparsify(optax.adam(0.05), masks=random), 3)
    assert gone(seen[-1][1].masks) == gone(random(weights()))
    on = run(sparsify(optax.adam(0.05), 0.8, masks=fwt.masks_of), 2, params=pruned)
    for path, mask in kernels(on[-1][1].masks).items():
        assert not (mask & ~kernels(fwt.masks_of(pruned))[path]).any()
    assert gone(on[-1][1].masks)["a/kernel"] == round(0.8 * 84)


def test_movement_is_summed_over_all_steps():
    tx = sparsify(optax.sgd(0.01), ramp, S.movement, every=5)
    params, total = weights(), 0
    state = tx.init(params)
    for n in range(1, 6):
        grads, alive = weights(n), kernels(state.masks)["a/kernel"]
        total = total - kernels(params)["a/kernel"] * kernels(grads)["a/kernel"]
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(state.accumulated["a/kernel"], total, rtol=1e-5)
    assert alive.all()
    order = np.argsort(total.ravel(), kind="stable")
    mask = kernels(state.masks)["a/kernel"].ravel()
    assert not mask[order[: (~mask).sum()]].any()
    fisher = run(sparsify(optax.sgd(0.01), ramp, S.fisher, every=5), 5)
    pulls = [jax.tree.map(jnp.add, weights(101 + n), fisher[n][0]) for n in range(5)]
    squares = sum(kernels(g)["b/kernel"] ** 2 for g in pulls)
    np.testing.assert_allclose(fisher[-1][1].accumulated["b/kernel"], squares, rtol=1e-5)


def test_scores_get_the_step_s_gradients_and_a_fresh_key():
    seen = []

    def score(params, *, grads, key):
        seen.append((grads["b"]["kernel"], jax.random.key_data(key)))
        return jax.tree.map(jnp.abs, params)

    tx = sparsify(optax.sgd(0.1), ramp, score, key=0, every=5)
    params = weights()
    state = tx.init(params)
    for n in range(1, 11):
        updates, state = tx.update(weights(n), state, params)
        params = optax.apply_updates(params, updates)
    assert len(seen) == 2
    assert np.array_equal(seen[0][0], weights(5)["b"]["kernel"])
    assert not np.array_equal(seen[0][1], seen[1][1])


@pytest.mark.parametrize(
    "settings",
    [
        {"pattern": fwt.patterns.n_m(2, 4)},
        {"sparsity": lambda n: 0.5 * jnp.clip(n / 8, 0, 1), "pattern": fwt.patterns.n_m(2, 4)},
        {"pattern": fwt.patterns.n_m(2, 4), "straight_through": True, "every": 1},
    ],
)
def test_n_m_in_training(settings):
    params, state = run(
        sparsify(optax.adam(0.05), where="a/kernel", **{"every": 2, **settings}), 9
    )[-1]
    mask = kernels(state.masks)["a/kernel"].reshape(3, 4, 7)
    assert (mask.sum(1) == 2).all()
    assert np.asarray(params["b"]["kernel"]).all()


@pytest.mark.thorough
def test_channels_and_scopes_in_training():
    seen = run(sparsify(optax.adam(0.05), ramp, pattern=fwt.patterns.channel, every=4), 10)
    mask = kernels(seen[-1][1].masks)["a/kernel"]
    assert (mask.all(0) | ~mask.any(0)).all()
    assert (~mask.any(0)).sum() == round(0.6 * 7)
    for scope in ("global", "lamp", "erk", "normalized"):
        state = run(sparsify(optax.adam(0.05), ramp, scope=scope, every=4), 10)[-1][1]
        assert sum(gone(state.masks).values()) == round(float(np.float32(0.6)) * 140)
    state = run(sparsify(optax.adam(0.05), scope={"a/*": 0.5, "b/*": 0.25}), 2)[-1][1]
    assert gone(state.masks) == {"a/kernel": 42, "b/kernel": 14}


@pytest.mark.parametrize(
    "settings", thorough_but(0, [{"regrow": "set"}, {"straight_through": True}, {"rewind": 0}])
)
def test_vmap_over_seeds_and_sparsities_scan_and_eager_agree(settings):
    def train(seed, target):
        tx = sparsify(
            optax.adam(0.05),
            lambda n: target * jnp.clip(n / 4, 0, 1),
            key=seed,
            every=3,
            **settings,
        )
        params = jax.tree.map(
            lambda x: x + jax.random.normal(jax.random.fold_in(seed, 1), x.shape), weights()
        )

        def step(carry, n):
            params, state = carry
            grads = jax.tree.map(lambda x: jnp.sin(x * 9 + n), params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(7))[0]

    seeds = jax.random.split(jax.random.key(0), 3)
    targets = jnp.array([0.25, 0.5, 0.75])
    many, states = jax.jit(jax.vmap(train))(seeds, targets)
    for i in range(3):
        params, state = jax.jit(train)(seeds[i], targets[i])
        for path, x in kernels(params).items():
            np.testing.assert_allclose(kernels(many)[path][i], x, atol=1e-6)
            mask = kernels(state.masks)[path]
            assert np.array_equal(kernels(states.masks)[path][i], mask)
            assert (~mask).sum() == round(float(targets[i]) * mask.size)
    eager = run(sparsify(optax.adam(0.05), ramp, key=0, every=3, **settings), 6, compiled=False)[-1]
    traced = run(sparsify(optax.adam(0.05), ramp, key=0, every=3, **settings), 6)[-1]
    for path, x in kernels(eager[0]).items():
        np.testing.assert_allclose(x, kernels(traced[0])[path], atol=1e-6)


def test_under_vmap_masks_are_drawn_only_when_they_are_due():
    """A cond under vmap would run both its branches at every step."""
    calls = []

    def score(params):
        jax.debug.callback(lambda: calls.append(1))
        return jax.tree.map(jnp.abs, params)

    tx = sparsify(optax.adam(0.1), ramp, score, every=5)
    params = jax.tree.map(lambda x: jnp.stack([x, x + 1, x + 2]), weights())
    update = jax.jit(jax.vmap(tx.update))
    state = jax.vmap(tx.init)(params)
    for _ in range(12):
        updates, state = update(params, state, params)
        params = optax.apply_updates(params, updates)
    jax.effects_barrier()
    assert gone(jax.tree.map(lambda m: m[1], state.masks))["a/kernel"] == 50
    assert len(calls) in (2, 6)  # at the updates 5 and 10, for all or for each of the three


def test_the_state_is_plain_and_donated():
    tx = sparsify(optax.adam(0.1), ramp, regrow="set", key=0)
    params = weights()
    state = tx.init(params)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))
    assert jax.tree.structure(state.masks) == jax.tree.structure(params)
    assert state.masks["a"]["bias"].shape == ()

    def step(params, state):
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    text = jax.jit(step, donate_argnums=(0, 1)).lower(params, state).compile().as_text()
    assert "input_output_alias" in text


@pytest.mark.parametrize(
    "settings",
    thorough_but(2, [{}, {"rewind": 2}, {"straight_through": True}, {"score": S.movement}]),
)
def test_the_state_goes_through_orbax(tmp_path, settings):
    tx = sparsify(optax.adam(0.05), ramp, every=3, **settings)
    params, state = run(tx, 5)[-1]
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "state", state)
        saver.wait_until_finished()
        back = saver.restore(tmp_path / "state", jax.tree.map(jnp.zeros_like, tx.init(params)))
    assert jax.tree.structure(back) == jax.tree.structure(state)
    assert jax.tree.all(jax.tree.map(np.array_equal, back, state))
    tx.update(params, back, params)


def test_inside_multi_transform_and_masked():
    params, grads = weights(), weights(1)
    labels = {"a": {"kernel": "ours", "bias": "plain"}, "b": {"kernel": "plain"}}
    tx = optax.multi_transform(
        {"ours": sparsify(optax.adam(0.1), 0.5), "plain": optax.sgd(0.1)}, labels
    )
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    new = optax.apply_updates(params, updates)
    assert int((new["a"]["kernel"] == 0).sum()) == 42
    assert np.asarray(new["b"]["kernel"]).all()
    tx = optax.masked(
        sparsify(optax.adam(0.1), ramp, every=1, regrow="set", key=0), {"a": True, "b": False}
    )
    state = tx.init(params)
    for _ in range(3):
        updates, state = jax.jit(tx.update)(grads, state, params)
    assert int((np.asarray(optax.apply_updates(params, updates)["a"]["kernel"]) == 0).sum()) >= 15


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_exactly_zero(dtype):
    params, _ = run(sparsify(optax.adam(0.05), ramp, every=2), 6, params=weights(0, dtype))[-1]
    assert params["a"]["kernel"].dtype == dtype
    run(sparsify(optax.adam(0.05), 0.5, straight_through=True), 3, params=weights(0, dtype))


def test_constrain_and_sparsify_together():
    ball = fwt.project(fwt.constraints.max_norm(0.5))
    tx = fwt.optim.constrain(sparsify(optax.adam(0.05), 0.5), ball)
    params = weights()
    state = tx.init(params)
    for n in range(4):
        updates, state = jax.jit(tx.update)(weights(n), state, params)
        params = optax.apply_updates(params, updates)
    for path, mask in kernels(state.masks).items():
        assert not kernels(params)[path][~mask].any()
        assert (np.linalg.norm(kernels(params)[path], axis=0) <= 0.5 + 1e-6).all()


SIMPLEX = fwt.project(C.simplex(2.0))


@pytest.mark.parametrize(
    "transform",
    thorough_but(4, [
        SIMPLEX,
        fwt.project(C.hyperplane(1.0, 2.0)),
        lambda tree: jax.tree.map(lambda x: x + 1, tree),
        fwt.at("a/kernel", fwt.project(C.l1_sphere(5.0))),
        fwt.project(C.l1_sphere(5.0)),
        fwt.project(C.hyperplane()),
        jax.jit(SIMPLEX),
        fwt.chain(fwt.project(C.simplex(2.0), where="a/kernel"), fwt.project(C.non_negative)),
        fwt.chain(lambda tree: jax.tree.map(lambda x: x + 1, tree)),
    ]),
)  # fmt: skip
def test_what_is_pruned_stays_so_behind_a_constraint(transform):
    for tx in (
        fwt.optim.constrain(sparsify(optax.adam(0.05), 0.5), transform),
        fwt.optim.constrain(optax.chain(sparsify(optax.adam(0.05), 0.5), optax.scale(1.0)),
                            transform),
    ):  # fmt: skip
        params = weights()
        state = tx.init(params)
        for n in range(3):
            updates, state = jax.jit(tx.update)(weights(n), state, params)
            params = optax.apply_updates(params, updates)
        masks = (state if hasattr(state, "masks") else state[0]).masks
        for path, mask in kernels(masks).items():
            assert not kernels(params)[path][~mask].any()
            assert kernels(params)[path][mask].any()
        if transform is SIMPLEX:
            assert np.allclose(kernels(params)["a/kernel"].sum(0), 2.0, atol=1e-5)


@pytest.mark.parametrize("constraint", [C.zero_mean, C.weight_standardization, C.orthogonal])
def test_a_constraint_that_would_refill_is_refused(constraint):
    t = fwt.project(constraint)
    for tx in (
        fwt.optim.constrain(sparsify(optax.sgd(0.1), 0.5), t),
        fwt.optim.constrain(sparsify(optax.sgd(0.1), 0.5), fwt.chain(fwt.at("a/*", t))),
    ):
        with pytest.raises(fwt.FwtError, match=r"would refill.*sparsify\(constrain\(tx"):
            tx.update(weights(1), tx.init(weights()), weights())
    tx = sparsify(fwt.optim.constrain(optax.sgd(0.1), t), 0.5)
    updates, state = tx.update(weights(1), tx.init(weights()), weights())
    params = optax.apply_updates(weights(), updates)
    for path, mask in kernels(state.masks).items():
        assert not kernels(params)[path][~mask].any()


def test_each_sparsify_of_several_keeps_what_it_pruned():
    one, other = (lambda tx: sparsify(tx, 0.5, where="a/kernel"),
                  lambda tx: sparsify(tx, 0.4, where="b/kernel"))  # fmt: skip
    moved = lambda tree: jax.tree.map(lambda x: x + 1, tree)  # noqa: E731
    for tx in (
        optax.chain(one(optax.sgd(0.1)), other(optax.identity())),
        other(one(optax.sgd(0.1))),
    ):
        tx, params = fwt.optim.constrain(tx, moved), weights()
        updates, _ = tx.update(weights(1), tx.init(params), params)
        zeros = {
            p: int((x == 0).sum()) for p, x in kernels(optax.apply_updates(params, updates)).items()
        }
        assert zeros == {"a/kernel": 42, "b/kernel": 22}


def test_two_sparsify_of_one_leaf_keep_what_either_pruned():
    inner = sparsify(optax.sgd(0.1), 0.5)
    tx = fwt.optim.constrain(sparsify(inner, 0.4, S.random, key=1),
                             lambda tree: jax.tree.map(lambda x: x + 1, tree))  # fmt: skip
    params = weights()
    updates, state = tx.update(weights(1), tx.init(params), params)
    found = kernels(optax.apply_updates(params, updates))
    one, other = kernels(state.masks), kernels(state.inner.masks)
    for path, value in found.items():
        assert (~one[path] & other[path]).any()
        assert not value[~(one[path] & other[path])].any()


def test_what_refills_leaves_that_are_not_pruned_is_let():
    tx = sparsify(optax.sgd(0.1), 0.5, where="a/kernel")
    for t in (fwt.project(C.zero_mean, where="b/kernel"),
              fwt.at("b/kernel", fwt.project(C.zero_mean))):  # fmt: skip
        both, params = fwt.optim.constrain(tx, t), weights()
        updates, _ = both.update(weights(1), both.init(params), params)
        found = kernels(optax.apply_updates(params, updates))
        assert (found["a/kernel"] == 0).sum() == 42
        assert np.allclose(found["b/kernel"].mean(0), 0, atol=1e-6)


def test_extra_arguments_reach_the_optimizer():
    tx = sparsify(optax.contrib.reduce_on_plateau(), 0.5)
    tx.update(weights(1), tx.init(weights()), weights(), value=1.0)
    made = optax.inject_hyperparams(sparsify, static_args=sparsify.static_args)(
        tx=optax.sgd(0.1), sparsity=0.5
    )
    made.update(weights(1), made.init(weights()), weights())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "needs a sparsity"),
        ({"sparsity": 1.5}, "0 to 1"),
        ({"sparsity": 0.5, "every": 0}, "1 or more"),
        ({"sparsity": 0.5, "every": 2.5}, "whole number"),
        ({"sparsity": 0.5, "score": S.random}, "needs key="),
        ({"sparsity": 0.5, "regrow": "set"}, "regrow='set': the score random needs key=: give"),
        ({"sparsity": 0.5, "score": S.obd}, "bind it"),
        ({"sparsity": 0.5, "regrow": "grow"}, "'set', 'rigl' or a score"),
        ({"sparsity": 0.5, "regrow": "rigl", "regrow_fraction": 2}, "share or a schedule"),
        ({"sparsity": 0.5, "regrow": "rigl", "straight_through": True}, "leave regrow out"),
        ({"sparsity": 0.5, "regrow": "rigl", "rewind": 0}, "goes with neither"),
        ({"sparsity": 0.5, "rewind": -1}, "0 or more"),
        ({"sparsity": 0.5, "rewind": 0.5}, "number of an update"),
        ({"regrow": "rigl", "pattern": fwt.patterns.n_m(2, 4)}, "nothing can grow back"),
        ({"masks": fwt.masks_of, "straight_through": True}, "give a sparsity too"),
        ({"sparsity": 0.5, "scope": "all"}, "scope must be"),
        ({"sparsity": 0.5, "like": "keras"}, "like must be"),
    ],
)
def test_wrong_settings_say_so_at_once(settings, said):
    with pytest.raises(fwt.FwtError, match=said):
        sparsify(optax.sgd(0.1), **settings)


def test_wrong_calls():
    params = weights()
    tx = sparsify(optax.sgd(0.1), 0.5)
    with pytest.raises(fwt.FwtError, match="needs the weights"):
        tx.update(params, tx.init(params))
    with pytest.raises(TypeError, match="optax optimizer"):
        sparsify(0.5, optax.sgd(0.1))
    nowhere = sparsify(optax.sgd(0.1), 0.5, where="c/*")
    with pytest.raises(fwt.WhereError, match="matches none"):
        nowhere.init(params)
    one = np.ones((), bool)
    wrong = {"a": {"kernel": np.ones((2, 2), bool), "bias": one}, "b": {"kernel": one}}
    static = sparsify(optax.sgd(0.1), masks=wrong)
    with pytest.raises(fwt.LeafError, match="expected shape"):
        static.init(params)


# -- what a reader found ----------------------------------------------------------------------


def test_straight_through_keeps_its_momentum_under_a_schedule():
    ends = []
    for sparsity in (0.5, lambda n: 0.5):
        tx = sparsify(optax.sgd(0.1, momentum=0.9), sparsity, straight_through=True, every=1)
        ends.append(run(tx, 4)[-1][1].dense["a"]["kernel"])
    np.testing.assert_allclose(*ends, atol=1e-6)


def test_a_bound_context_is_kept():
    bound = S.saliency(grads=weights(9))
    masks = run(sparsify(optax.sgd(0.1), 0.5, bound), 1)[-1][1].masks
    moved = optax.apply_updates(weights(), jax.tree.map(
        lambda g, p: -0.1 * (g + p), weights(101), weights()))  # fmt: skip
    expected = fwt.masks(0.5, bound)(moved)
    assert jax.tree.all(jax.tree.map(np.array_equal, masks, expected))
    one, two = (fwt.masks(0.5, S.random(key=0), key=k)(weights()) for k in (1, 2))
    assert jax.tree.all(jax.tree.map(np.array_equal, one, two))


def test_a_rewind_that_falls_due_where_it_saves():
    ones = jax.tree.map(jnp.ones_like, weights())
    tx = sparsify(optax.sgd(0.1), lambda n: jnp.where(n < 3, 0.0, 0.5), rewind=3, every=1)
    params = weights()
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(ones, state, params)
        params = optax.apply_updates(params, updates)
    mask = kernels(state.masks)["a/kernel"]
    moved = kernels(weights())["a/kernel"] - 0.3
    np.testing.assert_allclose(kernels(params)["a/kernel"], np.where(mask, moved, 0), atol=1e-6)


def test_updates_narrower_than_the_weights():
    params = weights()
    tx = sparsify(optax.sgd(0.1), ramp, every=2)
    state = tx.init(params)
    for n in range(6):
        grads = jax.tree.map(lambda x: x.astype(jnp.bfloat16), weights(n))
        updates, state = jax.jit(tx.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
        for path, mask in kernels(state.masks).items():
            assert not kernels(params)[path][~mask].any()
    half = sparsify(optax.adam(0.05), ramp, every=2, rewind=1)
    run(half, 4, params=weights(0, ml_dtypes.bfloat16))


@pytest.mark.parametrize("scope", ["lamp", "erk"])
def test_what_is_pruned_stays_so_under_lamp_and_erk(scope):
    start = fwt.masks(0.3, S.random, key=5, scope="global")
    settings = {"scope": scope, "masks": start, "every": 1}
    tx = sparsify(optax.adam(0.3), lambda n: 0.4 + ramp(n) / 2, S.movement, **settings)
    seen = run(tx, 12)
    for (_, before), (_, after) in itertools.pairwise(seen):
        for path, mask in kernels(after.masks).items():
            assert not (mask & ~kernels(before.masks)[path]).any()
    assert sum(gone(seen[-1][1].masks).values()) == round(float(np.float32(0.7)) * 140)


def test_more_wrong_settings():
    with pytest.raises(fwt.FwtError, match="leave where= out"):
        sparsify(optax.sgd(0.1), masks=fwt.masks_of, where="a/*")
    tx = sparsify(optax.sgd(0.1), masks=functools.partial(fwt.masks_of, where="a/*"))
    params = {n: {"x": jnp.array([[0.0, 1.0]])} for n in "ab"}
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    assert [bool(u["x"][0, 0]) for u in updates.values()] == [False, True]

    def mine(params, *, accumulated=None):
        return params

    with pytest.raises(fwt.FwtError, match=r"score.accumulate = "):
        sparsify(optax.sgd(0.1), 0.5, mine)


FROZEN = {"a": {"kernel": "x", "bias": "y"}, "b": {"kernel": "y"}}
PARTLY = {
    "masked": lambda: optax.masked(optax.adam(0.05), {"a": True, "b": False}),
    "multi": lambda: optax.multi_transform(
        {"x": optax.adam(0.05), "y": optax.sgd(0.1, 0.9)}, FROZEN
    ),
    "frozen": lambda: optax.multi_transform(
        {"x": optax.adam(0.05), "y": optax.set_to_zero()}, FROZEN
    ),
}
if hasattr(optax.contrib, "muon"):  # since optax 0.2.5
    PARTLY["muon"] = lambda: optax.contrib.muon(0.05)


@pytest.mark.parametrize("name", PARTLY)
def test_regrowth_with_optimizers_of_some_of_the_leaves(name):
    tx = sparsify(PARTLY[name](), 0.5, regrow="rigl", regrow_fraction=0.5, every=3)
    seen = run(tx, 6)
    for n in (3, 6):
        before, after = seen[n - 1][1], seen[n][1]
        grown = kernels(after.masks)["a/kernel"] & ~kernels(before.masks)["a/kernel"]
        assert grown.any()
        assert moments(after.inner)
        assert not any(np.asarray(x)[grown].any() for x in moments(after.inner))


def test_inject_hyperparams_says_what_it_needs():
    bare = optax.inject_hyperparams(sparsify)(optax.adam(0.1), sparsity=0.5)
    with pytest.raises(fwt.FwtError, match="static_args"):
        bare.init(weights())
    for name, value in (("where", None), ("pattern", None), ("score", None), ("key", 0),
                        ("every", 2), ("rewind", 3)):  # fmt: skip
        static = [n for n in sparsify.static_args if n not in (name, "sparsity")]
        given = {} if value is None else {name: value}
        made = optax.inject_hyperparams(sparsify, static_args=static)
        with pytest.raises(fwt.FwtError, match="static_args, such as those of"):
            made(optax.adam(0.1), sparsity=0.5, **given).init(weights())
    own = optax.inject_hyperparams(lambda rate, n: sparsify(optax.adam(rate), 0.5, every=n))
    with pytest.raises(fwt.FwtError, match="every does not change, and was found as an array"):
        own(0.1, 5).init(weights())
    most = [n for n in sparsify.static_args if n not in ("sparsity", "regrow_fraction")]
    tx = optax.inject_hyperparams(sparsify, static_args=most)(optax.adam(0.1), sparsity=0.5)
    _, state = tx.update(weights(1), tx.init(weights()), weights())
    assert gone(state.inner_state.masks)["a/kernel"] == 42
    state.hyperparams["sparsity"] = jnp.float32(0.75)  # which changes it while it trains
    _, state = jax.jit(tx.update)(weights(1), state, weights())
    assert gone(state.inner_state.masks)["a/kernel"] == 63
    with pytest.raises(fwt.FwtError, match="or a score, found True"):
        sparsify(optax.adam(0.1), 0.5, regrow=True)


# -- masks of the start -----------------------------------------------------------------------

RISING, FALLING = (lambda n: 0.3 * jnp.minimum(n, 3)), (lambda n: 0.8 - 0.2 * jnp.minimum(n, 4))
START = {
    "a number below": (0.5, {}),
    "a schedule that rises": (RISING, {}),
    "a schedule that falls": (FALLING, {}),
    "global": (RISING, {"scope": "global"}),
    "normalized": (0.5, {"scope": "normalized"}),
    "erk": (RISING, {"scope": "erk"}),
    "lamp": (0.5, {"scope": "lamp"}),
    "dict": (RISING, {"scope": {"a/*": 1.0, "b/*": 0.5}}),
    "torch": (0.1, {"like": "torch"}),
    "jaxpruner": (RISING, {"like": "jaxpruner"}),
    "block": (0.5, {"pattern": fwt.patterns.block((4, 1)), "where": "a/kernel"}),
    "n_m": (0.5, {"pattern": fwt.patterns.n_m(2, 4), "where": "a/kernel"}),
    "all of n_m": (None, {"pattern": fwt.patterns.n_m(2, 4), "where": "a/kernel"}),
    "regrow": (RISING, {"regrow": "rigl"}),
    "regrow erk": (0.5, {"regrow": "set", "scope": "erk"}),
    "straight_through": (0.5, {"straight_through": True}),
    "rewind": (RISING, {"rewind": 0}),
}


@pytest.mark.parametrize(
    "name", thorough_but(lambda n: n not in ("lamp", "normalized", "dict"), START)
)
def test_a_sparsity_below_that_of_the_start_brings_nothing_back(name):
    sparsity, settings = START[name]
    begin = fwt.masks(0.65, S.random, key=4)(weights())
    if name == "block":
        begin = fwt.masks(0.65, pattern=settings["pattern"], where="a/kernel")(weights())
    start = kernels(begin)
    tx = sparsify(optax.adam(0.05), sparsity, masks=begin, every=1, key=0, **settings)
    jointly = settings.get("scope") in ("global", "normalized", "erk", "lamp")
    moved = False
    for n, (_, state) in enumerate(run(tx, 5, compiled=name == "global")[1:], 1):
        value = sparsity(n) if callable(sparsity) else sparsity
        masks = {p: m for p, m in kernels(state.masks).items() if m.shape}
        for path, mask in masks.items():
            moved |= (mask & ~start[path]).any()
        pruned = {p: (~m).sum() for p, m in masks.items()}
        least = {p: (~start[p]).sum() for p in masks}
        if jointly:
            size = sum(m.size for m in masks.values())
            share = round(float(np.float32(value)) * size)
            assert sum(pruned.values()) == max(share, sum(least.values())), n
        elif settings.get("like") != "torch" and "n_m" not in name:
            for path, mask in masks.items():
                share = float(np.float32(value)) * (
                    settings["scope"][f"{path[0]}/*"] if name == "dict" else 1
                )
                if name == "jaxpruner":
                    share = 1 - max(round(mask.size * (1 - share)), 1) / mask.size
                assert pruned[path] == max(round(share * mask.size), least[path]), (n, path)
    # What is exchanged or trained densely may come back, but no more of it than goes.
    assert moved == (name in ("regrow", "regrow erk", "straight_through"))


def test_the_start_under_scan_and_vmap_over_traced_schedules():
    begin = fwt.masks(0.65, S.random, key=4)(weights())
    params = fwt.apply_masks(begin)(weights())

    def train(target):
        tx = sparsify(
            optax.adam(0.05), lambda n: target * jnp.clip(n / 4, 0, 1), masks=fwt.masks_of, every=1
        )

        def step(carry, n):
            params, state = carry
            updates, state = tx.update(jax.tree.map(jnp.cos, params), state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), (params["a"]["kernel"] == 0).sum()

        return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(5))[1]

    gone = jax.jit(jax.vmap(train))(jnp.array([0.0, 0.5, 0.9]))
    at_start = round(0.65 * 84)
    full = [max(round(0.9 * min(n, 4) / 4 * 84), at_start) for n in range(1, 6)]
    assert gone.tolist() == [[at_start] * 5, [at_start] * 5, full]


def equations(jaxpr):
    inner = (x for e in jaxpr.eqns for x in jax.tree.leaves([*e.params.values()]))
    return len(jaxpr.eqns) + sum(equations(x) for x in inner if hasattr(x, "eqns"))


def stack(slices):
    draw = np.random.default_rng(slices).normal(size=(slices, 6, 5))
    params = {"s": {"kernel": jnp.asarray(draw, jnp.float32)}, "k": jnp.ones((7, 3))}
    most = {"s": {"kernel": jnp.linspace(-1, 1, slices)[:, None, None]}, "k": -1}
    return params, jax.tree.map(jnp.greater, params, most)


STACKED = {"where": "**", "axes": {"s/kernel": "stack in out"}, "every": 1}


@pytest.mark.parametrize(
    ("scope", "settings"),
    [
        ("layer", {}),
        ("erk", {}),
        ("global", {}),
        ("layer", {"like": "jaxpruner"}),
        ("layer", {"like": "torch"}),
    ],
)
def test_many_slices_make_no_larger_graph(scope, settings):
    sizes = []
    for slices in (3, 24):
        params, begin = stack(slices)
        sparsity = 0.5 if settings.get("like") == "torch" else RISING
        tx = sparsify(optax.sgd(0.1), sparsity, scope=scope, masks=begin, **STACKED, **settings)
        state = tx.init(params)
        sizes.append(equations(jax.make_jaxpr(tx.update)(params, state, params)))
    assert sizes[0] == sizes[1]


def test_each_slice_prunes_at_least_what_the_start_did():
    params, begin = stack(5)
    tx = sparsify(optax.sgd(0.01), RISING, masks=begin, **STACKED)
    floor = (~np.asarray(begin["s"]["kernel"])).sum((1, 2))
    state, update = tx.init(params), jax.jit(tx.update)
    for n in (1, 2):
        updates, state = update(params, state, params)
        params = optax.apply_updates(params, updates)
        gone = (~np.asarray(state.masks["s"]["kernel"])).sum((1, 2))
        assert gone.tolist() == np.maximum(floor, round(0.3 * n * 30)).tolist()
        assert (~np.asarray(state.masks["k"])).sum() == round(0.3 * n * 21)
    assert floor.min() < 9 < 18 < floor.max()


# -- regrowth ---------------------------------------------------------------------------------

WITH_SIZES = {
    "adam": lambda: optax.adam(1.0),
    "adabelief": lambda: optax.adabelief(1.0),
    "amsgrad": lambda: optax.amsgrad(1.0),
    "rmsprop": lambda: optax.rmsprop(1.0),
    "adagrad": lambda: optax.adagrad(1.0),
    "nadamw": lambda: optax.nadamw(1.0, weight_decay=0.0),
    "adafactor": lambda: optax.adafactor(1.0, multiply_by_parameter_scale=False),
    "lion": lambda: optax.lion(1.0),
    "momentum": lambda: optax.sgd(1.0, 0.9),
    "injected": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=1.0),
    "chain": lambda: optax.chain(optax.clip(1.0), optax.scale_by_adam(), optax.scale(-1.0)),
}


@pytest.mark.parametrize("name", thorough_but(2, WITH_SIZES, most=4))
def test_weights_that_grow_step_no_further_than_others(name):
    """Each weight's gradient is noise of one size, so no step is to stand out, then or later."""
    tx = sparsify(WITH_SIZES[name](), 0.5, regrow="rigl", regrow_fraction=0.4, every=1000)
    params = jax.tree.map(lambda x: 1e4 * x, weights())  # so far off zero that the order stays

    def step(carry, n):
        state, params = carry
        key = jax.random.fold_in(jax.random.key(3), n)
        noise = jax.random.rademacher(key, (12, 7), jnp.float32)
        grads = {**params, "a": {"kernel": noise, "bias": jnp.ones(7)}}
        before = state.masks["a"]["kernel"]
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        after = state.masks["a"]["kernel"]
        return (state, params), (jnp.abs(updates["a"]["kernel"]), before, after)

    scan = jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.arange(1, 1061))[1])
    steps, before, after = map(np.asarray, scan((tx.init(params), params)))
    grown = after[999] & ~before[999]
    others = after[999] & before[999]
    assert grown.sum() >= 5
    for late in range(1000, 1060):
        assert steps[late][grown].max() <= 1.3 * steps[1000:][:, others].max(), late
    assert steps[1000:][:, grown].min(0).max() > 0


def test_a_copy_of_the_weights_grows_from_zero_as_they_do():
    params = jax.tree.map(lambda x: jnp.abs(x) + 0.1, weights())
    tx = optax.contrib.schedule_free_adamw(1e-3)
    tx = sparsify(tx, 0.5, regrow="rigl", regrow_fraction=0.5, every=4)
    seen = run(tx, 5, params)
    grown = kernels(seen[4][1].masks)["a/kernel"] & ~kernels(seen[3][1].masks)["a/kernel"]
    assert grown.any()
    inner = seen[5][1].inner
    assert np.abs(inner.z["a"]["kernel"])[grown].max() < 0.02
    assert np.abs(kernels(seen[5][0])["a/kernel"])[grown].max() < 0.02
    assert (
        np.abs(inner.z["a"]["kernel"])[~grown & kernels(seen[5][1].masks)["a/kernel"]].min() > 0.1
    )


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (fwt.schedules.cosine(0.5, 12), {4: 16, 8: 5, 12: 0, 16: 0, 20: 0}),
        (None, {n: round(0.3 * 42 / np.sqrt(n / 4)) for n in (4, 8, 12, 16, 20)}),
    ],
)
def test_what_is_exchanged_follows_the_schedule(share, expected):
    settings = {"regrow": smallest_first, "regrow_fraction": share, "every": 4}
    seen = run(sparsify(optax.sgd(0.01), 0.5, where="a/kernel", **settings), 20)
    masks = [kernels(state.masks)["a/kernel"] for _, state in seen]
    pull = jax.tree.map(jnp.add, weights(101), weights())
    moved = jax.tree.map(lambda p, g: p - 0.01 * g, weights(), pull)
    # Nothing is exchanged when the masks are first drawn.
    assert np.array_equal(masks[1], kernels(fwt.masks(0.5, where="a/kernel")(moved))["a/kernel"])
    exchanged = [int((new & ~old).sum()) for old, new in itertools.pairwise(masks[1:])]
    assert exchanged == [expected.get(n, 0) for n in range(2, 21)]


@pytest.mark.parametrize("where", ["dense/kernel", "encoder/dense/kernel", fwt.kernels])
def test_moments_belong_to_the_whole_path_of_a_weight(where):
    kernel, other = weights()["a"]["kernel"], weights(1)["a"]["kernel"]
    params = {"dense": {"kernel": kernel}, "encoder": {"dense": {"kernel": other}}}
    tx, plain = sparsify(optax.sgd(0.1, 0.9), ramp, where=where, every=1), optax.sgd(0.1, 0.9)
    state, alone, theirs = tx.init(params), plain.init(params), params
    for _ in range(4):
        before = state.masks
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
        updates, alone = plain.update(jax.tree.map(jnp.ones_like, params), alone, theirs)
        theirs = optax.apply_updates(theirs, updates)
    expected = jax.tree.map(lambda x, m: jnp.where(m, x, 0), alone[0].trace, before)
    jax.tree.map(np.testing.assert_array_equal, state.inner[0].trace, expected)


def test_a_moment_is_of_one_kind_in_all_leaves():
    """Where all gradients of a leaf are positive, its first moment has no negative entry either,
    but it has in other leaves. A kept weight without gradients has not grown."""
    params = {"a": {"kernel": jnp.arange(1.0, 9).reshape(2, 4)}, "b": {"bias": jnp.ones(3)}}
    grads = {"a": {"kernel": jnp.ones((2, 4)).at[1, 3].set(0)}, "b": {"bias": -jnp.ones(3)}}
    tx = sparsify(optax.adam(1e-3), 0.5, regrow=smallest_first, regrow_fraction=0.5, every=3)
    state = tx.init(params)
    for _ in range(4):
        before = state
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    moments, old = state.inner[0], before.inner[0]
    grown = np.asarray(before.masks["a"]["kernel"]) & (np.asarray(old.nu["a"]["kernel"]) == 0)
    grown[1, 3] = False
    assert grown.sum() == 2
    np.testing.assert_allclose(moments.mu["a"]["kernel"][grown], 0.1, rtol=1e-6)
    assert moments.nu["a"]["kernel"][grown].min() > 1.5e-3  # from the mean, not from zero
    assert moments.nu["a"]["kernel"][1, 3] == 0


def test_only_regrowth_looks_at_what_is_typical():
    falling = sparsify(optax.adam(0.05), lambda n: 0.8 - ramp(n), every=2)
    seen = run(falling, 5)
    assert seen[0][1].grown == seen[5][1].grown == ()
    came = kernels(seen[4][1].masks)["a/kernel"] & ~kernels(seen[3][1].masks)["a/kernel"]
    assert came.any()
    nu = kernels(seen[5][1].inner[0].nu)["a/kernel"]
    pull = kernels(weights(105))["a/kernel"]  # the weights start from zero
    np.testing.assert_allclose(nu[came], 1e-3 * pull[came] ** 2, rtol=1e-4)


def test_what_is_typical_of_a_large_leaf():
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.normal(size=(300, 151)), jnp.float32)}
    masks = {"kernel": params["kernel"] > 0.5}
    sizes = jnp.where(masks["kernel"], params["kernel"] ** 4, 1e-16)
    state = {"mu": {"kernel": -params["kernel"]}, "nu": {"kernel": sizes}, "z": params}
    mean = float(sizes[masks["kernel"]].mean())
    mu, nu, copy = fwt.optim._moments.typical(state, masks, params)
    assert mu[0] == copy[0] == -1
    np.testing.assert_allclose(nu, [1e-16, mean], rtol=0.1)


@pytest.mark.parametrize(
    "sparsity", [0.6, lambda n: 0.6, None], ids=["number", "schedule", "masks"]
)
def test_what_schedule_free_evaluates_is_sparse_too(sparsity):
    params = {"d": {"kernel": jax.random.normal(jax.random.key(0), (6, 5))}}
    masks = None if sparsity is not None else fwt.masks(0.6)
    tx = optax.contrib.schedule_free_adamw(0.1)
    tx = fwt.optim.sparsify(tx, sparsity, every=1, masks=masks)
    if masks is not None:
        params = fwt.prune(0.6)(params)
    state = tx.init(params)
    for _ in range(4):
        updates, state = tx.update(jax.tree.map(jnp.sin, params), state, params)
        params = optax.apply_updates(params, updates)
    seen = optax.contrib.schedule_free_eval_params(state.inner, params)["d"]["kernel"]
    assert int((params["d"]["kernel"] == 0).sum()) == int((seen == 0).sum()) == 18


def test_an_infinity_that_is_not_pruned_stays_through_a_rewind():
    bias = jnp.array([0, -jnp.inf, 1])
    params = {"d": {"kernel": jax.random.normal(jax.random.key(0), (6, 3)), "bias": bias}}
    tx = fwt.optim.sparsify(optax.sgd(0.1), fwt.schedules.lottery(2, 2), rewind=0, every=1)
    state = tx.init(params)
    for _ in range(5):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
    assert params["d"]["bias"][1] == -jnp.inf
    assert np.isfinite(np.delete(params["d"]["bias"], 1)).all()


def test_params_that_are_two_trees_are_refused():
    params = {"d": {"kernel": jnp.ones((6, 3))}}
    both = optax.LookaheadParams.init_synced(params)
    tx = fwt.optim.sparsify(optax.lookahead(optax.sgd(0.1), 2, 0.5), 0.5)
    with pytest.raises(fwt.FwtError, match=r"lookahead, whose params are two trees"):
        tx.update(params, tx.init(both), both)


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"sparsity": 0.5}, (False, True)),
        ({"sparsity": 1.0}, (False, False)),
        ({"sparsity": 0.5, "regrow": "rigl", "every": 1}, (False, True)),
        ({"sparsity": 0.5, "straight_through": True, "every": 1}, (False, True)),
        ({"masks": lambda p: fwt.masks(0.5, scope="global", where="**")(p)}, (False, True)),
    ],
)
def test_a_scalar_is_a_weight_like_others(settings, kept, jitted):
    params = {
        "w": jnp.array([[1.0, -2.0], [3.0, 0.2]]),
        "a": jnp.float32(0.01),
        "b": jnp.float32(5),
    }
    told = {} if "masks" in settings else {"scope": "global", "where": "**"}
    tx = fwt.optim.sparsify(optax.adam(0.1), **told, **settings)
    update, state = jax.jit(tx.update) if jitted else tx.update, tx.init(params)
    for _ in range(3):
        updates, state = update(jax.tree.map(jnp.cos, params), state, params)
        params = optax.apply_updates(params, updates)
    if "regrow" not in settings:
        assert (bool(state.masks["a"]), bool(state.masks["b"])) == kept
    assert sum(int(mask.sum()) for mask in jax.tree.leaves(state.masks)) == 3 * any(kept)
    for mask, weight in zip(jax.tree.leaves(state.masks), jax.tree.leaves(params), strict=True):
        assert not jnp.where(mask, 0, weight).any()
        assert "regrow" in settings or jnp.where(mask, weight, 1).all()


def test_what_was_just_dropped_may_grow_at_once():
    """As in the papers' code: fewer are exchanged than are dropped, and these keep their values."""
    params = {"a": {"kernel": jax.random.normal(jax.random.key(0), (20, 10))}}
    settings = {"regrow": "set", "regrow_fraction": 0.3, "every": 1, "key": 1}
    tx = fwt.optim.sparsify(optax.sgd(0.0), masks=fwt.masks(0.5), sparsity=0.5, **settings)
    state = tx.init(params)
    before = state.masks["a"]["kernel"]
    updates, state = tx.update(params, state, params)
    new = optax.apply_updates(params, updates)["a"]["kernel"]
    kept = state.masks["a"]["kernel"]
    assert int(kept.sum()) == 100
    assert 15 < int((before & ~kept).sum()) < 30
    assert bool((new == jnp.where(before & kept, params["a"]["kernel"], 0)).all())


def test_masks_by_path_mask_the_leaves_that_they_name():
    params = {
        "a": {"kernel": jax.random.normal(jax.random.key(0), (4, 3)), "bias": jnp.ones(3)},
        "b": {"kernel": jax.random.normal(jax.random.key(1), (4, 3))},
    }
    mask = np.tri(4, 3, dtype=bool)
    for masks in ({"a/kernel": mask}, lambda _: {"a.kernel": mask}):
        for tx in (sparsify(optax.adam(0.1), masks=masks),
                   fwt.optim.constrain(sparsify(optax.adam(0.1), masks=masks),
                                       fwt.project(fwt.constraints.max_norm(1.0)))):  # fmt: skip
            state = tx.init(params)
            assert state.masks["b"]["kernel"].shape == state.masks["a"]["bias"].shape == ()
            updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
            new = optax.apply_updates(params, updates)
            assert np.array_equal(np.asarray(new["a"]["kernel"]) != 0, mask)
            assert (new["b"]["kernel"] != 0).all()
    with pytest.raises(fwt.LeafError, match="'a/kernl' is no leaf of the tree; close: 'a/kernel'"):
        sparsify(optax.sgd(0.1), masks={"a/kernl": mask}).init(params)


@pytest.mark.parametrize("settings", [{}, {"regrow": "rigl"}, {"masks": True}])
def test_the_scope_of_an_output_holds_in_training(settings):
    params = {"a": {"kernel": jax.random.normal(jax.random.key(0), (8, 3))}}
    if "masks" in settings:
        settings = {"masks": {"a/kernel": np.arange(8)[:, None] % 4 < np.full(3, 3)}}
    tx = sparsify(
        optax.adam(0.1), fwt.schedules.cubic(0.5, 0, 4), scope="output", every=1, **settings
    )
    step, state = jax.jit(tx.update), tx.init(params)
    for _ in range(6):
        updates, state = step(jax.tree.map(jnp.sin, params), state, params)
        params = optax.apply_updates(params, updates)
        gone = np.asarray((~state.masks["a"]["kernel"]).sum(0))
        assert len({*gone}) == 1
    assert (gone == 4).all()
