"""JAX where it is first used: to import it takes most of a second, and to read a file of weights
and say what it holds needs none of it."""

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any


class _Later(ModuleType):
    """A module that is imported when something of it is asked for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked by the import system and by debuggers
            raise AttributeError(name)
        value = getattr(importlib.import_module(self.__name__), name)
        setattr(self, name, value)
        return value


jax, jnp = _Later("jax"), _Later("jax.numpy")

_waiting: dict[str, list[Callable[[], None]]] = {}


class _Finder(importlib.abc.MetaPathFinder):
    """Finds nothing itself; what another finds of a module that is waited for, it watches."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in _waiting:
            return None
        others = (finder for finder in list(sys.meta_path) if finder is not self)
        found = next((s for f in others if (s := f.find_spec(name, path, target))), None)
        if found is not None and found.loader is not None:
            found.loader = _Watched(found.loader)
        return found


class _Watched(importlib.abc.Loader):
    """A loader, and what is to be done once it has loaded."""

    def __init__(self, loader: Any):
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader  # as if nobody watched
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        for do in _waiting.pop(module.__name__, ()):
            do()


def once_imported(name: str, do: Callable[[], None]) -> None:
    """Does it as soon as the module is imported by whomever; at once if it is.

    So the classes of trees are known to JAX before anybody can give it one of them.
    """
    if name in sys.modules:
        do()
        return
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    _waiting.setdefault(name, []).append(do)
