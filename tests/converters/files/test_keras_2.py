"""Files that Keras 2 wrote, against what it predicted with them.

``tests/fixtures/keras_2/write.py`` wrote them, with Keras 2.13, whose layout 2.12 and 2.14 share,
and with tf_keras 2.21. Keras 2 can't be installed beside Keras 3, so it does not run here.
"""

import functools
import io
import json
import tarfile
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from marks import thorough_but

from fwt import converters

HOME = Path(__file__).resolve().parents[2] / "fixtures" / "keras_2"
VERSIONS = ("2.13", "2.21")
STACKS = (
    "attention",
    "deep",
    "frames",
    "images",
    "inside",
    "line",
    "nested",
    "product",
    "sequences",
    "tokens",
    "trained",
)
# What is refused, and why.
REFUSED = {
    "bidirectional_cell": "only an RNN over",
    "embedding_mask": "the mask of",
    "locally_connected": "'LocallyConnected1D' is not known",
    "masking": "the mask of",
    "softmax_axes": "one axis only",
    "stacked_cells": "only an RNN over|holds 6 arrays",
    "lambda": "it runs any code",
    "time_major": "time_major=True",
}


# Functions of TensorFlow that are refused, and why.
REFUSED_FUNCTIONS = {
    "cut_unknown": "whose size is not known",
    "norm": r"tf\.math\.l2_normalize, .* not read .* in Keras 3, .* load_weights",
    "matmul": r"tf\.linalg\.matmul", "power": r"tf\.math\.pow", "resize": r"tf\.image\.resize",
    "add_table": "only a number, one for each last place",
    "batch": "Reshape", "split": r"tf\.split", "whole": r"tf\.reshape",
}  # fmt: skip


@functools.cache
def members(version):
    with tarfile.open(HOME / f"{version}.tar.xz") as archive:
        return {m.name: archive.extractfile(m).read() for m in archive.getmembers()}


def put(folder, version, name, suffix):
    path = folder / f"{name}{suffix}"
    path.write_bytes(members(version)[path.name])
    return path


def assert_predicts(model, version, name):
    told = np.load(io.BytesIO(members(version)[f"{name}.npz"]))
    found = np.asarray(model(told["x"]))
    assert found.shape == told["y"].shape
    scale = np.abs(told["y"]).max()
    np.testing.assert_allclose(found, told["y"], rtol=1e-5, atol=3e-6 * scale)


@pytest.mark.parametrize("version", thorough_but(1, VERSIONS))
@pytest.mark.parametrize("name", STACKS)
def test_models_of_many_layers(name, version, tmp_path):
    """Each format holds the same weights, so that one prediction is enough."""
    whole = converters.load(put(tmp_path, version, name, ".keras"))
    assert_predicts(whole, version, name)
    json = {"architecture": put(tmp_path, version, name, ".json")}
    for suffix, how in {".h5": {}, ".weights.h5": json, ".only.h5": json}.items():
        other = converters.load(put(tmp_path, version, name, suffix), **how)
        assert other.module == whole.module
        assert_same(other.variables, whole.variables)


def assert_same(one, other):
    import jax

    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


FEW = ("transfer", "recipe_caffe", "subtract_from", "concat", "entry", "norm")
FUNCTIONS = sorted(n[:-4] for n in members("functions") if n.endswith(".npz"))


@pytest.mark.parametrize("name", thorough_but(lambda n: n in FEW, FUNCTIONS))
def test_functions_of_tensorflow_between_layers(name, tmp_path):
    path = put(tmp_path, "functions", name, ".h5")
    if name in REFUSED_FUNCTIONS:
        with pytest.raises(converters.ConversionError, match=REFUSED_FUNCTIONS[name]):
            converters.load(path)
        return
    found = converters.load(path)
    assert_predicts(found, "functions", name)
    if name in ("transfer", "turned", "bias", "stack"):
        assert_predicts(converters.to_keras(found), "functions", name)
        torch = converters.to_torch(found, layout="source")
        assert converters.verify(found, torch).ok


def test_the_way_out_of_a_function_of_tensorflow_works(tmp_path):
    import keras

    start = keras.Input((6, 5, 3))
    conv = keras.layers.Conv2D(3, 3, padding="same", name="c")
    net = keras.Model(start, keras.layers.Resizing(4, 4)(conv(start)))
    net.load_weights(put(tmp_path, "functions", "resize", ".h5"))
    assert_predicts(converters.from_keras(net), "functions", "resize")


@pytest.mark.thorough
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_every_layer_class(suffix, version, tmp_path):
    names = [n.removesuffix(".npz") for n in members(version) if n.endswith(".npz")]
    assert len(names) > 140
    for name in names:
        path = put(tmp_path, version, name, suffix)
        if name in REFUSED:
            with pytest.raises(converters.FileFormatError, match=REFUSED[name]):
                converters.load(path)
        else:
            assert_predicts(converters.load(path), version, name)


def with_backslashes(group, target, above=""):
    for name, node in group.items():
        here = f"{above}\\{name}".lstrip("\\")
        if isinstance(node, h5py.Group) and name != "vars":
            with_backslashes(node, target, here)
        else:
            place = f"{above}/vars" if above else "vars"
            group.copy(node, target, place)


@pytest.mark.parametrize("name", ["images", "nested"])
def test_paths_of_windows(name, tmp_path):
    """There Keras 2.12 to 2.14 joined the groups of a layer by backslashes, and vars by a slash."""
    path = put(tmp_path, "2.13", name, ".keras")
    expected = converters.load(path)
    weights = io.BytesIO()
    with zipfile.ZipFile(path) as old, h5py.File(weights, "w") as file:
        parts = {n: old.read(n) for n in old.namelist()}
        with h5py.File(io.BytesIO(parts["model.weights.h5"])) as before:
            with_backslashes(before, file)
        assert any("_layer_checkpoint_dependencies\\" in n for n in file)
    with zipfile.ZipFile(path, "w") as new:
        for n, data in {**parts, "model.weights.h5": weights.getvalue()}.items():
            new.writestr(n, data)
    assert_same(converters.load(path).variables, expected.variables)


def changed_config(path, change, version="2.15.0"):
    """The archive with another config, and with another version or none."""
    with zipfile.ZipFile(path) as archive:
        parts = {n: archive.read(n) for n in archive.namelist()}
    config = json.loads(parts["config.json"])
    change(config["config"]["layers"])
    parts["config.json"] = json.dumps(config)
    parts["metadata.json"] = json.dumps({"keras_version": version} if version else {})
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data)


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("2.15.0", None),
        (None, None),
        ("1.2.2", None),
        ("new", "keras_version="),
        ([3], "keras"),
    ],
)
def test_the_version_decides(version, said, tmp_path):
    path = put(tmp_path, "2.21", "dense_hard_sigmoid", ".keras")
    changed_config(path, lambda layers: None, version)
    if said is None:
        assert_predicts(converters.load(path), "2.21", "dense_hard_sigmoid")
    else:
        with pytest.raises(converters.FileFormatError, match=said):
            converters.load(path)


@pytest.mark.parametrize(
    ("name", "setting", "value", "said"),
    [
        ("GRU", "reset_after", None, "does not say reset_after"),
        ("LSTM", "time_major", True, "time_major=True"),
        ("batch_norm", "renorm", True, "renorm=True"),
        ("conv2d_transpose", "groups", 2, "groups=2"),
        ("leaky_relu", "beta", 0.1, "beta=0.1"),
    ],
)
def test_what_keras_2_says_is_never_passed_over(name, setting, value, said, tmp_path):
    def change(layers):
        own = layers[1]["config"]
        own.pop(setting, None) if value is None else own.update({setting: value})

    path = put(tmp_path, "2.21", name, ".keras")
    changed_config(path, change)
    with pytest.raises(converters.FileFormatError, match=said):
        converters.load(path)


def test_merges_of_keras_2_do_not_compute_with_masks(tmp_path):
    def table(name, masked):
        told = {"name": name, "input_dim": 4, "output_dim": 3, "mask_zero": masked}
        nodes = [[[f"x_{name}", 0, 0, {}]]]
        return {"class_name": "Embedding", "config": told, "name": name, "inbound_nodes": nodes}

    def start(name):
        told = {"name": name, "batch_input_shape": [None, 5], "dtype": "float32"}
        return {"class_name": "InputLayer", "config": told, "name": name, "inbound_nodes": []}

    nodes = [[["e", 0, 0, {}], ["f", 0, 0, {}]]]
    most = {"class_name": "Maximum", "config": {"name": "m"}, "name": "m", "inbound_nodes": nodes}
    body = {"name": "net", "layers": [start("x_e"), start("x_f"), table("e", True),
                                      table("f", False), most],
            "input_layers": [["x_e", 0, 0], ["x_f", 0, 0]],
            "output_layers": [["m", 0, 0]]}  # fmt: skip
    given = {"class_name": "Functional", "config": body, "keras_version": "2.21.0"}
    rng = np.random.default_rng(0)
    tables = {name: rng.normal(size=(4, 3)).astype(np.float32) for name in ("e", "f")}
    with h5py.File(tmp_path / "net.h5", "w") as file:
        file.attrs["keras_version"], file.attrs["model_config"] = "2.21.0", json.dumps(given)
        weights = file.create_group("model_weights")
        weights.attrs["layer_names"] = [entry["name"] for entry in body["layers"]]
        for entry in body["layers"]:
            names = [f"{entry['name']}/embeddings:0"] if entry["name"] in tables else []
            weights.create_group(entry["name"]).attrs["weight_names"] = names
        for name, rows in tables.items():
            weights[name][f"{name}/embeddings:0"] = rows
    xs = [rng.integers(0, 4, size=(2, 5)) for _ in tables]
    wanted = np.maximum(*(rows[x] for rows, x in zip(tables.values(), xs, strict=True)))
    np.testing.assert_array_equal(converters.load(tmp_path / "net.h5")(xs), wanted)


def test_where_the_function_of_keras_2_can_go(tmp_path):
    """Its hard_sigmoid after a layer is said by every framework; in a gate by none but ONNX."""
    for name in ("dense_hard_sigmoid", "function_hard_sigmoid"):
        model = converters.load(put(tmp_path, "2.21", name, ".keras"))
        told = np.load(io.BytesIO(members("2.21")[f"{name}.npz"]))
        real = converters.to_keras(*model)
        np.testing.assert_allclose(np.asarray(real(told["x"])), told["y"], atol=1e-6)
        assert_predicts(converters.from_torch(converters.to_torch(*model), (7,)), "2.21", name)
    gate = converters.load(put(tmp_path, "2.21", "hard_LSTM", ".keras"))
    for there in (converters.to_keras, converters.to_torch):
        with pytest.raises(converters.ConversionError, match="recurrent_activation='keras2_hard"):
            there(*gate)
    frames = converters.load(put(tmp_path, "2.21", "frames", ".keras"))
    with pytest.raises(converters.ConversionError, match="recurrent_activation='keras2_hard"):
        converters.save(tmp_path / "x.h5", *frames)
    converters.to_onnx(*gate, tmp_path / "gate.onnx")
    assert_predicts(converters.from_onnx(tmp_path / "gate.onnx"), "2.21", "hard_LSTM")


@pytest.mark.parametrize("name", ["images", "trained"])
def test_what_it_trained_with_goes_into_files_of_keras_3(name, tmp_path):
    import keras

    model = converters.load(put(tmp_path, "2.13", name, ".h5"), sidecar=True)
    converters.save(tmp_path / "new.keras", *model)
    real = keras.saving.load_model(tmp_path / "new.keras")
    assert_predicts(lambda x: real(x, training=False), "2.13", name)
    if name == "trained":
        assert isinstance(real.layers[0].kernel_regularizer, keras.regularizers.L2)
        assert not real.layers[0].trainable


def test_a_product_of_tensors_whose_shapes_no_file_says(tmp_path):
    """Keras 2 writes none for a tensor between layers."""
    import keras

    start = keras.Input((4,))
    one, other = (keras.layers.Dense(3)(start) for _ in range(2))
    keras.Model(start, keras.layers.Dot(1)([one, other])).save(tmp_path / "net.keras")
    with zipfile.ZipFile(tmp_path / "net.keras") as old:
        held = {name: old.read(name) for name in old.namelist()}
    config = json.loads(held["config.json"])
    for entry in config["config"]["layers"]:
        for tensor in entry["inbound_nodes"][0]["args"][0] if entry["name"] == "dot" else ():
            del tensor["config"]["shape"]
    held["config.json"] = json.dumps(config).encode()
    with zipfile.ZipFile(tmp_path / "net.keras", "w") as new:
        for name, data in held.items():
            new.writestr(name, data)
    with pytest.raises(converters.ConversionError, match=r"dot .*does not say the shapes"):
        converters.load(tmp_path / "net.keras")
