"""Softmax and norms: layers that scale their input by what stands along an axis."""

from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from fwt._types import Array, FwtError
from fwt.layers.base import Layer, RealLayer


class Softmax(RealLayer):
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


class LogSoftmax(RealLayer):
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


class Softmin(RealLayer):
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


class Sparsemax(RealLayer):
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


class UnitNorm(RealLayer):
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


class TrackedInstanceNorm(Layer):
    """An InstanceNorm that keeps running statistics, as torch's ``track_running_stats`` does.

    (n, *spatial, c). In training each channel of each image is normalised by its own mean and
    variance, and "mean" and "var" in "batch_stats" follow their averages over the batch, the
    variance as the unbiased one. At inference these normalise all images, as in a BatchNorm.

    Args:
        epsilon: what is added to the variance, 1e-5 by default.
        momentum: how much of the running statistics stays in each training step, 0.99 by default.
        use_scale: whether each channel has a factor; True by default.
        use_bias: whether each channel has an offset; True by default.
        use_running_average: True at inference, False in training; None, the default, where the call
            says it.

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> norm = layers.TrackedInstanceNorm(0.0, use_scale=False, use_bias=False)
        >>> stats = {"mean": np.float32([2]), "var": np.float32([4])}
        >>> x = np.array([[[6], [0]]], np.float32)
        >>> norm.apply({"batch_stats": stats}, x, use_running_average=True).tolist()
        [[[2.0], [-1.0]]]
    """

    epsilon: float = 1e-5
    momentum: float = 0.99
    use_scale: bool = True
    use_bias: bool = True
    use_running_average: bool | None = None

    @nn.compact
    def __call__(self, x: Array, use_running_average: bool | None = None) -> Array:
        running = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        size, dtype = x.shape[-1:], x.dtype
        kept = [
            self.variable("batch_stats", name, new, size)
            for name, new in (("mean", jnp.zeros), ("var", jnp.ones))
        ]
        wide = jnp.asarray(x, jnp.promote_types(dtype, jnp.float32))
        if running:
            mean, var = (v.value for v in kept)
        else:
            axes = tuple(range(1, x.ndim - 1))
            mean, var = wide.mean(axes, keepdims=True), wide.var(axes, keepdims=True)
            if not self.is_initializing():
                count = x[0, ..., 0].size
                batch = tuple(range(x.ndim - 1))
                for held, new in zip(kept, (mean, var * count / max(count - 1, 1)), strict=True):
                    held.value = self.momentum * held.value + (1 - self.momentum) * new.mean(batch)
        y = (wide - mean) * jax.lax.rsqrt(var + self.epsilon)
        scale = self.weight("scale", nn.initializers.ones, size) if self.use_scale else 1
        bias = self.weight("bias", nn.initializers.zeros, size) if self.use_bias else 0
        return jnp.asarray(y * scale + bias, jnp.result_type(dtype, scale, bias))
