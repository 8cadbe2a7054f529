"""FORMATS: what each format is called, its load and its save, and how it is told by its content."""

import zipfile
from pathlib import Path

from fwt._types import FileFormatError
from fwt.converters import io as _io
from fwt.converters.files import (
    copies_orbax,
    copies_plain,
    copies_safetensors,
    copies_torch,
    folders,
    h5_weights,
    orbax,
    others,
    plain,
    safetensors,
    torch_file,
)
from fwt.converters.files.format import (
    Format,
    fill_groups,
    in_place,
    load_keras,
    load_legacy,
    load_onnx,
    of_models,
    of_onnx,
    save_onnx,
)

_into_keras = in_place(of_models("save_into"))
KERAS = Format(
    "keras",
    (".keras",),
    load_keras,
    of_models("save_keras"),
    framework="Keras",
    needs_module=True,
    holds="a model of Keras 3 or 2",
    save_into=_into_keras,
)
WEIGHTS = Format(
    "Keras weights",
    (".weights.h5",),
    h5_weights.load_weights,
    of_models("save_weights"),
    save_shards=of_models("save_weight_shards"),
    fill=fill_groups(h5_weights.load_weights),
    framework="Keras",
    needs_module=True,
    weights_only=True,
    holds="weights; `architecture=` gives their model",
    save_into=_into_keras,
)
WEIGHT_SHARDS = Format(
    "Keras weights in shards",
    (".weights.json",),
    h5_weights.load_weight_shards,
    fill=fill_groups(h5_weights.load_weight_shards),
    framework="Keras",
    needs_module=True,
    weights_only=True,
    holds="the same in shards; written with `.weights.h5` and `shard_bytes=`",
)
LEGACY = Format(
    "Keras HDF5",
    (".h5", ".hdf5"),
    load_legacy,
    of_models("save_legacy"),
    fill=of_models("fill_from_legacy"),
    framework="Keras",
    needs_module=True,
    holds="a model of Keras 3 or 2, or weights only",
    save_into=_into_keras,
)
TORCH = Format(
    "torch",
    (".pt", ".pth", ".bin"),
    torch_file.load_torch,
    torch_file.save_torch,
    framework="PyTorch",
    weights_only=True,
    holds="weights: a state dict, a checkpoint with one (`key=`), or `.bin.index.json` of shards",
    copy=copies_torch.copy_of,
)
SAFETENSORS = Format(
    "safetensors",
    (".safetensors",),
    safetensors.load_safetensors,
    safetensors.save_safetensors,
    save_shards=safetensors.save_sharded,
    framework="safetensors",
    holds="a model if fwt wrote it (in the metadata), else weights",
    copy=copies_safetensors.copy_of,
)
SHARDED = Format(
    "safetensors in shards",
    (".safetensors.index.json",),
    safetensors.load_sharded,
    framework="safetensors",
    holds="the same in shards; written with `.safetensors` and `shard_bytes=`",
    copy=copies_safetensors.copy_of_shards,
)
NPZ = Format(
    "NumPy",
    (".npz",),
    plain.load_npz,
    plain.save_npz,
    framework="NumPy",
    holds="a model if fwt wrote it (in a member), else weights",
    copy=copies_plain.copy_of_npz,
)
MSGPACK = Format(
    "msgpack",
    (".msgpack",),
    plain.load_msgpack,
    plain.save_msgpack,
    framework="Flax",
    weights_only=True,
    holds="weights: variables, or a state that has them (`key=`)",
    copy=copies_plain.copy_of_msgpack,
)
ORBAX = Format(
    "Orbax",
    (".orbax",),
    orbax.load_orbax,
    save_folder=orbax.save_orbax,
    framework="Orbax",
    holds="a folder: a model if fwt wrote it, else weights (`key=`, `shardings=`)",
    copy=copies_orbax.copy_of,
)


ONNX = Format(
    "ONNX",
    (".onnx",),
    load_onnx,
    save_onnx,
    framework="ONNX",
    needs_module=True,
    holds="a model; `to_onnx` and `from_onnx` say more",
    save_into=of_onnx("save_into"),
    knowing=of_onnx("knowing"),
)

FORMATS = (KERAS, WEIGHTS, WEIGHT_SHARDS, LEGACY, TORCH, SAFETENSORS, SHARDED, NPZ,
           MSGPACK, ORBAX, ONNX)  # fmt: skip
# Whose weights are read alone.
TENSORFLOW = Format("TensorFlow", (".index",), others.load_tensorflow, weights_only=True)
DISTRIBUTED = Format("torch, distributed", (".distcp",), others.load_distributed, weights_only=True)
EQUINOX = Format(
    "Equinox", (".eqx",), lambda path, how: others.load_equinox(path, None, how), weights_only=True
)
SUFFIXES = {suffix: f for f in FORMATS for suffix in f.suffixes}
# What the checkpoints of training runs are called: read by their content, and not written.
RUNS = (".ckpt", ".pth.tar", ".pt.tar")


def suffix(path: Path) -> str:
    """The end of a name that says the format, the longest that fits; else what follows its last
    dot."""
    fitting = [s for s in (*SUFFIXES, *RUNS) if path.name.lower().endswith(s)]
    return max(fitting, key=len) if fitting else path.suffix


def by_suffix(path: Path) -> Format | None:
    """The format that a name says."""
    return SUFFIXES.get(suffix(path).lower())


def by_content(path: Path) -> Format | None:
    """The format that a file or folder is, whatever its name."""
    if path.is_dir():
        return _of_folder(path)
    if path.suffix == ".eqx":
        return EQUINOX
    if path.suffix == ".distcp" or path.name == others.METADATA:
        return DISTRIBUTED
    if others.tensorflow_at(path) is not None:
        return TENSORFLOW
    with open(path, "rb") as file:
        head = file.read(512)
    if head[:4] == b"PK\x03\x04" and zipfile.is_zipfile(path):
        with _io.reading(path), _io.opened(path) as archive:
            names = archive.namelist()
        if "config.json" in names and any(n.endswith(".weights.h5") for n in names):
            return KERAS
        if any(n.endswith("/data.pkl") for n in names):
            return TORCH
        return NPZ if any(n.endswith(".npy") for n in names) else None
    if head[:8] == b"\x89HDF\r\n\x1a\n":
        return WEIGHTS if h5_weights.is_weights(path) else LEGACY
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32:
        return SAFETENSORS
    if (
        head[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
        or head[257:262] == b"ustar"
    ):
        return TORCH  # the format before 1.6, or a tar, which it refuses by name
    if head[:1] == b"{":
        ends = {".weights.json": WEIGHT_SHARDS, ".bin.index.json": TORCH}
        return next((f for end, f in ends.items() if path.name.endswith(end)), SHARDED)
    if head[:1] == b"\x08" and head[2:3] in (b"\x12", b"\x1a", b"\x22", b"\x3a", b"\x42"):
        return ONNX
    if head == b"\x80" or (head and (0x81 <= head[0] <= 0x8F or head[0] in (0xDE, 0xDF))):
        return MSGPACK
    return None


def _of_folder(path: Path) -> Format | None:
    if any(path.glob("*.safetensors.index.json")):
        return SHARDED
    if any(path.glob("*.bin.index.json")):
        return TORCH
    if any(path.glob("*.weights.json")):
        return WEIGHT_SHARDS
    if orbax.is_orbax(path) or any(orbax.is_orbax(p) for p in path.iterdir() if p.is_dir()):
        return ORBAX
    if (path / others.METADATA).is_file() and any(path.glob("*.distcp")):
        return DISTRIBUTED
    return None if others.tensorflow_at(path) is None else TENSORFLOW


def inside(path: Path) -> Path:
    """The one file of weights in a folder of no format of its own; any other path as it is."""
    if not path.exists() and others.tensorflow_at(path) is not None:  # TensorFlow's own name of it
        return Path(f"{path}.index")
    known = not path.is_dir() or by_content(path) is not None
    return path if known else folders.weights_in(path)


def format_of(path: Path) -> Format:
    """The format to read a path with: by content, else by name, whose reader says what is wrong."""
    found = by_content(path) if path.exists() else None
    found = found or (by_suffix(path) if path.is_file() else None)
    if found in (None, SHARDED) and (what := folders.known(path)):
        raise FileFormatError(f"{path}: {what}")
    if not path.exists():
        raise FileFormatError(f"{path}: no such file")
    if found is None:
        what = f"a {'folder' if path.is_dir() else 'file'} of no known format"
        raise FileFormatError(f"{path}: {what}; known are {', '.join(SUFFIXES)}")
    return found
