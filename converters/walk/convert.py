"""Any framework -> Flax -> any framework: what is checked before the walk."""

import dataclasses
from typing import Any, Literal

from fwt._types import ConversionError
from fwt.converters.rows import table
from fwt.converters.rows.row import Framework, refuse
from fwt.converters.walk import policy
from fwt.converters.walk.net import Net
from fwt.converters.walk.opened import opened
from fwt.converters.walk.shapes import CONVENTION, Restart
from fwt.converters.walk.walk import Walk

Layout = Literal["channels_last", "channels_first", "source"]
LAYOUTS = ("channels_last", "channels_first", "source")


def convert(
    net: Net,
    source: Framework,
    target: Framework,
    layout: str,
    arrays_only: bool = False,
    dry: bool = False,
) -> Net:
    """The net of ``source`` as one of ``target``; it tells the shapes of its inputs, if known.

    ``arrays_only``: only the arrays, their names and their order are asked for, so that a layer
    that has none is left out where the target can't say it. ``dry``: only the ``orders`` are.
    """
    if layout not in LAYOUTS:
        raise ConversionError(f"layout must be one of {', '.join(LAYOUTS)}, found {layout!r}")
    if layout == CONVENTION[source] and not any(
        x.settings.get("data_format") == "channels_first" for x in net.layers
    ):
        layout = "source"  # the ends are as they should be already
    shapes = [_shape(shape) for shape in net.inputs.values()]
    net = dataclasses.replace(net, inputs=dict(zip(net.inputs, shapes, strict=True)))
    if source == "keras":
        way = ("where no input is padded, build the model without the mask (mask_zero=False, no "
               "Masking); converters.transform(model, t) changes its weights as it is")  # fmt: skip
        _check_masks(net, _USE_MASKS, way)
    net = dataclasses.replace(net, layers=policy.settled(net, source, target))
    if source == "flax":
        net = opened(net, target)
    known: dict[str, dict[Any, int]] = {"channel": {}, "batch": {}, "plain": {}}
    known["rank"] = {i: len(shape) + 1 for i, shape in enumerate(shapes) if shape is not None}
    # Each restart settles something of an input or of a layer that several call.
    for _ in range(1 + 3 * len(shapes) + len(net.layers)):
        try:
            walk = Walk(net, source, target, layout, **known)
            walk.arrays_only, walk.dry = arrays_only, dry
            new = walk.run()
        except Restart as restart:
            known[restart.what] |= restart.learned
            continue
        if target == "keras" and not arrays_only:
            _check_masks(new, (*_USE_MASKS, *MASKED))
        return new
    raise AssertionError("the walk did not settle")


def _shape(given: Any) -> tuple[int | None, ...] | None:
    """The shape of an input, checked."""
    if given is None:
        return None
    if not isinstance(given, list | tuple):
        raise ConversionError(
            f"input_shape is a tuple without the batch axis, such as (3, 32, 48), found {given!r}"
        )
    if any(s is not None and (not isinstance(s, int) or isinstance(s, bool) or s < 1)
           for s in given):  # fmt: skip
        shape = tuple(given)
        raise ConversionError(f"input_shape={shape}: expected sizes of at least 1, or None")
    return tuple(given)


# The layers of Keras that do something else with a mask than to send it on.
_USE_MASKS = ("Softmax", "GlobalAveragePooling1D", "Bidirectional", "LSTM", "GRU", "SimpleRNN",
              "RNN", "ConvLSTM", "TimeDistributed", "Attention", "MultiHeadAttention")  # fmt: skip
# So do these of its layers, and not its operations, which have the same names here.
MASKED = ("Multiply", "Maximum", "Minimum")
# Some of those that send none on.
_END_MASKS = ("Flatten", "Conv1D", "Conv2D", "Conv3D", "MaxPooling", "AveragePooling")


def _check_masks(net: Net, uses: tuple[str, ...], way_out: str = "") -> None:
    """Raises where a mask that Keras sends along would change what a later layer does."""
    masked: dict[str, str] = {}  # by name of what gives the tensor, what its mask is
    for layer in net.layers:
        if layer.maskless:
            continue
        makes, takes = table.masks_of(layer)
        found = next((masked[name] for name in layer.inputs if name in masked), None)
        if found is None and layer.given_mask:
            found = f"the mask that it is called with ({layer.given_mask}=)"
        takes = takes or layer.masked or any(x in layer.kind for x in uses)
        if found is not None and takes and not layer.kind.startswith("ops."):
            raise refuse(
                str(layer),
                f"in Keras it would use {found}, which no other framework sends along",
                way_out,
            )
        if any(x in layer.kind for x in _END_MASKS):
            found = None
        if makes or layer.kind == "Masking" or layer.settings.get("mask_zero"):
            found = f"the mask of {layer}"
        if found is not None:
            masked[layer.name] = found
