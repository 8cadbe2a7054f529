"""Leaves on a mesh of devices: what is computed with them doesn't depend on how they are spread.

The axes of a mesh are Auto, Explicit or Manual. Along Explicit ones, those of ``jax.make_mesh``,
JAX refuses to sort, to reshape and to decompose: so all is computed as if they were Auto, and the
result is spread as its leaf is. Manual ones are those inside ``jax.shard_map``.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from fwt._types import FwtError


def _mesh_of(x: Any) -> Any:
    """The mesh that the type of an array names, or None."""
    if not isinstance(x, jax.Array):
        return None
    mesh = jax.typeof(x).sharding.mesh
    return None if mesh.empty else mesh


def _is_explicit(mesh: Any) -> bool:
    return AxisType.Explicit in mesh.axis_types


def on_explicit(arrays: Sequence[Any]) -> bool:
    """Whether JAX refuses to reshape one of these."""
    return any(_is_explicit(mesh) for x in arrays if (mesh := _mesh_of(x)) is not None)


@functools.lru_cache
def _auto(mesh: Any) -> Any:
    """The same mesh with Auto axes for Explicit ones."""
    kinds = tuple(AxisType.Auto if k == AxisType.Explicit else k for k in mesh.axis_types)
    if isinstance(mesh, Mesh):
        return Mesh(mesh.devices, mesh.axis_names, axis_types=kinds)
    return mesh.update_axis_types(dict(zip(mesh.axis_names, kinds, strict=True)))


def _seen(x: Any) -> Any:
    """An array as on Auto axes, where it is: nothing is moved."""
    mesh = _mesh_of(x)
    if mesh is None or not _is_explicit(mesh):
        return x
    if isinstance(x, jax.core.Tracer):
        return jax.sharding.reshard(x, PartitionSpec())
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):  # whose sharding has an axis too many
        data = _seen(jax.random.key_data(x))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    return jax.device_put(x, _auto_sharding(x.sharding))


def _auto_sharding(found: Any) -> Any:
    if not isinstance(found, NamedSharding) or not _is_explicit(found.mesh):
        return found
    return NamedSharding(_auto(found.mesh), found.spec, memory_kind=found.memory_kind)


def on_auto_axes(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, of trees of arrays, such that it and what it calls meets no Explicit axis.

    What it gives is on Auto axes too, and is brought back by :func:`like`. Dicts among the trees
    lose their order.
    """

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        meshes = {_mesh_of(x) for x in jax.tree.leaves((args, kwargs))} - {None}
        if _is_explicit(around := jax.sharding.get_abstract_mesh()):
            meshes.add(around)
        if not any(map(_is_explicit, meshes)):
            return function(*args, **kwargs)
        mesh, *others = {_auto(m) for m in meshes}
        if others:
            said = " and ".join(sorted(_said(m) for m in (mesh, *others)))
            raise FwtError(
                f"these arrays are spread over several meshes, {said}, and can't be computed with "
                "together: put them on one with jax.device_put, or leave some out with where="
            )
        with jax.sharding.use_abstract_mesh(mesh):
            args, kwargs = jax.tree.map(_seen, (args, kwargs))
            return function(*args, **kwargs)

    return wrapped


def _said(mesh: Any) -> str:
    return f"({', '.join(f'{n}: {s}' for n, s in mesh.shape.items())})"


def like(value: Any, leaf: Any) -> Any:
    """A new value of a leaf, or a mask of it, spread over devices as the leaf is."""
    if not isinstance(value, jax.Array):
        return value
    own, around = _mesh_of(leaf), jax.sharding.get_abstract_mesh()
    traced = isinstance(leaf, jax.core.Tracer)
    if not traced and not isinstance(value, jax.core.Tracer) and (there := sharding_of(leaf)):
        return value if value.sharding == there else jax.device_put(value, there)
    if own is not None and _is_explicit(own):
        value = jax.sharding.reshard(value, jax.typeof(leaf).sharding)
    elif _is_explicit(around) and _mesh_of(value) not in (None, around):
        value = jax.sharding.reshard(value, PartitionSpec())
    if traced and jax.device_count() > 1:
        # XLA alone knows how a leaf on Auto axes is spread, and what takes nothing from any leaf
        # would be computed on one device.
        return jnp.where(True, value, leaf.astype(value.dtype))
    return value


def sharding_of(leaf: Any) -> Any:
    """Where somebody put a leaf, or said that it should be; None where nobody did, or a trace
    hides it."""
    if isinstance(leaf, jax.core.Tracer) or not getattr(leaf, "committed", True):
        return None
    found = getattr(leaf, "sharding", None)
    return None if isinstance(getattr(found, "mesh", None), AbstractMesh) else found


def spread(leaves: Sequence[Any]) -> tuple[Any, ...]:
    """For each of new leaves, which depend on no array of their size, how it is spread over
    devices, so that none of them holds it all; None where nothing says so, and for those on other
    devices than the first."""
    found = [_auto_sharding(sharding_of(leaf)) for leaf in leaves]
    wide = [s.device_set for s in found if s is not None and len(s.device_set) > 1]
    return tuple(s if s is not None and s.device_set in wide[:1] else None for s in found)


def gathered(x: Any, axes: Sequence[int]) -> Any:
    """An array of which each device has all along these axes, so that they can be cut."""
    mesh = _mesh_of(x)
    if mesh is None or not _is_explicit(mesh):
        return x
    found: Any = jax.typeof(x).sharding
    kept = [None if i in axes else s for i, s in enumerate(found.spec)]
    return jax.sharding.reshard(x, NamedSharding(found.mesh, PartitionSpec(*kept)))


def varies(*trees: Any) -> frozenset[str]:
    """The axes of ``jax.shard_map`` along which one of these arrays, or of their types, differs
    from shard to shard."""
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return frozenset()
    found: set[str] = set()
    for x in jax.tree.leaves(trees):
        aval: Any = jax.typeof(x) if isinstance(x, jax.Array) else x
        kind = getattr(aval, "mat", None)  # before JAX 0.9 it is the set itself
        found |= getattr(aval, "vma", frozenset()) if kind is None else kind.varying
    return frozenset(found)


def key_of_shard(key: Any, leaf: Any) -> Any:
    """The key for a leaf: one of its own in each shard of ``jax.shard_map``, where the leaf differs
    from shard to shard and the key does not yet."""
    for axis in sorted(varies(leaf) - varies(key)):
        key = jax.random.fold_in(key, jax.lax.axis_index(axis))
    return key


def alike(start: Any, *trees: Any) -> Any:
    """The same arrays, typed as differing between shards wherever these others do too, as a loop
    or a branch of a cond asks that reads both."""
    axes = varies(start, trees)

    def one(x: Any) -> Any:
        for axis in sorted(axes - varies(x)):
            x = jnp.where(jax.lax.axis_index(axis) >= 0, x, x)
        return x

    return jax.tree.map(one, start) if axes else start


def carried(body: Callable[[Any], Any], start: Any) -> tuple[Callable[[Any], Any], Any]:
    """The body and the start of a loop, typed so that the one gives what the other is."""
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return body, start

    def typed(carry: Any) -> Any:
        return jax.tree.map(alike, body(carry), carry)

    while True:
        structure: Any
        leaves, structure = jax.tree.flatten(start)
        made = jax.make_jaxpr(typed)(start).out_avals
        if all(varies(new) == varies(x) for x, new in zip(leaves, made, strict=True)):
            return typed, start
        start = jax.tree.unflatten(structure, list(map(alike, leaves, made)))
