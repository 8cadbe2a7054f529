"""The names that torch and Keras have for their weights, where paths of a live model are given."""

import jax
import keras
import numpy as np
import pytest
import torch

import fwt
from fwt import converters


class Own(torch.nn.Module):
    """A layer of the user's own, whose weight keeps its name."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3, 4))


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        block = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.BatchNorm2d(5))
        self.layer1 = torch.nn.Sequential(block)
        self.emb, self.lstm = torch.nn.Embedding(7, 4), torch.nn.LSTM(4, 3)
        self.fc, self.own = torch.nn.Linear(5, 3), Own()
        self.low = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 2))


def changed_torch(net, where):
    """The torch names of what a transform changes."""
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    halved = fwt.at(where, lambda tree: jax.tree.map(lambda w: w / 2, tree))
    converters.transform(net, halved)
    found = {n for n, p in net.named_parameters() if not torch.equal(p, before[n])}
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(before[name])
    return found


def ends(net, *suffixes):
    return {n for n, _ in net.named_parameters() if n.endswith(suffixes)}


def test_every_name_of_torch_is_understood():
    net = Net()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1.5)  # no zeros, which halving would not change
    for name, _ in net.named_parameters():
        if "parametrizations" not in name:
            assert changed_torch(net, name) == {name}
            assert changed_torch(torch.nn.DataParallel(net), f"module.{name}") == {f"module.{name}"}
    assert changed_torch(net, "low.weight") == ends(net, "original0", "original1")
    both = ["fc.weight", "layer1.0.0.weight"]
    assert changed_torch(net, both) == set(both)
    weights = ends(net, ".weight", "original0", "original1")
    assert changed_torch(net, "**.weight") == weights
    assert changed_torch(net, "layer1.**") == {n for n in ends(net, "") if n.startswith("layer1.")}
    assert changed_torch(net, "fc.*") == {"fc.weight", "fc.bias"}
    assert changed_torch(net, "fc.kernel") == {"fc.weight"}  # Flax's names with dots, as before
    assert changed_torch(net, "layer1/*/0/weight") == {"layer1.0.0.weight"}
    alone = torch.nn.Linear(3, 2)
    assert changed_torch(alone, "weight") == {"weight"}


def test_names_of_torch_that_may_mean_two_things_are_refused():
    net = Net()
    for where, said in (
        (
            "*.weight",
            r"not name layer1.0.0.weight, since \* stays .*'\*\*.weight' does: write that",
        ),
        ("layer1.*", r"'layer1.\*\*' does: .* slashes, 'layer1/\*'"),
        ("layer1.*.w*", r"'layer1.\*\*.w\*' does"),
        (
            "**/weight",
            r"names own/weight by its path, and .*/weight by .*'\*\*.weight', it is read",
        ),
        ("**/*weight*", r"names (lstm|own)/weight\w* by its path, and "),
        ("fc", r"matches none .*'fc/\*\*' takes all that is inside"),
        ("conv.weight", "close: "),
        ("0.weight", "close: 'layer1/0/0/kernel'"),
    ):
        with pytest.raises(fwt.WhereError, match=said):
            converters.transform(net, fwt.prune(0.5, where=where))
    assert changed_torch(net, "own/weight") == {"own.weight"}


def test_names_of_torch_hold_in_scopes_and_axes_but_not_for_arrays():
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    scope = {"1.weight": 0.25, "**": 0.5}
    converters.transform(net, fwt.prune(scope=scope))
    assert [int((x.weight == 0).sum()) for x in net] == [8, 4]
    said = "the path of that is '0/kernel', with the axes of Flax"
    mask = np.tri(4, dtype=bool)  # which would be applied the wrong way round
    for t in (
        fwt.apply_masks({"0.weight": mask}),
        fwt.assign({"0.weight": np.ones((4, 4), np.float32)}),
        fwt.project(fwt.constraints.max_norm(1.0), masks={"0.weight": mask}),
    ):
        with pytest.raises(fwt.LeafError, match=said):
            converters.transform(net, t)
    before = net[0].weight.detach().numpy().copy()
    converters.transform(net, fwt.apply_masks({"0/kernel": mask, "1.bias": np.zeros(4, bool)}))
    assert np.array_equal(net[0].weight.detach(), np.where(mask.T, before, 0))
    assert not net[1].bias.detach().any()


def test_a_tie_of_torch_is_taken_by_either_of_its_names():
    for where in ("emb.weight", "head.weight"):
        net = torch.nn.Module()
        net.emb, net.head = torch.nn.Embedding(5, 4), torch.nn.Linear(4, 5, bias=False)
        net.head.weight = net.emb.weight
        converters.transform(net, fwt.prune(0.5, where=where))
        assert int((net.emb.weight == 0).sum()) == 10
        assert net.head.weight is net.emb.weight
    twice = torch.nn.Module()
    twice.a = twice.b = torch.nn.Linear(4, 5)
    converters.transform(twice, fwt.prune(0.5, where="b.weight"))
    assert int((twice.a.weight == 0).sum()) == 10


def test_reset_takes_the_names_of_running_statistics():
    net = torch.nn.Sequential(torch.nn.BatchNorm1d(3))
    net[0].running_mean += 2
    net[0].running_var += 2
    converters.transform(net, fwt.reset(0, "torch", where="0.running_mean"))
    assert not net[0].running_mean.any()
    assert net[0].running_var.tolist() == [3.0] * 3


class Sub(keras.Model):
    def __init__(self):
        super().__init__(name="sub")
        norm = keras.layers.LayerNormalization(name="ln")
        self.block = keras.Sequential([keras.layers.Dense(4, name="inner"), norm], name="blk")
        self.table = keras.layers.Embedding(5, 4, name="emb")

    def call(self, x):
        return self.block(x) + self.table(keras.ops.zeros_like(x[:, 0], dtype="int32"))


def keras_models():
    layers = [keras.layers.Conv2D(4, 3, name="conv"), keras.layers.BatchNormalization(name="bn")]
    layers += [keras.layers.Flatten(name="flat"), keras.layers.Dense(2, name="last")]
    line = keras.Sequential([keras.Input((5, 6, 3)), *layers], name="seq")
    sub = Sub()
    sub(np.ones((1, 3), np.float32))
    x = keras.Input((4, 3))
    attention = keras.layers.MultiHeadAttention(2, 3, name="mha")
    return line, sub, keras.Model(x, attention(x, x), name="functional")


def changed_keras(model, where):
    before = [v.numpy() for v in model.variables]
    converters.transform(model, fwt.initialize(fwt.initializers.constant(7.0), 0, where=where))
    found = [v.path for v, x in zip(model.variables, before, strict=True) if (v.numpy() != x).any()]
    for v, x in zip(model.variables, before, strict=True):
        v.assign(x)
    return found


def test_every_path_of_a_variable_of_keras_is_understood():
    line, sub, attention = keras_models()
    for model in (line, sub, attention):
        for v in model.trainable_variables:
            for name in (v.path, f"{v.path}:0"):
                assert changed_keras(model, name) == [v.path], name
    assert changed_keras(line, "bn/gamma:0") == ["seq/bn/gamma"]
    assert changed_keras(line, "*/gamma") == ["seq/bn/gamma"]
    assert changed_keras(line, "last.kernel") == ["seq/last/kernel"]
    assert changed_keras(line, "seq/*/kernel") == ["seq/conv/kernel", "seq/last/kernel"]
    assert changed_keras(sub, "**/embeddings") == ["sub/emb/embeddings"]
    with pytest.raises(fwt.WhereError, match="close: 'blk/ln/scale'"):
        changed_keras(sub, "gamma")


class Twice(keras.Model):
    def __init__(self):
        super().__init__(name="twice")
        self.one, self.two = keras.layers.Dense(3, name="d"), keras.layers.Dense(3, name="d")

    def call(self, x):
        return self.two(self.one(x))


def test_a_path_that_two_variables_of_keras_have_is_refused():
    model = Twice()
    model(np.ones((1, 3), np.float32))
    assert [v.path for v in model.variables].count("twice/d/kernel") == 2
    with pytest.raises(fwt.WhereError, match="names d/kernel and d_1/kernel: write which"):
        changed_keras(model, "twice/d/kernel")
    converters.transform(model, fwt.prune(1.0, where="d_1/kernel"))
    assert model.one.kernel.numpy().any()
    assert not model.two.kernel.numpy().any()


def test_a_converted_model_names_the_path_of_a_weight_of_torch():
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    model = converters.from_torch(net, (4,))
    for name, path in (("0.weight", "0/kernel"), ("**.weight", r"\*\*/kernel"),
                       ("1/gamma", "1/scale")):  # fmt: skip
        with pytest.raises(fwt.WhereError, match=f"in the names of Flax that is '{path}'"):
            fwt.prune(0.5, where=name)(model)
