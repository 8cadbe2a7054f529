"""Arrays that several operations of a torch forward take, and what is said of odd inputs."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from marks import thorough_but
from torch import nn
from torch_nets import Net

import fwt
from fwt import ConversionError, converters


def linears(bias=True, other=False, kind=nn.Linear, **told):
    one, two = (kind(8, 8, bias=bias, **told), kind(8, 8, bias=bias, **told))
    two.weight = two.weight if other else one.weight
    return Net(lambda m, x: m.b(m.a(x).relu()), a=one, b=two)


def loop(cell, first=lambda x: torch.zeros(x.shape[0], 6)):
    def run(m, x):
        state = first(x)
        state = (state, state) if isinstance(m.c, nn.LSTMCell) else state
        for step in range(x.shape[1]):
            state = m.c(x[:, step], state)
        return m.o(state[0] if isinstance(state, tuple) else state)

    return Net(run, c=cell(4, 6), o=nn.Linear(6, 3))


def own_loop(m, x):
    h = torch.zeros(x.shape[0], 6)
    for step in range(x.shape[1]):
        h = torch.tanh(m.i(x[:, step]) + m.h(h))
    return h


CASES = {
    "an autoencoder": (Net(lambda m, x: F.linear(m.a(x).relu(), m.a.weight.t()),
                           a=nn.Linear(8, 5)), (8,), ["a/bias", "a/weight"]),
    "by a product": (Net(lambda m, x: m.a(x).relu() @ m.a.weight, a=nn.Linear(8, 5)), (3, 8),
                     ["a/bias", "a/weight"]),
    "of a clone": (Net(lambda m, x: F.linear(m.a(x).relu(), m.a.weight.clone().t()),
                       a=nn.Linear(8, 5)), (3, 2, 8), ["a/bias", "a/weight"]),
    "two linears": (linears(), (8,), ["a/bias", "a/weight", "b/bias"]),
    "two without bias": (linears(False), (2, 3, 8), ["a/weight"]),
    "a loop of its own": (Net(own_loop, i=nn.Linear(4, 6), h=nn.Linear(6, 6)), (3, 4),
                          ["h/bias", "h/weight", "i/bias", "i/kernel"]),
    "a GRU cell": (loop(nn.GRUCell), (2, 4), None),
    "an LSTM cell": (loop(nn.LSTMCell), (2, 4), None),
    "a cell from the input": (loop(nn.RNNCell, lambda x: torch.zeros(1, 6) + 0 * x[:, 0, :1]),
                              (2, 4), None),
}  # fmt: skip
QUICK = ("an autoencoder", "two linears", "a loop of its own")


@pytest.mark.parametrize("name", thorough_but(lambda n: n in QUICK, CASES))
def test_one_array_stays_one_leaf(name):
    net, shape, paths = CASES[name]
    model = converters.from_torch(net.eval(), shape, layout="source")
    x = torch.randn(4, *shape)
    back = converters.to_torch(model, layout="source")
    wanted = net(x).detach().numpy()
    np.testing.assert_allclose(model(x.numpy()), wanted, atol=1e-5)
    np.testing.assert_allclose(back(x).detach().numpy(), wanted, atol=1e-6)
    if paths is not None:
        assert sorted(fwt.paths(model)) == paths
        assert set(back.state_dict()) == set(net.state_dict())
    else:  # each array of the cell once, for all steps
        count = sum(p.numel() for p in net.parameters())
        assert sum(np.size(v) for v in fwt.select(model, "**").values()) == count


def test_tied_linears_in_keras(tmp_path):
    net = linears().eval()
    model = converters.from_torch(net, (8,))
    x = torch.randn(4, 8)
    found = np.asarray(converters.to_keras(model)(x.numpy()))
    np.testing.assert_allclose(found, net(x).detach().numpy(), atol=1e-5)
    converters.save(tmp_path / "m.keras", model)
    assert converters.verify(net, tmp_path / "m.keras").ok


def test_a_tied_convolution_is_refused_with_a_way_out():
    one, two = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)
    two.weight = one.weight
    net = Net(lambda m, x: m.b(m.a(x)), a=one, b=two).eval()
    with pytest.raises(ConversionError, match=r"b: it and a share .*a.weight.*clone\(\)\)$"):
        converters.from_torch(net, (3, 6, 7))
    two.weight = torch.nn.Parameter(two.weight.detach().clone())
    x = torch.randn(2, 3, 6, 7)
    model = converters.from_torch(net, (3, 6, 7), layout="source")
    np.testing.assert_allclose(model(x.numpy()), net(x).detach().numpy(), atol=1e-5)


def test_a_table_tells_that_its_input_is_whole_numbers(tmp_path):
    table = nn.Embedding(9, 6)
    head = nn.Linear(6, 9, bias=False)
    head.weight = table.weight
    net = Net(lambda m, x: m.b(m.a(x).tanh()), a=table, b=head).eval()
    model = converters.from_torch(net, (5,))
    assert converters.verify(model, model).ok
    table_ = model.variables["params"]["a"]["weight"].copy()
    table_[7] += 0.01
    other = model._replace(variables={"params": {"a": {"weight": table_}}})
    assert not converters.verify(model, other).ok
    fwt.prune(0.5, fwt.scores.synflow(model), where="a/weight")(model)
    for name in ("m.safetensors", "m.onnx"):
        converters.save(tmp_path / name, model)
        assert converters.verify(model, tmp_path / name).ok


# -- inputs that are none -------------------------------------------------------------------------


def two():
    return Net(lambda m, a, b=None: m.l(a), l=nn.Linear(4, 2))


class Pair(nn.Linear):
    def forward(self, a, b):
        return super().forward(a) + b


X = torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([X, None], r"\[Tensor\(2, 4\), None\]: an input is a tensor, found None: leave it out"),
        ([X, True], "found True: leave it out"),
        ({"xs": X}, "found a dict of them: give a module around it"),
        ([{"x": X}], "found a dict of them"),
        ([[X, X]], "found a list of them"),
        ([X, (4,)], "a tensor for each input, or a shape for each"),
        ("abc", "expected the shape of its input"),
    ],
)
def test_what_is_no_input(given, told):
    with pytest.raises(ConversionError, match=told):
        converters.from_torch(two(), given)


def test_inputs_that_are_missing_or_too_large():
    net = Pair(4, 4)
    with pytest.raises(ConversionError, match=r"all inputs in one list, from_torch\(model, \[a, b"):
        converters.from_torch(net, X, X)
    with pytest.raises(ConversionError, match="its forward takes a, b, found 1"):
        converters.from_torch(Net(lambda m, x: x, l=net).l, X)
    with pytest.raises(ConversionError, match=r"in the order .*, \[a, b\]"):
        converters.from_torch(net, {"b": X, "a": X})
    conv = Net(lambda m, x: m.l(x) + 1, l=nn.Conv2d(3, 2, 3))
    with pytest.raises(ConversionError, match=r"it can on \(3, 8, 7\): leave the batch axis out"):
        converters.from_torch(conv, (2, 3, 8, 7))


class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.l = nn.LSTM(4, 6)

    def forward(self, x):
        return self.l(x)[0][-1]


class Packed(TimeFirst):
    def forward(self, x, n):
        packed = nn.utils.rnn.pack_padded_sequence(x, n, batch_first=True)
        return self.l(packed)[1][0][-1]


def test_sequences_that_are_refused_have_a_way_out():
    with pytest.raises(ConversionError, match=r"its l \(LSTM\) takes the time first.*transpose"):
        converters.from_torch(TimeFirst(), torch.zeros(5, 2, 4))
    around = Net(lambda m, x: m.net(x.transpose(0, 1)), net=TimeFirst()).eval()
    x = torch.randn(3, 5, 4)
    found = converters.from_torch(around, (5, 4))(x.numpy())
    np.testing.assert_allclose(found, around(x).detach().numpy(), atol=1e-6)
    bare = nn.LSTM(4, 6, batch_first=True)
    with pytest.raises(ConversionError, match=r"LSTM: it gives a tuple.*Sequential"):
        converters.from_torch(bare, (5, 4))
    found = converters.from_torch(nn.Sequential(bare), (5, 4))(x.numpy())
    np.testing.assert_allclose(found, bare(x)[0].detach().numpy(), atol=1e-6)
    with pytest.raises(ConversionError, match="pack_padded_sequence follows lengths"):
        converters.from_torch(Packed(), [torch.zeros(2, 5, 4), torch.tensor([5, 3])])


def test_what_was_exported_and_what_is_unknown():
    program = torch.export.export(Net(lambda m, x: x + 1).eval(), (X,))
    with pytest.raises(ConversionError, match=r"torch.export made it.*give the module that was"):
        converters.from_torch(program.module(), X)
    net = Net(lambda m, x: x + 1).eval()
    for scripted in (torch.jit.trace(net, X), nn.Sequential(torch.jit.script(nn.Linear(4, 4)))):
        with pytest.raises(ConversionError, match=r"torch.jit.*give the module that it was made"):
            converters.from_torch(scripted, X)
    assert converters.verify(torch.jit.trace(net, X), net, X.numpy()).ok
    with pytest.raises(ConversionError, match=r"aten.topk.default is not known; give a module"):
        converters.from_torch(Net(lambda m, x: x.topk(2).values), X)
    with pytest.raises(ConversionError, match="float32 of int64; give a module that takes it"):
        converters.from_torch(Net(lambda m, x: x.float()), X.long())


class Autoencoder(nn.Module):
    """One whose decoder has the encoder's weight, transposed."""

    def __init__(self, way):
        super().__init__()
        self.encode, self.way = nn.Linear(6, 4), way

    def forward(self, x):
        h = torch.tanh(self.encode(x))
        weight = self.encode.weight
        return h @ weight if self.way == "product" else F.linear(h, weight.t())


@pytest.mark.parametrize("way", ["linear", "product"])
def test_a_weight_that_is_tied_transposed(way, tmp_path):
    net = Autoencoder(way).eval()
    model = converters.from_torch(net, input_shape=(6,))
    with pytest.raises(ConversionError, match=r"it takes encode/weight transposed.*untie"):
        converters.to_keras(*model)
    with pytest.raises(ConversionError, match="transposed"):
        converters.save(tmp_path / "net.keras", *model)
    converters.save(tmp_path / "net.onnx", *model)
    for other in (tmp_path / "net.onnx", converters.to_torch(*model), model):
        assert converters.verify(net, other, input_shape=(6,)).ok
