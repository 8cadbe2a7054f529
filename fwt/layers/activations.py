"""Activations: functions of each entry, and the gate GLU; PReLU alone has weights."""

from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from fwt._types import Array, FwtError
from fwt.layers.base import Layer, RealLayer


class ReLU(Layer):
    """max(x, 0).

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.array([-1.5, 0.5, 3.0], np.float32)
        >>> layers.ReLU().apply({}, x).tolist()
        [0.0, 0.5, 3.0]
    """

    def __call__(self, x: Array) -> Array:
        return jax.nn.relu(x)


class ReLU6(Layer):
    """min(max(x, 0), 6).

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.array([-1.5, 2.5, 7.0], np.float32)
        >>> layers.ReLU6().apply({}, x).tolist()
        [0.0, 2.5, 6.0]
    """

    def __call__(self, x: Array) -> Array:
        return jax.nn.relu6(x)


class LeakyReLU(Layer):
    """x, or ``negative_slope`` x below zero.

    Args:
        negative_slope: the factor of the inputs below zero, 0.01 by default.

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.array([-2.0, 0.5, 3.0], np.float32)
        >>> layers.LeakyReLU(negative_slope=0.25).apply({}, x).tolist()
        [-0.5, 0.5, 3.0]
    """

    negative_slope: float = 0.01

    def __call__(self, x: Array) -> Array:
        return jax.nn.leaky_relu(x, self.negative_slope)


class ELU(Layer):
    """x, or ``alpha`` (exp(x) - 1) below zero.

    Args:
        alpha: the output goes to -``alpha`` as x falls; 1.0 by default.

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.array([-1.0, 0.5, 3.0], np.float32)
        >>> print(np.asarray(layers.ELU(alpha=2.0).apply({}, x)).round(3))
        [-1.264  0.5    3.   ]
    """

    alpha: float = 1.0

    def __call__(self, x: Array) -> Array:
        return jax.nn.elu(x, self.alpha)


class SELU(Layer):
    """Scaled ELU (Klambauer et al., 2017).

    It is 1.0507 x, or 1.7581 (exp(x) - 1) below zero.

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.array([-1.0, 0.5, 2.0], np.float32)
        >>> print(np.asarray(layers.SELU().apply({}, x)).round(3))
        [-1.111  0.525  2.101]
    """

    def __call__(self, x: Array) -> Array:
        return jax.nn.selu(x)


class GELU(Layer):
    """x times the normal distribution function; ``approximate`` uses tanh.

    The default is exact, as in Keras and torch; ``jax.nn.gelu``'s is approximate.

    Args:
        approximate: whether the distribution function is approximated by a tanh; False by default.

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.array([-1.0, 1.0, 3.0], np.float32)
        >>> print(np.asarray(layers.GELU().apply({}, x)).round(3))
        [-0.159  0.841  2.996]
    """

    approximate: bool = False

    def __call__(self, x: Array) -> Array:
        return jax.nn.gelu(x, approximate=self.approximate)


class SiLU(RealLayer):
    """x sigmoid(x), also called swish.

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.array([-1.0, 1.0, 3.0], np.float32)
        >>> print(np.asarray(layers.SiLU().apply({}, x)).round(3))
        [-0.269  0.731  2.858]
    """

    def __call__(self, x: Array) -> Array:
        return jax.nn.silu(x)


class Mish(Layer):
    """x tanh(softplus(x)).

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.array([-1.0, 1.0, 3.0], np.float32)
        >>> print(np.asarray(layers.Mish().apply({}, x)).round(3))
        [-0.303  0.865  2.987]
    """

    def __call__(self, x: Array) -> Array:
        return jax.nn.mish(x)


class Sigmoid(RealLayer):
    """1 / (1 + exp(-x)).

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.log(np.array([0.25, 1.0, 3.0], np.float32))
        >>> print(np.asarray(layers.Sigmoid().apply({}, x)).round(3))
        [0.2  0.5  0.75]
    """

    def __call__(self, x: Array) -> Array:
        return jax.nn.sigmoid(x)


class LogSigmoid(RealLayer):
    """log(sigmoid(x)).

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.array([-2.0, 0.0, 2.0], np.float32)
        >>> print(np.asarray(layers.LogSigmoid().apply({}, x)).round(3))
        [-2.127 -0.693 -0.127]
    """

    def __call__(self, x: Array) -> Array:
        return jax.nn.log_sigmoid(x)


class HardSigmoid(Layer):
    """relu6(x + 3) / 6.

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.array([-4.0, -1.5, 0.0, 3.5], np.float32)
        >>> layers.HardSigmoid().apply({}, x).tolist()
        [0.0, 0.25, 0.5, 1.0]
    """

    def __call__(self, x: Array) -> Array:
        return jax.nn.hard_sigmoid(x)


class HardSwish(Layer):
    """x relu6(x + 3) / 6.

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.array([-1.5, 3.0, 4.5], np.float32)
        >>> layers.HardSwish().apply({}, x).tolist()
        [-0.375, 3.0, 4.5]
    """

    def __call__(self, x: Array) -> Array:
        return jax.nn.hard_swish(x)


class Tanh(Layer):
    """tanh(x).

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.array([-1.0, 0.5, 2.0], np.float32)
        >>> print(np.asarray(layers.Tanh().apply({}, x)).round(3))
        [-0.762  0.462  0.964]
    """

    def __call__(self, x: Array) -> Array:
        return jnp.tanh(x)


class Softplus(Layer):
    """log(1 + exp(``beta`` x)) / ``beta``; x where ``beta`` x is above ``threshold``.

    Args:
        beta: how sharply the output bends at zero, 1.0 by default; the larger it is, the nearer the
            output is to that of :class:`ReLU`.
        threshold: the value of ``beta`` x above which the output is x itself, or None, the default,
            for no such value. torch's default is 20.

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.array([-1.0, 0.0, 3.0], np.float32)
        >>> softplus = layers.Softplus(beta=2.0, threshold=5.0)
        >>> print(np.asarray(softplus.apply({}, x)).round(3))
        [0.063 0.347 3.   ]
    """

    beta: float = 1.0
    threshold: float | None = None

    def __call__(self, x: Array) -> Array:
        y = jax.nn.softplus(x * self.beta) / self.beta
        return y if self.threshold is None else jnp.where(x * self.beta > self.threshold, x, y)


class Softsign(Layer):
    """x / (1 + |x|).

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.array([-1.0, 3.0, 7.0], np.float32)
        >>> layers.Softsign().apply({}, x).tolist()
        [-0.5, 0.75, 0.875]
    """

    def __call__(self, x: Array) -> Array:
        return jax.nn.soft_sign(x)


class Exponential(Layer):
    """exp(x).

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.array([-1.0, 0.0, 2.0], np.float32)
        >>> print(np.asarray(layers.Exponential().apply({}, x)).round(3))
        [0.368 1.    7.389]
    """

    def __call__(self, x: Array) -> Array:
        return jnp.exp(x)


_POINTWISE: Mapping[str, Callable[[Array], Array]] = {
    "abs": jnp.abs, "acos": jnp.arccos, "acosh": jnp.arccosh, "asin": jnp.arcsin,
    "asinh": jnp.arcsinh, "atan": jnp.arctan, "atanh": jnp.arctanh, "ceil": jnp.ceil,
    "cos": jnp.cos, "cosh": jnp.cosh, "erf": jax.scipy.special.erf, "exp": jnp.exp,
    "expm1": jnp.expm1, "floor": jnp.floor, "log": jnp.log, "log1p": jnp.log1p,
    "reciprocal": lambda x: 1 / x, "round": jnp.round, "sign": jnp.sign,
    "sin": jnp.sin, "sinh": jnp.sinh, "sqrt": jnp.sqrt, "square": jnp.square, "tan": jnp.tan,
}  # fmt: skip


class Pointwise(Layer):
    """A function of each entry that has no settings, by its name.

    Args:
        function: "abs", "acos", "acosh", "asin", "asinh", "atan", "atanh", "ceil", "cos", "cosh",
            "erf", "exp", "expm1", "floor", "log", "log1p", "reciprocal", "round" (halves to the
            even number), "sign", "sin", "sinh", "sqrt", "square" or "tan".

    Raises:
        FwtError: for any other name.

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.array([-2.0, 0.5, 3.0], np.float32)
        >>> layers.Pointwise("square").apply({}, x).tolist()
        [4.0, 0.25, 9.0]
    """

    function: str

    def __call__(self, x: Array) -> Array:
        if self.function not in _POINTWISE:
            raise FwtError(f"Pointwise({self.function!r}): known are {', '.join(_POINTWISE)}")
        return _POINTWISE[self.function](x)


class PReLU(Layer):
    """x, or a learned slope times x below zero, ``negative_slope``, one for each entry of ``axes``.

    The slopes are the parameter "negative_slope", whose shape is that of ``axes`` in the input.
    They start at 0.25 (He et al., 2015).

    Args:
        axes: the axes along which each entry has a slope of its own: (-1,), the channels, by
            default. With () there is one slope for all.

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> variables = {"params": {"negative_slope": np.array([0.5, 0.25, 2.0], np.float32)}}
        >>> layers.PReLU().apply(variables, np.array([[-3, -4, 5]], np.float32)).tolist()
        [[-1.5, -1.0, 5.0]]
    """

    axes: tuple[int, ...] = (-1,)

    @nn.compact
    def __call__(self, x: Array) -> Array:
        where = sorted(a % x.ndim for a in self.axes)
        shape = tuple(x.shape[a] for a in where)
        slope = self.weight("negative_slope", nn.initializers.constant(0.25), shape)
        full = [x.shape[a] if a in where else 1 for a in range(x.ndim)]
        return jnp.where(x >= 0, x, x * slope.reshape(full))


class ClippedReLU(Layer):
    """x above ``threshold`` and up to ``max_value``, ``negative_slope`` (x - threshold) below.

    Args:
        max_value: the largest output, or None, the default, for no bound.
        negative_slope: the slope below the threshold, 0.0 by default.
        threshold: the input above which the output is x, 0.0 by default.

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.array([-1.0, 2.5, 5.0], np.float32)
        >>> clipped = layers.ClippedReLU(max_value=4.0, negative_slope=0.5, threshold=1.0)
        >>> clipped.apply({}, x).tolist()
        [-1.0, 2.5, 4.0]
    """

    max_value: float | None = None
    negative_slope: float = 0.0
    threshold: float = 0.0

    def __call__(self, x: Array) -> Array:
        # As Keras: a NaN stays one only where there is no threshold.
        y = jnp.where(x > self.threshold, x, 0) if self.threshold else jax.nn.relu(x)
        if self.max_value is not None:
            y = jnp.clip(y, 0, self.max_value)
        if self.negative_slope:
            y = y - self.negative_slope * jax.nn.relu(self.threshold - x)
        return y


class HardTanh(Layer):
    """x between ``min_value`` and ``max_value``.

    Args:
        min_value: the output for every smaller input, -1.0 by default.
        max_value: the output for every larger input, 1.0 by default.

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.array([-3.0, 0.25, 5.0], np.float32)
        >>> layers.HardTanh(min_value=-0.5, max_value=2.0).apply({}, x).tolist()
        [-0.5, 0.25, 2.0]
    """

    min_value: float = -1.0
    max_value: float = 1.0

    def __call__(self, x: Array) -> Array:
        return jnp.clip(x, self.min_value, self.max_value)


class CELU(Layer):
    """max(x, 0) + min(0, ``alpha`` (exp(x / ``alpha``) - 1)) (Barron, 2017).

    Args:
        alpha: the output goes to -``alpha`` as x falls; 1.0 by default.

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.array([-2.0, 0.5, 3.0], np.float32)
        >>> print(np.asarray(layers.CELU(alpha=2.0).apply({}, x)).round(3))
        [-1.264  0.5    3.   ]
    """

    alpha: float = 1.0

    def __call__(self, x: Array) -> Array:
        return jax.nn.celu(x, self.alpha)


class HardShrink(RealLayer):
    """x, or 0 where abs(x) is at most ``threshold``.

    Args:
        threshold: the largest magnitude that becomes 0; 0.5 by default.

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.array([-2.0, 0.25, 0.75], np.float32)
        >>> layers.HardShrink().apply({}, x).tolist()
        [-2.0, 0.0, 0.75]
    """

    threshold: float = 0.5

    def __call__(self, x: Array) -> Array:
        return jnp.where(jnp.abs(x) <= self.threshold, 0, x)  # NaN stays


class SoftShrink(RealLayer):
    """x moved towards 0 by ``threshold``, and no further.

    Args:
        threshold: how far each entry moves, and so the largest magnitude that becomes 0; 0.5 by
            default.

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.array([-2.0, 0.25, 0.75], np.float32)
        >>> layers.SoftShrink().apply({}, x).tolist()
        [-1.5, 0.0, 0.25]
    """

    threshold: float = 0.5

    def __call__(self, x: Array) -> Array:
        return jnp.sign(x) * jnp.maximum(jnp.abs(x) - self.threshold, 0)


class TanhShrink(Layer):
    """x - tanh(x).

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.array([-1.0, 0.5, 2.0], np.float32)
        >>> print(np.asarray(layers.TanhShrink().apply({}, x)).round(3))
        [-0.238  0.038  1.036]
    """

    def __call__(self, x: Array) -> Array:
        return x - jnp.tanh(x)


class Threshold(Layer):
    """x, or ``value`` where x is at most ``threshold``.

    Args:
        threshold: the largest input that is replaced.
        value: what replaces it.

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.array([0.5, 1.0, 3.0], np.float32)
        >>> layers.Threshold(threshold=1.0, value=-5.0).apply({}, x).tolist()
        [-5.0, -5.0, 3.0]
    """

    threshold: float
    value: float

    def __call__(self, x: Array) -> Array:
        return jnp.where(x <= self.threshold, self.value, x)  # NaN stays


class SquarePlus(RealLayer):
    """(x + sqrt(x² + ``b``)) / 2 (Barron, 2021).

    Args:
        b: how smoothly the output bends at zero, 4.0 by default; 0.0 gives that of :class:`ReLU`.

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.array([-1.5, 0.0, 1.5], np.float32)
        >>> layers.SquarePlus().apply({}, x).tolist()
        [0.5, 1.0, 2.0]
    """

    b: float = 4.0

    def __call__(self, x: Array) -> Array:
        return jax.nn.squareplus(x, self.b)


class SparsePlus(Layer):
    """0 below -1, x above 1, (x + 1)² / 4 between.

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.array([-2.0, 0.0, 3.0], np.float32)
        >>> layers.SparsePlus().apply({}, x).tolist()
        [0.0, 0.25, 3.0]
    """

    def __call__(self, x: Array) -> Array:
        return jax.nn.sparse_plus(x)


class SparseSigmoid(Layer):
    """x / 2 + 1 / 2 between 0 and 1.

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.array([-3.0, 0.5, 2.0], np.float32)
        >>> layers.SparseSigmoid().apply({}, x).tolist()
        [0.0, 0.75, 1.0]
    """

    def __call__(self, x: Array) -> Array:
        return jax.nn.sparse_sigmoid(x)


class GLU(RealLayer):
    """The first half along ``axis`` times the sigmoid of the second (Dauphin et al., 2017).

    The output has half the input's size along that axis.

    Args:
        axis: the axis that is halved, whose size is even; -1 by default.

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.array([[3, 5, 0, 100]], np.float32)  # sigmoid(0) is 0.5, sigmoid(100) is 1
        >>> layers.GLU().apply({}, x).tolist()
        [[1.5, 5.0]]
    """

    axis: int = -1

    def __call__(self, x: Array) -> Array:
        return jax.nn.glu(x, axis=self.axis)
