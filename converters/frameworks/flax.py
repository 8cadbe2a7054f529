"""Flax, the hub: a Sequential as layers, and layers as a Model."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fwt import _nodes, _tree
from fwt._sequential import Named, Sequential
from fwt._types import ConversionError, Model
from fwt.converters.rows import table
from fwt.converters.rows.row import Layer, Row, joined, parts_of, refuse, same
from fwt.converters.walk import policy


def given(module: Any, variables: Any, call: str) -> tuple[Any, Any]:
    """The module and variables that a user gave, as two arguments or as one Model; ``call`` is how
    the function is called with one."""
    framework, kind = _nodes.foreign(module)
    if kind:
        raise ConversionError(
            f"{type(module).__name__} is a live {framework} {kind}: {call} takes the Model that "
            f"from_{framework}(model) gives"
        )
    if not isinstance(module, Model):
        if variables is None and module is not None and not call.startswith("save"):
            raise ConversionError(
                f"the variables of the {type(module).__name__} are missing: give them after it, or "
                f"a Model of both, {call}"
            )
        return module, variables
    if variables is not None:
        raise ConversionError(
            f"a Model holds its variables, so {type(variables).__name__} after it is one argument "
            f"too many: {call}, and what follows by name"
        )
    return module.module, module.variables


def sequential_of(module: Any) -> Any:
    """A linen ``nn.Sequential`` as a :class:`fwt.Sequential`; anything else as it is."""
    if type(module) is not nn.Sequential:
        return module
    # linen names its children so, whatever their own names; functions count too.
    named = [(f"layers_{i}", sequential_of(layer)) for i, layer in enumerate(module.layers)]
    return Sequential(named)


def read_flax(module: Any, variables: Any, inside: tuple[str, ...] = ()) -> list[Layer]:
    """The layers of a Sequential with their arrays, those of Sequentials in it among them."""
    if not isinstance(module, Sequential):
        raise ConversionError(
            f"expected a fwt.Sequential or a linen nn.Sequential, found {type(module).__name__}; "
            "rebuild it as fwt.Sequential([(name, layer), ...])"
        )
    variables = _tree.as_variables(variables if isinstance(variables, Mapping) else {})
    variables = _nodes.unboxed(variables)
    out = []
    names = {n.name for n in module.layers}
    for collection, tree in variables.items():
        if collection not in ("params", "batch_stats"):
            raise ConversionError(f"variables: the collection {collection!r} can't be converted")
        for name in tree:
            if name not in names:
                place = "/".join([collection, *inside, name])
                raise ConversionError(
                    f"variables: {place} belongs to no layer of the module, which has "
                    f"{sorted(names)}"
                )
    for named in module.layers:
        parts = (*inside, named.name)
        if isinstance(named.layer, Sequential):
            own = {c: tree.get(named.name, {}) for c, tree in variables.items()}
            out += read_flax(named.layer, own, parts)
            continue
        arrays: dict[str, Any] = {}
        for tree in variables.values():
            arrays |= _flat(tree.get(named.name, {}))
        out.append(_layer(joined(parts), named.layer, arrays))
    return out


def _flat(tree: Mapping[str, Any], inside: str = "") -> dict[str, Any]:
    """The arrays of a layer, those of layers in it as ``query/kernel``."""
    out: dict[str, Any] = {}
    for name, value in tree.items():
        nested = isinstance(value, Mapping)
        out |= _flat(value, f"{inside}{name}/") if nested else {inside + name: np.asarray(value)}
    return out


def _layer(name: str, layer: Any, arrays: dict[str, Any]) -> Layer:
    cls = type(layer)
    kind = cls.__name__
    if any(r.flax is not cls for r in table.rows_of("flax", kind)):
        raise refuse(name, f"{cls.__module__}.{kind} is not the class that fwt knows")
    known = [f for f in dataclasses.fields(layer) if f.name not in ("parent", "name")]
    fields = {f.name: getattr(layer, f.name) for f in known if f.init}
    defaults = {f.name: f.default for f in known if f.default is not dataclasses.MISSING}
    place = f"{name} ({kind})"
    policy.name_of(fields.get("param_dtype"), place)
    dtype = policy.name_of(fields.pop("dtype", None), place)
    return Layer(name, kind, fields, arrays, defaults, dtype=dtype)


def write_flax(layers: Sequence[Layer], input_shape: Any) -> Model:
    """A Model of the layers, with the pairs that another framework needed folded into one."""
    folded = fold(list(layers))
    for index, layer in enumerate(folded):
        # linen's Dropout has no dtype, and rounds nothing where what stands beside it does not.
        beside = [x.dtype for x in (*folded[max(index - 1, 0) : index], *folded[index + 1 :][:1])]
        if layer.kind == "Dropout" and layer.dtype not in (None, *beside):
            raise refuse(str(layer), f"it casts to {layer.dtype}, which Flax's Dropout can't say",
                         policy.WAY_OUT)  # fmt: skip
    entries = [(parts_of(layer.name), layer) for layer in folded]
    named, trees = _nested(entries)
    variables = {"params": trees["params"]}
    if trees["batch_stats"]:
        variables["batch_stats"] = trees["batch_stats"]
    return Model(Sequential(named, input_shape), variables)


def _nested(
    entries: list[tuple[list[str], Layer]],
) -> tuple[tuple[Named, ...], dict[str, dict[str, Any]]]:
    named: list[Named] = []
    trees: dict[str, dict[str, Any]] = {"params": {}, "batch_stats": {}}
    for first, together in itertools.groupby(entries, key=lambda e: e[0][0]):
        group = list(together)
        if len(group[0][0]) > 1:
            inner, theirs = _nested([(parts[1:], layer) for parts, layer in group])
            named.append(Named(first, Sequential(inner)))
            for collection, tree in theirs.items():
                if tree:
                    trees[collection][first] = tree
            continue
        for _, layer in group:
            row = table.rows_of("flax", layer.kind)[0]
            named.append(Named(first, _module(row, layer)))
            where = {p.of("flax")[0]: p.collection for p in row.params}
            for name, value in layer.arrays.items():
                *inside, leaf = name.split("/")
                node = trees[where[name]].setdefault(first, {})
                for part in inside:
                    node = node.setdefault(part, {})
                node[leaf] = value
    return tuple(named), trees


def _module(row: Row, layer: Layer) -> Any:
    cls: Any = row.flax
    fields = cls.__dataclass_fields__
    # What says no more than the default is left out, so that equal models are equal.
    settings = {k: v for k, v in layer.settings.items() if not same(v, fields[k].default)}
    if settings.get("strides") is not None and settings["strides"] == settings.get("window_shape"):
        del settings["strides"]
    if layer.dtype is not None and "dtype" in fields:
        settings["dtype"] = layer.dtype
        held = policy.held([layer])
        if len(held) == 1 and held != {"float32"}:
            settings["param_dtype"] = next(iter(held))
    elif layer.dtype is not None and cls is not nn.Dropout:
        raise refuse(str(layer), f"it computes in {layer.dtype}, for which its class in Flax has "
                     "no dtype", policy.WAY_OUT)  # fmt: skip
    return cls(**settings)


def in_dtype(model: Model, dtype: Any) -> Model:
    """A model that computes in float32, with its floating arrays in float32; with None as it is."""
    if dtype is None:
        return model
    if dtype not in ("float32", np.float32):
        raise ConversionError(f"dtype={dtype!r:.80}: only 'float32', or None for the model's own")
    done: dict[int, tuple[Any, Any]] = {}  # with what it was, so that no other takes its id

    def cast(value: Any) -> Any:
        floating = jnp.issubdtype(getattr(value, "dtype", bool), jnp.floating)
        if not floating or value.dtype == np.float32:
            return value
        return done.setdefault(id(value), (value, value.astype(np.float32)))[1]

    def plain(layer: Any) -> Any:
        if isinstance(layer, Sequential):
            return layer.clone(layers=[Named(n.name, plain(n.layer)) for n in layer.layers])
        own = {f.name: f.default for f in dataclasses.fields(layer)}
        return layer.clone(**{n: own[n] for n in ("dtype", "param_dtype") if n in own})

    module = model.module if model.module is None else plain(model.module)
    return Model(module, jax.tree.map(cast, model.variables))


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
            and last.kind in ("ConvTranspose", "GroupedConvTranspose")
            and layer.kind == "Crop"
            and layer.name == f"{last.name}__crop"
        ):
            pairs = zip(last.settings["padding"], layer.settings["cropping"], strict=True)
            pads = tuple((lo - first, hi - second) for (lo, hi), (first, second) in pairs)
            out[-1] = dataclasses.replace(last, settings={**last.settings, "padding": pads})
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
