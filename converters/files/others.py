"""Weights in the files of other libraries, to read alone: TensorFlow's checkpoints and the
variables of its SavedModels, PyTorch's distributed checkpoints, and Equinox's leaves."""

import importlib.util
import io
import math
import pickle
import re
import types
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib import format as npy

from fwt import _tree
from fwt._types import FileFormatError, Model
from fwt.converters import io as _io
from fwt.converters.files import folders, torch_pickle
from fwt.converters.io import Budget, Reading, dtype_of, member, reading

if TYPE_CHECKING:
    import jax
else:
    from fwt._later import jax

# -- TensorFlow -------------------------------------------------------------------------------

_VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"  # behind the name of each variable of an object


def tensorflow_at(path: Path) -> Path | None:
    """What TensorFlow calls the checkpoint at a path: one of its files, its name without an end,
    the folder that holds it alone, or a SavedModel; None where there is none."""
    if path.is_dir():
        if (path / "saved_model.pb").is_file() or (path / "saved_model.pbtxt").is_file():
            path = path / "variables" / "variables"
        else:
            found = [p.with_suffix("") for p in path.glob("*.index")]
            path = found[0] if len(found) == 1 else path
    else:
        path = Path(re.sub(r"\.(index|data-\d+-of-\d+)$", "", str(path)))
    data = path.parent.glob(f"{path.name}.data-*-of-*") if path.parent.is_dir() else ()
    return path if Path(f"{path}.index").is_file() and any(data) else None


def load_tensorflow(path: Path, how: Reading) -> Model:
    """The variables of a checkpoint, by TensorFlow itself, under the names that it gives them; the
    description of the objects that they are of is left out."""
    prefix = tensorflow_at(path)
    if prefix is None:
        raise FileFormatError(f"{path}: no checkpoint of TensorFlow")
    if importlib.util.find_spec("tensorflow") is None:
        raise FileFormatError(
            f"{path}: {folders.known(path)}; or pip install tensorflow, with which its variables "
            "are read here"
        )
    import tensorflow as tf

    with reading(path):
        files = prefix.parent.glob(f"{prefix.name}.data-*-of-*")
        budget = Budget(path, how.max_bytes, sum(p.stat().st_size for p in files))
        reader = tf.train.load_checkpoint(str(prefix))
        kinds, tree = reader.get_variable_to_dtype_map(), dict[str, Any]()
        for name, shape in sorted(reader.get_variable_to_shape_map().items()):
            if not kinds[name].is_numpy_compatible or kinds[name] == tf.string:
                continue
            budget.spend(name, math.prod(shape) * kinds[name].size)
            value = np.asarray(reader.get_tensor(name))
            _io.progress(value.nbytes)
            _put(tree, name.removesuffix(_VALUE).split("/"), value)
        return Model(None, {"params": _io.under(tree, how.key, path)})


def _put(tree: dict[str, Any], parts: list[str], value: np.ndarray) -> None:
    """An array in a tree. What stands below an array, as the slots of older optimizers do, is
    beside it, under the rest of its name."""
    for i, part in enumerate(parts[:-1]):
        if not isinstance(tree.get(part, {}), dict):
            tree["/".join(parts[i:])] = value
            return
        tree = tree.setdefault(part, {})
    tree[parts[-1]] = value


# -- PyTorch's distributed checkpoints --------------------------------------------------------

METADATA = ".metadata"  # the file of such a folder that says what is where


def load_distributed(path: Path, how: Reading) -> Model:
    """The tensors of a folder of ``torch.distributed.checkpoint``, put together of the parts that
    each process wrote, under the names that a state dict gives them."""
    path = path if path.is_dir() else path.parent
    with reading(path):
        size = sum(p.stat().st_size for p in _io.folder_files(path))
        budget = Budget(path, how.max_bytes, size)
        told = _metadata(path, budget)
        places: dict[str, list[tuple[Any, Any]]] = {}
        for index, place in told["storage_data"].items():
            places.setdefault(_text(index.state["fqn"]), []).append((index.state, place.state))
        parts = told.get("planner_data") or {}
        held: dict[str, Any] = {}
        left: list[str] = []
        for name, kind in told["state_dict_metadata"].items():
            if "properties" not in kind.state:  # no tensor
                left.append(_text(name))
                continue
            value = _tensor(name, kind.state, places[name], path, budget)
            *above, last = (str(p) for p in parts.get(name, (name,)))
            _put(held, [*above, last], value)
        if left:
            more = ", ..." if len(left) > 5 else ""
            warnings.warn(
                f"{path}: left out, since they are no tensors: {', '.join(left[:5])}{more}",
                stacklevel=5,
            )
        flat = _dotted(_io.under(held, how.key, path), "")
        return Model(None, {"params": {}, **_io.nested(flat, ".", path)})


def _dotted(tree: Mapping[str, Any], start: str) -> dict[str, np.ndarray]:
    out: dict[str, np.ndarray] = {}
    for name, value in tree.items():
        inner = isinstance(value, Mapping)
        out |= _dotted(value, f"{start}{name}.") if inner else {f"{start}{name}": value}
    return out


def _tensor(
    name: str, told: Mapping[str, Any], places: Any, path: Path, budget: Budget
) -> np.ndarray:
    """One tensor of its parts, which have to make all of it."""
    kind = told["properties"].state
    dtype = dtype_of(_text(kind[0] if isinstance(kind, tuple) else kind["dtype"]))
    shape = _sizes(told["size"])
    budget.spend(name, math.prod(shape) * dtype.itemsize)
    value = np.zeros(shape, dtype)
    count = 0
    for index, place in places:
        if place.get("transform_descriptors"):
            raise FileFormatError(f"{path}: {name} is compressed, which is not read")
        there = _io.sibling(path / METADATA, place["relative_path"])
        part = _saved(there, int(place["offset"]), int(place["length"]), budget)
        at = _sizes(index["offset"]) if index["offset"] is not None else (0,) * part.ndim
        ends = [a + n for a, n in zip(at, part.shape, strict=True)]
        if part.dtype != dtype or any(e > n for e, n in zip(ends, shape, strict=True)):
            raise FileFormatError(f"{path}: a part of {name} does not fit into it")
        value[tuple(slice(a, e) for a, e in zip(at, ends, strict=True))] = part
        count += part.size
        _io.progress(part.nbytes)
    if count != value.size:
        raise FileFormatError(
            f"{path}: the parts of {name} have {count:,} of its {value.size:,} entries"
        )
    return value


def _saved(path: Path, start: int, size: int, budget: Budget) -> np.ndarray:
    """What ``torch.save`` wrote at a place in a file: one tensor."""
    if min(start, size) < 0 or start + size > path.stat().st_size:
        raise FileFormatError(f"{path}: it has no {size:,} bytes from {start:,} on")
    with open(path, "rb") as file:
        file.seek(start)
        data = file.read(size)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        stem = next(n for n in archive.namelist() if n.endswith("/data.pkl"))[: -len("data.pkl")]
        order = f"{stem}byteorder"
        big = order in archive.namelist() and bytes(member(archive, order, budget)) == b"big"

        def stored(name: str, _: int) -> Any:
            return member(archive, f"{stem}data/{name}", budget)

        pickled = bytes(member(archive, f"{stem}data.pkl", budget))
        value = torch_pickle.loaded(pickled, budget, stored, big)
    if not isinstance(value, np.ndarray):
        raise FileFormatError(f"{path}: a part of a tensor is none")
    return value


def _sizes(value: Any) -> tuple[int, ...]:
    found = tuple(value)
    if not all(type(n) is int and n >= 0 for n in found):
        raise ValueError(f"the sizes {found!r:.80}")
    return found


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.80} is no text")
    return value


class _Record:
    """What stands for an object of the metadata: its state."""

    state: Any = types.MappingProxyType({})

    def __init__(self, *_: Any, **__: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Word(str):
    """A name in torch, such as a dtype, which may be called like a function of it."""

    def __call__(self, *_: Any) -> "_Word":
        return self


class _Records(pickle.Unpickler):
    """Reads metadata with nothing imported: each class is a record, and torch's names are text."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch", "Size"):
            return tuple
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" or not re.match("[A-Z]|_StorageInfo|_MEM_FORMAT", name):
            return _Word(name)
        return _Record

    def persistent_load(self, _: Any) -> Any:
        raise ValueError("its metadata names a storage")


def _metadata(path: Path, budget: Budget) -> dict[str, Any]:
    pickled = (path / METADATA).read_bytes()
    torch_pickle.check(pickled, path, budget)
    found = _Records(io.BytesIO(pickled)).load()
    if not isinstance(found, _Record) or not isinstance(found.state, dict):
        raise FileFormatError(f"{path}: its {METADATA} is not that of a distributed checkpoint")
    return found.state


# -- Equinox ----------------------------------------------------------------------------------

_MAGIC = b"\x93NUMPY"


def load_equinox(path: Path, tree: Any, how: Reading) -> Model:
    """The leaves of ``equinox.tree_serialise_leaves``, which has no names: those of a tree of the
    same structure."""
    _io.without_key(path, how)
    if tree is None or isinstance(tree, str | Path):
        raise FileFormatError(
            f"{path}: leaves of Equinox without names: architecture= is the tree that they are of, "
            "such as the module, in Python: load(path, architecture=module)"
        )
    treedef: Any
    leaves, treedef = jax.tree.flatten(tree)
    with reading(path), open(path, "rb") as file:
        budget = Budget(path, how.max_bytes)
        if file.read(6) != _MAGIC:  # a line of settings in front, as Equinox's guide writes it
            file.seek(0)
            file.readline(1 << 20)
        else:
            file.seek(0)
        new = [_leaf(file, x, i, path, budget) for i, x in enumerate(leaves)]
        if file.read(1):
            raise FileFormatError(
                f"{path}: it holds more leaves than the {len(leaves)} of the tree"
            )
    found = _tree.Tree({"params": treedef.unflatten(new)}, whole=True).leaves
    flat = {f"params/{p}": np.asarray(x) for p, x in found.items()}
    return Model(None, {"params": {}, **_io.nested(flat, "/", path)})


def _leaf(file: Any, like: Any, place: int, path: Path, budget: Budget) -> Any:
    """The next array of a file, for a leaf; what is no number has none."""
    if not (_tree.is_array(like) or isinstance(like, bool | int | float | complex | np.generic)):
        return like
    version = npy.read_magic(file)
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
    if read is None:
        raise FileFormatError(f"{path}: leaf {place} has the version {version} of NumPy's format")
    shape, fortran, dtype = read(file)
    budget.spend(f"leaf {place}", math.prod(shape) * dtype.itemsize)
    wanted = np.asarray(like).dtype if not hasattr(like, "dtype") else np.dtype(like.dtype)
    if dtype.kind == wanted.kind == "V" and dtype.itemsize == wanted.itemsize:  # such as bfloat16
        dtype = wanted
    size = math.prod(shape) * dtype.itemsize
    data = file.read(size)
    array = isinstance(like, np.generic) or _tree.is_array(like)
    if len(data) != size or (array and (shape, dtype) != (tuple(np.shape(like)), wanted)):
        raise FileFormatError(
            f"{path}: leaf {place}: expected {wanted}{list(np.shape(like))}, found "
            f"{dtype}{list(shape)}"
        )
    value = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
    return value.copy() if array else like
