"""``verify`` on models of several inputs and outputs, and on further calls of one layer."""

import copy

import flax.linen as nn
import jax.numpy as jnp
import keras
import numpy as np
import pytest
import torch
from cases import shop

import fwt
from fwt import converters

RNG = np.random.default_rng(0)
SHAPES = [(3, 6, 7), (3, 6, 7)]


class Stereo(torch.nn.Module):
    """Two images of one shape, channels first; outputs of two shapes, two of them alike."""

    def __init__(self):
        super().__init__()
        self.left, self.right = torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(3, 4, 3)
        self.act, self.head = torch.nn.ReLU(), torch.nn.Linear(4, 4)
        self.by = 0.1

    def forward(self, a, b):
        h, g = self.act(self.left(a)), self.act(self.right(b))
        pooled = self.head((h * g).mean((2, 3)))
        return {"sum": h + g, "pooled": pooled, "last": self.act(pooled - self.by)}


class SwappedInputs(Stereo):
    def forward(self, a, b):
        return super().forward(b, a)


class SwappedOutputs(Stereo):
    def forward(self, a, b):
        found = super().forward(a, b)
        return {"sum": found["sum"], "pooled": found["last"], "last": found["pooled"]}


class OtherCall(Stereo):
    """The third call of the ReLU takes something else."""

    def __init__(self):
        super().__init__()
        self.by = 0.2


def as_other(net, cls):
    other = cls().eval()
    other.load_state_dict(net.state_dict())
    return other


@pytest.fixture(scope="module")
def stereo(tmp_path_factory):
    torch.manual_seed(0)
    net = Stereo().eval()
    model = converters.from_torch(net, SHAPES)
    path = tmp_path_factory.mktemp("stereo") / "net.onnx"
    converters.to_onnx(model, path)
    return net, model, path


@pytest.mark.thorough
def test_equal_models_are_equal_in_all_frameworks(stereo, tmp_path):
    net, model, path = stereo
    beside = tmp_path / "net.safetensors"
    converters.save(beside, model)
    source = converters.from_torch(net, SHAPES, layout="source")
    pairs = [(path, net), (model, path), (net, source), (beside, path),
             (converters.to_keras(model), path)]  # fmt: skip
    for one, other in pairs:
        report = converters.verify(one, other)
        assert report.ok, (one, other, str(report))
    assert converters.verify(net, copy.deepcopy(net), input_shape=SHAPES).ok


def test_equal_models_are_equal(stereo):
    net, model, _ = stereo
    report = converters.verify(net, model)
    assert report.ok, str(report)
    assert [x.name for x in report.outputs] == ["output sum", "output pooled", "output last"]
    xs = [RNG.normal(size=(2, *s)).astype(np.float32) for s in SHAPES]
    for given in (xs, tuple(xs), {"b": xs[1], "a": xs[0]}):
        assert converters.verify(net, model, given).ok
    with pytest.raises(converters.ConversionError, match="the inputs are named a, c; the models"):
        converters.verify(net, model, {"a": xs[0], "c": xs[1]})
    with pytest.raises(converters.ConversionError, match="have 2, 1 rows: each needs as many"):
        converters.verify(net, model, [xs[0], xs[1][:1]])
    with pytest.raises(converters.ConversionError, match="takes 2 inputs, the second 1"):
        converters.verify(net, torch.nn.Sequential(torch.nn.Linear(2, 3)))


@pytest.mark.parametrize(
    ("cls", "first", "departs"),
    [
        (SwappedInputs, "left", ["sum", "pooled", "last"]),
        (SwappedOutputs, "output pooled", ["pooled", "last"]),
        (OtherCall, "act (call 3)", ["last"]),
    ],
)
@pytest.mark.parametrize(
    "against",
    ["model", pytest.param("file", marks=pytest.mark.thorough),
     pytest.param("live", marks=pytest.mark.thorough)],
)  # fmt: skip
def test_what_is_planted_is_found(stereo, cls, first, departs, against):
    net, model, path = stereo
    other = as_other(net, cls)
    pairs = {"model": (other, model), "file": (other, path), "live": (other, net)}
    shapes = SHAPES if against == "live" else None
    report = converters.verify(*pairs[against], input_shape=shapes)
    assert (report.ok, report.first) == (False, first)
    found = [x.name for x in report.outputs if x.status == "differs"]
    assert found == [f"output {n}" for n in departs]
    assert all(n in str(report) for n in found)


def test_a_weight_of_one_output(stereo):
    net, _, path = stereo
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.head.weight[0, 0] += 1e-3
    report = converters.verify(other, path)
    assert (report.ok, report.first) == (False, "head")
    assert [x.name for x in report.weights] == ["params/head/kernel"]
    assert report.outputs[0].status in ("exact", "close")


class Scales(torch.nn.Module):
    """An output a billion times the other."""

    def __init__(self, off=0.0):
        super().__init__()
        self.a, self.off = torch.nn.Linear(3, 2), off

    def forward(self, x):
        y = self.a(x)
        return y * 1e6, torch.tanh(y) * (1e-3 + self.off)


def test_each_output_has_its_own_scale():
    torch.manual_seed(0)
    large = Scales().eval()
    small = Scales(1e-8).eval()
    small.load_state_dict(large.state_dict())
    report = converters.verify(large, converters.from_torch(small, (3,)))
    assert [x.status == "differs" for x in report.outputs] == [False, True]


def test_keras_by_key(tmp_path):
    net, path = shop(by_key=True), tmp_path / "net.onnx"
    model = converters.from_keras(net)
    converters.to_onnx(model, path)
    net.save(tmp_path / "net.keras")
    for other in (converters.to_torch(model), tmp_path / "net.keras"):
        assert converters.verify(other, net).ok
    for other in (model, path):
        report = converters.verify(net, other)
        assert report.ok, str(report)
        names = {x.name for x in report.layers if not x.status.startswith("only")}
        assert {"table", "dense", "score", "tags"} <= names  # also of the file
    table = model.variables["params"]["table"]["embedding"].copy()
    table[7] += 0.5  # every row is fed
    report = converters.verify(path, fwt.assign({"table/embedding": table})(model))
    assert (report.ok, report.first) == (False, "table")
    score = model.variables["params"]["score"]["bias"].copy()
    score[1] += 1e-3
    report = converters.verify(net, fwt.assign({"score/bias": score})(model))
    assert (report.ok, report.first) == (False, "score")
    assert {x.name: x.status for x in report.outputs}["output tags"] in ("exact", "close")


def twice(third=0.0):
    x = keras.Input((3,), name="x")
    act, norm = keras.layers.ReLU(name="act"), keras.layers.LayerNormalization(name="norm")
    h = act(keras.layers.Dense(4, name="a")(x))
    y = norm(act(norm(keras.layers.Dense(4, name="b")(h)) + third))
    return keras.Model(x, y + keras.ops.relu(h - 1))


def test_calls_of_one_layer_by_their_place(tmp_path):
    keras.utils.set_random_seed(0)
    net, path = twice(), tmp_path / "net.onnx"
    model = converters.from_keras(net)
    converters.to_onnx(model, path)
    net(np.ones((1, 3), np.float32))
    net.export(tmp_path / "keras.onnx", format="onnx", verbose=False)
    wanted = {"a", "act", "b", "norm", "act (call 2)", "norm (call 2)"}
    for other in (model, path, tmp_path / "keras.onnx"):
        report = converters.verify(net, other)
        assert report.ok
        both = {x.name for x in report.layers if not x.status.startswith("only")}
        assert wanted <= both, str(report)
    changed = twice(0.5)
    changed.set_weights(net.get_weights())
    for other in (model, path):
        report = converters.verify(changed, other)
        assert (report.ok, report.first) == (False, "act (call 2)"), str(report)


class Twice(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.act = torch.nn.Linear(3, 4), torch.nn.Linear(4, 4), torch.nn.ReLU()

    def forward(self, x, y):
        h = self.act(self.a(x))
        return self.act(self.b(h)) + y, h


@pytest.mark.parametrize("dynamo", [False, pytest.param(True, marks=pytest.mark.thorough)])
def test_the_layers_of_an_exported_graph_have_names(tmp_path, dynamo):
    torch.manual_seed(0)
    net, path = Twice().eval(), tmp_path / "net.onnx"
    batch = torch.export.Dim("batch")
    names = {"input_names": ["x", "y"], "output_names": ["sum", "h"]}
    axes = (
        {"dynamic_shapes": ({0: batch}, {0: batch}), "verbose": False}
        if dynamo
        else {"dynamic_axes": {n: {0: "batch"} for n in ("x", "y", "sum", "h")}}
    )
    torch.onnx.export(net, (torch.ones(2, 3), torch.ones(2, 4)), str(path), dynamo=dynamo,
                      **names, **axes)  # fmt: skip
    report = converters.verify(net, path, external_data=True)
    assert report.ok
    both = {x.name for x in report.layers if not x.status.startswith("only")}
    assert {"a", "b", "act", "act (call 2)"} <= both
    with torch.no_grad():
        net.b.weight[1] *= 1.5
    report = converters.verify(net, path, external_data=True)
    assert (report.ok, report.first) == (False, "b")
    assert [x.status == "differs" for x in report.outputs] == [True, False]


@pytest.mark.thorough
def test_images_and_sequences_of_the_same_sizes(tmp_path):
    """Where channels are is told for each input by the layers behind it."""
    image, steps = keras.Input((3, 3, 3), name="image"), keras.Input((3, 3), name="steps")
    free = keras.Input((None, None, 3), name="free")
    pool = keras.layers.GlobalAveragePooling2D
    parts = [pool()(keras.layers.Conv2D(4, 2, name="a")(image)),
             keras.layers.LSTM(4, name="b")(steps),
             pool()(keras.layers.Conv2D(4, 2, name="c")(free))]  # fmt: skip
    last = keras.layers.Conv2D(2, 1, name="d")(image)
    net = keras.Model([image, steps, free], [keras.layers.Add(name="sum")(parts), last])
    model = converters.from_keras(net)
    there, path = converters.to_torch(model), tmp_path / "net.onnx"
    converters.to_onnx(model, path, input_shape=[(3, 3, 3), (3, 3), (5, 6, 3)])
    for pair in ((net, there), (there, net), (there, model), (there, path), (path, net)):
        report = converters.verify(*pair)
        assert report.ok, str(report)
    with torch.no_grad():
        there.b.weight_ih_l0[0, 0] += 0.01
    assert converters.verify(net, there).first == "b"


@pytest.mark.thorough
def test_the_command_line(tmp_path):
    from typer.testing import CliRunner

    from fwt.cli import app

    net, path = shop(by_key=True), tmp_path / "net.onnx"
    net.save(tmp_path / "net.keras")
    run = CliRunner().invoke
    made = run(app, ["convert", str(tmp_path / "net.keras"), str(path), "--verify"])
    assert made.exit_code == 0, made.output
    model = converters.from_onnx(path)
    bias = model.variables["params"]["tags"]["bias"] + 1
    converters.to_onnx(fwt.assign({"tags/bias": bias})(model), tmp_path / "other.onnx")
    found = run(app, ["verify", str(tmp_path / "net.keras"), str(tmp_path / "other.onnx")])
    assert found.exit_code == 3
    assert "from tags on" in found.output
    assert "output tags" in found.output


class Sums(torch.nn.Module):
    """Two sums, of each of which Keras and ONNX make two layers."""

    def __init__(self):
        super().__init__()
        self.l, self.m = torch.nn.Linear(5, 4), torch.nn.Linear(7, 4)

    def forward(self, v):
        return self.l(v[..., :5]).sum(1), self.m(v).sum(1)


def test_parts_of_a_further_call_are_of_that_call(tmp_path):
    net = Sums().eval()
    model = converters.from_torch(net, (3, 7))
    converters.to_onnx(model, tmp_path / "n.onnx")
    for other in (converters.to_keras(model), tmp_path / "n.onnx", net):
        report = converters.verify(other, model, input_shape=(3, 7))
        assert report.ok, report


def test_an_input_may_be_left_out():
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.l = torch.nn.Linear(4, 3)

        def forward(self, x, y=None):
            return self.l(x) if y is None else self.l(x) + y

    net = Two().eval()
    for shape in ((4,), [(4,), (3,)]):
        model = converters.from_torch(net, shape, layout="source")
        assert converters.verify(net, model, input_shape=shape).ok


@pytest.mark.thorough
def test_a_loop_of_an_onnx_file_counts_without_a_batch(tmp_path):
    layer = keras.layers.ConvLSTM2D(2, 3)
    model = keras.Sequential([keras.Input((3, 6, 5, 2)), layer])
    converters.to_onnx(converters.from_keras(model), tmp_path / "net.onnx")
    assert converters.verify(model, tmp_path / "net.onnx")
    kernel, *others = layer.get_weights()
    layer.set_weights([kernel * 1.1, *others])
    assert not converters.verify(model, tmp_path / "net.onnx")


def halving(scale=1.0):
    """A U-Net in small, which takes images of multiples of four."""
    image = keras.Input((None, None, 3))
    wide = keras.layers.Conv2D(4, 3, padding="same", name="conv")(image)
    small = keras.layers.MaxPooling2D(4)(wide)
    up = keras.layers.UpSampling2D(4)(keras.layers.Rescaling(scale)(small))
    return keras.Model(image, keras.layers.Concatenate()([wide, up]))


def test_sizes_that_a_model_refuses_are_passed_over():
    net = halving()
    report = converters.verify(net, converters.from_keras(net))
    assert report.ok
    assert report.output.shape[1] == 8
    assert not report.notes
    other = halving(2.0)
    other.set_weights(net.get_weights())
    assert not converters.verify(net, other).ok
    steps = keras.Input((None, 4))
    pairs = keras.Model(steps, keras.layers.Dense(3)(keras.layers.Reshape((-1, 8))(steps)))
    assert converters.verify(pairs, converters.from_keras(pairs)).ok
    odd = keras.Input((None, 4))
    none = keras.Model(odd, keras.layers.Reshape((-1, 28))(odd))
    with pytest.raises(
        fwt.ConversionError, match=r"takes no input .*: input_shape= or inputs= says"
    ):
        converters.verify(none, none)
    assert converters.verify(none, none, input_shape=(14, 4)).ok


class Named(nn.Module):
    @nn.compact
    def __call__(self, left, right):
        return nn.Dense(4, name="a")(left) + nn.Dense(4, name="b")(right)


def test_inputs_are_told_by_examples():
    """By name or in their order, as their shapes are."""
    net = keras_of_two()
    examples = {"left": np.ones((4, 3), np.float32), "right": jnp.ones((1, 5))}
    shapes = {"left": (3,), "right": (5,)}
    linen = Named()
    weights = {n: np.asarray(net.get_layer(n).kernel) for n in "ab"}
    params = {n: {"kernel": w, "bias": np.zeros(4, np.float32)} for n, w in weights.items()}
    model = fwt.Model(linen, {"params": params})
    wrong = fwt.Model(linen, {"params": {**params, "b": {**params["b"], "bias": np.ones(4)}}})
    for told in (examples, shapes, [*examples.values()], [*shapes.values()]):
        assert converters.verify(model, net, input_shape=told).ok
        assert converters.verify(net, model, input_shape=told).ok
        assert not converters.verify(net, wrong, input_shape=told).ok
    single = torch.nn.Sequential(torch.nn.Conv1d(3, 4, 3))
    assert converters.verify(single, single, input_shape=torch.ones(2, 3, 9)).ok


def keras_of_two():
    ends = [keras.Input((3,), name="left"), keras.Input((5,), name="right")]
    parts = [keras.layers.Dense(4, name=n)(x) for n, x in zip("ab", ends, strict=True)]
    return keras.Model(ends, keras.layers.Add()(parts))
