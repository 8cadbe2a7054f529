"""What the names of leaves, and the shapes beside them, say of their axes."""

import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from fwt import _tree

Shape = tuple[int, ...]

NORMS = re.compile(r"(^|_)(norm|bn|ln|rmsnorm|(batch|layer|group|instance)_?norm)s?(_|\d|$)")
EMBEDDINGS = re.compile(
    r"(^|_)(emb|embed|embedding|wte|wpe)s?(_|\d|$)|^shared$|^relative_attention_bias$"
)
ATTENTION_IN, ATTENTION_OUT = ("query", "key", "value"), ("out", "attention_output")
_KERNEL = re.compile("(pointwise_|recurrent_|projection_)?kernel")
_EINSUM = re.compile("dense_?general|linear_?general|einsum")
# The other direction of a recurrent layer, whose leaves stand beside those of the first.
_OTHER_WAY = re.compile("((?:(?:recurrent_|projection_)?kernel)|bias)(_reverse)")
_TWO_AXES = re.compile(r"weight_(ih|hh|hr)(_l\d+)?(_reverse)?|(in|[qkv])_proj_weight")
_ONE_AXIS = re.compile(r"bias_(ih|hh)(_l\d+)?(_reverse)?|in_proj_bias|bias_n")
_VECTORS = ("scale", "gamma", "beta", "bias")
_WEIGHTS = ("kernel", "weight", "pointwise_kernel", "depthwise_kernel")
# The dense layers of GPT-2: (in, out) in some models of that family, (out, in) in others.
_GPT2 = re.compile("c_(attn|proj|fc)|q_attn")
# A convolution that cuts an image into patches, which is none that is transposed.
_PATCHES = re.compile("patch(es)?_?embed")
_MISSING: Any = object()


def one_way(name: str) -> tuple[str, str]:
    """The name of a leaf without what says that it is of a recurrent layer's other direction, and
    that."""
    found = _OTHER_WAY.fullmatch(name)
    return (found[1], found[2]) if found else (name, "")


def no_kernel(layer: str) -> bool:
    """Whether a layer of this name holds a norm or an embedding."""
    return bool(NORMS.search(layer.lower()) or EMBEDDINGS.search(layer.lower()))


def parts(path: str) -> tuple[str, ...]:
    """The parts of a path; those of torch's dotted names, such as ``features.0.weight``, too."""
    out: list[str] = []
    for part in map(_tree.unescape, _tree.split(path)):
        dotted = part.split(".")
        out += dotted if all(dotted) else [part]
    return tuple(out) or ("",)


@dataclasses.dataclass
class _Subtree:
    """The leaves below one path: whether their first axes are alike, and what is found of them."""

    paths: list[str] = dataclasses.field(default_factory=list)
    alike: bool = True
    first: int | None = None
    least: list[tuple[int, str]] | None = None
    fits: dict[int, bool] = dataclasses.field(default_factory=dict)

    def add(self, path: str, shape: Shape) -> None:
        self.paths.append(path)
        first = shape[0] if len(shape) > 1 else None
        self.first = first if self.first is None else self.first
        self.alike = self.alike and first is not None and first == self.first


class Rules:
    """The leaves of a tree by their names and shapes.

    A *stack* is a batch of layers, as ``nn.scan``, ``nn.vmap`` and ensembles make it: its axes
    come first, and each slice is a layer of its own.

    Args:
        shapes: by path, the shape of every leaf.
        depths: by path, how many axes of a leaf are a stack, where something else tells it.
    """

    def __init__(
        self,
        shapes: Mapping[str, Shape],
        depths: Mapping[str, int] | None = None,
        own: Collection[str] = (),
    ):
        self.shapes = dict(shapes)
        self._depths: dict[str, int | None] = dict(depths or {})
        self._told = dict(depths or {})
        self._own = own  # stacks of which the user speaks, and of no leaf beside them
        self._parts = {path: parts(path) for path in self.shapes}
        self._layers: dict[tuple[str, ...], dict[str, str]] = {}
        for path, each in self._parts.items():
            self._layers.setdefault(each[:-1], {})[each[-1]] = path
        self._voted: dict[bool, set[str]] = {}
        self._subtrees: dict[tuple[str, ...], _Subtree] | None = None

    def _names(self, path: str) -> tuple[str, str]:
        each = self._parts[path]
        return one_way(each[-1])[0], each[-2] if len(each) > 1 else ""

    def _path_beside(self, path: str, name: str) -> str | None:
        each = self._parts[path]
        return self._layers[each[:-1]].get(name + one_way(each[-1])[1])

    def _beside(self, path: str, name: str) -> Shape | None:
        other = self._path_beside(path, name)
        return None if other is None else self.shapes[other]

    # -- stacks -------------------------------------------------------------------------------

    def depth(self, path: str) -> int | None:
        """How many leading axes of a leaf are a stack; None where nothing tells."""
        if path not in self._depths:
            self._depths[path] = self._depth(path)
        return self._depths[path]

    def readings(self, path: str) -> list[str]:
        """The axes of a leaf as the bias of its layer allows them, where it does not tell which: of
        a stack, and of one layer of several output axes."""
        weight, bias = self.shapes[path], self._beside(path, "bias")
        name = self._names(path)[0]
        if bias is None or self._by_layer(path) is not None:
            return []
        dense = _depth_of(name, weight, bias)
        sizes = [] if dense is None else [(1, dense)]
        sizes += _general_depths(weight, bias).items() if name == "kernel" else []
        found: dict[int, str] = {}
        for outs, depth in sizes:
            ins = "in" if outs > 1 else "k"
            more = [ins] * (len(weight) - depth - outs - 1)
            found.setdefault(depth, " ".join([*["stack"] * depth, *more, "in", *["out"] * outs]))
        return list(found.values())

    def _depth(self, path: str) -> int | None:
        shape = self.shapes[path]
        if len(shape) < 2:
            return 0
        found = self._by_layer(path)
        if found is _MISSING and self._weight_rank(path) != 2:
            found = self._by_subtree(path)
        return self._by_name(path) if found is _MISSING else found

    def _weight_rank(self, path: str) -> int:
        """The rank of a leaf that holds the weights of a layer, else 0."""
        last, _ = self._names(path)
        kernel = last.endswith("kernel") or (last == "weight" and not self.is_norm(path))
        return len(self.shapes[path]) if kernel or _TWO_AXES.fullmatch(last) else 0

    def _by_layer(self, path: str) -> Any:
        """The depth, as the leaves of the same layer tell it: by its bias, above all."""
        last, parent = self._names(path)
        shape = self.shapes[path]
        if _TWO_AXES.fullmatch(last):
            return len(shape) - 2
        if _ONE_AXIS.fullmatch(last):
            return len(shape) - 1
        recurrent = self._beside(path, "recurrent_kernel")
        bias = self._beside(path, "bias")
        if recurrent is not None and last in ("kernel", "recurrent_kernel", "bias"):
            return self._of_cell(recurrent, self._beside(path, "kernel"), bias, parent)
        if last == "bias":
            named = next((n for n in _WEIGHTS if len(self._beside(path, n) or ()) > 1), None)
            if named is None or self._beside(path, named) == shape:
                return _MISSING
            told = self._told.get(self._path_beside(path, named) or "")
            if told is not None:
                return told
            return self._of_bias(path, named, self._beside(path, named) or (), shape)
        if last not in _WEIGHTS or bias is None or bias == shape:
            return _MISSING
        return self._of_bias(path, last, shape, bias)

    def _of_bias(self, path: str, name: str, weight: Shape, bias: Shape) -> int | None:
        """The depth of a layer whose weight and bias have these shapes."""
        dense = _depth_of(name, weight, bias)
        if name != "kernel":
            return dense
        attention = self._names(path)[1] in ATTENTION_IN
        general = _general_depths(weight, bias)
        if attention and len(weight) - general.get(2, len(weight)) == 3:
            return general[2] if dense is None else self._of_output(path, weight, dense, general[2])
        return dense if not general else None

    def _of_output(self, path: str, weight: Shape, dense: int, heads: int) -> int | None:
        """The depth of a kernel before attention that may be a stack of dense layers as well, as
        the layer after it tells."""
        for name in ATTENTION_OUT:
            layer = self._layers.get((*self._parts[path][:-2], name), {})
            if "kernel" not in layer or "bias" not in layer:
                continue
            out, depth = self.shapes[layer["kernel"]], len(self.shapes[layer["bias"]]) - 1
            if depth == heads and out[depth:-1] == weight[-2:]:
                return heads
            if depth == dense and len(out) - depth == 2 and out[:depth] == weight[:depth]:
                return dense
        return None

    @staticmethod
    def _of_cell(recurrent: Shape, kernel: Any, bias: Any, parent: str) -> Any:
        depth = len(recurrent) - 2
        if depth <= 0 or "conv" in parent.lower() or (bias is not None and len(bias) == 1):
            return 0
        if bias is None or kernel is None:  # it may be the window of a ConvLSTM
            return None if depth == 1 else 0
        same = kernel[:depth] == bias[:depth] == recurrent[:depth]
        ranks = len(kernel) == len(recurrent) and len(bias) - depth in (1, 2)
        return depth if same and ranks else None

    def _by_subtree(self, path: str) -> Any:
        """The depth, as a subtree tells it all of whose leaves have the same first axes."""
        if self._subtrees is None:
            self._subtrees = {}
            for each, here in self._parts.items():
                for cut in range(len(here)):
                    self._subtrees.setdefault(here[:cut], _Subtree()).add(each, self.shapes[each])
        here, found = self._parts[path], _MISSING
        for cut in reversed(range(len(here))):  # the largest has the last word
            subtree = self._subtrees[here[:cut]]
            if not subtree.alike:
                break
            shared = self._shared(path, subtree)
            found = found if shared is _MISSING else shared
        return found

    def missing(self, path: str, hidden: Collection[tuple[str, ...]]) -> str:
        """Which of the hidden leaves, if any, could have told how a leaf with weights is laid out:
        the bias of its layer, or what may be stacked with it."""
        here = self._parts[path]
        if not self._weight_rank(path):
            return ""
        if (*here[:-1], "bias") in hidden:
            return "its bias"
        if self._weight_rank(path) == 2 or self._by_layer(path) is not _MISSING:
            return ""
        self._by_subtree(path)  # makes the subtrees
        for cut in reversed(range(len(here))):
            if self._subtrees is None or not self._subtrees[here[:cut]].alike:
                break
            if found := [each for each in hidden if each[:cut] == here[:cut]]:
                return "/".join(min(found))
        return ""

    def _shared(self, path: str, subtree: "_Subtree") -> Any:
        if subtree.least is None:
            said = [(self._definite(p, False), p) for p in subtree.paths if p not in self._own]
            subtree.least = sorted((d, p) for d, p in said if d is not None)[:2]
        # What a leaf proves to the others it may not prove to itself.
        least = [(d, p) for d, p in subtree.least if p != path or self._definite(p, True) == d]
        depth = least[0][0] if least else 0
        if depth not in subtree.fits:
            subtree.fits[depth] = self._fits(subtree.paths, depth)
        return depth if subtree.fits[depth] else _MISSING

    def _fits(self, below: list[str], depth: int) -> bool:
        """Whether these leaves may be a stack of that depth."""
        ranks = [(r, self._names(p)[1]) for p in below for r in [self._weight_rank(p)] if r]
        same = len({self.shapes[p][:depth] for p in below}) == 1
        legal = all(r - depth >= 2 + ("conv" in layer.lower()) for r, layer in ranks) and ranks
        vectors = all(len(self.shapes[p]) > depth for p in below)
        return bool(depth and same and legal and vectors and len(below) > 1)

    def _definite(self, path: str, own: bool) -> int | None:
        """The depth of a leaf whose layer alone settles it."""
        if path in self._told:
            return self._told[path]
        last, parent = self._names(path)
        rank = len(self.shapes[path])
        found = self._by_layer(path)
        if found is not _MISSING:
            return found
        lone = last == "bias" and len(self._layers[self._parts[path][:-1]]) == 1
        if last in _VECTORS and parent not in ATTENTION_IN and not lone:
            return rank - 1
        if last == "weight" and self.is_norm(path):
            return rank - 1
        # linen's own names, which may be a user's too, so that a leaf alone proves nothing.
        lifted = sum(bool(re.match("(Scan|Vmap)[A-Z].*_\\d+$", p)) for p in self._parts[path])
        if lifted and self._weight_rank(path) - lifted >= 2:
            return lifted
        dense = last == "kernel" and re.fullmatch(r"Dense_\d+", parent) and not own
        return rank - 2 if dense and rank > 2 else None

    def _by_name(self, path: str) -> int | None:
        """The depth where no neighbour tells it: 0 for what is no stack by its name."""
        last, parent = self._names(path)
        rank = len(self.shapes[path])
        if last == "depthwise_kernel" or "conv" in parent.lower() or rank == 2:
            return 0
        if last == "kernel" and parent in (*ATTENTION_IN, *ATTENTION_OUT):
            return 0 if rank == 3 and self._is_attention(path) else None
        einsum = _KERNEL.fullmatch(last) and _EINSUM.search(parent.lower())
        return None if rank == 3 or einsum else 0

    def may_be_one(self, path: str, depth: int) -> bool:
        """Whether what is a stack by its layer's bias may be one layer as well, a DenseGeneral with
        a batch or an einsum: there is no stack by the user's word, by linen's names or by all
        other layers."""
        last, parent = self._names(path)
        lifted = sum(bool(re.match("(Scan|Vmap)[A-Z]", p)) for p in self._parts[path])
        if not _KERNEL.fullmatch(last) or lifted >= depth or path in self._told:
            return False
        others = [
            s for p, s in self.shapes.items() if self._parts[p][:-1] != self._parts[path][:-1]
        ]
        alike = others and all(s[:1] == self.shapes[path][:1] for s in others)
        return not alike and _EINSUM.search(parent.lower()) is not None

    def _is_attention(self, path: str) -> bool:
        """Whether nothing beside a kernel of rank 3 says that it is not an attention's: that of its
        output begins with heads and dim, and not as a stack of layers does."""
        above = self._parts[path][:-2]

        def kernels(names: tuple[str, ...]) -> Iterator[Shape]:
            for name in names:
                other = self._layers.get((*above, name), {}).get("kernel")
                if other is not None and len(self.shapes[other]) > 1:
                    yield self.shapes[other]

        outs = list(kernels(ATTENTION_OUT))
        pairs = [(x, out) for x in kernels(ATTENTION_IN) for out in outs]
        return all(x[1:] == out[:2] or (x[0] != out[0] and x[1] != out[1]) for x, out in pairs)

    # -- axes ---------------------------------------------------------------------------------

    def names(
        self, path: str, stack: tuple[int, ...] = (), layer: str = ""
    ) -> tuple[tuple[str, ...], bool]:
        """The names of the axes of one slice of a leaf, and whether it is the kernel of a
        transposed convolution; an axis of which nothing is known has the name "".

        Args:
            path: where the leaf is.
            stack: which of its axes are a stack.
            layer: the class of its layer, where it is known.
        """
        whole = self.shapes[path]
        shape = tuple(s for i, s in enumerate(whole) if i not in stack)
        bias = self._beside(path, "bias")
        if bias is not None and stack:
            led = stack == tuple(range(len(stack))) and bias[: len(stack)] == whole[: len(stack)]
            bias = bias[len(stack) :] if led else None
        size = bias[0] if bias is not None and len(bias) == 1 else None
        found = self._rule(path, shape, size, layer)
        named = found is not None and _transposed_by_name(self._names(path)[1], len(shape))
        if found is None or len(found) != len(shape):
            return ("",) * len(shape), False
        return found, named or order_is_transposed(found)

    def _rule(
        self, path: str, shape: Shape, bias: int | None, layer: str
    ) -> tuple[str, ...] | None:
        last, parent = self._names(path)
        rank = len(shape)
        if rank == 1:
            return ("out",)
        if last == "kernel" and rank == 3 and parent in ATTENTION_IN and bias is None:
            return ("in", "heads", "dim")
        if last == "kernel" and rank == 3 and parent in ATTENTION_OUT:
            return ("heads", "dim", "out")
        if last == "bias" and rank == 2 and parent in ATTENTION_IN:
            return ("out", "out")
        if rank == 2 and last in ("kernel", "weight") and _GPT2.fullmatch(parent):
            return self._of_gpt2(path, shape, bias)
        window = ("spatial",) * (rank - 2)
        if last == "depthwise_kernel" and rank >= 3:
            return (*window, "group", "out")
        # An einsum's kernel of rank 3 has no window.
        most = 2 if layer and "Conv" not in layer else rank
        if rank == 3 and bias is None and "conv" not in f"{parent}{layer}".lower():
            most = 2  # experts, heads, or a window: nothing tells
        if _KERNEL.fullmatch(last) and 2 <= rank <= most:
            turned = shape[-1] != bias == shape[-2]
            return (*window, *(("out", "in") if turned else ("in", "out")))
        if last == "weight" and rank == 2 and not no_kernel(parent):
            return self._of_weight(path, shape, bias)
        if _TWO_AXES.fullmatch(last):
            return ("out", "in")
        if last == "weight" and rank > 3 and self._cuts_patches(path):
            return ("out", "in", *window)
        # One of three axes may be that of torch's Bilinear too.
        if last == "weight" and (rank > 3 or (rank == 3 and "conv" in parent.lower())):
            return _of_window(shape, bias)
        return None

    def _cuts_patches(self, path: str) -> bool:
        return any(_PATCHES.search(part.lower()) for part in self._parts[path][-3:-1])

    def _of_weight(self, path: str, shape: Shape, bias: int | None) -> tuple[str, ...] | None:
        """Torch's (out, in), unless biases say that this tree has them the other way round."""
        if bias in shape and shape[0] != shape[1]:
            return ("out", "in") if bias == shape[0] else ("in", "out")
        votes = self._votes(gpt2=False)
        return ("out", "in") if "in out" not in votes else None

    def _of_gpt2(self, path: str, shape: Shape, bias: int | None) -> tuple[str, ...] | None:
        if bias in shape and shape[0] != shape[1]:
            return ("out", "in") if bias == shape[0] else ("in", "out")
        votes = self._votes(gpt2=True)
        if not votes and any("gpt2" in part.lower() for part in self._parts[path]):
            votes = {"in out"}
        return tuple(next(iter(votes)).split()) if len(votes) == 1 else None

    def _votes(self, gpt2: bool) -> set[str]:
        """The orders of axes that the biases in this tree prove."""
        if gpt2 not in self._voted:
            self._voted[gpt2] = self._count(gpt2)
        return self._voted[gpt2]

    def _count(self, gpt2: bool) -> set[str]:
        votes = set()
        for path, each in self._parts.items():
            last, parent = each[-1], each[-2] if len(each) > 1 else ""
            mine = bool(_GPT2.fullmatch(parent)) == gpt2 and not no_kernel(parent)
            if not mine or not (last == "weight" or (gpt2 and last == "kernel")):
                continue
            depth = self.depth(path)
            shape, bias = self.shapes[path], self._beside(path, "bias")
            if depth is None or bias is None or len(shape) - depth != 2 or len(bias) - depth != 1:
                continue
            (first, second), size = shape[depth:], bias[depth]
            if first != second and size in (first, second):
                votes.add("out in" if size == first else "in out")
        return votes

    # -- roles --------------------------------------------------------------------------------

    def is_norm(self, path: str) -> bool:
        """Whether a ``weight`` is that of a norm: by its layer's name, or as large as its bias."""
        shape = self.shapes[path]
        return bool(NORMS.search(self._names(path)[1].lower())) or (
            self._beside(path, "bias") == shape
        )

    def role(self, path: str) -> str:
        """``kernels``, ``biases`` or ``others`` (norms, embeddings, statistics)."""
        each, rank = self._parts[path], len(self.shapes[path])
        last, parent = self._names(path)
        if rank >= 2 and re.fullmatch(r".*kernel(_orig|_\d+)?", last):
            return "kernels"
        if rank >= 2 and re.fullmatch("weight(_orig|_v|_(ih|hh|hr)(_l[0-9]+)?(_reverse)?)?", last):
            other = no_kernel(parent) or (last == "weight" and self.is_norm(path))
            other = other and not (rank > 3 and self._cuts_patches(path))
            return "others" if other else "kernels"
        if rank >= 2 and last in (
            "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight",
        ):  # fmt: skip
            return "kernels"
        if rank >= 2 and each[-3:-1] == ("parametrizations", "weight"):
            shape, beside = self.shapes[path], self.shapes.get(f"{path[:-1]}1", ())
            pairs = zip(shape, beside, strict=False)
            lengths = last == "original0" and len(shape) == len(beside) and shape != beside
            # A weight norm has a length for each unit beside its directions.
            return "others" if lengths and all(n in (1, m) for n, m in pairs) else "kernels"
        if re.fullmatch(r"(in_proj_)?bias(_\d+|_(ih|hh)(_l[0-9]+)?(_reverse)?)?", last):
            mask = rank == 4 and self.shapes[path][:2] == (1, 1)  # GPT-2's, of attention
            return "others" if mask else "biases"
        return "others"


def _of_window(shape: Shape, bias: int | None) -> tuple[str, ...] | None:
    """The order of a convolution in torch, (out, in / groups, ...), or of a transposed one,
    (in, out / groups, ...), where the size of the bias fits only one of them."""
    first, second, *window = shape
    if not bias or not second or bias in window:
        return None
    if bias == first and bias % second:  # a multiple may be transposed, in groups
        return ("out", "in", *("spatial",) * len(window))
    if first != bias == second:
        return ("in", "out", *("spatial",) * len(window))
    return None


def with_heads(path: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """The axes of an attention's kernel, whose class tells only its sides, with their names."""
    parent = (*parts(path), "")[-3:-1][0]
    if parent in ATTENTION_IN and names[-3:] == ("in", "out", "out"):
        return (*names[:-2], "heads", "dim")
    if parent in ATTENTION_OUT and names[-3:] == ("in", "in", "out"):
        return (*names[:-3], "heads", "dim", "out")
    return names


def _depth_of(name: str, weight: Shape, bias: Shape) -> int | None:
    """The depth of a layer whose weight and bias have these shapes, if its bias has one axis."""
    depth = len(bias) - 1
    if depth < 0 or len(weight) - depth < 2 or weight[:depth] != bias[:depth]:
        return None
    w, size = weight[depth:], bias[depth]
    sides = w[:2] if name == "weight" else w[-2:]
    if name == "kernel" and len(w) == 2 and depth:  # a dense one: (in, out)
        sides = w[-1:]
    return depth if size in sides or not depth else None


def _general_depths(weight: Shape, bias: Shape) -> dict[int, int]:
    """By the number of axes that the bias of one layer has, two or more as in a DenseGeneral, the
    depth at which the shapes fit."""
    found = {}
    for plain in range(2, len(bias) + 1):
        depth = len(bias) - plain
        enough = len(weight) - depth > plain
        if enough and weight[:depth] == bias[:depth] and weight[-plain:] == bias[depth:]:
            found[plain] = depth
    return found


def order_is_transposed(names: tuple[str, ...]) -> bool:
    """Whether this is how Keras or torch lay out a transposed convolution: (*k, out, in) or
    (in, out, *k)."""
    sides = [("in" if n in ("in", "i") else "out") for n in names if n in ("in", "i", "out", "o")]
    if len(names) < 3 or sorted(sides) != ["in", "out"]:
        return False
    first = names[0] in ("in", "i", "out", "o")
    return sides == (["in", "out"] if first else ["out", "in"])


def _transposed_by_name(parent: str, rank: int) -> bool:
    return rank >= 3 and re.search(r"conv(_?\d+_?d)?_?transpose", parent.lower()) is not None
