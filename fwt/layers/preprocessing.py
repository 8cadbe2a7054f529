"""Layers that prepare the input: the same names as in Keras."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from fwt._types import Array
from fwt.layers.base import Layer


class Rescaling(Layer):
    """x ``scale`` + ``offset``; lists hold one for each entry of the last axis.

    Whole numbers, such as the pixels of an image, give float32.

    Args:
        scale: the factor: one number, or one for each channel.
        offset: what is added then: one number, 0.0 by default, or one for each channel.

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.array([[0, 3, 8]], np.uint8)
        >>> layers.Rescaling(scale=0.5, offset=-1.0).apply({}, x).tolist()
        [[-1.0, 0.5, 3.0]]
    """

    scale: float | tuple[float, ...]
    offset: float | tuple[float, ...] = 0.0

    def __call__(self, x: Array) -> Array:
        x = x if jnp.issubdtype(x.dtype, jnp.floating) else jnp.asarray(x, jnp.float32)
        return x * jnp.asarray(self.scale, x.dtype) + jnp.asarray(self.offset, x.dtype)


class Masking(Layer):
    """Zeros where every entry of the last axis equals ``mask_value``.

    All other entries stay as they are.

    Args:
        mask_value: the number that marks what is left out, 0.0 by default.

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.array([[[1, 2], [9, 9], [9, 3]]], np.float32)
        >>> layers.Masking(mask_value=9.0).apply({}, x).tolist()
        [[[1.0, 2.0], [0.0, 0.0], [9.0, 3.0]]]
    """

    mask_value: float = 0.0

    def __call__(self, x: Array) -> Array:
        kept = jnp.any(x != jnp.asarray(self.mask_value, x.dtype), -1, keepdims=True)
        return x * kept.astype(x.dtype)


class Normalization(Layer):
    """(x - mean) / max(sqrt(variance), 1e-7), with statistics of the data for each of ``axes``.

    The statistics are "mean" and "variance" in "batch_stats", and no training step changes them.
    They start at 0 and 1.

    Args:
        axes: the axes along which each entry has statistics of its own: (-1,), the channels, by
            default. With () there is one mean and one variance for all.
        invert: whether to undo it, mean + x max(sqrt(variance), 1e-7); False by default.

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> stats = {"mean": np.float32([2, -1]), "variance": np.float32([4, 0.25])}
        >>> x = np.array([[6.0, -0.5]], np.float32)
        >>> layers.Normalization().apply({"batch_stats": stats}, x).tolist()
        [[2.0, 1.0]]
    """

    axes: tuple[int, ...] = (-1,)
    invert: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        where = sorted(a % x.ndim for a in self.axes)
        shape = tuple(x.shape[a] for a in where)
        full = [x.shape[a] if a in where else 1 for a in range(x.ndim)]
        held = {"mean": jnp.zeros, "variance": jnp.ones}
        mean, variance = (
            self._cast(self.variable("batch_stats", name, new, shape).value.reshape(full))
            for name, new in held.items()
        )
        width = jnp.maximum(jnp.sqrt(variance), 1e-7)
        return mean + x * width if self.invert else (x - mean) / width


class Discretization(Layer):
    """The number of the bin of each value, int32: how many ``bin_boundaries`` are at most it.

    Args:
        bin_boundaries: the boundaries between the bins, in rising order. There
            is one more bin than boundaries; a value at a boundary is in the bin above it.

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.array([[-1.0, 0.0, 0.5, 2.0]], np.float32)
        >>> layers.Discretization(bin_boundaries=(0.0, 1.5)).apply({}, x).tolist()
        [[0, 1, 1, 2]]
    """

    bin_boundaries: tuple[float, ...]

    def __call__(self, x: Array) -> Array:
        bounds = jnp.asarray(self.bin_boundaries, jnp.float32)
        return jnp.searchsorted(bounds, x, side="right").astype(jnp.int32)


class CategoryEncoding(Layer):
    """Whole numbers (n, k) as (n, ``num_tokens``): which are there, or how many of each.

    Args:
        num_tokens: how many categories there are; the numbers are from 0 to ``num_tokens`` - 1.
        output_mode: "multi_hot", the default, gives 1 for each category that is there and 0 for the
            others; "count" gives how often it is there; "one_hot" is "multi_hot" for k = 1 only.

    Raises:
        ValueError: if ``output_mode`` is "one_hot" and k is not 1.

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.array([[2, 0, 2]])
        >>> layers.CategoryEncoding(num_tokens=4, output_mode="count").apply({}, x).tolist()
        [[1.0, 0.0, 2.0, 0.0]]
    """

    num_tokens: int
    output_mode: str = "multi_hot"

    def __call__(self, x: Array) -> Array:
        if self.output_mode == "one_hot" and x.shape[-1] != 1:
            raise ValueError("one_hot takes one number for each example")
        hot = jax.nn.one_hot(jnp.asarray(x, jnp.int32), self.num_tokens)
        return hot.sum(-2) if self.output_mode == "count" else hot.max(-2)
