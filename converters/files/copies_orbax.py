"""Orbax checkpoints with other values of their arrays.

The arrays are changed in the store that Orbax keeps them in, whose other entries are copied, so
that the tree, the shardings and what else Orbax says of them stay.
"""

import functools
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from fwt._types import Model
from fwt.converters import io as _io
from fwt.converters.files import copies, orbax
from fwt.converters.files import source as _source
from fwt.converters.io import Reading, progress, reading

_BATCH = 64 << 20  # so many bytes are committed at a time


def copy_of(source: Path, variables: Any, key: Any) -> copies.Copy:
    """A checkpoint, or one in a folder of several, with these arrays in place of its own."""
    names: dict[int, str] = {}  # of each stand-in, its array's in the store
    every: dict[Path, set[str]] = {}
    items = set[Path]()

    def load(path: Path, how: Reading) -> Model:
        item, inner = orbax.item_of(path, how.key)
        items.add(item)
        with reading(path), orbax.quietly():
            whole = orbax.metadata(item)
            every[item] = set(_names(whole))
            tree = orbax.plain(_stand_ins(_io.under(whole, inner, path), names), (), {})
            orbax.put_empty(tree, orbax.ours(item), path)
        return Model(None, _source.from_tree(tree, path))

    held = copies.by_stand_in(source, load, variables, key, exact=True)
    item = items.pop()
    if items:
        raise copies.OtherArraysError(f"{source}: the parts under key= are of several checkpoints")
    values = {names[number]: x for number, x in held.items() if number in names}
    new = functools.partial(_write, item, every[item], values)
    return copies.Copy(folders={item: new})


def _stand_ins(tree: Any, names: dict[int, str]) -> Any:
    if isinstance(tree, list | tuple):
        return [_stand_ins(each, names) for each in tree]
    if isinstance(tree, dict):
        return {name: _stand_ins(each, names) for name, each in tree.items()}
    if getattr(tree, "shape", None) is None or getattr(tree, "dtype", None) is None:
        return tree
    value = copies.stand_in(tree.shape, np.dtype(tree.dtype))
    names[id(value)] = tree.name
    return value


def _names(tree: Any) -> Iterable[str]:
    if isinstance(tree, list | tuple | dict):
        for each in tree.values() if isinstance(tree, dict) else tree:
            yield from _names(each)
    elif getattr(tree, "name", None) is not None:
        yield tree.name


def _write(item: Path, every: set[str], new: dict[str, np.ndarray], folder: Path) -> None:
    """A checkpoint with these arrays, by their names in the store."""
    from tensorstore import KvStore

    one_store = (item / "manifest.ocdbt").exists()
    for entry in item.iterdir():
        own = entry.name in ("manifest.ocdbt", "d") or entry.name.startswith("ocdbt.process_")
        if not (one_store and own):
            copied: Any = shutil.copytree if entry.is_dir() else shutil.copy2
            copied(entry, folder / entry.name)
    changed = {n for n, x in new.items() if _bytes(_opened(item, n)) != np.asarray(x).tobytes()}
    if one_store:
        old = KvStore.open(_store(item)).result()
        keys = old.list().result()  # which makes it known what the store is like
        config = dict(old.spec(retain_context=True).to_json()["config"])
        config.pop("uuid", None)
        made = KvStore.open({**_store(folder), "config": config}).result()
        _copy(old, made, keys, every, changed)
    for name in changed:
        _opened(folder, name).write(np.asarray(new[name])).result()
        progress(new[name].nbytes)


def _copy(old: Any, new: Any, keys: list[bytes], every: set[str], changed: set[str]) -> None:
    """Copies the entries of a store, but the values of arrays that are changed."""
    from tensorstore import Transaction

    batch, size = Transaction(), 0
    for key in keys:
        text = key.decode()
        starts = (text[:i] for i in range(len(text), 0, -1) if text[i : i + 1] == "/")
        owner = next((start for start in starts if start in every), None)
        told = text.rpartition("/")[2] in (".zarray", ".zattrs", "zarr.json")
        if owner in changed and not told:
            continue
        value = old.read(key).result().value
        new.with_transaction(batch).write(key, value).result()
        size += len(value)
        progress(len(value))
        if size > _BATCH:
            batch.commit_async().result()
            batch, size = Transaction(), 0
    batch.commit_async().result()


def _bytes(array: Any) -> bytes:
    found: bytes = array.read().result().tobytes()
    return found


def _store(folder: Path) -> dict[str, Any]:
    base = {"driver": "file", "path": f"{folder.absolute()}/", "file_io_sync": False}
    return {"driver": "ocdbt", "base": base}


def _opened(folder: Path, name: str) -> Any:
    """An array of a checkpoint in its store."""
    import tensorstore

    one_store = (folder / "manifest.ocdbt").exists()
    store = _store(folder) if one_store else {"driver": "file", "path": f"{folder.absolute()}/"}
    told = _io.read_json(folder / "_METADATA")
    spec = {
        "driver": "zarr3" if told.get("use_zarr3") else "zarr",
        "kvstore": {**store, "path": f"{name}/" if one_store else f"{store['path']}{name}/"},
        "store_data_equal_to_fill_value": True,  # Orbax takes no piece for granted
    }
    return tensorstore.open(spec, open=True).result()
