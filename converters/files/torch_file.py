"""torch's .pt files: a zip of a pickle and raw storages, read and written without torch."""

import io
import json
import math
import pickle
import pickletools
import reprlib
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fwt import _nodes
from fwt._types import ConversionError, FileFormatError, Model
from fwt.converters import io as _io
from fwt.converters.files import source as _source
from fwt.converters.frameworks import flax as _flax
from fwt.converters.frameworks.torch_layers import fold_torch, torch_state
from fwt.converters.io import Budget, Reading, dtype_of, member, nested, opened, reading
from fwt.converters.rows.row import parts_of, refuse
from fwt.converters.walk import convert

_STORAGES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}
_OURS = "fwt.json"  # a member beside torch's own: what a state dict has no place for
# Younger dtypes have no storage class: torch names the dtype itself.
_DTYPES = {
    *("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2"),
    *("float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
}
# Plain values of torch beside tensors, which a checkpoint may hold and a state dict may not.
_OTHERS = {"Size", "device", "dtype"}
# Opcodes that build plain data; what is not here (INST, OBJ, NEWOBJ, EXT*, ...) is refused.
_OPCODES = frozenset(
    [
        "PROTO",
        "STOP",
        "MARK",
        "POP",
        "POP_MARK",
        "NONE",
        "NEWTRUE",
        "NEWFALSE",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG1",
        "BINFLOAT",
        "BINUNICODE",
        "SHORT_BINSTRING",
        "BINSTRING",
        "EMPTY_LIST",
        "APPEND",
        "APPENDS",
        "EMPTY_TUPLE",
        "TUPLE",
        "TUPLE1",
        "TUPLE2",
        "TUPLE3",
        "EMPTY_DICT",
        "SETITEM",
        "SETITEMS",
        "BINGET",
        "LONG_BINGET",
        "BINPUT",
        "LONG_BINPUT",
        "GLOBAL",
        "REDUCE",
        "BUILD",
        "BINPERSID",
        "MEMOIZE",
        "FRAME",
        "SHORT_BINUNICODE",
        "BINBYTES",
        "SHORT_BINBYTES",
    ]
)


def load_torch(path: Path, how: Reading) -> Model:
    """A torch state dict, as weights under torch's own names and in torch's layout."""
    with reading(path):
        _check_kind(path)
        budget = Budget(path, how.max_bytes)
        with opened(path) as archive:
            names = [n for n in archive.namelist() if n.endswith("/data.pkl")]
            if len(names) != 1:
                raise FileFormatError(f"{path}: expected one data.pkl, found {len(names)}")
            stem = names[0][: -len("data.pkl")]
            if f"{stem}byteorder" in archive.namelist():
                order = bytes(member(archive, f"{stem}byteorder", budget))
                if order != b"little":
                    raise FileFormatError(f"{path}: byte order {order!r}, only little is read")
            pickled = bytes(member(archive, names[0], budget))
            _check_pickle(pickled, path, budget)
            loaded = _Unpickler(io.BytesIO(pickled), archive, stem, budget).load()
            ours: dict[str, Any] = {}
            if f"{stem}{_OURS}" in archive.namelist():
                ours = budget.parsed(member(archive, f"{stem}{_OURS}", budget), _OURS)
        state = _io.under(loaded, how.key, path)
        flat = _state(state, path)
        flat = folded(flat, path) if how.fold else flat
        variables = nested(flat, ".", path)
        variables.setdefault("params", {})
        told = _source.checked({n: v for n, v in ours.items() if n != "ordered"})
        if ours.get("ordered", True):
            told["names"] = list(flat)
        told["ties"] = _source.ties(flat)
        told["torch"] = _source.torch_metadata(getattr(state, "metadata", None))
        return Model(None, _source.with_source(variables, told))


def _check_kind(path: Path) -> None:
    if path.stat().st_size and not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            head = file.read(512)
        tar = head[257:262] == b"ustar"
        older = "an older format of torch" if tar or head[:1] == b"\x80" else "not a zip archive"
        raise FileFormatError(
            f"{path}: {older}; torch's older formats run code when they are read: save it again "
            "with a current torch.save"
        )


def _state(loaded: Any, path: Path) -> dict[str, np.ndarray]:
    """A dict of tensors; what else a checkpoint may be is told with a way to its tensors."""
    if isinstance(loaded, np.ndarray):
        raise FileFormatError(f"{path}: expected a state dict, found one tensor")
    if not isinstance(loaded, dict):
        raise FileFormatError(
            f"{path}: expected a state dict, found {type(loaded).__name__}; save "
            "model.state_dict() instead of the model"
        )
    flat: dict[str, np.ndarray] = {}
    for name, value in loaded.items():
        if name == "_metadata":
            continue
        if not isinstance(name, str) or not isinstance(value, np.ndarray):
            inside = [f"{k}" for k, v in loaded.items() if isinstance(v, dict) and v and all(
                isinstance(x, np.ndarray) for x in v.values())]  # fmt: skip
            hint = f"key={inside[0]!r} picks a part of it" if inside else (
                "save model.state_dict() on its own, or pick a part of it with key="
            )  # fmt: skip
            raise FileFormatError(
                f"{path}: expected a state dict of tensors, but {_short(name)} is a "
                f"{type(value).__name__}; {hint}"
            )
        flat[name] = value
    return flat


def folded(flat: dict[str, np.ndarray], path: Path) -> dict[str, np.ndarray]:
    """With the weights that ``torch.nn.utils.prune``, ``weight_norm``, ``spectral_norm`` and
    ``parametrizations`` compute, in the place of what they compute them from."""
    out: dict[str, np.ndarray] = {}
    done: set[str] = set()
    made: dict[Any, np.ndarray] = {}  # what is computed from the same arrays is one array
    for name in flat:
        if name in done:
            continue
        if ".parametrizations." in f".{name}":
            owner, _, rest = f".{name}".rpartition(".parametrizations.")
            tensor = rest.split(".")[0]
            start = f"{owner}.parametrizations.{tensor}."[1:]
            parts = {n.removeprefix(start): v for n, v in flat.items() if n.startswith(start)}
            value, target = _parametrized(parts), f"{owner}.{tensor}"[1:]
            if value is None:
                raise FileFormatError(
                    f"{path}: {start}* computes a weight in a way that the file does not say; "
                    "fold=False keeps its parts"
                )
            done |= {start + n for n in parts}
        else:
            stem, _, suffix = name.rpartition("_")
            parts = {s: flat[f"{stem}_{s}"] for s in ("orig", "mask", "g", "v", "u")
                     if f"{stem}_{s}" in flat}  # fmt: skip
            target, value = stem, None
            if set(parts) == {"orig", "mask"} and parts["mask"].shape == parts["orig"].shape:
                value = parts["orig"] * parts["mask"].astype(parts["orig"].dtype)
            elif set(parts) == {"g", "v"} and "weight" in stem.rpartition(".")[2]:
                value = _weight_norm(parts["g"], parts["v"])
            elif set(parts) == {"orig", "u", "v"} and "weight" in stem.rpartition(".")[2]:
                value = _spectral_norm(parts["orig"], parts["u"], parts["v"])
                if value is None:
                    raise FileFormatError(
                        f"{path}: {stem}: the file does not say which axis spectral_norm has "
                        "taken; fold=False keeps its parts"
                    )
            if value is None or suffix not in parts:
                out[name] = flat[name]
                continue
            done |= {f"{stem}_{s}" for s in parts}
        if target in flat or target in out:
            raise FileFormatError(f"{path}: {target} stands there twice, computed and plain")
        out[target] = made.setdefault(tuple((n, id(v)) for n, v in parts.items()), value)
    return out


def _parametrized(parts: dict[str, np.ndarray]) -> np.ndarray | None:
    if set(parts) == {"original0", "original1"}:
        return _weight_norm(parts["original0"], parts["original1"])
    if set(parts) == {"original", "0._u", "0._v"}:
        return _spectral_norm(parts["original"], parts["0._u"], parts["0._v"])
    return None


def _weight_norm(g: np.ndarray, v: np.ndarray) -> np.ndarray | None:
    """G v / |v|, over the axes where g has one entry."""
    if g.ndim == 0:
        g = g.reshape((1,) * v.ndim)
    if g.ndim != v.ndim or any(a not in (1, b) for a, b in zip(g.shape, v.shape, strict=True)):
        return None
    axes = tuple(i for i, n in enumerate(g.shape) if n == 1)
    if len(axes) < g.ndim - 1:
        return None  # weight_norm keeps one axis
    wide = v.astype(np.float32) if v.dtype.itemsize < 4 else v
    size = np.sqrt(np.sum(wide * wide, axis=axes, keepdims=True))
    return (wide * (g.astype(wide.dtype) / size)).astype(v.dtype)


def _spectral_norm(w: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray | None:
    """W / (u' w v), the axis of u in front; None if two axes could be that."""
    if u.ndim != 1 or v.ndim != 1 or u.size * v.size != w.size:
        return None
    axes = [a for a in (0, 1) if a < w.ndim and w.shape[a] == u.size]
    if len(axes) != 1:
        return None
    sigma = u @ np.moveaxis(w, axes[0], 0).reshape(u.size, -1) @ v
    return (w / sigma).astype(w.dtype)


def _check_pickle(pickled: bytes, path: Path, budget: Budget) -> None:
    """Refuses opcodes that build more than plain data, and values that are small in the file and
    large when they are gone over, such as tuples of one tuple twice, of one tuple twice, ..."""
    stack: list[int | None] = []  # how much each value holds; None is a mark
    memo: dict[int, int] = {}
    limit = 1_000_000 + 64 * len(pickled)
    made = 0
    for opcode, argument, _ in pickletools.genops(pickled):
        name = opcode.name
        if name not in _OPCODES:
            raise FileFormatError(f"{path}: the pickle opcode {name} is not allowed")
        if "PUT" in name or name == "MEMOIZE":
            index = len(memo) if name == "MEMOIZE" else int(argument or 0)
            # A memo index is an allocation; they are given out one after the other.
            if index > 2 * len(memo) + 1_000 or not stack or stack[-1] is None:
                raise FileFormatError(f"{path}: a pickle memo index of {index}")
            memo[index] = stack[-1]
            continue
        if "GET" in name:
            stack.append(memo.get(int(argument or 0), 1))
            continue
        before = list(opcode.stack_before)
        size = 1
        made += 1
        if pickletools.markobject in before:
            while stack and (top := stack.pop()) is not None:
                size += top
            before = before[: before.index(pickletools.markobject)]
        for _wanted in before:
            size += (stack.pop() if stack else 0) or 0
        if size > limit:
            raise FileFormatError(f"{path}: a value of the pickle repeats others too often")
        marks = pickletools.markobject in opcode.stack_after
        stack += [None] if marks else [size] * len(opcode.stack_after)
        if made % 4_096 == 0:
            budget.spend("its pickle", 64 * 4_096)  # what a value takes, about


def _short(value: Any) -> str:
    return reprlib.repr(value)[:80]


class _StorageType:
    def __init__(self, dtype: str):
        self.dtype = dtype_of(dtype)

    def __setstate__(self, state: Any) -> None:
        raise ValueError("a storage class with a state")


class _Untyped:
    """A storage of bytes, whose dtype stands with the tensor."""

    def __setstate__(self, state: Any) -> None:
        raise ValueError("a class with a state")


class _Call:
    """A function that a pickle may call, and can't change."""

    def __init__(self, make: Callable[..., Any]):
        self.make = make

    def __call__(self, *arguments: Any) -> Any:
        return self.make(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise ValueError("a function with a state")


class _DType(str):
    def __setstate__(self, state: Any) -> None:
        raise ValueError("a dtype with a state")


class _OrderedDict(OrderedDict):
    """What torch's ``state_dict`` is, with its ``_metadata``."""

    metadata: Any = None

    def __setstate__(self, state: Any) -> None:
        self.metadata = state.get("_metadata") if isinstance(state, dict) else None


class _Unpickler(pickle.Unpickler):
    """Only tensors, dicts, lists, text and numbers; nothing is imported."""

    def __init__(self, file: Any, archive: zipfile.ZipFile, stem: str, budget: Budget):
        super().__init__(file)
        self.archive, self.stem, self.budget, self.path = archive, stem, budget, budget.path
        self.storages: dict[str, np.ndarray] = {}
        self.used: set[int] = set()
        self.tensors: dict[Any, np.ndarray] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return _OrderedDict
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_tensor_v3"):
            return _Call(self._tensor_v2 if name.endswith("2") else self._tensor_v3)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _Call(self._same)
        if (module, name) == ("torch._tensor", "_rebuild_from_type_v2"):
            return _Call(self._of_type)
        if module == "torch" and name in _STORAGES:
            return _StorageType(_STORAGES[name])
        if (module, name) == ("torch.storage", "UntypedStorage"):
            return _Untyped()
        if module == "torch" and (name in _DTYPES or name in _STORAGES.values()):
            return _DType(name)
        if module == "torch" and name in _OTHERS:
            return _Call(self._other)
        if (module, name) == ("torch", "Tensor") or (module, name) == (
            "torch.nn.parameter", "Parameter"):  # fmt: skip
            return _Untyped()
        raise FileFormatError(
            f"{self.path}: the pickle names {module}.{name}, which is not allowed"
        )

    def _same(self, data: Any, *_: Any) -> Any:
        return data

    def _other(self, *values: Any) -> Any:
        return values

    def _of_type(self, make: Any, kind: Any, arguments: Any, state: Any) -> Any:
        """A tensor of a subclass or with attributes, such as a buffer: its values."""
        tensors = (self._tensor_v2, self._tensor_v3)
        own = isinstance(make, _Call) and make.make in tensors
        if not own or not isinstance(kind, _Untyped):
            raise FileFormatError(f"{self.path}: a tensor of a class that is not torch's own")
        return make(*arguments)

    def persistent_load(self, pid: Any) -> Any:
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage":
            raise FileFormatError(f"{self.path}: a storage is described by {_short(pid)}")
        _, kind, key, _, count = pid
        if not isinstance(kind, _StorageType | _Untyped) or not isinstance(key, str):
            raise FileFormatError(f"{self.path}: a storage is described by {_short(pid)}")
        dtype = kind.dtype if isinstance(kind, _StorageType) else np.dtype("uint8")
        if key not in self.storages:
            data = member(self.archive, f"{self.stem}data/{key}", self.budget)
            if not isinstance(count, int) or len(data) != count * dtype.itemsize:
                raise FileFormatError(
                    f"{self.path}: storage {key} has {len(data)} bytes, expected {_short(count)} x "
                    f"{dtype.itemsize}"
                )
            self.storages[key] = np.frombuffer(data, dtype)
        if self.storages[key].dtype != dtype:
            raise FileFormatError(f"{self.path}: storage {key} has two dtypes")
        return self.storages[key]

    def _tensor_v3(
        self, storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any,
        metadata: Any = None,
    ) -> np.ndarray:  # fmt: skip
        if not isinstance(dtype, _DType) or not isinstance(storage, np.ndarray):
            raise FileFormatError(f"{self.path}: a tensor of dtype {_short(dtype)}")
        kind = dtype_of(str(dtype))
        if storage.size % kind.itemsize:
            raise FileFormatError(f"{self.path}: {storage.size} bytes of {dtype}")
        return self._tensor_v2(storage.view(kind), offset, size, stride, metadata=metadata)

    def _tensor_v2(
        self, storage: Any, offset: Any, size: Any, stride: Any, grad: Any = None,
        hooks: Any = None, metadata: Any = None,
    ) -> np.ndarray:  # fmt: skip
        numbers = (offset, *size, *stride)
        if (
            not isinstance(storage, np.ndarray)
            or len(size) != len(stride)
            or len(size) > 32
            or any(not isinstance(n, int) or n < 0 for n in numbers)
        ):
            raise FileFormatError(
                f"{self.path}: a tensor of size {_short(size)} and stride {_short(stride)}"
            )
        told = metadata or {}
        if not isinstance(told, dict) or set(told) - {"conj", "neg"}:
            raise FileFormatError(f"{self.path}: a tensor with the metadata {_short(told)}")
        if 0 in size:
            return np.zeros(size, storage.dtype)
        # What is the same view of the same memory is one array under two names.
        place = storage.__array_interface__["data"][0]
        view = (place, storage.dtype.name, *numbers, len(size), *sorted(told.items()))
        if view in self.tensors:
            self.budget.spend("a tensor", self.tensors[view].nbytes)  # another format may copy it
        else:
            self.tensors[view] = self._value(storage, offset, size, stride, told)
        return self.tensors[view]

    def _value(
        self, storage: np.ndarray, offset: int, size: Any, stride: Any, told: Any
    ) -> np.ndarray:
        last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        if last >= storage.size:
            raise FileFormatError(
                f"{self.path}: a tensor of size {_short(size)}, stride {_short(stride)} and offset "
                f"{offset} is larger than its storage of {storage.size}"
            )
        item = storage.dtype.itemsize
        whole = not told and math.prod(size) == storage.size and id(storage.base) not in self.used
        steps = [math.prod(size[i + 1 :]) for i in range(len(size))]
        if whole and all(n == 1 or s == step for n, s, step in zip(size, stride, steps)):
            self.used.add(id(storage.base))  # only one tensor may have the memory itself
            return storage.reshape(size)
        self.budget.spend("a tensor", math.prod(size) * item)
        # As bytes: NumPy can't describe every 8-bit float to as_strided.
        view = np.lib.stride_tricks.as_strided(
            storage[offset:].view(f"V{item}"),
            size,
            tuple(s * item for s in stride),
            writeable=False,
        )
        value = np.array(view, order="C").view(storage.dtype)
        if told.get("conj"):
            value = np.conj(value)
        return -value if told.get("neg") else value


def save_torch(file: Any, module: Any, variables: Any, layout: str | None) -> None:
    """A state dict that ``torch.load(weights_only=True)`` takes."""
    if module is None:
        _io.slashed(variables)  # which raises for what is no array
        told = _nodes.told_of(variables)
        found = _io.same_names(variables, Path())
        if found is None:
            raise ConversionError(
                "these variables would come back as another tree, since torch joins names by dots: "
                "give the module, or save them as .safetensors"
            )
        state = _source.tied(_source.in_order(found, told), told)
        beside: dict[str, Any] = {n: told[n] for n in ("safetensors", "index") if n in told}
        if not _source.has_order(state, told):
            beside["ordered"] = False
        metadata = told.get("torch", {})
    else:
        beside, metadata = {}, {}
        layers = _flax.read_flax(module, variables)
        new, _ = convert.convert(
            layers, "flax", "torch", module.input_shape, layout or "channels_first"
        )
        new = fold_torch(new)
        state = {
            ".".join([*parts_of(x.name), n]): v for x in new for n, v in torch_state(x).items()
        }
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", _pickled(state, metadata))
        archive.writestr("archive/byteorder", "little")
        for index, value in enumerate(_storages(state).values()):
            _io.add_member(archive, f"archive/data/{index}", value)
        archive.writestr("archive/version", "3\n")
        if beside:
            archive.writestr(f"archive/{_OURS}", json.dumps(beside))


def _storages(state: Mapping[str, np.ndarray]) -> dict[int, np.ndarray]:
    """The arrays of a state dict by their id, each once."""
    return {id(value): value for value in state.values()}


def _pickled(state: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> bytes:
    """The pickle of an OrderedDict of tensors. Written by hand, since the pickle module imports
    what it names, and torch need not be installed."""
    storages = {dtype_of(d): s for s, d in _STORAGES.items()}

    def text(s: str) -> bytes:
        raw = s.encode()
        return b"X" + len(raw).to_bytes(4, "little") + raw

    def number(n: int) -> bytes:
        if n < 1 << 31:
            return b"J" + n.to_bytes(4, "little")
        raw = n.to_bytes(8, "little") + b"\0"
        return b"\x8a" + bytes([len(raw)]) + raw

    out = [b"\x80\x02ccollections\nOrderedDict\n)R"]
    places = {key: index for index, key in enumerate(_storages(state))}
    for name, value in state.items():
        younger = value.dtype.name in _DTYPES
        if value.dtype not in storages and not younger:
            raise refuse(name, f"dtype {value.dtype} has no storage in a .pt file")
        strides: list[int] = []
        step = 1
        for size in reversed(value.shape):
            strides.insert(0, step)
            step *= max(size, 1)
        make, kind = b"_rebuild_tensor_v2", b"ctorch\n" + storages.get(value.dtype, "").encode()
        count, end = value.size, b""
        if younger:
            make, kind = b"_rebuild_tensor_v3", b"ctorch.storage\nUntypedStorage"
            count, end = value.nbytes, b"ctorch\n" + value.dtype.name.encode() + b"\n"
        out.append(text(name) + b"ctorch._utils\n" + make + b"\n((")
        out.append(text("storage") + kind + b"\n")
        out.append(text(str(places[id(value)])) + text("cpu") + number(count) + b"tQ" + number(0))
        for numbers in (value.shape, strides):
            out.append(b"(" + b"".join(number(int(n)) for n in numbers) + b"t")
        out.append(b"\x89ccollections\nOrderedDict\n)R" + end + b"tRs")
    if metadata:
        out.append(b"}" + text("_metadata") + b"ccollections\nOrderedDict\n)R")
        for module, entry in metadata.items():  # plain data, which pickle writes without an import
            out.append(text(module) + pickle.dumps(entry, 2)[2:-1] + b"s")
        out.append(b"sb")
    return b"".join([*out, b"."])
