"""What a Functional model takes and gives, one tensor, several or several by key, and in which
order Keras counts them; what its layers are called with."""

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fwt.converters.frameworks import keras_ops
from fwt.converters.rows import table
from fwt.converters.rows.row import Layer, refuse

Ref = tuple[str, int, int]  # a layer, the number of its call, and that of its output
# Layers that Keras calls with training=True by itself, and which are the identity in predict.
_AUGMENTS = ("AugMix", "CutMix", "MixUp", "RandAugment", "RandomBrightness",
             "RandomColorDegeneration", "RandomColorJitter", "RandomContrast",
             "RandomElasticTransform", "RandomErasing", "RandomFlip", "RandomGaussianBlur",
             "RandomGrayscale", "RandomHue", "RandomInvert", "RandomPerspective",
             "RandomPosterization", "RandomRotation", "RandomSaturation", "RandomSharpness",
             "RandomShear", "RandomTranslation", "RandomZoom")  # fmt: skip
# What says more than a tensor and changes nothing at inference.
_IDLE = {"training": ("Resizing", "CenterCrop", "Rescaling", "Normalization", *_AUGMENTS),
         "mask": ("BatchNormalization", "Dropout")}  # fmt: skip
# In what order a layer of several tensors takes them, and how Keras calls them.
ARGUMENTS = dict.fromkeys(("MultiHeadAttention", "GroupQueryAttention", "Attention",
                           "AdditiveAttention"), ("query", "value", "key"))  # fmt: skip
# What a layer is called with as the masks of what it takes; Keras writes its own ones there too.
_MASKS = ("mask", "query_mask", "value_mask", "key_mask")


def _is_one(ends: Any) -> bool:
    """Whether a form is one reference or name."""
    return isinstance(ends, str) or (
        isinstance(ends, tuple) and len(ends) == 3 and type(ends[1]) is int
    )


def names_in_form(ends: Any) -> list[Any]:
    """The references or names of a form, in its own order."""
    if _is_one(ends):
        return [ends]
    return list(ends.values() if isinstance(ends, Mapping) else ends)


def form_of(ends: Any, f: Any) -> Any:
    """A form of references or names with each replaced."""
    if isinstance(ends, Mapping):
        return {k: f(v) for k, v in ends.items()}
    return f(ends) if _is_one(ends) else tuple(f(v) for v in ends)


def in_order(keys: Iterable[Any]) -> list[Any]:
    """The keys of a dict in the order in which Keras counts its values, whatever its own is."""
    return sorted(keys, key=lambda k: (type(k).__qualname__, k))


def flat(ends: Any) -> list[Any]:
    """The references or names of a form as Keras numbers them: those of a dict by sorted keys."""
    if isinstance(ends, Mapping):
        return [ends[k] for k in in_order(ends)]
    return names_in_form(ends)


def check_keys(model: Any) -> None:
    """Raises where a model inside counts tensors in an order of keys that no config tells."""
    calls = [(n.arguments.args, n.arguments.kwargs) for n in model._inbound_nodes]
    for form in (getattr(model, "_inputs_struct", None), getattr(model, "_outputs_struct", None),
                 *(v for args, kwargs in calls for v in (*args, *kwargs.values()))):  # fmt: skip
        if isinstance(form, collections.OrderedDict) and list(form) != in_order(form):
            raise refuse(
                model.name,
                f"it takes or gives an OrderedDict of {', '.join(map(str, form))}, whose order "
                "Keras does not save",
                "make the model, and call it, with a dict",
            )


def taken(entry: Mapping[str, Any], node: Mapping[str, Any]) -> list[Ref]:
    """What a call takes, in the order in which it goes to the inputs of a model."""
    given = next(iter(node.get("args") or []), (node.get("kwargs") or {}).get("inputs"))
    tensor = isinstance(given, Mapping) and given.get("class_name") == "__keras_tensor__"
    if entry.get("class_name") != "Functional" or not isinstance(given, Mapping) or tensor:
        return keras_ops.histories(node)
    ends = (entry.get("config") or {}).get("input_layers")
    keys = in_order(given)
    if isinstance(ends, list | tuple) and ends:  # those that its inputs are called
        starts = [ends] if isinstance(ends[0], str) else ends
        names = [x[0] for x in starts if isinstance(x, list | tuple) and x]
        keys = names if set(names) <= set(given) else keys
    return [ref for k in keys for ref in keras_ops.histories(given[k])]


def without_idle(node: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """A node without the keywords that change nothing at inference, and without masks, whose names
    it has under ``masks``: what computes them is no part of the net."""
    kwargs = node.get("kwargs") or {}
    idle = [k for k, kinds in _IDLE.items() if entry.get("class_name") in kinds]
    unused = ("mask",) if entry.get("class_name") in _IDLE["mask"] else ()
    masks = [] if keras_ops.is_operation(entry) else [
        k for k in _MASKS if k not in unused and keras_ops.histories(kwargs.get(k))
    ]  # fmt: skip
    if entry.get("class_name") in ("Sequential", "Functional"):  # whose masks may be of some inputs
        idle.append("mask")
    kept = {k: v for k, v in kwargs.items() if k not in (*idle, *masks)}
    return {**node, "kwargs": kept, "masks": masks, "masked": _masked(kwargs.get("mask"))}


def _masked(mask: Any) -> list[bool]:
    """Which of the inputs of a model inside come with a mask."""
    if isinstance(mask, Mapping) and mask.get("class_name") != "__keras_tensor__":
        mask = [mask[k] for k in in_order(mask)]
    every = mask if isinstance(mask, list | tuple) else [mask]
    return [bool(keras_ops.histories(m)) for m in every]


def attended(kind: str, name: str, node: Any, given: list[str], place: str) -> list[str]:
    """What attention takes, as query, key and value; one tensor where all are one."""
    order = ARGUMENTS[kind]
    args, kwargs = node.get("args") or [], node.get("kwargs") or {}
    if kind in keras_ops.LISTED:
        args = next((v for v in (*args, kwargs.get("inputs")) if keras_ops.tensors(v)), [])
        kwargs = {}
    every = (*zip(order, args, strict=False), *kwargs.items())
    places = [k for k, v in every if keras_ops.tensors(v)]
    if len(places) != len(given) or "query" not in places or "value" not in places:
        raise refuse(f"{place}: {name}", f"it is called with {', '.join(places)}")
    by = dict(zip(places, given, strict=True))
    found = [by["query"], by.get("key", by["value"]), by["value"]]
    one = len(set(found)) == 1 and kind not in keras_ops.LISTED
    return found[:1] if one else found


def with_shapes(node: Any, shapes: Sequence[Any]) -> Any:
    """A call whose tensors say their shapes, as those of Keras 2 do not, where they are known."""
    left = list(shapes)

    def told(x: Any) -> Any:
        if isinstance(x, list | tuple):
            return [told(v) for v in x]
        if not isinstance(x, Mapping):
            return x
        if x.get("class_name") != "__keras_tensor__":
            return {k: told(v) for k, v in x.items()}
        shape = left.pop(0) if left else None
        known = {"shape": shape} if shape is not None else {}
        return {**x, "config": {**known, **x["config"]}}

    return told(node)


# Layers by what they do to the axes of what they take.
_SAME = ("BatchNormalization", "LayerNormalization", "Dropout", "SpatialDropout1D", "Activation",
         "SpatialDropout2D", "ReLU", "LeakyReLU", "PReLU", "ELU", "Softmax", "Identity",
         "Rescaling", "Normalization", "GaussianNoise", "ops.Pointwise", "ops.Flip")  # fmt: skip
_RANKS = ("Conv", "DepthwiseConv", "SeparableConv", "MaxPooling", "AveragePooling", "ZeroPadding",
          "UpSampling", "Cropping")  # fmt: skip


def shape_of(layer: Layer, given: Sequence[Any]) -> list[int | None] | None:
    """The shape of what a layer gives, None for each size that is not known and for the whole where
    not even the number of axes is."""
    first = given[0] if given else None
    if layer.kind == "Flatten" or (layer.kind.startswith("Global") and not
                                   layer.settings.get("keepdims")):  # fmt: skip
        return [None, None]
    kind, dims = (
        layer.kind.removesuffix("Transpose")[:-2],
        layer.kind.removesuffix("Transpose")[-2:],
    )
    if kind in _RANKS and dims in ("1D", "2D", "3D"):
        return [None] * (int(dims[0]) + 2)
    if first is None:
        return None
    if layer.kind in _SAME:
        return list(first)
    if layer.kind == "Dense":
        return [*first[:-1], layer.settings.get("units")]
    if any(r.kind == "merge" for r in table.rows_of("keras", layer.kind)) and None not in given:
        same = all(g == first for g in given) and layer.kind != "Concatenate"
        alike = all(len(g) == len(first) for g in given)
        return list(first) if same else [None] * len(first) if alike else None
    return None
