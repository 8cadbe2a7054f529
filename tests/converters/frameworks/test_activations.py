"""Functions of other libraries that Keras's layers are given as activations."""

import importlib
import sys

import jax
import keras
import numpy as np
import pytest
import tensorflow as tf
import torch
from compare import close, in_flax, in_keras

from fwt import converters
from fwt.converters.frameworks import activations
from fwt.converters.rows import table

X = np.concatenate([np.linspace(-30, 30, 61), [-1e-3, 1e-3, 0.49, 3.5]]).astype(np.float32)[None]


@pytest.mark.parametrize("module", activations.SAME)
def test_each_computes_what_keras_does_under_its_name(module):
    parts = module.split(".")
    home = importlib.import_module(parts[0])
    for part in parts[1:]:
        home = getattr(home, part)
    for name in activations.SAME[module]:
        function = getattr(home, name)
        given = torch.from_numpy(X) if module.startswith("torch") else X
        wanted = keras.ops.convert_to_numpy(getattr(keras.activations, name)(X))
        close(np.asarray(function(given)), wanted)
        assert activations.is_known(function)
        said = function.__name__  # all that a config of Keras says of it
        assert table.row_of_function(said) is table.row_of_function(name)
    assert not activations.is_known(lambda x: x)


def test_they_convert_as_what_they_are():
    k = keras.layers
    net = keras.Sequential([
        keras.Input((4, 3)), k.Dense(5, activation=tf.nn.relu), k.Activation(keras.ops.tanh),
        k.LSTM(4, activation=tf.nn.tanh, recurrent_activation=tf.nn.sigmoid, return_sequences=True),
        k.TimeDistributed(k.Dense(3, activation=keras.ops.silu)), k.Dense(2, tf.nn.softmax),
    ])  # fmt: skip
    x = np.random.default_rng(0).normal(size=(3, 4, 3)).astype(np.float32)
    close(in_flax(converters.from_keras(net), x), in_keras(net, x))


def relu(x):
    return keras.ops.relu(x) ** 2


@pytest.mark.parametrize(
    "make",
    [
        lambda k: k.Dense(2, activation=relu),
        lambda k: k.Dense(2, activation=jax.jit(relu)),
        lambda k: k.Dense(2, activation=keras.ops.gelu),  # which approximates
        lambda k: k.Dense(2, activation=jax.nn.gelu),
        lambda k: k.TimeDistributed(k.Dense(2, activation=relu)),
        lambda k: k.LSTM(2, recurrent_activation=relu),
        lambda k: k.RNN(k.SimpleRNNCell(2, activation=relu)),
    ],
)
def test_others_are_refused_with_the_way_out(make):
    net = keras.Sequential([keras.Input((4, 3)), make(keras.layers)])
    with pytest.raises(
        converters.ConversionError, match=r"activation = keras\.activations\.(re|ge)lu"
    ):
        converters.from_keras(net)


def test_no_library_is_imported_for_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "tensorflow")
    assert not activations.is_known(tf.nn.relu)
    assert "tensorflow" not in sys.modules
