"""What JAX moves, cuts, joins and sums between the layers of a linen module, as layers."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fwt import layers as fl
from fwt.converters.frameworks.linen_nodes import Reader, Value
from fwt.converters.frameworks.linen_values import Equation, Held, Slot
from fwt.converters.rows.row import refuse


def pointwise(reader: Reader, layer: Any, value: Value, place: str) -> Value:
    return reader.emit(layer, [value], place, value.shape)


def rescaled(reader: Reader, value: Value, place: str, scale: float, offset: float) -> Value:
    if (scale, offset) == (1, 0):
        return value
    return pointwise(reader, fl.Rescaling(float(scale), float(offset)), value, place)


def wider(*shapes: Sequence[int | None]) -> tuple[int | None, ...]:
    rank = max(len(s) for s in shapes)
    full = [(1,) * (rank - len(s)) + tuple(s) for s in shapes]
    return tuple(next((n for n in ns if n != 1), 1) for ns in zip(*full, strict=True))


# -- shapes ---------------------------------------------------------------------------------------


def shaped(reader: Reader, value: Value, shape: Sequence[int | None], place: str) -> Value:
    shape = tuple(shape)
    if shape == value.shape:
        return value
    if len(shape) < 2:
        raise refuse(place, "it gives a tensor of the batch alone, (n,)", "keep an axis: (n, 1)")
    if len(shape) == 2 and len(value.shape) > 2:
        return reader.emit(fl.Flatten(), [value], place, shape)
    sizes = tuple(int(s or 0) for s in shape[1:])
    return reader.emit(fl.Reshape(sizes), [value], place, shape)


def _reshape(reader: Reader, equation: Equation) -> Value:
    slot, place = equation.ins[0], equation.place
    shape = reader.sizes(equation.outs[0], place)
    return shaped(reader, reader.value(slot, place), shape, place)


def _squeeze(reader: Reader, equation: Equation) -> Value:
    slot = equation.ins[0]
    value = reader.thin(slot, equation.place)
    gone = [reader.axis(slot, d) for d in equation.params["dimensions"]]
    shape = [s for i, s in enumerate(value.shape) if i not in gone]
    return shaped(reader, value, shape, equation.place)


def _broadcast(reader: Reader, equation: Equation) -> Any:
    slot, out, place = equation.ins[0], equation.outs[0], equation.place
    value, dims = reader.thin(slot, place), equation.params["broadcast_dimensions"]
    shape: list[int | None] = [1] * len(reader.sizes(out, place))
    for axis, dim in enumerate(dims):
        shape[reader.axis(out, dim)] = value.shape[reader.axis(slot, axis)]
    return shaped(reader, value, shape, place)  # what it stands for is repeated where need be


def _transpose(reader: Reader, equation: Equation) -> Any:
    slot, place = equation.ins[0], equation.place
    dims = [reader.axis(slot, d) for d in equation.params["permutation"]]
    return turned(reader, reader.thin(slot, place), [0, *(d for d in dims if d)], place)


def turned(reader: Reader, value: Value, dims: Sequence[int], place: str) -> Value:
    """A value with its axes in this order, the batch first."""
    dims = tuple(dims)
    if dims == tuple(range(len(dims))):
        return value
    return reader.emit(fl.Permute(dims), [value], place, [value.shape[d] for d in dims])


def cut(
    reader: Reader, value: Value, axis: int, start: int, stop: int, step: int, place: str
) -> Value:
    size = value.shape[axis]
    if size is None:
        raise refuse(place, "it takes some of the examples")
    if (start, stop, step) == (0, size, 1):
        return value
    if step > 1 and start < stop:  # one end of several that say the same
        stop = range(start, stop, step)[-1] + 1
    shape = (*value.shape[:axis], len(range(start, stop, step)), *value.shape[axis + 1 :])
    layer = fl.Slice(axis=axis, start=start, stop=stop, step=step)
    return reader.emit(layer, [value], place, shape)


def _slice(reader: Reader, equation: Equation) -> Any:
    slot, place, params = equation.ins[0], equation.place, equation.params
    value = reader.value(slot, place)
    strides = params["strides"] or (1,) * len(slot.shape)
    ends = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    for axis, (start, stop, step) in enumerate(ends):
        if axis == reader.batch_of(slot):
            if str(stop) != str(slot.shape[axis]) or start != 0 or step != 1:
                raise refuse(place, "it takes some of the examples")
            continue
        own = reader.axis(slot, axis)
        value = cut(reader, value, own, int(start), int(stop), int(step), place)
    return value


def _dynamic_slice(reader: Reader, equation: Equation) -> Any:
    slot, *starts = equation.ins
    value, place = reader.value(slot, equation.place), equation.place
    sizes = equation.params["slice_sizes"]
    for axis, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        if axis == reader.batch_of(slot):
            if str(size) != str(slot.shape[axis]):
                raise refuse(place, "it takes some of the examples")
            continue
        if start.number is None:
            raise refuse(place, "where it cuts follows from the input")
        first = max(0, min(int(start.number), int(slot.shape[axis]) - int(size)))
        value = cut(reader, value, reader.axis(slot, axis), first, first + int(size), 1, place)
    return value


def _gather(reader: Reader, equation: Equation) -> Any:
    """Entries by known positions: JAX says so what is cut from a tensor with any batch."""
    (slot, at), place, params = equation.ins, equation.place, equation.params
    numbers = params["dimension_numbers"]
    if at.follows:
        return _looked_up(reader, equation) if not slot.follows else None
    if numbers.operand_batching_dims or at.known is None:
        return None
    value = reader.value(slot, place)
    axes, sizes = numbers.start_index_map, params["slice_sizes"]
    gone, batch = numbers.collapsed_slice_dims, reader.batch_of(slot)
    if batch is None or batch in axes or str(sizes[batch]) != str(slot.shape[batch]):
        raise refuse(place, "it takes some of the examples")
    where = at.known
    if where.ndim == 1 and where.shape[0] == len(axes):
        for axis, start in zip(axes, where, strict=True):
            size = int(sizes[axis])
            first = max(0, min(int(start), int(slot.shape[axis]) - size))
            value = cut(reader, value, reader.axis(slot, axis), first, first + size, 1, place)
        left = {reader.axis(slot, i) for i in range(len(slot.shape)) if i not in gone}
        return shaped(reader, value, [value.shape[i] for i in sorted(left)], place)
    if batch or len(axes) != 1 or where.ndim != 2 or gone != tuple(axes):
        return None
    (axis,) = axes
    offset = [i for i in range(len(equation.outs[0].shape)) if i not in numbers.offset_dims]
    if offset != [axis]:
        return None
    return taken(reader, value, axis, where[:, 0], place)


_MOST = 64  # entries that are cut one by one


def taken(reader: Reader, value: Value, axis: int, where: np.ndarray, place: str) -> Value:
    """The entries along an axis at these positions."""
    size = value.shape[axis] or 1
    times = len(where) // size
    if len(where) == size * times and np.array_equal(where, np.repeat(np.arange(size), times)):
        if times == 1:
            return value
        spatial = len(value.shape) - 2
        if 1 <= axis <= spatial <= 3:
            sizes = tuple(times if i == axis else 1 for i in range(1, spatial + 1))
            shape = (*value.shape[:axis], len(where), *value.shape[axis + 1 :])
            return reader.upsampled(value, sizes, shape, place)
    if np.array_equal(where, np.arange(size)[::-1]):
        return reader.emit(fl.Flip(axis), [value], place, value.shape)
    (step, *others) = np.unique(np.diff(where)) if len(where) > 2 else (0,)
    if step > 1 and not others:
        return cut(reader, value, axis, int(where[0]), int(where[-1]) + 1, int(step), place)
    runs: list[tuple[int, int]] = []
    for one in map(int, where):
        if runs and one == runs[-1][1]:
            runs[-1] = runs[-1][0], one + 1
        else:
            runs.append((one, one + 1))
    if not 0 < len(runs) <= _MOST:
        raise refuse(place, f"it takes entries in more than {_MOST} pieces along one axis")
    parts = [cut(reader, value, axis, start, stop, 1, place) for start, stop in runs]
    return along(reader, parts, axis, place)


def _looked_up(reader: Reader, equation: Equation) -> Any:
    """The rows of a table of the model for whole numbers."""
    (table, at), numbers = equation.ins, equation.params["dimension_numbers"]
    place = equation.place
    if table.held is None or len(table.shape) != 2 or numbers.start_index_map != (0,):
        return None
    ids = reader.value(at, place)
    if ids.shape[-1] != 1:
        return None
    ids = shaped(reader, ids, ids.shape[:-1], place)
    return found_in(reader, table.held, ids, place)


def found_in(reader: Reader, table: Held, ids: Value, place: str) -> Value:
    parts = [reader.parameter(table, place), ids]
    name = place.partition(" ")[0]
    return reader.emit(fl.Lookup(), parts, f"{name}__lookup", (*ids.shape, table.where.shape[1]))


def along(reader: Reader, parts: Sequence[Value], axis: int, place: str) -> Value:
    if len(parts) == 1:
        return parts[0]
    shape = list(wider(*(p.shape for p in parts)))
    shape[axis] = sum(p.shape[axis] or 0 for p in parts)
    return reader.emit(fl.Concatenate(axis), parts, place, shape)


def _stack(reader: Reader, equation: Equation) -> Any:
    """Tensors beside each other along a new axis."""
    axis, place = int(equation.params["axis"]), equation.place
    if axis == 0 or not all(s.follows for s in equation.ins):
        return None
    parts = []
    for slot in equation.ins:
        value = reader.value(slot, place)
        parts.append(shaped(reader, value, (*value.shape[:axis], 1, *value.shape[axis:]), place))
    return along(reader, parts, axis, place)


def _concatenate(reader: Reader, equation: Equation) -> Any:
    axis, place = int(equation.params["dimension"]), equation.place
    if axis == 0:
        raise refuse(place, "it puts examples one after the other")
    parts = []
    for slot in equation.ins:
        if slot.follows:
            parts.append(reader.value(slot, place))
            continue
        value = reader.array(slot, place)
        if len(value.shape) < len(slot.shape):
            raise refuse(place, "an array that it takes has fewer axes")
        parts.append(value)  # which stands for each example
    return along(reader, parts, axis, place)


def _tile(reader: Reader, equation: Equation) -> Any:
    value, place = reader.value(equation.ins[0], equation.place), equation.place
    for axis, times in enumerate(equation.params["reps"]):
        if times != 1 and (axis == 0 or not isinstance(times, int | np.integer)):
            raise refuse(place, "it repeats the examples")
        value = along(reader, [value] * int(times), axis, place)
    return value


def _split(reader: Reader, equation: Equation) -> Any:
    slot = equation.ins[0]
    value, axis = reader.value(slot, equation.place), reader.axis(slot, equation.params["axis"])
    if axis == 0:
        raise refuse(equation.place, "it takes some of the examples")
    at, out = 0, []
    for size in map(int, equation.params["sizes"]):
        out.append(cut(reader, value, axis, at, at + size, 1, equation.place))
        at += size
    return out


def _rev(reader: Reader, equation: Equation) -> Any:
    value = reader.value(equation.ins[0], equation.place)
    for axis in equation.params["dimensions"]:
        if axis == 0:
            raise refuse(equation.place, "it turns the examples around")
        value = reader.emit(fl.Flip(int(axis)), [value], equation.place, value.shape)
    return value


def _pad(reader: Reader, equation: Equation) -> Any:
    (slot, fill), place = equation.ins, equation.place
    config = [tuple(int(x) for x in c) for c in equation.params["padding_config"]]
    if fill.number is None or any(c[2] for c in config) or any(config[0]):
        return None
    value = reader.value(slot, place)
    shape = reader.sizes(equation.outs[0], place)
    pads = [(c[0], c[1]) for c in config[1:]]
    added = any(pads[-1])  # the channels too: they are made an axis beside one of one entry
    if added:
        value = shaped(reader, value, (*value.shape, 1), place)
        pads.append((0, 0))
    sides = tuple(pads[:-1])
    if not 1 <= len(sides) <= 3:
        raise refuse(place, f"it pads a tensor of rank {len(shape)}")
    padded = (*shape, 1) if added else shape
    if all(lo <= 0 and hi <= 0 for lo, hi in sides):
        layer: Any = fl.Crop(tuple((-lo, -hi) for lo, hi in sides))
    elif fill.number == 0:
        layer = fl.ZeroPad(sides)
    else:
        layer = fl.ConstantPad(sides, value=fill.number)
    return shaped(reader, reader.emit(layer, [value], place, padded), shape, place)


# -- along axes -----------------------------------------------------------------------------------


def reduced(
    reader: Reader, value: Value, function: str, axes: Sequence[int], keep: bool, place: str
) -> Value:
    axes = sorted(int(a) for a in axes)
    if 0 in axes:
        raise refuse(place, f"its {function} is over the examples")
    rank = len(value.shape)
    kept = tuple(1 if i in axes else s for i, s in enumerate(value.shape))
    left = tuple(s for i, s in enumerate(value.shape) if i not in axes)
    pools = {"mean": fl.GlobalAvgPool, "max": fl.GlobalMaxPool}
    if function in pools and 3 <= rank <= 5 and axes == list(range(1, rank - 1)):
        layer = pools[function](keepdims=keep)
        return reader.emit(layer, [value], place, kept if keep else left)
    for axis in axes:
        shape = (*value.shape[:axis], 1, *value.shape[axis + 1 :])
        value = reader.emit(fl.Reduce(function, axis), [value], place, shape)
    return value if keep else shaped(reader, value, left, place)


def _reduce(function: str) -> Any:
    def rule(reader: Reader, equation: Equation) -> Any:
        slot = equation.ins[0]
        value = reader.value(slot, equation.place)
        keep, out = _kept(reader, equation.outs[0], equation.params["axes"])
        axes = [reader.axis(slot, a) for a in equation.params["axes"]]
        if function == "sum" and 0 not in axes:
            count = math.prod(int(value.shape[a] or 0) for a in axes)
            after = reader.read_once(out.outs[0] if out else equation.outs[0])
            if after is not None and _divides(after, count):
                made = reduced(reader, value, "mean", axes, keep, equation.place)
                _pass(reader, [out, after], made)
                return made
        made = reduced(reader, value, function, axes, keep, equation.place)
        _pass(reader, [out], made)
        return made

    return rule


def _kept(reader: Reader, slot: Slot, axes: Sequence[int]) -> tuple[bool, Equation | None]:
    """Whether the axes are only put back behind it, with one entry each, and where."""
    after = reader.read_once(slot)
    if after is None or after.name not in ("broadcast_in_dim", "reshape"):
        return False, None
    shape = after.outs[0].shape
    rest = [i for i in range(len(shape)) if i not in axes]
    if len(shape) != len(slot.shape) + len(axes) or any(shape[a] != 1 for a in axes):
        return False, None
    if after.name == "broadcast_in_dim":
        same = list(after.params["broadcast_dimensions"]) == rest
    else:
        same = [str(shape[i]) for i in rest] == [str(s) for s in slot.shape]
    return (True, after) if same else (False, None)


def _divides(equation: Equation, count: int) -> bool:
    a, b = equation.ins if len(equation.ins) == 2 else (None, None)
    if equation.name == "div" and a is not None and b is not None and a.follows:
        return b.number == count
    if equation.name == "mul" and a is not None and b is not None:
        found = a.number if a.number is not None else b.number
        return found is not None and np.float32(found) == np.float32(1 / count)
    return False


def _pass(reader: Reader, equations: Sequence[Equation | None], value: Value) -> None:
    """These equations are read too, and give this value."""
    for equation in equations:
        if equation is not None:
            reader.done.add(id(equation))
            reader.env[id(equation.outs[0])] = value


# -- windows --------------------------------------------------------------------------------------


def _window(equation: Equation) -> tuple[Any, ...] | None:
    """The sizes, steps and pads of a window over the spatial axes."""
    params = equation.params
    dilated = [*params["base_dilation"], *params["window_dilation"]]
    sizes, steps, pads = (params[k] for k in ("window_dimensions", "window_strides", "padding"))
    ends = [sizes[0], sizes[-1], steps[0], steps[-1], *dilated]
    if any(n != 1 for n in ends) or any(tuple(p) != (0, 0) for p in (pads[0], pads[-1])):
        return None
    if not 1 <= len(sizes) - 2 <= 3:
        return None
    plain = tuple((int(lo), int(hi)) for lo, hi in pads[1:-1])
    return tuple(map(int, sizes[1:-1])), tuple(map(int, steps[1:-1])), plain


def _max_window(reader: Reader, equation: Equation) -> Any:
    found, place = _window(equation), equation.place
    if found is None:
        return None
    sizes, steps, pads = found
    layer = fl.MaxPool(window_shape=sizes, strides=steps, padding=_valid(pads))
    value = reader.value(equation.ins[0], place)
    return reader.emit(layer, [value], place, reader.sizes(equation.outs[0], place))


def _valid(pads: tuple[tuple[int, int], ...]) -> Any:
    return pads if any(map(any, pads)) else "VALID"


def _sum_window(reader: Reader, equation: Equation) -> Any:
    found, place = _window(equation), equation.place
    after = reader.read_once(equation.outs[0])
    if found is None:
        return None
    sizes, steps, pads = found
    count, counted = math.prod(sizes), True
    value = reader.value(equation.ins[0], place)
    shape = reader.sizes(equation.outs[0], place)
    if after is not None and after.name == "div" and after.ins[1].known is not None:
        by = after.ins[1]
        if by.number != count:
            counted = False  # how many of each window are no padding: the check at the end holds it
        layer = fl.AvgPool(window_shape=sizes, strides=steps, padding=_valid(pads),
                           count_include_pad=counted)  # fmt: skip
        made = reader.emit(layer, [value], place, shape)
        _pass(reader, [after], made)
        return made
    layer = fl.AvgPool(window_shape=sizes, strides=steps, padding=_valid(pads),
                       count_include_pad=True)  # fmt: skip
    return rescaled(reader, reader.emit(layer, [value], place, shape), place, count, 0)


Rule = Callable[[Reader, Equation], Any]
RULES: dict[str, Rule] = {
    "reshape": _reshape,
    "squeeze": _squeeze,
    "expand_dims": _reshape,
    "broadcast_in_dim": _broadcast,
    "transpose": _transpose,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    "concatenate": _concatenate,
    "stack": _stack,
    "split": _split,
    "tile": _tile,
    "rev": _rev,
    "pad": _pad,
    "reduce_sum": _reduce("sum"),
    "reduce_max": _reduce("max"),
    "reduce_min": _reduce("min"),
    "reduce_prod": _reduce("prod"),
    "reduce_window_max": _max_window,
    "reduce_window_sum": _sum_window,
}
# Those that may meet a batch that is not the first axis.
ANYWHERE = frozenset(("squeeze", "broadcast_in_dim", "transpose", "slice", "dynamic_slice",
                      "gather", "split", "reduce_sum", "reduce_max", "reduce_min",
                      "reduce_prod"))  # fmt: skip
