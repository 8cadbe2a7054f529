"""A layer of self-attention and feed-forward, as torch has it."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fwt._types import Array
from fwt.layers.base import Layer

__all__ = ["TransformerEncoderLayer"]


class TransformerEncoderLayer(Layer):
    """Self-attention and two dense layers, each added to its input and normalised; (n, time, c).

    As in Vaswani et al. (2017), or with ``norm_first`` normalised before instead of after.
    The output has the shape of the input.

    Args:
        num_heads: how many heads the attention has. It divides the number of channels c.
        mlp_features: the size between the two dense layers.
        norm_first: whether each part normalises its input instead of its output; False by default.
        activation: what is between the dense layers: "relu", the default, or the exact "gelu".
        epsilon: what the normalisations add to the variance, 1e-5 by default.
        use_bias: whether all parts have biases; True by default.

    Raises:
        KeyError: if ``activation`` is neither of the two.

    Example:
        >>> import jax
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.zeros((2, 5, 6), np.float32)
        >>> layer = layers.TransformerEncoderLayer(num_heads=3, mlp_features=16)
        >>> y, variables = jax.eval_shape(layer.init_with_output, jax.random.key(0), x)
        >>> y.shape, variables["params"]["linear1"]["kernel"].shape
        ((2, 5, 6), (6, 16))
    """

    num_heads: int
    mlp_features: int
    norm_first: bool = False
    activation: str = "relu"
    epsilon: float = 1e-5
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        gelu = functools.partial(jax.nn.gelu, approximate=False)
        acts: dict[str, Callable[[Array], Array]] = {"relu": jax.nn.relu, "gelu": gelu}
        act = acts[self.activation]
        bias = self.use_bias
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def norm(name: str, v: Array) -> Array:
            return nn.LayerNorm(
                self.epsilon, use_bias=bias, use_fast_variance=False, name=name, **dtypes
            )(v)

        def attend(v: Array) -> Array:
            layer = nn.MultiHeadDotProductAttention(
                self.num_heads, use_bias=bias, name="self_attention", **dtypes
            )
            return layer(v)

        def feed(v: Array) -> Array:
            hidden = nn.Dense(self.mlp_features, use_bias=bias, name="linear1", **dtypes)(v)
            return nn.Dense(x.shape[-1], use_bias=bias, name="linear2", **dtypes)(act(hidden))

        if self.norm_first:
            x = x + attend(norm("norm1", x))
            return x + feed(norm("norm2", x))
        x = norm("norm1", x + attend(x))
        return norm("norm2", x + feed(x))


class CausalAttention(nn.MultiHeadDotProductAttention):
    """Flax's attention of one tensor with itself, in which no step attends to a later one.

    Example:
        >>> import jax
        >>> layer = CausalAttention(num_heads=2)
        >>> y, _ = layer.init_with_output(jax.random.key(0), jnp.ones((1, 5, 4)))
        >>> y.shape
        (1, 5, 4)
    """

    @nn.compact
    def __call__(self, x: Array, **named: Any) -> Array:  # type: ignore[override]  # of one tensor
        mask = jnp.tril(jnp.ones((1, 1, x.shape[1], x.shape[1]), bool))
        found: Array = super().__call__(x, mask=mask, **named)
        return found
