"""The exact k-th smallest over many leaves, without sorting and without joining them.

Floats become unsigned integers that have their order, so that every comparison is exact: XLA
flushes denormals when it compares floats, and NaN would be below and above everything.
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from fwt._types import Array, FwtError


def _bits(x: Array) -> tuple[Array, int]:
    width = x.dtype.itemsize * 8
    unsigned = jnp.dtype(f"uint{width}")
    return lax.bitcast_convert_type(x, unsigned), width


def widen(x: Array, dtype: Any) -> Array:
    """``x`` as a wider float, every value kept (a plain convert flushes bfloat16's denormals)."""
    x = jnp.asarray(x)
    if x.dtype == dtype:
        return x
    if x.dtype == jnp.bfloat16:
        bits = lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32) << 16
        x = lax.bitcast_convert_type(bits, jnp.float32)
    if x.dtype == jnp.float32 and dtype == jnp.float64:
        # A denormal is scaled into the normal range by way of its integer mantissa.
        bits, _ = _bits(x)
        mantissa = (bits & 0x7FFFFF).astype(jnp.float64) * 2.0**-149
        small = jnp.where(bits >> 31 == 1, -mantissa, mantissa)
        return jnp.where((bits >> 23) & 0xFF == 0, small, x.astype(jnp.float64))
    return x.astype(dtype)


def _float_bits(x: Array) -> tuple[Array, Any, Array]:
    """The bits of ``|x|`` with every NaN made the largest, the sign bit, and whether x < 0.

    NaN is told by integers too: XLA's CPU backend turns ``isnan(x)`` beside a comparison of the
    bits with zero into a float comparison, which flushes denormals (seen).
    """
    if x.dtype.itemsize == 1:  # float8 in its many forms: exact in float32
        x = x.astype(jnp.float32)
    bits, width = _bits(x)
    top = bits.dtype.type(1 << (width - 1))
    info = jnp.finfo(x.dtype)
    infinity = bits.dtype.type(((1 << info.nexp) - 1) << info.nmant)
    magnitude = bits & ~top
    nan = magnitude > infinity
    return jnp.where(nan, ~top, magnitude), top, (bits & top != 0) & ~nan


def magnitude_key(x: Array) -> Array:
    """Unsigned integers in the order of ``|x|``; NaN of either sign is the largest.

    ``x`` has any real dtype and shape; the key has the shape and at least as many bits.
    """
    x = lax.stop_gradient(jnp.asarray(x))
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint8)
    if jnp.issubdtype(x.dtype, jnp.unsignedinteger):
        return x
    if jnp.issubdtype(x.dtype, jnp.signedinteger):
        bits, _ = _bits(x)
        return jnp.where(x < 0, ~bits + bits.dtype.type(1), bits)
    return _float_bits(x)[0]


def signed_key(x: Array) -> Array:
    """Unsigned integers in the order of ``x``; NaN of either sign is the largest, -0 equals +0."""
    x = lax.stop_gradient(jnp.asarray(x))
    if x.dtype == jnp.bool_ or jnp.issubdtype(x.dtype, jnp.unsignedinteger):
        return magnitude_key(x)
    if jnp.issubdtype(x.dtype, jnp.signedinteger):
        bits, width = _bits(x)
        return bits ^ bits.dtype.type(1 << (width - 1))
    magnitude, top, negative = _float_bits(x)
    return jnp.where(negative, top - magnitude, top + magnitude)


def count(sparsity: Any, n: int) -> Any:
    """round-half-even(sparsity * n): in Python for a Python number, else exact in integers.

    A traced sparsity counts as its float32 value, clipped to [0, 1]; its product with ``n`` is
    formed in two uint32 limbs, so that no rounding of the product moves a weight.
    """
    if isinstance(sparsity, int | float | np.floating | np.integer):
        return round(float(sparsity) * n)
    s = jnp.clip(jnp.asarray(sparsity, jnp.float32), 0.0, 1.0)
    bits, _ = _bits(s)
    exponent = (bits >> 23).astype(jnp.int32)
    mantissa = jnp.where(exponent == 0, bits & 0x7FFFFF, (bits & 0x7FFFFF) | 0x800000)
    shift = jnp.minimum(150 - jnp.maximum(exponent, 1), 63).astype(jnp.uint32)  # s = mantissa/2^q
    # mantissa (24 bits) * n (32 bits) = high * 2^32 + low, in 16-bit pieces.
    m0, m1 = mantissa & 0xFFFF, mantissa >> 16
    n0, n1 = jnp.uint32(n & 0xFFFF), jnp.uint32(n >> 16)
    low_low, middle_a, middle_b, high_high = m0 * n0, m0 * n1, m1 * n0, m1 * n1
    carry = (low_low >> 16) + (middle_a & 0xFFFF) + (middle_b & 0xFFFF)
    low = (low_low & 0xFFFF) | (carry << 16)
    high = high_high + (middle_a >> 16) + (middle_b >> 16) + (carry >> 16)

    def shifted(amount: Array) -> Array:
        """(high, low) >> amount, of which only the low limb can be non-zero for amount >= 23."""
        below = (low >> jnp.minimum(amount, 31)) | (
            high << jnp.minimum(jnp.uint32(32) - jnp.minimum(amount, 31), 31)
        )
        above = high >> jnp.minimum(amount - 32, 31)
        return jnp.where(amount < 32, below, above)

    whole = shifted(shift)
    half = shifted(shift - 1) & 1
    # Is anything left below the half bit?
    rest_bits = shift - 1
    low_mask = jnp.where(
        rest_bits >= 32, jnp.uint32(0xFFFFFFFF), (jnp.uint32(1) << (rest_bits & 31)) - 1
    )
    high_mask = jnp.where(
        rest_bits > 32, (jnp.uint32(1) << ((rest_bits - 32) & 31)) - 1, jnp.uint32(0)
    )
    rest = ((low & low_mask) | (high & high_mask)) != 0
    return whole + (half & (rest.astype(jnp.uint32) | (whole & 1)))


def _total(hits: list[Array]) -> Array:
    parts = [jnp.sum(h, dtype=jnp.uint32) for h in hits]
    return sum(parts[1:], parts[0])


def _index(shape: tuple[int, ...]) -> Array:
    """The flat index of every element, without a reshape that would gather a sharded leaf."""
    index = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(len(shape))):
        index = index + lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
        stride *= shape[axis]
    return index


def keep_largest(keys: list[Array], k: Any) -> list[Array]:
    """Masks that drop exactly the ``k`` smallest keys of all leaves together.

    Among equal keys the first in order of leaf and flat index are kept. Plain bisection: as many
    counting passes as a key has bits, and one more for each bit of an index where ties are split.

    Args:
        keys: unsigned integers of one dtype; leaves of any shapes, empty ones too.
        k: how many to drop, 0 to n, may be traced.

    Returns:
        One bool array for each leaf, True = keep.
    """
    n = sum(math.prod(x.shape) for x in keys)
    if n >= 1 << 32:
        raise FwtError(f"{n} weights at once: the counts hold {(1 << 32) - 1} at most")
    if n == 0:
        return [jnp.ones(x.shape, bool) for x in keys]
    dtype = keys[0].dtype
    k = jnp.asarray(k).astype(jnp.uint32)

    def bit(i: Any, found: Array) -> Array:
        place = jnp.asarray(dtype.itemsize * 8 - 1 - i)  # i is a plain int without jit
        trial = found | (dtype.type(1) << place.astype(dtype))
        return jnp.where(_total([x < trial for x in keys]) < k, trial, found)

    # The largest trial that has fewer than k keys below it is the k-th smallest key.
    kth = lax.fori_loop(0, dtype.itemsize * 8, bit, jnp.zeros((), dtype))
    ties = [x == kth for x in keys]
    tied = jnp.stack([jnp.sum(t, dtype=jnp.uint32) for t in ties])
    kept = _total([x <= kth for x in keys]) - k  # of the ties, so many stay: the first ones
    before = jnp.cumsum(tied) - tied
    stay = jnp.minimum(jnp.where(kept > before, kept - before, 0), tied).astype(jnp.uint32)
    indices = [_index(x.shape) for x in keys]
    top = max(max(math.prod(x.shape) for x in keys) - 1, 1).bit_length()

    def cut_bit(i: Any, found: Array) -> Array:
        trial = found | (jnp.uint32(1) << jnp.asarray(top - 1 - i).astype(jnp.uint32))
        below = jnp.stack(
            [
                jnp.sum(t & (index < c), dtype=jnp.uint32)
                for t, index, c in zip(ties, indices, trial, strict=True)
            ]
        )
        return jnp.where(below < stay, trial, found)

    # Where all ties of a leaf stay or go there is nothing to search: a loop of no trips.
    search = jnp.any((stay != 0) & (stay != tied))
    last = lax.fori_loop(0, jnp.where(search, top, 0), cut_bit, jnp.zeros(len(keys), jnp.uint32))
    return [
        (x > kth) | (t & ((s == m) | ((s > 0) & (index <= c))))
        for x, t, index, s, m, c in zip(keys, ties, indices, stay, tied, last, strict=True)
    ]


def common_keys(leaves: list[Array], signed: bool) -> list[Array]:
    """Keys of all leaves on one scale, whatever their dtypes."""
    leaves = [jnp.asarray(x) for x in leaves]
    if len({x.dtype for x in leaves}) > 1:
        floating = [jnp.issubdtype(x.dtype, jnp.floating) for x in leaves]
        if not all(floating):
            names = sorted({str(x.dtype) for x in leaves})
            raise FwtError(
                f"one selection over leaves of {', '.join(names)}: integers and floats have no "
                "common exact scale; narrow where= to one kind, or use scope='layer'"
            )
        wide = jnp.result_type(*leaves, jnp.float32)
        leaves = [widen(x, wide) for x in leaves]
    return [(signed_key if signed else magnitude_key)(x) for x in leaves]
