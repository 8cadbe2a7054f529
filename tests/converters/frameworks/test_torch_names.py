"""Names of layers that no torch module can have."""

import flax.linen as nn
import jax
import keras
import numpy as np
import pytest
import torch

from fwt import converters
from fwt.converters.frameworks import torch_layers

X = np.random.default_rng(0).standard_normal((2, 7, 9, 3), np.float32)


def inner():
    layers = [
        keras.layers.Conv2D(4, 3, name="Conv1"),
        keras.layers.BatchNormalization(name="half"),
        keras.layers.GlobalAveragePooling2D(name="a.b"),
        keras.layers.Dense(5, name="a_b"),
    ]
    return keras.Sequential([keras.Input(X.shape[1:]), *layers], name="mobilenetv2_1.00_224")


def chain():
    return keras.Sequential([keras.Input(X.shape[1:]), inner(), keras.layers.Dense(2, name="in")])


def graph():
    x = keras.Input(X.shape[1:])
    base = inner()
    both = [keras.layers.Dense(5, name="train")(base(x)), base(x)]
    return keras.Model(x, keras.layers.Dense(2, name="in")(keras.layers.Add(name="to")(both)))


def test_the_names_that_torch_has_are_those_of_this_torch():
    assert {n for n in dir(torch.nn.Module()) if n[0] != "_"} == torch_layers.TAKEN


@pytest.mark.parametrize("make", [chain, graph])
def test_a_name_that_torch_cannot_have_becomes_another(make, tmp_path):
    model = make()
    there = converters.from_keras(model)
    made = converters.to_torch(there)
    with torch.no_grad():
        found = made(torch.from_numpy(X.transpose(0, 3, 1, 2))).numpy()
    np.testing.assert_allclose(found, model(X), rtol=1e-5, atol=1e-6)
    state = made.state_dict()
    stem = "mobilenetv2_1_00_224"
    last = "in" if make is chain else "in_"
    assert {f"{stem}.Conv1.weight", f"{stem}.half_.weight", f"{stem}.a_b.weight"} <= {*state}
    assert f"{last}.weight" in state
    converters.save(tmp_path / "net.pt", there)
    saved = torch.load(tmp_path / "net.pt", weights_only=True)
    assert {*saved} == {*state}
    made.load_state_dict(saved)
    back = converters.load(tmp_path / "net.pt", architecture=there)
    jax.tree.map(np.testing.assert_array_equal, back.variables, there.variables)


def test_names_beside_each_other_stay_apart():
    layers = [keras.layers.Dense(4, name=n) for n in ("a.b", "a_b", "type", "type_", "x.y")]
    model = keras.Sequential([keras.Input((3,)), *layers])
    made = converters.to_torch(converters.from_keras(model))
    assert [n for n, _ in made.named_children()] == ["a_b_", "a_b", "type__", "type_", "x_y"]


@pytest.mark.parametrize(("given", "name"), [("half_", "half"), ("in_", "in"), ("a_b", "a.b")])
def test_a_name_that_an_input_has_stays_its_own(given, name):
    x = keras.Input((3,), name=given)
    model = keras.Model(x, keras.layers.Add()([keras.layers.Dense(3, name=name)(x), x]))
    made = converters.to_torch(converters.from_keras(model))
    with torch.no_grad():
        found = made(torch.from_numpy(X[:, 0, 0])).numpy()
    np.testing.assert_allclose(found, model(X[:, 0, 0]), rtol=1e-5, atol=1e-6)


class Steps(nn.Module):
    """A cell of Flax has gates named in and if."""

    @nn.compact
    def __call__(self, x):
        cell = nn.GRUCell(5)
        carry = cell.initialize_carry(jax.random.key(0), x[:, 0].shape)
        for i in range(3):
            carry, _ = cell(carry, x[:, i])
        return nn.Dense(2)(carry)


@pytest.mark.thorough
def test_a_cell_that_is_called_by_hand():
    x = np.random.default_rng(1).standard_normal((2, 3, 4), np.float32)
    variables = Steps().init(jax.random.key(0), x)
    made = converters.to_torch(Steps(), variables, input_shape=(3, 4))
    with torch.no_grad():
        found = made(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(found, Steps().apply(variables, x), rtol=1e-5, atol=1e-6)
    assert "GRUCell_0.in_.weight" in made.state_dict()
