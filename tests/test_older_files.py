"""Files and pickles that fwt 0.1.0 wrote still load, and mean the same.

tests/fixtures/0.1.0 holds one of each: a small image model (``net.*``), an LSTM (``sequence``,
``torch_module``) and an attention model, with inputs and outputs in ``expected.npz``.
"""

import importlib
import json
import pickle
from pathlib import Path

import flax.typing
import numpy as np
import pytest

import fwt
from fwt import converters

HOME = Path(__file__).resolve().parent / "fixtures" / "0.1.0"
EXPECTED = dict(np.load(HOME / "expected.npz"))


def unpickled(name):
    return pickle.loads((HOME / f"{name}.pickle").read_bytes())


def assert_gives(model, inputs, outputs):
    np.testing.assert_allclose(model(EXPECTED[inputs]), EXPECTED[outputs], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("path", sorted(HOME.glob("net.*")), ids=lambda p: p.name)
def test_a_file_of_every_format_loads(path):
    """A file of weights alone gets the module of the pickle."""
    has_module = path.suffix not in (".msgpack", ".pt") and path.name != "net.weights.h5"
    how = {} if has_module else {"architecture": unpickled("model").module}
    assert_gives(converters.load(path, **how), "x", "y")


def test_a_sidecar_comes_back():
    assert '"LSTM"' in converters.load(HOME / "sidecar.safetensors").module.sidecar


@pytest.mark.parametrize(("name", "x", "y"), [("model", "x", "y"), ("sequence", "sx", "sy")])
def test_models_unpickle(name, x, y):
    assert_gives(unpickled(name), x, y)


@pytest.mark.parametrize(
    ("name", "x", "y"), [("torch_module", "sx", "sy"), ("torch_attention", "hx", "hy")]
)
def test_torch_modules_with_layers_of_ours_unpickle(name, x, y):
    import torch

    module = torch.load(HOME / f"{name}.pt", weights_only=False)
    found = module(torch.from_numpy(EXPECTED[x])).detach().numpy()
    np.testing.assert_allclose(found, EXPECTED[y], rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(
    not hasattr(flax.typing, "HashableMapping"),
    reason="flax 0.12.8 wrote it, with a class of its own",
)
def test_nnx_modules_unpickle():
    assert_gives(unpickled("nnx"), "x", "y")


def test_layers_and_nouns_unpickle():
    kinds = [type(n.layer).__name__ for n in unpickled("layers").layers]
    assert kinds == ["ZeroPad", "AdaptiveAvgPool", "Masking", "ReLU", "Permute", "GRU",
                     "TransformerEncoderLayer"]  # fmt: skip
    assert all(type(n.layer).__module__.startswith("fwt.layers")
               for n in unpickled("layers").layers)  # fmt: skip
    params = {"dense": {"kernel": np.full((4, 2), 3.0, np.float32)}}
    bounded = fwt.project(unpickled("constraint"), where=unpickled("kernels"))(params)
    np.testing.assert_allclose(bounded["dense"]["kernel"], 1.0, rtol=1e-6)
    drawn = fwt.initialize(unpickled("initializer"), 0)(params)["dense"]["kernel"]
    assert 0.5 <= drawn.min() < drawn.max() < 1
    masks = fwt.masks(score=unpickled("score"), pattern=unpickled("pattern"))(params)
    assert masks["dense"]["kernel"].sum() == 4


def test_layers_in_another_module_than_before_unpickle():
    pickled = b"cfwt._windows\nPixelShuffle\n."
    assert pickle.loads(pickled) is fwt.layers.PixelShuffle


def test_what_was_looked_at_unpickles():
    assert unpickled("report").ok
    assert "conv" in str(unpickled("summary"))
    kernels = fwt.select(unpickled("masks"), "**/kernel")
    assert {k: int(m.sum()) for k, m in kernels.items()} == {"conv/kernel": 18, "dense/kernel": 72}
    assert unpickled("state").masks["conv"]["kernel"].shape == (2, 3, 2, 3)


@pytest.mark.parametrize("name", json.loads((HOME / "names.json").read_text()))
def test_a_public_name_is_where_0_1_0_had_it(name):
    """Which is what a pickle says of a function or a class."""
    module, _, attribute = name.partition(":")
    assert callable(getattr(importlib.import_module(module), attribute))
