"""One side of ``verify``: how a model of each framework runs, its layers' outputs kept."""

import copy
import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import nnx

from fwt._graph import Graph, Node, end_of, inputs_of, may_hold, names_in, nodes_of
from fwt._sequential import Sequential, call
from fwt._types import ConversionError, Model
from fwt.converters import judge
from fwt.converters.rows.row import Framework, is_training, joined, parts_of
from fwt.converters.verification.ends import Kind, ends
from fwt.layers import Parameter

Taps = dict[str, np.ndarray]


@dataclasses.dataclass
class Side:
    """A model: how it runs, its input, and the model that it is in Flax.

    ``run`` takes a batch, and a part of itself by which each weight is moved; the model stays as
    it is. It is asked through ``outputs``.
    """

    run: Callable[[np.ndarray, float], tuple[np.ndarray, Taps]]
    shape: tuple[int | None, ...] | None
    channels_first: bool  # at its ends
    # For inputs of a shape, without the batch axis, and whether in the layout of the source.
    model: Callable[..., Model]
    integers: int | None = None  # the input is whole numbers, below this if straight into a table
    tables: Sequence[Any] = ()  # of embeddings, of which these are the rows
    turned: bool = False  # whether channels may come first inside
    dtypes: Sequence[Any] = ()  # of its weights
    computes: Sequence[Any] = ()  # dtypes that it computes in and its outputs don't tell
    model_first: bool = False  # whether channels come first at the ends of its Flax model
    names: Any = None  # of its modules and weights, for models that can't be converted
    settings: Sequence[tuple[str, float, int]] = ()  # numbers, each with the index of its layer
    time_first: bool = False  # whether the batch is the second axis, of sequences
    told: bool = True  # whether a layer tells that
    along: Any = None  # gives ``run`` and ``shape`` for the axis that the batch is, if it matters
    takes: Any = None  # the dtype that its input is cast to, if it says one
    clamps: bool = False  # whether its functions end where others go on
    apart: bool = False  # whether its tables are not known to be fed the input as it is

    def swaps(self, x: np.ndarray) -> bool:
        """Whether it takes the axes 0 and 1 of a batch the other way round."""
        return self.time_first and (x.ndim > 2 or (x.ndim == 2 and x.dtype.kind in "iu"))

    def outputs(self, x: np.ndarray, by: float = 0.0) -> tuple[np.ndarray, Taps]:
        """What it gives for a batch (n, ...): its output and those of its layers, (n, ...)."""
        if not self.swaps(x):
            return self.run(x, by)
        count = len(x)
        if count == x.shape[1]:  # one row more tells the batch from the time
            x = np.concatenate([x, x[-1:]])

        def back(v: np.ndarray) -> np.ndarray:
            if v.ndim > 1 and v.shape[0] != len(x) and v.shape[1] == len(x):
                v = np.ascontiguousarray(v.swapaxes(0, 1))
            return v[:count] if v.ndim and v.shape[0] == len(x) else v

        y, taps = self.run(np.ascontiguousarray(x.swapaxes(0, 1)), by)
        return back(y), {name: back(v) for name, v in taps.items()}

    def timed(self, first: bool) -> "Side":
        """The side with the time first, or the batch."""
        given = {} if self.along is None else dict(zip(("run", "shape"), self.along(int(first)),
                                                       strict=True))  # fmt: skip
        return dataclasses.replace(self, time_first=first, **given)

    def laid_out(self, channels_first: bool) -> "Side":
        """The side with channels first at its ends, or last, whatever its layers say."""
        same = self.model_first == self.channels_first
        return dataclasses.replace(
            self, channels_first=channels_first, model_first=channels_first if same else False
        )


OF_TRAINING = ("momentum", "rate", "dropout_rate", "dropout", "recurrent_dropout")
_OF_DRAWS = ("_initializer", "_regularizer", "_constraint", "seed")
_AXES = re.compile(r"(?:: |/)[^:]*(dim|axis|axes)[^:]*$")
_AT_RANDOM = ("Drop", "Noise", "Random")  # parts of the names of layers that only train


def _numbers(
    framework: Framework, layers: Iterable[tuple[str, Any, Any]]
) -> list[tuple[str, float, int]]:
    """The numbers among the settings of layers, but those of training, by place. Of whole ones,
    those that name axes are left out, for an axis has two numbers.

    Args:
        framework: theirs.
        layers: each one's name, it, and its settings, a dictionary that may hold more.
    """
    found: list[tuple[str, float, int]] = []

    def under(place: str, value: Any, at: int) -> None:
        if type(value) is float or (type(value) is int and not _AXES.search(place)):
            found.append((place, value, at))
        pairs: Any = enumerate(value) if isinstance(value, list | tuple) else ()
        if isinstance(value, dict):
            pairs = [(k, v) for k, v in value.items() if not str(k).startswith("_")
                     and k not in (*OF_TRAINING, "padding_idx") and "drop" not in str(k)
                     and not str(k).endswith(_OF_DRAWS)
                     and not is_training(framework, str(k))]  # fmt: skip
        for name, one in pairs:
            under(f"{place}: {name}" if ":" not in place else f"{place}/{name}", one, at)

    for at, (place, layer, settings) in enumerate(layers):
        if not any(part in type(layer).__name__ for part in _AT_RANDOM):
            under(place, settings, at)
    return found


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
    if not isinstance(model.module, Sequential | Graph):
        return _linen_side(model)
    starts = inputs_of(model.module)
    if len(starts) > 1:
        raise ConversionError(f"verify: the Model takes {len(starts)} arrays, and verify feeds one")

    def run(x: np.ndarray, by: float = 0.0) -> tuple[np.ndarray, Taps]:
        taps: Taps = {}
        variables = dict(model.variables)
        if by:
            variables = jax.tree.map(lambda v: judge.nudged(v, by), variables)
        values: dict[str, Any] = {starts[0]: x}
        for node, layer, own in each_layer(model.module, variables):
            given = [values[i] if i in starts else judge.unsettled(values[i], by)
                     for i in node.inputs]  # fmt: skip
            values[node.name] = y = call(layer, own, *given)
            taps[layer_name(parts_of(node.name))] = np.asarray(y)
        end = end_of(model.module)
        keys = end if isinstance(end, Mapping) else range(len(names_in(end)))
        gives = dict(zip(keys, (values[n] for n in names_in(end)), strict=True))
        y, further = outputs(gives, np.asarray)
        return y, taps | further

    layers = [(x, own) for _, x, own in each_layer(model.module, dict(model.variables))]
    first = next((x for x, _ in layers if type(x).__name__ not in _MOVES), None)
    count = getattr(first, "num_embeddings", None) or getattr(first, "num_tokens", None)
    rows = [own["params"]["embedding"] for x, own in layers
            if count and getattr(x, "num_embeddings", None) == count]  # fmt: skip
    settings = _numbers("flax", ((n.name, x, _fields(x))
                                 for n, x, _ in each_layer(model.module, {})))  # fmt: skip
    dtypes = [v.dtype for v in jax.tree.leaves(model.variables) if hasattr(v, "dtype")]
    told = [getattr(x, "dtype", None) for x, _ in layers]
    dtypes += [np.dtype(d) for d in told if d is not None]
    kinds = [kind for x, _ in layers for kind in _kinds_of(x)]
    time_first, channels_first, told_batch = ends("flax", kinds, False)
    return Side(run, model.module.input_shape, channels_first, lambda *_: model, count, rows,
                dtypes=dtypes, model_first=channels_first, settings=settings,
                time_first=time_first, told=told_batch)  # fmt: skip


class Further(str):
    """The name of an output beside the first."""


def outputs(y: Any, array: Callable[[Any], np.ndarray]) -> tuple[np.ndarray, Taps]:
    """The first output of a model, and by name those beside it, each of which is judged by its
    own scale; those of a dict in the order of their keys."""
    if isinstance(y, Mapping):
        y = [y[key] for key in sorted(y)]
    first, *others = y if isinstance(y, list | tuple) else [y]
    further: Taps = {Further(f"output {i} of the model"): array(v)
                     for i, v in enumerate(others, 2)}  # fmt: skip
    return array(first), further


def _linen_side(model: Model) -> Side:
    """A linen module of the user's own, of which only the output is known."""
    module, what = model.module, type(model.module).__name__
    if not hasattr(module, "apply"):
        what = f"a {what}, no module" if module is not None else "weights alone"
        raise ConversionError(f"verify: the Model holds {what}, which can't run")

    def run(x: np.ndarray, by: float = 0.0) -> tuple[np.ndarray, Taps]:
        variables = dict(model.variables)
        if by:
            variables = jax.tree.map(lambda v: judge.nudged(v, by), variables)
        y = module.apply(variables, x)
        if not hasattr(y, "shape"):
            raise ConversionError(f"its output is a {type(y).__name__}, and not one array")
        return np.asarray(y), {}

    def converted(*_: Any) -> Model:
        raise ConversionError(f"{what} is no fwt.Sequential, so that only outputs are compared")

    rows = _tables(model.variables)
    dtypes = [v.dtype for v in jax.tree.leaves(model.variables) if hasattr(v, "dtype")]
    return Side(run, None, False, converted, None, rows, dtypes=dtypes, told=False,
                apart=bool(rows))  # fmt: skip


def _tables(tree: Any) -> list[Any]:
    """The tables of embeddings in a tree."""
    ends = ((k[-1:], v) for k, v in jax.tree.leaves_with_path(tree))
    names = ((getattr(k[0], "key", None) if k else None, v) for k, v in ends)
    return [v for name, v in names if name == "embedding" and np.ndim(v) == 2]


def _fields(layer: Any) -> dict[str, Any]:
    fields = dataclasses.fields(layer) if dataclasses.is_dataclass(layer) else ()
    return {f.name: getattr(layer, f.name) for f in fields if f.name not in ("parent", "name")}


def _kinds(module: Any) -> Iterator[Kind]:
    """What each layer of a Flax, nnx or Keras model tells of its axes."""
    for entry in module.layers:
        layer = getattr(entry, "layer", entry)
        layer = getattr(layer, "layer", layer)  # a linen layer inside nnx
        yield from _kinds_of(layer)


def _kinds_of(layer: Any) -> Iterator[Kind]:
    if hasattr(layer, "layers"):
        yield from _kinds(layer)
    else:
        axis = getattr(layer, "axes", getattr(layer, "axis", None))
        first = axis == 1 or (isinstance(axis, list | tuple) and list(axis) == [1])
        first = first and ("Norm" in type(layer).__name__ or "PReLU" in type(layer).__name__)
        yield Kind(type(layer).__name__, _permutes(layer), first)


def each_layer(module: Any, variables: Any) -> Iterator[tuple[Node, Any, Any]]:
    """The nodes of a model in order, each with its layer and the variables of that."""
    layers = {n.name: n.layer for n in nodes_of(module)}
    for node in nodes_of(module):
        name = node.of or node.name
        own: dict[str, Any] = {}
        for collection, tree in variables.items() if may_hold(layers[name]) else ():
            held: Any = tree
            for part in parts_of(name):
                held = held.get(part, {}) if isinstance(held, Mapping) else {}
            if isinstance(layers[name], Parameter) and not isinstance(held, Mapping):
                held = {"value": held}
            if held:
                own[collection] = held
        yield node, layers[name], own


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

    first: Any = model
    while type(first) is nnx.Sequential and first.layers:
        first = first.layers[0]
    count = first.num_embeddings if isinstance(first, nnx.Embed) else None
    rows = [first.embedding[...]] if isinstance(first, nnx.Embed) else []
    dtypes = [v.dtype for v in jax.tree.leaves(nnx.state(model, nnx.Not(nnx.RngState)))
              if hasattr(v, "dtype")]  # fmt: skip
    kinds = _kinds(model) if type(model) is nnx.Sequential else ()
    time_first, channels_first, told_batch = ends("flax", kinds, False)
    return Side(run, None, channels_first, converted, count, rows, dtypes=dtypes,
                model_first=channels_first, time_first=time_first,
                told=told_batch)  # fmt: skip


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
        if not model.built:
            return through(x)
        with keras.StatelessScope():  # states that a layer keeps stay the user's
            return through(x)

    numbers = keras.ops.convert_to_numpy
    graph = type(model).__name__ == "Functional"
    once = [x for x in model.operations if _has_one_output(x)] if graph else []
    inner = keras.Model(model.inputs, [x.output for x in once]) if once else None

    def through(x: np.ndarray, by: float = 0.0) -> tuple[np.ndarray, Taps]:
        taps: Taps = {}
        given = keras.ops.convert_to_tensor(x)
        given = given if taken is None else keras.ops.cast(given, taken)

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

        if isinstance(model, keras.Sequential):
            y = under(model, given, ())
        if not by or not isinstance(model, keras.Sequential):
            y = model(given, training=False)
        if inner is not None:
            seen = inner(given, training=False)
            seen = seen if isinstance(seen, list | tuple) else [seen]
            taps |= {layer_name((x.name,)): numbers(v) for x, v in zip(once, seen, strict=True)}
        found, further = outputs(y, numbers)
        return found, taps | further

    shape = getattr(model, "input_shape", None)
    own = tuple(shape[1:]) if isinstance(shape, tuple) else None
    flat = [x for x in model._flatten_layers(include_self=False) if not hasattr(x, "layers")]
    moves = (*_MOVES, "InputLayer")
    first = next((x for x in flat if type(x).__name__ not in moves), None)
    formats = {getattr(x, "data_format", None) for x in flat}
    inside = "channels_first" in formats
    _, channels_first, _ = ends("keras", _kinds(model), inside)
    taken = getattr(next(iter(getattr(model, "inputs", None) or ()), None), "dtype", None)
    found = [x for x in flat if isinstance(x, keras.layers.Embedding)]
    count = getattr(first, "input_dim", None) or getattr(first, "num_tokens", None)
    straight = count is not None and all(
        isinstance(x, keras.Sequential) for x in (model, *model._flatten_layers(include_self=False))
        if hasattr(x, "layers"))  # fmt: skip
    rows = [x.get_weights()[0] for x in found if not straight or x is first]
    if not straight and not rows and _dtype(taken or "float32").kind in "iu":
        count = None
    dtypes = [v.dtype for v in model.variables]
    layers = list(model._flatten_layers(include_self=False))
    computes = {str(x.compute_dtype) for x in (model, *layers)}
    names = [type(x) for x in layers], [tuple(v.shape) for v in model.variables]
    with _keras.without_tensorflow():
        settings = _numbers("keras", ((x.name, x, _config(x)) for x in layers))
    return Side(run, own, channels_first, lambda *_: _keras.from_keras(model), count, rows, inside,
                [_dtype(d) for d in dtypes], [_dtype(d) for d in computes],
                channels_first and not inside, names, settings, apart=bool(rows) and not straight,
                takes=taken and _dtype(taken))  # fmt: skip


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


def _has_one_output(layer: Any) -> bool:
    """Whether a layer or an operation of a Functional model is called once, and is no model and no
    input."""
    plain = type(layer).__name__ != "InputLayer" and not hasattr(layer, "layers")
    return plain and len(layer._inbound_nodes) == 1 and hasattr(layer.output, "shape")


def _trains(layer: Any) -> bool:
    import inspect

    return "training" in inspect.signature(layer.call).parameters


def torch_side(model: Any) -> Side:
    import torch

    from fwt.converters.frameworks import torch as _torch
    from fwt.converters.frameworks import torch_state, torch_wrappers

    model = torch_wrappers.plain(model)
    counts: set[tuple[str, str]] = set()  # attributes that a forward changes
    weights = [w for w in (*model.parameters(), *model.buffers()) if w.is_floating_point()]

    def run(x: np.ndarray, by: float = 0.0) -> tuple[np.ndarray, Taps]:
        given = tensor(x)
        if weights:
            like = weights[0]
            floats = given.is_floating_point() or numbers
            given = given.to(like.device, like.dtype if floats else None)
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
        hooks, held = [], [(m, torch_state.held(m)) for m in model.modules()]

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
            for module, before in held:
                changed = torch_state.put_back(module, before)
                counts.update((type(module).__name__, name) for name in changed)
            settings[:] = [each for each in settings if not counted(each[0])]
        found, further = outputs(y, array)
        return found, taps | further

    def tensor(x: np.ndarray) -> Any:
        """A copy, for a layer may work in place."""
        return torch.tensor(x.astype(np.float32) if x.dtype == ml_dtypes.bfloat16 else x)

    def array(y: Any) -> np.ndarray:
        y = y.detach().cpu().clone()  # the next layer may work in place
        if y.dtype == torch.bfloat16:
            return y.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return y.numpy()

    kinds_of = map(_torch_kind, model.modules())
    time_first, channels_first, told_batch = ends("torch", kinds_of, True)
    # Only of a chain is it known what stands before a layer.
    chain = isinstance(model, torch.nn.Sequential | torch.nn.TransformerEncoder)
    leaves = [m for m in model.modules() if not list(m.children())]
    leaf: Any = next((m for m in leaves if type(m).__name__ not in _MOVES), None)
    kinds = torch.nn.Embedding | torch.nn.EmbeddingBag
    count = leaf.num_embeddings if isinstance(leaf, kinds) else None
    numbers = chain and not isinstance(leaf, kinds)
    first: Any = model
    while isinstance(first, torch.nn.Sequential):
        first = next((m for m in first if isinstance(m, torch.nn.Sequential)
                      or type(m).__name__ not in _MOVES), None)  # fmt: skip
    straight = first is leaf
    tabled = [m for m in leaves if isinstance(m, kinds) and (m is leaf or not straight)]
    rows = [array(m.weight) for m in tabled if count is not None]

    modules = [(name, type(module)) for name, module in model.named_modules()]
    names = modules, [(name, getattr(w, "shape", ())) for name, w in model.state_dict().items()]

    own = ((name or type(m).__name__, m, vars(m)) for name, m in model.named_modules())
    settings = _numbers("torch", own)
    kind_of = {name or type(m).__name__: type(m).__name__ for name, m in model.named_modules()}

    def counted(place: str) -> bool:
        layer, _, name = place.partition(": ")
        return (kind_of[layer], name.split("/")[0]) in counts

    def converted(shape: tuple[int, ...], source: bool = False) -> Model:
        how: dict[str, Any] = {"layout": "source"} if source else {}
        return _torch.from_torch(model, input_shape=shape, **how)

    return Side(run, None, channels_first, converted, count, rows, True,
                [array(w.flatten()[:1]).dtype for w in weights], names=names,
                settings=settings, time_first=time_first and chain, told=told_batch and chain,
                apart=bool(rows) and not straight,
                takes=array(weights[0].flatten()[:1]).dtype if weights else None)  # fmt: skip


def _torch_kind(module: Any) -> Kind:
    # A layer of an encoder leaves it to its attention.
    first = getattr(getattr(module, "self_attn", module), "batch_first", None)
    batch = 1 - first if isinstance(first, bool) else None
    own = not str(type(module).forward.__module__).startswith(("torch.", "fwt."))
    return Kind(type(module).__name__, _permutes(module), batch=batch, turns=own)
