"""Models of Keras 2 as Keras 3 writes them: configs, and the places of arrays in files.

Every reader of a Keras format comes through here, with the version that the file tells.
"""

import re
from collections.abc import Mapping
from typing import Any

from fwt._types import FileFormatError
from fwt.converters.frameworks import keras_2_ops
from fwt.converters.rows.row import refuse
from fwt.converters.walk.convert import MASKED
from fwt.layers.recurrent import HARD_SIGMOID

# Settings that Keras 3 does not have: those that change nothing, and those that do so while off.
_IDLE = ("fused", "input_length", "rng_type", "query_shape", "key_shape", "value_shape")
_OFF = ("time_major", "ragged", "num_constants", "renorm", "virtual_batch_size", "adjustment",
        "softmax_robust_masking", "noise_shape")  # fmt: skip
OLDER = "older"  # what an entry of Keras 2 says here, where a class of Keras 3 computes otherwise
_RENAMED = {"LeakyReLU": {"alpha": "negative_slope"}, "ThresholdedReLU": {"theta": "threshold"}}
_CLASSES = {
    "Model": "Functional",
    "ThresholdedReLU": "ReLU",
    "SyncBatchNormalization": "BatchNormalization",
}


def is_older(version: Any, place: str) -> bool:
    """Whether a version is of Keras 2, or before it.

    Raises:
        FileFormatError: for what is no version.
    """
    found = re.match(r"\d+", str(version))
    if found is None:
        raise FileFormatError(
            f"{place}: keras_version={version!r:.40}: expected one such as 2.15.0"
        )
    return int(found[0]) < 3


def modern(config: Any, version: Any, place: str) -> Any:
    """The config of a model as Keras 3 would write it; one of Keras 3 stays.

    Args:
        config: what the JSON of a file holds.
        version: the file's keras_version.
        place: of the file, for errors.
    """
    return _modern(config) if is_older(version, place) else config


def _modern(config: Any) -> Any:
    if isinstance(config, list):
        return [_modern(v) for v in config]
    if not isinstance(config, dict):
        return config
    kind, own = config.get("class_name"), config.get("config")
    if kind == "__numpy__" and isinstance(own, dict):
        return own.get("value")
    if kind == "Sequential" and isinstance(own, list):  # before 2.2.3
        own = {"name": "sequential", "layers": own}
        config = {**config, "config": own}
    out = {k: _modern(v) for k, v in config.items()}
    if isinstance(kind, str):
        out["class_name"] = _CLASSES.get(kind, kind)
        if kind == "function" and own == "hard_sigmoid":
            out["config"] = HARD_SIGMOID
        if isinstance(own, dict):
            out["config"] = _settings(kind, out["config"], own)
    if str(out.get("module")).split(".")[0] == "tf_keras":
        out["module"] = str(out["module"]).removeprefix("tf_")
    if "inbound_nodes" in config:
        out["inbound_nodes"] = _nodes(config["inbound_nodes"])
        if kind in keras_2_ops.KINDS and isinstance(own, dict) and len(out["inbound_nodes"]) == 1:
            return keras_2_ops.operation(config, out["inbound_nodes"][0])
    if kind in MASKED:
        out[OLDER] = True
    body = out.get("config")
    if out.get("class_name") == "Functional" and isinstance(body, dict):
        _count_calls(body)
    return out


def _count_calls(body: dict[str, Any]) -> None:
    """Keras 2 counts a call that each model inside has of its own; Keras 3 does so for a
    Functional one, and at the ends alone."""
    found = {e["name"]: e for e in body.get("layers") or []
             if isinstance(e, dict) and e.get("class_name") in ("Functional", "Sequential")
             and isinstance(e.get("name"), str)}  # fmt: skip
    inner = [h for e in body.get("layers") or [] if isinstance(e, dict)
             for h in _histories(e.get("inbound_nodes"))]  # fmt: skip
    ends = [h for key in ("input_layers", "output_layers") for h in _ends(body.get(key))]
    for name, entry in found.items():
        calls = [h[1] for h in (*inner, *ends) if h[0] == name and isinstance(h[1], int)]
        own = int(bool(calls) and max(calls) == len(entry.get("inbound_nodes") or []))
        for history in inner:
            history[1] -= own * (history[0] == name)
        there = own - (entry["class_name"] == "Functional")
        for history in ends:
            history[1] -= there * (history[0] == name)


def _histories(node: Any) -> list[Any]:
    if isinstance(node, dict):
        if node.get("class_name") == "__keras_tensor__":
            return [node["config"]["keras_history"]]
        return [h for v in node.values() for h in _histories(v)]
    return [h for v in node for h in _histories(v)] if isinstance(node, list) else []


def _ends(given: Any) -> list[Any]:
    """The references in what a model takes or gives."""
    if _is_call(given):
        return [given]
    if isinstance(given, dict):
        given = list(given.values())
    return [h for v in given for h in _ends(v)] if isinstance(given, list) else []


def _settings(kind: str, own: dict[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of one class, which hold those of its parts in their new form already."""
    # Keras 3 has another function under this name, wherever it stands.
    own = {k: HARD_SIGMOID if v == "hard_sigmoid" and k != "name" else v for k, v in own.items()}
    shape = own.pop("batch_input_shape", None)
    if kind == "InputLayer":
        own["batch_shape"] = shape
    if kind == "Sequential":
        shape = _input_shape(before.get("layers"))
        if shape is not None:
            entry = {"batch_shape": shape, "name": "input"}
            own["layers"] = [{"class_name": "InputLayer", "config": entry}, *own["layers"]]
    drop = [n for n in own if n in _IDLE or (n in _OFF and not own[n])]
    if own.get("trainable") is True:  # the default, which some of Keras 3's classes do not take
        drop.append("trainable")
    if kind.startswith("Separable"):  # it has none, but two others
        drop += [f"kernel_{n}" for n in ("initializer", "regularizer", "constraint")]
    if own.get("groups") == 1 and re.search("^(Depthwise|Separable)|Transpose$", kind):
        drop.append("groups")
    own = {k: v for k, v in own.items() if k not in drop}
    for name, new in _RENAMED.get(kind, {}).items():
        if name in own:
            own[new] = own.pop(name)
    axis = own.get("axis")
    if kind in ("BatchNormalization", "SyncBatchNormalization") and isinstance(axis, list):
        own["axis"] = axis[0] if len(axis) == 1 else axis
    if kind in ("GRU", "GRUCell") and "reset_after" not in own:
        place = f"{own.get('name')} ({kind})"
        raise refuse(place, "it does not say reset_after, whose default differed between versions")
    if kind == "Discretization" and own.get("dtype") == "int64":  # what it gives out
        del own["dtype"]
    if kind == "Bidirectional" and own.get("backward_layer") is None:
        own |= _both_ways(own.get("layer"))
    return own


def _input_shape(layers: Any) -> Any:
    """What the first layer of a Sequential says of its input, if it is no InputLayer."""
    first = layers[0] if isinstance(layers, list) and layers else None
    if not isinstance(first, dict) or first.get("class_name") == "InputLayer":
        return None
    own = first.get("config")
    return own.get("batch_input_shape") if isinstance(own, dict) else None


def _both_ways(entry: Any) -> dict[str, Any]:
    """The two layers of a Bidirectional that was given one."""
    own = entry.get("config") if isinstance(entry, dict) else None
    if not isinstance(own, dict):
        return {}
    turned = {"name": f"backward_{own.get('name')}", "go_backwards": not own.get("go_backwards")}
    forward = {**entry, "config": {**own, "name": f"forward_{own.get('name')}"}}
    return {"layer": forward, "backward_layer": {**entry, "config": {**own, **turned}}}


def _nodes(nodes: Any) -> Any:
    """[[["layer", 0, 0, {}]]] as Keras 3 has it."""
    out = []
    for node in nodes if isinstance(nodes, list) else []:
        node = [node] if node and isinstance(node[0], str) else node  # of a TFOpLambda
        args: list[Any] = [_tensor(call) for call in node]
        kwargs = {
            k: _tensor(v) if _is_call(v) else v
            for call in node
            if len(call) > 3
            for k, v in (call[3] or {}).items()
        }
        out.append({"args": args if len(args) == 1 else [args], "kwargs": kwargs})
    return out


def _tensor(call: Any) -> Any:
    if call[0] == "_CONSTANT_VALUE":
        return call[2]
    return {"class_name": "__keras_tensor__", "config": {"keras_history": list(call[:3])}}


def _is_call(value: Any) -> bool:
    """Whether a keyword is given a tensor: the layer that it comes from, and two numbers."""
    kinds = (str, int, int)
    return isinstance(value, list) and len(value) == 3 and all(map(isinstance, value, kinds))


# -- the arrays -----------------------------------------------------------------------------------


def array_name(kind: str, name: str) -> str:
    """What Keras 3 calls an array of a layer."""
    return "kernel" if kind.startswith("Depthwise") and name == "depthwise_kernel" else name
