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
    base, words = as_key(key, purpose), np.asarray([*map(_words, paths)], np.uint32)
    fold = jax.vmap(lambda w: jax.random.fold_in(jax.random.fold_in(base, w[0]), w[1]))
    return fold(words.reshape(-1, 2))


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
