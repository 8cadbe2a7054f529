"""The verb that moves leaves into a set: ``project``."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fwt import (
    _apart,
    _axes,
    _masks,
    _mesh,
    _own_names,
    _stored,
    _tree,
    constraints,
    initializers,
)
from fwt._types import (
    Constraint,
    FwtError,
    LeafError,
    Masks,
    Params,
    Transform,
    Where,
    check_takes,
    hashes,
    resolve,
    streams,
    with_inside,
)
from fwt.constraints import _vectors


def project(
    constraint: Constraint,
    where: Where = _axes.kernels,
    masks: Masks = None,
    *,
    axes: Mapping[str, str] | None = None,
    dtype: Any = None,
) -> Transform:
    """Moves leaves into the set of a constraint.

    A leaf that is spread over the devices of a mesh is projected as a whole, and the result is
    spread as it is. Inside ``jax.shard_map`` each shard is projected by itself, as if it were the
    leaf: call it outside for constraints on whole leaves.

    Args:
        constraint: one of ``fwt.constraints``, bare or called, or any
            ``(leaf, axes) -> leaf`` that keeps shape and dtype. Of a stack of layers it gets one
            slice after the other.
        where: which leaves; the kernels unless told otherwise.
        masks: project within the support of these masks, a tree or ``{path: mask}``: what they
            drop is zero in the result.
        axes: ``{glob: names}`` for leaves whose axes nothing else tells; see
            :func:`fwt.initialize`.
        dtype: the dtype of the selected leaves in the result; None keeps each leaf's own.

    Returns:
        A transform; unselected leaves come back as the same objects.

    Raises:
        WhereError: if ``where`` matches nothing.
        AxesError: if the constraint asks for axes that nothing tells.
        FwtError: for masks with a constraint that would refill zeros.

    Example:
        >>> import fwt, numpy as np
        >>> params = {"dense": {"kernel": np.array([[3.0], [4.0]], np.float32)}}
        >>> project(fwt.constraints.max_norm(1.0))(params)["dense"]["kernel"].tolist()
        [[0.6000000238418579], [0.800000011920929]]
    """
    chosen = resolve(constraint)
    ours = isinstance(chosen, constraints.Bound)
    wrong = not callable(chosen) or isinstance(chosen, initializers.Bound)
    if wrong or _own_names.library(chosen):
        raise TypeError(
            "project takes a constraint such as fwt.constraints.non_negative, found "
            f"{constraint!r}{_own_names.hint(constraint, 'constraint')}"
        )
    if not ours and getattr(chosen, "__module__", "").startswith("fwt.constraints"):
        raise TypeError(f"fwt.constraints.{chosen.__name__} needs arguments: call it first")
    if not ours:
        check_takes(chosen, "project: a constraint", "leaf, axes")
    if masks is not None and not getattr(chosen, "keeps_zeros", False):
        raise FwtError(
            f"{getattr(chosen, 'name', chosen)!r} does not declare that it keeps zeros, so it "
            "would refill what masks= prunes: leave masks= out, or chain it with "
            "fwt.apply_masks(masks)"
        )
    wanted = None if masks is None else _tree.Tree(masks)

    def apply(params: Params) -> Params:
        tree = _tree.Tree(params)
        names = tree.select(where)
        places_of = _axes.Places(tree, axes)
        places_of.check_used(names)
        leaves = [_tree.computable(p, tree.leaves[p], dtype) for p in names]
        places = tuple(map(places_of, names))
        support = {} if wanted is None else _masks.fitted(wanted, tree)
        kept = [support.get(p) for p in names]
        # A traced setting can't be a static argument, and a user's own function may depend on
        # more than its arguments: those are not compiled by us.
        compiled = ours and hashes(chosen)
        if tree.stored:
            each = zip(names, leaves, places, kept, strict=True)
            return tree.replace({p: _later(chosen, compiled, p, *row) for p, *row in each})
        rows = zip(leaves, places, kept, strict=True)
        new = [chosen.on_host(*row) if compiled else None for row in rows]
        left = [i for i, x in enumerate(new) if x is None]
        if left:
            several = _projected_compiled if compiled else _projected
            those = tuple(places[i] for i in left)
            found = several(chosen, those, [leaves[i] for i in left], [kept[i] for i in left])
            for i, x in zip(left, found, strict=True):
                new[i] = x
        # What a user's own function gives stays where that put it.
        new = [_mesh.like(x, old) if ours else x for x, old in zip(new, leaves, strict=True)]
        return tree.replace(dict(zip(names, new, strict=True)))

    def inside(masks: Masks) -> Transform:
        if getattr(chosen, "keeps_zeros", False):
            return project(constraint, where, masks, axes=axes, dtype=dtype)
        held = _tree.Tree(masks).leaves

        def checked(params: Params) -> Params:
            touched = [p for p in _tree.Tree(params).select(where) if np.ndim(held.get(p, True))]
            if touched:
                raise FwtError(
                    f"constrain: {getattr(chosen, 'name', chosen)!r} does not declare that it "
                    f"keeps zeros, so it would refill what sparsify prunes of {touched[0]}: "
                    "sparsify(constrain(tx, project(...)), sparsity) prunes after it"
                )
            return apply(params)

        return checked

    made = apply if masks is not None else with_inside(apply, inside)
    return streams(made) if ours else made  # a user's own function may give other values each time


_ROWS = 1 << 24  # bytes of a leaf that are projected at once, where rows can be taken alone


def _later(constraint: Any, compiled: bool, path: str, leaf: Any, place: Any, mask: Any) -> Any:
    """A leaf of a file that is projected when it is gone through."""
    dtype, shape = leaf.dtype, tuple(leaf.shape)

    def done(value: np.ndarray, mask: Any) -> np.ndarray:
        here = dataclasses.replace(place, shape=value.shape)
        new = constraint.on_host(value, here, mask) if compiled else None
        if new is None:
            several = _projected_compiled if compiled else _projected
            (new,) = several(constraint, (here,), [jnp.asarray(value)], [mask])
        return np.asarray(new)

    own = getattr(constraint, "function", None) in _vectors.NORMS and not place.stack
    own = own and dict(constraint.settings).get("axis") is None
    if own and mask is None and place.known and 0 in place.outputs and not place.doubted:
        rows = max(_ROWS // max(leaf.nbytes // max(shape[0], 1), 1), 1)
        if rows < shape[0]:

            def pieces(given: _stored.Pieces) -> _stored.Pieces:
                for part in _stored.joined(given, rows * (leaf.size // shape[0])):
                    yield from _stored.cut(done(part.reshape(-1, *shape[1:]), None))

            return _stored.of(leaf).mapped(pieces)

    def whole() -> np.ndarray:
        why = f"the constraint {getattr(constraint, 'name', constraint)!r}"
        return done(_stored.held({path: leaf}, why)[path], mask)

    return _stored.computed(shape, dtype, whole)


def _projected(constraint: Any, places: Any, leaves: list[Any], kept: list[Any]) -> list[Any]:
    rows = zip(places, leaves, kept, strict=True)
    return [_projected_one(constraint, *row) for row in rows]


def _projected_one(constraint: Any, place: Any, leaf: Any, mask: Any) -> Any:
    leaf = jnp.asarray(leaf)
    zero = jnp.zeros((), leaf.dtype)
    if mask is not None:
        leaf = jnp.where(mask, leaf, zero)
    if isinstance(constraint, constraints.Bound):
        value = constraint(leaf, place, mask)
    elif place.stack:
        one = place.one
        value = place.in_turn(lambda _, part: constraint(part, one), leaf)
    else:
        value = constraint(leaf, place.settled())
    if getattr(value, "shape", None) != leaf.shape or value.dtype != leaf.dtype:
        found = f"{value.dtype}{list(value.shape)}" if hasattr(value, "dtype") else repr(value)
        raise LeafError(
            f"{place.path}: a constraint keeps shape and dtype, expected "
            f"{leaf.dtype}{list(leaf.shape)}, found {found}"
        )
    # Exactly, whatever the constraint does, and beside a NaN too.
    return value if mask is None else jnp.where(mask, value, zero)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _projected_compiled(
    constraint: Any, places: Any, leaves: list[Any], kept: list[Any]
) -> list[Any]:
    arrays = any(isinstance(v, tuple) for n, v in constraint.settings if n != "axis")
    pads = constraint.function in _vectors.PADS and not arrays

    def call(place: Any, leaf: Any, mask: Any) -> _apart.Call:
        def one(leaf: Any, mask: Any) -> Any:
            here = dataclasses.replace(place, shape=leaf.shape)
            return _projected_one(constraint, here, leaf, mask)

        kind = dataclasses.replace(place, path="", shape=() if pads else place.shape), mask is None
        return _apart.Call(kind, one, (leaf, mask), pads=pads)

    calls = [call(*row) for row in zip(places, leaves, kept, strict=True)]
    return _apart.each(calls, in_turn=True)
