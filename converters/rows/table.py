"""LAYERS: one declarative row per layer, which says the same thing in each framework.

A row names the layer's class in Flax, torch and Keras, the axes that it maps, its settings and
its arrays. Everything else follows: :mod:`fwt.converters.walk.walk` reads a layer's settings into
Flax names and writes them out for another framework, and permutes its arrays by comparing axes.
A setting that no row takes and that is off its default, and an array that no row claims, raise,
so a row can't forget one.

To add a layer, add its row to one of the three tables, or ``register`` it.
"""

import dataclasses
import functools
import inspect
from typing import Any

import flax.linen as nn

from fwt import layers as fl
from fwt._axes import Known
from fwt._modules import depthwise_groups, einsum_names, many, of_several
from fwt._types import ConversionError
from fwt.converters.rows import (
    attention,
    constants,
    functions,
    heads,
    merges,
    pooling,
    recurrent,
    refused,
    shapes,
    weights,
)
from fwt.converters.rows.row import Framework, Layer, P, Row, refuse
from fwt.converters.rows.shapes import FLATTEN as FLATTEN
from fwt.converters.rows.shapes import PERMUTE as PERMUTE
from fwt.converters.rows.shapes import RESHAPE as RESHAPE

LAYERS: list[Row] = [
    *weights.ROWS,
    *recurrent.ROWS,
    *attention.ROWS,
    *heads.ROWS,
    *pooling.ROWS,
    *shapes.ROWS,
    *functions.ROWS,
    *merges.ROWS,
    *constants.ROWS,
]

# Classes of the user's own, by name.
CUSTOM: dict[Framework, dict[str, Any]] = {"flax": {}, "keras": {}, "torch": {}}

# Why a class has no row.
REFUSED: dict[Framework, dict[str, str]] = {
    "flax": {},
    "keras": refused.KERAS,
    "torch": refused.TORCH,
}

# Names of arrays in live models, for layers that have no row of their own.
NAMES: tuple[Row, ...] = (
    Row(None, "EmbeddingBag", None, params=(P("embedding: v f", "weight: v f", "-"),)),
)
# keras.activations under another name, the last two as TensorFlow calls its own
ALIASES = {"swish": "silu", "hard_swish": "hard_silu", "softmax_v2": "softmax",
           "log_softmax_v2": "log_softmax"}  # fmt: skip


def register(row: Row) -> None:
    """Makes a layer known to every converter: a class of your own, or one that has no row.

    ``torch`` and ``keras`` of the row may be classes. A row for a class that is known already
    takes its place.

    Args:
        row: see :class:`Row`.

    Raises:
        TypeError: for anything else than a row.

    Example:
        >>> import flax.linen as nn, jax.numpy as jnp, numpy as np, torch
        >>> from fwt import converters
        >>> class Scale(nn.Module):  # the layer in Flax
        ...     features: int
        ...     @nn.compact
        ...     def __call__(self, x):
        ...         return x * self.param("scale", nn.initializers.ones, (self.features,))
        >>> class TorchScale(torch.nn.Module):  # and the user's own in torch
        ...     def __init__(self, size, device=None):
        ...         super().__init__()
        ...         self.size, self.weight = size, torch.nn.Parameter(torch.ones(size))
        ...     def forward(self, x):
        ...         return x * self.weight
        >>> converters.register(converters.Row(
        ...     Scale, torch=TorchScale, axes="*b c -> *b c",
        ...     settings=(converters.S("features", "size", None),),
        ...     params=(converters.P("scale: c", "weight: c", "-"),)))
        >>> model = converters.from_torch(torch.nn.Sequential(TorchScale(3)))
        >>> model(np.ones((1, 3), np.float32)).tolist()
        [[1.0, 1.0, 1.0]]
    """
    if not isinstance(row, Row):
        raise TypeError(f"register takes a converters.Row, found {row!r}")
    named: dict[str, Any] = {}
    framework: Framework
    for p in row.params:
        axes = p.of("flax")[1]
        for framework in ("torch", "keras"):
            name, letters = p.of(framework)
            if axes and not letters and name not in ("", "-"):
                raise ConversionError(
                    f"register: {p} names no axes of {name!r} in {framework}: write "
                    f"'{name}: {' '.join(axes)}', with the letters in its own order"
                )
    for framework in ("torch", "keras"):
        cls = getattr(row, framework)
        if isinstance(cls, type):
            CUSTOM[framework][cls.__name__] = cls
            named[framework] = cls.__name__
    LAYERS.insert(0, dataclasses.replace(row, **named))
    rows_of.cache_clear()
    row_of_function.cache_clear()


def kinds(framework: Framework) -> set[str]:
    """The names of the classes that have rows."""
    return {kind for row in LAYERS if (kind := row.class_in(framework))}


@functools.cache
def rows_of(framework: Framework, kind: str) -> tuple[Row, ...]:
    """The rows of a class; several where its rank or its settings decide."""
    return tuple(row for row in LAYERS if row.class_in(framework) == kind)


@functools.cache
def row_of_function(name: str) -> Row | None:
    """The row of a function in keras.activations."""
    name = ALIASES.get(name, name)
    return next((r for r in LAYERS if r.function and r.function[0] == name), None)


def masks_of(layer: Layer) -> tuple[bool, bool]:
    """Whether a layer of a class of the user's own makes a mask in Keras, and whether it uses the
    one of what it takes."""
    cls = CUSTOM["keras"].get(layer.kind)
    if cls is None:
        return False, False
    home = next((c.__module__ for c in cls.__mro__ if "compute_mask" in vars(c)), "")
    takes = inspect.signature(cls.call).parameters
    return home != "keras.src.layers.layer", any(n.endswith("mask") for n in takes)


def unknown(framework: Framework, layer: Layer) -> ConversionError:
    """The refusal of a class that has no row."""
    reason = REFUSED[framework].get(layer.kind)
    if framework == "torch":
        reason = reason or refused.WITHIN.get(layer.kind)
    said = f"can't be converted: {reason}" if reason else "is not known, so it can't be converted"
    way_out = (
        ""
        if reason
        else (
            "converters.register(row) makes it known, and converters.transform(model, t) changes "
            "the weights of a live model as it is"
        )
    )
    return refuse(str(layer), f"the {framework} layer {layer.kind!r} {said}", way_out)


def axis_names(letters: list[str], rank: int) -> tuple[str, ...] | None:
    """The letters of one Flax array as names of axes; None where none is an input or output."""
    fill = rank - sum(not x.startswith("*") for x in letters)
    full = [y for x in letters for y in ([x[1:]] * fill if x.startswith("*") else [x])]
    # Of a recurrent layer: the state that it takes, its gates, and what a projection gives.
    words = {"i": "in", "j": "in", "o": "out", "c": "out", "g": "group", "m": "out",
             "r": "in", "y": "in", "a": "in", "e": "out", "q": "out", "p": "out"}  # fmt: skip
    names = tuple(words.get(x, x) for x in full)
    return names if {"in", "out"} & set(names) else None


def is_transposed(framework: Framework, letters: list[str]) -> bool:
    """Whether these are the axes of a transposed convolution's kernel in a framework."""
    ins = "j" if "j" in letters else "i"
    if not {ins, "o"} <= set(letters) or len(letters) < 3:
        return False
    return (letters.index(ins) < letters.index("o")) == (framework == "torch")


def known(layer: Any, leaf: str, rank: int) -> Known:
    """What a Flax layer tells of its leaf; axes in front of those of its class are a stack."""
    kind = type(layer).__name__
    if type(layer) is nn.DenseGeneral and leaf in ("kernel", "bias"):
        outs = ["out"] * many(layer.features)
        if leaf == "bias":
            return Known((*["stack"] * (rank - len(outs)), *outs), False, kind, layer)
        both = (*["both"] * many(layer.batch_dims), *["in"] * many(layer.axis), *outs)
        return of_several(layer, both, len(both), rank, "in")
    if type(layer) in (fl.EinsumDense, nn.Einsum) and leaf == "kernel":
        return _einsum(layer, rank)
    if type(layer) is nn.ConvLocal and leaf == "kernel":
        size = many(layer.kernel_size) + 2
        return of_several(layer, None, size, rank, "plain")
    for row in (*rows_of("flax", kind), *(r for r in NAMES if r.flax is type(layer))):
        for p in row.params:
            name, letters = p.of("flax")
            if name == leaf and row.flax is type(layer) and "/" not in name:
                # The row has a transposed kernel as Keras does, which Flax's is only if told so.
                if not getattr(layer, "transpose_kernel", True) and leaf == "kernel":
                    letters = ["*k", "i", "o"]
                transposed = is_transposed("keras", p.of("keras")[1])
                own = rank if any(x.startswith("*") for x in letters) else len(letters)
                if leaf == "kernel" and hasattr(layer, "kernel_size"):
                    own = many(layer.kernel_size) + 2
                groups = getattr(layer, "feature_group_count", 1) if transposed else 1
                turned = transposed and getattr(layer, "transpose_kernel", False)
                names = axis_names(letters, min(own, rank))
                if names is not None and len(names) < rank:
                    names = (*["stack"] * (rank - len(names)), *names)
                conv = type(layer) is nn.Conv and leaf == "kernel"
                depthwise = depthwise_groups(layer) if conv else 0
                return Known(names, transposed, kind, layer, groups, turned, depthwise)
    return Known(None, False, kind, layer)


def _einsum(layer: Any, rank: int) -> Known:
    """What a dense layer by an equation tells of its kernel: one of linen, Keras or ours."""
    own = isinstance(layer, nn.Einsum)  # whose equation may be told in a call alone
    text = layer.einsum_str if own else layer.equation
    names = einsum_names(text) if text else None
    size = len(layer.shape if own else names or ())
    return of_several(layer, names, size, rank, "plain" if own else "")


def live(
    framework: Framework,
    layer: Any,
    kind: str,
    letters: list[str],
    flax_letters: list[str],
    rank: int,
    groups: int = 1,
) -> Known:
    """What a live layer tells of an array that has these axes there and in Flax."""
    if kind == "EinsumDense" and flax_letters == ["*k"] and hasattr(layer, "equation"):
        return dataclasses.replace(_einsum(layer, rank), layer=kind)
    names = axis_names(flax_letters, rank) if letters else None
    if kind in ("Layer", "Model", "Module"):  # a class of the user's own, of which nothing is known
        kind = ""
    transposed = is_transposed(framework, letters)
    # Keras has a class for it, which tells by its letters.
    conv = framework == "torch" and kind.startswith("Conv") and not transposed
    depthwise = depthwise_groups(layer) if conv else 0
    return Known(names, transposed, kind, layer, groups, depthwise=depthwise)


def leaf_names(framework: Framework, kind: str) -> dict[str, tuple[str, list[str], list[str], str]]:
    """For arrays of a live layer: name -> (Flax name, its axes there, axes in Flax, collection)."""
    for row in (*rows_of(framework, kind), *(r for r in NAMES if r.class_in(framework) == kind)):
        out = {}
        for p in row.params:
            name, letters = p.of(framework)
            flax_name, flax_letters = p.of("flax")
            out[name] = (flax_name, letters, flax_letters, p.collection)
        return out
    return {}
