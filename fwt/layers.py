"""The layers that Flax lacks: pools, shapes and activations as small frozen modules.

They hold no weights, compare and hash by their settings, and take channels-last input. Windows
move by their own size unless ``strides`` says otherwise, as in Keras and torch.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fwt._types import Array, FwtError

__all__ = [
    "ELU",
    "GELU",
    "SELU",
    "AvgPool",
    "ConstantPad",
    "Exponential",
    "Flatten",
    "GlobalAvgPool",
    "GlobalMaxPool",
    "HardSigmoid",
    "HardSwish",
    "Identity",
    "LeakyReLU",
    "LogSigmoid",
    "LogSoftmax",
    "MaxPool",
    "Mish",
    "Permute",
    "ReLU",
    "ReLU6",
    "Reshape",
    "SiLU",
    "Sigmoid",
    "Softmax",
    "Softplus",
    "Softsign",
    "Tanh",
    "ZeroPad",
]

Pairs = tuple[tuple[int, int], ...]


def tuples(x: Any) -> Any:
    """Lists as tuples, so that equal layers are equal and hashable."""
    return tuple(map(tuples, x)) if isinstance(x, list | tuple) else x


class Layer(nn.Module):
    """A layer without weights whose settings are made hashable."""

    def __post_init__(self) -> None:
        for field in self.__dataclass_fields__:
            if field not in ("parent", "name"):
                object.__setattr__(self, field, tuples(getattr(self, field)))
        super().__post_init__()


class Identity(Layer):
    """Its input."""

    def __call__(self, x: Array) -> Array:
        return x


class Flatten(Layer):
    """(n, ...) -> (n, product of the rest)."""

    def __call__(self, x: Array) -> Array:
        return x.reshape(x.shape[0], math.prod(x.shape[1:]))


class Reshape(Layer):
    """(n, ...) -> (n, *shape); one entry of ``shape`` may be -1."""

    shape: tuple[int, ...]

    def __call__(self, x: Array) -> Array:
        return x.reshape(x.shape[0], *self.shape)


class Permute(Layer):
    """Moves axes: output axis i is input axis ``dims[i]``, the batch axis 0 included."""

    dims: tuple[int, ...]

    def __call__(self, x: Array) -> Array:
        return jnp.transpose(x, self.dims)


class ZeroPad(Layer):
    """(n, *spatial, c) with ``padding[i] = (before, after)`` zeros on spatial axis i."""

    padding: Pairs

    def __call__(self, x: Array) -> Array:
        return jnp.pad(x, ((0, 0), *self.padding, (0, 0)))


class ConstantPad(Layer):
    """(n, *spatial, c) with ``padding[i] = (before, after)`` of ``value`` on spatial axis i."""

    padding: Pairs
    value: float

    def __call__(self, x: Array) -> Array:
        return jnp.pad(x, ((0, 0), *self.padding, (0, 0)), constant_values=self.value)


class MaxPool(Layer):
    """The largest of each window of (n, *spatial, c); the padding never wins.

    ``padding`` is "VALID", "SAME" or a pair (before, after) for each spatial axis.
    """

    window_shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None
    padding: str | Pairs = "VALID"

    def __call__(self, x: Array) -> Array:
        return nn.max_pool(x, self.window_shape, self.strides or self.window_shape, self.padding)


class AvgPool(Layer):
    """The mean of each window of (n, *spatial, c); the padding counts only if told so."""

    window_shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None
    padding: str | Pairs = "VALID"
    count_include_pad: bool = False

    def __call__(self, x: Array) -> Array:
        strides = self.strides or self.window_shape
        return nn.avg_pool(x, self.window_shape, strides, self.padding, self.count_include_pad)


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


class ReLU(Layer):
    """max(x, 0)."""

    def __call__(self, x: Array) -> Array:
        return jax.nn.relu(x)


class ReLU6(Layer):
    """min(max(x, 0), 6)."""

    def __call__(self, x: Array) -> Array:
        return jax.nn.relu6(x)


class LeakyReLU(Layer):
    """x, or ``negative_slope`` x below zero."""

    negative_slope: float = 0.01

    def __call__(self, x: Array) -> Array:
        return jax.nn.leaky_relu(x, self.negative_slope)


class ELU(Layer):
    """x, or ``alpha`` (exp(x) - 1) below zero."""

    alpha: float = 1.0

    def __call__(self, x: Array) -> Array:
        return jax.nn.elu(x, self.alpha)


class SELU(Layer):
    """Scaled ELU (Klambauer et al., 2017)."""

    def __call__(self, x: Array) -> Array:
        return jax.nn.selu(x)


class GELU(Layer):
    """x times the normal distribution function; ``approximate`` uses tanh.

    The default is exact, as in Keras and torch; ``jax.nn.gelu``'s is approximate.
    """

    approximate: bool = False

    def __call__(self, x: Array) -> Array:
        return jax.nn.gelu(x, approximate=self.approximate)


class SiLU(Layer):
    """x sigmoid(x), also called swish."""

    def __call__(self, x: Array) -> Array:
        return jax.nn.silu(x)


class Mish(Layer):
    """x tanh(softplus(x))."""

    def __call__(self, x: Array) -> Array:
        return jax.nn.mish(x)


class Sigmoid(Layer):
    """1 / (1 + exp(-x))."""

    def __call__(self, x: Array) -> Array:
        return jax.nn.sigmoid(x)


class LogSigmoid(Layer):
    """log(sigmoid(x))."""

    def __call__(self, x: Array) -> Array:
        return jax.nn.log_sigmoid(x)


class HardSigmoid(Layer):
    """relu6(x + 3) / 6."""

    def __call__(self, x: Array) -> Array:
        return jax.nn.hard_sigmoid(x)


class HardSwish(Layer):
    """x relu6(x + 3) / 6."""

    def __call__(self, x: Array) -> Array:
        return jax.nn.hard_swish(x)


class Tanh(Layer):
    """tanh(x)."""

    def __call__(self, x: Array) -> Array:
        return jnp.tanh(x)


class Softplus(Layer):
    """log(1 + exp(x))."""

    def __call__(self, x: Array) -> Array:
        return jax.nn.softplus(x)


class Softsign(Layer):
    """x / (1 + |x|)."""

    def __call__(self, x: Array) -> Array:
        return jax.nn.soft_sign(x)


class Exponential(Layer):
    """exp(x)."""

    def __call__(self, x: Array) -> Array:
        return jnp.exp(x)


class Softmax(Layer):
    """exp(x) normalised to sum 1 along ``axis``."""

    axis: int = -1

    def __call__(self, x: Array) -> Array:
        return jax.nn.softmax(x, axis=self.axis)


class LogSoftmax(Layer):
    """The logarithm of softmax along ``axis``."""

    axis: int = -1

    def __call__(self, x: Array) -> Array:
        return jax.nn.log_softmax(x, axis=self.axis)


_FUNCTIONS: Sequence[tuple[Callable[..., Any], type[Layer], dict[str, Any]]] = (
    (jax.nn.relu, ReLU, {}),
    (jax.nn.relu6, ReLU6, {}),
    (jax.nn.leaky_relu, LeakyReLU, {}),
    (jax.nn.elu, ELU, {}),
    (jax.nn.selu, SELU, {}),
    (jax.nn.gelu, GELU, {"approximate": True}),
    (jax.nn.silu, SiLU, {}),
    (jax.nn.mish, Mish, {}),
    (jax.nn.sigmoid, Sigmoid, {}),
    (jax.nn.log_sigmoid, LogSigmoid, {}),
    (jax.nn.hard_sigmoid, HardSigmoid, {}),
    (jax.nn.hard_silu, HardSwish, {}),
    (jnp.tanh, Tanh, {}),
    (jax.nn.softplus, Softplus, {}),
    (jax.nn.soft_sign, Softsign, {}),
    (jnp.exp, Exponential, {}),
    (jax.nn.softmax, Softmax, {}),
    (jax.nn.log_softmax, LogSoftmax, {}),
)


def from_function(function: Callable[..., Any]) -> Layer:
    """The layer that stands for a plain function such as ``nn.relu``."""
    for known, layer, settings in _FUNCTIONS:
        if function is known:
            return layer(**settings)
    raise FwtError(
        f"{getattr(function, '__name__', function)!r} is no linen module and no activation that "
        "fwt.layers knows; wrap it in a linen module of your own"
    )
