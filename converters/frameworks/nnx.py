"""Flax NNX: ``nnx.Sequential`` of nnx layers, whose settings and arrays linen's layers have too."""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np
from flax import nnx

from fwt import _nodes, _tree
from fwt import layers as fl
from fwt._graph import Graph
from fwt._sequential import Named, Sequential, call, settings_of
from fwt._types import ConversionError, FwtError, Model
from fwt.converters.frameworks import architecture
from fwt.converters.frameworks import flax as _flax
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
_LEFT_OUT = {
    # How exact a norm is, and the dtype of the weights.
    *(TRAINING["flax"] - {"use_fast_variance", "param_dtype"}),
    *("use_running_average", "deterministic", "rngs", "rng_collection"),
    *("dot_general", "promote_dtype", "conv_general_dilated", "kernel_shape", "feature_axis"),
    *("in_features", "num_features", "out_features"),
}
_COLLECTIONS = {nnx.Param: "params", nnx.BatchStat: "batch_stats"}


class Linen(nnx.Module):
    """A linen layer that nnx lacks, at inference, its arrays as ``nnx.Param`` and ``BatchStat``."""

    def __init__(self, layer: Any, variables: Mapping[str, Any]):
        self.layer = Named("layer", layer)  # in which linen leaves it alone
        kinds = {name: kind for kind, name in _COLLECTIONS.items()}
        self.held = nnx.Dict({
            collection: _nested(tree, kinds[collection]) for collection, tree in variables.items()
        })  # fmt: skip

    def __call__(self, *xs: Any) -> Any:
        return call(self.layer.layer, _plain(self.held), *xs)


def _nested(tree: Mapping[str, Any], kind: Any) -> Any:
    import jax.numpy as jnp

    return nnx.Dict({
        name: _nested(value, kind) if isinstance(value, Mapping) else kind(jnp.asarray(value))
        for name, value in tree.items()
    })  # fmt: skip


def _plain(node: Any) -> Any:
    if isinstance(node, nnx.Variable):
        return node[...]
    return {name: _plain(value) for name, value in node.items()}


def from_nnx(model: nnx.Sequential, input_shape: Any = None) -> Model:
    """An ``nnx.Sequential`` as a Flax model of this library, with the same predictions.

    Args:
        model: of nnx layers, functions such as ``nnx.relu`` and partials of them, or Sequentials;
            the layers are named by their place, as nnx does.
        input_shape: the shape of one input without the batch axis, where it is to be known.

    Returns:
        ``Model(module, variables)`` with NumPy leaves.

    Raises:
        ConversionError: for a layer or setting that can't be converted exactly, by name.

    Example:
        >>> from flax import nnx
        >>> net = nnx.Sequential(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.relu)
        >>> module, variables = from_nnx(net)
        >>> module
        Sequential(
          0: Dense(features=2)
          1: ReLU()
        )
    """
    if len(twice := _shared(model)) > 0:
        raise ConversionError(
            f"{twice[0]} and {twice[1]} are one module; a Sequential keeps weights for each: give "
            "them their own, nnx.clone(layer)"
        )
    if type(model) is not nnx.Sequential:
        raise ConversionError(
            f"from_nnx takes an nnx.Sequential, found {type(model).__name__}; a transform takes "
            "the nnx.state of any module"
        )
    module, variables = _read(model, ())
    module = Sequential(module.layers, input_shape)
    variables.setdefault("params", {})
    return architecture.checked(module, variables)


def _shared(model: Any) -> list[str]:
    """The places of two layers that are one module."""
    seen: dict[int, str] = {}

    def under(holder: Any, inside: str) -> list[str]:
        for index, layer in enumerate(getattr(holder, "layers", ())):
            place = f"{inside}{index}"
            if isinstance(layer, nnx.Module) and id(layer) in seen:
                return [seen[id(layer)], place]
            seen[id(layer)] = place
            if type(layer) is nnx.Sequential and (found := under(layer, f"{place}/")):
                return found
        return []

    return under(model, "") if type(model) is nnx.Sequential else []


def _read(model: nnx.Sequential, inside: tuple[str, ...]) -> tuple[Sequential, dict[str, Any]]:
    named: list[tuple[str, Any]] = []
    variables: dict[str, Any] = {}
    for index, layer in enumerate(model.layers):
        name = str(index)
        place = "/".join((*inside, name))
        own: dict[str, Any] = {}
        made: Any
        if type(layer) is nnx.Sequential:
            made, own = _read(layer, (*inside, name))
        elif isinstance(layer, Linen):
            made = layer.layer.layer
            own = {c: _numpy(tree) for c, tree in _plain(layer.held).items()}
        elif isinstance(layer, nnx.Module):
            made, own = _layer(layer, f"{place} ({type(layer).__name__})")
        else:
            try:
                made = fl.from_function(layer)
            except FwtError as error:
                raise ConversionError(f"{place}: {error}") from error
        named.append((name, made))
        for collection, tree in own.items():
            variables.setdefault(collection, {})[name] = tree
    return Sequential(named), variables


def _numpy(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {name: _numpy(value) for name, value in tree.items()}
    return np.asarray(tree)


def _layer(layer: Any, place: str) -> tuple[Any, dict[str, Any]]:
    twin = next((t for t in TWINS if type(layer) is t[0]), None)
    if twin is None:
        raise refuse(place, "this nnx layer has no row")
    _, cls, renamed, _ = twin
    fields = {f.name: f for f in dataclasses.fields(cls)}
    settings: dict[str, Any] = {}
    for name, field in fields.items():
        there = renamed.get(name, name)
        if name in _LEFT_OUT or name in ("parent", "name") or not hasattr(layer, there):
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
    known = {renamed.get(n, n) for n in fields} | _LEFT_OUT
    variables: dict[str, Any] = {}
    for name, value in vars(layer).items():
        if isinstance(value, nnx.Variable):
            kind = next((c for k, c in _COLLECTIONS.items() if isinstance(value, k)), None)
            if kind is None:
                raise refuse(place, f"its {name} is a {type(value).__name__}")
            variables.setdefault(kind, {})[name] = np.asarray(value[...])
        elif not name.startswith("_") and name not in known and value is not None:
            raise refuse(place, f"{name}={value!r:.60}: only the default can be converted")
    return cls(**settings), variables


def to_nnx(module: Any, variables: Any = None) -> Any:
    """A Flax model of this library as an ``nnx.Sequential``, with the same predictions.

    Args:
        module: a :class:`fwt.Sequential`, a linen ``nn.Sequential``, or a ``Model`` of one.
        variables: its variables; a Model has its own.

    Returns:
        An ``nnx.Sequential`` in eval mode of nnx's own layers; what nnx lacks is a small module of
        ours around the linen layer, and so is a Graph. Its leaves are JAX arrays.

    Raises:
        ConversionError: for what is no Sequential, or variables that do not fit it.

    Example:
        >>> import fwt, jax, flax.linen as nn
        >>> net = fwt.Sequential([("dense", nn.Dense(2)), nn.relu])
        >>> variables = net.init(jax.random.key(0), jax.numpy.ones((1, 3)))
        >>> to_nnx(net, variables)(jax.numpy.ones((4, 3))).shape
        (4, 2)
    """
    module, variables = _flax.given(module, variables, "to_nnx(model)")
    module = _flax.sequential_of(module)
    _flax.read_flax(module, variables)  # which checks the names
    variables = _nodes.unboxed(_tree.as_variables(variables))
    if isinstance(module, Graph):
        return Linen(module, variables)
    model = _written(module, variables)
    model.eval()
    return model


def _written(module: Sequential, variables: Mapping[str, Any]) -> nnx.Sequential:
    layers = []
    for named in module.layers:
        own = {c: tree[named.name] for c, tree in variables.items() if named.name in tree}
        if isinstance(named.layer, Sequential):
            layers.append(_written(named.layer, own))
        else:
            layers.append(_made(named.layer, own, named.name))
    return nnx.Sequential(*layers)


def _made(layer: Any, variables: Mapping[str, Any], name: str) -> Any:
    import jax.numpy as jnp

    twin = next((t for t in TWINS if type(layer) is t[1]), None)
    settings = settings_of(layer) if twin is not None else {}
    if twin is None or set(settings) & {"feature_axes", "force_float32_reductions", "axis"}:
        return Linen(layer, variables)
    cls, _, renamed, size = twin
    arrays = {n: np.asarray(v) for tree in variables.values() for n, v in tree.items()}
    given = {renamed.get(n, n): v for n, v in settings.items() if n not in _LEFT_OUT}
    if size == "in_features":
        kernel = arrays["kernel"]
        groups = settings.get("feature_group_count", 1)
        axis = -1 if settings.get("transpose_kernel") else -2
        given |= {"in_features": kernel.shape[axis] * groups, "out_features": layer.features}
    elif size == "num_features":
        shapes = {v.shape for v in arrays.values()}
        if len(shapes) != 1:  # it has no arrays, and nnx wants to know a size
            return Linen(layer, variables)
        given[size] = next(iter(shapes))[0]
    elif cls is nnx.Embed:
        given |= {"num_embeddings": layer.num_embeddings, "features": layer.features}
    if cls is not nnx.Dropout:
        given["rngs"] = nnx.Rngs(0)
    made = cls(**given)
    held = {n: v for n, v in vars(made).items() if isinstance(v, nnx.Variable)}
    if set(held) != set(arrays):
        raise refuse(name, f"nnx keeps {sorted(held)}, found {sorted(arrays)}")
    for n, value in arrays.items():  # whatever the dtype of those that it was made with
        setattr(made, n, type(held[n])(jnp.asarray(value)))
    return made
