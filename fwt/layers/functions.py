"""The layer that stands for a plain function, such as ``nn.relu``."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fwt._types import FwtError
from fwt.layers.activations import (
    CELU,
    ELU,
    GELU,
    GLU,
    SELU,
    Exponential,
    HardSigmoid,
    HardSwish,
    HardTanh,
    LeakyReLU,
    LogSigmoid,
    Mish,
    ReLU,
    ReLU6,
    Sigmoid,
    SiLU,
    Softplus,
    Softsign,
    SparsePlus,
    SparseSigmoid,
    SquarePlus,
    Tanh,
)
from fwt.layers.base import Layer
from fwt.layers.norms import LogSoftmax, Softmax
from fwt.layers.windows import AvgPool, MaxPool

FUNCTIONS: Sequence[tuple[Callable[..., Any], type[Layer], dict[str, Any]]] = (
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
    (jax.nn.celu, CELU, {}),
    (jax.nn.glu, GLU, {}),
    (jax.nn.hard_tanh, HardTanh, {}),
    (jax.nn.squareplus, SquarePlus, {}),
    (jax.nn.sparse_plus, SparsePlus, {}),
    (jax.nn.sparse_sigmoid, SparseSigmoid, {}),
    (jax.nn.log_softmax, LogSoftmax, {}),
)


def from_function(function: Callable[..., Any]) -> Layer:
    """The layer that stands for a plain function such as ``nn.relu``, or for a ``partial`` of one.

    Args:
        function: an activation of ``flax.linen``, ``jax.nn`` or ``jax.numpy``, or a ``partial`` of
            one with keywords, such as ``partial(nn.leaky_relu, negative_slope=0.2)``. A
            ``partial`` of ``nn.max_pool`` or ``nn.avg_pool`` is a pool.

    Returns:
        the layer, with the settings that the function has.

    Raises:
        FwtError: if no layer stands for the function, or not with these settings.

    Example:
        >>> import flax.linen as nn
        >>> from fwt import layers
        >>> layers.from_function(nn.relu) == layers.ReLU()
        True
    """
    if isinstance(function, functools.partial):
        return _from_partial(function)
    for known, layer, settings in FUNCTIONS:
        if function is known:
            return layer(**settings)
    name = getattr(function, "__name__", type(function).__name__)
    raise FwtError(
        f"{name!r} is no linen module and no activation that "
        "fwt.layers knows; wrap it in a linen module of your own"
    )


def _from_partial(function: "functools.partial[Any]") -> Layer:
    given, name = dict(function.keywords), getattr(function.func, "__name__", function.func)
    if function.args:
        raise FwtError(f"partial({name}, {function.args[0]!r}, ...): give its arguments by name")
    if function.func in (nn.max_pool, nn.avg_pool):
        window = tuple(given.pop("window_shape"))
        # Where they are not given, a plain pool moves by one, and counts its padding.
        strides = given.pop("strides", None) or (1,) * len(window)
        pool: dict[str, Any] = {"window_shape": window, "strides": tuple(strides), **given}
        if function.func is nn.max_pool:
            return MaxPool(**pool)
        return AvgPool(**{"count_include_pad": True, **pool})
    for known, layer, settings in FUNCTIONS:
        if function.func is known:
            fields = layer.__dataclass_fields__
            if unknown := [k for k in given if k not in fields or k in ("parent", "name")]:
                raise FwtError(f"partial({name}, {unknown[0]}=...): its layer has no such setting")
            return layer(**{**settings, **given})
    return from_function(function.func)
