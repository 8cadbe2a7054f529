"""The verb that gives every leaf what its framework would have given it: ``reset``."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from fwt import _axes, _draw, _rules, _tree, initializers
from fwt import _reset_values as values
from fwt._types import FwtError, LeafError, Params, Transform, Where, hashes, with_statistics
from fwt.initializers import keras, torch
from fwt.initializers._bound import Bound, bound

Like = Literal["keras", "torch", "flax"]

_Kind = Literal[
    "",
    "attention",
    "attention bias",
    "bias",
    "bilinear",
    "embedding",
    "flax rnn",
    "keras rnn",
    "kernel",
    "nnx rnn",
    "packed attention",
    "prelu",
    "reverse embedding",
    "scale",
    "torch rnn",
]
_TORCH_RNN = re.compile(r"(weight|bias)_(ih|hh|hr)(_l\d+)?(_reverse)?")
# The gates of Flax's cells in Keras's order: {(i)nput, (h)idden} x gate, each with its kernel.
_CELLS = {
    "lstm": ("ifgo", {"ii", "if", "ig", "io", "hi", "hf", "hg", "ho"}),
    "gru": ("zrn", {"iz", "ir", "in", "hz", "hr", "hn"}),
    "mgu": ("fn", {"if", "in", "hf", "hn"}),
    "simple": ("", {"i", "h"}),
}
_NNX_CELL = {"dense_i", "dense_h"}  # of nnx, with all gates side by side
_ATTENTION = {"query", "key", "value"}
# What a norm starts its running statistics at, by the names of each framework. Those of Flax are
# told by where they stand alone, for params may be named so too.
_STATISTICS = {
    **dict.fromkeys(("running_mean", "moving_mean", "num_batches_tracked"), 0.0),
    **dict.fromkeys(("running_var", "moving_variance"), 1.0),
}
_FLAX_STATISTICS = {"mean": 0.0, "var": 1.0}


def reset(
    key: Any,
    like: Like,
    where: Where = "**",
    module: Any = None,
    *,
    axes: Mapping[str, str] | None = None,
    dtype: Any = None,
) -> Transform:
    """Gives leaves new values as a framework gives them to a new layer, biases too.

    What a leaf is follows from the class of its layer, where a live model or a module tells it,
    and otherwise from the names beside it (a ``kernel`` of rank 3 or more is a convolution's).
    Convolutions, dense, separable and recurrent layers, attention, norms, embeddings and PReLU
    are known; any other leaf is refused. The values are those of the class by default, whatever
    initializers a live layer was given. Of a converted model they are those of the layers that it
    has now: of a Dense for the reverse table of an untied ``ReversibleEmbedding``, and without
    torch's ``padding_idx``, which Flax lacks. The matrices of a live ``torch.nn.Transformer`` are
    those that it gives to its layers. Where torch holds two biases and the leaf is their sum, it
    gets the sum of two draws; where Keras draws one orthogonal matrix for all gates of a cell,
    each gate gets its part of it. Values are drawn in float32 at least and rounded to the leaf's
    dtype. They are spread over devices as their leaf is; see :func:`fwt.initialize`.

    The running statistics of norms (the ``batch_stats`` of a Model, a variables dict or a train
    state, those of an nnx module or a live model) start anew as well: means and counters are 0,
    variances 1. What else stands beside the params stays as it is. Of the statistics of a
    Normalization, which are of the data and no training step changes, nothing is touched.

    Args:
        key: a JAX key, or an int seed; each leaf's is folded from its path, and from what the
            verb is, so that one seed serves all verbs.
        like: "keras", "torch" or "flax".
        where: which leaves; all unless told otherwise. A statistic stands under the path of its
            layer, such as ``norm/mean``.
        module: a :class:`fwt.Sequential` or Graph, whose layers tell more than names; with "flax"
            their own initializers (``kernel_init``) are used. A Model brings its own.
        axes: ``{glob: names}`` for leaves whose axes nothing else tells; see
            :func:`fwt.initialize`.
        dtype: the dtype of the new values; None keeps each leaf's own. Statistics keep theirs.

    Returns:
        A transform that keeps every shape.

    Raises:
        LeafError: for a leaf that belongs to no layer it knows, or that the framework lacks.
        AxesError: if fans are needed and the axes are unknown.

    Example:
        >>> import fwt, numpy as np
        >>> params = {"dense": {"kernel": np.ones((100, 20), np.float32),
        ...                     "bias": np.ones(20, np.float32)}}
        >>> new = fwt.select(reset(0, like="torch")(params), "**")
        >>> {path: bool(abs(w).max() <= 0.1) for path, w in new.items()}
        {'dense/bias': True, 'dense/kernel': True}
        >>> reset(0, like="keras")(params)["dense"]["bias"].sum().item()
        0.0
    """
    if like not in ("keras", "torch", "flax"):
        raise FwtError(f"like must be 'keras', 'torch' or 'flax'; found {like!r}")
    if module is not None and not isinstance(module, _axes.KnowsAxes):
        raise FwtError(
            f"module= takes a fwt.Sequential or Graph, found {type(module).__name__}: leave it "
            "out, and names tell what each leaf is"
        )

    def apply(params: Params) -> Params:
        tree = _tree.Tree(params, statistics=True)
        names = tree.select(where)
        places = _axes.Places(tree, axes, module)
        places.check_used(names)
        view = _View(places)
        start = {p: view.leaf(p).statistic for p in names}
        known = {p: _filled(tree.leaves[p], s) for p, s in start.items() if s is not None}

        def choose(path: str, shape: tuple[int, ...]) -> tuple[Any, str]:
            leaf = view.leaf(path)
            place = view.places[path]
            if like == "flax" and place.flax is not None:
                # All slices in one, whose fans count them.
                place = place.drawn_by("flax")
                leaf = dataclasses.replace(leaf, axes=place.one)
                made, root = _own(leaf) or initializers.lecun_normal().at(place), path
            else:
                made, root = of_one(leaf)
            return (_draw.fitted(made, place) if place.stack else made), root

        def of_one(leaf: _Leaf) -> tuple[Any, str]:
            found = _own(leaf) if like == "flax" else None
            if found is not None:
                return found, leaf.path
            made, root = _RECIPES[like](leaf)
            index = getattr(leaf.known.owner, "padding_idx", None)
            if leaf.kind == "embedding" and index is not None and not leaf.known.anew:
                # torch keeps this row at zero, where no gradient would bring it back.
                made = bound(values.padded, make=made, index=index)
            return made, root

        drawn = [p for p, s in start.items() if s is None and not view.is_of_data(p)]
        if not drawn and not known:
            raise LeafError(
                f"{names[0]}: a Normalization has it from the data, so there is no value to reset "
                "it to: give it one with fwt.assign, or adapt the layer"
            )
        done = _draw.drawn(tree, drawn, key, "reset", dtype, choose)
        return _tree.Tree(done, statistics=True).replace(known) if known else done

    return with_statistics(apply)


def _filled(leaf: Any, value: float) -> Any:
    """A statistic at its start; a counter of 64 bits stays one."""
    new = np.full(leaf.shape, value, leaf.dtype)
    numpys = isinstance(leaf, np.ndarray | np.generic) or _tree.cut_by_jax(leaf.dtype)
    return new if numpys else jnp.asarray(new)


@dataclasses.dataclass
class _Leaf:
    """A leaf and what is around it.

    Attributes:
        path: where it is, for errors.
        name: its last part, without the ``_orig`` of torch's prune.
        owner: the part before it.
        above: the path two parts up.
        shape: its shape.
        axes: its axes.
        known: what the class of its layer tells.
        beside: the shapes of the leaves of the same layer, by name.
        around: the names of the layers beside its layer.
        view: for the axes and shapes of others.
    """

    path: str
    name: str
    owner: str
    above: str
    shape: tuple[int, ...]
    axes: _axes.Axes
    known: _axes.Known
    beside: Mapping[str, tuple[int, ...]]
    around: frozenset[str]
    view: "_View"

    @property
    def kind(self) -> _Kind:
        """What sort of weight it is, by which the recipes go; "" for one of no known layer."""
        rank = len(self.shape)
        if _TORCH_RNN.fullmatch(self.name):
            return "torch rnn"
        if "recurrent_kernel" in self.beside:
            return "keras rnn"
        if self.cell is not None and self.name in ("kernel", "bias"):
            return "flax rnn"
        if self.around >= _NNX_CELL and self.owner in _NNX_CELL:
            return "nnx rnn"
        if re.fullmatch(r"in_proj_(weight|bias)|[qkv]_proj_weight|bias_[kv]", self.name):
            return "packed attention"
        if self.owner == "out_proj" and {"in_proj_weight", "q_proj_weight"} & self.view.names(
            self.above
        ):
            return "kernel" if self.name != "bias" else "attention bias"
        if self.around >= _ATTENTION and self.owner in (*_ATTENTION, "out", "attention_output"):
            return "attention" if self.name == "kernel" else "attention bias"
        if self.known.layer == "PReLU" or self.name in ("alpha", "negative_slope"):
            return "prelu"
        if self.known.layer == "Bilinear":
            return "bilinear"
        emb: Any = self.known.layer in ("Embedding", "Embed")
        if not self.known.layer:
            emb = _rules.EMBEDDINGS.search(self.owner.lower())
        if self.name in ("embedding", "embeddings") or (
            self.name == "weight" and rank == 2 and emb
        ):
            return "embedding"
        if self.name == "reverse_embeddings":
            return "reverse embedding"
        if self.name in ("scale", "gamma") and (self.is_norm or not self.known.layer):
            return "scale"
        if self.name == "weight" and rank == 1 and self.is_norm:
            return "scale"
        matrix = rank >= 2 or self.is_einsum
        if re.fullmatch("((depthwise|pointwise)_)?kernel|weight", self.name) and matrix:
            return "kernel"
        if self.name == "beta" or (self.name == "bias" and (self.is_norm or self.kernel)):
            return "bias"
        return ""

    @property
    def statistic(self) -> float | None:
        """What a norm starts it at, if it is a running statistic of one."""
        if not {"var", "running_var", "moving_variance"} & set(self.beside):
            return None
        apart = _FLAX_STATISTICS if self.path in self.view.statistics else {}
        return (_STATISTICS | apart).get(self.name)

    @property
    def is_norm(self) -> bool:
        if self.known.layer:
            return "Norm" in self.known.layer
        if {"scale", "gamma"} & set(self.beside):
            return True
        if len(self.beside.get("weight", (0, 0))) != 1:
            return False
        named = _rules.NORMS.search(self.owner.lower()) is not None
        return self.beside["weight"] == self.beside.get("bias") or named

    @property
    def kernel(self) -> str:
        """The name of the weight that its bias goes with."""
        names = ("pointwise_kernel", "kernel", "depthwise_kernel", "weight")
        least = 0 if self.is_einsum else 2
        return next(
            (n for n in names if len(self.beside.get(n, ())) >= least and n in self.beside), ""
        )

    @property
    def is_einsum(self) -> bool:
        """Whether it is of a Keras layer whose kernel may have no axis of its own."""
        return self.known.layer == "EinsumDense"

    @property
    def cell(self) -> str | None:
        return next((c for c, (_, all_of) in _CELLS.items() if all_of <= self.around), None)

    def refuse(self, like: str, why: str) -> LeafError:
        return LeafError(
            f"{self.path}{list(self.shape)}: {why}, so there is no value like {like}'s: "
            f"initialize gives it one, where=lambda path, leaf: path != {self.path!r} leaves it out"
        )

    def sibling(self, name: str) -> _axes.Axes:
        name += _rules.one_way(_tree.unescape(_tree.split(self.path)[-1]))[1]
        raw = name if name in self.view.raw(self.path) else f"{name}_orig"
        path = "/".join([*_tree.split(self.path)[:-1], _tree.escape(raw)])
        return self.view.places[path].one


class _View:
    """A tree by layers; of a stack of layers one slice."""

    def __init__(self, places: _axes.Places):
        self.known, self.statistics = places.known, places.tree.statistics
        self.places = {path: places(path) for path in places.shapes}
        self.shapes = {path: place.one.shape for path, place in self.places.items()}
        self._below: dict[str, dict[str, tuple[int, ...]]] = {}
        self._layers: dict[str, set[str]] = {}
        for path, shape in self.shapes.items():
            parts = _tree.split(path)
            self._below.setdefault("/".join(parts[:-1]), {})[_tree.unescape(parts[-1])] = shape
            if len(parts) > 1:
                self._layers.setdefault("/".join(parts[:-2]), set()).add(_tree.unescape(parts[-2]))

    def names(self, parent: str) -> set[str]:
        return set(self._below.get(parent, ()))

    def raw(self, path: str) -> set[str]:
        return self.names("/".join(_tree.split(path)[:-1]))

    def is_of_data(self, path: str) -> bool:
        """Whether it is a statistic of the data that a Normalization holds."""
        return path in self.statistics and {"mean", "variance"} <= self.raw(path)

    def leaf(self, path: str) -> _Leaf:
        parts = _tree.split(path) or [""]
        above = "/".join(parts[:-2])
        # Each direction of a recurrent layer is a layer.
        name, way = _rules.one_way(_tree.unescape(parts[-1]))
        there = [(_rules.one_way(n), s) for n, s in self._below["/".join(parts[:-1])].items()]
        beside = {n: s for (n, other), s in there if other == way}
        return _Leaf(
            path,
            name.removesuffix("_orig"),
            _gate(_tree.unescape(parts[-2])) if len(parts) > 1 else "",
            above,
            self.shapes[path],
            self.places[path].one,
            self.known(path),
            {name.removesuffix("_orig"): s for name, s in beside.items()},
            frozenset(map(_gate, self._layers.get(above, ()))),
            self,
        )


def _gate(name: str) -> str:
    return "if" if name == "if_" else name  # nnx's, for "if" is a word of Python


# -- a layer's own initializers ----------------------------------------------------------------


def _by(function: Any, leaf: _Leaf, make: Any, **settings: Any) -> Any:
    if getattr(make, "__module__", "").startswith(("jax.", "flax.")) and hashes(make):
        return bound(function, make=make, **settings).at(leaf.axes)
    # A user's own: it may depend on more than its arguments, so it must not be compiled by us.
    return functools.partial(function, axes=leaf.axes, make=make, **settings)


def _own(leaf: _Leaf) -> Any:
    """The initializer that a Flax layer was given for a leaf, or None."""
    layer = leaf.known.owner
    if not hasattr(layer, "kernel_init") and not hasattr(layer, "apply"):
        return None  # a live layer of another framework
    layer = getattr(layer, "cell", layer)
    name = leaf.name
    if leaf.kind == "flax rnn" and name == "kernel" and leaf.owner.startswith("h"):
        name = "recurrent_kernel"
    if leaf.cell == "mgu" and name == "bias":
        name = "forget_bias" if leaf.owner == "if" else "activation_bias"
    if leaf.owner == "out" and leaf.kind.startswith("attention"):
        found = getattr(layer, f"out_{name}_init", None)
        name = name if found is None else f"out_{name}"
    make = getattr(layer, f"{name}_init", None)
    if make is None or not callable(make):
        return None if make is None else initializers.constant(make)
    return _by(values.by_flax, leaf, make)


# -- the recipes ------------------------------------------------------------------------------


def _keras(leaf: _Leaf) -> tuple[Bound, str]:
    kind, shape, path = leaf.kind, leaf.shape, leaf.path
    if kind == "kernel" and leaf.axes.groups > 1:
        raise leaf.refuse("keras", "Keras has no transposed convolution with groups")
    glorot, zeros = keras.glorot_uniform().at(leaf.axes), keras.zeros()
    simple = {
        "kernel": glorot,
        "attention": glorot,
        "attention bias": zeros,
        "bias": zeros,
        "scale": keras.ones(),
        "embedding": keras.random_uniform(),
        "reverse embedding": keras.random_uniform(),
        "prelu": zeros,
    }
    if kind in simple:
        return simple[kind], path
    if kind == "packed attention" and leaf.name.endswith("weight"):
        width = shape[0] // 3 if leaf.name == "in_proj_weight" else shape[0]
        limit = math.sqrt(6 / (width + shape[1]))
        return keras.random_uniform(-limit, limit), path
    if kind == "packed attention" and leaf.name == "in_proj_bias":
        return zeros, path
    if kind == "keras rnn":
        if leaf.name == "kernel":
            return glorot, path
        if leaf.name == "recurrent_kernel":
            return keras.orthogonal().at(leaf.axes), path
        if leaf.name == "projection_kernel":
            raise leaf.refuse("keras", "no recurrent layer of Keras has a projection")
        units, width = leaf.beside["recurrent_kernel"][-2:]
        forget = width == 4 * units and getattr(leaf.known.owner, "unit_forget_bias", True)
        return (bound(values.forget, units=units) if forget else zeros), path
    if kind == "torch rnn" and "_hr" not in leaf.name:
        if leaf.name.startswith("weight"):
            return (keras.orthogonal().at(leaf.axes) if "_hh" in leaf.name else glorot), path
        width, units = leaf.beside[leaf.name.replace("bias", "weight").replace("_ih", "_hh")]
        # Keras has one bias where torch has two.
        forget = width == 4 * units and "_ih" in leaf.name
        return (bound(values.forget, units=units) if forget else zeros), path
    if kind == "flax rnn" and leaf.cell != "mgu":
        cell = leaf.cell or ""
        gates, gate = max(len(_CELLS[cell][0]), 1), _CELLS[cell][0].find(leaf.owner[1:])
        if leaf.name == "bias":
            return (keras.ones() if (cell, leaf.owner) == ("lstm", "hf") else zeros), path
        if leaf.owner[0] == "h":
            # One key for the cell, of which each gate takes its part.
            return bound(values.gate_of_orthogonal, gate=max(gate, 0), gates=gates), leaf.above
        limit = math.sqrt(6 / (shape[0] + gates * shape[1]))
        return keras.random_uniform(-limit, limit), path
    raise leaf.refuse("keras", "it is not known to be a weight of a Keras layer")


def _torch(leaf: _Leaf) -> tuple[Bound, str]:
    kind, shape, path = leaf.kind, leaf.shape, leaf.path

    def uniform(fan: float) -> Bound:
        limit = 1 / math.sqrt(fan) if fan else 0.0
        return torch.uniform(-limit, limit)

    def xavier(fan_in: int, fan_out: int) -> Bound:
        limit = math.sqrt(6 / (fan_in + fan_out))
        return torch.uniform(-limit, limit)

    if leaf.known.anew and len(shape) > 1:
        whole = torch.xavier_uniform().at(leaf.axes)
        return (xavier(*shape) if len(shape) == 2 else whole), path
    if kind == "kernel":
        return torch.kaiming_uniform(math.sqrt(5)).at(leaf.axes), path
    if kind == "bias" and not leaf.is_norm:
        return uniform(leaf.sibling(leaf.kernel).fans("torch")[0]), path
    if kind == "bilinear" and leaf.beside.get("weight"):
        return uniform(leaf.beside["weight"][1]), path
    simple = {
        "bias": torch.zeros(),
        "attention bias": torch.zeros(),
        "scale": torch.ones(),
        "embedding": torch.normal(),
        "prelu": torch.constant(0.25),
    }
    if kind in simple:
        return simple[kind], path
    if kind == "packed attention":
        if leaf.name in ("bias_k", "bias_v"):
            return torch.normal(0.0, math.sqrt(1 / shape[-1])), path
        if leaf.name == "in_proj_bias":
            return torch.zeros(), path
        return torch.xavier_uniform().at(leaf.axes), path
    if kind == "attention":
        fan_in, fan_out = leaf.axes.fans("torch")
        if leaf.owner not in _ATTENTION:
            return uniform(fan_in), path
        others = [f"{leaf.above}/{n}/kernel".lstrip("/") for n in sorted(_ATTENTION)]
        sizes = {leaf.view.shapes.get(p, (0,))[0] for p in others}
        packed = sizes == {fan_in} and fan_in == fan_out
        return xavier(fan_in, 3 * fan_out if packed else fan_out), path
    if kind == "torch rnn":
        hidden = leaf.name.replace("bias", "weight").replace("_ih", "_hh").replace("_hr", "_hh")
        projected = leaf.beside.get(hidden.replace("_hh", "_hr"))
        return uniform((projected or leaf.beside[hidden])[1]), path
    if kind == "keras rnn" and len(leaf.beside["recurrent_kernel"]) == 2:
        units = leaf.beside.get("projection_kernel", leaf.beside["recurrent_kernel"])[0]
        if leaf.name == "bias" and len(shape) == 1:
            return bound(values.two_uniforms, limit=1 / math.sqrt(units)), path
        return uniform(units), path
    if kind == "flax rnn" and leaf.cell != "mgu":
        units = shape[-1]
        # A GRU's candidate has both biases in Flax as well.
        if leaf.name == "bias" and (leaf.cell, leaf.owner) not in (("gru", "in"), ("gru", "hn")):
            return bound(values.two_uniforms, limit=1 / math.sqrt(units)), path
        return uniform(units), path
    raise leaf.refuse("torch", "it is not known to be a weight of a torch layer")


def _flax(leaf: _Leaf) -> tuple[Bound, str]:
    kind, shape, path = leaf.kind, leaf.shape, leaf.path
    lecun, zeros = initializers.lecun_normal().at(leaf.axes), initializers.zeros
    simple: dict[str, Any] = {
        "kernel": lecun,
        "attention": lecun,
        "attention bias": zeros,
        "bias": zeros,
        "scale": initializers.ones,
        "prelu": initializers.constant(0.01),
    }
    if kind in simple:
        return simple[kind], path
    if kind == "embedding":
        return initializers.normal(1 / math.sqrt(max(shape[-1], 1))), path
    if kind == "packed attention" and leaf.name not in ("bias_k", "bias_v"):
        return (zeros if leaf.name == "in_proj_bias" else lecun), path
    dense = len(leaf.beside.get("recurrent_kernel", (0, 0))) == 2
    projected = any("_hr" in name or name == "projection_kernel" for name in leaf.beside)
    if kind in ("keras rnn", "torch rnn") and dense and not projected:
        if "bias" in leaf.name:
            return zeros, path
        if leaf.name == "recurrent_kernel" or "_hh" in leaf.name:
            units = leaf.axes.size(leaf.axes.inputs)
            gates = leaf.axes.size(leaf.axes.outputs) // max(units, 1)
            return bound(values.orthogonal_gates, gates=gates).at(leaf.axes), path
        return lecun, path
    if kind == "flax rnn":
        if leaf.name == "bias":
            forget = (leaf.cell, leaf.owner) == ("mgu", "if")
            return (initializers.ones if forget else zeros), path
        made: Any = initializers.orthogonal() if leaf.owner[0] == "h" else lecun
        return made, path
    if kind == "nnx rnn":
        if leaf.name == "bias":
            return zeros, path
        whole = initializers.orthogonal().at(leaf.axes)
        return (whole if leaf.owner == "dense_h" else lecun), path
    raise leaf.refuse("flax", "it is not known to be a weight of a Flax layer")


_RECIPES: dict[str, Callable[[_Leaf], tuple[Bound, str]]] = {
    "keras": _keras,
    "torch": _torch,
    "flax": _flax,
}
