"""Where among the keys of many leaves the k-th smallest should be, told from some of them."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fwt import _mesh
from fwt._types import Array
from fwt.selection import passes as _passes
from fwt.selection.counts import Wide
from fwt.selection.keys import Source
from fwt.selection.stacks import Stack

_SAMPLE = 1 << 16


def _strided(source: Source, stride: int) -> Array:
    """Every ``stride``-th key or so, in step with no axis of the leaf."""
    stride = _stride_of(source.shape, stride)
    return source.key(*(x.reshape(-1)[::stride] for x in source.arrays)).reshape(-1)


def _stride_of(shape: tuple[int, ...], stride: int) -> int:
    while stride > 1 and math.gcd(stride, math.prod(shape[1:])) > 1:
        stride -= 1
    return stride


def _dtype(source: Source) -> Any:
    return jax.eval_shape(source.keys).dtype


def _thin(source: Source) -> Source | None:
    """One slice of a leaf that may be sharded."""
    parts, _ = _passes.slices(source)
    return parts[_passes.SLICES // 2] if parts else None


def stride_for(size: int, groups: int) -> int:
    return max(1, size // max(_SAMPLE // groups, _SAMPLE // 16))


def targets(k: Any, n: int, m: int, xp: Any) -> tuple[Any, Any]:
    """Three ranks in a sample of ``m``, and the ranks of the whole that the outer two span."""
    share = k / xp.maximum(n, 1)
    spread = 2 * xp.sqrt(m * share * (1 - share)) + 1
    ranks = xp.clip(share * m + xp.stack([-spread, 0 * spread, spread]), 0, xp.maximum(m - 1, 0))
    ranks = xp.floor(ranks).astype(xp.uint32)
    return ranks, xp.maximum((ranks[2] - ranks[0]).astype(xp.float32) * (n / xp.maximum(m, 1)), 1)


def _sampled(stack: Stack, stride: int) -> tuple[Array, list[int]]:
    """Some keys of each leaf (leaves, keys), and how many; behind them the largest number."""
    if stack.one:
        found = _strided(stack.source, stride)[None]
        return found, [found.shape[1]]
    key, arrays = stack.source
    found = key(*(x[:, ::stride] for x in arrays))
    counts = [-(-n // stride) for n in stack.sizes]
    if stack.ends is not None:
        more = np.arange(found.shape[1]) >= np.asarray(counts)[:, None]
        found = jnp.where(more, found.dtype.type(np.iinfo(found.dtype).max), found)
    return found, counts


def quantiles(stacks: list[Stack], joint: bool, ks: Wide) -> tuple[Array, Array]:
    """The keys (groups, 3) of the sample around the k-th, and the ranks between them."""
    sizes = [n for s in stacks for n in s.sizes]
    groups = 1 if joint else len(sizes)
    if jax.device_count() == 1:
        size = sum(sizes)
        some = [_sampled(s, stride_for(size if joint else max(s.sizes), groups)) for s in stacks]
        rows, m = [r for r, _ in some], [n for _, counts in some for n in counts]
        if joint:
            rows, m = [jnp.concatenate([r.reshape(1, -1) for r in rows], 1)], [sum(m)]
        width = -(-max(1, *(r.shape[1] for r in rows)) // 32)
        top = rows[0].dtype.type(np.iinfo(rows[0].dtype).max)
        padded = [
            jnp.pad(r, ((0, 0), (0, width * 32 - r.shape[1])), constant_values=top) for r in rows
        ]
        sample = lax.concatenate(padded, 0).reshape(groups, 1, 32, width)

        def below(trials: Array) -> Array:
            parts = jnp.sum(sample < trials[:, :, None, None], 2, dtype=jnp.int8)
            return jnp.sum(parts, -1, dtype=jnp.uint32)

    else:
        apart = [[s.source] for s in stacks]
        apart = [[s.source for s in stacks]] if joint else apart
        thin = [[t for t in map(_thin, group) if t is not None] for group in apart]
        m = [sum(math.prod(t.shape) for t in group) for group in thin]

        def below(trials: Array) -> Array:
            found = []
            for group, row in zip(thin, trials, strict=True):
                hits = [t.keys()[..., None] < row for t in group]
                counts = [jnp.sum(h, range(h.ndim - 1), dtype=jnp.uint32) for h in hits]
                found.append(sum(counts, jnp.zeros(3, jnp.uint32)))
            return jnp.stack(found)

    exact = ks.high.astype(jnp.float32) * 65536.0 + ks.low.astype(jnp.float32)
    sizes = [sum(sizes)] if joint else sizes
    each = np.asarray(sizes, np.float32), np.asarray(m, np.float32)
    ranks, spans = jax.vmap(lambda k, n, m: targets(k, n, m, jnp))(exact, *each)
    dtype = _dtype(stacks[0].source)
    bits = dtype.itemsize * 8

    def bit(i: Any, found: Array) -> Array:
        place = jnp.asarray(bits - 1 - i).astype(dtype)  # i is a plain int without jit
        trial = found | (dtype.type(1) << place)
        return jnp.where(below(trial) <= ranks, trial, found)

    arrays = [s.source.arrays for s in stacks]
    start = _mesh.alike(jnp.zeros((groups, 3), dtype), ks, arrays)
    return lax.fori_loop(0, bits, bit, start), spans


strided = functools.partial(jax.jit, static_argnums=(0, 2))(
    lambda key, arrays, stride: _strided(Source(key, arrays), stride)
)
