"""Patterns: which weights stand or fall together."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp

from fwt import _tree
from fwt._axes import Axes
from fwt._errors import INJECTED
from fwt._live import KNOWN
from fwt._types import Array, AxesError, FwtError, LeafError, noun

__all__ = ["block", "channel", "n_m", "unstructured"]

Pool = Literal["mean", "max", "sum", "l2"]


@dataclasses.dataclass(frozen=True)
class Windows:
    """The pattern on one leaf: windows of one size that tile it, each pruned as a whole."""

    window: tuple[int, ...]
    pool: Pool

    def _split(self, x: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
        shape = [n for s, w in zip(x.shape, self.window, strict=True) for n in (s // w, w)]
        return tuple(shape), tuple(range(1, len(shape), 2))

    def pooled(self, worth: Array) -> Array:
        """One worth a window, in float32 or wider; a NaN makes its window NaN."""
        shape, inner = self._split(worth)
        x = worth.astype(_tree.wide_dtype(worth.dtype)).reshape(shape)
        if self.pool == "max":
            return jnp.max(x, inner)
        if self.pool == "l2":
            most = jnp.max(jnp.abs(x), inner, keepdims=True)
            unit = jnp.where((most > 0) & (most < jnp.inf), most, 1)  # squares may overflow
            return jnp.squeeze(unit, inner) * jnp.sqrt(jnp.sum((x / unit) ** 2, inner))
        return jnp.mean(x, inner) if self.pool == "mean" else jnp.sum(x, inner)

    def spread(self, mask: Array) -> Array:
        """The mask of the windows as one of the weights."""
        pairs = list(zip(mask.shape, self.window, strict=True))
        parts = mask.reshape([n for m, _ in pairs for n in (m, 1)])
        full = jnp.broadcast_to(parts, [n for pair in pairs for n in pair])
        return full.reshape([m * w for m, w in pairs])


@dataclasses.dataclass(frozen=True)
class Groups:
    """The pattern on one leaf: in each group of ``m`` along ``axes``, all but ``n`` may go.

    ``factors`` and ``order`` read the one input axis as several, in another order.
    """

    n: int
    m: int
    axes: tuple[int, ...]
    factors: tuple[int, ...] = ()
    order: tuple[int, ...] = ()

    def candidates(self, keys: Array, last: bool = False) -> Array:
        """True where a weight is among the ``m - n`` least of its group.

        Among equals the first are kept, or the last ones if ``last``.
        """
        x, back = self._grouped(keys)
        parts = [x[:, i] for i in range(self.m)]
        beaten = [jnp.zeros(parts[0].shape, jnp.uint8) for _ in parts]
        for j in range(self.m):
            for i in range(j):  # i comes before j
                first = parts[i] > parts[j] if last else parts[i] >= parts[j]
                beaten[j] = beaten[j] + first
                beaten[i] = beaten[i] + ~first
        return back(jnp.stack([b >= self.n for b in beaten], 1))

    def _grouped(self, keys: Array) -> tuple[Array, Any]:
        """The keys as (groups, m, rest), and the way back."""
        rest = tuple(a for a in range(keys.ndim) if a not in self.axes)
        first, last = self.axes[0], self.axes[-1]
        plain = not self.factors and self.axes == tuple(range(first, last + 1))
        moved = keys if plain else keys.transpose(*self.axes, *rest)
        if plain:
            size, others = math.prod(keys.shape[: last + 1]), math.prod(keys.shape[last + 1 :])
            shape = (size // self.m, self.m, others)
            return keys.reshape(shape), lambda mask: mask.reshape(keys.shape)
        inputs = self.factors or (math.prod(moved.shape[: len(self.axes)]),)
        flat = (*inputs, math.prod(moved.shape[len(self.axes) :]))
        turn = (*self.order, len(self.factors)) if self.factors else (0, 1)
        inner = moved.reshape(flat).transpose(turn)
        undo = tuple(sorted(range(len(turn)), key=turn.__getitem__))

        def back(mask: Array) -> Array:
            out = mask.reshape(inner.shape).transpose(undo).reshape(moved.shape)
            places = (*self.axes, *rest)
            return out.transpose(sorted(range(out.ndim), key=places.__getitem__))

        groups = inner.size // (self.m * max(inner.shape[-1], 1))
        return inner.reshape(groups, self.m, inner.shape[-1]), back


class IndivisibleError(LeafError):
    """A leaf that the pattern does not tile: what is said of it, without the way out."""


@dataclasses.dataclass(frozen=True)
class Pattern:
    """A pattern with its settings.

    Attributes:
        name: "unstructured", "n_m", "block" or "channel".
        settings: the arguments, sorted by name.
    """

    name: str
    settings: tuple[tuple[str, Any], ...] = ()

    def __call__(self, *args: Any) -> "Pattern":
        if args:
            raise FwtError(f"{self!r} is a pattern, and was called like a function: {INJECTED}")
        return self

    def __repr__(self) -> str:
        said: dict[str, Any] = dict(self.settings)
        first = [repr(said.pop(k)) for k in ("n", "m", "shape", "axis") if k in said]
        if said.get("flattened"):
            said["flattened"] = dict(said["flattened"])
        more = [f"{k}={v!r}" for k, v in said.items() if v not in (None, (), "mean")]
        arguments = f"({', '.join(first + more)})" if self.settings else ""
        return f"fwt.patterns.{self.name}{arguments}"

    def fits(
        self, places: Sequence[Axes], flattened: Mapping[str, Any]
    ) -> list[Windows | Groups | None]:
        """The pattern on each leaf.

        Raises:
            LeafError: if it does not tile some of them, with the ``where`` that leaves them out; or
                if a glob of the setting ``flattened`` names none of them.
        """
        found, wrong = [], {}
        kind: type[FwtError] = LeafError
        paths = [axes.path for axes in places]
        for glob, sizes in dict(self.settings).get("flattened", ()):
            hits = _tree.named(glob, paths)
            if not hits:
                raise LeafError(
                    f"flattened={{{glob!r}: ...}} matches no selected leaf{_tree.near(glob, paths)}"
                )
            flattened = {**flattened, **dict.fromkeys(hits, sizes)}
        for axes in places:
            try:
                found.append(self.on(axes, flattened))
            except (IndivisibleError, _NoAxisError) as error:
                kind = AxesError if isinstance(error, _NoAxisError) else kind
                wrong[axes.path] = str(error)
        if wrong:
            left = [axes.path for axes in places if axes.path not in wrong]
            way = f"leave {'it' if len(wrong) == 1 else 'them'} out with where={left!r}"
            if not left:
                way = "no leaf is left"
            if not left and KNOWN.get() and dict(self.settings).get("axis") == "heads":
                way += (
                    ". Those of the Model that from_torch gives have heads, and "
                    "net.load_state_dict(converters.to_torch(model).state_dict()) takes it back"
                )
            said = "; ".join(list(wrong.values())[:5]) + ("; ..." if len(wrong) > 5 else "")
            raise kind(f"{self!r}: {said}: {way}")
        return found

    def on(self, axes: Axes, flattened: Mapping[str, Any]) -> Windows | Groups | None:
        """The pattern on one leaf; None where each weight is for itself.

        Args:
            axes: what its axes mean; not asked by ``unstructured``.
            flattened: by path, the (h, w, c) that a Flatten before the leaf made its inputs of.

        Raises:
            IndivisibleError: for a leaf that it does not tile.
            AxesError: if nothing tells the axes.
        """
        settings: dict[str, Any] = dict(self.settings)
        if axes.stack and self.name != "unstructured":
            sizes = settings.get("shape", ())
            if len(sizes) == len(axes.shape) and all(sizes[i] == 1 for i in axes.stack):
                kept = tuple(s for i, s in enumerate(sizes) if i not in axes.stack)
                return block(kept, pool=settings["pool"]).on(axes, flattened)
            return _stacked(self.on(axes.one, flattened), axes)
        if self.name == "block":
            return _on_block(axes, **settings)
        if self.name == "channel":
            return _on_channel(axes, **settings)
        return _on_groups(axes, flattened, **settings) if self.name == "n_m" else None


def _stacked(fit: Windows | Groups | None, axes: Axes) -> Windows | Groups | None:
    """The pattern of each slice of a stack, on the whole of it."""
    kept = [i for i in axes.all if i not in axes.stack]
    if isinstance(fit, Groups):
        return dataclasses.replace(fit, axes=tuple(kept[i] for i in fit.axes))
    if fit is None:
        return None
    window = dict(zip(kept, fit.window, strict=True))
    return dataclasses.replace(fit, window=tuple(window.get(i, 1) for i in axes.all))


def _whole(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise FwtError(f"{name} must be a whole number of at least {least}, found {value!r}")
    return value


def _pool(pool: Any) -> Pool:
    if pool not in ("mean", "max", "sum", "l2"):
        raise FwtError(f"pool must be 'mean', 'max', 'sum' or 'l2', found {pool!r}")
    return pool


unstructured = Pattern("unstructured")
"""Each weight for itself."""


def n_m(n: int, m: int, *, order: str | None = None, flattened: Any = None) -> Pattern:
    """Of every ``m`` weights in a row along the input axis, ``n`` are kept.

    Without a sparsity every group is cut down to ``n``. A sparsity below ``1 - n/m`` (a schedule
    that rises to it, say) prunes only the least of what may go. NVIDIA's sparse tensor cores take
    2:4 (Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021).

    Args:
        n: how many of each group are kept, 1 to ``m - 1``.
        m: the size of a group.
        order: how the kernel behind a Flatten counts its inputs: None as it stands; "chw" groups
            them in torch's order instead, "hwc" in Keras's and Flax's. A group that is valid in
            one is not in the other.
        flattened: ``{glob: sizes}`` for kernels behind a Flatten, their inputs' (height, width,
            channels) as the kernel counts them. A Model whose module is a :class:`fwt.Sequential`
            with an ``input_shape`` tells it by itself.

    Returns:
        A pattern for :func:`fwt.prune`, :func:`fwt.masks` and :func:`fwt.optim.sparsify`.

    Raises:
        FwtError: unless 0 < n < m.
        LeafError: in use, for a leaf whose inputs ``m`` does not divide; it names the ``where``
            that leaves it out.

    Example:
        >>> import fwt, numpy as np
        >>> params = {"d": {"kernel": np.array([[1.0], [4.0], [-3.0], [2.0]], np.float32)}}
        >>> fwt.prune(pattern=n_m(2, 4))(params)["d"]["kernel"].tolist()
        [[0.0], [4.0], [-3.0], [0.0]]
    """
    _whole("n", n, 1), _whole("m", m, 2)
    if n >= m or m > 255:
        raise FwtError(f"n_m keeps n of every m, 0 < n < m < 256; found n={n}, m={m}")
    if order is not None and (not isinstance(order, str) or order not in ("chw", "hwc")):
        raise FwtError(f"order must be None, 'chw' or 'hwc', found {order!r}")
    sizes: tuple[Any, ...] = ()
    for glob, each in dict(flattened or {}).items():
        if not isinstance(each, tuple | list) or len(each) < 2:
            raise FwtError(f"flattened={{{glob!r}: ...}} must be sizes (h, w, c), found {each!r}")
        sizes += ((glob, tuple(int(s) for s in each)),)
    return Pattern("n_m", (("flattened", sizes), ("m", m), ("n", n), ("order", order)))


def _on_groups(axes: Axes, told: Mapping[str, Any], n: int, m: int, order: Any, **_: Any) -> Groups:
    if order is not None and axes.path in KNOWN.get():
        raise FwtError(
            f"{axes.path}: order={order!r} is for kernels as Flax counts them, and that of a live "
            "model is grouped as its framework counts it: leave order= out of a torch model, and "
            "prune the Model that from_keras gives of a Keras model that goes to torch"
        )
    size = axes.size(axes.inputs)
    if not axes.inputs or size % m:
        raise IndivisibleError(
            f"{axes.path} of shape {axes.shape} has {size if axes.inputs else 'no'} inputs, which "
            f"{m} does not divide"
        )
    factors = told.get(axes.path, ())
    if order in (None, "hwc") or not factors:
        return Groups(n, m, axes.inputs)
    if math.prod(factors) != size:
        raise LeafError(
            f"{axes.path} has {size} inputs, which are not {' x '.join(map(str, factors))}"
        )
    last = len(factors) - 1
    return Groups(n, m, axes.inputs, tuple(factors), (last, *range(last)))


def block(shape: tuple[int, ...], *, pool: Pool = "mean") -> Pattern:
    """Blocks of weights that are pruned as one.

    Args:
        shape: (inputs, outputs) of a block; or one size for each axis of the leaf, with or
            without those of a stack of layers, which are 1.
        pool: what a block is worth: the "mean", "max", "sum" or "l2" norm of its scores.

    Returns:
        A pattern; sparsity counts blocks.

    Raises:
        LeafError: in use, for a leaf that the blocks do not tile; it names the ``where`` that
            leaves it out.

    Example:
        >>> import fwt, numpy as np
        >>> params = {"d": {"kernel": np.array([[1.0, 5.0], [2.0, 0.0]], np.float32)}}
        >>> fwt.prune(0.5, pattern=block((2, 1)))(params)["d"]["kernel"].tolist()
        [[0.0, 5.0], [0.0, 0.0]]
    """
    if not isinstance(shape, tuple | list) or len(shape) < 2:
        raise FwtError(f"block takes a shape such as (4, 1), inputs by outputs; found {shape!r}")
    sizes = tuple(_whole("a size of block", s, 1) for s in shape)
    return Pattern("block", (("pool", _pool(pool)), ("shape", sizes)))


def _on_block(axes: Axes, shape: tuple[int, ...], pool: Pool) -> Windows:
    window = [1] * len(axes.shape)
    if len(shape) == 2:
        for side, size, places in zip(("input", "output"), shape, (axes.inputs, axes.outputs)):
            if size > 1 and len(places) != 1:
                raise AxesError(
                    f"{axes.path} of shape {axes.shape} has {len(places)} {side} axes, so a block "
                    f"of two sizes does not fit: give one size for each of its axes"
                )
            if size > 1:
                window[places[0]] = size
    elif len(shape) == len(window):
        window = list(shape)
    else:
        raise IndivisibleError(
            f"{axes.path} of shape {axes.shape} has {len(window)} axes, the block {len(shape)}"
        )
    if any(s % w for s, w in zip(axes.shape, window, strict=True)):
        raise IndivisibleError(
            f"{axes.path} of shape {axes.shape} is not tiled by blocks of {tuple(window)}"
        )
    return Windows(tuple(window), pool)


@noun
def channel(axis: str = "out", *, pool: Pool = "mean") -> Pattern:
    """Whole units: channels of a convolution, neurons; all weights of one stand or fall.

    Args:
        axis: "out", "in", or the name of an axis. With "heads", a head goes from the query, key,
            value and out of an attention together, by what it is worth in all that are selected.
        pool: what a unit is worth: the "mean", "max", "sum" or "l2" norm of its scores.

    Returns:
        A pattern, which may be written bare; sparsity counts units. Biases and norms behind a
        unit stay as they are.

    Raises:
        AxesError: in use, for a leaf without such an axis.

    Example:
        >>> import fwt, numpy as np
        >>> params = {"d": {"kernel": np.array([[1.0, 5.0], [2.0, 0.0]], np.float32)}}
        >>> fwt.prune(0.5, pattern=channel)(params)["d"]["kernel"].tolist()
        [[0.0, 5.0], [0.0, 0.0]]
    """
    if not isinstance(axis, str):
        raise FwtError(f"axis must be 'out', 'in' or the name of an axis, found {axis!r}")
    return Pattern("channel", (("axis", axis), ("pool", _pool(pool))))


class _NoAxisError(AxesError):
    """A leaf has no axis of the name that a pattern asks for."""


def _on_channel(axes: Axes, axis: str = "out", pool: Pool = "mean") -> Windows:
    sides = {"out": axes.outputs, "in": axes.inputs}
    named = tuple(i for i, n in enumerate(axes.names or ()) if n == axis)
    places = sides.get(axis, ()) or named
    if not places:
        raise _NoAxisError(
            f"{axes.path} of shape {axes.shape} has no axis {axis!r}: its axes are "
            f"{' '.join(axes.names or ())!r}"
        )
    # The window of an empty axis is 1, so that there is no window at all.
    return Windows(tuple(1 if i in places else max(s, 1) for i, s in enumerate(axes.shape)), pool)
