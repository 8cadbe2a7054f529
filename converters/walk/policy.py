"""The dtype that each layer computes in, which Keras calls its policy with that of its arrays.

Flax says both for each layer, as ``dtype`` and ``param_dtype``. torch says one by its arrays. A
model that computes in float32 throughout says neither.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp

from fwt.converters.rows.row import Framework, Layer, refuse
from fwt.converters.walk.net import Net, fresh

# What gives the same whether its values are rounded before it or after.
_MOVES = ("Dropout", "Flatten", "Reshape", "Permute", "Identity")
COMPUTED = ("float32", "float16", "bfloat16", "float64")
POLICIES = (*COMPUTED, "mixed_float16", "mixed_bfloat16")  # of Keras
_CAST = "cast the variables first, jax.tree.map(lambda x: x.astype('float32'), ...)"
WAY_OUT = "load(path, dtype='float32') and from_keras(model, dtype='float32') drop the policy"


def name_of(dtype: Any, place: str) -> str | None:
    """The name of what a Flax layer has as its dtype."""
    try:
        found = None if dtype is None else jnp.dtype(dtype)
    except TypeError:
        found = jnp.dtype(bool)
    if found is not None and not jnp.issubdtype(found, jnp.floating):
        raise refuse(place, f"dtype={dtype!r:.80}: expected one of floating-point numbers")
    return None if found is None else found.name


def held(layers: Sequence[Layer]) -> set[str]:
    """The dtypes of the floating arrays of layers."""
    return {str(v.dtype) for x in every(layers) for v in x.arrays.values()
            if jnp.issubdtype(v.dtype, jnp.floating)}  # fmt: skip


def every(layers: Sequence[Layer]) -> Iterator[Layer]:
    """The layers and what they wrap."""
    for layer in layers:
        yield layer
        yield from every(layer.inner)


def check_said(layers: Sequence[Layer]) -> None:
    """Raises where a Flax model has weights in half precision and says no dtype: it computes in
    float32 where its input is, and Keras in half precision."""
    for layer in layers if not any(x.dtype for x in layers) else ():
        for found in held([layer]) & {"float16", "bfloat16"}:
            raise refuse(str(layer), f"its weights are {found} and it says no dtype=, so that Flax "
                         f"computes in float32 where the input is, and Keras in {found}",
                         "give each layer dtype=, or make the weights float32: net.float() in "
                         "torch, or load(path, dtype='float32')")  # fmt: skip


def check_asked(layers: Sequence[Layer]) -> None:
    """Raises where a Flax model asks for weights in half precision and says no dtype, which torch
    has no way to compute as Flax does: it would take no float32."""
    for layer in layers if not any(x.dtype for x in layers) else ():
        asked = str(jnp.dtype(layer.settings.get("param_dtype") or "float32"))
        for found in held([layer]) & {asked} & {"float16", "bfloat16"}:
            raise refuse(str(layer), f"it says param_dtype={found} and no dtype=, so that Flax "
                         f"computes in float32 where the input is, and torch in {found} alone",
                         _CAST)  # fmt: skip


def settled(net: Net, source: Framework, target: Framework) -> list[Layer]:
    """The layers, each with the dtype that it computes in, or none of them with one."""
    layers = net.layers
    told, arrays = {x.dtype for x in layers if x.dtype}, held(layers)
    if told <= {"float32"} and arrays <= {"float32"}:
        return [dataclasses.replace(x, dtype=None) for x in layers]
    # What says nothing computes in what it is given: in torch that is the dtype of the arrays.
    start = "float32" if told or len(arrays) != 1 else next(iter(arrays))
    if source != "flax" or not (told or target == "keras"):
        return list(layers)
    found: dict[str, Any] = {}  # what each gives
    out: list[Layer] = []
    for layer in layers:
        dtype: Any = layer.dtype
        if dtype is None and layer.kind not in _MOVES:
            dtype = found.get(layer.inputs[0], start) if layer.inputs else None
            for name in layer.inputs[1:]:
                dtype = jnp.promote_types(dtype, found.get(name, start)).name
            for one in held([layer]):
                dtype = jnp.promote_types(dtype or one, one).name
        before = found.get(layer.inputs[0], start) if layer.inputs else start
        found[layer.name] = dtype or before
        out.append(dataclasses.replace(layer, dtype=dtype))
    readers = net.readers()
    place = {layer.name: index for index, layer in enumerate(out)}
    for index in reversed(range(len(out))):
        if out[index].dtype is None:
            after = readers.get(out[index].name)
            dtype = out[place[after[0].name]].dtype if after else found[out[index].name]
            out[index] = dataclasses.replace(out[index], dtype=dtype)
    return out


def check_torch(layers: Sequence[Layer]) -> None:
    """Raises where layers of torch would have to compute in another dtype than that of all
    arrays, or to cast between them."""
    told = next((x for x in layers if x.dtype), None)
    if told is None:
        return
    for layer in layers:
        if layer.dtype != told.dtype:
            raise refuse(
                str(layer),
                f"it computes in {layer.dtype}, but {told} in {told.dtype}, and torch casts "
                "nothing between layers",
                WAY_OUT,
            )
        for found in held([layer]) - {str(told.dtype)}:
            raise refuse(
                str(layer),
                f"it computes in {told.dtype} with weights in {found}, and torch's layers compute "
                "in the dtype of their weights",
                WAY_OUT,
            )
    if not held(layers):
        raise refuse(
            str(told),
            f"it computes in {told.dtype}, and the model has no weights that could tell torch so",
            WAY_OUT,
        )


def _with_casts(layers: Sequence[Layer]) -> list[Layer]:
    """The layers, and before each operation of Keras, which computes in what it is given, a layer
    that casts what it takes."""
    gives = {x.name: x.dtype for x in layers}
    out: list[Layer] = []
    for layer in layers:
        if layer.kind.startswith("ops.") and layer.dtype:
            taken = [*layer.inputs]
            for i, name in enumerate(layer.inputs):
                if gives.get(name, "float32") != layer.dtype:
                    taken[i] = fresh(f"{layer.name}__cast_{i}", gives)
                    gives[taken[i]] = layer.dtype
                    out.append(Layer(taken[i], "Identity", {}, dtype=layer.dtype, inputs=(name,)))
            layer = dataclasses.replace(layer, inputs=tuple(taken))
        out.append(layer)
    return out


def to_keras(net: Net) -> None:
    """Gives each layer of Keras its policy as a setting, where it is not float32."""
    layers = net.layers
    for layer in every(layers):
        for name, value in layer.arrays.items():
            if not jnp.issubdtype(value.dtype, jnp.floating):
                raise refuse(f"{layer.name}/{name}", f"an array of {value.dtype}, which Keras has "
                             "no layer to hold")  # fmt: skip
            if str(value.dtype) not in COMPUTED:
                raise refuse(f"{layer.name}/{name}", f"dtype {value.dtype}: Keras models are "
                             f"written in {', '.join(COMPUTED)}", _CAST)  # fmt: skip
    if not any(x.dtype for x in layers):
        return
    net.layers = layers = _with_casts(layers)
    names: list[str | None] = []
    for layer in layers:
        compute, found = str(layer.dtype), held([layer])
        fitting = [n for n, variable in ((compute, compute), (f"mixed_{compute}", "float32"))
                   if n in POLICIES and found == {variable}]  # fmt: skip
        if not fitting and (found or compute not in COMPUTED):
            said = f" with weights in {' and '.join(sorted(found))}" if found else ""
            raise refuse(str(layer), f"it computes in {compute}{said}, for which Keras has no "
                         "policy", _CAST)  # fmt: skip
        names.append(fitting[0] if fitting else None)
    for index, layer in enumerate(layers):
        # What has no weights takes the policy of what stands nearest before it, or after.
        near = [*reversed(names[: index + 1]), *names[index + 1 :]]
        policy = next(
            (n for n in near if n and n.removeprefix("mixed_") == layer.dtype), layer.dtype
        )
        for part in every([layer]):
            part.settings["dtype"] = policy
            if "return_sequences" in part.settings and held([part]) & {"float16", "bfloat16"}:
                # Not every backend can draw the orthogonal one, Keras's default, in these.
                part.settings.setdefault("recurrent_initializer", "glorot_uniform")
