"""What a torch forward computes from sizes is right at others, or refused by the Graph."""

import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from marks import thorough_but
from torch import nn
from torch_nets import Net

from fwt import ConversionError, FwtError, converters
from fwt.converters.frameworks import torch_sizes


def recurrent(function, **told):
    width = 6 * (2 if told.get("bidirectional") else 1)
    return Net(function, l=nn.LSTM(4, 6, batch_first=True, **told), o=nn.Linear(width, 2))


def linear(function):
    return Net(function, o=nn.Linear(4, 4))


def image(function):
    return Net(function, c=nn.Conv2d(3, 4, 3, padding=1))


def rolled(m, x):
    return m.o(x.roll(2, 1))


def tail(m, x):
    return m.o(x[:, -3:]).mean(1)


def inner(m, x):
    return m.o(x[:, 1:-1])


def both_states(m, x):
    _, (h, _) = m.l(x)
    return m.o(torch.cat([h[-2], h[-1]], 1))


def heads(m, x):
    b, t, c = x.shape
    q = m.o(x).view(b, t, 2, 2).transpose(1, 2)
    return (q @ q.transpose(2, 3) @ q).transpose(1, 2).reshape(b, t, c)


def looped(m, x):
    for _ in range(x.size(1)):
        x = torch.tanh(m.o(x))
    return x


def tail_of_sizes(m, x):
    return m.o(x[:, x.shape[1] - 2])


def masked(m, x):
    later = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
    return torch.softmax((x @ x.mT).masked_fill(later, -torch.inf), -1) @ m.o(x)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.o = nn.Linear(4, 4)

    def forward(self, x):
        return self.o(x / x.shape[1])


class Inherited(Scaled):
    def forward(self, x):
        return super().forward(x) + 1


there = types.ModuleType("there")
there.scaled = lambda x: x / x.shape[1]
NAME = "shape"


ANY = {
    "the last step": recurrent(lambda m, x: m.o(m.l(x)[0][:, -1])),
    "the last state": recurrent(lambda m, x: m.o(m.l(x)[1][0][-1])),
    "both last states": recurrent(both_states, bidirectional=True),
    "the last three": linear(tail),
    "but the ends": linear(inner),
    "entries by a list": linear(lambda m, x: m.o(x[:, [-1, 0, 1, -2]])),
    "rolled": linear(rolled),
    "rolled back": linear(lambda m, x: m.o(x.roll(-1, 1))),
    "a mean": linear(lambda m, x: m.o(x.mean(1)) * 0.5),
}  # fmt: skip
ONE = {
    "half of it": linear(lambda m, x: m.o(x[:, : x.size(1) // 2])),
    "a sum by the length": linear(lambda m, x: m.o(x.sum(1) / x.shape[1])),
    "a deviation": linear(lambda m, x: m.o(x.std(1))),
    "heads": linear(heads),
    "chunks": linear(lambda m, x: m.o(x).chunk(2, 1)[0].mean(1)),
    "a mask of its own": linear(masked),
    "a triangle": linear(lambda m, x: (x @ x.mT).tril() @ m.o(x)),
    "a loop": linear(looped),
    "a step by its number": linear(tail_of_sizes),
    "rolled by three": linear(lambda m, x: m.o(x.roll(3, 1))),
    "rolled back by four": linear(lambda m, x: m.o(x.roll(-4, 1))),
    "its parity": linear(lambda m, x: m.o(x * 2 if x.shape[1] % 2 else x)),
    "its inherited forward": Inherited(),
    "a function of a module": linear(lambda m, x: m.o(there.scaled(x))),
    "a shape by its name": linear(lambda m, x: m.o(x / getattr(x, NAME)[1])),
    "unbound": linear(lambda m, x: m.o(x.unbind(1)[-1])),
    "positions": Net(lambda m, x: m.o(x + m.p[: x.shape[1]]), o=nn.Linear(4, 2),
                     p=nn.Parameter(torch.randn(16, 4))),
    "positions by number": Net(lambda m, x: m.o(x + m.p(torch.arange(x.shape[1]))),
                               o=nn.Linear(4, 2), p=nn.Embedding(16, 4)),
}  # fmt: skip


def both_of(net, shape):
    model = converters.from_torch(net.eval(), shape, layout="source")
    return model, converters.to_torch(model, layout="source")


def check_any(net, shape, other):
    model, back = both_of(net, shape)
    assert getattr(model.module, "fixed", ()) == ()
    x = torch.randn(2, *other)
    wanted = net(x).detach().numpy()
    for found in (model(x.numpy()), back(x).detach().numpy()):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def check_one(net, shape, other, by):
    model, back = both_of(net, shape)
    x = torch.randn(2, *shape)
    for found in (model(x.numpy()), back(x).detach().numpy()):
        np.testing.assert_allclose(found, net(x).detach().numpy(), atol=1e-5)
    told = f"converted for {by} along axis"
    with pytest.raises(FwtError, match=f"{told} .*from_torch"):
        model(np.zeros((2, *other), np.float32))
    with pytest.raises(AssertionError, match=told):
        back(torch.zeros(2, *other))


QUICK = ("the last step", "the last three", "entries by a list", "rolled", "rolled by three",
         "a sum by the length", "a deviation", "positions", "its inherited forward")  # fmt: skip


@pytest.mark.parametrize("name", thorough_but(lambda n: n in QUICK, ANY))
def test_what_counts_from_the_end_is_right_at_any_length(name):
    check_any(ANY[name], (5, 4), (8, 4))


@pytest.mark.parametrize("name", thorough_but(lambda n: n in QUICK, ONE))
def test_what_follows_from_the_length_is_refused_at_another(name):
    check_one(ONE[name], (5, 4), (8, 4), 5)


def test_what_follows_from_the_parity_of_an_even_length():
    check_one(ONE["its parity"], (8, 4), (7, 4), 8)


def test_images_of_any_size_and_of_one():
    check_any(
        image(lambda m, x: F.interpolate(m.c(x).relu(), scale_factor=2)), (3, 6, 8), (3, 5, 7)
    )
    check_any(image(lambda m, x: m.c(x).flatten(2).mean(2)), (3, 6, 8), (3, 5, 7))
    up = image(lambda m, x: F.interpolate(F.max_pool2d(m.c(x), 2), size=x.shape[2:]))
    check_one(up, (3, 6, 8), (3, 12, 8), 6)
    model = converters.from_torch(up, (3, 6, 8))
    assert model.module.fixed == ((6, 8, None),)  # as the layout has the axes
    with pytest.raises(FwtError, match=r"the shape \(6, 8, any\)"):
        model(np.zeros((2, 12, 8, 3), np.float32))


@pytest.mark.thorough
def test_two_inputs_of_one_length():
    net = Net(lambda m, x, y: m.o((x + y).sum(1) / x.shape[1]), o=nn.Linear(4, 2))
    model = converters.from_torch(net.eval(), [(5, 4), (5, 4)])
    assert model.module.fixed == ((5, None), (5, None))
    with pytest.raises(FwtError, match="the input xs_0: expected"):
        model(np.zeros((2, 6, 4), np.float32), np.zeros((2, 6, 4), np.float32))


def test_the_size_is_kept_in_files_and_said_of_another_shape(tmp_path):
    model = converters.from_torch(ONE["a sum by the length"], (5, 4))
    converters.save(tmp_path / "m.safetensors", model)
    loaded = converters.load(tmp_path / "m.safetensors")
    assert loaded.module == model.module
    assert converters.verify(model, loaded).ok
    with pytest.raises(FwtError, match="converted for 5"):
        converters.to_nnx(loaded)(np.zeros((2, 8, 4), np.float32))
    with pytest.raises(ConversionError, match=r"input_shape=: the input .* converted for 5"):
        converters.to_torch(loaded, input_shape=(8, 4))
    with pytest.raises(FwtError, match="fixed="):
        model.module.clone(fixed=((0,),))


def _half(x):
    return x[:, : len(x[0]) // 2]


def test_who_asks_for_sizes():
    assert not torch_sizes.asks(nn.Sequential(nn.Linear(2, 2)))
    assert not torch_sizes.asks(Net(lambda m, x: m.o(x) + 1, o=nn.Linear(2, 2)))
    assert torch_sizes.asks(Net(lambda m, x: x.shape))
    assert torch_sizes.asks(Inherited())
    assert torch_sizes.asks(Net(lambda m, x: _half(x)))
    assert torch_sizes.asks(nn.Sequential(Net(lambda m, x: [_half(y) for y in (x, x)])))
