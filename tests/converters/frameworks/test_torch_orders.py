"""Weights of torch that count several axes come back in torch's order, under their names and in
their shapes, whatever order Flax has the axes in."""

import jax
import numpy as np
import pytest
import torch
from marks import thorough_but
from torch import nn
from torch_nets import Net

from fwt import ConversionError, converters

SQUARE = (3, 5, 5)  # where equal sizes would not show another order
C = 4


def conv():
    return nn.Conv2d(3, C, 1)


NETS = {
    "a Linear behind a permuted image": lambda h, w: Net(
        lambda m, x: m.l(m.c(x).permute(0, 2, 3, 1).flatten(1)), c=conv(), l=nn.Linear(C * h * w, 2)
    ),
    "a Linear behind a turned image": lambda h, w: Net(
        lambda m, x: m.l(m.c(x).transpose(2, 3).flatten(1)), c=conv(), l=nn.Linear(C * h * w, 2)
    ),
    "two that take one image in two orders": lambda h, w: Net(
        lambda m, x: m.a(m.c(x).flatten(1)) + m.b(m.c(x).transpose(1, 3).flatten(1)),
        c=conv(), a=nn.Linear(C * h * w, 2), b=nn.Linear(C * h * w, 2),
    ),
    "a LayerNorm over three axes": lambda h, w: Net(
        lambda m, x: m.n(m.c(x).permute(0, 2, 3, 1)), c=conv(), n=nn.LayerNorm((h, w, C))
    ),
    "a LayerNorm over two": lambda h, w: Net(
        lambda m, x: m.n(m.c(x).transpose(2, 3)), c=conv(), n=nn.LayerNorm((w, h))
    ),
    "a LayerNorm without the channels": lambda h, w: Net(
        lambda m, x: m.n(m.c(x).mean(1).mT), c=conv(), n=nn.LayerNorm((w, h))
    ),
    "learned arrays and buffers": lambda h, w: Net(
        lambda m, x: m.c(x).transpose(2, 3) * m.p + m.b - m.row + m.last,
        c=conv(), p=nn.Parameter(torch.rand(w, h)), b=nn.Buffer(torch.rand(C, w, h)),
        row=nn.Buffer(torch.rand(h)), last=nn.Parameter(torch.rand(1, h)),
    ),
    "arrays for an image with the channels last": lambda h, w: Net(
        lambda m, x: m.c(x).permute(0, 2, 3, 1) * m.p + m.b, c=conv(),
        p=nn.Parameter(torch.rand(h, w, C)), b=nn.Buffer(torch.rand(w, C)),
    ),
}  # fmt: skip


QUICK = ("a LayerNorm over two", "a Linear behind a permuted image", "learned arrays and buffers")


def randomised(net):
    with torch.no_grad():
        for p in net.parameters():
            p.normal_()
    return net.eval()


@pytest.mark.parametrize("name", thorough_but(lambda n: n in QUICK, NETS))
def test_state_comes_back_in_the_order_of_torch(name, tmp_path):
    for shape, layout in (((3, 5, 6), "channels_last"), (SQUARE, "source")):
        net = randomised(NETS[name](*shape[1:]))
        model = converters.from_torch(net, shape, layout=layout)
        back = converters.to_torch(
            model, layout="source" if layout == "source" else "channels_first"
        )
        state, found = net.state_dict(), back.state_dict()
        assert set(found) == set(state)
        assert all(torch.equal(found[k], v) for k, v in state.items())
        back.load_state_dict(state)  # both ways
        net.load_state_dict(found)
        # A state dict of another one goes in by name, and a file gives it back.
        other = randomised(NETS[name](*shape[1:]))
        torch.save(other.state_dict(), tmp_path / "w.pt")
        filled = converters.load(tmp_path / "w.pt", architecture=model)
        wanted = converters.from_torch(other, shape, layout=layout)
        same = jax.tree.map(np.array_equal, filled.variables, wanted.variables)
        assert all(jax.tree.leaves(same))
        converters.save(tmp_path / "v.pt", model)
        held = torch.load(tmp_path / "v.pt")
        assert all(torch.equal(held[k], v) for k, v in state.items())


def test_an_order_that_is_natural_is_not_told():
    net = nn.Sequential(conv(), nn.LayerNorm((5, 6)), nn.Flatten(), nn.Linear(C * 30, 2))
    model = converters.from_torch(net, (3, 5, 6))
    assert model.module.sidecar == ""


def test_orders_stay_beside_what_a_sidecar_keeps(tmp_path):
    net = randomised(NETS["a LayerNorm over two"](5, 6))
    model = converters.from_torch(net, (3, 5, 6), sidecar=True)
    converters.save(tmp_path / "w.safetensors", model)
    back = converters.to_torch(converters.load(tmp_path / "w.safetensors"))
    assert all(torch.equal(back.state_dict()[k], v) for k, v in net.state_dict().items())


def test_an_order_that_does_not_fit_is_refused():
    net = randomised(NETS["a LayerNorm over two"](5, 6))
    module, variables = converters.from_torch(net, (3, 5, 6))
    for order in ("null", "[0, 2, 1]"):
        told = f'{{"framework": "torch", "layers": {{}}, "orders": {{"n": {order}}}}}'
        with pytest.raises(ConversionError, match=r"n .LayerNorm.: the order in which torch"):
            converters.to_torch(module.clone(sidecar=told), variables)
    told = '{"framework": "torch", "layers": {}, "orders": {"n": [0, 1, 1, 2]}}'
    with pytest.raises(ConversionError, match="the sidecar is none of ours"):
        converters.to_torch(module.clone(sidecar=told), variables)
    dropped = converters.to_torch(module.clone(sidecar=""), variables)
    x = torch.randn(2, 3, 5, 6)
    assert dropped(x).shape == (2, C, 6, 5)


def test_a_part_of_a_buffer_keeps_the_whole():
    """As a table of positions is cut to the length of the input; in Keras it is a constant."""
    net = Net(lambda m, x: m.l(x) + m.pe[:, : x.shape[1]], l=nn.Linear(8, 8),
              pe=nn.Buffer(torch.randn(1, 50, 8)))  # fmt: skip
    model = converters.from_torch(net, (7, 8))
    back, x = converters.to_torch(model), torch.randn(2, 7, 8)
    assert all(torch.equal(back.state_dict()[k], v) for k, v in net.state_dict().items())
    expected = net(x).detach().numpy()
    np.testing.assert_allclose(back(x).detach(), expected, atol=1e-5)
    np.testing.assert_allclose(converters.to_keras(model)(x.numpy()), expected, atol=1e-5)


def test_a_learned_array_is_turned_itself(tmp_path):
    """Also where other layers stand before what it meets; a transposition of it would seem to move
    the batch."""

    def forward(m, x):
        y = x.view(-1, 1, 6, 1).permute(0, 2, 1, 3) * m.g
        z = m.a(x).tanh()
        return m.l(y).flatten(1) + z

    net = Net(forward, g=nn.Parameter(torch.randn(1, 1, 1)), l=nn.Linear(1, 3), a=nn.Linear(6, 18))
    x = torch.randn(2, 6)
    model = converters.from_torch(net, (6,), layout="source")
    converters.save(tmp_path / "w.safetensors", model)
    assert converters.load(tmp_path / "w.safetensors").module == model.module
    back = converters.to_torch(model, layout="source")
    assert torch.equal(back.state_dict()["g"], net.g)
    np.testing.assert_allclose(back(x).detach(), net(x).detach(), atol=1e-6)
