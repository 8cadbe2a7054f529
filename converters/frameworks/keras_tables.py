"""Tables that several layers share: in Keras one ReversibleEmbedding, Embedding or Dense that is
called several times."""

import dataclasses

from fwt._graph import names_in
from fwt.converters.rows.row import Layer, joined, number, parts_of, refuse
from fwt.converters.walk.net import Net

_PLACE = {"Lookup": 0, "Attend": 1}  # which of what it takes is the table


def with_tables(net: Net) -> Net:
    """The net with each table that layers look up as one layer of Keras, named for the first."""
    by, readers, ends = {x.name: x for x in net.layers}, net.readers(), set(names_in(net.outputs))
    first: dict[str, str] = {}  # by the array, the layer that has it
    out: list[Layer] = []
    for layer in net.layers:
        if layer.kind not in _PLACE:
            out.append(layer)
            continue
        at = _PLACE[layer.kind]
        table, other = by.get(layer.inputs[at]), layer.inputs[1 - at]
        readers_ = readers[layer.inputs[at]]
        others = [x for x in readers_ if x.inputs[_PLACE.get(x.kind, 0)] != layer.inputs[at]
                  or x.kind not in _PLACE]  # fmt: skip
        if table is None or table.kind != "Parameter" or others or table.name in ends:
            raise refuse(str(layer), "in Keras its table is a layer's own, which nothing else takes"
                         f", found that {others[0] if others else 'the model gives or makes it'}"
                         f"{' takes it' if others else ''}")  # fmt: skip
        (value,) = table.arrays.values()
        turns = any(x.kind == "Attend" for x in readers_)
        told = {k: v for k, v in table.settings.items() if k != "shape"}
        told |= {"input_dim": value.shape[0], "output_dim": value.shape[1]}
        of = first.setdefault(table.name, layer.name)
        if all(x.kind == "Attend" for x in readers_):  # a dense layer that is called several times
            dense = {k: v for k, v in told.items() if k not in ("input_dim", "output_dim")}
            out.append(dataclasses.replace(
                layer, kind="Dense", settings={**dense, "units": value.shape[0], "use_bias": False},
                arrays={"kernel": value.T}, inputs=(other,), of=of if of != layer.name else "",
            ))  # fmt: skip
            continue
        if readers_[0].kind == "Attend":
            raise refuse(str(layer), "in Keras its table is looked up before it is used so")
        out.append(dataclasses.replace(
            layer, kind="ReversibleEmbedding" if turns else "Embedding",
            settings=told | ({"reverse": True} if layer.kind == "Attend" else {}),
            arrays={"embeddings": value}, inputs=(other,), of=of if of != layer.name else "",
        ))  # fmt: skip
    return dataclasses.replace(net, layers=[x for x in out if x.name not in first])


def without_tables(net: Net) -> Net:
    """The net with the table of each ReversibleEmbedding as an array that its calls take."""
    calls: dict[str, list[Layer]] = {}
    for layer in net.layers:
        if layer.kind == "ReversibleEmbedding":
            calls.setdefault(layer.of or layer.name, []).append(layer)
    out: list[Layer] = []
    for layer in net.layers:
        found = calls.get(layer.of or layer.name, [])
        out += _call(layer, found) if layer.kind == "ReversibleEmbedding" else [layer]
    return dataclasses.replace(net, layers=out)


def _call(layer: Layer, calls: list[Layer]) -> list[Layer]:
    """One call as layers, those that the first one needs with it."""
    told = dict(layer.settings)
    turned, tied = told.pop("reverse", False), told.pop("tie_weights", True)
    cap, dtype = told.pop("logit_soft_cap", None), told.pop("reverse_dtype", None)
    if dtype not in (None, layer.dtype or "float32"):
        raise refuse(str(layer), f"reverse_dtype={dtype!r}: it computes in {layer.dtype}",
                     "leave it out")  # fmt: skip
    reverse = [x for x in calls if x.settings.get("reverse")]
    own = {k: v for k, v in layer.arrays.items() if k != "reverse_embeddings"}
    if not reverse or (not tied and not turned):
        first = next(x.name for x in calls if not x.settings.get("reverse"))
        return [dataclasses.replace(layer, kind="Embedding", settings=told, arrays=own,
                                    of=first if first != layer.name else "")]  # fmt: skip
    made: list[Layer] = []
    if not tied:
        kernel = layer.arrays["reverse_embeddings"]
        first = reverse[0].name
        of = "" if first == layer.name else first if cap is None else f"{first}__logits"
        made.append(dataclasses.replace(
            layer, kind="Dense", settings={"units": kernel.shape[1], "use_bias": False},
            arrays={"kernel": kernel}, of=of,
        ))  # fmt: skip
    else:
        if told.get("mask_zero"):
            raise refuse(str(layer), "mask_zero=True, and it is called with reverse=True too",
                         "where no input is padded, make it with mask_zero=False")  # fmt: skip
        table = joined([*parts_of(layer.of or layer.name), "embedding"])
        if not layer.of:
            (value,) = own.values()
            made.append(Layer(table, "Parameter", {"shape": value.shape}, {"value": value},
                              dtype=layer.dtype))  # fmt: skip
        (given,) = layer.inputs
        made.append(dataclasses.replace(
            layer, kind="Attend" if turned else "Lookup", settings={}, arrays={}, of="",
            inputs=(given, table) if turned else (table, given),
        ))  # fmt: skip
    if turned and cap is not None:
        if not number(cap):
            raise refuse(str(layer), f"logit_soft_cap={cap!r} divides by zero")
        last = made[-1]
        names = [f"{layer.name}__logits", f"{layer.name}__by_cap", f"{layer.name}__capped"]
        made[-1] = dataclasses.replace(last, name=names[0])
        steps = [("Rescaling", {"scale": 1 / cap}), ("Activation", {"activation": "tanh"}),
                 ("Rescaling", {"scale": float(cap)})]  # fmt: skip
        for name, before, (kind, settings) in zip(
            [*names[1:], layer.name], names, steps, strict=True
        ):
            made.append(Layer(name, kind, settings, inputs=(before,), dtype=layer.dtype))
    return made
