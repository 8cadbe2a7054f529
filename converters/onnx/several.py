"""ONNX's operators that take several values or give several, or that move the batch: they work on
values as the graph has them, whatever the order of axes in the layers before."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fwt.converters.onnx import blocks, recurrent, shapes, weights
from fwt.converters.onnx.numbers import ZEROS, Node, axes_of, slices_of
from fwt.converters.onnx.reader import Reader
from fwt.converters.onnx.reader import array as array_at
from fwt.converters.rows.row import refuse
from fwt.converters.walk.tensors import Value, wider

# Reads one node; whether it could, as another reader may else.
Several = Callable[[Reader, Node], bool]


def given(reader: Reader, node: Node) -> list[str]:
    """The inputs of a node that follow from those of the graph, each once."""
    return list(dict.fromkeys(n for n in node.inputs if n and n not in reader.graph.known))


def _alias(reader: Reader, node: Node, value: Value) -> bool:
    """Says that the output is a value that a layer before gives."""
    for name in node.inputs[:1]:
        if len(reader.graph.users.get(name, ())) > 1:
            reader.lacking.pop(value.name, None)
    reader.give(node.outputs[0], value)
    if node.inputs[0] in reader.wide:
        reader.wide[node.outputs[0]] = reader.wide[node.inputs[0]]
    return True


def _same(reader: Reader, node: Node) -> bool:
    return _alias(reader, node, reader.env[node.inputs[0]])


# -- two or more values entry by entry -------------------------------------------------------------

_MERGES = {"Add": "Add", "Sub": "Subtract", "Mul": "Multiply", "Div": "Divide", "Max": "Maximum",
           "Min": "Minimum", "Sum": "Add", "Mean": "Average"}  # fmt: skip


def _merge(reader: Reader, node: Node) -> bool:
    names = given(reader, node)
    if len(node.inputs) == 1:
        return _same(reader, node)
    if len(names) == 1:
        return _with_array(reader, node, names[0])
    whole = [i for i in node.inputs if not reader.graph.has_floats(i)]
    if whole:
        raise refuse(str(node), f"its input {whole[0]!r} has no floating numbers")
    values = [_as_it_is(reader, node, n) for n in node.inputs]
    like = [v for v in values if v is not None]
    for index, other in enumerate(like[1:], 1):
        like[0], like[index] = reader.alike(like[0], other, str(node))
    if any((v.axes, len(v.shape)) != (like[0].axes, len(like[0].shape)) for v in like):
        like = [reader.plain(v, str(node)) for v in like]
    if len({len(v.shape) for v in like}) > 1:
        raise refuse(str(node), f"tensors of ranks {len(like[0].shape)} and {len(like[1].shape)} "
                     "meet", "give them as many axes")  # fmt: skip
    left = iter(like)
    parts = [next(left) if n in reader.env else reader.array(n, like[0], node)
             for n in node.inputs]  # fmt: skip
    _met(reader, node, parts, like)
    return True


def _as_it_is(reader: Reader, node: Node, name: str) -> Value | None:
    """A value that may have sizes that are not known, where all others have its axes."""
    if name not in reader.env:
        return None
    found = [reader.env[n] for n in node.inputs if n in reader.env]
    alike = len({(v.axes, len(v.shape)) for v in found}) == 1
    return reader.value(name, node, sized=not alike)


def _met(reader: Reader, node: Node, parts: Sequence[Value], like: Sequence[Value]) -> None:
    made = reader.emit(_MERGES[node.op], {}, parts, reader.name(node), wider(*parts),
                       like[0].axes)  # fmt: skip
    reader.give(node.outputs[0], made)


def _with_array(reader: Reader, node: Node, name: str) -> bool:
    """A value and an array that no layer of one value says."""
    if node.inputs == [name] * 2:
        if node.op == "Mul" and reader.graph.has_floats(name):
            return False
        if node.op in ("Max", "Min", "Mean"):
            return _same(reader, node)
        if node.op in ("Sub", "Div"):
            raise refuse(str(node), "it takes a value from itself")
    others = [n for n in node.inputs if n != name]
    arrays = [reader.graph.known[n] for n in others]
    if any(a is ZEROS for a in arrays):
        return False
    plain = reader.env[name].is_plain
    one = len(others) == 1 == len(node.inputs) - 1
    if one and plain and _along(reader, node, name, arrays[0]):
        return False
    if any(a.dtype.kind != "f" for a in arrays) or not reader.graph.has_floats(name):
        if plain and others:
            return False
        raise refuse(str(node), "arithmetic of whole numbers")
    value = reader.value(name, node)
    if one and not plain:
        reader.start(name, node, plain=False)
        if np.size(arrays[0]) == 1 and (node.inputs[0] == name or node.op in ("Add", "Mul")):
            weights.OPS[node.op](reader, node)
            reader.end(node.outputs[0], value.axes, value.shape)
            return True
        if node.op == "Add" and value.last and weights.joined(
            reader, arrays[0], True, len(value.axes)
        ):  # fmt: skip
            reader.end(node.outputs[0], value.axes, value.shape)
            return True
    parts = [value if n == name else reader.array(n, value, node) for n in node.inputs]
    _met(reader, node, parts, [value])
    return True


def _along(reader: Reader, node: Node, name: str, array: np.ndarray) -> bool:
    """Whether an array goes along one axis of a value at most, in the way that layers have one."""
    shape = reader.graph.shapes.get(name)
    where = node.inputs.index(name)
    if shape is None or (where == 1 and node.op in ("Sub", "Div")):
        return shape is None
    if array.ndim > len(shape) or (node.op == "Div" and not np.all(array)):
        return True
    wide = [len(shape) - array.ndim + i for i, s in enumerate(array.shape) if s != 1]
    if node.op in ("Max", "Min"):
        return not wide
    one = not wide or (len(wide) == 1 and wide[0] > 0 and shape[wide[0]] == array.size)
    norm = weights.fits_norm(reader, name, array)
    return norm or (one and (not wide or 2 <= len(shape) <= 5))


def _where(reader: Reader, node: Node) -> bool:
    graph = reader.graph
    keep = graph.known.get(node.inputs[0])
    if keep is None or keep is ZEROS:
        raise refuse(str(node), "its condition follows from the input")
    sides: list[Any] = []
    for name, where in ((node.inputs[1], keep), (node.inputs[2], ~keep)):
        fill = graph.known.get(name)
        if fill is None:
            value = reader.value(name, node)
            mask = _constant(reader, node, where.astype(np.float32), value)
            made = reader.emit("Masked", {}, [value, mask], reader.name(node),
                               wider(value, mask), value.axes)  # fmt: skip
            sides.append(made)
        else:
            if fill is ZEROS:
                raise refuse(str(node), "what it puts in is not known")
            sides.append(np.where(where, fill, 0).astype(np.float32))
    node.taken |= {0, 1, 2}
    a, b = sides
    if isinstance(a, np.ndarray):
        a, b = b, a
    if isinstance(a, np.ndarray):
        raise refuse(str(node), "it is computed from numbers alone")
    if isinstance(b, np.ndarray):
        b = _constant(reader, node, b, a)
    else:
        a, b = reader.alike(a, b, str(node))
    made = reader.emit("Add", {}, [a, b], reader.name(node), wider(a, b), a.axes)
    reader.give(node.outputs[0], made)
    return True


def _constant(reader: Reader, node: Node, array: np.ndarray, like: Value) -> Value:
    """An array that is no weight."""
    name = f"{node.outputs[0]}|{len(reader.taken)}"
    reader.graph.known[name] = array
    return reader.array(name, like, node, kind="Constant")


# -- products --------------------------------------------------------------------------------------


def _matmul(reader: Reader, node: Node) -> bool:
    names = given(reader, node)
    first, second = node.inputs[:2]
    for index, name in enumerate((first, second)):
        if name in reader.graph.known and np.ndim(reader.graph.known[name]) == 1:
            return _by_vector(reader, node, index)
    if len(names) == 1 and second in reader.graph.known and reader.graph.known[second] is not ZEROS:
        weight = reader.graph.known[second]
        if weight.ndim == 2:
            value = reader.env[first]
            if value.is_plain:
                return _products(reader, node, value)
            value = value if value.last else reader.lined_up(value, str(node))
            if not value.last:
                raise refuse(str(node), "it works along the batch")
            reader.env[first] = value
            reader.start(first, node, plain=False)
            weights.OPS["MatMul"](reader, node)
            reader.end(node.outputs[0], value.axes, (*value.shape[:-1], weight.shape[1]))
            return True
    values = []
    for name, other in ((first, second), (second, first)):
        if name in reader.env:
            values.append(reader.value(name, node))
        else:
            like = reader.plain(reader.value(other, node), str(node))
            values.append(reader.array(name, like, node, whole=True))
    reader.give(node.outputs[0], reader.product(values[0], values[1], reader.name(node)))
    node.taken |= {0, 1}
    return True


def _by_vector(reader: Reader, node: Node, index: int) -> bool:
    """A product with a vector: with a matrix of one output, whose axis goes."""
    vector, held = array_at(reader, node, index), node.inputs[index]
    name, value = reader.name(node, held), reader.value(node.inputs[1 - index], node)
    if index == 0:
        order = list(range(len(value.axes)))
        value = _turned(value, [*order[:-2], *order[:-3:-1]])
    value = reader.lined_up(value, name)
    if not value.last:
        raise refuse(str(node), "it works along the batch")
    settings = {"in_features": vector.size, "out_features": 1, "bias": False}
    shape = (*value.shape[:-1], 1)
    made = reader.emit("Linear", settings, [value], name, shape, value.axes,
                       {"weight": np.ascontiguousarray(vector[None])})  # fmt: skip
    reader.sources[made.name] = (held,)
    reader.give(node.outputs[0], reader.reshaped(made, made.sizes[:-1], name))
    return True


def _gemm(reader: Reader, node: Node) -> bool:
    if len(given(reader, node)) > 1:
        raise refuse(str(node), "two of its inputs follow from the graph's")
    value = reader.env.get(node.inputs[0])
    if value is None or value.is_plain or not value.last:
        return False
    reader.start(node.inputs[0], node, plain=False)
    weights.OPS["Gemm"](reader, node)
    size = reader.layers[-1].settings["out_features"]
    reader.end(node.outputs[0], value.axes, (*value.shape[:-1], size))
    return True


def _einsum(reader: Reader, node: Node) -> bool:
    """A contraction of two tensors, as a product of matrices."""
    equation = node("equation").replace(" ", "")
    left, arrow, right = equation.partition("->")
    specs, names = left.split(","), list(node.inputs)
    repeated = any(len(set(x)) < len(x) for x in (*specs, right))
    if len(names) != 2 or "." in equation or not arrow or repeated:
        raise refuse(str(node), f"the equation {equation!r} is not known")
    if names[0] not in reader.env:
        specs, names = specs[::-1], names[::-1]
    a, b = specs
    value = reader.plain(reader.value(names[0], node), str(node))
    if names[1] in reader.env:
        other = reader.plain(reader.value(names[1], node), str(node))
        batch, other_sizes = a[0], dict(zip(b, (n for n, _ in other.sizes), strict=True))
    else:
        array = array_at(reader, node, node.inputs.index(names[1]))
        batch, other_sizes = a[0], dict(zip(b, array.shape, strict=True))
        other = None
    sizes = dict(zip(a, (n for n, _ in value.sizes), strict=True))
    both = [x for x in a if x in b and x in right]
    gone = [x for x in a if x in b and x not in right]
    mine, theirs = [x for x in a if x not in b], [x for x in b if x not in a]
    if (set(mine + theirs) - set(right)) or not gone or (other is None and batch in both) or (
        other is not None and (batch not in both or b[0] != batch)
    ):  # fmt: skip
        raise refuse(str(node), f"the equation {equation!r} is not known")
    name = reader.name(node, names[1])

    def together(v: Value, letters: str, order: Sequence[Sequence[str]], sizes: Any) -> Value:
        flat = [x for group in order for x in group]
        v = _turned(v, [letters.index(x) for x in flat])
        shape = [(1, True), *((math.prod(sizes[x] for x in g), False) for g in order[1:])]
        return reader.reshaped(v, shape, name)

    if other is None:
        order = [[batch], *([x] for x in mine if x != batch), gone]
        value = together(value, a, order, sizes)
        weight = np.transpose(array, [b.index(x) for x in (*gone, *theirs)])
        weight = weight.reshape(math.prod(other_sizes[x] for x in gone), -1)
        arrays = {"weight": np.ascontiguousarray(weight.T)}
        settings = {"in_features": weight.shape[0], "out_features": weight.shape[1], "bias": False}
        shape = (*value.shape[:-1], weight.shape[1])
        made = reader.emit("Linear", settings, [value], name, shape, arrays=arrays)
        reader.sources[made.name] = (names[1],)
        parts = [[batch], *([x] for x in mine if x != batch), *([x] for x in theirs)]
    else:
        stack = [x for x in both if x != batch]
        value = together(value, a, [[batch], *([x] for x in stack), mine, gone], sizes)
        other = together(other, b, [[batch], *([x] for x in stack), gone, theirs], other_sizes)
        made = reader.product(value, other, name)
        parts = [[batch], *([x] for x in (*stack, *mine, *theirs))]
    letters = [x for p in parts for x in p]
    every = {**other_sizes, **sizes}
    made = reader.reshaped(made, [(1, True), *((every[x], False) for x in letters[1:])], name)
    reader.give(node.outputs[0], _turned(made, [letters.index(x) for x in right]))
    return True


# -- parts of values, and values together ---------------------------------------------------------


def _concat(reader: Reader, node: Node) -> bool:
    names = list(node.inputs)
    if len(names) == 1:
        node("axis")
        return _same(reader, node)
    values = [_as_it_is(reader, node, n) for n in names]
    found = [v for v in values if v is not None]
    if len({(v.axes, len(v.shape)) for v in found}) > 1:
        values = [v and reader.plain(v, str(node)) for v in values]
    like = next(v for v in values if v is not None)
    axis = reader.axis(like, node("axis"), str(node))
    for index, name in enumerate(names):
        if values[index] is None:
            values[index] = reader.array(name, like, node, whole=True)
            node.taken.add(index)
    made = reader.along([v for v in values if v], axis, reader.name(node))
    reader.give(node.outputs[0], made)
    return True


def _split(reader: Reader, node: Node) -> bool:
    value = reader.value(node.inputs[0], node, sized=False)
    dim = node("axis", 0) % len(value.axes)
    axis = reader.axis(value, dim, str(node))
    if value.shape[axis] is None:
        reader.graph.shape(node.inputs[0], node)
    size, count = value.shape[axis], node("num_outputs") or len(node.outputs)
    told = node("split")
    if told is None:
        told = reader.graph.const(node, 1)
    each = -(-size // count)
    ends = [min(each * (i + 1), size) for i in range(count)] if told is None else (
        np.cumsum(np.ravel(told)).tolist())  # fmt: skip
    if ends[-1] != size or len(ends) != len(node.outputs):
        raise refuse(str(node), f"it splits {size} entries at {ends}")
    for start, stop, name in zip([0, *ends], ends, node.outputs, strict=False):
        if name in reader.graph.users:
            reader.give(name, reader.cut(value, dim, start, stop, reader.name(node)))
    return True


def _tied(reader: Reader) -> set[str]:
    """The tables that a Gather takes rows of and a MatMul the products with."""
    nodes, graph = reader.graph.nodes, reader.graph
    tables = {n.inputs[0] for n in nodes if n.op == "Gather" and n.inputs[0] in graph.known}
    return tables & {graph.turned.get(n.inputs[1], "") for n in nodes if n.op == "MatMul"}


def _looked_up(reader: Reader, node: Node) -> bool:
    """Rows of a table that another layer takes the products with: both have it from one node."""
    value, name = reader.env[node.inputs[1]], node.inputs[0]
    if name not in _tied(reader) or not value.is_plain or len(value.shape) != 2 or node("axis", 0):
        return False
    value, array = reader.value(node.inputs[1], node), reader.graph.known[name]
    table = reader.source(name, array, node)
    shape = (*value.shape, array.shape[1])
    made = reader.emit("Lookup", {}, [table, value], reader.name(node), shape)
    reader.give(node.outputs[0], made)
    return True


def _products(reader: Reader, node: Node, value: Value) -> bool:
    """The products with the rows of such a table."""
    name = reader.graph.turned.get(node.inputs[1], "")
    made = {x.inputs[0] for x in reader.layers if x.kind == "Lookup"}
    if name not in _tied(reader) or len(value.shape) != 3 or None in value.shape[1:]:
        return False
    table = reader.source(name, reader.graph.known[name], node)
    if table.name not in made:
        return False
    shape = (*value.shape[:-1], table.shape[0])
    found = reader.emit("Attend", {}, [value, table], reader.name(node), shape)
    reader.give(node.outputs[0], found)
    node.taken.add(1)
    return True


_MOST = 64  # entries that are cut one by one


def _gather(reader: Reader, node: Node) -> bool:
    data = node.inputs[0]
    if data in reader.graph.known:
        return _looked_up(reader, node)
    at = reader.graph.const(node, 1)
    value = reader.value(data, node)
    dim = node("axis", 0) % len(value.axes)
    if at is ZEROS or np.ndim(at) > 1 or not 0 < np.size(at) <= _MOST:
        raise refuse(str(node), f"it takes entries by other indices than at most {_MOST} along one "
                     "axis")  # fmt: skip
    if np.ndim(at) == 0:
        reader.give(node.outputs[0], reader.entry(value, dim, int(at), reader.name(node)))
        return True
    reader.give(node.outputs[0], reader.entries(value, dim, at, reader.name(node)))
    return True


def _slice(reader: Reader, node: Node) -> bool:
    value = reader.value(node.inputs[0], node)
    if value.is_plain:
        reader.start(node.inputs[0], node)
        if shapes.cropped(reader, node):
            reader.end(node.outputs[0])
            return True
    cuts = slices_of(reader.graph, node, len(value.axes))
    for dim, cut in enumerate(cuts):
        if cut in (slice(None), slice(0, None, 1), slice(None, None, 1)):
            continue
        if 0 in value.axes[dim]:
            raise refuse(str(node), f"it takes {cut} of axis {dim}, which is the batch")
        size = value.shape[reader.axis(value, dim, str(node))]
        stop: int | None
        start, stop, step = cut.indices(size)
        if step > 0 and stop > start:
            whole = cut.stop is None or cut.stop >= np.iinfo(np.int32).max
            start, stop = cut.start or 0, None if whole else cut.stop
        elif step < 0:
            axis = reader.axis(value, dim, str(node))
            value = reader.emit("Flip", {"dim": axis}, [value], reader.name(node), value.shape,
                                value.axes)  # fmt: skip
            start, stop, step = size - 1 - start, size - 1 - stop, -step
        if not len(range(size)[start:stop:step]):
            raise refuse(str(node), f"it takes {cut} of axis {dim}: nothing")
        value = reader.cut(value, dim, start, stop, reader.name(node), step)
    return _alias(reader, node, value)


def _tile(reader: Reader, node: Node) -> bool:
    """Copies along axes; what Expand repeats of one entry meets other values so by itself."""
    value = reader.value(node.inputs[0], node)
    target = np.ravel(reader.graph.const(node, 1)).tolist()
    free = reader.graph.of_batch.get(node.inputs[1])
    sizes = value.sizes
    if node.op == "Expand":
        if len(target) > len(sizes):
            raise refuse(str(node), "it adds axes before the batch")
        target = [1] * (len(sizes) - len(target)) + target
        told = [] if free is None else free.tolist()
        marks = [False] * (len(target) - len(told)) + told
        times = []
        for (n, batched), k, mark in zip(sizes, target, marks, strict=True):
            fixed = reader.graph.batch
            if batched or mark:
                if not batched or (not mark and k not in (1, n * (fixed or 0))):
                    raise refuse(str(node), f"it repeats {sizes} to {target}")
                times.append(1)
            else:
                times.append(k if n == 1 else 1)
                if n != 1 and k not in (1, n):
                    raise refuse(str(node), f"it repeats {sizes} to {target}")
    else:
        times = target
    pairs = list(zip(times, sizes, strict=False))
    if len(times) != len(sizes) or any(k < 1 or (k > _MOST and n != 1) for k, (n, _) in pairs):
        raise refuse(str(node), f"it repeats {sizes} {times} times")
    for dim, k in enumerate(times):
        if k == 1:
            continue
        axis = reader.axis(value, dim, str(node))
        if value.shape[axis] == 1 and k > _MOST:
            ones = [1] * len(value.shape)
            ones[axis] = k
            reader.graph.left -= 4 * k
            if reader.graph.left < 0:
                raise refuse(str(node), f"it repeats an entry {k} times")
            other = reader.source(f"{node.outputs[0]}|{dim}", np.ones(ones, np.float32), node,
                                  "Constant")  # fmt: skip
            value = reader.emit("Multiply", {}, [value, other], reader.name(node),
                                wider(value, other), value.axes)  # fmt: skip
        else:
            value = reader.along([value] * k, axis, reader.name(node))
    return _alias(reader, node, value)


# -- shapes ----------------------------------------------------------------------------------------


def _reshape(reader: Reader, node: Node) -> bool:
    name = node.inputs[0]
    found = reader.env[name]
    if found.is_plain and found.shape and None not in found.shape[1:] and node.op == "Reshape":
        reader.start(name, node)
        if (end := blocks.grouped(reader, node)) is not None:
            reader.end(end)
            return True
    value = reader.value(name, node)
    sizes = value.sizes
    if node.op == "Reshape":
        target = [int(s) for s in np.ravel(array_at(reader, node, 1))]
        sizes = reader.sizes(target, reader.graph.of_batch.get(node.inputs[1]), value, node)
    elif node.op == "Flatten":
        dim = node("axis", 1) % len(sizes)
        front, back = sizes[:dim], sizes[dim:]
        sizes = [(math.prod(n for n, _ in part), any(b for _, b in part)) for part in (front, back)]
    else:
        axes = axes_of(reader.graph, node)
        if axes is None:
            raise refuse(str(node), "without axes it drops a batch of 1 too")
        rank = len(sizes) + (len(axes) if node.op == "Unsqueeze" else 0)
        chosen = sorted(a % rank for a in axes)
        if node.op == "Squeeze":
            if any(sizes[a][1] for a in chosen):
                raise refuse(str(node), "it moves the batch axis")
            if any(sizes[a] != (1, False) for a in chosen):
                raise refuse(str(node), f"it drops the axes {chosen} of {sizes}")
            sizes = [s for i, s in enumerate(sizes) if i not in chosen]
        else:
            for axis in chosen:
                sizes.insert(axis, (1, False))
    if sizes == value.sizes:
        return _alias(reader, node, value)
    if not sizes[0][1] and sizes[0] == (1, False) and value.is_plain and node.op == "Unsqueeze":
        raise refuse(str(node), "it moves the batch axis")
    reader.graph.shapes[node.outputs[0]] = tuple(None if b else n for n, b in sizes)
    return _alias(reader, node, reader.reshaped(value, sizes, reader.name(node)))


def _turned(value: Value, order: Sequence[int]) -> Value:
    return Value(value.name, value.shape, tuple(value.axes[d] for d in order))


def _transpose(reader: Reader, node: Node) -> bool:
    value = reader.env[node.inputs[0]]
    rank = len(value.axes) or reader.graph.rank(node.inputs[0], node)
    order = tuple(node("perm") or reversed(range(rank)))
    if not value.axes:
        return False
    turned = _turned(value, order)
    users = reader.graph.users.get(node.outputs[0], [])
    if order == (1, 0, 2) and value.is_plain and recurrent.are_recurrent(users):
        reader.start(node.inputs[0], node)
        end = recurrent.recurrent(reader, users[0])
        reader.done.add(id(users[0]))
        reader.end(end)
        return True
    if turned.axes[0] == (0,):
        turned = reader.lined_up(turned, reader.name(node))
    return _alias(reader, node, turned)


def _recurrent(reader: Reader, node: Node) -> bool:
    """One that takes the time first, of a value that has been turned so."""
    value = reader.env.get(node.inputs[0])
    if value is None or value.axes != ((1,), (0,), (2,)) or node("layout", 0):
        return False
    reader.start(node.inputs[0], node, plain=False)
    reader.end(recurrent.recurrent(reader, node))
    return True


OF_ONE = ("Identity", "Flatten", "Transpose")  # operators of one input
OPS: Mapping[str, Several] = {
    **dict.fromkeys(recurrent.OPS, _recurrent),
    **dict.fromkeys(_MERGES, _merge),
    **dict.fromkeys(("Identity",), _same),
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), _reshape),
    **dict.fromkeys(("Tile", "Expand"), _tile),
    "Where": _where, "MatMul": _matmul, "Gemm": _gemm, "Einsum": _einsum, "Concat": _concat,
    "Split": _split, "Gather": _gather, "Slice": _slice, "Transpose": _transpose,
}  # fmt: skip
