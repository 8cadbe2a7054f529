"""What the axes of leaves mean: stacks of layers, classes of modules, names, ``axes=``."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

import fwt
from fwt import _axes, _modules, _rules, _tree
from fwt import constraints as C
from fwt import patterns as P
from fwt.initializers import _bound as initializers

KEY = jax.random.key(0)


def names(tree, path, axes=None):
    found = _axes.Places(_tree.Tree(tree), axes)(path).names
    return None if found is None else " ".join(n or "?" for n in found)


def f(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = nn.LayerNorm()(x)
        return nn.MultiHeadDotProductAttention(2, qkv_features=8, use_bias=False)(x), None


class Conv(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = nn.Conv(5, (3, 2), use_bias=False)(x)
        return nn.BatchNorm(use_running_average=True)(x), None


class Dense(nn.Module):
    bias: bool = True

    @nn.compact
    def __call__(self, x, _):
        x = nn.Dense(7, use_bias=self.bias, name="up")(x)
        return nn.Dense(5, use_bias=self.bias, name="down")(nn.tanh(x)), None


class Scanned(nn.Module):
    block: nn.Module
    axis: int = 0

    @nn.compact
    def __call__(self, x):
        axes = {"params": self.axis, "batch_stats": self.axis}
        made = nn.scan(type(self.block), axes, split_rngs={"params": True}, length=3)
        return made(**settings(self.block), name="layers")(x, None)[0]


def settings(block):
    return {"bias": block.bias} if isinstance(block, Dense) else {}


def variables(module, *shape):
    return jax.eval_shape(module.init, KEY, jnp.ones(shape))


# -- what the axes are ------------------------------------------------------------------------

DENSE = variables(Scanned(Dense()), 2, 5)
BARE = variables(Scanned(Dense(bias=False)), 2, 5)
SECOND = variables(Scanned(Dense(bias=False), 1), 2, 5)
ATTENTION = variables(Scanned(Attention()), 2, 4, 6)
PLAIN_ATTENTION = variables(nn.MultiHeadDotProductAttention(2, qkv_features=8), 2, 4, 6)
CONV = variables(Scanned(Conv()), 2, 4, 4, 5)
ENSEMBLE = {
    name: f(*x.shape)
    for name, x in torch.func.stack_module_state(
        [torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3)) for _ in range(5)]
    )[0].items()
}
AT = "layers/MultiHeadDotProductAttention_0"
HEADS = {"query": {"kernel": f(4, 4, 16), "bias": f(4, 16)}}
GPT2 = {
    "h.0.attn.c_attn.weight": f(4, 12), "h.0.attn.c_attn.bias": f(12),
    "h.0.attn.c_proj.weight": f(4, 4), "h.0.attn.c_proj.bias": f(4),
}  # fmt: skip
NANO = {
    "h.0.attn.c_attn.weight": f(12, 4), "h.0.attn.c_attn.bias": f(12),
    "h.0.attn.c_proj.weight": f(4, 4), "h.0.attn.c_proj.bias": f(4),
}  # fmt: skip


@pytest.mark.parametrize(
    ("tree", "path", "expected"),
    [
        (DENSE, "layers/up/kernel", "stack in out"),
        (DENSE, "layers/down/bias", "stack out"),
        (ATTENTION, f"{AT}/query/kernel", "stack in heads dim"),
        (ATTENTION, f"{AT}/out/kernel", "stack heads dim out"),
        (ATTENTION, "layers/LayerNorm_0/scale", "stack out"),
        (PLAIN_ATTENTION, "query/kernel", "in heads dim"),
        (PLAIN_ATTENTION, "value/bias", "out out"),
        (PLAIN_ATTENTION, "out/kernel", "heads dim out"),
        (CONV, "layers/Conv_0/kernel", "stack spatial spatial in out"),
        (ENSEMBLE, "0.weight", "stack out in"),
        (ENSEMBLE, "1.weight", "stack out"),
        # linen's names for what it lifts, and for a Dense
        ({"ScanBlock_0": {"a": {"kernel": f(3, 4, 5)}, "b": {"kernel": f(3, 5, 4)}}},
         "ScanBlock_0/a/kernel", "stack in out"),
        ({"Dense_0": {"kernel": f(3, 4, 5)}, "Dense_1": {"kernel": f(3, 5, 4)}},
         "Dense_0/kernel", "stack in out"),
        # a stack in a stack; dense layers that are named as an attention's are
        ({"d": {"kernel": f(2, 3, 4, 5), "bias": f(2, 3, 5)}}, "d/kernel", "stack stack in out"),
        ({"query": {"kernel": f(6, 8, 8), "bias": f(6, 8)}}, "query/kernel", "stack in out"),
        ({"gru": {"kernel": f(5, 3, 6), "recurrent_kernel": f(5, 2, 6), "bias": f(5, 2, 6)}},
         "gru/kernel", "stack in out"),
        # a stack of what may be experts or a window
        ({"m": {"kernel": f(6, 4, 8, 9)}, "ln": {"scale": f(6, 8)}}, "m/kernel", "stack ? ? ?"),
        # no stacks
        ({"Conv_0": {"kernel": f(3, 4, 4)}}, "Conv_0/kernel", "spatial in out"),
        ({"conv1d_3": {"kernel": f(3, 4, 4)}}, "conv1d_3/kernel", "spatial in out"),
        ({"enc": {"kernel": f(3, 4, 5), "bias": f(5)}}, "enc/kernel", "spatial in out"),
        ({"a": {"kernel": f(3, 2, 4, 5)}}, "a/kernel", "spatial spatial in out"),
        ({"Conv_0": {"kernel": f(3, 4, 5)}, "Conv_1": {"kernel": f(3, 5, 5)}},
         "Conv_0/kernel", "spatial in out"),
        ({"gru": {"kernel": f(2, 6), "recurrent_kernel": f(2, 6), "bias": f(2, 6)}},
         "gru/kernel", "in out"),
        # nothing tells
        (BARE, "layers/up/kernel", None),
        (SECOND, "layers/up/kernel", None),
        ({"w": {"kernel": f(6, 8, 8)}}, "w/kernel", None),
        ({"a": {"kernel": f(3, 4, 5)}, "b": {"kernel": f(3, 5, 4)}}, "a/kernel", None),
        ({"pos": {"bias": f(4, 8)}, "d": {"kernel": f(4, 8, 3)}}, "d/kernel", None),
        ({"wi": {"kernel": f(8, 3, 16), "bias": f(16, 3)}}, "wi/kernel", None),
        # a stack of dense layers, or one DenseGeneral
        ({"proj": {"kernel": f(4, 4, 16), "bias": f(4, 16)}}, "proj/kernel", None),
        ({"proj": {"kernel": f(4, 4, 16), "bias": f(4, 16)}}, "proj/bias", None),
        ({"proj": {"kernel": f(2, 2, 2, 5), "bias": f(2, 2, 5)}}, "proj/kernel", None),
        ({"query": {"kernel": f(4, 4, 16), "bias": f(4, 16)}}, "query/kernel", None),
        (HEADS | {"out": {"kernel": f(4, 16, 6), "bias": f(6)}}, "query/kernel", "in heads dim"),
        (HEADS | {"out": {"kernel": f(4, 16, 6), "bias": f(6)}}, "query/bias", "out out"),
        (HEADS | {"out": {"kernel": f(4, 16, 6), "bias": f(4, 6)}}, "query/kernel", "stack in out"),
        ({"query": {"kernel": f(3, 4, 4, 5), "bias": f(3, 4, 5)},
          "out": {"kernel": f(3, 4, 5, 6), "bias": f(3, 6)}}, "query/kernel",
         "stack in heads dim"),
        ({"key": {"kernel": f(4, 2, 8)}, "out": {"kernel": f(8)}}, "key/kernel", "in heads dim"),
        # torch's names
        ({"features.0.weight": f(64, 3, 5, 5), "features.0.bias": f(64)},
         "features.0.weight", "out in spatial spatial"),
        ({"features": {"0": {"weight": f(6, 8, 3, 3), "bias": f(6)}}},
         "features/0/weight", "out in spatial spatial"),
        ({"up": {"0": {"weight": f(6, 8, 3, 3), "bias": f(8)}}},
         "up/0/weight", "in out spatial spatial"),
        ({"features": {"0": {"weight": f(6, 8, 3, 3)}}}, "features/0/weight", "? ? ? ?"),
        ({"m": {"weight": f(6, 8, 3), "bias": f(6)}}, "m/weight", "? ? ?"),  # torch's Bilinear too
        ({"up.0.weight": f(64, 3, 5, 5), "up.0.bias": f(3)},
         "up.0.weight", "in out spatial spatial"),
        ({"up.0.weight": f(64, 32, 5, 5), "up.0.bias": f(64)}, "up.0.weight", "? ? ? ?"),
        ({"up.0.weight": f(64, 32, 5, 5)}, "up.0.weight", "? ? ? ?"),
        ({"vit.patch_embeddings.projection.weight": f(768, 3, 16, 16),
          "vit.patch_embeddings.projection.bias": f(768)},
         "vit.patch_embeddings.projection.weight", "out in spatial spatial"),
        ({"patch_embedding.weight": f(8, 3, 2, 4, 4)},
         "patch_embedding.weight", "out in spatial spatial spatial"),
        ({"fc.weight": f(3, 4)}, "fc.weight", "out in"),
        ({"shared.weight": f(9, 4)}, "shared.weight", "? ?"),
        (GPT2, "h.0.attn.c_attn.weight", "in out"),
        (GPT2, "h.0.attn.c_proj.weight", "in out"),
        (NANO, "h.0.attn.c_proj.weight", "out in"),
        ({"h.0.attn.c_proj.weight": f(4, 4)}, "h.0.attn.c_proj.weight", "? ?"),
        ({"gpt2.h.0.attn.c_proj.weight": f(4, 4)}, "gpt2.h.0.attn.c_proj.weight", "in out"),
        # functional code: x @ weight + bias
        ({"l": {"weight": f(4, 3), "bias": f(3)}}, "l/weight", "in out"),
        ({"l": {"weight": f(4, 3), "bias": f(3)}, "m": {"weight": f(3, 3), "bias": f(3)}},
         "m/weight", "? ?"),
    ],
)  # fmt: skip
def test_what_the_tree_tells(tree, path, expected):
    assert names(tree, path) == expected


def test_roles_in_files_of_hugging_face():
    """A convolution is no embedding, whatever its name, and a mask of attention no bias."""
    tree = {"h.0.attn.bias": f(1, 1, 8, 8), "h.0.attn.c_attn.bias": f(12),
            "h.0.attn.c_attn.weight": f(4, 12), "wpe.weight": f(8, 4),
            "vision.patch_embedding.weight": f(8, 3, 4, 4)}  # fmt: skip
    assert list(fwt.select(tree, fwt.biases)) == ["h.0.attn.c_attn.bias"]
    assert set(fwt.select(tree, fwt.kernels)) == {
        "h.0.attn.c_attn.weight", "vision.patch_embedding.weight"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("module", "shape", "expected"),
    [
        (Scanned(Dense(bias=False)), (2, 5), "stack in out"),
        (Scanned(Dense(bias=False), 1), (2, 5), "in stack out"),
        (Scanned(Dense()), (2, 5), "stack in out"),
    ],
)
def test_a_linen_module_is_traced(module, shape, expected):
    assert names(fwt.Model(module, variables(module, *shape)), "layers/up/kernel") == expected


def test_a_linen_module_is_traced_once(monkeypatch):
    module = Scanned(Dense(bias=False))
    model = fwt.Model(module, variables(module, 2, 5))
    first = names(model, "layers/up/kernel")
    monkeypatch.setattr(_modules, "_inputs", lambda *a: pytest.fail("traced again"))
    assert names(model, "layers/up/kernel") == first == "stack in out"


@pytest.mark.parametrize(
    "leaves",
    [
        {f"l{i}": {f"a{j}": {"kernel": f(4, 8, 8)} for j in range(10)} for i in range(80)},
        {f"layers.{i}.mlp.weight": f(8, 8) for i in range(800)},
    ],
)
def test_a_leaf_costs_the_same_in_a_large_tree(leaves, monkeypatch):
    calls = [0]
    beside = _rules.Rules._beside

    def counted(*args):
        calls[0] += 1
        return beside(*args)

    monkeypatch.setattr(_rules.Rules, "_beside", counted)
    places = _axes.Places(_tree.Tree({"m": leaves}))
    for path in places.shapes:
        places(path)
    assert calls[0] < 30 * len(places.shapes)


def test_a_lifted_layer_of_a_sequential():
    many = nn.vmap(nn.Dense, {"params": 0}, {"params": True}, in_axes=None, axis_size=3)
    net = fwt.Sequential([("d", many(4, use_bias=False))], input_shape=(7,))
    assert names(fwt.Model(net, variables(net, 1, 7)), "d/kernel") == "stack in out"
    experts = nn.DenseGeneral(5, axis=-1, batch_dims=(0,), use_bias=True)
    net = fwt.Sequential([("e", experts)])
    model = fwt.Model(net, variables(net, 3, 2, 4))
    assert names(model, "e/kernel") == "stack in out"
    assert names(model, "e/bias") == "stack out"


def test_the_layers_of_an_ensemble():
    net = fwt.Sequential([("c", nn.Conv(4, (3, 2))), ("d", nn.Dense(5))])
    init = jax.vmap(lambda key: net.init(key, jnp.ones((1, 4, 4, 3))))
    each = jax.eval_shape(init, jax.random.split(KEY, 7))
    model = fwt.Model(net, each)
    assert names(model, "c/kernel") == "stack k k in out"
    assert names(model, "c/bias") == "stack out"
    assert names(model, "d/kernel") == "stack in out"


class Net(eqx.Module):
    tok: eqx.nn.Embedding
    embed: eqx.nn.Linear
    conv: eqx.nn.Conv2d
    up: eqx.nn.ConvTranspose1d
    ln: eqx.nn.LayerNorm
    gru: eqx.nn.GRUCell
    heads: eqx.nn.MultiheadAttention

    def __init__(self):
        self.tok = eqx.nn.Embedding(9, 4, key=KEY)
        self.embed = eqx.nn.Linear(4, 3, key=KEY)
        self.conv = eqx.nn.Conv2d(4, 6, 3, groups=2, key=KEY)
        self.up = eqx.nn.ConvTranspose1d(4, 6, 3, key=KEY)
        self.ln = eqx.nn.LayerNorm((2, 4))
        self.gru = eqx.nn.GRUCell(3, 4, key=KEY)
        self.heads = eqx.nn.MultiheadAttention(2, 4, key=KEY)


class NNX(nnx.Module):
    def __init__(self, rngs):
        self.tok = nnx.Embed(9, 4, rngs=rngs)
        self.embed = nnx.LoRALinear(4, 3, lora_rank=2, rngs=rngs)
        self.a = nnx.Conv(4, 6, (3,), rngs=rngs)
        self.up = nnx.ConvTranspose(4, 6, (3,), transpose_kernel=True, rngs=rngs)
        self.e = nnx.Einsum("nta,hab->nthb", (8, 2, 4), (8, 4), rngs=rngs)
        self.g = nnx.LinearGeneral((3, 2), 5, axis=(-2, -1), rngs=rngs)
        self.many = nnx.LinearGeneral(3, 5, batch_axis={0: 2}, rngs=rngs)
        self.heads = nnx.MultiHeadAttention(2, 4, 6, rngs=rngs, decode=False)
        self.bn = nnx.BatchNorm(4, rngs=rngs)


@pytest.mark.parametrize(
    ("make", "kernels", "expected"),
    [
        (Net, 9, {
            "tok/weight": "? ?", "embed/weight": "out in", "conv/weight": "out in spatial spatial",
            "conv/bias": "out out out", "up/weight": "out in spatial", "ln/weight": "out out",
            "gru/weight_ih": "out in", "heads/query_proj/weight": "out in",
        }),
        (lambda: NNX(nnx.Rngs(0)), 10, {
            "tok/embedding": "? ?", "embed/kernel": "in out", "embed/lora/lora_a": "in out",
            "a/kernel": "spatial in out", "up/kernel": "spatial out in",
            "e/kernel": "out in out", "e/bias": "? ?", "g/kernel": "in in out",
            "many/kernel": "stack in out", "many/bias": "stack out",
            "heads/query/kernel": "in heads dim", "heads/out/kernel": "heads dim out",
        }),
        (lambda: eqx.filter_vmap(lambda k: eqx.nn.MLP(3, 2, 4, 1, use_bias=False, key=k))(
            jax.random.split(KEY, 5)), 2, {"layers/0/weight": "stack out in"}),
        (lambda: nnx.vmap(lambda k: nnx.Linear(3, 4, use_bias=False, rngs=nnx.Rngs(k)))(
            jax.random.split(KEY, 5)), 1, {"kernel": "stack in out"}),
    ],
)  # fmt: skip
def test_what_classes_tell(make, kernels, expected):
    model = make()
    assert {path: names(model, path) for path in expected} == expected
    found = fwt.select(model, fwt.kernels)
    assert len(found) == kernels
    assert not any("tok" in path for path in found)
    if "embed/weight" in found:  # a Linear, whatever its name
        new = fwt.select(fwt.reset(0, like="keras", where="embed/*")(model), "embed/weight")
        assert np.abs(new["embed/weight"]).max() > 0.4


def test_the_units_of_an_equinox_convolution():
    conv = eqx.nn.Conv2d(3, 6, 2, key=KEY)
    dead = fwt.prune(0.5, pattern=P.channel)(conv)
    out = eqx.tree_at(lambda m: m.bias, dead, jnp.zeros_like(conv.bias))(jnp.ones((3, 4, 4)))
    assert int((out == 0).all((1, 2)).sum()) == 3


# -- axes= ------------------------------------------------------------------------------------

TREE = {"layers": {"a": {"kernel": f(3, 4, 5), "bias": f(3, 5)}}, "head": {"kernel": f(5, 2)}}


@pytest.mark.parametrize(
    ("axes", "path", "expected"),
    [
        ({"layers/**": "stack out in"}, "layers/a/kernel", "stack out in"),
        ({"layers/**": "stack out in"}, "layers/a/bias", "stack out"),
        ({"**": "stack in out"}, "head/kernel", "in out"),
        ({"**/kernel": "out in", "**": "k in out"}, "layers/a/kernel", "k in out"),
        ({"head/*": "out in", "**": "in out"}, "head/kernel", "out in"),
        ({"**": "in out", "head/*": "out in"}, "head/kernel", "in out"),
        ({"**": "in heads dim"}, "layers/a/kernel", "in heads dim"),
        ({"**": "in stack out"}, "layers/a/kernel", "in stack out"),
    ],
)
def test_the_first_glob_that_fits(axes, path, expected):
    assert names(TREE, path, axes) == expected


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        ({"**": "layer in out"}, "'layer' may mean several"),
        ({"**": "batch out in"}, "'batch'"),
        ({"**": "experts h out"}, "'experts'"),
        ({"**": "foo in out"}, "'foo'"),
        ({"**": "stack h w"}, "neither 'in' nor 'out'"),
        ({"**": "stack stack in out h w"}, "names 6 axes"),
        ({"other": "in out"}, "matches no leaf"),
    ],
)
def test_axes_that_are_refused(axes, said):
    tree = jax.tree.map(lambda x: jnp.ones(x.shape), TREE)
    for transform in (
        fwt.initialize(fwt.initializers.he_normal, 0, axes=axes),
        fwt.project(C.unit_norm, axes=axes),
        fwt.prune(0.5, axes=axes),
        fwt.reset(0, like="flax", axes=axes),
    ):
        with pytest.raises(fwt.AxesError, match=said):
            transform(tree)


def test_what_depends_on_unknown_axes_is_refused():
    tree = {"w": {"kernel": jnp.ones((3, 4, 5))}}
    for transform in (
        fwt.initialize(fwt.initializers.orthogonal(), 0),
        fwt.project(C.unit_norm),
        fwt.prune(0.5, pattern=P.channel),
        fwt.reset(0, like="keras"),
    ):
        with pytest.raises(fwt.AxesError, match=r"w/kernel.*axes="):
            transform(tree)
    assert int((fwt.prune(0.5)(tree)["w"]["kernel"] == 0).sum()) == 30
    with pytest.raises(fwt.AxesError, match="names 2 axes"):
        C.unit_norm()(jnp.ones((3, 4, 5)), "in out")


def test_a_numbered_axis_must_not_mix_the_layers_of_a_stack():
    tree = {"d": {"kernel": 3 + jnp.arange(72.0).reshape(3, 4, 6), "bias": jnp.ones((3, 6))}}
    for constraint in (C.max_norm(1.0, axis=0), C.l1_ball(axis=(-3, -2)), C.zero_mean(axis=0)):
        with pytest.raises(fwt.AxesError, match=r"d/kernel.*stack of layers along axis 0.*axis=-2"):
            fwt.project(constraint)(tree)
    norms = jnp.linalg.norm(fwt.project(C.unit_norm(axis=-2))(tree)["d"]["kernel"], axis=1)
    np.testing.assert_allclose(norms, 1, rtol=1e-5)


# -- each slice is a layer --------------------------------------------------------------------

SLICES = 3
_RNG = np.random.default_rng(0)
_SCALES = np.array([1.0, 8.0, 0.1], np.float32).reshape(3, 1, 1)
STACK = {"d": {"kernel": _RNG.normal(size=(3, 6, 9)).astype(np.float32) * _SCALES,
               "bias": _RNG.normal(size=(3, 9)).astype(np.float32)}}  # fmt: skip


def leaf(tree):
    return np.asarray(tree["d"]["kernel"])


def by_slice(transform):
    slices = [jax.tree.map(lambda x, i=i: x[i], STACK) for i in range(SLICES)]
    return np.stack([leaf(transform(s)) for s in slices])


@pytest.mark.parametrize(
    "transform",
    [
        fwt.project(C.unit_norm),
        fwt.project(C.max_norm(1.0, axis="all")),
        fwt.project(C.spectral_ball(1.0)),
        pytest.param(fwt.project(C.k_sparse(2)), marks=pytest.mark.thorough),
        pytest.param(fwt.project(C.simplex(1.0)), marks=pytest.mark.thorough),
        fwt.project(C.box(-1.0, 1.0)),
        fwt.project(lambda w, axes: w / jnp.abs(w).max()),
        fwt.prune(0.37),
        pytest.param(fwt.prune(0.5, like="torch"), marks=pytest.mark.thorough),
        pytest.param(fwt.prune(scope={"**": 0.6}, like="tfmot"), marks=pytest.mark.thorough),
        fwt.prune(0.4, pattern=P.channel),
        pytest.param(fwt.prune(0.5, pattern=P.block((3, 3))), marks=pytest.mark.thorough),
        fwt.prune(0.5, pattern=P.n_m(1, 3)),
    ],
)
def test_each_slice_is_transformed_by_itself(transform):
    expected = by_slice(transform)  # norms of a slice outside jit are NumPy's
    np.testing.assert_allclose(leaf(transform(STACK)), expected, rtol=4e-7, atol=0)


@pytest.mark.parametrize(
    "scope",
    [
        "global",
        "erk",
        *(pytest.param(s, marks=pytest.mark.thorough) for s in ("normalized", "lamp")),
    ],
)
def test_slices_count_as_layers_do(scope):
    layers = {f"d{i}": {"kernel": STACK["d"]["kernel"][i]} for i in range(SLICES)}
    prune = fwt.prune(0.43, scope=scope)
    expected = prune(layers)
    for found in (prune(STACK), *([jax.jit(prune)(STACK)] if scope in ("erk", "lamp") else [])):
        for i in range(SLICES):
            np.testing.assert_array_equal(leaf(found)[i], expected[f"d{i}"]["kernel"])


def test_a_stack_may_have_any_place():
    turned = {"d": {"kernel": np.moveaxis(STACK["d"]["kernel"], 0, 1)}}
    axes = {"**": "in stack out"}
    for make in (lambda **k: fwt.prune(0.37, **k), lambda **k: fwt.project(C.orthogonal(), **k)):
        new = np.moveaxis(leaf(make(axes=axes)(turned)), 1, 0)
        np.testing.assert_allclose(new, by_slice(make()), rtol=1e-5, atol=1e-6)
    drawn = leaf(fwt.initialize(fwt.initializers.orthogonal(), 0, axes=axes)(turned))
    np.testing.assert_allclose(
        np.einsum("isj,ksj->sik", drawn, drawn), np.stack([np.eye(6)] * 3), atol=1e-5
    )


@pytest.mark.parametrize(
    "initializer",
    [
        fwt.initializers.glorot_uniform,
        fwt.initializers.keras.glorot_uniform,
        fwt.initializers.torch.xavier_uniform,
        jax.nn.initializers.glorot_uniform(),
        lambda key, shape, dtype: jax.nn.initializers.glorot_uniform()(key, shape, dtype),
    ],
)
def test_each_slice_has_the_fans_of_its_layer(initializer):
    big = {"d": {"kernel": f(4, 30, 70), "bias": f(4, 70)}}
    w = leaf(fwt.initialize(initializer, 0)(big))
    limit = (6 / (30 + 70)) ** 0.5
    assert 0.99 * limit < np.abs(w).max((1, 2)).min()
    assert np.abs(w).max() <= limit
    assert len(np.unique(w)) > 0.99 * w.size  # no slice repeats another


def test_an_initializer_is_drawn_whole_only_where_it_says_so():
    def _normal(key, shape, dtype, axes):  # named as one that needs no fans
        return jnp.full(shape, 1.0 / axes.fans("keras")[0], dtype)

    drawn = leaf(
        fwt.initialize(initializers.bound(_normal), 0)(
            {"d": {"kernel": f(3, 6, 9), "bias": f(3, 9)}}
        )
    )
    np.testing.assert_allclose(drawn, 1 / 6)


@pytest.mark.parametrize("name", ["he_normal", "orthogonal"])
def test_jaxs_own_are_drawn_wide_for_a_stack_in_half_precision(name):
    stack = {"d": {"kernel": jax.ShapeDtypeStruct((3, 40, 40), jnp.bfloat16), "bias": f(3, 40)}}
    w = leaf(fwt.initialize(getattr(jax.nn.initializers, name)(), 0)(stack))
    assert w.dtype == jnp.bfloat16
    assert (w == 0).sum() < 3
    assert len(np.unique(w)) > 500

    def own(key, shape, dtype):
        return jax.nn.initializers.orthogonal()(key, shape, dtype)

    with pytest.raises(fwt.LeafError, match="d/kernel: no bfloat16"):
        fwt.initialize(own, 0)(stack)


@pytest.mark.parametrize("like", ["keras", "torch", "flax"])
def test_reset_of_a_stack(like):
    big = {"d": {"kernel": f(4, 30, 70), "bias": f(4, 70)}, "e": {"scale": f(4, 70)}}
    new = fwt.reset(0, like=like)(big)
    one = fwt.reset(1, like=like)(jax.tree.map(lambda x: f(*x.shape[1:]), big))
    close = np.asarray(leaf(new)).std((1, 2)) / leaf(one).std()
    assert (abs(close - 1) < 0.1).all()
    top = np.abs(new["d"]["bias"]).max(1), np.abs(one["d"]["bias"]).max()
    assert (abs(top[0] - top[1]) <= 0.1 * top[1]).all()
    assert (new["e"]["scale"] == 1).all()


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"regrow": "rigl"}, marks=pytest.mark.thorough),
        pytest.param({}, marks=pytest.mark.thorough),
        pytest.param({"scope": "erk", "regrow": "rigl"}, marks=pytest.mark.thorough),
    ],
)
def test_sparsify_counts_each_slice(settings):
    grads = jax.tree.map(np.cos, STACK)
    tx = fwt.optim.sparsify(optax.sgd(0.01), 0.5, every=1, **settings)
    updates, _ = tx.update(grads, tx.init(STACK), STACK)
    new = leaf(optax.apply_updates(STACK, updates))
    assert ((new == 0).sum((1, 2)) == 27).all()


@pytest.mark.thorough
def test_a_stack_of_many_layers_compiles_one_search():
    def prune(w):
        return fwt.prune(0.5, axes={"**": "stack in out"})({"d": {"kernel": w}})["d"]["kernel"]

    assert (
        (np.asarray(prune(jnp.asarray(_RNG.normal(size=(50, 4, 5))))) == 0).sum((1, 2)) == 10
    ).all()
    few, many = (len(jax.jit(prune).lower(f(n, 4, 5)).as_text()) for n in (2, 50))
    assert many < 2 * few


def test_lsuv_refuses_a_stack():
    net = Scanned(Dense())
    with pytest.raises(fwt.LeafError, match="stack of layers"):
        fwt.lsuv(net, net.init(KEY, jnp.ones((2, 5))), jnp.ones((2, 5)), 0)


def test_constrain_takes_an_equinox_module_that_holds_a_function():
    net = eqx.nn.MLP(3, 2, 4, 1, key=KEY)
    grads = eqx.filter_grad(lambda m: jnp.sum(m(jnp.ones(3)) ** 2))(net)
    tx = fwt.optim.constrain(optax.adam(0.1), fwt.project(C.max_norm(0.1)))
    updates, _ = tx.update(grads, tx.init(eqx.filter(net, eqx.is_inexact_array)), net)
    new = eqx.apply_updates(net, updates)
    assert np.linalg.norm(new.layers[0].weight, axis=1).max() <= 0.1 + 1e-6


class _Bare(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Conv(6, (3,), use_bias=False)(x), None


class _Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        scan = nn.scan(_Bare, variable_axes={"params": 0}, split_rngs={"params": True}, length=4)
        return scan(name="l")(x, None)[0]


def test_the_module_tells_what_the_tree_does_not():
    """Convolutions without biases in a scan, and a DenseGeneral over two axes: by shape alone each
    is one convolution."""
    x = jnp.ones((2, 8, 6))
    model = fwt.Model(_Scanned(), _Scanned().init(jax.random.key(0), x))
    (path,) = fwt.paths(model)
    assert _axes.Places(_tree.Tree(model))(path).names == ("stack", "k", "in", "out")
    scale = 10.0 ** np.arange(4).reshape(4, 1, 1, 1)
    scaled = fwt.assign({path: fwt.select(model)[path] * scale.astype(np.float32)})(model)
    zeros = (fwt.select(fwt.prune(0.5)(scaled))[path] == 0).mean((1, 2, 3))
    np.testing.assert_array_equal(zeros, 0.5)
    general = nn.DenseGeneral(16, axis=(-2, -1))
    model = fwt.Model(general, general.init(jax.random.key(0), x))
    assert _axes.Places(_tree.Tree(model))("kernel").names == ("in", "in", "out")


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_class_of_a_layer_tells_which_axis_is_a_stack(axis):
    @nnx.vmap(in_axes=0, out_axes=axis)
    def kernels(key):
        return nnx.Linear(50, 7, use_bias=False, rngs=nnx.Rngs(key))

    stack = kernels(jax.random.split(jax.random.key(0), 4))
    assert stack.kernel[...].shape == tuple(np.insert([50, 7], axis, 4))
    pruned = np.moveaxis(np.asarray(fwt.prune(0.45)(stack).kernel[...]), axis, 0)
    assert [int((w == 0).sum()) for w in pruned] == [round(0.45 * 350)] * 4
    drawn = fwt.initialize(fwt.initializers.lecun_normal, key=0)(stack).kernel[...]
    assert float(drawn.std()) == pytest.approx(50**-0.5, rel=0.1)
    unit = fwt.project(fwt.constraints.unit_norm)(stack).kernel[...]
    norms = np.linalg.norm(np.moveaxis(np.asarray(unit), axis, 0), axis=1)
    np.testing.assert_allclose(norms, 1, rtol=1e-5)


def test_a_stack_of_as_many_layers_as_features_is_not_guessed():
    @nnx.vmap(in_axes=0, out_axes=1)
    def kernels(key):
        return nnx.Linear(5, 5, use_bias=False, rngs=nnx.Rngs(key))

    stack = kernels(jax.random.split(jax.random.key(0), 5))
    with pytest.raises(fwt.FwtError, match="kernel of shape"):
        fwt.initialize(fwt.initializers.lecun_normal, key=0)(stack)


def _apart(make, count, axis):
    """A stack of layers as ``nnx.vmap`` makes it, beside the name of a convolution."""
    keys = jax.random.split(KEY, count)
    return {"conv": nnx.vmap(make, in_axes=0, out_axes=axis)(keys)}


class _Convs(nn.Module):
    layers: int

    @nn.compact
    def __call__(self, x):
        axes, rngs = {"params": 0}, {"params": True}
        scan = nn.scan(_OneConv, axes, split_rngs=rngs, length=self.layers)
        return scan(name="all")(x, None)[0]


class _OneConv(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Conv(4, (3,), use_bias=False, name="conv")(x), None


def _convs(layers):
    module = _Convs(layers)
    return fwt.Model(module, module.init(KEY, jnp.ones((2, 7, 4))))


def _either():
    """A stack of dense layers, or one DenseGeneral."""
    kernel = np.random.default_rng(0).normal(size=(5, 5, 5)).astype("f")
    return {"a": {"kernel": kernel, "bias": np.ones((5, 5), "f")}}


def _bare(key):
    return nnx.Linear(5, 5, use_bias=False, rngs=nnx.Rngs(key))


def _conv(key):
    return nnx.Conv(4, 8, (3,), use_bias=False, rngs=nnx.Rngs(key))


def test_a_scan_along_another_axis_is_no_stack_along_the_first():
    """The bias of a dense layer has the size of its outputs, which are the last axis."""
    kernel, bias = np.ones((6, 4, 6), np.float32), np.ones((6, 4), np.float32)
    tree = {"scan": {"d": {"kernel": kernel, "bias": bias}, "norm": {"scale": bias, "bias": bias}}}
    for t in (fwt.project(fwt.constraints.unit_norm), fwt.prune(0.5, pattern=fwt.patterns.channel),
              fwt.initialize(fwt.initializers.orthogonal, key=0)):  # fmt: skip
        with pytest.raises(fwt.AxesError, match="stack in out"):
            t(tree)
    new = fwt.project(fwt.constraints.unit_norm, axes={"**/kernel": "in stack out"})(tree)
    norms = np.linalg.norm(fwt.select(new)["scan/d/kernel"], axis=0)
    np.testing.assert_allclose(norms, 1, rtol=1e-6)


DOUBTED = [
    (lambda: _apart(_bare, 5, 0), "stack in out"),
    (lambda: _apart(_bare, 5, 2), "in out stack"),
    (lambda: _apart(lambda k: nnx.Linear(5, 5, rngs=nnx.Rngs(k)), 5, 1), "in stack out"),
    # By its shape it is a convolution of two dimensions, and by its class of one.
    (lambda: _apart(_conv, 3, 0), "stack k in out"),
    (lambda: _apart(lambda k: nnx.LinearGeneral((2, 3), (3, 4), axis=(-2, -1), use_bias=False,
        rngs=nnx.Rngs(k)), 3, 1), "in stack in out out"),
    (lambda: eqx.filter_vmap(lambda k: eqx.nn.Linear(4, 4, use_bias=False, key=k))(
        jax.random.split(KEY, 4)), "stack out in"),
    (lambda: eqx.filter_vmap(lambda k: eqx.nn.Conv1d(4, 4, 3, use_bias=False, key=k))(
        jax.random.split(KEY, 4)), "stack out in k"),
    (lambda: _convs(3), "stack k in out"),
    (lambda: eqx.filter_vmap(lambda k: eqx.nn.Linear(4, 4, key=k), out_axes=1)(
        jax.random.split(KEY, 4)), "out stack in"),
    (lambda: _either(), "stack in out"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "axes"), DOUBTED)
def test_what_may_be_a_stack_in_several_ways_is_no_layer(make, axes):
    """Whatever counts or sums by layer refuses it; what does not depend on layers goes on."""
    tree = make()
    (path,) = (p for p in fwt.paths(tree) if not p.endswith("bias"))
    refused = [
        fwt.prune(0.5),
        jax.jit(fwt.prune(0.5)) if not isinstance(tree, fwt.Model) else fwt.prune(0.5),
        fwt.prune(0.5, scope="erk"),
        fwt.prune(0.5, scope="lamp"),
        fwt.prune(0.5, scope="normalized"),
        fwt.prune(scope={"**": 0.5}),
        fwt.masks(0.5),
        fwt.project(fwt.constraints.unit_norm),
        fwt.project(fwt.constraints.max_norm(1.0, axis="all")),
        fwt.project(lambda leaf, axes: leaf / 2),
        fwt.initialize(fwt.initializers.lecun_normal, key=0),
        fwt.reset(0, like="flax", where=path),
    ]
    for transform in refused:
        with pytest.raises(fwt.AxesError, match="may be a stack of layers in several ways"):
            transform(tree)
    pruned = fwt.select(fwt.prune(0.5, scope="global")(tree))[path]
    assert int((pruned == 0).sum()) == round(pruned.size / 2)
    fwt.prune(threshold=0.1)(tree)
    fwt.project(fwt.constraints.box(-0.1, 0.1))(tree)

    pruned = np.asarray(fwt.select(fwt.prune(0.25, axes={path: axes})(tree))[path])
    stack = axes.split().index("stack")
    size = pruned.size // pruned.shape[stack]
    zeros = (np.moveaxis(pruned, stack, 0) == 0).reshape(pruned.shape[stack], size).sum(1)
    np.testing.assert_array_equal(zeros, round(size / 4))


class _Normed(nnx.Module):
    def __init__(self, key, outputs):
        rngs = nnx.Rngs(key)
        self.norm = nnx.LayerNorm(5, rngs=rngs)
        self.square = nnx.Linear(5, 5, use_bias=False, rngs=rngs)
        self.last = nnx.Linear(5, outputs, rngs=rngs)


@pytest.mark.parametrize(("outputs", "axis", "told"), [(5, 1, False), (7, 1, False), (7, 0, True)])
def test_what_fits_in_one_way_tells_of_stacks_beside_it(outputs, axis, told):
    """But not of one that may be along another axis than the first."""
    make = nnx.vmap(lambda k: _Normed(k, outputs), in_axes=0, out_axes=axis)
    stack, prune = make(jax.random.split(KEY, 5)), fwt.prune(0.4, where="square/kernel")
    if not told:
        with pytest.raises(fwt.AxesError, match="in several ways"):
            prune(stack)
        return
    kernel = np.asarray(fwt.select(prune(stack))["square/kernel"])
    np.testing.assert_array_equal((kernel == 0).sum((1, 2)), 10)


@pytest.mark.parametrize(
    ("kernel", "bias", "layers"),
    [((16, 4, 8), (4, 8), 1), ((16, 3, 4, 8), (3, 4, 8), 1), ((16, 8, 32), (8, 32), 1),
     ((4, 24), (1, 24), 1), ((5, 6, 7), (9, 2), 1), ((6, 16, 4, 8), (6, 4, 8), 6)],
)  # fmt: skip
def test_a_bias_that_fits_in_one_way_leaves_no_doubt(kernel, bias, layers):
    """One DenseGeneral, or a stack of them; and what fits in no way is one layer."""
    draw = np.random.default_rng(0).normal
    tree = {"x": {"kernel": draw(size=kernel).astype("f"), "bias": draw(size=bias).astype("f")}}
    zeros = np.asarray(fwt.prune(0.5)(tree)["x"]["kernel"]).reshape(layers, -1) == 0
    np.testing.assert_array_equal(zeros.sum(1), zeros.shape[1] / 2)


def test_an_optimizer_refuses_what_may_be_a_stack_in_several_ways():
    params = _either()
    tx = fwt.optim.sparsify(optax.sgd(0.1), 0.5)
    with pytest.raises(fwt.AxesError, match="in several ways"):
        tx.update(params, tx.init(params), params)


GENERAL = ((2, 3), (4, 7))
OWN_AXES = [
    (lambda k: nnx.ConvTranspose(4, 8, (3,), use_bias=False, rngs=nnx.Rngs(k)), "kernel"),
    (lambda k: nnx.LinearGeneral(*GENERAL, axis=(-2, -1), rngs=nnx.Rngs(k)), "kernel"),
    (lambda k: nnx.LinearGeneral(3, 7, batch_axis={0: 6}, rngs=nnx.Rngs(k)), "kernel"),
    (lambda k: nnx.Einsum("ab,bc->ac", (6, 7), rngs=nnx.Rngs(k)), "kernel"),
    (lambda k: nnx.LoRA(6, 2, 7, rngs=nnx.Rngs(k)), "lora_a"),
    (lambda k: eqx.nn.GRUCell(4, 6, key=k), "weight_ih"),
    (lambda k: eqx.nn.LSTMCell(4, 6, key=k), "weight_hh"),
    (lambda k: eqx.nn.ConvTranspose2d(4, 6, (3, 2), groups=2, key=k), "weight"),
]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("make", "leaf"), OWN_AXES)
def test_a_stack_is_found_wherever_it_stands(make, leaf, axis):
    keys = jax.random.split(KEY, 5)
    one = make(KEY)
    several = nnx.vmap if isinstance(one, nnx.Module) else eqx.filter_vmap
    stack = several(make, in_axes=0, out_axes=axis)(keys)

    def made(tree):
        return np.asarray(fwt.select(tree)[leaf])

    shape = made(one).shape
    assert made(stack).shape == tuple(np.insert(shape, axis, 5))
    unit = fwt.project(fwt.constraints.unit_norm, where=leaf)
    rows = np.moveaxis(made(unit(stack)), axis, 0)
    for row, was in zip(rows, np.moveaxis(made(stack), axis, 0), strict=True):
        alone = unit(fwt.assign({leaf: jnp.asarray(was)})(one))
        np.testing.assert_allclose(row, made(alone), rtol=1e-5, atol=1e-7)
    sparse = np.moveaxis(made(fwt.prune(0.5, where=leaf)(stack)), axis, 0)
    if not getattr(one, "batch_axis", None):
        zeros = (sparse == 0).reshape(5, -1).sum(1)
        np.testing.assert_array_equal(zeros, round(sparse[0].size / 2))


@pytest.mark.parametrize("axis", [0, 1])
def test_a_stack_of_tables_is_found_wherever_it_stands(axis):
    make = nnx.vmap(lambda k: nnx.Embed(6, 7, rngs=nnx.Rngs(k)), in_axes=0, out_axes=axis)
    sparse = fwt.prune(0.5, where="embedding")(make(jax.random.split(KEY, 5)))
    zeros = np.moveaxis(np.asarray(fwt.select(sparse)["embedding"]), axis, 0) == 0
    np.testing.assert_array_equal(zeros.sum((1, 2)), 21)


def test_axes_speak_of_the_leaves_that_they_name():
    """A kernel that is said to be a stack makes none of a convolution beside it."""
    rng = np.random.default_rng(0)
    scan, conv = (rng.normal(size=s).astype("f") for s in ((3, 16, 16), (3, 3, 8, 16)))
    tree = {"stem": {"scan": {"kernel": scan}, "conv": {"kernel": conv}}}
    axes = {"stem/scan/kernel": "stack in out"}
    new = fwt.project(fwt.constraints.max_norm(1.0), axes=axes)(tree)["stem"]
    assert np.linalg.norm(new["conv"]["kernel"].reshape(-1, 16), axis=0).max() < 1.0001
    norms = np.linalg.norm(new["scan"]["kernel"], axis=1)
    np.testing.assert_allclose(norms, 1, atol=1e-4)
