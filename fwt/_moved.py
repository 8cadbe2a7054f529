"""Modules that moved after 0.1.0, under their old names, for pickles that name them.

Nothing is imported until a pickle asks.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

# Those whose public classes and functions a pickle of 0.1.0 can name.
MOVED = {
    "fwt._attention": "fwt.layers.attention",
    "fwt._base": "fwt.layers.base",
    "fwt._preprocessing": "fwt.layers.preprocessing",
    "fwt._prune": "fwt.pruning.prune",
    "fwt._recurrent": "fwt.layers.recurrent",
    "fwt._sparsegpt": "fwt.pruning.sparsegpt",
    "fwt._windows": "fwt.layers",
    "fwt.converters._formats": "fwt.converters.files.formats",
    "fwt.converters._keras": "fwt.converters.frameworks.keras",
    "fwt.converters._layers": "fwt.converters.rows.table",
    "fwt.converters._live": "fwt.converters.values",
    "fwt.converters._nnx": "fwt.converters.frameworks.nnx",
    "fwt.converters._onnx": "fwt.converters.onnx.write",
    "fwt.converters._onnx_read": "fwt.converters.onnx.read",
    "fwt.converters._row": "fwt.converters.rows.row",
    "fwt.converters._torch": "fwt.converters.frameworks.torch",
    "fwt.converters._torch_modules": "fwt.converters.frameworks.torch_modules",
    "fwt.converters._verify": "fwt.converters.verification.verify",
}


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds an old name last of all, and gives a module whose attributes are the new one's."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self) if name in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        new = MOVED[module.__name__]

        def attribute(name: str) -> Any:
            if name.startswith("__"):  # asked by the import system itself
                raise AttributeError(name)
            return getattr(importlib.import_module(new), name)

        module.__dict__["__getattr__"] = attribute


def install() -> None:
    """Once, when fwt is imported."""
    if not any(
        type(finder).__name__ == Finder.__name__ and type(finder).__module__ == __name__
        for finder in sys.meta_path
    ):
        sys.meta_path.append(Finder())
