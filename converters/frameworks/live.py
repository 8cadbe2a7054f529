"""The weights of a live model of any framework as a tree, and the way back, in place."""

import contextlib
import functools
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from fwt import _live, _nodes, _tree, constraints, initializers
from fwt._own_nodes import FromFile
from fwt._types import (
    ConversionError,
    LeafError,
    Model,
    Transform,
    WhereError,
)
from fwt.converters.frameworks import beside, gradients

# In the place of ``fwt.paths(params)``.
_PATHS = "fwt.paths(model)"
_TAKES = {
    "assign": "a Keras model, a torch module, an nnx module or a fwt.Model",
    "weights": "a Keras model, a torch module, an nnx module, a fwt.Model or the path of a file",
    "hold": "a torch module",
    "Callback": "a Keras model",
}
_OF_TREES = {
    "transform": "; for a tree of arrays, call the transform on it",
    "assign": "; for a tree of arrays, call fwt.assign(values) on it",
    "weights": "; of a tree of arrays, these are its leaves",
}


class Live:
    """The weights of a live model as a tree, and the way back into the model.

    Args:
        model: a built Keras model or a torch module.
        statistics: whether the running statistics of norms are in the tree.
        verb: what is called, for errors.

    Attributes:
        tree: ``{"params": ..., "batch_stats": ...}`` of arrays that can't be written to.
    """

    def __init__(self, model: Any, statistics: bool, verb: str = "transform") -> None:
        backend = _backend(model, verb)
        held = backend.leaves(model)
        self._backend, self._statistics = backend, statistics
        self.leaves = leaves = [x for x in held if statistics or x.collection == "params"]
        if not leaves:
            unbuilt = getattr(model, "built", True) is False
            raise ConversionError(
                f"{type(model).__name__} has no floating weights"
                + ("; build it first, model.build((None, ...))" if unbuilt else "")
            )
        paths = [leaf.path for leaf in leaves]
        if len(set(paths)) < len(paths):
            twice = next(p for p in paths if paths.count(p) > 1)
            raise ConversionError(f"{twice}: two weights have this name; rename one of them")
        # Copies that can't be written to: what a transform keeps or swaps must not change later.
        self._before = before = {leaf.path: np.array(leaf.value) for leaf in leaves}
        for value in before.values():
            value.flags.writeable = False
        # Under "params", so that a layer that is itself named params is no collection.
        self._where = where = {leaf.path: leaf.collection for leaf in leaves}
        self.tree: dict[str, Any] = {
            name: gradients.nested({p: x for p, x in before.items() if where[p] == name})
            for name in ("params", "batch_stats")
            if name == "params" or name in where.values()
        }
        if also := {leaf.path: leaf.also for leaf in leaves if leaf.also}:
            self.tree["params"] = FromFile(self.tree["params"], json.dumps({"also": also}))
        self._told = (
            {leaf.path: leaf.known for leaf in leaves},
            functools.partial(gradients.in_tree, backend, model, leaves),
            {path: names for leaf in leaves for path, names in leaf.own.items()},
            {p: names for x in held if x not in leaves for p, names in x.own.items()},
        )

    def knowing(self) -> contextlib.AbstractContextManager[None]:
        """Inside, what the model tells of its weights is known of those of the tree."""
        return _live.knowing(*self._told)

    def run(self, t: Transform) -> None:
        """Runs a transform on the tree and writes what it changed."""
        self._write(self.changed(self.found(t)))

    def found(self, t: Transform) -> Mapping[str, Any]:
        """What a transform makes of the tree, by path."""
        with self.knowing():
            try:
                found = t(self.tree)
                _check_given_back(found, self.tree)
                return _tree.Tree(found, self._statistics).leaves
            except WhereError as error:
                raise WhereError(str(error).replace("fwt.paths(params)", _PATHS)) from None

    def filled(self, value: Callable[[Any], Any]) -> dict[str, Any]:
        """The tree with other values, of the shape and dtype of each."""
        return _tree.Tree(self.tree).replace({p: value(x) for p, x in self._before.items()})

    def gradients(self) -> dict[str, Any]:
        """The gradients of the weights, zeros where the loss does not depend on one."""
        flat = {}
        for leaf in self.leaves:
            if leaf.read is None:
                raise LeafError(
                    f"{leaf.path} is computed from other parameters, so that it has no gradient of "
                    "its own: leave it out with where="
                )
            # Of a variable of Keras, which on torch is around a parameter.
            given = getattr(getattr(leaf.source, "value", leaf.source), "grad", None)
            flat[leaf.path] = (
                np.zeros_like(self._before[leaf.path])
                if given is None
                else leaf.read(self._backend.array_of(given))
            )
        return _tree.Tree(self.tree).replace(flat)

    def changed(self, after: Mapping[str, Any]) -> dict[str, Any]:
        """By path the arrays that are new, checked."""
        before = self._before
        if set(after) != set(before):
            path = sorted(set(after) ^ set(before))[0]
            raise LeafError(
                f"the transform must keep the tree as it is, but {path!r} is not in both"
            )
        changed = {}
        for path, old in before.items():
            new = after[path]
            if new is old:
                continue
            value = np.asarray(new)
            counts = self._where[path] == "batch_stats"
            if counts and old.dtype.kind == value.dtype.kind == "i":  # which jit cuts to 32 bits
                value = value.astype(old.dtype)
            masked = "; fwt.apply_masks(masks)(tree) applies masks"
            if value.shape != old.shape or value.dtype != old.dtype:
                way = masked if value.dtype == bool else ""
                if value.shape == old.shape and not way:
                    way = "; a live model keeps its dtypes: leave dtype= out"
                raise LeafError(
                    f"{path}: expected {old.dtype}{list(old.shape)} from the transform, found "
                    f"{value.dtype}{list(value.shape)}{way}"
                )
            # Bits, so that NaN equals itself and -0.0 is not +0.0.
            if not np.array_equal(_bits(value), _bits(old)):
                changed[path] = value
        return changed

    def beside(self, model: Any) -> beside.Held:
        """What the model holds beside its weights, by the framework's names."""
        of = beside.of_torch if _nodes.foreign(model)[0] == "torch" else beside.of_keras
        return of(model, self.leaves)

    def _write(self, changed: Mapping[str, Any]) -> None:
        """Writes all of them, or none."""
        written = []
        try:
            for leaf in self.leaves:
                if leaf.path in changed:
                    written.append(leaf)
                    leaf.write(changed[leaf.path])
        except Exception as error:  # torch, Keras and nnx raise any class: it becomes ours
            for leaf in written:  # what failed may have been written all the same
                with contextlib.suppress(Exception):  # of any class again, while the others go back
                    leaf.write(self._before[leaf.path])
            raise ConversionError(
                f"{written[-1].path} can't be written ({error}); the model is as it was"
            ) from error


def _bits(x: np.ndarray) -> np.ndarray:
    """The bytes of an array in C's order, which JAX puts a turned one into sooner than NumPy."""
    if x.dtype.itemsize in (2, 4) and not x.flags.c_contiguous:
        x = np.asarray(jax.device_put(x.view(f"u{x.dtype.itemsize}")))
    return np.ascontiguousarray(x).reshape(-1).view(np.uint8)


def _check_given_back(found: Any, tree: dict[str, Any]) -> None:
    """Raises for what a transform may not give in the place of the tree that it was given."""
    if found is None or (callable(found) and not isinstance(found, Mapping | Model)):
        what = "nothing" if found is None else f"a function, {getattr(found, '__name__', found)}"
        way = "return the tree" if found is None else "call it on the tree, fwt.prune(0.5)(tree)"
        raise LeafError(f"the transform must give the new tree back, and gave {what}: {way}")
    beside = [k for k in found if k not in tree] if isinstance(found, Mapping) else []
    if beside and "params" in found:
        raise LeafError(
            f"the transform was given {{'params': ...}} and gave {beside[0]!r} beside it, which is "
            "no part of the model: change what is inside of tree['params'], such as "
            "tree['params']['dense']['kernel'], or fwt.assign({'dense/kernel': array})"
        )


def check(t: Any, verb: str = "transform") -> None:
    """Raises for what is no transform: it takes a tree of arrays and gives one."""
    nouns = (("project({}(...))", constraints), ("initialize({}, key=0)", initializers))
    for call, home in nouns:
        if isinstance(t, home.Bound) or getattr(t, "__module__", "").startswith(home.__name__):
            noun = f"{home.__name__}.{getattr(t, 'name', getattr(t, '__name__', '...'))}"
            raise ConversionError(
                f"{verb} takes a transform, found {noun}: fwt.{call.format(noun)} is one"
            )
    owner = str(getattr(t, "__module__", None) or type(t).__module__).partition(".")[0]
    if callable(t) and owner not in ("torch", "keras"):
        return
    name = getattr(t, "__name__", type(t).__name__)
    own = getattr(initializers, owner, None) if callable(t) else None
    way = "such as fwt.initialize(fwt.initializers.he_normal, key=0) or fwt.prune(0.5)"
    if isinstance(t, Mapping):
        way = "fwt.apply_masks(masks) is one, of masks, and fwt.assign(arrays), of arrays"
    if (same := name.rstrip("_")) in getattr(own, "__all__", ()):
        way = f"here fwt.initialize(fwt.initializers.{owner}.{same}, key=0)"
    raise ConversionError(
        f"{verb} takes a transform of a tree of arrays, found {name} of {owner}: {way}"
    )


def _check_outside(backend: str, model: Any, verb: str) -> None:
    """Raises in a step of training that is compiled, where the weights have no values yet."""
    inside, also = False, ""
    if backend == "tensorflow":
        inside, also = sys.modules["tensorflow"].inside_function(), ", or compile(run_eagerly=True)"
    elif backend == "jax":
        try:
            inside = any(isinstance(v.value, jax.core.Tracer) for v in model.variables[:1])
        except TypeError:  # Keras calls an initializer that is there no more
            inside = True
    if inside:
        raise ConversionError(
            f"{verb} is called in a step that {backend} compiles, where the weights of "
            f"{model.name} have no values: call it in a callback, after each batch{also}"
        )


def _backend(model: Any, verb: str = "transform") -> Any:
    """The module for a live model, which touches a framework only if it is imported already."""
    torch, keras = sys.modules.get("torch"), sys.modules.get("keras")
    if keras is not None and isinstance(model, keras.layers.Layer):
        from fwt.converters.frameworks import keras as _keras

        _keras.sync(model)
        _check_outside(keras.backend.backend(), model, verb)
        return _keras
    if torch is not None and isinstance(model, torch.nn.Module):
        from fwt.converters.frameworks import torch as _torch

        return _torch
    raise ConversionError(
        f"{verb} takes {_TAKES.get(verb, 'a Keras model, a torch module or a fwt.Model')}, found "
        f"{type(model).__name__}{_OF_TREES.get(verb, '')}"
    )
