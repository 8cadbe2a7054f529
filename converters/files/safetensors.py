"""safetensors, single and sharded: read and written a tensor at a time.

The package checks the file; the tensors are then read at the offsets that it found right, since
its NumPy side lacks the 8-bit floats.
"""

import json
import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fwt import _nodes
from fwt._errors import refuse
from fwt._types import ConversionError, FileFormatError, Model
from fwt.converters import io as _io
from fwt.converters.files import source as _source
from fwt.converters.files import stored as _stored
from fwt.converters.frameworks import description
from fwt.converters.io import Budget, Reading, dtype_of, nested, reading

DTYPES = {
    "BOOL": "bool",
    **{f"{k}{bits}": f"{name}{bits}" for k, name in (("U", "uint"), ("I", "int"))
       for bits in (8, 16, 32, 64)},
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip
_NAMES = {name: code for code, name in DTYPES.items()}
_ARCHITECTURE, _SOURCE = _source.OURS  # the latter is what the format has no place for
INDEX = "model.safetensors.index.json"


def load_safetensors(path: Path, how: Reading) -> Model:
    """A .safetensors file: ours with its architecture, any other as weights only."""
    with reading(path):
        budget = Budget(path, how.max_bytes)
        flat, metadata = _read(path, budget)
        return _model(flat, metadata, path, how, budget)


def load_sharded(path: Path, how: Reading) -> Model:
    """The index of a sharded file, or the folder that holds one."""
    path = _io.index_in(path, ".safetensors.index.json")
    with reading(path):
        index = _io.read_json(path)
        where, metadata = index["weight_map"], index.get("metadata") or {}
        flat: dict[str, np.ndarray] = {}
        own: dict[str, str] = {}
        for shard in sorted(set(where.values())):
            held, theirs = _read(_io.sibling(path, shard), None)
            own = {**theirs, **own}
            wanted = {name for name, place in where.items() if place == shard}
            if wanted != set(held):
                name = sorted(wanted ^ set(held))[0]
                raise FileFormatError(f"{path}: {name} stands in one of the index and {shard} only")
            flat |= held
        flat = {name: flat[name] for name in where}
        budget = Budget(path, how.max_bytes, sum(leaf.nbytes for leaf in flat.values()))
        return _model(flat, own, path, how, budget, metadata)


def _read(path: Path, budget: Budget | None) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    from safetensors import safe_open

    budget = budget or Budget(path)
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > min(path.stat().st_size, 100_000_000):
            raise FileFormatError(f"{path}: its header declares {size:,} bytes")
        text = file.read(size)
        budget.parsed(text, "its header")
    there = _stored.Source(path) if _stored.WANTED.get() else None
    with safe_open(path, framework="numpy") as checked, open(path, "rb") as file:
        metadata = checked.metadata() or {}
        header = json.loads(text, object_pairs_hook=_once)
        out: dict[str, Any] = {}
        names = checked.keys()  # it is no mapping, which could be iterated over
        for name in names:
            entry = header[name]
            if entry["dtype"] not in DTYPES:
                raise FileFormatError(
                    f"{path}: {name} has dtype {entry['dtype']}, which NumPy lacks"
                )
            dtype = dtype_of(DTYPES[entry["dtype"]])
            start, end = entry["data_offsets"]
            if there is not None:
                out[name] = _stored.InFile(there, 8 + size + start, entry["shape"], dtype)
                if out[name].nbytes != end - start:
                    raise FileFormatError(f"{path}: {name} has {end - start} bytes")
                continue
            budget.spend(name, end - start)
            value = np.empty(entry["shape"], dtype)
            if value.nbytes != end - start:
                raise FileFormatError(f"{path}: {name} has {end - start} bytes")
            file.seek(8 + size + start)
            _io.read_into(file, value)
            out[name] = value
    return out, metadata


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        raise ValueError("a name stands twice in the header")
    return out


def _model(
    flat: dict[str, np.ndarray],
    own: Mapping[str, str],
    path: Path,
    how: Reading,
    budget: Budget,
    index: Mapping[str, Any] = types.MappingProxyType({}),
) -> Model:
    """The model of some tensors with the metadata of their file, and of the index if there is
    one."""
    _io.without_key(path, how)
    metadata = {**own, **{n: v for n, v in index.items() if isinstance(v, str)}}
    told = _source.checked(Budget(path).parsed(metadata.get(_SOURCE, "{}"), "its source"))
    # A tensor of two names is written once, and the metadata says the other.
    second = _second_names(metadata, told, flat)
    for name, first in second.items():
        budget.spend(name, flat[first].nbytes)  # another format may copy it
        flat[name] = flat[first]
    flat = _source.tied(flat, told)
    of_index = _source.without_ours({n: v for n, v in index.items() if n not in second})
    kept = _source.without_ours({n: v for n, v in metadata.items() if n in own or n in second})
    if kept.get("format") == "np":  # which says nothing of the names, and hides them from others
        del kept["format"]
    for name in ("total_size", "format"):
        of_index.pop(name, None)
    told |= {"safetensors": kept, "index": of_index, "ties": _source.ties(flat)}
    if how.module and _ARCHITECTURE in metadata:
        text = metadata[_ARCHITECTURE]
        Budget(path).parsed(text, "its architecture")
        model = description.read(text, nested(flat, "/", path), path)
        if model.module is not None:
            return model
        return Model(None, _source.with_source(model.variables, told))
    if _ARCHITECTURE in metadata and all("/" in name for name in flat):  # ours: with collections
        return Model(None, _source.with_source({"params": {}, **nested(flat, "/", path)}, told))
    return Model(None, _source.with_source(nested(flat, ".", path), told))


def _second_names(
    metadata: Mapping[str, str], told: Mapping[str, Any], flat: Mapping[str, Any]
) -> dict[str, str]:
    """The names that stand in the metadata alone, and the tensor that each is: a file of ours lists
    them, and other programs write them as any other entry."""
    if "ties" not in told:
        return {n: v for n, v in metadata.items() if _is_tie(n, v, flat)}
    out: dict[str, str] = {}
    for group in told["ties"]:
        if first := next((n for n in group if n in flat), None):
            out |= {n: first for n in group if n not in flat}
    return out


def _is_tie(name: str, value: str, flat: Mapping[str, Any]) -> bool:
    """Whether an entry of the metadata by itself says that a tensor has a second name."""
    if name in flat or value not in flat:
        return False
    return "." in name or name == value.rpartition(".")[2]


_TORCH = re.compile("weight(_[a-z0-9_]+)?|running_(mean|var)")
_FLAX = {"kernel", "scale", "embedding"}


def _named(module: Any, variables: Any) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors and metadata of a file: with the architecture, or under the names that the
    weights came with."""
    tensors = _io.same_names(variables, Path()) if module is None else None
    told = _nodes.told_of(variables) if module is None else {}
    metadata = _source.without_ours(told.get("safetensors", {}))
    if tensors is None:
        metadata = {**metadata, "format": "np", _ARCHITECTURE: description.written(module)}
        tensors = _io.slashed(variables)
    else:
        tensors = _source.tied(tensors, told)
        ends = {name.rpartition(".")[2] for name in tensors}
        named_so = any(map(_TORCH.fullmatch, ends)) and not ends & _FLAX
        of_torch = told.get("names") or told.get("torch") or named_so
        metadata.setdefault("format", "pt" if of_torch else "np")
        beside = {n: told[n] for n in ("names", "torch") if told.get(n)}
        if not _source.has_order(tensors, told):
            beside = {}
        for group in told.get("ties", ()):
            metadata = {n: v for n, v in metadata.items() if not (n in group and v in group)}
        ties, dropped = _source.ties(_source.in_order(tensors, told)), {}
        for group in ties:
            kept = next((n for n in group if n not in told.get("safetensors", {})), group[0])
            for name in group:
                if name != kept and name not in metadata and name not in _source.OURS:
                    dropped[name] = kept
                    del tensors[name]
        metadata |= dropped
        # As others write it, a tie may look like any other entry.
        evident = _second_names(metadata, {}, tensors) == dropped
        if (ties and beside) or not evident or len(dropped) < sum(len(g) - 1 for g in ties):
            beside["ties"] = ties
        if beside:
            metadata[_SOURCE] = json.dumps(beside)
    for name, leaf in tensors.items():
        if leaf.dtype.name not in _NAMES:
            raise refuse(name, f"dtype {leaf.dtype} can't be written to .safetensors")
    return tensors, metadata


def save_safetensors(file: Any, module: Any, variables: Any, layout: str | None) -> None:
    """A .safetensors file."""
    tensors, metadata = _named(module, variables)
    _write(file, tensors, metadata)


def save_sharded(folder: Path, module: Any, variables: Any, shard_bytes: int) -> None:
    """A folder of shards of at most so many bytes each, and their index."""
    tensors, metadata = _named(module, variables)
    dropped = {n: v for n, v in metadata.items() if n not in tensors and v in tensors}
    in_index = {n: v for n, v in metadata.items() if n in _source.OURS or n in dropped}
    own = {n: v for n, v in metadata.items() if n not in in_index}
    shards: list[dict[str, np.ndarray]] = [{}]
    room = shard_bytes
    for name, leaf in tensors.items():
        if leaf.nbytes > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = leaf
        room -= leaf.nbytes
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        with open(folder / name, "wb") as file:
            _write(_io.Counted(file), shard, own)
        where |= dict.fromkeys(shard, name)
    total = {"total_size": sum(leaf.nbytes for leaf in tensors.values())}
    told = _nodes.told_of(variables) if module is None else {}
    beside = _source.without_ours(told.get("index", {}))
    index = {"metadata": {**beside, **total, **in_index}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index, indent=2))


def _write(file: Any, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    # The widest first, so that each is aligned to its own width.
    ordered = sorted(tensors, key=lambda n: (-tensors[n].dtype.itemsize, n))
    for name in ordered:
        leaf = tensors[name]
        if name == "__metadata__":
            raise ConversionError("a tensor can't be named '__metadata__'")
        code, end = _NAMES[leaf.dtype.name], start + leaf.nbytes
        header[name] = {"dtype": code, "shape": list(leaf.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > 100_000_000:
        raise ConversionError(f"the header of {len(tensors)} names is larger than 100 MB")
    file.write(len(text).to_bytes(8, "little") + text)
    for name in ordered:
        _io.write_array(file, tensors[name])
