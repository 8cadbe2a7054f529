"""What a Flax model has no place for, kept as text beside it for the way back.

torch's second bias of a recurrent layer, counters, seeds, and what matters only in training. Files
that say what the layers are hold it too. Weights that were changed since are not overruled: arrays
come back only where those that they stand for are the same bits.
"""

import base64
import contextlib
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from fwt._types import ConversionError, Model
from fwt.converters.io import dtype_of
from fwt.converters.rows.row import STATE, Framework, Layer, is_training
from fwt.converters.walk.net import Net

# Settings that change nothing that a model computes.
_KEPT = {
    "torch": ("momentum", "padding_idx", "norm_type", "scale_grad_by_freq", "sparse", "dropout"),
    "keras": (*("dropout", "recurrent_dropout", "implementation", "unroll", "use_cudnn"),
              *("unit_forget_bias", "synchronized", "renorm", "zero_output_for_mask")),
    "flax": (),
}  # fmt: skip


def with_sidecar(
    model: Model,
    layers: Sequence[Layer],
    framework: Framework,
    back: Callable[[Model], Net],
    forth: Callable[[Net], Model],
    whole: Mapping[str, Any] | None = None,
) -> Model:
    """The model with a sidecar: what its layers lose on the way ``forth`` and ``back``, and
    ``whole``, what a file says of the model as a whole."""
    try:
        returned = dict(_all(back(model).layers))
    except ConversionError:
        return model  # there is no way back
    kept: dict[str, Any] = {}
    for name, layer in _all(layers):
        there = returned.get(name)
        if there is None or not _comes_back(layer.kind, there.kind):
            continue
        entry: dict[str, Any] = {}
        settings = {
            key: value
            for key, value in layer.settings.items()
            if (is_training(framework, key) or key in _KEPT[framework])
            and key != "name"
            and _differs(there.settings.get(key), value)
        }
        if settings:
            entry["settings"] = settings
        arrays = {n: v for n, v in layer.arrays.items() if n not in STATE[framework]
                  and not same_bits(v, there.arrays.get(n))}  # fmt: skip
        # Where the layer comes back as another of the same class, so do its arrays.
        theirs: Any = there.arrays
        if arrays and all(v.shape == np.shape(theirs.get(n)) for n, v in arrays.items()):
            entry |= {"arrays": {n: _packed(v) for n, v in arrays.items()}, "of": _digest(there)}
        state = {n: _packed(v) for n, v in layer.arrays.items() if n in STATE[framework]}
        if state:
            entry["state"] = state
            if _fresh(layer):
                entry["fresh"] = True
        if entry or there.kind != layer.kind:
            kept[name] = {"kind": layer.kind, **entry}
    if not kept and not whole:
        return model
    made = _with(model, framework, kept, whole)
    if any("arrays" in entry for entry in kept.values()) and not _gives(
        made, framework, back, forth
    ):
        # The layers around have changed, and these arrays are not in the order of the new ones.
        made = _with(model, framework, {n: {k: v for k, v in entry.items() if k != "arrays"}
                                        for n, entry in kept.items()}, whole)  # fmt: skip
    return made


def _with(model: Model, framework: Framework, kept: dict[str, Any], whole: Any) -> Model:
    told = {"framework": framework, "layers": kept, **({"whole": whole} if whole else {})}
    found = orders(model.module)
    text = json.dumps(told | ({"orders": found} if found else {}), sort_keys=True)
    return Model(model.module.clone(sidecar=text), model.variables)


def _gives(
    model: Model,
    framework: Framework,
    back: Callable[[Model], Net],
    forth: Callable[[Net], Model],
) -> bool:
    """Whether the layers that the sidecar restores are those of the same model, bit for bit."""
    try:
        net = restored(back(model), model.module, framework, state=False)
        found = jax.tree.leaves_with_path(forth(net).variables)
    except (ConversionError, KeyError):  # layers that are only written are not all read again
        return False
    wanted = dict(jax.tree.leaves_with_path(model.variables))
    return len(found) == len(wanted) and all(same_bits(v, wanted.get(path)) for path, v in found)


def restored(net: Net, module: Any, framework: Framework, state: bool) -> Net:
    """The net of the way back with what the module's sidecar holds of them."""
    with _trusted():
        told = _told(module, framework)
        if told:
            _restore(net.layers, told["layers"], framework, state)
    return net


def without(module: Any, setting: str) -> Any:
    """The module whose sidecar holds no such setting of any layer."""
    with _trusted():
        told = json.loads(getattr(module, "sidecar", "") or "{}")
        for entry in told.get("layers", {}).values():
            entry.get("settings", {}).pop(setting, None)
        return module.clone(sidecar=json.dumps(told, sort_keys=True)) if told else module


def whole(module: Any, framework: Framework) -> dict[str, Any]:
    """What the module's sidecar holds of the model as a whole."""
    with _trusted():
        return dict(_told(module, framework).get("whole", {}))


def order(module: Any) -> list[str]:
    """The names of a state dict of torch in the order that the module's sidecar holds, if any."""
    found = whole(module, "torch").get("order", [])
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise ConversionError("the sidecar's order is no list of names; module.clone(sidecar='') "
                              "drops it")  # fmt: skip
    return found


def orders(module: Any) -> dict[str, tuple[int, ...] | None]:
    """The orders that :func:`with_orders` put there."""
    with _trusted():
        found = _told(module, "torch").get("orders", {})
        out = {name: None if dims is None else tuple(dims) for name, dims in found.items()}
        if any(dims and sorted(dims) != list(range(len(dims))) for dims in out.values()):
            raise ValueError("an order of axes")
        return out


def with_orders(
    model: Model,
    wanted: Mapping[str, tuple[int, ...] | None],
    back: Callable[[Model], Sequence[Mapping[str, Any]]],
) -> Model:
    """The model, which knows in which order torch had the axes that weights count, where the way
    ``back`` would bring them in another: of each way it says the order by layer."""

    def apart(model: Model) -> set[str]:
        return {name for found in back(model) for name, dims in wanted.items()
                if dims is not None and [*np.argsort(found.get(name, ()))] != [*dims]}  # fmt: skip

    if not wanted or not apart(model):
        return model

    def telling(wanted: Mapping[str, Any]) -> Model:
        told = {"framework": "torch", "layers": {}, "orders": wanted}
        text = json.dumps(told, sort_keys=True)
        return Model(model.module.clone(sidecar=text), model.variables)

    lost = apart(telling(wanted))
    return telling({name: None if name in lost else dims for name, dims in wanted.items()})


def _told(module: Any, framework: Framework) -> dict[str, Any]:
    """What the sidecar says, if it is of this framework."""
    text = getattr(module, "sidecar", "")
    told = json.loads(text) if text else {"framework": framework, "layers": {}}
    return told if told["framework"] == framework else {}


@contextlib.contextmanager
def _trusted() -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, zlib.error) as error:
        raise ConversionError(
            f"the sidecar is none of ours ({error!r:.100}); module.clone(sidecar='') drops it"
        ) from error


def _restore(layers: list[Layer], told: dict[str, Any], framework: Framework, state: bool) -> None:
    for name, layer in _all(layers):
        entry = told.get(name)
        if entry is None or not _comes_back(entry["kind"], layer.kind):
            continue
        layer.kind = entry["kind"]
        same = "arrays" in entry and entry["of"] == _digest(layer)
        for key, value in entry.get("settings", {}).items():
            if not (is_training(framework, key) or key in _KEPT[framework]):
                raise ConversionError(f"the sidecar sets {key!r} of {name}, which is no business "
                                      "of a sidecar")  # fmt: skip
            layer.settings[key] = value
        if same:
            layer.arrays |= {
                n: _unpacked(v, layer.arrays[n].size) for n, v in entry["arrays"].items()
            }
        if state:
            held = {n: _unpacked(v, 64) for n, v in entry.get("state", {}).items()}
            if _fresh(layer) and not entry.get("fresh"):  # it was reset, and so is what it counts
                held.pop("num_batches_tracked", None)
            layer.arrays |= held


def _comes_back(kind: str, found: str) -> bool:
    """Whether a layer can be given back as the class that it was."""
    return kind == found or (kind == "SyncBatchNorm" and found.startswith("BatchNorm"))


def _fresh(layer: Layer) -> bool:
    """Whether a norm of torch has the running statistics of a new one."""
    mean, var = (layer.arrays.get(f"running_{n}") for n in ("mean", "var"))
    return mean is not None and var is not None and bool((mean == 0).all() and (var == 1).all())


def _all(layers: Sequence[Layer], inside: str = "") -> Iterator[tuple[str, Layer]]:
    for index, layer in enumerate(layers):
        if layer.of:
            continue
        name = f"{inside}{index if inside else layer.name}"
        yield name, layer
        yield from _all(layer.inner, f"{name}>")


def _differs(there: Any, value: Any) -> bool:
    try:
        return json.dumps(there) != json.dumps(value)
    except TypeError:
        return False  # what JSON can't hold is left


def same_bits(a: np.ndarray, b: Any) -> bool:
    """Whether two arrays are one in dtype, shape and bits."""
    return b is not None and a.dtype == b.dtype and a.shape == b.shape and (
        a.tobytes() == b.tobytes()
    )  # fmt: skip


def _digest(layer: Layer) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(layer.arrays.items()):
        digest.update(f"{name} {value.dtype} {value.shape} ".encode() + value.tobytes())
    return digest.hexdigest()


def _packed(value: np.ndarray) -> list[Any]:
    data = base64.b85encode(zlib.compress(np.ascontiguousarray(value).tobytes())).decode()
    return [value.dtype.name, list(value.shape), data]


def _unpacked(told: Any, most: int) -> np.ndarray:
    name, shape, data = told
    dtype = dtype_of(name)
    count = int(np.prod(shape, dtype=object))
    if not 0 <= count <= most:
        raise ConversionError(f"the sidecar holds an array of {count:,} entries, at most {most:,}")
    size = count * dtype.itemsize
    stream = zlib.decompressobj()
    raw = stream.decompress(base64.b85decode(data), size + 1)
    if len(raw) != size:
        raise ConversionError(f"the sidecar holds {len(raw)} bytes of an array, expected {size}")
    return np.frombuffer(raw, dtype).reshape(shape)
