"""torch's .pt files: a zip of a pickle and raw storages, read and written without torch."""

import bisect
import itertools
import json
import pickle
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fwt import _nodes
from fwt._errors import refuse
from fwt._types import ConversionError, FileFormatError, Model
from fwt.converters import io as _io
from fwt.converters.files import source as _source
from fwt.converters.files import stored as _stored
from fwt.converters.files import torch_pickle
from fwt.converters.files.torch_pickle import DTYPES, STORAGES
from fwt.converters.io import Budget, Reading, dtype_of, member, nested, opened, reading

_OURS = "fwt.json"  # a member beside torch's own: what a state dict has no place for


def load_torch(path: Path, how: Reading) -> Model:
    """A torch state dict, as weights under torch's own names and in torch's layout; of one in
    several files the index, or the folder that holds it."""
    try:
        return _load(path, how)
    except UnplacedError:
        with _stored.wanted(False):
            return _load(path, how)


def _load(path: Path, how: Reading) -> Model:
    if path.is_dir() or path.name.endswith(".json"):
        return _sharded(path, how)
    with reading(path):
        loaded, ours, there = _loaded(path, how)
        state = _io.under(loaded, how.key, path)
        metadata = getattr(state, "metadata", None)
        return _model(_placed(there, _state(state, path, how)), path, how, ours, metadata)


def _sharded(path: Path, how: Reading) -> Model:
    """The index of a state dict in several files, or the folder that holds one."""
    path = _io.index_in(path, ".bin.index.json")
    with reading(path):
        _io.without_key(path, how)
        where = _io.read_json(path)["weight_map"]
        held: dict[str, np.ndarray] = {}
        for shard in dict.fromkeys(where.values()):
            there = _io.sibling(path, shard)
            loaded, _, places = _loaded(there, how)
            state = _placed(places, _state(loaded, there, how))
            own = {name for name, place in where.items() if place == shard}
            if set(state) != {name for name in own if name in state or not _extra(name)}:
                raise FileFormatError(f"{path}: {shard} holds other names than the index says")
            held |= state
        held = {name: held[name] for name in where if name in held}
        return _model(held, path, how, {}, None)


def _loaded(path: Path, how: Reading) -> tuple[Any, dict[str, Any], "_Places"]:
    """What a file holds, what a file of ours says beside it, and where its tensors stand."""
    _check_kind(path)
    budget = Budget(path, how.max_bytes)
    places = _Places()
    if torch_pickle.is_older(path):
        return torch_pickle.loaded_older(path, budget), {}, places
    with opened(path) as archive:
        names = [n for n in archive.namelist() if n.endswith("/data.pkl")]
        if len(names) != 1:
            raise FileFormatError(f"{path}: expected one data.pkl, found {len(names)}")
        stem, order = names[0][: -len("data.pkl")], b"little"
        if f"{stem}byteorder" in archive.namelist():
            order = bytes(member(archive, f"{stem}byteorder", budget))
            if order not in (b"little", b"big"):
                raise FileFormatError(f"{path}: byte order {order!r}")

        there = _stored.Source(path) if _stored.WANTED.get() and order == b"little" else None

        def stored(name: str, _: int) -> Any:
            full = f"{stem}data/{name}"
            place = None if there is None else _stored.member_at(archive, there, full)
            if there is None:
                return member(archive, full, budget)
            if place is None:
                return places.add(full, member(archive, full, budget))
            return places.add(full, np.zeros(place.stop - place.start, np.uint8), there, place)

        pickled = bytes(member(archive, names[0], budget))
        views = None if there is None else places
        loaded = torch_pickle.loaded(pickled, budget, stored, order == b"big", views)
        ours = {}
        if f"{stem}{_OURS}" in archive.namelist():
            ours = budget.parsed(member(archive, f"{stem}{_OURS}", budget), _OURS)
        return loaded, ours, places


def _placed(places: "_Places", state: dict[str, np.ndarray]) -> dict[str, Any]:
    if not _stored.WANTED.get():
        return state
    if not all(x.flags.writeable for x in state.values()):
        raise UnplacedError("its numbers are others than those that stand there")
    return places.placed(state)


class UnplacedError(FileFormatError):
    """A file has tensors that are not as they stand there, such as conjugated ones."""


class _Storage(NamedTuple):
    """The memory of a storage, and where it stands; None for one that is compressed."""

    name: str
    memory: Any
    source: _stored.Source | None
    place: _stored.Sum | None


class _Places:
    """Where in their file the tensors stand whose memory was not filled."""

    def __init__(self) -> None:
        self._storages: dict[int, _Storage] = {}
        self._starts: list[int] = []
        self.tensors: list[np.ndarray] = []  # as often as the pickle asks for each
        self.resolved: dict[int, Mapping[str, Any]] = {}
        self.outside: list[np.ndarray] = []  # those of other parts than the one that is written

    @property
    def any(self) -> bool:
        """Whether there is a storage."""
        return bool(self._starts)

    def add(self, name: str, memory: Any, source: Any = None, place: Any = None) -> Any:
        """Memory of a storage, which takes none as long as nobody touches it."""
        if len(memory):
            at = _address(np.frombuffer(memory, np.uint8))
            self._storages[at] = _Storage(name, memory, source, place)
            bisect.insort(self._starts, at)
        return memory

    def _of(self, value: np.ndarray) -> _Storage | None:
        at = _address(value)
        index = bisect.bisect_right(self._starts, at) - 1
        found = self._storages[self._starts[index]] if index >= 0 and value.size else None
        return found if found and at < self._starts[index] + len(found.memory) else None

    def storage_of(self, value: np.ndarray) -> str:
        """The name of the storage of a tensor."""
        found = self._of(value)
        return found.name if found else ""

    def place_of(self, name: str) -> _stored.Sum | None:
        """Where a storage stands."""
        return next(x.place for x in self._storages.values() if x.name == name)

    def filled(self, name: str) -> np.ndarray:
        """The bytes of a storage."""
        found = next(x for x in self._storages.values() if x.name == name)
        whole = np.frombuffer(found.memory, np.uint8)
        if found.source is not None and found.place is not None:
            found.source.into(whole, found.place.start)
            if zlib.crc32(whole.data) != found.place.crc:
                raise FileFormatError(
                    f"{found.source.path}: {name} has another checksum than its archive declares"
                )
        return whole

    def placed(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The tensors of a state dict as what stands in the file, where they are so."""
        done: dict[int, Any] = {}  # what is one array stays one
        for value in state.values():
            if id(value) not in done:
                done[id(value)] = self._placed(value)
        return {name: done[id(value)] for name, value in state.items()}

    def _placed(self, value: np.ndarray) -> Any:
        found = self._of(value)
        if found is None:
            return value
        if found.source is None or found.place is None or not value.flags.c_contiguous:
            self.filled(found.name)  # it has strides of its own, or was compressed
            return value.copy()
        at = _address(value) - _address(np.frombuffer(found.memory, np.uint8))
        start = found.place.start + at
        return _stored.InFile(found.source, start, value.shape, value.dtype, found.place)


def _address(value: np.ndarray) -> int:
    found: int = value.__array_interface__["data"][0]
    return found


def _model(
    flat: dict[str, np.ndarray], path: Path, how: Reading, ours: Mapping[str, Any], metadata: Any
) -> Model:
    """Weights alone of these tensors; ``ours`` is what a file of ours says beside."""
    flat = folded(flat, path) if how.fold else flat
    variables = nested(flat, ".", path)
    variables.setdefault("params", {})
    told = _source.checked({n: v for n, v in ours.items() if n != "ordered"})
    if ours.get("ordered", True):
        told["names"] = list(flat)
    told["ties"] = _source.ties(flat)
    told["torch"] = _source.torch_metadata(metadata)
    told["part"] = how.key if isinstance(how.key, str) else None
    return Model(None, _source.with_source(variables, told))


def _check_kind(path: Path) -> None:
    if path.stat().st_size and not zipfile.is_zipfile(path) and not torch_pickle.is_older(path):
        with open(path, "rb") as file:
            head = file.read(512)
        if head[257:262] == b"ustar":
            raise FileFormatError(
                f"{path}: torch's oldest format, a tar archive: save it again with a current "
                "torch.save"
            )
        what = "a pickle that torch.save did not write" if head[:1] == b"\x80" else "no zip archive"
        raise FileFormatError(f"{path}: {what}, so it is no file of torch")


def _state(loaded: Any, path: Path, how: Reading) -> dict[str, np.ndarray]:
    """A dict of tensors. Plain values beside them are left out with a warning, and what is no
    tensor is one of no size where a glob takes it away; for what else a checkpoint may be, the
    error names a way to its tensors."""
    if isinstance(loaded, np.ndarray):
        raise FileFormatError(f"{path}: expected a state dict, found one tensor")
    if not isinstance(loaded, dict):
        raise FileFormatError(
            f"{path}: expected a state dict, found {_kind(loaded)}; save model.state_dict() "
            "instead of the model"
        )
    flat: dict[str, np.ndarray] = {}
    left: list[str] = []
    wrong: list[Any] = []
    tensors = any(isinstance(v, np.ndarray) for v in loaded.values())
    for name, value in loaded.items():
        if name == "_metadata":
            continue
        if isinstance(name, str) and isinstance(value, np.ndarray):
            flat[name] = value
        elif isinstance(name, str) and (gone := _source.left_out(value, how.drop, _place(name))):
            flat |= {".".join(place): x for place, x in gone.items()}
        elif tensors and isinstance(name, str) and (_extra(name) or isinstance(value, _VALUES)):
            left.append(f"{torch_pickle.short(name)} ({_kind(value)})")
        else:
            wrong.append(name)
    if wrong:
        hint = _io.way_to_parts(loaded, how.key, lambda x: isinstance(x, np.ndarray), 1)
        if tensors and all(isinstance(name, str) for name in wrong):
            hint += f"{', or ' if hint else ''}drop={wrong!r} leaves it out"
        raise FileFormatError(
            f"{path}: expected a state dict of tensors, but {torch_pickle.short(wrong[0])} is "
            f"{_kind(loaded[wrong[0]])}; " + (hint or _mixed(loaded, how.key))
        )
    if left:
        more = ", ..." if len(left) > 5 else ""
        warnings.warn(
            f"{path}: left out, since they are no tensors: {', '.join(left[:5])}{more}",
            stacklevel=5,
        )
    return flat


def _mixed(loaded: Mapping[str, Any], key: str | None) -> str:
    """What to say of a checkpoint none of whose parts holds tensors alone."""
    start = "" if key is None else f"{key}/"
    dicts = {n: v for n, v in loaded.items() if isinstance(n, str) and isinstance(v, dict)}
    parts = [f"key={start + n!r}" for n, v in dicts.items()
             if any(isinstance(x, np.ndarray) for x in v.values())]  # fmt: skip
    if not parts:
        return "save model.state_dict() on its own, or pick a part of it with key="
    return f"{' or '.join(parts[:5])} picks a part of it, and drop= leaves out what is no tensor"


def _place(name: str) -> tuple[str, ...]:
    return tuple(name.split("."))


def _extra(name: str) -> bool:
    """Whether a name is of what a module's ``get_extra_state`` gives, which may be anything."""
    return name.rpartition(".")[2] == _io.EXTRA_STATE


_VALUES = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    set,
    frozenset,
    type(None),
)  # which are no weights


def _kind(value: Any) -> str:
    """What a value is, with an article."""
    if isinstance(value, torch_pickle.Unknown):
        return f"a {value.what}"
    if value is None:
        return "None"
    name = type(value).__name__.lstrip("_")
    return f"{'an' if name[:1] in 'aeiouAEIOU' else 'a'} {name}"


def folded(flat: dict[str, np.ndarray], path: Path) -> dict[str, np.ndarray]:
    """With the weights that ``torch.nn.utils.prune``, ``weight_norm``, ``spectral_norm`` and
    ``parametrizations`` compute, in the place of what they compute them from."""
    out: dict[str, np.ndarray] = {}
    done: set[str] = set()
    made: dict[Any, np.ndarray] = {}  # what is computed from the same arrays is one array
    for name in flat:
        if name in done:
            continue
        if ".parametrizations." in f".{name}":
            owner, _, rest = f".{name}".rpartition(".parametrizations.")
            tensor = rest.split(".")[0]
            start = f"{owner}.parametrizations.{tensor}."[1:]
            parts = {
                n.removeprefix(start): np.asarray(v) for n, v in flat.items() if n.startswith(start)
            }
            value, target = _parametrized(parts), f"{owner}.{tensor}"[1:]
            if value is None:
                raise FileFormatError(
                    f"{path}: {start}* computes a weight in a way that the file does not say; "
                    "fold=False keeps its parts"
                )
            done |= {start + n for n in parts}
        else:
            stem, _, suffix = name.rpartition("_")
            parts = {s: np.asarray(flat[f"{stem}_{s}"]) for s in ("orig", "mask", "g", "v", "u")
                     if f"{stem}_{s}" in flat}  # fmt: skip
            target, value = stem, None
            if set(parts) == {"orig", "mask"} and parts["mask"].shape == parts["orig"].shape:
                value = parts["orig"] * parts["mask"].astype(parts["orig"].dtype)
            elif set(parts) == {"g", "v"} and "weight" in stem.rpartition(".")[2]:
                value = _weight_norm(parts["g"], parts["v"])
            elif set(parts) == {"orig", "u", "v"} and "weight" in stem.rpartition(".")[2]:
                value = _spectral_norm(parts["orig"], parts["u"], parts["v"])
                if value is None:
                    raise FileFormatError(
                        f"{path}: {stem}: the file does not say which axis spectral_norm has "
                        "taken; fold=False keeps its parts"
                    )
            if value is None or suffix not in parts:
                out[name] = flat[name]
                continue
            done |= {f"{stem}_{s}" for s in parts}
        if target in flat or target in out:
            raise FileFormatError(f"{path}: {target} stands there twice, computed and plain")
        out[target] = made.setdefault(tuple((n, id(v)) for n, v in parts.items()), value)
    return out


def _parametrized(parts: dict[str, np.ndarray]) -> np.ndarray | None:
    if set(parts) == {"original0", "original1"}:
        return _weight_norm(parts["original0"], parts["original1"])
    if set(parts) == {"original", "0._u", "0._v"}:
        return _spectral_norm(parts["original"], parts["0._u"], parts["0._v"])
    return None


def _weight_norm(g: np.ndarray, v: np.ndarray) -> np.ndarray | None:
    """G v / |v|, over the axes where g has one entry."""
    if g.ndim == 0:
        g = g.reshape((1,) * v.ndim)
    if g.ndim != v.ndim or any(a not in (1, b) for a, b in zip(g.shape, v.shape, strict=True)):
        return None
    axes = tuple(i for i, n in enumerate(g.shape) if n == 1)
    if len(axes) < g.ndim - 1:
        return None  # weight_norm keeps one axis
    wide = v.astype(np.float32) if v.dtype.itemsize < 4 else v
    size = np.sqrt(np.sum(wide * wide, axis=axes, keepdims=True))
    return (wide * (g.astype(wide.dtype) / size)).astype(v.dtype)


def _spectral_norm(w: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray | None:
    """W / (u' w v), the axis of u in front; None if two axes could be that."""
    if u.ndim != 1 or v.ndim != 1 or u.size * v.size != w.size:
        return None
    axes = [a for a in (0, 1) if a < w.ndim and w.shape[a] == u.size]
    if len(axes) != 1:
        return None
    sigma = u @ np.moveaxis(w, axes[0], 0).reshape(u.size, -1) @ v
    return (w / sigma).astype(w.dtype)


def save_torch(file: Any, module: Any, variables: Any, layout: str | None) -> None:
    """A state dict that ``torch.load(weights_only=True)`` takes."""
    if module is None:
        told = _nodes.told_of(variables)
        found = _io.dotted(variables)
        _check_names(variables, found)
        state = _source.tied(_source.in_order(found, told), told)
        beside: dict[str, Any] = {n: told[n] for n in ("safetensors", "index") if n in told}
        if not _source.has_order(state, told):
            beside["ordered"] = False
        metadata = told.get("torch", {})
    else:
        from fwt.converters.frameworks import flax as _flax
        from fwt.converters.frameworks import sidecar as _sidecar
        from fwt.converters.frameworks.torch_layers import torch_key, torch_net, torch_state

        beside, metadata = {}, {}
        net = torch_net(_flax.read_flax(module, variables), layout or "channels_first", True)
        net = _sidecar.restored(net, module, "torch", state=True)
        state = {
            ".".join(torch_key(x, n)): v
            for x in net.layers
            for n, v in torch_state(x).items()
            if not x.of
        }
        rank = {name: i for i, name in enumerate(_sidecar.order(module))}
        state = dict(sorted(state.items(), key=lambda item: rank.get(item[0], len(rank))))
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", _pickled(state, metadata))
        archive.writestr("archive/byteorder", "little")
        for index, value in enumerate(_storages(state).values()):
            _io.add_member(archive, f"archive/data/{index}", value)
        archive.writestr("archive/version", "3\n")
        if beside:
            archive.writestr(f"archive/{_OURS}", json.dumps(beside))


def save_into(file: Any, source: Path, variables: Any) -> None:
    """A torch file with other values of its arrays; all else of it stays as it is, to the byte."""
    with reading(source):
        held, places = views(source, variables)
    new = _io.dotted(variables)
    there, outside = places.placed(held), places.outside
    by_storage: dict[str, list[str]] = {}
    for name, view in held.items():
        by_storage.setdefault(places.storage_of(view), []).append(name)
    changed: dict[int, Any] = {}
    members: dict[str, Any] = {}
    for storage, names in by_storage.items():
        turned = {n: places.resolved[id(held[n])] for n in names if id(held[n]) in places.resolved}
        if turned:
            places.filled(storage)
            there |= {n: torch_pickle.resolved(held[n], told) for n, told in turned.items()}
        others = [n for n in names if not _is_same(there[n], new[n])]
        for name in others:
            if any(np.may_share_memory(held[name], x) for x in outside):
                raise ConversionError(
                    f"{source}: {name} has memory that other parts of the file have too, which "
                    "stay as they are: save it again with copies of its tensors, or write this "
                    "part alone to a .safetensors file"
                )
        if not others:
            continue
        if _are_apart([there[n] for n in names]):
            changed |= {there[n].offset: new[n] for n in others}
            continue
        buffer = places.filled(storage)
        for name in others:
            if name in turned:
                held[name].flags.writeable = True
            value = np.asarray(new[name])
            held[name][...] = (
                torch_pickle.resolved(value, turned[name]) if name in turned else value
            )
        for name in names:
            now = torch_pickle.resolved(held[name], turned[name]) if name in turned else held[name]
            if np.asarray(new[name]).tobytes() != now.tobytes():
                raise ConversionError(
                    f"{source}: {name} is a view of memory that other tensors have too, and can't "
                    "be written alone: save it again with tensor.clone()"
                )
        place = places.place_of(storage)
        if place is None:
            members[storage] = buffer
        else:
            changed[place.start] = buffer
    _stored.copy_archive_with(file, _stored.Source(source), changed, members)


def _is_same(old: Any, new: Any) -> bool:
    in_file = isinstance(old, _stored.InFile) and old.stands_as(new)
    return in_file or _nodes.same_values(old, new) is True


def _are_apart(leaves: Sequence[Any]) -> bool:
    """Whether all of them stand in their file by themselves, or are one."""
    if not all(isinstance(x, _stored.InFile) for x in leaves):
        return False
    spans = sorted({(x.offset, x.offset + x.nbytes) for x in leaves})
    return all(a[1] <= b[0] for a, b in itertools.pairwise(spans))


def views(source: Path, variables: Any) -> tuple[dict[str, np.ndarray], "_Places"]:
    """The tensors of a file by name, as views of storages that are not filled."""
    with _stored.wanted(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what shares memory, which is looked at here
        loaded, _, places = _loaded(source, Reading())
    part = _io.under(loaded, _nodes.told_of(variables).get("part"), source)
    part = part if places.any else {}  # of numbers that are not as in memory
    found = part.items() if isinstance(part, Mapping) else ()
    held = {n: x for n, x in found if isinstance(x, np.ndarray)}
    # What the pickle asks for more often than the part has it, and what stands elsewhere too.
    times = Counter(map(id, held.values()))
    places.outside = [x for x in torch_pickle.elsewhere(loaded, part) if x.size]
    for tensor in places.tensors:
        times[id(tensor)] -= 1
        if times[id(tensor)] < 0:
            places.outside.append(tensor)
    return held, places


def _check_names(variables: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raises for variables whose names joined by dots a reader would take for others."""
    for path in _io.slashed(variables):
        collection, *parts = _io.parts_of_path(path)
        name = ".".join(parts)
        starts = (name[:i] for i, c in enumerate(name) if c == ".")
        above = next((start for start in starts if start in found), None)
        if above is not None:
            raise ConversionError(
                f"{name} would stand under {above}, which is an array too, since torch joins names "
                "by dots: rename one of them, or save them as .safetensors"
            )
        stays = "batch_stats" if name.rpartition(".")[2] in _io.TORCH_STATS else "params"
        if collection != stays:
            raise ConversionError(
                f"{path} would come back in {stays}, since a .pt file of weights alone has no "
                f"collections: its statistics are those named {', '.join(_io.TORCH_STATS)}; give "
                "the module, or save them as .safetensors, .npz or .msgpack"
            )


def _storages(state: Mapping[str, np.ndarray]) -> dict[int, np.ndarray]:
    """The arrays of a state dict by their id, each once."""
    return {id(value): value for value in state.values()}


def _pickled(state: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> bytes:
    """The pickle of an OrderedDict of tensors. Written by hand, since the pickle module imports
    what it names, and torch need not be installed."""
    storages = {dtype_of(d): s for s, d in STORAGES.items()}

    def text(s: str) -> bytes:
        raw = s.encode()
        return b"X" + len(raw).to_bytes(4, "little") + raw

    def number(n: int) -> bytes:
        if n < 1 << 31:
            return b"J" + n.to_bytes(4, "little")
        raw = n.to_bytes(8, "little") + b"\0"
        return b"\x8a" + bytes([len(raw)]) + raw

    out = [b"\x80\x02ccollections\nOrderedDict\n)R"]
    places = {key: index for index, key in enumerate(_storages(state))}
    for name, value in state.items():
        younger = value.dtype.name in DTYPES
        if value.dtype not in storages and not younger:
            raise refuse(name, f"dtype {value.dtype} has no storage in a .pt file")
        strides: list[int] = []
        step = 1
        for size in reversed(value.shape):
            strides.insert(0, step)
            step *= max(size, 1)
        make, kind = b"_rebuild_tensor_v2", b"ctorch\n" + storages.get(value.dtype, "").encode()
        count, end = value.size, b""
        if younger:
            make, kind = b"_rebuild_tensor_v3", b"ctorch.storage\nUntypedStorage"
            count, end = value.nbytes, b"ctorch\n" + value.dtype.name.encode() + b"\n"
        out.append(text(name) + b"ctorch._utils\n" + make + b"\n((")
        out.append(text("storage") + kind + b"\n")
        out.append(text(str(places[id(value)])) + text("cpu") + number(count) + b"tQ" + number(0))
        for numbers in (value.shape, strides):
            out.append(b"(" + b"".join(number(int(n)) for n in numbers) + b"t")
        out.append(b"\x89ccollections\nOrderedDict\n)R" + end + b"tRs")
    if metadata:
        out.append(b"}" + text("_metadata") + b"ccollections\nOrderedDict\n)R")
        for module, entry in metadata.items():  # plain data, which pickle writes without an import
            out.append(text(module) + pickle.dumps(entry, 2)[2:-1] + b"s")
        out.append(b"sb")
    return b"".join([*out, b"."])
