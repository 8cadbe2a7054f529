"""FORMATS: suffix -> (load, save), over plain trees of NumPy arrays.

Files are data: no reader imports the framework that owns the format, runs code from the file, or
allocates before it has checked sizes. A save appears whole or not at all.
"""

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from fwt.converters import _convert, _flax, _layers
from fwt.converters._io import arrays, dotted, nested, reading, write_atomically
from fwt.converters._keras_file import listed, load_keras, save_keras
from fwt.converters._row import TRAINING, Layer, refuse
from fwt.converters._torch_file import load_torch, save_torch

from fwt import _tree
from fwt import layers as fl
from fwt._sequential import Named, Sequential
from fwt._sequential import settings_of as flax_settings
from fwt._types import ConversionError, FileFormatError, Model


def load_safetensors(path: Path) -> Model:
    """A .safetensors file: ours with its architecture, any other as weights only."""
    from safetensors import safe_open

    flat: dict[str, np.ndarray] = {}
    with reading(path), safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
        names = file.keys()  # safe_open is no mapping: it can't be iterated over
        for name in names:
            flat[name] = file.get_tensor(name)
        if "fwt" not in metadata:
            return Model(None, nested(flat, ".", path))
        described = json.loads(metadata["fwt"])
        if described["version"] != 1:
            raise FileFormatError(f"{path}: version {described['version']!r}, only 1 is known")
        module = module_from_json(described["module"], path)
        variables = nested(flat, "/", path)
        variables.setdefault("params", {})
    if module is not None:
        try:  # a walk from Flax to Flax checks every name, setting and shape
            layers = _flax.read_flax(module, variables)
            _convert.convert(layers, "flax", "flax", module.input_shape, "source")
        except ConversionError as error:
            raise FileFormatError(f"{path}: {error}") from error
    return Model(module, variables)


def save_safetensors(file: Any, module: Any, variables: Any, layout: str | None) -> None:
    """A .safetensors file: with the architecture in its metadata, or under the names that the
    weights came with."""
    from safetensors import SafetensorError
    from safetensors.numpy import save

    metadata = {"format": "np"}
    tensors = None
    if module is None:
        with contextlib.suppress(ConversionError, FileFormatError):
            names = dotted(variables)
            # Only where a reader finds the same tree again.
            again = _tree.Tree({"params": nested(names, ".", Path())}).leaves
            same = again.keys() == _tree.Tree({"params": variables}).leaves.keys()
            tensors = names if same else None
    if tensors is None:
        metadata["fwt"] = json.dumps({"version": 1, "module": module_to_json(module)})
        tensors = {
            f"{_tree.escape(collection)}/{path}": leaf
            for collection, tree in variables.items()
            for path, leaf in arrays(collection, tree).items()
        }
    for name, leaf in tensors.items():
        if leaf.dtype.name not in _SAFETENSORS:
            raise refuse(name, f"dtype {leaf.dtype} can't be written to .safetensors")
    try:
        file.write(save(tensors, metadata))
    except SafetensorError as error:
        raise ConversionError(f"safetensors can't write this ({error})") from error


_SAFETENSORS = {
    *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
    *("float16", "bfloat16", "float32", "float64"),
}


# use_fast_variance decides how exact a norm is.
_LEFT_OUT = TRAINING["flax"] - {"use_fast_variance"}


def module_to_json(module: Any) -> Any:
    """The layers of a Sequential with their settings, as JSON; None for no module."""
    if module is None:
        return None
    _flax.read_flax(module, {})
    layers: list[dict[str, Any]] = []
    for named in module.layers:
        if isinstance(named.layer, Sequential):
            inner = module_to_json(named.layer)
            layers.append({"name": named.name, "class": "Sequential", "settings": inner})
            continue
        layer = Layer(named.name, type(named.layer).__name__, {})
        settings = {k: v for k, v in flax_settings(named.layer).items() if k not in _LEFT_OUT}
        if not _layers.rows_of("flax", layer.kind):
            raise refuse(str(layer), "fwt has no row for this class")
        try:
            json.dumps(settings)
        except TypeError as error:
            raise refuse(str(layer), f"a setting can't be written ({error})") from error
        layers.append({"name": layer.name, "class": layer.kind, "settings": listed(settings)})
    return {"layers": layers, "input_shape": listed(module.input_shape)}


def module_from_json(described: Any, path: Path) -> Sequential | None:
    """The inverse, against the closed table of classes."""
    if described is None:
        return None
    named = []
    cls: Any
    for entry in described["layers"]:
        if entry["class"] == "Sequential":
            named.append(Named(entry["name"], module_from_json(entry["settings"], path)))
            continue
        rows = _layers.rows_of("flax", entry["class"])
        cls = rows[0].flax if rows else None
        if cls is None:
            raise FileFormatError(f"{path}: the layer class {entry['class']!r} is not known")
        known = set(cls.__dataclass_fields__) - _LEFT_OUT
        if unknown := sorted(set(entry["settings"]) - known):
            raise FileFormatError(f"{path}: {entry['name']} has no setting {unknown[0]!r}")
        settings = {k: fl.tuples(v) for k, v in entry["settings"].items()}
        named.append(Named(entry["name"], cls(**settings)))
    return Sequential(tuple(named), described["input_shape"])


FORMATS: dict[str, tuple[Callable[[Path], Model], Callable[[Any, Any, Any, str | None], None]]] = {
    ".keras": (load_keras, save_keras),
    ".safetensors": (load_safetensors, save_safetensors),
    ".pt": (load_torch, save_torch),
    ".pth": (load_torch, save_torch),
}


def _format(path: Path) -> Any:
    if path.suffix not in FORMATS:
        raise FileFormatError(
            f"{path}: the format {path.suffix or 'without a suffix'!r} is not known; known are "
            f"{', '.join(FORMATS)}"
        )
    return FORMATS[path.suffix]


def load(path: str | os.PathLike[str]) -> Model:
    """Reads a model from a file, without the framework that wrote it.

    Args:
        path: a ``.keras`` file, a ``.safetensors`` file (written by :func:`save`, which puts the
            architecture into its metadata, or by any other program), or a torch state dict
            (``.pt``, ``.pth``).

    Returns:
        ``Model(module, variables)`` with NumPy leaves. A file that holds weights only gives
        ``Model(None, variables)``, the leaves under the file's own names and in its layout.

    Raises:
        FileFormatError: for a file that is missing, truncated, malformed or hostile.
        ConversionError: for a model with a layer or setting that can't be converted exactly.

    Example:
        >>> import tempfile, os, numpy as np
        >>> import fwt
        >>> path = os.path.join(tempfile.mkdtemp(), "w.safetensors")
        >>> fwt.converters.save(path, None, {"params": {"d": {"kernel": np.ones((2, 3))}}})
        >>> module, variables = fwt.converters.load(path)
        >>> fwt.paths(variables)
        ['d/kernel']
    """
    path = Path(path)
    loader, _ = _format(path)
    try:
        if not path.is_file():
            raise FileFormatError(f"{path}: no such file")
        return loader(path)
    except OSError as error:
        raise FileFormatError(f"{path}: can't read it ({error.strerror or error})") from error


def save(
    path: str | os.PathLike[str], module: Any, variables: Any, *, layout: str | None = None
) -> None:
    """Writes a model to a file, whole or not at all.

    Args:
        path: where to; its suffix is the format: ``.keras`` (real Keras opens it),
            ``.safetensors`` (with the architecture in its metadata) or ``.pt`` (a state dict for
            ``torch.load(weights_only=True)`` and the module that ``to_torch`` gives).
        module: a :class:`fwt.Sequential`, or None to write the variables as they are
            (not to ``.keras``).
        variables: ``{"params": ..., "batch_stats": ...}``.
        layout: for ``.pt``, the layout of the torch model's ends, as in ``to_torch``:
            "channels_first" unless told otherwise, or "source".

    Raises:
        ConversionError: for what the target can't say exactly; nothing is written then.
        FileFormatError: if it can't be written there.

    Example:
        >>> import tempfile, os, jax, flax.linen as nn
        >>> import fwt
        >>> net = fwt.Sequential([("dense", nn.Dense(2))])
        >>> variables = net.init(jax.random.key(0), jax.numpy.ones((1, 3)))
        >>> path = os.path.join(tempfile.mkdtemp(), "net.keras")
        >>> fwt.converters.save(path, net, variables)
        >>> fwt.converters.load(path).module == fwt.Sequential([("dense", nn.Dense(2))], (3,))
        True
    """
    path = Path(path)
    _, saver = _format(path)
    if layout is not None and (module is None or saver is not save_torch):
        raise ConversionError(
            f"{path}: layout={layout!r} is for a .pt file of a module; other files keep the "
            "model's own ends"
        )
    if not isinstance(variables, Mapping):
        raise ConversionError(f"expected a variables dict, found {type(variables).__name__}")
    if "params" not in variables:
        variables = {"params": variables}
    if module is None and path.suffix == ".keras":
        raise ConversionError(
            f"{path}: weights without an architecture can't be a .keras model; give a module"
        )
    write_atomically(path, lambda file: saver(file, module, variables, layout))
