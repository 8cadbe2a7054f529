"""The nodes of trees that are fwt's own: what stands for a hidden leaf, and what a file says."""

import functools
import json
import types
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fwt import _later

if TYPE_CHECKING:
    import jax
else:
    from fwt._later import jax


class Unselected:
    """The stand-in for a leaf that :func:`fwt.at` hides: a node without leaves, so that
    ``jax.tree.map`` and our own transforms pass it by."""

    def __init__(self, shape: tuple[int, ...], dtype: Any):
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)

    def tree_flatten(self) -> tuple[tuple[()], Any]:
        return (), (self.shape, self.dtype)

    @classmethod
    def tree_unflatten(cls, aux: Any, children: Any) -> "Unselected":
        return cls(*aux)


class FromFile(dict[str, Any]):
    """A dict that knows what its file says beside the arrays: the order of their names, which of
    them are one, and metadata. As a static part of the pytree it goes through every transform.

    Attributes:
        told: JSON text, which :mod:`fwt.converters.files.source` reads.
    """

    told = ""

    def __init__(self, entries: Any = (), told: str = ""):
        super().__init__(entries)
        self.told = told


class _Told(str):
    """The same text, which says in JAX's error of trees that differ in it what to do."""

    def __repr__(self) -> str:
        return (
            f"what its file says beside the arrays: {str(self)!r} (a tree without that fits one "
            "from any file, {name: dict(tree) for name, tree in variables.items()})"
        )


def _register() -> None:
    jax.tree_util.register_pytree_node_class(Unselected)
    jax.tree_util.register_pytree_with_keys(
        FromFile,
        lambda d: (
            tuple((jax.tree_util.DictKey(k), d[k]) for k in sorted(d)),
            (tuple(sorted(d)), _Told(d.told)),
        ),
        lambda aux, kids: FromFile(zip(aux[0], kids, strict=True), aux[1]),
    )


_later.once_imported("jax", _register)


_NONE: Mapping[str, Any] = types.MappingProxyType({})


@functools.lru_cache(maxsize=64)
def _parsed(told: str) -> Mapping[str, Any]:
    return types.MappingProxyType(json.loads(told))


def told_of(root: Any) -> Mapping[str, Any]:
    """What the file of a tree said of it, if the tree, or its ``params``, is a FromFile."""
    inner = root.get("params") if isinstance(root, Mapping) else None
    found = next((x for x in (root, inner) if isinstance(x, FromFile) and x.told), None)
    return _NONE if found is None else _parsed(found.told)
