"""A file with other values of its arrays, in which all else stays as it is."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fwt._types import Model, wants_statistics
from fwt.converters.files import formats, h5_weights

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
