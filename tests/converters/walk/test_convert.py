"""Six directions against the real frameworks, from the tables of cases."""

import subprocess
import sys

import cases
import flax.linen as nn
import jax
import keras
import numpy as np
import pytest
import torch
import torch.nn.utils.prune
from marks import thorough_but

import fwt
from fwt import converters
from fwt import layers as fl
from fwt.converters.rows import table as _table

TOLERANCE = 1e-5


def batch(shape, n=3, seed=1):
    return np.random.default_rng(seed).normal(size=(n, *shape)).astype(np.float32)


def first(x):
    """Channels-last images as channels-first."""
    return np.ascontiguousarray(np.moveaxis(x, -1, 1)) if x.ndim == 4 else x


def last(x):
    return np.ascontiguousarray(np.moveaxis(x, 1, -1)) if x.ndim == 4 else x


def in_torch(model, x):
    with torch.no_grad():
        return model(torch.from_numpy(np.ascontiguousarray(x))).numpy()


def in_keras(model, x):
    return np.asarray(model(x))


def close(found, expected):
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=TOLERANCE)


def batches(name, shape):
    """Of 3, and of 1 where more than an activation is at stake."""
    return [batch(shape, n) for n in ((3,) if name.startswith("activation") else (3, 1))]


@pytest.mark.parametrize("name", thorough_but(lambda n: n in [*cases.KERAS][::2], cases.KERAS))
def test_keras_to_flax_to_torch_and_back(name):
    shape, build = cases.KERAS[name]
    source = build()
    model = converters.from_keras(source)
    assert model.module.input_shape == shape
    there, again = converters.to_torch(*model), converters.to_keras(*model)
    xs = batches(name, shape)
    back = converters.from_torch(there, input_shape=first(xs[0]).shape[1:])
    last_of_all = converters.to_keras(*back)
    for x in xs:
        expected = in_keras(source, x)
        proven = expected.ndim == 4
        close(np.asarray(model(x)), expected)
        close(in_torch(there, first(x)), first(expected) if proven else expected)
        close(np.asarray(back(x)), expected)
        close(in_keras(last_of_all, x), expected)
        close(in_keras(again, x), expected)
    assert [layer.name for layer in again.layers] == [layer.name for layer in source.layers]
    for ours, theirs in zip(again.layers, source.layers, strict=True):
        for a, b in zip(ours.variables, theirs.variables, strict=True):
            if a.name != "seed_generator_state":
                assert a.name == b.name
                assert np.array_equal(a, b)


@pytest.mark.parametrize("name", thorough_but(lambda n: n in [*cases.TORCH][1::2], cases.TORCH))
def test_torch_to_flax_to_keras_and_back(name):
    shape, build = cases.TORCH[name]
    source = build()
    model = converters.from_torch(source, input_shape=shape)
    there, in_k = converters.to_torch(*model), converters.to_keras(*model)
    again = converters.from_keras(in_k)
    for x in batches(name, shape):
        expected = in_torch(source, x)
        close(np.asarray(model(last(x))), last(expected))
        close(in_torch(there, x), expected)
        close(in_keras(in_k, last(x)), last(expected))
        close(np.asarray(again(last(x))), last(expected))
    assert list(there._modules) == list(source._modules)
    mine, theirs = there.state_dict(), source.state_dict()
    assert list(mine) == list(theirs)
    for key, value in theirs.items():
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(mine[key], value), key


@pytest.mark.parametrize("layout", thorough_but(2, ["source", "channels_first", "channels_last"]))
@pytest.mark.parametrize("name", [n for n in cases.TORCH if not n.startswith("activation")])
def test_layouts_from_torch(name, layout):
    shape, build = cases.TORCH[name]
    source = build()
    x = batch(shape)
    expected = in_torch(source, x)
    model = converters.from_torch(source, input_shape=shape, layout=layout)
    turn = last if layout == "channels_last" else lambda a: a
    close(np.asarray(model(turn(x))), turn(expected))
    # And from there, whatever its ends look like, into the two others and back to torch's own.
    close(in_torch(converters.to_torch(*model, layout="source"), turn(x)), turn(expected))
    close(in_torch(converters.to_torch(*model), x), expected)
    close(in_keras(converters.to_keras(*model), turn(x)), turn(expected))


@pytest.mark.parametrize("layout", ["source", "channels_first", "channels_last"])
@pytest.mark.parametrize("name", [n for n in cases.KERAS if not n.startswith("activation")])
def test_layouts_to_torch(name, layout):
    shape, build = cases.KERAS[name]
    source = build()
    x = batch(shape)
    expected = in_keras(source, x)
    turn = first if layout == "channels_first" else lambda a: a
    there = converters.to_torch(*converters.from_keras(source), layout=layout)
    close(in_torch(there, turn(x)), turn(expected) if expected.ndim == 4 else expected)


@pytest.mark.parametrize("name", ["mlp", "conv_flatten", "conv_groups_same", "flatten_end"])
def test_from_torch_without_input_shape(name):
    shape, build = cases.TORCH[name]
    source = build()
    x = batch(shape)
    close(np.asarray(converters.from_torch(source)(last(x))), last(in_torch(source, x)))


def test_flatten_takes_one_known_product():
    """Height times width follows from the next Linear, so None works across a Flatten."""
    for h, w in ((1, 1), (2, 5), (7, 3)):
        net = cases.torch_model(
            lambda: torch.nn.Conv2d(2, 3, 1),
            lambda: torch.nn.Flatten(),
            lambda h=h, w=w: torch.nn.Linear(3 * h * w, 4),
        )()
        x = batch((2, h, w))
        close(np.asarray(converters.from_torch(net)(last(x))), in_torch(net, x))


def test_unproven_flatten_is_refused_and_source_is_the_way_out():
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(28, 3)).eval()
    x = batch((4, 7))
    for shape in ((4, 7), None):
        with pytest.raises(converters.ConversionError, match="layout='source'"):
            converters.from_torch(net, input_shape=shape)
        model = converters.from_torch(net, input_shape=shape, layout="source")
        close(np.asarray(model(x)), in_torch(net, x))
    # Between two channels-last frameworks nothing moves, so there is nothing to prove.
    tutorial = keras.Sequential(
        [keras.Input((4, 7)), keras.layers.Flatten(), keras.layers.Dense(3)]
    )
    close(np.asarray(converters.from_keras(tutorial)(x)), in_keras(tutorial, x))


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ([torch.nn.LSTM(3, 4)], "LSTM"),
        ([torch.nn.BatchNorm2d(3, track_running_stats=False)], "track_running_stats=False"),
        ([torch.nn.MaxPool2d(2, return_indices=True)], "return_indices=True"),
        ([torch.nn.LPPool2d(2, 3, ceil_mode=True)], "ceil_mode=True"),
        ([torch.nn.Upsample(scale_factor=2, mode="bicubic")], "bicubic"),
        ([torch.nn.Embedding(3, 3, max_norm=1.0)], "max_norm=1.0"),
        ([torch.nn.Bilinear(3, 3, 2)], "two inputs"),
        ([torch.nn.AvgPool2d(3, 2, 1, ceil_mode=True)], "count_include_pad"),
        ([torch.nn.Softmax()], "dim=None"),
    ],
)
def test_torch_refusals_name_the_setting(layers, said):
    with pytest.raises(converters.ConversionError, match="0 ") as caught:
        converters.from_torch(torch.nn.Sequential(*layers), input_shape=(3, 8, 8))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (lambda: keras.layers.Lambda(lambda x: x), "Lambda"),
        (lambda: keras.layers.UpSampling2D(2, interpolation="bicubic"), "bicubic"),
        (lambda: keras.layers.Resizing(3, 4, antialias=True), "antialias=True"),
        (lambda: keras.layers.Softmax(axis=[1, 2]), "axis"),
        (lambda: keras.layers.Dense(3, activation=lambda x: x + 1), "activation"),
    ],
)
def test_keras_refusals_name_the_setting(layer, said):
    shape = (4, 5, 3)
    with pytest.raises((converters.ConversionError, ValueError)) as caught:
        converters.from_keras(keras.Sequential([keras.Input(shape), layer()]))
    assert said in str(caught.value)


def test_flax_refusals_name_the_setting():
    def refused(layer, said, shape=(1, 6, 5, 3), to=converters.to_torch):
        net = fwt.Sequential([("it", layer)], input_shape=shape[1:])
        variables = net.init(jax.random.key(0), np.ones(shape, np.float32))
        with pytest.raises(converters.ConversionError) as caught:
            to(net, variables)
        assert said in str(caught.value)
        assert "it" in str(caught.value)

    refused(nn.Conv(3, (2, 2), padding=((0, 0), (0, 0)), input_dilation=2), "input_dilation=2")
    refused(nn.Conv(3, (2, 2), dtype="bfloat16"), "bfloat16")
    refused(nn.Conv(3, (2,)), "kernel_size")
    refused(nn.BatchNorm(use_running_average=False), "use_running_average")
    refused(nn.LayerNorm(reduction_axes=(1, 2)), "feature_axes")
    refused(fl.SparsePlus(), "SparsePlus")
    refused(fl.ClippedReLU(2.0, 0.5, 1.0), "max_value")
    refused(fl.HardShrink(0.3), "threshold", to=converters.to_keras)
    refused(fl.Threshold(0.5, 2.0), "value", to=converters.to_keras)
    refused(fl.Softplus(1.0, 3.0), "threshold", to=converters.to_keras)
    refused(fl.MaxPool((3, 3), (2, 2), ((1, 1), (1, 1))), "padding", to=converters.to_keras)
    refused(fl.AvgPool((4, 4), (1, 1), "SAME"), "padding")
    refused(fl.Softmax(axis=0), "batch axis")


def test_wrong_sizes_are_named():
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(9, 2))
    with pytest.raises(converters.ConversionError, match=r"2 \(Linear\).*9.*found 24"):
        converters.from_torch(net, input_shape=(3, 5, 4))
    with pytest.raises(converters.ConversionError, match=r"expect 3 inputs, found 2"):
        converters.from_torch(net, input_shape=(2, 5, 4))
    with pytest.raises(converters.ConversionError, match="input_shape"):
        converters.from_torch(net, input_shape=(3, 5))
    with pytest.raises(converters.ConversionError, match=r"too small|does not fit"):
        converters.from_torch(net, input_shape=(3, 2, 2))


def test_tied_layers_are_refused():
    shared = torch.nn.Linear(3, 3)
    with pytest.raises(converters.ConversionError, match="one module"):
        converters.from_torch(torch.nn.Sequential(shared, torch.nn.ReLU(), shared))
    other = torch.nn.Linear(3, 3)
    other.weight = shared.weight
    with pytest.raises(converters.ConversionError, match="share a parameter"):
        converters.from_torch(torch.nn.Sequential(shared, other))
    act = torch.nn.ReLU()
    model = converters.from_torch(torch.nn.Sequential(shared, act, torch.nn.Linear(3, 2), act))
    assert [n.name for n in model.module.layers] == ["0", "1", "2", "3"]


def test_hooks_and_custom_classes_are_refused():
    hooked = torch.nn.Linear(3, 2)
    hooked.register_forward_hook(lambda module, x, y: y + 1)
    with pytest.raises(converters.ConversionError, match="hook"):
        converters.from_torch(torch.nn.Sequential(hooked))

    class Linear(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    with pytest.raises(converters.ConversionError, match="custom"):
        converters.from_torch(torch.nn.Sequential(Linear(3, 2)))

    class Dense(keras.layers.Dense):
        pass

    with pytest.raises(converters.ConversionError, match="custom"):
        converters.from_keras(keras.Sequential([keras.Input((3,)), Dense(2)]))


def test_a_forward_of_ones_own_has_two_ways_to_keras(tmp_path):
    """By its forward, which needs a shape, or by its state dict."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = torch.nn.Linear(4, 3)

        def forward(self, x):
            return self.body(x)

    net, x = Net(), torch.randn(2, 4)
    with pytest.raises(fwt.ConversionError, match=r"Net is no torch.nn.Sequential.*input_shape="):
        converters.from_torch(net)
    torch.save(net.state_dict(), tmp_path / "w.pt")
    made = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    loaded = converters.load(tmp_path / "w.pt", architecture=made, match="order")
    for model in (loaded, converters.from_torch(net, (4,))):
        found = converters.to_keras(*model).predict(x.numpy(), verbose=0)
        np.testing.assert_allclose(found, net(x).detach(), atol=1e-6)


def test_half_precision_weights_cross_bit_for_bit():
    net = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 2), torch.nn.Flatten(), torch.nn.Linear(6, 2))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        net = net.to(dtype)
        model = converters.from_torch(net, input_shape=(2, 2, 3))
        back = converters.to_torch(*model)
        for key, value in net.state_dict().items():
            assert back.state_dict()[key].dtype == dtype
            assert torch.equal(back.state_dict()[key], value)
        if dtype != torch.float64:  # Flax would compute float32 inputs in float32, Keras in half
            with pytest.raises(fwt.ConversionError, match=r"it says no dtype=.*give each layer"):
                converters.to_keras(model)
            continue
        policy = {x.dtype_policy.name for x in converters.to_keras(model).layers}
        assert policy == {"float64"}


def test_training_one_step_agrees_with_torch():
    """Dropout aside, a step in training mode gives the same gradient."""
    net = torch.nn.Sequential(
        torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Tanh(), torch.nn.Linear(6, 1)
    )
    model = converters.from_torch(net)
    x = batch((4,), 8)
    net.train()
    net(torch.from_numpy(x)).square().mean().backward()

    def loss(params):
        variables = {**model.variables, "params": params}
        y, _ = model.module.apply(variables, x, train=True, mutable=["batch_stats"])
        return (y**2).mean()

    grads = jax.grad(loss)(model.variables["params"])
    np.testing.assert_allclose(grads["0"]["kernel"], net[0].weight.grad.T, atol=1e-5)
    np.testing.assert_allclose(grads["1"]["scale"], net[1].weight.grad, atol=1e-5)


def test_a_registered_row_serves_every_direction(monkeypatch):
    """A user's own layer, with a class of its own in each framework."""

    class Shift(nn.Module):
        features: int
        times: float = 1.0

        @nn.compact
        def __call__(self, x):
            return x + self.times * self.param("shift", nn.initializers.zeros, (self.features,))

    class TorchShift(torch.nn.Module):
        def __init__(self, size, times=1.0, device=None):
            super().__init__()
            self.size, self.times = size, times
            self.by = torch.nn.Parameter(torch.zeros(size, device=device))

        def forward(self, x):
            return x + self.times * self.by.reshape(-1, *[1] * (x.ndim - 2))

    class KerasShift(keras.layers.Layer):
        def __init__(self, factor=1.0, **more):
            super().__init__(**more)
            self.factor = factor

        def build(self, shape):
            self.by = self.add_weight(shape=shape[-1:], name="by")

        def call(self, x):
            return x + self.factor * self.by

        def get_config(self):
            return {**super().get_config(), "factor": self.factor}

    row = converters.Row(
        Shift,
        torch=TorchShift,
        keras=KerasShift,
        axes="n *s c -> n *s c",
        torch_axes="n c *s -> n c *s",
        settings=(
            converters.S("features", "size", ""),
            converters.S("times", "times", "factor", 1.0),
        ),
        params=(converters.P("shift: c", "by: c", "by: c"),),
        special=SizeOfAxis(),
    )
    monkeypatch.setattr(_table, "LAYERS", list(_table.LAYERS))
    monkeypatch.setattr(_table, "CUSTOM", {k: dict(v) for k, v in _table.CUSTOM.items()})
    before = _table.rows_of.cache_clear
    try:
        converters.register(row)
        net = cases.randomise_torch(
            torch.nn.Sequential(
                torch.nn.Conv2d(3, 4, 2), TorchShift(4, 2.0), torch.nn.Flatten(),
                TorchShift(48), torch.nn.Linear(48, 2),
            )
        )  # fmt: skip
        x = batch((3, 5, 4))
        model = converters.from_torch(net, input_shape=(3, 5, 4))
        expected = in_torch(net, x)
        close(np.asarray(model(last(x))), expected)
        close(in_torch(converters.to_torch(*model), x), expected)
        there = converters.to_keras(*model)
        close(in_keras(there, last(x)), expected)
        close(np.asarray(converters.from_keras(there)(last(x))), expected)
    finally:
        before()
    with pytest.raises(TypeError, match=r"converters\.Row"):
        converters.register(Shift)


class SizeOfAxis(converters.Special):
    """Keras's own layer learns the size of its axis when it is built."""

    def read(self, framework, take, fields, at):
        if framework == "keras":
            fields["features"] = None

    def finish(self, framework, layer, fields, sizes, at):
        if framework == "flax":
            layer.settings["features"] = layer.arrays["shift"].size
        return layer


SCRIPT = """
import os
import numpy as np, keras, torch
assert keras.backend.backend() == "torch"
import fwt
from fwt import converters
import cases
x = np.random.default_rng(0).normal(size=(2, 9, 7, 3)).astype(np.float32)
net = cases.KERAS["conv_flatten"][1]()
expected = net.predict(x, verbose=0)
model = converters.from_keras(net)
np.testing.assert_allclose(np.asarray(model(x)), expected, atol=1e-5)
np.testing.assert_allclose(converters.to_keras(*model).predict(x, verbose=0), expected, atol=1e-5)
converters.transform(net, fwt.prune(0.5))
kernel = net.get_layer("first").kernel
assert np.mean(keras.ops.convert_to_numpy(kernel) == 0) == 0.5
assert not np.allclose(net.predict(x, verbose=0), expected)

# Channels first, which TensorFlow can't run on a CPU: a transposition of the ends.
k, first = keras.layers, {"data_format": "channels_first"}
net = cases.randomise_keras(keras.Sequential([
    keras.Input((3, 7, 6)), k.Conv2D(4, 3, **first, activation="relu"),
    k.BatchNormalization(axis=1), k.MaxPooling2D(2, **first), k.Conv2D(5, 1, **first),
    k.Flatten(**first), k.Dense(3),
]))
x = np.random.default_rng(1).normal(size=(2, 3, 7, 6)).astype(np.float32)
expected = net.predict(x, verbose=0)
model = converters.from_keras(net)  # channels_last: the ends move where a layer proves it
last = np.moveaxis(x, 1, -1)
assert not [n for n in model.module.layers if "permute" in n.name]
there = converters.to_torch(*model)
for found in (
    model(last),
    converters.from_keras(net, layout="source")(x),
    there(torch.from_numpy(x)).detach().numpy(),
    converters.to_keras(*model).predict(last, verbose=0),
):
    np.testing.assert_allclose(np.asarray(found), expected, atol=2e-5)
"""


@pytest.mark.thorough  # a run on JAX; the suite is on TensorFlow
def test_keras_on_torch():
    import os

    environment = {
        **os.environ,
        "KERAS_BACKEND": "torch",
        "PYTHONPATH": os.path.dirname(cases.__file__),
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


# -- the ends of a model ----------------------------------------------------------------------


def keras_of(*layers):
    return cases.randomise_keras(keras.Sequential([keras.Input((4, 4, 4)), *layers]))


@pytest.mark.parametrize(
    "build",
    [
        lambda k: [k.Permute((2, 3, 1)), k.Conv2D(2, 3, name="c")],
        lambda k: [k.Permute((3, 1, 2), name="a"), k.Permute((1, 3, 2), name="b"), k.Conv2D(2, 3)],
        lambda k: [k.Conv2D(4, 1), k.Permute((3, 1, 2))],
        lambda k: [k.BatchNormalization(axis=1), k.Conv2D(2, 3), k.Flatten(), k.Dense(3)],
        lambda k: [k.BatchNormalization(axis=1), k.Flatten(), k.Dense(3)],
        lambda k: [k.Permute((1, 2, 3)), k.Permute((3, 1, 2)), k.Permute((2, 3, 1)), k.Flatten()],
    ],
)
def test_a_keras_model_keeps_its_ends_and_names(build, tmp_path):
    net = keras_of(*build(keras.layers))
    x = batch((4, 4, 4))
    model = converters.from_keras(net)
    close(np.asarray(model(x)), in_keras(net, x))
    back = converters.to_keras(*model)
    close(in_keras(back, x), in_keras(net, x))
    assert [layer.name for layer in back.layers] == [layer.name for layer in net.layers]
    net.save(tmp_path / "a.keras")
    converters.save(tmp_path / "b.keras", *converters.load(tmp_path / "a.keras"))
    close(in_keras(keras.models.load_model(tmp_path / "b.keras"), x), in_keras(net, x))
    close(in_torch(converters.to_torch(*model, layout="source"), x), in_keras(net, x))


def test_names_that_look_like_ours_survive():
    net = cases.torch_model(
        c_pad=lambda: torch.nn.ZeroPad2d(1), c=lambda: torch.nn.Conv2d(2, 3, 2)
    )()
    model = converters.from_torch(net, input_shape=(2, 4, 5))
    assert [n.name for n in model.module.layers] == ["c_pad", "c"]
    k = keras.layers
    net = keras_of(k.Dense(3, name="d"), k.Activation("relu", name="d_activation"))
    again = converters.to_keras(*converters.from_keras(net))
    assert [layer.name for layer in again.layers] == ["d", "d_activation"]


@pytest.mark.parametrize("layout", ["channels_last", "source"])
def test_an_input_of_one_axis_proves_what_is_made_of_it(layout):
    """None can move its axis, so that tokens and vectors need no proof of their channels."""
    vectors = torch.nn.Sequential(
        torch.nn.Linear(5, 12), torch.nn.Unflatten(1, (3, 4)), torch.nn.Flatten(),
        torch.nn.Linear(12, 2),
    )  # fmt: skip
    tokens = torch.nn.Sequential(
        torch.nn.Embedding(10, 4), torch.nn.Flatten(), torch.nn.Linear(24, 2)
    )
    ids = np.random.default_rng(0).integers(0, 10, (3, 6))
    for net, x in ((vectors, batch((5,))), (tokens, ids)):
        wanted = in_torch(net.eval(), x)
        model = converters.from_torch(net, input_shape=x.shape[1:], layout=layout)
        close(np.asarray(model(x)), wanted)
        close(in_torch(converters.to_torch(model), x), wanted)
        close(np.asarray(converters.from_keras(converters.to_keras(model))(x)), wanted)


def test_reshape_needs_the_same_proof_as_flatten():
    net = fwt.Sequential([fl.Reshape((48, 3)), nn.Dense(2)], input_shape=(8, 6, 3))
    variables = net.init(jax.random.key(0), batch((8, 6, 3)))
    with pytest.raises(converters.ConversionError, match="layout='source'"):
        converters.to_torch(net, variables)
    x = batch((8, 6, 3))
    there = converters.to_torch(net, variables, layout="source")
    close(in_torch(there, x), np.asarray(net.apply(variables, x)))
    for split in (torch.nn.Unflatten(-1, (2, -1)), torch.nn.Unflatten(1, (-1, 5))):
        with pytest.raises(converters.ConversionError, match="rank"):
            converters.from_torch(torch.nn.Sequential(split, torch.nn.Softmax(-1)))


def test_the_input_of_keras_is_not_guessed_across_a_flatten():
    net = fwt.Sequential([fl.Softmax(1), fl.Flatten(), nn.Dense(2)])
    variables = net.init(jax.random.key(0), batch((4, 7)))
    with pytest.raises(converters.ConversionError, match="input_shape"):
        converters.to_keras(net, variables)
    x = batch((4, 7))
    close(in_keras(converters.to_keras(net, variables, (4, 7)), x), net.apply(variables, x))


def test_weights_that_contradict_the_architecture_are_refused(tmp_path):
    net = fwt.Sequential([("d", nn.Dense(2))], (2,))
    for wrong, said in (
        ({"kernel": np.ones((2, 5), "f"), "bias": np.ones(2, "f")}, "bias has shape"),
        ({"kernel": np.ones((2, 5), "f"), "bias": np.ones(5, "f")}, "5 outputs, expected 2"),
        ({"kernel": np.ones((3, 2), "f"), "bias": np.ones(2, "f")}, "expect 3 inputs, found 2"),
        ({"kernel": np.ones((2, 2, 2), "f"), "bias": np.ones(2, "f")}, "kernel has shape"),
        ({"kernel": np.ones((2, 2), "f")}, "'bias' is missing"),
    ):
        variables = {"params": {"d": wrong}}
        for convert in (
            converters.to_torch,
            converters.to_keras,
            lambda m, v: converters.save(tmp_path / "x.keras", m, v),
            lambda m, v: converters.save(tmp_path / "x.pt", m, v),
        ):
            with pytest.raises(converters.ConversionError, match=r"d \(Dense\)") as caught:
                convert(net, variables)
            assert said in str(caught.value)
    assert not list(tmp_path.iterdir())
    conv = fwt.Sequential([("c", nn.Conv(2, (3, 2)))], (5, 5, 1))
    variables = {"params": {"c": {"kernel": np.ones((2, 3, 1, 2), "f"), "bias": np.ones(2, "f")}}}
    with pytest.raises(converters.ConversionError, match="window"):
        converters.to_torch(conv, variables)


def test_what_keras_can_not_build_is_refused_before_anything_is_written(tmp_path):
    def refused(net, shape, said):
        variables = net.init(jax.random.key(0), np.ones((1, *shape), np.float32))
        with pytest.raises(converters.ConversionError, match=said):
            converters.to_keras(net, variables)
        with pytest.raises(converters.ConversionError, match=said):
            converters.save(tmp_path / "x.keras", net, variables)

    both = nn.Conv(2, (3, 3), strides=(2, 2), kernel_dilation=(2, 2))
    refused(fwt.Sequential([both], (9, 9, 1)), (9, 9, 1), "dilation")
    refused(fwt.Sequential([nn.Conv(2, 3)], (9, 9, 1)), (9, 9, 1), "window of one axis")
    source = converters.from_torch(
        torch.nn.Sequential(torch.nn.ZeroPad2d(1), torch.nn.Linear(12, 4)), layout="source"
    )
    with pytest.raises(converters.ConversionError, match="input_shape"):
        converters.to_keras(*source)
    none = fwt.Sequential([nn.Conv(2, (3, 3), strides=None, kernel_dilation=None)], (9, 8, 1))
    variables = none.init(jax.random.key(0), batch((9, 8, 1)))
    x = batch((9, 8, 1))
    close(in_keras(converters.to_keras(none, variables), x), none.apply(variables, x))


def test_a_converted_model_shares_no_memory_with_its_source():
    net = torch.nn.Sequential(torch.nn.Linear(3, 1), torch.nn.BatchNorm1d(1))
    model = converters.from_torch(net)
    before = jax.tree.map(np.copy, model.variables)
    with torch.no_grad():
        for tensor in net.state_dict().values():
            tensor.add_(1)
    assert jax.tree.all(jax.tree.map(np.array_equal, model.variables, before))
    there = converters.to_torch(*model)
    with torch.no_grad():
        there[0].bias.add_(1)
    assert jax.tree.all(jax.tree.map(np.array_equal, model.variables, before))


def test_keras_set_to_channels_first_reads_what_we_write(tmp_path):
    model = converters.from_keras(cases.KERAS["conv_global"][1]())
    x = batch((8, 11, 2))
    converters.save(tmp_path / "x.keras", *model)
    keras.config.set_image_data_format("channels_first")
    try:
        close(in_keras(converters.to_keras(*model), x), np.asarray(model(x)))
        close(in_keras(keras.models.load_model(tmp_path / "x.keras"), x), np.asarray(model(x)))
    finally:
        keras.config.set_image_data_format("channels_last")


def test_lazy_and_patched_modules_are_refused():
    with pytest.raises(converters.ConversionError, match="lazy"):
        converters.from_torch(torch.nn.Sequential(torch.nn.LazyLinear(3)))
    patched = torch.nn.Linear(2, 2)
    patched.forward = lambda x: x
    with pytest.raises(converters.ConversionError, match="forward"):
        converters.from_torch(torch.nn.Sequential(patched))
    for shape in (4, (0, 3), ("a",)):
        with pytest.raises(converters.ConversionError, match="input_shape"):
            converters.from_torch(torch.nn.Sequential(torch.nn.ReLU()), input_shape=shape)


def test_a_users_function_of_a_known_name_is_refused():
    def relu(x):
        return x * 2

    k = keras.layers
    for layer in (k.Dense(3, activation=relu), k.Activation(relu)):
        with pytest.raises(converters.ConversionError, match="the user's own"):
            converters.from_keras(keras.Sequential([keras.Input((3,)), layer]))
