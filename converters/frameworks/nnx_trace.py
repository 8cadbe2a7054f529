"""Any nnx module as a graph: on a copy of it each layer that linen has too is one opaque primitive,
and the rest is read as for linen modules."""

import contextlib
import inspect
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax import nnx

from fwt import _nodes
from fwt._types import ConversionError, Model
from fwt.converters.frameworks import linen_trace
from fwt.converters.frameworks.linen_nodes import put
from fwt.converters.frameworks.nnx_layers import COLLECTIONS, TWINS, layer_of
from fwt.converters.rows.row import joined

_TOLD_APART = ("rngs", "rng", "out_sharding")


def traced(model: nnx.Module, input_shape: Any) -> Model:
    """An nnx module as a Graph with the same predictions.

    Args:
        model: any nnx module, whose ``__call__`` takes arrays with the batch first.
        input_shape: as for ``linen_trace.traced``.

    Returns:
        ``Model(graph, variables)`` with NumPy leaves, under the paths that ``nnx.state`` has.

    Raises:
        ConversionError: for what can't be said by layers, by the name of the operation.
    """
    name = type(model).__name__
    if input_shape is None:
        raise ConversionError(
            f"{name} is an nnx module of one's own, which is traced for a shape of its input: give "
            "input_shape= (without the batch axis), or build it as an nnx.Sequential"
        )
    model = _nodes.apart(model)  # a forward may write to arrays in place
    parts: Any = nnx.split(model, nnx.Any(*COLLECTIONS), ...)
    graph, kept, rest = parts
    places: dict[tuple[Any, ...], tuple[str, ...]] = {}  # by place in nnx, that in linen's tree
    variables: dict[str, Any] = {"params": {}}
    for path, variable in nnx.to_flat_state(kept):
        places[path] = (_collection(variable), *map(str, path))
        put(variables, places[path], np.asarray(variable[...]))
    twins = {}
    for path, layer in _layers(model):
        with contextlib.suppress(ConversionError):  # one that no row can say is read in its parts
            twins[path] = _twin(layer, path)
    flat = dict(nnx.to_flat_state(kept))
    told = linen_trace.inference_of(type(model).__call__)
    form = linen_trace.form_of(type(model), input_shape)
    opened: list[Collection[str] | None] = [None]

    def run(variables: Mapping[str, Any], *xs: Any) -> Any:
        def found(place: tuple[str, ...]) -> Any:
            tree: Any = variables
            for part in place:
                tree = tree[part]
            return tree

        filled = nnx.from_flat_state({
            path: variable.replace(found(places[path])) for path, variable in flat.items()
        })  # fmt: skip
        copy: Any = nnx.merge(graph, filled, rest)
        copy.eval()
        if opened[0] is not None:
            _close(copy, twins, opened[0])
        args, kwds = form.arguments(xs)
        return copy(*args, **kwds, **told)

    @contextlib.contextmanager
    def tracing(paths: Collection[str]) -> Iterator[None]:
        opened[0] = paths
        try:
            yield
        finally:
            opened[0] = None

    return linen_trace.traced_call(run, tracing, variables, form, type(model))


def _collection(variable: Any) -> str:
    return next(name for kind, name in COLLECTIONS.items() if isinstance(variable, kind))


def _layers(model: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The layers that linen has too, each at its first place."""
    for path, layer in nnx.iter_modules(model):
        if type(layer) is nnx.MultiHeadAttention or any(type(layer) is t[0] for t in TWINS):
            yield tuple(str(p) for p in path), layer


def _twin(layer: Any, path: tuple[str, ...]) -> Any:
    """The linen layer that does the same, at inference."""
    if type(layer) is not nnx.MultiHeadAttention:
        return layer_of(layer, f"{joined(path)} ({type(layer).__name__})")[0]
    default = inspect.signature(type(layer).__init__).parameters["attention_fn"].default
    if layer.attention_fn is not default or layer.normalize_qk or layer.decode:
        raise ConversionError("its parts are read")
    return nn.MultiHeadDotProductAttention(
        num_heads=layer.num_heads,
        qkv_features=layer.qkv_features,
        out_features=layer.out_features,
        use_bias=layer.use_bias,
    )


def _close(
    copy: Any,
    twins: Mapping[tuple[str, ...], Any],
    opened: Collection[str],
) -> None:
    """Makes each layer of a copy give one primitive when it is called."""
    for path, layer in list(_layers(copy)):
        if path not in twins or any(joined(path[:k]) in opened for k in range(len(path) + 1)):
            continue
        if any(path[:k] in twins and joined(path[:k]) not in opened for k in range(len(path))):
            continue  # inside one that is closed
        layer.__class__ = _closed(type(layer), twins[path], path)


def _closed(cls: Any, twin: Any, path: tuple[str, ...]) -> Any:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        own: dict[str, Any] = {}  # as it is now, which nnx.WeightNorm and nnx.scan change
        for inside, variable in nnx.to_flat_state(nnx.state(self, nnx.Any(*COLLECTIONS))):
            put(own, [_collection(variable), *map(str, inside)], variable[...])
        if linen_trace.is_odd(*args, *kwargs.values(), *jax.tree.leaves(own)):
            return cls.__call__(self, *args, **kwargs)
        signature = inspect.signature(cls.__call__)
        given = dict(signature.bind(self, *args, **kwargs).arguments)
        given.pop(next(iter(signature.parameters)))
        given = {k: v for k, v in given.items() if k not in _TOLD_APART}
        first = given.pop(next(iter(given)))  # nnx and linen give it other names
        off = ("sow_weights", "decode")
        given = {k: v for k, v in given.items() if v is not None and not (k in off and not v)}
        return linen_trace.bound(twin, path, own, (first,), given)

    return type(cls.__name__, (cls,), {"__call__": call})
