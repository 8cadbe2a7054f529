"""For which sizes of its inputs the layers are right that ``torch_export`` reads of a module.

torch.export tells the operations for the sizes of an example. A module that may ask for these is
read once more at others: where its layers change, the Graph takes those of the example alone.
"""

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fwt._types import ConversionError
from fwt.converters.frameworks import torch_wrappers
from fwt.converters.frameworks.sizes import Place, Sizes, by_input, other_sizes, together
from fwt.converters.rows.row import Layer
from fwt.converters.walk.net import Net

# What tells how large a tensor is, as forward calls it.
_ASK = {"shape", "size", "len", "numel", "nelement", "__len__", "getattr", "partial"}
_DEPTH = 6  # functions that call each other
# Layers whose arrays have the size of an axis of what they take, and which axis.
_LAST = ("Linear", "LayerNorm", "RMSNorm", "LSTM", "GRU", "RNN", "MultiheadAttention",
         "SelfAttention", "TransformerEncoderLayer")  # fmt: skip
_SECOND = ("Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d",
           "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "GroupNorm")  # fmt: skip
# Those that take each entry by itself.
_ENTRIES = ("Add", "Subtract", "Multiply", "Divide", "Maximum", "Minimum", "Masked", "Pointwise",
            "Rescaling", "ReLU", "GELU", "SiLU", "Tanh", "Sigmoid", "Dropout",
            "Identity")  # fmt: skip


def asks(model: torch.nn.Module) -> bool:
    """Whether the forward of a module of one's own may look at the size of a tensor."""
    seen: set[Any] = set()
    for m in model.modules():
        kinds = [c for c in type(m).__mro__ if "forward" in vars(c) and not _is_torchs(c)]
        forwards = [*(vars(c)["forward"] for c in kinds), vars(m).get("forward")]
        if any(_asks(f, m, seen, _DEPTH) for f in forwards if f is not None):
            return True
    return False


def _is_torchs(kind: type) -> bool:
    return kind.__module__.startswith("torch.nn.modules")


def _asks(function: Any, module: Any, seen: set[Any], depth: int) -> bool:
    code = getattr(function, "__code__", None)
    if code is None or not depth:
        return True  # nothing tells what it does
    if code in seen:
        return False
    seen.add(code)
    names, inner = set[str](), [code]
    for part in inner:
        names |= set(part.co_names)
        inner += [c for c in part.co_consts if hasattr(c, "co_names")]
    if names & _ASK:
        return True
    known = getattr(function, "__globals__", {})
    called = [vars(module).get(n) or getattr(type(module), n, None) or known.get(n) for n in names]
    rooms = [x for x in called if isinstance(x, types.ModuleType) and not _is_plain(x.__name__)]
    called += [vars(room).get(n) for room in rooms for n in names]
    called += [c.cell_contents for c in function.__closure__ or () if _is_filled(c)]
    return any(_asks(other, module, seen, depth - 1) for other in called if _may_ask(other))


def _may_ask(found: Any) -> bool:
    """Whether what a forward names is called, and neither torch's nor Python's own."""
    room = getattr(found, "__module__", None) or ""
    plain = isinstance(found, type | torch.nn.Module | torch.Tensor)
    return callable(found) and not plain and not _is_plain(room)


def _is_plain(room: str) -> bool:
    return room.partition(".")[0] in ("torch", "builtins", "math")


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def fixed(
    model: torch.nn.Module,
    inputs: Sequence[torch.Tensor],
    net: Net,
    rolls: bool,
    written: Callable[[Net], Net],
    read: Callable[[Sequence[torch.Tensor]], Net],
) -> dict[str, tuple[int | None, ...]]:
    """By name of an input, the sizes that it must have for the layers to be those of the model.

    Args:
        model: the module, in eval mode.
        inputs: the example that the net was read at.
        net: its layers.
        rolls: whether it moves three entries or more around the end of an axis.
        written: gives a net as the framework has it that it goes to.
        read: gives that for another example.
    """
    names, shapes = list(net.inputs), [x.shape for x in inputs]
    bound: set[Place] = set()

    def runs(sizes: Sizes) -> bool:
        try:
            with torch.no_grad(), torch_wrappers.quiet(model):
                model(*resized(inputs, sizes))
        except Exception:  # noqa: BLE001 - a user's module may raise any class: it takes no such size
            return False
        return True

    # What rolls by three entries does so by one on an axis of two.
    for first in (None, 2) if rolls else (None,):
        free, alone = other_sizes(shapes, runs, first)
        bound |= {place for places in alone for place in places}
        differs = _differs(written(net), read, inputs) if free else None
        if not differs:
            continue
        if differs(together(free, shapes, runs)):
            left = [sizes for sizes in free if not differs(sizes)]
            # Those that are free one by one may still be compared with each other.
            if len(left) > 1 and differs(together(left, shapes, runs)):
                left = []
            bound |= {place for sizes in free if sizes not in left for place in sizes}
    return by_input((p for p in bound if not _is_held(net, names[p[0]], p[1])), names, shapes)


def resized(inputs: Sequence[torch.Tensor], sizes: Sizes) -> list[torch.Tensor]:
    """The example with other sizes, of the entries that it has."""
    out = list(inputs)
    for (i, axis), size in sizes.items():
        at = torch.arange(size) % out[i].shape[axis]
        out[i] = out[i].index_select(axis, at.to(out[i].device))
    return out


def _differs(
    net: Net, read: Callable[[Sequence[torch.Tensor]], Net], inputs: Sequence[torch.Tensor]
) -> Callable[[Sizes], bool]:
    def differs(sizes: Sizes) -> bool:
        try:
            other = read(resized(inputs, sizes))
        except ConversionError:  # what is read at this size is not there
            return True
        return not (_same_layers(net.layers, other.layers) and net.outputs == other.outputs)

    return differs


def _same_layers(one: Sequence[Layer], other: Sequence[Layer]) -> bool:
    return len(one) == len(other) and all(map(_same, one, other))


def _same(a: Layer, b: Layer) -> bool:
    told = [(x.name, x.kind, x.inputs, x.of, x.dtype) for x in (a, b)]
    alike = told[0] == told[1] and _same_layers(a.inner, b.inner)
    return alike and _equal(a.settings, b.settings) and _equal(a.arrays, b.arrays)


def _equal(a: Any, b: Any) -> bool:
    """Whether settings, or arrays by name, are the same."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        a, b = np.asarray(a), np.asarray(b)
        return a is b or (a.shape == b.shape and a.tobytes() == b.tobytes())
    return bool(type(a) is type(b) and a == b)


def _is_held(net: Net, name: str, axis: int) -> bool:
    """Whether a layer has arrays of the size of this axis of an input, so that it refuses another:
    one that takes it, or whose input has the last axis of it as its last."""
    shape = net.inputs[name] or ()
    last = {name: len(shape)} if axis == len(shape) else {}  # by name, the number of that axis
    for layer in net.layers:
        if name in layer.inputs and layer.kind in _SECOND and axis == 1:
            return True
        at = next((last[i] for i in layer.inputs if i in last), None)
        if at is None:
            continue
        if layer.kind in _LAST and layer.arrays:
            return True
        if _keeps_last(layer, at, shape[-1]):
            last[layer.name] = len(layer.shape or ())
    return False


def _keeps_last(layer: Layer, last: int, size: int | None) -> bool:
    told, kind = layer.settings, layer.kind
    if kind in ("Slice", "Reduce", "Concatenate", "Flip", "Softmax"):
        return bool(told["dim"] % (last + 1) != last)
    if kind == "Flatten":
        return bool(told["end_dim"] % (last + 1) != last) or (layer.shape or (0,))[-1] == size
    if kind == "Unflatten":
        return bool(told["dim"] != last)
    if kind == "Permute":
        return bool(told["dims"][-1] == last)
    return kind in _ENTRIES
