"""What stands between the layers of an exported torch module: tensors that follow from the input,
and arrays of the model."""

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fwt.converters.frameworks.torch_layer import class_of, defaults_of, to_numpy
from fwt.converters.rows.row import Layer, joined, refuse
from fwt.converters.walk.tensors import Axes, Batched, Tensors, Value, wider


@dataclasses.dataclass(frozen=True)
class States:
    """What a recurrent layer gives beside its output: the last state of each direction."""

    sequence: Value
    layer: Layer
    time: int  # the axis of the sequence


class Shared(Exception):  # noqa: N818 - it is no error, but how the reading starts again
    """Several operations take one array, each in its own way."""

    def __init__(self, path: str):
        self.path = path


def _at(model: torch.nn.Module, path: str) -> Any:
    inside, _, name = path.rpartition(".")
    try:
        return getattr(model.get_submodule(inside), name)
    except AttributeError:
        return None


class Reader(Tensors):
    """The layers read so far, and what each node of the exported graph is in their terms."""

    def __init__(
        self, model: torch.nn.Module, held: Mapping[str, torch.Tensor], shared: frozenset[str]
    ):
        super().__init__(usual)
        self.shared = shared  # the arrays that stand between the layers, for several to take
        self.called: dict[Any, Layer] = {}  # by its kind and arrays, a layer of no module's
        self.model = model
        self.held = held
        every = (*model.named_parameters(), *model.named_buffers())
        named = [n for n, _ in (*model.named_modules(remove_duplicate=False), *every) if n]
        # What forward computes is called by no name that a module or an array has.
        self.own = {joined(n.split(".")) for n in named}
        self.saved = set(model.state_dict())
        self.paths_of = {id(array): path for path, array in every}
        self.env: dict[Any, Any] = {}  # what follows from the input: Value, States, a list
        self.values: dict[Any, torch.Tensor] = {}  # what does not
        self.sources: dict[Any, frozenset[str]] = {}  # the arrays of the model that it follows from
        # Of entries of one array, where they stand in it; None for the whole array.
        self.positions: dict[Any, tuple[str, torch.Tensor | None]] = {}
        self.index: dict[str, torch.Tensor] = {}  # by array, the positions that are taken
        self.paths: dict[str, frozenset[str]] = {}  # the arrays of the model in a layer
        # Of which of these a layer has a part alone, as positions in it.
        self.parts: dict[tuple[str, str], Any] = {}
        self.made: dict[Any, Value] = {}  # arrays between layers
        self.batch: Any = None  # the symbol that counts the examples
        self.rolls = False  # whether it moves three entries or more around the end of an axis
        self.by_sizes = False  # whether an operation may follow from the sizes of the example

    # -- names ---------------------------------------------------------------------------------

    def place(self, node: Any) -> str:
        """Where an operation is, for its name and for an error: its module and its own name."""
        path, name = [p for p in torch_path(node).split(".") if p], name_of(node)
        if path and self.model.get_submodule(".".join(path))._parameters:  # it may be a layer too
            *path, last = path
            name = f"{last}__{name}"
        place = joined([*path, name])
        return f"{place}__" if place in self.own else place

    # -- sizes ---------------------------------------------------------------------------------

    def sizes(self, shape: Sequence[Any], place: str) -> list[Batched]:
        out = []
        for size in shape:
            if isinstance(size, int):
                out.append((size, False))
                continue
            factor = size.node.expr / self.batch
            if not factor.is_Integer:
                raise refuse(place, f"the size {size.node.expr} follows from the number of "
                             "examples in another way than as a multiple of it")  # fmt: skip
            out.append((int(factor), True))
        return out

    def shape(self, node: Any) -> list[Batched]:
        return self.sizes(node.meta["val"].shape, self.place(node))

    # -- arrays of the model -------------------------------------------------------------------

    def canonical(self, path: str) -> str:
        """The first name of an array that has several."""
        return self.paths_of.get(id(_at(self.model, path)), path)

    def is_whole(self, node: Any, name: str) -> bool:
        """Whether a node is an array of this name of a module, and not computed from it."""
        path, index = self.positions.get(node, ("", None))
        if path.rpartition(".")[2] != name:
            return False
        whole = self.held[path].shape if path in self.held else ()
        return index is None or (index.shape == whole and torch.equal(index, _positions(whole)))

    def hold(self, node: Any, path: str) -> None:
        self.values[node] = self.held[path].detach()
        self.positions[node] = self.canonical(path), None
        known = _at(self.model, path) is not None  # else it is a constant of its forward
        self.sources[node] = frozenset([self.canonical(path)] if known else [])

    def fold(self, node: Any) -> None:
        """Computes what does not follow from the input."""

        def plain(x: Any) -> Any:
            if isinstance(x, torch.fx.Node):
                return self.values.get(x, 1)  # one example, along which all are alike
            return x

        tags = getattr(node.target, "tags", ())
        if torch.Tag.nondeterministic_seeded in tags:
            raise refuse(self.place(node), "it draws random numbers")
        if any(is_size(a) for a in node.all_input_nodes) and name_of(node) not in ALIKE:
            raise refuse(self.place(node), "it computes with the number of examples")
        args = torch.fx.map_arg(node.args, plain), torch.fx.map_arg(node.kwargs, plain)
        self.values[node] = node.target(*args[0], **args[1])
        given = (self.sources.get(a, frozenset()) for a in node.all_input_nodes)
        self.sources[node] = frozenset().union(*given)
        if self._is_bias(node):
            return
        first = self.positions.get(next(iter(node.all_input_nodes), None))
        if name_of(node) in SELECTS and first is not None:
            path, index = first
            given = node.all_input_nodes[0]
            index = _positions(self.values[given].shape) if index is None else index
            args = torch.fx.map_arg((node.args, node.kwargs), lambda a: (
                index if a is given else plain(a)))  # fmt: skip
            self.positions[node] = path, node.target(*args[0], **args[1])

    def _is_bias(self, node: Any) -> bool:
        """Whether an operation gives its bias alone, as a linear layer of zeros does."""
        if name_of(node) != "linear" or len(node.args) < 3 or node.args[2] not in self.positions:
            return False
        x, weight = (self.values[a] for a in node.args[:2])
        path, index = self.positions[node.args[2]]
        every = _positions(self.held[path].shape) if path in self.held else None
        whole = index is None or (every is not None and torch.equal(index, every))
        if x.any() or not whole or not weight.isfinite().all():
            return False
        self.sources[node] = self.sources[node.args[2]]
        self.positions[node] = path, _positions(self.held[path].shape).expand(
            self.values[node].shape)  # fmt: skip
        return True

    # -- layers --------------------------------------------------------------------------------

    def emit(
        self,
        kind: str,
        settings: Mapping[str, Any],
        inputs: Sequence[Value],
        name: str,
        shape: Sequence[int | None],
        axes: Axes | None = None,
        arrays: Mapping[str, Any] | None = None,
    ) -> Value:
        """A layer with all its settings, and what it gives."""
        given = {**usual(kind), **settings}
        return super().emit(kind, given, inputs, name, shape, axes, arrays)

    def dynamic(self, node: Any, place: str) -> Value:
        """What follows from the input; an array of the model becomes a layer."""
        found = self.env.get(node)
        if isinstance(found, Value) and not isinstance(node, torch.fx.Node):
            return found  # made here, at its full size
        if isinstance(found, Value):
            return self._at_full_size(found, self.sizes(node.meta["val"].shape, place), place)
        if isinstance(found, States):
            raise refuse(place, f"it uses the last states of {found.layer} in a way that is not "
                         "known", "take one by its index, such as hidden[-1]")  # fmt: skip
        raise refuse(place, "it is computed without the input")

    def _at_full_size(self, value: Value, sizes: Sequence[Batched], place: str) -> Value:
        """The value with what it only stands for, entries repeated along an axis."""
        ones = []
        for part, (size, _) in zip(value.axes, sizes, strict=True):
            found = [value.shape[a] for a in part]
            ones.append(size if found == [1] and size != 1 else 1)
        if all(n == 1 for n in ones):
            return value
        key = object()
        self.values[key], self.sources[key] = torch.ones(ones), frozenset()
        other = self.array(key, value, place)
        return self.emit("Multiply", {}, [value, other], f"{place}__expand", wider(value, other),
                         value.axes)  # fmt: skip

    def array(self, node: Any, like: Value, place: str, whole: bool = False) -> Value:
        """An array of the model that meets a value, entry by entry; ``whole`` gives it as many
        axes."""
        value = self.values[node]
        rank = len(like.axes)
        if value.ndim > rank:
            raise refuse(place, f"an array of rank {value.ndim} meets a tensor of rank {rank}")
        where = dict(zip(reversed(range(rank)), reversed(value.shape), strict=False))
        index: list[int] = []  # the axes of the array in the order of the value's
        sizes = []
        for axis in range(len(like.shape)):
            dim = next(i for i, part in enumerate(like.axes) if axis in part)
            if len(like.axes[dim]) > 1 or axis == 0:
                if where.get(dim, 1) != 1:
                    raise refuse(place, "it meets an array that has an entry for each example")
                sizes.append(1)
                continue
            if dim in where:
                index.append(dim - (rank - value.ndim))
            sizes.append(where.get(dim, 1))
        rest = [i for i in range(value.ndim) if i not in index]  # of one entry
        array = _at(self.model, self.positions.get(node, ("", None))[0])
        own = array.ndim if isinstance(array, torch.Tensor) else value.ndim

        def arranged(given: torch.Tensor) -> torch.Tensor:
            moved = given.permute(*rest, *index) if given.ndim else given
            plain = not whole and sizes[len(sizes) - given.ndim :] == list(moved.shape)
            if not plain:
                return moved.reshape(sizes)
            while moved.ndim > own and moved.shape[0] == 1:  # broadcasting adds them again
                moved = moved[0]
            return moved

        return self.between(node, arranged, place)

    def between(
        self, node: Any, arranged: Callable[[torch.Tensor], torch.Tensor], place: str
    ) -> Value:
        """An array as a layer without inputs: one of the model under its name, another as a
        constant, in the order and shape in which it is met."""
        value = arranged(self.values[node])
        paths = self.sources[node] & self.saved
        learned = {p for p in paths if isinstance(_at(self.model, p), torch.nn.Parameter)}
        path, index = self.positions.get(node, ("", None))
        if path in self.saved:
            index = _positions(self.values[node].shape) if index is None else index
            if made := self._named(path, arranged(index), place):
                return made
        key = node, tuple(value.shape), tuple(value.stride())
        if key not in self.made:
            kind, word = ("Parameter", "computed") if learned else ("Constant", "constant")
            self.made[key] = self._source(kind, f"{place}__{word}", value, place)
            self.paths[self.made[key].name] = frozenset(learned)
        return self.made[key]

    def _named(self, path: str, index: torch.Tensor, place: str) -> Value | None:
        """The layer of an array of the model, or of entries of it, by their positions; None for one
        that is not learned and was met in another way before."""
        if path in self.shared:
            return self._taken(path, index, place)
        known = self.made.get(path)
        if known is not None and torch.equal(self.index[path], index):
            return known
        array = _at(self.model, path)
        learned, whole = isinstance(array, torch.nn.Parameter), array.detach()
        if known is not None and learned:
            raise Shared(path)
        if known is not None:
            return None
        every = torch.equal(index.reshape(-1), torch.arange(whole.numel()))
        name = joined(path.split("."))
        # One that may be turned, with the channels first, is kept by the positions in it.
        turned = whole.ndim > 1 and whole.shape[-1] == 1
        if every and index.shape == whole.shape and not turned:
            made = self._source("Parameter" if learned else "PersistentBuffer", name, whole, place)
        else:
            kind = "Indexed" if learned else "IndexedBuffer"
            made = self._source(kind, name, index.int(), place, to_numpy(whole, place))
        self.made[path], self.index[path] = made, index
        self.paths[made.name] = frozenset([path])
        return made

    def _taken(self, path: str, index: torch.Tensor, place: str) -> Value:
        """A whole array that several operations take, or what one takes of it."""
        whole = _at(self.model, path).detach()
        if path not in self.made:
            name, kind = joined(path.split(".")), "PersistentBuffer"
            kind = "Parameter" if path in dict(self.model.named_parameters()) else kind
            self.made[path] = self._source(kind, name, whole, place)
            self.paths[self.made[path].name] = frozenset([path])
        value, every = self.made[path], _positions(whole.shape)
        if index.shape == every.shape and torch.equal(index, every):
            return value
        key = path, tuple(index.reshape(-1).tolist()), tuple(index.shape)
        if key in self.made:
            return self.made[key]
        if whole.ndim == 2 and index.shape == every.T.shape and torch.equal(index, every.T):
            made = self.emit("Permute", {"dims": (1, 0)}, [value], f"{place}__t", index.shape)
        elif _is_cut(index, every):
            start = int(index.reshape(-1)[0]) // max(every[0].numel(), 1)
            told = {"dim": 0, "start": start, "stop": start + len(index), "step": 1}
            made = self.emit("Slice", told, [value], f"{place}__part", index.shape)
        else:
            raise refuse(place, f"it takes {path} in another way than an operation before it", _OWN)
        self.made[key] = made
        return made

    def attended(self, value: Value, table: Value, place: str, name: str = "") -> Value:
        """The products of a tensor with each row of a table that is no layer's own."""
        value, label = self.lined_up(value, place), name or place
        if not value.last:
            raise refuse(place, "it works along the batch")
        sizes, width = value.sizes, table.shape[0]
        steps = math.prod(n for n, _ in sizes[1:-1])
        if len(sizes) != 3:
            sides = [sizes[0], (steps, False), sizes[-1]]
            value = self.reshaped(value, sides, f"{label}__rows")
        value = self.plain(value, label)
        shape = (*value.shape[:-1], width)
        made = self.emit("Attend", {}, [value, table], label, shape)
        if len(sizes) != 3:
            made = self.reshaped(made, [*sizes[:-1], (width, False)], f"{label}__shape")
        return made

    def _source(
        self, kind: str, name: str, value: torch.Tensor, place: str, table: Any = None
    ) -> Value:
        arrays = {"value": to_numpy(value, place)}
        settings: dict[str, Any] = {"shape": tuple(value.shape)}
        settings |= {} if table is None else {"table": table}
        return self.emit(kind, settings, [], name, value.shape, arrays=arrays)


def _is_cut(index: torch.Tensor, every: torch.Tensor) -> bool:
    """Whether positions are those of rows beside each other."""
    if index.ndim != every.ndim or not index.numel() or index.shape[1:] != every.shape[1:]:
        return False
    first = int(index.reshape(-1)[0])
    return torch.equal(index.reshape(-1), torch.arange(first, first + index.numel())) and (
        first % every[0].numel() == 0
    )


_OWN = ("give each a weight of its own, module.weight = torch.nn.Parameter(module.weight.detach()"
        ".clone())")  # fmt: skip


def _positions(shape: Sequence[int]) -> torch.Tensor:
    """Where each entry of an array stands in it."""
    return torch.arange(math.prod(shape)).reshape(tuple(shape))


# What gives the same for each example, so that one stands for all.
# What gives entries of its first argument as they are.
SELECTS = ("view", "reshape", "_unsafe_view", "unsqueeze", "squeeze", "flatten", "unflatten", "t",
           "permute", "transpose", "expand", "repeat", "slice", "select", "index", "clone",
           "contiguous", "alias", "detach", "roll", "flip", "index_select", "embedding", "unbind",
           "split", "chunk", "split_with_sizes", "getitem")  # fmt: skip
ALIKE = ("expand", "repeat", "zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "view",
          "reshape", "empty", "sym_size")  # fmt: skip


def torch_path(node: Any) -> str:
    """The path of the innermost module that an operation is in."""
    stack = node.meta.get("nn_module_stack") or {}
    return next((p for k, (p, _) in reversed(stack.items()) if not k.startswith("_empty")), "")


def name_of(node: Any) -> str:
    """An operation's name without what tells its variants apart."""
    target = node.target
    if hasattr(target, "_schema"):
        return str(target._schema.name.split("::")[1].rstrip("_"))
    return str(getattr(target, "__name__", target))


def is_size(node: Any) -> bool:
    return isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool)


def arguments(node: Any) -> dict[str, Any]:
    """The arguments of an operation by name, those at their defaults too."""
    schema = node.target._schema.arguments
    given = dict(zip((a.name for a in schema), node.args, strict=False))
    return {a.name: given.get(a.name, node.kwargs.get(a.name, a.default_value)) for a in schema}


def usual(kind: str) -> dict[str, Any]:
    """The defaults of the settings of a layer."""
    cls = class_of(kind)
    module = isinstance(cls, type) and issubclass(cls, torch.nn.Module)
    found = defaults_of(cls) if module else {}
    return {k: v for k, v in found.items() if v is not inspect.Parameter.empty}
