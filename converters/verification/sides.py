"""One side of ``verify``: how a model of each framework runs, its layers' outputs kept."""

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import nnx

from fwt._sequential import Sequential, call
from fwt._types import ConversionError, Model
from fwt.converters import judge
from fwt.converters.rows import table
from fwt.converters.rows.row import Framework, is_training, joined

Taps = dict[str, np.ndarray]


@dataclasses.dataclass
class Side:
    """A model: how it runs, its input, and the model that it is in Flax.

    ``run`` takes a batch, and a part of itself by which each weight is moved; the model stays as
    it is.
    """

    run: Callable[[np.ndarray, float], tuple[np.ndarray, Taps]]
    shape: tuple[int | None, ...] | None
    channels_first: bool  # at its ends
    # For inputs of a shape, without the batch axis, and whether in the layout of the source.
    model: Callable[..., Model]
    integers: int | None = None  # the input is whole numbers below this
    tables: Sequence[Any] = ()  # of embeddings, of which these are the rows
    turned: bool = False  # whether channels may come first inside
    dtypes: Sequence[Any] = ()  # of its weights
    computes: Sequence[Any] = ()  # dtypes that it computes in and its outputs don't tell
    model_first: bool = False  # whether channels come first at the ends of its Flax model
    names: Any = None  # of its modules and weights, for models that can't be converted
    settings: Sequence[tuple[str, float]] = ()  # numbers, of such models

    def laid_out(self, channels_first: bool) -> "Side":
        """The side with channels first at its ends, or last, whatever its layers say."""
        same = self.model_first == self.channels_first
        return dataclasses.replace(
            self, channels_first=channels_first, model_first=channels_first if same else False
        )


OF_TRAINING = ("momentum", "rate", "dropout_rate", "dropout", "recurrent_dropout")
_AT_RANDOM = ("Drop", "Noise", "Random")  # parts of the names of layers that only train


def _numbers(
    framework: Framework, layers: Iterable[tuple[str, Any, Any]]
) -> list[tuple[str, float]]:
    """The floats among the settings of layers, but those of training, by place.

    Args:
        framework: theirs.
        layers: each one's name, it, and its settings, a dictionary that may hold more.
    """
    found: list[tuple[str, float]] = []

    def under(place: str, value: Any) -> None:
        if type(value) is float:
            found.append((place, value))
        pairs: Any = enumerate(value) if isinstance(value, list | tuple) else ()
        if isinstance(value, dict):
            pairs = [(k, v) for k, v in value.items() if not str(k).startswith("_")
                     and k not in OF_TRAINING and "drop" not in str(k)
                     and not is_training(framework, str(k))]  # fmt: skip
        for name, one in pairs:
            under(f"{place}: {name}" if ":" not in place else f"{place}/{name}", one)

    for place, layer, settings in layers:
        if not any(part in type(layer).__name__ for part in _AT_RANDOM):
            under(place, settings)
    return found


def takes_first(layers: Iterable[tuple[str, Sequence[int] | None, bool]], inside: bool) -> bool:
    """Whether channels come first in the input of a chain.

    Args:
        layers: each layer's class, how it permutes axes if it does, and whether it says itself
            that channels come first.
        inside: whether layers over windows have them first.
    """
    turned = False
    for kind, dims, says in layers:
        n, kind = len(dims or ()), kind.removeprefix("Parametrized")
        if n > 2 and tuple(dims or ()) in ((0, *range(2, n), 1), (0, n - 1, *range(1, n - 1))):
            turned = not turned
        if says:
            return not turned
        rows = table.rows_of("torch", kind) + table.rows_of("keras", kind)
        if kind.startswith(_WINDOWS) or "Pool" in kind or any(row.channel for row in rows):
            return inside != turned
        if kind in ("Flatten", "Unflatten", "Reshape"):
            break
    return False


_WINDOWS = ("Conv", "BatchNorm2d", "BatchNorm3d", "Upsampl", "UpSampl")


# Layers that only move numbers, behind which whole numbers stay what they are.
_MOVES = ("Reshape", "Flatten", "Unflatten", "Permute", "RepeatVector", "Identity", "Dropout",
          "Sequential")  # fmt: skip


def _permutes(layer: Any) -> tuple[int, ...] | None:
    """How a layer of Flax, torch or Keras permutes all axes."""
    dims = getattr(layer, "dims", None) if type(layer).__name__ == "Permute" else None
    if dims is None or 0 in dims:
        return None if dims is None else tuple(dims)
    return (0, *dims)  # Keras counts from the first axis behind the batch


def flax_side(model: Model) -> Side:
    if not isinstance(model.module, Sequential):
        what = f"a {type(model.module).__name__}, no fwt.Sequential"
        what = "weights alone, with no module to run" if model.module is None else what
        raise ConversionError(f"verify: the Model holds {what}")

    def run(x: np.ndarray, by: float = 0.0) -> tuple[np.ndarray, Taps]:
        taps: Taps = {}
        variables = dict(model.variables)
        if by:
            variables = jax.tree.map(lambda v: judge.nudged(v, by), variables)
        y: Any = x
        for parts, layer, own in each_layer(model.module, variables):
            y = call(layer, own, judge.unsettled(y, by) if taps else y)
            taps[layer_name(parts)] = np.asarray(y)
        return np.asarray(y), taps

    layers = [(x, own) for _, x, own in each_layer(model.module, dict(model.variables))]
    first = next((x for x, _ in layers if type(x).__name__ not in _MOVES), None)
    count = getattr(first, "num_embeddings", None) or getattr(first, "num_tokens", None)
    rows = [own["params"]["embedding"] for x, own in layers
            if count and getattr(x, "num_embeddings", None) == count]  # fmt: skip
    dtypes = [v.dtype for v in jax.tree.leaves(model.variables) if hasattr(v, "dtype")]
    told = [getattr(named.layer, "dtype", None) for named in model.module.layers]
    dtypes += [np.dtype(d) for d in told if d is not None]
    channels_first = takes_first(_kinds(model.module), False)
    return Side(run, model.module.input_shape, channels_first, lambda *_: model, count, rows,
                dtypes=dtypes, model_first=channels_first)  # fmt: skip


def _kinds(module: Any) -> Iterator[tuple[str, Any, bool]]:
    """Of each layer its class, how it permutes axes, and whether its axis is the first of one
    example."""
    for entry in module.layers:
        layer = getattr(entry, "layer", entry)
        layer = getattr(layer, "layer", layer)  # a linen layer inside nnx
        if hasattr(layer, "layers"):
            yield from _kinds(layer)
        else:
            axis = getattr(layer, "axes", getattr(layer, "axis", None))
            first = axis == 1 or (isinstance(axis, list | tuple) and list(axis) == [1])
            first = first and ("Norm" in type(layer).__name__ or "PReLU" in type(layer).__name__)
            yield type(layer).__name__, _permutes(layer), first


def each_layer(
    module: Sequential, variables: Any, inside: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """The layers of a chain in order: the parts of each one's name, the layer, its variables."""
    for named in module.layers:
        own = {c: tree[named.name] for c, tree in variables.items() if named.name in tree}
        parts = (*inside, named.name)
        if isinstance(named.layer, Sequential):
            yield from each_layer(named.layer, own, parts)
        else:
            yield parts, named.layer, own


def nnx_side(model: Any) -> Side:
    def run(x: np.ndarray, by: float = 0.0) -> tuple[np.ndarray, Taps]:
        taps: Taps = {}
        graph, state = nnx.split(model)
        copied = nnx.merge(graph, jax.tree.map(lambda v: judge.nudged(v, by), state) if by else
                           state)  # fmt: skip
        copied.eval()

        def under(holder: Any, y: Any, inside: tuple[str, ...]) -> Any:
            for index, layer in enumerate(holder.layers):
                parts = (*inside, str(index))
                if type(layer) is nnx.Sequential:
                    y = under(layer, y, parts)
                else:
                    y = layer(judge.unsettled(y, by) if taps else y)
                    taps[joined(parts)] = np.asarray(y)
            return y

        if type(copied) is nnx.Sequential:
            return np.asarray(under(copied, x, ())), taps
        return np.asarray(copied(x)), taps

    def converted(*_: Any) -> Model:
        from fwt.converters.frameworks import nnx as _nnx

        return _nnx.from_nnx(model)

    first = model.layers[0] if type(model) is nnx.Sequential and model.layers else None
    count = first.num_embeddings if isinstance(first, nnx.Embed) else None
    rows = [first.embedding[...]] if isinstance(first, nnx.Embed) else []
    dtypes = [v.dtype for v in jax.tree.leaves(nnx.state(model)) if hasattr(v, "dtype")]
    kinds = _kinds(model) if type(model) is nnx.Sequential else ()
    channels_first = takes_first(kinds, False)
    return Side(run, None, channels_first, converted, count, rows, dtypes=dtypes,
                model_first=channels_first)  # fmt: skip


def layer_name(parts: Sequence[str]) -> str:
    """The name that the parts of one layer share."""
    return joined((*parts[:-1], parts[-1].split("__")[0]))


def keras_side(model: Any) -> Side:
    import keras

    from fwt.converters.frameworks import keras as _keras

    def run(x: np.ndarray, by: float = 0.0) -> tuple[np.ndarray, Taps]:
        if by:
            moved = [(v, keras.ops.convert_to_tensor(
                judge.nudged(keras.ops.convert_to_numpy(v), by), dtype=v.dtype))
                for v in model.variables]  # fmt: skip
            with keras.StatelessScope(state_mapping=moved):
                return through(x, by)
        return through(x)

    def through(x: np.ndarray, by: float = 0.0) -> tuple[np.ndarray, Taps]:
        taps: Taps = {}

        def under(holder: Any, y: Any, inside: tuple[str, ...]) -> Any:
            for layer in holder.layers:
                if isinstance(layer, keras.layers.InputLayer):
                    continue
                if isinstance(layer, keras.Sequential):
                    y = under(layer, y, (*inside, layer.name))
                    continue
                if by and taps:
                    y = keras.ops.convert_to_numpy(y)
                    y = keras.ops.convert_to_tensor(judge.unsettled(y, by).astype(y.dtype))
                y = layer(y, training=False) if _trains(layer) else layer(y)
                taps[layer_name((*inside, layer.name))] = keras.ops.convert_to_numpy(y)
            return y

        chain = isinstance(model, keras.Sequential)
        y = under(model, keras.ops.convert_to_tensor(x), ()) if chain else None
        if y is None or not by:
            y = model(x, training=False)
        return keras.ops.convert_to_numpy(y), taps

    shape = getattr(model, "input_shape", None)
    own = tuple(shape[1:]) if isinstance(shape, tuple) else None
    flat = [x for x in model._flatten_layers(include_self=False) if not hasattr(x, "layers")]
    moves = (*_MOVES, "InputLayer")
    first = next((x for x in flat if type(x).__name__ not in moves), None)
    formats = {getattr(x, "data_format", None) for x in flat}
    inside = "channels_first" in formats
    channels_first = takes_first(_kinds(model), inside)
    taken = getattr(next(iter(getattr(model, "inputs", None) or ()), None), "dtype", "float32")
    found = [x for x in flat if isinstance(x, keras.layers.Embedding)]
    whole = some_integers(_dtype(taken))
    count = getattr(first, "input_dim", None) or (found[0].input_dim if whole and found else whole)
    rows = [x.get_weights()[0] for x in found if x.input_dim == count]
    dtypes = [v.dtype for v in model.variables]
    layers = list(model._flatten_layers(include_self=False))
    computes = {str(x.compute_dtype) for x in (model, *layers)}
    names = [type(x) for x in layers], [tuple(v.shape) for v in model.variables]
    with _keras.without_tensorflow():
        settings = _numbers("keras", ((x.name, x, _config(x)) for x in layers))
    return Side(run, own, channels_first, lambda *_: _keras.from_keras(model), count, rows, inside,
                [_dtype(d) for d in dtypes], [_dtype(d) for d in computes],
                channels_first and not inside, names, settings)  # fmt: skip


def _config(layer: Any) -> Any:
    try:
        return {} if hasattr(layer, "layers") else layer.get_config()
    except NotImplementedError:  # of a user's own class
        return {}


def _dtype(name: Any) -> Any:
    """A dtype by its name; one of no floats for what NumPy does not know."""
    try:
        return jax.numpy.dtype(name)
    except TypeError:
        return np.dtype(bool)


def some_integers(dtype: Any) -> int | None:
    """How many whole numbers an input takes, if its dtype is one of them."""
    return 10 if np.dtype(dtype).kind in "iu" else None


def _trains(layer: Any) -> bool:
    import inspect

    return "training" in inspect.signature(layer.call).parameters


def torch_side(model: Any) -> Side:
    import torch

    from fwt.converters.frameworks import torch as _torch

    model = _torch.unwrapped(model)
    weights = [w for w in (*model.parameters(), *model.buffers()) if w.is_floating_point()]

    def run(x: np.ndarray, by: float = 0.0) -> tuple[np.ndarray, Taps]:
        given = tensor(x)
        if weights:
            like = weights[0]
            given = given.to(like.device, like.dtype if given.is_floating_point() else None)
        if not by:
            return through(model, given)
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for w in itertools.chain(moved.parameters(), moved.buffers()):
                if w.is_floating_point():
                    w.copy_(tensor(judge.nudged(array(w), by)))
        return through(moved, given, by)

    def through(model: Any, given: Any, by: float = 0.0) -> tuple[np.ndarray, Taps]:
        taps: Taps = {}
        hooks, modes = [], {m: m.training for m in model.modules()}

        def keep(name: str) -> Callable[..., None]:
            def hook(_: Any, __: Any, y: Any) -> None:
                if isinstance(y, torch.Tensor):
                    taps[layer_name(name.split("."))] = array(y)

            return hook

        def unsettled(_: Any, args: Any) -> Any:
            if len(args) != 1 or args[0] is given or not isinstance(args[0], torch.Tensor):
                return None
            if not args[0].is_floating_point():
                return None
            return tensor(judge.nudged(array(args[0]), by)).to(args[0])

        for name, module in model.named_modules():
            if name and not isinstance(module, torch.nn.Sequential | torch.nn.ModuleList):
                if by and not list(module.children()):
                    hooks.append(module.register_forward_pre_hook(unsettled))
                hooks.append(module.register_forward_hook(keep(name)))
        try:
            with torch.no_grad():
                model.eval()
                y = model(given)
        finally:
            for hook in hooks:
                hook.remove()
            for module, training in modes.items():
                module.training = training
        return array(y), taps

    def tensor(x: np.ndarray) -> Any:
        """A copy, for a layer may work in place."""
        return torch.tensor(x.astype(np.float32) if x.dtype == ml_dtypes.bfloat16 else x)

    def array(y: Any) -> np.ndarray:
        y = y.detach().cpu().clone()  # the next layer may work in place
        if y.dtype == torch.bfloat16:
            return y.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return y.numpy()

    kinds = ((type(m).__name__, _permutes(m), False) for m in model.modules())
    channels_first = takes_first(kinds, True)
    leaves = [m for m in model.modules() if not list(m.children())]
    leaf: Any = next((m for m in leaves if type(m).__name__ not in _MOVES), None)
    count = leaf.num_embeddings if isinstance(leaf, torch.nn.Embedding) else None
    found = [m for m in leaves if isinstance(m, torch.nn.Embedding)]
    rows = [array(m.weight) for m in found if m.num_embeddings == count]

    modules = [(name, type(module)) for name, module in model.named_modules()]
    names = modules, [(name, getattr(w, "shape", ())) for name, w in model.state_dict().items()]

    own = ((name or type(m).__name__, m, vars(m)) for name, m in model.named_modules())
    settings = _numbers("torch", own)

    def converted(shape: tuple[int, ...], source: bool = False) -> Model:
        how: dict[str, Any] = {"layout": "source"} if source else {}
        return _torch.from_torch(model, input_shape=shape, **how)

    return Side(run, None, channels_first, converted, count, rows, True,
                [array(w.flatten()[:1]).dtype for w in weights], names=names,
                settings=settings)  # fmt: skip
