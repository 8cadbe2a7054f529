"""The weights of a live model or a file as a tree, and the way back: ``weights``, ``assign``."""

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from fwt import _nodes, _tree
from fwt._initialize import assign as assign_to_tree
from fwt._types import LeafError, Model
from fwt.converters.frameworks import gradients
from fwt.converters.frameworks.live import Live


def weights(model: Any) -> dict[str, Any]:
    """The weights of a model in Flax's names and axes.

    Of a live Keras or torch model they are those that :func:`transform` shows a transform, under
    the same paths, with the running statistics of norms beside them. Nothing is permuted for a
    Flatten.

    Args:
        model: a built Keras model, a torch module, an nnx module, a :class:`fwt.Model`, or the path
            of a file or folder that :func:`load` reads, whose names and axes it has.

    Returns:
        ``{"params": ..., "batch_stats": ...}`` of NumPy arrays, nested dicts; without
        ``batch_stats`` where there are none. Of a live model they are copies that can't be written
        to. A tied weight stands under its first path, and of an nnx module under each.

    Raises:
        ConversionError: if the model has no weights, or is of no framework that is known.
        FileFormatError: if the file can't be read.

    Example:
        >>> import fwt, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.BatchNorm1d(2))
        >>> tree = weights(net)
        >>> fwt.paths(tree), sorted(tree["batch_stats"]["1"])
        (['0/bias', '0/kernel', '1/bias', '1/scale'], ['mean', 'num_batches_tracked', 'var'])
        >>> tree["params"]["0"]["kernel"].shape
        (4, 2)
    """
    if isinstance(model, str | os.PathLike):
        from fwt.converters.files.formats import load

        model = load(model)
    if isinstance(model, Model):
        return dict(model.variables)
    if _nodes.is_graph(model):
        tree = _tree.Tree(model, True)
        names = {True: "batch_stats", False: "params"}
        held: dict[str, dict[str, Any]] = {"params": {}}
        for path, leaf in tree.leaves.items():
            for place in (path, *tree.others(path)):
                held.setdefault(names[path in tree.statistics], {})[place] = np.asarray(leaf)
        return {name: gradients.nested(found) for name, found in held.items()}
    return Live(model, True, "weights").tree


def assign(model: Any, tree: Any) -> Any:
    """Sets weights of a live model to those of a tree, in place; the way back of :func:`weights`.

    Args:
        model: a built Keras model, a torch module, an nnx module, or a :class:`fwt.Model`.
        tree: what :func:`weights` gives, whole or in part; or params alone, nested or as
            ``{path: array}``. What it does not hold stays as it is.

    Returns:
        The same model; for a :class:`fwt.Model`, a new one.

    Raises:
        LeafError: if the model has no such weight, or an array has another shape or dtype than its
            weight, or the paths of a tied weight are given different values. The model is as it was
            then.
        ConversionError: if a weight can't be written, or the model is of no framework that is
            known.

    Example:
        >>> import fwt, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> pruned = fwt.prune(0.5)(weights(net))
        >>> assign(net, pruned) is net
        True
        >>> int((net[0].weight == 0).sum())
        4
    """
    given = tree.variables if isinstance(tree, Model) else tree
    if not isinstance(given, Mapping):
        raise TypeError(
            f"assign takes a tree, as weights(model) gives it, or {{path: array}}, found "
            f"{type(tree).__name__}"
        )
    parts = dict(given) if _tree.is_variables(given) else {"params": given}
    if unknown := sorted(map(str, parts.keys() - {"params", "batch_stats"})):
        raise LeafError(f"assign takes 'params' and 'batch_stats', and {unknown[0]!r} is neither")

    def assigned(whole: Any) -> Any:
        new = {}
        for name, part in parts.items():
            if name not in whole:
                raise LeafError(f"assign: the model has no {name}")
            new[name] = assign_to_tree(part)({"params": whole[name]})["params"]
        return {**whole, **new}

    if isinstance(model, Model):
        return Model(model.module, assigned(model.variables))
    if _nodes.is_graph(model):
        _into_nnx(model, parts)
    else:
        Live(model, True, "assign").run(assigned)
    return model


def _into_nnx(model: Any, parts: Mapping[str, Any]) -> None:
    nnx: Any = sys.modules["flax.nnx"]
    held = _tree.Tree(model, True)
    new: dict[str, Any] = {}
    for name, part in parts.items():
        mine = {
            p: x for p, x in held.leaves.items() if (p in held.statistics) == (name != "params")
        }
        own = {q: p for p in mine for q in (p, *held.others(p))}
        whole = gradients.nested({q: np.asarray(mine[p]) for q, p in own.items()})
        found = _tree.Tree(assign_to_tree(part)({"params": whole})).leaves
        for place, path in own.items():
            new.setdefault(path, found[place])
    nnx.update(model, nnx.state(held.replace(new)))


@contextlib.contextmanager
def seen(model: Any) -> Iterator[dict[str, Any]]:
    """The weights of a live model, for what only reads them: inside, the axes and the names are
    known that the model tells."""
    live = Live(model, True, "reading")
    with live.knowing():
        yield live.tree
