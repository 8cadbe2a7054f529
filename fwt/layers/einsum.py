"""A dense layer by an equation."""

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from fwt._types import Array
from fwt.layers.base import Layer

__all__ = ["EinsumDense"]


def einsum_axes(equation: str, rank: int | None) -> tuple[list[str], list[str], list[str]]:
    """The names of the axes of the input, the kernel and the output of an equation such as
    "abc,cd->abd".

    Args:
        equation: of an input and a kernel. "..." in the input and the output stands for any axes,
            before or after the others.
        rank: of the input; None for as many as the equation names.

    Raises:
        ValueError: for what is no such equation, or does not fit the rank.
    """
    operands, arrow, output = equation.replace(" ", "").partition("->")
    inputs, comma, kernel = operands.partition(",")
    plain = [part.replace("...", "") for part in (inputs, kernel, output)]
    dots = [part.count("...") for part in (inputs, kernel, output)]
    known = set(plain[0]) | set(plain[1])
    if (
        not (arrow and comma)
        or not "".join(plain).isalpha()
        or any(len(set(part)) < len(part) for part in plain)
        or not set(plain[2]) <= known
        or dots[:2] not in ([0, 0], [1, 0])
        or dots[2] != dots[0]
        or any("..." in part.strip(".") for part in (inputs, output))
    ):
        raise ValueError(f"equation={equation!r} is none of an input and a kernel")
    more = 0 if rank is None else rank - len(plain[0])
    if more < 0 or (more and not dots[0]):
        raise ValueError(f"equation={equation!r} does not fit an input of rank {rank}")
    fill = [f"{i}" for i in range(more)]

    def full(part: str) -> list[str]:
        before, found, after = part.partition("...")
        return [*before, *(fill if found else []), *after]

    return full(inputs), list(plain[1]), full(output)


class EinsumDense(Layer):
    """``einsum(equation, x, kernel)`` and a bias, as Keras has it.

    Args:
        equation: "abc,cde->abde" sums over c, which no output has. The first axis of the input and
            of the output is the batch. "..." stands for any more axes.
        output_shape: the sizes of the output without the batch, None for those of the input.
        bias_axes: the letters of the output that the bias has, in its order, or None, the default,
            for no bias.

    Raises:
        ValueError: for another equation, or one that does not fit the input.

    Example:
        >>> import jax, numpy as np
        >>> from fwt import layers
        >>> layer = layers.EinsumDense("abc,cde->abde", (None, 2, 5), bias_axes="de")
        >>> y, variables = layer.init_with_output(jax.random.key(0), np.ones((2, 3, 4)))
        >>> y.shape, variables["params"]["kernel"].shape, variables["params"]["bias"].shape
        ((2, 3, 2, 5), (4, 2, 5), (2, 5))
    """

    equation: str
    output_shape: tuple[int | None, ...]
    bias_axes: str | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        inputs, kernel, output = einsum_axes(self.equation, x.ndim)
        sizes: dict[str, Any] = dict(zip(inputs, x.shape, strict=True))
        after = self.equation.partition("->")[2].strip()
        told = [None, *self.output_shape]
        # Those that the dots stand for may be left out.
        names = list(reversed(output)) if after.startswith("...") else output
        given = reversed(told[1:]) if after.startswith("...") else told
        for name, size in zip(names, given, strict=False):
            if size is not None and sizes.setdefault(name, size) != size:
                raise ValueError(
                    f"output_shape={self.output_shape} does not fit an input of {x.shape}"
                )
        if missing := [n for n in kernel if n not in sizes]:
            raise ValueError(f"output_shape={self.output_shape} does not say {missing[0]!r}")
        shape = tuple(sizes[n] for n in kernel)
        fan = math.prod(sizes[n] for n in kernel if n in inputs and n not in output)
        w = self.weight("kernel", nn.initializers.normal(fan**-0.5), shape)
        x, w = nn.dtypes.promote_dtype(x, w)
        y = jnp.einsum(self.equation, x, w)
        if self.bias_axes is None:
            return y
        if not self.bias_axes or not set(self.bias_axes) <= set(output):
            raise ValueError(f"bias_axes={self.bias_axes!r}: expected letters of the output")
        first = min(output.index(n) for n in self.bias_axes)
        own = tuple(sizes[n] if n in self.bias_axes else 1 for n in output[first:])
        return y + self.weight("bias", nn.initializers.zeros, own)
