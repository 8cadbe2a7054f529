""".safetensors files with other values of their tensors, single or in shards.

The header, the order of the tensors and the metadata stay; only where a tensor has come to have
another shape or dtype, the header says so, and the places that follow from it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fwt import _nodes
from fwt._errors import refuse
from fwt._types import FileFormatError
from fwt.converters import io as _io
from fwt.converters.files import copies
from fwt.converters.files import safetensors as _files
from fwt.converters.io import Budget, reading


def copy_of(source: Path, variables: Any, key: Any) -> copies.Copy:
    """A file with these arrays in place of its own."""
    with reading(source):
        start, header = _checked(source)
        new = _arrays(source, variables, header, header.get("__metadata__", {}))
    return copies.Copy({source: lambda file: _write(file, start, header, new)})


def copy_of_shards(source: Path, variables: Any, key: Any) -> copies.Copy:
    """The shards of an index, or of the folder that holds one, with these arrays."""
    path = _io.index_in(source, ".safetensors.index.json")
    with reading(path):
        index = _io.read_json(path)
        shards: dict[Path, tuple[bytes, dict[str, Any]]] = {}
        for name in sorted(set(index["weight_map"].values())):
            shard = _io.sibling(path, name)
            shards[shard] = _checked(shard)
        entries: dict[str, Any] = {}
        metadata = dict(index.get("metadata") or {})
        for _, header in shards.values():
            metadata = {**header.get("__metadata__", {}), **metadata}
            entries |= {n: e for n, e in header.items() if n != "__metadata__"}
        new = _arrays(path, variables, entries, metadata)
    whole = path.with_name(path.name.removesuffix(".index.json"))
    if whole.exists():
        raise FileFormatError(
            f"{path.parent}: it holds {whole.name} and {path.name}, two copies of one model: "
            "remove one of them"
        )

    def one(shard: Path) -> Any:
        return lambda file: _write(file, *shards[shard], new)

    files = {shard: one(shard) for shard in shards}
    if any(_is_other(entries[name], value) for name, value in new.items() if name in entries):
        files[path] = lambda file: file.write(_index(index, entries, new))
    return copies.Copy(files)


def _checked(path: Path) -> tuple[bytes, dict[str, Any]]:
    """What stands before the tensors of a file, and what it says, which the package has checked."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy"):
        pass
    with open(path, "rb") as file:
        start = file.read(8)
        size = int.from_bytes(start, "little")
        if size > min(path.stat().st_size, 100_000_000):
            raise FileFormatError(f"{path}: its header declares {size:,} bytes")
        text = file.read(size)
    Budget(path).parsed(text, "its header")
    header: dict[str, Any] = json.loads(text, object_pairs_hook=_files._once)
    return start + text, header


def _arrays(
    source: Path, variables: Any, entries: Mapping[str, Any], metadata: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """The new arrays under the names of the file."""
    names = {name: entry for name, entry in entries.items() if name != "__metadata__"}
    slashes = _files._ARCHITECTURE in metadata and all("/" in name for name in names)
    new = _io.slashed(variables) if slashes else _io.dotted(variables)
    texts = {n: v for n, v in metadata.items() if isinstance(v, str)}
    told = json.loads(texts.get(_files._SOURCE, "{}"))
    second = _files._second_names(texts, told, names)
    copies.check(source, {**names, **dict.fromkeys(second)}, new, exact=False)
    for name, first in second.items():
        if not _nodes.same_values(new[name], new[first]):
            raise copies.OtherArraysError(
                f"{source}: {name} and {first} are one tensor in it, and came to differ"
            )
    for name, value in new.items():
        if value.dtype.name not in _files._NAMES:
            raise refuse(name, f"dtype {value.dtype} can't be written to .safetensors")
    return {name: new[name] for name in names}


def _is_other(entry: Mapping[str, Any], value: np.ndarray) -> bool:
    return (entry["dtype"], entry["shape"]) != (_files._NAMES[value.dtype.name], list(value.shape))


def _write(
    file: Any, start: bytes, header: Mapping[str, Any], new: Mapping[str, np.ndarray]
) -> None:
    """The tensors of one file, in their order."""
    header = dict(header)
    entries = {name: e for name, e in header.items() if name != "__metadata__"}
    order = sorted(entries, key=lambda n: entries[n]["data_offsets"])
    if any(_is_other(entries[name], new[name]) for name in order):
        widths = {name: new[name].dtype.itemsize for name in order}
        if any(n % widths[name] for name, n in zip(order, _starts(order, new), strict=True)):
            order.sort(key=lambda name: -widths[name])  # each is aligned to its own width
        for name, at in zip(order, _starts(order, new), strict=True):
            value = new[name]
            header[name] = {
                "dtype": _files._NAMES[value.dtype.name],
                "shape": list(value.shape),
                "data_offsets": [at, at + value.nbytes],
            }
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        start = len(text).to_bytes(8, "little") + text
    file.write(start)
    for name in order:
        _io.write_array(file, new[name])


def _starts(order: list[str], new: Mapping[str, np.ndarray]) -> list[int]:
    found = [0]
    for name in order:
        found.append(found[-1] + new[name].nbytes)
    return found[:-1]


def _index(
    index: dict[str, Any], entries: Mapping[str, Any], new: Mapping[str, np.ndarray]
) -> bytes:
    """The index with the sizes of the new arrays."""
    told = dict(index.get("metadata") or {})
    counts = {
        "total_size": sum(x.nbytes for x in new.values()),
        "total_parameters": sum(x.size for x in new.values()),
    }
    told |= {name: count for name, count in counts.items() if name in told}
    return (json.dumps({**index, "metadata": told}, indent=2) + "\n").encode()
