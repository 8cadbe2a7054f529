"""A file or folder with other values of its arrays, in which all else stays as it is."""

import contextlib
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fwt import _tree
from fwt._types import ConversionError, Model, wants_statistics
from fwt.converters.files import copies, formats, h5_weights, stored
from fwt.converters.io import write_atomically

_ANOTHER = ("architecture", "rename", "drop", "dtype")  # the options that make another model


def is_edited(path: Path, source: Path, how: Mapping[str, Any], t: Any) -> bool:
    """Whether a file is edited under its own names, whatever its model. What gives layers the
    values of new ones has to know the layers."""
    form = formats.by_suffix(path)
    own = form is not None and form.knowing is not None and not any(map(how.get, _ANOTHER))
    own = own and not wants_statistics(t)
    return own and formats.is_written_into(path, source)


def says_dtypes(path: Path) -> bool:
    """Whether a file holds a model, which says the dtypes of its arrays."""
    form = formats.format_of(path)
    return form.knowing is not None or (form.framework == "Keras" and h5_weights.holds_model(path))


def knowing(path: Path, model: Model) -> contextlib.AbstractContextManager[Model]:
    """The arrays of a file alone for a transform; inside, what the file tells of them is known."""
    tell = formats.format_of(formats.inside(path)).knowing if model.module is None else None
    return contextlib.nullcontext(model) if tell is None else tell(path, model)


def copied(
    source: Path, path: Path, model: Model, before: Model, how: Mapping[str, Any]
) -> Callable[[], None] | None:
    """What writes a copy of a file or folder with the arrays of a model to a path; None where a new
    file is to be written, of the model alone.

    Args:
        source: what was read.
        path: where to.
        model: what became of it.
        before: what it held.
        how: what it was read with.
    """
    inner, was = formats.inside(source), before.module
    if in_place := _copy_of_keras(path, inner, before, model):
        return in_place
    if model.module is None and formats.is_written_into(path, inner, model.variables):
        if how.get("dtype") is not None and says_dtypes(inner):
            raise ConversionError(f"{source}: dtype=: the model that its weights are of says them")
        return lambda: formats.save(path, *model, source=inner)
    alone = source.is_dir() and formats.by_suffix(path) is None  # no format of its own to write
    another = [name for name in _ANOTHER if how.get(name)]
    if "dtype" in another and was is None and not alone:
        another.remove("dtype")
    try:
        if another:
            raise copies.OtherArraysError(
                f"{source}: {another[0]}= makes other arrays of those in it"
            )
        if model.module is not was:
            raise copies.OtherArraysError(f"{source}: its model is written anew")
        found = formats.copy_of(path, source, model.variables, how.get("key"))
    except copies.OtherArraysError as error:
        if alone:
            raise ConversionError(
                f"{error}; {path} would be a copy of that folder with other values, and a file "
                f"such as {path}.safetensors takes any arrays"
            ) from error
        if how.get("key") is not None and formats.format_of(inner) is formats.by_suffix(path):
            warnings.warn(f"{path}: only the part under key= is written: {error}", stacklevel=4)
        return None
    if found is None:
        return None
    where, copy = found

    def write() -> None:
        copies.save(path, where, copy)
        if where.is_dir():
            copies.warn_of_others(path, where, copy)

    return write


_KERAS = ("keras", "Keras HDF5")


def _copy_of_keras(
    path: Path, source: Path, before: Model, after: Model
) -> Callable[[], None] | None:
    """What writes a copy of the file of a Keras model with other weights in their places, if all
    that are others stand in it as they are in memory; all else of it stays, to the byte."""
    form = formats.by_suffix(path)
    if (
        form is None
        or form.name not in _KERAS
        or not source.is_file()
        or formats.by_content(source) is not form
    ):
        return None
    if before.module is None or after.module != before.module:
        return None
    old, new = (_tree.Tree({"params": m.variables}, whole=True).leaves for m in (before, after))
    if old.keys() != new.keys() or not any(isinstance(x, stored.InFile) for x in old.values()):
        return None
    changed: dict[int, Any] = {}
    for name, was in old.items():
        leaf = new[name]
        if leaf is was:
            continue
        kept = (leaf.shape, leaf.dtype) == (was.shape, was.dtype)
        if not isinstance(was, stored.InFile) or not kept:
            return None
        changed[was.offset] = leaf
    where = stored.Source(source)

    def write(file: Any) -> None:
        if form.name == "keras":
            stored.copy_archive_with(file, where, changed, {})
        else:
            stored.copy_with(file, where, changed)

    return lambda: write_atomically(path, write)
