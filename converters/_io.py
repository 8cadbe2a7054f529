"""Reading and writing files safely, for every format."""

import contextlib
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fwt import _tree
from fwt._types import ConversionError, FileFormatError, FwtError


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever a library says about a broken file becomes one line of ours."""
    try:
        yield
    except (FileFormatError, ConversionError):
        raise
    except Exception as error:  # any failure of a parser means a broken file
        why = " ".join(str(error).split()) or type(error).__name__
        raise FileFormatError(f"{path}: not a readable {path.suffix} file ({why:.300})") from error


def write_atomically(path: Path, write: Callable[[Any], None]) -> None:
    """Writes beside the target, syncs and renames: the old file or the new one, never a part."""
    temporary = None
    try:
        path = Path(os.path.realpath(path))  # a link stays a link
        if path.is_dir():
            raise FileFormatError(f"{path}: a directory is in the way")
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".fwt-")
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, _mode(path))
        os.replace(temporary, path)
    except (OSError, ValueError) as error:
        if isinstance(error, FwtError):
            raise
        why = getattr(error, "strerror", None) or error
        raise FileFormatError(f"{path}: can't write it ({why})") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)


def _mode(path: Path) -> int:
    """The permissions of the file that is replaced, or of any new file."""
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


class Budget:
    """What a file may make us allocate, checked against what it declares: four times its own size
    and 64 MiB."""

    def __init__(self, path: Path):
        self.path, self.left = path, 4 * path.stat().st_size + (64 << 20)

    def spend(self, what: str, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise FileFormatError(
                f"{self.path}: {what} declares {size:,} bytes, more than such a file may hold"
            )


@contextlib.contextmanager
def opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """A zip archive that names each member once."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if len(set(names)) < len(names):
            twice = next(n for n in names if names.count(n) > 1)
            raise FileFormatError(f"{path}: two members are named {twice!r}")
        yield archive


def member(archive: zipfile.ZipFile, name: str, budget: Budget) -> bytearray:
    """A member of an archive, its size checked first."""
    path = budget.path
    try:
        info = archive.getinfo(name)
    except KeyError:
        raise FileFormatError(f"{path}: it has no member {name!r}") from None
    if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise FileFormatError(f"{path}: {name} is encrypted or compressed in an unknown way")
    stored = info.compress_type == zipfile.ZIP_STORED
    if stored and info.file_size != info.compress_size:
        raise FileFormatError(f"{path}: {name} declares two different sizes")
    budget.spend(name, info.file_size)
    data = bytearray(info.file_size)
    with archive.open(info) as stream:
        done = 0
        while done < len(data) and (chunk := stream.read(min(len(data) - done, 1 << 24))):
            data[done : done + len(chunk)] = chunk
            done += len(chunk)
        if done < len(data) or stream.read(1):
            raise FileFormatError(f"{path}: {name} is truncated")
    return data


def dotted(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """All arrays under names joined by dots, as torch has them; anything lost is an error."""
    flat: dict[str, np.ndarray] = {}
    for collection, tree in variables.items():
        for path, leaf in arrays(collection, tree).items():
            name = ".".join(_tree.unescape(p) for p in _tree.split(path))
            if name in flat:
                raise ConversionError(f"two arrays would be named {name!r}: rename one of them")
            flat[name] = leaf
    return flat


def arrays(collection: str, tree: Any) -> dict[str, np.ndarray]:
    """The arrays of a collection by path; a leaf that is no array can't be written."""
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if not _tree.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct):
            place = f"{collection}{jax.tree_util.keystr(keys)}"
            raise ConversionError(f"{place}: {leaf!r:.60} is no array, so it can't be written")
    leaves = _tree.Tree({"params": tree}).leaves
    return {p: np.asarray(x, order="C") for p, x in leaves.items()}


TORCH_STATS = ("running_mean", "running_var", "num_batches_tracked")


def nested(flat: Mapping[str, np.ndarray], separator: str, path: Path) -> dict[str, Any]:
    """Names as a tree. Names that some other program wrote become params, and the running
    statistics of torch's BatchNorm batch_stats."""
    out: dict[str, Any] = {}
    for name, value in flat.items():
        if separator == "/":
            parts = [_tree.unescape(p) for p in _tree.split(name)]
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
