"""``verify``: two models side by side, layer by layer."""

import contextlib
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fwt import _tree
from fwt._graph import Graph, inputs_of, nodes_of
from fwt._sequential import Sequential, call
from fwt._types import ConversionError, Model
from fwt.converters import judge
from fwt.converters.files import formats
from fwt.converters.frameworks import flax as _flax
from fwt.converters.frameworks import linen_trace
from fwt.converters.rows.row import parts_of
from fwt.converters.verification import inputs as _inputs
from fwt.converters.verification import settings
from fwt.converters.verification.report import (
    Line,
    Outputs,
    Report,
    View,
    carried,
    compared,
    identical,
    weight_apart,
)
from fwt.converters.verification.sides import (
    Further,
    Side,
    each_layer,
    flax_side,
    keras_side,
    layer_name,
    nnx_side,
    torch_side,
)

_LARGER = 2.0**-4  # relative to the scale: what is no longer a small difference


@judge.full_products()
def verify(
    a: Any,
    b: Any,
    inputs: Any = None,
    *,
    input_shape: Sequence[int] | None = None,
    tolerance: float | None = None,
    external_data: bool = False,
) -> Report:
    """Feeds two models the same inputs and compares the outputs of every layer.

    Each row of the batch is judged by its own scale, its largest value, and so is each position
    of an image or a sequence, from 8 channels on. A row may be off by ten roundings. Where two
    models are further apart than ten roundings of their outputs, it is measured how far those
    inside the models move the outputs: both run twice more, with inputs and weights that are a
    little other.

    Two models with the same layers and weights by name must also agree in every layer, but for
    the order of its units and for a factor and a number of each that the next layer takes back.
    Weights that are apart must not be hidden by what their layer is fed. Products of float32 are
    computed in float32, on GPUs and TPUs too.

    Args:
        a: a live Keras model, a torch or nnx module, a ``fwt.Model``, or a file with a model.
        b: another of them.
        inputs: a batch in the layout of ``a``, in which each number is rounded to the dtypes that
            the models take. By default random numbers of several sizes and
            signs, zeros and ones, each in a row of its own; whole numbers to models that take
            them, among them each row of a table of embeddings in which the models differ.
            Images are moved between channels first and last where one of them is a torch model
            with spatial layers.
        input_shape: of one input of ``a``, where neither model says it. A linen module of one's own
            is traced for it, or for ``inputs``; without one, its outputs alone are compared.
        tolerance: how far a row may be off relative to its largest value, in place of ten
            roundings.
        external_data: whether an ONNX file may have its weights in another in its folder.

    Returns:
        A report: ``print`` it, or ask it for ``ok``, ``first``, ``to_json()``. Where nothing
        finite could be compared, ``ok`` is False and a note says why.

    Raises:
        ConversionError: for what is no model, or if ``b`` can't take the inputs.

    Example:
        >>> import torch
        >>> from fwt import converters
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh())
        >>> report = verify(net, converters.from_torch(net), input_shape=(3,))
        >>> report.ok, report.first, [line.name for line in report.layers]
        (True, None, ['0', '1'])
    """
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise ConversionError(f"verify: tolerance={tolerance} is no part of a row's largest value")
    apart = isinstance(inputs, list | tuple) and len({np.shape(x) for x in inputs}) > 1
    if apart or isinstance(inputs, dict):
        raise ConversionError("verify feeds one array, found several inputs")
    if any(isinstance(s, list | tuple) for s in input_shape or ()):
        raise ConversionError(f"verify feeds one array, found input_shape={input_shape!r}")
    shape = np.asarray(inputs) if input_shape is None and inputs is not None else input_shape
    one, other = (_side(_graph_of(m, shape), external_data) for m in (a, b))
    notes: list[str] = []
    made = inputs is None
    if made:
        inputs, notes = _inputs.made(one, other, input_shape)
    x = np.asarray(inputs)
    if x.dtype.kind not in "fiub":
        raise ConversionError(f"verify: inputs of {x.dtype} are no batch of numbers")
    x = _as_taken(x, (one, other))
    if one.swaps(x) and not made:
        x = np.ascontiguousarray(x.swapaxes(0, 1))
    if not x.ndim or not len(x):
        output = Line("output", x.shape, 0.0, 0.0, 0, "not compared")
        return Report(False, None, (), (), output, (_nothing(x, output),))
    free = made and input_shape is None and one.shape is None
    one, other, x, found = _turned(one, other, x, tolerance, free, made)
    lines, output, told, carries = found
    if one.channels_first != other.channels_first and one.turned == other.turned:
        ends = ("first", "last") if other.channels_first else ("last", "first")
        notes.append(f"the second model takes channels {ends[0]}, the first takes them {ends[1]}: "
                     "its inputs were turned")  # fmt: skip
    if one.swaps(x) != other.swaps(x):
        sides = ("first", "second") if one.swaps(x) else ("second", "first")
        notes.append(f"the {sides[0]} model takes the time first, the {sides[1]} the batch: the "
                     "inputs of the second were turned")  # fmt: skip
    if told is not None:
        notes += [f"not compared: {why}, in the rows {_some(rows)}" for rows, why in (
            (told.lost, "what is NaN in both outputs"),
            (told.unsure, "outputs that rounding alone moves by more than their size, or that grow "
             "beyond the dtype")) if rows]  # fmt: skip
    ok = output.status in ("exact", "close")
    first = None if ok else _departed(lines)
    if output.status == "not compared":
        notes.append(_nothing(x, output))
    elif not ok and first is None and lines:
        notes.append("no layer that both have departs: see those of one alone")
    weights: tuple[Line, ...] = ()
    changed: set[str] | None = None  # the layers with other weights, if they have the same names
    models = None
    try:
        there = _moved(x, one.channels_first, other.channels_first)
        models = one.model(x.shape[1:]), other.model(there.shape[1:])
        if x.shape == there.shape and any(_weights(*models)):  # perhaps of the source's own layout
            with contextlib.suppress(ConversionError):
                source = one.model(x.shape[1:], True), other.model(x.shape[1:], True)
                models = models if any(_weights(*source)) else source
        setting = settings.of_layers(*models)
        weights = tuple(_weights(*models))
        changed = {_layer(line.name) for line in weights}
    except ConversionError as error:
        notes.append(f"the weights are not compared: {error}")
        setting = None
        if one.names is not None and one.names == other.names:
            changed = {line.name for line in lines}
            setting = settings.of_numbers(one.settings, other.settings)
    if ok and tolerance is None and setting is not None:
        ok, first = False, setting.split(":")[0]
        notes.append(f"no output on these inputs shows it, but a setting differs: {setting}")
    graphs = models is not None and all(isinstance(m.module, Graph) for m in models)
    if ok and tolerance is None and (first := _hidden(lines, carries, changed, graphs)) is not None:
        ok = False
        notes.append(f"the layers behind {first} hide the difference: the output is close")
    if ok and weights and models:
        why = "one does if they differ by more in the same direction"
        try:
            first = _unseen(one, models, x) if tolerance is None else None
            if first is None and tolerance is None:
                first = _idle(models, x, lines, one)
                why = "the layer does if it is fed other numbers"
            ok = first is None
            hidden = f"no output shows how the weights of {first} differ, but {why}"
            equal = "these weights differ, and the outputs on these inputs are equal all the same"
            notes.append(equal if ok else hidden)
        except ConversionError as error:
            notes.append(f"the weights are not compared: {error}")
    return Report(ok, first, tuple(lines), weights, output, tuple(notes))


def _some(rows: Sequence[int]) -> str:
    return ", ".join([*map(str, rows[:9]), *(["..."] if len(rows) > 9 else [])])


def _departed(lines: Sequence[Line]) -> str | None:
    """The first layer that differs; else the first whose values are in another order."""
    for status in ("differs", "reordered"):
        for line in lines:
            if line.status == status:
                return line.name
    return None


def _layer(path: str) -> str:
    """The layer of a weight."""
    return layer_name(_tree.split(path)[1:-1] or ("",))


def _hidden(
    lines: Sequence[Line], carries: set[str], changed: set[str] | None, graphs: bool
) -> str | None:
    """The first layer whose difference is hidden, where both models have the same layers.

    Args:
        lines: of the layers.
        carries: those whose units are another's in another order, or scaled and moved.
        changed: those with other weights; None where the models have other names for them. Such
            models may do the same in other ways, so there only small differences are faults.
        graphs: whether both are graphs.
    """
    both = [line for line in lines if not line.status.startswith("only")]
    if len(both) < len(lines) and (changed is None or not graphs):
        return None  # in graphs of the same weights, what one has alone is an operation
    waits = None
    for line in both:
        if line.status == "differs":
            if line.allowed == 0 and math.isinf(line.absolute):
                return None  # of another shape: the models do the same in other ways
            small = line.relative <= _LARGER
            if small or (changed is not None and line.name not in carries):
                return line.name
            if changed is None:
                return None
            waits = waits or line.name
        elif waits and line.status in ("exact", "close"):
            if changed is not None and line.name not in changed:
                return waits  # what is scaled must be scaled back
            waits = None
    return None


def _nothing(x: np.ndarray, output: Line) -> str:
    if not x.size:
        why = "the batch has no rows"
    elif not math.prod(output.shape):
        why = f"an output of the shape {list(output.shape)} has no numbers"
    elif output.absolute:
        why = "rounding alone moves the outputs by more than their size"
    else:
        why = "no output is finite"
    return f"nothing is compared: {why}"


# Of several outputs, the line of the worst is that of the model.
_WORST = ("differs", "reordered", "not compared", "close", "exact")
Held = dict[str | None, Outputs]  # by layer; None is the output of the model


Found = tuple[list[Line], Line, judge.Apart | None, set[str]]


def _turned(
    one: Side, other: Side, x: np.ndarray, tolerance: float | None, free: bool, made: bool
) -> tuple[Side, Side, np.ndarray, Found]:
    """The sides and the inputs as they fit together, and what :func:`_lines` finds.

    The inputs are turned if the layers say so. They go in as they are if that makes such models
    equal, since not every layer says where channels are; and another way only where these can't be
    run at all. Where the batch is is tried only for a model no layer of which tells it.

    Args:
        one: the first model.
        other: the second.
        x: inputs in the layout of the first.
        tolerance: see ``verify``.
        free: whether the first model does not say what it takes, so that ``x`` may be turned too.
        made: whether the inputs are none of the user's.
    """

    def tried(a: Side, b: Side, given: np.ndarray) -> tuple[Side, Side, np.ndarray, Found] | None:
        try:
            return a, b, given, _lines(a, b, given, tolerance)
        except ConversionError as error:
            failed.append(error)
            return None

    failed: list[ConversionError] = []
    first = tried(one, other, x)
    if first is None or first[3][1].status == "differs":
        for told, side in ((one.told, other), (other.told, one)):
            if side.told or not (told or first is None):
                continue  # what layers tell stays
            turned = side.timed(not side.time_first)
            given = x
            if side is one and not made and x.ndim > 1:
                given = np.ascontiguousarray(x.swapaxes(0, 1))
            pair = (one, turned) if side is other else (turned, other)
            alike = tried(*pair, given)
            if alike is not None and (first is None or alike[3][1].status != "differs"):
                return alike
    if x.ndim > 2 and one.channels_first != other.channels_first:
        if first is not None and first[3][1].status in ("exact", "close"):
            return first
        plain = tried(one, other.laid_out(one.channels_first), x)
        if plain is not None and (first is None or plain[3][1].status in ("exact", "close")):
            return plain
    if first is not None:
        return first
    if x.ndim > 2:
        layouts = [x, _moved(x, True, False), _moved(x, False, True)] if free else [x]
        for given in layouts:
            for a, b in ((False, False), (True, False), (False, True)):
                found = tried(one.laid_out(a), other.laid_out(b), given)
                if found is not None:
                    return found
    raise failed[0]


def _lines(one: Side, other: Side, x: np.ndarray, tolerance: float | None = None) -> Found:
    """A line for each layer and one for the output, what was found of that, and which of the
    layers that differ carry the same in another way."""
    there = _moved(x, one.channels_first, other.channels_first)
    mine, theirs = _ran(one, x, "first"), _ran(other, there, "second")
    values = [held.value.dtype for held in (*mine.values(), *theirs.values())]
    eps = judge.eps_of([*values, *one.computes, *other.computes])
    how = {"eps": eps, "tolerance": tolerance, "axis": 1 if one.channels_first else -1,
           "clamps": one.clamps or other.clamps}  # fmt: skip
    inside: list[View] = [_as_it_is]
    if one.turned or other.turned or one.channels_first != other.channels_first:
        inside += [lambda v: _moved(v, True, False), lambda v: _moved(v, False, True)]
    ends: list[View] = [_as_it_is, lambda v: _moved(v, other.channels_first, one.channels_first)]

    def told() -> tuple[list[Line], Line, judge.Apart | None]:
        lines = []
        for name in [*mine, *(n for n in theirs if n not in mine)]:
            if name is None or isinstance(name, Further):
                continue
            if name in mine and name in theirs:
                lines.append(compared(name, mine[name], theirs[name], inside, **how)[0])
                continue
            where, held = ("first", mine) if name in mine else ("second", theirs)
            shape = held[name].value.shape
            lines.append(Line(name, shape, math.nan, math.nan, 0, f"only in the {where}"))
        both = [compared("output", mine[None], theirs[None], ends, **how)]
        for name in [*mine, *(n for n in theirs if n not in mine)]:
            if isinstance(name, Further):
                nothing = Outputs(np.zeros(0))
                a, b = mine.get(name, nothing), theirs.get(name, nothing)
                both.append(compared(name, a, b, ends, **how))
        return lines, *min(both, key=lambda pair: _WORST.index(pair[0].status))

    found = told()
    if tolerance is not None or all(n.status != "differs" for n in (*found[0], found[1])):
        return *found, set()
    # More than ten roundings of its own: only now is measuring them worth its time.
    _measure(one, x, mine, eps)
    _measure(other, there, theirs, eps)
    lines, output, last = told()
    axis = 1 if one.channels_first else -1
    carries = {
        line.name
        for line in lines
        if line.status == "differs"
        and any(carried(mine[line.name].value, view(theirs[line.name].value), axis)
                for view in inside)
    }  # fmt: skip
    return lines, output, last, carries


def _as_it_is(v: np.ndarray) -> np.ndarray:
    return v


def _ran(side: Side, x: np.ndarray, which: str, by: float = 0.0) -> Held:
    try:
        output, taps = side.outputs(x, by)
    except Exception as error:  # each framework has its own errors for a shape
        why = " ".join(str(error).split())[:300]
        raise ConversionError(
            f"verify: the {which} model takes no input of the shape {list(x.shape)} ({why})"
        ) from error
    return {**{name: Outputs(v) for name, v in taps.items()}, None: Outputs(output)}


def _measure(side: Side, x: np.ndarray, held: Held, eps: float) -> None:
    """Adds how far rounding moves each output."""

    def run(by: float) -> list[np.ndarray]:
        now = _ran(side, judge.nudged(x, by), "nudged", by)
        return [now[name].value for name in held]

    try:
        found = judge.rounding(run, [held[name].value for name in held], eps)
    except ConversionError:  # a model that can't be copied is allowed its own roundings alone
        return
    for (name, before), moved in zip(list(held.items()), found, strict=True):
        held[name] = Outputs(before.value, moved)


def _moved(x: np.ndarray, now: bool, then: bool) -> np.ndarray:
    if now == then or x.ndim < 3:
        return x
    return np.ascontiguousarray(np.moveaxis(x, 1, -1) if now else np.moveaxis(x, -1, 1))


def _weights(a: Model, b: Model) -> Iterator[Line]:
    """The weights that are not the same, where both models have them in Flax's form."""
    for path, x, y in _pairs(a, b):
        if not identical(x, y):
            yield weight_apart(path, x, y)


def _pairs(a: Model, b: Model) -> list[tuple[str, np.ndarray, np.ndarray]]:
    one, other = (_tree.Tree({"params": dict(m.variables)}, whole=True).leaves for m in (a, b))
    if one.keys() != other.keys():
        raise ConversionError("the models have other names for them")
    return [(path, np.asarray(v), np.asarray(other[path])) for path, v in one.items()]


def _unseen(one: Side, models: tuple[Model, Model], x: np.ndarray) -> str | None:
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
    if largest >= _LARGER:
        return _unseen_small(one, models, x, list(steps))
    mine, theirs = models[0], Model(models[1].module, models[0].variables)
    given = _moved(x, one.channels_first, one.model_first)
    same = nodes_of(mine.module) == nodes_of(theirs.module)
    if not same and _lines(flax_side(mine), flax_side(theirs), given)[1].status == "differs":
        return None  # what differs in the weights may be made up for in the layers
    tree = _tree.Tree({"params": dict(mine.variables)}, whole=True)
    old = {path: np.asarray(tree.leaves[path]) for path in steps}
    new = {path: (old[path] + _LARGER / largest * step).astype(old[path].dtype)
           for path, step in steps.items()}  # fmt: skip
    wider = Model(mine.module, tree.replace(new)["params"])
    if _lines(flax_side(mine), flax_side(wider), given)[1].status != "differs":
        return _unseen_small(one, models, x, list(steps))
    return _layer(next(iter(steps)))


def _unseen_small(
    one: Side, models: tuple[Model, Model], x: np.ndarray, paths: Sequence[str]
) -> str | None:
    given, new = _moved(x, one.channels_first, one.model_first), []
    held = {path: (a, b) for path, a, b in _pairs(*models) if path in paths}
    for index, model in enumerate(models):
        grown = {path: (pair[index] / np.abs(pair).max()).astype(pair[index].dtype)
                 for path, pair in held.items() if 0 < np.abs(pair).max() < _LARGER}  # fmt: skip
        tree = _tree.Tree({"params": dict(model.variables)}, whole=True)
        new.append(Model(model.module, tree.replace(grown)["params"]))
    same = nodes_of(models[0].module) == nodes_of(models[1].module)  # else these may make up for it
    told = same and _lines(flax_side(new[0]), flax_side(new[1]), given)[1].status == "differs"
    return _layer(next(iter(held))) if told else None


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


def _idle(
    models: tuple[Model, Model], x: np.ndarray, lines: Sequence[Line], one: Side
) -> str | None:
    """The first layer with other weights that does not show it because of what it is fed, as
    zeros behind a ReLU: by itself, fed ordinary numbers, it gives another output.

    Layers that are fed, or give, the units of the other model in another order are left out.
    """
    if any(not isinstance(m.module, Sequential | Graph) for m in models):
        return None
    close = {line.name for line in lines if line.status in ("exact", "close")}
    given = _moved(x, one.channels_first, one.model_first)
    turned = flax_side(models[0]).swaps(given)
    (start,) = inputs_of(models[0].module)
    values = {start: jnp.asarray(given.swapaxes(0, 1) if turned else given)}
    settled = {start: True}
    both = (each_layer(m.module, dict(m.variables)) for m in models)
    for (node, layer, own), (_, there, others) in zip(*both, strict=False):
        name, weights = layer_name(parts_of(node.name)), jax.tree.leaves(own)
        xs, known = [values[i] for i in node.inputs], all(settled[i] for i in node.inputs)
        pairs = list(zip(weights, jax.tree.leaves(others), strict=False))
        far = any(_step(np.asarray(v), np.asarray(w)) is not None for v, w in pairs)
        rows = getattr(layer, "num_embeddings", None)
        floats = known and all(jnp.issubdtype(x.dtype, jnp.floating) for x in xs)
        if far and name in close and len(xs) == 1 and (rows or floats):
            fed = np.random.default_rng(0).normal(size=xs[0].shape).astype(xs[0].dtype)
            if rows:
                apart = [np.asarray(v != w).any(1) for v, w in pairs if np.ndim(v) == 2]
                fed = np.flatnonzero(apart[0])[:1024] if apart else np.arange(1)
            if _lines(_alone(layer, own), _alone(there, others), fed)[1].status == "differs":
                return name
        settled[node.name] = name in close and (known or bool(weights))
        values[node.name] = call(layer, own, *xs)
    return None


def _alone(layer: Any, own: Any) -> Side:
    """One layer as a side."""

    def run(x: np.ndarray, by: float = 0.0) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        moved = jax.tree.map(lambda v: judge.nudged(v, by), own) if by else own
        return np.asarray(call(layer, moved, x)), {}

    return Side(run, None, False, lambda *_: Model(layer, own))


def _graph_of(model: Any, shape: Any) -> Any:
    """A linen module of one's own and its variables as a Graph, if it can be one for that shape;
    anything else as it is."""
    own = isinstance(model, tuple) and len(model) == 2 and linen_trace.is_own(model[0])
    if not own or shape is None:
        return model
    try:
        return linen_trace.traced(model[0], model[1], shape)
    except ConversionError:
        return model


def _side(model: Any, external: bool = False) -> Side:
    """A model as a side, whatever its framework; a file of weights alone is refused."""
    keras, torch = sys.modules.get("keras"), sys.modules.get("torch")
    if isinstance(model, str | os.PathLike):
        if formats.format_of(Path(model)).name == "ONNX":
            from fwt.converters.verification import onnx_side

            return onnx_side.side(Path(model), external)
        model = formats.load(Path(model))
    if isinstance(model, tuple) and len(model) == 2:
        if model[0] is None:
            raise ConversionError("verify: weights alone can't run: load them with architecture=")
        return flax_side(Model(_flax.sequential_of(model[0]), model[1]))
    if keras is not None and isinstance(model, keras.Model):
        return keras_side(model)
    if isinstance(model, nnx.Module):
        return nnx_side(model)
    if torch is not None and isinstance(model, torch.nn.Module):
        return torch_side(model)
    raise ConversionError(
        f"verify takes Keras models, torch and nnx modules, fwt.Models and files, found "
        f"{type(model).__name__}"
    )


def _as_taken(x: np.ndarray, sides: Sequence[Side]) -> np.ndarray:
    """The inputs rounded once, to what every model takes, so that all are fed the same numbers."""
    for side in sides:
        floats = side.takes is not None and jnp.issubdtype(side.takes, jnp.floating)
        if side.takes is None or (floats and x.dtype.kind in "iu"):  # the rows of a table
            continue
        with np.errstate(all="ignore"):
            cast = x.astype(side.takes)
        whole = cast.dtype.kind in "iu" and x.dtype.kind == "f"
        x = cast if whole else cast.astype(x.dtype)
    return x
