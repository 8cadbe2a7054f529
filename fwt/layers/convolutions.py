"""Convolutions that Flax lacks."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax import lax

from fwt._types import Array
from fwt.layers.base import Layer

__all__ = ["GroupedConvTranspose"]

Pairs = tuple[tuple[int, int], ...]


def transposed_padding(window: int, stride: int, padding: str) -> tuple[int, int]:
    """What "VALID" and "SAME" pad around the spread-out input of a transposed convolution.

    Args:
        window: the size of the window along one axis, holes included.
        stride: how far apart the entries of the input are spread.
        padding: "VALID" or "SAME".

    Returns:
        How much stands before and after, for a result of the length that JAX and Keras give.

    Example:
        >>> transposed_padding(3, 2, "SAME"), transposed_padding(3, 2, "VALID")
        ((2, 1), (2, 2))
    """
    if padding == "VALID":
        return window - 1, window - 1 + max(stride - window, 0)
    total = stride + window - 2
    before = min(total // 2 + total % 2, window - 1)
    return before, total - before


class GroupedConvTranspose(Layer):
    """A transposed convolution of (n, *spatial, c) with groups: each output meets the inputs of
    its own group alone.

    ``feature_group_count = c`` is the depthwise form. The kernel is (*kernel_size, c / groups,
    features), its outputs group by group, so that it holds only weights that exist: a dense kernel
    would hold zeros between the groups. As in torch it is not mirrored: entry ``i`` of an input
    adds ``kernel[k]`` times itself to entry ``i * stride + k`` of the whole result.

    Args:
        features: how many channels the output has.
        kernel_size: the size of the window along each spatial axis.
        feature_group_count: how many groups there are; it divides c and ``features``.
        strides: how far apart the input is spread along each spatial axis; None, the default, is 1
            for all.
        padding: "SAME", the default, "VALID" or a pair (before, after) around the spread-out input
            for each spatial axis; ``kernel_size - 1`` on both sides gives the whole result.
        kernel_dilation: the distance between the entries of the window along each spatial axis;
            None, the default, is 1 for all.
        use_bias: whether a bias is added; True by default.
        kernel_init: what draws a new kernel; LeCun's normal by default.
        bias_init: what draws a new bias; zeros by default.

    Raises:
        ValueError: if the groups do not divide the channels.

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> up = layers.GroupedConvTranspose(2, (2,), 2, strides=(2,), padding="VALID",
        ...                                  use_bias=False)
        >>> kernel = np.array([[[1.0, 10.0]], [[2.0, 20.0]]], np.float32)
        >>> x = np.array([[[1, 1], [3, 4]]], np.float32)
        >>> up.apply({"params": {"kernel": kernel}}, x).tolist()
        [[[1.0, 10.0], [2.0, 20.0], [3.0, 40.0], [6.0, 80.0]]]
    """

    features: int
    kernel_size: tuple[int, ...]
    feature_group_count: int
    strides: tuple[int, ...] | None = None
    padding: str | Pairs = "SAME"
    kernel_dilation: tuple[int, ...] | None = None
    use_bias: bool = True
    kernel_init: Any = nn.initializers.lecun_normal()
    bias_init: Any = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: Array) -> Array:
        groups, window, rank = self.feature_group_count, self.kernel_size, len(self.kernel_size)
        if x.shape[-1] % groups or self.features % groups:
            raise ValueError(
                f"{groups} groups do not divide {x.shape[-1]} inputs and {self.features} outputs"
            )
        shape = (*window, x.shape[-1] // groups, self.features)
        kernel = self.weight("kernel", self.kernel_init, shape)
        bias = None
        if self.use_bias:
            bias = self.weight("bias", self.bias_init, (self.features,))
        x, kernel, bias = promote_dtype(x, kernel, bias)
        strides = self.strides or (1,) * rank
        dilation = self.kernel_dilation or (1,) * rank
        pads: Any = self.padding
        if isinstance(pads, str):
            named = pads.upper()
            spread = [(k - 1) * d + 1 for k, d in zip(window, dilation, strict=True)]
            pads = [transposed_padding(k, s, named) for k, s in zip(spread, strides, strict=True)]
        letters = "DHW"[-rank:]
        y = lax.conv_general_dilated(
            x,
            jnp.flip(kernel, range(rank)),
            window_strides=(1,) * rank,
            padding=pads,
            lhs_dilation=strides,
            rhs_dilation=dilation,
            dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
            feature_group_count=groups,
        )
        return y if bias is None else y + bias
