"""torch files with other values of their tensors, single or in shards."""

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fwt import _nodes
from fwt.converters import io as _io
from fwt.converters.files import copies, torch_file
from fwt.converters.files import source as _source
from fwt.converters.io import Reading, reading


def copy_of(source: Path, variables: Any, key: Any) -> copies.Copy:
    """A file with these arrays in place of its own, or of those under a key; or shards."""
    if source.is_dir() or source.name.endswith(".json"):
        return _of_shards(source, variables)
    if zipfile.is_zipfile(source):
        return copies.Copy({source: _into(source, _with_part(variables, key))})
    if key is not None:
        raise copies.OtherArraysError(f"{source}: a file of before torch 1.6 is written anew")
    with reading(source):
        held = torch_file.load_torch(source, Reading(fold=False)).variables
    copies.check(source, _io.dotted(held), _io.dotted(variables))
    return copies.Copy({source: lambda file: torch_file.save_torch(file, None, variables, None)})


def _of_shards(source: Path, variables: Any) -> copies.Copy:
    """The shards of an index, or of the folder that holds one."""
    path = _io.index_in(source, ".bin.index.json")
    with reading(path):
        where = _io.read_json(path)["weight_map"]
    new = _io.dotted(variables)
    copies.check(path, {n: None for n in where if n in new or not torch_file._extra(n)}, new, False)
    told = _nodes.told_of(variables)
    files: dict[Path, Any] = {}
    for name in dict.fromkeys(where.values()):
        shard = _io.sibling(path, name)
        own = {n: x for n, x in new.items() if where[n] == name}
        part = _source.with_source({"params": {}, **_io.nested(own, ".", shard)}, told)
        files |= copy_of(shard, part, None).files
    return copies.Copy(files)


def _with_part(variables: Mapping[str, Any], key: Any) -> Any:
    """The variables, which know under which key of their file they stand."""
    told = _nodes.told_of(variables)
    if not isinstance(key, str) or told.get("part") == key:
        return variables
    return _source.with_source(variables, {**told, "part": key})


def _into(source: Path, variables: Any) -> Callable[[Any], None]:
    with reading(source):
        held: dict[str, np.ndarray] = torch_file.views(source, variables)[0]
    copies.check(source, held, _io.dotted(variables))
    return lambda file: torch_file.save_into(file, source, variables)
