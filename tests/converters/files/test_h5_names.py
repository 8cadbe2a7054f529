"""Files of Keras whose layers have other names than the architecture's, against Keras itself."""

import cases
import keras
import numpy as np
import pytest
from command import cli

from fwt import converters

k = keras.layers


def net(*names, branches=False):
    """Layers of one shape, so that only names, numbers and order tell them apart."""
    start = x = keras.Input((4,))
    for index, name in enumerate(names):
        x = k.Dense(4, name=name)(x)
        x = k.LayerNormalization(name=f"{name}_n")(x) if index % 2 else k.ReLU(name=f"{name}_r")(x)
    if branches:
        x = k.Add(name=f"{name}_s")([k.Dense(4, name=f"{name}_{i}")(x) for i in "ab"])
    return cases.randomise_keras(keras.Model(start, x))


def same(found, model):
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    np.testing.assert_allclose(found(x), model(x, training=False), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("branches", [False, True])
def test_an_h5_of_other_names_goes_in_by_order_and_by_rename(branches, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    theirs = net("z", "m", "a", branches=branches)
    ours = net("first", "second", "third", branches=branches)
    theirs.save("w.h5")
    theirs.save("w.keras")
    ours.save("net.keras")
    for name, said in (("w.h5", "match='order'"), ("w.keras", "match='order'")):
        with pytest.raises(converters.FileFormatError, match=said):
            converters.load(name, architecture=ours)
    renames = {"z": "first", "m": "second", "m_n": "second_n", "a": "third"}
    if branches:
        renames |= {"a_a": "third_a", "a_b": "third_b"}
    held = net("first", "second", "third", branches=branches)
    held.load_weights("w.h5")  # by order
    for name in ("w.h5", "w.keras"):
        for architecture in (ours, "net.keras"):
            for how in ({"match": "order"}, {"rename": renames}):
                found = converters.load(name, architecture=architecture, **how)
                same(found, held)
                same(found, theirs)
    model = converters.from_keras(ours)
    same(converters.load("w.h5", architecture=model, rename=renames), theirs)
    if not branches:
        same(converters.load("w.h5", architecture=model, match="order"), theirs)
        return
    for name in ("w.h5", "w.keras"):
        with pytest.raises(converters.FileFormatError, match=r"third_a and third_b stand beside"):
            converters.load(name, architecture=model, match="order")


def test_an_h5_with_more_or_less_layers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    theirs = net("z", "m", "a")
    theirs.save("w.h5")
    theirs.save_weights("w.weights.h5")
    less, more = net("z", "m"), net("z", "m", "a", "b")
    with pytest.raises(converters.FileFormatError, match=r"drop=\['a/\*\*'\]"):
        converters.load("w.h5", architecture=less)
    with pytest.raises(converters.FileFormatError, match=r"holds 4 layers.*has 3"):
        converters.load("w.h5", architecture=less, match="order")
    with pytest.raises(converters.FileFormatError, match="it holds none of b, b_n"):
        converters.load("w.h5", architecture=more)
    # Keras itself leaves the last layer out without a word.
    with pytest.raises(converters.FileFormatError, match=r"drop=\['layers/dense_2/\*\*'\]"):
        converters.load("w.weights.h5", architecture=less)
    two = keras.Model(theirs.input, theirs.get_layer("m_n").output)
    for how in ({"drop": ["a/**"]}, {"drop": ["a/**"], "match": "order"}):
        same(converters.load("w.h5", architecture=less, **how), two)
    same(converters.load("w.weights.h5", architecture=less, drop=["layers/dense_2/**"]), two)
    # The last layers alone: their numbers have gaps.
    last = keras.Sequential([keras.Input((4,)), k.LayerNormalization(), k.Dense(4), k.ReLU()])
    found = converters.load("w.weights.h5", architecture=last, match="order",
                            drop=["layers/dense/**", "layers/dense_1/**"])  # fmt: skip
    same(found, keras.Sequential([theirs.get_layer(n) for n in ("m_n", "a", "a_r")]))


class Mine(k.Dense):
    pass


class Sub(keras.Model):
    def __init__(self):
        super().__init__()
        self.d, self.a = k.Dense(4), k.Dense(4)

    def call(self, x):
        return self.a(self.d(x))


def test_classes_and_attributes_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain = [keras.Input((4,)), *(k.Dense(4) for _ in range(2)), k.LayerNormalization()]
    ours = keras.Sequential(plain)
    theirs = keras.Sequential([keras.Input((4,)), Mine(4), Mine(4), k.LayerNormalization()])
    cases.randomise_keras(theirs).save_weights("w.weights.h5")
    with pytest.raises(converters.FileFormatError, match="'layers/mine': 'layers/dense'"):
        converters.load("w.weights.h5", architecture=ours)
    same(converters.load("w.weights.h5", architecture=ours, match="order"), theirs)
    renames = {"layers/mine": "layers/dense", "layers/mine_1": "layers/dense_1"}
    same(converters.load("w.weights.h5", architecture=ours, rename=renames), theirs)
    inner = keras.Sequential([keras.Input((4,)), keras.Sequential(theirs.layers), k.Dense(4)])
    inner.save_weights("i.weights.h5")
    outer = keras.Sequential([keras.Input((4,)), keras.Sequential(plain[1:]), k.Dense(4)])
    same(converters.load("i.weights.h5", architecture=outer, match="order"), inner)
    longer = keras.Sequential([*plain, k.Dense(2)])
    with pytest.raises(converters.FileFormatError, match=r"no arrays in layers/dense_2.*build it"):
        converters.load("w.weights.h5", architecture=longer, rename=renames)
    # What stands beside what is taken is not left out without a word.
    shorter = keras.Sequential([keras.Input((4,)), keras.Sequential(plain[1:-1]), k.Dense(4)])
    with pytest.raises(converters.FileFormatError, match=r"takes no arrays of .*drop="):
        converters.load("i.weights.h5", architecture=shorter, rename={
            "layers/sequential/layers/mine": "layers/sequential/layers/dense",
            "layers/sequential/layers/mine_1": "layers/sequential/layers/dense_1"})  # fmt: skip
    # Nothing tells which attribute runs first.
    sub = Sub()
    sub(np.ones((1, 4)))
    cases.randomise_keras(sub).save_weights("s.weights.h5")
    sub.save("s.keras")
    two = keras.Sequential(plain[:3])
    two.save("two.keras")
    for name in ("s.weights.h5", "s.keras"):
        with pytest.raises(converters.FileFormatError, match=r"rename=\{'a': 'layers/dense'\}"):
            converters.load(name, architecture=two)
        with pytest.raises(
            converters.FileFormatError, match="it holds a, d, expected layers/dense"
        ):
            converters.load(name, architecture=two, match="order")
        renames = {"d": "layers/dense", "a": "layers/dense_1"}
        same(converters.load(name, architecture=two, rename=renames), sub)
    cli("convert", "s.keras", "o.safetensors", "-a", "two.keras", "--rename",
               "d=layers/dense", "--rename", "a=layers/dense_1", cwd=tmp_path)  # fmt: skip
    same(converters.load("o.safetensors"), sub)
