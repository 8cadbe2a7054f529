"""What ``verify`` found, and how two arrays are compared."""

import dataclasses
import html
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fwt.converters import judge


@dataclasses.dataclass(frozen=True)
class Line:
    """One layer on both sides.

    Each row of the batch is judged by its own largest value, and so is each position of an image
    or a sequence, from 8 channels on.

    Attributes:
        name: of the layer; what one framework says in two layers is one line.
        shape: of its output in the first model, or of the weights.
        absolute: the largest absolute difference of its outputs.
        relative: the difference in the row that is furthest off, relative to its largest value.
        ulp: the same in units of the last place of that value, in the coarsest dtype that the
            models compute in; of weights, the largest difference in units of float32.
        status: "exact" (bit for bit), "close", "reordered" (the same values in another order, as
            behind a Flatten), "differs", "not compared" (nothing in it is finite, or rounding
            alone moves it by more than its size), or "only in the first" or "second" model.
        allowed: how many units that row may be off: ten of its own, and ten times what rounding
            inside the models makes of it.
    """

    name: str
    shape: tuple[int, ...]
    absolute: float
    relative: float
    ulp: int
    status: str
    allowed: float = 0.0


@dataclasses.dataclass(frozen=True)
class Report:
    """What :func:`verify` found.

    Attributes:
        ok: whether the outputs agree. It is False if nothing could be compared. The report itself
            is true where this is.
        first: the name of the first layer that departs, if ``ok`` is False and one does.
        layers: a line for each layer that both models have, and those that one has alone.
        weights: a line for each weight that is not the same, bit for bit, in Flax's form.
        output: the line of the output; of several, of the one that agrees least.
        notes: what else is to be known.
        outputs: of a model of several outputs a line for each, in their order.
    """

    ok: bool
    first: str | None
    layers: tuple[Line, ...]
    weights: tuple[Line, ...]
    output: Line
    notes: tuple[str, ...] = ()
    outputs: tuple[Line, ...] = ()

    def __bool__(self) -> bool:
        return self.ok

    def _lines(self) -> tuple[Line, ...]:
        return (*self.layers, *(self.outputs or (self.output,)))

    def __str__(self) -> str:
        width = max(len(line.name) for line in self._lines())
        rows = [f"{line.name:{width}}  {_OTHERS}" if self._is_other(line)
                else _row(line, width) + self._beside(line) for line in self._lines()]  # fmt: skip
        rows += [f"weight {line.name}: {line.status}, by at most {line.absolute:.3g}"
                 for line in self.weights]  # fmt: skip
        return "\n".join([self._head(), *rows, *self.notes])

    def _is_other(self, line: Line) -> bool:
        """Whether equal models have tensors of other shapes under one name, as where one of them
        does in two layers what the other does in one."""
        return self.ok and line.status == "differs" and _has_shapes_apart(line)

    def _beside(self, line: Line) -> str:
        """What to say of a layer that differs in models that are equal."""
        told = self.ok and line.status == "differs"
        return "; the layers behind it make up for it" if told else ""

    def _head(self) -> str:
        if self.ok:
            return "equal"
        head = "nothing is proved" if self.output.status == "not compared" else "they differ"
        return head if self.first is None else f"{head}, from {self.first} on"

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
            f"<td>{line.relative:.3g}</td><td>{line.ulp:,}</td><td>{line.allowed:,.0f}</td>"
            f"<td>{_OTHERS if self._is_other(line) else line.status + self._beside(line)}</td></tr>"
            for line in self._lines()
        ]
        names = ("layer", "shape", "absolute", "relative", "ULP", "allowed", "")
        titles = "".join(f"<th>{t}</th>" for t in names)
        head = html.escape(self._head())
        return f"<p>{head}</p><table><tr>{titles}</tr>{''.join(cells)}</table>"


_OTHERS = "not compared  under this name the models have tensors of different shapes"


def _has_shapes_apart(line: Line) -> bool:
    return line.allowed == 0 and not math.isfinite(line.absolute)


def _row(line: Line, width: int) -> str:
    if line.status in ("exact", "not compared") or line.status.startswith("only"):
        return f"{line.name:{width}}  {line.status}"
    if _has_shapes_apart(line):
        return f"{line.name:{width}}  {line.status:9}  the shapes differ"
    return (
        f"{line.name:{width}}  {line.status:9}  absolute {line.absolute:.2e}  relative "
        f"{line.relative:.2e}  {line.ulp:,} ULP of {line.allowed:,.0f} allowed"
    )


View = Callable[[np.ndarray], np.ndarray]
_LIMIT = 2**31  # of a number of units


@dataclasses.dataclass(frozen=True)
class Outputs:
    """What a layer gave, and how far rounding moves it, if that is known."""

    value: np.ndarray
    moved: np.ndarray | None = None

    def seen(self, view: View) -> "Outputs":
        return Outputs(view(self.value), None if self.moved is None else view(self.moved))

    def rows(self) -> "Outputs":
        """Each row in order, with one measure of how far rounding moves it."""
        most = None if self.moved is None else self.moved.max(1, keepdims=True)
        return Outputs(
            np.sort(self.value, 1),
            None if most is None else np.broadcast_to(most, self.value.shape),
        )


def compared(
    name: str, a: Outputs, b: Outputs, views: Sequence[View], **how: Any
) -> tuple[Line, judge.Apart | None]:
    """How far an output is from another, given as it may be turned, and what was found."""
    seen = [s for s in (b.seen(view) for view in views) if s.value.shape == a.value.shape]
    if not seen:
        return Line(name, a.value.shape, math.inf, math.inf, _LIMIT, "differs"), None
    found = [_line(name, a, s, **how) for s in seen]
    best = min(found, key=lambda pair: (pair[0].status == "differs", pair[0].absolute))
    if best[0].status == "differs" and a.value.ndim == 2:
        ordered = _line(name, a.rows(), seen[0].rows(), **how)[0]
        if ordered.status in ("exact", "close"):
            return dataclasses.replace(ordered, status="reordered"), best[1]
    return best


def _line(name: str, a: Outputs, b: Outputs, **how: Any) -> tuple[Line, judge.Apart]:
    noise = [x.moved for x in (a, b) if x.moved is not None]
    found = judge.apart(a.value, b.value, noise, **how)
    status = "differs"
    if not found.compared and found.excess <= 1:
        status = "not compared"
    elif identical(a.value, b.value):
        status = "exact"
    elif found.equal:
        status = "close"
    ulp = int(min(found.ulp, _LIMIT))
    line = Line(name, a.value.shape, found.absolute, found.relative, ulp, status, found.allowed)
    return line, found


def identical(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays are the same, bit for bit."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    one, other = (np.ascontiguousarray(v).reshape(-1).view(np.uint8) for v in (a, b))
    return bool(np.array_equal(one, other))


_ROWS, _FITS = 4, 2.0**-10


def carried(a: np.ndarray, b: np.ndarray, axis: int) -> bool:
    """Whether a layer gives the units of another in another order, or each one times a factor and
    plus a number of its own, as a next layer can take back.

    A factor and a number are only known where there are four rows for them.
    """
    if a.shape != b.shape or a.ndim < 2 or {a.dtype.kind, b.dtype.kind} & set("iubc"):
        return False
    a, b = (np.moveaxis(v, axis, -1).reshape(-1, v.shape[axis]).astype(float) for v in (a, b))
    with np.errstate(all="ignore"):
        size = np.maximum(np.abs(a).max(1), np.abs(b).max(1))[:, None]
        if not np.isfinite(size).all():
            return False
        size = np.where(size, size, 1)  # of each row, which are all to count alike
        if (np.abs(np.sort(a, 1) - np.sort(b, 1)) <= _FITS * size).all():
            return True
        if len(a) < _ROWS:
            return False
        weight = 1 / size**2
        mid = np.sum(weight * a, 0) / np.sum(weight)
        end = np.sum(weight * b, 0) / np.sum(weight)
        spread = np.sum(weight * (a - mid) ** 2, 0)
        factor = np.sum(weight * (a - mid) * (b - end), 0) / np.where(spread, spread, 1)
        fits = []
        # A factor alone, too: rows of zeros say the most of what is added, if anything is.
        alone = np.sum(weight * a * b, 0) / np.maximum(np.sum(weight * a * a, 0), 1e-300)
        for by, plus in ((factor, end - factor * mid), (alone, 0.0)):
            fits.append((np.abs(by * a + plus - b) <= _FITS * size).all(0) & (by != 0))
        unused = (a == 0).all(0) & (b == 0).all(0)
    return bool((fits[0] | fits[1] | unused).all())


def weight_apart(path: str, a: np.ndarray, b: np.ndarray) -> Line:
    """How far two arrays of weights, which are not the same, are from each other."""
    if a.shape != b.shape:
        return Line(path, a.shape, math.inf, math.inf, _LIMIT, "differs")
    with np.errstate(invalid="ignore", over="ignore"):
        largest = np.abs(a)
        scale = float(np.max(largest, where=np.isfinite(largest), initial=0))
        off = ~((a == b) | (np.isnan(a) & np.isnan(b)))
        one, other = a[off], b[off]
        gap = np.abs(one.astype(float) - other.astype(float))
    absolute = float(np.max(np.where(np.isnan(gap), np.inf, gap), initial=0.0))
    ulp = int(np.max(np.abs(_ordinal(one) - _ordinal(other)), initial=0))
    return Line(path, a.shape, absolute, absolute / scale if scale else absolute, ulp, "differs")


def _ordinal(x: np.ndarray) -> np.ndarray:
    """Floats as integers in their order, so that neighbours differ by one."""
    bits = x.astype(np.float32).view(np.int32).astype(np.int64)
    return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
