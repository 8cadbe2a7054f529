"""Every format of files: real frameworks open what we write, and we what they write."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import OrderedDict

import cases
import flax.linen as nn
import h5py
import jax
import keras
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from file_cases import image_net, random_model
from flax import serialization
from marks import thorough_but

import fwt
from fwt import converters
from fwt.converters.files import formats

k = keras.layers
WITH_MODEL = (".keras", ".h5", ".safetensors", ".npz", ".orbax")
TREES = (".safetensors", ".npz", ".msgpack", ".orbax", ".pt")


@pytest.fixture
def model():
    return random_model(image_net())


def leaves(tree):
    return {path: np.asarray(v) for path, v in fwt.select(tree, "**").items()}


def same(found, expected):
    found, expected = (fwt.select({"params": dict(t)}, "**") for t in (found, expected))
    assert list(found) == list(expected)
    for path, value in expected.items():
        value = np.asarray(value)
        there = found[path]
        assert isinstance(there, np.ndarray), path
        assert there.dtype == value.dtype.newbyteorder("="), (path, there.dtype, value.dtype)
        assert there.shape == value.shape, path
        assert there.tobytes() == value.astype(there.dtype).tobytes(), path


def odd_values(dtype):
    """Every bit pattern that matters: NaN payloads, -0.0, infinities, denormals, extremes."""
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    if dtype.kind == "b":
        return np.array([True, False, True])
    raw = np.random.default_rng(0).integers(0, 256, size=(5, 3, dtype.itemsize), dtype=np.uint8)
    raw[0] = 255
    raw[1, 0], raw[1, 0, -1] = 0, 128
    return raw.reshape(5, -1).view(dtype)


# -- bits -------------------------------------------------------------------------------------

EVERYWHERE = (
    "float32",
    "float64",
    "float16",
    "bfloat16",
    "bool",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "complex64",
)
SMALL = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
REFUSED = {(".safetensors", "complex128"), *((".msgpack", name) for name in SMALL)}


@pytest.mark.parametrize("suffix", TREES)
@pytest.mark.parametrize("dtype", [*EVERYWHERE, *SMALL, "complex128"])
def test_every_dtype_crosses_bit_for_bit(tmp_path, suffix, dtype):
    value = odd_values(dtype)
    leaf = {"kernel": value, "none": value[:0], "turned": np.asfortranarray(value)[::-1]}
    leaf["one"] = value.reshape(-1)[1:2].reshape(())
    tree = {"params": {"a": leaf}}
    path = tmp_path / f"w{suffix}"
    if (suffix, dtype) in REFUSED:
        with pytest.raises(converters.ConversionError, match=dtype):
            converters.save(path, None, tree)
        assert not path.exists()
        return
    converters.save(path, None, tree)
    same(converters.load(path).variables, tree)


@pytest.mark.parametrize("suffix", TREES)
def test_bytes_in_the_other_order_and_names_with_odd_characters(tmp_path, suffix):
    tree = {"params": {"a": {"kernel": np.arange(6, dtype=">f4").reshape(2, 3)}}}
    if suffix not in (".pt",):
        tree["params"] |= {"b/c": {"k*": np.ones(2)}, "10": {"0": np.ones(1, ">i8")}}
    converters.save(tmp_path / f"w{suffix}", None, tree)
    same(converters.load(tmp_path / f"w{suffix}").variables, tree)


# -- with an architecture ---------------------------------------------------------------------


@pytest.mark.parametrize("suffix", WITH_MODEL)
def test_a_model_comes_back_as_it_was(model, tmp_path, suffix):
    path = tmp_path / f"net{suffix}"
    converters.save(path, *model)
    again = converters.load(path)
    assert again.module == model.module
    same(again.variables, model.variables)
    renamed = tmp_path / "by content"  # and no suffix
    os.rename(path, renamed)
    same(converters.load(renamed).variables, model.variables)


@pytest.mark.parametrize(
    "suffix",
    [
        ".weights.h5",
        ".pt",
        ".bin",
        ".msgpack",
        ".npz",
        ".orbax",
        ".safetensors",
        "shards.safetensors",
        "shards.weights.h5",
    ],
)
def test_weights_become_a_model_with_an_architecture(model, tmp_path, suffix):
    path = tmp_path / f"net{suffix}"
    shards = {"shard_bytes": 300} if "shards" in suffix else {}
    bare = None if suffix in (".npz", ".safetensors", ".orbax") else model.module
    converters.save(path, bare, model.variables, **shards)
    if shards:
        assert len(list(path.iterdir())) > 3
    for name in ("net.keras", "net.safetensors"):
        there = tmp_path / f"architecture {name}"
        converters.save(there, *model)
    config = keras.saving.load_model(tmp_path / "architecture net.keras").to_json()
    (tmp_path / "net.json").write_text(config)
    whole = random_model(model.module, 7)
    for architecture in (
        model.module,
        whole,
        tmp_path / "architecture net.keras",
        tmp_path / "architecture net.safetensors",
        converters.to_keras(*whole),
        *([tmp_path / "net.json"] if "weights" in suffix else []),
    ):
        again = converters.load(path, architecture=architecture)
        assert again.module == model.module
        same(again.variables, model.variables)


@pytest.mark.parametrize("dtype", [*EVERYWHERE, *SMALL, "complex128"])
def test_keras_weights_of_every_dtype(tmp_path, dtype):
    value = odd_values(dtype)
    value = value[:, :2] if value.ndim > 1 else np.array([value, value, value[::-1]])[:, :2]
    net = fwt.Sequential([("d", nn.Dense(2, use_bias=False))], (value.shape[0],))
    tree = {"params": {"d": {"kernel": value}}}
    path = tmp_path / "w.weights.h5"
    if dtype in SMALL:
        with pytest.raises(converters.ConversionError, match=f"dtype {dtype}"):
            converters.save(path, net, tree)
        return
    converters.save(path, net, tree)
    same(converters.load(path, architecture=net).variables, tree)


def test_what_does_not_fit_an_architecture_is_listed_at_once(model, tmp_path):
    state = {n: v.numpy() for n, v in converters.to_torch(*model).state_dict().items()}
    state.pop("dense_10.bias")
    state["more.weight"] = np.ones(3, np.float32)
    state["conv.weight"] = state["conv.weight"][:, :2]
    tensors = {n: torch.from_numpy(np.ascontiguousarray(v)) for n, v in state.items()}
    torch.save(tensors, tmp_path / "w.pt")
    with pytest.raises(converters.FileFormatError) as told:
        converters.load(tmp_path / "w.pt", architecture=model.module)
    for said in (
        "missing: dense_10.bias",
        "unexpected: more.weight",
        "conv.weight is [4, 2, 3, 2]",
        "expected [4, 3, 3, 2]",
        "rename=",
    ):
        assert said in str(told.value)
    with pytest.raises(converters.FileFormatError, match="no name starts with 'nothing'"):
        converters.load(tmp_path / "w.pt", architecture=model, rename={"nothing": "a"})
    with pytest.raises(converters.FileFormatError, match="need architecture="):
        converters.load(tmp_path / "w.pt", match="order")


def test_a_pt_of_weights_goes_into_a_keras_model(tmp_path):
    """What the trackers of other converters ask for most: names differ, the net is the same."""
    t = torch.nn
    theirs = t.Sequential()
    theirs.add_module(
        "features", t.Sequential(t.Conv2d(3, 4, 3), t.BatchNorm2d(4), t.ReLU(), t.MaxPool2d(2))
    )
    theirs.add_module(
        "head", t.Sequential(t.Flatten(), t.Linear(4 * 2 * 3, 5), t.ReLU(), t.Linear(5, 2))
    )
    cases.randomise_torch(theirs)
    torch.save(
        {"epoch": 3, "model": theirs.state_dict(), "optimizer": {"lr": 0.1}}, tmp_path / "w.pt"
    )
    net = keras.Sequential(
        [
            keras.Input((7, 8, 3)),
            k.Conv2D(4, 3),
            k.BatchNormalization(epsilon=1e-5),
            k.ReLU(),
            k.MaxPooling2D(),
            k.Flatten(),
            k.Dense(5, "relu"),
            k.Dense(2),
        ]
    )
    net.save(tmp_path / "net.keras")
    with pytest.raises(converters.FileFormatError, match="key='model'"):
        converters.load(tmp_path / "w.pt", architecture=tmp_path / "net.keras")
    with pytest.raises(converters.FileFormatError, match="match='order' takes them"):
        converters.load(tmp_path / "w.pt", architecture=tmp_path / "net.keras", key="model")
    names = [layer.name for layer in net.layers if layer.weights]
    renamed = dict(zip(("features.0", "features.1", "head.1", "head.3"), names, strict=True))
    x = torch.randn(3, 3, 7, 8)
    for how in ({"match": "order"}, {"rename": renamed}):
        model = converters.load(
            tmp_path / "w.pt", architecture=tmp_path / "net.keras", key="model", **how
        )
        converters.save(tmp_path / "out.keras", *model)
        real = keras.saving.load_model(tmp_path / "out.keras")
        with torch.no_grad():
            expected = theirs.eval()(x).numpy()
        found = np.asarray(real(np.moveaxis(x.numpy(), 1, -1), training=False))
        np.testing.assert_allclose(found, expected, atol=1e-5)


def square(names):
    return torch.nn.Sequential(OrderedDict((n, torch.nn.Linear(4, 4)) for n in names))


def test_an_order_that_a_format_does_not_keep_is_not_guessed(tmp_path):
    x = torch.randn(3, 4)
    for names, kept in (
        (["stem", "head"], False), (["up3", "up2", "up1"], False), (["conv3x3", "conv1x1"], False),
        ([str(i) for i in range(12)], True),
    ):  # fmt: skip
        net = square(names)
        model = converters.from_torch(square([str(i) for i in range(len(names))]), input_shape=(4,))
        torch.save(net.state_dict(), tmp_path / "w.pt")
        safetensors.torch.save_file(net.state_dict(), tmp_path / "w.safetensors")
        converters.save(tmp_path / "again.pt", *converters.load(tmp_path / "w.pt"))
        for name in ("w.pt", "again.pt", *(["w.safetensors"] if kept else [])):
            found = converters.load(tmp_path / name, architecture=model, match="order")
            expected = net(x).detach().numpy()
            np.testing.assert_allclose(np.asarray(found(x.numpy())), expected, atol=1e-5)
        if not kept:
            with pytest.raises(converters.FileFormatError, match="only whole numbers between dots"):
                converters.load(tmp_path / "w.safetensors", architecture=model, match="order")
    by_number = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 4))
    model = converters.from_torch(by_number)
    held = {n: v.numpy() for n, v in by_number.state_dict().items()}  # weight before bias
    np.savez(tmp_path / "up.npz", **held)
    found = converters.load(tmp_path / "up.npz", architecture=model, match="order")
    np.testing.assert_array_equal(found(x.numpy()), model(x.numpy()))
    down = {f"{i}.{n}": v for i in (2, 0) for n, v in torch.nn.Linear(4, 4).state_dict().items()}
    np.savez(tmp_path / "down.npz", **{n: v.numpy() for n, v in down.items()})
    with pytest.raises(converters.FileFormatError, match="neither in the order of their numbers"):
        converters.load(tmp_path / "down.npz", architecture=model, match="order")
    net = [keras.Input((5,)), k.Dense(4), k.BatchNormalization(), k.Dense(4), k.Dense(3)]
    net = keras.Sequential(net)
    cases.randomise_keras(net)
    np.savez(tmp_path / "list.npz", *net.get_weights())
    found = converters.load(tmp_path / "list.npz", architecture=net, match="order")
    same(found.variables, converters.from_keras(net).variables)
    flat = {f"{v.path}": np.asarray(v) for v in net.weights}
    np.savez(tmp_path / "named.npz", **{n.partition("/")[2]: v for n, v in flat.items()})
    found = converters.load(tmp_path / "named.npz", architecture=net)
    same(found.variables, converters.from_keras(net).variables)


def test_names_are_told_with_their_shapes(tmp_path):
    net = keras.Sequential(
        [keras.Input((5, 6, 4)), k.DepthwiseConv2D(3, depth_multiplier=2, name="d")]
    )
    arrays = {f"d/{v.name}": np.asarray(v) for v in cases.randomise_keras(net).weights}
    np.savez(tmp_path / "w.npz", **arrays)
    same(
        converters.load(tmp_path / "w.npz", architecture=net).variables,
        converters.from_keras(net).variables,
    )


def test_pairs_that_only_look_like_a_weight_norm_stay(tmp_path):
    state = {
        "attn.proj_g": torch.randn(4, 4),
        "attn.proj_v": torch.randn(4, 4),
        "w.weight_g": torch.randn(4, 4),
        "w.weight_v": torch.randn(4, 4),
    }
    torch.save(state, tmp_path / "w.pt")
    assert len(fwt.paths(converters.load(tmp_path / "w.pt").variables)) == 4


def test_what_is_asked_for_is_not_ignored(model, tmp_path):
    for name in ("net.keras", "net.h5", "net.safetensors", "net.npz", "w.weights.h5"):
        converters.save(tmp_path / name, *model)
        with pytest.raises(converters.FileFormatError, match="key='nonsense'"):
            converters.load(tmp_path / name, key="nonsense")
    for how, said in (({"rename": {"a": "b"}}, "no name starts with 'a'"),
                      ({"strict": False}, "by their places")):  # fmt: skip
        with pytest.raises(converters.FileFormatError, match=said):
            converters.load(tmp_path / "w.weights.h5", architecture=model, **how)
    for how, said in (
        ({"match": "bogus"}, "match must be"),
        ({"max_bytes": "1GB"}, "max_bytes='1GB'"),
        ({"architecture": 3}, "architecture= takes a file"),
        ({"architecture": nn.Dense(3)}, "architecture= as Dense, a module of your own"),
    ):
        with pytest.raises(converters.ConversionError, match=said):
            converters.load(tmp_path / "net.npz", **how)
    pooled = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    with pytest.raises(converters.ConversionError, match=r"architecture=converters\.from_torch"):
        converters.load(tmp_path / "net.npz", architecture=pooled)
    with pytest.raises(converters.FileFormatError, match="expected the path"):
        converters.load(None)


def test_every_layer_of_another_shape_is_listed(tmp_path):
    net = keras.Sequential([keras.Input((3,)), k.Dense(4), k.Dense(5), k.Dense(2)])
    other = keras.Sequential([keras.Input((3,)), k.Dense(6), k.Dense(7), k.Dense(2)])
    for suffix in (".keras", ".h5"):
        other.save(tmp_path / f"other{suffix}")
        net.save_weights(tmp_path / "w.weights.h5")
        with pytest.raises(converters.FileFormatError) as told:
            converters.load(tmp_path / "w.weights.h5", architecture=tmp_path / f"other{suffix}")
        assert str(told.value).count("expected [") == 5


def test_shardings_never_cut_bits(tmp_path):
    tree = {"params": {"w": np.array([2**40 + 5, 3])}}
    ocp.PyTreeCheckpointer().save(tmp_path / "o", tree)
    with pytest.raises(converters.FileFormatError, match="cut to 32 bits"):
        converters.load(
            tmp_path / "o", shardings=jax.sharding.SingleDeviceSharding(jax.devices()[0])
        )


def test_bytes_of_npz_in_the_other_order(tmp_path):
    np.savez(tmp_path / "w.npz", a=np.arange(3, dtype=">f4"), b=np.asfortranarray(np.ones((2, 3))))
    found = converters.load(tmp_path / "w.npz").variables
    assert found["params"]["a"].dtype.isnative
    fwt.prune(0.5, where="**")(jax.tree.map(lambda v: v.astype(np.float32), found))


# -- Keras ------------------------------------------------------------------------------------


def nets():
    a = keras.Sequential(
        [
            keras.Input((6, 5, 3)),
            k.Conv2D(4, 3, name="my_conv", activation="relu"),
            k.BatchNormalization(scale=False),
            k.SeparableConv2D(5, 2),
            k.PReLU(shared_axes=[1, 2]),
            k.Flatten(),
            k.Dropout(0.5),
            k.Dense(3),
        ],
        name="net",
    )
    b = keras.Sequential(
        [
            keras.Input((5, 3)),
            k.Bidirectional(k.GRU(4, return_sequences=True)),
            k.LSTM(3),
            k.Dense(2, use_bias=False),
        ]
    )
    inner = keras.Sequential([k.Dense(4), k.BatchNormalization(), k.Dense(3)], name="inside")
    c = keras.Sequential(
        [keras.Input((5,)), inner, k.BatchNormalization(), k.Dense(2, name="last")]
    )
    start = keras.Input((4, 5, 2), name="start")
    d = keras.Model(start, k.Dense(2)(k.GlobalAveragePooling2D()(k.Conv2D(3, 2)(start))))
    norm = k.Normalization()
    norm.adapt(np.random.default_rng(0).normal(size=(9, 4)))
    e = keras.Sequential([keras.Input((4,)), norm, k.Dense(3)])
    return {"convolutions": a, "recurrent": b, "nested": c, "functional": d, "normalised": e}


@pytest.mark.parametrize("name", thorough_but(lambda n: n in ("recurrent", "nested"), nets()))
def test_hdf5_of_keras_goes_both_ways(name, tmp_path):
    net = cases.randomise_keras(nets()[name])
    x = np.random.default_rng(0).normal(size=(3, *net.input_shape[1:])).astype(np.float32)
    expected = np.asarray(net(x, training=False))
    mine = converters.from_keras(net)
    net.compile("adam", "mse")
    net.save(tmp_path / "theirs.h5")
    model = converters.load(tmp_path / "theirs.h5")
    assert model.module == mine.module
    same(model.variables, mine.variables)
    converters.save(tmp_path / "ours.h5", *model)
    real = keras.saving.load_model(tmp_path / "ours.h5")
    np.testing.assert_allclose(np.asarray(real(x, training=False)), expected, atol=1e-5)
    same(converters.load(tmp_path / "ours.h5").variables, model.variables)

    net.save_weights(tmp_path / "theirs.weights.h5")
    shards = tmp_path / "shards"
    shards.mkdir()
    net.save_weights(shards / "x.weights.json", max_shard_size=1e-6 * 600)
    net.save(tmp_path / "theirs.keras")
    for weights in (tmp_path / "theirs.weights.h5", shards, shards / "x.weights.json"):
        for architecture in (net, tmp_path / "theirs.keras", tmp_path / "theirs.h5"):
            again = converters.load(weights, architecture=architecture)
            same(again.variables, mine.variables)
        raw = converters.load(weights)
        assert raw.module is None
        assert any(p.startswith("layers/") for p in fwt.paths(raw.variables))

    target = converters.to_keras(*mine)
    cases.randomise_keras(target, 5)
    converters.save(tmp_path / "ours.weights.h5", *mine)
    target.load_weights(tmp_path / "ours.weights.h5")
    np.testing.assert_allclose(np.asarray(target(x, training=False)), expected, atol=1e-5)
    cases.randomise_keras(target, 6)
    converters.save(tmp_path / "pieces.weights.h5", *mine, shard_bytes=200)
    target.load_weights(tmp_path / "pieces.weights.h5" / "model.weights.json")
    np.testing.assert_allclose(np.asarray(target(x, training=False)), expected, atol=1e-5)


def test_weights_only_of_the_older_kind(tmp_path):
    from keras.src.legacy.saving import legacy_h5_format

    net = cases.randomise_keras(nets()["convolutions"])
    with h5py.File(tmp_path / "w.h5", "w") as file:
        legacy_h5_format.save_weights_to_hdf5_group(file, net)
    raw = converters.load(tmp_path / "w.h5")
    assert raw.module is None
    assert "my_conv/net/my_conv/kernel" in fwt.paths(raw.variables)
    mine = converters.from_keras(net)
    same(converters.load(tmp_path / "w.h5", architecture=net).variables, mine.variables)
    other = keras.Sequential([keras.Input((3,)), k.Dense(2, name="another")])
    with pytest.raises(
        converters.FileFormatError, match=r"of no layer of the model: my_conv.*none of another"
    ):
        converters.load(tmp_path / "w.h5", architecture=other)


def test_long_lists_of_names_are_cut_in_pieces(tmp_path):
    layers = [k.Dense(1, name=f"{'long' * 250}_{i}") for i in range(70)]
    net = keras.Sequential([keras.Input((1,)), *layers])
    net.save(tmp_path / "long.h5")
    with h5py.File(tmp_path / "long.h5") as file:
        assert "layer_names0" in file["model_weights"].attrs
    model = converters.load(tmp_path / "long.h5")
    same(model.variables, converters.from_keras(net).variables)
    converters.save(tmp_path / "again.h5", *model)
    real = keras.saving.load_model(tmp_path / "again.h5")
    assert [v.shape for v in real.weights] == [v.shape for v in net.weights]
    same(converters.from_keras(real).variables, model.variables)


def keras_2(path, layers, arrays, functional=False, version="2.12.0"):
    """A file as Keras 2 wrote it: no module names, batch_input_shape, names that end in :0."""
    config = {"name": "sequential", "layers": layers}
    with h5py.File(path, "w") as file:
        file.attrs["keras_version"], file.attrs["backend"] = version, "tensorflow"
        kind = "Functional" if functional else "Sequential"
        told = {"class_name": kind, "config": functional or config}
        file.attrs["model_config"] = json.dumps(told)
        root = file.create_group("model_weights")
        root.attrs["layer_names"] = [n.encode() for n in arrays]
        for layer, held in arrays.items():
            group = root.create_group(layer)
            group.attrs["weight_names"] = [f"{n}:0".encode() for n in held]
            for name, value in held.items():
                group.create_dataset(f"{name}:0", data=value)


def old(kind, name, **config):
    return {
        "class_name": kind,
        "config": {"name": name, "trainable": True, "dtype": "float32", **config},
    }


def test_files_of_keras_2(tmp_path):
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    start = {
        "class_name": "InputLayer",
        "config": {
            "batch_input_shape": [None, 6, 5, 3],
            "dtype": "float32",
            "sparse": False,
            "ragged": False,
            "name": "conv2d_input",
        },
    }
    init = {"class_name": "GlorotUniform", "config": {"seed": None}}
    conv = old(
        "Conv2D",
        "conv2d",
        filters=4,
        kernel_size=[3, 2],
        strides=[1, 1],
        padding="same",
        data_format="channels_last",
        dilation_rate=[1, 1],
        groups=1,
        activation="relu",
        use_bias=True,
        kernel_initializer=init,
        kernel_regularizer=None,
    )
    norm = old(
        "BatchNormalization",
        "bn",
        axis=[3],
        momentum=0.99,
        epsilon=0.001,
        center=True,
        scale=True,
        gamma_initializer={"class_name": "Ones", "config": {}},
    )
    leaky = old("LeakyReLU", "leaky", alpha=0.25)
    flat = old("Flatten", "flatten", data_format="channels_last")
    dense = old("Dense", "dense", units=2, activation="linear", use_bias=True)
    arrays = {
        "conv2d": {"conv2d/kernel": draw(3, 2, 3, 4), "conv2d/bias": draw(4)},
        "bn": {
            f"bn/{n}": np.abs(draw(4)) for n in ("gamma", "beta", "moving_mean", "moving_variance")
        },
        "leaky": {},
        "flatten": {},
        "dense": {"dense/kernel": draw(120, 2), "dense/bias": draw(2)},
    }
    now = keras.Sequential(
        [
            keras.Input((6, 5, 3)),
            k.Conv2D(4, (3, 2), padding="same", activation="relu"),
            k.BatchNormalization(),
            k.LeakyReLU(0.25),
            k.Flatten(),
            k.Dense(2),
        ]
    )
    for layer, held in zip(now.layers, arrays.values(), strict=True):
        layer.set_weights(list(held.values()))
    x = draw(3, 6, 5, 3)
    expected = np.asarray(now(x, training=False))
    first = {**conv, "config": {**conv["config"], "batch_input_shape": [None, 6, 5, 3]}}
    for number, layers in enumerate(([start, conv], [first])):
        path = tmp_path / f"{number}.h5"
        keras_2(path, [*layers, norm, leaky, flat, dense], arrays)
        model = converters.load(path)
        np.testing.assert_allclose(np.asarray(model(x)), expected, atol=1e-5)
        assert model.module.input_shape == (6, 5, 3)

    names = ["conv2d_input", "conv2d", "bn", "leaky", "flatten", "dense"]
    line = []
    for before, name, layer in zip(
        [None, *names[:-1]], names, [start, conv, norm, leaky, flat, dense], strict=True
    ):
        nodes = [] if before is None else [[[before, 0, 0, {}]]]
        line.append({**layer, "name": name, "inbound_nodes": nodes})
    functional = {
        "name": "model",
        "layers": line,
        "input_layers": [["conv2d_input", 0, 0]],
        "output_layers": [["dense", 0, 0]],
    }
    keras_2(tmp_path / "f.h5", [], arrays, functional)
    np.testing.assert_allclose(
        np.asarray(converters.load(tmp_path / "f.h5")(x)), expected, atol=1e-5
    )

    lstm = old(
        "LSTM",
        "lstm",
        batch_input_shape=[None, 5, 3],
        units=4,
        activation="tanh",
        recurrent_activation="sigmoid",
        use_bias=True,
        unit_forget_bias=True,
        return_sequences=False,
        return_state=False,
        go_backwards=False,
        stateful=False,
        unroll=False,
        time_major=False,
        implementation=2,
        dropout=0.0,
        recurrent_dropout=0.0,
    )
    gates = {
        "lstm": {
            f"lstm/lstm_cell/{n}": v
            for n, v in (
                ("kernel", draw(3, 16)),
                ("recurrent_kernel", draw(4, 16)),
                ("bias", draw(16)),
            )
        }
    }
    keras_2(tmp_path / "r.h5", [lstm], gates)
    now = keras.Sequential([keras.Input((5, 3)), k.LSTM(4)])
    now.layers[0].set_weights(list(gates["lstm"].values()))
    x = draw(2, 5, 3)
    model = converters.load(tmp_path / "r.h5")
    np.testing.assert_allclose(np.asarray(model(x)), np.asarray(now(x)), atol=1e-5)

    gru = old("GRU", "gru", batch_input_shape=[None, 5, 3], units=4)
    keras_2(tmp_path / "gru.h5", [gru], {"gru": {}})
    with pytest.raises(converters.FileFormatError, match="does not say reset_after"):
        converters.load(tmp_path / "gru.h5")


# -- torch ------------------------------------------------------------------------------------


def test_recurrent_and_attention_weights_by_name(tmp_path):
    t = torch.nn
    net = t.Sequential(
        t.LSTM(3, 4, 2, bidirectional=True, batch_first=True),
        converters.Select("sequence", "concat"),
        t.GRU(8, 6, batch_first=True),
        converters.Select("sequence"),
        t.TransformerEncoderLayer(6, 2, 5, batch_first=True),
        t.Linear(6, 2),
    )
    cases.randomise_torch(net)
    torch.save(net.state_dict(), tmp_path / "w.pt")
    x = torch.randn(2, 5, 3)
    with torch.no_grad():
        expected = net.eval()(x).numpy()
    empty = converters.from_torch(cases.randomise_torch(net, 9), input_shape=(5, 3))
    model = converters.load(tmp_path / "w.pt", architecture=empty)
    np.testing.assert_allclose(np.asarray(model(x.numpy())), expected, atol=1e-5)
    module = fwt.Sequential(empty.module.layers, (5, 3))
    again = converters.load(tmp_path / "w.pt", architecture=module)
    same(again.variables, model.variables)


def test_the_weights_of_a_grouped_transposed_convolution(tmp_path):
    net = torch.nn.Sequential(torch.nn.ConvTranspose2d(4, 6, 3, groups=2))
    model = converters.from_torch(net, input_shape=(4, 5, 6))
    full = converters.to_torch(*model)
    torch.save(full.state_dict(), tmp_path / "w.pt")
    same(converters.load(tmp_path / "w.pt", architecture=model).variables, model.variables)


def test_tensors_of_torch_in_every_form(tmp_path):
    whole = torch.arange(24.0).reshape(4, 6)
    tied = torch.nn.Linear(3, 3)
    tensors = {
        "view": whole[1:3, ::2],
        "turned": whole.T,
        "spread": torch.ones(1, 3).expand(2, 3),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5),
        "bits": torch.tensor([True, False]),
        "half": whole.bfloat16(),
        "small": whole.to(torch.float8_e4m3fn),
        "wide": torch.tensor([2**63], dtype=torch.uint64),
        "complex": torch.tensor([1 + 2j]).conj(),
        "minus": torch.tensor([1 + 2j, 3 - 1j]).conj().imag,
        "one": tied.weight,
        "other": tied.weight,
        "buffer": torch.nn.Buffer(torch.ones(2)),
    }
    torch.save(tensors, tmp_path / "w.pth")
    found = fwt.select(converters.load(tmp_path / "w.pth").variables, "**")
    for name, tensor in tensors.items():
        tensor = tensor.detach().resolve_conj().resolve_neg()
        value = found[name]
        assert value.shape == tuple(tensor.shape), name
        assert str(tensor.dtype) == f"torch.{value.dtype.name}", name
        raw = tensor.contiguous().reshape(-1).clone().view(torch.uint8).numpy()
        assert value.tobytes() == raw.tobytes(), name
    converters.save(tmp_path / "again.pt", None, {"params": dict(found)})
    again = torch.load(tmp_path / "again.pt", weights_only=True)
    for name, tensor in tensors.items():
        tensor = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).clone()
        assert torch.equal(again[name].reshape(-1).view(torch.uint8), tensor.view(torch.uint8)), (
            name
        )


def test_parts_of_a_checkpoint(tmp_path):
    net = torch.nn.Linear(3, 2)
    tx = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 3)).sum().backward()
    tx.step()
    held = {
        "state": {"model": net.state_dict()},
        "optimizer": tx.state_dict(),
        "epoch": 3,
        "best": 0.5,
        "size": torch.Size([2]),
        "dtype": torch.float32,
    }
    torch.save(held, tmp_path / "c.pt")
    with pytest.raises(converters.FileFormatError, match="'state' is a dict"):
        converters.load(tmp_path / "c.pt")
    found = converters.load(tmp_path / "c.pt", key="state/model").variables["params"]
    assert np.array_equal(found["weight"], net.weight.detach())
    with pytest.raises(converters.FileFormatError, match="there is no 'ema', but 'state'"):
        converters.load(tmp_path / "c.pt", key="ema")
    tree = {"model": {"params": {"a": np.ones(2)}, "batch_stats": {"n": np.ones(1)}}, "step": 3}
    (tmp_path / "t.msgpack").write_bytes(serialization.to_bytes(tree))
    ocp.PyTreeCheckpointer().save(tmp_path / "t", tree)
    for path in (tmp_path / "t.msgpack", tmp_path / "t"):
        same(converters.load(path, key="model").variables, tree["model"])
    with pytest.raises(
        converters.FileFormatError, match=r"step is no array of numbers \(int\).*key="
    ):
        converters.load(tmp_path / "t.msgpack")
    assert converters.load(tmp_path / "t").variables["params"]["step"] == 3


FOLDED = {
    "prune": lambda m: torch.nn.utils.prune.random_unstructured(m, "weight", 0.5),
    "weight_norm": torch.nn.utils.parametrizations.weight_norm,
    "weight_norm of the input": lambda m: torch.nn.utils.parametrizations.weight_norm(m, dim=1),
    "older weight_norm": torch.nn.utils.weight_norm,
    "older weight_norm over all": lambda m: torch.nn.utils.weight_norm(m, dim=None),
    "spectral_norm": torch.nn.utils.parametrizations.spectral_norm,
    "older spectral_norm": torch.nn.utils.spectral_norm,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("name", FOLDED)
def test_what_torch_computes_is_folded_or_kept(name, tmp_path):
    import torch.nn.utils.prune

    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, (2, 3)), torch.nn.Conv2d(4, 5, 1))
    FOLDED[name](net[0])
    for _ in range(20):  # older hooks compute when called
        net.train()(torch.ones(1, 3, 4, 5))
    net.eval()(torch.ones(1, 3, 4, 5))  # now that a spectral norm's vectors have settled
    torch.save(net.state_dict(), tmp_path / "w.pt")
    kept = converters.load(tmp_path / "w.pt", fold=False).variables
    flat = {p.replace("/", ".") for p in fwt.paths(kept)}
    assert flat == set(net.state_dict())
    found = converters.load(tmp_path / "w.pt").variables
    assert fwt.paths(found) == ["0/bias", "0/weight", "1/bias", "1/weight"]
    expected = net[0].weight.detach().numpy()
    np.testing.assert_allclose(found["params"]["0"]["weight"], expected, rtol=2e-6, atol=1e-7)
    if name == "prune":
        assert found["params"]["0"]["weight"].tobytes() == expected.tobytes()


def test_what_can_not_be_folded_is_told(tmp_path):
    net = torch.nn.utils.parametrizations.orthogonal(torch.nn.Linear(3, 3))
    torch.save(net.state_dict(), tmp_path / "w.pt")
    with pytest.raises(converters.FileFormatError, match="fold=False keeps"):
        converters.load(tmp_path / "w.pt")
    converters.load(tmp_path / "w.pt", fold=False)
    square = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Conv2d(3, 3, 1))
    torch.save(square.state_dict(), tmp_path / "s.pt")
    with pytest.raises(converters.FileFormatError, match="fold=False keeps"):
        converters.load(tmp_path / "s.pt")


# -- the others -------------------------------------------------------------------------------


def test_safetensors_of_others_and_for_others(model, tmp_path):
    dtypes = [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.float64]
    tensors = {f"layer.{i}": torch.arange(6).reshape(2, 3).to(d) for i, d in enumerate(dtypes)}
    safetensors.torch.save_file(tensors, tmp_path / "w.safetensors", {"format": "pt"})
    found = fwt.select(converters.load(tmp_path / "w.safetensors").variables, "**")
    for i, tensor in enumerate(tensors.values()):
        raw = tensor.view(torch.uint8).numpy()
        assert found[f"layer/{i}"].tobytes() == raw.tobytes()
    converters.save(tmp_path / "again.safetensors", *converters.load(tmp_path / "w.safetensors"))
    again = safetensors.torch.load_file(tmp_path / "again.safetensors")
    assert all(
        torch.equal(again[n].view(torch.uint8), v.view(torch.uint8)) for n, v in tensors.items()
    )

    converters.save(tmp_path / "net.safetensors", *model, shard_bytes=200)
    index = json.loads((tmp_path / "net.safetensors" / "model.safetensors.index.json").read_text())
    held = {}
    for shard in set(index["weight_map"].values()):
        held |= safetensors.numpy.load_file(tmp_path / "net.safetensors" / shard)
    assert set(held) == set(index["weight_map"])
    assert sum(v.nbytes for v in held.values()) == index["metadata"]["total_size"]
    for path in (
        tmp_path / "net.safetensors",
        tmp_path / "net.safetensors" / "model.safetensors.index.json",
    ):
        again = converters.load(path)
        assert again.module == model.module
        same(again.variables, model.variables)
    converters.save(tmp_path / "net.safetensors", *random_model(model.module, 3), shard_bytes=10**6)
    assert len(list((tmp_path / "net.safetensors").iterdir())) == 2


def test_npz_msgpack_and_orbax_of_others_and_for_others(model, tmp_path):
    plain = jax.tree.map(np.asarray, model.variables)
    np.savez_compressed(
        tmp_path / "z.npz", **{"a/b": np.ones((2, 3), order="F"), "c": np.arange(3)}
    )
    found = converters.load(tmp_path / "z.npz").variables["params"]
    assert np.array_equal(found["a"]["b"], np.ones((2, 3)))
    assert np.array_equal(found["c"], np.arange(3))
    np.savez(tmp_path / "odd.npz", a=np.array(["text"]), b=np.ones(2, ml_dtypes.bfloat16))
    with pytest.raises(converters.FileFormatError, match="whose meaning the file does not say"):
        converters.load(tmp_path / "odd.npz")
    converters.save(tmp_path / "net.npz", *model)
    with np.load(tmp_path / "net.npz") as real:
        assert np.array_equal(real["params/conv/kernel"], plain["params"]["conv"]["kernel"])

    (tmp_path / "m.msgpack").write_bytes(serialization.to_bytes(plain))
    same(converters.load(tmp_path / "m.msgpack").variables, plain)
    converters.save(tmp_path / "ours.msgpack", *model)
    real = serialization.from_bytes(plain, (tmp_path / "ours.msgpack").read_bytes())
    same(real, plain)
    assert (tmp_path / "ours.msgpack").read_bytes() == (tmp_path / "m.msgpack").read_bytes()

    with ocp.StandardCheckpointer() as theirs:
        theirs.save(tmp_path / "o", plain)
    same(converters.load(tmp_path / "o").variables, plain)
    converters.save(tmp_path / "ours.orbax", *model)
    same(ocp.PyTreeCheckpointer().restore(tmp_path / "ours.orbax"), plain)
    with ocp.CheckpointManager(tmp_path / "steps") as manager:
        manager.save(3, args=ocp.args.Composite(state=ocp.args.StandardSave(plain)))
    same(converters.load(tmp_path / "steps" / "3").variables, plain)
    same(converters.load(tmp_path / "steps" / "3", key="state").variables, plain)
    with pytest.raises(converters.FileFormatError, match="holds the steps 3: give the folder of"):
        converters.load(tmp_path / "steps")


def test_the_parts_of_an_orbax_checkpoint_with_a_state(tmp_path):
    params = {"d": {"kernel": np.ones((4, 3), np.float32)}}
    state = optax.chain(optax.clip(1.0), optax.adam(1e-3)).init(params)
    held = {"opt_state": {"inner": state}, "weights": params, "ema": params, "step": np.int32(3)}
    ocp.PyTreeCheckpointer().save(tmp_path / "20", held)
    flat = {"d.kernel": torch.ones(3, 4)}
    inner = {"weights": flat, "ema": flat, "optimizer": {"state": {0: {}}}}
    torch.save({"20": inner, "other": 1}, tmp_path / "c.pt")
    tree = {"weights": params, "ema": params, "extra": None}
    (tmp_path / "m.msgpack").write_bytes(serialization.msgpack_serialize({"20": tree}))
    for path, key, said in (
        (tmp_path / "20", None, "opt_state/inner/0 is no array; "),
        (tmp_path, "20", "opt_state/inner/0 is no array; "),
        (tmp_path / "c.pt", "20", "but 'weights' is a dict; "),
        (tmp_path / "m.msgpack", "20", r"extra is no array of numbers \(NoneType\); "),
    ):
        with pytest.raises(converters.FileFormatError, match=said) as caught:
            converters.load(path, key=key)
        parts = re.findall(r"key='([^']*)'", str(caught.value))
        start = "" if key is None else f"{key}/"
        assert sorted(parts) == [f"{start}ema", f"{start}weights"]
        for part in parts:
            assert fwt.paths(converters.load(path, key=part).variables) == ["d/kernel"]


def test_large_arrays_of_msgpack_come_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 64)
    tree = {"params": {"a": np.arange(100.0).reshape(4, 25), "b": np.arange(3)}}
    (tmp_path / "m.msgpack").write_bytes(serialization.to_bytes(tree))
    assert b"__msgpack_chunked_array__" in (tmp_path / "m.msgpack").read_bytes()
    same(converters.load(tmp_path / "m.msgpack").variables, tree)


def test_an_orbax_checkpoint_onto_shardings(tmp_path):
    """As JAX arrays on devices, where the user wants them there."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    tree = {"params": {"a": jax.device_put(np.arange(8.0, dtype=np.float32), sharding)}}
    with ocp.StandardCheckpointer() as theirs:
        theirs.save(tmp_path / "o", tree)
    found = converters.load(tmp_path / "o").variables
    assert type(found["params"]["a"]) is np.ndarray
    placed = converters.load(tmp_path / "o", shardings={"params": {"a": sharding}}).variables
    assert placed["params"]["a"].sharding == sharding
    everywhere = converters.load(tmp_path / "o", shardings=sharding).variables
    assert everywhere["params"]["a"].sharding == sharding


def test_a_suffix_says_where_to_and_the_content_where_from(model, tmp_path):
    for suffix, form in formats.SUFFIXES.items():
        if form.save is None and form.save_folder is None:
            with pytest.raises(converters.FileFormatError, match="shard_bytes="):
                converters.save(tmp_path / f"net{suffix}", *model)
            continue
        converters.save(tmp_path / f"net{suffix}", *model)
        assert formats.by_content(tmp_path / f"net{suffix}") is form
    shutil.copy(tmp_path / "net.keras", tmp_path / "net2.pt")
    same(converters.load(tmp_path / "net2.pt").variables, model.variables)
    (tmp_path / "x").write_bytes(b"hello world")
    with pytest.raises(converters.FileFormatError, match="of no known format"):
        converters.load(tmp_path / "x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("precious")
    for path, more in (
        (tmp_path / "folder.orbax", {}),
        (tmp_path / "folder.safetensors", {"shard_bytes": 9}),
    ):
        shutil.copytree(tmp_path / "folder", path)
        with pytest.raises(converters.FileFormatError, match="a folder with other things"):
            converters.save(path, *model, **more)
        assert (path / "mine.txt").read_text() == "precious"
    with pytest.raises(converters.ConversionError, match="can't be written for Keras"):
        converters.save(tmp_path / "w.weights.h5", None, model.variables)


def test_sequential_weights_in_shards_are_those_of_linen(tmp_path):
    net = fwt.Sequential([("dense", nn.Dense(3))], (2,))
    variables = net.init(jax.random.key(0), np.ones((1, 2), np.float32))
    converters.save(tmp_path / "a.msgpack", net, variables)
    again = converters.load(tmp_path / "a.msgpack", architecture=net)
    same(again.variables, jax.tree.map(np.asarray, variables))


@pytest.mark.thorough
def test_the_guides_table_of_formats_is_that_of_the_code():
    import tables

    assert tables.stands("files.md"), "run python tests/helpers/tables.py"


def test_no_framework_is_imported(tmp_path):
    """Neither to read nor to write."""
    saves = []
    for form in formats.FORMATS:
        suffix, more = form.suffixes[0], {}
        if form.save is None and form.save_folder is None:
            suffix = {"Keras": ".weights.h5", "safetensors": ".safetensors"}[form.framework]
            more = {"shard_bytes": 9}
        if form.name != "ONNX":
            saves.append((form.name, str(tmp_path / f"{len(saves)}{suffix}"), more))
    code = f"""
import sys, fwt, jax, numpy as np, flax.linen as nn
from fwt import converters
net = fwt.Sequential([("d", nn.Dense(2)), nn.relu], (3,))
variables = net.init(jax.random.key(0), np.ones((1, 3)))
for name, path, more in {saves!r}:
    converters.save(path, net, variables, **more)
    converters.load(path, architecture=net)
    print(name, [m for m in ("keras", "torch", "tensorflow") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [f"{name} []" for name, _, _ in saves], done.stderr[-2000:]


@pytest.mark.parametrize(
    ("make", "flax"),
    [
        (lambda: k.ReLU(2.0, negative_slope=0.3, threshold=0.5), None),
        (lambda: k.Activation("sparsemax"), None),
        (lambda: k.UnitNormalization(), None),
        (None, fwt.layers.GELU(approximate=True)),
        (None, fwt.layers.MaxPool((2, 2), (1, 1), ((1, 1), (1, 1)))),
    ],
)
def test_layers_without_arrays_do_not_stand_between_weights_and_their_places(make, flax, tmp_path):
    """Names, axes and order are known wherever the layers with arrays have a form."""
    t = torch.nn
    net = cases.randomise_keras(keras.Sequential([
        keras.Input((5, 6, 3)), k.Conv2D(4, 2), *([make()] if make else []), k.Flatten(),
        k.Dense(3), k.BatchNormalization(), k.Dense(2)]))  # fmt: skip
    plain = keras.Sequential([x for x in net.layers if x.weights or isinstance(x, k.Flatten)])
    plain.build((None, 5, 6, 3))
    architecture = net
    if flax is not None:
        module, variables = converters.from_keras(plain)
        named = list(module.layers)
        named.insert(1, ("between", flax))
        if isinstance(flax, fwt.layers.MaxPool):  # one more of each axis
            named.insert(2, ("crop", fwt.layers.Crop(((1, 0), (1, 0)))))
        architecture = fwt.Model(fwt.Sequential(named, module.input_shape), variables)
    # torch's own names and arrays for the same weights
    theirs = converters.to_torch(*converters.from_keras(plain))
    torch.save(theirs.state_dict(), tmp_path / "named.pt")
    torch.save({f"{i}.{n.split('.')[-1]}": v for i, part in enumerate(theirs)
                for n, v in part.state_dict().items()}, tmp_path / "numbered.pt")  # fmt: skip
    np.savez(tmp_path / "list.npz", *net.get_weights())
    plain.save_weights(tmp_path / "own.weights.h5")
    wanted = converters.from_keras(plain).variables
    for name, how in (("named.pt", {}), ("numbered.pt", {"match": "order"}),
                      ("list.npz", {"match": "order"}), ("own.weights.h5", {})):  # fmt: skip
        same(converters.load(tmp_path / name, architecture=architecture, **how).variables, wanted)
    # and out again, where torch names the weights alone
    whole = architecture if flax is not None else converters.from_keras(net)
    converters.save(tmp_path / "out.pt", *whole)
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    t.Module.load_state_dict(theirs, found)
    same(converters.from_torch(theirs, input_shape=(3, 5, 6)).variables, wanted)


def test_weights_of_no_order_say_which_framework_has_none(tmp_path):
    net = keras.Sequential([keras.Input((5, 4)), k.LSTM(3, activation="relu"), k.Dense(2)])
    np.savez(tmp_path / "w.npz", *[np.zeros((3, 3), np.float32)])
    for how in ({}, {"match": "order"}):
        with pytest.raises(converters.FileFormatError, match=r"torch.*not known \(lstm.*='relu'"):
            converters.load(tmp_path / "w.npz", architecture=net, **how)


@keras.saving.register_keras_serializable("mine")
class KerasScale(k.Layer):
    def __init__(self, size, **kwargs):
        super().__init__(**kwargs)
        self.size = size

    def build(self, shape):
        self.g = self.add_weight(shape=(self.size,), initializer="ones", name="g")

    def call(self, x):
        return x * self.g

    def get_config(self):
        return {**super().get_config(), "size": self.size}


class Scale(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x):
        return x * self.param("scale", nn.initializers.ones, (self.features,))


def test_a_registered_class_of_keras_is_read_from_each_of_its_files(tmp_path, monkeypatch):
    from fwt.converters.rows import table

    net = keras.Sequential([keras.Input((4,)), k.Dense(3), KerasScale(3)])
    cases.randomise_keras(net)
    for name in ("n.keras", "n.h5"):
        net.save(tmp_path / name)
        with pytest.raises(converters.ConversionError, match=r"register\(row\).*transform\("):
            converters.load(tmp_path / name)
    monkeypatch.setattr(table, "LAYERS", list(table.LAYERS))
    monkeypatch.setitem(table.CUSTOM, "keras", {})
    settings = (converters.S("features", None, "size"),)
    row = {"keras": KerasScale, "axes": "*b c -> *b c", "settings": settings}
    wrong = (converters.P("scale: c", "-", "g"),)
    with pytest.raises(converters.ConversionError, match="'g' in keras: write 'g: c'"):
        converters.register(converters.Row(Scale, **row, params=wrong))
    right = (converters.P("scale: c", "-", "g: c"),)
    try:
        converters.register(converters.Row(Scale, **row, params=right))
        for name in ("n.keras", "n.h5"):
            found = converters.load(tmp_path / name)
            assert converters.verify(net, found).ok
        converters.to_keras(*found).save(tmp_path / "back.keras")
        assert converters.verify(net, keras.saving.load_model(tmp_path / "back.keras")).ok
    finally:
        table.rows_of.cache_clear()


def test_groups_that_fall_so_by_chance_are_no_warning(recwarn):
    t = torch.nn
    net = t.Sequential(t.Conv2d(2, 4, 3), t.Flatten(), t.Linear(48, 5))
    groups = fwt.prune(pattern=fwt.patterns.n_m(2, 4), where="2/kernel")
    for seed, prune, warns in ((0, fwt.prune(0.9), False), (1, fwt.prune(0.97), False),
                               (2, groups, True)):  # fmt: skip
        cases.randomise_torch(net, seed)
        converters.transform(net, prune)
        recwarn.clear()
        converters.from_torch(net, input_shape=(2, 5, 6))
        assert any("sparse" in str(w.message) for w in recwarn.list) == warns
