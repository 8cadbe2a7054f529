"""A transform of a live model that runs again and again while the model is trained."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.interpreters import partial_eval

from fwt import _nodes, _tree
from fwt._compose import masks_in
from fwt._types import ConversionError, Transform, wants_statistics
from fwt.converters.frameworks import live as _live
from fwt.converters.frameworks.live import Live
from fwt.pruning.prune import apply_masks

# Variables of a framework, each with its mask in its own axes; gives what sets the rest to zero.
Zeroing = Callable[[Sequence[tuple[Any, np.ndarray]]], Callable[[], None] | None]


class Repeated:
    """Runs a transform on a live model each time that it is called.

    Args:
        model: a live Keras or torch model.
        t: a transform; or an optax transformation around ``optax.set_to_zero()``, such as
            ``fwt.optim.sparsify`` makes it, whose state is kept from one run to the next. It is
            tried on the weights at once, and nothing of it is written.
        verb: what is called, for errors.
        zeroing: how the framework applies masks in place.
        gradients: whether the weights have gradients where it is called.
    """

    def __init__(
        self, model: Any, t: Any, verb: str, zeroing: Zeroing, gradients: bool = True
    ) -> None:
        self.model, self._verb, self._state = model, verb, None
        self._optax = isinstance(t, optax.GradientTransformation)
        if not self._optax:
            _live.check(t, verb)
        self._t = t
        live = Live(model, wants_statistics(t), verb)
        self._zeroing: Callable[[], None] | None = None
        if self._optax:
            with live.knowing():
                self._begin(live, gradients)
            return
        live.changed(live.found(t))
        self._apply = zeroing if getattr(t, "__fwt_masks__", False) else None
        self._prepare(live)

    def _prepare(self, live: Live) -> None:
        """Masks in the axes of the variables that the model has now."""
        self._of = self._variables()
        pairs = None if self._apply is None else _in_place(live, self._t)
        self._zeroing = None if self._apply is None or not pairs else self._apply(pairs)

    def _variables(self) -> list[int]:
        keras = _nodes.foreign(self.model)[0] == "keras"
        return [id(v) for v in (self.model.variables if keras else self.model.parameters())]

    def __call__(self) -> None:
        if self._zeroing is not None:
            if self._variables() != self._of:
                self._prepare(Live(self.model, False, self._verb))
            if self._zeroing is not None:
                self._zeroing()
                return
        live = Live(self.model, wants_statistics(self._t), self._verb)
        live.run(self._stepped(live) if self._optax else self._t)

    def state(self) -> dict[str, np.ndarray]:
        """The state of an optax transformation, by the place of each array; of others nothing."""
        return {name: np.asarray(x) for name, x in _flat(self._state)[0].items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Sets the state to one that another had.

        Raises:
            ConversionError: if it is that of another transformation, or of other weights.
        """
        held, treedef = _flat(self._state)
        new = {name: np.asarray(x) for name, x in state.items()}
        wrong = sorted(held.keys() ^ new.keys())
        wrong += [n for n, x in held.items() if n in new and x.shape != new[n].shape]
        if wrong:
            raise ConversionError(
                f"{self._verb}: {wrong[0]} is not in both states, or of another shape: the state "
                "is that of another transformation, or of another model"
            )
        leaves = [
            jax.random.wrap_key_data(jnp.asarray(new[n]), impl=jax.random.key_impl(x))
            if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
            else jnp.asarray(new[n], x.dtype)
            for n, x in zip(held, jax.tree.leaves(self._state), strict=True)
        ]
        self._state = jax.tree_util.tree_unflatten(treedef, leaves)

    # -- optax --------------------------------------------------------------------------------

    def _begin(self, live: Live, gradients: bool) -> None:
        inner = t = self._t
        while (around := getattr(inner.update, "__fwt_around__", None)) is not None:
            inner = around
        if inner is t or inner.update.__qualname__ != optax.set_to_zero().update.__qualname__:
            raise ConversionError(
                f"{self._verb}: the optimizer of the model takes the steps: give "
                "fwt.optim.sparsify or constrain around optax.set_to_zero(), such as "
                "fwt.optim.sparsify(optax.set_to_zero(), 0.9)"
            )
        for leaf in live.leaves:
            _tree.refuse_64(leaf.path, leaf.value)

        def step(grads: Any, state: Any, params: Any) -> Any:
            updates, state = t.update(grads, state, params)
            new = optax.apply_updates(params, updates)
            masks = masks_in(state, new)  # infinities, which no sum makes zero
            return new if masks is None else apply_masks(masks)(new), state

        self._state = t.init(live.tree)
        if any(_fields(self._state, "dense", "saved")):
            raise ConversionError(
                f"{self._verb}: straight_through= and rewind= train other weights than the model "
                "has, which the optimizer of the model does not know: leave them out"
            )
        zeros = jax.tree.map(jnp.zeros_like, live.tree)
        self._step = jax.jit(step)
        jaxpr = self._step.trace(zeros, self._state, live.tree).jaxpr.jaxpr
        _, used = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
        self._needs = any(used[: len(jax.tree.leaves(zeros))])
        if self._needs and not gradients:
            raise ConversionError(
                f"{self._verb}: this needs the gradients of each step, which a callback of Keras "
                "does not see: regrow='set' needs none"
            )

    def _stepped(self, live: Live) -> Transform:
        def stepped(tree: Any) -> Any:
            grads = live.gradients() if self._needs else jax.tree.map(np.zeros_like, tree)
            new, self._state = self._step(grads, self._state, tree)
            return new

        return stepped


def _flat(state: Any) -> tuple[dict[str, Any], Any]:
    """The arrays of a state by their places, keys as their numbers."""
    found, treedef = jax.tree_util.tree_flatten_with_path(state)
    names = [jax.tree_util.keystr(keys, simple=True, separator="/") for keys, _ in found]
    numbers = [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        for _, x in found
    ]
    return dict(zip(names, numbers, strict=True)), treedef


def _fields(state: Any, *names: str) -> list[Any]:
    """What stands in these fields of a state, at any depth, unless they are empty."""
    if isinstance(state, tuple | list):
        own = [getattr(state, n) for n in names if getattr(state, n, ()) != ()]
        return own + [x for part in state for x in _fields(part, *names)]
    if isinstance(state, dict):
        return [x for part in state.values() for x in _fields(part, *names)]
    return []


def _in_place(live: Live, t: Transform) -> list[tuple[Any, np.ndarray]] | None:
    """By variable, its mask in its own axes; None where a weight is no variable of its own."""
    with live.knowing():
        kept = _tree.Tree(t(live.filled(np.ones_like))).leaves
    pairs = []
    for leaf in live.leaves:
        mask = np.asarray(kept[leaf.path]) != 0
        if mask.all():
            continue
        if leaf.read is None:
            return None
        shape = tuple(leaf.source.shape)
        size = int(np.prod(shape))
        at = leaf.read(np.arange(size).reshape(shape)).reshape(-1)
        if at.size != size or np.bincount(at, minlength=size).max() > 1:
            return None
        own = np.empty(at.size, bool)
        own[at] = mask.reshape(-1)
        pairs.append((leaf.source, own.reshape(shape)))
    return pairs
