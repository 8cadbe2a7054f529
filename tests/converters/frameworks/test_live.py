"""converters.transform: live models of any shape, in place."""

import copy
import os
import subprocess
import sys

import cases
import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
import torch
from torch.nn.utils import parametrizations, prune

import fwt
from fwt import converters
from fwt.converters.frameworks import live

zeros = fwt.initialize(fwt.initializers.zeros, 0)


class TorchNet(torch.nn.Module):
    """Not sequential: a tie, an embedding, a recurrent layer, a buffer, half precision."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(11, 6)
        self.conv = torch.nn.Conv2d(1, 3, (2, 3), groups=1)
        self.norm = torch.nn.BatchNorm2d(3)
        self.rnn = torch.nn.LSTM(6, 5)
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(5, 5) for _ in range(11)])
        self.attention = torch.nn.MultiheadAttention(6, 2)
        self.head = torch.nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.low = torch.nn.Linear(3, 2).to(torch.bfloat16)
        self.wide = torch.nn.Linear(3, 2).double()
        self.frozen = torch.nn.Linear(3, 2).requires_grad_(False)
        self.params = torch.nn.Linear(2, 2)
        self.counts = torch.nn.Parameter(torch.arange(4), requires_grad=False)
        self.register_buffer("steps", torch.tensor(3))


def snapshot(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def changed(model, before):
    return {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}


@pytest.fixture
def net():
    torch.manual_seed(0)
    return TorchNet()


def test_paths_and_axes_are_flaxs(net):
    seen = {}

    def look(tree):
        seen.update({p: x.shape for p, x in fwt.select(tree, "**").items()})
        return tree

    before = snapshot(net)
    assert converters.transform(net, look) is net
    assert seen["conv/kernel"] == (2, 3, 1, 3)
    assert seen["blocks/10/kernel"] == (5, 5)
    assert seen["embed/embedding"] == (11, 6)
    assert seen["norm/scale"] == (3,)
    assert seen["params/kernel"] == (2, 2)
    assert seen["rnn/weight_ih_l0"] == (20, 6)
    assert not any("running" in p or p.startswith("head") or "counts" in p for p in seen)
    assert list(seen).index("blocks/2/kernel") < list(seen).index("blocks/10/kernel")
    assert not changed(net, before)


def test_only_the_selected_change_and_storage_survives(net):
    before = snapshot(net)
    pointers = {k: v.data_ptr() for k, v in net.state_dict(keep_vars=True).items()}
    ids = {k: id(v) for k, v in net.named_parameters()}
    converters.transform(net, fwt.prune(0.5, where=["conv/kernel", "low/kernel", "frozen/kernel"]))
    assert changed(net, before) == {"conv.weight", "low.weight", "frozen.weight"}
    assert {k: v.data_ptr() for k, v in net.state_dict(keep_vars=True).items()} == pointers
    assert {k: id(v) for k, v in net.named_parameters()} == ids
    assert net.head.weight is net.embed.weight
    assert net.low.weight.dtype == torch.bfloat16
    assert not net.frozen.weight.requires_grad
    assert int((net.conv.weight == 0).sum()) == 9
    # The same weights are pruned as in the tree that from_torch gives.
    kernel = before["conv.weight"].numpy().transpose(2, 3, 1, 0)
    expected = fwt.prune(0.5)({"conv": {"kernel": kernel}})["conv"]["kernel"]
    assert np.array_equal(net.conv.weight.detach().numpy().transpose(2, 3, 1, 0), expected)


def test_kernels_by_default(net):
    del net.wide
    before = snapshot(net)
    converters.transform(net, fwt.prune(0.5))
    assert changed(net, before) == {
        "conv.weight",
        "rnn.weight_ih_l0",
        "rnn.weight_hh_l0",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "low.weight",
        "frozen.weight",
        "params.weight",
        *(f"blocks.{i}.weight" for i in range(11)),
    }


def test_memory_formats_and_transposed_parameters():
    conv = torch.nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    linear = torch.nn.Linear(3, 4)
    linear.weight = torch.nn.Parameter(torch.randn(3, 4).t())
    net = torch.nn.ModuleDict({"conv": conv, "linear": linear})
    strides = conv.weight.stride(), linear.weight.stride()
    value = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    converters.transform(net, fwt.chain(fwt.assign({"linear/kernel": value}), fwt.prune(0.5)))
    assert (conv.weight.stride(), linear.weight.stride()) == strides
    kept = np.asarray(fwt.prune(0.5)({"a": {"kernel": value}})["a"]["kernel"])
    assert np.array_equal(linear.weight.detach().numpy().T, kept)


def test_optimizer_goes_on(net):
    optimizer = torch.optim.SGD(list(net.conv.parameters()), 0.1)
    converters.transform(net, fwt.prune(1.0, where="conv/kernel"))
    net.conv(torch.ones(1, 1, 4, 4)).sum().backward()
    optimizer.step()
    assert (net.conv.weight != 0).any()


@pytest.mark.parametrize(
    "t",
    [
        lambda: fwt.prune(0.5),  # reaches a float64 weight
        lambda: fwt.prune(0.5, where="nothing/*"),
        lambda: fwt.assign({"conv/kernel": np.ones(3, np.float32)}),
        lambda: fwt.chain(fwt.prune(0.5, where="conv/kernel"), fwt.assign({"zzz": np.ones(3)})),
        lambda: lambda tree: {"params": {}},
        lambda: lambda tree: jax.tree.map(lambda x: x[:1], tree),
        lambda: lambda tree: jax.tree.map(lambda x: x.astype(jnp.float16), tree),
    ],
)
def test_a_failure_leaves_the_model_as_it_was(net, t):
    before = snapshot(net)
    with pytest.raises(fwt.FwtError):
        converters.transform(net, t())
    assert not changed(net, before)


def test_float64_goes_through_x64(net):
    with pytest.raises(fwt.LeafError, match="wide/kernel is float64"):
        converters.transform(net, fwt.prune(0.5))
    with jax.enable_x64(True):
        converters.transform(net, fwt.prune(0.5))
    assert net.wide.weight.dtype == torch.float64
    assert int((net.wide.weight == 0).sum()) == 3


def test_nan_and_negative_zero_count_as_unchanged_or_changed_by_bits():
    net = torch.nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[float("nan"), -0.0]]))
    version = net.weight._version
    converters.transform(net, lambda tree: tree)
    converters.transform(net, fwt.at("kernel", lambda t: jax.tree.map(jnp.asarray, t)))
    assert net.weight._version == version
    converters.transform(net, fwt.prune(0.5))
    assert not torch.signbit(net.weight[0, 1])
    assert net.weight._version > version


def test_meta_tensors_and_strangers_are_refused():
    with pytest.raises(converters.ConversionError, match="meta"):
        converters.transform(torch.nn.Linear(2, 2, device="meta"), zeros)
    with pytest.raises(converters.ConversionError, match="dict"):
        converters.transform({"a": np.ones(2)}, zeros)
    with pytest.raises(converters.ConversionError, match="no floating weights"):
        converters.transform(torch.nn.ReLU(), zeros)
    with pytest.raises(converters.ConversionError, match="no floating weights"):
        converters.transform(keras.Sequential([keras.layers.Dense(2)]), zeros)


def keras_functional():
    k = keras.layers
    a = keras.Input((6, 5, 2), name="image")
    b = keras.Input((4,), dtype="int32", name="words")
    x = k.Conv2D(3, 2, name="conv")(a)
    x = k.BatchNormalization(name="norm")(x)
    x = k.GlobalAveragePooling2D()(x)
    y = k.Embedding(9, 3, name="embed")(b)
    y = k.LSTM(3, name="rnn")(y)
    inner = keras.Sequential([k.Dense(3, name="dense")], name="inner")
    z = k.Add()([inner(x), y])
    z = k.Dropout(0.5)(z)
    outputs = k.Dense(2, name="head")(inner(z))
    return cases.randomise_keras(keras.Model([a, b], outputs))


def test_keras_of_any_shape():
    model = keras_functional()
    model.get_layer("head").trainable = False
    before = {v.path: np.asarray(v).copy() for v in model.variables}
    ids = {v.path: id(v) for v in model.variables}
    seen = []
    converters.transform(model, lambda tree: seen.extend(fwt.paths(tree)) or tree)
    assert set(seen) == {
        "conv/kernel", "conv/bias", "norm/scale", "norm/bias", "embed/embedding",
        "inner/dense/kernel", "inner/dense/bias", "head/kernel", "head/bias",
        "rnn/lstm_cell/kernel", "rnn/lstm_cell/recurrent_kernel", "rnn/lstm_cell/bias",
    }  # fmt: skip
    converters.transform(model, fwt.prune(0.5))
    names = {v.path for v in model.variables if not np.array_equal(v, before[v.path])}
    assert {p.rsplit("/", 1)[1] for p in names} == {"kernel", "recurrent_kernel"}
    assert len(names) == 5
    assert {v.path: id(v) for v in model.variables} == ids
    assert np.mean(np.asarray(model.get_layer("head").kernel) == 0) == 0.5
    assert np.asarray(model.get_layer("norm").gamma).all()


def test_keras_subclassed_and_mixed_precision():
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.first = keras.layers.Dense(4, dtype="mixed_float16", name="first")
            self.half = keras.layers.Dense(2, dtype="bfloat16", name="half")

        def call(self, x):
            return self.half(self.first(x))

    net = Net()
    net(np.ones((1, 3), np.float32))
    converters.transform(net, fwt.prune(0.5))
    assert keras.backend.standardize_dtype(net.half.kernel.dtype) == "bfloat16"
    assert int((np.asarray(net.half.kernel).astype(np.float32) == 0).sum()) == 4
    assert int((np.asarray(net.first.kernel) == 0).sum()) == 6


def test_transform_gives_the_tree_that_from_gives():
    for table, convert in (
        (cases.KERAS, converters.from_keras),
        (cases.TORCH, converters.from_torch),
    ):
        _, build = table["conv_flatten"]
        model = build()
        there = fwt.select(convert(model), "**")
        seen = {}
        converters.transform(model, lambda tree, seen=seen: seen.update(fwt.select(tree)) or tree)
        assert list(seen) == list(there)
        for path, value in there.items():
            if value.ndim == 4 or value.size < 12:  # nothing is permuted for Flatten
                assert np.array_equal(seen[path], value)
            assert seen[path].shape == value.shape


def test_a_model_gives_a_new_model():
    model = converters.from_torch(torch.nn.Sequential(torch.nn.Linear(4, 2)))
    before = copy.deepcopy(model.variables)
    new = converters.transform(model, fwt.prune(0.5))
    assert int((new.variables["params"]["0"]["kernel"] == 0).sum()) == 4
    assert np.array_equal(model.variables["params"]["0"]["kernel"], before["params"]["0"]["kernel"])


def test_leaves_are_snapshots():
    net = torch.nn.Sequential(*(torch.nn.Linear(2, 2, bias=False) for _ in "ab"))
    a, b = (layer.weight.detach().clone() for layer in net)
    kept = []

    def swap(tree):
        kept.append(tree["params"]["0"]["kernel"])
        return {"params": {"0": tree["params"]["1"], "1": tree["params"]["0"]}}

    converters.transform(net, swap)
    assert torch.equal(net[0].weight, b)
    assert torch.equal(net[1].weight, a)
    assert np.array_equal(kept[0], a.numpy().T)

    def scribble(tree):
        tree["params"]["0"]["kernel"][...] = 0

    with pytest.raises(ValueError, match="read-only"):
        converters.transform(net, scribble)
    assert torch.equal(net[0].weight, b)


def test_a_write_that_fails_is_undone():
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    net[1].weight = torch.nn.Parameter(torch.ones(1, 2).expand(2, 2))  # can't be written in place
    before = snapshot(net)
    with pytest.raises(converters.ConversionError, match="1/kernel can't be written"):
        converters.transform(net, fwt.initialize(fwt.initializers.uniform(1.0), 0))
    assert not changed(net, before)
    with pytest.raises(converters.ConversionError, match="lazy"):
        converters.transform(torch.nn.Sequential(torch.nn.LazyLinear(3)), zeros)


def test_norms_and_fans_follow_the_class_whatever_the_name():
    net = torch.nn.ModuleDict(
        {
            "up": torch.nn.ConvTranspose2d(8, 16, 3),
            "query": torch.nn.Conv1d(5, 7, 3),
            "out": torch.nn.Conv1d(5, 7, 3),
        }
    )
    converters.transform(net, fwt.initialize(fwt.initializers.normal(1.0), 0))
    converters.transform(net, fwt.project(fwt.constraints.unit_norm))
    up = net["up"].weight.detach().square().sum((0, 2, 3))
    assert torch.allclose(up, torch.ones(16))
    for name in ("query", "out"):
        assert torch.allclose(net[name].weight.detach().square().sum((1, 2)), torch.ones(7))
    converters.transform(net, fwt.initialize(fwt.initializers.lecun_uniform, 0))
    bound = (3 / (8 * 9)) ** 0.5
    assert 0.95 * bound < float(net["up"].weight.detach().abs().max()) <= bound
    depthwise = keras.Sequential([keras.Input((5, 5, 3)), keras.layers.DepthwiseConv2D(2)])
    converters.transform(depthwise, fwt.project(fwt.constraints.l2_sphere(2.0)))
    np.testing.assert_allclose(
        (np.asarray(depthwise.layers[0].kernel) ** 2).sum((0, 1)), 4, rtol=1e-5
    )
    embeddings = torch.nn.ModuleDict(
        {"bag": torch.nn.EmbeddingBag(4, 3), "e": torch.nn.Linear(2, 2)}
    )
    assert fwt.kernels.paths_of  # and only kernels are taken
    converters.transform(embeddings, fwt.prune(1.0))
    assert embeddings["bag"].weight.all()
    with pytest.raises(fwt.AxesError, match="bag/embedding"):
        converters.transform(embeddings, fwt.project(fwt.constraints.unit_norm, "bag/*"))


@pytest.mark.thorough  # of the thorough run alone, which is on JAX, where training keeps the values
def test_keras_while_it_trains():
    net = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, name="d")])
    net.compile(keras.optimizers.SGD(1.0), "mse")
    seen = []

    def project(batch, logs):
        kernel = converters.from_keras(net).variables["params"]["d"]["kernel"]
        converters.transform(net, fwt.project(fwt.constraints.max_norm(0.05)))
        seen.append((np.linalg.norm(kernel, axis=0).max(), np.asarray(net.layers[0].bias).copy()))

    x = np.random.default_rng(0).normal(size=(24, 8))
    y = 3 * x[:, :4]
    callback = keras.callbacks.LambdaCallback(on_train_batch_end=project)
    net.fit(x, y, batch_size=8, epochs=2, verbose=0, callbacks=[callback])
    assert len(seen) == 6
    assert all(norm > 0.05 for norm, _ in seen)  # training went on from what was written
    assert len({bias.tobytes() for _, bias in seen}) == 6
    assert np.linalg.norm(np.asarray(net.layers[0].kernel), axis=0).max() <= 0.05 + 1e-6


def test_keras_names_that_repeat():
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.layers_ = [keras.layers.Dense(2, name=n) for n in ("d", "d", "d_1")]
            for _ in "ab":
                self.add_weight(shape=(2, 2), name="kernel")

        def call(self, x):
            for layer in self.layers_:
                x = layer(x)
            return x

    net = Net()
    net(np.ones((1, 2), np.float32))
    seen = []
    converters.transform(net, lambda tree: seen.extend(fwt.paths(tree)) or tree)
    assert [p for p in seen if p.endswith("kernel")] == [
        "d/kernel", "d_1/kernel", "d_2/kernel", "kernel",
    ]  # fmt: skip
    converters.transform(net, fwt.initialize(fwt.initializers.zeros, 0, "d_1/kernel"))
    assert not np.asarray(net.layers_[2].kernel).any()
    assert np.asarray(net.layers_[1].kernel).any()


def test_statistics_of_the_data_are_no_weights():
    norm = keras.layers.Normalization()
    norm.adapt(np.arange(12.0, dtype=np.float32).reshape(4, 3))
    net = keras.Sequential([keras.Input((3,)), norm, keras.layers.Dense(2, name="d")])
    seen = []
    converters.transform(net, lambda tree: seen.extend(fwt.paths(tree)) or tree)
    assert seen == ["d/bias", "d/kernel"]


def test_memory_that_two_parameters_share():
    base = torch.randn(4, 4)
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    net[0].weight, net[1].weight = torch.nn.Parameter(base), torch.nn.Parameter(base)
    seen = []
    converters.transform(net, lambda tree: seen.extend(fwt.paths(tree)) or tree)
    assert seen == ["0/bias", "0/kernel", "1/bias"]
    converters.transform(net, fwt.prune(0.5))
    assert int((net[1].weight == 0).sum()) == 8
    net[1].weight = torch.nn.Parameter(base.t())
    with pytest.raises(converters.ConversionError, match="share memory"):
        converters.transform(net, zeros)
    flat = torch.randn(32)  # neighbours in one buffer are no tie
    net[0].weight = torch.nn.Parameter(flat[:16].view(4, 4))
    net[1].weight = torch.nn.Parameter(flat[16:].view(4, 4))
    converters.transform(net, fwt.prune(1.0, where="0/kernel"))
    assert not flat[:16].any()
    assert flat[16:].all()


def two_linear():
    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))


def pruned_of_one_memory(first, second=0):
    def make():
        net = two_linear()
        net[1 - first].weight = torch.nn.Parameter(net[first].weight.data)
        prune.l1_unstructured(net[second], "weight", 0.5)
        return net

    return make


def parametrized_of_one_memory():
    net = two_linear()
    net[1].weight = torch.nn.Parameter(net[0].weight.data)
    torch.nn.utils.parametrize.register_parametrization(net[1], "weight", torch.nn.Identity())
    return net


def masked_by_one_mask():
    net = two_linear()
    for layer in net:
        prune.identity(layer, "weight")
    net[1].weight_mask = net[0].weight_mask
    return net


@pytest.mark.parametrize(
    "make",
    [
        pruned_of_one_memory(0, 1),
        pruned_of_one_memory(1, 0),
        parametrized_of_one_memory,
        masked_by_one_mask,
    ],
)
@pytest.mark.parametrize("where", ["0/kernel", "1/kernel"])
def test_memory_that_a_computed_weight_shares_is_not_written(make, where):
    torch.manual_seed(0)
    net = make()
    before = snapshot(net)
    with pytest.raises(converters.ConversionError, match=r"[01]/kernel are computed from one"):
        converters.transform(net, fwt.initialize(fwt.initializers.ones, 0, where))
    assert not changed(net, before)
    converters.transform(net, fwt.initialize(fwt.initializers.ones, 0, "*/bias"))
    assert net[0].bias.all()


def test_a_part_of_memory_that_a_computed_weight_is_made_of_is_refused():
    net = two_linear()
    net[1].weight = torch.nn.Parameter(net[0].weight.data.t())
    prune.identity(net[1], "weight")
    with pytest.raises(converters.ConversionError, match=r"1.weight_orig and 0.weight share mem"):
        converters.transform(net, zeros)


def test_one_torch_module_under_two_names_has_both():
    one = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    net = torch.nn.ModuleDict({"a": one, "b": one, "c": torch.nn.Linear(4, 4)})
    converters.transform(net, fwt.prune(0.5))
    assert [int((x.weight == 0).sum()) for x in (one[0], net["c"])] == [8, 8]
    converters.transform(net, fwt.prune(1.0, where="b/0/kernel"))
    assert not one[0].weight.any()
    with pytest.raises(fwt.WhereError, match="a/0/kernel and b/0/kernel are one array"):
        converters.transform(net, fwt.prune(1.0, where="a/*/kernel"))
    one[1].running_mean.fill_(3)
    converters.transform(net, fwt.reset(0, like="torch"))
    assert not one[1].running_mean.any()
    one.append(one)  # inside itself
    assert len(live._backend(net).leaves(net)) == 9


def test_one_keras_layer_under_two_names_has_both():
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            shared = keras.layers.Dense(4, name="shared")
            self.a = keras.Sequential([keras.Input((4,)), shared], name="a")
            self.b = keras.Sequential([keras.Input((4,)), shared], name="b")

        def call(self, x):
            return self.b(self.a(x))

    net = Net()
    net(np.ones((1, 4), np.float32))
    also = {leaf.path: list(leaf.also) for leaf in live._backend(net).leaves(net)}
    assert also == {f"a/shared/{n}": [f"b/shared/{n}"] for n in ("kernel", "bias")}
    converters.transform(net, fwt.prune(0.5, where="b/shared/kernel"))
    assert int((np.asarray(net.a.layers[0].kernel) == 0).sum()) == 8
    leaves = live._backend(keras_functional()).leaves(keras_functional())
    assert not any(leaf.also for leaf in leaves)  # called twice, in one place


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_sum_of_a_lora_is_written_in_its_own_precision(dtype):
    layer = keras.layers.Dense(16, name="d", dtype=dtype)
    net = keras.Sequential([keras.Input((24,)), layer])
    layer.enable_lora(4)
    draw = np.random.default_rng(0).normal
    layer.lora_kernel_b.assign(draw(size=(4, 16)))
    value = np.asarray(keras.ops.convert_to_numpy(layer._kernel)).copy()
    kernel = draw(size=(24, 16))
    kernel = (kernel + np.sign(kernel)).astype(value.dtype)
    kernel[0, :2] = np.nan, np.inf
    bias = np.ones(16).astype(value.dtype)
    converters.transform(net, fwt.assign({"d/kernel": kernel, "d/bias": bias}))
    found = np.asarray(keras.ops.convert_to_numpy(layer.kernel)).astype(np.float32)
    tolerance = 16 * float(jnp.finfo(value.dtype).eps)
    np.testing.assert_allclose(found, kernel.astype(np.float32), tolerance, tolerance)
    held = np.asarray(keras.ops.convert_to_numpy(layer._kernel)).copy()
    leaf = next(x for x in live._backend(net).leaves(net) if x.path == "d/kernel")
    leaf.write(np.ones_like(kernel))
    leaf.write(leaf.value)  # as a failure elsewhere is undone: over NaN too
    again = np.asarray(keras.ops.convert_to_numpy(layer._kernel))
    assert again.tobytes() == held.tobytes()


def test_a_weight_and_a_layer_of_one_name_are_refused():
    class Torch(torch.nn.Linear):
        def __init__(self):
            super().__init__(2, 2)
            self.kernel = torch.nn.Linear(2, 2)

    with pytest.raises(converters.ConversionError, match="same name"):
        converters.transform(Torch(), zeros)

    class Norm(keras.layers.LayerNormalization):
        def build(self, shape):
            super().build(shape)
            self.more = self.add_weight(shape=(2,), name="scale")

    with pytest.raises(converters.ConversionError, match="two weights"):
        converters.transform(keras.Sequential([keras.Input((2,)), Norm(name="n")]), zeros)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_modules_have_the_same_names():
    net = torch.jit.script(torch.nn.Sequential(torch.nn.Linear(4, 2)))
    converters.transform(net, fwt.prune(0.5, where="0/kernel"))
    assert int((net[0].weight == 0).sum()) == 4


COMPUTED = {
    "weight_norm": lambda: parametrizations.weight_norm(torch.nn.Conv2d(3, 4, (2, 3))),
    "weight_norm by input": lambda: parametrizations.weight_norm(torch.nn.Linear(3, 4), dim=1),
    "the older weight_norm": lambda: torch.nn.utils.weight_norm(torch.nn.Linear(5, 4)),
    "the older, over all": lambda: torch.nn.utils.weight_norm(torch.nn.Conv1d(3, 4, 2), dim=None),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("name", COMPUTED)
def test_what_weight_norm_computes_is_seen_and_written_back(name):
    net = torch.nn.Sequential(COMPUTED[name]()).eval()
    layer = net[0]
    held = {id(p) for p in net.parameters()}
    wanted = {}

    def two_outputs_gone(params):
        kernel = np.array(params["params"]["0"]["kernel"])
        kernel[..., :2] = 0
        kernel[0] *= 3
        wanted["kernel"] = kernel
        return {"params": {"0": {**params["params"]["0"], "kernel": kernel}}}

    before = [p.detach().clone() for p in net.parameters()]
    converters.transform(net, lambda p: p)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    converters.transform(net, two_outputs_gone)
    model = converters.from_torch(net)
    found = model.variables["params"]["0"]["kernel"]
    np.testing.assert_allclose(found, wanted["kernel"], rtol=1e-5)
    assert np.array_equal(found == 0, wanted["kernel"] == 0)
    assert {id(p) for p in net.parameters()} == held
    ndim = layer.weight.ndim
    x = torch.randn(2, *((3, 5, 6)[: ndim - 1] if ndim > 2 else (layer.in_features,)))
    expected = net(x).detach().movedim(1, -1)
    np.testing.assert_allclose(model(x.movedim(1, -1).numpy()), expected, atol=1e-5)


def pruned(layer, *ways):
    for way, name, *how in ways:
        way(layer, name, *how)
    return torch.nn.Sequential(layer)


def pruned_globally():
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, (2, 3)), torch.nn.Flatten())
    weights = [(net[0], "weight"), (net[0], "bias")]
    prune.global_unstructured(weights, prune.L1Unstructured, amount=0.5)
    return net


def linear(*ways):
    return pruned(torch.nn.Linear(5, 4), *ways)


PRUNED = {
    "at random": lambda: linear((prune.random_unstructured, "weight", 0.5)),
    "whole units": lambda: pruned(
        torch.nn.Conv2d(3, 4, (2, 3)), (prune.ln_structured, "weight", 0.5, 2, 0)
    ),
    "thrice": lambda: linear(
        (prune.random_unstructured, "weight", 0.3),
        (prune.ln_structured, "weight", 0.25, 2, 0),
        (prune.l1_unstructured, "weight", 2),
    ),
    "not at all": lambda: linear((prune.identity, "weight")),
    "a bias": lambda: linear((prune.l1_unstructured, "bias", 0.5)),
    "over the model": pruned_globally,
    "by a mask": lambda: linear((prune.custom_from_mask, "weight", torch.eye(5)[:4])),
    "by halves": lambda: linear((prune.custom_from_mask, "weight", torch.full((4, 5), 0.5))),
    "half precision": lambda: pruned(
        torch.nn.Linear(5, 4).to(torch.bfloat16), (prune.l1_unstructured, "weight", 0.5)
    ),
    "recurrent": lambda: pruned(
        torch.nn.LSTM(3, 4, batch_first=True),
        (prune.l1_unstructured, "weight_hh_l0", 0.5),
        (prune.l1_unstructured, "bias_ih_l0", 0.5),
    ),
}


def computed_weights(net):
    """Each weight of the first layer under its path: as torch holds it, and in Flax's axes."""
    out = {}
    for name, _ in list(net[0].named_parameters()):
        name = name.removesuffix("_orig")
        value = getattr(net[0], name).detach().float().numpy()
        if name == "weight":
            value = value.transpose(*range(2, value.ndim), 1, 0)
        out[{"weight": "0/kernel", "bias": "0/bias"}.get(name, f"0/{name}")] = value
    return out


@pytest.mark.parametrize("name", PRUNED)
def test_what_pruned_torch_modules_compute_is_seen_and_written_back(name):
    torch.manual_seed(0)
    net = PRUNED[name]()
    shape = {torch.nn.Conv2d: (2, 3, 4, 5), torch.nn.LSTM: (2, 4, 3)}.get(type(net[0]), (2, 5))
    x = torch.randn(shape).to(next(net.parameters()).dtype)
    net(x)
    wanted = {}

    def change(tree):
        for path, there in fwt.select(tree, "**").items():
            np.testing.assert_array_equal(there.astype(np.float32), computed_weights(net)[path])
            wanted[path] = np.array(there)
            flat = wanted[path].reshape(-1)  # a third stays, a third is zero, a third is new
            flat[::3], flat[1::3] = 0, np.arange(1, len(flat[1::3]) + 1)
        return fwt.assign(wanted)(tree)

    before = snapshot(net)
    pointers = {n: v.data_ptr() for n, v in net.state_dict(keep_vars=True).items()}
    converters.transform(net, lambda tree: tree)
    assert not changed(net, before)
    converters.transform(net, change)
    for _ in range(2):  # as the attribute is at once, and as the next forward makes it
        for path, value in computed_weights(net).items():
            np.testing.assert_array_equal(value, wanted[path].astype(np.float32))
        net(x)
    after = net.state_dict(keep_vars=True)
    assert {n: v.data_ptr() for n, v in after.items()} == pointers
    for n in [n for n in after if n.endswith("_mask")]:  # what stays hidden is as it was
        orig, hidden = n.replace("_mask", "_orig"), after[n] == 0
        assert torch.equal(after[orig][hidden], before[orig][hidden])


@pytest.mark.parametrize(("like", "share"), [(None, 0.5), ("torch", 0.75)])
def test_pruning_on_top_of_torchs(like, share):
    """torch counts among the weights that are left, as we do with like="torch"."""
    nets = []
    for _ in range(2):
        torch.manual_seed(0)
        nets.append(PRUNED["at random"]())
    net, again = nets
    converters.transform(net, fwt.prune(0.5, like=like))
    prune.l1_unstructured(again[0], "weight", 0.5)
    assert like is None or torch.equal(again[0].weight, net[0].weight)
    assert float((net[0].weight == 0).float().mean()) == share
    prune.remove(net[0], "weight")
    assert float((net[0].weight == 0).float().mean()) == share


def test_norms_of_pruned_torch_modules():
    net = PRUNED["whole units"]()
    converters.transform(net, fwt.project(fwt.constraints.l2_sphere(2.0)))
    norms = net[0].weight.detach().square().sum((1, 2, 3)).sort().values
    assert torch.allclose(norms[2:], torch.tensor(4.0))


def test_a_pruned_weight_that_is_not_finite_under_its_mask_becomes_zero():
    net = PRUNED["by a mask"]()
    with torch.no_grad():
        net[0].weight_orig[0, 1] = float("inf")
    seen = {}
    converters.transform(net, lambda tree: seen.update(fwt.select(tree)) or tree)
    assert np.isnan(seen["0/kernel"][1, 0])  # as torch multiplies
    converters.transform(net, fwt.assign({"0/kernel": np.eye(5, 4, dtype=np.float32)}))
    assert torch.equal(net[0].weight, torch.eye(4, 5))


def tied_and_pruned():
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    net[1].weight = net[0].weight
    prune.l1_unstructured(net[1], "weight", 0.5)
    return net


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: torch.nn.Sequential(torch.nn.utils.spectral_norm(torch.nn.Linear(4, 4))),
            r"remove_spectral_norm\(layer, 'weight'\)",
        ),
        (tied_and_pruned, "1/kernel are computed from one parameter"),
        (
            lambda: pruned(
                torch.nn.utils.weight_norm(torch.nn.Linear(4, 4)),
                (prune.l1_unstructured, "weight_v", 0.5),
            ),
            r"two hooks .*prune.remove\(layer, 'weight_v'\)",
        ),
    ],
)
def test_a_computed_weight_that_cant_be_written_says_so(make, said):
    net = make()
    before = snapshot(net)
    with pytest.raises(converters.ConversionError, match=said):
        converters.transform(net, fwt.initialize(fwt.initializers.ones, 0))
    assert not changed(net, before)


def test_the_older_spectral_norm_is_seen_as_it_computes():
    net = torch.nn.Sequential(torch.nn.utils.spectral_norm(torch.nn.Linear(5, 4)))
    net(torch.ones(1, 5))  # in training its vectors move at each forward, but not at a look
    before, seen = snapshot(net), {}
    converters.transform(net, lambda tree: seen.update(fwt.select(tree)) or tree)
    net.eval()(torch.ones(1, 5))
    np.testing.assert_array_equal(seen["0/kernel"].T, net[0].weight.detach())
    converters.transform(net, fwt.initialize(fwt.initializers.ones, 0, "0/bias"))
    assert changed(net, before) == {"0.bias"}


def test_a_parametrization_without_an_inverse_may_let_a_weight_through():
    class Masked(torch.nn.Module):
        def forward(self, weight):
            return weight * torch.eye(4)

    net = torch.nn.Sequential(torch.nn.Linear(4, 4))
    torch.nn.utils.parametrize.register_parametrization(net[0], "weight", Masked())
    converters.transform(net, fwt.assign({"0/kernel": 2 * np.eye(4, dtype=np.float32)}))
    assert torch.equal(net[0].weight, 2 * torch.eye(4))
    with pytest.raises(converters.ConversionError, match="remove_parametrizations"):
        converters.transform(net, fwt.assign({"0/kernel": np.ones((4, 4), np.float32)}))


@pytest.mark.parametrize("make", [parametrizations.spectral_norm, parametrizations.orthogonal])
def test_a_parametrization_that_cant_hold_a_weight_says_so(make):
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), make(torch.nn.Linear(4, 4)))
    before = {n: v.clone() for n, v in net.state_dict().items()}
    with pytest.raises(converters.ConversionError, match="remove_parametrizations"):
        converters.transform(net, fwt.prune(0.5))
    assert all(torch.equal(v, before[n]) for n, v in net.state_dict().items())


def test_an_orthogonal_weight_goes_into_the_parametrization_of_orthogonal_weights():
    net = torch.nn.Sequential(parametrizations.orthogonal(torch.nn.Linear(4, 4)))
    turned = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0].astype(np.float32)
    converters.transform(net, fwt.assign({"0/kernel": turned}))
    np.testing.assert_allclose(net[0].weight.detach(), turned.T, atol=1e-6)


def test_a_jitted_transform_knows_which_model_it_is_called_on():
    unit = jax.jit(fwt.project(fwt.constraints.unit_norm))
    t = torch.nn
    conv = t.Sequential(t.Conv2d(4, 6, 3, bias=False))
    turned = t.Sequential(t.ConvTranspose2d(6, 4, 3, bias=False))  # a weight of the same shape
    for net in (conv, turned, conv):
        converters.transform(net, unit)
    for w in (conv[0].weight, turned[0].weight.transpose(0, 1)):
        np.testing.assert_allclose(w.detach().flatten(1).norm(dim=1), 1, rtol=1e-5)


ON_JAX = """
import sys, keras, numpy as np
import fwt
from fwt import converters

start = keras.initializers.GlorotUniform(seed=0)
dense = keras.layers.Dense(4, kernel_initializer=start, name="d")
layers = [keras.Input((5,)), dense, keras.layers.BatchNormalization()]
net = keras.Sequential(layers)
model = converters.from_keras(net, sidecar=True)
converters.to_keras(model)
converters.transform(net, fwt.prune(0.5))
assert converters.verify(net, fwt.prune(0.5)(model)).ok
assert "tensorflow" not in sys.modules

norms = []

def bound(batch, logs):
    if batch or norms:  # the first call is one that nothing was brought home for
        net.jax_state_sync()
        norms.append(np.linalg.norm(net.layers[0].get_weights()[0], axis=0).max())
    converters.transform(net, fwt.project(fwt.constraints.max_norm(0.5)))

net.compile(keras.optimizers.SGD(0.1), "mse")
x = np.random.default_rng(0).normal(size=(24, 5))
callback = keras.callbacks.LambdaCallback(on_train_batch_end=bound)
net.fit(x, 3 * x[:, :4], batch_size=8, epochs=2, verbose=0, callbacks=[callback])
kernel = net.layers[0].get_weights()[0]
assert np.linalg.norm(kernel, axis=0).max() <= 0.5 * (1 + 1e-6)  # the next step began there
assert len(norms) == 5 and all(0.5 < n < 1.2 for n in norms), norms
"""


@pytest.mark.thorough
def test_in_a_callback_of_keras_on_jax_and_without_tensorflow(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", ON_JAX], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "KERAS_BACKEND": "jax"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]


def test_a_live_model_is_grouped_as_its_framework_counts():
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(24, 5))
    converters.transform(net, fwt.prune(pattern=fwt.patterns.n_m(2, 4)))
    kept = (net[1].weight != 0).reshape(5, 6, 4).sum(-1)
    assert bool((kept == 2).all())
    for order in ("chw", "hwc"):
        pattern = fwt.patterns.n_m(2, 4, order=order, flattened={"1/kernel": (2, 3, 4)})
        with pytest.raises(fwt.FwtError, match=r"1/kernel: order=.*leave order= out"):
            converters.transform(net, fwt.prune(pattern=pattern))

    net = keras.Sequential([keras.Input((2, 3, 4)), keras.layers.Flatten(), keras.layers.Dense(5)])
    with pytest.raises(fwt.FwtError, match="prune the Model that from_keras gives"):
        converters.transform(net, fwt.prune(pattern=fwt.patterns.n_m(2, 4, order="chw")))


class Attends(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x):
        return self.a(x, x, x, need_weights=False)[0]


def test_heads_of_a_live_attention_are_those_of_its_model():
    net, pattern = Attends().eval(), fwt.patterns.channel("heads")
    with pytest.raises(fwt.AxesError, match=r"no leaf is left. Those of the Model .* have heads"):
        converters.transform(net, fwt.prune(0.5, pattern=pattern))
    model = converters.from_torch(net, input_shape=(5, 16))
    model = fwt.prune(0.5, pattern=pattern)(model)
    net.load_state_dict(converters.to_torch(model).state_dict())
    heads = net.a.in_proj_weight.detach().reshape(3, 4, 4, 16)
    assert [int((h == 0).all(-1).all(-1).sum()) for h in heads] == [2, 2, 2]


# -- gradients ------------------------------------------------------------------------------------


def torch_with_gradients():
    t = torch.nn
    net = cases.randomise_torch(t.Sequential(
        t.Conv2d(2, 6, (3, 2)), t.ReLU(), t.ConvTranspose2d(6, 4, 2, groups=2), t.Flatten(),
        t.Linear(4 * 3 * 5, 3)))  # fmt: skip
    net(
        torch.randn(7, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    ).square().sum().backward()
    return net


GRADIENTS = {
    "the module": lambda net: net,
    "by name": lambda net: {n: p.grad for n, p in net.named_parameters()},
    "those that are selected": lambda net: {
        n: p.grad for n, p in net.named_parameters() if not n.endswith("bias")
    },
    "in order": lambda net: [p.grad for p in net.parameters()],
    "as arrays": lambda net: [p.grad.numpy() for p in net.parameters()],
}


@pytest.mark.parametrize("form", GRADIENTS)
def test_gradients_of_a_torch_module(form):
    """Saliency is |w g|, whatever the axes: of each weight tensor the smaller half goes."""
    net = torch_with_gradients()
    worth = {n: (p * p.grad).abs().detach() for n, p in net.named_parameters()}
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    score = fwt.scores.saliency
    prune = fwt.prune(0.5, score, grads=GRADIENTS[form](net))
    for wrap in (lambda m: m, torch.nn.DataParallel):
        converters.transform(wrap(net), prune)
        for name, p in net.named_parameters():
            gone = (p == 0) & (before[name] != 0)
            if name.endswith("bias"):
                assert not gone.any()
                continue
            assert int(gone.sum()) == p.numel() // 2
            assert worth[name][gone].max() <= worth[name][~gone].min()


def test_gradients_of_each_example_and_of_wrapped_modules():
    net = torch_with_gradients()
    grads = {n: torch.stack([p.grad, -2 * p.grad]) for n, p in net.named_parameters()}
    seen = {}

    def keep(tree):
        seen.update(fwt.scores.fisher(tree, grads=grads)["params"]["0"])
        return tree

    converters.transform(net, keep)
    w = net[0].weight
    weight, slope = (v.detach().permute(2, 3, 1, 0).numpy() for v in (w, w.grad))
    wanted = fwt.scores.fisher({"k": weight}, grads={"k": np.stack([slope, -2 * slope])})["k"]
    np.testing.assert_allclose(seen["kernel"], wanted, rtol=1e-6)
    held = torch.nn.Sequential(torch.nn.DataParallel(net[0]))
    grads = {n: p.grad for n, p in held.named_parameters()}
    assert list(grads) == ["0.module.weight", "0.module.bias"]
    converters.transform(held, fwt.prune(0.5, fwt.scores.taylor, grads=grads))
    assert int((net[0].weight == 0).sum()) == net[0].weight.numel() // 2


def test_gradients_that_do_not_fit():
    net = torch_with_gradients()
    grads = {n: p.grad for n, p in net.named_parameters()}

    def refused(said, given, model=net):
        with pytest.raises(fwt.FwtError, match=said):
            converters.transform(model, fwt.prune(0.5, fwt.scores.taylor, grads=given))

    refused(r"no parameter of the model is named '0\.wait'; close: '0\.weight'",
            {**grads, "0.wait": grads["0.weight"]})  # fmt: skip
    refused("2 gradients, but the model has 6 parameters", list(grads.values())[:2])
    refused(
        r"shape \[6, 2, 3, 2\], found a gradient of \[6\]", {**grads, "0.weight": grads["0.bias"]}
    )
    refused("all of them are None", dict.fromkeys(grads))
    others = {n: g for n, g in grads.items() if n != "0.weight"}
    refused("^grads: nothing for 0/kernel: give", others)
    net[0].weight.requires_grad_(False)
    refused("^grads: 0/kernel is frozen", {**grads, "0.weight": None})
    rest = ["2/kernel", "**/bias"]
    converters.transform(net, fwt.prune(0.5, fwt.scores.taylor, grads=net, where=rest))
    pruned = torch.nn.Sequential(torch.nn.utils.prune.l1_unstructured(net[0], "weight", 2))
    refused("0/kernel is computed from other parameters", pruned, pruned)


def test_gradients_of_a_keras_model():
    k = keras.layers
    net = keras.Sequential([
        keras.Input((6,), dtype="int32"), k.Embedding(9, 4), k.LSTM(5), k.Dense(3, name="d"),
    ])  # fmt: skip
    cases.randomise_keras(net)
    net.layers[0].trainable = False
    x = np.arange(12).reshape(2, 6) % 9
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(net(x) ** 2)
        grads = tape.gradient(loss, net.trainable_variables)
    else:
        import jax

        def loss(trained):
            fixed = [v.value for v in net.non_trainable_variables]
            return (net.stateless_call(trained, fixed, x)[0] ** 2).sum()

        grads = jax.grad(loss)([v.value for v in net.trainable_variables])
    kernel = net.layers[-1].kernel
    worth = np.abs(keras.ops.convert_to_numpy(kernel) * keras.ops.convert_to_numpy(
        grads[[v is kernel for v in net.trainable_variables].index(True)]))  # fmt: skip
    both = ["**/embedding", "**/kernel"]
    prune = fwt.prune(0.4, fwt.scores.saliency, grads=grads, where=both)
    with pytest.raises(fwt.FwtError, match=r"embedding\w*/embedding is frozen and has no gradient"):
        converters.transform(net, prune)
    given = {v.path: g for v, g in zip(net.trainable_variables, grads, strict=True)}
    prune = fwt.prune(0.4, fwt.scores.saliency, grads=given)
    converters.transform(net, prune)
    gone = keras.ops.convert_to_numpy(kernel) == 0
    assert gone.sum() == 6
    assert worth[gone].max() <= worth[~gone].min()


def test_gradients_of_groups_in_keras():
    """Between the groups stand zeros that are no weights, whose gradients are of nothing."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.ConvTranspose2d(6, 4, 2, groups=2, bias=False))
    net[0].weight.grad = torch.randn(net[0].weight.shape)
    held = converters.to_keras(*converters.from_torch(net, input_shape=(6, 3, 5)))
    (kernel,) = held.trainable_variables
    assert tuple(kernel.shape) == (2, 2, 4, 6)
    seen, full = {}, np.random.default_rng(0).normal(size=kernel.shape).astype(np.float32)
    slope = net[0].weight.grad.numpy().transpose(2, 3, 1, 0)  # (h, w, out / groups, in)
    for g in range(2):
        full[:, :, 2 * g : 2 * g + 2, 3 * g : 3 * g + 3] = slope[..., 3 * g : 3 * g + 3]

    def keep(name, grads):
        def look(tree):
            found = fwt.scores.saliency(tree, grads=grads)["params"]
            seen[name] = next(iter(found.values()))["kernel"]
            return tree

        return look

    converters.transform(net, keep("torch", net))
    converters.transform(held, keep("keras", [full]))
    assert seen["torch"].shape == seen["keras"].shape
    np.testing.assert_allclose(
        np.sort(seen["torch"], None), np.sort(seen["keras"], None), rtol=1e-6
    )


def test_gradients_by_a_name_that_two_variables_have():
    """Keras gives both the same path: only their order tells them apart."""

    @keras.saving.register_keras_serializable("test")
    class Two(keras.layers.Layer):
        def build(self, shape):
            self.first = self.add_weight(shape=(3, 2), name="w")
            self.second = self.add_weight(shape=(3, 2), name="w")
            self.one = self.add_weight(shape=(3, 2), name="one")

        def call(self, x):
            return x @ self.first + x @ self.second + x @ self.one

    net = keras.Sequential([keras.Input((3,)), Two(name="two")])
    values = [np.full((3, 2), i, np.float32) for i in (1, 2, 3)]
    paths = [v.path for v in net.trainable_variables]
    assert len(set(paths)) == 2

    def pruned(grads, where="**"):
        t = fwt.prune(0.5, fwt.scores.gradient, grads=grads, where=where, scope="global")
        converters.transform(net, t)
        return [int((keras.ops.convert_to_numpy(v) == 0).sum()) for v in net.trainable_variables]

    with pytest.raises(fwt.LeafError, match=rf"named '{paths[0]}'.*order of trainable_variables"):
        pruned(dict(zip(paths, values, strict=True)))
    assert pruned(values) == [6, 3, 0]
    pruned({paths[2]: values[2]}, "two/one")  # whose name says which it is


# Keras on torch, whose layers are torch modules too.
ON_TORCH = """
import jax, keras, numpy as np, torch, fwt
from fwt import converters
keras.utils.set_random_seed(0)
own = keras.layers
net = keras.Sequential([keras.Input((4,)), own.Dense(5, name="d"),
                        own.BatchNormalization(name="b"), own.Dropout(0.5), own.Dense(2, name="e")])
net(np.random.default_rng(0).normal(size=(8, 4)).astype("float32")).square().sum().backward()
wanted = (net.get_layer("d").kernel.value * net.get_layer("d").kernel.value.grad).abs()
wanted = fwt.prune(0.5)({"d": {"kernel": wanted.detach().numpy()}})["d"]["kernel"] == 0
before = [keras.ops.convert_to_numpy(v) for v in net.variables]
named = {name: p.grad for name, p in net.named_parameters()}
for grads in (net, named):
    converters.transform(net, fwt.prune(0.5, fwt.scores.saliency, grads=grads, where="d/kernel"))
    kernel = keras.ops.convert_to_numpy(net.get_layer("d").kernel)
    print(np.array_equal(kernel == 0, wanted))
    for v, x in zip(net.variables, before):
        v.assign(x)
from fwt.converters.frameworks.live import Live  # what hold gives sparsify
moved = Live(net, False).gradients()["params"]["d"]["kernel"]
print(np.array_equal(moved, net.get_layer("d").kernel.value.grad))

class Mixed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.d, self.b, self.n = own.Dense(3), own.BatchNormalization(), own.Normalization()
        self.inner = keras.Sequential([own.Dense(3), own.BatchNormalization()])
        self.drop, self.last = own.Dropout(0.5), torch.nn.Linear(3, 2)
    def forward(self, x):
        return self.last(self.drop(self.inner(self.n(self.b(self.d(x))))))
mixed = Mixed()
mixed(torch.ones(2, 4))
weights = converters.weights(mixed)
trained = {name for name, p in mixed.named_parameters() if p.requires_grad}
print(len(fwt.paths(mixed)) == len(trained) == len(fwt.paths(weights)))
print(not [p for p in fwt.paths(mixed) if "moving" in p or "normalization/mean" in p])
print([sorted(x.rpartition("/")[2] for x in fwt.paths({"params": weights["batch_stats"]}))])
converters.transform(mixed, lambda tree: jax.tree.map(lambda x: 0 * x, tree))
print(float(keras.ops.convert_to_numpy(mixed.b.moving_variance).min()))
"""


def test_keras_layers_on_torch_are_torch_modules_too():
    done = subprocess.run(
        [sys.executable, "-c", ON_TORCH],
        env={**os.environ, "KERAS_BACKEND": "torch"},
        capture_output=True,
        text=True,
    )
    said = ["moving_mean"] * 2 + ["moving_variance"] * 2
    assert done.stdout.splitlines() == [*["True"] * 5, str([said]), "1.0"], done.stderr
