"""A file with other values of its arrays, in which all else stays as it is."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fwt import _tree
from fwt._types import Model, wants_statistics
from fwt.converters.files import formats, h5_weights, stored
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
    tell = formats.format_of(path).knowing if model.module is None else None
    return contextlib.nullcontext(model) if tell is None else tell(path, model)


_KERAS = ("keras", "Keras HDF5")


def edited(path: Path, source: Path, before: Model, after: Model) -> bool:
    """Writes a copy of the file of a Keras model with other weights in their places, if all that
    are others stand in it as they are in memory; all else of it stays as it is, to the byte."""
    form = formats.by_suffix(path)
    if (
        form is None
        or form.name not in _KERAS
        or not source.is_file()
        or formats.by_content(source) is not form
    ):
        return False
    if before.module is None or after.module != before.module:
        return False
    old, new = (_tree.Tree({"params": m.variables}, whole=True).leaves for m in (before, after))
    if old.keys() != new.keys() or not any(isinstance(x, stored.InFile) for x in old.values()):
        return False
    changed: dict[int, Any] = {}
    for name, was in old.items():
        leaf = new[name]
        if leaf is was:
            continue
        kept = (leaf.shape, leaf.dtype) == (was.shape, was.dtype)
        if not isinstance(was, stored.InFile) or not kept:
            return False
        changed[was.offset] = leaf
    where = stored.Source(source)
    for leaf in old.values():
        if isinstance(leaf, stored.InFile):
            where.is_as(leaf.source)
    if form.name == "keras":
        write_atomically(path, lambda f: stored.copy_archive_with(f, where, changed, {}))
    else:
        write_atomically(path, lambda f: stored.copy_with(f, where, changed))
    return True
