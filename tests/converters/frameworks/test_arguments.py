"""What a user gives at first: a live model where a tree is wanted, a Model where two things are."""

import subprocess
import sys

import equinox
import flax.linen as nn
import jax
import keras
import numpy as np
import onnxruntime
import pytest
import torch
from flax import nnx

import fwt
from fwt import converters
from fwt.converters.frameworks import torch_wrappers

KERAS = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="d")])
TORCH = torch.nn.Sequential(torch.nn.Linear(3, 2))
NET = fwt.Sequential([("d", nn.Dense(2)), nn.relu], input_shape=(3,))
X = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)


def model():
    return fwt.Model(NET, NET.init(jax.random.key(1), X))


READERS = {
    "paths": fwt.paths,
    "summary": lambda tree: [(line.path, line.shape) for line in fwt.summary(tree).lines],
    "select": lambda tree: fwt.select(tree, "**"),
    "masks": fwt.masks(0.5),
    "masks_of": fwt.masks_of,
    "kernels": lambda tree: fwt.select(tree, fwt.kernels),
}
VERBS = {
    "prune": fwt.prune(0.5),
    "initialize": fwt.initialize(fwt.initializers.he_normal(), key=0),
    "project": fwt.project(fwt.constraints.max_norm(1.0)),
}


@pytest.mark.parametrize("verb", READERS)
def test_what_only_reads_takes_a_live_model(verb):
    for live, call in ((KERAS, converters.from_keras), (TORCH, converters.from_torch)):
        jax.tree.map(
            np.testing.assert_array_equal,
            jax.tree.leaves(READERS[verb](live)),
            jax.tree.leaves(READERS[verb](call(live))),
        )
    with pytest.raises(fwt.FwtError, match=r"net is a torch Sequential, a live model"):
        READERS[verb]({"a": 1, "net": TORCH})


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    "live",
    [KERAS, KERAS.layers[0], TORCH, torch.nn.LSTM(2, 3), {"a": 1, "net": TORCH}],
    ids=["keras", "a Keras layer", "torch", "a torch module", "in a dict"],
)
def test_a_live_model_is_no_tree(verb, live):
    framework = "keras" if isinstance(live, keras.Layer) else "torch"
    with pytest.raises(fwt.FwtError, match=rf"transform\(model, t\).*from_{framework}\(model\)"):
        VERBS[verb](live)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    "tree",
    [TORCH.state_dict(), dict(TORCH.named_parameters()), {"v": KERAS.variables[0]}],
    ids=["a state dict", "parameters", "a Keras variable"],
)
def test_tensors_of_a_framework_are_no_arrays(verb, tree):
    with pytest.raises(fwt.FwtError, match=r"takes arrays.*: give it .*converters.load\(path\)"):
        VERBS[verb](tree)


def test_one_model_is_enough(tmp_path):
    own = model()
    wanted = own(X)
    np.testing.assert_allclose(converters.to_keras(own).predict(X, verbose=0), wanted, atol=1e-6)
    with torch.no_grad():
        found = converters.to_torch(own)(torch.from_numpy(X)).numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    np.testing.assert_allclose(converters.to_nnx(own)(X), wanted, atol=1e-6)
    converters.to_onnx(own, tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    np.testing.assert_allclose(session.run(None, {"input": X})[0], wanted, atol=1e-6)
    for name in ("net.keras", "net.safetensors", "net.orbax", "net.pt", "net2.onnx"):
        converters.save(tmp_path / name, own)
    again = converters.load(tmp_path / "net.safetensors")
    np.testing.assert_array_equal(again(X), wanted)
    alone = converters.load(tmp_path / "net.pt")
    converters.save(tmp_path / "alone.npz", alone)
    assert fwt.paths(converters.load(tmp_path / "alone.npz")) == fwt.paths(alone)


def test_by_name_what_follows_a_model(tmp_path):
    own = model()
    assert converters.to_keras(own, input_shape=(3,)).input_shape == (None, 3)
    with pytest.raises(fwt.ConversionError, match=r"tuple after it .*: to_keras\(model\)"):
        converters.to_keras(own, (3,))
    with pytest.raises(fwt.ConversionError, match="a Model holds its variables"):
        converters.save(tmp_path / "x.npz", own, own.variables)


@pytest.mark.parametrize("live", [KERAS, TORCH], ids=["keras", "torch"])
def test_a_live_model_is_no_flax_model(live, tmp_path):
    for call in (
        converters.to_keras,
        converters.to_torch,
        converters.to_nnx,
        lambda m: converters.to_onnx(m, path=tmp_path / "x.onnx"),
        lambda m: converters.save(tmp_path / "x.keras", m),
    ):
        with pytest.raises(fwt.ConversionError, match=r"takes the Model that from_\w+\(model\)"):
            call(live)


class Own(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(x)


def test_a_module_of_ones_own_has_weights_to_save(tmp_path):
    own = Own()
    variables = own.init(jax.random.key(0), X)
    with pytest.raises(fwt.ConversionError, match=r"save\('.*', None, variables\) writes the w"):
        converters.save(tmp_path / "own.safetensors", own, variables)
    converters.save(tmp_path / "own.safetensors", None, variables)
    assert fwt.paths(converters.load(tmp_path / "own.safetensors")) == [
        "Dense_0/bias",
        "Dense_0/kernel",
    ]
    graph = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    with pytest.raises(fwt.ConversionError, match=r"None, nnx.state\(module\)\) w"):
        converters.save(tmp_path / "own.npz", graph)
    converters.save(tmp_path / "own.npz", None, nnx.state(graph))
    assert fwt.paths(converters.load(tmp_path / "own.npz")) == ["bias", "kernel"]
    with pytest.raises(fwt.ConversionError, match="found nothing"):
        converters.save(tmp_path / "own.npz", None)


WRAPPERS = {
    "DataParallel": torch.nn.DataParallel,
    "compiled": torch.compile,
    "averaged": torch.optim.swa_utils.AveragedModel,
    "averaged and parallel": lambda net: torch.nn.DataParallel(
        torch.optim.swa_utils.AveragedModel(net)
    ),
}


DISTRIBUTED = """
import jax, numpy as np, torch
from fwt import converters

group = torch.distributed
group.init_process_group("gloo", store=group.HashStore(), rank=0, world_size=1)
net = torch.nn.Linear(3, 2)
wrapped = torch.nn.parallel.DistributedDataParallel(torch.nn.Sequential(net))
for model in (wrapped, torch.nn.Sequential(wrapped)):
    variables = converters.from_torch(model, input_shape=(3,)).variables
    (kernel,) = [x for x in jax.tree.leaves(variables) if x.ndim == 2]
    assert np.array_equal(kernel, net.weight.detach().numpy().T)
"""


def test_the_module_in_a_distributed_one_is_taken():
    """In a group of one process, which is a process of its own."""
    subprocess.run([sys.executable, "-c", DISTRIBUTED], check=True)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_module_in_what_runs_it_is_taken(wrapper, tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).eval()
    wrapped = WRAPPERS[wrapper](net)
    found = converters.from_torch(wrapped)
    with torch.no_grad():
        np.testing.assert_allclose(found(X), net(torch.from_numpy(X)).numpy(), atol=1e-6)
    assert converters.verify(wrapped, found, input_shape=(3,)).ok
    seen = []
    converters.transform(wrapped, lambda tree: seen.append(fwt.paths(tree)) or fwt.prune(0.5)(tree))
    assert seen == [fwt.paths(found)]
    inner = [m for m in wrapped.modules() if isinstance(m, torch.nn.Linear)]
    assert [int((m.weight == 0).sum()) for m in inner] == [6, 4]
    torch.save(net.state_dict(), tmp_path / "w.pt")
    again = converters.load(tmp_path / "w.pt", architecture=wrapped)
    assert fwt.paths(again) == fwt.paths(found)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_module_in_what_runs_it_is_taken_inside_a_model(wrapper, tmp_path):
    """A layer that is wrapped, and some of them that are wrapped together."""
    wrap = WRAPPERS[wrapper]
    inner = torch.nn.Sequential(torch.nn.Tanh(), torch.nn.BatchNorm1d(4))
    plain = torch.nn.Sequential(torch.nn.Linear(3, 4), inner, torch.nn.Linear(4, 2)).eval()
    wrapped = torch.nn.Sequential(wrap(plain[0]), wrap(plain[1]), plain[2]).eval()
    found, wanted = converters.from_torch(wrapped), converters.from_torch(plain)
    assert fwt.paths(found) == fwt.paths(wanted)
    with torch.no_grad():
        np.testing.assert_allclose(found(X), plain(torch.from_numpy(X)).numpy(), atol=1e-6)
    report = converters.verify(wrapped, found, input_shape=(3,))
    assert report.ok, report
    assert [line.name for line in report.layers] == ["0", "1/0", "1/1", "2"]
    seen = []
    converters.transform(wrapped, lambda tree: seen.append(fwt.paths(tree)) or fwt.prune(0.5)(tree))
    assert seen == [fwt.paths(wanted)]
    first = next(m for m in wrapped.modules() if isinstance(m, torch.nn.Linear))
    assert int((first.weight == 0).sum()) == 6
    for net in (wrapped, plain):  # torch's names have _orig_mod and module in them
        torch.save(net.state_dict(), tmp_path / "w.pt")
        again = converters.load(tmp_path / "w.pt", architecture=wrapped)
        np.testing.assert_array_equal(again(X), converters.from_torch(net)(X))


def test_the_names_of_what_runs_a_module():
    net = torch.nn.Sequential(torch.nn.Linear(3, 2))
    held = torch.optim.swa_utils.AveragedModel(torch.nn.DataParallel(net))
    assert torch_wrappers.names(net) == {}
    assert torch_wrappers.names(held) == {
        "n_averaged": None, "module.module.0.weight": "0.weight", "module.module.0.bias": "0.bias",
    }  # fmt: skip
    net.fast = torch.compile(net)  # a module that holds itself
    seen = []
    converters.transform(net, lambda tree: seen.extend(fwt.paths(tree)) or tree)
    assert seen == ["0/bias", "0/kernel"]


def test_a_hook_of_what_runs_a_module_is_refused():
    wrapped = torch.nn.DataParallel(TORCH)
    wrapped.register_forward_hook(lambda module, args, y: 2 * y)
    with pytest.raises(fwt.ConversionError, match=r"DataParallel has forward hooks.*model\.module"):
        converters.from_torch(wrapped)
    with pytest.raises(fwt.ConversionError, match=r"^0: DataParallel has .*, 0\.module$"):
        converters.from_torch(torch.nn.Sequential(wrapped))


EQX = equinox.nn.MLP(4, 2, 3, 1, key=jax.random.key(0))


class OwnNnx(nnx.Module):
    def __init__(self):
        self.a = nnx.Linear(4, 3, rngs=nnx.Rngs(0))


TARGETS = {
    "save": lambda *m: converters.save("nowhere.npz", *m),
    "to_torch": converters.to_torch,
    "to_keras": converters.to_keras,
    "to_onnx": lambda m, *more: converters.to_onnx(m, *more, "nowhere.onnx"),
}


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_no_model_of_ours_has_a_way_out(target):
    saved = target == "save"
    for given, said in (
        (EQX, r"MLP is an Equinox .*filter\(" if saved else r"MLP is an Equinox .*Sequential\("),
        (OwnNnx(), r"None, nnx.state\(module\)" if saved else "OwnNnx is an nnx .*input_shape="),
        ({"params": {}}, "None, variables" if saved else r"found variables alone, a dict"),
        (nnx.state(OwnNnx()), "None, variables" if saved else "found variables alone, a State"),
    ):
        with pytest.raises(fwt.ConversionError, match=said):
            TARGETS[target](given)
    with pytest.raises(fwt.ConversionError, match="holds its variables, so dict after it"):
        TARGETS[target](nnx.Sequential(), {"params": {}})


def test_the_ways_out_are_ways(tmp_path):
    with pytest.raises(fwt.ConversionError, match="expected a variables dict, found MLP; of an Eq"):
        converters.save(tmp_path / "e.npz", None, EQX)
    with pytest.raises(fwt.ConversionError, match="found OwnNnx; of an nnx module"):
        converters.save(tmp_path / "e.npz", None, OwnNnx())
    arrays = {"params": equinox.filter(EQX, equinox.is_array)}
    converters.save(tmp_path / "e.npz", None, arrays)
    converters.save(tmp_path / "n.npz", None, nnx.state(OwnNnx()))
    for name, tree in (("e", EQX), ("n", OwnNnx())):
        found = converters.load(tmp_path / f"{name}.npz").variables
        assert all(map(np.array_equal, fwt.select(found).values(), fwt.select(tree).values()))


def test_an_nnx_sequential_is_one_model(tmp_path):
    net = nnx.Sequential(
        nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.tanh, nnx.BatchNorm(4, rngs=nnx.Rngs(1))
    )
    net.layers[2].mean[...] = np.arange(4.0)
    net.eval()
    wanted = np.asarray(net(X))
    converters.save(tmp_path / "n.safetensors", net)
    again = converters.load(tmp_path / "n.safetensors")
    live = converters.to_torch(net, input_shape=(3,))
    with torch.no_grad():
        found = [np.asarray(again(X)), live(torch.from_numpy(X)).numpy()]
    found.append(np.asarray(converters.to_keras(net, input_shape=(3,))(X)))
    converters.to_onnx(net, tmp_path / "n.onnx", input_shape=(3,))
    session = onnxruntime.InferenceSession(tmp_path / "n.onnx")
    found.append(session.run(None, {"input": X})[0])
    for each in found:
        np.testing.assert_allclose(each, wanted, atol=1e-6)


def test_a_path_or_a_state_dict_in_the_place_of_a_model_is_told_its_function(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(3, 2))
    model = converters.from_torch(net)
    for call, said in (
        (lambda: converters.to_torch("k.keras"), r"found the path 'k.keras': load\(path\)"),
        (lambda: converters.to_keras(tmp_path / "k.pt"), r"k.pt': load\(path\)"),
        (lambda: converters.to_onnx("x.onnx", model), "'x.onnx': give the model first"),
        (lambda: converters.load(net.state_dict(), architecture=model), r"torch\.save\(state"),
    ):
        with pytest.raises(converters.ConversionError, match=said):
            call()


class Keeps(nn.Module):
    """What is no param may be bool."""

    @nn.compact
    def __call__(self, x):
        keep = self.variable("consts", "keep", lambda: np.array([True, False, True]))
        return jax.numpy.where(keep.value, x, 0.0)


def test_a_model_of_bools_that_are_no_params_is_one():
    variables = {"params": {}, "consts": {"keep": np.array([True, False, True])}}
    made = converters.to_torch(fwt.Model(Keeps(), variables), input_shape=(3,))
    np.testing.assert_array_equal(made(torch.ones(2, 3)).numpy(), [[1, 0, 1]] * 2)


def test_masks_of_a_model_are_saved_as_they_are(tmp_path):
    model = converters.from_keras(KERAS)
    masks = fwt.masks_of(fwt.prune(0.5)(model))
    for name in ("m.safetensors", "m.npz", "m.msgpack", "m.pt", "m.orbax"):
        with pytest.raises(fwt.ConversionError, match=r"masks.*save\(path, None, masks\)"):
            converters.save(tmp_path / name, masks)
        converters.save(tmp_path / name, None, masks)
        back = converters.load(tmp_path / name).variables
        jax.tree.map(np.testing.assert_array_equal, back, masks.variables)
    with pytest.raises(fwt.ConversionError, match="these are masks"):
        converters.to_torch(masks)
