"""What reaches into live models and files: ``transform``, ``weights``, ``assign``."""

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fwt import _nodes, _tree
from fwt._initialize import assign as assign_to_tree
from fwt._types import ConversionError, LeafError, Model, Transform, does_stream, wants_statistics
from fwt.converters.frameworks import gradients
from fwt.converters.frameworks.beside import of_nnx
from fwt.converters.frameworks.live import Live, check


def transform(
    model: Any, t: Transform, out: Any = None, *, max_memory: int | None = None, **how: Any
) -> Any:
    """Runs a transform on a live Keras or torch model of any shape, in place, or on a file.

    The transform sees the weights in Flax's names and axes, under the same paths as ``from_keras``
    and ``from_torch`` give; those of recurrent, attention, depthwise and separable layers keep the
    names that their framework gives them, such as ``weight_ih_l0``. A ``where`` may be in the
    framework's own names too, such as ``"0.weight"``, ``"**.weight"`` and ``"bn/gamma:0"``. It does
    not see the running statistics of norms, which only :func:`fwt.reset` (alone, or in ``chain``
    and ``at``) gives new values; nothing is permuted for a Flatten. Only weights that it changed
    are written, all of them after it ended: integer, seed and tied variables, dtype, device,
    ``requires_grad`` and the storage itself survive. A tied weight, also that of one layer in two
    places, stands under its first path. A ``where`` takes it if it names all of its paths, or one
    of them in full, without wildcards. Where it names a part of them otherwise, as the kernels do
    of an embedding that is the kernel of a head too, the weight is left as it is, and a warning
    says so.

    The gradients that a score needs are given as the framework has them: ``grads=`` takes the
    torch module itself after ``loss.backward()``, ``{name: p.grad}`` with the names of
    ``named_parameters()``, or a list in the order of ``parameters()`` or of Keras's
    ``trainable_variables``; or a tree with the names and axes that the transform sees.

    A file is read as :func:`load` reads it, and written to ``out`` with all else that it says, as
    between two files of one format: the settings of training of a Keras model, the order, ties and
    metadata of weights. Of weights alone ``out`` is a copy of the file in which only the arrays
    that changed differ, if it has the same format. A folder whose name says no format, such as one
    of Hugging Face, is copied whole to one like it. The arrays of a Keras file whose model can't be
    converted have the names that ``load(path, module=False)`` gives them, and all else of the file
    stays as it is. So it is with every ONNX file, whatever its operators: the nodes that read an
    array say what its axes are, and whether it is a kernel.

    Args:
        model: a built Keras model, a torch module, or a :class:`fwt.Model`. Of what only runs a
            module, such as DataParallel, at any depth, the paths are those of the module inside.
            Or the path of a file or folder.
        t: any transform; of a file it is called with the :class:`fwt.Model` that the file holds.
        out: the path to write to, where ``model`` is a path; the same path writes over the file
            once the new one is whole.
        max_memory: how many bytes of the weights of a file may be in memory at once, a quarter of
            the machine's by default.
        how: of a file, what :func:`load` takes, such as ``key=`` for the part of a checkpoint that
            has the weights; the other parts stay as they are where ``out`` has the same format.

    Returns:
        The same model; for a :class:`fwt.Model`, a new one; for a path, ``out``.

    Raises:
        FwtError: whatever the transform says; the model is as it was then, and no file is written.
        LeafError: if it changed a path, shape or dtype.
        FileFormatError: if the file can't be read or written so.

    Example:
        >>> import torch, fwt
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> _ = transform(net, fwt.prune(0.5))
        >>> int((net[0].weight == 0).sum())
        4
        >>> _ = transform(net, fwt.prune(1.0, where="0.weight"))
        >>> int((net[0].weight == 0).sum())
        8
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> torch.save({"net": net.state_dict(), "epoch": 3}, folder / "run.pt")
        >>> transform(folder / "run.pt", fwt.prune(0.5), out=folder / "pruned.pt", key="net").name
        'pruned.pt'
        >>> torch.load(folder / "pruned.pt")["epoch"]
        3
    """
    if isinstance(model, str | os.PathLike):
        if out is None:
            raise TypeError(f"{os.fspath(model)!r} is a file: out= says where the new one goes")
        check(t)
        from fwt.converters.files import stored

        with stored.wanted(does_stream(t) and how.get("architecture") is None, max_memory):
            _edit(Path(model), t, Path(out), how)
        return out
    how = how if max_memory is None else {"max_memory": max_memory, **how}
    if given := {"out": out, **how} if out is not None else how:
        raise TypeError(f"{next(iter(given))}= is for files, found {type(model).__name__}")
    if isinstance(model, Model):
        return t(model)
    check(t)
    Live(model, wants_statistics(t)).run(t)
    return model


def _edit(path: Path, t: Transform, out: Path, how: dict[str, Any]) -> None:
    from fwt.converters.files import edit, formats, h5_names

    edited = edit.is_edited(out, path, how, t)
    try:
        model = formats.load(
            path, **{**how, **({"module": False} if edited else {"sidecar": True})}
        )
    except ConversionError:
        if edited or not formats.is_written_into(out, path):
            raise
        model = formats.load(path, module=False, **how)
        if not h5_names.says_no_axes(model.variables):
            raise
    before = model
    with edit.knowing(path, model) as model:
        model = t(model)
    if not isinstance(model, Model):
        raise LeafError(
            f"{path}: the transform is called with the Model that the file holds, and must give a "
            f"Model back, found {type(model).__name__}: fwt.Model(model.module, variables)"
        )
    copy = edit.copied(path, out, model, before, how)
    if copy is None:
        formats.save(out, *model)
    else:
        copy()


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
        to; of a Model, with all its collections, its own arrays, where these are NumPy's. A tied
        weight stands under its first path, and of an nnx module under each. Of an nnx module they
        are all variables that a transform sees: no caches, intermediates and state of keys.

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
        return jax.tree.map(np.asarray, dict(model.variables))
    if _nodes.is_graph(model):
        tree = _tree.Tree(model, True)
        names = {True: "batch_stats", False: "params"}
        held: dict[str, dict[str, Any]] = {"params": {}}
        for path, leaf in tree.leaves.items():
            value = _copy(path, leaf)
            for place in (path, *tree.others(path)):
                held.setdefault(names[path in tree.statistics], {})[place] = value
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
            weight. The model is as it was then.
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
    known = model.variables if isinstance(model, Model) else {"params", "batch_stats"}
    if unknown := sorted(map(str, parts.keys() - {*known, "params", "batch_stats"})):
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


def _copy(path: str, leaf: Any) -> np.ndarray:
    """The values of a leaf, which can't be written to."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise LeafError(f"{path} is a shape without values")
    value = np.array(leaf) if isinstance(leaf, np.ndarray | np.generic) else np.asarray(leaf)
    value.flags.writeable = False
    return value


def _into_nnx(model: Any, parts: Mapping[str, Any]) -> None:
    nnx: Any = sys.modules["flax.nnx"]
    held = _tree.Tree(model, True)
    new: dict[str, Any] = {}
    for name, part in parts.items():
        mine = {
            p: x for p, x in held.leaves.items() if (p in held.statistics) == (name != "params")
        }
        own = {q: p for p in mine for q in (p, *held.others(p))}
        values = {p: _copy(p, x) for p, x in mine.items()}  # one for all places of a leaf
        whole = gradients.nested({q: values[p] for q, p in own.items()})
        found = _tree.Tree(assign_to_tree(part)({"params": whole})).leaves
        for place, path in own.items():
            if found[place] is not values[path]:
                new.setdefault(path, _in_place_of(mine[path], found[place]))
    nnx.update(model, nnx.state(held.replace(new)))


def _in_place_of(old: Any, new: Any) -> Any:
    """A new value as what an nnx variable holds: an array of JAX where the old one is, if that is
    one, for NumPy's promote other dtypes and may be written to through a copy of the module."""
    if not isinstance(old, jax.Array):
        return np.array(new)
    with jax.enable_x64(True):  # of a wide one that JAX holds already
        value = jnp.array(np.asarray(new))
        return jax.device_put(value, old.sharding) if old.committed else value


@contextlib.contextmanager
def seen(model: Any) -> Iterator[dict[str, Any]]:
    """The weights of a live model, for what only reads them: inside, the axes and the names are
    known that the model tells."""
    live = Live(model, True, "reading")
    with live.knowing():
        yield live.tree


def beside(model: Any) -> dict[str, Any]:
    """What a live model holds that is no weight: torch's other parameters, buffers and extra state,
    variables of Keras such as those of a Normalization but no seeds, and variables of nnx such as
    caches and the state of keys."""
    if _nodes.is_graph(model):
        return {"beside": gradients.nested(dict(of_nnx(model)))}
    held: dict[str, np.ndarray] = {}
    for path, value in Live(model, True, "reading").beside(model):
        name, number = path, 1
        while name in held:  # Keras may give several variables one path
            name, number = f"{path}_{number}", number + 1
        held[name] = value
    return {"beside": held} if held else {}
