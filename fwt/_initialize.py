"""The verbs that give leaves new values: ``initialize`` and ``assign``."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fwt import _axes, _tree, initializers
from fwt._types import (
    AxesError,
    FwtError,
    Initializer,
    LeafError,
    Params,
    Transform,
    Where,
    hashes,
    resolve,
)


def initialize(
    initializer: Initializer,
    key: Any,
    where: Where = _axes.kernels,
    *,
    axes: Mapping[str, str] | None = None,
    dtype: Any = None,
) -> Transform:
    """Gives leaves new values from an initializer.

    Each leaf's key is folded from its path, so that adding a layer changes no other.

    Args:
        initializer: one of ``fwt.initializers``, or any ``(key, shape, dtype) -> array``. Ours
            learn the axes of each leaf; JAX's own assume (..., in, out), so on other leaves they
            are refused.
        key: a JAX key, or an int seed.
        where: which leaves; the kernels unless told otherwise.
        axes: ``{glob: names}`` for leaves whose axes nothing else tells, such as
            ``{"**/weight": "out in h w"}``.
        dtype: the dtype of the new values; None keeps each leaf's own.

    Returns:
        A transform that keeps every shape. It takes ``jax.ShapeDtypeStruct`` leaves too.

    Raises:
        WhereError: if ``where`` matches nothing.
        AxesError: if fans are needed and the axes are unknown.
        LeafError: for a 64-bit leaf without x64, or an initializer that misses the shape.

    Example:
        >>> import fwt, numpy as np
        >>> params = {"dense": {"kernel": np.ones((3, 2), np.float32), "bias": np.ones(2)}}
        >>> new = initialize(fwt.initializers.zeros, key=0)(params)
        >>> float(new["dense"]["kernel"].sum()), float(new["dense"]["bias"].sum())
        (0.0, 2.0)
    """
    chosen = resolve(initializer)
    if not callable(chosen):
        raise TypeError(
            f"initialize takes an initializer such as fwt.initializers.zeros, found {initializer!r}"
        )

    def apply(params: Params) -> Params:
        tree = _tree.Tree(params)
        names = tree.select(where)
        _axes.check_used(axes, names)

        def choose(path: str, shape: tuple[int, ...]) -> tuple[Any, str]:
            return _fitted(chosen, _axes.axes_of(path, shape, tree.module, axes)), path

        return drawn(tree, names, key, dtype, choose)

    return apply


def drawn(
    tree: _tree.Tree,
    names: list[str],
    key: Any,
    dtype: Any,
    choose: Callable[[str, tuple[int, ...]], tuple[Any, str]],
) -> Params:
    """The tree with new values of these leaves.

    Args:
        tree: the tree.
        names: the paths of the leaves.
        key: a JAX key, or an int seed.
        dtype: of the new values, or None.
        choose: gives the initializer of a leaf, and the path that its key is folded from.
    """
    base = _key(key)
    specs, keys = [], []
    for path in names:
        leaf = _target(path, tree.leaves[path], dtype)
        initializer, root = choose(path, tuple(leaf.shape))
        specs.append((initializer, leaf.shape, leaf.dtype, path))
        keys.append(_tree.fold_path(base, root))
    # A user's own function may depend on more than its arguments: it is not compiled by us.
    ours = all(isinstance(s[0], initializers.Bound) and hashes(s[0]) for s in specs)
    new = (_draw_compiled if ours else _draw)(tuple(specs), keys)
    return tree.replace(dict(zip(names, new, strict=True)))


def _key(key: Any) -> Any:
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        if not -(1 << 31) <= key < 1 << 32:
            raise FwtError(f"an int seed has 32 bits, found {key}; make a jax.random.key of it")
        return jax.random.key(key)
    typed = hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    raw = hasattr(key, "dtype") and key.dtype == np.uint32 and key.ndim == 1
    if raw or (typed and key.ndim == 0):
        return key
    raise FwtError(f"key must be one JAX key or an int seed, found {key!r:.80}")


def _target(path: str, leaf: Any, dtype: Any) -> jax.ShapeDtypeStruct:
    wanted = jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype) if dtype is not None else leaf.dtype)
    _tree.refuse_64(path, wanted)
    return wanted


def _fitted(chosen: Any, axes: _axes.Axes) -> Any:
    if isinstance(chosen, initializers.Bound):
        return chosen.at(axes)
    rank = len(axes.shape)
    if rank < 2 or initializers.foreign_axis_free(chosen):
        return chosen
    if axes.inputs != (rank - 2,) or axes.outputs != (rank - 1,):
        raise AxesError(
            f"{axes.path} of shape {axes.shape} has axes {' '.join(axes.names or ())!r}, but an "
            "initializer that is not from fwt assumes (..., in, out): use the one of the same "
            "name from fwt.initializers, which takes the axes"
        )
    return chosen


def _draw(specs: Any, keys: Any) -> list[Any]:
    new = []
    for (init, shape, dtype, path), key in zip(specs, keys, strict=True):
        try:
            value = init(key, shape, dtype)
        except (ArithmeticError, TypeError, ValueError) as error:
            if isinstance(error, FwtError):
                raise
            raise LeafError(f"{path}: no {dtype}{list(shape)} from {init}: {error}") from error
        if not _tree.is_array(value):
            raise LeafError(
                f"{path}: the initializer returned {value!r} instead of an array; a factory must "
                "be called first, such as jax.nn.initializers.he_normal()"
            )
        if value.shape != shape or value.dtype != dtype:
            raise LeafError(
                f"{path}: expected {dtype}{list(shape)} from the initializer, found "
                f"{value.dtype}{list(value.shape)}"
            )
        new.append(value)
    return new


_draw_compiled = functools.partial(jax.jit, static_argnums=0)(_draw)


def assign(values: Mapping[str, Any]) -> Transform:
    """Sets leaves to given arrays, checked against the tree.

    Args:
        values: ``{path: array}`` with exact paths (see :func:`fwt.paths`), each array of its
            leaf's shape and dtype.

    Returns:
        A transform; the other leaves come back as the same objects.

    Raises:
        LeafError: naming path, expected and found.

    Example:
        >>> import numpy as np
        >>> params = {"dense": {"kernel": np.ones((2, 1), np.float32)}}
        >>> new = assign({"dense/kernel": np.zeros((2, 1), np.float32)})(params)
        >>> new["dense"]["kernel"].tolist()
        [[0.0], [0.0]]
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"assign takes a dict {{path: array}}, found {type(values).__name__}")

    def apply(params: Params) -> Params:
        tree = _tree.Tree(params)
        new = {}
        for path, value in values.items():
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
            as_numpy = isinstance(leaf, np.ndarray) and not isinstance(value, jax.Array)
            new[path] = np.array(value) if as_numpy else jnp.asarray(_tree.computable(path, value))
        return tree.replace(new)

    return apply
