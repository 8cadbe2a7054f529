"""Weights whose names are not quite those of an architecture."""

import copy
import re

import flax.linen as nn
import jax
import keras
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.torch
import torch
from command import cli
from flax import nnx, serialization

import fwt
from fwt import converters

k = keras.layers


def net(seed=0):
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2)]
    torch.nn.init.normal_(layers[1].running_mean)
    return torch.nn.Sequential(*layers).eval()


def averaged():
    return torch.optim.swa_utils.AveragedModel(net()).state_dict()


def prefixed(start, **more):
    return {**{start + n: v for n, v in net().state_dict().items()}, **more}


ONE = torch.ones(2)
FILES = {
    "DataParallel": (lambda: torch.nn.DataParallel(net()).state_dict(), "rename={'module': ''}"),
    "compiled": (lambda: torch.compile(net()).state_dict(), "rename={'_orig_mod': ''}"),
    "both": (lambda: prefixed("module._orig_mod."), "rename={'module._orig_mod': ''}"),
    "averaged": (averaged, "rename={'module': ''} and drop=['n_averaged']"),
    "an agent": (
        lambda: prefixed("actor.net.", **{"actor.log_std": ONE, "critic.0.weight": ONE}),
        "rename={'actor.net': ''} and drop=['actor.log_std', 'critic.**']",
    ),
    "a head more": (lambda: prefixed("", **{"head.weight": ONE}), "drop=['head.**']"),
}


def options(said):
    """The arguments of ``load`` that an error names."""
    rename = re.search(r"rename=(\{.*?\})", said)
    drop = re.search(r"drop=(\[.*?\])", said)
    return {n: eval(m[1]) for n, m in (("rename", rename), ("drop", drop)) if m}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_an_error_names_what_makes_a_file_fit(tmp_path, name, suffix):
    make, said = FILES[name]
    torch.save(make(), tmp_path / "w.pt")
    if suffix == ".safetensors":
        converters.save(tmp_path / "w.safetensors", *converters.load(tmp_path / "w.pt"))
    with pytest.raises(fwt.FileFormatError) as error:
        converters.load(tmp_path / f"w{suffix}", architecture=net(1))
    how = options(str(error.value))
    assert how == options(said)
    assert f"{said.partition('[')[0]}" in str(error.value)
    model = converters.load(tmp_path / f"w{suffix}", architecture=net(1), **how)
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    expected = net()(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(model(x), expected, atol=1e-6)


@pytest.mark.parametrize("old", ["module", "module."])
def test_a_start_is_renamed_at_a_boundary(tmp_path, old):
    torch.save(prefixed("module.", **{"modules": ONE}), tmp_path / "w.pt")
    with pytest.raises(fwt.FileFormatError, match="unexpected: modules;"):
        converters.load(tmp_path / "w.pt", architecture=net(), rename={old: ""})
    torch.save({n.removeprefix("0."): v for n, v in net()[:1].state_dict().items()},
               tmp_path / "w.pt")  # fmt: skip
    model = converters.load(tmp_path / "w.pt", architecture=net()[:1], rename={"": "0"})
    np.testing.assert_array_equal(model.variables["params"]["0"]["kernel"].T, net()[0].weight.data)


def test_what_fits_is_taken_and_the_rest_is_told(tmp_path):
    state = net().state_dict()
    state["2.weight"], state["more"] = torch.ones(5, 3), ONE
    del state["0.bias"]
    torch.save(state, tmp_path / "w.pt")
    own = net(1)
    said = "loaded 6 of 8 arrays; missing: 0.bias; unexpected: more; of another shape: 2.weight is"
    with pytest.warns(UserWarning, match=re.escape(said)):
        model = converters.load(tmp_path / "w.pt", architecture=own, strict=False)
    there = converters.to_torch(*model).state_dict()
    for name, value in own.state_dict().items():
        if name.endswith("tracked"):
            continue
        wanted = value if name in ("0.bias", "2.weight") else state[name]
        assert torch.equal(there[name], wanted), name
    bare = fwt.Sequential(model.module.layers, (4,))
    with pytest.raises(fwt.FileFormatError, match="has no weights of its own"):
        converters.load(tmp_path / "w.pt", architecture=bare, strict=False)
    torch.save({"x": ONE}, tmp_path / "w.pt")
    with pytest.raises(fwt.FileFormatError, match="does not fit"):
        converters.load(tmp_path / "w.pt", architecture=own, strict=False)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"drop": ["nothing.**"]}, "drop: no name matches 'nothing.\\*\\*'"),
        ({"strict": False, "match": "order"}, "strict=False goes by names"),
        ({"strict": False, "architecture": None}, "need architecture="),
        ({"drop": ["a"], "architecture": None}, "drop: no name matches 'a'"),
        ({"drop": "**", "architecture": None}, r"drop=\['\*\*'\] leaves no array"),
        ({"drop": [0], "architecture": None}, "a list of globs"),
        ({"rename": {0: "1"}}, "a dict of names"),
        ({"rename": {"0.b": ""}, "architecture": None}, "no name starts with '0.b'"),
        ({"rename": {"0.bias": ""}, "architecture": None}, "'0/bias' would be left without a name"),
        ({"rename": {"2": "0"}, "architecture": None}, "two arrays are named '0.weight'"),
    ],
)
def test_what_does_not_go_together(tmp_path, how, said):
    torch.save(net().state_dict(), tmp_path / "w.pt")
    with pytest.raises(fwt.FileFormatError, match=said):
        converters.load(tmp_path / "w.pt", **{"architecture": net(), **how})


def tied_net():
    net = torch.nn.Sequential()
    for name, layer in (
        ("z", torch.nn.Linear(3, 3)),
        ("head", torch.nn.Linear(3, 3)),
        ("a", torch.nn.BatchNorm1d(3)),
        ("relu", torch.nn.ReLU()),
    ):
        net.add_module(name, layer)
    net.head.weight = net.z.weight
    return net


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".npz"])
@pytest.mark.parametrize("old", ["module", "module.", "module/"])
@pytest.mark.parametrize("drop", ["head.bias", "head/*", "**.running_mean", "batch_stats/**"])
def test_names_of_weights_alone(tmp_path, suffix, old, drop):
    """What torch itself says of the module inside is the truth: order, ties, versions."""
    wrapped, own = torch.nn.DataParallel(tied_net()), tied_net()
    torch.save(wrapped.state_dict(), tmp_path / "w.pt")
    gone = {
        "head.bias": ["head.bias"],
        "head/*": ["head.weight", "head.bias"],
        "**.running_mean": ["a.running_mean"],
        "batch_stats/**": ["a.running_mean", "a.running_var", "a.num_batches_tracked"],
    }[drop]
    variables = converters.load(tmp_path / "w.pt", rename={old: ""}, drop=[drop]).variables
    converters.save(tmp_path / f"out{suffix}", None, variables)
    model = converters.load(tmp_path / f"out{suffix}")
    converters.save(tmp_path / "back.pt", *fwt.project(lambda x, axes: x)(model))
    state, wanted = torch.load(tmp_path / "back.pt"), own.state_dict()
    assert list(state) == [n for n in wanted if n not in gone]
    for name in state:
        assert torch.equal(state[name], wrapped.module.state_dict()[name])
    if drop != "head/*":
        assert state["z.weight"].data_ptr() == state["head.weight"].data_ptr()
    versions = {m: v for m, v in wanted._metadata.items() if m != "head" or drop != "head/*"}
    assert state._metadata == versions


def test_a_name_may_hold_slashes_or_dots(tmp_path):
    held = {"bert/layer_0/kernel": ONE, "bert/bias": 2 * ONE, "x.running_mean": 3 * ONE}
    safetensors.torch.save_file(held, tmp_path / "w.safetensors")
    for how, names in (
        ({"rename": {"bert": ""}}, ["layer_0/kernel", "bias", "x.running_mean"]),
        ({"rename": {"bert/": "b"}}, ["b/layer_0/kernel", "b/bias", "x.running_mean"]),
        ({"rename": {"bert.bias": "q.w"}}, ["bert/layer_0/kernel", "q.w", "x.running_mean"]),
        ({"rename": {"": "m"}, "drop": "bert/bias"},
         ["m.bert/layer_0/kernel", "m.x.running_mean"]),
        ({"drop": ["bert/**"]}, ["x.running_mean"]),
        ({"drop": ["m/x/*"], "rename": {"x": "m.x"}}, ["bert/layer_0/kernel", "bert/bias"]),
    ):  # fmt: skip
        model = converters.load(tmp_path / "w.safetensors", **how)
        converters.save(tmp_path / "o.safetensors", *model)
        assert sorted(safetensors.torch.load_file(tmp_path / "o.safetensors")) == sorted(names)
    # Collections of Flax stay what they are.
    tree = {"params": {"m": {"a.b": np.ones(2)}}, "batch_stats": {"m": {"mean": np.ones(2)}}}
    (tmp_path / "w.msgpack").write_bytes(serialization.to_bytes(tree))
    found = converters.load(tmp_path / "w.msgpack", rename={"m": "n.o"}).variables
    assert jax.tree.structure(found) == jax.tree.structure(
        {"params": {"n": {"o": {"a.b": 0}}}, "batch_stats": {"n": {"o": {"mean": 0}}}}
    )
    tree = {"params": {"a.b": np.ones(2), "a": {"b": np.ones(2)}}}
    (tmp_path / "w.msgpack").write_bytes(serialization.to_bytes(tree))
    with pytest.raises(fwt.FileFormatError, match="two arrays are named 'params/x'"):
        converters.load(tmp_path / "w.msgpack", rename={"a.b": "x"})


def test_the_command_line_speaks_of_its_options(tmp_path):
    torch.save(averaged(), tmp_path / "w.pt")
    converters.save(tmp_path / "net.safetensors", *converters.from_torch(net(), input_shape=(4,)))
    words = ("convert", "w.pt", "out.npz", "-a", "net.safetensors")
    said = cli(*words, cwd=tmp_path, code=1).stderr
    assert "--rename module= and --drop n_averaged makes it fit" in said
    cli(*words, "--rename", "module=", "--drop", "n_averaged", cwd=tmp_path)
    variables = converters.load(tmp_path / "out.npz").variables
    np.testing.assert_array_equal(variables["params"]["0"]["kernel"].T, net()[0].weight.detach())
    torch.save({**net().state_dict(), "more": ONE}, tmp_path / "w.pt")
    assert "loaded 8 of 8 arrays" in cli(*words, "--no-strict", cwd=tmp_path).stderr


def test_a_linen_sequential_takes_a_file_of_torch(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    torch.save(net.state_dict(), tmp_path / "t.pt")
    module = nn.Sequential([nn.Dense(5), nn.relu, nn.Dense(3)])
    x = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    own = fwt.Model(module, module.init(jax.random.key(0), x))
    with torch.no_grad():
        wanted = net(torch.from_numpy(x)).numpy()
    rename = {"0": "layers_0", "2": "layers_2"}
    for how in ({"match": "order"}, {"rename": rename}):
        found = converters.load(tmp_path / "t.pt", architecture=own, **how)
        np.testing.assert_allclose(found(x), wanted, atol=1e-6)
        np.testing.assert_allclose(module.apply(found.variables, x), wanted, atol=1e-6)


@pytest.mark.parametrize("nested", [False, True])
def test_rows_behind_a_flatten_are_those_of_the_file_s_own_model(tmp_path, nested):
    """A channels-first model's files have the names and shapes of a channels-last one's."""
    inside = [k.Conv2D(3, 2, data_format="channels_first"), k.Flatten()]
    inside = [keras.Sequential(inside)] if nested else inside
    layers = [k.ReLU(), *inside, k.Dense(2)]
    live = keras.Sequential([keras.Input((4, 6, 5)), *layers])
    live.save(tmp_path / "m.keras")
    live.save_weights(tmp_path / "m.weights.h5")
    names = [v.path.split("/", 1)[1] for v in live.weights]
    np.savez(tmp_path / "m.npz", **dict(zip(names, map(np.asarray, live.weights), strict=True)))
    source = converters.load(tmp_path / "m.keras")
    converters.save(tmp_path / "m.safetensors", source)
    wanted = converters.from_keras(live, layout="source").variables
    for given in (live, tmp_path / "m.keras"):
        found = converters.load(tmp_path / "m.weights.h5", architecture=given)
        assert jax.tree.all(jax.tree.map(np.array_equal, found.variables, wanted))
        with pytest.raises(fwt.ConversionError, match=r"names are Flax's and Keras's.*rows"):
            converters.load(tmp_path / "m.npz", architecture=given)
    for given in (
        source,
        source.module,
        converters.from_keras(live),
        converters.from_keras(live, sidecar=True),
        tmp_path / "m.safetensors",
        fwt.Model(source.module.clone(sidecar=""), source.variables),
        copy.deepcopy(converters.from_keras(live)),
    ):
        with pytest.raises(fwt.ConversionError, match="made of a channels-first Keras model"):
            converters.load(tmp_path / "m.weights.h5", architecture=given)
    # A model of torch takes the file of the Keras model that it became.
    net = torch.nn.Sequential(torch.nn.Conv2d(4, 3, 2), torch.nn.Flatten(), torch.nn.Linear(60, 2))
    model = converters.from_torch(net, (4, 6, 5), layout="source")
    converters.save(tmp_path / "t.weights.h5", model)
    found = converters.load(tmp_path / "t.weights.h5", architecture=model)
    assert jax.tree.all(jax.tree.map(np.array_equal, found.variables, model.variables))
    # Of channels-last models, and of those without a Flatten, each way is one.
    layers = [k.Conv2D(3, 2), k.Flatten(), k.Dense(2)]
    live = keras.Sequential([keras.Input((6, 5, 4)), *layers])
    live.save_weights(tmp_path / "l.weights.h5")
    names = [v.path.split("/", 1)[1] for v in live.weights]
    np.savez(tmp_path / "l.npz", **dict(zip(names, map(np.asarray, live.weights), strict=True)))
    wanted = converters.from_keras(live).variables
    for name in ("l.weights.h5", "l.npz"):
        for given in (live, converters.from_keras(live)):
            found = converters.load(tmp_path / name, architecture=given)
            assert jax.tree.all(jax.tree.map(np.array_equal, found.variables, wanted))
    weights = live.get_weights()
    weights[0][0, 0, 0, 0] = np.nan
    live.set_weights(weights)
    np.savez(tmp_path / "n.npz", **dict(zip(names, weights, strict=True)))
    found = converters.load(tmp_path / "n.npz", architecture=live)
    assert sum(np.isnan(x).sum() for x in jax.tree.leaves(found.variables)) == 1


def test_of_two_parts_that_fit_both_are_named(tmp_path):
    state = prefixed("model.", **{f"ema.{n}": 2 * v for n, v in net().state_dict().items()})
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(fwt.ConversionError, match=r"2 parts of it fit: .*'ema'.*, or .*'model'"):
        converters.load(tmp_path / "w.pt", architecture=net())
    with pytest.raises(fwt.ConversionError) as raised:
        converters.load(tmp_path / "w.pt", architecture=torch.nn.Sequential(torch.nn.Linear(9, 9)),
                        strict=False)  # fmt: skip
    assert "strict=False" not in str(raised.value)


def test_a_folder_of_several_files_of_weights_is_ambiguous(tmp_path):
    for name in ("a.pt", "b.pt"):
        torch.save(net().state_dict(), tmp_path / name)
    converters.save(tmp_path / "c.safetensors", converters.from_torch(net()))
    with pytest.raises(fwt.ConversionError, match=r"3 files of weights: give one of a\.pt, b\.pt"):
        converters.load(tmp_path)
    for name in ("a.pt", "b.pt"):
        (tmp_path / name).unlink()
    torch.save(net().state_dict(), tmp_path / "pytorch_model.bin")
    assert converters.load(tmp_path).module is not None


def tied(names, first, second):
    """Linear layers of these names, two of which have one weight."""
    torch.manual_seed(3)
    layers = {name: torch.nn.Linear(5, 5, bias=False) for name in names}
    layers[second].weight = layers[first].weight
    return torch.nn.ModuleDict(layers)


@pytest.mark.parametrize(
    ("rename", "drop", "pair", "stored"),
    [
        ({"a": "c", "c": "a"}, None, ("c", "b"), ["a.weight", "c.weight"]),
        ({"a": "x"}, (), ("x", "b"), ["c.weight", "x.weight"]),
        ({"b": "x"}, (), ("a", "x"), ["a.weight", "c.weight"]),
        (None, "a.*", None, ["b.weight", "c.weight"]),
        (None, ["b.weight"], None, ["a.weight", "c.weight"]),
        ({"c": "b", "b": "c"}, ["a.weight"], None, ["b.weight", "c.weight"]),
    ],
)
def test_second_names_in_metadata_follow_the_new_names(tmp_path, rename, drop, pair, stored):
    """As safetensors' own load_model takes them."""
    net = tied("abc", "a", "b")
    safetensors.torch.save_model(net, str(tmp_path / "w.safetensors"))
    variables = converters.load(tmp_path / "w.safetensors", rename=rename, drop=drop).variables
    out = tmp_path / "out.safetensors"
    converters.save(out, None, variables)
    with safetensors.safe_open(out, "pt") as file:
        assert sorted(file.keys()) == stored
        metadata = {n: v for n, v in file.metadata().items() if n != "format"}
        assert metadata == ({} if pair is None else {f"{pair[1]}.weight": f"{pair[0]}.weight"})
    new = {n: (rename or {}).get(n, n) for n in "abc"}
    if pair is not None:
        other = tied(new.values(), *pair)
        torch.nn.init.zeros_(other[pair[0]].weight)
        assert safetensors.torch.load_model(other, str(out)) == (set(), [])
        for old, name in new.items():
            assert torch.equal(other[name].weight, net[old].weight), name


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"rename": [("a", "b")]}, r"rename= is a dict .*found \[\('a', 'b'\)\]"),
        ({"rename": "a=b"}, "rename= is a dict .*found 'a=b'"),
        ({"rename": {"a": 3}}, "rename= is a dict .*found 3"),
        ({"drop": 5}, "drop= is a list of globs.*found 5"),
        ({"drop": ["a.*", None]}, "drop= is a list of globs.*found None"),
        ({"drop": {"a": "b"}}, "drop= is a list of globs.*found {'a': 'b'}"),
    ],
)
def test_what_rename_and_drop_are(tmp_path, how, said):
    torch.save(net().state_dict(), tmp_path / "w.pt")
    with pytest.raises(converters.FileFormatError, match=rf"w\.pt: {said}"):
        converters.load(tmp_path / "w.pt", **how)
    given = converters.load(tmp_path / "w.pt", rename=None, drop=None).variables
    assert fwt.paths(given) == fwt.paths(converters.load(tmp_path / "w.pt").variables)


def test_names_with_empty_parts_stay_as_they_are(tmp_path):
    state = {
        "a..b": torch.ones(2, 3),
        ".x": torch.ones(3),
        "c": torch.ones(1),
        "d.e": torch.ones(2),
    }
    torch.save(state, tmp_path / "w.pt")
    found = converters.load(tmp_path / "w.pt", drop=["c"], rename={"d": "f"}).variables
    assert fwt.paths(found) == ["/x", "a//b", "f/e"]
    found = converters.load(tmp_path / "w.pt", drop=["a..b", ".x"], rename={"a": "z"}).variables
    assert fwt.paths(found) == ["c", "d/e"]
    with pytest.raises(converters.FileFormatError, match="'c' would be left without a name"):
        converters.load(tmp_path / "w.pt", rename={"c": ""})


@pytest.mark.parametrize(
    ("names", "key", "said"),
    [
        (("a", "b"), "nope", "it holds one model, or one set of weights"),
        (("m.a", "b"), "params", "there is no 'params', but 'm'$"),
        (("m/a", "b"), "params", "there is no 'params', but 'm'$"),
        (("m.n.a", "m.n.running_mean", "m.b"), "m/n", None),
        (("m/n/a", "m/n/b.c", "b"), "m/n", None),
    ],
)
def test_parts_of_npz_are_those_of_its_names(tmp_path, names, key, said):
    np.savez(tmp_path / "w.npz", **{n: np.full((i + 1, 2), i) for i, n in enumerate(names)})
    if said is not None:
        with pytest.raises(converters.FileFormatError, match=said):
            converters.load(tmp_path / "w.npz", key=key)
        return
    variables = converters.load(tmp_path / "w.npz", key=key).variables
    inner = (
        {"a": (1, 2), "running_mean": (2, 2)} if "." in names[0] else {"a": (1, 2), "b.c": (2, 2)}
    )
    found = {n: v.shape for tree in variables.values() for n, v in tree.items()}
    assert found == inner


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True, name="bn")(nn.Dense(4, name="d")(x))
        return nn.Dense(3, name="e")(nn.relu(x))


def train_state():
    variables = Normed().init(jax.random.key(0), np.ones((1, 5), np.float32))
    variables = jax.tree.map(lambda x: x + np.arange(x.size, dtype="f").reshape(x.shape), variables)
    state = {"step": 3, "opt_state": {"0": {"count": np.int32(3)}, "1": None}, **variables}
    return variables, state


@pytest.mark.parametrize("kind", ["msgpack", "orbax"])
def test_params_and_statistics_of_a_train_state_at_once(kind, tmp_path):
    variables, state = train_state()
    path = tmp_path / "state.msgpack"
    if kind == "orbax":
        path = tmp_path / "state"
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(path, state)
    else:
        path.write_bytes(serialization.msgpack_serialize(state))
    with pytest.raises(fwt.FileFormatError, match=r"key=\['params', 'batch_stats'\] picks its v"):
        converters.load(path)
    found = converters.load(path, key=("params", "batch_stats"))
    assert found.module is None
    for collection in ("params", "batch_stats"):
        expected = fwt.select(variables[collection], "**")
        for place, value in fwt.select(found.variables[collection], "**").items():
            np.testing.assert_array_equal(value, expected.pop(place))
        assert not expected
    layers = [("d", nn.Dense(4)), ("bn", nn.BatchNorm()), nn.relu, ("e", nn.Dense(3))]
    net = fwt.Sequential(layers, (5,))
    there = fwt.Model(net, net.init(jax.random.key(1), np.ones((1, 5), np.float32)))
    converters.save(tmp_path / "net.safetensors", there)
    keys = ("--key", "params", "--key", "batch_stats")
    cli("convert", path, "o.npz", "-a", "net.safetensors", *keys, cwd=tmp_path)
    x = np.random.default_rng(0).standard_normal((3, 5), np.float32)
    np.testing.assert_allclose(
        converters.load(tmp_path / "o.npz")(x), Normed().apply(variables, x), rtol=1e-6
    )
    with pytest.raises(fwt.FileFormatError, match="two of the parts are params"):
        converters.load(path, key=["params", "params"])


def test_a_checkpoint_of_the_state_of_an_nnx_module(tmp_path):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.a, self.bn = nnx.Linear(4, 6, rngs=rngs), nnx.BatchNorm(6, rngs=rngs)

        def __call__(self, x):
            return self.bn(self.a(x))

    net, other = Net(nnx.Rngs(0)), Net(nnx.Rngs(1))
    net.bn.mean[...] = jax.numpy.arange(6.0)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.state(net))
    there = converters.from_nnx(other, (4,))
    found = converters.load(tmp_path / "state", architecture=there)
    x = np.random.default_rng(0).standard_normal((3, 4), np.float32)
    net.eval()
    np.testing.assert_allclose(found(x), net(x), rtol=1e-5, atol=1e-6)


BESIDE = {
    "list": [1, 2],
    "list of tensors": [ONE],
    "sparse": torch.eye(3).to_sparse(),
    "csr": torch.eye(3).to_sparse_csr(),
    "quantized": torch.quantize_per_tensor(ONE, 0.1, 0, torch.qint8),
    "dict": {"a": {"lr": 0.1}},
    "shape": torch.Size([2]),
    "object": torch.nn.ReLU(),
    "number": 3,
}


@pytest.mark.parametrize("what", BESIDE)
@pytest.mark.filterwarnings("ignore:.*[Ss]parse")
def test_what_no_glob_wants_need_be_no_tensor(tmp_path, what):
    """And the error over it names the glob."""
    state = net().state_dict()
    for key in (None, "state_dict"):
        held = {**state, "beside.it": BESIDE[what], "also": [3]}
        torch.save(held if key is None else {key: held, "epoch": 3}, tmp_path / "w.pt")
        with pytest.raises(converters.FileFormatError) as told:
            converters.load(tmp_path / "w.pt", key=key)
        (said,) = re.findall(r"drop=(\[.*?\]) leaves it out", str(told.value))
        assert ("beside.it" in said) == (what != "number")
        for drop in (["beside.it", "also"], ["b*.it", "also/*"], ["beside/**", "al*"]):
            found = converters.load(tmp_path / "w.pt", key=key, drop=drop)
            converters.save(tmp_path / "again.pt", found)
            again = torch.load(tmp_path / "again.pt", weights_only=True)
            assert list(again) == list(state)
            assert all(torch.equal(again[n], v) for n, v in state.items())
        with pytest.raises(converters.FileFormatError, match=re.escape("drop=['also']")):
            converters.load(tmp_path / "w.pt", key=key, drop=["beside.it"])
    torch.save({**state, "it": {"ema": state, "of": [ONE]}}, tmp_path / "w.pt")
    with pytest.raises(converters.FileFormatError, match="'it' is a dict"):
        converters.load(tmp_path / "w.pt", drop=["it/of"])
    converters.load(tmp_path / "w.pt", drop=["it/of", "it.ema.**"])
    cli("inspect", "w.pt", "--drop", "it", cwd=tmp_path)
    torch.save({"model": {**state, "history": [1]}, "epoch": 3}, tmp_path / "w.pt")
    said = cli("inspect", "w.pt", cwd=tmp_path, code=1).stderr
    assert "--key model picks a part of it, and --drop leaves out what is no tensor" in said
    cli("inspect", "w.pt", "--key", "model", "--drop", "history", cwd=tmp_path)


@pytest.mark.parametrize("kind", ["msgpack", "orbax", "npz"])
def test_what_no_glob_wants_need_be_no_array(tmp_path, kind):
    kept = {"a": {"kernel": np.ones((3, 2), np.float32)}}
    tree = {**kept, "note": "text", "more": [np.ones(2), "text"]}
    path = tmp_path / f"w.{kind}"
    if kind == "npz":
        np.savez(path, note=np.array("text"), **{"a/kernel": np.ones((3, 2)), "more/1": ["text"]})
    elif kind == "msgpack":
        path.write_bytes(serialization.msgpack_serialize(tree))
    else:
        ocp.PyTreeCheckpointer().save(path, tree)
    with pytest.raises(converters.FileFormatError, match=r"drop=\['(note|more/1)'\] leaves it"):
        converters.load(path)
    found = converters.load(path, drop=["note", "more/**"])
    assert fwt.paths(found) == ["a/kernel"]
    converters.save(tmp_path / f"v.{kind}", found)
    assert fwt.paths(converters.load(tmp_path / f"v.{kind}")) == ["a/kernel"]


def test_a_new_name_that_says_other_axes_is_refused(tmp_path):
    """A square matrix would fit either way, and what is read without a model is believed."""
    layers = torch.nn.Linear(3, 3), torch.nn.Conv2d(2, 2, 2), torch.nn.LSTM(3, 3)
    arch = fwt.Sequential([("b", nn.Dense(3))], (3,))
    for layer, end in zip(layers, ("weight", "weight", "weight_ih_l0"), strict=True):
        state = {f"a.{n}": v for n, v in layer.state_dict().items()}
        torch.save(state, tmp_path / "w.pt")
        for more in ({}, {"architecture": arch}):
            with pytest.raises(
                converters.FileFormatError, match=rf"a.{end} would have its outputs"
            ):
                converters.load(tmp_path / "w.pt", rename={f"a.{end}": "b/kernel"}, **more)
    found = converters.load(tmp_path / "w.pt", rename={"a.bias_ih_l0": "b.bias"})
    assert "b/bias" in fwt.paths(found)  # a vector, which has one axis under any name
    converters.save(tmp_path / "w.npz", None, {"params": {"a": {"kernel": np.ones((3, 3))}}})
    with pytest.raises(converters.FileFormatError, match=r"a\.kernel would have its in"):
        converters.load(tmp_path / "w.npz", rename={"a.kernel": "a.weight"})
    said = cli("inspect", "w.npz", "--rename", "a.kernel=a.weight", cwd=tmp_path, code=1).stderr
    assert "w.npz: --rename: a.kernel would have" in said
    assert "--rename turns no array: leave its last part, and --architecture takes" in said

    torch.save({f"a.{n}": v for n, v in layers[0].state_dict().items()}, tmp_path / "w.pt")
    found = converters.load(tmp_path / "w.pt", rename={"a": "b"}, architecture=arch)
    kernel = layers[0].weight.detach().numpy().T
    assert np.array_equal(found.variables["params"]["b"]["kernel"], kernel)
    converters.load(tmp_path / "w.pt", rename={"a.weight": "a.embedding"})


class Own(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="it")(nn.relu(x))


def test_a_module_of_ones_own_as_an_architecture(tmp_path):
    """The error names a file or a model that is one, and these take torch's names."""
    net = torch.nn.Linear(4, 3)
    torch.save({f"it.{n}": v for n, v in net.state_dict().items()}, tmp_path / "w.pt")
    x = np.ones((2, 4), np.float32)
    module = Own()
    variables = module.init(jax.random.key(0), x)

    class Graph(nnx.Module):
        def __init__(self):
            self.it = nnx.Linear(4, 3, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.it(nnx.relu(x))

    for given, way in (
        (module, "save('net.safetensors', module, variables, input_shape=...)"),
        (fwt.Model(module, variables), "save('net.safetensors', module, variables"),
        (Graph(), "from_nnx(module, input_shape) gives one"),
    ):
        with pytest.raises(converters.ConversionError, match=re.escape(way)):
            converters.load(tmp_path / "w.pt", architecture=given)
    converters.save(tmp_path / "net.safetensors", module, variables, input_shape=(4,))
    for given in (tmp_path / "net.safetensors", converters.from_nnx(Graph(), (4,))):
        found = converters.load(tmp_path / "w.pt", architecture=given)
        expected = net(torch.relu(torch.from_numpy(x))).detach()
        np.testing.assert_allclose(found(x), expected, rtol=1e-5, atol=1e-6)


def test_globs_of_drop_are_of_the_names_in_the_file(tmp_path):
    path = tmp_path / "ema.pt"
    one, other = torch.zeros(2, 3), torch.ones(2, 3)
    torch.save({"model.w": one, "ema.w": other, "step": torch.ones(1)}, path)
    found = converters.load(path, drop=["model.**"], rename={"ema": "model"})
    assert fwt.paths(found) == ["model/w", "step"]
    np.testing.assert_array_equal(found.variables["params"]["model"]["w"], other)
    swapped = converters.load(path, drop=["ema.**"], rename={"ema": "model", "model": "ema"})
    assert fwt.paths(swapped) == ["ema/w", "step"]
    np.testing.assert_array_equal(swapped.variables["params"]["ema"]["w"], one)
    # A name that only renaming makes is one to drop too.
    assert fwt.paths(converters.load(path, drop=["x.**"], rename={"ema": "x"})) == [
        "model/w",
        "step",
    ]
