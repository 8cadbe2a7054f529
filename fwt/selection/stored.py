"""The exact k-th smallest over leaves that are larger than memory, by counting.

A sample says between which two keys the answer should be. One pass over the leaves counts what is
below and histograms what is between; where the sample was wrong, or between the two are more keys
than a histogram has room for, another pass begins with what the last one found.
"""

import contextvars
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from fwt._stored import PIECE, Stored, ahead

Key = Callable[..., Any]

_BINS = 1 << 20
_SAMPLE = 1 << 16  # numbers in all
_RUN = 64  # of them that stand side by side


class Cut(NamedTuple):
    """A selection of one leaf: kept are the keys above ``value``, and of those equal to it so many
    of the first."""

    value: Any
    equals: int


def cuts(leaves: Sequence[Stored], key: Key, k: int) -> list[Cut]:
    """What is kept of each leaf without the ``k`` smallest of all.

    Args:
        leaves: in path order; among equals the first are kept.
        key: unsigned integers of a piece, in the order of its weights.
        k: how many go.
    """
    sizes = [x.size for x in leaves]
    if k <= 0:
        return [Cut(np.uint64(0), n) for n in sizes]
    low, high = _range(leaves, key)
    floor, ceiling = low, high  # between which the answer is known to be
    sample = np.sort(np.concatenate([_sampled(x, key, sum(sizes)) for x in leaves]))
    low, high = _bracket(sample, k / sum(sizes), floor, ceiling)
    while True:
        shift = max((high - low + 1).bit_length() - _BINS.bit_length() + 1, 0)
        below, counts = _counted(leaves, key, low, high, shift)
        inside = int(counts.sum())
        if k <= below:
            low, high = floor, low - 1
        elif k > below + inside:
            low, high = high + 1, ceiling
        else:
            place = int(np.searchsorted(np.cumsum(counts), k - below))
            below += int(counts[:place].sum())
            low, high = low + (place << shift), min(high, low + ((place + 1) << shift) - 1)
            if low == high:
                equals = int(counts[place])
                return _split(leaves, key, low, equals, equals - (k - below))
        floor, ceiling = low, high


def kept(key: Key, cut: Cut, piece: np.ndarray, left: int) -> tuple[np.ndarray, int]:
    """The mask of a piece, and how many equals are left to keep of ``left``."""
    found = key(piece)
    if not left:
        return found > found.dtype.type(cut.value), 0
    value = found.dtype.type(cut.value)
    equal = found == value
    count = int(np.count_nonzero(equal))
    if count > left:
        equal &= np.cumsum(equal) <= left
    return (found > value) | equal, max(left - count, 0)


def _range(leaves: Sequence[Stored], key: Key) -> tuple[int, int]:
    """The least and the largest key that there may be."""
    dtype = key(np.zeros(1, leaves[0].dtype)).dtype
    return 0, int(np.iinfo(dtype).max)


def _sampled(leaf: Stored, key: Key, total: int) -> np.ndarray:
    """Keys of some of a leaf's numbers, so many as it has of all."""
    wanted = max(_SAMPLE * leaf.size // total, 1)
    if leaf.part is None or leaf.size <= max(4 * wanted, _RUN):
        step = max(leaf.size // wanted, 1)
        found = [key(piece[::step]) for piece in leaf.pieces()]
    else:
        runs = max(wanted // _RUN, 1)
        # At places that follow no rhythm of the rows.
        places = np.random.default_rng(0).integers(0, leaf.size - _RUN, runs)
        found = [key(leaf.part(int(i), int(i) + _RUN)) for i in np.sort(places)]
    return np.concatenate([np.zeros(0, key(np.zeros(1, leaf.dtype)).dtype), *found])


def _bracket(sample: np.ndarray, share: float, floor: int, ceiling: int) -> tuple[int, int]:
    if not sample.size:
        return floor, ceiling
    error = 6 * (max(share * (1 - share), 1e-4) / sample.size) ** 0.5
    first = int((share - error) * sample.size) - 2
    last = int((share + error) * sample.size) + 2
    low = int(sample[first]) if first >= 0 else floor
    high = int(sample[last]) if last < sample.size else ceiling
    return low, high


def _counted(
    leaves: Sequence[Stored], key: Key, low: int, high: int, shift: int
) -> tuple[int, np.ndarray]:
    """How many keys are below a range, and how many in each bin of it."""
    below, counts = 0, np.zeros(((high - low) >> shift) + 1, np.int64)

    def one(leaf: Stored) -> None:
        nonlocal below
        mine, pieces = 0, leaf.pieces()
        for piece in ahead(pieces) if alone and leaf.nbytes > 4 * PIECE else pieces:
            keys = key(piece)
            first, width = keys.dtype.type(low), keys.dtype.type(high - low)
            if low:
                mine += int(np.count_nonzero(keys < first))
            keys = keys - first
            inside = keys[keys <= width] >> keys.dtype.type(shift)
            with lock:
                np.add.at(counts, inside, 1)
        with lock:
            below += mine

    alone, lock = len(leaves) == 1, threading.Lock()
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(contextvars.copy_context().run, one, leaf) for leaf in leaves]
        for done in waiting:
            done.result()
    return below, counts


def _split(leaves: Sequence[Stored], key: Key, value: int, equals: int, stay: int) -> list[Cut]:
    """The cut of each leaf, where so many of the equals stay, the first."""
    if stay in (0, equals):
        return [Cut(value, x.size if stay else 0) for x in leaves]
    found = []
    for leaf in leaves:
        mine = 0
        for piece in leaf.pieces() if stay else ():
            keys = key(piece)
            mine += int(np.count_nonzero(keys == keys.dtype.type(value)))
        found.append(Cut(value, min(mine, stay)))
        stay -= found[-1].equals
    return found
