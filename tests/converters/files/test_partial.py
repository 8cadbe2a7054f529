"""Weights whose names are not quite those of an architecture."""

import copy
import re

import flax.linen as nn
import jax
import keras
import numpy as np
import pytest
import torch
from command import cli

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
        ({"drop": ["a"], "architecture": None}, "need architecture="),
    ],
)
def test_what_does_not_go_together(tmp_path, how, said):
    torch.save(net().state_dict(), tmp_path / "w.pt")
    with pytest.raises(fwt.FileFormatError, match=said):
        converters.load(tmp_path / "w.pt", **{"architecture": net(), **how})


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
