"""The pickles in torch's files, read without torch: tensors and plain data, and for whatever else
they name a stand-in that does nothing. Nothing is imported, and nothing of theirs is called."""

import functools
import io
import math
import pickle
import pickletools
import reprlib
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fwt._types import FileFormatError
from fwt.converters.io import Budget, dtype_of

STORAGES = {
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
# Younger dtypes have no storage class: torch names the dtype itself.
DTYPES = {
    *("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2"),
    *("float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
}
# Opcodes that build plain data and stand-ins; what is not here (INST, OBJ, EXT*, ...) is refused.
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
        "NEWOBJ",
        "NEWOBJ_EX",
        "EMPTY_SET",
        "ADDITEMS",
        "FROZENSET",
        "STACK_GLOBAL",
        "DUP",
    ]
)


def check(pickled: bytes, path: Path, budget: Budget) -> None:
    """Refuses opcodes that build more than plain data and stand-ins, and values that are small in
    the file and large or deep when they are gone over, such as tuples of one tuple twice, of one
    tuple twice, ..."""
    stack: list[list[int] | None] = []  # of each value how much it holds, how deep; a mark
    memo: dict[int, list[int]] = {}  # which grow where they stand
    limit = 1_000_000 + 64 * len(pickled)
    made = gone_over = 0
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
            stack.append(memo.get(int(argument or 0), [1, 0]))
            continue
        before = list(opcode.stack_before)
        held: list[list[int]] = []
        made += 1
        if pickletools.markobject in before:
            while stack and (top := stack.pop()) is not None:
                held.append(top)
            before = before[: before.index(pickletools.markobject)]
        held += [(stack.pop() if stack else None) or [0, 0] for _wanted in before]
        # The container lies below what it gets.
        value = held.pop() if name in _GROWS else [0, -1]
        given = sum(n for n, _ in held)
        size, depth = 1 + value[0] + given, max([value[1], *(1 + d for _, d in held), 0])
        # What is called goes over what it is given, and so does what takes it as a key.
        gone_over += given if name in _GO_OVER else 0
        if max(size, gone_over) > limit:
            raise FileFormatError(f"{path}: a value of the pickle repeats others too often")
        if depth > 500:
            raise FileFormatError(f"{path}: a value of the pickle is nested {depth} times")
        marks = pickletools.markobject in opcode.stack_after
        value[:] = size, depth
        stack += [None] if marks else [value] * len(opcode.stack_after)
        if made % 4_096 == 0:
            budget.spend("its pickle", 64 * 4_096)  # what a value takes, about


_GROWS = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}
_GO_OVER = {"REDUCE", "NEWOBJ", "NEWOBJ_EX", "FROZENSET", "ADDITEMS", "SETITEM", "SETITEMS"}


def short(value: Any) -> str:
    return reprlib.repr(value)[:80]


# Storages of dtypes that NumPy lacks, and the bytes of one number.
_FOREIGN = {
    **{f"torch.{name}Storage": 1 for name in ("QInt8", "QUInt8", "QUInt4x2", "QUInt2x4")},
    **{f"torch.{name}Storage": 4 for name in ("ComplexHalf", "QInt32")},
}
_DICTS = {("collections", "Counter"), ("collections", "defaultdict"), ("builtins", "dict")}


def _part(x: np.ndarray, offset: int, size: Any, stride: Any) -> np.ndarray:
    steps = tuple(s * x.itemsize for s in stride)
    return np.lib.stride_tricks.as_strided(x[offset:], size, steps)


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


class Unknown:
    """What stands for an object of a class that is no tensor and no plain data. Each class of such
    objects is a class below this one; whatever a pickle does with them does nothing."""

    what = "an object"

    def __init__(self, *_: Any, **__: Any):
        pass

    def __new__(cls, *_: Any, **__: Any) -> "Unknown":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, name: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    extend = add = update = append

    def __repr__(self) -> str:
        return self.what


class _Unpickler(pickle.Unpickler):
    """Only tensors, dicts, lists, text and numbers; nothing is imported.

    Args:
        file: the pickle.
        budget: of the file.
        stored: the bytes of a storage, by its name and how many they are; None if tensors are not
            wanted yet.
        big: whether its numbers are big-endian.
    """

    def __init__(
        self, file: Any, budget: Budget, stored: Callable[[str, int], Any] | None, big: bool = False
    ):
        super().__init__(file)
        self.budget, self.path, self.stored, self.big = budget, budget.path, stored, big
        self.storages: dict[str, np.ndarray] = {}
        self.sizes: dict[str, int] = {}  # in bytes
        self.items: dict[str, int] = {}
        self.used: set[int] = set()
        self.tensors: dict[Any, np.ndarray] = {}
        self.swapped: dict[Any, np.ndarray] = {}
        self.views: dict[Any, tuple[Any, ...]] = {}  # the first of each storage
        self.marks: dict[Any, np.ndarray] = {}  # of a storage with several, what they hold
        self.unknown: dict[str, type[Unknown]] = {}
        self.as_views = False
        self.calls = Counter[Any]()  # how often each tensor is asked for
        self.resolved: dict[int, Any] = {}  # of a view, whether its numbers are conj or neg

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return _Call(functools.partial(self._copy, _OrderedDict))
        if (module, name) in _DICTS:
            return _Call(functools.partial(self._copy, dict))
        if module in ("builtins", "__builtin__") and name in ("set", "frozenset"):
            return _Call(functools.partial(self._copy, set if name == "set" else frozenset))
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_tensor_v3"):
            return _Call(self._tensor_v2 if name.endswith("2") else self._tensor_v3)
        if module == "torch._utils" and name.startswith("_rebuild_parameter"):
            return _Call(self._same)
        if (module, name) == ("torch._tensor", "_rebuild_from_type_v2"):
            return _Call(self._of_type)
        if module == "torch" and name in STORAGES:
            return _StorageType(STORAGES[name])
        if (module, name) == ("torch.storage", "UntypedStorage"):
            return _Untyped()
        if module == "torch" and (name in DTYPES or name in STORAGES.values()):
            return _DType(name)
        if (module, name) == ("torch", "Tensor") or (module, name) == (
            "torch.nn.parameter", "Parameter"):  # fmt: skip
            return _Untyped()
        if len(self.unknown) > 10_000:
            raise FileFormatError(f"{self.path}: its pickle names over 10,000 classes")
        what = f"{module}.{name}"[:200]
        return self.unknown.setdefault(what, type("Unknown", (Unknown,), {"what": what}))

    def _copy(self, kind: Any, *given: Any) -> Any:
        """A dict or set of the last of what it is given, if that holds something."""
        held = given[-1] if given and isinstance(given[-1], dict | list | tuple | set) else ()
        self.budget.spend("a copy in its pickle", 100 * len(held))  # what an entry takes, about
        return kind(held)

    def _same(self, data: Any, *_: Any) -> Any:
        return data

    def _of_type(self, make: Any, kind: Any, arguments: Any, state: Any) -> Any:
        """A tensor of a subclass or with attributes, such as a buffer: its values."""
        tensors = (self._tensor_v2, self._tensor_v3)
        own = isinstance(make, _Call) and make.make in tensors
        if not own or not isinstance(kind, _Untyped):
            of = kind if isinstance(kind, type) and issubclass(kind, Unknown) else Unknown
            return of()
        return make(*arguments)

    def persistent_load(self, pid: Any) -> Any:
        if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module":
            return pid[1]  # with the source of a class, in older files
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
            raise FileFormatError(f"{self.path}: a storage is described by {short(pid)}")
        _, kind, key, _, count, *view = pid
        if view not in ([], [None]):
            raise FileFormatError(f"{self.path}: storage {short(key)} is a part of another")
        if type(count) is not int or count < 0 or not isinstance(key, str):
            raise FileFormatError(f"{self.path}: storage {short(key)} has {short(count)} numbers")
        if isinstance(kind, type) and issubclass(kind, Unknown):
            if self.stored is None:  # its bytes are to be passed over
                self.items[key] = _FOREIGN.get(kind.what, 0)
                self.sizes[key] = count * self.items[key]
            return kind()  # of a dtype that NumPy lacks
        if not isinstance(kind, _StorageType | _Untyped):
            raise FileFormatError(f"{self.path}: a storage is described by {short(pid)}")
        dtype = kind.dtype if isinstance(kind, _StorageType) else np.dtype("uint8")
        if self.stored is None:
            self.sizes[key], self.items[key] = count * dtype.itemsize, dtype.itemsize
            return None
        if key not in self.storages:
            data = self.stored(key, count * dtype.itemsize)
            if len(data) != count * dtype.itemsize:
                raise FileFormatError(
                    f"{self.path}: storage {key} has {len(data)} bytes, expected {short(count)} x "
                    f"{dtype.itemsize}"
                )
            self.storages[key] = self._native(np.frombuffer(data, dtype))
        if self.storages[key].dtype != dtype:
            raise FileFormatError(f"{self.path}: storage {key} has two dtypes")
        return self.storages[key]

    def _native(self, x: np.ndarray) -> np.ndarray:
        if not self.big or x.dtype.itemsize == 1:
            return x
        part = x.dtype.itemsize // (2 if x.dtype.kind == "c" else 1)
        return x.view(f"u{part}").byteswap().view(x.dtype)

    def _tensor_v3(
        self, storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any,
        metadata: Any = None,
    ) -> Any:  # fmt: skip
        if self.stored is None or isinstance(storage, Unknown) or isinstance(dtype, type):
            return self._unread(storage, dtype)
        if not isinstance(dtype, _DType) or not isinstance(storage, np.ndarray):
            raise FileFormatError(f"{self.path}: a tensor of dtype {short(dtype)}")
        kind = dtype_of(str(dtype))
        if storage.size % kind.itemsize:
            raise FileFormatError(f"{self.path}: {storage.size} bytes of {dtype}")
        # Kept, for what is one tensor is told by where its numbers are.
        place = storage.__array_interface__["data"][0], kind.name
        values = self.swapped.setdefault(place, self._native(storage.view(kind)))
        return self._tensor_v2(values, offset, size, stride, metadata=metadata)

    def _unread(self, *of: Any) -> Any:
        """A tensor whose numbers are not wanted yet, or of a dtype that NumPy lacks."""
        known = [x if isinstance(x, type) else type(x) for x in of]
        found = next((k for k in known if issubclass(k, Unknown)), None)
        return None if found is None else found()

    def _tensor_v2(
        self, storage: Any, offset: Any, size: Any, stride: Any, grad: Any = None,
        hooks: Any = None, metadata: Any = None,
    ) -> Any:  # fmt: skip
        if self.stored is None or isinstance(storage, Unknown):
            return self._unread(storage)
        numbers = (offset, *size, *stride)
        if (
            not isinstance(storage, np.ndarray)
            or len(size) != len(stride)
            or len(size) > 32
            or any(not isinstance(n, int) or n < 0 for n in numbers)
        ):
            raise FileFormatError(
                f"{self.path}: a tensor of size {short(size)} and stride {short(stride)}"
            )
        told = metadata or {}
        if not isinstance(told, dict) or set(told) - {"conj", "neg"}:
            raise FileFormatError(f"{self.path}: a tensor with the metadata {short(told)}")
        if 0 in size:
            return np.zeros(size, storage.dtype)
        # What is the same view of the same memory is one array under two names.
        place = storage.__array_interface__["data"][0], storage.dtype.name
        view = (place, *numbers, len(size), *sorted(told.items()))
        self.calls[view] += 1
        if view in self.tensors:
            self.budget.spend("a tensor", self.tensors[view].nbytes)  # another format may copy it
        else:
            self.tensors[view] = self._value(storage, offset, size, stride, told)
            if told:
                self.resolved[id(self.tensors[view])] = told
            if self.views.setdefault(place, (offset, size, stride)) != (offset, size, stride):
                self._mark(storage, place, offset, size, stride)
        return self.tensors[view]

    def _mark(self, storage: np.ndarray, place: Any, *view: Any) -> None:
        """Warns of a tensor that shares numbers with another, and not as a whole."""
        if place not in self.marks:
            self.budget.spend("a tensor", storage.size)
            self.marks[place] = np.zeros(storage.size, bool)
            _part(self.marks[place], *self.views[place])[...] = True
        part = _part(self.marks[place], *view)
        if part.any():
            warnings.warn(
                f"{self.path}: a tensor of shape {list(view[1])} is another view of the memory of "
                "one before it; here they are two arrays, and what changes one leaves the other",
                stacklevel=2,
            )
        part[...] = True

    def _value(
        self, storage: np.ndarray, offset: int, size: Any, stride: Any, told: Any
    ) -> np.ndarray:
        last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        if last >= storage.size:
            raise FileFormatError(
                f"{self.path}: a tensor of size {short(size)}, stride {short(stride)} and offset "
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
            writeable=self.as_views,
        )
        if self.as_views:
            view = view.view(storage.dtype)
            view.flags.writeable = not told
            return view
        return resolved(np.array(view, order="C").view(storage.dtype), told)


def loaded(
    pickled: bytes,
    budget: Budget,
    stored: Callable[[str, int], Any],
    big: bool,
    views: Any = None,
) -> Any:
    """What a pickle of torch's zip format holds; with ``views`` each tensor is one of the memory
    that ``stored`` gives, and can't be written to where its numbers are others than stand there.
    ``views.tensors`` gets a tensor as often as it is asked for, ``views.resolved`` by the id of one
    whether it is conj or neg."""
    check(pickled, budget.path, budget)
    unpickler = _Unpickler(io.BytesIO(pickled), budget, stored, big)
    unpickler.as_views = views is not None
    found = unpickler.load()
    if views is not None:
        for view, count in unpickler.calls.items():
            views.tensors += [unpickler.tensors[view]] * count
        views.resolved |= unpickler.resolved
    return found


def resolved(value: np.ndarray, told: Mapping[str, Any]) -> np.ndarray:
    """The numbers of a tensor that is conj or neg of what stands there, and the way back."""
    value = np.conj(value) if told.get("conj") else value
    return -value if told.get("neg") else value


def elsewhere(node: Any, part: Any) -> Iterator[np.ndarray]:
    """The tensors of what a file holds beside a part of it; of a part that stands there twice,
    its own."""
    stack, met, times = [node], set[int](), 0
    while stack:
        here = stack.pop()
        times += here is part
        if (here is part and times == 1) or (here is not part and id(here) in met):
            continue
        if isinstance(here, np.ndarray):
            yield here
            continue
        if times > 2:
            return
        met.add(id(here))
        if isinstance(here, Mapping):
            stack += here.values()
        elif isinstance(here, list | tuple | set | frozenset):
            stack += here


# -- the format before 1.6 ----------------------------------------------------------------------

_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def is_older(path: Path) -> bool:
    """Whether a file has the format that torch wrote before 1.6."""
    with open(path, "rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def loaded_older(path: Path, budget: Budget) -> Any:
    """What a file of the format before 1.6 holds: five pickles, of which the fourth is the object
    and the last the names of its storages, which follow in this order."""
    size = path.stat().st_size
    budget.spend("the file", size)
    data = path.read_bytes()
    file, parts = io.BytesIO(data), []
    for _ in range(5):
        start = file.tell()
        for _opcode in pickletools.genops(file):
            pass
        parts.append(data[start : file.tell()])
        check(parts[-1], path, budget)
    system, names = (_Unpickler(io.BytesIO(parts[i]), budget, None).load() for i in (2, 4))
    big = isinstance(system, dict) and system.get("little_endian") is False
    first = _Unpickler(io.BytesIO(parts[3]), budget, None)
    first.load()
    places: dict[str, int] = {}
    at = file.tell()
    if (
        not isinstance(names, list)
        or set(names) != set(first.sizes)
        or len(set(names)) < len(names)
    ):
        raise FileFormatError(f"{path}: its list of storages is not that of its tensors")
    for name in names:
        count = int.from_bytes(data[at : at + 8], "big" if big else "little", signed=True)
        if count * first.items[name] != first.sizes[name] or at + 8 + first.sizes[name] > size:
            raise FileFormatError(f"{path}: storage {short(name)} declares {count} numbers")
        places[name] = at + 8
        at += 8 + first.sizes[name]

    def stored(name: str, count: int) -> bytes:
        return data[places[name] : places[name] + count]

    return _Unpickler(io.BytesIO(parts[3]), budget, stored, big).load()
