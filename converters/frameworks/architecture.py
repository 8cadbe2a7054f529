"""The architecture of a Sequential or a Graph as text, in the metadata of files that have some."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fwt import layers as fl
from fwt._graph import Graph, Node, nodes_of
from fwt._sequential import Named, Sequential
from fwt._sequential import settings_of as flax_settings
from fwt._types import FileFormatError, FwtError, Model
from fwt.converters.frameworks import flax as _flax
from fwt.converters.rows import table
from fwt.converters.rows.row import TRAINING, Layer, listed, refuse
from fwt.converters.walk import convert, policy
from fwt.layers.constants import MOST

# use_fast_variance decides how exact a norm is, param_dtype is half of a policy.
_LEFT_OUT = TRAINING["flax"] - {"use_fast_variance", "param_dtype"}


def described(told: Any, variables: dict[str, Any], path: Path) -> Model:
    """The model of a module's JSON and its variables, every name, setting and shape checked."""
    module = module_from_json(told, path)
    constants = [n.layer for n in nodes_of(module) if isinstance(n.layer, fl.Constant | fl.Indexed)]
    if sum(x.nbytes for x in constants) > MOST:
        raise FileFormatError(f"{path}: the constants of its architecture are over {MOST} bytes")
    return checked(module, variables)


def checked(module: Any, variables: dict[str, Any]) -> Model:
    """A model whose variables fit its module: a walk from Flax to Flax tells."""
    if module is not None:
        convert.convert(_flax.read_flax(module, variables), "flax", "flax", "source")
    return Model(module, variables)


def module_to_json(module: Any) -> Any:
    """The layers of a Sequential or a Graph with their settings, as JSON; None for no module."""
    if module is None:
        return None
    _flax.read_flax(module, {})
    if isinstance(module, Graph):
        nodes = [
            {"name": n.name, "inputs": list(n.inputs),
             **({"of": n.of} if n.of else _to_json(n.name, n.layer))}
            for n in module.nodes
        ]  # fmt: skip
        ends = {key: _plain(getattr(module, key)) for key in ("inputs", "outputs")}
        return {"nodes": nodes, **ends, **_beside(module)}
    layers = [
        {"name": n.name, "class": "Sequential", "settings": module_to_json(n.layer)}
        if isinstance(n.layer, Sequential | Graph)
        else {"name": n.name, **_to_json(n.name, n.layer)}
        for n in module.layers
    ]
    return {"layers": layers, **_beside(module)}


def _beside(module: Any) -> dict[str, Any]:
    told = {n: v for n in ("sidecar", "turned") if (v := getattr(module, n))}
    if fixed := getattr(module, "fixed", ()):
        told["fixed"] = listed(fixed)
    return {"input_shape": listed(module.input_shape), **told}


def _plain(ends: Any) -> Any:
    return dict(ends) if isinstance(ends, Mapping) else listed(ends)


def _to_json(name: str, given: Any) -> dict[str, Any]:
    """The class and the settings of one layer."""
    layer = Layer(name, type(given).__name__, {})
    settings = {k: v for k, v in flax_settings(given).items() if k not in _LEFT_OUT}
    for key in ("dtype", "param_dtype"):
        if key in settings:
            settings[key] = policy.name_of(settings[key], str(layer))
    if not table.rows_of("flax", layer.kind):
        raise refuse(str(layer), "fwt has no row for this class")
    try:
        json.dumps(settings)
    except TypeError as error:
        raise refuse(str(layer), f"a setting can't be written ({error})") from error
    return {"class": layer.kind, "settings": listed(settings)}


def module_from_json(told: Any, path: Path) -> Any:
    """The inverse, against the closed table of classes."""
    if told is None:
        return None
    beside = told.get("sidecar", "")
    if not isinstance(beside, str):
        raise FileFormatError(f"{path}: its sidecar is no text")
    turned = told.get("turned", False) is True
    if "nodes" in told:
        nodes = [
            Node(n["name"], None if n.get("of") else _from_json(n, path), tuple(n["inputs"]),
                 n.get("of", ""))
            for n in told["nodes"]
        ]  # fmt: skip
        try:
            return Graph(nodes, told["inputs"], told["outputs"], told["input_shape"], beside,
                         turned, told.get("fixed", ()))  # fmt: skip
        except FwtError as error:
            raise FileFormatError(f"{path}: {error}") from error
    named = [
        Named(n["name"], module_from_json(n["settings"], path)
              if n["class"] == "Sequential" else _from_json(n, path))
        for n in told["layers"]
    ]  # fmt: skip
    return Sequential(tuple(named), told["input_shape"], beside, turned)


def _from_json(entry: Any, path: Path) -> Any:
    """One layer."""
    rows = table.rows_of("flax", entry["class"])
    cls: Any = rows[0].flax if rows else None
    if cls is None:
        raise FileFormatError(f"{path}: the layer class {entry['class']!r} is not known")
    known = set(cls.__dataclass_fields__) - _LEFT_OUT
    if unknown := sorted(set(entry["settings"]) - known):
        raise FileFormatError(f"{path}: {entry['name']} has no setting {unknown[0]!r}")
    return cls(**{k: fl.tuples(v) for k, v in entry["settings"].items()})
