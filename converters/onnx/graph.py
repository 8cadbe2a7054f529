"""An ONNX file as checked nodes and arrays: nothing runs, and sizes are checked first."""

import dataclasses
import heapq
import importlib.util
import math
import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fwt._types import FileFormatError
from fwt.converters import io as _io
from fwt.converters.onnx import older
from fwt.converters.onnx.numbers import (
    MOST_FILLED,
    MOVES,
    POINTWISE,
    ZEROS,
    Node,
    folded,
    owned,
)
from fwt.converters.rows.row import refuse

OPSETS = range(9, 29)
MOST_NODES = 100_000


class Graph:
    """The nodes between inputs and outputs, and what is known of the values between them.

    Attributes:
        nodes: those that compute with the input.
        known: the arrays by name: initializers, and what is computed from numbers alone. A size
            that is the batch's is -1 in them.
        shapes: of each value as far as known; None for a size that is not.
    """

    def __init__(self, proto: Any, path: Path, external: bool):
        self.path = path
        self.opset = _opset(proto, path)
        graph = proto.graph
        if len(graph.node) > MOST_NODES:
            raise FileFormatError(f"{path}: it has {len(graph.node):,} nodes, at most "
                                  f"{MOST_NODES:,} are read")  # fmt: skip
        if graph.sparse_initializer:
            raise FileFormatError(f"{path}: it has sparse arrays")
        self.known: dict[str, Any] = {}
        # The numbers among which the batch's size is, as -1, or a multiple of it, and where.
        self.of_batch: dict[str, np.ndarray] = {}
        self.origin: dict[str, str] = {}  # of which array of the file another is, entry by entry
        self.turned: dict[str, str] = {}  # by name of a matrix, of which other it is the transpose
        self.alike: set[str] = set()  # arrays with one entry along the batch, for each the same
        self.left = (64 << 20) + 4 * path.stat().st_size  # bytes that folding may take
        self.filled = MOST_FILLED  # bytes that it may fill with what repeats
        for tensor in graph.initializer:
            self.known[tensor.name] = array_of(tensor, path, external)
        self.own = set(self.known)  # what the file has under a name of its own
        given = [v for v in graph.input if v.name not in self.known]
        self.inputs = [v.name for v in given]
        self.outputs = [v.name for v in graph.output]
        if not self.inputs or not self.outputs:
            raise FileFormatError(
                f"{path}: it has {len(self.inputs)} inputs and {len(self.outputs)} outputs, "
                "expected at least one of each"
            )
        self.shapes, self.types = _shapes(proto, path, {})
        self.dtypes = {v.name: v.type.tensor_type.elem_type for v in given}
        sizes: set[Any] = set()
        for name in self.inputs:
            if not self.shapes.get(name):
                raise FileFormatError(f"{path}: it does not say the rank of its input {name!r}")
            sizes.add(self.shapes[name][0])
        if len(sizes) > 1:
            raise FileFormatError(
                f"{path}: the first axes of its inputs, the batch, have the sizes "
                f"{', '.join(sorted(map(str, sizes)))}"
            )
        self.batch = sizes.pop()
        self.nodes: list[Node] = []
        told: dict[str, list[int]] = {}
        nodes = _needed([_node(n, path) for n in graph.node], self.outputs)
        self.said = {n.output[0]: n for n in graph.node if n.output}
        for _ in range(200):  # once for each recurrent layer behind another
            self.nodes = []
            for node in nodes:
                self._take(node)
            # Shapes may depend on numbers that were computed now.
            small = {n: v for n, v in self.known.items() if n not in self.own and v is not ZEROS
                     and v.dtype == np.int64 and v.size <= 64
                     and np.sum(v < 0 if n in self.of_batch else v == -1) < 2
                     and (n not in self.of_batch or _only_reshapes(nodes, n))}  # fmt: skip
            small |= {n: np.maximum(small[n], -1) for n in small if n in self.of_batch}
            found = {n: v.tolist() for n, v in small.items()}
            if found == told:
                break
            told = found
            self.shapes, self.types = _shapes(proto, path, small)
        self.nodes = _needed(self.nodes, self.outputs)
        for n in self.nodes:
            for i, name in enumerate(n.inputs):
                if name in self.of_batch and i not in _MAY_TAKE.get(n.op, ()):
                    raise refuse(str(n), f"its input {name!r} is the batch's size as a number")
                if name in self.alike and n.op not in _OF_EACH:
                    raise refuse(str(n), f"it takes {name!r}, an array as long as the batch")
        self.place = {id(n): i for i, n in enumerate(self.nodes)}
        self.users: dict[str, list[Node]] = {}
        for n in self.nodes:
            for name in dict.fromkeys(n.inputs):
                self.users.setdefault(name, []).append(n)
        for name in self.outputs:
            end = Node("", f"the output {name!r}", [name], [], {})
            self.users.setdefault(name, []).append(end)

    def _take(self, node: Node) -> None:
        if node.op == "Constant":
            value = node("value")
            for other in ("value_float", "value_int", "value_floats", "value_ints"):
                if value is None and node(other) is not None:
                    kind = np.float32 if "float" in other else np.int64
                    value = np.asarray(node(other), kind)
            if not isinstance(value, np.ndarray):
                raise refuse(str(node), "a constant of no known kind")
            self.known[node.outputs[0]] = value
            return
        if node.op == "CastLike" and node.inputs[1] in self.types:
            node = Node("Cast", node.name, node.inputs[:1], node.outputs,
                        {**node.attributes, "to": self.types[node.inputs[1]]})  # fmt: skip
        shape = self.shapes.get(node.inputs[0]) if node.inputs else None
        if shape is None and node.inputs and hasattr(self.known.get(node.inputs[0]), "shape"):
            shape = self.known[node.inputs[0]].shape
        if node.op == "Shape" and shape is not None and shape.count(None) < 3:
            sizes = [-1 if s is None else s for s in shape]
            there = slice(node("start", 0), node("end"))
            value, free = np.array(sizes[there], np.int64), np.array([s is None for s in shape])
            self._know(node.outputs[0], value, free[there])
            return
        if node.op == "Reshape" and node.inputs[1] in self.of_batch and shape is not None:
            self._settle(node, shape)
        given = [self.known.get(n) if n else None for n in node.inputs]
        numbers = given and all(g is not None or not n for g, n in zip(given, node.inputs))
        batch = [i for i, n in enumerate(node.inputs) if n in self.of_batch]
        moves = node.op in MOVES and (node.op in _MAY_TAKE or not any(batch))
        if numbers and batch and node.op == "Expand" and self._of_each(node, *given):
            return
        if numbers and batch and node.op in _CHOOSES and self._chosen(node, given):
            return
        products = node.op in ("Mul", "Div", "ReduceProd") and len(batch) == 1
        if numbers and (moves or not batch or products):
            values = folded(self, node, given)
            where = self._where(node, given, values) if batch and values else None
            if values is not None and not (batch and (
                where is None or np.any(np.asarray(values[0])[where] >= 0)
            )):  # fmt: skip
                for name, value in zip(node.outputs, values, strict=True):
                    self._know(name, value, where)
                first = self.origin.get(node.inputs[0], node.inputs[0])
                if node.op in _KEEPS and first in self.own:
                    self.origin[node.outputs[0]] = first
                if node.op == "Transpose" and np.ndim(values[0]) == 2 and node("perm") != [0, 1]:
                    self.turned[node.outputs[0]] = node.inputs[0]
                return
        self.nodes.append(node)

    def _chosen(self, node: Node, given: list[Any]) -> bool:
        """Comparisons of sizes with what no batch's is, and choices among sizes, by which torch's
        expand says -1, and tf2onnx which of two batches is repeated."""
        if any(g is ZEROS for g in given):
            return False
        shape = np.broadcast_shapes(*(np.shape(g) for g in given))
        free = [np.broadcast_to(self.of_batch.get(n, False), shape) for n in node.inputs]
        if node.op == "Equal":
            a, b = (np.broadcast_to(g, shape) for g in given)
            if np.any(free[0] & (free[1] | (b > 0))) or np.any(free[1] & (a > 0)):
                return False
            self._know(node.outputs[0], (a == b) & ~free[0] & ~free[1], None)
            return True
        if node.op == "Max":  # of one size twice, or of one and 1
            a, b = (np.broadcast_to(g, shape) for g in given)
            least = np.where(free[0] & free[1], a == b, ~(free[0] | free[1]))
            if not np.all(
                least | (free[0] & ~free[1] & (b == 1)) | (free[1] & ~free[0] & (a == 1))
            ):
                return False
            value = np.where(free[0], a, np.where(free[1], b, np.maximum(a, b)))
            self._know(node.outputs[0], value, free[0] | free[1])
            return True
        if node.inputs[0] in self.of_batch:
            return False
        self._know(node.outputs[0], np.where(*given), np.where(given[0], *free[1:]))
        return True

    def _settle(self, node: Node, shape: tuple[int | None, ...]) -> None:
        """Says the size that a Reshape leaves open beside the batch's."""
        name = node.inputs[1]
        target, free = self.known[name].copy(), self.of_batch[name]
        left = [i for i, (n, f) in enumerate(zip(target, free, strict=True)) if n == -1 and not f]
        if len(left) != 1 or shape.count(None) != 1 or np.any(target == 0) or np.sum(free) != 1:
            return
        whole = math.prod(s for s in shape if s is not None)
        others = -math.prod(int(n) for i, n in enumerate(target) if i not in left)
        if others <= 0 or whole % others:
            return
        target[left[0]] = whole // others
        new = f"{name}/{node.outputs[0]}"
        self.known[new], self.of_batch[new] = target, free
        node.inputs[1] = self.said[node.outputs[0]].input[1] = new

    def _where(self, node: Node, given: list[Any], values: list[Any]) -> Any:
        """Where in what a node makes of numbers the batch's size is; None if that is lost."""
        if values[0] is ZEROS or node.op in ("Expand", "ConstantOfShape", "Size"):
            return np.zeros(np.shape(values[0]), bool) if values[0] is not ZEROS else False
        free = [self.of_batch.get(n) for n in node.inputs]
        if node.op in ("Mul", "Div"):
            if node.op == "Div" and (free[0] is None or np.any(given[0] % given[1])):
                return None
            found = next(f for f in free if f is not None)
            return np.broadcast_to(found, np.shape(values[0]))
        if node.op == "ReduceProd":
            count = dataclasses.replace(node, op="ReduceSum", taken=set())
            there = self.of_batch[node.inputs[0]].astype(np.int64)
            sums = folded(self, count, [there, *given[1:]])
            return None if sums is None or np.any(sums[0] > 1) else sums[0] > 0
        data = range(len(given)) if node.op == "Concat" else (0,)
        marks = [
            (np.zeros(np.shape(g), np.int64) if f is None else f.astype(np.int64))
            if i in data
            else g
            for i, (g, f) in enumerate(zip(given, free, strict=True))
        ]
        if node.op == "Cast":
            return free[0]
        return np.asarray((folded(self, node, marks) or [None])[0], bool)

    def _of_each(self, node: Node, x: Any, shape: Any) -> bool:
        """An array repeated for each example, such as a token before the others: one is kept."""
        where = self.of_batch[node.inputs[1]]
        at = np.flatnonzero(where).tolist()
        if x is ZEROS or at != [0] or shape[0] != -1 or (x.ndim == len(shape) and len(x) != 1):
            return False
        found = folded(self, node, [x, np.where(where, 1, shape)])
        if found is None:
            return False
        self.alike.add(node.outputs[0])
        if np.shape(found[0]) == np.shape(x) and node.inputs[0] in self.own:
            self.origin[node.outputs[0]] = node.inputs[0]
        self._know(node.outputs[0], found[0], None)
        return True

    def _know(self, name: str, value: Any, free: Any) -> None:
        self.of_batch.pop(name, None)  # with the shapes of before it may have been
        if value is not ZEROS:
            self.left -= owned(value)
            self.filled -= value.nbytes - owned(value)
            if min(self.left, self.filled) < 0:
                raise FileFormatError(f"{self.path}: its constants grow beyond what it holds")
            if free is not None and np.any(free):
                self.of_batch[name] = np.asarray(free)
        self.known[name] = value

    def const(self, node: Node, index: int, default: Any = None) -> Any:
        """The array that an input is; None where it is left out."""
        node.taken.add(index)
        if index >= len(node.inputs) or not node.inputs[index]:
            return default
        value = self.known.get(node.inputs[index])
        if value is None:
            raise refuse(
                str(node), f"its input {node.inputs[index]!r} is computed, expected numbers"
            )
        return value

    def has_floats(self, name: str) -> bool:
        """Whether a value has floating numbers, as far as is known."""
        return self.types.get(name, 1) in (1, 10, 11, 16)

    def rank(self, name: str, node: Node) -> int:
        """How many axes a value has."""
        shape = self.shapes.get(name)
        if shape is None:
            raise refuse(str(node), f"the rank of {name!r} is not known")
        return len(shape)

    def shape(self, name: str, node: Node) -> tuple[Any, ...]:
        """The sizes of a value; all but the batch's must be known."""
        shape = self.shapes.get(name)
        if shape is None or None in shape[1:]:
            raise refuse(str(node), f"the shape of {name!r} is not known, found {shape}",
                         "export it with fixed sizes (but for the batch)")  # fmt: skip
        return shape

    def regions(self, start: str, first: Node) -> list[tuple[list[Node], str]]:
        """The nodes that make one value of another and nothing else, by where they end: such runs
        as begin with a node, among them those that a pattern may be told by."""
        inside: dict[str, Node] = {}
        queue = [(self.place[id(n)], n) for n in self.users.get(start, []) if n.outputs]
        heapq.heapify(queue)
        seen: set[int] = set()
        out = []
        while queue and len(seen) < _LARGEST:
            place, node = heapq.heappop(queue)
            known = all(n == start or n in inside or n in self.known or not n for n in node.inputs)
            if place in seen or not known or node.op not in IN_REGIONS:
                continue
            seen.add(place)
            for name in node.outputs:
                inside[name] = node
                for n in self.users.get(name, []):
                    if n.outputs:
                        heapq.heappush(queue, (self.place[id(n)], n))
            if len(node.outputs) == 1 and (found := self._closed(start, node, inside, first)):
                out.append((found, node.outputs[0]))
        return out

    def _closed(
        self, start: str, last: Node, inside: Mapping[str, Node], first: Node
    ) -> list[Node] | None:
        """The nodes that one value is made by, if nothing else takes what is between."""
        found: dict[int, Node] = {}
        left = [last]
        while left:
            node = left.pop()
            found[self.place[id(node)]] = node
            left += [inside[n] for n in node.inputs if n in inside
                     and self.place[id(inside[n])] not in found]  # fmt: skip
        if self.place[id(first)] not in found:
            return None
        for node in found.values():
            for name in node.outputs if node is not last else ():
                if any(not n.outputs or self.place[id(n)] not in found
                       for n in self.users.get(name, [])):  # fmt: skip
                    return None
        return [found[i] for i in sorted(found)]


def parsed(path: Path) -> Any:
    """A model as its file has it: with its functions, and of any opset."""
    if importlib.util.find_spec("onnx") is None:
        raise ImportError("ONNX files need onnx: pip install 'fwt[onnx]'", name="onnx")
    import onnx

    size = path.stat().st_size
    if size > 2**31:
        raise FileFormatError(f"{path}: {size:,} bytes are more than an ONNX file can have")
    proto = onnx.ModelProto.FromString(path.read_bytes())
    if not proto.HasField("graph") or not (proto.graph.node or proto.graph.output):
        raise FileFormatError(f"{path}: no ONNX file: it has no graph")
    return proto


def proto_of(path: Path) -> Any:
    proto = parsed(path)
    import onnx.inliner

    if proto.functions:
        check_functions(proto, path)
        proto = onnx.inliner.inline_local_functions(proto)
    version = _version(proto)
    if version is not None and 0 < version < OPSETS.start:
        return older.raised(proto, version, OPSETS.start, path)
    return proto


def _version(proto: Any) -> int | None:
    found = {o.domain: o.version for o in proto.opset_import}
    version = found.get("", found.get("ai.onnx"))
    return None if version is None else int(version)


def check_functions(proto: Any, path: Path) -> None:
    """Raises if what functions call is more than a graph may have."""
    bodies = {(f.domain, f.name): f for f in proto.functions}
    counts: dict[Any, int] = {}

    def count(nodes: Any, inside: tuple[Any, ...]) -> int:
        total = 0
        for node in nodes:
            key = (node.domain, node.op_type)
            if key not in bodies:
                total += 1
                continue
            if key in inside or len(inside) > 50:
                raise FileFormatError(f"{path}: the function {node.op_type!r} calls itself")
            if key not in counts:
                counts[key] = count(bodies[key].node, (*inside, key))
            total += counts[key]
        return total

    if count(proto.graph.node, ()) > MOST_NODES:
        raise FileFormatError(f"{path}: its functions make more than {MOST_NODES:,} nodes")


# Where the batch's size may be an input: it is the size of an axis there.
_LARGEST = 24  # nodes that are looked at for a pattern
IN_REGIONS = {*POINTWISE, "Cast", "ReduceMean", "ReduceMax", "ReduceSum", "GlobalAveragePool",
              "Reshape", "Slice", "Concat", "Split"}  # fmt: skip
_CHOOSES = ("Equal", "Where", "Max")
_KEEPS = ("Identity", "Unsqueeze", "Squeeze", "Reshape")  # what an array keeps its entries in
# What may take an array that has one entry along the batch for all.
_OF_EACH = ("Add", "Sub", "Mul", "Div", "Concat", "Identity", "Max", "Min")
_MAY_TAKE = {"Reshape": (1,), "Expand": (1,), "Concat": (), "Resize": (3,), "ConstantOfShape": (0,)}


def _only_reshapes(nodes: list[Node], name: str) -> bool:
    """Whether numbers are the target of Reshapes alone, where -1 may stand for the batch."""
    return all(n.op == "Reshape" and n.inputs[1:2] == [name] for n in nodes if name in n.inputs)


def _needed(nodes: list[Node], outputs: list[str]) -> list[Node]:
    """The nodes that the outputs hang on."""
    names, kept = set(outputs), []
    for node in reversed(nodes):
        if names.intersection(node.outputs):
            names.update(node.inputs)
            kept.append(node)
    return kept[::-1]


def _opset(proto: Any, path: Path) -> int:
    version = _version(proto)
    if version not in OPSETS:
        raise FileFormatError(f"{path}: opset {version}, known are those up to {OPSETS.stop - 1}")
    assert version is not None
    return version


def _node(node: Any, path: Path) -> Node:
    import onnx

    name = node.name or (node.output[0] if node.output else "")
    if node.domain not in ("", "ai.onnx"):
        raise refuse(f"{path}: {name}", f"{node.domain}.{node.op_type} is no standard operator")
    attributes: dict[str, Any] = {}
    for a in node.attribute:
        kind = onnx.AttributeProto
        if a.type in (kind.GRAPH, kind.GRAPHS):
            raise refuse(f"{path}: {name} ({node.op_type})", "it has a graph of its own")
        if a.type == kind.TENSOR:
            attributes[a.name] = array_of(a.t, path, False)
        elif a.type in (kind.FLOAT, kind.INT, kind.FLOATS, kind.INTS, kind.STRING, kind.STRINGS):
            value = onnx.helper.get_attribute_value(a)
            if a.type == kind.STRING:
                value = value.decode(errors="replace")
            elif a.type == kind.STRINGS:
                value = [v.decode(errors="replace") for v in value]
            attributes[a.name] = list(value) if isinstance(value, Sequence) and not isinstance(
                value, str) else value  # fmt: skip
        else:
            raise refuse(f"{path}: {name} ({node.op_type})", f"its attribute {a.name!r}")
    if not node.output:
        raise refuse(f"{path}: {name} ({node.op_type})", "it has no output")
    return Node(node.op_type, node.name, list(node.input), list(node.output), attributes)


def _shapes(
    proto: Any, path: Path, known: Mapping[str, np.ndarray]
) -> tuple[dict[str, tuple[int | None, ...]], dict[str, int]]:
    """The sizes and the dtypes of values."""
    import onnx

    # Without the arrays (only small ones, which may be shapes, are looked at) and without what the
    # file says itself, which may be wrong.
    light = onnx.ModelProto()
    light.CopyFrom(proto) if proto.ByteSize() < 1 << 22 else _copy(proto, light)
    del light.graph.value_info[:]
    for i in reversed(range(len(light.graph.node))):
        if any(o in known for o in light.graph.node[i].output):
            del light.graph.node[i]
    for name, value in known.items():
        light.graph.initializer.add().CopyFrom(onnx.numpy_helper.from_array(value, name))
    inferred = onnx.shape_inference.infer_shapes(light).graph
    out: dict[str, tuple[int | None, ...]] = {}
    types = {name: int(onnx.helper.np_dtype_to_tensor_dtype(v.dtype)) for name, v in known.items()}
    for told in (*inferred.value_info, *inferred.input, *inferred.output):
        if told.type.HasField("tensor_type") and told.type.tensor_type.HasField("shape"):
            dims = told.type.tensor_type.shape.dim
            out[told.name] = tuple(
                int(d.dim_value) if d.HasField("dim_value") and d.dim_value > 0 else None
                for d in dims
            )
            types[told.name] = told.type.tensor_type.elem_type
    return out, types


def _copy(proto: Any, light: Any) -> None:
    """A model with its large arrays as inputs."""
    light.ir_version = max(proto.ir_version, 4)
    light.opset_import.extend(proto.opset_import)
    light.graph.node.extend(proto.graph.node)
    light.graph.input.extend(proto.graph.input)
    light.graph.output.extend(proto.graph.output)
    light.graph.name = "g"
    named = {v.name for v in proto.graph.input}
    for tensor in proto.graph.initializer:
        if tensor.ByteSize() < 4096:
            light.graph.initializer.add().CopyFrom(tensor)
        elif tensor.name not in named:
            value = light.graph.input.add(name=tensor.name)
            value.type.tensor_type.elem_type = tensor.data_type
            for d in tensor.dims:
                value.type.tensor_type.shape.dim.add(dim_value=d)


def array_of(tensor: Any, path: Path, external: bool) -> np.ndarray:
    """The array of a tensor: its size is checked before anything is made."""
    import onnx

    place = f"{path}: the array {tensor.name!r}"
    if tensor.data_type in (0, onnx.TensorProto.STRING):
        raise FileFormatError(f"{place} holds no numbers")
    dims = tuple(tensor.dims)
    if len(dims) > 32 or any(d < 0 for d in dims):
        raise FileFormatError(f"{place} has the shape {dims}")
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    if dtype.name.startswith(("int4", "uint4", "float4", "int2", "uint2")):
        raise FileFormatError(f"{place} holds numbers of less than a byte")
    size = math.prod(dims) * dtype.itemsize
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return _outside(tensor, path, external, dtype, dims, size)
    if tensor.HasField("raw_data"):
        if len(tensor.raw_data) != size:
            raise FileFormatError(
                f"{place} has {len(tensor.raw_data):,} bytes, expected {size:,} for {dims}"
            )
    elif size > 16 * tensor.ByteSize():
        raise FileFormatError(f"{place} has fewer values than its shape {dims} says")
    _io.progress(size)
    return np.asarray(onnx.numpy_helper.to_array(tensor))


def _outside(
    tensor: Any, path: Path, external: bool, dtype: np.dtype, dims: tuple[int, ...], size: int
) -> np.ndarray:
    told = {e.key: e.value for e in tensor.external_data}
    if not external:
        raise FileFormatError(
            f"{path}: the array {tensor.name!r} is in another file, {told.get('location')!r}; give "
            "external_data=True if you trust it to be read"
        )
    there = _io.sibling(path, told.get("location"))
    start, length = int(told.get("offset", 0)), int(told.get("length", size))
    if start < 0 or length != size or start + length > there.stat().st_size:
        raise FileFormatError(
            f"{path}: the array {tensor.name!r} takes {length:,} bytes from {start:,} on, of "
            f"{there.stat().st_size:,} in {there.name}; expected {size:,}"
        )
    _io.progress(size)
    if not size:
        return np.zeros(dims, dtype)
    with open(there, "rb") as file:
        whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(whole, dtype, math.prod(dims), start).reshape(dims)
