"""Recurrent layers over (n, time, channels), with Keras's names and order of gates."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from fwt._types import Array
from fwt.layers.base import Layer

__all__ = ["ACTIVATIONS", "GRU", "LSTM", "ConvLSTM", "SimpleRNN"]

# The hard_sigmoid of Keras 2, since Keras 3 has another function under that name.
HARD_SIGMOID = "keras2_hard_sigmoid"
# By Keras's names and with Keras's defaults.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "linear": lambda x: x,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "hard_sigmoid": jax.nn.hard_sigmoid,
    HARD_SIGMOID: lambda x: jnp.clip(0.2 * x + 0.5, 0.0, 1.0),
    "hard_tanh": jax.nn.hard_tanh,
    "elu": jax.nn.elu,
    "selu": jax.nn.selu,
    "celu": jax.nn.celu,
    "softplus": jax.nn.softplus,
    "softsign": jax.nn.soft_sign,
    "silu": jax.nn.silu,
    "mish": jax.nn.mish,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "exponential": jnp.exp,
    "leaky_relu": lambda x: jax.nn.leaky_relu(x, 0.2),
    "log_sigmoid": jax.nn.log_sigmoid,
    "hard_silu": jax.nn.hard_silu,
}
MERGES: dict[str, Callable[[Array, Array], Array]] = {
    "concat": lambda a, b: jnp.concatenate([a, b], -1),
    "sum": lambda a, b: a + b,
    "mul": lambda a, b: a * b,
    "ave": lambda a, b: (a + b) / 2,
}


class Recurrent(Layer):
    """What the recurrent layers share.

    Attributes:
        features: the size of the state.
        use_bias: whether there are biases.
        return_sequences: whether to give all steps, (n, time, features), or the last only.
        reverse: from the last step to the first; the outputs stay in that order.
        merge: how a second layer that runs backwards joins in: "concat", "sum", "mul", "ave", or
            None for no second layer. Its weights have names that end in ``_reverse``.
    """

    features: int
    use_bias: bool = True
    return_sequences: bool = True
    reverse: bool = False
    merge: str | None = None

    gates = 1

    def weights(self, suffix: str, inputs: int) -> dict[str, Any]:
        h, width = self.features, self.gates * self.features
        init = nn.initializers
        out = {
            "kernel": self.weight("kernel" + suffix, init.glorot_uniform(), (inputs, width)),
            "recurrent": self.weight("recurrent_kernel" + suffix, init.orthogonal(), (h, width)),
        }
        if self.use_bias:
            out["bias"] = self.weight("bias" + suffix, init.zeros, self.bias_shape(width))
        return out

    def bias_shape(self, width: int) -> tuple[int, ...]:
        return (width,)

    def start(self, n: int, dtype: Any) -> Any:
        return jnp.zeros((n, self.features), dtype)

    def step(self, w: dict[str, Any], state: Any, given: Array) -> tuple[Any, Array]:
        raise NotImplementedError

    def given(self, w: dict[str, Any], x: Array) -> Array:
        """What the input contributes to all steps at once."""
        return x @ w["kernel"] + w.get("bias", 0)

    def run(self, suffix: str, x: Array, reverse: bool) -> Array:
        w = self.weights(suffix, x.shape[-1])
        steps = jnp.moveaxis(self.given(w, x), 1, 0)
        start = self.start(x.shape[0], jnp.result_type(steps, w["recurrent"]))
        if reverse:
            steps = steps[::-1]
        _, out = lax.scan(lambda state, g: self.step(w, state, g), start, steps)
        return jnp.moveaxis(out, 0, 1)

    @nn.compact
    def __call__(self, x: Array) -> Array:
        first = self.run("", x, self.reverse)
        if self.merge is None:
            return first if self.return_sequences else first[:, -1]
        second = self.run("_reverse", x, not self.reverse)
        if not self.return_sequences:
            return MERGES[self.merge](first[:, -1], second[:, -1])
        return MERGES[self.merge](first, second[:, ::-1])


class SimpleRNN(Recurrent):
    """h' = activation(x W + h U + b) (Elman, 1990).

    (n, time, channels) -> (n, time, features), or (n, features). The first state is zero.

    Args:
        features: the size of the state.
        use_bias: whether there are biases; True by default.
        return_sequences: whether to give all steps, the default, or the last only.
        reverse: whether to go from the last step to the first; the outputs stay in that order.
            False by default.
        merge: how a second layer that runs the other way joins in: "concat", "sum", "mul", "ave",
            or None, the default, for no second layer. Its weights have names that end in
            ``_reverse``. "concat" doubles the size of the output.
        activation: the name of a function in ``fwt.layers.recurrent.ACTIVATIONS``; "tanh" by
            default.

    Raises:
        KeyError: if ``activation`` or ``merge`` is a name that is not known.

    Example:
        >>> import numpy as np
        >>> from fwt import layers
        >>> weights = {"kernel": np.float32([[1]]), "recurrent_kernel": np.float32([[0.5]])}
        >>> rnn = layers.SimpleRNN(features=1, use_bias=False, activation="linear")
        >>> rnn.apply({"params": weights}, np.array([[[1], [2], [4]]], np.float32)).tolist()
        [[[1.0], [2.5], [5.25]]]
    """

    activation: str = "tanh"

    def step(self, w: dict[str, Any], state: Array, given: Array) -> tuple[Array, Array]:
        new = ACTIVATIONS[self.activation](given + state @ w["recurrent"])
        return new, new


class LSTM(Recurrent):
    """Long short-term memory (Hochreiter and Schmidhuber, 1997), gates i, f, g, o.

    (n, time, channels) -> (n, time, features), or (n, features). With ``projection`` the output and
    the state that returns are (n, projection).

    Args:
        features: the size of the state.
        use_bias: whether there are biases; True by default.
        return_sequences: whether to give all steps, the default, or the last only.
        reverse: whether to go from the last step to the first; the outputs stay in that order.
            False by default.
        merge: how a second layer that runs the other way joins in: "concat", "sum", "mul", "ave",
            or None, the default, for no second layer. Its weights have names that end in
            ``_reverse``. "concat" doubles the size of the output.
        activation: the function of g and of the cell, by its name in
            ``fwt.layers.recurrent.ACTIVATIONS``; "tanh" by default.
        recurrent_activation: that of the gates i, f and o, likewise; "sigmoid" by default.
        projection: the size of the output where it is a product of the state (Sak et al., 2014), or
            None, the default, where it is the state.
        unit_forget_bias: whether Keras starts the bias of the gate f at one, True by default; only
            :func:`fwt.reset` asks.

    Raises:
        KeyError: if an activation or ``merge`` is a name that is not known.

    Example:
        >>> import jax
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.zeros((2, 5, 3), np.float32)
        >>> y, variables = jax.eval_shape(layers.LSTM(4).init_with_output, jax.random.key(0), x)
        >>> y.shape, variables["params"]["kernel"].shape  # the four gates side by side
        ((2, 5, 4), (3, 16))
    """

    activation: str = "tanh"
    recurrent_activation: str = "sigmoid"
    projection: int | None = None
    unit_forget_bias: bool = True

    gates = 4

    def weights(self, suffix: str, inputs: int) -> dict[str, Any]:
        if self.projection is None:
            return super().weights(suffix, inputs)
        h, p, width = self.features, self.projection, 4 * self.features
        init = nn.initializers
        out = {
            "kernel": self.weight("kernel" + suffix, init.glorot_uniform(), (inputs, width)),
            "recurrent": self.weight("recurrent_kernel" + suffix, init.orthogonal(), (p, width)),
            "projection": self.weight("projection_kernel" + suffix, init.glorot_uniform(), (h, p)),
        }
        if self.use_bias:
            out["bias"] = self.weight("bias" + suffix, init.zeros, (width,))
        return out

    def start(self, n: int, dtype: Any) -> Any:
        out = self.projection or self.features
        return jnp.zeros((n, out), dtype), jnp.zeros((n, self.features), dtype)

    def step(self, w: dict[str, Any], state: Any, given: Array) -> tuple[Any, Array]:
        h, c = state
        act, gate = ACTIVATIONS[self.activation], ACTIVATIONS[self.recurrent_activation]
        i, f, g, o = jnp.split(given + h @ w["recurrent"], 4, axis=-1)
        c = gate(f) * c + gate(i) * act(g)
        h = gate(o) * act(c)
        if "projection" in w:
            h = h @ w["projection"]
        return (h, c), h


class GRU(Recurrent):
    """Gated recurrent unit (Cho et al., 2014), gates z, r, h.

    (n, time, channels) -> (n, time, features), or (n, features). With ``reset_after`` the reset
    gate comes after the product with the recurrent kernel, as in cuDNN and torch, and the bias is
    (2, 3 features): of the input and of the state.

    Args:
        features: the size of the state.
        use_bias: whether there are biases; True by default.
        return_sequences: whether to give all steps, the default, or the last only.
        reverse: whether to go from the last step to the first; the outputs stay in that order.
            False by default.
        merge: how a second layer that runs the other way joins in: "concat", "sum", "mul", "ave",
            or None, the default, for no second layer. Its weights have names that end in
            ``_reverse``. "concat" doubles the size of the output.
        activation: the function of the new state, by its name in
            ``fwt.layers.recurrent.ACTIVATIONS``; "tanh" by default.
        recurrent_activation: that of the gates z and r, likewise; "sigmoid" by default.
        reset_after: whether the reset gate comes after that product; True by default.

    Raises:
        KeyError: if an activation or ``merge`` is a name that is not known.

    Example:
        >>> import jax
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.zeros((2, 5, 3), np.float32)
        >>> gru = layers.GRU(4, return_sequences=False, merge="concat")
        >>> y, _ = jax.eval_shape(gru.init_with_output, jax.random.key(0), x)
        >>> y.shape
        (2, 8)
    """

    activation: str = "tanh"
    recurrent_activation: str = "sigmoid"
    reset_after: bool = True

    gates = 3

    def bias_shape(self, width: int) -> tuple[int, ...]:
        return (2, width) if self.reset_after else (width,)

    def given(self, w: dict[str, Any], x: Array) -> Array:
        bias = w.get("bias")
        if bias is not None and self.reset_after:
            bias = bias[0]
        return x @ w["kernel"] + (0 if bias is None else bias)

    def step(self, w: dict[str, Any], state: Array, given: Array) -> tuple[Array, Array]:
        act, gate = ACTIVATIONS[self.activation], ACTIVATIONS[self.recurrent_activation]
        h, n = state, self.features
        xz, xr, xh = jnp.split(given, 3, axis=-1)
        u = w["recurrent"]
        if self.reset_after:
            inner = h @ u + (w["bias"][1] if "bias" in w else 0)
            hz, hr, hh = jnp.split(inner, 3, axis=-1)
            z, r = gate(xz + hz), gate(xr + hr)
            new = act(xh + r * hh)
        else:
            hz, hr = jnp.split(h @ u[:, : 2 * n], 2, axis=-1)
            z, r = gate(xz + hz), gate(xr + hr)
            new = act(xh + (r * h) @ u[:, 2 * n :])
        h = z * h + (1 - z) * new
        return h, h


class ConvLSTM(Layer):
    """An LSTM whose products are convolutions (Shi et al., 2015): (n, time, *spatial, channels).

    The output is (n, time, *spatial', features), or (n, *spatial', features), where spatial' are
    the sizes that the input's convolution gives. That of the state is SAME, with strides 1.

    Args:
        features: the number of channels of the state and of the output.
        kernel_size: the size of both kernels along each of the one to three spatial axes.
        strides: how far the input's kernel moves along each spatial axis; None, the default, is 1
            for all.
        padding: that of the input's convolution: "VALID", the default, or "SAME".
        kernel_dilation: the distance between the entries of the input's kernel along each spatial
            axis; None, the default, is 1 for all.
        use_bias: whether there is a bias; True by default.
        return_sequences: whether to give all steps, the default, or the last only.
        reverse: whether to go from the last step to the first; the outputs stay in that order.
            False by default.
        activation: the function of g and of the cell, by its name in
            ``fwt.layers.recurrent.ACTIVATIONS``; "tanh" by default.
        recurrent_activation: that of the gates i, f and o, likewise; "sigmoid" by default.
        unit_forget_bias: whether Keras starts the bias of the gate f at one, True by default; only
            :func:`fwt.reset` asks.

    Raises:
        KeyError: if an activation is a name that is not known.

    Example:
        >>> import jax
        >>> import numpy as np
        >>> from fwt import layers
        >>> x = np.zeros((2, 5, 6, 7, 3), np.float32)
        >>> layer = layers.ConvLSTM(features=4, kernel_size=(3, 3))
        >>> y, _ = jax.eval_shape(layer.init_with_output, jax.random.key(0), x)
        >>> y.shape
        (2, 5, 4, 5, 4)
    """

    features: int
    kernel_size: tuple[int, ...]
    strides: tuple[int, ...] | None = None
    padding: str = "VALID"
    kernel_dilation: tuple[int, ...] | None = None
    use_bias: bool = True
    return_sequences: bool = True
    reverse: bool = False
    activation: str = "tanh"
    recurrent_activation: str = "sigmoid"
    unit_forget_bias: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        rank, width = len(self.kernel_size), 4 * self.features
        ones, init = (1,) * rank, nn.initializers
        shape = (*self.kernel_size, x.shape[-1], width)
        kernel = self.weight("kernel", init.glorot_uniform(), shape)
        own = (*self.kernel_size, self.features, width)
        recurrent = self.weight("recurrent_kernel", init.glorot_uniform(), own)
        spatial = "DHW"[3 - rank :]
        numbers = (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")
        n, t = x.shape[:2]
        x, kernel, recurrent = nn.dtypes.promote_dtype(x, kernel, recurrent)
        flat = x.reshape(n * t, *x.shape[2:])
        given = lax.conv_general_dilated(
            flat, kernel, self.strides or ones, self.padding,
            rhs_dilation=self.kernel_dilation or ones, dimension_numbers=numbers,
        )  # fmt: skip
        if self.use_bias:
            given = given + self.weight("bias", init.zeros, (width,))
        given = jnp.moveaxis(given.reshape(n, t, *given.shape[1:]), 1, 0)
        act, gate = ACTIVATIONS[self.activation], ACTIVATIONS[self.recurrent_activation]

        def step(state: Any, g: Array) -> tuple[Any, Array]:
            h, c = state
            g = g + lax.conv_general_dilated(h, recurrent, ones, "SAME", dimension_numbers=numbers)
            i, f, new, o = jnp.split(g, 4, axis=-1)
            c = gate(f) * c + gate(i) * act(new)
            h = gate(o) * act(c)
            return (h, c), h

        zeros = jnp.zeros((*given.shape[1:-1], self.features), given.dtype)
        _, out = lax.scan(step, (zeros, zeros), given[::-1] if self.reverse else given)
        return jnp.moveaxis(out, 0, 1) if self.return_sequences else out[-1]
