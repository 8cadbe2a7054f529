"""Random keys: one for each purpose, and for each leaf of a tree."""

import hashlib
from collections.abc import Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from fwt._types import Array, FwtError

Purpose = Literal["initialize", "lsuv", "prune", "random", "regrow", "reset", "sparsify"]
"""What a key is used for: two purposes draw independent numbers from one seed."""


def as_key(key: Any, purpose: Purpose) -> Any:
    """A key for one purpose, from a JAX key or an int seed."""
    return _folded(one_key(key), f"purpose {purpose}")


def leaf_keys(key: Any, purpose: Purpose, paths: Iterable[str]) -> Array:
    """A key for each path, side by side, which depends on that path alone and on no other leaf."""
    return words_keys(key, purpose, words(paths))


def words_keys(key: Any, purpose: Purpose, words: Any) -> Array:
    """The same of what :func:`words` gives."""
    mine = np.asarray(_words(f"purpose {purpose}"), np.uint32)
    every = jnp.concatenate([jnp.broadcast_to(mine, jnp.shape(words)), words], 1)
    key = one_key(key)

    def fold(key: Array, word: Array) -> tuple[Array, None]:
        return jax.random.fold_in(key, word), None

    # A loop, so that one kernel folds all words.
    return jax.vmap(lambda row: jax.lax.scan(fold, key, row)[0])(every)


def words(paths: Iterable[str]) -> Any:
    """64 bits of each path as two numbers."""
    return np.asarray([*map(_words, paths)], np.uint32).reshape(-1, 2)


def by_index(key: Any) -> bool:
    """Whether each number that a key draws depends on its flat index alone, and not on how many
    are drawn."""
    config: Any = jax.config
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    kind = jax.random.key_impl(key) if typed else config.jax_default_prng_impl
    return kind == "threefry2x32" and bool(config.jax_threefry_partitionable)


def one_key(key: Any) -> Any:
    """A JAX key, or one made of an int seed."""
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        if not -(1 << 31) <= key < 1 << 32:
            raise FwtError(f"an int seed has 32 bits, found {key}; make a jax.random.key of it")
        return jax.random.key(key)
    typed = hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    raw = hasattr(key, "dtype") and key.dtype == np.uint32 and key.ndim == 1
    if raw or (typed and key.ndim == 0):
        return key
    raise FwtError(f"key must be one JAX key or an int seed, found {key!r:.80}")


def _folded(key: Array, text: str) -> Array:
    """The key with the first 64 bits of the text's SHA-256 folded in."""
    for word in _words(text):
        key = jax.random.fold_in(key, word)
    return key


def _words(text: str) -> tuple[int, int]:
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:8], "big")
