"""One side of ``verify``: how a model of each framework runs, its layers' outputs kept."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fwt import _nodes
from fwt._graph import (
    Graph,
    Node,
    counts_of,
    end_of,
    inputs_of,
    may_hold,
    names_in,
    nodes_of,
)
from fwt._sequential import Sequential, call
from fwt._types import ConversionError, Model
from fwt.converters import judge
from fwt.converters.rows.row import Framework, is_training, joined, parts_of
from fwt.converters.verification.ends import Kind, channel_of, ends
from fwt.converters.verification.names import call_name, first_call
from fwt.layers import Parameter

Taps = dict[str, np.ndarray]
Xs = Sequence[np.ndarray]


# Operations of Keras and ONNX that part numbers at others, which no layer tells.
PARTS = frozenset(
    {"Greater", "GreaterEqual", "GreaterOrEqual", "Less", "LessEqual", "LessOrEqual", "Equal",
     "NotEqual", "Floor", "FloorDivide", "Ceil", "Round", "Trunc", "Sign", "Mod", "Argmax",
     "ArgMax", "Argmin", "ArgMin", "Digitize", "Heaviside", "Cast"}
)  # fmt: skip


@dataclasses.dataclass
class Side:
    """A model: how it runs, its input, and the model that it is in Flax.

    ``run`` takes a batch for each input, and a part of itself by which each weight is moved; the
    model stays as it is. It gives what the model gives, one array, several or several by key. It is
    asked through ``outputs``.
    """

    run: Callable[[Xs, float], tuple[Any, Taps]]
    shape: tuple[int | None, ...] | None  # of its one input
    channels_first: bool  # at its ends
    # For inputs, and whether in the layout of the source.
    model: Callable[..., Model]
    integers: int | None = None  # the input is whole numbers, below this if straight into a table
    tables: Sequence[Any] = ()  # of embeddings, of which these are the rows
    turned: bool = False  # whether channels may come first inside
    dtypes: Sequence[Any] = ()  # of its weights
    computes: Sequence[Any] = ()  # dtypes that it computes in and its outputs don't tell
    model_first: bool = False  # whether channels come first at the ends of its Flax model
    names: Any = None  # of its modules and weights, for models that can't be converted
    settings: Sequence[tuple[str, float, int]] = ()  # numbers, each with the index of its layer
    time_first: bool = False  # whether the batch is the second axis, of sequences
    told: bool = True  # whether a layer tells that
    along: Any = None  # gives ``run`` and ``shape`` for the axis that the batch is, if it matters
    takes: Any = None  # the dtype that its input is cast to, if it says one, or one for each
    clamps: bool = False  # whether its functions end where others go on
    apart: bool = False  # whether its tables are not known to be fed the input as it is
    # Of several inputs: how many there are if that is known, their names, whether they are a
    # dict, the shapes, whether each has its channels first (None where no layer tells that it has
    # some), and below what its whole numbers must be (0 where no layer tells).
    count: int | None = None
    names_of: Sequence[str] | None = None
    by_key: bool = False
    is_file: bool = False  # of ONNX, which has both names and an order
    shapes: Sequence[Any] | None = None
    channels: Sequence[bool | None] | None = None
    counts: Sequence[int] | None = None
    gives: Sequence[str] | None = None  # the names of several outputs, if they have some
    # Each weight with its layer, of models that can't be converted.
    weights: Callable[[], Iterable[tuple[str, np.ndarray]]] = tuple
    # By output, the axis of its channels: -1 for the last, None where no layer tells.
    ends_at: dict[Any, int | None] = dataclasses.field(default_factory=dict)
    own: bool = False  # whether it is a module of one's own, whose thresholds no layer tells

    def swaps(self, xs: Xs) -> bool:
        """Whether it takes the axes 0 and 1 of a batch the other way round."""
        if len(xs) > 1:
            return False
        (x,) = xs
        return self.time_first and (x.ndim > 2 or (x.ndim == 2 and x.dtype.kind in "iu"))

    def ordered(self, order: Sequence[int]) -> "Side":
        """The side fed the inputs of another, in the other's order."""

        def run(xs: Xs, by: float) -> tuple[Any, Taps]:
            return self.run([xs[i] for i in order], by)

        def model(xs: Xs, *rest: Any) -> Model:
            return self.model([xs[i] for i in order], *rest)

        def back(values: Any) -> Any:
            if not isinstance(values, list | tuple):
                return values
            return [values[order.index(i)] for i in range(len(order))]

        told = ("names_of", "shapes", "channels", "counts", "takes")
        each = {name: back(getattr(self, name)) for name in told}
        return dataclasses.replace(self, run=run, model=model, **each)

    def outputs(self, xs: Xs, by: float = 0.0) -> tuple[Any, Taps]:
        """What it gives for batches (n, ...): its output and those of its layers, (n, ...)."""
        if not self.swaps(xs):
            return self.run(xs, by)
        (x,) = xs
        count = len(x)
        if count == x.shape[1]:  # one row more tells the batch from the time
            x = np.concatenate([x, x[-1:]])

        def back(v: np.ndarray) -> np.ndarray:
            if v.ndim > 1 and v.shape[0] != len(x) and v.shape[1] == len(x):
                v = np.ascontiguousarray(v.swapaxes(0, 1))
            return v[:count] if v.ndim and v.shape[0] == len(x) else v

        y, taps = self.run([np.ascontiguousarray(x.swapaxes(0, 1))], by)
        return jax.tree.map(back, y), {name: back(v) for name, v in taps.items()}

    def timed(self, first: bool) -> "Side":
        """The side with the time first, or the batch."""
        given = {} if self.along is None else dict(zip(("run", "shape"), self.along(int(first)),
                                                       strict=True))  # fmt: skip
        return dataclasses.replace(self, time_first=first, **given)

    def laid_out(self, channels_first: bool) -> "Side":
        """The side with channels first at its ends, or last, whatever its layers say."""
        same = self.model_first == self.channels_first
        return dataclasses.replace(
            self, channels_first=channels_first, model_first=channels_first if same else False
        )


OF_TRAINING = ("momentum", "rate", "dropout_rate", "dropout", "recurrent_dropout")
_OF_DRAWS = ("_initializer", "_regularizer", "_constraint", "seed")
_AXES = re.compile(r"(?:: |/)[^:]*(dim|axis|axes)[^:]*$")
_AT_RANDOM = ("Drop", "Noise", "Random")  # parts of the names of layers that only train


def numbers_of(
    framework: Framework, layers: Iterable[tuple[str, Any, Any]]
) -> list[tuple[str, float, int]]:
    """The numbers among the settings of layers, but those of training, by place. Of whole ones,
    those that name axes are left out, for an axis has two numbers.

    Args:
        framework: theirs.
        layers: each one's name, it, and its settings, a dictionary that may hold more.
    """
    found: list[tuple[str, float, int]] = []

    def under(place: str, value: Any, at: int) -> None:
        if type(value) is float or (type(value) is int and not _AXES.search(place)):
            found.append((place, value, at))
        pairs: Any = enumerate(value) if isinstance(value, list | tuple) else ()
        if isinstance(value, dict):
            pairs = [(k, v) for k, v in value.items() if not str(k).startswith("_")
                     and k not in (*OF_TRAINING, "padding_idx") and "drop" not in str(k)
                     and not str(k).endswith(_OF_DRAWS)
                     and not is_training(framework, str(k))]  # fmt: skip
        for name, one in pairs:
            under(f"{place}: {name}" if ":" not in place else f"{place}/{name}", one, at)

    for at, (place, layer, settings) in enumerate(layers):
        if not any(part in type(layer).__name__ for part in _AT_RANDOM):
            under(place, settings, at)
    return found


def permutes(layer: Any) -> tuple[int, ...] | None:
    """How a layer of Flax, torch or Keras permutes all axes."""
    dims = getattr(layer, "dims", None) if type(layer).__name__ == "Permute" else None
    if dims is None or 0 in dims:
        return None if dims is None else tuple(dims)
    return (0, *dims)  # Keras counts from the first axis behind the batch


def flax_side(model: Model) -> Side:
    if not isinstance(model.module, Sequential | Graph):
        return _linen_side(model)
    module: Any = model.module
    starts, end = inputs_of(module), end_of(module)
    layer_of = {n.name: n.layer for n in nodes_of(module)}

    def named(node: Node) -> str:
        base = layer_of.get(first_call(node.name))
        again = bool(node.of) or (base is not None and base == node.layer)
        return call_name(node.name, node.inputs, again)

    def run(xs: Xs, by: float = 0.0) -> tuple[Any, Taps]:
        taps: Taps = {}
        variables = dict(model.variables)
        if by:
            variables = jax.tree.map(lambda v: judge.nudged(v, by), variables)
        if isinstance(module, Graph):
            module.check_sizes(xs)
        values: dict[str, Any] = dict(zip(starts, xs, strict=True))
        for node, layer, own in each_layer(module, variables):
            given = [values[i] if i in starts else judge.unsettled(values[i], by)
                     for i in node.inputs]  # fmt: skip
            values[node.name] = y = call(layer, own, *given)
            taps[named(node)] = np.asarray(y)
        found = [np.asarray(values[n]) for n in names_in(end)]
        return dict(zip(end, found, strict=True)) if isinstance(end, Mapping) else found, taps

    layers = [(x, own) for _, x, own in each_layer(module, dict(model.variables))]
    several, counts = len(starts) > 1, counts_of(module)
    count = counts[0] or None
    tables = {n.inputs[0] for n in nodes_of(module)
              if type(layer_of[n.of or n.name]).__name__ == "Lookup"}  # fmt: skip
    rows = [own["params"]["embedding"] for x, own in layers
            if (count or several) and getattr(x, "num_embeddings", None)
            and (several or x.num_embeddings == count)]  # fmt: skip
    rows += [own["params"]["value"] for n, _, own in each_layer(module, dict(model.variables))
             if n.name in tables and own.get("params")]  # fmt: skip
    settings = numbers_of("flax", ((n.name, x, _fields(x))
                                 for n, x, _ in each_layer(module, {})))  # fmt: skip
    dtypes = [v.dtype for v in jax.tree.leaves(model.variables) if hasattr(v, "dtype")]
    told = [getattr(x, "dtype", None) for x, _ in layers]
    dtypes += [np.dtype(d) for d in told if d is not None]
    kinds = [kind for x, _ in layers for kind in kinds_of(x)]
    time_first, channels_first, told_batch, _ = ends("flax", kinds, False)
    side = Side(run, module.input_shape, channels_first, lambda *_: model, count, rows,
                dtypes=dtypes, model_first=channels_first, settings=settings, count=len(starts),
                time_first=time_first, told=told_batch, gives=_gives(end))  # fmt: skip
    takes = module.inputs if isinstance(module, Graph) else starts[0]
    by = {n.name: n for n in nodes_of(module)}

    def made(name: str) -> Any:
        if name not in by:
            return None
        kinds = list(kinds_of(layer_of[by[name].of or name]))
        return (kinds[0] if len(kinds) == 1 else None), by[name].inputs

    keys = end if isinstance(end, Mapping) else range(len(names_in(end)))
    side.ends_at = {key: channel_of("flax", False, name, made)
                    for key, name in zip(keys, names_in(end), strict=True)}  # fmt: skip
    side.by_key = isinstance(takes, Mapping)
    side.names_of = list(takes if isinstance(takes, Mapping) else names_in(takes))
    if not several:
        return side
    behind = {start: _behind(nodes_of(module), start) for start in starts}
    found = [ends("flax", (k for n in behind[s] for k in kinds_of(layer_of[n.of or n.name])), False)
             for s in starts]  # fmt: skip
    return dataclasses.replace(
        side, shape=None, shapes=module.input_shape, integers=None, counts=counts,
        takes=[np.dtype(np.int32) if c else None for c in counts],
        channels=[e.channels_first if e.has_channels else None for e in found],
        channels_first=any(e.channels_first for e in found),
    )  # fmt: skip


def _behind(nodes: Sequence[Node], start: str) -> list[Node]:
    """The nodes that follow from an input."""
    reached, out = {start}, []
    for node in nodes:
        if not reached.isdisjoint(node.inputs):
            reached.add(node.name)
            out.append(node)
    return out


def _gives(end: Any) -> list[str] | None:
    """The names of several outputs."""
    if isinstance(end, str):
        return None
    return list(end if isinstance(end, Mapping) else names_in(end))


def _linen_side(model: Model) -> Side:
    """A linen module of the user's own, of which only the output is known."""
    module, what = model.module, type(model.module).__name__
    if not hasattr(module, "apply"):
        what = f"a {what}, no module" if module is not None else "weights alone"
        raise ConversionError(f"verify: the Model holds {what}, which can't run")

    def run(xs: Xs, by: float = 0.0) -> tuple[Any, Taps]:
        variables = dict(model.variables)
        if by:
            variables = jax.tree.map(lambda v: judge.nudged(v, by), variables)
        xs = [x.copy() for x in xs]  # a layer may work in place
        return jax.tree.map(np.asarray, module.apply(variables, *xs)), {}

    def converted(*_: Any) -> Model:
        raise ConversionError(f"{what} is no fwt.Sequential, so that only outputs are compared")

    rows = _tables(model.variables)
    dtypes = [v.dtype for v in jax.tree.leaves(model.variables) if hasattr(v, "dtype")]
    return Side(run, None, False, converted, None, rows, dtypes=dtypes, told=False,
                apart=bool(rows), weights=lambda: _named(model.variables), own=True)  # fmt: skip


def _named(tree: Any) -> list[tuple[str, np.ndarray]]:
    """Each array in a tree with the path to what holds it."""
    found = ((jax.tree_util.keystr(k[:-1], simple=True, separator="/"), v)
             for k, v in jax.tree.leaves_with_path(tree))  # fmt: skip
    return [(name, np.asarray(v)) for name, v in found if hasattr(v, "dtype")]


def _tables(tree: Any) -> list[Any]:
    """The tables of embeddings in a tree."""
    ends = ((k[-1:], v) for k, v in jax.tree.leaves_with_path(tree))
    names = ((getattr(k[0], "key", None) if k else None, v) for k, v in ends)
    return [v for name, v in names if name == "embedding" and np.ndim(v) == 2]


def _fields(layer: Any) -> dict[str, Any]:
    fields = dataclasses.fields(layer) if dataclasses.is_dataclass(layer) else ()
    return {f.name: getattr(layer, f.name) for f in fields if f.name not in ("parent", "name")}


def kinds_in(module: Any) -> Iterator[Kind]:
    """What each layer of a Flax, nnx or Keras model tells of its axes."""
    for entry in module.layers:
        layer = getattr(entry, "layer", entry)
        layer = getattr(layer, "layer", layer)  # a linen layer inside nnx
        yield from kinds_of(layer)


def kinds_of(layer: Any) -> Iterator[Kind]:
    if hasattr(layer, "layers"):
        yield from kinds_in(layer)
    else:
        axis = getattr(layer, "axes", getattr(layer, "axis", None))
        first = axis == 1 or (isinstance(axis, list | tuple) and list(axis) == [1])
        first = first and ("Norm" in type(layer).__name__ or "PReLU" in type(layer).__name__)
        yield Kind(type(layer).__name__, permutes(layer), first)


def each_layer(module: Any, variables: Any) -> Iterator[tuple[Node, Any, Any]]:
    """The nodes of a model in order, each with its layer and the variables of that."""
    layers = {n.name: n.layer for n in nodes_of(module)}
    for node in nodes_of(module):
        name = node.of or node.name
        own: dict[str, Any] = {}
        for collection, tree in variables.items() if may_hold(layers[name]) else ():
            held: Any = tree
            for part in parts_of(name):
                held = held.get(part, {}) if isinstance(held, Mapping) else {}
            if isinstance(layers[name], Parameter) and not isinstance(held, Mapping):
                held = {"value": held}
            if held:
                own[collection] = held
        yield node, layers[name], own


def nnx_side(model: Any) -> Side:
    def run(xs: Xs, by: float = 0.0) -> tuple[Any, Taps]:
        def nudged(v: Any) -> Any:
            new = judge.nudged(v, by)
            return jnp.asarray(new) if isinstance(v, jax.Array) and new is not v else new

        taps: Taps = {}
        xs = [x.copy() for x in xs]  # a layer may work in place
        copied = _nodes.apart(model, nudged if by else None)
        copied.eval()

        def under(holder: Any, y: Any, inside: tuple[str, ...]) -> Any:
            for index, layer in enumerate(holder.layers):
                parts = (*inside, str(index))
                if type(layer) is nnx.Sequential:
                    y = under(layer, y, parts)
                else:
                    y = layer(judge.unsettled(y, by) if taps else y)
                    taps[joined(parts)] = np.asarray(y)
            return y

        if type(copied) is nnx.Sequential:
            return np.asarray(under(copied, xs[0], ())), taps
        return jax.tree.map(np.asarray, copied(*xs)), taps

    def converted(xs: Xs, *_: Any) -> Model:
        from fwt.converters.frameworks import nnx as _nnx

        return _nnx.from_nnx(model, list(xs) if len(xs) > 1 else None)

    first: Any = model
    while type(first) is nnx.Sequential and first.layers:
        first = first.layers[0]
    count = first.num_embeddings if isinstance(first, nnx.Embed) else None
    rows = [first.embedding[...]] if isinstance(first, nnx.Embed) else []
    dtypes = [v.dtype for v in jax.tree.leaves(nnx.state(model, nnx.Not(nnx.RngState)))
              if hasattr(v, "dtype")]  # fmt: skip
    kinds = kinds_in(model) if type(model) is nnx.Sequential else ()
    time_first, channels_first, told_batch, _ = ends("flax", kinds, False)
    held = lambda: _named(nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngState))))  # noqa: E731
    return Side(run, None, channels_first, converted, count, rows, dtypes=dtypes,
                model_first=channels_first, time_first=time_first,
                told=told_batch, weights=held, own=type(model) is not nnx.Sequential)  # fmt: skip
