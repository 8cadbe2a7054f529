"""The inputs that ``verify`` makes: they reach where functions part, and every row of a table."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from fwt._types import ConversionError
from fwt.converters import judge
from fwt.converters.verification import batch
from fwt.converters.verification.sides import Side

_ROWS = 128  # of a batch, for the rows of a table
_ALONE = 1024  # rows that hold one number each
_MOST = 2**16  # numbers in them
_EXACT = 2**24  # the last whole number up to which float32 holds all


# The sizes of an axis that may have any, the first of which is compared before others: those that
# some models refuse, as one that halves an image does, are passed over.
FREE = (9, 8, 10, 16, 32, 64)
AT = 3  # so many of them


def is_free(one: Side, other: Side, shape: Any) -> bool:
    """Whether an axis of an input beside the batch may have any size."""
    known = shape if are_several(shape) else [shape]
    known = known.values() if isinstance(known, Mapping) else known
    if shape is None:
        known = [x for side in (one, other) for x in (side.shape, *(side.shapes or ()))]
    return any(None in x for x in known if x is not None)


def shapes_of(shape: Any) -> Any:
    """What a user gives as ``input_shape``, with the shape of each example in its place."""
    if isinstance(shape, Mapping):
        return {name: shapes_of(x) for name, x in shape.items()}
    if hasattr(shape, "dtype") and hasattr(shape, "shape"):
        return tuple(shape.shape[1:])
    several = isinstance(shape, list | tuple) and any(hasattr(x, "dtype") for x in shape)
    return [shapes_of(x) for x in shape] if several and not _are_numbers(shape) else shape


def _are_numbers(shape: Sequence[Any]) -> bool:
    return all(np.ndim(x) == 0 for x in shape)


def sizes_taken(one: Side, other: Side, how: Any, shape: Any) -> list[int]:
    """From the first that the first model takes on, the sizes of axes that may have any."""
    for at, size in enumerate(FREE):
        given = how(one, other, shape, size)[0]
        xs = given if isinstance(given, list) else [given]
        if takes(one, xs):
            return [*FREE[at:]]
    return [*FREE]


def takes(side: Side, xs: Sequence[np.ndarray]) -> bool:
    """Whether a model runs on the first row of a batch."""
    return _all_taken([(side, [x[:1] for x in xs])], False)


def made(
    one: Side, other: Side, shape: Sequence[int] | None, free: int = FREE[0]
) -> tuple[np.ndarray, list[str]]:
    """A batch in the layout of the first model, and what it does not reach."""
    there = other.shape
    if there is not None and one.channels_first != other.channels_first and len(there) > 1:
        there = (there[-1], *there[:-1]) if one.channels_first else (*there[1:], there[0])
    known: Any = shape or one.shape or there
    if not shape and there is not None and len(known) == len(there):
        known = [b if a is None else a for a, b in zip(known, there, strict=True)]
    if known is None:
        raise ConversionError(
            "verify: neither model says what it takes: give input_shape= or inputs="
        )
    sizes = tuple(free if s is None else int(s) for s in known)
    takes = [np.dtype(d) for d in (one.takes, other.takes) if d is not None]
    held = (*one.dtypes, *other.dtypes, *one.computes, *other.computes, *takes)
    half = any(np.dtype(d).itemsize == 2 and np.dtype(d).kind not in "iu" for d in held)
    whole = [np.iinfo(d) for d in takes if d.kind in "iu"]
    if not (whole or one.integers or other.integers) or (not whole and _floats(one, other, sizes)):
        x = judge.numbers(sizes, half)
        if one.own or other.own:
            x = np.concatenate([x, _dense(sizes)])
        x = _padded(one, other, x)
        return (x > 0).astype(x.dtype) if any(d.kind == "b" for d in takes) else x, []
    low = max([-(2**31), *(int(d.min) for d in whole)])
    high = min([2**31 - 1, *(int(d.max) for d in whole)])
    straight = [side.integers for side in (one, other) if side.integers]
    if straight and not (one.apart or other.apart):
        return _of_one_table(one, other, straight, high, sizes)
    if one.tables or other.tables:
        x, notes = _of_tables(one, other, high, sizes)
        if whole:  # those that a layer makes indices of
            more, said = _of_numbers(one, other, (0, high), half, sizes, True)
            x, notes = np.concatenate([x, more]), [*notes, *said]
        return x, notes
    return _of_numbers(one, other, (low, high), half, sizes)


def _floats(one: Side, other: Side, sizes: tuple[int, ...]) -> bool:
    """Whether models with a table take floats and no whole numbers: the table is fed others."""

    def taken(dtype: Any) -> bool:
        x = np.zeros((1, *sizes), dtype)
        return _all_taken([(one, [x]), (other, batch.laid([x], one, other))], False)

    return not taken(np.int32) and taken(np.float32)


def _dense(sizes: Sequence[int], seed: int = 0) -> np.ndarray:
    """For modules of one's own, whose thresholds nothing tells: whole numbers, halves and many
    magnitudes between 1 and 1000 with both signs, beside two ordinary numbers in each row: in a row
    of those alone that a GELU makes tiny, rounding would be all that there is."""
    steps = np.concatenate([np.arange(0, 16.5, 0.5), np.geomspace(16.5, 1000, 128)])
    values, size = np.concatenate([steps, -steps]).astype(np.float32), max(math.prod(sizes), 1)
    if size < 2:
        return np.zeros((0, *sizes), np.float32)
    if size < 4:  # each number beside one ordinary one or two
        rows = np.resize(np.array([1.5, -1.5], np.float32), (len(values), size))
        rows[np.arange(len(values)), np.arange(len(values)) % size] = values
        return rows.reshape(-1, *sizes)
    count = max(-(-len(values) // size), min(len(values), _MOST // size))
    rows = np.random.default_rng(seed).permutation(np.resize(values, count * size))
    rows = rows.reshape(count, size)
    rows[::2, :2] = rows[1::2, 2:4] = 1.5, -1.5
    return rows.reshape(count, *sizes)


def are_several(shape: Any) -> bool:
    """Whether what a user gives as ``input_shape`` is of several inputs."""
    return isinstance(shape, Mapping) or any(isinstance(s, list | tuple) for s in shape or ())


def _padded(one: Side, other: Side, x: np.ndarray) -> np.ndarray:
    """The batch, and rows whose last steps are what a Masking skips."""
    told = {v for side in (one, other) for p, v, _ in side.settings if p.endswith("mask_value")}
    rows = [x]
    for value in sorted(told) if x.ndim > 2 and x.shape[1] > 1 else ():
        some = x[:4].copy()
        some[:, x.shape[1] - x.shape[1] // 2 :] = value
        rows.append(some)
    return np.concatenate(rows)


def made_of_several(
    one: Side, other: Side, shape: Any, free: int = FREE[0]
) -> tuple[list[np.ndarray], list[str]]:
    """A batch for each input of the first model, in its layout and order: the numbers of each are
    its own, so that two inputs of one shape are told apart."""
    sizes = _sizes_of(one, other, shape, free)
    takes = [_takes(one, i) + _takes(other, i) for i in range(len(sizes))]
    held = (*one.dtypes, *other.dtypes, *one.computes, *other.computes)
    floats = [np.dtype(d) for each in takes for d in each if np.dtype(d).kind not in "iub"]
    half = any(np.dtype(d).itemsize == 2 and np.dtype(d).kind not in "iu" for d in (*held, *floats))
    tables = sorted({len(t) for side in (one, other) for t in side.tables})
    counts = [min([c for side in (one, other) if side.counts for c in [side.counts[i]] if c],
                  default=0) for i in range(len(sizes))]  # fmt: skip

    def taken(xs: Sequence[np.ndarray], finite: bool = False) -> bool:
        return _all_taken([(one, xs), (other, batch.laid(xs, one, other))], finite)

    def zeros(kinds: Sequence[str]) -> list[np.ndarray]:
        return [np.zeros((1, *s), {"i": np.int32, "b": bool}.get(k, np.float32))
                for s, k in zip(sizes, kinds, strict=True)]  # fmt: skip

    told = [_kind(each, count) for each, count in zip(takes, counts, strict=True)]
    ways = [["f", "i"] if kind is None else [kind] for kind in told]
    kinds = next((k for k in itertools.product(*ways) if taken(zeros(k))), [w[0] for w in ways])
    start = zeros(kinds)
    finite = taken(start, True)
    apart, out, notes = _furthest(one, other), [], list[str]()
    for i, (kind, own) in enumerate(zip(kinds, sizes, strict=True)):
        if kind != "i":
            x = judge.numbers(own, half, seed=i)
            # Windows of images of such numbers cancel, of two inputs beside each other above all.
            if (one.own or other.own) and len(own) == 1:
                x = np.concatenate([x, _dense(own, i)])
            x = _padded(one, other, x)
            out.append((x > 0).astype(x.dtype) if kind == "b" else x)
            continue
        limit = counts[i]
        for count in () if limit else reversed(tables):
            fed = [np.full_like(x, count - 1) if j == i else x for j, x in enumerate(start)]
            if taken(fed, finite):
                limit = count
                break
        low = np.iinfo(np.int32).max
        for d in takes[i]:
            if np.dtype(d).kind in "iu":
                low = min(low, int(np.iinfo(d).max))
        limit = min(limit or 100, low)
        rows, most = _differing(apart, limit), _ROWS * max(math.prod(own), 1)
        if len(rows) > most:
            notes.append(f"{most:,} of the {len(rows):,} rows of the tables in which the models "
                         "may differ were fed: give inputs= for more")  # fmt: skip
        out.append(judge.whole_numbers(limit, own, rows[:most].tolist(), seed=i))
    count = max(map(len, out))
    return [x[np.arange(count) % len(x)] for x in out], notes


def _takes(side: Side, at: int) -> list[Any]:
    """The dtype that an input of a model is cast to, if it says one for it alone."""
    found = side.takes[at] if isinstance(side.takes, list) else None
    return [] if found is None else [found]


def _kind(takes: Sequence[Any], count: int) -> str | None:
    """Whether an input is whole numbers, booleans or others; None where no model tells."""
    kinds = {np.dtype(d).kind for d in takes}
    if count or kinds & set("iu"):
        return "i"
    return "b" if "b" in kinds else "f" if kinds else None


def _sizes_of(one: Side, other: Side, shape: Any, free: int) -> list[tuple[int, ...]]:
    """The sizes of each input of the first model."""
    if isinstance(shape, Mapping):
        names = next(
            (s.names_of for s in (one, other) if set(s.names_of or ()) == set(shape)), None
        )
        if names is None:
            raise ConversionError(f"verify: input_shape= names {', '.join(shape)}, which are not "
                                  "the inputs of a model")  # fmt: skip
        shape = [shape[name] for name in names]
    mine, theirs = one.shapes, other.shapes
    count = len(shape or mine or theirs or ())
    if not count:
        raise ConversionError(
            "verify: neither model says what it takes: give input_shape= (a list of shapes) or "
            "inputs="
        )
    out = []
    for i in range(count):
        there = theirs[i] if theirs is not None and len(theirs) == count else None
        known = shape[i] if shape else mine[i] if mine is not None else None
        first = one.channels[i] if one.channels is not None else one.channels_first
        then = other.channels[i] if other.channels is not None else other.channels_first
        channels = one.channels is None or other.channels is None
        told = (first if other.channels is None else then) is not None or not channels
        if there is not None and len(there) > 1 and told and bool(first) != bool(then):
            there = (there[-1], *there[:-1]) if first else (*there[1:], there[0])
        if known is None:
            known = there
        if known is None:
            raise ConversionError(f"verify: no model says the shape of its input {i + 1}: give "
                                  "input_shape= or inputs=")  # fmt: skip
        if there is not None and len(there) == len(known):
            known = [b if a is None else a for a, b in zip(known, there, strict=True)]
        out.append(tuple(free if s is None else int(s) for s in known))
    return out


def _of_one_table(
    one: Side, other: Side, straight: Sequence[int], high: int, sizes: tuple[int, ...]
) -> tuple[np.ndarray, list[str]]:
    """Rows of a table that the input goes straight into."""
    count = min(*straight, high + 1)
    notes = []
    if len(set(straight)) > 1:
        notes.append(f"the tables have {straight[0]:,} and {straight[1]:,} rows: those from "
                     f"{min(straight):,} on are of one model alone and were not fed")  # fmt: skip
    apart = _furthest(one, other)
    rows, limit = _differing(apart, count), _ROWS * max(math.prod(sizes), 1)
    if len(rows) > limit:
        notes.append(f"{limit:,} of the {len(rows):,} rows of the table in which the models may "
                     "differ were fed: give inputs= for more")  # fmt: skip
    return judge.whole_numbers(count, sizes, rows[:limit].tolist()), notes


def _of_tables(
    one: Side, other: Side, high: int, sizes: tuple[int, ...]
) -> tuple[np.ndarray, list[str]]:
    """Rows of tables of any sizes, that the input goes into by ways that are not known: each
    number everywhere in an input, and what only a part of an input takes there alone."""
    size = max(math.prod(sizes), 1)
    counts = sorted({min(len(t), high + 1) for side in (one, other) for t in side.tables})
    start = np.zeros((1, *sizes), np.int32)
    finite = _taken((one, other), start, False) and _taken((one, other), start, True)

    def taken(x: np.ndarray) -> bool:
        return _taken((one, other), x.astype(np.int32), finite)

    limit = next((c for c in reversed(counts) if taken(np.full((1, *sizes), c - 1))), counts[0])
    apart = _furthest(one, other)
    differ = _differing(apart, counts[-1])
    known = differ[differ < limit]
    values = np.concatenate([known, np.setdiff1d(np.arange(limit), known)])
    alone = values[: max(min(_ALONE, _MOST // size), 1)]
    everywhere = np.broadcast_to(alone.reshape(-1, *[1] * len(sizes)), (len(alone), *sizes))
    batch = [judge.whole_numbers(limit, sizes, values[: _ROWS * size]), everywhere]
    fed = set(values[: max(_ROWS * size, len(alone))].tolist())
    beyond = differ[differ >= limit][:_ALONE]
    for at in range(min(size, 64) if len(beyond) else 0):
        some = np.zeros((len(beyond), size), np.int32)
        some[:, at] = beyond
        some = some.reshape(-1, *sizes)
        keep = _those_taken(taken, some)
        batch.append(some[keep])
        fed |= set(beyond[keep].tolist())
    notes = []
    lost = [row for row in differ.tolist() if row not in fed]
    if lost:
        notes.append(f"{len(lost):,} of the {len(differ):,} rows of tables in which the models may "
                     f"differ were not fed, such as {lost[0]}: give inputs= for them")  # fmt: skip
    return np.concatenate(batch).astype(np.int32), notes


def _of_numbers(
    one: Side,
    other: Side,
    ends: tuple[int, int],
    half: bool,
    sizes: tuple[int, ...],
    finite: bool = False,
) -> tuple[np.ndarray, list[str]]:
    """Whole numbers that are no indices, as of images: their ends, both signs, powers of two, and
    those that settings of layers name."""
    (low, high), size = ends, max(math.prod(sizes), 1)
    told = [(p, v) for side in (one, other) for p, v, _ in side.settings if abs(v) <= _EXACT]
    indices = max([0, *(int(v) for p, v in told if p.endswith("num_tokens"))])
    about = sorted({math.floor(v) + d for _, v in told for d in (-1, 0, 1, 2)})
    most = max([9, *about])
    powers = [sign * 2**k for k in range(25) for sign in (1, -1)]
    steps = np.arange(most + 1) if most < _ALONE // 2 else np.linspace(0, most, 65).astype(int)
    found = [0, low, high, *powers, *steps.tolist(), *about[-_ALONE // 4 :],
             *range(min(indices, _ROWS * _ROWS))]  # fmt: skip
    if high - low < 256:
        found = [*range(low, high + 1)]
    bound = 2**10 if half else _EXACT
    values = np.unique([v for v in found if low <= v <= high and abs(v) <= bound])
    alone = np.broadcast_to(values.reshape(-1, *[1] * len(sizes)), (len(values), *sizes))

    def taken(x: np.ndarray) -> bool:
        return _taken((one, other), x.astype(np.int32), finite)

    if len(alone) * size > _MOST:  # images: each number once, and a few everywhere
        alone = np.concatenate([np.resize(values, (-(-len(values) // size), *sizes)),
                                alone[np.linspace(0, len(values) - 1, 5).astype(int)]])  # fmt: skip
    elif taken(np.zeros((1, *sizes))):
        keep = _those_taken(taken, alone)
        values, alone = values[keep], alone[keep]
    rng, rows = np.random.default_rng(0), [np.zeros((1, *sizes), int), alone]
    for scale in (10, 300, math.inf):
        some = rng.choice(values[np.abs(values) < scale], (2, *sizes))
        if sizes:
            some[1, sizes[0] - sizes[0] // 2 :] = 0
        rows.append(some)
    notes = []
    if min(indices - 1, high) > int(values.max()) or indices > _ROWS * _ROWS:
        notes.append(f"not all whole numbers below {indices:,} were fed: give inputs= for more")
    return np.concatenate(rows).astype(np.int32), notes


def _taken(sides: Sequence[Side], x: np.ndarray, finite: bool) -> bool:
    return _all_taken([(side, [x]) for side in sides], finite)


def _all_taken(fed: Sequence[tuple[Side, Sequence[np.ndarray]]], finite: bool) -> bool:
    """Whether all models take what they are fed, and give no NaN for it if ``finite``."""
    for side, xs in fed:
        try:
            ys = jax.tree.leaves(side.outputs(xs)[0])
        except Exception:  # noqa: BLE001 - each framework has its own for what is out of range
            return False
        for y in ys if finite else ():
            if y.dtype.kind not in "iub" and not np.isfinite(y.astype(np.float64)).all():
                return False
    return True


def _those_taken(taken: Any, rows: np.ndarray) -> np.ndarray:
    """Which rows a model takes, found by halves: those out of range lie beside each other."""
    if not len(rows) or taken(rows):
        return np.ones(len(rows), bool)
    if len(rows) == 1:
        return np.zeros(1, bool)
    at = len(rows) // 2
    return np.concatenate([_those_taken(taken, part) for part in (rows[:at], rows[at:])])


def _furthest(one: Side, other: Side) -> np.ndarray | None:
    """How far each row of tables is from the other model's, if they have tables of one width: a row
    of one table alone is infinitely far."""
    pairs = list(zip(one.tables, other.tables, strict=False))
    if not pairs or len(one.tables) != len(other.tables):
        return None
    furthest = np.zeros(max(len(table) for pair in pairs for table in pair))
    for pair in pairs:
        if pair[0].shape[1:] != pair[1].shape[1:]:
            return None
        both, most = sorted(map(len, pair))
        furthest[both:most] = np.inf
        a, b = (np.asarray(t[:both], np.float64).reshape(both, -1) for t in pair)
        with np.errstate(all="ignore"):
            gap = np.max(np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b)), 1)
            far = np.nan_to_num(gap / np.max(np.maximum(np.abs(a), np.abs(b)), 1), nan=np.inf)
        far = np.where(gap == 0, 0, far)
        furthest[: len(far)] = np.maximum(furthest[: len(far)], far)
    return furthest


def _differing(furthest: np.ndarray | None, count: int) -> np.ndarray:
    """The rows below ``count`` in which models may differ, the furthest first."""
    if furthest is None:
        return np.arange(count)
    furthest = furthest[:count]
    return np.argsort(-furthest, kind="stable")[: np.count_nonzero(furthest)]
