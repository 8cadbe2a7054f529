"""What each axis of a leaf means: nothing else in fwt guesses."""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from fwt import _live, _mesh, _modules, _paths, _rules, _tree
from fwt._errors import INJECTED
from fwt._modules import Known as Known
from fwt._types import AxesError, FwtError

_SIDES = ("in", "i", "out", "o")
# What may stand beside both sides: the axes of a window, and those of attention.
_WINDOW = re.compile(
    r"[hwdktxyzpqruv]\d*|k_?[hwdt]|(spatial|kernel|window)(_?\w)?|height|width|time|length|"
    "heads?|dim|head_dim"
)
_LOCAL = re.compile(r"((?!Scan|Vmap)[^/]*/)*ConvLocal_\d+/kernel")  # of linen's own names
_BATCH = re.compile(
    "(layer|block|batch|stack|expert|ensemble|member|model|replica|repeat|stage|step|scan|depth|"
    "num|copy|population|agent|seed)(e?s)?(_.*)?|[benls]|.*_(layer|block|batch|expert|member)s?"
)


def words(text: str, said: str) -> tuple[str, ...]:
    """The names of axes that a user gives, ``"stack in out"``.

    Raises:
        AxesError: for a name that may be read in several ways.
    """
    names = tuple(text.split())
    if not set(_SIDES) & set(names):
        raise AxesError(f"{said} names neither 'in' nor 'out'")
    both = {"in", "i"} & set(names) and {"out", "o"} & set(names)
    window = {"height", "width", "h", "w"} & set(names)  # whose third axis may be a depth
    for name in names:
        if name in (*_SIDES, "stack", "group") or (name == "depth" and window):
            continue
        if _BATCH.fullmatch(name) or (both and not _WINDOW.fullmatch(name)):
            raise AxesError(
                f"{said}: {name!r} may mean several things. 'stack' is an axis each slice of which "
                "is a layer of its own; the axes of a window are 'h', 'w', 'd' or 'k'; beside 'in' "
                "or 'out' alone, any names such as 'heads dim' are the other side"
            )
    return names


@dataclasses.dataclass(frozen=True)
class Axes:
    """The axes of one leaf.

    Attributes:
        path: where the leaf is, for errors.
        shape: its shape.
        names: one name per axis, or None where not even a stack is told. ``in`` (or ``i``) and
            ``out`` (or ``o``) speak for themselves. Any other name is a spatial axis where both
            stand beside it, and otherwise belongs to the side that is missing: ``"h d out"``
            contracts heads and head dimension, ``"in h d"`` produces them. ``group`` is an output
            axis of a depthwise kernel, each of whose units has one input. ``stack`` is a batch of
            layers, as ``nn.scan``, ``nn.vmap`` and ensembles make it: each slice along it is a
            layer of its own, whose axes are the others. An axis of which nothing is known is "".
        transposed: whether it is the kernel of a transposed convolution, whose inputs and outputs
            Keras and torch take for each other.
        groups: of a transposed convolution, in how many groups its inputs and outputs meet.
        turned: whether Flax, too, takes its inputs and outputs for each other when it draws, as
            for ``nn.ConvTranspose(transpose_kernel=True)``.
        depthwise: of a convolution that Keras calls a DepthwiseConv where each group takes one
            input, its groups.
        sliced: of how many axes of a stack this is one slice.
        keras: the names by which Keras counts fans, where it counts an axis otherwise; see
            :meth:`drawn_by`.
        flax: those by which Flax does.
        stored: whether Keras takes the leaf as it is stored for a matrix.
        doubted: where it may be a stack in several ways, the names of the axes in some of them.
    """

    path: str
    shape: tuple[int, ...]
    names: tuple[str, ...] | None
    transposed: bool = False
    groups: int = 1
    turned: bool = False
    depthwise: int = 0
    sliced: int = 0
    keras: tuple[str, ...] | None = None
    flax: tuple[str, ...] | None = None
    stored: bool = False
    doubted: Sequence[str] = ()

    def settled(self) -> "Axes":
        """The same, for what depends on whether the leaf is a stack.

        Raises:
            AxesError: where it may be one along several axes.
        """
        if self.doubted:
            raise AxesError(
                f"{self.path} of shape {self.shape} may be a stack of layers in several ways: say "
                f"which with axes={{{self.path!r}: '...'}}, such as "
                f"{' or '.join(map(repr, self.doubted))} (one name per axis: 'in', 'out', "
                "'stack' for a batch of layers, 'h w' for a window, 'heads dim' for attention)"
            )
        return self

    def _known(self) -> tuple[str, ...]:
        self.settled()
        if self.names is None or "" in self.names:
            each = "each slice of " if self.sliced else ""
            raise AxesError(
                f"{each}{self.path} of shape {self.shape}: nothing says which axis is its input "
                f"and which its output{self._doubt}; say so with axes={{{self.path!r}: "
                f"{self._example!r}}} if that is what it is, with a glob such as "
                f"{'**/' + _tree.split(self.path)[-1]!r} for all alike (one name per axis: 'in', "
                "'out', 'stack' for a batch of layers, 'h w' for a window, 'heads dim' for "
                "attention)"
            )
        return self.names

    @property
    def known(self) -> bool:
        """Whether each axis is."""
        return self.names is not None and "" not in self.names

    @property
    def _doubt(self) -> str:
        return "" if self.names is not None else ", or whether it is a stack of layers"

    @property
    def _example(self) -> str:
        rank = len(self.shape)
        if self.names is None:
            return " ".join([*["stack"] * (rank - 2), "in", "out"])
        window = ["h", "w", "d", *"kkkk"][: max(rank - 2, 0)]
        return " ".join([*["stack"] * self.sliced, "out", "in", *window])

    @property
    def stack(self) -> tuple[int, ...]:
        """The axes along which each slice is a layer of its own."""
        return _stack_in(self.names or ())

    @property
    def one(self) -> "Axes":
        """The axes of one slice of a stack."""
        if not self.stack:
            return self
        kept = [i for i in range(len(self.shape)) if i not in self.stack]
        names = tuple((self.names or ())[i] for i in kept)
        shape = tuple(self.shape[i] for i in kept)
        sliced = len(self.stack)
        return dataclasses.replace(
            self, shape=shape, names=names, sliced=sliced, keras=None, flax=None
        )

    def drawn_by(self, like: Literal["keras", "torch", "flax"]) -> "Axes":
        """The axes as a framework's layer counts them when it draws the leaf: an axis that is of
        both its inputs and its outputs, along which each slice is a layer of its own, is one of
        its outputs to Keras, and of its inputs to Flax."""
        names = {"keras": self.keras, "flax": self.flax}.get(like)
        if like == "flax" and names is None and self.turned:
            rest = iter(_modules.plain(len(self.shape) - len(self.stack)))
            names = tuple(n if n == "stack" else next(rest) for n in self.names or ())
        if names is None:
            return self
        stored = like == "keras"
        return Axes(self.path, self.shape, names, sliced=self.sliced, stored=stored)

    def each(self, function: Callable[..., Any], *arrays: Any) -> Any:
        """``function`` of each slice of arrays of the leaf's shape, together again: all slices at
        once, by ``jax.vmap``."""
        for index, axis in reversed(list(enumerate(self.stack))):
            function = jax.vmap(function, axis - index, axis - index)
        return function(*arrays)

    def in_turn(self, function: Callable[[int, Any], Any], leaf: Any) -> Any:
        """``function(number, slice)`` of each slice, one after the other: for a user's own
        function, which need not be traceable."""
        whole = _mesh.gathered(jnp.asarray(leaf), self.stack)
        rows = jnp.moveaxis(whole, self.stack, range(len(self.stack)))
        flat = rows.reshape(-1, *self.one.shape)
        new = jnp.stack([jnp.asarray(function(i, x)) for i, x in enumerate(flat)])
        back = new.reshape(*rows.shape[: len(self.stack)], *new.shape[1:])
        found = jnp.moveaxis(back, range(len(self.stack)), self.stack)
        return _mesh.like(found, leaf) if found.shape == leaf.shape else found

    def _where(self, *names: str) -> tuple[int, ...]:
        return tuple(i for i, n in enumerate(self._known()) if n in names)

    @property
    def _others(self) -> tuple[int, ...]:
        return tuple(i for i, n in enumerate(self._known()) if n not in (*_SIDES, "stack"))

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
        sides = self.outputs + self.inputs + self.stack
        return tuple(i for i in range(len(self.shape)) if i not in sides)

    @property
    def reduced(self) -> tuple[int, ...]:
        """All axes but the output's: what a norm per output unit sums over."""
        sides = self.outputs + self.stack
        return tuple(i for i in range(len(self.shape)) if i not in sides)

    @property
    def channels(self) -> int:
        """Of the kernel of a convolution that Keras calls a DepthwiseConv, how many channels it
        takes, which Keras's kernel (*k, channels, multiplier) has as its inputs; otherwise 0."""
        ins, outs = self._where("in", "i"), self._where("out", "o")
        alone = len(ins) == len(outs) == 1 and self.shape[ins[0]] == 1
        return self.depthwise if alone and self.shape[outs[0]] % max(self.depthwise, 1) == 0 else 0

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
        if self.stored and self._known():
            return self.all
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
        if self.stored:
            return self.size(self._where("in")), self.size(self._where("out"))
        if like == "keras" and len(self.shape) < 2:
            size = math.prod(self.shape)
            return size, size
        window = self.size(self.spatial)
        ins, outs = self.size(self.inputs), self.size(self.outputs)
        if like == "keras" and self.channels:
            ins, outs = self.channels, outs // self.channels
        elif "group" in self._known():
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


def _told(
    told: Known, path: str, shape: tuple[int, ...], names: tuple[str, ...], turned: bool = False
) -> Axes:
    """The axes of a leaf with these names, and what the class of its layer tells beside them."""
    transposed, more = told.transposed or turned, (told.groups, told.turned, told.depthwise)
    return Axes(path, shape, names, transposed, *more, keras=told.keras, flax=told.flax)


class KnowsAxes:
    """A module that tells what it knows of its leaves, such as ``fwt.Sequential``."""

    def _known_axes(self, path: str, rank: int) -> Known:
        raise NotImplementedError

    def _flattened_sizes(self) -> dict[str, tuple[int, ...]]:
        raise NotImplementedError

    def _reordering(self) -> str:
        raise NotImplementedError


def _stack_in(names: Sequence[str]) -> tuple[int, ...]:
    return tuple(i for i, n in enumerate(names) if n == "stack")


class Places:
    """What the axes of the leaves of one tree mean.

    In this order it asks the user's ``axes=``, the classes of layers (of a live model, of the
    modules that the tree holds, of a linen module), and the names and shapes in the tree.

    Args:
        tree: the tree.
        axes: ``{glob: names}``; a leaf takes the first glob that matches it with as many names as
            it has axes.
        module: a linen module, where the tree does not bring it.
    """

    def __init__(self, tree: _tree.Tree, axes: Mapping[str, str] | None = None, module: Any = None):
        self.tree = tree
        self.module = module if module is not None else tree.module
        every = tree.leaves | tree.hidden
        self.shapes = {p: tuple(x.shape) for p, x in every.items()}
        for also in tree.also.values():
            self.shapes |= {p: tuple(shape) for p, shape in also.items()}
        self._said = {
            g: words(text, f"axes={{{g!r}: {text!r}}}") for g, text in (axes or {}).items()
        }
        self._hits = {g: set(_tree.named(g, self.shapes)) for g in self._said}
        self._classes = _modules.of_classes(tree)

    def check_used(self, paths: Sequence[str]) -> None:
        """Each glob of ``axes=`` must fit some leaf, or it is a typing mistake."""
        for glob, names in self._said.items():
            mine = self._hits[glob]
            hits = [p for p in paths if not mine.isdisjoint((p, *self.tree.others(p)))]
            said = f"axes={{{glob!r}: {' '.join(names)!r}}}"
            if not hits:
                raise AxesError(f"axes={{{glob!r}: ...}} matches no leaf{_tree.near(glob, paths)}")
            if all(len(self.shapes[p]) != len(names) for p in hits):
                shape = self.shapes[hits[0]]
                raise AxesError(
                    f"{said} names {len(names)} axes, but {hits[0]} has shape {shape}: give one "
                    f"name for each of its {len(shape)} axes"
                )

    def __call__(self, path: str) -> Axes:
        shape, told = self.shapes[path], self.known(path)
        said = self._by_user(path)
        if said is not None:
            turned = _rules.order_is_transposed(tuple(n for n in said if n != "stack"))
            told = dataclasses.replace(told, keras=None, flax=None)
            return _told(told, path, shape, said, turned)
        if told.names is not None and len(told.names) == len(shape):
            names = _rules.with_heads(path, told.names)
            return _told(told, path, shape, names)
        live = path in _live.KNOWN.get()
        if not live and self.tree.masked:
            told_by = self._rules.missing(path, self._hidden)
            if told_by and len(shape) > 2:
                raise AxesError(
                    f"{path} of shape {shape} may be a stack of layers, which {told_by} would "
                    "tell, but optax hides that (as masked and multi_transform do): say "
                    f"axes={{{path!r}: '...'}}, one name per axis, such as 'stack in out' or "
                    "'h w in out', or put fwt's wrapper around that of optax"
                )
            if told_by and path.endswith("weight"):  # torch's order, or the other one
                return Axes(path, shape, ("",) * len(shape))
        depth = 0 if live else self._rules.depth(path)
        found = self._from_tree(path, None if depth is None else range(depth), told.layer)
        several = told.stacked
        if not live and (depth != 0 or len(shape) > 2):
            by_module = self._from_module(path)
            several = several or ("" if by_module else self._stacked(path))
            found = by_module or found
        if several and self._first and told.layer not in ("LinearGeneral", "Einsum"):
            return _told(told, path, shape, tuple(several.split()))
        if several:
            return Axes(path, shape, None, doubted=(several,))
        if found.names is None and len(readings := self._rules.readings(path)) > 1:
            found = dataclasses.replace(found, doubted=tuple(readings))
        elif found.names is None and readings and "stack" in readings[0]:
            names = tuple(n if n == "stack" else "" for n in readings[0].split())
            found = dataclasses.replace(found, names=names)
        flax = _modules.plain(len(shape)) if _LOCAL.fullmatch(path) else told.flax
        whole = found.flax is None and flax is not None and len(flax) == len(shape)
        return dataclasses.replace(found, flax=flax) if whole else found

    @functools.cached_property
    def _first(self) -> bool:
        """Whether something tells that stacks are along the first axes: a class or a trace that
        knows of no other."""
        told = [self.known(path).names or () for path in self.shapes]
        places = {*self._stacks.values(), *(_stack_in(names) for names in told)} - {()}
        return bool(places) and all(each == (*range(len(each)),) for each in places)

    @functools.cached_property
    def _hidden(self) -> set[tuple[str, ...]]:
        """The parts of the path of each leaf that optax hides."""
        return {_rules.parts("/".join(map(_tree.escape, each))) for each in self.tree.masked}

    def _by_user(self, path: str) -> tuple[str, ...] | None:
        rank = len(self.shapes[path])
        if not any(len(names) == rank for names in self._said.values()):
            return None
        orders = {path: list(range(rank))}
        if path in self.tree.leaves:  # all paths of a tie speak for it
            orders |= self.tree.others(path)
        for glob, names in self._said.items():
            for each, order in orders.items() if len(names) == rank else ():
                if each in self._hits[glob]:
                    return tuple(names[i] for i in order)
        return None

    def known(self, path: str) -> Known:
        """What the classes of layers say of a leaf."""
        if path in _live.KNOWN.get():
            return _live.KNOWN.get()[path]
        if path in self._classes:
            return self._classes[path]
        rank = len(self.shapes[path])
        if isinstance(self.module, KnowsAxes):
            return self.module._known_axes(path, rank)
        if self.module is None:
            return Known()
        alone = _of_layer(self.module, path, rank)  # one layer by itself, which needs no run
        return alone if alone.names is not None or alone.flax is not None else Known()

    @functools.cached_property
    def _rules(self) -> _rules.Rules:
        depths = {}
        for path, shape in self.shapes.items():
            said = self._by_user(path) or (self.known(path).names if self._classes else None)
            led = _leading(said or ())
            if said is not None and len(said) == len(shape) and led == said.count("stack"):
                depths[path] = led
        # A glob that names a stack speaks of what else it matches too: of the biases.
        for glob, names in self._said.items():
            led, hits = _leading(names), [p for p in self.shapes if p in self._hits[glob]]
            sizes = {self.shapes[p][:led] for p in hits if depths.get(p) == led}
            for path in hits if led == names.count("stack") > 0 else ():
                shape = self.shapes[path]
                if len(shape) == len(names) - 1 > led and shape[:led] in sizes:
                    depths.setdefault(path, led)
        own = {path for path, led in depths.items() if led and self._by_user(path)}
        return _rules.Rules(self.shapes, depths, own)

    def _from_tree(self, path: str, stack: Sequence[int] | None, layer: str) -> Axes:
        shape = self.shapes[path]
        if stack is None:
            return Axes(path, shape, None)
        names, transposed = self._rules.names(path, tuple(stack), layer)
        # A bias that proves (out, in) at the end is that of linen's transpose_kernel=True.
        turned = transposed and names[-2:] == ("out", "in")
        names = _with_stack(names, stack, len(shape))
        # Frameworks draw a stack of layers slice by slice, and such a layer in one.
        doubt = self._rules.may_be_one(path, len(stack))
        drawn = tuple("" if n == "stack" else n for n in names) if doubt else None
        return Axes(path, shape, names, transposed, turned=turned, keras=drawn, flax=drawn)

    @functools.cached_property
    def _traced(self) -> Mapping[str, _modules.Traced]:
        return _modules.traced(self.module, self.tree, _of_layer)

    def _from_module(self, path: str) -> Axes | None:
        """The axes as the layer of a linen module tells them that sees the leaf, or a slice of
        it."""
        inner = self._traced.get(path)
        if inner is None:
            return None
        shape, told = self.shapes[path], inner.known
        first = tuple(range(len(shape) - len(inner.shape))) if self._first else None
        stack = self._stacks.get(inner.layer, first)
        if stack is None:
            return None
        keras, flax = (
            each and _with_stack(each, stack, len(shape)) for each in (told.keras, told.flax)
        )
        if told.names is None or len(told.names) != len(inner.shape):
            found = self._from_tree(path, stack, "")
            return dataclasses.replace(found, keras=keras, flax=flax)
        names = _with_stack(_rules.with_heads(path, told.names), stack, len(shape))
        return _told(dataclasses.replace(told, keras=keras, flax=flax), path, shape, names)

    def _stacked(self, path: str) -> str:
        """The names of the axes of what a layer of a linen module sees one slice of, if the first
        axes are the stack; "" for what it sees whole."""
        inner, rank = self._traced.get(path), len(self.shapes[path])
        size = rank if inner is None else len(inner.shape)
        names = inner.known.names if inner is not None and size < rank else None
        names = names if names and len(names) == size else _modules.plain(size)
        return " ".join([*["stack"] * (rank - size), *names]) if size < rank else ""

    @functools.cached_property
    def _stacks(self) -> dict[tuple[str, ...], tuple[int, ...]]:
        """By layer, the axes that it does not see, unless its shapes fit several."""
        fits: dict[tuple[str, ...], set[tuple[int, ...]]] = {}
        for path, inner in self._traced.items():
            if path in self.shapes:
                mine = _modules.missing(self.shapes[path], inner.shape)
                fits[inner.layer] = fits.get(inner.layer, mine) & mine
        return {layer: next(iter(each)) for layer, each in fits.items() if len(each) == 1}


def _of_layer(layer: Any, leaf: str, rank: int) -> Known:
    from fwt.converters.rows import table

    return table.known(layer, leaf, rank)


def _leading(names: Sequence[str]) -> int:
    return len(list(itertools.takewhile(lambda n: n == "stack", names)))


def _with_stack(names: Sequence[str], stack: Sequence[int], rank: int) -> tuple[str, ...]:
    rest = iter(names)
    return tuple("stack" if i in stack else next(rest) for i in range(rank))


def axes_of(
    path: str,
    shape: Sequence[int],
    module: Any = None,
    axes: Mapping[str, str] | None = None,
) -> Axes:
    """The axes of a leaf that stands alone; see :class:`Places`."""
    alone: Any = jax.ShapeDtypeStruct(tuple(shape), jnp.float32)
    for part in reversed([_tree.unescape(p) for p in _tree.split(path)]):
        alone = {part: alone}
    return Places(_tree.Tree({"params": alone}), axes, module)(path)


def flattened(module: Any) -> dict[str, tuple[int, ...]]:
    """By path of a kernel, the sizes that a Flatten made its inputs of, where a Sequential with an
    ``input_shape`` tells."""
    return module._flattened_sizes() if isinstance(module, KnowsAxes) else {}


def reordering(module: Any) -> str:
    """A layer of a Sequential or a Graph that counts several axes as one, so that torch may count
    its weights in another order; empty where none does."""
    return module._reordering() if isinstance(module, KnowsAxes) else ""


@dataclasses.dataclass(frozen=True)
class Role:
    """A ``Where`` by role, written bare or called: ``fwt.kernels``, ``fwt.biases``."""

    name: str

    def __call__(self, *args: Any) -> "Role":
        if args:
            raise FwtError(f"{self} is a where, and was called like a function: {INJECTED}")
        return self

    def __str__(self) -> str:
        return f"fwt.{self.name}"

    __repr__ = __str__

    def paths_of(self, shapes: Mapping[str, Any], tree: _tree.Tree) -> list[str]:
        rules = _rules.Rules({p: tuple(x.shape) for p, x in shapes.items()})
        classes = {**_modules.of_classes(tree), **_live.KNOWN.get()}
        told = {p: k.role for p, k in classes.items() if k.role}
        if self == kernels and (left := [p for p in shapes if told.get(p) == "unknown"]):
            _tree._warn(_paths.of_no_role(left))
        return [p for p in shapes if (told.get(p) or rules.role(p)) == self.name]


kernels = Role("kernels")
biases = Role("biases")
