"""What each node of a pytree is: a container, a layer, a box, an optimizer state; and what ties."""

import collections
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fwt import _states, _stored
from fwt._own_nodes import FromFile, Unselected
from fwt._own_nodes import told_of as told_of
from fwt._stored import Stored
from fwt._types import LeafError, Model

if TYPE_CHECKING:
    import jax
    import jax.numpy as jnp
else:
    from fwt._later import jax, jnp


def is_jax(x: Any) -> bool:
    """Whether it is an array of JAX, of which nobody has one who did not import JAX."""
    return "jax" in sys.modules and isinstance(x, jax.Array)


def is_array(x: Any) -> bool:
    """Whether a leaf is an array of numbers or bools; PRNG keys and strings are not."""
    if isinstance(x, np.ndarray | np.generic):
        # ml_dtypes (bfloat16, float8) have kind "V" and no fields.
        return x.dtype.kind in "biufc" or (x.dtype.kind == "V" and x.dtype.isbuiltin == 2)
    if isinstance(x, Stored):
        return True
    return isinstance(x, jax.Array | jax.ShapeDtypeStruct) and not jnp.issubdtype(
        x.dtype, jax.dtypes.extended
    )


def is_variables(tree: Any) -> bool:
    """Whether a tree is a variables dict: one of collections, params or statistics alone."""
    return isinstance(tree, Mapping) and ("params" in tree or set(tree) == {"batch_stats"})


def _in_order(node: Mapping[Any, Any]) -> list[Any]:
    try:
        return sorted(node)
    except TypeError:
        raise LeafError(
            f"a dict has the keys {', '.join(map(repr, list(node)[:5]))}, which have no order, as "
            "JAX's trees need: make all of them strings"
        ) from None


def children(node: Any) -> list[tuple[Any, Any]] | None:
    """The keys and children of one node, in JAX's order; None of a leaf."""
    kind = type(node)
    if kind is dict or kind is FromFile:
        return [(types.SimpleNamespace(key=k), node[k]) for k in _in_order(node)]
    if kind is list or kind is tuple:
        return [(types.SimpleNamespace(key=i), x) for i, x in enumerate(node)]
    if node is None:
        return []
    if isinstance(node, np.ndarray | Unselected | Stored) or is_jax(node):
        return None
    first = iter([False])  # the node itself, which may be a child of its own too
    found, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda _: next(first, True))
    if len(found) == 1 and not found[0][0]:
        return None
    return [(keys[0], child) for keys, child in found]


def part(key: Any) -> str:
    """The text of a pytree key, as one part of a path."""
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


_FOREIGN = {
    ("torch", "Module"): "model", ("keras", "Layer"): "model", ("tf_keras", "Layer"): "model",
    ("torch", "Tensor"): "tensor", ("tensorflow", "Tensor"): "tensor",
    ("keras", "Variable"): "variable", ("keras", "KerasVariable"): "variable",
    ("tensorflow", "Variable"): "variable",
}  # fmt: skip


def foreign(x: Any) -> tuple[str, str]:
    """The framework that a live model, tensor or variable is of, and which of these it is; two
    empty strings of anything else."""
    for cls in type(x).__mro__:
        root = cls.__module__.partition(".")[0]
        if kind := _FOREIGN.get((root, cls.__name__)):
            return ("keras" if root == "tf_keras" else root), kind
    return "", ""


def refuse_foreign(x: Any, parts: tuple[str, ...]) -> None:
    """Raises of a leaf that holds weights which no pytree function can reach."""
    framework, kind = foreign(x)
    if not kind:
        return
    place, what = "/".join(parts) or "the argument", f"a {framework} {type(x).__name__}"
    if kind == "model":
        raise LeafError(
            f"{place} is {what}, a live model: fwt.converters.transform(model, t) changes its "
            "weights in place, and fwt.summary(model) shows them; "
            f"fwt.converters.from_{framework}(model) gives a Model, which all functions of fwt take"
        )
    way = "x.detach().numpy()" if framework == "torch" else "np.asarray(x)"
    raise LeafError(
        f"{place} is {what}, and fwt takes arrays of JAX and NumPy: give it {way}; "
        "fwt.converters.transform(model, t) changes a live model in place, and "
        "fwt.converters.load(path) reads its files"
    )


# -- boxes --------------------------------------------------------------------------------------

# What libraries call the one array in a box.
_VALUES = {"value", "raw_value", "_value", "array", "data_array", "data", "tensor"}
_ROLE = re.compile(r"(.*_)?(kernel|weight|bias|scale|embedding|embeddings|gamma|beta)s?")


def _of(module: str, name: str) -> Any:
    """A class of a library, or no class if nobody imported it."""
    return getattr(sys.modules.get(module), name, ())


def is_graph(node: Any) -> bool:
    """Whether it is an nnx module or another object of nnx, whose variables may be shared."""
    return isinstance(node, _of("flax.nnx", "Pytree") or _of("flax.nnx", "Object"))


def _is_custom(node: Any) -> bool:
    return not isinstance(node, Mapping | list | tuple) and not is_graph(node)


def is_box(node: Any, kids: list[tuple[Any, Any]], own: str) -> bool:
    """Whether a node only wraps one array, so that it adds nothing to the path; ``own`` is the last
    part of the path that leads to it."""
    known = (_of("flax.core.meta", "AxisMetadata"), _of("flax.nnx", "Variable"))
    if isinstance(node, known):
        return True
    kids = [(key, child) for key, child in kids if child is not None]
    if len(kids) != 1 or not _is_custom(node):
        return False
    key, child = kids[0]
    inner = children(child)
    if inner is not None and not (is_box(child, inner, own) or is_several(child, inner, own)):
        return False
    name = getattr(key, "name", getattr(key, "key", None))
    if not isinstance(name, str):
        return True
    # A layer with one array has a name for it that says what it is.
    return name in _VALUES or bool(_ROLE.fullmatch(own) and not _ROLE.fullmatch(name))


def is_several(node: Any, kids: list[tuple[Any, Any]], own: str) -> bool:
    """Whether a node holds one weight in several arrays, as a quantised weight does; ``own`` is the
    last part of the path that leads to it."""
    if any(part(key) == "qvalue" for key, _ in kids):
        return True
    if own not in ("kernel", "weight") or not _is_custom(node):
        return False
    return sum(is_array(x) for x in jax.tree.leaves(node)) > 1


def unboxed(node: Any, own: str = "") -> Any:
    """Nested mappings as dicts, with each box replaced by what it holds."""
    if isinstance(node, Mapping):
        return {name: unboxed(value, str(name)) for name, value in node.items()}
    kids = children(node)
    return unboxed(kids[0][1], own) if kids and is_box(node, kids, own) else node


# -- optimizer states ---------------------------------------------------------------------------

# The nodes beside a node, and beside each that it is in: the children, itself, and what is further
# out.
Around = tuple[list[tuple[Any, Any]], Any, Any] | None


def _keys(node: Any, shapes: bool) -> frozenset[tuple[tuple[str, ...], Any]]:
    flat = jax.tree_util.tree_flatten_with_path(node)[0]
    return frozenset((tuple(map(part, keys)), shapes and np.shape(x)) for keys, x in flat)


def _mirrored(node: Any, around: Around, layered: bool) -> bool:
    """Whether a node has the keys of another beside it or beside what it is in, as moments have
    those of the weights, or nothing else holds weights; ``layered``: not if these are those of a
    layer, which is like another, or of other shapes."""
    shapes = layered and any(map(np.ndim, jax.tree.leaves(node)))  # masks may have none
    mine, alone = _keys(node, shapes), True
    while around is not None:
        kids, me, around = around
        for _, other in kids:
            if other is me or children(other) is None or not _holds_weights(other):
                continue
            theirs, alone = _keys(other, shapes), False
            deep = any(len(keys) > 1 for keys, _ in mine)
            # Of what optax.masked hides nothing is left.
            if mine == theirs or (mine < theirs and (len(mine) > 1 or (deep and not layered))):
                return deep or not layered
    return alone and not layered


def _is_evident(name: str, node: Any, named: bool = True, around: Around = None) -> bool:
    """Whether the class of a node says that it is the state of an optimizer, or, where names count,
    its name and those of what it holds."""
    cls = type(node)
    if cls.__module__.split(".")[0] in ("optax", "fwt", "jaxpruner"):
        state = cls.__name__.endswith("State") or cls.__name__ == "ApplyEvery"
        return state and len(jax.tree.leaves(node)) > 0
    if isinstance(node, _of("flax.nnx", "Variable")):
        return any(c.__name__ == "OptState" for c in cls.__mro__)
    if not named:
        return False
    if name in _states.STATE_NAMES:
        return children(node) is not None
    if name == "optimizer" and any(_inner_states(node, named, around)):
        return True  # a layer may be called so too
    if not isinstance(node, Mapping):
        return False
    names = set(map(str, node))
    wrapper = len(names) == 1 and names <= _states.WRAPPERS
    if names >= _states.OURS or (wrapper and _wraps(node)):
        return True
    telling = names & _states.TELLING
    beside = [_states.BESIDE.get(n, set()) for n in telling]
    if not names or not names <= _states.FIELDS.union(*beside):
        return False
    if telling:
        return True
    # A layer may have such names too: but no counter, and not the keys of all weights.
    counted = _is_counted(node)
    moments = [x for x in node.values() if children(x) is not None]
    if counted and {"mu", "nu"} < names and not moments:
        return True  # of optax.flatten
    if not counted and not names & _states.UNCOUNTED:
        return False  # a net's heads may be called value and projector
    return any(_mirrored(x, around, layered=not counted) for x in moments)


def _is_counted(node: Mapping[Any, Any]) -> bool:
    return any(
        children(node[n]) is None and np.ndim(node[n]) == 0 for n in _states.COUNTERS & set(node)
    )


def _wraps(node: Any) -> bool:
    """Whether there is something in a node that may be the state of an optimizer by its names."""
    for _, kid in children(node) or []:
        known = isinstance(kid, Mapping) and kid and _states.FIELDS.issuperset(map(str, kid))
        trees = known and any(children(x) is not None for x in kid.values())
        if trees or (known and _is_counted(kid)) or _wraps(kid):
            return True
    return False


def _inner_states(node: Any, named: bool, around: Around) -> Iterator[bool]:
    kids = children(node) or []
    for key, child in kids:
        yield _is_state(part(key), child, named, (kids, child, around))


def _is_state(name: str, node: Any, named: bool = True, around: Around = None) -> bool:
    """Whether a node is the state of an optimizer, or holds such states and no weights."""
    if _is_evident(name, node, named, around):
        return True
    kids = children(node) or []
    states = list(_inner_states(node, named, around))
    rest = [child for (_, child), state in zip(kids, states, strict=True) if not state]
    return any(states) and not any(_holds_weights(child) for child in rest)


def _holds_weights(node: Any) -> bool:
    """Whether a node holds an array that could be weights, or a mask of weights."""
    return any(
        is_array(x) and len(x.shape) > 0 and (jnp.issubdtype(x.dtype, jnp.inexact) or _is_bool(x))
        for x in jax.tree.leaves(node)
    )


def _holds_bools(node: Any) -> bool:
    return any(is_array(x) and _is_bool(x) for x in jax.tree.leaves(node))


def _is_bool(x: Any) -> bool:
    return bool(x.dtype == bool)


# -- the walk -----------------------------------------------------------------------------------


class Walk:
    """The leaves of a tree in JAX's order, and the path of each.

    Attributes:
        leaves: every leaf, hidden ones too.
        parts: the parts of the path of each leaf, None where it is no part of the params.
        statistics: whether each is a running statistic, if these are asked for.
        several: by the parts of its path, a node that holds one weight in several arrays.
        graphs: whether there are nnx modules.
        states: whether there is the state of an optimizer.
        variables: by the id of an nnx variable, the parts and shape of each path that leads to it.
        layers: by the parts of its path, each object that holds others, such as an Equinox module.
        masked: the parts of the path of each leaf that optax hides.
    """

    def __init__(self, params: Any, aware: bool, statistics: bool, inside: bool, whole: bool):
        """``inside``: whether nnx modules are gone into, through every place of a shared one."""
        self._whole = whole
        self.leaves: list[Any] = []
        self.parts: list[tuple[str, ...] | None] = []
        self.statistics: list[bool] = []
        self.several: dict[tuple[str, ...], Any] = {}
        self.graphs = self.states = False
        self.variables: dict[int, list[tuple[tuple[str, ...], Any]]] = {}
        self.layers: dict[tuple[str, ...], Any] = {}
        self.masked: set[tuple[str, ...]] = set()
        self._aware, self._inside = aware, inside
        self._shown = ("params", "batch_stats") if statistics else ("params",)
        self._above: set[int] = set()  # a module may hold what it is in
        if isinstance(params, Model):
            self._visit(params.variables, (), "", True, "always")
        else:
            self._visit(params, (), "", True, "if there")

    def _visit(
        self,
        node: Any,
        parts: tuple[str, ...],
        name: str,
        mine: bool,
        scoped: str = "",
        statistic: bool = False,
        named: bool = True,
        around: Around = None,
    ) -> None:
        if is_graph(node):
            self.graphs = True
            if not self._inside or id(node) in self._above:
                return
            self._above.add(id(node))
        kids = children(node)
        if kids is None:
            if mine and not isinstance(node, np.ndarray) and not is_jax(node):
                refuse_foreign(node, parts)
            if mine and isinstance(node, np.ma.MaskedArray):
                raise LeafError(
                    f"{'/'.join(parts) or 'the argument'} is a masked array of NumPy, whose hidden "
                    "entries JAX would take for numbers: give it x.filled(0)"
                )
            self.leaves.append(node)
            self.parts.append(parts if mine else None)
            self.statistics.append(statistic)
            return
        self.states |= _is_evident(name, node, named, around)
        own = parts[-1] if parts else ""
        # As in a variables dict, what is no param is not shown; Equinox's holds statistics.
        mine = mine and (self._whole or not isinstance(node, _of("equinox.nn", "State")))
        if not kids and type(node).__name__ == "MaskedNode":
            self.masked.add(parts)
        if is_box(node, kids, own):
            mine = mine and not (self._aware and _is_evident(name, node, named, around))
            kept = isinstance(node, _of("flax.nnx", "BatchStat"))
            statistic |= kept and len(self._shown) > 1
            # As in a variables dict: statistics where they are asked for; the state of keys, caches
            # and what a forward writes down never.
            mine = mine and (self._whole or statistic or not kept)
            apart = tuple(_of("flax.nnx", n) for n in ("RngState", "Cache", "Intermediate"))
            mine = mine and (self._whole or not isinstance(node, apart))
            for _, child in kids:
                if mine and is_array(child) and isinstance(node, _of("flax.nnx", "Variable")):
                    self.variables.setdefault(id(node), []).append((parts, child.shape))
                self._visit(child, parts, "", mine, scoped, statistic, named, around)
            return
        if mine and is_several(node, kids, own):
            self.several[parts] = node
        if mine and not isinstance(node, Mapping | list | tuple):
            self.layers[parts] = node
        names = [part(key) for key, _ in kids]
        wanted, inner, strip, state = [True] * len(kids), "", False, False
        variables = scoped == "always" or bool(scoped and is_variables(node))
        if variables:
            wanted, strip = [n in self._shown for n in names], not parts
        if mine and self._aware:
            found = self._params_of(node, names, kids, parts, named, around)
            if found is not None:
                state = "params" in names
                wanted, strip = found, strip or (not parts and state)
                inner = "if there"  # the params of a train state may be a variables dict
        for label, (_, child), own_child in zip(names, kids, wanted, strict=True):
            below = parts if strip and own_child else (*parts, label)
            counts = statistic or ((variables or state) and label == "batch_stats")
            # What is among the params is a layer, whatever it is called.
            calls = named and not (variables and label in self._shown)
            own_scope = inner if own_child else ""
            beside = (kids, child, around)
            self._visit(child, below, label, mine and own_child, own_scope, counts, calls, beside)
        self._above.discard(id(node))

    def _params_of(
        self,
        node: Any,
        names: list[str],
        inside: list[tuple[Any, Any]],
        parts: tuple[str, ...],
        named: bool,
        around: Around,
    ) -> list[bool] | None:
        """For each child whether it holds params, if the state of an optimizer is among the
        children; None if there is no such state."""
        kids = [child for _, child in inside]
        states = list(_inner_states(node, named, around))
        if not parts and not any(states) and _is_evident("", node, named, around):
            return [False] * len(kids)
        if not any(states):
            return None
        if "params" in names:
            return [n in self._shown for n in names]
        rest = [(n, x) for n, s, x in zip(names, states, kids, strict=True) if not s]
        held = [n for n, x in rest if _holds_weights(x)] or [n for n, x in rest if _holds_bools(x)]
        # What wraps an optimizer is a named tuple too, with averages of weights beside the state.
        if len(held) > 1 or (held and hasattr(node, "_fields")):
            place = f"{'/'.join(parts)}: " if parts else ""
            state = next(n for n, s in zip(names, states, strict=True) if s)
            raise LeafError(
                f"{place}the state of an optimizer, {state!r}, stands beside "
                f"{', '.join(map(repr, held))} in a {type(node).__name__}, and nothing says which "
                "of it are the params: give the transform the params alone, or call them 'params'"
            )
        return [n in held for n in names]


def walk(params: Any, whole: bool = False, statistics: bool = False, inside: bool = False) -> Walk:
    """The walk over a tree. Where it holds the state of an optimizer, only the params beside that
    count, unless ``whole`` is set; nnx modules are opened only if ``inside`` is set.

    Raises:
        LeafError: if nothing says which of it are the params.
    """
    seen = Walk(params, False, statistics, inside, whole)
    if not seen.states or whole:
        return seen
    seen = Walk(params, True, statistics, inside, whole)
    if all(parts is None for parts in seen.parts):
        raise LeafError(
            "the tree holds the state of an optimizer and nothing that could be params: call the "
            "transform on the params"
        )
    return seen


def opened(params: Any) -> tuple[Any, Callable[[Any], Any]]:
    """A tree with each nnx module replaced by its state, in which a shared variable stands once,
    and the function that puts the modules back."""
    nnx = sys.modules["flax.nnx"]
    treedef: Any
    outer, treedef = jax.tree.flatten(params, is_leaf=is_graph)
    places = [i for i, x in enumerate(outer) if is_graph(x)]
    graph, state = nnx.split([outer[i] for i in places])
    for number, place in enumerate(places):
        outer[place] = state.get(number, {})

    def closed(new: Any) -> Any:
        parts = treedef.flatten_up_to(new)
        states = {n: parts[place] for n, place in enumerate(places) if parts[place]}
        for place, module in zip(places, nnx.merge(graph, nnx.State(states)), strict=True):
            parts[place] = module
        return treedef.unflatten(parts)

    return treedef.unflatten(outer), closed


def unshared(tree: Any) -> Any:
    """A tree with copies of its NumPy arrays, which may be written to in place."""
    return jax.tree.map(lambda x: x.copy() if isinstance(x, np.ndarray) else x, tree)


def apart(module: Any, change: Callable[[Any], Any] | None = None) -> Any:
    """A copy of an nnx module to be run, which shares with it no variable, no NumPy array and no
    list, dict or set that it keeps: what a forward changes is the copy's.

    Args:
        module: an nnx module.
        change: makes the arrays of the copy from those of the module.
    """
    nnx = sys.modules["flax.nnx"]
    graph, state = nnx.split(module)
    state = unshared(state)
    made = nnx.merge(graph, state if change is None else jax.tree.map(change, state))
    for _, node in nnx.iter_graph(made):
        for name, value in list(vars(node).items()) if is_graph(node) else ():
            if type(value) in _CHANGING:
                vars(node)[name] = _contents(value)
    return made


def apart_in(tree: Any) -> Any:
    """A tree with such a copy of each nnx module in it."""
    return jax.tree.map(lambda x: apart(x) if is_graph(x) else x, tree, is_leaf=is_graph)


_CHANGING = (list, dict, set, collections.deque)


def _contents(value: Any) -> Any:
    """A container of a copy, in which each container is new and all else is the same."""
    if type(value) is dict:
        return {name: _contents(x) for name, x in value.items()}
    if type(value) is list:
        return [_contents(x) for x in value]
    return value.copy() if type(value) in _CHANGING else value


# -- arrays that are one ------------------------------------------------------------------------


def memory(leaf: Any) -> Any:
    """What is equal for two leaves exactly if they are one array, perhaps transposed. None for what
    is never tied: scalars, masks, empty arrays, and arrays that repeat memory (broadcast)."""
    if not leaf.shape or 0 in leaf.shape or leaf.dtype == bool:
        return None
    if not isinstance(leaf, np.ndarray):
        return id(leaf) if is_jax(leaf) or isinstance(leaf, Stored) else None
    if any(s == 0 and n > 1 for s, n in zip(leaf.strides, leaf.shape, strict=True)):
        return None
    axes = sorted(zip(leaf.strides, leaf.shape, strict=True), reverse=True)
    return leaf.__array_interface__["data"][0], leaf.dtype.name, tuple(axes)


def is_filling(leaf: Any) -> bool:
    """Whether it is a JAX array with all entries equal, such as zeros. JAX arrays don't change, so
    one that stands at two places is most often a template that was written down once."""
    if not is_jax(leaf) or isinstance(leaf, jax.core.Tracer):
        return False
    from fwt import _equal

    with jax.ensure_compile_time_eval():
        return _equal.all_equal(leaf)


def turn(one: Any, other: Any) -> list[int]:
    """The axes of ``one`` in the order in which ``other`` has them, which is tied to it."""
    rank, both = len(one.shape), isinstance(one, np.ndarray) and isinstance(other, np.ndarray)
    if not both or one.strides == other.strides or memory(one) != memory(other):
        return list(range(rank))

    def order(x: Any) -> list[int]:
        return sorted(range(rank), key=lambda i: (-x.strides[i], -x.shape[i]))

    axes = dict(zip(order(other), order(one), strict=True))
    return [axes[i] for i in range(rank)]


def turned(one: Any, other: Any, value: Any) -> Any:
    """What ``other`` becomes when ``one``, which it is tied to, becomes ``value``: that, or its
    transpose where both are views of one memory."""
    axes = turn(one, other)
    if axes == sorted(axes) or len(np.shape(value)) != len(axes):
        return value  # a mask of rank 0 is that of any shape
    return value.transpose(axes)


def same_values(one: Any, other: Any) -> bool | None:
    """Whether two arrays are equal bit for bit; None under a trace, which hides it."""
    if one is other:
        return True
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if isinstance(one, Stored) or isinstance(other, Stored):
        return _stored.same(one, other)
    if not isinstance(one, np.ndarray) or not isinstance(other, np.ndarray):
        if isinstance(one, jax.core.Tracer) or isinstance(other, jax.core.Tracer):
            return None
        both = is_jax(one) and is_jax(other)
        if both and one.dtype.kind in "fiu" and one.sharding == other.sharding:
            from fwt import _equal

            with jax.ensure_compile_time_eval():  # where they are, for they may be large
                return bool(_equal.same_bits(one, other))
    mine, other = (np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (one, other))
    return bool(np.array_equal(mine, other))
