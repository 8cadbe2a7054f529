"""The nodes that the equations of a linen module become."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np

from fwt import layers as fl
from fwt._graph import Node, may_hold, renamed
from fwt.converters.frameworks.linen_values import Equation, Equations, Held, Slot
from fwt.converters.rows.row import joined, parts_of, refuse
from fwt.converters.walk.tensors import Names


@dataclasses.dataclass(frozen=True)
class Value:
    """A tensor that follows from the input: the node that gives it, and its shape with None for
    the batch, which is first even where it is not in the jaxpr. It may have one entry where the
    jaxpr repeats it."""

    name: str
    shape: tuple[int | None, ...]


class Reader(Names):
    """The nodes read so far, and what each slot is in their terms."""

    def __init__(self, equations: Equations, variables: Any, inputs: Sequence[str]):
        super().__init__()
        self.equations, self.tree = equations, variables
        self.nodes: list[Node] = []
        self.env: dict[int, Value] = {}  # by id of a slot
        self.arrays: dict[str, dict[tuple[str, ...], np.ndarray]] = {}  # of nodes of our own
        self.shapes: dict[str, tuple[int | None, ...]] = {}
        self.sources: dict[Any, Value] = {}
        self.index: dict[str, np.ndarray] = {}  # by array, the positions that are taken
        self.consumed: set[tuple[str, ...]] = set()  # arrays that nodes of our own hold, reshaped
        self.first: dict[
            tuple[str, ...], str
        ] = {}  # by path, the node that is a layer's first call
        self.products: dict[str, tuple[str, ...]] = {}  # by Dense of our own, its kernel's path
        self.behind: dict[str, str] = {}  # by a reshape of what such a Dense gives, the Dense
        self.owned: set[str] = set()  # the modules whose kernels they have
        self.shared: set[tuple[str, ...]] = set()  # tables that more than their own layer takes
        self.done: set[int] = set()  # equations that are read already
        for path in equations.held:
            for count in range(2, len(path) + 1):
                self.taken["/".join(path[1:count])] = 1
        for name, slot in zip(inputs, equations.inputs, strict=True):
            self.taken[name] = 1
            self.env[id(slot)] = Value(name, self.sizes(slot, "the input"))
            self.shapes[name] = self.env[id(slot)].shape
        self.readers: dict[int, list[Equation]] = {}
        self.givers = {id(s): e for e in equations.all for s in e.outs}
        for equation in equations.all:
            for slot in equation.ins:
                self.readers.setdefault(id(slot), []).append(equation)

    # -- what is known of a slot ------------------------------------------------------------------

    def batch_of(self, slot: Slot) -> int | None:
        """Which of its axes is the batch; None where it is no axis alone."""
        found = [i for i, s in enumerate(slot.shape) if not isinstance(s, int | np.integer)]
        alone = len(found) == 1 and str(slot.shape[found[0]]) in self.equations.batches
        return found[0] if alone else None

    def axis(self, slot: Slot, axis: int) -> int:
        """An axis of a slot as that of its value, whose batch is first."""
        batch, axis = self.batch_of(slot) or 0, int(axis) % len(slot.shape)
        return 0 if axis == batch else axis + (axis < batch)

    def sizes(self, slot: Slot, place: str) -> tuple[int | None, ...]:
        """The shape of its value; refuses one without a batch of its own."""
        batch = self.batch_of(slot)
        if batch is not None:
            return (None, *(int(s) for i, s in enumerate(slot.shape) if i != batch))
        said = ", ".join(map(str, slot.shape))
        raise refuse(place, f"it gives a tensor of shape ({said}), of which no axis is the batch "
                     "(b) alone", "keep the batch out of reshapes")  # fmt: skip

    def read_once(self, slot: Slot) -> Equation | None:
        """The one equation that takes it, if it is no output either."""
        found = self.readers.get(id(slot), [])
        if len(found) != 1 or any(slot is s for s in self.equations.outs):
            return None
        return found[0]

    def giver(self, slot: Slot) -> Equation | None:
        """The equation that gives a slot."""
        return self.givers.get(id(slot))

    def value(self, slot: Slot, place: str) -> Value:
        """A slot as a tensor of its full size."""
        found = self.env.get(id(slot)) if slot.follows else None
        if found is None:
            if slot.follows:
                raise AssertionError(f"{place}: nothing gives it")
            raise refuse(place, slot.why_not or "it is computed without the input")
        sizes = self.sizes(slot, place)
        if found.shape == sizes:
            return found
        ones = [1 if a == b else b or 1 for a, b in zip(found.shape, sizes, strict=True)]
        other = self.constant(np.ones(ones, np.float32), place)
        made = self.emit(fl.Multiply(), [found, other], f"{place}__expand", sizes)
        self.env[id(slot)] = made
        return made

    def thin(self, slot: Slot, place: str) -> Value:
        """A slot as a tensor that may have one entry where others have several."""
        return self.env.get(id(slot)) or self.value(slot, place)

    # -- nodes ------------------------------------------------------------------------------------

    def emit(
        self,
        layer: Any,
        inputs: Sequence[Value],
        place: str,
        shape: Sequence[int | None],
        arrays: Mapping[tuple[str, ...], np.ndarray] | None = None,
        named: bool = False,
    ) -> Value:
        """A layer of our own; ``arrays`` by collection and path in it."""
        name = place if named else self.unique(place)
        self.nodes.append(Node(name, layer, tuple(v.name for v in inputs)))
        self.arrays[name] = dict(arrays or {})
        self.shapes[name] = tuple(shape)
        return Value(name, tuple(shape))

    def constant(self, value: np.ndarray, place: str) -> Value:
        """An array that is part of the model as a number is."""
        key = value.shape, value.dtype.name, value.tobytes()
        if key not in self.sources:
            layer = fl.Constant.holding(value)
            self.sources[key] = self.emit(layer, [], f"{place}__constant", value.shape)
        return self.sources[key]

    def array(self, slot: Slot, place: str) -> Value:
        """A known slot as a node without inputs; a learned one under its own name."""
        if slot.known is None:
            raise refuse(place, slot.why_not or "it is computed without the input")
        held = slot.held
        if held is None or not held.learned:
            if not slot.learned:
                known = slot.known
                wide = known.astype(np.float32) if known.dtype.kind in "iub" else known
                return self.constant(wide, place)
            key: Any = id(slot)
            if key not in self.sources:
                self.sources[key] = self.emit(
                    fl.Parameter(shape=slot.known.shape), [], f"{place}__computed",
                    slot.known.shape, {("params",): slot.known},
                )  # fmt: skip
            return self.sources[key]
        return self.parameter(held, place)

    def parameter(self, held: Held, place: str) -> Value:
        """An array of the model, or entries of it."""
        path = joined(held.path[1:])
        where, shape = held.where, held.array.shape
        every = np.array_equal(where.reshape(-1), np.arange(held.array.size))
        front = (
            where.shape[where.ndim - len(shape) :] == shape if where.ndim >= len(shape) else False
        )
        if every and front:
            where = where.reshape(shape)
        key = "held", path
        if key in self.sources:
            known, seen = self.sources[key], self.index[path]
            if np.array_equal(seen, where):
                return known
            raise refuse(place, f"it takes {path} in another way than an operation before it")
        layer: Any = fl.Parameter(shape=shape)
        if not (every and front):
            layer = fl.Indexed.at(where, shape)
        made = self.emit(layer, [], path, where.shape, {("params",): held.array}, named=True)
        self.sources[key], self.index[path] = made, where
        return made

    def call(
        self,
        layer: Any,
        path: tuple[str, ...],
        inputs: Sequence[Value],
        shape: Sequence[int | None],
    ) -> Value:
        """A call of a layer of the model; a second one has its weights too."""
        first = self.first.get(path)
        name = joined(path) or type(layer).__name__.lower()
        if first is None:
            self.first[path] = name
        else:
            name = self.unique(name)
        takes = tuple(v.name for v in inputs)
        self.nodes.append(Node(name, None if first else layer, takes, first or ""))
        self.shapes[name] = tuple(shape)
        return Value(name, tuple(shape))

    def dense(self, value: Value, kernel: np.ndarray, slot: Slot, place: str) -> Value:
        """The product of a tensor with a matrix, which has the name of its module if it is one's
        kernel."""
        held = slot.held
        name = self.unique(place)
        if held is not None and held.learned and held.path[-1] == "kernel" and len(held.path) > 2:
            owner = joined(held.path[1:-1])
            if owner not in self.owned:
                self.owned.add(owner)
                name = owner
                self.products[name] = held.path
        if held is not None:
            self.consumed.add(held.path)
        layer = nn.Dense(kernel.shape[1], use_bias=False)
        arrays: dict[tuple[str, ...], np.ndarray] = {("params", "kernel"): kernel}
        shape = (*value.shape[:-1], kernel.shape[1])
        return self.emit(layer, [value], name, shape, arrays, named=True)

    def with_bias(self, value: Value, bias: Held) -> Value:
        """The Dense that gives a value, with a bias too."""
        name = self.behind.get(value.name, value.name)
        at = next(i for i, n in enumerate(self.nodes) if n.name == name)
        node = self.nodes[at]
        self.nodes[at] = Node(name, nn.Dense(node.layer.features), node.inputs)
        self.arrays[name]["params", "bias"] = bias.array.reshape(-1)
        self.consumed.add(bias.path)
        for known in (value.name, name):
            self.products.pop(known, None)
        return value

    def upsampled(
        self, value: Value, sizes: tuple[int, ...], shape: Sequence[int | None], place: str
    ) -> Value:
        """Each entry repeated along spatial axes, also behind such a layer."""
        last = self.nodes[-1] if self.nodes else None
        if last is not None and last.name == value.name and isinstance(last.layer, fl.UpSample):
            both = tuple(a * b for a, b in zip(last.layer.size, sizes, strict=True))
            self.nodes[-1] = Node(last.name, fl.UpSample(both), last.inputs)
            return Value(last.name, tuple(shape))
        return self.emit(fl.UpSample(sizes), [value], place, shape)

    # -- the result -------------------------------------------------------------------------------

    def used(self, ends: Sequence[str]) -> list[Node]:
        """The nodes that an output follows from."""
        needed = set(ends)
        for node in reversed(self.nodes):
            if node.name in needed:
                needed |= {*node.inputs, node.of}
        return [n for n in self.nodes if n.name in needed]

    def apart(self, nodes: Sequence[Node], outputs: Any) -> tuple[list[Node], Any]:
        """The nodes and outputs with other names for those of our own whose path lies inside that
        of a node which may have arrays, as where an operation is named after its module."""
        holders = {tuple(parts_of(n.name)) for n in nodes if n.layer and may_hold(n.layer)}
        alias: dict[str, str] = {}
        for node in nodes:
            parts = parts_of(node.name)
            count = next((k for k in range(1, len(parts)) if tuple(parts[:k]) in holders), None)
            if count is not None:
                flat = "__".join(parts[count - 1 :])
                alias[node.name] = self.unique(joined([*parts[: count - 1], flat]))
        for old, new in alias.items():
            self.arrays[new] = self.arrays.pop(old, {})
            self.shapes[new] = self.shapes[old]
        made = [
            Node(alias.get(n.name, n.name), n.layer, tuple(alias.get(i, i) for i in n.inputs), n.of)
            for n in nodes
        ]
        return made, renamed(outputs, alias)

    def lengths(self, nodes: Sequence[Node]) -> dict[str, int]:
        """By name of a Slice, the size of the axis that it cuts."""
        cuts = [n for n in nodes if isinstance(n.layer, fl.Slice)]
        return {n.name: self.shapes[n.inputs[0]][n.layer.axis] or 0 for n in cuts}

    def variables(self, nodes: Sequence[Node]) -> tuple[dict[str, Any], list[str]]:
        """The variables of the nodes, and the paths of weights that none has."""
        out: dict[str, Any] = {"params": {}}
        whole = {tuple(path): name for path, name in self.first.items()}
        names = {n.name for n in nodes}
        used: set[tuple[str, ...]] = set()
        for path, held in self.equations.held.items():
            collection, *inside = path
            owner = next((tuple(inside[:k]) for k in range(len(inside) + 1)
                          if tuple(inside[:k]) in whole), None)  # fmt: skip
            if owner is None or whole[owner] not in names:
                continue
            used.add(path)
            rest = inside[len(owner) :]
            put(out, [collection, *parts_of(whole[owner]), *rest], held.array)
        for node in nodes:
            for (collection, *rest), value in self.arrays.get(node.name, {}).items():
                put(out, [collection, *parts_of(node.name), *rest], value)
        mine = {id(v) for n in nodes for v in self.arrays.get(n.name, {}).values()}
        left = [joined(p[1:]) for p, h in self.equations.held.items()
                if p not in used and h.learned and id(h.array) not in mine
                and p not in self.consumed]  # fmt: skip
        return out, left


def put(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
    *inside, leaf = path
    for part in inside:
        tree = tree.setdefault(part, {})
    tree[leaf] = value
