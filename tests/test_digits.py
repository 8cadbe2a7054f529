"""Digits learned while weights are pruned: trained with XLA's optimisations, which pay here."""

import numpy as np
import optax
import pytest

import fwt
from fwt import _demo
from fwt.optim import sparsify

pytestmark = [pytest.mark.optimised, pytest.mark.thorough]


@pytest.fixture(scope="module")
def dense():
    return digits_net(lambda adam: adam)


def digits_net(wrapped):
    """The demo's net after 15 epochs of Adam, and its accuracy on the test images."""
    epochs = 15
    adam = optax.adam(optax.cosine_decay_schedule(3e-3, _demo.steps_of(epochs), 0.02))
    model = _demo.fit(wrapped(adam), epochs)
    return model, _demo.accuracy(model)


def test_the_digits_at_90_percent(dense):
    schedule = fwt.schedules.cubic(0.9, _demo.steps_of(4), _demo.steps_of(10))
    model, accuracy = digits_net(lambda adam: sparsify(adam, schedule, scope="global", every=10))
    weights = fwt.select(model, fwt.kernels)
    total = sum(x.size for x in weights.values())
    assert sum(int((x == 0).sum()) for x in weights.values()) == round(
        float(np.float32(0.9)) * total
    )
    assert dense[1] > 0.97
    assert accuracy > dense[1] - 0.01


def test_the_digits_at_2_of_4(dense):
    two_of_four = fwt.patterns.n_m(2, 4)
    with pytest.raises(fwt.LeafError) as caught:  # the first convolution has one input channel
        fwt.prune(pattern=two_of_four)(dense[0])
    where = eval(str(caught.value).split("where=")[1])
    assert where == ["conv_2/kernel", "dense_1/kernel", "dense_2/kernel"]
    schedule = fwt.schedules.cubic(0.5, _demo.steps_of(4), _demo.steps_of(10))
    model, accuracy = digits_net(
        lambda adam: sparsify(adam, schedule, pattern=two_of_four, where=where, every=10)
    )
    for path in where:
        groups = np.moveaxis(fwt.select(model, fwt.kernels)[path], -2, -1).reshape(-1, 4)
        assert (np.count_nonzero(groups, axis=1) <= 2).all()
        assert (groups == 0).mean() == 0.5
    assert fwt.select(model, fwt.kernels)["conv_1/kernel"].all()
    assert accuracy > dense[1] - 0.01
