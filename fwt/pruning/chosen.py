"""What is kept of each leaf, as masks or as pruned leaves."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fwt import _apart, _mesh, patterns
from fwt.selection import select
from fwt.selection.keys import Source


class Chosen(NamedTuple):
    """What is kept of one leaf."""

    leaf: Any
    source: Source
    cut: Any  # a select.Cut, or one of several
    windows: patterns.Windows | None
    stack: tuple[int, ...]  # where each slice along some axes has a cut of its own

    def _call(self, function: Any, *more: Any) -> Any:
        """``function`` of this leaf, as :func:`_apart.each` takes it."""
        known = self.source.key, self.windows, self.stack
        return known, functools.partial(function, *known), (self.source.arrays, *more), self.cut


def kept(chosen: Mapping[str, Chosen]) -> dict[str, Any]:
    """The masks, by path."""
    found = each({p: c._call(mask_of) for p, c in chosen.items()})
    return {p: _mesh.like(found[p], c.leaf) for p, c in chosen.items()}


def pruned(chosen: Mapping[str, Chosen]) -> dict[str, Any]:
    """The leaves without what goes, by path."""
    found = each({p: c._call(_pruned, c.leaf) for p, c in chosen.items()})
    return {p: _mesh.like(found[p], c.leaf) for p, c in chosen.items()}


@_mesh.on_auto_axes
def each(calls: Mapping[str, Any]) -> dict[str, Any]:
    # The leaves of one kind whose cuts stand side by side are cut together.
    found: dict[str, Any] = {}
    kinds: dict[Any, list[str]] = {}
    for path, (kind, function, arrays, cut) in calls.items():
        whole = isinstance(cut, select.Later) and isinstance(cut.cuts, select.Cuts)
        shapes = [(x.shape, x.dtype) for x in jax.tree.leaves(arrays)]
        if whole and _apart.joins(shapes, len(cut.cuts)):
            kinds.setdefault((kind, *shapes), []).append(path)
            continue
        found[path] = function(
            *arrays, cut.cuts[cut.place] if isinstance(cut, select.Later) else cut
        )
    for paths in kinds.values():
        rows = [calls[p] for p in paths]
        cuts, places = rows[0][3].cuts, np.asarray([r[3].place for r in rows])
        mine = select.Cut(*(x[places] for x in cuts.whole))
        values = _apart.together(rows[0][1], [r[2] for r in rows], mine)
        found |= zip(paths, values, strict=True)
    return found


def each_slice(function: Any, stack: tuple[int, ...], out: bool = False) -> Any:
    """``function`` of the slices of arrays and of one value for each, (stack,)."""
    for index, axis in reversed(list(enumerate(stack))):
        place = axis - index
        function = jax.vmap(function, (place, 0), place if out else 0)
    return function


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def mask_of(key: Any, windows: Any, stack: tuple[int, ...], arrays: Any, cut: Any) -> Any:
    def one(arrays: Any, cut: Any) -> Any:
        return select.kept(Source(key, arrays), cut)

    mask = each_slice(one, stack, out=True)(arrays, cut)
    return mask if windows is None else windows.spread(mask)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _pruned(
    key: Any, windows: Any, stack: tuple[int, ...], arrays: Any, leaf: Any, cut: Any
) -> Any:
    return _where(leaf, mask_of(key, windows, stack, arrays, cut))


def _where(leaf: Any, mask: Any) -> Any:
    return jnp.where(mask, leaf, jnp.zeros((), leaf.dtype))


_masked = _mesh.on_auto_axes(jax.jit(_where))


def masked(leaf: Any, mask: Any) -> Any:
    return _mesh.like(_masked(leaf, mask), leaf)
