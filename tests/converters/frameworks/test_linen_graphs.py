"""Linen and nnx modules that users write, out to torch, Keras and ONNX, against themselves."""

import inspect
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest
import torch
from compare import applied
from flax import nnx

import fwt
from fwt import converters
from fwt.converters.frameworks import linen_trace


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        for features in (4, 6):
            x = nn.relu(nn.Conv(features, (3, 3))(x))
            x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        x = nn.relu(nn.Dense(7)(x.reshape((x.shape[0], -1))))
        return nn.Dense(3)(x)


class Block(nn.Module):
    features: int
    norm: Any
    strides: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, x):
        conv = partial(nn.Conv, use_bias=False)
        y = nn.relu(self.norm()(conv(self.features, (3, 3), self.strides)(x)))
        y = self.norm()(conv(self.features, (3, 3))(y))
        if x.shape != y.shape:
            x = self.norm(name="norm_proj")(conv(self.features, (1, 1), self.strides)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        x = nn.relu(norm(name="bn_init")(nn.Conv(4, (7, 7), (2, 2), padding=[(3, 3), (3, 3)])(x)))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        x = Block(4, norm)(x)
        x = Block(8, norm, (2, 2))(x)
        return nn.Dense(5)(jnp.mean(x, axis=(1, 2)))


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, ids, train=False):
        x = nn.Embed(11, 8)(ids)
        x = x + self.param("position", nn.initializers.normal(), (1, 6, 8))
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(2, deterministic=not train)(y, y)
        y = nn.relu(nn.Dense(16)(nn.LayerNorm()(x)))
        return x + nn.Dropout(0.1)(nn.Dense(8)(y), deterministic=not train)


class UNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        a = nn.relu(nn.Conv(4, (3, 3))(x))
        y = nn.silu(nn.Conv(6, (3, 3))(nn.max_pool(a, (2, 2), strides=(2, 2))))
        b, h, w, c = y.shape
        y = jax.image.resize(y, (b, 2 * h, 2 * w, c), "nearest")
        return nn.sigmoid(nn.Conv(1, (1, 1))(jnp.concatenate([a, y], axis=-1)))


class Residual(nn.Module):
    def setup(self):
        self.first, self.shared, self.norm = nn.Dense(6), nn.Dense(6), nn.LayerNorm()
        self.gain = self.param("gain", nn.initializers.normal(1.0), (6,))

    def __call__(self, x):
        x = nn.silu(self.first(x))
        x = x + self.gain * nn.leaky_relu(self.shared(self.norm(x)), 0.2)
        return nn.softmax(x + nn.tanh(self.shared(x)) / 2)


LINEN = {
    "cnn": (CNN(), (8, 12, 1)),
    "resnet": (ResNet(), (17, 21, 3)),
    "encoder": (Encoder(), (6,)),
    "unet": (UNet(), (8, 12, 3)),
    "residual": (Residual(), (5,)),
}


def _filled(path, leaf):
    rng = np.random.default_rng(leaf.size)
    name = jax.tree_util.keystr(path)
    low = 0.5 if "var" in name or "scale" in name else -0.6
    return rng.uniform(low, low + 1.1, leaf.shape).astype(leaf.dtype)


def _given(name):
    module, shape = LINEN[name]
    rng = np.random.default_rng(1)
    if name == "encoder":
        x = rng.integers(0, 11, (3, *shape)).astype(np.int32)
    else:
        x = rng.normal(size=(3, *shape)).astype(np.float32)
    told = {"train": False} if "train" in inspect.signature(module.__call__).parameters else {}
    variables = jax.eval_shape(lambda: module.init(jax.random.key(0), x, **told))
    variables = jax.tree_util.tree_map_with_path(_filled, variables)
    return module, variables, shape, x, np.asarray(module.apply(variables, x, **told))


def _near(found, wanted):
    assert np.abs(np.asarray(found) - wanted).max() <= 3e-5 * np.abs(wanted).max()


def _some(always, names):
    """All names, those beside the first in the thorough run only."""
    thorough = pytest.mark.thorough
    return [n if n in always else pytest.param(n, marks=thorough) for n in names]


@pytest.mark.parametrize("name", _some(("residual",), LINEN))
def test_a_linen_module_goes_out(name, tmp_path):
    module, variables, shape, x, wanted = _given(name)
    model = linen_trace.traced(module, variables, shape)
    assert jax.tree.all(jax.tree.map(np.array_equal, dict(model.variables), dict(variables)))
    out = converters.to_torch(module, variables, shape, layout="source").eval()
    with torch.no_grad():
        _near(out(torch.as_tensor(x)).numpy(), wanted)
    back = converters.from_torch(out, shape, layout="source")
    _near(applied(back.module)(back.variables, x), wanted)
    _near(converters.to_keras(module, variables, shape)(x), wanted)
    path = tmp_path / "net.onnx"
    converters.to_onnx(module, variables, path, shape, input_dtype=x.dtype.name)
    session = onnxruntime.InferenceSession(path)
    (given,) = session.get_inputs()
    kind = np.float32 if given.type == "tensor(float)" else np.int32
    _near(session.run(None, {given.name: x.astype(kind)})[0], wanted)


class NnxResidual(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(6, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.gain = nnx.Param(jnp.linspace(-1, 1, 6))

    def __call__(self, x):
        return self.first(x + self.gain[...] * nnx.gelu(self.norm(self.first(x))))


class NnxAttention(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, in_features=6, decode=False, rngs=rngs)
        self.blocks = nnx.List([nnx.LayerNorm(6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)])

    def __call__(self, x):
        norm, last = self.blocks
        return last(nnx.silu(norm(x + self.attention(x)))).mean(axis=1)


class NnxCNN(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
        self.drop = nnx.Dropout(0.3, rngs=rngs)
        self.last = nnx.Linear(4 * 2 * 3, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.conv(x)), (2, 2), strides=(2, 2))
        return self.last(self.drop(x.reshape(x.shape[0], -1)))


class NnxNormalised(nnx.Module):
    """A layer that is called with other weights than its own, and one that changes them."""

    def __init__(self, rngs):
        self.first = nnx.WeightNorm(nnx.Linear(6, 4, rngs=rngs), rngs=rngs)
        self.last = nnx.LoRALinear(4, 3, lora_rank=2, rngs=rngs)
        self.mean = nnx.Variable(jnp.arange(6.0))

    def __call__(self, x):
        return self.last(self.first(x - self.mean[...]))


@pytest.mark.parametrize(
    ("cls", "shape"),
    [(NnxCNN, (4, 6, 2)), (NnxResidual, (6,)), (NnxAttention, (5, 6)), (NnxNormalised, (6,))],
)
def test_an_nnx_module_goes_out(cls, shape):
    module = cls(nnx.Rngs(0))
    module.eval()
    x = np.random.default_rng(0).normal(size=(3, *shape)).astype(np.float32)
    wanted = np.asarray(module(x))
    out = converters.to_torch(module, input_shape=shape, layout="source").eval()
    with torch.no_grad():
        _near(out(torch.as_tensor(x)).numpy(), wanted)
    _near(converters.to_keras(module, input_shape=shape)(x), wanted)


def _module(function):
    class Own(nn.Module):
        @nn.compact
        def __call__(self, x):
            return function(nn.Dense(6)(x))

    return Own()


def _variables(module, *xs):
    variables = jax.eval_shape(lambda: module.init(jax.random.key(0), *xs))
    return jax.tree_util.tree_map_with_path(_filled, variables)


def _goes_everywhere(module, shape, keras=True):
    """Other inputs than those that were compared, and another number of them."""
    rng = np.random.default_rng(3)
    several = shape if isinstance(shape, list) else [shape]
    xs = [rng.normal(size=(5, *s)).astype(np.float32) * 1.5 for s in several]
    variables = _variables(module, *xs)
    wanted = np.asarray(module.apply(variables, *xs))
    graph = linen_trace.traced(module, variables, shape)
    _near(applied(graph.module)(graph.variables, *xs), wanted)
    with torch.no_grad():
        out = converters.to_torch(graph, layout="source")(*map(torch.as_tensor, xs))
    _near(out.numpy(), wanted)
    if keras:
        made = converters.to_keras(graph)
        _near(made(xs if len(xs) > 1 else xs[0], training=False), wanted)
        back = converters.from_keras(made)
        _near(applied(back.module)(back.variables, *xs), wanted)
    return graph


def _attended(x):
    b, t, c = x.shape
    q, k, v = x.reshape(b, t, 3, 2, c // 6).transpose(2, 0, 3, 1, 4)
    mask = jnp.tril(jnp.ones((t, t), bool))
    a = nn.softmax(jnp.where(mask, q @ k.swapaxes(-1, -2) * (c // 6) ** -0.5, -jnp.inf))
    return (a @ v).transpose(0, 2, 1, 3).reshape(b, t, c // 3)


BETWEEN = {  # what stands behind a Dense, and the shape of its input
    "gelu by tanh": (nn.gelu, (3,)),
    "softplus": (nn.softplus, (3,)),
    "hard_tanh": (nn.hard_tanh, (3,)),
    "clip": (lambda x: jnp.clip(x, -0.3, 0.4), (3,)),
    "leaky": (lambda x: jnp.where(x > 0, x, 0.1 * x), (3,)),
    "norm": (lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True), (3,)),
    "std": (lambda x: (x - x.mean(1, keepdims=True)) / (x.std(1, keepdims=True) + 1), (3, 5)),
    "stack": (lambda x: jnp.stack([x, 2 * x], axis=1), (3,)),
    "flip": (lambda x: x[:, ::-1] - x[:, [2, 0, 1, 1, 3, 2]], (3,)),
    "constant": (lambda x: x * jnp.arange(6.0) + jnp.eye(6)[2], (3,)),
    "repeat": (lambda x: jnp.repeat(x, 2, axis=1), (3,)),
    "from the left": (lambda x: jnp.arange(6.0).reshape(2, 3) @ x, (3, 5)),
    "bilinear": (lambda x: jax.image.resize(x, (x.shape[0], 5, 3, 6), "bilinear"), (3, 4, 2)),
    "attention": (_attended, (4, 5)),
    "pad": (lambda x: jnp.pad(x, ((0, 0), (1, 2), (0, 0)), mode="reflect"), (4, 5)),
    "jax attention": (
        lambda x: jax.nn.dot_product_attention(*[x.reshape(x.shape[0], 4, 2, 3)] * 3),
        (4, 5),
    ),
}


@pytest.mark.parametrize(
    "name", _some(("gelu by tanh", "leaky", "std", "stack", "constant", "attention"), BETWEEN)
)
def test_what_stands_between_layers_goes_out(name):
    function, shape = BETWEEN[name]
    _goes_everywhere(_module(function), shape)


class Normalised(nn.Module):
    """A layer that is called with other weights than its own."""

    @nn.compact
    def __call__(self, x):
        return nn.WeightNorm(nn.Dense(4))(x)


class Heads(nn.Module):
    """Products with kernels of several axes, whose operations are named after their layer."""

    @nn.compact
    def __call__(self, x):
        q, k, v = (nn.DenseGeneral((2, 3), name=n)(x) for n in "qkv")
        a = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
        return nn.DenseGeneral(4, axis=(-2, -1))(jnp.einsum("bhqk,bkhd->bqhd", a, v))


class Across(nn.Module):
    """Attention that no other library has as one layer."""

    @nn.compact
    def __call__(self, x, memory):
        return nn.MultiHeadDotProductAttention(2, qkv_features=6, normalize_qk=True)(x, memory)


class Masked(nn.Module):
    @nn.compact
    def __call__(self, x):
        at = jnp.arange(x.shape[1])
        near = (jnp.abs(at[:, None] - at) < 2)[None, None]
        return nn.PReLU()(nn.MultiHeadDotProductAttention(2)(x, x, mask=near))


class Named(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="input")(x) + nn.Dense(4, name="add")(x)


class Again(nn.Module):
    """A remat, modules in a list, one of which is called twice, and statistics by a setting."""

    def setup(self):
        self.blocks = [nn.remat(Residual)(), nn.Sequential([nn.Dense(6), nn.relu])]
        self.norm = nn.BatchNorm(use_running_average=True, use_scale=False)

    def __call__(self, x):
        x = self.blocks[1](self.blocks[0](x))
        return self.norm(self.blocks[1](x))


class NormalisedHeads(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(2, qkv_features=8, normalize_qk=True)(x)


def test_an_attention_that_no_row_says_is_refused_in_a_chain():
    """Torch has it as dense layers and a product, which know nothing of the norms."""
    net = fwt.Sequential([("a", nn.MultiHeadDotProductAttention(2, normalize_qk=True))], (5, 6))
    variables = net.init(jax.random.key(0), np.ones((1, 5, 6), np.float32))
    for out in (converters.to_torch, converters.to_keras):
        with pytest.raises(converters.ConversionError, match="normalize_qk=True"):
            out(net, variables)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (Normalised(), (3,)),
        (NormalisedHeads(), (5, 6)),
        (Heads(), (3, 5)),
        pytest.param(Across(), [(3, 6), (4, 5)], marks=pytest.mark.thorough),
        pytest.param(Masked(), (5, 6), marks=pytest.mark.thorough),
        (Named(), (3,)),
        (Again(), (6,)),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else "",
)
def test_layers_that_are_taken_apart_or_called_again(module, shape):
    _goes_everywhere(module, shape)


@pytest.mark.parametrize("suffix", [".keras", ".safetensors"])
def test_a_module_of_ones_own_is_saved(suffix, tmp_path):
    module, variables, shape, x, wanted = _given("residual")
    path = tmp_path / f"net{suffix}"
    with pytest.raises(converters.ConversionError, match="input_shape="):
        converters.save(path, module, variables)
    converters.save(path, module, variables, input_shape=shape)
    back = converters.load(path)
    _near(back(x), wanted)
    assert jax.tree.all(jax.tree.map(np.array_equal, dict(back.variables), dict(variables)))
    net = NnxAttention(nnx.Rngs(0))
    net.eval()
    converters.save(path, net, input_shape=(5, 6))
    x = np.random.default_rng(2).normal(size=(3, 5, 6)).astype(np.float32)
    _near(converters.load(path)(x), np.asarray(net(x)))


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda x: x - x.mean(axis=0), "over the examples"),
        (jnp.cumsum, "batch"),
        (lambda x: jnp.cumsum(x, axis=1), "cumsum"),
        (lambda x: jnp.where(x.sum(1, keepdims=True) > 0, x, -x), "gt"),
        (lambda x: x + jax.random.normal(jax.random.key(0), x.shape), "random"),
        (lambda x: x.reshape(-1), "batch"),
        (lambda x: x.swapaxes(0, 1), "first axis of its output"),
        (lambda x: nn.Dense(2, dtype=jnp.bfloat16)(x), "computes in bfloat16"),
        (lambda x: x if x.shape[0] > 3 else 2 * x, "any number of examples"),
        (lambda x: nn.RNN(nn.GRUCell(2))(x[:, None]), "scan"),
        (lambda x: nn.Dropout(0.5, deterministic=False)(x), "PRNG"),
    ],
)
def test_what_no_layer_says_is_refused_by_name(function, said):
    module = _module(function)
    variables = module.init(jax.random.key(0), jnp.ones((2, 3)))
    with pytest.raises(converters.ConversionError, match=said):
        converters.to_torch(module, variables, (3,))


def test_verify_compares_a_module_of_ones_own_layer_by_layer():
    module, variables, shape, x, _ = _given("residual")
    out = converters.to_torch(module, variables, shape)
    for more in ({"input_shape": shape}, {"inputs": x}):
        report = converters.verify((module, variables), out, **more)
        assert report.ok
        assert "shared" in [line.name for line in report.layers]
    with torch.no_grad():
        out.first.weight[0, 0] += 1
    assert converters.verify((module, variables), out, input_shape=shape).first == "first"


def test_a_module_of_ones_own_needs_a_shape():
    module, variables, *_ = _given("residual")
    with pytest.raises(converters.ConversionError, match="input_shape="):
        converters.to_torch(module, variables)
