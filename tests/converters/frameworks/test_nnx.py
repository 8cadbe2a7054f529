"""nnx.Sequential, both ways."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from marks import thorough_but

import fwt
from fwt import converters
from fwt import layers as fl

rngs = nnx.Rngs(0)


def randomised(model):
    rng = np.random.default_rng(0)
    state = nnx.state(model)
    new = jax.tree.map(
        lambda v: (
            jnp.asarray(np.abs(rng.normal(size=v.shape)) + 0.1, v.dtype)
            if jnp.issubdtype(v.dtype, jnp.floating)
            else v
        ),
        state,
    )
    nnx.update(model, new)
    model.eval()
    return model


LAYERS = {
    "linear": (lambda: [nnx.Linear(5, 3, use_bias=False, rngs=rngs)], (5,)),
    "conv": (
        lambda: [
            nnx.Conv(
                4,
                6,
                (3, 2),
                strides=(2, 1),
                padding="VALID",
                kernel_dilation=(1, 2),
                feature_group_count=2,
                rngs=rngs,
            )
        ],
        (7, 6, 4),
    ),
    "conv of one number": (lambda: [nnx.Conv(3, 2, 3, strides=2, rngs=rngs)], (7, 3)),
    "transposed": (lambda: [nnx.ConvTranspose(3, 4, (3, 2), strides=(2, 1), rngs=rngs)], (4, 5, 3)),
    "turned kernel": (
        lambda: [
            nnx.ConvTranspose(
                3, 4, (3, 2), strides=(2, 2), padding="VALID", transpose_kernel=True, rngs=rngs
            )
        ],
        (4, 5, 3),
    ),
    "batch norm": (
        lambda: [nnx.BatchNorm(4, momentum=0.9, epsilon=1e-3, use_bias=False, rngs=rngs)],
        (5, 4),
    ),
    "layer norm": (lambda: [nnx.LayerNorm(4, epsilon=1e-3, use_scale=False, rngs=rngs)], (5, 4)),
    "bare layer norm": (
        lambda: [nnx.LayerNorm(4, use_scale=False, use_bias=False, rngs=rngs)],
        (5, 4),
    ),
    "rms norm": (lambda: [nnx.RMSNorm(4, rngs=rngs)], (4,)),
    "group norm": (lambda: [nnx.GroupNorm(6, num_groups=3, rngs=rngs)], (4, 6)),
    "groups by size": (
        lambda: [nnx.GroupNorm(6, num_groups=None, group_size=2, rngs=rngs)],
        (4, 6),
    ),
    "instance norm": (lambda: [nnx.InstanceNorm(4, rngs=rngs)], (5, 6, 4)),
    "embed": (lambda: [nnx.Embed(7, 3, rngs=rngs)], (5,)),
    "dropout": (lambda: [nnx.Dropout(0.5, rngs=rngs), nnx.Linear(3, 2, rngs=rngs)], (3,)),
    "functions": (
        lambda: [nnx.relu, partial(nnx.leaky_relu, negative_slope=0.2), nnx.gelu, nnx.softmax],
        (4,),
    ),
    "nested": (
        lambda: [
            nnx.Sequential(nnx.Linear(4, 3, rngs=rngs), nnx.tanh),
            partial(nnx.max_pool, window_shape=(2,), strides=(2,)),
            nnx.Linear(3, 2, rngs=rngs),
        ],
        (5, 4),
    ),
}


@pytest.mark.parametrize("name", thorough_but(lambda n: n in [*LAYERS][::2], LAYERS))
def test_layers_go_both_ways(name):
    make, shape = LAYERS[name]
    net = randomised(nnx.Sequential(*make()))
    rng = np.random.default_rng(1)
    x = rng.normal(size=(3, *shape)).astype(np.float32)
    if name == "embed":
        x = rng.integers(0, 7, (3, *shape))
    model = converters.from_nnx(net, shape)
    expected = np.asarray(net(x))
    np.testing.assert_allclose(np.asarray(model(x)), expected, atol=1e-6)
    again = converters.to_nnx(*model)
    np.testing.assert_allclose(np.asarray(again(x)), expected, atol=1e-6)
    back = converters.from_nnx(again, shape)
    assert back.module == model.module
    for path, value in (
        fwt.select({"params": model.variables}, "**").items()
        if jax.tree.leaves(model.variables)
        else ()
    ):
        assert np.array_equal(fwt.select({"params": back.variables}, "**")[path], value)
    assert converters.verify(net, model, x).ok
    assert converters.verify(again, net, x).ok


def test_every_layer_of_ours_goes_to_nnx_and_back():
    x = np.random.default_rng(0).normal(size=(2, 6, 5, 4)).astype(np.float32)
    net = fwt.Sequential(
        [
            ("pool", fl.MaxPool((2, 2))),
            ("prelu", fl.PReLU()),
            ("pad", fl.ZeroPad(((1, 0), (0, 2)))),
            ("norm", nn.BatchNorm()),
            ("flat", fl.Reshape((4, -1))),
            ("lstm", fl.LSTM(3)),
            ("d", nn.Dense(2)),
        ],
        (6, 5, 4),
    )
    variables = jax.tree.map(np.asarray, net.init(jax.random.key(0), x))
    there = converters.to_nnx(net, variables)
    expected = np.asarray(net.apply(variables, x))
    np.testing.assert_allclose(np.asarray(there(x)), expected, atol=1e-6)
    np.testing.assert_allclose(
        np.asarray(converters.from_nnx(there, (6, 5, 4))(x)), expected, atol=1e-6
    )
    graph, state = nnx.split(there)
    np.testing.assert_allclose(
        np.asarray(jax.jit(lambda s, v: nnx.merge(graph, s)(v))(state, x)), expected, atol=1e-5
    )


def test_exact_variances_stay_exact():
    """Of a layer from torch, whose mean is large."""
    net = torch.nn.Sequential(torch.nn.LayerNorm(6))
    x = (np.random.default_rng(0).normal(size=(2, 6)) + 3000).astype(np.float32)
    there = converters.to_nnx(*converters.from_torch(net))
    expected = net(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(np.asarray(there(x)), expected, atol=2e-3)
    assert not there.layers[0].use_fast_variance


def test_one_layer_in_two_places_is_refused():
    layer = nnx.Linear(3, 3, rngs=rngs)
    for net in (nnx.Sequential(layer, layer), nnx.Sequential(nnx.Sequential(layer), layer)):
        with pytest.raises(converters.ConversionError, match="are one module"):
            converters.from_nnx(net)


def test_what_nnx_says_and_linen_can_not():
    for net, said in (
        (nnx.Sequential(nnx.LinearGeneral(3, 2, rngs=rngs)), "has no row"),
        (
            nnx.Sequential(nnx.Linear(3, 2, preferred_element_type=jnp.float32, rngs=rngs)),
            "preferred_element_type",
        ),
        (
            nnx.Sequential(nnx.Linear(3, 2, dot_general=lambda *a, **k: 0, rngs=rngs)),
            "a dot_general",
        ),
        (nnx.Sequential(lambda x: x), "0: .* is no linen module"),
        (nnx.Linear(3, 2, rngs=rngs), "give input_shape="),
    ):
        with pytest.raises(converters.ConversionError, match=said):
            converters.from_nnx(net)


def test_an_nnx_model_trains_pruned_and_goes_to_torch():
    net = nnx.Sequential(nnx.Linear(4, 16, rngs=rngs), nnx.relu, nnx.Linear(16, 1, rngs=rngs))
    x = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    y = x[:, :1] * 2 - x[:, 1:2]
    graph, params = nnx.split(net, nnx.Param)
    tx = fwt.optim.sparsify(optax.adam(0.03), 0.5, every=5)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(lambda p: jnp.mean((nnx.merge(graph, p)(x) - y) ** 2))(
            params
        )
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for _ in range(80):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[-1] < 0.1 * losses[0]
    nnx.update(net, params)
    kernel = np.asarray(net.layers[0].kernel[...])
    assert (kernel == 0).mean() == 0.5
    there = converters.to_torch(*converters.from_nnx(net, (4,)))
    assert float((there[0].weight == 0).float().mean()) == 0.5
    assert converters.verify(net, there, x).ok


# -- what runs a module leaves it as it was -----------------------------------------------------


class Keeps(nnx.Module):
    """Its forward changes all that a module may keep between calls, in place where it can."""

    def __init__(self):
        made = nnx.Rngs(0)
        self.dense = nnx.Linear(3, 3, rngs=made)
        self.sum = nnx.Variable(jnp.zeros(3))
        self.cache = nnx.Cache(jnp.zeros(()))
        self.counts = nnx.data(np.zeros(3, np.int32))
        self.last = nnx.data(jnp.zeros(3))
        self.calls, self.told, self.number = [[]], {"calls": 0}, 0
        self.rngs = nnx.Rngs(5)

    def __call__(self, x):
        self.counts += 1
        self.sum[...] = self.sum[...] + x.sum(0)
        self.cache[...] = self.cache[...] + 1
        self.last = self.last + 1
        self.calls[0].append(1)
        self.told["calls"] += 1
        self.number += 1
        self.rngs.params()
        return self.dense(x) + self.sum[...] + self.counts + self.last * self.number


class Notes(nnx.Module):
    """The same without variables, so that it can be traced."""

    def __init__(self):
        self.dense, self.calls = nnx.Linear(3, 3, rngs=nnx.Rngs(0)), []
        self.counts = nnx.data(np.zeros(3, np.int32))

    def __call__(self, x):
        self.counts += 1
        self.calls.append(1)
        return self.dense(x)


def kept(model):
    numbers = [jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
               for x in jax.tree.leaves(nnx.state(model))]  # fmt: skip
    rest = [vars(model).get(n) for n in ("calls", "told", "number")]
    return repr(([np.array(x).tolist() for x in numbers], rest))


BATCH = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)


def loss(model):
    return (model(BATCH) ** 2).sum()


RUNS = {
    "verify": (Keeps, lambda m: converters.verify(m, m, BATCH)),
    "verify, made inputs": (Keeps, lambda m: converters.verify(m, m, input_shape=(3,))),
    "wanda": (Keeps, lambda m: fwt.prune(0.5, fwt.scores.wanda(m, BATCH))(m)),
    "synflow": (Keeps, lambda m: fwt.prune(0.5, fwt.scores.synflow(m, (3,)))(m)),
    "sparsegpt": (Keeps, lambda m: fwt.sparsegpt(m, BATCH, 0.5)),
    "grasp": (Keeps, lambda m: fwt.prune(0.5, fwt.scores.grasp(loss))(m)),
    "taylor": (Keeps, lambda m: fwt.prune(0.5, fwt.scores.second_order_taylor(loss))(m)),
    "from_nnx": (Notes, lambda m: converters.from_nnx(m, (3,))),
    "to_torch": (Notes, lambda m: converters.to_torch(m, input_shape=(3,))),
}


@pytest.mark.parametrize("name", RUNS)
def test_what_runs_a_module_leaves_it_as_it_was(name):
    make, run = RUNS[name]
    model = make()
    before = kept(model)
    run(model)
    assert kept(model) == before
    model(BATCH)
    assert kept(model) != before  # the forward does change it


def test_a_module_that_keeps_states_is_equal_to_itself():
    model = Keeps()
    report = converters.verify(model, model, BATCH)
    assert report.output.status == "exact"
    assert not [note for note in report.notes if "rounding" in note]
    assert converters.verify(model, Keeps(), BATCH).ok
    attention = nnx.MultiHeadAttention(2, 4, decode=True, rngs=nnx.Rngs(0))
    attention.init_cache((1, 5, 4))
    before, x = kept(attention), np.ones((1, 1, 4), np.float32)
    assert converters.verify(attention, attention, x).ok
    assert kept(attention) == before
    attention(x)
    assert kept(attention) != before


def test_a_layer_that_works_in_place_changes_no_inputs():
    class InPlace(nnx.Module):
        def __init__(self, factor):
            self.factor = nnx.Param(jnp.float32(factor))

        def __call__(self, x):
            if isinstance(x, np.ndarray):
                x *= 2
                return x * self.factor[...]
            return 2 * x * self.factor[...]

    x = np.ones((2, 3), np.float32)
    assert converters.verify(InPlace(1), InPlace(1), x).output.status == "exact"
    assert x.tolist() == np.ones((2, 3)).tolist()
