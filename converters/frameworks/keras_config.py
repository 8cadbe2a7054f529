"""Keras models as data: Flax models as their nets, and the places of their arrays in files."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from fwt._types import ConversionError, Model
from fwt.converters.frameworks import flax as _flax
from fwt.converters.frameworks import (
    keras_constants,
    keras_read,
    keras_tables,
    keras_write,
    sidecar,
)
from fwt.converters.rows import table
from fwt.converters.rows.row import Layer, S
from fwt.converters.walk import convert, policy
from fwt.converters.walk.net import Net, folded

KERAS_VERSION = "3.15.1"  # whose file layout this is


def _separable(first: Layer, second: Layer) -> Layer | None:
    """``x__depthwise`` and ``x`` as one SeparableConv, if they are its two parts."""
    count = second.kind.removeprefix("Conv").removesuffix("D")
    if first.name != f"{second.name}__depthwise" or first.kind != f"DepthwiseConv{count}D":
        return None
    if first.dtype != second.dtype:
        return None
    told = second.settings
    one = (1,) * int(count)
    plain = told["kernel_size"] == one and told["strides"] == one and told["groups"] == 1
    more = first.settings["use_bias"] or "activation" in first.settings
    if not plain or more or told["padding"] == "causal":
        return None
    shared = ("strides", "padding", "dilation_rate", "kernel_size", "depth_multiplier")
    left = {k: v for k, v in told.items() if k not in ("groups", "kernel_size")}
    settings = {**left, **{k: first.settings[k] for k in shared}}
    arrays = {
        "depthwise_kernel": first.arrays["kernel"],
        "pointwise_kernel": second.arrays["kernel"],
    }
    if "bias" in second.arrays:
        arrays["bias"] = second.arrays["bias"]
    return dataclasses.replace(
        second, kind=f"SeparableConv{count}D", settings=settings, arrays=arrays
    )


def fold_activations(layers: list[Layer]) -> list[Layer]:
    """``x`` and ``x__activation`` as one Keras layer, and the parts of a SeparableConv."""
    out: list[Layer] = []
    for layer in layers:
        last = out[-1] if out else None
        if last is not None and layer.kind in ("Conv1D", "Conv2D"):
            separable = _separable(last, layer)
            if separable is not None:
                out[-1] = separable
                continue
        if (
            last is not None
            and layer.kind == "Activation"
            and layer.name == f"{last.name}__activation"
            and layer.dtype == last.dtype
            and any(r.fused_activation for r in table.rows_of("keras", last.kind))
            and "activation" not in last.settings
        ):
            out[-1] = dataclasses.replace(last, settings={**last.settings, **layer.settings})
            continue
        out.append(layer)
    return out


def to_keras_net(
    module: Any,
    variables: Any,
    input_shape: Any,
    any_dtype: bool = False,
    state: bool = False,
    arrays_only: bool = False,
) -> Net:
    """A Flax model as a net of Keras, whose names are paths in its config."""
    given = _flax.read_flax(_flax.sequential_of(module), variables).given(input_shape)
    if not any_dtype:
        policy.check_said(given.layers)
    new = convert.convert(given, "flax", "keras", "source", arrays_only)
    if arrays_only:  # places in files don't depend on it
        new = dataclasses.replace(new, inputs={n: s or () for n, s in new.inputs.items()})
    elif None in new.inputs.values():
        given = given.given(_shape_told(given))
        new = convert.convert(given, "flax", "keras", "source")
    if not any_dtype:
        policy.to_keras(new)
    new = keras_constants.with_parameters(
        keras_tables.with_tables(_attention(folded(new, fold_activations)))
    )
    new = keras_write.placed(new)
    new = sidecar.restored(new, _flax.sequential_of(module), "keras", state)
    places = keras_read.groups(keras_write.keras_config(new))
    for layer in new.layers:
        layer.group = places.get(layer.name, "")
    return new


def _shape_told(net: Net) -> Any:
    """The shape of the one input that follows from the arrays of a Dense."""
    layers = net.layers
    dense = next((x for x in layers if x.kind == "Dense" and "kernel" in x.arrays), None)
    before = layers[: layers.index(dense)] if dense else []
    kinds = [row.kind for x in before for row in table.rows_of("flax", x.kind)[:1]]
    if dense is None or any(kinds) or not net.is_line:
        raise ConversionError(
            "the shape of the input does not follow from the layers: give input_shape= "
            "(without the batch axis)"
        )
    return (dense.arrays["kernel"].shape[0],)


def _attention(net: Net) -> Net:
    """Attention of several heads as Keras's own, which it calls so or so."""
    layers = []
    for layer in net.layers:
        if layer.kind in ("SelfAttention", "CausalSelfAttention"):
            causal = {"use_causal_mask": True} if layer.kind == "CausalSelfAttention" else {}
            layer = dataclasses.replace(
                layer, kind="MultiHeadAttention", settings={**layer.settings, **causal}
            )
        layers.append(layer)
    return dataclasses.replace(net, layers=layers)


def marked(model: Model, net: Net) -> Model:
    """A model that was converted from Keras layers, which says so if their own files of weights
    have other rows than those that ``to_keras`` gives."""
    every = [part for layer in net.layers for part in (layer, *layer.inner)]
    first = any(part.settings.get("data_format") == "channels_first" for part in every)
    if not first or not any(part.kind == "Flatten" for part in every):
        return model
    return Model(model.module.clone(turned=True), model.variables)


def with_sidecar(
    model: Model, net: Net, layout: Any, whole: Mapping[str, Any] | None = None
) -> Model:
    """A model that was converted from a net of Keras, with a sidecar of what it loses."""

    def forth(net: Net) -> Model:
        return _flax.write_flax(convert.convert(net, "keras", "flax", layout))

    return sidecar.with_sidecar(
        model, net.layers, "keras", lambda m: to_keras_net(*m, None), forth, whole
    )


def places(layer: Layer, group: str) -> list[tuple[Layer, str]]:
    """A layer and what it wraps, with the groups that hold their arrays."""
    roles = {"Bidirectional": ("forward_layer", "backward_layer")}.get(layer.kind, ("layer",))
    if layer.kind in HEADS:
        named = zip(layer.inner, ATTENTION, strict=True)
        return [(part, f"{group}/{HEADS[layer.kind]}{role}") for part, role in named]
    if layer.kind == "RNN":
        return [(layer.inner[0], f"{group}/cell")]
    if layer.kind in CELLS:
        return [(layer, f"{group}/cell")]
    inner = [p for part, role in zip(layer.inner, roles, strict=False)
             for p in places(part, f"{group}/{role}")]  # fmt: skip
    return inner if layer.inner else [(layer, group)]


# The parts of MultiHeadAttention in a file, and in its variables.
ATTENTION = {
    "query_dense": "query", "key_dense": "key", "value_dense": "value",
    "output_dense": "attention_output",
}  # fmt: skip
HEADS = {"MultiHeadAttention": "", "GroupQueryAttention": "_"}  # what stands before those names
# Layers whose arrays are those of a cell inside them.
CELLS = ("SimpleRNN", "LSTM", "GRU", "ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D")


def keras_names(layer: Layer) -> list[str]:
    """The names of a Keras layer's arrays, in the order of the file."""
    if layer.kind == "Normalization":
        given = layer.settings.get("mean") is not None
        return [] if given else ["mean", "variance", "count"]
    if layer.kind == "ReversibleEmbedding" and layer.settings.get("tie_weights", True):
        return ["embeddings"]
    if layer.settings.get("score_mode") == "concat":
        scale = ["scale"] if layer.settings.get("use_scale") else []
        return [*scale, "concat_score_weight"]
    rows = table.rows_of("keras", layer.kind.removesuffix("Cell"))
    names = []
    for p in rows[0].params if rows else ():
        if p.when is not None:
            of = {s.flax: s for s in rows[0].settings if isinstance(s, S)}.get(p.when)
            if of is None or of.keras == "":
                present = layer.settings.get(p.when)
            else:
                present = of.keras is None or layer.settings.get(of.keras, of.keras_default)
            if not present:
                continue
        names.append(p.of("keras")[0])
    return names


def opened_up(layers: list[Layer]) -> list[Layer]:
    """The layers that have a place in a file, those of attention with their parts."""
    own = [x for x in layers if x.group and not x.of]
    for layer in own:
        if layer.kind != "Activation" and not table.rows_of("keras", layer.kind):
            raise table.unknown("keras", layer)
        if layer.kind in HEADS:
            parts = {"bias_axes": layer.settings.get("use_bias")}
            layer.inner = tuple(
                Layer(n, "EinsumDense", parts, {k.removeprefix(f"{n}/"): v for k, v in
                                                layer.arrays.items() if k.startswith(f"{n}/")})
                for n in ATTENTION.values()
            )  # fmt: skip
    return own


def gathered(layers: list[Layer]) -> None:
    """What was read into the parts of attention, in the layer itself."""
    for layer in layers:
        if layer.kind in HEADS:
            for part in layer.inner:
                layer.arrays |= {f"{part.name}/{n}": v for n, v in part.arrays.items()}
            layer.inner = ()


def shared(net: Net) -> Net:
    """The net with the arrays of each layer in its further calls, and arrays between layers."""
    first = {x.name: x for x in net.layers}
    for layer in net.layers:
        if layer.of:
            layer.arrays, layer.inner = first[layer.of].arrays, first[layer.of].inner
    return keras_constants.without_lookups(keras_tables.without_tables(net))
