"""Layers over windows and spatial axes: pools, pads, crops and resizing, without weights."""

import math
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import lax

from fwt._types import Array, FwtError
from fwt.layers.base import Layer, RealLayer

__all__ = [
    "AdaptiveAvgPool",
    "AdaptiveMaxPool",
    "AvgPool",
    "CenterCrop",
    "CircularPad",
    "ConstantPad",
    "Crop",
    "GlobalAvgPool",
    "GlobalMaxPool",
    "LPPool",
    "MaxPool",
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

    Args:
        padding: a pair (before, after) for each spatial axis, in entries.

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.array([[[1], [2], [4]]], np.float32)
        >>> layers.ZeroPad(padding=((1, 2),)).apply({}, x).tolist()
        [[[0.0], [1.0], [2.0], [4.0], [0.0], [0.0]]]
    """

    padding: Pairs

    def __call__(self, x: Array) -> Array:
        return _padded(x, self.padding, "constant")


class ConstantPad(Layer):
    """(n, *spatial, c) with ``padding[i] = (before, after)`` of ``value`` on spatial axis i.

    A negative amount crops.

    Args:
        padding: a pair (before, after) for each spatial axis, in entries.
        value: what the new entries hold.

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.array([[[1], [2], [4]]], np.float32)
        >>> layers.ConstantPad(padding=((2, -1),), value=-1.5).apply({}, x).tolist()
        [[[-1.5], [-1.5], [1.0], [2.0]]]
    """

    padding: Pairs
    value: float

    def __call__(self, x: Array) -> Array:
        return _padded(x, self.padding, "constant", constant_values=self.value)


class ReflectPad(Layer):
    """(n, *spatial, c) with ``padding[i] = (before, after)`` mirrored, the edge not repeated.

    Args:
        padding: a pair (before, after) for each spatial axis, in entries. A negative amount crops.

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.array([[[1], [2], [4]]], np.float32)
        >>> layers.ReflectPad(padding=((2, 1),)).apply({}, x).tolist()
        [[[4.0], [2.0], [1.0], [2.0], [4.0], [2.0]]]
    """

    padding: Pairs

    def __call__(self, x: Array) -> Array:
        return _padded(x, self.padding, "reflect")


class ReplicatePad(Layer):
    """(n, *spatial, c) with ``padding[i] = (before, after)`` copies of the edge.

    Args:
        padding: a pair (before, after) for each spatial axis, in entries. A negative amount crops.

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.array([[[1], [2], [4]]], np.float32)
        >>> layers.ReplicatePad(padding=((2, 1),)).apply({}, x).tolist()
        [[[1.0], [1.0], [1.0], [2.0], [4.0], [4.0]]]
    """

    padding: Pairs

    def __call__(self, x: Array) -> Array:
        return _padded(x, self.padding, "edge")


class CircularPad(Layer):
    """(n, *spatial, c) with ``padding[i] = (before, after)`` from the other end of axis i.

    Args:
        padding: a pair (before, after) for each spatial axis, in entries. A negative amount crops,
            before the rest is padded.

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.array([[[1], [2], [4]]], np.float32)
        >>> layers.CircularPad(padding=((1, 2),)).apply({}, x).tolist()
        [[[4.0], [1.0], [2.0], [4.0], [1.0], [2.0]]]
    """

    padding: Pairs

    def __call__(self, x: Array) -> Array:
        return _padded(x, self.padding, "wrap")


class Crop(Layer):
    """(n, *spatial, c) without ``cropping[i] = (before, after)`` on spatial axis i.

    Args:
        cropping: a pair (before, after) for each spatial axis: how many entries are left out.

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.array([[[1], [2], [4], [8]]], np.float32)
        >>> layers.Crop(cropping=((1, 2),)).apply({}, x).tolist()
        [[[2.0]]]
    """

    cropping: Pairs

    def __call__(self, x: Array) -> Array:
        return _padded(x, tuple((-lo, -hi) for lo, hi in self.cropping), "constant")


class CenterCrop(Layer):
    """The middle of (n, h, w, c), ``size = (height, width)``, which must fit in.

    Where the rest is odd, one more row or column is left out after than before.

    Args:
        size: the height and the width of the output, in pixels.

    Raises:
        ValueError: if the input is smaller than ``size``.

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.arange(12, dtype=np.float32).reshape(1, 3, 4, 1)
        >>> layers.CenterCrop(size=(1, 2)).apply({}, x).tolist()
        [[[[5.0], [6.0]]]]
    """

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

    Args:
        window_shape: the size of a window along each spatial axis.
        strides: how far a window moves along each spatial axis; None, the default, is its own size.
        padding: "VALID", the default, "SAME" or a pair (before, after) for each spatial axis.
        dilation: the distance between the entries of a window along each spatial axis; None, the
            default, is 1 for all.

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.array([[[1], [5], [2], [3], [4]]], np.float32)
        >>> layers.MaxPool(window_shape=(2,)).apply({}, x).tolist()
        [[[5.0], [3.0]]]
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


class AvgPool(RealLayer):
    """The mean of each window of (n, *spatial, c); the padding counts only if told so.

    With ``divisor`` the sum of each window is divided by that number.

    Args:
        window_shape: the size of a window along each spatial axis.
        strides: how far a window moves along each spatial axis; None, the default, is its own size.
        padding: "VALID", the default, "SAME" or a pair (before, after) for each spatial axis.
        count_include_pad: whether the mean counts the padding as zeros; False by default.
        divisor: what the sum of each window is divided by, or None, the default, for the number of
            its entries.

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.array([[[1], [5], [2], [3], [4]]], np.float32)
        >>> layers.AvgPool(window_shape=(2,)).apply({}, x).tolist()
        [[[3.0], [2.5]]]
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

    Args:
        p: the exponent; 1 gives sums, 2 gives Euclidean norms.
        window_shape: the size of a window along each spatial axis.
        strides: how far a window moves along each spatial axis; None, the default, is its own size.

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.array([[[3], [4], [6], [8]]], np.float32)
        >>> pooled = layers.LPPool(p=2.0, window_shape=(2,)).apply({}, x)
        >>> np.asarray(pooled).round(3).tolist()
        [[[5.0], [10.0]]]
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
    """Means that make (n, *spatial, c) into (n, *output_size, c); None keeps an axis.

    Windows overlap where the sizes do not divide: window i of o over n entries goes from
    floor(i n / o) to ceil((i + 1) n / o), as in torch.

    Args:
        output_size: the size of each spatial axis of the output; None keeps that of the input.

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.array([[[2], [4], [3], [7], [5]]], np.float32)
        >>> layers.AdaptiveAvgPool(output_size=(2,)).apply({}, x).tolist()
        [[[3.0], [5.0]]]
    """

    output_size: tuple[int | None, ...]

    def __call__(self, x: Array) -> Array:
        return _adaptive(x, self.output_size, jnp.mean)


class AdaptiveMaxPool(Layer):
    """Maxima that make (n, *spatial, c) into (n, *output_size, c); None keeps an axis.

    The windows are those of :class:`AdaptiveAvgPool`.

    Args:
        output_size: the size of each spatial axis of the output; None keeps that of the input.

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.array([[[1], [5], [2], [3]]], np.float32)
        >>> layers.AdaptiveMaxPool(output_size=(2,)).apply({}, x).tolist()
        [[[5.0], [3.0]]]
    """

    output_size: tuple[int | None, ...]

    def __call__(self, x: Array) -> Array:
        return _adaptive(x, self.output_size, jnp.max)


class GlobalAvgPool(Layer):
    """The mean over the spatial axes: (n, *spatial, c) -> (n, c), or (n, 1, ..., c).

    Args:
        keepdims: whether the spatial axes stay, with size 1; False by default.

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.array([[[1, 10], [2, 20], [6, 60]]], np.float32)
        >>> layers.GlobalAvgPool().apply({}, x).tolist()
        [[3.0, 30.0]]
    """

    keepdims: bool = False

    def __call__(self, x: Array) -> Array:
        return jnp.mean(x, axis=tuple(range(1, x.ndim - 1)), keepdims=self.keepdims)


class GlobalMaxPool(Layer):
    """The largest over the spatial axes: (n, *spatial, c) -> (n, c), or (n, 1, ..., c).

    Args:
        keepdims: whether the spatial axes stay, with size 1; False by default.

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.array([[[1, 60], [6, 20], [2, 10]]], np.float32)
        >>> layers.GlobalMaxPool(keepdims=True).apply({}, x).tolist()
        [[[6.0, 60.0]]]
    """

    keepdims: bool = False

    def __call__(self, x: Array) -> Array:
        return jnp.max(x, axis=tuple(range(1, x.ndim - 1)), keepdims=self.keepdims)


class UpSample(Layer):
    """Each pixel of (n, *spatial, c) repeated ``size[i]`` times along spatial axis i.

    Spatial axis i of the output is ``size[i]`` times as long as that of the input.

    Args:
        size: how many copies of a pixel there are along each spatial axis.

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.array([[[1], [3]]], np.float32)
        >>> layers.UpSample(size=(3,)).apply({}, x).tolist()
        [[[1.0], [1.0], [1.0], [3.0], [3.0], [3.0]]]
    """

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
    the sample's centre. "linear" of whole numbers gives float32.

    Args:
        shape: the sizes of the output's spatial axes, in pixels, or None, the default, where
            ``scale`` gives them.
        scale: by how much each spatial axis grows, where ``shape`` is None; sizes are rounded down.
            None, the default, is 1.0 for all.
        method: "nearest", the default, "nearest-exact" or "linear".
        align_corners: whether "linear" puts the first and the last sample on the first and the last
            pixel; False by default.
        copies: whether, as in torch, an axis that keeps its size is left as it is whatever
            ``scale`` is, and with "nearest" one of twice the size repeats each pixel; False by
            default.

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.array([[[2], [6]]], np.float32)
        >>> layers.Resize(shape=(4,), method="linear").apply({}, x).tolist()
        [[[2.0], [3.0], [5.0], [6.0]]]
    """

    shape: tuple[int, ...] | None = None
    scale: tuple[float, ...] | None = None
    method: Literal["nearest", "nearest-exact", "linear"] = "nearest"
    align_corners: bool = False
    copies: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in (known := ("nearest", "nearest-exact", "linear")):
            raise FwtError(f"Resize: method={self.method!r}: expected one of {', '.join(known)}")

    def __call__(self, x: Array) -> Array:
        sizes = x.shape[1:-1]
        for axis, (n, (m, step)) in enumerate(zip(sizes, self.steps(sizes), strict=True), 1):
            if n != m or step != 1:
                x = self._along(x, axis, n, m, step)
        return x

    def steps(self, sizes: tuple[int, ...]) -> list[tuple[int, float]]:
        """Of each spatial axis, the size of the output, and how many pixels of the input there are
        to one of it.

        Example:
            >>> from fwt import layers
            >>> layers.Resize(scale=(1.25, 3.0)).steps((2, 5))
            [(2, 0.8), (15, 0.3333333333333333)]
        """
        if self.shape is not None:
            return [(m, n / m) for n, m in zip(sizes, self.shape, strict=True)]
        found = []
        for n, s in zip(sizes, self.scale or (1.0,) * len(sizes), strict=True):
            m = math.floor(n * s)
            copied = m == n or (m == 2 * n and self.method == "nearest")
            found.append((m, n / m if self.copies and copied else 1 / s))
        return found

    def _along(self, x: Array, axis: int, n: int, m: int, ratio: float) -> Array:
        real: Any = np.float64 if x.dtype == jnp.float64 else np.float32  # as torch does
        at = np.arange(m, dtype=real)
        step = real(ratio)
        if self.method == "nearest":
            index = np.minimum(np.floor(at * step).astype(int), n - 1)
            return jnp.take(x, index, axis=axis)
        if self.method == "nearest-exact":
            index = np.minimum(np.floor((at + real(0.5)) * step).astype(int), n - 1)
            return jnp.take(x, index, axis=axis)
        if self.align_corners:
            at = at * real((n - 1) / (m - 1) if m > 1 else 0)
        else:
            at = np.maximum((at + real(0.5)) * step - real(0.5), 0)
        low = np.minimum(np.floor(at).astype(int), n - 1)
        high = np.minimum(low + 1, n - 1)
        weight = (at - low).astype(real).reshape([-1 if a == axis else 1 for a in range(x.ndim)])
        below, above = jnp.take(x, low, axis=axis), jnp.take(x, high, axis=axis)
        y = below * (1 - weight) + above * weight
        return y.astype(x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else y
