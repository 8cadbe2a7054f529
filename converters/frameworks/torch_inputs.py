"""What ``from_torch`` is told of the inputs of a module, as an example of each; and what is said
where that is none."""

import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from fwt._types import ConversionError

_INPUTS = "the shape of its input without the batch axis, such as (3, 32, 48), or a list "
_ARRAYS = (torch.Tensor, np.ndarray)


def example_inputs(
    model: torch.nn.Module,
    input_shape: Any,
    at_inference: Callable[[torch.nn.Module], AbstractContextManager[None]],
) -> tuple[torch.Tensor, ...]:
    """Tensors for a batch of two, from the shapes of the inputs or from examples of them.

    What takes whole numbers, as an Embedding does, is found by trying.
    """
    given = input_shape if isinstance(input_shape, list | tuple) else (input_shape,)
    if given and all(isinstance(x, _ARRAYS) for x in given):
        inputs = _examples(model, given)
        _check_count(model, len(inputs))
        return inputs
    shapes = given if given and isinstance(given[0], list | tuple) else (given,)
    if input_shape is None:
        raise ConversionError(
            f"{type(model).__name__} is no torch.nn.Sequential, so its forward is followed on an "
            f"example of its input: give input_shape=, {_INPUTS}of them, or one tensor each, batch "
            "first"
        )
    _check_kinds(model, input_shape, given)
    for shape in shapes:
        if not isinstance(shape, list | tuple) or not all(_is_size(s) for s in shape):
            raise ConversionError(f"input_shape={said(input_shape)}: expected {_INPUTS}of them")
    _check_count(model, len(shapes))
    found = _fitting(model, shapes, at_inference)
    if not isinstance(found, Exception):
        return found
    less = [shape[1:] for shape in shapes]
    way = ""
    if all(shapes) and not isinstance(_fitting(model, less, at_inference), Exception):
        there = less[0] if shapes[0] is input_shape or len(less) == 1 else less
        way = f"; it can on {said(there)}: leave the batch axis out"
    raise ConversionError(
        f"the model can't be run on input_shape={said(input_shape)}: {first_line(found)}{way}"
    ) from found


def _examples(model: torch.nn.Module, given: Sequence[Any]) -> tuple[torch.Tensor, ...]:
    floats = [p.dtype for p in model.parameters() if p.is_floating_point()]
    try:
        tensors = [torch.as_tensor(x) for x in given]
    except TypeError as error:
        raise ConversionError(f"an example of an input is no tensor ({error})") from error
    if any(x.is_complex() or x.layout != torch.strided for x in tensors):
        raise ConversionError("an example of an input is a dense tensor of real numbers")
    # NumPy's numbers are float64 unless told otherwise.
    tensors = [x.to(floats[0]) if floats and x.dtype == torch.float64 else x for x in tensors]
    if any(x.ndim < 1 or not len(x) for x in tensors):
        raise ConversionError("an example of an input has a batch axis, and at least one entry")
    return tuple(torch.cat([x, x])[:2] for x in tensors)


def _fitting(
    model: torch.nn.Module,
    shapes: Sequence[Any],
    at_inference: Callable[[torch.nn.Module], AbstractContextManager[None]],
) -> Any:
    """Inputs of these shapes that the model takes, or why it takes none."""
    failed: Exception | None = None
    floats = [p.dtype for p in model.parameters() if p.is_floating_point()]
    kinds = [floats[0] if floats else torch.float32, torch.int64]
    if any(isinstance(m, torch.nn.Embedding | torch.nn.EmbeddingBag) for m in model.modules()):
        kinds.reverse()
    for dtypes in itertools.product(kinds, repeat=len(shapes)):
        inputs = tuple(
            torch.zeros(2, *shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)
        )
        try:
            with at_inference(model), torch.no_grad():
                model(*inputs)
            return inputs
        except Exception as error:  # noqa: BLE001 - a user's module may raise any class; the next may fit
            failed = failed or error
    return failed


def _is_size(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x > 0


def first_line(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"


def said(given: Any) -> str:
    """What a user gave, without the numbers in its tensors."""
    if isinstance(given, _ARRAYS):
        return f"{type(given).__name__}{tuple(given.shape)}"
    if isinstance(given, Mapping):
        return f"{{{', '.join(f'{k!r}: {said(v)}' for k, v in given.items())}}}"
    if isinstance(given, list | tuple):
        inside = ", ".join(map(said, given))
        if isinstance(given, list):
            return f"[{inside}]"
        return f"({inside},)" if len(given) == 1 else f"({inside})"
    return f"{given!r:.80}"


def _check_kinds(model: torch.nn.Module, input_shape: Any, given: Sequence[Any]) -> None:
    """Raises where the inputs are no shapes and no tensors, with what to give instead."""
    place = f"input_shape={said(input_shape)}"
    names = [n for n, _ in _arguments(model)]
    if isinstance(input_shape, Mapping):
        if set(input_shape) <= set(names):
            order = ", ".join(n for n in names if n in input_shape)
            raise ConversionError(f"{place}: give a list in the order in which forward takes them, "
                                  f"[{order}]")  # fmt: skip
        given = (input_shape,)
    inner = [x for x in given if isinstance(x, list | tuple) and any(
        isinstance(y, _ARRAYS) for y in x)]  # fmt: skip
    for x in (*inner, *(x for x in given if isinstance(x, Mapping))):
        what, call = ("dict", "{'x': x}") if isinstance(x, Mapping) else ("list", "[x, y]")
        raise ConversionError(
            f"{place}: an input is a tensor, found a {what} of them: give a module around it that "
            f"takes each by itself, whose forward(self, x, ...) returns self.net({call}), and a "
            "list of its inputs"
        )
    arrays = any(isinstance(x, _ARRAYS) for x in given)
    odd = [x for x in given if not isinstance(x, (*_ARRAYS, list, tuple))]
    if odd and arrays:
        raise ConversionError(
            f"{place}: an input is a tensor, found {odd[0]!r:.80}: leave it out where that is what "
            "forward takes without it, or give a module around it whose forward(self, x) returns "
            f"self.net(x, {odd[0]!r:.80})"
        )
    if arrays and len({isinstance(x, _ARRAYS) for x in given}) > 1:
        raise ConversionError(f"{place}: give a tensor for each input, or a shape for each")


def _arguments(model: torch.nn.Module) -> list[tuple[str, bool]]:
    """What forward takes by place, and whether it must be given."""
    try:
        found = inspect.signature(model.forward).parameters.values()
    except ValueError:
        return []
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [(p.name, p.default is inspect.Parameter.empty) for p in found if p.kind in plain]


def _check_count(model: torch.nn.Module, count: int) -> None:
    """Raises where forward needs more inputs than are given."""
    needed = [n for n, must in _arguments(model) if must]
    if len(needed) > count:
        raise ConversionError(
            f"{type(model).__name__}: its forward takes {', '.join(needed)}, found {count} of them "
            f"in input_shape=: give one list, from_torch(model, [{', '.join(needed)}]), of tensors "
            "or of shapes"
        )


def check_kind(model: torch.nn.Module, layout: Any) -> None:
    """Raises for a module that is no model of tensors to tensors, and for an input that was given
    as something else."""
    if not isinstance(layout, str):
        raise ConversionError(
            f"layout={said(layout)}: it takes all inputs in one list, from_torch(model, [a, b])"
        )
    name = type(model).__name__
    if type(model) in (torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN):
        raise ConversionError(
            f"{name}: it gives a tuple of its output and its states, which is nested: give "
            "torch.nn.Sequential(model), which becomes a model of its output, or a module around "
            "it whose forward(self, x) returns what is used, such as self.net(x)[0]"
        )
    if any(isinstance(part, torch.jit.ScriptModule) for part in model.modules()):
        raise ConversionError(
            f"{name}: TorchScript (torch.jit) holds a program and no layers: give the module that "
            "it was made of, from_torch(net, ...), whose weights are "
            "net.load_state_dict(scripted.state_dict()) where it has others now"
        )
    if getattr(vars(model).get("eval"), "__module__", "").startswith("torch.export"):
        raise ConversionError(
            f"{name}: torch.export made it, which fixed how it computes: give the module that was "
            "exported, from_torch(net, ...), whose weights are net.load_state_dict("
            "exported.state_dict) where it has others now"
        )


# What torch says where the sizes of a batch are fixed, or the lengths of packed sequences.
def explained(model: torch.nn.Module, error: Exception) -> tuple[str, str]:
    """Why torch.export can't follow a module, and a way out."""
    text = str(error)
    timed = next((
        (n, m) for n, m in model.named_modules()
        if getattr(getattr(m, "self_attn", m), "batch_first", True) is False
    ), None)  # fmt: skip
    if _packs(model):
        return (
            "pack_padded_sequence follows lengths, which are values of the input",
            "give a module without it, for sequences of one length each",
        )
    if "in output, which is not a known type" in text:
        kind = text.partition("<class '")[2].partition("'")[0].rpartition(".")[2]
        return (
            f"it gives an object of {kind}",
            "give a module around it whose forward returns tensors, or a tuple or a dict of them",
        )
    if "Constraints violated" in text:
        if timed is not None:
            name, module = timed
            return (
                f"its {name} ({type(module).__name__}) takes the time first, so that the first axis"
                " of its input is not the batch",
                "make it with batch_first=True, or give a module around the model whose "
                "forward(self, x) returns self.net(x.transpose(0, 1))",
            )
        why = "it works for one number of examples alone"
    else:
        why = first_line(error)
    return (
        f"torch.export can't follow it ({why})",
        "what it does may not depend on the values of its input, nor on how many examples "
        "there are (x.shape[0] for len(x), which is a fixed number)",
    )


def _packs(model: torch.nn.Module) -> bool:
    """Whether the forward of some module calls what packs sequences."""
    codes = [getattr(type(m).forward, "__code__", None) for m in model.modules()]
    return any("pack_padded_sequence" in c.co_names for c in codes if c is not None)
