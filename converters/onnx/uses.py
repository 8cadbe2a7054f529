"""What the nodes of an ONNX file say of the arrays that they read: axes, roles, and zeros."""

import dataclasses
import math
import types
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fwt._modules import Known, even, many

Scope = tuple[str, ...]  # the graph in which a name stands: of which nodes' attributes
Key = tuple[Scope, str]
_STANDARD = ("", "ai.onnx")
_MICROSOFT = "com.microsoft"
# By operator and input, the axes and the role: "*" stands for a window, "?" for an unknown axis.
_READS: dict[str, dict[int, tuple[str, str]]] = {
    "Conv": {1: ("out in *", "kernels"), 2: ("out", "biases")},
    "ConvTranspose": {1: ("in out *", "kernels"), 2: ("out", "biases")},
    "DeformConv": {1: ("out in *", "kernels"), 3: ("out", "biases")},
    "ConvInteger": {1: ("out in *", "kernels")},
    "QLinearConv": {3: ("out in *", "kernels"), 8: ("out", "biases")},
    "Gemm": {2: ("out", "biases")},
    "LSTM": {1: ("stack out in", "kernels"), 2: ("stack out in", "kernels"),
             3: ("stack out", "biases")},
    "BatchNormalization": {2: ("out", "biases")},
    "InstanceNormalization": {2: ("out", "biases")},
    "LayerNormalization": {2: ("out", "biases")},
    "GroupNormalization": {2: ("out", "biases")},
}  # fmt: skip
_READS |= {"GRU": _READS["LSTM"], "RNN": _READS["LSTM"]}
_OF_MICROSOFT = {
    "FusedConv": _READS["Conv"],
    "FusedGemm": _READS["Gemm"],
    "Attention": {1: ("in out", "kernels"), 2: ("out", "biases")},
    "BiasGelu": {1: ("out", "biases")},
}
# Products of two matrices: where the first and the second are among the inputs.
_PRODUCTS = {"MatMul": (0, 1), "Gemm": (0, 1), "MatMulInteger": (0, 1), "QLinearMatMul": (0, 3),
             "FusedMatMul": (0, 1), "FusedGemm": (0, 1)}  # fmt: skip
_MAKES = {*_PRODUCTS, "Conv", "ConvTranspose", "Einsum", "FusedConv", "DeformConv"}
_OF_THEIRS = {*_OF_MICROSOFT, "FusedMatMul"}
# Where the zero point of an input is, beside those of which none is known.
_ZEROS = {("DequantizeLinear", 0): 2, ("MatMulInteger", 0): 2, ("MatMulInteger", 1): 3,
          ("ConvInteger", 1): 3, ("QLinearConv", 3): 5, ("QLinearMatMul", 0): 2,
          ("QLinearMatMul", 3): 5}  # fmt: skip
_SAME = ("Identity", "Cast", "CastLike", "Dropout", "Neg", "QuantizeLinear", "DequantizeLinear")
_PART = ("Slice", "Split", "Pad", "Concat", "Expand", "Gather")  # the axes stay, not their sizes
_MOST = 1000  # arrays of which one other is made
_SCALES = ("Mul", "Div")  # of which 0 stays 0
_EACH = (*_SCALES, "Add", "Sub", "Where", "Max", "Min", "Pow", "Clip", "Tanh", "Sqrt", "Abs")


@dataclasses.dataclass(frozen=True)
class Use:
    """What one node says of an array: as what it reads it, and what 0 means there."""

    node: str
    known: Known
    exact: bool  # whether an integer 0 is the number 0


@dataclasses.dataclass(frozen=True)
class _Part:
    """What is made of an array by nodes that read numbers alone: ``axes`` are those of the array
    that its own are, -1 for one that it has more, and None where they are not known."""

    key: Key
    rank: int  # of the array
    axes: tuple[int, ...] | None
    sizes: tuple[int, ...] | None
    exact: bool = True


class _Names:
    """The names that a graph sees: its own, and those of the graphs around it."""

    def __init__(self, scope: Scope = (), above: "_Names | None" = None):
        self.scope, self.above = scope, above
        # Empty for numbers that are made of no array, None for what is computed.
        self.parts: dict[str, list[_Part] | None] = {}
        self.values: dict[str, Any] = {}
        self.made: dict[str, str] = {}

    def find(self, table: str, name: str) -> Any:
        names: _Names | None = self
        while names is not None:
            if name in (found := getattr(names, table)):
                return found[name]
            names = names.above
        return None


def scope_of(node: Any, attribute: Any, index: int | None = None) -> str:
    """What a graph within a node is called."""
    label = next((o for o in node.output if o), node.name)
    return f"{label}.{attribute.name}{'' if index is None else f'.{index}'}"


def subgraphs(node: Any) -> Iterator[tuple[str, Any]]:
    """The graphs within a node, and what each is called."""
    for a in node.attribute:
        if a.HasField("g"):
            yield scope_of(node, a), a.g
        for i, graph in enumerate(a.graphs):
            yield scope_of(node, a, i), graph


def uses_of(proto: Any) -> dict[Key, list[Use]]:
    """Of each array of a file, an initializer or a Constant, what the nodes say that read it.

    Args:
        proto: a model, whose functions stand in the place of their calls.
    """
    out: dict[Key, list[Use]] = {}
    _read_graph(proto.graph, _Names(), out)
    return out


def _read_graph(
    graph: Any,
    names: _Names,
    out: dict[Key, list[Use]],
    given: Mapping[str, list[_Part]] = types.MappingProxyType({}),
    passed: Collection[int] = (),
) -> None:
    """``given``: what inputs of a body are made of; ``passed``: which of its outputs are those."""
    for value in graph.input:
        names.parts[value.name], names.made[value.name] = given.get(value.name), ""
    for tensor in graph.initializer:
        _hold(tensor, tensor.name, names)
    for node in graph.node:
        _read_node(node, names, out)
    for i, value in enumerate(graph.output):
        for part in () if i in passed else names.find("parts", value.name) or ():
            said = Use(f"the output {value.name}", Known(), False)
            out.setdefault(part.key, []).append(said)


def _hold(tensor: Any, name: str, names: _Names) -> None:
    sizes = tuple(tensor.dims)
    names.parts[name] = [_Part((names.scope, name), len(sizes), tuple(range(len(sizes))), sizes)]
    if math.prod(sizes) <= 1 << 16:  # a shape, axes or a zero point
        names.values[name] = tensor


def _read_node(node: Any, names: _Names, out: dict[Key, list[Use]]) -> None:
    attributes = {a.name: a for a in node.attribute}
    standard = node.domain in _STANDARD
    outputs = [o for o in node.output if o]
    moved = standard and node.op_type in (*_SAME, *_MOVES) and node.input
    maker = names.find("made", node.input[0]) if moved else node.op_type
    for o in outputs:
        names.parts[o], names.made[o] = None, maker or ""
    given = [names.find("parts", n) if n else [] for n in node.input]
    round_ = _round(node, attributes, given) if standard else _Round()
    for scope, graph in subgraphs(node):
        inner = _Names((*names.scope, scope), names)
        _read_graph(graph, inner, out, round_.given, round_.passed)
    for index, parts in round_.made.items():
        if index < len(node.output) and node.output[index]:
            names.parts[node.output[index]] = parts
    if standard and node.op_type == "Constant" and outputs:
        if "value" in attributes:
            _hold(attributes["value"].t, outputs[0], names)
        else:
            names.parts[outputs[0]] = []
            names.values[outputs[0]] = next(iter(node.attribute), None)
        return
    numbers = standard and node.input and all(g is not None for g in given)
    if numbers and node.op_type in (*_SAME, *_PART, *_EACH, *_MOVES):
        made = _few(_made(node, attributes, given, names))
        for o in outputs:
            names.parts[o] = made
        taken = {part.key for part in made}
        for parts in given:  # such as the scale of what is quantised
            for part in parts:
                if part.key not in taken:
                    out.setdefault(part.key, []).append(Use(_label(node), _of_rank(part), False))
        return
    for index, parts in enumerate(given):
        for part in () if index in round_.taken else parts or ():
            use = _use(node, attributes, index, part, names)
            if numbers:  # a product of two arrays, which may be either matrix of another
                use = dataclasses.replace(use, known=dataclasses.replace(use.known, names=None))
            out.setdefault(part.key, []).append(use)
    if numbers:
        for o in outputs:
            names.parts[o] = []


@dataclasses.dataclass
class _Round:
    """What stays the same in each round of a Loop or Scan: by name, what the inputs of its body are
    made of; which outputs of the body, and which inputs and outputs of the node, are that."""

    given: dict[str, list[_Part]] = dataclasses.field(default_factory=dict)
    passed: set[int] = dataclasses.field(default_factory=set)
    taken: set[int] = dataclasses.field(default_factory=set)
    made: dict[int, list[_Part]] = dataclasses.field(default_factory=dict)


def _round(node: Any, attributes: Any, given: Sequence[list[_Part] | None]) -> _Round:
    """An array that goes through the rounds unchanged, as Keras's exporter has the weights of a
    cell; and one of which a Scan hands each round a slice, which is a stack of layers."""
    out = _Round()
    if node.op_type not in ("Loop", "Scan") or "body" not in attributes:
        return out
    body, loop = attributes["body"].g, node.op_type == "Loop"
    if len(body.input) != len(node.input):  # a Scan of opset 8, whose arrays have a batch
        return out
    scans = _int(attributes, "num_scan_inputs")
    axes = list(attributes["scan_input_axes"].ints) if "scan_input_axes" in attributes else []
    same = {n.output[0]: n.input[0] for n in body.node
            if n.op_type == "Identity" and n.input and n.output}  # fmt: skip
    first = 2 if loop else 0  # the count of a Loop and its condition are no states
    states = len(node.input) - first - (0 if loop else scans)
    for index, parts in enumerate(given):
        if not parts or index < first or index >= len(body.input):
            continue
        name, state = body.input[index].name, index - first
        if state >= states:
            axis = axes[state - states] if state - states < len(axes) else 0
            out.given[name] = [_without_axis(p, axis) for p in parts]
            out.taken.add(index)
            continue
        place = state + (1 if loop else 0)
        end = body.output[place].name if place < len(body.output) else ""
        for _ in range(8):
            end = same.get(end, end)
        if end == name:
            out.given[name], out.made[state] = parts, parts
            out.passed.add(place)
            out.taken.add(index)
    return out


def _without_axis(part: _Part, axis: int) -> _Part:
    if part.axes is None or not -len(part.axes) <= axis < len(part.axes):
        return dataclasses.replace(part, axes=None, sizes=None)
    kept = [i for i in range(len(part.axes)) if i != axis % len(part.axes)]
    sizes = None if part.sizes is None else tuple(part.sizes[i] for i in kept)
    return dataclasses.replace(part, axes=tuple(part.axes[i] for i in kept), sizes=sizes)


def _label(node: Any) -> str:
    return str(node.name or next((o for o in node.output if o), node.op_type))


def _few(parts: Sequence[_Part]) -> list[_Part]:
    """The parts, each once; of an array that stands there in many ways, without its axes. What is
    made of very many is made of none, so that a file can't ask for more than it is long."""
    by_key: dict[Key, list[_Part]] = {}
    for part in dict.fromkeys(parts):
        by_key.setdefault(part.key, []).append(part)
    if len(by_key) > _MOST:
        return []
    out: list[_Part] = []
    for each in by_key.values():
        if len(each) > 4:
            exact = all(part.exact for part in each)
            each = [dataclasses.replace(each[0], axes=None, sizes=None, exact=exact)]
        out += each
    return out


# -- what is made of numbers alone --------------------------------------------------------------

_MOVES = ("Transpose", "Squeeze", "Unsqueeze", "Reshape", "Flatten")


def _made(node: Any, attributes: Any, given: list[list[_Part]], names: _Names) -> list[_Part]:
    op = node.op_type
    if op in _SAME:
        exact = op != "DequantizeLinear" or _zero(node, 0, names)
        return [dataclasses.replace(p, exact=p.exact and exact) for p in given[0]]
    if op in _MOVES:
        return [_moved(node, attributes, part, names) for part in given[0]]
    if op in _EACH:
        whole = [p for parts in given for p in parts]
        sizes = [math.prod(p.sizes) if p.sizes is not None else math.inf for p in whole]
        largest = [p for p, n in zip(whole, sizes, strict=True) if n == max(sizes)]
        exact = op in _SCALES
        rank = max((len(p.axes) for p in whole if p.axes is not None), default=0)
        same = len({p.sizes for p in largest}) == 1
        return [dataclasses.replace(p, exact=p.exact and exact, sizes=p.sizes if same else None,
                axes=p.axes if p.axes is not None and len(p.axes) == rank else None)
                for p in largest]  # fmt: skip
    parts = [p for each in (given if op == "Concat" else given[:1]) for p in each]
    if op == "Gather" and len(node.input) > 1:
        index = _sizes(names, node.input[1])
        parts = [p if index == 1 else dataclasses.replace(p, axes=None) for p in parts]
    if op == "Expand":
        return [dataclasses.replace(p, axes=None, sizes=None) for p in parts]
    return [dataclasses.replace(p, sizes=None, exact=p.exact and op != "Pad") for p in parts]


def _moved(node: Any, attributes: Any, part: _Part, names: _Names) -> _Part:
    """A part after its axes were moved, taken away or added."""
    op, axes, sizes = node.op_type, part.axes, part.sizes
    lost = dataclasses.replace(part, axes=None, sizes=None)
    if axes is None:
        return lost
    rank = len(axes)
    if op == "Transpose":
        order = list(attributes["perm"].ints) if "perm" in attributes else range(rank)[::-1]
        if sorted(order) != list(range(rank)):
            return lost
        new = None if sizes is None else tuple(sizes[i] for i in order)
        return dataclasses.replace(part, axes=tuple(axes[i] for i in order), sizes=new)
    if op == "Reshape" or op == "Flatten":
        given = op == "Reshape" and len(node.input) > 1
        target = _numbers(names, node.input[1]) if given else None
        return lost if target is None or sizes is None else _aligned(part, target, lost)
    said = list(attributes["axes"].ints) if "axes" in attributes else None
    if said is None and len(node.input) > 1:
        said = _numbers(names, node.input[1])
        if said is None:
            return lost
    if op == "Squeeze":
        if said is None and sizes is None:
            return lost
        gone = [i for i, n in enumerate(sizes or ()) if n == 1] if said is None else said
        kept = [i for i in range(rank) if i not in {g % rank for g in gone}]
        new = None if sizes is None else tuple(sizes[i] for i in kept)
        return dataclasses.replace(part, axes=tuple(axes[i] for i in kept), sizes=new)
    more = rank + len(said or ())
    places = {s % more for s in said or ()}
    rest, left = iter(axes), iter(sizes or ())
    wide = tuple(-1 if i in places else next(rest) for i in range(more))
    new = None if sizes is None else tuple(1 if i in places else next(left) for i in range(more))
    return dataclasses.replace(part, axes=wide, sizes=new)


def _aligned(part: _Part, target: Sequence[int], lost: _Part) -> _Part:
    """A part after a Reshape that takes away or adds axes of one entry, and does nothing else."""
    sizes, axes = part.sizes or (), part.axes or ()
    if list(target).count(-1) == 1 and 0 not in target:
        rest = math.prod(n for n in target if n != -1)
        target = [math.prod(sizes) // max(rest, 1) if n == -1 else n for n in target]
    if [n for n in sizes if n != 1] != [n for n in target if n != 1]:
        return lost
    rest_of = iter([a for a, n in zip(axes, sizes, strict=True) if n != 1])
    found = tuple(-1 if n == 1 else next(rest_of) for n in target)
    if tuple(target) == tuple(sizes):
        found = axes
    return dataclasses.replace(part, axes=found, sizes=tuple(target))


def _value(names: _Names, name: str) -> Any:
    """A small array of the file, or None."""
    import onnx

    held = names.find("values", name)
    if isinstance(held, onnx.AttributeProto):
        return np.asarray(onnx.helper.get_attribute_value(held))
    if held is None or held.data_location == onnx.TensorProto.EXTERNAL:
        return None
    return onnx.numpy_helper.to_array(held)


def _numbers(names: _Names, name: str) -> list[int] | None:
    value = _value(names, name)
    whole = value is not None and value.dtype.kind in "iu" and value.ndim < 2
    return [int(n) for n in value.reshape(-1)] if whole else None


def _sizes(names: _Names, name: str) -> int | None:
    value = _value(names, name)
    return None if value is None else np.ndim(value)


def _zero(node: Any, index: int, names: _Names) -> bool:
    """Whether the zero point of an input is 0."""
    place = _ZEROS[node.op_type, index]
    if place >= len(node.input) or not node.input[place]:
        return True
    value = _value(names, node.input[place])
    return value is not None and not np.any(value)


# -- what reads an array ------------------------------------------------------------------------


def _use(node: Any, attributes: Any, index: int, part: _Part, names: _Names) -> Use:
    op = node.op_type
    if node.domain in _STANDARD or (node.domain == _MICROSOFT and op in _OF_THEIRS):
        known = _known(node, attributes, index, part, names)
    else:
        known = Known(role="unknown" if part.rank > 1 else "others")
    exact = part.exact
    if known.role != "kernels":
        exact = False
    elif (op, index) in _ZEROS:
        exact = exact and _zero(node, index, names)
    if known.names is not None and part.axes is not None and len(known.names) == len(part.axes):
        known = dataclasses.replace(known, names=_back(part, known.names))
    else:
        known = dataclasses.replace(known, names=None)
    return Use(_label(node), known, exact)


def _back(part: _Part, said: tuple[str, ...]) -> tuple[str, ...]:
    """The names of the axes of an array, by those of what was made of it; an axis of one entry
    that was taken away is one of a stack."""
    found = {a: n for a, n in zip(part.axes or (), said, strict=True) if a >= 0}
    return tuple(found.get(i, "stack") for i in range(part.rank))


def _of_rank(part: _Part) -> Known:
    return Known(("out",), role="others") if part.axes == (0,) else Known(role="others")


def _known(node: Any, attributes: Any, index: int, part: _Part, names: _Names) -> Known:
    op, rank = node.op_type, None if part.axes is None else len(part.axes)
    table: Mapping[str, dict[int, tuple[str, str]]]
    table = _READS if node.domain in _STANDARD else _OF_MICROSOFT
    if op in _PRODUCTS and index in _PRODUCTS[op]:
        return _of_product(op, attributes, _PRODUCTS[op].index(index), rank)
    if op == "Einsum" and len(node.input) == 2 and "equation" in attributes:
        return _of_einsum(attributes, index, rank)
    if op == "Einsum":
        return Known(role="kernels")
    if op == "Add" and len(node.input) == 2 and (rank == 1 or _is_vector(part)):
        other = names.find("made", node.input[1 - index])
        if other in _MAKES:
            return Known(("out",) if rank == 1 else None, role="biases")
    if index not in table.get(op, {}):
        return _of_rank(part)
    text, role = table[op][index]
    if role == "kernels" and "*" in text:
        return _of_window(attributes, text, rank, part)
    said = tuple(text.split())
    return Known(said if len(said) == rank else None, role=role, layer=op)


def _is_vector(part: _Part) -> bool:
    return part.sizes is not None and sum(n != 1 for n in part.sizes) == 1


def _of_product(op: str, attributes: Any, side: int, rank: int | None) -> Known:
    """The first matrix of a product is (out, in), the second (in, out); axes in front of them are
    a batch of products."""
    turned = bool(_int(attributes, ("transA", "transB")[side]))
    if rank is None:
        return Known(role="kernels")
    if rank == 1:
        return Known(("in",), role="kernels")
    ends = ("out", "in") if (side == 0) != turned else ("in", "out")
    return Known((*["stack"] * (rank - 2), *ends), role="kernels")


def _of_einsum(attributes: Any, index: int, rank: int | None) -> Known:
    text = attributes["equation"].s.decode(errors="replace").replace(" ", "")
    operands, arrow, output = text.partition("->")
    pair = operands.split(",")
    if "." in text or not arrow or len(pair) != 2 or len(set(pair[index])) != rank:
        return Known(role="kernels")
    other = pair[1 - index]
    sides = {(True, False): "in", (False, True): "out", (True, True): "stack"}
    names = tuple(sides.get((c in other, c in output), "") for c in pair[index])
    return Known(names, role="kernels")


def _of_window(attributes: Any, text: str, rank: int | None, part: _Part) -> Known:
    """The kernel of a convolution. That of a transposed one with groups has the inputs of all
    groups on one axis, which no names can say."""
    groups = _int(attributes, "group", 1)
    transposed = text.startswith("in")
    if rank is None or rank < 3 or (transposed and groups > 1):
        return Known(role="kernels", transposed=transposed)
    names = tuple(text.split()[:2]) + ("spatial",) * (rank - 2)
    strides = list(attributes["strides"].ints) if "strides" in attributes else 1
    alone = groups > 1 and part.sizes is not None and part.sizes[1] == 1
    depthwise = groups if alone and even(strides) and many(names[2:]) <= 2 else 0
    return Known(names, transposed, depthwise=depthwise, role="kernels")


def _int(attributes: Any, name: str, default: int = 0) -> int:
    return int(attributes[name].i) if name in attributes else default
