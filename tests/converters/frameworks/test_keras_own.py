"""Keras models with classes of the user's own, and with masks that Keras writes into configs."""

import re

import flax.linen as nn
import jax
import keras
import numpy as np
import pytest
from compare import close

from fwt import converters
from fwt._graph import nodes_of
from fwt.converters.rows import table

L = keras.layers


class Gate(nn.Module):
    units: int = 3

    def __call__(self, x):
        return x * jax.nn.sigmoid(self.units * x)


class Plain(L.Layer):
    units = 3

    def call(self, x):
        return x * keras.ops.sigmoid(self.units * x)


class Passes(Plain):
    def __init__(self, **k):
        super().__init__(**k)


class Takes(Plain):
    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units


class Forgets(Takes):
    def get_config(self):
        return {"units": self.units}


class Says(Takes):
    def get_config(self):
        return {**super(Takes, self).get_config(), "units": self.units}


class Closed(Plain):
    def __init__(self, units=5):
        super().__init__()
        self.units = units


class Function(Plain):
    def __init__(self, units, way=None, **kwargs):
        super().__init__(**kwargs)
        self.units = units


class Silent(Takes):
    def get_config(self):
        return super(Takes, self).get_config() | {"name": self.name}


class Maker(Passes):
    def compute_mask(self, x, mask=None):
        return keras.ops.any(x > 0, axis=-1)


class User(Passes):
    supports_masking = True

    def call(self, x, mask=None):
        y = super().call(x)
        return y if mask is None else y * keras.ops.cast(mask, y.dtype)[..., None]


OWN = {"Plain": Plain, "Passes": Passes, "Takes": lambda **k: Takes(2, **k),
       "Forgets": lambda **k: Forgets(4, **k), "Says": lambda **k: Says(5, **k)}  # fmt: skip


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(table, "LAYERS", list(table.LAYERS))
    monkeypatch.setitem(table.CUSTOM, "keras", {})
    settings = (converters.S("units", None, "units", 3),)
    needed = (converters.S("units", None, "units"),)
    for cls in (Plain, Passes, Takes, Forgets, Says, Closed, Function, Silent, Maker, User):
        told = needed if cls is Silent else settings
        told = () if cls in (Plain, Passes, Maker, User) else told
        flax = type(f"Gate{cls.__name__}", (Gate,), {})  # each goes back to its own
        converters.register(converters.Row(flax, keras=cls, axes="*b c -> *b c", settings=told))
    yield
    table.rows_of.cache_clear()


def line(make):
    return keras.Sequential([keras.Input((7,)), L.Dense(5), make(), L.Dense(4), make()])


def inside(make):
    part = keras.Sequential([keras.Input((7,)), L.Dense(4), make()])
    x = keras.Input((7,))
    return keras.Model(x, make(name="last")(part(make()(x))))


@pytest.mark.parametrize("model", [line, inside])
@pytest.mark.parametrize("kind", OWN)
def test_a_class_is_read_however_it_is_written(kind, model, tmp_path):
    net = model(OWN[kind])
    x = np.random.default_rng(0).normal(size=(3, 7)).astype(np.float32)
    live = converters.from_keras(net)
    close(live(x), net(x))
    told = {x.name for x in net.layers if isinstance(x, Plain)}
    assert told <= {x.name for x in nodes_of(live.module)}
    back = converters.to_keras(live)
    close(back(x), net(x))
    for name in ("net.keras", "net.h5"):
        net.save(tmp_path / name)
        found = converters.load(tmp_path / name)
        close(found(x), net(x))
    told = {cls.__name__: cls for cls in (Plain, Passes, Takes, Forgets, Says)}
    again = keras.saving.load_model(tmp_path / "net.keras", custom_objects=told)
    close(again(x), found(x))


def test_what_a_class_lacks_is_said(tmp_path):
    net = line(Closed)
    x = np.random.default_rng(0).normal(size=(1, 7)).astype(np.float32)
    model = converters.from_keras(net)
    close(model(x), net(x))
    with pytest.raises(converters.ConversionError, match=r"Closed\): .* take name=; give it \*\*"):
        converters.to_keras(model)
    with pytest.raises(converters.ConversionError, match=r"Function\): its .* get_config\(self\)"):
        converters.from_keras(line(lambda: Function(2, lambda z: z)))
    with pytest.raises(converters.ConversionError, match=r"'units' is missing; get_config of its"):
        converters.from_keras(line(lambda: Silent(2)))
    with pytest.raises(converters.ConversionError, match=r"plain.* \(Plain\): autocast=False"):
        converters.from_keras(line(lambda: Plain(autocast=False)))
    named = line(lambda: Plain(trainable=False, activity_regularizer="l2", dtype="float32"))
    close(converters.from_keras(named)(x), named(x))


def test_a_dtype_that_a_class_does_not_tell_is_that_of_the_layer():
    net = line(lambda: Forgets(2, dtype="bfloat16"))
    with pytest.raises(converters.ConversionError, match=r"forgets.* bfloat16"):
        converters.from_keras(net)


TEXT = r"\): in Keras it would use {}, which no .*mask_zero=False"


def table_of(x):
    return L.Embedding(9, 4, mask_zero=True, name="table")(x)


def behind_two(x):
    two = table_of(x)
    return L.GlobalAveragePooling1D(name="user")(L.Concatenate()([two, L.Dense(3)(two)]))


def attention(x):
    two = table_of(x)
    return L.MultiHeadAttention(2, 3, name="user")(two, two)


def sum_of(x):
    two = table_of(x)
    return L.Bidirectional(L.GRU(2), name="user")(L.Add()([two, L.Dense(4)(two)]))


def within(x):
    start = keras.Input((5, 4))
    return keras.Model(start, L.LSTM(3, name="user")(start), name="part")(table_of(x))


MASKED = {
    "LSTM": lambda x: L.LSTM(3, name="user")(L.Dropout(0.1)(table_of(x))),
    "Softmax": lambda x: L.Softmax(name="user")(table_of(x)),
    "TimeDistributed": lambda x: L.TimeDistributed(L.Dense(2), name="user")(table_of(x)),
    "two": behind_two, "attention": attention, "sum": sum_of, "within": within,
    "custom": lambda x: User(name="user")(table_of(x)),
}  # fmt: skip


@pytest.mark.parametrize("kind", MASKED)
def test_a_mask_in_a_functional_model_is_told_by_its_layer(kind, tmp_path):
    start = keras.Input((5,))
    net = keras.Model(start, MASKED[kind](start))
    text = r"user \(\w+" + TEXT.format(r"the mask of table \(Embedding\)")
    with pytest.raises(converters.ConversionError, match=text):
        converters.from_keras(net)
    for name in ("net.keras", "net.h5"):
        net.save(tmp_path / name)
        with pytest.raises(converters.ConversionError, match=text):
            converters.load(tmp_path / name)


def test_other_masks_are_told_too(tmp_path):
    steps, flags = keras.Input((5, 4)), keras.Input((5,), dtype="bool")
    start = keras.Input((5, 4))
    part = keras.Model(start, L.GRU(2)(start), name="part")
    nets = [
        (keras.Model(steps, L.LSTM(3)(L.Masking(name="mask")(steps))), r"the mask of mask \(M"),
        (keras.Model(steps, L.LSTM(3)(Maker(name="maker")(steps))), r"the mask of maker \(Maker"),
        (keras.Sequential([steps, Maker(name="maker"), L.LSTM(3)]), r"the mask of maker \(Maker"),
        (keras.Sequential([steps, L.Masking(name="m"), User()]), r"the mask of m \(Masking"),
        (keras.Model([steps, flags], L.LSTM(3)(steps, mask=flags)), r"it is called with \(mask="),
        (keras.Model([steps, flags], part(steps, mask=flags)), r"it is called with \(mask="),
    ]
    for net, what in nets:
        net.save(tmp_path / "net.keras")
        for read, given in ((converters.from_keras, net),
                            (converters.load, tmp_path / "net.keras")):  # fmt: skip
            with pytest.raises(converters.ConversionError, match="it would use .*" + what):
                read(given)


def test_masks_that_nothing_uses_convert(tmp_path):
    start = keras.Input((5,))
    x = np.random.default_rng(0).integers(0, 9, size=(3, 5)).astype(np.int32)
    inner = keras.Input((5, 4))
    dense = keras.Model(inner, L.Dense(3)(inner))
    inner = keras.Input((5, 4))
    ends = keras.Model(inner, L.LSTM(2)(L.Conv1D(3, 2)(inner)))
    for after in (
        lambda y: L.Dense(2)(L.BatchNormalization()(L.Dropout(0.2)(y))),
        lambda y: L.Dense(2)(L.Flatten()(y)),
        dense,
        ends,
        lambda y: L.Dense(2)(Maker()(y)),
        # Operations take no mask and send none on.
        lambda y: keras.ops.mean(L.Dense(2)(y), axis=1),
        lambda y: L.LSTM(2)(keras.ops.tanh(y)),
        lambda y: L.GRU(2)(y[:, 1:]),
        lambda y: L.LSTM(2)(keras.ops.stack(keras.ops.split(y, 5, 1), 1)[:, :, 0]),
    ):
        net = keras.Model(start, after(table_of(start)))
        close(converters.from_keras(net)(x), net(x))
        # Keras itself can't read the operations of an .h5 file.
        whole = all(isinstance(part, L.Layer) for part in net.operations)
        for name in ("net.keras", "net.h5") if whole else ("net.keras",):
            net.save(tmp_path / name)
            close(converters.load(tmp_path / name)(x), net(x))
    # A model of two inputs, of which the other one is hidden by a mask.
    one, two = keras.Input((5, 4)), keras.Input((5, 4))
    several = [L.Dense(3)(one), L.LSTM(3, return_sequences=True)(two)]
    pair = keras.Model([one, two], L.Dense(2)(L.Add()(several)))
    steps = keras.Input((5, 4))
    net = keras.Model([start, steps], pair([table_of(start), steps]))
    rest = np.random.default_rng(1).normal(size=(3, 5, 4)).astype(np.float32)
    close(converters.from_keras(net)(x, rest), net([x, rest]))
    hidden = keras.Model([start, steps], pair([steps, table_of(start)]))
    with pytest.raises(converters.ConversionError, match="it would use"):
        converters.from_keras(hidden)


def test_the_way_out_of_a_mask_works():
    start = keras.Input((5,))
    free = keras.Model(start, L.LSTM(3)(L.Embedding(9, 4, name="table")(start)))
    net = keras.Model(start, L.LSTM(3)(table_of(start)))
    with pytest.raises(converters.ConversionError) as told:
        converters.from_keras(net)
    assert re.search("where no input is padded, build the model without the mask", str(told.value))
    free.set_weights(net.get_weights())
    x = np.random.default_rng(0).integers(1, 9, size=(3, 5)).astype(np.int32)
    close(converters.from_keras(free)(x), net(x))


class Net(keras.Model):
    def __init__(self):
        super().__init__()
        self.one, self.two = L.Dense(4, activation="relu"), L.Dense(3)

    def call(self, x):
        return self.two(self.one(x)) + 1.0


def test_the_way_out_of_a_subclassed_model_works():
    net, x = Net(), np.random.default_rng(0).normal(size=(2, 5)).astype(np.float32)
    expected = net(x)
    with pytest.raises(converters.ConversionError, match=r"keras\.Model\(x, model\.call\(x\)\)"):
        converters.from_keras(net)
    start = keras.Input((5,))
    close(converters.from_keras(keras.Model(start, net.call(start)))(x), expected)


def test_a_quantised_file_is_told_as_the_live_model_is(tmp_path):
    net = keras.Sequential([keras.Input((8,)), L.Dense(3, name="dense")])
    net.quantize("int8")
    net.save(tmp_path / "net.keras")
    for read, given in ((converters.from_keras, net),
                        (converters.load, tmp_path / "net.keras")):  # fmt: skip
        with pytest.raises(converters.ConversionError, match=r"is quantised \(int8\)"):
            read(given)


def test_the_way_out_of_stacked_cells_works():
    cells = [L.LSTMCell(4), L.LSTMCell(3)]
    net = keras.Sequential([keras.Input((5, 6)), L.RNN(cells, name="rnn")])
    with pytest.raises(converters.ConversionError, match=r"rnn \(RNN\): .*an RNN of each cell"):
        converters.from_keras(net)
    apart = keras.Sequential([keras.Input((5, 6)), L.RNN(L.LSTMCell(4), return_sequences=True),
                              L.RNN(L.LSTMCell(3))])  # fmt: skip
    apart.set_weights(net.get_weights())
    x = np.random.default_rng(0).normal(size=(2, 5, 6)).astype(np.float32)
    close(apart(x), net(x))
    close(converters.from_keras(apart)(x), net(x))
