"""Values that are made a second time where they are asked for, instead of being stored."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend import core

from fwt import _apart

# Elementwise, and no dearer than to store the result and to read it.
_CHEAP = frozenset(
    ("abs", "add", "and", "broadcast_in_dim", "clamp", "convert_element_type", "copy", "div", "eq",
     "ge", "gt", "integer_pow", "is_finite", "le", "lt", "max", "min", "mul", "ne", "neg", "not",
     "or", "rsqrt", "select_n", "sign", "sqrt", "square", "stop_gradient", "sub")
)  # fmt: skip


_SMALL = 1 << 14  # as fast, in caches, for so many elements


def _cheap(eqn: Any) -> bool:
    if eqn.primitive.name in ("jit", "pjit"):
        return all(map(_cheap, eqn.params["jaxpr"].jaxpr.eqns))
    return eqn.primitive.name in _CHEAP


def _traced(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic)


def twice(
    function: Callable[[], tuple[dict[str, Any], Any, Any]], at_hand: Sequence[Any]
) -> tuple[Any, Any, Callable[[Any], tuple[dict[str, Any], Any]]]:
    """Calls a function such that a part of what it makes can be made again in a loop.

    A loop that reads an array makes XLA store it, whether the loop has a trip or none. But an
    optimizer's steps often follow, element by element, from moments that are stored anyway.

    Args:
        function: gives the part, a dict of arrays; then what it makes that is stored anyway; then
            anything else; the latter two are trees of arrays.
        at_hand: arrays that are stored too, and not yet overwritten in the loop: the weights, but
            no old moments, for the new ones take their place.

    Returns:
        The second and the third of what the function gave, and a function for the loop: it takes
        the loop's carry and gives those of the part that take only cheap operations on what is
        stored and on numbers of rank 0, and the carry.
    """
    if jax.sharding.get_abstract_mesh().manual_axes:
        # In shard_map a barrier makes all that passes it differ between shards.
        _, *both = function()
        return both[0], both[1], lambda carry: ({}, carry)
    frames: list[Any] = []  # what is no array goes around the trace

    def arrays() -> tuple[Any, ...]:
        part, *trees = function()
        found = []
        for tree in trees:
            leaves, structure = jax.tree.flatten(tree)
            found.append([x for x in leaves if _traced(x)])
            frames.append((structure, [None if _traced(x) else (x,) for x in leaves]))
        return part, *found

    def framed(frame: Any, values: Sequence[Any]) -> Any:
        left = iter(values)
        leaves = [next(left) if other is None else other[0] for other in frame[1]]
        return jax.tree.unflatten(frame[0], leaves)

    closed, shapes = jax.make_jaxpr(arrays, return_shape=True)()
    jaxpr, theirs = closed.jaxpr, {id(x) for x in at_hand}
    counts = [len(jax.tree.leaves(s)) for s in shapes]
    part = dict(zip(sorted(shapes[0]), jaxpr.outvars[: counts[0]], strict=True))
    outs = jaxpr.outvars[counts[0] :]
    stored = {v for v in outs[: counts[1]] if isinstance(v, core.Var)}
    stored |= {v for v, x in zip(jaxpr.constvars, closed.consts, strict=True) if id(x) in theirs}
    # What others than elementwise operations read too, a norm of the steps say, is stored for that.
    dear = {id(v) for e in jaxpr.eqns if not _cheap(e) for v in e.invars}
    cheap = [e for e in jaxpr.eqns if _cheap(e)]
    origin = {v: e for e in cheap for v in e.outvars if id(v) not in dear}

    def sources(wanted: Any) -> tuple[dict[Any, None], set[Any]] | None:
        """What has to be read for it, and what is made on the way."""
        read: dict[Any, None] = {}
        make, left = set(), [wanted]
        while left:
            v = left.pop()
            if isinstance(v, core.Literal) or v in read or v in make:
                continue
            if v in stored or v.aval.shape == ():
                read[v] = None
            elif v in origin:
                make.add(v)
                left += origin[v].invars
            else:
                return None
        return read, make

    # What is small is stored, for it takes longer to compile it twice.
    few = len(part) <= _apart.FEW
    large = {n: v for n, v in part.items() if few or v.aval.size > _SMALL}
    found = {name: s for name, v in large.items() if (s := sources(v)) is not None}
    read = list(dict.fromkeys(v for s in found.values() for v in s[0]))
    make = {v for s in found.values() for v in s[1]}
    eqns = [e for e in jaxpr.eqns if not make.isdisjoint(e.outvars)]
    values = jax.core.eval_jaxpr(jaxpr.replace(outvars=[*outs, *read]), closed.consts)
    kept = framed(frames[0], values[: counts[1]])
    rest = framed(frames[1], values[counts[1] : len(outs)])

    def again(carry: Any) -> tuple[dict[str, Any], Any]:
        # The barriers keep XLA from making it before the loop, or in two ways that round apart.
        given, carry = lax.optimization_barrier((values[len(outs) :], carry))
        known = dict(zip(read, given, strict=True))

        def value(v: Any) -> Any:
            return v.val if isinstance(v, core.Literal) else known[v]

        for eqn in eqns:
            # All of _CHEAP bind their params as they are.
            out = eqn.primitive.bind(*map(value, eqn.invars), **eqn.params)
            made = out if eqn.primitive.multiple_results else [out]
            known.update(zip(eqn.outvars, made, strict=True))
        return lax.optimization_barrier(({name: value(part[name]) for name in found}, carry))

    return kept, rest, again
