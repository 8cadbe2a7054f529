"""What a live model tells of its weights while ``converters.transform`` runs on it."""

import contextlib
import dataclasses
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import jax

from fwt import _paths, _tree
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
