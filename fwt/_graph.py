"""Graph: named layers, each with the names of what it takes."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.errors
import flax.linen as nn
import numpy as np

from fwt import _tree
from fwt import layers as _layers
from fwt._axes import Known, KnowsAxes
from fwt._sequential import (
    Named,
    Sequential,
    as_layer,
    bare,
    flags,
    flattened_sizes,
    kind_of,
    reordering,
    settings_of,
)
from fwt._types import FwtError
from fwt.layers.base import Layer

INPUT = "input"


@dataclasses.dataclass(frozen=True)
class Node:
    """One call of a layer in a graph.

    Attributes:
        name: a path, whose parts are joined by ``/``: the arrays of ``enc/0/conv`` stand under
            ``{"enc": {"0": {"conv": ...}}}``.
        layer: a linen module; None for a further call of a layer that another node has.
        inputs: the names of the nodes, or of inputs of the graph, that it takes, in order.
        of: the node whose layer, and so whose weights, this one calls again; else empty.

    Example:
        >>> Node("hidden", nn.Dense(3), ("input",)).inputs
        ('input',)
    """

    name: str
    layer: Any
    inputs: tuple[str, ...] = (INPUT,)
    of: str = ""

    def __reduce__(self) -> Any:
        if self.layer is None:
            return Node, (self.name, None, self.inputs, self.of)
        return _remake, (self.name, type(self.layer), settings_of(self.layer), self.inputs)


def _remake(name: str, cls: type, settings: dict[str, Any], inputs: tuple[str, ...]) -> Node:
    return Node(name, cls(**settings), inputs)


def _remake_graph(*given: Any) -> "Graph":
    return Graph(*given)


def path_parts(name: str) -> list[str]:
    """The parts of the path that a node's name is."""
    return [_tree.unescape(p) for p in _tree.split(name)]


def names_in(ends: Any) -> tuple[str, ...]:
    """The names in what a graph takes or gives: one name, several, or several by key."""
    if isinstance(ends, str):
        return (ends,)
    return tuple(ends.values()) if isinstance(ends, Mapping) else tuple(ends)


class Graph(nn.Module, KnowsAxes):
    """Layers that take what any of those before them give, several at once if need be.

    It is flat: the names of its nodes are paths, and the params have the shape, the names and at
    ``init`` the values of linen modules inside each other. It can be hashed, compared and pickled.

    Args:
        nodes: :class:`Node` objects, or ``(name, module, inputs)`` with one name or several as
            inputs, in an order in which each takes what stands before it. A Sequential or a Graph
            as a layer is taken apart, and its nodes keep its name before theirs.
        inputs: the name of the one array that it takes, or a tuple of names, or a dict of them.
        outputs: the name of the node whose output it gives, or a tuple, or a dict; the last node by
            default.
        input_shape: the shape of one input without the batch axis, None for an unknown size, if it
            is known; of several inputs a tuple of shapes in their order.
        sidecar: what a converter keeps of another framework for the way back, as JSON.
        turned: whether it is made of a channels-first Keras model with a Flatten, whose own files
            have the rows behind that in another order.
        fixed: for each input the sizes without the batch axis that it must have, None where any is
            right, and () where all are: a converter says so of a model that computes by them.

    Raises:
        FwtError: for a name that is used twice or unknown, a node among the arrays of another, or
            a layer that is no module.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> net = Graph([
        ...     ("a", nn.Dense(3), "input"),
        ...     ("b", nn.Dense(3), "a"),
        ...     ("sum", _layers.Add(), ("a", "b")),
        ... ])
        >>> variables = net.init(jax.random.key(0), jnp.ones((1, 2)))
        >>> sorted(variables["params"])
        ['a', 'b']
        >>> net.apply(variables, jnp.ones((5, 2))).shape
        (5, 3)
    """

    nodes: Any
    inputs: Any = INPUT
    outputs: Any = None
    input_shape: Any = None
    sidecar: str = ""
    turned: bool = False
    fixed: Any = ()

    def __post_init__(self) -> None:
        inputs = _ends(self.inputs, "inputs")
        nodes, alias = _flat(self.nodes, names_in(inputs))
        if not nodes and self.outputs is None:
            raise FwtError("Graph: without nodes it needs outputs=")
        outputs = _ends(nodes[-1].name if self.outputs is None else self.outputs, "outputs")
        if alias:
            outputs = _ends(renamed(outputs, alias), "outputs")
        _check(nodes, names_in(inputs), names_in(outputs))
        for name, value in (("nodes", nodes), ("inputs", inputs), ("outputs", outputs),
                            ("input_shape", _layers.tuples(self.input_shape)),
                            ("fixed", _sizes(self.fixed, names_in(inputs)))):  # fmt: skip
            object.__setattr__(self, name, value)
        object.__setattr__(
            self, "_by_path", {n.name: n.layer for n in nodes if n.layer is not None}
        )
        object.__setattr__(self, "_last", _last_uses(nodes, names_in(outputs)))
        super().__post_init__()

    @nn.compact
    def __call__(self, *xs: Any, train: bool = False) -> Any:
        """The output for a batch, in the form of ``outputs``.

        Args:
            xs: one array for each input, in their order, or all in one tuple, list or dict.
            train: whether BatchNorm uses and updates the batch's statistics and Dropout drops;
                only for layers that do not say so themselves.
        """
        names = names_in(self.inputs)
        if len(xs) == 1 and isinstance(xs[0], Mapping):
            keys = self.inputs if isinstance(self.inputs, Mapping) else dict.fromkeys(names)
            if set(xs[0]) != set(keys):
                raise FwtError(f"expected the inputs {', '.join(keys)}, found {', '.join(xs[0])}")
            xs = tuple(xs[0][key] for key in keys)
        elif len(xs) == 1 and isinstance(xs[0], tuple | list):
            xs = tuple(xs[0])
        if len(xs) != len(names):
            raise FwtError(f"expected the inputs {', '.join(names)}, found {len(xs)}")
        values = dict(zip(names, xs, strict=True))
        self.check_sizes(xs)
        bound: dict[str, Any] = {}
        done: Mapping[str, Sequence[str]] = vars(self)["_last"]
        for node in self.nodes:
            if isinstance(node.layer, _layers.Parameter):
                values[node.name] = self._array(node)
                continue
            layer = bound.get(node.of)
            if layer is None:
                layer = node.layer.clone(parent=self._scope(path_parts(node.name)), name=None)
            bound[node.name] = layer
            given = [values[i] for i in node.inputs]
            try:
                values[node.name] = layer(*given, **flags(layer, train))
            except flax.errors.ScopeParamShapeError as error:
                shapes = ", ".join(str(x.shape) for x in given)
                raise FwtError(
                    f"{node.name} ({type(layer).__name__}): its weights do not fit {shapes}: a "
                    "batch comes first, and a converted model has its channels where layout= put "
                    f"them, last unless told otherwise ({error})"
                ) from error
            del given
            for name in done.get(node.name, ()):
                del values[name]  # whose memory is free, outside of jit
        out = [values[name] for name in names_in(self.outputs)]
        if isinstance(self.outputs, Mapping):
            return dict(zip(self.outputs, out, strict=True))
        return out[0] if isinstance(self.outputs, str) else tuple(out)

    @nn.nowrap
    def check_sizes(self, xs: Sequence[Any]) -> None:
        """Raises for inputs of other sizes than those that are ``fixed``, in their order."""
        for name, x, sizes in zip(names_in(self.inputs), xs, self.fixed, strict=False):
            if told := unfit(name, getattr(x, "shape", ())[1:], sizes):
                raise FwtError(told)

    def _scope(self, parts: Sequence[str]) -> Any:
        scope: Any = self.scope
        for part in parts:
            scope = scope.push(part, reuse=True)
        return scope

    def _array(self, node: Node) -> Any:
        """A learned array, whose path is that of its node."""
        *inside, name = path_parts(node.name)
        return node.layer.of(self._scope(inside), name)

    @nn.nowrap
    def _known_axes(self, path: str, rank: int) -> Known:
        """What the class of a layer tells of the axes of its leaf."""
        from fwt.converters.rows import table

        parts = _tree.split(path)
        for count in range(len(parts), 0, -1):
            layer = vars(self)["_by_path"].get("/".join(parts[:count]))
            if layer is not None:
                return table.known(layer, "/".join(parts[count:]), rank)
        return Known()

    @nn.nowrap
    def _flattened_sizes(self) -> dict[str, tuple[int, ...]]:
        """By path of a kernel, the sizes that a Flatten made its inputs of."""
        shape, names = self.input_shape, names_in(self.inputs)
        shapes = (shape,) if isinstance(self.inputs, str) or shape is None else shape
        if len(shapes) != len(names):
            return {}
        layers = {n.name: n.layer for n in self.nodes}
        steps = [(n.name, layers[n.of or n.name], n.inputs) for n in self.nodes]
        return flattened_sizes(steps, dict(zip(names, shapes, strict=True)))

    @nn.nowrap
    def _reordering(self) -> str:
        """A layer that counts several axes as one; empty where none does."""
        return reordering(((n.name, n.layer) for n in self.nodes), self._flattened_sizes())

    def __reduce__(self) -> Any:
        return _remake_graph, (
            self.nodes, _plain(self.inputs), _plain(self.outputs), self.input_shape, self.sidecar,
            self.turned, self.fixed,
        )  # fmt: skip

    def __repr__(self) -> str:
        lines = []
        for node in self.nodes:
            said = f"the layer of {node.of}"
            if node.layer is not None:
                settings = settings_of(node.layer).items()
                said = (
                    f"{type(node.layer).__name__}({', '.join(f'{k}={v!r}' for k, v in settings)})"
                )
            lines.append(f"  {node.name}: {said} of {', '.join(node.inputs) or 'nothing'}\n")
        shape = "" if self.input_shape is None else f", input_shape={self.input_shape}"
        shape += f", fixed={self.fixed}" if self.fixed else ""
        ends = f"  inputs={_plain(self.inputs)!r}, outputs={_plain(self.outputs)!r}{shape}\n"
        return f"Graph(\n{''.join(lines)}{ends})"


def unfit(name: str, shape: Any, sizes: Sequence[int | None], at: int | None = None) -> str:
    """What is wrong with the shape of an input without the batch axis, of which some sizes are
    fixed, or nothing; with ``at``, the words for an axis alone."""
    if at is None:
        if shape is None or len(shape) != len(sizes):  # which a layer refuses
            return ""
        pairs = enumerate(zip(shape, sizes, strict=True))
        at = next((i for i, (a, b) in pairs if b and a != b), None)
        if at is None:
            return ""
    wanted = str(tuple(sizes)).replace("None", "any")
    found = f"found {tuple(shape)}" if shape else "found another size"
    return (
        f"the input {name}: expected the shape {wanted} without the batch axis, {found}: the "
        f"model was converted for {sizes[at]} along axis {at + 1}, and it computes otherwise at "
        "another size; convert the original once more at that size, such as "
        "from_torch(net, input_shape=...)"
    )


def _sizes(given: Any, names: Sequence[str]) -> tuple[tuple[int | None, ...], ...]:
    """The sizes that are fixed, checked."""
    found = _layers.tuples(given)
    plain = isinstance(found, tuple) and len(found) in (0, len(names)) and all(
        isinstance(s, tuple) and all(n is None or (type(n) is int and n > 0) for n in s)
        for s in found
    )  # fmt: skip
    if not plain:
        raise FwtError(f"Graph: fixed={given!r:.200}: expected the sizes of each input, such as "
                       "((16, None),)")  # fmt: skip
    return found if any(any(s) for s in found) else ()


def _plain(ends: Any) -> Any:
    return dict(ends) if isinstance(ends, Mapping) else ends


def _ends(given: Any, what: str) -> Any:
    """One name, several as a tuple, or several by key, which linen makes a FrozenDict."""
    if isinstance(given, str) and given:
        return given
    found: Any
    if isinstance(given, Mapping):
        found = nn.FrozenDict(given)
    else:
        found = tuple(given) if isinstance(given, Sequence) else None
    if not found or not all(isinstance(n, str) and n for n in (*names_in(found), *found)):
        raise FwtError(f"Graph: {what}={given!r:.200}: expected a name, several, or a dict of them")
    return found


def renamed(ends: Any, names: Mapping[str, str]) -> Any:
    """What a graph takes or gives, some of it under other names."""
    if isinstance(ends, str):
        return names.get(ends, ends)
    if isinstance(ends, Mapping):
        return {key: names.get(n, n) for key, n in ends.items()}
    return tuple(names.get(n, n) for n in ends)


def _flat(given: Any, inputs: tuple[str, ...]) -> tuple[tuple[Node, ...], dict[str, str]]:
    """The nodes, models among their layers taken apart, and what the ends of those are called."""
    out: list[Node] = []
    alias: dict[str, str] = {}
    for entry in given:
        node = entry if isinstance(entry, Node) else _node(entry)
        takes = tuple(alias.get(i, i) for i in node.inputs)
        if not isinstance(node.layer, Sequential | Graph):
            if node.layer is None and node.of in alias:
                raise FwtError(f"Graph: {node.name} calls {node.of} again, which is a model of "
                               "several layers: call each of them again")  # fmt: skip
            layer = node.layer
            if layer is not None:
                layer = bare(as_layer(layer, f"Graph: the layer of {node.name}"))
            out.append(Node(node.name, layer, takes, node.of))
            continue
        inner, end = nodes_of(node.layer), end_of(node.layer)
        names = inputs_of(node.layer)
        if not isinstance(end, str) or len(names) != len(takes):
            raise FwtError(f"Graph: {node.name} is a model of {len(names)} inputs that gives "
                           f"{len(names_in(end))} arrays: give its nodes instead")  # fmt: skip
        place = dict(zip(names, takes, strict=True))
        place |= {n.name: f"{node.name}/{n.name}" for n in inner}
        out += [Node(place[n.name], n.layer, tuple(place[i] for i in n.inputs),
                     place.get(n.of, "")) for n in inner]  # fmt: skip
        alias[node.name] = place[end]
    return tuple(out), alias


def _node(entry: Any) -> Node:
    if not isinstance(entry, tuple | list) or len(entry) not in (2, 3, 4):
        raise FwtError(
            f"Graph: a node is (name, module, inputs) or a fwt.Node, found {kind_of(entry)}"
        )
    given = [*entry, *[INPUT, ""][len(entry) - 2 :]]
    name, layer, inputs, of = given
    return Node(name, layer, (inputs,) if isinstance(inputs, str) else tuple(inputs), of)


def _last_uses(nodes: Sequence[Node], outputs: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """By name of a node, what no node after it takes."""
    later, found = set(outputs), {}
    for node in reversed(nodes):
        found[node.name] = tuple(set(node.inputs) - later)
        later.update(node.inputs)
    return found


def _check(nodes: Sequence[Node], inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
    known: dict[str, Node | None] = dict.fromkeys(inputs)
    if len(known) < len(inputs):
        raise FwtError(f"Graph: two of its inputs have one name, {', '.join(inputs)}")
    for node in nodes:
        if node.name in known:
            raise FwtError(f"Graph: two nodes are named {node.name!r}; give each its own name")
        for name in node.inputs:
            if name not in known:
                raise FwtError(
                    f"Graph: {node.name} takes {name!r}, which is none of its inputs "
                    f"({', '.join(inputs)}) and no node before it"
                )
        again = known.get(node.of)
        if node.of and (again is None or again.layer is None):
            raise FwtError(
                f"Graph: {node.name} calls {node.of!r} again, which is no layer before it"
            )
        if (node.layer is None) != bool(node.of):
            raise FwtError(
                f"Graph: {node.name} has either a layer or, in of=, the node that has it"
            )
        known[node.name] = node
    if missing := [name for name in outputs if name not in known]:
        raise FwtError(f"Graph: its output {missing[0]!r} is no node of it")
    paths = {tuple(path_parts(n.name)): n for n in nodes if n.layer is not None}
    if any(path[0] == "params" for path in paths):  # linen would take it for the collection
        raise FwtError("Graph: a node's path can't start with 'params'; give it another name")
    for path, node in paths.items():
        for count in range(1, len(path)):
            above = paths.get(path[:count])
            if above is not None and may_hold(above.layer):
                raise FwtError(
                    f"Graph: the path {node.name} lies among the arrays of {above.name}, a "
                    f"{type(above.layer).__name__}; give it another"
                )


def may_hold(layer: Any) -> bool:
    """Whether a layer may have arrays of its own."""
    call: Any = type(layer).__call__
    return getattr(call, "compact", False) or not isinstance(layer, Layer)


def nodes_of(module: Any) -> tuple[Node, ...]:
    """A Sequential, which is a chain, or a Graph as flat nodes in the order in which they run.

    Example:
        >>> [(n.name, n.inputs) for n in nodes_of(Sequential([("a", nn.Dense(2)), nn.relu]))]
        [('a', ('input',)), ('1', ('a',))]
    """
    if isinstance(module, Graph):
        found: tuple[Node, ...] = module.nodes
        return found
    (before,) = inputs_of(module)
    out: list[Node] = []
    for name, layer in _leaves(module, ()):
        if isinstance(layer, Graph):
            out += Graph([Node(name, layer, (before,))], inputs=before).nodes
        else:
            out.append(Node(name, layer, (before,)))
        before = out[-1].name if out else before
    return tuple(out)


def inputs_of(module: Any) -> tuple[str, ...]:
    """The names that nodes have for what a Sequential or a Graph takes."""
    if isinstance(module, Graph):
        return names_in(module.inputs)
    start = INPUT
    while any(n.name == start for n in module.layers):
        start += "_"
    return (start,)


def count_of(layer: Any) -> int:
    """How many whole numbers a layer takes, if it takes some."""
    return getattr(layer, "num_embeddings", None) or getattr(layer, "num_tokens", None) or 0


# Layers that only move numbers, behind which whole numbers stay what they are.
MOVES = ("Reshape", "Flatten", "Unflatten", "Permute", "RepeatVector", "Identity", "Dropout",
         "Sequential", "Slice", "Flip")  # fmt: skip


def counts_of(module: Any) -> list[int]:
    """For each input, below which its whole numbers must be, if a layer takes it that says so: a
    table that stands in a layer or, where several share it, in a node of its own."""
    layers, out = {n.name: n.layer for n in nodes_of(module)}, []
    for start in inputs_of(module):
        reached, found = {start}, list[int]()
        for node in nodes_of(module):
            layer = layers[node.of or node.name]
            if type(layer).__name__ == "Lookup":
                shape = _shape_of(layers.get(node.inputs[0]))
                found += shape[:1] if node.inputs[1] in reached else ()
            elif reached.intersection(node.inputs):
                found.append(count_of(layer))
                if type(layer).__name__ in MOVES:
                    reached.add(node.name)
        out.append(min([c for c in found if c], default=0))
    return out


def _shape_of(source: Any) -> tuple[int, ...]:
    """The shape of what a node without inputs gives."""
    found: tuple[int, ...] = getattr(source, "gives", getattr(source, "shape", ()))
    return found


def input_dtypes(module: Any) -> list[Any]:
    """The dtype of each input of a model: int32 where a layer takes it that takes whole numbers."""
    own = isinstance(module, Sequential | Graph)
    counts = counts_of(module) if own else [count_of(module)]
    return [np.int32 if count else np.float32 for count in counts]


def _leaves(module: Sequential, inside: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    named: Named
    for named in module.layers:
        parts = (*inside, named.name)
        if isinstance(named.layer, Sequential):
            yield from _leaves(named.layer, parts)
        else:
            yield "/".join(_tree.escape(p) for p in parts), named.layer


def end_of(module: Any) -> Any:
    """The name of the node that gives the output, or several in the form of a Graph's."""
    if isinstance(module, Graph):
        return module.outputs
    nodes = nodes_of(module)
    return nodes[-1].name if nodes else inputs_of(module)[0]
