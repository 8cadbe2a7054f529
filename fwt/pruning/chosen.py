"""What is kept of each leaf, as masks or as pruned leaves."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fwt import _apart, _mesh, patterns
from fwt.selection import select
from fwt.selection.keys import Source, is_near


class Chosen(NamedTuple):
    """What is kept of one leaf."""

    leaf: Any
    source: Source
    cut: Any  # a select.Cut, or the row of one among many
    windows: patterns.Windows | None
    stack: tuple[int, ...]  # where each slice along some axes has a cut of its own

    def call(self, function: Any, *more: Any) -> _apart.Call:
        known = self.source.key, self.windows, self.stack
        arrays = self.source.arrays, *more
        return _apart.Call(
            (function, *known), functools.partial(function, *known), arrays, self.cut
        )

    def on_host(self) -> Any:
        """The mask in NumPy of a small leaf that is at hand; else None."""
        whole = not (self.windows or self.stack or isinstance(self.cut, _apart.Row))
        near = self.source.on_host() if whole and is_near(self.leaf) else None
        if near is None or any(isinstance(x, jax.core.Tracer) for x in self.cut):
            return None
        return select.kept(near, select.Cut(*map(np.asarray, self.cut))).reshape(self.source.shape)


def kept(chosen: Mapping[str, Chosen]) -> dict[str, Any]:
    """The masks, by path."""
    return _each(chosen, lambda mask, leaf: mask, lambda c: c.call(mask_of))


def pruned(chosen: Mapping[str, Chosen]) -> dict[str, Any]:
    """The leaves without what goes, by path."""

    def host(mask: Any, leaf: Any) -> Any:
        return np.where(mask, np.asarray(leaf), np.zeros((), leaf.dtype))

    return _each(chosen, host, lambda c: c.call(_pruned, c.leaf))


def _each(
    chosen: Mapping[str, Chosen],
    host: Callable[[Any, Any], Any],
    call: Callable[[Chosen], _apart.Call],
) -> dict[str, Any]:
    near = {p: m for p, c in chosen.items() if (m := c.on_host()) is not None}
    far = {p: call(c) for p, c in chosen.items() if p not in near}
    found = _mesh.on_auto_axes(_apart.each)([*far.values()])
    new = dict(zip(far, found, strict=True))
    new |= {p: jnp.asarray(host(m, chosen[p].leaf)) for p, m in near.items()}
    return {p: _mesh.like(new[p], c.leaf) for p, c in chosen.items()}


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
