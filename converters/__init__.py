"""Converters between Keras, PyTorch, Flax and their files: exact, or refused by name."""

import importlib
from typing import TYPE_CHECKING, Any

if __name__ != "fwt.converters":
    raise ImportError("import this package as fwt.converters: a copy would double every class")

# A framework is imported when its function is first asked for.
_HOME = {
    "ConversionError": "fwt._types",
    "FileFormatError": "fwt._types",
    "AxesSetting": "fwt.converters.rows.row",
    "AxisSetting": "fwt.converters.rows.row",
    "P": "fwt.converters.rows.row",
    "Row": "fwt.converters.rows.row",
    "S": "fwt.converters.rows.row",
    "Size": "fwt.converters.rows.row",
    "Special": "fwt.converters.rows.row",
    "Callback": "fwt.converters.frameworks.keras_training",
    "Select": "fwt.converters.frameworks.torch_modules",
    "register": "fwt.converters.rows.table",
    "assign": "fwt.converters.values",
    "from_keras": "fwt.converters.frameworks.keras",
    "from_nnx": "fwt.converters.frameworks.nnx",
    "from_onnx": "fwt.converters.onnx.read",
    "from_torch": "fwt.converters.frameworks.torch",
    "hold": "fwt.converters.frameworks.torch_training",
    "keras_constraint": "fwt.converters.frameworks.keras_training",
    "keras_initializer": "fwt.converters.frameworks.keras_training",
    "load": "fwt.converters.files.formats",
    "save": "fwt.converters.files.formats",
    "to_keras": "fwt.converters.frameworks.keras",
    "to_nnx": "fwt.converters.frameworks.nnx",
    "to_onnx": "fwt.converters.onnx.write",
    "to_torch": "fwt.converters.frameworks.torch",
    "transform": "fwt.converters.values",
    "verify": "fwt.converters.verification.verify",
    "weights": "fwt.converters.values",
}

if TYPE_CHECKING:
    from fwt._types import ConversionError as ConversionError
    from fwt._types import FileFormatError as FileFormatError
    from fwt.converters.files.formats import load as load
    from fwt.converters.files.formats import save as save
    from fwt.converters.frameworks.keras import from_keras as from_keras
    from fwt.converters.frameworks.keras import to_keras as to_keras
    from fwt.converters.frameworks.keras_training import Callback as Callback
    from fwt.converters.frameworks.keras_training import keras_constraint as keras_constraint
    from fwt.converters.frameworks.keras_training import keras_initializer as keras_initializer
    from fwt.converters.frameworks.nnx import from_nnx as from_nnx
    from fwt.converters.frameworks.nnx import to_nnx as to_nnx
    from fwt.converters.frameworks.torch import from_torch as from_torch
    from fwt.converters.frameworks.torch import to_torch as to_torch
    from fwt.converters.frameworks.torch_modules import Select as Select
    from fwt.converters.frameworks.torch_training import hold as hold
    from fwt.converters.onnx.read import from_onnx as from_onnx
    from fwt.converters.onnx.write import to_onnx as to_onnx
    from fwt.converters.rows.row import AxesSetting as AxesSetting
    from fwt.converters.rows.row import AxisSetting as AxisSetting
    from fwt.converters.rows.row import P as P
    from fwt.converters.rows.row import Row as Row
    from fwt.converters.rows.row import S as S
    from fwt.converters.rows.row import Size as Size
    from fwt.converters.rows.row import Special as Special
    from fwt.converters.rows.table import register as register
    from fwt.converters.values import assign as assign
    from fwt.converters.values import transform as transform
    from fwt.converters.values import weights as weights
    from fwt.converters.verification.verify import verify as verify

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
