"""Calls of modules that have a row: each stays one layer, put together again from the operations
that torch.export made of it."""

import operator
from typing import Any

import torch
import torch.nn.utils.parametrize

from fwt._types import ConversionError
from fwt.converters.frameworks.torch_layer import class_of, layer_of
from fwt.converters.frameworks.torch_layers import RECURRENT
from fwt.converters.frameworks.torch_operations import call
from fwt.converters.frameworks.torch_values import (
    Reader,
    States,
    arguments,
    is_size,
    name_of,
)
from fwt.converters.rows import table
from fwt.converters.rows.row import Layer, joined, parts_of, refuse
from fwt.converters.walk.tensors import Value

_OPERATION = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_CAUSAL = "causal"  # a mask that hides what comes later
_TIMED = (*RECURRENT, "MultiheadAttention", "TransformerEncoderLayer")


def check_hooks(module: torch.nn.Module, model: torch.nn.Module) -> None:
    """Raises for a hook on a layer, which stays one whatever a hook makes of what it gives."""
    if not _is_layer(module) or torch.nn.utils.parametrize.is_parametrized(module):
        return
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    own = [h for h in hooks if not type(h).__module__.startswith("torch.nn.utils")]
    if own:
        name = next((n for n, m in model.named_modules() if m is module), "")
        raise ConversionError(f"{joined(name.split('.'))} ({type(module).__name__}) has a forward "
                              "hook, which can change what it does: remove it")  # fmt: skip


def _is_layer(module: torch.nn.Module) -> bool:
    cls: Any = type(module)
    if torch.nn.utils.parametrize.is_parametrized(module):
        cls = cls.__bases__[0]
    name: str = cls.__name__
    return class_of(name) is cls and bool(table.rows_of("torch", name))


def in_layer(model: torch.nn.Module, node: Any) -> bool:
    """Whether an operation is in a module that has a row."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [p.split("@")[0] for k, (p, _) in stack.items() if p and not k.startswith("_empty")]
    return any(_is_layer(model.get_submodule(path)) for path in paths)


Key = tuple[str, str]  # the path of a module, and which of its calls


class Calls:
    """Which operations belong to which call of a module, found before they are read."""

    def __init__(self, reader: Reader, nodes: list[Any]):
        self.reader, self.nodes = reader, nodes
        self.opened: set[Key] = set()  # calls that no row can say, so that their parts are read
        self.done: set[Key] = set()
        self.first: dict[int, str] = {}  # by module, the layer that is its first call
        self.groups = self._grouped()

    def _key(self, node: Any) -> Key | None:
        """The outermost call of a layer that an operation is in."""
        for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
            if key.startswith("_empty") or not path:
                continue
            found = path.split("@")[0], key.partition("@")[2]
            if found not in self.opened and _is_layer(self.reader.model.get_submodule(found[0])):
                return found
        return None

    def _grouped(self) -> dict[Key, list[Any]]:
        groups: dict[Key, list[Any]] = {}
        for node in self.nodes:
            if node.op == "call_function" and (key := self._key(node)):
                groups.setdefault(key, []).append(node)
        return groups

    def taken(self, node: Any) -> bool:
        """Whether an operation is in the call of a layer, which is read at the first of them."""
        while key := self._key(node):
            if key in self.done:
                return True
            if _Call(self, key, self.groups[key]).read():
                self.done.add(key)
                return True
            self.opened.add(key)
            self.groups = self._grouped()
        return False


class _Call:
    """One call of a module that has a row."""

    def __init__(self, calls: Calls, key: Key, group: list[Any]):
        self.reader, self.first, self.group = calls.reader, calls.first, group
        self.module: Any = self.reader.model.get_submodule(key[0])
        self.name = joined(key[0].split("."))
        own = set(group)
        around = [a for n in group for a in n.all_input_nodes if a not in own]
        self.given = list(dict.fromkeys(a for a in around if a in self.reader.env))
        held = {f"{key[0]}.{n}" for n in self.module.state_dict(keep_vars=True)}
        held = {self.reader.canonical(path) for path in held}
        self.constants = [
            a for a in around if (a in self.reader.values and not self.reader.sources[a] <= held)
            or (a in self.reader.values and not self.reader.sources[a])
        ]  # fmt: skip
        self.ends = [n for n in group if any(u not in own for u in n.users)]

    def read(self) -> bool:
        if not self.given:  # an Embedding of positions, say
            for node in self.group:
                if not is_size(node):
                    self.reader.fold(node)
            return True
        layer = layer_of(self.name, self.module)
        if layer.kind in ("Embedding", "Linear") and self._shared():
            return self._of_table(layer)
        if layer.kind in RECURRENT:
            return self._recurrent(layer)
        if layer.kind == "MultiheadAttention":
            return self._attention(layer)
        ends = [n for n in self.ends if not is_size(n)]
        if len(self.given) != 1 or self.constants or len(ends) != 1 or self._is_resized():
            return False
        value = self._in_order(layer, self.reader.dynamic(self.given[0], str(layer)))
        shape = self.reader.shape(ends[0])
        if self._is_time_first(layer):
            shape[:2] = reversed(shape[:2])
        made = call(self.reader, layer.kind, layer.settings, value, self.name, shape, layer.arrays)
        self._named(layer)
        self.reader.env[ends[0]] = self._back(layer, made)
        return True

    def _is_resized(self) -> bool:
        """Whether a transposed convolution was called with a size of its output."""
        told = [arguments(n)["output_padding"] for n in self.group
                if name_of(n).startswith("conv_transpose")]  # fmt: skip
        return any(tuple(n) != tuple(self.module.output_padding) for n in told)

    def _named(self, layer: Layer) -> None:
        """Says of the layer just read what arrays it has, and whether it was called before."""
        made = self.reader.layers[-1]
        first = self.first.setdefault(id(self.module), made.name)
        made.of = first if first != made.name and made.arrays else ""
        other = next((x for x in self.reader.layers if x.name == made.of), made)
        if other.kind != made.kind:
            raise refuse(str(layer), f"{first} calls it as {other.kind}, and another call as "
                         f"{made.kind}", "give each call a module of its own")  # fmt: skip
        paths = (f"{'.'.join(parts_of(self.name))}.{n}" for n in self.module.state_dict())
        self.reader.paths[made.name] = frozenset(map(self.reader.canonical, paths))

    # -- batch and time ------------------------------------------------------------------------

    def _is_time_first(self, layer: Layer) -> bool:
        part = getattr(self.module, "self_attn", self.module)
        return layer.kind in _TIMED and not part.batch_first

    def _in_order(self, layer: Layer, value: Value) -> Value:
        """The value with the batch first, whatever the layer takes."""
        if self._is_time_first(layer):
            if len(value.axes) != 3 or value.axes[1] != (0,):
                raise refuse(str(layer), "it takes the time first and the batch second, found the "
                             "batch elsewhere", "make it with batch_first=True")  # fmt: skip
            value = _swapped(value)
        if "batch_first" in layer.settings:
            layer.settings["batch_first"] = True
        return value

    def _back(self, layer: Layer, value: Value) -> Value:
        return _swapped(value) if self._is_time_first(layer) else value

    # -- a table that several layers share ------------------------------------------------------

    def _shared(self) -> bool:
        """Whether another module has the same weight, or another operation takes an array of it."""
        path = ".".join(parts_of(self.name))
        held = {self.reader.canonical(f"{path}.{n}") for n in self.module.state_dict()}
        if held & self.reader.shared:
            return True
        weight = self.module.weight
        return sum(p is weight for _, p in _every_parameter(self.reader.model)) > 1

    def _of_table(self, layer: Layer) -> bool:
        reader, place = self.reader, str(layer)
        (end,) = [n for n in self.ends if not is_size(n)]
        path = f"{'.'.join(parts_of(self.name))}.weight"
        node = next(a for n in self.group for a in n.all_input_nodes
                    if reader.sources.get(a) == frozenset([reader.canonical(path)]))  # fmt: skip
        table = reader.between(node, lambda value: value, place)
        value = reader.dynamic(self.given[0], place)
        if layer.kind == "Embedding":
            value = reader.plain(value, place)
            if len(value.shape) != 2:
                raise refuse(place, "it shares its weight with another layer, and takes a tensor "
                             f"of rank {len(value.shape)}, expected 2")  # fmt: skip
            shape = (*value.shape, self.module.embedding_dim)
            made = reader.emit("Lookup", {}, [table, value], self.name, shape)
        else:
            made = reader.attended(value, table, place, self.name)
            if self.module.bias is not None:
                own = frozenset([reader.canonical(path.removesuffix("weight") + "bias")])
                given = (a for n in self.group for a in n.all_input_nodes)
                bias = next(a for a in given if reader.sources.get(a) == own)
                other = reader.array(bias, made, place)
                made = reader.emit("Add", {}, [made, other], f"{self.name}__added", made.shape)
        reader.env[end] = made
        return True

    # -- layers that give or take several tensors ----------------------------------------------

    def _recurrent(self, layer: Layer) -> bool:
        node = next((n for n in self.group if name_of(n) in _OPERATION), None)
        states = node.args[1] if node is not None else None
        states = states if isinstance(states, list | tuple) else [states]
        own = set(self.group)
        if node is None or any(s not in own or name_of(s) != "zeros" for s in states):
            raise refuse(str(layer), "it takes states to begin with", "leave them out: they are 0")
        time = 0 if self._is_time_first(layer) else 1
        value = self.reader.plain(
            self._in_order(layer, self.reader.dynamic(node.args[0], str(layer))), str(layer)
        )
        width = node.meta["val"][0].shape[-1]
        made = self.reader.emit(layer.kind, layer.settings, [value], self.name,
                                (None, value.shape[1], width), arrays=layer.arrays)  # fmt: skip
        self._named(layer)
        sequence = self._back(layer, made)
        for end in (n for n in node.users if n.target is operator.getitem):
            if end.args[1] == 2 and end.users:
                raise refuse(str(layer), "it gives its cell states away, which no layer does")
            self.reader.env[end] = States(sequence, layer, time) if end.args[1] else sequence
        return True

    def _attention(self, layer: Layer) -> bool:
        roles = self._roles()
        ends = [n for n in self.ends if not is_size(n)]
        if roles is None or len(ends) != 1 or len(ends[0].meta["val"].shape) != 3:
            return False
        reader, place = self.reader, str(layer)
        values = [
            reader.plain(self._in_order(layer, reader.dynamic(n, place)), place) for n in roles[:3]
        ]
        same = values[0] == values[1] == values[2]
        values = values[:1] if same else values
        if roles[3] is not None:
            causal = roles[3] == _CAUSAL
            mask = None if causal else self._constant(roles[3])
            if not (causal or (mask is not None and _is_causal(mask))):
                return False
            layer.kind = "CausalSelfAttention"
        shape = (*values[0].shape[:2], self.module.embed_dim)
        made = reader.emit(layer.kind, layer.settings, values, self.name, shape,
                           arrays=layer.arrays)  # fmt: skip
        self._named(layer)
        reader.env[ends[0]] = self._back(layer, made)
        return True

    def _roles(self) -> tuple[Any, Any, Any, Any] | None:
        """What an attention takes as query, key and value, and the mask that it adds."""
        by = {name_of(n): n for n in self.group}
        if "scaled_dot_product_attention" in by:
            args = arguments(by["scaled_dot_product_attention"])
            found = [self._from(args[n]) for n in ("query", "key", "value")]
            mask = args["attn_mask"]
            if args["is_causal"]:
                mask = _CAUSAL
        elif "softmax" in by:
            scores = by["softmax"].args[0]
            while name_of(scores) not in ("bmm", "baddbmm"):
                scores = scores.all_input_nodes[0]
            *mask, query, key = scores.args[:3] if name_of(scores) == "baddbmm" else scores.args
            last = [n for n in self.group if name_of(n) == "bmm" and n is not scores]
            if len(last) != 1:
                return None
            found = [self._from(n) for n in (query, key, last[0].args[1])]
            mask = mask[0] if mask else None
        else:
            return None
        if any(len(x) != 1 for x in found):
            return None
        query, key, value = (next(iter(x)) for x in found)
        return query, key, value, mask

    def _constant(self, node: Any) -> torch.Tensor | None:
        """What a node in the call gives, if that does not follow from the input."""
        reader = self.reader
        if node in reader.env or self._from(node):
            return None
        if node not in reader.values:
            for part in node.all_input_nodes:
                if not is_size(part) and self._constant(part) is None:
                    return None
            reader.fold(node)
        return reader.values[node]

    def _from(self, node: Any) -> set[Any]:
        """What a node in the call follows from outside it."""
        if node in self.given:
            return {node}
        if node not in self.group:
            return set()
        return set().union(*map(self._from, node.all_input_nodes))


def _swapped(value: Value) -> Value:
    """Batch and time in the other order."""
    first, second, *rest = value.axes
    return Value(value.name, value.shape, (second, first, *rest))


def _every_parameter(model: torch.nn.Module) -> list[tuple[str, Any]]:
    """The parameters of each module, one that several have as often."""
    return [(n, p) for m in model.modules() for n, p in m._parameters.items()]


def _is_causal(mask: torch.Tensor) -> bool:
    """Whether a mask, added to the scores, hides what comes later and nothing else."""
    later = torch.full(mask.shape[-2:], -torch.inf).triu(1)
    return all(torch.equal(m, later) for m in mask.float().reshape(-1, *later.shape))
