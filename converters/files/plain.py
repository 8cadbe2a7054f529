"""Plain trees of arrays: NumPy's .npz and Flax's msgpack."""

import contextlib
import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import msgpack
import numpy as np
from numpy.lib import format as npy

from fwt import _nodes, _paths, _tree
from fwt._errors import refuse
from fwt._types import FileFormatError, Model
from fwt.converters import io as _io
from fwt.converters.files import source as _source
from fwt.converters.files import stored as _stored
from fwt.converters.frameworks import description
from fwt.converters.io import (
    Budget,
    Reading,
    dtype_of,
    member,
    nested,
    opened,
    progress,
    reading,
)

_OURS = "fwt.json"  # a member that says what .npy can't: bfloat16 and the like, and the module


def load_npz(path: Path, how: Reading) -> Model:
    """A .npz archive; one of ours with its architecture."""
    with reading(path), opened(path) as archive:
        budget = Budget(path, how.max_bytes)
        names = archive.namelist()
        told = budget.parsed(member(archive, _OURS, budget), _OURS) if _OURS in names else None
        dtypes = told["dtypes"] if told else {}
        flat: dict[str, Any] = {}
        there = _stored.Source(path) if _stored.WANTED.get() else None
        for name in names:
            if name == _OURS:
                continue
            if not name.endswith(".npy"):
                raise FileFormatError(f"{path}: {name} is no array")
            stem = name.removesuffix(".npy")
            if there is not None:
                place = _stored.member_at(archive, there, name)
                held = place and _npy_at(there, place, stem, dtypes.get(stem), path)
                if held is not None:
                    flat[stem] = held
                    continue
            data = member(archive, name, budget, _check_npy)
            flat[stem] = _npy(data, stem, dtypes.get(stem), path, how.drop)
        if told:
            _io.without_key(path, how)
            variables = nested(flat, "/", path)
            if how.module and told["module"] is not None:
                return description.read(json.dumps(told), variables, path)
            return Model(None, _source.restored({"params": {}, **variables}, told.get("source")))
        return Model(None, _others(flat, path, how))


def _others(flat: dict[str, Any], path: Path, how: Reading) -> dict[str, Any]:
    """The variables of an archive that says nothing but names."""
    separator = "/" if any("/" in name for name in flat) else "."
    first = {name.split("/")[0]: None for name in flat}
    if separator == "/" and _tree.is_variables(first):
        tree = _io.under(_split(flat, "/", path), how.key, path)
        return _source.from_tree(tree, path)
    tree = _split(_inside(flat, separator, path, how), separator, path)
    return _source.from_tree(tree, path, separator=separator)


def _split(flat: Mapping[str, Any], separator: str, path: Path) -> dict[str, Any]:
    """Names as a tree: of another program, so that only the separator means something."""
    escaped = {"/".join(map(_paths.escape, n.split(separator))): v for n, v in flat.items()}
    return nested(escaped, "/", path)


def _inside(flat: dict[str, Any], separator: str, path: Path, how: Reading) -> dict[str, Any]:
    """The arrays whose names start with the key, without that start."""
    if how.key is None:
        return flat
    start = how.key.replace("/", separator) + separator
    found = {n.removeprefix(start): value for n, value in flat.items() if n.startswith(start)}
    if not found:
        parts = dict.fromkeys(n.partition(separator)[0] for n in flat if separator in n)
        if not parts:
            _io.without_key(path, how)
        _io.under(parts, how.key, path)  # which says what parts there are
    return found


def _check_npy(start: bytes | bytearray, size: int) -> None:
    if start[:6] != b"\x93NUMPY":
        raise ValueError("a member that is no array of NumPy")


def _npy(
    data: bytearray, name: str, told: str | None, path: Path, drop: Sequence[str]
) -> np.ndarray:
    stream = io.BytesIO(data[:70_000])  # the header, which is at most 64 kB
    version = npy.read_magic(stream)
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
    if read is None:
        raise FileFormatError(f"{path}: {name} is of .npy version {version}")
    shape, fortran, dtype = read(stream)
    if told is not None:
        dtype = _extended(told, dtype, name, path)
    if dtype.kind not in "biufc" and told is None:
        gone = _source.left_out(None, drop, tuple(name.split("/")))
        if gone is None:
            raise FileFormatError(
                f"{path}: {name} has dtype {dtype}, which holds objects, text or bytes whose "
                f"meaning the file does not say; drop={[name]!r} leaves it out"
            )
        return next(iter(gone.values()))
    start = stream.tell()
    count = int(np.prod(shape, dtype=object)) if shape else 1
    if min((*shape, 0)) < 0 or count * dtype.itemsize != len(data) - start:
        raise FileFormatError(
            f"{path}: {name} of {dtype}{list(shape)} has {len(data) - start:,} bytes"
        )
    flat = np.frombuffer(data, dtype, count, start)
    value = flat.reshape(shape[::-1]).T if fortran else flat.reshape(shape)
    return _io.native(np.ascontiguousarray(value).reshape(shape))


def _npy_at(
    source: _stored.Source, place: _stored.Sum, name: str, told: str | None, path: Path
) -> Any:
    """An array where it stands in its archive; None where it is not as it would be in memory."""
    head = np.zeros(min(place.stop - place.start, 70_000), np.uint8)
    source.into(head, place.start)
    data = head.tobytes()
    if data[:8] != b"\x93NUMPY\x01\x00":
        return None
    stream = io.BytesIO(data)
    npy.read_magic(stream)
    shape, fortran, dtype = npy.read_array_header_1_0(stream)
    if told is not None:
        dtype = _extended(told, dtype, name, path)
    elif dtype.kind not in "biufc":
        return None
    start = place.start + stream.tell()
    size = int(np.prod(shape, dtype=object)) * dtype.itemsize if min((*shape, 0)) >= 0 else -1
    plain = dtype.isnative and not (fortran and len(shape) > 1)
    if not plain or size != place.stop - start:
        return None
    return _stored.InFile(source, start, shape, dtype, place)


def _extended(told: str, dtype: np.dtype, name: str, path: Path) -> np.dtype:
    if not hasattr(ml_dtypes, told) or dtype_of(told).itemsize != dtype.itemsize:
        raise FileFormatError(f"{path}: {name} of {dtype} is said to be {told!r}")
    return dtype_of(told)


def save_npz(file: Any, module: Any, variables: Any, layout: str | None) -> None:
    """An archive for ``numpy.load``, stored without compression.

    NumPy has no bfloat16 and no 8-bit floats: their bytes are there as ``V2`` and ``V1``, and a
    member ``fwt.json`` says what they are. Names that say all by themselves have none beside them.
    """
    flat = _io.slashed(variables)
    dtypes = {n: v.dtype.name for n, v in flat.items() if hasattr(ml_dtypes, v.dtype.name)}
    told = {**json.loads(description.written(module)), "dtypes": dtypes}
    text = None
    if module is None:
        text = _source.text_of(variables, _io.same_names(variables, Path()))
        told |= {"source": text} if text else {}
    plain = None if module is not None or dtypes else _plainly(flat, variables, bool(text))
    flat = flat if plain is None else plain
    with zipfile.ZipFile(file, "w") as archive:
        for name, value in flat.items():
            if "\0" in name:
                raise refuse(name, "a name with a zero byte, which no archive holds")
            dtype = np.dtype(f"V{value.dtype.itemsize}") if name in dtypes else value.dtype
            header = io.BytesIO()
            said = {"shape": value.shape, "fortran_order": False}
            npy.write_array_header_1_0(header, {**said, "descr": npy.dtype_to_descr(dtype)})
            _io.add_member(archive, f"{name}.npy", value, header.getvalue())
        if plain is None:
            archive.writestr(_OURS, json.dumps(told))


def _plainly(
    flat: dict[str, np.ndarray], variables: Mapping[str, Any], more: bool
) -> dict[str, np.ndarray] | None:
    """The arrays under names from which alone a reader finds the same variables, if there are
    some: those of the file that they come from, or else their paths, unless there is more to say.
    """
    ways = [] if more else [flat]
    if _source.is_bare(variables):
        separator = _nodes.told_of(variables)["bare"]
        joined = [separator.join(_io.parts_of_path(name)[1:]) for name in flat]
        if len(set(joined)) == len(joined):
            ways.insert(0, dict(zip(joined, flat.values(), strict=True)))
    for named in ways:
        with contextlib.suppress(FileFormatError):
            again = _io.slashed(_others(named, Path(), Reading()))
            if again.keys() == flat.keys() and all(again[n] is flat[n] for n in flat):
                return named
    return None


# -- msgpack ----------------------------------------------------------------------------------


def load_msgpack(path: Path, how: Reading) -> Model:
    """What ``flax.serialization.to_bytes`` gives."""
    with reading(path):
        budget = Budget(path, how.max_bytes)
        budget.spend("the file", path.stat().st_size)
        data = path.read_bytes()
        progress(len(data))
        nodes = dict[tuple[str, ...], str]()
        tree = _tree_of(_unpacked(data, path, budget), path, (), nodes)
        tree = _io.under(tree, how.key, path)
        start = tuple(how.key.split("/")) if how.key is not None else ()
        nodes = {n[len(start) :]: k for n, k in nodes.items() if n[: len(start)] == start}
        return Model(None, _source.from_tree(tree, path, how.key, nodes, drop=how.drop))


def _unpacked(data: bytes, path: Path, budget: Budget) -> Any:
    budget.spend("its entries", 128 * _check_msgpack(data, path))

    def extension(code: int, inside: bytes) -> Any:
        if code not in (1, 3):  # an array, a NumPy scalar
            raise FileFormatError(f"{path}: the msgpack extension {code} is no array")
        _check_msgpack(inside, path)
        shape, name, buffer = msgpack.unpackb(inside, raw=True)
        if not all(isinstance(n, int) and n >= 0 for n in shape):
            raise FileFormatError(f"{path}: an array of the shape {shape!r:.60}")
        value = np.frombuffer(buffer, dtype_of(name.decode())).reshape(tuple(shape))
        if not _io.is_numeric(value.dtype):
            raise FileFormatError(f"{path}: an array of dtype {value.dtype}")
        return _io.native(np.array(value))

    return msgpack.unpackb(data, ext_hook=extension, raw=False, strict_map_key=False)


def _tree_of(
    node: Any, path: Path, place: tuple[str, ...], nodes: dict[tuple[str, ...], str]
) -> Any:
    """Lists as dicts of numbers, as Flax's own state dicts have them, and so what nnx keeps under
    numbers, which ``nodes`` says by their places; large arrays whole."""
    if isinstance(node, list):
        nodes[place] = "list"
        node = dict(enumerate(node))
    if not isinstance(node, dict):
        return node
    if node and all(type(k) is int for k in node):
        nodes.setdefault(place, "numbers")
    named = {str(k): v for k, v in node.items() if isinstance(k, str) or type(k) is int}
    if len(named) < len(node):
        raise FileFormatError(f"{path}: an entry whose name is no text and no number, or twice")
    node = named
    if "__msgpack_chunked_array__" not in node:
        return {k: _tree_of(v, path, (*place, k), nodes) for k, v in node.items()}
    shape, chunks = (list(node[k].values()) for k in ("shape", "chunks"))
    if not all(isinstance(c, np.ndarray) for c in chunks):
        raise FileFormatError(f"{path}: a piece of a large array is no array")
    return np.concatenate([np.ravel(c) for c in chunks]).reshape(shape)


# How many bytes follow a code: so many; a length and more; a length in entries.
_FIXED = {0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8,
          **{start + i: 1 << i for start in (0xCC, 0xD0) for i in range(4)},
          **{0xD4 + i: 1 + (1 << i) for i in range(5)}}  # fmt: skip
_SIZED = {0xC4: (1, 0), 0xC5: (2, 0), 0xC6: (4, 0), 0xC7: (1, 1), 0xC8: (2, 1), 0xC9: (4, 1),
          0xD9: (1, 0), 0xDA: (2, 0), 0xDB: (4, 0)}  # fmt: skip
_MANY = {0xDC: (2, 1), 0xDD: (4, 1), 0xDE: (2, 2), 0xDF: (4, 2)}


def _check_msgpack(data: bytes, path: Path) -> int:
    """Goes over the headers, so that no declared length is more than the file can hold, and counts
    the entries."""
    at, wanted, depth, entries = 0, [1], 0, 0
    while wanted:
        if wanted[-1] == 0:
            wanted.pop()
            continue
        wanted[-1] -= 1
        entries += 1
        if at >= len(data):
            raise FileFormatError(f"{path}: it is truncated")
        code, at = data[at], at + 1
        count = 0
        if code <= 0x7F or code >= 0xE0 or code in _FIXED:
            at += _FIXED.get(code, 0)
        elif 0xA0 <= code <= 0xBF:
            at += code & 0x1F
        elif code in _SIZED:
            width, more = _SIZED[code]
            at += width + more + int.from_bytes(data[at : at + width], "big")
        elif code in _MANY:
            width, each = _MANY[code]
            count, at = each * int.from_bytes(data[at : at + width], "big"), at + width
        elif code <= 0x9F:
            count = (code & 0x0F) * (2 if code <= 0x8F else 1)
        else:
            raise FileFormatError(f"{path}: the byte {code:#x} at {at - 1} is no msgpack")
        depth = len(wanted)
        if at > len(data) or count > len(data) - at or depth > 100:
            raise FileFormatError(f"{path}: it is truncated, or declares more than it holds")
        if count:
            wanted.append(count)
    if at != len(data):
        raise FileFormatError(f"{path}: {len(data) - at} bytes stand behind its end")
    return entries


def save_msgpack(file: Any, module: Any, variables: Any, layout: str | None) -> None:
    """Bytes for ``flax.serialization.from_bytes`` and ``msgpack_restore``: the variables alone."""
    from flax import serialization

    flat = _io.slashed(variables)
    for name, value in flat.items():
        if value.dtype.name != "bfloat16" and hasattr(ml_dtypes, value.dtype.name):
            raise refuse(name, f"dtype {value.dtype}: Flax itself can't read it from msgpack")
    file.write(serialization.msgpack_serialize(_source.to_tree(variables, flat)))
