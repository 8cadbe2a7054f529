"""ONNX's operators that are functions: of each entry, along axes, or nothing at inference."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from fwt.converters.onnx.numbers import Node, axes_of
from fwt.converters.onnx.reader import Handler, Reader, array, one_axis
from fwt.converters.rows.row import refuse


def _function(kind: str, **names: tuple[str, Any]) -> Callable[[Reader, Node], None]:
    """An activation; ``names`` are its settings, with ONNX's name and default."""

    def op(reader: Reader, node: Node) -> None:
        reader.only(node)
        settings = {k: node(name, default) for k, (name, default) in names.items()}
        reader.add(reader.name(node), kind, **settings)

    return op


def _softmax(kind: str) -> Callable[[Reader, Node], None]:
    def op(reader: Reader, node: Node) -> None:
        reader.only(node)
        rank = reader.rank(node)
        axis = node("axis", -1 if reader.graph.opset >= 13 else 1) % rank
        flat = reader.graph.opset < 13 and axis != rank - 1  # it works on all axes from there on
        if flat and axis == 0:
            raise refuse(str(node), "before opset 13 it works on all axes from 0 on, the batch too")
        name, sizes = reader.name(node), reader.shape(node)[axis:] if flat else ()
        if flat:
            reader.add(f"{name}__flatten", "Flatten", start_dim=axis, end_dim=-1)
        reader.add(name, kind, dim=axis)
        if flat:
            reader.add(f"{name}__shape", "Unflatten", dim=axis, unflattened_size=tuple(sizes))

    return op


def _clip(reader: Reader, node: Node) -> None:
    reader.only(node)
    low, high = node("min"), node("max")
    if low is None and high is None:
        ends = [reader.graph.const(node, 1), reader.graph.const(node, 2)]
        if any(v is not None and np.size(v) != 1 for v in ends):
            raise refuse(str(node), "its ends are arrays: only one number each")
        low, high = (None if v is None else float(np.ravel(v)[0]) for v in ends)
    low, high = (None if v is None or abs(v) > 3e38 else v for v in (low, high))
    between(reader, node, low, high)


def between(reader: Reader, node: Node, low: float | None, high: float | None) -> None:
    """Adds what keeps the line between two numbers, of which one may be missing."""
    name = reader.name(node)
    if (low, high) == (0, 6):
        reader.add(name, "ReLU6")
    elif (low, high) == (0, None):
        reader.add(name, "ReLU")
    elif low is not None and high is not None:
        reader.add(name, "Hardtanh", min_val=low, max_val=high)
    elif low is not None:
        reader.add(name, "Threshold", threshold=low, value=low)
    elif high is not None:
        reader.add(f"{name}__negative", "Rescaling", scale=-1.0, offset=0.0)
        reader.add(name, "Threshold", threshold=-high, value=-high)
        reader.add(f"{name}__back", "Rescaling", scale=-1.0, offset=0.0)


def _extreme(reader: Reader, node: Node) -> None:
    """The larger or smaller of the line and a number."""
    values = [n for n in node.inputs if n != reader.at]
    if len(node.inputs) - len(values) != 1:
        raise refuse(str(node), f"the value {reader.at!r} is not one of its inputs")
    if not values:
        return
    if len(values) > 1:
        raise refuse(str(node), f"it compares {len(node.inputs)} values")
    value = array(reader, node, node.inputs.index(values[0]))
    if value.size != 1 or value.ndim > reader.rank(node):
        raise refuse(str(node), f"an array of shape {value.shape}: only with one number")
    number = float(value.reshape(-1)[0])
    largest = node.op == "Max"
    between(reader, node, number if largest else None, None if largest else number)


def _hard_sigmoid(reader: Reader, node: Node) -> None:
    reader.only(node)
    alpha, beta = node("alpha", 0.2), node("beta", 0.5)
    name = reader.name(node)
    if abs(alpha - 1 / 6) < 1e-7 and beta == 0.5:
        reader.add(name, "Hardsigmoid")
        return
    reader.add(f"{name}__line", "Rescaling", scale=alpha, offset=beta)
    reader.add(name, "Hardtanh", min_val=0.0, max_val=1.0)


def _gelu(reader: Reader, node: Node) -> None:
    reader.only(node)
    reader.add(reader.name(node), "GELU", approximate=node("approximate", "none"))


def _shrink(reader: Reader, node: Node) -> None:
    reader.only(node)
    lambd, bias = node("lambd", 0.5), node("bias", 0.0)
    if bias not in (0.0, lambd) or not lambd >= 0:
        raise refuse(str(node), f"lambd={lambd}, bias={bias}: only bias=0 or bias=lambd, from 0 on")
    reader.add(reader.name(node), "Softshrink" if bias else "Hardshrink", lambd=lambd)


def _prelu(reader: Reader, node: Node) -> None:
    reader.only(node)
    slope, rank = array(reader, node, 1), reader.rank(node)
    axis = one_axis(node, slope, rank)
    name = reader.name(node, node.inputs[1])

    def add() -> None:
        reader.add(name, "PReLU", {"weight": slope.reshape(-1)}, num_parameters=slope.size,
                   init=0.25)  # fmt: skip

    reader.with_second(axis or 1, rank, name, add)


def _neg(reader: Reader, node: Node) -> None:
    reader.only(node)
    reader.add(reader.name(node), "Rescaling", scale=-1.0, offset=0.0)


def _swish(reader: Reader, node: Node) -> None:
    reader.only(node)
    if node("alpha", 1.0) != 1:
        raise refuse(str(node), f"alpha={node('alpha')}: only 1")
    reader.add(reader.name(node), "SiLU")


def _dropout(reader: Reader, node: Node) -> None:
    reader.only(node)
    node("ratio"), node("seed")
    reader.graph.const(node, 1)
    training = reader.graph.const(node, 2)
    if node("is_test", 1) == 0 or (training is not None and bool(np.any(training))):
        raise refuse(str(node), "training_mode: it drops at inference too")


def _selu(reader: Reader, node: Node) -> None:
    reader.only(node)
    alpha, gamma = node("alpha", 1.6732632), node("gamma", 1.050701)
    name = reader.name(node)
    if abs(alpha - 1.6732632) < 1e-5 and abs(gamma - 1.050701) < 1e-5:
        reader.add(name, "SELU")
        return
    reader.add(f"{name}__elu", "ELU", alpha=alpha)
    reader.add(name, "Rescaling", scale=gamma, offset=0.0)


def _cast(reader: Reader, node: Node) -> None:
    reader.only(node)
    import onnx

    node("saturate")
    is_input = reader.tip in reader.graph.inputs
    start = reader.graph.dtypes.get(reader.at, onnx.TensorProto.FLOAT)
    kinds = reader.graph.types.get(node.inputs[0], start), node("to")
    given, there = (np.dtype(onnx.helper.tensor_dtype_to_np_dtype(k)) for k in kinds)
    whole = given.kind in "iu"
    # What JAX has in their place: int32 for int64, if not told otherwise.
    ours = [jax.dtypes.canonicalize_dtype(d) for d in (given, there)]
    fits = np.can_cast(given, there) or (whole and ours[0] == ours[1])
    if whole and there == np.float32:
        # One times a whole number is a floating one.
        reader.add(reader.name(node), "Rescaling", scale=1.0, offset=0.0)
        return
    if not is_input:
        same = there == np.float32 and (fits or whole)
    else:
        same = fits and (there == np.float32 if given.kind == "f" else given.kind == there.kind)
    if not same or there.kind not in "if":
        raise refuse(str(node), f"a Cast of {given} to {there}: only to what holds all its numbers")
    if ours[0] != ours[1]:
        reader.widened = node


def _pointwise(*functions: str) -> Handler:
    def op(reader: Reader, node: Node) -> None:
        reader.only(node)
        _each(reader, functions, reader.name(node))

    return op


def _each(reader: Reader, functions: Sequence[str], name: str) -> None:
    for function in functions:
        reader.add(f"{name}__{function}", "Pointwise", function=function)


def _power(reader: Reader, node: Node) -> None:
    """Some powers. That of 0.5 is the square root, which differs at -inf and -0 (see from_onnx)."""
    reader.only(node)
    value = array(reader, node, 1)
    number = float(value.reshape(-1)[0]) if value.size == 1 else math.nan
    functions: Mapping[float, tuple[str, ...]]
    functions = {1.0: (), 2.0: ("square",), 0.5: ("sqrt",), -1.0: ("reciprocal",),
                 4.0: ("square", "square"), -2.0: ("square", "reciprocal")}  # fmt: skip
    whole = number < 1 and not reader.graph.has_floats(reader.at)
    if number not in functions or value.ndim > reader.rank(node) or whole:
        raise refuse(str(node), f"the power {number}: only {', '.join(map(str, functions))}")
    _each(reader, functions[number], reader.name(node))


# -- along axes ------------------------------------------------------------------------------------


def _reduce(
    function: str, before: Sequence[str] = (), after: Sequence[str] = (), pool: str = ""
) -> Handler:
    """What is left of some axes: a pool where these are all but one, in an image."""

    def op(reader: Reader, node: Node) -> None:
        reader.only(node)
        rank = reader.rank(node)
        if node.op in ("ReduceMax", "ReduceMin"):
            reader.shape(node)  # of no entries there is no largest
        keeps = bool(node("keepdims", 1))
        given = axes_of(reader.graph, node)
        nothing = bool(node("noop_with_empty_axes", 0))
        if not given and not nothing:
            raise refuse(str(node), "it reduces the batch too")
        axes = sorted({a % rank for a in given or ()})
        if 0 in axes:
            raise refuse(str(node), "it reduces the batch too")
        name = reader.name(node)
        left = [a for a in range(1, rank) if a not in axes]
        if pool and len(left) == 1 and rank in (3, 4, 5):
            _pooled(reader, pool, axes, left[0], keeps, name)
            return
        _each(reader, before, name)
        for axis in axes:
            reader.add(f"{name}__{axis}", "Reduce", function=function, dim=axis)
        _each(reader, after, name)
        if not keeps and axes:
            if rank > 2:
                reader.add(f"{name}__flatten", "Flatten", start_dim=1, end_dim=-1)
            if not left:
                reader.end(node.outputs[0], ((0, 1),), (None, 1))
            if len(left) > 1:
                shape = reader.shape(node)
                new = tuple(shape[a] for a in left)
                reader.add(f"{name}__shape", "Unflatten", dim=1, unflattened_size=new)

    return op


def _pooled(
    reader: Reader, kind: str, axes: Sequence[int], left: int, keeps: bool, name: str
) -> None:
    there = (0, left, *axes)
    rank = len(there)
    reader.permute(there, f"{name}__there")
    reader.add(name, f"Adaptive{kind}Pool{rank - 2}d", output_size=(1,) * (rank - 2),
               **({"return_indices": False} if kind == "Max" else {}))  # fmt: skip
    if keeps:
        reader.permute([there.index(a) for a in range(rank)], f"{name}__back")
    else:
        reader.add(f"{name}__flatten", "Flatten", start_dim=1, end_dim=-1)


OPS: Mapping[str, Handler] = {
    "Relu": _function("ReLU"), "Sigmoid": _function("Sigmoid"),
    "Tanh": _function("Tanh"), "LeakyRelu": _function("LeakyReLU", negative_slope=("alpha", 0.01)),
    "Elu": _function("ELU", alpha=("alpha", 1.0)), "Celu": _function("CELU", alpha=("alpha", 1.0)),
    "Selu": _selu, "Softsign": _function("Softsign"), "Mish": _function("Mish"),
    "Softplus": _function("Softplus", beta=("", 1.0), threshold=("", 20.0)),
    "HardSwish": _function("Hardswish"),
    "ThresholdedRelu": _function("Threshold", threshold=("alpha", 1.0), value=("", 0.0)),
    "HardSigmoid": _hard_sigmoid, "Gelu": _gelu, "Shrink": _shrink, "PRelu": _prelu,
    "Clip": _clip, "Max": _extreme, "Min": _extreme, "Pow": _power,
    "Softmax": _softmax("Softmax"), "LogSoftmax": _softmax("LogSoftmax"),
    "Swish": _swish, "Dropout": _dropout, "Cast": _cast, "Neg": _neg,
    **{f.capitalize(): _pointwise(f) for f in (
        "abs", "acos", "acosh", "asin", "asinh", "atan", "atanh", "ceil", "cos", "cosh", "erf",
        "exp", "floor", "log", "reciprocal", "round", "sign", "sin", "sinh", "sqrt", "tan")},
    "ReduceSum": _reduce("sum"), "ReduceMean": _reduce("mean", pool="Avg"),
    "ReduceMax": _reduce("max", pool="Max"), "ReduceMin": _reduce("min"),
    "ReduceProd": _reduce("prod"), "ReduceL1": _reduce("sum", before=("abs",)),
    "ReduceL2": _reduce("sum", before=("square",), after=("sqrt",)),
    "ReduceSumSquare": _reduce("sum", before=("square",)),
    "ReduceLogSum": _reduce("sum", after=("log",)), "ReduceLogSumExp": _reduce("logsumexp"),
}  # fmt: skip
# What does the same to each entry, whatever the order of axes.
EACH = frozenset(
    [
        "Relu",
        "Sigmoid",
        "Tanh",
        "LeakyRelu",
        "Elu",
        "Celu",
        "Selu",
        "Softsign",
        "Mish",
        "Softplus",
        "HardSwish",
        "ThresholdedRelu",
        "HardSigmoid",
        "Gelu",
        "Shrink",
        "Clip",
        "Swish",
        "Dropout",
        "Cast",
        "Neg",
        "Pow",
        "Abs",
        "Sqrt",
        "Exp",
        "Log",
        "Erf",
        "Reciprocal",
        "Sin",
        "Cos",
    ]
)
