"""What the classes of modules say of their leaves: Equinox's and nnx's, where a tree holds them,
and those of a linen module, which is traced."""

import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fwt import _tree


@dataclasses.dataclass(frozen=True)
class Known:
    """What the class of a layer tells of one of its leaves.

    Attributes:
        names: one name per axis; None where the class says nothing.
        transposed: whether it is the kernel of a transposed convolution.
        layer: the name of the class.
        owner: the layer itself, where there is a module.
        groups: of a transposed convolution, in how many groups its inputs and outputs meet.
        turned: whether Flax, too, takes its inputs and outputs for each other when it draws.
        depthwise: of a convolution that Keras calls a DepthwiseConv where each group takes one
            input, its groups.
        keras: the names by which Keras counts fans, where it counts an axis otherwise.
        flax: the names by which Flax counts fans, where it counts an axis otherwise.
        anew: whether a module around the layer draws its matrices anew, as ``torch.nn.Transformer``
            does, by Xavier's uniform distribution.
        role: "kernels", "biases" or "others", where the class tells it; "unknown" where it may be
            any of them.
        stacked: where the leaf is a stack of such layers along one of several axes that fit, the
            names of its axes if it is the first.
    """

    names: tuple[str, ...] | None = None
    transposed: bool = False
    layer: str = ""
    owner: Any = None
    groups: int = 1
    turned: bool = False
    depthwise: int = 0
    keras: tuple[str, ...] | None = None
    flax: tuple[str, ...] | None = None
    anew: bool = False
    role: str = ""
    stacked: str = ""


# By class and leaf, its axes; "*" stands for the window of a convolution, "?" for an axis that is
# neither an input nor an output. Equinox lays out kernels as torch does, nnx as linen does.
_EQUINOX: dict[str, dict[str, str]] = {
    "Linear": {"weight": "out in", "bias": "out"},
    "Conv": {"weight": "out in *", "bias": "out *"},
    "ConvTranspose": {"weight": "out in *", "bias": "out *"},
    "Embedding": {"weight": "? ?"},
    "GRUCell": {"weight_ih": "out in", "weight_hh": "out in", "bias": "out", "bias_n": "out"},
    "LSTMCell": {"weight_ih": "out in", "weight_hh": "out in", "bias": "out"},
    "LayerNorm": {"weight": "shape", "bias": "shape"},
    "RMSNorm": {"weight": "shape", "bias": "shape"},
    "GroupNorm": {"weight": "out", "bias": "out"},
    "BatchNorm": {"weight": "out", "bias": "out"},
    "PReLU": {"negative_slope": "shape"},
}
_NNX: dict[str, dict[str, str]] = {
    "Linear": {"kernel": "in out", "bias": "out"},
    "LinearGeneral": {"kernel": "general", "bias": "general"},
    "Einsum": {"kernel": "einsum", "bias": ""},
    "Conv": {"kernel": "* in out", "bias": "out"},
    "ConvTranspose": {"kernel": "* in out", "bias": "out"},
    "Embed": {"embedding": "? ?"},
    "LoRA": {"lora_a": "in out", "lora_b": "in out"},
    "LayerNorm": {"scale": "out", "bias": "out"},
    "RMSNorm": {"scale": "out"},
    "GroupNorm": {"scale": "out", "bias": "out"},
    "InstanceNorm": {"scale": "out", "bias": "out"},
    "BatchNorm": {"scale": "out", "bias": "out", "mean": "out", "var": "out"},
    "PReLU": {"negative_slope": ""},
}
_KERNELS = ("weight", "kernel", "weight_ih", "weight_hh")


def _classes() -> list[tuple[type, str, dict[str, str]]]:
    """The layers of the libraries that somebody has imported."""
    found = []
    for library, table in (("equinox", _EQUINOX), ("flax.nnx", _NNX)):
        module = sys.modules.get(library)
        layers = getattr(module, "nn", module) if library == "equinox" else module
        for name, leaves in table.items():
            cls = getattr(layers, name, None)
            if isinstance(cls, type):
                found.append((cls, name, leaves))
    return found


def of_classes(tree: _tree.Tree) -> dict[str, Known]:
    """By path, what the classes of the Equinox and nnx modules in a tree say of its leaves."""
    layers, classes = {}, _classes()
    for parts, node in tree.layers.items():
        cls = next((c for c in classes if isinstance(node, c[0])), None)
        if cls is not None:
            layers[parts] = (node, cls[1], cls[2])
    if not layers:
        return {}
    shapes = {p: tuple(x.shape) for p, x in (tree.leaves | tree.hidden).items()}
    for also in tree.also.values():
        shapes |= {p: tuple(shape) for p, shape in also.items()}
    found = {}
    for path, shape in shapes.items():
        parts = tuple(_tree.unescape(p) for p in _tree.split(path))
        for cut in reversed(range(len(parts))):  # a layer may be within a layer, as in a LoRALinear
            node, name, leaves = layers.get(parts[:cut], (None, "", {}))
            if parts[cut] in leaves:
                found[path] = _told(node, name, parts[cut], leaves, shape)
                break
    return found


def _told(
    layer: Any, name: str, leaf: str, leaves: Mapping[str, str], shape: tuple[int, ...]
) -> Known:
    """What a layer says of one of its leaves; axes beyond those of its class are a stack."""
    names = _axes(layer, leaf, leaves[leaf])
    if leaf == "kernel" and leaves[leaf] in ("general", "einsum"):
        flax = "in" if leaves[leaf] == "general" else "plain"
        own = _own_shape(layer, name, leaf, len(names or ()))
        known = of_several(layer, names, len(own or names or ()), len(shape), flax)
        return known if own is None else _placed(known, shape, own)
    transposed = name == "ConvTranspose" and leaf in _KERNELS
    turned = transposed and bool(getattr(layer, "transpose_kernel", False))
    if turned:
        names = (*(names or ())[:-2], "out", "in")
    several = ""
    if names is not None:
        own = _own_shape(layer, name, leaf, len(names))
        if own is not None and len(missing(shape, own)) > 1:
            several = " ".join([*["stack"] * (len(shape) - len(own)), *names])
        names = _with_stack(names, shape, own)
    role = "biases" if leaf.startswith("bias") else "others"
    if leaf in _KERNELS and leaves[leaf] not in ("? ?", "shape", "out"):
        role = "kernels"
    groups = getattr(layer, "groups", 1) if transposed else 1
    depthwise = depthwise_groups(layer) if name == "Conv" and leaf in _KERNELS else 0
    more = groups, turned, depthwise
    return Known(names, transposed, name, layer, *more, role=role, stacked=several)


def many(setting: Any) -> int:
    """How many there are of a setting that is one number or several."""
    return len(setting) if hasattr(setting, "__len__") else 1


def even(strides: Any) -> bool:
    """Whether a window moves as far along each axis."""
    return not hasattr(strides, "__len__") or len(set(strides)) <= 1


def depthwise_groups(layer: Any) -> int:
    """The groups of a convolution that Keras calls a DepthwiseConv where each takes one input, or
    0: Keras has none of three axes, of uneven strides or with causal padding."""
    groups: int = getattr(layer, "feature_group_count", getattr(layer, "groups", 1))
    strides = getattr(layer, "strides", getattr(layer, "stride", 1))
    causal = str(getattr(layer, "padding", "")).upper() == "CAUSAL"
    fits = many(getattr(layer, "kernel_size", ())) <= 2 and even(strides) and not causal
    return groups if fits and groups > 1 else 0


def _with_stack(
    names: tuple[str, ...], shape: tuple[int, ...], own: tuple[int, ...] | None
) -> tuple[str, ...] | None:
    """The names with those of a stack: of the axes without which a leaf has the shape that its
    layer says, or of the first ones; None where several fit."""
    more = len(shape) - len(names)
    if more <= 0 or own is None:
        return None if more < 0 else (*["stack"] * more, *names)
    fits = missing(shape, own)
    if len(fits) != 1:
        return None
    (gone,), rest = fits, iter(names)
    return tuple("stack" if i in gone else next(rest) for i in range(len(shape)))


def missing(outer: tuple[int, ...], inner: tuple[int, ...]) -> set[tuple[int, ...]]:
    """The axes of the outer shape without which it is the inner one."""
    gone = itertools.combinations(range(len(outer)), max(len(outer) - len(inner), 0))
    return {g for g in gone if tuple(s for i, s in enumerate(outer) if i not in g) == inner}


def _placed(known: Known, shape: tuple[int, ...], own: tuple[int, ...]) -> Known:
    """What is known of a leaf whose stack is first, where its shape says which axes are the stack;
    no names where several may be."""
    more = len(shape) - len(own)
    fits = missing(shape, own) if more > 0 else set()
    if len(fits) > 1:
        said = " ".join(known.names or ("stack",) * len(shape))
        return dataclasses.replace(known, names=None, keras=None, flax=None, stacked=said)
    order = list(range(len(shape)))
    for gone in fits:
        rest = iter(order[more:])
        order = [gone.index(i) if i in gone else next(rest) for i in order]
    names, keras, flax = (
        each and tuple(each[i] for i in order) for each in (known.names, known.keras, known.flax)
    )
    return dataclasses.replace(known, names=names, keras=keras, flax=flax)


def _own_shape(layer: Any, name: str, leaf: str, rank: int) -> tuple[int, ...] | None:
    """The shape of a leaf of one layer, as its settings say it; None where they don't."""
    if leaf == "kernel" and name in ("Conv", "ConvTranspose", "Einsum"):
        return tuple(layer.kernel_shape)
    if leaf == "kernel" and name == "LinearGeneral":
        return (*layer.batch_axis.values(), *layer.in_features, *layer.out_features)
    if name == "LoRA":
        return _lora_shape(layer, leaf)
    if name in ("GRUCell", "LSTMCell"):
        units, gates = layer.hidden_size, 3 if name == "GRUCell" else 4
        sizes = {"weight_ih": (layer.input_size,), "weight_hh": (units,)}
        return (units,) if leaf == "bias_n" else (gates * units, *sizes.get(leaf, ()))
    if name in ("Embed", "Embedding"):
        return (layer.num_embeddings, getattr(layer, "features", None) or layer.embedding_size)
    if name.endswith("Norm"):
        told = ("shape", "num_features", "channels", "input_size")
        size = next((getattr(layer, s) for s in told if hasattr(layer, s)), None)
        return (size,) if isinstance(size, int) else size
    ins = getattr(layer, "in_features", getattr(layer, "in_channels", None))
    outs = getattr(layer, "out_features", getattr(layer, "out_channels", None))
    if not isinstance(ins, int) or not isinstance(outs, int):
        return None
    if leaf == "bias" and name in ("Linear", "Conv", "ConvTranspose"):
        return (outs, *[1] * (rank - 1))
    if name == "Linear" and leaf in ("kernel", "weight"):
        return (ins, outs) if leaf == "kernel" else (outs, ins)
    if name in ("Conv", "ConvTranspose") and leaf == "weight":
        return (outs, ins // layer.groups, *layer.kernel_size)
    return None


def _lora_shape(layer: Any, leaf: str) -> tuple[int, ...] | None:
    """The same of an nnx LoRA, which does not keep its rank: the one with which both leaves
    are stacked along the same axis."""
    ins, outs = layer.in_features, layer.out_features
    first, second = (tuple(getattr(x, "shape", ())) for x in (layer.lora_a, layer.lora_b))
    ranks = [
        rank
        for rank in {*first} & {*second}
        if missing(first, (ins, rank)) & missing(second, (rank, outs))
    ]
    shapes = {"lora_a": (ins, *ranks), "lora_b": (*ranks, outs)}
    return shapes[leaf] if len(ranks) == 1 else None


def _axes(layer: Any, leaf: str, text: str) -> tuple[str, ...] | None:
    if text == "shape":
        return ("out",) * len(tuple(getattr(layer, "shape", None) or ())) or None
    if text == "einsum":
        return einsum_names(layer.einsum_str)
    if text == "general":
        batch, ins, outs = layer.batch_axis, layer.in_features, layer.out_features
        ins = ins if leaf == "kernel" else ()
        both = "both" if leaf == "kernel" else "stack"
        return (*[both] * len(batch), *["in"] * len(ins), *["out"] * len(outs))
    window = getattr(layer, "num_spatial_dims", None)
    if window is None and "*" in text:
        size = layer.kernel_size
        window = len(size) if hasattr(size, "__len__") else 1
    # The axes of a bias of Equinox beside its units have one element each.
    fill = "out" if text == "out *" else "spatial"
    found: list[str] = []
    for word in text.split():
        found += [fill] * (window or 0) if word == "*" else ["" if word == "?" else word]
    return tuple(found) or None


def einsum_names(equation: str) -> tuple[str, ...] | None:
    """The axes of an einsum's second operand, "both" for one of the inputs and the outputs; None
    where one is neither."""
    operands, _, output = equation.replace(" ", "").replace("...", "").partition("->")
    inputs, _, kernel = operands.partition(",")
    sides = {(True, False): "in", (False, True): "out", (True, True): "both"}
    names = [sides.get((letter in inputs, letter in output)) for letter in kernel]
    return None if None in names else tuple(n for n in names if n)


def plain(rank: int) -> tuple[str, ...]:
    """(..., in, out), as every JAX initializer reads a shape."""
    return ("in", "out")[2 - rank :] if rank < 2 else (*["k"] * (rank - 2), "in", "out")


def of_several(layer: Any, names: tuple[str, ...] | None, size: int, rank: int, flax: str) -> Known:
    """What a layer tells of its kernel some axes of which are "both" of the inputs and of the
    outputs: each slice along them is a layer of its own, but all are drawn in one.

    Args:
        layer: the layer.
        names: one name per axis; None where they aren't known.
        size: of how many axes it is.
        rank: of the leaf; what it has more is a stack, and comes first.
        flax: as which side Flax's layer counts "both", "plain" where it reads the shape as
            (..., in, out), or "" where Flax has no such layer.
    """
    more = ("stack",) * (rank - size)

    def called(word: str) -> tuple[str, ...] | None:
        return names and (*more, *(word if n == "both" else n for n in names))

    own = (*more, *plain(size)) if flax == "plain" else called(flax) if flax else None
    kind = type(layer).__name__
    return Known(called("stack"), False, kind, layer, keras=called("out"), flax=own, role="kernels")


# -- linen ------------------------------------------------------------------------------------


class Traced(NamedTuple):
    """What one leaf of a linen module is where its layer runs: within a scan or vmap it is one
    slice.

    Attributes:
        layer: the path of its layer.
        shape: of the leaf.
        known: what the layer's class tells of it.
    """

    layer: tuple[str, ...]
    shape: tuple[int, ...]
    known: Known


# Of a layer, the name of a leaf and its rank, what the layer's class tells.
Tell = Callable[[Any, str, int], Known]


def traced(module: Any, tree: _tree.Tree, tell: Tell) -> Mapping[str, Traced]:
    """By path, the leaves of a linen module as its layers see them, from a run on shapes alone.

    Any input on which the module runs with these weights will do: the module's own
    ``input_shape``, or else one that is found by trying. Nothing, where there is none.
    """
    nn = sys.modules.get("flax.linen")
    if nn is None or not isinstance(module, nn.Module):
        return {}

    def shaped(x: Any) -> Any:
        given = hasattr(x, "shape") and hasattr(x, "dtype")
        return jax.ShapeDtypeStruct(x.shape, x.dtype) if given else x

    case = (module, tree._treedef, tuple(shaped(x) for x in tree._all), tell)
    try:
        hash(case)
    except TypeError:  # a module with an array or a dict among its settings
        return _trace(*case)
    return _trace_once(*case)


def _trace(module: Any, treedef: Any, leaves: Any, tell: Tell) -> Mapping[str, Traced]:
    root = jax.tree_util.tree_unflatten(treedef, leaves)
    shapes = getattr(root, "variables", root)
    if not isinstance(shapes, Mapping):
        return {}
    shapes = shapes if "params" in shapes else {"params": shapes}
    rngs = {name: jax.random.key(0) for name in ("params", "dropout")}

    def run(values: Any, x: Any) -> Any:
        return module.apply(values, x, rngs=rngs, mutable=True)

    nn = sys.modules["flax.linen"]
    for inputs in _inputs(module, shapes):
        found: dict[str, _Seen] = {}
        try:
            with nn.intercept_methods(_watching(found)):
                jax.eval_shape(run, shapes, inputs)
        except Exception:  # noqa: BLE001 - whatever a user's module says to an input that it is not for
            continue
        # Without the layers, which hold on to what they were traced with.
        return {path: seen.traced(tell) for path, seen in found.items()}
    return {}


_trace_once = functools.lru_cache(maxsize=32)(_trace)


class _Seen(NamedTuple):
    """One leaf, and the layer that reads it."""

    layer: Any
    name: str
    shape: tuple[int, ...]

    def traced(self, tell: Tell) -> Traced:
        known = dataclasses.replace(tell(self.layer, self.name, len(self.shape)), owner=None)
        return Traced(self.layer.path, self.shape, known)


def _watching(found: dict[str, _Seen]) -> Any:
    def interceptor(call: Any, args: Any, kwds: Any, context: Any) -> Any:
        layer = context.module
        scope = getattr(layer, "scope", None)
        params = scope.variables().get("params", {}) if scope is not None else {}
        for name, value in params.items():
            leaves = jax.tree_util.tree_leaves(value)  # a box has one
            if isinstance(value, Mapping) or len(leaves) != 1 or not hasattr(leaves[0], "shape"):
                continue
            path = "/".join(_tree.escape(str(p)) for p in (*layer.path, name))
            shape = tuple(leaves[0].shape)
            if path not in found or len(shape) <= len(found[path].shape):
                found[path] = _Seen(layer, name, shape)
        return call(*args, **kwds)

    return interceptor


def _inputs(module: Any, shapes: Any) -> Iterator[Any]:
    """Inputs to try, each one or more sizes and a dtype."""
    known = getattr(module, "input_shape", None)
    if isinstance(known, tuple):
        yield jax.ShapeDtypeStruct((1, *(2 if s is None else s for s in known)), jnp.float32)
        return
    sizes = sorted({s for x in jax.tree.leaves(shapes) for s in x.shape if s > 1})
    for size in sizes[:16]:
        for window in ((), (4,), (8, 8)):
            yield jax.ShapeDtypeStruct((1, *window, size), jnp.float32)
    yield jax.ShapeDtypeStruct((1, 4), jnp.int32)
    large = [s for s in dict.fromkeys(x.shape for x in jax.tree.leaves(shapes)) if len(s) > 2]
    for *window, taken, given in large[:4]:
        several = (n for n in range(given // 2, 1, -1) if given % n == 0)
        for n in itertools.islice(several, 8 if taken == 1 else 0):  # of a depthwise convolution
            yield jax.ShapeDtypeStruct((1, *[8] * len(window), n), jnp.float32)
    for shape in large[:4]:  # of a layer that contracts several axes
        for axes in range(2, len(shape)):
            yield jax.ShapeDtypeStruct((1, *shape[:axes]), jnp.float32)
    # Of a layer whose batch counts, as a DenseGeneral's batch_dims, and of an einsum.
    for shape in dict.fromkeys(part for s in large[:4] for part in (s, s[1:])):
        for axes in range(2, len(shape)):
            for batch in range(1, axes):
                yield jax.ShapeDtypeStruct((*shape[:batch], 4, *shape[batch:axes]), jnp.float32)
            yield jax.ShapeDtypeStruct(shape[:axes], jnp.float32)
        yield jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    # A layer with other weights at each position takes images of one size.
    for *window, taken, _ in large[:4]:
        for n in range(1, min(taken, 32) + 1):
            if taken % n == 0:
                yield jax.ShapeDtypeStruct((1, *window, taken // n), jnp.float32)
