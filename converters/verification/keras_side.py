"""A Keras model as a side of ``verify``, each layer's output kept."""

import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from fwt._graph import MOVES
from fwt.converters import judge
from fwt.converters.frameworks import kept
from fwt.converters.rows.row import joined
from fwt.converters.verification.ends import Kind, channel_of, ends
from fwt.converters.verification.names import call_name, call_of, first_call, layer_name
from fwt.converters.verification.sides import (
    PARTS,
    Side,
    Taps,
    Xs,
    kinds_in,
    kinds_of,
    numbers_of,
)


def keras_side(model: Any) -> Side:
    import keras

    from fwt.converters.frameworks import keras as _keras

    # What Keras's own layers keep between calls are variables.
    own_layers = [x for x in model._flatten_layers()
                  if model.built and not type(x).__module__.startswith("keras.")]  # fmt: skip

    def run(xs: Xs, by: float = 0.0) -> tuple[Any, Taps]:
        before = [(x, kept.held(x)) for x in own_layers]
        try:
            return moved_by(xs, by)
        finally:
            for layer, was in before:
                kept.put_back(layer, was)

    def moved_by(xs: Xs, by: float) -> tuple[Any, Taps]:
        if by:
            moved = [(v, keras.ops.convert_to_tensor(
                judge.nudged(keras.ops.convert_to_numpy(v), by), dtype=v.dtype))
                for v in model.variables]  # fmt: skip
            with keras.StatelessScope(state_mapping=moved):
                return through(xs, by)
        if not model.built:
            return through(xs)
        with keras.StatelessScope():  # states that a layer keeps stay the user's
            return through(xs)

    numbers = keras.ops.convert_to_numpy
    graph = type(model).__name__ == "Functional"
    form = model._inputs_struct if graph else None
    calls = _keras_calls(model) if graph else {}
    inner = keras.Model(model.inputs, list(calls.values())) if calls else None

    def through(xs: Xs, by: float = 0.0) -> tuple[Any, Taps]:
        taps: Taps = {}
        each = [keras.ops.convert_to_tensor(x) for x in xs]
        each = [x if t is None else keras.ops.cast(x, t) for x, t in zip(each, taken(each))]
        given: Any = each[0] if len(each) == 1 else each

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
            whole = given if form is None else keras.tree.pack_sequence_as(form, each)
            y = model(whole, training=False)
        if inner is not None:
            seen = inner(each, training=False)
            seen = seen if isinstance(seen, list | tuple) else [seen]
            taps |= {name: numbers(v) for name, v in zip(calls, seen, strict=True)}
        return keras.tree.map_structure(numbers, y), taps

    def taken(xs: Sequence[Any]) -> Sequence[Any]:
        return dtypes_in if len(dtypes_in) == len(xs) else [None] * len(xs)

    dtypes_in = [x.dtype for x in getattr(model, "inputs", None) or ()]
    shape = getattr(model, "input_shape", None)
    own = tuple(shape[1:]) if isinstance(shape, tuple) else None
    flat = [x for x in model._flatten_layers(include_self=False) if not hasattr(x, "layers")]
    fed = list(_fed(model))
    first = next((x for x in fed if not _keeps(x)), None)
    formats = {getattr(x, "data_format", None) for x in flat}
    inside = "channels_first" in formats
    _, channels_first, *_ = ends("keras", kinds_in(model), inside)
    takes = [_dtype(d) for d in dtypes_in]
    several = len(takes) > 1
    found = [x for x in flat if isinstance(x, keras.layers.Embedding)
             and any(x is y for y in fed)]  # fmt: skip
    count = getattr(first, "input_dim", None) or getattr(first, "num_tokens", None)
    straight = count is not None and all(
        isinstance(x, keras.Sequential) for x in (model, *model._flatten_layers(include_self=False))
        if hasattr(x, "layers"))  # fmt: skip
    rows = [x.get_weights()[0] for x in found if not straight or x is first]
    if not straight and not rows and takes and takes[0].kind in "iu":
        count = None
    dtypes = [v.dtype for v in model.variables]
    layers = list(model._flatten_layers(include_self=False))
    computes = {str(x.compute_dtype) for x in (model, *layers)}
    names = [type(x) for x in layers], [tuple(v.shape) for v in model.variables]
    with _keras.without_tensorflow():
        settings = numbers_of("keras", ((x.name, x, _config(x)) for x in layers))
    side = Side(run, own, channels_first, lambda *_: _keras.from_keras(model), count, rows, inside,
                [_dtype(d) for d in dtypes], [_dtype(d) for d in computes],
                channels_first and not inside, names, settings, apart=bool(rows) and not straight,
                takes=takes[0] if takes else None, count=len(takes) or None)  # fmt: skip
    side.own = any(isinstance(x, keras.layers.Lambda) or type(x).__name__ in PARTS
                   or not (hasattr(x, "layers") or type(x).__module__.startswith("keras.src."))
                   for x in (*layers, *getattr(model, "operations", ())))  # fmt: skip
    side.weights = lambda: [(x.name, numbers(v)) for x in flat for v in x.weights]
    side.ends_at = _ends_at(model, inside)
    if not graph:
        return side
    ending = getattr(model, "_outputs_struct", None)
    side.names_of, side.gives = [x.name for x in model.inputs], _keras_gives(ending)
    side.by_key = isinstance(form, Mapping)
    if isinstance(form, Mapping):
        side.names_of = [str(path[0]) for path, _ in keras.tree.flatten_with_path(form)]
    if not several:
        return side
    behind = [ends("keras", (k for x in _keras_behind(model, start) for k in kinds_of(x)), inside)
              for start in model.inputs]  # fmt: skip
    return dataclasses.replace(
        side, shape=None, shapes=[tuple(x.shape[1:]) for x in model.inputs], integers=None,
        takes=takes, channels=[e.channels_first if e.has_channels else None for e in behind],
        channels_first=any(e.channels_first for e in behind), apart=False,
    )  # fmt: skip


def _ends_at(model: Any, inside: bool) -> dict[Any, int | None]:
    """The axis of each output that holds its channels."""
    import keras

    if not isinstance(model, keras.Sequential) and type(model).__name__ != "Functional":
        return {}
    if not model.built:
        return {}
    of = {id(x): x for x in model.outputs}

    def made(value: int) -> Any:
        layer, at, index = of[value]._keras_history
        if type(layer).__name__ == "InputLayer":
            return None
        takes = layer._inbound_nodes[at].input_tensors
        if hasattr(layer, "layers") and getattr(layer, "outputs", None):
            takes = [layer.outputs[index]]
        of.update((id(x), x) for x in takes)
        kinds = [Kind("Identity")] if hasattr(layer, "layers") else list(kinds_of(layer))
        return kinds[0], [id(x) for x in takes]

    form = getattr(model, "_outputs_struct", None)
    keys = form if isinstance(form, Mapping) else range(len(model.outputs))
    every = [form[key] for key in keys] if isinstance(form, Mapping) else model.outputs
    of.update((id(x), x) for x in every)
    return {key: channel_of("keras", inside, id(x), made) for key, x in zip(keys, every)}


def _keras_gives(form: Any) -> list[str] | None:
    """The names of several outputs of a Functional model."""
    if isinstance(form, Mapping):
        return list(map(str, form))
    if not isinstance(form, list | tuple) or len(form) < 2:
        return None
    return [str(x._keras_history.operation.name) for x in form if hasattr(x, "_keras_history")]


def _keras_behind(model: Any, start: Any) -> list[Any]:
    """The layers of a Functional model that follow from an input."""
    reached, out = {id(start)}, []
    for node in _keras_nodes(model):
        if any(id(x) in reached for x in node.input_tensors):
            reached |= {id(y) for y in node.outputs}
            out.append(node.operation)
    return out


# What they give holds nothing of what they take, as the ids of an array that an Embedding holds.
_MAKERS = ("ZerosLike", "OnesLike", "FullLike", "Zeros", "Ones", "Full", "Arange", "Shape")


def _fed(model: Any) -> Iterator[Any]:
    """The layers and operations of a model that follow from what it is fed, those of models inside
    too."""
    if type(model).__name__ != "Functional":
        yield from (x for x in model._flatten_layers(include_self=False)
                    if not hasattr(x, "layers"))  # fmt: skip
        return
    reached = {id(x) for x in model.inputs}
    for node in _keras_nodes(model):
        part = node.operation
        if type(part).__name__ in _MAKERS or not any(id(x) in reached for x in node.input_tensors):
            continue
        reached |= {id(y) for y in node.outputs}
        yield from _fed(part) if hasattr(part, "layers") else _parts(part)


def _parts(part: Any) -> Iterator[Any]:
    """A layer, and those that it holds; an operation alone."""
    yield from part._flatten_layers() if hasattr(part, "_flatten_layers") else (part,)


def _keeps(part: Any) -> bool:
    """Whether what it gives may be the ids that it takes."""
    own = hasattr(part, "_flatten_layers")
    return not own or type(part).__name__ in (*MOVES, "InputLayer")


def _keras_nodes(model: Any) -> list[Any]:
    """The calls of a Functional model, each behind those that it takes from."""
    by_depth = model._nodes_by_depth
    return [n for depth in sorted(by_depth, reverse=True) for n in by_depth[depth]]


def _keras_calls(model: Any) -> dict[str, Any]:
    """What each call in a Functional model gives, by the name of its layer, but for inputs and
    models inside."""
    own = set(map(id, _keras_nodes(model)))
    counts = {id(n): i for x in model.operations
              for i, n in enumerate((n for n in x._inbound_nodes if id(n) in own), 1)}  # fmt: skip
    first = {x.name for x in model.operations}
    out: dict[str, Any] = {}
    for node in _keras_nodes(model):
        layer = node.operation
        plain = type(layer).__name__ != "InputLayer" and not hasattr(layer, "layers")
        if not plain or len(node.outputs) != 1 or not hasattr(node.outputs[0], "shape"):
            continue
        takes = [getattr(x._keras_history.operation, "name", "") for x in node.input_tensors]
        name = call_name(joined((layer.name,)), takes, first_call(layer.name) in first)
        out[call_of(name, counts[id(node)])] = node.outputs[0]
    return out


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


def _trains(layer: Any) -> bool:
    return "training" in inspect.signature(layer.call).parameters
