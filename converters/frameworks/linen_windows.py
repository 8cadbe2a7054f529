"""Layers without weights, known again in flat equations: a function such as ``nn.gelu`` leaves the
equations that its layer leaves."""

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from fwt import layers as fl
from fwt.converters.frameworks.linen_nodes import Reader
from fwt.converters.frameworks.linen_values import Equation, Equations, Slot
from fwt.converters.rows import functions
from fwt.converters.rows.row import AxisSetting, S, number
from fwt.layers.functions import FUNCTIONS

# The settings of an operation that tell what it computes; the others are shapes.
_TELLING = ("axes", "y", "new_dtype", "dimension", "axis")
Form = tuple[tuple[str, tuple[Any, ...], tuple[Any, ...]], ...]


class _Candidate:
    """The equations of a layer, with the names of fields where the values of its fields stand."""

    def __init__(
        self, layer: type, fields: Mapping[str, Any], marks: Mapping[str, float], form: Form
    ):
        self.layer, self.fields, self.marks, self.form = layer, fields, marks, form


@functools.cache
def _candidates(rank: int, dtype: str) -> tuple[_Candidate, ...]:
    """Those for a tensor of some rank, the longest first, and of these the ones that say least."""
    found = []
    for layer, fields, marks, function in _kinds(rank):
        try:
            made = layer(**fields, **marks)
            form = _form_of(function or (lambda x, made=made: made.apply({}, x)), rank, dtype)
        except Exception:  # noqa: BLE001 - linen's layers refuse a rank by errors of any class
            continue
        if form:
            found.append(_Candidate(layer, fields, marks, form))
    return tuple(sorted(found, key=lambda c: (-len(c.form), len(c.marks))))


def _kinds(rank: int) -> Iterator[tuple[Any, dict[str, Any], dict[str, float], Any]]:
    """Layers of the table, their fields, those fields that may be any number, and the function that
    the layer stands for, where that leaves other equations."""
    for function, layer, given in FUNCTIONS:
        yield layer, given, {}, function
    for row in functions.ROWS:
        cls: Any = row.flax
        if cls is None or row.kind or row.params or cls in (fl.Identity, fl.Pointwise, fl.Reduce):
            continue
        base = dict(row.function[1]) if row.function else {}
        marks = {s.flax: 0.0 for s in row.settings if isinstance(s, S) and s.normal is number}
        axes = [s.flax for s in row.settings if isinstance(s, AxisSetting)]
        if cls is fl.GELU:
            yield from ((cls, {"approximate": a}, {}, None) for a in (True, False))
        elif axes:
            yield from ((cls, {axes[0]: a}, {}, None) for a in range(1, rank))
        else:
            fixed = {k: v for k, v in base.items() if k not in marks}
            # Numbers that no function has of itself.
            yield cls, fixed, {k: _MARKS[i] for i, k in enumerate(marks)}, None
            if marks and all(k in base for k in marks):
                yield cls, base, {}, None


_MARKS = (0.71828127, 1.4142099, 0.31830001)
_SIZES = (2, 3, 5, 7, 4, 6)


def _form_of(function: Any, rank: int, dtype: str) -> Form | None:
    closed = jax.make_jaxpr(function)(jax.ShapeDtypeStruct(_SIZES[:rank], np.dtype(dtype)))
    equations = Equations(closed, [], 1)
    found = _form(equations.all, equations.inputs[0])
    last = equations.all[-1].outs if equations.all else []
    return found if len(last) == 1 and equations.outs == last else None


def _form(equations: Sequence[Equation], start: Slot) -> Form | None:
    """Equations on one tensor, whatever their shapes; None where they take another too."""
    places: dict[int, Any] = {id(start): "x"}
    out = []
    for index, equation in enumerate(equations):
        ins: list[Any] = []
        for slot in equation.ins:
            if slot.follows:
                if id(slot) not in places:
                    return None
                ins.append(places[id(slot)])
            elif slot.number is None:
                return None
            else:
                ins.append(slot.number)
        told = tuple((k, _plain(equation.params[k])) for k in _TELLING if k in equation.params)
        out.append((equation.name, told, tuple(ins)))
        for place, slot in enumerate(equation.outs):
            places[id(slot)] = (index, place)
    return tuple(out)


def _plain(value: Any) -> Any:
    return tuple(int(v) for v in value) if isinstance(value, tuple | list) else str(value)


def _bound(candidate: _Candidate, form: Form) -> dict[str, float] | None:
    """The values of its fields with which a layer gives these equations."""
    found: dict[str, float] = {}
    marks = {float(np.float32(v)): k for k, v in candidate.marks.items()}
    for (name, told, ins), (other, theirs, given) in zip(candidate.form, form, strict=True):
        if name != other or told != theirs or len(ins) != len(given):
            return None
        for a, b in zip(ins, given, strict=True):
            if not isinstance(a, float) or not isinstance(b, float):
                if a != b:
                    return None
            elif float(np.float32(a)) in marks:
                field = marks[float(np.float32(a))]
                if found.setdefault(field, b) != b:
                    return None
            elif np.float32(a) != np.float32(b) and not (np.isnan(a) and np.isnan(b)):
                return None
    return found if len(found) == len(marks) else None


def read(reader: Reader, at: int) -> bool:
    """Reads the equations from one on as a layer, if they are one."""
    every = reader.equations.all
    first = every[at]
    starts = [s for s in first.ins if s.follows]
    start = starts[0]
    rank = len(start.shape)
    if any(s is not start for s in starts) or not rank or np.dtype(start.dtype).kind != "f":
        return False
    if reader.batch_of(start):
        return False
    tried: dict[int, Form | None] = {}
    for candidate in _candidates(rank, np.dtype(start.dtype).name):
        count = len(candidate.form)
        if candidate.form[0][0] != first.name or at + count > len(every):
            continue
        window = every[at : at + count]
        if count not in tried:
            tried[count] = _form(window, start)
        form = tried[count]
        fields = _bound(candidate, form) if form is not None else None
        if fields is None or any(id(e) in reader.done for e in window) or _leaks(reader, window):
            continue
        layer = candidate.layer(**candidate.fields, **{k: _short(v) for k, v in fields.items()})
        place = first.place.rpartition("/")[0]
        name = "/".join(x for x in (place, candidate.layer.__name__.lower()) if x)
        value = reader.value(start, name)
        out = window[-1].outs[0]
        reader.env[id(out)] = reader.emit(layer, [value], name, reader.sizes(out, name))
        reader.done |= {id(e) for e in window}
        return True
    return False


def _short(value: float) -> float:
    """A float32 as its shortest decimal, as the user wrote it."""
    return float(str(np.float32(value)))


def _leaks(reader: Reader, window: Sequence[Equation]) -> bool:
    """Whether something else takes what stands between the equations."""
    inside = {id(e) for e in window}
    between = list(itertools.chain.from_iterable(e.outs for e in window[:-1]))
    return any(
        any(id(r) not in inside for r in reader.readers.get(id(s), []))
        or any(s is o for o in reader.equations.outs)
        for s in between
    )
