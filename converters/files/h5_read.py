"""What stands in an HDF5 file, read without trust in what it declares."""

import contextlib
import io
import itertools
import math
import mmap
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from fwt._types import FileFormatError
from fwt.converters import io as _io
from fwt.converters.files import h5_text
from fwt.converters.files import stored as _stored
from fwt.converters.io import Budget, progress

_GZIP, _SHUFFLE = 1, 2
_DEPTH = 32


class _View(io.RawIOBase):
    """Bytes as a file to read, without a copy of them."""

    def __init__(self, data: Any):
        self._data, self._at = memoryview(data), 0

    def close(self) -> None:
        self._data.release()
        super().close()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        starts = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._data)}
        self._at = starts[whence] + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        piece = self._data[self._at : self._at + len(buffer)]
        buffer[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)


def check_start(start: bytes | bytearray, size: int) -> None:
    """Raises of what can be no HDF5 file of so many bytes, as its first ones tell: its superblock
    says where it ends and where its root group is."""
    if start[:8] != b"\x89HDF\r\n\x1a\n":
        raise ValueError("its weights are no HDF5 file")
    version = start[8]
    at, width = {0: (40, start[13]), 1: (44, start[13])}.get(version, (28, start[9]))
    if version > 3 or width != 8:
        return  # which HDF5 itself judges
    root = at + 24 if version < 2 else at + 8
    end, header = (int.from_bytes(start[i : i + 8], "little") for i in (at, root))
    if not size // 2 - (1 << 20) < end <= size:
        raise ValueError(f"its weights declare {size:,} bytes, of which HDF5 uses {end:,}")
    found = start[header : header + 4]
    if header > end or (len(found) == 4 and found != b"OHDR" and found[0] != 1):
        raise ValueError("its weights are an HDF5 file without a root group")


@contextlib.contextmanager
def opened_member(archive: zipfile.ZipFile, name: str, budget: Budget) -> Iterator[Any]:
    """An HDF5 file in an archive, which stays there if arrays may."""
    source = _stored.Source(budget.path) if _stored.WANTED.get() else None
    place = source and name in archive.namelist() and _stored.member_at(archive, source, name)
    if not source or not place:
        with opened_h5(_io.member(archive, name, budget, check_start), budget) as file:
            yield file
        return
    with (
        open(budget.path, "rb") as plain,
        mmap.mmap(plain.fileno(), 0, access=mmap.ACCESS_READ) as whole,
        memoryview(whole) as held,
        held[place.start : place.stop] as inner,
    ):
        check_start(bytes(inner[:512]), len(inner))
        budget.raw, budget.unread = inner, _stored.StandIns(source, place.start)
        with h5py.File(_View(inner), "r") as file:
            yield file
        budget.raw = b""


@contextlib.contextmanager
def opened_h5(source: Path | bytearray, budget: Budget, stay: bool = False) -> Iterator[Any]:
    """An HDF5 file, its bytes at hand where the library is not to be trusted. With ``stay`` its
    arrays are left in it where that is wanted."""
    with contextlib.ExitStack() as stack:
        budget.raw = source
        if isinstance(source, Path):
            if stay and _stored.WANTED.get():
                budget.unread = _stored.StandIns(_stored.Source(source), 0)
            plain = stack.enter_context(open(source, "rb"))
            budget.raw = stack.enter_context(mmap.mmap(plain.fileno(), 0, access=mmap.ACCESS_READ))
        opened_as = source if isinstance(source, Path) else _View(source)
        yield stack.enter_context(h5py.File(opened_as, "r"))


def node_at(file: Any, place: str, path: Path) -> Any:
    """What stands at a place of an HDF5 file, followed through hard links only."""
    node = file
    for part in place.split("/"):
        link = node.get(part, getlink=True) if hasattr(node, "keys") else None
        if link is None:
            return None
        if type(link).__name__ != "HardLink":
            raise FileFormatError(f"{path}: {place} refers to data outside the file")
        node = node[part]
    return node


def array_of(dataset: Any, place: str, budget: Budget) -> np.ndarray:
    """The values of a dataset, its size checked first; Keras writes bfloat16 as two bytes."""
    path = budget.path
    if dataset is None or not hasattr(dataset, "shape") or dataset.shape is None:
        raise FileFormatError(f"{path}: {place} is no array")
    if dataset.external or dataset.is_virtual:
        raise FileFormatError(f"{path}: {place} refers to data outside the file")
    told, dtype = None, dataset.dtype
    if dtype.kind == "V" and dtype.names is None and dtype.subdtype is None:
        told = text_of(attribute(dataset, "dtype", budget)) or (
            "bfloat16" if dtype.itemsize == 2 else ""
        )
        if not told or _io.dtype_of(told).itemsize != dtype.itemsize:
            raise FileFormatError(f"{path}: {place} of {dtype}: what it means is not said")
    elif dtype.kind not in "fiubc":
        raise FileFormatError(f"{path}: {place} has dtype {dtype}")
    size = math.prod(dataset.shape) * dtype.itemsize
    stored = dataset.id.get_storage_size()
    if dataset.chunks or stored < size:
        if stored > path.stat().st_size:
            raise FileFormatError(f"{path}: {place} declares more bytes than the file has")
        budget.expand(place, stored, size)
    if budget.unread is not None and not dataset.chunks and stored == size and dtype.isnative:
        offset, kind = dataset.id.get_offset(), _io.dtype_of(told) if told else dtype
        there = None if offset is None else budget.unread.array(offset, dataset.shape, kind)
        if there is not None:
            return there
    budget.spend(place, size)
    value = np.asarray(dataset[()]) if dataset.chunks is None else _chunked(dataset, place, budget)
    if not isinstance(budget.raw, bytearray):  # whose bytes have been counted already
        progress(size)
    return value.view(_io.dtype_of(told)) if told else _io.native(value)


def _chunked(dataset: Any, place: str, budget: Budget) -> np.ndarray:
    """The values of a dataset in chunks, decompressed here: the library lets a chunk grow beyond
    what it declares, and crashes on some that are empty."""
    path, plist = budget.path, dataset.id.get_create_plist()
    filters = [plist.get_filter(i)[0] for i in range(plist.get_nfilters())]
    if filters not in ([], [_GZIP], [_SHUFFLE], [_SHUFFLE, _GZIP]):
        raise FileFormatError(f"{path}: {place} is compressed in an unknown way")
    shape, chunks, dtype = dataset.shape, dataset.chunks, dataset.dtype
    size = math.prod(chunks) * dtype.itemsize
    budget.expand(f"a chunk of {place}", None, size)
    out = np.empty(shape, dtype)
    steps = [range(0, n, c) for n, c in zip(shape, chunks, strict=True)]
    count = math.prod(map(len, steps))
    if dataset.id.get_num_chunks() != count:
        raise FileFormatError(f"{path}: {place} lacks some of its {count:,} chunks")
    wanted = set(itertools.product(*steps))
    for index in range(count):
        info = dataset.id.get_chunk_info(index)
        at = info.chunk_offset
        if at not in wanted or not 0 < info.size <= path.stat().st_size or info.filter_mask:
            raise FileFormatError(f"{path}: a chunk of {place} at {at} is none of its own")
        wanted.remove(at)
        _, raw = dataset.id.read_direct_chunk(at)
        if _GZIP in filters:
            left = zlib.decompressobj()
            raw = left.decompress(raw, size + 1)
        if len(raw) != size:
            raise FileFormatError(f"{path}: a chunk of {place} has another size than declared")
        if _SHUFFLE in filters:
            raw = np.frombuffer(raw, np.uint8).reshape(dtype.itemsize, -1).T.tobytes()
        where = tuple(slice(a, a + n) for a, n in zip(at, chunks, strict=True))
        target = out[where]
        target[...] = np.frombuffer(raw, dtype).reshape(chunks)[tuple(map(slice, target.shape))]
    return out


def attribute(node: Any, name: str, budget: Budget) -> Any:
    """An attribute, its size checked first; None if there is none."""
    if name not in node.attrs:
        return None
    held = node.attrs.get_id(name)
    size = math.prod(held.shape) * max(held.dtype.itemsize, 1)
    budget.spend(f"the attribute {name}", size)
    if (size and held.get_storage_size() > budget.path.stat().st_size) or size > 1 << 28:
        raise FileFormatError(f"{budget.path}: the attribute {name} declares {size:,} bytes")
    kind = h5py.check_string_dtype(held.dtype)
    count = math.prod(held.shape)
    if count == 0:
        return []
    if kind is None:
        raise FileFormatError(f"{budget.path}: the attribute {name} is no text")
    if kind.length is not None:
        return node.attrs[name]
    if count > len(budget.raw) // 16:
        raise FileFormatError(f"{budget.path}: the attribute {name} declares {count:,} texts")

    def spend(size: int) -> None:
        budget.spend(f"the attribute {name}", size + 64)

    address = h5py.h5o.get_info(node.id).addr
    found = h5_text.texts(budget.raw, address, name, count, spend)
    return found if held.shape else found[0]


def names_in(node: Any, name: str, budget: Budget) -> list[str] | None:
    """A list of names, which Keras cuts in pieces where it is long: name0, name1, ..."""
    found = attribute(node, name, budget)
    pieces = [found] if found is not None else []
    while found is None and f"{name}{len(pieces)}" in node.attrs:
        pieces.append(attribute(node, f"{name}{len(pieces)}", budget))
    if not pieces:
        return None
    return [text_of(v) for piece in pieces for v in np.ravel(piece)]


def text_of(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else "" if value is None else str(value)


def tree_of(
    group: Any,
    budget: Budget,
    place: str = "",
    seen: set[int] | None = None,
    without: str | None = None,
) -> Any:
    """All arrays of a group as nested dicts, with no object in two places."""
    seen = set() if seen is None else seen
    out: dict[str, Any] = {}
    for name in group:
        if name == without:
            continue
        here = f"{place}/{name}".lstrip("/")
        node = node_at(group, name, budget.path)
        address = h5py.h5o.get_info(node.id).addr
        if address in seen or here.count("/") > _DEPTH:
            raise FileFormatError(f"{budget.path}: {here} stands there twice, or too deep")
        seen.add(address)
        if isinstance(node, h5py.Group):
            out[name] = tree_of(node, budget, here, seen)
        else:
            out[name] = array_of(node, here, budget)
    return out
