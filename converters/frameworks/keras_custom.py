"""Layers of Keras of a class of the user's own: what their configs leave out."""

import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any

from fwt.converters.rows import table
from fwt.converters.rows.row import refuse

# What keras.layers.Layer itself may be told of the shape of its input.
_SHAPES = ("input_shape", "batch_input_shape", "batch_shape", "input_dim", "input_length",
           "batch_size", "input_dtype", "input_tensor", "sparse", "ragged")  # fmt: skip
_CONTAINERS = ("Sequential", "Functional")


def is_custom(kind: Any) -> bool:
    """Whether a class in a config is the user's own and registered, in whatever package."""
    return isinstance(kind, str) and kind.rpartition(">")[2] in table.CUSTOM["keras"]


def snake(kind: str) -> str:
    """The name that Keras gives the first layer of a class."""
    kind = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", kind))
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", kind).lower()


def named(config: Any) -> Any:
    """A model's config with a name for each custom layer whose class tells none, as Keras calls it
    when it reads the config: ``get_config`` of the class does without that of its base."""
    body = config.get("config") if isinstance(config, Mapping) else None
    entries = body.get("layers") if isinstance(body, Mapping) else None
    if not isinstance(body, Mapping) or not isinstance(entries, list):
        return config
    found = [e for e in entries if isinstance(e, Mapping) and isinstance(e.get("config"), Mapping)]
    taken = {e["config"].get("name") for e in found}
    out: list[Any] = []
    for entry in entries:
        if not any(entry is e for e in found):
            out.append(entry)
            continue
        if entry.get("class_name") in _CONTAINERS:
            entry = named(entry)
        elif is_custom(entry.get("class_name")) and "name" not in entry["config"]:
            name, count = entry.get("name"), 0
            stem = snake(entry["class_name"].rpartition(">")[2])
            while not isinstance(name, str) or (name in taken and name != entry.get("name")):
                name, count = f"{stem}_{count}" if count else stem, count + 1
            taken.add(name)
            entry = {**entry, "config": {**entry["config"], "name": name}}
        out.append(entry)
    return {**config, "config": {**body, "layers": out}}


def settings_of(kind: str, settings: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The settings of a custom layer without those of keras.layers.Layer, which its class may name
    or may not."""
    if settings.get("autocast") is False:
        raise refuse(place, "autocast=False: it takes tensors of any dtype as they are",
                     "leave it out")  # fmt: skip
    return {k: v for k, v in settings.items() if k not in (*_SHAPES, "autocast")}


def check_config(layer: Any) -> None:
    """Raises for a live layer or operation that Keras can't tell the settings of."""
    try:
        layer.get_config()
    except NotImplementedError:
        if type(layer).__module__.startswith("keras.src.ops"):
            raise refuse(
                f"{layer.name} (keras.ops, {type(layer).__name__})",
                "it is called with arrays, which Keras itself does not save",
                "give it numbers, or a layer that holds the array",
            ) from None
        raise refuse(
            f"{layer.name} ({type(layer).__name__})",
            "its class does not tell what it was made with",
            "give the class get_config(self): return {**super().get_config(), ...}, with each "
            "argument of __init__ by name",
        ) from None


def taken_by(cls: Any, config: dict[str, Any], place: str) -> dict[str, Any]:
    """The settings that a class is made with; raises for those that its ``__init__`` lacks."""
    known = inspect.signature(cls.__init__).parameters
    reads = next((c.__module__ for c in cls.__mro__ if "from_config" in vars(c)), "")
    free = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values())
    if free or reads.partition(".")[0] != "keras":
        return config
    config = {k: v for k, v in config.items() if k in known or (k, v) != ("dtype", "float32")}
    if left := [k for k in config if k not in known]:
        raise refuse(place, f"{cls.__name__}.__init__ does not take {', '.join(left)}=",
                     "give it **kwargs, and call super().__init__(**kwargs) in it")  # fmt: skip
    return config


def told(config: dict[str, Any], layers: Iterable[Any], policy: Any) -> dict[str, Any]:
    """The body of a live model's config, whose custom layers say their names and dtypes.

    Args:
        config: what ``get_config`` gives, which is changed.
        layers: the live layers.
        policy: serializes the dtype policy of a layer.
    """
    live = [x for x in layers if type(x).__name__ != "InputLayer"]
    names = {x.name: x for x in live}
    entries = [e for e in config["layers"] if e["class_name"] != "InputLayer"]
    for index, entry in enumerate(entries):
        # A Sequential has no operations; an entry of any other model says its name.
        layer = names.get(entry["name"]) if "name" in entry else live[index]
        if layer is None:
            continue
        if entry["class_name"] in _CONTAINERS and hasattr(layer, "layers"):
            told(entry["config"], layer.layers, policy)
        elif is_custom(entry["class_name"]):
            entry["config"].setdefault("name", layer.name)
            entry["config"].setdefault("dtype", policy(layer.dtype_policy))
    return config
