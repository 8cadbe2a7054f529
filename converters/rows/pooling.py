"""Rows of the pools: of windows, global and adaptive, each in one to three dimensions."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from fwt import layers as fl
from fwt.converters.rows import lower
from fwt.converters.rows.padding import PoolPadding
from fwt.converters.rows.row import (
    Around,
    At,
    Framework,
    Layer,
    Row,
    S,
    Special,
    each,
    number,
    refuse,
    whole,
)
from fwt.converters.rows.special import GlobalPool

LETTERS = {1: "w", 2: "h w", 3: "d h w"}
NO_LAYER = {"keras": "keras.layers has no such layer", "torch": "torch.nn has no such layer"}


@dataclasses.dataclass(frozen=True)
class Adaptive(Special):
    """Adaptive pools: Keras wants every size."""

    average: bool

    def write(
        self, framework: Framework, fields: dict[str, Any], settings: dict[str, Any], at: At
    ) -> list[Around]:
        if framework != "keras":
            return []
        known = at.known("an adaptive pool")
        settings["output_size"] = tuple(
            n if m is None else m for n, m in zip(known, fields["output_size"], strict=True)
        )
        pairs = list(zip(known, settings["output_size"], strict=True))
        if why := self._unlike(pairs):
            if any(n % m for n, m in pairs):
                raise refuse(at.place, why)
            del settings["output_size"]  # a plain pool says it
            window = tuple(n // m for n, m in pairs)
            settings |= {"pool_size": window, "strides": window}
        return []

    def _unlike(self, pairs: list[tuple[int, int]]) -> str | None:
        """Why Keras's own adaptive pool computes something else."""
        for n, m in pairs:
            # Keras finds the windows in float32, by a product with 1 / m.
            at = np.arange(m + 1, dtype=np.float32) * np.float32(n)
            exact = np.arange(m + 1) * n
            for found in (at / np.float32(m), at * (np.float32(1) / np.float32(m))):
                low, high = np.floor(found[:-1]), np.ceil(found[1:])
                if any(low != exact[:-1] // m) or any(high != -(-exact[1:] // m)):
                    return f"Keras's adaptive pools round {n} to {m} in another way"
        # It takes windows of one more too: if none fits along the last axis, TensorFlow ends the
        # process.
        n, m = pairs[-1]
        if not self.average and -(-n // m) + 1 > n:
            return f"Keras's adaptive max pool of {n} to {m} ends the process on TensorFlow"
        return None

    def finish(
        self, framework: Framework, layer: Layer, fields: Mapping[str, Any], sizes: Any, at: At
    ) -> Layer:
        if "pool_size" in layer.settings:
            layer.kind = layer.kind.removeprefix("Adaptive")
        return layer


def same_axes(r: int) -> dict[str, Any]:
    """A layer that keeps the axes of an image of r dimensions."""
    s = LETTERS[r]
    return {
        "axes": f"n {s} c -> n {s} c",
        "torch_axes": f"n c {s} -> n c {s}",
        "ranks": (r + 2,),
        "channel": "c",
    }


def _unset(r: int) -> Any:
    def normal(x: Any) -> Any:
        many = each(r)(x)
        return None if many is None or all(v == 1 for v in many) else many

    return normal


def _pool(r: int, average: bool) -> Row:
    settings: tuple[S, ...] = (
        S("window_shape", "kernel_size", "pool_size", normal=each(r)),
        S("strides", "stride", "strides", None, normal=each(r)),
    )
    if not average:
        one = (lambda x: x, lambda x: (1,) * r if x is None else x)
        settings += (S("dilation", "dilation", None, normal=_unset(r), torch_io=one),)
    elif r > 1:
        settings += (S("divisor", "divisor_override", None),)
    return Row(
        fl.AvgPool if average else fl.MaxPool,
        f"{'Avg' if average else 'Max'}Pool{r}d",
        f"{'Average' if average else 'Max'}Pooling{r}D",
        **same_axes(r),
        rank_of="window_shape",
        settings=settings,
        keras_defaults={"padding": "valid", "data_format": "channels_last"},
        special=PoolPadding(average),
        note="paddings that the target can't say are refused",
        lower=lower.channels_first(),
    )


def _lp_pool(r: int) -> Row:
    # torch's of one axis takes no tuple
    single = (lambda x: x, lambda x: x[0] if x is not None and r == 1 else x)
    return Row(
        fl.LPPool,
        f"LPPool{r}d",
        None,
        **same_axes(r),
        rank_of="window_shape",
        settings=(
            S("p", "norm_type", None, normal=number),
            S("window_shape", "kernel_size", None, normal=each(r), torch_io=single),
            S("strides", "stride", None, normal=each(r), torch_io=single),
        ),
        lacks=NO_LAYER,
    )


def _ones(framework: Framework, layer: Layer) -> bool:
    if framework != "torch":
        return True
    size = layer.settings.get("output_size")
    return size == 1 or (isinstance(size, list | tuple) and all(n == 1 for n in size))


def _not_ones(framework: Framework, layer: Layer) -> bool:
    return framework != "torch" or not _ones(framework, layer)


def _global_pool(r: int, average: bool) -> Row:
    s = LETTERS[r]
    return Row(
        fl.GlobalAvgPool if average else fl.GlobalMaxPool,
        f"Adaptive{'Avg' if average else 'Max'}Pool{r}d",
        f"Global{'Average' if average else 'Max'}Pooling{r}D",
        axes=f"n {s} c -> n c",
        torch_axes=f"n c {s} -> n c",
        ranks=(r + 2,),
        channel="c",
        keras_defaults={"keepdims": False, "data_format": "channels_last"},
        special=GlobalPool(),
        fits=_ones,
        lower=lower.channels_first(back=False),
    )


def _adaptive_pool(r: int, average: bool) -> Row:
    def sizes(x: Any) -> Any:
        many = tuple(x) if isinstance(x, list | tuple) else (x,) * r
        if len(many) != r:
            raise ValueError(f"expected {r} numbers")
        return tuple(None if n is None else whole(n) for n in many)

    return Row(
        fl.AdaptiveAvgPool if average else fl.AdaptiveMaxPool,
        f"Adaptive{'Avg' if average else 'Max'}Pool{r}d",
        f"Adaptive{'Average' if average else 'Max'}Pooling{r}D",
        **same_axes(r),
        rank_of="output_size",
        settings=(S("output_size", "output_size", "output_size", normal=sizes),),
        keras_defaults={"data_format": "channels_last"},
        special=Adaptive(average),
        fits=_not_ones,
        lower=lower.channels_first(),
    )


ROWS: tuple[Row, ...] = (
    *(_pool(r, average) for average in (False, True) for r in (1, 2, 3)),
    *(_lp_pool(r) for r in (1, 2, 3)),
    *(_global_pool(r, average) for average in (True, False) for r in (1, 2, 3)),
    *(_adaptive_pool(r, average) for average in (True, False) for r in (1, 2, 3)),
)
