"""What one program does to each of many leaves, compiled once for each shape.

XLA compiles a kernel once, however many leaves it serves, as long as no constant tells one use of
it from another. A number of a leaf's own that is cut out of a vector at a constant index is such a
constant; at an index that only the running program knows it is none.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from fwt._types import Array

FEW = 4  # leaves for which constants cost less


def indices(places: Sequence[int], seed: Array) -> Sequence[Any]:
    """Numbers, each as a buffer of its own.

    They leave a loop of one round or none, as ``seed``, a number of the running program, wants it;
    each is what it was, but XLA can't know.
    """
    if len(places) <= FEW:
        return [np.uint32(i) for i in places]

    def body(state: Any) -> Any:
        i, found = state
        return i + 1, [x + (i >> 20) for x in found]

    trips = jnp.minimum(jnp.asarray(seed).astype(jnp.uint32), 1)
    start = (jnp.uint32(0), [jnp.uint32(i) for i in places])
    return lax.while_loop(lambda s: s[0] < trips, body, start)[1]


def pick(values: Array, index: Any, axis: int = 0) -> Array:
    """``values[index]`` along an axis."""
    return lax.dynamic_index_in_dim(values, index, axis, keepdims=False)


def side_by_side(arrays: Sequence[Array]) -> Array:
    """Arrays of one shape along a new first axis."""
    return lax.concatenate([lax.expand_dims(x, (0,)) for x in arrays], 0)
