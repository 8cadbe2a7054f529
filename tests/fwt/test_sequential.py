"""Sequential: names, equality, pickling, training flags."""

import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fwt
from fwt import layers as fl
from fwt.layers import functions


def net(width=4):
    return fwt.Sequential(
        [
            ("conv/1", nn.Conv(width, [3, 3], strides=[2, 2])),
            ("norm", nn.BatchNorm()),
            nn.relu,
            fl.MaxPool([2, 2]),
            fl.Flatten(),
            ("drop", nn.Dropout(0.5)),
            nn.Dense(3, name="last"),
        ],
        input_shape=[9, 7, 2],
    )


X = np.random.default_rng(0).normal(size=(3, 9, 7, 2)).astype(np.float32)


def test_names_equality_hash_and_pickle():
    one, two = net(), net()
    assert [n.name for n in one.layers] == ["conv/1", "norm", "2", "3", "4", "drop", "last"]
    assert one == two
    assert hash(one) == hash(two)
    assert one != net(5)
    assert one != fwt.Sequential(one.layers)  # the input shape is a part of it
    copy = pickle.loads(pickle.dumps(one))
    assert copy == one
    assert hash(copy) == hash(one)
    variables = one.init(jax.random.key(0), X)
    assert set(variables["params"]) == {"conv/1", "norm", "last"}
    assert fwt.paths(variables)[:2] == ["conv\\/1/bias", "conv\\/1/kernel"]
    traces = []
    f = jax.jit(lambda model, x: (traces.append(model), model(x))[1])
    for module in (one, two, copy):
        f(fwt.Model(module, variables), X)
    assert len(traces) == 1


def test_it_prints_what_was_said():
    text = repr(net())
    assert "  conv/1: Conv(features=4, kernel_size=(3, 3), strides=(2, 2))" in text
    assert "  last: Dense(features=3)" in text
    assert text.endswith("  input_shape=(9, 7, 2)\n)")


def test_a_model_is_a_pytree_with_a_static_module():
    model = fwt.Model(net(), net().init(jax.random.key(0), X))
    moved = jax.device_put(model)
    assert isinstance(moved, fwt.Model)
    assert moved.module == model.module
    doubled = jax.tree.map(lambda x: x * 2, model)
    assert isinstance(doubled, fwt.Model)
    module, variables = doubled
    assert module == model.module
    assert jnp.array_equal(
        variables["params"]["last"]["bias"], 2 * model.variables["params"]["last"]["bias"]
    )
    with pytest.raises(fwt.FwtError, match="weights only"):
        fwt.Model(None, variables)(X)


def test_train_sets_flags_only_where_the_layer_is_silent():
    module = net()
    variables = module.init(jax.random.key(0), X)
    y, new = module.apply(
        variables, X, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(1)}
    )
    mean = new["batch_stats"]["norm"]["mean"]
    assert not jnp.array_equal(mean, variables["batch_stats"]["norm"]["mean"])
    still = module.apply(variables, X)
    assert jnp.array_equal(still, module.apply(variables, X, train=False))
    assert not jnp.array_equal(y, still)
    said = fwt.Sequential([("drop", nn.Dropout(0.5, deterministic=True))])
    assert jnp.array_equal(said.apply({}, X, train=True), X)
    inner = fwt.Sequential([("a", said), ("b", nn.BatchNorm(use_running_average=True))])
    variables = inner.init(jax.random.key(0), X)
    inner.apply(variables, X, train=True)  # nothing is updated, so nothing must be mutable


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ([("a", nn.Dense(2)), ("a", nn.Dense(2))], "two layers are named 'a'"),
        ([nn.Dense], "must be a linen module"),
        ([("a", 3)], "must be a linen module"),
        ([np.ones((2, 2))], "function, found a numpy ndarray"),
        ([nnx.Dropout(0.5)], "'Dropout' is no linen module"),  # whose repr has several lines
        ([lambda x: x], "no activation that fwt.layers knows"),
        ([("", nn.Dense(2))], "non-empty"),
        (5, "takes a list"),
    ],
)
def test_wrong_layers_are_refused(layers, said):
    with pytest.raises(fwt.FwtError) as caught:
        fwt.Sequential(layers)
    assert said in str(caught.value)


def test_grad_through_a_model():
    model = fwt.Model(net(), net().init(jax.random.key(0), X))
    grads = jax.grad(lambda p: model.module.apply({**model.variables, "params": p}, X).sum())(
        model.variables["params"]
    )
    assert jax.tree.structure(grads) == jax.tree.structure(model.variables["params"])


@pytest.mark.parametrize(
    "function", [f for f, _, _ in functions.FUNCTIONS], ids=lambda f: f.__name__
)
def test_functions_become_layers_with_the_same_values(function):
    layer = fwt.Sequential([function])
    np.testing.assert_allclose(layer.apply({}, X), function(X), rtol=1e-6, atol=1e-6)
    assert pickle.loads(pickle.dumps(layer)) == layer


def test_an_input_in_another_layout_is_told_so():
    net = fwt.Sequential([("conv", nn.Conv(4, (3, 3)))], (6, 5, 3))
    variables = net.init(jax.random.key(0), jnp.ones((1, 6, 5, 3)))
    with pytest.raises(fwt.FwtError, match=r"conv \(Conv\).*\(2, 3, 6, 5\).*layout="):
        net.apply(variables, jnp.ones((2, 3, 6, 5)))
