"""``weights`` and ``assign``: the weights of a model as a tree, and the way back."""

import cases
import flax.linen as nn
import jax
import keras
import numpy as np
import pytest
import torch
from compare import in_keras, in_torch
from flax import nnx

import fwt
from fwt import converters

FRAMEWORKS = {
    "keras": (cases.KERAS, cases.randomise_keras, in_keras, converters.from_keras),
    "torch": (cases.TORCH, cases.randomise_torch, in_torch, converters.from_torch),
}
MODELS = [(f, n) for f, (table, *_) in FRAMEWORKS.items() for n in table]


def same(one, other):
    assert one.keys() == other.keys()
    for path, x in one.items():
        assert np.asarray(x).tobytes() == np.asarray(other[path]).tobytes(), path


@pytest.mark.parametrize(("framework", "name"), MODELS)
def test_weights_come_back_as_they_were(framework, name):
    table, randomise, run, _ = FRAMEWORKS[framework]
    shape, make = table[name]
    model = make()
    x = np.random.default_rng(3).normal(size=(2, *shape)).astype(np.float32)
    if name.startswith("embedding"):
        x = np.abs(x * 3).astype(np.int32)
    before = run(model, x)
    if not model.state_dict() if framework == "torch" else not model.variables:
        with pytest.raises(fwt.ConversionError, match="has no floating weights"):
            converters.weights(model)
        return
    held = converters.weights(model)
    kept = jax.tree.map(np.array, held)
    randomise(model, 1)
    assert any(
        y.tobytes() != np.asarray(z).tobytes()
        for y, z in zip(
            jax.tree.leaves(kept), jax.tree.leaves(converters.weights(model)), strict=True
        )
    )
    same(fwt.select({"params": held}), fwt.select({"params": kept}))  # no views of the model
    assert converters.assign(model, held) is model
    np.testing.assert_array_equal(run(model, x), before)
    assert fwt.diff(model, kept).equal


@pytest.mark.parametrize(
    ("framework", "name"), [("keras", "mlp"), ("torch", "mlp"), ("torch", "conv_groups_same")]
)
def test_names_and_axes_are_those_of_the_converted_model(framework, name):
    table, _, _, convert = FRAMEWORKS[framework]
    shape, make = table[name]
    model = make()
    given = {"input_shape": shape} if framework == "torch" else {}
    found, wanted = converters.weights(model), convert(model, **given).variables
    for part in wanted:
        mine = {p: x for p, x in fwt.select({"params": found[part]}).items() if "batches" not in p}
        same(mine, fwt.select({"params": wanted[part]}))


class Twice(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, use_running_average=True, rngs=rngs)
        self.drop = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
        self.second = self.first

    def __call__(self, x):
        return self.second(self.drop(self.norm(self.first(x))))


def test_an_nnx_module():
    model = Twice(nnx.Rngs(0))
    model.norm.mean[...] = np.arange(3.0)
    x = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    before, held = np.asarray(model(x)), converters.weights(model)
    assert sorted(held["params"]) == ["first", "norm", "second"]
    other = Twice(nnx.Rngs(1))
    assert converters.assign(other, held) is other
    np.testing.assert_array_equal(other(x), before)
    assert other.second is other.first
    converters.assign(other, {"second/kernel": np.ones((3, 3), np.float32)})
    assert other.first.kernel[...].min() == 1
    apart = {
        p: np.full((3, 3), i, np.float32) for i, p in enumerate(["first/kernel", "second/kernel"])
    }
    with pytest.raises(fwt.LeafError, match="one array"):
        converters.assign(other, apart)


def test_a_file_and_a_model(tmp_path):
    net = fwt.Sequential([("d", nn.Dense(2)), ("n", nn.BatchNorm())], (3,))
    model = fwt.Model(net, net.init(jax.random.key(0), np.ones((1, 3), np.float32)))
    converters.save(tmp_path / "net.keras", model)
    held = converters.weights(tmp_path / "net.keras")
    same(fwt.select(held), fwt.select(converters.weights(model)))
    assert fwt.diff(tmp_path / "net.keras", model).equal
    new = converters.assign(model, {"batch_stats": {"n": {"mean": np.full(2, 3, np.float32)}}})
    assert new.variables["batch_stats"]["n"]["mean"].tolist() == [3, 3]
    assert new.module == net
    assert np.asarray(model.variables["batch_stats"]["n"]["mean"]).tolist() == [0, 0]


def test_masks_of_a_live_model_are_those_of_its_axes():
    grouped = torch.nn.Sequential(torch.nn.ConvTranspose2d(4, 6, 3, groups=2))
    kept = fwt.masks(0.5, scope="output")(grouped)
    inside = {}
    converters.transform(
        grouped, lambda tree: inside.update(m=fwt.masks(0.5, scope="output")(tree)) or tree
    )
    same(fwt.select(kept), fwt.select(inside["m"]))
    converters.transform(grouped, fwt.apply_masks(kept))
    assert int((grouped[0].weight == 0).sum()) == grouped[0].weight.numel() // 2
    same(fwt.select(fwt.masks_of(grouped)), fwt.select(kept))


KERAS = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="d")])
TORCH = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
BAD = [
    (TORCH, {"0/kernel": np.zeros((2, 3), np.float32)}, r"0/kernel expected shape \(3, 2\)"),
    (TORCH, {"0": {"kernel": np.zeros((3, 2))}}, "expected dtype float32, found float64"),
    (TORCH, {"0/kernle": np.zeros(2)}, "no leaf '0/kernle'; close: '0/kernel'"),
    (TORCH, {"params": {}, "states": {}}, "'states' is neither"),
    (KERAS, {"params": {}, "batch_stats": {}}, "the model has no batch_stats"),
    (TORCH, 3, "assign takes a tree, .* found int"),
    ({"a": np.ones(2)}, {"a": np.ones(2)}, r"assign takes .*call fwt.assign\(values\) on it"),
]


@pytest.mark.parametrize(("model", "tree", "match"), BAD)
def test_what_does_not_fit_changes_nothing(model, tree, match):
    before = [] if isinstance(model, dict) else fwt.select(converters.weights(model))
    with pytest.raises((fwt.FwtError, TypeError), match=match):
        converters.assign(model, tree)
    if before:
        same(fwt.select(converters.weights(model)), before)
    with pytest.raises(fwt.FwtError, match=r"weights takes .*the path of a file"):
        converters.weights([model])
