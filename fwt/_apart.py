"""What one program does to each of many leaves, compiled once for each shape.

XLA compiles a kernel once, however many leaves it serves, as long as no constant tells one use of
it from another. A number of a leaf's own that is cut out of a vector at a constant index is such a
constant; at an index that only the running program knows it is none.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fwt import _mesh
from fwt._types import Array

FEW = 4  # leaves for which constants cost less
_SMALL = 1 << 16  # a leaf of so many elements is copied beside others sooner than it is compiled
_PADDED = 1 << 13  # of so many, zeros behind it cost no time


def indices(places: Sequence[int], seed: Array) -> Sequence[Any]:
    """Numbers, each as a buffer of its own.

    They leave a loop of one round or none, as ``seed``, a number of the running program, wants it;
    each is what it was, but XLA can't know.
    """
    if len(places) <= FEW or not isinstance(seed, jax.core.Tracer):
        return [np.uint32(i) for i in places]

    def body(state: Any) -> Any:
        i, found = state
        return i + 1, [x + (i >> 20) for x in found]

    trips = jnp.minimum(jnp.asarray(seed).astype(jnp.uint32), 1)
    start = _mesh.alike((jnp.uint32(0), [jnp.uint32(i) for i in places]), trips)
    return lax.while_loop(lambda s: s[0] < trips, body, start)[1]


def pick(values: Array, index: Any, axis: int = 0) -> Array:
    """``values[index]`` along an axis."""
    return lax.dynamic_index_in_dim(values, index, axis, keepdims=False)


def side_by_side(arrays: Sequence[Array]) -> Array:
    """Arrays of one shape along a new first axis."""
    return lax.concatenate([lax.expand_dims(x, (0,)) for x in arrays], 0)


def joins(size: int, count: int) -> bool:
    """Whether a leaf of so many elements, one of so many, may be copied beside its like."""
    return 0 < size <= _SMALL and count > FEW and jax.device_count() == 1


def about(size: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, ..., so that few programs serve leaves of many shapes."""
    top = 1 << (size - 1).bit_length()
    return top - top // 4 if size <= top - top // 4 else top


class Columns:
    """Numbers of many leaves side by side: a tree of arrays, a row for each leaf."""

    def __init__(self, whole: Any):
        self.whole = whole

    @functools.cached_property
    def _places(self) -> Sequence[Any]:
        first = jax.tree.leaves(self.whole)[0]
        return indices(range(len(first)), seed_of(first))

    def at(self, place: int) -> Any:
        return jax.tree.map(lambda x: pick(x, self._places[place]), self.whole)


def seed_of(x: Array) -> Array:
    """A number of the running program, for :func:`indices`."""
    x = x[(0,) * x.ndim]
    return jax.random.bits(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


class Row(NamedTuple):
    """The numbers of one leaf among those of many, cut out where they are wanted."""

    columns: Columns
    place: int


def own(row: Any) -> Any:
    """The numbers of a row; anything else as it is."""
    return row.columns.at(row.place) if isinstance(row, Row) else row


class Call(NamedTuple):
    """``function(*arrays)`` of one leaf, or ``function(*arrays, row)``.

    Attributes:
        kind: what the function is; calls of equal kinds call one function. None if no other does,
            or if what it makes is large.
        function: gives an array or a tree of them.
        arrays: trees of arrays, each of the leaf's size.
        row: a :class:`Row`, or a tree of the leaf's own numbers; None for none.
        pads: whether the function takes arrays of any shape and keeps it, and zeros behind them,
            along any axis, change nothing of its value but the rounding of sums.
    """

    kind: Any
    function: Callable[..., Any]
    arrays: tuple[Any, ...] = ()
    row: Any = None
    pads: bool = False


def _mates(call: Call, count: int) -> Any:
    """What calls have in common that may run as one; None if this one has to run by itself."""
    leaves = jax.tree.leaves(call.arrays)
    shared = call.row is None or isinstance(call.row, Row)
    traced = any(isinstance(x, jax.core.Tracer) for x in leaves) or not leaves
    small = joins(max((x.size for x in leaves), default=1), count)
    if call.kind is None or not (shared and traced and small) or _mesh.on_explicit(leaves):
        return None
    columns = call.row and id(call.row.columns)
    pads = call.pads and leaves[0].size <= _PADDED
    shapes = [tuple(map(about, x.shape)) if pads else x.shape for x in leaves]
    return call.kind, columns, pads, *zip(shapes, (x.dtype for x in leaves), strict=True)


def _padded(x: Array, shape: Sequence[int]) -> Array:
    ends = [(0, n - m, 0) for n, m in zip(shape, x.shape, strict=True)]
    return lax.pad(x, np.zeros((), x.dtype), ends) if any(n for _, n, _ in ends) else x


def _joined(arrays: Sequence[Any]) -> Array:
    """Arrays along a new first axis, with zeros behind the smaller ones."""
    whole = [*map(max, zip(*(x.shape for x in arrays), strict=True))]
    return side_by_side([_padded(jnp.asarray(x), whole) for x in arrays])


def each(calls: Sequence[Call], in_turn: bool = False) -> list[Any]:
    """The value of each call. Those of one kind on small arrays of one shape run side by side.

    Args:
        calls: what to call.
        in_turn: whether those of one shape take turns instead, for functions that are large to
            compile.
    """
    kinds: dict[Any, list[int]] = {}
    for i, call in enumerate(calls):
        kind = _mates(call, len(calls))
        kinds.setdefault(i if kind is None else kind, []).append(i)
    found = []
    for places in kinds.values():
        _, function, arrays, row, _ = calls[places[0]]
        if len(places) == 1:
            value = function(*arrays) if row is None else function(*arrays, own(row))
        else:
            rows = [calls[i].arrays for i in places]
            joined = jax.tree.map(lambda *xs: _joined(xs), *rows)
            if row is not None:
                mine = np.asarray([calls[i].row.place for i in places])
                joined = *joined, jax.tree.map(lambda x, at=mine: x[at], row.columns.whole)
            several = jax.vmap(function)
            alike = len({x.shape for each in rows for x in jax.tree.leaves(each)}) <= 1
            if in_turn and alike:
                several = functools.partial(lax.map, lambda each, f=function: f(*each))
                joined = (joined,)
            value = several(*joined)
        found.append((places, value))
    wide = [jax.tree.leaves(value)[0] for places, value in found if len(places) > 1]
    at = indices(range(max(map(len, wide))), seed_of(wide[0])) if wide else []
    out: list[Any] = [None] * len(calls)
    for places, value in found:
        for i, place in enumerate(places):
            if len(places) == 1:
                out[place] = value
                continue
            out[place] = jax.tree.map(lambda x, i=i: pick(x, at[i]), value)
            shape = jax.tree.leaves(calls[place].arrays)[0].shape if calls[place].pads else None
            if shape is not None and out[place].shape != shape:
                out[place] = lax.slice(out[place], (0,) * len(shape), shape)
    return out
