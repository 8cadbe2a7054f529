"""A live Keras model pruned at |w| <= 0.1: the weight matrices only, the biases untouched."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np

import fwt
from fwt import converters

keras.utils.set_random_seed(0)
model = keras.Sequential(
    [
        keras.Input((10,)),
        keras.layers.Dense(64, activation="relu", bias_initializer="random_normal", name="first"),
        keras.layers.Dense(10, activation="softmax", name="second"),
    ]
)
before = {v.path: v.numpy() for v in model.variables}

converters.transform(model, fwt.prune(threshold=0.1))

for variable in model.variables:
    old, new = before[variable.path], variable.numpy()
    if variable.name == "kernel":
        assert np.array_equal(new, np.where(np.abs(old) > np.float32(0.1), old, 0))
        print(f"{variable.path}: {np.mean(new == 0):.0%} zeros")
    else:
        assert np.array_equal(new, old)
