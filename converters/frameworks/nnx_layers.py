"""Layers that Flax NNX and linen both have."""

import dataclasses
import inspect
from typing import Any

import flax.linen as nn
import numpy as np
from flax import nnx

from fwt.converters.rows.row import TRAINING, refuse

# nnx's layer, linen's, and what nnx calls a linen field and the size that linen has no field for.
TWINS: tuple[tuple[Any, Any, dict[str, str], str | None], ...] = (
    (nnx.Linear, nn.Dense, {"features": "out_features"}, "in_features"),
    (nnx.Conv, nn.Conv, {"features": "out_features"}, "in_features"),
    (nnx.ConvTranspose, nn.ConvTranspose, {"features": "out_features"}, "in_features"),
    (nnx.BatchNorm, nn.BatchNorm, {}, "num_features"),
    (nnx.LayerNorm, nn.LayerNorm, {}, "num_features"),
    (nnx.RMSNorm, nn.RMSNorm, {}, "num_features"),
    (nnx.GroupNorm, nn.GroupNorm, {}, "num_features"),
    (nnx.InstanceNorm, nn.InstanceNorm, {}, "num_features"),
    (nnx.Embed, nn.Embed, {}, None),
    (nnx.Dropout, nn.Dropout, {}, None),
)
# What a layer is told when it runs, and how it computes.
LEFT_OUT = {
    # How exact a norm is, and the dtype of the weights.
    *(TRAINING["flax"] - {"use_fast_variance", "param_dtype"}),
    *("use_running_average", "deterministic", "rngs", "rng_collection"),
    *("dot_general", "promote_dtype", "conv_general_dilated", "kernel_shape", "feature_axis"),
    *("in_features", "num_features", "out_features"),
}
COLLECTIONS = {nnx.Param: "params", nnx.BatchStat: "batch_stats"}


def layer_of(layer: Any, place: str) -> tuple[Any, dict[str, Any]]:
    """The linen layer that does the same as one of nnx, and its variables."""
    twin = next((t for t in TWINS if type(layer) is t[0]), None)
    if twin is None:
        raise refuse(place, "this nnx layer has no row")
    _, cls, renamed, _ = twin
    fields = {f.name: f for f in dataclasses.fields(cls)}
    settings: dict[str, Any] = {}
    for name, field in fields.items():
        there = renamed.get(name, name)
        if name in LEFT_OUT or name in ("parent", "name") or not hasattr(layer, there):
            continue
        value = getattr(layer, there)
        if name == "dtype" and cls is nn.Embed and value == layer.embedding[...].dtype:
            continue  # which nnx writes for None
        if isinstance(value, list):
            value = tuple(value)
        if value != field.default:
            settings[name] = value
    settings.pop("group_size", None)  # which nnx turns into num_groups
    defaults = inspect.signature(type(layer).__init__).parameters
    for name in ("dot_general", "conv_general_dilated", "promote_dtype"):
        if name in defaults and getattr(layer, name, None) is not defaults[name].default:
            raise refuse(place, f"a {name} of the user's own")
    known = {renamed.get(n, n) for n in fields} | LEFT_OUT
    variables: dict[str, Any] = {}
    for name, value in vars(layer).items():
        if isinstance(value, nnx.Variable):
            kind = next((c for k, c in COLLECTIONS.items() if isinstance(value, k)), None)
            if kind is None:
                raise refuse(place, f"its {name} is a {type(value).__name__}")
            variables.setdefault(kind, {})[name] = np.asarray(value[...])
        elif not name.startswith("_") and name not in known and value is not None:
            raise refuse(place, f"{name}={value!r:.60}: only the default can be converted")
    return cls(**settings), variables
