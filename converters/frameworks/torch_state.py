"""What a forward may change of a torch module, so that it can be undone; the order of its state."""

from collections.abc import Sequence
from typing import Any

import torch

from fwt.converters.frameworks import kept

# What is kept in attributes, and of each tensor its memory and a copy.
Held = tuple[kept.Held, list[tuple[Any, Any, Any]]]


def held(module: Any) -> Held:
    """The attributes of a module, and a copy of each of its tensors."""
    found: dict[int, Any] = {id(v): v for v in (*module.parameters(False), *module.buffers(False))}

    def look(value: Any) -> None:
        if isinstance(value, torch.Tensor) and value.layout == torch.strided:
            found[id(value)] = value

    own = kept.held(module, look)
    lazy = torch.nn.parameter.is_lazy
    return own, [(v, v.detach(), v.detach().clone()) for v in found.values()
                 if not lazy(v) and not v.is_inference()]  # fmt: skip


def put_back(module: Any, before: Held) -> list[str]:
    """Undoes what a forward changed; leaves the names of the numbers among it."""
    own, tensors = before
    with torch.no_grad():
        for tensor, memory, value in tensors:
            if tensor.data_ptr() != memory.data_ptr():
                tensor.data = memory
            if not torch.equal(memory, value):
                memory.copy_(value)
    return kept.put_back(module, own)


def in_order(model: torch.nn.Module, names: Sequence[str]) -> torch.nn.Module:
    """The module with its state dict in the order of these names."""
    first: dict[str, int] = {}
    for index, name in enumerate(names):
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            first.setdefault(".".join(parts[:end]), index)
    for prefix, module in model.named_modules():
        inside = f"{prefix}." if prefix else ""
        for own in (module._parameters, module._buffers, module._modules):
            found: Any = sorted(own.items(), key=lambda e: first.get(inside + e[0], len(first)))
            own.clear()
            own.update(found)
    return model
