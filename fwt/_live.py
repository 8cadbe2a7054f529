"""What a live model tells of its weights while ``converters.transform`` runs on it."""

import contextlib
import dataclasses
import functools
import operator
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp

from fwt import _equal, _nodes, _paths, _tree
from fwt._modules import Known

# By path, what the classes of its layers tell.
KNOWN: ContextVar[Mapping[str, Known]] = ContextVar(
    "known axes", default=types.MappingProxyType({})
)
_COUNTS = ("padding_idx", "unit_forget_bias")  # what reset asks a live layer for
_TOLD = jax.make_user_context("")  # what a jitted function was traced with counts for jit too


# How gradients of a live model become a tree with these paths.
Gradients = Callable[[Any, Collection[str]], Any]
GRADIENTS: ContextVar[Gradients] = ContextVar("gradients", default=lambda grads, paths: grads)


@contextlib.contextmanager
def knowing(
    known: Mapping[str, Known],
    grads: Gradients,
    own: Mapping[str, Sequence[str]],
    hidden: Mapping[str, Sequence[str]],
) -> Iterator[None]:
    """Inside, the axes of leaves are what the classes of a live model tell, gradients are given as
    that model has them, and its own names are understood."""
    # Not the paths, which jit knows: models of one architecture are compiled once.
    told = [
        (dataclasses.replace(k, owner=None), *(getattr(k.owner, n, None) for n in _COUNTS),
         *[_tree.split(n)[-1] for n in own.get(p, ())[:1]])
        for p, k in sorted(known.items())
    ]  # fmt: skip
    token, other, names = KNOWN.set(known), GRADIENTS.set(grads), _paths.OWN.set(own)
    beside = _paths.STATISTICS.set(hidden)
    try:
        with _TOLD(repr(told)):
            yield
    finally:
        KNOWN.reset(token)
        GRADIENTS.reset(other)
        _paths.OWN.reset(names)
        _paths.STATISTICS.reset(beside)


def of_ties(tree: _tree.Tree, grads: Any) -> Any:
    """The gradients, at each path of a tie the sum of those at all: what the one array has."""
    grads = GRADIENTS.get()(grads, tree.leaves)
    given = _tree.Tree(grads)
    new: dict[str, Any] = {}
    for group in [*tree.ties, *tree.perhaps]:
        if all(p in given.leaves for p in group):
            one = tree.leaves[group[0]]
            parts = [_nodes.turned(tree.leaves[p], one, given.leaves[p]) for p in group]
            total: Any = functools.reduce(operator.add, parts)
            if group in tree.perhaps:  # if they are one when the program runs
                same = [_equal.same_bits(one, tree.leaves[p]) for p in group[1:]]
                tied = functools.reduce(operator.and_, same)
                new |= {p: jnp.where(tied, total, given.leaves[p]) for p in group}
                continue
            new |= {p: _nodes.turned(one, tree.leaves[p], total) for p in group}
    return given.replace(new, ties=False) if new else grads
