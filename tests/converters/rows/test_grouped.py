"""Transposed convolutions with groups: every verb and every format sees only weights that exist."""

import math
import pickle

import flax.linen as nn
import jax
import keras
import numpy as np
import onnx
import pytest
import torch
from compare import close, in_flax, in_keras, in_torch

import fwt
from fwt import constraints, converters, patterns, scores

init = torch.nn.init
# inputs, outputs, groups and the other settings; odd sizes, and depthwise ones.
CASES = {
    "1d": (6, 9, 3, (4,), {"stride": 2, "padding": 1, "output_padding": 1}),
    "2d": (4, 6, 2, (3, 2), {"stride": (2, 3), "padding": (1, 0), "bias": False}),
    "2d dilated": (4, 6, 2, (3, 2), {"dilation": (2, 1)}),
    "3d": (4, 8, 4, (3, 2, 1), {"stride": (1, 2, 1)}),
    "depthwise": (6, 6, 6, (4, 3), {"stride": 2}),
    "depthwise, more outputs": (5, 15, 5, (3,), {"stride": 3}),
}


def made(name):
    inputs, outputs, groups, window, more = CASES[name]
    cls = getattr(torch.nn, f"ConvTranspose{len(window)}d")
    torch.manual_seed(3)
    layer = cls(inputs, outputs, window, groups=groups, **more)
    x = np.random.default_rng(1).normal(size=(1, inputs, *(5, 4, 3)[: len(window)]))
    return torch.nn.Sequential(layer), x.astype(np.float32)


def by_unit(weight, groups):
    """torch's (in, out / groups, *k) as one row for each output unit, said another way."""
    return np.stack([
        weight[g * (n := len(weight) // groups) : (g + 1) * n, unit].ravel()
        for g in range(groups) for unit in range(weight.shape[1])
    ])  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_it_is_compact_in_every_framework(name, tmp_path):
    net, x = made(name)
    inputs, outputs, groups, window, _ = CASES[name]
    expected, weight = in_torch(net, x), net[0].weight.detach().numpy().copy()
    model = converters.from_torch(net, x.shape[1:], layout="source")
    kernel = model.variables["params"]["0"]["kernel"]
    assert kernel.shape == (*window, inputs // groups, outputs)
    units = np.moveaxis(kernel, (-1, -2), (0, 1)).reshape(outputs, -1)
    assert np.array_equal(units, by_unit(weight, groups))
    close(in_flax(model, x), expected)

    back = converters.to_torch(*model, layout="source")
    assert back[0].groups == groups
    assert torch.equal(back[0].weight, net[0].weight)
    seen = {}
    converters.transform(net, lambda t: seen.update(fwt.select(t, "**")) or t)
    assert np.array_equal(seen["0/kernel"], kernel)
    converters.transform(net, fwt.assign({"0/kernel": -kernel}))
    assert np.array_equal(net[0].weight.detach(), -weight)

    there = converters.to_keras(*model)
    if "dilated" not in name:  # which TensorFlow runs in compiled functions only
        close(in_keras(there, x), expected)
    again = converters.from_keras(there)
    assert again.module == model.module
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, again.variables, model.variables)))
    held = {}
    converters.transform(there, lambda t: held.update(fwt.select(t, "**")) or fwt.prune(0.5)(t))
    assert np.array_equal(held["0/kernel"], kernel)
    pruned = converters.from_keras(there).variables["params"]["0"]["kernel"]
    assert np.array_equal(pruned, fwt.prune(0.5)({"kernel": kernel})["kernel"])

    for suffix in (".keras", ".safetensors", ".pt"):
        converters.save(tmp_path / f"m{suffix}", *model, **(
            {"layout": "source"} if suffix == ".pt" else {}))  # fmt: skip
        how = {"architecture": model} if suffix == ".pt" else {}
        found = converters.load(tmp_path / f"m{suffix}", **how)
        assert np.array_equal(found.variables["params"]["0"]["kernel"], kernel)
    assert pickle.loads(pickle.dumps(model.module)) == model.module
    close(converters.to_nnx(*model)(x), expected)


@pytest.mark.parametrize("name", ["2d", "depthwise"])
def test_it_is_one_operator_of_onnx(name, tmp_path):
    net, x = made(name)
    model = converters.from_torch(net, x.shape[1:], layout="source")
    converters.to_onnx(*model, tmp_path / "m.onnx", input_shape=x.shape[1:])
    proto = onnx.load(tmp_path / "m.onnx")
    (node,) = [n for n in proto.graph.node if n.op_type == "ConvTranspose"]
    assert {a.name: a.i for a in node.attribute}["group"] == CASES[name][2]
    held = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    assert np.array_equal(held[node.input[1]], net[0].weight.detach())
    kernel = model.variables["params"]["0"]["kernel"]
    own = converters.load(tmp_path / "m.onnx")
    assert np.array_equal(own.variables["params"]["0"]["kernel"], kernel)
    del proto.metadata_props[:]  # as another program writes it
    onnx.save(proto, tmp_path / "other.onnx")
    other = converters.from_onnx(tmp_path / "other.onnx")
    assert np.array_equal(
        next(w for p, w in fwt.select(other, "**").items() if p.endswith("kernel")), kernel
    )
    close(in_flax(other, x), in_torch(net, x))


@pytest.mark.parametrize("name", ["2d", "depthwise, more outputs"])
def test_every_verb_sees_the_units_that_exist(name):
    groups = CASES[name][2]

    def done(t):
        net, _ = made(name)
        if net[0].bias is not None:
            net[0].bias.data.zero_()
        model = converters.from_torch(net)
        converters.transform(net, t)
        weight = net[0].weight.detach().numpy()
        assert np.array_equal(converters.to_torch(*t(model))[0].weight.detach(), weight)
        return by_unit(weight, groups)

    units = done(fwt.project(constraints.unit_norm))
    np.testing.assert_allclose(np.linalg.norm(units, axis=1), 1, atol=1e-6)
    units = done(fwt.prune(0.5, pattern=patterns.channel))
    whole = (units == 0).all(1)
    assert whole.sum() == round(len(units) / 2)
    assert (units[~whole] != 0).all()
    units = done(fwt.prune(0.5))
    assert (units == 0).sum() == round(units.size / 2)
    assert (done(fwt.initialize(fwt.initializers.ones, 0)) == 1).all()
    if name == "2d":  # two inputs in each group
        units = done(fwt.prune(pattern=patterns.n_m(1, 2))).reshape(len(units), 2, -1)
        assert ((units == 0).sum(1) == 1).all()
    with pytest.raises(fwt.LeafError, match="does not divide"):
        done(fwt.prune(pattern=patterns.n_m(2, 4)))


@pytest.mark.parametrize("name", ["2d", "depthwise", "3d"])
def test_values_are_those_of_torch(name):
    net, _ = made(name)
    inputs, _, groups, *_ = CASES[name]
    fan_in, fan_out = init._calculate_fan_in_and_fan_out(net[0].weight)
    torchs = fwt.initializers.torch
    big = torch.nn.ConvTranspose1d(32, 160, 7, groups=32)
    converters.transform(big, fwt.reset(0, like="torch"))
    for w in (big.weight, big.bias):  # as reset_parameters bounds them
        bound = 1 / math.sqrt(5 * 7)
        assert 0.95 * bound < float(w.detach().abs().max()) <= bound

    def drawn(t):
        converters.transform(net, fwt.initialize(t, 0, "0/kernel"))
        return net[0].weight.detach().numpy().copy()

    for mode, fan in (("fan_in", fan_in), ("fan_out", fan_out)):
        w = drawn(torchs.kaiming_uniform(mode=mode, nonlinearity="linear"))
        assert 0.8 * math.sqrt(3 / fan) < np.abs(w).max() <= math.sqrt(3 / fan)
    assert np.array_equal(
        drawn(torchs.dirac(groups)), init.dirac_(torch.empty_like(net[0].weight), groups)
    )
    rows = drawn(torchs.orthogonal()).reshape(inputs, -1)
    small = rows @ rows.T if rows.shape[0] <= rows.shape[1] else rows.T @ rows
    np.testing.assert_allclose(small, np.eye(len(small)), atol=1e-5)


def test_what_keras_lacks_is_refused():
    net, _ = made("2d")
    with pytest.raises(fwt.AxesError, match="groups, which Keras lacks"):
        converters.transform(net, fwt.initialize(fwt.initializers.keras.glorot_uniform, 0))
    with pytest.raises(fwt.LeafError, match="Keras has no transposed convolution with groups"):
        converters.transform(net, fwt.reset(0, like="keras"))


def test_keras_layers_are_folded_only_by_name_and_zeros():
    """A kernel that happens to be in blocks stays whole, and so does one that was trained since."""
    net, _ = made("2d")
    model = converters.from_torch(net, (4, 5, 4), layout="source")
    there = converters.to_keras(*model)
    layer = there.get_layer("0__groups2")
    layer.kernel.assign(np.where(np.asarray(layer.kernel) == 0, 0.5, layer.kernel))
    kernel = converters.from_keras(there).variables["params"]["0__groups2"]["kernel"]
    assert kernel.shape == (3, 2, 6, 4)
    up = keras.layers.Conv2DTranspose(6, 3, name="up")
    plain = keras.Sequential([keras.Input((5, 4, 4)), up])
    up.kernel.assign(np.zeros((3, 3, 6, 4), np.float32))
    assert converters.from_keras(plain).variables["params"]["up"]["kernel"].shape == (3, 3, 6, 4)


def test_scores_and_flax_values():
    net, x = made("2d")
    model = converters.from_torch(net, x.shape[1:])
    batch = np.moveaxis(x, 1, -1)
    worth = scores.wanda(model.module, batch)(model.variables)["params"]["0"]["kernel"]
    # Of stride and window here, each input meets each weight of its group once, but at the edge.
    assert worth.shape == (3, 2, 2, 6)
    new = fwt.reset(0, like="flax")(model).variables["params"]["0"]["kernel"]
    fresh = model.module.init(jax.random.key(0), batch)["params"]["0"]["kernel"]
    assert new.shape == fresh.shape
    big = fwt.Sequential([("up", fwt.layers.GroupedConvTranspose(60, (5,), 4))])
    fresh = big.init(jax.random.key(0), np.ones((1, 3, 40), np.float32))
    drawn = fwt.reset(0, like="flax")(fwt.Model(big, fresh)).variables["params"]["up"]["kernel"]
    assert float(np.std(drawn)) == pytest.approx(1 / math.sqrt(5 * 10), rel=0.05)
    again = fwt.initialize(fwt.initializers.lecun_normal, 0)(fwt.Model(big, fresh))
    assert float(np.std(again.variables["params"]["up"]["kernel"])) == pytest.approx(
        float(np.std(fresh["params"]["up"]["kernel"])), rel=0.05
    )


@pytest.mark.parametrize("groups", [1, 2])
def test_layers_of_sequentials_inside_tell_their_axes(groups):
    """So does ``transpose_kernel=True``, whose kernel has its outputs before its inputs."""
    inner = torch.nn.Sequential(torch.nn.ConvTranspose2d(4, 6, (3, 2), groups=groups))
    net = torch.nn.Sequential(inner)
    model = fwt.project(constraints.unit_norm)(converters.from_torch(net))
    units = by_unit(converters.to_torch(*model)[0][0].weight.detach().numpy(), groups)
    np.testing.assert_allclose(np.linalg.norm(units, axis=1), 1, atol=1e-6)
    new = fwt.reset(0, like="torch")(model).variables["params"]["0"]["0"]
    bound = 1 / math.sqrt(6 // groups * 6)
    assert 0.9 * bound < np.abs(new["kernel"]).max() <= bound
    assert 0.3 * bound < np.abs(new["bias"]).max() <= bound


def test_a_linen_mask_is_refused():
    net = fwt.Sequential([("conv", nn.Conv(6, (3,), mask=np.ones((3, 4, 6), np.float32)))])
    variables = net.init(jax.random.key(0), np.ones((1, 5, 4), np.float32))
    with pytest.raises(converters.ConversionError, match="only None can be converted"):
        converters.to_torch(net, variables)
