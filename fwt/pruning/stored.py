"""Pruning of leaves that are larger than memory: cuts by counting, masks a piece at a time."""

import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from fwt import _stored, _tree, patterns, scores
from fwt._stored import Stored
from fwt._types import LeafError, Params
from fwt.pruning import chosen as _chosen
from fwt.pruning import scope as _scope
from fwt.selection import stored as _select
from fwt.selection.counts import count
from fwt.selection.keys import key_function, sources

_ALONE = ("layer", "output")  # where what is kept of a leaf depends on nothing else


def pruned(plan: Any, tree: _tree.Tree) -> Params:
    """The tree, whose selected leaves are pruned when they are gone through.

    Raises:
        LeafError: where all of them would have to be in memory at once, and are more than it may
            hold.
    """
    names = tree.select(plan.where)
    leaves = {p: _tree.computable(p, tree.leaves[p], plan.dtype) for p in names}
    for path, leaf in leaves.items():
        if leaf.dtype.kind == "c":
            raise LeafError(f"{path} is {leaf.dtype}: pruning needs real weights")
    places = dict(zip(names, plan._places(tree, names), strict=True))
    fits = dict(zip(names, plan._fits(tree, names, list(places.values())), strict=True))
    plan.heads = plan._heads(list(places.values()))
    scope = _shares(plan, tree, names) if isinstance(plan.scope, Mapping) else plan.scope
    simple = plan.score is scores.magnitude and plan.pattern == patterns.unstructured
    simple = simple and plan.like is None and not any(x.stack for x in places.values())
    if simple and (plan.threshold is not None or scope == "global" or isinstance(scope, dict)):
        return tree.replace(_counted(plan, leaves, scope))
    if simple and scope == "layer" and not any(x.doubted for x in places.values()):
        return tree.replace(_counted(plan, leaves, dict.fromkeys(names, plan.sparsity)))
    if scope not in _ALONE or plan.heads or plan.threshold is not None:
        held = _stored.held(leaves, f"scope={plan.scope!r} with {plan.pattern!r}")
        _, chosen = plan.choose(tree.replace(held, ties=False))
        new = _chosen.pruned(chosen)
        return tree.replace({p: np.asarray(new[p]) for p in names})
    return tree.replace(
        {
            p: _stored.computed(
                x.shape, x.dtype, functools.partial(_alone, plan, tree, p, x, places[p], fits[p])
            )
            for p, x in leaves.items()
        }
    )


def _shares(plan: Any, tree: _tree.Tree, names: list[str]) -> dict[str, Any]:
    """The sparsity of each leaf by the first glob that matches it."""
    parts = [_scope.Leaf(p, (), 0, 0, None, others=tree.others(p)) for p in names]
    return dict(zip(names, _scope.shares(plan.scope, parts, plan.sparsity), strict=True))


def _counted(plan: Any, leaves: Mapping[str, Any], scope: Any) -> dict[str, Stored]:
    """Leaves of which the least magnitudes go, by the shares of each, of all, or a threshold."""
    if plan.threshold is not None:
        return {p: _above(plan, x) for p, x in leaves.items()}
    if isinstance(scope, dict):
        return {
            p: _by_share(x, int(count(scope[p], _stored.of(x).size))) for p, x in leaves.items()
        }
    # A key of one dtype for all, as where they are in memory.
    empty = [np.zeros(0, x.dtype) for x in leaves.values()]
    key = sources(empty, False)[0].key
    whole = [_stored.of(x) for x in leaves.values()]
    k = int(count(plan.sparsity, sum(x.size for x in whole)))
    found = functools.cache(lambda: _select.cuts(whole, key, k))
    return {
        p: _masked(x, key, lambda i=i: found()[i])
        for i, (p, x) in enumerate(zip(leaves, whole, strict=True))
    }


def _by_share(leaf: Any, k: int) -> Stored:
    whole, key = _stored.of(leaf), key_function(False)
    return _masked(whole, key, functools.cache(lambda: _select.cuts([whole], key, k)[0]))


def _above(plan: Any, leaf: Any) -> Stored:
    whole, key = _stored.of(leaf), key_function(False)
    if isinstance(plan.threshold, float) and leaf.dtype.name in ("float32", "float16", "float64"):
        with np.errstate(over="ignore"):  # beyond the dtype it is infinite
            value = key(np.asarray(plan.threshold, leaf.dtype))
        found = _select.Cut(value, 0) if plan.threshold >= 0 else _select.Cut(0, whole.size)
    else:
        cut = plan._above(jnp.zeros(1, leaf.dtype), True)
        found = _select.Cut(np.asarray(cut.value)[()], whole.size if cut.index else 0)
    return _masked(whole, key, lambda: found)


def _masked(leaf: Stored, key: Any, cut: Any) -> Stored:
    def pieces(given: _stored.Pieces) -> _stored.Pieces:
        left = cut().equals
        for piece in given:
            mask, left = _select.kept(key, cut(), piece, left)
            # Of bits, so that what is dropped is +0.0 whatever it was, and nothing else changes.
            bits = piece.view(f"u{piece.itemsize}")
            yield np.multiply(bits, mask, dtype=bits.dtype).view(piece.dtype)

    return leaf.mapped(pieces)


def _alone(plan: Any, tree: _tree.Tree, path: str, leaf: Any, place: Any, fit: Any) -> np.ndarray:
    """A leaf that is pruned by itself, in memory."""
    value = jnp.asarray(_stored.held({path: leaf}, repr(plan.pattern))[path])
    hidden = {p: _tree.Unselected(x.shape, x.dtype) for p, x in tree.leaves.items()}
    one = tree.replace({**hidden, path: value}, ties=False)
    if plan.scope == "output":
        place = _scope.by_output(place, plan.pattern, fit)
    worths = [plan._worths(plan.score, "prune", one, [path], [value], {})]
    given = plan.sparsity, plan.threshold, plan.scope, None
    (row,) = plan._cut(given, [place], [fit], [value], worths, None, [], [None], {})
    new = _chosen.pruned({path: _chosen.Chosen(value, *row)})[path]
    return np.asarray(new)
