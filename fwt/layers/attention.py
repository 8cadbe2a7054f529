"""Layers of attention that Flax lacks: as Keras has them, and torch's of an encoder."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fwt._types import Array, FwtError
from fwt.layers.base import Layer

__all__ = [
    "AdditiveAttention",
    "Attention",
    "DotProductAttention",
    "GroupedQueryAttention",
    "TransformerEncoderLayer",
]


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
    """Flax's attention in which no step attends to a later one: of one tensor with itself, or of
    queries with keys and values.

    Example:
        >>> import jax
        >>> layer = CausalAttention(num_heads=2)
        >>> y, _ = layer.init_with_output(jax.random.key(0), jnp.ones((1, 5, 4)))
        >>> y.shape
        (1, 5, 4)
    """

    @nn.compact
    def __call__(  # type: ignore[override]  # Flax's names its arguments, which pass through here
        self, x: Array, *others: Array, **named: Any
    ) -> Array:
        mask = jnp.tril(jnp.ones((1, 1, x.shape[1], (x, *others)[-1].shape[1]), bool))
        found: Array = super().__call__(x, *others, mask=mask, **named)
        return found


def _attended(scores: Array, value: Array, causal: bool) -> Array:
    """The values weighted by the softmax of scores (..., t, s); the values are (..., s, l)."""
    if causal:
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -jnp.inf)
    return jax.nn.softmax(scores, axis=-1) @ value


class DotProductAttention(Layer):
    """Attention of queries, keys and values that have several heads, (n, time, heads, size).

    Args:
        causal: whether no step attends to a later one; False by default.
        scale: what the products of queries and keys are multiplied by. None, the default, is one
            by the square root of their size.

    Queries may have a multiple of the heads of the others, which then share theirs.

    Example:
        >>> q, k = jnp.ones((2, 5, 4, 3)), jnp.ones((2, 6, 2, 3))
        >>> DotProductAttention(causal=True).apply({}, q, k, k).shape
        (2, 5, 4, 3)
    """

    causal: bool = False
    scale: float | None = None

    def __call__(self, query: Array, key: Array, value: Array) -> Array:
        query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
        each, rest = divmod(query.shape[1], key.shape[1])
        if rest:
            raise FwtError(f"DotProductAttention: {query.shape[1]} heads of queries can't share "
                           f"{key.shape[1]} of keys")  # fmt: skip
        key, value = (jnp.repeat(x, each, axis=1) if each > 1 else x for x in (key, value))
        scale = query.shape[-1] ** -0.5 if self.scale is None else self.scale
        scores = (query * scale) @ key.swapaxes(2, 3)
        return _attended(scores, value, self.causal).swapaxes(1, 2)


class GroupedQueryAttention(Layer):
    """Attention of several heads, some of which share their keys and values, as Keras has it.

    Queries are (n, t, i), values and keys (n, s, j); keys are the values where they aren't given.

    Args:
        num_heads: how many heads the queries have.
        num_key_value_heads: how many the keys and values have; it divides that of the queries.
        head_features: the size of each head's queries and keys.
        value_features: the size of its values; None, the default, is the same.
        out_features: the size of what comes out; None, the default, is that of the queries.
        causal: whether no step attends to a later one; False by default.
        use_bias: whether all projections have biases; True by default.

    Example:
        >>> layer = GroupedQueryAttention(num_heads=4, num_key_value_heads=2, head_features=3)
        >>> y, _ = layer.init_with_output(jax.random.key(0), jnp.ones((2, 5, 6)))
        >>> y.shape
        (2, 5, 6)
    """

    num_heads: int
    num_key_value_heads: int
    head_features: int
    value_features: int | None = None
    out_features: int | None = None
    causal: bool = False
    use_bias: bool = True

    @nn.compact
    def __call__(self, query: Array, key: Array | None = None, value: Array | None = None) -> Array:
        key = query if key is None else key
        value = key if value is None else value
        told = {"use_bias": self.use_bias, "dtype": self.dtype, "param_dtype": self.param_dtype}

        def heads(name: str, x: Array, count: int, size: int) -> Array:
            return nn.DenseGeneral((count, size), name=name, **told)(x)

        few = self.num_key_value_heads
        q = heads("query", query, self.num_heads, self.head_features)
        k = heads("key", key, few, self.head_features)
        v = heads("value", value, few, self.value_features or self.head_features)
        y = DotProductAttention(self.causal, parent=None).apply({}, q, k, v)
        size = self.out_features or query.shape[-1]
        found: Array = nn.DenseGeneral(size, axis=(-2, -1), name="out", **told)(y)
        return found


class Attention(Layer):
    """Attention of one head without projections: of queries (n, t, c), keys (n, s, c) and values
    (n, s, o), which are the keys where they aren't given.

    Args:
        mode: how queries meet keys: "dot" multiplies them; "concat" sums the tanh of their sums,
            times a learned number.
        use_scale: whether a learned number multiplies the products or the sums; False by default.
        causal: whether no step attends to a later one; False by default.

    Example:
        >>> Attention().apply({}, jnp.ones((2, 5, 6)), jnp.ones((2, 4, 6))).shape
        (2, 5, 6)
    """

    mode: str = "dot"
    use_scale: bool = False
    causal: bool = False

    @nn.compact
    def __call__(self, query: Array, key: Array, value: Array | None = None) -> Array:
        if self.mode not in ("dot", "concat"):
            raise FwtError(f'Attention: mode={self.mode!r} is neither "dot" nor "concat"')
        scale = self.weight("scale", nn.initializers.ones, ()) if self.use_scale else None
        if self.mode == "dot":
            scores = query @ key.swapaxes(1, 2)
            scores = scores if scale is None else scores * scale
        else:
            both = query[:, :, None] + key[:, None]
            both = jnp.tanh(both if scale is None else scale * both)
            by = self.weight("concat_score_weight", nn.initializers.ones, ())
            scores = by * both.sum(-1)
        return _attended(scores, key if value is None else value, self.causal)


class AdditiveAttention(Layer):
    """The attention of Bahdanau et al. (2014), which sums the tanh of queries plus keys.

    Queries are (n, t, c), keys (n, s, c) and values (n, s, o), which are the keys where they aren't
    given.

    Args:
        use_scale: whether a learned number multiplies each summand; True by default.
        causal: whether no step attends to a later one; False by default.

    Example:
        >>> layer = AdditiveAttention()
        >>> x = jnp.ones((2, 5, 6))
        >>> layer.init_with_output(jax.random.key(0), x, x)[0].shape
        (2, 5, 6)
    """

    use_scale: bool = True
    causal: bool = False

    @nn.compact
    def __call__(self, query: Array, key: Array, value: Array | None = None) -> Array:
        both = jnp.tanh(query[:, :, None] + key[:, None])
        if self.use_scale:
            start = nn.initializers.normal(1.0)
            both = both * self.weight("scale", start, query.shape[-1:])
        return _attended(both.sum(-1), key if value is None else value, self.causal)
