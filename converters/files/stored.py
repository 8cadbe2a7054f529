"""Files whose arrays stay where they are: read a piece at a time, and copied with some changed."""

import contextlib
import copy
import itertools
import os
import shutil
import weakref
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fwt import _stored, _tree
from fwt._stored import PIECE
from fwt._stored import Stored as Stored
from fwt._types import FileFormatError
from fwt.converters import io as _io

# Whether readers leave arrays in the file that stand there as they are in memory.
WANTED: ContextVar[bool] = ContextVar("WANTED", default=False)
# What each file was when it was first opened, for a task that opens it again.
_FILES: ContextVar[dict[str, tuple[int, ...]] | None] = ContextVar("_FILES", default=None)


@contextlib.contextmanager
def wanted(yes: bool = True, limit: int | None = None) -> Iterator[None]:
    """In it, ``load`` gives leaves that are read when they are gone through; at most ``limit``
    bytes of them may be in memory at once, a quarter of the machine's unless told."""
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise FileFormatError(f"max_memory={limit!r}: expected a number of bytes")
    known = _FILES.get()
    with contextlib.ExitStack() as after:
        after.callback(WANTED.reset, WANTED.set(yes))
        most = _io.half_of_memory() // 2 if limit is None else limit
        after.callback(_stored.LIMIT.reset, _stored.LIMIT.set(most))
        after.callback(_FILES.reset, _FILES.set({} if known is None else known))
        yield


def forget() -> None:
    """Another task begins, for which files may be others than before."""
    known = _FILES.get()
    if known is not None:
        known.clear()


class Source:
    """A file that is open, of which nothing may change meanwhile."""

    def __init__(self, path: Path):
        self.path, self._file = path, os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        self._state = self._now()
        known = _FILES.get()
        if known is not None and known.setdefault(str(path), self._state) != self._state:
            raise self._changed()

    def _changed(self) -> FileFormatError:
        return FileFormatError(f"{self.path}: it was changed while it was read: try again")

    def _now(self) -> tuple[int, ...]:
        found = os.fstat(self._file)
        return found.st_size, found.st_mtime_ns, found.st_dev, found.st_ino

    def is_as(self, other: "Source") -> bool:
        """Whether another is the same file."""
        return self._state == other._state

    def check(self) -> None:
        """Raises if somebody wrote to the file since it was opened."""
        if self._now() != self._state:
            raise self._changed()

    @property
    def size(self) -> int:
        return self._state[0]

    def into(self, buffer: np.ndarray, offset: int) -> None:
        """Fills an array of bytes from a place in the file."""
        view, done = memoryview(buffer.data), 0
        while done < len(view):
            count = os.preadv(self._file, [view[done:]], offset + done)
            if not count:
                self.check()
                raise FileFormatError(f"{self.path}: it is truncated")
            done += count

    def pieces(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """The bytes of a part of the file."""
        # One is used, one is made ready, and one is spare.
        buffers = itertools.cycle(
            [np.empty(min(PIECE, max(stop - start, 0)), np.uint8) for _ in "123"]
        )
        while start < stop:
            part = next(buffers)[: min(stop - start, PIECE)]
            self.into(part, start)
            yield part
            start += part.size
        self.check()


class Sum(NamedTuple):
    """The checksum of a part of a file, which an archive declares."""

    start: int
    stop: int
    crc: int


_WRONG = "an array has another checksum than its archive declares"


class InFile(Stored):
    """A leaf that stands in a file as it is in memory, from ``offset`` on."""

    def __init__(
        self, source: Source, offset: int, shape: Any, dtype: Any, checked: Sum | None = None
    ):
        super().__init__(shape, dtype, self._pieces, self._part)
        self.source, self.offset = source, offset
        whole = checked and checked.stop == offset + self.nbytes
        whole = whole and checked and checked.start <= offset <= checked.start + PIECE
        self._sum = checked if whole else None

    def stands_as(self, other: Any) -> bool:
        """Whether another leaf is the same part of the same file."""
        same = isinstance(other, InFile) and self.source.is_as(other.source)
        return same and (self.offset, self.dtype) == (other.offset, other.dtype)

    def _pieces(self) -> _stored.Pieces:
        crc = 0
        if self._sum is not None:
            for piece in self.source.pieces(self._sum.start, self.offset):
                crc = zlib.crc32(piece.data, crc)
        for piece in self.source.pieces(self.offset, self.offset + self.nbytes):
            if self._sum is not None:
                crc = zlib.crc32(piece.data, crc)
            yield piece.view(self.dtype)
        if self._sum is not None and crc != self._sum.crc:
            raise FileFormatError(f"{self.source.path}: {_WRONG}")
        self._sum = None  # the file is not changed meanwhile

    def _part(self, start: int, stop: int) -> np.ndarray:
        out = np.empty(stop - start, self.dtype)
        self.source.into(out.view(np.uint8), self.offset + start * self.dtype.itemsize)
        return out


class ComputedError(FileFormatError):
    """What was left in a file would have had to be read, for something else is made of it."""


class StandIns:
    """Arrays of a file in memory that was not filled, for what goes by their shapes and dtypes
    alone, and then what of it is still as it stands in the file."""

    def __init__(self, source: Source, start: int):
        self.source, self.start = source, start
        self._held: dict[int, tuple[np.ndarray, int]] = {}

    def array(self, offset: int, shape: Any, dtype: Any) -> np.ndarray | None:
        """The stand-in for an array; None for a number, which settings may be."""
        value = np.zeros(shape, dtype).view(_stored.Unread)
        if not value.shape or not value.size:
            return None
        self._held[_address(value)] = value, self.start + offset
        return value

    def placed(self, variables: Any) -> Any:
        """Variables whose leaves are stand-ins, or made of them by turning them.

        Raises:
            ComputedError: if another leaf may be computed of one.
        """
        tree = _tree.Tree({"params": variables}, whole=True)
        new: dict[str, Any] = {}
        used: dict[int, Any] = {}
        for path, leaf in tree.leaves.items():
            at = self._of(leaf)
            if at is None:
                continue
            whole, place = self._held[at]
            if at not in used:
                used[at] = InFile(self.source, place, whole.shape, whole.dtype)
            same = leaf.flags.c_contiguous and leaf.size == whole.size
            if same and leaf.dtype == whole.dtype:
                one = leaf.shape == whole.shape
                new[path] = used[at] if one else InFile(self.source, place, leaf.shape, leaf.dtype)
            else:
                self.source.into(whole.reshape(-1).view(np.uint8), place)
                new[path] = np.array(leaf, order="C")
        if used.keys() != self._held.keys():
            raise ComputedError("something is computed of an array that was not read")
        return tree.replace(new, ties=False)["params"]

    def _of(self, leaf: Any) -> int | None:
        """Which stand-in a leaf is in the memory of."""
        while isinstance(leaf, np.ndarray):
            at = _address(leaf)
            if at in self._held and leaf.size:
                return at
            leaf = leaf.base
        return None


def _address(value: np.ndarray) -> int:
    found: int = value.__array_interface__["data"][0]
    return found


# -- archives -------------------------------------------------------------------------------------


def member_at(archive: zipfile.ZipFile, source: Source, name: str) -> Sum | None:
    """Where a member of an archive stands that is stored as it is; None of any other."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        return None
    head = np.zeros(30, np.uint8)
    source.into(head, info.header_offset)
    raw = head.tobytes()
    if raw[:4] != b"PK\x03\x04" or info.file_size != info.compress_size:
        raise FileFormatError(f"{source.path}: {name} has no header, or two sizes")
    sizes = int.from_bytes(raw[26:28], "little") + int.from_bytes(raw[28:30], "little")
    start = info.header_offset + 30 + sizes
    if start + info.file_size > source.size:
        raise FileFormatError(f"{source.path}: {name} is truncated")
    return Sum(start, start + info.file_size, info.CRC)


# -- copies ---------------------------------------------------------------------------------------


def copy_with(file: Any, source: Source, changed: Mapping[int, Any]) -> None:
    """Writes a copy of a file with other arrays at some places, each as large as what is there.

    Args:
        file: where to.
        source: the file.
        changed: leaves by the place of their first byte.
    """
    for piece in _bytes_with(source, 0, source.size, changed):
        file.write(piece)


def copy_archive_with(
    file: Any, source: Source, changed: Mapping[int, Any], members: Mapping[str, Any]
) -> None:
    """The same of a zip archive, with the checksums of the members that the arrays are in; or, with
    members that are compressed, one of the same members."""
    if members:
        _rewrite(file, source, changed, members)
        return
    with zipfile.ZipFile(source.path) as archive:
        inside = [
            (place, info)
            for info in archive.infolist()
            if (place := member_at(archive, source, info.filename)) is not None
            and any(place.start <= at < place.stop for at in changed)
        ]
        listed = _in_directory(source, archive.start_dir)
    begun, sums = 0, list[tuple[zipfile.ZipInfo, Sum]]()
    for place, info in sorted(inside, key=lambda m: m[0].start):
        _check(source, place, changed)
        for piece in source.pieces(begun, place.start):
            file.write(piece)
        crc = 0
        for piece in _bytes_with(source, place.start, place.stop, changed):
            crc = zlib.crc32(piece.data, crc)
            file.write(piece)
        begun = place.stop
        sums.append((info, place._replace(crc=crc)))
    for piece in source.pieces(begun, source.size):
        file.write(piece)
    for info, place in sums:
        found = place.crc.to_bytes(4, "little")
        places = [listed[info.header_offset] + 16]
        if info.flag_bits & 8:  # the sum stands behind the member, perhaps behind a signature
            mark = np.zeros(4, np.uint8)
            source.into(mark, place.stop)
            places.append(place.stop + (4 if mark.tobytes() == b"PK\x07\x08" else 0))
        else:
            places.append(info.header_offset + 14)
        for at in places:
            file.seek(at)
            file.write(found)
    file.seek(0, os.SEEK_END)


def _check(source: Source, place: Sum, changed: Mapping[int, Any]) -> None:
    """Raises if a member is not what its archive says, of which some bytes will be others: an
    array that is a whole one is checked when it is read."""
    whole = changed.get(place.start)
    if whole is not None and whole.nbytes == place.stop - place.start:
        return
    crc = 0
    for piece in source.pieces(place.start, place.stop):
        crc = zlib.crc32(piece.data, crc)
    if crc != place.crc:
        raise FileFormatError(f"{source.path}: {_WRONG}")


def _rewrite(
    file: Any, source: Source, changed: Mapping[int, Any], members: Mapping[str, Any]
) -> None:
    with zipfile.ZipFile(source.path) as archive, zipfile.ZipFile(file, "w") as out:
        for info in archive.infolist():
            place = member_at(archive, source, info.filename)
            own = copy.copy(info)
            if info.filename in members:
                own.compress_type = zipfile.ZIP_STORED
            with out.open(own, "w", force_zip64=info.file_size > 1 << 31) as stream:
                if info.filename in members:
                    stream.write(members[info.filename].data)
                elif place is not None:
                    for piece in _bytes_with(source, place.start, place.stop, changed):
                        stream.write(piece.data)
                else:
                    with archive.open(info) as old:
                        shutil.copyfileobj(old, stream, 1 << 24)


def _in_directory(source: Source, start: int) -> dict[int, int]:
    """Where the directory of an archive has each member, by where the member begins."""
    raw = np.zeros(source.size - start, np.uint8)
    source.into(raw, start)
    data, at, found = raw.tobytes(), 0, dict[int, int]()
    while data[at : at + 4] == b"PK\x01\x02":
        name, extra, comment = (
            int.from_bytes(data[at + i : at + i + 2], "little") for i in (28, 30, 32)
        )
        begins = int.from_bytes(data[at + 42 : at + 46], "little")
        if begins == 0xFFFFFFFF:
            begins = _wide_offset(data, at, name, extra)
        found[begins] = start + at
        at += 46 + name + extra + comment
    return found


def _wide_offset(data: bytes, at: int, name: int, extra: int) -> int:
    """Where a member begins that stands beyond 4 GiB: behind its sizes, if these are wide too."""
    sizes = (data[at + i : at + i + 4] == b"\xff" * 4 for i in (24, 20))
    skipped = 8 * sum(sizes)
    place, end = at + 46 + name, at + 46 + name + extra
    while place + 4 <= end:
        kind, size = (int.from_bytes(data[place + i : place + i + 2], "little") for i in (0, 2))
        if kind == 1:
            return int.from_bytes(data[place + 4 + skipped : place + 12 + skipped], "little")
        place += 4 + size
    raise ValueError("a member of an archive has no place")


def _bytes_with(
    source: Source, start: int, stop: int, changed: Mapping[int, Any]
) -> Iterator[np.ndarray]:
    for at in sorted(at for at in changed if start <= at < stop):
        yield from source.pieces(start, at)
        leaf = changed[at]
        for piece in _stored.of(leaf).counted():
            yield np.ascontiguousarray(piece).view(np.uint8)
        start = at + leaf.nbytes
    yield from source.pieces(start, stop)


def among(variables: Any) -> bool:
    """Whether leaves of variables stand in a file."""
    return _tree.Tree({"params": variables}, whole=True).stored


def in_memory(variables: Any, why: str) -> Any:
    """Variables of arrays, if memory may hold those that stand in a file."""
    if not WANTED.get():
        return variables
    found = _tree.Tree({"params": variables}, whole=True)
    held = {p: x for p, x in found.leaves.items() if isinstance(x, Stored)}
    return found.replace(_stored.held(held, why))["params"] if held else variables
