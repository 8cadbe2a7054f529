"""The pass along an ONNX graph: where it is, and the layers so far, in torch's terms."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fwt.converters.onnx.graph import Graph
from fwt.converters.onnx.numbers import ZEROS, Node
from fwt.converters.rows.padding import same_pads
from fwt.converters.rows.row import Layer, refuse

# Reads one node; returns the value after it, where that is not its output.
Handler = Callable[["Reader", Node], "str | None"]


class Reader:
    """Where the pass is, ``at`` the name of a value, and the layers so far."""

    def __init__(self, graph: Graph):
        self.graph, self.at = graph, graph.input
        self.layers: list[Layer] = []
        self.names: set[str] = set()
        # What the last layer lacks and may still get: a "bias", or a "scale" and then a "shift".
        self.lacks: str | None = None
        # A Cast to a wider dtype, until a layer with weights, which compute in theirs.
        self.widened: Node | None = None

    def name(self, node: Node, weight: str = "") -> str:
        """A new name: that of the weight, less its last part, or one for the operator."""
        stem, _, leaf = re.sub(r":\d+$", "", weight).replace("/", ".").rpartition(".")
        known = leaf in _LEAVES or re.fullmatch(r"(weight|bias)_[ih]h_l\d+(_reverse)?", leaf)
        name = stem.replace(".", "_") if known and stem else ""
        count = len(self.names) + 1
        while not name or name in self.names:
            name, count = f"{node.op.lower()}_{count}", count + 1
        self.names.add(name)
        return name

    def add(self, name: str, kind: str, arrays: Any = None,
            **settings: Any) -> None:  # fmt: skip
        made = {k: v for k, v in (arrays or {}).items() if v is not None}
        if self.widened is not None and not made and kind not in ("Flatten", "Unflatten"):
            raise refuse(str(self.widened), f"the {kind} after it computes in what was before it")
        self.widened = None if made else self.widened
        self.layers.append(Layer(name, kind, settings, made, DEFAULTS))
        self.lacks = None

    def shape(self, node: Node) -> tuple[Any, ...]:
        """The shape of the value where the line is."""
        return self.graph.shape(self.at, node)

    def rank(self, node: Node) -> int:
        return self.graph.rank(self.at, node)

    def only(self, node: Node, index: int = 0) -> None:
        """Raises unless the value of the line is this input and no other."""
        where = [i for i, n in enumerate(node.inputs) if n == self.at]
        if where != [index]:
            raise refuse(
                str(node), f"the value {self.at!r} is its input {where}, expected [{index}]"
            )

    def permute(self, order: Sequence[int], name: str, fused: bool = False) -> None:
        """Another order of the axes; ``fused`` if it is part of a layer and may move the batch."""
        if tuple(order) != tuple(range(len(order))):
            label = name
            while label in self.names:
                label += "_"
            self.names.add(label)
            self.layers.append(Layer(label, "Permute", {"dims": tuple(order)}, fused=fused))

    def with_second(self, axis: int, rank: int, name: str, add: Callable[[], None]) -> None:
        """A layer over another axis than the second, where torch has the channels."""
        there = (0, axis, *(a for a in range(1, rank) if a != axis))
        self.permute(there, f"{name}__there")
        add()
        self.permute([there.index(a) for a in range(rank)], f"{name}__back")


# Of torch's layers, where a row has no use for a setting unless it is another.
DEFAULTS = {"groups": 1, "return_indices": False, "recompute_scale_factor": None, "mode": "nearest",
             "size": None, "align_corners": None, "padding_mode": "zeros"}  # fmt: skip
_LEAVES = ("weight", "kernel", "bias", "scale", "gamma", "embedding", "embeddings", "beta",
           "negative_slope", "running_mean", "mean", "recurrent_kernel", "W", "R")  # fmt: skip


def window_of(reader: Reader, node: Node, window: Sequence[int]) -> dict[str, Any]:
    """Strides, dilations and paddings of an operator over windows, the paddings as pairs."""
    r = len(window)
    strides = tuple(node("strides") or (1,) * r)
    dilations = tuple(node("dilations") or (1,) * r)
    auto = node("auto_pad", "NOTSET")
    flat = node("pads") or [0] * (2 * r)
    if len(strides) != r or len(dilations) != r or len(flat) != 2 * r:
        raise refuse(str(node), f"strides {strides}, dilations {dilations} and pads {flat} for a "
                     f"window of {window}")  # fmt: skip
    if auto in ("SAME_UPPER", "SAME_LOWER") and any(d != 1 for d in dilations):
        raise refuse(str(node), f"auto_pad={auto!r} with dilations, which runtimes refuse")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        sizes = reader.shape(node)[2:]
        pads = same_pads(sizes, tuple(window), strides, dilations)
        if auto == "SAME_LOWER":
            pads = tuple((hi, lo) for lo, hi in pads)
    elif auto in ("NOTSET", "VALID"):
        pads = tuple(zip(flat[:r], flat[r:], strict=True)) if auto == "NOTSET" else ((0, 0),) * r
    else:
        raise refuse(str(node), f"auto_pad={auto!r}")
    return {"stride": strides, "dilation": dilations, "padding": tuple(pads)}


def array(reader: Reader, node: Node, index: int) -> Any:
    value = reader.graph.const(node, index)
    if value is ZEROS:
        raise refuse(str(node), "an array without a size")
    return value


def spatial(node: Node, rank: int) -> int:
    if rank not in (3, 4, 5):
        raise refuse(str(node), f"expected one to three spatial axes, found rank {rank}")
    return rank - 2


def one_axis(node: Node, value: np.ndarray, rank: int) -> int | None:
    """Along which axis of a value an array goes; None for a single number."""
    if value.ndim > rank:
        raise refuse(str(node), f"an array of shape {value.shape} for rank {rank}")
    axes = [rank - value.ndim + i for i, s in enumerate(value.shape) if s != 1]
    if len(axes) > 1 or 0 in axes:
        raise refuse(str(node), f"an array of shape {value.shape} goes along several axes")
    return axes[0] if axes else None


def axis_or_none(value: np.ndarray, rank: int) -> int | None:
    axes = [rank - value.ndim + i for i, s in enumerate(value.shape) if s != 1]
    return axes[0] if len(axes) == 1 else None
