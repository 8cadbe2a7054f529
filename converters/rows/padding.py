"""Padding: of convolutions, pools and transposed convolutions, and pads and crops themselves."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from fwt import layers as fl
from fwt._modules import even
from fwt.converters.rows import grouped
from fwt.converters.rows.row import Around, At, Framework, Layer, Special, Take, each, refuse, sides
from fwt.layers.convolutions import transposed_padding

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


def causal(window: tuple[int, ...], dilation: tuple[int, ...]) -> str | Pairs:
    """All padding before, so that no output sees a later input."""
    before = (window[0] - 1) * dilation[0]
    return ((before, 0),) if before else "VALID"


def symmetric(pads: Pairs) -> tuple[int, ...] | None:
    return tuple(lo for lo, _ in pads) if all(lo == hi for lo, hi in pads) else None


def is_same_everywhere(pads: Pairs, window: Any, strides: Any, dilation: Any) -> bool:
    """Whether these pads are SAME at every input size: only with stride 1."""
    return all(s == 1 for s in strides) and pads == same_pads(
        tuple(1000 for _ in pads), window, strides, dilation
    )


def _read_flax_padding(
    take: Take, window: tuple[int, ...], dilation: tuple[int, ...] = (1,)
) -> str | Pairs:
    value = take("padding")
    if value == "CAUSAL" and len(window) == 1:
        return causal(window, dilation)
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
            fields["padding"] = _read_flax_padding(take, window, fields["kernel_dilation"])
            return
        value = take("padding")
        if framework == "torch":
            take("padding_mode")  # another than zeros became a layer of its own
        if value == "causal" and len(window) == 1:
            fields["padding"] = causal(window, fields["kernel_dilation"])
            return
        if isinstance(value, str):
            if value not in ("same", "valid"):
                raise refuse(take.place, f"padding={value!r}: only 'same' and 'valid'")
            fields["padding"] = value.upper()
            return
        pads = sides(value, len(window))
        fields["padding"] = pads if any(lo or hi for lo, hi in pads) else "VALID"

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
            if len(pads) == 1 and pads == causal(geometry[0], geometry[2]):
                settings["padding"] = "causal"
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

    def finish(
        self, framework: Framework, layer: Layer, fields: Mapping[str, Any], sizes: Any, at: At
    ) -> Layer:
        """Keras has a class of its own for as many groups as inputs."""
        groups, settings = fields["feature_group_count"], layer.settings
        rank = len(fields["kernel_size"])
        plain = settings.get("padding") != "causal"
        part = layer.name.endswith("__depthwise")  # of a SeparableConv
        if framework != "keras" or groups != sizes.get("i") or rank > 2:
            return layer
        if groups == 1 and not part:
            return layer
        if not even(fields["strides"]) or not plain:
            return layer
        settings = {k: v for k, v in settings.items() if k not in ("filters", "groups")}
        settings["depth_multiplier"] = fields["features"] // groups
        kernel = layer.arrays["kernel"]
        arrays = {**layer.arrays, "kernel": kernel.reshape(*kernel.shape[:-2], groups, -1)}
        return Layer(layer.name, f"DepthwiseConv{rank}D", settings, arrays)


class PoolPadding(Special):
    """Padding, strides and torch's ceil_mode of a pool; ``average`` has count_include_pad."""

    def __init__(self, average: bool):
        self.average = average

    def read(self, framework: Framework, take: Take, fields: dict[str, Any], at: At) -> None:
        window = fields["window_shape"]
        strides = fields["strides"] = fields["strides"] or window
        dilation = fields.get("dilation") or (1,) * len(window)
        window = tuple((k - 1) * d + 1 for k, d in zip(window, dilation, strict=True))
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
            pads = sides(take("padding"), len(window))
            begin = tuple(lo for lo, _ in pads)
            if take("ceil_mode"):
                even, pads = pads, ceil_pads(at.known("ceil_mode=True"), window, strides, begin)
                if pads != even and fields.get("divisor") is None:
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
            include = bool(include) or fields.get("divisor") is not None
            fields["count_include_pad"] = include and pads != "VALID"

    def write(
        self, framework: Framework, fields: dict[str, Any], settings: dict[str, Any], at: At
    ) -> list[Around]:
        pads, window, strides = fields["padding"], fields["window_shape"], fields["strides"]
        include = fields.get("count_include_pad", False)
        ones = (1,) * len(window)
        dilation = fields.get("dilation") or ones
        kernel = window
        window = tuple((k - 1) * d + 1 for k, d in zip(window, dilation, strict=True))
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
        if even is not None and all(2 * p <= k for p, k in zip(even, kernel, strict=True)):
            settings["padding"] = even
            if self.average:
                settings["count_include_pad"] = include
            return []
        begin = tuple(lo for lo, _ in pads)
        fits = all(2 * p <= k for p, k in zip(begin, kernel, strict=True))
        sized = [s for s in at.sizes if s is not None]
        divided = fields.get("divisor") is not None
        fits = fits and (not include or divided) and len(sized) == len(window)
        if fits and pads == ceil_pads(tuple(sized), window, strides, begin):
            settings["padding"], settings["ceil_mode"] = begin, True
            if self.average:
                settings["count_include_pad"] = divided
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


def pairs_of(framework: Framework, value: Any, rank: int) -> Pairs:
    """(before, after) for each spatial axis. torch lists the last axis first and flat; Keras
    lists pairs, as Flax does, or one pair alone for one axis."""
    value = fl.tuples(value)
    if isinstance(value, int):
        return ((value, value),) * rank
    if framework == "torch":
        if len(value) != 2 * rank:
            raise ValueError(f"expected {2 * rank} numbers, found {value!r}")
        return tuple((value[i], value[i + 1]) for i in range(len(value) - 2, -1, -2))
    if framework == "keras" and rank == 1 and len(value) == 2:
        return (value,)
    if len(value) != rank:
        raise ValueError(f"expected {rank} pairs, found {value!r}")
    return tuple((p, p) if isinstance(p, int) else (p[0], p[1]) for p in value)


def pairs_in(framework: Framework, pairs: Pairs) -> Any:
    """The inverse of :func:`pairs_of`."""
    if framework == "torch":
        return tuple(n for pair in reversed(pairs) for n in pair)
    return pairs[0] if framework == "keras" and len(pairs) == 1 else pairs


class PadAmounts(Special):
    """The amounts of a pad or crop; a negative pad crops."""

    def __init__(self, rank: int, field: str = "padding"):
        self.rank, self.field = rank, field

    def read(self, framework: Framework, take: Take, fields: dict[str, Any], at: At) -> None:
        pairs = pairs_of(framework, take(self.field), self.rank)
        if any(n < 0 for pair in pairs for n in pair) and framework == "keras":
            raise refuse(take.place, f"{self.field}={pairs!r}: negative amounts")
        fields[self.field] = pairs

    def write(
        self, framework: Framework, fields: dict[str, Any], settings: dict[str, Any], at: At
    ) -> list[Around]:
        pairs = fields[self.field]
        around = []
        if framework == "torch" and self.field == "cropping":
            settings["padding"] = pairs_in("torch", tuple((-lo, -hi) for lo, hi in pairs))
            return []
        if framework == "keras" and self.field == "padding":
            cut = tuple((max(-lo, 0), max(-hi, 0)) for lo, hi in pairs)
            pairs = tuple((max(lo, 0), max(hi, 0)) for lo, hi in pairs)
            if any(n for pair in cut for n in pair) and any(n for pair in pairs for n in pair):
                around = [Around(fl.Crop, "__crop", {"cropping": cut})]
        settings[self.field] = pairs_in(framework, pairs)
        return around

    def finish(
        self, framework: Framework, layer: Layer, fields: Mapping[str, Any], sizes: Any, at: At
    ) -> Layer:
        if framework == "torch" and self.field == "cropping":
            return dataclasses.replace(layer, kind=f"ZeroPad{self.rank}d")
        pairs = fields[self.field]
        if framework == "keras" and self.field == "padding":
            amounts = [n for pair in pairs for n in pair]
            if max(amounts) <= 0 and any(amounts):
                cut = pairs_in("keras", tuple((-lo, -hi) for lo, hi in pairs))
                settings = {**layer.settings, "cropping": cut}
                del settings["padding"]
                if self.rank == 1:
                    del settings["data_format"]
                return Layer(layer.name, f"Cropping{self.rank}D", settings)
        return layer


class Transposed(Special):
    """Padding of a transposed convolution: (before, after) around the spread-out input.

    A crop of ``start`` from the whole result is a padding of ``k - 1 - start``. With groups, torch
    has them in one class with the plain one, and Keras has no such class at all.
    """

    def __init__(self, rank: int, groups: bool = False):
        self.rank, self.groups = rank, groups

    @staticmethod
    def _default(k: int, s: int, padding: str, extra: int | None) -> tuple[int, int]:
        """What Keras's and Flax's 'valid' and 'same' mean for one axis; ``k`` as dilated."""
        if extra is None:
            return transposed_padding(k, s, padding.upper())
        if padding == "valid":
            return k - 1, k - 1 + extra
        total = k + k % 2 - 2 + extra
        before = min(total // 2 + total % 2, k - 1)
        return before, total - before

    def _spread(self, fields: Mapping[str, Any]) -> tuple[int, ...]:
        return tuple(
            (k - 1) * d + 1
            for k, d in zip(fields["kernel_size"], fields["kernel_dilation"], strict=True)
        )

    def read(self, framework: Framework, take: Take, fields: dict[str, Any], at: At) -> None:
        ones = (1,) * self.rank
        fields["strides"] = fields["strides"] or ones
        fields["kernel_dilation"] = fields["kernel_dilation"] or ones
        spread, strides = self._spread(fields), fields["strides"]
        value = take("padding")
        if framework == "torch":
            extra = each(self.rank)(take("output_padding"))
            pairs = sides(value, self.rank)
            fields["padding"] = tuple(
                (k - 1 - lo, k - 1 - hi + e)
                for k, (lo, hi), e in zip(spread, pairs, extra, strict=True)
            )
            return
        if framework == "flax" and not self.groups and take("transpose_kernel") is not True:
            raise AssertionError("lowered before")
        if not isinstance(value, str):
            pairs = ((value, value),) * self.rank if isinstance(value, int) else value
            pairs = tuple((p, p) if isinstance(p, int) else (p[0], p[1]) for p in pairs)
            if len(pairs) != self.rank:
                raise refuse(take.place, f"padding={value!r} does not fit {self.rank} axes")
            fields["padding"] = pairs
            return
        if value.lower() not in ("same", "valid"):
            raise refuse(take.place, f"padding={value!r}: only 'same', 'valid' or numbers")
        given = take("output_padding") if framework == "keras" else None
        extras = (None,) * self.rank if given is None else each(self.rank)(given)
        fields["padding"] = tuple(
            self._default(k, s, value.lower(), e)
            for k, s, e in zip(spread, strides, extras, strict=True)
        )

    def write(
        self, framework: Framework, fields: dict[str, Any], settings: dict[str, Any], at: At
    ) -> list[Around]:
        pads, spread, strides = fields["padding"], self._spread(fields), fields["strides"]
        if framework == "flax":
            settings["padding"] = pads
            if not self.groups:
                settings["transpose_kernel"] = True
            return []
        crops = tuple((k - 1 - lo, k - 1 - hi) for k, (lo, hi) in zip(spread, pads, strict=True))
        if any(lo < 0 for lo, _ in crops):
            raise refuse(at.place, f"padding={pads}: {framework} can't extend it to the left")
        if framework == "torch":
            extra = tuple(lo - hi for lo, hi in crops)
            most = [max(s, d) for s, d in zip(strides, fields["kernel_dilation"], strict=True)]
            if all(0 <= e < m for e, m in zip(extra, most, strict=True)):
                settings["padding"] = tuple(lo for lo, _ in crops)
                settings["output_padding"] = extra
                return []
            extra = tuple(max(-hi, 0) for _, hi in crops)
            settings["padding"] = (0,) * self.rank
        else:
            if any(s > 1 for s in strides) and any(d > 1 for d in fields["kernel_dilation"]):
                raise refuse(at.place, "Keras can't say strides and dilation above 1 together")
            for padding in ("valid", "same"):
                usual = tuple(
                    self._default(k, s, padding, None) for k, s in zip(spread, strides, strict=True)
                )
                if pads == usual:
                    settings["padding"], settings["output_padding"] = padding, None
                    return []
            extra = tuple(max(-hi, 0) for _, hi in crops)
            most = list(strides)
            settings["padding"] = "valid"
        if any(e >= m for e, m in zip(extra, most, strict=True) if e):
            raise refuse(
                at.place, f"padding={pads}: {framework} can't extend it by more than a stride"
            )
        settings["output_padding"] = extra
        cut = tuple((lo, max(hi, 0)) for lo, hi in crops)
        if not any(n for pair in cut for n in pair):
            return []
        return [Around(fl.Crop, "__crop", {"cropping": cut}, before=False)]

    def finish(
        self, framework: Framework, layer: Layer, fields: Mapping[str, Any], sizes: Any, at: At
    ) -> Layer:
        return grouped.written(framework, layer, self.rank) if self.groups else layer
