"""Weights in the files of other libraries, against these libraries."""

import importlib.util
import json
import pickle

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf
import torch
import torch.distributed.checkpoint as dcp
from command import fwt_command
from torch import nn

import fwt
from fwt import converters

# -- TensorFlow -------------------------------------------------------------------------------


class Block(tf.Module):
    def __init__(self):
        super().__init__()
        self.kernel = tf.Variable(tf.random.normal((4, 3), seed=1), name="k")
        self.half = tf.Variable(tf.cast(tf.random.normal((3,), seed=2), tf.bfloat16))

    @tf.function(input_signature=[tf.TensorSpec((None, 4))])
    def __call__(self, x):
        return x @ self.kernel


def test_a_checkpoint_of_tensorflow(tmp_path):
    block = Block()
    made = tf.train.Checkpoint(net=block, names=tf.Variable(["a", "b"]))
    place = made.save(str(tmp_path / "ck" / "ckpt"))
    tf.saved_model.save(block, str(tmp_path / "saved"))
    reader = tf.train.load_checkpoint(place)
    for path in (place, f"{place}.index", f"{place}.data-00000-of-00001", tmp_path / "ck"):
        module, variables = converters.load(path)
        assert module is None
        assert fwt.paths(variables) == ["net/half", "net/kernel", "save_counter"]
        for name in ("net/kernel", "net/half"):
            found = fwt.select(variables, name)[name]
            own = reader.get_tensor(f"{name}/.ATTRIBUTES/VARIABLE_VALUE")
            assert found.dtype == own.dtype
            np.testing.assert_array_equal(found, own)
    found = converters.load(tmp_path / "saved").variables["params"]
    np.testing.assert_array_equal(found["kernel"], block.kernel.numpy())
    assert fwt.paths(converters.load(place, key="net")) == ["half", "kernel"]
    assert fwt.paths(converters.load(place, drop=["save_counter"])) == ["net/half", "net/kernel"]
    line = ("prune", tmp_path / "saved", tmp_path / "out.npz", "--sparsity", "0.5")
    assert fwt_command(*line)[0] == 0
    kernel = np.load(tmp_path / "out.npz")["params/kernel"]
    assert np.count_nonzero(kernel) == 6
    assert fwt_command("inspect", f"{place}.index")[0] == 0


def test_slots_beside_what_they_are_of(tmp_path):
    values = {"dense/kernel": np.ones((2, 3), np.float32), "dense/kernel/Adam": np.zeros((2, 3))}
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        held = [tf.compat.v1.get_variable(n, initializer=v) for n, v in values.items()]
        session.run(tf.compat.v1.global_variables_initializer())
        place = tf.compat.v1.train.Saver(held).save(session, str(tmp_path / "old"))
    found = converters.load(place).variables["params"]
    assert {k: v.shape for k, v in found["dense"].items()} == {
        "kernel": (2, 3), "kernel/Adam": (2, 3)
    }  # fmt: skip


def test_without_tensorflow_the_error_says_what_to_install(tmp_path, monkeypatch):
    place = tf.train.Checkpoint(net=Block()).save(str(tmp_path / "ckpt"))
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tensorflow" else there(name)
    )
    said = "a checkpoint of TensorFlow, which .*; or pip install tensorflow"
    with pytest.raises(fwt.FileFormatError, match=said):
        converters.load(place)


# -- PyTorch's distributed checkpoints --------------------------------------------------------


def test_a_distributed_checkpoint(tmp_path):
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).bfloat16()
    dcp.save({"model": net.state_dict(), "epoch": 3}, checkpoint_id=tmp_path / "a")
    dcp.save(net.state_dict(), checkpoint_id=tmp_path / "b")
    with pytest.warns(UserWarning, match="left out, since they are no tensors: epoch"):
        whole = converters.load(tmp_path / "a")
    assert "model/0/weight" in fwt.paths(whole)
    with pytest.warns(UserWarning, match="left out"):
        part = converters.load(tmp_path / "a", key="model")
    torch.save(net.state_dict(), tmp_path / "net.pt")
    for found in (part, converters.load(tmp_path / "b")):
        assert fwt.diff(found, converters.load(tmp_path / "net.pt")).equal
    filled = converters.load(tmp_path / "b", architecture=converters.from_torch(net, (4,)))
    assert filled.module is not None
    # One parameter of which two processes wrote a half each.
    held = {"w": torch.arange(12.0).reshape(4, 3)}
    dcp.save(held, checkpoint_id=tmp_path / "c")
    reader = dcp.FileSystemReader(tmp_path / "c")
    told = reader.read_metadata()
    ((index, place),) = told.storage_data.items()
    kind = told.state_dict_metadata["w"]
    rows = [torch.arange(0.0, 6).reshape(2, 3), torch.arange(6.0, 12).reshape(2, 3)]
    told.storage_data.clear()
    kind.chunks.clear()
    for i, part in enumerate(rows):
        torch.save(part, tmp_path / "c" / f"__{i}_0.distcp")
        size = (tmp_path / "c" / f"__{i}_0.distcp").stat().st_size
        at = torch.Size((2 * i, 0))
        kind.chunks.append(dcp.metadata.ChunkStorageMetadata(at, part.shape))
        told.storage_data[type(index)("w", at, i)] = type(place)(f"__{i}_0.distcp", 0, size)
    (tmp_path / "c" / ".metadata").write_bytes(pickle.dumps(told))
    own = {"w": torch.zeros(4, 3)}
    dcp.load(own, checkpoint_id=tmp_path / "c")
    found = converters.load(tmp_path / "c").variables["params"]["w"]
    np.testing.assert_array_equal(found, own["w"].numpy())
    (tmp_path / "c" / "__1_0.distcp").unlink()
    with pytest.raises(fwt.FileFormatError, match=r"__1_0\.distcp is missing"):
        converters.load(tmp_path / "c")


class Evil:
    def __reduce__(self):
        return (open, ("made", "w"))


def test_metadata_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dcp.save({"w": torch.ones(2)}, checkpoint_id=tmp_path / "a")
    (tmp_path / "a" / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(fwt.FileFormatError):
        converters.load(tmp_path / "a")
    assert not (tmp_path / "made").exists()


# -- Equinox ----------------------------------------------------------------------------------


def module(seed, dtype=None):
    net = eqx.nn.MLP(4, 3, 5, 2, key=jax.random.key(seed))
    cast = lambda x: x.astype(dtype) if eqx.is_array(x) and dtype else x  # noqa: E731 - one place
    return (
        jax.tree.map(cast, net),
        {"steps": 3, "scale": np.float32(2), "rate": np.ones(2, np.float32)},
    )


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize("settings", [False, True])
def test_leaves_of_equinox(tmp_path, dtype, settings):
    tree = module(0, dtype)
    with open(tmp_path / "m.eqx", "wb") as file:
        if settings:
            file.write((json.dumps({"width": 5}) + "\n").encode())
        eqx.tree_serialise_leaves(file, tree)
    like = module(1, dtype)
    with open(tmp_path / "m.eqx", "rb") as file:
        if settings:
            file.readline()
        own = eqx.tree_deserialise_leaves(file, like)
    for architecture in (like, eqx.filter_eval_shape(module, 1, dtype)):
        found = converters.load(tmp_path / "m.eqx", architecture=architecture)
        assert fwt.paths(found) == fwt.paths(own)
        for path, value in fwt.select(own, "**").items():
            np.testing.assert_array_equal(fwt.select(found, "**")[path], value)
            assert fwt.select(found, "**")[path].dtype == value.dtype
    converters.save(tmp_path / "m.safetensors", *found)
    for wrong, said in (
        (None, "architecture= is the tree"),
        (module(0, jnp.float16), "leaf 0: expected float16"),
        (tree[0].layers[0], "more leaves"),
        ((tree, tree), "not a readable"),
    ):
        with pytest.raises(fwt.FileFormatError, match=said):
            converters.load(tmp_path / "m.eqx", architecture=wrong)
