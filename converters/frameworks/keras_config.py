"""Keras models as data: their configs, and the places of their arrays in files."""

import dataclasses
import itertools
import re
from collections.abc import Mapping
from typing import Any

from fwt._types import ConversionError, FileFormatError, Model
from fwt.converters.frameworks import flax as _flax
from fwt.converters.frameworks import sidecar
from fwt.converters.rows import table
from fwt.converters.rows.row import Layer, S, joined, listed, parts_of, refuse
from fwt.converters.walk import convert, policy
from fwt.layers.recurrent import HARD_SIGMOID

KERAS_VERSION = "3.15.1"  # whose file layout this is


def keras_layers(
    config: Any, place: str, inside: tuple[str, ...] = ()
) -> tuple[list[Layer], tuple[int | None, ...] | None]:
    """The layers of a Keras Sequential's config, and its input shape without the batch axis.

    So too for a Functional model that is one straight line. An ``activation=`` becomes a layer of
    its own, named ``<layer>__activation``; the layers of a model inside keep its name before
    theirs.
    """
    kind = config.get("class_name") if isinstance(config, dict) else type(config).__name__
    if kind not in CONTAINERS:
        what = "a config that names no class" if kind is None else repr(kind)
        raise ConversionError(f"{place}: expected a keras Sequential, found {what}")
    body = config.get("config")
    _check_own(config, place, str(body.get("name")) if isinstance(body, dict) else "the model")
    entries = body.get("layers") if isinstance(body, dict) else None
    if not isinstance(body, dict) or not isinstance(entries, list):
        raise FileFormatError(f"{place}: the config has no list of layers")
    if kind != "Sequential":
        entries = _line(body, entries, place)
    shape = body.get("build_input_shape")
    given: Any = None  # the dtype of the input
    layers: list[Layer] = []
    for entry in entries:
        kind, settings = _keras_entry(entry, place)
        if kind == "InputLayer":
            given = settings.get("dtype")
            shape = settings.get("batch_shape") or settings.get("batch_input_shape") or shape
            if settings.get("sparse") or settings.get("ragged"):
                raise ConversionError(f"{place}: a sparse or ragged input can't be converted")
            continue
        name = settings.get("name")
        if not isinstance(name, str):
            raise FileFormatError(f"{place}: a layer {kind!r} has no name")
        parts = (*inside, name)
        if kind in CONTAINERS:
            held = keras_layers(entry, place, parts)[0]
            layers += [dataclasses.replace(x, holders=(kind, *x.holders)) for x in held]
            continue
        layers += _layer_and_activation(joined(parts), kind, settings, place)
    if shape is not None and not isinstance(shape, list | tuple):
        raise FileFormatError(f"{place}: the input shape is {shape!r}")
    if layers and given in ("float16", "bfloat16"):
        layers = _cast_first(layers, given, inside)
    return layers, None if shape is None else tuple(shape[1:])


CONTAINERS = ("Sequential", "Functional")


def _cast_first(layers: list[Layer], dtype: str, inside: tuple[str, ...]) -> list[Layer]:
    """The layers of a model whose input is cast to half precision, which its first layer may
    not."""
    first, exact = layers[0], {"float16": 2048, "bfloat16": 256}[dtype]
    if first.kind == "Embedding":
        count = first.settings.get("input_dim")
        if isinstance(count, int) and count <= exact + 1:
            return layers
        raise refuse(str(first), f"its input has dtype {dtype}, which rounds whole numbers above "
                     f"{exact}", "give the model keras.Input(shape, dtype='int32')")  # fmt: skip
    if first.dtype == dtype:
        return layers
    own = parts_of(layers[0].name)[len(inside)]
    name = joined((*inside, f"{own}__cast"))
    return [Layer(name, "Identity", {}, fused=True, dtype=dtype), *layers]


def _layer_and_activation(
    name: str, kind: str, settings: dict[str, Any], place: str
) -> list[Layer]:
    place_of = f"{name} ({kind})"
    dtype = _computes_in(settings.pop("dtype", None), place_of)
    activation = None
    if any(r.fused_activation for r in table.rows_of("keras", kind)):
        activation = settings.pop("activation", "linear")
    elif kind == "Activation":
        settings["activation"] = _function_name(settings.get("activation"))
        if settings["activation"] == HARD_SIGMOID:
            return [dataclasses.replace(x, dtype=dtype) for x in _hard_sigmoid(name)]
    inner: list[Layer] = []
    after: list[Layer] = []
    for role in ("layer", "backward_layer", "cell"):
        if isinstance(settings.get(role), dict):
            wrapped, its = _keras_entry(settings.pop(role), place)
            own = its.get("name", role)
            parsed = _layer_and_activation(own, wrapped, its, place)
            inner.append(dataclasses.replace(parsed[0], dtype=None))  # the wrapper tells it
            if parsed[0].dtype != dtype:
                raise refuse(place_of, f"it computes in {dtype}, and {own} in it in "
                             f"{parsed[0].dtype}", "give both the same dtype=")  # fmt: skip
            # What wraps a layer with an activation does so in two steps.
            after += [
                dataclasses.replace(x, name=name + x.name.removeprefix(own)) for x in parsed[1:]
            ]
    layers = [Layer(name, kind, settings, inner=tuple(inner))]
    if activation is not None:
        layers += _fused(f"{name}__activation", activation, place)
    return [dataclasses.replace(x, dtype=x.dtype or dtype) for x in (*layers, *after)]


def _line(body: Mapping[str, Any], entries: list[Any], place: str) -> list[Any]:
    """The layers of a Functional model in order, if each takes what one other gives."""

    def names(key: str) -> list[str]:
        ends = body.get(key)
        if isinstance(ends, Mapping):
            what = key.partition("_")[0]
            raise ConversionError(
                f"{place}: its {what}s are a dict with {', '.join(map(repr, ends))}: a Sequential "
                f"takes and gives one array, so build the model with a single {what}; to change "
                "its weights in place, use converters.transform(model, t)"
            )
        flat = [ends] if ends and not isinstance(ends[0], list) else ends or []
        return [end[0] for end in flat]

    starts, ends = names("input_layers"), names("output_layers")
    if len(starts) != 1 or len(ends) != 1:
        raise ConversionError(
            f"{place}: a model of {len(starts)} inputs and {len(ends)} outputs is no sequence of "
            "layers; to change its weights in place, use converters.transform(model, t)"
        )
    by_name = {e["name"]: e for e in entries if isinstance(e, dict) and "name" in e}
    after: dict[str, str] = {}
    for name, entry in by_name.items():
        nodes = entry.get("inbound_nodes") or []
        sources = _tensors(nodes)
        _check_call(nodes, f"{place}: {name}")
        if len(nodes) == 1 and entry.get("class_name") == "MultiHeadAttention":
            sources = list(dict.fromkeys(sources))  # of one tensor with itself
        if name == starts[0] and not sources:
            continue
        if len(sources) != 1 or sources[0] in after:
            raise ConversionError(
                f"{place}: {name} takes {len(sources)} inputs, or one that another layer takes "
                "too: only one straight line of layers is a Sequential; to change its weights in "
                "place, use converters.transform(model, t)"
            )
        after[sources[0]] = name
    out, name = [by_name[starts[0]]], starts[0]
    while name != ends[0]:
        if name not in after or len(out) > len(entries):
            raise ConversionError(f"{place}: no line of layers leads to {ends[0]}")
        name = after[name]
        out.append(by_name[name])
    return out


def _check_call(nodes: Any, place: str) -> None:
    """Raises for what a layer is called with beside tensors, and for a second output."""
    for node in nodes if isinstance(nodes, list) else []:
        if not isinstance(node, Mapping):
            raise FileFormatError(f"{place}: a node is {node!r:.80}")
        given = {**dict(enumerate(node.get("args") or [])), **(node.get("kwargs") or {})}
        for name, value in given.items():
            if value is not None and value is not False and not _tensors(value):
                raise refuse(place, f"it is called with {name}={value!r}: only tensors convert")
            histories = [h for h in _histories(value) if h[2:] != [0]]
            if histories:
                raise refuse(place, f"it takes output {histories[0][2:]} of {histories[0][0]}")


def _histories(node: Any) -> list[list[Any]]:
    if isinstance(node, Mapping):
        if node.get("class_name") == "__keras_tensor__":
            return [list(node["config"]["keras_history"])]
        return [h for value in node.values() for h in _histories(value)]
    return [h for v in node for h in _histories(v)] if isinstance(node, list | tuple) else []


def _tensors(node: Any) -> list[str]:
    """The names of the layers whose outputs stand in a node of a config."""
    return [history[0] for history in _histories(node)]


def _keras_entry(entry: Any, place: str) -> tuple[str, dict[str, Any]]:
    if not isinstance(entry, dict) or not isinstance(entry.get("config"), dict):
        raise FileFormatError(f"{place}: expected a layer, found {entry!r:.80}")
    kind = entry.get("class_name")
    if not isinstance(kind, str):
        raise FileFormatError(f"{place}: a layer's class is {kind!r}")
    if kind in table.CUSTOM["keras"]:
        return kind, dict(entry["config"])
    _check_own(entry, place, str(entry["config"].get("name")))
    return kind, dict(entry["config"])


def _check_own(entry: Any, place: str, name: str) -> None:
    """Raises for a class that is not Keras's own. One that was defined in a script or a notebook
    has no module, but the name under which it would be registered."""
    kind, module = entry.get("class_name"), entry.get("module")
    registered = entry.get("registered_name")
    parts = ["keras"] if module is None else str(module).split(".")
    nowhere = "module" in entry and module is None and registered is not None
    if nowhere or registered not in (None, kind) or parts[0] != "keras" or "ops" in parts:
        raise ConversionError(
            f"{place}: {name} is a custom layer ({f'{module}.' if module else ''}{kind}), which "
            "can't be converted from a file: if it is one of your own, load the model in Keras "
            "and give that, with converters.transform or converters.register"
        )


def _computes_in(given: Any, place: str) -> str:
    """The dtype that a layer of this policy computes in; its arrays tell the one that they have."""
    name = given
    if isinstance(given, dict):
        inner = given.get("config")
        name = inner.get("name") if isinstance(inner, dict) else given.get("class_name")
    if name not in (None, *policy.POLICIES):
        raise refuse(
            place,
            f"dtype policy {name!r}: only {', '.join(policy.POLICIES)} are converted",
            "rebuild it in one of them",
        )
    return "float32" if name is None else str(name).removeprefix("mixed_")


def _function_name(activation: Any) -> Any:
    """The name of a function of Keras's own; one that is registered elsewhere stays a dict."""
    if isinstance(activation, dict) and activation.get("class_name") == "function":
        own = activation.get("registered_name") in (None, "function")
        return activation.get("config") if own else activation
    return activation


def _fused(name: str, activation: Any, place: str) -> list[Layer]:
    activation = _function_name(activation)
    if activation in (None, "linear"):
        return []
    if activation == HARD_SIGMOID:
        return _hard_sigmoid(name)
    if isinstance(activation, dict):  # a layer object as activation
        if not isinstance(activation.get("config"), dict) or "class_name" not in activation:
            raise refuse(name, "activation is a function of the user's own")
        kind, settings = _keras_entry(activation, place)
        dtype = _computes_in(settings.pop("dtype", None), f"{name} ({kind})")
        return [Layer(name, kind, settings, fused=True, dtype=dtype)]
    return [Layer(name, "Activation", {"activation": activation}, fused=True)]


def _hard_sigmoid(name: str) -> list[Layer]:
    """Keras 2's hard_sigmoid, 0.2 x + 0.5 between 0 and 1, in layers that each framework has; the
    factors of 2 round nothing."""
    return [
        Layer(name, "Rescaling", {"scale": 0.4}, fused=True),
        Layer(f"{name}__clipped", "Activation", {"activation": "hard_tanh"}, fused=True),
        Layer(f"{name}__shifted", "Rescaling", {"scale": 0.5, "offset": 0.5}, fused=True),
    ]


def keras_config(layers: list[Layer], shape: Any, name: str = "sequential") -> dict[str, Any]:
    """The config of a Keras Sequential of these layers, activations folded into theirs."""
    dtype = "int32" if layers and layers[0].kind == "Embedding" else "float32"
    if layers and layers[0].settings.get("dtype") == "float64":
        dtype = "float64"  # which the input would else lose
    first = {
        "module": "keras.layers",
        "class_name": "InputLayer",
        "config": {"batch_shape": [None, *shape], "dtype": dtype, "name": "input_layer"},
        "registered_name": None,
    }
    entries = [first, *_entries([(parts_of(layer.name), layer) for layer in layers])]
    return {
        "module": "keras",
        "class_name": "Sequential",
        "config": {
            "name": name,
            "trainable": True,
            "dtype": "float32",
            "layers": entries,
            "build_input_shape": [None, *shape],
        },
        "registered_name": None,
        "build_config": {"input_shape": [None, *shape]},
    }


def _entries(layers: list[tuple[list[str], Layer]]) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    for first, together in itertools.groupby(layers, key=lambda e: e[0][0]):
        group = list(together)
        if "/" in first or not first:
            raise ConversionError(f"{first!r} can't be the name of a Keras layer")
        if len(group[0][0]) > 1:
            inside = _entries([(parts[1:], layer) for parts, layer in group])
            config = {"name": first, "trainable": True, "dtype": "float32", "layers": inside}
            out.append({"module": "keras", "class_name": "Sequential", "config": config,
                        "registered_name": None})  # fmt: skip
            continue
        out += [_entry(first, layer) for _, layer in group]
    return out


def _entry(name: str, layer: Layer) -> dict[str, Any]:
    config = {"name": name, "dtype": "float32", **listed(layer.settings)}
    for role, inner in zip(("layer", "backward_layer"), layer.inner, strict=False):
        config[role] = _entry(inner.name, inner)
    custom = table.CUSTOM["keras"].get(layer.kind)
    return {
        "module": custom.__module__ if custom else "keras.layers",
        "class_name": layer.kind,
        "config": config,
        "registered_name": layer.kind if custom else None,
    }


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


def to_keras_layers(
    module: Any, variables: Any, input_shape: Any, any_dtype: bool = False, state: bool = False
) -> tuple[list[Layer], tuple[int | None, ...]]:
    """Keras layers of a Flax model, and the input shape that Keras wants to know."""
    module = _flax.sequential_of(module)
    layers = _flax.read_flax(module, variables)
    if not any_dtype:
        policy.check_said(layers)
    shape = module.input_shape if input_shape is None else tuple(input_shape)
    new, found = convert.convert(layers, "flax", "keras", shape, "source")
    if found is None:
        dense = next((x for x in layers if x.kind == "Dense" and "kernel" in x.arrays), None)
        before = layers[: layers.index(dense)] if dense else []
        if dense is None or any(table.rows_of("flax", x.kind)[0].kind for x in before):
            raise ConversionError(
                "the shape of the input does not follow from the layers: give input_shape= "
                "(without the batch axis)"
            )
        shape = (dense.arrays["kernel"].shape[0],)
        new, found = convert.convert(layers, "flax", "keras", shape, "source")
    assert found is not None
    if not any_dtype:
        policy.to_keras(new)
    return sidecar.restored(fold_activations(new), module, "keras", state), found


def marked(model: Model, layers: list[Layer]) -> Model:
    """A model that was converted from Keras layers, which says so if their own files of weights
    have other rows than those that ``to_keras`` gives."""
    every = [part for layer in layers for part in (layer, *layer.inner)]
    first = any(part.settings.get("data_format") == "channels_first" for part in every)
    if not first or not any(part.kind == "Flatten" for part in every):
        return model
    return Model(model.module.clone(turned=True), model.variables)


def with_sidecar(
    model: Model,
    layers: list[Layer],
    shape: Any,
    layout: Any,
    whole: Mapping[str, Any] | None = None,
) -> Model:
    """A model that was converted from Keras layers, with a sidecar of what they lose."""

    def forth(layers: list[Layer]) -> Model:
        return _flax.write_flax(*convert.convert(layers, "keras", "flax", shape, layout))

    return sidecar.with_sidecar(
        model, layers, "keras", lambda m: to_keras_layers(*m, None)[0], forth, whole
    )


def groups(layers: list[Layer]) -> list[str]:
    """The group of each layer in the weights file: its class in snake case, and a counter, under
    ``layers`` of the model that it is in."""

    def under(entries: list[tuple[list[str], Layer]], where: str, depth: int = 0) -> list[str]:
        seen: dict[str, int] = {}
        out: list[str] = []

        def group(kind: str) -> str:
            name = re.sub(r"\W+", "", kind)
            name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", name)
            name = re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()
            count = seen.get(name, 0)
            seen[name] = count + 1
            return f"{where}layers/{name}_{count}" if count else f"{where}layers/{name}"

        for _, together in itertools.groupby(entries, key=lambda e: e[0][0]):
            inside = list(together)
            if len(inside[0][0]) > 1:
                holders = inside[0][1].holders
                place = group(holders[depth] if holders else "Sequential")
                within = [(parts[1:], layer) for parts, layer in inside]
                out += under(within, f"{place}/", depth + 1)
            else:
                out += [group(layer.kind) for _, layer in inside]
        return out

    return under([(parts_of(layer.name), layer) for layer in layers], "")


def places(layer: Layer, group: str) -> list[tuple[Layer, str]]:
    """A layer and what it wraps, with the groups that hold their arrays."""
    roles = {"Bidirectional": ("forward_layer", "backward_layer")}.get(layer.kind, ("layer",))
    if layer.kind == "MultiHeadAttention":
        named = zip(layer.inner, ATTENTION, strict=True)
        return [(part, f"{group}/{role}") for part, role in named]
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
# Layers whose arrays are those of a cell inside them.
CELLS = ("SimpleRNN", "LSTM", "GRU", "ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D")


def keras_names(layer: Layer) -> list[str]:
    """The names of a Keras layer's arrays, in the order of the file."""
    if layer.kind == "Normalization":
        given = layer.settings.get("mean") is not None
        return [] if given else ["mean", "variance", "count"]
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
    own = [x for x in layers if not x.fused]
    for layer in own:
        if layer.kind != "Activation" and not table.rows_of("keras", layer.kind):
            raise table.unknown("keras", layer)
        if layer.kind == "MultiHeadAttention":
            parts = {"bias_axes": layer.settings.get("use_bias")}
            layer.inner = tuple(Layer(n, "EinsumDense", parts) for n in ATTENTION.values())
    return own


def gathered(layers: list[Layer]) -> None:
    """What was read into the parts of attention, in the layer itself."""
    for layer in layers:
        if layer.kind == "MultiHeadAttention":
            for part in layer.inner:
                layer.arrays |= {f"{part.name}/{n}": v for n, v in part.arrays.items()}
            layer.inner = ()
