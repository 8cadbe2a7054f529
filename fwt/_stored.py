"""Leaves that are larger than memory: read from their file, and changed, a piece at a time."""

import contextlib
import contextvars
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

import numpy as np

from fwt._errors import LeafError

PIECE = 1 << 19  # bytes, which stay in a core's cache from one operation to the next

Pieces = Iterator[np.ndarray]

# How many bytes of weights may be in memory at once; None for any number.
LIMIT: ContextVar[int | None] = ContextVar("LIMIT", default=None)


class Stored:
    """A leaf whose values are gone through, as often as they are asked for, and never held.

    ``pieces`` gives its numbers in order as flat arrays, each of which is lost once two more are
    asked for. ``part`` gives those from one place to another, where they can be had alone.
    """

    def __init__(
        self,
        shape: Iterable[int],
        dtype: Any,
        pieces: Callable[[], Pieces],
        part: Callable[[int, int], np.ndarray] | None = None,
    ):
        self.shape, self.dtype = tuple(int(n) for n in shape), np.dtype(dtype)
        self.pieces, self.part = pieces, part
        self.ndim, self.size = len(self.shape), int(np.prod(self.shape, dtype=object))
        self.nbytes = self.size * self.dtype.itemsize
        self.zeros: int | None = None  # known once all has been written

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        out = np.empty(self.size, self.dtype)
        start = 0
        for piece in self.pieces():
            out[start : start + piece.size] = piece
            start += piece.size
        return out.reshape(self.shape).astype(dtype or self.dtype, copy=False)

    def __repr__(self) -> str:
        return f"Stored({self.dtype}{list(self.shape)})"

    def counted(self) -> Pieces:
        """The pieces; afterwards ``zeros`` says how many of the numbers are zero."""
        zeros, pieces = 0, self.pieces()
        for piece in ahead(pieces) if self.nbytes > 4 * PIECE else pieces:
            zeros += piece.size - int(np.count_nonzero(piece))
            yield piece
        self.zeros = zeros

    def mapped(self, function: Callable[[Pieces], Pieces], dtype: Any = None) -> "Stored":
        """A leaf of the same shape that goes through pieces of this one."""
        return Stored(self.shape, dtype or self.dtype, lambda: function(self.pieces()))

    def astype(self, dtype: Any) -> "Stored":
        """The same numbers in another dtype."""
        wanted = np.dtype(dtype)
        if wanted == self.dtype:
            return self

        def cast(pieces: Pieces) -> Pieces:
            for piece in pieces:
                with np.errstate(all="ignore"):
                    yield piece.astype(wanted)

        return self.mapped(cast, wanted)


class Unread(np.ndarray):
    """Memory that stands for an array of a file, and was not filled: nobody copies it."""


def of(leaf: Any) -> Stored:
    """A leaf as one that is gone through."""
    if isinstance(leaf, Stored):
        return leaf
    value = np.asarray(leaf)
    flat = value.reshape(-1)
    return Stored(value.shape, value.dtype, lambda: cut(value), lambda a, b: flat[a:b])


def held(leaves: Mapping[str, Any], why: str) -> dict[str, np.ndarray]:
    """Leaves in memory, if it may hold them.

    Raises:
        LeafError: if they are more than ``LIMIT``.
    """
    total, limit = sum(x.nbytes for x in leaves.values()), LIMIT.get()
    if limit is not None and total > limit:
        what = next(iter(leaves)) if len(leaves) == 1 else f"{len(leaves)} weights"
        raise LeafError(
            f"{why} needs {what} in memory at once, {total:,} bytes, and "
            f"max_memory={limit:,} is less: allow more, or leave some out with where="
        )
    return {p: np.asarray(x) for p, x in leaves.items()}


def computed(shape: Iterable[int], dtype: Any, make: Callable[[], Any]) -> Stored:
    """A leaf that is computed as a whole each time that it is asked for."""

    def pieces() -> Pieces:
        yield from cut(np.asarray(make()))

    return Stored(shape, dtype, pieces)


def cut(value: np.ndarray) -> Pieces:
    """An array in pieces."""
    flat = np.ascontiguousarray(value).reshape(-1)
    step = max(PIECE // max(flat.itemsize, 1), 1)
    for start in range(0, flat.size, step):
        yield flat[start : start + step]


def ahead(pieces: Pieces) -> Pieces:
    """The same pieces, each made on a thread of its own while the one before it is used."""
    run: Any = contextvars.copy_context().run
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(run, next, pieces, None)
        while (piece := coming.result()) is not None:
            coming = pool.submit(run, next, pieces, None)
            yield piece


def joined(pieces: Pieces, size: int) -> Pieces:
    """The same numbers in pieces of this size, but for the last."""
    held: list[np.ndarray] = []
    count = 0
    for piece in pieces:
        while piece.size:
            part = piece[: size - count]
            held.append(part.copy())
            count, piece = count + part.size, piece[part.size :]
            if count == size:
                yield np.concatenate(held)
                held, count = [], 0
    if held:
        yield np.concatenate(held)


def pairs(one: Any, other: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Two leaves of one size, in pieces of the same numbers of both."""
    theirs, b = of(other).pieces(), np.zeros(0, other.dtype)
    for a in of(one).pieces():
        while a.size:
            b = b if b.size else next(theirs)
            n = min(a.size, b.size)
            yield a[:n], b[:n]
            a, b = a[n:], b[n:]


def bits(piece: np.ndarray) -> np.ndarray:
    """The bytes of each number."""
    flat = np.ascontiguousarray(piece)
    return flat.view(np.uint8).reshape(flat.size, flat.itemsize)


def same(one: Any, other: Any) -> bool:
    """Whether two leaves of one shape and dtype are equal bit for bit."""
    return one is other or all(np.array_equal(bits(a), bits(b)) for a, b in pairs(one, other))


def half_of_memory() -> int:
    """Half of the machine's memory, in bytes."""
    with contextlib.suppress(AttributeError, ValueError, OSError):  # not every system tells
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return 4 << 30
