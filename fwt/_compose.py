"""Transforms made of transforms."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fwt import _masks, _states, _tree
from fwt._types import (
    LeafError,
    Masks,
    Params,
    Transform,
    Where,
    streams,
    wants_statistics,
    with_inside,
    with_statistics,
)


def chain(*transforms: Transform) -> Transform:
    """Applies transforms from left to right.

    Args:
        transforms: functions from params to params; none at all is the identity.

    Returns:
        The composed transform.

    Example:
        >>> import fwt, numpy as np
        >>> params = {"dense": {"kernel": np.array([[3.0, 0.1], [-4.0, 0.2]], np.float32)}}
        >>> t = chain(fwt.prune(threshold=0.15), fwt.project(fwt.constraints.max_norm(1.0)))
        >>> print(np.asarray(t(params)["dense"]["kernel"]).round(2))
        [[ 0.6  0. ]
         [-0.8  0.2]]
    """
    for t in transforms:
        if not callable(t):
            raise TypeError(f"chain takes transforms (functions), found {t!r}")

    def apply(params: Params) -> Params:
        for t in transforms:
            params = t(params)
        return params

    def inside(masks: Masks) -> Transform:
        return chain(*(within(t, masks) for t in transforms))

    return streams(with_inside(with_statistics(apply, transforms), inside), transforms)


def within(transform: Transform, masks: Masks) -> Transform:
    """The transform where these masks hold, if there are any. A function that can't be told of
    them is followed by them."""
    if masks is None:
        return transform
    inside = getattr(transform, "__fwt_inside__", None)
    if inside is not None:
        return inside(masks)

    def followed(params: Params) -> Params:
        tree = _tree.Tree(transform(params))
        chosen = _masks.fitted(_tree.Tree(masks), tree)
        return tree.replace({p: jnp.where(m, tree.leaves[p], 0) for p, m in chosen.items()})

    return followed


def masks_in(state: Any, params: Params) -> Masks:
    """The masks of every ``sparsify`` in the state of an optimizer of these params, or None."""

    def ours(x: Any) -> bool:
        return set(getattr(x, "_fields", ())) >= _states.OURS

    def within(state: Any) -> Iterator[Any]:
        for x in jax.tree.leaves(state, is_leaf=ours):
            if ours(x):
                yield x
                yield from within(x.inner)

    found: dict[str, Any] = {}
    for x in within(state):
        for path, mask in _tree.Tree(x.masks).leaves.items():
            known = found.get(path)
            if known is None or not np.ndim(known):
                found[path] = mask
            elif np.ndim(mask):
                found[path] = known & mask
    if not found:
        return None
    tree = _tree.Tree(params)
    return tree.replace({p: found.get(p, np.True_) for p in tree.leaves}, ties=False)


def at(where: Where, transform: Transform) -> Transform:
    """Narrows a transform to the leaves that ``where`` names.

    Paths stay absolute, and the ``where`` of the inner transform (its default too) is
    intersected with this one. Any function of a tree can be narrowed, for the other leaves are
    hidden from it: ``jax.tree.map`` passes them by. Of a tied array (one array under several
    paths) the function sees every path, and must give all of them one value.

    Args:
        where: as in :func:`fwt.select`.
        transform: a function from params to params that keeps the paths, shapes and tree.

    Returns:
        The narrowed transform; leaves outside come back as the same objects.

    Raises:
        WhereError: if nothing matches; the error says whether it was this ``where`` or that of the
            inner transform.
        LeafError: if the transform changes the tree, or gives the paths of a tied array different
            values.

    Example:
        >>> import fwt, numpy as np
        >>> params = {"a": {"kernel": np.ones((2, 2))}, "b": {"kernel": np.ones((2, 2))}}
        >>> new = at("b/*", lambda tree: __import__("jax").tree.map(lambda w: w * 0, tree))(params)
        >>> float(new["a"]["kernel"].sum()), float(new["b"]["kernel"].sum())
        (4.0, 0.0)
    """

    def apply(params: Params) -> Params:
        tree = _tree.Tree(params, wants_statistics(transform))
        kept = tree.whole(tree.select(where))
        hide = {
            p: _tree.Unselected(x.shape, x.dtype) for p, x in tree.leaves.items() if p not in kept
        }
        hidden = tree.replace(hide, ties=False)
        new = _tree.Tree(transform(hidden), wants_statistics(transform)).leaves
        if set(new) != set(kept):
            changed = sorted(set(new) ^ set(kept))[0]
            raise LeafError(
                f"the transform inside at(...) must keep the tree as it is, but {changed!r} "
                f"{'appeared' if changed in new else 'went missing'}"
            )
        return tree.replace(tree.once(new))

    def inside(masks: Masks) -> Transform:
        return at(where, within(transform, masks))

    return streams(with_inside(with_statistics(apply, [transform]), inside), [transform])


def straight_through(transform: Transform) -> Transform:
    """A transform that is differentiated as the identity (the straight-through estimator).

    Source: Bengio, Léonard and Courville, "Estimating or Propagating Gradients Through
    Stochastic Neurons", 2013.

    Args:
        transform: a function from params to params that keeps paths, shapes and dtypes.

    Returns:
        A transform that gives exactly the same values and whose derivative is the identity. Leaves
        that the transform does not change come back as the same objects.

    Raises:
        LeafError: if the transform changes the tree, a shape or a dtype, or gives the paths of a
            tied array different values.

    Example:
        >>> import fwt, jax, jax.numpy as jnp
        >>> params = {"d": {"kernel": jnp.array([[0.1, 3.0]])}}
        >>> t = straight_through(fwt.prune(threshold=1.0))
        >>> jax.grad(lambda p: t(p)["d"]["kernel"].sum())(params)["d"]["kernel"].tolist()
        [[1.0, 1.0]]
    """

    def apply(params: Params) -> Params:
        tree = _tree.Tree(params, wants_statistics(transform))
        new = _tree.Tree(transform(params), wants_statistics(transform)).leaves
        if set(new) != set(tree.leaves):
            raise LeafError("straight_through: the transform must keep the tree as it is")
        through = {}
        for path, value in tree.once(new).items():
            old = tree.leaves[path]
            if value is not old and jnp.issubdtype(old.dtype, jnp.inexact):
                if value.shape != old.shape or value.dtype != old.dtype:
                    raise LeafError(
                        f"straight_through: {path} expected {old.dtype}{list(old.shape)}, found "
                        f"{value.dtype}{list(value.shape)}"
                    )
                value = _through(old, value)
            through[path] = value
        return tree.replace(through)

    return with_statistics(apply, [transform])


@jax.custom_jvp
def _through(old: Any, new: Any) -> Any:
    return new


@_through.defjvp
def _(primals: Any, tangents: Any) -> Any:
    return primals[1], tangents[0]
