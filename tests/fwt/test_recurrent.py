"""Recurrent layers, whichever direction: drawn, pruned and named as their frameworks have them."""

import cases
import jax
import keras
import numpy as np
import pytest
import torch

import fwt
from fwt import converters

k = keras.layers


def make(inner, both=False, conv=False):
    layer = k.Bidirectional(inner(), name="g") if both else inner(name="g")
    return keras.Sequential([keras.Input((5, 9, 30) if conv else (5, 30)), layer])


KERAS = {
    "LSTM": lambda: make(lambda **name: k.LSTM(20, **name)),
    "GRU": lambda: make(lambda **name: k.GRU(20, reset_after=False, **name)),
    "SimpleRNN": lambda: make(lambda **name: k.SimpleRNN(20, **name)),
    "ConvLSTM": lambda: make(lambda **name: k.ConvLSTM1D(6, 3, **name), conv=True),
    "both ways": lambda: make(lambda **name: k.LSTM(20, **name), both=True),
}
NAMES = ("recurrent_kernel", "kernel", "bias")


def by_role(leaves):
    """Sorted, by what they are: a live model has other paths."""
    found = {name: [] for name in NAMES}
    for path, leaf in leaves:
        name = next(n for n in NAMES if n in path.rpartition("/")[2])
        found[name].append(np.asarray(leaf))
    return found


@pytest.mark.parametrize("name", KERAS)
def test_a_model_its_variables_and_a_new_layer_are_drawn_alike(name):
    net = KERAS[name]()
    model = converters.from_keras(net)
    new = by_role((v.path, v) for v in net.weights)
    for tree in (model, model.variables):
        drawn = by_role(fwt.select(fwt.reset(0, like="keras")(tree)).items())
        glorot = fwt.initialize(fwt.initializers.keras.glorot_uniform, 0, where="**/*kernel*")
        other = by_role(fwt.select(glorot(tree), "**/*kernel*").items())
        for role, wanted in new.items():
            assert len(drawn[role]) == len(wanted)
            for a, b in zip(drawn[role], wanted, strict=True):
                assert a.shape == b.shape
                assert np.std(a) == pytest.approx(np.std(b), rel=0.12), role
        for a, b in zip(other["kernel"], new["kernel"], strict=True):
            assert np.std(a) == pytest.approx(np.std(b), rel=0.12)


@pytest.mark.parametrize("framework", ["keras", "torch"])
def test_both_directions_are_kernels_of_a_live_model_and_of_a_loaded_one(framework):
    if framework == "keras":
        net = cases.randomise_keras(KERAS["both ways"]())
        model = converters.from_keras(net)
    else:
        lstm = torch.nn.LSTM(7, 6, num_layers=1, bidirectional=True, batch_first=True)
        net = torch.nn.Sequential(lstm)
        model = converters.from_torch(net)
    pruned = fwt.select(fwt.prune(0.5)(model), fwt.kernels)
    assert len(pruned) == 4
    assert all(int((w == 0).sum()) == w.size // 2 for w in pruned.values())
    assert len(fwt.select(model, fwt.biases)) == 2
    converters.transform(net, fwt.prune(0.5))
    live = converters.from_keras(net) if framework == "keras" else converters.from_torch(net)
    for path, w in pruned.items():
        np.testing.assert_array_equal(fwt.select(live, path)[path], w, err_msg=path)


def test_a_projection_is_drawn_as_torch_does():
    lstm = torch.nn.LSTM(7, 20, proj_size=6, bidirectional=True, batch_first=True)
    model = converters.from_torch(torch.nn.Sequential(lstm))
    for path, w in fwt.select(fwt.reset(0, like="torch")(model), fwt.kernels).items():
        assert np.abs(w).max() <= 1 / np.sqrt(20), path
        assert np.std(w) == pytest.approx(1 / np.sqrt(60), rel=0.15), path
    with pytest.raises(fwt.FwtError, match=r"projection_kernel.*no recurrent layer of Keras has a"):
        fwt.reset(0, like="keras")(model)


def test_a_stack_of_both_directions_is_told_by_each():
    one = converters.from_keras(KERAS["both ways"]()).variables["params"]
    tree = {"cells": jax.tree.map(lambda x: np.stack([x, 2 * x, 3 * x]), one["g"])}
    drawn = fwt.select(fwt.reset(0, like="keras")(tree), "**/*kernel*")
    for path, w in drawn.items():
        flat = fwt.select({"cells": one["g"]}, path)[path]
        assert np.std(np.asarray(w)) == pytest.approx(np.std(flat), rel=0.12), path
