"""The arrays of Keras's files alone, under the file's own names: .weights.h5, single and sharded,
the older .h5, and .keras. They need no Flax, since there are no layers."""

import contextlib
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from fwt import _tree
from fwt._types import FileFormatError, Model
from fwt.converters import io as _io
from fwt.converters.files.h5_read import (
    array_of,
    check_start,
    names_in,
    node_at,
    opened_h5,
    tree_of,
)
from fwt.converters.io import Budget, Reading, member, opened, reading

ARRAYS = "model.weights.h5"  # the member of a .keras archive that holds them
WHOLE = "model_weights"  # the group of an .h5 file with a model that holds them


def _pruned(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Without groups that hold no array."""
    held = {k: _pruned(v) if isinstance(v, Mapping) else v for k, v in tree.items()}
    return {k: v for k, v in held.items() if not isinstance(v, Mapping) or v}


def is_weights(path: Path) -> bool:
    """Whether an HDF5 file is of the newer kind, which has no list of layers."""
    with reading(path), opened_h5(path, Budget(path)) as file:
        older = ("layer_names", "layer_names0", "model_config", "keras_version")
        return WHOLE not in file and not any(name in file.attrs for name in older)


def weights_of(file: Any, budget: Budget) -> dict[str, Any]:
    """The arrays of a model, without its optimizer's."""
    return modern(tree_of(file, budget, without="optimizer"), str(budget.path))


def load_weights(path: Path, how: Reading) -> Model:
    """A .weights.h5 file: weights under the file's own paths, since only an architecture says
    what each of them is."""
    budget = Budget(path, how.max_bytes)
    with reading(path), opened_h5(path, budget) as file:
        tree = weights_of(file, budget)
        return Model(None, {"params": _pruned(_io.under(tree, how.key, path))})


def load_archive(path: Path, how: Reading) -> Model:
    """The weights in a .keras archive, whatever its model is."""
    _io.without_key(path, how)
    with reading(path), opened(path) as archive:
        budget = Budget(path, how.max_bytes)
        weights = member(archive, ARRAYS, budget, check_start)
        with opened_h5(weights, budget) as file:
            return Model(None, {"params": _pruned(weights_of(file, budget))})


def load_weight_shards(path: Path, how: Reading) -> Model:
    """The .weights.json of sharded weights, or the folder that holds one."""
    path = _io.index_in(path, ".weights.json")
    with reading(path), contextlib.ExitStack() as stack:
        where = _io.read_json(path)["weight_map"]
        out: dict[str, Any] = {}
        files: dict[str, tuple[Any, Budget]] = {}
        for place, shards in where.items():
            parts = place.strip("/").split("/")
            if parts[0] == "optimizer":
                continue
            held: dict[str, np.ndarray] = {}
            for shard in [shards] if isinstance(shards, str) else shards:
                if shard not in files:
                    there = _io.sibling(path, shard)
                    own = Budget(there, how.max_bytes)
                    files[shard] = stack.enter_context(opened_h5(there, own)), own
                file, budget = files[shard]
                group = node_at(file, "/".join(parts), budget.path)
                if not isinstance(group, h5py.Group):
                    raise FileFormatError(f"{budget.path}: there is no group {place}")
                arrays = tree_of(group, budget, place)
                if set(held) & set(arrays):
                    raise FileFormatError(f"{path}: {place} stands in two shards")
                held |= arrays
            node = out
            for part in parts:
                node = node.setdefault(part, {})
            node |= held
        return Model(None, {"params": _pruned(_io.under(out, how.key, path))})


def holds_model(path: Path) -> bool:
    """Whether a file of Keras of any format holds a model, whose layers say their dtypes."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return "config.json" in archive.namelist()
    return has_model(path)


def has_model(path: Path) -> bool:
    """Whether an .h5 file says what its layers are."""
    with reading(path), opened_h5(path, Budget(path)) as file:
        return "model_config" in file.attrs


def load_legacy(path: Path, how: Reading) -> Model:
    """The weights of an .h5 file of Keras 2 or 3."""
    budget = Budget(path, how.max_bytes)
    _io.without_key(path, how)
    with reading(path), opened_h5(path, budget) as file:
        held = legacy_arrays(file, budget)
        flat = {f"params/{name}/{n}": v for name, own in held.items() for n, v in own}
        return Model(None, {"params": {}, **_io.nested(flat, "/", path)})


def legacy_arrays(file: Any, budget: Budget) -> dict[str, list[tuple[str, np.ndarray]]]:
    """Of each layer, in the file's order, the names and values of its arrays."""
    path = budget.path
    root = file[WHOLE] if node_at(file, WHOLE, path) is not None else file
    layers = names_in(root, "layer_names", budget)
    if layers is None:
        raise FileFormatError(f"{path}: it has no layer_names, so it is no file of Keras weights")
    out: dict[str, list[tuple[str, np.ndarray]]] = {}
    for layer in layers:
        group = node_at(root, layer, path)
        names = None if group is None else names_in(group, "weight_names", budget)
        if names is None:
            raise FileFormatError(f"{path}: the layer {layer!r} has no weight_names")
        if layer in out or len(set(names)) < len(names):
            raise FileFormatError(f"{path}: {layer!r} or one of its weights stands there twice")
        out[layer] = [(n, array_of(node_at(group, n, path), f"{layer}/{n}", budget)) for n in names]
    return out


# -- the groups of older versions --------------------------------------------------------------

_LAYERS = "_layer_checkpoint_dependencies"  # what 2.12 to 2.14 call the layers of a model


def modern(tree: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The groups of a weights file as Keras 3 calls them; its own stay.

    Keras 2.12 to 2.14 count a layer with weights twice, so that the numbers of its group have
    gaps. On Windows the parts of a path are joined by backslashes.

    Args:
        tree: the groups of a file, those without arrays among them.
        place: of the file, for errors.
    """
    parts: dict[str, Any] = {}
    for name, node in tree.items():
        *above, last = name.split("\\")
        inner = parts
        for part in above:
            inner = inner.setdefault(part, {})
        inner[last] = _merged(inner.get(last), node, f"{place}: {name}")
    out: dict[str, Any] = {}
    for name, node in parts.items():
        new = (
            "layers"
            if name == _LAYERS
            else re.sub("^_(?=(query|key|value|output)_dense$)", "", name)
        )
        if isinstance(node, Mapping):
            node = modern(node, place)
            node = _without_gaps(node) if name == _LAYERS else node
        if new in out:
            raise FileFormatError(f"{place}: it has both {new!r} and {name!r}")
        out[new] = node
    return out


def _merged(one: Any, other: Any, place: str) -> Any:
    if one is None:
        return other
    if not isinstance(one, Mapping) or not isinstance(other, Mapping):
        raise FileFormatError(f"{place} stands there twice")
    return {**one, **{k: _merged(one.get(k), v, place) for k, v in other.items()}}


def _without_gaps(groups: Mapping[str, Any]) -> dict[str, Any]:
    """dense, dense_2 and dense_4 as dense, dense_1 and dense_2."""
    seen: dict[str, int] = {}
    out: dict[str, Any] = {}
    for name in sorted(groups, key=_tree.natural):
        stem = re.sub(r"_\d+$", "", name)
        count = seen.get(stem, 0)
        seen[stem] = count + 1
        out[f"{stem}_{count}" if count else stem] = groups[name]
    return out
