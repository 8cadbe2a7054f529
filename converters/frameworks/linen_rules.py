"""What JAX computes between the layers of a linen module, as layers: a rule for each primitive."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from fwt import layers as fl
from fwt._graph import Graph
from fwt._types import ConversionError
from fwt.converters.frameworks import flax as _flax
from fwt.converters.frameworks import linen_windows
from fwt.converters.frameworks.linen_nodes import Reader, Value, put
from fwt.converters.frameworks.linen_shapes import (
    ANYWHERE,
    Rule,
    found_in,
    pointwise,
    rescaled,
    shaped,
    turned,
    wider,
)
from fwt.converters.frameworks.linen_shapes import RULES as SHAPES
from fwt.converters.frameworks.linen_values import Equation, Held, Layered, Reopen, Slot
from fwt.converters.rows.row import Framework, joined, refuse
from fwt.converters.walk import convert


def read(reader: Reader) -> None:
    """All equations as nodes."""
    _find_shared(reader)
    for at, equation in enumerate(reader.equations.all):
        if id(equation) in reader.done:
            continue
        name, place = equation.name, equation.place
        _check_batch(reader, equation)
        _check_dtype(equation)
        if "call" in equation.params:
            made: Any = _layer(reader, equation)
        elif linen_windows.read(reader, at):
            continue
        else:
            rule = RULES.get(name)
            made = rule(reader, equation) if rule else None
        if made is None:
            raise refuse(place, f"the operation {name} between layers has no row: "
                         f"{_said(equation)}")  # fmt: skip
        for slot, value in zip(equation.outs, made if isinstance(made, list) else [made],
                               strict=True):  # fmt: skip
            if isinstance(value, Value):
                reader.env[id(slot)] = value


def _check_batch(reader: Reader, equation: Equation) -> None:
    """Raises where the batch is not the first axis, and an operation asks for that."""
    moved = {bool(reader.batch_of(s)) for s in (*equation.ins, *equation.outs) if s.follows}
    if True not in moved or equation.name in (*ANYWHERE, "dot_general"):
        return
    beside = [s for s in equation.ins if not s.follows and s.number is None]
    if equation.name not in _EACH or beside or False in moved:
        raise refuse(equation.place, f"the operation {equation.name} finds the batch at another "
                     "axis than the first", "move it back before")  # fmt: skip


def _check_dtype(equation: Equation) -> None:
    """Raises for what is computed in half or double precision between layers."""
    for slot in (*equation.ins, *equation.outs):
        if slot.follows and jnp.issubdtype(slot.dtype, jnp.inexact) and slot.dtype != np.float32:
            raise refuse(equation.place, f"between layers it computes in {slot.dtype}",
                         "give the modules dtype=None or float32 for this; the weights may stay "
                         "as they are")  # fmt: skip


def _said(equation: Equation) -> str:
    shapes = [f"({', '.join(map(str, s.shape))})" for s in equation.ins]
    return f"it takes {', '.join(shapes)} and gives ({', '.join(map(str, equation.outs[0].shape))})"


def _find_shared(reader: Reader) -> None:
    """A layer whose array something else takes too can't stay whole, but the table of an Embed can
    stand beside what looks up in it."""
    calls = [e.params["call"] for e in reader.equations.all if "call" in e.params]
    for equation in reader.equations.all:
        for slot in equation.ins if "call" not in equation.params else ():
            if slot.held is None or not slot.held.learned:
                continue
            for call in calls:
                if slot.held.path[1 : 1 + len(call.path)] != call.path:
                    continue
                if not isinstance(call.layer, nn.Embed):
                    raise Reopen(joined(call.path))
                reader.shared.add(slot.held.path)


# -- layers ---------------------------------------------------------------------------------------


def _layer(reader: Reader, equation: Equation) -> Value:
    call: Layered = equation.params["call"]
    layer, path = call.layer, joined(call.path)
    place = f"{path} ({type(layer).__name__})"
    given = dict(zip(call.names, equation.ins, strict=False))
    if not call.has_its_own(equation.ins[len(given) :]):
        raise Reopen(path)
    first = next(iter(given.values()))
    if not first.follows:
        raise Reopen(path)
    if isinstance(layer, nn.MultiHeadDotProductAttention):
        layer, ins = _attention(layer, given, path)
    else:
        ins = list(given.values())
    if any(not s.follows for s in ins):
        raise Reopen(path)
    _check_said(reader, call, layer, ins)
    values = [reader.value(s, place) for s in ins]
    shape = reader.sizes(equation.outs[0], place)
    table = reader.equations.held.get(("params", *call.path, "embedding"))
    if table is not None and table.path in reader.shared:
        return found_in(reader, table, values[0], place)
    held = any(p[1 : 1 + len(call.path)] == call.path for p in reader.equations.held)
    if not held:
        name = path or type(layer).__name__.lower()
        return reader.emit(layer, values, name, shape)
    return reader.call(layer, call.path, values, shape)


def _check_said(reader: Reader, call: Layered, layer: Any, ins: Sequence[Slot]) -> None:
    """Raises Reopen for the first call of a layer that no row can say in this place."""
    if call.path in reader.first:
        return
    own: dict[str, Any] = {}
    for (collection, *path), held in reader.equations.held.items():
        if tuple(path[: len(call.path)]) == call.path:
            put(own, [collection, "layer", *path[len(call.path) :]], held.array)
    names = tuple(f"input_{i}" for i in range(len(ins)))
    shapes = tuple(reader.sizes(s, joined(call.path))[1:] for s in ins)
    graph = Graph([("layer", layer, names)], names, input_shape=shapes)
    found: ConversionError | None = None
    targets: tuple[Framework, ...] = ("torch", "keras")
    for target in targets:
        try:
            convert.convert(_flax.read_flax(graph, own), "flax", target, "source")
        except ConversionError as error:
            found = found or error
        else:
            return
    assert found is not None
    raise Reopen(joined(call.path), str(found).removeprefix("layer "))


def _attention(layer: Any, given: dict[str, Slot], path: str) -> tuple[Any, list[Slot]]:
    """Attention with what it takes; its mask may be the causal one."""
    mask = given.pop("mask", None)
    query = given.pop("inputs_q")
    key = given.pop("inputs_k", query)
    value = given.pop("inputs_v", key)
    if given or len(query.shape) != 3:
        raise Reopen(path)
    if mask is not None:
        known = mask.known
        times = query.shape[1]
        causal = np.tril(np.ones((times, times), bool))
        if known is None or known.shape[-2:] != causal.shape or not (
            (known != 0) == causal
        ).all() or key is not query:  # fmt: skip
            raise Reopen(path)
        fields = {f.name: getattr(layer, f.name) for f in dataclasses.fields(layer)}
        fields = {k: v for k, v in fields.items() if k not in ("parent", "name")}
        layer = fl.CausalAttention(**fields)
    return layer, [query] if key is query and value is query else [query, key, value]


# -- entry by entry -------------------------------------------------------------------------------


def met(reader: Reader, layer: Any, slots: Sequence[Slot], place: str) -> Value:
    """A layer of tensors that broadcast."""
    values = [reader.thin(s, place) if s.follows else reader.array(s, place) for s in slots]
    return reader.emit(layer, values, place, wider(*(v.shape for v in values)))


_MEETS = {"add": fl.Add, "add_any": fl.Add, "sub": fl.Subtract, "mul": fl.Multiply,
          "div": fl.Divide, "max": fl.Maximum, "min": fl.Minimum}  # fmt: skip


def _arithmetic(reader: Reader, equation: Equation) -> Any:
    (a, b), name, place = equation.ins, equation.name.removesuffix("_any"), equation.place
    left, right = a.number, b.number
    if not a.follows and not b.follows:
        return None
    if np.dtype(equation.outs[0].dtype).kind != "f":
        return None
    if right is not None and a.follows:
        how = {"add": (1, right), "sub": (1, -right), "mul": (right, 0),
               "div": (1 / right if right else math.inf, 0)}  # fmt: skip
        if name in how and all(map(math.isfinite, how[name])):
            return rescaled(reader, reader.thin(a, place), place, *how[name])
    if left is not None and b.follows:
        how = {"add": (1, left), "sub": (-1, left), "mul": (left, 0)}
        if name in how and all(map(math.isfinite, how[name])):
            return rescaled(reader, reader.thin(b, place), place, *how[name])
        if name == "div":
            value = pointwise(reader, fl.Pointwise("reciprocal"), reader.thin(b, place), place)
            return rescaled(reader, value, place, left, 0)
    bound = left if left is not None else right
    if name in ("max", "min") and bound is not None:
        slot = b if left is not None else a
        low, high = (bound, math.inf) if name == "max" else (-math.inf, bound)
        thin = reader.thin(slot, place)
        if low == -math.inf and high == math.inf:
            return thin
        return pointwise(reader, fl.HardTanh(min_value=low, max_value=high), thin, place)
    if name == "add" and (found := _biased(reader, a, b) or _biased(reader, b, a)):
        return found
    return met(reader, _MEETS[equation.name](), [a, b], place)


def _biased(reader: Reader, value: Slot, bias: Slot) -> Value | None:
    """The sum of a product with a kernel of the model and the bias beside that, as one Dense."""
    known = reader.env.get(id(value))
    found = reader.products.get(known.name) if known is not None else None
    if found is None or bias.held is None or bias.held.path != (*found[:-1], "bias"):
        return None
    held = bias.held
    if not np.array_equal(held.where.reshape(-1), np.arange(held.array.size)):
        return None
    assert known is not None
    return reader.with_bias(known, held)


def _of(*names: str) -> Any:
    def rule(reader: Reader, equation: Equation) -> Value:
        value = reader.thin(equation.ins[0], equation.place)
        for name in names:
            value = pointwise(reader, fl.Pointwise(name), value, equation.place)
        return value

    return rule


def _neg(reader: Reader, equation: Equation) -> Value:
    return rescaled(reader, reader.thin(equation.ins[0], equation.place), equation.place, -1, 0)


def _square(reader: Reader, equation: Equation) -> Value:
    return _power(reader, equation.ins[0], 2, equation.place)


def _integer_pow(reader: Reader, equation: Equation) -> Any:
    return _power(reader, equation.ins[0], equation.params["y"], equation.place)


def _pow(reader: Reader, equation: Equation) -> Any:
    exponent = equation.ins[1].number
    if exponent is None or not equation.ins[0].follows:
        return None
    return _power(reader, equation.ins[0], exponent, equation.place)


def _power(reader: Reader, slot: Slot, exponent: float, place: str) -> Any:
    value = reader.thin(slot, place)
    if exponent in (3, 4):
        square = pointwise(reader, fl.Pointwise("square"), value, place)
        pair = [square, value if exponent == 3 else square]
        return reader.emit(fl.Multiply(), pair, place, value.shape)
    if exponent not in (1, 2, 0.5, -0.5, -1, -2):
        return None
    for size, function in ((0.5, "sqrt"), (2, "square")):
        if abs(exponent) == size:
            value = pointwise(reader, fl.Pointwise(function), value, place)
    if exponent < 0:
        value = pointwise(reader, fl.Pointwise("reciprocal"), value, place)
    return value


def _clamp(reader: Reader, equation: Equation) -> Any:
    low, value, high = equation.ins
    if low.number is None or high.number is None or not value.follows:
        return None
    layer = fl.HardTanh(min_value=low.number, max_value=high.number)
    return pointwise(reader, layer, reader.thin(value, equation.place), equation.place)


def _select(reader: Reader, equation: Equation) -> Any:
    """One or the other of two tensors, by a mask that is known."""
    mask, *cases = equation.ins
    place = equation.place
    if (found := _sloped(reader, equation)) is not None:
        return _leaky(reader, *found, place)
    if mask.follows or len(cases) != 2:
        raise refuse(place, "what it chooses follows from the input")
    if mask.known is None:
        raise refuse(place, mask.why_not)
    one = mask.known.astype(bool)
    total: Value | None = None
    for slot, keep in zip(cases, (~one, one), strict=True):
        if slot.follows:
            value = reader.thin(slot, place)
            other = reader.constant(keep.astype(np.float32), place)
            sizes = wider(value.shape, keep.shape)
            value = reader.emit(fl.Masked(), [value, other], place, sizes)
        elif slot.learned or slot.known is None:
            return None
        else:
            fill = np.where(keep, slot.known, 0).astype(np.float32)
            if not fill.any():  # as what is masked is
                continue
            value = reader.constant(fill, place)
        total = value if total is None else reader.emit(
            fl.Add(), [total, value] if total.shape[:1] == (None,) else [value, total], place,
            wider(total.shape, value.shape))  # fmt: skip
    return total


def _compared(reader: Reader, equation: Equation) -> Any:
    """Whether entries are above zero, where that only tells which of them a factor meets."""
    after = reader.readers.get(id(equation.outs[0]), [])
    return [None] if after and all(_sloped(reader, e) for e in after) else None


def _sloped(reader: Reader, equation: Equation) -> tuple[Slot, Slot] | None:
    """The tensor and the factor of ``where(x > 0, x, factor * x)``."""
    if equation.name != "select_n" or len(equation.ins) != 3:
        return None
    mask, low, high = equation.ins
    test, product = reader.giver(mask), reader.giver(low)
    if test is None or product is None or test.name not in ("gt", "ge") or product.name != "mul":
        return None
    factor = next((s for s in product.ins if s is not high), None)
    if test.ins[0] is not high or test.ins[1].number != 0 or not high.follows:
        return None
    if factor is None or factor.follows or high not in product.ins:
        return None
    return high, factor


def _leaky(reader: Reader, slot: Slot, factor: Slot, place: str) -> Value:
    """The tensor where it is above zero, and elsewhere as often as a factor says."""
    value = reader.thin(slot, place)
    if factor.number is not None:
        layer = fl.LeakyReLU(negative_slope=float(str(np.float32(factor.number))))
        return pointwise(reader, layer, value, place)
    above = pointwise(reader, fl.ReLU(), value, place)
    below = pointwise(reader, fl.HardTanh(min_value=-math.inf, max_value=0.0), value, place)
    slope = reader.array(factor, place)
    shape = wider(below.shape, slope.shape)
    below = reader.emit(fl.Multiply(), [below, slope], place, shape)
    return reader.emit(fl.Add(), [above, below], place, shape)


def _cast(reader: Reader, equation: Equation) -> Any:
    there, here = np.dtype(equation.ins[0].dtype), equation.params["new_dtype"]
    raise refuse(equation.place, f"it makes {np.dtype(here).name} of {there.name} between layers")


# -- products -------------------------------------------------------------------------------------


def _product(reader: Reader, equation: Equation) -> Any:
    (summed, both), place = equation.params["dimension_numbers"], equation.place
    sides = [
        _Side(slot, tuple(map(int, s)), tuple(map(int, b)))
        for slot, s, b in zip(equation.ins, summed, both, strict=True)
    ]
    first, second = sides
    if not second.slot.follows or not first.slot.follows:
        value, known = (first, second) if first.slot.follows else (second, first)
        return _dense(reader, value, known, equation, flipped=value is second)
    batches = [reader.batch_of(side.slot) for side in sides]
    places = [side.both.index(at) if at in side.both else None
              for side, at in zip(sides, batches, strict=True)]  # fmt: skip
    if None in places or places[0] != places[1]:
        raise refuse(place, "it sums over the examples, or meets each with each other")
    first, second = (side.with_first(places[0] or 0) for side in sides)
    a = first.matrix(reader, last="summed", place=place)
    b = second.matrix(reader, last="own", place=place)
    head = [first.size(reader, i) for i in first.both]
    shape = [*head, a.shape[-2], b.shape[-1]]
    made = reader.emit(fl.MatMul(), [a, b], place, shape)
    full = reader.sizes(equation.outs[0], place)
    return shaped(reader, made, full, place)


@dataclasses.dataclass(frozen=True)
class _Side:
    """One of the two tensors of a product, and the axes that are summed and that both have."""

    slot: Slot
    summed: tuple[int, ...]
    both: tuple[int, ...]

    def with_first(self, place: int) -> "_Side":
        """With one of the axes that both have before the others, the batch."""
        both = (self.both[place], *self.both[:place], *self.both[place + 1 :])
        return dataclasses.replace(self, both=both)

    @property
    def own(self) -> tuple[int, ...]:
        return tuple(i for i in range(len(self.slot.shape)) if i not in (*self.summed, *self.both))

    def size(self, reader: Reader, axis: int) -> int | None:
        size = self.slot.shape[axis]
        return int(size) if isinstance(size, int | np.integer) else None

    def matrix(self, reader: Reader, last: str, place: str) -> Value:
        """Its axes as (those that both have, rows, columns)."""
        rows, columns = (self.own, self.summed) if last == "summed" else (self.summed, self.own)
        value = reader.value(self.slot, place)
        axes = [reader.axis(self.slot, a) for a in (*self.both, *rows, *columns)]
        value = turned(reader, value, axes, place)
        sizes = [self.size(reader, i) for i in self.both]
        sizes += [math.prod(int(self.slot.shape[i]) for i in part) for part in (rows, columns)]
        return shaped(reader, value, sizes, place)


def _dense(reader: Reader, value: _Side, known: _Side, equation: Equation, flipped: bool) -> Any:
    """The product of a tensor with an array of the model."""
    place, slot = equation.place, known.slot
    if slot.known is None:
        raise refuse(place, slot.why_not)
    batch = reader.batch_of(value.slot)
    if known.both or batch not in value.own:
        return None
    kernel = slot.known.transpose((*known.summed, *known.own))
    inputs = math.prod(kernel.shape[: len(known.summed)])
    kernel = np.ascontiguousarray(kernel.reshape(inputs, -1))
    rows = [i for i in value.own if i != batch]
    axes = [reader.axis(value.slot, i) for i in (*rows, *value.summed)]
    x = turned(reader, reader.value(value.slot, place), (0, *axes), place)
    own = [None, *(value.size(reader, i) for i in rows)]
    x = shaped(reader, x, [*own, inputs], place)
    held = slot.held
    if held is not None and held.path in reader.shared and kernel.T.shape == held.array.shape:
        if not np.array_equal(kernel.T, held.array):
            raise refuse(place, f"it takes {joined(held.path[1:])} in another way than a lookup")
        parts = [x, reader.parameter(Held(held.path, held.array), place)]
        return reader.emit(fl.Attend(), parts, place, (*own, kernel.shape[1]))
    made = reader.dense(x, kernel, slot, place)
    theirs = [int(slot.known.shape[i]) for i in known.own]
    out = shaped(reader, made, [*own, *theirs], place)
    if flipped and theirs and rows:
        ends = range(len(own), len(own) + len(theirs))
        return turned(reader, out, (0, *ends, *range(1, len(own))), place)
    if out.name != made.name and made.name in reader.products:
        reader.products[out.name] = reader.products[made.name]
        reader.behind[out.name] = made.name
    return out


def _convolution(reader: Reader, equation: Equation) -> Any:
    """A convolution with a kernel that is computed, as where weights are standardised."""
    (slot, kernel), params, place = equation.ins, equation.params, equation.place
    numbers = params["dimension_numbers"]
    rank = len(slot.shape)
    usual = (0, rank - 1, *range(1, rank - 1))
    if (
        kernel.known is None
        or not slot.follows
        or tuple(numbers.lhs_spec) != usual
        or tuple(numbers.out_spec) != usual
        or tuple(numbers.rhs_spec) != (rank - 1, rank - 2, *range(rank - 2))
        or any(n != 1 for n in params["lhs_dilation"])
        or params["batch_group_count"] != 1
    ):
        return None
    layer = nn.Conv(
        kernel.known.shape[-1],
        tuple(kernel.known.shape[:-2]),
        strides=tuple(map(int, params["window_strides"])),
        padding=tuple((int(lo), int(hi)) for lo, hi in params["padding"]),
        kernel_dilation=tuple(map(int, params["rhs_dilation"])),
        feature_group_count=int(params["feature_group_count"]),
        use_bias=False,
    )
    value = reader.value(slot, place)
    arrays: dict[tuple[str, ...], np.ndarray] = {("params", "kernel"): kernel.known}
    return reader.emit(layer, [value], place, reader.sizes(equation.outs[0], place), arrays)


# Those that know no axes.
_EACH: dict[str, Rule] = {
    **dict.fromkeys(_MEETS, _arithmetic),
    **{n: _of(n) for n in ("abs", "ceil", "cos", "cosh", "erf", "exp", "expm1", "floor", "log",
                           "log1p", "round", "sign", "sin", "sinh", "sqrt", "tan", "acos", "acosh",
                           "asin", "asinh", "atan", "atanh")},
    "rsqrt": _of("sqrt", "reciprocal"),
    "tanh": lambda r, e: pointwise(r, fl.Tanh(), r.thin(e.ins[0], e.place), e.place),
    "logistic": lambda r, e: pointwise(r, fl.Sigmoid(), r.thin(e.ins[0], e.place), e.place),
    "neg": _neg,
    "square": _square,
    "integer_pow": _integer_pow,
    "pow": _pow,
    "clamp": _clamp,
}  # fmt: skip
RULES: dict[str, Rule] = {
    **SHAPES,
    **_EACH,
    "select_n": _select,
    **dict.fromkeys(("gt", "ge"), _compared),
    "convert_element_type": _cast,
    "dot_general": _product,
    "conv_general_dilated": _convolution,
}
