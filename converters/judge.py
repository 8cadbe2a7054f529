"""Whether two outputs are the same but for rounding, and the inputs that tell models apart.

``verify`` asks it, and ``to_onnx`` before it writes.
"""

import contextlib
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

ROUNDINGS = 10  # how many roundings two equal models may be apart
_VECTOR = 8  # fewer channels say too little of their own scale
_CANCELS = 4  # how much more than measured rounding may move a position
_LEAST = 1e-20  # what is smaller is 0 where a function is saturated
_TOLD = 4  # one row in so many must be told apart from rounding, else nothing is compared


# What torch was told before full_products: what has a setting, its name and its value.
_BEFORE: ContextVar[tuple[tuple[Any, str, Any], ...]] = ContextVar("_BEFORE", default=())


@contextlib.contextmanager
def full_products() -> Iterator[None]:
    """Matrix products and convolutions of float32 are computed in float32, whatever frameworks are
    there: on GPUs and TPUs most round what they multiply to 10 bits or fewer, if not told."""
    torch, tensorflow = sys.modules.get("torch"), sys.modules.get("tensorflow")
    with contextlib.ExitStack() as stack:
        if torch is not None:
            of = torch.backends
            name, value = "fp32_precision", cast(Any, "ieee")
            if hasattr(of.cudnn, "conv"):
                holders = [of.cuda.matmul, of.cudnn.conv, of.cudnn.rnn]
                holders += [of.mkldnn.matmul, of.mkldnn.conv, of.mkldnn.rnn]
            else:  # before 2.9
                name, value = "allow_tf32", False
                holders = [of.cuda.matmul, of.cudnn]
            before = tuple((holder, name, getattr(holder, name)) for holder in holders)
            if not _BEFORE.get():
                stack.callback(_BEFORE.reset, _BEFORE.set(before))
            for holder, _, old in before:
                stack.callback(setattr, holder, name, old)
                setattr(holder, name, value)
        tf: Any = tensorflow and tensorflow.config.experimental
        if tf and tf.tensor_float_32_execution_enabled():
            stack.callback(tf.enable_tensor_float_32_execution, True)
            tf.enable_tensor_float_32_execution(False)
        stack.enter_context(jax.default_matmul_precision("highest"))
        yield


@contextlib.contextmanager
def usual_products() -> Iterator[None]:
    """As torch was told to multiply before :func:`full_products`: torch.export asks in older words,
    which torch refuses to answer beside those."""
    with contextlib.ExitStack() as stack:
        for holder, name, old in _BEFORE.get():
            stack.callback(setattr, holder, name, getattr(holder, name))
            setattr(holder, name, old)
        yield


class Apart(NamedTuple):
    """How far two outputs are from each other.

    Each row of the batch is judged by itself, by its largest value; of an image or a sequence with
    8 channels or more, each position. The last four are of the row that is furthest off, for what
    it is allowed.

    Attributes:
        equal: whether no row is further off than it is allowed, and some row was compared.
        compared: how many numbers were: finite ones, where rounding does not exceed their scale;
            none if rounding exceeds it in three of four rows that are not zero.
        lost: the rows with NaN at one place in both, which is not compared.
        unsure: the rows that are left out, at some position: rounding exceeds their scale, or they
            grow beyond the dtype in both.
        absolute: the largest difference.
        relative: the difference relative to the largest value of the row.
        ulp: the difference in units in the last place of the largest value of the row.
        allowed: how many of these the row is allowed.
        excess: the difference divided by what is allowed.
    """

    equal: bool
    compared: int
    lost: tuple[int, ...]
    absolute: float
    relative: float
    ulp: float
    allowed: float
    excess: float
    unsure: tuple[int, ...] = ()


def apart(
    a: np.ndarray,
    b: np.ndarray,
    noise: Sequence[np.ndarray] = (),
    *,
    eps: float,
    tolerance: float | None = None,
    axis: int = -1,
    clamps: bool = False,
) -> Apart:
    """How far two arrays of one shape (n, ...) are from each other.

    A row is allowed ten roundings of its largest value, and ten times what rounding was measured
    to move it. Whole numbers and booleans are allowed nothing, unless a tolerance is given.

    Args:
        a: an output.
        b: the other output.
        noise: how far rounding moves the outputs of a model, as :func:`rounding` measures it.
        eps: of the dtype that the outputs are computed in.
        tolerance: in place of all this, relative to the largest value of the row.
        clamps: whether one side's functions end at some numbers, as onnxruntime's sigmoid does, so
            that what it gives may be 0 where the other is far below what ordinary inputs give: a
            row is allowed ten roundings of the first one's largest value too.
        axis: where the channels are, whose values at one position have one scale if there are 8
            or more of them.
    """
    if not a.size:
        return Apart(False, 0, (), 0.0, 0.0, 0.0, 0.0, 0.0)
    whole = a.dtype.kind in "iub" and b.dtype.kind in "iub"
    unlike = _vectors(a != b, axis) if whole else 0.0
    a, b = _vectors(a, axis), _vectors(b, axis)
    with np.errstate(all="ignore"):
        unknown = np.isnan(a) & np.isnan(b)
        gap = np.where((a == b) | unknown, 0.0, np.abs(a - b))
        gap = np.maximum(gap, unlike)  # double precision lacks some of 64 bits
        gap = np.where(np.isnan(gap), np.inf, gap)
        # Where both grow beyond the dtype, the order of sums decides which step is the first.
        over = ~np.isfinite(a).all((1, 2)) & ~np.isfinite(b).all((1, 2)) & (not whole)
        over = over[:, None] & (np.isinf(gap)).any(-1)
        gap = np.where(over[..., None], 0, gap)
        largest = np.maximum(np.abs(a), np.abs(b))
        scale = np.max(largest, axis=-1, where=np.isfinite(largest), initial=0.0)
        own = eps * scale
        for one in noise:
            moved = _vectors(one, axis)
            moved = np.max(moved, axis=-1, where=np.isfinite(moved), initial=0.0)
            # At a few positions rounding happens to cancel in part: they get more, but no more
            # than most do.
            most = np.median(moved, 1)[:, None]
            moved = np.maximum(moved, np.minimum(most, _CANCELS * (moved + eps * scale)))
            own = np.maximum(own, eps * scale + moved)
        roundings = 0 if whole else ROUNDINGS
        allowed = roundings * own if tolerance is None else tolerance * scale
        off = np.max(gap, axis=-1)
        if tolerance is None and not whole:
            least = roundings * eps * float(scale[0].max()) if clamps else 0.0
            allowed = np.maximum(allowed, max(least, _LEAST))
        excess = np.where(off > 0, off / allowed, 0.0)
        told = (off <= roundings * eps * scale) | (allowed < scale) | (tolerance is not None)
        told &= ~over
        # Rows of zeros are equal in many models, and so is what few rows come to.
        unsure = tuple(np.flatnonzero((~told & (scale > 0)).any(1)).tolist())
        if not told.all() and _TOLD * np.sum(told & (scale > 0)) <= np.sum(scale > 0):
            told[:] = False
        compared = np.isfinite(a) & np.isfinite(b) & told[..., None]
        worst = np.unravel_index(np.argmax(excess), excess.shape)
        unit = eps * 2.0 ** np.floor(np.log2(scale[worst])) if scale[worst] else eps
    return Apart(
        bool(compared.any() and np.all(excess <= 1)),
        int(compared.sum()),
        tuple(np.flatnonzero(unknown.any((1, 2))).tolist()),
        float(gap.max()),
        float(off[worst] / scale[worst]) if scale[worst] else float(off[worst]),
        float(off[worst] / unit),
        float(allowed[worst] / unit),
        float(excess[worst]),
        unsure,
    )


def _vectors(x: np.ndarray, axis: int) -> np.ndarray:
    """As (rows, positions, numbers of one scale), in double precision."""
    if x.dtype.kind == "c":
        x = np.stack([x.real, x.imag], -1)
    x = np.asarray(x, np.float64).reshape(x.shape or (1,))
    if x.ndim < 3 or x.shape[axis] < _VECTOR:
        return x.reshape(len(x), 1, -1)
    x = np.moveaxis(x, axis, -1)
    return x.reshape(len(x), -1, x.shape[-1])


def eps_of(dtypes: Iterable[Any]) -> float:
    """A rounding of the coarsest of some dtypes; of float32 if none is of floats."""
    found = [float(jnp.finfo(d).eps) for d in dtypes if jnp.issubdtype(d, jnp.floating)]
    return max(found, default=float(np.finfo(np.float32).eps))


def nudged(x: Any, by: float) -> Any:
    """The array, each number made larger or smaller by a part ``by`` of itself; what is no array
    of floats as it is. The same numbers grow each time."""
    if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    x = np.asarray(x)
    if abs(by) < float(jnp.finfo(x.dtype).eps):  # stored with fewer bits than are computed with
        x = x.astype(np.float32)
    grows = np.random.default_rng(x.size).integers(0, 2, x.shape, np.int8)
    return np.asarray(x * np.where(grows, x.dtype.type(1 + by), x.dtype.type(1 - by)))


def unsettled(y: Any, by: Any) -> Any:
    """What a layer is given, :func:`nudged` as the rounding of those before it may; under jit if
    the part is an argument there."""
    if not isinstance(by, jax.core.Tracer):
        return nudged(y, by) if by and not isinstance(y, jax.core.Tracer) else y
    if not hasattr(y, "dtype") or not jnp.issubdtype(y.dtype, jnp.floating):
        return y
    mixed = jax.lax.iota(jnp.uint32, y.size) * np.uint32(2654435769)
    mixed = (mixed ^ mixed >> 15) * np.uint32(2246822519)
    signs = 1 - 2 * (mixed >> 31).astype(jnp.promote_types(y.dtype, np.float32))
    part = by * signs.reshape(y.shape)
    return y * (1 + part).astype(y.dtype)


@contextlib.contextmanager
def between_layers(by: Any) -> Iterator[None]:
    """What is given to each linen module is :func:`nudged`: two layers may round a constant image
    in other ways, though no change of inputs that are zero shows it."""

    def each(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name == "__call__":
            args = tuple(unsettled(a, by) for a in args)
        return call(*args, **kwargs)

    with nn.intercept_methods(each):
        yield


def rounding(run: Callable[[float], Any], before: Any, eps: float) -> list[np.ndarray]:
    """How far rounding moves each output of a model, measured.

    The inputs, what layers are given, and weights are moved a little, once forth and once back.
    What does not cancel in the sum of both changes is no smooth function of them: it is the
    rounding of the model's own computation. To this comes how far a rounding of each of them moves
    the outputs.

    Args:
        run: the outputs of the model whose inputs, weights and values between layers are
            :func:`nudged` by a part.
        before: the outputs as they are.
        eps: of the dtype that it computes in.
    """
    by = math.sqrt(eps) / 8
    found = []
    with np.errstate(all="ignore"):
        for up, down, now in zip(run(by), run(-by), before, strict=True):
            wide = np.result_type(np.asarray(now).dtype, np.float32)
            forth, back = (np.subtract(v, now, dtype=wide) for v in (up, down))
            found.append(np.abs(forth + back) / 2 + np.abs(forth - back) * wide.type(eps / by / 2))
    return found


LARGE = 1 << 16  # numbers in an example that is so large that models are run on few of them
FEW = [0, 1, 4]  # of numbers(): ordinary ones, half of them zero, large ones


def numbers(sizes: Sequence[int], half: bool = False, seed: int = 0) -> np.ndarray:
    """Inputs (8, ...) of float32 that reach where functions part: ordinary ones, then ones of
    which half is zero, all zeros, ones, large, the same negated, small ones, all magnitudes.

    Args:
        sizes: of one input.
        half: whether a model of half precision takes them, whose numbers end at 65504.
        seed: another for each input of a model, so that two of one shape are told apart.
    """
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(8, *sizes))
    if sizes:
        rows[1, sizes[0] - sizes[0] // 2 :] = 0  # as padding is
    rows[2], rows[3] = 0, 1
    rows[4] *= 10 if half else 100
    rows[5] = -rows[4]
    rows[6] *= 1e-2
    count, end = math.prod(sizes), 3 if half else 8
    spread = 10.0 ** (np.linspace(end, -end, count) if count > 1 else np.full(count, end))
    rows[7] = rng.permutation(spread * (-1) ** np.arange(count)).reshape(sizes)
    return rows.astype(np.float32)


def whole_numbers(count: int, sizes: Sequence[int], all_of: Any = (), seed: int = 0) -> np.ndarray:
    """Inputs (n, ...) of int32 below ``count``: any, any of which half is zero, all zeros, the
    largest, and then rows with all of the given ones."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, count, (4, *sizes))
    if sizes:
        rows[1, sizes[0] - sizes[0] // 2 :] = 0
    rows[2], rows[3] = 0, count - 1
    each = np.asarray(all_of, rows.dtype)
    more = np.resize(each, (math.ceil(len(each) / max(math.prod(sizes), 1)), *sizes))
    return np.concatenate([rows, more]).astype(np.int32)
