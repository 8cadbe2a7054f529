"""Reading and writing files safely, for every format."""

import contextlib
import ctypes
import dataclasses
import itertools
import json
import os
import secrets
import shutil
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import ml_dtypes
import numpy as np

from fwt import _nodes, _tree
from fwt._stored import Stored
from fwt._stored import half_of_memory as half_of_memory
from fwt._types import ConversionError, FileFormatError, FwtError

if TYPE_CHECKING:
    import jax
else:
    from fwt._later import jax


@dataclasses.dataclass(frozen=True)
class Reading:
    """How a file is to be read: which part of it, whether computed weights are folded, how much
    its compressed parts may grow to, on which devices its arrays shall be, whether what Flax has
    no place for is kept, whether arrays may be in another file, whether its model is read or its
    arrays alone, and the globs of what is not wanted."""

    key: Any = None  # a text, or several in a tuple for load alone
    fold: bool = True
    max_bytes: int | None = None
    shardings: Any = None
    sidecar: bool = False
    external: bool = False
    module: bool = True
    drop: tuple[str, ...] = ()


# Called with the number of bytes that were read or written since the last call.
PROGRESS: ContextVar[Callable[[int], None] | None] = ContextVar("PROGRESS", default=None)


def progress(count: int) -> None:
    """Tells whoever watches that so many bytes went by."""
    watcher = PROGRESS.get()
    if watcher is not None:
        watcher(count)


class UnusedError(FileFormatError):
    """An option that a file has no use for, such as a part that it lacks: ``option`` says which,
    ``value`` is what was given, of several the one. Another file may have."""

    def __init__(self, text: str, option: str, value: str):
        super().__init__(text)
        self.option, self.value = option, value


# What a file whose model can't be converted is still good for.
ALONE = "; load(path, module=False) reads its arrays alone"


def with_way(error: FileFormatError, load: Callable[..., Any], path: Path, how: Any) -> NoReturn:
    """Raises that a model can't be converted, with the way to its arrays if they are whole."""
    held = False
    with contextlib.suppress(FileFormatError):
        held = bool(load(path, dataclasses.replace(how, module=False)).variables.get("params"))
    if held:
        raise FileFormatError(f"{error}{ALONE}") from error
    raise error


def given_path(path: Any) -> Path:
    """What a user gave as the path of a file."""
    if not isinstance(path, str | os.PathLike):
        held = isinstance(path, Mapping) and all(hasattr(v, "detach") for v in path.values())
        way = "; torch.save(state, 'net.pt') writes a state dict for it" if path and held else ""
        raise FileFormatError(f"expected the path of a file, found {type(path).__name__}{way}")
    return Path(path)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever is said about a broken file becomes one line of ours."""
    try:
        yield
    except (FileFormatError, ImportError):  # of a package that is not installed
        raise
    except ConversionError as error:
        text = str(error)
        raise FileFormatError(text if str(path) in text else f"{path}: {text}") from error
    except Exception as error:  # parsers fail with any class of error: the file is broken
        why = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, KeyError):
            why = f"it lacks {why}"
        raise FileFormatError(f"{path}: not a readable {path.suffix} file ({why:.300})") from error


def write_atomically(path: Path, write: Callable[[Any], None]) -> None:
    """Writes beside the target, syncs and renames: the old file or the new one, never a part."""
    with _writing(path) as (target, leave):
        if target.is_dir():
            raise FileFormatError(f"{path}: a directory is in the way")
        if target.exists() and not target.is_file():
            raise FileFormatError(f"{path}: something that is no file is in the way")
        name = _beside(target)
        # The kernel takes the umask off, as it does for any new file.
        handle = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        leave(name)
        with os.fdopen(handle, "wb") as file:
            write(Counted(file, Path(name)))
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileNotFoundError):
            os.chmod(name, target.stat().st_mode & 0o777)
        os.replace(name, target)
        _sync(target.parent)


def _beside(target: Path) -> str:
    return str(target.parent / f".fwt-{secrets.token_hex(8)}")


def write_folder_atomically(
    path: Path, write: Callable[[Path], None], known: Callable[[Path], bool]
) -> None:
    """The same for a format that is a folder. One that is there already is replaced only if it is
    empty or ``known`` says that it is of such a format too."""
    with _writing(path) as (target, leave):
        there = target.exists()
        if there and not target.is_dir():
            raise FileFormatError(f"{path}: a file is in the way of a folder")
        if there and any(target.iterdir()) and not known(target):
            raise FileFormatError(
                f"{path}: a folder with other things is in the way: remove it, or write elsewhere"
            )
        temporary = Path(_beside(target))
        os.mkdir(temporary)
        leave(str(temporary))
        write(temporary)
        if there:
            os.chmod(temporary, target.stat().st_mode & 0o777)
        for file in (temporary, *temporary.rglob("*")):
            if not file.is_symlink():
                _sync(file)
        try:
            os.replace(temporary, target)
        except OSError:  # it is not empty, or has come to be
            if not target.is_dir() or not known(target):
                raise
            _exchange(temporary, target)  # what was there is now what is left to remove
        _sync(target.parent)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[tuple[Path, Callable[[str], None]]]:
    left: list[str] = []
    try:
        yield Path(os.path.realpath(path)), left.append  # a link stays a link
    except (OSError, ValueError) as error:
        if isinstance(error, FwtError):
            raise
        why = getattr(error, "strerror", None) or error
        raise FileFormatError(f"{path}: can't write it ({why})") from error
    finally:
        for name in left:
            if os.path.isdir(name):
                shutil.rmtree(name, ignore_errors=True)
            else:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name)


class Counted:
    """A file that tells how much was written; ``path`` is where it stands meanwhile."""

    def __init__(self, file: Any, path: Path | None = None):
        self.file, self.path = file, path

    def write(self, data: Any) -> int:
        count: int = self.file.write(data)
        progress(count)
        return count

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:  # some file systems can't sync a folder
        if not path.is_dir():
            raise
    finally:
        os.close(handle)


def _exchange(one: Path, other: Path) -> None:
    """Swaps two folders in one step, which Linux alone offers."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename is None or rename(here, os.fsencode(one), here, os.fsencode(other), swap):
        raise FileFormatError(
            f"{other}: this system can't replace a folder in one step: remove it first"
        )


def folder_files(path: Path) -> list[Path]:
    """The files of a folder, whatever their depth; anything else than plain ones is refused."""
    out: list[Path] = []
    for folder, folders, names in os.walk(path):
        for name in [*folders, *names]:
            there = Path(folder) / name
            mode = there.lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise FileFormatError(f"{there}: a link or special file, which is not read")
        out += [Path(folder) / name for name in names]
        if len(out) > 1_000_000:
            raise FileFormatError(f"{path}: more than a million files")
    return sorted(out)


_RATIO = 1_100  # deflate reaches 1,032
_JSON = 100_000_000  # the largest text that is parsed


class Budget:
    """What a file may make us allocate, checked against what it declares before it is done.

    Stored parts: four times the file's own size and 64 MiB. Compressed ones: 1,100 times their
    compressed size, and ``max_bytes`` (half of the machine's memory unless told) in all."""

    def __init__(self, path: Path, max_bytes: int | None = None, size: int | None = None):
        self.path = path
        self.left = 4 * (path.stat().st_size if size is None else size) + (64 << 20)
        self.max_bytes = half_of_memory() if max_bytes is None else max_bytes
        self.room = self.max_bytes
        self.raw: Any = b""  # the bytes of an HDF5 file while it is open
        self.unread: Any = None  # where its arrays may stay in it

    def spend(self, what: str, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise FileFormatError(
                f"{self.path}: {what} declares {size:,} bytes, more than such a file may hold"
            )

    def expand(self, what: str, stored: int | None, size: int) -> None:
        if stored is not None and size > _RATIO * stored + 1024:
            raise FileFormatError(
                f"{self.path}: {what} declares {size:,} bytes, compressed to {stored:,}: no "
                "compression does that"
            )
        self.room -= size
        if self.room < 0:
            raise FileFormatError(
                f"{self.path}: {what} and what comes before it need more than "
                f"max_bytes={self.max_bytes:,} once decompressed; load(path, max_bytes=...) "
                "allows more"
            )
        self.left += size  # what stands in it may be read out of it

    def parsed(self, data: bytes | bytearray | str, what: str) -> Any:
        """JSON, whose values may take more memory than its text."""
        text = data if isinstance(data, str) else bytes(data).decode()
        self.spend(what, 160 * sum(text.count(mark) for mark in "[{,"))
        return json.loads(text)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """A zip archive that names each member once."""
    # What lists the members becomes some twenty times as large in memory.
    Budget(path).spend("its list of members", 20 * _size_of_list(path))
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if len(set(names)) < len(names):
            twice = next(n for n, following in itertools.pairwise(sorted(names)) if n == following)
            raise FileFormatError(f"{path}: two members are named {twice!r}")
        yield archive


def _size_of_list(path: Path) -> int:
    """The size of a zip archive's directory, as its end declares it."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 66_000, 0))
        tail = file.read()
    end = tail.rfind(b"PK\5\6")
    if end < 0:
        raise ValueError("File is not a zip file")
    found = int.from_bytes(tail[end + 12 : end + 16], "little")
    larger = tail.rfind(b"PK\6\6")
    if found == 0xFFFFFFFF and larger >= 0:
        found = int.from_bytes(tail[larger + 40 : larger + 48], "little")
    return min(found, size)


def member(
    archive: zipfile.ZipFile,
    name: str,
    budget: Budget,
    check: Callable[[bytes | bytearray, int], None] = lambda start, size: None,
) -> bytearray:
    """A member of an archive, its size checked first. ``check`` looks at its first bytes, knowing
    its size, before the rest is decompressed."""
    path = budget.path
    try:
        info = archive.getinfo(name)
    except KeyError:
        raise FileFormatError(f"{path}: it has no member {name!r}") from None
    if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise FileFormatError(f"{path}: {name} is encrypted or compressed in an unknown way")
    if info.compress_size > path.stat().st_size:
        raise FileFormatError(f"{path}: {name} declares more bytes than the file has")
    if info.compress_type == zipfile.ZIP_STORED:
        if info.file_size != info.compress_size:
            raise FileFormatError(f"{path}: {name} declares two different sizes")
        budget.spend(name, info.file_size)
    else:
        budget.expand(name, info.compress_size, info.file_size)
    if name.endswith(".json") and info.file_size > _JSON:
        raise FileFormatError(f"{path}: {name} declares more than {_JSON:,} bytes of JSON")
    if info.compress_type == zipfile.ZIP_STORED:
        data = bytearray(info.file_size)
        _stored(archive, info, data)
        check(data, len(data))
        return data
    data = bytearray()  # which grows with what is there, whatever is declared
    with archive.open(info) as stream:
        while len(data) < info.file_size:
            chunk = stream.read(min(info.file_size - len(data), 1 << 24))
            if not chunk:
                break
            if not data:
                check(chunk, info.file_size)
            data += chunk
            progress(len(chunk))
        if len(data) < info.file_size or stream.read(1):
            raise FileFormatError(f"{path}: {name} is truncated")
    return data


def _stored(archive: zipfile.ZipFile, info: zipfile.ZipInfo, data: bytearray) -> None:
    """Reads a member without compression straight into its place, and checks its sum."""
    file: Any = archive.fp
    file.seek(info.header_offset)
    head = file.read(30)
    if head[:4] != b"PK\x03\x04":
        raise ValueError(f"{info.filename} has no header")
    sizes = int.from_bytes(head[26:28], "little"), int.from_bytes(head[28:30], "little")
    file.seek(info.header_offset + 30 + sum(sizes))
    view, found = memoryview(data), 0
    for start in range(0, len(data), 1 << 20):  # small enough to stay in the cache
        piece = view[start : start + (1 << 20)]
        if file.readinto(piece) != len(piece):
            raise ValueError(f"{info.filename} is truncated")
        found = zlib.crc32(piece, found)
        progress(len(piece))
    if found != info.CRC:
        raise ValueError(f"{info.filename} has another checksum than it declares")


def add_member(archive: zipfile.ZipFile, name: str, value: np.ndarray, header: bytes = b"") -> None:
    """An array's bytes as a member of an archive, a piece at a time."""
    with archive.open(name, "w", force_zip64=value.nbytes > 1 << 31) as stream:
        stream.write(header)
        write_array(stream, value)


def read_into(file: Any, value: np.ndarray) -> None:
    """Fills an array from a file, a piece at a time."""
    data: Any = memoryview(value.reshape(-1).view(np.uint8).data)
    for start in range(0, len(data), 1 << 24):
        piece = data[start : start + (1 << 24)]
        if file.readinto(piece) != len(piece):
            raise ValueError("it is truncated")
        progress(len(piece))


def write_array(file: Any, value: np.ndarray) -> None:
    """An array's bytes, a piece at a time."""
    if isinstance(value, Stored):
        for piece in value.counted():
            file.write(np.ascontiguousarray(piece).view(np.uint8).data)
        return
    data: Any = memoryview(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
    for start in range(0, len(data), 1 << 24):
        file.write(data[start : start + (1 << 24)])


def read_json(path: Path) -> Any:
    """A JSON file of bounded size."""
    if path.stat().st_size > _JSON:
        raise FileFormatError(f"{path}: more than {_JSON:,} bytes of JSON")
    return Budget(path).parsed(path.read_bytes(), "its JSON")


def index_in(path: Path, suffix: str) -> Path:
    """The index of shards, or the one in a folder."""
    if not path.is_dir():
        return path
    found = sorted(path.glob(f"*{suffix}"))
    if len(found) != 1:
        raise FileFormatError(f"{path}: expected one index of shards, found {len(found)}")
    return found[0]


def sibling(path: Path, name: Any) -> Path:
    """A file that another in the same folder names: no path, no link but Hugging Face's own."""
    if not isinstance(name, str) or not name or name != os.path.basename(name) or name[0] == ".":
        raise FileFormatError(f"{path}: it names {name!r:.80}, which is no file beside it")
    there = path.parent / name
    cached = there.is_symlink() and os.path.dirname(os.readlink(there)) == "../../blobs"
    if (there.is_symlink() and not cached) or not there.is_file():
        raise FileFormatError(f"{path}: {name} is missing beside it, or a link")
    return there


def dotted(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """All arrays under names joined by dots, as torch has them; anything lost is an error."""
    flat: dict[str, np.ndarray] = {}
    for collection, tree in variables.items():
        for path, leaf in arrays(collection, tree).items():
            name = ".".join(parts_of_path(path))
            if name in flat:
                raise ConversionError(
                    f"two arrays would be named {name!r}, since torch joins names by dots: rename "
                    "one of them, or save them as .safetensors"
                )
            flat[name] = leaf
    return flat


def arrays(collection: str, tree: Any) -> dict[str, np.ndarray]:
    """The arrays of a collection by path; a leaf that is no array can't be written."""
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if not _tree.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct):
            place = f"{collection}{jax.tree_util.keystr(keys)}"
            _nodes.refuse_foreign(leaf, (place,))
            what = type(leaf).__name__
            raise ConversionError(f"{place} is a {what} and no array, so it can't be written")
    leaves = _tree.Tree({"params": tree}, whole=True).leaves
    for path in leaves:
        parts = parts_of_path(path)
        try:
            fine = 0 < len(parts) < DEPTH and all(p and p.encode() for p in parts)
        except UnicodeEncodeError:
            fine = False
        if not fine:
            raise ConversionError(f"{collection}: {path!r:.80} can't be a name in a file")
    order = {path: i for i, path in enumerate(_in_order(tree))}
    ordered = sorted(leaves, key=lambda p: order.get(p, 0))  # a file keeps the order of the tree
    seen: dict[int, np.ndarray] = {}  # what is one array stays one
    for leaf in leaves.values():
        if id(leaf) not in seen:
            here: Any = leaf if isinstance(leaf, Stored) else np.asarray(leaf, order="C")
            seen[id(leaf)] = native(here)
    return {p: seen[id(leaves[p])] for p in ordered}


def _in_order(tree: Any, inside: tuple[str, ...] = ()) -> Iterator[str]:
    if not isinstance(tree, Mapping):
        yield "/".join(_tree.escape(p) for p in inside)
        return
    for name, value in tree.items():
        yield from _in_order(value, (*inside, str(name)))


def native(value: np.ndarray) -> np.ndarray:
    """The array in this machine's order of bytes, which is that of every format here."""
    return value if value.dtype.isnative else value.astype(value.dtype.newbyteorder("="))


def dtype_of(name: str) -> np.dtype:
    """A NumPy dtype by name, bfloat16 and the 8-bit floats included."""
    return np.dtype(getattr(ml_dtypes, name) if hasattr(ml_dtypes, name) else name)


def parts_of_path(path: str) -> list[str]:
    """The names that a path is made of."""
    return [_tree.unescape(part) for part in _tree.split(path)]


def slashed(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """All arrays of all collections under their paths: ``params/dense/kernel``."""
    return {
        f"{_tree.escape(collection)}/{path}": leaf
        for collection, tree in variables.items()
        for path, leaf in arrays(collection, tree).items()
    }


DEPTH = 64
TORCH_STATS = ("running_mean", "running_var", "num_batches_tracked")
EXTRA_STATE = "_extra_state"  # what torch calls what a module's get_extra_state gives


def same_names(variables: Mapping[str, Any], path: Path) -> dict[str, np.ndarray] | None:
    """All arrays under names joined by dots, or None where a reader would find another tree."""
    with contextlib.suppress(ConversionError):
        names = dotted(variables)
        again = _tree.Tree({"params": nested(names, ".", path)}, whole=True).leaves
        if again.keys() == _tree.Tree({"params": variables}, whole=True).leaves.keys():
            return names
    return None


def nested(flat: Mapping[str, np.ndarray], separator: str, path: Path) -> dict[str, Any]:
    """Names as a tree. Names that some other program wrote become params, and the running
    statistics of torch's BatchNorm batch_stats."""
    out: dict[str, Any] = {}
    for name, value in flat.items():
        if name.count(separator) >= DEPTH:
            raise FileFormatError(f"{path}: a name of more than {DEPTH} parts, {name:.40}...")
        if separator == "/":
            parts = parts_of_path(name)
        else:
            parts = name.split(separator)
            parts.insert(0, "batch_stats" if parts[-1] in TORCH_STATS else "params")
        node = out
        for part in parts[:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise FileFormatError(f"{path}: {name!r} is both an array and a folder of arrays")
        if parts[-1] in node:
            raise FileFormatError(f"{path}: {name!r} is both an array and a folder of arrays")
        node[parts[-1]] = value
    return out


def under(tree: Any, key: str | None, path: Path) -> Any:
    """What stands in a tree of dicts under a key such as ``model`` or ``state/model``."""
    for part in [] if key is None else key.split("/"):
        if isinstance(tree, Mapping) and part not in tree and part.isdigit() and int(part) in tree:
            tree = tree[int(part)]
            continue
        if not isinstance(tree, Mapping) or part not in tree:
            found = ", ".join(map(repr, tree))[:300] if isinstance(tree, Mapping) else ""
            found = f"but {found}" if found else "and nothing else that has a name"
            raise UnusedError(
                f"{path}: key={key!r}: there is no {part!r}, {found}", "key", str(key)
            )
        tree = tree[part]
    return tree


def without_key(path: Path, how: Reading) -> None:
    """Raises for a ``key`` of a file that has no parts."""
    if how.key is not None:
        text = f"{path}: key={how.key!r}: it holds one model, or one set of weights, only"
        raise UnusedError(text, "key", how.key)


def is_numeric(dtype: np.dtype) -> bool:
    """Whether a dtype is one of weights: numbers, bool, bfloat16 and the like."""
    return dtype.kind in "biufc" or hasattr(ml_dtypes, dtype.name)


def way_to_parts(
    tree: Any, key: str | None, is_array: Callable[[Any], bool], depth: int = DEPTH
) -> str:
    """What to say of a file that holds other things too: which of its parts are arrays alone, in
    dicts of so many levels."""

    def whole(node: Any, left: int) -> bool:
        if isinstance(node, Mapping):
            return bool(node) and left > 0 and all(whole(v, left - 1) for v in node.values())
        return is_array(node)

    level = {"" if key is None else key: tree}
    for _ in range(8):  # the parts that are least deep
        inner = {
            f"{start}/{name}".removeprefix("/"): value
            for start, node in level.items()
            if isinstance(node, Mapping)
            for name, value in node.items()
        }
        level = {name: v for name, v in inner.items() if isinstance(v, Mapping)}
        parts = [name for name, v in level.items() if whole(v, depth)]
        both = [n for n in parts if n.rpartition("/")[2] in ("params", "batch_stats")]
        if len(both) == 2:
            return f"key={sorted(both, reverse=True)!r} picks its variables"
        if parts:
            return f"{' or '.join(f'key={name!r}' for name in parts[:5])} picks a part of it"
    return ""
