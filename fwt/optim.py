"""Optax wrappers: the weights satisfy what you say after every ``optax.apply_updates``."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from fwt import _again, _axes, _keys, _masks, _mesh, _moments, _tree, constraints, patterns, scores
from fwt._compose import masks_in, within
from fwt._own_names import check_optimizer, refuse_injected
from fwt._types import FwtError, LeafError, Masks, Params, Score, Transform, Where, resolve
from fwt.pruning import chosen as _chosen
from fwt.pruning import plan as _plan
from fwt.pruning.scope import Like, Scope

__all__ = ["SparsifyState", "constrain", "sparsify"]


def constrain(
    tx: optax.GradientTransformation, transform: Transform
) -> optax.GradientTransformationExtraArgs:
    """An optimizer whose step lands where a transform puts it.

    ``optax.apply_updates(params, updates)`` gives ``transform(params + step)``, where ``step`` is
    that of ``tx``. The state is that of ``tx``; leaves that the transform leaves alone get the
    step of ``tx`` to the bit. It works under ``jit``, ``scan`` and ``vmap``, and inside
    ``optax.multi_transform`` and ``optax.masked``, where the transform sees what is not masked: a
    kernel of rank 3 or more whose bias is masked needs ``axes=``, for it may be a stack of layers.

    What ``apply_updates`` adds is a difference, so how near it lands depends on the dtype:

    - float16 and bfloat16 params get float32 updates and land on it to the bit, unless a weight
      is moved to less than 2**-12 of itself (bfloat16: 2**-15) without becoming 0.
    - float32 params land on it exactly at 0, and wherever the new weight is within a factor of 2
      of the old one; elsewhere they are off by at most an ULP of the larger of the two.

    Around :func:`sparsify` what is pruned stays zero: :func:`fwt.project` keeps to its masks, and
    refuses constraints that would refill zeros; a function of your own is followed by the masks.

    It must be the last link, ``constrain(optax.chain(...), t)``: a later ``optax.scale`` moves
    the weights out of the set again, and an average of weights (``optax.lookahead``, an EMA of
    params) need not be in it. So too with gradient accumulation: ``constrain(optax.MultiSteps(tx,
    k), t)`` is in the set after every call, ``MultiSteps(constrain(tx, t), k)`` leaves weights
    that start outside where they are until its first step.

    ``optax.inject_hyperparams`` takes callables for schedules: give it
    ``static_args=fwt.optim.constrain.static_args``, or inject into a factory of your own, as in
    the second example.

    Args:
        tx: any optimizer.
        transform: any transform that keeps shapes and dtypes, such as :func:`fwt.project`,
            :func:`fwt.apply_masks` or a :func:`fwt.chain` of them.

    Returns:
        An optimizer; its ``update`` needs ``params``.

    Raises:
        FwtError: in ``update``, without ``params`` or if the transform changes the tree.

    Example:
        >>> import fwt, jax.numpy as jnp, optax
        >>> params = {"dense": {"kernel": jnp.array([[1.0], [1.0]])}}
        >>> tx = constrain(optax.sgd(1.0), fwt.project(fwt.constraints.non_negative))
        >>> grads = {"dense": {"kernel": jnp.array([[3.0], [0.5]])}}
        >>> updates, state = tx.update(grads, tx.init(params), params)
        >>> optax.apply_updates(params, updates)["dense"]["kernel"].tolist()
        [[0.0], [0.5]]
        >>> @optax.inject_hyperparams
        ... def bounded(learning_rate, radius):
        ...     ball = fwt.project(fwt.constraints.max_norm(radius))
        ...     return constrain(optax.sgd(learning_rate), ball)
        >>> tx = bounded(learning_rate=0.1, radius=1.0)
        >>> updates, _ = tx.update(grads, tx.init(params), params)
        >>> new = optax.apply_updates(params, updates)["dense"]["kernel"]
        >>> round(float((new**2).sum()), 5)
        1.0
    """
    check_optimizer("constrain", tx)
    if isinstance(transform, constraints.Bound):
        raise TypeError(
            f"constrain takes a transform: fwt.project(fwt.constraints.{transform.name}(...))"
        )
    if not callable(transform):
        raise TypeError(
            f"constrain takes a transform, a function of the params; found {transform!r}"
        )
    inner = optax.with_extra_args_support(tx)

    @_tree.each_by_itself
    def update(updates: Any, state: Any, params: Params = None, **extra: Any) -> tuple[Any, Any]:
        if params is None:
            raise FwtError("constrain needs the weights: call tx.update(grads, state, params)")
        steps, state = inner.update(updates, state, params, **extra)
        _check_addable(params, steps)
        moved = _plan.moved(params, steps)
        wanted = within(transform, masks_in(state, moved))(moved)
        found: Any = jax.tree.structure(wanted)
        expected: Any = jax.tree.structure(moved)
        if found != expected:
            raise FwtError(
                f"constrain: the transform must keep the tree, but gave {found} for {expected}"
            )
        return jax.tree.map(_difference, params, steps, moved, wanted), state

    return _moments.around(tx, inner.init, update)


# Attributes of functions, which type checkers don't know.
constrain.__dict__["static_args"] = ("tx", "transform")


def _check_addable(params: Any, steps: Any) -> None:
    """JAX adds to an 8-bit float nothing but its own dtype, in which no step is exact."""
    moved = _tree.Tree(steps).leaves
    for path, leaf in _tree.Tree(params).leaves.items():
        tiny = jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize == 1
        if tiny and path in moved and moved[path].dtype != leaf.dtype:
            raise LeafError(
                f"{path} is {leaf.dtype}, to which optax can't add an update of "
                f"{moved[path].dtype}: train in float32 or bfloat16, and round afterwards"
            )


def _difference(old: Any, step: Any, moved: Any, wanted: Any) -> Any:
    """The update that takes a leaf to what is wanted of it, where the step takes it to ``moved``.
    What is left alone, an infinity too, takes the step as it is; a zero, which the sum may miss,
    does not."""
    change = _change(old, step, moved, wanted)
    if wanted is moved:
        return change
    same = (jnp.asarray(wanted) == moved) & (jnp.asarray(wanted) != 0)
    return jnp.where(same, jnp.asarray(step).astype(change.dtype), change)


def _change(old: Any, step: Any, moved: Any, wanted: Any) -> Any:
    if wanted is moved:
        return step
    old, wanted = jnp.asarray(old), jnp.asarray(wanted)
    if jnp.issubdtype(old.dtype, jnp.floating) and old.dtype.itemsize == 1:
        raise FwtError(
            f"no update of {old.dtype} lands where it should: train in float32 or bfloat16, and "
            "round afterwards"
        )
    if wanted.shape != old.shape or wanted.dtype != old.dtype:
        raise FwtError(
            f"constrain: the transform must keep shape and dtype, expected "
            f"{old.dtype}{list(old.shape)}, found {wanted.dtype}{list(wanted.shape)}"
        )
    if not jnp.issubdtype(old.dtype, jnp.floating):
        return wanted - old
    wide = _tree.wide_dtype(old.dtype)
    return wanted.astype(wide) - old.astype(wide)


class SparsifyState(NamedTuple):
    """The state of :func:`sparsify`: a plain pytree of arrays.

    Attributes:
        count: how many updates there were.
        masks: the same tree as the params: True = kept; rank-0 where nothing is pruned.
        sparsity: the schedule's value at the last due update; 0 before the first.
        inner: the state of the wrapped optimizer.
        accumulated: by path, what the score sums up over the steps; () if it doesn't.
        dense: the weights before pruning, for ``straight_through``; else ().
        saved: params and inner state to return to, for ``rewind``; else ().
        start: by path, the ``masks`` of the start, if there is a sparsity too.
        grown: with ``regrow``, a row of two numbers for each moment of a masked leaf; else ().
            If weights have grown at this update: the largest absolute value of the moment among
            pruned weights, and the value that the grown ones begin with at the next update. -1 as
            the former says that there are none, or that they begin as the moment is.
    """

    count: Any
    masks: Any
    sparsity: Any
    inner: Any
    accumulated: Any = ()
    dense: Any = ()
    saved: Any = ()
    start: Any = ()
    grown: Any = ()


def sparsify(
    tx: optax.GradientTransformation,
    sparsity: Any = None,
    score: Score = scores.magnitude,
    *,
    where: Where = _axes.kernels,
    key: Any = None,
    every: int = 100,
    scope: Scope = "layer",
    pattern: patterns.Pattern = patterns.unstructured,
    regrow: Any = None,
    regrow_fraction: Any = None,
    masks: Masks | Callable[[Any], Masks] | None = None,
    straight_through: bool = False,
    rewind: int | None = None,
    like: Like | None = None,
    axes: Mapping[str, str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer under which weights are and stay pruned.

    After ``optax.apply_updates`` pruned weights are exactly zero, momentum or not (a weight that
    is inf or NaN can't be zeroed by an addition). The gradients that ``tx`` sees are zero there.
    It works under ``jit``, ``scan`` and ``vmap`` over seeds and sparsities, and inside
    ``optax.multi_transform`` and ``optax.masked`` (with ``axes=`` where :func:`constrain` needs
    it). As the last link: what comes after it moves pruned weights again.

    After update n (the first is 1) the masks have the sparsity ``schedule(n)`` of the last *due*
    update; a schedule's value counts as float32, as a traced sparsity does in :func:`fwt.prune`.
    Due is each n that ``every`` divides, and each n where the schedule stands still,
    ``schedule(n) == schedule(n + 1)``, so that its last value is always reached, each value that
    it keeps for two updates or more is reached as it comes, and a number at the first update; but
    none whose value the masks have already, unless they exchange weights or are drawn anew.
    Weights that come back at a later update start from zero.
    Without ``regrow`` what is pruned stays so for as long as the sparsity does not fall, and what
    ``masks`` prune at the start always does: if a schedule asks for fewer weights than that, in a
    layer or in all that the scope counts together, the larger number goes (with ``regrow`` and
    ``straight_through``, so many of them, but others). A zero in the params is a weight like any
    other, for many nets begin with zeros: to start from a pruned net, give
    ``masks=fwt.masks_of``.

    - Gradual pruning: a schedule, such as :func:`fwt.schedules.cubic`.
    - Static masks: ``masks=`` and no sparsity; ``masks=fwt.masks_of`` keeps the zeros of a model
      that is pruned already.
    - Dynamic sparse training: ``regrow="set"`` (Mocanu et al., 2018), ``regrow="rigl"`` (Evci et
      al., 2020). If you know how long you train, give ``regrow_fraction=fwt.schedules.cosine(0.3,
      three quarters of the updates)``: what grows needs time to learn, and what is exchanged up
      to the end costs accuracy.
    - ``straight_through=True``: gradients move the dense weights, which the state holds; the
      masks are drawn from them anew (with ``every=1`` at each step), so that what was pruned can
      come back.
    - Lottery tickets (Frankle and Carbin, 2019): ``rewind=0`` and a schedule of steps, such as
      :func:`fwt.schedules.lottery`; at each due update the kept weights and the inner state go
      back to those of the start (to within rounding of the last bit).
    - Iterative pruning: such a schedule without ``rewind``; or ``like="torch"``, under which that
      share of the *remaining* weights goes at each n that ``every`` divides.

    ``optax.inject_hyperparams`` takes callables for schedules: give it ``static_args``, those of
    ``fwt.optim.sparsify.static_args`` but "sparsity", or inject into a factory of your own.

    Args:
        tx: any optimizer.
        sparsity: the share to prune, 0 to 1: a number, a traced scalar, or a schedule
            ``n -> share``. None with ``masks``, with a dict as scope or with ``n_m``.
        score: what a weight is worth, as in :func:`fwt.prune`. It gets the weights after the
            step, and what it names of: ``grads``, the gradients of this step, ``key``, a fresh
            one, and ``accumulated``, what it sums up over all steps (movement, Fisher).
        where: which leaves; the kernels unless told otherwise.
        key: a JAX key or an int seed, for scores that need one.
        every: how many updates from one change of the masks to the next; a schedule that stands
            still is not waited for.
        scope: as in :func:`fwt.prune`.
        pattern: as in :func:`fwt.prune`.
        regrow: at each n that ``every`` divides, drop the least of the kept weights and grow as
            many of all that are pruned, by this score; "set" is random and needs ``key``, "rigl"
            is the gradient's size. As in RigL's own code, what was just dropped may grow at once,
            and keeps its value then. Others grow from zero, and so do the optimizer's moments of
            the parameter's own shape, but for those that are nowhere negative, such as Adam's
            second: these begin at their mean over the kept weights of the leaf, so that no
            first step is larger than usual; factored moments (adafactor) are left as they are.
        regrow_fraction: the share of the kept weights that is dropped: a number, or a schedule
            such as :func:`fwt.schedules.cosine`. By default 0.3 over the square root of how many
            exchanges there were, this one included, which needs no end.
        masks: the masks to begin with: a tree, ``{path: mask}`` for some leaves, or a function of
            the params that gives either, such as ``fwt.masks_of``. A sparsity below theirs counts
            as theirs.
        straight_through: keep and train the dense weights.
        rewind: go back to the params after this update (0: those of ``init``) at each due one.
        like: as in :func:`fwt.prune`.
        axes: as in :func:`fwt.prune`.

    Returns:
        An optimizer; its ``update`` needs ``params``. Its state is a :class:`SparsifyState`.

    Raises:
        FwtError: for settings that do not go together, at once.
        WhereError: in ``init``, if ``where`` matches nothing.

    Example:
        >>> import fwt, jax.numpy as jnp, optax
        >>> params = {"dense": {"kernel": jnp.array([[1.0, -0.2], [0.1, 2.0]])}}
        >>> tx = sparsify(optax.adam(0.1), 0.5)
        >>> state = tx.init(params)
        >>> updates, state = tx.update(params, state, params)
        >>> print(optax.apply_updates(params, updates)["dense"]["kernel"].round(2))
        [[0.9 0. ]
         [0.  1.9]]
        >>> state.masks["dense"]["kernel"].tolist()
        [[True, False], [False, True]]
    """
    check_optimizer("sparsify", tx)
    rule = _Rule(
        sparsity, score, where, key, every, scope, pattern, regrow, regrow_fraction, masks,
        straight_through, rewind, like, axes,
    )  # fmt: skip
    inner = optax.with_extra_args_support(tx)

    @_tree.each_by_itself
    def init(params: Params) -> SparsifyState:
        first = inner.init(params)
        begin, start = rule.begin(params)
        return SparsifyState(
            count=jnp.zeros((), jnp.int32),
            masks=begin,
            sparsity=jnp.zeros((), jnp.float32),
            inner=first,
            accumulated=rule.zeros(params),
            dense=jax.tree.map(jnp.array, params) if straight_through else (),
            saved=() if rewind is None else jax.tree.map(jnp.array, (params, first)),
            start=start,
            grown=() if rule.regrow is None else _moments.none_grown(first, begin),
        )

    @_tree.each_by_itself
    def update(
        updates: Any, state: SparsifyState, params: Params = None, **extra: Any
    ) -> tuple[Any, SparsifyState]:
        if params is None:
            raise FwtError("sparsify needs the weights: call tx.update(grads, state, params)")
        number = state.count + 1
        old = _full(state.masks, params)
        given = _tree.Tree(updates).leaves
        if missing := [p for p in old if p not in given]:
            said = "with optax.lookahead, whose params are two trees, prune what it gives"
            raise FwtError(f"sparsify: {missing[0]!r} has no gradient: {said}")
        weights = state.dense if straight_through else params

        before = state.inner
        if rule.regrow is not None:
            before = _moments.begun(before, state.masks, params, state.grown)
        if rule.resets:
            before = _moments.settled(before, state.masks)
        grads = updates if straight_through else _zeroed(updates, old)

        def step() -> tuple[dict[str, Any], Any, Any]:
            steps, new = inner.update(grads, before, weights, **extra)
            _check_addable(weights, steps)
            moved = _tree.Tree(steps).leaves
            return {p: moved[p] for p in old}, new, steps

        value, due = rule.due(number, state.sparsity)
        remade = isinstance(due, jax.core.Tracer) and not straight_through
        if remade:  # no step is stored for the sake of masks that are rarely drawn
            moments, steps, again = _again.twice(step, jax.tree.leaves(params))
        else:
            _, moments, steps = step()
        # Each place that adds steps to weights may round the sum in its own way, unless the step is
        # selected first: the dense weights are summed once, the others' steps are selected.
        dense = optax.apply_updates(weights, steps) if straight_through else ()
        if not straight_through:
            steps = _stepped(weights, steps, old)
        total = rule.accumulate(state.accumulated, weights, updates)

        def change(carry: tuple[Masks, Any]) -> tuple[Masks, Any]:
            masks, grown = carry
            if straight_through:
                new = rule.masks(dense, None, masks, state.start, value, number, updates, total)
                return new, grown
            by = steps
            if remade:
                made, masks = again(masks)
                alive = {p: m for p, m in _full(masks, params).items() if p in made}
                by = _stepped(weights, _tree.Tree(steps).replace(made), alive)
            if rule.regrow is not None:
                grown = _moments.typical(moments, masks, weights)
            new = rule.masks(weights, by, masks, state.start, value, number, updates, total)
            return new, grown

        none = () if rule.regrow is None else _moments.none_grown(moments, state.masks)
        masks, grown = _once(due, change, (state.masks, none))
        after, saved = _full(masks, params), state.saved
        if straight_through:
            out = jax.tree.map(_change, params, steps, dense, _zeroed(dense, after))
        else:  # what has just grown starts at zero, where the step took it
            out = _stepped(params, steps, after)
        if rewind is not None:
            there = (optax.apply_updates(params, out), moments)
            saved = _once(number == rewind, lambda _: there, saved) if rewind else saved
            # In the dtype of a difference, for both ways have to give the same.
            out = jax.tree.map(lambda p, o: o.astype(_difference(p, o, o, p).dtype), params, out)

            def back(_: Any) -> Any:
                kept = _zeroed(state.saved[0], after)
                return jax.tree.map(_difference, params, out, there[0], kept), state.saved[1]

            out, moments = _once(due & (number > rewind), back, (out, moments))
        value = jnp.where(due, value, state.sparsity)
        new = number, masks, value, moments, total, dense, saved, state.start, grown
        return out, SparsifyState(*new)

    return _moments.around(tx, init, update)


sparsify.__dict__["static_args"] = (
    "tx", "sparsity", "score", "where", "key", "every", "scope", "pattern", "regrow",
    "regrow_fraction", "masks", "straight_through", "rewind", "like", "axes",
)  # fmt: skip


def _once(due: Any, change: Callable[[Any], Any], carry: Any) -> Any:
    """``change(carry)`` if due. Under vmap a cond would run both branches at every step, so it is
    a loop of one trip or none."""
    if not isinstance(due, jax.core.Tracer):
        return change(carry) if due else carry

    def trip(state: Any) -> Any:
        return jnp.zeros_like(state[0]), change(state[1])

    start: Any = (due, jax.tree.map(jnp.asarray, carry))
    return lax.while_loop(lambda state: state[0], *_mesh.carried(trip, start))[1]


def _full(masks: Any, params: Any) -> dict[str, Any]:
    """By path, the masks that mask something."""
    return _masks.fitted(_tree.Tree(masks), _tree.Tree(params))


def _zeroed(tree: Any, masks: Mapping[str, Any]) -> Any:
    seen = _tree.Tree(tree)
    return seen.replace({p: _chosen.masked(seen.leaves[p], m) for p, m in masks.items()})


def _stepped(params: Any, steps: Any, stay: Mapping[str, Any]) -> Any:
    """The step where a weight stays, and elsewhere what takes it to zero."""
    old, seen = _tree.Tree(params).leaves, _tree.Tree(steps)
    new = {}
    for path, mask in stay.items():
        step = _widened(old[path], seen.leaves[path])
        new[path] = jnp.where(mask, step, -jnp.asarray(old[path]).astype(step.dtype))
    return seen.replace(new)


def _widened(old: Any, step: Any) -> Any:
    """The step in a dtype that holds the weight, so that their sum can be zero exactly."""
    return step.astype(jnp.promote_types(jnp.asarray(old).dtype, step.dtype))


class _Rule:
    """The arguments of sparsify, checked once."""

    def __init__(
        self, sparsity: Any, score: Score, where: Where, key: Any, every: int, scope: Any,
        pattern: Any, regrow: Any, regrow_fraction: Any, masks: Any, straight_through: bool,
        rewind: int | None, like: Any, axes: Any,
    ):  # fmt: skip
        refuse_injected(score=score, key=key, every=every, rewind=rewind)
        if isinstance(every, bool) or not isinstance(every, int | np.integer) or every < 1:
            raise FwtError(f"every must be a whole number of updates, 1 or more, found {every!r}")
        if rewind is not None and (isinstance(rewind, bool) or not isinstance(rewind, int)):
            raise FwtError(f"rewind must be the number of an update, found {rewind!r}")
        if rewind is not None and (rewind < 0 or straight_through or regrow is not None):
            raise FwtError(
                "rewind must be 0 or more, and goes with neither straight_through nor regrow"
            )
        pattern = resolve(pattern)
        if straight_through and regrow is not None:
            raise FwtError("straight_through lets weights come back by itself: leave regrow out")
        named = {"set": scores.random, "rigl": scores.gradient}
        if isinstance(regrow, str) and regrow not in named:
            raise FwtError(f"regrow must be 'set', 'rigl' or a score, found {regrow!r}")
        self.regrow = resolve(named[regrow] if isinstance(regrow, str) else regrow)
        if self.regrow is not None and not callable(self.regrow):
            raise FwtError(f"regrow must be 'set', 'rigl' or a score, found {regrow!r}")
        if self.regrow is not None and getattr(pattern, "name", "") == "n_m":
            raise FwtError(
                "n_m fixes how many of each group are kept, so nothing can grow back: "
                "use straight_through=True to let its masks move"
            )
        fraction = self.fading if regrow_fraction is None else regrow_fraction
        share = isinstance(fraction, int | float) and 0 <= fraction <= 1
        if not (share or callable(fraction) or isinstance(fraction, jax.Array)):
            raise FwtError(f"regrow_fraction must be a share or a schedule, found {fraction!r}")
        told = isinstance(scope, Mapping) or getattr(pattern, "name", "") == "n_m"
        self.fixed = sparsity is None and masks is not None and not told
        if sparsity is None and masks is None and not told:
            raise FwtError(
                "sparsify needs a sparsity (a number or a schedule n -> share), or "
                "masks=, such as fwt.masks_of for the zeros that are there already"
            )
        if self.fixed and where is not _axes.kernels:
            raise FwtError(
                "masks= says by itself which leaves it masks: leave where= out, or give a sparsity "
                "too; masks=functools.partial(fwt.masks_of, where=...) takes the zeros there"
            )
        if self.fixed and (self.regrow is not None or straight_through or rewind is not None):
            raise FwtError(
                "masks= without a sparsity never change, so regrow, straight_through "
                "and rewind say nothing: give a sparsity too"
            )
        self.key = None if key is None else _keys.as_key(key, "sparsify")
        self.sparsity, self.where, self.every, self.begin_with = sparsity, where, int(every), masks
        self.straight_through, self.like, self.fraction = straight_through, like, fraction
        self.settings = (scope, pattern, where, like)
        self.score, self.axes = score, axes
        context = {
            "grads": ..., "accumulated": ..., "key": None if key is None else ...,
        }  # fmt: skip
        self.context = context
        if not self.fixed:
            self.plan(0.0 if callable(sparsity) else sparsity)
        if self.regrow is not None:
            place = f"regrow={regrow!r}: " if isinstance(regrow, str) else "regrow=: "
            _plan.context_of(self.regrow, context, place)
        self.resets = not straight_through and not self.fixed
        self.sums = not self.fixed and "accumulated" in _plan.named(resolve(score))
        if self.sums and not hasattr(_inner(score), "accumulate"):
            raise FwtError(
                "a score that names accumulated= has to carry what is summed up, as "
                "score.accumulate = lambda params, grads: tree"
            )

    def fading(self, number: Any) -> Any:
        """What is exchanged where nobody says it."""
        return 0.3 * jnp.sqrt(self.every / jnp.maximum(number, self.every))

    def plan(self, sparsity: Any) -> _plan.Plan:
        scope, pattern, where, like = self.settings
        return _plan.Plan(
            sparsity, self.score, None, scope, pattern, where, like, self.context, self.axes
        )

    def begin(self, params: Any) -> tuple[Masks, dict[str, Any]]:
        """The masks of the start; and by path, those whose count is the least."""
        tree = _tree.Tree(params)
        given = self.begin_with(params) if callable(self.begin_with) else self.begin_with
        found = {} if given is None else _full(given, params)
        names = list(found) if self.fixed else tree.select(self.where)
        for path in names:
            _tree.refuse_scales(path, tree.leaves[path].dtype)
        full = {p: jnp.ones_like(tree.leaves[p], bool) for p in names}
        masks = full | {p: jnp.array(m) for p, m in found.items()}
        start = {} if self.fixed else {p: jnp.array(m) for p, m in found.items()}
        return tree.map_all(masks, lambda leaf: jnp.ones((), bool)), start

    def zeros(self, params: Any) -> Any:
        if not self.sums:
            return ()
        tree = _tree.Tree(params)
        return {
            p: jnp.zeros(tree.leaves[p].shape, _sum_dtype(tree.leaves[p]))
            for p in tree.select(self.where)
        }

    def accumulate(self, total: Any, weights: Any, grads: Any) -> Any:
        if not self.sums:
            return ()
        narrow = {p: _tree.hidden(t, total) for p, t in (("w", weights), ("g", grads))}
        new = _tree.Tree(_inner(self.score).accumulate(narrow["w"], narrow["g"])).leaves
        return {p: x + new[p].astype(x.dtype) for p, x in total.items()}

    def due(self, number: Any, last: Any) -> tuple[Any, Any]:
        """The sparsity after this update, and whether the masks change now."""
        if self.fixed:
            return jnp.float32(0), np.bool_(False)
        s = self.sparsity
        value = jnp.float32(1.0 if s is None else s(number) if callable(s) else s)
        next_ = jnp.float32(s(number + 1)) if callable(s) else value
        periodic = number % self.every == 0
        if self.like == "torch":
            return value, periodic
        due = (value != last) & (periodic | (value == next_))
        return value, due | periodic if self.straight_through or self.regrow is not None else due

    def masks(
        self, weights: Any, steps: Any, masks: Any, start: Any, value: Any, number: Any, grads: Any,
        total: Any,
    ) -> Masks:  # fmt: skip
        """New masks for the weights after the step."""
        plan = self.plan(value if callable(self.sparsity) else self.sparsity)
        more: dict[str, Any] = {"grads": grads}
        if self.key is not None:
            more["key"] = jax.random.fold_in(self.key, number)
        if self.sums:
            more["accumulated"] = _tree.Tree(weights).replace(total)
        grow = None
        if self.regrow is not None:
            fraction = self.fraction(number) if callable(self.fraction) else self.fraction
            grow = (self.regrow, jnp.where(number % self.every == 0, fraction, 0.0))
        alive = None if self.straight_through else _full(masks, weights)
        _, chosen = plan.choose(weights, alive, grow, more, steps, start)
        new = _chosen.kept(chosen)
        if alive is not None and grow is None:  # n_m may leave more than the start did
            new |= {p: new[p] & m for p, m in start.items() if p in new}
        return _tree.Tree(masks).replace(new)


def _inner(score: Any) -> Any:
    score = resolve(score)
    return getattr(score, "func", score)


def _sum_dtype(leaf: Any) -> Any:
    return _tree.wide_dtype(leaf.dtype)
