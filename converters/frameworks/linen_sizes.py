"""A linen module's graph at any size of its inputs, or at those alone that it was read for.

A jaxpr has the numbers that a module computed from the sizes of its input, an index from the end
too. So the module is read again at other sizes: what is cut from the end is told by both, and
where anything else changes, the Graph takes one size alone (``sizes``).
"""

from collections.abc import Callable, Mapping, Sequence
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
    tried_for,
)


class Reading(NamedTuple):
    """What a module is at an example; ``lengths`` is, by name of a Slice, the size that it cuts."""

    model: Model
    lengths: Mapping[str, int]


def at_sizes(
    one: Reading,
    inputs: Sequence[Any],
    runs: Callable[[Sequence[Any]], Any],
    read: Callable[[Sequence[Any]], Reading],
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
            except Exception:  # noqa: BLE001 - a user's module may raise any class: it takes no such size
                return False
            return True

        return taken

    def changed(sizes: Sizes) -> dict[str, Any] | None:
        try:
            return _changed(one, read(resized(sizes)))
        except ConversionError:  # what is read at this size is not there
            return None

    free, alone = other_sizes(shapes, tries(runs))
    takes = tries(lambda xs: jax.eval_shape(graph.apply, one.model.variables, *xs))
    bound: set[Place] = set()
    for places in alone:
        size = shapes[places[0][0]][places[0][1]]
        if any(takes(dict.fromkeys(p, n)) for p in _groups(places) for n in tried_for(size)):
            bound |= set(places)
    new: dict[str, Any] | None = {}
    if free:
        new = changed({p: n for sizes in free for p, n in sizes.items()})
    if new is None:
        new = {}
        for sizes in free:
            own = changed(sizes)
            if own is None or any(new.get(k, v) != v for k, v in own.items()):
                bound |= set(sizes)
            else:
                new |= own
    nodes = [Node(n.name, new.get(n.name, n.layer), n.inputs, n.of) for n in graph.nodes]
    made = Graph(nodes, graph.inputs, graph.outputs, graph.input_shape) if new else graph
    model = Model(made, one.model.variables)
    # On a shorter axis than is cut off, a roll goes around it more than once.
    short = {n - 1 for layer in new.values() for n in (layer.start, layer.stop or 0)
             for n in [abs(n)] if n > 2}  # fmt: skip
    for sizes in [dict.fromkeys(p, n) for p in free for n in short if not bound & set(p)]:
        if tries(runs)(sizes) and not tries(lambda xs: check(model, xs))(sizes):
            bound |= set(sizes)
    if not bound:
        return model
    fixed = by_input(bound, names, shapes)
    told = tuple(fixed.get(name, ()) for name in names)
    return Model(made.clone(fixed=told), model.variables)


def _groups(places: Sequence[Place]) -> list[Sequence[Place]]:
    return [places, *([p] for p in places if len(places) > 1)]


def _changed(one: Reading, other: Reading) -> dict[str, Any] | None:
    """By name, the layers that say at any size what two readings say at theirs, where these differ;
    None where no layer does."""
    (a, weights), (b, others) = one.model, other.model
    if (a.outputs, len(a.nodes)) != (b.outputs, len(b.nodes)) or not _equal(weights, others):
        return None
    new = {}
    for mine, its in zip(a.nodes, b.nodes, strict=True):
        if mine == its:
            continue
        if (mine.name, mine.inputs, mine.of) != (its.name, its.inputs, its.of):
            return None
        name = mine.name
        layer = _both(mine.layer, its.layer, one.lengths.get(name), other.lengths.get(name))
        if layer is None:
            return None
        new[name] = layer
    return new


def _both(one: Any, other: Any, size: int | None, its: int | None) -> Any:
    if not (isinstance(one, fl.Slice) and isinstance(other, fl.Slice) and size and its):
        return None
    if (one.axis, one.step) != (other.axis, other.step):
        return None
    start = _index(one.start, other.start, size, its)
    stop = (None,) if (one.stop, other.stop) == (size, its) else (
        _index(one.stop, other.stop, size, its))  # fmt: skip
    if start is None or stop is None:
        return None
    return fl.Slice(one.axis, start[0], stop[0], one.step)


def _index(one: int | None, other: int | None, size: int, its: int) -> tuple[int] | None:
    """An index that is both at two sizes, from the end if need be."""
    if one is None or other is None:
        return None
    if one == other:
        return (one,)
    return (one - size,) if one - size == other - its < 0 else None


def _equal(a: Any, b: Any) -> bool:
    one: Any = jax.tree.structure(a)
    if one != jax.tree.structure(b):
        return False
    leaves = [list(map(np.asarray, jax.tree.leaves(tree))) for tree in (a, b)]
    return all(
        x is y or (x.shape == y.shape and x.dtype == y.dtype and x.tobytes() == y.tobytes())
        for x, y in zip(*leaves, strict=True)
    )
