"""The command line on what a new user types first: what it says, and that the way out works."""

import json

import flax.linen as nn
import jax
import keras
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.torch
import torch
from command import cli

import fwt
from fwt import converters

HALF = ("--sparsity", "0.5", "--where", "**/weight")


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 5, 1))
    converters.save(folder / "net.safetensors", *converters.from_torch(net, (3, 8, 8)))
    state = net.state_dict()
    torch.save(state, folder / "w.pt")
    torch.save({f"module.backbone.{n}": v for n, v in state.items()}, folder / "both.pt")
    some = {n if n.startswith("2") else f"backbone.{n}": v for n, v in state.items()}
    torch.save({**some, "steps.0": torch.ones(2)}, folder / "some.pt")
    torch.save({"a": {"b": {"model": state}}, "step": 1}, folder / "deep.pt")
    torch.save({n: v.double() for n, v in state.items()}, folder / "wide.pt")
    for name in ("hf", "hg"):
        (folder / name).mkdir()
        index = {"metadata": {}, "weight_map": {}}
        for number, (key, value) in enumerate(state.items()):
            safetensors.torch.save_file({key: value}, folder / name / f"{number}.safetensors")
            index["weight_map"][key] = f"{number}.safetensors"
        (folder / name / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("sources", [("hf",), ("hf", "hg")])
def test_folders_of_no_suffix_are_copied(there, tmp_path, sources):
    out = tmp_path / "a" / "out"
    cli("prune", *sources, f"{out}/", *HALF, cwd=there)
    for name in sources:
        copied = out / name if len(sources) > 1 else out
        assert {p.name for p in copied.iterdir()} == {p.name for p in (there / name).iterdir()}
        kernel = safetensors.torch.load_file(copied / "0.safetensors")["0.weight"]
        assert int((kernel == 0).sum()) == 54
    out = tmp_path / "b"
    cli("prune", *sources, f"{out}/", *HALF, "--to", "pt", cwd=there)
    for name in sources:
        state = torch.load(out / f"{name}.pt", weights_only=True)
        assert int((state["0.weight"] == 0).sum()) == 54


def test_folders_above_a_target(there, tmp_path):
    cli("prune", "w.pt", tmp_path / "a/b/w.pt", *HALF, cwd=there)
    assert torch.load(tmp_path / "a/b/w.pt", weights_only=True).keys()
    for target in ("c/d/w.pt", "c/d/"):
        words = ("prune", "w.pt", f"{tmp_path}/{target}", "--sparsity", "0.5", "--where", "x")
        cli(*words, cwd=there, code=1)
    cli("convert", "w.pt", tmp_path / "c/w.keras", cwd=there, code=1)  # which fails as it is saved
    assert not (tmp_path / "c").exists()
    found = cli("prune", "w.pt", tmp_path / "out", *HALF, cwd=there, code=2)
    assert "out.safetensors" in "".join(found.stderr.split("│")).replace("\n", "").replace(" ", "")


@pytest.mark.parametrize(
    ("line", "said", "code"),
    [
        ("prune w.pt - --sparsity 0.5", "-: a file is written whole", 2),
        ("convert w.pt - --to .npz", "-: a file is written whole", 2),
        ("inspect w.pt --dtype int8", "expected float32, float16", 2),
        ("inspect deep.pt", "--key a/b/model picks a part of it", 1),
        ("prune wide.pt o.pt --sparsity 0.5 --where 0/weight", "--dtype float32 reads it in", 1),
        (
            "prune deep.pt o.pt --key a/b --rename model= --sparsity 0.5",
            "--key a/b/model picks a part",
            1,
        ),
        (
            "prune both.pt o.pt --sparsity 0.5 --where '**2.weight'",
            "part of its own, between slashes: '**/2/weight' takes 'module/backbone/2/weight'",
            1,
        ),
    ],
)
def test_what_is_said(there, line, said, code):
    found = cli(*line.replace("'", "").split(), cwd=there, code=code)
    assert said in " ".join(found.stderr.replace("│", " ").split())


def test_the_command_line_names_no_argument_of_python(there):
    said = cli("convert", "w.pt", "o.keras", cwd=there, code=1).stderr
    assert said.endswith("--architecture net.keras says which model they are of\n")


def test_renames_that_do_not_chain(there, tmp_path):
    words = ("convert", "both.pt", tmp_path / "o.pt")
    found = cli(*words, "--rename", "module=", "--rename", "backbone=", cwd=there, code=1)
    assert "each name is changed once: --rename module.backbone= does both" in found.stderr
    cli(*words, "--rename", "module.backbone=", cwd=there)
    state = torch.load(tmp_path / "o.pt", weights_only=True)
    assert state.keys() == torch.load(there / "w.pt", weights_only=True).keys()


def test_a_start_that_some_names_have(there, tmp_path):
    words = ("convert", "some.pt", tmp_path / "o.npz", "--architecture", "net.safetensors")
    found = cli(*words, cwd=there, code=1)
    assert "--rename backbone= and --drop 'steps.**' makes it fit" in found.stderr
    cli(*words, "--rename", "backbone=", "--drop", "steps.**", cwd=there)
    again = cli("diff", tmp_path / "o.npz", "net.safetensors", cwd=there)
    assert again.stdout.startswith("equal: 4 arrays")


def test_json_leaves_out_what_is_for_training_only(tmp_path):
    net = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, kernel_regularizer="l2")])
    net.save(tmp_path / "a.keras")
    found = cli("prune", "a.keras", "b.keras", "--sparsity", "0.5", "--json", cwd=tmp_path)
    told = json.loads(found.stdout)
    assert [x["class"] for x in told["module"]["layers"]] == ["Dense"]
    assert "sidecar" not in told["module"]
    assert keras.saving.load_model(tmp_path / "b.keras").layers[0].kernel_regularizer is not None


def test_shardings_of_another_tree(tmp_path):
    tree = {"params": {"d": {"kernel": np.ones((4, 2))}, "e": np.ones(3)}, "step": np.ones(1)}
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "a", jax.tree.map(np.float32, tree))
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with pytest.raises(converters.FileFormatError, match="shardings= is one sharding, or a tree"):
        converters.load(tmp_path / "a", key="params", shardings={"params": one})
    each = jax.tree.map(lambda _: one, tree["params"])
    found = converters.load(tmp_path / "a", key="params", shardings=each)
    assert fwt.select(found)["e"].sharding == one


def test_a_channel_that_some_kernels_have():
    params = {"a": {"query": {"kernel": np.ones((8, 2, 4), np.float32)}}, "d": {}}
    params["d"]["kernel"] = np.ones((8, 2), np.float32)
    heads = fwt.patterns.channel("heads")
    with pytest.raises(fwt.AxesError, match=r"d/kernel .*: leave it out with where=\['a/query/k"):
        fwt.prune(0.5, pattern=heads)(params)
    pruned = fwt.prune(0.5, pattern=heads, where=["a/query/kernel"])(params)
    assert sorted(np.asarray(pruned["a"]["query"]["kernel"]).any((0, 2))) == [False, True]


def test_what_is_no_transform():
    net = torch.nn.Sequential(torch.nn.Linear(4, 2))
    for given, said in (
        (torch.nn.init.kaiming_normal_, r"initializers\.torch\.kaiming_normal, key=0"),
        (keras.constraints.MaxNorm(1.0), "found MaxNorm of keras: such as fwt.initialize"),
        (3, "found int of builtins: such as"),
    ):
        with pytest.raises(fwt.ConversionError, match=said):
            converters.transform(net, given)
    same = fwt.initialize(fwt.initializers.torch.kaiming_normal, key=0)
    assert converters.transform(net, same) is net


def test_commands_show_and_prune_a_graph(tmp_path):
    start = keras.Input((6, 5, 3))
    y = keras.layers.Conv2D(3, 1, name="conv")(start)
    net = keras.Model(start, keras.layers.Add(name="sum")([start, y]))
    net.save(tmp_path / "net.keras")
    assert "2 layers, input 6 x 5 x 3" in cli("inspect", "net.keras", cwd=tmp_path).stdout
    cli("prune", "net.keras", "half.keras", "--sparsity", "0.5", cwd=tmp_path)
    found = fwt.select(converters.load(tmp_path / "half.keras").variables, "conv/kernel")
    assert int((found["conv/kernel"] == 0).sum()) == 4  # of 9


# -- what first-time users met in Python ----------------------------------------------------------


def test_masks_that_are_functions_or_no_transform():
    params = {"a": {"kernel": np.float32([[1, 0], [2, 3]])}}
    for call in (
        lambda: fwt.apply_masks(fwt.masks_of)(params),
        lambda: fwt.project(fwt.constraints.max_norm(1.0), masks=fwt.masks(0.5))(params),
    ):
        with pytest.raises(fwt.LeafError, match=r"a function was found.*apply_masks\(fwt.masks_of"):
            call()
    fwt.apply_masks(fwt.masks_of(params))(params)
    net = torch.nn.Linear(4, 3)
    sgd = torch.optim.SGD(net.parameters(), 0.1)
    masks = fwt.masks(0.5)(net)
    for call in (lambda: converters.hold(net, sgd, masks), lambda: converters.Callback(masks)):
        with pytest.raises(fwt.ConversionError, match=r"fwt.apply_masks\(masks\) is one"):
            call()
    converters.hold(net, sgd, fwt.apply_masks(masks)).remove()


def test_tensors_without_plain_values_say_how_to_get_them():
    with pytest.raises(fwt.ConversionError, match=r"a meta tensor.*to_empty"):
        converters.weights(torch.nn.Linear(3, 2, device="meta"))
    net = torch.nn.Linear(3, 2)
    net.weight = torch.nn.Parameter(net.weight.detach().to_sparse())
    with pytest.raises(fwt.ConversionError, match=r"a sparse tensor.*to_dense"):
        converters.weights(net)


def test_a_live_model_keeps_its_dtypes():
    with jax.enable_x64(True), pytest.raises(fwt.LeafError, match="keeps its dtypes: leave dtype="):
        converters.transform(torch.nn.Linear(3, 2).double(), fwt.prune(0.5, dtype="float32"))


def test_a_linen_module_without_its_statistics():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=True)(nn.Dense(3)(x))

    variables = Net().init(jax.random.key(0), np.ones((1, 4), np.float32))
    for given in ({"params": variables["params"]}, variables["params"]):
        with pytest.raises(fwt.ConversionError, match="needs more than params: give its variables"):
            converters.to_torch(Net(), given, input_shape=(4,))
    converters.to_torch(Net(), variables, input_shape=(4,))


def test_what_takes_a_transform_in_keras_is_named():
    with pytest.raises(TypeError, match=r"Callback runs a transform such as fwt.prune\(0.5\)"):
        converters.keras_constraint(fwt.prune(0.5))
    model = keras.Sequential([keras.Input((3,)), keras.layers.Lambda(lambda x: x + 1)])
    with pytest.raises(fwt.ConversionError, match=r"any code.*converters.register"):
        converters.from_keras(model)
