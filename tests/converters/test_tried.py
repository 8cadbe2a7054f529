"""A Flax model beside another: what rounding explains, and what it does not."""

import flax.linen as nn
import jax
import numpy as np
import pytest

import fwt
from fwt import converters
from fwt.converters import judge
from fwt.converters.tried import Tried


def test_what_rounding_moves_is_measured_for_whole_outputs():
    wanted = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)

    def run(variables, x):  # both ways, so none of it is a smooth effect
        return [wanted + np.float32(1e-3) * (variables["w"] != 1)]

    model = Tried(run, {"w": np.ones((), np.float32)}, large=False)
    for off, equal in ((1e-3, True), (1, False)):
        xs, theirs = [np.ones((7, 2))], [wanted + np.float32(off)]
        (told,) = model.judged(xs, model.outputs(xs), theirs, 1e-7)
        assert told.equal is equal


@pytest.mark.parametrize("off", [0.0, 1e-3])
def test_large_examples_are_computed_one_by_one(off):
    def two(x):
        return x, x.mean((1, 2))

    net = fwt.Sequential([("conv", nn.Conv(3, (3, 5), strides=2)), nn.tanh], input_shape=(9, 7, 2))
    variables = net.init(jax.random.key(0), np.ones((1, 9, 7, 2), np.float32))
    x = judge.numbers((9, 7, 2))[judge.FEW]
    whole, single = (
        Tried(lambda v, x: list(two(net.apply(v, x))), variables, large) for large in (False, True)
    )
    seen = single.outputs([x])
    assert [y.shape for y in seen] == [(3, 5, 4, 3), (3, 3)]
    theirs = [y * np.float32(1 + off) for y in whole.outputs([x])]
    told = single.judged([x], seen, theirs, float(np.finfo(np.float32).eps))
    assert [t.equal for t in told] == [not off] * 2


def test_rounding_is_measured_only_of_what_is_apart_and_weights_last():
    asked = []

    def run(variables, x):
        asked.append(np.asarray(variables["w"]))
        return [x @ variables["w"]]

    w = np.full((3, 2), 0.3, np.float32)
    model = Tried(run, {"w": w}, large=False, compiled=False)
    xs = [np.ones((2, 3), np.float32)]
    ours = model.outputs(xs)
    assert model.judged(xs, ours, ours, 1e-7)[0].equal
    assert len(asked) == 1
    assert not model.judged(xs, ours, [ours[0] + 1], 1e-7)[0].equal
    assert [np.array_equal(a, w) for a in asked[1:]] == [True, True, False, False]


def test_a_long_sum_may_be_added_up_one_by_one():
    """As onnxruntime averages an image; a difference that no sum explains is seen."""
    x = np.full((2, 50_000, 3), 0.1, np.float32)
    x[1] = np.random.default_rng(0).uniform(size=x[1].shape)
    model = Tried(jax.jit(lambda v, x: [v["w"] * x.mean(1)]), {"w": np.float32(3)}, large=True)
    lanes = np.add.accumulate(x.reshape(2, 8, -1, 3), 2)[:, :, -1]
    naive = np.float32(3) * lanes.sum(1) / np.float32(50_000)
    ours = model.outputs([x])
    for off, told in ((1, True), (1.01, False)):
        theirs = [(naive * off).astype(np.float32)]
        found = [
            model.judged([x], ours, theirs, 1.2e-7, one_by_one=long)[0] for long in (True, False)
        ]
        assert [f.excess <= 1 for f in found] == [told, False]


def test_a_short_sum_is_allowed_no_more():
    x = np.random.default_rng(0).uniform(size=(2, 100, 3)).astype("f")
    model = Tried(lambda v, x: [v["w"] * x.mean(1)], {"w": np.float32(3)}, large=True)
    ours = model.outputs([x])
    theirs = [(ours[0] * np.float32(1 + 1e-5)).astype("f")]
    assert model.judged([x], ours, theirs, 1.2e-7, one_by_one=True)[0].excess > 1


def test_what_ends_in_a_mean_of_a_large_image_goes_to_onnx(tmp_path):
    layers = [("conv", nn.Conv(8, (3, 3))), nn.relu, ("pool", fwt.layers.GlobalAvgPool()),
              ("dense", nn.Dense(3))]  # fmt: skip
    net = fwt.Sequential(layers, input_shape=(200, 220, 3))
    variables = net.init(jax.random.key(0), np.ones((1, 200, 220, 3), np.float32))
    converters.to_onnx(net, variables, tmp_path / "net.onnx")


@pytest.mark.parametrize("alone", [True, False])
def test_a_module_of_ones_own_is_computed_with_all_of_its_batch(alone):
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    model = Tried(lambda v, x: [x - x.mean(0)], {}, large=True, alone=alone)
    wanted = np.zeros_like(x) if alone else x - x.mean(0)
    np.testing.assert_array_equal(model.outputs([x])[0], wanted)
