"""What a file says beside its arrays: the order of names, which are one array, metadata."""

import json
import os
import zipfile
from collections import OrderedDict

import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from flax import nnx, serialization
from safetensors import safe_open

import fwt
from fwt import converters
from fwt.converters.files import source
from fwt.converters.frameworks import live

BOTH = ["emb.weight", "head.weight"]
EITHER = {"where": ["emb/weight", "head/weight"]}


class Net(torch.nn.Module):
    """Names out of order, statistics among them, and a head that is the embedding."""

    def __init__(self):
        super().__init__()
        linear = torch.nn.Linear
        self.stem, self.norm, self.body = linear(4, 4), torch.nn.BatchNorm1d(4), linear(4, 4)
        self.emb, self.head = torch.nn.Embedding(6, 4), linear(4, 6, bias=False)
        self.head.weight = self.emb.weight


@pytest.fixture
def net(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net = Net()
    torch.save(net.state_dict(), "net.pt")
    return net


def check(net, name):
    """The state dict of a file, which has to be as torch itself wrote it but for its values."""
    state, wanted = torch.load(name, weights_only=True), net.state_dict()
    assert list(state) == list(wanted)
    assert state._metadata == wanted._metadata
    assert state["emb.weight"].data_ptr() == state["head.weight"].data_ptr()
    assert os.path.getsize(name) < os.path.getsize("net.pt") + 400
    Net().load_state_dict(state)
    return state


ONE = {"emb/weight": np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)}
DOES = {
    "prune": fwt.prune(0.5, **EITHER),
    "prune of jax arrays": lambda m: fwt.prune(0.5, **EITHER)(jax.tree.map(jnp.asarray, m)),
    "jit": lambda m: jax.jit(fwt.prune(0.5, **EITHER))(m),
    "draws under jit": lambda m: jax.jit(fwt.initialize(fwt.initializers.normal(), 0, **EITHER))(m),
    "scores under jit": jax.jit(fwt.prune(0.5, fwt.scores.random, key=0, **EITHER)),
    "at under jit": jax.jit(fwt.at("emb/weight", fwt.prune(0.5, where="**"))),
    "assign under jit": jax.jit(lambda m: fwt.assign(ONE)(m)),
    "reset under jit": jax.jit(fwt.reset(0, "torch", where=["emb/weight", "head/weight"])),
    "masks under jit": jax.jit(lambda m: fwt.apply_masks(fwt.masks(0.5, **EITHER)(m))(m)),
    "the variables": lambda m: fwt.Model(None, fwt.prune(0.5, **EITHER)(m.variables)),
    "initialize": fwt.initialize(fwt.initializers.normal(), 0, **EITHER),
    "masks": lambda m: fwt.apply_masks(fwt.masks(0.5, **EITHER)(m))(m),
    "at": fwt.at("emb/weight", fwt.prune(0.5, where="**")),
    "tree.map": lambda m: jax.tree.map(lambda x: x * 2, m),
    "Flax and back": lambda m: fwt.Model(
        None, serialization.from_bytes(m.variables, serialization.to_bytes(m.variables))
    ),
}


@pytest.mark.parametrize("name", DOES)
def test_order_ties_and_metadata_go_through_every_transform(net, name):
    model = converters.load("net.pt")
    converters.save("out.pt", *DOES[name](model))
    state = check(net, "out.pt")
    if name.startswith("prune"):
        assert int((state["emb.weight"] == 0).sum()) == 12
    if name != "Flax and back":
        assert not torch.equal(state["emb.weight"], net.emb.weight)
    params = fwt.prune(0.0, **EITHER)(model.variables["params"])
    converters.save("params.pt", None, params)
    order = [n for n in net.state_dict() if "running" not in n and "num_batches" not in n]
    assert list(torch.load("params.pt", weights_only=True)) == order


def test_jit_keeps_apart_what_is_no_tie_any_more_and_counts_no_tie_twice(net):
    variables = converters.load("net.pt").variables
    for scope in ("global", "lamp"):
        with pytest.raises(fwt.LeafError, match=r"are one array in the file .* inside jit"):
            jax.jit(fwt.prune(0.5, scope=scope, **EITHER))(variables)
    grads = jax.tree.map(np.ones_like, variables["params"])
    taylor = fwt.scores.taylor(grads=grads)
    for one, same in zip(jax.tree.leaves(taylor(variables["params"])),
                         jax.tree.leaves(jax.jit(taylor)(variables["params"]))):  # fmt: skip
        np.testing.assert_allclose(one, same, rtol=1e-6)
    both = {p: np.full_like(fwt.select(variables, p)[p], i) for i, p in enumerate(EITHER["where"])}
    for call in (fwt.assign(both), jax.jit(fwt.assign(both))):
        with pytest.raises(fwt.LeafError, match="one array"):
            call(variables)
    other = jax.tree.map(np.array, variables)
    other["params"]["head"]["weight"][0, 0] += 1
    t = fwt.prune(0.5, **EITHER)
    for one, same in zip(jax.tree.leaves(t(other)), jax.tree.leaves(jax.jit(t)(other))):
        np.testing.assert_array_equal(one, same)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".orbax", ".pt", "shards"])
def test_order_ties_and_metadata_go_through_every_format_that_has_a_place(net, suffix):
    path, how = (f"x{suffix}", {}) if suffix != "shards" else ("x.safetensors", {"shard_bytes": 99})
    converters.save(path, *converters.load("net.pt"), **how)
    converters.save("out.pt", *fwt.prune(0.5, **EITHER)(converters.load(path)))
    assert int((check(net, "out.pt")["head.weight"] == 0).sum()) == 12


def two(path):
    """A file of two layers whose names are not in alphabetical order."""
    net = torch.nn.Sequential(OrderedDict(z=torch.nn.Linear(4, 4), a=torch.nn.Linear(4, 4)))
    torch.save(net.state_dict(), path)
    return net


@pytest.mark.parametrize(
    ("through", "kept"),
    [
        ([".pt"], True),
        ([".safetensors", ".pt"], True),
        ([".npz", ".pt"], True),
        ([".msgpack"], False),
        ([".msgpack", ".pt"], False),
        (["hf", ".pt"], False),
        ([".msgpack", ".pt", ".safetensors"], False),
    ],
)
def test_match_order_is_the_source_s_order_or_refused(tmp_path, monkeypatch, through, kept):
    monkeypatch.chdir(tmp_path)
    net, path = two("net.pt"), "net.pt"
    for number, suffix in enumerate(through):
        target = f"{number}{suffix}"
        if suffix == "hf":
            target = f"{number}.safetensors"
            safetensors.torch.save_file(net.state_dict(), target)
        else:
            converters.save(target, *fwt.prune(0.0)(converters.load(path)))
        path = target
    plain = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model = converters.from_torch(plain, input_shape=(4,))
    if not kept:
        with pytest.raises(converters.FileFormatError, match=r"match='order'.*whole numbers"):
            converters.load(path, architecture=model, match="order")
        return
    found = converters.load(path, architecture=model, match="order")
    x = np.ones((2, 4), np.float32)
    np.testing.assert_allclose(found(x), net(torch.from_numpy(x)).detach(), rtol=1e-5, atol=1e-6)


def test_a_list_of_arrays_with_statistics_in_it(tmp_path):
    net = keras.Sequential(
        [keras.Input((5,)), keras.layers.Dense(4), keras.layers.BatchNormalization()]
    )
    arrays = [np.random.default_rng(i).random(w.shape, "f4") for i, w in enumerate(net.weights)]
    net.set_weights(arrays)
    np.savez(tmp_path / "w.npz", *arrays)
    found = converters.load(tmp_path / "w.npz", architecture=net, match="order")
    x = np.ones((2, 5), np.float32)
    np.testing.assert_allclose(found(x), net(x, training=False), rtol=1e-5, atol=1e-6)


def test_a_tie_is_pruned_once_and_by_its_stricter_role(net):
    """Alike in a file, in a live model, in an nnx module."""
    said = "emb/.* and head/.* are one array .*fwt.kernels names head/.* where='emb/"
    with pytest.warns(UserWarning, match=said):
        converters.save("out.pt", *fwt.prune(0.5)(converters.load("net.pt")))
    state = check(net, "out.pt")
    assert torch.equal(state["emb.weight"], net.emb.weight)
    assert int((state["body.weight"] == 0).sum()) == 8
    with pytest.warns(UserWarning, match=said):
        converters.transform(net, fwt.prune(0.5))
    assert torch.equal(state["emb.weight"], net.emb.weight)
    assert int((net.body.weight == 0).sum()) == 8
    with pytest.raises(fwt.WhereError, match="are one array"):
        converters.transform(net, fwt.prune(0.5, where="head/*"))
    for where in ("emb/embedding", "head/kernel", ["emb/*", "head/*"], "**/[ek]*"):
        live_net = Net()
        converters.transform(live_net, fwt.prune(0.5, where=where))
        assert int((live_net.emb.weight == 0).sum()) == 12, where
        assert live_net.head.weight is live_net.emb.weight

    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.decoder = nnx.Linear(4, 4, rngs=rngs)
            self.emb = nnx.Embed(4, 4, rngs=rngs)
            self.body = nnx.Linear(4, 4, rngs=rngs)
            self.decoder.kernel = self.emb.embedding

    tied = Tied(nnx.Rngs(0))
    with pytest.warns(UserWarning, match="decoder/kernel and emb/embedding are one array"):
        new = fwt.prune(0.5)(tied)
    assert np.array_equal(new.emb.embedding[...], tied.emb.embedding[...])
    assert int((new.body.kernel[...] == 0).sum()) == 8


def test_tied_layers_of_a_live_keras_model():
    class Reversed(keras.layers.Layer):
        def __init__(self, embedding):
            super().__init__(name="head")
            self.kernel = embedding.embeddings

        def call(self, x):
            return keras.ops.matmul(x, keras.ops.transpose(self.kernel))

    embedding = keras.layers.Embedding(5, 3, name="emb")
    embedding.build()
    model = keras.Sequential(
        [keras.Input((2,)), embedding, keras.layers.Dense(3, name="d"), Reversed(embedding)]
    )
    before = np.array(embedding.embeddings)
    converters.transform(model, fwt.prune(0.5))
    assert np.array_equal(embedding.embeddings, before)
    assert list(live._backend(model).leaves(model)[0].also) == ["head/embeddings"]
    with pytest.raises(fwt.WhereError, match="emb/embedding and head/embeddings are one array"):
        converters.transform(model, fwt.prune(0.5, where="emb/*"))
    converters.transform(model, fwt.prune(0.5, where="emb/embedding"))
    assert int((np.asarray(embedding.embeddings) == 0).sum()) == 8


def test_a_tie_that_was_undone_is_no_tie(net):
    model = converters.load("net.pt")

    def other(keys, x):
        return x + 1 if "head" in str(keys) else x

    new = jax.tree_util.tree_map_with_path(other, model)
    for name in ("x.pt", "x.safetensors", "x.npz"):
        converters.save(name, *fwt.prune(0.5)(new))
        found = fwt.select(converters.load(name))
        assert int((found["head/weight"] == 0).sum()) == 12
        assert np.array_equal(found["emb/weight"], net.emb.weight.detach())


@pytest.mark.parametrize("metadata", [{"format": "pt", "license": "mit"}, {"format": "pt"}, None])
def test_metadata_of_safetensors_stays(net, metadata):
    tensors = {n: v.clone() for n, v in net.state_dict().items()}
    safetensors.torch.save_file(tensors, "in.safetensors", metadata=metadata)
    converters.save("out.safetensors", *fwt.prune(0.5)(converters.load("in.safetensors")))
    converters.save("between.pt", *converters.load("in.safetensors"))
    converters.save("again.safetensors", *converters.load("between.pt"))
    for name in ("out.safetensors", "again.safetensors"):
        with safe_open(name, "pt") as file:
            assert file.metadata() == (metadata or {"format": "pt"})


def test_a_tie_as_safetensors_itself_writes_it(net):
    safetensors.torch.save_model(net, "in.safetensors", metadata={"format": "pt"})
    model = converters.load("in.safetensors")
    params = model.variables["params"]
    assert params["emb"]["weight"] is params["head"]["weight"]
    converters.save("out.safetensors", *fwt.prune(0.5, **EITHER)(model))
    with safe_open("in.safetensors", "pt") as one, safe_open("out.safetensors", "pt") as other:
        assert other.metadata() == one.metadata()
        assert list(other.keys()) == list(one.keys())
    new = Net()
    assert safetensors.torch.load_model(new, "out.safetensors") == (set(), [])
    assert int((new.head.weight == 0).sum()) == 12


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("fc.weight", "fc.bias"), "pt"),
        (("rnn.weight_ih_l0",), "pt"),
        (("fc.kernel", "fc.bias0"), "np"),
        (("fc.kernel", "fc.bias"), "np"),
        (("norm.scale", "norm.bias", "fc.weight"), "np"),
    ],
)
def test_the_format_follows_the_names(tmp_path, names, expected):
    tree = {}
    for name in names:
        layer, leaf = name.split(".")
        tree.setdefault(layer, {})[leaf] = np.ones(3, np.float32)
    converters.save(tmp_path / "x.safetensors", None, {"params": tree})
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": expected}


def test_the_index_of_shards_keeps_its_metadata(net):
    os.mkdir("in")
    tensors = {n: v.clone() for n, v in net.state_dict().items()}
    safetensors.torch.save_file(tensors, "in/a.safetensors", metadata={"format": "pt", "a": "b"})
    index = {"metadata": {"total_size": 9, "by": "me"}, "weight_map": {}}
    index["weight_map"] = dict.fromkeys(tensors, "a.safetensors")
    with open("in/model.safetensors.index.json", "w") as file:
        json.dump(index, file)
    converters.save("out.safetensors", *converters.load("in"), shard_bytes=100)
    with open("out.safetensors/model.safetensors.index.json") as file:
        told = json.load(file)
    assert told["metadata"]["by"] == "me"
    assert told["metadata"]["total_size"] == sum(v.nbytes for v in tensors.values())
    for name in set(told["weight_map"].values()):
        with safe_open(f"out.safetensors/{name}", "pt") as file:
            assert file.metadata() == {"format": "pt", "a": "b"}


@pytest.mark.parametrize("how", [{}, {"shard_bytes": 30}])
@pytest.mark.parametrize(
    "names", [("table", "head"), ("a.table", "head"), ("format", "head"), ("a", "b.license")]
)
def test_a_tie_of_any_names_comes_back(tmp_path, monkeypatch, names, how):
    monkeypatch.chdir(tmp_path)
    table = torch.arange(6.0)
    torch.save({"z": torch.ones(5), **dict.fromkeys(names, table)}, "in.pt")
    converters.save("x.safetensors", *converters.load("in.pt"), **how)
    converters.save("y.safetensors", *converters.load("x.safetensors"), **how)
    converters.save("out.pt", *converters.load("y.safetensors"))
    found = torch.load("out.pt", weights_only=True)
    assert list(found) == ["z", *names]
    assert found[names[0]].data_ptr() == found[names[1]].data_ptr()
    assert torch.equal(found[names[0]], table)


def test_a_tie_and_metadata_of_one_name_are_both_kept(tmp_path):
    one = tmp_path / "in.safetensors"
    tensors = {"license": torch.ones(3), "b": torch.ones(3)}
    safetensors.torch.save_file(tensors, one, metadata={"license": "mit"})
    model = converters.load(one)
    model.variables["params"]["license"] = model.variables["params"]["b"]
    converters.save(tmp_path / "out.safetensors", *model)
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata()["license"] == "mit"
    params = converters.load(tmp_path / "out.safetensors").variables["params"]
    assert params["license"] is params["b"]


@pytest.mark.parametrize("ours", [True, False])
def test_ties_cost_what_their_arrays_would(tmp_path, ours):
    names = [f"a.{i}" for i in range(200)]
    told = {"fwt.source": json.dumps({"ties": [["b", *names]]})} if ours else {}
    path = tmp_path / "x.safetensors"
    tensors = {"b": np.ones(1 << 18, np.float32)}
    safetensors.numpy.save_file(tensors, path, told or dict.fromkeys(names, "b"))
    with pytest.raises(converters.FileFormatError, match=r"a.\d+ declares 1,048,576 bytes"):
        converters.load(path)


@pytest.mark.parametrize("how", [{}, {"shard_bytes": 30}])
def test_a_file_cant_write_in_our_name(tmp_path, how):
    """What stands in a .pt file can't give the next file an architecture."""
    torch.save({"fc.weight": torch.ones(2, 3)}, tmp_path / "x.pt")
    forged = {"fwt": "{}", "fwt.source": json.dumps({"ties": [["fc.weight", "b"]]}), "by": "me"}
    with zipfile.ZipFile(tmp_path / "x.pt", "a") as archive:
        told = {"safetensors": forged, "index": {**forged, "of": 1}}
        archive.writestr("x/fwt.json", json.dumps(told))
    path = tmp_path / "x.safetensors"
    converters.save(path, *converters.load(tmp_path / "x.pt"), **how)
    assert fwt.paths(converters.load(path)) == ["fc/weight"]
    found = converters.load(path).variables["params"].told
    assert json.loads(found)["safetensors"] == {"by": "me", "format": "pt"}
    assert ("of" in found) == bool(how)


def test_metadata_of_a_state_dict_is_plain():
    for value, broken in ((1, False), ([1], True), ({}, True)):
        told = {"torch": {"a": {"version": value}}}
        if not broken:
            assert source.checked(told) == told
            continue
        with pytest.raises(ValueError, match="malformed"):
            source.checked(told)


def test_what_torch_computes_a_tie_from_stays_tied(tmp_path):
    one = torch.nn.utils.weight_norm(torch.nn.Linear(4, 4))
    torch.save(torch.nn.ModuleDict({"a": one, "b": one}).state_dict(), tmp_path / "w.pt")
    params = converters.load(tmp_path / "w.pt").variables["params"]
    assert params["a"]["weight"] is params["b"]["weight"]


def test_boxed_variables_are_converted(tmp_path):
    init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
    net = fwt.Sequential(
        [("up", nn.Dense(5, kernel_init=init)), nn.relu, ("down", nn.Dense(3))], (4,)
    )
    x = np.linspace(-1, 1, 28, dtype=np.float32).reshape(7, 4)
    model = fwt.Model(net, net.init(jax.random.key(0), x))
    assert isinstance(model.variables["params"]["up"]["kernel"], nn.LogicallyPartitioned)
    for suffix in (".keras", ".safetensors", ".npz", ".orbax"):
        converters.save(tmp_path / f"m{suffix}", *model)
        found = converters.load(tmp_path / f"m{suffix}")
        np.testing.assert_allclose(found(x), model(x), rtol=1e-5, atol=1e-6)
    for other in (converters.to_torch(*model)(torch.from_numpy(x)).detach(),
                  converters.to_nnx(*model)(x)):  # fmt: skip
        np.testing.assert_allclose(other, model(x), rtol=1e-5, atol=1e-6)
    converters.save(tmp_path / "w.safetensors", None, model.variables)
    assert fwt.paths(converters.load(tmp_path / "w.safetensors")) == fwt.paths(model)
    new = fwt.reset(0, like="flax")(model)
    assert jax.tree.structure(new) == jax.tree.structure(model)


def test_a_whole_train_state_is_written(tmp_path):
    """A transform sees the params alone; a file holds all of it."""
    import optax

    params = {"d": {"kernel": jnp.ones((2, 3))}}
    state = {"params": params, "opt_state": optax.adam(0.1).init(params)}
    converters.save(tmp_path / "s.npz", None, fwt.prune(0.5)(state))
    with np.load(tmp_path / "s.npz") as file:
        assert "opt_state/0/mu/d/kernel" in file.files


def test_numbers_as_keys_of_msgpack(tmp_path):
    class Net(nnx.Module):
        def __init__(self):
            self.layers = nnx.List([nnx.Linear(2, 2, rngs=nnx.Rngs(0))])

    state = nnx.to_pure_dict(nnx.state(Net()))
    (tmp_path / "i.msgpack").write_bytes(serialization.msgpack_serialize(state))
    assert fwt.paths(converters.load(tmp_path / "i.msgpack")) == fwt.paths(Net())
    (tmp_path / "i.msgpack").write_bytes(b"\x82\x01\x02\xa11\x02")  # {1: 2, "1": 2}
    with pytest.raises(converters.FileFormatError, match="or twice"):
        converters.load(tmp_path / "i.msgpack")


def test_trees_of_two_files_that_say_the_same_are_averaged_and_others_named(tmp_path):
    def written(name, *metadata):
        head = {"__metadata__": dict(metadata)} | {
            "fc.weight": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]}
        }
        text = json.dumps(head).encode()
        values = np.full(2, len(metadata), "f").tobytes()
        (tmp_path / name).write_bytes(len(text).to_bytes(8, "little") + text + values)
        return converters.load(tmp_path / name).variables

    # As its writer, in Rust, shuffles them.
    one = written("a.safetensors", ("format", "pt"), ("by", "me"))
    other = written("b.safetensors", ("by", "me"), ("format", "pt"))
    mean = jax.tree.map(lambda a, b: (a + b) / 2, one, other)
    assert mean["params"]["fc"]["weight"].tolist() == [[2], [2]]
    third = written("c.safetensors", ("format", "pt"), ("by", "me"), ("step", "3"))
    with pytest.raises(ValueError, match=r"dict\(tree\) for name, tree in variables"):
        jax.tree.map(np.add, one, third)
    plain = ({name: dict(tree) for name, tree in x.items()} for x in (one, third))
    assert jax.tree.map(np.add, *plain)["params"]["fc"]["weight"].tolist() == [[5], [5]]
