"""Orbax checkpoints: folders, read as NumPy arrays or onto given shardings."""

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fwt import _tree
from fwt._errors import refuse
from fwt._types import ConversionError, FileFormatError, Model
from fwt.converters import io as _io
from fwt.converters.files import source as _source
from fwt.converters.frameworks import description
from fwt.converters.io import Budget, Reading, progress, reading

if TYPE_CHECKING:
    import jax
else:
    from fwt._later import jax

_OURS = "fwt.json"  # the architecture, and the arrays of size zero, which Orbax can't hold
MARKERS = ("_METADATA", "manifest.ocdbt", "_CHECKPOINT_METADATA")


def is_orbax(path: Path) -> bool:
    """Whether a folder is a checkpoint, or one of items such as ``default`` or ``state``."""
    return any((path / name).exists() for name in MARKERS)


def is_whole(path: Path) -> bool:
    """Whether a folder is one checkpoint and holds nothing else."""
    own = {*MARKERS, _OURS, "commit_success.txt", "_sharding", "array_metadatas", "d"}
    names = {p.name for p in path.iterdir()}
    return {"_METADATA", "manifest.ocdbt"} <= names and all(
        n in own or n.startswith("ocdbt.process_") for n in names
    )


def load_orbax(path: Path, how: Reading) -> Model:
    """A checkpoint of arrays; of several items, ``key`` names one first."""
    with reading(path), quietly():
        files = _io.folder_files(path)
        size = sum(f.stat().st_size for f in files)
        budget = Budget(path, how.max_bytes, size)
        folder, key = item_of(path, how.key)
        told = ours(folder)
        nodes = dict[tuple[str, ...], str]()
        tree = plain(_restored(folder, budget, key, path, how), (), nodes)
        progress(size)
        if told is None:
            return Model(None, _source.from_tree(tree, path, nodes=nodes, drop=how.drop))
        put_empty(tree, told, path)
        variables = _source.from_tree(tree, path, nodes=nodes, drop=how.drop)
        if told["module"] is None or not how.module:
            return Model(None, _source.restored(variables, told.get("source")))
        return description.read(json.dumps(told), variables, path)


def ours(folder: Path) -> Any:
    """What a checkpoint of ours says beside its arrays; None of another."""
    told = folder / _OURS
    return _io.read_json(told) if told.exists() else None


def put_empty(tree: dict[str, Any], told: Any, path: Path) -> None:
    """Puts the arrays of size zero, which a checkpoint of ours lists, into its tree."""
    for name, (shape, dtype) in (told["empty"] if told else {}).items():
        *parents, last = _io.parts_of_path(name)
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        kind = _io.dtype_of(dtype)
        if 0 not in shape or not _io.is_numeric(kind):
            raise FileFormatError(f"{path}: {name}, {dtype}{shape}, is said to be empty")
        node[last] = np.zeros(shape, kind)


def item_of(path: Path, key: str | None) -> tuple[Path, str | None]:
    """The folder of the checkpoint that a key names first, and the rest of the key."""
    return (path, key) if (path / "_METADATA").exists() else _item(path, key)


def metadata(folder: Path) -> Any:
    """What a checkpoint says of each of its leaves, as a tree."""
    import orbax.checkpoint as ocp

    return ocp.PyTreeCheckpointHandler().metadata(folder.absolute()).tree


def _item(path: Path, key: str | None) -> tuple[Path, str | None]:
    items = sorted(p.name for p in path.iterdir() if p.is_dir() and (p / "_METADATA").exists())
    first, _, rest = (key or "").partition("/")
    if first in items:
        return path / first, rest or None
    if len(items) == 1:
        return path / items[0], key
    steps = sorted(
        (p.name for p in path.iterdir() if p.is_dir() and is_orbax(p)), key=_tree.natural
    )
    if first in steps and not items:
        inner = path / first
        return (
            (inner, rest or None) if (inner / "_METADATA").exists() else _item(inner, rest or None)
        )
    found = f"the items {', '.join(items)}: key= names one" if items else "no item with arrays"
    if steps and not items:
        found = f"the steps {', '.join(steps)}: give the folder of one, or name one with key="
    raise FileFormatError(f"{path}: it holds {found}")


def _restored(folder: Path, budget: Budget, key: str | None, path: Path, how: Reading) -> Any:
    """What stands under ``key`` in the folder of a checkpoint; ``how`` has the key from the path
    on."""
    import orbax.checkpoint as ocp

    shardings = how.shardings
    handler = ocp.PyTreeCheckpointHandler()
    whole = metadata(folder)

    def array(leaf: Any) -> bool:
        return getattr(leaf, "shape", None) is not None and getattr(leaf, "dtype", None) is not None

    tree = _io.under(whole, key, path)
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_leaf)[0]:
        parts = tuple(str(getattr(k, "key", getattr(k, "idx", k))) for k in keys)
        place = "/".join(parts)
        if not array(leaf) and _source.left_out(None, how.drop, parts):
            continue  # what it holds is small
        if not array(leaf):
            way = _io.way_to_parts(tree, how.key, array) or "key= picks a part of it"
            raise FileFormatError(
                f"{path}: {place} is no array; {way}, drop={[place]!r} leaves it out"
            )
        if min((*leaf.shape, 0)) < 0:
            raise FileFormatError(f"{path}: {place} has the shape {leaf.shape}")
        size = int(np.prod(leaf.shape, dtype=object)) * np.dtype(leaf.dtype).itemsize
        budget.expand(place, None, size)
        # A piece is decompressed whole, however little of it is wanted.
        piece = getattr(getattr(leaf, "storage", None), "chunk_shape", None) or ()
        width = np.dtype(leaf.dtype).itemsize
        budget.expand(f"a piece of {place}", None, int(np.prod(piece, dtype=object)) * width)
    if shardings is None:
        kinds = jax.tree.map(
            lambda x: ocp.RestoreArgs(restore_type=np.ndarray if array(x) else None),
            tree,
            is_leaf=_is_leaf,
        )
    else:
        for keys, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_leaf)[0]:
            if array(leaf) and np.dtype(leaf.dtype) != jax.dtypes.canonicalize_dtype(leaf.dtype):
                raise FileFormatError(
                    f"{path}: {jax.tree_util.keystr(keys)} is {leaf.dtype}, which JAX would cut to "
                    "32 bits: jax.enable_x64, or leave out shardings="
                )
        one = isinstance(shardings, jax.sharding.Sharding)
        each = jax.tree.map(lambda _: shardings, tree, is_leaf=_is_leaf) if one else shardings
        try:
            kinds = jax.tree.map(
                lambda x, s: ocp.ArrayRestoreArgs(sharding=s) if array(x) else ocp.RestoreArgs(),
                tree,
                each,
                is_leaf=_is_leaf,
            )
        except ValueError as error:
            held = ", ".join(map(repr, tree)) if isinstance(tree, Mapping) else "a list"
            held = held if key is None else f"{held} under key={how.key!r}"
            raise ConversionError(
                f"{path}: shardings= is one sharding, or a tree of them like that of the arrays, "
                f"of {held}; found another tree, {jax.tree.structure(shardings)}"[:400]
            ) from error
    wanted: Any = tree
    for part in reversed([] if key is None else key.split("/")):
        wanted, kinds = {part: wanted}, {part: kinds}
    # Only what is under the key is read.
    restored = handler.restore(
        folder.absolute(),
        args=ocp.args.PyTreeRestore(wanted, restore_args=kinds, partial_restore=True),
    )
    return _io.under(restored, key, path)


def _is_leaf(node: Any) -> bool:
    return hasattr(node, "shape") or node is None


def plain(node: Any, place: tuple[str, ...], nodes: dict[tuple[str, ...], str]) -> Any:
    """A tree of dicts and arrays; ``nodes`` says by their places which dicts were lists."""
    if isinstance(node, list | tuple):
        nodes[place] = "list"
        node = {str(i): v for i, v in enumerate(node)}
    if isinstance(node, Mapping):
        return {str(k): plain(v, (*place, str(k)), nodes) for k, v in node.items()}
    return node if isinstance(node, jax.Array) else np.asarray(node)


def save_orbax(folder: Path, module: Any, variables: Any) -> None:
    """A checkpoint that ``orbax.checkpoint.PyTreeCheckpointer().restore`` takes."""
    import orbax.checkpoint as ocp

    flat = _io.slashed(variables)
    for name, value in flat.items():
        if value.dtype.hasobject or value.dtype.names:
            raise refuse(name, f"dtype {value.dtype} can't be written to Orbax")
    empty = {n: [list(v.shape), v.dtype.name] for n, v in flat.items() if v.size == 0}
    joined = [".".join(_io.parts_of_path(n)) for n in flat]
    if len(set(joined)) < len(joined):
        twice = next(n for n in joined if joined.count(n) > 1)
        raise ConversionError(f"two arrays would be named {twice!r} in Orbax: rename one of them")
    if len(empty) == len(flat):
        raise ConversionError("Orbax holds no tree without values: save it as .npz or .safetensors")
    tree = _source.to_tree(variables, {n: v for n, v in flat.items() if n not in empty})
    with quietly():
        handler = ocp.PyTreeCheckpointHandler()
        handler.save(folder.absolute(), args=ocp.args.PyTreeSave(tree))
        handler.finalize(folder.absolute())
    progress(sum(v.nbytes for v in flat.values()))
    if module is None and _source.is_bare(variables):
        empty = {name.partition("/")[2]: told for name, told in empty.items()}
    told = {**json.loads(description.written(module)), "empty": empty}
    if module is None and (text := _source.text_of(variables, _io.same_names(variables, Path()))):
        told["source"] = text
    if module is not None or empty or "source" in told:
        (folder / _OURS).write_text(json.dumps(told))


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without Orbax's remarks on its own doings."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio", "orbax")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
