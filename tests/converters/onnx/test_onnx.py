"""ONNX out, against onnxruntime; ONNX in, as we, torch's exporters and Keras write it."""

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import textwrap
import tracemalloc
import warnings
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import layer_cases
import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import optax
import pytest
import torch
from command import fwt_command
from compare import in_flax
from exporters import exported
from marks import thorough_but

import fwt
from fwt import converters
from fwt import layers as fl
from fwt.converters.onnx import write
from fwt.converters.rows import table as _table

k, t = keras.layers, torch.nn
TABLES = {"torch": layer_cases.TORCH, "keras": layer_cases.KERAS}


def run(path, x):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def close(found, expected):
    assert found.shape == expected.shape
    scale = max(1.0, float(np.max(np.abs(expected[np.isfinite(expected)]), initial=0)))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * scale)


def drawn(framework, name, seed):
    """A Flax model of one layer, and a batch of inputs."""
    case = TABLES[framework][name]
    rng = np.random.default_rng(seed)
    shape, layer = case.make(rng)
    if framework == "torch":
        net = t.Sequential(*(layer if isinstance(layer, list) else [layer])).eval()
        model = converters.from_torch(net, shape, layout="source")
    else:
        kind = "int32" if case.integers else "float32"
        net = keras.Sequential([keras.Input(shape, dtype=kind), layer])
        model = converters.from_keras(net)
    if case.integers:
        x = rng.integers(0, case.integers, (3, *shape)).astype(np.int32)
    else:
        x = rng.normal(size=(3, *shape)).astype(np.float32)
    return model, x


def same_leaves(a, b):
    a, b = (dict(jax.tree.leaves_with_path(v)) for v in (a, b))
    assert list(a) == list(b)
    for path, value in a.items():
        value = np.asarray(value)
        assert value.dtype == b[path].dtype, path
        assert value.shape == b[path].shape, path
        assert value.tobytes() == np.asarray(b[path]).tobytes(), path


def bare(path):
    """The file without what it says of its layers."""
    proto = onnx.load(path)
    del proto.metadata_props[:]
    onnx.save(proto, path)


# What the reader makes of our own graphs where nothing in the file says what the layers are.
NOT_READ = ("Adaptive", "LPPool", "Upsampl", "UpSampling2D", "RMSNorm", "LocalResponse", "Resizing",
            "UnitNorm", "ConvLSTM", "Masking", "Discretization", "CategoryEncoding", "Attention",
            "Transformer", "Pad", "Conv", "RNN", "LSTM", "GRU", "ReLU", "Softplus", "RepeatVector",
            "Activation", "Softmax", "Sparse", "ChannelShuffle", "GLU")  # fmt: skip


def rows():
    """Every case, and of those that act in training only, one Flax class, one a framework.

    Where both frameworks have it, each draws a shape; of a part of the others a second is thorough.
    Of four cases three are in the thorough run alone.
    """
    from fwt.converters.rows.special import INERT

    for framework, table in TABLES.items():
        inert = [n for n in table if n in INERT[framework]]
        for place, name in enumerate(table):
            if name not in inert[1:]:
                marks = [pytest.mark.thorough] if place % 8 else []
                yield pytest.param(framework, name, 0, marks=marks)
                both = any(r.torch and r.keras for r in _table.rows_of(framework, name))
                if not both and place % 4 == 1:
                    yield pytest.param(framework, name, 1, marks=pytest.mark.thorough)


@pytest.mark.parametrize(("framework", "name", "seed"), list(rows()))
def test_every_row_runs_in_onnxruntime_and_comes_back(tmp_path, framework, name, seed):
    """At two batches."""
    model, x = drawn(framework, name, seed + 10 * (framework == "keras"))
    path = tmp_path / "a.onnx"
    shape = x.shape[1:]
    converters.to_onnx(*model, path, shape, input_dtype=x.dtype, check=False)
    expected = in_flax(model, x)
    for batch in (slice(1), slice(None)):
        close(run(path, x[batch]), expected[batch])
    back = converters.from_onnx(path)
    assert back.module == model.module
    same_leaves(model.variables, back.variables)
    bare(path)
    try:
        read = converters.from_onnx(path)
    except converters.FileFormatError:
        # JAX's logsumexp is twenty operators, which only our own metadata name.
        sums = name == "Reduce" and "logsumexp" in str(model.module)
        assert name == "Normalization" or sums or any(n in name for n in NOT_READ)
    else:
        close(in_flax(read, x), expected)


def image_net():
    layers = [("conv", nn.Conv(5, (3, 2))), ("norm", nn.BatchNorm()), nn.relu,
              ("pool", fl.MaxPool((2, 2))), ("flat", fl.Flatten()), ("drop", nn.Dropout(0.5)),
              ("dense", nn.Dense(4)), ("end", fl.Softmax())]  # fmt: skip
    return fwt.Sequential(layers, (6, 7, 3))


@pytest.fixture
def model():
    net = image_net()
    variables = net.init(jax.random.key(0), np.ones((1, 6, 7, 3), np.float32))
    rng = np.random.default_rng(0)

    def draw(v):
        return np.abs(rng.normal(size=v.shape)).astype(np.float32) + 0.1

    return fwt.Model(net, jax.tree.map(draw, variables))


def test_a_graph_of_onnx_own_operators_under_our_names(model, tmp_path):
    module, variables = fwt.prune(0.7)(model)
    path = tmp_path / "net.onnx"
    converters.to_onnx(module, variables, path)
    proto = onnx.load(path)
    ops = [n.op_type for n in proto.graph.node]
    assert ops == ["Transpose", "Conv", "BatchNormalization", "Relu", "MaxPool", "Transpose",
                   "Reshape", "MatMul", "Add", "Softmax"]  # fmt: skip
    held = {i.name: onnx.numpy_helper.to_array(i) for i in proto.graph.initializer}
    kernel = np.asarray(variables["params"]["conv"]["kernel"])
    assert (
        held["conv/kernel"].tobytes()
        == np.ascontiguousarray(kernel.transpose(3, 2, 0, 1)).tobytes()
    )
    for path_, leaf in fwt.select(variables, "**").items():
        leaf = np.asarray(leaf)
        assert np.array_equal(np.sort(held[path_].ravel()), np.sort(leaf.ravel())), path_
        assert np.sum(held[path_] == 0) == np.sum(leaf == 0)
    (first,), (last,) = proto.graph.input, proto.graph.output
    assert (first.name, last.name) == ("input", "output")
    assert [d.dim_param or d.dim_value for d in first.type.tensor_type.shape.dim] == [
        "batch", 6, 7, 3]  # fmt: skip
    assert [d.dim_param or d.dim_value for d in last.type.tensor_type.shape.dim] == ["batch", 4]
    assert {o.domain for o in proto.opset_import} == {""}
    assert all(n.name.startswith(("conv/", "norm/", "2/", "pool/", "flat/", "dense/", "end/"))
               for n in proto.graph.node)  # fmt: skip


@pytest.mark.parametrize("opset", [15, 16, 17, 18])
def test_opsets(model, tmp_path, opset):
    layers = [*((n.name, n.layer) for n in image_net().layers[:5]), ("ln", nn.LayerNorm()),
              ("gelu", fl.GELU())]  # fmt: skip
    net = fwt.Sequential(layers, (6, 7, 3))
    x = np.random.default_rng(0).normal(size=(2, 6, 7, 3)).astype(np.float32)
    variables = net.init(jax.random.key(0), x)
    converters.to_onnx(net, variables, tmp_path / "a.onnx", opset=opset)
    assert onnx.load(tmp_path / "a.onnx").opset_import[0].version == opset
    close(run(tmp_path / "a.onnx", x), np.asarray(net.apply(variables, x)))


def digits():
    from sklearn.datasets import load_digits

    data = load_digits()
    x = (data.images / 16).astype(np.float32)[..., None]
    order = np.random.default_rng(0).permutation(len(x))
    return x[order], data.target[order]


@pytest.mark.thorough
def test_the_digits_net_pruned_predicts_the_same_in_onnxruntime(tmp_path):
    x, y = digits()
    net = fwt.Sequential(
        [("conv", nn.Conv(12, (3, 3))), nn.relu, ("pool", fl.MaxPool((2, 2))),
         ("flat", fl.Flatten()), ("hidden", nn.Dense(48)), nn.relu, ("end", nn.Dense(10))],
        (8, 8, 1))  # fmt: skip
    variables = net.init(jax.random.key(0), x[:1])
    tx = fwt.optim.sparsify(optax.adam(3e-3), 0.8, every=20)
    params, state = variables["params"], tx.init(variables["params"])

    @jax.jit
    def step(params, state, x, y):
        def loss(p):
            logits = net.apply({"params": p}, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(25):
        for i in range(0, 1400, 100):
            params, state = step(params, state, x[i : i + 100], y[i : i + 100])
    params = fwt.prune(0.8)(params)
    path = tmp_path / "digits.onnx"
    converters.to_onnx(net, {"params": params}, path)
    logits = np.asarray(net.apply({"params": params}, x))
    found = run(path, x)
    close(found, logits)
    assert np.array_equal(found.argmax(1), logits.argmax(1))
    assert np.mean(found.argmax(1)[1400:] == y[1400:]) > 0.9
    held = {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(path).graph.initializer}
    for name, leaf in fwt.select(params, fwt.kernels).items():
        assert np.sum(held[name] == 0) == np.sum(np.asarray(leaf) == 0) >= 0.8 * leaf.size - 1
    report = converters.verify(fwt.Model(net, {"params": params}), path)
    assert report.ok, report
    back = converters.from_onnx(path)
    same_leaves(jax.tree.map(np.asarray, {"params": params}), back.variables)


def test_any_linen_module_goes_out(tmp_path):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.relu(nn.Dense(5, name="one")(x))
            return nn.Dense(2, name="two")(jnp.concatenate([x, y], -1)) + x.sum(-1, keepdims=True)

    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    variables = Net().init(jax.random.key(0), x)
    path = tmp_path / "a.onnx"
    converters.to_onnx(Net(), variables, path, (4,))
    close(run(path, x), np.asarray(Net().apply(variables, x)))
    names = {i.name for i in onnx.load(path).graph.initializer}
    assert {"one/kernel", "one/bias", "two/kernel", "two/bias"} <= names
    close(np.asarray(converters.from_onnx(path)(x)), run(path, x))
    linen = nn.Sequential([nn.Dense(3), nn.tanh])
    variables = linen.init(jax.random.key(0), x)
    converters.to_onnx(linen, variables, path, (4,))
    close(run(path, x), np.asarray(linen.apply(variables, x)))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_weights_stay_half(tmp_path, dtype):
    net = fwt.Sequential([("conv", nn.Conv(4, (3,))), nn.relu, ("dense", nn.Dense(2))], (5, 3))
    x = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
    variables = jax.tree.map(lambda v: np.asarray(v, dtype), net.init(jax.random.key(0), x))
    path = tmp_path / "a.onnx"
    converters.to_onnx(net, variables, path)
    kinds = {i.data_type for i in onnx.load(path).graph.initializer if i.name.endswith("kernel")}
    assert kinds == {onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))}
    close(run(path, x), np.asarray(net.apply(variables, x)))
    same_leaves(variables, converters.from_onnx(path).variables)


def test_axes_of_size_1_stay_where_they_are(tmp_path):
    """tf2onnx makes a Reshape of a Transpose by shapes of before it moved others."""
    net = fwt.Sequential(
        [("conv", nn.Conv(1, (3, 3), padding="VALID")), ("batch", nn.BatchNorm()),
         ("norm", nn.RMSNorm(reduction_axes=2, feature_axes=2)), nn.relu],
        input_shape=(3, 4, 5),
    )  # fmt: skip
    variables = net.init(jax.random.key(0), jnp.ones((1, 3, 4, 5)))
    path = tmp_path / "net.onnx"
    converters.to_onnx(net, variables, path, check=False)
    x = np.random.default_rng(0).normal(size=(3, 3, 4, 5)).astype("float32")
    (found,) = onnxruntime.InferenceSession(path).run(None, {"input": x})
    np.testing.assert_allclose(found, in_flax(fwt.Model(net, variables), x), rtol=0, atol=1e-5)


def test_weights_are_written_one_after_the_other(tmp_path):
    """What is held beside the model is one array, turned, and never a message of all."""
    size = 1 << 20
    shapes = {"turned": (4, size // 4), "plain": (size,), "single": ()}
    weights = {n: np.random.default_rng(i).normal(size=s).astype("float32")
               for i, (n, s) in enumerate(shapes.items())}  # fmt: skip
    weights = {n: w.T for n, w in weights.items()}
    values = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, w.shape)
              for n, w in weights.items()]  # fmt: skip
    one = onnx.helper.make_tensor("own", onnx.TensorProto.FLOAT, [1], [3.0])
    graph = onnx.helper.make_graph([], "g", values, [], [one])
    message = onnx.helper.make_model(graph)
    tracemalloc.start()
    with (tmp_path / "net.onnx").open("wb") as file:
        assert write._written(file, message, weights) == []
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert held < 1.5 * 4 * size
    found = onnx.load(tmp_path / "net.onnx").graph.initializer
    assert [t.name for t in found] == ["own", "turned", "plain", "single"]
    for tensor in found[1:]:
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor), weights[tensor.name])


def test_weights_in_a_file_of_their_own(tmp_path):
    path = tmp_path / "net.onnx"
    net = fwt.Sequential([("hidden", nn.Dense(300)), nn.relu, ("end", nn.Dense(3))], (5,))
    model = fwt.Model(net, net.init(jax.random.key(0), np.ones((1, 5))))
    converters.to_onnx(*model, path)
    converters.to_onnx(*model, path, external_data=True)
    (first,) = tmp_path.glob("*.data")
    converters.to_onnx(*model, path, external_data=True)
    (second,) = set(tmp_path.glob("*.data")) - {first}  # that of the file before stays
    x = np.random.default_rng(0).normal(size=(2, 5)).astype(np.float32)
    close(run(path, x), np.asarray(model(x)))
    with pytest.raises(converters.FileFormatError, match=r"in another file.*external_data=True"):
        converters.from_onnx(path)
    same_leaves(model.variables, converters.from_onnx(path, external_data=True).variables)
    proto = onnx.load(path, load_external_data=False)
    held = next(i for i in proto.graph.initializer if i.external_data)

    def told(key, value):
        changed = onnx.ModelProto()
        changed.CopyFrom(proto)
        for i in changed.graph.initializer:
            for e in i.external_data:
                if i.name == held.name and e.key == key:
                    e.value = value
        (tmp_path / "bad.onnx").write_bytes(changed.SerializeToString())
        return tmp_path / "bad.onnx"

    (tmp_path / "folder").mkdir()
    os.symlink(second, tmp_path / "link.data")
    for key, value, why in (
        ("location", "../secret", "no file beside it"),
        ("location", "/etc/passwd", "no file beside it"),
        ("location", "link.data", "missing beside it, or a link"),
        ("location", "none.data", "missing beside it"),
        ("offset", "999999999", "takes"),
        ("offset", "-1", "takes"),
        ("length", "4", "takes"),
    ):
        with pytest.raises(converters.FileFormatError, match=why):
            converters.from_onnx(told(key, value), external_data=True)
    assert not list(tmp_path.glob(".fwt-*"))


def test_what_is_wrong_is_said_and_nothing_is_written(model, tmp_path, monkeypatch):
    path = tmp_path / "net.onnx"

    def refused(match, module=model.module, variables=model.variables, **how):
        with pytest.raises(converters.ConversionError, match=match):
            converters.to_onnx(module, variables, path, **how)
        assert not list(tmp_path.iterdir())

    refused(r"opset=14.*15 to 18", opset=14)
    refused("give input_shape=", fwt.Sequential([("d", nn.Dense(2))]), {"params": {}})
    refused(r"conv \(Conv\): it does not run on", input_shape=(6, 7, 4))
    refused("belongs to no layer", variables={"params": {"x": {"kernel": np.ones(3)}}})
    refused("expected a linen module", module=3)
    wide = {"params": {"d": {"kernel": np.ones((3, 2))}}}
    bare_dense = fwt.Sequential([("d", nn.Dense(2, use_bias=False))], (3,))
    refused("d/kernel: float64", bare_dense, wide)

    class Odd(nn.Module):
        def __call__(self, x):
            return jnp.fft.fft(x).real

    refused("Odd: it computes 'fft'", Odd(), {"params": {}}, input_shape=(3,))
    from fwt.converters.onnx import operators

    wrong = {**operators.NATIVE, fl.ReLU: operators._activation("Sigmoid")}
    monkeypatch.setattr(operators, "NATIVE", wrong)
    refused("onnxruntime's output differs by")
    converters.to_onnx(*model, path, check=False)
    report = converters.verify(model, path)
    assert not report.ok
    assert report.first == "2"


@pytest.mark.thorough
def test_it_is_quiet_and_needs_no_keras(tmp_path):
    code = f"""
    import sys, numpy as np, jax, flax.linen as nn, fwt
    from fwt import converters
    net = fwt.Sequential([("d", nn.Dense(2)), nn.relu], (3,))
    variables = net.init(jax.random.key(0), np.ones((1, 3)))
    converters.to_onnx(net, variables, {str(tmp_path / "a.onnx")!r})
    print(converters.load({str(tmp_path / "a.onnx")!r}).module == net)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False,
        env={**{n: v for n, v in os.environ.items() if not n.startswith("TF_")},
             "KERAS_BACKEND": "torch", "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("True\n", "")


# -- ONNX in --------------------------------------------------------------------------------------


class Last(t.Module):
    def forward(self, given):
        return given[0][:, -1]


TORCH_NETS = {
    "image": ((3, 9, 8), lambda: [
        t.Conv2d(3, 4, 3, stride=2, padding=1), t.BatchNorm2d(4), t.ReLU(), t.MaxPool2d(2),
        t.Conv2d(4, 6, (1, 2), groups=2, bias=False), t.GELU(), t.Flatten(), t.Linear(12, 5),
        t.Dropout(), t.LogSoftmax(1)]),
    "norms": ((6, 5, 4), lambda: [
        t.GroupNorm(3, 6), t.SiLU(), t.InstanceNorm2d(6, affine=True), t.LayerNorm((5, 4)),
        t.Mish(), t.AdaptiveAvgPool2d(1), t.Flatten(), t.Linear(6, 3, bias=False), t.Tanh()]),
    "up": ((4, 5, 6), lambda: [
        t.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), t.PReLU(6),
        t.Upsample(scale_factor=2, mode="bilinear"), t.AvgPool2d(3, 2, 1), t.Hardswish(),
        t.ReflectionPad2d((1, 2, 0, 1)), t.ReLU6(), t.PixelShuffle(1)]),
    "sequence": ((6, 4), lambda: [
        t.Linear(4, 5), t.LeakyReLU(0.2), t.LayerNorm(5), t.LSTM(5, 3, 2, batch_first=True,
                                                                 bidirectional=True),
        converters.Select("sequence"), t.Linear(6, 2), t.Softplus(), t.Softmax(-1)]),
    "gru": ((6, 4), lambda: [t.GRU(4, 5, batch_first=True), Last(), t.Linear(5, 2)]),
    "conv1d": ((4, 9), lambda: [
        t.Conv1d(4, 6, 3, dilation=2, padding=2), t.BatchNorm1d(6), t.ELU(0.7), t.MaxPool1d(2),
        t.CircularPad1d((1, 2)), t.Hardtanh(-0.5, 0.7), t.Unflatten(1, (2, 3)),
        t.Flatten(), t.Softshrink(0.2)]),
    "embedding": (11, lambda: [t.Embedding(11, 4), t.Flatten(), t.Linear(24, 3), t.Sigmoid()]),
}  # fmt: skip


@pytest.mark.parametrize(
    ("dynamo", "name"),
    thorough_but(
        lambda way: way in [(True, "image"), (False, "gru")],
        [
            *((False, n) for n in TORCH_NETS),
            *((True, n) for n in [*TORCH_NETS][1::2]),
            (True, "image"),
        ],
    ),
)
def test_torchs_exporters(tmp_path, name, dynamo):
    shape, layers = TORCH_NETS[name]
    torch.manual_seed(0)
    net = t.Sequential(*layers())
    for module in net.modules():  # statistics and scales off their defaults
        for n, p in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if p.is_floating_point():
                p.data = torch.rand_like(p) * 0.5 + 0.1 if "var" in n else torch.randn_like(p) * 0.5
    net.eval()
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *shape)).astype(np.float32) if isinstance(shape, tuple) else (
        rng.integers(0, shape, (2, 6)))  # fmt: skip
    path = tmp_path / "a.onnx"
    exported(net, [torch.from_numpy(x)], path, dynamo)
    model = converters.from_onnx(path, external_data=True)
    given = x if isinstance(shape, tuple) else x.astype(np.int32)
    for batch in (slice(0, 2), slice(0, 1)):
        close(np.asarray(model(given[batch])), run(path, x[batch]))
    close(np.asarray(model(given)), net(torch.from_numpy(x)).detach().numpy())
    if name == "image":
        turned = converters.from_onnx(path, layout="channels_last", external_data=True)
        close(np.asarray(turned(np.moveaxis(x, 1, -1))), run(path, x))
        assert turned.module.input_shape == (9, 8, 3)
        assert converters.verify(net, path, external_data=True).ok
        # Some of torch's exporters ask for the input's shape before anything is done with it.
        proto = onnx.load(path)
        shape_of = onnx.helper.make_node("Shape", [proto.graph.input[0].name], ["shape of it"])
        proto.graph.node.insert(0, shape_of)
        onnx.save(proto, path)
        assert converters.verify(net, path).ok


KERAS_NETS = {
    "mlp": ((5,), """L.Dense(4, activation="relu"), L.BatchNormalization(), L.Dense(3),
            L.LeakyReLU(0.1), L.Dropout(0.5), L.Dense(2, activation="softmax")"""),
    "cnn": ((9, 8, 3), """L.Conv2D(4, 3, padding="same", strides=2, activation="relu"),
            L.BatchNormalization(), L.MaxPooling2D(2), L.Flatten(),
            L.Dense(3, activation="elu")"""),
    "pools": ((9, 8, 4), """L.DepthwiseConv2D(3, padding="same"), L.Conv2D(6, (1, 2)),
              L.AveragePooling2D(2, padding="same"), L.GlobalAveragePooling2D(),
              L.Dense(3, activation="tanh")"""),
    "up": ((4, 5, 3), """L.Conv2DTranspose(4, 3, strides=2, padding="same", activation="silu"),
           L.UpSampling2D(2), L.ZeroPadding2D(((1, 2), (0, 1))), L.Cropping2D(1)"""),
    "norm": ((6, 4), """L.LayerNormalization(), L.Dense(5, activation="selu"),
             L.Conv1D(4, 3, padding="causal"), L.Softmax(axis=-1)"""),
    "groups": ((6, 5, 4), """L.GroupNormalization(2), L.Activation("hard_sigmoid"),
               L.Permute((2, 1, 3)), L.Reshape((30, 4)), L.GlobalMaxPooling1D()"""),
    "lstm": ((6, 4), "L.LSTM(5, return_sequences=True), L.Dense(2), L.LSTM(3)"),
    "both ways": ((6, 4), "L.Bidirectional(L.LSTM(5, return_sequences=True))"),
    "embedding": ((6,), "L.Embedding(11, 4), L.Flatten(), L.Dense(2)"),
}  # fmt: skip


@pytest.mark.thorough
def test_keras_exporter(tmp_path):
    """Keras exports through tf2onnx, on its TensorFlow backend only."""
    listed = ",\n".join(f"{n!r}: ({s}, lambda: [{text}])" for n, (s, text) in KERAS_NETS.items())
    code = f"""
import sys, keras, numpy as np
L, rng = keras.layers, np.random.default_rng(0)
for name, (shape, layers) in {{{listed}}}.items():
    whole = name == "embedding"
    net = keras.Sequential([keras.Input(shape, dtype="int32" if whole else "float32"), *layers()])
    for v in net.variables:
        value = rng.normal(size=v.shape) * 0.5
        if "seed" not in v.path:
            v.assign(np.abs(value) + 0.2 if "variance" in v.path else value)
    x = rng.integers(0, 11, (3, *shape)).astype(np.int32) if whole else (
        rng.normal(size=(3, *shape)).astype(np.float32))
    y = np.asarray(net(x))
    net.export(f"{tmp_path}/{{name}}.onnx", format="onnx", verbose=False)
    np.savez(f"{tmp_path}/{{name}}.npz", x=x, y=y)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env={**os.environ, "KERAS_BACKEND": "tensorflow"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for name in KERAS_NETS:
        held = np.load(tmp_path / f"{name}.npz")
        path = tmp_path / f"{name}.onnx"
        model = converters.from_onnx(path)
        close(run(path, held["x"]), held["y"])
        close(np.asarray(model(held["x"])), held["y"])
        close(np.asarray(model(held["x"][:1])), held["y"][:1])


def written(path, nodes, arrays=None, shape=("n", 4, 5), out=None, opset=17, **more):
    make = onnx.helper
    value = make.make_tensor_value_info
    graph = make.make_graph(
        nodes,
        "g",
        more.get("inputs") or [value("x", onnx.TensorProto.FLOAT, shape)],
        more.get("outputs") or [value("y", onnx.TensorProto.FLOAT, out)],
        [onnx.numpy_helper.from_array(np.asarray(a), n) for n, a in (arrays or {}).items()],
    )
    domains = [make.make_opsetid("", opset), *more.get("opsets", [])]
    proto = make.make_model(graph, opset_imports=domains, ir_version=9)
    path.write_bytes(proto.SerializeToString())
    return path


node = onnx.helper.make_node
F32 = np.float32
RNG = np.random.default_rng(0)


def rnn(op, gates, direction, **more):
    d = 2 if direction == "bidirectional" else 1
    arrays = {"w": RNG.normal(size=(d, gates * 3, 5)).astype(F32),
              "r": RNG.normal(size=(d, gates * 3, 3)).astype(F32),
              "b": RNG.normal(size=(d, 2 * gates * 3)).astype(F32)}  # fmt: skip
    nodes = [
        node("Transpose", ["x"], ["t"], perm=[1, 0, 2]),
        node(op, ["t", "w", "r", "b"], ["q"], hidden_size=3, direction=direction, **more),
    ]
    if d == 1:
        arrays["one"] = np.array([1])
        nodes.append(node("Squeeze", ["q", "one"], ["s"]))
    else:
        arrays["flat"] = np.array([0, 0, -1])
        nodes += [node("Transpose", ["q"], ["u"], perm=[0, 2, 1, 3]),
                  node("Reshape", ["u", "flat"], ["s"])]  # fmt: skip
    return [*nodes, node("Transpose", ["s"], ["y"], perm=[1, 0, 2])], arrays


def window(op, **more):
    return [node(op, ["x"], ["y"], **more)], {}


def time_first(op, gates, direction, last=False, **more):
    """A recurrent layer whose input and output have the time first."""
    nodes, arrays = rnn(op, gates, direction, **more)
    nodes = nodes[1:-1]
    nodes[0].input[0] = "x"
    if last:
        nodes[0].output[:] = ["", "q"]
        nodes[-1:] = [node("Squeeze", ["q", "zero"], ["y"])]
        arrays["zero"] = np.array([0])
    return nodes, arrays


def filled(value, name, size, **more):
    value = onnx.numpy_helper.from_array(np.array([value], F32))
    return node("ConstantOfShape", [size], [name], value=value, **more)


W, B = RNG.normal(size=(5, 3)).astype(F32), RNG.normal(size=3).astype(F32)


def product(*nodes, **arrays):
    """A product with weights that nodes make."""
    return [*nodes, node("MatMul", ["x", "w"], ["y"])], arrays


# Graphs by hand, where settings stand off what exporters write; all must be read.
GRAPHS = {
    "gru, reset first": (rnn("GRU", 3, "forward", linear_before_reset=0), (4, 5)),
    "gru, reset after": (rnn("GRU", 3, "bidirectional", linear_before_reset=1), (4, 5)),
    "rnn, relu": (rnn("RNN", 1, "forward", activations=["Relu"]), (4, 5)),
    "lstm, other functions": (
        rnn("LSTM", 4, "forward", activations=["HardSigmoid", "Softsign", "Softsign"],
            activation_alpha=[1 / 6], activation_beta=[0.5]), (4, 5)),
    "pool, SAME_UPPER": (window("MaxPool", kernel_shape=[3, 2], strides=[2, 2],
                                auto_pad="SAME_UPPER"), (2, 6, 5)),
    "pool, SAME_LOWER": (window("MaxPool", kernel_shape=[3, 2], strides=[2, 2],
                                auto_pad="SAME_LOWER"), (2, 6, 5)),
    "mean, uneven pads": (window("AveragePool", kernel_shape=[3, 2], strides=[2, 1],
                                 pads=[1, 0, 0, 1]), (2, 6, 5)),
    "mean, pads count": (window("AveragePool", kernel_shape=[3, 2], strides=[2, 1],
                                pads=[1, 0, 0, 1], count_include_pad=1), (2, 6, 5)),
    "pool, ceil": (window("MaxPool", kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1), (2, 5, 7)),
    "conv, uneven pads": (
        ([node("Conv", ["x", "w"], ["y"], pads=[1, 0, 2, 1], dilations=[1, 2], strides=[2, 1])],
         {"w": RNG.normal(size=(3, 2, 3, 2)).astype(F32)}), (2, 6, 5)),
    "conv transposed, uneven pads": (
        ([node("ConvTranspose", ["x", "w", "b"], ["y"], pads=[1, 0, 0, 1], strides=[2, 3],
               output_padding=[1, 0])],
         {"w": RNG.normal(size=(2, 3, 3, 4)).astype(F32), "b": np.ones(3, F32)}), (2, 4, 5)),
    "conv transposed, a shape": (
        ([node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2], output_shape=[8, 10])],
         {"w": RNG.normal(size=(2, 3, 3, 3)).astype(F32)}), (2, 4, 5)),
    "gemm, transposed": (
        ([node("Gemm", ["x", "w", "b"], ["y"], transB=1)],
         {"w": RNG.normal(size=(3, 4)).astype(F32), "b": np.array([2.0], F32)}), (4,)),
    "gemm, both factors": (
        ([node("Gemm", ["x", "w", "b"], ["y"], alpha=0.3, beta=-0.7)], {"w": W, "b": B}), (5,)),
    "gemm, a factor and a sum": (
        ([node("Gemm", ["x", "w"], ["a"], alpha=2.5, beta=3.0), node("Add", ["a", "b"], ["y"])],
         {"w": W, "b": B}), (5,)),
    "gemm without its bias": (
        ([node("Gemm", ["x", "w", "b"], ["y"], beta=0.0)], {"w": W, "b": B}), (5,)),
    "filled weights": (product(filled(0.5, "w", "s"), s=np.array([5, 2000])), (5,)),
    "weights of zeros": (
        product(node("ConstantOfShape", ["s"], ["w"]), s=np.array([5, 2000])), (4, 5)),
    "filled like others": (
        product(node("Shape", ["v"], ["s"]), filled(2.0, "o", "s"), node("Mul", ["o", "v"], ["w"]),
                v=W), (5,)),
    "filled and turned": (
        product(filled(-0.25, "a", "s"), node("Reshape", ["a", "r"], ["b"]),
                node("Transpose", ["b"], ["c"]), node("Neg", ["c"], ["w"]),
                s=np.array([4, 1000, 5]), r=np.array([4000, 5])), (5,)),
    "rows that repeat": (
        product(node("Expand", ["v", "s"], ["w"]), v=RNG.normal(size=(1, 7)).astype(F32),
                s=np.array([5, 1])), (5,)),
    "tiles": (product(node("Tile", ["v", "s"], ["w"]), v=W[:, :2], s=np.array([1, 3])), (5,)),
    "an identity": (
        product(node("ConstantOfShape", ["s"], ["z"]), node("EyeLike", ["z"], ["w"], k=1),
                s=np.array([5, 4])), (5,)),
    "weights over their norm": (
        product(node("ReduceL2", ["v"], ["l"], axes=[0]), node("Div", ["v", "l"], ["d"]),
                node("Mul", ["d", "g"], ["w"]), v=W, g=B), (5,)),
    "a part of weights": (
        product(node("Split", ["v"], ["u", "w"], axis=1), v=RNG.normal(size=(5, 6)).astype(F32)),
        (5,)),
    "a product of weights": (
        product(node("MatMul", ["u", "v"], ["w"]), u=W, v=RNG.normal(size=(3, 2)).astype(F32)),
        (5,)),
    "a filled kernel": (
        ([filled(0.1, "w", "s"), filled(0.3, "b", "t"), node("Conv", ["x", "w", "b"], ["y"])],
         {"s": np.array([64, 4, 3]), "t": np.array([64])}), (4, 5)),
    "rnn, time first": (time_first("RNN", 1, "forward"), (4, 5)),
    "gru, time first, both ways": (
        time_first("GRU", 3, "bidirectional", linear_before_reset=1), (4, 5)),
    "lstm, time first, its last state": (time_first("LSTM", 4, "forward", last=True), (4, 5)),
    "a clip from below": (([node("Clip", ["x", "l"], ["y"])], {"l": F32(-0.3)}), (4, 5)),
    "a clip from above": (([node("Clip", ["x", "", "h"], ["y"])], {"h": F32(0.3)}), (4, 5)),
    "product and sum": (
        ([node("MatMul", ["x", "w"], ["m"]), node("Add", ["b", "m"], ["y"])],
         {"w": RNG.normal(size=(5, 3)).astype(F32), "b": RNG.normal(size=3).astype(F32)}), (4, 5)),
    "scales and shifts": (
        ([node("Mul", ["x", "s"], ["a"]), node("Sub", ["a", "b"], ["c"]),
          node("Div", ["c", "two"], ["d"]), node("Add", ["d", "v"], ["y"])],
         {"s": RNG.normal(size=(4, 1)).astype(F32), "b": RNG.normal(size=(1, 4, 1)).astype(F32),
          "two": F32(2), "v": RNG.normal(size=5).astype(F32)}), (4, 5)),
    "an unscaled layer norm": (
        ([node("LayerNormalization", ["x", "s"], ["y"], axis=1)],
         {"s": RNG.normal(size=(4, 5)).astype(F32)}), (4, 5)),
    "pad and cut": (
        ([node("Pad", ["x", "p", "v"], ["a"]), node("Slice", ["a", "s", "e", "i"], ["y"])],
         {"p": np.array([0, 1, 0, 0, 2, 0]), "v": F32(0.5), "s": np.array([1]),
          "e": np.array([-1]), "i": np.array([2])}), (4, 5)),
    "resize": (
        ([node("Resize", ["x", "", "f"], ["y"], mode="nearest", nearest_mode="floor",
               coordinate_transformation_mode="asymmetric")],
         {"f": np.array([1, 1, 1.5, 2], F32)}), (2, 4, 5)),
    "means": (
        ([node("ReduceMean", ["x"], ["a"], axes=[1, 2], keepdims=0)], {}), (4, 5, 3)),
    "softmax of channels": (window("Softmax", axis=1), (4, 5)),
    "slopes": (([node("PRelu", ["x", "s"], ["y"])], {"s": RNG.normal(size=5).astype(F32)}), (4, 5)),
    "clips": (([node("Clip", ["x", "l", "h"], ["y"])], {"l": F32(-0.3), "h": F32(0.4)}), (4, 5)),
    "batch norm": (
        ([node("BatchNormalization", ["x", "s", "b", "m", "v"], ["y"], epsilon=0.01)],
         {n: np.abs(RNG.normal(size=4)).astype(F32) + 0.1 for n in "sbmv"}), (4, 5)),
}  # fmt: skip


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_by_hand(tmp_path, name):
    (nodes, arrays), shape = GRAPHS[name]
    if nodes[-1].output[0] != "y":
        nodes[-1].output[0] = "y"
    path = written(tmp_path / "a.onnx", nodes, arrays, ("n", *shape))
    model = converters.from_onnx(path)
    x = np.random.default_rng(1).normal(size=(3, *shape)).astype(F32)
    for batch in (x, x[:1]):
        close(np.asarray(model(batch)), run(path, batch))


OLDER = Path(onnx.__file__).parent / "backend" / "test" / "data"
# Some of ONNX's own files of opset 6, which have PyTorch's outputs beside them.
SOME = ("PReLU_2d_multiparam", "Conv2d_groups", "BatchNorm2d_eval", "Linear", "AvgPool2d_stride",
        "Softmin", "operator_addmm", "operator_pad", "Embedding")  # fmt: skip


def array_in(path):
    tensor = onnx.TensorProto()
    tensor.ParseFromString(path.read_bytes())
    return onnx.numpy_helper.to_array(tensor)


@pytest.mark.parametrize("names", [SOME, pytest.param((), marks=pytest.mark.thorough)])
def test_files_of_opset_6_compute_what_they_did(names):
    count = 0
    for folder in sorted(OLDER.glob("pytorch-*/test_*")):
        if names and not folder.name.endswith(names):
            continue
        given, wanted = (sorted((folder / "test_data_set_0").glob(f"{n}*")) for n in ("in", "out"))
        try:
            model = converters.from_onnx(folder / "model.onnx")
        except converters.FileFormatError:
            continue
        found = model(*map(array_in, given))
        found = found if isinstance(found, tuple) else (found,)
        for y, path in zip(found, wanted, strict=True):
            close(np.asarray(y), array_in(path))
        count += 1
    assert count >= (len(names) - 1 if names else 90)


X = np.random.default_rng(3).normal(size=(2, 4, 4)).astype(F32)
ALONG = np.array([0.5, -1, 2, 3], F32)
# Operators by what they meant before opset 7, and what NumPy makes of them.
MEANT = {
    "along an axis": (node("Add", ["x", "c"], ["y"], broadcast=1, axis=1), X + ALONG[:, None]),
    "along the last": (node("Mul", ["x", "c"], ["y"], broadcast=1), X * ALONG),
    "slopes of channels": (
        node("PRelu", ["x", "c"], ["y"]), np.where(X > 0, X, X * ALONG[:, None])),
    "a selu": (node("Selu", ["x"], ["y"]), 1.0507 * np.where(X > 0, X, 1.6732 * np.expm1(X))),
    "a number along an axis": (
        node("Add", ["x", "one"], ["y"], broadcast=1, axis=0), X + 1),
    "a shape": (node("Reshape", ["x"], ["y"], shape=[0, 2, -1]), X.reshape(2, 2, 8)),
}  # fmt: skip


@pytest.mark.parametrize("size", ["n", 2])
@pytest.mark.parametrize("name", MEANT)
def test_operators_before_opset_7(tmp_path, name, size):
    op, wanted = MEANT[name]
    op = onnx.NodeProto.FromString(op.SerializeToString())
    op.input[0] = "z"
    again = [node("Identity", ["x"], ["z"]), op]
    arrays = {"c": ALONG, "one": np.ones(1, F32)}
    path = written(tmp_path / "a.onnx", again, arrays, (size, 4, 4), opset=4)
    model = converters.from_onnx(path)
    close(np.asarray(model(X)), wanted)
    assert converters.verify(model, path).ok


def test_what_the_version_converter_refuses_is_said(tmp_path):
    for op, opset, said in (
        (node("Foo", ["x"], ["y"]), 6, "'Foo' is no operator of ONNX's opset 6"),
        (node("Dropout", ["x"], ["y"], is_test=0), 6, "opset 6.* does not bring it to opset 9"),
        (node("BatchNormalization", [*"xcccc"], ["y"], spatial=0), 7, "spatial must have value 1"),
        (node("PRelu", ["x", "x"], ["y"]), 6, "whose ranks are not known"),
    ):
        path = written(tmp_path / "a.onnx", [op], {"c": ALONG}, ("n", 4, 4), opset=opset)
        with pytest.raises(converters.FileFormatError, match=said):
            converters.from_onnx(path)


class Sequence(t.Module):
    """A recurrent layer with the time first, of which torch gives more than one output."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


def test_torchs_time_major_layers(tmp_path):
    torch.manual_seed(0)
    net = t.Sequential(
        t.Linear(4, 5), Sequence(t.LSTM(5, 3, 2, bidirectional=True)), t.Linear(6, 2)
    )
    x = torch.randn(7, 2, 4)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(net, (x,), str(tmp_path / "a.onnx"), dynamo=False, input_names=["x"],
                          dynamic_axes={"x": {0: "time", 1: "n"}}, opset_version=17)  # fmt: skip
    model = converters.from_onnx(tmp_path / "a.onnx")
    assert model.module.input_shape == (None, 4)
    for given in (x, torch.randn(3, 1, 4)):
        close(np.asarray(model(given.numpy())), net(given).detach().numpy())


@pytest.mark.parametrize("opset", [26, 27, 28])
def test_the_newest_opsets(tmp_path, opset):
    nodes = [node("Range", ["a", "b", "c"], ["r"]), node("Reshape", ["r", "s"], ["w"]),
             node("MatMul", ["x", "w"], ["m"]), node("Celu", ["m"], ["d"], alpha=0.5),
             node("ReduceLogSumExp", ["d", "i"], ["y"], keepdims=0)]  # fmt: skip
    arrays = {
        "a": F32(-1),
        "b": F32(1.5),
        "c": F32(0.25),
        "s": np.array([5, 2]),
        "i": np.array([2]),
    }
    path = written(tmp_path / "a.onnx", nodes, arrays, opset=opset)
    proto = onnx.load(path)
    proto.ir_version = 13
    onnx.save(proto, path)
    x = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(F32)
    close(np.asarray(converters.from_onnx(path)(x)), run(path, x))


def test_filled_weights_take_no_room_until_they_are_used(tmp_path):
    """A small file that fills many large arrays is refused before they are made."""
    nodes = [filled(1.0, f"w{i}", "s") for i in range(40)]
    more = [node("MatMul", [f"v{i}" if i else "x", f"w{i}"], [f"v{i + 1}"]) for i in range(40)]
    more[-1].output[0] = "y"
    path = written(tmp_path / "a.onnx", [*nodes, *more], {"s": np.array([8192, 8192])}, ("n", 8192))
    tracemalloc.start()  # which NumPy tells of its arrays, one of which would be 256 MiB
    try:
        with pytest.raises(converters.FileFormatError, match="grow beyond"):
            converters.from_onnx(path)
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()


def test_what_cannot_be_read_is_refused_by_the_nodes_name(tmp_path):
    path = tmp_path / "a.onnx"
    value = onnx.helper.make_tensor_value_info
    x = {"w": np.ones((5, 5), F32), "i": np.array([1])}

    def refused(match, nodes, arrays=None, **more):
        written(path, nodes, arrays, **more)
        with pytest.raises(converters.FileFormatError, match=match):
            converters.from_onnx(path)

    refused(r"odd \(Relu\): its extra=3", [node("Relu", ["x"], ["y"], name="odd", extra=3)])
    more = node("Flatten", ["x", "w"], ["y"], name="odd")
    refused(r"odd \(Flatten\): its input 'w' is not known", [more], x)
    refused("the operator 'Det'", [node("Det", ["x"], ["y"], name="odd")])
    refused(
        r"odd \(Einsum\)",
        [node("Einsum", ["x", "w"], ["y"], name="odd", equation="nij,jk->ik")],
        x,
    )
    refused("no standard operator", [node("Gelu", ["x"], ["y"], domain="com.microsoft")],
            opsets=[onnx.helper.make_opsetid("com.microsoft", 1)])  # fmt: skip
    refused("the batch, have the sizes 2, 3", [node("Add", ["x", "z"], ["y"])],
            inputs=[value("x", 1, (2, 4)), value("z", 1, (3, 4))])  # fmt: skip
    refused("first axis is not the batch", [node("Transpose", ["x"], ["y"], perm=[1, 0, 2])])
    for axis in (0, -3):
        ones = {"i": np.array([axis])}
        squeezed = [node("Squeeze", ["x", "i"], ["y"])]
        refused("moves the batch", squeezed, ones, shape=(1, 1, 5))
        refused("moves the batch", [node("Unsqueeze", ["x", "i"], ["y"])], ones, shape=(1, 1))
    refused("merged with another", [node("Reshape", ["x", "s"], ["y"])], {"s": np.array([-1, 5])})
    refused("opset 29", [node("Relu", ["x"], ["y"])], opset=29)
    refused("alpha=0", [node("Gemm", ["x", "w"], ["y"], alpha=0.0)], x, shape=("n", 5))
    refused("transA=1", [node("Gemm", ["x", "w"], ["y"], transA=1)], x, shape=("n", 5))
    refused(r"alpha=9.99.* beyond float32", [node("Gemm", ["x", "w"], ["y"], alpha=1e38)],
            {"w": np.full((5, 2), 50, F32)}, shape=("n", 5))  # fmt: skip
    refused("more than a file can have", *product(filled(1.0, "w", "s"), s=np.array([5, 2**40])))
    size = [node("Shape", ["x"], ["s"]), node("Gather", ["s", "i"], ["k"])]
    as_float = [*size, node("Cast", ["k"], ["f"], to=1)]
    for more in (
        [*as_float, node("Div", ["x", "f"], ["y"])],
        [*as_float, node("Max", ["x", "f"], ["y"])],
        [*size, node("Gather", ["w", "k"], ["g"]), node("Add", ["x", "g"], ["y"])],
        [*size, node("Slice", ["x", "i", "k", "i"], ["y"])],
    ):
        refused("is the batch's size as a number", more, {**x, "i": np.array([0])})
    refused("before opset 13", [node("Softmax", ["x"], ["y"], axis=0)], opset=11)
    refused("initial_h is not zero", [
        node("Transpose", ["x"], ["t"], perm=[1, 0, 2]),
        node("RNN", ["t", "w1", "r1", "", "", "h"], ["q"], hidden_size=1),
        node("Squeeze", ["q", "i"], ["s"]), node("Transpose", ["s"], ["y"], perm=[1, 0, 2])],
        {"w1": np.ones((1, 1, 5), F32), "r1": np.ones((1, 1, 1), F32), "i": np.array([1]),
         "h": np.ones((1, 1, 1), F32)})  # fmt: skip
    body = onnx.helper.make_graph([node("Relu", ["a"], ["b"])], "b", [value("a", 1, None)],
                                  [value("b", 1, None)])  # fmt: skip
    refused("a graph of its own", [node("Scan", ["x"], ["y"], body=body, num_scan_inputs=1)])
    for data in (b"", b"\x08", b"hello", b"\x08\x08\x12\x07pytorch:\xff\xff\xff\x7f"):
        path.write_bytes(data)
        with pytest.raises(converters.FileFormatError):
            converters.from_onnx(path)
    with pytest.raises(converters.FileFormatError, match="no such file"):
        converters.from_onnx(tmp_path / "none.onnx")


def rnn_last(op, gates):
    nodes, arrays = rnn(op, gates, "reverse")
    arrays |= {"end": np.array(-1)}
    return [*nodes[:-1], node("Gather", ["s", "end"], ["y"], axis=0)], arrays


def of(*nodes, **arrays):
    return list(nodes), {n: np.asarray(v) for n, v in arrays.items()}


# Graphs that were once read as something else: each is refused, or does what onnxruntime does.
ONCE_WRONG = {
    "selu of its own": of(node("Selu", ["x"], ["y"], alpha=2.0, gamma=0.5)),
    "dropout in training": of(node("Dropout", ["x", "r", "t"], ["y"]), r=F32(0.5), t=True),
    "mask of a dropout": of(node("Dropout", ["x"], ["d", "m"]),
                            node("Cast", ["m"], ["y"], to=1)),
    "mean of a layer norm": of(node("LayerNormalization", ["x", "s"], ["n", "y"]),
                               s=np.ones(5, F32)),
    "the end of a reversed lstm": rnn_last("LSTM", 4),
    "the end of a reversed gru": rnn_last("GRU", 3),
    "the batch as a number": of(
        node("Shape", ["x"], ["s"]), node("Cast", ["s"], ["f"], to=1),
        node("Gather", ["f", "i"], ["k"]), node("Div", ["x", "k"], ["y"]), i=0),
    "a bias for each example": of(node("MatMul", ["x", "w"], ["m"]), node("Add", ["m", "b"], ["y"]),
                                  w=np.ones((5, 4), F32), b=np.arange(4).reshape(4, 1).astype(F32)),
    "a bias of more axes": of(node("MatMul", ["x", "w"], ["m"]), node("Add", ["b", "m"], ["y"]),
                              w=np.ones((5, 3), F32), b=np.ones((1, 1, 1, 3), F32)),
    "the batch repeated": of(node("Tile", ["x", "r"], ["y"]), r=np.array([2, 1, 1])),
    "more axes": of(node("Expand", ["x", "s"], ["y"]), s=np.array([2, 1, 4, 5])),
    "a relu with an end": of(
        node("Relu", ["x"], ["a"]), node("Min", ["a", "c"], ["y"]), c=F32(2000)),
    "a function with a hole": of(
        node("Equal", ["x", "c"], ["q"]), node("Relu", ["x"], ["a"]),
        node("Where", ["q", "s", "a"], ["y"]), c=F32(0.25), s=F32(7)),
    "a step far out": of(
        node("Less", ["x", "c"], ["q"]), node("Relu", ["x"], ["a"]),
        node("Where", ["q", "s", "a"], ["y"]), c=F32(-1500), s=F32(7)),
    "almost a relu": of(
        node("LeakyRelu", ["x"], ["a"], alpha=5e-10), node("Identity", ["a"], ["y"])),
    "nothing left": of(node("Slice", ["x", "s", "e", "i"], ["y"]), s=np.array([0]),
                       e=np.array([-(2**31)]), i=np.array([2])),
    "whole numbers": of(node("Cast", ["x"], ["i"], to=6), node("Cast", ["i"], ["y"], to=1)),
    "whole numbers, long": of(node("Cast", ["x"], ["i"], to=7), node("Cast", ["i"], ["f"], to=1),
                              node("Relu", ["f"], ["y"])),
    "half": of(node("Cast", ["x"], ["i"], to=10), node("Cast", ["i"], ["y"], to=1)),
    "a pool with holes, SAME": of(node("MaxPool", ["x"], ["y"], kernel_shape=[3], dilations=[2],
                                       auto_pad="SAME_UPPER")),
    "the ratio kept": of(node("Resize", ["x", "", "", "z"], ["y"], mode="nearest",
                              nearest_mode="floor", coordinate_transformation_mode="asymmetric",
                              keep_aspect_ratio_policy="not_larger"), z=np.array([3, 4, 9])),
    "a numbered bias": of(node("Gemm", ["f", "w", "b"], ["y"]), node("Flatten", ["x"], ["f"]),
                          w=np.ones((20, 3), F32), b=np.ones((3, 1), F32)),
    "time first": of(node("LSTM", ["x", "w", "r"], ["", "h"], hidden_size=2),
                     node("Squeeze", ["h", "z"], ["y"]), w=np.ones((1, 8, 5), F32) / 9,
                     r=np.ones((1, 8, 2), F32) / 9, z=np.array([0])),
}  # fmt: skip


@pytest.mark.parametrize("name", ONCE_WRONG)
def test_graphs_that_were_once_read_wrong(tmp_path, name):
    nodes, arrays = ONCE_WRONG[name]
    nodes = sorted(nodes, key=lambda n: n.op_type == "Gemm")
    opset = 18 if name == "the ratio kept" else 17
    path = written(tmp_path / "a.onnx", nodes, arrays, (3, 4, 5), opset=opset)
    try:
        model = converters.from_onnx(path)
    except converters.FileFormatError:
        return
    for x in (np.random.default_rng(0).normal(size=(3, 4, 5)) * 3, np.full((3, 4, 5), 3000.0),
              np.full((3, 4, 5), -2000.0), np.full((3, 4, 5), 0.25)):  # fmt: skip
        x = x.astype(F32)
        close(np.asarray(model(x)), run(path, x))


def test_without_onnx_the_reader_says_what_to_install(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: find(n, *a) if n != "onnx" else None
    )
    (tmp_path / "net.onnx").write_bytes(b"\x08\x08")
    for read in (converters.load, converters.from_onnx):
        with pytest.raises(ImportError, match=r"pip install 'fwt\[onnx\]'"):
            read(tmp_path / "net.onnx")


def test_hostile_graphs_are_held_to_their_size(tmp_path):
    path = tmp_path / "a.onnx"
    end = [node("Add", ["x", "c"], ["y"])]

    def refused(nodes, arrays, shape=("n", 4)):
        written(path, [*nodes, *end], arrays, shape)
        with pytest.raises(converters.FileFormatError):
            converters.from_onnx(path)

    doubled = [node("Concat", [f"a{i}", f"a{i}"], [f"a{i + 1}"], axis=0) for i in range(40)]
    refused([*doubled, node("ReduceMax", ["a40"], ["c"])], {"a0": np.ones(4, F32)})
    wide = [node("Add", ["p", "q"], [f"w{i}"]) for i in range(40)]
    joined = node("Concat", [f"w{i}" for i in range(40)], ["c"], axis=0)
    refused([*wide, joined], {"p": np.ones((2048, 1), F32), "q": np.ones((1, 2048), F32)})
    mean = [node("ReduceMean", ["x"], ["m"], axes=[1, 2]), node("Sub", ["x", "m"], ["s"])]
    written(path, [*mean, node("Relu", ["s"], ["y"])], {}, ("n", 8192, 8192))
    assert [n.name for n in converters.from_onnx(path).module.nodes][-1] == "relu_5"
    functions = []
    for i in range(30):
        called = f"f{i + 1}" if i < 29 else "Relu"
        domain = "own" if i < 29 else ""
        body = [
            node(called, ["a"], ["b"], domain=domain),
            node(called, ["b"], ["c"], domain=domain),
        ]
        functions.append(onnx.helper.make_function(
            "own", f"f{i}", ["a"], ["c"], body,
            [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("own", 1)]))  # fmt: skip
    written(path, [node("f0", ["x"], ["y"], domain="own")], {}, opsets=[
        onnx.helper.make_opsetid("own", 1)])  # fmt: skip
    proto = onnx.load(path)
    proto.functions.extend(functions)
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(converters.FileFormatError, match="functions make more than"):
        converters.from_onnx(path)


@pytest.mark.parametrize("batch", [None, 1, 3])
def test_conversions_of_images_are_proved(tmp_path, batch):
    """With channels first, and of a fixed batch."""
    torch.manual_seed(0)
    net = t.Sequential(t.Conv2d(3, 4, 3), t.ReLU(), t.Flatten(), t.Linear(120, 5)).eval()
    path = tmp_path / "net.onnx"
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        axes = {} if batch else {"input_names": ["x"], "dynamic_axes": {"x": {0: "n"}}}
        torch.onnx.export(net, (torch.randn(batch or 1, 3, 8, 7),), str(path), dynamo=False, **axes)
    for target in ("net.pt", "net.npz", "again.onnx"):
        code, said = fwt_command("convert", path, tmp_path / target, "--verify")
        assert (code, said.splitlines()[0]) == (0, "equal"), said
    assert converters.verify(path, converters.from_onnx(path, layout="channels_last")).ok
    with torch.no_grad():
        net[3].weight[0] += 0.01
    assert not converters.verify(net, path).ok


@pytest.mark.thorough
def test_linen_recurrent_layers_go_out(tmp_path):
    x = np.random.default_rng(0).normal(size=(2, 6, 3)).astype(F32)
    both = nn.Bidirectional(nn.RNN(nn.SimpleCell(4)), nn.RNN(nn.SimpleCell(4)))
    for layer in (nn.RNN(nn.LSTMCell(4)), nn.RNN(nn.GRUCell(4), reverse=True), both):
        variables = layer.init(jax.random.key(0), x)
        converters.to_onnx(layer, variables, tmp_path / "a.onnx", (6, 3))
        close(run(tmp_path / "a.onnx", x), np.asarray(layer.apply(variables, x)))


def test_the_command_line_asks_onnxruntime(tmp_path):
    """Not our reading of the file."""
    from fwt.converters.verification import verify

    net = fwt.Sequential([("d", nn.Dense(3)), ("act", fl.Tanh())], (4,))
    model = fwt.Model(net, net.init(jax.random.key(0), np.ones((1, 4))))
    converters.save(tmp_path / "a.onnx", *model)
    converters.save(tmp_path / "a.npz", *model)
    proto = onnx.load(tmp_path / "a.onnx")
    for n in proto.graph.node:
        if n.op_type == "Tanh":
            n.op_type = "Sin"
    onnx.save(proto, tmp_path / "b.onnx")
    assert fwt_command("verify", tmp_path / "a.onnx", tmp_path / "a.npz")[0] == 0
    assert fwt_command("verify", tmp_path / "b.onnx", tmp_path / "a.npz")[0] == 3
    with pytest.raises(converters.ConversionError, match="takes no input"):
        verify.verify(tmp_path / "a.onnx", tmp_path / "a.onnx", np.ones((2, 9)))


def test_a_file_lies_about_sizes(tmp_path):
    path = written(tmp_path / "a.onnx", [node("MatMul", ["x", "w"], ["y"])],
                   {"w": np.ones((5, 2), F32)})  # fmt: skip
    for dims, raw in (([5, 2**40], True), ([5, 3], True), ([2**20, 2**20], False), ([-5, 2], True)):
        proto = onnx.load(path)
        tensor = proto.graph.initializer[0]
        del tensor.dims[:]
        tensor.dims.extend(dims)
        if not raw:
            tensor.ClearField("raw_data")
            tensor.float_data.extend([1.0, 2.0])
        (tmp_path / "b.onnx").write_bytes(proto.SerializeToString())
        with pytest.raises(converters.FileFormatError, match=r"bytes|values|shape"):
            converters.from_onnx(tmp_path / "b.onnx")
    grown = [node("Expand", ["w", "s"], ["e"]), node("MatMul", ["x", "e"], ["y"])]
    written(path, grown, {"w": np.ones((5, 1), F32), "s": np.array([5, 2**40])})
    with pytest.raises(converters.FileFormatError):
        converters.from_onnx(path)


def test_a_changed_file_of_ours_is_read_as_it_is(model, tmp_path):
    """New weights come through; a new graph is believed rather than what the file says of it."""
    path = tmp_path / "net.onnx"
    converters.to_onnx(*model, path)
    proto = onnx.load(path)
    for tensor in proto.graph.initializer:
        if tensor.name == "dense/kernel":
            tensor.raw_data = (onnx.numpy_helper.to_array(tensor) * 2).tobytes()
    onnx.save(proto, path)
    back = converters.from_onnx(path)
    assert back.module == model.module
    kernel = model.variables["params"]["dense"]["kernel"]
    assert np.array_equal(back.variables["params"]["dense"]["kernel"], kernel * 2)
    for n in proto.graph.node:
        if n.op_type == "Relu":
            n.op_type = "Tanh"
    onnx.save(proto, path)
    x = np.random.default_rng(0).normal(size=(2, 6, 7, 3)).astype(F32)
    changed = converters.from_onnx(path)
    assert any(isinstance(n.layer, fl.Tanh) for n in changed.module.layers)
    close(np.asarray(changed(x)), run(path, x))
    metadata = json.loads(next(p.value for p in proto.metadata_props if p.key == "fwt"))
    assert len(metadata["graph"]) == 2 * hashlib.sha256().digest_size


def test_verify_pins_what_is_broken_in_a_file(model, tmp_path):
    path = tmp_path / "net.onnx"

    def broken(change):
        converters.to_onnx(*model, path)
        proto = onnx.load(path)
        change(proto)
        onnx.save(proto, path)
        return converters.verify(model, path)

    def transposed(proto):
        for tensor in proto.graph.initializer:
            if tensor.name == "conv/kernel":
                value = onnx.numpy_helper.to_array(tensor)
                tensor.raw_data = value[:, :, ::-1].tobytes()

    def epsilon(proto):
        for n in proto.graph.node:
            for a in n.attribute:
                if a.name == "epsilon":
                    a.f = 0.1

    def order(proto):
        (n,) = [n for n in proto.graph.node if n.name.startswith(("pool/", "flat/"))
                and n.op_type == "Transpose"]  # fmt: skip
        n.attribute[0].ints[:] = [0, 3, 2, 1]

    assert broken(lambda proto: None).ok
    for change, first in ((transposed, "conv"), (epsilon, "norm")):
        report = broken(change)
        assert not report.ok
        assert report.first == first, report
    report = broken(order)
    assert not report.ok
    assert report.first in ("pool", "flat", "dense"), report


def test_files_by_their_names_and_on_the_command_line(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    converters.save("net.onnx", *model)
    assert converters.load("net.onnx").module == model.module

    assert fwt_command("convert", "net.onnx", "net.keras", "--verify")[0] == 0
    assert fwt_command("convert", "net.keras", "again.onnx", "--verify")[0] == 0
    assert fwt_command("verify", "net.onnx", "again.onnx")[0] == 0
    assert fwt_command("prune", "net.onnx", "pruned.onnx", "--sparsity", "0.8")[0] == 0
    pruned = converters.load("pruned.onnx").variables["params"]["dense"]["kernel"]
    assert np.mean(pruned == 0) == pytest.approx(0.8, abs=0.01)
    code, out = fwt_command("inspect", "pruned.onnx")
    assert code == 0
    assert "dense/kernel" in out
    with pytest.raises(converters.ConversionError, match="give a module"):
        converters.save("w.onnx", None, model.variables)


@pytest.mark.parametrize(
    ("op", "attributes", "a", "b"),
    [
        ("Mod", {"fmod": 1}, np.float32([-7, 7, 5]), np.float32([3, -3, 2])),
        ("Mod", {}, np.int64([-7, 7, 5]), np.int64([3, -3, 2])),
        ("Div", {}, np.int64([-7, 7, 6]), np.int64([2, -2, 3])),
        ("Pow", {}, np.int64([2, 3, 4]), np.float32([0.5, 1.5, 2])),
        ("Pow", {}, np.float32([2, 3, 4]), np.int64([-1, 2, 3])),
    ],
)
def test_numbers_of_nodes_are_those_of_onnxruntime(tmp_path, op, attributes, a, b):
    """As what is added to the input, after a Cast to float32."""
    make = onnx.helper
    nodes = [
        make.make_node(op, ["a", "b"], ["c"], **attributes),
        make.make_node("Cast", ["c"], ["d"], to=1),
        make.make_node("Add", ["x", "d"], ["y"]),
    ]
    ends = [make.make_tensor_value_info(n, 1, ("n", 3)) for n in ("x", "y")]
    given = [onnx.numpy_helper.from_array(v, n) for n, v in (("a", a), ("b", b))]
    graph = make.make_graph(nodes, "g", ends[:1], ends[1:], given)
    opsets = [make.make_opsetid("", 17)]
    onnx.save(make.make_model(graph, opset_imports=opsets, ir_version=9), tmp_path / "n.onnx")
    x = np.zeros((2, 3), np.float32)
    session = onnxruntime.InferenceSession(tmp_path / "n.onnx")
    found = converters.from_onnx(tmp_path / "n.onnx")(x)
    np.testing.assert_allclose(found, session.run(None, {"x": x})[0], rtol=1e-6)


OLD_RESIZES = {
    "Resize of opset 10": ("Resize", 10, {"mode": "nearest"}, [1, 1, 1.5, 2], None),
    "Upsample of opset 9": ("Upsample", 9, {"mode": "nearest"}, [1, 1, 3, 1.25], None),
    "to fewer pixels": ("Resize", 10, {"mode": "nearest"}, [1, 1, 0.6, 1], "opset 11 or later"),
    "linear": ("Resize", 10, {"mode": "linear"}, [1, 1, 2, 2], "'linear' with 'asymmetric'"),
}


@pytest.mark.parametrize("name", OLD_RESIZES)
def test_resizes_before_their_coordinates_were_told(tmp_path, name):
    op, opset, how, scales, refused = OLD_RESIZES[name]
    nodes = [node(op, ["x", "s"], ["y"], **how)]
    arrays = {"s": np.array(scales, F32)}
    path = written(tmp_path / "a.onnx", nodes, arrays, (3, 4, 8, 5), opset=opset)
    if refused:
        with pytest.raises(converters.FileFormatError, match=refused):
            converters.from_onnx(path)
        return
    x = np.random.default_rng(0).normal(size=(3, 4, 8, 5)).astype(F32)
    wanted = onnxruntime.InferenceSession(path).run(None, {"x": x})[0]
    np.testing.assert_array_equal(converters.from_onnx(path)(x), wanted)


def test_an_affine_without_its_numbers(tmp_path):
    """ONNX names no default of alpha, and onnxruntime's makes every state 0."""
    arrays = {"w": np.ones((1, 2, 5), F32), "r": np.ones((1, 2, 2), F32) / 3, "z": np.array([1])}

    def read(**how):
        nodes = [node("RNN", ["x", "w", "r"], ["h"], hidden_size=2, activations=["Affine"], **how),
                 node("Squeeze", ["h", "z"], ["y"])]  # fmt: skip
        return converters.from_onnx(written(tmp_path / "a.onnx", nodes, arrays, (3, 4, 5)))

    with pytest.raises(converters.FileFormatError, match=r"Affine without an alpha.*activation_al"):
        read()
    x = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(F32)
    found = read(activation_alpha=[1.0])(x)
    wanted = onnxruntime.InferenceSession(tmp_path / "a.onnx").run(None, {"x": x})[0]
    np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize("policy", ["mixed_float16", "float16"])
def test_a_half_precision_model_of_keras_goes_out(policy, tmp_path):
    """Layers of other policies stand next to each other, with a cast between them."""
    k = keras.layers
    net = keras.Sequential([
        keras.Input((6,)), k.Dense(4, "relu", dtype=policy), k.Dense(5, dtype=policy),
        k.Activation("softmax", dtype="float32")])  # fmt: skip
    converters.to_onnx(*converters.from_keras(net), tmp_path / "n.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "n.onnx")
    x = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)
    (found,) = session.run(None, {"input": x})
    np.testing.assert_allclose(found, np.asarray(net(x)), atol=5e-3)


def test_what_onnx_can_not_say_of_a_policy_names_the_way_out(tmp_path):
    import keras

    k = keras.layers
    d = {"dtype": "mixed_bfloat16"}
    net = keras.Sequential([keras.Input((6,)), k.Dense(4, **d), k.Dense(2, **d)])
    with pytest.raises(converters.ConversionError, match=r"from_keras\(model, dtype='float32'\)"):
        converters.to_onnx(*converters.from_keras(net), tmp_path / "n.onnx")
    converters.to_onnx(*converters.from_keras(net, dtype="float32"), tmp_path / "n.onnx")


@pytest.mark.parametrize("activation", ["relu", "elu"])
def test_recurrent_layers_that_grow_go_out(activation, tmp_path):
    """Where a saturated gate leaves 1e-16, onnxruntime's is 0; its Elu rounds 0 as 1."""
    keras.utils.set_random_seed(0)
    k = keras.layers
    net = keras.Sequential([keras.Input((5, 4)), k.LSTM(3, activation=activation), k.Dense(3)])
    model = converters.from_keras(net)
    converters.to_onnx(*model, tmp_path / "n.onnx")
    assert converters.verify(model, tmp_path / "n.onnx").ok
