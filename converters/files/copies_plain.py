"""Flax's msgpack and NumPy's .npz with other values of their arrays."""

import copy
import dataclasses
import io
import math
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import msgpack
import numpy as np
from numpy.lib import format as npy

from fwt import _nodes
from fwt._errors import refuse
from fwt._types import Model
from fwt.converters import io as _io
from fwt.converters.files import copies, plain, stored
from fwt.converters.files import source as _source
from fwt.converters.io import Budget, Reading, dtype_of, member, nested, opened, reading

# -- .npz -------------------------------------------------------------------------------------


def copy_of_npz(source: Path, variables: Any, key: Any) -> copies.Copy:
    """An archive with these arrays in place of its own, or of those under a key."""
    flat: dict[str, np.ndarray] = {}
    with reading(source), opened(source) as archive:
        names, budget = archive.namelist(), Budget(source)
        ours = plain._OURS in names
        told = budget.parsed(member(archive, plain._OURS, budget), "") if ours else {"dtypes": {}}
        for name in names:
            if name != plain._OURS:
                stem = name.removesuffix(".npy")
                flat[stem] = _of_header(archive, name, told["dtypes"].get(stem))

    def load(path: Path, how: Reading) -> Model:
        if ours:
            return Model(None, {"params": {}, **nested(flat, "/", path)})
        return Model(None, plain._others(flat, path, how))

    found = copies.by_stand_in(source, load, variables, key)
    new = {name: found[id(x)] for name, x in flat.items() if id(x) in found}
    for name, value in new.items():
        known = name in told["dtypes"] or hasattr(ml_dtypes, value.dtype.name)
        if known and told["dtypes"].get(name) != value.dtype.name:  # which .npy can't say
            raise copies.OtherArraysError(f"{source}: {name} became {value.dtype}")
    return copies.Copy({source: lambda file: _write_npz(file, source, new, told["dtypes"])})


def _of_header(archive: zipfile.ZipFile, name: str, told: str | None) -> np.ndarray:
    with archive.open(name) as stream:
        old = npy.read_magic(stream) == (1, 0)
        read = npy.read_array_header_1_0 if old else npy.read_array_header_2_0
        shape, _, dtype = read(stream)
    return copies.stand_in(shape, dtype if told is None else dtype_of(told))


def _written_in_place(
    file: Any, source: Path, new: Mapping[str, Any], dtypes: Mapping[str, str]
) -> bool:
    """Whether arrays that changed stand in their archive as they are in memory, so that it is
    copied with others in their places."""
    there, changed = stored.Source(source), dict[int, Any]()
    with opened(source) as archive:
        for stem, value in new.items():
            place = stored.member_at(archive, there, f"{stem}.npy")
            old = place and plain._npy_at(there, place, stem, dtypes.get(stem), source)
            if not old or (old.dtype, old.shape) != (value.dtype, value.shape):
                return False
            if not old.stands_as(value) and not _nodes.same_values(old, value):
                changed[old.offset] = value
    stored.copy_archive_with(file, there, changed, {})
    return True


def _write_npz(
    file: Any, source: Path, new: Mapping[str, np.ndarray], dtypes: Mapping[str, str]
) -> None:
    if _written_in_place(file, source, new, dtypes):
        return
    with opened(source) as archive, zipfile.ZipFile(file, "w") as out:
        budget = Budget(source)
        for info in archive.infolist():
            stem, made = info.filename.removesuffix(".npy"), copy.copy(info)
            value = None if stem not in new else np.asarray(new[stem])
            if value is not None:
                held = member(archive, info.filename, budget, plain._check_npy)
                before = plain._npy(held, stem, dtypes.get(stem), source, ())
                same = (before.dtype, before.shape) == (value.dtype, value.shape)
                value = None if same and before.tobytes() == value.tobytes() else value
            if value is None:
                with archive.open(info) as old, out.open(made, "w") as stream:
                    shutil.copyfileobj(old, stream, 1 << 24)
                continue
            value = value.view(f"V{value.dtype.itemsize}") if stem in dtypes else value
            header = io.BytesIO()
            npy.write_array_header_1_0(header, npy.header_data_from_array_1_0(value))
            made.file_size = header.tell() + value.nbytes
            with out.open(made, "w") as stream:
                stream.write(header.getvalue())
                _io.write_array(stream, value)


# -- msgpack ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Held:
    """An array of a file, and its pieces: where each starts, its code, and where it ends."""

    stand_in: np.ndarray
    pieces: list[tuple[int, int, int]]


def copy_of_msgpack(source: Path, variables: Any, key: Any) -> copies.Copy:
    """A file with these arrays in place of its own, or of those under a key."""
    with reading(source):
        data = source.read_bytes()
        plain._check_msgpack(data, source)
        held: dict[int, _Held] = {}
        spans = _extensions(data)

        def extension(code: int, inside: bytes) -> np.ndarray:
            shape, name, _ = msgpack.unpackb(inside, raw=True)
            return _kept(held, shape, dtype_of(name.decode()), [next(spans)])

        tree = msgpack.unpackb(data, ext_hook=extension, raw=False, strict_map_key=False)
        tree = _joined(tree, held)

    def load(path: Path, how: Reading) -> Model:
        found = _io.under(plain._tree_of(tree, path, (), {}), how.key, path)
        return Model(None, _source.from_tree(found, path, how.key))

    changes: list[tuple[int, int, bytes | memoryview]] = []
    for number, value in copies.by_stand_in(source, load, variables, key).items():
        one, value = held[number], np.asarray(value)
        same = value.dtype == one.stand_in.dtype and value.shape == one.stand_in.shape
        if value.dtype.name != "bfloat16" and hasattr(ml_dtypes, value.dtype.name):
            raise refuse(
                source.name, f"dtype {value.dtype}: Flax itself can't read it from msgpack"
            )
        if not same and len(one.pieces) > 1:
            raise copies.OtherArraysError(f"{source}: a large array came to have another shape")
        flat, at = np.ascontiguousarray(value).reshape(-1), 0
        for start, code, end in one.pieces:
            if not same:
                told = (value.shape, value.dtype.name, value.tobytes())
                new = msgpack.packb(msgpack.ExtType(code, msgpack.packb(told)))
                changes.append((start, end, new))
                continue
            size = flat.size if len(one.pieces) == 1 else _size(data[start:end])
            part = flat[at : at + size].view(np.uint8).data
            changes.append((end - len(part), end, part))  # the bytes come last
            at += size
    return copies.Copy({source: lambda file: _write_msgpack(file, data, changes)})


def _kept(
    held: dict[int, _Held], shape: Any, dtype: np.dtype, pieces: list[tuple[int, int, int]]
) -> np.ndarray:
    value = copies.stand_in(shape, dtype)
    held[id(value)] = _Held(value, pieces)
    return value


def _extensions(data: bytes) -> Iterator[tuple[int, int, int]]:
    """The extensions of a file that was checked, in their order: start, code, end."""
    at = 0
    while at < len(data):
        start, code, at = at, data[at], at + 1
        if 0xD4 <= code <= 0xD8:
            yield start, data[at], at + plain._FIXED[code]
            at += plain._FIXED[code]
        elif code in plain._SIZED:
            width, more = plain._SIZED[code]
            size = int.from_bytes(data[at : at + width], "big")
            if more:
                yield start, data[at + width], at + width + 1 + size
            at += width + more + size
        elif code in plain._MANY:
            at += plain._MANY[code][0]
        elif 0xA0 <= code <= 0xBF:
            at += code & 0x1F
        else:
            at += plain._FIXED.get(code, 0)


def _joined(node: Any, held: dict[int, _Held]) -> Any:
    """A tree with one stand-in for each array that Flax has cut into pieces."""
    if isinstance(node, list):
        return [_joined(each, held) for each in node]
    if not isinstance(node, dict):
        return node
    if "__msgpack_chunked_array__" not in node:
        return {name: _joined(each, held) for name, each in node.items()}
    pieces = [held[id(chunk)] for chunk in node["chunks"].values()]
    spans = [span for piece in pieces for span in piece.pieces]
    return _kept(held, node["shape"].values(), pieces[0].stand_in.dtype, spans)


def _size(extension: bytes) -> int:
    """How many entries the array has that an extension is."""
    shape = msgpack.unpackb(msgpack.unpackb(extension).data, raw=True)[0]
    return math.prod(shape)


def _write_msgpack(
    file: Any, data: bytes, changes: list[tuple[int, int, bytes | memoryview]]
) -> None:
    at = 0
    for start, end, new in sorted(changes, key=lambda change: change[0]):
        file.write(data[at:start])
        file.write(new)
        at = end
    file.write(data[at:])
