"""The names of a file's arrays as they are wanted: some are changed, some are left out.

A name may be given as the tree spells it (``features/0/weight``) or as files do
(``features.0.weight``).
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fwt import _nodes, _tree
from fwt._paths import pieces
from fwt._types import FileFormatError, Model, WhereError
from fwt.converters import io as _io
from fwt.converters.files import source as _source
from fwt.converters.io import UnusedError


class Names(NamedTuple):
    """How the names of a file are changed, and how they are those of an architecture; see
    :func:`fwt.converters.load`."""

    rename: Mapping[str, str] | None = None
    drop: Sequence[str] = ()
    match: str = "name"
    strict: bool = True


class Named(NamedTuple):
    """An array that is wanted: where it stands in the file, what it is called, and its value."""

    collection: str
    old: tuple[str, ...]
    new: tuple[str, ...]
    value: Any


def given(rename: Any, drop: Any, match: str, strict: bool, path: Path) -> Names:
    """The arguments of ``load``, checked.

    Raises:
        FileFormatError: unless ``rename`` is a dict of texts and ``drop`` globs, or None.
    """
    drop = () if drop is None else (drop,) if isinstance(drop, str) else drop
    listed = isinstance(drop, list | tuple | set | frozenset)
    texts = {
        "rename": [*rename, *rename.values()] if isinstance(rename, Mapping) else [],
        "drop": list(drop) if listed else [],
    }
    for option, found, fine, form in (
        ("rename", rename, rename is None or isinstance(rename, Mapping), _DICT),
        ("drop", drop, listed, _GLOBS),
    ):
        wrong = next((text for text in texts[option] if not isinstance(text, str)), found)
        if not fine or wrong is not found:
            raise FileFormatError(f"{path}: {option}= is {form}, found {wrong!r:.80}")
    return Names(rename, texts["drop"], match, strict)


_DICT = "a dict of names, such as {'module.': ''}"
_GLOBS = "a list of globs, such as ['optimizer.**']"


def chosen(variables: Mapping[str, Any], how: Names, path: Path) -> list[Named]:
    """The arrays that are wanted, in the order of the file.

    Raises:
        UnusedError: for an entry of ``rename`` or ``drop`` that fits no name.
        FileFormatError: for a new name that says other axes than the old one.
    """
    rename = {old: _parts(old.rstrip("./")) for old in how.rename or {}}
    used: set[str] = set()
    found: list[Named] = []
    for collection, old, value in _source.flat_parts(variables):
        first, new = _first(old, rename, how)
        used |= set() if first is None else {first}
        if not new or new.count("") > old.count(""):
            raise FileFormatError(f"{path}: rename: {'/'.join(old)!r} would be left without a name")
        found.append(Named(collection, old, new, value))
    if left := [old for old in rename if old not in used]:
        near = _chained(left[0], rename, how, found) or _tree.near(
            left[0], [".".join(x.new) for x in found]
        )
        raise UnusedError(
            f"{path}: rename: no name starts with {left[0]!r}{near}", "rename", left[0]
        )
    gone: set[int] = set()
    for glob in how.drop:
        hits = _dropped(glob, found, path)
        if not hits:
            near = _tree.near(glob, [".".join(x.new) for x in found])
            raise UnusedError(f"{path}: drop: no name matches {glob!r}{near}", "drop", glob)
        gone |= hits
    if found and len(gone) == len(found):
        raise FileFormatError(f"{path}: drop={list(how.drop)!r} leaves no array")
    kept = [x for i, x in enumerate(found) if i not in gone]
    for x in kept:
        before, after = _ends(x.old), _ends(x.new)
        if before and after and before != after and np.ndim(x.value) > 1:
            raise FileFormatError(
                f"{path}: rename: {'.'.join(x.old)} would have its {before} first by its name, "
                f"and {'.'.join(x.new)} its {after}, but rename= turns no array: leave its "
                "last part, and architecture= takes it as it is named and turns it; or rename it "
                "in Python, turned as it needs to be"
            )
    return kept


def _ends(name: Sequence[str]) -> str:
    """Which axes the last part of a name says to be the first of a matrix; "" if it says none."""
    last = pieces(name[-1])[-1] if name else ""
    if last.endswith("kernel"):
        return "inputs"
    words = last.split("_")
    return "outputs" if "weight" in (words[0], words[-1]) else ""


def _chained(late: str, rename: Mapping[str, list[str]], how: Names, found: Sequence[Named]) -> str:
    """What to say of an entry of ``rename`` that would fit what another entry makes."""
    told = how.rename or {}
    for one in found:
        first, _ = _first(one.old, rename, how)
        if first is None or _replaced(one.new, rename[late], "x") is None:
            continue
        said = f"; some do once {first!r} is renamed, but each name is changed once"
        if not told[first].rstrip("./"):
            both = {f"{first.rstrip('./')}.{late.rstrip('./')}": told[late]}
            said += f": rename={both!r} does both"
        return said
    return ""


def _dropped(glob: str, found: Sequence[Named], path: Path) -> set[int]:
    """Which arrays a glob names, by their names in the file or, where it is none of these, by their
    new ones; the collection may stand before them, as ``inspect`` shows it."""
    collection, _, rest = glob.partition("/")
    within = {i: x for i, x in enumerate(found) if x.collection == collection}
    try:
        for names in ([_path(x.old) for x in found], [_path(x.new) for x in found]):
            for pattern, among in ((glob, dict(enumerate(found))), (rest, within if rest else {})):
                hits = set(_tree.named(pattern, dict.fromkeys(names[i] for i in among), own=False))
                if hits:
                    return {i for i in among if names[i] in hits}
        return set()
    except WhereError as error:
        raise FileFormatError(f"{path}: drop: {error}") from error


def put(out: dict[str, Any], one: Named, path: Path) -> None:
    """Adds an array under its new name joined by dots, which no other may have."""
    name = ".".join(one.new)
    if name in out:
        raise FileFormatError(f"{path}: two arrays are named {name!r}; rename= or drop= one")
    out[name] = one.value


def renamed(model: Model, how: Names, path: Path) -> Model:
    """Weights alone under other names: with the order, the ties and the metadata of their file."""
    if model.module is not None:
        option = "rename" if how.rename else "drop"
        raise UnusedError(
            f"{path}: it holds a model, whose layers have these names: rename= and drop= are for "
            "weights alone, as save(path, None, variables) writes them",
            option,
            next(iter(how.rename or how.drop)),
        )
    variables, told = model.variables, dict(_nodes.told_of(model.variables))
    wanted = chosen(variables, how, path)
    flat: dict[str, Any] = {}
    tree: dict[str, Any] = {collection: {} for collection in variables}
    if _io.same_names(variables, path) is not None:  # the names alone say where each array stands
        for one in wanted:
            put(flat, one, path)
        tree |= _io.nested(flat, ".", path)
        tree = {c: t for c, t in tree.items() if t or c == "params"}
    else:
        for one in wanted:
            where = "/".join(map(_tree.escape, (one.collection, *one.new)))
            if where in flat:
                raise FileFormatError(
                    f"{path}: two arrays are named {where!r}; rename= or drop= one"
                )
            flat[where] = one.value
        tree |= _io.nested(flat, "/", path)
    names = {".".join(x.old): ".".join(x.new) for x in wanted}
    if "names" in told:
        told["names"] = [names[n] for n in told["names"] if n in names]
    if "safetensors" in told:
        told["safetensors"] = _aliases(told, names)
    if "nodes" in told:
        told["nodes"] = _renamed_nodes(told["nodes"], how)
    told["ties"] = [
        group
        for ties in told.get("ties", ())
        if len(group := [names[n] for n in ties if n in names]) > 1
    ]
    if "torch" in told:
        told["torch"] = _versions(told["torch"], how, dict(_source.flat_names(variables)), flat)
    return Model(None, _source.with_source(tree, told))


def _renamed_nodes(told: Mapping[str, str], how: Names) -> dict[str, str]:
    """What dicts of a tree were, by their places under the new names."""
    rename = {old: _parts(old.rstrip("./")) for old in how.rename or {}}
    out = {}
    for path, kind in told.items():
        parts = tuple(_io.parts_of_path(path)) if path else ()
        out[_path(_first((*parts, "0"), rename, how)[1][:-1])] = kind
    return out


def _aliases(told: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, str]:
    """The metadata of a .safetensors file, of which the entries that are second names of arrays
    follow the new names: they go where one of the two is left out."""
    groups = [set(group) for group in told.get("ties", ())]
    out, second = dict[str, str](), dict[str, str]()
    for name, value in told["safetensors"].items():
        if not any(name in group and value in group for group in groups):
            out[name] = value
        elif name in names and value in names:
            second[names[name]] = names[value]
    return out | second


def _versions(
    told: Mapping[str, Any], how: Names, before: Iterable[str], after: Iterable[str]
) -> dict[str, Any]:
    """The metadata of a state dict under the new names of its modules, without those modules of
    which nothing is left."""
    rename = {old: _parts(old.rstrip("./")) for old in how.rename or {}}
    had, has = _modules(before), _modules(after)
    out: dict[str, Any] = {}
    changed: dict[str, Any] = {}
    for module, entry in told.items():
        first, new = _first(tuple(module.split(".")) if module else (), rename, how)
        name = ".".join(new)
        if name in has or module not in had:
            (out if first is None else changed)[name] = entry
    return out | changed


def _modules(names: Iterable[str]) -> set[str]:
    return {"", *(n[:i] for n in names for i, c in enumerate(n) if c == ".")}


def _first(
    parts: tuple[str, ...], rename: Mapping[str, list[str]], how: Names
) -> tuple[str | None, tuple[str, ...]]:
    """The first entry of ``rename`` that fits a name, and the name that it makes."""
    for old, start in rename.items():
        new = _replaced(parts, start, (how.rename or {})[old].rstrip("./"))
        if new is not None:
            return old, new
    return None, parts


def _replaced(parts: tuple[str, ...], old: list[str], new: str) -> tuple[str, ...] | None:
    """A name that starts with ``old``, with ``new`` there. A slash inside a part stays one."""
    given = tuple(x for p in _tree.split(new) for x in _tree.unescape(p).split("."))
    if not old:
        return (*given, *parts)
    found: list[str] = []
    for index, part in enumerate(parts):
        own = pieces(part)
        found += own
        if len(found) < len(old):
            continue
        if found[: len(old)] != old:
            return None
        taken = len(own) - (len(found) - len(old))  # so many of this part's pieces
        if len(own) == 1:
            return (*given, *parts[index + 1 :])
        at = sum(len(p) + 1 for p in own[:taken])
        rest = [part[at - 1 :] if new else part[at:]] if taken < len(own) else []
        text = "".join([new, *rest])
        return (*([text] if text else []), *parts[index + 1 :])
    return None


def _parts(text: str) -> list[str]:
    return [x for p in _tree.split(text) for x in pieces(_tree.unescape(p))]


def _path(parts: Sequence[str]) -> str:
    return "/".join(map(_tree.escape, parts))


def some(names: Sequence[str]) -> str:
    """The first of these names, and how many more there are."""
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return (", ".join(names[:8]) or "none") + more
