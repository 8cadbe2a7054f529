"""A Keras net for digits that model.fit trains to 90 % zeros, with bounded norms."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np
import optax
from sklearn.datasets import load_digits

import fwt
from fwt import converters

keras.utils.set_random_seed(0)
images, labels = load_digits(return_X_y=True)
shuffled = np.random.default_rng(0).permutation(len(labels))
images, labels = images[shuffled], labels[shuffled]
images = (images / 16).astype(np.float32)
train, test = slice(0, 1400), slice(1400, None)


def layer(units, activation):
    return keras.layers.Dense(
        units,
        activation,
        kernel_initializer=converters.keras_initializer(fwt.initializers.orthogonal),
        kernel_constraint=converters.keras_constraint(fwt.constraints.max_norm(2.0)),
    )


model = keras.Sequential([keras.Input((64,)), layer(128, "relu"), layer(10, "softmax")])
model.compile(keras.optimizers.Adam(2e-3), "sparse_categorical_crossentropy")
# The share of zeros grows over the first 200 of 330 batches, counted over all layers.
schedule = fwt.schedules.cubic(0.9, 0, 200)
gradual = fwt.optim.sparsify(optax.set_to_zero(), schedule, scope="global", every=10)
model.fit(
    images[train],
    labels[train],
    batch_size=64,
    epochs=15,
    verbose=0,
    callbacks=[converters.Callback(gradual)],
)

kernels = fwt.select(model, fwt.kernels)
zeros = sum(int((k == 0).sum()) for k in kernels.values())
total = sum(k.size for k in kernels.values())
norm = max(float(np.linalg.norm(k, axis=0).max()) for k in kernels.values())
found = model.predict(images[test], verbose=0).argmax(1)
accuracy = float(np.mean(found == labels[test]))
print(f"{zeros} of {total} weights are zero, norms up to {norm:.2f}, accuracy {accuracy:.1%}")
assert zeros == round(0.9 * total)
assert norm <= 2.0 + 1e-5
assert accuracy > 0.9
