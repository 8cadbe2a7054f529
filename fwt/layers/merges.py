"""Layers of several tensors, and what stands between the layers of a graph."""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from fwt._types import Array
from fwt.layers.base import Layer


class Add(Layer):
    """The sum of its inputs, which broadcast as NumPy's do.

    Example:
        >>> Add().apply({}, jnp.ones((2, 3)), jnp.ones((2, 1))).tolist()[0]
        [2.0, 2.0, 2.0]
    """

    def __call__(self, *xs: Array) -> Array:
        return functools.reduce(jnp.add, xs)


class Subtract(Layer):
    """The first of its two inputs less the second.

    Example:
        >>> Subtract().apply({}, jnp.ones(2), jnp.ones(2)).tolist()
        [0.0, 0.0]
    """

    def __call__(self, a: Array, b: Array) -> Array:
        return a - b


class Multiply(Layer):
    """The product of its inputs, entry by entry.

    Example:
        >>> Multiply().apply({}, jnp.ones((2, 3)), jnp.arange(3)).tolist()[0]
        [0.0, 1.0, 2.0]
    """

    def __call__(self, *xs: Array) -> Array:
        return functools.reduce(jnp.multiply, xs)


class Divide(Layer):
    """The first of its two inputs divided by the second, entry by entry.

    Example:
        >>> Divide().apply({}, jnp.ones(2), 4 * jnp.ones(2)).tolist()
        [0.25, 0.25]
    """

    def __call__(self, a: Array, b: Array) -> Array:
        return a / b


class Masked(Layer):
    """The first of its two inputs where the second is not 0, and 0 elsewhere, be it infinite or no
    number there.

    Example:
        >>> Masked().apply({}, jnp.array([1.0, jnp.inf]), jnp.array([1.0, 0.0])).tolist()
        [1.0, 0.0]
    """

    def __call__(self, x: Array, keep: Array) -> Array:
        return jnp.where(keep != 0, x, jnp.zeros((), x.dtype))


class Average(Layer):
    """The mean of its inputs, entry by entry.

    Example:
        >>> Average().apply({}, jnp.ones(2), jnp.zeros(2)).tolist()
        [0.5, 0.5]
    """

    def __call__(self, *xs: Array) -> Array:
        return functools.reduce(jnp.add, xs) / len(xs)


class Maximum(Layer):
    """The largest of its inputs, entry by entry.

    Example:
        >>> Maximum().apply({}, jnp.ones(2), jnp.arange(2)).tolist()
        [1.0, 1.0]
    """

    def __call__(self, *xs: Array) -> Array:
        return functools.reduce(jnp.maximum, xs)


class Minimum(Layer):
    """The smallest of its inputs, entry by entry.

    Example:
        >>> Minimum().apply({}, jnp.ones(2), jnp.arange(2)).tolist()
        [0.0, 1.0]
    """

    def __call__(self, *xs: Array) -> Array:
        return functools.reduce(jnp.minimum, xs)


class Concatenate(Layer):
    """Its inputs one after the other along an axis; along the others they broadcast.

    Args:
        axis: the number of the axis, from the end if it is negative.

    Example:
        >>> Concatenate().apply({}, jnp.ones((5, 2)), jnp.ones((5, 3))).shape
        (5, 5)
    """

    axis: int = -1

    def __call__(self, *xs: Array) -> Array:
        axis = self.axis % xs[0].ndim
        others = jnp.broadcast_shapes(*((*x.shape[:axis], *x.shape[axis + 1 :]) for x in xs))
        wide = [jnp.broadcast_to(x, (*others[:axis], x.shape[axis], *others[axis:])) for x in xs]
        return jnp.concatenate(wide, axis)


class MatMul(Layer):
    """The matrix product of its two inputs over their last two axes.

    Example:
        >>> MatMul().apply({}, jnp.ones((5, 2, 3)), jnp.ones((5, 3, 4))).shape
        (5, 2, 4)
    """

    def __call__(self, a: Array, b: Array) -> Array:
        return jnp.matmul(a, b)


class Einsum(Layer):
    """``einsum(equation, a, b)`` of two tensors whose first axes are the batch.

    Args:
        equation: such as "bti,bsi->bts", without dots.

    Example:
        >>> Einsum("bti,bsi->bts").apply({}, jnp.ones((5, 2, 3)), jnp.ones((5, 4, 3))).shape
        (5, 2, 4)
    """

    equation: str

    def __call__(self, a: Array, b: Array) -> Array:
        return jnp.einsum(self.equation, *nn.dtypes.promote_dtype(a, b))


class Slice(Layer):
    """What stands from ``start`` to ``stop`` along an axis.

    Args:
        axis: the number of the axis.
        start: the first index.
        stop: the index after the last, None for the end.
        step: how far one is from the next.

    Example:
        >>> Slice(-1, 1, 3).apply({}, jnp.arange(5)).tolist()
        [1, 2]
    """

    axis: int = -1
    start: int = 0
    stop: int | None = None
    step: int = 1

    def __call__(self, x: Array) -> Array:
        index = [slice(None)] * x.ndim
        index[self.axis] = slice(self.start, self.stop, self.step)
        return x[tuple(index)]


class LayerScale(Layer):
    """x times a learned number for each channel.

    Args:
        features: how many channels there are.

    Example:
        >>> import jax
        >>> LayerScale(3).init_with_output(jax.random.key(0), jnp.ones((5, 3)))[0].shape
        (5, 3)
    """

    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return x * self.weight("gamma", nn.initializers.ones, (self.features,))


class Parameter(Layer):
    """A learned array between the layers of a graph, such as a table of positions.

    It takes nothing. In a :class:`fwt.Graph` the path of its node is the path of the array, as
    ``self.param`` of a module has it.

    Args:
        shape: of the array.

    Example:
        >>> import jax
        >>> Parameter((2, 3)).init_with_output(jax.random.key(0))[0].shape
        (2, 3)
    """

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self) -> Array:
        return self.weight("value", nn.initializers.zeros, self.shape)

    @nn.nowrap
    def of(self, scope: Any, name: str) -> Array:
        """The array of this name in a scope of linen's."""
        wide = jnp.promote_types(self.param_dtype, jnp.float32)

        def drawn(key: Any) -> Array:
            return jnp.zeros(self.shape, wide).astype(self.param_dtype)

        found: Array = self._cast(scope.param(name, drawn))
        return found
