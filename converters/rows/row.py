"""What a row of the layer table is made of, and how settings are taken.

The rows themselves are in :mod:`fwt.converters.rows.table`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from fwt import _tree
from fwt import layers as fl
from fwt._axes import Known
from fwt._errors import refuse as refuse
from fwt._types import ConversionError

Framework = Literal["flax", "keras", "torch"]
REQUIRED: Any = object()
IO = tuple[Callable[[Any], Any], Callable[[Any], Any]]

# What matters only in training, and names: neither converted nor refused.
TRAINING: dict[str, frozenset[str]] = {
    "flax": frozenset(
        [
            "kernel_init",
            "bias_init",
            "scale_init",
            "embedding_init",
            "out_kernel_init",
            "out_bias_init",
            "param_dtype",
            "rng_collection",
            "axis_name",
            "axis_index_groups",
            "use_fast_variance",
            "force_float32_reductions",
            "parent",
            "name",
        ]
    ),
    "torch": frozenset(["device", "dtype", "inplace"]),
    "keras": frozenset(
        [
            "name",
            "trainable",
            "seed",
            "init_values",
        ]
    ),
}


def is_training(framework: Framework, name: str) -> bool:
    """Whether a setting matters only in training, or is a name."""
    ends = ("_initializer", "_regularizer", "_constraint")
    return name in TRAINING[framework] or (framework == "keras" and name.endswith(ends))


# Arrays that are no weights.
STATE = {"flax": (), "torch": ("num_batches_tracked",), "keras": ("seed_generator_state",)}


@dataclasses.dataclass(frozen=True)
class S:
    """One setting under its name in each framework.

    None where a framework can't say it, "" where the row's ``special`` says it.
    """

    flax: str
    torch: str | None
    keras: str | None
    keras_default: Any = REQUIRED
    normal: Callable[[Any], Any] = lambda x: x  # one form whatever the framework
    torch_io: IO | None = None  # (read, write)

    def name(self, framework: Framework) -> str | None:
        return {"flax": self.flax, "torch": self.torch, "keras": self.keras}[framework]


@dataclasses.dataclass(frozen=True)
class Size:
    """A torch setting that is the size of an axis."""

    torch: str
    letter: str


@dataclasses.dataclass(frozen=True)
class AxisSetting:
    """A setting that is the number of an axis: it crosses as that axis."""

    flax: str
    torch: str | None
    keras: str | None
    keras_default: Any = -1
    torch_fixed: int | None = None  # torch has no setting for it, always this axis
    letter: str | None = None  # the arrays follow this axis

    def name(self, framework: Framework) -> str | None:
        return {"flax": self.flax, "torch": self.torch, "keras": self.keras}[framework]


@dataclasses.dataclass(frozen=True)
class AxesSetting:
    """A setting that is the numbers of several axes: it crosses as those axes.

    The arrays' letter ``*a`` stands for them. torch says by the shape of its arrays how many
    axes it means: they stand last there, or second if ``torch_second``; ``keras_last``: in Keras
    too.
    """

    flax: str
    keras: str | None
    keras_default: Any = -1
    torch_second: bool = False
    keras_last: bool = False

    def name(self, framework: Framework) -> str | None:
        return {"flax": self.flax, "torch": None, "keras": self.keras}[framework]


@dataclasses.dataclass(frozen=True)
class P:
    """One array: ``"name: axes"`` in each framework, present when the field ``when`` is true.

    ``j`` is the input of one group, ``*k`` the window. ``fill`` is what torch gets where Flax has
    none.
    """

    flax: str
    torch: str
    keras: str
    when: str | None = None
    collection: str = "params"
    fill: float | None = None

    @classmethod
    def alike(cls, text: str, when: str | None = None, collection: str = "params") -> "P":
        """An array that has the same name and axes in each framework."""
        return cls(text, text, text, when, collection)

    def of(self, framework: Framework) -> tuple[str, list[str]]:
        text: str = getattr(self, framework)
        name, _, letters = text.partition(":")
        return name, letters.split()


@dataclasses.dataclass(frozen=True)
class Around:
    """A layer that a target needs beside another to say the same thing."""

    flax: type
    suffix: str  # of its name
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    before: bool = True


class Special:
    """What a row can't declare: a pair of inverse functions."""

    def read(self, framework: Framework, take: "Take", fields: dict[str, Any], at: "At") -> None:
        """Takes settings of a framework into Flax fields."""

    def write(
        self, framework: Framework, fields: dict[str, Any], settings: dict[str, Any], at: "At"
    ) -> list[Around]:
        """Adds settings of a framework; returns the layers to put around it."""
        return []

    def finish(
        self,
        framework: Framework,
        layer: "Layer",
        fields: Mapping[str, Any],
        sizes: Any,
        at: "At",
    ) -> "Layer | list[Layer]":
        """The layer as it is written, for a class or an array that the row can't name."""
        return layer


@dataclasses.dataclass(frozen=True)
class Row:
    """One layer. ``axes`` is ``"in -> out"`` in letters, ``torch_axes`` where torch differs.

    Attributes:
        flax: the linen class; None for a layer that has names in live trees but no conversion.
        torch: the class in torch.nn (or one of ours, for what torch.nn lacks), or None.
        keras: the class in keras.layers, or None.
        axes: the axes in Flax and Keras; ``*b`` is any number of them; "" keeps all as they are.
        ranks: the tensor ranks that it takes, the batch axis included; () for any.
        channel: the letter of the axis that this layer proves to hold the channels.
        keras_defaults: settings that must stand at these values in Keras.
        function: (name in keras.activations, the fields that it stands for).
        fused_activation: whether Keras's layer has an activation=, which becomes a layer.
        kind: how the walk treats it: "" by its axes, or "flatten", "reshape", "permute", "einsum",
            "slice"; of several tensors "merge" (entry by entry) or "join" (one after the other), or
            "contract" (by an equation);
            "parameter" of none.
        several: ``axes`` where it takes several tensors, ``"n t i, n s i, n s i -> n t o"``.
        torch_several: the same where torch differs.
        several_least: how many it takes at least then.
        rank_of: the Flax field that has an entry for each spatial axis.
        ordered: whether the order of the channels matters beyond which weight meets which.
        halves: the setting whose axis comes out half as long.
        single: the setting whose axis comes out with the size 1.
        fits: whether the row is meant, where several have the class.
        lower: the layer as simpler ones of the same framework, or None to leave it.
        lacks: why a framework has no such layer, for the table and the error.
        sizes: the sizes of letters that follow from the fields.
        note: what a user should know of the conversion, for the table.
    """

    flax: type | None
    torch: str | type | None = None
    keras: str | type | None = None
    axes: str = ""
    torch_axes: str | None = None
    settings: tuple["S | Size | AxisSetting | AxesSetting", ...] = ()
    params: tuple[P, ...] = ()
    ranks: tuple[int, ...] = ()
    channel: str | None = None
    keras_defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    function: tuple[str, Mapping[str, Any]] | None = None
    kind: Literal["", "flatten", "reshape", "permute", "einsum", "slice", "merge", "join",
                  "contract", "parameter"] = ""  # fmt: skip
    fused_activation: bool = False
    special: Special = dataclasses.field(default_factory=Special)
    rank_of: str | None = None
    ordered: bool = False
    halves: str | None = None
    single: str | None = None
    fits: Callable[[Framework, "Layer"], bool] | None = None
    lower: Callable[[Framework, "Layer", int | None], "list[Layer] | None"] | None = None
    lacks: Mapping[str, str] = dataclasses.field(default_factory=dict)
    sizes: Callable[[Mapping[str, Any]], dict[str, int]] | None = None
    note: str = ""
    several: str = ""
    torch_several: str = ""
    several_least: int = 2

    def spec(self, framework: Framework) -> tuple[list[str], list[str]]:
        text = self.torch_axes if framework == "torch" and self.torch_axes else self.axes
        left, _, right = text.partition("->")
        return left.split(), right.split()

    def several_spec(self, framework: Framework) -> tuple[list[list[str]], list[str]]:
        text = self.torch_several if framework == "torch" and self.torch_several else self.several
        left, _, right = text.partition("->")
        return [x.split() for x in left.split(",")], right.split()

    def right(self, framework: Framework, fields: Mapping[str, Any]) -> list[str]:
        """The letters of the output, which a setting may keep or drop."""
        left, right = self.spec(framework)
        if fields.get("keepdims"):
            return left
        dropped = ("t",) if fields.get("return_sequences") is False else ()
        return [x for x in right if x not in dropped]

    def class_in(self, framework: Framework) -> str | None:
        if framework == "flax":
            return self.flax.__name__ if self.flax else None
        found = self.torch if framework == "torch" else self.keras
        return found.__name__ if isinstance(found, type) else found


def joined(parts: Sequence[str]) -> str:
    """The name of a layer inside others, such as ``features/0``."""
    return "/".join(_tree.escape(p) for p in parts)


def parts_of(name: str) -> list[str]:
    """The inverse of :func:`joined`."""
    return [_tree.unescape(p) for p in _tree.split(name)]


@dataclasses.dataclass
class Layer:
    """One layer as one framework says it: its class name, settings and arrays by name.

    The name of a layer inside another has the parts of both, see :func:`joined`.
    """

    name: str
    kind: str
    settings: dict[str, Any]
    arrays: dict[str, Any] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fused: bool = False  # no layer of its own in the source, but a part of one
    inner: "tuple[Layer, ...]" = ()  # what a wrapper wraps
    group: str = ""  # of a Keras layer, where its arrays stand in a weights file
    dtype: str | None = None  # what it computes in, where it says so
    inputs: tuple[str, ...] = ()  # the names of the layers, or of the model's inputs, that it takes
    of: str = ""  # the layer that it calls again
    shape: tuple[int | None, ...] | None = None  # what it gives, without the batch
    masked: bool = False  # a layer of Keras that computes with the masks of what it takes
    maskless: bool = False  # of an operation of Keras, which knows no masks
    given_mask: str = ""  # the keyword by which a call of Keras tells the mask of what it takes

    def __str__(self) -> str:
        return f"{self.name} ({self.kind})"


@dataclasses.dataclass(frozen=True)
class LiveLeaf:
    """One weight of a live model in Flax's names and axes, and the way to write it back."""

    path: str
    value: Any
    known: Known  # what its class tells, which is little where it has no row
    write: Callable[[Any], None]
    collection: str = "params"  # or "batch_stats"
    also: dict[str, tuple[int, ...]] = dataclasses.field(
        default_factory=dict
    )  # where it is tied to
    own: dict[str, list[str]] = dataclasses.field(
        default_factory=dict
    )  # by path, what its framework calls it, with slashes
    source: Any = None  # the parameter that it is, if it is one
    read: Callable[[Any], Any] | None = None  # from the axes of that to those of the value


def own_names(*each: Sequence[str]) -> list[str]:
    """What a framework calls a weight, of the parts of its names."""
    return list(dict.fromkeys("/".join(map(_tree.escape, parts)) for parts in each))


@dataclasses.dataclass
class At:
    """Where a special function is: the layer's name, and the spatial sizes before it."""

    place: str
    sizes: tuple[int | None, ...]
    non_negative: bool = False  # whether its input is known to be >= 0
    rank: int | None = None
    numbered: tuple[int | None, ...] = ()  # the sizes of the axes of an AxesSetting

    def known(self, why: str) -> tuple[int, ...]:
        if not self.sizes or any(s is None for s in self.sizes):
            raise refuse(
                self.place,
                f"{why} depends on the input's size, which is not known",
                "give input_shape= (without the batch axis)",
            )
        return tuple(s for s in self.sizes if s is not None)


class Take:
    """A layer's settings; what is read is marked as taken."""

    def __init__(
        self,
        place: str,
        framework: Framework,
        values: Mapping[str, Any],
        defaults: Mapping[str, Any],
    ):
        self.place, self.framework = place, framework
        self.values, self.defaults = values, defaults
        self.taken: set[str] = set()

    def __call__(self, name: str) -> Any:
        self.taken.add(name)
        if name in self.values:
            return self.values[name]
        if name in self.defaults:
            return self.defaults[name]
        way = "get_config of its class has to tell it" if self.framework == "keras" else ""
        raise refuse(self.place, f"the setting {name!r} is missing", way)

    def check_all_taken(self) -> None:
        """Raises for any setting off its default that nobody took."""
        for name, value in self.values.items():
            if name in self.taken or is_training(self.framework, name):
                continue
            if name in self.defaults and same(value, self.defaults[name]):
                continue
            expected = (
                f"only {self.defaults[name]!r} can be converted"
                if name in self.defaults
                else "this setting is not known"
            )
            raise refuse(self.place, f"{name}={value!r:.200}: {expected}", _WAYS.get(name, ""))


_WAYS = {
    "lora_rank": "from_keras(keras.saving.load_model(path)) takes the sum that the layer computes"
}


def same(a: Any, b: Any) -> bool:
    a, b = fl.tuples(a), fl.tuples(b)
    if hasattr(a, "shape") or hasattr(b, "shape"):  # arrays, which are equal in each entry
        return type(a) is type(b) and np.array_equal(a, b)
    if isinstance(b, int) and isinstance(a, tuple):
        return all(x == b for x in a)
    return (type(a) is type(b) and bool(a == b)) or (a is b) or (a == b and not callable(a))


def whole(x: Any) -> int:
    """A positive whole number."""
    if isinstance(x, bool) or not isinstance(x, int | np.integer) or x < 1:
        raise ValueError("expected a whole number of at least 1")
    return int(x)


def flag(x: Any) -> bool:
    """True or False."""
    if not isinstance(x, bool | np.bool_):
        raise ValueError("expected True or False")
    return bool(x)


def number(x: Any) -> float:
    """A finite number."""
    if isinstance(x, bool) or not isinstance(x, int | float | np.number) or not np.isfinite(x):
        raise ValueError("expected a number")
    return float(x)


def each(rank: int) -> Callable[[Any], Any]:
    """An int as a tuple of so many ints, a list as a tuple."""

    def normal(x: Any) -> Any:
        if x is None:
            return None
        listed = (x,) * rank if isinstance(x, int | np.integer) else tuple(x)
        if len(listed) != rank:
            raise ValueError(f"expected {rank} numbers")
        return tuple(whole(v) if v else int(v) for v in listed)

    return normal


def sides(x: Any, rank: int) -> tuple[tuple[int, int], ...]:
    """(before, after) for each axis: torch says one number for both, ONNX two."""
    if isinstance(x, list | tuple) and all(isinstance(p, list | tuple) and len(p) == 2 for p in x):
        if len(x) != rank:
            raise ValueError(f"expected {rank} pairs")
        return tuple((int(lo), int(hi)) for lo, hi in x)
    return tuple((p, p) for p in each(rank)(x))


def order(source: list[str], target: list[str], rank: int) -> tuple[int, ...]:
    """The transposition from one list of letters to another, ``*x`` expanded to fill the rank."""

    def expand(letters: list[str]) -> list[str]:
        fill = rank - sum(not x.startswith("*") for x in letters)
        return [
            y
            for x in letters
            for y in ([f"{x}{i}" for i in range(fill)] if x.startswith("*") else [x])
        ]

    wanted, have = expand(target), expand(source)
    if len(have) != rank:
        raise ConversionError(f"an array of rank {rank} where axes {' '.join(source)} are expected")
    return tuple(have.index(x) for x in wanted)


def read_settings(row: Row, framework: Framework, layer: Layer, at: At) -> dict[str, Any]:
    """The layer's settings under their Flax names; any that nobody takes raises."""
    defaults = dict(layer.defaults)
    if framework == "keras":
        defaults |= row.keras_defaults
        defaults |= {
            s.keras: s.keras_default
            for s in row.settings
            if not isinstance(s, Size) and s.keras and s.keras_default is not REQUIRED
        }
        if row.fused_activation:
            defaults["activation"] = "linear"
    take = Take(at.place, framework, layer.settings, defaults)
    fields: dict[str, Any] = {}
    for setting in row.settings:
        if isinstance(setting, Size):
            if framework == "torch":
                take(setting.torch)
            continue
        name = setting.name(framework)
        if isinstance(setting, AxesSetting):
            fields[setting.flax] = take(name) if name else None
        elif isinstance(setting, AxisSetting):
            fields[setting.flax] = take(name) if name else setting.torch_fixed
        elif name == "":
            continue
        elif name is None:
            fields[setting.flax] = flax_default(row, setting.flax)
        else:
            value = take(name)
            if framework == "torch" and setting.torch_io:
                value = setting.torch_io[0](value)
            try:
                fields[setting.flax] = setting.normal(value)
            except (TypeError, ValueError) as error:
                raise refuse(at.place, f"{name}={value!r}: {error}") from error
    try:
        row.special.read(framework, take, fields, at)
    except (TypeError, ValueError) as error:
        if isinstance(error, ConversionError):
            raise
        raise refuse(at.place, f"a setting can't be read ({error})") from error
    take.check_all_taken()
    return fields


def flax_default(row: Row, name: str) -> Any:
    cls: Any = row.flax
    return cls.__dataclass_fields__[name].default if cls else None


def output_sizes(
    row: Row, fields: Mapping[str, Any], inputs: Sequence[int | None], place: str
) -> dict[str, int | None]:
    """The size of each letter that the Flax layer gives, by ``jax.eval_shape``."""
    left, right = row.spec("flax")[0][1:], row.right("flax", fields)[1:]
    # The number of steps changes no other size.
    inputs = [1 if s is None and x == "t" else s for x, s in zip(left, inputs, strict=True)]
    if any(s is None for s in inputs):
        return dict.fromkeys(right)
    settings: dict[str, Any] = {
        s.flax: fields[s.flax] for s in row.settings if isinstance(s, S) and s.flax in fields
    }
    row.special.write("flax", dict(fields), settings, At(place, ()))
    cls: Any = row.flax
    module = cls(**settings)
    try:
        hash(module)
        shape_of: Callable[..., tuple[int, ...]] = _shape_of
    except TypeError:  # one of its settings is an array
        shape_of = _shape_of.__wrapped__
    try:
        shape = shape_of(module, tuple(inputs))
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise refuse(place, f"an input of {tuple(inputs)} does not fit: {error}") from error
    if 0 in shape:
        raise refuse(place, f"an input of {tuple(inputs)} is too small for it")
    return dict(zip(right, shape[1:], strict=True))


@functools.lru_cache(4096)
def _shape_of(module: Any, inputs: tuple[int, ...]) -> tuple[int, ...]:
    """What a module gives for one input; a model has many layers alike, and is walked often."""
    x = jax.ShapeDtypeStruct((1, *inputs), jnp.float32)
    given = jax.eval_shape(lambda v: module.init_with_output(jax.random.key(0), v)[0], x)
    return tuple(given.shape)


def listed(x: Any) -> Any:
    """Tuples as lists, as JSON has them."""
    if isinstance(x, Mapping):
        return {k: listed(v) for k, v in x.items()}
    return [listed(v) for v in x] if isinstance(x, list | tuple) else x
