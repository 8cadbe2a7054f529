"""torch's operations as layers, by rule: the name of an operation is that of its layer, and the
arguments of its schema are the settings. What a rule can't say is in ``torch_functions``.
"""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fwt.converters.frameworks import torch_functions, torch_products, torch_shapes
from fwt.converters.frameworks.torch_layer import class_of, defaults_of, to_numpy
from fwt.converters.frameworks.torch_values import (
    Reader,
    arguments,
    is_size,
    name_of,
)
from fwt.converters.rows import table
from fwt.converters.rows.row import joined, refuse
from fwt.converters.walk.tensors import Batched, Value, plain_axes

OPERATIONS = {
    **torch_shapes.OPERATIONS,
    **torch_functions.OPERATIONS,
    **torch_products.OPERATIONS,
}


_BEFORE = ("give a module that returns what comes before it, or that takes what it gives as an "
           "input, and compute it outside")  # fmt: skip


def says_nothing(node: Any) -> bool:
    """Whether an operation is no more than about sizes."""
    return is_size(node) or name_of(node).startswith(("_assert", "sym_"))


def read(reader: Reader, node: Any) -> None:
    """One operation that is in no module with a row."""
    if says_nothing(node):
        return
    known = [a for a in node.all_input_nodes if a in reader.env]
    if not known:
        reader.fold(node)
        return
    name, place = name_of(node), reader.place(node)
    if node.target is operator.getitem:
        found = reader.env[node.args[0]]
        if not isinstance(found, Sequence):
            raise refuse(place, "it takes a part of what is no list")
        reader.env[node] = found[node.args[1]]
        return
    if not hasattr(node.target, "_schema"):
        raise refuse(place, f"{name} is no operation of torch's own")
    args = arguments(node)
    training = args.get("training", args.get("train", args.get("dropout_p", True)))
    if torch.Tag.nondeterministic_seeded in node.target.tags and training:
        raise refuse(place, "it draws random numbers", "let self.training say whether it does")
    if args.get("training"):
        raise refuse(place, "it computes as in training", "training=False, or self.training")
    _check_dtype(reader, node, place)
    reader.by_sizes |= not (name in torch_functions.ANY_SIZE or _is_plain(name, args))
    function = OPERATIONS.get(name)
    made = function(reader, node, args, place) if function else by_rule(reader, node, args, place)
    if made is None:
        raise refuse(place, f"the operation {node.target} is not known", _BEFORE)
    if not isinstance(made, torch.Tensor):
        reader.env[node] = made


def _is_plain(name: str, args: Mapping[str, Any]) -> bool:
    """Whether an operation that moves entries says no number that follows from a size."""
    if name in ("view", "reshape", "_unsafe_view", "expand", "unflatten"):
        sizes = args.get("size", args.get("shape", args.get("sizes"))) or ()
        return all(n in (1, -1) or isinstance(n, torch.fx.Node) for n in sizes)
    if name == "slice":
        start, end = args["start"] or 0, args["end"]
        return start <= 0 and (end is None or end > 2**62 or isinstance(end, torch.fx.Node))
    return name == "select" and args["index"] in (0, -1)


def _check_dtype(reader: Reader, node: Any, place: str) -> None:
    """Raises where an operation gives floats of another width than any that it takes."""
    parts = node.meta["val"]
    parts = parts if isinstance(parts, list | tuple) else [parts]
    given = [(a.meta.get("val"), a in reader.env) for a in node.all_input_nodes]
    kinds = {
        v.dtype for v, follows in given
        if isinstance(v, torch.Tensor) and v.is_floating_point()
        and (follows or v.dtype != torch.float64)  # to which Flax does not widen
    }  # fmt: skip
    for part in parts:
        if kinds and part.is_floating_point() and part.dtype not in kinds:
            told = f"it makes {part.dtype} of {min(map(str, kinds))}"
            way = "run it in one dtype: without torch.autocast, or as net.bfloat16()"
            raise refuse(place, told.replace("torch.", ""), way)
    short = {str(p.dtype).removeprefix("torch.") for p in parts if p.dtype in _HALF}
    if short and name_of(node) in _IN_FLOAT32:
        raise refuse(
            place,
            f"torch computes {name_of(node)} in float32 within; several layers would do so in "
            f"{min(short)}, where squares and products overflow",
            "convert model.float()",
        )


_HALF = (torch.float16, torch.bfloat16)
# Of several layers each, between which half precision would be rounded.
_IN_FLOAT32 = {"linalg_vector_norm", "norm", "std", "std_mean", "var", "var_mean", "cdist",
               "pairwise_distance", "cosine_similarity",
               "scaled_dot_product_attention"}  # fmt: skip


# -- by rule ------------------------------------------------------------------------------------


def _classes() -> dict[str, str]:
    """By the name of an operation without underscores, the torch layer that does it."""
    kinds = {row.class_in("torch") for row in table.LAYERS}
    return {k.lower(): k for k in kinds if k is not None and hasattr(torch.nn, k)}


_ARRAYS = ("weight", "bias", "running_mean", "running_var")
_IGNORED = ("cudnn_enabled", "training", "momentum", "benchmark", "cudnn_enable", "half_to_float",
            "dtype", "scale_grad_by_freq", "sparse", "noise", "use_input_stats")  # fmt: skip
_INPUT = ("self", "input", "indices")
_WINDOWS = ("kernel_size", "stride", "padding", "dilation", "output_size", "output_padding")
# What an operation is called otherwise than its layer.
_CALLED = {"_native_batch_norm_legit_no_training": "batch_norm", "_softmax": "softmax",
           "_log_softmax": "log_softmax", "mkldnn_rnn_layer": "lstm"}  # fmt: skip
LAST = ("Linear", "LayerNorm", "RMSNorm")  # layers that work on the last axes


def by_rule(reader: Reader, node: Any, args: dict[str, Any], place: str) -> Any:
    """An operation that is a layer of the same name, whose settings are its arguments."""
    name = _CALLED.get(name_of(node), name_of(node)).replace("_", "")
    given = next((args.pop(n) for n in _INPUT if n in args), None)
    if name in ("batchnorm", "instancenorm") and given in reader.env:
        name += f"{max(len(reader.dynamic(given, place).axes) - 2, 1)}d"
    kind = _classes().get(name) or _classes().get(name + f"{_dims(args)}d")
    if kind is None or given not in reader.env:
        return None
    value = reader.dynamic(given, place)
    arrays = {k: args.pop(k) for k in _ARRAYS if k in args}
    if left := [k for k, v in arrays.items() if v is not None and v not in reader.values]:
        raise refuse(place, f"its {left[0]} follows from the input")
    if kind in ("Embedding", "Linear") and (made := _of_table(reader, kind, value, arrays, place)):
        return made
    allowed = set(defaults_of(class_of(kind)))
    settings: dict[str, Any] = {}
    schema = {a.name: a for a in node.target._schema.arguments}
    for key, found in args.items():
        if isinstance(found, torch.fx.Node):
            raise refuse(place, f"its {key} is computed")
        if key in allowed:
            settings[key] = tuple(found) if isinstance(found, list) else found
        elif key not in _IGNORED and found != schema[key].default_value:
            raise refuse(place, f"{key}={found!r:.80} is not known")
    if settings.get("stride") == ():
        settings["stride"] = settings["kernel_size"]
    held = {k: reader.values[v] for k, v in arrays.items() if v is not None}
    if "use_input_stats" in args:
        settings["track_running_stats"] = "running_mean" in held and not args["use_input_stats"]
        if args["use_input_stats"]:
            held = {k: v for k, v in held.items() if not k.startswith("running")}
    settings |= {k: v for k, v in _sizes(held.get("weight"), value, args).items() if k in allowed}
    for key, array in (("bias", "bias"), ("affine", "weight"), ("elementwise_affine", "weight")):
        if key in allowed and array in arrays:
            settings[key] = array in held
    where = place
    paths = frozenset[str]().union(*(reader.sources[v] for v in arrays.values() if v is not None))
    holders = {p.rpartition(".")[0] for p in paths}
    plain = all(reader.is_whole(v, k) for k, v in arrays.items() if v is not None)
    if len(holders) == 1 and plain and _is_alone(reader, next(iter(holders)), held):
        holder = joined(holders.pop().split("."))
        where = holder or place
        if kind == "Embedding" and settings.get("padding_idx", 0) < 0:
            settings["padding_idx"] = None
    own = {k: to_numpy(v, f"{place}.{k}") for k, v in held.items()}
    out = node.meta["val"]
    out = out[0] if isinstance(out, list | tuple) else out
    found = call(reader, kind, settings, value, where, reader.sizes(out.shape, place), own)
    reader.paths[found.name] = paths
    whole = [(k, reader.positions[v][0]) for k, v in arrays.items() if v in reader.positions
             and reader.positions[v][1] is None]  # fmt: skip
    if held and len(whole) == len(held):
        last = reader.layers[-1]
        first = reader.called.setdefault((kind, *whole), last)
        if first is not last and first.settings == last.settings:
            last.of = first.name
    for path, index in (reader.positions[v] for v in arrays.values() if v in reader.positions):
        if index is not None:
            reader.parts[found.name, path] = index.reshape(-1).numpy()
    return [found] if isinstance(node.meta["val"], list | tuple) else found


def is_known(node: Any) -> bool:
    """Whether a rule of some name reads an operation."""
    if says_nothing(node):
        return True
    name = _CALLED.get(name_of(node), name_of(node))
    own = name.replace("_", "")
    return name in OPERATIONS or any(f"{own}{end}" in _classes() for end in ("", "1d", "2d", "3d"))


def _is_alone(reader: Reader, holder: str, held: Mapping[str, Any]) -> bool:
    """Whether a module has no learned arrays but these, so that a layer may have its name."""
    return set(reader.model.get_submodule(holder)._parameters) <= {*held, *_ARRAYS}


def _of_table(
    reader: Reader, kind: str, value: Value, arrays: Mapping[str, Any], place: str
) -> Value | None:
    """A lookup, or the products, of a weight that other operations take too."""
    weight = arrays["weight"]
    users = [n for n in weight.users if name_of(n) in ("embedding", "linear")]
    held = [arrays[k] for k in ("weight", "bias") if arrays.get(k) is not None]
    if kind == "Linear" and any(reader.sources[a] & reader.shared for a in held):
        made = reader.attended(value, reader.between(weight, lambda given: given, place), place)
        if arrays.get("bias") is None:
            return made
        other = reader.array(arrays["bias"], made, place)
        return reader.emit("Add", {}, [made, other], f"{place}__added", made.shape, made.axes)
    if len(users) < 2 or {name_of(n) for n in users} == {"linear"} or arrays.get("bias"):
        return None
    table = reader.between(weight, lambda given: given, place)
    value = reader.plain(value, place)
    if kind == "Embedding":
        shape = (*value.shape, table.shape[1])
        return reader.emit("Lookup", {}, [table, value], place, shape)
    return reader.emit("Attend", {}, [value, table], place, (*value.shape[:-1], table.shape[0]))


def _dims(args: Mapping[str, Any]) -> int:
    """How many spatial axes a window says."""
    return next((len(args[k]) for k in _WINDOWS if isinstance(args.get(k), list | tuple)), 0)


def is_pointwise(kind: str) -> bool:
    """Whether a layer of this kind does the same to each entry."""
    rows = table.rows_of("torch", kind)
    return kind in ("Dropout", "Identity") or (bool(rows) and all(
        r.flax and not r.axes and not r.kind and not r.params and not r.halves and not r.single
        and not any(getattr(s, "letter", 0) is None for s in r.settings) for r in rows
    ))  # fmt: skip


def call(
    reader: Reader,
    kind: str,
    settings: dict[str, Any],
    value: Value,
    place: str,
    shape: Sequence[Batched],
    arrays: Mapping[str, Any],
) -> Value:
    """A layer of one tensor, which is brought into the order of axes that it needs."""
    if is_pointwise(kind):
        return reader.emit(kind, settings, [value], place, value.shape, value.axes, arrays)
    if kind == "Embedding":
        axes = (*value.axes, (len(value.shape),))
        full = (*value.shape, shape[-1][0])
        return reader.emit(kind, settings, [value], place, full, axes, arrays)
    if kind in LAST:
        count = len(settings.get("normalized_shape", (1,)))
        if len(value.shape) > 1 and value.axes[-count:] != plain_axes(len(value.shape))[-count:]:
            value = reader.lined_up(value, place)
        if value.axes[-count:] != plain_axes(len(value.shape))[-count:]:
            raise refuse(place, "it works along the batch")
        full = (*value.shape[:-count], *(n for n, _ in shape[-count:]))
        return reader.emit(kind, settings, [value], place, full, value.axes, arrays)
    if "dim" in settings and kind in ("Softmax", "LogSoftmax", "Softmin"):
        dim = reader.axis(value, settings["dim"], place)
        settings = {**settings, "dim": dim}
        return reader.emit(kind, settings, [value], place, value.shape, value.axes, arrays)
    value = reader.plain(value, place)
    full = tuple(None if batched else n for n, batched in shape)
    if full[0] is not None or None in full[1:] or shape[0][0] != 1:
        raise refuse(place, "what it gives does not have the batch first")
    return reader.emit(kind, settings, [value], place, full, arrays=arrays)


def _sizes(weight: Any, value: Value, args: Mapping[str, Any]) -> dict[str, Any]:
    """What a layer says of the sizes of its arrays and of its input."""
    sizes = value.sizes
    found: dict[str, Any] = {"num_features": sizes[1][0], "num_channels": sizes[1][0]} if (
        len(sizes) > 1) else {}  # fmt: skip
    if weight is not None and weight.ndim > 1:
        first, second = weight.shape[:2]
        groups = args.get("groups", 1)
        turned = "output_padding" in args  # a transposed convolution has its inputs first
        found |= {"out_features": first, "in_features": second, "num_embeddings": first,
                  "embedding_dim": second, "kernel_size": tuple(weight.shape[2:]),
                  "in_channels": first if turned else second * groups,
                  "out_channels": second * groups if turned else first}  # fmt: skip
    elif weight is not None:
        found["num_parameters"] = weight.numel()
    return found
