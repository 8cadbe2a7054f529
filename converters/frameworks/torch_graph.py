"""Nets of torch layers as an ``fx.GraphModule`` of torch.nn modules, which needs no fwt."""

import keyword
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fwt._graph import names_in, unfit
from fwt._types import ConversionError
from fwt.converters.rows.row import Layer, parts_of, refuse
from fwt.converters.walk.net import Net

_PAIRS = {"Add": operator.add, "Subtract": operator.sub, "Multiply": operator.mul,
          "Divide": operator.truediv, "Average": operator.add, "Maximum": torch.maximum,
          "Minimum": torch.minimum, "MatMul": torch.matmul}  # fmt: skip


def graph_module(
    net: Net, built: Callable[[Layer], torch.nn.Module], tensor: Callable[[Any], torch.Tensor]
) -> torch.fx.GraphModule:
    """The module that runs a net; its parameters have the paths of their layers."""
    root, graph = torch.nn.Module(), torch.fx.Graph()
    taken: set[str] = set()
    refs: dict[str, Any] = {}
    labels = net.takes if isinstance(net.takes, Mapping) else names_in(net.takes)
    for name, wanted in zip(names_in(net.takes), labels, strict=True):
        label = _identifier(wanted, taken)
        refs[name] = graph.placeholder(label)
        refs[name].meta["shape"] = net.inputs[name]
        _check_sizes(graph, refs[name], name, net.fixed.get(name, ()))
    if isinstance(net.takes, Mapping) and list(net.takes) != [n.name for n in refs.values()]:
        raise ConversionError(
            f"the inputs {', '.join(net.takes)} are keys that torch can't have as arguments of "
            f"forward; those of the graph are {', '.join(net.inputs)}"
        )
    for layer in net.layers:
        given = [refs[i] for i in layer.inputs]
        refs[layer.name] = _node(graph, root, layer, given, built, tensor)
        refs[layer.name].meta["shape"] = layer.shape
        # An array of the model, and what is made of such alone, stands for each example.
        if all("alone" in node.meta for node in given):
            refs[layer.name].meta["alone"] = True
    if isinstance(net.outputs, str):
        graph.output(refs[net.outputs])
    elif isinstance(net.outputs, Mapping):
        graph.output({key: refs[name] for key, name in net.outputs.items()})
    else:
        graph.output(tuple(refs[name] for name in net.outputs))
    graph.lint()
    made = torch.fx.GraphModule(root, graph)
    for path, module in root.named_modules():  # what a GraphModule leaves out or forgets
        parts = path.split(".") if path else []
        holder = _holder(made, parts) if module._parameters or module._buffers else made
        for name, parameter in module._parameters.items():
            if name not in holder._parameters:
                holder.register_parameter(name, parameter)
        holder._non_persistent_buffers_set |= module._non_persistent_buffers_set & {
            *holder._buffers
        }
    return made


def _check_sizes(graph: Any, x: Any, name: str, sizes: Sequence[int | None]) -> None:
    """Refuses an input of other sizes than those that are fixed."""
    for axis, size in enumerate(sizes, 1):
        if size is not None:
            same = graph.call_function(
                operator.eq, (graph.call_method("size", (x, axis)), size))  # fmt: skip
            graph.call_function(torch._assert, (same, unfit(name, (), sizes, axis - 1)))


def _node(
    graph: Any,
    root: torch.nn.Module,
    layer: Layer,
    given: list[Any],
    built: Callable[[Layer], torch.nn.Module],
    tensor: Callable[[Any], torch.Tensor],
) -> Any:
    """What a layer gives, as a node of the graph."""
    kind, told = layer.kind, layer.settings
    if kind in _PAIRS:
        node = given[0]
        for other in given[1:]:
            node = graph.call_function(_PAIRS[kind], (node, other))
        return graph.call_function(operator.truediv, (node, len(given))) if kind == "Average" else (
            node
        )  # fmt: skip
    if kind == "Masked":
        keep = graph.call_method("bool", (given[1],))
        return graph.call_function(torch.where, (keep, given[0], 0))
    if kind == "Concatenate":
        arrays = ["alone" in n.meta for n in given]
        if any(arrays) and not all(arrays):
            batch = graph.call_method("size", (given[arrays.index(False)], 0))
            rest = [-1] * (len(layer.shape or ()))
            given = [graph.call_method("expand", (n, batch, *rest)) if own else n
                     for n, own in zip(given, arrays, strict=True)]  # fmt: skip
        return graph.call_function(torch.cat, (list(given), told["dim"]))
    if kind == "DotProductAttention":
        attend = torch.nn.functional.scaled_dot_product_attention
        usual = {"is_causal": False, "scale": None, "enable_gqa": False}
        return graph.call_function(attend, tuple(given), {
            k: v for k, v in told.items() if v != usual[k]})  # fmt: skip
    if kind == "Einsum":
        return graph.call_function(torch.einsum, (told["equation"], *given))
    if kind in ("Attention", "AdditiveAttention"):
        return _scored(graph, root, layer, given, tensor)
    if kind == "Permute":
        return graph.call_method("permute", (given[0], *told["dims"]))
    if kind == "Flip":
        return graph.call_method("flip", (given[0], told["dim"]))
    if kind == "Slice":
        start, stop, step = told["start"], told["stop"], told["step"]
        size = (None, *(given[0].meta.get("shape") or ()))[told["dim"]]
        if step == 1 and stop is not None and 0 <= start < stop <= (size or 0):
            return graph.call_method("narrow", (given[0], told["dim"], start, stop - start))
        cut = slice(start or None, stop, None if step == 1 else step)
        index = (*[slice(None)] * told["dim"], cut) if told["dim"] >= 0 else (Ellipsis, cut)
        return graph.call_function(operator.getitem, (given[0], index))
    if kind == "Rescaling":
        return _rescaled(graph, root, layer, given[0])
    if kind in ("Indexed", "IndexedBuffer"):
        (index,) = layer.arrays.values()
        held = "Parameter" if kind == "Indexed" else "PersistentBuffer"
        whole = _array(graph, root, parts_of(layer.name), tensor(told["table"]), kind=held)
        parts = [*parts_of(layer.name)[:-1], f"{parts_of(layer.name)[-1]}__index"]
        at = _array(graph, root, parts, tensor(index).long(), kind="Constant")
        flat = graph.call_method("reshape", (whole, -1))
        return graph.call_function(operator.getitem, (flat, at))
    if kind in ("Parameter", "PersistentBuffer", "Constant"):
        (value,) = layer.arrays.values()
        return _array(graph, root, parts_of(layer.name), tensor(value), kind=kind)
    if kind == "LayerScale":
        (value,) = layer.arrays.values()
        parts = [*parts_of(layer.name), "gamma"]
        shape = (-1, *[1] * (len(layer.shape or ()) - 1))
        gamma = _array(graph, root, parts, tensor(value), layer.of)
        return graph.call_function(operator.mul, (given[0], graph.call_method(
            "reshape", (gamma, shape))))  # fmt: skip
    path = ".".join(parts_of(layer.of or layer.name))
    if kind == "Lookup":
        _alias(root, layer, given[0])
        return graph.call_function(torch.nn.functional.embedding, (given[1], given[0]))
    if kind == "Attend":
        _alias(root, layer, given[1])
        return graph.call_function(torch.nn.functional.linear, (given[0], given[1]))
    if kind in ("SelfAttention", "CausalSelfAttention", "MultiheadAttention"):
        if not layer.of:
            _put(root, parts_of(layer.name), _attention(built(layer)))
        query, key, value = given[0], given[min(1, len(given) - 1)], given[-1]
        more: dict[str, Any] = {"need_weights": False}
        if kind == "CausalSelfAttention":
            parts = parts_of(f"{layer.name}__mask")
            more["attn_mask"] = _array(graph, root, parts, _later(layer, query, key),
                                       kind="Constant")  # fmt: skip
        node = graph.call_module(path, (query, key, value), more)
        return graph.call_function(operator.getitem, (node, 0))
    if not layer.of:
        _put(root, parts_of(layer.name), built(layer))
    return graph.call_module(path, tuple(given))


def _later(layer: Layer, query: Any, key: Any) -> torch.Tensor:
    """What hides the later steps, added to scores."""
    sizes = [(n.meta.get("shape") or (None,))[0] for n in (query, key)]
    if None in sizes:
        raise refuse(str(layer), "torch needs the number of steps for its causal mask",
                     "give input_shape=")  # fmt: skip
    return torch.full([n for n in sizes if n], -torch.inf).triu(1)


def _scored(
    graph: Any, root: torch.nn.Module, layer: Layer, given: Sequence[Any], tensor: Any
) -> Any:
    """Attention of one head without projections."""
    told, parts = layer.settings, parts_of(layer.name)
    query, key, value = given[0], given[1], given[-1]

    def times(name: str, x: Any) -> Any:
        if name not in layer.arrays:
            return x
        array = _array(graph, root, [*parts, name], tensor(layer.arrays[name]), layer.of)
        return graph.call_function(operator.mul, (x, array))

    if told.get("mode") == "dot":
        turned = graph.call_method("transpose", (key, 1, 2))
        scores = times("scale", graph.call_function(torch.matmul, (query, turned)))
    else:
        pair = [graph.call_method("unsqueeze", x) for x in ((query, 2), (key, 1))]
        both = graph.call_function(operator.add, tuple(pair))
        concat = told.get("mode") == "concat"
        both = graph.call_function(torch.tanh, (times("scale", both) if concat else both,))
        both = both if concat else times("scale", both)
        scores = times("concat_score_weight", graph.call_method("sum", (both, -1)))
    if told["causal"]:
        mask = _array(graph, root, [*parts_of(f"{layer.name}__mask")], _later(layer, query, key),
                      kind="Constant")  # fmt: skip
        scores = graph.call_function(operator.add, (scores, mask))
    weights = graph.call_function(torch.softmax, (scores, -1))
    return graph.call_function(torch.matmul, (weights, value))


def _attention(module: torch.nn.Module) -> torch.nn.Module:
    """Torch's own class in place of the subclass that fits a Sequential."""
    module.__class__ = torch.nn.MultiheadAttention
    return module


def _alias(root: torch.nn.Module, layer: Layer, table: Any) -> None:
    """A layer that shares a table has it under its own name too."""
    if table.op != "get_attr":  # what is made of one
        return
    *inside, name = table.target.split(".")
    weight = _holder(root, inside)._parameters[name]
    if "__" in parts_of(layer.name)[-1]:  # a further call, or an operation that is no module
        return
    holder = _holder(root, parts_of(layer.name))
    if "weight" not in holder._parameters:
        holder.register_parameter("weight", weight)


def _array(
    graph: Any,
    root: torch.nn.Module,
    parts: Sequence[str],
    value: torch.Tensor,
    of: str = "",
    kind: str = "Parameter",
) -> Any:
    if of:
        return graph.get_attr(".".join([*parts_of(of), parts[-1]]))
    holder = _holder(root, parts[:-1])
    if kind == "Parameter":
        holder.register_parameter(parts[-1], torch.nn.Parameter(value, value.is_floating_point()))
    else:
        holder.register_buffer(parts[-1], value, persistent=kind == "PersistentBuffer")
    return graph.get_attr(".".join(parts))


def _rescaled(graph: Any, root: torch.nn.Module, layer: Layer, x: Any) -> Any:
    """X times a number plus a number, or one for each channel."""
    for name, function, idle in (("scale", operator.mul, 1), ("offset", operator.add, 0)):
        value = layer.settings.get(name, idle)
        if isinstance(value, list | tuple):
            parts = [*parts_of(layer.name), name]
            holder = _holder(root, parts[:-1])
            told = torch.tensor(value).reshape(-1, *[1] * (len(layer.shape or ()) - 1))
            holder.register_buffer(name, told, persistent=False)
            x = graph.call_function(function, (x, graph.get_attr(".".join(parts))))
        elif value != idle:
            x = graph.call_function(function, (x, value))
    return x


def _holder(root: torch.nn.Module, parts: Sequence[str]) -> torch.nn.Module:
    at = root
    for part in parts:
        _check_name(part)
        if part not in at._modules:
            at.add_module(part, torch.nn.Module())
        found = at._modules[part]
        assert found is not None
        at = found
    return at


def _put(root: torch.nn.Module, parts: Sequence[str], module: torch.nn.Module) -> None:
    holder, name = _holder(root, parts[:-1]), parts[-1]
    _check_name(name)
    before = holder._modules.get(name)
    if before is not None:  # what was put into it earlier
        for key, child in before._modules.items():
            module.add_module(key, child)
    holder._modules[name] = module


def _check_name(name: str) -> None:
    if not name or "." in name or name in dir(torch.nn.Module) or keyword.iskeyword(name):
        raise ConversionError(
            f"{name!r} can't be the name of a torch module: give the layer another"
        )


def _identifier(name: str, taken: set[str]) -> str:
    label = re.sub(r"\W", "_", name)
    label = f"_{label}" if label[:1].isdigit() else label or "x"
    while label in taken:
        label += "_"
    taken.add(label)
    return label
