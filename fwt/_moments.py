"""What an optimizer remembers of each weight, where weights are pruned and where they grow."""

from typing import Any

import jax
import jax.numpy as jnp

from fwt._types import Masks
from fwt.pruning import plan as _plan


def _places(state: Any, masks: Masks) -> list[tuple[int, int]]:
    """Which leaves of an optimizer's state hold a number for each weight of a masked param: they
    stand under its keys and have its shape, whatever tree the optimizer keeps them in.

    Returns:
        Pairs of a leaf's place in the state and its param's place in the params.
    """
    wanted = [x for x in enumerate(jax.tree_util.tree_flatten_with_path(masks)[0]) if x[1][1].shape]
    found = []
    for place, (keys, leaf) in enumerate(jax.tree_util.tree_flatten_with_path(state)[0]):
        for param, (mine, mask) in wanted:
            same = keys[len(keys) - len(mine) :] == mine and jnp.shape(leaf) == mask.shape
            if same and jnp.issubdtype(leaf.dtype, jnp.inexact):
                found.append((place, param))
                break
    return found


def settled(state: Any, masks: Masks, grown: Any) -> Any:
    """The optimizer's state with zeros in its moments where a mask is False, and what is typical
    where a weight has just grown."""
    (leaves, structure), by_param = jax.tree.flatten(state), jax.tree.leaves(masks)
    for (place, param), (idle, typical) in zip(_places(state, masks), grown, strict=True):
        x = leaves[place]
        new = jnp.where(jnp.abs(x).astype(jnp.float32) <= idle, typical.astype(x.dtype), x)
        leaves[place] = _plan.masked(new, by_param[param])
    return jax.tree.unflatten(structure, leaves)


def none_grown(state: Any, masks: Masks) -> Any:
    """What :func:`settled` takes when no weight has just grown."""
    return jnp.full((len(_places(state, masks)), 2), -1, jnp.float32)


def typical(state: Any, masks: Masks, params: Any) -> Any:
    """For each moment, what it is where nothing is kept, and what weights that grow there begin
    with: the mean of what is nowhere negative, such as Adam's second moment. From zero, it would
    make their steps several times as large as others' for long. All else begins as it is."""
    leaves, rows = jax.tree.leaves(state), []
    kept, weights = jax.tree.leaves(masks), jax.tree.leaves(params)
    for place, param in _places(state, masks):
        x, mask, w = map(_sample, (leaves[place], kept[param], weights[param]))
        x, w = x.astype(jnp.float32), w.astype(jnp.float32)
        total = jnp.sum(jnp.where(mask, x, 0))
        mean = total / jnp.maximum(jnp.sum(mask), 1)
        # Some optimizers keep a copy of the weights too, which has to begin at zero as they do.
        gap = jnp.sum(jnp.where(mask, jnp.abs(x - w), 0))
        size = jnp.all(~mask | (x >= 0)) & (gap > total / 2) & jnp.isfinite(mean)
        idle = jnp.max(jnp.where(mask, -1, jnp.abs(x)), initial=-1)
        rows.append(jnp.stack([jnp.where(size, idle, -1), mean]))
    return jnp.stack(rows) if rows else jnp.zeros((0, 2), jnp.float32)


def _sample(x: Any) -> Any:
    """Some of a large leaf, so that no array of its size is stored; on several devices all of it,
    for a stride would gather it."""
    x = jnp.asarray(x)
    return x.reshape(-1)[:: x.size >> 14 | 1] if jax.device_count() == 1 else x
