"""The exact k-th smallest over many leaves, without sorting and without joining them.

A sample says where the answer should be; passes over the data count how many keys are below a
trial until the count is right. All that a pass hands on is one number a leaf, so sharded leaves
stay where they are.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fwt import _mesh
from fwt._apart import Columns, Row, own, pick
from fwt._types import Array, FwtError
from fwt.selection import passes as _passes
from fwt.selection import sample
from fwt.selection.counts import Wide, difference, less, minus, total, wide
from fwt.selection.keys import Source
from fwt.selection.stacks import Stack, of_leaves, own_places, stacks_of

Ties = Literal["first", "all"]


class Cut(NamedTuple):
    """A selection: kept are the keys above ``value``, and those equal to it before ``index``."""

    value: Any
    index: Any


def kept(source: Source, cut: Cut) -> Array:
    """The mask of one leaf."""
    keys = source.keys()
    if isinstance(keys, np.ndarray):
        before = np.arange(keys.size).reshape(keys.shape) < cut.index
        return (keys > cut.value) | (keys == cut.value) & before
    return (keys > cut.value) | (keys == cut.value) & _passes.before(source.shape, cut.index)


def row_kept(keys: Array, k: Array) -> Array:
    """The mask of one row of keys without the ``k`` smallest: bit by bit, for many rows under
    vmap, where each pass is one for all of them."""
    dtype = keys.dtype
    bits = dtype.itemsize * 8

    def bit(i: Any, found: Array) -> Array:
        place = jnp.asarray(bits - 1 - i).astype(dtype)  # i is a plain int without jit
        trial = found | (dtype.type(1) << place)
        return jnp.where(jnp.sum(keys < trial, dtype=jnp.uint32) <= k, trial, found)

    value = lax.fori_loop(0, bits, bit, _mesh.alike(jnp.zeros((), dtype), keys, k))
    ties = keys == value
    stay = jnp.sum(keys <= value, dtype=jnp.uint32) - k
    split = (stay != 0) & (stay != jnp.sum(ties, dtype=jnp.uint32))
    places = jnp.arange(keys.size, dtype=jnp.uint32)
    top = max(keys.size - 1, 1).bit_length()

    def cut_bit(i: Any, found: Array) -> Array:
        trial = found | (jnp.uint32(1) << jnp.asarray(top - 1 - i).astype(jnp.uint32))
        below = jnp.sum(ties & (places < trial), dtype=jnp.uint32)
        return jnp.where(below < stay, trial, found)

    # Where no row splits its ties there is nothing to search: a loop of no trips.
    first = _mesh.alike(jnp.uint32(0), keys, k)
    last = lax.fori_loop(0, jnp.where(split, top, 0), cut_bit, first)
    return (keys > value) | ties & (stay != 0) & ((places <= last) | ~split)


class _State(NamedTuple):
    """A bracket ``lo < trial < hi``: fewer than k keys are below lo, at least k below hi."""

    lo: Array
    hi: Array
    trial: Array
    slope: Array  # keys a rank, as float32
    before: Array  # the trial before this one, and how many ranks it was off
    off: Array
    width: Array  # of the bracket, up to three passes ago
    passes: Array
    done: Array


def _step(s: _State, count: Wide, k: Wide) -> _State:
    """One pass later: ``count`` keys are below ``s.trial``.

    The secant through the last two trials, within the bracket; where that doesn't halve the
    bracket in three passes (many equal keys), or takes many passes, its middle.
    """
    below = less(count, k)
    exact = (count.high == k.high) & (count.low == k.low)
    lo, hi = jnp.where(below, s.trial, s.lo), jnp.where(below, s.hi, s.trial)
    gap = hi - lo
    off = difference(k, count)
    distance = jnp.maximum(s.trial, s.before) - jnp.minimum(s.trial, s.before)
    ranks = jnp.abs(off - s.off)
    secant = distance.astype(jnp.float32) / jnp.maximum(ranks, 1)
    slope = jnp.where(ranks > 0, secant, 4 * s.slope)
    slope = jnp.where(s.passes == 0, s.slope, slope)
    most = 2.0 ** (lo.dtype.itemsize * 8 - 1)
    jump = jnp.clip(jnp.abs(off) * slope, 1, most).astype(lo.dtype)
    jump = jnp.minimum(jump, jnp.maximum(gap, 2) - 1)
    third = s.passes % 3 == 2
    slow = (third & (gap > s.width // 2)) | ((s.passes > 12) & (s.passes % 2 == 0))
    trial = jnp.where(below, lo + jump, hi - jump)
    trial = jnp.where(slow, lo + gap // 2, trial)
    width = jnp.where(third, gap, s.width)
    done = s.done | exact | (gap == 1)
    return _State(lo, hi, trial, slope, s.trial, off, width, s.passes + 1, done)


def _start(guess: Array, span: Array, k: Wide, at_top: Wide) -> _State:
    """From three keys of the sample, how many ranks the outer two span, and how many keys are
    below the largest number of their dtype (for floats all are)."""
    zero, top = jnp.zeros((), guess.dtype), jnp.asarray(np.iinfo(guess.dtype).max, guess.dtype)
    ties_at_top = less(at_top, k)
    found = (k.high == at_top.high) & (k.low == at_top.low) | (k.high == 0) & (k.low == 0)
    return _State(
        lo=jnp.where(ties_at_top, top, zero),
        hi=jnp.where(ties_at_top, zero, top),  # zero: one above the top, wrapped around
        trial=jnp.clip(guess[1], 1, top - 1),
        slope=(guess[2] - guess[0]).astype(jnp.float32) / span,
        before=zero,
        off=jnp.float32(0),
        width=top,
        passes=jnp.int32(0),
        done=found | ties_at_top,
    )


def _tie_cuts(
    stacks: Sequence[Stack], own: Sequence[Any], values: Array, stay: Array, tied: Array
) -> Array:
    """By leaf, the index before which exactly ``stay`` of its ``tied`` keys equal its value."""
    sizes = np.asarray([n for s in stacks for n in s.sizes], np.uint32)

    def searching(at_hi: Array) -> Array:
        return (at_hi != stay) & (stay != 0)

    def body(state: Any) -> Any:
        lo, hi, at_lo, at_hi, passes = state
        active = searching(at_hi)
        gap = hi - lo
        share = (stay - at_lo).astype(jnp.float32) / (at_hi - at_lo).astype(jnp.float32)
        guess = (gap.astype(jnp.float32) * share).astype(jnp.uint32)
        guess = jnp.where(passes % 3 == 2, gap // 2, guess)
        index = lo + jnp.clip(guess, 1, jnp.maximum(gap, 2) - 1)

        def below(stack: Stack, arrays: Any, index: Array, mine: Any) -> Array:
            if stack.one:
                return _ties_below_jit(stack.source.key, arrays, mine, active, values, index)
            rows = active[mine], values[mine], index[mine]
            return _row_ties_jit(stack.source.key, arrays, *rows)

        at = of_leaves(stacks, own, index, below)
        low, high = active & (at < stay), active & (at >= stay)
        return (
            jnp.where(low, index, lo),
            jnp.where(high, index, hi),
            jnp.where(low, at, at_lo),
            jnp.where(high, at, at_hi),
            passes + 1,
        )

    # Before index 0 there is none of them; where all or none stay there is nothing to search.
    nothing = jnp.zeros(len(sizes), jnp.uint32)
    start = (nothing, sizes, nothing, tied, jnp.int32(0))
    start = _mesh.alike(start, values, [s.source.arrays for s in stacks])
    hi = lax.while_loop(lambda s: jnp.any(searching(s[3])), body, start)[1]
    return jnp.where(stay == 0, 0, hi)


def _stays(kept: Wide, tied: Array) -> Array:
    """How many ties stay in each leaf, if the first ``kept`` of all leaves together do."""

    def leaf(rest: Wide, tied: Array) -> tuple[Wide, Array]:
        some = jnp.where(rest.high < 1 << 16, rest.high << 16 | rest.low, jnp.uint32(0xFFFFFFFF))
        take = jnp.minimum(some, tied)
        return minus(rest, wide(take)), take

    return lax.scan(leaf, kept, tied)[1]


def _if_sought(sought: Array, counting: Callable[..., Array], arrays: Any, *given: Array) -> Array:
    """``counting(arrays, *given)``, a count for each entry of the last; zeros, without reading the
    arrays, if nothing is sought any more."""

    def nothing(*all_: Any) -> Array:
        return _mesh.alike(jnp.zeros(given[-1].shape, jnp.uint32), all_)

    return lax.cond(sought, counting, nothing, arrays, *given)


def _cuts(stacks: list[Stack], joint: bool, ks: Wide, ties: Ties) -> Cut:
    """The cuts (problems, leaves) for several counts (problems, groups) of the same keys, under a
    trace: each pass counts for all problems at once. Leaves, and groups of one leaf, are in the
    order of the stacks."""
    order = np.asarray([i for s in stacks for i in s.places])
    n = np.asarray([n for s in stacks for n in s.sizes], np.uint32)
    leaves, problems = len(n), len(ks.low)
    group_of = np.zeros(leaves, int) if joint else np.arange(leaves)

    @jax.vmap
    def totals(counts: Array) -> Wide:
        if joint:
            return Wide(*(x[None] for x in total(counts)))
        return wide(counts)  # one leaf a group

    def count(trials: Array, done: Array) -> Array:
        def below(stack: Stack, arrays: Any, trials: Array, mine: Any) -> Array:
            key, rows = stack.source.key, len(stack.places)
            if stack.one:
                group = np.uint32(0) if joint else mine
                return _leaf_count(key, joint, arrays, trials, done, group)
            given = [jnp.broadcast_to(x, (problems, rows)) if joint else x[:, mine]
                     for x in (trials, done)]  # fmt: skip
            return _row_counts(key, arrays, *given, stack.ends)

        return of_leaves(stacks, at, trials, below)

    guess, span = jax.vmap(lambda ks: sample.quantiles(stacks, joint, ks))(ks)
    at = own_places(stacks, guess[0, 0, 0])
    top = jnp.full(ks.low.shape, np.iinfo(guess.dtype).max, guess.dtype)
    at_top = jnp.broadcast_to(n, (problems, leaves))
    if not _below_top([s.source for s in stacks]):
        at_top = count(top, jnp.zeros(top.shape, bool))
    state = jax.vmap(jax.vmap(_start))(guess, span, ks, totals(at_top))
    full = (state.hi == 0)[:, group_of]
    at_lo = jnp.where(full, at_top, 0)
    at_hi = jnp.where(full, n, at_top)

    def body(carry: Any) -> Any:
        state, at_lo, at_hi = carry
        counts = count(state.trial, state.done)
        new = jax.vmap(jax.vmap(_step))(state, totals(counts), ks)
        new = jax.tree.map(lambda a, b: jnp.where(state.done, a, b), state, new)
        at_lo = jnp.where((new.lo != state.lo)[:, group_of], counts, at_lo)
        at_hi = jnp.where((new.hi != state.hi)[:, group_of], counts, at_hi)
        return new, at_lo, at_hi

    start = _mesh.alike((state, at_lo, at_hi), [s.source.arrays for s in stacks])
    state, at_lo, at_hi = lax.while_loop(lambda c: jnp.any(~c[0].done), body, start)
    value = (state.hi - 1)[:, group_of]
    kept = jax.vmap(minus)(totals(at_hi), ks)
    tied = at_hi - at_lo
    if ties == "all":
        some = (kept.high | kept.low) > 0
        stay = jnp.where(some[:, group_of], tied, 0)
    elif joint:  # the first leaves keep theirs
        back = np.argsort(order)
        stay = jax.vmap(_stays)(Wide(kept.high[:, 0], kept.low[:, 0]), tied[:, back])[:, order]
    else:
        stay = kept.high << 16 | kept.low
    # Where none goes, everything from zero on is kept.
    none = ((ks.high == 0) & (ks.low == 0))[:, group_of]
    stay = jnp.where(none, 0, stay)
    if problems == 1:
        index = _tie_cuts(stacks, at, value[0], stay[0], tied[0])[None]
    else:
        index = lax.map(lambda each: _tie_cuts(stacks, at, *each), (value, stay, tied))
    return Cut(jnp.where(none, 0, value), jnp.where(none, n, index))


def _concrete_cuts(group: list[Source], k: int, groups: int, ties: Ties) -> list[Cut]:
    """The cut of each leaf of one group, driven from Python: compiled once for each shape."""
    sizes = [math.prod(s.shape) for s in group]
    dtype = jax.eval_shape(group[0].keys).dtype
    if k == 0:
        return [Cut(dtype.type(0), np.uint32(n)) for n in sizes]
    stride = sample.stride_for(sum(sizes), groups)
    some = np.concatenate([np.asarray(sample.strided(s.key, s.arrays, stride)) for s in group])
    some.sort()
    ranks, span = sample.targets(np.float64(k), sum(sizes), len(some), np)
    top = dtype.type(np.iinfo(dtype).max)

    def below(trial: Any) -> list[int]:
        return list(map(int, [_below_jit(s.key, s.arrays, trial) for s in group]))

    at_lo, at_hi = [0] * len(group), sizes if _below_top(group) else below(top)
    state = _start_jit(some[ranks], np.float32(span), wide(k), wide(sum(at_hi)))
    if state.hi == 0:
        at_lo, at_hi = at_hi, sizes
    while not state.done:
        counts = below(state.trial)
        state = _step_jit(state, wide(sum(counts)), wide(k))
        if sum(counts) < k:
            at_lo = counts
        else:
            at_hi = counts
    value = np.asarray(state.hi - 1)

    def place(i: int, stay: int) -> Any:
        source, tied = group[i], np.uint32(at_hi[i] - at_lo[i])
        return _tie_cut_jit(source.key, source.arrays, value, np.uint32(stay), tied)

    return _kept_ties(value, at_lo, at_hi, sizes, k, ties, place)


def _host_cuts(group: list[Source], k: int, ties: Ties) -> list[Cut]:
    """The same of small leaves in NumPy."""
    each = [s.keys().ravel() for s in group]
    sizes = [len(keys) for keys in each]
    if k == 0:
        return [Cut(keys.dtype.type(0), np.uint32(n)) for keys, n in zip(each, sizes, strict=True)]
    joined = np.concatenate(each)
    value = np.partition(joined, k - 1)[k - 1]
    at_lo = [int(np.sum(keys < value)) for keys in each]
    at_hi = [int(np.sum(keys <= value)) for keys in each]

    def place(i: int, stay: int) -> Any:
        return np.uint32(np.flatnonzero(each[i] == value)[stay - 1] + 1)

    return _kept_ties(value, at_lo, at_hi, sizes, k, ties, place)


def _kept_ties(
    value: Any, at_lo: list[int], at_hi: list[int], sizes: list[int], k: int, ties: Ties,
    place: Callable[[int, int], Any],
) -> list[Cut]:  # fmt: skip
    """The cuts at ``value``, of which so many keys of each leaf are below and not above; ``place``
    gives the index before which a number of a leaf's ties is found."""
    rest, cuts = sum(at_hi) - k, []
    for i, (size, low, high) in enumerate(zip(sizes, at_lo, at_hi, strict=True)):
        stay = min(rest, high - low) if ties == "first" or rest == 0 else high - low
        rest -= stay if ties == "first" else 0
        index = place(i, stay) if 0 < stay < high - low else np.uint32(size if stay else 0)
        cuts.append(Cut(value, index))
    return cuts


def kept_rows(stacks: Sequence[Stack], cuts: Sequence[Row]) -> list[Array]:
    """The masks of stacks whose leaves' cuts stand in one table: of rows, or of one leaf."""
    masks = []
    for stack in stacks:
        if stack.one:
            masks.append(kept(stack.source, own(cuts[stack.places[0]])))
            continue
        places = np.asarray([cuts[i].place for i in stack.places])
        value, index = (x[places][:, None] for x in cuts[0].columns.whole)
        keys = stack.source.keys()
        before = lax.broadcasted_iota(jnp.uint32, keys.shape, 1) < index
        masks.append((keys > value) | (keys == value) & before)
    return masks


@functools.partial(jax.jit, static_argnums=0)
def count_gone(key: Any, arrays: Any, cut: Cut) -> Array:
    """How many keys go of each slice of a leaf, (slices, units)."""
    return jnp.sum(~kept(Source(key, arrays), cut), 1, dtype=jnp.uint32)


_below_jit = functools.partial(jax.jit, static_argnums=0)(
    lambda key, arrays, trial: _passes.below(Source(key, arrays), trial)
)


@functools.partial(jax.jit, static_argnums=0)
def _tie_cut_jit(key: Any, arrays: Any, value: Array, stay: Array, tied: Array) -> Array:
    source = Source(key, arrays)
    stack = Stack(source, (0,), (math.prod(source.shape),))
    return _tie_cuts([stack], [np.uint32(0)], value[None], stay[None], tied[None])[0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _leaf_count(
    key: Any, joint: bool, arrays: Any, trials: Array, done: Array, index: Array
) -> Array:
    """How many keys of one leaf are below its trials (problems, groups)."""
    source, mine = Source(key, arrays), pick(trials, index, 1)
    if len(mine) == 1 and joint:
        return _passes.below(source, mine[0])[None, None]
    active = jnp.any(~pick(done, index, 1))  # a leaf that is found already is not read again
    if len(mine) > 1:
        return _passes.below_each(source, mine, active)[:, None]

    def counting(arrays: Any, trial: Array) -> Array:
        return _passes.below(Source(key, arrays), trial)

    return _if_sought(active, counting, arrays, mine[0])[None, None]


@functools.partial(jax.jit, static_argnums=0)
def _row_counts(key: Any, arrays: Any, trials: Array, done: Array, ends: Any) -> Array:
    """The same of leaves side by side, trials (problems, leaves)."""

    def counting(arrays: Any, trials: Array) -> Array:
        return lax.map(lambda row: _passes.rows_below(Source(key, arrays), row, ends), trials)

    return _if_sought(jnp.any(~done), counting, arrays, trials)


@functools.partial(jax.jit, static_argnums=0)
def _ties_below_jit(
    key: Any, arrays: Any, index: Array, active: Array, values: Array, places: Array
) -> Array:
    def counting(arrays: Any, value: Array, place: Array) -> Array:
        return _passes.ties_below(Source(key, arrays), value, place)

    value, place = pick(values, index), pick(places, index)
    return _if_sought(pick(active, index), counting, arrays, value, place)[None]


@functools.partial(jax.jit, static_argnums=0)
def _row_ties_jit(key: Any, arrays: Any, active: Array, values: Array, places: Array) -> Array:
    def counting(arrays: Any, values: Array, places: Array) -> Array:
        return _passes.row_ties(Source(key, arrays), values, places)

    return _if_sought(jnp.any(active), counting, arrays, values, places)


_start_jit, _step_jit = jax.jit(_start), jax.jit(_step)


def _below_top(flat: Sequence[Source]) -> bool:
    """Whether no key can be the largest number of its dtype: only integers' can."""
    return all(jnp.issubdtype(s.arrays[0].dtype, jnp.floating) for s in flat)


def smallest(groups: list[list[Source]], ks: list[Any], ties: Ties = "first") -> list[Any]:
    """Where to cut, so that exactly ``ks[g]`` keys of each group fall below.

    Among equal keys the first in order of leaf and flat index are kept.

    Args:
        groups: one group of all leaves, or one group a leaf; keys of one dtype, empty leaves too.
        ks: how many to drop of each group, 0 to its size: ints, or :class:`Wide` counts that may
            be traced.
        ties: of equal keys at the cut the "first" stay, as many as is right, or "all".

    Returns:
        For each leaf a :class:`Cut`, for :func:`kept`; if traced, the row of one among all of
        them.

    Raises:
        FwtError: for a leaf of 2**32 elements or more.
    """
    for group in groups:
        for s in group:
            if math.prod(s.shape) >= 1 << 32:
                raise FwtError(f"a leaf of shape {s.shape} is too large: 2**32 - 1 at most")
    arrays = [[s.arrays for s in group] for group in groups]
    leaves = jax.tree.leaves((arrays, ks))
    if not any(isinstance(x, jax.core.Tracer) for x in leaves) and all(
        not isinstance(x, jax.Array) or len(x.devices()) == 1 for x in leaves
    ):
        whole = [k if isinstance(k, int) else (int(k.high) << 16) + int(k.low) for k in ks]
        cuts = []
        for group, k in zip(groups, whole, strict=True):
            near = [s.on_host() for s in group]
            if None in near:
                cuts += _concrete_cuts(group, k, len(groups), ties)
            else:
                cuts += _host_cuts([s for s in near if s], k, ties)
        return cuts
    rows: dict[Any, list[int]] = {}
    for i, pair in enumerate(zip(arrays, ks, strict=True)):
        rows.setdefault(_mesh.varies(pair), []).append(i)
    if len(rows) > 1 and len(groups) > 1:  # so that no leaf's cut differs between shards in vain
        each = {
            i: c
            for row in rows.values()
            for i, c in zip(
                row, smallest([groups[i] for i in row], [ks[i] for i in row], ties), strict=True
            )
        }
        return [each[i] for i in range(len(groups))]
    kinds = tuple((s.key, None) for group in groups for s in group)
    flat = [x for group in arrays for x in group]
    return _sought(kinds, len(groups) == 1, ties, flat, ks, len(kinds))


def smallest_of_rows(stacks: Sequence[Stack], k: Any) -> list[Row]:
    """The same of one group under a trace, whose leaves stand side by side already."""
    kinds = tuple((s.source.key, (s.places, s.sizes)) for s in stacks)
    arrays = [s.source.arrays for s in stacks]
    return _sought(kinds, True, "first", arrays, [k], sum(len(s.places) for s in stacks))


def _sought(
    kinds: Any, joint: bool, ties: Ties, arrays: Any, ks: Sequence[Any], leaves: int
) -> list[Any]:
    counts = Wide(*map(_vector, zip(*map(wide, ks), strict=True)))
    found = Columns(_search(kinds, joint, ties, lax.stop_gradient(arrays), counts))
    return [Row(found, i) for i in range(leaves)]


def one_cut(source: Source, k: Any, ties: Ties = "first") -> Cut:
    """The same of one leaf alone."""
    found: Cut = own(smallest([[source]], [k], ties)[0])
    return found


def _vector(numbers: Sequence[Any]) -> Any:
    if all(isinstance(x, np.generic) for x in numbers):
        return np.stack(numbers)
    return jnp.stack([jnp.asarray(x) for x in numbers])


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _search(kinds: Any, joint: bool, ties: Ties, arrays: Any, ks: Wide) -> Cut:
    """``kinds`` has the key of each leaf, or of each stack with the places and sizes in it."""

    @jax.custom_batching.sequential_vmap
    def several(arrays: Any, ks: Wide) -> Cut:
        found = [(Source(key, x), own) for (key, own), x in zip(kinds, arrays, strict=True)]
        stacks = [Stack(s, *own) for s, own in found if own] or stacks_of([s for s, _ in found])
        order = np.asarray([i for s in stacks for i in s.places])
        if not joint:
            ks = Wide(*(x[:, order] for x in ks))
        return Cut(*(x[:, np.argsort(order)] for x in _cuts(stacks, joint, ks, ties)))

    def one(arrays: Any, ks: Wide) -> Cut:
        return Cut(*(x[0] for x in several(arrays, Wide(ks.high[None], ks.low[None]))))

    search = jax.custom_batching.custom_vmap(one)

    @search.def_vmap
    def under_vmap(size: int, batched: Any, arrays: Any, ks: Wide) -> tuple[Cut, Cut]:
        """Some counts of the same leaves share their passes. A few, which that doesn't make
        faster, and other leaves take turns, each with its own number of passes."""
        if any(jax.tree.leaves(batched[0])) or size < 4:
            axes = jax.tree.map(lambda b: 0 if b else None, batched)
            return jax.vmap(one, axes)(arrays, ks), Cut(True, True)
        rows = [x if b else jnp.broadcast_to(x, (size, *x.shape)) for x, b in zip(ks, batched[1])]
        rounds = -(-size // _passes.TOGETHER)
        each = -(-size // rounds)
        padded = [jnp.pad(x, ((0, rounds * each - size), (0, 0)), "edge") for x in rows]
        parts = Wide(*(x.reshape(rounds, each, -1) for x in padded))
        found = lax.map(lambda ks: several(arrays, ks), parts)
        return Cut(*(x.reshape(-1, x.shape[-1])[:size] for x in found)), Cut(True, True)

    found: Cut = search(arrays, ks)
    return found
