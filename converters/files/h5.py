"""Files of Keras: .keras, .weights.h5, single and sharded, and the older .h5 of Keras 2 and 3."""

import datetime
import io
import json
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict

from fwt._types import ConversionError, FileFormatError, Model
from fwt.converters import io as _io
from fwt.converters.files import h5_names, h5_weights
from fwt.converters.files import stored as _stored
from fwt.converters.files.h5_read import (
    array_of,
    attribute,
    check_start,
    names_in,
    node_at,
    opened_h5,
    opened_member,
    text_of,
    tree_of,
)
from fwt.converters.files.names import Names
from fwt.converters.frameworks import flax as _flax
from fwt.converters.frameworks import keras_2, keras_config, keras_read, keras_whole
from fwt.converters.io import Budget, Reading, member, opened, progress, reading
from fwt.converters.rows import table
from fwt.converters.rows.row import Layer, parts_of, refuse
from fwt.converters.walk import convert, policy
from fwt.converters.walk.net import Net

_BY_NAME = Names()
# The vector of a SpectralNormalization.
_STATE = re.compile(r"(^|/)(vector_u|sn_u)(:\d+)?$")


# -- .keras -----------------------------------------------------------------------------------


def load_keras(path: Path, how: Reading) -> Model:
    """A .keras archive."""
    _io.without_key(path, how)
    return _or_read(lambda: _load_keras(path, how))


def _load_keras(path: Path, how: Reading) -> Model:
    with reading(path):
        budget = Budget(path, how.max_bytes)
        return _converted(*_read(path, how, budget), how, budget)


def _or_read(load: Callable[[], Model]) -> Model:
    """What a function loads, whose arrays may stay in their file unless something is computed of
    them."""
    try:
        return load()
    except _stored.ComputedError:
        with _stored.wanted(False):
            return load()


def _converted(net: Net, whole: Mapping[str, Any], how: Reading, budget: Budget) -> Model:
    made = _flax.write_flax(convert.convert(net, "keras", "flax", "source"))
    if how.sidecar:
        made = keras_config.with_sidecar(made, net, "source", whole)
    if budget.unread is not None:
        made = Model(made.module, budget.unread.placed(made.variables))
    return keras_config.marked(made, net)


def keras_of(path: Path, how: Reading) -> Net:
    """The net of a .keras or .h5 file with its arrays."""
    budget = Budget(path, how.max_bytes)
    if zipfile.is_zipfile(path):
        with _stored.wanted(False):
            return _read(path, how, budget)[0]
    with opened_h5(path, budget) as file:
        net = keras_read.keras_net(legacy_config(file, budget), str(path))
        fill_legacy(net.layers, h5_weights.legacy_arrays(file, budget), path)
    return keras_config.shared(net)


def _read(path: Path, how: Reading, budget: Budget) -> tuple[Net, dict[str, Any]]:
    """The net of a .keras file, and what it says of the model as a whole."""
    with opened(path) as archive:
        config, older = _config_of(archive, budget)
        net = keras_read.keras_net(config, str(path))
        with opened_member(archive, h5_weights.ARRAYS, budget) as file:
            fill_groups(net.layers, h5_weights.weights_of(file, budget), path)
            steps = node_at(file, "optimizer/vars/0", path) if how.sidecar else None
            whole = _whole(config, older, _steps(steps, budget), how)
    return keras_config.shared(net), whole


def _whole(config: Any, older: bool, steps: int, how: Reading) -> dict[str, Any]:
    """What a file says of the model as a whole, for a sidecar."""
    if not how.sidecar:
        return {}
    if older:
        if steps or config.get("compile_config"):
            warnings.warn(
                "what Keras 2 compiled the model with is left out: compile it again",
                stacklevel=5,
            )
        return {}
    return {"config": config, **({"steps": steps} if steps else {})}


def _steps(count: Any, budget: Budget) -> int:
    """How many steps an optimizer has made, by the dataset that counts them."""
    if count is None or getattr(count, "shape", None) != () or count.dtype.kind not in "iu":
        return 0
    return int(array_of(count, "the steps of the optimizer", budget))


def _config_of(archive: zipfile.ZipFile, budget: Budget) -> tuple[Any, bool]:
    """The config of the model in a .keras archive as Keras 3 has it, and whether Keras 2 wrote
    it."""
    text = member(archive, "config.json", budget)
    config = budget.parsed(text, "config.json")
    told: Any = None
    if "metadata.json" in archive.namelist():
        told = budget.parsed(member(archive, "metadata.json", budget), "metadata.json")
    version = told.get("keras_version") if isinstance(told, dict) else None
    if version is None:  # each Keras writes it; the archive was made by another
        version = "2" if b'"batch_input_shape"' in text else "3"
    place = f"{budget.path}: metadata.json"
    return keras_2.modern(config, version, place), keras_2.is_older(version, place)


def save_keras(file: Any, module: Any, variables: Any, layout: str | None) -> None:
    """A .keras archive that real Keras opens."""
    config, layers = keras_whole.written(module, variables)
    _check_own(layers)
    weights = io.BytesIO()
    with h5py.File(weights, "w") as h5:
        write_weights(h5, layers, config["config"]["name"])
    saved = datetime.datetime.now().strftime("%Y-%m-%d@%H:%M:%S")
    with zipfile.ZipFile(file, "w") as archive:
        metadata = {"keras_version": keras_config.KERAS_VERSION, "date_saved": saved}
        archive.writestr("metadata.json", json.dumps(metadata))
        archive.writestr("config.json", json.dumps(config))
        archive.writestr(h5_weights.ARRAYS, weights.getvalue())


def _check_own(layers: list[Layer]) -> None:
    for layer in layers:
        if layer.kind in table.CUSTOM["keras"] or layer.kind == "SelfAttention":
            raise refuse(
                str(layer),
                "only Keras itself can write a class of the user's own to a file",
                "use to_keras, and save what it gives",
            )


def fill_groups(layers: list[Layer], tree: Mapping[str, Any], path: Path) -> set[str]:
    """Gives each layer its arrays, told by its place in the file, and says which groups these are
    of."""
    own = keras_config.opened_up(layers)
    wrong, taken = list[str](), set[str]()
    for layer in own:
        for part, place in keras_config.places(layer, layer.group):
            node, inside = tree, list[str]()
            for name in [*place.split("/"), "vars"]:
                node = node if isinstance(node, Mapping) else {}
                inside.append(name if name in node else name.removeprefix("_"))
                node = node.get(inside[-1], {})
            taken.add("/".join(inside))
            names = keras_config.keras_names(part)
            found = [node.get(str(i)) for i in range(len(node))]
            if len(found) != len(names) or not all(isinstance(v, np.ndarray) for v in found):
                wrong.append(f"{place} of {layer} holds {len(found)} arrays, expected "
                             f"{len(names)} {names}")  # fmt: skip
                continue
            part.arrays = dict(zip(names, found, strict=True))
    if wrong:
        raise FileFormatError(f"{path}: {'; '.join(wrong)[:2000]}")
    keras_config.gathered(own)
    return taken


# -- .weights.h5 ------------------------------------------------------------------------------


def is_keras(path: Path) -> bool:
    """Whether an archive is a .keras one."""
    with opened(path) as archive:
        return "config.json" in archive.namelist()


def _stores(layers: list[Layer]) -> Iterator[tuple[str, str, dict[str, np.ndarray]]]:
    """Group, name and arrays of each layer and of what is in it."""
    for layer in keras_config.opened_up(layers):
        for part, where in keras_config.places(layer, layer.group):
            names = keras_config.keras_names(part)
            held = {str(i): part.arrays[name] for i, name in enumerate(names)}
            yield f"{where}/vars", parts_of(part.name)[-1], held


def write_weights(h5: Any, layers: list[Layer], name: str = "sequential") -> None:
    """The layers of a .weights.h5 file."""
    for where, own, held in _stores(layers):
        group = h5.create_group(where)
        group.attrs["name"] = own
        for index, value in held.items():
            _put(group, index, value)
    h5.create_group("vars").attrs["name"] = name


def _put(group: Any, name: str, value: np.ndarray) -> None:
    if value.dtype.name == "bfloat16":
        dataset = group.create_dataset(name, data=value.view("V2"))
        dataset.attrs["dtype"] = value.dtype.name
    elif hasattr(ml_dtypes, value.dtype.name):
        raise refuse(f"{group.name}/{name}", f"dtype {value.dtype}: Keras has no way to write it")
    else:
        group.create_dataset(name, data=value)


def save_weights(file: Any, module: Any, variables: Any, layout: str | None) -> None:
    """A .weights.h5 file for ``model.load_weights``."""
    layers = keras_config.to_keras_net(module, variables, None, any_dtype=True).layers
    _check_own(layers)
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as h5:
        write_weights(h5, layers)
    file.write(buffer.getbuffer())


def save_weight_shards(folder: Path, module: Any, variables: Any, shard_bytes: int) -> None:
    """A folder of .weights.h5 shards and their .weights.json, for ``model.load_weights``."""
    layers = keras_config.to_keras_net(module, variables, None, any_dtype=True).layers
    _check_own(layers)
    where: dict[str, list[str]] = {}
    number, room, h5 = -1, 0, None
    try:
        for group, own, held in _stores(layers):
            size = sum(v.nbytes for v in held.values())
            if h5 is None or (size > room and room < shard_bytes):
                if h5 is not None:
                    h5.close()
                number, room = number + 1, shard_bytes
                name = f"model_{number:05}.weights.h5"
                h5 = h5py.File(folder / name, "w")
                h5.create_group("vars").attrs["name"] = "sequential"
            made = h5.create_group(group)
            made.attrs["name"] = own
            for index, value in held.items():
                _put(made, index, value)
            room -= size
            progress(size)
            if held:
                where[f"/{group}"] = [name]
    finally:
        if h5 is not None:
            h5.close()
    total = sum(v.nbytes for _, _, held in _stores(layers) for v in held.values())
    told = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.weights.json").write_text(json.dumps(told, indent=4))


# -- arrays alone, into a copy of their file ---------------------------------------------------


def save_into(file: Any, source: Path, variables: Any) -> None:
    """The file that arrays alone come from, with these in place of its own. All else in it, such
    as its model and the state of an optimizer, stays as it is."""
    if not zipfile.is_zipfile(source):
        file.write(_with_arrays(source, source, Budget(source), variables))
        return
    with reading(source), opened(source) as archive:
        names, budget = archive.namelist(), Budget(source)
        weights = member(archive, h5_weights.ARRAYS, budget, check_start)
        new = _with_arrays(source, weights, budget, variables)
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as copy:
            for name in names:
                own = name == h5_weights.ARRAYS
                info = archive.getinfo(name)
                copy.writestr(info, new if own else bytes(member(archive, name, budget)))
    file.write(buffer.getbuffer())


def _with_arrays(source: Path, data: Path | bytearray, budget: Budget, variables: Any) -> Any:
    """The bytes of an HDF5 file, or of one in an archive, with these arrays."""
    wanted = {
        (collection, *_io.parts_of_path(path)): value
        for collection, tree in variables.items()
        for path, value in _io.arrays(collection, tree).items()
    }
    with reading(source), opened_h5(data, budget) as read:
        own = _places(read, budget)
    wrong = sorted(own.keys() ^ wanted.keys())
    wrong += [n for n in sorted(own.keys() & wanted) if own[n][1].shape != wanted[n].shape]
    if wrong:
        name = "/".join(wrong[0][1:])
        raise ConversionError(
            f"{source}: {name} is not in both, or of another shape: source= is the file that these "
            "weights come from, read without key="
        )
    buffer = io.BytesIO(data if isinstance(data, bytearray) else data.read_bytes())
    with h5py.File(buffer, "r+") as h5:
        for path, value in wanted.items():
            place, before = own[path]
            if value.dtype != before.dtype:
                above, _, last = place.rpartition("/")
                del h5[place]
                _put(h5[above] if above else h5, last, value)
            elif value.tobytes() != before.tobytes():
                held = h5[place]
                held[...] = value.view(held.dtype) if held.dtype.kind == "V" else value
    return buffer.getbuffer()


def _places(file: Any, budget: Budget) -> dict[tuple[str, ...], tuple[str, np.ndarray]]:
    """The arrays of a file, by what :func:`load` calls them alone, and their places."""
    above = "" if node_at(file, h5_weights.WHOLE, budget.path) is None else f"{h5_weights.WHOLE}/"
    if above or any(name in file.attrs for name in ("layer_names", "layer_names0")):
        return {
            ("params", layer, *name.split("/")): (f"{above}{layer}/{name}", value)
            for layer, held in h5_weights.legacy_arrays(file, budget).items()
            for name, value in held
        }
    raw = tree_of(file, budget, without="optimizer")
    place = {id(value): "/".join(parts) for parts, value in flatten_dict(raw).items()}
    tree = h5_weights.modern(raw, str(budget.path))
    return {
        ("params", *parts): (place[id(value)], value) for parts, value in flatten_dict(tree).items()
    }


# -- the older .h5 ----------------------------------------------------------------------------


def load_legacy(path: Path, how: Reading) -> Model:
    """An .h5 file of Keras 2 or 3 that holds a model."""
    _io.without_key(path, how)
    return _or_read(lambda: _load_legacy(path, how))


def _load_legacy(path: Path, how: Reading) -> Model:
    budget = Budget(path, how.max_bytes)
    with reading(path), opened_h5(path, budget, stay=True) as file:
        config, held = legacy_config(file, budget), h5_weights.legacy_arrays(file, budget)
        net = keras_read.keras_net(config, str(path))
        fill_legacy(net.layers, held, path)
        whole = _legacy_whole(file, config, how, budget)
        return _converted(keras_config.shared(net), whole, how, budget)


def _legacy_whole(file: Any, config: Any, how: Reading, budget: Budget) -> dict[str, Any]:
    """What an .h5 file says of the model as a whole, for a sidecar."""
    if not how.sidecar:
        return {}
    text = attribute(file, "training_config", budget)
    training = None if text is None else budget.parsed(text_of(text), "training_config")
    older = keras_2.is_older(_legacy_version(file, budget), str(budget.path))
    group = node_at(file, "optimizer_weights", budget.path)
    names = names_in(group, "weight_names", budget) if group is not None else None
    first = next((n for n in names or () if "iteration" in n.rpartition("/")[2]), None)
    steps = node_at(group, first, budget.path) if first is not None else None
    whole = keras_whole.from_legacy(config, training)
    return _whole(whole, older, _steps(steps, budget), how)


def _legacy_version(file: Any, budget: Budget) -> str:
    # Before 2.0.7 it stood nowhere.
    return text_of(attribute(file, "keras_version", budget)) or "2"


def fill_from_legacy(layers: list[Layer], path: Path, how: Reading, named: Names) -> None:
    """Fills layers from an .h5 file."""
    budget = Budget(path, how.max_bytes)
    with reading(path), opened_h5(path, budget) as file:
        fill_legacy(layers, h5_weights.legacy_arrays(file, budget), path, named)


def fill_from_groups(layers: list[Layer], tree: Any, path: Path, named: Names) -> None:
    """Fills layers from the groups of a weights file."""
    own = keras_config.opened_up(layers)
    own = [x for x in own if any(map(keras_config.keras_names, _parts_of(x)))]
    tree = h5_names.groups(tree, [x.group for x in own], named, path)
    h5_names.check_taken(tree, fill_groups(layers, tree, path), path)


def _parts_of(layer: Layer) -> list[Layer]:
    return [part for part, _ in keras_config.places(layer, "")]


def legacy_config(file: Any, budget: Budget) -> Any:
    """The config of the model in an .h5 file as Keras 3 has it, or None."""
    text = attribute(file, "model_config", budget)
    if text is None:
        return None
    config = budget.parsed(text_of(text), "model_config")
    return keras_2.modern(config, _legacy_version(file, budget), str(budget.path))


def fill_legacy(
    layers: list[Layer], held: h5_names.Held, path: Path, named: Names = _BY_NAME
) -> None:
    """Gives each layer its arrays, told by the names of layer and variable."""
    own = keras_config.opened_up(layers)
    wanted: dict[str, list[tuple[Layer, Layer]]] = {}
    for layer in own:
        wanted.setdefault(parts_of(layer.name)[0], []).extend((layer, p) for p in _parts_of(layer))
    held = h5_names.renamed(held, named, path)
    tops = [
        top
        for top, inside in wanted.items()
        if any(keras_config.keras_names(part) for _, part in inside)
    ]
    if named.match == "order":
        held = h5_names.in_order(held, tops, path)
    h5_names.check_names(held, tops, wanted, path)
    for top, stored in held.items():
        expected = [
            (outer, part, name)
            for outer, part in wanted.pop(top, [])
            for name in keras_config.keras_names(part)
        ]
        # Of no use but in training.
        spectral = any(outer.kind == "SpectralNormalization" for outer, _, _ in expected)
        found = [f for f in stored if not (spectral and _STATE.search(f[0]))]
        if len(found) != len(expected):
            names = [name for _, _, name in expected]
            raise FileFormatError(
                f"{path}: {top} holds {len(found)} arrays {[n for n, _ in found]}, expected "
                f"{len(names)} {names}"
            )
        nested = any(len(parts_of(outer.name)) > 1 for outer, _, _ in expected)
        for index, (place, value) in enumerate(found):
            names = place.split("/")
            if nested:  # its weights are in an order of their own: the names tell
                fits = [
                    e
                    for e in expected
                    if f"/{parts_of(e[0].name)[-1]}/" in f"/{place}" and _ends(e, names[-1])
                ]
            else:
                fits = [e for e in expected[index : index + 1] if _ends(e, names[-1])]
            if len(fits) > 1:  # the parts of one layer
                fits = [e for e in fits if f"/{e[1].name}/" in f"/{place}"]
            if len(fits) != 1 or fits[0][2] in fits[0][1].arrays:
                raise FileFormatError(f"{path}: {top}: {place} belongs to no layer, or to several")
            fits[0][1].arrays[fits[0][2]] = value
    keras_config.gathered(own)


def _ends(expected: tuple[Layer, Layer, str], last: str) -> bool:
    """Whether the last part of a name in a file is that of the array, but for the :0 of Keras 2."""
    _, part, name = expected
    last = keras_2.array_name(part.kind, re.sub(r":\d+$", "", last))
    return name.split("/")[-1] == last


def save_legacy(file: Any, module: Any, variables: Any, layout: str | None) -> None:
    """An .h5 file of a whole model, as Keras 3 writes it."""
    config, layers = keras_whole.written(module, variables)
    _check_own(layers)
    for layer in layers:
        if layer.kind.startswith("ops."):
            raise refuse(str(layer), "Keras can't read an operation in an .h5 file",
                         "save a .keras one")  # fmt: skip
    if "bfloat16" in policy.held(layers):
        raise ConversionError("Keras can't read bfloat16 weights in an .h5 file: save a .keras one")
    told, training = keras_whole.to_legacy(config)
    rest = keras_whole.frozen(config)
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as h5:
        version = {"keras_version": keras_config.KERAS_VERSION, "backend": "jax"}
        h5.attrs.update({**version, "model_config": json.dumps(told)})
        if training is not None:
            h5.attrs["training_config"] = json.dumps(training)
        root = h5.create_group("model_weights")
        root.attrs.update(version)
        tops: dict[str, list[Layer]] = {}
        # Keras reads the arrays in the order of the layers in the config.
        place = {name: i for i, name in enumerate(keras_read.groups(config))}
        for layer in sorted(keras_config.opened_up(layers), key=lambda x: place[x.name]):
            tops.setdefault(parts_of(layer.name)[0], []).append(layer)
        _put_names(root, "layer_names", list(tops))
        for top, inside in tops.items():
            entries = [
                (f"{config['config']['name']}/{name}", value, layer.name in rest or at_rest)
                for layer in inside
                for name, value, at_rest in _legacy_entries(layer)
            ]
            # Keras lists the weights of a model within a model with those that it trains first.
            entries.sort(key=lambda e: e[2])
            group = root.create_group(top)
            _put_names(group, "weight_names", [name for name, _, _ in entries])
            for name, value, _ in entries:
                group.create_dataset(name, data=value)
        _put_names(root.create_group("top_level_model_weights"), "weight_names", [])
    file.write(buffer.getbuffer())


def _legacy_entries(layer: Layer) -> Iterator[tuple[str, np.ndarray, bool]]:
    """Name, value, and whether it is not trained."""
    rests = ("moving_mean", "moving_variance", "mean", "variance", "count")
    for part, where in keras_config.places(layer, "/".join(parts_of(layer.name))):
        for name in keras_config.keras_names(part):
            at_rest = name in rests or part.settings.get("trainable") is False
            yield f"{where}/{name}", part.arrays[name], at_rest


def _put_names(group: Any, name: str, names: list[str]) -> None:
    """HDF5 holds attributes of up to 64 kB: a longer list is cut in pieces."""
    raw = [n.encode() for n in names]
    long = max((len(n) for n in raw), default=1)
    if long > 60_000:
        raise ConversionError(f"{names[0]:.60}...: a name of more than 60,000 bytes")
    each = max(60_000 // long, 1)
    if len(raw) <= each:
        group.attrs[name] = np.array(raw, dtype=f"S{long}") if raw else np.zeros(0)
        return
    for index, start in enumerate(range(0, len(raw), each)):
        group.attrs[f"{name}{index}"] = np.array(raw[start : start + each], dtype=f"S{long}")
