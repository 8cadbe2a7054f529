"""What every layer of fwt.layers is."""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from fwt._types import Array


def tuples(x: Any) -> Any:
    """Lists as tuples, so that equal layers are equal and hashable."""
    return tuple(map(tuples, x)) if isinstance(x, list | tuple) else x


class Layer(nn.Module, kw_only=True):
    """A layer whose settings are made hashable.

    Each has two fields more than its own, as linen's layers have them, given by name.

    Attributes:
        dtype: the dtype that it computes in and gives: its input and its weights are cast to it.
            None, the default, takes that of its input and weights. Whole numbers stay.
        param_dtype: the dtype of new weights, float32 by default.
    """

    dtype: Any = None
    param_dtype: Any = jnp.float32

    def __init_subclass__(cls, **settings: Any) -> None:
        own = vars(cls).get("__call__")
        if own is not None:

            @functools.wraps(own)
            def call(self: Any, *xs: Any, **named: Any) -> Array:
                return self._called(own, xs, named)

            made: Any = cls
            made.__call__ = call
        super().__init_subclass__(**settings)

    def __post_init__(self) -> None:
        for field in self.__dataclass_fields__:
            if field not in ("parent", "name"):
                object.__setattr__(self, field, tuples(getattr(self, field)))
        super().__post_init__()

    @nn.nowrap
    def _called(self, own: Any, xs: Any, named: Any) -> Any:
        return self._cast(own(self, *map(self._cast, xs), **named))

    @nn.nowrap
    def _cast(self, x: Any) -> Any:
        floats = self.dtype is not None and jnp.issubdtype(jnp.result_type(x), jnp.floating)
        return jnp.asarray(x, self.dtype) if floats else x

    @nn.nowrap
    def weight(self, name: str, init: Any, shape: tuple[int, ...]) -> Any:
        """A learned array of this layer, in the dtype that it computes in."""
        # Nothing orthogonal is drawn in less than float32.
        wide = jnp.promote_types(self.param_dtype, jnp.float32)

        def drawn(key: Any) -> Array:
            return jnp.asarray(init(key, shape, wide), self.param_dtype)

        return self._cast(self.param(name, drawn))


class RealLayer(Layer):
    """A layer of real numbers, computed in float32 at least.

    Whole numbers, such as pixels, give float32: their own sums and products go round at the ends of
    their dtype. Half precision is rounded at the end, as torch does it: sums of many entries lose
    their last ones in it, and squares overflow.
    """

    @nn.nowrap
    def _called(self, own: Any, xs: Any, named: Any) -> Any:
        if not xs:
            xs, named = [named["x"]], {n: v for n, v in named.items() if n != "x"}
        given = [self._cast(x) for x in xs]
        y = own(self, *map(_wide, given), **named)
        dtype = jnp.result_type(given[0])
        return y.astype(dtype) if jnp.issubdtype(dtype, jnp.floating) else self._cast(y)


def _wide(x: Any) -> Any:
    dtype = jnp.result_type(x)
    narrow = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
    return jnp.asarray(x, jnp.float32) if narrow or jnp.issubdtype(dtype, jnp.integer) else x
