"""Layers of an ONNX graph that are called several times, and those that no output needs."""

import numpy as np

from fwt.converters.onnx.reader import Reader
from fwt.converters.rows.row import Layer


def called_again(reader: Reader, ends: list[str]) -> list[Layer]:
    """The layers that the outputs follow from; one that has the settings and the arrays of another,
    under the same names in the file, calls that again."""
    needed = set(ends)
    for layer in reversed(reader.layers):
        if layer.name in needed:
            needed |= {*layer.inputs}
    layers = [x for x in reader.layers if x.name in needed]
    first: dict[object, list[Layer]] = {}
    for layer in layers:
        sources = reader.sources.get(layer.name)
        if not layer.arrays or not layer.inputs or not sources:
            continue
        group = first.setdefault((layer.kind, frozenset(sources)), [])
        found = next((x for x in group if _alike(x, layer)), None)
        if found is None:
            group.append(layer)
        else:
            layer.of = found.name
    return layers


def _alike(a: Layer, b: Layer) -> bool:
    return (
        a.settings == b.settings
        and a.arrays.keys() == b.arrays.keys()
        and all(np.array_equal(v, b.arrays[k], equal_nan=True) for k, v in a.arrays.items())
    )
