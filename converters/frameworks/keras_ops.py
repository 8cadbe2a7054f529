"""What stands in the configs of Functional models beside layers: operations of keras.ops, and
classes that keras.applications has for itself."""

import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from fwt._types import FileFormatError
from fwt.converters.frameworks import keras_2_ops
from fwt.converters.rows import table
from fwt.converters.rows.row import Layer, refuse, same
from fwt.converters.walk import policy

# Layers of keras.applications, and where they live.
HOME = {"LayerScale": "keras.src.applications.convnext"}
SCALED = ("CustomScaleLayer", "keras.src.applications.inception_resnet_v2")  # x + scale y
BESIDE = {*HOME.items(), SCALED}
VARIABLES = {"LayerScale": ("gamma",)}
# What a call says beside tensors; a layer has it among its settings.
CALLED = {**dict.fromkeys(("MultiHeadAttention", "GroupQueryAttention", "Attention",
                           "AdditiveAttention"), ("use_causal_mask",)),
          "ReversibleEmbedding": ("reverse",), "ops.DotProductAttention": ("scale",)}  # fmt: skip
CLASSES = {"GroupQueryAttention": "GroupedQueryAttention"}  # whose own names are others
LISTED = ("Attention", "AdditiveAttention")  # which take query, value and key in a list
DEFAULTS = {"LayerScale": {"init_values": 1e-6}}  # what they must be told
_BINARY = {"Add": "Add", "Subtract": "Subtract", "Multiply": "Multiply", "Maximum": "Maximum",
           "Minimum": "Minimum", "TrueDivide": "ops.TrueDivide", "Divide": "ops.TrueDivide",
           "Matmul": "ops.Matmul"}  # fmt: skip
# Where in keras.src.ops a class stands that is not in its numpy.
_ROOMS = {"Gelu": "nn", "Erf": "math", "Logsumexp": "math", "DotProductAttention": "nn"}
AS_IT_IS = "converters.transform(model, t) changes its weights, whatever they compute"
_AGAIN = ("build the model again in Keras 3, with keras.layers or keras.ops in its place, call "
          "load_weights(path) with this file, and convert that")  # fmt: skip
# Functions of each entry, and of all along an axis, by the classes that compute them.
_EACH = {
    "abs": "Absolute", "acos": "Arccos", "acosh": "Arccosh", "asin": "Arcsin", "asinh": "Arcsinh",
    "atan": "Arctan", "atanh": "Arctanh",
    **{f: f.capitalize() for f in ("ceil", "cos", "cosh", "erf", "exp", "expm1", "floor", "log",
                                   "log1p", "reciprocal", "round", "sign", "sin", "sinh", "sqrt",
                                   "square", "tan")},
}  # fmt: skip
_ALONG = {f: f.capitalize() for f in ("sum", "mean", "max", "min", "prod", "logsumexp")}
_FUNCTION = {**{kind: f for f, kind in _EACH.items()}, "Abs": "abs"}
_REDUCTION = {kind: f for f, kind in _ALONG.items()}


def is_operation(entry: Any) -> bool:
    """Whether an entry of a config is an operation, which has no weights and no group in files."""
    module = entry.get("module") if isinstance(entry, Mapping) else None
    return isinstance(module, str) and module.split(".")[:3] == ["keras", "src", "ops"]


def tensors(node: Any) -> list[Any]:
    """The tensors in a node of a config, in order."""
    if isinstance(node, Mapping):
        if node.get("class_name") == "__keras_tensor__":
            return [node]
        return [t for value in node.values() for t in tensors(value)]
    return [t for v in node for t in tensors(v)] if isinstance(node, list | tuple) else []


def others(node: Any) -> list[Any]:
    """What stands beside tensors in an argument of a call."""
    if (isinstance(node, Mapping) and node.get("class_name") == "__keras_tensor__") or node is None:
        return []
    inner = list(node.values()) if isinstance(node, Mapping) and "class_name" not in node else node
    return [o for v in inner for o in others(v)] if isinstance(inner, list | tuple) else [node]


def histories(node: Any) -> list[tuple[str, int, int]]:
    """The layer, call and output that each tensor of a node is."""
    return [tuple(t["config"]["keras_history"]) for t in tensors(node)]


def ranks_of(node: Any, where: str) -> list[int]:
    """How many axes each tensor of a node has."""
    shapes = [t["config"].get("shape") for t in tensors(node)]
    if not all(isinstance(s, list | tuple) for s in shapes):
        raise refuse(where, "a file of Keras 2 does not say the shapes that it takes",
                     "open it in Keras, and give the model")  # fmt: skip
    return [len(s) for s in shapes]


_CASTS = "a keras.layers.Rescaling(1.0) in front of it makes float32 of them"
# What wraps around in whole numbers of few bits; other operations compute in floats.
_WRAPS = ("Add", "Subtract", "Multiply", "Square", "Negative", "Power", "Matmul", "Einsum", "Dot",
          "Average")  # fmt: skip


def check_whole(kind: str, node: Any, where: str) -> None:
    """Raises where Keras computes in whole numbers that wrap around, and other frameworks don't."""
    given = {t["config"].get("dtype") for t in tensors(node)}
    given |= {"float32"} if any(type(x) is float for x in others(node)) else set()
    short = sorted(given & {"uint8", "int8", "uint16", "int16"})
    if short and kind in _WRAPS and given.isdisjoint(policy.COMPUTED):
        raise refuse(f"{where} ({kind})", f"it computes in {short[0]}, where numbers wrap around",
                     _CASTS)  # fmt: skip


_WHOLE = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
# Layers that leave whole numbers what they are, and those that give whole numbers for them.
_KEEPS = re.compile(
    r"Flatten|Reshape|Permute|Identity|.*Dropout.*|RepeatVector|(ZeroPadding|Cropping)\dD|"
    r"(Global|Adaptive)?MaxPooling\dD|UpSampling\dD|Concatenate|ops\.GetItem|Masking|Gaussian.*|"
    r"ActivityRegularization|CenterCrop|Resizing|ReLU"
)
_ROUNDS = re.compile(
    r"(Layer|Group|RMS|Spectral|Unit)Normalization|(Global|Adaptive)?AveragePooling\dD|ELU|PReLU|"
    r"Softmax"
)


def check_reached(layers: Sequence[Layer], start: str, dtype: Any) -> None:
    """Raises where an input of whole numbers reaches a layer that gives whole numbers too, though
    it computes in fractions: what Keras gives then is rounded, or wraps around."""
    reached = {start} if dtype in _WHOLE else set[str]()
    for layer in layers:
        if layer.kind == "Discretization" and layer.settings.get("output_mode", "int") == "int":
            reached.add(layer.name)
        if reached.isdisjoint(layer.inputs):
            continue
        for part in (layer, *layer.inner):
            told = part.settings
            between = {"Resizing": "bilinear"}.get(part.kind, "nearest")
            rounds = _ROUNDS.fullmatch(part.kind) or told.get("interpolation", between) != "nearest"
            ends = (told.get("max_value"), told.get("threshold")) if part.kind == "ReLU" else ()
            if rounds or any(x is not None and x != int(x) for x in ends):
                raise refuse(str(layer), "it takes whole numbers, and Keras rounds what "
                             "it makes of them", _CASTS)  # fmt: skip
        if _KEEPS.fullmatch(layer.kind):
            reached.add(layer.name)


def dtype_of(node: Any, made: Collection[str | None] = ()) -> str | None:
    """The dtype in which an operation computes: the widest of what it takes but whole numbers.

    Of float64 Keras says float32 behind an operation with a number, which its backends compute in
    float64: ``made`` has the dtypes of those that gave what it takes.
    """
    given = [t["config"].get("dtype") for t in tensors(node)] + ["float64"] * ("float64" in made)
    given = [dtype for dtype in given if dtype in policy.COMPUTED]
    return jnp.result_type(*given).name if given else None


def split_of(entry: Any, node: Any, name: str, place: str) -> list[Layer]:
    """A split as one slice for each of its outputs; of another operation nothing."""
    if entry.get("class_name") != "Split" or not isinstance(node, Mapping):
        return []
    told = entry.get("config") or {}
    where = f"{place}: {name} (keras.ops, Split)"
    given = tensors(node)
    shape = given[0]["config"].get("shape") if len(given) == 1 else None
    at, axis = told.get("indices_or_sections"), told.get("axis")
    if not isinstance(shape, list | tuple) or type(axis) is not int or len(shape) < 2:
        raise refuse(where, "the shape of what it splits is not known")
    axis %= len(shape)
    size = shape[axis]
    if axis == 0 or type(size) is not int:
        raise refuse(where, "it splits the examples, or an axis whose size is not known")
    if type(at) is int and at > 0 and size % at == 0:
        at = list(range(size // at, size, size // at))
    if not isinstance(at, list | tuple) or not all(type(i) is int for i in at):
        raise refuse(where, f"it splits at {at!r:.80}")
    ends = [0, *(min(max(i, 0), size) for i in at), size]
    if any(a >= b for a, b in itertools.pairwise(ends)):
        raise refuse(where, "one of its parts is empty")
    return [
        Layer(f"{name}__{i}", "ops.GetItem", {"axis": axis, "start": a, "stop": b, "step": 1})
        for i, (a, b) in enumerate(itertools.pairwise(ends))
    ]


def stack_of(entry: Any, node: Any, name: str, place: str) -> list[Layer]:
    """A stack as an axis of one entry more for each of its inputs, and what joins them; of another
    operation nothing."""
    if entry.get("class_name") != "Stack" or not isinstance(node, Mapping):
        return []
    axis = (entry.get("config") or {}).get("axis")
    shapes = [t["config"].get("shape") for t in tensors(node)]
    if type(axis) is not int or not all(isinstance(s, list | tuple) and len(s) for s in shapes):
        raise refuse(f"{place}: {name} (keras.ops, Stack)", "what it stacks has no known shape")
    axis %= len(shapes[0]) + 1
    if axis == 0:
        raise refuse(f"{place}: {name} (keras.ops, Stack)", "it stacks in front of the batch")
    wider = [[-1 if n is None else n for n in (*s[1:axis], 1, *s[axis:])] for s in shapes]
    ones = [Layer(f"{name}__{i}", "Reshape", {"target_shape": s}) for i, s in enumerate(wider)]
    return [*ones, Layer(name, "Concatenate", {"axis": axis})]


def layers_of(entry: Any, node: Any, name: str, place: str) -> list[Layer]:
    """The call of an operation as layers, each of which takes what the one before it gives."""
    kind, own = entry.get("class_name"), entry.get("config")
    if not isinstance(node, Mapping) or not isinstance(own, Mapping) or not isinstance(kind, str):
        raise FileFormatError(f"{place}: {name} is no call of an operation")
    own = {k: v for k, v in own.items() if k not in ("name", "dtype")}
    args = [*(node.get("args") or []), *(node.get("kwargs") or {}).values()]
    given = tensors(args)
    where = f"{place}: {name} (keras.ops, {kind})"
    if kind.startswith(keras_2_ops.UNKNOWN):
        raise refuse(f"{place}: {name}", f"{kind}, as it is called, is not read from Keras 2",
                     _AGAIN)  # fmt: skip
    shape = given[0]["config"].get("shape") if given else None
    if kind in _BINARY and len(given) == 2:
        return [Layer(name, _BINARY[kind], {})]
    if kind in _BINARY and len(given) == 1 and len(args) == 2:
        return [_with_constant(kind, name, args, where)]
    if kind == "Where" and len(given) == 2 and tensors(args[:2]) == given and args[2:] == [0]:
        return [Layer(name, "ops.Where", {})]
    if kind == "ZerosLike":  # see keras_constants; by itself no row says it
        return [Layer(name, "ops.ZerosLike", {})]
    if kind == "Concatenate":
        return [Layer(name, kind, {"axis": own.get("axis", -1)})]
    if kind == "Einsum" and len(given) == 2:
        return [Layer(name, "ops.Einsum", {"subscripts": own.get("subscripts")})]
    if kind == "DotProductAttention" and len(given) == 3 and not any(map(tensors, args[3:])):
        return [_attention(name, own, node, where)]
    if len(given) != 1:
        raise refuse(where, f"the operation with {len(given)} tensors is not known")
    if kind == "GetItem":
        return _item(name, args[1] if len(args) > 1 else None, shape, where)
    if kind == "Reshape" and isinstance(own.get("newshape"), list | tuple):
        first, *sizes = own["newshape"] or (0,)
        batch = shape[0] if isinstance(shape, list | tuple) and shape else None
        if first not in (-1, None) and (first != batch or batch is None):
            raise refuse(where, f"newshape={own['newshape']}: it puts all examples into {first}",
                         "-1 in the first place keeps each by itself")  # fmt: skip
        return [Layer(name, "Reshape", {"target_shape": sizes})]
    if kind in ("Squeeze", "ExpandDims") and isinstance(shape, list | tuple):
        return [_ones(kind, name, own.get("axis"), list(shape), where)]
    if kind == "Transpose" and own.get("axes") and own["axes"][0] == 0:
        return [Layer(name, "Permute", {"dims": [int(a) for a in own["axes"][1:]]})]
    if kind == "Swapaxes" and isinstance(shape, list | tuple):
        dims = list(range(len(shape)))
        one, two = (own[k] % len(dims) for k in ("axis1", "axis2"))
        dims[one], dims[two] = two, one
        if dims[0] == 0:
            return [Layer(name, "Permute", {"dims": dims[1:]})]
    pooled = {"Mean": "Average", "Max": "Max"}.get(kind)
    if pooled and isinstance(shape, list | tuple) and _is_spatial(own.get("axis"), len(shape)):
        settings = {"keepdims": bool(own.get("keepdims"))}
        return [Layer(name, f"Global{pooled}Pooling{len(shape) - 2}D", settings)]
    if kind in _FUNCTION and not any(own.values()):
        return [Layer(name, "ops.Pointwise", {"function": _FUNCTION[kind]})]
    if kind in _REDUCTION and isinstance(shape, list | tuple) and own.get("initial") is None:
        return _reduced(_REDUCTION[kind], name, own, list(shape), where)
    if kind == "Flip" and isinstance(own.get("axis"), int) and isinstance(shape, list | tuple):
        axis = own["axis"] % len(shape)
        if axis == 0:
            raise refuse(where, "it turns the examples around")
        return [Layer(name, "ops.Flip", {"axis": axis})]
    if kind == "Pad" and not any(args[1:]) and isinstance(shape, list | tuple):
        return [_padded(name, own, len(shape), where)]
    function = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", kind).lower()
    row = table.row_of_function(function)
    if row is not None and row.function is not None:
        if all(same(v, row.function[1].get(k)) for k, v in own.items()):
            return [Layer(name, "Activation", {"activation": function})]
        if row.keras is not None:
            return [Layer(name, str(row.class_in("keras")), own)]
    raise refuse(where, f"the operation{f' with {own}' if own else ''} is not known",
                 "use the layer that does the same, if there is one")  # fmt: skip


def _attention(name: str, own: Mapping[str, Any], node: Any, where: str) -> Layer:
    """Products of queries, keys and values, which Keras takes in this order."""
    told = dict(zip(("bias", "mask", "scale"), (node.get("args") or [])[3:], strict=False))
    told |= node.get("kwargs") or {}
    scale = told.get("scale")
    rest = {k: v for k, v in {**own, **told}.items() if k not in ("scale", "is_causal")}
    if any(rest.values()) or isinstance(scale, bool) or not isinstance(scale, int | float | None):
        raise refuse(where, f"it is called with {told} and {own}: only tensors, a number as scale= "
                     "and is_causal= convert")  # fmt: skip
    return Layer(name, "ops.DotProductAttention",
                 {"is_causal": bool(own.get("is_causal")), "scale": scale})  # fmt: skip


def _is_spatial(axes: Any, rank: int) -> bool:
    numbers = axes if isinstance(axes, list | tuple) else (axes,)
    if rank < 3 or not all(isinstance(a, int) for a in numbers):
        return False
    return sorted(a % rank for a in numbers) == list(range(1, rank - 1))


def _padded(name: str, own: Mapping[str, Any], rank: int, where: str) -> Layer:
    """Padding by zeros or by reflection, of the axes between the batch and the last one."""
    pads: Any = own.get("pad_width")
    mode = own.get("mode", "constant")
    kind = {"constant": f"ZeroPadding{rank - 2}D", "reflect": "ops.ReflectPad"}.get(mode)
    pairs = isinstance(pads, list | tuple) and all(isinstance(p, list | tuple) for p in pads)
    if not pairs or len(pads) != rank or rank < 3 or any([*pads[0], *pads[-1]]) or kind is None:
        raise refuse(where, f"pad_width={pads!r} with mode={mode!r} is not known",
                     "pad by zeros or reflection, and only what lies between the batch and the "
                     "last axis")  # fmt: skip
    padding = [list(p) for p in pads[1:-1]]
    return Layer(name, kind, {"padding": padding[0] if rank == 3 else padding})


def _reduced(
    function: str, name: str, own: Mapping[str, Any], shape: list[Any], where: str
) -> list[Layer]:
    """A reduction as one along each axis, which keeps it, and a Reshape that drops them."""
    axes = own.get("axis")
    axes = [axes] if isinstance(axes, int) else axes
    if not isinstance(axes, list | tuple) or not all(isinstance(a, int) for a in axes):
        raise refuse(where, f"its axis={axes!r} takes in the examples, or is not known")
    places = sorted({a % len(shape) for a in axes})
    if not places or places[0] == 0:
        raise refuse(where, f"its axis={own.get('axis')!r} takes in the examples, or none")
    out = [Layer(name if not i else f"{name}__{i}", "ops.Reduce",
                 {"function": function, "axis": a}) for i, a in enumerate(places)]  # fmt: skip
    if not own.get("keepdims"):
        left = [s for i, s in enumerate(shape) if i not in places]
        target = [-1 if s is None else s for s in left[1:]]
        out.append(Layer(f"{name}__left", "Reshape", {"target_shape": target}))
    return out


def _with_constant(kind: str, name: str, args: Sequence[Any], where: str) -> Layer:
    left = bool(tensors(args[0]))
    c = args[1] if left else args[0]
    vector = _vector(c)
    if vector is not None:
        return _with_vector(kind, name, vector, left, where)
    if isinstance(c, bool) or not isinstance(c, int | float):
        raise refuse(where, f"with {c!r:.80}: only a number, one for each last place, or a tensor",
                     "a Rescaling or an Embedding holds an array")  # fmt: skip
    found = {"Add": (1.0, c), "Multiply": (c, 0.0), "Subtract": (1.0, -c) if left else (-1.0, c),
             "TrueDivide": (1 / c, 0.0) if left and c else None,
             "Divide": (1 / c, 0.0) if left and c else None}.get(kind)  # fmt: skip
    if kind == "Maximum" and c == 0:
        return Layer(name, "Activation", {"activation": "relu"})
    if found is None:
        raise refuse(where, f"with the number {c} is not known")
    return Layer(name, "Rescaling", {"scale": float(found[0]), "offset": float(found[1])})


def _vector(given: Any) -> list[float] | None:
    """The numbers of an array of one axis that an operation is called with."""
    if isinstance(given, Mapping) and given.get("class_name") == "__numpy__":
        given = (given.get("config") or {}).get("value")
    plain = isinstance(given, list | tuple) and len(given) > 0
    if plain and all(type(v) in (int, float) for v in given):
        return [float(v) for v in given]
    return None


def _with_vector(kind: str, name: str, by: list[float], left: bool, where: str) -> Layer:
    """A number for each place of the last axis, as a Rescaling."""
    one, none = [1.0] * len(by), [0.0] * len(by)
    minus = [-v for v in by]
    divides = kind in ("TrueDivide", "Divide") and left and all(by)
    found = {"Add": (one, by), "Multiply": (by, none),
             "Subtract": (one, minus) if left else ([-1.0] * len(by), by)}.get(kind)  # fmt: skip
    found = ([1 / v for v in by], none) if divides else found
    if found is None:
        raise refuse(where, f"with the numbers {by} is not known")
    return Layer(name, "Rescaling", {"scale": found[0], "offset": found[1]})


def _ones(kind: str, name: str, axis: Any, shape: list[Any], where: str) -> Layer:
    """An axis of size 1 more or less, as a Reshape."""
    axes = axis if isinstance(axis, list | tuple) else [axis]
    new = list(shape)
    for one in axes:
        rank = len(new) + (kind == "ExpandDims")
        if not isinstance(one, int) or one % rank == 0:
            raise refuse(where, f"axis={axis!r} is not known")
        if kind == "ExpandDims":
            new.insert(one % rank, 1)
        else:
            new[one % rank] = 0
    kept = [-1 if s is None else s for s in new[1:] if s != 0]
    return Layer(name, "Reshape", {"target_shape": kept})


def _item(name: str, index: Any, shape: Any, where: str) -> list[Layer]:
    """What ``x[index]`` takes, as slices along single axes, and a Reshape for the rest."""
    if not isinstance(shape, list | tuple):
        raise refuse(where, "the shape of what it takes is not known")
    cuts = list(index) if isinstance(index, list | tuple) else [index]
    dots = [i for i, c in enumerate(cuts)
            if isinstance(c, Mapping) and c.get("class_name") == "__ellipsis__"]  # fmt: skip
    if dots:
        count = len(shape) - sum(c is not None for c in cuts) + 1
        full = {"class_name": "__slice__", "config": {}}
        cuts[dots[0] : dots[0] + 1] = [full] * count
    out: list[Layer] = []
    new: list[int] = []
    axis, reshaped = 0, False
    for cut in cuts:
        size = shape[axis] if axis < len(shape) else None
        if cut is None:
            new.append(1)
            reshaped = True
            continue
        if axis >= len(shape):
            raise refuse(where, "it has more indices than axes")
        told: Any = cut.get("config", {}) if isinstance(cut, Mapping) else {}
        start: Any
        stop: Any
        step: Any
        if type(cut) is int and size is None:
            raise refuse(where, f"it takes entry {cut} of axis {axis}, whose size is not known")
        if isinstance(cut, int) and not isinstance(cut, bool) and size is not None:
            start, stop, step, reshaped = cut, cut + 1 or None, 1, True
        elif isinstance(cut, Mapping) and cut.get("class_name") == "__slice__":
            start, stop, step = told.get("start"), told.get("stop"), told.get("step")
            if start is None and stop is None and step is None:
                new.append(-1 if size is None else size)
                axis += 1
                continue
            if (start, stop, step) == (None, None, -1) and axis > 0:
                out.append(Layer(f"{name}__{axis}" if out else name, "ops.Flip", {"axis": axis}))
                new.append(-1 if size is None else size)
                axis += 1
                continue
            start, step = start or 0, 1 if step is None else step
            if size is None or step < 1:
                size = "is not known" if size is None else f"is {size}"
                raise refuse(where, f"it cuts axis {axis} by {told}, whose size {size}")
            new.append(len(range(size)[start:stop:step]))
        else:
            raise refuse(where, f"an index is {cut!r:.80}")
        label = name if not out else f"{name}__{axis}"
        cuts_ = {"axis": axis, "start": start, "stop": stop, "step": step}
        out.append(Layer(label, "ops.GetItem", cuts_))
        axis += 1
    new += [-1 if s is None else s for s in shape[axis:]]
    if reshaped:
        label = f"{name}__axes" if out else name
        out.append(Layer(label, "Reshape", {"target_shape": new[1:]}))
    return out or [Layer(name, "Identity", {}, fused=True)]


# -- out ----------------------------------------------------------------------------------------


def entry_of(layer: Layer, name: str) -> dict[str, Any]:
    """The entry of an operation in a config."""
    kind = layer.kind.removeprefix("ops.")
    own = {} if kind == "GetItem" else dict(layer.settings)
    own.pop("dtype", None)
    if kind == "ReflectPad":
        own.pop("data_format", None)
        inner = own.pop("padding")
        inner = [inner] if isinstance(inner[0], int) else inner
        pads = [[0, 0], *map(list, inner), [0, 0]]
        kind, own = "Pad", {**own, "pad_width": pads, "mode": "reflect"}
    own = {k: v for k, v in own.items() if k not in CALLED.get(layer.kind, ())}
    if kind in ("Pointwise", "Reduce"):
        kind = {**_EACH, **_ALONG}[own.pop("function")]
        own |= {"keepdims": True} if "axis" in own else {}
    module = _ROOMS.get(kind, "numpy")
    return {"module": f"keras.src.ops.{module}", "class_name": kind, "registered_name": kind,
            "config": {"name": name, **own}, "name": name, "inbound_nodes": []}  # fmt: skip


def arguments(layer: Layer, given: list[Any]) -> list[Any]:
    """What an operation is called with."""
    if layer.kind == "ops.Where":  # which is asked for the condition first
        return [*given[::-1], 0]
    if layer.kind != "ops.GetItem":
        return given
    told = layer.settings
    if "cuts" in told:
        whole = {"start": None, "stop": None, "step": None}
        return [*given, [{"class_name": "__slice__", "config": c} for c in (whole, *told["cuts"])]]
    none = {"start": None, "stop": None, "step": None}
    axis = told["axis"] % (len(layer.shape or ()) + 1)
    cuts = [{"class_name": "__slice__", "config": dict(none)} for _ in range(axis + 1)]
    step = None if told["step"] == 1 else told["step"]
    cuts[-1]["config"] = {"start": told["start"], "stop": told["stop"], "step": step}
    return [*given, cuts]
