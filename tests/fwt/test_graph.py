"""The type Graph: names, values at init, and what every module of ours can do."""

import pickle
import types
import weakref
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fwt
from fwt import layers as fl


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        y = nn.Dense(4, name="first")(x)
        y = nn.BatchNorm(use_running_average=not train, name="norm")(y)
        scale = self.param("scale", nn.initializers.zeros, (4,))
        return y * scale + nn.Dense(4, name="second")(y)


class Nested(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(3, name="out")(Block(name="block")(x, train))


def graph(**more):
    return fwt.Graph(
        [
            ("block/first", nn.Dense(4), "input"),
            ("block/norm", nn.BatchNorm(), "block/first"),
            ("block/scale", fl.Parameter((4,)), ()),
            ("block/product", fl.Multiply(), ("block/norm", "block/scale")),
            ("block/second", nn.Dense(4), "block/norm"),
            ("block/sum", fl.Add(), ("block/product", "block/second")),
            ("out", nn.Dense(3), "block/sum"),
        ],
        input_shape=(5,),
        **more,
    )


X = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)


def test_init_and_training_are_those_of_nested_modules():
    key = jax.random.key(3)
    variables, wanted = graph().init(key, X), Nested().init(key, X)
    assert jax.tree.structure(variables) == jax.tree.structure(wanted)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), variables, wanted))
    for train in (False, True):
        mine, theirs = (
            m.apply(variables, X, train=train, mutable=["batch_stats"]) for m in (graph(), Nested())
        )
        assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), mine, theirs))


def test_a_graph_can_be_hashed_compared_pickled_and_traced_once():
    one, other = graph(), graph(outputs={"a": "out", "b": "block/sum"})
    assert one == graph()
    assert hash(one) == hash(graph())
    assert one != other
    for each in (one, other):
        assert pickle.loads(pickle.dumps(each)) == each
        assert repr(each).count("\n") == 9
    traces = []

    @jax.jit
    def run(model, x):
        traces.append(1)
        return model(x)

    variables = one.init(jax.random.key(0), X)
    for _ in range(2):
        run(fwt.Model(graph(), variables), X)
    assert len(traces) == 1
    found = fwt.Model(other, variables)(X)
    assert {k: v.shape for k, v in found.items()} == {"a": (6, 3), "b": (6, 4)}
    slopes = jax.grad(lambda v: one.apply(v, X).sum())(variables)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(slopes))
    assert jax.vmap(lambda x: one.apply(variables, x))(X[:, None]).shape == (6, 1, 3)
    assert jax.checkpoint(lambda x: one.apply(variables, x))(X).shape == (6, 3)


def test_several_inputs_and_a_layer_that_is_called_again():
    net = fwt.Graph(
        [
            ("encode", nn.Dense(4), "left"),
            fwt.Node("again", None, ("right",), of="encode"),
            ("apart", fl.Subtract(), ("encode", "again")),
        ],
        inputs={"a": "left", "b": "right"},
    )
    variables = net.init(jax.random.key(0), X, X)
    assert fwt.paths(variables) == ["encode/bias", "encode/kernel"]
    kernel = variables["params"]["encode"]["kernel"]
    for given in ((X, X + 1), ([X, X + 1],), ({"b": X + 1, "a": X},)):
        np.testing.assert_allclose(
            net.apply(variables, *given), -np.ones((6, 5)) @ kernel, 1e-4, 1e-5
        )
    for given, said in (((X,), "found 1"), (({"a": X},), "expected the inputs a, b")):
        with pytest.raises(fwt.FwtError, match=said):
            net.apply(variables, *given)


def test_models_among_the_layers_are_taken_apart():
    inner = fwt.Sequential([("dense", nn.Dense(3)), nn.relu])
    net = fwt.Graph([("a", inner, "input"), ("b", graph(), "input"), ("c", fl.Add(), ("a", "b"))])
    assert [n.name for n in fwt.nodes_of(net)][:2] == ["a/dense", "a/1"]
    assert net.nodes[-1].inputs == ("a/1", "b/out")
    chain = fwt.Sequential([("x", inner), ("y", graph())])
    assert [n.inputs for n in fwt.nodes_of(chain)][:3] == [("input",), ("x/dense",), ("x/1",)]
    variables = chain.init(jax.random.key(0), X[:, :5])
    same = fwt.Graph(fwt.nodes_of(chain))
    assert jax.tree.structure(same.init(jax.random.key(0), X)) == jax.tree.structure(variables)
    np.testing.assert_array_equal(same.apply(variables, X), chain.apply(variables, X))


@pytest.mark.parametrize(
    ("nodes", "more", "said"),
    [
        ([("a", nn.Dense(2)), ("a", nn.Dense(2))], {}, "two nodes are named 'a'"),
        ([("a", nn.Dense(2), "b")], {}, "takes 'b'"),
        ([("a", nn.Dense(2))], {"outputs": "b"}, "output 'b'"),
        ([("a", nn.Dense(2)), ("a/kernel", nn.Dense(2))], {}, "among the arrays of a"),
        ([fwt.Node("a", None, ("input",), of="b")], {}, "calls 'b' again"),
        ([fwt.Node("a", None, ("input",))], {}, "either a layer"),
        ([("params", nn.Dense(2))], {}, "'params'"),
        ([("a", nn.Dense)], {}, "must be a linen module"),
        (["a"], {}, "a node is"),
        ([], {}, "needs outputs="),
        ([("a", nn.Dense(2))], {"inputs": ("x", "x")}, "one name"),
        ([("a", nn.Dense(2))], {"outputs": 3}, "expected a name"),
    ],
)
def test_what_is_no_graph_is_refused(nodes, more, said):
    with pytest.raises(fwt.FwtError, match=said):
        fwt.Graph(nodes, **more)


def test_transforms_know_the_layers_of_a_graph():
    net = fwt.Graph(
        [
            ("conv", nn.ConvTranspose(4, (2, 3), transpose_kernel=True), "input"),
            ("double", fl.Add(), ("conv", "conv")),
            ("flat", fl.Flatten(), "double"),
            ("dense", nn.Dense(2), "flat"),
            ("rest", nn.Dense(2), "dense"),
        ],
        input_shape=(2, 3, 4),
    )
    variables = net.init(jax.random.key(0), jnp.ones((1, 2, 3, 4)))
    assert net._flattened_sizes() == {"dense/kernel": (2, 3, 4)}
    pattern = fwt.patterns.n_m(2, 4, order="chw")
    found = fwt.prune(pattern=pattern, where="dense/kernel")(fwt.Model(net, variables))
    kept = found.variables["params"]["dense"]["kernel"].reshape(2, 3, 4, 2).transpose(2, 0, 1, 3)
    assert ((kept.reshape(-1, 4, 2) != 0).sum(1) == 2).all()
    for transform in (
        fwt.reset(0, like="torch", module=net),
        fwt.prune(0.5, fwt.scores.synflow(net)),
        fwt.prune(0.5, fwt.scores.wanda(net, jnp.ones((3, 2, 3, 4))), where="*/kernel"),
    ):
        new = transform(variables)
        assert jax.tree.structure(new) == jax.tree.structure(variables)
    scaled = fwt.lsuv(net, variables, np.random.default_rng(0).normal(size=(99, 2, 3, 4)), 0,
                      where="dense/kernel")  # fmt: skip
    assert jax.tree.structure(scaled) == jax.tree.structure(variables)


def test_positions_lie_in_their_array():
    layer = fl.Indexed.at(np.array([2, 6]), (3, 2))
    with pytest.raises(fwt.FwtError, match="positions 2 to 6 of an array of 6"):
        layer.apply({"params": {"value": jnp.ones((3, 2))}})
    with pytest.raises(fwt.FwtError, match="'U4'"):
        fl.Constant(shape=(1,), data="", kind="U4").apply({})


def test_a_constant_is_no_larger_than_it_says():
    layer = fl.Constant.holding(np.zeros((500, 500), np.float32))
    assert layer.apply({}).shape == (500, 500)
    for shape in ((500,), (501, 500)):
        with pytest.raises(fwt.FwtError, match="bytes"):
            layer.clone(shape=shape).apply({})


class Watched(nn.Module):
    """Counts which of the arrays that such layers were given are still held."""

    given: Any
    held: Any

    def __call__(self, x):
        self.given.refs.append(weakref.ref(x))
        self.held.counts.append(sum(ref() is not None for ref in self.given.refs))
        return x + 1


def test_outside_jit_what_no_later_node_takes_is_let_go():
    given, held = types.SimpleNamespace(refs=[]), types.SimpleNamespace(counts=[])
    layers = [(f"n{i}", Watched(given, held), f"n{i - 1}" if i else "input") for i in range(8)]
    fwt.Graph(layers).apply({}, jnp.ones((2, 3)))
    assert len(held.counts) == 8
    assert max(held.counts) <= 3
