"""The lines of a report: what two models give, layer by layer and output by output."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from fwt._types import ConversionError
from fwt.converters import judge
from fwt.converters.verification import batch
from fwt.converters.verification.names import as_known
from fwt.converters.verification.report import Line, Outputs, View, carried, compared
from fwt.converters.verification.sides import Side, flax_side

# Of several outputs, the line of the worst is that of the model.
WORST = ("differs", "reordered", "not compared", "close", "exact")
Held = dict[str, Outputs]  # by layer
# The lines of the layers and of the outputs, what was found of the worst of these, and which of the
# layers that differ carry the same in another way.
Found = tuple[list[Line], list[Line], judge.Apart | None, set[str]]


def worst(found: Found) -> str:
    """The status of the output that agrees least."""
    return min((line.status for line in found[1]), key=WORST.index)


def turned(
    one: Side,
    other: Side,
    xs: list[np.ndarray],
    tolerance: float | None,
    free: bool,
    made: bool,
) -> tuple[Side, Side, list[np.ndarray], Found]:
    """The sides and the inputs as they fit together, and what :func:`lines_of` finds.

    The inputs are turned if the layers say so. They go in as they are if that makes such models
    equal, since not every layer says where channels are; and another way only where these can't be
    run at all. Where the batch is is tried only for a model no layer of which tells it.

    Args:
        one: the first model.
        other: the second.
        xs: inputs in the layout of the first.
        tolerance: see ``verify``.
        free: whether the first model does not say what it takes, so that they may be turned too.
        made: whether the inputs are none of the user's.
    """

    def tried(a: Side, b: Side, given: Any) -> tuple[Side, Side, Any, Found] | None:
        try:
            return a, b, given, lines_of(a, b, given, tolerance)
        except ConversionError as error:
            failed.append(error)
            return None

    failed: list[ConversionError] = []
    first = tried(one, other, xs)
    x = xs[0]
    if len(xs) == 1 and (first is None or worst(first[3]) == "differs"):
        for told, side in ((one.told, other), (other.told, one)):
            if side.told or not (told or first is None):
                continue  # what layers tell stays
            turned = side.timed(not side.time_first)
            given = xs
            if side is one and not made and x.ndim > 1:
                given = [np.ascontiguousarray(x.swapaxes(0, 1))]
            pair = (one, turned) if side is other else (turned, other)
            alike = tried(*pair, given)
            if alike is not None and (first is None or worst(alike[3]) != "differs"):
                return alike
    images = any(v.ndim > 2 for v in xs)
    apart = one.channels_first != other.channels_first
    apart = apart or (len(xs) > 1 and one.channels != other.channels)
    if images and apart:
        if first is not None and worst(first[3]) in ("exact", "close"):
            return first
        pair = (one, other.laid_out(one.channels_first)) if len(xs) == 1 else (
            one.laid_out(False), other.laid_out(False))  # fmt: skip
        plain = tried(*pair, xs)
        if plain is not None and (first is None or worst(plain[3]) in ("exact", "close")):
            return plain
    if first is not None:
        return first
    if images:
        layouts = [xs]
        if free:
            layouts += [[batch.moved(v, now, not now) for v in xs] for now in (True, False)]
        for given in layouts:
            for a, b in ((False, False), (True, False), (False, True)):
                found = tried(one.laid_out(a), other.laid_out(b), given)
                if found is not None:
                    return found
    raise failed[0]


def lines_of(
    one: Side, other: Side, xs: Sequence[np.ndarray], tolerance: float | None = None
) -> Found:
    """What is found of the layers and the outputs of two models."""
    there = batch.laid(xs, one, other)
    (mine, gives), (theirs, given) = _ran(one, xs, "first"), _ran(other, there, "second")
    for held, known in ((theirs, mine), (mine, theirs)):
        for name, new in as_known(held, known).items():
            held[new] = held.pop(name)
    pairs = _paired(gives, given, one, other)
    every = [*mine.values(), *theirs.values(), *gives.values(), *given.values()]
    eps = judge.eps_of([*(held.value.dtype for held in every), *one.computes, *other.computes])
    how = {"eps": eps, "tolerance": tolerance, "axis": 1 if one.channels_first else -1,
           "clamps": one.clamps or other.clamps}  # fmt: skip
    inside: list[View] = [_as_it_is]
    last: View = lambda v: batch.moved(v, True, False)  # noqa: E731
    front: View = lambda v: batch.moved(v, False, True)  # noqa: E731
    apart = one.channels_first != other.channels_first
    if one.turned or other.turned or apart:
        inside += [last, front]
    ends: list[View] = [_as_it_is]
    if apart:
        ends.append(last if other.channels_first else front)
    elif len(xs) > 1 and any(v.shape != w.shape for v, w in zip(xs, there, strict=True)):
        ends += [last, front]

    def at_end(a: Any, b: Any) -> tuple[list[View], dict[str, Any]]:
        """How an output of the second model may lie as that of the first, and how it is judged."""
        if a not in gives or b not in given or one.time_first or other.time_first:
            return ends, how
        axes = _channels(one, other, a, b, xs, there)
        if axes is not None:
            views = [_as_it_is if axes[0] == axes[1] else front if axes[0] == 1 else last]
            return views, {**how, "axis": axes[0]}
        v, w = gives[a].value, given[b].value
        if one.turned == other.turned or v.shape == w.shape:
            return ends, how
        fits = [view for view in (front, last) if view(w).shape == v.shape]
        return [*ends, *fits], {**how, "axis": 1 if fits == [front] else -1} if fits else how

    laid = [at_end(a, b) for _, a, b in pairs]
    if len(inside) == 1 and any(last in views or front in views for views, _ in laid):
        inside += [last, front]

    def told() -> tuple[list[Line], list[Line], judge.Apart | None]:
        lines = []
        for name in [*mine, *(n for n in theirs if n not in mine)]:
            if name in mine and name in theirs:
                lines.append(compared(name, mine[name], theirs[name], inside, **how)[0])
                continue
            where, held = ("first", mine) if name in mine else ("second", theirs)
            shape = held[name].value.shape
            lines.append(Line(name, shape, math.nan, math.nan, 0, f"only in the {where}"))
        nothing = Outputs(np.zeros(0))
        both = [compared(label, gives.get(a, nothing), given.get(b, nothing), views, **judged)
                for (label, a, b), (views, judged) in zip(pairs, laid, strict=True)]  # fmt: skip
        least = min(both, key=lambda pair: WORST.index(pair[0].status))
        return lines, [line for line, _ in both], least[1]

    found = told()
    if tolerance is not None or all(n.status != "differs" for n in (*found[0], *found[1])):
        return *found, set()
    # More than ten roundings of its own: only now is measuring them worth its time.
    _measure(one, xs, mine, gives, eps)
    _measure(other, there, theirs, given, eps)
    lines, outputs, most = told()
    axis = 1 if one.channels_first else -1
    carries = {
        line.name
        for line in lines
        if line.status == "differs"
        and any(carried(mine[line.name].value, view(theirs[line.name].value), axis)
                for view in inside)
    }  # fmt: skip
    return lines, outputs, most, carries


def _channels(one: Side, other: Side, a: Any, b: Any, xs: Any, there: Any) -> Any:
    """The axes of the channels in an output of both models, if layers tell both to be the first
    behind the batch or the last."""
    axes = []
    for side, key, given in ((one, a, xs), (other, b, there)):
        axis = side.ends_at.get(key)
        if axis is None and side.turned and one.turned != other.turned and not side.is_file:
            # The layers of a torch module of one's own stand in what it is as a graph.
            with contextlib.suppress(ConversionError):
                side.ends_at[key] = axis = flax_side(side.model(given, True)).ends_at.get(key)
        axes.append(axis)
    return tuple(axes) if set(axes) <= {1, -1} else None


def _paired(gives: Any, given: Any, one: Side, other: Side) -> list[tuple[str, Any, Any]]:
    """The outputs of both models that belong together, by key where both have the same keys, else
    by their places, and what each pair is called."""
    a, b = list(gives), list(given)
    keyed = all(isinstance(k, str) for k in (*a, *b)) and set(a) == set(b)
    if max(len(a), len(b)) == 1:
        return [("output", a[0] if a else None, b[0] if b else None)]
    count = max(len(a), len(b))
    keys = ([k for k in each if isinstance(k, str)] for each in (a, b))
    told = (*keys, one.gives or (), other.gives or ())
    names = next((list(n) for n in told if len(n) == len(set(n)) == count), None)
    names = names or list(map(str, range(1, count + 1)))
    if keyed:
        return [(f"output {k}", k, k) for k in a]
    at = range(count)
    return [(f"output {names[i]}", a[i] if i < len(a) else None, b[i] if i < len(b) else None)
            for i in at]  # fmt: skip


def _as_it_is(v: np.ndarray) -> np.ndarray:
    return v


def _ran(
    side: Side, xs: Sequence[np.ndarray], which: str, by: float = 0.0
) -> tuple[Held, dict[Any, Outputs]]:
    """What the layers of a model give, and what it gives itself, by key or by place."""
    try:
        output, taps = side.outputs(xs, by)
    except Exception as error:  # each framework has its own errors for a shape
        why = " ".join(str(error).split())[:300]
        shapes = ", ".join(str(list(x.shape)) for x in xs)
        noun = "input of the shape" if len(xs) == 1 else "inputs of the shapes"
        raise ConversionError(
            f"verify: the {which} model takes no {noun} {shapes} ({why}): input_shape= or "
            "inputs= says what it takes"
        ) from error
    return {n: Outputs(v) for n, v in taps.items()}, _flat(output, which)


def _flat(output: Any, which: str) -> dict[Any, Outputs]:
    """The outputs of a model by key or by place; those inside others are numbered."""
    if isinstance(output, Mapping) and all(hasattr(v, "shape") for v in output.values()):
        return {str(k): Outputs(v) for k, v in output.items()}
    leaves = jax.tree.leaves(output)
    if not leaves or not all(hasattr(v, "shape") for v in leaves):
        raise ConversionError(f"verify: the {which} model gives a {type(output).__name__}")
    return {i: Outputs(v) for i, v in enumerate(leaves)}


def _measure(
    side: Side, xs: Sequence[np.ndarray], held: Held, gives: dict[Any, Outputs], eps: float
) -> None:
    """Adds how far rounding moves each output."""
    names = list(held)
    skips = [value for place, value, _ in side.settings if place.endswith("mask_value")]

    def run(by: float) -> list[np.ndarray]:
        moved = [judge.nudged(x, by) for x in xs]
        if skips:  # what a Masking skips is this number alone
            moved = [np.where(np.isin(x, skips), x, y) for x, y in zip(xs, moved, strict=True)]
        taps, found = _ran(side, moved, "nudged", by)
        for name, known in as_known(taps, names).items():
            taps[known] = taps.pop(name)
        return [*(taps[n].value for n in names), *(v.value for v in found.values())]

    before = [held[n].value for n in names] + [v.value for v in gives.values()]
    try:
        found = iter(judge.rounding(run, before, eps))
    except ConversionError:  # a model that can't be copied is allowed its own roundings alone
        return
    for each in (held, gives):
        for name, value in list(each.items()):
            each[name] = Outputs(value.value, next(found))
