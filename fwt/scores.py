"""Scores: what a weight is worth; higher = keep.

A score is ``(params, *, grads=None, key=None, ...) -> Scores``, the same tree of real numbers; it
names the context that it needs.
"""

from typing import Any

import jax.numpy as jnp

from fwt import _tree
from fwt._types import Params, Scores

__all__ = ["magnitude"]


def magnitude(params: Params = None) -> Scores:
    """The absolute value of each weight (Han et al., "Learning both Weights and Connections",
    2015).

    Args:
        params: any pytree of arrays. Without it, the score itself: a noun may be written bare
            or called.

    Returns:
        The same tree of absolute values.

    Example:
        >>> import numpy as np
        >>> magnitude({"dense": {"kernel": np.array([[-2.0, 1.0]], np.float32)}})
        {'dense': {'kernel': Array([[2., 1.]], dtype=float32)}}
    """
    if params is None:
        return magnitude
    tree = _tree.Tree(params)
    new: dict[str, Any] = {p: jnp.abs(_tree.computable(p, x)) for p, x in tree.leaves.items()}
    return tree.replace(new)
