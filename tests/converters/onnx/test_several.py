"""ONNX files of models of several inputs and outputs: names, order, batch size and structure."""

import flax.linen as nn
import jax
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from cases import shop
from flax import nnx

import fwt
from fwt import converters

RNG = np.random.default_rng(0)


def floats(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def run(path, *xs):
    """What onnxruntime gives, and the names of what it takes and gives."""
    session = onnxruntime.InferenceSession(str(path))
    names = [x.name for x in session.get_inputs()]
    return session.run(None, dict(zip(names, xs, strict=True))), names, [
        y.name for y in session.get_outputs()]  # fmt: skip


@pytest.mark.parametrize("how", [{}, {"by_key": True}, {"again": True}], ids=str)
def test_keras_with_two_inputs_and_outputs(tmp_path, how):
    net, path = shop(**how), tmp_path / "net.onnx"
    model = converters.from_keras(net)
    converters.to_onnx(*model, path)
    tokens, numbers = RNG.integers(0, 11, (3, 5)).astype(np.int32), floats(3, 6)
    given = {"tokens": tokens, "numbers": numbers}
    wanted = net(given if "by_key" in how else [tokens, numbers])
    proto = onnx.load(path)
    names = [v.name for v in proto.graph.input if v.name in given]
    assert names == list(model.module.inputs)
    found, _, gives = run(path, *(given[n] for n in names))
    expected = {"by_key": list(model.module.outputs), "again": ["score", "numbers:2", "score:2"]}
    assert gives == expected.get(next(iter(how), ""), ["score", "tags"])
    wanted = [wanted[n] for n in gives] if "by_key" in how else wanted
    for theirs, ours in zip(wanted, found, strict=True):
        np.testing.assert_allclose(theirs, ours, rtol=1e-5, atol=1e-6)
    for value in proto.graph.input:
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert converters.from_onnx(path).module == model.module
    again = converters.to_keras(*converters.from_onnx(path))
    assert converters.verify(net, again).ok


def test_a_file_without_our_description_has_the_same_ends(tmp_path):
    path = tmp_path / "net.onnx"
    model = converters.from_keras(shop())
    converters.to_onnx(*model, path)
    proto = onnx.load(path)
    del proto.metadata_props[:]
    onnx.save(proto, path)
    read = converters.from_onnx(path)
    assert read.module.inputs == ("tokens", "numbers")
    xs = [RNG.integers(0, 11, (2, 5)).astype(np.int32), floats(2, 6)]
    for one, other in zip(read(*xs), model(*xs), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


class Stereo(torch.nn.Module):
    """Two images, channels first; a dict out."""

    def __init__(self, swapped=False, other=0.1):
        super().__init__()
        self.left, self.right = torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(3, 4, 3)
        self.act, self.head = torch.nn.ReLU(), torch.nn.Linear(4, 4)
        self.swapped, self.other = swapped, other

    def forward(self, a, b):
        h, g = self.act(self.left(a)), self.act(self.right(b))
        pooled = self.head((h * g).mean((2, 3)))
        last = self.act(pooled - self.other)
        if self.swapped:
            pooled, last = last, pooled
        return {"sum": h + g, "pooled": pooled, "last": last}


@pytest.mark.parametrize(
    "layout", ["channels_last", pytest.param("source", marks=pytest.mark.thorough)]
)
def test_torch_with_two_images_and_a_dict(tmp_path, layout):
    net, path = Stereo().eval(), tmp_path / "net.onnx"
    shapes = [(3, 6, 7), (3, 6, 7)]
    xs = [floats(1, *s) for s in shapes]
    wanted = net(*map(torch.from_numpy, xs))
    model = converters.from_torch(net, shapes, layout=layout)
    converters.to_onnx(model, path)
    last = layout == "channels_last"
    found, takes, gives = run(path, *(x.transpose(0, 2, 3, 1) if last else x for x in xs))
    assert (takes, gives) == (["a", "b"], ["sum", "pooled", "last"])
    found[0] = found[0].transpose(0, 3, 1, 2) if last else found[0]
    for name, ours in zip(gives, found, strict=True):
        np.testing.assert_allclose(wanted[name].detach(), ours, rtol=1e-4, atol=1e-5)


class Pair(nn.Module):
    @nn.compact
    def __call__(self, x, tokens, train: bool = False):
        h = nn.relu(nn.Dense(4)(x))
        y = nn.LayerNorm()(nn.Embed(7, 4)(tokens).mean(1) + h)
        return {"y": y, "each": (y * h).sum(-1), "h": h}


def test_linen_with_tokens_and_numbers(tmp_path):
    net, path = Pair(), tmp_path / "net.onnx"
    xs = [floats(3, 3), RNG.integers(0, 7, (3, 5)).astype(np.int32)]
    variables = net.init(jax.random.key(0), *xs)
    wanted = net.apply(variables, *xs)
    converters.to_onnx(net, variables, path, input_shape=[(3,), (5,)])
    found, takes, gives = run(path, *xs)
    assert (takes, gives) == (["x", "tokens"], ["each", "h", "y"])
    for name, ours in zip(gives, found, strict=True):
        assert ours.shape == wanted[name].shape
        np.testing.assert_allclose(wanted[name], ours, rtol=1e-5, atol=1e-6)


class Two(nnx.Module):
    def __init__(self, rngs):
        self.a, self.b = nnx.Linear(3, 4, rngs=rngs), nnx.Linear(2, 4, rngs=rngs)

    def __call__(self, x, y):
        h = nnx.relu(self.a(x))
        return h + self.b(y), h


def test_nnx_with_two_inputs(tmp_path):
    net, path = Two(nnx.Rngs(0)), tmp_path / "net.onnx"
    converters.to_onnx(net, path, input_shape=[(3,), (2,)])
    xs = [floats(4, 3), floats(4, 2)]
    found, takes, _ = run(path, *xs)
    assert takes == ["x", "y"]
    for theirs, ours in zip(net(*xs), found, strict=True):
        np.testing.assert_allclose(theirs, ours, rtol=1e-5, atol=1e-6)


def test_dtypes_are_given_or_found(tmp_path):
    graph = fwt.Graph([("flat", fwt.layers.Flatten(), "t"), ("e", nn.Embed(7, 2), "flat"),
                       ("d", nn.Dense(2), "x")],
                      inputs={"t": "t", "x": "x"}, outputs={"e": "e", "d": "d"},
                      input_shape=((2, 3), (4,)))  # fmt: skip
    variables = graph.init(jax.random.key(0), np.ones((1, 2, 3), np.int32), floats(1, 4))
    for how in ({}, {"input_dtype": {"x": "float32", "t": "int32"}},
                {"input_shape": [np.ones((2, 2, 3), np.int32), floats(1, 4)]}):  # fmt: skip
        converters.to_onnx(graph, variables, tmp_path / "net.onnx", **how)
        session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"))
        assert [x.type for x in session.get_inputs()] == ["tensor(int32)", "tensor(float)"]
    wrong = [
        ({"input_shape": [(4,)]}, "takes t, x: expected one shape for each"),
        ({"input_shape": {"t": (2, 3)}}, "the inputs are t, x"),
        ({"input_shape": [(2, None), (4,)]}, "the input t's sizes must be known"),
        ({"input_dtype": ["int32"] * 3}, "expected one for each of t, x"),
    ]
    for how, said in wrong:
        with pytest.raises(converters.ConversionError, match=said):
            converters.to_onnx(graph, variables, tmp_path / "net.onnx", **how)


class Encoder(nn.Module):
    causal: bool = False

    @nn.compact
    def __call__(self, x):
        h = nn.LayerNorm()(x)
        mask = nn.make_causal_mask(np.ones((1, x.shape[1]))) if self.causal else None
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(h, mask=mask)
        return x + nn.Dense(6)(nn.gelu(nn.Dense(8)(x)))


@pytest.mark.parametrize(
    "net",
    [
        nn.MultiHeadDotProductAttention(num_heads=2),
        pytest.param(Encoder(), marks=pytest.mark.thorough),
        pytest.param(Encoder(True), marks=pytest.mark.thorough),
    ],
    ids=["alone", "encoder", "causal"],
)
def test_attention_of_linen_comes_back(tmp_path, net):
    x, path = floats(3, 5, 6), tmp_path / "net.onnx"
    variables = net.init(jax.random.key(0), x)
    converters.to_onnx(net, variables, path, input_shape=(5, 6))
    model = converters.from_onnx(path)
    np.testing.assert_allclose(net.apply(variables, x), model(x), rtol=1e-5, atol=1e-6)
    leaves = [sorted(np.ravel(v).tolist() for v in jax.tree.leaves(each))
              for each in (variables, model.variables)]  # fmt: skip
    assert leaves[0] == leaves[1]
    assert converters.verify((net, variables), path).ok


@pytest.mark.parametrize("names", [("input_1", "input_2"), ("input_1", "input_0"), ("a", "input_0"),
                                   ("weight_0", "output")])  # fmt: skip
def test_inputs_keep_names_that_the_exporter_has_too(tmp_path, names):
    net = fwt.Graph(
        [("h", nn.Dense(4), names[0]), ("out", fwt.layers.Subtract(), ("h", names[1]))],
        inputs=names, input_shape=((4,), (4,)),
    )  # fmt: skip
    xs = floats(3, 4), floats(3, 4)
    variables = net.init(jax.random.key(0), *xs)
    converters.to_onnx(net, variables, tmp_path / "n.onnx")
    (found,), taken, _ = run(tmp_path / "n.onnx", *xs)
    assert tuple(taken) == names
    np.testing.assert_allclose(found, net.apply(variables, *xs), atol=1e-5)
