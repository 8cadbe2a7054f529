"""One function for each of JAX's primitives: the TensorFlow operation, or ONNX's own, that it is.

``t`` is the tracer, ``eqn`` the equation of the jaxpr.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf
from jax import lax

from fwt.converters.onnx.pointwise import cast, converted, is_nan, like, where
from fwt.converters.rows.row import refuse

if TYPE_CHECKING:
    from fwt.converters.onnx.trace import Tracer


class Weight:
    """An array of the model on its way to an initializer: what only moves its numbers is done here,
    so that they cross bit for bit. ``undo`` says how the leaves come back from it."""

    def __init__(self, name: str, value: np.ndarray, undo: Mapping[str, list[Any]]):
        self.name, self.value, self.undo = name, value, undo

    def moved(self, value: np.ndarray, *step: Any) -> "Weight":
        """With its numbers at other places, from which the step brings them back."""
        undo = {leaf: [list(step), *steps] for leaf, steps in self.undo.items()}
        return Weight(self.name, value, undo)

    def __repr__(self) -> str:
        return f"Weight({self.name}, {self.value.shape})"


def _from_end(place: Any, size: Any) -> int:
    return int((place - size) if not hasattr(place - size, "_evaluate") else 0)


def shape_of(value: Any) -> tuple[Any, ...]:
    if isinstance(value, Weight):
        return value.value.shape
    return tuple(value.shape)


def known_sizes(shape: Sequence[Any]) -> list[int | None]:
    """A shape for TensorFlow, which knows no names for sizes."""
    return [int(d) if isinstance(d, int | np.integer) else None for d in shape]


def dtype_of(aval: Any) -> Any:
    return tf.as_dtype(np.dtype(aval.dtype))


def _integer(v: Any) -> bool:
    return np.issubdtype(v.aval.dtype, np.integer)


def _division(op: str, **attributes: int) -> Callable[..., Any]:
    def function(t: "Tracer", eqn: Any, a: Any, b: Any) -> Any:
        if _integer(eqn.outvars[0]) and (
            not isinstance(b, np.ndarray) or np.any((b == 0) | (b == -1))
        ):
            raise refuse(t.place, "it divides whole numbers by what may be 0 or -1")
        return t.op(op, a, b, **attributes)

    return function


def _integer_pow(t: "Tracer", eqn: Any, x: Any) -> Any:
    """The products that JAX takes."""
    left, power, out = abs(eqn.params["y"]), t.tensor(x), None
    while left:
        if left % 2:
            out = power if out is None else t.op("Mul", out, power)
        left //= 2
        power = t.op("Mul", power, power) if left else power
    if out is None:
        return tf.ones_like(power)
    return t.op("Reciprocal", out) if eqn.params["y"] < 0 else out


def _round(t: "Tracer", eqn: Any, x: Any) -> Any:
    if eqn.params["rounding_method"] != lax.RoundingMethod.TO_NEAREST_EVEN:
        raise refuse(t.place, "it rounds halves away from zero")
    return t.op("Round", x)


def _select(t: "Tracer", eqn: Any, which: Any, *cases: Any) -> Any:
    which = t.tensor(which)
    if which.dtype == tf.bool:
        return where(t, which, cases[1], cases[0])
    out = t.tensor(cases[0])
    for i, value in enumerate(cases[1:], 1):
        there = t.op("GreaterOrEqual", which, like(which, i), dtype=tf.bool)
        out = where(t, there, value, out)
    return out


def _convert(t: "Tracer", eqn: Any, x: Any) -> Any:
    dtype = eqn.params["new_dtype"]
    if eqn.invars[0].aval.dtype == dtype:
        return x
    return converted(t, t.tensor(x), tf.as_dtype(np.dtype(dtype)))


def _broadcast(t: "Tracer", eqn: Any, x: Any, *more: Any) -> Any:
    rank, axes = len(eqn.params["shape"]), eqn.params["broadcast_dimensions"]
    have = shape_of(x)
    if len(have) == 0 or tuple(axes)[-len(have) :] == tuple(range(rank - len(have), rank)):
        return x  # what follows broadcasts it
    missing = len(axes) - len(have)
    spread: list[Any] = [1] * rank
    aval = eqn.invars[0].aval
    for index, axis in enumerate(axes):
        if index >= missing and have[index - missing] != 1:
            spread[axis] = aval.shape[index]
    return t.shaped(x, spread)


def _reshape(t: "Tracer", eqn: Any, x: Any) -> Any:
    new, old = eqn.params["new_sizes"], eqn.invars[0].aval.shape
    extra = len(new) - len(old)
    if extra > 0 and tuple(new[:extra]) == (1,) * extra and tuple(new[extra:]) == tuple(old):
        return x
    return t.shaped(t.full(x, eqn.invars[0].aval), new)


def _transpose(t: "Tracer", eqn: Any, x: Any) -> Any:
    return transposed(t.full(x, eqn.invars[0].aval), eqn.params["permutation"])


def transposed(x: Any, order: Sequence[int]) -> Any:
    """A value with its axes in another order."""
    if tuple(order) == tuple(range(len(order))):
        return x
    if isinstance(x, Weight):
        back = [list(order).index(a) for a in range(len(order))]
        return x.moved(np.transpose(x.value, order), "transpose", back)
    return tf.transpose(x, list(order))


def _squeeze(t: "Tracer", eqn: Any, x: Any) -> Any:
    return t.shaped(t.full(x, eqn.invars[0].aval), eqn.outvars[0].aval.shape)


def _rev(t: "Tracer", eqn: Any, x: Any) -> Any:
    x = t.full(x, eqn.invars[0].aval)
    axes = eqn.params["dimensions"]
    if isinstance(x, Weight):
        return x.moved(np.flip(x.value, axes), "flip", list(axes))
    return reversed_(t.tensor(x), axes)


def reversed_(x: Any, axes: Sequence[int]) -> Any:
    """A tensor from its end to its start along axes."""
    return x[tuple(slice(None, None, -1 if a in axes else 1) for a in range(x.shape.rank))]


def _slice(t: "Tracer", eqn: Any, x: Any) -> Any:
    aval, p = eqn.invars[0].aval, eqn.params
    x = t.full(x, aval)
    steps = p["strides"] or (1,) * len(aval.shape)
    cuts = []
    for size, start, stop, step in zip(aval.shape, p["start_indices"], p["limit_indices"], steps):
        # A place in the batch is told from its end.
        ends = [e if isinstance(e, int | np.integer) else _from_end(e, size) for e in (start, stop)]
        cuts.append(slice(int(ends[0]), None if stop == size else int(ends[1]), int(step)))
    if isinstance(x, Weight):
        return Weight(x.name, x.value[tuple(cuts)], {})
    return t.tensor(x)[tuple(cuts)]


def _concatenate(t: "Tracer", eqn: Any, *parts: Any) -> Any:
    axis = eqn.params["dimension"]
    wide = [
        t.tensor(t.full(p, v.aval))
        for p, v in zip(parts, eqn.invars, strict=True)
        if v.aval.shape[axis] != 0
    ]
    return tf.concat(wide, axis) if len(wide) > 1 else wide[0]


def _stack(t: "Tracer", eqn: Any, *parts: Any) -> Any:
    wide = [t.tensor(t.full(p, v.aval)) for p, v in zip(parts, eqn.invars, strict=True)]
    return tf.stack(wide, eqn.params.get("axis", eqn.params.get("dimension", 0)))


def _split(t: "Tracer", eqn: Any, x: Any) -> list[Any]:
    sizes = [int(s) for s in eqn.params["sizes"]]
    return list(tf.split(t.tensor(t.full(x, eqn.invars[0].aval)), sizes, eqn.params["axis"]))


def _pad(t: "Tracer", eqn: Any, x: Any, fill: Any) -> Any:
    config = eqn.params["padding_config"]
    if any(inside for *_, inside in config) or not isinstance(fill, np.ndarray):
        raise refuse(t.place, "it pads between the entries of its input")
    x = t.tensor(t.full(x, eqn.invars[0].aval))
    return padded(x, [(low, high) for low, high, _ in config], float(fill))


def padded(x: Any, pairs: Sequence[tuple[int, int]], fill: float = 0.0) -> Any:
    """A tensor with a number before and after each axis; a negative count crops."""
    cuts = tuple(slice(max(-lo, 0), -max(-hi, 0) or None) for lo, hi in pairs)
    if any(lo < 0 or hi < 0 for lo, hi in pairs):
        x = x[cuts]
    wide = [[max(lo, 0), max(hi, 0)] for lo, hi in pairs]
    if any(lo or hi for lo, hi in wide):
        x = tf.pad(x, wide, constant_values=tf.constant(fill, x.dtype))
    return x


def _reduce(function: Callable[..., Any]) -> Callable[..., Any]:
    def op(t: "Tracer", eqn: Any, x: Any) -> Any:
        x, axes = t.tensor(t.full(x, eqn.invars[0].aval)), list(eqn.params["axes"])
        if x.dtype.is_integer and function is tf.reduce_prod:
            raise refuse(t.place, "onnxruntime does not go round in a product of whole numbers")
        if not x.dtype.is_integer or x.dtype.size == 8:
            return function(x, axis=axes)
        # onnxruntime ends at the largest int32 where JAX goes on from the least.
        return cast(t, function(cast(t, x, tf.int64), axis=axes), x.dtype)

    return op


def _extreme(function: Callable[..., Any]) -> Callable[..., Any]:
    """The largest or smallest along axes; NaN where there is one, which runtimes pass over."""

    def op(t: "Tracer", eqn: Any, x: Any) -> Any:
        axes, x = list(eqn.params["axes"]), t.tensor(t.full(x, eqn.invars[0].aval))
        found = function(x, axis=axes)
        return where(t, _any_nan(t, x, axes), like(x, math.nan), found) if (
            x.dtype.is_floating) else found  # fmt: skip

    return op


def _any_nan(t: "Tracer", x: Any, axes: Sequence[int]) -> Any:
    some = tf.reduce_max(tf.cast(is_nan(t, x), tf.int32), axis=list(axes))
    return t.op("Greater", some, like(some, 0), dtype=tf.bool)


def _arg(function: Callable[..., Any]) -> Callable[..., Any]:
    """The place of the first maximum or minimum; of the first NaN, where there is one."""

    def op(t: "Tracer", eqn: Any, x: Any) -> Any:
        (axis,) = eqn.params["axes"]
        x = t.tensor(t.full(x, eqn.invars[0].aval))
        found = function(x, axis)
        if x.dtype.is_floating:
            first = tf.argmax(tf.cast(is_nan(t, x), tf.int32), axis)
            found = where(t, _any_nan(t, x, [axis]), first, found)
        return tf.cast(found, dtype_of(eqn.outvars[0].aval))

    return op


def _cumsum(t: "Tracer", eqn: Any, x: Any) -> Any:
    x = t.tensor(t.full(x, eqn.invars[0].aval))
    return tf.cumsum(x, eqn.params["axis"], reverse=eqn.params["reverse"])


def _sort(t: "Tracer", eqn: Any, *xs: Any) -> Any:
    if len(xs) != 1:
        raise refuse(t.place, "it sorts by another array")
    x = t.tensor(t.full(xs[0], eqn.invars[0].aval))
    last = x.shape.rank - 1
    order = [a for a in range(x.shape.rank) if a != eqn.params["dimension"]]
    order.append(eqn.params["dimension"])
    back = [order.index(a) for a in range(last + 1)]
    x = transposed(x, order)
    size = t.size(eqn.invars[0].aval.shape[order[-1]])
    if not x.dtype.is_floating:
        return transposed(_rising(t, x, size), back)
    nan = is_nan(t, x)  # which comes last
    count = tf.reduce_sum(tf.cast(nan, tf.int32), -1, keepdims=True)
    there = t.op("Less", tf.range(size), size - count, dtype=tf.bool)
    x = _rising(t, where(t, nan, like(x, math.inf), x), size)
    return transposed(where(t, there, x, like(x, math.nan)), back)


def _rising(t: "Tracer", x: Any, size: Any) -> Any:
    """Each last axis from its least to its largest."""
    count, shape = tf.cast(tf.reshape(size, [1]), tf.int64), x.shape.as_list()
    return t.mark("TopK", [x, count], [shape, shape], largest=0)[0]


def _fill(eqn: Any) -> Any:
    """What stands for an entry that is not there."""
    value, dtype = eqn.params["fill_value"], np.dtype(eqn.outvars[0].aval.dtype)
    if value is not None or dtype.kind not in "iu":
        return value if value is not None else math.nan if dtype.kind != "b" else True
    return np.iinfo(dtype).min if dtype.kind == "i" else np.iinfo(dtype).max


def _gather(t: "Tracer", eqn: Any, x: Any, index: Any) -> Any:
    """``jnp.take`` along one axis, or a slice at a known place."""
    aval, numbers = eqn.invars[0].aval, eqn.params["dimension_numbers"]
    axes, sizes = numbers.start_index_map, eqn.params["slice_sizes"]
    rank = len(aval.shape)
    if isinstance(index, np.ndarray) and len(eqn.invars[1].aval.shape) == 1:
        places = np.broadcast_to(index, eqn.invars[1].aval.shape)
        starts = {a: int(i) for a, i in zip(axes, places, strict=True)}
        for a, i in starts.items():
            size = aval.shape[a]
            if i < 0 or (isinstance(size, int | np.integer) and i + sizes[a] > size):
                raise refuse(t.place, f"it takes the entries from {i} on of {size}")
        cuts = tuple(slice(starts[a], starts[a] + int(sizes[a])) if a in starts else slice(None)
                     for a in range(rank))  # fmt: skip
        x = t.tensor(t.full(x, aval))[cuts]
        dropped = list(numbers.collapsed_slice_dims)
        return tf.squeeze(x, dropped) if dropped else x
    plain = len(axes) == 1 and numbers.collapsed_slice_dims == axes
    plain = plain and not numbers.operand_batching_dims and sizes[axes[0]] == 1
    plain = plain and all(sizes[a] == aval.shape[a] for a in range(rank) if a != axes[0])
    if not plain:
        raise refuse(t.place, "it gathers along more than one axis")
    (axis,) = axes
    index = t.full(index, eqn.invars[1].aval)
    shape = eqn.invars[1].aval.shape[:-1]
    index = t.tensor(t.shaped(index, shape))
    # ONNX counts negative ones from the end, and fails on those that are not there.
    last = tf.cast(t.size(aval.shape[axis]) - 1, index.dtype)
    near = t.op("Max", t.op("Min", index, last), like(index, 0))
    out = tf.gather(t.tensor(t.full(x, aval)), near, axis=axis)
    if eqn.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP:
        there = t.op("Equal", index, near, dtype=tf.bool)
        there = t.shaped(there, (*shape, *(1,) * (rank - 1 - axis)))
        out = where(t, there, out, like(out, _fill(eqn)))
    count = len(eqn.invars[1].aval.shape) - 1
    # Where the axes of x stand in JAX's output, and those of the index.
    total = rank - 1 + count
    mine = [a for a in range(total) if a not in numbers.offset_dims]
    now = [*numbers.offset_dims[:axis], *mine, *numbers.offset_dims[axis:]]
    return transposed(out, [now.index(a) for a in range(total)])


def _dot(t: "Tracer", eqn: Any, a: Any, b: Any) -> Any:
    (mine, theirs), (batch, other) = eqn.params["dimension_numbers"]
    first, second = (v.aval for v in eqn.invars)
    a, b = t.full(a, first), t.full(b, second)
    dtype = dtype_of(eqn.outvars[0].aval)
    n, m = len(first.shape), len(second.shape)
    if not batch and m - len(theirs) >= 1 and tuple(mine) == tuple(range(n - len(mine), n)) and (
        tuple(theirs) == tuple(range(len(theirs)))
    ):  # fmt: skip
        # The last axes of one with the first of the other: a MatMul, whatever their number.
        inner = math.prod(first.shape[i] for i in mine)
        kept, new = first.shape[: n - len(mine)], second.shape[len(theirs) :]
        left = a if len(mine) == 1 else t.shaped(a, (*kept, inner))
        right = b if m == 2 else t.shaped(b, (inner, math.prod(new)))
        left, right = (tf.cast(t.tensor(v), dtype) for v in (left, right))
        out = tf.matmul(left, right) if len(kept) > 0 else tf.linalg.matvec(right, left, True)
        return out if len(new) == 1 else t.shaped(out, (*kept, *new))
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    names = [next(letters) for _ in range(n)]
    others: list[str] = [""] * m
    for i, j in (*zip(mine, theirs), *zip(batch, other)):
        others[j] = names[i]
    others = [x or next(letters) for x in others]
    out = [names[i] for i in batch]
    out += [names[i] for i in range(n) if i not in mine and i not in batch]
    out += [others[j] for j in range(m) if j not in theirs and j not in other]
    formula = f"{''.join(names)},{''.join(others)}->{''.join(out)}"
    return tf.einsum(formula, tf.cast(t.tensor(a), dtype), tf.cast(t.tensor(b), dtype))


def _conv(t: "Tracer", eqn: Any, x: Any, kernel: Any) -> Any:
    p, numbers = eqn.params, eqn.params["dimension_numbers"]
    bias, t.bias = t.bias, None
    if p["batch_group_count"] != 1:
        raise refuse(t.place, "a convolution with groups of the batch")
    kernel = transposed(kernel, numbers.rhs_spec)
    x = transposed(t.tensor(t.full(x, eqn.invars[0].aval)), numbers.lhs_spec)
    out = [eqn.outvars[0].aval.shape[a] for a in numbers.out_spec]
    sizes = [eqn.invars[0].aval.shape[a] for a in numbers.lhs_spec[2:]]
    window = shape_of(kernel)[2:]
    pads, spread = [tuple(map(int, q)) for q in p["padding"]], p["rhs_dilation"]
    groups = p["feature_group_count"]
    if all(d == 1 for d in p["lhs_dilation"]):
        if any(lo < 0 or hi < 0 for lo, hi in pads):
            x = padded(x, [(0, 0), (0, 0), *((min(lo, 0), min(hi, 0)) for lo, hi in pads)])
            pads = [(max(lo, 0), max(hi, 0)) for lo, hi in pads]
        (y,) = t.mark(
            "Conv", [x, kernel, bias] if bias is not None else [x, kernel], [out],
            **windows(window, p["window_strides"], pads, spread), group=groups,
        )  # fmt: skip
        return transposed(y, [numbers.out_spec.index(a) for a in range(len(out))])
    if any(s != 1 for s in p["window_strides"]):
        raise refuse(t.place, "a convolution with steps and holes")
    # JAX fills holes into the input and correlates; ONNX says it from the other end.
    turned = list(range(2, len(out)))
    if isinstance(kernel, Weight):
        kernel = kernel.moved(np.flip(kernel.value, tuple(turned)), "flip", turned)
    else:
        kernel = reversed_(kernel, turned)
    if groups == 1:
        kernel = transposed(kernel, (1, 0, *turned))
    else:  # (out, in / groups, *k) as ONNX's (in, out / groups, *k)
        share, ins = shape_of(kernel)[0] // groups, shape_of(kernel)[1]
        split = t.shaped(kernel, (groups, share, ins, *window))
        split = transposed(split, (0, 2, 1, *range(3, len(out) + 1)))
        kernel = t.shaped(split, (groups * ins, share, *window))
    steps = p["lhs_dilation"]
    own = [(d * (k - 1) - lo, d * (k - 1) - hi)
           for d, k, (lo, hi) in zip(spread, window, pads)]  # fmt: skip
    extra = [(max(-lo, 0), max(-hi, 0)) for lo, hi in own]
    own = [(max(lo, 0), max(hi, 0)) for lo, hi in own]
    bare = [s * (n - 1) + d * (k - 1) + 1 - lo - hi
            for s, n, d, k, (lo, hi) in zip(steps, sizes, spread, window, own)]  # fmt: skip
    late = any(lo or hi for lo, hi in extra)
    inputs = [x, kernel] if bias is None or late else [x, kernel, bias]
    attributes = windows(window, steps, own, spread)
    (y,) = t.mark("ConvTranspose", inputs, [[*out[:2], *bare]], **attributes, group=groups)
    y = padded(y, [(0, 0), (0, 0), *extra])
    y = transposed(y, [numbers.out_spec.index(a) for a in range(len(out))])
    return y if bias is None or not late else tf.add(y, t.tensor(bias))


def windows(window: Any, steps: Any, pads: Any, spread: Any) -> dict[str, list[int]]:
    """The attributes that ONNX's operators over windows share."""
    return {
        "kernel_shape": [int(k) for k in window],
        "strides": [int(s) for s in steps],
        "pads": [int(q[i]) for i in (0, 1) for q in pads],
        "dilations": [int(d) for d in spread],
    }


def _reduce_window(average: bool) -> Callable[..., Any]:
    def op(t: "Tracer", eqn: Any, x: Any, *start: Any) -> Any:
        p = eqn.params
        window, steps, pads = p["window_dimensions"], p["window_strides"], p["padding"]
        spread, rank = p["window_dilation"], len(window)
        if p.get("jaxpr") is not None:
            names = [e.primitive.name for e in p["jaxpr"].eqns]
            if names != ["max"]:
                raise refuse(t.place, f"it reduces windows by {names}")
            if not isinstance(start[0], np.ndarray) or np.any(start[0] != -math.inf):
                raise refuse(t.place, f"its maximum of a window starts at {start[0]}")
        edges = [window[a] != 1 or steps[a] != 1 or tuple(pads[a]) != (0, 0) for a in (0, rank - 1)]
        if any(edges) or rank < 3 or any(d != 1 for d in p["base_dilation"]):
            raise refuse(t.place, "windows over other axes than the spatial ones")
        if average and any(d != 1 for d in spread):
            raise refuse(t.place, "sums of windows with holes")
        x = t.tensor(t.full(x, eqn.invars[0].aval))
        first = (0, rank - 1, *range(1, rank - 1))
        x = transposed(x, first)
        inner = [(int(lo), int(hi)) for lo, hi in pads[1:-1]]
        wide = [(k - 1) * d for k, d in zip(window[1:-1], spread[1:-1])]
        if any(max(q) > w or min(q) < 0 for q, w in zip(inner, wide)):
            # More than ONNX allows.
            x = padded(x, [(0, 0), (0, 0), *inner], 0.0 if average else -math.inf)
            inner = [(0, 0)] * len(inner)
        shape = [eqn.outvars[0].aval.shape[a] for a in first]
        attributes: dict[str, Any] = windows(window[1:-1], steps[1:-1], inner, spread[1:-1])
        if average:
            del attributes["dilations"]
            (y,) = t.mark("AveragePool", [x], [shape], **attributes, count_include_pad=1)
            y = y * tf.constant(math.prod(window), y.dtype)
        else:
            (y,) = t.mark("MaxPool", [x], [shape], **attributes)
        return transposed(y, (0, *range(2, rank), 1))

    return op


def _scan(t: "Tracer", eqn: Any, *values: Any) -> list[Any]:
    """A loop over the first axis of what is scanned."""
    p = eqn.params
    fixed, carried = p["num_consts"], p["num_carry"]
    wide = [t.tensor(t.full(v, a.aval)) for v, a in zip(values, eqn.invars, strict=True)]
    consts, start, steps = wide[:fixed], wide[fixed : fixed + carried], wide[fixed + carried :]
    length, inner = p["length"], p["jaxpr"]
    outs = inner.out_avals[carried:]
    shapes = [
        tf.TensorShape(known_sizes(v.aval.shape)) for v in eqn.invars[fixed : fixed + carried]
    ]
    held = [tf.TensorArray(dtype_of(a), length, element_shape=known_sizes(a.shape)) for a in outs]

    def body(i: Any, state: Any, arrays: Any) -> Any:
        at = length - 1 - i if p["reverse"] else i
        given = [tf.gather(s, at) for s in steps]
        new = t.run(inner, [*consts, *state, *given])
        new = [t.tensor(t.full(v, a)) for v, a in zip(new, inner.out_avals, strict=True)]
        written = [a.write(at, v) for a, v in zip(arrays, new[carried:], strict=True)]
        return i + 1, new[:carried], written

    _, last, arrays = tf.while_loop(
        lambda i, *_: i < length, body, (tf.constant(0), start, held),
        shape_invariants=(tf.TensorShape([]), shapes, [tf.TensorShape(None)] * len(held)),
    )  # fmt: skip
    stacked = [
        tf.ensure_shape(a.stack(), known_sizes(v.aval.shape))
        for a, v in zip(arrays, eqn.outvars[carried:], strict=True)
    ]
    return [*last, *stacked]


OPS: Mapping[str, Callable[..., Any]] = {
    "div": _division("Div"), "rem": _division("Mod", fmod=1), "round": _round,
    "integer_pow": _integer_pow, "select_n": _select,
    "convert_element_type": _convert, "broadcast_in_dim": _broadcast, "reshape": _reshape,
    "transpose": _transpose, "squeeze": _squeeze, "rev": _rev, "slice": _slice,
    "concatenate": _concatenate, "stack": _stack, "split": _split, "pad": _pad,
    "reduce_sum": _reduce(tf.reduce_sum), "reduce_max": _extreme(tf.reduce_max),
    "reduce_min": _extreme(tf.reduce_min), "reduce_prod": _reduce(tf.reduce_prod),
    "reduce_and": _reduce(tf.reduce_all), "reduce_or": _reduce(tf.reduce_any),
    "argmax": _arg(tf.argmax), "argmin": _arg(tf.argmin),
    "cumsum": _cumsum, "sort": _sort, "gather": _gather,
    "dot_general": _dot, "conv_general_dilated": _conv,
    "reduce_window_sum": _reduce_window(average=True),
    "reduce_window_max": _reduce_window(average=False),
    "reduce_window": _reduce_window(average=False), "scan": _scan,
}  # fmt: skip
