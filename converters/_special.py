"""What rows can't declare: padding, and settings that one framework says in another form."""

from typing import Any

from fwt.converters._row import Around, At, Framework, Special, Take, each, refuse

from fwt import layers as fl

# Padding. The canonical form is Flax's: "VALID", "SAME", or (before, after) per spatial axis.

Pairs = tuple[tuple[int, int], ...]


def same_pads(
    sizes: tuple[int, ...], window: tuple[int, ...], strides: tuple[int, ...], dilation: Any
) -> Pairs:
    """What SAME means at these sizes (TensorFlow's rule: the odd one goes after)."""
    out = []
    for n, k, s, d in zip(sizes, window, strides, dilation, strict=True):
        total = max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
        out.append((total // 2, total - total // 2))
    return tuple(out)


def ceil_pads(
    sizes: tuple[int, ...], window: tuple[int, ...], strides: tuple[int, ...], begin: Any
) -> Pairs:
    """What torch's ceil_mode=True means at these sizes."""
    out = []
    for n, k, s, p in zip(sizes, window, strides, begin, strict=True):
        count = -(-(n + 2 * p - k) // s) + 1
        # A window that starts beyond the input and its left padding is dropped.
        count -= (count - 1) * s >= n + p
        out.append((p, p + max((count - 1) * s + k - (n + 2 * p), 0)))
    return tuple(out)


def symmetric(pads: Pairs) -> tuple[int, ...] | None:
    return tuple(lo for lo, _ in pads) if all(lo == hi for lo, hi in pads) else None


def is_same_everywhere(pads: Pairs, window: Any, strides: Any, dilation: Any) -> bool:
    """Whether these pads are SAME at every input size: only with stride 1."""
    return all(s == 1 for s in strides) and pads == same_pads(
        tuple(1000 for _ in pads), window, strides, dilation
    )


def _read_flax_padding(take: Take, window: tuple[int, ...]) -> str | Pairs:
    value = take("padding")
    if isinstance(value, str):
        if value.upper() not in ("SAME", "VALID"):
            raise refuse(take.place, f"padding={value!r}: only 'SAME', 'VALID' or numbers")
        return value.upper()
    if isinstance(value, int):
        value = (value,) * len(window)
    pads = tuple((p, p) if isinstance(p, int) else (int(p[0]), int(p[1])) for p in value)
    if len(pads) != len(window):
        raise refuse(take.place, f"padding={value!r} does not fit a window of {window}")
    return pads if any(lo or hi for lo, hi in pads) else "VALID"


class ConvPadding(Special):
    """Padding of a convolution."""

    def read(self, framework: Framework, take: Take, fields: dict[str, Any], at: At) -> None:
        window = fields["kernel_size"]
        if framework == "flax":
            if isinstance(take("kernel_size"), int):
                raise refuse(take.place, f"kernel_size={window[0]} is a window of one axis")
            for name in ("strides", "kernel_dilation"):
                fields[name] = fields[name] or (1,) * len(window)
            fields["padding"] = _read_flax_padding(take, window)
            return
        value = take("padding")
        if isinstance(value, str):
            if value not in ("same", "valid"):
                raise refuse(take.place, f"padding={value!r}: only 'same' and 'valid'")
            fields["padding"] = value.upper()
            return
        pads = tuple((p, p) for p in each(len(window))(value))
        fields["padding"] = pads if any(lo for lo, _ in pads) else "VALID"

    def write(
        self, framework: Framework, fields: dict[str, Any], settings: dict[str, Any], at: At
    ) -> list[Around]:
        pads = fields["padding"]
        geometry = (fields["kernel_size"], fields["strides"], fields["kernel_dilation"])
        if framework == "flax":
            settings["padding"] = pads
            return []
        if framework == "keras":
            if any(s > 1 for s in geometry[1]) and any(d > 1 for d in geometry[2]):
                raise refuse(at.place, "Keras can't say strides and dilation above 1 together")
            if isinstance(pads, str) or is_same_everywhere(pads, *geometry):
                settings["padding"] = pads.lower() if isinstance(pads, str) else "same"
                return []
            settings["padding"] = "valid"
            return [Around(fl.ZeroPad, "__pad", {"padding": pads})]
        if pads == "VALID":
            settings["padding"] = (0,) * len(geometry[0])
            return []
        if pads == "SAME":
            if all(s == 1 for s in geometry[1]):
                even = same_pads(tuple(1000 for _ in geometry[0]), *geometry)
                settings["padding"] = symmetric(even) or "same"
                return []
            pads = same_pads(at.known("padding='SAME' with strides"), *geometry)
        settings["padding"] = symmetric(pads)
        if settings["padding"] is not None:
            return []
        settings["padding"] = (0,) * len(pads)
        return [Around(fl.ZeroPad, "__pad", {"padding": pads})]


class PoolPadding(Special):
    """Padding, strides and torch's ceil_mode of a pool; ``average`` has count_include_pad."""

    def __init__(self, average: bool):
        self.average = average

    def read(self, framework: Framework, take: Take, fields: dict[str, Any], at: At) -> None:
        window = fields["window_shape"]
        strides = fields["strides"] = fields["strides"] or window
        include = False
        if framework == "flax":
            pads: str | Pairs = _read_flax_padding(take, window)
            include = self.average and take("count_include_pad")
        elif framework == "keras":
            if take("padding") not in ("same", "valid"):
                raise refuse(take.place, f"padding={take('padding')!r}")
            pads = take("padding").upper()
        else:
            include = self.average and take("count_include_pad")
            begin = each(len(window))(take("padding"))
            pads = tuple((p, p) for p in begin)
            if take("ceil_mode"):
                even, pads = pads, ceil_pads(at.known("ceil_mode=True"), window, strides, begin)
                if pads != even:
                    if include and any(begin):
                        raise refuse(
                            take.place,
                            "ceil_mode=True with padding and count_include_pad=True counts a part "
                            "of the padding only",
                            "set count_include_pad=False or ceil_mode=False",
                        )
                    include = False
            if not any(lo or hi for lo, hi in pads):
                pads = "VALID"
        fields["padding"] = pads
        if self.average:
            fields["count_include_pad"] = bool(include) and pads != "VALID"

    def write(
        self, framework: Framework, fields: dict[str, Any], settings: dict[str, Any], at: At
    ) -> list[Around]:
        pads, window, strides = fields["padding"], fields["window_shape"], fields["strides"]
        include = fields.get("count_include_pad", False)
        ones = (1,) * len(window)
        if framework == "flax":
            settings["padding"] = pads
            if self.average:
                settings["count_include_pad"] = include
            return []
        if pads == "SAME" and (framework == "torch" or include):
            pads = same_pads(at.known("padding='SAME'"), window, strides, ones)
        if not isinstance(pads, str) and not any(lo or hi for lo, hi in pads):
            pads = "VALID"
        pad = Around(fl.ZeroPad, "__pad", {"padding": pads})
        if framework == "keras":
            settings["padding"] = "valid"
            if isinstance(pads, str):
                settings["padding"] = pads.lower()
                return []
            if include:
                return [pad]
            if is_same_everywhere(pads, window, strides, ones) or (
                all(s is not None for s in at.sizes)
                and pads == same_pads(at.known(""), window, strides, ones)
            ):
                settings["padding"] = "same"
                return []
            if not self.average and at.non_negative:
                return [pad]  # zeros never win against what is >= 0
            raise refuse(
                at.place,
                f"Keras can't say a {'mean' if self.average else 'maximum'} that leaves out a "
                f"padding of {pads}",
                "use a padding that Keras' 'same' gives at this size",
            )
        settings["padding"] = (0,) * len(window)
        if pads == "VALID":
            return []
        even = symmetric(pads)
        if even is not None and all(2 * p <= k for p, k in zip(even, window, strict=True)):
            settings["padding"] = even
            if self.average:
                settings["count_include_pad"] = include
            return []
        begin = tuple(lo for lo, _ in pads)
        fits = all(2 * p <= k for p, k in zip(begin, window, strict=True))
        sized = [s for s in at.sizes if s is not None]
        fits = fits and not include and len(sized) == len(window)
        if fits and pads == ceil_pads(tuple(sized), window, strides, begin):
            settings["padding"], settings["ceil_mode"] = begin, True
            if self.average:
                settings["count_include_pad"] = False
            return []
        if not self.average:
            return [Around(fl.ConstantPad, "__pad", {"padding": pads, "value": float("-inf")})]
        if include:
            return [pad]
        raise refuse(
            at.place,
            f"torch can't say a mean that leaves out a padding of {pads}",
            "use a symmetric padding, or 'VALID'",
        )


class BatchNormAffine(Special):
    """torch has both of scale and bias, or none."""

    def read(self, framework: Framework, take: Take, fields: dict[str, Any], at: At) -> None:
        if framework == "flax" and take("use_running_average") is False:
            raise refuse(take.place, "use_running_average=False: it predicts from each batch")
        if fields["momentum"] is None:
            raise refuse(
                take.place,
                "momentum=None is a cumulative mean, which only torch has",
                "give a number",
            )
        if framework == "torch" and "bias" in take.values:  # a setting of newer versions
            fields["use_bias"] = take("bias") and fields["use_bias"]

    def write(
        self, framework: Framework, fields: dict[str, Any], settings: dict[str, Any], at: At
    ) -> list[Around]:
        if framework == "torch":
            settings["affine"] = fields["use_scale"] or fields["use_bias"]
        return []


class InferenceFlag(Special):
    """Dropout: the identity at inference, unless it is told to drop always."""

    def read(self, framework: Framework, take: Take, fields: dict[str, Any], at: At) -> None:
        if framework == "flax" and take("deterministic") is False:
            raise refuse(take.place, "deterministic=False: it drops at inference too")


class PadAmounts(Special):
    """torch lists the last axis first and flat; Keras lists pairs, as Flax does."""

    def read(self, framework: Framework, take: Take, fields: dict[str, Any], at: At) -> None:
        value = fl.tuples(take("padding"))
        if framework == "torch":
            flat = (value,) * 4 if isinstance(value, int) else value
            value = tuple((flat[i], flat[i + 1]) for i in range(len(flat) - 2, -1, -2))
        elif isinstance(value, int):
            value = ((value, value),) * 2
        pairs = tuple((p, p) if isinstance(p, int) else p for p in value)
        if any(n < 0 for pair in pairs for n in pair):
            raise refuse(take.place, f"padding={value!r}: negative amounts crop")
        fields["padding"] = pairs

    def write(
        self, framework: Framework, fields: dict[str, Any], settings: dict[str, Any], at: At
    ) -> list[Around]:
        pairs = fields["padding"]
        settings["padding"] = (
            tuple(n for pair in reversed(pairs) for n in pair) if framework == "torch" else pairs
        )
        return []


class GlobalPool(Special):
    """torch's AdaptiveAvgPool2d(1) keeps the axes: a Flatten after it drops them."""

    def read(self, framework: Framework, take: Take, fields: dict[str, Any], at: At) -> None:
        if framework != "torch":
            fields["keepdims"] = bool(take("keepdims"))
            return
        if each(2)(take("output_size")) != (1, 1):
            raise refuse(take.place, f"output_size={take('output_size')!r}: only 1")
        fields["keepdims"] = True

    def write(
        self, framework: Framework, fields: dict[str, Any], settings: dict[str, Any], at: At
    ) -> list[Around]:
        if framework != "torch":
            settings["keepdims"] = fields["keepdims"]
            return []
        settings["output_size"] = (1, 1)
        return [] if fields["keepdims"] else [Around(fl.Flatten, "__flatten", before=False)]


class UnflattenDim(Special):
    """torch splits one axis; ours and Keras's reshape all of them."""

    def read(self, framework: Framework, take: Take, fields: dict[str, Any], at: At) -> None:
        if framework != "torch":
            return
        if at.rank is None:
            raise refuse(take.place, "the rank of its input is not known", "give input_shape=")
        if take("dim") not in (1, -1) or at.rank != 2:
            raise refuse(take.place, f"dim={take('dim')} of rank {at.rank}: only dim=1 of rank 2")

    def write(
        self, framework: Framework, fields: dict[str, Any], settings: dict[str, Any], at: At
    ) -> list[Around]:
        if framework != "torch":
            return []
        settings["dim"] = 1
        return [] if at.rank == 2 else [Around(fl.Flatten, "__flatten")]


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


class TorchSoftmaxDim(Special):
    """torch's dim=None guesses by rank."""

    def read(self, framework: Framework, take: Take, fields: dict[str, Any], at: At) -> None:
        if framework == "torch" and fields["axis"] is None:
            raise refuse(take.place, "dim=None: torch guesses the axis", "give dim= a number")
