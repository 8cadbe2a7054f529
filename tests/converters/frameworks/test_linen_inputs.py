"""Linen and nnx modules that take a dict, or inputs by name alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import numpy as np
import onnxruntime
import pytest
import torch
from flax import nnx
from marks import thorough_but

from fwt import ConversionError, converters

RNG = np.random.default_rng(0)
BATCH = {
    "x": RNG.standard_normal((2, 3), np.float32),
    "y": RNG.standard_normal((2, 7, 5), np.float32),
}
SHAPES = {"y": (7, 5), "x": (3,)}


class Dict(nn.Module):
    @nn.compact
    def __call__(self, batch, train=False):
        y = nn.Dropout(0.5, deterministic=not train)(batch["y"][:, -3:].mean(1))
        return nn.Dense(4, name="a")(batch["x"]) + nn.Dense(4, name="b")(y)


class Keywords(nn.Module):
    @nn.compact
    def __call__(self, x, *, y, deterministic):
        return nn.Dense(4, name="a")(x) + nn.Dense(4, name="b")(y[:, -3:].mean(1))


def from_dict():
    net = Dict()
    variables = net.init(jax.random.key(0), BATCH)
    return net, variables, np.asarray(net.apply(variables, BATCH))


def from_keywords():
    net, given = Keywords(), {**BATCH, "deterministic": True}
    variables = net.init(jax.random.key(0), **given)
    return net, variables, np.asarray(net.apply(variables, **given))


def close(found, truth):
    np.testing.assert_allclose(found, truth, rtol=1e-5, atol=1e-6)


class One(nn.Module):
    """A layer has the name of the key."""

    @nn.compact
    def __call__(self, batch):
        return nn.Dense(2, name="x")(batch["x"])


def test_a_dict_of_one_key(tmp_path):
    net, given = One(), {"x": BATCH["x"]}
    variables = net.init(jax.random.key(0), given)
    truth, shapes = net.apply(variables, given), {"x": (3,)}
    made = converters.to_torch(net, variables, input_shape=shapes)
    with torch.no_grad():
        close(made(x=torch.from_numpy(given["x"])), truth)
    close(converters.to_keras(net, variables, input_shape=shapes)(given), truth)
    converters.save(tmp_path / "net.safetensors", net, variables, input_shape=shapes)
    close(converters.load(tmp_path / "net.safetensors")(given), truth)
    assert converters.verify((net, variables), made, inputs=given)


class Pair(nn.Module):
    @nn.compact
    def __call__(self, a, b):
        hidden = nn.relu(nn.Dense(4, name="first")(a))
        return nn.Dense(2, name="second")(hidden) + nn.Dense(2, name="third")(b.mean(1))


def test_inputs_may_have_the_names_of_the_other_model():
    net = Pair()
    variables = net.init(jax.random.key(0), *BATCH.values())
    params = variables["params"]
    params["first"]["bias"] -= 1e6  # which leaves all of its units dead
    left, right = keras.Input((3,), name="left"), keras.Input((7, 5), name="right")
    layers = {name: keras.layers.Dense(n, name=name)
              for name, n in (("first", 4), ("second", 2), ("third", 2))}  # fmt: skip
    hidden = keras.layers.ReLU()(layers["first"](left))
    mean = keras.layers.GlobalAveragePooling1D()(right)
    sums = keras.layers.Add()([layers["second"](hidden), layers["third"](mean)])
    model = keras.Model([left, right], sums)
    for name, layer in layers.items():
        layer.set_weights([params[name]["kernel"], params[name]["bias"]])
    inputs = {"left": BATCH["x"], "right": BATCH["y"]}
    assert converters.verify(model, (net, variables), inputs=inputs)
    params["first"]["kernel"] = params["first"]["kernel"].at[0, 0].add(0.5)
    report = converters.verify(model, (net, variables), inputs=inputs)
    assert "first" in [line.name for line in report.layers]
    assert not report


@pytest.mark.parametrize(
    "make", thorough_but(lambda f: f is from_keywords, [from_dict, from_keywords])
)
def test_a_dict_of_shapes(make, tmp_path):
    net, variables, truth = make()
    made = converters.to_torch(net, variables, input_shape=SHAPES, layout="source")
    tensors = {name: torch.from_numpy(x) for name, x in BATCH.items()}
    with torch.no_grad():
        close(made(**tensors), truth)
    model = converters.to_keras(net, variables, input_shape=SHAPES)
    if make is from_dict:
        close(model(BATCH), truth)
    else:  # in the order of the arguments
        close(model([BATCH["x"], BATCH["y"]]), truth)
    converters.save(tmp_path / "net.safetensors", net, variables, input_shape=SHAPES)
    there = converters.load(tmp_path / "net.safetensors")
    close(there(BATCH), truth)
    longer = {**BATCH, "y": RNG.standard_normal((2, 9, 5), np.float32)}
    given = longer if make is from_dict else {**longer, "deterministic": True}
    args, kwds = ((given,), {}) if make is from_dict else ((), given)
    close(there(longer), net.apply(variables, *args, **kwds))
    converters.to_onnx(net, variables, tmp_path / "net.onnx", input_shape=SHAPES)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    close(session.run(None, BATCH)[0], truth)
    assert converters.verify((net, variables), made, inputs=BATCH)
    changed = jax.tree.map(lambda w: w * 1.01, variables)
    assert not converters.verify((net, changed), made, inputs=BATCH)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.a, self.b = nnx.Linear(3, 4, rngs=rngs), nnx.Linear(5, 4, rngs=rngs)

    def __call__(self, batch):
        return {"sum": self.a(batch["x"]) + self.b(batch["y"].mean(1))}


def test_an_nnx_module_of_a_dict():
    net = Nnx(nnx.Rngs(0))
    model = converters.to_keras(net, input_shape=SHAPES)
    assert isinstance(model.input, dict)
    close(model(BATCH)["sum"], net(jax.tree.map(jnp.asarray, BATCH))["sum"])


@pytest.mark.parametrize("make", [from_dict, from_keywords])
@pytest.mark.parametrize("shape", [{}, {1: (3,)}, {"x": 3, "y": (7, 5)}, [3, (7, 5)]])
def test_shapes_that_are_none(make, shape):
    net, variables, _ = make()
    with pytest.raises(ConversionError, match="or a dict of them by the names of arguments"):
        converters.to_torch(net, variables, input_shape=shape)


def test_inputs_by_name_alone_are_told_the_way():
    net, variables, _ = from_keywords()
    with pytest.raises(ConversionError, match="a dict of them by name"):
        converters.to_torch(net, variables, input_shape=[(3,), (7, 5)])


def test_verify_prints_nothing_of_sizes_that_it_tries(capfd):
    class Positions(nn.Module):
        @nn.compact
        def __call__(self, x):
            table = self.param("pos", nn.initializers.normal(1.0), (7, 5))
            return nn.LayerNorm()(x + table[jnp.arange(x.shape[1])])

    net, x = Positions(), BATCH["y"]
    variables = net.init(jax.random.key(0), x)
    made = converters.to_torch(net, variables, input_shape=(7, 5), layout="source")
    capfd.readouterr()
    assert converters.verify((net, variables), made, inputs=x)
    assert "Traceback" not in capfd.readouterr().err
