"""An ONNX file as checked nodes and arrays: nothing runs, and sizes are checked first."""

import importlib.util
import itertools
import math
import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fwt._types import FileFormatError
from fwt.converters import io as _io
from fwt.converters.onnx import older
from fwt.converters.onnx.numbers import MOST_FILLED, MOVES, ZEROS, Node, folded, owned
from fwt.converters.rows.row import refuse

OPSETS = range(9, 29)
MOST_NODES = 100_000


class Graph:
    """The nodes between one input and one output, and what is known of the values between them.

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
        self.of_batch: set[str] = set()  # the numbers in which the batch's size is -1
        self.left = (64 << 20) + 4 * path.stat().st_size  # bytes that folding may take
        self.filled = MOST_FILLED  # bytes that it may fill with what repeats
        for tensor in graph.initializer:
            self.known[tensor.name] = array_of(tensor, path, external)
        inputs = [v for v in graph.input if v.name not in self.known]
        if len(inputs) != 1 or len(graph.output) != 1:
            names = [v.name for v in inputs], [v.name for v in graph.output]
            raise FileFormatError(
                f"{path}: only a graph of one input and one output is read, found the inputs "
                f"{names[0]} and the outputs {names[1]}"
            )
        self.input, self.output = inputs[0].name, graph.output[0].name
        self.shapes, self.types = _shapes(proto, path, {})
        self.dtype = inputs[0].type.tensor_type.elem_type
        shape = self.shapes.get(self.input)
        if not shape:
            raise FileFormatError(f"{path}: it does not say the rank of its input {self.input!r}")
        self.batch = shape[0]
        self.nodes: list[Node] = []
        given = set(self.known)
        told: dict[str, list[int]] = {}
        nodes = _needed([_node(n, path) for n in graph.node], self.output)
        for _ in range(200):  # once for each recurrent layer behind another
            self.nodes = []
            for node in nodes:
                self._take(node)
            # Shapes may depend on numbers that were computed now.
            small = {n: v for n, v in self.known.items() if n not in given and v is not ZEROS
                     and v.dtype == np.int64 and v.size <= 64 and np.sum(v == -1) < 2
                     and (n not in self.of_batch or _only_reshapes(nodes, n))}  # fmt: skip
            sizes = {n: v.tolist() for n, v in small.items()}
            if sizes == told:
                break
            told = sizes
            self.shapes, self.types = _shapes(proto, path, small)
        self.nodes = _needed(self.nodes, self.output)
        for n in self.nodes:
            for i, name in enumerate(n.inputs):
                if name in self.of_batch and i not in _MAY_TAKE.get(n.op, ()):
                    raise refuse(str(n), f"its input {name!r} is the batch's size as a number")
        self.place = {id(n): i for i, n in enumerate(self.nodes)}
        self.users: dict[str, list[Node]] = {}
        for n in self.nodes:
            for name in dict.fromkeys(n.inputs):
                self.users.setdefault(name, []).append(n)

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
            value = np.array(sizes[node("start", 0) : node("end")], np.int64)
            self._know(node.outputs[0], value, None in shape)
            return
        given = [self.known.get(n) if n else None for n in node.inputs]
        numbers = given and all(g is not None or not n for g, n in zip(given, node.inputs))
        batch = [i for i, n in enumerate(node.inputs) if n in self.of_batch]
        moves = node.op in MOVES and (node.op in _MAY_TAKE or not any(batch))
        if numbers and (moves or not batch):
            values = folded(self, node, given)
            lost = batch and node.op == "Cast" and not np.any(values and values[0] == -1)
            if values is not None and not lost:
                for name, value in zip(node.outputs, values, strict=True):
                    self._know(name, value, bool(batch))
                return
        self.nodes.append(node)

    def _know(self, name: str, value: Any, batch: bool) -> None:
        if value is not ZEROS:
            self.left -= owned(value)
            self.filled -= value.nbytes - owned(value)
            if min(self.left, self.filled) < 0:
                raise FileFormatError(f"{self.path}: its constants grow beyond what it holds")
            if batch and np.any(value == -1):
                self.of_batch.add(name)
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

    def block(self, start: str) -> tuple[list[Node], str]:
        """The nodes from a value to the next one through which everything goes, and that one."""
        inside, inner = {start}, []
        users = self.users.get(start, ())
        left = {start: len(users)}
        first = min((self.place[id(n)] for n in users), default=0)
        for node in itertools.islice(self.nodes, first, None):
            taken = [n for n in dict.fromkeys(node.inputs) if n in inside]
            if not taken:
                continue
            inner.append(node)
            for name in taken:
                left[name] -= 1
            for name in node.outputs:
                if name in self.users or name == self.output:
                    inside.add(name)
                    left[name] = len(self.users.get(name, ()))
            live = [n for n, count in left.items() if count or n == self.output]
            if len(live) == 1 and live[0] != start:
                return inner, live[0]
        names = ", ".join(str(n) for n in inner[:3]) or start
        raise refuse(str(self.path), f"what follows {start!r} does not come together ({names})")


def proto_of(path: Path) -> Any:
    if importlib.util.find_spec("onnx") is None:
        raise ImportError("ONNX files need onnx: pip install 'fwt[onnx]'", name="onnx")
    import onnx
    import onnx.inliner

    size = path.stat().st_size
    if size > 2**31:
        raise FileFormatError(f"{path}: {size:,} bytes are more than an ONNX file can have")
    proto = onnx.ModelProto.FromString(path.read_bytes())
    if not proto.HasField("graph") or not (proto.graph.node or proto.graph.output):
        raise FileFormatError(f"{path}: no ONNX file: it has no graph")
    if proto.functions:
        _check_functions(proto, path)
        proto = onnx.inliner.inline_local_functions(proto)
    version = _version(proto)
    if version is not None and 0 < version < OPSETS.start:
        return older.raised(proto, version, OPSETS.start, path)
    return proto


def _version(proto: Any) -> int | None:
    found = {o.domain: o.version for o in proto.opset_import}
    version = found.get("", found.get("ai.onnx"))
    return None if version is None else int(version)


def _check_functions(proto: Any, path: Path) -> None:
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
_MAY_TAKE = {"Reshape": (1,), "Expand": (1,), "Concat": (), "Resize": (3,), "ConstantOfShape": (0,)}


def _only_reshapes(nodes: list[Node], name: str) -> bool:
    """Whether numbers are the target of Reshapes alone, where -1 may stand for the batch."""
    return all(n.op == "Reshape" and n.inputs[1:2] == [name] for n in nodes if name in n.inputs)


def _needed(nodes: list[Node], output: str) -> list[Node]:
    """The nodes that the output hangs on."""
    names, kept = {output}, []
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
