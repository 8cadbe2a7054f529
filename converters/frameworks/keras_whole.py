"""What a file of Keras says of a model beside its layers: its name, its class, what it was compiled
with. It stands in the sidecar as the config of the whole model, for the next file of Keras.

The config of another file is written again only if it still is the config of this model: its layers
with these weights are converted once more, and each layer and bit has to be the same.
"""

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from fwt import _tree
from fwt._types import ConversionError
from fwt.converters.frameworks import flax as _flax
from fwt.converters.frameworks import keras_config, keras_read, keras_write, sidecar
from fwt.converters.rows.row import Layer, joined
from fwt.converters.walk import convert, policy


def written(module: Any, variables: Any) -> tuple[dict[str, Any], list[Layer]]:
    """The config of a whole model as a .keras file has it, and its layers with their arrays."""
    net = keras_config.to_keras_net(module, variables, None)
    layers = net.layers
    told = sidecar.whole(_flax.sequential_of(module), "keras")
    config = told.get("config")
    if config is None:
        return keras_write.keras_config(net), layers
    body = config.get("config") if isinstance(config, dict) else None
    name = body.get("name", "sequential") if isinstance(body, dict) else None
    if not isinstance(name, str) or type(told.get("steps", 0)) is not int:
        raise ConversionError(
            "the sidecar holds no config of a Keras model; module.clone(sidecar='') drops it"
        )
    if told.get("steps"):
        warnings.warn(
            f"the state of the optimizer (after {told['steps']:,} steps) is not written: further "
            "training starts with a new optimizer",
            stacklevel=5,
        )
    own = _again(config, layers, module, variables)
    if own is not None:
        return config, own
    warnings.warn(
        "the layers are written as the model has them now, without what the file that they come "
        "from says of their training: its layers would not give this model back",
        stacklevel=5,
    )
    made = keras_write.keras_config(net, name)
    return made | {n: config[n] for n in ("compile_config",) if n in config}, layers


def _again(config: Any, layers: list[Layer], module: Any, variables: Any) -> list[Layer] | None:
    """The layers of a config with the arrays of others, if they are the same model."""
    given = {layer.name: layer for layer in layers}
    try:
        net = keras_read.keras_net(config, "the sidecar")
        own = net.layers
        if any(x.kind == "SpectralNormalization" for x in policy.every(own)):
            return None  # its vector was not read
        opened = keras_config.opened_up(own)
        for layer in opened:
            _fill(layer, given)
        keras_config.gathered(opened)
        net = keras_config.shared(net)
        made = _flax.write_flax(convert.convert(net, "keras", "flax", "source"))
    except (ConversionError, KeyError, IndexError, AttributeError, ValueError, TypeError):
        return None
    if made.module != module.clone(sidecar="", turned=False) or not _same(
        made.variables, variables
    ):
        return None
    opened = keras_config.opened_up(own)
    for layer in opened:
        _fill(layer, given)
    return opened


def _fill(layer: Layer, given: Mapping[str, Layer]) -> None:
    """Gives a layer, or each part of it that has arrays, those of its namesake."""
    theirs = given.get(layer.name)
    parts = [part for part, _ in keras_config.places(layer, "")]
    if layer.kind in keras_config.HEADS and theirs is not None:
        for part in parts:
            names = keras_config.keras_names(part)
            part.arrays = {n: theirs.arrays[f"{part.name}/{n}"] for n in names}
        return
    others = [] if theirs is None else [part for part, _ in keras_config.places(theirs, "")]
    for index, part in enumerate(parts):
        if names := keras_config.keras_names(part):
            part.arrays = {n: others[index].arrays[n] for n in names}


def _same(a: Any, b: Any) -> bool:
    """Whether two trees hold the same bits."""
    one, other = (
        dict(jax.tree.leaves_with_path({n: dict(v) for n, v in _tree.as_variables(x).items() if v}))
        for x in (a, b)
    )
    return one.keys() == other.keys() and all(
        sidecar.same_bits(np.asarray(v), np.asarray(other[path])) for path, v in one.items()
    )


# -- the older .h5, which says the same in other words ------------------------------------------


def from_legacy(config: Any, training: Any) -> Any:
    """The config of an .h5 file as a .keras file has it."""
    out = _with_modules(config)
    if isinstance(training, dict) and isinstance(training.get("optimizer_config"), dict):
        rest = {n: v for n, v in training.items() if n != "optimizer_config"}
        places = {"loss": "losses", "metrics": "metrics", "weighted_metrics": "metrics"}
        compiled = {n: _in_module(v, f"keras.{places.get(n, n)}") for n, v in rest.items()}
        own = _in_module(training["optimizer_config"], "keras.optimizers")
        out["compile_config"] = {"optimizer": own, **compiled}
    return out


def to_legacy(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The model_config and the training_config of an .h5 file."""
    compiled = config.get("compile_config")
    model = {"class_name": config["class_name"], "config": config["config"]}
    if not isinstance(compiled, dict) or not compiled.get("optimizer"):
        return model, None
    own = compiled["optimizer"]
    named = own if isinstance(own, dict) else {"class_name": own, "config": {}}
    optimizer = {n: v for n, v in named.items() if n in ("class_name", "config")}
    rest = {n: v for n, v in compiled.items() if n not in ("optimizer", "loss")}
    told = {"loss_weights": None, **rest, "loss": _full_names(compiled.get("loss"))}
    return model, {**told, "optimizer_config": optimizer}


# Keras can't read a short name in its own .h5 files.
_SHORT = {
    "mse": "mean_squared_error", "mae": "mean_absolute_error", "bce": "binary_crossentropy",
    "mape": "mean_absolute_percentage_error", "msle": "mean_squared_logarithmic_error",
    "kld": "kl_divergence", "bfce": "binary_focal_crossentropy",
}  # fmt: skip


def _full_names(loss: Any) -> Any:
    if isinstance(loss, list):
        return [_full_names(x) for x in loss]
    if isinstance(loss, dict) and "class_name" not in loss:
        return {n: _full_names(x) for n, x in loss.items()}
    return _SHORT.get(loss.lower(), loss) if isinstance(loss, str) else loss


def _with_modules(entry: Any) -> Any:
    """A model with its layers that say where their class is, as newer files have them."""
    body, kind = entry["config"], entry.get("class_name")
    if not isinstance(body, dict) or not isinstance(body.get("layers"), list):
        return {"module": "keras.layers", "registered_name": None, **entry}
    where = {"module": "keras", "registered_name": None}
    if kind == "Functional":
        where = {"module": "keras.src.models.functional", "registered_name": kind}
    layers = [_with_modules(layer) for layer in body["layers"]]
    return {**where, **entry, "config": {**body, "layers": layers}}


def _in_module(value: Any, module: str) -> Any:
    """Objects of Keras's own that say where their class is."""
    if isinstance(value, list):
        return [_in_module(v, module) for v in value]
    if not isinstance(value, dict):
        return value
    if "class_name" not in value:
        return {n: _in_module(v, module) for n, v in value.items()}
    return {"module": module, "registered_name": None, **value}


def frozen(model: Mapping[str, Any]) -> set[str]:
    """The names of the layers that Keras does not train once it has read a config."""

    def under(entry: Any, inside: tuple[str, ...], off: bool) -> Iterator[str]:
        own = entry["config"]
        if "layers" not in own:
            if off or own.get("trainable") is False:
                yield joined(inside)
            return
        # Keras does not look at this setting of a Sequential.
        off = off or (entry["class_name"] != "Sequential" and own.get("trainable") is False)
        for layer in own["layers"]:
            yield from under(layer, (*inside, layer["config"].get("name", "")), off)

    return set(under(model, (), False))
