"""What one program does to each of many leaves, compiled once for each shape.

XLA compiles a kernel once, however many leaves it serves, as long as no constant tells one use of
it from another. A number of a leaf's own that is cut out of a vector at a constant index is such a
constant; at an index that only the running program knows it is none.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fwt import _mesh
from fwt._types import Array

FEW = 4  # leaves for which constants cost less
SMALL = 1 << 16  # a leaf of so many elements is copied beside others sooner than it is compiled


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


def cut_apart(found: Any, count: int) -> list[Any]:
    """The entries along the first axis of a tree of arrays."""
    seed = jax.tree.leaves(found)[0].reshape(-1)[0]
    return [jax.tree.map(lambda x, i=i: pick(x, i), found) for i in indices(range(count), seed)]


def joins(shapes: Sequence[tuple[tuple[int, ...], Any]], count: int) -> bool:
    """Whether a leaf that is one of so many may be copied beside its like."""
    small = all(0 < math.prod(shape) <= SMALL for shape, _ in shapes)
    return small and count > FEW and jax.device_count() == 1


def together(function: Callable[..., Any], rows: Sequence[Any], *columns: Any) -> list[Any]:
    """``function(*row, *numbers)`` of each row of arrays, all rows of one kind and shape, run as
    one under a trace; ``columns`` are side by side already."""
    if len(rows) == 1:
        return [function(*rows[0], *jax.tree.map(lambda x: x[0], columns))]
    joined = jax.tree.map(lambda *xs: side_by_side([jnp.asarray(x) for x in xs]), *rows)
    return cut_apart(jax.vmap(function)(*joined, *columns), len(rows))


def each(calls: Sequence[tuple[Any, Callable[..., Any], tuple[Any, ...]]]) -> list[Any]:
    """``function(*arrays)`` of each call ``(kind, function, arrays)``, under a trace. The functions
    of one kind must be one: those on small arrays of one shape run as one."""
    kinds: dict[Any, list[int]] = {}
    for i, (kind, _, arrays) in enumerate(calls):
        shapes = [(x.shape, x.dtype) for x in jax.tree.leaves(arrays)]
        kinds.setdefault((kind, *shapes) if joins(shapes, len(calls)) else i, []).append(i)
    out: list[Any] = [None] * len(calls)
    for places in kinds.values():
        values = together(calls[places[0]][1], [calls[i][2] for i in places])
        for i, value in zip(places, values, strict=True):
            out[i] = value
    return out
