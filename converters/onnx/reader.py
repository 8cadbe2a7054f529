"""The pass over an ONNX graph: what each value is, and the layers so far, in torch's terms."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fwt.converters.onnx.graph import Graph
from fwt.converters.onnx.numbers import ZEROS, Node
from fwt.converters.rows.padding import same_pads
from fwt.converters.rows.row import Layer, joined, refuse
from fwt.converters.walk.tensors import Axes, Batched, Tensors, Value, plain_axes

# Reads one node; returns the value after it, where that is not its output.
Handler = Callable[["Reader", Node], "str | None"]


class Reader(Tensors):
    """The layers so far, and in ``env`` what each value of the graph is.

    A node that takes one value that follows from the inputs finds its name in ``at`` and the layer
    that gives it in ``tip``, which ``add`` moves on.
    """

    def __init__(self, graph: Graph):
        super().__init__(lambda kind: DEFAULTS)
        self.graph = graph
        self.taken |= dict.fromkeys(graph.inputs, 1)
        self.env: dict[str, Value] = {}
        for name in graph.inputs:
            shape = graph.shapes[name]
            self.env[name] = Value(name, (None, *shape[1:]), plain_axes(len(shape)))
        self.at = self.tip = ""
        # What a layer lacks and may still get: a "bias", or a "scale" and then a "shift".
        self.lacking: dict[str, str] = {}
        self.done: set[int] = set()  # nodes that were read with another
        # A Cast to a wider dtype, until a layer with weights, which compute in theirs.
        self.widened: Node | None = None
        self.wide: dict[str, Node] = {}
        self.constants: tuple[str, ...] = ()  # the arrays that the node takes
        self.sources: dict[str, tuple[str, ...]] = {}  # by layer, the names of its arrays

    # -- layers of one value -------------------------------------------------------------------

    def start(self, at: str, node: Node, plain: bool = True) -> None:
        """Goes to a value, with its axes as the graph has them unless told otherwise."""
        value = self.env[at]
        self.at = at
        self.tip = (self.plain(value, str(node)) if plain else value).name
        self.widened = self.wide.get(at)

    def end(self, name: str, axes: Axes | None = None, shape: Any = None) -> None:
        """Says that a value is what the tip gives."""
        if shape is None:
            shape = self.graph.shapes.get(name) or ()
            shape = (None, *shape[1:]) if shape else ()
        self.give(name, Value(self.tip, shape, plain_axes(len(shape)) if axes is None else axes))
        if self.widened is not None:
            self.wide[name] = self.widened

    def give(self, name: str, value: Value) -> None:
        self.env[name] = value
        if name not in self.graph.shapes and value.shape:
            self.graph.shapes[name] = tuple(None if b else n for n, b in value.sizes)

    @property
    def lacks(self) -> str | None:
        """What the layer at the tip lacks, if nothing else takes what it gives."""
        alone = len(self.graph.users.get(self.at, ())) == 1
        return self.lacking.get(self.tip) if alone else None

    @lacks.setter
    def lacks(self, what: str | None) -> None:
        self.lacking.pop(self.tip, None)
        if what is not None:
            self.lacking[self.tip] = what

    def name(self, node: Node, weight: str = "") -> str:
        """A new name: that of the weight, less its last part, or one for the operator."""
        stem, _, leaf = re.sub(r":\d+$", "", weight).replace("/", ".").rpartition(".")
        known = leaf in _LEAVES or re.fullmatch(r"(weight|bias)_[ih]h_l\d+(_reverse)?", leaf)
        name = joined(stem.split(".")) if known and stem and all(stem.split(".")) else ""
        count = len(self.taken) + 1
        while not name or name in self.taken:
            name, count = f"{name or node.op.lower()}_{count}", count + 1
        return name

    def add(self, name: str, kind: str, arrays: Any = None,
            **settings: Any) -> None:  # fmt: skip
        made = {k: v for k, v in (arrays or {}).items() if v is not None}
        if self.widened is not None and not made and kind not in ("Flatten", "Unflatten"):
            raise refuse(str(self.widened), f"the {kind} after it computes in what was before it")
        self.widened = None if made else self.widened
        name = self.unique(name)
        self.layers.append(Layer(name, kind, settings, made, DEFAULTS, inputs=(self.tip,)))
        if made:
            self.sources[name] = self.constants
        self.tip = name

    def shape(self, node: Node) -> tuple[Any, ...]:
        """The shape of the value that a node takes."""
        return self.graph.shape(self.at, node)

    def sizes_from(self, node: Node, axis: int) -> tuple[Any, ...]:
        """The sizes of the axes from one on, of the value that a node takes."""
        sizes = (self.graph.shapes.get(self.at) or (None,))[axis:]
        return self.shape(node)[axis:] if None in sizes or not sizes else sizes

    def rank(self, node: Node) -> int:
        return self.graph.rank(self.at, node)

    def only(self, node: Node, index: int = 0) -> None:
        """Raises unless the value is this input and no other."""
        where = [i for i, n in enumerate(node.inputs) if n == self.at]
        if where != [index]:
            raise refuse(
                str(node), f"the value {self.at!r} is its input {where}, expected [{index}]"
            )

    def permute(self, order: Sequence[int], name: str, fused: bool = False) -> None:
        """Another order of the axes; ``fused`` if it is part of a layer and may move the batch."""
        if tuple(order) != tuple(range(len(order))):
            settings = {"dims": tuple(order)}
            layer = Layer(self.unique(name), "Permute", settings, fused=fused, inputs=(self.tip,))
            self.layers.append(layer)
            self.tip = layer.name

    def with_second(self, axis: int, rank: int, name: str, add: Callable[[], None]) -> None:
        """A layer over another axis than the second, where torch has the channels."""
        there = (0, axis, *(a for a in range(1, rank) if a != axis))
        self.permute(there, f"{name}__there")
        add()
        self.permute([there.index(a) for a in range(rank)], f"{name}__back")

    # -- of several ----------------------------------------------------------------------------

    def value(self, name: str, node: Node, sized: bool = True) -> Value:
        """What a value of the graph is, its sizes known unless it is to meet another as it is."""
        if name in self.wide:
            raise refuse(str(self.wide[name]), f"{node} after it computes in what was before it")
        found = self.env[name]
        if not found.shape or (None in found.shape[1:] and (sized or not found.is_plain)):
            self.graph.shape(name, node)
            raise refuse(str(node), f"the shape of {name!r} is not known")
        return found

    def array(
        self, name: str, like: Value, node: Node, whole: bool = False,
        kind: str = "Parameter",
    ) -> Value:  # fmt: skip
        """An array of the file as a layer without inputs, that meets a value entry by entry;
        ``whole`` gives it as many axes."""
        array = self.graph.known[name]
        if array is ZEROS:
            raise refuse(str(node), "an array without a size")
        axes = len(like.axes)
        if array.ndim > axes:
            raise refuse(str(node), f"an array of rank {array.ndim} meets a tensor of rank {axes}")
        if like.is_plain and not whole and array.ndim < axes:
            return self.source(name, array, node, kind)
        full = array.reshape((1,) * (axes - array.ndim) + array.shape)
        order: list[int] = []
        for axis in range(len(like.shape)):
            dim = next(i for i, part in enumerate(like.axes) if axis in part)
            if (axis == 0 or len(like.axes[dim]) > 1) and full.shape[dim] != 1:
                raise refuse(str(node), "it meets an array that has an entry for each example")
            order.append(dim)
        merged = len(order) != len(set(order))
        if merged:
            sizes = [1 if len(like.axes[d]) > 1 else full.shape[d] for d in order]
            full = full.transpose(list(dict.fromkeys(order))).reshape(sizes)
        else:
            full = full.transpose(order)
        return self.source(name, np.asarray(full, order="C"), node, kind)

    def source(self, name: str, array: np.ndarray, node: Node, kind: str = "Parameter") -> Value:
        """An array of the file as a layer without inputs; met again in the same order, the same."""
        key = f"{name}|{array.shape}"
        known = self.env.get(f"|{key}")
        if known is not None and np.array_equal(self._array_of(known.name), array):
            return known
        origin = self.graph.origin.get(name, name)
        stem = re.sub(r":\d+$", "", origin).strip("/")
        own = origin in self.graph.own and not re.fullmatch(
            r"[\w/:.]*(onnx::|val_|_to_copy)\w*", stem
        )
        parts = [p for p in re.split(r"[./]", stem) if p]
        among = any(joined(parts[:i]) in self.taken for i in range(1, len(parts)))
        label = joined(parts)
        if not own or not parts or among:
            label = f"{self.name(node)}__array"
        made = self.emit(kind, {"shape": tuple(array.shape)}, [], label, array.shape,
                         arrays={"value": array})  # fmt: skip
        self.env[f"|{key}"] = made
        return made

    def _array_of(self, name: str) -> Any:
        return next(x for x in self.layers if x.name == name).arrays["value"]

    def sizes(self, target: Sequence[int], free: Any, value: Value, node: Node) -> list[Batched]:
        """What a Reshape makes of a value: each size, and whether it counts the examples."""
        old = value.sizes
        whole = int(np.prod([n for n, _ in old]))
        keeps = not node("allowzero", 0)
        out: list[Batched | None] = []
        for i, n in enumerate(target):
            if free is not None and free[i]:
                out.append((-n, True))
            elif n == 0 and keeps:
                if i >= len(old):
                    raise refuse(str(node), f"it keeps axis {i} of {len(old)}")
                out.append(old[i])
            else:
                out.append(None if n == -1 else (int(n), False))
        free_now = any(s is not None and s[1] for s in out)
        fixed = self.graph.batch
        others = int(np.prod([s[0] for s in out if s is not None]))
        if None in out:
            i = out.index(None)
            if free_now or fixed is None:
                if others == 0 or whole % others:
                    raise refuse(str(node), f"it makes {list(target)} of {whole} values for each "
                                 "example")  # fmt: skip
                out[i] = (whole // others, not free_now)
            else:
                out[i] = (whole * fixed // max(others, 1), False)
        sizes = [s for s in out if s is not None]
        if not any(b for _, b in sizes) and fixed is not None:
            sizes = self._fixed(sizes, old, fixed, node)
        if sum(b for _, b in sizes) != 1 or int(np.prod([n for n, _ in sizes])) != whole:
            raise refuse(str(node), f"it makes {list(target)} of {self._said(old)}: the batch must "
                         "stay", "export it with a free batch")  # fmt: skip
        return sizes

    def _said(self, sizes: Sequence[Batched]) -> str:
        return f"({', '.join(f'{n} * batch' if b else str(n) for n, b in sizes)})"

    def _fixed(
        self, sizes: list[Batched], old: Sequence[Batched], batch: int, node: Node
    ) -> list[Batched]:
        """Which of fixed sizes counts the examples: the one that stands where the batch did."""
        if old[0] == (1, True) and sizes[0] == (batch, False):
            return [(1, True), *sizes[1:]]
        before = 1
        for n, b in old:
            if b:
                break
            before *= n
        at = 1
        for i, (n, _) in enumerate(sizes):
            here = at == before and (n == batch if batch == 1 else n % batch == 0)
            inside = batch > 1 and before % at == 0 and (at * n) % (before * batch) == 0 and at < (
                before)  # fmt: skip
            if here or (inside and at * n >= before * batch):
                return [*sizes[:i], (n // batch, True), *sizes[i + 1 :]]
            at *= n
        raise refuse(str(node), "where it puts the batch can't be told", "export it with a free "
                     "batch")  # fmt: skip


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
