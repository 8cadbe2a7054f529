"""The verbs that give leaves new values: ``initialize`` and ``assign``."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fwt import _axes, _draw, _mesh, _nodes, _own_names, _tree, initializers
from fwt._types import Initializer, LeafError, Model, Params, Transform, Where, resolve, streams


def initialize(
    initializer: Initializer,
    key: Any,
    where: Where = _axes.kernels,
    *,
    axes: Mapping[str, str] | None = None,
    dtype: Any = None,
) -> Transform:
    """Gives leaves new values from an initializer.

    Each leaf's key is folded from its path, so that adding a layer changes no other, and from what
    the verb is, so that one seed serves all verbs. Values are drawn in float32 at least and rounded
    to the leaf's dtype: in half precision an end that is excluded, such as the 1 of
    ``uniform(1.0)``, may be reached by rounding.

    A tied array (one array under several paths) gets one new value. A JAX array whose entries are
    all equal, such as the ``zeros`` of a template, is a filling and ties nothing: each of its paths
    gets a value of its own. NumPy memory that is shared, a variable that an nnx module shares, and
    what a file calls one array stay tied whatever they hold. ``jit`` gives each leaf an array of
    its own, so in it only what a file or ``nnx.jit`` calls one stays tied.

    New values are spread over devices as their leaf is, and are the same however that is. Inside
    ``jax.shard_map`` a shard would be drawn with the fans of its own shape, and with the numbers
    of every other: a leaf that is a shard is refused, unless the key differs between shards too.

    Args:
        initializer: one of ``fwt.initializers``, or any ``(key, shape, dtype) -> array``. Ours
            learn the axes of each leaf; JAX's own assume (..., in, out), so on other leaves they
            are refused.
        key: a JAX key, or an int seed.
        where: which leaves; the kernels unless told otherwise.
        axes: ``{glob: names}`` for leaves whose axes nothing else tells, such as
            ``{"**/weight": "out in h w"}``. A leaf takes the first glob that matches it with as
            many names as it has axes. ``stack`` is an axis each slice of which is a layer of its
            own, and is drawn by itself: ``{"layers/**": "stack in out"}``.
        dtype: the dtype of the new values; None keeps each leaf's own.

    Returns:
        A transform that keeps every shape. It takes ``jax.ShapeDtypeStruct`` leaves too.

    Raises:
        WhereError: if ``where`` matches nothing.
        AxesError: if fans are needed and the axes are unknown.
        LeafError: for a 64-bit leaf without x64, an initializer that misses the shape, or a shard
            inside ``jax.shard_map``.

    Example:
        >>> import fwt, numpy as np
        >>> params = {"dense": {"kernel": np.ones((3, 2), np.float32), "bias": np.ones(2)}}
        >>> new = initialize(fwt.initializers.zeros, key=0)(params)
        >>> float(new["dense"]["kernel"].sum()), float(new["dense"]["bias"].sum())
        (0.0, 2.0)
    """
    chosen = resolve(initializer)
    if not callable(chosen) or _own_names.library(chosen):
        raise TypeError(
            "initialize takes an initializer such as fwt.initializers.zeros, found "
            f"{initializer!r}{_own_names.hint(initializer, 'initializer')}"
        )

    def apply(params: Params) -> Params:
        tree = _tree.Tree(params)
        names = tree.select(where)
        places = _axes.Places(tree, axes)
        places.check_used(names)

        def choose(path: str, shape: tuple[int, ...]) -> tuple[Any, str]:
            return _draw.fitted(chosen, places(path)), path

        return _draw.drawn(tree, names, key, "initialize", dtype, choose)

    ours = isinstance(chosen, initializers.Bound)
    return streams(apply) if ours else apply  # a user's own may give other values each time


def assign(values: Mapping[str, Any]) -> Transform:
    """Sets leaves to given arrays, checked against the tree.

    Args:
        values: ``{path: array}`` with exact paths (see :func:`fwt.paths`), each array of its
            leaf's shape and dtype; or params, whole or a part of them.

    Returns:
        A transform. A JAX array stays on the devices where it is; any other goes where its leaf
        is. Where a leaf is tied (one array under several paths), a value for one of its
        paths is set at all of them. All other leaves come back as the same objects.

    Raises:
        LeafError: if the tree has no such leaf, if an array has not the shape and dtype of its
            leaf, or if two paths of a tied array are given different values.

    Example:
        >>> import numpy as np
        >>> params = {"dense": {"kernel": np.ones((2, 1), np.float32)}}
        >>> new = assign({"dense/kernel": np.zeros((2, 1), np.float32)})(params)
        >>> new["dense"]["kernel"].tolist()
        [[0.0], [0.0]]
    """
    if not isinstance(values, Mapping | Model):
        raise TypeError(f"assign takes a dict {{path: array}}, found {type(values).__name__}")
    given = _by_path(values)

    def apply(params: Params) -> Params:
        tree = _tree.Tree(params)
        new = {}
        for path, value in given.items():
            path = tree.spelled(path) if isinstance(path, str) else path
            if path in new:
                raise LeafError(f"assign: {path!r} is given twice, in two spellings")
            if not isinstance(path, str) or path not in tree.leaves:
                left_out = " (at(...) left it out)" if path in tree.hidden else ""
                raise LeafError(
                    f"assign: the tree has no leaf {path!r}{left_out}"
                    f"{_tree.near(str(path), tree.leaves)}"
                )
            leaf = tree.leaves[path]
            if not _tree.is_array(value):
                try:
                    value = np.asarray(value)
                except ValueError as error:
                    raise LeafError(f"assign: {path}: no array ({error})") from error
            if tuple(value.shape) != tuple(leaf.shape):
                raise LeafError(
                    f"assign: {path} expected shape {tuple(leaf.shape)}, found {tuple(value.shape)}"
                )
            if value.dtype != leaf.dtype:
                raise LeafError(
                    f"assign: {path} expected dtype {leaf.dtype}, found {value.dtype}; "
                    f"give array.astype({str(leaf.dtype)!r})"
                )
            ours = not isinstance(value, jax.Array)
            if ours:
                value = np.array(value)  # which its owner may change afterwards
            if ours and isinstance(leaf, np.ndarray):
                new[path] = value
                continue
            found = jnp.asarray(_tree.computable(path, value))
            new[path] = _mesh.like(found, leaf) if ours else found
        for group in tree.perhaps:
            first, *others = [p for p in group if p in new] or [""]
            if any(_nodes.same_values(new[first], new[p]) is not True for p in others):
                raise LeafError(
                    f"assign: {' and '.join(group)} are one array in the file that they come "
                    "from: give one of them, or both the same"
                )
        return tree.replace(tree.once(new))

    return apply


def _by_path(values: Any) -> Mapping[str, Any]:
    if not isinstance(values, Model) and not any(isinstance(v, Mapping) for v in values.values()):
        return values
    variables = values.variables if isinstance(values, Model) else values
    beside = [k for k, v in variables.items() if k != "params" and jax.tree.leaves(v)]
    if _tree.is_variables(variables) and beside:
        raise LeafError(
            f"assign sets weights, and {beside[0]!r} is beside them: give variables['params']; "
            "new statistics go into the variables, {**variables, 'batch_stats': new}"
        )
    return _tree.Tree(values).leaves
