"""Whose the arrays of a Keras file are, where rename=, drop= or match='order' say it."""

import re
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fwt import _tree
from fwt._types import FileFormatError, Model
from fwt.converters.files import names as _names
from fwt.converters.files.names import Names, some
from fwt.converters.rows import table
from fwt.converters.rows.row import Layer

_STATES = ("metrics", "seed_generator")  # what is no weight
_BESIDE = ("vars", *_STATES)  # of a model, beside its layers
# Of each layer of an older .h5 file, in its order, the names and values of its arrays.
Held = Mapping[str, list[tuple[str, np.ndarray]]]


def renamed(held: Held, named: Names, path: Path) -> Held:
    """The arrays of an older .h5 file under the names that ``rename`` gives, without those that
    ``drop`` leaves out."""
    if not named.rename and not named.drop:
        return held
    tree: dict[str, Any] = {}
    place: dict[int, int] = {}
    for top, own in held.items():
        for name, value in own:
            node = tree.setdefault(top, {})
            *above, last = name.split("/")
            for part in above:
                node = node.setdefault(part, {})
            node[last] = value
            place[id(value)] = len(place)
    found = _names.chosen({"params": tree}, named, path)
    out: dict[str, list[tuple[str, np.ndarray]]] = {}
    for one in sorted(found, key=lambda x: place[id(x.value)]):
        out.setdefault(one.new[0], []).append(("/".join(one.new[1:]), one.value))
    return out


def in_order(held: Held, wanted: Iterable[str], path: Path) -> Held:
    """The arrays of an older .h5 file under the names of these layers, the first for the first, as
    Keras itself reads such a file."""
    tops, layers = [name for name, own in held.items() if own], list(wanted)
    if len(tops) != len(layers):
        raise FileFormatError(
            f"{path}: match='order': it holds {len(tops)} layers with weights, {some(tops)}, and "
            f"the architecture has {len(layers)}, {some(layers)}; drop=['a_layer/**'] leaves one "
            "out"
        )
    return {layer: held[top] for layer, top in zip(layers, tops, strict=True)}


def check_names(held: Held, wanted: list[str], known: Container[str], path: Path) -> None:
    """Raises unless an older .h5 file has the layers with these names, and none but the known."""
    tops = [name for name, own in held.items() if own]
    missing = [name for name in wanted if name not in tops]
    more = [name for name in tops if name not in known]
    if not missing and not more:
        return
    said = [f"{what} {some(names)}" for what, names in (
        ("it holds weights of no layer of the model:", more),
        ("it holds none of", missing)) if names]  # fmt: skip
    ways = []
    if missing and more:
        how = {more[0]: missing[0]}
        ways.append(f"with architecture=, rename={how!r} and the like say whose they are")
    if len(more) > len(missing):
        globs = [f"{name}/**" for name in more[len(missing) :]]
        ways.append(f"with architecture=, drop={globs!r} leaves what is too much out")
    if missing and len(tops) == len(wanted):
        ways.append("match='order' takes layer after layer in the order of the file")
    raise FileFormatError(f"{path}: {'; '.join([' and '.join(said), ', and '.join(ways)])}")


def groups(tree: Mapping[str, Any], wanted: list[str], named: Names, path: Path) -> Any:
    """The groups of a weights file as an architecture has them, whose layers with weights are in
    the groups ``wanted``."""
    if named.rename or named.drop:
        tree = _names.renamed(Model(None, {"params": tree}), named, path).variables["params"]
    if named.match == "order":
        return _by_number(tree, wanted, path)
    own = list(dict.fromkeys("/".join(place.split("/")[:2]) for place in wanted))
    held = _held(tree)
    missing, more = [n for n in own if n not in held], [n for n in held if n not in own]
    if missing:
        way = "; build it without these layers"
        if more:
            how = {more[0]: missing[0]}
            way = f"; rename={how!r} and the like say whose arrays they are"
        raise FileFormatError(
            f"{path}: it holds no arrays in {some(missing)}, but in {some(held)}{way}"
        )
    if more:
        globs = [f"{name}/**" for name in more]
        raise FileFormatError(
            f"{path}: the architecture has no layer for {some(more)}; drop={globs!r} leaves them "
            "out"
        )
    return tree


def _held(tree: Mapping[str, Any]) -> list[str]:
    """The groups of a model's layers that hold arrays: those that Keras numbers, or the attributes
    of a class of the user's own."""
    level = {f"layers/{n}": node for n, node in _layers(tree).items()}
    level |= {n: node for n, node in tree.items() if n not in ("layers", *_BESIDE)}
    return [n for n, node in level.items() if _weights(node)]


def _by_number(tree: Mapping[str, Any], wanted: list[str], path: Path) -> dict[str, Any]:
    """The same with the layers of each class in the order of their numbers. Layers of different
    classes have no order, so that one class of the user's own at most may be called otherwise."""
    inner: dict[str, list[str]] = {}
    for place in wanted:
        _, name, *rest = place.split("/", 2)
        inner.setdefault(name, []).extend(rest)
    level = {name: node for name, node in _layers(tree).items() if _weights(node)}
    ours, theirs = _by_class(inner), _by_class(level)
    new, old = [x for x in ours if x not in theirs], [x for x in theirs if x not in ours]
    if len(new) == len(old) == 1 and not _is_keras(old[0]):
        theirs[new[0]] = theirs.pop(old[0])
    if {x: len(names) for x, names in ours.items()} != {x: len(n) for x, n in theirs.items()}:
        found = [f"layers/{n}" for n in level] or _held(tree)
        raise FileFormatError(
            f"{path}: match='order': it numbers the layers of each class by themselves, and these "
            f"are not the architecture's: it holds {some(found)}, expected "
            f"{some([f'layers/{n}' for n in inner])}; rename={{'group': 'layers/dense'}} says "
            "whose a group is"
        )
    out = dict[str, Any]()
    for kind, names in ours.items():
        for mine, other in zip(names, theirs[kind], strict=True):
            node = level[other]
            out[mine] = _by_number(node, inner[mine], path) if inner[mine] else node
    return {**tree, "layers": out}


def _layers(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    found = tree.get("layers", {})
    return found if isinstance(found, Mapping) else {}


def _by_class(names: Iterable[str]) -> dict[str, list[str]]:
    out: dict[str, list[str]] = {}
    for name in sorted(names, key=_tree.natural):
        out.setdefault(re.sub(r"_\d+$", "", name), []).append(name)
    return out


def _is_keras(group: str) -> bool:
    """Whether a class that Keras numbers so is its own."""
    return group.replace("_", "") in {kind.lower() for kind in table.kinds("keras")}


def _weights(node: Any) -> bool:
    """Whether a group holds an array that is more than the state of draws."""
    if not isinstance(node, Mapping):
        return True
    return any(_weights(v) for name, v in node.items() if name != "seed_generator")


def check_taken(tree: Mapping[str, Any], taken: set[str], path: Path) -> None:
    """Raises for groups of a weights file that hold arrays and that no layer took."""

    def groups(node: Mapping[str, Any], inside: str) -> Iterator[str]:
        for name, value in node.items():
            place = f"{inside}/{name}" if inside else name
            if name in _STATES or place in taken:
                continue
            if isinstance(value, Mapping):
                yield from groups(value, place)
            else:
                yield inside

    left = list(dict.fromkeys(groups(tree, "")))
    if left:
        globs = [f"{name}/**" for name in left]
        raise FileFormatError(
            f"{path}: the architecture takes no arrays of {some(left)}; drop={globs[:8]!r} leaves "
            "them out"
        )


def check_order(layers: list[Layer], path: Path) -> None:
    """Raises where two layers of a graph that take arrays of the same names and shapes stand beside
    each other: Keras may list them the other way round."""
    above: dict[str, set[str]] = {}
    forms: list[tuple[str, Any]] = []
    for layer in layers:
        above[layer.name] = {n for i in layer.inputs if i in above for n in (i, *above[i])}
        parts = [part for part in (layer, *layer.inner) if part.arrays and not layer.of]
        form = [(n, np.shape(v)) for part in parts for n, v in part.arrays.items()]
        for other, its in forms:
            if form == its and form and other not in above[layer.name]:
                raise FileFormatError(
                    f"{path}: match='order': {other} and {layer.name} stand beside each other and "
                    "take arrays of the same shapes, so that nothing tells which come first: give "
                    "the Keras model itself, or a file of its to_json(), as architecture, or tell "
                    "with rename="
                )
        forms.append((layer.name, form))


def says_no_axes(variables: Any) -> bool:
    """Whether no name of Keras's arrays is one of Flax's, whose axes may be in another order."""
    return all(p[-1].isdigit() for p in _tree.Tree(variables).leaves)
