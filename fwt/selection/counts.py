"""Counts that may pass 2**32, for JAX has no 64-bit integers unless told to."""

import math
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fwt._types import Array


class Wide(NamedTuple):
    """``high * 2**16 + low``, with ``low < 2**16``."""

    high: Any
    low: Any


def wide(n: Any) -> Wide:
    """A Python int, or uint32s, as a wide count."""
    if isinstance(n, Wide):
        return n
    if isinstance(n, int):
        return Wide(np.uint32(n >> 16), np.uint32(n & 0xFFFF))
    return Wide(n >> 16, n & 0xFFFF)


def total(counts: Array) -> Wide:
    """The sum of uint32 counts over the last axis, of fewer than 2**16 of them."""
    low = jnp.sum(counts & 0xFFFF, -1, dtype=jnp.uint32)
    high = jnp.sum(counts >> 16, -1, dtype=jnp.uint32)
    return Wide(high + (low >> 16), low & 0xFFFF)


def less(a: Wide, b: Wide) -> Array:
    return (a.high < b.high) | ((a.high == b.high) & (a.low < b.low))


def difference(a: Wide, b: Wide) -> Array:
    """The difference as float32, exact where it is small."""
    a, b = (Wide(*map(jnp.asarray, x)) for x in (a, b))
    high = lax.bitcast_convert_type(a.high - b.high, jnp.int32)
    low = lax.bitcast_convert_type(a.low - b.low, jnp.int32)
    return high.astype(jnp.float32) * 65536.0 + low.astype(jnp.float32)


def minus(a: Wide, b: Wide) -> Wide:
    """The difference, for a >= b."""
    a, b = (Wide(*map(jnp.asarray, x)) for x in (a, b))
    borrow = (a.low < b.low).astype(jnp.uint32)
    return Wide(a.high - b.high - borrow, (a.low - b.low) & 0xFFFF)


def plus(a: Wide, b: Wide) -> Wide:
    low = a.low + b.low
    return Wide(a.high + b.high + (low >> 16), low & 0xFFFF)


def _digits(n: Wide) -> Array:
    """A count as 16-bit digits, the lowest first."""
    return jnp.stack([jnp.asarray(d, jnp.uint32) for d in (n.low, n.high & 0xFFFF, n.high >> 16)])


def _product(a: Array, b: Array) -> Array:
    """The product of two numbers in 16-bit digits."""
    out = jnp.zeros(a.shape[0] + b.shape[0], jnp.uint32)
    for i in range(a.shape[0]):
        part = a[i] * b
        out = out.at[i : i + b.shape[0]].add(part & 0xFFFF)
        out = out.at[i + 1 : i + 1 + b.shape[0]].add(part >> 16)
    return _carried(out)


def _carried(digits: Array) -> Array:
    carry, out = jnp.uint32(0), []
    for i in range(digits.shape[0]):
        carry = carry + digits[i]
        out.append(carry & 0xFFFF)
        carry = carry >> 16
    return jnp.stack(out)


def _shifted(digits: Array, amount: Array) -> Array:
    """``number >> amount``, rounded half to even, for amount >= 0."""
    size = digits.shape[0]
    places = jnp.arange(size)

    def down(by: Array) -> Array:
        first = places + by // 16
        low = jnp.where(first < size, digits[jnp.minimum(first, size - 1)], 0)
        high = jnp.where(first + 1 < size, digits[jnp.minimum(first + 1, size - 1)], 0)
        return (low | high << 16) >> (by % 16).astype(jnp.uint32) & 0xFFFF

    def odd(by: Array) -> Array:
        return down(by)[0] & 1

    whole = down(amount)
    half = jnp.where(amount > 0, odd(jnp.maximum(amount - 1, 0)), 0)
    # Whether anything is left below the half bit: bit by bit of each digit.
    under = jnp.clip(amount - 1 - 16 * places, 0, 16).astype(jnp.uint32)
    rest = jnp.any(digits & ((jnp.uint32(1) << under) - 1) != 0)
    return _carried(whole.at[0].add(half & (rest | (whole[0] & 1 == 1)).astype(jnp.uint32)))


def count(sparsity: Any, n: Any) -> Any:
    """round-half-even(sparsity * n).

    A Python number times an int is counted in Python. An array counts as its float32 value,
    clipped to [0, 1] (NaN is 0), and its product is exact. Where ``n`` is a traced :class:`Wide`,
    a Python number counts as it does in Python, where the product is rounded to the 53 bits of a
    float.

    Returns:
        An int, or a :class:`Wide` count.
    """
    traced = isinstance(sparsity, jax.core.Tracer)
    if isinstance(n, int) and not traced:
        if isinstance(sparsity, jax.Array):
            value = float(jnp.float32(sparsity))
            return round(Fraction(min(value, 1.0) if value > 0 else 0) * n)
        return round(float(sparsity) * n)
    n = wide(n)
    if isinstance(sparsity, int | float):
        fraction, exponent = math.frexp(float(sparsity))
        whole = int(fraction * 2**53)
        parts = jnp.asarray([whole >> 16 * i & 0xFFFF for i in range(4)], jnp.uint32)
        product = _product(parts, _digits(n))
        places = jnp.arange(16)
        used = jnp.max(jnp.where(product[:, None] >> places & 1 == 1, places + 1, 0), 1)
        length = jnp.max(jnp.where(used > 0, used + 16 * jnp.arange(product.shape[0]), 0))
        shift = jnp.asarray(53 - exponent)
        cut = jnp.clip(length - 53, 0, shift)
        return _number(_shifted(_shifted(product, cut), shift - cut))
    s = jnp.asarray(sparsity, jnp.float32)
    s = jnp.where(s > 0, jnp.minimum(s, 1.0), 0.0)  # NaN counts as 0
    bits = lax.bitcast_convert_type(s, jnp.uint32)
    power = jnp.maximum((bits >> 23).astype(jnp.int32), 1)
    mantissa = (bits & 0x7FFFFF) | jnp.where(bits >> 23 == 0, 0, 0x800000).astype(jnp.uint32)
    product = _product(jnp.stack([mantissa & 0xFFFF, mantissa >> 16]), _digits(n))
    return _number(_shifted(product, 150 - power))  # s = mantissa / 2**(150 - power)


def _number(digits: Array) -> Wide:
    return Wide(digits[1] | digits[2] << 16, digits[0])
