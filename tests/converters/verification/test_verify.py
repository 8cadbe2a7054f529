"""verify: two models, layer by layer."""

import copy
import json

import cases
import flax.linen as nn
import jax
import keras
import numpy as np
import pytest
import torch
from command import fwt_command

import fwt
from fwt import converters
from fwt import layers as fl

k, t = keras.layers, torch.nn


def torch_net():
    net = t.Sequential(
        t.Conv2d(3, 4, 3, padding=1), t.BatchNorm2d(4), t.ReLU(), t.MaxPool2d(2), t.Flatten(),
        t.Linear(4 * 3 * 2, 5), t.Tanh(), t.Linear(5, 2),
    )  # fmt: skip
    return cases.randomise_torch(net)


def keras_net():
    net = keras.Sequential([
        keras.Input((7, 5, 3)), k.Conv2D(4, 3, activation="relu", name="first"),
        k.BatchNormalization(),
        keras.Sequential([k.AveragePooling2D(2), k.LeakyReLU()], name="mid"),
        k.Flatten(), k.Dropout(0.5), k.Dense(5, "gelu"), k.Dense(2)])  # fmt: skip
    return cases.randomise_keras(net)


def test_what_converters_give_is_the_same(tmp_path):
    net = torch_net()
    model = converters.from_torch(net, input_shape=(3, 6, 5))
    other = converters.to_keras(*model)
    sides = {"torch": net, "flax": model, "keras": other, "again": converters.to_torch(*model),
             "pair": (model.module, model.variables)}  # fmt: skip
    for suffix in (".keras", ".npz", ".orbax"):
        converters.save(tmp_path / f"net{suffix}", *model)
        sides[suffix] = tmp_path / f"net{suffix}"
    for first, a in sides.items():
        for second, b in sides.items():
            unknown = {first, second} <= {"torch", "again"}
            report = converters.verify(a, b, input_shape=(3, 6, 5) if unknown else None)
            assert report.ok, (first, second, str(report))
            assert report.first is None
            assert not report.weights
            names = [line.name for line in report.layers if "only" not in line.status]
            assert names == [str(i) for i in range(8)], (first, second, str(report))


def test_keras_models_with_parts(tmp_path):
    net = keras_net()
    model = converters.from_keras(net)
    for b in (model, converters.to_torch(*model), converters.to_keras(*model)):
        report = converters.verify(net, b)
        assert report.ok, str(report)
        assert {"first", "mid/leaky_re_lu"} <= {
            line.name for line in report.layers if "only" not in line.status
        } or ("mid/" in str(report))
    x = np.random.default_rng(1).normal(size=(2, 7, 5, 3)).astype(np.float32)
    assert converters.verify(net, model, x).ok


def other_order(kernel):
    return kernel.reshape(3, 2, 4, 5).transpose(2, 0, 1, 3).reshape(24, 5)


BROKEN = {
    "a transposed kernel": ("0/kernel", "params", lambda v: v.swapaxes(0, 1).copy()),
    "a bias": ("0/bias", "params", lambda v: v + 0.1),
    "a flatten order": ("5/kernel", "params", other_order),
    "a kernel from its end": ("7/kernel", "params", lambda v: v[::-1].copy()),
    "a statistic": ("1/var", "batch_stats", lambda v: v * 2),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_conversion_is_pinned_to_its_layer(name):
    net = torch_net()
    model = converters.from_torch(net, input_shape=(3, 6, 5))
    path, collection, change = BROKEN[name]
    layer, _, leaf = path.partition("/")
    variables = copy.deepcopy(model.variables)
    variables[collection][layer][leaf] = change(variables[collection][layer][leaf])
    for b in (fwt.Model(model.module, variables), converters.to_keras(model.module, variables)):
        report = converters.verify(net, b, input_shape=(3, 6, 5))
        assert (report.ok, report.first) == (False, layer), str(report)
        assert [line.name for line in report.weights] == [f"{collection}/{path}"]
        assert f"they differ, from {layer} on" in str(report)


def test_an_epsilon_is_pinned_to_its_layer():
    net = torch_net()
    model = converters.from_torch(net, input_shape=(3, 6, 5))
    layers = [(n.name, n.layer) for n in model.module.layers]
    layers[1] = ("1", layers[1][1].clone(epsilon=1e-2))
    changed = fwt.Model(fwt.Sequential(layers, model.module.input_shape), model.variables)
    report = converters.verify(net, changed, input_shape=(3, 6, 5))
    assert (report.ok, report.first) == (False, "1")
    assert not report.weights
    assert 1e-5 < next(x for x in report.layers if x.name == "1").relative < 0.1


def test_what_a_report_tells():
    a = fwt.Sequential([("d", nn.Dense(2)), ("a", fl.Tanh())], (3,))
    b = fwt.Sequential([("d", nn.Dense(2)), ("b", fl.ReLU())], (3,))
    variables = jax.tree.map(np.asarray, a.init(jax.random.key(0), np.ones((1, 3))))
    report = converters.verify((a, variables), (b, variables))
    told = json.loads(report.to_json())
    assert [line["status"] for line in told["layers"]] == [
        "exact",
        "only in the first",
        "only in the second",
    ]
    assert told["layers"][1]["absolute"] is None
    assert not report.ok
    assert "no layer that both have departs" in str(report)
    assert report._repr_html_().count("<tr>") == 5
    up = jax.tree.map(lambda v: np.nextafter(v, np.float32(9)), variables)
    report = converters.verify((a, variables), (a, up), np.ones((1, 3), np.float32))
    assert [line.name for line in report.weights] == ["params/d/bias", "params/d/kernel"]
    assert {line.ulp for line in report.weights} == {1}


def test_integers_and_what_can_not_be_verified(tmp_path):
    net = keras.Sequential([keras.Input((4,), dtype="int32"), k.Embedding(7, 3), k.LSTM(2)])
    cases.randomise_keras(net)
    assert converters.verify(net, converters.from_keras(net)).ok
    flat = t.Sequential(t.Linear(3, 2))
    for a, b, said in (
        (flat, converters.from_torch(flat), "give input_shape= or inputs="),
        (flat, 3, "found int"),
        (flat, t.Linear(4, 2), "takes no input of the shape"),
    ):
        shape = None if "give" in said else (3,)
        with pytest.raises(converters.ConversionError, match=said):
            converters.verify(a, b, input_shape=shape)
    converters.save(tmp_path / "w.pt", None, {"params": {"a": np.ones(2)}})
    with pytest.raises(converters.ConversionError, match="weights alone can't run"):
        converters.verify(flat, tmp_path / "w.pt")


def test_on_the_command_line(tmp_path):
    net = keras_net()
    net.save(tmp_path / "net.keras")
    for target in ("a.npz", "a.pt", "a.weights.h5"):
        code, said = fwt_command("convert", tmp_path / "net.keras", tmp_path / target, "--verify")
        assert (code, said.splitlines()[0]) == (0, "equal")
    more = ("-a", tmp_path / "net.keras")
    assert fwt_command("verify", tmp_path / "a.pt", tmp_path / "net.keras", *more)[0] == 0
    with pytest.raises(fwt.FwtError, match=r"a\.pt: weights alone can't run: --architecture"):
        fwt_command("verify", tmp_path / "net.keras", tmp_path / "a.pt")
    module, variables = converters.load(tmp_path / "net.keras")
    variables["params"]["first"]["kernel"] *= 1.01
    converters.save(tmp_path / "b.npz", module, variables)
    code, said = fwt_command("verify", tmp_path / "net.keras", tmp_path / "b.npz", "--json")
    told = json.loads(said)
    assert (code, told["ok"], told["first"]) == (3, False, "first")
    assert (
        fwt_command("verify", tmp_path / "net.keras", tmp_path / "b.npz", "--tolerance", 1)[0] == 0
    )


def test_an_output_that_is_turned_is_another():
    same = fwt.Sequential([("a", fl.Identity())], (3, 3))
    turned = fwt.Sequential([("a", fl.Permute((0, 2, 1)))], (3, 3))
    assert not converters.verify((same, {"params": {}}), (turned, {"params": {}})).ok
    net = t.Sequential(t.Conv2d(2, 3, 1))
    model = converters.from_torch(cases.randomise_torch(net), input_shape=(2, 3, 3))
    layers = [(n.name, n.layer) for n in model.module.layers]
    wrong = fwt.Sequential([*layers, ("p", fl.Permute((0, 2, 3, 1)))], (3, 3, 2))
    assert converters.verify(net, model).ok
    assert not converters.verify(net, (wrong, model.variables)).ok


def test_weights_that_are_not_compared_are_told():
    net = t.Sequential(t.Linear(3, 2), t.Flatten(0, 1))
    report = converters.verify(net, copy.deepcopy(net), input_shape=(3,))
    assert report.ok
    assert "the weights are not compared" in str(report)


def test_products_are_not_rounded(monkeypatch):
    """Whatever was told to multiply fewer bits is told again afterwards."""
    seen = []

    def noted(self, x, forward=torch.nn.Linear.forward):
        products = torch.backends.cuda.matmul
        torch_says = getattr(products, "fp32_precision", None) or products.allow_tf32
        seen.append((torch_says, jax.config.jax_default_matmul_precision))
        return forward(self, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", noted)
    net = torch.nn.Sequential(torch.nn.Linear(3, 2))
    held = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with jax.default_matmul_precision("bfloat16"):
            assert converters.verify(net, net, input_shape=(3,)).ok
            net(torch.ones(1, 3))
        inside, after = seen[0], seen[-1]
        assert inside in (("ieee", "highest"), (False, "highest"))
        assert after in (("tf32", "bfloat16"), (True, "bfloat16"))
    finally:
        torch.set_float32_matmul_precision(held)
