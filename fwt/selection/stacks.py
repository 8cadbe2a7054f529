"""Leaves whose keys are counted together: small ones of one shape side by side, by one kernel."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax import lax

from fwt._apart import indices, joins, side_by_side
from fwt._types import Array
from fwt.selection.keys import Source


class Stack(NamedTuple):
    """Leaves of one shape and kind, side by side along a first axis; or one leaf as it is.

    Attributes:
        source: the keys.
        places: which leaves they are.
    """

    source: Source
    places: tuple[int, ...]

    @property
    def one(self) -> bool:
        return len(self.places) == 1

    @property
    def size(self) -> int:
        """Of one leaf."""
        return math.prod(self.source.shape if self.one else self.source.shape[1:])


def stacked(flat: Sequence[Source]) -> list[Stack]:
    """The leaves, small ones of one shape together, so that one kernel serves them."""
    kinds: dict[Any, list[int]] = {}
    for i, source in enumerate(flat):
        kind = (source.key, *((x.shape, x.dtype) for x in source.arrays))
        small = joins(math.prod(source.shape), len(flat))
        kinds.setdefault(kind if small else i, []).append(i)
    found = []
    for places in kinds.values():
        source = flat[places[0]]
        if len(places) > 1:
            columns = zip(*(flat[i].arrays for i in places), strict=True)
            source = Source(source.key, tuple(map(side_by_side, columns)))
        found.append(Stack(source, tuple(places)))
    return found


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
