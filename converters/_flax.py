"""Flax, the hub: a Sequential as layers, and layers as a Model."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from fwt.converters import _layers
from fwt.converters._row import Layer, refuse, same

from fwt._sequential import Named, Sequential
from fwt._types import ConversionError, Model


def read_flax(module: Any, variables: Any) -> list[Layer]:
    """The layers of a Sequential with their arrays."""
    if not isinstance(module, Sequential):
        raise ConversionError(
            f"expected a fwt.Sequential, found {type(module).__name__}; rebuild it as "
            "fwt.Sequential([(name, layer), ...])"
        )
    if not isinstance(variables, Mapping) or "params" not in variables:
        variables = {"params": variables if isinstance(variables, Mapping) else {}}
    out = []
    names = {n.name for n in module.layers}
    for collection, tree in variables.items():
        if collection not in ("params", "batch_stats"):
            raise ConversionError(f"variables: the collection {collection!r} can't be converted")
        for name in tree:
            if name not in names:
                raise ConversionError(
                    f"variables: {collection}/{name} belongs to no layer of the module, which has "
                    f"{sorted(names)}"
                )
    for named in module.layers:
        arrays: dict[str, Any] = {}
        for tree in variables.values():
            for leaf, value in tree.get(named.name, {}).items():
                if isinstance(value, Mapping):
                    raise refuse(named.name, f"a nested layer {leaf!r} can't be converted")
                arrays[leaf] = np.asarray(value)
        cls = type(named.layer)
        kind = cls.__name__
        if any(r.flax is not cls for r in _layers.rows_of("flax", kind)):
            raise refuse(named.name, f"{cls.__module__}.{kind} is not the class that fwt knows")
        fields = {
            f.name: getattr(named.layer, f.name)
            for f in dataclasses.fields(named.layer)
            if f.init and f.name not in ("parent", "name")
        }
        defaults = {
            f.name: f.default
            for f in dataclasses.fields(named.layer)
            if f.default is not dataclasses.MISSING
        }
        out.append(Layer(named.name, kind, fields, arrays, defaults))
    return out


def write_flax(layers: Sequence[Layer], input_shape: Any) -> Model:
    """A Model of the layers, with the pairs that another framework needed folded into one."""
    named: list[Named] = []
    params: dict[str, Any] = {}
    stats: dict[str, Any] = {}
    for layer in fold(list(layers)):
        row = _layers.rows_of("flax", layer.kind)[0]
        cls: Any = row.flax
        fields = cls.__dataclass_fields__
        # What says no more than the default is left out, so that equal models are equal.
        settings = {k: v for k, v in layer.settings.items() if not same(v, fields[k].default)}
        if settings.get("strides") is not None and settings["strides"] == settings.get(
            "window_shape"
        ):
            del settings["strides"]
        named.append(Named(layer.name, cls(**settings)))
        where = {p.of("flax")[0]: p.collection for p in row.params}
        for name, value in layer.arrays.items():
            into = params if where[name] == "params" else stats
            into.setdefault(layer.name, {})[name] = value
    variables: dict[str, Any] = {"params": params}
    if stats:
        variables["batch_stats"] = stats
    return Model(Sequential(tuple(named), input_shape), variables)


def fold(layers: list[Layer]) -> list[Layer]:
    """Undoes what a target needed two layers for: a pad named for the layer after it, a Flatten
    named for the pool before it."""
    out: list[Layer] = []
    for layer in layers:
        last = out[-1] if out else None
        if last is not None and last.name == f"{layer.name}__pad":
            padding, pads = layer.settings.get("padding"), last.settings["padding"]
            zero = last.kind == "ZeroPad"
            if padding == "VALID" and (
                (zero and layer.kind in ("Conv", "AvgPool"))
                or (layer.kind == "MaxPool" and last.settings.get("value") == float("-inf"))
            ):
                settings = {**layer.settings, "padding": pads}
                if layer.kind == "AvgPool":
                    settings["count_include_pad"] = True
                out[-1] = dataclasses.replace(layer, settings=settings)
                continue
        if (
            last is not None
            and layer.kind == "Flatten"
            and layer.name == f"{last.name}__flatten"
            and last.kind in ("GlobalAvgPool", "GlobalMaxPool")
        ):
            out[-1] = dataclasses.replace(last, settings={**last.settings, "keepdims": False})
            continue
        out.append(layer)
    return out
