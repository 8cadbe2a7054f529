"""Converters between Keras, PyTorch, Flax and their files: exact, or refused by name."""

import importlib
from typing import TYPE_CHECKING, Any

if __name__ != "fwt.converters":
    raise ImportError("import this package as fwt.converters: a copy would double every class")

# A framework is imported when its function is first asked for.
_HOME = {
    "ConversionError": "fwt._types",
    "FileFormatError": "fwt._types",
    "AxesSetting": "fwt.converters._row",
    "AxisSetting": "fwt.converters._row",
    "P": "fwt.converters._row",
    "Row": "fwt.converters._row",
    "S": "fwt.converters._row",
    "Size": "fwt.converters._row",
    "Special": "fwt.converters._row",
    "Select": "fwt.converters._torch_modules",
    "register": "fwt.converters._layers",
    "from_keras": "fwt.converters._keras",
    "from_nnx": "fwt.converters._nnx",
    "from_onnx": "fwt.converters._onnx_read",
    "from_torch": "fwt.converters._torch",
    "load": "fwt.converters._formats",
    "save": "fwt.converters._formats",
    "to_keras": "fwt.converters._keras",
    "to_nnx": "fwt.converters._nnx",
    "to_onnx": "fwt.converters._onnx",
    "to_torch": "fwt.converters._torch",
    "transform": "fwt.converters._live",
    "verify": "fwt.converters._verify",
}

if TYPE_CHECKING:
    from fwt.converters._formats import load as load
    from fwt.converters._formats import save as save
    from fwt.converters._keras import from_keras as from_keras
    from fwt.converters._keras import to_keras as to_keras
    from fwt.converters._layers import register as register
    from fwt.converters._live import transform as transform
    from fwt.converters._nnx import from_nnx as from_nnx
    from fwt.converters._nnx import to_nnx as to_nnx
    from fwt.converters._onnx import to_onnx as to_onnx
    from fwt.converters._onnx_read import from_onnx as from_onnx
    from fwt.converters._row import AxesSetting as AxesSetting
    from fwt.converters._row import AxisSetting as AxisSetting
    from fwt.converters._row import P as P
    from fwt.converters._row import Row as Row
    from fwt.converters._row import S as S
    from fwt.converters._row import Size as Size
    from fwt.converters._row import Special as Special
    from fwt.converters._torch import from_torch as from_torch
    from fwt.converters._torch import to_torch as to_torch
    from fwt.converters._torch_modules import Select as Select
    from fwt.converters._verify import verify as verify

    from fwt._types import ConversionError as ConversionError
    from fwt._types import FileFormatError as FileFormatError

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fwt.converters' has no attribute {name!r}")
    try:
        module = importlib.import_module(_HOME[name])
    except ModuleNotFoundError as error:
        extra = {"keras": "keras", "torch": "torch"}.get(str(error.name))
        if extra is None:
            raise
        raise ImportError(
            f"fwt.converters.{name} needs {extra}: pip install 'fwt[{extra}]'", name=extra
        ) from error
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
