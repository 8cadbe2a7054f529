"""The axes of the tensor between two layers, in the source's and in the target's order."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from fwt.converters.rows.row import refuse


@dataclasses.dataclass(eq=False)
class Axis:
    """One axis of the tensor between two layers.

    Attributes:
        size: None where it is not known.
        origin: the axes of the model's inputs that it is, as (number of the input, axis); none once
            a layer made it anew, several where branches meet.
        channel: whether a layer proved it to hold the channels.
        spatial: whether it stood beside such an axis, as the height of an image does.
        source: the factors of a flattened axis, in the source's order; empty for a plain axis.
        target: the same factors in the target's order.
        joined: the axes that a Concatenate of flattened ones put one after the other.
    """

    size: int | None = None
    origin: frozenset[tuple[int, int]] = frozenset()
    channel: bool = False
    spatial: bool = False
    source: tuple["Axis", ...] = ()
    target: tuple["Axis", ...] = ()
    joined: tuple["Axis", ...] = ()

    @property
    def scrambled(self) -> bool:
        return self.source != self.target or any(a.scrambled for a in self.joined)


@dataclasses.dataclass
class Value:
    """What a layer gives.

    Attributes:
        tips: the target's layer that gives it; of a layer that is being written, all that it takes.
        have: its axes in the source's order; None while the rank is unknown.
        want: its axes in the target's order; likewise.
        n: the batch axis; None of what has none.
        non_negative: whether it is known to be >= 0.
        permute_name: the name of a transposition of the source that the target has not yet.
        roots: the numbers of the model's inputs that it follows from.
        dtype: what it was computed in, where that is said.
    """

    tips: tuple[str, ...]
    have: list[Axis] | None = None
    want: list[Axis] | None = None
    n: Axis | None = None
    non_negative: bool = False
    permute_name: str | None = None
    roots: frozenset[int] = frozenset()
    dtype: str | None = None


def place_channel(axes: list[Any], channel: int, layout: str) -> list[Any]:
    """The order of axes that a layout asks for, given which one holds the channels."""
    rest = [a for i, a in enumerate(axes) if i not in (0, channel)]
    if layout == "channels_first":
        return [axes[0], axes[channel], *rest]
    return [axes[0], *rest, axes[channel]]


def atoms(axes: Sequence[Axis], side: Literal["source", "target"]) -> tuple[Axis, ...]:
    """The factors of axes; those of size 1 order nothing."""
    return tuple(
        atom for a in axes if a.size != 1 for atom in (getattr(a, side) or (a,)) if atom.size != 1
    )


def _blocks(axis: Axis, total: int | None, place: str) -> tuple[list[int], list[int]]:
    """A flattened axis as blocks in the target's order, and the order that makes it the source's.

    Factors that follow each other in both orders are one block, so that one unknown size (or two
    beside each other, height and width) can be told from the total.
    """
    target, source = list(axis.target), list(axis.source)
    groups: list[list[Axis]] = []
    for atom in target:
        at = source.index(atom)
        if groups and at and source[at - 1] is groups[-1][-1]:
            groups[-1].append(atom)
        else:
            groups.append([atom])
    sizes: list[int | None] = []
    for group in groups:
        factors = [a.size for a in group]
        known = all(f is not None for f in factors)
        sizes.append(math.prod(f for f in factors if f is not None) if known else None)
    total = axis.size if total is None else total
    if sizes.count(None) == 1 and total is not None:
        rest = math.prod(s for s in sizes if s is not None)
        if total % rest:
            raise refuse(place, f"{total} inputs can't be {rest} channels times a whole number")
        sizes[sizes.index(None)] = total // rest
    if None in sizes:
        raise refuse(
            place,
            "the sizes of the flattened axes are not known",
            "give input_shape= (without the batch axis)",
        )
    starts = [source.index(g[0]) for g in groups]
    order = sorted(range(len(groups)), key=lambda i: starts[i])
    return [s for s in sizes if s is not None], order


def permuted(value: Any, index: int, axis: Axis, place: str) -> Any:
    """An array whose ``index`` follows a flattened axis, in the target's order."""
    if axis.joined:
        sizes = [a.size for a in axis.joined]
        if any(s is None for s in sizes) or sum(s or 0 for s in sizes) != value.shape[index]:
            raise refuse(place, f"it takes {value.shape[index]} inputs, joined of {sizes}",
                         "give input_shape= (without the batch axis)")  # fmt: skip
        ends = np.cumsum([s or 0 for s in sizes])[:-1]
        parts = zip(np.split(value, ends, index), axis.joined, strict=True)
        return np.concatenate([permuted(v, index, a, place) for v, a in parts], index)
    if not axis.scrambled:
        return value
    blocks, order = _blocks(axis, value.shape[index], place)
    if math.prod(blocks) != value.shape[index]:
        raise refuse(place, f"expected {math.prod(blocks)} inputs, found {value.shape[index]}")
    before, after = value.shape[:index], value.shape[index + 1 :]
    split = value.reshape(*before, *(blocks[i] for i in order), *after)
    back = [order.index(i) for i in range(len(order))]
    dims = (
        *range(len(before)),
        *(len(before) + i for i in back),
        *range(len(before) + len(order), split.ndim),
    )
    return split.transpose(dims).reshape(value.shape)
