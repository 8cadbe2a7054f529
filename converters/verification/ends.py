"""Where a model has the batch and the channels in its input, as its layers tell."""

from collections.abc import Iterable
from typing import NamedTuple

from fwt.converters.rows import table
from fwt.converters.rows.row import Framework


class Kind(NamedTuple):
    """What a layer tells.

    Attributes:
        name: its class.
        dims: how it permutes all axes, if it does.
        channels_first: whether it says itself that channels come right after the batch.
        batch: the axis that it says the batch is.
        turns: whether it may move axes and does not say so.
    """

    name: str
    dims: tuple[int, ...] | None = None
    channels_first: bool = False
    batch: int | None = None
    turns: bool = False


_WINDOWS = ("Conv", "BatchNorm2d", "BatchNorm3d", "Upsampl", "UpSampl")
_RESHAPES = ("Flatten", "Unflatten", "Reshape")


class Ends(NamedTuple):
    """The input of a chain.

    Attributes:
        time_first: whether the time comes before the batch.
        channels_first: whether channels come right after the batch.
        told: whether a layer tells where the batch is.
    """

    time_first: bool
    channels_first: bool
    told: bool
    has_channels: bool = False  # whether a layer tells where channels are


def ends(framework: Framework, layers: Iterable[Kind], inside: bool) -> Ends:
    """How the input of a chain lies.

    Args:
        framework: that of the layers.
        layers: in order.
        inside: whether layers over windows have channels first.
    """
    order: tuple[int, ...] = ()  # the axis of the input that each axis is, once some are moved
    batch: int | None = None
    channels: int | None = None
    for layer in layers:
        if layer.dims is not None:
            known = order if len(order) == len(layer.dims) else tuple(range(len(layer.dims)))
            order = tuple(known[d] for d in layer.dims)
            continue
        if layer.turns and batch is None:
            batch = -1  # what lies behind tells nothing of the input
        kind = layer.name.removeprefix("Parametrized")
        windows = kind.startswith(_WINDOWS) or "Pool" in kind
        says = layer.batch
        if says is None and (windows or _starts_with_batch(framework, kind)):
            says = 0
        if batch is None and says is not None:
            batch = _of(order, says)
        both = (*table.rows_of("torch", kind), *table.rows_of("keras", kind))
        if channels is None and layer.channels_first:
            channels = _of(order, 1)
        elif channels is None and (windows or any(row.channel for row in both)):
            channels = _of(order, 1 if inside else -1)
        if kind in _RESHAPES:
            break
    time_first = batch == 1
    return Ends(time_first, channels == (0 if time_first else 1), batch in (0, 1),
                channels is not None)  # fmt: skip


def _starts_with_batch(framework: Framework, kind: str) -> bool:
    return any(row.spec(framework)[0][:1] == ["n"] for row in table.rows_of(framework, kind))


def _of(order: tuple[int, ...], axis: int) -> int:
    return order[axis] if -len(order) <= axis < len(order) else axis
