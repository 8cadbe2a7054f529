"""What ``verify`` finds of the weights: those that differ, and whether that matters where no output
shows it."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fwt import _tree
from fwt._graph import Graph, inputs_of, nodes_of
from fwt._sequential import Sequential, call
from fwt._types import ConversionError, Model
from fwt.converters import judge
from fwt.converters.frameworks import flax as _flax
from fwt.converters.rows.row import parts_of
from fwt.converters.verification import batch
from fwt.converters.verification.lines import lines_of, worst
from fwt.converters.verification.names import layer_name
from fwt.converters.verification.report import Line, identical, weight_apart
from fwt.converters.verification.sides import Side, each_layer, flax_side

LARGER = 2.0**-4  # relative to the scale: what is no longer a small difference


def layer_of(path: str) -> str:
    """The layer of a weight."""
    return layer_name(_tree.split(path)[1:-1] or ("",))


def apart_in(a: Model, b: Model) -> Iterator[Line]:
    """The weights that are not the same, where both models have them in Flax's form."""
    for path, x, y in _pairs(a, b):
        # Between Keras's layers an array has no axes of size 1 in front.
        if not identical(x, y) and not identical(np.squeeze(x), np.squeeze(y)):
            yield weight_apart(path, x, y)


def _pairs(a: Model, b: Model) -> list[tuple[str, np.ndarray, np.ndarray]]:
    one, other = (_tree.Tree({"params": dict(m.variables)}, whole=True).leaves for m in (a, b))
    if one.keys() != other.keys():
        raise ConversionError("the models have other names for them")
    return [(path, np.asarray(v), np.asarray(other[path])) for path, v in one.items()]


def unseen(
    one: Side, models: tuple[Model, Model], xs: Sequence[np.ndarray], order: Any = None
) -> str | None:
    """The first layer whose weights are more than ten roundings apart, if that matters.

    It does if the outputs show it when the difference is made larger, or small weights of both are.
    Weights that are far apart need not matter: the units of a layer may stand in another order.
    """
    if any(not isinstance(m.module, Sequential | Graph) for m in models):
        return None
    steps: dict[str, np.ndarray] = {}
    largest = 0.0
    for path, a, b in _pairs(*models):
        step = _step(a, b)
        if step is not None:
            steps[path], part = step
            largest = max(largest, part)
    if not steps:
        return None
    if largest >= LARGER:
        return _unseen_small(one, models, xs, list(steps), order)
    mine, theirs = models[0], Model(models[1].module, models[0].variables)
    given = for_model(xs, one, mine)
    same = nodes_of(mine.module) == nodes_of(theirs.module)
    if not same and worst(lines_of(flax_side(mine), _as_second(theirs, order), given)) == "differs":
        return None  # what differs in the weights may be made up for in the layers
    tree = _tree.Tree({"params": dict(mine.variables)}, whole=True)
    old = {path: np.asarray(tree.leaves[path]) for path in steps}
    new = {path: (old[path] + LARGER / largest * step).astype(old[path].dtype)
           for path, step in steps.items()}  # fmt: skip
    wider = Model(mine.module, tree.replace(new)["params"])
    if worst(lines_of(flax_side(mine), flax_side(wider), given)) != "differs":
        return _unseen_small(one, models, xs, list(steps), order)
    return layer_of(next(iter(steps)))


def for_model(xs: Sequence[np.ndarray], one: Side, model: Model) -> list[np.ndarray]:
    """The inputs of a side as its model in Flax takes them."""
    if len(xs) == 1:
        return batch.laid(xs, one, one, True)
    return batch.laid(xs, one, flax_side(model))


def _as_second(model: Model, order: Any) -> Side:
    side = flax_side(model)
    return side if order is None else side.ordered(order)


def _unseen_small(
    one: Side,
    models: tuple[Model, Model],
    xs: Sequence[np.ndarray],
    paths: Sequence[str],
    order: Any,
) -> str | None:
    given, new = for_model(xs, one, models[0]), []
    held = {path: (a, b) for path, a, b in _pairs(*models) if path in paths}
    for index, model in enumerate(models):
        grown = {path: (pair[index] / np.abs(pair).max()).astype(pair[index].dtype)
                 for path, pair in held.items() if 0 < np.abs(pair).max() < LARGER}  # fmt: skip
        tree = _tree.Tree({"params": dict(model.variables)}, whole=True)
        new.append(Model(model.module, tree.replace(grown)["params"]))
    same = nodes_of(models[0].module) == nodes_of(models[1].module)  # else these may make up for it
    pair = flax_side(new[0]), _as_second(new[1], order)
    told = same and worst(lines_of(*pair, given)) == "differs"
    return layer_of(next(iter(held))) if told else None


def _step(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, float] | None:
    """Where two arrays of weights are more than ten roundings apart, by how much, and the largest
    difference relative to its unit's scale."""
    if a.shape != b.shape or not jnp.issubdtype(a.dtype, jnp.floating) or identical(a, b):
        return None
    wide = np.result_type(a.dtype, np.float32)
    axes = tuple(range(max(a.ndim - 1, min(a.ndim, 1))))
    with np.errstate(all="ignore"):
        own, step = a.astype(wide, copy=False), np.subtract(b, a, dtype=wide)
        scale = np.maximum(np.abs(own).max(axes, keepdims=True),
                           np.abs(b.astype(wide, copy=False)).max(axes, keepdims=True))  # fmt: skip
        part = np.abs(step) / np.where(scale, scale, 1)
        part[np.isnan(part) & ~((a == b) | (np.isnan(a) & np.isnan(b)))] = np.inf
    far = part > judge.ROUNDINGS * judge.eps_of([a.dtype])
    return (np.where(far, step, 0), float(part[far].max())) if far.any() else None


def of_raw(one: Side, other: Side) -> str | None:
    """The first layer whose weights are more than ten roundings apart, in models of the same layers
    that can't be converted. In half precision each weight counts by its own size, for outputs show
    little of it; units in another order are no difference.
    """
    mine, theirs = list(one.weights()), list(other.weights())
    if [np.shape(a) for _, a in mine] != [np.shape(b) for _, b in theirs]:
        return None
    for (name, a), (_, b) in zip(mine, theirs, strict=True):
        dtype = _half([a.dtype, b.dtype, *one.computes, *other.computes])
        if dtype is not None:
            if _far(a, b, dtype) and not _same_units(a, b):
                return name
        elif not one.own and _step(a, b) is not None:
            return name
    return None


def _half(dtypes: Iterable[Any]) -> Any:
    """The coarsest of some dtypes, if it is a float of half precision."""
    found = [np.dtype(d) for d in dtypes if jnp.issubdtype(d, jnp.floating)]
    half = [d for d in found if d.itemsize == 2]
    return max(half, key=lambda d: float(jnp.finfo(d).eps), default=None)


def _rounded(x: np.ndarray, dtype: Any) -> np.ndarray:
    """Floats rounded to a dtype, in float32; what is beyond its range stays."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    with np.errstate(all="ignore"):
        wide, new = x.astype(np.float32), x.astype(dtype).astype(np.float32)
    return np.where(np.isfinite(new), new, wide)


def _far(a: np.ndarray, b: np.ndarray, dtype: Any) -> bool:
    """Whether a number in them is more than ten roundings of itself apart."""
    if a.shape != b.shape or not all(jnp.issubdtype(x.dtype, jnp.floating) for x in (a, b)):
        return False
    a, b = (_rounded(x, dtype) for x in (a, b))
    with np.errstate(all="ignore"):
        allowed = judge.ROUNDINGS * judge.eps_of([dtype]) * np.maximum(np.abs(a), np.abs(b))
        allowed = allowed + float(jnp.finfo(dtype).smallest_subnormal)
        near = (np.abs(a - b) <= allowed) | (a == b) | (np.isnan(a) & np.isnan(b))
    return not near.all()


def _same_units(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether the units of two weights, along the last axis or the first, hold the same numbers,
    whatever the order of the units and of the numbers in each."""

    def units(x: np.ndarray, axis: int) -> np.ndarray:
        x = np.moveaxis(x.astype(np.float32), axis, 0)
        x = np.sort(x.reshape(len(x), -1), 1)
        return x[np.lexsort(x.T)]

    return a.size > 0 and any(
        np.array_equal(units(a, axis), units(b, axis), equal_nan=True) for axis in (-1, 0)
    )


def in_float32(models: tuple[Model, Model]) -> tuple[Model, Model] | None:
    """Two models of the same layers in float32, their weights rounded as they are in half
    precision, if that may hide how they differ: where a weight is more than ten roundings of itself
    apart. The units of a layer may stand in another order, which float32 shows to be equal.
    """
    if any(not isinstance(m.module, Sequential | Graph) for m in models):
        return None
    both = [list(each_layer(m.module, dict(m.variables))) for m in models]
    if [type(x) for _, x, _ in both[0]] != [type(x) for _, x, _ in both[1]]:
        return None
    held = [[sorted(_tree.Tree({"params": own}, whole=True).leaves.items()) for *_, own in each]
            for each in both]  # fmt: skip
    flat = [[(i, path, np.asarray(v)) for i, own in enumerate(each) for path, v in own]
            for each in held]  # fmt: skip
    if [(i, p, v.shape) for i, p, v in flat[0]] != [(i, p, v.shape) for i, p, v in flat[1]]:
        return None
    layers = [getattr(x, "dtype", None) for each in both for _, x, _ in each]
    dtype = _half([v.dtype for each in flat for *_, v in each] + [d for d in layers if d])
    pairs = zip(*flat, strict=True)
    if dtype is None or not any(_far(a, b, dtype) for (*_, a), (*_, b) in pairs):
        return None
    wide = (Model(m.module, jax.tree.map(lambda v: _rounded(np.asarray(v), dtype), m.variables))
            for m in models)  # fmt: skip
    one, other = (_flax.in_dtype(m, "float32") for m in wide)
    return one, other


def idle(
    models: tuple[Model, Model], xs: Sequence[np.ndarray], lines: Sequence[Line], one: Side
) -> str | None:
    """The first layer with other weights that does not show it because of what it is fed, as
    zeros behind a ReLU, or because of a large bias: by itself, fed ordinary numbers, and without
    the bias that both have, it gives another output.

    Layers that are fed the units of the other model in another order are left out.
    """
    if any(not isinstance(m.module, Sequential | Graph) for m in models):
        return None
    close = {line.name for line in lines if line.status in ("exact", "close")}
    held = close | {line.name for line in lines if line.status == "reordered"}
    given = for_model(xs, one, models[0])
    turned = flax_side(models[0]).swaps(given)
    starts = inputs_of(models[0].module)
    values = {n: jnp.asarray(x.swapaxes(0, 1) if turned else x)
              for n, x in zip(starts, given, strict=True)}  # fmt: skip
    settled = dict.fromkeys(starts, True)
    both = (each_layer(m.module, dict(m.variables)) for m in models)
    for (node, layer, own), (_, there, others) in zip(*both, strict=False):
        name, weights = layer_name(parts_of(node.name)), jax.tree.leaves(own)
        takes, known = [values[i] for i in node.inputs], all(settled[i] for i in node.inputs)
        pairs = list(zip(weights, jax.tree.leaves(others), strict=False))
        far = any(_step(np.asarray(v), np.asarray(w)) is not None for v, w in pairs)
        rows = getattr(layer, "num_embeddings", None)
        floats = known and all(jnp.issubdtype(x.dtype, jnp.floating) for x in takes)
        if far and name in held and len(takes) == 1 and (rows or floats):
            fed = np.random.default_rng(0).normal(size=takes[0].shape).astype(takes[0].dtype)
            if rows:
                apart = [np.asarray(v != w).any(1) for v, w in pairs if np.ndim(v) == 2]
                fed = np.flatnonzero(apart[0])[:1024] if apart else np.arange(1)
            for way in (lambda x, _: x, _unbiased):
                sides = _alone(layer, way(own, others)), _alone(there, way(others, own))
                if worst(lines_of(*sides, [fed])) == "differs":
                    return name
        settled[node.name] = name in close and (known or bool(weights))
        values[node.name] = call(layer, own, *takes)
    return None


def _unbiased(own: Any, others: Any) -> Any:
    """The variables of a layer with zeros for each bias that the other has too."""

    def one(path: Any, x: Any, y: Any) -> Any:
        bias = getattr(path[-1], "key", None) == "bias" and identical(np.asarray(x), np.asarray(y))
        return jnp.zeros_like(x) if bias else x

    found: Any = jax.tree.structure(own)
    same = found == jax.tree.structure(others)
    return jax.tree.map_with_path(one, own, others) if same else own


def _alone(layer: Any, own: Any) -> Side:
    """One layer as a side."""

    def run(xs: Sequence[np.ndarray], by: float = 0.0) -> tuple[Any, dict[str, np.ndarray]]:
        moved = jax.tree.map(lambda v: judge.nudged(v, by), own) if by else own
        return np.asarray(call(layer, moved, *xs)), {}

    return Side(run, None, False, lambda *_: Model(layer, own))
