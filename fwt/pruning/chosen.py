"""What is kept of each leaf, as masks or as pruned leaves."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fwt import _apart, _mesh, patterns
from fwt.selection import select
from fwt.selection.keys import Source, is_near
from fwt.selection.stacks import leaves_of, stacks_of


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

    def is_even(self) -> bool:
        """Whether its cut is a row, and its mask that of its keys."""
        plain = not (self.windows or self.stack) and isinstance(self.cut, _apart.Row)
        return plain and jax.device_count() == 1

    def on_host(self) -> Any:
        """The mask in NumPy of a small leaf that is at hand; else None."""
        whole = not (self.windows or self.stack or isinstance(self.cut, _apart.Row))
        near = self.source.on_host() if whole and is_near(self.leaf) else None
        if near is None or any(isinstance(x, jax.core.Tracer) for x in self.cut):
            return None
        return select.kept(near, select.Cut(*map(np.asarray, self.cut))).reshape(self.source.shape)


def kept(chosen: Mapping[str, Chosen]) -> dict[str, Any]:
    """The masks, by path."""
    return _each(chosen, lambda c: c.call(mask_of), lambda mask, _: mask)


def pruned(chosen: Mapping[str, Chosen]) -> dict[str, Any]:
    """The leaves without what goes, by path."""

    def where(mask: Any, leaf: Any) -> Any:
        host = isinstance(mask, np.ndarray)
        return np.where(mask, leaf, np.zeros((), leaf.dtype)) if host else _where(leaf, mask)

    return _each(chosen, lambda c: c.call(_pruned, c.leaf), where)


def _each(
    chosen: Mapping[str, Chosen],
    call: Callable[[Chosen], _apart.Call],
    made: Callable[[Any, Any], Any],
) -> dict[str, Any]:
    """By path what a call makes of a leaf, or ``made`` of a mask and a leaf."""
    new: dict[str, Any] = {}
    for path, one in chosen.items():
        if (mask := one.on_host()) is not None:
            new[path] = jnp.asarray(made(mask, np.asarray(one.leaf)))
    left = [p for p in chosen if p not in new]
    even = [p for p in left if chosen[p].is_even()]
    rest = [p for p in left if p not in set(even)]
    found = _mesh.on_auto_axes(_apart.each)([call(chosen[p]) for p in rest])
    new |= zip(rest, found, strict=True)
    kin: dict[int, list[str]] = {}
    for path in even:
        kin.setdefault(id(chosen[path].cut.columns), []).append(path)
    for paths in kin.values():
        rows = _mesh.on_auto_axes(_joined)([chosen[p] for p in paths], made)
        new |= zip(paths, rows, strict=True)
    return {p: _mesh.like(new[p], c.leaf) for p, c in chosen.items()}


def _joined(rows: Sequence[Chosen], made: Callable[[Any, Any], Any]) -> list[Any]:
    """The same of leaves whose cuts stand in one table, small ones of about one size as one."""
    stacks = stacks_of([Source(c.source.key, (*c.source.arrays, c.leaf)) for c in rows])
    leaves = [s.source.arrays[-1] for s in stacks]
    keys = [s._replace(source=Source(s.source.key, s.source.arrays[:-1])) for s in stacks]
    masks = select.kept_rows(keys, [c.cut for c in rows])
    values = [made(mask, leaf) for mask, leaf in zip(masks, leaves, strict=True)]
    found = leaves_of(stacks, values)
    return [found[i].reshape(c.leaf.shape) for i, c in enumerate(rows)]


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


@jax.custom_jvp
def _where(leaf: Any, mask: Any) -> Any:
    """The leaf, +0.0 where the mask is False: chosen among bits, since a choice among floats that
    asks for no zero is one by LLVM's floats, to which subnormal numbers are zero."""
    leaf, whole = jnp.asarray(leaf), {8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32, 64: jnp.uint64}
    floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    bits = whole.get(jnp.finfo(leaf.dtype).bits) if floating else None
    if bits is None:
        return _plain_where(leaf, mask)
    kept = _plain_where(jax.lax.bitcast_convert_type(leaf, bits), mask)
    return jax.lax.bitcast_convert_type(kept, leaf.dtype)


@_where.defjvp
def _(primals: Any, tangents: Any) -> Any:
    return _where(*primals), _plain_where(tangents[0], primals[1])


def _plain_where(leaf: Any, mask: Any) -> Any:
    return jnp.where(mask, leaf, jnp.zeros((), leaf.dtype))


_masked = _mesh.on_auto_axes(jax.jit(_where))


def masked(leaf: Any, mask: Any) -> Any:
    return _mesh.like(_masked(leaf, mask), leaf)
