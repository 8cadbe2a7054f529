"""One side of ``verify``: how a model of each framework runs, its layers' outputs kept."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from flax import nnx

from fwt._sequential import Sequential, call
from fwt._types import ConversionError, Model
from fwt.converters.rows.row import joined

Taps = dict[str, np.ndarray]


@dataclasses.dataclass
class Side:
    """A model: how it runs, its input, and the model that it is in Flax."""

    run: Callable[[np.ndarray], tuple[np.ndarray, Taps]]
    shape: tuple[int | None, ...] | None
    channels_first: bool  # at its ends
    model: Callable[[], Model]
    integers: int | None = None
    turned: bool = False  # whether channels may come first inside


def flax_side(model: Model) -> Side:
    if not isinstance(model.module, Sequential):
        raise ConversionError(f"verify: {type(model.module).__name__} is no Sequential")

    def run(x: np.ndarray) -> tuple[np.ndarray, Taps]:
        taps: Taps = {}
        y = _through(model.module, dict(model.variables), x, (), taps)
        return np.asarray(y), taps

    first = model.module.layers[0].layer if model.module.layers else None
    count = getattr(first, "num_embeddings", None)
    return Side(run, model.module.input_shape, False, lambda: model, count)


def _through(
    module: Sequential, variables: Any, x: Any, inside: tuple[str, ...], taps: Taps
) -> Any:
    for named in module.layers:
        own = {c: tree[named.name] for c, tree in variables.items() if named.name in tree}
        if isinstance(named.layer, Sequential):
            x = _through(named.layer, own, x, (*inside, named.name), taps)
        else:
            x = call(named.layer, own, x)
            taps[layer_name((*inside, named.name))] = np.asarray(x)
    return x


def nnx_side(model: Any) -> Side:
    def run(x: np.ndarray) -> tuple[np.ndarray, Taps]:
        taps: Taps = {}
        copy = nnx.clone(model)
        copy.eval()

        def under(holder: Any, y: Any, inside: tuple[str, ...]) -> Any:
            for index, layer in enumerate(holder.layers):
                parts = (*inside, str(index))
                if type(layer) is nnx.Sequential:
                    y = under(layer, y, parts)
                else:
                    y = layer(y)
                    taps[joined(parts)] = np.asarray(y)
            return y

        if type(copy) is nnx.Sequential:
            return np.asarray(under(copy, x, ())), taps
        return np.asarray(copy(x)), taps

    def converted() -> Model:
        from fwt.converters.frameworks import nnx as _nnx

        return _nnx.from_nnx(model)

    first = model.layers[0] if type(model) is nnx.Sequential and model.layers else None
    count = first.num_embeddings if isinstance(first, nnx.Embed) else None
    return Side(run, None, False, converted, count)


def layer_name(parts: Sequence[str]) -> str:
    """The name that the parts of one layer share."""
    return joined((*parts[:-1], parts[-1].split("__")[0]))


def keras_side(model: Any) -> Side:
    import keras

    from fwt.converters.frameworks import keras as _keras

    def run(x: np.ndarray) -> tuple[np.ndarray, Taps]:
        taps: Taps = {}

        def under(holder: Any, y: Any, inside: tuple[str, ...]) -> Any:
            for layer in holder.layers:
                if isinstance(layer, keras.layers.InputLayer):
                    continue
                if isinstance(layer, keras.Sequential):
                    y = under(layer, y, (*inside, layer.name))
                    continue
                y = layer(y, training=False) if _trains(layer) else layer(y)
                taps[layer_name((*inside, layer.name))] = keras.ops.convert_to_numpy(y)
            return y

        if isinstance(model, keras.Sequential):
            under(model, keras.ops.convert_to_tensor(x), ())
        y = model(x, training=False)
        return keras.ops.convert_to_numpy(y), taps

    shape = getattr(model, "input_shape", None)
    own = tuple(shape[1:]) if isinstance(shape, tuple) else None
    first = next((x for x in model.layers if not isinstance(x, keras.layers.InputLayer)), None)
    formats = {getattr(x, "data_format", None) for x in model.layers}
    last = "channels_first" in formats
    count = getattr(first, "input_dim", None)
    return Side(run, own, last, lambda: _keras.from_keras(model), count, turned=last)


def _trains(layer: Any) -> bool:
    import inspect

    return "training" in inspect.signature(layer.call).parameters


def torch_side(model: Any) -> Side:
    import torch

    from fwt.converters.frameworks import torch as _torch

    def run(x: np.ndarray) -> tuple[np.ndarray, Taps]:
        taps: Taps = {}
        hooks, modes = [], {m: m.training for m in model.modules()}

        def keep(name: str) -> Callable[..., None]:
            def hook(_: Any, __: Any, y: Any) -> None:
                if isinstance(y, torch.Tensor):
                    taps[layer_name(name.split("."))] = y.detach().cpu().numpy()

            return hook

        for name, module in model.named_modules():
            if name and not isinstance(module, torch.nn.Sequential | torch.nn.ModuleList):
                hooks.append(module.register_forward_hook(keep(name)))
        try:
            with torch.no_grad():
                model.eval()
                y = model(torch.from_numpy(np.ascontiguousarray(x)))
        finally:
            for hook in hooks:
                hook.remove()
            for module, training in modes.items():
                module.training = training
        return y.detach().cpu().numpy(), taps

    spatial = (
        "Conv",
        "Pool",
        "BatchNorm2d",
        "BatchNorm3d",
        "InstanceNorm",
        "GroupNorm",
        "Upsample",
    )
    kinds = [type(m).__name__ for m in model.modules()]
    turned = kinds[1:2] == ["Permute"]  # it takes the channels last itself
    first = any(k.startswith(spatial) or "Pool" in k for k in kinds) and not turned
    count = next(
        (m.num_embeddings for m in model.modules() if isinstance(m, torch.nn.Embedding)), None
    )
    starts = len(kinds) > 1 and kinds[1] == "Embedding"

    def converted() -> Model:
        return _torch.from_torch(model)

    return Side(run, None, first, converted, count if starts else None, turned=True)
