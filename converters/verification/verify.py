"""``verify``: two models side by side, layer by layer."""

import contextlib
import dataclasses
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from fwt._graph import Graph
from fwt._types import ConversionError, Model
from fwt.converters import judge
from fwt.converters.files import formats
from fwt.converters.frameworks import flax as _flax
from fwt.converters.frameworks import linen_trace
from fwt.converters.verification import batch, settings
from fwt.converters.verification import inputs as _inputs
from fwt.converters.verification.keras_side import keras_side
from fwt.converters.verification.lines import WORST, lines_of, turned
from fwt.converters.verification.names import of_call
from fwt.converters.verification.report import (
    Line,
    Report,
)
from fwt.converters.verification.sides import Side, flax_side, nnx_side
from fwt.converters.verification.torch_side import torch_side
from fwt.converters.verification.weights import (
    LARGER,
    apart_in,
    for_model,
    idle,
    in_float32,
    layer_of,
    of_raw,
    unseen,
)


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
    """Feeds two models the same inputs and compares the outputs of every layer, and every output.

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
        inputs: a batch in the layout of ``a``, or a list or a dict of a batch for each of its
            inputs, in which each number is rounded to the dtypes that the models take. By default
            random numbers of several sizes and signs, zeros and ones, each in a row of its own;
            whole numbers to models that take them, among them each row of a table of embeddings
            in which the models differ. Images are moved between channels first and last where one
            of them is a torch model with spatial layers.
        input_shape: of one input of ``a``, where neither model says it, or an example of it; of
            several inputs a list or a dict of those. A linen module of one's own is traced for it,
            or for ``inputs``; without one, its outputs alone are compared.
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
    shape = _example(inputs) if input_shape is None and inputs is not None else input_shape
    one, other = (_own_side(m, shape, external_data) for m in (a, b))
    input_shape = _inputs.shapes_of(input_shape)
    if one.count and other.count and one.count != other.count:
        raise ConversionError(
            f"verify: the first model takes {one.count} inputs, the second {other.count}"
        )
    order = batch.order_of(one, other)
    other = other if order is None else other.ordered(order)
    notes: list[str] = []
    made = inputs is None
    if made:
        several = max(one.count or 1, other.count or 1) > 1 or _inputs.are_several(input_shape)
        how = _inputs.made_of_several if several else _inputs.made
        free = _inputs.is_free(one, other, input_shape)
        sizes = _inputs.sizes_taken(one, other, how, input_shape) if free else [*_inputs.FREE]
        inputs, notes = how(one, other, input_shape, sizes[0])
    begun = one, other
    given = batch.given(inputs, one, other)
    xs = [np.asarray(inputs)] if given is None else given
    for x in xs:
        if x.dtype.kind not in "fiub" and not jnp.issubdtype(x.dtype, jnp.floating):
            raise ConversionError(f"verify: inputs of {x.dtype} are no batch of numbers")
    if len({len(x) if x.ndim else 0 for x in xs}) > 1:
        raise ConversionError(
            f"verify: the inputs have {', '.join(str(len(x)) for x in xs)} rows: each needs as many"
        )
    xs = [_as_taken(x, i, (one, other)) for i, x in enumerate(xs)]
    if one.swaps(xs) and not made:
        xs = [np.ascontiguousarray(xs[0].swapaxes(0, 1))]
    if not xs[0].ndim or not len(xs[0]):
        output = Line("output", xs[0].shape, 0.0, 0.0, 0, "not compared")
        return Report(False, None, (), (), output, (_nothing(xs[0], output),))
    unknown = made and input_shape is None and one.shape is None
    one, other, xs, found = turned(one, other, xs, tolerance, unknown, made)
    lines, outputs, told, carries = found
    output = min(outputs, key=lambda line: WORST.index(line.status))
    x = xs[0]
    there = batch.laid(xs, one, other)
    if one.turned == other.turned:
        moved = [i for i, (v, w) in enumerate(zip(xs, there, strict=True)) if v.shape != w.shape]
        if len(xs) == 1 and one.channels_first != other.channels_first:
            moved = [0]
        if moved:
            to_first = other.channels_first if len(xs) == 1 else not one.channels_first
            ends = ("first", "last") if to_first else ("last", "first")
            notes.append(f"the second model takes channels {ends[0]}, the first takes them "
                         f"{ends[1]}: its inputs were turned")  # fmt: skip
    if one.swaps(xs) != other.swaps(xs):
        sides = ("first", "second") if one.swaps(xs) else ("second", "first")
        notes.append(f"the {sides[0]} model takes the time first, the {sides[1]} the batch: the "
                     "inputs of the second were turned")  # fmt: skip
    if told is not None:
        notes += [f"not compared: {why}, in the rows {_some(rows)}" for rows, why in (
            (told.lost, "what is NaN in both outputs"),
            (told.unsure, "outputs that rounding alone moves by more than their size, or that grow "
             "beyond the dtype")) if rows]  # fmt: skip
    ok = output.status in ("exact", "close")
    if ok and tolerance is None and output.ulp > _STEP:
        notes.append(
            f"the outputs are up to {output.relative:.2g} of a row apart at its largest: rounding "
            "may do that where it decides on which side of a step a value is. inputs= says more"
        )
    first = None if ok else _departed(lines)
    if not ok and first is None and len(outputs) > 1 and output.status != "not compared":
        first = _departed(outputs)
    if output.status == "not compared":
        notes.append(_nothing(x, output))
    elif not ok and lines and _departed(lines) is None:
        notes.append("no layer that both have departs: see those of one alone")
    weights: tuple[Line, ...] = ()
    changed: set[str] | None = None  # the layers with other weights, if they have the same names
    models = None
    try:
        models = one.model(xs), other.model(there)
        alike = all(v.shape == w.shape for v, w in zip(xs, there, strict=True))
        if alike and any(apart_in(*models)):  # perhaps of the source's own layout
            with contextlib.suppress(ConversionError):
                source = one.model(xs, True), other.model(xs, True)
                models = models if any(apart_in(*source)) else source
        setting = settings.of_layers(*models)
        weights = tuple(apart_in(*models))
        changed = {layer_of(line.name) for line in weights}
    except ConversionError as error:
        notes.append(f"the weights are not compared: {error}")
        setting = None
        if one.names is not None and one.names == other.names:
            changed = {line.name for line in lines}
            setting = settings.of_numbers(one.settings, other.settings)
    if ok and tolerance is None and setting is not None:
        ok, first = False, setting.split(":")[0]
        notes.append(f"no output on these inputs shows it, but a setting differs: {setting}")
    far = settings.beyond(one.settings, other.settings) if ok else None
    if far is not None:
        notes.append(f"a setting lies beyond what these inputs reach, in one model alone: {far}")
    graphs = models is not None and all(isinstance(m.module, Graph) for m in models)
    if ok and tolerance is None and (first := _hidden(lines, carries, changed, graphs)) is not None:
        ok = False
        notes.append(f"the layers behind {first} hide the difference: the output is close")
    if ok and tolerance is None and models is None and one.names == other.names:
        first = of_raw(one, other)
        ok = first is None
        if not ok:
            why = "layers of a model that can't be converted are not fed by themselves"
            notes.append(f"no output shows how the weights of {first} differ, and {why}")
    if ok and weights and models:
        why = "one does if they differ by more in the same direction"
        try:
            first = unseen(one, models, xs, order) if tolerance is None else None
            if first is None and tolerance is None:
                first = idle(models, xs, lines, one)
                why = "the layer does if it is fed other numbers"
            ok = first is None
            hidden = f"no output shows how the weights of {first} differ, but {why}"
            equal = "these weights differ, and the outputs on these inputs are equal all the same"
            notes.append(equal if ok else hidden)
        except ConversionError as error:
            notes.append(f"the weights are not compared: {error}")
    if ok and tolerance is None and models and (wide := in_float32(models)) is not None:
        again = _again(wide, for_model(xs, one, models[0]), order)
        if not again.ok:
            ok, first = False, again.first
            notes.append("half precision hides the difference: in float32, with the same weights, "
                         "the models differ")  # fmt: skip
    if ok and made and free:
        told_of, ok = _at_other_sizes(begun, (one, other), how, input_shape, tolerance, sizes)
        notes += told_of
    outs = tuple(outputs) if len(outputs) > 1 else ()
    return Report(ok, first, tuple(lines), weights, output, tuple(notes), outs)


def _at_other_sizes(
    begun: tuple[Side, Side],
    sides: tuple[Side, Side],
    how: Any,
    shape: Any,
    tolerance: float | None,
    sizes: Sequence[int],
) -> tuple[list[str], bool]:
    """What is found of the outputs where axes that may have any size have others, and whether the
    models are equal there. ``begun`` are the sides for which ``how`` makes inputs."""
    notes, compared = list[str](), 1
    for size in sizes[1:]:
        if compared == _inputs.AT:
            break
        inputs, _ = how(*begun, shape, size)
        xs = batch.given(inputs, *begun) or [np.asarray(inputs)]
        shapes = " and ".join(str(list(x.shape)) for x in xs)
        try:
            _, outputs, *_ = lines_of(*sides, xs, tolerance)
        except ConversionError as error:
            if _inputs.takes(begun[0], xs):
                notes.append(f"not compared at another size: {str(error).removeprefix('verify: ')}")
            continue
        compared += 1
        if any(line.status == "differs" for line in outputs):
            return [f"the outputs are equal at one size, but differ for inputs of {shapes}"], False
    if compared == 1 and not notes:
        notes = ["compared at one size alone: the first model takes no other that was tried"]
    return notes, True


_STEP = 1 << 13  # units in the last place beyond which equal models seldom are apart


def _again(models: tuple[Model, Model], xs: list[np.ndarray], order: Any) -> Report:
    """What is found of two Flax models fed what the first of them takes."""
    one, other = map(_side, models)
    if order is not None and not one.by_key:
        lines, outputs, *_ = lines_of(one, other.ordered(order), xs)
        output = min(outputs, key=lambda line: WORST.index(line.status))
        return Report(output.status != "differs", _departed(lines), tuple(lines), (), output)
    if one.swaps(xs):
        xs = [np.ascontiguousarray(xs[0].swapaxes(0, 1))]
    given: Any = dict(zip(one.names_of or (), xs, strict=False)) if one.by_key else xs
    return verify(*models, xs[0] if len(xs) == 1 and not one.by_key else given)


def _example(inputs: Any) -> Any:
    """What tells the shapes of inputs that a user gave."""
    if isinstance(inputs, dict):
        return {name: np.asarray(x) for name, x in inputs.items()}
    several = isinstance(inputs, list | tuple) and len({np.shape(x)[1:] for x in inputs}) > 1
    several = several or (isinstance(inputs, list | tuple) and len(inputs) > 1
                          and all(np.ndim(x) > 1 for x in inputs))  # fmt: skip
    return [np.asarray(x) for x in inputs] if several else np.asarray(inputs)


def _some(rows: Sequence[int]) -> str:
    return ", ".join([*map(str, rows[:9]), *(["..."] if len(rows) > 9 else [])])


def _departed(lines: Sequence[Line]) -> str | None:
    """The first layer that differs; else the first whose values are in another order."""
    for status in ("differs", "reordered"):
        for line in lines:
            if line.status == status:
                return line.name
    return None


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
            small = line.relative <= LARGER
            if small or (changed is not None and line.name not in carries):
                return line.name
            if changed is None:
                return None
            waits = waits or line.name
        elif waits and line.status in ("exact", "close"):
            if changed is not None and of_call(line.name) not in changed:
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


def _graph_of(model: Any, shape: Any) -> Any:
    """A linen module of one's own and its variables as a Graph, if it can be one for that shape;
    anything else as it is."""
    own = isinstance(model, tuple) and len(model) == 2 and linen_trace.is_own(model[0])
    if not own or shape is None:
        return model
    # A dict may have the names that the other model's inputs have.
    for given in (shape, list(shape.values())) if isinstance(shape, Mapping) else (shape,):
        with contextlib.suppress(ConversionError):
            return linen_trace.traced(model[0], model[1], given)
    return model


def _own_side(model: Any, shape: Any, external: bool) -> Side:
    found = _graph_of(model, shape)
    side = _side(found, external)
    return side if found is model else dataclasses.replace(side, own=True)


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


def _as_taken(x: np.ndarray, at: int, sides: Sequence[Side]) -> np.ndarray:
    """An input rounded once, to what every model takes, so that all are fed the same numbers."""
    for side in sides:
        takes = side.takes[at] if isinstance(side.takes, list) else side.takes
        floats = takes is not None and jnp.issubdtype(takes, jnp.floating)
        if takes is None or (floats and x.dtype.kind in "iu"):  # the rows of a table
            continue
        with np.errstate(all="ignore"):
            cast = x.astype(takes)
        whole = cast.dtype.kind in "iu" and x.dtype.kind == "f"
        x = cast if whole else cast.astype(x.dtype)
    return x
