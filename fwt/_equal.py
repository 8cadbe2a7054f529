"""Whether arrays are equal, computed where they are."""

from typing import Any

import jax
from jax import lax

from fwt import _mesh


@_mesh.on_auto_axes
def all_equal(leaf: Any) -> bool:
    """Whether all entries of an array are equal."""
    first, last = leaf[(0,) * leaf.ndim], leaf[(-1,) * leaf.ndim]
    return bool(first == last) and bool((leaf == first).all())  # most differ there already


@jax.jit
def same_bits(one: Any, other: Any) -> Any:
    """Whether two arrays of one shape and dtype are equal bit for bit, traced or not."""
    if one.dtype.kind in "bc":
        return (one == other).all()
    dtype = f"uint{8 * one.dtype.itemsize}"
    return (lax.bitcast_convert_type(one, dtype) == lax.bitcast_convert_type(other, dtype)).all()
