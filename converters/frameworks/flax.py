"""Flax, the hub: a Sequential or a Graph as a net of layers, and a net as a Model."""

import dataclasses
import itertools
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from fwt import _nodes, _tree
from fwt._graph import Graph, Node, inputs_of, names_in, nodes_of
from fwt._sequential import Named, Sequential
from fwt._stored import Stored
from fwt._types import ConversionError, Model
from fwt.converters.frameworks import sidecar
from fwt.converters.rows import table
from fwt.converters.rows.row import Layer, Row, parts_of, refuse, same
from fwt.converters.walk import policy
from fwt.converters.walk.net import Net, folded, nests
from fwt.converters.walk.opened import of_module
from fwt.layers import Constant, Indexed, Parameter
from fwt.layers.constants import packed


def given(module: Any, variables: Any, call: str) -> tuple[Any, Any]:
    """The module and variables that a user gave, as two arguments or as one Model; ``call`` is how
    the function is called with one."""
    framework, kind = _nodes.foreign(module)
    if kind:
        raise ConversionError(
            f"{type(module).__name__} is a live {framework} {kind}: {call} takes the Model that "
            f"from_{framework}(model) gives"
        )
    if not isinstance(module, Model):
        if variables is None and module is not None and not call.startswith("save"):
            raise ConversionError(
                f"the variables of the {type(module).__name__} are missing: give them after it, or "
                f"a Model of both, {call}"
            )
        whole = module is None and isinstance(variables, Model)
        return module, variables.variables if whole else variables
    params = jax.tree.leaves(module.variables.get("params"))
    if {getattr(x, "dtype", None) for x in params} == {np.dtype(bool)}:
        raise ConversionError(
            "these are masks, no weights of the model: save(path, None, masks) writes them to "
            ".safetensors, .npz, .msgpack, .pt or .orbax, and fwt.apply_masks(masks)(model) is the "
            "model without the weights that they drop"
        )
    if variables is not None:
        raise ConversionError(
            f"a Model holds its variables, so {type(variables).__name__} after it is one argument "
            f"too many: {call}, and what follows by name"
        )
    return module.module, module.variables


def sequential_of(module: Any) -> Any:
    """A linen ``nn.Sequential`` as a :class:`fwt.Sequential`; anything else as it is."""
    if type(module) is not nn.Sequential:
        return module
    # linen names its children so, whatever their own names; functions count too.
    named = [(f"layers_{i}", sequential_of(layer)) for i, layer in enumerate(module.layers)]
    return Sequential(named)


def read_flax(module: Any, variables: Any) -> Net:
    """The net of a Sequential or a Graph with its arrays."""
    if not isinstance(module, Sequential | Graph):
        raise ConversionError(
            f"expected a fwt.Sequential or a linen nn.Sequential, found {type(module).__name__}; "
            "rebuild it as fwt.Sequential([(name, layer), ...])"
        )
    variables = _tree.as_variables(variables if isinstance(variables, Mapping) else {})
    variables = _nodes.unboxed(variables)
    nodes = nodes_of(module)
    places = {tuple(parts_of(n.name)): n for n in nodes if not n.of}
    held: dict[str, dict[str, Any]] = {n.name: {} for n in nodes}
    for collection, tree in variables.items():
        if collection not in ("params", "batch_stats"):
            raise ConversionError(f"variables: the collection {collection!r} can't be converted")
        for path, value in flatten_dict(tree).items():
            found = next((places[path[:k]] for k in range(len(path), 0, -1) if path[:k] in places),
                         None)  # fmt: skip
            own = found is not None and isinstance(found.layer, Parameter)
            count = 0 if found is None else len(parts_of(found.name))
            if found is None or (len(path) == count) != own:
                raise _belongs_to_none(collection, path, places)
            name = "value" if own else "/".join(path[count:])
            held[found.name][name] = np.asanyarray(value)
    layers: dict[str, Layer] = {}
    for node in nodes:
        if node.of:
            first = layers[node.of]
            layers[node.name] = dataclasses.replace(
                first, name=node.name, inputs=node.inputs, of=first.of or first.name
            )
            continue
        layer = _layer(node.name, node.layer, held[node.name])
        layers[node.name] = dataclasses.replace(layer, inputs=node.inputs)
    shape, orders = module.input_shape, sidecar.orders(module)
    if isinstance(module, Graph):
        inputs = dict.fromkeys(names_in(module.inputs))
        fixed = {n: s for n, s in zip(inputs, module.fixed, strict=False) if any(s)}
        net = Net(list(layers.values()), inputs, module.outputs, module.inputs, orders, fixed)
        return net.given(shape)
    (start,) = inputs_of(module)
    end = nodes[-1].name if nodes else start
    return Net(list(layers.values()), {start: shape}, end, orders=orders)


def _belongs_to_none(
    collection: str, path: tuple[str, ...], places: Collection[tuple[str, ...]]
) -> ConversionError:
    count = 0  # of the parts that lead to a layer
    while any(place[: count + 1] == path[: count + 1] for place in places):
        count += 1
    count = min(count, len(path) - 1)
    names = {p[count] for p in places if p[:count] == path[:count] and len(p) > count}
    place = "/".join([collection, *path[: count + 1]])
    return ConversionError(
        f"variables: {place} belongs to no layer of the module, which has {sorted(names)}"
    )


def _layer(name: str, layer: Any, arrays: dict[str, Any]) -> Layer:
    cls = type(layer)
    kind = cls.__name__
    if any(r.flax is not cls for r in table.rows_of("flax", kind)):
        raise refuse(name, f"{cls.__module__}.{kind} is not the class that fwt knows")
    made = of_module(name, layer, arrays)
    policy.name_of(made.settings.get("param_dtype"), str(made))
    made.dtype = policy.name_of(made.settings.pop("dtype", None), str(made))
    if isinstance(layer, Constant):
        made.arrays, made.settings = {"value": layer.value}, {"shape": layer.shape}
    if isinstance(layer, Indexed) and arrays:
        made.settings = {"shape": layer.gives, "table": arrays["value"]}
        made.arrays = {"value": layer.positions}
    return made


def write_flax(net: Net) -> Model:
    """A Model of the net, with the pairs that another framework needed folded into one: of a
    Sequential where it is a line, else of a Graph."""
    net = folded(net, fold)
    readers, given = net.readers(), {x.name: x for x in net.layers}
    for layer in net.layers:
        # linen's Dropout has no dtype, and rounds nothing where what stands beside it does not.
        beside = [given[i].dtype for i in layer.inputs if i in given]
        beside += [x.dtype for x in readers.get(layer.name, ())]
        if layer.kind == "Dropout" and layer.dtype not in (None, *beside):
            raise refuse(str(layer), f"it casts to {layer.dtype}, which Flax's Dropout can't say",
                         policy.WAY_OUT)  # fmt: skip
    if net.is_line and nests(net.layers) and not net.fixed:
        named, trees = _nested([(parts_of(layer.name), layer) for layer in net.layers])
        module: Any = Sequential(named, net.shape)
    else:
        module, trees = _graph(net)
    variables = {"params": trees["params"]}
    if trees["batch_stats"]:
        variables["batch_stats"] = trees["batch_stats"]
    return Model(module, variables)


def _graph(net: Net) -> tuple[Graph, dict[str, dict[str, Any]]]:
    nodes: list[Node] = []
    trees: dict[str, dict[str, Any]] = {"params": {}, "batch_stats": {}}
    for layer in net.layers:
        if layer.of:
            nodes.append(Node(layer.name, None, layer.inputs, layer.of))
            continue
        row = table.rows_of("flax", layer.kind)[0]
        if layer.kind == "Constant":
            told = Constant.settings(layer.arrays["value"])
            layer = dataclasses.replace(layer, settings=told, arrays={})
        if layer.kind in ("Indexed", "IndexedBuffer"):
            table_, index = layer.settings["table"], layer.arrays["value"].astype(np.int32)
            told = {"shape": table_.shape, "index": packed(index), "gives": index.shape}
            layer = dataclasses.replace(layer, settings=told, arrays={"value": table_})
        nodes.append(Node(layer.name, _module(row, layer), layer.inputs))
        parts = parts_of(layer.name)
        for collection, path, value in _arrays(row, layer):
            *inside, leaf = parts if row.kind == "parameter" else [*parts, *path]
            node = trees[collection]
            for part in inside:
                node = node.setdefault(part, {})
            node[leaf] = value
    fixed = [net.fixed.get(n, ()) for n in names_in(net.takes)] if net.fixed else ()
    return Graph(nodes, net.takes, net.outputs, net.shape, fixed=fixed), trees


def _arrays(row: Row, layer: Layer) -> Iterator[tuple[str, list[str], Any]]:
    """The collection and the path in its layer of each array."""
    where = {p.of("flax")[0]: p.collection for p in row.params}
    for name, value in layer.arrays.items():
        yield where[name], name.split("/"), value


def _nested(
    entries: list[tuple[list[str], Layer]],
) -> tuple[tuple[Named, ...], dict[str, dict[str, Any]]]:
    named: list[Named] = []
    trees: dict[str, dict[str, Any]] = {"params": {}, "batch_stats": {}}
    for first, together in itertools.groupby(entries, key=lambda e: e[0][0]):
        group = list(together)
        if len(group[0][0]) > 1:
            inner, theirs = _nested([(parts[1:], layer) for parts, layer in group])
            named.append(Named(first, Sequential(inner)))
            for collection, tree in theirs.items():
                if tree:
                    trees[collection][first] = tree
            continue
        for _, layer in group:
            row = table.rows_of("flax", layer.kind)[0]
            named.append(Named(first, _module(row, layer)))
            for collection, (*inside, leaf), value in _arrays(row, layer):
                node = trees[collection].setdefault(first, {})
                for part in inside:
                    node = node.setdefault(part, {})
                node[leaf] = value
    return tuple(named), trees


def _module(row: Row, layer: Layer) -> Any:
    cls: Any = row.flax
    fields = cls.__dataclass_fields__
    # What says no more than the default is left out, so that equal models are equal.
    settings = {k: v for k, v in layer.settings.items() if not same(v, fields[k].default)}
    if settings.get("strides") is not None and settings["strides"] == settings.get("window_shape"):
        del settings["strides"]
    if layer.dtype is not None and "dtype" in fields:
        settings["dtype"] = layer.dtype
        held = policy.held([layer])
        if len(held) == 1 and held != {"float32"}:
            settings["param_dtype"] = next(iter(held))
    elif layer.dtype is not None and cls is not nn.Dropout:
        raise refuse(str(layer), f"it computes in {layer.dtype}, for which its class in Flax has "
                     "no dtype", policy.WAY_OUT)  # fmt: skip
    return cls(**settings)


def _cast(place: Any, value: Any, wanted: Any) -> Any:
    if not isinstance(value, Stored):
        return _rounded(place, np.asarray(value), wanted)
    kind = np.dtype(jnp.dtype(wanted))
    return value.mapped(lambda pieces: (_rounded(place, x, wanted) for x in pieces), kind)


def in_dtype(model: Model, dtype: Any) -> Model:
    """A model that computes in a dtype, with its floating arrays in it; with None as it is.

    Raises:
        ConversionError: for a number that is finite, and infinite in that dtype.
    """
    if dtype is None:
        return model
    wanted = dtype if isinstance(dtype, str) else getattr(dtype, "__name__", str(dtype))
    if wanted not in policy.COMPUTED:
        raise ConversionError(
            f"dtype={dtype!r:.80}: {', '.join(map(repr, policy.COMPUTED))}, or None for the "
            "model's own"
        )
    done: dict[int, tuple[Any, Any]] = {}  # with what it was, so that no other takes its id

    def cast(place: Any, value: Any) -> Any:
        floating = jnp.issubdtype(getattr(value, "dtype", bool), jnp.floating)
        if not floating or value.dtype == wanted:
            return value
        if id(value) not in done:
            done[id(value)] = value, _cast(place, value, wanted)
        return done[id(value)][1]

    def plain(layer: Any) -> Any:
        if isinstance(layer, Sequential):
            return layer.clone(layers=[Named(n.name, plain(n.layer)) for n in layer.layers])
        if isinstance(layer, Graph):
            return layer.clone(nodes=[n if n.of else Node(n.name, plain(n.layer), n.inputs)
                                      for n in layer.nodes])  # fmt: skip
        own = {f.name: f.default for f in dataclasses.fields(layer)}
        for name, number in _numbers({n: getattr(layer, n, None) for n in own}):
            _rounded(f"{type(layer).__name__}.{name}", np.float64(number), wanted)
        told = {n: own[n] if wanted == "float32" else wanted
                for n in ("dtype", "param_dtype") if n in own}  # fmt: skip
        return layer.clone(**told)

    module = model.module if model.module is None else plain(model.module)
    if module is not None and wanted in ("float16", "bfloat16"):
        # Not every backend of Keras can draw the orthogonal one in these; see policy.to_keras.
        module = sidecar.without(module, "recurrent_initializer")
    return Model(module, jax.tree_util.tree_map_with_path(cast, model.variables))


def _numbers(settings: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers that a layer computes with, which are in its dtype too."""
    for name, value in settings.items():
        for x in value if isinstance(value, tuple) else (value,):
            if isinstance(x, float):
                yield name, x


def _rounded(place: Any, value: Any, dtype: str) -> Any:
    with np.errstate(over="ignore"):
        out = value.astype(jnp.dtype(dtype))
    if jnp.finfo(dtype).max >= jnp.finfo(value.dtype).max:
        return out
    beyond = np.isfinite(value) & ~np.isfinite(out)
    if beyond.any():
        own = isinstance(place, str)
        there = place if own else jax.tree_util.keystr(place, simple=True, separator="/")
        wider = "bfloat16 and float32 hold it" if dtype == "float16" else "leave dtype= out"
        raise ConversionError(
            f"{there}: {value[beyond][0]!s} is beyond {dtype}, in which it would be infinite: "
            f"{wider}"
        )
    return out


def fold(layers: list[Layer]) -> list[Layer]:
    """Undoes what a target needed two layers for: a pad named for the layer after it, a Flatten
    named for the pool before it."""
    out: list[Layer] = []
    for layer in layers:
        last = out[-1] if out else None
        if last is not None and last.name == f"{layer.name}__pad":
            padding, pads = layer.settings.get("padding"), last.settings["padding"]
            zero = last.kind == "ZeroPad"
            if padding == "VALID" and (
                (zero and layer.kind in ("Conv", "AvgPool"))
                or (layer.kind == "MaxPool" and last.settings.get("value") == float("-inf"))
            ):
                settings = {**layer.settings, "padding": pads}
                if layer.kind == "AvgPool":
                    settings["count_include_pad"] = True
                out[-1] = dataclasses.replace(layer, settings=settings)
                continue
        if (
            last is not None
            and last.kind in ("ConvTranspose", "GroupedConvTranspose")
            and layer.kind == "Crop"
            and layer.name == f"{last.name}__crop"
        ):
            pairs = zip(last.settings["padding"], layer.settings["cropping"], strict=True)
            pads = tuple((lo - first, hi - second) for (lo, hi), (first, second) in pairs)
            out[-1] = dataclasses.replace(last, settings={**last.settings, "padding": pads})
            continue
        if (
            last is not None
            and layer.kind == "Flatten"
            and layer.name == f"{last.name}__flatten"
            and last.kind in ("GlobalAvgPool", "GlobalMaxPool")
        ):
            out[-1] = dataclasses.replace(last, settings={**last.settings, "keepdims": False})
            continue
        out.append(layer)
    return out
