"""Layers that move, repeat or keep their entries and compute nothing."""

import math

import jax.numpy as jnp

from fwt._types import Array
from fwt.layers.base import Layer


class Identity(Layer):
    """Its input.

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.array([[1.5, -2.0, 3.0]], np.float32)
        >>> layers.Identity().apply({}, x).tolist()
        [[1.5, -2.0, 3.0]]
    """

    def __call__(self, x: Array) -> Array:
        return x


class Flatten(Layer):
    """(n, ...) -> (n, product of the rest), or only the axes ``start`` to ``end`` as one.

    Args:
        start: the first axis that is merged, 1 by default; the batch axis is 0. A negative number
            counts from the last axis.
        end: the last axis that is merged, which is included; -1, the last one of the input, by
            default.

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.zeros((2, 3, 5, 7), np.float32)
        >>> layers.Flatten().apply({}, x).shape, layers.Flatten(start=2).apply({}, x).shape
        ((2, 105), (2, 3, 35))
    """

    start: int = 1
    end: int = -1

    def __call__(self, x: Array) -> Array:
        start, stop = self.start % x.ndim, self.end % x.ndim + 1
        merged = math.prod(x.shape[start:stop])
        return x.reshape(*x.shape[:start], merged, *x.shape[stop:])


class Reshape(Layer):
    """(n, ...) -> (n, *shape); one entry of ``shape`` may be -1.

    Args:
        shape: the sizes of the output's axes, without the batch axis. An entry of -1 becomes the
            size that holds the rest of the input.

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.array([[1, 2, 3, 4, 5, 6]], np.float32)
        >>> layers.Reshape(shape=(3, -1)).apply({}, x).tolist()
        [[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]]
    """

    shape: tuple[int, ...]

    def __call__(self, x: Array) -> Array:
        return x.reshape(x.shape[0], *self.shape)


class Permute(Layer):
    """Moves axes: output axis i is input axis ``dims[i]``, the batch axis 0 included.

    Args:
        dims: the input axis of each output axis. It names every axis once, and starts with 0 where
            the batch axis stays first.

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.array([[[1, 2, 3], [4, 5, 6]]], np.float32)
        >>> layers.Permute(dims=(0, 2, 1)).apply({}, x).tolist()
        [[[1.0, 4.0], [2.0, 5.0], [3.0, 6.0]]]
    """

    dims: tuple[int, ...]

    def __call__(self, x: Array) -> Array:
        return jnp.transpose(x, self.dims)


class Flip(Layer):
    """An axis from its end to its start.

    Args:
        axis: the number of the axis.

    Example:
        >>> Flip().apply({}, jnp.arange(3.0)[None]).tolist()
        [[2.0, 1.0, 0.0]]
    """

    axis: int = -1

    def __call__(self, x: Array) -> Array:
        return jnp.flip(x, self.axis)


class RepeatVector(Layer):
    """(n, c) -> (n, ``times``, c).

    Args:
        times: how many copies of each vector there are along the new axis 1.

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.array([[1.5, -2.0]], np.float32)
        >>> layers.RepeatVector(times=3).apply({}, x).tolist()
        [[[1.5, -2.0], [1.5, -2.0], [1.5, -2.0]]]
    """

    times: int

    def __call__(self, x: Array) -> Array:
        return jnp.repeat(x[:, None], self.times, axis=1)


class PixelShuffle(Layer):
    """(n, h, w, c r²) -> (n, h r, w r, c); channel c r² + i r + j goes to row i, column j.

    The channels are ordered as in torch; TensorFlow's ``depth_to_space`` orders them otherwise.

    Args:
        factor: r, by which the height and the width grow. Its square divides the number of
            channels.

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.array([[[[1, 2, 3, 4]]]], np.float32)
        >>> layers.PixelShuffle(factor=2).apply({}, x).tolist()
        [[[[1.0], [2.0]], [[3.0], [4.0]]]]
    """

    factor: int

    def __call__(self, x: Array) -> Array:
        n, h, w, c = x.shape
        r = self.factor
        x = x.reshape(n, h, w, c // r**2, r, r).transpose(0, 1, 4, 2, 5, 3)
        return x.reshape(n, h * r, w * r, c // r**2)


class PixelUnshuffle(Layer):
    """The inverse of :class:`PixelShuffle`: (n, h r, w r, c) -> (n, h, w, c r²).

    Args:
        factor: r, by which the height and the width shrink. It divides both.

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.array([[[[1], [2]], [[3], [4]]]], np.float32)
        >>> layers.PixelUnshuffle(factor=2).apply({}, x).tolist()
        [[[[1.0, 2.0, 3.0, 4.0]]]]
    """

    factor: int

    def __call__(self, x: Array) -> Array:
        n, h, w, c = x.shape
        r = self.factor
        x = x.reshape(n, h // r, r, w // r, r, c).transpose(0, 1, 3, 5, 2, 4)
        return x.reshape(n, h // r, w // r, c * r**2)


class ChannelShuffle(Layer):
    """The channels of (n, *spatial, c) as (groups, c / groups), transposed.

    The output takes the first channel of each group, then the second of each, and so on.

    Args:
        groups: how many groups there are. It divides the number of channels.

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.array([[0, 1, 2, 3, 4, 5]], np.float32)
        >>> layers.ChannelShuffle(groups=2).apply({}, x).tolist()
        [[0.0, 3.0, 1.0, 4.0, 2.0, 5.0]]
    """

    groups: int

    def __call__(self, x: Array) -> Array:
        split = x.reshape(*x.shape[:-1], self.groups, x.shape[-1] // self.groups)
        return jnp.swapaxes(split, -1, -2).reshape(x.shape)


class TrainingOnly(Layer):
    """The identity: a layer of ``framework`` that acts in training only, kept for the way back.

    Such a layer, for example one that adds noise, gives its input at inference. The converters put
    this layer in its place, and make the original from it again.

    Args:
        framework: "keras" or "torch", where the layer comes from.
        kind: the name of its class there.
        settings: the settings of the layer as a JSON object, "{}" by default.

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> noise = layers.TrainingOnly("keras", "GaussianNoise", '{"stddev": 0.5}')
        >>> noise.apply({}, np.array([[1.5, -2.0, 3.0]], np.float32)).tolist()
        [[1.5, -2.0, 3.0]]
    """

    framework: str
    kind: str
    settings: str = "{}"

    def __call__(self, x: Array) -> Array:
        return x
