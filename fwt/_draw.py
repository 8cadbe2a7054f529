"""New values for the leaves of a tree: what ``initialize``, ``reset`` and ``lsuv`` share."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fwt import _apart, _axes, _keys, _mesh, _nodes, _stored, _tree, initializers
from fwt._types import AxesError, FwtError, LeafError, Params, hashes
from fwt.initializers import _bound


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
    if tree.stored:  # each when it is gone through

        def alone(i: int) -> Any:
            draw = _drawer(ours, [jnp.zeros(())], key)
            return draw(tuple(specs[i : i + 1]), purpose, tuple(roots[i : i + 1]), key)[0]

        rows = enumerate(zip(names, specs, strict=True))
        return tree.replace(
            {p: _stored.computed(s[1], s[2], functools.partial(alone, i)) for i, (p, s) in rows}
        )
    new = _drawer(ours, leaves, key)(tuple(specs), purpose, tuple(roots), key)
    new = [_mesh.like(x, leaf) for x, leaf in zip(new, leaves, strict=True)]
    return tree.replace(dict(zip(names, new, strict=True)))


def _drawer(ours: bool, leaves: list[Any], key: Any) -> Callable[..., list[Any]]:
    # Under a trace, whatever is made is traced.
    traced = any(isinstance(x, jax.core.Tracer) for x in (key, jax.device_put(0)))
    plain = traced or jax.config.read("jax_disable_most_optimizations")
    spread = _mesh.spread(leaves)
    if not ours:
        return _draw
    alone = not any(spread) and jax.default_backend() == "cpu"
    return _draw_at_once if alone and not plain else _compiled(spread, not plain)


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
    axes = axes.drawn_by("flax")
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


class _Flat(NamedTuple):
    """How the numbers of a leaf are drawn from their flat indices, beside those of other leaves.

    Attributes:
        kind: what leaves have in common that may be drawn together.
        numbers: the leaf's own, see ``Each``.
        size: how many are drawn.
    """

    kind: Any
    numbers: tuple[Any, ...]
    size: int


def _flat(spec: Any, key: Any) -> _Flat | None:
    init, shape, dtype, path = spec
    if not (math.prod(shape) and jnp.issubdtype(dtype, jnp.floating) and _keys.by_index(key)):
        return None
    drawn = jnp.dtype(jnp.float32) if _tree.is_narrow(dtype) else jnp.dtype(dtype)
    each = init.by_itself(init.axes or _bound.plain_axes(path, shape), drawn)
    if each is None:
        return None
    kind = each.draw, each.fixed, drawn, jnp.dtype(dtype), len(each.numbers)
    return _Flat(kind, each.numbers, math.prod(shape))


def _draw_flat(kind: Any, shape: tuple[int, ...], row: Any) -> Any:
    (draw, fixed, drawn, dtype, count), (key, numbers) = kind, row
    each = _bound.Each(draw, tuple(numbers[i] for i in range(count)), fixed)
    value = each(key, shape, drawn)
    return value if drawn == dtype else _tree.rounded(value, dtype)


def _width(one: _Flat) -> int:
    """How many are drawn for a leaf; XLA rounds one alone otherwise."""
    return max(_apart.about(one.size), 2)


def _table(flat: Sequence[_Flat | None]) -> Any:
    """The numbers of some leaves, a row each."""
    rows = [one.numbers if one else () for one in flat]
    most = max(map(len, rows))
    wide = jnp.result_type(float)
    return np.asarray([(*row, *[0.0] * (most - len(row))) for row in rows], wide)


def _draw_together(specs: Any, purpose: _keys.Purpose, roots: Any, key: Any) -> list[Any]:
    """The same under a trace: small leaves of one kind and about one size take turns."""
    if not specs:
        return []
    flat = [_flat(spec, key) for spec in specs]
    keys = _keys.leaf_keys(key, purpose, roots)
    columns = _apart.Columns((keys, jnp.asarray(_table(flat))))
    calls = []
    for i, (spec, one) in enumerate(zip(specs, flat, strict=True)):
        init, shape, dtype, _ = spec
        kind: Any = None
        draw = functools.partial(_draw_of_row, spec)
        if _apart.joins(math.prod(shape), len(specs)):
            axes = init.axes and dataclasses.replace(init.axes, path="")
            kind = init.at(axes), shape, dtype
            if one:
                kind = one.kind, (_width(one),)
                draw = functools.partial(_draw_flat, *kind)
        calls.append(_apart.Call(kind, draw, (), _apart.Row(columns, i)))
    found = zip(_apart.each(calls, in_turn=True), specs, strict=True)
    return [x if x.shape == s[1] else x[: math.prod(s[1])].reshape(s[1]) for x, s in found]


def _draw_of_row(spec: Any, row: Any) -> Any:
    return _draw_one(spec, row[0])


# So many numbers are drawn sooner than another program is compiled.
_CHEAP = 1 << 20


def _draw_at_once(specs: Any, purpose: _keys.Purpose, roots: Any, key: Any) -> list[Any]:
    """The same without a trace, by few programs: rows of one width serve leaves of other sizes."""
    out: dict[int, Any] = {}
    kinds: dict[Any, list[tuple[int, _Flat]]] = {}
    for i, spec in enumerate(specs):
        one = _flat(spec, key)
        if one and one.size <= _CHEAP:
            kinds.setdefault(one.kind, []).append((i, one))
    for kind, members in kinds.items():
        members.sort(key=lambda member: -member[1].size)
        while members:
            width = _width(members[0][1])
            mine, members = members[: _CHEAP // width], members[_CHEAP // width :]
            keys = _keys.leaf_keys(key, purpose, [roots[i] for i, _ in mine])
            rows = np.asarray(_drawn_rows(kind, width, keys, _table([one for _, one in mine])))
            for row, (i, one) in zip(rows, mine, strict=True):
                out[i] = jax.device_put(row[: one.size].reshape(specs[i][1]).copy())
    rest = [i for i in range(len(specs)) if i not in out]
    if rest:
        draw = _compiled((None,) * len(rest), True)
        found = draw(tuple(specs[i] for i in rest), purpose, tuple(roots[i] for i in rest), key)
        out.update(zip(rest, found, strict=True))
    return [out[i] for i in range(len(specs))]


_QUICK = {"xla_backend_optimization_level": 1}


@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=_QUICK)
def _drawn_rows(kind: Any, width: int, keys: Any, numbers: Any) -> Any:
    return jax.lax.map(functools.partial(_draw_flat, kind, (width,)), (keys, numbers))


@functools.lru_cache
def _compiled(spread: tuple[Any, ...], at_once: bool) -> Any:
    shardings = list(spread) if any(spread) else None
    # The same numbers, and as fast, from a program that is compiled in a third of the time.
    quick = at_once and jax.default_backend() == "cpu"
    options = _QUICK if quick else None
    draw = jax.jit(
        _draw_together, static_argnums=(0, 1, 2), out_shardings=shardings, compiler_options=options
    )
    return _mesh.on_auto_axes(draw)
