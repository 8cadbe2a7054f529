"""Attention and products of several tensors, and tables that layers share, in every direction."""

import jax
import keras
import numpy as np
import pytest
import torch
from cases import randomise_keras
from marks import thorough_but
from torch_nets import Net

import fwt
from fwt import converters

L = keras.layers
A, B, C = (5, 6), (4, 6), (4, 7)  # shapes of queries, keys and values
OPERATION = ("dot", "einsum", "kernel", "products")  # which Keras can't read in an .h5 file


def heads(*shapes, **how):
    """MultiHeadAttention of inputs of these shapes."""
    causal = how.pop("causal", False)
    return lambda *xs: L.MultiHeadAttention(2, 3, name="layer", **how)(
        *(xs if len(xs) > 1 else xs * 2), use_causal_mask=causal
    ), shapes  # fmt: skip


def shared(causal, *shapes, **how):
    layer = lambda: L.GroupQueryAttention(3, 6, 2, name="layer", **how)  # noqa: E731
    return lambda *xs: layer()(xs[0], xs[-1], use_causal_mask=causal), shapes


def scored(kind, causal, *shapes, **how):
    layer = lambda: getattr(L, kind)(name="layer", **how)  # noqa: E731
    return lambda *xs: layer()(list(xs) if len(xs) > 1 else [*xs, *xs],
                               use_causal_mask=causal), shapes  # fmt: skip


def dot(axes, normalize, *shapes):
    return lambda *xs: L.Dot(axes, normalize=normalize, name="layer")(list(xs)), shapes


def tied(again, **how):
    """A table that is looked up, and what undoes it ``again`` times."""

    def make(x):
        table = L.ReversibleEmbedding(7, 6, name="table", **how)
        dense = L.Dense(6, name="dense")
        first = dense(table(x))
        outs = [table(h, reverse=True) for h in (first, dense(first))[:again]]
        return [*outs, table(x)] if again != 1 else outs[0]

    return make, [(5,)]


NETS = {
    "tied": tied(1),
    "causal": heads(A, causal=True),
    "scored": scored("Attention", True, A, B, use_scale=True, dropout=0.3),
    "groups": shared(True, A, B, use_bias=False),
    "dot": dot((1, 2), True, A, (4, 5)),
    "heads": heads(A),
    "wide": heads(A, C, value_dim=5, output_shape=4),
    "wide causal": heads(A, value_dim=5, causal=True),
    "wider": heads(A, output_shape=5, causal=True),
    "three": heads(A, C, (4, 2)),
    "cross": heads(A, B, causal=True, use_bias=False),
    "groups of one": shared(False, A),
    "one": scored("Attention", False, A),
    "qvk": scored("Attention", False, A, (4, 3), B),
    "concat": scored("Attention", True, A, B, score_mode="concat"),
    "concat scaled": scored("Attention", False, A, B, score_mode="concat", use_scale=True),
    "additive": scored("AdditiveAttention", False, A, B),
    "additive plain": scored("AdditiveAttention", True, A, (4, 2), B, use_scale=False),
    "dot of vectors": dot(1, True, (6,), (6,)),
    "dot of ranks": dot((3, -2), False, (3, 5, 6), (6, 5)),
    "dot of a vector": dot((2, 1), False, A, (6,)),
    "einsum": (lambda x, y: keras.ops.einsum("bijk,bkl->bjil", x, y), [(3, 5, 6), (6, 2)]),
    "products": (
        lambda q, k: keras.ops.dot_product_attention(q, k, k, scale=0.3, is_causal=True),
        [(5, 4, 3), (6, 2, 3)],
    ),
    "kernel": (lambda x, y: keras.ops.matmul(x, y), [(5, 4, 3), (5, 3, 2)]),
    "tied twice": tied(2, logit_soft_cap=3.0),
    "untied": tied(2, logit_soft_cap=3.0, tie_weights=False),
    "looked up": tied(0),
}


def flat(given):
    return [np.asarray(v) for v in (given if isinstance(given, list | tuple) else [given])]


def close(found, expected):
    found = flat(found)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max())


# Keras on JAX, on which the thorough run is, can't call attention with values of another size.
QUICK = ("tied", "causal", "scored", "wide", "wide causal")


@pytest.mark.parametrize("name", thorough_but(lambda name: name in QUICK, list(NETS)))
def test_they_go_round(name, tmp_path):
    make, shapes = NETS[name]
    whole = name in ("tied", "tied twice", "untied", "looked up")
    starts = [keras.Input(s, name=f"in{i}", dtype="int32" if whole else None)
              for i, s in enumerate(shapes)]  # fmt: skip
    net = randomise_keras(keras.Model(starts[0] if len(starts) == 1 else starts, make(*starts)))
    rng = np.random.default_rng(0)
    xs = [rng.integers(0, 7, (3, *s)).astype("int32") if whole
          else rng.normal(size=(3, *s)).astype("float32") for s in shapes]  # fmt: skip
    given = xs if len(xs) > 1 else xs[0]
    expected = flat(net(given, training=False))
    model = converters.from_keras(net)
    close(model(given), expected)
    # Torch, and from there to Keras.
    there = converters.to_torch(model, layout="source")
    with torch.no_grad():
        close(there(*map(torch.from_numpy, xs)), expected)
    shapes = shapes if len(shapes) > 1 else shapes[0]
    back = converters.from_torch(there, shapes, layout="source")
    close(back(given), expected)
    close(converters.to_keras(back)(given, training=False), expected)
    # Keras again, and by files.
    again = converters.to_keras(model)
    close(again(given, training=False), expected)
    close(converters.from_keras(again)(given), expected)
    for suffix in ("keras",) if name.split()[0] in OPERATION else ("keras", "h5"):
        net.save(tmp_path / f"theirs.{suffix}")
        assert converters.load(tmp_path / f"theirs.{suffix}").module == model.module
        converters.save(tmp_path / f"ours.{suffix}", model)
        ours = keras.saving.load_model(tmp_path / f"ours.{suffix}", compile=False)
        close(ours(given, training=False), expected)
    converters.save(tmp_path / "ours.safetensors", model)
    found = converters.load(tmp_path / "ours.safetensors")
    assert found.module == model.module
    close(found(given), expected)


def test_a_class_token_is_joined_to_what_has_a_batch():
    net = fwt.Graph(
        [
            ("token", fwt.layers.Parameter((1, 1, 6)), ()),
            ("join", fwt.layers.Concatenate(axis=1), ("token", "input")),
            ("encoder", fwt.layers.TransformerEncoderLayer(2, 5, norm_first=True), ("join",)),
        ],
        input_shape=A,
    )
    x = np.random.default_rng(0).normal(size=(3, *A)).astype("float32")
    variables = net.init(jax.random.key(0), x)
    expected = flat(net.apply(variables, x))
    there = converters.to_keras(net, variables)
    close(there(x), expected)
    assert "encoder/self_attention/query/kernel" in fwt.paths(converters.from_keras(there)[1])
    close(converters.from_keras(there)(x), expected)


def test_tables_that_keras_can_not_share_are_refused_by_name():
    nodes = [
        ("table", fwt.layers.Parameter((7, 6)), ()),
        ("look", fwt.layers.Lookup(), ("table", "input")),
        ("more", fwt.layers.Add(), ("look", "table")),
    ]
    net = fwt.Graph(nodes, input_shape=(7,))
    held = {"params": {"table": np.ones((7, 6), np.float32)}}
    with pytest.raises(converters.ConversionError, match=r"look \(Lookup\): .* more \(Add\) takes"):
        converters.to_keras(net, held)
    start = keras.Input((5,), dtype="int32")
    table = L.ReversibleEmbedding(7, 6, mask_zero=True)
    with pytest.raises(converters.ConversionError, match="mask_zero=True"):
        converters.from_keras(keras.Model(start, table(table(start), reverse=True)))


def assigned(net, x):
    """Parts of tensors get what others hold, an array of the model, and numbers."""
    y, shifted = net.a(x).clone(), torch.zeros_like(x)
    y[:, 0] = x[:, 1]
    y[:, :, 2:4] = net.gain
    y[:, -1, :2] = 3.0
    y[..., 1] *= 2
    shifted[:, 1:] = y[:, :-1]
    return net.a(shifted) + y


T, F = torch.nn, torch.nn.functional
MODULES = {
    "bilinear": (lambda: T.Bilinear(6, 5, 4), [(6,), (5,)]),
    "assigned": (lambda: Net(assigned, a=T.Linear(6, 6),
                                gain=T.Parameter(torch.randn(5, 2))), [(5, 6)]),
    "sizes": (lambda: Net(lambda net, q, k, v: net.a(q, k, v, need_weights=False)[0],
                             a=T.MultiheadAttention(6, 2, kdim=5, vdim=4, batch_first=True)),
              [(5, 6), (7, 5), (7, 4)]),
    "pooled": (lambda: T.Sequential(T.Conv2d(2, 3, 1), T.AdaptiveAvgPool2d((7, None))),
               [(2, 14, 5)]),
    "of sequences": (lambda: T.Bilinear(6, 5, 4, bias=False), [(3, 6), (3, 5)]),
    "groups": (lambda: Net(lambda _, q, k: F.scaled_dot_product_attention(
        q, k, k, enable_gqa=True, scale=0.3)), [(4, 5, 6), (2, 7, 6)]),
    "wide values": (lambda: Net(lambda _, q, k, v: F.scaled_dot_product_attention(
        q, k, v, is_causal=True)), [(4, 5, 6), (4, 7, 6), (4, 7, 2)]),
    "causal": (lambda: Net(
        lambda net, q, k: net.a(q, k, tgt_is_causal=True,
                                tgt_mask=T.Transformer.generate_square_subsequent_mask(5)),
        a=T.TransformerDecoderLayer(6, 2, 8, batch_first=True, norm_first=True)),
        [(5, 6), (4, 6)]),
    "transformer": (lambda: T.Transformer(6, 2, 1, 1, 8, batch_first=True), [(5, 6), (4, 6)]),
    "einsum": (lambda: Net(lambda _, a, b: torch.einsum("bijk,bkl->bjl", a, b)),
               [(3, 5, 6), (6, 2)]),
    "max pooled": (lambda: T.Sequential(T.Conv1d(2, 3, 1), T.AdaptiveMaxPool1d(7)), [(2, 14)]),
}  # fmt: skip


@pytest.mark.parametrize("name", thorough_but(2, list(MODULES)))
def test_modules_of_several_tensors_go_to_keras_and_back(name):
    make, shapes = MODULES[name]
    torch.manual_seed(0)
    net = make().eval()
    xs = [torch.randn(3, *s) for s in shapes]
    with torch.no_grad():
        expected = flat(net(*xs))
        shapes = shapes if len(shapes) > 1 else shapes[0]
        model = converters.from_torch(net, shapes, layout="source")
        given = [x.numpy() for x in xs] if len(xs) > 1 else xs[0].numpy()
        close(model(given), expected)
        close(converters.to_torch(model, layout="source")(*xs), expected)
    there = converters.to_keras(model)
    close(there(given), expected)
    close(converters.from_keras(there)(given), expected)


def test_a_scale_of_zero_is_one():
    x = keras.Input((5, 2, 3))
    y = keras.ops.dot_product_attention(x, x, x, scale=0.0)
    model = converters.from_keras(keras.Model(x, y))
    given = np.random.default_rng(0).normal(size=(2, 5, 2, 3)).astype(np.float32)
    means = np.broadcast_to(given.mean(1, keepdims=True), given.shape)
    for found in (model(given), converters.to_keras(model)(given)):
        np.testing.assert_allclose(np.asarray(found), means, atol=1e-6)


def test_values_of_another_size_come_back_from_a_file(tmp_path):
    x, y = keras.Input((5, 6)), keras.Input((4, 6))
    layer = keras.layers.MultiHeadAttention(2, 3, value_dim=4, name="m")
    model = keras.Model([x, y], layer(x, y))
    there = converters.from_keras(model)
    xs = [np.ones((2, 5, 6), np.float32), np.ones((2, 4, 6), np.float32)]
    for name in ("m.keras", "m.h5"):
        converters.save(tmp_path / name, there)
        back = converters.load(tmp_path / name)
        np.testing.assert_allclose(back(xs), model(xs), atol=1e-5)


def test_one_head_that_keras_does_not_share_is_refused():
    net = fwt.Graph([("a", fwt.layers.DotProductAttention(), ("q", "k", "k"))],
                    inputs=("q", "k"), input_shape=((5, 4, 3), (6, 1, 3)))  # fmt: skip
    with pytest.raises(converters.ConversionError, match="one head of keys for 4 of queries"):
        converters.to_keras(net, {})
    with pytest.raises(fwt.FwtError, match="4 heads of queries can't share 3"):
        net.apply({}, np.ones((1, 5, 4, 3), np.float32), np.ones((1, 6, 3, 3), np.float32))
