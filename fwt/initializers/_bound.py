"""What an initializer of any of the three namespaces is."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fwt import _keys, _tree
from fwt._axes import Axes
from fwt._modules import plain
from fwt._types import Array, AxesError, FwtError


class Each(NamedTuple):
    """How numbers are drawn each by itself, from the key and its flat index alone.

    Attributes:
        draw: ``(key, shape, dtype, *fixed, *numbers) -> array``.
        numbers: what may differ between leaves that are drawn together, such as a deviation.
        fixed: what may not.
    """

    draw: Callable[..., Array]
    numbers: tuple[Any, ...] = ()
    fixed: tuple[Any, ...] = ()

    def __call__(self, key: Any, shape: tuple[int, ...], dtype: Any) -> Array:
        held = [jnp.asarray(n, dtype) for n in self.numbers]
        key = _keys.quick(key, math.prod(shape))
        return collapsed(shape, lambda s: self.draw(key, s, dtype, *self.fixed, *held))


@dataclasses.dataclass(frozen=True)
class Bound:
    """One initializer with its settings: hashable, comparable, picklable. It draws in float32 at
    least, since half precision has few numbers and many exact zeros, and rounds to the dtype.

    Attributes:
        name: its name in its namespace.
        function: ``(key, shape, dtype, axes, **settings) -> array``, or, of numbers that are
            drawn each by itself, ``(dtype, axes, **settings) -> Each``.
        settings: the arguments.
        axes: of the leaf that it is for; None reads a shape as (..., in, out), as JAX does.
        whole: whether the axes don't matter, so that a stack of layers is no different from one.
    """

    name: str
    function: Callable[..., Any]
    settings: tuple[tuple[str, Any], ...] = ()
    axes: Axes | None = None
    whole: bool = False

    @property
    def each(self) -> bool:
        """Whether the function gives an :class:`Each`."""
        return self.function in _GIVE_EACH

    def __call__(self, key: Any = None, shape: Any = None, dtype: Any = jnp.float32) -> Any:
        if shape is None and key is None:  # a noun may be written bare or called
            return self
        if shape is None:
            way = ""
            if isinstance(key, tuple):
                way = (
                    "; for a layer of Keras, build the model with any initializer and call "
                    "converters.transform(model, fwt.initialize(..., key=0))"
                )
            raise TypeError(
                f"{self.name}(key, shape, dtype) needs a shape, found only {key!r}{way}"
            )
        if isinstance(key, int):
            key = _keys.one_key(key)
        if 0 in shape:  # no numbers to draw, and no fan to divide by
            return jnp.zeros(shape, dtype)
        axes = self.axes
        if axes is None:
            axes = plain_axes(self.name, tuple(shape))
        dtype = jnp.dtype(dtype)
        _tree.refuse_scales(axes.path, dtype)
        settings = dict(self.settings)
        for name in {"value", "val"} & set(settings):
            _check_holds(dtype, settings[name])
        drawn = jnp.dtype(jnp.float32) if _tree.is_narrow(dtype) else dtype

        def draw(key: Any, shape: tuple[int, ...], axes: Axes) -> Any:
            if self.each:
                return self.function(drawn, axes, **settings)(key, shape, drawn)
            return self.function(key, shape, drawn, axes, **settings)

        if axes.stack and not self.whole:
            one = axes.one
            value = _stacked(lambda k: draw(k, one.shape, one), key, axes)
        else:
            value = draw(key, tuple(shape), axes)
        return value if drawn == dtype else _tree.rounded(value, dtype)

    def by_itself(self, axes: Axes, dtype: Any) -> Each | None:
        """How each number of a leaf is drawn by itself; None if it is not, or a slice is."""
        if not self.each or (axes.stack and not self.whole):
            return None
        return self.function(dtype, axes, **dict(self.settings))

    def at(self, axes: Axes | None) -> "Bound":
        """The same initializer for a leaf with these axes."""
        return dataclasses.replace(self, axes=axes and axes.drawn_by(self._library))

    @property
    def _library(self) -> Any:
        """The framework whose initializer it is; of JAX's, Flax."""
        name = self.function.__module__.rpartition(".")[2]
        return name if name in ("keras", "torch") else "flax"

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{n}={v!r}' for n, v in self.settings)})"


def _check_holds(dtype: Any, value: Any) -> None:
    """Raises for a constant that would become another number, but by rounding."""
    if any(map(is_traced, jax.tree.leaves(value))):
        return
    x = np.asarray(value)
    fits = np.bool_(True)
    if jnp.issubdtype(dtype, jnp.integer) and x.dtype.kind != "c":
        info = jnp.iinfo(dtype)
        fits = (x == np.floor(x)) & (x >= info.min) & (x <= info.max)
    elif jnp.issubdtype(dtype, jnp.floating) and x.dtype.kind != "c":
        with np.errstate(over="ignore", invalid="ignore"):
            there = x.astype(dtype).astype(float)
        fits = np.isfinite(x) == np.isfinite(there)
        fits &= np.isnan(x) == np.isnan(there)
    if not fits.all():
        raise ValueError(f"{value} is out of what {dtype} can hold")


def _stacked(draw: Callable[[Any], Any], key: Any, axes: Axes) -> Any:
    """Each slice of a stack, drawn by itself from a key folded from its number."""
    sizes = tuple(axes.shape[i] for i in axes.stack)
    if key is None:
        new = jnp.broadcast_to(draw(None), (*sizes, *axes.one.shape))
    else:
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(math.prod(sizes)))
        new = jax.vmap(draw)(keys).reshape(*sizes, *axes.one.shape)
    return jnp.moveaxis(new, range(len(sizes)), axes.stack)


def plain_axes(name: str, shape: tuple[int, ...]) -> Axes:
    """(..., in, out), as every JAX initializer reads a shape."""
    return Axes(name, shape, plain(len(shape)))


_GIVE_EACH: set[Any] = set()


def gives_each(function: Callable[..., Each]) -> Callable[..., Each]:
    """Marks a function that gives an :class:`Each`."""
    _GIVE_EACH.add(function)
    return function


def bound(function: Callable[..., Any], *, whole: bool = False, **settings: Any) -> Bound:
    """A Bound named after its function, ``_normal`` for ``normal``."""
    frozen = tuple((name, _frozen(value)) for name, value in settings.items())
    return Bound(function.__name__.removeprefix("_"), function, frozen, whole=whole)


def _frozen(value: Any) -> Any:
    """Arrays as nested tuples, so that the initializer can be hashed."""
    listed = value.tolist() if hasattr(value, "tolist") and not is_traced(value) else value
    return tuple(map(_frozen, listed)) if isinstance(listed, list | tuple) else listed


def is_traced(value: Any) -> bool:
    return isinstance(value, jax.core.Tracer)


def number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> Any:
    """A setting that must be a number, checked at once."""
    if is_traced(value):
        return value
    if (
        isinstance(value, bool)
        or not hasattr(value, "__float__")
        or not low <= float(value) <= high
    ):
        limit = "" if low == -math.inf else f" of at least {low:g}"
        limit += "" if high == math.inf else f" and at most {high:g}"
        raise FwtError(f"{name} must be a number{limit}, found {value!r}")
    return value


def numbers(name: str, value: Any) -> Any:
    """A setting that must be a number or an array of them."""
    if not is_traced(value) and np.asarray(value).dtype.kind not in "biufcV":
        raise FwtError(f"{name} must be a number or an array of them, found {value!r}")
    return value


def choice(name: str, value: Any, among: Sequence[str]) -> Any:
    if value not in among:
        raise FwtError(f"{name} must be one of {', '.join(map(repr, among))}; found {value!r}")
    return value


def floating(name: str, dtype: Any) -> None:
    """Raises for what can't hold a drawn number."""
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{name} draws floating numbers, found {dtype}")


def collapsed(shape: tuple[int, ...], draw: Callable[[tuple[int, ...]], Any]) -> Any:
    """What ``draw`` gives for a shape, drawn with fewer axes where there are many.

    The numbers are the same, for they depend on flat indices alone, but XLA's CPU backend takes
    seconds to compile random bits of rank 5. The last axis stays, as it is often a sharded one.
    """
    if len(shape) < 4:
        return draw(shape)
    return draw((math.prod(shape[:-1]), shape[-1])).reshape(shape)


def shifted_normal(key: Any, shape: tuple[int, ...], dtype: Any, mean: Any, std: Any) -> Array:
    """Normal numbers, not cut."""
    return mean + std * jax.random.normal(key, shape, dtype)


def as_matrix(
    draw: Callable[[tuple[int, int]], Any], axes: Axes, order: tuple[int, ...], cut: int
) -> Any:
    """A leaf whose axes in ``order``, the first ``cut`` as rows, are the matrix that is drawn."""
    sizes = tuple(axes.shape[i] for i in order)
    flat = draw((math.prod(sizes[:cut]), math.prod(sizes[cut:])))
    return in_layout(flat.reshape(sizes), order)


def in_layout(value: Any, order: tuple[int, ...]) -> Any:
    """An array whose axes are those of a leaf in ``order``, in the leaf's own order."""
    return value.transpose([order.index(i) for i in range(len(order))])


def no_matrix(name: str, axes: Axes, need: str) -> AxesError:
    return AxesError(f"{axes.path} of shape {axes.shape}: {name} is for {need}")
