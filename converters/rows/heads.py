"""Rows of attention that Keras has and torch lacks, and of the products of two tensors."""

from collections.abc import Mapping
from typing import Any

from fwt import layers as fl
from fwt.converters.rows.row import (
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

_KERAS: dict[str, Any] = {
    **{"dropout": 0.0, "attention_axes": None, "flash_attention": None, "use_gate": False},
    **{"sliding_window": None, "use_causal_mask": False, "output_shape": None},
}


class Grouped(Special):
    """The settings of Keras's attention whose heads share keys, or whose values have sizes of their
    own."""

    def read(self, framework: Framework, take: Take, fields: dict[str, Any], at: At) -> None:
        if framework != "keras":
            return
        wide = "key_dim" in take.values
        names = ["key_dim", "num_heads", "num_heads"] if wide else [
            "head_dim", "num_query_heads", "num_key_value_heads"]  # fmt: skip
        fields["head_features"], fields["num_heads"], fields["num_key_value_heads"] = (
            whole(take(name)) for name in names
        )
        fields["value_features"] = take("value_dim") if wide else None
        out = take("output_shape") if wide else None
        out = out[0] if isinstance(out, list | tuple) and len(out) == 1 else out
        if not isinstance(out, int | None):
            raise refuse(take.place, f"output_shape={out!r}: only the size of one axis")
        fields["out_features"] = out
        fields["causal"] = bool(take("use_causal_mask"))
        take("dropout")
        if take("attention_axes") not in (None, [1], (1,)):
            raise refuse(take.place, f"attention_axes={take('attention_axes')!r}: only time")

    def finish(
        self, framework: Framework, layer: Layer, fields: Mapping[str, Any], sizes: Any, at: At
    ) -> Layer:
        if framework != "keras":
            return layer
        told = layer.settings
        told["use_causal_mask"] = fields["causal"]
        heads, few, size = (fields[n] for n in ("num_heads", "num_key_value_heads",
                                                "head_features"))  # fmt: skip
        values, out = fields["value_features"] or size, fields["out_features"]
        arrays = layer.arrays
        if arrays and out is None:
            out = arrays["attention_output/kernel"].shape[-1]
        own = arrays["query/kernel"].shape[0] if arrays else out
        if heads == few:
            layer.kind = "MultiHeadAttention"
            told |= {"num_heads": heads, "key_dim": size, "value_dim": values}
            told |= {} if out == own else {"output_shape": (out,)}
            return layer
        if values != size or out != own:
            raise refuse(at.place, "Keras's attention of shared keys keeps the sizes of heads and "
                         f"input, found {values} for {size} and {out} for {own}")  # fmt: skip
        told |= {"head_dim": size, "num_query_heads": heads, "num_key_value_heads": few}
        return layer


def _projections() -> tuple[P, ...]:
    parts = (("query", "i m", "k"), ("key", "a e", "k"), ("value", "y e", "l"))
    out: list[P] = []
    for name, axes, size in parts:
        out.append(P.alike(f"{name}/kernel: {axes} {size}"))
        out.append(P.alike(f"{name}/bias: {axes[-1]} {size}", when="use_bias"))
    theirs = "attention_output"
    out.append(P("out/kernel: m l o", "out/kernel: m l o", f"{theirs}/kernel: m l o"))
    out.append(P("out/bias: o", "out/bias: o", f"{theirs}/bias: o", when="use_bias"))
    return tuple(out)


_GROUPED: dict[str, Any] = {
    "axes": "n t i -> n t o",
    "several": "n t i, n s a, n s y -> n t o",
    "ranks": (3,),
    "settings": (
        *(
            S(name, None, "")
            for name in ("num_heads", "num_key_value_heads", "head_features", "value_features",
                         "out_features", "causal")
        ),
        S("use_bias", None, "use_bias", True, normal=flag),
    ),
    "params": _projections(),
    "keras_defaults": _KERAS,
    "special": Grouped(),
    "ordered": True,
    "note": "in torch linear layers and the products between them",
}  # fmt: skip


class Scored(Special):
    """The settings of Keras's attention without projections."""

    def read(self, framework: Framework, take: Take, fields: dict[str, Any], at: At) -> None:
        fields["concat"] = fields.get("mode") == "concat"
        if framework == "keras":
            take("dropout")
            fields["causal"] = bool(take("use_causal_mask"))

    def write(
        self, framework: Framework, fields: dict[str, Any], settings: dict[str, Any], at: At
    ) -> list[Any]:
        if framework == "keras":
            settings["use_causal_mask"] = fields["causal"]
        return []


def _mode(value: Any) -> str:
    if value not in ("dot", "concat"):
        raise ValueError("expected dot or concat")
    return str(value)


_SCORED: dict[str, Any] = {
    "axes": "n t i -> n t o",
    "several": "n t i, n s i, n s o -> n t o",
    "ranks": (3,),
    "keras_defaults": _KERAS,
    "special": Scored(),
    "ordered": True,
    "note": "in torch what its graph computes",
}


class Products(Special):
    """The settings of products of queries and keys that have heads."""

    def read(self, framework: Framework, take: Take, fields: dict[str, Any], at: At) -> None:
        if framework == "torch":
            take("enable_gqa")

    def write(
        self, framework: Framework, fields: dict[str, Any], settings: dict[str, Any], at: At
    ) -> list[Any]:
        if framework == "torch":
            settings["enable_gqa"] = True
        return []

    def finish(
        self, framework: Framework, layer: Layer, fields: Mapping[str, Any], sizes: Any, at: At
    ) -> Layer:
        if framework == "keras" and sizes.get("k") != sizes.get("l"):
            raise refuse(at.place, "Keras's operation has values of the size of its keys, found "
                         f"{sizes.get('l')} for {sizes.get('k')}")  # fmt: skip
        heads, shared = sizes.get("h"), sizes.get("g")
        if framework == "keras" and shared == 1 and heads != 1:
            raise refuse(at.place, f"one head of keys for {heads} of queries: Keras on TensorFlow "
                         "doesn't share it", "repeat it before")  # fmt: skip
        if framework == "torch" and heads is not None and heads == shared:
            layer.settings["enable_gqa"] = False
        return layer


ROWS: tuple[Row, ...] = (
    Row(fl.GroupedQueryAttention, None, "GroupQueryAttention", **_GROUPED),
    Row(fl.GroupedQueryAttention, None, "WideAttention", **_GROUPED),
    Row(
        fl.Attention,
        "Attention",
        "Attention",
        settings=(
            S("mode", "mode", "score_mode", "dot", normal=_mode),
            S("use_scale", "use_scale", "use_scale", False, normal=flag),
            S("causal", "causal", ""),
        ),
        params=(
            P.alike("scale:", when="use_scale"),
            P.alike("concat_score_weight:", when="concat"),
        ),
        **_SCORED,
    ),
    Row(
        fl.AdditiveAttention,
        "AdditiveAttention",
        "AdditiveAttention",
        settings=(
            S("use_scale", "use_scale", "use_scale", True, normal=flag),
            S("causal", "causal", ""),
        ),
        params=(P.alike("scale: i", when="use_scale"),),
        **_SCORED,
    ),
    Row(
        fl.DotProductAttention,
        "DotProductAttention",
        "ops.DotProductAttention",
        several="n t h k, n s g k, n s g l -> n t h l",
        torch_several="n h t k, n g s k, n g s l -> n h t l",
        ranks=(4,),
        settings=(
            S("causal", "is_causal", "is_causal", False, normal=flag),
            S("scale", "scale", "scale", None, normal=lambda x: None if x is None else number(x)),
        ),
        special=Products(),
    ),
)
