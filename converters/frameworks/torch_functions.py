"""Operations of torch that are several layers, or one whose settings are said in another way."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from fwt.converters.frameworks import torch_shapes
from fwt.converters.frameworks.torch_shapes import Args
from fwt.converters.frameworks.torch_values import Reader, States, name_of
from fwt.converters.rows.row import refuse
from fwt.converters.walk.tensors import Value, wider


def _made(reader: Reader, node: Any, args: Args, place: str) -> Any:
    """zeros_like and such, which take no more of a tensor than its shape."""
    given = {a for a in node.all_input_nodes if a in reader.env}
    stand_in = {a: torch.zeros(_one(a), dtype=a.meta["val"].dtype) for a in given}
    found = torch.fx.map_arg((node.args, node.kwargs), lambda a: stand_in.get(a, 1))
    reader.values[node], reader.sources[node] = node.target(*found[0], **found[1]), frozenset()
    return reader.values[node]


def _one(node: Any) -> list[int]:
    """The shape of one example."""
    return [s if isinstance(s, int) else 1 for s in node.meta["val"].shape]


def _cast(reader: Reader, node: Any, args: Args, place: str) -> Any:
    given = node.all_input_nodes[0]
    kinds = [n.meta["val"].dtype for n in (given, node)]
    whole = all(not d.is_floating_point and d != torch.bool for d in kinds)
    if kinds[0] == kinds[1] or whole:
        return reader.env[given]
    told = f"it makes {kinds[1]} of {kinds[0]}".replace("torch.", "")
    way = "give a module that takes it as it is made here, an input more"
    if all(d.is_floating_point for d in kinds):
        way = "run it in one dtype: without torch.autocast, or as net.bfloat16()"
    raise refuse(place, told, way)


_MASK = ("take the mask as an input of ones and zeros more, and multiply by it or add "
         "(mask - 1) * 1e9 to scores")  # fmt: skip


# -- entry by entry -------------------------------------------------------------------------------


def pointwise(reader: Reader, value: Value, kind: str, place: str, **settings: Any) -> Value:
    return reader.emit(kind, settings, [value], place, value.shape, value.axes)


def function_of(reader: Reader, value: Value, function: str, place: str) -> Value:
    return pointwise(reader, value, "Pointwise", place, function=function)


def _scaled(reader: Reader, node: Any, given: Any, place: str, scale: Any, offset: Any) -> Value:
    """A tensor times a number and plus one. Whole numbers stay whole."""
    value = reader.env[given]
    if given.meta["val"].is_floating_point() or node.meta["val"].is_floating_point():
        return rescaled(reader, value, place, scale, offset)
    for kind, number, usual in (("Multiply", scale, 1), ("Add", offset, 0)):
        if abs(number) >= 2**31:
            raise refuse(place, f"{number} is beyond whole numbers of 32 bits")
        if number != usual:
            whole = torch.tensor(int(number), dtype=torch.int32)
            value = constant_met(reader, kind, value, whole, place)
    return value


def rescaled(reader: Reader, value: Value, place: str, scale: float, offset: float) -> Value:
    if (scale, offset) == (1, 0):
        return value
    return pointwise(reader, value, "Rescaling", place, scale=float(scale), offset=float(offset))


def met(reader: Reader, kind: str, nodes: Sequence[Any], place: str) -> Value:
    """A layer of two tensors that broadcast; one of them may be an array of the model."""
    if any(n not in reader.env and n not in reader.values for n in nodes):
        raise refuse(place, "it computes with the number of examples")
    values = [reader.env.get(n) for n in nodes]
    if any(isinstance(v, States) for v in values):
        values = [reader.dynamic(n, place) for n in nodes]
    found = [v for v in values if isinstance(v, Value)]
    if len(found) == 1:
        like = found[0]
        if len(reader.values[next(n for n in nodes if n in reader.values)].shape) > len(like.axes):
            like = reader.plain(like, place)
        pair = [v or reader.array(n, like, place) for n, v in zip(nodes, values, strict=True)]
        return reader.emit(kind, {}, pair, place, wider(*pair), like.axes)
    a, b = found
    a, b = reader.alike(a, b, place)
    if len(a.shape) != len(b.shape):
        raise refuse(place, f"tensors of ranks {len(a.shape)} and {len(b.shape)} meet")
    return reader.emit(kind, {}, [a, b], place, wider(a, b), a.axes)


def _number(reader: Reader, x: Any) -> float | None:
    """A number, also one that the model has as a constant of one entry."""
    if isinstance(x, torch.fx.Node):
        value = reader.values.get(x)
        if value is None or value.ndim or reader.sources[x]:
            return None
        return float(value)
    return x if isinstance(x, int | float) else None


def _arithmetic(kind: str) -> Any:
    def read(reader: Reader, node: Any, args: Args, place: str) -> Any:
        a, b = args["self"], args["other"]
        if kind == "Reverse":
            a, b = b, a
        alpha = args.get("alpha", 1)
        if args.get("rounding_mode"):
            return None
        if alpha != 1:
            if isinstance(b, int | float):
                b *= alpha
            elif b in reader.env:
                reader.env[node], b = _scaled(reader, node, b, place, alpha, 0), node
            else:
                return None
        left, right = _number(reader, a), _number(reader, b)
        if right is not None:
            parted = 1 / right if right else math.inf
            how = {"Add": (1, right), "Subtract": (1, -right), "Reverse": (1, -right),
                   "Multiply": (right, 0), "Divide": (parted, 0)}  # fmt: skip
            if kind in how and math.isfinite(how[kind][0]):
                return _scaled(reader, node, a, place, *how[kind])
        if left is not None:
            how = {"Add": (1, left), "Subtract": (-1, left), "Reverse": (-1, left),
                   "Multiply": (left, 0)}  # fmt: skip
            if kind in how:
                return _scaled(reader, node, b, place, *how[kind])
            x = function_of(reader, reader.env[b], "reciprocal", place)
            return rescaled(reader, x, place, left, 0)
        if not all(isinstance(v, torch.fx.Node) for v in (a, b)):
            return None
        return met(reader, "Subtract" if kind == "Reverse" else kind, [a, b], place)

    return read


def _power(reader: Reader, node: Any, args: Args, place: str) -> Any:
    x, exponent = args["self"], _number(reader, args["exponent"])
    if x not in reader.env or exponent not in (1, 2, 3, 4, 0.5, -0.5, -1, -2):
        return None
    value = reader.env[x]
    if exponent in (3, 4):
        square = function_of(reader, value, "square", place)
        other = value if exponent == 3 else square
        return reader.emit("Multiply", {}, [square, other], place, value.shape, value.axes)
    for part, function in ((0.5, "sqrt"), (2, "square")):
        if abs(exponent) == part:
            value = function_of(reader, value, function, place)
    return function_of(reader, value, "reciprocal", place) if exponent < 0 else value


def _of(*functions: str) -> Any:
    def read(reader: Reader, node: Any, args: Args, place: str) -> Any:
        if any(v for k, v in args.items() if k != "self"):  # such as decimals
            return None
        value = reader.env[args["self"]]
        for function in functions:
            value = function_of(reader, value, function, place)
        return value

    return read


def _log(base: int) -> Any:
    def read(reader: Reader, node: Any, args: Args, place: str) -> Any:
        value = function_of(reader, reader.env[args["self"]], "log", place)
        return rescaled(reader, value, place, 1 / math.log(base), 0)

    return read


def _clamp(reader: Reader, node: Any, args: Args, place: str) -> Any:
    value = reader.env.get(args["self"])
    low, high = (_number(reader, args.get(k)) for k in ("min", "max"))
    if not isinstance(value, Value):
        return None
    whole = not args["self"].meta["val"].is_floating_point()  # as numbers of 32 bits
    if low is not None and high is not None and low < high and not whole:
        return pointwise(reader, value, "Hardtanh", place, min_val=low, max_val=high)
    if low == 0 and high is None:
        return pointwise(reader, value, "ReLU", place)
    if low is None and high is None:
        return None
    dtype = node.meta["val"].dtype
    dtype = torch.int32 if dtype == torch.int64 else dtype
    for bound, kind in ((low, "Maximum"), (high, "Minimum")):
        if bound is not None:
            bound = min(max(bound, -(2**31)), 2**31 - 1) if dtype == torch.int32 else bound
            value = constant_met(reader, kind, value, torch.tensor(bound, dtype=dtype), place)
    return value


def constant_met(
    reader: Reader, kind: str, value: Value, constant: torch.Tensor, place: str, node: Any = None
) -> Value:
    """A layer of a tensor and a constant."""
    key = node or object()
    reader.values[key], reader.sources[key] = constant, frozenset()
    other = reader.array(key, value, place)
    return reader.emit(kind, {}, [value, other], place, wider(value, other), value.axes)


def _masked_fill(reader: Reader, node: Any, args: Args, place: str) -> Any:
    mask, fill = reader.values.get(args["mask"]), _number(reader, args["value"])
    value = reader.env.get(args["self"])
    if not isinstance(value, Value):
        return None
    if mask is None or fill is None:
        raise refuse(place, "its mask follows from the input", _MASK)
    return masked(reader, value, mask, fill, place)


def masked(reader: Reader, value: Value, mask: torch.Tensor, fill: float, place: str) -> Value:
    """The value where a mask is false, a number where it is true."""
    zero = torch.zeros(())
    value = constant_met(reader, "Masked", value, (~mask).float(), place)
    if not fill:
        return value
    return constant_met(reader, "Add", value, torch.where(mask, torch.tensor(fill), zero), place)


def _where(reader: Reader, node: Any, args: Args, place: str) -> Any:
    condition = reader.values.get(args["condition"])
    if condition is None:
        raise refuse(place, "its condition follows from the input", _MASK)
    keep = condition.bool()
    sides = [(args["self"], keep), (args["other"], ~keep)]
    numbers = [_number(reader, n) for n, _ in sides]
    for (x, where), number in zip(sides, reversed(numbers), strict=True):
        if number is not None and x in reader.env:
            return masked(reader, reader.dynamic(x, place), ~where, number, place)
    parts: list[Any] = []
    for x, where in sides:
        if x in reader.env:
            value = reader.dynamic(x, place)
            parts.append(constant_met(reader, "Masked", value, where.float(), place))
        elif x in reader.values and not reader.sources[x]:
            parts.append(torch.where(where, reader.values[x], 0))
        else:
            return None
    a, b = parts
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        value, constant = (b, a) if isinstance(a, torch.Tensor) else (a, b)
        return constant_met(reader, "Add", value, constant, place)
    a, b = reader.alike(a, b, place)
    return reader.emit("Add", {}, [a, b], place, wider(a, b), a.axes)


def _triangle(reader: Reader, node: Any, args: Args, place: str) -> Any:
    value = reader.dynamic(args["self"], place)
    sizes = [n for n, _ in value.sizes[-2:]]
    if 0 in (*value.axes[-1], *value.axes[-2]):
        return None
    keep = getattr(torch, name_of(node))(torch.ones(*sizes), args.get("diagonal", 0))
    return constant_met(reader, "Masked", value, keep, place)


# -- along axes -----------------------------------------------------------------------------------


def reduced(
    reader: Reader, value: Value, function: str, dims: Sequence[int], keep: bool, place: str
) -> Value:
    """The mean, sum or so along axes of torch's."""
    rank = len(value.axes)
    dims = sorted(d % rank for d in dims) if dims else list(range(rank))
    spatial = rank > 3 and dims == list(range(2, rank)) and value.is_plain
    if function == "mean" and spatial:
        shape = (*value.shape[:2], *[1] * (rank - 2))
        value = reader.emit(
            f"AdaptiveAvgPool{rank - 2}d", {"output_size": 1}, [value], place, shape
        )
    else:
        for dim in dims:
            axis = reader.axis(value, dim, place)
            shape = (*value.shape[:axis], 1, *value.shape[axis + 1 :])
            settings = {"function": function, "dim": axis}
            value = reader.emit("Reduce", settings, [value], place, shape, value.axes)
    if keep:
        return value
    return reader.reshaped(value, [s for i, s in enumerate(value.sizes) if i not in dims], place)


def _dims(args: Args) -> list[int]:
    found = args.get("dim")
    return [found] if isinstance(found, int) else list(found or ())


def _reduce(function: str) -> Any:
    def read(reader: Reader, node: Any, args: Args, place: str) -> Any:
        value = reader.dynamic(args["self"], place)
        made = reduced(reader, value, function, _dims(args), bool(args.get("keepdim")), place)
        return [made, None] if isinstance(node.meta["val"], tuple | list) else made

    return read


def _extreme(function: str) -> Any:
    plain = _reduce(function)

    def read(reader: Reader, node: Any, args: Args, place: str) -> Any:
        if "other" in args:
            return met(reader, f"{function.capitalize()}imum", [args["self"], args["other"]], place)
        return plain(reader, node, args, place)

    return read


def _variance(root: bool, mean_too: bool) -> Any:
    def read(reader: Reader, node: Any, args: Args, place: str) -> Any:
        value, dims = reader.dynamic(args["self"], place), _dims(args)
        correction = args.get("correction", 1 if args.get("unbiased", True) else 0)
        correction = 1 if correction is None else correction
        dims = dims or list(range(len(value.axes)))
        sizes = value.sizes
        count = math.prod(sizes[d][0] for d in dims)
        if count <= correction:
            raise refuse(place, f"the deviation of {count} with correction={correction} is NaN")
        mean = reduced(reader, value, "mean", dims, True, place)
        apart = reader.emit("Subtract", {}, [value, mean], place, value.shape, value.axes)
        found = function_of(reader, apart, "square", place)
        found = reduced(reader, found, "mean", dims, True, place)
        found = rescaled(reader, found, place, count / (count - correction), 0)
        found = function_of(reader, found, "sqrt", place) if root else found
        if not args.get("keepdim"):
            left = [s for i, s in enumerate(sizes) if i not in {d % len(sizes) for d in dims}]
            found, mean = (reader.reshaped(v, left, place) for v in (found, mean))
        return [found, mean] if mean_too else found

    return read


def norm(reader: Reader, node: Any, args: Args, place: str) -> Any:
    value, order = reader.dynamic(args["self"], place), args.get("ord", args.get("p", 2))
    if order not in (1, 2, None) or not _dims(args):
        return None
    functions = ("abs", None) if order == 1 else ("square", "sqrt")
    value = function_of(reader, value, functions[0] or "", place)
    value = reduced(reader, value, "sum", _dims(args), bool(args.get("keepdim")), place)
    return function_of(reader, value, functions[1], place) if functions[1] else value


_POINTWISE = ("abs", "acos", "acosh", "asin", "asinh", "atan", "atanh", "ceil", "cos", "cosh",
              "erf", "exp", "expm1", "floor", "log", "log1p", "reciprocal", "round", "sign", "sin",
              "sinh", "sqrt", "square", "tan")  # fmt: skip
OPERATIONS: dict[str, torch_shapes.Function] = {
    **{name: _of(name) for name in _POINTWISE},
    **dict.fromkeys(("to", "_to_copy", "type_as"), _cast),
    **{f"new_{x}": _made for x in ("zeros", "ones", "full", "empty")},
    **{f"{x}_like": _made for x in ("zeros", "ones", "full", "empty")},
    "rsqrt": _of("sqrt", "reciprocal"),
    "log2": _log(2), "log10": _log(10),
    "exp2": lambda r, n, a, p: function_of(
        r, rescaled(r, r.env[a["self"]], p, math.log(2), 0), "exp", p),
    "neg": lambda r, n, a, p: _scaled(r, n, a["self"], p, -1, 0),
    "add": _arithmetic("Add"),
    "sub": _arithmetic("Subtract"),
    "rsub": _arithmetic("Reverse"),
    "mul": _arithmetic("Multiply"),
    "div": _arithmetic("Divide"),
    "pow": _power,
    "clamp": _clamp,
    "clamp_min": _clamp,
    "clamp_max": _clamp,
    "maximum": lambda r, n, a, p: met(r, "Maximum", [a["self"], a["other"]], p),
    "minimum": lambda r, n, a, p: met(r, "Minimum", [a["self"], a["other"]], p),
    "masked_fill": _masked_fill,
    "where": _where,
    "tril": _triangle,
    "triu": _triangle,
    "mean": _reduce("mean"),
    "sum": _reduce("sum"),
    "prod": _reduce("prod"),
    "amax": _reduce("max"),
    "amin": _reduce("min"),
    "logsumexp": _reduce("logsumexp"),
    "max": _extreme("max"),
    "min": _extreme("min"),
    "var": _variance(False, False),
    "std": _variance(True, False),
    "var_mean": _variance(False, True),
    "linalg_vector_norm": norm,
    "norm": norm,
}  # fmt: skip
# What computes in one way at any size, with the numbers that the forward says.
ANY_SIZE = {
    *OPERATIONS, *torch_shapes.ANY_SIZE,
    "matmul", "bmm", "mm", "linear", "embedding", "softmax", "_softmax", "log_softmax", "relu",
    "gelu", "silu", "sigmoid", "tanh", "leaky_relu", "elu", "selu", "hardtanh", "hardswish",
    "hardsigmoid", "softplus", "mish", "cosine_similarity",
} - {"var", "std", "var_mean", "tril", "triu", "zeros_like", "ones_like", "full_like",
     "empty_like"}  # fmt: skip
