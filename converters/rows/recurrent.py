"""Rows of recurrent layers.

Flax's are ours, in Keras's form: one bias (GRU: two rows of it), gates in Keras's order. torch's
two biases of a gate only ever appear as their sum, so the sum is what crosses: the second is zero
on the way back.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from fwt import layers as fl
from fwt.converters.rows.lower import Lower, inner_layer, time_first
from fwt.converters.rows.row import (
    STATE,
    Around,
    At,
    Framework,
    Layer,
    P,
    Row,
    S,
    Special,
    Take,
    each,
    flag,
    refuse,
    whole,
)
from fwt.layers import recurrent

_KERAS_TRAINING = {
    "dropout": 0.0,
    "recurrent_dropout": 0.0,
    "unroll": False,
    "implementation": 2,
    "zero_output_for_mask": False,
    "use_cudnn": "auto",
}
# For training alone, but reset asks for it.
_FORGET = S("unit_forget_bias", "", "unit_forget_bias", True, normal=flag)
_TORCH_GATES = {"RNN": 1, "LSTM": 4, "GRU": 3}


def activation(x: Any) -> str:
    """The name of a function in keras.activations."""
    if isinstance(x, Mapping) and x.get("class_name") == "function":
        x = x.get("config")
    if x is None:
        return "linear"
    if x not in recurrent.ACTIVATIONS:
        raise ValueError(f"only {', '.join(recurrent.ACTIVATIONS)} can be converted")
    return str(x)


def _check_functions(fields: Mapping[str, Any], at: At) -> None:
    """Raises for the function that Keras has no more."""
    for name in ("activation", "recurrent_activation"):
        if fields.get(name) == recurrent.HARD_SIGMOID:
            raise refuse(at.place, f"{name}='{fields[name]}' is 0.2 x + 0.5 between 0 and 1, which "
                         "Keras 3 has no function for")  # fmt: skip


def _swapped(value: Any, axis: int) -> Any:
    """Keras's gates z, r, h as torch's r, z, n, which is its own inverse."""
    z, r, h = np.split(value, 3, axis=axis)
    return np.concatenate([r, z, h], axis=axis)


class RecurrentSettings(Special):
    """What stands beside the arrays: directions, and what is given out."""

    def __init__(self, torch: str):
        self.torch = torch

    def read(self, framework: Framework, take: Take, fields: dict[str, Any], at: At) -> None:
        if framework == "flax":
            if fields["merge"] not in (None, *recurrent.MERGES):
                raise refuse(take.place, f"merge={fields['merge']!r} is not known")
            fields["activation"] = activation(fields["activation"])
            return
        if framework == "keras":
            for name in _KERAS_TRAINING:
                if name in take.values:
                    take(name)
            return
        for name in ("input_size", "batch_first", "num_layers", "dropout"):
            take(name)
        select = take.values.get("select") or {"what": "sequence", "merge": None}
        take.taken |= {"select", "mode"}
        fields["return_sequences"] = select["what"] == "sequence"
        both = take("bidirectional")
        if select["merge"] and not both:
            raise refuse(take.place, f"Select(merge={select['merge']!r}) after one direction only")
        if both and select["what"] == "last" and not select["merge"]:
            raise refuse(
                take.place,
                "Select('last') takes the last step of both directions, which is the first that "
                "the second one computes",
                "Select('last', 'concat') takes the last that each computes",
            )
        fields["merge"] = (select["merge"] or "concat") if both else None
        fields["reverse"] = bool(take.values.get("reverse", False))
        take.taken.add("reverse")
        if self.torch == "LSTM":
            fields["projection"] = take("proj_size") or None
            fields["unit_forget_bias"] = True
        # torch has no choice of these, but ONNX, which is read in torch's terms, has.
        said = take.values
        take.taken |= {"activation", "recurrent_activation", "reset_after"}
        if "activation" in said:
            fields["activation"] = said["activation"]
        else:
            fields["activation"] = take("nonlinearity") if self.torch == "RNN" else "tanh"
        if self.torch != "RNN":
            fields["recurrent_activation"] = said.get("recurrent_activation", "sigmoid")
        if self.torch == "GRU":
            fields["reset_after"] = said.get("reset_after", True)

    def write(
        self, framework: Framework, fields: dict[str, Any], settings: dict[str, Any], at: At
    ) -> list[Around]:
        if framework == "flax":
            return []
        if framework == "keras":
            _check_functions(fields, at)
            if fields.get("projection"):
                raise refuse(at.place, "Keras's LSTM has no projection")
            return []
        if self.torch == "RNN":
            if fields["activation"] not in ("tanh", "relu"):
                raise refuse(at.place, f"torch's RNN has no activation={fields['activation']!r}")
            settings["nonlinearity"] = fields["activation"]
        usual = {"activation": "tanh", "recurrent_activation": "sigmoid", "reset_after": True}
        for name, value in usual.items():
            if self.torch != "RNN" and fields.get(name, value) != value:
                raise refuse(at.place, f"torch's {self.torch} has no {name}={fields[name]!r}")
        if fields["reverse"] and fields["merge"]:
            raise refuse(at.place, "torch's second direction is always the backward one")
        if fields.get("projection"):
            settings["proj_size"] = fields["projection"]
        settings |= {"batch_first": True, "bidirectional": fields["merge"] is not None}
        return []

    def finish(
        self, framework: Framework, layer: Layer, fields: Mapping[str, Any], sizes: Any, at: At
    ) -> "Layer | list[Layer]":
        if framework == "torch":
            layer.settings["input_size"] = layer.arrays["weight_ih_l0"].shape[1]
            what = "sequence" if fields["return_sequences"] else "last"
            merge = None if fields["merge"] in (None, "concat") else fields["merge"]
            select = {"what": what, "merge": merge}
            if fields["merge"] and what == "last":
                select["merge"] = fields["merge"]
            out = [layer, Layer(f"{layer.name}__output", "Select", select)]
            flip = Layer(f"{layer.name}__flip", "Flip", {"dim": 1})
            return [flip, *out] if fields["reverse"] else out
        if framework == "keras" and fields["merge"] is not None:
            return _bidirectional(layer, fields["merge"])
        return layer


def _bidirectional(layer: Layer, merge: str) -> Layer:
    def part(name: str, suffix: str, backwards: bool) -> Layer:
        settings = {**layer.settings, "go_backwards": backwards != layer.settings["go_backwards"]}
        arrays = {
            k.removesuffix("_reverse"): v
            for k, v in layer.arrays.items()
            if k.endswith("_reverse") == bool(suffix)
        }
        return Layer(name, layer.kind, settings, arrays)

    kind = layer.kind.lower()
    inner = part(f"forward_{kind}", "", False), part(f"backward_{kind}", "_reverse", True)
    return Layer(layer.name, "Bidirectional", {"merge_mode": merge}, inner=inner)


def _lower_torch(framework: Framework, layer: Layer, rank: int | None) -> "list[Layer] | None":
    """One layer after the other, batch first, biases summed and gates in Keras's order."""
    if framework != "torch":
        return None
    settings, kind = layer.settings, layer.kind
    count = settings["num_layers"]
    selected = settings.get("select") or {"what": "sequence"}
    found = time_first(layer, back=selected["what"] == "sequence")
    if found is not None:
        return found
    if count == 1:
        return None
    select = settings.get("select") or {"what": "sequence", "merge": None}
    parts = []
    for index in range(count):
        last = index == count - 1
        own = {**settings, "num_layers": 1}
        own["select"] = select if last else {"what": "sequence", "merge": None}
        own["reverse"] = settings.get("reverse", False) if index == 0 else False
        arrays = {}
        for name, value in layer.arrays.items():
            stem, _, suffix = name.rpartition("_l")
            number, _, reverse = suffix.partition("_")
            if number == str(index):
                arrays[f"{stem}_l0" + (f"_{reverse}" if reverse else "")] = value
        parts.append(Layer(f"{layer.name}__l{index}", kind, own, arrays, layer.defaults))
    return parts


class TorchWeights:
    """torch's arrays as Keras's and back, one direction at a time."""

    def __init__(self, kind: str):
        self.kind = kind

    def read(self, arrays: Mapping[str, Any], place: str) -> dict[str, Any]:
        out: dict[str, Any] = {}
        left = dict(arrays)
        for suffix in ("", "_reverse"):
            if f"weight_ih_l0{suffix}" not in left:
                continue
            order = (lambda v: _swapped(v, 0)) if self.kind == "GRU" else (lambda v: v)
            out["kernel" + suffix] = order(left.pop(f"weight_ih_l0{suffix}")).T
            out["recurrent_kernel" + suffix] = order(left.pop(f"weight_hh_l0{suffix}")).T
            if f"weight_hr_l0{suffix}" in left:
                out["projection_kernel" + suffix] = left.pop(f"weight_hr_l0{suffix}").T
            if f"bias_ih_l0{suffix}" in left:
                first = order(left.pop(f"bias_ih_l0{suffix}"))
                second = order(left.pop(f"bias_hh_l0{suffix}"))
                if self.kind != "GRU":
                    out["bias" + suffix] = first + second
                    continue
                # Those of z and r only appear as their sum.
                gates = 2 * (len(first) // 3)
                first, second = first.copy(), second.copy()
                first[:gates] += second[:gates]
                second[:gates] = 0
                out["bias" + suffix] = np.stack([first, second])
        if left:
            raise refuse(place, f"the array {sorted(left)[0]!r} is not known to this layer")
        return out

    def write(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        order = (lambda v: _swapped(v, 0)) if self.kind == "GRU" else (lambda v: v)
        for suffix in ("", "_reverse"):
            if "kernel" + suffix not in arrays:
                continue
            out[f"weight_ih_l0{suffix}"] = order(arrays["kernel" + suffix].T)
            out[f"weight_hh_l0{suffix}"] = order(arrays["recurrent_kernel" + suffix].T)
            bias = arrays.get("bias" + suffix)
            if bias is not None:
                first, second = bias if self.kind == "GRU" else (bias, np.zeros_like(bias))
                out[f"bias_ih_l0{suffix}"] = order(first)
                out[f"bias_hh_l0{suffix}"] = order(second)
            if "projection_kernel" + suffix in arrays:
                out[f"weight_hr_l0{suffix}"] = arrays["projection_kernel" + suffix].T
        return {k: np.ascontiguousarray(v) for k, v in out.items()}


def bidirectional(framework: Framework, layer: Layer, rank: int | None) -> "list[Layer] | None":
    """Keras's wrapper of two layers as one with a second direction."""
    if len(layer.inner) != 2:
        raise refuse(str(layer), f"it wraps {len(layer.inner)} layers, expected 2")
    forward, backward = layer.inner
    merge = layer.settings.get("merge_mode")
    if merge not in recurrent.MERGES:
        raise refuse(str(layer), f"merge_mode={merge!r}: it gives two outputs")
    if set(layer.settings) - {"name", "trainable", "merge_mode"}:
        extra = sorted(set(layer.settings) - {"name", "trainable", "merge_mode"})
        raise refuse(str(layer), f"{extra[0]}={layer.settings[extra[0]]!r} is not known")
    mine = {k: v for k, v in forward.settings.items() if k not in ("name", "go_backwards")}
    theirs = {k: v for k, v in backward.settings.items() if k not in ("name", "go_backwards")}
    skip = ("seed", "trainable")
    if forward.kind != backward.kind or any(
        mine.get(k) != theirs.get(k)
        for k in {*mine, *theirs}
        if k not in skip and not k.endswith(("_initializer", "_regularizer", "_constraint"))
    ):
        raise refuse(str(layer), "its two layers have other settings")
    if forward.settings.get("go_backwards") == backward.settings.get("go_backwards"):
        raise refuse(str(layer), "its two layers run in the same direction")
    arrays = dict(forward.arrays)
    arrays |= {f"{k}_reverse": v for k, v in backward.arrays.items() if k not in STATE["keras"]}
    settings = {**forward.settings, "merge": merge}
    return [Layer(layer.name, forward.kind, settings, arrays)]


def over_cell(framework: Framework, layer: Layer, rank: int | None) -> "list[Layer] | None":
    """Keras's RNN over a stock cell as the layer of that cell."""
    cell = layer.inner[0] if layer.inner else None
    kinds = {"LSTMCell": "LSTM", "GRUCell": "GRU", "SimpleRNNCell": "SimpleRNN"}
    if cell is None or cell.kind not in kinds:
        several = cell is not None and cell.kind == "StackedRNNCells"
        way = "make an RNN of each cell, one after the other" if several else ""
        raise refuse(str(layer), "only an RNN over one SimpleRNNCell, LSTMCell or GRUCell is "
                     "known", way)  # fmt: skip
    own = {k: v for k, v in cell.settings.items() if k not in ("name", "trainable", "dtype")}
    return [Layer(layer.name, kinds[cell.kind], {**layer.settings, **own}, cell.arrays)]


def _outputs(fields: Mapping[str, Any]) -> dict[str, int]:
    one = fields.get("projection") or fields["features"]
    return {"o": 2 * one if fields.get("merge") == "concat" else one}


def _recurrent_row(flax: type, torch: str, keras: str, *more: S) -> Row:
    weights = TorchWeights(torch)

    def lower(framework: Framework, layer: Layer, rank: int | None) -> "list[Layer] | None":
        found = _lower_torch(framework, layer, rank)
        if found is not None or framework != "torch" or "kernel" in layer.arrays:
            return found
        arrays = weights.read(layer.arrays, str(layer))
        return [dataclasses.replace(layer, arrays=arrays)]

    params = []
    for suffix, when in (("", None), ("_reverse", "merge")):
        names = ["kernel: i q", "recurrent_kernel: r q"]
        params += [P.alike(n.replace(":", f"{suffix}:"), when=when) for n in names]
        if torch == "LSTM":
            params.append(P.alike(f"projection_kernel{suffix}: y p", when="projection" + suffix))
        letters = "*e" if torch == "GRU" else "q"
        params.append(P.alike(f"bias{suffix}: {letters}", when="use_bias" + suffix))
    return Row(
        flax,
        torch,
        keras,
        axes="n t i -> n t o",
        ranks=(3,),
        settings=(
            S("features", "hidden_size", "units", normal=whole),
            S("use_bias", "bias", "use_bias", True, normal=flag),
            S("return_sequences", "", "return_sequences", False, normal=flag),
            S("reverse", "", "go_backwards", False, normal=flag),
            S("merge", "", "merge", None),
            *more,
        ),
        params=tuple(params),
        keras_defaults={"return_state": False, "stateful": False, **_KERAS_TRAINING},
        special=_Weighted(torch, weights),
        ordered=True,
        lower=lower,
        sizes=_outputs,
        note="torch's two biases cross as their sum, its (output, state) as the output: see Select",
    )


class _Weighted(RecurrentSettings):
    def __init__(self, torch: str, weights: TorchWeights):
        super().__init__(torch)
        self.weights = weights

    def read(self, framework: Framework, take: Take, fields: dict[str, Any], at: At) -> None:
        super().read(framework, take, fields, at)
        second = fields.get("merge") is not None
        fields.setdefault("projection", None)
        fields["use_bias_reverse"] = fields["use_bias"] and second
        fields["projection_reverse"] = fields.get("projection") if second else None

    def write(
        self, framework: Framework, fields: dict[str, Any], settings: dict[str, Any], at: At
    ) -> list[Around]:
        if framework != "flax":
            settings.pop("merge", None)
        return super().write(framework, fields, settings, at)

    def finish(
        self, framework: Framework, layer: Layer, fields: Mapping[str, Any], sizes: Any, at: At
    ) -> "Layer | list[Layer]":
        rows = 2 if fields.get("reset_after") else 1
        for name, value in layer.arrays.items() if self.torch == "GRU" else ():
            if name.startswith("bias") and value.ndim != rows:
                raise refuse(
                    at.place,
                    f"reset_after={rows == 2} takes a bias of rank {rows}, found one of the "
                    f"shape {value.shape}: the setting was changed after the weights were made",
                    "make a new layer of the setting that is meant",
                )
        if framework == "torch":
            layer.arrays = self.weights.write(layer.arrays)
        return super().finish(framework, layer, fields, sizes, at)


class ConvLSTMSettings(Special):
    """The settings of a convolutional LSTM of one rank."""

    def __init__(self, rank: int):
        self.rank = rank

    def read(self, framework: Framework, take: Take, fields: dict[str, Any], at: At) -> None:
        padding = take("padding")
        fields["padding"] = padding.upper() if isinstance(padding, str) else padding
        if fields["padding"] not in ("SAME", "VALID"):
            raise refuse(take.place, f"padding={padding!r}: only 'same' and 'valid'")
        if framework == "keras":
            for name in _KERAS_TRAINING:
                if name in take.values:
                    take(name)

    def write(
        self, framework: Framework, fields: dict[str, Any], settings: dict[str, Any], at: At
    ) -> list[Around]:
        if framework == "keras":
            _check_functions(fields, at)
        padding = fields["padding"]
        settings["padding"] = padding.lower() if framework == "keras" else padding
        return []


def _conv_lstm(r: int) -> Row:
    s = {1: "w", 2: "h w", 3: "d h w"}[r]
    return Row(
        fl.ConvLSTM,
        None,
        f"ConvLSTM{r}D",
        axes=f"n t {s} i -> n t {s} o",
        ranks=(r + 3,),
        rank_of=None,
        settings=(
            S("features", None, "filters", normal=whole),
            S("kernel_size", None, "kernel_size", normal=each(r)),
            S("strides", None, "strides", (1,) * r, normal=each(r)),
            S("kernel_dilation", None, "dilation_rate", (1,) * r, normal=each(r)),
            S("use_bias", None, "use_bias", True, normal=flag),
            S("return_sequences", None, "return_sequences", False, normal=flag),
            S("reverse", None, "go_backwards", False, normal=flag),
            S("activation", None, "activation", "tanh", normal=activation),
            S("recurrent_activation", None, "recurrent_activation", "sigmoid", normal=activation),
            _FORGET,
        ),
        params=(
            P("kernel: *k i q", "-", "kernel: *k i q"),
            P("recurrent_kernel: *k r q", "-", "recurrent_kernel: *k r q"),
            P("bias: q", "-", "bias: q", when="use_bias"),
        ),
        keras_defaults={
            "return_state": False,
            "stateful": False,
            "padding": "valid",
            "data_format": "channels_last",
            **_KERAS_TRAINING,
        },
        special=ConvLSTMSettings(r),
        ordered=True,
        lacks={"torch": "torch.nn has no such layer"},
    )


_ACTIVATION = S("activation", "", "activation", "tanh", normal=activation)
_GATE = S("recurrent_activation", "", "recurrent_activation", "sigmoid", normal=activation)
_RESET_AFTER = S("reset_after", "", "reset_after", True, normal=flag)
_POINTWISE = (
    "Dense", "Activation", "ReLU", "LeakyReLU", "ELU", "Softmax", "Dropout", "LayerNormalization",
    "RMSNormalization", "Identity", "Rescaling",
)  # fmt: skip


def time_distributed(framework: Framework, layer: Layer, rank: int | None) -> "list[Layer] | None":
    """Keras's TimeDistributed around a layer that works on the last axis alone."""
    inner = layer.inner[0] if layer.inner else None
    axis = inner.settings.get("axis", -1) if inner else None
    if inner is None or inner.kind not in _POINTWISE or axis not in (-1, [-1], (-1,)):
        raise refuse(
            str(layer),
            f"it wraps {inner.kind if inner else 'nothing'}, and only layers that work on the last "
            "axis alone are the same without it",
            "a layer of one axis more whose window is 1 along the time does the same, such as "
            "Conv3D(4, (1, 3, 3)) for Conv2D(4, 3)",
        )
    return [dataclasses.replace(inner, name=layer.name)]


_WRAPPED: dict[str, Lower] = {
    "Bidirectional": bidirectional,
    "RNN": over_cell,
    "TimeDistributed": time_distributed,
}
_NOTES = {
    "Bidirectional": "every merge_mode but None",
    "RNN": "over SimpleRNNCell, LSTMCell and GRUCell",
    "TimeDistributed": "around layers that work on the last axis alone",
}
ROWS: tuple[Row, ...] = (
    _recurrent_row(fl.SimpleRNN, "RNN", "SimpleRNN", _ACTIVATION),
    _recurrent_row(fl.LSTM, "LSTM", "LSTM", _ACTIVATION, _GATE, S("projection", "", ""), _FORGET),
    _recurrent_row(
        fl.GRU,
        "GRU",
        "GRU",
        _ACTIVATION,
        _GATE,
        S("reset_after", "", "reset_after", True, normal=flag),
    ),
    *(_conv_lstm(r) for r in (1, 2, 3)),
    *(Row(None, None, name, lower=lower, note=_NOTES[name]) for name, lower in _WRAPPED.items()),
    Row(
        None,
        None,
        "SpectralNormalization",
        lower=inner_layer,
        note="the layer inside, whose kernel is normalised already",
    ),
)
