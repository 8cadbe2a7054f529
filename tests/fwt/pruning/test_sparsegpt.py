"""SparseGPT against least squares and against pruning alone."""

import threading

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from marks import thorough_but

import fwt
from fwt import _calls, converters
from fwt import layers as fl

two_of_four = fwt.patterns.n_m(2, 4)


def correlated(key, n, size):
    return jax.random.normal(jax.random.key(key), (n, size)) @ jnp.tri(size) / size**0.5


def dense(size=24, outputs=6):
    net = fwt.Sequential([("d", nn.Dense(outputs))])
    x = correlated(0, 300, size)
    return net, net.init(jax.random.key(1), x), x


def error(net, new, old, x):
    return float(jnp.mean((net.apply(new, x) - net.apply(old, x)) ** 2))


@pytest.mark.parametrize(
    ("settings", "block"),
    thorough_but(
        3,
        [({"sparsity": 0.5}, 20), ({"pattern": two_of_four}, 4), ({"sparsity": 0.7}, 128),
         ({"sparsity": 0.5}, 4), ({"pattern": two_of_four}, 20), ({"pattern": two_of_four}, 128)],
    ),
)  # fmt: skip
def test_it_is_nearer_than_pruning_alone_and_not_nearer_than_least_squares(settings, block):
    net, variables, x = dense()
    new = fwt.sparsegpt(net, variables, x, block=block, **settings)
    kernel = np.asarray(new["params"]["d"]["kernel"])
    share = settings.get("sparsity", 0.5)
    assert (kernel == 0).sum() == round(share * kernel.size)
    if "pattern" in settings:
        assert (np.count_nonzero(kernel.reshape(6, 4, 6), axis=1) == 2).all()
    assert np.array_equal(new["params"]["d"]["bias"], variables["params"]["d"]["bias"])
    ours = error(net, new, variables, x)
    alone = error(net, fwt.prune(**settings)(variables), variables, x)
    assert ours < 0.5 * alone
    old, best = np.asarray(variables["params"]["d"]["kernel"]), np.zeros_like(kernel)
    for j in range(kernel.shape[1]):
        on = kernel[:, j] != 0
        best[on, j] = np.linalg.lstsq(np.asarray(x)[:, on], np.asarray(x) @ old[:, j], rcond=None)[
            0
        ]
    fitted = {"params": {"d": {**variables["params"]["d"], "kernel": jnp.asarray(best)}}}
    assert error(net, fitted, variables, x) <= ours * 1.01


def test_one_pruned_input_is_made_good_as_least_squares_does():
    """What goes from the first input may be spread over all others: the exact solution."""
    net, variables, x = dense(8, 1)
    x = x.at[:, 0].set(x[:, 0] * 1e-3 + 0.1 * x[:, 3])  # the first input goes
    new = fwt.sparsegpt(net, variables, x, 1 / 8, damping=1e-7)
    kernel, old = (np.asarray(v["params"]["d"]["kernel"]) for v in (new, variables))
    assert np.flatnonzero(kernel == 0).tolist() == [0]
    rest = np.asarray(x, np.float64)[:, 1:]
    best = np.linalg.lstsq(rest, np.asarray(x, np.float64) @ old, rcond=None)[0]
    np.testing.assert_allclose(kernel[1:], best, atol=2e-3)


@pytest.mark.thorough
def test_a_conv_net_layer_by_layer():
    layers = [("c", nn.Conv(8, (3, 2), strides=(2, 1))), ("n", nn.BatchNorm()), fl.ReLU()]
    layers += [("c2", nn.Conv(4, (2, 2), padding="VALID")), fl.Flatten(), ("d", nn.Dense(3))]
    net = fwt.Sequential(layers, input_shape=(8, 6, 4))
    noise = jax.random.normal(jax.random.key(0), (200, 8, 6, 4))
    x = jnp.cumsum(jnp.cumsum(noise, 1), 2) / 4  # neighbours are alike, as in images
    variables = net.init(jax.random.key(1), x)
    new = fwt.sparsegpt(net, variables, x, 0.6)
    for path, w in fwt.select(new, fwt.kernels).items():
        assert int((w == 0).sum()) == round(0.6 * w.size), path
    assert new["batch_stats"] is variables["batch_stats"] or jax.tree.all(
        jax.tree.map(np.array_equal, new["batch_stats"], variables["batch_stats"])
    )
    pruned = fwt.prune(0.6)(variables)
    assert error(net, new, variables, x) < 0.6 * error(net, pruned, variables, x)
    some = fwt.sparsegpt(net, variables, x, pattern=two_of_four, where=["c/kernel", "c2/kernel"])
    found = np.asarray(some["params"]["c"]["kernel"]).reshape(6, 1, 4, 8)
    assert (np.count_nonzero(found, axis=2) == 2).all()
    assert np.array_equal(some["params"]["d"]["kernel"], variables["params"]["d"]["kernel"])


class Block(nn.Module):
    """What no line of layers is: attention, a sum of two branches, a layer inside another."""

    @nn.compact
    def __call__(self, x):
        y = nn.MultiHeadDotProductAttention(num_heads=2, name="a")(nn.LayerNorm(name="n")(x))
        x = x + y
        return x + nn.Dense(8, name="down")(nn.gelu(nn.Dense(24, name="up")(x)))


class Graph(nnx.Module):
    def __init__(self, rngs):
        self.a = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.n = nnx.LayerNorm(8, rngs=rngs)
        self.up, self.down = nnx.Linear(8, 24, rngs=rngs), nnx.Linear(24, 8, rngs=rngs)

    def __call__(self, x):
        x = x + self.a(self.n(x))
        return x + self.down(nnx.gelu(self.up(x)))


def block():
    x = jnp.cumsum(jax.random.normal(jax.random.key(0), (60, 5, 8)), -1) / 2
    module = Block()
    variables = module.init(jax.random.key(1), x)
    graph = Graph(nnx.Rngs(0))
    nnx.update(graph, variables["params"])
    np.testing.assert_allclose(graph(x), module.apply(variables, x), atol=1e-5)
    return module, variables, graph, x


@pytest.mark.thorough
def test_any_linen_module_and_nnx():
    module, variables, graph, x = block()
    new = fwt.sparsegpt(module, variables, x, 0.5)
    for path, w in fwt.select(new, fwt.kernels).items():
        assert int((w == 0).sum()) == w.size // 2, path
    y = module.apply(variables, x)

    def far(params):
        return float(jnp.mean((module.apply(params, x) - y) ** 2))

    outer = ["a/out/kernel", "down/kernel"]
    some = fwt.sparsegpt(module, variables, x, 0.5, where=outer)
    assert far(some) < 0.7 * far(fwt.prune(0.5, where=outer)(variables))
    before = nnx.state(graph, nnx.Param)
    state = nnx.state(graph, nnx.Param)
    for given in (graph, state):
        made = fwt.select(fwt.sparsegpt(graph, given, x, 0.5), fwt.kernels)
        wanted = fwt.select(new, fwt.kernels)
        assert made.keys() == wanted.keys()
        for path, w in wanted.items():
            np.testing.assert_allclose(made[path], w, atol=2e-3, err_msg=path)
    assert jax.tree.all(jax.tree.map(np.array_equal, before, nnx.state(graph, nnx.Param)))
    assert type(graph.up) is nnx.Linear


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(8, name="d")
        return layer(jnp.tanh(layer(x)))


@pytest.mark.thorough
def test_what_can_not_be_mended_is_refused_by_name():
    *_, x = block()
    for module, said in (
        (Twice(), "d/kernel meets inputs in two places"),
        (nn.Sequential([nn.RNN(nn.SimpleCell(8))]), "lifted transformation"),
        (nn.Sequential([nn.Conv(4, (3,), feature_group_count=2)]), "is of a Conv, and only"),
    ):
        variables = module.init(jax.random.key(0), x)
        with pytest.raises(fwt.LeafError, match=said):
            fwt.sparsegpt(module, variables, x, 0.5)


def test_silent_inputs_go_and_wrong_calls_say_so():
    net, variables, x = dense()
    quiet = x.at[:, :12].set(0)
    kernel = fwt.sparsegpt(net, variables, quiet, 0.5)["params"]["d"]["kernel"]
    assert not kernel[:12].any()
    assert kernel[12:].all()

    def bad(said, *arguments, **settings):
        with pytest.raises(fwt.FwtError, match=said):
            fwt.sparsegpt(*arguments, **settings)

    bad("a sparsity, or n_m", net, variables, x)
    bad("a sparsity, or n_m", net, variables, x, 0.5, pattern=two_of_four)
    bad("0 to 1", net, variables, x, 5)
    bad("unstructured or n_m", net, variables, x, 0.5, pattern=fwt.patterns.channel)
    bad("multiple of 4", net, variables, x, pattern=two_of_four, block=6)
    bad("takes a Flax module", print, variables, x, 0.5)
    bad("no samples", net, variables, x[:0], 0.5)
    bad("a Tensor of torch.*np.asarray", net, variables, torch.ones(9, 24), 0.5)
    known = net.clone(input_shape=(24,))
    bad(r"give an array of shape \(n, 24\)", known, variables, jnp.ones((9, 2, 7)), 0.5)
    bad("not finite", net, variables, x.at[0, 0].set(jnp.nan), 0.5)
    narrow, few, y = dense(6)
    with pytest.raises(fwt.LeafError, match=r"6 inputs, which 4 does not divide.*no leaf is left"):
        fwt.sparsegpt(narrow, few, y, pattern=two_of_four)
    bad("as module.init", net, variables["params"], x, 0.5)
    grouped = fwt.Sequential([("c", nn.Conv(4, (3,), feature_group_count=2))])
    x = jnp.ones((2, 9, 4))
    bad("without groups", grouped, grouped.init(jax.random.key(0), x), x, 0.5)


def test_the_count_is_exact_with_silent_inputs():
    net, variables, x = dense(16)
    new = fwt.sparsegpt(net, variables, x.at[:, ::2].set(0), 0.25)
    kernel = new["params"]["d"]["kernel"]
    assert int((kernel == 0).sum()) == 24
    assert (kernel[::2] == 0).sum() > (kernel[1::2] == 0).sum()


class Turned(nn.Module):
    axis: tuple

    @nn.compact
    def __call__(self, x):
        return nn.DenseGeneral(7, axis=self.axis, use_bias=False)(x)


def test_axes_that_are_not_in_order_and_layers_that_compute_with_another_kernel():
    x = jax.random.normal(jax.random.key(0), (200, 5, 3)) * jnp.arange(1, 6)[None, :, None]
    kernels = []
    for axis in ((1, 2), (2, 1), (-1, -2)):
        module = Turned(axis)
        variables = module.init(jax.random.key(1), x)
        new = fwt.sparsegpt(module, variables, x, 0.5)
        kernels.append(new["params"]["DenseGeneral_0"]["kernel"])
    assert np.array_equal(kernels[0], kernels[1])
    assert np.array_equal(kernels[0], kernels[2])
    mask = jnp.ones((3, 4, 12)).at[0].set(0)
    flat = x.reshape(-1, 15)[:, :4]
    for module, inputs, said in (
        (nn.Sequential([nn.Conv(12, (3,), mask=mask)]), jnp.ones((2, 9, 4)), "or a mask can be"),
        (nn.WeightNorm(nn.Dense(3)), flat, "another kernel than this"),
    ):
        variables = module.init(jax.random.key(2), inputs)
        with pytest.raises(fwt.FwtError, match=said):
            fwt.sparsegpt(module, variables, inputs, 0.5)


def test_a_model_stands_for_its_module_and_variables():
    net, variables, x = dense()
    model = fwt.Model(net, variables)
    for found, expected in (
        (fwt.sparsegpt(model, x, 0.5), fwt.sparsegpt(net, variables, x, 0.5)),
        (fwt.sparsegpt(model, batch=x, sparsity=0.5), fwt.sparsegpt(net, variables, x, 0.5)),
        (fwt.lsuv(model, x, 0), fwt.lsuv(net, variables, x, 0)),
        (fwt.lsuv(model, x, key=0, where="d/kernel"), fwt.lsuv(net, variables, x, 0)),
    ):
        assert found.module is net
        assert jax.tree.all(jax.tree.map(np.array_equal, found.variables, expected))
    graph = nnx.Sequential(nnx.Linear(24, 3, rngs=nnx.Rngs(0)))
    one, two = fwt.sparsegpt(graph, x, 0.5), fwt.sparsegpt(graph, graph, x, 0.5)
    assert np.array_equal(one.layers[0].kernel[...], two.layers[0].kernel[...])
    assert int((one.layers[0].kernel[...] == 0).sum()) == 36

    def bad(said, function, *arguments, **settings):
        with pytest.raises(fwt.FwtError, match=said):
            function(*arguments, **settings)

    for function, last in ((fwt.sparsegpt, 0.5), (fwt.lsuv, 0)):
        bad("holds its variables, so dict after it is one", function, model, variables, x, last)
        bad("holds its variables, so Model after it is one", function, model, model, x, last)
        bad(r"needs a batch of inputs.*\(model, batch, ", function, model)
        bad(r"after .*module, or a Model: \w+\(model, batch", function, net, x, last)
        bad(r"from_torch\(model\) gives a Model", function, torch.nn.Linear(24, 3), x, last)
    bad("takes a Flax module, found None", fwt.sparsegpt, fwt.Model(None, variables), x, 0.5)


def test_a_layer_that_is_not_linear_is_asked_for_where_it_is_chosen():
    net = torch.nn.Sequential(
        torch.nn.LSTM(4, 6, batch_first=True), converters.Select("last"), torch.nn.Linear(6, 8)
    )
    model = converters.from_torch(net, input_shape=(5, 4))
    batch = np.random.default_rng(0).normal(size=(16, 5, 4)).astype(np.float32)
    head = next(p for p in fwt.select(model, fwt.kernels) if p.startswith("2/"))
    found = fwt.select(fwt.sparsegpt(model, batch, 0.5, where=head), "**")
    assert (np.asarray(found[head]) == 0).sum() == 24
    with pytest.raises(
        fwt.LeafError, match=r"no linear layer.*: leave them out with where=\['2/kernel'\]"
    ):
        fwt.sparsegpt(model, batch, 0.5, where="**")


class Rows(nn.Module):
    """Blocks that are kept, computed again for a gradient, or stacked."""

    how: str = "kept"

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(12, name="in")(x)
        if self.how == "scan":
            many = nn.scan(_Row, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
            return many(name="rows")(x, None)[0]
        row = _Row if self.how == "kept" else nn.remat(_Row)
        for name in ("a", "b"):
            x, _ = row(name=name)(x, None)
        if self.how == "remat":
            return nn.remat(lambda module, y: nn.Dense(4, name="out")(y))(self, x)
        return nn.Dense(4, name="out")(x)


class _Row(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return jnp.tanh(nn.Dense(12, name="up")(x)), None


def test_layers_under_remat_are_those_without_it():
    """For those who look at inputs too; and remat is in force again behind them."""
    *_, x = block()
    variables = Rows().init(jax.random.key(0), x)
    for change in (
        lambda net: fwt.sparsegpt(net, variables, x, 0.5),
        lambda net: fwt.prune(0.5, fwt.scores.wanda(net, x))(variables),
        lambda net: fwt.lsuv(net, variables, x, 0),
    ):
        found, expected = change(Rows("remat")), change(Rows())
        assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))
        assert not jax.tree.all(jax.tree.map(np.array_equal, found, variables))
    text = str(jax.make_jaxpr(lambda v: Rows("remat").apply(v, x))(variables))
    assert text.count("prevent_cse=True") == 3


def test_all_that_can_not_be_mended_is_named_at_once():
    *_, x = block()
    net = Rows("scan")
    variables = net.init(jax.random.key(0), x)
    for change in (
        lambda **how: fwt.sparsegpt(net, variables, x, 0.5, **how),
        lambda **how: fwt.prune(0.5, fwt.scores.wanda(net, x), **how)(variables),
    ):
        with pytest.raises(
            fwt.LeafError, match=r"rows/up/kernel runs inside .*where=\['in/k"
        ) as told:
            change()
        assert "module that calls each of its layers itself" in str(told.value)
        change(where=["in/kernel"])

    mixed = fwt.Sequential([
        ("first", nn.Conv(4, (3,))), ("grouped", nn.Conv(4, (3,), feature_group_count=2)),
        ("wide", nn.ConvTranspose(4, (3,))), ("last", nn.Dense(2)),
    ])  # fmt: skip
    x = jax.random.normal(jax.random.key(1), (9, 8, 4))
    variables = mixed.init(jax.random.key(0), x)
    with pytest.raises(fwt.LeafError) as told:
        fwt.sparsegpt(mixed, variables, x, 0.5)
    said = str(told.value)
    assert "grouped/kernel is of a Conv, and only" in said
    assert "wide/kernel is of a ConvTranspose, and only" in said
    where = ["first/kernel", "last/kernel"]
    assert f"leave them out with where={where}" in said
    pruned = fwt.sparsegpt(mixed, variables, x, 0.5, where=where)["params"]
    assert int((pruned["first"]["kernel"] == 0).sum()) == 24
    with pytest.raises(fwt.LeafError, match="no leaf is left, and"):
        fwt.sparsegpt(mixed, variables, x, 0.5, where=["grouped/kernel"])


def test_remat_comes_back_after_calls_that_overlap():
    before, found = jax.remat, []
    entered, left = threading.Event(), threading.Event()

    def other():
        with _calls.forward():
            entered.set()
            left.wait()
            found.append(jax.remat(len) is len)

    thread = threading.Thread(target=other)
    with _calls.forward():
        thread.start()
        entered.wait()
    here = jax.remat(len)  # while the other still runs
    left.set()
    thread.join()
    assert here is not len
    assert found == [True]
    assert jax.remat is before
