"""Values that no initializer of a framework gives by itself, for ``reset``."""

from typing import Any

import jax
import jax.numpy as jnp

from fwt import initializers
from fwt.initializers import keras, torch
from fwt.initializers._bound import Bound, as_matrix


def padded(key: Any, shape: Any, dtype: Any, axes: Any, make: Bound, index: int) -> Any:
    """A table with one row of zeros."""
    return make(key, shape, dtype).at[index].set(0)


def two_uniforms(key: Any, shape: Any, dtype: Any, axes: Any, limit: float) -> Any:
    """The sum of torch's two biases."""
    draws = (torch.uniform(-limit, limit)(k, shape, dtype) for k in jax.random.split(key))
    return sum(draws)


def forget(key: Any, shape: Any, dtype: Any, axes: Any, units: int) -> Any:
    """Keras's bias of an LSTM: ones for the gate that forgets."""
    return jnp.zeros(shape, dtype).at[units : 2 * units].set(1)


def gate_of_orthogonal(key: Any, shape: Any, dtype: Any, axes: Any, gate: int, gates: int) -> Any:
    """A gate's part of the one matrix that Keras draws for all of them."""
    units = shape[-1]
    whole = keras.orthogonal()(key, (units, gates * units), dtype)
    return whole[:, gate * units : (gate + 1) * units]


def orthogonal_gates(key: Any, shape: Any, dtype: Any, axes: Any, gates: int) -> Any:
    """Side by side, a matrix for each gate."""

    def draw(flat: tuple[int, int]) -> Any:
        units = (flat[0], flat[1] // gates)
        make = initializers.orthogonal()
        return jnp.concatenate([make(k, units, dtype) for k in jax.random.split(key, gates)], 1)

    return as_matrix(draw, axes, (*axes.inputs, *axes.outputs), len(axes.inputs))


def by_flax(key: Any, shape: Any, dtype: Any, axes: Any, make: Any) -> Any:
    """A layer's own initializer, called as Flax calls it: several axes of one side are one."""
    ins, outs = (axes.inputs, axes.outputs) if axes.known else ((), ())
    if len(ins) + len(outs) < 3 or not ins or not outs:
        return make(key, shape, dtype)
    return as_matrix(lambda flat: make(key, flat, dtype), axes, (*ins, *outs), len(ins))
