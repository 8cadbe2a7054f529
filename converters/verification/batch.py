"""The inputs of two models, one array for each: their order, and their axes in the layout of each
model."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fwt._types import ConversionError
from fwt.converters.verification.sides import Side

Xs = Sequence[np.ndarray]


def moved(x: np.ndarray, now: bool, then: bool) -> np.ndarray:
    """An array with the channels first or last, of one that has them so."""
    if now == then or x.ndim < 3:
        return x
    return np.ascontiguousarray(np.moveaxis(x, 1, -1) if now else np.moveaxis(x, -1, 1))


def laid(xs: Xs, one: Side, other: Side, model: bool = False) -> list[np.ndarray]:
    """The inputs of a model as another takes them; of the Flax model of the first if ``model``."""
    if len(xs) == 1:
        return [
            moved(xs[0], one.channels_first, one.model_first if model else other.channels_first)
        ]
    return [moved(x, *_places(x, i, one, other)) for i, x in enumerate(xs)]


def _places(x: np.ndarray, i: int, one: Side, other: Side) -> tuple[bool, bool]:
    """Whether one of several inputs has its channels first in either model."""
    for there, back in ((one, False), (other, True)):
        shape = there.shapes[i] if there.shapes is not None else None
        if shape is None or not back:
            continue
        ways = [(a, b) for a, b in ((False, False), (True, False), (False, True))
                if _fits(moved(x, a, b).shape[1:], shape)]  # fmt: skip
        if len(ways) == 1:
            return ways[0]
    first, then = (s.channels[i] if s.channels is not None else None for s in (one, other))
    # What a torch module tells holds for the inputs that have channels in the other model.
    if one.channels is None and other.channels is not None:
        first = one.channels_first if then is not None else None
    if other.channels is None and one.channels is not None:
        then = other.channels_first if first is not None else None
    if first is None or then is None:
        return False, False
    return first, then


def _fits(sizes: Sequence[int], shape: Sequence[int | None]) -> bool:
    return len(sizes) == len(shape) and all(
        s is None or s == n for n, s in zip(sizes, shape, strict=True)
    )


def given(inputs: Any, one: Side, other: Side) -> list[np.ndarray] | None:
    """What the user gave as one array for each input of the first model, in its order; None for
    one array."""
    if isinstance(inputs, Mapping):
        both = (one.names_of, other.names_of)
        names = next((n for n in both if n is not None and set(n) == set(inputs)), None)
        if names is None:
            known = " or ".join(", ".join(s.names_of) for s in (one, other) if s.names_of)
            raise ConversionError(
                f"verify: the inputs are named {', '.join(map(str, inputs))}; the models take "
                f"{known or 'arrays without names'}"
            )
        return [np.asarray(inputs[name]) for name in names]
    if not isinstance(inputs, list | tuple) or not inputs:
        return None
    if not all(hasattr(x, "shape") and len(x.shape) for x in inputs):
        return None
    count = one.count or other.count
    apart = len({tuple(x.shape[1:]) for x in inputs}) > 1
    if count == 1 and not apart:
        return None
    if len(inputs) > 1 and (count == len(inputs) or apart):
        return [np.asarray(x) for x in inputs]
    if count is not None and count > 1:
        raise ConversionError(f"verify: the first model takes {count} inputs, found {len(inputs)}")
    return None


def order_of(one: Side, other: Side) -> list[int] | None:
    """Which input of the first model each of the second's is, where they go by name: one takes a
    dict, which has no order, or both are files."""
    by_name = one.by_key or other.by_key or (one.is_file and other.is_file)
    if not (by_name and one.names_of and other.names_of):
        return None
    if set(one.names_of) != set(other.names_of) or list(one.names_of) == list(other.names_of):
        return None
    return [list(one.names_of).index(name) for name in other.names_of]
