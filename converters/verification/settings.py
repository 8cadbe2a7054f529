"""The first setting in which two models differ: some are told by no inputs but a few."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fwt._sequential import Sequential
from fwt._types import Model
from fwt.converters.rows.row import TRAINING
from fwt.converters.verification.sides import OF_TRAINING


def of_layers(a: Model, b: Model) -> str | None:
    """The first number among the settings that differs, of models of the same layers: some are
    told by no inputs but those that lie between them, as the end of a threshold is."""
    if not isinstance(a.module, Sequential) or not isinstance(b.module, Sequential):
        return None
    pairs = list(zip(a.module.layers, b.module.layers, strict=False))
    kinds = [(type(x.layer), type(y.layer)) for x, y in pairs]
    if len(a.module.layers) != len(b.module.layers) or any(
        one is not other for one, other in kinds
    ):
        return None
    for x, y in pairs:
        if isinstance(x.layer, Sequential):
            found = of_layers(Model(x.layer, {}), Model(y.layer, {}))
            if found is not None:
                return f"{x.name}/{found}"
            continue
        for field in dataclasses.fields(x.layer):
            if field.name in TRAINING["flax"] or field.name in OF_TRAINING:
                continue
            mine, theirs = (_floats(getattr(each.layer, field.name), field) for each in (x, y))
            if mine is None or theirs is None:
                continue
            if len(mine) != len(theirs) or not np.allclose(mine, theirs, 1e-6, 0, equal_nan=True):
                one, other = ([f"{v:g}" for v in values] for values in (mine, theirs))
                return f"{x.name}: {field.name} is {', '.join(one)} and {', '.join(other)}"
    return None


def of_numbers(a: Sequence[tuple[str, float]], b: Sequence[tuple[str, float]]) -> str | None:
    """The first number that differs, among the settings of models that can't be converted."""
    if len(a) != len(b):
        places = [[p for p, _ in each] for each in (a, b)]
        lone = [p for p in (*places[0], *places[1]) if p not in places[0] or p not in places[1]]
        return f"{lone[0]} is a number in one of them only" if lone else None
    for (place, mine), (_, theirs) in zip(a, b, strict=True):
        if not np.isclose(mine, theirs, 1e-6, 0, equal_nan=True):
            return f"{place} is {mine:g} and {theirs:g}"
    return None


def _floats(value: Any, field: Any) -> list[float] | None:
    """A setting as floats, if that is what it is or is declared to be; NaN is none."""
    if value is None and "float" in str(field.type):
        return [math.nan]
    values = list(value) if isinstance(value, list | tuple) else [value]
    kinds = (float, int) if "float" in str(field.type) else (float,)
    return [float(v) for v in values] if values and all(type(v) in kinds for v in values) else None
