"""What a file says beside its arrays, kept through every transform and into the next file: the
order of the names, which of them are one array, and metadata.

It is JSON text at a :class:`fwt._own_nodes.FromFile`, a dict of the variables, with these entries:

- ``names``: the names of all arrays, joined by dots, in the order of the model's layers;
- ``ties``: groups of names that are one array;
- ``torch``: the ``_metadata`` of a state dict;
- ``safetensors``, ``index``: the metadata of a .safetensors file, and of the index of shards;
- ``bare``: what joins the names of a tree that has no collections, which is then written so;
- ``part``: the key under which a checkpoint of torch has them;
- ``nodes``: which dicts of a tree were lists, or had numbers as keys, by their paths.
"""

import json
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from fwt import _later, _nodes, _paths, _tree
from fwt._own_nodes import FromFile
from fwt._stored import Stored
from fwt._types import FileFormatError
from fwt.converters import io as _io

OURS = ("fwt", "fwt.source")  # the metadata of a .safetensors file that we write ourselves
_PLAIN = (bool, int, float, str, type(None))
_OF_THIS_FILE = ("bare", "nodes", "part")  # which the next one shows again, or hasn't


def _register() -> None:
    from flax import serialization

    serialization.register_serialization_state(
        FromFile,
        lambda d: serialization.to_state_dict(dict(d)),
        lambda d, state: FromFile(serialization.from_state_dict(dict(d), state), d.told),
        override=True,
    )


_later.once_imported("flax.serialization", _register)


def with_source(variables: Mapping[str, Any], told: Mapping[str, Any]) -> dict[str, Any]:
    """Variables that know what their file said."""
    told = {name: value for name, value in told.items() if value}
    if not told:
        return dict(variables)
    for name in {"safetensors", "index"} & set(told):  # of no order: their writers shuffle it
        told[name] = dict(sorted(told[name].items()))
    text = json.dumps(told)
    own = FromFile(variables, text)
    own["params"] = FromFile(variables.get("params", {}), text)
    return own


def from_tree(
    tree: Any,
    path: Path,
    key: str | None = None,
    nodes: Mapping[tuple[str, ...], str] = types.MappingProxyType({}),
    separator: str = "/",
    drop: Sequence[str] = (),
) -> dict[str, Any]:
    """A tree of a file as variables that know how the file had it; what is no array may be there
    where a glob of ``drop`` takes it away."""
    variables, bare = _as_variables(tree, path, key, separator == ".", drop)
    told: dict[str, Any] = {"bare": separator} if bare else {}
    told["nodes"] = {_nodes_path(place): kind for place, kind in nodes.items()}
    return with_source(variables, told)


def left_out(
    value: Any, drop: Sequence[str], place: tuple[str, ...]
) -> dict[tuple[str, ...], np.ndarray] | None:
    """For what is no array at a place, but is named by globs with all that it holds, empty arrays
    under the names that the globs take them away by; else None."""
    name = "/".join(map(_tree.escape, place))
    if any(_tree.named(glob, [name], own=False) for glob in drop):
        return {place: np.zeros(0, np.uint8)}
    inner = dict(enumerate(value)) if isinstance(value, list | tuple) else value
    if not drop or not isinstance(inner, Mapping) or not inner or len(place) > _io.DEPTH:
        return None
    out: dict[tuple[str, ...], np.ndarray] = {}
    for key, each in inner.items():
        found = left_out(each, drop, (*place, str(key)))
        if found is None:
            return None
        out |= found
    return out


def to_tree(variables: Mapping[str, Any], flat: Mapping[str, Any]) -> Any:
    """The tree for a file of one, of arrays by their whole paths: with the collections, unless the
    file that it comes from had none."""
    told = _nodes.told_of(variables)
    tree = _joined(_dicts(variables), _io.nested(flat, "/", Path()))
    if is_bare(variables):
        tree = _joined(tree.get("params", {}), tree.get("batch_stats", {}))
    for path in sorted(told.get("nodes", ()), key=len, reverse=True):
        tree = _numbered(tree, _io.parts_of_path(path) if path else [], told["nodes"][path])
    return tree


def _as_variables(
    tree: Any, path: Path, key: str | None, bare: bool, drop: Sequence[str]
) -> tuple[dict[str, Any], bool]:
    """A tree of dicts and arrays as variables, and whether it is bare: unless it is one of
    collections, it becomes params, and torch's running statistics batch_stats. An error names the
    parts of a tree that stands under ``key``."""
    _check_leaves(tree, path, (), 0, lambda: _io.way_to_parts(tree, key, _is_numbers), drop)
    if not isinstance(tree, Mapping):
        raise FileFormatError(f"{path}: expected a tree of arrays, found one array: give it a name")
    told = tree.get("params", tree.get("batch_stats"))
    if not bare and _tree.is_variables(tree) and isinstance(told, Mapping):
        return dict(_tree.as_variables(tree)), False
    params, stats = _apart(tree)
    return {"params": params, **({"batch_stats": stats} if stats else {})}, True


def _apart(tree: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A tree without torch's running statistics, and these."""
    rest, stats = dict[str, Any](), dict[str, Any]()
    for name, value in tree.items():
        if not isinstance(value, Mapping):
            (stats if name in _io.TORCH_STATS else rest)[name] = value
            continue
        inner, own = _apart(value)
        if inner or not own:
            rest[name] = inner
        if own:
            stats[name] = own
    return rest, stats


def _is_numbers(node: Any) -> bool:
    arrays = np.ndarray | Stored
    return (isinstance(node, arrays) or _nodes.is_jax(node)) and _io.is_numeric(node.dtype)


def _check_leaves(
    node: Any,
    path: Path,
    place: tuple[str, ...],
    depth: int,
    way: Callable[[], str],
    drop: Sequence[str],
) -> None:
    if isinstance(node, Mapping) and depth < _io.DEPTH:
        for name, value in node.items():
            if not isinstance(name, str) or not name:
                raise FileFormatError(f"{path}: {'/'.join(place)} has an entry named {name!r}")
            other = not isinstance(value, Mapping) and not _is_numbers(value)
            if other and (found := left_out(value, drop, (*place, name))):
                cast("dict[str, Any]", node)[name] = found[*place, name]
                continue
            _check_leaves(value, path, (*place, name), depth + 1, way, drop)
    elif not _is_numbers(node):
        raise FileFormatError(
            f"{path}: {'/'.join(place) or 'it'} is no array of numbers ({type(node).__name__}); "
            f"{way() or 'key= picks a part of the file'}"
            + (f", drop={['/'.join(place)]!r} leaves it out" if place else "")
        )


def _joined(tree: dict[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Two trees of dicts as one, which is the first."""
    for name, value in other.items():
        if isinstance(value, Mapping) and isinstance(tree.setdefault(name, {}), dict):
            _joined(tree[name], value)
        else:
            tree[name] = value
    return tree


def is_bare(variables: Mapping[str, Any]) -> bool:
    """Whether the file that these variables come from had no collections, and has room for them."""
    held = {name for name, tree in variables.items() if tree}
    return "bare" in _nodes.told_of(variables) and held <= {"params", "batch_stats"}


def _dicts(node: Mapping[Any, Any]) -> dict[str, Any]:
    """The dicts in a tree, without what they hold: an empty one is a part of it too."""
    return {str(k): _dicts(v) for k, v in node.items() if isinstance(v, Mapping)}


def _numbered(node: Any, parts: list[str], kind: str) -> Any:
    """A tree with the dict at a place as a list, or with numbers as keys, if it still can be."""
    if parts:
        if isinstance(node, Mapping) and parts[0] in node:
            return {**node, parts[0]: _numbered(node[parts[0]], parts[1:], kind)}
        return node
    if not isinstance(node, Mapping) or not all(map(str.isdecimal, node)):
        return node
    numbers = {int(name): value for name, value in node.items()}
    if kind == "list":
        whole = sorted(numbers) == list(range(len(node)))
        return [numbers[i] for i in range(len(node))] if whole else node
    return numbers


def _nodes_path(place: tuple[str, ...]) -> str:
    return "/".join(map(_paths.escape, place))


def _place(told: Mapping[str, Any]) -> Callable[[str], int]:
    """The place of a name in the order of a file; of a name that it lacks, behind all others."""
    place = {name: i for i, name in enumerate(told.get("names", ()))}
    return lambda name: place.get(name, len(place))


def in_order(flat: Mapping[str, Any], told: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays by name in the order of the file that they come from, others behind."""
    return {n: flat[n] for n in sorted(flat, key=_place(told))}


def has_order(flat: Mapping[str, Any], told: Mapping[str, Any]) -> bool:
    """Whether the order of all these names is that of a model's layers."""
    return flat.keys() <= set(told.get("names", ()))


def ties(flat: Mapping[str, Any]) -> list[list[str]]:
    """The names of one array, in the order of the arrays."""
    groups: dict[int, list[str]] = {}
    for name, value in flat.items():
        if value.size:
            groups.setdefault(id(value), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def tied(flat: Mapping[str, np.ndarray], told: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The same, with one array where the file had one, if its values are still the same."""
    out = dict(flat)
    for group in told.get("ties", ()):
        first, *others = [n for n in group if n in out] or [""]
        for name in others:
            if _nodes.same_values(out[first], out[name]):
                out[name] = out[first]
    return out


def nested_ties(variables: Mapping[str, Any], told: Mapping[str, Any]) -> None:
    """Makes the arrays of a tree one where its file had one, in place."""
    params = variables["params"]
    for group in told.get("ties", ()):
        places = [p for p in (_found(params, name) for name in group) if p is not None]
        for node, last in places[1:]:
            first = places[0][0][places[0][1]]
            if _nodes.same_values(first, node[last]):
                node[last] = first


def _found(tree: Any, name: str) -> tuple[Any, str] | None:
    *parents, last = name.split(".")
    for part in parents:
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return (tree, last) if isinstance(tree, Mapping) and last in tree else None


def text_of(variables: Any, flat: Mapping[str, np.ndarray] | None) -> str | None:
    """What a file of ours says of the source of its arrays, given by names joined by dots."""
    told = {n: v for n, v in _nodes.told_of(variables).items() if n not in _OF_THIS_FILE}
    told["ties"] = ties(tied(flat, told)) if flat is not None else []
    told = {name: value for name, value in told.items() if value}
    return json.dumps(told) if told else None


def restored(variables: Mapping[str, Any], text: Any) -> dict[str, Any]:
    """The variables of a file of ours with what it says of their source."""
    told = checked(json.loads(text)) if isinstance(text, str) else {}
    if told.get("ties"):
        nested_ties(variables, told)
    return with_source(variables, {**_nodes.told_of(variables), **told})


def checked(told: Any) -> dict[str, Any]:
    """What a file says, which has to have the form that it should have. What other files say in
    our own name is left out, since our next file would say it again."""

    def text(value: Any) -> bool:
        return isinstance(value, str)

    def texts(value: Any) -> bool:
        return isinstance(value, list) and all(map(text, value))

    def mapping(value: Any) -> bool:
        return isinstance(value, dict)

    def plain(value: Any) -> bool:
        return mapping(value) and all(type(v) in _PLAIN for v in value.values())

    forms = {
        "names": texts,
        "ties": lambda value: isinstance(value, list) and all(map(texts, value)),
        "torch": lambda value: mapping(value) and all(map(plain, value.values())),
        "safetensors": lambda value: mapping(value) and all(map(text, value.values())),
        "index": mapping,
    }
    if not isinstance(told, dict) or not all(n in forms and forms[n](v) for n, v in told.items()):
        raise ValueError("what it says of the source of its arrays is malformed")
    for name in {"safetensors", "index"} & set(told):
        told = {**told, name: without_ours(told[name])}
    return told


def without_ours(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of a .safetensors file without what only we write there."""
    return {name: value for name, value in metadata.items() if name not in OURS}


def torch_metadata(found: Any) -> dict[str, dict[str, Any]]:
    """The ``_metadata`` of a state dict, as far as it is plain: versions by names of modules."""
    out = {}
    for module, entry in found.items() if isinstance(found, Mapping) else ():
        if isinstance(module, str) and isinstance(entry, Mapping):
            own = {k: v for k, v in entry.items() if isinstance(k, str) and type(v) in _PLAIN}
            out[module] = own
    return out


def flat_parts(variables: Any) -> Iterator[tuple[str, tuple[str, ...], Any]]:
    """The arrays of one collection after the other: the collection, the parts of the name, and the
    array; in the order of the file that they come from."""
    place = _place(_nodes.told_of(variables))

    def under(node: Any, name: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
        for key, value in node.items():
            if isinstance(value, Mapping):
                yield from under(value, (*name, key))
            else:
                yield (*name, key), value

    for collection, tree in variables.items():
        found = sorted(under(tree, ()), key=lambda pair: place(".".join(pair[0])))
        yield from ((collection, *pair) for pair in found)


def flat_names(variables: Any) -> Iterator[tuple[str, Any]]:
    """The same with names joined by dots."""
    return ((".".join(parts), value) for _, parts, value in flat_parts(variables))
