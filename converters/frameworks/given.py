"""What a user gives as a model: a module and its variables, a Model, or an nnx module."""

import os
import sys
from collections.abc import Mapping
from typing import Any

from fwt import _nodes
from fwt._types import ConversionError, Model
from fwt.converters.frameworks import flax as _flax
from fwt.converters.frameworks import linen_trace


def given(module: Any, variables: Any, call: str, input_shape: Any = None) -> tuple[Any, Any, Any]:
    """The module and variables that a user gave, as two arguments or as one model, and the shape
    of its input; ``call`` is how the function is called with one. A module of one's own is traced
    for that shape, and the graph that it becomes knows it."""
    name, saved = type(module).__name__, call.startswith("save")
    if _is_equinox(module):
        raise ConversionError(
            f"{name} is an Equinox module, which is not converted: "
            + (
                f"{_WEIGHTS} writes its weights alone"
                if saved
                else "build it as fwt.Sequential([(name, layer), ...]) and give that its weights"
            )
        )
    if isinstance(module, str | os.PathLike) and not saved:
        held = variables is not None
        raise ConversionError(
            f"{call} takes a Model before anything else, found the path {os.fspath(module)!r}: "
            + ("give the model first" if held else "load(path) reads a file into a Model")
        )
    if not saved and variables is None and isinstance(module, Mapping):
        raise ConversionError(
            f"{call} takes a Model, or a module and its variables; found variables alone, a {name}"
        )
    if not _nodes.is_graph(module) or isinstance(module, Mapping):
        module, variables = _flax.given(module, variables, call)
        # to_onnx writes the jaxpr of any linen module itself, and weights alone can be saved.
        written = call.startswith("to_onnx") and not isinstance(input_shape, Mapping)
        whole = input_shape is not None if saved else not written
        if whole and linen_trace.is_own(module):
            return *linen_trace.traced(module, variables, input_shape), None
        return module, variables, input_shape
    from flax import nnx

    own = type(module) is not nnx.Sequential
    if saved and own and input_shape is None:
        return module, variables, None  # whose weights alone can be written, as the error says
    if variables is not None:
        raise ConversionError(
            f"an nnx module holds its variables, so {type(variables).__name__} after it is one "
            f"argument too many: {call}, and what follows by name"
        )
    from fwt.converters.frameworks import nnx as _nnx

    model = _nnx.from_nnx(module, input_shape)
    return model.module, model.variables, None if own else input_shape


def refuse_own(architecture: Any) -> None:
    """Raises for a linen or nnx module of one's own, which is no architecture as it is.

    Raises:
        ConversionError: with what to give instead.
    """
    module = architecture.module if isinstance(architecture, Model) else architecture
    graph = _nodes.is_graph(module) and not isinstance(module, Mapping)
    if not graph and not linen_trace.is_own(module):
        return
    way = (
        "from_nnx(module, input_shape) gives one"
        if graph
        else "save('net.safetensors', module, variables, input_shape=...) writes a file that is one"
    )
    raise ConversionError(
        f"architecture= as {type(module).__name__}, a module of your own: {way}; weights under its "
        "own names, load(path).variables, need none"
    )


_WEIGHTS = "save(path, None, {'params': equinox.filter(model, equinox.is_array)})"


def weights_of(found: Any) -> str:
    """How the weights of what is no variables dict are given, as the end of an error."""
    if _is_equinox(found):
        return f"; of an Equinox module, {_WEIGHTS}"
    if _nodes.is_graph(found):
        return "; of an nnx module, save(path, None, nnx.state(module))"
    return ""


def _is_equinox(module: Any) -> bool:
    equinox = sys.modules.get("equinox")
    return equinox is not None and isinstance(module, equinox.Module)
