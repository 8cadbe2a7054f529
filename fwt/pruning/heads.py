"""Heads of attention, which go from query, key, value and out together."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from fwt import _rules, _tree, patterns
from fwt._axes import Axes
from fwt._types import FwtError, LeafError

_PARTS = {*_rules.ATTENTION_IN, *_rules.ATTENTION_OUT}


def groups(pattern: patterns.Pattern, places: Sequence[Axes], scope: Any) -> list[list[int]]:
    """Of leaves with a pattern, which are those of one attention, where several are.

    Raises:
        LeafError: if they have different numbers of heads.
        FwtError: for a scope that would count the heads of each leaf apart.
    """
    if pattern.name != "channel" or dict(pattern.settings)["axis"] != "heads":
        return []
    found: dict[Any, list[int]] = {}
    for i, place in enumerate(places):
        *above, layer, _ = ("", "", *_tree.split(place.path))
        found.setdefault(tuple(above) if layer in _PARTS else place.path, []).append(i)
    several = [group for group in found.values() if len(group) > 1]
    for group in several:
        sizes = [_sizes(places[i]) for i in group]
        if len(set(sizes)) > 1:
            most = max(sizes, key=sizes.count)
            same = [places[i].path for i, s in zip(group, sizes, strict=True) if s == most]
            counts = ", ".join(f"{places[i].path} has {places[i].shape}" for i in group)
            raise LeafError(
                f"{pattern!r} prunes a head in all kernels of an attention, which have different "
                f"numbers of heads: {counts}: where={same!r} takes those with as many"
            )
    for group in several if isinstance(scope, Mapping) else ():
        first = [next((g for g in scope if _tree.named(g, [places[i].path], own=False)), None)
                 for i in group]  # fmt: skip
        if len({None if g is None else scope[g] for g in first}) > 1:
            told = ", ".join(places[i].path for i in group)
            raise FwtError(
                f"{pattern!r} prunes a head in {told} together, and scope= gives them different "
                "shares: one glob for all of them, such as '**/attention/**', gives one"
            )
    if several and scope in ("output", "global", "normalized", "erk", "lamp"):
        names = [places[i].path for i in several[0]]
        raise FwtError(
            f"{pattern!r} prunes a head in {', '.join(names)} together, and scope={scope!r} counts "
            f"those of each: take scope='layer', or where={names[:1]!r} for one of them"
        )
    return several


def _order(place: Axes) -> list[int]:
    """The axes of a leaf with those of a stack and of heads first."""
    names = place.names or ()
    first = [*place.stack, *(i for i, n in enumerate(names) if n == "heads")]
    return [*first, *(i for i in place.all if i not in first)]


def _sizes(place: Axes) -> tuple[int, ...]:
    count = len(place.stack) + list(place.names or ()).count("heads")
    return tuple(place.shape[i] for i in _order(place)[:count])


def together(
    groups: list[list[int]], places: Sequence[Axes], windows: Sequence[Any], found: Sequence[Any]
) -> list[Any]:
    """What each head is worth in all leaves of its attention, in the place of what it is worth in
    each: one number a head, as the windows have pooled it; of masks, whether one is True."""
    out = list(found)
    for group in groups:
        rows = [out[i].transpose(_order(places[i])).reshape(_sizes(places[i])) for i in group]
        one = _pooled(rows, [windows[i] for i in group])
        for i in group:
            order = _order(places[i])
            shape = [out[i].shape[a] for a in order]
            out[i] = one.reshape(shape).transpose(sorted(range(len(order)), key=order.__getitem__))
    return out


def _pooled(rows: Sequence[Any], windows: Sequence[patterns.Windows]) -> Any:
    x = jnp.stack(jnp.broadcast_arrays(*rows))
    if x.dtype == bool:
        return x.any(0)
    pool = windows[0].pool
    if pool == "mean":
        sizes = [math.prod(w.window) for w in windows]
        shares = jnp.asarray([n / sum(sizes) for n in sizes], x.dtype)
        return jnp.tensordot(shares, x, 1, precision="highest")
    if pool == "l2":
        most = jnp.max(x, 0)
        unit = jnp.where((most > 0) & (most < jnp.inf), most, 1)  # squares may overflow
        return unit * jnp.sqrt(jnp.sum((x / unit) ** 2, 0))
    return jnp.max(x, 0) if pool == "max" else jnp.sum(x, 0)
