"""The layers of a model one by one, each as operations of TensorFlow that become ONNX's."""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from fwt import layers as fl
from fwt._graph import Graph, end_of, inputs_of, may_hold, names_in, nodes_of
from fwt._sequential import Sequential, call
from fwt._types import ConversionError
from fwt.converters.onnx import ends
from fwt.converters.rows.row import parts_of, refuse


@contextlib.contextmanager
def refused(what: str, of_whole: str = "") -> Iterator[None]:
    """Turns whatever another library says into one line of ours, with a way out for a module that
    wants whole numbers."""
    try:
        yield
    except ConversionError:
        raise
    except Exception as error:  # linen, TensorFlow and onnxruntime raise classes of their own
        why = " ".join(str(error).split())
        way = of_whole if "integer" in why else ""
        raise ConversionError(f"{what} ({why:.300}){way}") from error


def through(
    tracer: Any, module: Any, tree: Any, xs: Sequence[Any], avals: Sequence[Any]
) -> tuple[list[Any], list[str], list[Any]]:
    """The outputs of a module, layer by layer, their names, and their shapes."""
    import tensorflow as tf

    if not isinstance(module, Sequential | Graph):
        ys, form = _one(tracer, module, tree, xs, avals, type(module).__name__, whole=True)
        return ys, ends.outputs(module, form), jax.tree.leaves(form)
    values = dict(zip(inputs_of(module), zip(xs, avals, strict=True), strict=True))
    layers = {n.name: n.layer for n in nodes_of(module)}
    for node in nodes_of(module):
        name = node.of or node.name
        given = [values[i] for i in node.inputs]
        place = f"{node.name} ({type(layers[name]).__name__})"
        parts = parts_of(name)
        with contextlib.ExitStack() as stack:
            for part in parts_of(node.name):
                stack.enter_context(tf.name_scope(_scope(part)))
            (made,), out = _one(
                tracer, layers[name], _own(tree, parts, layers[name]), [v for v, _ in given],
                [shape for _, shape in given], place,
            )  # fmt: skip
            values[node.name] = made, out
    found = [values[name] for name in names_in(end_of(module))]
    return [y for y, _ in found], ends.outputs(module, None), [out for _, out in found]


def _own(tree: Any, parts: Sequence[str], layer: Any) -> dict[str, Any]:
    """The weights of one layer, by collection."""
    out: dict[str, Any] = {}
    for collection, node in tree.items():
        for part in parts:
            node = node.get(part, {}) if isinstance(node, Mapping) else {}
        if isinstance(layer, fl.Parameter):  # an array where others have a scope
            if not isinstance(node, Mapping):
                return {collection: {"value": node}}
            continue
        if node and may_hold(layer):
            out[collection] = node
    return out


def _scope(name: str) -> str:
    text = re.sub(r"[^A-Za-z0-9_.\-/]", "_", name)
    return text if re.match(r"[A-Za-z0-9.]", text) else f"x{text}"


def _one(
    tracer: Any,
    layer: Any,
    own: Any,
    xs: Sequence[Any],
    avals: Sequence[Any],
    place: str,
    whole: bool = False,
) -> tuple[list[Any], Any]:
    """What a layer gives and its shape; of a whole module that may be several, in any form."""
    from fwt.converters.onnx.operators import NATIVE

    tracer.place = place

    def function(variables: Any, *ys: Any) -> Any:
        return call(layer, variables, *ys)

    structs = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.value.shape, w.value.dtype), own)
    shapes = ", ".join(f"{list(a.shape)} of {a.dtype}" for a in avals)
    floats = all(a.dtype.kind == "f" for a in avals)
    way = "; input_dtype='int32' feeds it whole numbers" if floats else ""
    with refused(f"{place}: it does not run on {shapes}", way):
        out = jax.eval_shape(function, structs, *avals)
    leaves = jax.tree.leaves(out)
    if not leaves or not (whole or hasattr(out, "shape")):
        raise refuse(place, "its output is no array")
    with refused(f"{place}: TensorFlow has no such operation"):
        plain = len(xs) == 1 and type(layer) in NATIVE and getattr(layer, "dtype", None) is None
        y = NATIVE[type(layer)](tracer, layer, own, xs[0], avals[0], out) if plain else None
        ys = tracer.apply_all(function, own, xs, avals)[0] if y is None else [y]
    return ys, out
