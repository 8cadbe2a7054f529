"""Weights alone keep their names, nesting and dtypes from one file of a format to the next."""

import h5py
import jax
import jax.numpy as jnp
import keras
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
from command import cli
from flax import serialization

import fwt
from fwt import converters


def arrays(*names):
    return {n: np.arange(1.0, 7.0, dtype=np.float32).reshape(3, 2) + i for i, n in enumerate(names)}


@pytest.mark.parametrize(
    ("names", "where", "key"),
    [
        (("w1", "b1"), "w1", ""),
        (("head.weight", "head.bias", "bn.running_mean", "bn.running_var"), "head.weight", ""),
        (("a/b/weight", "a/w[0]*", "a/running_mean"), "a/b/weight", ""),
        (("params.w", "batch_stats.w"), "params/w", ""),
        (("params/a.b/w", "batch_stats/n/mean"), "a.b/w", ""),
        (("model.a", "model.b", "c"), "a", "model"),
    ],
)
def test_npz_keeps_the_names_of_numpy(tmp_path, names, where, key):
    held = arrays(*names)
    np.savez(tmp_path / "a.npz", **held)
    more = ("--key", key) if key else ()
    words = ("prune", "a.npz", "b.npz", "--sparsity", "0.5", "--where", where, *more)
    cli(*words, cwd=tmp_path)
    with np.load(tmp_path / "b.npz") as file:
        found = dict(file)
    assert list(found) == list(names)
    chosen = [n for n, v in found.items() if not v.all()]
    assert len(chosen) == 1
    for name, value in found.items():
        before = held[name]
        assert value.dtype == before.dtype
        kept = value != 0
        assert kept.sum() == (3 if name in chosen else 6)
        np.testing.assert_array_equal(value[kept], before[kept])


def test_npz_says_more_only_where_it_must(tmp_path):
    """bfloat16 needs a member beside the arrays; what comes of such a file is read as it was."""
    np.savez(tmp_path / "a.npz", **arrays("a.w", "a.b"))
    _, variables = converters.load(tmp_path / "a.npz")
    half = jax.tree.map(lambda x: np.asarray(x, jnp.bfloat16), variables)
    converters.save(tmp_path / "b.npz", None, half)
    with np.load(tmp_path / "b.npz") as file:
        assert "fwt.json" in file.files
    again = converters.load(tmp_path / "b.npz").variables
    assert fwt.paths(again) == ["a/b", "a/w"]
    assert again["params"]["a"]["w"].dtype == jnp.bfloat16
    # Two names that would become one are told apart.
    converters.save(
        tmp_path / "c.npz", None, {"params": {"a.b": np.ones(2), "a": {"b": np.ones(3)}}}
    )
    assert fwt.paths(converters.load(tmp_path / "c.npz")) == ["a/b", "a.b"]


TREES = {
    "a list of layers": {
        "layers": [{"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}, {"w": jnp.ones((2, 5)), "e": {}}],
        "scale": jnp.ones((), jnp.bfloat16),
    },
    "a list": [{"w": jnp.ones((3, 2))}, {"w": jnp.ones((2, 1), jnp.float16)}],
    "names of torch": {"head.weight": jnp.ones((3, 2)), "bn": {"running_mean": jnp.ones(2)}},
    "params of Flax": {"Dense_0": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}},
    "variables": {
        "params": {"d": {"w": jnp.ones((3, 2))}},
        "batch_stats": {"n": {"mean": jnp.ones(3)}},
    },
}


@pytest.mark.parametrize("suffix", [".msgpack", ".orbax"])
@pytest.mark.parametrize("what", TREES)
def test_flax_and_orbax_restore_what_was_theirs(tmp_path, what, suffix):
    params = TREES[what]
    if suffix == ".orbax":
        with ocp.StandardCheckpointer() as saver:
            saver.save(tmp_path / "a.orbax", params)
    else:
        (tmp_path / "a.msgpack").write_bytes(serialization.to_bytes(params))
    source, target = f"a{suffix}", f"b{suffix}"
    where = "head.weight" if what == "names of torch" else "**/w"
    where = "**/kernel" if what == "params of Flax" else where
    cli("prune", source, target, "--sparsity", "0.5", "--where", where, cwd=tmp_path)
    if suffix == ".orbax":
        with ocp.StandardCheckpointer() as reader:
            found = reader.restore(tmp_path / target, params)
            assert jax.tree.structure(reader.restore(tmp_path / target)) == jax.tree.structure(
                params
            )
        assert not (tmp_path / target / "fwt.json").exists()
    else:
        data = (tmp_path / target).read_bytes()
        found = serialization.from_bytes(params, data)
        before = serialization.msgpack_restore((tmp_path / source).read_bytes())
        assert jax.tree.structure(serialization.msgpack_restore(data)) == jax.tree.structure(before)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == shapes
    zeros = {jax.tree_util.keystr(k) for k, v in jax.tree.leaves_with_path(found) if not np.all(v)}
    was = {jax.tree_util.keystr(k) for k, v in jax.tree.leaves_with_path(params) if not np.all(v)}
    chosen = [jax.tree_util.keystr(k) for k, _ in jax.tree.leaves_with_path(params)]
    ends = ("['w']", "['head.weight']", "['kernel']")
    assert zeros - was == {n for n in chosen if n.endswith(ends)}


def test_lists_and_numbers_of_msgpack_stay(tmp_path):
    tree = {"l": [np.ones((2, 3), np.float32)] * 2, "n": {0: np.ones(2), 11: np.ones(1)}}
    (tmp_path / "a.msgpack").write_bytes(
        serialization.msgpack_serialize({"model": tree, "step": 3})
    )
    model = converters.load(tmp_path / "a.msgpack", key="model", rename={"l": "layers"})
    converters.save(tmp_path / "b.msgpack", *model)
    found = serialization.msgpack_restore((tmp_path / "b.msgpack").read_bytes())
    assert jax.tree.structure(found) == jax.tree.structure({"layers": tree["l"], "n": tree["n"]})
    model = converters.load(tmp_path / "a.msgpack", key="model", drop=["l/0"])
    converters.save(tmp_path / "c.msgpack", *model)  # a list without its first entry is none
    found = serialization.msgpack_restore((tmp_path / "c.msgpack").read_bytes())
    assert set(found["l"]) == {"1"}


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"params": {"a/b.weight": 1}}, None),
        (
            {"params": {"l": {"conv.weight": 1}}, "batch_stats": {"l": {"bn": {"running_var": 2}}}},
            None,
        ),
        ({"params": {"a": {"b": 1}, "a.b": 1}}, "two arrays would be named 'a.b'"),
        ({"params": {"a": {"b": 1}, "c": {"d.e": 1, "d": {"e": {"f": 1}}}}}, "c.d.e.f would stand"),
        ({"params": {"n": {"scale": 1}}, "batch_stats": {"n": {"mean": 1}}}, "batch_stats/n/mean"),
    ],
)
def test_names_are_joined_by_dots_for_torch(tmp_path, tree, said):
    tree = jax.tree.map(lambda i: np.full((i, 3), i, np.float32), tree)
    if said is not None:
        with pytest.raises(fwt.ConversionError, match=said):
            converters.save(tmp_path / "a.pt", None, tree)
        assert not (tmp_path / "a.pt").exists()
        return
    converters.save(tmp_path / "a.pt", None, tree)
    found = torch.load(tmp_path / "a.pt", weights_only=True)
    flat = {k: v for c in tree.values() for k, v in jax.tree.leaves_with_path(c)}
    assert set(found) == {".".join(p.key for p in path) for path in flat}


def test_npz_of_torch_names_becomes_a_state_dict(tmp_path):
    net = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3))
    state = {n.replace(".", "/"): v.numpy() for n, v in net.state_dict().items()}
    np.savez(tmp_path / "a.npz", **state)
    cli("convert", "a.npz", "a.pt", cwd=tmp_path)
    found = torch.load(tmp_path / "a.pt", weights_only=True)
    net.load_state_dict(found)
    assert fwt.paths(converters.load(tmp_path / "a.npz")) == [
        "0/bias",
        "0/weight",
        "1/bias",
        "1/weight",
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    layers = [
        keras.Input((5,)),
        keras.layers.Dense(7, name="first"),
        keras.layers.BatchNormalization(),
        keras.layers.ReLU(),
        keras.layers.Dense(3, dtype="bfloat16"),
    ]
    model = keras.Sequential(layers)
    model.compile("adam", "mse")
    model.fit(np.ones((4, 5)), np.ones((4, 3)), verbose=0)
    folder = tmp_path_factory.mktemp("keras")
    model.save_weights(folder / "a.weights.h5")
    return model, folder


def nodes(path):
    found = {}

    def note(name, node):
        held = node[()].tobytes() if isinstance(node, h5py.Dataset) else None
        found[name] = dict(node.attrs), held

    with h5py.File(path) as file:
        file.visititems(note)
    return found


def test_weights_of_keras_are_changed_in_place(trained):
    model, folder = trained
    where = ("--where", "layers/dense/vars/0", "--where", "layers/dense_1/vars/0")
    words = ("prune", "a.weights.h5", "b.weights.h5", "--sparsity", "0.4")
    cli(*words, *where, cwd=folder)
    before, after = nodes(folder / "a.weights.h5"), nodes(folder / "b.weights.h5")
    assert list(before) == list(after)
    other = {name for name in before if before[name] != after[name]}
    assert other == {"layers/dense/vars/0", "layers/dense_1/vars/0"}
    assert any(name.startswith("optimizer/") for name in before)
    was = [np.asarray(w, np.float32) for w in model.get_weights()]
    model.load_weights(folder / "b.weights.h5")
    for old, value in zip(was, model.get_weights(), strict=True):
        new = np.asarray(value, np.float32)
        assert (new == 0).sum() == (round(0.4 * new.size) if new.ndim == 2 else (old == 0).sum())
        np.testing.assert_array_equal(new[new != 0], old[new != 0])
    found = cli(*words, *where, "--pattern", "n_m(2, 4)", cwd=folder, code=1)
    assert "nothing says which axis is its input" in found.stderr
    cli(*words, *where, "--dtype", "float32", cwd=folder)
    with h5py.File(folder / "b.weights.h5") as file:
        assert file["layers/dense_1/vars/0"].dtype == np.float32


def test_weights_of_keras_need_the_file_that_they_come_from(trained, tmp_path):
    _, folder = trained
    source, target = folder / "a.weights.h5", tmp_path / "b.weights.h5"
    _, variables = converters.load(source)
    with pytest.raises(fwt.ConversionError, match="source=, the file that they come from"):
        converters.save(target, None, variables)
    converters.save(target, None, variables, source=source)
    assert target.read_bytes() == source.read_bytes()
    part = {"params": {"layers": {"dense": variables["params"]["layers"]["dense"]}}}
    with pytest.raises(fwt.ConversionError, match="batch_normalization/vars/0 is not in both"):
        converters.save(target, None, part, source=source)
    for other in ("b.h5", "b.npz"):
        with pytest.raises(fwt.ConversionError, match="from a file of its own format"):
            converters.save(tmp_path / other, None, variables, source=source)


def test_older_weights_of_keras_are_changed_in_place(tmp_path):
    net = keras.Sequential([keras.Input((5,)), keras.layers.Dense(7, name="d")])
    weights = [np.asarray(w) for w in net.get_weights()]
    with h5py.File(tmp_path / "a.h5", "w") as file:  # as Keras 2 wrote it
        file.attrs["layer_names"] = np.array([b"d"])
        group = file.create_group("d")
        group.attrs["weight_names"] = np.array([b"d/kernel:0", b"d/bias:0"])
        group["d/kernel:0"], group["d/bias:0"] = weights
    where = ("--where", "d/d/kernel:0")
    cli("prune", "a.h5", "b.h5", "--sparsity", "0.4", *where, cwd=tmp_path)
    net.load_weights(tmp_path / "b.h5")
    assert (net.get_weights()[0] == 0).sum() == 14
