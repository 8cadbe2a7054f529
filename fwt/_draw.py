"""New values for the leaves of a tree: what ``initialize``, ``reset`` and ``lsuv`` share."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fwt import _apart, _axes, _keys, _mesh, _nodes, _tree, initializers
from fwt._types import AxesError, FwtError, LeafError, Params, hashes


def drawn(
    tree: _tree.Tree,
    names: list[str],
    key: Any,
    purpose: _keys.Purpose,
    dtype: Any,
    choose: Callable[[str, tuple[int, ...]], tuple[Any, str]],
) -> Params:
    """The tree with new values of these leaves.

    Args:
        tree: the tree.
        names: the paths of the leaves.
        key: a JAX key, or an int seed.
        purpose: what the verb is, so that another one draws other numbers from the same key.
        dtype: of the new values, or None.
        choose: gives the initializer of a leaf, and the path that its key is folded from.
    """
    specs, roots = [], []
    for path in names:
        leaf = _target(path, tree.leaves[path], dtype)
        initializer, root = choose(path, tuple(leaf.shape))
        specs.append((initializer, leaf.shape, leaf.dtype, path))
        roots.append(root)
    key = _keys.one_key(key)
    known = _mesh.varies(key)
    for path in names:
        if axes := sorted(_mesh.varies(tree.leaves[path]) - known):
            raise LeafError(
                f"{path} is a shard along {axes[0]!r} of jax.shard_map, and each shard would get "
                "the same numbers: draw outside of it, or, for shards that are layers of their "
                f"own, fold jax.lax.axis_index({axes[0]!r}) into the key"
            )
    # A user's own function may depend on more than its arguments: it is not compiled by us.
    ours = all(isinstance(s[0], initializers.Bound) and hashes(s[0]) for s in specs)
    leaves = [tree.leaves[p] for p in names]
    # Under a trace, whatever is made is traced.
    traced = any(isinstance(x, jax.core.Tracer) for x in (key, jnp.zeros(())))
    plain = traced or jax.config.read("jax_disable_most_optimizations")
    draw = _compiled(_mesh.spread(leaves), not plain) if ours else _draw
    new = draw(tuple(specs), purpose, tuple(roots), key)
    new = [_mesh.like(x, leaf) for x, leaf in zip(new, leaves, strict=True)]
    return tree.replace(dict(zip(names, new, strict=True)))


def _target(path: str, leaf: Any, dtype: Any) -> jax.ShapeDtypeStruct:
    wanted = jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype) if dtype is not None else leaf.dtype)
    _tree.refuse_64(path, wanted)
    _tree.refuse_scales(path, wanted.dtype)
    return wanted


@dataclasses.dataclass(frozen=True)
class InTurn:
    """An initializer that is not ours, for a stack of layers: it draws one slice after the other,
    each from a key folded from its number."""

    chosen: Any
    axes: _axes.Axes

    def __call__(self, key: Any, shape: Any, dtype: Any) -> Any:
        def draw(number: int, part: Any) -> Any:
            return self.chosen(jax.random.fold_in(key, number), part.shape, dtype)

        return self.axes.in_turn(draw, jnp.zeros(shape, bool))


def fitted(chosen: Any, axes: _axes.Axes) -> Any:
    if isinstance(chosen, initializers.Bound):
        return chosen.at(axes)
    if axes.stack and not initializers.foreign_axis_free(chosen):
        return InTurn(fitted(chosen, axes.one), axes)
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


def _draw(specs: Any, purpose: _keys.Purpose, roots: Any, key: Any) -> list[Any]:
    keys = _keys.leaf_keys(key, purpose, roots)
    return [_draw_one(spec, keys[i]) for i, spec in enumerate(specs)]


def _draw_one(spec: Any, key: Any) -> Any:
    init, shape, dtype, path = spec
    # JAX's own, drawn in half precision, have few distinct values and many exact zeros.
    drawer = init.chosen if isinstance(init, InTurn) else init
    jaxs = initializers.is_jaxs(drawer) and _tree.is_narrow(dtype)
    asked = jnp.dtype(jnp.float32) if jaxs else dtype
    try:
        value = _nodes.unboxed(init(key, shape, asked))
    except (ArithmeticError, NotImplementedError, TypeError, ValueError) as error:
        if isinstance(error, FwtError):
            raise
        raise LeafError(f"{path}: no {dtype}{list(shape)} from {init}: {error}") from error
    if not _tree.is_array(value):
        raise LeafError(
            f"{path}: the initializer returned {value!r} instead of an array; a factory must "
            "be called first, such as jax.nn.initializers.he_normal()"
        )
    if value.shape != shape or value.dtype != asked:
        raise LeafError(
            f"{path}: expected {asked}{list(shape)} from the initializer, found "
            f"{value.dtype}{list(value.shape)}"
        )
    return _tree.rounded(value, dtype) if jaxs else value


def _draw_together(specs: Any, purpose: _keys.Purpose, roots: Any, key: Any) -> list[Any]:
    """The same under a trace: small leaves of one kind and shape take turns."""
    calls, columns = [], _apart.Columns(_keys.leaf_keys(key, purpose, roots))
    for i, spec in enumerate(specs):
        init, shape, dtype, _ = spec
        axes = init.axes and dataclasses.replace(init.axes, path="")
        small = _apart.joins(math.prod(shape), len(specs))
        kind = (init.at(axes), shape, dtype) if small else None
        one = functools.partial(_draw_one, spec)
        calls.append(_apart.Call(kind, one, (), _apart.Row(columns, i)))
    return _apart.each(calls, in_turn=True)


@functools.lru_cache
def _compiled(spread: tuple[Any, ...], at_once: bool) -> Any:
    shardings = list(spread) if any(spread) else None
    # The same numbers, and as fast, from a program that is compiled in a third of the time.
    quick = at_once and jax.default_backend() == "cpu"
    options = {"xla_backend_optimization_level": 1} if quick else None
    draw = jax.jit(
        _draw_together, static_argnums=(0, 1, 2), out_shardings=shardings, compiler_options=options
    )
    return _mesh.on_auto_axes(draw)
