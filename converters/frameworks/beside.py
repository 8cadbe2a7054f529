"""What live models hold that is no weight, and Keras layers inside of torch modules."""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from fwt import _nodes, _tree
from fwt.converters.rows.row import LiveLeaf

Held = Iterator[tuple[str, Any]]


def of_nnx(model: Any) -> Held:
    """The arrays of an nnx module that no transform sees, such as caches and the state of keys."""
    nnx: Any = sys.modules["flax.nnx"]
    tree = _tree.Tree(model, True)
    shown = {place for path in tree.leaves for place in (path, *tree.others(path))}
    for parts, variable in nnx.to_flat_state(nnx.state(model)):
        box = isinstance(variable, nnx.Variable)
        for keys, x in jax.tree.leaves_with_path(variable):
            inside = map(_nodes.part, keys[1:] if box else keys)
            path = "/".join(_tree.escape(str(p)) for p in (*parts, *inside))
            if path not in shown:
                yield path, x


def of_keras(model: Any, shown: Sequence[LiveLeaf]) -> Held:
    """The variables that are no weights and no seeds."""
    numbers = sys.modules["keras"].ops.convert_to_numpy
    left = {id(leaf.source) for leaf in shown} | {id(v) for v in _seeds([model])}
    for v in model.variables:
        if id(v) not in left:
            yield v.path.removeprefix(f"{model.name}/"), np.array(numbers(v))


def of_torch(model: Any, shown: Sequence[LiveLeaf]) -> Held:
    """The parameters, buffers and extra state that are no weights: those of other dtypes, those
    that a weight is computed from, and statistics of other layers than norms."""
    from fwt.converters.frameworks import torch_wrappers
    from fwt.converters.frameworks.torch_layer import to_numpy

    torch = sys.modules["torch"]

    def array(x: Any, name: str) -> np.ndarray:
        return to_numpy(torch.view_as_real(x) if x.dtype == torch.complex32 else x, name)

    def memory(x: Any) -> Any:
        if x.is_meta or x.layout != torch.strided or not x.numel():
            return id(x)
        return x.data_ptr(), x.dtype, x.shape, x.stride()

    known = {memory(leaf.source) for leaf in shown}
    known |= {memory(v.value) for v in _seeds(_keras_layers(model))}
    inner = torch_wrappers.names(model)
    for name, x in (*model.named_parameters(), *model.named_buffers()):
        if memory(x) not in known:
            yield inner.get(name) or name, array(x, name)
    plain = torch.nn.Module.get_extra_state
    for prefix, module in model.named_modules():
        if getattr(type(module), "get_extra_state", plain) is plain:
            continue
        found = torch.utils._pytree.tree_flatten_with_path(module.get_extra_state())[0]
        for keys, x in found:
            parts = [prefix] * bool(prefix) + ["_extra_state", *map(_nodes.part, keys)]
            name = ".".join(parts)
            if isinstance(x, torch.Tensor):
                yield name, array(x, name)
            elif isinstance(x, np.ndarray | np.generic | bool | int | float | complex):
                yield name, np.asarray(x)


def keras_in(model: Any) -> dict[int, str]:
    """Of the Keras layers inside of a torch module, by the id of the parameter that each variable
    is on Keras's torch backend, whether it is among the "params" or the "batch_stats"; "" if it is
    neither."""
    layers = _keras_layers(model)
    if not layers:
        return {}
    from fwt.converters.frameworks import keras as _keras

    inside = [x for layer in layers for x in layer._flatten_layers()]
    return {id(v.value): _keras.collection_of(v, _keras.public_name(x))
            for x in inside for v in x.variables}  # fmt: skip


def _keras_layers(model: Any) -> list[Any]:
    keras = sys.modules.get("keras")
    return [] if keras is None else [m for m in model.modules()
                                     if isinstance(m, keras.layers.Layer)]  # fmt: skip


def _seeds(layers: Sequence[Any]) -> list[Any]:
    inside = (x for layer in layers for x in layer._flatten_layers())
    return [g.state for x in inside for g in x._seed_generators]
