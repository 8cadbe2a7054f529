"""A Flax model that is run beside another one, to tell whether both compute the same."""

import contextlib
import ctypes
import functools
import gc
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fwt.converters import judge

_HEAVY = 32 * 2**20  # bytes of weights whose copies are worth a collection
_LONG = 1 << 12  # numbers in a sum whose order shows beyond ten roundings


class Tried:
    """The outputs of a Flax model, as they are and as rounding moves them.

    Args:
        run: its outputs in a list, of its variables and inputs.
        variables: its variables.
        large: whether its inputs are so large that one program computes all of it, an example at a
            time.
        compiled: whether a program computes the outputs as they are otherwise.
        alone: whether an example is computed as it is among several.
    """

    def __init__(
        self,
        run: Callable[..., list[Any]],
        variables: Any,
        large: bool,
        *,
        compiled: bool = True,
        alone: bool = True,
    ):
        def moved(variables: Any, xs: Sequence[Any], by: Any) -> list[Any]:
            with judge.between_layers(by):
                return run(variables, *xs)

        self._of = run
        self._variables, self._heavy = variables, is_heavy(jax.tree.leaves(variables))
        self._moved: Any = jax.jit(moved) if large else moved
        self._plain: Any = functools.partial(moved, by=0.0)
        if compiled and not large:
            self._plain = jax.jit(self._plain)
        self._large, self._alone = large, alone
        self._programs: dict[Any, Any] = {}

    def outputs(self, xs: Sequence[Any]) -> list[np.ndarray]:
        return self._run(self._variables, xs)

    def _run(self, variables: Any, xs: Sequence[Any], by: float = 0.0) -> list[np.ndarray]:
        let_go(self._heavy)
        if not self._large:
            given = [jnp.asarray(x) for x in xs]
            ys = self._moved(variables, given, by) if by else self._plain(variables, given)
            return [np.asarray(y) for y in ys]
        size = 1 if self._alone else len(xs[0])
        parts = [[x[i : i + size] for x in xs] for i in range(0, len(xs[0]), size)]
        kinds = tuple((x.shape, x.dtype) for x in jax.tree.leaves((variables, parts[0])))
        if kinds not in self._programs:  # before the weights are copied, for it takes memory too
            self._programs[kinds] = self._moved.lower(variables, parts[0], by).compile()
            let_go(self._heavy)
        variables = jax.device_put(variables)
        each = [[np.asarray(y) for y in self._programs[kinds](variables, p, by)] for p in parts]
        return [np.concatenate(ys) if len(ys) > 1 else ys[0] for ys in zip(*each, strict=True)]

    def judged(
        self,
        xs: Sequence[Any],
        ours: Sequence[Any],
        theirs: Sequence[Any],
        eps: float,
        apart: Callable[..., judge.Apart] = judge.apart,
        one_by_one: bool = False,
    ) -> list[judge.Apart]:
        """How far each of its outputs is from another model's. If they are apart, rounding is
        measured: first that between layers, then, which copies the weights, that of them as well.

        Args:
            xs: the inputs.
            ours: the outputs of this model.
            theirs: those of the other.
            eps: of the dtype that they are computed in.
            apart: what compares two, as :func:`judge.apart` does.
            one_by_one: whether the other model adds up numbers one after the other: a long sum,
                of n, is off by sqrt(n) roundings there then, and by one here.
        """

        def moved(weights: bool, by: float) -> list[np.ndarray]:
            variables = self._variables
            if weights:
                variables = jax.tree.map(lambda v: judge.nudged(v, by), variables)
            return self._run(variables, xs, by)

        pairs = list(zip(theirs, ours, strict=True))
        told = [apart(a, b, eps=eps) for a, b in pairs]
        noise: list[Any] = []
        for step in ("layers", "weights", "sums")[: 3 if one_by_one else 2]:
            if all(t.excess <= 1 for t in told):
                break
            if step == "sums":
                if (count := self._longest(xs)) < _LONG:
                    break
                noise = [n * math.sqrt(count) for n in noise]
            else:
                run = functools.partial(moved, step == "weights")
                noise = judge.rounding(run, ours, eps)
            told = [
                was if was.excess <= 1 else apart(a, b, [n], eps=eps)
                for was, (a, b), n in zip(told, pairs, noise, strict=True)
            ]
        return told

    def _longest(self, xs: Sequence[Any]) -> int:
        """How many numbers its longest sum adds up, of those that are no products."""
        one = [x[:1] for x in xs]
        return _longest(jax.make_jaxpr(self._of)(self._variables, *one).jaxpr)


def _longest(jaxpr: Any) -> int:
    found = 1
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("reduce_sum", "reduce_window_sum"):
            window = math.prod(eqn.params.get("window_dimensions", ()))
            found = max(found, window, eqn.invars[0].aval.size // max(eqn.outvars[0].aval.size, 1))
        for inner in jax.tree.leaves(tuple(eqn.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            found = max(found, _longest(inner) if hasattr(inner, "eqns") else 1)
    return found


def is_heavy(arrays: Sequence[Any]) -> bool:
    """Whether memory is given back between the steps that copy some arrays."""
    return sum(x.nbytes for x in arrays) > _HEAVY


def let_go(heavy: bool = True) -> None:
    """Gives memory back to the system before the next step needs its own: a process that has the
    copies of each step at once holds the weights of a large model many times."""
    if heavy:
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
            ctypes.CDLL(None).malloc_trim(0)
