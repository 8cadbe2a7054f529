"""Orbax checkpoints: folders, read as NumPy arrays or onto given shardings."""

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from fwt.converters import _architecture, _io
from fwt.converters._io import Budget, Reading, progress, reading
from fwt.converters._row import refuse

from fwt._types import FileFormatError, Model

_OURS = "fwt.json"  # the architecture, and the arrays of size zero, which Orbax can't hold
MARKERS = ("_METADATA", "manifest.ocdbt", "_CHECKPOINT_METADATA")


def is_orbax(path: Path) -> bool:
    """Whether a folder is a checkpoint, or one of items such as ``default`` or ``state``."""
    return any((path / name).exists() for name in MARKERS)


def load_orbax(path: Path, how: Reading) -> Model:
    """A checkpoint of arrays; of several items, ``key`` names one first."""
    with reading(path), _quietly():
        files = _io.folder_files(path)
        size = sum(f.stat().st_size for f in files)
        budget = Budget(path, how.max_bytes, size)
        key, folder = how.key, path
        if not (path / "_METADATA").exists():
            folder, key = _item(path, key)
        told = folder / _OURS
        ours = _io.read_json(told) if told.exists() else None
        tree = _restored(folder, budget, key, path, how.shardings)
        progress(size)
        if ours is None:
            return Model(None, _io.as_variables(tree, path))
        for name, (shape, dtype) in ours["empty"].items():
            *parents, last = _io.parts_of_path(name)
            node = tree
            for part in parents:
                node = node.setdefault(part, {})
            node[last] = np.zeros(shape, _io.dtype_of(dtype))
            if node[last].size:
                raise FileFormatError(f"{path}: {name} of {shape} is said to be empty")
        variables = _io.as_variables(tree, path)
        if ours["module"] is None:
            return Model(None, variables)
        return _architecture.described(json.dumps(ours), variables, path)


def _item(path: Path, key: str | None) -> tuple[Path, str | None]:
    items = sorted(p.name for p in path.iterdir() if p.is_dir() and (p / "_METADATA").exists())
    first, _, rest = (key or "").partition("/")
    if first in items:
        return path / first, rest or None
    if len(items) == 1:
        return path / items[0], key
    steps = sorted(p.name for p in path.iterdir() if p.is_dir() and is_orbax(p))
    found = f"the items {', '.join(items)}: key= names one" if items else "no item with arrays"
    if steps and not items:
        found = f"the steps {', '.join(steps)}: give the folder of one"
    raise FileFormatError(f"{path}: {found}")


def _restored(folder: Path, budget: Budget, key: str | None, path: Path, shardings: Any) -> Any:
    import orbax.checkpoint as ocp

    handler = ocp.PyTreeCheckpointHandler()
    whole = handler.metadata(folder.absolute()).tree

    def array(leaf: Any) -> bool:
        return hasattr(leaf, "shape") and hasattr(leaf, "dtype")

    tree = _io.under(whole, key, path)
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_leaf)[0]:
        place = "/".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in keys)
        if not array(leaf) or leaf.shape is None or leaf.dtype is None:
            kind = type(leaf).__name__.removesuffix("Metadata").lower()
            raise FileFormatError(f"{path}: {place} is a {kind}, no array; key= picks a part of it")
        if min((*leaf.shape, 0)) < 0:
            raise FileFormatError(f"{path}: {place} has the shape {leaf.shape}")
        size = int(np.prod(leaf.shape, dtype=object)) * np.dtype(leaf.dtype).itemsize
        budget.expand(place, None, size)
    if shardings is None:
        kinds = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree, is_leaf=_is_leaf
        )
    else:
        one = isinstance(shardings, jax.sharding.Sharding)
        each = jax.tree.map(lambda _: shardings, tree, is_leaf=_is_leaf) if one else shardings
        kinds = jax.tree.map(
            lambda _, s: ocp.ArrayRestoreArgs(sharding=s), tree, each, is_leaf=_is_leaf
        )
    wanted: Any = tree
    for part in reversed([] if key is None else key.split("/")):
        wanted, kinds = {part: wanted}, {part: kinds}
    # Only what is under the key is read.
    restored = handler.restore(
        folder.absolute(),
        args=ocp.args.PyTreeRestore(wanted, restore_args=kinds, partial_restore=True),
    )
    return _plain(_io.under(restored, key, path))


def _is_leaf(node: Any) -> bool:
    return hasattr(node, "shape") or node is None


def _plain(node: Any) -> Any:
    if isinstance(node, list | tuple):
        node = {str(i): v for i, v in enumerate(node)}
    if isinstance(node, Mapping):
        return {str(k): _plain(v) for k, v in node.items()}
    return node if isinstance(node, jax.Array) else np.asarray(node)


def save_orbax(folder: Path, module: Any, variables: Any) -> None:
    """A checkpoint that ``orbax.checkpoint.PyTreeCheckpointer().restore`` takes."""
    import orbax.checkpoint as ocp

    flat = _io.slashed(variables)
    for name, value in flat.items():
        if value.dtype.hasobject or value.dtype.names:
            raise refuse(name, f"dtype {value.dtype} can't be written to Orbax")
    empty = {n: [list(v.shape), v.dtype.name] for n, v in flat.items() if v.size == 0}
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        if name not in empty:
            *parents, last = _io.parts_of_path(name)
            node = tree
            for part in parents:
                node = node.setdefault(part, {})
            node[last] = value
    with _quietly():
        handler = ocp.PyTreeCheckpointHandler()
        handler.save(folder.absolute(), args=ocp.args.PyTreeSave(tree))
        handler.finalize(folder.absolute())
    progress(sum(v.nbytes for v in flat.values()))
    told = {**json.loads(_architecture.description(module)), "empty": empty}
    (folder / _OURS).write_text(json.dumps(told))


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without Orbax's remarks on its own doings."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
