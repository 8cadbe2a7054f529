"""Whether a Flax model computes what the torch module does that it was made of."""

import itertools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from fwt._types import Model
from fwt.converters import judge
from fwt.converters.frameworks.torch_layer import to_numpy, to_tensor
from fwt.converters.rows.row import Layer, refuse
from fwt.converters.tried import Tried
from fwt.converters.walk.net import Net

_ALONE = 1 << 13  # roundings that one example alone may be off
_REPORT = "report it, please: fwt reads an operation of it in another way than torch"


class Outputs(NamedTuple):
    """Random inputs, and what a torch module gives for them."""

    place: str
    inputs: list[np.ndarray]
    outputs: list[np.ndarray]


@judge.full_products()
def tried(model: torch.nn.Module, net: Net, inputs: Sequence[torch.Tensor]) -> Outputs:
    """A torch module in eval mode on random inputs.

    Args:
        model: the module.
        net: its layers.
        inputs: an example of each input.

    Raises:
        ConversionError: for a module that computes otherwise for one example than for several.
    """
    xs, given, wanted = _run(model, net, inputs)
    _check_one(model, given, wanted, judge.eps_of([y.dtype for y in wanted]))
    return Outputs(type(model).__name__, xs, wanted)


@judge.full_products()
def check(torch_gave: Outputs, made: Model) -> None:
    """Raises unless a Flax model gives what a torch module did, but for rounding."""
    place, xs, wanted = torch_gave
    large = sum(x[0].size for x in xs) > judge.LARGE
    apply = made.module.apply
    model = Tried(lambda variables, *xs: _flat(apply(variables, *xs)), made.variables, large)
    shapes = made.module.input_shape
    shapes = [shapes] if len(xs) == 1 else shapes
    told: list[judge.Apart] = []
    for moved in itertools.product(*(_ends(x, shape) for x, shape in zip(xs, shapes, strict=True))):
        try:
            found = model.outputs(moved)
        except Exception as error:  # JAX's errors share no class: it becomes ours
            raise refuse(place, f"its Flax model can't be run ({error})", _REPORT) from error
        for a, b in zip(wanted, found, strict=True):
            if a.dtype.itemsize < b.dtype.itemsize and a.dtype.kind not in "iub":
                raise refuse(place, f"it gives {a.dtype}, its Flax model {b.dtype}",
                             "convert model.float()")  # fmt: skip
        eps = judge.eps_of([y.dtype for y in (*wanted, *found)])
        if all(_axes(a, b) for a, b in zip(wanted, found, strict=True)):
            told = model.judged(moved, found, wanted, eps, _apart)
            if all(t.excess <= 1 for t in told):
                return
    worst = max(told, key=lambda t: t.excess, default=None)
    by = "has another shape" if worst is None else f"differs by {worst.absolute:.3g}"
    raise refuse(
        place,
        f"the output of its Flax model {by}, and no rounding explains it, so nothing is given back",
        _REPORT,
    )


def _flat(outputs: Any) -> list[Any]:
    if isinstance(outputs, Mapping):
        return list(outputs.values())
    return list(outputs) if isinstance(outputs, list | tuple) else [outputs]


def _run(
    model: torch.nn.Module, net: Net, inputs: Sequence[torch.Tensor]
) -> tuple[list[np.ndarray], list[torch.Tensor], list[np.ndarray]]:
    """Random inputs, other ones and more than the examples, as arrays and as tensors, and what the
    torch module gives for them."""
    large = sum(x[0].numel() for x in inputs) > judge.LARGE
    parts, count = 1, len(judge.FEW) if large else 7
    while True:
        named = zip(inputs, net.inputs, strict=True)
        xs = [_random(x, name, net.layers, parts, count) for x, name in named]
        given = [to_tensor(x).to(like.dtype) for x, like in zip(xs, inputs, strict=True)]
        try:
            return xs, given, _outputs(model, given)
        except IndexError:  # whole numbers that are made larger before they index a table
            parts *= 2
            if parts > 2**20:
                raise


def _outputs(model: torch.nn.Module, xs: Sequence[torch.Tensor]) -> list[np.ndarray]:
    with torch.no_grad():
        return [to_numpy(y, "its output") for y in _flat(model(*xs))]


def _check_one(
    model: torch.nn.Module, given: Sequence[torch.Tensor], wanted: Sequence[np.ndarray], eps: float
) -> None:
    """Raises for a module that computes otherwise for one example than for several: what
    torch.export tells is true for two or more."""
    try:
        alone = _outputs(model, [x[:1] for x in given])
    except Exception:  # noqa: BLE001 - a user's module may raise any class: it takes no single one
        return
    place = type(model).__name__
    for one, many in zip(alone, wanted, strict=True):
        first = many[:1]
        scale = np.max(np.abs(first), where=np.isfinite(first), initial=0)
        if one.size != first.size or not np.allclose(
            one.reshape(first.shape), first, 0, _ALONE * eps * scale, equal_nan=True
        ):
            raise refuse(place, "it gives something else for one example than for one of several",
                         "what it does may not depend on how many there are")  # fmt: skip
        if one.shape != first.shape:
            warnings.warn(
                f"{place} gives {one.shape} for a single example, where the new model gives "
                f"{first.shape}: squeeze(dim) instead of squeeze() keeps the batch",
                stacklevel=5,
            )


def _random(
    like: torch.Tensor, name: str, layers: Sequence[Layer], parts: int, count: int = 7
) -> np.ndarray:
    """As many inputs of the kind of an example; whole numbers below the size of the tables that
    they index, or a part of it."""
    sizes = tuple(like.shape[1:])
    if like.is_floating_point():
        half = like.dtype == torch.float16
        return judge.numbers(sizes, half)[[*judge.FEW, 2, 3, 5, 6][:count]].astype(
            to_numpy(like, name).dtype
        )
    rows = {x.name: len(x.arrays["value"]) for x in layers if x.kind == "Parameter" and x.shape}
    tables = {
        x.name: len(x.arrays["weight"]) if x.kind == "Embedding" else rows[x.inputs[0]]
        for x in layers
        if x.kind == "Embedding" or (x.kind == "Lookup" and x.inputs[0] in rows)
    }
    own = [tables[x.name] for x in layers if name in x.inputs and x.name in tables]
    end = min(own or tables.values(), default=2)
    if like.dtype == torch.bool:
        return judge.whole_numbers(2, (count, *sizes))[0].astype(bool)
    return np.resize(judge.whole_numbers(max(end // parts, 1), sizes), (count, *sizes))


def _ends(x: np.ndarray, shape: Any) -> Iterator[np.ndarray]:
    """The array with its axes where a layout may have moved them: one of them to the end."""
    for moved in (x, *(np.moveaxis(x, axis, -1) for axis in range(1, x.ndim - 1))):
        if moved.shape[1:] == tuple(shape):
            yield moved


def _axes(a: np.ndarray, b: np.ndarray) -> list[int]:
    """Where the last axis of an output may stand in that of torch."""
    axes = [-1, *range(1, b.ndim - 1)]
    return [i for i in axes if np.moveaxis(b, -1, i).shape == a.shape]


def _apart(a: np.ndarray, b: np.ndarray, noise: Sequence[Any] = (), *, eps: float) -> judge.Apart:
    """How far an output is from that of torch, whose channels may stand elsewhere."""
    turned = [[np.moveaxis(y, -1, i) for y in (b, *noise)] for i in _axes(a, b)]
    told = [judge.apart(a, y, more, eps=eps) for y, *more in turned]
    found = min(told, key=lambda t: t.excess)
    # The first input is an ordinary one: what is a number there is none by rounding.
    lost = [np.isfinite(a[0]) & ~np.isfinite(y[0]) for y, *_ in turned if len(a)]
    if lost and all(x.any() for x in lost):
        return found._replace(excess=math.inf, absolute=math.inf)
    return found
