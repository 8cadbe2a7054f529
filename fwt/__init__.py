"""fwt, functional weight transforms: initialise, prune and project the weights of a model, and
carry it between Flax, Keras and PyTorch."""

import importlib
from typing import TYPE_CHECKING, Any

from fwt import _moved

_moved.install()

__version__ = "0.1.0"

# name -> where it lives; loaded on first use, because Flax and Orbax cost most of a second.
_HOME = {
    "AxesError": "_errors",
    "ConversionError": "_errors",
    "FileFormatError": "_errors",
    "FwtError": "_errors",
    "Graph": "_graph",
    "LeafError": "_errors",
    "Model": "_types",
    "Node": "_graph",
    "Sequential": "_sequential",
    "WhereError": "_errors",
    "apply_masks": "pruning.prune",
    "assign": "_initialize",
    "at": "_compose",
    "biases": "_axes",
    "chain": "_compose",
    "diff": "_diff",
    "initialize": "_initialize",
    "kernels": "_axes",
    "lsuv": "_lsuv",
    "masks": "pruning.prune",
    "masks_of": "pruning.prune",
    "nodes_of": "_graph",
    "paths": "_tree",
    "project": "_project",
    "prune": "pruning.prune",
    "reset": "_reset",
    "select": "_tree",
    "sparsegpt": "pruning.sparsegpt",
    "straight_through": "_compose",
    "summary": "_summary",
}
_MODULES = (
    "constraints",
    "converters",
    "initializers",
    "layers",
    "optim",
    "patterns",
    "schedules",
    "scores",
)

if TYPE_CHECKING:
    from fwt import constraints as constraints
    from fwt import converters as converters
    from fwt import initializers as initializers
    from fwt import layers as layers
    from fwt import optim as optim
    from fwt import patterns as patterns
    from fwt import schedules as schedules
    from fwt import scores as scores
    from fwt._axes import biases as biases
    from fwt._axes import kernels as kernels
    from fwt._compose import at as at
    from fwt._compose import chain as chain
    from fwt._compose import straight_through as straight_through
    from fwt._diff import diff as diff
    from fwt._errors import AxesError as AxesError
    from fwt._errors import ConversionError as ConversionError
    from fwt._errors import FileFormatError as FileFormatError
    from fwt._errors import FwtError as FwtError
    from fwt._errors import LeafError as LeafError
    from fwt._errors import WhereError as WhereError
    from fwt._graph import Graph as Graph
    from fwt._graph import Node as Node
    from fwt._graph import nodes_of as nodes_of
    from fwt._initialize import assign as assign
    from fwt._initialize import initialize as initialize
    from fwt._lsuv import lsuv as lsuv
    from fwt._project import project as project
    from fwt._reset import reset as reset
    from fwt._sequential import Sequential as Sequential
    from fwt._summary import summary as summary
    from fwt._tree import paths as paths
    from fwt._tree import select as select
    from fwt._types import Model as Model
    from fwt.pruning.prune import apply_masks as apply_masks
    from fwt.pruning.prune import masks as masks
    from fwt.pruning.prune import masks_of as masks_of
    from fwt.pruning.prune import prune as prune
    from fwt.pruning.sparsegpt import sparsegpt as sparsegpt

__all__ = [*sorted(_HOME), *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"fwt.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'fwt' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fwt.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
