"""Leaves whose keys are counted together: small ones of about one size by one kernel."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from fwt._apart import about, indices, joins, pick, seed_of
from fwt._types import Array
from fwt.selection.keys import Source


class Stack(NamedTuple):
    """Leaves of one kind and about one size, a row each; or one leaf as it is.

    Attributes:
        source: the keys; of several leaves flat, with more behind those of the smaller ones.
        places: which leaves they are.
        sizes: how many keys each has.
    """

    source: Source
    places: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def one(self) -> bool:
        return len(self.places) == 1

    @property
    def ends(self) -> Any:
        """Where each row ends; None if all are full."""
        return None if len(set(self.sizes)) == 1 else np.asarray(self.sizes, np.uint32)

    def own(self, rows: Array) -> Array:
        """Bools without what stands behind the leaves."""
        if self.one or self.ends is None:
            return rows
        return rows & (lax.broadcasted_iota(jnp.uint32, rows.shape, 1) < self.ends[:, None])


def stacks_of(flat: Sequence[Source]) -> list[Stack]:
    """The leaves, small ones of about one size together, so that one kernel serves them."""
    kinds: dict[Any, list[int]] = {}
    sizes = [math.prod(s.shape) for s in flat]
    for i, (source, size) in enumerate(zip(flat, sizes, strict=True)):
        kind = (source.key, about(size), *(x.dtype for x in source.arrays))
        kinds.setdefault(kind if joins(size, len(flat)) else i, []).append(i)
    found = []
    for places in kinds.values():
        source, mine = flat[places[0]], tuple(sizes[i] for i in places)
        if len(places) > 1:
            columns = zip(*(flat[i].arrays for i in places), strict=True)
            source = Source(source.key, tuple(map(_rows, columns)))
        found.append(Stack(source, tuple(places), mine))
    return found


def _rows(arrays: Sequence[Array]) -> Array:
    """Arrays as rows, zeros behind the shorter ones."""
    width = max(x.size for x in arrays)
    left = [width - x.size for x in arrays]
    # Each size of zeros is a kernel to compile, so they are joined of few sizes.
    zeros = [lax.full((1 << i,), 0, arrays[0].dtype) for i in range(max(left).bit_length())]
    parts = []
    for x, n in zip(arrays, left, strict=True):
        parts.append(jnp.asarray(x).reshape(-1))
        parts += [z for i, z in enumerate(zeros) if n >> i & 1]
    return lax.concatenate(parts, 0).reshape(len(arrays), width)


def leaves_of(stacks: Sequence[Stack], values: Sequence[Array]) -> dict[int, Array]:
    """The rows of some stacks by the place of their leaf, each without what stands behind it; what
    belongs to one leaf alone as it is."""
    rows = [v for s, v in zip(stacks, values, strict=True) if not s.one]
    at = indices(range(max(map(len, rows))), seed_of(rows[0])) if rows else []
    out: dict[int, Array] = {}
    for stack, value in zip(stacks, values, strict=True):
        for row, (place, size) in enumerate(zip(stack.places, stack.sizes, strict=True)):
            if stack.one:
                out[place] = value
            else:
                out[place] = pick(value, at[row])[:size]
    return out


def of_leaves(
    stacks: Sequence[Stack], index: Sequence[Any], trial: Array, each: Callable[..., Any]
) -> Array:
    """``each(stack, arrays, trial, place)`` of all stacks in a row, over the last axis; ``place``
    cuts what belongs to a stack out of numbers of all leaves."""
    # The barrier keeps XLA from computing once, and storing, what does not depend on the trial.
    arrays, trial = lax.optimization_barrier(([s.source.arrays for s in stacks], trial))
    found, start = [], 0
    for stack, given, i in zip(stacks, arrays, index, strict=True):
        stop = start + len(stack.places)
        place = i if stack.one else slice(start, stop)
        found.append(each(stack, given, trial, place))
        start = stop
    return lax.concatenate(found, found[0].ndim - 1)


def own_places(stacks: Sequence[Stack], seed: Array) -> list[Any]:
    """For each stack of one leaf the place of its numbers."""
    places = np.cumsum([0, *(len(s.places) for s in stacks)])
    rest = iter(indices([int(p) for p, s in zip(places, stacks, strict=False) if s.one], seed))
    return [next(rest) if s.one else None for s in stacks]
