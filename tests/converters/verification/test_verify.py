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
from flax import nnx
from marks import thorough_but

import fwt
from fwt import converters
from fwt import layers as fl
from fwt.converters.frameworks.torch_modules import Permute

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


@pytest.mark.thorough
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


def steps(batch_first, what="sequence"):
    last = "concat" if what == "last" else None
    return t.Sequential(
        t.Linear(3, 5), t.GRU(5, 4, 2, bidirectional=True, batch_first=batch_first),
        converters.Select(what, last, batch_first), t.Linear(8, 2))  # fmt: skip


TIME_FIRST = {
    "the sequence": lambda: steps(False),
    "its end": lambda: steps(False, "last"),
    "an encoder": lambda: t.Sequential(
        t.Linear(3, 6), t.TransformerEncoderLayer(6, 2, 7), t.Linear(6, 2)),
    "the batch swapped by hand": lambda: t.Sequential(
        Permute((1, 0, 2)), *steps(True, "last")),
    "tokens": lambda: t.Sequential(
        t.Embedding(11, 3), t.LSTM(3, 4), converters.Select("sequence", None, False)),
}  # fmt: skip


@pytest.mark.parametrize("name", thorough_but(lambda name: name == "the sequence", TIME_FIRST))
def test_the_time_first_or_the_batch(name):
    """What takes the time first is its conversion, whichever of both that takes first."""
    net = cases.randomise_torch(TIME_FIRST[name]())
    shape = (8,) if name == "tokens" else (8, 3)  # as long as verify feeds rows
    models = [converters.from_torch(net, input_shape=shape, layout="source")]
    if name != "the batch swapped by hand":  # which does not say where the ends have it
        models.append(converters.from_torch(net, input_shape=shape))
    off = copy.deepcopy(net)
    with torch.no_grad():
        list(off.parameters())[-1][0] += 1e-3
    for a, b, same in [(net, m, True) for m in models] + [(models[-1], net, True),
                                                          (models[-1], off, False)]:  # fmt: skip
        report = converters.verify(a, b, input_shape=shape)
        assert report.ok == same, report
        assert report.output.shape[0] == (4 if name == "tokens" else 8)
        turned = b is not models[0] and len(models) > 1
        assert ("takes the time first" in str(report)) == turned


def test_inputs_with_the_time_first(tmp_path):
    """A batch is in the layout of the first model, and each row of it has its own scale."""
    net = cases.randomise_torch(steps(False))
    model = converters.from_torch(net)
    x = np.random.default_rng(0).normal(size=(6, 2, 3)).astype(np.float32)
    x[:, 1] *= 1e-6
    assert converters.verify(net, model, x).output.shape == (2, 6, 2)
    assert converters.verify(net, model, x).ok
    assert converters.verify(model, net, x).output.shape == (6, 2, 2)
    alone = (t.RNN(3, 4, bias=False, batch_first=first, nonlinearity="relu")
             for first in (False, True))  # fmt: skip
    a, b = (t.Sequential(rnn, converters.Select("sequence", None, rnn.batch_first))
            for rnn in alone)  # fmt: skip
    b.load_state_dict(a.state_dict())
    assert converters.verify(a, b, x).ok
    with torch.no_grad():
        b[0].weight_ih_l0[0] = torch.nextafter(b[0].weight_ih_l0[0] * 1.001, torch.tensor(9.0))
    x[:, 0] = np.abs(x[:, 0]) * 1e6
    assert not converters.verify(a, b, x).ok


@pytest.mark.parametrize("batch", thorough_but(1, [None, 3]))
def test_onnx_files_with_the_time_first(tmp_path, batch):
    """Of an exporter other than ours: onnxruntime takes (time, batch, channels)."""
    net = cases.randomise_torch(t.Sequential(
        t.LSTM(3, 4, bidirectional=True), converters.Select("sequence", None, False),
        t.Linear(8, 2)))  # fmt: skip
    path, x = tmp_path / "net.onnx", torch.ones(7, batch or 2, 3)
    axes = {"x": {0: "time", 1: "batch"}} if batch is None else None
    torch.onnx.export(net, (x,), path, input_names=["x"], dynamic_axes=axes, dynamo=False)
    model = converters.from_torch(net)
    for a, b in ((path, net), (path, model), (model, path), (net, path)):
        report = converters.verify(a, b, input_shape=(7, 3))
        assert report.ok, report
    converters.save(tmp_path / "net.npz", *model)
    if batch is None:
        assert fwt_command("convert", path, tmp_path / "again.npz", "--verify")[0] == 0
        assert fwt_command("verify", tmp_path / "net.npz", path)[0] == 0
    with torch.no_grad():
        net[2].bias[1] += 1e-3
    assert not converters.verify(path, net, input_shape=(7, 3)).ok


class Swap(t.Module):
    def forward(self, x):
        return x.transpose(0, 1)


class Places(t.Module):
    def __init__(self, count, width):
        super().__init__()
        self.table = t.Parameter(torch.randn(count, 1, width))

    def forward(self, x):
        return x + self.table[: x.shape[0]]


SOURCE = {
    "an encoder": lambda: t.Sequential(t.TransformerEncoderLayer(8, 2, 7), t.Linear(8, 3)),
    "tokens": lambda: t.Sequential(t.Embedding(20, 8), t.TransformerEncoderLayer(8, 2, 7)),
    "a sequence": lambda: t.Sequential(
        t.LSTM(8, 5), converters.Select("sequence", None, False), t.Linear(5, 2)),
    "its end": lambda: t.Sequential(
        t.LSTM(8, 5), converters.Select("last", None, False), t.Linear(5, 2)),
}  # fmt: skip


QUICK = (("a sequence", "source"), ("its end", "channels_last"))


@pytest.mark.parametrize(
    ("name", "layout"),
    thorough_but(
        lambda case: case in QUICK,
        [(n, w) for n in SOURCE for w in ("source", "channels_last")],
        most=3,
    ),
)
def test_onnx_files_of_what_takes_the_time_first(name, layout, tmp_path):
    """In either order, whatever the file tells; and a difference stays one."""
    net = cases.randomise_torch(SOURCE[name]()).eval()
    shape = (6,) if name == "tokens" else (6, 8)
    model = converters.from_torch(net, input_shape=shape, layout=layout)
    path = tmp_path / "net.onnx"
    converters.to_onnx(*model, path=path, input_shape=shape)
    off = copy.deepcopy(net)
    with torch.no_grad():
        list(off.parameters())[-1][0] += 1e-2
    for a, b in ((net, path), (path, net), (model, path), (path, model), (model, net)):
        report = converters.verify(a, b)
        assert report.ok, report
    assert not converters.verify(off, path).ok
    assert not converters.verify(path, off).ok


def test_a_module_that_turns_the_axes_itself():
    """What stands behind it tells nothing of the input: the batch comes first."""
    net = t.Sequential(Swap(), Places(20, 8), t.TransformerEncoderLayer(8, 2, 7), Swap())
    net = cases.randomise_torch(net).eval()
    other = copy.deepcopy(net)
    assert converters.verify(net, other, input_shape=(20, 8)).ok
    with torch.no_grad():
        other[1].table[12] += 2
    assert not converters.verify(net, other, input_shape=(20, 8)).ok


def test_another_layout_is_a_difference():
    """Where layers of both tell the layout, one that makes them equal is not sought."""
    one = t.Sequential(t.GRU(3, 3), converters.Select("last", None, False))
    other = t.Sequential(t.AvgPool1d(1), *copy.deepcopy(one))  # which tells that the batch is first
    x = torch.randn(5, 4, 3)
    assert torch.equal(one(x), other(x))
    assert not converters.verify(one, other, input_shape=(6, 3)).ok
    assert not converters.verify(other, one, input_shape=(6, 3)).ok


DTYPES = ("float16", "bfloat16", "float64", "int32", "uint8", "bool")


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_dtype_that_a_keras_model_takes(dtype):
    """Each number is rounded to it once, for both models."""
    net = cases.randomise_keras(keras.Sequential([
        keras.Input((6,), dtype=dtype), k.Dense(5, "tanh", name="d"), k.Dense(3)]))  # fmt: skip
    model = converters.from_keras(net)
    others = [model]
    if dtype in ("int32", "bool", "uint8"):
        others.append(converters.to_torch(*model))
    for other in others:
        for a, b in ((net, other), (other, net)):
            report = converters.verify(a, b)
            assert report.ok, report
            assert not report.notes
    x = np.random.default_rng(0).normal(size=(4, 6)) * 100
    report = converters.verify(model, net, x)
    assert report.ok, report
    assert {line.status for line in report.layers} <= {"exact", "close", "only in the first"}
    kernel = model.variables["params"]["d"]["kernel"]
    off = fwt.assign({"d/kernel": kernel * np.float32(1.001)})(model)
    assert converters.verify(net, off).first == "d"


def test_rows_of_a_table_are_not_rounded():
    net = cases.randomise_torch(t.Sequential(t.Embedding(5001, 3), t.Linear(3, 2))).half()
    other = copy.deepcopy(net)
    with torch.no_grad():
        other[0].weight[4097] += 0.5
    assert converters.verify(net, converters.from_torch(net), input_shape=(2,)).ok
    assert converters.verify(net, other, input_shape=(2,)).first == "0"


@pytest.mark.parametrize("form", ["list", "dict"])
def test_each_of_several_outputs_counts_by_its_own_scale(form):
    x = keras.Input((4,))
    large, small = (keras.layers.Dense(3, name=name)(x) for name in ("large", "small"))
    outputs = [large, small] if form == "list" else {"b": large, "a": small}
    model = keras.Model(x, outputs)
    for layer, by in zip(model.layers[1:], (1e4, 1e-4), strict=True):
        layer.set_weights([by * np.random.default_rng(3).normal(size=w.shape)
                           for w in layer.get_weights()])  # fmt: skip
    flax = converters.from_keras(model)
    net = converters.to_torch(*flax)
    report = converters.verify(model, net)
    assert report.ok
    assert converters.verify(flax, model).ok
    with torch.no_grad():
        net.get_submodule("small").weight[0, 1] *= 1.001
    report = converters.verify(model, net)
    assert not report.ok
    assert report.first == "small"
    assert report.output.status == "differs"
    alone = keras.Model(x, large)
    assert not converters.verify(model, alone).ok
    assert not converters.verify(alone, model).ok


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.BatchNorm(True)(nn.Dense(5)(x))))


class Nnx(nnx.Module):
    def __init__(self):
        self.a, self.b = (nnx.Linear(*n, rngs=nnx.Rngs(0)) for n in ((4, 5), (5, 3)))

    def __call__(self, x):
        return self.b(nnx.relu(self.a(x)))


class Tokens(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.Embed(7, 5)(x).sum(-2))


@pytest.mark.parametrize("net", thorough_but(1, [Linen(), Tokens()]), ids=["floats", "tokens"])
def test_a_linen_module_of_ones_own_by_its_output(tmp_path, net):
    dtype = np.int32 if isinstance(net, Tokens) else np.float32
    variables = net.init(jax.random.key(0), np.ones((1, 4), dtype))
    path = tmp_path / "net.onnx"
    if dtype == np.int32:
        with pytest.raises(converters.ConversionError, match="input_dtype='int32' feeds it whole"):
            converters.to_onnx(net, variables, path, (4,), input_dtype="float32")
    converters.to_onnx(net, variables, path, (4,))
    for pair in (((net, variables), path), (path, fwt.Model(net, variables))):
        report = converters.verify(*pair)
        assert report.ok
        assert any("the weights are not compared" in note for note in report.notes)
    changed = fwt.prune(0.3)(variables)
    report = converters.verify((net, changed), path)
    assert (report.ok, report.first) == (False, None)
    assert "no layer" not in str(report)


def test_an_nnx_module_of_ones_own_by_its_output():
    net = Nnx()
    assert converters.verify(net, Nnx(), input_shape=(4,)).ok
    with pytest.raises(converters.ConversionError, match="give input_shape= or inputs="):
        converters.verify(net, Nnx())
    net.b.kernel[...] *= 1.25
    assert not converters.verify(net, Nnx(), input_shape=(4,)).ok
    with pytest.raises(converters.ConversionError, match="holds a int, no module, which can't run"):
        converters.verify((3, {}), net, input_shape=(4,))


def test_layers_that_a_fold_moves_are_told_from_a_difference():
    """As exporters take a BatchNorm into the convolution before it."""
    net = cases.randomise_torch(t.Sequential(t.Conv2d(3, 4, 3), t.BatchNorm2d(4), t.ReLU())).eval()
    scale = (net[1].weight / torch.sqrt(net[1].running_var + net[1].eps)).detach()
    folded = copy.deepcopy(net)
    with torch.no_grad():
        folded[0].weight *= scale[:, None, None, None]
        folded[0].bias[:] = (net[0].bias - net[1].running_mean) * scale + net[1].bias
        folded[1].weight[:] = torch.sqrt(net[1].running_var + net[1].eps)
        folded[1].bias[:] = net[1].running_mean
    report = converters.verify(net, folded, input_shape=(3, 6, 5))
    assert report.ok, str(report)
    assert report.layers[0].status == "differs"
    assert "allowed; the layers behind it make up for it" in str(report)
    assert "make up for it" in report._repr_html_()
    with torch.no_grad():
        folded[1].bias[0] += 1
    assert "make up for it" not in str(converters.verify(net, folded, input_shape=(3, 6, 5)))


def test_tensors_of_other_shapes_under_one_name_are_no_difference():
    """Equal models may do it in steps of their own."""
    k = keras.layers

    def net(shape):
        layers = [k.Reshape(shape, name="r"), k.Flatten(name="f"), k.Dense(3, name="d")]
        return keras.Sequential([keras.Input((12,)), *layers])

    one, other = net((3, 4)), net((4, 3))
    other.set_weights(one.get_weights())
    report = converters.verify(one, other)
    assert report.ok
    row = next(line for line in str(report).splitlines() if line.startswith("r "))
    assert row.split(None, 1)[1].startswith("not compared  under this name the models have tensors")
    assert "differs" not in str(report) + report._repr_html_()
    other.set_weights([2 * w for w in one.get_weights()])
    assert "the shapes differ" in str(converters.verify(one, other))


class Squashed(t.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return torch.tanh(self.inner(x))


def turned(model, dims):
    """A Keras model whose output has its axes in another order."""
    return keras.Model(model.inputs, keras.layers.Permute(dims)(model.outputs[0]))


@pytest.mark.parametrize(("channels", "own"), [(3, False), (3, True), (4, False), (4, True)])
def test_images_made_of_vectors(channels, own, tmp_path):
    """Each output lies as the layers before it say, whatever the input."""
    torch.manual_seed(0)
    chained = t.Sequential(t.Linear(8, 32), t.Unflatten(1, (2, 4, 4)),
                           t.ConvTranspose2d(2, channels, 1)).eval()  # fmt: skip
    net = Squashed(chained).eval() if own else chained
    model = converters.from_torch(net, input_shape=(8,))
    source = converters.from_torch(net, input_shape=(8,), layout="source")
    live = converters.to_keras(*model)
    live.save(tmp_path / "net.keras")
    converters.save(tmp_path / "net.onnx", *source)
    sides = {"net": net, "model": model, "source": source, "live": live,
             "onnx": tmp_path / "net.onnx", "keras": tmp_path / "net.keras"}  # fmt: skip
    x = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
    y = net(torch.tensor(x)).detach().numpy()
    np.testing.assert_allclose(np.moveaxis(y, 1, -1), live.predict(x, verbose=0), atol=1e-5)
    for a in ("net", "source"):
        for b in sides:
            assert converters.verify(sides[a], sides[b], input_shape=(8,)).ok, (a, b)
            assert converters.verify(sides[b], sides[a], input_shape=(8,)).ok, (b, a)
    wrong = {dims: turned(live, dims) for dims in [(3, 1, 2), (2, 1, 3), (1, 3, 2), (3, 2, 1)]}
    for dims, other in wrong.items():
        # Images with the channels first are the same ones where a layer says that they are.
        same = dims == (3, 1, 2)
        assert converters.verify(net, other).ok == same, dims
        assert converters.verify(other, tmp_path / "net.onnx").ok == same, dims
    with torch.no_grad():
        chained[2].weight[0, 1] += 0.1
    for other in (model, live, tmp_path / "net.onnx", tmp_path / "net.keras"):
        assert not converters.verify(net, other).ok
