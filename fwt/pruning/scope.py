"""How many weights go in which leaf: the scopes of pruning, and how other libraries count."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fwt import _apart, _paths, _tree, patterns
from fwt._axes import Axes
from fwt._types import FwtError, LeafError, WhereError
from fwt.selection import select
from fwt.selection.counts import Wide, count, difference, less, minus, plus, total, wide
from fwt.selection.keys import Source, signed_key, sources
from fwt.selection.stacks import stacks_of

Scope = Literal["layer", "output", "global", "normalized", "erk", "lamp"] | Mapping[str, Any]
Like = Literal["torch", "jaxpruner", "tfmot"]
SCOPES = ("layer", "output", "global", "normalized", "erk", "lamp")


class Leaf(NamedTuple):
    """What a scope asks of a leaf; of a stack of layers, each slice is a layer.

    Attributes:
        path: where it is.
        shape: its shape, that of one slice.
        size: how many units it has, weights or windows; so many each slice has.
        most: how many of them may go.
        worth: an array of what they are worth, which may be signed; of all slices.
        dead: how many of them are gone already, one count a slice, a list of ints or a Wide of
            arrays; None where that does not count.
        alive: a mask of those that are not; None if all are.
        floor: how many of them go at least, in the same way; None for none.
        axes: what the axes of the whole leaf mean.
        others: the other paths of a tied array.
        plain: whether it is the magnitude of ``worth`` that counts.
    """

    path: str
    shape: tuple[int, ...]
    size: int
    most: int
    worth: Any
    dead: Any = None
    alive: Any = None
    floor: Any = None
    axes: Axes | None = None
    others: Collection[str] = ()
    plain: bool = False

    @property
    def slices(self) -> int:
        return 1 if self.axes is None else self.axes.size(self.axes.stack)


def check_ties(scope: Any, perhaps: Sequence[Sequence[str]], names: Sequence[str]) -> None:
    """Raises for a scope over all leaves if some of them are perhaps one array, as a trace hides
    of what a file calls one: they would have to be counted once."""
    for group in perhaps if isinstance(scope, str) and scope not in ("layer", "output") else ():
        if len(set(group) & set(names)) > 1:
            raise LeafError(_paths.hidden_tie(group, f"scope={scope!r} would count it twice"))


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


def by_output(place: Axes, pattern: patterns.Pattern, fit: Any) -> Axes:
    """The axes of a leaf as a stack of its output units, for weights that are compared in each.

    Raises:
        LeafError: if an output unit has fewer than two units of the pattern, or shares them.
    """
    window = fit.window if isinstance(fit, patterns.Windows) else (1,) * len(place.shape)
    outputs, inputs = place.outputs, place.inputs
    within = [i for i in place.all if i not in (*place.stack, *outputs)]
    units = math.prod(place.shape[i] // window[i] for i in within)
    if outputs and units != 1 and all(window[i] == 1 for i in outputs):
        names = list(place.names or ())
        for i in place.all:
            names[i] = "stack" if i in outputs else "in" if i in inputs else names[i]
        return dataclasses.replace(place, names=tuple(names), keras=None, flax=None)
    plain = pattern == patterns.unstructured
    raise LeafError(
        f"scope='output' compares weights within each output, and {place.path} of shape "
        f"{place.shape} has no two"
        + (" there" if plain else f" units of {pattern!r} there")
        + ": leave it out with where=, or take "
        + ("another scope" if plain else "another scope or pattern")
    )


def shares(scope: Mapping[str, Any], leaves: Sequence[Leaf], sparsity: Any) -> list[Any]:
    """The sparsity of each leaf: that of the first glob that matches it, by any of its paths."""
    paths = [p for x in leaves for p in (x.path, *x.others)]
    hits = {glob: set(_tree.named(glob, paths)) for glob in scope}
    for glob in scope:
        if not hits[glob]:
            raise WhereError(
                f"scope={{{glob!r}: ...}} matches no selected leaf{_tree.near(glob, paths)}"
            )
    found = []
    for leaf in leaves:
        mine = next((g for g in scope if not hits[g].isdisjoint((leaf.path, *leaf.others))), None)
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
) -> tuple[bool, Any]:
    """Whether all leaves are one selection, and how many units go of all, a list of one count; or
    of each slice of each leaf, a list of ints or a Wide of arrays."""
    sizes = [x.size for x in leaves for _ in range(x.slices)]
    dead = _joined([x.dead for x in leaves], leaves)
    if isinstance(scope, Mapping) or scope == "layer":
        each = [sparsity] * len(leaves)
        if isinstance(scope, Mapping):
            each = shares(scope, leaves, sparsity)
        each = [s for s, x in zip(each, leaves, strict=True) for _ in range(x.slices)]
        return False, _bounded(_counted(each, sizes, dead, like), leaves)
    gone = _sum(dead) if like == "torch" else 0
    gone = [gone] if isinstance(gone, int) else stacked([gone])
    k = _counted([sparsity], [sum(sizes)], gone, like)
    k = Wide(k.high[0], k.low[0]) if isinstance(k, Wide) else k[0]
    k = _maximum(k, _sum(_joined([x.floor for x in leaves], leaves)))
    if scope in ("global", "normalized"):
        return True, [_minimum(k, sum(x.most * x.slices for x in leaves))]
    if scope == "lamp":
        return False, _lamp(leaves, k)
    return False, _erk(leaves, sparsity, k, like, dead)


def _joined(counts: Sequence[Any], leaves: Sequence[Leaf]) -> Any:
    """The counts of all leaves, one after another; 0 for None."""
    each = [[0] * x.slices if c is None else c for c, x in zip(counts, leaves, strict=True)]
    if not any(isinstance(c, Wide) for c in each):
        return [n for c in each for n in c]
    return Wide(*(jnp.concatenate(xs) for xs in zip(*map(_flat, each), strict=True)))


def _flat(counts: Any) -> Wide:
    """A list of ints as a Wide of arrays, which a graph takes at once and not one by one."""
    if isinstance(counts, Wide):
        return counts
    rows = np.array([wide(n) for n in counts], np.uint32).reshape(len(counts), 2)
    return Wide(rows[:, 0], rows[:, 1])


def _sum(counts: Any) -> Any:
    if not isinstance(counts, Wide):
        return sum(counts)
    out, each = wide(0), counts.high << 16 | counts.low
    for start in range(0, each.size, 1 << 15):
        out = plus(out, total(each[start : start + (1 << 15)]))
    return out


def _minimum(a: Any, b: Any) -> Any:
    if isinstance(a, int) and isinstance(b, int):
        return min(a, b)
    a, b = wide(a), wide(b)
    smaller = less(a, b)
    return Wide(*(jnp.where(smaller, x, y) for x, y in zip(a, b, strict=True)))


def _maximum(a: Any, b: Any) -> Any:
    if isinstance(b, int) and (isinstance(a, int) or b == 0):
        return max(a, b) if isinstance(a, int) else a
    return minus(plus(wide(a), wide(b)), _minimum(a, b))


def _bounded(ks: Any, leaves: Sequence[Leaf]) -> Any:
    floor = _joined([x.floor for x in leaves], leaves)
    most = [x.most for x in leaves for _ in range(x.slices)]
    if not isinstance(ks, Wide) and not isinstance(floor, Wide):
        return [min(max(row), m) for *row, m in zip(ks, floor, most, strict=True)]
    ks = _flat(ks)
    if any(x.floor is not None for x in leaves):
        ks = _maximum(ks, _flat(floor))
    return _minimum(ks, _flat(most)) if any(x.most < x.size for x in leaves) else ks


def _counted(each: Sequence[Any], sizes: Sequence[int], dead: Any, like: Like | None) -> Any:
    """How many of ``n`` units a sparsity prunes, as ``like`` counts; with those gone before."""
    traced = any(isinstance(x, jax.core.Tracer) for x in each)
    if not traced and not isinstance(dead, Wide):
        return [_one(s, n, d, like) for s, n, d in zip(each, sizes, dead, strict=True)]
    if not each:  # a stack of no layers
        return _flat([])
    if like in ("jaxpruner", "tfmot"):
        s = _stack(each)
        if max(sizes) >= 1 << 32:
            raise FwtError(
                f"like={like!r} counts in float32, and {max(sizes)} weights are too many"
            )
        whole = jnp.asarray(sizes, jnp.uint32)  # as float32 it may be more
        kept = _kept_like(s, whole.astype(jnp.float32), jnp).astype(jnp.uint32)
        return wide(whole - jnp.minimum(kept, whole))
    gone = Wide(*map(jnp.asarray, _flat(dead)))
    left = minus(_flat(sizes), gone)
    if not all(isinstance(s, int | float) for s in each):
        return plus(jax.vmap(count)(_stack(each), left), gone)
    pruned, start = [], 0  # numbers count otherwise than arrays do
    for s, same in itertools.groupby(each):
        stop = start + len(list(same))
        here = Wide(*(x[start:stop] for x in left))
        each_of = jax.vmap(functools.partial(count, s))
        pruned.append(_minimum(s, here) if isinstance(s, int) else each_of(here))
        start = stop
    return plus(Wide(*(jnp.concatenate(xs) for xs in zip(*pruned, strict=True))), gone)


def _stack(each: Sequence[Any]) -> Any:
    """Sparsities as one array, each that is there several times converted once."""
    first: dict[int, Any] = {id(x): x for x in each}
    at = {key: i for i, key in enumerate(first)}
    values = jnp.stack([jnp.asarray(x, jnp.float32) for x in first.values()])
    return values[np.array([at[id(x)] for x in each])]


def stacked(counts: Sequence[Wide]) -> Wide:
    return Wide(*(jnp.stack([jnp.asarray(x, jnp.uint32) for x in xs]) for xs in zip(*counts)))


def _one(s: Any, n: int, dead: int, like: Any) -> int:
    if like in ("jaxpruner", "tfmot"):
        s = np.float32(float(s))
        return n - min(int(_kept_like(s, np.float32(n), np)), n) if n else 0
    if like == "torch":
        left = n - dead
        if isinstance(s, int) and s > left:
            raise FwtError(
                f"sparsity={s} with like='torch' is a number of weights to prune, but "
                f"only {left} of {n} are left"
            )
        return dead + (s if isinstance(s, int) else count(s, left))
    return int(count(s, n))


def _kept_like(s: Any, n: Any, xp: Any) -> Any:
    """What jaxpruner and tfmot keep: max(1, round(n * (1 - s))), in float32."""
    return xp.minimum(xp.maximum(xp.round(n * (xp.float32(1) - s)), 1), n)


def _lamp(leaves: Sequence[Leaf], k: Any) -> Any:
    """Lee et al., "Layer-adaptive sparsity for the magnitude-based pruning", 2021: the square of a
    weight over the sum of the squares that are not below it, compared over all leaves."""
    arrays = [(x.worth,) if x.alive is None else (x.worth, x.alive) for x in leaves]
    traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((arrays, k)))
    if traced and all(x.slices == 1 and not (x.axes and x.axes.stack) for x in leaves):
        return _lamp_of_rows(leaves[0].plain, arrays, k)
    found = sources([_lamp_scores(x.axes and x.axes.stack, x.plain, *a)
                     for x, a in zip(leaves, arrays, strict=True)], True)  # fmt: skip
    pairs = zip(found, map(_apart.own, select.smallest([found], [k])), strict=True)
    gone = [select.count_gone(s.key, s.arrays, c) for s, c in pairs]
    if isinstance(k, int) and not any(isinstance(g, jax.core.Tracer) for g in gone):
        return [int(n) for each in gone for n in each]
    return wide(jnp.concatenate(gone))


def _lamp_of_rows(plain: bool, arrays: Sequence[Any], k: Any) -> Any:
    """The same under a trace, of leaves that are one layer each: small ones of about one size stay
    side by side."""
    stacks = stacks_of([Source(signed_key, x) for x in arrays])
    scores = []
    for s in stacks:
        if s.one:
            scores.append(_lamp_scores((), plain, *s.source.arrays))
            continue
        rows = lax.map(lambda row: _lamp_of_one(plain, *row), s.source.arrays)
        scores.append(rows[:, ::-1])  # the zeros behind a leaf came to stand before all of its own
    found = zip(stacks, sources(scores, True), strict=True)
    stacks = [s._replace(source=source) for s, source in found]
    masks = select.kept_rows(stacks, select.smallest_of_rows(stacks, k))
    counts = [jnp.sum(s.own(~m), -1, dtype=jnp.uint32) for s, m in zip(stacks, masks, strict=True)]
    return wide(jnp.concatenate(counts)[np.argsort([i for s in stacks for i in s.places])])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _lamp_scores(stack: Any, plain: bool, *arrays: Any) -> Any:
    """The scores of a leaf, (slices, units)."""

    def rows(x: Any) -> Any:
        first = jnp.moveaxis(x, stack or (), range(len(stack or ())))
        sizes = first.shape[: len(stack or ())]
        return first.reshape(math.prod(sizes), math.prod(first.shape[len(sizes) :]))

    return jax.vmap(functools.partial(_lamp_of_one, plain))(*map(rows, arrays))


def _lamp_of_one(plain: bool, worth: Any, alive: Any = None) -> Any:
    """The scores of one layer, sorted; those that are gone already are below all others."""
    x = worth.astype(_tree.wide_dtype(worth.dtype))
    x = jnp.abs(x) if plain else jnp.maximum(x, 0)
    x = jnp.where(jnp.isnan(x), jnp.inf, x)
    gone = 0 if alive is None else jnp.sum(~alive)
    x = x if alive is None else jnp.where(alive, x, 0)
    x = jnp.sort(x / jnp.maximum(jnp.max(jnp.where(jnp.isinf(x), 0, x), initial=0), 1e-30))
    squares = x * x
    after = jnp.cumsum(squares[::-1])[::-1]
    found = jnp.where(jnp.isinf(x), jnp.inf, squares / jnp.where(after > 0, after, 1))
    return jnp.where(jnp.arange(x.size) < gone, -1, found)


def _erk(leaves: Sequence[Leaf], sparsity: Any, k: Any, like: Any, dead: Any) -> Any:
    """Erdős-Rényi with kernels (Evci et al., "Rigging the Lottery", 2020): the density of a leaf
    goes with ``sum(shape) / prod(shape)``; those that would pass 1 are dense."""
    whole, leaves = leaves, [x for x in leaves for _ in range(x.slices)]
    if not leaves:  # a stack of no layers
        return []
    traced = not isinstance(k, int) or isinstance(dead, Wide)
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
        counts = _counted(each, [x.size for x in leaves], [0] * len(each), like)
        return _bounded(counts, whole)
    caps: Any = sizes
    if leaves[0].dead is not None:  # what is gone stays so, where the count allows it
        if traced:
            left = minus(_flat([x.size for x in leaves]), _flat(dead))
            room: Any = (left.high << 16 | left.low).astype(jnp.float32)
        else:
            room = sizes - np.array(dead, np.float64)
        caps = xp.where(room.sum() >= kept, room, sizes)
    base = _apportioned(density * sizes, caps, k, everything, xp)
    if traced:
        return minus(_flat([x.size for x in leaves]), wide(base))
    return [x.size - int(b) for x, b in zip(leaves, base, strict=True)]


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
