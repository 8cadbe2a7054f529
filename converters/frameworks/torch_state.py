"""What a forward may change of a torch module, so that it can be undone; the order of its state."""

from collections.abc import Sequence
from typing import Any

import torch

# Attributes, and of each tensor its memory and a copy.
Held = tuple[dict[str, Any], list[tuple[Any, Any, Any]]]


def held(module: Any) -> Held:
    """The attributes of a module, and a copy of each of its tensors."""
    own = {name: dict(v) if isinstance(v, dict) else list(v) if type(v) is list else v
           for name, v in vars(module).items()}  # fmt: skip
    tensors = [*module.parameters(False), *module.buffers(False)]
    tensors += [v for v in own.values() if isinstance(v, torch.Tensor)]
    lazy = torch.nn.parameter.is_lazy
    return own, [(v, v.detach(), v.detach().clone()) for v in tensors
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
    changed = []
    for name in [n for n in vars(module) if n not in own]:
        del vars(module)[name]
    for name, was in own.items():
        now = vars(module).get(name)
        if isinstance(now, dict) and isinstance(was, dict):
            if [*map(id, now.values())] != [*map(id, was.values())] or [*now] != [*was]:
                now.clear()
                now.update(was)
        elif type(now) is list and type(was) is list:
            if [*map(id, now)] != [*map(id, was)]:
                now[:] = was
        elif now is not was:
            if type(was) in (int, float) and now != was:
                changed.append(name)
            vars(module)[name] = was
    return changed


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
