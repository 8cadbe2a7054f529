"""Several of ONNX's nodes that are one layer: told by their values."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fwt._types import ConversionError
from fwt.converters.onnx.graph import Graph
from fwt.converters.onnx.numbers import POINTWISE, ZEROS, Node, axes_of, slices_of
from fwt.converters.onnx.reader import Reader
from fwt.converters.onnx.weights import add_group_norm, add_layer_norm
from fwt.converters.rows.padding import pairs_in


def _sigmoid(x: Any) -> Any:
    return POINTWISE["Sigmoid"](None, x)


# Functions of one number, told by their values; ``c`` is one of the numbers in the block,
# ``v`` what very small numbers become.
_FUNCTIONS: tuple[tuple[str, Callable[..., Any], Callable[..., dict[str, Any]]], ...]
_FUNCTIONS = (
    ("GELU", lambda x, c, v: x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
     lambda c, v: {"approximate": "none"}),
    ("GELU", lambda x, c, v: 0.5 * x * (1 + np.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3))),
     lambda c, v: {"approximate": "tanh"}),
    ("SiLU", lambda x, c, v: x * _sigmoid(x), lambda c, v: {}),
    ("Mish", lambda x, c, v: x * np.tanh(np.logaddexp(x, 0)), lambda c, v: {}),
    ("Hardswish", lambda x, c, v: x * np.clip(x + 3, 0, 6) / 6, lambda c, v: {}),
    ("Hardsigmoid", lambda x, c, v: np.clip(x + 3, 0, 6) / 6, lambda c, v: {}),
    ("LogSigmoid", lambda x, c, v: -np.logaddexp(-x, 0), lambda c, v: {}),
    ("Tanhshrink", lambda x, c, v: x - np.tanh(x), lambda c, v: {}),
    ("Softsign", lambda x, c, v: x / (1 + np.abs(x)), lambda c, v: {}),
    ("ReLU", lambda x, c, v: np.maximum(x, 0), lambda c, v: {}),
    ("ReLU6", lambda x, c, v: np.clip(x, 0, 6), lambda c, v: {}),
    ("SELU", lambda x, c, v: 1.0507009873554805 * np.where(
        x > 0, x, 1.6732632423543772 * np.expm1(np.minimum(x, 0))), lambda c, v: {}),
    ("Softplus", lambda x, c, v: np.logaddexp(c * x, 0) / c,
     lambda c, v: {"beta": c, "threshold": 20.0}),
    ("ELU", lambda x, c, v: np.where(x > 0, x, c * np.expm1(np.minimum(x, 0))),
     lambda c, v: {"alpha": c}),
    ("CELU", lambda x, c, v: np.where(x > 0, x, c * np.expm1(np.minimum(x, 0) / c)),
     lambda c, v: {"alpha": c}),
    ("Hardshrink", lambda x, c, v: np.where(np.abs(x) <= c, 0, x), lambda c, v: {"lambd": c}),
    ("Softshrink", lambda x, c, v: np.sign(x) * np.maximum(np.abs(x) - c, 0),
     lambda c, v: {"lambd": c}),
    ("Threshold", lambda x, c, v: np.where(x <= c, v, x),
     lambda c, v: {"threshold": c, "value": v}),
    ("LeakyReLU", lambda x, c, v: np.where(x >= 0, x, c * x), lambda c, v: {"negative_slope": c}),
)  # fmt: skip
_POINTS = np.concatenate([np.linspace(-12.0037, 12.0011, 2401), np.linspace(-30, 30, 61),
                          [-1e3, 1e3, 0.0, 1e-3, -1e-3]])  # fmt: skip
_FAR = np.array([s * v for s in (1, -1) for v in (20, 50, 88, 89, 104, 1e3, 1e5, 1e13, 1e20, 1e37,
                                                 np.inf)], np.float32)  # fmt: skip
_LARGEST = 1 << 22  # values of one input that a norm is tried with
_LONGEST = 16  # blocks that make up one function


def _points(numbers: list[float]) -> np.ndarray:
    """Where a function is looked at: everywhere, and on both sides of each of its numbers."""
    near = [s * c for c in numbers for s in (1, -1, 2, -2, 1 + 1e-6, 1 - 1e-6)]
    near += [np.nextafter(c, end) for c in numbers for end in (np.inf, -np.inf)]
    near += [(a + b) / 2 for a in numbers for b in numbers]
    return np.concatenate([near, [-1e30, 1e30, 1e6, -1e6], _POINTS])


def _is_pointwise(graph: Graph, block: list[Node]) -> bool:
    numbers = [graph.known[n] for node in block for n in node.inputs if n in graph.known]
    return all(n.op in POINTWISE or n.op == "Cast" for n in block) and all(
        v is not ZEROS and np.size(v) == 1 for v in numbers
    )


def read(reader: Reader, node: Node, plain: bool) -> str | None:
    """The end of the nodes from this one on that together are one layer; None if there are none.
    A value that is not ``plain`` may only go through functions of each entry."""
    runs = [r for r in reader.graph.regions(reader.at, node) if len(r[0]) > 1]
    along = (_softmax_of, _norm_of, _glu_of, _index_of, _wrapped) if plain else ()
    for part in (_function_of, *along):
        if runs and (found := part(reader, runs)) is not None:
            nodes, end = found
            reader.done |= {id(n) for n in nodes}
            return end
    return None


Run = tuple[list[Node], str]


def _function_of(reader: Reader, runs: list[Run]) -> Run | None:
    """The longest run that is one activation."""
    graph = reader.graph
    for nodes, last in reversed([r for r in runs if _is_pointwise(graph, r[0])][:_LONGEST]):
        numbers = [float(np.ravel(graph.known[n])[0]) for node in nodes for n in node.inputs
                   if n in graph.known]  # fmt: skip
        numbers += [float(v) for n in nodes for v in n.attributes.values()
                    if isinstance(v, float)]  # fmt: skip
        numbers = [c for c in numbers if math.isfinite(c)]
        points = _points(numbers)
        y = _evaluated(reader, nodes, last, points)
        far = _evaluated(reader, nodes, last, _FAR, np.float32)
        options = list(dict.fromkeys([1.0, *numbers, *(abs(c) for c in numbers)]))
        below, above = float(y[-5]), float(y[-4])  # what very small and very large numbers become
        for kind, function, settings in _FUNCTIONS:
            for c in options if settings(0.5, 0) != settings(0.25, 0) else [1.0]:
                if _is(function, c, below, points, y, far):
                    told = settings(_short(c), _short(below))
                    reader.add(reader.name(nodes[-1]), kind, **told)
                    return nodes, last
        if below < above and _is(lambda x, c, v: np.clip(x, v, c), above, below, points, y, far):
            reader.add(reader.name(nodes[-1]), "Hardtanh", min_val=_short(below),
                       max_val=_short(above))  # fmt: skip
            return nodes, last
    return None


def _is(
    function: Callable[..., Any], c: float, below: float, points: Any, y: Any, far: Any
) -> bool:
    """Whether nodes with the values ``y`` at points are a function, and where float32 ends too: a
    logarithm of 1 + exp(x) is infinite from 89 on, and Softplus never."""
    with np.errstate(all="ignore"):
        wanted, there = function(points, c, below), function(_FAR.astype(float), c, below)
        there = there.astype(np.float32)
    here = np.isfinite(far) & np.isfinite(there)
    return (
        np.allclose(y, wanted, rtol=3e-6, atol=1e-9, equal_nan=True)
        and np.allclose(far[here], there[here], rtol=1e-5, atol=1e-5)
        and np.array_equal(far[~here], there[~here], equal_nan=True)
    )


def _short(c: float) -> float:
    """A float32 as the shortest number that rounds to it."""
    return float(str(np.float32(c)))


def _index_of(reader: Reader, runs: list[Run]) -> Run | None:
    """An index that counts from the end where it is negative: nothing to any other."""
    for nodes, end in runs:
        users = reader.graph.users.get(end, [])
        if len(users) != 1 or users[0].op != "Gather":
            continue
        table = reader.graph.known.get(users[0].inputs[0])
        pointwise = all(n.op in POINTWISE or n.op == "Cast" for n in nodes)
        if pointwise and table is not None and np.ndim(table) == 2:
            count = np.arange(table.shape[0])
            if np.array_equal(_evaluated(reader, nodes, end, count), count):
                return nodes, end
    return None


def _glu_of(reader: Reader, runs: list[Run]) -> Run | None:
    for nodes, end in runs:
        if _is_glu(reader, nodes):
            split = nodes[0]
            reader.add(reader.name(nodes[-1]), "GLU", dim=split("axis", 0) % reader.rank(split))
            return nodes, end
    return None


def _norm_of(reader: Reader, runs: list[Run]) -> Run | None:
    """A norm, whose scale and bias may be among what follows."""
    for nodes, end in runs:
        rooted = any(n.op in ("Sqrt", "Pow", "Reciprocal") for n in nodes)
        likely = _means(nodes) and rooted and nodes[-1].op in ("Div", "Mul", "Add", "Sub", "Cast")
        if likely and _norm(reader, nodes, end):
            return nodes, end
    return None


_SOFTMAX: Mapping[tuple[str, ...], str] = {
    ("Exp", "ReduceSum", "Div"): "Softmax",
    ("Exp", "ReduceSum", "Log", "Sub"): "LogSoftmax",
}


def _softmax_of(reader: Reader, runs: list[Run]) -> Run | None:
    """A softmax, or its logarithm, that is taken apart: where the largest entry is taken away
    first, as what does not overflows."""
    for nodes, end in runs:
        ops = tuple(n.op for n in nodes)
        kind = _SOFTMAX.get(ops[2:], "")
        if ops[:2] != ("ReduceMax", "Sub") or not kind:
            continue
        shape = reader.shape(nodes[0])
        if math.prod(shape[1:]) > _LARGEST:
            continue
        x = _sample(shape)
        y = _evaluated(reader, nodes, end, x)
        for axis in range(1, len(shape)):
            wide = np.exp(x - x.max(axis, keepdims=True))
            wanted = wide / wide.sum(axis, keepdims=True)
            wanted = np.log(wanted) if kind == "LogSoftmax" else wanted
            if y.shape == wanted.shape and np.allclose(y, wanted, rtol=1e-9, atol=1e-12):
                reader.add(reader.name(nodes[-1]), kind, dim=axis)
                return nodes, end
    return None


def _wrapped(reader: Reader, runs: list[Run]) -> Run | None:
    """A padding of one axis with what is at its other end."""
    for nodes, end in runs:
        last = nodes[-1]
        if last.op != "Concat" or any(n.op != "Slice" for n in nodes[:-1]):
            continue
        shape = reader.shape(nodes[0])
        axis = last("axis", 0) % len(shape)
        if len(shape) not in (3, 4, 5) or axis < 2 or math.prod(shape[1:]) > _LARGEST:
            continue
        x = np.arange(math.prod(shape[1:])).reshape(1, *shape[1:])
        y = _evaluated(reader, nodes, end, x)
        more = y.shape[axis] - shape[axis]
        for before in range(max(more, -1) + 1):
            pairs = [(0, 0)] * len(shape)
            pairs[axis] = (before, more - before)
            if np.array_equal(y, np.pad(x, pairs, mode="wrap")):
                reader.add(reader.name(last), f"CircularPad{len(shape) - 2}d",
                           padding=pairs_in("torch", tuple(pairs[2:])))  # fmt: skip
                return nodes, end
    return None


def _means(block: list[Node]) -> int:
    return sum(n.op in ("ReduceMean", "GlobalAveragePool") for n in block)


def _is_glu(reader: Reader, block: list[Node]) -> bool:
    if [n.op for n in block] != ["Split", "Sigmoid", "Mul"]:
        return False
    split, gate, product = block
    first, second = (*split.outputs, "", "")[:2]
    sizes = {reader.graph.shape(o, split)[split("axis", 0)] for o in split.outputs}
    return (
        gate.inputs == [second]
        and len(split.outputs) == 2
        and len(sizes) == 1
        and split("axis", 0) % reader.rank(split) > 0
        and sorted(product.inputs) == sorted([first, gate.outputs[0]])
    )


def _numbers(reader: Reader, block: list[Node]) -> tuple[list[float], list[np.ndarray]]:
    """The small numbers in a block, one of which may be an epsilon, and its arrays."""
    known = reader.graph.known
    values = [np.asarray(known[n]) for node in block for n in node.inputs
              if n in known and known[n] is not ZEROS]  # fmt: skip
    values = [v for v in values if v.dtype.kind == "f"]
    small = [float(np.ravel(v)[0]) for v in values if v.size == 1]
    return [e for e in dict.fromkeys(small) if 0 <= e < 0.1], values


def _affine(y: np.ndarray, plain: np.ndarray, arrays: list[np.ndarray]) -> tuple[Any, Any] | None:
    """The scale and bias, or their absence, with which one is the other."""
    options: list[tuple[Any, Any]] = [(None, None), *((g, None) for g in arrays)]
    options += [(None, b) for b in arrays]
    options += [(g, b) for g in arrays for b in arrays if g is not b]
    for scale, bias in options:
        wanted = plain if scale is None else plain * scale
        wanted = wanted if bias is None else wanted + bias
        if y.shape == wanted.shape and np.allclose(y, wanted, rtol=1e-5, atol=1e-5):
            return scale if scale is not None or bias is None else np.ones_like(bias), bias
    return None


def _sample(shape: Any) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, *shape[1:])) * 2 + 0.5


def _norm(reader: Reader, block: list[Node], end: str) -> bool:
    shape = reader.shape(block[0])
    rank = len(shape)
    if math.prod(shape[1:]) > _LARGEST:
        return False
    x = _sample(shape)

    def computed(x: np.ndarray) -> np.ndarray:
        return _evaluated(reader, block, end, x)

    try:
        y = computed(x)
    except (KeyError, ValueError, IndexError):
        return False
    epsilons, values = _numbers(reader, block)
    for first in range(rank - 1, 0, -1):
        axes, inner = tuple(range(first, rank)), tuple(shape[first:])
        arrays = [v.reshape(inner) for v in values if v.size == math.prod(inner)]
        for kind in ("LayerNorm", "RMSNorm"):
            for epsilon in epsilons:

                def plain(
                    x: np.ndarray, kind: str = kind, axes: Any = axes, epsilon: float = epsilon
                ) -> np.ndarray:
                    mean = x.mean(axes, keepdims=True) if kind == "LayerNorm" else 0.0
                    variance = ((x - mean) ** 2).mean(axes, keepdims=True)
                    return (x - mean) / np.sqrt(variance + epsilon)

                found = _affine(y, plain(x), arrays)
                if found is None or (kind == "RMSNorm" and found[1] is not None):
                    continue
                if not _also_small(computed, plain, found, x, epsilon):
                    continue
                add_layer_norm(reader, reader.name(block[-1]), inner, *found, epsilon, kind)
                return True
    return False


def _also_small(
    computed: Callable[..., Any], plain: Callable[..., Any], found: Any, x: Any, epsilon: float
) -> bool:
    """Whether nodes are a norm for small inputs too: these tell one epsilon from another, and
    whether it is added to the variance or to its root."""
    scale, bias = found
    for size in (1e-2, 1e-4, math.sqrt(epsilon) or 1e-8):
        wanted = plain(x * size)
        wanted = wanted if scale is None else wanted * scale
        wanted = wanted if bias is None else wanted + bias
        if not np.allclose(computed(x * size), wanted, rtol=1e-4, atol=1e-5):
            return False
    return True


def grouped(reader: Reader, node: Node) -> str | None:
    """The end of a GroupNorm that is computed between two Reshapes."""
    graph, shape = reader.graph, reader.shape(node)
    users = graph.users.get(node.outputs[0], [])
    if len(shape) < 3 and len(users) < 2:
        return None
    if len(users) == 1 and users[0].op != "InstanceNormalization" and users[0].op != "ReduceMean":
        return None
    told = graph.known.get(node.inputs[1])
    if not isinstance(told, np.ndarray) or not users or not users[0].outputs:
        return None
    value = reader.env[reader.at]
    try:
        sizes = reader.sizes([int(n) for n in np.ravel(told)],
                             graph.of_batch.get(node.inputs[1]), value, node)  # fmt: skip
    except ConversionError:
        return None
    if sizes[0] != (1, True):
        return None
    new = tuple(n for n, _ in sizes[1:])
    if users[0].op == "InstanceNormalization":
        return _instances(reader, node, shape, new, users[0])
    if new[:-2] != tuple(shape[1:-1]) or len(new) < 3 or new[-1] * new[-2] != shape[-1]:
        return None
    graph.shapes.setdefault(node.outputs[0], (shape[0], *new))
    for block, end in graph.regions(node.outputs[0], users[0]):
        after = graph.users.get(end, [])
        if not _means(block) or len(after) != 1 or after[0].op != "Reshape":
            continue
        if tuple((graph.shapes.get(after[0].outputs[0]) or ())[1:]) == tuple(shape[1:]):
            return _in_groups(reader, node, new, block, end, after[0])
    return None


def _instances(
    reader: Reader, node: Node, shape: Any, new: tuple[int, ...], norm: Node
) -> str | None:
    """A GroupNorm, which older exporters say as an InstanceNormalization of groups."""
    graph = reader.graph
    after = graph.users.get(norm.outputs[0], [])
    scale, bias = graph.const(norm, 1), graph.const(norm, 2)
    if len(after) != 1 or after[0].op != "Reshape" or len(new) != 2 or np.any(scale != 1) or (
        np.any(bias != 0) or shape[1] % new[0]
    ):  # fmt: skip
        return None
    if tuple((graph.shapes.get(after[0].outputs[0]) or ())[1:]) != tuple(shape[1:]):
        return None
    reader.add(reader.name(norm), "GroupNorm", num_groups=new[0], num_channels=shape[1],
               eps=norm("epsilon", 1e-5), affine=False)  # fmt: skip
    reader.lacks = "scale"
    reader.done |= {id(norm), id(after[0])}
    return after[0].outputs[0]


def _in_groups(
    reader: Reader, node: Node, new: tuple[int, ...], block: list[Node], end: str, last: Node
) -> str | None:
    shape = reader.shape(node)
    if math.prod(shape[1:]) > _LARGEST:
        return None
    x = _sample(shape)

    def computed(x: np.ndarray) -> np.ndarray:
        return _evaluated(reader, [node, *block], end, x).reshape(x.shape)

    try:
        y = computed(x)
    except (KeyError, ValueError, IndexError):
        return None
    epsilons, values = _numbers(reader, block)
    arrays = [v.reshape(-1) for v in values if v.size == shape[-1]]
    axes = (*range(1, len(new) - 1), len(new))
    for epsilon in epsilons:

        def plain(x: np.ndarray, epsilon: float = epsilon) -> np.ndarray:
            split = x.reshape(2, *new)
            mean, variance = split.mean(axes, keepdims=True), split.var(axes, keepdims=True)
            return ((split - mean) / np.sqrt(variance + epsilon)).reshape(x.shape)

        found = _affine(y, plain(x), arrays)
        if found is None or not _also_small(computed, plain, found, x, epsilon):
            continue
        scale, bias = found
        scale = np.ones(shape[-1], np.float32) if scale is None else scale
        bias = np.zeros(shape[-1], np.float32) if bias is None else bias
        name = reader.name(block[-1])
        reader.done |= {id(n) for n in (*block, last)}

        def add(
            name: str = name, scale: Any = scale, bias: Any = bias, epsilon: float = epsilon
        ) -> None:
            add_group_norm(reader, name, new[-2], scale, bias, epsilon)

        reader.with_second(len(shape) - 1, len(shape), name, add)
        return last.outputs[0]
    return None


def _cast(node: Node, x: np.ndarray, precision: Any) -> np.ndarray:
    import onnx

    node("saturate")
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(node("to")))
    if dtype.kind == "f" and dtype.itemsize >= 4:
        return x.astype(precision)
    return x.astype(dtype)


_REDUCTIONS: Mapping[str, Callable[..., Any]]
_REDUCTIONS = {"ReduceMean": np.mean, "ReduceMax": np.max, "ReduceSum": np.sum}


def _evaluated(
    reader: Reader, block: list[Node], end: str, x: np.ndarray, precision: Any = float
) -> np.ndarray:
    """The values of a block at some inputs, in double precision unless another is given."""
    graph, values = reader.graph, {reader.at: x}
    for node in block:
        given = []
        for name in node.inputs:
            value: Any = values[name] if name in values else graph.known[name] if name else None
            if isinstance(value, np.ndarray) and value.dtype.kind == "f":
                value = value.astype(precision)
            if x.ndim == 1 and np.size(value) == 1 and value is not None:
                value = np.reshape(value, ())
            given.append(value)
        with np.errstate(all="ignore"):
            if node.op in _REDUCTIONS:
                node("noop_with_empty_axes")
                axes = tuple(axes_of(graph, node) or ()) or None
                out = _REDUCTIONS[node.op](given[0], axis=axes, keepdims=bool(node("keepdims", 1)))
            elif node.op == "GlobalAveragePool":
                out = np.mean(given[0], tuple(range(2, given[0].ndim)), keepdims=True)
            elif node.op == "Reshape":
                out = given[0].reshape(x.shape[0], *graph.shape(node.outputs[0], node)[1:])
            elif node.op == "Cast":
                out = _cast(node, given[0], precision)
            elif node.op == "Slice":
                out = given[0][tuple(slices_of(graph, node, given[0].ndim))]
            elif node.op == "Concat":
                out = np.concatenate(given, node("axis"))
            else:
                out = POINTWISE[node.op](node, *given)
        out = np.asarray(out)
        values[node.outputs[0]] = out.astype(precision) if out.dtype.kind == "f" else out
    return values[end]
