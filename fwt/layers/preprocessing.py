"""Layers that prepare the input: the same names as in Keras."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from fwt._types import Array
from fwt.layers.base import Layer


class Rescaling(Layer):
    """x ``scale`` + ``offset``; lists hold one for each entry of the last axis.

    Whole numbers, such as the pixels of an image, give float32.
    """

    scale: float | tuple[float, ...]
    offset: float | tuple[float, ...] = 0.0

    def __call__(self, x: Array) -> Array:
        x = x if jnp.issubdtype(x.dtype, jnp.floating) else jnp.asarray(x, jnp.float32)
        return x * jnp.asarray(self.scale, x.dtype) + jnp.asarray(self.offset, x.dtype)


class Masking(Layer):
    """Zeros where every entry of the last axis equals ``mask_value``."""

    mask_value: float = 0.0

    def __call__(self, x: Array) -> Array:
        kept = jnp.any(x != jnp.asarray(self.mask_value, x.dtype), -1, keepdims=True)
        return x * kept.astype(x.dtype)


class Normalization(Layer):
    """(x - mean) / max(sqrt(variance), 1e-7), with statistics of the data for each of ``axes``.

    ``invert`` undoes it. The statistics are in "batch_stats", and no training step changes them.
    """

    axes: tuple[int, ...] = (-1,)
    invert: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        where = sorted(a % x.ndim for a in self.axes)
        shape = tuple(x.shape[a] for a in where)
        full = [x.shape[a] if a in where else 1 for a in range(x.ndim)]
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape).value.reshape(full)
        variance = self.variable("batch_stats", "variance", jnp.ones, shape).value.reshape(full)
        width = jnp.maximum(jnp.sqrt(variance), 1e-7)
        return mean + x * width if self.invert else (x - mean) / width


class Discretization(Layer):
    """The number of the bin of each value, int32: how many ``bin_boundaries`` are at most it."""

    bin_boundaries: tuple[float, ...]

    def __call__(self, x: Array) -> Array:
        bounds = jnp.asarray(self.bin_boundaries, jnp.float32)
        return jnp.searchsorted(bounds, x, side="right").astype(jnp.int32)


class CategoryEncoding(Layer):
    """Whole numbers (n, k) as (n, ``num_tokens``): which are there, or how many of each.

    ``output_mode`` is "multi_hot", "count", or "one_hot", which takes k = 1 only.
    """

    num_tokens: int
    output_mode: str = "multi_hot"

    def __call__(self, x: Array) -> Array:
        if self.output_mode == "one_hot" and x.shape[-1] != 1:
            raise ValueError("one_hot takes one number for each example")
        hot = jax.nn.one_hot(jnp.asarray(x, jnp.int32), self.num_tokens)
        return hot.sum(-2) if self.output_mode == "count" else hot.max(-2)
