"""Arrays between the layers of a graph, which in Keras are looked up for each sample."""

import dataclasses
from typing import Any

from fwt._graph import names_in, renamed
from fwt.converters.rows.row import Layer, refuse
from fwt.converters.walk.net import Net, fresh

# How the Embedding is told that holds an array: what is no weight is not trained.
_FIXED = {"trainable": False, "embeddings_initializer": "zeros"}
_STRICT = ("Concatenate", "ops.TrueDivide", "ops.Where")
_MERGES = ("Add", "Subtract", "Multiply", "Average", "Maximum", "Minimum")
_ALONE: dict[str, dict[str, Any]] = {"Parameter": {}, "Constant": _FIXED}


def with_parameters(net: Net) -> Net:
    """The net with each array between layers as the one row of an Embedding, which is looked up for
    each sample: nothing in Keras's graphs takes nothing."""
    if not any(x.kind in _ALONE for x in net.layers):
        return net
    start, shape = next(iter(net.inputs.items()))
    taken = {x.name for x in net.layers} | set(net.inputs)
    readers = net.readers()
    alias: dict[str, str] = {}
    out: list[Layer] = []
    for layer in net.layers:
        if layer.kind not in _ALONE:
            inputs = tuple(alias.get(i, i) for i in layer.inputs)
            out.append(dataclasses.replace(layer, inputs=inputs))
            continue
        (value,) = layer.arrays.values()
        # Keras puts axes of size 1 behind the batch of what has fewer, but where it joins, and in
        # operations, whose tensors meet at their last axes, the batch too.
        sizes = value.shape[next((i for i, n in enumerate(value.shape) if n != 1), value.ndim) :]
        met = [x for x in readers.get(layer.name, ()) if x.kind in (*_STRICT, *_MERGES)]
        if any(x.kind in _STRICT for x in met):
            ranks = {len(x.shape or value.shape[1:]) for x in met}
            if len(ranks) > 1:
                raise refuse(
                    layer.name,
                    f"tensors of {sorted(r + 1 for r in ranks)} axes meet it in Keras operations",
                    "give each an array of its own",
                )
            (rank,) = ranks
            sizes = ((1,) * (rank + 1 - value.ndim) + value.shape)[1:]
        first: Any = [{"start": None, "stop": 1, "step": None}] * len(shape or ())
        chain = [
            Layer(f"{layer.name}__start", "ops.GetItem", {"cuts": first}, shape=(1,) * len(first)),
            Layer(f"{layer.name}__zeros", "ops.ZerosLike", {}, shape=(1,) * len(first)),
            Layer(f"{layer.name}__flat", "Flatten", {}, shape=(1,)),
            Layer(layer.name, "Embedding",
                  {"input_dim": 1, "output_dim": value.size, **_ALONE[layer.kind]},
                  {"embeddings": value.reshape(1, -1)}, shape=(1, value.size)),
            Layer(f"{layer.name}__shape", "Reshape", {"target_shape": sizes or (1,)},
                  shape=sizes or (1,)),
        ]  # fmt: skip
        before = start
        for part in chain:
            part.name = part.name if part.name == layer.name else fresh(part.name, taken)
            part.inputs, before = (before,), part.name
            part.dtype = layer.dtype
        alias[layer.name] = before
        out += chain
    return Net(out, net.inputs, renamed(net.outputs, alias), net.takes, fixed=net.fixed)


def without_lookups(net: Net) -> Net:
    """The net with arrays between its layers where :func:`with_parameters` looks them up."""
    by, readers = {x.name: x for x in net.layers}, net.readers()
    ends = set(names_in(net.outputs))
    made: dict[str, Layer] = {}
    alias: dict[str, str] = {}
    for layer in net.layers:
        flat = by.get(layer.inputs[0]) if layer.kind == "Embedding" and layer.inputs else None
        zeros = by.get(flat.inputs[0]) if flat is not None and flat.kind == "Flatten" else None
        after = readers.get(layer.name, [])
        shaped = after[0] if len(after) == 1 else None
        if zeros is None or zeros.kind != "ops.ZerosLike" or shaped is None:
            continue
        if shaped.kind != "Reshape" or layer.name in ends or shaped.name in ends:
            continue
        if layer.settings.get("input_dim") != 1 or "embeddings" not in layer.arrays:
            continue
        sizes = tuple(shaped.settings["target_shape"])
        if any(x.kind == "Concatenate" for x in readers.get(shaped.name, ())):
            sizes = (1, *sizes)  # as many axes as what it is joined with
        # Keras adds axes before it where it meets tensors of more axes.
        wide = [x for x in readers.get(shaped.name, []) if x.kind == "Reshape" and x.fused]
        value = layer.arrays["embeddings"].reshape(sizes)
        made[layer.name] = dataclasses.replace(
            layer, kind=_kind_of(layer), settings={"shape": sizes}, arrays={"value": value},
            inputs=(),
        )  # fmt: skip
        alias |= dict.fromkeys((shaped.name, *(x.name for x in wide)), layer.name)
    if not made:
        return net
    layers = []
    for layer in net.layers:
        if layer.name in alias:
            continue
        inputs = tuple(alias.get(i, i) for i in layer.inputs)
        layers.append(made.get(layer.name) or dataclasses.replace(layer, inputs=inputs))
    while True:  # what led to the lookups leads nowhere
        used = {i for x in layers for i in x.inputs} | {x.of for x in layers} | ends
        left = [x for x in layers if x.name in used or x.kind not in _BEFORE]
        if len(left) == len(layers):
            return dataclasses.replace(net, layers=layers)
        layers = left


_BEFORE = ("ops.GetItem", "ops.ZerosLike", "Flatten")


def _kind_of(layer: Layer) -> str:
    start = layer.settings.get("embeddings_initializer")
    name = start.get("class_name") if isinstance(start, dict) else start
    fixed = layer.settings.get("trainable") is False and str(name).lower() == "zeros"
    return "Constant" if fixed else "Parameter"
