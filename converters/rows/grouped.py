"""Transposed convolutions with groups: the kernel as each framework keeps it.

Flax has a class of its own, whose kernel holds only weights that exist. torch keeps (in, out /
groups, *k). Keras has no groups here: its kernel is that of all inputs and outputs, with zeros
between the groups, in a layer whose name ends in how many there are, such as ``up__groups4``.
"""

import dataclasses
import re
from typing import Any

import numpy as np

from fwt.converters.rows.row import Framework, Layer, refuse


def compact(weight: np.ndarray, groups: int, place: str) -> np.ndarray:
    """The kernel (in, out / groups, *k) of torch as (in / groups, out, *k)."""
    inputs, outputs, *window = weight.shape
    if inputs % groups:
        raise refuse(place, f"weight has shape {weight.shape}, expected {groups} groups")
    split = weight.reshape(groups, inputs // groups, outputs, *window).swapaxes(0, 1)
    return split.reshape(inputs // groups, groups * outputs, *window)


def expanded(weight: np.ndarray, groups: int) -> np.ndarray:
    """The inverse of :func:`compact`."""
    inputs, outputs, *window = weight.shape
    split = weight.reshape(inputs, groups, outputs // groups, *window).swapaxes(0, 1)
    return split.reshape(groups * inputs, outputs // groups, *window)


def blocks(kernel: np.ndarray, groups: int) -> np.ndarray:
    """(*k, out, in / groups) as Keras's (*k, out, in), with zeros between the groups."""
    *window, outputs, inputs = kernel.shape
    full = np.zeros((*window, groups, outputs // groups, groups, inputs), kernel.dtype)
    split = kernel.reshape(*window, groups, outputs // groups, inputs)
    for group in range(groups):
        full[..., group, :, group, :] = split[..., group, :, :]
    return full.reshape(*window, outputs, groups * inputs)


def unblocked(kernel: np.ndarray, groups: int) -> np.ndarray | None:
    """The inverse of :func:`blocks`; None if there is more than zeros between the groups."""
    *_, outputs, inputs = kernel.shape
    if outputs % groups or inputs % groups:
        return None
    own = within(kernel, groups)
    return own if np.count_nonzero(own) == np.count_nonzero(kernel) else None


def within(kernel: np.ndarray, groups: int) -> np.ndarray:
    """What such a kernel holds within the groups, whatever is between them."""
    *window, outputs, inputs = kernel.shape
    split = kernel.reshape(*window, groups, outputs // groups, groups, inputs // groups)
    own = np.stack([split[..., g, :, g, :] for g in range(groups)], -3)
    return own.reshape(*window, outputs, inputs // groups)


def in_name(name: str) -> tuple[str, int]:
    """A Keras layer's name without its end, and how many groups that says."""
    found = re.fullmatch(r"(.+)__groups([1-9]\d*)", name)
    return (found[1], int(found[2])) if found else (name, 1)


def lowered(framework: Framework, layer: Layer) -> Layer | None:
    """A layer of torch or Keras that has groups, with the compact kernel."""
    if framework == "torch":
        groups = layer.settings.get("groups", 1)
        if not isinstance(groups, int) or groups < 2:
            return None
        arrays = {**layer.arrays, "weight": compact(layer.arrays["weight"], groups, str(layer))}
        return dataclasses.replace(layer, kind=f"Grouped{layer.kind}", arrays=arrays)
    name, groups = in_name(layer.name)
    own = unblocked(layer.arrays["kernel"], groups) if groups > 1 else None
    if own is None:
        return None
    settings: dict[str, Any] = {**layer.settings, "groups": groups}
    arrays = {**layer.arrays, "kernel": own}
    return Layer(name, f"Grouped{layer.kind}", settings, arrays)


def written(framework: Framework, layer: Layer, rank: int) -> Layer:
    """The inverse of :func:`lowered`."""
    if framework == "torch":
        arrays = {
            **layer.arrays,
            "weight": expanded(layer.arrays["weight"], layer.settings["groups"]),
        }
        return Layer(layer.name, f"ConvTranspose{rank}d", layer.settings, arrays)
    if framework == "keras":
        settings = dict(layer.settings)
        groups = settings.pop("groups")
        arrays = {**layer.arrays, "kernel": blocks(layer.arrays["kernel"], groups)}
        return Layer(f"{layer.name}__groups{groups}", f"Conv{rank}DTranspose", settings, arrays)
    return layer
