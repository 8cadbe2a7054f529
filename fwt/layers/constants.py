"""Arrays between the layers of a graph, and layers of a table that several of them share."""

import base64
import functools
import math
import zlib
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from fwt._types import Array, FwtError
from fwt.layers.base import Layer
from fwt.layers.merges import Parameter


def packed(value: Any) -> str:
    """The bytes of an array as a short text."""
    raw = np.ascontiguousarray(value).tobytes()
    return base64.b64encode(zlib.compress(raw, 9)).decode()


_KINDS = ("bool", "float16", "float32", "float64", "bfloat16",
          *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)))  # fmt: skip
MOST = 1 << 28  # bytes, which a short text of a hostile file could else exceed


def _unpacked(text: str, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    if kind not in _KINDS:
        raise FwtError(f"a constant of dtype {kind!r}: expected one of {', '.join(_KINDS)}")
    size = math.prod(shape) * np.dtype(kind).itemsize
    reader = zlib.decompressobj()
    raw = reader.decompress(base64.b64decode(text), min(size, MOST) + 1)
    if len(raw) != size:
        raise FwtError(f"a constant of shape {shape} and dtype {kind} has {size} bytes (at most "
                       f"{MOST} are read), found {len(raw)} or more")  # fmt: skip
    return np.frombuffer(raw, np.dtype(kind)).reshape(shape)


class Buffer(Parameter):
    """An array between the layers of a graph that a state dict holds but that is not learned, such
    as a table of sines; it stands in ``batch_stats``.

    Args:
        shape: of the array.

    Example:
        >>> held = {"batch_stats": {"value": jnp.arange(3.0)}}
        >>> Buffer(shape=(3,)).apply(held).tolist()
        [0.0, 1.0, 2.0]
    """

    @nn.compact
    def __call__(self) -> Array:
        zeros = functools.partial(jnp.zeros, self.shape, self.param_dtype)
        return jnp.asarray(self.variable("batch_stats", "value", zeros).value)

    @nn.nowrap
    def of(self, scope: Any, name: str) -> Array:
        """The array of this name in a scope of linen's."""
        zeros = lambda: jnp.zeros(self.shape, self.param_dtype)  # noqa: E731 - as linen takes it
        found: Array = self._cast(scope.variable("batch_stats", name, zeros).value)
        return found


class Constant(Layer):
    """An array between the layers of a graph that is part of the model as a number is: a mask.

    Args:
        shape: of the array.
        data: its bytes in order, compressed, in base 64.
        kind: its dtype.

    Example:
        >>> Constant.holding(np.arange(3.0)).apply({}).tolist()
        [0.0, 1.0, 2.0]
    """

    shape: tuple[int, ...]
    data: str
    kind: str = "float32"

    @classmethod
    def holding(cls, value: Any) -> "Constant":
        """The layer that gives an array."""
        return cls(**cls.settings(value))

    @staticmethod
    def settings(value: Any) -> dict[str, Any]:
        """What says an array."""
        return {"shape": value.shape, "data": packed(value), "kind": value.dtype.name}

    @property
    def nbytes(self) -> int:
        """The bytes that it takes."""
        return math.prod(self.shape) * (np.dtype(self.kind).itemsize if self.kind in _KINDS else 1)

    @property
    def value(self) -> np.ndarray:
        """The array."""
        return _unpacked(self.data, self.kind, self.shape)

    def __call__(self) -> Array:
        return jnp.asarray(self.value)


class Indexed(Parameter):
    """Entries of a learned array between the layers of a graph, in another order or shape than it
    has: a table of biases by relative position, say.

    Args:
        shape: of the array.
        index: of each entry that it gives, its position among those of the array, packed as in
            :class:`Constant`.
        gives: the shape of what it gives.

    Example:
        >>> layer = Indexed.at(np.array([[2, 0]]), (3,))
        >>> layer.apply({"params": {"value": jnp.array([1.0, 2.0, 3.0])}}).tolist()
        [[3.0, 1.0]]
    """

    index: str
    gives: tuple[int, ...]

    @classmethod
    def at(cls, positions: Any, shape: tuple[int, ...]) -> "Indexed":
        """The layer that gives the entries at these positions of an array of this shape."""
        index = np.asarray(positions, np.int32)
        return cls(shape=tuple(shape), index=packed(index), gives=index.shape)

    @nn.compact
    def __call__(self) -> Array:
        return super().__call__().reshape(-1)[self.positions]

    @property
    def nbytes(self) -> int:
        """The bytes that its positions take."""
        return 4 * math.prod(self.gives)

    @property
    def positions(self) -> np.ndarray:
        """The position of each entry."""
        found = _unpacked(self.index, "int32", self.gives)
        size = math.prod(self.shape)
        if found.size and not 0 <= found.min() <= found.max() < size:
            raise FwtError(f"positions {found.min()} to {found.max()} of an array of {size}")
        return found

    @nn.nowrap
    def of(self, scope: Any, name: str) -> Array:
        """The entries of the array of this name in a scope of linen's."""
        return super().of(scope, name).reshape(-1)[self.positions]


class IndexedBuffer(Indexed, Buffer):
    """Entries of an array that a state dict holds but that is not learned; it stands in
    ``batch_stats``. Those of a learned array are :class:`Indexed`.

    Args:
        shape: of the array.
        index: of each entry that it gives, its position among those of the array, packed as in
            :class:`Constant`.
        gives: the shape of what it gives.

    Example:
        >>> layer = IndexedBuffer.at(np.array([[2, 0]]), (3,))
        >>> layer.apply({"batch_stats": {"value": jnp.array([1.0, 2.0, 3.0])}}).tolist()
        [[3.0, 1.0]]
    """


class Lookup(Layer):
    """The rows of a table for whole numbers: of two inputs, the first is the table.

    Example:
        >>> Lookup().apply({}, jnp.eye(3), jnp.array([[2, 0]])).tolist()
        [[[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]]
    """

    def __call__(self, table: Array, ids: Array) -> Array:
        return jnp.take(table, ids, axis=0)


class Attend(Layer):
    """The products of a tensor with each row of a table, its second input: what undoes a
    :class:`Lookup` in models that share one table for both.

    Example:
        >>> Attend().apply({}, jnp.ones((1, 1, 3)), jnp.eye(3)).tolist()
        [[[1.0, 1.0, 1.0]]]
    """

    def __call__(self, x: Array, table: Array) -> Array:
        return x @ table.T
