"""Operations of torch that move entries: reshapes, permutations, cuts, and what joins tensors."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fwt.converters.frameworks.torch_values import Reader, States, name_of
from fwt.converters.rows.row import refuse
from fwt.converters.walk.tensors import Value

Args = dict[str, Any]


def _same(reader: Reader, node: Any, args: Args, place: str) -> Any:
    return reader.env[node.all_input_nodes[0]]


def _view(reader: Reader, node: Any, args: Args, place: str) -> Any:
    given = node.all_input_nodes[0]
    found = reader.env[given]
    if isinstance(found, States):
        told = found.layer.settings
        alone = told["num_layers"] == 1 and not told["bidirectional"]
        return last_state(reader, found, 0, place) if alone and args.get("dim") == 0 else None
    return reader.reshaped(reader.dynamic(given, place), reader.shape(node), place)


def _permute(reader: Reader, node: Any, args: Args, place: str) -> Any:
    value = reader.env[args["self"]]
    if not isinstance(value, Value):
        return None
    dims = list(range(len(value.axes)))
    if "dims" in args:
        dims = [d % len(dims) for d in args["dims"]]
    elif "dim0" in args:
        a, b = args["dim0"] % len(dims), args["dim1"] % len(dims)
        dims[a], dims[b] = dims[b], dims[a]
    else:  # t
        dims.reverse()
    axes = tuple(value.axes[d] for d in dims)
    value = Value(value.name, value.shape, axes)
    # A permutation that keeps the batch first is a layer; another waits for what follows.
    return reader.lined_up(value, place) if axes[0] == (0,) else value


def _slice(reader: Reader, node: Any, args: Args, place: str) -> Any:
    value, dim = reader.env[args["self"]], args["dim"]
    start, end, step = args["start"] or 0, args["end"], args["step"]
    if isinstance(value, States):
        if dim == 0:
            return None
        return value if (start, step) == (0, 1) and _is_all(end) else None
    value = reader.dynamic(args["self"], place)
    dim %= len(value.axes)
    if 0 in value.axes[dim]:
        if (start, step) == (0, 1) and (_is_all(end) or _is_batch(reader, end)):
            return value
        raise refuse(place, "it takes some of the examples")
    if not all(isinstance(x, int | None) for x in (start, end, step)):
        raise refuse(place, "where it cuts follows from the number of examples")
    size = reader.shape(args["self"])[dim][0]
    if not len(range(size)[start:end:step]):
        raise refuse(place, f"it takes {start} to {end} of {size}, which is nothing")
    return reader.cut(value, dim, start, None if _is_all(end) else end, place, step)


def _is_all(end: Any) -> bool:
    return end is None or (isinstance(end, int) and end > 2**62)


def _is_batch(reader: Reader, end: Any) -> bool:
    found = getattr(end, "meta", {}).get("val")
    return isinstance(found, torch.SymInt) and found.node.expr == reader.batch


def _select(reader: Reader, node: Any, args: Args, place: str) -> Any:
    value, dim, index = reader.env[args["self"]], args["dim"], args["index"]
    if isinstance(value, States):
        return last_state(reader, value, index, place) if dim == 0 else None
    if not isinstance(index, int):
        raise refuse(place, "which it takes follows from the number of examples")
    return reader.entry(reader.dynamic(args["self"], place), dim, index, place)


def last_state(reader: Reader, states: States, index: int, place: str) -> Value:
    """The last output of one direction, which is the last state of it."""
    settings = states.layer.settings
    both = 2 if settings["bidirectional"] else 1
    total = both * settings["num_layers"]
    index %= total
    if index < total - both:
        raise refuse(place, f"it uses a state of a layer of {states.layer} below the last")
    sequence, backward = states.sequence, index - (total - both) == 1
    size = sequence.shape[-1]
    assert size is not None
    if both == 2:
        half, last = size // 2, len(sequence.axes) - 1
        start = half if backward else 0
        sequence = reader.cut(sequence, last, start, start + half, place)
    return reader.entry(sequence, states.time, 0 if backward else -1, place)


def _parts(reader: Reader, node: Any, args: Args, place: str) -> Any:
    """split, chunk, split_with_sizes, tensor_split."""
    value = reader.dynamic(args["self"], place)
    dim = args.get("dim", 0) % len(value.axes)
    at, out = 0, []
    for index, part in enumerate(node.meta["val"]):
        size = part.shape[dim]
        if not isinstance(size, int):
            raise refuse(place, "it splits the examples")
        out.append(reader.cut(value, dim, at, at + size, f"{place}__{index}"))
        at += size
    return out


def _unbind(reader: Reader, node: Any, args: Args, place: str) -> Any:
    value, dim = reader.dynamic(args["self"], place), args.get("dim", 0)
    size = value.shape[reader.axis(value, dim, place)]
    return [reader.entry(value, dim, i, f"{place}__{i}") for i in range(size or 0)]


def _cat(reader: Reader, node: Any, args: Args, place: str) -> Any:
    nodes = args["tensors"]
    return joined_up(reader, nodes, args.get("dim", 0), place)


def joined_up(reader: Reader, nodes: Sequence[Any], dim: int, place: str) -> Value:
    """Tensors one after the other along an axis of torch's."""
    values = [reader.dynamic(n, place) if n in reader.env else None for n in nodes]
    found = [v for v in values if v is not None]
    if len({(v.axes, len(v.shape)) for v in found}) > 1:
        values = [v and reader.plain(v, place) for v in values]
        found = [v for v in values if v is not None]
    like = found[0]
    parts = []
    for node, value in zip(nodes, values, strict=True):
        if value is None:
            value = reader.array(node, like, place, whole=True)
        parts.append(value)
    return reader.along(parts, reader.axis(like, dim, place), place)


def _assigned(reader: Reader, node: Any, args: Args, place: str) -> Any:
    """A tensor some of whose entries along an axis are those of another: its parts joined."""
    shape, dim = node.meta["val"].shape, args["dim"] % len(node.meta["val"].shape)
    size, src = shape[dim], args["src"]
    every = dim == 0 and "index" not in args and src in reader.env and args["step"] == 1
    every = every and (args["start"] or 0) == 0
    if every and (_is_all(args["end"]) or _is_batch(reader, args["end"])):
        return reader.dynamic(src, place)  # all examples
    own = args["self"]
    if dim == 0 or not isinstance(size, int) or not (own in reader.env or src in reader.env):
        return None
    if "index" in args:
        start = args["index"] % size
        at = range(start, start + 1)
        if src in reader.env:
            sizes = reader.plain(reader.dynamic(src, place), place).sizes
            part = reader.reshaped(reader.dynamic(src, place), [*sizes[:dim], (1, False),
                                                                *sizes[dim:]], place)  # fmt: skip
            reader.env[(node, src)] = part
        else:
            reader.values[(node, src)] = reader.values[src].unsqueeze(dim)
            reader.sources[(node, src)] = reader.sources[src]
        src = (node, src)
    else:
        at = range(size)[args["start"] : args["end"] : args["step"]]
        if at.step != 1:
            raise refuse(place, f"it assigns every {at.step}th entry")
    nodes = []
    for label, first, last in (("before", 0, at.start), ("", 0, 0), ("behind", at.stop, size)):
        if not label:
            nodes += [src] if len(at) else []
        elif first < last:
            nodes.append((node, label))
            if own in reader.env:
                value = reader.plain(reader.dynamic(own, place), place)
                reader.env[nodes[-1]] = reader.cut(value, dim, first, last, place)
            else:
                reader.values[nodes[-1]] = reader.values[own].narrow(dim, first, last - first)
                reader.sources[nodes[-1]] = reader.sources[own]
    return joined_up(reader, nodes, dim, place)


def _copied(reader: Reader, node: Any, args: Args, place: str) -> Any:
    """What is assigned to a tensor of its shape."""
    src = args["src"]
    if src in reader.env and list(src.meta["val"].shape) == list(node.meta["val"].shape):
        return reader.dynamic(src, place)
    return _filled(reader, node, {"value": src}, place) if src in reader.values else None


def _filled(reader: Reader, node: Any, args: Args, place: str) -> Any:
    """A number, or an array, for each entry of a tensor."""
    value, sizes = args["value"], node.meta["val"].shape[1:]
    number = reader.values.get(value, torch.tensor(value) if not hasattr(value, "meta") else None)
    if number is None or not all(isinstance(s, int) for s in sizes):
        return None
    number = number.reshape([1] * (len(sizes) + 1 - number.ndim) + list(number.shape))
    if number.shape[0] != 1:
        return None
    reader.values[node] = number.to(node.meta["val"].dtype).expand(1, *sizes).contiguous()
    reader.sources[node] = reader.sources.get(value, frozenset())
    return reader.values[node]


def _stack(reader: Reader, node: Any, args: Args, place: str) -> Any:
    dim = args["dim"] % len(node.meta["val"].shape)
    nodes = []
    for part in args["tensors"]:
        if part not in reader.env:
            reader.values[(node, part)] = reader.values[part].unsqueeze(dim)
            reader.sources[(node, part)] = reader.sources[part]
        else:
            value = reader.dynamic(part, place)
            sizes = value.sizes
            sizes.insert(dim, (1, False))
            reader.env[(node, part)] = reader.reshaped(value, sizes, place)
        nodes.append((node, part))
    if dim == 0:
        raise refuse(place, "it stacks in front of the batch")
    return joined_up(reader, nodes, dim, place)


def _expand(reader: Reader, node: Any, args: Args, place: str) -> Any:
    """Repeats axes of one entry. What meets another tensor repeats by itself."""
    value = reader.env[args["self"]]
    if not isinstance(value, Value):
        return None
    sizes = reader.shape(node)
    added = len(sizes) - len(value.axes)
    if added:
        raise refuse(place, "it adds an axis before the batch")
    return value


def _repeat(reader: Reader, node: Any, args: Args, place: str) -> Any:
    value = reader.dynamic(args["self"], place)
    counts = args["repeats"] if "repeats" in args else args["dims"]
    if len(counts) != len(value.axes) or not all(isinstance(n, int) for n in counts):
        return None
    for dim, count in enumerate(counts):
        if count != 1:
            value = reader.along([value] * count, reader.axis(value, dim, place), place)
    return value


def _index(reader: Reader, node: Any, args: Args, place: str) -> Any:
    """Entries by constant positions along one axis."""
    value = reader.dynamic(args["self"], place)
    found = args["indices"] if "indices" in args else [None] * args["dim"] + [args["index"]]
    dims = [i for i, x in enumerate(found) if x is not None]
    at = reader.values.get(found[dims[0]]) if len(dims) == 1 else None
    if at is None or at.ndim != 1 or at.dtype == torch.bool or not 0 < len(at) <= _MOST:
        raise refuse(place, f"it takes entries by other indices than at most {_MOST} constant ones "
                     "along one axis")  # fmt: skip
    return reader.entries(value, dims[0], at, place)


_MOST = 64  # entries that are cut one by one


def _roll(reader: Reader, node: Any, args: Args, place: str) -> Any:
    value = reader.dynamic(args["self"], place)
    if not args["dims"]:
        return None
    for shift, dim in zip(args["shifts"], args["dims"], strict=True):
        axis = reader.axis(value, dim, place)
        size = value.shape[axis] or 1
        reader.rolls |= abs(shift) > 2
        if at := -shift if abs(shift) < size else -shift % size:  # from the end, or the start
            ends = [reader.cut(value, dim, a, b, place) for a, b in ((at, None), (0, at))]
            value = reader.along(ends, axis, place)
    return value


def _flip(reader: Reader, node: Any, args: Args, place: str) -> Any:
    value = reader.dynamic(args["self"], place)
    for dim in args["dims"]:
        axis = reader.axis(value, dim, place)
        value = reader.emit("Flip", {"dim": axis}, [value], place, value.shape, value.axes)
    return value


_PADS = {"constant": "ConstantPad", "reflect": "ReflectionPad", "replicate": "ReplicationPad",
         "circular": "CircularPad"}  # fmt: skip


def _pad(reader: Reader, node: Any, args: Args, place: str) -> Any:
    value = reader.dynamic(args["self"], place)
    pads = list(args["pad"])
    if not all(isinstance(p, int) for p in pads):
        return None
    while pads and pads[-2:] == [0, 0]:
        del pads[-2:]
    if not pads:
        return value
    count, fill = len(pads) // 2, args.get("value") or 0
    kind = _PADS.get(args.get("mode", "constant"))
    value = reader.plain(value, place)
    if kind is None or count >= len(value.shape) or count > 3:
        raise refuse(place, f"it pads {count} axes with mode={args.get('mode')!r}")
    rank = len(value.shape)
    spatial = rank - 2
    if count > spatial or not 1 <= spatial <= 3:  # an axis of one entry stands for the channels
        value = reader.reshaped(value, [(1, True), (1, False), *value.sizes[1:]], place)
        spatial = rank - 1
        if spatial > 3:
            raise refuse(place, f"it pads {count} axes of a tensor of rank {rank}")
    pads += [0] * (2 * spatial - len(pads))
    kind = "ZeroPad" if kind == "ConstantPad" and fill == 0 else kind
    settings: Args = {"padding": tuple(pads)}
    settings |= {"value": fill} if kind == "ConstantPad" else {}
    shape = list(value.shape)
    for i in range(spatial):
        shape[-1 - i] = (shape[-1 - i] or 0) + pads[2 * i] + pads[2 * i + 1]
    value = reader.emit(f"{kind}{spatial}d", settings, [value], place, shape)
    return reader.reshaped(value, reader.shape(node), place)


def _upsample(reader: Reader, node: Any, args: Args, place: str) -> Any:
    value = reader.plain(reader.dynamic(args["input"], place), place)
    mode = name_of(node).removeprefix("upsample_").removesuffix("_exact")
    mode = {"nearest": "nearest", "linear": "linear", "bilinear": "bilinear",
            "trilinear": "trilinear", "bicubic": "bicubic"}[mode.rstrip("123d")]  # fmt: skip
    if name_of(node).endswith("exact"):
        mode = "nearest-exact"
    scales = args.get("scale_factors")
    settings = {"mode": mode, "align_corners": args.get("align_corners"), "size": None,
                "scale_factor": None}  # fmt: skip
    if scales is not None:
        settings["scale_factor"] = tuple(float(s) for s in scales)
    else:
        settings["size"] = tuple(args["output_size"])
    if mode.startswith("nearest"):
        settings["align_corners"] = None
    shape = [None if b else n for n, b in reader.shape(node)]
    return reader.emit("Upsample", settings, [value], place, shape)


_SAME = ("clone", "contiguous", "alias", "detach", "lift_fresh_copy", "lift_fresh", "dropout",
         "feature_dropout", "alpha_dropout")  # fmt: skip
_RESHAPES = ("view", "reshape", "_unsafe_view", "unsqueeze", "squeeze", "flatten", "unflatten",
             "_reshape_copy")  # fmt: skip

Function = Callable[[Reader, Any, Args, str], Any]
OPERATIONS: dict[str, Function] = {
    **dict.fromkeys(_SAME, _same),
    **dict.fromkeys(_RESHAPES, _view),
    "permute": _permute,
    "transpose": _permute,
    "t": _permute,
    "slice": _slice,
    "select": _select,
    "split": _parts,
    "split_with_sizes": _parts,
    "chunk": _parts,
    "tensor_split": _parts,
    "unbind": _unbind,
    "cat": _cat,
    "slice_scatter": _assigned,
    "select_scatter": _assigned,
    "copy": _copied,
    "fill": _filled,
    "stack": _stack,
    "expand": _expand,
    "repeat": _repeat,
    "tile": _repeat,
    "index": _index,
    "index_select": _index,
    "roll": _roll,
    "flip": _flip,
    "pad": _pad,
    "constant_pad_nd": _pad,
    **{f"upsample_{m}{d}d": _upsample for m, d in (
        ("nearest", 1), ("nearest", 2), ("nearest", 3), ("linear", 1), ("bilinear", 2),
        ("trilinear", 3), ("bicubic", 2))},
}  # fmt: skip
ANY_SIZE = {*_SAME, "unsqueeze", "squeeze", "flatten", "permute", "transpose", "t", "cat", "stack",
            "flip"}  # fmt: skip
