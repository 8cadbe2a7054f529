"""One pass over a leaf: how many of its keys pass a test, without storing them or moving any.

All that a pass hands on is one number, so sharded leaves stay where they are.
"""

import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fwt import _mesh
from fwt._types import Array
from fwt.selection.keys import Source

SLICES = 8
TOGETHER = 8  # trials in a pass: fields of 4 bits in 32
_PACKED, _ROWS = 6, 16  # 6 fit into 4 bits, and 6 * 16 into 8


def _cut_axis(x: Any) -> int | None:
    """The axis of a leaf that may be sharded along which slices can be cut without moving data:
    one whose shards, however many they are, still divide. A reshape of anything else makes XLA
    gather."""
    for axis in sorted(range(x.ndim), key=lambda a: (a == x.ndim - 1, a)):
        if x.shape[axis] and x.shape[axis] % (SLICES * jax.device_count()) == 0:
            return axis
    return None


def _map(source: Source, function: Callable[[Any], Any]) -> Source:
    return Source(source.key, tuple(map(function, source.arrays)))


def slices(source: Source) -> tuple[list[Source], Source | None]:
    """Slices of equal shape, and what is left over, if anything. One GPU adds up a whole leaf in
    fewer kernels (seen: 2.0 ms where slices take 2.6)."""
    n = math.prod(source.shape)
    if n < 4096 or (jax.device_count() == 1 and not on_cpu()):
        return [], source
    if jax.device_count() == 1:
        # Slices that start on a multiple of 64 are up to 4 times as fast.
        flat, w = _map(source, lambda x: x.reshape(-1)), n // (64 * SLICES) * 64
        cuts = [slice(i * w, (i + 1) * w) for i in range(SLICES)]
        parts = [_map(flat, operator.itemgetter(c)) for c in cuts]
        left = _map(flat, operator.itemgetter(slice(SLICES * w, None)))
        return parts, left if n > SLICES * w else None
    axis = _cut_axis(source.arrays[0])
    if axis is None:
        return [], source
    shape = source.shape
    split = (*shape[:axis], shape[axis] // SLICES, SLICES, *shape[axis + 1 :])
    tall = _map(source, lambda x: x.reshape(split))
    place = (slice(None),) * (axis + 1)
    return [_map(tall, operator.itemgetter((*place, i))) for i in range(SLICES)], None


def on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def _count(source: Source, test: Callable[[Array], Array]) -> Array:
    """How many keys pass a test, in uint32. Slices are added up as int8 first: XLA's CPU backend
    does that in vector code, 20 times as fast as a plain sum."""
    parts, rest = slices(source)
    found = jnp.uint32(0) if rest is None else jnp.sum(test(rest.keys()), dtype=jnp.uint32)
    if parts:
        hits = [test(p.keys()).astype(jnp.int8) for p in parts]
        found = found + jnp.sum(sum(hits[1:], hits[0]), dtype=jnp.uint32)
    return found


def below(source: Source, trial: Array) -> Array:
    return _count(source, lambda keys: keys < trial)


def _row_count(source: Source, test: Callable[[Array, int], Array]) -> Array:
    """Of leaves side by side, how many keys of each pass a test, in uint32; the test is told at
    which key of a leaf what it gets begins."""
    key, arrays = source
    size = arrays[0].shape[1]
    width = size // (64 * SLICES) * 64 if size >= 4096 and on_cpu() else 0
    parts = [
        test(key(*(x[:, i * width : (i + 1) * width] for x in arrays)), i * width)
        for i in range(SLICES if width else 0)
    ]
    start = SLICES * width
    found = jnp.zeros(arrays[0].shape[0], jnp.uint32)
    if start < size:
        rest = test(key(*(x[:, start:] for x in arrays)), start)
        found = jnp.sum(rest, 1, dtype=jnp.uint32)
    if parts:
        hits = [p.astype(jnp.int8) for p in parts]
        found = found + jnp.sum(sum(hits[1:], hits[0]), 1, dtype=jnp.uint32)
    return found


def rows_below(source: Source, trials: Array, ends: Array | None) -> Array:
    """Of leaves side by side, how many keys of each are below its trial, and before its end."""

    def among(keys: Array, start: int) -> Array:
        found = keys < trials[:, None]
        return found if ends is None else found & _starts(keys, start, ends)

    return _row_count(source, among)


def _starts(keys: Array, start: int, ends: Array) -> Array:
    at = lax.broadcasted_iota(jnp.uint32, keys.shape, 1) + np.uint32(start)
    return at < ends[:, None]


def row_ties(source: Source, values: Array, places: Array) -> Array:
    """Of leaves side by side, how many keys of each equal its value before a place."""

    def among(keys: Array, start: int) -> Array:
        return (keys == values[:, None]) & _starts(keys, start, places)

    return _row_count(source, among)


def packs() -> bool:
    """Whether the counts of several trials are packed into one number."""
    return jax.device_count() == 1 and on_cpu()


def below_each(source: Source, trials: Array, active: Array) -> Array:
    """For each of up to ``TOGETHER`` trials how many keys are below it, in one pass (seen: 7 ms
    where 8 passes take 27); anything, if not active.

    On a CPU a uint32 holds 8 counts of 4 bits, added over slices, then 4 of 8 bits, added over
    rows. The conditionals make XLA store them in between; otherwise it computes each many times.
    """
    rows, many = _ROWS, len(trials)
    width = math.prod(source.shape) // (_PACKED * rows * 64) * 64 * rows
    if not (packs() and width):

        def plain(arrays: Any, trials: Array) -> Array:
            return jax.vmap(lambda trial: below(Source(source.key, arrays), trial))(trials)

        nothing = _mesh.alike(jnp.zeros(many, jnp.uint32), source.arrays, trials)
        return lax.cond(active, plain, lambda *_: nothing, source.arrays, trials)
    flat = _map(source, lambda x: x.reshape(-1))

    def nibbles(arrays: Any, trials: Array) -> Array:
        hits = []
        for i in range(_PACKED):
            keys = source.key(*(x[i * width : (i + 1) * width] for x in arrays))
            for place in range(many):
                one = np.uint32(1 << 4 * place)
                hits.append(jnp.where(keys < trials[place], one, np.uint32(0)))
        return sum(hits[1:], hits[0])

    def bytes_(found: Array) -> list[Array]:
        tall = found.reshape(rows, -1)
        both = [[tall[i] >> shift & np.uint32(0x0F0F0F0F) for i in range(rows)] for shift in (0, 4)]
        return [sum(b[1:], b[0]) for b in both]

    nothing = _mesh.alike(jnp.zeros(width, jnp.uint32), source.arrays, trials)
    found = lax.cond(active, nibbles, lambda *_: nothing, flat.arrays, trials)
    none = [nothing[: width // rows]] * 2
    shifts = np.arange(0, 32, 8, dtype=np.uint32)[:, None]
    sums = [
        jnp.sum(x >> shifts & np.uint32(255), -1, dtype=jnp.uint32)
        for x in lax.cond(active, bytes_, lambda _: none, found)
    ]
    left = _map(flat, operator.itemgetter(slice(_PACKED * width, None))).keys()
    rest = jnp.sum(left < trials[:, None], -1, dtype=jnp.uint32)
    return jnp.stack(sums, -1).reshape(-1)[:many] + rest


def zeros(mask: Array) -> Array:
    """How many bools are False, in uint32."""
    return _count(Source(jnp.asarray, (mask,)), jnp.logical_not)


def before(shape: tuple[int, ...], index: Array) -> Array:
    """Whether the flat index of an element is below ``index``. On several devices without a
    reshape, so that nothing moves, and without an array of indices, which XLA would store outside
    of a loop."""
    if jax.device_count() == 1:
        return (lax.iota(jnp.uint32, math.prod(shape)) < index).reshape(shape)
    found = jnp.zeros((), bool)
    stride = 1
    for axis in reversed(range(len(shape))):
        digit = index // np.uint32(stride)
        digit = digit % np.uint32(shape[axis]) if axis else digit
        place = lax.broadcasted_iota(jnp.uint32, shape, axis)
        found = (place < digit) | (place == digit) & found
        stride *= shape[axis]
    return found if shape else index > 0


def ties_below(source: Source, value: Array, index: Array) -> Array:
    parts, rest = slices(source)
    if jax.device_count() > 1 or not parts:
        hits = (source.keys() == value) & before(source.shape, index)
        return jnp.sum(hits, dtype=jnp.uint32)

    def among(part: Source, start: int) -> Array:
        left = jnp.where(index > start, index - np.uint32(start), 0)
        return (part.keys() == value) & before(part.shape, left)

    w = parts[0].shape[0]
    each = [among(p, i * w).astype(jnp.int8) for i, p in enumerate(parts)]
    found = jnp.sum(sum(each[1:], each[0]), dtype=jnp.uint32)
    return found if rest is None else found + jnp.sum(among(rest, SLICES * w), dtype=jnp.uint32)
