"""Where a model has the batch and the channels in its input and outputs, as its layers tell."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

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


# What keeps all axes by its row, but of what it is not known which axis is which.
_UNKNOWN = ("RNN", "Bidirectional", "MultiheadAttention", "MultiHeadAttention", "TimeDistributed",
            "Reduce", "ops.Reduce", "Dot", "Masked")  # fmt: skip
_LAST = ("Linear", "Dense", "Embed", "Embedding", "Lookup", "Attend", "Gemm", "MatMul",
         "EinsumDense")  # fmt: skip
# Of ONNX and of Keras, which no row has.
_ALIKE = frozenset(
    {"Activation", "Relu", "Elu", "Selu", "Celu", "Gelu", "Erf", "Clip", "HardSigmoid",
     "ThresholdedRelu", "LeakyRelu", "Sub", "Mul", "Div", "Max", "Min", "Sum", "Mean", "Concat",
     "Cast", "Pow", "Sqrt", "Exp", "Log", "Abs", "Neg", "LayerNormalization", "Masking"}
)  # fmt: skip


def channel_of(
    framework: Framework,
    inside: bool,
    start: Any,
    made: Callable[[Any], tuple[Kind | None, Sequence[Any]] | None],
) -> int | None:
    """The axis of an output that holds its channels, -1 for the last; None if no layer tells.

    Args:
        framework: that of the layers.
        inside: whether layers over windows have channels first.
        start: the output.
        made: for a value, what the layer tells that gives it, and what that takes; None of an input
            or an array. A kind of None tells nothing, and what stands before does not count.
    """
    known: dict[Any, int | None] = {}

    def at(value: Any) -> int | None:
        found = made(value)
        told, takes = (None, ()) if found is None else found
        if told is None:
            return None
        name, dims, first, *_ = told
        kind = name.removeprefix("Parametrized")
        rows = table.rows_of(framework, kind)
        norm = "BatchNorm" in kind
        if dims is not None:
            before = of(takes[0])
            axis = None if before is None else dims.index(before % len(dims))
            return -1 if axis == len(dims) - 1 else axis
        if first:
            return 1
        if kind.startswith(_LAST) and "Bag" not in kind:
            return -1
        windows = ("Conv" in kind and "LSTM" not in kind) or "Pool" in kind or "Upsampl" in kind
        if (
            windows
            or (norm and framework == "torch")
            or (not norm and any(r.channel for r in rows))
        ):
            return 1 if inside else -1
        keeps = any(r.kind in ("", "merge", "join") and not any(r.spec(framework)) for r in rows)
        if kind in _UNKNOWN or not (keeps or norm or kind in _ALIKE):
            return None
        axes = {axis for axis in map(of, takes) if axis is not None}
        return axes.pop() if len(axes) == 1 else None

    def of(value: Any) -> int | None:
        if value not in known:
            known[value] = at(value)
        return known[value]

    return of(start)


def channel_of_chain(framework: Framework, inside: bool, layers: Iterable[Kind]) -> int | None:
    """The same for layers one after the other."""
    told = [*layers]
    return channel_of(framework, inside, len(told),
                      lambda i: (told[i - 1], (i - 1,)) if i else None)  # fmt: skip


def _starts_with_batch(framework: Framework, kind: str) -> bool:
    return any(row.spec(framework)[0][:1] == ["n"] for row in table.rows_of(framework, kind))


def _of(order: tuple[int, ...], axis: int) -> int:
    return order[axis] if -len(order) <= axis < len(order) else axis
