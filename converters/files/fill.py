"""Weights from a file into an architecture from elsewhere, every name and shape checked."""

import contextlib
import dataclasses
import itertools
import os
import re
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fwt import _nodes, _tree
from fwt._graph import Graph
from fwt._sequential import Sequential
from fwt._types import ConversionError, FileFormatError, Model
from fwt.converters import io as _io
from fwt.converters.files import h5, h5_names
from fwt.converters.files import names as _names
from fwt.converters.files import source as _source
from fwt.converters.files.names import Names
from fwt.converters.frameworks import architecture as _architecture
from fwt.converters.frameworks import flax as _flax
from fwt.converters.frameworks import given as _given
from fwt.converters.frameworks import keras_2, keras_config, keras_read, torch_layers
from fwt.converters.rows.row import Layer, parts_of
from fwt.converters.walk import convert

_FIRST = 1 << 20
# What an array is called, with the numbers of its weights; and these with its values.
Candidate = tuple[str, dict[str, np.ndarray]]
Pair = tuple[np.ndarray, np.ndarray, str]
_STATS = ("running_mean", "running_var", "mean", "var", "moving_mean", "moving_variance")


def _known(
    architecture: Any, load: Callable[[Path], Model], dtype: Any
) -> tuple[Model | None, Any]:
    """An architecture as a model, in float32 if that is asked, and as Keras's own layers and input
    shape where it has some."""
    _given.refuse_own(architecture)
    if isinstance(architecture, Model):
        model = Model(_flax.sequential_of(architecture.module), architecture.variables)
        return _flax.in_dtype(model, dtype), None
    if isinstance(architecture, Sequential | Graph):
        return _flax.in_dtype(Model(architecture, _shapes(architecture)), dtype), None
    keras, torch = sys.modules.get("keras"), sys.modules.get("torch")
    if keras is not None and isinstance(architecture, keras.Model):
        from fwt.converters.frameworks import keras as _keras

        return _keras.from_keras(architecture, dtype=dtype), _keras.net_of(architecture)
    if torch is not None and isinstance(architecture, torch.nn.Module):
        from fwt.converters.frameworks import torch as _torch

        try:
            return _flax.in_dtype(_torch.from_torch(architecture), dtype), None
        except ConversionError as error:
            raise ConversionError(
                f"architecture= as a torch module: {error}; such a one is given as "
                "architecture=converters.from_torch(net, input_shape=...)"
            ) from error
    if not isinstance(architecture, str | os.PathLike):
        raise ConversionError(
            "architecture= takes a file, a fwt.Sequential or Graph, a fwt.Model, a Keras model or "
            f"a torch Sequential, found {type(architecture).__name__}"
        )
    path = Path(architecture)
    if path.suffix == ".json":
        with _io.reading(path):
            config = _io.read_json(path)
            config = keras_2.modern(config, config.get("keras_version", "3"), str(path))
            return None, keras_read.keras_net(config, str(path))
    model = load(path)
    if model.module is None:
        raise FileFormatError(f"{path}: it holds weights only, so it is no architecture")
    with _io.reading(path):
        with open(path, "rb") if path.is_file() else contextlib.nullcontext() as file:
            head = file.read(4) if file is not None else b""
        own = head == b"\x89HDF" or (head == b"PK\3\4" and h5.is_keras(path))
        return model, h5.keras_of(path, _io.Reading()) if own else None


def _wrapped(architecture: Any) -> Mapping[str, str | None]:
    """The names of arrays that a live torch module has inside what only runs modules."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(architecture, torch.nn.Module):
        return {}
    from fwt.converters.frameworks import torch_wrappers

    return torch_wrappers.names(architecture)


def _shapes(module: Any) -> Any:
    shape = module.input_shape
    single = isinstance(module, Sequential) or isinstance(module.inputs, str)
    shapes = (shape,) if single else shape
    if shape is None or any(s is None or None in s for s in shapes):
        raise ConversionError(
            "an architecture without variables needs all its sizes: Sequential(layers, "
            "input_shape=(6, 5, 3))"
        )
    key = jax.eval_shape(lambda: jax.random.key(0))
    found = jax.eval_shape(
        module.init, key, *(jax.ShapeDtypeStruct((1, *s), np.float32) for s in shapes)
    )
    # Zeros that take no memory.
    return jax.tree.map(lambda s: np.broadcast_to(np.zeros((), s.dtype), s.shape), found)


def filled(
    model: Model,
    architecture: Any,
    path: Path,
    fill_keras: Callable[[list[Layer]], None] | None,
    load: Callable[[Path], Model],
    how: Names,
    dtype: Any,
) -> Model:
    """The architecture with the weights of a file that has names only."""
    known, native = _known(architecture, load, dtype)
    with _io.reading(path):
        if fill_keras is not None:
            return _filled_keras(known, native, path, fill_keras, how)
        if known is None:
            raise FileFormatError(
                f"{architecture}: a config alone has no shapes: give a .keras file, or build the "
                "model"
            )
        found = _found(model.variables, how, path, _wrapped(architecture))
        flat = dict(_source.flat_names(model.variables))
        ordered = _source.has_order(flat, _nodes.told_of(model.variables))
        if how.match == "order":
            return _put(_summed(_in_order(found, known, path, ordered)), known, path)
        own = None if native is None else _by_own_names(found, native)
        bare = isinstance(architecture, Sequential | Graph)
        try:
            pairs = _by_name(found, known, path, ordered, how.strict, bare)
            made = _put(_summed(pairs), known, path)
        except FileFormatError:
            if own is None:
                raise
            return own
        here, there = (jax.tree.leaves(x and x.variables) for x in (made, own))
        if own is not None and not all(map(_identical, here, there)):
            raise FileFormatError(
                f"{path}: its names are Flax's and Keras's, whose rows behind a Flatten stand in "
                "another order in this channels-first model: load the .keras or .weights.h5 file "
                "that Keras saves, which says whose it is"
            )
        return made


def _identical(a: Any, b: Any) -> bool:
    return a.shape == b.shape and bool(a.tobytes() == b.tobytes())


def _by_own_names(found: Mapping[str, np.ndarray], native: Any) -> Model | None:
    """The Keras model with the arrays that its own variables' names say, if these are all."""
    places = {
        ".".join([*parts_of(part.name), *name.split("/")]): (part, name)
        for part in _every(native.layers)
        for name in part.arrays
    }
    wanted = {n: np.shape(part.arrays[name]) for n, (part, name) in places.items()}
    if wanted != {n: v.shape for n, v in found.items()}:
        return None
    for n, (part, name) in places.items():
        part.arrays[name] = found[n]
    net = keras_config.shared(native)
    return keras_config.marked(_flax.write_flax(convert.convert(net, "keras", "flax", "source")),
                               net)  # fmt: skip


def _filled_keras(
    known: Model | None, native: Any, path: Path, fill: Callable[[list[Layer]], None], how: Names
) -> Model:
    if native is None:
        assert known is not None
        _refuse_turned(known.module, path)
        net = keras_config.to_keras_net(*_numbered(known), None, any_dtype=True, arrays_only=True)
    else:
        net = native
    layers = net.layers
    if native is None and known is not None and how.match == "order":
        h5_names.check_order(layers, path)
    places: dict[str, Any] = {}
    for part in _every(layers):
        places |= {f"{part.name}/{n}": v for n, v in part.arrays.items()}
        part.arrays = {}
    fill(layers)
    held = {f"{part.name}/{n}": v for part in _every(layers) for n, v in part.arrays.items()}
    # That each layer has all of its arrays was checked when they were put there.
    shapes = {n: np.shape(v) for n, v in places.items() if n in held}
    _compare(shapes, {n: held[n].shape for n in shapes}, path, "its places", "")
    if native is None and known is not None:
        return _put([(places[n], v, n) for n, v in held.items()], known, path)
    net = keras_config.shared(net)
    made = _flax.write_flax(convert.convert(net, "keras", "flax", "source"))
    if known is None:
        return made
    return Model(made.module.clone(sidecar=known.module.sidecar), made.variables)


def _refuse_turned(module: Any, path: Path) -> None:
    """Raises for a model that was made of a channels-first one of Keras: that and the one that
    ``to_keras`` gives have files of the same names and shapes, with other rows."""
    if getattr(module, "turned", False):
        raise FileFormatError(
            f"{path}: the architecture is made of a channels-first Keras model, in whose own files "
            "the rows behind a Flatten stand in another order: give that model or its .keras file "
            "as architecture"
        )


def _every(layers: list[Layer]) -> list[Layer]:
    return [part for layer in layers for part in (layer, *layer.inner)]


Shape = tuple[int, ...]


def _compare(
    wanted: Mapping[str, Shape],
    found: Mapping[str, Shape],
    path: Path,
    by: str,
    hint: str,
    strict: bool = True,
) -> None:
    """Raises with all names that are missing, unexpected or of another shape; warns of them if
    not strict."""
    told = {
        "missing": [n for n in wanted if n not in found],
        "unexpected": [n for n in found if n not in wanted],
        "of another shape": [
            f"{n} is {list(found[n])}, expected {list(shape)}"
            for n, shape in wanted.items()
            if n in found and found[n] != shape
        ],
    }
    if any(told.values()):
        said = "; ".join(f"{what}: {_names.some(names)}" for what, names in told.items() if names)
        count = sum(found.get(n) == shape for n, shape in wanted.items())
        if not strict or not count:
            hint = hint.replace(", and strict=False takes what fits", "")
        if strict or not count:
            raise FileFormatError(f"{path}: it does not fit the architecture by {by}: {said}{hint}")
        warnings.warn(f"{path}: loaded {count} of {len(wanted)} arrays; {said}", stacklevel=5)


def _numbered(known: Model) -> Model:
    """The model with the numbers from _FIRST on instead of its weights: what a conversion does
    with them tells where each weight goes; smaller ones are constants of the conversion's own."""
    total = sum(int(np.prod(np.shape(x))) for x in jax.tree.leaves(known.variables))
    dtype = np.int32 if total < 2**31 - _FIRST else np.int64
    count = _FIRST

    def number(x: Any) -> np.ndarray:
        nonlocal count
        shape = np.shape(x)
        size = int(np.prod(shape))
        out = np.arange(count, count + size, dtype=dtype).reshape(shape)
        count += size
        return out

    return Model(known.module, jax.tree.map(number, dict(known.variables)))


def _put(pairs: list[Pair], known: Model, path: Path) -> Model:
    """The weights at the places that the numbers say."""
    shapes, tree = jax.tree.flatten(
        jax.tree.map(np.shape, dict(known.variables)), is_leaf=_is_shape
    )
    sizes = [int(np.prod(shape)) for shape in shapes]
    ends = np.cumsum([0, *sizes])
    filled: list[np.ndarray | None] = [None] * len(shapes)
    done = [np.zeros(size, bool) for size in sizes]
    for places, value, name in pairs:
        where, values = np.asarray(places).reshape(-1), value.reshape(-1)
        ours = where >= _FIRST
        if not ours.all():
            if np.any(values[~ours] != where[~ours]):  # such as zeros beside the blocks of groups
                raise FileFormatError(
                    f"{path}: {name} holds other numbers than {np.unique(where[~ours])[:3]}, which "
                    "the architecture has fixed there"
                )
            where, values = where[ours], values[ours]
        while where.size:  # mostly once: an array is mostly one leaf
            owner = int(np.searchsorted(ends, where.min() - _FIRST, side="right")) - 1
            mine = where < _FIRST + ends[owner + 1]
            index, own = where[mine] - (_FIRST + ends[owner]), values[mine]
            there = filled[owner]
            if there is None:
                there = filled[owner] = np.zeros(sizes[owner], value.dtype)
            if there.dtype != value.dtype:
                raise FileFormatError(f"{path}: {name} is {value.dtype}, beside {there.dtype}")
            if done[owner][index].any() or np.unique(index).size < index.size:
                raise _unfillable(path)
            there[index], done[owner][index] = own, True
            where, values = where[~mine], values[~mine]
    if not all(d.all() for d in done):
        raise _unfillable(path)
    leaves = [
        np.zeros(shape, np.float32) if v is None else v.reshape(shape)
        for shape, v in zip(shapes, filled, strict=True)
    ]
    return _architecture.checked(known.module, jax.tree.unflatten(tree, leaves))


def _is_shape(node: Any) -> bool:
    return isinstance(node, tuple) and all(isinstance(n, int) for n in node)


def _unfillable(path: Path) -> FileFormatError:
    return FileFormatError(
        f"{path}: this architecture can't be filled by names: build it in its framework, load the "
        "weights there, and convert it"
    )


def _by_name(
    found: Mapping[str, np.ndarray],
    known: Model,
    path: Path,
    ordered: bool,
    strict: bool,
    bare: bool,
) -> list[Pair]:
    """The arrays under the names that fit best: torch's, Flax's or Keras's; ``bare`` is an
    architecture without weights."""
    shapes = {n: v.shape for n, v in found.items()}
    sketch = Model(known.module, jax.tree.map(_sketched, dict(known.variables)))
    why: dict[str, str] = {}
    candidates = _candidates(sketch, path, told=why)

    ends = {n.rpartition(".")[2] for n in shapes}

    def fitting(candidate: Candidate) -> tuple[int, int, int]:
        slots = candidate[1]
        same = [n for n in slots if n in shapes]
        alike = ends & {n.rpartition(".")[2] for n in slots}
        return sum(np.shape(slots[n]) == shapes[n] for n in same), len(same), len(alike)

    kind, slots = max(candidates, key=fitting)
    wanted = {n: np.shape(v) for n, v in slots.items()}
    hint = "".join(f"; its names in {x} are not known ({y})" for x, y in why.items()) + _hint(
        wanted, shapes
    )
    if wanted != shapes and _order_fits(found, known, path, ordered, candidates):
        hint += ", and match='order' takes them in the file's order, whose shapes fit"
    missing = [n for n in wanted if shapes.get(n) != wanted[n]]
    if missing and bare and not strict:
        raise FileFormatError(
            f"{path}: nothing is there for {missing[0]}, and the architecture has no weights of "
            "its own: give a model with them"
        )
    _compare(wanted, shapes, path, f"{kind}'s names", hint, strict)
    # Only the names that fit are worth the numbers.
    numbered = dict(_candidates(_numbered(known), path, kind))[kind]
    held = dict(found)
    if missing:
        own = dict(_candidates(known, path, kind))[kind]
        held |= {n: own[n] for n in missing}
    return [(numbered[n], held[n], n) for n in numbered]


def _order_fits(
    found: Mapping[str, np.ndarray],
    known: Model,
    path: Path,
    ordered: bool,
    sketches: list[Candidate],
) -> bool:
    """Whether ``match="order"`` would take the arrays."""
    if zipfile.is_zipfile(path) and h5.is_keras(path):  # taken by the numbers of its groups
        return bool(_orders(found, sketches, True))
    try:
        return bool(_in_order(found, known, path, ordered))
    except FileFormatError:
        return False


def _hint(wanted: Mapping[str, Shape], found: Mapping[str, Shape]) -> str:
    """The ways out that make the names of a file those of an architecture, if there are some."""
    starts = {n[:i]: None for n in found for i, c in enumerate(n) if c == "."}
    ways: list[str] = []
    ordered = sorted({"": None} | starts, key=len)[:1000]
    # First the starts that all wanted names have, then those that only some of them have.
    for start, some in [*((s, False) for s in ordered), *((s, True) for s in ordered[1:100])]:
        if some and ways:
            break
        begins = f"{start}." if start else ""
        after = {n[len(begins) :]: n for n in found if n.startswith(begins)}
        if some:
            after = {n: n for n in found if not n.startswith(begins)} | after
        if not all(n in after and found[after[n]] == s for n, s in wanted.items()):
            continue
        said = [f"rename={{{start!r}: ''}}"] if start else []
        own = {after[n] for n in wanted}
        globs = []
        for name in (n for n in found if n not in own):
            above = (name[:i] for i, c in enumerate(name) if c == ".")
            free = (p for p in above if not any(n.startswith(f"{p}.") for n in own))
            globs.append(next((f"{p}.**" for p in free), name))
        if globs:
            said.append(f"drop={list(dict.fromkeys(globs))!r}")
        if len(set(globs)) < 10 and said:
            ways.append(" and ".join(said))
    if len(ways) > 1:  # such as the weights and their average
        return f"; {len(ways)} parts of it fit: {', or '.join(ways[:3])}"
    if ways:
        return f"; {ways[0]} makes it fit"
    return "; rename={'old': 'new'} changes the start of names, and strict=False takes what fits"


def _sketched(x: Any) -> np.ndarray:
    """An array of a shape, which takes no memory."""
    return np.broadcast_to(np.zeros((), np.int8), np.shape(x))


def _summed(pairs: list[Pair]) -> list[Pair]:
    """The second bias of torch's recurrent layers added to the first, where they only ever appear
    as their sum."""
    held = {name: (places, value) for places, value, name in pairs}
    for name, (places, value) in list(held.items()):
        if ".bias_hh_" not in name:
            continue
        first = name.replace(".bias_hh_", ".bias_ih_")
        there, other = held[first]
        apart = np.asarray(places) < _FIRST
        held[first] = there, np.where(apart, other + value, other).astype(other.dtype)
        held[name] = places, np.where(apart, 0, value).astype(value.dtype)
    return [(places, value, name) for name, (places, value) in held.items()]


def _found(
    variables: Any, how: Names, path: Path, wrapped: Mapping[str, str | None]
) -> dict[str, np.ndarray]:
    out: dict[str, np.ndarray] = {}
    chosen = _names.chosen(variables, how, path)
    # A checkpoint of an nnx.state, a folder, has the array of a variable under its value.
    boxed = path.is_dir() and all(len(x.new) > 1 and x.new[-1] == "value" for x in chosen)
    for x in chosen:
        x = x._replace(new=x.new[:-1]) if boxed else x
        name = ".".join(x.new)
        own = wrapped.get(name, name)
        counts = x.old[-1].endswith("num_batches_tracked") and not np.shape(x.value)
        if own is not None and not counts and x.old[-1] != _io.EXTRA_STATE:
            _names.put(out, x if own == name else x._replace(new=tuple(own.split("."))), path)
    return out


def _candidates(
    model: Model, path: Path, only: str | None = None, told: dict[str, str] | None = None
) -> list[Candidate]:
    """The names that the architecture's arrays have in each framework, as far as it says so;
    ``told`` gets why they have none in one."""
    out: list[Candidate] = []
    told = {} if told is None else told
    for kind, make in (("torch", _torch), ("Flax", _native), ("Keras", _keras)):
        if only not in (None, kind):
            continue
        try:
            layers = make(model)
        except ConversionError as error:
            told[kind] = str(error)
            continue
        parts = [p for layer in layers if not layer.of for p in (layer, *layer.inner)]
        slots = {
            ".".join(_key(part, key)): np.asarray(value)
            for part in parts
            for key, value in torch_layers.held(part).items()
        }
        out.append((kind, slots))
    if not out:
        raise FileFormatError(f"{path}: {next(iter(told.values()))}")
    return out


def _key(layer: Layer, name: str) -> list[str]:
    """The parts of the name of an array."""
    parts = torch_layers.torch_key(layer, name)
    return [*parts[:-1], *name.split("/")] if parts[-1] == name else parts


def _torch(model: Model) -> list[Layer]:
    net = _flax.read_flax(*model)
    # The names are the same in any dtype, also in one that torch's layers can't compute in.
    net.layers = [dataclasses.replace(x, dtype=None) for x in net.layers]
    try:
        return torch_layers.torch_net(net, "channels_first", arrays_only=True).layers
    except ConversionError:
        if not isinstance(model.module, Graph):
            raise
        # Where no layer proves which axis holds the channels, as in a transformer, none moves.
        return torch_layers.torch_net(net, "source", arrays_only=True).layers


def _native(model: Model) -> list[Layer]:
    return _flax.read_flax(*model).layers


def _keras(model: Model) -> list[Layer]:
    return keras_config.to_keras_net(*model, None, any_dtype=True, arrays_only=True).layers


def _split(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Weights and running statistics, each in order: files list them apart or together."""
    every = list(names)
    stats = {n for n in every if n.rpartition(".")[2] in _STATS}
    return [n for n in every if n not in stats], [n for n in every if n in stats]


def _orders(
    found: Mapping[str, np.ndarray], candidates: list[Candidate], ordered: bool
) -> list[tuple[str, list[Pair]]]:
    """The frameworks whose order of arrays has the shapes of the file's."""
    names = list(found)
    if not ordered:
        # A format that sorts names has an order only if they are numbers within one frame, as a
        # list counts its modules; what counts within a name, up3 or conv1x1, may count anything.
        frames = {re.sub(r"(?<![^.])(arr_)?\d+(?![^.])", "#", n) for n in names}
        if len({n.rpartition(".")[0] or n for n in frames}) > 1:
            return []
        names.sort(key=_tree.natural)
    fitting: list[tuple[str, list[Pair]]] = []
    for kind, slots in candidates:
        pairs: list[Pair] = []
        whole = len(_by_layer(names)) == 1  # a list, in which nothing tells what is a statistic
        sides = [(list(slots), names)] if whole else zip(_split(slots), _split(names), strict=True)
        for mine, theirs in sides:
            ours, others = _by_layer(mine), _by_layer(theirs)
            if len(others) == 1:  # names without layers, such as those of a list
                rest = iter(others[0] if len(theirs) == len(mine) else ())
                others = [list(itertools.islice(rest, len(g))) for g in ours]
            if [len(g) for g in ours] != [len(g) for g in others]:
                break
            for group, held in zip(ours, others, strict=True):
                # Within a layer the names tell, as far as they are the same.
                ends = {n.rpartition(".")[2]: n for n in held}
                same = set(ends) == {n.rpartition(".")[2] for n in group}
                order = [ends[n.rpartition(".")[2]] for n in group] if same else held
                pairs += [(slots[m], found[t], f".{m}") for m, t in zip(group, order, strict=True)]
        else:
            if all(np.shape(places) == value.shape for places, value, _ in pairs):
                fitting.append((kind, pairs))
    return fitting


def _by_layer(names: Iterable[str]) -> list[list[str]]:
    return [list(g) for _, g in itertools.groupby(names, key=lambda n: n.rpartition(".")[0])]


def _in_order(
    found: Mapping[str, np.ndarray], known: Model, path: Path, ordered: bool
) -> list[Pair]:
    why: dict[str, str] = {}
    # The places of its modules: an .npz keeps names as they were given.
    held = list(dict.fromkeys(name.rpartition(".")[0] or name for name in found))
    kept = path.suffix == ".npz" and not ordered
    if kept and held not in (sorted(held), sorted(held, key=_tree.natural)):
        raise FileFormatError(
            f"{path}: match='order': its names stand neither in the order of their numbers nor "
            "sorted, and nothing tells which order is the model's; rename= tells which is which"
        )
    fitting = _orders(found, _candidates(_numbered(known), path, told=why), ordered)
    ends = {name.rpartition(".")[2] for name in found}
    # The names of arrays tell whose they are, where those of layers do not.
    own = [f for f in fitting if ends <= {p[2].rpartition(".")[2] for p in f[1]}]
    if not own and "torch" in why and any(end.startswith("weight") for end in ends):
        fitting = []  # its kernels would stay as torch has them
    fitting = own or fitting
    if fitting and all(_same_places(f[1], fitting[0][1]) for f in fitting):
        return fitting[0][1]
    shapes = [list(v.shape) for v in list(found.values())[:6]]
    said = f"the orders of {' and of '.join(f[0] for f in fitting)} fit, and they differ"
    if not fitting:
        said = f"no framework's order of the architecture's arrays has these shapes: {shapes}, ..."
        said += "".join(f"; {x}'s is not known ({y})" for x, y in why.items())
        if not ordered:
            said += (
                "; the order of this file is not a model's, and only whole numbers between dots, "
                "such as those of 0.weight and 2.weight, tell it"
            )
    raise FileFormatError(f"{path}: match='order': {said}; rename= tells which is which")


def _same_places(one: list[Pair], other: list[Pair]) -> bool:
    """Whether two orders put the same arrays at the same places."""
    return len(one) == len(other) and all(
        a[1] is b[1] and np.array_equal(a[0], b[0]) for a, b in zip(one, other, strict=True)
    )
