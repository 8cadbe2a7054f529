"""Gradients of a live model in the names and axes of the tree that a transform sees."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from fwt import _nodes, _tree
from fwt._types import ConversionError, FwtError, LeafError
from fwt.converters.rows.row import LiveLeaf

_NOTHING = object()


def in_tree(
    backend: Any, model: Any, leaves: Sequence[LiveLeaf], grads: Any, paths: Collection[str]
) -> Any:
    """The gradients as a tree with these paths; what is a tree already, as it is.

    Args:
        backend: the module of the model's framework.
        model: a live model.
        leaves: its leaves.
        grads: by the names of the model's parameters, or in their order; or a torch module, whose
            own they are. None is the gradient of what the loss does not depend on.
        paths: the leaves that need one.
    """
    if _nodes.foreign(grads)[1] == "model" and hasattr(grads, "named_parameters"):
        grads = {name: p.grad for name, p in grads.named_parameters()}
    pairs, ordered = backend.trained(model)
    if hasattr(model, "named_parameters"):  # which a Keras layer has too on its torch backend
        own = {id(getattr(v, "value", v)): v for _, v in pairs}
        named_so = model.named_parameters(remove_duplicate=False)
        pairs = [*pairs, *((name, own[id(p)]) for name, p in named_so if id(p) in own)]
    named = dict(pairs)
    if isinstance(grads, list | tuple):
        if len(grads) != len(ordered):
            raise FwtError(
                f"grads: {len(grads)} gradients, but the model has {len(ordered)} "
                f"{backend.TRAINED}: give one for each, in their order"
            )
        held = {id(v): g for v, g in zip(ordered, grads, strict=True)}
    elif isinstance(grads, Mapping) and _by_name(grads, named):
        twice = [n for n, v in pairs if n in grads and v is not named[n]]
        if twice:
            raise LeafError(
                f"grads: several variables of the model are named {twice[0]!r}: give the gradients "
                f"as a list, in the order of {backend.TRAINED}"
            )
        held = {id(named[name]): g for name, g in grads.items()}
    else:
        return grads
    if all(g is None for g in held.values()):
        raise FwtError("grads: all of them are None: compute them first, as loss.backward() does")
    tree: dict[str, Any] = {}
    for leaf in leaves:
        if leaf.collection == "params" and leaf.path in paths:
            given = held.get(id(leaf.source), _NOTHING)
            tree[leaf.path] = _one(backend, leaf, given, leaf.source, ordered)
    return {"params": nested(tree)}


def _by_name(grads: Mapping[str, Any], named: Mapping[str, Any]) -> bool:
    """Whether the keys are names of parameters, and not those of a tree."""
    wrong = [name for name in grads if name not in named]
    if not wrong:
        return bool(grads)
    if any(g is None or _nodes.foreign(g)[1] for g in grads.values()):
        near = _tree.near(str(wrong[0]), list(named))
        raise LeafError(f"grads: no parameter of the model is named {wrong[0]!r}{near}")
    return False


def _one(backend: Any, leaf: LiveLeaf, given: Any, source: Any, ordered: Sequence[Any]) -> Any:
    if leaf.read is None:
        raise LeafError(
            f"grads: {leaf.path} is computed from other parameters, so that it has no gradient of "
            "its own: leave it out with where=, or remove what computes it, as "
            "torch.nn.utils.prune.remove does"
        )
    if given is None or given is _NOTHING:
        trains = getattr(source, "requires_grad", True)
        if not trains or not any(v is source for v in ordered):
            raise LeafError(
                f"grads: {leaf.path} is frozen and has no gradient: leave it out with where="
            )
        if given is _NOTHING:
            raise LeafError(
                f"grads: nothing for {leaf.path}: give its gradient, which is None where the loss "
                "does not depend on it, or leave it out with where="
            )
        return np.zeros(leaf.value.shape, leaf.value.dtype)
    value = backend.array_of(given)
    each = value if value.ndim > leaf.value.ndim else value[None]  # of each example
    if each.shape[1:] != tuple(source.shape):
        raise LeafError(
            f"grads: {leaf.path} is a parameter of shape {list(source.shape)}, found a gradient of "
            f"{list(value.shape)}"
        )
    found = np.stack([leaf.read(x) for x in each])
    return found if each is value else found[0]


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """A tree of what stands at each path."""
    out: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, last = [_tree.unescape(p) for p in _tree.split(path)]
        node = out
        for part in parents:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                break
        if not isinstance(node, dict) or last in node:
            raise ConversionError(
                f"{path}: a weight and a layer have the same name there; rename one of them"
            )
        node[last] = value
    return out
