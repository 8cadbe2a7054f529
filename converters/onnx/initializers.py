"""The arrays of an ONNX file alone, under its own names, and the file with other values of them:
its nodes, its metadata and whatever else it says stay as they are, to the byte."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import mmap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fwt import _live, _nodes, _tree
from fwt._modules import Known
from fwt._own_nodes import FromFile
from fwt._types import ConversionError, FileFormatError, Model, WhereError
from fwt.converters import io as _io
from fwt.converters.io import Reading, reading, write_atomically
from fwt.converters.onnx import graph as _graph
from fwt.converters.onnx import uses as _uses
from fwt.converters.onnx import wire
from fwt.converters.onnx.uses import Key, Use

Place = tuple[tuple[int, int | None], ...]  # the fields on the way to a message, as wire has them
_PARTS = ("kernels", "biases")  # as which a Constant is a weight


@dataclasses.dataclass(frozen=True)
class Held:
    """One array of a file: an initializer, or a Constant that a node reads as a weight."""

    key: Key
    tensor: Any
    place: Place


# -- what a file holds --------------------------------------------------------------------------


def load_arrays(path: Path, how: Reading) -> Model:
    """The arrays of a file under its own names, whatever its graph computes."""
    _io.without_key(path, how)
    with reading(path):
        held = _named(_graph.parsed(path), path)
        ours = {n: h.tensor for n, h in held.items() if _is_numeric(h.tensor)}
        if left := [n for n in held if n not in ours]:
            more = ", ..." if len(left) > 5 else ""
            warnings.warn(
                f"{path}: left out, since they are no numbers of whole bytes: "
                f"{', '.join(left[:5])}{more}",
                stacklevel=5,
            )
        one: dict[Any, np.ndarray] = {}  # what stands at one place outside is one array
        arrays = {}
        for name, tensor in ours.items():
            outside = tuple(sorted((e.key, e.value) for e in tensor.external_data))
            key = (outside, tensor.data_type, tuple(tensor.dims)) if outside else name
            if key not in one:
                one[key] = _graph.array_of(tensor, path, how.external)
            arrays[name] = one[key]
        return Model(None, {"params": arrays})


def _named(proto: Any, path: Path) -> dict[str, Held]:
    """The arrays of a file by name. One that two graphs within nodes have is told by its graph."""
    said = _uses_of(proto, path)
    found = list(_in_graph(proto.graph, (_field("ModelProto", "graph"),), (), said))
    plain = [h.key[1] for h in found]
    out: dict[str, Held] = {}
    for held in found:
        scope, name = held.key
        if not isinstance(name, str):  # no text
            name = ""
        if scope and name and plain.count(name) > 1:
            name = "/".join([*scope, name])
        if not name or name in out:
            raise FileFormatError(f"{path}: two of its arrays have one name, or one has none")
        out[name] = held
    return out


def _in_graph(
    graph: Any, place: Place, scope: tuple[str, ...], said: Mapping[Key, Sequence[Use]]
) -> Iterator[Held]:
    number = _field("GraphProto", "initializer")[0]
    for i, tensor in enumerate(graph.initializer):
        yield Held((scope, tensor.name), tensor, (*place, (number, i)))
    nodes, attributes = (_field("GraphProto", "node")[0], _field("NodeProto", "attribute")[0])
    for i, node in enumerate(graph.node):
        for j, attribute in enumerate(node.attribute):
            there = (*place, (nodes, i), (attributes, j))
            constant = node.op_type == "Constant" and attribute.name == "value" and node.output
            if constant and attribute.HasField("t"):
                key = (scope, node.output[0])
                if any(use.known.role in _PARTS for use in said.get(key, ())):
                    yield Held(key, attribute.t, (*there, _field("AttributeProto", "t")))
            if attribute.HasField("g"):
                inner = (*scope, _uses.scope_of(node, attribute))
                one = (*there, _field("AttributeProto", "g"))
                yield from _in_graph(attribute.g, one, inner, said)
            for k, each in enumerate(attribute.graphs):
                inner = (*scope, _uses.scope_of(node, attribute, k))
                one = (*there, (_field("AttributeProto", "graphs")[0], k))
                yield from _in_graph(each, one, inner, said)


@functools.cache
def _field(message: str, name: str) -> tuple[int, None]:
    import onnx

    return getattr(onnx, message).DESCRIPTOR.fields_by_name[name].number, None


def _is_numeric(tensor: Any) -> bool:
    import onnx

    if tensor.data_type in (0, onnx.TensorProto.STRING):
        return False
    name = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).name
    return not name.startswith(("int4", "uint4", "float4", "int2", "uint2"))


# -- what its nodes say -------------------------------------------------------------------------


def _uses_of(proto: Any, path: Path) -> dict[Key, list[Use]]:
    if proto.functions:
        import onnx
        import onnx.inliner

        _graph.check_functions(proto, path)
        try:
            proto = onnx.inliner.inline_local_functions(proto)
        except Exception as error:  # noqa: BLE001 - onnx raises any class: they stay unknown
            warnings.warn(
                f"{path}: its functions can't be taken apart ({error}), so that nothing is known "
                "of the arrays that they read",
                stacklevel=5,
            )
    return _uses.uses_of(proto)


@contextlib.contextmanager
def knowing(path: Path, model: Model) -> Iterator[Model]:
    """The arrays of a file for a transform, and inside what the nodes say that read them: the axes
    of each, and which are kernels. One that is read in several ways has a path for each."""
    with reading(path):
        known, also, quantised = _known(path)
    variables = dict(model.variables)
    if also:
        variables["params"] = FromFile(variables["params"], json.dumps({"also": also}))
    with _live.knowing(known, lambda grads, paths: grads, {}, {}):
        try:
            yield Model(None, variables)
        except WhereError as error:
            if not quantised or "where=fwt." not in str(error):
                raise
            raise WhereError(
                f"{error}; {quantised} is quantised, and its numbers only stand for weights: "
                "transform these before"
            ) from None


def _known(path: Path) -> tuple[dict[str, Known], dict[str, dict[str, tuple[int, ...]]], str]:
    """By path what nodes know of arrays, their other paths, and a kernel of quantised numbers."""
    proto = _graph.parsed(path)
    held, said = _named(proto, path), _uses_of(proto, path)
    known: dict[str, Known] = {}
    also: dict[str, dict[str, tuple[int, ...]]] = {}
    quantised = ""
    for name, one in held.items():
        place, shape = _tree.escape(name), tuple(one.tensor.dims)
        uses = said.get(one.key, ())
        if not _is_floating(one.tensor) and any(u.known.role == "kernels" for u in uses):
            quantised = quantised or name
        for role, node, told in _told(one.tensor, uses):
            if place not in known:
                known[place] = told
                continue
            other = _tree.escape(f"{name} as {role} of {node}")
            known[other] = told
            also.setdefault(place, {})[other] = shape
    return known, also, quantised


def _told(tensor: Any, uses: Sequence[Use]) -> list[tuple[str, str, Any]]:
    """By role, the first node that reads an array so, and what they know of it together. Integers
    are no kernels: what they stand for, and how they compare, hangs on scales."""
    rank = len(tensor.dims)
    empty = Known(("out",) if rank == 1 else ("",) * rank, role="others")
    if not _is_floating(tensor):
        return [("others", "", empty)]
    out: dict[str, tuple[str, Any]] = {}
    for use in uses:
        role = use.known.role or "others"
        names = ("",) * rank if role == "kernels" else empty.names  # a flat kernel is no bias
        told = dataclasses.replace(use.known, role=role, names=use.known.names or names)
        first, before = out.get(role, (use.node, told))
        if before != told:  # nothing tells which of them is meant
            before = dataclasses.replace(empty, names=("",) * rank, role=role)
        out[role] = first, before
    return [(role, *pair) for role, pair in out.items()] or [("others", "", empty)]


def _is_floating(tensor: Any) -> bool:
    """Whether its numbers are weights: those of one byte are scaled ones, as integers are."""
    import onnx

    if not _is_numeric(tensor):
        return False
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    return dtype.kind in "fcV" and dtype.itemsize > 1  # bfloat16 is V


# -- other values -------------------------------------------------------------------------------


def save_into(path: Path, source: Path, variables: Any) -> None:
    """The file that arrays alone come from, with these in the place of its own."""
    with reading(source):
        proto = _graph.parsed(source)
        held = _named(proto, source)
    changed = _changed(source, variables, {n: h for n, h in held.items() if _is_numeric(h.tensor)})
    with reading(source), open(source, "rb") as file:
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        said = _uses_of(proto, source) if changed else {}
        for name in changed:
            _check_zero(source, name, held[name], said.get(held[name].key, ()))
        files = _Outside(path, source, proto)
        edits: dict[Any, Any] = {}
        for name, value in changed.items():
            tensor = held[name].tensor
            if _is_outside(tensor):
                files.change(name, held[name], value)
            else:
                _put(edits, held[name].place, functools.partial(_inside, tensor, value))
        for place, edit in files.renamed():
            _put(edits, place, edit)
        chunks = wire.edited(data, edits)
    _write([(path, lambda file: _pieces(file, chunks)), *files.writes()])


def _changed(source: Path, variables: Any, held: Mapping[str, Held]) -> dict[str, np.ndarray]:
    """The arrays that are other ones than the file's, by name."""
    given = {
        "/".join(_io.parts_of_path(path)): value
        for collection, tree in variables.items()
        for path, value in _io.arrays(collection, tree).items()
    }
    if wrong := sorted(given.keys() ^ held.keys()):
        raise ConversionError(
            f"{source}: {wrong[0]} is not in both: the file is edited under the names that "
            "load(path, module=False) gives; load(path) and save(out, model) write another graph"
        )
    out = {}
    for name, one in held.items():
        new = np.asarray(given[name])
        with reading(source):
            old = _graph.array_of(one.tensor, source, True)
        if new.shape != old.shape or new.dtype != old.dtype:
            raise ConversionError(
                f"{source}: {name}: expected {old.dtype}{list(old.shape)}, as its graph has it, "
                f"found {new.dtype}{list(new.shape)}; load(path) and save(out, model) write "
                "another graph"
            )
        if _nodes.same_values(new, old) is False:
            out[name] = new
    return out


def _check_zero(source: Path, name: str, held: Held, uses: Sequence[Use]) -> None:
    if not _is_floating(held.tensor) and not (uses and all(use.exact for use in uses)):
        at = f" of {uses[0].node}" if uses else ""
        raise ConversionError(
            f"{source}: {name} holds numbers{at} of which 0 is not known to stand for 0, such as "
            "quantised ones, so they are left as they are: transform weights before they are "
            "quantised, or leave it out of where="
        )


def _put(edits: dict[Any, Any], place: Place, edit: Any) -> None:
    *above, last = place
    for step in above:
        edits = edits.setdefault(step, {})
    if isinstance(edit, dict):
        edits.setdefault(last, {}).update(edit)
    else:
        edits[last] = edit


_FIELDS = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")


def _inside(tensor: Any, value: np.ndarray, body: memoryview) -> list[wire.Chunk]:
    """The bytes of a tensor with other values, in the field that has them."""
    import onnx

    little = np.ascontiguousarray(value, value.dtype.newbyteorder("<"))
    raw = little.reshape(-1).view(np.uint8)
    name = "raw_data"
    data: wire.Chunk = memoryview(raw.data)
    if not tensor.HasField("raw_data"):
        name = next(n for n in _FIELDS if len(getattr(tensor, n)))
    if name.startswith(("int", "uint")):  # of varying lengths
        bits = little if value.dtype.kind in "iu" else raw.view(f"u{value.dtype.itemsize}")
        packed = onnx.TensorProto()
        getattr(packed, name).extend(bits.reshape(-1).tolist())
        whole = memoryview(packed.SerializeToString())
        data = next(whole[begin:end] for _, _, begin, end in wire.fields(whole))
    return wire.without(body, _field("TensorProto", name)[0], [data])


# -- files beside it ----------------------------------------------------------------------------


def _is_outside(tensor: Any) -> bool:
    import onnx

    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL)


class _Outside:
    """The files beside an ONNX file that hold arrays, and those of the new one."""

    def __init__(self, path: Path, source: Path, proto: Any):
        self._path, self._source = path, source
        self._tensors = [(t, place) for t, place in _tensors(proto, ()) if _is_outside(t)]
        places = dict.fromkeys(_entry(t, "location") for t, _ in self._tensors)
        self._names = {name: self._name_of(name) for name in places}
        self._new: dict[str, dict[int, tuple[str, np.ndarray]]] = {n: {} for n in places}
        self._written = set[Place]()

    @property
    def _itself(self) -> bool:
        return self._path.resolve() == self._source.resolve()

    def _name_of(self, name: str) -> str:
        """What a file is called beside the new one: as that is, where it was so before."""
        _io.sibling(self._source, name)
        old, new = self._source.name, self._path.name
        if old == new:
            found = name
        elif name.startswith(f"{old}."):
            found = new + name[len(old) :]
        elif name.startswith(f"{self._source.stem}."):
            found = self._path.stem + name[len(self._source.stem) :]
        else:
            found = f"{new}.{name}"
        there = self._path.parent / found
        if not self._itself and there.exists() and found not in _named_by(self._path):
            raise ConversionError(
                f"{self._path}: its arrays would stand beside it in {found}, which is another "
                "file's: remove it, or write elsewhere"
            )
        return found

    def change(self, name: str, held: Held, value: np.ndarray) -> None:
        tensor = held.tensor
        start = int(_entry(tensor, "offset") or 0)
        new = self._new[_entry(tensor, "location")]
        if start in new and not np.array_equal(_bytes(new[start][1]), _bytes(value)):
            raise ConversionError(
                f"{self._source}: {new[start][0]} and {name} are one array in its file, and were "
                "given different values: give both the same"
            )
        new[start] = name, value
        self._written.add(held.place)

    def _check(self) -> None:
        """Raises where arrays that change lie within others."""
        for tensor, place in self._tensors:
            start, new = int(_entry(tensor, "offset") or 0), self._new[_entry(tensor, "location")]
            size = _size_of(tensor)
            for at, (name, value) in new.items():
                apart = start >= at + value.nbytes or at >= start + size
                if not apart and (start != at or place not in self._written):
                    raise ConversionError(
                        f"{self._source}: {name} lies in its file where {tensor.name} does too, "
                        "and can't be written alone"
                    )

    def renamed(self) -> Iterator[tuple[Place, Any]]:
        """What tensors say of their files that is new: the name, and the sum of its bytes."""
        self._check()
        value = _field("StringStringEntryProto", "value")
        for tensor, place in self._tensors:
            name = _entry(tensor, "location")
            for i, entry in enumerate(tensor.external_data):
                new = {"location": self._names[name]}.get(entry.key, entry.value)
                if entry.key == "checksum" and self._new[name]:
                    new = self._sum(name)
                if new != entry.value:
                    there = (_field("TensorProto", "external_data")[0], i)
                    yield (*place, there, value), functools.partial(_text, new)

    def _sum(self, name: str) -> str:
        found = hashlib.sha1(usedforsecurity=False)
        self._copy(name, found.update)
        return found.hexdigest()

    def _copy(self, name: str, write: Callable[[Any], Any]) -> None:
        """The bytes of a file with the new values, a piece at a time."""
        new, at = self._new[name], 0
        with open(_io.sibling(self._source, name), "rb") as file:
            for start, (_, value) in sorted(new.items()):
                _through(file, start - at, write)
                data = memoryview(_bytes(value).data)
                for i in range(0, len(data), 1 << 24):
                    write(data[i : i + (1 << 24)])
                at = start + len(data)
                file.seek(at)
            _through(file, None, write)

    def writes(self) -> Iterator[tuple[Path, Callable[[Any], None]]]:
        """The files to write beside the new one, and what writes each."""
        for old, new in self._names.items():
            if self._new[old] or not self._itself:
                there = self._path.parent / new
                yield there, functools.partial(self._into, old)

    def _into(self, name: str, file: Any) -> None:
        self._copy(name, file.write)


def _through(file: Any, size: int | None, write: Callable[[Any], Any]) -> None:
    while size is None or size > 0:
        piece = file.read(1 << 24 if size is None else min(size, 1 << 24))
        if not piece:
            return
        write(piece)
        size = None if size is None else size - len(piece)


def _bytes(value: np.ndarray) -> np.ndarray:
    little = np.ascontiguousarray(value, value.dtype.newbyteorder("<"))
    return little.reshape(-1).view(np.uint8)


def _entry(tensor: Any, key: str) -> str:
    return next((str(e.value) for e in tensor.external_data if e.key == key), "")


def _size_of(tensor: Any) -> int:
    import onnx

    if length := _entry(tensor, "length"):
        return int(length)
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    return math.prod(tensor.dims) * dtype.itemsize


def _text(new: str, body: memoryview) -> list[wire.Chunk]:
    return [new.encode()]


_INSIDE = {
    "ModelProto": ("graph", "training_info", "functions"),
    "TrainingInfoProto": ("initialization", "algorithm"),
    "FunctionProto": ("node", "attribute_proto"),
    "GraphProto": ("node", "initializer", "sparse_initializer"),
    "NodeProto": ("attribute",),
    "AttributeProto": ("t", "g", "tensors", "graphs", "sparse_tensor", "sparse_tensors"),
    "SparseTensorProto": ("values", "indices"),
}


def _tensors(message: Any, place: Place) -> Iterator[tuple[Any, Place]]:
    """All tensors of a message, and where each is."""
    kind = message.DESCRIPTOR.name
    if kind == "TensorProto":
        yield message, place
    for name in _INSIDE.get(kind, ()):
        number = _field(kind, name)
        value = getattr(message, name)
        if hasattr(value, "DESCRIPTOR"):
            if message.HasField(name):
                yield from _tensors(value, (*place, number))
            continue
        for i, each in enumerate(value):
            yield from _tensors(each, (*place, (number[0], i)))


def _named_by(path: Path) -> set[str]:
    """The files beside an ONNX file that it names; none where there is no such file."""
    with contextlib.suppress(FileFormatError, OSError), reading(path):
        return {
            _entry(t, "location") for t, _ in _tensors(_graph.parsed(path), ()) if _is_outside(t)
        }
    return set()


def _pieces(file: Any, chunks: Sequence[wire.Chunk]) -> None:
    for chunk in chunks:
        for start in range(0, len(chunk), 1 << 24):
            file.write(chunk[start : start + (1 << 24)])


def _write(files: Sequence[tuple[Path, Callable[[Any], None]]]) -> None:
    """Several files, of which none takes its place before all are written."""
    (path, write), *more = files

    def whole(file: Any) -> None:
        write(file)
        if more:
            file.flush()
            _write(more)

    write_atomically(path, whole)
