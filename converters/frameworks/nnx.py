"""Flax NNX: ``nnx.Sequential`` of nnx layers, whose settings and arrays linen's layers have too."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx

from fwt import _nodes, _tree
from fwt import layers as fl
from fwt._graph import Graph
from fwt._sequential import Named, Sequential, call, settings_of
from fwt._types import ConversionError, FwtError, Model
from fwt.converters.frameworks import architecture, nnx_trace
from fwt.converters.frameworks import flax as _flax
from fwt.converters.frameworks.nnx_layers import COLLECTIONS, LEFT_OUT, TWINS, layer_of
from fwt.converters.rows.row import refuse


class Linen(nnx.Module):
    """A linen layer that nnx lacks, at inference, its arrays as ``nnx.Param`` and ``BatchStat``."""

    def __init__(self, layer: Any, variables: Mapping[str, Any]):
        self.layer = Named("layer", layer)  # in which linen leaves it alone
        kinds = {name: kind for kind, name in COLLECTIONS.items()}
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
    """An nnx module as a Flax model of this library, with the same predictions.

    Args:
        model: an ``nnx.Sequential`` of nnx layers, functions such as ``nnx.relu`` and partials of
            them, or Sequentials; the layers are named by their place, as nnx does. Any other
            module is traced, and becomes a :class:`fwt.Graph`.
        input_shape: the shape of one input without the batch axis, where it is to be known; of
            several inputs a list of shapes. A module that is traced needs it.

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
    if not isinstance(model, nnx.Module):
        raise ConversionError(
            f"from_nnx takes an nnx module, found {type(model).__name__}; a transform takes the "
            "nnx.state of any module"
        )
    twice = _shared(model)
    if twice and input_shape is None:
        raise ConversionError(
            f"{twice[0]} and {twice[1]} are one module; a Sequential keeps weights for each: give "
            "input_shape=, with which they become a Graph, or their own, nnx.clone(layer)"
        )
    if type(model) is not nnx.Sequential or twice:
        return nnx_trace.traced(model, input_shape)
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
            made, own = layer_of(layer, f"{place} ({type(layer).__name__})")
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
    given = {renamed.get(n, n): v for n, v in settings.items() if n not in LEFT_OUT}
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
