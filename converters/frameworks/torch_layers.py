"""torch's layers that stand for several, put together again."""

import dataclasses
import keyword
from typing import Any

import numpy as np

from fwt._graph import renamed
from fwt.converters.rows.row import Layer, joined, parts_of, refuse
from fwt.converters.walk import convert, policy
from fwt.converters.walk.net import Net, folded, fresh

RECURRENT = ("RNN", "LSTM", "GRU")


def with_selected(layers: list[Layer]) -> list[Layer]:
    """Recurrent layers with the Select after them and the Flip before them as settings."""
    out: list[Layer] = []
    for layer in layers:
        last = out[-1] if out else None
        if layer.kind == "Select" and last is not None and last.kind in RECURRENT:
            select = {"what": layer.settings["what"], "merge": layer.settings["merge"]}
            if layer.settings.get("batch_first", True) != last.settings["batch_first"]:
                raise refuse(str(layer), "its batch_first must be that of the layer before it")
            out[-1] = dataclasses.replace(last, settings={**last.settings, "select": select})
            continue
        turned = last if last is not None and last.kind == "Flip" else None
        own = turned is not None and turned.name == f"{layer.name}__flip"
        if own and turned is not None and turned.settings["dim"] == 1 and layer.kind in RECURRENT:
            if not layer.settings["batch_first"]:
                raise refuse(str(layer), "a Flip before it takes the batch first")
            out.pop()
            layer = dataclasses.replace(layer, settings={**layer.settings, "reverse": True})
        out.append(layer)
    return out


def torch_net(net: Net, layout: str, arrays_only: bool = False, dry: bool = False) -> Net:
    """A net of Flax as one of torch."""
    new = convert.convert(net, "flax", "torch", layout, arrays_only, dry)
    policy.check_torch(new.layers)
    return _named(folded(new, fold_torch))


# What any torch module has already, so that none inside of it can have this name; written out,
# since a file's names need no torch.
_TAKEN = (
    "T_destination add_module apply bfloat16 buffers call_super_init children compile cpu cuda "
    "double dump_patches eval extra_repr float forward get_buffer get_extra_state get_parameter "
    "get_submodule half ipu load_state_dict modules mtia named_buffers named_children "
    "named_modules named_parameters parameters register_backward_hook register_buffer "
    "register_forward_hook register_forward_pre_hook register_full_backward_hook "
    "register_full_backward_pre_hook register_load_state_dict_post_hook "
    "register_load_state_dict_pre_hook register_module register_parameter "
    "register_state_dict_post_hook register_state_dict_pre_hook requires_grad_ set_extra_state "
    "set_submodule share_memory state_dict to to_empty train training type xpu zero_grad"
)
TAKEN = frozenset(_TAKEN.split())


def _named(net: Net) -> Net:
    """The net under names that torch can have: no dot within a part, and none of a module's own
    methods; in a graph, whose code spells the names out, no keyword of Python."""
    line = net.is_line

    def own(part: str) -> str:
        new = part.replace(".", "_")
        return f"{new}_" if new in TAKEN or (keyword.iskeyword(new) and not line) else new

    split = {x.name: parts_of(x.name) for x in net.layers}
    if all(own(part) == part for parts in split.values() for part in parts):
        return net
    beside: dict[tuple[str, ...], set[str]] = {(): {*net.inputs}}
    for parts in split.values():
        for i, part in enumerate(parts):
            beside.setdefault((*parts[:i],), set()).add(part)
    made: dict[tuple[str, ...], str] = {}
    alias = {}
    for name, parts in split.items():
        for i, part in enumerate(parts):
            if own(part) != part and (*parts[: i + 1],) not in made:
                made[(*parts[: i + 1],)] = new = fresh(own(part), beside[(*parts[:i],)])
                beside[(*parts[:i],)].add(new)
        alias[name] = joined([made.get((*parts[: i + 1],), part) for i, part in enumerate(parts)])
    return dataclasses.replace(
        net,
        layers=[
            dataclasses.replace(
                x,
                name=alias[x.name],
                of=alias.get(x.of, x.of),
                inputs=tuple(alias.get(i, i) for i in x.inputs),
            )
            for x in net.layers
        ],
        outputs=renamed(net.outputs, alias),
    )


_MODES = {"ReflectionPad": "reflect", "ReplicationPad": "replicate", "CircularPad": "circular"}


def fold_torch(layers: list[Layer]) -> list[Layer]:
    """What was lowered in one layer again: a pad that is a padding_mode, a stack of recurrent
    layers."""
    out: list[Layer] = []
    for layer in layers:
        last = out[-1] if out else None
        if last is not None and last.name == f"{layer.name}__pad" and layer.kind[:4] == "Conv":
            flat = last.settings["padding"]
            even = flat[::2] == flat[1::2] and not any(layer.settings["padding"])
            mode = _MODES.get(last.kind[:-2])
            if mode and even and "Transpose" not in layer.kind:
                settings = {**layer.settings, "padding": flat[::2][::-1], "padding_mode": mode}
                out[-1] = dataclasses.replace(layer, settings=settings)
                continue
        if layer.kind == "Select" and len(out) > 2:
            stacked = _stacked(out[-3], out[-2], out[-1])
            if stacked is not None:
                stem = stacked.name.rpartition("__l")[0]
                out[-3:] = [stacked]
                layer = dataclasses.replace(layer, name=f"{stem}__output")
        out.append(layer)
    return _with_time_first([_renamed(x) for x in out])


# Layers that take the time first as well, by a setting or since they work on the last axis alone.
_EITHER_FIRST = (*RECURRENT, "Select", "SelfAttention", "TransformerEncoderLayer", "Linear",
                 "Dropout", "Identity", "ReLU", "GELU", "SiLU", "Tanh", "Sigmoid")  # fmt: skip


def _with_time_first(layers: list[Layer]) -> list[Layer]:
    """What stands between two swaps of batch and time as layers with the time first."""
    out: list[Layer] = []
    index = 0
    while index < len(layers):
        end = index + 1
        inside: list[Layer] = []
        last = False  # whether a Select has left one step only, and no time to swap
        while _swaps(layers[index]) and not last and end < len(layers):
            layer = layers[end]
            if layer.kind not in _EITHER_FIRST:
                break
            end, last = end + 1, layer.settings.get("what") == "last"
            timed = "batch_first" in layer.settings or layer.kind == "Select"
            own = {**layer.settings, "batch_first": False} if timed else layer.settings
            inside.append(dataclasses.replace(layer, settings=own))
        closed = not last and end < len(layers) and _swaps(layers[end])
        if (last or closed) and any("batch_first" in x.settings for x in inside):
            out += inside
            index = end + closed
        else:
            out.append(layers[index])
            index += 1
    return out


def _swaps(layer: Layer) -> bool:
    made = layer.name.rstrip("_").endswith("__permute")
    return layer.kind == "Permute" and made and layer.settings["dims"] == (1, 0, 2)


def _stacked(below: Layer, select: Layer, top: Layer) -> Layer | None:
    """Two recurrent layers, the first of which gives its sequence, as one of more layers."""
    stem, _, number = top.name.rpartition("__l")
    count = below.settings.get("num_layers", 1)
    if (
        below.kind != top.kind
        or top.kind not in RECURRENT
        or not number.isdigit()
        or below.name != f"{stem}__l{int(number) - 1}"
        or (int(number) != count)
        or select.settings != {"what": "sequence", "merge": None}
    ):
        return None
    skip = ("input_size", "num_layers")
    mine, theirs = ({k: v for k, v in x.settings.items() if k not in skip} for x in (below, top))
    if mine != theirs:
        return None
    arrays = dict(below.arrays)
    for name, value in top.arrays.items():
        arrays[name.replace("_l0", f"_l{count}")] = value
    settings = {**below.settings, "num_layers": count + 1}
    return Layer(top.name, top.kind, settings, arrays)


def _renamed(layer: Layer) -> Layer:
    if layer.settings.get("num_layers", 1) > 1:
        return dataclasses.replace(layer, name=layer.name.rpartition("__l")[0])
    return layer


def held(layer: Layer) -> dict[str, Any]:
    """A layer's arrays as files have them."""
    if layer.kind == "Constant":
        return {}
    indexed = layer.kind in ("Indexed", "IndexedBuffer")
    return {"value": layer.settings["table"]} if indexed else layer.arrays


def torch_state(layer: Layer) -> dict[str, Any]:
    """A torch layer's arrays, with the counter that running statistics have beside them."""
    if "running_mean" in layer.arrays:
        counter = {"num_batches_tracked": np.zeros((), np.int64)}
        return {**layer.arrays, **(counter if "num_batches_tracked" not in layer.arrays else {})}
    return held(layer)


def torch_key(layer: Layer, name: str) -> list[str]:
    """The parts of the key of an array in a state dict; a Parameter's is that of the layer."""
    parts = parts_of(layer.name)
    alone = ("Parameter", "Buffer", "PersistentBuffer", "Indexed", "IndexedBuffer")
    return parts if layer.kind in alone else [*parts, name]
