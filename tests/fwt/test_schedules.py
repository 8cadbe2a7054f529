"""fwt.schedules: against optax's own formulas, and what sparsify makes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from marks import thorough_but
from torch.nn.utils import prune as torch_prune

import fwt

COUNTS = [0, 1, 99, 100, 101, 170, 299, 300, 301, 10**6]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (fwt.schedules.cosine(0.3, 300), optax.cosine_decay_schedule(0.3, 300)),
        (fwt.schedules.cosine(1, 1), optax.cosine_decay_schedule(1.0, 1)),
        (fwt.schedules.cubic(0.9, 100, 300), optax.polynomial_schedule(0.0, 0.9, 3, 200, 100)),
        (
            fwt.schedules.cubic(0.9, 0, 101, initial=0.5),
            optax.polynomial_schedule(0.5, 0.9, 3, 101, 0),
        ),
    ],
    ids=["cosine", "cosine of one", "cubic", "cubic from more"],
)
def test_as_optax_has_it_for_ints_arrays_and_traces(ours, theirs):
    expected = [float(theirs(n)) for n in COUNTS]
    np.testing.assert_allclose([float(ours(n)) for n in COUNTS], expected, atol=1e-6)
    traced = jax.jit(jax.vmap(ours))(jnp.array(COUNTS, jnp.int32))
    np.testing.assert_allclose(traced, expected, atol=1e-6)
    assert float(ours(300)) == float(ours(10**6))  # it ends exactly


def test_lottery_rounds_leave_what_torch_leaves():
    layer = torch.nn.Linear(70, 90)
    schedule = fwt.schedules.lottery(4, 50)
    for n in range(0, 301, 25):
        if n % 50 == 0 and 0 < n <= 200:
            torch_prune.l1_unstructured(layer, "weight", 0.2)
        gone = int((layer.weight == 0).sum())
        assert abs(gone - float(schedule(n)) * 6300) <= 2, n
    values = [float(schedule(n)) for n in (0, 49, 50, 200, 10**6)]
    np.testing.assert_allclose(values, [0, 0, 0.2, 1 - 0.8**4, 1 - 0.8**4], rtol=1e-6)
    rounds = jax.jit(jax.vmap(lambda s: fwt.schedules.lottery(2, 3, s)(6)))(jnp.array([0.5, 0.1]))
    np.testing.assert_allclose(rounds, [0.75, 0.19], rtol=1e-6)


def test_a_lottery_trains_first_and_prunes_what_was_trained():
    params = {"a": {"kernel": jnp.linspace(-1.0, 1.0, 30).reshape(6, 5)}}
    tx = fwt.optim.sparsify(optax.sgd(0.1), fwt.schedules.lottery(2, 3), rewind=0)
    state, update, now = tx.init(params), jax.jit(tx.update), params
    grow = jax.tree.map(lambda x: jnp.where(jnp.abs(x) < 0.3, -3.0, 0.1), params)
    gone = []
    for n in range(1, 8):
        if n == 3:
            trained = optax.apply_updates(now, jax.tree.map(lambda g: -0.1 * g, grow))
            expected = fwt.masks(0.2)(trained)["a"]["kernel"]
        updates, state = update(grow, state, now)
        now = optax.apply_updates(now, updates)
        gone.append(int((now["a"]["kernel"] == 0).sum()))
        if n == 3:
            assert (state.masks["a"]["kernel"] == expected).all()
            first = np.where(expected, params["a"]["kernel"], 0)
            np.testing.assert_allclose(now["a"]["kernel"], first, atol=1e-6)
    assert gone == [0, 0, 6, 6, 6, 11, 11]


@pytest.mark.parametrize(
    "schedule",
    thorough_but(
        2,
        [
            lambda n: jnp.where(n < 10, 0.5, 0.8),
            lambda n: jnp.minimum(n // 3 * 0.1, 0.5),
            optax.linear_schedule(0.0, 0.6, 3, transition_begin=8),
            fwt.schedules.cubic(0.9, 2, 14),
            fwt.schedules.lottery(3, 4),
            lambda n: n % 2 * 0.1 + 0.3,
        ],
    ),
)
def test_when_masks_change(schedule):
    """Where `every` divides, and where the schedule keeps its value at the next update."""
    params = {"a": {"kernel": jnp.linspace(-1.0, 1.0, 100).reshape(10, 10)}}
    tx = fwt.optim.sparsify(optax.sgd(0.01), schedule, every=5)
    state, update, expected = tx.init(params), jax.jit(tx.update), 0.0
    for n in range(1, 18):
        updates, state = update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
        value, after = (float(np.float32(schedule(m))) for m in (n, n + 1))
        expected = value if n % 5 == 0 or value == after else expected
        assert float(state.sparsity) == pytest.approx(expected), n
        assert int((~state.masks["a"]["kernel"]).sum()) == round(expected * 100), n


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("cosine", (1.5, 10), "share must be a number from 0 to 1"),
        ("cosine", (float("nan"), 10), "share must be a number"),
        ("cosine", (True, 10), "share must be a number"),
        ("cosine", (0.3, 0), "end must be a whole number, 1 or more"),
        ("cosine", (0.3, 7.5), "end must be a whole number"),
        ("cubic", (90, 0, 10), "sparsity must be a number from 0 to 1"),
        ("cubic", (np.float32(-0.1), 0, 10), "sparsity must be a number"),
        ("cubic", (jnp.ones(2), 0, 10), "sparsity must be a number"),
        ("cubic", (0.9, -1, 10), "begin must be a whole number, 0 or more"),
        ("cubic", (0.9, 10, 10), "end must be a whole number, 11 or more"),
        ("cubic", (0.9, 0, 10, 2), "initial must be a number"),
        ("lottery", (0, 10), "rounds must be a whole number, 1 or more"),
        ("lottery", (3, 0), "steps must be a whole number"),
        ("lottery", (3, 10, "all"), "share must be a number"),
    ],
)
def test_wrong_arguments_say_so(name, arguments, said):
    with pytest.raises(fwt.FwtError, match=f"{name}: {said}"):
        getattr(fwt.schedules, name)(*arguments)
