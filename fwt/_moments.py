"""What an optimizer remembers of each weight, where weights are pruned and where they grow."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fwt import _mesh
from fwt._types import Masks
from fwt.pruning import chosen as _chosen


def around(
    tx: Any, init: Callable[..., Any], update: Callable[..., Any]
) -> optax.GradientTransformationExtraArgs:
    """An optimizer that says which one it wraps."""
    update.__dict__["__fwt_around__"] = tx
    return optax.GradientTransformationExtraArgs(init, update)


class _Place(NamedTuple):
    """A leaf of an optimizer's state that stands under the keys of a param.

    Attributes:
        leaf: its place among the leaves of the state.
        param: the place of its param among the params.
        tree: the keys above those of the param, such as those of Adam's ``mu``.
        masked: whether it holds a number for each weight of a masked param.
    """

    leaf: int
    param: int
    tree: tuple[Any, ...]
    masked: bool


def _places(state: Any, masks: Masks) -> list[_Place]:
    """Which leaves of an optimizer's state belong to which param: to that with the most keys, for
    ``dense/kernel`` is the end of ``encoder/dense/kernel`` too."""
    flat = jax.tree_util.tree_flatten_with_path(masks)[0]
    params = {keys: i for i, (keys, _) in enumerate(flat)}
    found = []
    for place, (keys, leaf) in enumerate(jax.tree_util.tree_flatten_with_path(state)[0]):
        cut = next((n for n in range(len(keys) + 1) if keys[n:] in params), None)
        if cut is None or not jnp.issubdtype(getattr(leaf, "dtype", bool), jnp.floating):
            continue
        param = params[keys[cut:]]
        shape = flat[param][1].shape
        found.append(_Place(place, param, keys[:cut], shape != () and leaf.shape == shape))
    return found


def _masked(state: Any, masks: Masks) -> list[_Place]:
    return [p for p in _places(state, masks) if p.masked]


def settled(state: Any, masks: Masks) -> Any:
    """The optimizer's state with zeros in its moments where a mask is False."""
    (leaves, structure), by_param = jax.tree.flatten(state), jax.tree.leaves(masks)
    for place in _masked(state, masks):
        leaves[place.leaf] = _chosen.masked(leaves[place.leaf], by_param[place.param])
    return jax.tree.unflatten(structure, leaves)


def begun(state: Any, masks: Masks, params: Any, grown: Any) -> Any:
    """The optimizer's state with what weights begin with that have just grown. No array says which
    those are: they are the ones that are zero and whose moment is that of a pruned weight.

    Args:
        state: the optimizer's state.
        masks: by which they have grown.
        params: the weights.
        grown: what :func:`typical` gave when they grew, or :func:`none_grown`.
    """
    (leaves, structure), weights = jax.tree.flatten(state), jax.tree.leaves(params)
    for place, (idle, start) in zip(_masked(state, masks), grown, strict=True):
        x = leaves[place.leaf]
        new = (jnp.abs(x).astype(jnp.float32) <= idle) & (weights[place.param] == 0)
        leaves[place.leaf] = jnp.where(new, start.astype(x.dtype), x)
    return jax.tree.unflatten(structure, leaves)


def none_grown(state: Any, masks: Masks) -> Any:
    """What :func:`begun` takes when no weight has just grown."""
    return jnp.full((len(_masked(state, masks)), 2), -1, jnp.float32)


def typical(state: Any, masks: Masks, params: Any) -> Any:
    """What the moments of weights that are about to grow begin with.

    That is the mean over the kept weights for what is nowhere negative, in no leaf of its tree,
    such as Adam's ``nu``: from zero, it would make their steps several times as large as others'
    for long. All else, such as Adam's ``mu``, begins as it is where a weight is pruned.

    Returns:
        float32[moments, 2], a row for each moment of a masked param: the largest absolute value
        among pruned weights, and the value that grown ones begin with. -1 as the former says that
        the moment is to be left alone.
    """
    leaves, kept, weights = map(jax.tree.leaves, (state, masks, params))
    seen: dict[Any, list[Any]] = {}  # by tree
    rows: list[Any] = []
    for place in _places(state, masks):
        x = _sample(leaves[place.leaf]).astype(jnp.float32)
        gap: Any = 0
        total: Any = 0
        if place.masked:
            mask, w = _sample(kept[place.param]), _sample(weights[place.param])
            idle = jnp.max(jnp.where(mask, -1, jnp.abs(x)), initial=-1)
            x, w = jnp.where(mask, x, 0), w.astype(jnp.float32)
            total, gap = jnp.sum(x), jnp.sum(jnp.where(mask, jnp.abs(x - w), 0))
            rows.append((place.tree, idle, total / jnp.maximum(jnp.sum(mask), 1)))
        seen.setdefault(place.tree, []).append((jnp.all(x >= 0), gap, total))
    sizes = {}
    for tree, found in seen.items():
        signs, gaps, totals = zip(*found, strict=True)
        # Some optimizers keep a copy of the weights too, which has to begin at zero as they do.
        sizes[tree] = jnp.all(jnp.stack(signs)) & (sum(gaps) > sum(totals) / 2)
    rows = [
        jnp.stack([jnp.where(sizes[tree] & jnp.isfinite(start), idle, -1), start])
        for tree, idle, start in rows
    ]
    return jnp.stack(rows) if rows else jnp.zeros((0, 2), jnp.float32)


def _sample(x: Any) -> Any:
    """Some of a large leaf, so that no array of its size is stored; on several devices all of it,
    for a stride would gather it."""
    x = jnp.asarray(x)
    alone = jax.device_count() == 1 and not _mesh.on_explicit([x])
    return x.reshape(-1)[:: x.size >> 14 | 1] if alone else x
