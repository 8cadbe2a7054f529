"""Live Keras models, on any backend."""

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import keras
import ml_dtypes
import numpy as np

from fwt import _tree
from fwt._types import ConversionError, Model
from fwt.converters.frameworks import (
    activations,
    altered,
    keras_config,
    keras_custom,
    keras_forms,
    keras_ops,
    keras_read,
    keras_write,
)
from fwt.converters.frameworks import flax as _flax
from fwt.converters.frameworks import given as _given
from fwt.converters.rows import grouped, table
from fwt.converters.rows.row import TRAINING, Layer, LiveLeaf, order, own_names, parts_of, refuse
from fwt.converters.walk import convert
from fwt.converters.walk.convert import Layout
from fwt.converters.walk.net import Net


def _arrays(layer: Any, place: str) -> dict[str, Any]:
    """The arrays that a layer computes with, by the names of its variables."""
    out: dict[str, Any] = {}
    # The innermost owner of each variable comes last.
    owners = {id(v): x for x in layer._flatten_layers(recursive=True) for v in x.variables}
    for name, variable in _named(layer):
        value = _computed(owners[id(variable)], variable, place)
        if value is None:
            continue
        if name in out and name != "seed_generator_state":
            raise refuse(place, f"two variables are named {name!r}")
        out[name] = value
    return out


def _computed(owner: Any, variable: Any, place: str) -> np.ndarray | None:
    """What a layer computes with under the name of its variable: mostly that, a LoRA's sum, or a
    constant made of it earlier. None for a part of such a sum, and for what nothing is computed
    with any more."""
    name = variable.name
    if name.startswith("lora_") and getattr(owner, "lora_enabled", False):
        return None
    used = getattr(owner, name, variable)
    if used is None:
        raise refuse(place, f"its {name} is None, though it has a variable of that name",
                     "make a new layer without it")  # fmt: skip
    if used is not variable and any(used is v for v in owner.variables):
        return None  # it was built once more
    tensor = isinstance(used, keras.Variable | np.ndarray) or keras.ops.is_tensor(used)
    value = np.asarray(keras.ops.convert_to_numpy(used if tensor else variable))
    if value.size != math.prod(variable.shape):
        raise refuse(place, f"its {name} has shape {value.shape}, its variable {variable.shape}")
    return value.reshape(variable.shape)


@contextlib.contextmanager
def without_tensorflow() -> Iterator[None]:
    """Keras looks for TensorFlow's objects in each config, and imports it for that, whatever its
    backend: where nobody has imported it, nobody has an object of it."""
    lazy = getattr(sys.modules.get("keras.src.utils.module_utils"), "tensorflow", None)
    if "tensorflow" in sys.modules or getattr(lazy, "_available", True) is not None:
        yield
        return
    assert lazy is not None
    lazy._available = False
    try:
        yield
    finally:
        lazy._available = None


def _check_plain(layer: Any, place: str) -> None:
    for part in layer._flatten_layers(recursive=True):
        if mode := getattr(part, "quantization_mode", None):
            raise refuse(
                place,
                f"{part.name} is quantised ({mode}): it computes with other numbers than it holds",
                "take the model as it was before",
            )


def _named(layer: Any) -> list[tuple[str, Any]]:
    """The variables of a layer, those of attention as ``query/kernel``."""
    heads = (keras.layers.MultiHeadAttention, keras.layers.GroupQueryAttention)
    count = 2 if isinstance(layer, heads) else 1
    seed = "seed_generator_state"
    if type(layer).__name__ in keras_ops.HOME:  # which gives its variables no names
        return [(n, getattr(layer, n)) for n in keras_ops.VARIABLES[type(layer).__name__]]
    return [
        (v.name if v.name == seed else "/".join(v.path.split("/")[-count:]), v)
        for v in layer.variables
    ]


def from_keras(
    model: Any,
    layout: Layout = "channels_last",
    *,
    sidecar: bool = False,
    dtype: Literal["float32", "float16", "bfloat16", "float64"] | None = None,
) -> Model:
    """A Keras Sequential or Functional model as a Flax model with the same predictions.

    One that is a straight line of layers becomes a :class:`fwt.Sequential`, any other a
    :class:`fwt.Graph`. An ``activation=`` inside a layer becomes a layer named
    ``<layer>__activation``; :func:`to_keras` puts it back.

    Args:
        model: a built Keras model; the names of its layers are kept, those in a model inside behind
            its name.
        layout: what the new model's input and output look like: "channels_last" or
            "channels_first" where a layer proves which axis holds the channels, or "source".
        sidecar: whether to keep what Flax has no place for (seeds, initializers, regularizers,
            what is trained) in ``module.sidecar``, so that :func:`to_keras` gives it back; ``save``
            writes it along.
        dtype: "float32", ... for a model that computes in it with weights in it, whatever the
            policies of its layers. None, the default, keeps these as ``dtype`` and ``param_dtype``.

    Returns:
        ``Model(module, variables)`` with NumPy leaves.

    Raises:
        ConversionError: for any layer, setting or array that can't be converted exactly, by name.

    Example:
        >>> import keras, numpy as np
        >>> net = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="dense")])
        >>> module, variables = from_keras(net)
        >>> bool((variables["params"]["dense"]["kernel"] == net.layers[0].kernel).all())
        True
    """
    if not _is_container(model):
        own = isinstance(model, keras.Model)
        way = ("where its call takes one tensor through Keras layers, x = keras.Input(shape) and "
               "keras.Model(x, model.call(x)) make one; " if own else "")  # fmt: skip
        raise ConversionError(
            f"from_keras takes a keras.Sequential or a Functional model, found {_dotted(model)}; "
            f"{way}to change the weights of any Keras model in place, use "
            "converters.transform(model, t)"
        )
    if not model.built:
        raise ConversionError(
            f"{model.name} has no weights yet: build it, model.build((None, ...)), or give it a "
            "keras.Input"
        )
    net = net_of(model)
    made = _flax.write_flax(convert.convert(net, "keras", "flax", layout))
    if sidecar:
        made = keras_config.with_sidecar(made, net, layout)
    return keras_config.marked(_flax.in_dtype(made, dtype), net)


def _is_container(model: Any) -> bool:
    """A Sequential or a Functional model of Keras's own, not of a class of the user's."""
    cls = type(model)
    own = cls.__module__.partition(".")[0] == "keras"
    return isinstance(model, keras.Model) and own and cls.__name__ in keras_read.CONTAINERS


@without_tensorflow()
def net_of(model: Any) -> Net:
    """The net of a live model with its arrays."""
    sync(model)
    net = keras_read.keras_net(_config(model), model.name)
    places: dict[int, str] = {}
    for layer in net.layers:
        if layer.group and not layer.of:
            live = model
            for part in parts_of(layer.name):
                live = live.get_layer(part)
            first = places.setdefault(id(live), layer.name)
            if first != layer.name and live.weights:
                raise refuse(str(layer), f"it is the layer {first} too, in another model: each "
                             "would have weights of its own",
                             "call it in one of the models only")  # fmt: skip
            _fill(layer, live)
    return keras_config.shared(net)


def _dotted(model: Any) -> str:
    """The class of what was given: a model of tf_keras has the same name as one of Keras."""
    name = f"{type(model).__module__}.{type(model).__name__}"
    return f"{name}, of Keras 2: save it, and load the file" if name[:8] == "tf_keras" else name


def sync(model: Any) -> None:
    """Brings the values home that Keras keeps elsewhere while it trains on JAX."""
    if hasattr(model, "jax_state_sync"):
        model.jax_state_sync()


def _check_globals(layer: Layer) -> None:
    """Refuses what Keras computes otherwise under its present settings and backend."""
    least = layer.kind == "Normalization" or layer.settings.get("normalize")
    if least and keras.config.epsilon() != _EPSILON:
        raise refuse(str(layer), f"it divides by at least keras.config.epsilon(), which is "
                     f"{keras.config.epsilon():g}", f"set it to {_EPSILON:g}")  # fmt: skip
    pads = layer.kind.startswith("AveragePooling") and layer.settings.get("padding") == "same"
    if pads and keras.backend.backend() == "torch":
        raise refuse(str(layer), "on its torch backend Keras counts what padding='same' adds, and "
                     "no other does", "take another KERAS_BACKEND")  # fmt: skip


_EPSILON = 1e-7  # Keras's own


def _fill(layer: Layer, live: Any) -> None:
    """The arrays of a live layer, and of what it wraps."""
    _check_globals(layer)
    if not layer.inner:
        _check_plain(live, str(layer))
        layer.arrays = _arrays(live, str(layer))
        if getattr(live, "lora_enabled", False):  # whose sum is the kernel
            for name in ("lora_rank", "lora_alpha"):
                layer.settings.pop(name, None)
        return
    roles: tuple[str, ...] = ("layer",)
    if layer.kind == "Bidirectional":
        roles = ("forward_layer", "backward_layer")
    elif layer.kind == "RNN":
        roles = ("cell",)
        if layer.inner[0].kind == "StackedRNNCells":
            raise refuse(str(layer), "only an RNN over one SimpleRNNCell, LSTMCell or GRUCell is "
                         "known", "make an RNN of each cell, one after the other")  # fmt: skip
    for part, role in zip(layer.inner, roles, strict=True):
        _fill(part, getattr(live, role))


def _config(model: Any) -> dict[str, Any]:
    """As ``keras.saving.serialize_keras_object`` has it, but for known classes only."""
    _check_methods(model)
    if not isinstance(model, keras.Sequential):
        for layer in model.layers:
            _check_known(layer)
        for operation in (x for x in model.operations if not isinstance(x, keras.Layer)):
            keras_custom.check_config(operation)
        config = keras_custom.told(model.get_config(), model.layers, keras.dtype_policies.serialize)
        return {"class_name": "Functional", "config": config}
    shape = [None, *model.input_shape[1:]]
    given = {"batch_shape": shape, "dtype": model.inputs[0].dtype, "name": "input"}
    entries: list[Any] = [{"class_name": "InputLayer", "config": given}]
    for layer in model.layers:
        _check_known(layer)
        inside = isinstance(layer, keras.Sequential)
        entry = _config(layer) if inside else keras.saving.serialize_keras_object(layer)
        if inside:
            entry["config"]["name"] = layer.name
        entries.append(entry)
    config = {"layers": entries, "build_input_shape": shape}
    keras_custom.told(config, model.layers, keras.dtype_policies.serialize)
    return {"class_name": "Sequential", "config": config}


def _check_methods(layer: Any) -> None:
    """Raises where a method of a layer, or of one inside it, is the user's own."""
    for part in layer._flatten_layers(recursive=True):
        # What Keras itself puts on each layer, and compile on a model.
        compiled = ("loss",) if isinstance(part, keras.Model) else ()
        altered.check_methods(part, part.name, ("build", "quantize", *compiled))


def _check_known(layer: Any) -> None:
    cls = type(layer)
    _check_methods(layer)
    if _is_container(layer):
        keras_forms.check_keys(layer)
        for inner in layer.layers:
            _check_known(inner)
        return
    custom = table.CUSTOM["keras"].get(cls.__name__)
    beside = (cls.__name__, cls.__module__) in keras_ops.BESIDE
    public = {own: name for name, own in keras_ops.CLASSES.items()}.get(cls.__name__, cls.__name__)
    if not beside and cls is not (custom or getattr(keras.layers, public, None)):
        raise refuse(
            layer.name,
            f"{cls.__module__}.{cls.__name__} is a custom layer, which can't be converted",
            "converters.register(row) makes it known",
        )
    if custom:
        keras_custom.check_config(layer)
    if isinstance(layer, keras.layers.MultiHeadAttention | keras.layers.GroupQueryAttention):
        _check_attention(layer)
    _check_config(layer)
    _check_activations(layer)
    for role in ("layer", "forward_layer", "backward_layer", "cell"):
        if role == "cell" and cls is not keras.layers.RNN:
            continue
        wrapped = getattr(layer, role, None)
        if isinstance(wrapped, keras.layers.Layer):
            name = type(wrapped).__name__
            if getattr(keras.layers, name, None) is not type(wrapped):
                raise refuse(layer.name, f"it wraps {name}, which is a custom layer")


def _check_activations(layer: Any) -> None:
    """Raises where a function is not Keras's, whose name is all that a config says of it."""
    for part in layer._flatten_layers(recursive=True):
        for role in ("activation", "recurrent_activation"):
            found = getattr(part, role, None)
            if not callable(found) or isinstance(found, keras.layers.Layer):
                continue
            name = getattr(found, "__name__", type(found).__name__)
            own = getattr(keras.activations, name, None)
            if own is found or activations.is_known(found):
                continue
            way = f"; where it is Keras's, layer.{role} = keras.activations.{name} says so"
            raise refuse(
                f"{layer.name} ({type(layer).__name__})",
                f"{role}={name!r} is a function of the user's own{way if own else ''}",
            )


def _check_config(layer: Any) -> None:
    """Raises where a number or name that a layer computes with is not what its config says."""
    try:
        new = type(layer).from_config(layer.get_config())
    except (TypeError, ValueError):
        return  # which the walk refuses or knows
    own = {"built", *TRAINING["keras"]}  # and a LoRA, which is read as it computes
    own |= {n for n, v in vars(layer).items() if n.startswith(("_", "lora_")) or callable(v)}
    altered.check_as_new(layer, new, f"{layer.name} ({type(layer).__name__})", own)
    given = getattr(layer, "input_mean", None)
    if type(layer) is keras.layers.Normalization and given is not None and layer.built:
        new.build(layer._build_input_shape if hasattr(layer, "_build_input_shape") else
                  layer.get_build_config()["input_shape"])  # fmt: skip
        for name in ("mean", "variance"):
            now, then = (keras.ops.convert_to_numpy(getattr(x, name)) for x in (layer, new))
            if not np.array_equal(now, then):
                raise refuse(layer.name, f"its {name} is not the one that it was made with")


def _check_attention(layer: Any) -> None:
    """Raises where it keeps more than its settings say: its scale, and what its parts do."""
    parts = layer._flatten_layers(include_self=False, recursive=True)
    size = "key_dim" if hasattr(layer, "key_dim") else "head_dim"
    scale = getattr(layer, f"_inverse_sqrt_{size}", None)
    if scale not in (None, 1.0 / math.sqrt(float(getattr(layer, size)))):
        raise refuse(layer.name, f"its scores are scaled by {scale}, not by 1 / sqrt({size})")
    for part in parts:
        activation = getattr(part, "activation", None)
        if activation not in (None, keras.activations.linear):
            raise refuse(layer.name, f"its {part.name} has an activation of its own")


@without_tensorflow()
def to_keras(
    module: Any, variables: Any = None, input_shape: Sequence[int | None] | None = None
) -> Any:
    """A Flax model as a Keras model with the same predictions.

    Args:
        module: a :class:`fwt.Sequential` or :class:`fwt.Graph`, a linen module, a ``Model`` of
            one, or an nnx module, which holds its variables. One that is no Sequential is traced.
        variables: its variables, float32; a Model has its own.
        input_shape: the shape of its input without the batch axis, of several inputs a tuple of
            shapes; None takes the module's own, or what follows from the first layers. A module
            that is traced needs it, or an example of each input.

    Returns:
        A built ``keras.Sequential`` on the active backend, or a Functional model where the layers
        are no line of Keras layers. They keep their names; ``block/conv`` is the layer conv of a
        model block inside.

    Raises:
        ConversionError: for any layer or setting that Keras can't say exactly, by name.

    Example:
        >>> import fwt, jax, flax.linen as nn
        >>> net = fwt.Sequential([("dense", nn.Dense(2))])
        >>> variables = net.init(jax.random.key(0), jax.numpy.ones((1, 3)))
        >>> [layer.name for layer in to_keras(net, variables).layers]
        ['dense']
    """
    call = "to_keras(model)"
    module, variables, input_shape = _given.given(module, variables, call, input_shape)
    net = keras_config.to_keras_net(module, variables, input_shape, state=True)
    config = keras_write.keras_config(net)
    cls = keras.Sequential if config["class_name"] == "Sequential" else keras.Model
    try:
        with keras.saving.custom_object_scope({**table.CUSTOM["keras"], **_beside(net)}):
            model = cls.from_config(config["config"])
    except (TypeError, ValueError) as error:
        raise ConversionError(
            f"Keras can't build this model: {' '.join(str(error).split())}"
        ) from error
    for layer in net.layers:
        if layer.group and not layer.of:
            live: Any = model
            for part in parts_of(layer.name):
                live = live.get_layer(part)
            _assign(layer, live)
    return model


def _beside(net: Net) -> dict[str, Any]:
    """The classes of a net that Keras has outside of keras.layers."""
    kinds = {layer.kind for layer in net.layers} & set(keras_ops.HOME)
    return {kind: getattr(sys.modules[keras_ops.HOME[kind]], kind) for kind in kinds}


def _assign(layer: Layer, live: Any) -> None:
    _check_globals(layer)
    if layer.inner:
        roles = ("forward_layer", "backward_layer") if len(layer.inner) > 1 else ("layer",)
        for part, role in zip(layer.inner, roles, strict=True):
            _assign(part, getattr(live, role))
    variables = dict(_named(live))
    for name, value in layer.arrays.items():
        variables[name].assign(value)


def leaves(model: Any) -> list[LiveLeaf]:
    """The floating weights and the running statistics in Flax's names and axes; a tied one under
    its first path."""
    sync(model)
    out: list[LiveLeaf] = []
    seen: dict[int, LiveLeaf] = {}
    held: dict[int, list[tuple[LiveLeaf, str, str, Any]]] = {}  # the leaves of a layer
    above: list[int] = []

    def visit(layer: Any, parts: list[str]) -> None:
        if id(layer) in above:  # a layer that is inside itself
            return
        children = list(layer._flatten_layers(include_self=False, recursive=False))
        if id(layer) in held:  # one layer in two places
            again(layer, parts)
        else:
            look(layer, children, parts)
        above.append(id(layer))
        for child, label in zip(children, _unique([c.name for c in children]), strict=True):
            visit(child, [*parts, label])
        above.pop()

    def again(layer: Any, parts: list[str]) -> None:
        kind = public_name(layer)
        if kind.startswith("Conv") and kind.endswith("Transpose"):
            parts, _ = _in_groups(layer, parts)
        for leaf, label, name, shape in held[id(layer)]:
            leaf.also[path := "/".join(_tree.escape(p) for p in [*parts, name])] = shape
            leaf.own[path] = own_names([*parts, label])

    def look(layer: Any, children: list[Any], parts: list[str]) -> None:
        found_here = held[id(layer)] = []
        theirs = {id(v) for child in children for v in child.variables}
        kind = public_name(layer)
        names = table.leaf_names("keras", kind)
        groups = 1
        if kind.startswith("Conv") and kind.endswith("Transpose"):
            parts, groups = _in_groups(layer, parts)
            kind = kind if groups == 1 else f"Grouped{kind}"
            names = table.leaf_names("keras", kind)
        own = [v for v in layer.variables if id(v) not in theirs and collection_of(v, kind)]
        place = "/".join(parts) or layer.name
        if own:
            _check_plain(layer, place)
        values: dict[int, Any] = {}
        for v in own:  # of a class that is known to compute with what it calls so
            known_so = v.name in names or v.name.startswith("lora_")
            plain = np.asarray(keras.ops.convert_to_numpy(v))
            values[id(v)] = _computed(layer, v, place) if known_so else plain
        own = [v for v in own if values[id(v)] is not None]
        for variable, label in zip(own, _unique([v.name for v in own]), strict=True):
            value: Any = values[id(variable)]
            found: Any = value
            name, letters, flax_letters, _ = names.get(label, (label, [], [], "params"))
            there = order(letters, flax_letters, value.ndim) if letters else None
            share = groups if label == "kernel" else 1
            read = functools.partial(_read, there, share)
            value = read(value)
            known = table.live("keras", layer, kind, letters, flax_letters, value.ndim, share)
            path = "/".join(_tree.escape(p) for p in [*parts, name])
            if id(variable) in seen:
                seen[id(variable)].also[path] = value.shape
                seen[id(variable)].own[path] = own_names([*parts, label])
                found_here.append((seen[id(variable)], label, name, value.shape))
                continue
            put = variable.assign
            if label in names and getattr(layer, label, variable) is not variable:
                put = _summed(layer, variable, found, place)
            write = functools.partial(_write, put, there, share)
            collection = collection_of(variable, kind)
            plain = put == variable.assign
            spelled = own_names([*parts, label], variable.path.split("/"))
            leaf = LiveLeaf(path, value, known, write, collection, own={path: spelled},
                            source=variable, read=read if plain else None)  # fmt: skip
            out.append(leaf)
            found_here.append((leaf, label, name, value.shape))
            seen[id(variable)] = leaf

    visit(model, [])
    return out


def _read(there: tuple[int, ...] | None, groups: int, value: np.ndarray) -> np.ndarray:
    value = grouped.within(value, groups) if groups > 1 else value
    return value if there is None else value.transpose(there)


TRAINED = "trainable_variables"


def trained(model: Any) -> tuple[list[tuple[str, Any]], list[Any]]:
    """The variables with their paths, and those that are trained."""
    return [(v.path, v) for v in model.variables], list(model.trainable_variables)


def array_of(gradient: Any) -> np.ndarray:
    """A gradient as an array; TensorFlow's of a table may hold some of the rows alone."""
    if hasattr(gradient, "dense_shape"):
        gradient = sys.modules["tensorflow"].convert_to_tensor(gradient)
    return np.asarray(keras.ops.convert_to_numpy(gradient))


def _unique(names: list[str]) -> list[str]:
    """Names with a number after a repeated one, which is nobody else's name."""
    out: list[str] = []
    for name in names:
        unique, number = name, 1
        while unique in out or (unique != name and unique in names):
            unique, number = f"{name}_{number}", number + 1
        out.append(unique)
    return out


def public_name(layer: Any) -> str:
    """The class in keras.layers that a layer is or derives from."""
    for cls in type(layer).__mro__:
        if getattr(keras.layers, cls.__name__, None) is cls:
            return cls.__name__
    return type(layer).__name__


def collection_of(variable: Any, kind: str) -> str:
    """Where a floating weight or running statistic is, by the class of its layer; "" of a seed, a
    counter, a metric or a statistic of the data."""
    floating = keras.backend.is_float_dtype(keras.backend.standardize_dtype(variable.dtype))
    if not floating or kind == "Normalization":
        return ""
    return "batch_stats" if variable.name in ("moving_mean", "moving_variance") else "params"


def _in_groups(layer: Any, parts: list[str]) -> tuple[list[str], int]:
    """The path of a transposed convolution and its groups, if its kernel holds such blocks."""
    name, groups = grouped.in_name(parts[-1] if parts else layer.name)
    if groups == 1 or not layer.built:
        return parts, 1
    kernel = np.asarray(keras.ops.convert_to_numpy(layer.kernel))
    if grouped.unblocked(kernel, groups) is None:
        return parts, 1
    return [*parts[:-1], name] if parts else parts, groups


def _summed(layer: Any, variable: Any, value: np.ndarray, place: str) -> Callable[[Any], None]:
    """Writes a variable that a layer computes with in a sum (a LoRA's), and checks that it comes
    out."""
    before, name = np.asarray(keras.ops.convert_to_numpy(variable)), variable.name

    def put(new: np.ndarray) -> None:
        if np.array_equal(new, value, equal_nan=True):
            variable.assign(before)
            return
        variable.assign(np.zeros_like(before))
        rest: Any = _computed(layer, variable, place)
        variable.assign(new - rest)
        found: Any = _computed(layer, variable, place)
        eps = ml_dtypes.finfo(before.dtype).eps
        with np.errstate(invalid="ignore"):  # of what is not finite
            close = abs(found - new) <= 4 * eps * np.maximum(abs(new), abs(rest))  # of one rounding
        same = (found == new) | (np.isnan(found) & np.isnan(new))
        if np.array_equal(found == 0, new == 0) and (close | same).all():
            return
        variable.assign(before)
        raise refuse(
            f"{place}/{name}",
            "it is a sum (LoRA's, say) or was replaced by a constant, and can't be made this value",
            "merge it first: save the model and load it again",
        )

    return put


def _write(
    put: Callable[[Any], None], there: tuple[int, ...] | None, groups: int, value: np.ndarray
) -> None:
    value = value if there is None else value.transpose(np.argsort(there))
    put(grouped.blocks(value, groups) if groups > 1 else value)
