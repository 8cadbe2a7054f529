"""Format: what is done with files of one format. What of it needs Flax or onnx is imported when it
is called."""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fwt._types import Model
from fwt.converters import io as _io
from fwt.converters.files import copies, h5_weights
from fwt.converters.files import names as _names
from fwt.converters.io import Reading, write_atomically

if TYPE_CHECKING:
    from fwt.converters.rows.row import Layer


@dataclasses.dataclass(frozen=True)
class Format:
    """One format. ``fill`` gives Keras layers their arrays where the file's own names don't say
    what they are; ``save_shards`` writes a folder of several files."""

    name: str
    suffixes: tuple[str, ...]
    load: Callable[[Path, Reading], Model]
    save: Callable[[Any, Any, Any, str | None], None] | None = None
    save_folder: Callable[[Path, Any, Any], None] | None = None
    save_shards: Callable[[Path, Any, Any, int], None] | None = None
    fill: Callable[[list["Layer"], Path, Reading, _names.Names], None] | None = None
    framework: str = ""  # whose format it is
    needs_module: bool = False  # to write it
    weights_only: bool = False  # it says nothing of the layers
    holds: str = ""  # what of a model, for the table of formats
    # How a file or folder is written anew with other values of its arrays, all else as it is.
    copy: Callable[[Path, Any, Any], copies.Copy] | None = None
    # Arrays alone, in the place of those of the file that they come from; whether these can be; and
    # what the file tells of them, which is then edited so whether or not its model converts.
    save_into: Callable[[Path, Path, Any], None] | None = None
    takes: Callable[[Path, Any], bool] = lambda source, variables: True
    knowing: Callable[[Path, Model], contextlib.AbstractContextManager[Model]] | None = None


def of_models(name: str) -> Callable[..., Any]:
    """A function of the module of Keras's models, which needs Flax and so waits for its call."""

    def call(*arguments: Any) -> Any:
        from fwt.converters.files import h5

        return getattr(h5, name)(*arguments)

    return call


def of_onnx(name: str) -> Callable[..., Any]:
    """A function of the arrays of an ONNX file."""

    def call(*arguments: Any) -> Any:
        from fwt.converters.onnx import initializers

        return getattr(initializers, name)(*arguments)

    return call


def in_place(into: Callable[[Any, Path, Any], None]) -> Callable[[Path, Path, Any], None]:
    """A ``save_into`` of a format of one file."""
    return lambda path, source, variables: write_atomically(
        path, lambda file: into(file, source, variables)
    )


def fill_groups(load: Callable[[Path, Reading], Model]) -> Callable[..., None]:
    def fill(layers: list["Layer"], path: Path, how: Reading, named: _names.Names) -> None:
        tree = load(path, how).variables["params"]
        of_models("fill_from_groups")(layers, tree, path, named)

    return fill


def load_keras(path: Path, how: Reading) -> Model:
    if how.module:
        model: Model = of_models("load_keras")(path, how)
        return model
    return h5_weights.load_archive(path, how)


def load_legacy(path: Path, how: Reading) -> Model:
    if how.module and h5_weights.has_model(path):
        model: Model = of_models("load_legacy")(path, how)
        return model
    return h5_weights.load_legacy(path, how)


def load_onnx(path: Path, how: Reading) -> Model:
    from fwt.converters.onnx import initializers, read

    if not how.module:
        return initializers.load_arrays(path, how)
    _io.without_key(path, how)
    return read.from_onnx(path, external_data=how.external)


def save_onnx(file: Any, module: Any, variables: Any, layout: str | None) -> None:
    from fwt.converters.onnx import write

    write.save_onnx(file, module, variables, layout)
