"""Reading and writing files safely, for every format."""

import contextlib
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fwt import _tree
from fwt._types import ConversionError, FileFormatError


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever a library says about a broken file becomes one line of ours."""
    try:
        yield
    except (FileFormatError, ConversionError):
        raise
    except Exception as error:
        raise FileFormatError(f"{path}: not a readable {path.suffix} file ({error})") from error


def write_atomically(path: Path, write: Callable[[Any], None]) -> None:
    """Writes beside the target, syncs and renames: the old file or the new one, never a part."""
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise FileFormatError(f"{path}: can't write there ({error.strerror})") from error
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes the file private; a saved model has the permissions of any new file.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except OSError as error:
        raise FileFormatError(f"{path}: can't write it ({error.strerror or error})") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def member(archive: zipfile.ZipFile, name: str, path: Path) -> bytearray:
    """A member of an archive that stores without compressing, its size checked first."""
    try:
        info = archive.getinfo(name)
    except KeyError:
        raise FileFormatError(f"{path}: it has no member {name!r}") from None
    if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise FileFormatError(f"{path}: {name} is encrypted or compressed in an unknown way")
    on_disk = path.stat().st_size
    if info.compress_size > on_disk or info.file_size > 1100 * info.compress_size + 1024:
        raise FileFormatError(
            f"{path}: {name} declares {info.file_size} bytes, more than the file can hold"
        )
    data = bytearray(info.file_size)
    with archive.open(info) as stream:
        done = 0
        while done < len(data) and (chunk := stream.read(min(len(data) - done, 1 << 24))):
            data[done : done + len(chunk)] = chunk
            done += len(chunk)
        if done < len(data) or stream.read(1):
            raise FileFormatError(f"{path}: {name} is truncated")
    return data


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
