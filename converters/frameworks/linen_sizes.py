"""A linen module's graph at any size of its inputs, or at those alone that it was read for.

A jaxpr has the numbers that a module computed from the sizes of its input, an index from the end
too. So the module is read again at other sizes: what is cut from the end is told by both, and
where anything else changes, the Graph takes one size alone (``sizes``).
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fwt import layers as fl
from fwt._graph import Graph, Node, names_in
from fwt._types import ConversionError, Model
from fwt.converters.frameworks.sizes import (
    Place,
    Sizes,
    by_input,
    other_sizes,
    together,
    tried_for,
)


class AtExample(NamedTuple):
    """What a module is at an example; ``lengths`` is, by name of a Slice, the size that it cuts."""

    model: Model
    lengths: Mapping[str, int]


def at_sizes(
    one: AtExample,
    inputs: Sequence[Any],
    runs: Callable[[Sequence[Any]], Any],
    read: Callable[[Sequence[Any]], AtExample],
    check: Callable[[Model, Sequence[Any]], None],
) -> Model:
    """The model that is right at any size that it takes.

    Args:
        one: the module as it was read.
        inputs: what each input was like, the batch first.
        runs: raises at inputs that the module does not take.
        read: reads the module at others.
        check: raises where a model gives something else than the module.
    """
    graph, shapes = one.model.module, [x.shape for x in inputs]
    names = names_in(graph.inputs)

    def resized(sizes: Sizes) -> list[Any]:
        wide = [list(shape) for shape in shapes]
        for (i, axis), size in sizes.items():
            wide[i][axis] = size
        return [jax.ShapeDtypeStruct(s, x.dtype) for s, x in zip(wide, inputs, strict=True)]

    def tries(run: Callable[[Sequence[Any]], Any]) -> Callable[[Sizes], bool]:
        def taken(sizes: Sizes) -> bool:
            try:
                run(resized(sizes))
            except Exception:  # noqa: BLE001 - a user's module may raise any class: it takes no such size, as a graph may
                return False
            return True

        return taken

    free, alone = other_sizes(shapes, tries(runs))
    takes = tries(lambda xs: jax.eval_shape(graph.apply, one.model.variables, *xs))
    bound: set[Place] = set()
    for places in alone:
        size = shapes[places[0][0]][places[0][1]]
        if any(takes(dict.fromkeys(p, n)) for p in _groups(places) for n in tried_for(size)):
            bound |= set(places)

    def readings(free: Sequence[Sizes]) -> list[AtExample | None]:
        """At other sizes of all axes, and where that tells of a change, of each."""
        if not free:
            return []
        first = _read(read, resized(together(free, shapes, tries(runs))))
        if len(free) == 1 or (first and _same(one, first)):
            return [first]
        return [first, *(_read(read, resized(sizes)) for sizes in free)]

    found = readings(free)
    new = _changed(one, found)
    if new is None:
        left = [sizes for sizes, x in zip(free, found[1:] or found, strict=True)
                if _changed(one, [x]) is not None]  # fmt: skip
        # Those that are free one by one may still be compared with each other.
        left = [] if len(left) == len(free) else left
        found = readings(left)
        new = _changed(one, found)
        left = left if new is not None else []
        bound |= {place for sizes in free if sizes not in left for place in sizes}
        free, new = left, new or {}
    nodes = [Node(n.name, new.get(n.name, n.layer), n.inputs, n.of) for n in graph.nodes]
    made = Graph(nodes, graph.inputs, graph.outputs, graph.input_shape) if new else graph
    model = Model(made, one.model.variables)
    # An index beyond a shorter axis is cut off by JAX, and a roll goes around it more than once.
    least = next(_small(free, shapes, tries(runs)), {})
    fits = not least or tries(lambda xs: check(model, xs))(least)
    for sizes in free:
        (size,) = {shapes[i][axis] for i, axis in sizes}
        shorter = [dict.fromkeys(sizes, n) for n in _shorter(nodes, one.lengths, found, size)]
        for at in [*shorter, *([] if fits else _small([sizes], shapes, tries(runs)))]:
            if tries(runs)(at) and not tries(lambda xs: check(model, xs))(at):
                bound |= set(sizes)
    if not fits and bound.isdisjoint(least):
        bound |= set(least)
    if not bound:
        return model
    fixed = by_input(bound, names, shapes)
    told = tuple(fixed.get(name, ()) for name in names)
    return Model(made.clone(fixed=told), model.variables)


def _read(read: Callable[[Sequence[Any]], AtExample], inputs: Sequence[Any]) -> AtExample | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return read(inputs)
    except ConversionError:  # what is read at this size is not there
        return None


def _small(
    free: Sequence[Sizes], shapes: Sequence[Sequence[int]], runs: Callable[[Sizes], bool]
) -> Iterator[dict[Place, int]]:
    """The least sizes of axes, all of one, at which a module runs: what compares a size with a
    number below that of the example does something else there."""
    size = {p: shapes[p[0]][p[1]] for sizes in free for p in sizes}
    for least in (1, 2, 3, 5, 8, 16, 32, 64):
        sizes = dict.fromkeys(size, least)
        if size and least < min(size.values()) and runs(sizes):
            yield sizes


def _groups(places: Sequence[Place]) -> list[Sequence[Place]]:
    return [places, *([p] for p in places if len(places) > 1)]


def _shorter(
    nodes: Sequence[Node], lengths: Mapping[str, int], found: Sequence[AtExample | None], size: int
) -> list[int]:
    """Sizes of an axis at which something that is cut along it may be out of reach."""
    out: set[int] = set()
    for node in nodes:
        cut, length = node.layer, lengths.get(node.name)
        if length is None or all(x is None or x.lengths[node.name] == length for x in found):
            continue
        for end in (abs(cut.start), abs(cut.stop or 0)):
            if end > 1:
                out |= {end - 1, max(1, (end - 1) * size // length)}
    return sorted(out - {size})[-_SHORT:]


_SHORT = 4  # shorter sizes that are tried of an axis


def _same(one: AtExample, other: AtExample) -> bool:
    return _changed(one, [other]) == {}


def _changed(one: AtExample, others: Sequence[AtExample | None]) -> dict[str, Any] | None:
    """By name, the layers that say at any size what several readings say at theirs, where these
    differ; None where no layer does."""
    (graph, weights), new = one.model, dict[str, Any]()
    for other in others:
        if other is None:
            return None
        its = other.model.module
        if (graph.outputs, len(graph.nodes)) != (its.outputs, len(its.nodes)):
            return None
        if not _equal(weights, other.model.variables):
            return None
        for a, b in zip(graph.nodes, its.nodes, strict=True):
            if (a.name, a.inputs, a.of) != (b.name, b.inputs, b.of):
                return None
            if a.layer != b.layer:
                new[a.name] = None
    for index, node in enumerate(graph.nodes):
        if node.name not in new:
            continue
        cuts = [(x.model.module.nodes[index].layer, x.lengths.get(node.name))
                for x in (one, *others) if x is not None]  # fmt: skip
        new[node.name] = _for_all(cuts)
        if new[node.name] is None:
            return None
    return new


def _for_all(cuts: Sequence[tuple[Any, int | None]]) -> Any:
    """The Slice that is each of these at the size that it cuts; None if there is none, or if
    several may be meant."""
    if not all(isinstance(cut, fl.Slice) and size for cut, size in cuts):
        return None
    if len({(cut.axis, cut.step) for cut, _ in cuts}) > 1:
        return None
    axis, step = cuts[0][0].axis, cuts[0][0].step
    starts = _index([(cut.start, cut.start, size or 0) for cut, size in cuts])
    # Of several ends that leave the same entries, this is the first.
    ends = [(cut.stop, min(cut.stop + step - 1, size or 0), size or 0) for cut, size in cuts]
    stops = _index(ends)
    if starts is None or stops is None:
        return None
    return fl.Slice(axis, starts[0] or 0, stops[0], step)


def _index(ends: Sequence[tuple[int, int, int]]) -> tuple[int | None] | None:
    """The one index, from the start or from the end, that lies between two at each size; that from
    the end of all is None."""
    low, high = max(a for a, _, _ in ends), min(b for _, b, _ in ends)
    back = range(max(a - n for a, _, n in ends), min(b - n for _, b, n in ends) + 1)
    if len({n for _, _, n in ends}) == 1:
        return (low,) if low <= high else None
    if low <= high:
        return None if back else (low,)
    if len(back) != 1:
        return None
    return (back[0] or None,)


def _equal(a: Any, b: Any) -> bool:
    one: Any = jax.tree.structure(a)
    if one != jax.tree.structure(b):
        return False
    leaves = [list(map(np.asarray, jax.tree.leaves(tree))) for tree in (a, b)]
    return all(
        x is y or (x.shape == y.shape and x.dtype == y.dtype and x.tobytes() == y.tobytes())
        for x, y in zip(*leaves, strict=True)
    )
