"""torch's .pt files: a zip of a pickle and raw storages, read and written without torch."""

import dataclasses
import io
import math
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from fwt.converters import _convert, _flax
from fwt.converters._io import Budget, dotted, member, nested, opened, reading
from fwt.converters._row import Layer, parts_of, refuse

from fwt._types import FileFormatError, Model

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


def dtype_of(name: str) -> np.dtype:
    """A NumPy dtype by name, bfloat16 and float8 included."""
    return np.dtype(getattr(ml_dtypes, name) if hasattr(ml_dtypes, name) else name)


def load_torch(path: Path) -> Model:
    """A torch state dict, as weights under torch's own names and in torch's layout."""
    with reading(path):
        if path.stat().st_size and not zipfile.is_zipfile(path):
            raise FileFormatError(
                f"{path}: not a zip archive; torch's older formats run code when they are read: "
                "save it again with a current torch.save"
            )
        budget = Budget(path)
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
            _check_pickle(pickled, path)
            loaded = _Unpickler(io.BytesIO(pickled), archive, stem, budget).load()
    flat: dict[str, np.ndarray] = {}
    if not isinstance(loaded, dict):
        raise FileFormatError(
            f"{path}: expected a state dict, found {type(loaded).__name__}; save "
            "model.state_dict() instead of the model"
        )
    for name, value in loaded.items():
        if name == "_metadata":
            continue
        if not isinstance(name, str) or not isinstance(value, np.ndarray):
            raise FileFormatError(
                f"{path}: expected a state dict of tensors, but {name!r} is a "
                f"{type(value).__name__}; save model.state_dict() on its own"
            )
        flat[name] = value
    variables = nested(flat, ".", path)
    variables.setdefault("params", {})
    return Model(None, variables)


def _check_pickle(pickled: bytes, path: Path) -> None:
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name not in _OPCODES:
            raise FileFormatError(f"{path}: the pickle opcode {opcode.name} is not allowed")
        # A memo index is an allocation.
        if "PUT" in opcode.name and isinstance(argument, int) and argument > len(pickled):
            raise FileFormatError(f"{path}: a pickle memo index of {argument}")


class _StorageType:
    def __init__(self, dtype: str):
        self.dtype = dtype_of(dtype)


class _OrderedDict(OrderedDict):
    """What torch's ``state_dict`` is; its ``_metadata`` attribute is dropped."""

    def __setstate__(self, state: Any) -> None:
        pass


class _Unpickler(pickle.Unpickler):
    """Only tensors, dicts, lists, text and numbers; nothing is imported."""

    def __init__(self, file: Any, archive: zipfile.ZipFile, stem: str, budget: Budget):
        super().__init__(file)
        self.archive, self.stem, self.budget, self.path = archive, stem, budget, budget.path
        self.storages: dict[str, np.ndarray] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return _OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda data, requires_grad, hooks: data
        if module == "torch" and name in _STORAGES:
            return _StorageType(_STORAGES[name])
        raise FileFormatError(
            f"{self.path}: the pickle names {module}.{name}, which is not allowed"
        )

    def persistent_load(self, pid: Any) -> Any:
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage":
            raise FileFormatError(f"{self.path}: a storage is described by {pid!r:.80}")
        _, kind, key, _, count = pid
        if not isinstance(kind, _StorageType) or not isinstance(key, str):
            raise FileFormatError(f"{self.path}: a storage is described by {pid!r:.80}")
        if key not in self.storages:
            data = member(self.archive, f"{self.stem}data/{key}", self.budget)
            if not isinstance(count, int) or len(data) != count * kind.dtype.itemsize:
                raise FileFormatError(
                    f"{self.path}: storage {key} has {len(data)} bytes, expected {count} x "
                    f"{kind.dtype.itemsize}"
                )
            self.storages[key] = np.frombuffer(data, kind.dtype)
        if self.storages[key].dtype != kind.dtype:
            raise FileFormatError(f"{self.path}: storage {key} has two dtypes")
        return self.storages[key]

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> np.ndarray:
        numbers = (offset, *size, *stride)
        if (
            not isinstance(storage, np.ndarray)
            or len(size) != len(stride)
            or len(size) > 32
            or any(not isinstance(n, int) or n < 0 for n in numbers)
        ):
            raise FileFormatError(f"{self.path}: a tensor of size {size} and stride {stride}")
        if 0 in size:
            return np.zeros(size, storage.dtype)
        last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        if last >= storage.size:
            raise FileFormatError(
                f"{self.path}: a tensor of size {size}, stride {stride} and offset {offset} is "
                f"larger than its storage of {storage.size}"
            )
        item = storage.dtype.itemsize
        self.budget.spend("a tensor", math.prod(size) * item)
        view = np.lib.stride_tricks.as_strided(
            storage[offset:], size, tuple(s * item for s in stride), writeable=False
        )
        return np.array(view)


def save_torch(file: Any, module: Any, variables: Any, layout: str | None) -> None:
    """A state dict that ``torch.load(weights_only=True)`` takes."""
    if module is None:
        state = dotted(variables)
    else:
        layers = _flax.read_flax(module, variables)
        new, _ = _convert.convert(
            layers, "flax", "torch", module.input_shape, layout or "channels_first"
        )
        new = fold_torch(new)
        state = {
            ".".join([*parts_of(x.name), n]): v for x in new for n, v in torch_state(x).items()
        }
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", _pickled(state))
        archive.writestr("archive/byteorder", "little")
        for index, value in enumerate(state.values()):
            little = np.ascontiguousarray(value)
            archive.writestr(f"archive/data/{index}", little.tobytes())
        archive.writestr("archive/version", "3\n")


RECURRENT = ("RNN", "LSTM", "GRU")


def with_selected(layers: list[Layer]) -> list[Layer]:
    """Recurrent layers with the Select after them and the Flip before them as settings."""
    out: list[Layer] = []
    for layer in layers:
        last = out[-1] if out else None
        if layer.kind == "Select" and last is not None and last.kind in RECURRENT:
            select = {"what": layer.settings["what"], "merge": layer.settings["merge"]}
            if layer.settings.get("batch_first", True) != last.settings["batch_first"]:
                raise refuse(str(layer), "its batch_first must be that of the layer before it")
            out[-1] = dataclasses.replace(last, settings={**last.settings, "select": select})
            continue
        turned = last if last is not None and last.kind == "Flip" else None
        own = turned is not None and turned.name == f"{layer.name}__flip"
        if own and turned is not None and turned.settings["dim"] == 1 and layer.kind in RECURRENT:
            if not layer.settings["batch_first"]:
                raise refuse(str(layer), "a Flip before it takes the batch first")
            out.pop()
            layer = dataclasses.replace(layer, settings={**layer.settings, "reverse": True})
        out.append(layer)
    return out


_MODES = {"ReflectionPad": "reflect", "ReplicationPad": "replicate", "CircularPad": "circular"}


def fold_torch(layers: list[Layer]) -> list[Layer]:
    """What was lowered in one layer again: a pad that is a padding_mode, a stack of recurrent
    layers."""
    out: list[Layer] = []
    for layer in layers:
        last = out[-1] if out else None
        if last is not None and last.name == f"{layer.name}__pad" and layer.kind[:4] == "Conv":
            flat = last.settings["padding"]
            even = flat[::2] == flat[1::2] and not any(layer.settings["padding"])
            mode = _MODES.get(last.kind[:-2])
            if mode and even and "Transpose" not in layer.kind:
                settings = {**layer.settings, "padding": flat[::2][::-1], "padding_mode": mode}
                out[-1] = dataclasses.replace(layer, settings=settings)
                continue
        if layer.kind == "Select" and len(out) > 2:
            stacked = _stacked(out[-3], out[-2], out[-1])
            if stacked is not None:
                stem = stacked.name.rpartition("__l")[0]
                out[-3:] = [stacked]
                layer = dataclasses.replace(layer, name=f"{stem}__output")
        out.append(layer)
    return [_renamed(x) for x in out]


def _stacked(below: Layer, select: Layer, top: Layer) -> Layer | None:
    """Two recurrent layers, the first of which gives its sequence, as one of more layers."""
    stem, _, number = top.name.rpartition("__l")
    count = below.settings.get("num_layers", 1)
    if (
        below.kind != top.kind
        or top.kind not in RECURRENT
        or not number.isdigit()
        or below.name != f"{stem}__l{int(number) - 1}"
        or (int(number) != count)
        or select.settings != {"what": "sequence", "merge": None}
    ):
        return None
    skip = ("input_size", "num_layers")
    mine, theirs = ({k: v for k, v in x.settings.items() if k not in skip} for x in (below, top))
    if mine != theirs:
        return None
    arrays = dict(below.arrays)
    for name, value in top.arrays.items():
        arrays[name.replace("_l0", f"_l{count}")] = value
    settings = {**below.settings, "num_layers": count + 1}
    return Layer(top.name, top.kind, settings, arrays)


def _renamed(layer: Layer) -> Layer:
    if layer.settings.get("num_layers", 1) > 1:
        return dataclasses.replace(layer, name=layer.name.rpartition("__l")[0])
    return layer


def torch_state(layer: Layer) -> dict[str, Any]:
    """A torch layer's arrays, with the counter that BatchNorm has beside them."""
    if layer.kind.startswith("BatchNorm"):
        return {**layer.arrays, "num_batches_tracked": np.zeros((), np.int64)}
    return layer.arrays


def _pickled(state: Mapping[str, np.ndarray]) -> bytes:
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
    for index, (name, value) in enumerate(state.items()):
        if value.dtype not in storages:
            raise refuse(name, f"dtype {value.dtype} has no storage in a .pt file")
        strides: list[int] = []
        step = 1
        for size in reversed(value.shape):
            strides.insert(0, step)
            step *= max(size, 1)
        out.append(text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n((")
        out.append(text("storage") + b"ctorch\n" + storages[value.dtype].encode() + b"\n")
        out.append(text(str(index)) + text("cpu") + number(value.size) + b"tQ" + number(0))
        for numbers in (value.shape, strides):
            out.append(b"(" + b"".join(number(int(n)) for n in numbers) + b"t")
        out.append(b"\x89ccollections\nOrderedDict\n)RtRs")
    return b"".join([*out, b"."])
