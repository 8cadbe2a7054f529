"""Any framework -> Flax -> any framework: what is checked before the walk."""

from collections.abc import Sequence
from typing import Literal

from fwt._types import ConversionError
from fwt.converters.rows.row import Framework, Layer, refuse
from fwt.converters.walk import policy
from fwt.converters.walk.walk import CONVENTION, Restart, Walk

Layout = Literal["channels_last", "channels_first", "source"]
LAYOUTS = ("channels_last", "channels_first", "source")


def convert(
    layers: Sequence[Layer],
    source: Framework,
    target: Framework,
    input_shape: Sequence[int | None] | None,
    layout: str,
) -> tuple[list[Layer], tuple[int | None, ...] | None]:
    """The layers of ``source`` as layers of ``target``, and the shape of its input."""
    if layout not in LAYOUTS:
        raise ConversionError(f"layout must be one of {', '.join(LAYOUTS)}, found {layout!r}")
    if layout == CONVENTION[source] and not any(
        x.settings.get("data_format") == "channels_first" for x in layers
    ):
        layout = "source"  # the ends are as they should be already
    if input_shape is not None and not isinstance(input_shape, list | tuple):
        raise ConversionError(
            f"input_shape is a tuple without the batch axis, such as (3, 32, 48), "
            f"found {input_shape!r}"
        )
    shape = None if input_shape is None else tuple(input_shape)
    if shape is not None and any(
        s is not None and (not isinstance(s, int) or isinstance(s, bool) or s < 1) for s in shape
    ):
        raise ConversionError(f"input_shape={shape}: expected sizes of at least 1, or None")
    if source == "keras":
        _check_masks(layers)
    layers = policy.settled(layers, source, target)
    known: dict[str, int | None] = {"rank": None if shape is None else len(shape) + 1}
    # Each restart fixes the rank, the channel or the batch axis, so four rounds settle all.
    for _ in range(4):
        try:
            new, found = Walk(source, target, shape, layout, **known).run(layers)
        except Restart as restart:
            known |= {k: v for k, v in restart.learned.items() if v is not None}
            continue
        if target == "keras":
            _check_masks(new)
        return new, found
    raise AssertionError("the walk did not settle")


# The layers of Keras that do something else with a mask than to send it on.
_USE_MASKS = ("Softmax", "GlobalAveragePooling1D", "Bidirectional", "LSTM", "GRU", "SimpleRNN",
              "RNN", "ConvLSTM", "TimeDistributed", "Attention", "MultiHeadAttention")  # fmt: skip
# Some of those that send none on.
_END_MASKS = ("Flatten", "Conv1D", "Conv2D", "Conv3D", "MaxPooling", "AveragePooling")


def _check_masks(layers: Sequence[Layer]) -> None:
    """Raises where a mask that Keras sends along would change what a later layer does."""
    masked: Layer | None = None
    for layer in layers:
        if masked is not None and any(x in layer.kind for x in _USE_MASKS):
            raise refuse(
                str(layer),
                f"in Keras it would use the mask of {masked}, which no other framework sends along",
            )
        if any(x in layer.kind for x in _END_MASKS):
            masked = None
        if layer.kind == "Masking" or layer.settings.get("mask_zero"):
            masked = layer
