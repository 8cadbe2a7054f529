"""Nets of Keras layers as configs: a Sequential where they are a line, else a Functional model,
whose layers ``block/0/conv`` stand in models inside."""

import dataclasses
import itertools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from fwt._graph import names_in, renamed
from fwt._types import ConversionError
from fwt.converters.frameworks import keras_custom, keras_ops
from fwt.converters.rows import table
from fwt.converters.rows.row import Layer, joined, listed, parts_of
from fwt.converters.walk.net import Net, fresh, nests

_SEVERAL = ("merge", "join")  # rows of layers that Keras calls with a list


def keras_config(net: Net, name: str | None = None) -> dict[str, Any]:
    """The config of a model of these layers, whose names are paths in it; see :func:`placed`."""
    if not is_sequential(net):
        body = _functional(net, name or "functional")
        return {"module": "keras.src.models.functional", "class_name": "Functional",
                "config": body, "registered_name": "Functional"}  # fmt: skip
    shape = net.shape
    entries = [_input("input_layer", shape, net.layers[:1]),
               *_entries([(parts_of(x.name), x) for x in net.layers])]  # fmt: skip
    return {
        "module": "keras",
        "class_name": "Sequential",
        "config": {
            "name": name or "sequential",
            "trainable": True,
            "dtype": "float32",
            "layers": entries,
            "build_input_shape": [None, *shape],
        },
        "registered_name": None,
        "build_config": {"input_shape": [None, *shape]},
    }


def is_sequential(net: Net) -> bool:
    """Whether a Sequential can hold a net: a line of layers none of which is an operation. It takes
    other sizes than those of its input, and a Functional model none."""
    return net.is_line and nests(net.layers) and not net.fixed and not any(
        x.kind.startswith("ops.") or "Attention" in x.kind or _told(x) for x in net.layers
    )  # fmt: skip


def _told(layer: Layer) -> dict[str, Any]:
    """What a layer is called with beside tensors."""
    names = keras_ops.CALLED.get(layer.kind, ())
    told = {n: layer.settings.get(n) for n in names}
    return {n: v for n, v in told.items() if v is not None and v is not False}  # 0.0 is told


def placed(net: Net) -> Net:
    """The net with names that are paths of models in each other: the layers of what is no block,
    because others stand between them, get one name each."""
    if is_sequential(net):
        return net
    names = {x.name: parts_of(x.name) for x in net.layers}
    while True:
        broken = _broken(net, names)
        if broken is None:
            break
        for name, parts in names.items():
            if parts[: len(broken)] == broken and len(parts) > len(broken):
                flat = "__".join(parts[len(broken) - 1 :])
                names[name] = [*parts[: len(broken) - 1], flat]
    new: dict[str, str] = {}
    for name, parts in names.items():
        new[name] = fresh(joined(parts), {*names, *new.values()}) if joined(parts) != name else name
    layers = [dataclasses.replace(x, name=new[x.name], of=new.get(x.of, ""),
                                  inputs=tuple(new.get(i, i) for i in x.inputs))
              for x in net.layers]  # fmt: skip
    return Net(layers, net.inputs, renamed(net.outputs, new), net.takes, fixed=net.fixed)


def _broken(net: Net, names: Mapping[str, list[str]]) -> list[str] | None:
    """A path whose layers are no block: one outside takes what is in the middle of it and gives
    what they take, or a layer in it is called again from outside."""
    prefixes = {tuple(p[:k]) for p in names.values() for k in range(1, len(p))}
    taken = {tuple(p) for p in names.values()} | {(n,) for n in net.inputs}
    for prefix in sorted(prefixes, key=len):
        own = {n for n, p in names.items() if tuple(p[: len(prefix)]) == prefix}
        if prefix in taken:
            return list(prefix)
        before: set[str] = set()  # outside, and follows from what is inside
        for layer in net.layers:
            inside = layer.name in own
            follows = any(i in own or i in before for i in layer.inputs)
            if inside and any(i in before for i in layer.inputs):
                return list(prefix)
            if not inside and follows:
                before.add(layer.name)
            crosses = bool(layer.of) and inside != (layer.of in own)
            if crosses and _copied(net.layers, names, prefix if inside else (), layer) is None:
                return list(prefix)
    return None


def _copied(
    layers: Sequence[Layer],
    names: Mapping[str, list[str]],
    prefix: Sequence[str],
    layer: Layer,
) -> dict[str, str] | None:
    """Where the layers under a path are a further call of those under another, the names of these
    by theirs; the other is told by one layer among them."""
    mine, theirs = names[layer.name], names[layer.of]
    if not prefix:  # the shortest path that leads to the layer, and not to that
        prefix = mine[: next((k for k in range(1, len(mine)) if mine[:k] != theirs[:k]), len(mine))]
    count = len(prefix)
    if len(mine) <= count or len(theirs) != len(mine) or mine[count:] != theirs[count:]:
        return None
    own = [x for x in layers if names[x.name][:count] == list(prefix)]
    first = [x for x in layers if names[x.name][:count] == theirs[:count]]
    to = {x.name: x.of for x in own}
    if len(own) != len(first) or any(names[x.name][count:] != names[y.name][count:] or x.of != (
            y.of or y.name) for x, y in zip(own, first, strict=True)):  # fmt: skip
        return None
    for x, y in zip(own, first, strict=True):
        if y.of:
            return None
        for i, j in zip(x.inputs, y.inputs, strict=True):
            if to.setdefault(i, j) != j:
                return None
    outside = [i for i in to if i not in {x.name for x in own}]
    return to if len({to[i] for i in outside}) == len(outside) else None


# -- Sequential ---------------------------------------------------------------------------------


def _entries(layers: list[tuple[list[str], Layer]]) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    for first, together in itertools.groupby(layers, key=lambda e: e[0][0]):
        group = list(together)
        _check_name(first)
        if len(group[0][0]) > 1:
            inside = _entries([(parts[1:], layer) for parts, layer in group])
            config = {"name": first, "trainable": True, "dtype": "float32", "layers": inside}
            out.append({"module": "keras", "class_name": "Sequential", "config": config,
                        "registered_name": None})  # fmt: skip
            continue
        out += [_entry(first, layer) for _, layer in group]
    return out


def _check_name(name: str) -> None:
    if "/" in name or not name:
        raise ConversionError(f"{name!r} can't be the name of a Keras layer")


def _input(name: str, shape: Sequence[Any], readers: Sequence[Layer]) -> dict[str, Any]:
    ids = any(x.kind in ("Embedding", "ReversibleEmbedding") and not _told(x) for x in readers)
    dtype = "int32" if ids else "float32"
    if any(x.settings.get("dtype") == "float64" for x in readers):
        dtype = "float64"  # which the input would else lose
    return {
        "module": "keras.layers",
        "class_name": "InputLayer",
        "config": {"batch_shape": [None, *shape], "dtype": dtype, "name": name},
        "registered_name": None,
    }


def _entry(name: str, layer: Layer) -> dict[str, Any]:
    beside = keras_ops.DEFAULTS.get(layer.kind, {})
    own = {k: v for k, v in layer.settings.items() if k not in keras_ops.CALLED.get(layer.kind, ())}
    config = {"name": name, "dtype": "float32", **beside, **listed(own)}
    for role, inner in zip(("layer", "backward_layer"), layer.inner, strict=False):
        config[role] = _entry(inner.name, inner)
    custom = table.CUSTOM["keras"].get(layer.kind)
    home = keras_ops.HOME.get(layer.kind)
    if custom:
        config = keras_custom.taken_by(custom, config, str(layer))
    return {
        "module": home or (custom.__module__ if custom else "keras.layers"),
        "class_name": layer.kind,
        "config": config,
        "registered_name": layer.kind if home else _registered(custom) if custom else None,
    }


def _registered(cls: Any) -> str:
    """The name that a class of the user's own is registered by in Keras."""
    keras = sys.modules.get("keras")
    return keras.saving.get_registered_name(cls) if keras else cls.__name__


# -- Functional ---------------------------------------------------------------------------------


@dataclasses.dataclass
class _Unit:
    """What is one entry of a Functional model: a layer, or the layers of a model inside."""

    name: str
    layers: list[Layer]
    inside: bool  # whether they are a model inside

    def takes(self) -> list[str]:
        own = {x.name for x in self.layers}
        return list(dict.fromkeys(i for x in self.layers for i in x.inputs if i not in own))


def _units(layers: Sequence[Layer], depth: int) -> list[_Unit]:
    """Units in an order in which each takes what stands before it."""
    found: dict[Any, _Unit] = {}
    for layer in layers:
        parts = parts_of(layer.name)
        inside = len(parts) > depth + 1
        key = ("in", parts[depth]) if inside else ("", layer.name)
        found.setdefault(key, _Unit(parts[depth], [], inside)).layers.append(layer)
    out: list[_Unit] = []
    left, known = list(found.values()), {x.name for x in layers}
    while left:
        known -= {x.name for unit in out for x in unit.layers}
        ready = next(u for u in left if not known & set(u.takes()))
        left.remove(ready)
        out.append(ready)
        known -= {x.name for x in ready.layers}
    return out


def _tensor(ref: Sequence[Any], shape: Any) -> dict[str, Any]:
    told = {"shape": [None, *shape] if shape is not None else [], "dtype": "float32"}
    return {"class_name": "__keras_tensor__", "config": {**told, "keras_history": list(ref)}}


def _functional(net: Net, name: str, depth: int = 0) -> dict[str, Any]:
    readers = net.readers()
    shapes: dict[str, Any] = {**net.inputs, **{x.name: x.shape for x in net.layers}}
    refs: dict[str, list[Any]] = {}
    entries: dict[str, dict[str, Any]] = {}
    inside: dict[str, tuple[list[str], list[str]]] = {}  # what each model inside takes and gives
    names = {x.name: parts_of(x.name) for x in net.layers}
    for value, shape in net.inputs.items():
        label = parts_of(value)[-1] if depth else value
        if shape is None:
            raise ConversionError(
                f"{value}: Keras needs the shape of each input; give input_shape="
            )
        entry = _input(label, shape, readers.get(value, []))
        entries[label] = {**entry, "name": label, "inbound_nodes": []}
        refs[value] = [label, 0, 0]
    for unit in _units(net.layers, depth):
        _check_name(unit.name)
        given = unit.takes() if unit.inside else list(unit.layers[0].inputs)
        args: list[Any] = [_tensor(refs[g], shapes[g]) for g in given]
        if unit.inside:
            called = unit.layers[0].of
            if called and called not in {x.name for x in unit.layers}:  # another call of a model
                to = _copied(net.layers, names, names[unit.layers[0].name][: depth + 1],
                             unit.layers[0]) or {}  # fmt: skip
                label = names[called][depth]
                back = {v: k for k, v in to.items()}
                given, outs = ([back[n] for n in told] for told in inside[label])
            else:
                label = unit.name
                outs = [x.name for x in unit.layers if _is_read(net, x, unit, depth)]
                inside[label] = given, outs
                made = _inside(unit, given, outs, shapes, depth)
                entries[label] = {**made, "name": label, "inbound_nodes": []}
            args = [_tensor(refs[g], shapes[g]) for g in given]
            node = {"args": args if len(args) == 1 else [args], "kwargs": {"mask": None}}
            nodes = entries[label]["inbound_nodes"]
            refs |= {o: [label, len(nodes), k] for k, o in enumerate(outs)}
            nodes.append(node)
            continue
        layer = unit.layers[0]
        own_name = parts_of(layer.of or layer.name)[-1]
        if not layer.of:
            made = keras_ops.entry_of(layer, own_name) if layer.kind.startswith("ops.") else {
                **_entry(own_name, layer), "name": own_name, "inbound_nodes": []
            }  # fmt: skip
            entries[own_name] = made
        entry = entries[own_name]
        refs[layer.name] = [own_name, len(entry["inbound_nodes"]), 0]
        node = {"args": _called(layer, args), "kwargs": _told(layer)}
        entry["inbound_nodes"].append(node)
    models = {n for n, e in entries.items() if e["class_name"] == "Functional"}

    def end(value: str) -> list[Any]:
        label, call, output = refs[value]
        # At the ends alone Keras counts a call that a Functional model has of its own.
        return [label, call + (label in models), output]

    def form(of: Any, f: Any) -> Any:
        if isinstance(of, str):
            return list(f(of))
        return {k: f(v) for k, v in of.items()} if isinstance(of, Mapping) else [f(v) for v in of]

    ends = sorted(net.outputs.items()) if isinstance(net.outputs, Mapping) else ()
    last = [v for _, v in ends] or list(names_in(net.outputs))
    return {
        "name": name,
        "trainable": True,
        "layers": [entries[n] for n in _sorted(entries, [refs[v] for v in last])],
        "input_layers": form(net.takes, refs.__getitem__),
        "output_layers": form(net.outputs, end),
    }


def _sorted(entries: Mapping[str, Any], ends: Sequence[Sequence[Any]]) -> list[str]:
    """The names of layers in the order that a Functional model of Keras gives them, by which its
    files number them: by how far they are from the outputs, and then as a search from there meets
    them."""
    parents = {
        (name, call): [tuple(t["config"]["keras_history"][:2]) for t in keras_ops.tensors(node)]
        for name, entry in entries.items()
        for call, node in enumerate(entry["inbound_nodes"] or [{}])
    }
    met: dict[str, int] = {}
    done: dict[tuple[str, int], None] = {}  # each call behind those that it takes
    left = [(tuple(end[:2]), False) for end in reversed(ends)]
    while left:
        node, after = left.pop()
        if after:
            done[node] = None
        elif node not in done:
            met.setdefault(node[0], len(met))
            left.append((node, True))
            left += [(parent, False) for parent in reversed(parents[node])]
    depths: dict[tuple[str, int], int] = {}
    deepest: dict[str, int] = {}
    for node in reversed(done):
        depth = deepest[node[0]] = max(depths.get(node, 0), deepest.get(node[0], 0))
        for parent in parents[node]:
            depths[parent] = max(depth + 1, depths.get(parent, 0))
    return sorted(entries, key=lambda n: (-deepest.get(n, 0), met.get(n, -1)))


def _is_read(net: Net, layer: Layer, unit: _Unit, depth: int) -> bool:
    """Whether something outside of its unit takes what a layer, or a further call of it, gives."""
    readers, ends = net.readers(), set(names_in(net.outputs))
    for call in net.layers:
        if layer.name in (call.name, call.of):
            parts = parts_of(call.name)[: depth + 1]
            if call.name in ends or any(parts_of(r.name)[: depth + 1] != parts
                                        for r in readers.get(call.name, ())):  # fmt: skip
                return True
    return False


def _inside(
    unit: _Unit, given: list[str], outs: list[str], shapes: Mapping[str, Any], depth: int
) -> dict[str, Any]:
    """A model inside: a Sequential if it is a line."""
    labels = [f"{unit.name}_input_{k}" if len(given) > 1 else f"{unit.name}_input"
              for k in range(len(given))]  # fmt: skip
    taken = [parts_of(x.name)[depth + 1] for x in unit.layers]
    rename = {g: joined([fresh(label, taken)]) for g, label in zip(given, labels, strict=True)}
    layers = [dataclasses.replace(x, inputs=tuple(rename.get(i, i) for i in x.inputs))
              for x in unit.layers]  # fmt: skip
    inputs = {rename[g]: shapes[g] for g in given}
    one = len(outs) == 1 and len(inputs) == 1
    part = Net(layers, inputs, outs[0] if one else tuple(outs), None if one else tuple(inputs))
    if is_sequential(part):
        inner = _entries([(parts_of(x.name)[depth + 1 :], x) for x in layers])
        config = {"name": unit.name, "trainable": True, "dtype": "float32", "layers": inner}
        return {"module": "keras", "class_name": "Sequential", "config": config,
                "registered_name": None}  # fmt: skip
    body = _functional(part, unit.name, depth + 1)
    return {"module": "keras.src.models.functional", "class_name": "Functional", "config": body,
            "registered_name": "Functional"}  # fmt: skip


def _called(layer: Layer, args: list[Any]) -> list[Any]:
    """What a layer is called with."""
    if layer.kind.startswith("ops."):
        return keras_ops.arguments(layer, args)
    if "use_causal_mask" in keras_ops.CALLED.get(layer.kind, ()):  # query, value, key
        called = [args[0], args[-1], args[1]] if len(args) > 1 else [args[0], args[0]]
        called = called[:2] if called[1] == called[-1] else called
        return [called] if layer.kind in keras_ops.LISTED else called
    if any(r.kind in _SEVERAL for r in table.rows_of("keras", layer.kind)):
        return [args]
    return args
