"""How many weights go in which leaf: the scopes of pruning, and how other libraries count."""

import functools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fwt import _tree
from fwt._axes import Axes
from fwt._types import FwtError, WhereError
from fwt.selection import select
from fwt.selection.counts import Wide, count, difference, less, minus, plus, total, wide
from fwt.selection.keys import sources

Scope = Literal["layer", "global", "normalized", "erk", "lamp"] | Mapping[str, Any]
Like = Literal["torch", "jaxpruner", "tfmot"]
SCOPES = ("layer", "global", "normalized", "erk", "lamp")


class Leaf(NamedTuple):
    """What a scope asks of a leaf; of a stack of layers, each slice is a layer.

    Attributes:
        path: where it is.
        shape: its shape, that of one slice.
        size: how many units it has, weights or windows; so many each slice has.
        most: how many of them may go.
        worth: an array of what they are worth, which may be signed; of all slices.
        dead: how many of them are gone already, one count a slice; None where that does not count.
        alive: a mask of those that are not; None if all are.
        least: how many of them go at least, one count a slice; None for none.
        axes: what the axes of the whole leaf mean.
        others: the other paths of a tied array.
    """

    path: str
    shape: tuple[int, ...]
    size: int
    most: int
    worth: Any
    dead: Any = None
    alive: Any = None
    least: Any = None
    axes: Axes | None = None
    others: Collection[str] = ()

    @property
    def slices(self) -> int:
        return 1 if self.axes is None else self.axes.size(self.axes.stack)


def check(scope: Any) -> None:
    """Raises for a scope that is none, or a mapping whose numbers are no sparsities."""
    if not isinstance(scope, Mapping):
        if scope not in SCOPES:
            names = ", ".join(map(repr, SCOPES))
            raise FwtError(
                f"scope must be one of {names} or a dict {{glob: sparsity}}, found {scope!r}"
            )
        return
    if not scope:
        raise FwtError("scope={} gives no leaf a sparsity: {glob: sparsity} is expected")
    for glob, value in scope.items():
        number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
        traced = isinstance(value, jax.Array) and not value.ndim
        if not isinstance(glob, str) or not (number or traced):
            raise FwtError(
                f"scope={{{glob!r}: {value!r}}}: a glob and a sparsity from 0 to 1 are expected"
            )


def shares(scope: Mapping[str, Any], leaves: Sequence[Leaf], sparsity: Any) -> list[Any]:
    """The sparsity of each leaf: that of the first glob that matches it, by any of its paths."""

    def matches(glob: str, leaf: Leaf) -> bool:
        return any(_tree.matches(glob, p) for p in (leaf.path, *leaf.others))

    for glob in scope:
        if not any(matches(glob, x) for x in leaves):
            paths = [p for x in leaves for p in (x.path, *x.others)]
            raise WhereError(
                f"scope={{{glob!r}: ...}} matches no selected leaf{_tree.near(glob, paths)}"
            )
    found = []
    for leaf in leaves:
        mine = next((g for g in scope if matches(g, leaf)), None)
        if mine is None:
            raise WhereError(
                f"scope= gives no sparsity for {leaf.path!r}: name it, add '**' for the "
                "rest, or leave it out with where="
            )
        share = scope[mine]
        share = float(share) if isinstance(share, int | float) else share
        found.append(share if sparsity is None else sparsity * share)
    return found


def allocate(
    leaves: Sequence[Leaf], scope: Any, sparsity: Any, like: Like | None
) -> tuple[bool, list[Any]]:
    """Whether all leaves are one selection, and how many units go: of each slice of each leaf, or
    of all."""
    whole = leaves
    leaves = [
        x._replace(
            dead=None if x.dead is None else x.dead[i], least=0 if x.least is None else x.least[i]
        )
        for x in whole
        for i in range(x.slices)
    ]
    sizes = [x.size for x in leaves]
    dead = [x.dead for x in leaves]
    if isinstance(scope, Mapping):
        each = shares(scope, leaves, sparsity)
        return False, _bounded(_counted(each, sizes, dead, like), leaves)
    if scope == "layer":
        each = [sparsity] * len(leaves)
        return False, _bounded(_counted(each, sizes, dead, like), leaves)
    gone = _sum(dead) if like == "torch" else None
    (k,) = _counted([sparsity], [sum(sizes)], [gone], like)
    k = _largest(k, _sum([x.least for x in leaves]))
    if scope in ("global", "normalized"):
        return True, [_least(k, sum(x.most for x in leaves))]
    if scope == "lamp":
        return False, _lamp(whole, k)
    return False, _erk(leaves, sparsity, k, like)


def _sum(counts: Sequence[Any]) -> Any:
    if all(isinstance(c, int) for c in counts):
        return sum(counts)
    out = wide(0)
    for c in counts:
        out = plus(out, wide(c))
    return out


def _least(a: Any, b: Any) -> Any:
    if isinstance(a, int) and isinstance(b, int):
        return min(a, b)
    a, b = wide(a), wide(b)
    smaller = less(a, b)
    return Wide(*(jnp.where(smaller, x, y) for x, y in zip(a, b, strict=True)))


def _largest(a: Any, b: Any) -> Any:
    if isinstance(b, int) and (isinstance(a, int) or b == 0):
        return max(a, b) if isinstance(a, int) else a
    least = _least(a, b)
    return minus(plus(wide(a), wide(b)), least)


def _bounded(ks: Sequence[Any], leaves: Sequence[Leaf]) -> list[Any]:
    ks = [_largest(k, x.least) for k, x in zip(ks, leaves, strict=True)]
    return [k if x.most == x.size else _least(k, x.most) for k, x in zip(ks, leaves, strict=True)]


def _counted(
    each: Sequence[Any], sizes: Sequence[int], dead: Sequence[Any], like: Like | None
) -> list[Any]:
    """How many of ``n`` units a sparsity prunes, as ``like`` counts; with those gone before."""
    if not any(isinstance(x, jax.core.Tracer | Wide) for x in (*each, *dead)):
        return [_one(s, n, d, like) for s, n, d in zip(each, sizes, dead, strict=True)]
    if like in ("jaxpruner", "tfmot"):
        s = jnp.stack([jnp.asarray(x, jnp.float32) for x in each])
        if max(sizes) >= 1 << 32:
            raise FwtError(
                f"like={like!r} counts in float32, and {max(sizes)} weights are too many"
            )
        whole = jnp.asarray(sizes, jnp.uint32)  # as float32 it may be more
        kept = _kept_like(s, whole.astype(jnp.float32), jnp).astype(jnp.uint32)
        found = wide(whole - jnp.minimum(kept, whole))
    else:
        gone = [wide(0 if d is None else d) for d in dead]
        left = [minus(wide(n), g) for n, g in zip(sizes, gone, strict=True)]
        if all(isinstance(s, int | float) for s in each):  # then some are gone already
            pruned = [
                _least(wide(s), n) if isinstance(s, int) else count(s, n)
                for s, n in zip(each, left, strict=True)
            ]
            return [plus(k, g) for k, g in zip(pruned, gone, strict=True)]
        s = jnp.stack([jnp.asarray(x, jnp.float32) for x in each])
        found = plus(jax.vmap(count)(s, stacked(left)), stacked(gone))
    return [Wide(high, low) for high, low in zip(found.high, found.low, strict=True)]


def stacked(counts: Sequence[Wide]) -> Wide:
    return Wide(*(jnp.stack([jnp.asarray(x, jnp.uint32) for x in xs]) for xs in zip(*counts)))


def _one(s: Any, n: int, dead: int | None, like: Any) -> int:
    if like in ("jaxpruner", "tfmot"):
        s = np.float32(float(s))
        return n - min(int(_kept_like(s, np.float32(n), np)), n) if n else 0
    if like == "torch":
        left = n - (dead or 0)
        if isinstance(s, int) and s > left:
            raise FwtError(
                f"sparsity={s} with like='torch' is a number of weights to prune, but "
                f"only {left} of {n} are left"
            )
        return (dead or 0) + (s if isinstance(s, int) else count(s, left))
    return int(count(s, n))


def _kept_like(s: Any, n: Any, xp: Any) -> Any:
    """What jaxpruner and tfmot keep: max(1, round(n * (1 - s))), in float32."""
    return xp.minimum(xp.maximum(xp.round(n * (xp.float32(1) - s)), 1), n)


def _lamp(leaves: Sequence[Leaf], k: Any) -> list[Any]:
    """Lee et al., "Layer-adaptive sparsity for the magnitude-based pruning", 2021: the square of a
    weight over the sum of the squares that are not below it, compared over all leaves."""
    scores = [_lamp_scores(x.axes and x.axes.stack, x.worth, x.alive) for x in leaves]
    found = sources(scores, True)
    cuts = select.smallest([found], [k])
    gone = [
        g
        for s, c in zip(found, cuts, strict=True)
        for g in select.count_gone(s.key, s.arrays, c, axis=1)
    ]
    if isinstance(k, int) and not any(isinstance(g, jax.core.Tracer) for g in gone):
        return [int(g) for g in gone]
    return [wide(g) for g in gone]


@functools.partial(jax.jit, static_argnums=0)
def _lamp_scores(stack: Any, worth: Any, alive: Any) -> Any:
    """The scores of a leaf, (slices, units)."""

    def rows(x: Any) -> Any:
        first = jnp.moveaxis(x, stack or (), range(len(stack or ())))
        sizes = first.shape[: len(stack or ())]
        return first.reshape(math.prod(sizes), math.prod(first.shape[len(sizes) :]))

    if alive is None:
        return jax.vmap(lambda x: _lamp_of_one(x, None))(rows(worth))
    return jax.vmap(_lamp_of_one)(rows(worth), rows(alive))


def _lamp_of_one(worth: Any, alive: Any) -> Any:
    """The scores of one layer, sorted; those that are gone already are below all others."""
    x = jnp.maximum(jnp.ravel(worth).astype(_tree.wide_dtype(worth.dtype)), 0)
    x = jnp.where(jnp.isnan(x), jnp.inf, x)
    gone = 0 if alive is None else jnp.sum(~alive)
    x = x if alive is None else jnp.where(jnp.ravel(alive), x, 0)
    x = jnp.sort(x / jnp.maximum(jnp.max(jnp.where(jnp.isinf(x), 0, x), initial=0), 1e-30))
    squares = x * x
    after = jnp.cumsum(squares[::-1])[::-1]
    found = jnp.where(jnp.isinf(x), jnp.inf, squares / jnp.where(after > 0, after, 1))
    return jnp.where(jnp.arange(x.size) < gone, -1, found)


def _erk(leaves: Sequence[Leaf], sparsity: Any, k: Any, like: Any) -> list[Any]:
    """Erdős-Rényi with kernels (Evci et al., "Rigging the Lottery", 2020): the density of a leaf
    goes with ``sum(shape) / prod(shape)``; those that would pass 1 are dense."""
    if not leaves:  # a stack of no layers
        return []
    traced = not isinstance(k, int) or any(isinstance(x.dead, Wide) for x in leaves)
    xp: Any = jnp if traced else np
    sizes = np.array([x.size for x in leaves], np.float64)
    raw = np.array([sum(x.shape) / max(math.prod(x.shape), 1) for x in leaves])
    # Which leaves are dense can only be the first ones by falling density.
    dense = np.array([raw > level for level in [np.inf, *sorted(set(raw), reverse=True)]])
    dense = np.concatenate([dense[1:], np.ones((1, len(raw)), bool)])
    weight = np.where(dense, 0, raw * sizes).sum(1)
    top = np.where(dense, 0, raw).max(1)
    everything = sum(x.size for x in leaves)
    if like == "jaxpruner":
        kept = (sizes - xp.floor(sparsity * sizes)).sum()
    elif traced:
        kept = difference(wide(everything), wide(k))
    else:
        kept = everything - k
    scale = (kept - np.where(dense, sizes, 0).sum(1)) / np.where(weight > 0, weight, 1)
    row = xp.argmax(scale * top <= 1)
    density = xp.where(xp.asarray(dense)[row], 1.0, scale[row] * raw)
    if like in ("jaxpruner", "tfmot"):
        each = list(1 - density)
        return _bounded(_counted(each, [x.size for x in leaves], [None] * len(each), like), leaves)
    caps: Any = sizes
    if leaves[0].dead is not None:  # what is gone stays so, where the count allows it
        left = [minus(wide(x.size), wide(x.dead)) if xp is jnp else x.size - x.dead for x in leaves]
        room = xp.asarray([x.high << 16 | x.low if xp is jnp else x for x in left])
        room = room.astype(xp.float32 if xp is jnp else xp.float64)
        caps = xp.where(room.sum() >= kept, room, sizes)
    base = _apportioned(density * sizes, caps, k, everything, xp)
    return [
        x.size - int(b) if xp is np else minus(wide(x.size), wide(b)) for x, b in zip(leaves, base)
    ]


def _apportioned(quotas: Any, caps: Any, k: Any, everything: int, xp: Any) -> Any:
    """Whole numbers next to the quotas with exactly the right sum: by the largest remainder."""
    whole = xp.minimum(xp.maximum(xp.floor(quotas), 0), caps)
    remainder = quotas - whole
    whole = whole.astype(xp.int64 if xp is np else xp.uint32)
    caps = caps.astype(whole.dtype)
    if xp is np:
        rest: Any = everything - k - int(whole.sum())
    else:
        kept = minus(wide(everything), wide(k))
        rest = difference(kept, total(whole)).astype(jnp.int32)

    def body(state: Any) -> Any:
        whole, rest = state
        up = rest > 0
        room = xp.where(up, whole < caps, whole > 0)
        order = xp.argsort(xp.where(room, xp.where(up, -remainder, remainder), xp.inf), stable=True)
        rank = xp.argsort(order, stable=True)
        step = (rank < abs(rest)) & room
        moved = step.sum().astype(xp.int64 if xp is np else xp.int32)
        change = step.astype(whole.dtype)
        return xp.where(up, whole + change, whole - change), rest - xp.where(up, moved, -moved)

    state = (whole, rest)
    if xp is np:
        while state[1] != 0:
            state = body(state)
        return state[0]
    return lax.while_loop(lambda s: s[1] != 0, body, state)[0]
