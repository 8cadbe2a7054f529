"""What verify feeds, and what it leaves as it was."""

import collections
import copy
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
import torch
from flax import nnx
from marks import thorough_but

import fwt
from fwt import converters
from fwt import layers as fl

k, t = keras.layers, torch.nn


class Tenth(k.Layer):
    def call(self, x):
        return x // 10


class Negative(k.Layer):
    def call(self, x):
        return keras.ops.relu(-x)


def shift(end, units=3):
    """Off up to ``end``."""
    bias = keras.initializers.Constant(-end)
    return k.Dense(units, "relu", kernel_initializer="identity", bias_initializer=bias)


def straight(dtype, *layers, width=3):
    return keras.Sequential([keras.Input((width,), dtype=dtype), *layers])


def sum_of(dtype, width, *branches):
    x = keras.Input((width,), dtype=dtype)
    out = []
    for branch in branches:
        y = x
        for layer in branch:
            y = layer(y)
        out.append(y)
    return keras.Model(x, k.Add()(out))


# A model, the place of a weight in it, where it is changed, and inputs that show the change.
REACHED = {
    "the ends of bytes": (lambda: straight("uint8", shift(200)), 1, 1, [[255, 255, 255]]),
    "of signed bytes": (lambda: straight("int8", Negative(), shift(120)), 1, 2, [[-127] * 3]),
    "of two bytes": (lambda: straight("int16", shift(32000)), 1, 0, [[32767] * 3]),
    "negative ones": (
        lambda: sum_of("int32", 3, [k.ReLU(), k.Dense(2)], [Negative(), k.Dense(2)]),
        2, (1, 0), [[-3, -3, -3]]),
    "categories": (
        lambda: straight("int32", k.CategoryEncoding(20, "one_hot"), k.Dense(2), width=1),
        0, 15, [[15]]),
    "categories of a graph": (
        lambda: sum_of("int32", 1, [k.CategoryEncoding(700, "one_hot"), k.Dense(2)], [k.Dense(2)]),
        0, 670, [[670]]),
    "bins": (
        lambda: straight("int32", k.Discretization([5000.0, 100000.0], output_mode="one_hot"),
                         k.Dense(2), width=1),
        0, 2, [[100001]]),
    "a table of another size": (
        lambda: sum_of("int32", 4, [k.Embedding(50, 3)], [k.Embedding(60, 3)]), 1, 40, [[40] * 4]),
    "a table of quotients": (
        lambda: sum_of("int32", 1, [k.Embedding(500, 3)], [Tenth(), k.Embedding(50, 3)]),
        1, 33, [[335]]),
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    thorough_but(
        lambda name: name not in ("a table of quotients", "of two bytes", "categories of a graph"),
        REACHED,
    ),
)
def test_whole_numbers_reach_where_models_part(name):
    make, index, at, x = REACHED[name]
    keras.utils.set_random_seed(0)
    a, b = make(), make()
    weights = [np.array(w) for w in a.get_weights()]
    b.set_weights(weights)
    report = converters.verify(a, b)
    assert report.ok, report
    weights[index][at] += 1.5
    b.set_weights(weights)
    dtype = a.inputs[0].dtype
    one, other = (np.asarray(m(np.array(x, dtype))) for m in (a, b))
    assert np.abs(one - other).max() > 1  # the truth
    others = [b]
    if name in ("the ends of bytes", "of two bytes", "categories"):
        others.append(converters.from_keras(b))
        assert converters.verify(others[1], b).ok
    for other in others:
        assert not converters.verify(a, other).ok
        assert not converters.verify(other, a).ok


class Columns(t.Module):
    """A table of its own for each column, and one behind both."""

    def __init__(self, *sizes):
        super().__init__()
        self.tables = t.ModuleList(t.Embedding(n, 3) for n in sizes)

    def forward(self, x):
        return sum(table(x[:, i]) for i, table in enumerate(self.tables))


@pytest.mark.parametrize(("table", "row"), [(0, 3), (1, 4), (1, 55), (2, 700)])
def test_each_column_has_a_table_of_its_own(table, row):
    a = Columns(5, 60, 800)
    b = copy.deepcopy(a)
    assert converters.verify(a, b, input_shape=(3,)).ok
    b.tables[table].weight.data[row] += 1
    assert not converters.verify(a, b, input_shape=(3,)).ok


def test_rows_that_no_input_reaches_are_said():
    class Two(Columns):
        def forward(self, x):
            return sum(table(x) for table in self.tables)

    a = Two(50, 60)
    b = copy.deepcopy(a)
    b.tables[1].weight.data[55] += 1
    report = converters.verify(a, b, input_shape=(4,))
    assert "1 of the 1 rows of tables in which the models may differ were not fed" in str(report)
    b.tables[1].weight.data[40] += 1
    assert not converters.verify(a, b, input_shape=(4,)).ok
    one, other = t.Sequential(t.Embedding(20, 3)), t.Sequential(t.Embedding(30, 3))
    other[0].weight.data[:20] = one[0].weight.data
    for pair in ((one, other), (other, one)):
        assert "rows: those from 20 on" in str(converters.verify(*pair, input_shape=(2,)))


def test_tables_and_draws_in_nnx():
    rngs = nnx.Rngs(0)
    a = nnx.Sequential(nnx.Sequential(nnx.Embed(30, 4, rngs=rngs)), nnx.Dropout(0.5, rngs=rngs),
                       nnx.Linear(4, 2, rngs=rngs))  # fmt: skip
    b = nnx.clone(a)
    assert converters.verify(a, b, input_shape=(3,)).ok
    table = b.layers[0].layers[0].embedding
    table[...] = table[...].at[23].add(1.0)
    assert not converters.verify(a, b, input_shape=(3,)).ok


class Counts(t.Module):
    """Which changes in a forward all that a module may hold."""

    def __init__(self):
        super().__init__()
        self.linear, self.table = t.Linear(3, 2), t.Embedding(4, 2, max_norm=0.1)
        self.register_buffer("inside", torch.zeros(()))
        self.register_buffer("again", torch.zeros(()))
        self.calls, self.seen, self.last, self.fails = 0, [], None, False

    def forward(self, x):
        self.inside += 1
        self.again = self.again + 1
        self.calls += 1
        self.seen.append(x)
        self.last = x
        y = self.linear(x) + self.table(torch.zeros(len(x), dtype=torch.int64))
        if self.fails:
            raise ValueError("as asked")
        return y


@pytest.mark.parametrize("fails", [False, True])
def test_what_a_torch_model_keeps_stays(fails):
    a = Counts()
    b = copy.deepcopy(a)
    b.calls, a.fails = 7, fails
    before = copy.deepcopy(a.state_dict())
    if fails:
        with pytest.raises(converters.ConversionError, match="as asked"):
            converters.verify(a, b, input_shape=(3,))
    else:
        assert converters.verify(a, b, input_shape=(3,)).ok  # a count is no setting
    assert all(torch.equal(v, before[name]) for name, v in a.state_dict().items())
    assert (a.calls, a.seen, a.last, b.calls) == (0, [], None, 7)
    assert all(module.training for module in a.modules())
    assert not any(module._forward_hooks for module in a.modules())


def test_what_a_keras_model_keeps_stays():
    net = keras.Sequential([keras.Input(batch_shape=(8, 5, 3)), k.LSTM(4, stateful=True)])
    net(np.ones((8, 5, 3), np.float32))
    before = [np.array(v) for v in net.variables]
    assert converters.verify(net, net).ok
    for v, old in zip(net.variables, before, strict=True):
        np.testing.assert_array_equal(np.array(v), old)


class Custom(t.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = t.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_settings_that_are_whole_numbers():
    def capped(most, window):
        return Custom(t.Flatten(), t.Threshold(most, 0), t.AvgPool1d(window))

    one = capped(3000, 2)
    report = converters.verify(one, capped(4000, 2), input_shape=(6,))
    assert (report.ok, report.first) == (False, "layers.1")
    for equal in (capped(3000, 2), capped(3000.0, 2), capped(3000, (2,))):
        assert converters.verify(one, equal, input_shape=(6,)).ok
    for one, other in ((t.Softmax(1), t.Softmax(-1)), (t.Flatten(1), t.Flatten(-1))):
        assert converters.verify(Custom(one), Custom(other), input_shape=(6,)).ok


class Applies(nn.Module):
    function: Callable[..., Any]

    @nn.compact
    def __call__(self, x):
        return self.function(x)


@pytest.mark.parametrize("shape", [(4,), (3, 5), (3,), (2,)])
def test_what_modules_of_ones_own_part_at_is_fed(shape):
    one, other = ((Applies(lambda x, t=t: jnp.where(x > t, 1.0, 0.0)), {}) for t in (37.3, 41))
    assert not converters.verify(one, other, input_shape=shape).ok
    assert converters.verify(one, one, input_shape=shape).ok


class Thresholds(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.linear, self.function = torch.nn.Linear(4, 4), function

    def forward(self, x):
        return self.function(self.linear(x), x)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda h, x: h, lambda h, x: h + torch.relu(1 - (x - 3).abs() * 50)),
        (lambda h, x: h + x.floor(), lambda h, x: h + x.ceil() - 1),
        (lambda h, x: torch.where(x > 37.3, h, x), lambda h, x: torch.where(x > 41, h, x)),
    ],
)
def test_what_torch_modules_of_ones_own_part_at_is_fed(one, other):
    one, other = Thresholds(one).eval(), Thresholds(other).eval()
    other.load_state_dict(one.state_dict())
    assert not converters.verify(one, other, input_shape=(4,)).ok
    assert converters.verify(one, one, input_shape=(4,)).ok


def test_what_keras_models_part_at_is_fed():
    start = keras.Input((4,))
    dense = keras.layers.Dense(4)
    one, other = (
        keras.Model(start, keras.ops.where(keras.ops.greater(start, t), dense(start), start))
        for t in (37.3, 41.0)
    )
    assert not converters.verify(one, other).ok
    assert converters.verify(one, one).ok


def test_a_step_that_rounding_decides_is_said():
    one, other = Thresholds(lambda h, x: h), Thresholds(lambda h, x: h + (x == 5))
    other.load_state_dict(one.state_dict())
    report = converters.verify(one.eval(), other.eval(), input_shape=(4,))
    assert not report.ok or "on which side of a step" in str(report)
    assert not converters.verify(one, one, input_shape=(4,)).notes[1:]


def test_a_setting_beyond_the_inputs_is_said():
    one, other = (
        fwt.Model(fwt.Sequential([("a", layer)], (4,)), {})
        for layer in (fl.HardTanh(-1e9, 1e9), Applies(lambda x: x))
    )
    for report in (converters.verify(one, other), converters.verify(other, one)):
        assert "beyond what these inputs reach, in one model alone: a: min_value is" in str(report)
    assert not converters.verify(one, one).notes


@pytest.mark.parametrize("exact", [True, False])
def test_tails_of_a_module_of_ones_own_are_no_difference(exact):
    """Of which alone rounding would be all that is left."""

    class Own(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4)(nn.gelu(x, approximate=not exact))

    module = Own()
    variables = module.init(jax.random.key(0), jnp.ones((1, 8)))
    there = converters.to_torch(module, variables, input_shape=(8,))
    assert converters.verify((module, variables), there, input_shape=(8,)).ok


def strided(*before, padding):
    start = keras.Input((None, None, 3))
    x = start
    for layer in before:
        x = layer(x)
    return keras.Model(start, keras.layers.Conv2D(4, 3, 2, padding, name="c")(x))


def test_axes_of_any_size_have_several():
    one = strided(padding="same")
    other = strided(keras.layers.ZeroPadding2D(1), padding="valid")
    other.set_weights(one.get_weights())
    report = converters.verify(one, other)
    assert not report.ok
    assert "the outputs are equal at one size, but differ for inputs of [8, 8, 8, 3]" in str(report)
    # Which are equal where the size is odd, as it may be told.
    assert converters.verify(one, other, input_shape=(7, 7, 3)).ok
    assert converters.verify(one, converters.from_keras(one)).ok
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    assert np.abs(np.asarray(one(x)) - np.asarray(other(x))).max() > 0.1


@pytest.mark.parametrize(("value", "several"), [(0.0, False), (5.0, True), (-1e9, False)])
def test_steps_that_are_skipped_are_fed(value, several):
    def net(masked):
        start = keras.Input((7, 3))
        x = keras.layers.Masking(value)(start) if masked else start
        x = keras.layers.LSTM(4, name="l")(x)
        if not several:
            return keras.Model(start, x)
        more = keras.Input((2,))
        return keras.Model([start, more], keras.layers.Concatenate()([x, more]))

    one, other = net(True), net(False)
    other.set_weights(one.get_weights())
    assert not converters.verify(one, other).ok
    again = net(True)
    again.set_weights(one.get_weights())
    assert converters.verify(one, again).ok


# -- what a model keeps in objects of Python ----------------------------------------------------


class Keeping(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.dense, self.counts = torch.nn.Linear(3, 3), np.zeros(3, np.float32)
        self.inner = {"sums": [torch.zeros(3)], "calls": [0]}
        self.seen, self.last = set(), collections.deque([1])

    def forward(self, x):
        self.counts += 1
        self.inner["sums"][0] += x.detach().sum(0)
        self.inner["calls"][0] += 1
        self.inner["new"] = 1
        self.last.append(1)
        self.seen.add(len(self.last))
        return self.dense(x) * float(self.counts[0]) + self.inner["sums"][0] + len(self.seen)


class KeepingLayer(keras.layers.Layer):
    def __init__(self):
        super().__init__(name="keeping")
        self.counts, self.calls = np.zeros(3, np.float32), 0
        self.inner, self.last = {"calls": 1}, [1]

    def call(self, x):
        self.counts += 1
        self.calls += 1
        self.inner["calls"] += 1
        self.last.append(1)
        return x * float(self.counts[0]) + self.calls * self.inner["calls"] + len(self.last)


KEEPING = {
    "torch": (Keeping, lambda m: [m.counts, m.inner, m.seen, m.last]),
    "keras": (
        lambda: keras.Sequential([keras.Input((3,)), KeepingLayer(), keras.layers.Dense(2)]),
        lambda m: [m.layers[0].counts, m.layers[0].calls, m.layers[0].inner, m.layers[0].last],
    ),
}


@pytest.mark.parametrize("framework", KEEPING)
def test_each_run_begins_with_what_a_model_keeps_in_its_objects(framework):
    make, told = KEEPING[framework]
    model, x = make(), np.ones((2, 3), np.float32)
    before = repr(told(model))
    report = converters.verify(model, model, x)
    assert report.output.status == "exact"
    assert repr(told(model)) == before
    model(torch.ones(2, 3) if framework == "torch" else x)
    assert repr(told(model)) != before


class Tokens(t.Module):
    """Vectors with a learned one in front and learned positions, as in a vision transformer."""

    def __init__(self, table=False):
        super().__init__()
        self.table = t.Embedding(7, 4) if table else None
        self.project, self.cls = t.Linear(5, 4), t.Parameter(torch.randn(1, 1, 4))
        self.pos = None if table else t.Parameter(torch.randn(1, 7, 4))

    def forward(self, x):
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), self.project(x)], 1)
        return x + (self.pos if self.table is None else self.table(torch.arange(7)))


@pytest.mark.parametrize("table", [False, True])
def test_a_table_that_is_not_fed_the_input_takes_no_ids_from_it(table, tmp_path):
    net = Tokens(table).eval()
    model = converters.from_torch(net, input_shape=(6, 5))
    live = converters.to_keras(*model)
    live.save(tmp_path / "net.keras")
    for other in (live, tmp_path / "net.keras", model):
        report = converters.verify(net, other, input_shape=(6, 5))
        assert (report.ok, report.weights) == (True, ()), str(report)
        assert converters.verify(other, net, input_shape=(6, 5)).ok
    changed = copy.deepcopy(net)
    with torch.no_grad():
        (changed.pos if changed.table is None else changed.table.weight)[..., 3, 1] += 0.5
    assert not converters.verify(changed, live, input_shape=(6, 5)).ok


def test_ids_that_operations_keep_are_whole_numbers():
    start = keras.Input((4,))
    ids = k.Reshape((3,))(start[:, 1:])
    model = keras.Model(start, k.Embedding(9, 2)(ids))
    copied = keras.models.clone_model(model)
    copied.set_weights([w.copy() for w in model.get_weights()])
    assert converters.verify(model, copied).ok
    (rows,) = model.get_weights()
    rows[7] += 1
    copied.set_weights([rows])
    assert not converters.verify(model, copied).ok
