"""Masks that fit a tree: the same tree, or some of its leaves by path."""

from collections.abc import Mapping
from typing import Any

import jax

from fwt import _tree
from fwt._types import LeafError


def fitted(given: _tree.Tree, tree: _tree.Tree) -> dict[str, Any]:
    """The masks of a tree by path, without a rank-0 True, which leaves its leaf as it is.

    Args:
        given: the masks: the same tree, or a dict by path, which may leave leaves out.
        tree: what they are for.

    Raises:
        LeafError: if the paths, shapes or dtypes don't fit the tree, or the paths of a tie
            have different masks.
    """
    if callable(given.whole_tree) and not given.leaves:
        raise LeafError(
            f"masks: a function was found, {given.whole_tree!r:.60}, and it is what it gives of "
            "the params that counts: fwt.apply_masks(fwt.masks_of(params))"
        )
    masks, whole = dict(given.leaves), True
    if _is_flat(given.whole_tree) and set(masks) != set(tree.leaves):
        masks, whole = _by_path(given.whole_tree, tree), False
    for path in tree.leaves if whole else ():
        if path not in masks and (spelled := given.spelled(path)) in masks:  # as a file spells it
            masks[path] = masks.pop(spelled)
        if path not in masks:
            raise LeafError(
                f"masks: no mask for {path!r}{_tree.near(path, masks)}; masks by path, "
                f"{{{path!r}: mask}}, may leave leaves out"
            )
    chosen = {}
    for path, mask in masks.items():
        if path in tree.hidden:
            continue
        if path not in tree.leaves:
            raise LeafError(
                f"masks: {path!r} is no leaf of the tree{_tree.near(path, tree.leaves)}"
            )
        shape = tuple(tree.leaves[path].shape)
        if mask.dtype != bool:
            raise LeafError(f"masks: {path} expected bool, found {mask.dtype}")
        if mask.shape == shape and (shape or isinstance(mask, jax.core.Tracer) or not mask):
            chosen[path] = mask
        elif mask.shape != ():
            raise LeafError(f"masks: {path} expected shape {shape}, found {tuple(mask.shape)}")
        elif not isinstance(mask, jax.core.Tracer) and not mask:
            raise LeafError(f"masks: {path} has a rank-0 False; give a mask of shape {shape}")
    for group in tree.ties if whole else ():  # by path, one stands for all
        masked = [p for p in group if p in chosen]
        if masked and len(masked) < len(group):
            other = next(p for p in group if p not in masked)
            raise LeafError(
                f"masks: {other} and {masked[0]} are one array (they are tied), but only "
                f"{masked[0]} has a mask: give both the same"
            )
    return tree.once(chosen)


def _is_flat(masks: Any) -> bool:
    """Whether these are arrays in a dict, whose keys may be paths."""
    named = isinstance(masks, dict) and bool(masks) and all(isinstance(k, str) for k in masks)
    return named and all(map(_tree.is_array, masks.values()))


def _by_path(masks: Mapping[str, Any], tree: _tree.Tree) -> dict[str, Any]:
    """Masks by path as the tree spells the paths."""
    out: dict[str, Any] = {}
    for key, mask in masks.items():
        path = tree.spelled(key)
        if path in tree.hidden:
            raise LeafError(f"masks: {path!r} is a leaf that at(...) left out")
        if path in out:
            raise LeafError(f"masks: {path!r} is given twice, in two spellings")
        out[path] = mask
    return out
