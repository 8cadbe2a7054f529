"""What is kept of each leaf: the plan behind ``prune``, ``masks`` and ``optim.sparsify``."""

import copy
import dataclasses
import functools
import inspect
import math
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fwt import (
    _apart,
    _axes,
    _calls,
    _keys,
    _live,
    _mesh,
    _own_names,
    _tree,
    patterns,
    scores,
)
from fwt._types import FwtError, LeafError, Params, Score, Where, resolve
from fwt.pruning import heads as _heads
from fwt.pruning import scope as _scope
from fwt.pruning.chosen import Chosen, each_slice, mask_of
from fwt.selection import passes, select
from fwt.selection.counts import Wide, count, minus, plus, wide
from fwt.selection.keys import Source, key_function, magnitude_key, signed_key, sources


class Plan:
    """The arguments of prune and masks, checked once."""

    def __init__(
        self,
        sparsity: Any,
        score: Score,
        threshold: Any,
        scope: Any,
        pattern: Any,
        where: Where,
        like: Any,
        context: Mapping[str, Any],
        axes: Any,
        dtype: Any = None,
    ):
        self.pattern = pattern = resolve(pattern)
        if not isinstance(pattern, patterns.Pattern):
            raise FwtError(
                f"pattern must be one of fwt.patterns, such as n_m(2, 4), found {pattern!r}"
                f"{_own_names.hint(pattern, 'pattern')}"
            )
        groups = pattern.name == "n_m"
        if like not in (None, "torch", "jaxpruner", "tfmot"):
            raise FwtError(f"like must be 'torch', 'jaxpruner', 'tfmot' or None, found {like!r}")
        _scope.check(scope)
        given = sparsity is not None or isinstance(scope, Mapping) or groups
        if given == (threshold is not None):
            raise FwtError(
                "prune needs a sparsity or a threshold, one of the two: prune(0.8) prunes 80 %, "
                "prune(threshold=0.1) keeps |w| > 0.1 (n_m and a dict as scope give a sparsity)"
            )
        if threshold is not None and (like is not None or scope in ("output", "erk", "lamp")):
            raise FwtError(
                "a threshold counts nothing, so like= and output, erk and lamp say nothing to it"
            )
        if groups and scope in ("erk", "lamp"):
            raise FwtError(
                f"scope={scope!r} gives some leaves more zeros than {pattern!r} lets go: take "
                "'layer', 'output', 'global', 'normalized' or a dict"
            )
        if like == "torch" and _is_count(sparsity):
            sparsity = int(sparsity)
        whole = like == "torch" and isinstance(sparsity, int) and not isinstance(sparsity, bool)
        self.sparsity = sparsity if whole else _number("sparsity", sparsity)
        if whole and sparsity < 0:
            raise FwtError(f"sparsity={sparsity} is a number of weights with like='torch'")
        self.threshold = _number("threshold", threshold)
        if whole and isinstance(scope, Mapping):
            raise FwtError(
                f"sparsity={sparsity} is a number of weights with like='torch', and a dict as "
                "scope gives shares"
            )
        if groups and not whole:
            shares = scope.values() if isinstance(scope, Mapping) else [self.sparsity]
            _refuse_more_than(pattern, shares)
        self.score = resolve(score)
        theirs = isinstance(self.score, type) or _own_names.library(self.score)
        if not callable(self.score) or theirs:
            raise FwtError(
                f"score must be a function such as fwt.scores.magnitude, found {score!r:.80}"
                f"{_own_names.hint(score, 'score')}"
            )
        if self.score in scores.FACTORIES:
            raise FwtError(f"fwt.scores.{_name(self.score)} needs arguments: call it first")
        self.context = context_of(self.score, context)
        self.scope, self.where, self.like, self.axes, self.dtype = scope, where, like, axes, dtype

    def choose(
        self,
        params: Params,
        alive: Mapping[str, Any] | None = None,
        grow: tuple[Score, Any] | None = None,
        more: Mapping[str, Any] = MappingProxyType({}),
        steps: Any = None,
        start: Mapping[str, Any] = MappingProxyType({}),
        tree: _tree.Tree | None = None,
    ) -> tuple[Any, dict[str, Chosen]]:
        """The tree, and what is kept of each selected leaf.

        Args:
            params: any pytree of arrays.
            alive: by path, masks of what is not pruned yet; the rest goes first.
            grow: a score and a share: so many of the kept give way to others, by that score.
            more: context for the scores, beside that of the plan.
            steps: updates to add to the params first, the same tree.
            start: by path, masks that prune at least as many as are pruned now.
            tree: the params, if they have been looked at already.
        """
        # Bare magnitudes of what is moved are summed in each pass, so that no sum is stored.
        lazy = self.score is scores.magnitude and self.pattern == patterns.unstructured
        lazy = lazy and self.scope in ("layer", "output", "global", "erk") and self.like != "torch"
        lazy = lazy and (grow is None or grow[0] in (scores.random, scores.gradient))
        if steps is not None and not lazy:
            params, steps = moved(params, steps), None
        tree = _tree.Tree(params) if tree is None else tree
        names = tree.select(self.where)
        leaves = [_tree.computable(p, tree.leaves[p], self.dtype) for p in names]
        for path, leaf in zip(names, leaves, strict=True):
            if leaf.dtype.kind == "c":
                raise LeafError(f"{path} is {leaf.dtype}: pruning needs real weights")
        leaves = [x if isinstance(x, jax.Array) else jnp.asarray(x) for x in leaves]
        places = self._places(tree, names)
        _scope.check_ties(self.scope, tree.perhaps, names)
        fits = self._fits(tree, names, places)
        self.heads = self._heads(places)
        if self.scope == "output":
            rows = zip(places, fits, strict=True)
            places = [_scope.by_output(place, self.pattern, fit) for place, fit in rows]
        worths = [self._worths(self.score, "prune", params, names, leaves, more)]
        if grow is not None:
            worths.append(self._worths(grow[0], "regrow", params, names, leaves, more))
        by_path = {} if steps is None else _tree.Tree(steps).leaves
        added = [by_path[p] for p in names] if by_path else []
        others = {p: tree.others(p) for p in names} if isinstance(self.scope, Mapping) else {}
        # As pairs, for a tree of arrays forgets the order of a dict, and the first glob counts.
        scope = [*self.scope.items()] if isinstance(self.scope, Mapping) else self.scope
        given = self.sparsity, self.threshold, scope, None if grow is None else grow[1]
        whole = np.ones((), bool)  # a scalar that is kept has no mask
        living = None if alive is None else {p: alive.get(p, whole) for p in names}
        floors = [start.get(p) for p in names]
        rows = self._cut(given, places, fits, leaves, worths, living, added, floors, others)
        return tree, {p: Chosen(x, *r) for p, x, r in zip(names, leaves, rows, strict=True)}

    @_mesh.on_auto_axes
    def _cut(
        self, given: tuple[Any, ...], places: list[_axes.Axes], fits: list[Any], leaves: list[Any],
        worths: list[tuple[bool, list[Any]]], alive: Mapping[str, Any] | None, added: list[Any],
        floors: list[Any], others: Mapping[str, Collection[str]],
    ) -> list[tuple[Any, ...]]:  # fmt: skip
        """Of each leaf all of its :class:`Chosen` but the leaf."""
        self = copy.copy(self)
        self.sparsity, self.threshold, scope, share = given
        self.scope = dict(scope) if isinstance(scope, list) else scope
        if self.scope == "output":  # whose places are stacks of outputs
            self.scope = "layer"
        apart = self.threshold is None and self.scope not in ("global", "normalized")
        if apart or self.scope == "normalized":
            places = [place.settled() for place in places]
        stacks = [place.stack if apart else () for place in places]
        windows = [f if isinstance(f, patterns.Windows) else None for f in fits]

        def units(plain: bool, found: list[Any]) -> list[Any]:
            if self.scope == "normalized":
                found = [
                    place.each(functools.partial(_normalized, plain), x)
                    for place, x in zip(places, found, strict=True)
                ]
            pairs = zip(windows, found, strict=True)
            pooled = [x if w is None else _pooled(w, plain, x) for w, x in pairs]
            return _heads.together(self.heads, places, windows, pooled)

        plain, values = worths[0][0], units(*worths[0])
        if self.threshold is not None:
            cuts = [self._above(x, plain) for x in values]
            found = [Source(key_function(not plain), (x,)) for x in values]
        else:
            least = [
                None if m is None else _gone(place.stack, _living(f, m))
                for place, f, m in zip(places, fits, floors, strict=True)
            ]
            found, groups, ks = self._groups(
                places, leaves, values, fits, plain, alive, added, least, others
            )
            if share is not None:
                worth = worths[1][0], units(*worths[1])
                found, groups = _regrown(found, groups, ks, *worth, share, stacks)
            ties: select.Ties = "all" if self.like == "tfmot" else "first"
            cuts = _cuts(groups, ks, stacks, ties) if ks else [_ALL] * len(found)
            stacks = stacks if ks else [()] * len(found)
        return list(zip(found, cuts, windows, stacks, strict=True))

    def _heads(self, places: list[_axes.Axes]) -> list[list[int]]:
        return _heads.groups(self.pattern, places, self.scope)

    def _places(self, tree: Any, names: list[str]) -> list[_axes.Axes]:
        """The axes of each leaf, which tell a stack of layers."""
        places_of = _axes.Places(tree, self.axes)
        places_of.check_used(names)
        return list(map(places_of, names))

    def _fits(self, tree: Any, names: list[str], places: list[_axes.Axes]) -> list[Any]:
        """The pattern on each leaf."""
        if self.pattern == patterns.unstructured:
            return [None] * len(names)
        settings = dict(self.pattern.settings)
        told = {}
        if settings.get("order") == "chw":
            told = _axes.flattened(tree.module)
            if not told and not settings["flattened"] and not _live.KNOWN.get():
                raise FwtError(
                    f"{self.pattern!r} needs to know which kernels are behind a Flatten, and of "
                    "what: give a Model of a Sequential with input_shape=, or "
                    "n_m(..., flattened={'dense/kernel': (h, w, c)})"
                )
        return self.pattern.fits(places, told)

    def _worths(
        self, score: Any, purpose: _keys.Purpose, params: Params, names: list[str],
        leaves: list[Any], more: Any,
    ) -> tuple[bool, list[Any]]:  # fmt: skip
        """Whether it is the magnitudes that count, and of what."""
        if score is scores.magnitude:
            return True, leaves
        wanted = named(score)
        context = {k: v for k, v in {**self.context, **more}.items() if k in wanted}
        if "key" in context:
            context["key"] = _keys.as_key(context["key"], purpose)
        # The magnitude of a gradient needs no array of its own.
        bare = score is scores.gradient and "grads" in context
        ours = getattr(getattr(score, "func", score), "__module__", "") == scores.__name__
        if ours and "grads" in context and _live.KNOWN.get():
            # A live model may have parts that have no gradients, for they are not trained.
            params = _tree.hidden(params, names)
        tree = _tree.Tree(params)
        if "grads" in context and (bare or not ours):  # ours do so themselves
            context["grads"] = _live.of_ties(tree, context["grads"])
        token = _calls.ASKED.set({*names, *(p for n in names for p in tree.others(n))})
        try:
            found = scores.called(score, tree, params, context)
        finally:
            _calls.ASKED.reset(token)
        worths = []
        for path, leaf in zip(names, leaves, strict=True):
            if path not in found:
                raise LeafError(
                    f"the score {_name(score)} returned no leaf {path!r}: a score returns "
                    f"the same tree{_tree.near(path, found)}"
                )
            worth = found[path]
            if ours and not jnp.issubdtype(leaf.dtype, jnp.floating) and worth is tree.leaves[path]:
                raise LeafError(
                    f"{path} is {leaf.dtype}: the score {_name(score)} needs floating weights"
                )
            if tuple(worth.shape) != tuple(leaf.shape) or worth.dtype.kind == "c":
                raise LeafError(
                    f"the score {_name(score)} returned {worth.dtype}{list(worth.shape)} for "
                    f"{path}, expected real numbers of shape {list(leaf.shape)}"
                )
            worths.append(jnp.asarray(_tree.computable(f"the score of {path}", worth)))
        return bare, worths

    def _above(self, worth: Any, plain: bool) -> select.Cut:
        value, everything = _cast(self.threshold, worth.dtype, not plain)
        key = (magnitude_key if plain else signed_key)(value)
        size = np.uint32(math.prod(worth.shape))
        return select.Cut(
            jnp.where(everything, jnp.zeros((), key.dtype), key), jnp.where(everything, size, 0)
        )

    def _groups(
        self, places: list[_axes.Axes], leaves: list[Any], worths: list[Any], fits: list[Any],
        plain: bool, alive: Mapping[str, Any] | None, added: list[Any], floors: list[Any],
        others: Mapping[str, Collection[str]],
    ) -> tuple[list[Source], list[list[Source]], list[Any]]:  # fmt: skip
        """The keys of each leaf, in the groups that are counted as one, and how many go of each;
        none where the pattern alone says it."""
        living: list[Any] = []
        if alive is not None:
            living = [alive[p.path] for p in places]
        elif self.like == "torch":
            living = [nonzero(x) for x in leaves]
        if living:
            living = [_living(f, m) for f, m in zip(fits, living, strict=True)]
            living = _heads.together(self.heads, places, fits, living)
        joint = self.scope in ("global", "normalized")
        rule = "first" if living else ""
        if joint:
            found = sources(worths, not plain, rule, living, added)
        else:
            found = [
                sources(worths[i : i + 1], not plain, rule, living[i : i + 1], added[i : i + 1])[0]
                for i in range(len(worths))
            ]
        most = [math.prod(s.shape) for s in found]
        if self.pattern.name == "n_m":
            pairs = [
                _grouped(f, s.key, self.like == "jaxpruner", s.arrays)
                for f, s in zip(fits, found, strict=True)
            ]
            if self.sparsity is None and not isinstance(self.scope, Mapping):
                return [Source(key_function(False), (~may_go,)) for _, may_go in pairs], [], []
            most = [n // f.m * (f.m - f.n) for n, f in zip(most, fits, strict=True)]
            found = [Source(key_function(False, None, "only"), pair) for pair in pairs]
        dead: list[Any] = [None] * len(found)
        if self.like == "torch" or (living and self.scope == "erk"):
            dead = [_gone(p.stack, m) for p, m in zip(places, living, strict=True)]
        rows = zip(places, found, most, worths, dead, living or dead, floors, strict=True)
        parts = [
            _scope.Leaf(
                p.path,
                p.one.shape,
                math.prod(s.shape) // max(p.size(p.stack), 1),
                m // max(p.size(p.stack), 1),
                w,
                d,
                a if living else None,
                n,
                p,
                others.get(p.path, ()),
                plain,
            )
            for p, s, m, w, d, a, n in rows
        ]
        joint, counts = _scope.allocate(parts, self.scope, self.sparsity, self.like)
        if joint:
            return found, [found], counts
        ks, start = [], 0
        for place in places:
            stop = start + place.size(place.stack)
            ks.append(_by_slice(counts, start, stop, place))
            start = stop
        return found, [[s] for s in found], ks


def moved(params: Params, steps: Any) -> Params:
    """The params after a step; what has none, such as a function in an Equinox module, stays."""
    import optax

    def one(leaf: Any, step: Any) -> Any:
        return leaf if step is None else optax.apply_updates(leaf, step)

    return jax.tree.map(one, params, steps, is_leaf=lambda x: x is None)


_ALL = select.Cut(np.uint32(0), np.uint32(0))  # keeps the Trues of a mask


def _by_slice(counts: Any, start: int, stop: int, place: _axes.Axes) -> Any:
    """Of the counts of all slices those of a leaf: one count, or for a stack some in its sizes."""
    if not place.stack and not isinstance(counts, Wide):
        return counts[start]
    sizes = tuple(place.shape[i] for i in place.stack)
    if isinstance(counts, Wide):
        return Wide(*(jnp.reshape(x[start:stop], sizes) for x in counts))
    mine = [wide(n) for n in counts[start:stop]]
    both = zip(*mine, strict=True) if mine else ((), ())
    return Wide(*(jnp.asarray(list(x), jnp.uint32).reshape(sizes) for x in both))


def _cuts(
    groups: list[list[Source]], ks: list[Any], stacks: list[tuple[int, ...]], ties: select.Ties
) -> list[Any]:
    """The cut of each leaf; of a stack that is counted by layer, one for each slice."""
    if not any(stacks):
        return select.smallest(groups, ks, ties)
    plain = [i for i, stack in enumerate(stacks) if not stack]
    whole = (
        select.smallest([groups[i] for i in plain], [ks[i] for i in plain], ties) if plain else []
    )
    cuts: dict[int, Any] = dict(zip(plain, whole, strict=True))
    for i, stack in enumerate(stacks):
        if stack:
            (source,) = groups[i]
            cuts[i] = _slice_cuts(source.key, stack, ties, source.arrays, ks[i])
    return [cuts[i] for i in range(len(stacks))]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _slice_cuts(
    key: Any, stack: tuple[int, ...], ties: select.Ties, arrays: Any, ks: Wide
) -> select.Cut:
    """The slices take turns, so that however many there are, one search is compiled."""

    def one(arrays: Any, k: Wide) -> select.Cut:
        return select.one_cut(Source(key, arrays), k, ties)

    return each_slice(one, stack)(arrays, ks)


def _regrown(
    found: list[Source],
    groups: list[list[Source]],
    ks: list[Any],
    plain: bool,
    worths: list[Any],
    share: Any,
    stacks: list[tuple[int, ...]],
) -> tuple[list[Source], list[list[Source]]]:
    """The keys after a share of those that would be kept is dropped: what is left is above all,
    and the rest is ordered by ``worths``."""
    counts = [Wide(*(jnp.asarray(x, jnp.uint32) for x in wide(k))) for k in ks]
    sizes = [sum(math.prod(s.shape) for s in group) for group in groups]
    left = [minus(wide(n // max(k.low.size, 1)), k) for n, k in zip(sizes, counts, strict=True)]
    flat = Wide(*(jnp.concatenate([x.ravel() for x in xs]) for xs in zip(*left, strict=True)))
    dropped = jax.vmap(count, (None, 0))(jnp.float32(share), flat)
    more, start = [], 0
    for k in counts:
        stop = start + k.low.size
        more.append(plus(k, Wide(*(x[start:stop].reshape(k.low.shape) for x in dropped))))
        start = stop
    cuts = _cuts(groups, more, stacks, "first")
    rows = zip(found, stacks, cuts, strict=True)
    masks = [Chosen(None, s, c, None, stack).call(mask_of) for s, stack, c in rows]
    open_ = [~m for m in _apart.each(masks)]
    if len(groups) == 1:
        new = sources(worths, not plain, "only", open_)
        return new, [new]
    new = [sources([x], not plain, "only", [m])[0] for x, m in zip(worths, open_, strict=True)]
    return new, [[s] for s in new]


def _number(name: str, value: Any) -> Any:
    """A sparsity or a threshold: a Python float, or a scalar array as it is."""
    if value is None:
        return None
    if isinstance(value, jax.core.Tracer):
        if value.ndim:
            raise FwtError(f"{name} must be a scalar, found shape {value.shape}; use jax.vmap")
        return value
    found = value
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        if value.ndim:
            raise FwtError(
                f"{name} must be a scalar, found shape {value.shape}; use jax.vmap for several"
            )
        found = value.item()
    if isinstance(found, bool) or not isinstance(found, int | float) or found != found:
        raise FwtError(f"{name} must be a number or a scalar array, found {found!r:.80}"
                       f"{_own_names.no_number(found)}")  # fmt: skip
    if name == "sparsity" and not 0 <= found <= 1:
        raise FwtError(f"sparsity is the share of weights to prune, 0 to 1; found {found}")
    return value if isinstance(value, jax.Array) else float(found)  # an array counts as float32


def _is_count(value: Any) -> bool:
    """Whether it is a whole number as an array."""
    kinds = np.ndarray | np.generic | jax.Array
    known = isinstance(value, kinds) and not isinstance(value, jax.core.Tracer)
    return known and value.ndim == 0 and value.dtype.kind in "iu"


def _refuse_more_than(pattern: patterns.Pattern, shares: Any) -> None:
    settings = dict(pattern.settings)
    most = 1 - settings["n"] / settings["m"]
    for s in shares:
        if isinstance(s, int | float) and s > most + 1e-9:
            raise FwtError(
                f"{pattern!r} prunes {most:g} of the weights, so a sparsity of {s:g} can't be "
                "had: leave it out, or give a lower one"
            )


def _cast(threshold: Any, dtype: Any, signed: bool) -> tuple[Any, Any]:
    """A threshold in the leaf's dtype, floored for integers, and whether all is above it."""
    if jnp.issubdtype(dtype, jnp.floating):
        own = _tree.wide_dtype(dtype) if dtype.itemsize == 1 else dtype
        with np.errstate(over="ignore"):  # beyond the dtype it is infinite
            value = jnp.asarray(threshold, own)
        infinite = np.isinf(np.asarray(np.inf, own).astype(dtype).astype(own))
        if dtype.itemsize == 1 and not infinite:  # and a NaN of it prunes NaN
            most = float(jnp.finfo(dtype).max)
            value = jnp.clip(value, -most, most)
        return _tree.rounded(value, dtype), _below_all(threshold, 0, signed)
    # A magnitude is as wide as an unsigned integer, so that |-128| of an int8 has its place.
    dtype = np.dtype(dtype) if signed else np.dtype(f"uint{dtype.itemsize * 8}")
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    if isinstance(threshold, float):
        return jnp.asarray(math.floor(min(max(threshold, low), high)), dtype), threshold < low
    t = jnp.asarray(threshold)
    if jnp.issubdtype(t.dtype, jnp.integer):
        own = np.iinfo(t.dtype)
        least, most = (t.dtype.type(n) for n in (max(low, own.min), min(high, own.max)))
        return jnp.clip(t, least, most).astype(dtype), t < least
    floored = jnp.floor(t)
    held = jnp.clip(floored, float(low), _below(high, floored.dtype)).astype(dtype)
    value = jnp.where(floored >= float(high), np.asarray(high, dtype), held)
    return value, _below_all(threshold, low)


def _below(high: int, dtype: Any) -> float:
    """The largest float that is at most this whole number."""
    found = np.asarray(high, dtype)
    return float(np.nextafter(found, np.zeros_like(found)) if int(found) > high else found)


def _below_all(threshold: Any, low: int, signed: bool = False) -> Any:
    """Whether nothing is at most a threshold: it lies below the least number, or is a NaN."""
    t = jnp.asarray(threshold)
    return ((t < low) & (not signed)) | jnp.isnan(t)


def _name(function: Any) -> str:
    return getattr(function, "__name__", repr(function))


def named(score: Any) -> dict[str, bool]:
    """The context that a score names, and whether it can't do without."""
    try:
        parameters = inspect.signature(score).parameters.values()
    except (TypeError, ValueError):  # builtins have no signature: the call itself will tell
        return {}
    bound = getattr(score, "keywords", {})  # what a partial holds is not given once more
    return {
        p.name: p.default is p.empty
        for i, p in enumerate(parameters)
        if (p.kind is p.KEYWORD_ONLY or (i and p.kind is p.POSITIONAL_OR_KEYWORD))
        and p.name not in bound
    }


def context_of(score: Any, context: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    """Of the context at hand what the score names; a value of ``...`` comes later."""
    found = {}
    for name, needed in named(score).items():
        if context.get(name) is not None:
            if context[name] is not ...:
                found[name] = context[name]
        elif needed:
            way = f"give {name}=" if name in context else "bind it"
            raise FwtError(
                f"{place}the score {_name(score)} needs {name}=: {way}, "
                f"or functools.partial({_name(score)}, {name}=...)"
            )
    return found


nonzero = jax.jit(lambda leaf: magnitude_key(leaf) != 0)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _grouped(fit: patterns.Groups, key: Any, last: bool, arrays: Any) -> tuple[Any, Any]:
    keys = Source(key, arrays).keys()
    return keys, fit.candidates(keys, last)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _pooled(windows: patterns.Windows, plain: bool, worth: Any) -> Any:
    worth = worth.astype(_tree.wide_dtype(worth.dtype))
    return windows.pooled(jnp.abs(worth) if plain else worth)


def _living(fit: Any, mask: Any) -> Any:
    """Which units of a pattern have a weight that is kept."""
    return _any(fit, mask) if isinstance(fit, patterns.Windows) else mask


@functools.partial(jax.jit, static_argnums=0)
def _any(windows: patterns.Windows, mask: Any) -> Any:
    return dataclasses.replace(windows, pool="max").pooled(mask) > 0


@functools.partial(jax.jit, static_argnums=0)
def _normalized(plain: bool, worth: Any) -> Any:
    x = worth.astype(_tree.wide_dtype(worth.dtype))
    x = jnp.abs(x) if plain else x
    size = jnp.max(jnp.where(jnp.isfinite(x), jnp.abs(x), 0), initial=0)
    scaled = x / jnp.where(size > 0, size, 1)  # so that no square overflows
    norm = jnp.sqrt(jnp.sum(jnp.where(jnp.isfinite(x), scaled * scaled, 0)))
    return scaled / jnp.where(norm > 0, norm, 1)


_zeros = jax.jit(passes.zeros)


def _gone(stack: tuple[int, ...], living: Any) -> Any:
    """How many of each slice are gone, a list of ints or a Wide of arrays."""
    if stack:
        rest = tuple(i for i in range(living.ndim) if i not in stack)
        found = jnp.ravel(jnp.sum(~living, rest, dtype=jnp.uint32))
    else:
        found = _zeros(living)[None]
    return wide(found) if isinstance(found, jax.core.Tracer) else [int(x) for x in found]
