"""What Flax has no place for comes back: source, Flax, source, bit for bit."""

import json

import keras
import layer_cases
import numpy as np
import pytest
import torch
from command import fwt_command

import fwt
from fwt import converters

t, k = torch.nn, keras.layers

# These become another layer, or statistics become settings; the last two have several seeds of one
# name.
NOT_PROMISED = ("RNN_", "SpectralNormalization", "Normalization", "AugMix", "RandAugment")
OTHER_CONFIG = ("DepthwiseConv1D", "Conv2DTranspose", "Conv3DTranspose", "EinsumDense", "ReLU",
                "ReversibleEmbedding",
                "UnitNormalization", "ELU", "Softmax", "Identity", "TimeDistributed",
                "Bidirectional", "RandomCo", "RandomElastic")  # fmt: skip


def configs(net):
    """Of all layers, tuples as lists."""
    return json.loads(json.dumps([x["config"] for x in net.get_config()["layers"][1:]]))


@pytest.mark.parametrize("name", layer_cases.TORCH)
def test_every_torch_row_comes_back_bit_for_bit(name):
    shape, layer = layer_cases.TORCH[name].make(np.random.default_rng(1))
    net = t.Sequential(*(layer if isinstance(layer, list) else [layer])).eval()
    for module in net.modules():
        if getattr(module, "num_batches_tracked", None) is not None:
            module.num_batches_tracked.fill_(7)
    model = converters.from_torch(net, shape, layout="source", sidecar=True)
    back = converters.to_torch(*model, layout="source")
    if name == "SyncBatchNorm":
        assert type(back[-1]) is t.SyncBatchNorm
    a, b = net.state_dict(), back.state_dict()
    assert list(a) == list(b)
    for key, value in a.items():
        assert value.dtype == b[key].dtype
        assert torch.equal(value, b[key]), key
    momenta = [[getattr(m, "momentum", 0) for m in (list(x) or [x])[:1]] for x in (net, back)]
    assert momenta[0] == momenta[1]  # None, a cumulative mean, too


@pytest.mark.parametrize("name", layer_cases.KERAS)
def test_every_keras_row_comes_back_bit_for_bit(name):
    case = layer_cases.KERAS[name]
    shape, layer = case.make(np.random.default_rng(1))
    kind = "int32" if case.integers else "float32"
    net = keras.Sequential([keras.Input(shape, dtype=kind), layer])
    model = converters.from_keras(net, sidecar=True)
    if name.startswith(NOT_PROMISED):
        return
    back = converters.to_keras(*model)
    assert len(net.variables) == len(back.variables)
    for a, b in zip(net.variables, back.variables, strict=True):  # the seeds too
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), a.path
    if not name.startswith(OTHER_CONFIG):
        assert configs(net) == configs(back)


def lstm_net():
    torch.manual_seed(0)
    net = t.Sequential(t.LSTM(3, 4, 2, batch_first=True, dropout=0.3), converters.Select("last"),
                       t.BatchNorm1d(4), t.Linear(4, 2))  # fmt: skip
    net[2].num_batches_tracked.fill_(12)
    return net.eval()


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".orbax", ".onnx"])
def test_the_sidecar_goes_into_the_files_own_metadata(tmp_path, suffix):
    net = lstm_net()
    model = converters.from_torch(net, (5, 3), sidecar=True)
    converters.save(tmp_path / f"net{suffix}", *model)
    again = converters.load(tmp_path / f"net{suffix}")
    assert again.module == model.module
    back = converters.to_torch(*again)
    for (a, x), (b, y) in zip(net.state_dict().items(), back.state_dict().items(), strict=True):
        assert a == b
        assert torch.equal(x, y), a
    assert back[0].dropout == 0.3
    assert hash(again.module) == hash(model.module)
    assert "sidecar" not in repr(again.module)


def test_changed_weights_are_not_overruled(tmp_path):
    net = lstm_net()
    x = torch.randn(2, 5, 3)
    model = converters.from_torch(net, (5, 3), sidecar=True)
    pruned = fwt.at("0__l0/**", fwt.prune(0.5, where="**"))(model)
    back = converters.to_torch(*pruned)
    wanted = np.asarray(pruned(x.numpy()))
    assert np.allclose(back(x).detach(), wanted, atol=1e-6)
    assert not np.allclose(net(x).detach(), wanted, atol=1e-3)
    state = back.state_dict()
    assert not torch.any(state["0.bias_hh_l0"])  # the sum is in the first again
    assert state["2.num_batches_tracked"] == 12
    plain = converters.from_torch(net, (5, 3))
    assert plain.module.sidecar == ""
    assert not torch.any(converters.to_torch(*plain).state_dict()["0.bias_hh_l0"])


def keras_net():
    keras.utils.set_random_seed(3)
    return keras.Sequential([
        keras.Input((5,)),
        k.Dense(4, kernel_initializer=keras.initializers.HeNormal(seed=4), trainable=False,
                kernel_regularizer="l2", activation="relu", name="first"),
        k.Dropout(0.3, seed=9, name="drop"),
        k.Dense(2, bias_constraint="max_norm", name="last"),
    ])  # fmt: skip


def test_a_keras_file_comes_back_from_another_format(tmp_path):
    net = keras_net()
    net.save(tmp_path / "a.keras")
    for middle in ("b.safetensors", "b.onnx"):
        assert fwt_command("convert", tmp_path / "a.keras", tmp_path / middle)[0] == 0
        assert fwt_command("convert", tmp_path / middle, tmp_path / "c.keras")[0] == 0
        back = keras.saving.load_model(tmp_path / "c.keras")
        for a, b in zip(net.weights, back.weights, strict=True):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
        assert not back.get_layer("first").trainable
        assert configs(net) == configs(back)
    live = converters.to_keras(*converters.from_keras(net, sidecar=True))
    assert [np.asarray(v).tolist() for v in net.variables] == [
        np.asarray(v).tolist() for v in live.variables]  # fmt: skip


def test_a_sidecar_that_lies(tmp_path):
    model = converters.from_torch(lstm_net(), (5, 3), sidecar=True)
    told = json.loads(model.module.sidecar)
    entry = next(e for e in told["layers"].values() if "arrays" in e)
    name = next(iter(entry["arrays"]))
    entry["arrays"][name][1] = [10**9]
    wrong = model.module.clone(sidecar=json.dumps(told))
    with pytest.raises(converters.ConversionError, match="the sidecar holds"):
        converters.to_torch(wrong, model.variables)
    entry["settings"] = {"eps": 10}
    wrong = model.module.clone(sidecar=json.dumps(told))
    with pytest.raises(converters.ConversionError, match="no business of a sidecar"):
        converters.to_torch(wrong, model.variables)
    for text in ("[]", "{", '{"framework": "torch"}'):
        with pytest.raises(converters.ConversionError, match="sidecar"):
            converters.to_torch(model.module.clone(sidecar=text), model.variables)


def test_arrays_in_the_order_of_another_layer_do_not_come_back():
    """Flatten comes back without its data_format, before a kernel in another order."""
    first = keras.layers.Flatten(data_format="channels_first")
    last = keras.layers.Dense(5, trainable=False)
    net = keras.Sequential([keras.Input((3, 4, 2)), first, last])
    again = converters.to_keras(*converters.from_keras(net, "source", sidecar=True))
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 2)).astype(np.float32)
    np.testing.assert_allclose(np.asarray(again(x)), np.asarray(net(x)), rtol=1e-5, atol=1e-5)
    assert not again.layers[-1].trainable


def test_a_module_with_a_parameter_beside_its_layers_comes_back():
    class Shifted(t.Module):
        def __init__(self):
            super().__init__()
            self.shift, self.rnn = t.Parameter(torch.randn(1, 4)), t.LSTM(4, 5, batch_first=True)
            self.norm, self.head = t.BatchNorm1d(3), t.Linear(5, 2)

        def forward(self, x):
            return torch.relu(self.head(self.norm(self.rnn(x + self.shift)[0])) * 2).mean(1)

    torch.manual_seed(0)
    net = Shifted().eval()
    back = converters.to_torch(converters.from_torch(net, input_shape=(3, 4), sidecar=True))
    state = back.state_dict()
    assert list(state) == list(net.state_dict())
    assert all(torch.equal(x, state[name]) for name, x in net.state_dict().items())
