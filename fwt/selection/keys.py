"""Keys: unsigned integers in the order of the weights, so that every comparison is exact.

XLA flushes denormals when it compares floats, and a NaN would be below and above everything.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fwt import _tree
from fwt._types import Array, FwtError


class Source(NamedTuple):
    """The keys of one leaf: ``key(*arrays)``, computed in every pass and never stored."""

    key: Callable[..., Array]
    arrays: tuple[Any, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.arrays[0].shape)

    def keys(self) -> Array:
        return self.key(*self.arrays)

    def on_host(self) -> "Source | None":
        """The same in NumPy, for a leaf that is sooner done than a program is compiled."""
        known = all(is_near(x) for x in self.arrays) and math.prod(self.shape) <= _NEAR
        if not known or not getattr(self.key, "exact", False):
            return None
        return Source(self.key, tuple(map(np.atleast_1d, self.arrays)))


_NEAR = 1 << 20


def is_near(x: Any) -> bool:
    """Whether NumPy can read it where it is."""
    if isinstance(x, jax.core.Tracer):
        return False
    return isinstance(x, np.ndarray) or [d.platform for d in x.devices()] == ["cpu"]


def _space(x: Any) -> Any:
    """NumPy for its own arrays, which need no compiler."""
    return np if isinstance(x, np.ndarray) else jnp


def _bits(x: Array) -> tuple[Array, int]:
    width = x.dtype.itemsize * 8
    unsigned = np.dtype(f"uint{width}")
    if isinstance(x, np.ndarray):
        return x.view(unsigned), width
    return lax.bitcast_convert_type(x, unsigned), width


def widen(x: Array, dtype: Any) -> Array:
    """``x`` as a wider float, every value kept (a plain convert flushes bfloat16's denormals)."""
    x = x if isinstance(x, np.ndarray) else jnp.asarray(x)
    if x.dtype == dtype:
        return x
    if isinstance(x, np.ndarray):
        return x.astype(dtype)
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
    """The bits of ``|x|`` with every NaN just above infinity, the sign bit, and whether x < 0.

    NaN is told by integers too: XLA's CPU backend turns ``isnan(x)`` beside a comparison of the
    bits with zero into a float comparison, which flushes denormals (seen).
    """
    bits, width = _bits(x)
    top = bits.dtype.type(1 << (width - 1))
    info = jnp.finfo(x.dtype)
    nan = bits.dtype.type((((1 << info.nexp) - 1) << info.nmant) + 1)
    magnitude = _space(x).minimum(bits & ~top, nan)
    return magnitude, top, (bits & top != 0) & (magnitude != nan)


def _exact(x: Array) -> Array:
    """Without a gradient; bools and small integers as int32, float8 as float32."""
    x = x if isinstance(x, np.ndarray) else lax.stop_gradient(jnp.asarray(x))
    if x.dtype.itemsize < (2 if jnp.issubdtype(x.dtype, jnp.floating) else 4):
        x = x.astype(jnp.float32 if jnp.issubdtype(x.dtype, jnp.floating) else jnp.int32)
    return x


def magnitude_key(x: Array) -> Array:
    """Unsigned integers in the order of ``|x|``; NaN of either sign is the largest.

    ``x`` has any real dtype and shape; the key has the shape and at least as many bits.
    """
    x = _exact(x)
    if jnp.issubdtype(x.dtype, jnp.unsignedinteger):
        return x
    if jnp.issubdtype(x.dtype, jnp.signedinteger):
        bits, _ = _bits(x)
        return _space(x).where(x < 0, ~bits + bits.dtype.type(1), bits)
    return _wide(_float_bits(x)[0])


def signed_key(x: Array) -> Array:
    """Unsigned integers in the order of ``x``; NaN of either sign is the largest, -0 equals +0."""
    x = _exact(x)
    if jnp.issubdtype(x.dtype, jnp.unsignedinteger):
        return x
    if jnp.issubdtype(x.dtype, jnp.signedinteger):
        bits, width = _bits(x)
        return bits ^ bits.dtype.type(1 << (width - 1))
    magnitude, top, negative = _float_bits(x)
    return _wide(_space(x).where(negative, top - magnitude, top + magnitude))


def _wide(key: Array) -> Array:
    return key.astype(jnp.uint32) if key.dtype.itemsize < 4 else key


@functools.cache
def key_function(
    signed: bool, dtype: Any = None, rule: str = "", stepped: bool = False
) -> Callable[..., Array]:
    """The key of a leaf on the scale of ``dtype`` (None: its own).

    Args:
        signed: whether it is the order of the numbers or of their magnitudes.
        dtype: a float to widen to, so that leaves compare.
        rule: "first" takes a mask beside the leaf and puts what it drops below all the rest,
            "only" puts it above.
        stepped: whether an update stands behind the leaf and is added to it first.

    Returns:
        The key, of arrays of JAX or of NumPy; its ``exact`` says whether both give the same.
    """
    plain = signed_key if signed else magnitude_key

    def key(x: Array, *more: Any) -> Array:
        if stepped:
            x, more = (x + more[0]).astype(x.dtype), more[1:]
        found = plain(x if dtype is None else widen(x, dtype))
        xp, one = _space(x), found.dtype.type(1)
        top = found.dtype.type(np.iinfo(found.dtype).max)
        if rule == "only":
            return xp.where(more[0], found, top - one)
        if rule == "first":
            if not jnp.issubdtype(x.dtype, jnp.floating):  # floats have no key at the top
                found = xp.minimum(found, top - one)
            return xp.where(more[0], found + one, found.dtype.type(0))
        return found

    key.__dict__["exact"] = not stepped
    return key


def sources(
    leaves: Sequence[Any],
    signed: bool,
    rule: str = "",
    masks: Sequence[Any] = (),
    steps: Sequence[Any] = (),
) -> list[Source]:
    """The keys of all leaves on one scale, whatever their dtypes; see :func:`key_function`."""
    dtypes = {x.dtype for x in leaves}
    common = None
    if len(dtypes) > 1:
        if not all(jnp.issubdtype(d, jnp.floating) for d in dtypes):
            raise FwtError(
                f"one selection over leaves of {', '.join(sorted(map(str, dtypes)))}: integers "
                "and floats have no common exact scale; narrow where= to one kind, or use "
                "scope='layer'"
            )
        common = jnp.result_type(*map(_tree.wide_dtype, dtypes))
    key = key_function(signed, common, rule, bool(steps))
    columns = [c for c in (leaves, steps, masks if rule else ()) if len(c)]
    return [Source(key, arrays) for arrays in zip(*columns, strict=True)]
