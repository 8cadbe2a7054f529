"""Sequential: named layers, one after the other."""

import dataclasses
import functools
import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.errors
import flax.linen as nn
import jax

from fwt import _tree
from fwt import layers as _layers
from fwt._axes import Known, KnowsAxes
from fwt._types import Array, FwtError

# Where a layer says whether it trains: set from `train` if the layer's own attribute is None.
_FLAGS = {"use_running_average": False, "deterministic": False, "train": True}


@dataclasses.dataclass(frozen=True)
class Named:
    """A layer and its name. linen adopts modules that it finds in tuples and lists and names them
    itself; in a dataclass it leaves them alone."""

    name: str
    layer: Any

    def __reduce__(self) -> Any:
        return _remake, (self.name, type(self.layer), settings_of(self.layer))


def settings_of(layer: nn.Module) -> dict[str, Any]:
    """The fields that are off their defaults (a default initializer is a closure, which does not
    pickle)."""
    out = {}
    for field in dataclasses.fields(layer):
        if not field.init or field.name in ("parent", "name"):
            continue
        value = getattr(layer, field.name)
        if field.default is dataclasses.MISSING or value is not field.default:
            factory = field.default_factory
            if factory is not dataclasses.MISSING and value == factory():
                continue
            out[field.name] = value
    return out


def _remake(name: str, cls: type, settings: dict[str, Any]) -> Named:
    return Named(name, cls(**settings))


def _remake_sequential(
    layers: Any, input_shape: Any, sidecar: str = "", turned: bool = False
) -> "Sequential":
    return Sequential(layers, input_shape, sidecar, turned)


@functools.cache
def _flag(cls: Any) -> str | None:
    parameters = inspect.signature(cls.__call__).parameters
    return next((f for f in _FLAGS if f in parameters), None)


class Sequential(nn.Module, KnowsAxes):
    """Layers applied one after the other, each under its own name.

    Unlike ``nn.Sequential``, which renames its children ``layers_0``, it keeps names: the params
    are ``{"params": {name: ...}}``. It can be hashed, compared and pickled, so that two loads of
    one file share their compiled functions.

    Args:
        layers: ``(name, module)`` pairs, a dict of them, or plain modules, which take their own
            ``name`` or their index; a known function such as ``nn.relu`` becomes its layer.
        input_shape: the shape of one input without the batch axis, None for an unknown size, if
            known: what writers of Keras models need.
        sidecar: what a converter keeps of another framework for the way back, as JSON.
        turned: whether it is made of a channels-first Keras model with a Flatten, whose own files
            have the rows behind that in another order.

    Raises:
        FwtError: for a name that is used twice or is not text, or a layer that is no module.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> net = Sequential([("hidden", nn.Dense(4)), nn.relu, nn.Dense(2)])
        >>> variables = net.init(jax.random.key(0), jnp.ones((1, 3)))
        >>> sorted(variables["params"])
        ['2', 'hidden']
        >>> net.apply(variables, jnp.ones((5, 3))).shape
        (5, 2)
    """

    layers: Any
    input_shape: Any = None
    sidecar: str = ""
    turned: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", _named(self.layers))
        shape = _layers.tuples(self.input_shape)
        sizes = shape if isinstance(shape, tuple) else ("?",)
        if shape is not None and not all(s is None or (type(s) is int and s > 0) for s in sizes):
            raise FwtError(
                f"Sequential: input_shape={self.input_shape!r} is no tuple of sizes (without the "
                "batch axis, None for any)"
            )
        object.__setattr__(self, "input_shape", shape)
        object.__setattr__(self, "_by_name", {n.name: n.layer for n in self.layers})
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """The output for a batch.

        Args:
            x: (n, ...) in the layout of the first layer.
            train: whether BatchNorm uses and updates the batch's statistics and Dropout drops;
                only for layers that do not say so themselves.
        """
        for named in self.layers:
            cls: Any = type(named.layer)
            settings = flags(named.layer, train)
            layer = named.layer.clone(parent=self, name=named.name)
            try:
                x = layer(x, **settings)
            except flax.errors.ScopeParamShapeError as error:
                shape = "" if self.input_shape is None else f" (the model: {self.input_shape})"
                raise FwtError(
                    f"{named.name} ({cls.__name__}): its weights do not fit {x.shape}{shape}: "
                    "a batch comes first, and a converted model has its channels where layout= "
                    f"put them, last unless told otherwise ({error})"
                ) from error
        return x

    @nn.nowrap
    def _known_axes(self, path: str, rank: int) -> Known:
        """What the class of a layer tells of the axes of its leaf."""
        from fwt.converters.rows import table

        parts = _tree.split(path) or [""]
        layer = vars(self)["_by_name"].get(_tree.unescape(parts[0]))
        rest = "/".join(parts[1:])
        if isinstance(layer, Sequential):
            return layer._known_axes(rest, rank)
        return Known() if layer is None else table.known(layer, rest, rank)

    @nn.nowrap
    def _flattened_sizes(self) -> dict[str, tuple[int, ...]]:
        """By path of a kernel, the sizes that a Flatten made its inputs of."""
        steps, before = [], ""
        for named in self.layers:
            steps.append((_tree.escape(named.name), named.layer, (before,)))
            before = steps[-1][0]
        return flattened_sizes(steps, {"": self.input_shape})

    @nn.nowrap
    def _reordering(self) -> str:
        """A layer that counts several axes as one; empty where none does."""
        inner = (x.layer._reordering() for x in self.layers if isinstance(x.layer, KnowsAxes))
        own = reordering(((x.name, x.layer) for x in self.layers), self._flattened_sizes())
        return own or next(filter(None, inner), "")

    def __reduce__(self) -> Any:
        return _remake_sequential, (self.layers, self.input_shape, self.sidecar, self.turned)

    def __repr__(self) -> str:
        lines = []
        for named in self.layers:
            said = ", ".join(f"{k}={v!r}" for k, v in settings_of(named.layer).items())
            lines.append(f"  {named.name}: {type(named.layer).__name__}({said})\n")
        shape = "" if self.input_shape is None else f"  input_shape={self.input_shape}\n"
        return f"Sequential(\n{''.join(lines)}{shape})"


def flags(layer: Any, train: bool) -> dict[str, bool]:
    """How a layer is told whether it trains, where it does not say so itself."""
    cls: Any = type(layer)
    flag = _flag(cls)
    if flag is None or getattr(layer, flag, None) is not None:
        return {}
    return {flag: train if _FLAGS[flag] else not train}


def call(layer: Any, variables: Any, *xs: Any) -> Any:
    """The output of one layer at inference."""
    return layer.apply(variables, *xs, **flags(layer, False))


def kind_of(x: Any) -> str:
    """What something is, in a few words: the repr of a module has many lines."""
    if isinstance(x, type):
        return f"the class {x.__name__}"
    own = type(x).__module__.partition(".")[0]
    return repr(x) if own == "builtins" else f"a {own} {type(x).__name__}"


def as_layer(given: Any, place: str) -> nn.Module:
    """A linen module as it is, and a known function such as ``nn.relu`` as its layer."""
    if isinstance(given, nn.Module):
        return given
    if isinstance(given, type) or not callable(given):
        raise FwtError(
            f"{place} must be a linen module (called, as nn.Dense(3)) or an activation function, "
            f"found {kind_of(given)}"
        )
    return _layers.from_function(given)


def bare(layer: nn.Module) -> nn.Module:
    """A module without name and parent and with tuples for lists, so that equal ones are equal."""
    frozen = {
        f.name: _layers.tuples(getattr(layer, f.name))
        for f in dataclasses.fields(layer)
        if isinstance(getattr(layer, f.name), list)
    }
    return layer.clone(parent=None, name=None, **frozen)


def flattened_sizes(
    steps: Iterable[tuple[str, Any, tuple[str, ...]]], shapes: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
    """By path of a kernel, the sizes that a Flatten made its inputs of, given the path, the layer
    and the names of the inputs of each step, and the shapes of what the model takes."""
    if any(shape is None or None in shape for shape in shapes.values()):
        return {}
    found: dict[str, tuple[int, ...]] = {}
    given: dict[str, Any] = {n: jax.ShapeDtypeStruct((1, *s), "float32") for n, s in shapes.items()}
    factors: dict[str, tuple[int, ...]] = {}
    for path, layer, inputs in steps:
        xs = [given[name] for name in inputs]
        before = factors.get(inputs[0], ()) if len(inputs) == 1 else ()
        if isinstance(layer, nn.Dense) and before:
            found[f"{path}/kernel"] = before
        settings = flags(layer, False)
        given[path] = y = jax.eval_shape(
            lambda *xs, layer=layer, settings=settings: layer.init_with_output(
                jax.random.key(0), *xs, **settings
            )[0],
            *xs,
        )
        if isinstance(layer, _layers.Flatten) and len(xs[0].shape) > 2:
            factors[path] = xs[0].shape[1:]
        elif len(xs) == 1 and y.shape == xs[0].shape and not isinstance(layer, nn.Dense):
            factors[path] = before
    return found


def reordering(layers: Iterable[tuple[str, Any]], flattened: Mapping[str, tuple[int, ...]]) -> str:
    """The first layer that counts several axes as one, one of which may be the channels."""
    sizes = list(flattened.values())
    plain = sizes and all(s[-1] == 1 or math.prod(s[:-1]) == 1 for s in sizes)
    for name, layer in layers:
        axes = getattr(layer, "reduction_axes", 0)
        if isinstance(axes, Sequence) and len(axes) > 1:
            return name
        if isinstance(layer, _layers.Reshape) or (isinstance(layer, _layers.Flatten) and not plain):
            return name
    return ""


def _named(given: Any) -> tuple[Named, ...]:
    if isinstance(given, Mapping):
        given = given.items()
    if not isinstance(given, Iterable):
        raise FwtError(f"Sequential takes a list of layers, found {kind_of(given)}")
    out: list[Named] = []
    for index, entry in enumerate(given):
        if isinstance(entry, Named):
            out.append(entry)
            continue
        name, layer = entry if isinstance(entry, tuple) else (None, entry)
        layer = as_layer(layer, f"Sequential: entry {index}")
        name = name if name is not None else layer.name or str(index)
        if not isinstance(name, str) or not name:
            raise FwtError(f"Sequential: a layer's name is a non-empty text, found {name!r}")
        out.append(Named(name, bare(layer)))
    names = [n.name for n in out]
    if "params" in names:  # linen would take it for the collection
        raise FwtError("Sequential: a layer can't be named 'params'; give it another name")
    for name in names:
        if names.count(name) > 1:
            raise FwtError(
                f"Sequential: two layers are named {name!r}; give each its own name with "
                "(name, layer) pairs"
            )
    return tuple(out)
