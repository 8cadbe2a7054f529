"""What ``verify`` found, and how two arrays are compared."""

import dataclasses
import html
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np


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


def compared(name: str, a: np.ndarray, others: Sequence[np.ndarray], tolerance: float) -> Line:
    """How far an output is from another, given as it is and as it may be turned."""
    views = [v for v in others if v.shape == a.shape]
    if not views:
        return Line(name, a.shape, math.inf, math.inf, 2**31, "differs")
    lines = [apart(name, a, v, tolerance) for v in views]
    best = min(lines, key=lambda line: (line.status == "differs", line.absolute))
    if best.status == "differs" and a.ndim == 2:
        ordered = apart(name, np.sort(a, 1), np.sort(views[0], 1), tolerance)
        if ordered.status != "differs":
            return dataclasses.replace(ordered, status="reordered")
    return best


def apart(name: str, a: np.ndarray, b: np.ndarray, tolerance: float) -> Line:
    """How far two arrays of one shape are from each other."""
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
