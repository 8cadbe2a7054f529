"""Any pytree of arrays seen as ``{path: leaf}``, and the way back."""

import functools
import os
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import numpy as np

from fwt import _nodes, _paths
from fwt._nodes import is_array as is_array
from fwt._nodes import is_variables as is_variables
from fwt._own_nodes import Unselected as Unselected
from fwt._paths import escape as escape
from fwt._paths import matches as matches
from fwt._paths import named as named
from fwt._paths import natural as natural
from fwt._paths import near as near
from fwt._paths import of_keras as of_keras
from fwt._paths import split as split
from fwt._paths import unescape as unescape
from fwt._stored import Stored
from fwt._types import LeafError, Model, Params, Where, WhereError, check_takes

if TYPE_CHECKING:
    import jax
    import jax.numpy as jnp
else:
    from fwt._later import jax, jnp

_GLOBS = list | tuple | set | frozenset
_TIES = ContextVar("whether ties are looked for", default=True)


def each_by_itself(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, run so that no leaf counts as tied: an optimizer gives each path of a tied
    array an update of its own."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        token = _TIES.set(False)
        try:
            return function(*args, **kwargs)
        finally:
            _TIES.reset(token)

    return wrapped


class Tree:
    """The array leaves of ``params`` in path order, and the way back to a tree like ``params``.

    Of a Model its variables are taken, of a variables dict or a train state its ``params``. A box
    around an array, such as an nnx variable or flax's ``Partitioned``, adds nothing to a path. The
    state of an optimizer is left out, unless ``whole`` is set.

    Leaves that are one array, or that are said to be one by the file that they come from, are
    tied: ``select`` takes all of a tie or nothing, under its first path, and ``replace`` gives all
    of them the new value. A JAX array with all entries equal, such as zeros, ties nothing: it is
    what a template was filled with. ``jit`` makes a tracer of its own for each leaf, so there only
    what a file said is known, and ``replace`` keeps equal what is equal when it runs.

    With ``statistics`` the ``batch_stats`` of a variables dict are leaves too, under the paths of
    their layers, and the attribute ``statistics`` holds these paths.
    """

    def __init__(self, params: Params, statistics: bool = False, *, whole: bool = False):
        if isinstance(params, str | os.PathLike):
            raise LeafError(
                f"{os.fspath(params)!r} is the path of a file: fwt.converters.load(path) reads it, "
                "and load(path, module=False) the arrays of one whose model can't be converted"
            )
        self.module = params.module if isinstance(params, Model) else None
        root = params.variables if isinstance(params, Model) else params
        told = _nodes.told_of(root) if _TIES.get() else {}
        walk, self._closed = _nodes.walk(params, whole, statistics), None
        shared = []
        if walk.graphs:
            inside = _nodes.walk(params, whole, statistics, inside=True)
            shared = [
                {"/".join(map(escape, parts)): shape for parts, shape in found}
                for found in inside.variables.values()
                if len(found) > 1
            ]
            params, self._closed = _nodes.opened(params)
            walk = _nodes.walk(params, whole, statistics)
            walk.layers = inside.layers
        self.layers, self.masked = walk.layers, walk.masked
        self._all = walk.leaves
        self.whole_tree = params
        places: dict[str, int] = {}
        self.statistics: set[str] = set()
        rows = zip(walk.parts, walk.statistics, walk.leaves, strict=True)
        for index, (parts, statistic, leaf) in enumerate(rows):
            if parts is None or not (is_array(leaf) or isinstance(leaf, Unselected)):
                continue
            path = "/".join(map(escape, parts))
            if path in places:
                raise LeafError(f"two leaves have the same path {path!r}: rename one of the keys")
            places[path] = index
            if statistic:
                self.statistics.add(path)
        self._places = places
        order = sorted(places, key=natural)
        seen = {p: self._all[places[p]] for p in order}
        self.leaves: dict[str, Any] = {
            p: x for p, x in seen.items() if not isinstance(x, Unselected)
        }
        self.hidden: dict[str, Unselected] = {
            p: x for p, x in seen.items() if isinstance(x, Unselected)
        }
        self._several = {"/".join(map(escape, p)): x for p, x in walk.several.items()}
        groups = told.get("ties", ()) if _TIES.get() else ()
        self._told_ties = [
            {"/".join(map(escape, name.split("."))) for name in group} for group in groups
        ]
        self._tied = _TIES.get()
        # Of a live model or an nnx module, the other paths of a tied weight, with its shape there.
        self.also: dict[str, dict[str, Any]] = {
            path: also for path, also in told.get("also", {}).items() if path in self.leaves
        }
        for found in shared:
            if first := next((p for p in found if p in self.leaves), None):
                self.also[first] = {p: s for p, s in found.items() if p not in self.leaves}

    @property
    def stored(self) -> bool:
        """Whether some leaves are larger than memory."""
        return any(isinstance(x, Stored) for x in self.leaves.values())

    @property
    def ties(self) -> list[list[str]]:
        """The groups of paths that share one array, each in path order."""
        return self._groups[0]

    @property
    def perhaps(self) -> list[list[str]]:
        """The groups that a file says are one, where a trace hides whether they still are."""
        return self._groups[1]

    @functools.cached_property
    def _groups(self) -> tuple[list[list[str]], list[list[str]]]:
        # Only where they are asked for, since values are compared, and these may be large.
        found: dict[Any, list[str]] = {}
        for path, leaf in self.leaves.items() if self._tied else ():
            if path not in self.statistics and (key := _nodes.memory(leaf)) is not None:
                found.setdefault(key, []).append(path)
        ties, perhaps = [], []
        for group in found.values():
            if len(group) > 1 and not _nodes.is_filling(self.leaves[group[0]]):
                ties.append(group)
        for said in self._told_ties:
            known = [p for p in self.leaves if p in said]
            equal = [_nodes.same_values(self.leaves[known[0]], self.leaves[p]) for p in known[1:]]
            if not equal or False in equal:
                continue  # where one of them has come to differ, they are tied no more
            if None in equal:
                perhaps.append(known)
            else:
                ties = [g for g in ties if not set(g) & set(known)] + [known]
        return ties, perhaps

    def with_ties(self, new: Mapping[str, Any]) -> dict[str, Any]:
        """``new`` with a value for each path that is tied to one in ``new``."""
        out = dict(new)
        for group in self.ties:
            given: Any = next((p for p in group if p in new), None)
            if given is not None:
                one = self.leaves[given]
                for path in group:
                    out.setdefault(path, _nodes.turned(one, self.leaves[path], new[given]))
        for group in self.perhaps:
            given = next((p for p in group if p in new), None)
            if given is None:
                continue
            from fwt import _equal

            for path in [p for p in group if p != given]:
                mine = out.get(path, self.leaves[path])
                if mine.dtype == new[given].dtype:  # a mask is no leaf
                    same = _equal.same_bits(self.leaves[given], self.leaves[path])
                    out[path] = jnp.where(same, new[given], mine)
        return out

    def untied(self) -> dict[str, Any]:
        """The leaves, each tie by its first path alone."""
        more = {p for group in self.ties for p in group[1:]}
        return {p: x for p, x in self.leaves.items() if p not in more}

    def whole(self, paths: Iterable[str]) -> list[str]:
        """These paths and all that are tied to them, in path order."""
        chosen = set(paths)
        for group in self.ties:
            if not chosen.isdisjoint(group):
                chosen |= set(group)
        return [p for p in self.leaves if p in chosen]

    def others(self, path: str) -> dict[str, list[int]]:
        """The other paths of the array at a path, each with its axes in the order of this one's."""
        leaf = self.leaves[path]
        group = next((g for g in self.ties if path in g), [path])
        found = {p: _nodes.turn(self.leaves[p], leaf) for p in group if p != path}
        for p, shape in self.also.get(path, {}).items():
            # A live model's may be turned, and equal sizes would not show it.
            same = tuple(shape) == tuple(leaf.shape)
            if same and (self._closed is not None or len(set(shape)) == len(shape)):
                found[p] = list(range(len(shape)))
        return found

    def once(self, new: Mapping[str, Any]) -> dict[str, Any]:
        """``new`` with one value for each tie: the other paths of it are left out.

        Raises:
            LeafError: if the paths of a tie were given different values.
        """
        out = dict(new)
        for group in self.ties:
            first, *others = [p for p in group if p in out] or [""]
            if all(out[p] is self.leaves[p] for p in (first, *others) if p):
                continue  # nothing is new
            for path in others:
                value = _nodes.turned(self.leaves[first], self.leaves[path], out[first])
                agree = _nodes.same_values(value, out[path])
                if agree is False:
                    told = any({first, path} <= group for group in self._told_ties)
                    way = "plain dicts, as the docstring of load does" if told else "a copy of one"
                    raise LeafError(
                        f"{first} and {path} are one array (they are tied), but were given "
                        f"different values: give both the same, or untie them with {way}"
                    )
                if agree:
                    del out[path]
        return out

    def replace(self, new: Mapping[str, Any], ties: bool = True) -> Params:
        """The tree with new leaves at these paths and, unless ``ties`` is False, at the paths tied
        to them; all other leaves are the same objects."""
        leaves = list(self._all)
        for path, value in (self.with_ties(new) if ties else new).items():
            leaves[self._places[path]] = value
        return self._built(leaves)

    def map_all(self, new: Mapping[str, Any], other: Callable[[Any], Any]) -> Params:
        """The tree with the values of ``new`` at their paths, and the ties of these, and
        ``other(leaf)`` in the place of every other array."""
        mine = {self._places[p]: x for p, x in self.with_ties(new).items()}
        leaves = [
            mine[i] if i in mine else other(x) if is_array(x) else x
            for i, x in enumerate(self._all)
        ]
        return self._built(leaves)

    @functools.cached_property
    def _treedef(self) -> Any:  # of those that are built again, and not of those that are read
        return jax.tree_util.tree_structure(
            self.whole_tree, is_leaf=lambda x: isinstance(x, Unselected)
        )

    def _built(self, leaves: list[Any]) -> Params:
        new = jax.tree_util.tree_unflatten(self._treedef, leaves)
        return new if self._closed is None else self._closed(new)

    def select(self, where: Where) -> list[str]:
        """The paths that ``where`` names, in path order; of a tie, the first one stands for all.

        A tie is selected if ``where`` names all of its paths, or one of them without wildcards. If
        it names only some, as the role ``kernels`` does of an embedding that is a head's kernel
        too, the tie is left out with a warning. A WhereError if nothing is selected.
        """
        chosen = self._chosen(where)
        self._refuse_several(chosen)
        given = [where] if isinstance(where, str) else where
        names = [w for w in given if isinstance(w, str)] if isinstance(given, _GLOBS) else []
        exact = {p for w in names if _paths.is_exact(w) for p in _paths.named(w, chosen)}
        left = []
        others = [[path, *also] for path, also in self.also.items()]
        for group in [*self.ties, *others, *self.perhaps]:
            named = [p for p in group if p in chosen]
            if named and not exact.isdisjoint(group):
                chosen |= set(group)
            elif named and len(named) < len(group):
                left.append(_paths.tied_in_part(where, group, named))
                chosen -= set(group)
                continue
            # Its axes may be in another order under another name: those that are named count.
            tied = [p for p in named if p in exact] if group in self.ties else []
            if group not in self.perhaps:
                chosen -= set(group) - {tied[0] if tied else group[0]}
        found = [p for p in self.leaves if p in chosen]
        if left and not found:
            raise WhereError("; ".join(left))
        if left:
            _warn("; ".join(left))
        return found

    def named(self, where: Where) -> list[str]:
        """Every path that ``where`` names, tied or not, to read; a WhereError if there is none."""
        chosen = self._chosen(where)
        chosen |= {p for p, also in self.also.items() if not chosen.isdisjoint(also)}
        return [p for p in self.leaves if p in chosen]

    def _chosen(self, where: Where) -> set[str]:
        several = {p: _widest(x) for p, x in self._several.items()}
        shapes = {
            p: jax.ShapeDtypeStruct(x.shape, x.dtype)
            for p, x in (self.leaves | self.hidden | several).items()
        }
        same = {p: path for path, also in self.also.items() for p in also}
        for path, also in self.also.items():
            dtype = self.leaves[path].dtype
            shapes |= {p: jax.ShapeDtypeStruct(tuple(s), dtype) for p, s in also.items()}
        chosen = set(_resolve(where, shapes, self))
        if chosen.isdisjoint([*self.leaves, *self._several, *same]):
            raise WhereError(_nothing(where, self.leaves, self.hidden, chosen))
        return chosen

    def _refuse_several(self, chosen: set[str]) -> None:
        for path, node in self._several.items():
            own = [p for p in self.leaves if p.startswith(f"{path}/" if path else "")]
            if own and not chosen.isdisjoint([path, *own]):
                raise LeafError(
                    f"{path or 'the tree'} is a {type(node).__name__}, one weight in several "
                    f"arrays ({', '.join(own)}), as quantisation makes it: transform the weight "
                    "before it is quantised, or leave it out of where="
                )

    def spelled(self, path: str) -> str:
        """A path as this tree spells it, if it is one as files spell it."""
        if path in self.leaves or path in self.hidden or not _paths.is_exact(path):
            return path
        return next(iter(named(path, self.leaves, own=False)), path)


def as_variables(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """A variables dict that has ``params``: the given one, or one around the given params."""
    if not is_variables(tree):
        return {"params": tree}
    return tree if "params" in tree else {"params": {}, **tree}


def _warn(text: str) -> None:
    """Warns at the line of the user's code that called fwt."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("fwt"):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)


def _resolve(where: Where, shapes: Mapping[str, "jax.ShapeDtypeStruct"], tree: Tree) -> set[str]:
    if isinstance(where, str):
        return set(named(where, shapes))
    if isinstance(where, _GLOBS) and all(
        isinstance(w, str) or hasattr(w, "paths_of") for w in where
    ):
        chosen: set[str] = set()
        for each in where:
            hits = _resolve(each, shapes, tree)
            if not hits:
                raise WhereError(_nothing(each, shapes, {}, hits))
            chosen |= hits
        return chosen
    if hasattr(where, "paths_of"):  # a role: it may ask what the modules in the tree say
        return set(where.paths_of(shapes, tree))
    if said := _paths.no_name(where):
        raise WhereError(said)
    # A function is a leaf of its own; an equinox module or a Model of bools can be called too.
    if callable(where) and jax.tree.leaves(where) == [where]:
        check_takes(where, "where=: a predicate", "path, leaf")
        answers = {p: where(p, x) for p, x in shapes.items()}
        for path, answer in answers.items():
            if not isinstance(answer, bool | np.bool_):
                raise WhereError(
                    f"the predicate {where!r} must return True or False for each "
                    f"(path, ShapeDtypeStruct), but returned {answer!r} for {path!r}"
                )
        return {p for p, answer in answers.items() if answer}
    return _from_bools(where, shapes, tree)


def _from_bools(where: Any, shapes: Mapping[str, Any], tree: Tree) -> set[str]:
    statistics = tree.statistics
    same = {p: path for path, also in tree.also.items() for p in also}

    def as_array(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.core.Tracer) or np.shape(leaf) != ():
            raise WhereError(
                f"a tree used as where= holds concrete bools, but {leaf!r} was found: where is "
                "resolved at trace time; for array masks use fwt.apply_masks"
            )
        if not isinstance(leaf, bool | np.bool_) and getattr(leaf, "dtype", None) is not np.dtype(
            bool
        ):
            raise WhereError(
                f"where must be a glob, a list of globs, a predicate (path, ShapeDtypeStruct) -> "
                f"bool, or a tree of bools; found {leaf!r} of type {type(leaf).__name__}"
            )
        return np.asarray(leaf)

    # A bool holds for the leaf at its path, or for all leaves below it.
    bools = jax.tree.map(as_array, where)
    wanted = Tree(bools).leaves
    collections = bools.variables if isinstance(bools, Model) else bools
    apart = wanted  # what speaks for statistics
    if statistics and is_variables(collections):
        apart = Tree({"params": collections.get("batch_stats", {})}).leaves

    def answer(path: str) -> bool:
        told = apart if path in statistics else wanted
        parts = split(path)
        for depth in range(len(parts), -1, -1):
            prefix = "/".join(parts[:depth])
            if prefix in told:
                return bool(told[prefix])
        if path in statistics:
            return False
        if path in same:
            return answer(same[path])
        raise WhereError(f"the tree of bools given as where= says nothing of {path!r}")

    return {p for p in shapes if answer(p)}


def _nothing(where: Where, leaves: Mapping[str, Any], hidden: Any, chosen: set[str]) -> str:
    said = repr(where) if isinstance(where, str | list | tuple) else f"{where}"
    if list(leaves) == [""] and not hidden:
        return (
            f"where={said} is for a tree, but the params are one bare array (a transform that "
            "optax.inject_hyperparams takes for a schedule is called so: give it static_args)"
        )
    if not leaves and not hidden:
        return f"where={said} matches nothing, for the tree holds no array leaf"
    hint = where if isinstance(where, str) else ""
    if not hidden:
        return (
            f"where={said} matches none of the {len(leaves)} leaves"
            f"{of_keras(where, leaves) or near(hint, leaves)}. fwt.paths(params) lists them all"
        )
    left = ", ".join(map(repr, list(leaves)[:5])) or "nothing"
    if chosen:
        outside = ", ".join(map(repr, sorted(chosen, key=natural)[:3]))
        return (
            f"where={said} of the inner transform matches only leaves that at(...) left out "
            f"({outside}); at(...) kept {left}. Pass the inner transform where='**' to take all "
            "that at(...) keeps, or widen at(...)"
        )
    return (
        f"where={said} of the inner transform matches nothing, neither in what at(...) kept "
        f"({left}) nor outside it{near(hint, [*leaves, *hidden])}"
    )


def computable(path: str, leaf: Any, dtype: Any = None) -> Any:
    """The leaf, cast to ``dtype`` if one is given, checked so that JAX keeps its dtype.

    Raises:
        LeafError: for a 64-bit leaf without x64, which JAX would silently make 32-bit, for
            float8_e8m0fnu, which holds scales and no weights, and for a shape without values.
    """
    if dtype is not None:
        leaf = leaf.astype(jnp.dtype(dtype))
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise LeafError(f"{path} is a shape without values: use jax.eval_shape for a dry run")
    if not np.dtype(leaf.dtype).isnative:
        raise LeafError(f"{path} is {leaf.dtype}, a byte order that JAX lacks: cast it by astype")
    if np.dtype(leaf.dtype).char in "gG":
        raise LeafError(f"{path} is {leaf.dtype}, which JAX lacks: cast it by astype")
    refuse_64(path, leaf)
    refuse_scales(path, leaf.dtype)
    return leaf


def cut_by_jax(dtype: Any) -> bool:
    """Whether JAX, as it is set now, would make this dtype 32-bit."""
    return bool(jax.dtypes.canonicalize_dtype(dtype) != dtype)


def refuse_64(path: str, leaf: Any) -> None:
    """Raises for a leaf whose dtype JAX would change."""
    if cut_by_jax(leaf.dtype):
        raise LeafError(
            f"{path} is {leaf.dtype}, which JAX would cut to 32 bits: run with "
            "jax.enable_x64(True) (or jax.config.update('jax_enable_x64', True)), or, on a tree, "
            "give dtype='float32' to change it on purpose"
        )


def refuse_scales(path: str, dtype: Any) -> None:
    """Raises for float8_e8m0fnu, which has neither zero nor sign: most new values would be NaN."""
    if np.dtype(dtype).name == "float8_e8m0fnu":
        raise LeafError(
            f"{path} is float8_e8m0fnu, which holds powers of two alone, no zero and no sign: it "
            "is the scale of other weights; leave it out with where=, or, on a tree, give "
            "dtype='float32'"
        )


def wide_dtype(dtype: Any) -> Any:
    """The dtype to compute in: the given one, or float32 if that is wider."""
    narrow = np.dtype(dtype).itemsize < 4  # of which not all promote by themselves
    return jnp.dtype(jnp.float32 if narrow else jnp.promote_types(dtype, jnp.float32))


def is_narrow(dtype: Any) -> bool:
    """Whether it is a float of fewer than 32 bits."""
    return jnp.issubdtype(dtype, jnp.floating) and np.dtype(dtype).itemsize < 4


def rounded(x: Any, dtype: Any) -> Any:
    """``x`` cast to ``dtype``. A finite number beyond the range of an 8-bit float becomes the
    largest of that dtype, since most 8-bit floats have no infinity and would give a NaN."""
    if jnp.issubdtype(dtype, jnp.floating) and np.dtype(dtype).itemsize == 1:
        info = jnp.finfo(dtype)
        most, least = float(info.max), float(info.smallest_subnormal)
        x = jnp.where(jnp.isfinite(x), jnp.clip(x, -most, most), x)
        if np.dtype(dtype).name.endswith("fnuz"):  # some XLA makes the NaN of "-0" of -least / 4
            x = jnp.where(jnp.abs(x) <= least / 2, 0, x)
    return x.astype(dtype)


def reads(function: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a function of params that only reads: of a live model it sees the weights, of a path
    what the file holds."""

    @functools.wraps(function)
    def read(params: Params, *args: Any, **named: Any) -> Any:
        if isinstance(params, str | os.PathLike):
            from fwt.converters.files import formats

            return function(*formats.looked_at(params), *args, **named)
        if _nodes.foreign(params)[1] != "model":
            return function(params, *args, **named)
        from fwt.converters import values

        with values.seen(params) as tree:
            return function(tree, *args, **named)

    return read


@reads
def paths(params: Params) -> list[str]:
    """The path of every array leaf, in natural order (``2`` before ``10``).

    A path is the leaf's keys joined by ``/``; ``/`` and glob characters inside a key are escaped
    by a backslash. In a variables dict or a Model, paths are relative to ``params``.

    Args:
        params: any pytree of arrays; other leaves are not listed. Or a live Keras or torch model,
            whose weights have the names and axes that :func:`fwt.converters.weights` gives.

    Returns:
        The paths as strings.

    Example:
        >>> import numpy as np
        >>> paths({"dense_10": {"bias": np.ones(2)}, "dense_2": {"bias": np.ones(2)}})
        ['dense_2/bias', 'dense_10/bias']
    """
    return list(Tree(params).leaves)


@reads
def select(params: Params, where: Where = "**") -> dict[str, Any]:
    """The leaves that ``where`` names.

    Args:
        params: any pytree of arrays, or a live Keras or torch model.
        where: a glob (``*`` matches within one part of a path, ``**`` any number of parts), a list
            of globs and roles (``fwt.kernels``), a predicate ``(path, ShapeDtypeStruct) -> bool``,
            or a tree of concrete bools. The spelling of files, ``0.weight``, is taken too.

    Returns:
        ``{path: array}`` in path order, the very objects of the tree.

    Raises:
        WhereError: if nothing matches.

    Example:
        >>> import numpy as np
        >>> params = {"dense": {"kernel": np.ones((2, 3)), "bias": np.ones(3)}}
        >>> list(select(params, "*/kernel"))
        ['dense/kernel']
    """
    tree = Tree(params)
    return {p: tree.leaves[p] for p in tree.named(where)}


def _widest(node: Any) -> Any:
    """The largest array in a node."""
    return max((x for x in jax.tree.leaves(node) if is_array(x)), key=lambda x: np.prod(x.shape))


def hidden(params: Params, keep: Collection[str]) -> Params:
    """The tree with all other leaves out of sight."""
    tree = Tree(params)
    rest = {p: Unselected(x.shape, x.dtype) for p, x in tree.leaves.items() if p not in keep}
    return tree.replace(rest, ties=False)
