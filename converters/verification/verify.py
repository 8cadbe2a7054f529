"""``verify``: two models side by side, layer by layer."""

import dataclasses
import html
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from fwt import _tree
from fwt._sequential import Sequential, call
from fwt._types import ConversionError, Model
from fwt.converters.frameworks import flax as _flax
from fwt.converters.rows.row import joined

Taps = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Line:
    """One layer on both sides.

    Attributes:
        name: of the layer; what one framework says in two layers is one line.
        shape: of its output in the first model, or of the weights.
        absolute: the largest absolute difference of its outputs.
        relative: the largest of them relative to the largest output of the first model.
        ulp: the largest difference in units of the last place of float32.
        status: "exact" (bit for bit), "close", "reordered" (the same values in another order, as
            behind a Flatten), "differs", or "only in the first" or "second" model.
    """

    name: str
    shape: tuple[int, ...]
    absolute: float
    relative: float
    ulp: int
    status: str


@dataclasses.dataclass(frozen=True)
class Report:
    """What :func:`verify` found.

    Attributes:
        ok: whether the outputs agree to the tolerance.
        first: the name of the first layer that departs, or None.
        layers: a line for each layer that both models have, and those that one has alone.
        weights: a line for each weight that is not the same, bit for bit, in Flax's form.
        output: the line of the output.
        notes: what else is to be known.
    """

    ok: bool
    first: str | None
    layers: tuple[Line, ...]
    weights: tuple[Line, ...]
    output: Line
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        head = "equal" if self.ok else "they differ"
        if self.first is not None:
            head += f", from {self.first} on"
        width = max([len(line.name) for line in (*self.layers, self.output)])
        rows = [_row(line, width) for line in (*self.layers, self.output)]
        rows += [f"weight {line.name}: {line.status}, by at most {line.absolute:.3g}"
                 for line in self.weights]  # fmt: skip
        return "\n".join([head, *rows, *self.notes])

    def to_json(self) -> str:
        """All of it as JSON; what is not finite is null."""

        def plain(value: Any) -> Any:
            if isinstance(value, float) and not math.isfinite(value):
                return None
            if isinstance(value, dict):
                return {k: plain(v) for k, v in value.items()}
            return [plain(v) for v in value] if isinstance(value, list | tuple) else value

        return json.dumps(plain(dataclasses.asdict(self)))

    def _repr_html_(self) -> str:
        cells = [
            f"<tr><td>{html.escape(line.name)}</td><td>{line.shape}</td><td>{line.absolute:.3g}</td>"
            f"<td>{line.relative:.3g}</td><td>{line.ulp}</td><td>{line.status}</td></tr>"
            for line in (*self.layers, self.output)
        ]
        titles = "".join(
            f"<th>{t}</th>" for t in ("layer", "shape", "absolute", "relative", "ULP", "")
        )
        head = html.escape(str(self).splitlines()[0])
        return f"<p>{head}</p><table><tr>{titles}</tr>{''.join(cells)}</table>"


def _row(line: Line, width: int) -> str:
    if line.status.startswith("only"):
        return f"{line.name:{width}}  {line.status}"
    return (
        f"{line.name:{width}}  {line.status:9}  absolute {line.absolute:.2e}  relative "
        f"{line.relative:.2e}  {line.ulp:,} ULP"
    )


def verify(
    a: Any,
    b: Any,
    inputs: Any = None,
    *,
    input_shape: Sequence[int] | None = None,
    tolerance: float = 1e-5,
    external_data: bool = False,
) -> Report:
    """Feeds two models the same inputs and compares the outputs of every layer.

    Args:
        a: a live Keras model, a torch or nnx module, a ``fwt.Model``, or a file with a model.
        b: another of them.
        inputs: a batch in the layout of ``a``; by default random numbers, zeros, ones, large and
            small ones. Images are moved between channels first and last where one of them is a
            torch model with spatial layers.
        input_shape: of one input of ``a``, where neither model says it.
        tolerance: of an output, times the largest output of ``a`` if that is more than 1.
        external_data: whether an ONNX file may have its weights in another in its folder.

    Returns:
        A report: ``print`` it, or ask it for ``ok``, ``first``, ``to_json()``.

    Raises:
        ConversionError: for what is no model, or if ``b`` can't take the inputs.

    Example:
        >>> import torch
        >>> from fwt import converters
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh())
        >>> report = verify(net, converters.from_torch(net), input_shape=(3,))
        >>> report.ok, report.first, [line.name for line in report.layers]
        (True, None, ['0', '1'])
    """
    one, other = _side(a, external_data), _side(b, external_data)
    if inputs is None:
        inputs = _inputs(one, other, input_shape)
    x = np.asarray(inputs)
    if x.dtype.kind not in "fiub":
        raise ConversionError(f"verify: inputs of {x.dtype} are no batch of numbers")
    first, mine = _ran(one, x, "first")
    second, theirs = _ran(other, _moved(x, one.channels_first, other.channels_first), "second")
    lines = []
    for name in [*mine, *(n for n in theirs if n not in mine)]:
        if name not in mine or name not in theirs:
            where, shape = (
                ("first", mine[name].shape) if name in mine else ("second", theirs[name].shape)
            )
            lines.append(Line(name, shape, math.nan, math.nan, 0, f"only in the {where}"))
        else:
            more = _turned(theirs[name]) if one.turned or other.turned else ()
            lines.append(compared(name, mine[name], (theirs[name], *more), tolerance))
    sides = (second, _moved(second, other.channels_first, one.channels_first))
    output = compared("output", first, sides, tolerance)
    departed = next((line.name for line in lines if line.status == "differs"), None)
    ok = output.status in ("exact", "close")
    notes = [] if ok or departed else ["no layer that both have departs: see those of one alone"]
    try:
        weights = tuple(_weights(one, other))
    except ConversionError as error:
        weights = ()
        notes.append(f"the weights are not compared: {error}")
    return Report(ok, departed, tuple(lines), weights, output, tuple(notes))


def _ran(side: "Side", x: np.ndarray, which: str) -> tuple[np.ndarray, Taps]:
    try:
        return side.run(x)
    except Exception as error:  # each framework has its own errors for a shape
        why = " ".join(str(error).split())[:300]
        raise ConversionError(
            f"verify: the {which} model takes no input of the shape {list(x.shape)} ({why})"
        ) from error


def compared(name: str, a: np.ndarray, others: Sequence[np.ndarray], tolerance: float) -> Line:
    """How far an output is from another, given as it is and as it may be turned."""
    views = [v for v in others if v.shape == a.shape]
    if not views:
        return Line(name, a.shape, math.inf, math.inf, 2**31, "differs")
    lines = [_apart(name, a, v, tolerance) for v in views]
    best = min(lines, key=lambda line: (line.status == "differs", line.absolute))
    if best.status == "differs" and a.ndim == 2:
        ordered = _apart(name, np.sort(a, 1), np.sort(views[0], 1), tolerance)
        if ordered.status != "differs":
            return dataclasses.replace(ordered, status="reordered")
    return best


def _apart(name: str, a: np.ndarray, b: np.ndarray, tolerance: float) -> Line:
    if a.tobytes() == b.tobytes():
        return Line(name, a.shape, 0.0, 0.0, 0, "exact")
    with np.errstate(invalid="ignore", over="ignore"):
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        gap = np.where(same, 0.0, np.abs(a.astype(float) - b.astype(float)))
    absolute = float(np.max(np.where(np.isnan(gap), np.inf, gap), initial=0.0))
    finite = np.abs(a[np.isfinite(a)].astype(float))
    scale = float(np.max(finite, initial=0.0))
    ulp = int(np.max(np.abs(_ordinal(a) - _ordinal(b)), initial=0))
    status = "close" if absolute <= tolerance * max(scale, 1.0) else "differs"
    return Line(name, a.shape, absolute, absolute / scale if scale else absolute, ulp, status)


def _ordinal(x: np.ndarray) -> np.ndarray:
    """Floats as integers in their order, so that neighbours differ by one."""
    bits = x.astype(np.float32).view(np.int32).astype(np.int64)
    return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def _turned(x: np.ndarray) -> tuple[np.ndarray, ...]:
    return (np.moveaxis(x, 1, -1), np.moveaxis(x, -1, 1)) if x.ndim > 2 else ()


def _moved(x: np.ndarray, now: bool, then: bool) -> np.ndarray:
    if now == then or x.ndim < 3:
        return x
    return np.ascontiguousarray(np.moveaxis(x, 1, -1) if now else np.moveaxis(x, -1, 1))


def _weights(one: "Side", other: "Side") -> Iterator[Line]:
    """The weights that are not the same, where both models have them in Flax's form."""
    trees = [_tree.Tree({"params": dict(s.model().variables)}).leaves for s in (one, other)]
    if trees[0].keys() != trees[1].keys():
        raise ConversionError("the models have other names for them")
    for path, a in trees[0].items():
        a, b = np.asarray(a), np.asarray(trees[1][path])
        if a.shape != b.shape or a.dtype != b.dtype or a.tobytes() != b.tobytes():
            same = a.shape == b.shape
            line = _apart(path, a, b, 0.0) if same else None
            yield line or Line(path, a.shape, math.inf, math.inf, 2**31, "differs")


# -- the sides --------------------------------------------------------------------------------


@dataclasses.dataclass
class Side:
    """A model: how it runs, its input, and the model that it is in Flax."""

    run: Callable[[np.ndarray], tuple[np.ndarray, Taps]]
    shape: tuple[int | None, ...] | None
    channels_first: bool  # at its ends
    model: Callable[[], Model]
    integers: int | None = None
    turned: bool = False  # whether channels may come first inside


def _side(model: Any, external: bool = False) -> Side:
    keras, torch = sys.modules.get("keras"), sys.modules.get("torch")
    if isinstance(model, str | os.PathLike):
        from fwt.converters.files import formats as _formats

        if _formats.format_of(Path(model)).name == "ONNX":
            from fwt.converters.verification import onnx_side

            return onnx_side.side(Path(model), external)
        model = _formats.load(Path(model))
        if model.module is None:
            raise ConversionError("verify: a file of weights alone can't run: load it with "
                                  "architecture=")  # fmt: skip
    if isinstance(model, tuple) and len(model) == 2:
        return _flax_side(Model(_flax.sequential_of(model[0]), model[1]))
    if keras is not None and isinstance(model, keras.Model):
        return _keras_side(model)
    if isinstance(model, nnx.Module):
        return _nnx_side(model)
    if torch is not None and isinstance(model, torch.nn.Module):
        return _torch_side(model)
    raise ConversionError(
        f"verify takes Keras models, torch and nnx modules, fwt.Models and files, found "
        f"{type(model).__name__}"
    )


def _flax_side(model: Model) -> Side:
    if not isinstance(model.module, Sequential):
        raise ConversionError(f"verify: {type(model.module).__name__} is no Sequential")

    def run(x: np.ndarray) -> tuple[np.ndarray, Taps]:
        taps: Taps = {}
        y = _through(model.module, dict(model.variables), x, (), taps)
        return np.asarray(y), taps

    first = model.module.layers[0].layer if model.module.layers else None
    count = getattr(first, "num_embeddings", None)
    return Side(run, model.module.input_shape, False, lambda: model, count)


def _through(
    module: Sequential, variables: Any, x: Any, inside: tuple[str, ...], taps: Taps
) -> Any:
    for named in module.layers:
        own = {c: tree[named.name] for c, tree in variables.items() if named.name in tree}
        if isinstance(named.layer, Sequential):
            x = _through(named.layer, own, x, (*inside, named.name), taps)
        else:
            x = call(named.layer, own, x)
            taps[base((*inside, named.name))] = np.asarray(x)
    return x


def _nnx_side(model: Any) -> Side:
    def run(x: np.ndarray) -> tuple[np.ndarray, Taps]:
        taps: Taps = {}
        copy = nnx.clone(model)
        copy.eval()

        def under(holder: Any, y: Any, inside: tuple[str, ...]) -> Any:
            for index, layer in enumerate(holder.layers):
                parts = (*inside, str(index))
                if type(layer) is nnx.Sequential:
                    y = under(layer, y, parts)
                else:
                    y = layer(y)
                    taps[joined(parts)] = np.asarray(y)
            return y

        if type(copy) is nnx.Sequential:
            return np.asarray(under(copy, x, ())), taps
        return np.asarray(copy(x)), taps

    def converted() -> Model:
        from fwt.converters.frameworks import nnx as _nnx

        return _nnx.from_nnx(model)

    first = model.layers[0] if type(model) is nnx.Sequential and model.layers else None
    count = first.num_embeddings if isinstance(first, nnx.Embed) else None
    return Side(run, None, False, converted, count)


def base(parts: Sequence[str]) -> str:
    """The name that the parts of one layer share."""
    return joined((*parts[:-1], parts[-1].split("__")[0]))


def _keras_side(model: Any) -> Side:
    import keras

    from fwt.converters.frameworks import keras as _keras

    def run(x: np.ndarray) -> tuple[np.ndarray, Taps]:
        taps: Taps = {}

        def under(holder: Any, y: Any, inside: tuple[str, ...]) -> Any:
            for layer in holder.layers:
                if isinstance(layer, keras.layers.InputLayer):
                    continue
                if isinstance(layer, keras.Sequential):
                    y = under(layer, y, (*inside, layer.name))
                    continue
                y = layer(y, training=False) if _trains(layer) else layer(y)
                taps[base((*inside, layer.name))] = keras.ops.convert_to_numpy(y)
            return y

        if isinstance(model, keras.Sequential):
            under(model, keras.ops.convert_to_tensor(x), ())
        y = model(x, training=False)
        return keras.ops.convert_to_numpy(y), taps

    shape = getattr(model, "input_shape", None)
    own = tuple(shape[1:]) if isinstance(shape, tuple) else None
    first = next((x for x in model.layers if not isinstance(x, keras.layers.InputLayer)), None)
    formats = {getattr(x, "data_format", None) for x in model.layers}
    last = "channels_first" in formats
    count = getattr(first, "input_dim", None)
    return Side(run, own, last, lambda: _keras.from_keras(model), count, turned=last)


def _trains(layer: Any) -> bool:
    import inspect

    return "training" in inspect.signature(layer.call).parameters


def _torch_side(model: Any) -> Side:
    import torch

    from fwt.converters.frameworks import torch as _torch

    def run(x: np.ndarray) -> tuple[np.ndarray, Taps]:
        taps: Taps = {}
        hooks, modes = [], {m: m.training for m in model.modules()}

        def keep(name: str) -> Callable[..., None]:
            def hook(_: Any, __: Any, y: Any) -> None:
                if isinstance(y, torch.Tensor):
                    taps[base(name.split("."))] = y.detach().cpu().numpy()

            return hook

        for name, module in model.named_modules():
            if name and not isinstance(module, torch.nn.Sequential | torch.nn.ModuleList):
                hooks.append(module.register_forward_hook(keep(name)))
        try:
            with torch.no_grad():
                model.eval()
                y = model(torch.from_numpy(np.ascontiguousarray(x)))
        finally:
            for hook in hooks:
                hook.remove()
            for module, training in modes.items():
                module.training = training
        return y.detach().cpu().numpy(), taps

    spatial = (
        "Conv",
        "Pool",
        "BatchNorm2d",
        "BatchNorm3d",
        "InstanceNorm",
        "GroupNorm",
        "Upsample",
    )
    kinds = [type(m).__name__ for m in model.modules()]
    turned = kinds[1:2] == ["Permute"]  # it takes the channels last itself
    first = any(k.startswith(spatial) or "Pool" in k for k in kinds) and not turned
    count = next(
        (m.num_embeddings for m in model.modules() if isinstance(m, torch.nn.Embedding)), None
    )
    starts = len(kinds) > 1 and kinds[1] == "Embedding"

    def converted() -> Model:
        return _torch.from_torch(model)

    return Side(run, None, first, converted, count if starts else None, turned=True)


def _inputs(one: Side, other: Side, shape: Sequence[int] | None) -> np.ndarray:
    """Random numbers, zeros, ones, large and small ones, in the layout of the first model."""
    known: Any = shape or one.shape
    if known is None and other.shape is not None:
        known = other.shape
        if one.channels_first != other.channels_first and len(known) > 1:
            known = (known[-1], *known[:-1]) if one.channels_first else (*known[1:], known[0])
    if known is None:
        raise ConversionError(
            "verify: neither model says what it takes: give input_shape= or inputs="
        )
    sizes = tuple(9 if s is None else int(s) for s in known)
    rng = np.random.default_rng(0)
    count = one.integers or other.integers
    if count:
        return rng.integers(0, count, (4, *sizes)).astype(np.int32)
    rows = rng.normal(size=(6, *sizes))
    rows[2], rows[3] = 0, 1
    rows[4] *= 100
    rows[5] *= 1e-3
    return rows.astype(np.float32)
