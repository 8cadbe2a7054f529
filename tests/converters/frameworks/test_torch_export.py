"""Torch modules of any shape through Flax, beside torch itself."""

import contextlib
import dataclasses
import math
from collections import OrderedDict

import jax
import keras
import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from compare import applied, close, in_flax, in_torch
from marks import thorough_but
from torch import nn
from torch_nets import INTEGERS, MORE, NETS, Net, made

import fwt
from fwt import ConversionError, converters
from fwt.converters.frameworks import torch_check, torch_export, torch_sizes

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*take no part", "ignore::FutureWarning", "ignore:.*degrees of freedom"
)
QUICK = (6, 11)  # of the random modules
# The keys of a state dict that the new model has no place for.
LEFT_OUT = {
    "Swin": {"attn.relative_position_index"},
    "Swin, unshifted": {"attn.relative_position_index"},
    "WaveNet": {"residual_convs.2.weight", "residual_convs.2.bias"},
    "nanoGPT, slow": {"transformer.h.0.attn.bias", "transformer.h.1.attn.bias"},
}
SUMMED = {"BiLSTM"}  # whose two biases cross as their sum


def outputs(y):
    many = list(y.values()) if isinstance(y, dict) else y if isinstance(y, tuple | list) else [y]
    return [np.asarray(v.detach() if isinstance(v, torch.Tensor) else v) for v in many]


def p(*shape):
    return nn.Parameter(torch.rand(shape))


class Gained(nn.Linear):
    """Has an array beside those of a Linear."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.gain = p(sizes[1])

    def forward(self, x):
        return super().forward(x) * self.gain


class Standardised(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean(1, keepdim=True), self.bias)


def assert_same(a, b, limit=1e-5):
    for x, y in zip(outputs(a), outputs(b), strict=True):
        assert x.shape == y.shape
        assert np.abs(x - y).max() <= limit * np.abs(x).max()


def shapes_of(xs):
    shapes = [tuple(x.shape[1:]) for x in xs]
    return shapes[0] if len(xs) == 1 else shapes


def run(model, xs):
    return applied(model.module)(model.variables, *[x.numpy() for x in xs])


# Of the operations that others have, too; `python tests/graphs.py --torch` runs them all.
ALIKE = ("AlexNet", "VGG", "ResNet-18", "ResNeXt", "GoogLeNet", "MobileNetV2", "U-Net",
         "Swin, unshifted", "timm block, unfused")  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        *thorough_but(lambda n: n == "PointNet", [n for n in NETS | MORE if n not in ALIKE]),
        *thorough_but(0, ALIKE, most=1),
    ],
)
def test_nets_go_to_flax_and_back_with_their_state(name, tmp_path, monkeypatch):
    net, xs = made(name)
    model = converters.from_torch(net, shapes_of(xs), layout="source")
    assert_same(net(*xs), run(model, xs))
    back = converters.to_torch(model, layout="source")
    assert_same(net(*xs), back(*xs))
    state, found = net.state_dict(), back.state_dict()
    assert set(found) == set(state) - LEFT_OUT.get(name, set())
    for key, value in found.items():
        assert name in SUMMED or torch.equal(value, state[key]), key
    # At what sizes it runs was read of the net, and most of the time goes there.
    monkeypatch.setattr(torch_sizes, "fixed", lambda *_: {})
    again = converters.from_torch(back, shapes_of(xs), layout="source")
    assert_same(run(model, xs), run(again, xs))
    # Another one's weights go in by name.
    other, _ = made(name, 1)
    torch.save(other.state_dict(), tmp_path / "w.pt")
    drop = [*LEFT_OUT.get(name, ()), *(["lm_head.weight"] if "nanoGPT" in name else [])]
    filled = converters.load(tmp_path / "w.pt", architecture=model, drop=drop)
    assert_same(other(*xs), run(filled, xs))


def test_a_sidecar_keeps_the_order_of_the_state_dict(tmp_path):
    inner = nn.Sequential(OrderedDict(norm=nn.BatchNorm2d(4), conv=nn.Conv2d(4, 4, 1)))
    net = Net(
        lambda m, x: m.head((m.inner.norm(m.inner.conv(x)) * m.gain).mean((2, 3))),
        head=nn.Linear(4, 3), gain=nn.Parameter(torch.rand(4, 1, 1)), inner=inner,
    ).eval()  # fmt: skip
    inner.norm.num_batches_tracked += 3
    x = torch.randn(3, 4, 6, 5)
    converters.save(tmp_path / "w.safetensors", converters.from_torch(net, IMAGE, sidecar=True))
    back = converters.to_torch(converters.load(tmp_path / "w.safetensors"))
    state, found = net.state_dict(), back.state_dict()
    assert list(found) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in found.items())
    assert_same(net(x), back(x))
    converters.save(tmp_path / "w.pt", converters.load(tmp_path / "w.safetensors"))
    held = torch.load(tmp_path / "w.pt")
    assert list(held) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in held.items())
    line = Net(lambda m, x: m.b(m.a(x)), b=nn.Linear(4, 4), a=nn.Linear(4, 4))
    model = converters.from_torch(line, (4,), sidecar=True)
    assert list(converters.to_torch(model).state_dict()) == list(line.state_dict())
    assert_same(line(torch.ones(2, 4)), converters.to_torch(model)(torch.ones(2, 4)))
    wrong = model.module.clone(
        sidecar='{"framework": "torch", "layers": {}, "whole": {"order": 3}}'
    )
    with pytest.raises(ConversionError, match="order is no list"):
        converters.to_torch(wrong, model.variables)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["ResNet-18", "ConvNeXt", "ViT", "U-Net"])
def test_nets_take_images_with_the_channels_last(name):
    net, (x,) = made(name)
    model = converters.from_torch(net, tuple(x.shape[1:]))
    y = net(x).detach().numpy()
    found = run(model, [x.movedim(1, -1)])
    assert_same(y, np.moveaxis(found, -1, 1) if y.ndim > 2 else found)


IMAGE, STEPS = (4, 6, 5), (7, 6)


def heads(**more):
    return nn.MultiheadAttention(6, 2, **{"batch_first": True, **more})


CAUSAL = torch.full((7, 7), -math.inf).triu(1)
of = dict
OPERATIONS = {
    "arithmetic": (lambda m, x: 2 / (1 - x / 3 + x * x) - x**3 + 0.5, IMAGE),
    "functions": (lambda m, x: torch.rsqrt(x.abs() + 1) + x.exp().sin() - F.celu(x, 0.7), IMAGE),
    "clamps": (lambda m, x: x.clamp(min=0.3) + x.clamp(-0.5, 0.2) + x.clamp(max=0.1), IMAGE),
    "means": (lambda m, x: x.mean((2, 3)) + x.sum(-1).amax(2) + x.max(3)[0].min(-1).values, IMAGE),
    "deviations": (lambda m, x: torch.cat([x.std(1), x.var((1,), unbiased=False)], -1), IMAGE),
    "normalised": (lambda m, x: F.normalize(x, dim=1) + x.logsumexp(2, keepdim=True), IMAGE),
    "soft": (
        lambda m, x: F.log_softmax(x, -1) * x.softmax(1) + F.glu(x, 2).repeat(1, 1, 2, 1),
        IMAGE,
    ),
    "pools": (
        lambda m, x: F.adaptive_avg_pool2d(F.max_pool2d(x, 3, 2, 1), (2, 1)) - F.avg_pool2d(x, 3),
        IMAGE,
    ),
    "resized": (
        lambda m, x: F.interpolate(F.interpolate(x, scale_factor=2), (9, 8), mode="bilinear"),
        IMAGE,
    ),
    "shuffled": (lambda m, x: F.pixel_shuffle(F.channel_shuffle(x, 2), 2), IMAGE),
    "pads": (lambda m, x: F.pad(F.pad(x, (0, 0, 0, 0, 1, 1)), (1, 2, 1, 1), mode="reflect"), IMAGE),
    "pads of steps": (lambda m, x: F.pad(x, (0, 0, 2, 0), value=0.5), STEPS),
    "weights": (
        lambda m, x: F.conv2d(x, m.w - m.w.mean((1, 2, 3), keepdim=True), padding=1),
        IMAGE,
        of(w=p(3, 4, 3, 3)),
    ),
    "matrix": (lambda m, x: F.linear(x, m.w) @ m.v, STEPS, of(w=p(5, 6), v=p(5, 3))),
    "norms": (
        lambda m, x: F.group_norm(x, 2) + F.layer_norm(x, (6, 5)) + F.instance_norm(x),
        IMAGE,
    ),
    "views": (lambda m, x: x.transpose(1, 2).reshape(-1, 6, 20).unsqueeze(2).flatten(1), IMAGE),
    "views cut anew": (lambda m, x: x.reshape(x.shape[0], 8, 15), IMAGE),
    "batch inside": (
        lambda m, x: (
            x.permute(1, 0, 2, 3)[2] + x.permute(2, 0, 1, 3).unbind(0)[1].mean(1, keepdim=True)
        ),
        IMAGE,
    ),
    "batch merged": (
        lambda m, x: m.l(x.reshape(-1, 6)).relu().view(x.size(0), 7, 3),
        STEPS,
        of(l=nn.Linear(6, 3)),
    ),
    "parts": (
        lambda m, x: torch.cat([*x.chunk(2, 1)[::-1], x[:, [2, 0]], x.roll((1, -2), (2, 3))], 1)[
            :, 1:, ::2
        ],
        IMAGE,
    ),
    "stacks": (lambda m, x: torch.stack([x, x * 2], -1).sum(1).flip(2), IMAGE),
    "expanded": (
        lambda m, x: torch.cat([x, x.mean((2, 3), keepdim=True).expand(-1, -1, 6, 5)], 1),
        IMAGE,
    ),
    "products": (
        lambda m, x, y: (x @ y.mT).softmax(-1) @ y + torch.einsum("btc,oc->bto", x, m.w),
        (STEPS, (4, 6)),
        of(w=p(6, 6)),
    ),
    "einsum": (lambda m, x, y: torch.einsum("bhqd,bkhd->bhqk", x, y), ((2, 3, 5), (4, 2, 5))),
    "masked": (
        lambda m, x: torch.where(CAUSAL == 0, x, 0) + x.tril() + x.masked_fill(CAUSAL < 0, -9.0),
        (7, 7),
    ),
    "channels": (
        lambda m, x: x * m.g.view(1, -1, 1, 1) + m.b[:, None, None] * m.s,
        IMAGE,
        of(g=p(4), b=p(4), s=p()),
    ),
    "positions": (
        lambda m, x: x + m.p[:, :7] + m.e(torch.arange(7)),
        STEPS,
        of(p=p(1, 9, 6), e=nn.Embedding(9, 6)),
    ),
    "two readers": (
        lambda m, x: (-x * m.p + x * m.p).view(x.shape[0], 7, 2, 3).transpose(1, 2) * m.q + m.q,
        STEPS,
        of(p=p(1, 7, 6), q=p(7, 3)),
    ),
    "a layer and more": (lambda m, x: m.g(x) + x, STEPS, of(g=Gained(6, 6))),
    "in place": (
        lambda m, x: (lambda y: m.r(y) + y)(m.c(x)),
        IMAGE,
        of(r=nn.ReLU(True), c=nn.Conv2d(4, 3, 1)),
    ),
    "called twice": (
        lambda m, x: {"a": m.c(m.c(x)), "b": m.l(m.c(x))},
        IMAGE,
        of(
            c=nn.Conv2d(4, 4, 3, padding=1),
            l=nn.utils.parametrizations.weight_norm(nn.Linear(5, 2)),
        ),
    ),
    "attention": (
        lambda m, x, y: m.a(x, y, y, need_weights=False)[0] + m.a(x, y, y)[0],
        (STEPS, (4, 6)),
        of(a=heads()),
    ),
    "attention, key apart": (lambda m, x, y: m.a(x, y, x)[0], (STEPS, STEPS), of(a=heads())),
    "attention, causal": (lambda m, x: m.a(x, x, x, attn_mask=CAUSAL)[0], STEPS, of(a=heads())),
    "time first": (
        lambda m, x: m.a(*[m.g(x.transpose(0, 1))[0]] * 3)[0].transpose(0, 1),
        STEPS,
        of(a=heads(batch_first=False), g=nn.GRU(6, 6)),
    ),
    "states": (
        lambda m, x: m.l(x)[1][0][-1] + m.r(x)[1].squeeze(0) + m.l(x)[0][:, -1],
        STEPS,
        of(l=nn.LSTM(6, 3, 2, batch_first=True), r=nn.RNN(6, 3, batch_first=True)),
    ),
    "encoder": (
        lambda m, x: m.e(x, nn.Transformer.generate_square_subsequent_mask(7)),
        STEPS,
        of(e=nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), 1)),
    ),
    "numbers": (
        lambda m, x: torch.sub(x, 1, alpha=2) + x.clamp(0.5, -0.5) + torch.add(x, x, alpha=3),
        IMAGE,
    ),
    "scores unscaled": (lambda m, x: F.scaled_dot_product_attention(x, x, x, scale=0.0), IMAGE),
    "a size of its own": (
        lambda m, x: m.c(x, output_size=(12, 10)),
        IMAGE,
        of(c=nn.ConvTranspose2d(4, 6, 3, 2, 1)),
    ),
    "an axis before": (
        lambda m, x: torch.cat([m.t[None, None].expand(x.shape[0], 1, -1), x + m.p[None]], 1),
        STEPS,
        of(t=p(6), p=p(7, 6)),
    ),
    "other names": (
        lambda m, x: torch.concat([torch.absolute(x), torch.multiply(x, 2)], 1).clip(-1, 1),
        IMAGE,
    ),
    "made of several": (
        lambda m, x: (
            torch.lerp(x, x * x, 0.3)
            + torch.std_mean(x, 1)[0][:, None]
            + torch.tensordot(x, m.w, 1)
            + x.diff(dim=2, prepend=x[:, :, :1])
        ),
        IMAGE,
        of(w=p(5, 5)),
    ),
    "logarithms": (
        lambda m, x: (
            x.abs().log1p() + x.expm1() + (x * x + 1).log2() + x.exp2() + (x.abs() + 1).log10()
        ),
        IMAGE,
    ),
    "global response": (
        lambda m, x: (
            m.g[:, None, None] * x / (x.norm(2, (2, 3), keepdim=True).mean(1, keepdim=True) + 1e-6)
            + x
        ),
        IMAGE,
        of(g=p(4)),
    ),
}


def inputs_of(shape, count=3):
    torch.manual_seed(1)
    shapes = shape if isinstance(shape[0], tuple) else (shape,)
    return [torch.randn(count, *s) for s in shapes]


@pytest.mark.parametrize(
    "name",
    [n if n in ("two readers", "batch inside", "parts", "in place", "channels") else
     pytest.param(n, marks=pytest.mark.thorough) for n in OPERATIONS],
)  # fmt: skip
def test_operations_come_as_layers(name):
    torch.manual_seed(0)
    function, shape, *parts = OPERATIONS[name]
    net, xs = Net(function, **(parts[0] if parts else {})).eval(), inputs_of(shape)
    model = converters.from_torch(net, shape, layout="source")
    assert_same(net(*xs), run(model, xs))
    back = converters.to_torch(model, layout="source")
    assert_same(net(*xs), back(*xs))
    state, found = net.state_dict(), back.state_dict()
    assert all(found[k].shape == state[k].shape for k in set(found) & set(state))


REFUSED = {
    "random": (lambda m, x: x + torch.rand(5), IMAGE, "random numbers"),
    "random, alike": (lambda m, x: x + torch.randn_like(x), IMAGE, "randn_like"),
    "the batch": (lambda m, x: x - x.mean(0), IMAGE, "the batch"),
    "everything": (lambda m, x: x / x.mean(), IMAGE, "the batch"),
    "joined examples": (lambda m, x: torch.cat([x, x]), IMAGE, "the batch"),
    "some examples": (lambda m, x: x[1:] * 1, IMAGE, "export"),
    "the first example": (lambda m, x: x[0], IMAGE, "the batch"),
    "the number of examples": (lambda m, x: x * x.shape[0], IMAGE, "number of examples"),
    "a number": (lambda m, x: x.reshape(len(x), 30, 4), IMAGE, r"x.shape\[0\] for len\(x\)"),
    "control flow": (lambda m, x: x if x.sum() > 0 else -x, IMAGE, "export"),
    "a mask of the input": (lambda m, x: x.masked_fill(x > 0, 0.0), IMAGE, "gt"),
    "an index": (lambda m, x: x.max(1)[1], IMAGE, "without the input"),
    "a sort": (lambda m, x: x.sort(1)[0], IMAGE, "sort"),
    "a cast": (lambda m, x: x.double(), IMAGE, "float64"),
    "merged batches": (lambda m, x: F.conv2d(x.flatten(0, 1)[:, None], m.w), IMAGE, "merged"),
    "a batch behind": (lambda m, x: x.transpose(0, 1), STEPS, "the batch"),
    "nested outputs": (lambda m, x: {"a": [x]}, IMAGE, "nested"),
    "a state": (lambda m, x: m.l(x, torch.ones(1, x.size(0), 3))[0], STEPS, "states to begin"),
    "cell states": (lambda m, x: m.c(x)[1][1][0], STEPS, "cell states"),
    "an output that is none": (lambda m, x: (x * 2, None), IMAGE, "no tensor"),
    "one example": (lambda m, x: x * (2 if x.shape[0] == 1 else 1), IMAGE, "for one example"),
    "dropout": (lambda m, x: F.dropout(x, 1e-6), IMAGE, "random numbers"),
    "statistics of the batch": (
        lambda m, x: F.batch_norm(x, None, None, training=True),
        IMAGE,
        "in training",
    ),
    "a wider sum": (lambda m, x: x.sum(1, dtype=torch.float64), IMAGE, "float64 of float32"),
    "decimals": (lambda m, x: x.round(decimals=1), IMAGE, "decimals"),
    "the deviation of one": (lambda m, x: x[:, :1].var(1), IMAGE, "is NaN"),
    "nothing to attend to": (
        lambda m, x: F.scaled_dot_product_attention(x, x, x, torch.eye(6) < 0),
        IMAGE,
        "hides everything",
    ),
    "a bicubic": (lambda m, x: F.interpolate(x, (9, 9), mode="bicubic"), IMAGE, "bicubic"),
    "a counter": (lambda m, x: x * m.n.add_(1), IMAGE, "changes what it holds"),
}


@pytest.mark.parametrize("name", thorough_but(lambda n: n in [*REFUSED][::2], REFUSED))
def test_what_no_layer_says_is_refused_by_name(name):
    function, shape, said = REFUSED[name]
    cells = {"l": nn.GRU(6, 3, batch_first=True), "c": nn.LSTM(6, 3, batch_first=True)}
    net = Net(function, w=p(2, 1, 3, 3), n=nn.Parameter(torch.zeros(()), False), **cells)
    with pytest.raises(ConversionError, match=said):
        converters.from_torch(net, shape, layout="source")


def test_buffers_keep_their_keys():
    """Also those of one column, which a layout may turn, and of one entry."""
    shapes = {"column": (4, 1, 1), "one": (), "rows": (1, 6, 1)}
    net = Net(lambda m, x: m.c(x) * m.column * m.one + m.rows, c=nn.Conv2d(4, 4, 1))
    for name, shape in shapes.items():
        net.register_buffer(name, torch.randn(shape))
    for layout in ("source", "channels_last"):
        model = converters.from_torch(net, IMAGE, layout=layout)
        taken = "source" if layout == "source" else "channels_first"
        back = converters.to_torch(model, layout=taken)
        state, found = net.state_dict(), back.state_dict()
        assert set(found) == set(state)
        assert all(torch.equal(found[k], v) for k, v in state.items())
    assert converters.verify(net, model).ok


def test_what_does_nothing_at_inference_keeps_its_name():
    """As Keras's Dropout with a shape of its noise, which torch has as an Identity."""
    keep = keras.layers.Dropout(0.2, noise_shape=(None, 1, 1, 1), name="keep")
    h, w = IMAGE[1:]
    x = keras.Input((h, w, IMAGE[0]))
    y = keras.layers.Conv2D(4, 1, name="conv")(x)
    y = keras.layers.Add()([y, keep(y)])
    y = keras.layers.SpatialDropout2D(0.3, name="spatial")(y)
    given = keras.Model(x, y)
    net = converters.to_torch(converters.from_keras(given))
    back = converters.to_keras(converters.from_torch(net, IMAGE))
    names = [x.name for x in back.layers]
    assert {"conv", "keep", "spatial"} <= set(names)
    assert type(back.get_layer("spatial")) is keras.layers.SpatialDropout2D
    image = np.random.default_rng(0).normal(size=(2, h, w, IMAGE[0])).astype("float32")
    close(back(image), given(image))
    forward = nn.Identity.forward
    net = Net(lambda m, x: m.a(input=x) + m.b((x, 2))[0], a=nn.Identity(), b=nn.Identity())
    assert [n.name for n in converters.from_torch(net, (3,)).module.nodes] == ["a", "add"]
    assert nn.Identity.forward is forward
    assert "forward" not in vars(net.a)


def test_channels_that_a_module_puts_elsewhere_are_found_there():
    net = Net(lambda m, x: m.n(m.c(x).permute(0, 2, 1, 3)), c=nn.Conv2d(4, 3, 1), n=nn.LayerNorm(5))
    (x,) = inputs_of(IMAGE)
    found = run(converters.from_torch(net, IMAGE), [x.movedim(1, -1)])
    assert_same(net(x), np.moveaxis(found, -1, 2))


@pytest.mark.parametrize("own", [True, False])
def test_instance_norms_with_running_statistics(own):
    """Also as the whole model, and as a function that takes them or leaves them."""
    norm = nn.InstanceNorm2d(4, affine=True, track_running_stats=True).eval()
    for value in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        nn.init.uniform_(value, 0.5, 2)
    net = norm if own else Net(
        lambda m, x: F.instance_norm(x, weight=m.norm.bias) + F.instance_norm(
            x, m.norm.running_mean, m.norm.running_var, m.norm.weight, use_input_stats=False),
        norm=norm,
    ).eval()  # fmt: skip
    x = torch.randn(3, 4, 5, 6)
    assert_same(net(x), run(converters.from_torch(net, (4, 5, 6), layout="source"), [x]))


def test_a_constant_image_is_normalised_as_it_is_rounded():
    """What is zero but for rounding is divided by almost nothing, in each framework in its way."""
    torch.manual_seed(0)
    net = Net(
        lambda m, x: m.n(F.interpolate(m.c(x).log_softmax(-1), scale_factor=2, mode="linear")),
        c=nn.Conv1d(3, 4, 2),
        n=nn.LayerNorm(38),
    )
    (x,) = inputs_of((3, 20))
    assert_same(net(x), run(converters.from_torch(net, (3, 20), layout="source"), [x]))


def test_a_bound_has_the_dtype_of_what_it_bounds():
    net = Net(lambda m, x: m.c(x).clamp(max=2), c=nn.Linear(6, 3))
    model = converters.from_torch(net, STEPS, layout="source")
    kinds = {np.asarray(n.layer.value).dtype for n in model.module.nodes
             if isinstance(n.layer, fwt.layers.Constant)}  # fmt: skip
    assert kinds == {np.dtype("float32")}
    (x,) = inputs_of(STEPS)
    assert_same(net(x), converters.to_keras(model)(x.numpy()))


@pytest.mark.parametrize("seed", thorough_but(lambda s: s in QUICK, range(20), most=6))
def test_random_modules(seed):
    import torch_dags

    torch_dags.run(seed)


def test_whole_numbers_stay_whole():
    """Also those that are made larger before they index a table."""
    net = Net(lambda m, x: m.e(x * 2 + 1 + m.at), e=nn.Embedding(16, 6))
    net.register_buffer("at", torch.tensor([0, 4, 8]))
    x = torch.tensor([[3, 1, 2], [0, 0, 3]])
    model = converters.from_torch(net, x, layout="source")
    assert_same(net(x), run(model, [x]))
    big = torch.tensor([[2**25 + 1]])
    model = converters.from_torch(Net(lambda m, x: x * 2 + 1), big, layout="source")
    assert run(model, [big]).tolist() == [[2**26 + 3]]


@pytest.mark.parametrize(
    ("low", "high"),
    thorough_but(1, [(1, 4), (0, 6), (None, 4), (2, None), (-(2**40), 2**40)]),
)
def test_whole_numbers_are_bounded(low, high):
    bounds = low, high
    net = Net(lambda m, x: m.e(x.clamp(*bounds)), e=nn.Embedding(7, 3))
    ids = torch.randint(0, 7, (3, 5))
    model = converters.from_torch(net, ids)
    assert_same(net(ids), run(model, [ids]))
    assert_same(net(ids), converters.to_torch(model)(ids))
    with pytest.raises(ConversionError, match="an array of int32, which Keras has no layer"):
        converters.to_keras(model)


@pytest.mark.parametrize(
    ("kind", "widths"),
    thorough_but(
        1, [(bool, {"kdim": 5, "vdim": 3}), (bool, {}), (float, {"kdim": 5}), (float, {})]
    ),
)
def test_attention_takes_a_mask(kind, widths):
    """Also one that is not causal, of keys and values that are another tensor than the queries."""
    mask = torch.rand(7, 7) < 0.4 if kind is bool else torch.randn(7, 7)
    mask[:, 0] = False
    net = Net(
        lambda m, x: m.a(x, m.k(x), m.v(x), attn_mask=mask)[0],
        a=nn.MultiheadAttention(6, 2, batch_first=True, **widths),
        k=nn.Linear(6, widths.get("kdim", 6)), v=nn.Linear(6, widths.get("vdim", 6)),
    ).eval()  # fmt: skip
    x = torch.randn(3, 7, 6)
    model = converters.from_torch(net, (7, 6), layout="source")
    assert_same(net(x), run(model, [x]))
    assert_same(net(x), converters.to_torch(model, layout="source")(x))
    close(converters.to_keras(model)(x.numpy()), net(x).detach())


def test_two_layers_of_one_array_have_each_their_entries():
    def of(second):
        return Net(lambda m, x: F.linear(x, m.w[:4]).tanh() + F.linear(x, m.w[second]),
                   w=p(8, 6))  # fmt: skip

    (x,) = inputs_of(STEPS)
    net = of(slice(4, None))
    assert_same(net(x), run(converters.from_torch(net, STEPS), [x]))
    both = of(slice(3, 7))
    assert_same(both(x), run(converters.from_torch(both, STEPS), [x]))
    every_other = of(slice(1, 8, 2))
    with pytest.raises(ConversionError, match="takes w in another way than an operation before it"):
        converters.from_torch(every_other, STEPS)


def test_ids_are_drawn_within_the_table_of_their_input():
    net = Net(lambda m, x, y: m.e(x) + m.f(y), e=nn.Embedding(9, 6), f=nn.Embedding(4, 6))
    xs = torch.tensor([[8, 1]]), torch.tensor([[3, 0]])
    layers = torch_export.net_of(net, [torch.cat([x, x]) for x in xs]).layers
    largest = [torch_check._random(x, name, layers, 1).max() for x, name in
               zip(xs, [n for layer in layers[:2] for n in layer.inputs], strict=True)]  # fmt: skip
    assert largest == [8, 3]
    assert_same(net(*xs), run(converters.from_torch(net, xs, layout="source"), xs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_modules_of_other_widths(dtype):
    net = Net(lambda m, x: m.c(x).relu() + x, c=nn.Conv2d(4, 4, 1)).to(dtype)
    model = converters.from_torch(net, IMAGE, layout="source")
    back = converters.to_torch(model, layout="source")
    x = torch.randn(3, *IMAGE, dtype=dtype)
    assert torch.allclose(back(x), net(x))
    assert torch.equal(back.c.weight, net.c.weight)


def test_half_precision_that_would_grow_is_refused():
    keep = torch.tensor([True, False, True, True])
    net = Net(lambda m, x: m.c(x).masked_fill(keep, -1e4), c=nn.Linear(3, 4)).half()
    with pytest.raises(ConversionError, match=r"gives float16, its Flax model float32"):
        converters.from_torch(net, (3,), layout="source")


def test_examples_are_dense_tensors_of_real_numbers():
    net = Net(lambda m, x: m.c(x).relu() + 1, c=nn.Linear(3, 4))
    x = np.random.default_rng(0).normal(size=(2, 3))  # of float64
    assert converters.from_torch(net, x).module.input_shape == (3,)
    for other in (torch.ones(2, 3, dtype=torch.complex64), np.full((2, 3), None)):
        with pytest.raises(ConversionError, match="an example of an input is"):
            converters.from_torch(net, other)
    with pytest.raises(ConversionError, match="holds a program and no layers"):
        converters.from_torch(torch.jit.trace(nn.Linear(3, 4), torch.ones(2, 3)), (3,))


def test_weights_made_of_weights_have_another_name():
    """So that those of a state dict do not come in as they are."""
    net = Net(lambda m, x: m.c(x) + 1, c=Standardised(4, 3, 3))
    model = converters.from_torch(net, IMAGE, layout="source")
    assert not {"c.weight"} & set(converters.to_torch(model, layout="source").state_dict())


def test_an_attention_with_a_mask_at_one_of_its_calls_is_refused():
    heads = nn.MultiheadAttention(6, 2, batch_first=True)
    later = torch.ones(4, 4).triu(1).bool()
    net = Net(lambda m, x: m.a(x, x, x)[0] + m.a(x, x, x, attn_mask=later)[0], a=heads)
    with pytest.raises(ConversionError, match=r"a .*another call as CausalSelfAttention"):
        converters.from_torch(net.eval(), (4, 6))


def test_a_squeeze_of_the_batch_is_told():
    net = Net(lambda m, x: x.mean(2, keepdim=True).squeeze())
    with pytest.warns(UserWarning, match=r"gives \(7,\) for a single example"):
        converters.from_torch(net, STEPS, layout="source")


def test_a_hook_on_a_layer_is_refused():
    net = Net(lambda m, x: m.c(x) + x, c=nn.Conv2d(4, 4, 1))
    net.c.register_forward_hook(lambda module, given, y: y * 2)
    with pytest.raises(ConversionError, match=r"c .Conv2d. has a forward hook"):
        converters.from_torch(net, IMAGE)


def test_a_table_that_two_layers_share_is_one_array():
    net, xs = made("nanoGPT")
    model = converters.from_torch(net, (9,), layout="source")
    params = model.variables["params"]
    assert "lm_head" not in params
    assert params["transformer"]["wte"]["weight"].shape == (11, 8)
    back = converters.to_torch(model, layout="source")
    assert back.lm_head.weight is back.transformer.wte.weight
    assert_same(net(*xs), back(*xs))


def test_shapes_dtypes_and_modes_of_the_module_stay():
    net, _ = made("BiLSTM")
    net.train()
    net.dropout.eval()
    inputs = torch_export.example_inputs(net, (7,))
    assert [x.dtype for x in inputs] == [torch.int64]
    with torch_export.at_inference(net):
        torch_export.net_of(net, inputs)
        assert not net.training
    assert net.training
    assert net.lstm.training
    assert not net.dropout.training
    with pytest.raises(ConversionError, match="can't be run on input_shape"):
        converters.from_torch(made("PointNet")[0], (4, 14))
    with pytest.raises(ConversionError, match=r"is no torch.nn.Sequential.*give input_shape="):
        converters.from_torch(made("PointNet")[0])


def test_what_takes_no_part_is_told():
    net = Net(lambda m, x: m.a(x), a=nn.Conv2d(4, 3, 1), aux=nn.Linear(5, 2))
    with pytest.warns(UserWarning, match="aux.weight and 1 more of Net take no part"):
        converters.from_torch(net, IMAGE, layout="source")


def test_a_wrong_model_is_not_given_back():
    net, xs = made("PointNet")
    told = torch_export.net_of(net, xs)
    model = converters.from_torch(net, shapes_of(xs), layout="source")
    tried = torch_check.tried(net, told, xs)
    torch_check.check(tried, model)
    kernel = model.variables["params"]["fc"]["kernel"]
    model.variables["params"]["fc"]["kernel"] = kernel * np.float32(1.001)
    with pytest.raises(ConversionError, match="differs by"):
        torch_check.check(tried, model)


def test_a_single_learned_number_keeps_its_name():
    net = Net(lambda m, x: x * m.gain, gain=nn.Parameter(torch.tensor(1.5)))
    x = torch.randn(3, 4)
    model = converters.from_torch(net, (4,), layout="source")
    back = converters.to_torch(model, layout="source")
    assert back.state_dict()["gain"].shape == ()
    assert_same(net(x), back(x))


def test_of_large_examples_fewer_are_tried():
    taken = []

    def forward(m, x):
        taken.append(x.shape[0])
        return m.a(x).mean((2, 3))

    net = Net(forward, a=nn.Conv2d(3, 4, 3)).eval()
    for side, most in ((9, 7), (150, 3)):
        taken.clear()
        model = converters.from_torch(net, (3, side, side + 1), layout="source")
        assert max(n for n in taken if isinstance(n, int)) == most
        x = torch.randn(3, 3, side, side + 1)
        assert_same(net(x), run(model, [x]))
    mixed = Net(lambda m, x: m.a(x) - x.amax(0, keepdim=True), a=nn.Conv2d(3, 3, 1)).eval()
    with pytest.raises(ConversionError):
        converters.from_torch(mixed, (3, 150, 151), layout="source")


def test_each_net_of_whole_numbers_is_known():
    assert set(NETS | MORE) >= INTEGERS


class Kept(nn.Module):
    """Whose forward changes all that a module may hold."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.table = nn.Embedding(4, 4, max_norm=0.1)
        self.register_buffer("inside", torch.zeros(()))
        self.calls, self.seen, self.last = 0, [], None

    def forward(self, x):
        self.calls, self.last = self.calls + 1, x
        self.seen.append(x)
        row = self.table(torch.zeros((), dtype=torch.int64))
        return self.norm(self.conv(x)) + row[:, None, None]


@pytest.mark.parametrize("training", [True, False])
def test_a_module_stays_as_it_is(training):
    net = Kept().train(training)
    before = {name: v.clone() for name, v in net.state_dict().items()}
    with contextlib.suppress(converters.ConversionError):
        converters.from_torch(net, input_shape=(3, 6, 5))
    assert all(torch.equal(v, before[name]) for name, v in net.state_dict().items())
    assert (net.calls, net.seen, net.last) == (0, [], None)
    assert all(module.training == training for module in net.modules())


class Sums(nn.Module):
    """Whose own weights are of the shape of its layer's, which it calls after them."""

    def __init__(self, alone=1.0):
        super().__init__()
        self.w, self.b = p(4, 4), p(4)
        self.linear, self.head, self.alone = nn.Linear(4, 4), nn.Linear(4, 2), alone

    def forward(self, x):
        first = F.linear(x, self.w, self.b).relu()
        return self.head(self.linear(first).relu() + x) * (self.alone if x.shape[0] == 1 else 1)


def test_operations_take_no_names_of_layers():
    net = Sums()
    params = converters.from_torch(net, input_shape=(4,)).variables["params"]
    np.testing.assert_array_equal(params["linear"]["kernel"], net.linear.weight.detach().numpy().T)


def test_a_single_example_is_judged_by_rounding():
    with pytest.raises(ConversionError, match="for one example"):
        converters.from_torch(Sums(1.01), input_shape=(4,))


def test_verify_sees_through_a_bias_that_hides_a_layer():
    net = Sums()
    with torch.no_grad():
        net.head.bias.fill_(1e6)
    model = converters.from_torch(net, input_shape=(4,))
    assert converters.verify(net, model).ok
    kernel = model.variables["params"]["linear"]["kernel"]
    kernel = model.variables["params"]["linear"]["kernel"] = kernel.copy()
    kernel[0, 0] *= 1.5
    report = converters.verify(net, model)
    assert (report.ok, report.first) == (False, "linear")
    assert [line.name for line in report.weights] == ["params/linear/kernel"]


class Norms(nn.Module):
    """Which changes its own weights in its forward."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.other = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3))

    def forward(self, x):
        self.conv.weight.data = torch.renorm(self.conv.weight.data, 2, 0, 0.5)
        return self.other(self.conv(x).mean((2, 3)))


def test_weights_that_a_forward_changes_are_put_back():
    net = Norms().train()
    before = {name: v.clone() for name, v in net.state_dict().items()}
    with contextlib.suppress(ConversionError):
        converters.from_torch(net, input_shape=(3, 6, 5))
    assert all(torch.equal(v, before[name]) for name, v in net.state_dict().items())


@pytest.mark.parametrize(
    "hide",
    [
        lambda x, keep: torch.where(keep, x.log(), torch.zeros(())),
        lambda x, keep: x.exp().reshape(-1, 4).masked_fill(keep, 0.0),
        lambda x, keep: torch.where(keep, 1 / x.abs(), x.log()),
        lambda x, keep: torch.where(keep, 2 * x.log() - 1, torch.tensor([1.0, 2.0, torch.inf, 3])),
        lambda x, keep: x.log().masked_fill(~keep, -torch.inf),
        lambda x, keep: torch.triu(1 / x.abs()[:, None] - x[..., None], 1).sum(-1),
        lambda x, keep: torch.tril((200 * x[:, None] * x[..., None]).exp()).amax(-1),
    ],
)
def test_what_is_hidden_does_not_count(hide, tmp_path):
    class Hides(nn.Module):
        def forward(self, x):
            return hide(x, torch.tensor([True, False, True, True]))

    x = torch.tensor([[2.0, 0, 3, -1], [0, 1, -2, 3], [0.5, 5, 2, 4]])
    expected = Hides()(x).numpy()
    model = converters.from_torch(Hides(), input_shape=(4,))
    with torch.no_grad():
        close(converters.to_torch(model)(x), expected)
    close(model(x.numpy()), expected)
    converters.save(tmp_path / "net.keras", model)
    for net in (converters.to_keras(model), keras.saving.load_model(tmp_path / "net.keras")):
        close(net(x.numpy()), expected)
        close(converters.from_keras(net)(x.numpy()), expected)
    converters.to_onnx(model, tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    close(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0], expected)


def test_whole_numbers_that_are_hidden_are_whole():
    keep = torch.tensor([True, False, True, True])
    net = Net(lambda m, x: m.e(x.masked_fill(~keep, 0)), e=nn.Embedding(5, 3)).eval()
    ids = torch.randint(0, 5, (3, 4))
    model = converters.from_torch(net, ids)
    expected = net(ids).detach().numpy()
    close(converters.to_torch(model)(ids).detach().numpy(), expected)
    close(converters.to_keras(model)(ids.numpy()), expected)


def test_an_array_meets_the_last_axes_in_keras():
    """Of a batch as large as another axis too."""

    class Divides(nn.Module):
        def __init__(self):
            super().__init__()
            self.by, self.table = (nn.Parameter(torch.rand(s) + 1) for s in ((3,), (4, 1)))

        def forward(self, x):
            return x / self.by + self.by / x.abs().add(1) - self.table / x.exp()

    class Both(Divides):
        def forward(self, x):
            return (x / self.by).sum(1) + (x.mean(1) + self.by)

    both = converters.from_torch(Both().eval(), (4, 3), layout="source")
    with pytest.raises(ConversionError, match=r"by: tensors of \[2, 3\] axes"):
        converters.to_keras(both)
    net = Divides().eval()
    there = converters.to_keras(converters.from_torch(net, (4, 3), layout="source"))
    for batch in (1, 4, 5):
        x = torch.randn(batch, 4, 3)
        close(there(x.numpy()), net(x).detach().numpy())


def test_negated_views(tmp_path):
    """Their memory holds the other sign, which a bit of the tensor tells."""

    def negated(*shape):
        return torch.nn.Parameter(torch._neg_view(torch.randn(*shape)))

    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.norm = torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)
            self.inner.weight, self.norm.running_mean = negated(4, 4), negated(4).data
            self.weight = negated(4, 3)

        def forward(self, x):
            return self.norm(self.inner(x)) @ self.weight

    own = Own().eval()
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    for net in (own, torch.nn.Sequential(own.inner, own.norm)):
        close(in_flax(converters.from_torch(net, (4,)), x), in_torch(net, x))
    before = own.inner.weight.detach().clone()
    converters.transform(own, fwt.at("inner/kernel", lambda t: jax.tree.map(lambda w: 2 * w, t)))
    assert torch.equal(own.inner.weight, 2 * before)
    line = torch.nn.Sequential(own.inner, own.norm)
    torch.save(line.state_dict(), tmp_path / "a.pt")
    model = converters.load(tmp_path / "a.pt", architecture=converters.from_torch(line, (4,)))
    close(in_flax(model, x), in_torch(line, x))

    shared = torch.nn.Sequential(torch.nn.Linear(4, 4, False), torch.nn.Linear(4, 4, False))
    shared[1].weight = torch.nn.Parameter(torch._neg_view(shared[0].weight.data))
    with pytest.raises(converters.ConversionError, match="without being the same weight"):
        converters.transform(shared, lambda tree: tree)


@dataclasses.dataclass
class Output:
    logits: torch.Tensor


class GivesAnObject(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)

    def forward(self, x):
        return Output(self.linear(x))


class Autocasts(GivesAnObject):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.linear(x)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (GivesAnObject, "an object of Output; give a module around it whose forward returns"),
        (Autocasts, "run it in one dtype: without torch.autocast"),
    ],
)
def test_ways_out_of_objects_and_casts(make, said):
    with pytest.raises(converters.ConversionError, match=said):
        converters.from_torch(make().eval(), input_shape=(3,))
