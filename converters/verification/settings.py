"""The first setting in which two models differ: some are told by no inputs but a few."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fwt._graph import Graph, nodes_of
from fwt._sequential import Sequential
from fwt._types import Model
from fwt.converters.rows.row import TRAINING
from fwt.converters.verification.sides import OF_TRAINING
from fwt.layers import Constant


def of_layers(a: Model, b: Model) -> str | None:
    """The first number among the settings that differs, of models of the same layers: some are
    told by no inputs but those that lie between them, as the end of a threshold is."""
    if not all(isinstance(m.module, Sequential | Graph) for m in (a, b)):
        return None
    one, other = ([n for n in nodes_of(m.module) if not n.of] for m in (a, b))
    pairs = list(zip(one, other, strict=False))
    if len(one) != len(other) or any(type(x.layer) is not type(y.layer) for x, y in pairs):
        return None
    for x, y in pairs:
        if isinstance(x.layer, Constant):
            left, right = (np.asarray(n.layer.value, np.float64) for n in (x, y))
            same = left.shape == right.shape
            if not (same and np.allclose(left, right, 1e-6, 0, equal_nan=True)):
                return f"{x.name}: the constants differ"
            continue
        for field in dataclasses.fields(x.layer):
            if field.name in TRAINING["flax"] or field.name in OF_TRAINING:
                continue
            mine, theirs = (_floats(getattr(each.layer, field.name), field) for each in (x, y))
            if mine is None or theirs is None:
                continue
            if len(mine) != len(theirs) or not np.allclose(mine, theirs, 1e-6, 0, equal_nan=True):
                said = [", ".join(f"{v:g}" for v in values) for values in (mine, theirs)]
                return f"{x.name}: {field.name} is {said[0]} and {said[1]}"
    return None


Numbers = Sequence[tuple[str, float, int]]


def of_numbers(a: Numbers, b: Numbers) -> str | None:
    """The first number that differs, among the settings of models that can't be converted."""
    one, other = ({(at, p.partition(": ")[2]): v for p, v, at in each} for each in (a, b))
    for place, value, at in (*a, *b):  # a whole number may be written in other ways: as a pair
        key = at, place.partition(": ")[2]
        if type(value) is float and (key not in one or key not in other):
            return f"{place} is a number in one of them only"
        mine, theirs = one.get(key, value), other.get(key, value)
        if not np.isclose(mine, theirs, 1e-6, 0, equal_nan=True):
            return f"{place} is {mine:g} and {theirs:g}"
    return None


_REACHED = 1e6  # the size that the inputs which verify makes reach behind most layers


def beyond(a: Numbers, b: Numbers) -> str | None:
    """A number among the settings of one model that lies beyond what inputs reach, if the other
    has none that is equal."""
    for mine, theirs in ((a, b), (b, a)):
        known = [v for _, v, _ in theirs]
        for place, value, _ in mine:
            large = type(value) is float and _REACHED < abs(value) < math.inf
            if large and not any(math.isclose(value, v, rel_tol=1e-6) for v in known):
                return f"{place} is {value:g}"
    return None


def _floats(value: Any, field: Any) -> list[float] | None:
    """A setting as floats, if that is what it is or is declared to be; NaN is none."""
    if value is None and "float" in str(field.type):
        return [math.nan]
    values = list(value) if isinstance(value, list | tuple) else [value]
    kinds = (float, int) if "float" in str(field.type) else (float,)
    return [float(v) for v in values] if values and all(type(v) in kinds for v in values) else None
