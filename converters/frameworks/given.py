"""What a user gives as a model: a module and its variables, a Model, or an nnx.Sequential."""

import sys
from collections.abc import Mapping
from typing import Any

from fwt import _nodes
from fwt._types import ConversionError
from fwt.converters.frameworks import flax as _flax


def given(module: Any, variables: Any, call: str) -> tuple[Any, Any]:
    """The module and variables that a user gave, as two arguments or as one model; ``call`` is how
    the function is called with one."""
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
    if not saved and variables is None and isinstance(module, Mapping):
        raise ConversionError(
            f"{call} takes a Model, or a module and its variables; found variables alone, a {name}"
        )
    if not _nodes.is_graph(module) or isinstance(module, Mapping):
        return _flax.given(module, variables, call)
    from flax import nnx

    if not isinstance(module, nnx.Sequential):
        if saved:
            return module, variables  # whose weights alone can be written, as the error says
        raise ConversionError(
            f"{name} is an nnx module, of which only an nnx.Sequential is converted: build it as "
            "one, or as fwt.Sequential([(name, layer), ...])"
        )
    if variables is not None:
        raise ConversionError(
            f"an nnx.Sequential holds its variables, so {type(variables).__name__} after it is one "
            f"argument too many: {call}, and what follows by name"
        )
    from fwt.converters.frameworks import nnx as _nnx

    model = _nnx.from_nnx(module)
    return model.module, model.variables


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
