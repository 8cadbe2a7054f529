"""What each axis of a leaf means: nothing else in fwt guesses."""

import dataclasses
import math
import re
import types
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Literal

from fwt import _tree
from fwt._types import AxesError, FwtError

NORMS = re.compile(r"(^|_)(norm|bn|ln|batchnorm|layernorm)s?(_|\d|$)")
EMBEDDINGS = re.compile(r"(^|_)(emb|embed|embedding|wte|wpe)s?(_|\d|$)")


def _no_kernel(layer: str) -> bool:
    """Whether a layer of this name holds a norm or an embedding."""
    return bool(NORMS.search(layer.lower()) or EMBEDDINGS.search(layer.lower()))


@dataclasses.dataclass(frozen=True)
class Axes:
    """The axes of one leaf.

    Attributes:
        path: where the leaf is, for errors.
        shape: its shape.
        names: one name per axis, or None where nothing is known. ``in`` (or ``i``) and ``out``
            (or ``o``) speak for themselves. Any other name is a spatial axis where both stand
            beside it, and otherwise belongs to the side that is missing: ``"h d out"`` contracts
            heads and head dimension, ``"in h d"`` produces them. ``group`` is an output axis of
            a depthwise kernel, each of whose units has one input.
        transposed: whether it is the kernel of a transposed convolution, whose inputs and outputs
            Keras and torch take for each other.
        groups: of a transposed convolution, in how many groups its inputs and outputs meet.
        turned: whether Flax, too, takes its inputs and outputs for each other when it draws, as
            for ``nn.ConvTranspose(transpose_kernel=True)``.
    """

    path: str
    shape: tuple[int, ...]
    names: tuple[str, ...] | None
    transposed: bool = False
    groups: int = 1
    turned: bool = False

    def _known(self) -> tuple[str, ...]:
        if self.names is None:
            raise AxesError(
                f"{self.path} of shape {self.shape}: nothing says which axis is its input and "
                f"which its output; say so with axes={{{self.path!r}: 'out in h w'}} (one name "
                "per axis, 'in' and 'out' among them)"
            )
        return self.names

    def _where(self, *names: str) -> tuple[int, ...]:
        return tuple(i for i, n in enumerate(self._known()) if n in names)

    @property
    def _others(self) -> tuple[int, ...]:
        return tuple(i for i, n in enumerate(self._known()) if n not in ("in", "i", "out", "o"))

    @property
    def all(self) -> tuple[int, ...]:
        return tuple(range(len(self.shape)))

    @property
    def outputs(self) -> tuple[int, ...]:
        """The axes that count output units."""
        named = self._where("out", "o", "group")
        return named or (self._others if self._where("in", "i") else ())

    @property
    def inputs(self) -> tuple[int, ...]:
        """The axes that count input units (of one group, for a grouped convolution)."""
        if self._where("group"):
            return ()
        named = self._where("in", "i")
        return named or (self._others if self._where("out", "o") else ())

    @property
    def spatial(self) -> tuple[int, ...]:
        """The axes of a kernel's window."""
        return tuple(i for i in range(len(self.shape)) if i not in self.outputs + self.inputs)

    @property
    def reduced(self) -> tuple[int, ...]:
        """All axes but the output's: what a norm per output unit sums over."""
        return tuple(i for i in range(len(self.shape)) if i not in self.outputs)

    def size(self, axes: Sequence[int]) -> int:
        """How many elements these axes hold together."""
        return math.prod(self.shape[i] for i in axes)

    def layout(self, like: Literal["keras", "torch"]) -> tuple[int, ...]:
        """The order of the axes in a framework: torch (out, in, *k), Keras (*k, in, out).

        A transposed convolution has in and out swapped in both.
        """
        self._check_there(like)
        first, second = (
            (self.outputs, self.inputs) if self.transposed else (self.inputs, self.outputs)
        )
        if like == "torch":
            return (*second, *first, *self.spatial)
        return (*self.spatial, *first, *second)

    def _check_there(self, like: Literal["keras", "torch"]) -> None:
        if self.groups > 1 and like == "keras":
            raise AxesError(
                f"{self.path} of shape {self.shape} is of a transposed convolution with groups, "
                "which Keras lacks, so none of its initializers tells how to draw it: take one of "
                "torch's or JAX's"
            )

    def fans(self, like: Literal["keras", "torch"]) -> tuple[int, int]:
        """(fan_in, fan_out) as a framework counts them for the layer that this leaf is of.

        Raises:
            AxesError: where the framework has none.
        """
        if like == "keras" and len(self.shape) < 2:
            size = math.prod(self.shape)
            return size, size
        window = self.size(self.spatial)
        ins, outs = self.size(self.inputs), self.size(self.outputs)
        if "group" in self._known():
            if like == "torch":
                return window, outs * window
            ins = self.size(self._where("group"))
            outs //= ins
        elif not self.inputs or not self.outputs:
            raise AxesError(
                f"{self.path} of shape {self.shape} has no input and output axis, so it has no "
                "fans: take an initializer without them, such as zeros or normal"
            )
        if not self.transposed:
            return ins * window, outs * window
        self._check_there(like)
        # torch keeps (in, out / groups, *k).
        return outs // self.groups * window, ins * self.groups * window


@dataclasses.dataclass(frozen=True)
class Known:
    """What the class of a layer tells of one of its leaves."""

    names: tuple[str, ...] | None = None
    transposed: bool = False
    layer: str = ""
    owner: Any = None  # the layer itself, where there is a module
    groups: int = 1
    turned: bool = False


class KnowsAxes:
    """A module that tells what it knows of its leaves, such as ``fwt.Sequential``."""

    def _known_axes(self, path: str, rank: int) -> Known:
        raise NotImplementedError

    def _flattened_sizes(self) -> dict[str, tuple[int, ...]]:
        raise NotImplementedError


# By path, what a live model's classes tell, set while converters.transform runs.
KNOWN: ContextVar[Mapping[str, Known]] = ContextVar(
    "known axes", default=types.MappingProxyType({})
)


def _rule(path: str, rank: int, layer: str = "") -> tuple[str, ...] | None:
    """What the path alone says; ``layer`` is the class where it is known."""
    parts = [_tree.unescape(p) for p in _tree.split(path)] or [""]
    last, parent = parts[-1], parts[-2] if len(parts) > 1 else ""
    if last == "kernel" and rank == 3 and parent in ("query", "key", "value"):
        return ("in", "heads", "dim")
    if last == "kernel" and rank == 3 and parent in ("out", "attention_output"):
        return ("heads", "dim", "out")
    if last == "bias" and rank == 2 and parent in ("query", "key", "value"):
        return ("out", "out")
    if last == "depthwise_kernel" and rank >= 3:
        return (*("spatial",) * (rank - 2), "group", "out")
    # An einsum's kernel of rank 3 has no window.
    most = 2 if layer and "Conv" not in layer else rank
    if re.fullmatch("(pointwise_|recurrent_)?kernel", last) and 2 <= rank <= most:
        return (*("spatial",) * (rank - 2), "in", "out")
    if re.fullmatch("weight|(in|[qkv])_proj_weight", last) and rank == 2 and not _no_kernel(parent):
        return ("out", "in")
    if re.fullmatch("weight_(ih|hh|hr)(_l[0-9]+)?(_reverse)?", last):
        return ("out", "in")
    if rank == 1:
        return ("out",)
    return None


def axes_of(
    path: str,
    shape: Sequence[int],
    module: Any = None,
    axes: Mapping[str, str] | None = None,
) -> Axes:
    """The axes of the leaf at ``path``: what the user says, then the module, then the path."""
    names: tuple[str, ...] | None = None
    told = known(path, len(shape), module)
    transposed = told.transposed
    for pattern, text in (axes or {}).items():
        if _tree.matches(pattern, path):
            names = tuple(text.split())
            if len(names) != len(shape):
                raise AxesError(
                    f"axes={{{pattern!r}: {text!r}}} names {len(names)} axes, but {path} has shape "
                    f"{tuple(shape)}: give one name for each of its {len(shape)} axes"
                )
            if not {"in", "i", "out", "o"} & set(names):
                raise AxesError(f"axes={{{pattern!r}: {text!r}}} names neither 'in' nor 'out'")
            transposed = told.transposed or _order_is_transposed(names)
    if names is None:
        names = told.names
    if names is None:
        names = _rule(path, len(shape), told.layer)
        transposed = names is not None and _transposed_by_name(path, len(shape))
    if names is not None and len(names) != len(shape):
        names = None
    return Axes(path, tuple(shape), names, transposed, told.groups, told.turned)


def _order_is_transposed(names: tuple[str, ...]) -> bool:
    """Whether this is how Keras or torch lay out a transposed convolution: (*k, out, in) or
    (in, out, *k)."""
    sides = [("in" if n in ("in", "i") else "out") for n in names if n in ("in", "i", "out", "o")]
    if len(names) < 3 or sorted(sides) != ["in", "out"]:
        return False
    first = names[0] in ("in", "i", "out", "o")
    return sides == (["in", "out"] if first else ["out", "in"])


def _transposed_by_name(path: str, rank: int) -> bool:
    parent = (_tree.split(path)[-2:-1] or [""])[0].lower()
    return rank >= 3 and re.search(r"conv(_?\d+_?d)?_?transpose", parent) is not None


def check_used(axes: Mapping[str, str] | None, paths: Sequence[str]) -> None:
    """Each glob of ``axes=`` must speak of some leaf, or it is a typing mistake."""
    for pattern in axes or {}:
        if not any(_tree.matches(pattern, p) for p in paths):
            raise AxesError(
                f"axes={{{pattern!r}: ...}} matches no leaf{_tree.near(pattern, paths)}"
            )


def known(path: str, rank: int, module: Any = None) -> Known:
    """What the live model's classes say of a leaf, or the layers of a Sequential."""
    if path in KNOWN.get():
        return KNOWN.get()[path]
    return module._known_axes(path, rank) if isinstance(module, KnowsAxes) else Known()


def flattened(module: Any) -> dict[str, tuple[int, ...]]:
    """By path of a kernel, the sizes that a Flatten made its inputs of, where a Sequential with an
    ``input_shape`` tells."""
    return module._flattened_sizes() if isinstance(module, KnowsAxes) else {}


@dataclasses.dataclass(frozen=True)
class Role:
    """A ``Where`` by role, written bare or called: ``fwt.kernels``, ``fwt.biases``."""

    name: str

    def __call__(self, *args: Any) -> "Role":
        if args:
            raise FwtError(
                f"{self} is a where, and was called like a function (optax.inject_hyperparams "
                "takes what can be called for a schedule: give it static_args, such as "
                "fwt.optim.sparsify.static_args)"
            )
        return self

    def __str__(self) -> str:
        return f"fwt.{self.name}"

    __repr__ = __str__

    def paths_of(self, shapes: Mapping[str, Any], module: Any) -> list[str]:
        return [p for p, x in shapes.items() if role(p, len(x.shape)) == self.name]


def role(path: str, rank: int) -> str:
    """``kernels``, ``biases`` or ``others`` (norms, embeddings, statistics)."""
    parts = [_tree.unescape(p) for p in _tree.split(path)] or [""]
    last, parent = parts[-1], parts[-2] if len(parts) > 1 else ""
    if rank >= 2 and re.fullmatch(".*kernel(_orig)?", last):
        return "kernels"
    if rank >= 2 and re.fullmatch("weight(_orig|_v|_(ih|hh|hr)(_l[0-9]+)?(_reverse)?)?", last):
        return "others" if _no_kernel(parent) else "kernels"
    if rank >= 2 and last in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
        return "kernels"
    if rank >= 2 and parts[-3:-1] == ["parametrizations", "weight"]:
        return "kernels"  # original, original1; a weight norm's original0 is one number a unit
    if last == "bias" or re.fullmatch("(in_proj_)?bias(_(ih|hh)(_l[0-9]+)?(_reverse)?)?", last):
        return "biases"
    return "others"


kernels = Role("kernels")
biases = Role("biases")
