"""The architecture of a Sequential as text, in the metadata of files that have some."""

import json
from pathlib import Path
from typing import Any

from fwt import layers as fl
from fwt._sequential import Named, Sequential
from fwt._sequential import settings_of as flax_settings
from fwt._types import FileFormatError, Model
from fwt.converters.frameworks import flax as _flax
from fwt.converters.rows import table
from fwt.converters.rows.row import TRAINING, Layer, listed, refuse
from fwt.converters.walk import convert, policy

# use_fast_variance decides how exact a norm is, param_dtype is half of a policy.
_LEFT_OUT = TRAINING["flax"] - {"use_fast_variance", "param_dtype"}


def description(module: Any) -> str:
    """The JSON text of a module, or of none."""
    return json.dumps({"version": 1, "module": module_to_json(module)})


def described(text: str, variables: dict[str, Any], path: Path) -> Model:
    """The model of a description and its variables, every name, setting and shape checked."""
    told = json.loads(text)
    if told["version"] != 1:
        raise FileFormatError(f"{path}: version {told['version']!r}, only 1 is known")
    module = module_from_json(told["module"], path)
    variables.setdefault("params", {})
    return checked(module, variables)


def checked(module: Any, variables: dict[str, Any]) -> Model:
    """A model whose variables fit its module: a walk from Flax to Flax tells."""
    if module is not None:
        layers = _flax.read_flax(module, variables)
        convert.convert(layers, "flax", "flax", module.input_shape, "source")
    return Model(module, variables)


def module_to_json(module: Any) -> Any:
    """The layers of a Sequential with their settings, as JSON; None for no module."""
    if module is None:
        return None
    _flax.read_flax(module, {})
    layers: list[dict[str, Any]] = []
    for named in module.layers:
        if isinstance(named.layer, Sequential):
            inner = module_to_json(named.layer)
            layers.append({"name": named.name, "class": "Sequential", "settings": inner})
            continue
        layer = Layer(named.name, type(named.layer).__name__, {})
        settings = {k: v for k, v in flax_settings(named.layer).items() if k not in _LEFT_OUT}
        for name in ("dtype", "param_dtype"):
            if name in settings:
                settings[name] = policy.name_of(settings[name], str(layer))
        if not table.rows_of("flax", layer.kind):
            raise refuse(str(layer), "fwt has no row for this class")
        try:
            json.dumps(settings)
        except TypeError as error:
            raise refuse(str(layer), f"a setting can't be written ({error})") from error
        layers.append({"name": layer.name, "class": layer.kind, "settings": listed(settings)})
    beside = {n: v for n in ("sidecar", "turned") if (v := getattr(module, n))}
    return {"layers": layers, "input_shape": listed(module.input_shape), **beside}


def module_from_json(told: Any, path: Path) -> Sequential | None:
    """The inverse, against the closed table of classes."""
    if told is None:
        return None
    named = []
    cls: Any
    for entry in told["layers"]:
        if entry["class"] == "Sequential":
            named.append(Named(entry["name"], module_from_json(entry["settings"], path)))
            continue
        rows = table.rows_of("flax", entry["class"])
        cls = rows[0].flax if rows else None
        if cls is None:
            raise FileFormatError(f"{path}: the layer class {entry['class']!r} is not known")
        known = set(cls.__dataclass_fields__) - _LEFT_OUT
        if unknown := sorted(set(entry["settings"]) - known):
            raise FileFormatError(f"{path}: {entry['name']} has no setting {unknown[0]!r}")
        settings = {k: fl.tuples(v) for k, v in entry["settings"].items()}
        named.append(Named(entry["name"], cls(**settings)))
    beside = told.get("sidecar", "")
    if not isinstance(beside, str):
        raise FileFormatError(f"{path}: its sidecar is no text")
    turned = told.get("turned", False) is True
    return Sequential(tuple(named), told["input_shape"], beside, turned)
