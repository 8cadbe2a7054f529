"""What a file of ours tells in its metadata: the layers, and how their weights come back."""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fwt._types import ConversionError, Model
from fwt.converters import io as _io
from fwt.converters.frameworks import description
from fwt.converters.onnx.graph import array_of


def describe(proto: Any, module: Any, undo: Mapping[str, Mapping[str, list[Any]]]) -> None:
    """Writes into the metadata what the layers are and how their weights come back, while the
    weights are still inputs; what can't be described is left to be read from the graph."""
    try:
        told = json.loads(description.written(module))
    except ConversionError:
        told = None
    if told is not None and told["module"] is not None:
        told["weights"] = undo
        told["graph"] = _digest(proto, told)
        proto.metadata_props.add(key="fwt", value=json.dumps(told))


def described(proto: Any, path: Path, external: bool) -> Callable[[], Model] | None:
    """What gives the model of a file of ours, unless its graph was changed since; it needs the
    message no longer, which holds the weights once more."""
    metadata = {p.key: p.value for p in proto.metadata_props}
    if "fwt" not in metadata:
        return None
    told = json.loads(metadata["fwt"])
    undo = told.get("weights")
    if not isinstance(undo, dict) or told.get("graph") != _digest(proto, told):
        return None
    arrays = {t.name: t for t in proto.graph.initializer if t.name in undo}
    flat: dict[str, np.ndarray] = {}
    for name, leaves in undo.items():
        value = array_of(arrays[name], path, external)
        for leaf, steps in leaves.items():
            if (found := _undone(value, steps)) is None:
                return None
            if leaf in flat and not np.array_equal(flat[leaf], found, equal_nan=True):
                return None  # changed in one of two places
            flat[leaf] = found
    return functools.partial(description.read, metadata["fwt"], _io.nested(flat, "/", path), path)


def _digest(proto: Any, told: Mapping[str, Any]) -> str:
    """Of all but the weights, and of what is said about them."""
    weights = set(told["weights"])
    said = {k: told[k] for k in ("module", "weights")}
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    graph = proto.graph
    kept = [t for t in graph.initializer if t.name not in weights]
    values = [v for v in (*graph.input, *graph.output) if v.name not in weights]
    for part in (*proto.opset_import, *graph.node, *sorted(kept, key=lambda t: t.name), *values):
        text = part.SerializeToString(deterministic=True)
        digest.update(len(text).to_bytes(8, "little") + text)
    return digest.hexdigest()


def _undone(value: np.ndarray, steps: list[Any]) -> np.ndarray | None:
    """A leaf from an initializer; None if what the steps leave out is not zero."""
    for name, *told in steps:
        if name == "take":
            value = value[told[0]]
        elif name == "transpose":
            value = np.transpose(value, told[0])
        elif name == "flip":
            value = np.flip(value, tuple(told[0]))
        elif name == "reshape":
            value = value.reshape(told[0])
        elif name == "blocks":
            parts = np.split(value, told[0], axis=-1)
            if len(set(told[1])) != len(told[1]):
                raise ValueError("a part of an array is taken twice")
            if any(np.any(p) for i, p in enumerate(parts) if i not in told[1]):
                return None
            value = np.concatenate([parts[i] for i in told[1]], axis=-1)
        else:
            raise ValueError(f"the step {name!r}")
    return np.asarray(value, order="C")
