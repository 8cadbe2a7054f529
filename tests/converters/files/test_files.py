"""Files: round trips, real frameworks, broken and hostile input, atomic saves."""

import contextlib
import json
import os
import pickle
import struct
import zipfile

import cases
import flax.linen as nn
import flax.serialization
import h5py
import jax
import keras
import ml_dtypes
import numpy as np
import pytest
import torch
from file_cases import DENSE, h5, image_net, kernel, pt, random_model, tensor_pickle, write_keras
from hypothesis import given
from hypothesis import strategies as st

import fwt
from fwt import converters
from fwt import layers as fl


@pytest.fixture
def model():
    return random_model(image_net())


X = np.random.default_rng(3).normal(size=(3, 7, 5, 3)).astype(np.float32)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("suffix", [".keras", ".safetensors"])
def test_round_trip_is_bit_for_bit(model, tmp_path, suffix):
    path = tmp_path / f"net{suffix}"
    converters.save(path, *model)
    module, variables = converters.load(path)
    assert module == model.module
    assert hash(module) == hash(model.module)
    same(variables, model.variables)
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(variables))
    again = converters.load(path)
    traces = []
    f = jax.jit(lambda m, x: (traces.append(m), m(x))[1])
    f(again, X)
    f(fwt.Model(module, variables), X)
    assert len(traces) == 1  # two loads of one file share the compiled function


def test_real_keras_opens_what_we_write(model, tmp_path):
    converters.save(tmp_path / "net.keras", *model)
    live = keras.models.load_model(tmp_path / "net.keras")
    np.testing.assert_allclose(np.asarray(live(X)), model(X), atol=1e-5)
    live.save(tmp_path / "theirs.keras")
    module, variables = converters.load(tmp_path / "theirs.keras")
    assert module == model.module
    same(variables, model.variables)


@pytest.mark.parametrize("name", cases.KERAS)
def test_we_open_what_real_keras_writes(name, tmp_path):
    _, build = cases.KERAS[name]
    live = build()
    live.save(tmp_path / "net.keras")
    loaded, direct = converters.load(tmp_path / "net.keras"), converters.from_keras(live)
    assert loaded.module == direct.module
    same(loaded.variables, direct.variables)
    converters.save(tmp_path / "ours.keras", *loaded)
    theirs = keras.models.load_model(tmp_path / "ours.keras")
    for a, b in zip(theirs.get_weights(), live.get_weights(), strict=True):
        assert np.array_equal(a, b) or a.dtype == np.uint32


def test_real_torch_opens_what_we_write(model, tmp_path):
    converters.save(tmp_path / "net.pt", *model)
    state = torch.load(tmp_path / "net.pt", weights_only=True)
    live = converters.to_torch(*model)
    assert list(state) == list(live.state_dict())
    live.load_state_dict(state)
    x = torch.from_numpy(X.transpose(0, 3, 1, 2).copy())
    np.testing.assert_allclose(live(x).detach().numpy(), model(X), atol=1e-5)


STATE = {
    "0.weight": torch.randn(4, 3, 2),
    "0.bias": torch.randn(4).to(torch.bfloat16),
    "1.running_mean": torch.randn(4),
    "1.num_batches_tracked": torch.tensor(7),
    "half": torch.randn(2, 2).half(),
    "double": torch.randn(2, 2).double(),
    "int8": torch.tensor([-1, 2], dtype=torch.int8),
    "bool": torch.tensor([True, False]),
    "empty": torch.zeros(0, 3),
    "nan": torch.tensor([float("nan"), -0.0, float("inf")]),
    "complex": torch.randn(2, dtype=torch.complex64),
}


def test_we_open_what_real_torch_writes(tmp_path):
    state = dict(STATE)
    state["view"] = torch.arange(24.0).reshape(4, 6)[1:3, ::2].t()
    state["same.a"] = state["same.b"] = torch.randn(3)
    state["parameter"] = torch.nn.Parameter(torch.randn(2))
    torch.save(state, tmp_path / "state.pt")
    module, variables = converters.load(tmp_path / "state.pt")
    assert module is None
    assert variables["batch_stats"]["1"]["num_batches_tracked"] == 7
    params = variables["params"]
    for name, tensor in state.items():
        parts = name.split(".")
        tree = variables["batch_stats"] if parts[-1].startswith(("running", "num")) else params
        for part in parts:
            tree = tree[part]
        if tensor.dtype == torch.bfloat16:
            assert tree.dtype == ml_dtypes.bfloat16
            assert np.array_equal(tree.view(np.int16), tensor.view(torch.int16).numpy())
        else:
            assert np.array_equal(tree, tensor.detach().numpy(), equal_nan=tree.dtype.kind == "f")
            assert tree.dtype == tensor.detach().numpy().dtype
    # And back: real torch reads the same values from our file.
    converters.save(tmp_path / "again.pt", None, variables)
    again = torch.load(tmp_path / "again.pt", weights_only=True)
    assert set(again) == set(state)
    for name, tensor in state.items():
        assert again[name].dtype == tensor.dtype
        assert torch.equal(again[name].nan_to_num(5), tensor.detach().nan_to_num(5)), name


def test_weights_can_be_pruned_without_an_architecture(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    torch.save(net.state_dict(), tmp_path / "in.pt")
    module, variables = converters.load(tmp_path / "in.pt")
    new = fwt.prune(0.5)(variables)
    converters.save(tmp_path / "out.pt", module, new)
    net.load_state_dict(torch.load(tmp_path / "out.pt", weights_only=True))
    assert (net[0].weight == 0).sum() == 12
    assert (net[1].weight == 1).all()


def test_safetensors_of_others_are_weights_only(tmp_path):
    from safetensors.torch import save_file

    save_file({"a.weight": torch.randn(3, 2), "a.bias": torch.zeros(3)}, tmp_path / "x.safetensors")
    module, variables = converters.load(tmp_path / "x.safetensors")
    assert module is None
    assert fwt.paths(variables) == ["a/bias", "a/weight"]


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16", "int8", "int64", "bool"])
def test_safetensors_keep_every_dtype(tmp_path, dtype):
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    tree = {"params": {"a/b": {"x": np.arange(6).reshape(2, 3).astype(dtype)}, "e": np.zeros(0)}}
    converters.save(tmp_path / "x.safetensors", None, tree)
    same(converters.load(tmp_path / "x.safetensors").variables, tree)


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil-was-here",)


def hostile(folder):
    """Name, file name and bytes of each attack."""
    outside = folder / "outside.h5"
    with h5py.File(outside, "w") as file:
        file["secret"] = np.ones((3, 2), np.float32)
    (folder / "raw").write_bytes(b"\0" * 24)

    def external(file):
        file.create_group("layers/dense/vars")["0"] = h5py.ExternalLink(str(outside), "secret")

    def soft(file):
        file["x"] = np.ones((3, 2), np.float32)
        file.create_group("layers/dense/vars")["0"] = h5py.SoftLink("/x")

    def raw(file):
        file.create_group("layers/dense/vars").create_dataset(
            "0", (3, 2), "f4", external=[(str(folder / "raw"), 0, 24)]
        )

    def virtual(file):
        layout = h5py.VirtualLayout((3, 2), "f4")
        layout[:] = h5py.VirtualSource(str(outside), "secret", shape=(3, 2))
        file.create_group("layers/dense/vars").create_virtual_dataset("0", layout)

    good = {"data": np.ones((3, 2), np.float32)}
    yield "empty keras", "x.keras", b""
    yield "no zip", "x.keras", b"hello" * 100
    for name, config, weights in (
        ("no config", None, kernel(**good)),
        ("no weights", DENSE, None),
        ("config is no json", "{", kernel(**good)),
        ("config is a list", [], kernel(**good)),
        ("config is deep", "[" * 100_000, kernel(**good)),
        ("layers are numbers", {"class_name": "Sequential", "config": {"layers": [1]}}, b""),
        ("weights are no h5", DENSE, b"\x89HDF\r\n" * 9),
        ("wrong count", DENSE, h5(lambda f: f.create_group("layers"))),
        ("external link", DENSE, h5(external)),
        ("soft link", DENSE, h5(soft)),
        ("external storage", DENSE, h5(raw)),
        ("virtual dataset", DENSE, h5(virtual)),
        ("shape bomb", DENSE, kernel(shape=(1 << 40, 1 << 10), dtype="f4", chunks=(1, 1))),
        ("text instead of numbers", DENSE, kernel(data="text")),
    ):
        write_keras(folder / "made.keras", config, weights)
        yield name, "x.keras", (folder / "made.keras").read_bytes()
    lie = bytearray((folder / "made.keras").read_bytes())
    at = lie.rfind(b"PK\x01\x02")  # the last member's size in the central directory
    lie[at + 24 : at + 28] = struct.pack("<I", 0xF0000000)
    yield "zip size lie", "x.keras", bytes(lie)
    yield "evil pickle", "x.pt", pt(pickle.dumps({"w": Evil()}, 2))
    yield "evil pickle, protocol 4", "x.pt", pt(pickle.dumps(Evil(), 4))
    yield "legacy torch", "x.pt", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
    yield "no dict", "x.pt", pt(pickle.dumps([1, 2], 2))
    yield "no tensor", "x.pt", pt(pickle.dumps({"a": 1}, 2))
    yield "memo bomb", "x.pt", pt(b"\x80\x02}r\xff\xff\xff\x7f.")
    yield "storage too short", "x.pt", pt(tensor_pickle(6, (2, 3), (3, 1)), [b"\0" * 20])
    yield "stride outside", "x.pt", pt(tensor_pickle(6, (2, 3), (30, 1)), [b"\0" * 24])
    yield "offset outside", "x.pt", pt(tensor_pickle(6, (2, 3), (3, 1), 2), [b"\0" * 24])
    yield "negative stride", "x.pt", pt(tensor_pickle(6, (2, 3), (-3, 1)), [b"\0" * 24])
    yield "stride zero bomb", "x.pt", pt(tensor_pickle(1, (1 << 30, 1 << 10), (0, 0)), [b"\0" * 4])
    yield "no storage", "x.pt", pt(tensor_pickle(6, (2, 3), (3, 1)))
    yield "header bomb", "x.safetensors", struct.pack("<Q", 1 << 60) + b"{}"
    header = json.dumps({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}).encode()
    yield "offsets lie", "x.safetensors", struct.pack("<Q", len(header)) + header + b"\0" * 4
    told = {"__metadata__": {"fwt": "{}"}}
    header = json.dumps(told).encode()
    yield "metadata lie", "x.safetensors", struct.pack("<Q", len(header)) + header


def test_hostile_files_are_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "made").mkdir()
    count = 0
    for name, file, data in hostile(tmp_path / "made"):
        (tmp_path / file).write_bytes(data)
        with pytest.raises((converters.FileFormatError, converters.ConversionError)) as caught:
            converters.load(tmp_path / file)
        assert len(str(caught.value)) < 600, name
        count += 1
    assert count == 32
    assert not list(tmp_path.glob("**/evil*"))


@given(st.data())
def test_damaged_files_raise_our_error_or_load(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged")
    suffix = data.draw(st.sampled_from([".keras", ".safetensors", ".pt"]))
    path = folder / f"net{suffix}"
    converters.save(path, *SMALL)
    raw = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        raw = raw[: data.draw(st.integers(0, len(raw) - 1))]
    else:
        for _ in range(data.draw(st.integers(1, 8))):
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    with contextlib.suppress(converters.FileFormatError, converters.ConversionError):
        converters.load(path)


SMALL = random_model(fwt.Sequential([("a", nn.Dense(2)), ("b", fl.ReLU())], input_shape=(3,)))


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("none.keras", "no such file"),
        ("none", "no such file"),
        (".", "a folder of no known format; known are .keras"),
    ],
)
def test_loading_what_is_not_there(tmp_path, path, said):
    with pytest.raises(converters.FileFormatError, match=said):
        converters.load(tmp_path / path)


def test_a_refused_save_leaves_the_old_file(model, tmp_path):
    path = tmp_path / "net.keras"
    converters.save(path, *SMALL)
    before = path.read_bytes()
    odd = fwt.Sequential([("a", nn.LayerNorm())], input_shape=(3,))
    with pytest.raises(converters.ConversionError, match="LayerNorm"):
        converters.save(path, odd, {"params": {}})
    broken = {"params": {**SMALL.variables["params"], "c": {"kernel": np.ones(3)}}}
    with pytest.raises(converters.ConversionError, match="params/c"):
        converters.save(path, SMALL.module, broken)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["net.keras"]
    (tmp_path / "folder.keras").mkdir()
    with pytest.raises(converters.FileFormatError, match="directory"):
        converters.save(tmp_path / "folder.keras", *SMALL)
    with pytest.raises(converters.FileFormatError, match="can't write"):
        converters.save(tmp_path / "missing" / "net.keras", *SMALL)
    with pytest.raises(converters.ConversionError, match="architecture"):
        converters.save(path, None, SMALL.variables)


def test_a_write_that_fails_midway_leaves_the_old_file(tmp_path, monkeypatch):
    from fwt.converters import io as _io

    path = tmp_path / "net.pt"
    converters.save(path, *SMALL)
    before = path.read_bytes()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    for step in ("fsync", "replace"):  # nothing is written to the file itself before the rename
        with monkeypatch.context() as patch:
            patch.setattr(_io.os, step, full)
            with pytest.raises(converters.FileFormatError, match="No space left"):
                converters.save(path, None, {"params": {"w": np.ones(3)}})
        assert path.read_bytes() == before
        assert os.listdir(tmp_path) == ["net.pt"]


def test_a_file_that_does_not_fit_its_architecture_is_refused(tmp_path):
    from safetensors.numpy import load_file, save_file

    path = tmp_path / "net.safetensors"
    converters.save(path, *SMALL)
    tensors = load_file(path)
    with open(path, "rb") as file:
        size = struct.unpack("<Q", file.read(8))[0]
        metadata = json.loads(file.read(size))["__metadata__"]
    save_file({**tensors, "params/zz/kernel": np.ones(2)}, path, metadata)
    with pytest.raises(converters.FileFormatError, match="zz"):
        converters.load(path)


def test_weights_of_others_keep_their_names(tmp_path):
    from safetensors.numpy import load_file, save_file

    names = {"model.layers.0.weight": np.ones((2, 2), np.float32), "bn.running_mean": np.ones(2)}
    save_file(names, tmp_path / "in.safetensors")
    model = converters.load(tmp_path / "in.safetensors")
    converters.save(tmp_path / "out.safetensors", *fwt.prune(0.5)(model))
    assert set(load_file(tmp_path / "out.safetensors")) == set(names)
    converters.save(tmp_path / "out.pt", *model)
    assert set(torch.load(tmp_path / "out.pt", weights_only=True)) == set(names)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".msgpack", ".orbax", ".pt"])
def test_statistics_alone_stay_statistics(tmp_path, suffix):
    names = ("running_mean", "running_var") if suffix == ".pt" else ("mean", "var")
    tree = {"batch_stats": {"n": {name: np.arange(3, dtype=np.float32) for name in names}}}
    path = tmp_path / f"s{suffix}"
    converters.save(path, None, tree)
    back = converters.load(path)
    same(back.variables, {"params": {}, **tree})
    assert fwt.paths(tree) == []
    assert [line.path for line in fwt.summary(tree).lines] == [f"batch_stats/n/{n}" for n in names]
    with pytest.raises(fwt.WhereError):
        fwt.initialize(fwt.initializers.ones, 0, "**")(tree)


def test_statistics_alone_of_others(tmp_path):
    one = np.ones(3, np.float32)
    np.savez(tmp_path / "a.npz", **{"batch_stats/n/mean": one})
    (tmp_path / "a.msgpack").write_bytes(
        flax.serialization.to_bytes({"batch_stats": {"n": {"mean": one}}})
    )
    for name in ("a.npz", "a.msgpack"):
        same(converters.load(tmp_path / name).variables,
             {"params": {}, "batch_stats": {"n": {"mean": one}}})  # fmt: skip
    net = fwt.Sequential([("n", nn.BatchNorm(True, use_scale=False, use_bias=False))])
    stats = {"batch_stats": {"n": {"mean": one, "var": one}}}
    x = np.array([[1.0, 2.0, 3.0]], np.float32)
    expected = net.apply(stats, x)
    np.testing.assert_allclose(converters.to_nnx(net, stats)(x), expected, atol=1e-6)
    made = converters.to_torch(net, stats, (3,))
    np.testing.assert_allclose(made(torch.from_numpy(x)).detach(), expected, atol=1e-6)
    converters.save(tmp_path / "n.safetensors", net, stats)
    same(converters.load(tmp_path / "n.safetensors").variables, {"params": {}, **stats})


def test_nothing_is_lost_on_the_way_to_a_file(tmp_path):
    one, two = np.ones(2, np.float32), np.zeros(2, np.float32)
    for tree in (
        {"params": {"a.b": one, "a": {"b": two}}},
        {"params": {"n": {"x": one}}, "batch_stats": {"n": {"x": two}}},
    ):
        with pytest.raises(converters.ConversionError, match="two arrays would be named"):
            converters.save(tmp_path / "x.pt", None, tree)
        converters.save(tmp_path / "x.safetensors", None, tree)
        same(converters.load(tmp_path / "x.safetensors").variables, tree)
    for suffix in (".pt", ".safetensors"):
        for leaf in (3.0, "text"):
            with pytest.raises(converters.ConversionError, match="no array"):
                converters.save(tmp_path / f"y{suffix}", None, {"params": {"s": leaf}})
        scalar = {"params": {"s": np.float32(3).reshape(()), "m": np.ones((), bool)}}
        converters.save(tmp_path / f"z{suffix}", None, scalar)
        same(converters.load(tmp_path / f"z{suffix}").variables, scalar)
    odd = {"params": {"a": np.ones(2, ml_dtypes.int4)}}
    with pytest.raises(converters.ConversionError, match="int4"):
        converters.save(tmp_path / "odd.safetensors", None, odd)


def test_a_small_file_can_not_ask_for_much_memory(tmp_path):
    storage = zipfile.ZipInfo("a/data/0")
    storage.compress_type = zipfile.ZIP_DEFLATED
    one = tensor_pickle(2_000_000, (2_000_000,), (1,))[3:-2]  # from the name to the REDUCE
    state = b"\x80\x02}" + (one + b"s") * 60 + b"."
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("a/data.pkl", state)
        archive.writestr(storage, b"\0" * 8_000_000)
    with pytest.raises(converters.FileFormatError, match="more than such a file may hold"):
        converters.load(tmp_path / "x.pt")
    bomb = kernel(shape=(200_000, 200), dtype="f4", chunks=(100, 200), compression="gzip")
    write_keras(tmp_path / "x.keras", DENSE, bomb)
    with pytest.raises(converters.FileFormatError, match="no compression does that"):
        converters.load(tmp_path / "x.keras")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name_are_refused(tmp_path):
    write_keras(tmp_path / "x.keras", DENSE, kernel(data=np.ones((3, 2), np.float32)))
    assert converters.load(tmp_path / "x.keras").module is not None
    with zipfile.ZipFile(tmp_path / "x.keras", "a") as archive:
        archive.writestr("config.json", json.dumps(DENSE))
    with pytest.raises(converters.FileFormatError, match="two members"):
        converters.load(tmp_path / "x.keras")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"units": 5}, "expected 5"),
        ({"units": -1}, "units=-1"),
        ({"units": "x"}, "units='x'"),
        ({"units": 2.0}, "units=2.0"),
        ({"use_bias": "no"}, "holds 1 arrays"),
        ({"lora_rank": 3}, "lora_rank=3"),
        ({"brand_new": None}, "brand_new=None"),
        ({"activation": "mystery"}, "mystery"),
    ],
)
def test_a_config_that_contradicts_its_weights_is_refused(tmp_path, changes, said):
    config = json.loads(json.dumps(DENSE))
    config["config"]["layers"][0]["config"] |= changes
    write_keras(tmp_path / "x.keras", config, kernel(data=np.ones((3, 2), np.float32)))
    with pytest.raises((converters.ConversionError, converters.FileFormatError)) as caught:
        converters.load(tmp_path / "x.keras")
    assert said in str(caught.value)


def test_links_and_permissions_survive_a_save(tmp_path):
    real, link = tmp_path / "real.pt", tmp_path / "link.pt"
    converters.save(real, *SMALL)
    real.chmod(0o600)
    link.symlink_to(real)
    converters.save(link, *SMALL)
    assert link.is_symlink()
    assert real.stat().st_mode & 0o777 == 0o600


def test_odd_paths_and_layouts_are_our_errors(tmp_path):
    with pytest.raises(converters.FileFormatError, match="can't read"):
        converters.load(tmp_path / ("x" * 300 + ".pt"))
    for name in ("x" * 300 + ".pt", "a\0.pt"):
        with pytest.raises(converters.FileFormatError, match="can't write"):
            converters.save(tmp_path / name, *SMALL)
    for suffix in (".keras", ".safetensors"):
        with pytest.raises(converters.ConversionError, match="layout"):
            converters.save(tmp_path / f"x{suffix}", *SMALL, layout="source")
    with pytest.raises(converters.ConversionError, match="layout must be"):
        converters.save(tmp_path / "x.pt", *SMALL, layout="junk")


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        ("Activation", {"activation": "relu", "brand_new": 1}, "brand_new=1"),
        (
            "Activation",
            {"activation": {"class_name": "function", "config": "relu", "registered_name": "my>r"}},
            "has no row",
        ),
        ("ReLU", {"brand_new": 1}, "brand_new=1"),
    ],
)
def test_activation_layers_take_every_setting(tmp_path, kind, settings, said):
    config = {
        "class_name": "Sequential",
        "config": {
            "layers": [{"class_name": kind, "config": {"name": "a", **settings}}],
            "build_input_shape": [None, 3],
        },
    }
    write_keras(tmp_path / "x.keras", config, h5(lambda file: file.create_group("layers")))
    with pytest.raises(converters.ConversionError) as caught:
        converters.load(tmp_path / "x.keras")
    assert said in str(caught.value)


def _in_a_script(base):
    """A class of a Keras name, as a script or a notebook defines it."""
    return type(base.__name__, (base,), {"__module__": "__main__"})


@pytest.mark.parametrize("place", ["layer", "wrapped", "cell", "activation", "inside", "model"])
def test_a_class_of_a_script_is_none_of_keras_s_own(tmp_path, place):
    dense, cell, sequential = map(
        _in_a_script, (keras.layers.Dense, keras.layers.LSTMCell, keras.Sequential)
    )
    x = keras.Input((5, 4))
    model = {
        "layer": lambda: keras.Sequential([x, dense(3)]),
        "wrapped": lambda: keras.Sequential([x, keras.layers.TimeDistributed(dense(3))]),
        "cell": lambda: keras.Sequential([x, keras.layers.RNN(cell(3))]),
        "activation": lambda: keras.Sequential(
            [x, keras.layers.Dense(3, _in_a_script(keras.layers.Activation)("relu"))]
        ),
        "inside": lambda: keras.Sequential([x, sequential([keras.layers.Dense(3)])]),
        "model": lambda: sequential([x, keras.layers.Dense(3)]),
    }[place]()
    path = tmp_path / "m.keras"
    model.save(path)
    with pytest.raises(TypeError, match="custom classes"):
        keras.saving.load_model(path)
    with pytest.raises(fwt.FwtError, match=r"is a custom layer .*converters\.transform"):
        converters.load(path)
