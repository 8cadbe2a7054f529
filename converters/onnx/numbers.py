"""One node of an ONNX graph, and what comes of numbers alone.

Exporters write weights as nodes too: filled by ConstantOfShape, cast, joined, or widened. An array
whose entries repeat is kept as a view that takes no room.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fwt.converters.rows.row import refuse

if TYPE_CHECKING:
    from fwt.converters.onnx.graph import Graph

# What is computed from numbers alone may not grow beyond what files of models hold of it.
MOST_FOLDED = 1 << 24
MOST_FILLED = 1 << 31  # bytes of what repeats: as many as an ONNX file can have
ZEROS = object()  # an array of zeros of any shape, such as the first state of an LSTM


@dataclasses.dataclass
class Node:
    """One operator, its attributes as Python values."""

    op: str
    name: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, Any]
    taken: set[Any] = dataclasses.field(default_factory=set)  # what was asked for, see check

    def __str__(self) -> str:
        return f"{self.name or self.outputs[0]} ({self.op})"

    def __call__(self, name: str, default: Any = None) -> Any:
        self.taken.add(name)
        return self.attributes.get(name, default)


def axes_of(graph: "Graph", node: Node, index: int = 1) -> list[int] | None:
    """The axes of an operator, which newer versions have as an input."""
    value = node("axes")
    if value is None:
        value = graph.const(node, index)
    if value is None:
        return None
    return [int(a) for a in np.ravel(np.asarray(value))]


def slices_of(graph: "Graph", node: Node, rank: int) -> list[slice]:
    starts, ends = (node(n) for n in ("starts", "ends"))
    if starts is None:
        starts, ends = (np.ravel(graph.const(node, i)).tolist() for i in (1, 2))
    axes = node("axes") if node("starts") is not None else graph.const(node, 3)
    steps = graph.const(node, 4) if node("starts") is None else None
    axes = range(len(starts)) if axes is None else np.ravel(axes).tolist()
    steps = [1] * len(starts) if steps is None else np.ravel(steps).tolist()
    out = [slice(None)] * rank
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if not -rank <= axis < rank or step == 0:
            raise refuse(str(node), f"it slices axis {axis} by {step}")
        # What exporters write for the end.
        stop = None if (end >= 10**9 and step > 0) or (end <= -(10**9) and step < 0) else end
        whole = start == 0 and stop is None and step == 1
        out[axis] = slice(None) if whole else slice(start, stop, step)
    return out


# -- numbers ---------------------------------------------------------------------------------------


def owned(x: Any) -> int:
    """The bytes that an array takes, without those along axes where it repeats itself."""
    return int(x.itemsize * math.prod(n for n, s in zip(x.shape, x.strides, strict=True) if s))


def _base(x: Any) -> Any:
    """An array without what repeats: axes along which it does have one entry."""
    return x[tuple(slice(None) if s or n < 2 else slice(0, 1)
                   for n, s in zip(x.shape, x.strides, strict=True))]  # fmt: skip


def _filled(node: Node, x: Any, shape: Any) -> Any:
    """An array repeated to a shape, as a view."""
    sizes = tuple(int(s) for s in shape)
    if len(sizes) > 32 or math.prod(sizes) * x.itemsize > MOST_FILLED:
        raise refuse(str(node), f"it fills {list(sizes)} with numbers, more than a file can have")
    return np.broadcast_to(x, sizes)


def folded(graph: "Graph", node: Node, given: list[Any]) -> list[Any] | None:
    """What a node makes of numbers alone, an array for each output; None where that is not known
    or too large."""
    if any(g is ZEROS for g in given):
        moves = ("Expand", "Reshape", "Unsqueeze", "Squeeze", "Slice", "Concat", "Identity", "Cast",
                 "Transpose", "Split", "Gather")  # fmt: skip
        data = given if node.op == "Concat" else given[:1]
        moved = node.op in moves and all(g is ZEROS for g in data)
        return [ZEROS] * len(node.outputs) if moved else None
    if node.op in POINTWISE or node.op in _ALONE:
        out = _of_each(node, given)
    elif node.op in _FOLDS:
        out = _FOLDS[node.op](graph, node, *given)
    else:
        return None
    return out if isinstance(out, list) or out is None else [out]


def _of_each(node: Node, given: list[Any]) -> Any:
    if node.op == "Erf" and np.size(given[0]) > 1 << 16:
        return None
    bases = [None if g is None else _base(g) for g in given]
    arrays = [b for b in bases if b is not None]
    size = math.prod(np.broadcast_shapes(*(b.shape for b in arrays)))
    if size > max(MOST_FOLDED, *(b.size for b in arrays)):
        return None
    with np.errstate(all="ignore"):
        out = np.asarray((POINTWISE.get(node.op) or _ALONE[node.op])(node, *bases))
    if out.dtype == np.float64 and all(b.dtype != np.float64 for b in arrays):
        out = out.astype(np.result_type(*arrays), copy=False)
    shape = np.broadcast_shapes(*(g.shape for g in given if g is not None))
    return out if out.shape == shape else _filled(node, out, shape)


def _constant_of_shape(graph: "Graph", node: Node, x: Any) -> Any:
    value = node("value")
    value = np.zeros(1, np.float32) if value is None else np.asarray(value)
    if np.any(x < 0):  # the batch's size among them
        return None if np.any(value) else ZEROS
    return _filled(node, value.reshape(-1)[0], x)


def _expand(graph: "Graph", node: Node, x: Any, shape: Any) -> Any:
    if np.any(shape < 0):
        return None if np.any(_base(x)) else ZEROS
    return _filled(node, x, np.broadcast_shapes(x.shape, tuple(map(int, shape))))


def _fold_cast(graph: "Graph", node: Node, x: Any) -> Any:
    import onnx

    dtype: Any = onnx.helper.tensor_dtype_to_np_dtype(node("to"))
    if node("to") > onnx.TensorProto.BFLOAT16:  # 8 bits and fewer saturate and round in other ways
        raise refuse(str(node), f"a Cast of numbers to {dtype}")
    new = _base(x).astype(dtype)
    return np.broadcast_to(new, x.shape)


def _fold_reshape(graph: "Graph", node: Node, x: Any, target: Any) -> Any:
    zero = not node("allowzero", 0)
    shape = [x.shape[i] if s == 0 and zero and i < x.ndim else int(s)
             for i, s in enumerate(target)]  # fmt: skip
    return (
        x.reshape(shape) if owned(x) in (x.itemsize, x.nbytes) or x.nbytes <= graph.left else None
    )


def _fold_unsqueeze(graph: "Graph", node: Node, x: Any, *_: Any) -> Any:
    axes = axes_of(graph, node) or []
    return np.expand_dims(x, tuple(a % (x.ndim + len(axes)) for a in axes))


def _fold_squeeze(graph: "Graph", node: Node, x: Any, *_: Any) -> Any:
    axes = axes_of(graph, node)
    return np.squeeze(x, None if axes is None else tuple(axes))


def _fold_concat(graph: "Graph", node: Node, *given: Any) -> Any:
    fits = sum(g.nbytes for g in given) <= graph.left
    return np.concatenate(given, node("axis")) if fits else None


def _fold_gather(graph: "Graph", node: Node, x: Any, index: Any) -> Any:
    axis = node("axis", 0)
    size = x.size // max(x.shape[axis], 1) * np.size(index)
    small = np.size(index) <= 1 << 16 and size <= max(MOST_FOLDED, owned(x) // x.itemsize)
    return np.take(x, index, axis) if small else None


def _fold_range(graph: "Graph", node: Node, *given: Any) -> Any:
    first, end, step = (np.ravel(g)[0] for g in given)
    if any(np.size(g) != 1 for g in given) or not step or not (end - first) / step < 1 << 12:
        return None
    return np.arange(first, end, step)


def _fold_split(graph: "Graph", node: Node, x: Any, sizes: Any = None) -> list[Any]:
    axis, count = node("axis", 0), node("num_outputs") or len(node.outputs)
    given = node("split") if sizes is None else sizes
    each = -(-x.shape[axis] // count)
    ends = each * np.arange(1, count) if given is None else np.cumsum(given)[:-1]
    return np.split(x, [int(e) for e in ends], axis)


def _fold_tile(graph: "Graph", node: Node, x: Any, times: Any) -> Any:
    size = x.nbytes * math.prod(map(int, times))
    return np.tile(x, tuple(map(int, times))) if 0 <= size <= graph.left else None


def _eye_like(graph: "Graph", node: Node, x: Any) -> Any:
    import onnx

    kind = node("dtype")
    dtype: Any = x.dtype if kind is None else onnx.helper.tensor_dtype_to_np_dtype(kind)
    size = math.prod(x.shape) * np.dtype(dtype).itemsize
    rows, columns = x.shape
    return np.eye(rows, columns, k=node("k", 0), dtype=dtype) if size <= graph.left else None


def _trilu(graph: "Graph", node: Node, x: Any, k: Any = 0) -> Any:
    keep = np.triu if node("upper", 1) else np.tril
    return keep(x, int(np.ravel(k)[0])) if x.nbytes <= graph.left else None


def _fold_matmul(graph: "Graph", node: Node, a: Any, b: Any) -> Any:
    if min(a.ndim, b.ndim) < 2 or max(a.ndim, b.ndim) > 2 or a.dtype.kind != "f":
        return None
    size = len(a) * b.shape[1]
    fits = a.nbytes + b.nbytes + size * a.itemsize <= graph.left and size * len(b) <= 1 << 33
    return np.ascontiguousarray(a) @ np.ascontiguousarray(b) if fits else None


def _fold_reduce(function: Callable[..., Any]) -> Callable[..., Any]:
    def fold(graph: "Graph", node: Node, x: Any, *_: Any) -> Any:
        axes = axes_of(graph, node)
        if not axes and node("noop_with_empty_axes", 0):
            return x
        if x.nbytes > graph.left:
            return None
        keeps = bool(node("keepdims", 1))
        out = function(x, axis=tuple(axes) if axes else None, keepdims=keeps)
        return np.asarray(out).astype(x.dtype, copy=False)

    return fold


_FOLDS: Mapping[str, Callable[..., Any]] = {
    "ConstantOfShape": _constant_of_shape, "Expand": _expand, "Cast": _fold_cast,
    "Transpose": lambda g, n, x: np.transpose(x, n("perm")),
    "Reshape": _fold_reshape, "Unsqueeze": _fold_unsqueeze, "Squeeze": _fold_squeeze,
    "Flatten": lambda g, n, x: _fold_reshape(
        g, n, x, [math.prod(x.shape[: n("axis", 1)]), -1]) if x.size else None,
    "Concat": _fold_concat, "Gather": _fold_gather, "Range": _fold_range,
    "Size": lambda g, n, x: np.array(np.size(x), np.int64),
    "Slice": lambda g, n, x, *_: x[tuple(slices_of(g, n, x.ndim))],
    "Split": _fold_split, "Tile": _fold_tile, "EyeLike": _eye_like, "Trilu": _trilu,
    "MatMul": _fold_matmul,
    "ReduceSum": _fold_reduce(np.sum), "ReduceMean": _fold_reduce(np.mean),
    "ReduceMax": _fold_reduce(np.max), "ReduceMin": _fold_reduce(np.min),
    "ReduceProd": _fold_reduce(np.prod),
    "ReduceL2": _fold_reduce(lambda x, **how: np.sqrt(np.sum(np.square(x), **how))),
    "ReduceSumSquare": _fold_reduce(lambda x, **how: np.sum(np.square(x), **how)),
}  # fmt: skip
# Functions of each entry that no layer is told by.
_ALONE: Mapping[str, Callable[..., Any]] = {
    "Sin": lambda n, x: np.sin(x), "Cos": lambda n, x: np.cos(x),
    "Floor": lambda n, x: np.floor(x), "Ceil": lambda n, x: np.ceil(x),
}  # fmt: skip
# What may be done with the batch's size: no arithmetic.
MOVES = ("Cast", "Gather", "Slice", "Concat", "Unsqueeze", "Squeeze", "Reshape", "Identity",
          "Expand", "ConstantOfShape", "Size")  # fmt: skip


def _erf(x: Any) -> Any:
    return np.vectorize(math.erf, otypes=[float])(x)


def _divided(a: Any, b: Any) -> Any:
    """Whole numbers are cut towards zero."""
    if np.issubdtype(np.result_type(a, b), np.floating):
        return a / b
    whole = a // b
    return whole + ((a - whole * b != 0) & ((a < 0) != (b < 0))).astype(whole.dtype)


def _power(a: Any, b: Any) -> Any:
    """In the dtype of the base."""
    a, b = np.asarray(a), np.asarray(b)
    exact = np.issubdtype(a.dtype, np.floating) or (b.dtype.kind in "iu" and np.all(b >= 0))
    return (np.power(a, b) if exact else np.power(a.astype(np.float64), b)).astype(a.dtype)


# One value for each value; they tell what a block of such nodes is, and fold numbers.
POINTWISE: Mapping[str, Callable[..., Any]] = {
    "Identity": lambda n, x: x,
    "Add": lambda n, a, b: a + b,
    "Sub": lambda n, a, b: a - b,
    "Mul": lambda n, a, b: a * b,
    "Div": lambda n, a, b: _divided(a, b),
    "Pow": lambda n, a, b: _power(a, b),
    "Mod": lambda n, a, b: (np.fmod if n("fmod", 0) else np.mod)(a, b),
    "Neg": lambda n, x: -x,
    "Abs": lambda n, x: np.abs(x),
    "Sqrt": lambda n, x: np.sqrt(x),
    "Reciprocal": lambda n, x: 1 / x,
    "Exp": lambda n, x: np.exp(x),
    "Log": lambda n, x: np.log(x),
    "Erf": lambda n, x: _erf(x),
    "Tanh": lambda n, x: np.tanh(x),
    "Sigmoid": lambda n, x: np.where(x >= 0, 1 / (1 + np.exp(-np.abs(x))),
                                     np.exp(-np.abs(x)) / (1 + np.exp(-np.abs(x)))),
    "Softplus": lambda n, x: np.logaddexp(x, 0),
    "Relu": lambda n, x: np.maximum(x, 0),
    "Max": lambda n, *xs: functools.reduce(np.maximum, xs),
    "Min": lambda n, *xs: functools.reduce(np.minimum, xs),
    "Clip": lambda n, x, lo=None, hi=None: np.clip(
        x, n("min", -np.inf) if lo is None else lo, n("max", np.inf) if hi is None else hi),
    "Greater": lambda n, a, b: a > b,
    "GreaterOrEqual": lambda n, a, b: a >= b,
    "Less": lambda n, a, b: a < b,
    "LessOrEqual": lambda n, a, b: a <= b,
    "Equal": lambda n, a, b: a == b,
    "Not": lambda n, x: np.logical_not(x),
    "And": lambda n, a, b: np.logical_and(a, b),
    "Or": lambda n, a, b: np.logical_or(a, b),
    "Where": lambda n, c, a, b: np.where(c, a, b),
    "Elu": lambda n, x: np.where(x > 0, x, n("alpha", 1.0) * np.expm1(np.minimum(x, 0))),
    "LeakyRelu": lambda n, x: np.where(x >= 0, x, n("alpha", 0.01) * x),
    "HardSigmoid": lambda n, x: np.clip(n("alpha", 0.2) * x + n("beta", 0.5), 0, 1),
    "Softsign": lambda n, x: x / (1 + np.abs(x)),
    "Sign": lambda n, x: np.sign(x),
}  # fmt: skip
