"""A module of one's own in linen or nnx at other sizes than it was converted for: as its own
framework, or refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from fwt import FwtError, converters


def later(x):
    return jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))


def shifted(x):
    return jnp.concatenate([jnp.zeros((x.shape[0], 1, x.shape[-1])), x[:, :-1]], 1)


ANY = {
    "the last": lambda x: x[:, -1],
    "the last three": lambda x: x[:, -3:],
    "but the ends": lambda x: x[:, 2:-3],
    "every other": lambda x: x[:, ::2],
    "every third but one": lambda x: x[:, 1::3],
    "backwards": lambda x: x[:, -2:0:-1],
    "rolled": lambda x: jnp.roll(x, 2, 1),
    "every third but the last": lambda x: x[:, :-1:3],
    "every other of seven": lambda x: x[:, :7:2],
    "without the first": lambda x: x[:, 1:],
    "shifted": shifted,
    "a mean": lambda x: x.mean(1),
}
ONE = {
    "the first half": lambda x: x[:, : x.shape[1] // 2],
    "positions": lambda x: x + jnp.arange(x.shape[1], dtype=x.dtype)[None, :, None],
    "a mask": lambda x: jnp.where(later(x), x @ x.mT, 0.0) @ x,
    "pooled": lambda x: nn.avg_pool(x, (x.shape[1],)),
    "a factor": lambda x: x * x.shape[1] ** -0.5,
    "parity": lambda x: x * 2 if x.shape[1] % 2 else x,
    "padded to a third": lambda x: jnp.pad(x, ((0, 0), (0, -x.shape[1] % 3), (0, 0))),
    "a rest by three": lambda x: x * 2 if x.shape[1] % 3 == 2 else x,
    "cut off by JAX": lambda x: x[:, 5],  # where it is shorter
    "cut off from the end": lambda x: x[:, -3],
    "a number below": lambda x: x if x.shape[1] > 3 else x * 2,
    "a least number": lambda x: x.sum(1) / max(x.shape[1], 6),
    "heads": lambda x: x.reshape(x.shape[0], x.shape[1], 2, 3).swapaxes(1, 2),
    "rolled by three": lambda x: jnp.roll(x, 3, 1),
    "rolled back by three": lambda x: jnp.roll(x, -3, 1),
}


class Net(nn.Module):
    name_of: str

    @nn.compact
    def __call__(self, x):
        return (ANY | ONE)[self.name_of](nn.Dense(6, name="d")(x))


class NnxNet(nnx.Module):
    def __init__(self, name):
        self.d, self.name_of = nnx.Linear(5, 6, rngs=nnx.Rngs(0)), name

    def __call__(self, x):
        return (ANY | ONE)[self.name_of](self.d(x))


def numbers(*shape):
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def linen_net(name):
    net = Net(name)
    return net, net.init(jax.random.key(0), numbers(1, 8, 5))


def graph_of(name):
    return converters.from_nnx(NnxNet(name), input_shape=(8, 5))


def torch_of(name):
    return converters.to_torch(*linen_net(name), input_shape=(8, 5), layout="source").eval()


@pytest.mark.parametrize("name", ANY)
def test_what_holds_at_any_size_does(name):
    graph, nnx_net = graph_of(name), NnxNet(name)
    assert graph.module.fixed == ()
    (net, variables), there = linen_net(name), torch_of(name)
    for size in (11, 10, 9, 4, 2, 1):
        x = numbers(2, size, 5)
        np.testing.assert_allclose(graph(x), nnx_net(x), atol=1e-5)
        found = there(torch.tensor(x)).detach().numpy()
        np.testing.assert_allclose(found, net.apply(variables, x), atol=1e-5)


@pytest.mark.parametrize("name", ONE)
def test_what_follows_from_its_size_takes_that_alone(name):
    graph, nnx_net, there = graph_of(name), NnxNet(name), torch_of(name)
    x = numbers(2, 8, 5)
    np.testing.assert_allclose(graph(x), nnx_net(x), atol=1e-5)
    assert graph.module.fixed == ((8, None),)
    with pytest.raises(FwtError, match="converted for 8 along axis 1"):
        graph(numbers(2, 11, 5))
    with pytest.raises(Exception, match="converted for 8 along axis 1"):
        there(torch.tensor(numbers(2, 11, 5)))


def test_keras_keeps_the_size_too():
    graph, x = graph_of("a factor"), numbers(2, 8, 5)
    there = converters.to_keras(graph)
    np.testing.assert_allclose(np.asarray(there(x)), graph(x), atol=1e-5)
    with pytest.raises(ValueError, match="expected shape"):
        there(numbers(2, 11, 5))


def test_an_axis_that_a_layer_holds_is_not_fixed():
    class Flat(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.max_pool(nn.Conv(3, (3, 3))(x), (2, 2), (2, 2))
            return nn.Dense(2)(x.reshape(x.shape[0], -1))

    net = Flat()
    variables = net.init(jax.random.key(0), numbers(1, 9, 7, 2))
    there = converters.to_torch(net, variables, input_shape=(9, 7, 2))
    assert isinstance(there, torch.nn.Sequential)  # which asserts no size


def test_a_size_that_a_module_checks_itself_is_kept():
    class Checked(nn.Module):
        @nn.compact
        def __call__(self, x):
            assert x.shape[1] == 6
            return nn.relu(nn.Dense(2)(x))

    net = Checked()
    variables = net.init(jax.random.key(0), numbers(1, 6, 5))
    there = converters.to_torch(net, variables, input_shape=(6, 5))
    with pytest.raises(Exception, match="converted for 6 along axis 1"):
        there(torch.zeros(1, 4, 5))


COMPARED = {
    "two of its axes": (lambda x: x * 2 if x.shape[1] == x.shape[2] else x, [(6, 6)]),
    "a small sum": (lambda x: x if x.shape[1] + x.shape[2] > 3 else x * 2, [(6, 6)]),
    "a ratio": (lambda x: x * (x.shape[1] / x.shape[2]), [(6, 6)]),
    "two inputs": (
        lambda a, b: a[:, a.shape[1] - b.shape[1] :].mean(1) + b.mean(1),
        [(8,), (8,)],
    ),
}


@pytest.mark.parametrize("name", COMPARED)
def test_sizes_that_are_compared_with_each_other_are_kept(name):
    function, shapes = COMPARED[name]

    class Compared(nnx.Module):
        def __init__(self):
            self.d = nnx.Linear(5, 3, rngs=nnx.Rngs(0))

        def __call__(self, *xs):
            return function(*map(self.d, xs))

    class Two(Compared):
        def __call__(self, a, b):
            return function(self.d(a), self.d(b))

    net = (Two if len(shapes) > 1 else Compared)()
    given = [(*s, 5) for s in shapes]
    graph = converters.from_nnx(net, input_shape=given if len(given) > 1 else given[0])
    xs = [numbers(2, *s) for s in given]
    np.testing.assert_allclose(graph(*xs), net(*xs), atol=1e-5)
    other = numbers(2, 11, *given[0][1:])
    with pytest.raises(FwtError, match="converted for"):
        graph(other, *xs[1:])


def test_a_token_stands_in_front_of_two_tensors():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(6)(x)
            token = jnp.broadcast_to(self.param("token", nn.initializers.ones, (1, 1, 6)), (
                x.shape[0], 1, 6))  # fmt: skip
            parts = [jnp.concatenate([token, y], 1) for y in (x, x * 2)]
            return jnp.concatenate(parts, 1)

    net, x = Twice(), numbers(3, 8, 5)
    variables = net.init(jax.random.key(0), x)
    for layout in ("source", "channels_first"):
        there = converters.to_torch(net, variables, input_shape=(8, 5), layout=layout)
        found = there(torch.tensor(x)).detach().numpy()
        np.testing.assert_allclose(found, net.apply(variables, x), atol=1e-5)
