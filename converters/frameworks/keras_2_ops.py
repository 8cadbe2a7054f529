"""Functions of TensorFlow in models of Keras 2 (TFOpLambda, SlicingOpLambda) as the operations of
Keras 3 that say the same."""

from collections.abc import Mapping
from typing import Any

KINDS = ("TFOpLambda", "SlicingOpLambda")
UNKNOWN = "tf."  # what the class of an operation starts with that has no such name
_BINARY = {
    "add": "Add", "sub": "Subtract", "subtract": "Subtract", "mul": "Multiply",
    "multiply": "Multiply", "truediv": "TrueDivide", "divide": "TrueDivide", "maximum": "Maximum",
    "minimum": "Minimum",
}  # fmt: skip
_EACH = {
    **{f: f.capitalize() for f in (
        "relu", "relu6", "elu", "selu", "softplus", "softsign", "sigmoid", "tanh", "silu", "exp",
        "log", "sqrt", "square", "sin", "cos", "floor", "ceil", "sign", "log1p", "expm1", "erf",
    )},
    "swish": "Silu",
    "abs": "Absolute",
}  # fmt: skip
_ALONG = {f"reduce_{f}": f.capitalize() for f in ("mean", "sum", "max", "min", "prod", "logsumexp")}
_ROOMS = ("math", "nn", "__operators__", "linalg", "compat.v1", "")
Told = tuple[str, dict[str, Any], list[Any]]  # the class, its settings, and what it is called with


def operation(entry: Mapping[str, Any], node: Any) -> dict[str, Any]:
    """An entry of Keras 2 as one of Keras 3; its class starts with ``tf.`` where none says it.

    Args:
        entry: of the config, as Keras 2 wrote it.
        node: its one call, in the form of Keras 3.
    """
    own = entry["config"]
    function = str(own.get("function"))
    args, kwargs = list(node["args"]), dict(node["kwargs"])
    kwargs = {k: v for k, v in kwargs.items() if k != "name" and v is not None}
    room, _, short = function.rpartition(".")
    told = _told(short, args, kwargs) if room in _ROOMS else None
    kind, settings, args = told or (f"{UNKNOWN}{function}", {}, args)
    name = str(own.get("name")).replace(".", "_")
    return {"module": "keras.src.ops.numpy", "class_name": kind, "name": entry.get("name"),
            "config": {"name": name, **settings}, "registered_name": kind,
            "inbound_nodes": [{"args": args, "kwargs": {}}]}  # fmt: skip


def _told(short: str, args: list[Any], kwargs: dict[str, Any]) -> Told | None:
    """What a function is in Keras 3, if each thing that it is told has its place there."""
    given = set(kwargs)
    if short in _BINARY and given == {"y"}:
        return _BINARY[short], {}, [*args, kwargs["y"]]
    if short == "add_n" and not given and isinstance(args[0], list) and len(args[0]) == 2:
        return "Add", {}, args[0]
    last = kwargs.get("data_format", "NHWC") in ("NHWC", "N...C")
    if short == "bias_add" and last and given - {"data_format"} == {"bias"}:
        return "Add", {}, [*args, kwargs["bias"]]
    if short == "matmul" and given - {"b"} <= {k for k, v in kwargs.items() if v is False}:
        return ("Matmul", {}, [*args, kwargs["b"]]) if "b" in given else None
    if short == "negative" and not given:
        return "Multiply", {}, [*args, -1.0]
    if short == "cast" and kwargs == {"dtype": "float32"}:
        return "Multiply", {}, [*args, 1.0]  # which is of floats, whatever it takes
    if short == "identity" and not given:
        return "GetItem", {}, [*args, [{"class_name": "__ellipsis__"}]]
    if short == "pow" and kwargs.get("y") == 2 and given == {"y"}:
        return "Square", {}, args
    if short == "clip_by_value" and kwargs == {"clip_value_min": 0, "clip_value_max": 6}:
        return "Relu6", {}, args
    if short == "gelu" and given <= {"approximate"}:
        return "Gelu", {"approximate": bool(kwargs.get("approximate"))}, args
    if short == "leaky_relu" and given <= {"alpha"}:
        return "LeakyRelu", {"negative_slope": kwargs.get("alpha", 0.2)}, args
    if short == "softmax" and given <= {"axis"}:
        return "Softmax", {"axis": kwargs.get("axis", -1)}, args
    if short in _EACH and not given - ({"beta"} if kwargs.get("beta") == 1 else set()):
        return _EACH[short], {}, args
    return _shaped(short, args, kwargs)


def _shaped(short: str, args: list[Any], kwargs: dict[str, Any]) -> Told | None:
    """Functions that change the shape."""
    given = set(kwargs)
    axis = kwargs.get("axis")
    if short in _ALONG and given <= {"axis", "keepdims"}:
        keep = bool(kwargs.get("keepdims"))
        return _ALONG[short], {"axis": axis, "keepdims": keep}, args
    if short == "concat" and given == {"axis"} and isinstance(axis, int):
        return "Concatenate", {"axis": axis}, args
    if short == "stack" and given <= {"axis"}:
        return "Stack", {"axis": kwargs.get("axis", 0)}, args
    sizes = kwargs.get("shape")
    whole = isinstance(sizes, list) and all(type(n) is int for n in sizes) and sizes[:1] == [-1]
    if short == "reshape" and given == {"shape"} and whole:
        return "Reshape", {"newshape": sizes}, args
    perm = kwargs.get("perm")
    plain = isinstance(perm, list) and perm[:1] == [0]
    if short == "transpose" and plain and not any(v for k, v in kwargs.items() if k != "perm"):
        return "Transpose", {"axes": perm}, args
    if short in ("expand_dims", "squeeze") and given == {"axis"}:
        return "ExpandDims" if short[0] == "e" else "Squeeze", {"axis": axis}, args
    if short == "reverse" and isinstance(axis, list) and len(axis) == 1 and given == {"axis"}:
        return "Flip", {"axis": axis[0]}, args
    pads = {"mode": "CONSTANT", "constant_values": 0} | kwargs
    mode = {"CONSTANT": "constant", "REFLECT": "reflect"}.get(str(pads["mode"]))
    known = {"mode", "constant_values", "paddings"}
    if short == "pad" and mode and set(pads) == known and pads["constant_values"] == 0:
        return "Pad", {"pad_width": pads["paddings"], "mode": mode}, args
    if short == "getitem" and given == {"slice_spec"}:
        spec = kwargs["slice_spec"]
        return "GetItem", {}, [*args, [_index(i) for i in (spec if isinstance(spec, list) else
                                                          [spec])]]  # fmt: skip
    return None


def _index(given: Any) -> Any:
    if isinstance(given, Mapping) and "start" in given:
        return {"class_name": "__slice__", "config": dict(given)}
    return given
