"""``load`` and ``save``, of each format.

Files are data: no reader imports the framework that owns the format, runs code from the file, or
allocates before it has checked sizes. A save appears whole or not at all.
"""

import functools
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fwt import _nodes, _tree
from fwt._types import ConversionError, FileFormatError, Model
from fwt.converters import io as _io
from fwt.converters.files import copies, folders, h5_weights, others
from fwt.converters.files import names as _names
from fwt.converters.files import stored as _stored
from fwt.converters.files.format import fill_groups
from fwt.converters.files.known import (
    EQUINOX,
    KERAS,
    LEGACY,
    NPZ,
    ONNX,
    ORBAX,
    RUNS,
    SAFETENSORS,
    TORCH,
)
from fwt.converters.files.known import FORMATS as FORMATS
from fwt.converters.files.known import SUFFIXES as SUFFIXES
from fwt.converters.files.known import by_content as by_content
from fwt.converters.files.known import by_suffix as by_suffix
from fwt.converters.files.known import format_of as format_of
from fwt.converters.files.known import inside as inside
from fwt.converters.files.known import suffix as suffix
from fwt.converters.io import Reading, UnusedError, write_atomically, write_folder_atomically

if TYPE_CHECKING:
    from fwt.converters.rows.row import Layer

DType = Literal["float32", "float16", "bfloat16", "float64"]


def load(
    path: str | os.PathLike[str],
    *,
    architecture: Any = None,
    key: str | Sequence[str] | None = None,
    rename: Mapping[str, str] | None = None,
    drop: Sequence[str] | None = (),
    match: str = "name",
    strict: bool = True,
    fold: bool = True,
    max_bytes: int | None = None,
    shardings: Any = None,
    sidecar: bool = False,
    external_data: bool = False,
    dtype: DType | None = None,
    module: bool = True,
) -> Model:
    """Reads a model or weights from a file or folder, without the framework that wrote it.

    The format is told by the content: ``.keras``, ``.weights.h5`` and its shards and ``.h5``, of
    Keras 2 and 3, torch state dicts, safetensors and their shards, ``.npz``, Flax's msgpack, Orbax,
    ONNX. Weights alone are read of TensorFlow's checkpoints and SavedModels (with TensorFlow), of
    folders of ``torch.distributed.checkpoint``, and of Equinox's ``.eqx``, with ``architecture=``
    the tree that its leaves are of.

    Args:
        path: the file; of sharded weights the index or the folder, of Orbax the folder; or a
            folder with one file of weights (of several, the one ``.safetensors``).
        architecture: the model whose weights these are: a file with one (``.keras``, ``.h5``, one
            of :func:`save`, or the ``.json`` of Keras's ``to_json``), a :class:`fwt.Sequential`,
            a ``fwt.Model``, a Keras model or a torch Sequential.
        key: which part of a file that holds several, such as "model" or "state/params"; or several
            parts, as a train state has them: ("params", "batch_stats").
        rename: of weights, what names in the file start with and what they shall start with
            instead: ``{"features.0": "conv"}``; ``{"module.": ""}`` takes a start off.
        drop: of weights, globs of names in the file that are not wanted, such as
            ``["optimizer.**", "n_averaged"]``. A name is spelled as files do, or as trees do,
            ``optimizer/**``. What remains has to be arrays.
        match: with ``architecture``, "name", or "order" to take arrays in the file's order, each
            of which must have the right shape. In Keras's files layers have it, not arrays.
        strict: with ``architecture``, whether all names and shapes must fit. If not, what is
            missing, unexpected or of another shape is told in a warning, and the architecture
            keeps its own weights there.
        fold: whether the parts that torch's prune, weight_norm, spectral_norm and parametrize keep
            become the weight that they compute.
        max_bytes: how much compressed parts may grow to; half of the machine's memory by default.
        shardings: for Orbax, a ``jax.sharding.Sharding`` or a tree of them: the leaves are then
            JAX arrays on those devices, each device reading its own part.
        sidecar: of a Keras model, as in ``from_keras``: what matters in training only is kept in
            ``module.sidecar``, and so are the model's name, its class and what it was compiled
            with; :func:`save` writes all of it along.
        external_data: of an ONNX file, whether its weights may be in another in its folder.
        dtype: "float32", or "float16", "bfloat16" or "float64", for a model that computes in it,
            whatever the dtype policy of the file's, and for floating leaves in it; None, the
            default, keeps what the file says. An ``architecture`` is read so too.
        module: False for the arrays of a file alone, ``Model(None, variables)``, also where its
            model can't be converted: under the names in the file, and in its axes.

    Returns:
        ``Model(module, variables)`` with NumPy leaves. A file that holds weights only gives
        ``Model(None, variables)``, the leaves under the file's own names and in its layout, unless
        ``architecture`` says what they are. Such variables keep the order of the names, what is one
        array, and metadata through every transform, and :func:`save` writes them again. They do so
        as a part of the structure, so that ``jax.tree.map`` over two trees wants both from files
        that say the same; ``{name: dict(tree) for name, tree in variables.items()}`` is the same
        without it.

    Raises:
        FileFormatError: for a file that is missing, truncated, malformed or hostile, or that holds
            what can't be converted exactly; with ``architecture`` it lists every array that is
            missing, unexpected or of another shape. It is a ``ConversionError``.

    Example:
        >>> import tempfile, os, numpy as np
        >>> import fwt, jax
        >>> path = os.path.join(tempfile.mkdtemp(), "w.safetensors")
        >>> fwt.converters.save(path, None, {"params": {"d": {"kernel": np.ones((2, 3))}}})
        >>> module, variables = fwt.converters.load(path)
        >>> fwt.paths(variables)
        ['d/kernel']
        >>> plain = {name: dict(tree) for name, tree in variables.items()}
        >>> jax.tree.map(np.add, plain, plain)["params"]["d"]["kernel"].shape
        (2, 3)
    """
    path = _io.given_path(path)
    _stored.forget()
    key = key if key is None or isinstance(key, str) else tuple(key) or None
    how_named = _names.given(rename, drop, match, strict, path)
    wanted = (fold, max_bytes, shardings, sidecar, external_data, module)
    how = Reading(key, *wanted, tuple(how_named.drop))
    try:
        path = inside(path)
        found = format_of(path)
        if shardings is not None and found is not ORBAX:
            raise FileFormatError(f"{path}: shardings= is for Orbax; use jax.device_put")
        if match not in ("name", "order"):
            raise FileFormatError(f"match must be 'name' or 'order', found {match!r}")
        if max_bytes is not None and (not isinstance(max_bytes, int) or max_bytes < 1):
            raise FileFormatError(f"max_bytes={max_bytes!r}: expected a number of bytes")
        named = rename or how_named.drop or match != "name" or not strict
        if architecture is None and (match != "name" or not strict):
            raise FileFormatError(f"{path}: match= and strict= need architecture=")
        if not strict and match == "order":
            raise FileFormatError(f"{path}: strict=False goes by names, not with match='order'")
        if architecture is not None and not module:
            raise FileFormatError(
                f"{path}: module=False reads arrays alone, and architecture= says what they are: "
                "give one of them"
            )
        if found is EQUINOX:
            model = others.load_equinox(path, architecture, how)
            return _in_dtype(_names.renamed(model, how_named, path) if named else model, dtype)
        fill, own = None, found.fill
        if found is KERAS and match == "order":
            own = fill_groups(h5_weights.load_archive)
        model = Model(None, {})
        if own is None or architecture is None:
            try:
                model = folders.read(found, path, how)
            except FileFormatError as error:
                if isinstance(error, UnusedError):
                    raise
                if architecture is None and found in (KERAS, LEGACY, ONNX):
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")  # of what is only tried
                        _io.with_way(error, found.load, path, how)
                if found is not KERAS:
                    raise
                # Its model can't be converted, and need not be.
                own = fill_groups(h5_weights.load_archive)
        if own is not None and not strict:
            raise FileFormatError(
                f"{path}: Keras tells its arrays by their places, so strict=False is for other "
                "files: rename= and drop= say whose arrays these are, and match='order' takes them "
                "in the order of the layers"
            )
        if architecture is None:
            model = _names.renamed(model, how_named, path) if named else model
            return _in_dtype(model, dtype)
        if own is not None:
            put = own

            def fill(layers: list["Layer"]) -> None:
                put(layers, path, how, how_named)

        from fwt.converters.files import fill as _fill

        whole = functools.partial(load, sidecar=sidecar, external_data=external_data, dtype=dtype)
        made = _fill.filled(model, architecture, path, fill, whole, how_named, dtype)
        return _in_dtype(made, dtype)
    except OSError as error:
        raise FileFormatError(f"{path}: can't read it ({error.strerror or error})") from error


def looked_at(*paths: str | os.PathLike[str]) -> list[Model]:
    """What files hold, to look at: their arrays alone, each under its file's own names, where the
    model of one can't be converted."""
    try:
        return [load(path) for path in paths]
    except FileFormatError as error:
        if not str(error).endswith(_io.ALONE):
            raise
        found = [load(path, module=False) for path in paths]
        why = str(error).removesuffix(_io.ALONE)
        warnings.warn(f"{why}; the names are those in the file", stacklevel=4)
        return found


def _in_dtype(model: Model, dtype: Any) -> Model:
    if dtype is None:
        return model
    from fwt.converters.frameworks import flax as _flax

    return _flax.in_dtype(model, dtype)


def save(
    path: str | os.PathLike[str],
    module: Any,
    variables: Any = None,
    *,
    input_shape: Any = None,
    layout: str | None = None,
    shard_bytes: int | None = None,
    dtype: DType | None = None,
    source: str | os.PathLike[str] | None = None,
) -> None:
    """Writes a model or weights to a file or folder, whole or not at all.

    Args:
        path: where to; its suffix is the format. With the architecture: ``.keras`` and ``.h5``
            (real Keras opens them), ``.safetensors``, ``.npz`` and ``.orbax`` (a folder). Weights
            only: ``.weights.h5``, ``.pt``, ``.pth`` or ``.bin`` (a state dict for
            ``torch.load(weights_only=True)`` and the module that ``to_torch`` gives), ``.msgpack``.
            ``.weights.h5`` is for the model that ``to_keras`` gives.
        module: a :class:`fwt.Sequential`, a linen ``nn.Sequential``, a ``Model`` of one, an
            ``nnx.Sequential``, any linen or nnx module with ``input_shape=``, or None to write the
            variables as they are (not to Keras's formats).
        variables: ``{"params": ..., "batch_stats": ...}``; a Model has its own.
        input_shape: the shape of its input without the batch axis, where the file is to tell it.
            A linen or nnx module of one's own needs it, or a list of shapes, or an example of each
            input: it is traced and becomes a :class:`fwt.Graph`.
        layout: for torch, the layout of the model's ends, as in ``to_torch``: "channels_first"
            unless told otherwise, or "source".
        shard_bytes: for ``.safetensors`` and ``.weights.h5``: the path becomes a folder of shards
            of at most so many bytes each (or of one array) and their index.
        dtype: "float32", "float16", "bfloat16" or "float64" for floating leaves in it, and for a
            model that computes in it, as in :func:`load`. The other leaves are kept. What is finite
            and would be infinite is refused.
        source: with ``module=None``: the file or folder that the arrays come from. The new one is
            a copy of it with these arrays, under the names that :func:`load` gives; of a model of
            Keras or ONNX, those that it gives with ``module=False``. A folder is copied whole.

    Raises:
        ConversionError: for what the target can't say exactly; nothing is written then.
        FileFormatError: if it can't be written there.

    Example:
        >>> import tempfile, os, jax, flax.linen as nn
        >>> import fwt
        >>> net = fwt.Sequential([("dense", nn.Dense(2))])
        >>> variables = net.init(jax.random.key(0), jax.numpy.ones((1, 3)))
        >>> path = os.path.join(tempfile.mkdtemp(), "net.keras")
        >>> fwt.converters.save(path, net, variables)
        >>> fwt.converters.load(path).module == fwt.Sequential([("dense", nn.Dense(2))], (3,))
        True
    """
    from fwt._graph import Graph
    from fwt._sequential import Sequential
    from fwt.converters.frameworks import flax as _flax
    from fwt.converters.frameworks import given as _given

    path = _io.given_path(path)
    call = "save(path, model)"
    module, variables, input_shape = _given.given(module, variables, call, input_shape)
    if source is not None:
        if dtype is not None:
            raise ConversionError(f"{path}: dtype= does not go with source=, which says the dtypes")
        _save_into(path, module, _variables(variables), _io.given_path(source))
        return
    found = by_suffix(path)
    if found is None or not (found.save or found.save_folder):
        known = ", ".join(s for s, f in SUFFIXES.items() if f.save or f.save_folder)
        said = f"the format {path.suffix or 'without a suffix'!r} is not known"
        if path.suffix == ".eqx":
            said = "equinox.tree_serialise_leaves(path, module) writes it"
        if found is not None:
            said = f"{path.name} is written with shard_bytes= and the suffix of one file"
        if (end := suffix(path)).lower() in RUNS:
            other = f"{path.name[: -len(end)]}.pt"
            raise FileFormatError(
                f"{path}: a {end} file holds a training run (optimizer, epoch, ...), which is only "
                "written as a copy of one of torch with weights of the same shapes and dtypes: "
                f"{other} takes any weights"
            )
        raise FileFormatError(f"{path}: {said}; known to be written are {known}")
    if layout is not None and (module is None or found is not TORCH):
        raise ConversionError(
            f"{path}: layout={layout!r} is for a torch file of a module; other files keep the "
            "model's own ends"
        )
    module = _flax.sequential_of(module)
    if input_shape is not None and isinstance(module, Sequential | Graph):
        module = module.clone(input_shape=input_shape)
    if not isinstance(module, Sequential | Graph | None) and found is not ONNX:
        held = "nnx.state(module)" if _nodes.is_graph(module) else "variables"
        there = (
            f"{str(path)[: -len(suffix(path))]}.safetensors" if found.needs_module else str(path)
        )
        raise ConversionError(
            f"{path}: {type(module).__name__} is no fwt.Sequential, so its architecture can't be "
            f"written: give input_shape= (without the batch axis), with which it is traced; or "
            f"save({there!r}, None, {held}) writes the weights alone"
        )
    variables = _variables(variables)
    if found not in _STREAMED or (found is TORCH and module is not None):
        variables = _stored.in_memory(variables, f"{path}: this format")
    if dtype is not None:
        if not isinstance(module, Sequential | Graph | None):
            raise ConversionError(
                f"{path}: dtype= does not go with {type(module).__name__}, which says its dtypes "
                "itself: give input_shape=, with which it is traced"
            )
        module, variables = _flax.in_dtype(Model(module, variables), dtype)
    if module is None and found.needs_module:
        way = ", or source=, the file that they come from" if found.save_into else ""
        raise ConversionError(
            f"{path}: weights without an architecture can't be written for {found.framework}; give "
            f"a module{way}"
        )
    if shard_bytes is not None:
        if found.save_shards is None:
            raise ConversionError(f"{path}: only .safetensors and .weights.h5 have shards")
        if not isinstance(shard_bytes, int) or shard_bytes < 1:
            raise ConversionError(f"shard_bytes={shard_bytes!r}: expected a number of bytes")
        shards, size = found.save_shards, shard_bytes
        write_folder_atomically(
            path, lambda folder: shards(folder, module, variables, size), folders.may_be_replaced
        )
    elif found.save_folder is not None:
        whole = found.save_folder
        write_folder_atomically(
            path, lambda folder: whole(folder, module, variables), folders.may_be_replaced
        )
    else:
        one: Any = found.save
        write_atomically(path, lambda file: one(file, module, variables, layout))


_STREAMED = (SAFETENSORS, NPZ, TORCH)  # which are written a piece at a time


def _variables(given: Any) -> Mapping[str, Any]:
    from fwt.converters.frameworks import given as _given

    if not isinstance(given, Mapping):
        what = "nothing" if given is None else type(given).__name__
        raise ConversionError(f"expected a variables dict, found {what}{_given.weights_of(given)}")
    return _tree.as_variables(given)


def is_written_into(path: Path, source: Path, variables: Any = None) -> bool:
    """Whether arrays alone, or these, can be written to a file like the one that they are from."""
    form = by_suffix(path)
    if form is None or form.save_into is None or not source.is_file():
        return False
    return (by_content(source) or by_suffix(source)) is form and form.takes(source, variables)


def copy_of(
    path: Path, source: Path, variables: Any, key: Any = None
) -> tuple[Path, copies.Copy] | None:
    """What a path is to be a copy of, and how these arrays are written into it; None where it is of
    another format than the source. A folder is copied to a folder, whole.

    Raises:
        OtherArraysError: for arrays that the source does not have.
    """
    inner = inside(source)
    found = by_content(inner)
    folder = source.is_dir() and by_suffix(path) is by_suffix(source)
    whole = folder and suffix(path).lower() not in RUNS
    if found is None or found.copy is None:
        return None
    run = found is TORCH and suffix(path).lower() in RUNS
    if not whole and (inner.is_dir() or not (run or found is by_suffix(path))):
        return None
    return (source if whole else inner), found.copy(inner, variables, key)


def _save_into(path: Path, module: Any, variables: Any, source: Path) -> None:
    found = copy_of(path, source, variables) if module is None else None
    if found is not None:
        copies.save(path, *found)
        return
    into = getattr(by_suffix(path), "save_into", None)
    if into is None or module is not None or not is_written_into(path, source, variables):
        way = "from a file of its own format, or a folder"
        raise ConversionError(f"{path}: source= is for arrays alone, {way}")
    into(path, source, variables)
