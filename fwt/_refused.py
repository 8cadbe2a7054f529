"""Files whose model can't be converted: their arrays alone, and what else can be done with them."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fwt import _terminal
from fwt._errors import FwtError

if TYPE_CHECKING:
    from fwt import Model

# The options of reading that say nothing of an architecture.
ITS_OWN = ("key", "fold", "max_bytes", "external_data", "dtype")
_OF_ARRAYS = (*ITS_OWN, "rename", "drop")


def is_final(error: FwtError) -> bool:
    """Whether an error is of an option, and not of the file."""
    from fwt.converters.io import UnusedError

    return isinstance(error, UnusedError)


def alone(path: Path, how: dict[str, Any], error: FwtError) -> "Model":
    """The arrays of a file whose model can't be converted; else it raises what is wrong."""
    from fwt import converters

    if is_final(error) or how["architecture"] is not None:
        raise error
    try:
        found = converters.load(path, module=False, **{name: how[name] for name in _OF_ARRAYS})
    except FwtError as other:
        raise (error if str(path) in str(error) else other) from None
    if not found.variables.get("params"):
        raise error
    return found


def why(path: Path, error: FwtError) -> str:
    """Why the model of a file can't be converted, without the file's name."""
    from fwt.converters import io

    return _terminal.in_options(str(error).replace(io.ALONE, "")).removeprefix(f"{path}: ")


def error_of(path: Path, model: "Model", refused: str, changed: bool) -> FwtError:
    """The error of a file that a command can't do, with what can be done. ``changed``: whether the
    command changes weights."""
    import fwt
    from fwt.converters.files import formats, h5_names

    form, ways = _terminal.format_of(path), list[str]()
    if form.framework == "Keras":
        transform = "converters.transform(model, t)"
        written = formats.is_written_into(path, path) and h5_names.says_no_axes(model.variables)
        if changed and written:
            one = next((p for p in fwt.paths(model) if "kernel" in p), fwt.paths(model)[0])
            ways.append(
                f"into a {form.suffixes[0]} file, --where changes arrays by the names that fwt "
                f"inspect shows, such as {one}, and the rest stays as it is"
            )
        if not changed:
            more = ", fwt prune --where changes them" if written else ""
            ways.append(
                f"fwt inspect shows its arrays, fwt convert --weights-only takes them{more}"
            )
        if not re.search("expected a keras Sequential or Functional|it is quantised", refused):
            ways.append("--architecture net.keras puts its weights into a model of the same layers")
        if changed and transform not in refused:
            ways.append(f"{transform} changes a live model in Python")
    return FwtError("; ".join([f"{path}: {refused}", *ways]))
