"""Pruning at tree level: ``prune``, ``masks``, ``masks_of``, ``apply_masks``."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fwt import _axes, _masks, _tree, patterns, scores
from fwt._types import Masks, Params, Score, Transform, Where, streams, with_masks
from fwt.pruning import chosen as _chosen
from fwt.pruning import plan as _plan
from fwt.pruning.scope import Like, Scope
from fwt.pruning.stored import pruned as _of_stored


def prune(
    sparsity: Any = None,
    score: Score = scores.magnitude,
    *,
    threshold: Any = None,
    scope: Scope = "layer",
    pattern: patterns.Pattern = patterns.unstructured,
    where: Where = _axes.kernels,
    like: Like | None = None,
    grads: Any = None,
    key: Any = None,
    axes: Mapping[str, str] | None = None,
    dtype: Any = None,
) -> Transform:
    """Sets the weights of least score to exactly +0.0.

    A sparsity s prunes exactly round-half-even(s * n) of the n selected weights, whatever the
    ties: among equals the first in path order are kept. NaN counts as the largest.

    Leaves may be spread over the devices of a mesh, with axes of any type: the selection is that
    of one device (where sums are compared, of blocks say, up to their rounding), and the result is
    spread as its leaf is. Inside ``jax.shard_map`` a leaf is the
    shard that a device holds, and each shard is counted by itself: call it outside to count over
    whole leaves.

    Args:
        sparsity: the share to prune, 0 to 1; a Python number, or a traced scalar, so that one
            compiled function serves a schedule, a ``vmap`` and a ``scan`` (it counts as its
            float32 value, cut to 0 and 1, for a trace can't raise). With a pattern of
            blocks or channels it counts those; ``n_m`` needs none.
        score: what a weight is worth: one of ``fwt.scores``, or any function of the params that
            returns the same tree. It gets the ``grads`` and ``key`` below if it names them.
        threshold: instead of a sparsity, prune where score <= threshold (cast to the leaf's dtype):
            nothing, if a traced one is NaN.
        scope: "layer" counts in each leaf, and in each slice of one that is a stack of layers
            (``nn.scan``, ``nn.vmap``, an ensemble); a leaf of which nothing tells that it is a
            stack is one layer, and ``axes={glob: "stack in out"}`` tells it; one that may be a
            stack along several axes is refused. Every other scope takes the same for a layer.
            "output" counts in each output unit (a column of a dense kernel, a filter), as Wanda
            does. "global" counts over all selected leaves together,
            "normalized" so too with the scores of each leaf divided by their L2 norm; "erk" and
            "lamp" give each leaf its count, and the counts sum up to the whole; or a dict
            ``{glob: sparsity}``, of which a leaf takes the first that matches (``sparsity``, if
            given, is a factor on all). "lamp" sorts each leaf, and gathers one that is sharded.
        pattern: which weights stand or fall together, one of ``fwt.patterns``.
        where: which leaves; the kernels unless told otherwise.
        like: count as another library does. "torch": a share of the weights that are not zero
            yet, or a whole number of them. "jaxpruner", "tfmot": keep ``max(1, round(n * (1 -
            s)))`` in float32; tfmot keeps all weights that are equal to the least kept one, and
            jaxpruner's N:M the last of equals.
        grads: the gradients, for a score that needs them: the same tree.
        key: a JAX key or an int seed, for a score that needs one, which gets a key of its own made
            of it.
        axes: ``{glob: names}`` for leaves whose axes nothing else tells, where the pattern asks
            or a leaf is a stack of layers; see :func:`fwt.initialize`.
        dtype: the dtype of the selected leaves in the result; None keeps each leaf's own.

    Returns:
        A transform; unselected leaves come back as the same objects.

    Raises:
        FwtError: unless exactly one of sparsity and threshold is given, in its range; for a score
            whose context is missing, or a pattern and a scope that do not go together.
        WhereError: if ``where`` matches nothing.
        LeafError: for a leaf that the pattern does not tile; it names the ``where`` without it.

    Example:
        >>> params = {"dense": {"kernel": np.array([[0.1, -3.0], [2.0, -0.2]], np.float32)}}
        >>> prune(0.5)(params)["dense"]["kernel"].tolist()
        [[0.0, -3.0], [2.0, 0.0]]
        >>> prune(threshold=0.1)(params)["dense"]["kernel"].tolist()
        [[0.0, -3.0], [2.0, -0.20000000298023224]]
    """
    context = {"grads": grads, "key": key}
    plan = _plan.Plan(sparsity, score, threshold, scope, pattern, where, like, context, axes, dtype)

    def apply(params: Params) -> Params:
        tree = _tree.Tree(params)
        if tree.stored:
            return _of_stored(plan, tree)
        _, chosen = plan.choose(params, tree=tree)
        return tree.replace(_chosen.pruned(chosen))

    # What else a score looks at, nobody knows.
    return streams(apply) if plan.score in (scores.magnitude, scores.random) else apply


def masks(
    sparsity: Any = None,
    score: Score = scores.magnitude,
    *,
    threshold: Any = None,
    scope: Scope = "layer",
    pattern: patterns.Pattern = patterns.unstructured,
    where: Where = _axes.kernels,
    like: Like | None = None,
    grads: Any = None,
    key: Any = None,
    axes: Mapping[str, str] | None = None,
) -> Transform:
    """What :func:`prune` would keep, as a tree of bool arrays.

    Args:
        sparsity: as in :func:`prune`, and so are all the others.
        score: what a weight is worth.
        threshold: instead of a sparsity.
        scope: where to count.
        pattern: which weights stand or fall together.
        where: which leaves.
        like: whose counts.
        grads: for a score that needs them.
        key: for a score that needs one.
        axes: for leaves whose axes nothing else tells.

    Returns:
        A function from params to masks: True = keep, a rank-0 True for an unselected leaf. It takes
        a live Keras or torch model too; the masks are in the axes of ``converters.weights(model)``.

    Raises:
        FwtError: as :func:`prune` does.

    Example:
        >>> import jax
        >>> params = {"d": {"kernel": np.array([[1.0, 2.0]], np.float32), "bias": np.ones(2)}}
        >>> jax.tree.map(lambda m: m.tolist(), masks(0.5)(params))
        {'d': {'bias': True, 'kernel': [[False, True]]}}
    """
    context = {"grads": grads, "key": key}
    plan = _plan.Plan(sparsity, score, threshold, scope, pattern, where, like, context, axes)

    @_tree.reads
    def apply(params: Params) -> Masks:
        tree, chosen = plan.choose(params)
        return tree.map_all(_chosen.kept(chosen), all_true)

    return apply


@_tree.reads
def masks_of(params: Params, where: Where = _axes.kernels) -> Masks:
    """The masks of a model that somebody else pruned: its weights that are not zero.

    Args:
        params: any pytree of arrays, or a live Keras or torch model.
        where: which leaves; the others get a rank-0 True.

    Returns:
        Masks, True where a weight is not zero (a denormal or NaN is not).

    Raises:
        WhereError: if ``where`` matches nothing.

    Example:
        >>> masks_of({"d": {"kernel": np.array([[0.0, 2.0]], np.float32)}})["d"]["kernel"].tolist()
        [[False, True]]
    """
    tree = _tree.Tree(params)
    names = tree.select(where)
    kept = {p: _plan.nonzero(_tree.computable(p, tree.leaves[p])) for p in names}
    return tree.map_all(kept, all_true)


def apply_masks(masks: Masks) -> Transform:
    """Sets the weights whose mask is False to exactly +0.0, be they inf or NaN.

    Args:
        masks: the same tree of bool arrays, rank-0 for a leaf to leave alone; or ``{path: mask}``,
            where all other leaves are left alone.

    Returns:
        A transform.

    Raises:
        LeafError: if paths or shapes differ, or a mask is not bool.

    Example:
        >>> params = {"d": {"kernel": np.array([[np.nan, 2.0]], np.float32)}}
        >>> masked = apply_masks({"d": {"kernel": np.array([[False, True]])}})(params)
        >>> masked["d"]["kernel"].tolist()
        [[0.0, 2.0]]
        >>> some = apply_masks({"d/kernel": np.array([[True, False]])})
        >>> some({**params, "e": {"kernel": np.ones(2)}})["e"]["kernel"].tolist()
        [1.0, 1.0]
    """
    wanted = _tree.Tree(masks)

    def apply(params: Params) -> Params:
        tree = _tree.Tree(params)
        chosen = _masks.fitted(wanted, tree)
        return tree.replace(
            {p: _chosen.masked(_tree.computable(p, tree.leaves[p]), m) for p, m in chosen.items()}
        )

    return with_masks(apply)


def all_true(leaf: Any) -> Any:
    """The mask of a leaf that is not selected."""
    return np.ones((), bool)
