"""Softmax and norms: layers that scale their input by what stands along an axis."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from fwt._types import Array, FwtError
from fwt.layers.base import Layer


class Softmax(Layer):
    """exp(x) normalised to sum 1 along ``axis``.

    Args:
        axis: the axis along which the output sums to 1; -1 by default.

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.log(np.array([[1, 2, 5]], np.float32))
        >>> print(np.asarray(layers.Softmax().apply({}, x)).round(3))
        [[0.125 0.25  0.625]]
    """

    axis: int = -1

    def __call__(self, x: Array) -> Array:
        return jax.nn.softmax(x, axis=self.axis)


class LogSoftmax(Layer):
    """The logarithm of softmax along ``axis``.

    Args:
        axis: the axis along which the exponentials of the output sum to 1; -1 by default.

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.log(np.array([[1, 2, 5]], np.float32))
        >>> print(np.asarray(layers.LogSoftmax().apply({}, x)).round(3))
        [[-2.079 -1.386 -0.47 ]]
    """

    axis: int = -1

    def __call__(self, x: Array) -> Array:
        return jax.nn.log_softmax(x, axis=self.axis)


class Softmin(Layer):
    """Softmax of -x along ``axis``.

    Args:
        axis: the axis along which the output sums to 1; -1 by default.

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.log(np.array([[1, 3, 3]], np.float32))
        >>> print(np.asarray(layers.Softmin().apply({}, x)).round(3))
        [[0.6 0.2 0.2]]
    """

    axis: int = -1

    def __call__(self, x: Array) -> Array:
        return jax.nn.softmax(-x, axis=self.axis)


class Sparsemax(Layer):
    """x less a threshold, from 0 on, as Keras 3.15 computes it along ``axis``.

    Keras's threshold sums partial sums: where several entries stay, it is not the nearest point
    of the simplex that Martins and Astudillo (2016) call sparsemax.

    Args:
        axis: the axis along which the entries share a threshold; -1 by default.

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.array([[0.5, 0.25, -1.0]], np.float32)  # the threshold is 0.125
        >>> layers.Sparsemax().apply({}, x).tolist()
        [[0.375, 0.125, 0.0]]
    """

    axis: int = -1

    def __call__(self, x: Array) -> Array:
        z = jnp.moveaxis(x, self.axis, -1)
        falling = -jnp.sort(-z, axis=-1)
        sums = jnp.cumsum(falling, axis=-1)
        ranks = jnp.arange(1, z.shape[-1] + 1)
        stays = falling - (sums - 1) / ranks > 0
        count = jnp.sum(stays, axis=-1, keepdims=True)
        total = jnp.sum(jnp.where(stays, sums, 0), axis=-1, keepdims=True)
        return jnp.moveaxis(jnp.maximum(z - (total - 1) / count, 0), -1, self.axis)


class UnitNorm(Layer):
    """x divided by its Euclidean norm along ``axes``; a norm below 1e-6 counts as that.

    Args:
        axes: the axes that a norm goes over: (-1,), the channels, by default.

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.array([[3, 0, -4]], np.float32)
        >>> print(np.asarray(layers.UnitNorm().apply({}, x)).round(3))
        [[ 0.6  0.  -0.8]]
    """

    axes: tuple[int, ...] = (-1,)

    def __call__(self, x: Array) -> Array:
        square = jnp.sum(x * x, axis=self.axes, keepdims=True)
        return x * jax.lax.rsqrt(jnp.maximum(square, 1e-12))


class LocalResponseNorm(Layer):
    """x / (k + alpha mean(x² of ``size`` channels around))^beta over the last axis.

    The mean counts channels beyond the ends as zero (Krizhevsky et al., 2012; torch's form).

    Args:
        size: how many channels a mean goes over; of an even number, one more is before than after.
        alpha: the factor of the mean, 1e-4 by default.
        beta: the exponent, 0.75 by default.
        k: what is added to ``alpha`` times the mean, 1.0 by default.

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.array([[2, 0, 1]], np.float32)
        >>> norm = layers.LocalResponseNorm(size=3, alpha=3.0, beta=1.0)
        >>> print(np.asarray(norm.apply({}, x)).round(3))
        [[0.4 0.  0.5]]
    """

    size: int
    alpha: float = 1e-4
    beta: float = 0.75
    k: float = 1.0

    def __call__(self, x: Array) -> Array:
        pads = [(0, 0)] * (x.ndim - 1) + [(self.size // 2, (self.size - 1) // 2)]
        squares = jnp.pad(x * x, pads)
        n = x.shape[-1]
        total = sum(squares[..., i : i + n] for i in range(self.size))
        return x / (self.k + self.alpha * total / self.size) ** self.beta


_REDUCE: Mapping[str, Callable[..., Array]]
_REDUCE = {"sum": jnp.sum, "mean": jnp.mean, "max": jnp.max, "min": jnp.min, "prod": jnp.prod,
           "logsumexp": jax.nn.logsumexp}  # fmt: skip


class Reduce(Layer):
    """One number for all along ``axis``, which stays with size 1.

    Args:
        function: "sum", "mean", "max", "min", "prod" or "logsumexp".
        axis: the axis; -1 by default.

    Raises:
        FwtError: for any other function.

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> layers.Reduce("sum").apply({}, np.array([[1, 2, 5]], np.float32)).tolist()
        [[8.0]]
    """

    function: str
    axis: int = -1

    def __call__(self, x: Array) -> Array:
        if self.function not in _REDUCE:
            raise FwtError(f"Reduce({self.function!r}): known are {', '.join(_REDUCE)}")
        return _REDUCE[self.function](x, axis=self.axis, keepdims=True)
