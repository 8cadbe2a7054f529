"""Any pytree of arrays seen as ``{path: leaf}``, and the way back."""

import difflib
import functools
import hashlib
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fwt._types import Array, FwtError, LeafError, Model, Params, Where, WhereError


@jax.tree_util.register_pytree_node_class
class Unselected:
    """What stands where :func:`fwt.at` hid a leaf: a node without leaves, so that ``jax.tree.map``
    and our own transforms pass it by."""

    def __init__(self, shape: tuple[int, ...], dtype: Any):
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)

    def tree_flatten(self) -> tuple[tuple[()], Any]:
        return (), (self.shape, self.dtype)

    @classmethod
    def tree_unflatten(cls, aux: Any, children: Any) -> "Unselected":
        return cls(*aux)


def is_array(x: Any) -> bool:
    """Whether a leaf is an array of numbers or bools; PRNG keys and strings are not."""
    if isinstance(x, np.ndarray | np.generic):
        # ml_dtypes (bfloat16, float8) have kind "V" and no fields.
        return x.dtype.kind in "biufc" or (x.dtype.kind == "V" and x.dtype.isbuiltin == 2)
    return isinstance(x, jax.Array | jax.ShapeDtypeStruct) and not jnp.issubdtype(
        x.dtype, jax.dtypes.extended
    )


def escape(part: str) -> str:
    r"""A path part with ``/``, ``\`` and glob characters escaped by a backslash."""
    return re.sub(r"([\\/*?\[\]])", r"\\\1", part)


def split(path: str) -> list[str]:
    """The parts of a path or glob, cut at each unescaped ``/``, escapes kept."""
    parts = []
    for part, cut in re.findall(r"((?:\\[\s\S]|[^\\/])*)(/|\Z)", path):
        parts.append(part)
        if not cut:
            break
    return parts if path else []


def unescape(part: str) -> str:
    return re.sub(r"\\([\s\S])", r"\1", part)


def natural(path: str) -> list[Any]:
    """A sort key under which ``layer_2`` comes before ``layer_10``."""
    return [
        # A run of digits by its length and then its text, however long it is.
        [
            (len(s.lstrip("0")), s.lstrip("0")) if i % 2 else (0, s)
            for i, s in enumerate(re.split("([0-9]+)", part))
        ]
        for part in split(path)
    ] + [[(0, path)]]


def _part(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


class Tree:
    """The array leaves of ``params`` in path order, and the way back.

    A Model stands for its variables and a variables dict for its ``params``; nnx's ``.value`` is
    no part of a path.
    """

    def __init__(self, params: Params):
        self.module = params.module if isinstance(params, Model) else None
        keyed, self._treedef = jax.tree_util.tree_flatten_with_path(
            params, is_leaf=lambda x: isinstance(x, Unselected)
        )
        self._all = [leaf for _, leaf in keyed]
        strip = 0
        root = params
        if isinstance(params, Model):
            root, strip = params.variables, 1
        scoped = isinstance(params, Model) or (isinstance(root, Mapping) and "params" in root)
        variables = _nnx_variables(params)
        places: dict[str, int] = {}
        for index, (keys, leaf) in enumerate(keyed):
            if not (is_array(leaf) or isinstance(leaf, Unselected)):
                continue
            rest = keys[strip:]
            if scoped:
                if not rest or _part(rest[0]) != "params":
                    continue
                rest = rest[1:]
            depth = next((d for d in range(len(keys)) if keys[:d] in variables), None)
            if depth is not None:
                cut = depth - (len(keys) - len(rest))
                rest = rest[:cut] + rest[cut + 1 :]
            path = "/".join(escape(_part(k)) for k in rest)
            if path in places:
                raise LeafError(f"two leaves have the same path {path!r}: rename one of the keys")
            places[path] = index
        self._places = places
        order = sorted(places, key=natural)
        seen = {p: self._all[places[p]] for p in order}
        self.leaves: dict[str, Any] = {
            p: x for p, x in seen.items() if not isinstance(x, Unselected)
        }
        self.hidden: dict[str, Unselected] = {
            p: x for p, x in seen.items() if isinstance(x, Unselected)
        }

    def replace(self, new: Mapping[str, Any]) -> Params:
        """The same tree with other leaves at these paths; the rest are the same objects."""
        leaves = list(self._all)
        for path, value in new.items():
            leaves[self._places[path]] = value
        return jax.tree_util.tree_unflatten(self._treedef, leaves)

    def map_all(self, new: Mapping[str, Any], other: Callable[[Any], Any]) -> Params:
        """The same tree with ``new`` at its paths and ``other(leaf)`` at every other array."""
        mine = {self._places[p]: x for p, x in new.items()}
        leaves = [
            mine[i] if i in mine else other(x) if is_array(x) else x
            for i, x in enumerate(self._all)
        ]
        return jax.tree_util.tree_unflatten(self._treedef, leaves)

    def select(self, where: Where) -> list[str]:
        """The paths that ``where`` names, in path order; none at all is an error."""
        shapes = {
            p: jax.ShapeDtypeStruct(x.shape, x.dtype)
            for p, x in (self.leaves | self.hidden).items()
        }
        chosen = _resolve(where, shapes, self)
        found = [p for p in self.leaves if p in chosen]
        if not found:
            raise WhereError(_nothing(where, self.leaves, self.hidden, chosen))
        return found

    def match(self, masks: Mapping[str, Any]) -> dict[str, Any]:
        """The masks that mask something, checked against this tree."""
        for path in self.leaves:
            if path not in masks:
                raise LeafError(f"masks: no mask for {path!r}{near(path, masks)}")
        chosen = {}
        for path, mask in masks.items():
            if path in self.hidden:
                continue
            if path not in self.leaves:
                raise LeafError(f"masks: {path!r} is no leaf of the tree{near(path, self.leaves)}")
            shape = tuple(self.leaves[path].shape)
            if mask.dtype != bool:
                raise LeafError(f"masks: {path} expected bool, found {mask.dtype}")
            if mask.shape == shape and (shape or isinstance(mask, jax.core.Tracer) or not mask):
                chosen[path] = mask
            elif mask.shape != ():
                raise LeafError(f"masks: {path} expected shape {shape}, found {tuple(mask.shape)}")
            elif not isinstance(mask, jax.core.Tracer) and not mask:
                raise LeafError(f"masks: {path} has a rank-0 False; give a mask of shape {shape}")
        return chosen


def _nnx_variables(params: Params) -> set[tuple[Any, ...]]:
    """The key paths of nnx Variables, known only if somebody imported nnx."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return set()
    keyed, _ = jax.tree_util.tree_flatten_with_path(
        params, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )
    return {tuple(keys) for keys, leaf in keyed if isinstance(leaf, nnx.Variable)}


_ANY = r"\\[\s\S]|[^\\/]"  # one character of a part, which may be escaped


@functools.lru_cache(maxsize=1024)
def _glob(pattern: str) -> re.Pattern[str]:
    """A glob as a regular expression on whole paths: ``*`` within one part, ``**`` across."""
    out: list[str] = []
    for part in split(pattern):
        if part == "**":
            out.append(f"(?:(?:{_ANY})*/)*")
            continue
        text = ""
        for token in re.findall(r"\\.|\[!?\]?[^\]]*\]|.", part, re.DOTALL):
            if token == "*":
                text += f"(?:{_ANY})*"
            elif token == "?":
                text += f"(?:{_ANY})"
            elif len(token) > 1 and token[0] == "[":
                body = token[1:-1]
                negated = body.startswith("!")
                body = re.sub(r"([\\\[^])", r"\\\1", body[negated:])
                text += f"[{'^/' if negated else ''}{body}]"
            else:
                # A path holds its parts escaped, so a literal is compared in that form.
                text += re.escape(escape(unescape(token)))
        out.append(text + "/")
    # The path is given a final "/", so that "**" at the end takes whole parts too.
    try:
        return re.compile("".join(out))
    except re.error as error:
        raise WhereError(f"where={pattern!r} is no glob ({error})") from error


def matches(pattern: str, path: str) -> bool:
    """Whether a path matches a glob.

    Example:
        >>> matches("dense_*/kernel", "dense_1/kernel"), matches("**/kernel", "a/b/kernel")
        (True, True)
        >>> matches("*", "a/b")
        False
    """
    if pattern == "**":
        return True
    if split(pattern)[-1:] == ["**"]:
        pattern += "/*"
    return _glob(pattern).fullmatch(path + "/") is not None


def _resolve(where: Where, shapes: Mapping[str, jax.ShapeDtypeStruct], tree: Any) -> set[str]:
    if isinstance(where, str):
        return {p for p in shapes if matches(where, p)}
    if isinstance(where, list | tuple | set | frozenset) and all(isinstance(w, str) for w in where):
        chosen: set[str] = set()
        for pattern in where:
            hits = {p for p in shapes if matches(pattern, p)}
            if not hits:
                raise WhereError(_nothing(pattern, shapes, {}, hits))
            chosen |= hits
        return chosen
    if hasattr(where, "paths_of"):  # a role: it may ask what the modules in the tree say
        return set(where.paths_of(shapes, tree))
    # A function is a leaf of its own; an equinox module or a Model of bools can be called too.
    if callable(where) and jax.tree.leaves(where) == [where]:
        answers = {p: where(p, x) for p, x in shapes.items()}
        for path, answer in answers.items():
            if not isinstance(answer, bool | np.bool_):
                raise WhereError(
                    f"the predicate {where!r} must return True or False for each "
                    f"(path, ShapeDtypeStruct), but returned {answer!r} for {path!r}"
                )
        return {p for p, answer in answers.items() if answer}
    return _from_bools(where, shapes)


def _from_bools(where: Any, shapes: Mapping[str, Any]) -> set[str]:
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

    # An entry speaks for its leaf or for all leaves below it.
    wanted = {p: bool(x) for p, x in Tree(jax.tree.map(as_array, where)).leaves.items()}

    def answer(path: str) -> bool:
        parts = split(path)
        for depth in range(len(parts), -1, -1):
            prefix = "/".join(parts[:depth])
            if prefix in wanted:
                return wanted[prefix]
        raise WhereError(f"the tree of bools given as where= says nothing of {path!r}")

    return {p for p in shapes if answer(p)}


def near(path: str, known: Iterable[str]) -> str:
    """``; close: 'a', 'b'``, or nothing."""
    known = list(known)
    plain = path.replace("**/", "").replace("*", "")
    lower = {p.lower(): p for p in known}
    close = [p for p in known if matches("**/" + path, p)] if path else []
    close += [lower[p] for p in difflib.get_close_matches(plain.lower(), lower, n=3, cutoff=0.5)]
    close = list(dict.fromkeys(close))[:3] or known[:3]
    return f"; close: {', '.join(map(repr, close))}" if close else ""


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
            f"where={said} matches none of the {len(leaves)} leaves{near(hint, leaves)}. "
            "fwt.paths(params) lists them all"
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
    """The leaf as something that JAX computes on without changing its dtype.

    Raises:
        LeafError: for a 64-bit leaf without x64, which JAX would silently make 32-bit.
    """
    if dtype is not None:
        leaf = leaf.astype(jnp.dtype(dtype))
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise LeafError(f"{path} is a shape without values: use jax.eval_shape for a dry run")
    refuse_64(path, leaf)
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


def as_key(key: Any) -> Any:
    """One JAX key, from a key or an int seed."""
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        if not -(1 << 31) <= key < 1 << 32:
            raise FwtError(f"an int seed has 32 bits, found {key}; make a jax.random.key of it")
        return jax.random.key(key)
    typed = hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    raw = hasattr(key, "dtype") and key.dtype == np.uint32 and key.ndim == 1
    if raw or (typed and key.ndim == 0):
        return key
    raise FwtError(f"key must be one JAX key or an int seed, found {key!r:.80}")


def fold_path(key: Array, path: str) -> Array:
    """A key for one leaf, from 64 bits of the SHA-256 of its path: other leaves don't matter."""
    digest = hashlib.sha256(path.encode()).digest()
    for start in (0, 4):
        key = jax.random.fold_in(key, int.from_bytes(digest[start : start + 4], "big"))
    return key


def paths(params: Params) -> list[str]:
    """The path of every array leaf, in natural order (``2`` before ``10``).

    A path is the leaf's keys joined by ``/``; ``/`` and glob characters inside a key are escaped
    by a backslash. In a variables dict or a Model, paths are relative to ``params``.

    Args:
        params: any pytree of arrays; other leaves are not listed.

    Returns:
        The paths as strings.

    Example:
        >>> import numpy as np
        >>> paths({"dense_10": {"bias": np.ones(2)}, "dense_2": {"bias": np.ones(2)}})
        ['dense_2/bias', 'dense_10/bias']
    """
    return list(Tree(params).leaves)


def select(params: Params, where: Where = "**") -> dict[str, Any]:
    """The leaves that ``where`` names.

    Args:
        params: any pytree of arrays.
        where: a glob (``*`` within one part, ``**`` across), a list of globs, a predicate
            ``(path, ShapeDtypeStruct) -> bool``, a tree of concrete bools, or a role such as
            ``fwt.kernels``.

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
    return {p: tree.leaves[p] for p in tree.select(where)}
