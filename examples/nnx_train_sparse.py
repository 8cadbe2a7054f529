"""An nnx model that trains to 80 % zeros and a bound on its norms, then leaves for Keras."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import numpy as np
import optax
from flax import nnx

import fwt
from fwt import converters

rng = np.random.default_rng(0)
x = rng.normal(size=(512, 20)).astype(np.float32)
y = (x[:, :3].sum(1) > 0).astype(np.int32)

model = nnx.Sequential(
    nnx.Linear(20, 32, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(32, 2, rngs=nnx.Rngs(1))
)
# The schedule prunes while it trains; the norms are projected after each step.
tx = fwt.optim.sparsify(optax.adam(1e-2), optax.linear_schedule(0.0, 0.8, 150), every=10)
tx = fwt.optim.constrain(tx, fwt.project(fwt.constraints.max_norm(2.0)))
optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)


@nnx.jit
def step(model, optimizer, x, y):
    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    value, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    return value


losses = [float(step(model, optimizer, x, y)) for _ in range(200)]

params = nnx.state(model, nnx.Param)
for path, kernel in fwt.select(params, fwt.kernels).items():
    kernel = np.asarray(kernel)
    print(f"{path}: {np.mean(kernel == 0):.0%} zeros, norms up to "
          f"{np.linalg.norm(kernel, axis=0).max():.2f}")  # fmt: skip
    assert np.sum(kernel == 0) == round(0.8 * kernel.size)
    assert np.linalg.norm(kernel, axis=0).max() <= 2.0 + 1e-5
accuracy = float(np.mean(np.asarray(model(x)).argmax(1) == y))
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}, accuracy {accuracy:.0%}")
assert accuracy > 0.9

# The verbs work on the state as on any tree, and the model goes where it is wanted.
nnx.update(model, fwt.prune(0.9)(params))
keras_model = converters.to_keras(*converters.from_nnx(model))
report = converters.verify(model, keras_model, x)
print(report)
assert report.ok
