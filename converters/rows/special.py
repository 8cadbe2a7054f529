"""What rows can't declare: settings that one framework says in another form."""

import json
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from fwt import layers as fl
from fwt.converters.rows.padding import pairs_in
from fwt.converters.rows.row import (
    Around,
    At,
    Framework,
    Layer,
    Special,
    Take,
    each,
    is_training,
    refuse,
    whole,
)


class BatchNormAffine(Special):
    """torch has both of scale and bias, or none. Its momentum=None, a cumulative mean in training,
    goes with the sidecar. ``tracks``: whether the layer is an InstanceNorm with statistics."""

    def __init__(self, tracks: bool = False):
        self.tracks = tracks

    def read(self, framework: Framework, take: Take, fields: dict[str, Any], at: At) -> None:
        if framework == "flax" and take("use_running_average") is False:
            raise refuse(take.place, "use_running_average=False: it predicts from each batch")
        if framework == "torch" and fields["momentum"] is None:
            fields["momentum"] = 0.99
        if framework == "torch" and self.tracks:
            take("track_running_stats")
        if framework == "torch" and "bias" in take.values:  # a setting of newer versions
            fields["use_bias"] = take("bias") and fields["use_bias"]

    def write(
        self, framework: Framework, fields: dict[str, Any], settings: dict[str, Any], at: At
    ) -> list[Around]:
        if framework == "torch":
            settings["affine"] = fields["use_scale"] or fields["use_bias"]
            if self.tracks:
                settings["track_running_stats"] = True
        return []

    def finish(
        self, framework: Framework, layer: Layer, fields: Mapping[str, Any], sizes: Any, at: At
    ) -> Layer:
        if framework == "keras":
            layer.kind = "BatchNormalization"
        return layer


class InferenceFlag(Special):
    """Dropout: the identity at inference, unless it is told to drop always."""

    def read(self, framework: Framework, take: Take, fields: dict[str, Any], at: At) -> None:
        if framework == "flax" and take("deterministic") is False:
            raise refuse(take.place, "deterministic=False: it drops at inference too")


class GlobalPool(Special):
    """torch's AdaptiveAvgPool2d(1) keeps the axes: a Flatten after it drops them."""

    def read(self, framework: Framework, take: Take, fields: dict[str, Any], at: At) -> None:
        if framework != "torch":
            fields["keepdims"] = bool(take("keepdims"))
            return
        take("output_size")
        fields["keepdims"] = True

    def write(
        self, framework: Framework, fields: dict[str, Any], settings: dict[str, Any], at: At
    ) -> list[Around]:
        if framework != "torch":
            settings["keepdims"] = fields["keepdims"]
            return []
        settings["output_size"] = (1,) * (len(at.sizes) or (at.rank or 4) - 2)
        return (
            []
            if fields["keepdims"]
            else [Around(fl.Flatten, "__flatten", {"start": 1, "end": -1}, before=False)]
        )


class FlattenAxes(Special):
    """Keras flattens all axes, torch and ours from one to another."""

    names: ClassVar = {"flax": ("start", "end"), "torch": ("start_dim", "end_dim")}

    def read(self, framework: Framework, take: Take, fields: dict[str, Any], at: At) -> None:
        if framework == "keras":
            take("data_format")
        start, end = (take(n) for n in self.names[framework]) if framework != "keras" else (1, -1)
        fields["start"], fields["end"] = start, end

    def write(
        self, framework: Framework, fields: dict[str, Any], settings: dict[str, Any], at: At
    ) -> list[Around]:
        if framework != "keras" and (fields["start"], fields["end"]) != (1, -1):
            settings |= dict(
                zip(self.names[framework], (fields["start"], fields["end"]), strict=True)
            )
        return []


class UnflattenDim(Special):
    """torch splits one axis; ours and Keras's reshape all of them."""

    def read(self, framework: Framework, take: Take, fields: dict[str, Any], at: At) -> None:
        if framework != "torch":
            return
        if at.rank is None:
            raise refuse(take.place, "the rank of its input is not known", "give input_shape=")
        dim = take("dim")
        if not isinstance(dim, int) or not -at.rank <= dim < at.rank:
            raise refuse(take.place, f"dim={dim!r} is no axis of rank {at.rank}")
        fields["dim"] = None if at.rank == 2 and dim in (1, -1) else dim

    def write(
        self, framework: Framework, fields: dict[str, Any], settings: dict[str, Any], at: At
    ) -> list[Around]:
        if framework != "torch":
            return []
        settings["dim"] = 1
        return [] if at.rank == 2 else [Around(fl.Flatten, "__flatten", {"start": 1, "end": -1})]


class PermuteDims(Special):
    """Keras leaves out the batch axis."""

    def read(self, framework: Framework, take: Take, fields: dict[str, Any], at: At) -> None:
        dims = fl.tuples(take("dims"))
        fields["dims"] = (0, *dims) if framework == "keras" else dims

    def write(
        self, framework: Framework, fields: dict[str, Any], settings: dict[str, Any], at: At
    ) -> list[Around]:
        settings["dims"] = fields["dims"][1:] if framework == "keras" else fields["dims"]
        return []


class Statistics(Special):
    """Normalization: Keras has its statistics in variables, or in its settings."""

    def read(self, framework: Framework, take: Take, fields: dict[str, Any], at: At) -> None:
        if framework == "torch":
            fields["axes"] = (1,)
            take("size")
        elif framework == "keras":
            take("mean")
            take("variance")

    def write(
        self, framework: Framework, fields: dict[str, Any], settings: dict[str, Any], at: At
    ) -> list[Around]:
        if framework == "torch" and len(fields["axes"]) != 1:
            raise refuse(at.place, "torch's has statistics for one axis only")
        if framework == "torch":
            settings["size"] = at.numbered[0]
        return []

    def finish(
        self, framework: Framework, layer: Layer, fields: Mapping[str, Any], sizes: Any, at: At
    ) -> Layer:
        if framework == "keras":
            layer.settings |= {k: layer.arrays[k].tolist() for k in ("mean", "variance")}
            layer.arrays = {}
        return layer


class Halves(Special):
    """GLU, which Keras's Activation takes for a layer that keeps the shape."""

    def finish(
        self, framework: Framework, layer: Layer, fields: Mapping[str, Any], sizes: Any, at: At
    ) -> Layer:
        if framework == "keras":
            raise refuse(
                at.place,
                "keras has no GLU: its Activation('glu') tells the next layer the shape before it",
            )
        return layer


class TorchSoftmaxDim(Special):
    """torch's dim=None guesses by rank."""

    def read(self, framework: Framework, take: Take, fields: dict[str, Any], at: At) -> None:
        if framework == "torch" and fields["axis"] is None:
            raise refuse(take.place, "dim=None: torch guesses the axis", "give dim= a number")


class AxesNorm(Special):
    """LayerNorm and RMSNorm: torch counts the last axes and says their sizes."""

    def __init__(self, bias: bool = True):
        self.bias = bias

    def read(self, framework: Framework, take: Take, fields: dict[str, Any], at: At) -> None:
        if framework == "flax":
            if fl.tuples(take("feature_axes")) != fl.tuples(fields["reduction_axes"]):
                raise refuse(take.place, "feature_axes must be its reduction_axes")
        elif framework == "torch":
            shape = take("normalized_shape")
            count = 1 if isinstance(shape, int) else len(shape)
            fields["reduction_axes"] = tuple(range(-count, 0))
            fields["use_scale"] = affine = take("elementwise_affine")
            if self.bias:
                fields["use_bias"] = take("bias") and affine
            elif fields["epsilon"] is None:
                fields["epsilon"] = float(np.finfo(np.float32).eps)

    def write(
        self, framework: Framework, fields: dict[str, Any], settings: dict[str, Any], at: At
    ) -> list[Around]:
        if framework == "flax":
            axes = fields["reduction_axes"]
            axes = axes[0] if len(axes) == 1 else axes
            settings["reduction_axes"] = settings["feature_axes"] = axes
            settings["use_fast_variance"] = not self.bias  # it breaks where the mean is large
        elif framework == "torch":
            if any(n is None for n in at.numbered):
                raise refuse(at.place, "normalized_shape is not known", "give input_shape=")
            settings["normalized_shape"] = at.numbered
            settings["elementwise_affine"] = fields["use_scale"] or fields.get("use_bias", False)
            if self.bias:
                settings["bias"] = fields["use_bias"]
        else:
            axes = fields["reduction_axes"]
            settings["axis"] = axes[0] if len(axes) == 1 else axes
        return []


class ChannelNorm(Special):
    """GroupNorm and InstanceNorm: of the last axis but for torch, where it is the second."""

    def __init__(self, groups: bool):
        self.groups = groups

    def read(self, framework: Framework, take: Take, fields: dict[str, Any], at: At) -> None:
        if framework == "torch" and "bias" in take.values:
            fields["use_bias"] = take("bias") and fields["use_bias"]
        if framework == "torch" and not self.groups:
            take("momentum")  # of the statistics that it does not track
        if framework == "keras":
            take("groups")

    def write(
        self, framework: Framework, fields: dict[str, Any], settings: dict[str, Any], at: At
    ) -> list[Around]:
        if framework == "torch":
            settings["affine"] = fields["use_scale"] or fields["use_bias"]
        elif framework == "flax":
            settings["use_fast_variance"] = False
        elif not self.groups:
            settings["groups"] = -1
        return []

    def finish(
        self, framework: Framework, layer: Layer, fields: Mapping[str, Any], sizes: Any, at: At
    ) -> Layer:
        if self.groups and sizes.get("c", 0) % fields["num_groups"]:
            raise refuse(
                at.place, f"{fields['num_groups']} groups do not divide {sizes['c']} channels"
            )
        return layer


class Slopes(Special):
    """PReLU: Keras says which axes share a slope, torch has one for all or one a channel."""

    def read(self, framework: Framework, take: Take, fields: dict[str, Any], at: At) -> None:
        if framework == "torch":
            fields["axes"] = () if take("num_parameters") == 1 else (1,)
            take("init")
        elif framework == "keras":  # lowered: the axes that have slopes of their own
            fields["axes"] = take("axes")
            take("shared_axes")

    def write(
        self, framework: Framework, fields: dict[str, Any], settings: dict[str, Any], at: At
    ) -> list[Around]:
        settings["axes"] = fields["axes"]
        return []

    def finish(
        self, framework: Framework, layer: Layer, fields: Mapping[str, Any], sizes: Any, at: At
    ) -> Layer:
        (name, slope), *_ = layer.arrays.items()
        axes = layer.settings.pop("axes")
        if framework == "flax":
            layer.settings["axes"] = axes
        elif framework == "torch":
            layer.settings["num_parameters"] = slope.size
            layer.arrays[name] = slope.reshape(-1)
        else:
            if at.rank is None:
                raise refuse(at.place, "the rank of its input is not known", "give input_shape=")
            own = [a % at.rank for a in axes]
            layer.settings["shared_axes"] = [a for a in range(1, at.rank) if a not in own]
            shape = iter(slope.shape)
            full = [next(shape) if a in own else 1 for a in range(1, at.rank)]
            layer.arrays[name] = slope.reshape(full)
        return layer


class EmbeddingSettings(Special):
    """What an Embedding has for training is left; what changes its output is refused."""

    def read(self, framework: Framework, take: Take, fields: dict[str, Any], at: At) -> None:
        if framework == "torch":
            for name in ("padding_idx", "norm_type", "scale_grad_by_freq", "sparse"):
                take(name)
            for name in ("_weight", "_freeze"):
                take.taken.add(name)
            if take("max_norm") is not None:
                raise refuse(
                    take.place, f"max_norm={take('max_norm')}: it changes its weights when called"
                )
        elif framework == "keras":
            take.taken.add("mask_zero")  # see _convert


# The identity at inference, each of them.
INERT = {
    "keras": (
        "ActivityRegularization",
        "AlphaDropout",
        "GaussianDropout",
        "GaussianNoise",
        "SpatialDropout1D",
        "SpatialDropout2D",
        "SpatialDropout3D",
        "Dropout",
        "AugMix",
        "CutMix",
        "MixUp",
        "RandAugment",
        "RandomBrightness",
        "RandomColorDegeneration",
        "RandomColorJitter",
        "RandomContrast",
        "RandomElasticTransform",
        "RandomErasing",
        "RandomFlip",
        "RandomGaussianBlur",
        "RandomGrayscale",
        "RandomHue",
        "RandomInvert",
        "RandomPerspective",
        "RandomPosterization",
        "RandomRotation",
        "RandomSaturation",
        "RandomSharpness",
        "RandomShear",
        "RandomTranslation",
        "RandomZoom",
    ),
    "torch": ("AlphaDropout", "Dropout1d", "Dropout2d", "Dropout3d", "FeatureAlphaDropout"),
}


class Inert(Special):
    """A layer that acts in training only: the identity, with its settings for the way back."""

    def __init__(self, framework: str = "", kind: str = ""):
        self.framework, self.kind = framework, kind

    def read(self, framework: Framework, take: Take, fields: dict[str, Any], at: At) -> None:
        if framework == "flax":
            fields |= {k: take(k) for k in ("framework", "kind", "settings")}
            known = INERT.get(fields["framework"], ())
            try:
                given = json.loads(fields["settings"])
            except (TypeError, ValueError):
                given = None
            if fields["kind"] not in known or not isinstance(given, dict):
                raise refuse(
                    take.place,
                    f"{fields['framework']!r} has no training-only layer {fields['kind']!r} with "
                    f"settings {fields['settings']!r:.80} (JSON)",
                )
            return
        kept = {k: v for k, v in take.values.items() if not is_training(framework, k)}
        take.taken |= set(take.values)
        try:
            text = json.dumps(kept, sort_keys=True)
        except TypeError as error:
            raise refuse(take.place, f"a setting can't be kept ({error})") from error
        fields |= {"framework": self.framework, "kind": self.kind, "settings": text}

    def write(
        self, framework: Framework, fields: dict[str, Any], settings: dict[str, Any], at: At
    ) -> list[Around]:
        if framework == "flax":
            settings |= {k: fields[k] for k in ("framework", "kind", "settings")}
        return []

    def finish(
        self, framework: Framework, layer: Layer, fields: Mapping[str, Any], sizes: Any, at: At
    ) -> Layer:
        if framework == "flax":
            return layer
        given = json.loads(fields["settings"])
        if fields["framework"] == framework:
            return Layer(layer.name, fields["kind"], given)
        twin = _TWINS.get((framework, fields["kind"]))
        if twin is None:
            return Layer(layer.name, "Identity", {})
        rate = {"keras": "rate", "torch": "p"}
        if rate[fields["framework"]] not in given:
            raise refuse(at.place, f"the setting {rate[fields['framework']]!r} is missing")
        return Layer(layer.name, twin, {rate[framework]: given[rate[fields["framework"]]]})


# The layer of a framework that does in training what the other's does.
_TWINS = {
    **{("torch", f"SpatialDropout{r}D"): f"Dropout{r}d" for r in (1, 2, 3)},
    **{("keras", f"Dropout{r}d"): f"SpatialDropout{r}D" for r in (1, 2, 3)},
    ("torch", "AlphaDropout"): "AlphaDropout",
    ("keras", "AlphaDropout"): "AlphaDropout",
}


class ResizeSettings(Special):
    """Resizing: torch's Upsample, Keras's UpSampling2D and Resizing."""

    FIELDS = ("shape", "scale", "method", "align_corners", "copies")

    def __init__(self, rank: int):
        self.rank = rank

    def _linear(self) -> str:
        return ("linear", "bilinear", "trilinear")[self.rank - 1]

    def _copies(self, fields: Mapping[str, Any]) -> bool | None:
        """Whether torch copies an axis that keeps its size, and doubles pixels, whatever the scale
        is; None where the scale tells the same at any size."""
        scale, method = fields["scale"], fields["method"]
        if scale is None or fields["align_corners"] or method == "nearest-exact":
            return None
        if not any(1 < s < (2 if method == "linear" else 3) and s != 2 for s in scale):
            return None
        return bool(method == "linear" or self.rank == 2)

    def read(self, framework: Framework, take: Take, fields: dict[str, Any], at: At) -> None:
        fields |= {"shape": None, "scale": None, "method": "linear", "align_corners": False}
        fields |= {"copies": False}
        if framework == "flax":
            fields |= {k: take(k) for k in fields if k in self.FIELDS}
        elif framework == "torch":
            size, scale = take("size"), take("scale_factor")
            if size is not None:
                fields["shape"] = each(self.rank)(size)
            else:
                many = isinstance(scale, list | tuple)
                fields["scale"] = tuple(scale) if many else (float(scale),) * self.rank
            mode = take("mode")
            fields["method"] = "linear" if mode == self._linear() else mode
            fields["align_corners"] = bool(take("align_corners"))
            if fields["method"] not in ("nearest", "nearest-exact", "linear"):
                raise refuse(
                    take.place, f"mode={mode!r}: only nearest, nearest-exact and {self._linear()}"
                )
            if take("recompute_scale_factor") and fields["scale"] is not None:
                known = at.known("recompute_scale_factor=True")
                sizes = zip(known, fields["scale"], strict=True)
                fields["shape"], fields["scale"] = tuple(int(n * s) for n, s in sizes), None
            onnx = "copies" in take.values  # whose Resize computes by its scales alone
            fields["copies"] = take("copies") if onnx else bool(self._copies(fields))
        elif "size" in take.values:
            fields["scale"] = tuple(float(s) for s in each(2)(take("size")))
            if take("interpolation") != "bilinear":
                raise refuse(
                    take.place,
                    f"interpolation={take('interpolation')!r}: only nearest and bilinear are the "
                    "same elsewhere",
                )
        else:
            fields["shape"] = (whole(take("height")), whole(take("width")))
            kind = take("interpolation")
            if kind not in ("bilinear", "nearest"):
                raise refuse(
                    take.place,
                    f"interpolation={kind!r}: only bilinear and nearest are the same elsewhere",
                )
            fields["method"] = "linear" if kind == "bilinear" else "nearest-exact"

    def write(
        self, framework: Framework, fields: dict[str, Any], settings: dict[str, Any], at: At
    ) -> list[Around]:
        if framework == "flax":
            settings |= {k: fields[k] for k in self.FIELDS}
        elif framework == "torch":
            if self._copies(fields) not in (None, fields["copies"]):
                self._check_same(fields, at)
            settings |= {"size": fields["shape"], "scale_factor": fields["scale"]}
            settings["mode"] = self._linear() if fields["method"] == "linear" else fields["method"]
            if fields["method"] == "linear":
                settings["align_corners"] = fields["align_corners"]
        return []

    def _check_same(self, fields: Mapping[str, Any], at: At) -> None:
        """Raises where torch resizes an axis by another step than the scale's."""
        known = at.known("whether torch resizes by the scale or copies an axis")
        here, there = (
            fl.Resize(**{k: fields[k] for k in self.FIELDS if k != "copies"}, copies=c).steps(known)
            for c in (False, True)
        )
        if here != there:
            copies, plain = "copies an axis that keeps its size or doubles it", "goes by the scale"
            torch_does = plain if fields["copies"] else copies
            raise refuse(
                at.place,
                f"it resizes {known} by scale={fields['scale']} to {tuple(m for m, _ in here)}, "
                f"where torch {torch_does}",
                "say the sizes with shape=, or an exact scale",
            )

    def finish(
        self, framework: Framework, layer: Layer, fields: Mapping[str, Any], sizes: Any, at: At
    ) -> Layer:
        if framework != "keras":
            return layer
        shape, scale, method = fields["shape"], fields["scale"], fields["method"]
        if self.rank != 2 or fields["align_corners"]:
            raise refuse(at.place, "Keras resizes images only, and never with align_corners=True")
        if method == "linear" and scale is not None and all(s == int(s) for s in scale):
            size = tuple(int(s) for s in scale)
            settings = {"size": size, "interpolation": "bilinear", "data_format": "channels_last"}
            return Layer(layer.name, "UpSampling2D", settings)
        if shape is None:
            known = at.known("the size that it is resized to")
            steps = fl.Resize(**{k: fields[k] for k in self.FIELDS}).steps(known)
            shape = tuple(m for m, _ in steps)
            each_axis = zip(known, steps, scale, strict=True)
            if any(m != n * s and step != n / m for n, (m, step), s in each_axis):
                raise refuse(at.place, f"Keras can't say scale={scale} at {known}")
        if method == "nearest":
            raise refuse(
                at.place,
                "Keras's nearest takes the pixel under the centre, not that at floor(i / scale)",
                "use a whole scale, or mode='nearest-exact'",
            )
        kind = "bilinear" if method == "linear" else "nearest"
        settings = {"height": shape[0], "width": shape[1], "interpolation": kind}
        settings["data_format"] = "channels_last"
        return Layer(layer.name, "Resizing", settings)


class Centred(Special):
    """CenterCrop, which torch can't say but for a known size."""

    def read(self, framework: Framework, take: Take, fields: dict[str, Any], at: At) -> None:
        if framework == "flax":
            fields["size"] = take("size")
        if framework == "keras":
            fields["size"] = (whole(take("height")), whole(take("width")))
            if any(n < m for n, m in zip(at.known("whether it fits"), fields["size"], strict=True)):
                raise refuse(take.place, "the input is smaller, so that Keras resizes it")

    def write(
        self, framework: Framework, fields: dict[str, Any], settings: dict[str, Any], at: At
    ) -> list[Around]:
        if framework == "keras":
            settings["height"], settings["width"] = fields["size"]
        elif framework == "flax":
            settings["size"] = fields["size"]
        return []

    def finish(
        self, framework: Framework, layer: Layer, fields: Mapping[str, Any], sizes: Any, at: At
    ) -> Layer:
        if framework != "torch":
            return layer
        pairs = []
        for n, m in zip(at.known("what it crops"), fields["size"], strict=True):
            pairs.append((-((n - m) // 2), -(n - m - (n - m) // 2)))
        return Layer(layer.name, "ZeroPad2d", {"padding": pairs_in("torch", tuple(pairs))})


class OneNumber(Special):
    """Keras's UpSampling1D takes a number, no tuple of one."""

    def finish(
        self, framework: Framework, layer: Layer, fields: Mapping[str, Any], sizes: Any, at: At
    ) -> Layer:
        if framework == "keras":
            layer.settings["size"] = fields["size"][0]
        return layer
