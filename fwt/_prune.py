"""Pruning at tree level: ``prune``, ``masks``, ``masks_of``, ``apply_masks``."""

import functools
import inspect
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from fwt import _axes, _select, _tree, patterns, scores
from fwt._types import FwtError, LeafError, Masks, Params, Score, Transform, Where, resolve

Scope = Literal["layer", "global"]


def prune(
    sparsity: Any = None,
    score: Score = scores.magnitude,
    *,
    threshold: Any = None,
    scope: Scope = "layer",
    pattern: patterns.Pattern = patterns.unstructured,
    where: Where = _axes.kernels,
    dtype: Any = None,
) -> Transform:
    """Sets the weights of least score to exactly +0.0.

    A sparsity s prunes exactly round-half-even(s * n) of the n selected weights, whatever the
    ties: among equals the first in path order are kept. NaN counts as the largest.

    Args:
        sparsity: the share to prune, 0 to 1; a Python number, or a traced scalar, so that one
            compiled function serves a schedule, a ``vmap`` and a ``scan``.
        score: what a weight is worth, ``fwt.scores.magnitude`` or any function of the params
            that returns the same tree.
        threshold: instead of a sparsity, keep where score > threshold (cast to the leaf's dtype).
        scope: "layer" counts in each leaf, "global" over all selected leaves together.
        pattern: ``fwt.patterns.unstructured``.
        where: which leaves; the kernels unless told otherwise.
        dtype: the dtype of the selected leaves in the result; None keeps each leaf's own.

    Returns:
        A transform; unselected leaves come back as the same objects.

    Raises:
        FwtError: unless exactly one of sparsity and threshold is given, in its range.
        WhereError: if ``where`` matches nothing.

    Example:
        >>> params = {"dense": {"kernel": np.array([[0.1, -3.0], [2.0, -0.2]], np.float32)}}
        >>> prune(0.5)(params)["dense"]["kernel"].tolist()
        [[0.0, -3.0], [2.0, 0.0]]
        >>> prune(threshold=0.1)(params)["dense"]["kernel"].tolist()
        [[0.0, -3.0], [2.0, -0.20000000298023224]]
    """
    plan = _Plan(sparsity, score, threshold, scope, pattern, where, dtype)

    def apply(params: Params) -> Params:
        tree, names, leaves, worths, amounts = plan.prepare(params)
        new = _pruned(leaves, worths, amounts, plan.kind)
        return tree.replace(dict(zip(names, new, strict=True)))

    return apply


def masks(
    sparsity: Any = None,
    score: Score = scores.magnitude,
    *,
    threshold: Any = None,
    scope: Scope = "layer",
    pattern: patterns.Pattern = patterns.unstructured,
    where: Where = _axes.kernels,
) -> Transform:
    """What :func:`prune` would keep, as a tree of bool arrays.

    Args:
        sparsity: as in :func:`prune`, and so are all the others.
        score: what a weight is worth.
        threshold: instead of a sparsity.
        scope: "layer" or "global".
        pattern: which weights stand or fall together.
        where: which leaves.

    Returns:
        A function from params to masks: True = keep, a rank-0 True for an unselected leaf.

    Raises:
        FwtError: as :func:`prune` does.

    Example:
        >>> params = {"d": {"kernel": np.array([[1.0, 2.0]], np.float32), "bias": np.ones(2)}}
        >>> jax.tree.map(lambda m: m.tolist(), masks(0.5)(params))
        {'d': {'bias': True, 'kernel': [[False, True]]}}
    """
    plan = _Plan(sparsity, score, threshold, scope, pattern, where, None)

    def apply(params: Params) -> Masks:
        tree, names, leaves, worths, amounts = plan.prepare(params)
        kept = _kept(leaves, worths, amounts, plan.kind)
        return tree.map_all(dict(zip(names, kept, strict=True)), _all_true)

    return apply


def masks_of(params: Params, where: Where = _axes.kernels) -> Masks:
    """The masks of a model that somebody else pruned: its weights that are not zero.

    Args:
        params: any pytree of arrays.
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
    kept = _nonzero([_tree.computable(p, tree.leaves[p]) for p in names])
    return tree.map_all(dict(zip(names, kept, strict=True)), _all_true)


def apply_masks(masks: Masks) -> Transform:
    """Sets the weights whose mask is False to exactly +0.0, be they inf or NaN.

    Args:
        masks: the same tree of bool arrays; rank-0 for a leaf to leave alone.

    Returns:
        A transform.

    Raises:
        LeafError: if paths or shapes differ, or a mask is not bool.

    Example:
        >>> params = {"d": {"kernel": np.array([[np.nan, 2.0]], np.float32)}}
        >>> masked = apply_masks({"d": {"kernel": np.array([[False, True]])}})(params)
        >>> masked["d"]["kernel"].tolist()
        [[0.0, 2.0]]
    """
    wanted = _tree.Tree(masks).leaves

    def apply(params: Params) -> Params:
        tree = _tree.Tree(params)
        chosen = tree.match(wanted)
        new = _masked([_tree.computable(p, tree.leaves[p]) for p in chosen], list(chosen.values()))
        return tree.replace(dict(zip(chosen, new, strict=True)))

    return apply


def _all_true(leaf: Any) -> Any:
    return np.ones((), bool)


class _Plan:
    """The arguments of prune and masks, checked once; a tree made ready for the compiled part."""

    def __init__(
        self,
        sparsity: Any,
        score: Any,
        threshold: Any,
        scope: Any,
        pattern: Any,
        where: Where,
        dtype: Any,
    ):
        if (sparsity is None) == (threshold is None):
            raise FwtError(
                "prune needs a sparsity or a threshold, one of the two: prune(0.8) prunes 80 %, "
                "prune(threshold=0.1) keeps |w| > 0.1"
            )
        for name, value in (("sparsity", sparsity), ("threshold", threshold)):
            if value is None or isinstance(value, jax.core.Tracer):
                continue
            exact = isinstance(value, jax.Array)  # it counts as its float32 value
            if isinstance(value, jax.Array | np.ndarray | np.generic) and np.ndim(value) == 0:
                value = value.item()
            if isinstance(value, jax.Array) and value.ndim:
                raise FwtError(
                    f"{name} must be a scalar, found shape {value.shape}; use jax.vmap for several"
                )
            if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
                raise FwtError(f"{name} must be a number or a scalar array, found {value!r}")
            if name == "sparsity":
                if not 0 <= value <= 1:
                    raise FwtError(
                        f"sparsity is the share of weights to prune, 0 to 1; found {value}"
                    )
                sparsity = sparsity if exact else float(value)
            else:
                threshold = threshold if exact else float(value)
        for name, value in (("sparsity", sparsity), ("threshold", threshold)):
            if isinstance(value, jax.core.Tracer) and value.ndim:
                raise FwtError(f"{name} must be a scalar, found shape {value.shape}")
        if scope not in ("layer", "global"):
            raise FwtError(f"scope must be 'layer' or 'global', found {scope!r}")
        if pattern != patterns.unstructured:
            raise FwtError(f"pattern must be fwt.patterns.unstructured, found {pattern!r}")
        self.score = resolve(score)
        if not callable(self.score):
            raise FwtError(
                f"score must be a function such as fwt.scores.magnitude, found {score!r}"
            )
        _check_context(self.score)
        self.sparsity, self.threshold, self.scope = sparsity, threshold, scope
        self.where, self.dtype = where, dtype
        self.kind = ("sparsity" if threshold is None else "threshold", scope)

    def prepare(self, params: Params) -> tuple[Any, list[str], list[Any], list[Any] | None, Any]:
        tree = _tree.Tree(params)
        names = tree.select(self.where)
        leaves = [_tree.computable(p, tree.leaves[p], self.dtype) for p in names]
        for path, leaf in zip(names, leaves, strict=True):
            if leaf.dtype.kind == "c":
                raise LeafError(f"{path} is {leaf.dtype}: pruning needs real weights")
        worths = None if self.score is scores.magnitude else self._worths(params, names, leaves)
        amounts: Any
        if self.threshold is not None:
            amounts = [
                _cast(
                    self.threshold,
                    *((w.dtype, False) if worths is None else (worths[i].dtype, True)),
                )
                for i, w in enumerate(leaves)
            ]
        elif self.scope == "global":
            amounts = self._count(sum(x.size for x in leaves))
        else:
            amounts = [self._count(x.size) for x in leaves]
        return tree, names, leaves, worths, amounts

    def _count(self, n: int) -> Any:
        return jnp.asarray(_select.count(self.sparsity, n), jnp.uint32)

    def _worths(self, params: Params, names: list[str], leaves: list[Any]) -> list[Any]:
        found = _tree.Tree(self.score(params)).leaves
        worths = []
        for path, leaf in zip(names, leaves, strict=True):
            if path not in found:
                raise LeafError(
                    f"the score {_name(self.score)} returned no leaf {path!r}: a score returns "
                    f"the same tree{_tree.near(path, found)}"
                )
            worth = found[path]
            if tuple(worth.shape) != tuple(leaf.shape) or worth.dtype.kind == "c":
                raise LeafError(
                    f"the score {_name(self.score)} returned {worth.dtype}{list(worth.shape)} for "
                    f"{path}, expected real numbers of shape {list(leaf.shape)}"
                )
            worths.append(_tree.computable(f"the score of {path}", worth))
        return worths


def _cast(threshold: Any, dtype: Any, signed: bool) -> tuple[Any, Any]:
    """A threshold in the leaf's dtype, floored for integers, and whether all is above it."""
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.asarray(threshold, dtype), (jnp.asarray(threshold) < 0) & (not signed)
    # A magnitude is as wide as an unsigned integer, so that |-128| of an int8 has its place.
    dtype = np.dtype(dtype) if signed else np.dtype(f"uint{dtype.itemsize * 8}")
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    if isinstance(threshold, float):
        return jnp.asarray(math.floor(min(max(threshold, low), high)), dtype), threshold < low
    floored = jnp.asarray(jnp.clip(jnp.floor(threshold), low, high))
    return floored.astype(dtype), jnp.asarray(threshold) < low


def _name(function: Any) -> str:
    return getattr(function, "__name__", repr(function))


def _check_context(score: Any) -> None:
    try:
        parameters = list(inspect.signature(score).parameters.values())
    except (TypeError, ValueError):  # builtins have no signature: the call itself will tell
        return
    needed = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    if needed:
        raise FwtError(
            f"the score {_name(score)} needs {', '.join(needed)}=, which prune does not have: bind "
            f"it, such as functools.partial({_name(score)}, {needed[0]}=...)"
        )


def _keep(leaves: list[Any], worths: Any, amounts: Any, kind: tuple[str, str]) -> list[Any]:
    by, scope = kind
    signed = worths is not None
    values = leaves if worths is None else worths
    if by == "threshold":
        key = _select.signed_key if signed else _select.magnitude_key
        # Every magnitude is above a negative threshold, of which the key knows the size only.
        return [(key(x) > key(t)) | all_ for x, (t, all_) in zip(values, amounts, strict=True)]
    if scope == "global":
        return _select.keep_largest(_select.common_keys(values, signed), amounts)
    return [
        _select.keep_largest(_select.common_keys([x], signed), k)[0]
        for x, k in zip(values, amounts, strict=True)
    ]


def _where(leaves: list[Any], kept: list[Any]) -> list[Any]:
    return [
        jnp.where(m, x, jnp.zeros((), x.dtype))
        for x, m in zip(map(jnp.asarray, leaves), kept, strict=True)
    ]


_masked = jax.jit(_where)
_kept = functools.partial(jax.jit, static_argnums=3)(_keep)
_nonzero = jax.jit(lambda leaves: [_select.magnitude_key(x) != 0 for x in leaves])


@functools.partial(jax.jit, static_argnums=3)
def _pruned(leaves: list[Any], worths: Any, amounts: Any, kind: tuple[str, str]) -> list[Any]:
    return _where(leaves, _keep(leaves, worths, amounts, kind))
