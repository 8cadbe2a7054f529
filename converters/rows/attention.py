"""Rows of attention. The arrays are Flax's and Keras's, one for each of query, key and value."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from fwt import layers as fl
from fwt.converters.rows.lower import time_first
from fwt.converters.rows.row import (
    Around,
    At,
    Framework,
    Layer,
    P,
    Row,
    S,
    Special,
    Take,
    flag,
    number,
    refuse,
    whole,
)

_PARTS = ("query", "key", "value")


def _split(arrays: dict[str, Any], inside: str, to: str, heads: int) -> dict[str, Any]:
    """Torch's joined projections as one kernel each, (in, heads, width)."""
    out: dict[str, Any] = {}
    whole_ = arrays.pop(f"{inside}in_proj_weight", None)
    apart = [arrays.pop(f"{inside}{part[0]}_proj_weight", None) for part in _PARTS]
    size = arrays[f"{inside}out_proj.weight"].shape[0]
    bias = arrays.pop(f"{inside}in_proj_bias", None)
    for index, part in enumerate(_PARTS):
        rows = slice(index * size, (index + 1) * size)
        weight = apart[index] if whole_ is None else whole_[rows]
        out[f"{to}{part}/kernel"] = weight.T.reshape(-1, heads, size // heads)
        if bias is not None:
            out[f"{to}{part}/bias"] = bias[rows].reshape(heads, size // heads)
    end = arrays.pop(f"{inside}out_proj.weight")
    out[f"{to}out/kernel"] = end.T.reshape(heads, size // heads, size)
    if f"{inside}out_proj.bias" in arrays:
        out[f"{to}out/bias"] = arrays.pop(f"{inside}out_proj.bias")
    return out


def _join(arrays: dict[str, Any], inside: str, to: str) -> dict[str, Any]:
    """The inverse of :func:`_split`."""
    out: dict[str, Any] = {}
    kernels = [arrays.pop(f"{to}{part}/kernel") for part in _PARTS]
    weights = [k.reshape(len(k), -1).T for k in kernels]
    if len({w.shape for w in weights}) == 1:
        out[f"{inside}in_proj_weight"] = np.concatenate(weights)
    else:
        named = zip(_PARTS, weights, strict=True)
        out |= {f"{inside}{part[0]}_proj_weight": w for part, w in named}
    if f"{to}query/bias" in arrays:
        biases = [arrays.pop(f"{to}{part}/bias").reshape(-1) for part in _PARTS]
        out[f"{inside}in_proj_bias"] = np.concatenate(biases)
    end = arrays.pop(f"{to}out/kernel")
    out[f"{inside}out_proj.weight"] = end.reshape(-1, end.shape[-1]).T
    if f"{to}out/bias" in arrays:
        out[f"{inside}out_proj.bias"] = arrays.pop(f"{to}out/bias")
    return {k: np.ascontiguousarray(v) for k, v in out.items()}


class BatchFirst(Special):
    """What is written for torch takes the batch first."""

    def write(
        self, framework: Framework, fields: dict[str, Any], settings: dict[str, Any], at: At
    ) -> list[Around]:
        if framework == "torch":
            settings["batch_first"] = True
        return []


class Attention(BatchFirst):
    """The settings of attention of one tensor with itself."""

    def read(self, framework: Framework, take: Take, fields: dict[str, Any], at: At) -> None:
        if framework == "flax":
            for name in ("qkv_features", "out_features", "dropout_rate"):
                take(name)
            if take("deterministic") is False:
                raise refuse(take.place, "deterministic=False: it drops at inference too")
        elif framework == "torch":
            for name in ("embed_dim", "kdim", "vdim", "batch_first", "dropout"):
                take(name)
        else:
            for name in ("key_dim", "value_dim", "output_shape", "dropout"):
                take(name)
            if take("attention_axes") not in (None, [1], (1,)):
                raise refuse(take.place, f"attention_axes={take('attention_axes')!r}: only time")

    def finish(
        self, framework: Framework, layer: Layer, fields: Mapping[str, Any], sizes: Any, at: At
    ) -> Layer:
        arrays = dict(layer.arrays)
        if arrays["query/kernel"].shape[1] != fields["num_heads"]:
            raise refuse(
                at.place,
                f"query/kernel has {arrays['query/kernel'].shape[1]} heads, expected "
                f"{fields['num_heads']}",
            )
        if framework == "keras":
            name = "attention_output/"
            inputs, _, width = arrays["query/kernel"].shape
            layer.settings["key_dim"] = width
            outputs = arrays["out/kernel"].shape[-1]
            if outputs != inputs:
                layer.settings["output_shape"] = (outputs,)
            layer.arrays = {k.replace("out/", name): v for k, v in arrays.items()}
            return layer
        inputs, heads, width = arrays["query/kernel"].shape
        outputs = arrays["out/kernel"].shape[-1]
        if framework == "flax":
            if heads * width != inputs:
                layer.settings["qkv_features"] = heads * width
            if outputs != inputs:
                layer.settings["out_features"] = outputs
            return layer
        if heads * width != inputs or outputs != inputs:
            raise refuse(
                at.place,
                f"torch's attention keeps its {inputs} channels, found {heads} heads of {width} "
                f"and {outputs} outputs",
            )
        layer.settings["embed_dim"] = inputs
        for name, part in (("kdim", "key"), ("vdim", "value")):
            if len(arrays[f"{part}/kernel"]) != inputs:
                layer.settings[name] = len(arrays[f"{part}/kernel"])
        layer.arrays = _join(arrays, "", "")
        return layer


def _lower_attention(framework: Framework, layer: Layer, rank: int | None) -> Any:
    if "query/kernel" in layer.arrays:
        if framework == "keras" and "attention_output/kernel" in layer.arrays:
            arrays = {k.replace("attention_output/", "out/"): v for k, v in layer.arrays.items()}
            settings = dict(layer.settings)
            if settings.get("value_dim") not in (None, settings.get("key_dim")):
                return [dataclasses.replace(layer, kind="WideAttention")]
            kind = "CausalSelfAttention" if settings.pop("use_causal_mask", 0) else "SelfAttention"
            return [dataclasses.replace(layer, arrays=arrays, kind=kind, settings=settings)]
        return None
    if framework != "torch":
        return None
    found = time_first(layer)
    if found is not None:
        return found
    left = dict(layer.arrays)
    for name in ("out_proj.weight", *([] if "q_proj_weight" in left else ["in_proj_weight"])):
        if name not in left:
            raise refuse(str(layer), f"the array {name!r} is missing")
    arrays = _split(left, "", "", layer.settings["num_heads"])
    arrays |= left  # what is unknown is named later
    return [dataclasses.replace(layer, arrays=arrays, kind="SelfAttention")]


def _attention_params(to: str = "") -> tuple[P, ...]:
    out = []
    for part, letter in zip(_PARTS, "iay", strict=True):
        out.append(P.alike(f"{to}{part}/kernel: {letter} m k"))
        out.append(P.alike(f"{to}{part}/bias: m k", when="use_bias"))
    out.append(P.alike(f"{to}out/kernel: m k o"))
    out.append(P.alike(f"{to}out/bias: o", when="use_bias"))
    return tuple(out)


ATTENTION = Row(
    nn.MultiHeadDotProductAttention,
    "SelfAttention",
    "SelfAttention",
    axes="n t i -> n t o",
    several="n t i, n s a, n s y -> n t o",
    ranks=(3,),
    settings=(
        S("num_heads", "num_heads", "num_heads", normal=whole),
        S("use_bias", "bias", "use_bias", True, normal=flag),
    ),
    params=_attention_params(),
    keras_defaults={
        "attention_axes": None,
        "flash_attention": None,
        "use_gate": False,
        "sliding_window": None,
        "output_shape": None,
        "value_dim": None,
        "dropout": 0.0,
    },
    special=Attention(),
    ordered=True,
    lower=_lower_attention,
)


class Encoder(BatchFirst):
    """The settings of torch's TransformerEncoderLayer."""

    def read(self, framework: Framework, take: Take, fields: dict[str, Any], at: At) -> None:
        if framework == "torch":
            for name in ("d_model", "dropout", "batch_first"):
                take(name)

    def finish(
        self, framework: Framework, layer: Layer, fields: Mapping[str, Any], sizes: Any, at: At
    ) -> Layer:
        if framework != "torch":
            return layer
        arrays = dict(layer.arrays)
        layer.settings["d_model"] = arrays["linear1/kernel"].shape[0]
        out = _join(arrays, "self_attn.", "self_attention/")
        for name, value in arrays.items():
            part, _, leaf = name.partition("/")
            there = {"kernel": "weight", "scale": "weight", "bias": "bias"}[leaf]
            out[f"{part}.{there}"] = value.T if leaf == "kernel" else value
        layer.arrays = {k: np.ascontiguousarray(v) for k, v in out.items()}
        return layer


def _lower_encoder(framework: Framework, layer: Layer, rank: int | None) -> Any:
    if framework != "torch" or "linear1/kernel" in layer.arrays:
        return None
    found = time_first(layer)
    if found is not None:
        return found
    left = dict(layer.arrays)
    arrays = _split(left, "self_attn.", "self_attention/", layer.settings["nhead"])
    for name, value in left.items():
        part, _, leaf = name.rpartition(".")
        if part in ("linear1", "linear2") and leaf == "weight":
            arrays[f"{part}/kernel"] = value.T
        elif part in ("norm1", "norm2") and leaf == "weight":
            arrays[f"{part}/scale"] = value
        else:
            arrays[f"{part}/{leaf}"] = value
    return [dataclasses.replace(layer, arrays=arrays)]


ENCODER = Row(
    fl.TransformerEncoderLayer,
    "TransformerEncoderLayer",
    None,
    axes="n t c -> n t c",
    ranks=(3,),
    settings=(
        S("num_heads", "nhead", None, normal=whole),
        S("mlp_features", "dim_feedforward", None, normal=whole),
        S("norm_first", "norm_first", None, normal=flag),
        S("activation", "activation", None),
        S("epsilon", "layer_norm_eps", None, normal=number),
        S("use_bias", "bias", None, normal=flag),
    ),
    params=(
        *(P(p.flax, p.flax, "-", p.when) for p in _attention_params("self_attention/")),
        *(
            P(text, text, "-", when="use_bias" if "bias" in text else None)
            for text in (
                *("linear1/kernel: c h", "linear1/bias: h"),
                *("linear2/kernel: h c", "linear2/bias: c"),
                *("norm1/scale: c", "norm1/bias: c", "norm2/scale: c", "norm2/bias: c"),
            )
        ),
    ),
    special=Encoder(),
    ordered=True,
    lower=_lower_encoder,
    lacks={"keras": "keras.layers has no such layer"},
)


def _lower_causal(framework: Framework, layer: Layer, rank: int | None) -> Any:
    if "out_proj.weight" not in layer.arrays:
        return None
    parts = _lower_attention(framework, dataclasses.replace(layer, kind="SelfAttention"), rank)
    return [dataclasses.replace(x, kind="CausalSelfAttention") for x in parts]


CAUSAL = dataclasses.replace(
    ATTENTION,
    flax=fl.CausalAttention,
    torch="CausalSelfAttention",
    keras="CausalSelfAttention",
    lower=_lower_causal,
)
ROWS: tuple[Row, ...] = (
    ATTENTION,
    CAUSAL,
    Row(
        None,
        "MultiheadAttention",
        "MultiHeadAttention",
        lower=_lower_attention,
        note="of one tensor with itself, a Sequential holds a small subclass that fwt defines",
    ),
    ENCODER,
)
