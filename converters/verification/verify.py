"""``verify``: two models side by side, layer by layer."""

import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from fwt import _tree
from fwt._types import ConversionError, Model
from fwt.converters.files import formats
from fwt.converters.frameworks import flax as _flax
from fwt.converters.verification.report import Line, Report, apart, compared
from fwt.converters.verification.sides import (
    Side,
    Taps,
    flax_side,
    keras_side,
    nnx_side,
    torch_side,
)


def verify(
    a: Any,
    b: Any,
    inputs: Any = None,
    *,
    input_shape: Sequence[int] | None = None,
    tolerance: float = 1e-5,
    external_data: bool = False,
) -> Report:
    """Feeds two models the same inputs and compares the outputs of every layer.

    Args:
        a: a live Keras model, a torch or nnx module, a ``fwt.Model``, or a file with a model.
        b: another of them.
        inputs: a batch in the layout of ``a``; by default random numbers, zeros, ones, large and
            small ones. Images are moved between channels first and last where one of them is a
            torch model with spatial layers.
        input_shape: of one input of ``a``, where neither model says it.
        tolerance: of an output, times the largest output of ``a`` if that is more than 1.
        external_data: whether an ONNX file may have its weights in another in its folder.

    Returns:
        A report: ``print`` it, or ask it for ``ok``, ``first``, ``to_json()``.

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
    one, other = _side(a, external_data), _side(b, external_data)
    if inputs is None:
        inputs = _inputs(one, other, input_shape)
    x = np.asarray(inputs)
    if x.dtype.kind not in "fiub":
        raise ConversionError(f"verify: inputs of {x.dtype} are no batch of numbers")
    first, mine = _ran(one, x, "first")
    second, theirs = _ran(other, _moved(x, one.channels_first, other.channels_first), "second")
    lines = []
    for name in [*mine, *(n for n in theirs if n not in mine)]:
        if name not in mine or name not in theirs:
            where, shape = (
                ("first", mine[name].shape) if name in mine else ("second", theirs[name].shape)
            )
            lines.append(Line(name, shape, math.nan, math.nan, 0, f"only in the {where}"))
        else:
            more = _turned(theirs[name]) if one.turned or other.turned else ()
            lines.append(compared(name, mine[name], (theirs[name], *more), tolerance))
    sides = (second, _moved(second, other.channels_first, one.channels_first))
    output = compared("output", first, sides, tolerance)
    departed = next((line.name for line in lines if line.status == "differs"), None)
    ok = output.status in ("exact", "close")
    notes = [] if ok or departed else ["no layer that both have departs: see those of one alone"]
    try:
        weights = tuple(_weights(one, other))
    except ConversionError as error:
        weights = ()
        notes.append(f"the weights are not compared: {error}")
    return Report(ok, departed, tuple(lines), weights, output, tuple(notes))


def _ran(side: "Side", x: np.ndarray, which: str) -> tuple[np.ndarray, Taps]:
    try:
        return side.run(x)
    except Exception as error:  # each framework has its own errors for a shape
        why = " ".join(str(error).split())[:300]
        raise ConversionError(
            f"verify: the {which} model takes no input of the shape {list(x.shape)} ({why})"
        ) from error


def _turned(x: np.ndarray) -> tuple[np.ndarray, ...]:
    return (np.moveaxis(x, 1, -1), np.moveaxis(x, -1, 1)) if x.ndim > 2 else ()


def _moved(x: np.ndarray, now: bool, then: bool) -> np.ndarray:
    if now == then or x.ndim < 3:
        return x
    return np.ascontiguousarray(np.moveaxis(x, 1, -1) if now else np.moveaxis(x, -1, 1))


def _weights(one: "Side", other: "Side") -> Iterator[Line]:
    """The weights that are not the same, where both models have them in Flax's form."""
    trees = [
        _tree.Tree({"params": dict(s.model().variables)}, whole=True).leaves for s in (one, other)
    ]
    if trees[0].keys() != trees[1].keys():
        raise ConversionError("the models have other names for them")
    for path, a in trees[0].items():
        a, b = np.asarray(a), np.asarray(trees[1][path])
        if a.shape != b.shape or a.dtype != b.dtype or a.tobytes() != b.tobytes():
            same = a.shape == b.shape
            line = apart(path, a, b, 0.0) if same else None
            yield line or Line(path, a.shape, math.inf, math.inf, 2**31, "differs")


def _side(model: Any, external: bool = False) -> Side:
    """A model as a side, whatever its framework; a file of weights alone is refused."""
    keras, torch = sys.modules.get("keras"), sys.modules.get("torch")
    if isinstance(model, str | os.PathLike):
        if formats.format_of(Path(model)).name == "ONNX":
            from fwt.converters.verification import onnx_side

            return onnx_side.side(Path(model), external)
        model = formats.load(Path(model))
        if model.module is None:
            raise ConversionError("verify: a file of weights alone can't run: load it with "
                                  "architecture=")  # fmt: skip
    if isinstance(model, tuple) and len(model) == 2:
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


def _inputs(one: Side, other: Side, shape: Sequence[int] | None) -> np.ndarray:
    """Random numbers, zeros, ones, large and small ones, in the layout of the first model."""
    known: Any = shape or one.shape
    if known is None and other.shape is not None:
        known = other.shape
        if one.channels_first != other.channels_first and len(known) > 1:
            known = (known[-1], *known[:-1]) if one.channels_first else (*known[1:], known[0])
    if known is None:
        raise ConversionError(
            "verify: neither model says what it takes: give input_shape= or inputs="
        )
    sizes = tuple(9 if s is None else int(s) for s in known)
    rng = np.random.default_rng(0)
    count = one.integers or other.integers
    if count:
        return rng.integers(0, count, (4, *sizes)).astype(np.int32)
    rows = rng.normal(size=(6, *sizes))
    rows[2], rows[3] = 0, 1
    rows[4] *= 100
    rows[5] *= 1e-3
    return rows.astype(np.float32)
