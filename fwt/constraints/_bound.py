"""What a constraint is, and the checks of its settings."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from fwt import _mesh, _paths, _tree
from fwt._axes import Axes, words
from fwt._types import AxesError, FwtError
from fwt.constraints import _vectors
from fwt.selection import keys

Kind = Literal["projection", "retraction", "normalisation"]
Support = Literal["plain", "mask", None]
_NEAR = 1 << 18  # so many numbers take NumPy less than a millisecond


@dataclasses.dataclass(frozen=True)
class Bound:
    """One constraint with its settings.

    Attributes:
        name: its name in ``fwt.constraints``.
        kind: "projection", "retraction" or "normalisation".
        support: how masks work: "plain" where pruned zeros stay zero by themselves, "mask" where
            the function takes the mask, None where they would be refilled.
        settings: the arguments, sorted by name.
    """

    name: str
    kind: Kind
    support: Support
    function: Callable[..., Any]
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def keeps_zeros(self) -> bool:
        return self.support is not None

    def __call__(self, leaf: Any, axes: Axes | str | None = None, mask: Any = None) -> Any:
        if home := _paths.foreign(leaf):
            raise TypeError(
                f"fwt.constraints.{self.name} takes JAX and NumPy arrays, found a "
                f"{type(leaf).__name__} of {home}: converters.transform(model, "
                f"fwt.project(fwt.constraints.{self.name}(...))) constrains a live model, after "
                "each step of its training too, as the guide's page on live models shows"
            )
        if not isinstance(axes, Axes):
            axes = _named(axes, jnp.shape(leaf))
        return _mesh.like(self._computed(leaf, axes, mask, dict(self.settings)), leaf)

    def on_host(self, leaf: Any, axes: Axes, mask: Any = None) -> Any:
        """The same in NumPy of a leaf that is sooner done than a program is compiled; else None."""
        near = all(map(keys.is_near, (leaf,) if mask is None else (leaf, mask)))
        if not near or self.function not in _vectors.NORMS or leaf.size > _NEAR:
            return None
        if axes.doubted or axes.stack:
            return None
        if not jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.dtype.itemsize not in (2, 4):
            return None
        given, zero = np.asarray(leaf), np.zeros((), leaf.dtype)
        given = given if mask is None else np.where(mask, given, zero)
        with np.errstate(all="ignore"):
            new = self.function(given, axes, **dict(self.settings))
        return jnp.asarray(new if mask is None else np.where(mask, new, zero))

    @_mesh.on_auto_axes
    def _computed(self, leaf: Any, axes: Axes, mask: Any, settings: dict[str, Any]) -> Any:
        # Axes that are given by number are those of the leaf, and bounds broadcast to all of it.
        numbered = isinstance(settings.get("axis"), tuple) or self.name in ("box", "non_negative")
        if not numbered and self.name not in ("hypercube", "linf_ball"):
            axes.settled()
        if axes.stack and not numbered:
            one = axes.one
            masks = [] if mask is None else [jnp.broadcast_to(mask, axes.shape)]
            return axes.each(
                lambda x, *m: self._computed(x, one, m[0] if m else None, settings), leaf, *masks
            )
        if mask is not None and self.support is None:
            raise FwtError(f"{self.name} would refill what a mask prunes")
        if mask is not None and self.support == "mask":
            settings = {**settings, "mask": mask}
        _tree.refuse_scales(axes.path, leaf.dtype)
        # JAX computes nothing with 8-bit floats.
        tiny = jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize == 1
        given = jnp.asarray(leaf).astype(jnp.float32) if tiny else jnp.asarray(leaf)
        if mask is not None:
            given = jnp.where(mask, given, jnp.zeros((), given.dtype))
        new = self.function(given, axes, **settings)
        return _tree.rounded(new, leaf.dtype) if tiny else new


def _named(text: Any, shape: tuple[int, ...]) -> Axes:
    if not isinstance(text, str):
        return Axes("the leaf", shape, None)
    names = words(text, f"{text!r}")
    if len(names) != len(shape):
        raise AxesError(f"{text!r} names {len(names)} axes, but the leaf has shape {shape}")
    return Axes("the leaf", shape, names)


def _frozen(value: Any) -> Any:
    """Arrays of some thousand numbers as tuples, so that the constraint can be hashed."""
    concrete = isinstance(value, np.ndarray | np.generic | jax.Array)
    if not concrete or isinstance(value, jax.core.Tracer) or value.size > 10_000:
        return value
    return _tuples(np.asarray(value).tolist())


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def check(
    name: str, value: Any, low: float, high: float = float("inf"), arrays: bool = False
) -> None:
    """Numbers are checked at once; traced and array settings can't be, but an array must not stand
    for one number unless the constraint takes ``arrays``."""
    if isinstance(value, jax.Array | np.ndarray):
        if value.ndim and not arrays:
            raise FwtError(
                f"{name} must be one number, the same for each vector, found an array of shape "
                f"{value.shape}: give one number, or one constraint with its own where= for each"
            )
        return
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise FwtError(f"{name} must be a number, found {value!r}")
    if not low <= value <= high or (np.isinf(value) and low > float("-inf")):
        limit = f"finite, at least {low:g}" if high == float("inf") else f"{low:g} to {high:g}"
        raise FwtError(f"{name} must be {limit}, found {value}")


def whole(name: str, value: Any, low: int, high: int | None = None) -> None:
    wrong = isinstance(value, bool) or not isinstance(value, int | np.integer)
    if wrong or value < low or (high is not None and value > high):
        limit = f"at least {low}" if high is None else f"{low} to {high}"
        raise FwtError(f"{name} must be a whole number of {limit}, found {value!r}")


def bound(function: Callable[..., Any], kind: Kind, support: Support, **settings: Any) -> Bound:
    """A Bound named after its function, ``_symmetric`` for ``symmetric``."""
    axis = settings.get("axis")
    if "axis" in settings:
        listed = axis if isinstance(axis, Sequence) and not isinstance(axis, str) else [axis]
        numbers = all(isinstance(a, int | np.integer) and not isinstance(a, bool) for a in listed)
        if axis not in (None, "all") and not numbers:
            raise FwtError(f'axis must be a number, several, None or "all", found {axis!r}')
        settings["axis"] = axis if axis in (None, "all") else tuple(map(int, listed))
    settings = {n: _frozen(v) for n, v in settings.items()}
    name = function.__name__.removeprefix("_")
    return Bound(name, kind, support, function, tuple(sorted(settings.items())))
