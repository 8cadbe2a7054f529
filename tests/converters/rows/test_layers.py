"""Every class of the tables, alone and in stacks, in every direction against the real one."""

import math
import os
from collections import OrderedDict

import cases
import flax.linen as nn
import hypothesis
import jax
import keras
import layer_cases
import numpy as np
import pytest
import tensorflow as tf
import torch
from compare import (
    check,
    close,
    files,
    generator,
    in_flax,
    in_keras,
    in_torch,
    inputs,
    without_shape,
)
from hypothesis import strategies as st
from marks import DRAWS, thorough_but

import fwt
from fwt import converters

k, t = keras.layers, torch.nn
EXAMPLES = {"fwt": 1, "thorough": 1 + DRAWS, "search": 100}  # by profile
# The fast run has the simplest settings of each, the thorough run the drawn ones.
THOROUGH = "FWT_THOROUGH" in os.environ


# Whose arrays have another form on the way back, and how it is called.
CANONICAL: dict[str, str] = {
    "EinsumDense": "a Dense",
    **dict.fromkeys(["RNN", "LSTM", "GRU"], "the two biases as their sum"),
    **dict.fromkeys(["RNN_SimpleRNN", "RNN_LSTM", "RNN_GRU"], "the layer of that cell"),
    "TimeDistributed": "the layer inside",
    "Normalization": "statistics as settings",
    "SpectralNormalization": "the layer inside",
}


def given_layers(table):
    """A test of each class of a table, with settings that hypothesis draws. Their first is the
    simplest, and goes through files."""

    def around(test):
        drawn = hypothesis.given(st.data())(test)
        return pytest.mark.parametrize("name", table)(few(drawn))

    return around


def few(test):
    return hypothesis.settings(
        max_examples=EXAMPLES[hypothesis.settings.get_current_profile_name()],
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        suppress_health_check=list(hypothesis.HealthCheck),
    )(test)


@given_layers(layer_cases.TORCH)
def test_torch_layer(name, data):
    case = layer_cases.TORCH[name]
    rng = layer_cases.Drawn(data)
    with_files, batch = rng.integers(2) == 0, layer_cases.pick(rng, 1, 3)
    seed = rng.integers(2**32)
    if THOROUGH and with_files and batch == 1 and seed == 0:
        return
    shape, layer = case.make(rng)
    layers = layer if isinstance(layer, list) else [layer]
    model = cases.randomise_torch(torch.nn.Sequential(*layers), seed)
    x = inputs(np.random.default_rng(seed), shape, case.integers, batch)
    check("torch", model, shape, x, case.refused, CANONICAL.get(name, ()))
    without_shape(model, x)
    if with_files:
        files("torch", model, shape, x)


@given_layers(layer_cases.KERAS)
def test_keras_layer(name, data):
    case = layer_cases.KERAS[name]
    rng = layer_cases.Drawn(data)
    with_files, batch = rng.integers(2) == 0, layer_cases.pick(rng, 1, 3)
    seed = rng.integers(2**32)
    if THOROUGH and with_files and batch == 1 and seed == 0:
        return
    shape, layer = case.make(rng)
    dtype = "int32" if case.integers else "float32"
    model = keras.Sequential([keras.Input(shape, dtype=dtype), layer])
    cases.randomise_keras(model, seed)
    x = inputs(np.random.default_rng(seed), shape, case.integers, batch)
    check("keras", model, shape, x, case.refused, CANONICAL.get(name, ()))
    if with_files:
        files("keras", model, shape, x)


# -- what holds layers ------------------------------------------------------------------------


def both_ways(source, model, x, canonical=False):
    check(source, model, x.shape[1:], x, None, canonical)


def test_sequentials_inside_keep_their_paths(tmp_path):
    t = torch.nn
    net = t.Sequential()
    net.add_module("features", t.Sequential(
        t.Conv2d(3, 4, 3, padding=1), t.BatchNorm2d(4),
        t.Sequential(t.ReLU(), t.MaxPool2d(3, 2, 1)),
    ))  # fmt: skip
    net.add_module("head", t.Sequential(t.Flatten(), t.Linear(4 * 3 * 3, 5)))
    cases.randomise_torch(net)
    x = inputs(generator("inside"), (3, 6, 5), None, 3)
    both_ways("torch", net, x)
    model = converters.from_torch(net, input_shape=(3, 6, 5))
    assert "features/0/kernel" in fwt.paths(model.variables)
    seen = []
    converters.transform(net, lambda p: seen.extend(fwt.paths(p)) or p)
    assert set(seen) == set(fwt.paths(model.variables))

    inner = keras.Sequential([keras.layers.Conv2D(4, 3, activation="relu"),
                              keras.layers.BatchNormalization()], name="features")  # fmt: skip
    outer = keras.Sequential([keras.Input((6, 5, 3)), inner, keras.layers.Flatten(),
                              keras.layers.Dense(2, name="last")])  # fmt: skip
    cases.randomise_keras(outer)
    x = np.ascontiguousarray(np.moveaxis(x, 1, -1))
    model = converters.from_keras(outer)
    both_ways("keras", outer, x)
    path = tmp_path / "nested.keras"
    outer.save(path)
    loaded = converters.load(path)
    assert loaded.module == model.module
    assert np.array_equal(in_flax(loaded, x), in_flax(model, x))
    for suffix in (".keras", ".safetensors"):
        converters.save(tmp_path / f"again{suffix}", *model)
        again = converters.load(tmp_path / f"again{suffix}")
        assert again.module == model.module
        assert np.array_equal(in_flax(again, x), in_flax(model, x))
    real = keras.saving.load_model(tmp_path / "again.keras")
    close(in_keras(real, x), in_keras(outer, x))
    converters.save(tmp_path / "again.pt", *model)
    there = converters.to_torch(*model)
    there.load_state_dict(torch.load(tmp_path / "again.pt", weights_only=True))


def test_a_module_list_is_used_in_order():
    layers = [torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)]
    x = inputs(generator("list"), (3,), None, 2)
    model = converters.from_torch(torch.nn.ModuleList(layers))
    close(in_flax(model, x), in_torch(torch.nn.Sequential(*layers), x))


def test_computed_weights_are_taken_as_computed():
    from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

    t = torch.nn
    made = {
        "pruned": lambda: prune.l1_unstructured(t.Conv2d(3, 4, 2), "weight", 0.4),
        "bias": lambda: prune.random_unstructured(t.Conv2d(3, 4, 2), "bias", 0.5),
        "weight norm": lambda: parametrizations.weight_norm(t.Conv2d(3, 4, 2)),
        "old weight norm": lambda: weight_norm(t.Conv2d(3, 4, 2)),
        "spectral norm": lambda: parametrizations.spectral_norm(t.Conv2d(3, 4, 2)),
        "old spectral norm": lambda: spectral_norm(t.Conv2d(3, 4, 2)),
    }
    x = inputs(generator("hooks"), (3, 5, 4), None, 2)
    for name, make in made.items():
        net = cases.randomise_torch(t.Sequential(make(), t.ReLU()))
        before = {k: v.clone() for k, v in net.state_dict().items()}
        expected = in_torch(net, x)
        model = converters.from_torch(net, input_shape=(3, 5, 4), layout="source")
        close(in_flax(model, x), expected, name)
        assert list(model.variables["params"]["0"]) == ["kernel", "bias"]
        assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items()), name


def test_a_straight_functional_model_is_a_sequence(tmp_path):
    k = keras.layers
    start = keras.Input((6, 5, 3))
    h = k.Conv2D(4, 3, activation="relu", name="conv")(start)
    h = k.Flatten()(h)
    net = keras.Model(start, k.Dense(2, name="out")(h))
    cases.randomise_keras(net)
    x = inputs(generator("line"), (6, 5, 3), None, 2)
    model = converters.from_keras(net)
    close(in_flax(model, x), in_keras(net, x))
    net.save(tmp_path / "line.keras")
    assert converters.load(tmp_path / "line.keras").module == model.module


@pytest.mark.optimised
@pytest.mark.thorough
def test_vgg_goes_round():
    net = keras.applications.VGG16(weights=None, input_shape=(32, 32, 3), classes=7)
    rng = np.random.default_rng(0)
    for v in net.variables:
        scale = np.sqrt(2 / max(np.prod(v.shape[:-1]), 1))
        v.assign(rng.normal(size=v.shape, scale=scale).astype(np.float32))
    x = inputs(rng, (32, 32, 3), None, 1)
    expected = in_keras(net, x)
    model = converters.from_keras(net)
    close(in_flax(model, x), expected)
    there = converters.to_torch(*model)
    close(in_torch(there, np.ascontiguousarray(np.moveaxis(x, -1, 1))), expected)
    back = converters.to_keras(*converters.from_torch(there, input_shape=(3, 32, 32)))
    close(in_keras(back, x), expected)
    for ours, theirs in zip(back.weights, net.weights, strict=True):
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("layout", ["channels_last", "source"])
@pytest.mark.parametrize("what", ["sequence", "last"])
def test_torch_recurrent_with_time_first(what, layout):
    """batch_first=False proves axis 1 to be the batch, so that is where the model's goes."""
    t = torch.nn
    net = cases.randomise_torch(t.Sequential(
        t.LSTM(3, 4, num_layers=2, bidirectional=True), converters.Select("sequence", None, False),
        t.Linear(8, 5), t.Tanh(), t.GRU(5, 4), converters.Select(what, None, False),
        t.Linear(4, 2),
    ))  # fmt: skip
    x = inputs(generator("time"), (2, 3), None, 6)  # (time, batch, channels)
    expected = in_torch(net, x)
    model = converters.from_torch(net, input_shape=(2, 3), layout=layout)
    if layout == "source":
        close(in_flax(model, x), expected)
        back = converters.to_torch(*model, layout="source")
        close(in_torch(back, x), expected)
        again = {n: getattr(m, "batch_first", None) for n, m in back.named_children()}
        assert again == {"0": False, "0__output": False, "2": None, "3": None, "4": False,
                         "4__output": False, "6": None}  # fmt: skip
        with pytest.raises(converters.ConversionError, match="layout='source'"):
            converters.to_torch(*model)
        return
    found = in_flax(model, np.swapaxes(x, 0, 1))
    close(found, np.swapaxes(expected, 0, 1) if what == "sequence" else expected)
    assert [n.name for n in model.module.layers] == ["0__l0", "0__l1", "2", "3", "4", "6"]
    there = converters.to_keras(*model, input_shape=(6, 3))
    close(in_keras(there, np.swapaxes(x, 0, 1)), found)


def test_recurrent_layers_cross_files(tmp_path):
    k = keras.layers
    net = keras.Sequential([
        keras.Input((5, 3)), k.Bidirectional(k.LSTM(4, return_sequences=True), merge_mode="sum"),
        k.RNN(k.GRUCell(3), return_sequences=True), k.TimeDistributed(k.Dense(4, "relu")),
        k.SimpleRNN(2, go_backwards=True), k.EinsumDense("ab,bc->ac", 3, bias_axes="c"),
    ])  # fmt: skip
    cases.randomise_keras(net)
    x = inputs(generator("files"), (5, 3), None, 2)
    expected = in_keras(net, x)
    net.save(tmp_path / "net.keras")
    model = converters.load(tmp_path / "net.keras")
    close(in_flax(model, x), expected)
    converters.save(tmp_path / "again.keras", *model)
    close(in_keras(keras.saving.load_model(tmp_path / "again.keras"), x), expected)
    converters.save(tmp_path / "again.safetensors", *model)
    close(in_flax(converters.load(tmp_path / "again.safetensors"), x), expected)
    converters.save(tmp_path / "again.pt", *model)
    there = converters.to_torch(*model)
    there.load_state_dict(torch.load(tmp_path / "again.pt", weights_only=True))
    close(in_torch(there, x), expected)


def test_stacked_recurrent_layers_are_one_again():
    net = cases.randomise_torch(torch.nn.Sequential(torch.nn.GRU(3, 4, 3, batch_first=True)))
    model = converters.from_torch(net, input_shape=(5, 3))
    back = converters.to_torch(*model)
    assert list(back._modules) == ["0", "0__output"]
    assert list(back.state_dict()) == list(net.state_dict())
    assert back[0].num_layers == 3


def test_keras_attention_of_a_tensor_with_itself(tmp_path):
    k = keras.layers
    start = keras.Input((5, 6))
    h = k.MultiHeadAttention(3, 2, name="attend")(start, start)
    net = keras.Model(start, k.LayerNormalization()(h))
    cases.randomise_keras(net)
    x = inputs(generator("attention"), (5, 6), None, 2)
    model = converters.from_keras(net)
    assert "attend/query/kernel" in fwt.paths(model.variables)
    expected = in_keras(net, x)
    close(in_flax(model, x), expected)
    net.save(tmp_path / "net.keras")
    close(in_flax(converters.load(tmp_path / "net.keras"), x), expected)
    again = converters.to_keras(*model)
    close(in_keras(again, x), expected)
    close(in_flax(converters.from_keras(again), x), expected)
    close(in_torch(converters.to_torch(*model), x), expected)


# -- the tables -------------------------------------------------------------------------------


def test_every_class_has_a_row_and_a_case_or_a_reason():
    import dags
    import tables

    from fwt.converters.rows import table as _table

    elsewhere = (
        *("MultiHeadAttention", "Attention", "AdditiveAttention", "GroupQueryAttention", "Dot"),
        "FeatureAlphaDropout",
        "Concatenate",
        "Parameter",
        *dags.MERGES,
    )
    for framework, made in (("keras", layer_cases.KERAS), ("torch", layer_cases.TORCH)):
        drawn = {name.split("_")[0] for name in made} | {name.partition("_")[2] for name in made}
        for name in tables.classes(framework):
            held = (framework, name) in tables.HELD or name.startswith("Lazy")
            known = bool(_table.rows_of(framework, name))
            assert known + held + (name in _table.REFUSED[framework]) == 1, name
            if known:
                assert name in drawn or name in elsewhere, name
        for name in _table.REFUSED[framework]:
            assert name in [*tables.classes(framework), "Select"], name


def test_the_guides_table_is_that_of_the_rows():
    import tables

    assert tables.stands("layers.md"), "run python tests/helpers/tables.py"


@pytest.mark.optimised
@pytest.mark.parametrize("seed", thorough_but(lambda seed: seed in (1, 2, 4), range(18), most=6))
def test_random_stacks(seed):
    import stacks

    stacks.run(("torch", "keras")[seed % 2], seed)


# -- training ---------------------------------------------------------------------------------


def flax_step(model, x, rate=0.1):
    """One step of SGD on the mean square of the output: new parameters and statistics."""

    def loss(params):
        variables = {**model.variables, "params": params}
        y, new = model.module.apply(variables, x, train=True, mutable=["batch_stats"])
        return (y**2).mean(), new

    grads, new = jax.grad(loss, has_aux=True)(model.variables["params"])
    params = jax.tree.map(lambda p, g: p - rate * g, model.variables["params"], grads)
    return {"params": params, **new}


@pytest.mark.optimised
def test_a_training_step_agrees_with_keras():
    k = keras.layers
    net = keras.Sequential([
        keras.Input((6, 5, 3)), k.Conv2D(4, 3), k.BatchNormalization(momentum=0.8), k.ReLU(),
        k.GroupNormalization(2), k.Flatten(), k.Dense(8), k.LayerNormalization(),
        k.Reshape((4, 2)), k.GRU(3), k.PReLU(),
    ])  # fmt: skip
    cases.randomise_keras(net)
    model = converters.from_keras(net)
    x = inputs(generator("train"), (6, 5, 3), None, 5)
    after = flax_step(model, x)
    with tf.GradientTape() as tape:
        loss = keras.ops.mean(net(x, training=True) ** 2)
    values = [v.value for v in net.trainable_variables]
    for v, g in zip(net.trainable_variables, tape.gradient(loss, values), strict=True):
        v.assign(v - 0.1 * g)
    expected = converters.from_keras(net).variables
    for path, value in fwt.select({"params": expected}, "**").items():
        np.testing.assert_allclose(
            fwt.select({"params": after}, "**")[path], value, atol=1e-5, err_msg=path
        )


def test_a_training_step_agrees_with_torch_but_for_the_unbiased_variance():
    t = torch.nn
    net = cases.randomise_torch(t.Sequential(
        t.Conv2d(3, 4, 3), t.BatchNorm2d(4, momentum=0.2), t.PReLU(4), t.Flatten(), t.Linear(48, 6),
    ))  # fmt: skip
    x = inputs(generator("train"), (3, 6, 5), None, 5)
    model = converters.from_torch(net, input_shape=(3, 6, 5), layout="source")
    after = flax_step(model, x)
    net.train()
    net(torch.from_numpy(x)).square().mean().backward()
    with torch.no_grad():
        for p in net.parameters():
            p -= 0.1 * p.grad
    net.eval()
    expected = converters.from_torch(net, input_shape=(3, 6, 5), layout="source").variables
    ours, theirs = (fwt.select({"params": v}, "**") for v in (after, expected))
    n = 5 * 4 * 3  # values behind each statistic
    before = model.variables["batch_stats"]["1"]["var"]
    for path, value in theirs.items():
        if path.endswith("1/var"):  # the guide says so: torch's is n / (n - 1) of it
            batch = (ours[path] - 0.8 * before) / 0.2
            np.testing.assert_allclose(0.8 * before + 0.2 * batch * n / (n - 1), value, atol=1e-5)
        else:
            np.testing.assert_allclose(ours[path], value, atol=1e-5, err_msg=path)


@pytest.mark.parametrize("momentum", [0.3, 0.0])
def test_an_instance_norm_with_statistics_trains_as_in_torch(momentum):
    net = torch.nn.Sequential(
        torch.nn.InstanceNorm2d(3, momentum=momentum, affine=True, track_running_stats=True)
    )
    cases.randomise_torch(net)
    x = inputs(generator("tracked"), (3, 5, 2), None, 4)
    module, variables = converters.from_torch(net, (3, 5, 2), "source")
    assert isinstance(module.layers[1].layer, fwt.layers.TrackedInstanceNorm)
    found, new = module.apply(variables, x, train=True, mutable=["batch_stats"])
    net.train()
    close(found, net(torch.from_numpy(x)).detach())
    for name, there in (("mean", "running_mean"), ("var", "running_var")):
        close(new["batch_stats"]["0"][name], getattr(net[0], there), name)


# -- what readers found -----------------------------------------------------------------------


def refused_in_keras(make, said, shape=(5, 4)):
    start = keras.Input(shape)
    with pytest.raises(converters.ConversionError, match=said):
        converters.from_keras(keras.Model(start, make(start)))


def test_what_a_layer_is_called_with_is_not_dropped():
    k = keras.layers
    mask = np.ones((1, 5, 5), bool)
    refused_in_keras(lambda a: k.MultiHeadAttention(2, 2)(a, a, attention_mask=mask), "mask")
    refused_in_keras(lambda a: k.BatchNormalization()(a, training=True), "training=True")
    refused_in_keras(lambda a: k.Dropout(0.5)(a, training=True), "training=True")
    refused_in_keras(lambda a: k.GRU(3)(a, mask=np.ones((1, 5), bool)), "mask")
    refused_in_keras(lambda a: keras.ops.cumsum(a, 1), "operation")
    net = keras.Sequential([keras.Input((3,)), k.Dense(3)])
    old = net.layers[0].call
    net.layers[0].call = lambda x: old(x) * 3
    with pytest.raises(converters.ConversionError, match="call"):
        converters.from_keras(net)


def test_wrapped_layers_keep_activations_that_are_layers():
    k = keras.layers
    x = inputs(generator("wrapped"), (4, 5), None, 2)
    for wrap in (k.TimeDistributed, k.SpectralNormalization):
        for act in (k.LeakyReLU(0.5), k.ReLU(max_value=0.1), "tanh"):
            net = keras.Sequential([keras.Input((4, 5)), wrap(k.Dense(3, activation=act))])
            check("keras", cases.randomise_keras(net), (4, 5), x, "ClippedReLU", True)


@pytest.mark.parametrize("bounds", [(6.0, 0.0), (0.7, 0.0), (0.7, 0.2), (0.0, 0.0), (None, 0.2)])
@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_a_relu_keeps_nan_where_keras_does(bounds, threshold):
    layer = keras.layers.ReLU(bounds[0], bounds[1], threshold)
    net = keras.Sequential([keras.Input((7,)), layer])
    x = np.array([[np.nan, np.inf, -np.inf, 0.3, 0.7, -1.0, 9.0]], np.float32)
    model = converters.from_keras(net)
    assert np.isnan(net(x)[0, 0]) == (threshold == 0 or bounds[1] > 0)
    for found in (model(x), converters.to_keras(*model)(x)):
        np.testing.assert_array_equal(np.asarray(found), np.asarray(net(x)))


def test_select_is_refused_where_it_says_two_things():
    t, select = torch.nn, converters.Select
    for layer, after, said in (
        (t.LSTM(3, 4, batch_first=True), select("sequence", "sum"), "one direction"),
        (t.GRU(3, 4, batch_first=True, bidirectional=True), select("last"), "'concat'"),
        (t.Linear(3, 4), select(), "must follow"),
    ):
        with pytest.raises(converters.ConversionError, match=said):
            converters.from_torch(t.Sequential(layer, after), input_shape=(5, 3))
    with pytest.raises(converters.ConversionError, match="Select"):
        select("first")


def test_a_transformer_with_parts_of_its_own_is_refused():
    t = torch.nn

    def encoder():
        return t.TransformerEncoderLayer(4, 2, 5, batch_first=True)

    odd = encoder()
    odd.norm2.eps = 0.5
    swapped = encoder()
    swapped.linear1 = t.Identity()
    hooked = t.TransformerEncoder(encoder(), 2)
    hooked.register_forward_hook(lambda m, i, o: o * 2)
    normed = encoder()
    t.utils.parametrizations.weight_norm(normed.self_attn.out_proj)
    for layer in (odd, swapped, hooked, normed):
        with pytest.raises(converters.ConversionError, match="0"):
            converters.from_torch(t.Sequential(layer), input_shape=(3, 4))


def test_what_stands_behind_a_flatten_is_permuted_or_put_in_order():
    k = keras.layers
    middles = (
        [k.RepeatVector(7), k.Conv1D(3, 3)],
        [k.RepeatVector(3), k.Conv1D(2, 1), k.GRU(3)],
        [k.RepeatVector(5), k.SeparableConv1D(3, 2)],
        [k.GroupNormalization(4)],
        [k.RepeatVector(2), k.LayerNormalization(), k.Dense(3)],
    )
    for middle in middles:
        net = keras.Sequential([
            keras.Input((4, 3, 2)), k.Conv2D(2, 3, padding="same"), k.Flatten(), *middle,
        ])  # fmt: skip
        cases.randomise_keras(net)
        x = inputs(generator("behind"), (4, 3, 2), None, 2)
        there = converters.to_torch(*converters.from_keras(net), layout="source")
        close(in_torch(there, x), in_keras(net, x))
        first = converters.to_torch(*converters.from_keras(net))
        found = in_torch(first, np.moveaxis(x, -1, 1))
        last = found if found.shape == in_keras(net, x).shape else np.moveaxis(found, 1, -1)
        close(last, in_keras(net, x))


def test_channels_first_separable_and_depthwise():
    k, first = keras.layers, {"data_format": "channels_first"}
    for layer in (k.SeparableConv2D(4, 2, padding="same", **first), k.DepthwiseConv2D(2, **first)):
        net = cases.randomise_keras(keras.Sequential([keras.Input((3, 6, 7)), layer]))
        x = inputs(generator("first"), (3, 6, 7), None, 2)
        close(in_flax(converters.from_keras(net, layout="source"), x), in_keras(net, x))


def test_small_differences():
    t, k = torch.nn, keras.layers
    x = inputs(generator("small"), (2, 5, 6), None, 2)
    for layer in (
        t.CircularPad2d((-1, 2, 1, -1)), t.ReflectionPad2d((-1, 2, 1, -1)),
        t.Upsample(scale_factor=1.7, mode="bilinear", recompute_scale_factor=True),
        t.Upsample(scale_factor=2.3, mode="nearest", recompute_scale_factor=True),
    ):  # fmt: skip
        model = converters.from_torch(t.Sequential(layer), (2, 5, 6), "source")
        close(in_flax(model, x), in_torch(layer, x))
    whole = np.array([[-1.0, 0.0, 1.0, 2.0]], np.float32)
    for settings in ({"threshold": 1.0}, {"threshold": 1.0, "negative_slope": 0.5},
                     {"max_value": 1.0, "threshold": 0.5}):  # fmt: skip
        net = keras.Sequential([keras.Input((4,)), k.ReLU(**settings)])
        close(in_flax(converters.from_keras(net), whole), in_keras(net, whole))
    odd = fwt.Sequential([("a", fwt.layers.TrainingOnly("torch", "Linear", "{}"))])
    with pytest.raises(converters.ConversionError, match="training-only"):
        converters.to_torch(odd, {})
    with pytest.raises(fwt.FwtError, match="params"):
        converters.from_torch(t.Sequential(OrderedDict([("params", t.Linear(3, 2))])))


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: k.ReLU(6), ["ReLU6"]),
        (lambda: k.ReLU(0.7), ["Hardtanh"]),
        (lambda: k.ReLU(threshold=0.3), ["Threshold"]),
        (lambda: k.ReLU(6.0, threshold=0.3), ["Threshold", "ReLU6"]),
        (lambda: k.ReLU(negative_slope=0.3), ["LeakyReLU"]),
        (lambda: k.ReLU(0.7, negative_slope=0.3), ["LeakyReLU", "Hardtanh"]),
        (lambda: k.Activation("exponential"), ["Pointwise"]),
        (lambda: t.Hardtanh(0, 0.7), ["ReLU"]),
        (lambda: t.Hardtanh(-0.4, 0.7), ["ReLU", "Rescaling", "ReLU", "Rescaling"]),
        (lambda: t.Hardtanh(-0.4, 0.0), ["Rescaling", "ReLU", "Rescaling"]),
        (lambda: t.Hardtanh(0.2, 0.7), ["Rescaling", "ReLU", "Rescaling"]),
        (lambda: t.Hardtanh(-math.inf, 0.7), ["ReLU"]),
        (lambda: t.Threshold(0.2, 0.0), ["ReLU"]),
        (lambda: t.CELU(0.7), ["Rescaling", "Activation", "Rescaling"]),
        (lambda: t.Softplus(3.0), ["Rescaling", "Activation", "Rescaling"]),
        (lambda: t.Softshrink(0.3), ["Rescaling", "Activation", "Rescaling"]),
        (lambda: t.Hardshrink(0.25), ["Rescaling", "Activation", "Rescaling"]),
    ],
)  # fmt: skip
def test_an_activation_with_settings_is_what_the_other_has(make, found):
    layer = make()
    ends = [-9.0, -0.75, -0.25, -1e-3, 0.0, 1e-3, 0.25, 0.3, 0.6, 0.75, 5.0, 7.0]
    x = np.array([ends, np.linspace(-2, 2, 12)], np.float32)
    if isinstance(layer, t.Module):
        model = converters.from_torch(t.Sequential(layer), input_shape=(12,))
        other = converters.to_keras(*model)
        close(in_keras(other, x), in_torch(layer, x))
        assert [type(a).__name__ for a in other.layers] == found
        back = converters.from_keras(other)
    else:
        net = keras.Sequential([keras.Input((12,)), layer])
        model = converters.from_keras(net)
        other = converters.to_torch(*model)
        close(in_torch(other, x), in_keras(net, x))
        assert [type(a).__name__ for a in other] == found
        back = converters.from_torch(other, input_shape=(12,))
    close(in_flax(back, x), in_flax(model, x))


def test_numbers_that_are_not_float32():
    """uint8 images, half precision and NaN give what the framework gives."""
    k, t = keras.layers, torch.nn
    images = generator("images").integers(256, size=(2, 5, 4, 3)).astype(np.uint8)
    for scale in (1 / 255, [1 / 255, 2 / 255, 0.5]):
        net = keras.Sequential([keras.Input((5, 4, 3), dtype="uint8"), k.Rescaling(scale, -0.5)])
        model = converters.from_keras(net)
        close(in_flax(model, images), in_keras(net, images))
        there = converters.to_torch(*model, layout="source")
        close(in_torch(there, images), in_keras(net, images))
    x = generator("half").normal(size=(2, 6, 3)).astype(np.float32)
    for layer in (t.LSTM(3, 4, batch_first=True), t.GRU(3, 4, batch_first=True)):
        net = t.Sequential(layer, converters.Select())
        model = converters.from_torch(net, (6, 3))
        mixed = model(jax.numpy.asarray(x, jax.numpy.bfloat16))  # float32 weights
        assert np.abs(np.asarray(mixed, np.float32) - in_torch(net, x)).max() < 0.05
        half = converters.from_torch(net.bfloat16(), (6, 3))
        assert half(jax.numpy.asarray(x, jax.numpy.bfloat16)).dtype == jax.numpy.bfloat16
    conv = fwt.layers.ConvLSTM(2, (3,))
    values = jax.numpy.ones((1, 2, 5, 3), jax.numpy.bfloat16)
    variables = conv.init(jax.random.key(0), values)
    assert np.isfinite(np.asarray(conv.apply(variables, values), np.float32)).all()
    odd = np.array([[np.nan, -np.inf, np.inf, 0.0, -0.3, 2.0]], np.float32)
    for layer in (t.Threshold(0.2, -1.0), t.Hardshrink(), t.Softshrink(), t.PReLU(), t.ELU(),
                  t.Hardtanh(), t.LeakyReLU(0.3), t.ReLU6(), t.MaxPool1d(2)):  # fmt: skip
        given = odd[:, None] if isinstance(layer, t.MaxPool1d) else odd
        net = t.Sequential(layer).eval()
        model = converters.from_torch(net, given.shape[1:], "source")
        found, expected = in_flax(model, given), in_torch(net, given)
        np.testing.assert_allclose(found, expected, rtol=1e-6, err_msg=str(layer))


def test_every_recurrent_activation_is_that_of_keras():
    from fwt.layers import recurrent

    x = np.linspace(-4, 4, 23, dtype=np.float32)
    older = {recurrent.HARD_SIGMOID: lambda x: np.clip(0.2 * x + 0.5, 0, 1)}  # of Keras 2
    for name, function in recurrent.ACTIVATIONS.items():
        truth = older[name] if name in older else getattr(keras.activations, name)
        close(function(x), truth(x), name)


def test_attention_that_drops_at_inference_is_refused():
    layer = nn.MultiHeadDotProductAttention(2, dropout_rate=0.5, deterministic=False)
    net = fwt.Sequential([("attend", layer)], input_shape=(3, 4))
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = net.init(keys, np.ones((1, 3, 4), np.float32))
    with pytest.raises(converters.ConversionError, match="deterministic"):
        converters.to_torch(net, variables)


def test_folds_leave_alone_what_is_more_than_its_parts():
    k = keras.layers
    net = keras.Sequential([
        keras.Input((6, 5, 3)),
        k.DepthwiseConv2D(2, use_bias=False, activation="tanh", name="a__depthwise"),
        k.Conv2D(4, 1, name="a"),
    ])  # fmt: skip
    cases.randomise_keras(net)
    x = inputs(generator("folds"), (6, 5, 3), None, 2)
    both_ways("keras", net, x)


@pytest.mark.parametrize("layout", ["channels_last", "channels_first", "source"])
def test_arrays_over_several_axes_follow_the_moved_axes(layout):
    """Where a convolution moves the axes, so must what has a weight for each place of an image."""
    t, k = torch.nn, keras.layers
    net = cases.randomise_torch(t.Sequential(
        t.Conv2d(3, 4, 2), t.LayerNorm([4, 5, 3]), t.PReLU(4), t.RMSNorm([4, 5, 3], 1e-4),
        t.GroupNorm(2, 4), t.Conv2d(4, 2, 1),
    ))  # fmt: skip
    x = inputs(generator("moved"), (3, 6, 4), None, 2)
    expected = in_torch(net, x)
    model = converters.from_torch(net, (3, 6, 4), layout)
    last = layout == "channels_last"
    there = np.moveaxis(x, 1, -1) if last else x
    close(in_flax(model, there), np.moveaxis(expected, 1, -1) if last else expected)
    close(in_torch(converters.to_torch(*model), x), expected)
    close(in_keras(converters.to_keras(*model), there), in_flax(model, there))

    other = cases.randomise_keras(keras.Sequential([
        keras.Input((6, 4, 3)), k.Conv2D(4, 2), k.LayerNormalization(axis=[1, 3]),
        k.PReLU(shared_axes=[1, 2]), k.LayerNormalization(axis=[1, 2, 3]), k.Conv2D(2, 1),
    ]))  # fmt: skip
    x = inputs(generator("moved"), (6, 4, 3), None, 2)
    first = layout == "channels_first"
    found = in_torch(
        converters.to_torch(*converters.from_keras(other), layout=layout),
        np.moveaxis(x, -1, 1) if first else x,
    )
    close(np.moveaxis(found, 1, -1) if first else found, in_keras(other, x))


def test_a_mask_is_refused_before_a_layer_that_uses_it(tmp_path):
    k = keras.layers
    rng = generator("mask")
    x = rng.normal(size=(3, 5, 2)).astype(np.float32)
    x[:, 3:] = 7.0
    x[1, 0] = 7.0
    net = keras.Sequential([keras.Input((5, 2)), k.Masking(7.0), k.Dense(3), k.Flatten()])
    check("keras", net, (5, 2), x, None)
    files("keras", net, (5, 2), x)
    numbers = keras.Sequential([keras.Input((5,)), k.Embedding(9, 4, mask_zero=True), k.Dense(2)])
    given = rng.integers(0, 9, size=(3, 5)).astype(np.int32)
    close(in_flax(converters.from_keras(numbers), given), in_keras(numbers, given))
    ends = keras.Sequential([keras.Input((5,)), k.Embedding(9, 4, mask_zero=True), k.Conv1D(3, 2),
                             k.Flatten(), k.Dense(4), k.Softmax()])  # fmt: skip
    close(in_flax(converters.from_keras(ends), given), in_keras(ends, given))
    users = [k.LSTM(3), k.Bidirectional(k.GRU(2)), k.Softmax(), k.GlobalAveragePooling1D(),
             k.TimeDistributed(k.Dense(2))]  # fmt: skip
    for first in (k.Masking(), k.Embedding(9, 4, mask_zero=True)):
        for user in users:
            shape = (5, 2) if isinstance(first, k.Masking) else (5,)
            layers = [
                type(x).from_config(x.get_config()) for x in (first, k.Activation("relu"), user)
            ]
            net = keras.Sequential([keras.Input(shape), *layers])
            with pytest.raises(converters.ConversionError, match=r"the mask of .*mask_zero=False"):
                converters.from_keras(net)
    flax = fwt.Sequential([("mask", fwt.layers.Masking()), ("lstm", fwt.layers.LSTM(3))])
    variables = flax.init(jax.random.key(0), x)
    with pytest.raises(converters.ConversionError, match="would use the mask of"):
        converters.to_keras(flax, variables, (5, 2))
    close(
        in_torch(converters.to_torch(flax, variables, (5, 2), "source"), x),
        flax.apply(variables, x),
    )


@pytest.mark.parametrize("kind", ["Multiply", "Maximum", "Minimum", "Add", "Average", "Subtract"])
def test_merges_that_compute_with_a_mask(kind, tmp_path):
    """Keras 3's products and extremes leave out what is masked; the operations do not."""
    k, path = keras.layers, tmp_path / "net.keras"
    rng = np.random.default_rng(0)
    given = [rng.integers(0, 4, size=(3, 5)).astype(np.int32) for _ in range(2)]
    merge = getattr(k, kind)
    for masks in ((True, True), (True, False), (False, True)):
        ends = [keras.Input((5,), dtype="int32") for _ in given]
        tables = [k.Embedding(4, 3, mask_zero=m)(x) for m, x in zip(masks, ends, strict=True)]
        net = cases.randomise_keras(keras.Model(ends, merge()([k.Dense(3)(tables[0]), tables[1]])))
        net.save(path)
        if kind in ("Multiply", "Maximum", "Minimum"):
            for read, what in ((converters.from_keras, net), (converters.load, path)):
                with pytest.raises(
                    converters.ConversionError, match=rf"\({kind}\): .* the mask of"
                ):
                    read(what)
        else:
            for model in (converters.from_keras(net), converters.load(path)):
                close(np.asarray(model(given)), np.asarray(net(given)))
    function = getattr(keras.ops, kind.lower())
    if kind != "Average":  # whose operation is another
        free = keras.Model(ends, function(k.Embedding(4, 3, mask_zero=True)(ends[0]), tables[1]))
        close(np.asarray(converters.from_keras(free)(given)), np.asarray(free(given)))
    masked = fwt.Graph(
        [("mask", fwt.layers.Masking(), "x"), ("both", getattr(fwt.layers, kind)(), ("mask", "y"))],
        inputs=("x", "y"), outputs="both", input_shape=((5, 2), (5, 2)),
    )  # fmt: skip
    xs = [rng.integers(-1, 2, size=(3, 5, 2)).astype(np.float32) for _ in range(2)]
    if kind in ("Multiply", "Maximum", "Minimum"):
        with pytest.raises(converters.ConversionError, match="would use the mask of"):
            converters.to_keras(masked, {})
    else:
        close(np.asarray(converters.to_keras(masked, {})(xs)), np.asarray(masked.apply({}, *xs)))


def test_the_layers_that_end_a_mask_are_keras_own():
    from fwt.converters.walk import convert

    for name, made in layer_cases.KERAS.items():
        ends = any(x in name for x in convert._END_MASKS)
        if ends and not any(x in name for x in convert._USE_MASKS):
            assert not made.make(generator(name))[1].supports_masking, name


@pytest.mark.parametrize("case", layer_cases.EINSUMS, ids=lambda case: case[0])
def test_every_einsum_of_keras_goes_round(case):
    equation, shape, out, bias = case
    layer = keras.layers.EinsumDense(equation, out, "tanh", bias_axes=bias)
    net = cases.randomise_keras(keras.Sequential([keras.Input(shape), layer]))
    check("keras", net, shape, inputs(generator(case), shape, None, 3), None)


def test_an_einsum_behind_moved_axes():
    """It counts the axes as its own framework has them, and takes a flattened one in that order."""
    k = keras.layers
    net = cases.randomise_keras(keras.Sequential([
        keras.Input((5, 4, 3)), k.Conv2D(2, 2), k.EinsumDense("nhwc,wcd->nhd", (4, 7)),
        k.Conv1D(3, 2), k.Flatten(), k.EinsumDense("nf,fde->nde", (2, 3), bias_axes="de"),
    ]))  # fmt: skip
    x = inputs(generator("moved"), (5, 4, 3), None, 2)
    expected = in_keras(net, x)
    model = converters.from_keras(net)
    close(in_flax(model, x), expected)
    close(in_torch(converters.to_torch(*model, layout="source"), x), expected)
    close(in_torch(converters.to_torch(*model), np.moveaxis(x, -1, 1)), expected)


def test_einsums_that_mix_the_batch_are_refused():
    def refused(equation, said, shape=(4, 3), kernel=(4, 5)):
        layer = fwt.layers.EinsumDense(equation, (None, 5))
        net = fwt.Sequential([("it", layer)], shape)
        with pytest.raises(converters.ConversionError, match=said):
            converters.to_torch(net, {"params": {"it": {"kernel": np.ones(kernel, np.float32)}}})

    refused("abc,bd->bad", "keep the batch first")
    refused("abc,ad->abd", "keep the batch first")
    refused("abb,bd->abd", "none of an input and a kernel")
    refused("abc,cd->abe", "none of an input and a kernel")
    refused("abcd,cd->ab", "does not fit an input of rank 3")
    refused("abc,bd->acd", "its kernel has 6 at 'b', found 4", kernel=(6, 5))


@pytest.mark.parametrize(
    ("sizes", "to"), [((4, 6), (2, 1)), ((3, 1), (1, 1)), ((8, 4, 5), (2, 4, 1))]
)
def test_an_adaptive_max_pool_that_tensorflow_lacks_is_a_plain_one(sizes, to):
    """Keras's own ends the process there."""
    r = len(sizes)
    net = t.Sequential(getattr(t, f"AdaptiveMaxPool{r}d")(to), t.ReLU())
    x = torch.randn(3, 2, *sizes)
    made = converters.to_keras(converters.from_torch(net, (2, *sizes)))
    found = np.moveaxis(np.asarray(made(x.movedim(1, -1).numpy())), -1, 1)
    np.testing.assert_array_equal(found, net(x).numpy())
    uneven = t.Sequential(getattr(t, f"AdaptiveMaxPool{r}d")((*sizes[:-1], 2)), t.ReLU())
    model = converters.from_torch(uneven, (2, *sizes[:-1], 1))
    with pytest.raises(converters.ConversionError, match=r"0.*of 1 to 2 ends the process"):
        converters.to_keras(model)


def test_one_hot_of_one_column_alone():
    """Keras gives one_hot of several columns an axis for them."""
    for columns, said in ((3, "of 3 columns"), (None, "of an unknown number of columns")):
        net = keras.Sequential(
            [keras.Input((columns,)), k.CategoryEncoding(5, output_mode="one_hot")]
        )
        with pytest.raises(converters.ConversionError, match=said):
            converters.from_keras(net)
    net = keras.Sequential([keras.Input((1,)), k.CategoryEncoding(5, output_mode="one_hot")])
    x = np.array([[0.0], [4.0], [2.0]], np.float32)
    model = converters.from_keras(net)
    assert np.array_equal(in_flax(model, x), in_keras(net, x))
    assert np.array_equal(in_keras(converters.to_keras(*model), x), in_keras(net, x))


@given_layers(layer_cases.KERAS)
def test_pixels_are_not_computed_in_bytes(name, data):
    case = layer_cases.KERAS[name]
    rng = layer_cases.Drawn(data)
    seed = rng.integers(2**32)
    shape, layer = case.make(rng)
    if case.integers or isinstance(shape, list):
        return
    model = keras.Sequential([keras.Input(shape), layer])
    cases.randomise_keras(model, seed)
    x = np.random.default_rng(seed).integers(0, 256, (2, *shape)).astype(np.uint8)
    module, variables = converters.from_keras(model)
    close(np.asarray(module.apply(variables, x), np.float64), in_keras(model, x), name)
