"""Random keys: one for each purpose, and for each leaf of a tree."""

import functools
import hashlib
import math
from collections.abc import Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from fwt._types import Array, FwtError

Purpose = Literal["initialize", "lsuv", "prune", "random", "regrow", "reset", "sparsify"]
"""What a key is used for: two purposes draw independent numbers from one seed."""
_THREEFRY = "threefry2x32"
_MOST = 0xFFFFFFFF


def as_key(key: Any, purpose: Purpose) -> Any:
    """A key for one purpose, from a JAX key or an int seed."""
    return _folded(one_key(key), _words(f"purpose {purpose}"))


def leaf_keys(key: Any, purpose: Purpose, paths: Iterable[str]) -> Array:
    """A key for each path, side by side, which depends on that path alone and on no other leaf."""
    mine = np.asarray(_words(f"purpose {purpose}"), np.uint32)
    own = np.asarray([*map(_words, paths)], np.uint32).reshape(-1, 2)
    return _folded(one_key(key), np.concatenate([np.broadcast_to(mine, own.shape), own], 1).T)


def by_index(key: Any) -> bool:
    """Whether each number that a key draws depends on its flat index alone, and not on how many
    are drawn."""
    config: Any = jax.config
    return _is_threefry(key) and bool(config.jax_threefry_partitionable)


def _is_typed(key: Any) -> bool:
    return bool(jnp.issubdtype(key.dtype, jax.dtypes.prng_key))


def _is_threefry(key: Any) -> bool:
    config: Any = jax.config
    kind = jax.random.key_impl(key) if _is_typed(key) else config.jax_default_prng_impl
    return bool(kind == _THREEFRY)


def one_key(key: Any) -> Any:
    """A JAX key, or one made of an int seed."""
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        if not -(1 << 31) <= key < 1 << 32:
            raise FwtError(f"an int seed has 32 bits, found {key}; make a jax.random.key of it")
        config: Any = jax.config
        plain = type(key) is int and not getattr(config, "jax_random_seed_offset", 0)
        if config.jax_default_prng_impl != _THREEFRY or not plain:
            return jax.random.key(key)
        # The same, but without two programs to compile.
        high = _MOST if key < 0 and config.jax_enable_x64 else 0
        data: Any = np.array([high, int(key) & _MOST], np.uint32)
        return jax.random.wrap_key_data(data, impl=_THREEFRY)
    typed = hasattr(key, "dtype") and _is_typed(key)
    raw = hasattr(key, "dtype") and key.dtype == np.uint32 and key.ndim == 1
    if raw or (typed and key.ndim == 0):
        return key
    raise FwtError(f"key must be one JAX key or an int seed, found {key!r:.80}")


def _folded(key: Any, words: Any) -> Any:
    """The key with words folded in one after the other, as ``jax.random.fold_in`` does it. Of rows
    of words, a key for each column."""
    rows: Any = np.asarray(words, np.uint32)
    typed = _is_typed(key)
    if not _is_threefry(key) or (not typed and key.shape != (2,)):

        def fold(key: Array, word: Array) -> tuple[Array, None]:
            return jax.random.fold_in(key, word), None

        # A loop, so that one kernel folds all words.
        scan = functools.partial(jax.lax.scan, fold, key)
        return (jax.vmap(scan, 1) if rows.ndim > 1 else scan)(rows)[0]
    data = jax.random.key_data(key) if typed else key
    there: Any = jnp if isinstance(data, jax.core.Tracer) else np  # the latter compiles nothing
    first, second = there.asarray(data)
    for row in rows:
        first, second = _threefry(first, second, np.uint32(0), row)
    found = there.stack([first, second], -1)
    return jax.random.wrap_key_data(found, impl=_THREEFRY) if typed else jnp.asarray(found)


def _words(text: str) -> tuple[int, int]:
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:8], "big")


# -- threefry, written out ----------------------------------------------------------------------

_TURNS = ((13, 15, 26, 6), (17, 29, 16, 24))


def _threefry(first: Any, second: Any, x: Any, y: Any) -> tuple[Any, Any]:
    """Two random words of the two of a key and the two of a counter, of JAX or of NumPy."""
    keys = first, second, first ^ second ^ np.uint32(0x1BD11BDA)
    with np.errstate(over="ignore"):
        x, y = x + first, y + second
        for number in range(5):
            for turn in _TURNS[number % 2]:
                x = x + y
                y = x ^ ((y << np.uint32(turn)) | (y >> np.uint32(32 - turn)))
            x = x + keys[(number + 1) % 3]
            y = y + keys[(number + 2) % 3] + np.uint32(number + 1)
    return x, y


def _bits(key: Any, width: int, shape: tuple[int, ...]) -> Any:
    """The random bits of JAX's threefry, each of its flat index."""
    index = jnp.arange(math.prod(shape), dtype=np.uint32).reshape(shape)
    x, y = _threefry(key[0], key[1], np.uint32(0), index)
    if width == 64:
        return (x.astype(np.uint64) << np.uint64(32)) | y.astype(np.uint64)
    return (x ^ y).astype(f"uint{width}")


@functools.cache
def _quick() -> Any:
    from jax.extend import random  # which takes longer than all else here

    own = random.threefry_prng_impl
    return random.define_prng_impl(
        key_shape=own.key_shape, seed=own.seed, split=own.split, random_bits=_bits,
        fold_in=own.fold_in, name="fwt_threefry", tag="fwt",
    )  # fmt: skip


def quick(key: Any, size: int) -> Any:
    """The same key, from which so many numbers, and the same, are drawn by a program that takes a
    sixth of the time to compile: JAX's own threefry is a loop on a CPU."""
    if not hasattr(key, "dtype") or not by_index(key) or size > _MOST:
        return key
    data = jax.random.key_data(key) if _is_typed(key) else key
    return jax.random.wrap_key_data(data, impl=_quick())
