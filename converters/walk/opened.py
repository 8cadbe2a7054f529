"""Layers of Flax that a target lacks, as several that it has: their names lie inside the layer's,
so that the arrays keep their paths."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn

from fwt import layers as fl
from fwt._graph import renamed
from fwt.converters.rows import table
from fwt.converters.rows.row import At, Framework, Layer, read_settings
from fwt.converters.walk.net import Net


class Parts:
    """The layers that one is made of."""

    def __init__(self, layer: Layer):
        self.layer, self.made = layer, list[Layer]()

    def __call__(self, label: str, module: Any, *inputs: str, **arrays: Any) -> str:
        """Adds a layer with these arrays, or those whose names begin with its label, and tells its
        name."""
        whole, own = self.layer, f"{label}/"
        arrays = arrays or {
            k.removeprefix(own): v for k, v in whole.arrays.items() if k.startswith(own)
        }
        made = of_module(f"{whole.name}/{label}", module, arrays)
        made.settings.pop("dtype", None)
        made.inputs, made.dtype = inputs, whole.dtype
        made.of = f"{whole.of}/{label}" if whole.of else ""
        self.made.append(made)
        return made.name


def of_module(name: str, module: Any, arrays: dict[str, Any]) -> Layer:
    """A module of Flax as a layer with these arrays."""
    known = [f for f in dataclasses.fields(module) if f.name not in ("parent", "name")]
    fields = {f.name: getattr(module, f.name) for f in known if f.init}
    defaults = {f.name: f.default for f in known if f.default is not dataclasses.MISSING}
    return Layer(name, type(module).__name__, fields, arrays, defaults)


def opened(net: Net, target: Framework) -> Net:
    """The net of Flax in which each layer that the target lacks is taken apart."""
    out: list[Layer] = []
    alias: dict[str, str] = {}
    for layer in net.layers:
        layer = dataclasses.replace(layer, inputs=tuple(alias.get(i, i) for i in layer.inputs))
        apart = APART.get((layer.kind, target))
        if apart is None or (target == "torch" and _torch_says(layer)):
            out.append(layer)
            continue
        row = table.rows_of("flax", layer.kind)[0]
        read_settings(row, "flax", layer, At(str(layer), ()))  # which the parts do not look at
        parts = Parts(layer)
        alias[layer.name] = apart(parts, layer.settings, *layer.inputs)
        out += parts.made
    return dataclasses.replace(net, layers=out, outputs=renamed(net.outputs, alias))


def _encoder(add: Parts, told: Any, x: str) -> str:
    bias = told["use_bias"]

    def norm(label: str, v: str) -> str:
        module = nn.LayerNorm(told["epsilon"], use_bias=bias, use_fast_variance=False)
        return add(label, module, v)

    def attend(v: str) -> str:
        heads = told["num_heads"]
        return add("self_attention", nn.MultiHeadDotProductAttention(heads, use_bias=bias), v)

    def feed(v: str) -> str:
        width = add.layer.arrays["linear2/kernel"].shape[-1]
        v = add("linear1", nn.Dense(told["mlp_features"], use_bias=bias), v)
        act = {"relu": fl.ReLU(), "gelu": fl.GELU()}[told["activation"]]
        return add("linear2", nn.Dense(width, use_bias=bias), add("linear1__activation", act, v))

    if told["norm_first"]:
        x = add("add", fl.Add(), x, attend(norm("norm1", x)))
        return add("add__1", fl.Add(), x, feed(norm("norm2", x)))
    x = norm("norm1", add("add", fl.Add(), x, attend(x)))
    return norm("norm2", add("add__1", fl.Add(), x, feed(x)))


def _torch_says(layer: Layer) -> bool:
    """Whether torch's own attention is this one."""
    if "query/kernel" not in layer.arrays or "num_key_value_heads" in layer.settings:
        return not layer.arrays
    inputs, heads, width = layer.arrays["query/kernel"].shape
    same = layer.arrays["value/kernel"].shape[1:] == (heads, width)
    return same and bool(heads * width == inputs == layer.arrays["out/kernel"].shape[-1])


def _heads(add: Parts, told: Any, *xs: str) -> str:
    """Attention of several heads as dense layers and the products between them."""
    query, key, value = (xs[0], xs[min(1, len(xs) - 1)], xs[-1])
    arrays = add.layer.arrays

    def dense(label: str, x: str, kernel: Any, bias: Any) -> str:
        held = {"kernel": kernel} | ({} if bias is None else {"bias": bias})
        return add(label, nn.Dense(kernel.shape[1], use_bias=bias is not None), x, **held)

    def heads(label: str, x: str) -> str:
        kernel, bias = arrays[f"{label}/kernel"], arrays.get(f"{label}/bias")
        flat = kernel.reshape(len(kernel), -1), None if bias is None else bias.reshape(-1)
        shape = (-1, *kernel.shape[1:])
        return add(f"{label}__heads", fl.Reshape(shape), dense(label, x, *flat))

    parts = (heads("query", query), heads("key", key), heads("value", value))
    causal = add.layer.kind == "CausalAttention" or told.get("causal", False)
    y = add("attend", fl.DotProductAttention(causal), *parts)
    kernel = arrays["out/kernel"]
    flat = kernel.reshape(-1, kernel.shape[-1])
    return dense("out", add("attend__joined", fl.Flatten(2), y), flat, arrays.get("out/bias"))


APART: dict[tuple[str, Framework], Callable[..., str]] = {
    ("TransformerEncoderLayer", "keras"): _encoder,
    ("MultiHeadDotProductAttention", "torch"): _heads,
    ("CausalAttention", "torch"): _heads,
    ("GroupedQueryAttention", "torch"): _heads,
}
