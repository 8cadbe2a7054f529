"""A copy of a file or folder with other values of its arrays: all else in it stays as it is."""

import dataclasses
import os
import shutil
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fwt import _paths
from fwt._types import FileFormatError, Model
from fwt.converters import io as _io
from fwt.converters.files import folders
from fwt.converters.files import source as _source
from fwt.converters.io import Counted, Reading, progress, write_atomically, write_folder_atomically

# What holds weights, whoever wrote it.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".npz")


class OtherArraysError(FileFormatError):
    """The arrays are not those of the file, so that they can't be written into a copy of it."""


@dataclasses.dataclass(frozen=True)
class Copy:
    """What of a file or folder is written anew, each part by its own function: ``files`` to an open
    file, what stands in ``folders`` to an empty folder."""

    files: Mapping[Path, Callable[[Any], None]] = dataclasses.field(default_factory=dict)
    folders: Mapping[Path, Callable[[Path], None]] = dataclasses.field(default_factory=dict)


def check(
    source: Path, held: Mapping[str, Any], new: Mapping[str, Any], exact: bool = True
) -> None:
    """Raises unless there are the same names, and with ``exact`` the same shapes and dtypes."""
    for name in [n for n in held if n not in new][:1]:
        raise OtherArraysError(f"{source}: {name} is in it, and not among the arrays to write")
    for name in [n for n in new if n not in held][:1]:
        raise OtherArraysError(f"{source}: it holds no {name}, which is among the arrays to write")
    for name, old in held.items() if exact else ():
        before, after = ((x.dtype, tuple(x.shape)) for x in (old, new[name]))
        if before != after:
            was, now = (f"{dtype}{list(shape)}" for dtype, shape in (before, after))
            raise OtherArraysError(f"{source}: {name} is {was}, and became {now}")


def save(path: Path, source: Path, copy: Copy) -> None:
    """Writes the copy to a path, which may be that of the source: whole or not at all."""
    if not source.is_dir():
        write_atomically(path, copy.files[source])
        return
    here, there = Path(os.path.realpath(source)), Path(os.path.realpath(path))
    if here != there and (here.is_relative_to(there) or there.is_relative_to(here)):
        raise FileFormatError(f"{path}: one of this folder and {source} is inside the other")

    def fill(folder: Path) -> None:
        _fill(folder, source, source, copy)

    write_folder_atomically(
        path,
        lambda folder: copy.folders.get(source, fill)(folder),
        lambda old: all(os.path.lexists(source / name) for name in _names(old)),
    )


def _names(folder: Path) -> Iterator[Path]:
    """What stands in a folder, by its path from there."""
    for above, inner, names in os.walk(folder):
        yield from (Path(above, name).relative_to(folder) for name in [*inner, *names])


def _fill(folder: Path, source: Path, root: Path, copy: Copy) -> None:
    for entry in sorted(os.scandir(source), key=lambda each: each.name):
        here, there = source / entry.name, folder / entry.name
        if here in copy.files:
            with open(there, "wb") as file:
                copy.files[here](Counted(file, there))
            shutil.copymode(here, there)
        elif entry.is_symlink() and not _is_cached(here):
            os.symlink(_aim(here, root), there)
        elif entry.is_dir():
            there.mkdir()
            if here in copy.folders:
                copy.folders[here](there)
            else:
                _fill(there, here, root, copy)
            shutil.copystat(here, there)
        elif entry.is_file():
            shutil.copy2(here, there)
            progress(entry.stat().st_size)
        else:
            raise FileFormatError(f"{here}: a special file, which is not copied")


def _is_cached(link: Path) -> bool:
    """Whether a link is one of Hugging Face's cache, whose files stand elsewhere and may go."""
    return os.path.dirname(os.readlink(link)) == "../../blobs" and link.is_file()


def _aim(link: Path, root: Path) -> str:
    """What the copy of a link says: one that leads out of the folder still leads to the same."""
    said = os.readlink(link)
    found = os.path.normpath(os.path.join(os.path.realpath(link.parent), said))
    return said if Path(found).is_relative_to(os.path.realpath(root)) else found


def warn_of_others(path: Path, folder: Path, copy: Copy) -> None:
    """Warns of other files of weights in a folder, which stay as they are: of two copies of one
    model, as Hugging Face has them, a reader may take the other."""
    others = [
        str(name)
        for name in sorted(_names(folder))
        if name.suffix in _WEIGHTS
        and not name.name.startswith(folders.NO_WEIGHTS)
        and folder / name not in copy.files
    ]
    if others:
        more = ", ..." if len(others) > 5 else ""
        warnings.warn(
            f"{path}: other files of weights in it stay as they are: {', '.join(others[:5])}{more}",
            stacklevel=4,
        )


# -- stand-ins --------------------------------------------------------------------------------


def stand_in(shape: Any, dtype: np.dtype) -> np.ndarray:
    """An array of a shape and dtype that takes no memory: what stands where in a file is told by
    its own reader, which is given one for each array."""
    return np.broadcast_to(np.zeros((), dtype), tuple(shape))


def by_stand_in(
    source: Path, load: Callable[..., Model], variables: Any, key: Any, exact: bool = False
) -> dict[int, np.ndarray]:
    """By the id of each stand-in that a reader gives, the array that takes its place."""
    form = types.SimpleNamespace(load=load, suffixes=("",))
    whole = folders.read(form, source, Reading(key))
    held = {
        "/".join(map(_paths.escape, (collection, *parts))): value
        for collection, parts, value in _source.flat_parts(whole.variables)
    }
    new = _io.slashed(variables)
    check(source, held, new, exact)
    return {id(held[name]): value for name, value in new.items()}
