"""The axes of the tensor between two layers, in the source's and in the target's order."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

from fwt.converters.rows.row import refuse


@dataclasses.dataclass(eq=False)
class Axis:
    """One axis of the tensor between two layers.

    Attributes:
        size: None where it is not known.
        origin: the axis of the model's input that it is, None once a layer made it anew.
        channel: whether a layer proved it to hold the channels.
        source: the factors of a flattened axis, in the source's order; empty for a plain axis.
        target: the same factors in the target's order.
    """

    size: int | None = None
    origin: int | None = None
    channel: bool = False
    source: tuple["Axis", ...] = ()
    target: tuple["Axis", ...] = ()

    @property
    def scrambled(self) -> bool:
        return self.source != self.target


def place_channel(axes: list[Any], channel: int, layout: str) -> list[Any]:
    """The order of axes that a layout asks for, given which one holds the channels."""
    rest = [a for i, a in enumerate(axes) if i not in (0, channel)]
    if layout == "channels_first":
        return [axes[0], axes[channel], *rest]
    return [axes[0], *rest, axes[channel]]


def atoms(axes: Sequence[Axis], side: Literal["source", "target"]) -> tuple[Axis, ...]:
    return tuple(atom for a in axes for atom in (getattr(a, side) or (a,)))


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
