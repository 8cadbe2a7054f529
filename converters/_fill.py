"""Weights from a file into an architecture from elsewhere, every name and shape checked."""

import itertools
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from fwt.converters import _architecture, _convert, _flax, _h5, _io, _keras_file, _torch_layers
from fwt.converters._row import Layer, parts_of

from fwt import _tree
from fwt._sequential import Sequential
from fwt._types import ConversionError, FileFormatError, Model

_FIRST = 1 << 40
# What an array is called, with the numbers of its weights; and these with its values.
Candidate = tuple[str, dict[str, np.ndarray]]
Pair = tuple[np.ndarray, np.ndarray, str]
_STATS = ("running_mean", "running_var", "mean", "var", "moving_mean", "moving_variance")


def known_layers(architecture: Any, load: Callable[[Path], Model]) -> tuple[Model | None, Any]:
    """An architecture as a model, and its Keras config where it has one."""
    if isinstance(architecture, Model):
        return architecture, None
    if isinstance(architecture, Sequential):
        return Model(architecture, _shapes(architecture)), None
    keras, torch = sys.modules.get("keras"), sys.modules.get("torch")
    if keras is not None and isinstance(architecture, keras.Model):
        from fwt.converters import _keras

        return _keras.from_keras(architecture), _keras.config_of(architecture)
    if torch is not None and isinstance(architecture, torch.nn.Module):
        from fwt.converters import _torch

        return _torch.from_torch(architecture), None
    path = Path(architecture)
    if path.suffix == ".json":
        with _io.reading(path):
            config = _io.read_json(path)
            version = str(config.get("keras_version", "3"))
            return None, _h5.modern(config, version)
    model = load(path)
    if model.module is None:
        raise FileFormatError(f"{path}: it holds weights only, so it is no architecture")
    return model, _h5.config_in(path)


def _shapes(module: Sequential) -> Any:
    if module.input_shape is None or None in module.input_shape:
        raise ConversionError(
            "an architecture without variables needs all its sizes: Sequential(layers, "
            "input_shape=(6, 5, 3))"
        )
    key = jax.eval_shape(lambda: jax.random.key(0))
    x = jax.ShapeDtypeStruct((1, *module.input_shape), np.float32)
    shapes = jax.eval_shape(module.init, key, x)
    # Zeros that take no memory.
    return jax.tree.map(lambda s: np.broadcast_to(np.zeros((), s.dtype), s.shape), shapes)


def filled(
    model: Model,
    architecture: Any,
    path: Path,
    fill_keras: Callable[[list[Layer]], None] | None,
    load: Callable[[Path], Model],
    rename: Mapping[str, str] | None,
    match: str,
) -> Model:
    """The architecture with the weights of a file that has names only."""
    with _io.reading(path):
        known, config = known_layers(architecture, load)
        if fill_keras is not None:
            return _filled_keras(known, config, path, fill_keras)
        if known is None:
            raise FileFormatError(
                f"{architecture}: a config alone has no shapes: give a .keras file, or build the "
                "model"
            )
        return _filled_by_name(model, known, path, rename or {}, match)


def _filled_keras(
    known: Model | None, config: Any, path: Path, fill: Callable[[list[Layer]], None]
) -> Model:
    if config is not None:
        layers, shape = _keras_file.keras_layers(config, str(path))
        fill(layers)
        new, found = _convert.convert(layers, "keras", "flax", shape, "source")
        return _flax.write_flax(new, found)
    assert known is not None
    numbered = _numbered(known)
    layers, _ = _keras_file.to_keras_layers(*numbered, None, any_dtype=True)
    places: dict[tuple[str, str], np.ndarray] = {}
    for part in (p for layer in layers for p in (layer, *layer.inner)):
        places |= {(part.name, n): v for n, v in part.arrays.items()}
        part.arrays = {}
    fill(layers)
    held = {(p.name, n): v for x in layers for p in (x, *x.inner) for n, v in p.arrays.items()}
    wrong = [
        f"{name}/{n} is {list(v.shape)}, expected {list(np.shape(places.get((name, n), 0)))}"
        for (name, n), v in held.items()
        if np.shape(places.get((name, n), 0)) != v.shape
    ]
    if wrong or set(held) != set(places):
        raise FileFormatError(f"{path}: it does not fit the architecture: {_some(wrong)}")
    return _put([(places[key], held[key], str(key)) for key in places], known, path)


def _numbered(known: Model) -> Model:
    """The model with the numbers from _FIRST on instead of its weights: what a conversion does
    with them tells where each weight goes; smaller ones are constants of the conversion's own."""
    count = _FIRST

    def number(x: Any) -> np.ndarray:
        nonlocal count
        shape = np.shape(x)
        size = int(np.prod(shape))
        out = np.arange(count, count + size, dtype=np.int64).reshape(shape)
        count += size
        return out

    return Model(known.module, jax.tree.map(number, dict(known.variables)))


def _put(pairs: list[tuple[np.ndarray, np.ndarray, str]], known: Model, path: Path) -> Model:
    """The weights at the places that the numbers say."""
    flat, tree = jax.tree.flatten(_numbered(known).variables)
    sizes = [x.size for x in flat]
    ends = np.cumsum([0, *sizes])
    filled: list[np.ndarray | None] = [None] * len(flat)
    for places, value, name in pairs:
        places = np.asarray(places)
        where, values = places.reshape(-1), value.reshape(-1)
        ours = where >= _FIRST
        if np.any(values[~ours] != where[~ours]):  # such as zeros beside the blocks of groups
            raise FileFormatError(
                f"{path}: {name} holds other numbers than {np.unique(where[~ours])[:3]}, which "
                "the architecture has fixed there"
            )
        where, values = where[ours] - _FIRST, values[ours]
        owners = np.searchsorted(ends, where, side="right") - 1
        for owner in np.unique(owners):
            mine = owners == owner
            there = filled[owner]
            if there is None:
                there = filled[owner] = np.zeros(sizes[owner], value.dtype)
            if there.dtype != value.dtype:
                raise FileFormatError(f"{path}: {name} is {value.dtype}, beside {there.dtype}")
            there[where[mine] - ends[owner]] = values[mine]
    numbers = np.concatenate([np.ravel(p) for p, _, _ in pairs] or [np.zeros(0, int)])
    counts = np.bincount(numbers[numbers >= _FIRST] - _FIRST, minlength=ends[-1])
    if np.any(counts != 1):
        raise FileFormatError(f"{path}: this architecture can't be filled by names: build it in "
                              "its framework and convert it")  # fmt: skip
    leaves = [np.zeros(x.shape, np.float32) if v is None else v.reshape(x.shape)
              for x, v in zip(flat, filled, strict=True)]  # fmt: skip
    return _architecture.checked(known.module, jax.tree.unflatten(tree, leaves))


def _filled_by_name(
    model: Model, known: Model, path: Path, rename: Mapping[str, str], match: str
) -> Model:
    if match not in ("name", "order"):
        raise FileFormatError(f"match must be 'name' or 'order', found {match!r}")
    found = _found(model.variables, rename, path)
    candidates = _candidates(known, path)
    if match == "order":
        pairs = _in_order(found, candidates, path)
    else:
        kind, slots = max(candidates, key=lambda c: len(set(c[1]) & set(found)))
        wrong = [
            f"{n} is {list(found[n].shape)}, expected {list(slots[n].shape)}"
            for n in slots
            if n in found and slots[n].shape != found[n].shape
        ]
        told = {
            "missing": [n for n in slots if n not in found],
            "unexpected": [n for n in found if n not in slots],
            "of another shape": wrong,
        }
        if any(told.values()):
            said = [f"{what}: {_some(names)}" for what, names in told.items() if names]
            hint = "rename={'old': 'new'} changes the start of names"
            if _orders(found, candidates):
                hint += ", and match='order' takes them in the file's order, whose shapes fit"
            raise FileFormatError(
                f"{path}: it does not fit the architecture by {kind}'s names: {'; '.join(said)}; "
                f"{hint}"
            )
        pairs = [(slots[n], found[n], n) for n in slots]
    return _put(_summed(pairs), known, path)


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


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more


def _found(variables: Any, rename: Mapping[str, str], path: Path) -> dict[str, np.ndarray]:
    out: dict[str, np.ndarray] = {}
    used: set[str] = set()
    for name, value in _in_file_order(variables):
        if name.endswith("num_batches_tracked") and not np.shape(value):
            continue
        for old, new in rename.items():
            if name == old or name.startswith(f"{old}."):
                name = (new + name[len(old) :]).lstrip(".")
                used.add(old)
                break
        if name in out:
            raise FileFormatError(f"{path}: two arrays are named {name!r}")
        out[name] = value
    if left := [old for old in rename if old not in used]:
        near = _tree.near(left[0], list(out))
        raise FileFormatError(f"{path}: rename: no name starts with {left[0]!r}{near}")
    return out


def _in_file_order(variables: Any) -> list[tuple[str, np.ndarray]]:
    def under(node: Any, name: tuple[str, ...]) -> Any:
        for key, value in node.items():
            if isinstance(value, Mapping):
                yield from under(value, (*name, key))
            else:
                yield ".".join((*name, key)), value

    return [pair for tree in variables.values() for pair in under(tree, ())]


def _candidates(known: Model, path: Path) -> list[Candidate]:
    """The names that the architecture's arrays have in each framework, as far as it says so, with
    the numbers of their weights."""
    numbered = _numbered(known)
    out: list[Candidate] = []
    told: list[str] = []
    for kind, make in (("torch", _torch), ("Flax", _native), ("Keras", _keras)):
        try:
            layers = make(numbered)
        except ConversionError as error:
            told.append(str(error))
            continue
        parts = [p for layer in layers for p in (layer, *layer.inner)]
        slots = {
            ".".join([*parts_of(part.name), *key.split("/")]): np.asarray(value)
            for part in parts
            for key, value in part.arrays.items()
        }
        out.append((kind, slots))
    if not out:
        raise FileFormatError(f"{path}: {told[0]}")
    return out


def _torch(model: Model) -> list[Layer]:
    layers = _flax.read_flax(*model)
    new, _ = _convert.convert(layers, "flax", "torch", model.module.input_shape, "channels_first")
    return _torch_layers.fold_torch(new)


def _native(model: Model) -> list[Layer]:
    return _flax.read_flax(*model)


def _keras(model: Model) -> list[Layer]:
    return _keras_file.to_keras_layers(*model, None, any_dtype=True)[0]


def _split(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Weights and running statistics, each in order: files list them apart or together."""
    every = list(names)
    stats = {n for n in every if n.rpartition(".")[2] in _STATS}
    return [n for n in every if n not in stats], [n for n in every if n in stats]


def _orders(
    found: Mapping[str, np.ndarray], candidates: list[Candidate]
) -> list[tuple[str, list[Pair]]]:
    """The frameworks whose order of arrays has the shapes of the file's."""
    fitting = []
    for kind, slots in candidates:
        pairs: list[Pair] = []
        for mine, theirs in zip(_split(slots), _split(found), strict=True):
            ours, others = _by_layer(mine), _by_layer(theirs)
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
    found: Mapping[str, np.ndarray], candidates: list[Candidate], path: Path
) -> list[Pair]:
    fitting = _orders(found, candidates)
    ends = {name.rpartition(".")[2] for name in found}
    # The names of arrays tell whose they are, where those of layers do not.
    own = [f for f in fitting if ends <= {p[2].rpartition(".")[2] for p in f[1]}]
    fitting = own or fitting
    if len(fitting) != 1:
        shapes = [list(v.shape) for v in list(found.values())[:6]]
        said = f"the orders of {' and of '.join(f[0] for f in fitting)} fit, and they differ"
        if not fitting:
            said = f"no framework's order of the architecture's arrays has these shapes: {shapes}"
        raise FileFormatError(f"{path}: match='order': {said}, ...")
    return fitting[0][1]
