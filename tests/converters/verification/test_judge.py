"""What verify takes for equal and what not: planted differences, and models that are equal."""

import contextlib
import copy

import cases
import flax.linen as nn
import jax
import keras
import numpy as np
import pytest
import torch
from marks import thorough_but

import fwt
from fwt import converters
from fwt.converters import judge

k, t = keras.layers, torch.nn


class Cube(t.Module):
    def forward(self, x):
        return x**3


class Attends(t.Module):
    """Attention over all earlier steps, and a residual."""

    def __init__(self, masked=True, slope=1.0):
        super().__init__()
        self.mixed, self.masked, self.slope = t.Linear(8, 24), masked, slope

    def forward(self, x):
        q, k, v = self.mixed(x).chunk(3, -1)
        scores = q @ k.mT / 8**0.5
        if self.masked:
            scores += torch.full(scores.shape[-2:], -torch.inf).triu(1)
        return x + self.slope * scores.softmax(-1) @ v


def chain(*layers):
    return cases.randomise_torch(t.Sequential(*layers))


def perceptron():
    return chain(
        t.Linear(7, 12), t.BatchNorm1d(12, eps=1e-3), t.GELU(), t.Linear(12, 12), t.LayerNorm(12),
        t.ELU(), t.Linear(12, 9), t.LeakyReLU(0.1), t.Linear(9, 5),
    )  # fmt: skip


def images():
    return chain(
        t.Conv2d(3, 8, 3, padding=1), t.BatchNorm2d(8), t.ReLU(), t.Conv2d(8, 8, 3, groups=2),
        t.Hardtanh(), t.AvgPool2d(2, 1, 1), t.Flatten(), t.Linear(200, 6), t.Softmax(-1),
    )  # fmt: skip


def words():
    net = t.Sequential(t.Embedding(300, 8), Attends(), t.LayerNorm(8), t.Flatten(), t.Linear(40, 9))
    return cases.randomise_torch(net)


def steps():
    rnn = (t.LSTM(3, 6, batch_first=True), converters.Select("last"))
    return chain(*rnn, t.Linear(6, 5), t.Tanh(), t.Linear(5, 1))


NETS = {"perceptron": (perceptron, (7,)), "images": (images, (3, 6, 6)), "words": (words, (5,)),
        "steps": (steps, (9, 3))}  # fmt: skip


def scaled(path, by, at=...):
    """A change of one number, or of all, of a weight or statistic."""

    def change(net):
        with torch.no_grad():
            net.state_dict()[path][at] *= by

    return change


def swapped(path):
    def change(net):
        value = net.state_dict()[path]
        value[[0, 1]] = value[[1, 0]].clone()

    return change


def instead(index, layer):
    def change(net):
        net[index] = layer

    return change


def setting(index, **settings):
    def change(net):
        for name, value in settings.items():
            setattr(net[index], name, value)

    return change


PLANTED = {
    ("perceptron", "0"): [
        scaled("0.weight", 1.0001, (3, 2)),
        scaled("0.bias", 1.0001),
        swapped("0.weight"),
    ],
    ("perceptron", "1"): [
        setting(1, eps=1e-5),
        scaled("1.running_var", 1.0001),
        scaled("1.running_mean", 1.001, 4),
    ],
    ("perceptron", "2"): [instead(2, t.GELU("tanh")), instead(2, t.SiLU())],
    ("perceptron", "3"): [scaled("3.weight", 1.0001, (5, 5)), scaled("3.bias", 0.999, 2)],
    ("perceptron", "4"): [setting(4, eps=1e-6), scaled("4.weight", 1.0001, 3)],
    ("perceptron", "5"): [instead(5, t.ELU(1.0001)), instead(5, t.CELU(0.9))],
    ("perceptron", "7"): [instead(7, t.LeakyReLU(0.1001))],
    ("perceptron", "8"): [
        scaled("8.weight", 1.0001, (1, 1)),
        scaled("8.bias", 1.0001, 0),
        swapped("8.bias"),
    ],
    ("images", "0"): [
        scaled("0.weight", 1.0001, (3, 1, 0, 2)),
        setting(0, padding_mode="reflect"),
        swapped("0.weight"),
    ],
    ("images", "1"): [
        setting(1, eps=1e-4),
        scaled("1.running_mean", 1.001),
        swapped("1.running_var"),
    ],
    ("images", "3"): [scaled("3.weight", 1.0001, (0, 0, 0, 0)), scaled("3.bias", 1.0001, 1)],
    ("images", "4"): [instead(4, t.Hardtanh(-1, 1.001)), instead(4, t.Hardtanh(-1.001, 1))],
    ("images", "5"): [setting(5, count_include_pad=False)],
    ("images", "7"): [
        scaled("7.weight", 1.0001, (2, 100)),
        swapped("7.weight"),
        scaled("7.bias", 1.001, 0),
    ],
    ("words", "0"): [
        scaled("0.weight", 1.0001, 7),
        scaled("0.weight", 0, 299),
        swapped("0.weight"),
    ],
    ("words", "1"): [
        instead(1, None),
        setting(1, masked=False),
        scaled("1.mixed.bias", 1.001),
        setting(1, slope=1.0001),
    ],
    ("words", "4"): [scaled("4.weight", 1.0001, (8, 39)), scaled("4.bias", 1.0001)],
    ("steps", "0|1"): [scaled("0.weight_hh_l0", 1.0001, (3, 3)), scaled("0.bias_ih_l0", 1.0001)],
    ("steps", "2"): [scaled("2.weight", 1.0001, (0, 0)), swapped("2.bias")],
    ("steps", "4"): [scaled("4.bias", 1.0001), scaled("4.weight", 1.0001, (0, 4))],
}
FAST = {("perceptron", "0"), ("perceptron", "2"), ("images", "0"), ("words", "1"),
        ("steps", "0|1")}  # fmt: skip
EACH = thorough_but(
    lambda case: case[:2] in FAST and not case[2],
    [(*place, i) for place, changes in PLANTED.items() for i in range(len(changes))],
    most=24,
)


def planted(name, layer, index):
    make, shape = NETS[name]
    net = make()
    other = copy.deepcopy(net)
    change = PLANTED[name, layer][index]
    if layer == "1" and name == "words" and index == 0:
        other[1].mixed = cases.randomise_torch(t.Linear(8, 24), seed=5)
    else:
        change(other)
    return net, other.eval(), shape


def truly_differ(net, other, shape):
    """In double precision, on many inputs, by more than ten roundings of a row's largest value."""
    rng = np.random.default_rng(1)
    if isinstance(net[0], t.Embedding):
        x = torch.arange(300).reshape(60, 5)
    else:
        x = rng.normal(size=(400, *shape)) * 10.0 ** rng.uniform(-2, 3, (400, *[1] * len(shape)))
        x = torch.tensor(x)
    with torch.no_grad():
        a, b = (copy.deepcopy(m).double()(x) for m in (net, other))
    apart = ((a - b).abs().amax(1) / a.abs().amax(1)).max()
    return float(apart) > judge.ROUNDINGS * 2.0**-23


@pytest.mark.parametrize(("name", "layer", "index"), EACH)
def test_what_is_planted_is_found_in_its_layer(name, layer, index):
    net, other, shape = planted(name, layer, index)
    assert truly_differ(net, other, shape)
    report = converters.verify(net, other, input_shape=shape)
    assert not report.ok, report
    assert report.first.split("/")[0] in layer.split("|"), report


@pytest.mark.parametrize(
    ("name", "layer"),
    thorough_but(
        lambda place: place in (("perceptron", "8"), ("images", "5")),
        [p for p in PLANTED if p[0] in ("perceptron", "images")],
        most=6,
    ),
)
def test_what_is_planted_is_found_in_other_frameworks(name, layer):
    net, other, shape = planted(name, layer, 0)
    sides = [converters.from_torch(other, input_shape=shape)]
    with contextlib.suppress(converters.ConversionError):
        sides.append(converters.to_keras(*sides[0]))
    for side in sides:
        report = converters.verify(net, side, input_shape=shape)
        assert (report.ok, report.first) == (False, layer), report
        assert converters.verify(other, side, input_shape=shape).ok


def deep():
    return chain(*[f() for _ in range(12) for f in (lambda: t.Linear(24, 24), t.Tanh)])


def wide():
    return chain(t.Linear(1500, 20), t.ReLU(), t.Linear(20, 1000), t.Softmax(-1))


def far():
    """Statistics that leave a hundredth of what they are taken from."""
    net = chain(t.Linear(6, 8), t.BatchNorm1d(8), t.ReLU(), t.Linear(8, 3))
    net[1].running_mean += 3000
    net[1].running_var *= 1e-2
    return net


def tails():
    """Functions in which a small number is the difference of large ones."""
    return chain(t.ELU(), t.Tanhshrink(), t.GELU(), t.Softplus(), t.LogSigmoid(), t.Linear(9, 1))


EQUAL = {"deep": (deep, (24,)), "wide": (wide, (1500,)), "far": (far, (6,)), "tails": (tails, (9,)),
         **{name: net for name, net in NETS.items() if name != "words"}}  # fmt: skip


@pytest.mark.parametrize(
    "name", thorough_but(lambda name: name in ("deep", "steps", "images"), EQUAL)
)
def test_equal_models_are_equal(name):
    make, shape = EQUAL[name]
    net = make()
    model = converters.from_torch(net, input_shape=shape)
    for other in (model, converters.to_keras(*model)):
        report = converters.verify(net, other, input_shape=shape)
        assert report.ok, report
        assert report.first is None
        assert not report.notes
        assert all(line.status not in ("differs", "not compared") for line in report.layers)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype, tmp_path):
    """It is judged in roundings of its own; weights that are only stored in it are not."""
    net = chain(t.Linear(9, 16), t.GELU(), t.Linear(16, 16), t.ReLU(), t.Linear(16, 4))
    half = copy.deepcopy(net).to(getattr(torch, dtype))
    other = copy.deepcopy(half)
    assert converters.verify(half, other, input_shape=(9,)).ok
    model = converters.from_torch(half, input_shape=(9,))
    assert model.variables["params"]["0"]["kernel"].dtype == dtype
    assert converters.verify(half, model, input_shape=(9,)).ok
    with torch.no_grad():
        other[4].bias *= 2
    assert converters.verify(half, other, input_shape=(9,)).first == "4"
    stored = jax.tree.map(lambda v: v * np.float32(1 + 2**-9), model.variables)
    assert converters.verify(model, (model.module, stored)).first == "0"


# -- what was once called equal --------------------------------------------------------------------


def classifier(seed):
    torch.manual_seed(seed)
    net = t.Sequential(t.Embedding(50, 8), t.Flatten(), t.Linear(32, 3000), t.Softmax(-1))
    with torch.no_grad():
        net[0].weight *= 0.02
    return net


def test_many_classes():
    a = classifier(0)
    report = converters.verify(a, classifier(1), input_shape=(4,))
    assert (report.ok, report.first) == (False, "0")
    turned = copy.deepcopy(a)
    with torch.no_grad():
        for p in turned[2].parameters():
            p.copy_(p.flip(0))
    report = converters.verify(a, turned, input_shape=(4,))
    assert (report.ok, report.first) == (False, "2"), report
    assert str(report).splitlines()[0] == "they differ, from 2 on"
    assert converters.verify(a, copy.deepcopy(a), input_shape=(4,)).ok


def test_small_outputs_and_a_large_row():
    net = chain(t.Linear(4, 3, bias=False))
    small = copy.deepcopy(net)
    with torch.no_grad():
        net[0].weight *= 1e-6
        small[0].weight *= 1.01e-6
    assert not converters.verify(net, small, input_shape=(4,)).ok
    cubes = chain(t.Linear(8, 8), Cube(), t.Linear(8, 4))
    off = copy.deepcopy(cubes)
    with torch.no_grad():
        off[2].bias += 0.2
    assert converters.verify(cubes, off, input_shape=(8,)).first == "2"
    pixel = np.ones((2, 3, 7, 7), np.float32)
    pixel[:, :, 3, 3] = 1e6  # one position of an image is no scale for the others
    net = chain(t.Conv2d(3, 8, 1))
    off = copy.deepcopy(net)
    with torch.no_grad():
        off[0].bias += 1e-3
    assert not converters.verify(net, off, pixel).ok
    assert converters.verify(net, converters.from_torch(net, (3, 7, 7)), pixel).ok


@pytest.mark.parametrize("row", [0, 1, 4999])
def test_every_row_of_a_table_counts(row):
    one = t.Sequential(t.Embedding(5000, 4))
    other = copy.deepcopy(one)
    with torch.no_grad():
        other[0].weight[row, 2] *= 1.001
    for b in (other, converters.from_torch(other, (10,))):
        assert converters.verify(one, b, input_shape=(10,)).first == "0"
    assert converters.verify(one, converters.from_torch(one, (10,)), input_shape=(10,)).ok


@pytest.mark.parametrize("framework", thorough_but(lambda name: name == "torch", ["flax", "torch"]))
def test_a_row_of_tables_of_other_lengths_counts(framework):
    a, b = (t.Sequential(t.Embedding(n, 3), t.Flatten(), t.Linear(15, 2)) for n in (5000, 5001))
    with torch.no_grad():
        b[0].weight[:5000] = a[0].weight
        for name in ("weight", "bias"):
            getattr(b[2], name).copy_(getattr(a[2], name))
    for change, ok in ((0, True), (5, False)):
        with torch.no_grad():
            b[0].weight[2345] += change
        sides = [a, b]
        if framework == "flax":
            sides = [converters.from_torch(m, (5,), "source") for m in sides]
        for one, other in (sides, sides[::-1]):
            report = converters.verify(one, other, input_shape=(5,))
            assert report.ok is ok, report
            assert "were not fed" in str(report)


def test_what_no_row_of_a_table_is_said_to_be():
    """Two tables in which more differs than is fed."""
    one, other = (t.Sequential(t.Embedding(5000, 4)) for _ in range(2))
    with torch.no_grad():
        other[0].weight.copy_(one[0].weight * (1 + 2.0**-23))
    report = converters.verify(one, other, input_shape=(2,))
    assert report.ok
    assert "256 of the " in report.notes[0]
    assert "rows of the table in which the models may differ were fed" in report.notes[0]


def test_nothing_compared_is_no_proof():
    one, other = (chain(t.Linear(4, 3), t.BatchNorm1d(3)) for _ in range(2))
    for net in (one, other):
        net[1].running_var.fill_(-1.0)
    with torch.no_grad():
        other[0].weight += 1
    report = converters.verify(one, one, input_shape=(4,))
    assert not report.ok
    assert str(report).splitlines()[0] == "nothing is proved"
    assert report.notes[-1] == "nothing is compared: no output is finite"
    assert report.to_json()
    report = converters.verify(one, other, input_shape=(4,))
    assert (report.ok, report.first) == (False, "0")
    for x, why in (
        (np.ones((0, 4), np.float32), "the batch has no rows"),
        (np.full((2, 4), np.nan, np.float32), "no output is finite"),
        (np.full((2, 4), np.inf, np.float32), "no output is finite"),
    ):
        report = converters.verify(chain(t.Linear(4, 3)), chain(t.Linear(4, 3)), x)
        assert not report.ok
        assert report.notes[-1] == f"nothing is compared: {why}"


def test_rows_with_nan_are_said():
    net = chain(t.Linear(4, 3))
    x = np.ones((3, 4), np.float32)
    x[1, 2] = np.nan
    report = converters.verify(net, copy.deepcopy(net), x)
    assert report.ok
    assert report.notes == ("not compared: what is NaN in both outputs, in the rows 1",)
    off = copy.deepcopy(net)
    off[0].weight.data[0, 2] = np.nan
    assert not converters.verify(net, off, x).ok


def test_first_speaks_only_where_the_outputs_differ():
    """Two layers may do together what two others do."""
    one = chain(t.Linear(4, 6), t.Linear(6, 3))
    other = copy.deepcopy(one)
    with torch.no_grad():
        other[0].weight.mul_(2)
        other[0].bias.mul_(2)
        other[1].weight.div_(2)
    report = converters.verify(one, other, input_shape=(4,))
    assert (report.ok, report.first) == (True, None)
    assert report.layers[0].status == "differs"
    assert "these weights differ, and the outputs on these inputs are equal" in str(report)
    order = torch.tensor([2, 0, 1, 5, 4, 3])
    with torch.no_grad():
        for name, value in one.state_dict().items():
            value = value[order] if name[0] == "0" else value
            other.state_dict()[name].copy_(value[:, order] if name == "1.weight" else value)
    assert converters.verify(one, other, input_shape=(4,)).ok


def test_a_weight_that_no_output_shows():
    """A part in ten thousand of one number of 4608 is less than ten roundings of the sum."""
    one = chain(t.Linear(4608, 4))
    other = copy.deepcopy(one)
    with torch.no_grad():
        other[0].weight[2, 77] *= 1.0001
    report = converters.verify(one, other, input_shape=(4608,))
    assert (report.ok, report.first) == (False, "0"), report


def test_layers_that_work_in_place():
    net = chain(t.ReLU(inplace=True), t.Linear(4, 3), t.ReLU(inplace=True), t.Linear(3, 2))
    x = -np.ones((2, 4), np.float32)
    report = converters.verify(net, converters.from_torch(net), x)
    assert report.ok
    assert all(line.status in ("exact", "close") for line in report.layers)
    assert (x == -1).all()


def test_layouts():
    """A model that takes its channels where another does not."""
    net = chain(t.ZeroPad2d((1, 0, 2, 1)), t.Conv2d(3, 4, 3), t.ReLU())
    models = {kind: converters.from_torch(net, (3, 9, 8), kind)
              for kind in ("source", "channels_last")}  # fmt: skip
    for model in models.values():
        report = converters.verify(net, model, input_shape=(3, 9, 8))
        assert report.ok, report
    report = converters.verify(*models.values())
    assert report.ok
    assert "its inputs were turned" in report.notes[0]


SPATIAL = {
    "weight_norm": lambda: t.utils.parametrizations.weight_norm(t.Conv2d(4, 4, 1)),
    "BatchNorm2d": lambda: t.BatchNorm2d(4),
    "InstanceNorm2d": lambda: t.InstanceNorm2d(4, affine=True),
    "ReflectionPad2d": lambda: t.ReflectionPad2d((0, 0, 0, 0)),
    "Upsample": lambda: t.Upsample(size=(4, 4)),
}


@pytest.mark.parametrize(
    ("name", "layout"),
    thorough_but(
        lambda case: case[1] == "channels_last" or case[0] == "Upsample",
        [(n, w) for n in SPATIAL for w in ("channels_last", "source", "channels_first")],
    ),
)
def test_images_as_high_as_they_have_channels(name, layout):
    torch.manual_seed(0)
    net = chain(SPATIAL[name](), t.ReLU(), t.Flatten(), t.Linear(64, 2))
    model = converters.from_torch(net, input_shape=(4, 4, 4), layout=layout)
    for a, b in ((net, model), (model, net)):
        assert converters.verify(a, b, input_shape=(4, 4, 4)).ok
    with torch.no_grad():
        net[-1].weight[0, 3] += 0.01
    assert not converters.verify(net, model, input_shape=(4, 4, 4)).ok


def test_keras_with_channels_first(tmp_path):
    how = {"data_format": "channels_first"}
    net = keras.Sequential([keras.Input((3, 9, 8)), k.ZeroPadding2D(((1, 0), (0, 2)), **how),
                            k.ReLU(), k.UpSampling2D(2, **how)])  # fmt: skip
    net.save(tmp_path / "net.keras")
    assert converters.verify(net, tmp_path / "net.keras").ok
    assert converters.verify(net, converters.from_keras(net)).ok


def test_a_file_is_checked_at_the_ends_before_it_is_written(tmp_path):
    """A graph that is wrong for large numbers alone, or beside a zero, is refused."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from fwt.converters.onnx import check, ends

    class Safe(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jax.numpy.where(x == 0, 0.0, 1 / jax.numpy.where(x == 0, 1.0, x))

    make, kind = onnx.helper.make_node, onnx.TensorProto.FLOAT
    right = [make("Reciprocal", ["input"], ["a"]), make("Equal", ["input", "zero"], ["c"]),
             make("Where", ["c", "zero", "a"], ["y"])]  # fmt: skip
    mixed = [*right[:2], make("Cast", ["c"], ["f"], to=kind), make("Sub", ["one", "f"], ["g"]),
             make("Mul", ["g", "a"], ["y"])]  # fmt: skip
    clipped = [*right[:2], make("Where", ["c", "zero", "a"], ["z"]),
               make("Clip", ["z", "", "most"], ["y"])]  # fmt: skip
    values = {"zero": 0, "one": 1, "most": 1e6}
    for nodes, fits in ((right, True), (mixed, False), (clipped, False)):
        graph = onnx.helper.make_graph(
            nodes,
            "g",
            [onnx.helper.make_tensor_value_info("input", kind, ["n", 3])],
            [onnx.helper.make_tensor_value_info("y", kind, ["n", 3])],
            [onnx.helper.make_tensor(n, kind, [], [float(v)]) for n, v in values.items()],
        )
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)])
        model.ir_version = 8
        inputs = [ends.Input("input", (3,), np.dtype(np.float32), 0)]
        path = tmp_path / "net.onnx"
        path.write_bytes(model.SerializeToString())
        given = (path, Safe(), {}, inputs)
        if fits:
            check.compare(*given)
            continue
        with pytest.raises(converters.ConversionError, match="onnxruntime's output differs by"):
            check.compare(*given)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (t.Hardshrink(2.0), t.Hardshrink(2.5)),
        (t.Threshold(3, 0.0), t.Threshold(4, 0.0)),
        (t.Softplus(1, 20), t.Softplus(1, 8)),
    ],
    ids=str,
)
def test_a_setting_that_no_input_shows(one, other):
    a, b = chain(one), chain(other)
    report = converters.verify(a, b, input_shape=(4,))
    assert (report.ok, report.first) == (False, "0")
    assert "setting differs" in str(report)
    assert converters.verify(a, converters.from_torch(a, input_shape=(4,))).ok


class TwoTables(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = torch.nn.Embedding(300, 4), torch.nn.Embedding(300, 4)

    def forward(self, x):
        return self.one(x) + self.other(x)


def behind(*layers):
    inputs = keras.Input((4,), dtype="int32" if "Resh" in type(layers[0]).__name__ else "float32")
    return keras.Sequential([inputs, *layers, keras.layers.Embedding(61, 3, name="e")])


TABLES = {
    "behind a Reshape": lambda: behind(keras.layers.Reshape((2, 2), name="r")),
    "behind bins": lambda: behind(keras.layers.Discretization(bin_boundaries=[*range(60)])),
    "the second of two": TwoTables,
}


@pytest.mark.parametrize("name", TABLES)
def test_a_row_of_any_table_counts(name):
    a, b = TABLES[name](), TABLES[name]()
    torchs = isinstance(a, torch.nn.Module)
    weights = [w.detach().numpy() for w in a.parameters()] if torchs else a.get_weights()
    for change, ok in ((0, True), (1, False)):
        weights = [np.array(w) for w in weights]
        weights[-1][50] += change
        if torchs:
            with torch.no_grad():
                for p, w in zip(b.parameters(), weights, strict=True):
                    p.copy_(torch.from_numpy(w))
        else:
            b.set_weights(weights)
        assert converters.verify(a, b, input_shape=(4,)).ok is ok


class Capped(torch.nn.Module):
    """Whose setting is a constant of its graph."""

    def __init__(self, most, drop_prob=0.0):
        super().__init__()
        self.most, self.drop = most, torch.nn.Dropout(drop_prob)

    def forward(self, x):
        return torch.clamp(self.drop(x), max=self.most)


def masked(value, rate=0.0):
    """Whose mask goes to a layer, as in Keras alone."""
    layers = [keras.layers.Masking(value, name="masking"), keras.layers.LSTM(2, dropout=rate)]
    return keras.Sequential([keras.Input((5, 4)), *layers])


@pytest.mark.parametrize(("make", "shape"), [(Capped, (4,)), (masked, (5, 4))])
def test_settings_that_no_layer_shows(make, shape):
    a, b, c = make(1e12), make(1e13), make(1e12, 0.25)
    for other in (b, c):
        if make is masked:
            other.set_weights(a.get_weights())
    report = converters.verify(a, b, input_shape=shape)
    assert (report.ok, report.first) == (False, "masking" if make is masked else "clamp__constant")
    assert "setting differs" in str(report)
    assert converters.verify(a, c, input_shape=shape).ok  # in training alone they are two


def test_a_tolerance_is_a_number():
    with pytest.raises(converters.ConversionError, match="tolerance=inf"):
        converters.verify(chain(t.ReLU()), chain(t.ReLU()), input_shape=(4,), tolerance=np.inf)


# -- what arrays are apart -------------------------------------------------------------------------

EPS = 2.0**-23


def test_whole_numbers_are_compared_exactly():
    for dtype, a, b in (
        ("int64", 2_000_000, 2_000_001),
        ("int64", 2**60, 2**60 + 1),
        ("uint8", 200, 201),
        ("bool", True, False),
    ):
        one, other = (np.asarray([[v, 1]], dtype) for v in (a, b))
        assert judge.apart(one, one, eps=EPS).equal
        told = judge.apart(one, other, [np.ones((1, 2))], eps=EPS)
        assert not told.equal
        assert told.excess > 1
    one, other = (np.asarray([[v, 1]]) for v in (2_000_000, 2_000_001))
    assert judge.apart(one, other, eps=EPS, tolerance=1e-6).equal


def test_a_position_that_rounding_does_not_move_may_not_move():
    a = np.ones((1, 5, 8), np.float32)
    moved = np.full(a.shape, 1e-2, np.float32)
    moved[0, 2] = 0
    off = a.copy()
    off[0, [0, 1, 3, 4]] *= 1.05
    assert judge.apart(a, off, [moved], eps=EPS).equal
    off[0, 2] *= 1.05
    assert not judge.apart(a, off, [moved], eps=EPS).equal


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_under_jit_each_number_moves_by_the_same_part(dtype):
    y = jax.numpy.arange(1, 301).reshape(3, 100).astype(dtype)
    moved = jax.jit(judge.unsettled)
    assert moved(y, 0.1).dtype == y.dtype
    assert np.array_equal(moved(y, 0.0), y)
    part = np.asarray(moved(y, 0.1), np.float64) / np.asarray(y, np.float64) - 1
    if dtype == "int32":
        assert not part.any()
        return
    np.testing.assert_allclose(abs(part), 0.1, atol=0.01)
    assert 100 < (part > 0).sum() < 200
    np.testing.assert_allclose(np.asarray(moved(y, -0.1), np.float64) / y - 1, -part, atol=0.01)


def test_a_row_of_zeros_is_no_proof():
    class Sine(t.Module):
        def forward(self, x):
            return x.sin()

    one, other = (chain(t.Linear(5, 7, bias=False), Sine(), t.Linear(7, 3, bias=False))
                  for _ in range(2))  # fmt: skip
    with torch.no_grad():
        other[0].weight.copy_(other[0].weight.flip(0))
        other[2].weight.copy_(other[2].weight.flip(1) * 0.5)
        for net in (one, other):
            net[0].weight *= 1e6
    report = converters.verify(one, other, inputs=judge.numbers((5,)))
    assert not report.ok
    assert report.output.status == "not compared"
    assert "rounding alone moves the outputs by more than their size" in str(report)


def identity_file(shape, factor=1.0):
    """An ONNX graph of one input and its product with a number."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    kind = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Mul", ["input", "by"], ["y"])], "g",
        [onnx.helper.make_tensor_value_info("input", kind, shape)],
        [onnx.helper.make_tensor_value_info("y", kind, shape)],
        [onnx.helper.make_tensor("by", kind, [], [factor])])  # fmt: skip
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)])
    model.ir_version = 8
    return model.SerializeToString()


def test_what_is_checked_before_a_file_is_written(tmp_path):
    """A batch of one by its values; a file of which nothing can be compared says so."""
    from fwt.converters.onnx.check import compare
    from fwt.converters.onnx.ends import Input

    class Times(nn.Module):
        by: float
        off: float = 0.0
        sine: bool = False

        def __call__(self, x):
            # What a compiler makes of a batch of one may be other than of many.
            y = x * self.by + (self.off if len(x) == 1 else 0.0)
            return jax.numpy.sin(y * 1e9) if self.sine else y

    def check(module, factor):
        path = tmp_path / "net.onnx"
        path.write_bytes(identity_file(["n", 3], factor))
        compare(path, module, {}, [Input("x", (3,), np.dtype(np.float32), 0)])

    check(Times(2.0), 2.0)
    check(Times(np.nan), np.nan)
    with pytest.raises(converters.ConversionError, match="output differs by"):
        check(Times(2.0, 0.5), 2.0)
    with pytest.raises(converters.ConversionError, match="output differs by"):
        check(Times(2.0), np.nan)
    with pytest.raises(converters.ConversionError, match="nothing could be compared: rounding"):
        check(Times(2.0, sine=True), 1e-9)


def test_half_precision_is_fed_what_it_holds():
    net = keras.Sequential([keras.Input((8,)), k.Dense(3, dtype="mixed_float16")])
    report = converters.verify(net, net)
    assert report.ok
    assert "NaN" not in str(report)


def hides(*layers):
    torch.manual_seed(3)
    return t.Sequential(*[make() for make in layers])


def other_weights(net, *paths):
    other = copy.deepcopy(net)
    torch.manual_seed(4)
    with torch.no_grad():
        for path in paths:
            other.state_dict()[path].normal_()
    return other


def test_layers_behind_hide_nothing():
    """A saturated output, and units that are dead, of models that are far apart."""
    net = hides(lambda: t.Linear(6, 16), t.Tanh, lambda: t.Linear(16, 1), t.Sigmoid)
    with torch.no_grad():
        net[2].bias.fill_(40)
    report = converters.verify(net, other_weights(net, "0.weight"), input_shape=(6,))
    assert (report.ok, report.first) == (False, "0"), report
    twice = copy.deepcopy(net)
    with torch.no_grad():
        twice[2].weight *= 2
        twice[2].bias *= 2
    report = converters.verify(net, twice, input_shape=(6,))
    assert (report.ok, report.first) == (False, "2"), report
    net[1] = Cube()  # which can't be converted
    report = converters.verify(net, other_weights(net, "0.weight"), input_shape=(6,))
    assert (report.ok, report.first) == (False, "0"), report
    dead = hides(lambda: t.Linear(6, 16), t.ReLU, lambda: t.Linear(16, 3))
    with torch.no_grad():
        dead[0].weight *= 1e-9
        dead[0].bias.fill_(-40)
    report = converters.verify(dead, other_weights(dead, "2.weight"), input_shape=(6,))
    assert (report.ok, report.first) == (False, "2"), report
    assert "but the layer does if it is fed other numbers" in report.notes[-1]


def test_units_in_another_order_or_scaled_are_equal():
    """What a layer takes back that the one before it did."""
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    net = chain(t.Conv2d(3, 8, 3), t.ReLU(), t.Conv2d(8, 5, 2), t.Flatten(), t.Linear(45, 3))
    for by in (1.0, 4.0, 3.0):
        other = copy.deepcopy(net)
        with torch.no_grad():
            at = order if by == 1 else torch.arange(8)
            other[0].weight.copy_(net[0].weight[at] * by)
            other[0].bias.copy_(net[0].bias[at] * by)
            other[2].weight.copy_(net[2].weight[:, at] / by)
        for b in (other, converters.from_torch(other, (3, 6, 6))):
            report = converters.verify(net, b, input_shape=(3, 6, 6))
            assert report.ok, report
    net = chain(t.Linear(6, 8), t.BatchNorm1d(8), t.Tanh(), t.Linear(8, 3))
    other = copy.deepcopy(net)
    with torch.no_grad():
        other[0].bias += 2
        other[1].running_mean += 2
        other[3].weight.neg_()
        other[1].weight.neg_()
        other[1].bias.neg_()
    report = converters.verify(net, other, input_shape=(6,))
    assert report.ok, report


FLAT_IMAGES = {
    "instances": lambda: [t.Conv2d(3, 8, 1), t.InstanceNorm2d(8), t.ReLU(), t.Conv2d(8, 4, 3)],
    "groups": lambda: [t.Conv2d(3, 8, 1), t.GroupNorm(8, 8), t.ReLU(), t.Conv2d(8, 4, 3)],
}


@pytest.mark.parametrize("name", thorough_but(lambda name: name == "instances", FLAT_IMAGES))
def test_constant_images(tmp_path, name):
    """Their variance is rounding alone, which a norm divides by: zeros, and ones, become such."""
    net = chain(*FLAT_IMAGES[name]())
    for seed in range(2):
        torch.manual_seed(seed)
        with torch.no_grad():
            for weight in net.parameters():
                weight.normal_()
        model = converters.from_torch(net, (3, 9, 8))
        converters.save(tmp_path / "net.onnx", *model)
        for a, b in ((net, model), (net, tmp_path / "net.onnx")):
            report = converters.verify(a, b, input_shape=(3, 9, 8))
            assert report.ok, report
        with torch.no_grad():
            net[3].weight[1, 2] += 0.01
        assert not converters.verify(net, model, input_shape=(3, 9, 8)).ok


def growing(scale):
    torch.manual_seed(0)
    net = t.Sequential(t.RNN(3, 6, nonlinearity="relu", batch_first=True),
                       converters.Select("sequence")).eval()  # fmt: skip
    with torch.no_grad():
        for weight in net.parameters():
            weight.normal_(std=scale)
    return net


def test_states_that_grow_beyond_the_dtype():
    """The order of sums decides which is infinite, and which NaN: those rows are left out."""
    net = growing(2.0)
    net[0].weight_hh_l0.data *= 0.55
    model = converters.from_torch(net, (60, 3))
    report = converters.verify(net, converters.to_keras(*model), input_shape=(60, 3))
    assert report.ok, report
    net = growing(2.0)
    model = converters.from_torch(net, (60, 3))
    report = converters.verify(net, converters.to_keras(*model), input_shape=(60, 3))
    assert not report.ok
    assert report.output.status == "not compared"
    assert "grow beyond the dtype" in str(report)


def test_infinite_in_one_is_a_difference():
    a, b = np.ones((2, 3), np.float32), np.ones((2, 3), np.float32)
    b[0, 1] = np.inf
    assert not judge.apart(a, b, eps=1e-7).equal
    a[0, 2] = np.nan
    told = judge.apart(a, b, eps=1e-7)
    assert told.equal
    assert told.unsure == (0,)


CHANNELS = {
    "instances": lambda: t.InstanceNorm2d(4, affine=True),
    "batches": lambda: t.BatchNorm2d(4),
    "slopes": lambda: t.PReLU(4),
    "softmax": lambda: t.Softmax(1),
}


@pytest.mark.parametrize("name", thorough_but(lambda name: name == "batches", CHANNELS))
def test_layers_that_do_not_say_where_channels_are(tmp_path, name):
    net = chain(CHANNELS[name]())
    shape = (4, 5, 6)
    first, last = (
        converters.from_torch(net, shape, layout) for layout in ("source", "channels_last")
    )
    sides = {"torch": net, "first": first, "last": last}
    if name != "softmax":
        sides["keras"] = converters.to_keras(*last)
    for kind in ("first", "last"):
        sides[f"{kind}.onnx"] = tmp_path / f"{kind}.onnx"
        converters.save(sides[f"{kind}.onnx"], *sides[kind])
    for a in sides:
        for b in sides:
            if a != b and (name != "softmax" or ("last" in a) == ("last" in b)):
                assert converters.verify(sides[a], sides[b]).ok, (a, b)


def test_small_weights_that_only_large_inputs_show():
    torch.manual_seed(0)
    one = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Sigmoid(), torch.nn.Linear(5, 2))
    with torch.no_grad():
        one[0].weight *= 1e-9
    other, moved = copy.deepcopy(one), copy.deepcopy(one)
    with torch.no_grad():
        other[0].weight[2, 3] *= 2
        order = torch.randperm(5)
        moved[0].weight.copy_(one[0].weight[order])
        moved[0].bias.copy_(one[0].bias[order])
        moved[2].weight.copy_(one[2].weight[:, order])
    assert converters.verify(one, moved, input_shape=(6,)).ok
    report = converters.verify(one, other, input_shape=(6,))
    assert (report.ok, report.first) == (False, "0")


def test_what_a_saturated_function_leaves_is_judged_beside_ordinary_outputs():
    a = np.array([[0.5, -0.2], [1e-8, 2e-9], [0.3, 0.1]])
    b = a.copy()
    b[1] = 0
    eps = float(np.finfo(np.float32).eps)
    assert not judge.apart(a, b, eps=eps).equal
    assert judge.apart(a, b, eps=eps, clamps=True).equal
    b[1] = 1e-5
    assert not judge.apart(a, b, eps=eps, clamps=True).equal
    b[1], b[0, 0] = a[1], 0.50001
    assert not judge.apart(a, b, eps=eps, clamps=True).equal


@pytest.mark.parametrize("bias", [3e6, 1e7, -1e7])
def test_weights_behind_a_large_bias_of_their_layer_are_seen(bias):
    one = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.ReLU()).eval()
    with torch.no_grad():
        one[0].bias.fill_(bias)
        one[0].weight.abs_()
    assert converters.verify(one, copy.deepcopy(one), input_shape=(6,)).ok
    other = copy.deepcopy(one)
    with torch.no_grad():
        other[0].weight[0, 0] += 0.1
    report = converters.verify(one, other, input_shape=(6,))
    assert not report.ok
    assert report.first == "0"


def test_weights_of_models_that_cannot_be_converted_are_seen():
    def made(scale):
        keras.utils.set_random_seed(0)
        seen = keras.layers.Normalization(axis=None, mean=1.6e9, variance=1e14)
        hidden = keras.layers.Dense(4, "relu", name="hidden")
        net = keras.Sequential([keras.Input((3,)), seen, hidden, keras.layers.Dense(2)])
        hidden.kernel.assign(np.abs(hidden.kernel.numpy()) * scale)
        return net

    with pytest.raises(converters.ConversionError, match="one mean for all"):
        converters.from_keras(made(1))
    assert converters.verify(made(1), made(1)).ok
    report = converters.verify(made(1), made(3))
    assert not report.ok
    assert report.first == "hidden"
    assert "no output shows how the weights of hidden differ" in report.notes[-1]


class Own(nn.Module):
    dtype: str

    @nn.compact
    def __call__(self, x):
        dense = [nn.Dense(n, dtype=self.dtype, param_dtype=self.dtype) for n in (64, 5)]
        return dense[1](nn.relu(dense[0](x)))


def narrow(kind, dtype):
    """A model of half precision, and the paths of its two kernels."""
    if kind == "own":
        net, names = Own(dtype), ("Dense_0", "Dense_1")
    else:
        stored = "float32" if kind == "mixed" else dtype
        a, b = (nn.Dense(n, dtype=dtype, param_dtype=stored) for n in (64, 5))
        net, names = fwt.Sequential([("a", a), ("r", nn.relu), ("b", b)], (64,)), ("a", "b")
    variables = net.init(jax.random.key(0), np.ones((1, 64), dtype))
    return fwt.Model(net, jax.tree.map(np.asarray, variables)), names


NARROW = [(kind, d) for kind in ("layers", "mixed", "own") for d in ("float16", "bfloat16")]


@pytest.mark.parametrize(
    ("kind", "dtype"), thorough_but(lambda case: case == ("layers", "bfloat16"), NARROW)
)
def test_half_precision_hides_no_weights(kind, dtype):
    """Its outputs may be far off, so that weights count: but for the order of units."""
    model, (first, last) = narrow(kind, dtype)
    own = model.variables["params"]
    flipped = own[first]["kernel"].copy()
    flipped[np.unravel_index(np.abs(flipped).argmax(), flipped.shape)] *= -1
    for other in (
        fwt.prune(0.2)(model),
        fwt.prune(0.01)(model),
        fwt.assign({f"{first}/kernel": flipped})(model),
    ):
        assert not converters.verify(model, other, input_shape=(64,)).ok
    order = np.random.default_rng(0).permutation(64)
    moved = {
        f"{first}/kernel": own[first]["kernel"][:, order],
        f"{first}/bias": own[first]["bias"][order],
        f"{last}/kernel": own[last]["kernel"][order],
    }
    report = converters.verify(model, fwt.assign(moved)(model), input_shape=(64,))
    assert report.ok, report
