"""Products of torch's tensors: matmul, einsum, attention and what measures two vectors."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from fwt.converters.frameworks.torch_functions import (
    constant_met,
    function_of,
    masked,
    met,
    reduced,
    rescaled,
)
from fwt.converters.frameworks.torch_layer import to_numpy
from fwt.converters.frameworks.torch_shapes import Args, Function
from fwt.converters.frameworks.torch_values import Reader
from fwt.converters.rows.row import refuse
from fwt.converters.walk.tensors import Value, plain_axes


def _matmul(reader: Reader, node: Any, args: Args, place: str) -> Any:
    first, second = args["self"], args.get("other", args.get("mat2"))
    if second in reader.values and first in reader.env:
        weight = reader.values[second]
        value = reader.dynamic(first, place)
        if weight.ndim == 2 and reader.sources[second] & reader.shared:
            table = reader.between(second, lambda given: given.t(), place)
            return reader.attended(value, table, place)
        if weight.ndim == 2:
            if not value.last:
                value = reader.lined_up(value, place)
            if not value.last:
                return None
            settings = {"in_features": weight.shape[0], "out_features": weight.shape[1]}
            arrays = {"weight": to_numpy(weight.t().contiguous(), place)}
            shape = (*value.shape[:-1], weight.shape[1])
            made = reader.emit("Linear", {**settings, "bias": False}, [value], place, shape,
                               value.axes, arrays)  # fmt: skip
            reader.paths[made.name] = reader.sources[second]
            return made
    values = []
    for node_, other in ((first, second), (second, first)):
        if node_ in reader.env:
            values.append(reader.dynamic(node_, place))
            continue
        like = reader.plain(reader.dynamic(other, place), place)
        values.append(reader.array(node_, like, place))
    a, b = values
    return reader.product(a, b, place)


def _added(reader: Reader, node: Any, args: Args, place: str) -> Any:
    """A product plus another tensor, such as the scores of attention with what hides some."""
    value = _matmul(reader, node, {"self": args["batch1"], "mat2": args["batch2"]}, place)
    if value is None or args["beta"] != 1:
        return None
    reader.env[node] = rescaled(reader, value, place, args["alpha"], 0)
    return met(reader, "Add", [args["self"], node], place)


def linear(
    reader: Reader, value: Value, weight: torch.Tensor, paths: frozenset[str], place: str
) -> Value:
    """The products of a tensor with the rows of a matrix of the model."""
    if not value.last:
        value = reader.lined_up(value, place)
    if not value.last:
        raise refuse(place, "it works along the batch")
    settings = {"in_features": weight.shape[1], "out_features": weight.shape[0], "bias": False}
    arrays = {"weight": to_numpy(weight.contiguous(), place)}
    shape = (*value.shape[:-1], weight.shape[0])
    made = reader.emit("Linear", settings, [value], place, shape, value.axes, arrays)
    reader.paths[made.name] = paths
    return made


def _attention(reader: Reader, node: Any, args: Args, place: str) -> Any:
    names = ("query", "key", "value")
    if not all(args[n] in reader.env for n in names) or args.get("dropout_p"):
        return None
    query, key, value = (reader.plain(reader.dynamic(args[n], place), place) for n in names)
    mask = args.get("attn_mask")
    rank, size = len(query.shape), query.shape[-1]
    scale = args.get("scale")
    # Keras's operation takes values of the size of the keys alone.
    same = rank == len(key.shape) == len(value.shape) == 4 and size == value.shape[-1]
    if mask is None and (same or args.get("enable_gqa")):
        told = {"is_causal": bool(args.get("is_causal")), "scale": scale,
                "enable_gqa": bool(args.get("enable_gqa"))}  # fmt: skip
        shape = (*query.shape[:-1], value.shape[-1])
        return reader.emit("DotProductAttention", told, [query, key, value], place, shape)
    if args.get("enable_gqa"):
        raise refuse(place, "enable_gqa=True with a mask is not known")
    scale = 1 / math.sqrt(size or 1) if scale is None else scale
    turned = reader.ordered(key, (*range(rank - 2), rank - 1, rank - 2), place)
    turned = Value(turned.name, turned.shape, plain_axes(rank))
    scores = reader.product(query, turned, place)
    scores = rescaled(reader, scores, place, scale, 0)
    if args.get("is_causal"):
        later = torch.ones(scores.shape[-2] or 1, scores.shape[-1] or 1).triu(1).bool()
        scores = masked(reader, scores, later, -math.inf, place)
    if mask is not None and mask in reader.values:
        found = reader.values[mask]
        hidden = ~found if found.dtype == torch.bool else found == -torch.inf
        if hidden.all(-1).any():
            raise refuse(place, "its mask hides everything from a query, whose result is unsaid")
        if found.dtype == torch.bool:
            scores = masked(reader, scores, ~found, -math.inf, place)
        else:
            other = reader.array(mask, scores, place)
            scores = reader.emit("Add", {}, [scores, other], place, scores.shape)
    elif mask is not None:
        other = reader.plain(reader.dynamic(mask, place), place)
        if mask.meta["val"].dtype == torch.bool or len(other.shape) != rank:
            raise refuse(place, "its mask follows from the input")
        scores = reader.emit("Add", {}, [scores, other], place, scores.shape)
    weights = reader.emit("Softmax", {"dim": rank - 1}, [scores], place, scores.shape)
    return reader.product(weights, value, place)


def _einsum(reader: Reader, node: Any, args: Args, place: str) -> Any:
    """A contraction of one or two tensors, as a product of matrices."""
    equation = args["equation"].replace(" ", "")
    nodes = args["tensors"]
    left, arrow, right = equation.partition("->")
    specs = left.split(",")
    if "." in equation or not arrow or len(nodes) > 2 or any(len(set(x)) < len(x) for x in specs):
        raise refuse(place, f"the equation {equation!r} is not known")
    if len(nodes) == 1:
        value = reader.dynamic(nodes[0], place)
        (letters,) = specs
        gone = [i for i, x in enumerate(letters) if x not in right]
        value = reduced(reader, value, "sum", gone, False, place) if gone else value
        return _turned(reader, value, [x for x in letters if x in right], right, place)
    if nodes[0] not in reader.env:
        nodes, specs = nodes[::-1], specs[::-1]
    first = reader.dynamic(nodes[0], place)
    a, b = specs
    alone = [i for i, x in enumerate(a) if x not in right and x not in b]
    if alone:
        first = reduced(reader, first, "sum", alone, False, place)
        a = "".join(x for i, x in enumerate(a) if i not in alone)
    if any(
        x not in right and x not in other for x, other in [(x, b) for x in a] + [(x, a) for x in b]
    ):
        raise refuse(place, f"the equation {equation!r} sums what one tensor alone has")
    both = [x for x in a if x in b and x in right]
    summed = [x for x in a if x in b and x not in right]
    own, theirs = ([x for x in s if x not in other] for s, other in ((a, b), (b, a)))
    size = dict(zip(a, first.sizes, strict=True))
    if nodes[1] not in reader.env:
        if both:
            raise refuse(place, f"the equation {equation!r} is not known of an array of the model")
        weight = reader.values[nodes[1]]
        size |= {x: (n, False) for x, n in zip(b, weight.shape, strict=True)}
        matrix = weight.permute([b.index(x) for x in (*theirs, *summed)])
        matrix = matrix.reshape(math.prod(size[x][0] for x in theirs), -1)
        x = _turned(reader, first, a, [*own, *summed], place)
        x = reader.reshaped(x, [*(size[y] for y in own), (matrix.shape[1], False)], place)
        made = linear(reader, x, matrix, reader.sources[nodes[1]], place)
        made = reader.reshaped(made, [size[y] for y in (*own, *theirs)], place)
        return _turned(reader, made, [*own, *theirs], right, place)
    second = reader.dynamic(nodes[1], place)
    size |= dict(zip(b, second.sizes, strict=True))

    def joined(letters: Sequence[str]) -> tuple[int, bool]:
        return math.prod(size[x][0] for x in letters), any(size[x][1] for x in letters)

    if not both or not size[both[0]][1]:
        raise refuse(place, f"the equation {equation!r} does not keep the batch first")
    x = _turned(reader, first, a, [*both, *own, *summed], place)
    y = _turned(reader, second, b, [*both, *summed, *theirs], place)
    head = [size[z] for z in both]
    x = reader.reshaped(x, [*head, joined(own), joined(summed)], place)
    y = reader.reshaped(y, [*head, joined(summed), joined(theirs)], place)
    made = reader.product(x, y, place)
    made = reader.reshaped(made, [*head, *(size[z] for z in (*own, *theirs))], place)
    return _turned(reader, made, [*both, *own, *theirs], right, place)


def _turned(
    reader: Reader, value: Value, letters: Sequence[str], wanted: Sequence[str], place: str
) -> Value:
    axes = tuple(value.axes[list(letters).index(x)] for x in wanted)
    turned = Value(value.name, value.shape, axes)
    return reader.lined_up(turned, place) if axes[0] == (0,) else turned


def _distance(reader: Reader, node: Any, args: Args, place: str) -> Any:
    if args["p"] != 2:
        return None
    apart = met(reader, "Subtract", [args["x1"], args["x2"]], place)
    apart = rescaled(reader, apart, place, 1, args["eps"])
    return length(reader, apart, -1, args["keepdim"], place)


def length(reader: Reader, value: Value, dim: int, keep: bool, place: str) -> Value:
    """The Euclidean norm along an axis."""
    value = function_of(reader, value, "square", place)
    value = reduced(reader, value, "sum", [dim], keep, place)
    return function_of(reader, value, "sqrt", place)


def _cosine(reader: Reader, node: Any, args: Args, place: str) -> Any:
    dim, pair = args["dim"], [args["x1"], args["x2"]]
    along = reduced(reader, met(reader, "Multiply", pair, place), "sum", [dim], False, place)
    for one in pair:
        size = length(reader, reader.dynamic(one, place), dim, False, place)
        size = constant_met(reader, "Maximum", size, torch.tensor(args["eps"]), place)
        along, size = reader.alike(along, size, place)
        along = reader.emit("Divide", {}, [along, size], place, along.shape, along.axes)
    return along


def _bilinear(reader: Reader, node: Any, args: Args, place: str) -> Any:
    """Two tensors through a table for each output, as a linear layer and a product of matrices."""
    nodes = args["input1"], args["input2"]
    if args["weight"] not in reader.values or not all(n in reader.env for n in nodes):
        return None
    weight = reader.values[args["weight"]]
    outs, _, inner = weight.shape
    matrix = weight.permute(0, 2, 1).reshape(outs * inner, -1)
    x, y = (reader.plain(reader.dynamic(n, place), place) for n in nodes)
    rest = x.sizes[:-1]
    x = linear(reader, x, matrix, reader.sources[args["weight"]], place)
    x = reader.reshaped(x, [*rest, (outs, False), (inner, False)], place)
    y = reader.reshaped(y, [*rest, (inner, False), (1, False)], place)
    made = reader.reshaped(reader.product(x, y, place), [*rest, (outs, False)], place)
    if args.get("bias") is None:
        return made
    other = reader.array(args["bias"], made, place)
    return reader.emit("Add", {}, [made, other], place, made.shape)


OPERATIONS: dict[str, Function] = {
    "matmul": _matmul,
    "bmm": _matmul,
    "mm": _matmul,
    "baddbmm": _added,
    "einsum": _einsum,
    "bilinear": _bilinear,
    "scaled_dot_product_attention": _attention,
    "pairwise_distance": _distance,
    "cosine_similarity": _cosine,
}
