"""Layers over windows and spatial axes: pools, pads, crops and resizing, without weights."""

import math
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import lax

from fwt._types import Array
from fwt.layers.base import Layer

__all__ = [
    "AdaptiveAvgPool",
    "AdaptiveMaxPool",
    "AvgPool",
    "CenterCrop",
    "ChannelShuffle",
    "CircularPad",
    "ConstantPad",
    "Crop",
    "GlobalAvgPool",
    "GlobalMaxPool",
    "LPPool",
    "MaxPool",
    "PixelShuffle",
    "PixelUnshuffle",
    "ReflectPad",
    "ReplicatePad",
    "Resize",
    "UpSample",
    "ZeroPad",
]

Pairs = tuple[tuple[int, int], ...]


def _padded(x: Array, padding: Pairs, mode: str, **more: Any) -> Array:
    """Padding on the spatial axes of (n, *spatial, c); a negative amount crops."""
    wide = ((0, 0), *padding, (0, 0))
    positive = [(max(lo, 0), max(hi, 0)) for lo, hi in wide]

    def cropped(x: Array) -> Array:
        cuts = zip(x.shape, wide, strict=True)
        return x[tuple(slice(max(-lo, 0), n - max(-hi, 0)) for n, (lo, hi) in cuts)]

    x = cropped(x) if mode == "wrap" else x  # as torch does
    if any(lo or hi for lo, hi in positive):
        x = jnp.pad(x, positive, mode=mode, **more)
    return x if mode == "wrap" else cropped(x)


class ZeroPad(Layer):
    """(n, *spatial, c) with ``padding[i] = (before, after)`` zeros on spatial axis i.

    A negative amount crops.
    """

    padding: Pairs

    def __call__(self, x: Array) -> Array:
        return _padded(x, self.padding, "constant")


class ConstantPad(Layer):
    """(n, *spatial, c) with ``padding[i] = (before, after)`` of ``value`` on spatial axis i.

    A negative amount crops.
    """

    padding: Pairs
    value: float

    def __call__(self, x: Array) -> Array:
        return _padded(x, self.padding, "constant", constant_values=self.value)


class ReflectPad(Layer):
    """(n, *spatial, c) with ``padding[i] = (before, after)`` mirrored, the edge not repeated."""

    padding: Pairs

    def __call__(self, x: Array) -> Array:
        return _padded(x, self.padding, "reflect")


class ReplicatePad(Layer):
    """(n, *spatial, c) with ``padding[i] = (before, after)`` copies of the edge."""

    padding: Pairs

    def __call__(self, x: Array) -> Array:
        return _padded(x, self.padding, "edge")


class CircularPad(Layer):
    """(n, *spatial, c) with ``padding[i] = (before, after)`` from the other end of axis i."""

    padding: Pairs

    def __call__(self, x: Array) -> Array:
        return _padded(x, self.padding, "wrap")


class Crop(Layer):
    """(n, *spatial, c) without ``cropping[i] = (before, after)`` on spatial axis i."""

    cropping: Pairs

    def __call__(self, x: Array) -> Array:
        return _padded(x, tuple((-lo, -hi) for lo, hi in self.cropping), "constant")


class CenterCrop(Layer):
    """The middle of (n, h, w, c), ``size = (height, width)``, which must fit in."""

    size: tuple[int, int]

    def __call__(self, x: Array) -> Array:
        sizes = x.shape[1:3]
        if any(n < wanted for n, wanted in zip(sizes, self.size, strict=True)):
            raise ValueError(f"an image of {sizes} is smaller than {self.size}")
        starts = [(n - wanted) // 2 for n, wanted in zip(sizes, self.size, strict=True)]
        (top, left), (height, width) = starts, self.size
        return x[:, top : top + height, left : left + width]


class MaxPool(Layer):
    """The largest of each window of (n, *spatial, c); the padding never wins.

    ``padding`` is "VALID", "SAME" or a pair (before, after) for each spatial axis.
    """

    window_shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None
    padding: str | Pairs = "VALID"
    dilation: tuple[int, ...] | None = None

    def __call__(self, x: Array) -> Array:
        strides = self.strides or self.window_shape
        if not self.dilation or all(d == 1 for d in self.dilation):
            return nn.max_pool(x, self.window_shape, strides, self.padding)
        window, steps, dilation = ((1, *v, 1) for v in (self.window_shape, strides, self.dilation))
        pads: Any = self.padding
        if isinstance(pads, str):
            spread = [(k - 1) * d + 1 for k, d in zip(window, dilation, strict=True)]
            pads = lax.padtype_to_pads(x.shape, spread, steps, pads)
        else:
            pads = ((0, 0), *pads, (0, 0))
        lowest = jnp.array(-jnp.inf, x.dtype)
        return lax.reduce_window(x, lowest, lax.max, window, steps, pads, window_dilation=dilation)


class AvgPool(Layer):
    """The mean of each window of (n, *spatial, c); the padding counts only if told so.

    With ``divisor`` the sum of each window is divided by that number.
    """

    window_shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None
    padding: str | Pairs = "VALID"
    count_include_pad: bool = False
    divisor: int | None = None

    def __call__(self, x: Array) -> Array:
        strides = self.strides or self.window_shape
        include = self.count_include_pad or self.divisor is not None
        y = nn.avg_pool(x, self.window_shape, strides, self.padding, include)
        return y if self.divisor is None else y * (math.prod(self.window_shape) / self.divisor)


class LPPool(Layer):
    """The power average of each window of (n, *spatial, c): (sum x^p)^(1/p), without padding.

    A sum below zero, which an odd p can have, gives NaN, as in torch.
    """

    p: float
    window_shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None

    def __call__(self, x: Array) -> Array:
        strides = self.strides or self.window_shape
        mean = nn.avg_pool(x**self.p, self.window_shape, strides)
        return (mean * math.prod(self.window_shape)) ** (1 / self.p)


def _adaptive(x: Array, sizes: tuple[int | None, ...], reduce: Any) -> Array:
    """Window i of o over n goes from floor(i n / o) to ceil((i + 1) n / o), as in torch."""
    for axis, wanted in enumerate(sizes, 1):
        n = x.shape[axis]
        if wanted is None or wanted == n:
            continue
        if n % wanted == 0:
            split = x.reshape(*x.shape[:axis], wanted, n // wanted, *x.shape[axis + 1 :])
            x = reduce(split, axis + 1)
            continue
        starts = [i * n // wanted for i in range(wanted)]
        ends = [-(-(i + 1) * n // wanted) for i in range(wanted)]
        parts = [
            reduce(lax.slice_in_dim(x, a, b, axis=axis), axis)
            for a, b in zip(starts, ends, strict=True)
        ]
        x = jnp.stack(parts, axis)
    return x


class AdaptiveAvgPool(Layer):
    """Means that make (n, *spatial, c) into (n, *output_size, c); None keeps an axis."""

    output_size: tuple[int | None, ...]

    def __call__(self, x: Array) -> Array:
        return _adaptive(x, self.output_size, jnp.mean)


class AdaptiveMaxPool(Layer):
    """Maxima that make (n, *spatial, c) into (n, *output_size, c); None keeps an axis."""

    output_size: tuple[int | None, ...]

    def __call__(self, x: Array) -> Array:
        return _adaptive(x, self.output_size, jnp.max)


class GlobalAvgPool(Layer):
    """The mean over the spatial axes: (n, *spatial, c) -> (n, c), or (n, 1, ..., c)."""

    keepdims: bool = False

    def __call__(self, x: Array) -> Array:
        return jnp.mean(x, axis=tuple(range(1, x.ndim - 1)), keepdims=self.keepdims)


class GlobalMaxPool(Layer):
    """The largest over the spatial axes: (n, *spatial, c) -> (n, c), or (n, 1, ..., c)."""

    keepdims: bool = False

    def __call__(self, x: Array) -> Array:
        return jnp.max(x, axis=tuple(range(1, x.ndim - 1)), keepdims=self.keepdims)


class UpSample(Layer):
    """Each pixel of (n, *spatial, c) repeated ``size[i]`` times along spatial axis i."""

    size: tuple[int, ...]

    def __call__(self, x: Array) -> Array:
        for axis, times in enumerate(self.size, 1):
            x = jnp.repeat(x, times, axis=axis)
        return x


class Resize(Layer):
    """(n, *spatial, c) resized to (n, *shape, c), or by ``scale``.

    Sample i of n lies at ``(i + 0.5) / n`` of the length, or, with ``align_corners``, at
    ``i / (n - 1)``. "linear" interpolates between the two nearest along each axis, without
    antialiasing. "nearest" takes the pixel at ``floor(i / scale)``; "nearest-exact" that under
    the sample's centre.
    """

    shape: tuple[int, ...] | None = None
    scale: tuple[float, ...] | None = None
    method: Literal["nearest", "nearest-exact", "linear"] = "nearest"
    align_corners: bool = False

    def __call__(self, x: Array) -> Array:
        sizes = x.shape[1:-1]
        if self.shape is not None:
            shape, ratios = self.shape, [n / m for n, m in zip(sizes, self.shape, strict=True)]
        else:
            scale = self.scale or (1.0,) * len(sizes)
            shape = tuple(math.floor(n * s) for n, s in zip(sizes, scale, strict=True))
            ratios = [1 / s for s in scale]
        for axis, (n, m, ratio) in enumerate(zip(sizes, shape, ratios, strict=True), 1):
            if n == m and ratio == 1:
                continue
            x = self._along(x, axis, n, m, ratio)
        return x

    def _along(self, x: Array, axis: int, n: int, m: int, ratio: float) -> Array:
        at = np.arange(m, dtype=np.float32)
        step = np.float32(ratio)
        if self.method == "nearest":
            index = np.minimum(np.floor(at * step).astype(int), n - 1)
            return jnp.take(x, index, axis=axis)
        if self.method == "nearest-exact":
            index = np.minimum(np.floor((at + np.float32(0.5)) * step).astype(int), n - 1)
            return jnp.take(x, index, axis=axis)
        if self.align_corners:
            at = at * np.float32((n - 1) / (m - 1) if m > 1 else 0)
        else:
            at = np.maximum((at + np.float32(0.5)) * step - np.float32(0.5), 0)
        low = np.minimum(np.floor(at).astype(int), n - 1)
        high = np.minimum(low + 1, n - 1)
        weight = (
            (at - low).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(x.ndim)])
        )
        below, above = jnp.take(x, low, axis=axis), jnp.take(x, high, axis=axis)
        return (below * (1 - weight) + above * weight).astype(x.dtype)


class PixelShuffle(Layer):
    """(n, h, w, c r²) -> (n, h r, w r, c); channel c r² + i r + j goes to row i, column j.

    The channels are ordered as in torch, so that ``space_to_depth`` of TensorFlow is another one.
    """

    factor: int

    def __call__(self, x: Array) -> Array:
        n, h, w, c = x.shape
        r = self.factor
        x = x.reshape(n, h, w, c // r**2, r, r).transpose(0, 1, 4, 2, 5, 3)
        return x.reshape(n, h * r, w * r, c // r**2)


class PixelUnshuffle(Layer):
    """The inverse of :class:`PixelShuffle`: (n, h r, w r, c) -> (n, h, w, c r²)."""

    factor: int

    def __call__(self, x: Array) -> Array:
        n, h, w, c = x.shape
        r = self.factor
        x = x.reshape(n, h // r, r, w // r, r, c).transpose(0, 1, 3, 5, 2, 4)
        return x.reshape(n, h // r, w // r, c * r**2)


class ChannelShuffle(Layer):
    """The channels of (n, *spatial, c) as (groups, c / groups), transposed."""

    groups: int

    def __call__(self, x: Array) -> Array:
        split = x.reshape(*x.shape[:-1], self.groups, x.shape[-1] // self.groups)
        return jnp.swapaxes(split, -1, -2).reshape(x.shape)
