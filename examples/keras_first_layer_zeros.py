"""A live Keras model whose first layer is set to zeros, in place."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np

import fwt
from fwt import converters

model = keras.Sequential(
    [
        keras.Input((10,)),
        keras.layers.Dense(64, activation="relu", name="first"),
        keras.layers.Dense(10, activation="softmax", name="second"),
    ]
)
second = model.get_layer("second").kernel.numpy()

converters.transform(model, fwt.initialize(fwt.initializers.zeros, key=0, where="first/*"))

assert not np.any(model.get_layer("first").kernel.numpy())
assert np.array_equal(model.get_layer("second").kernel.numpy(), second)
# Nothing of the input reaches the output now, so every class is as likely as any other.
print(model.predict(np.ones((1, 10)), verbose=0).round(3))
