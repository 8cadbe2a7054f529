"""torch modules that only run another one, and those that run several in order."""

import contextlib
import io
from collections import OrderedDict
from typing import Any

import torch

from fwt._types import ConversionError

_WRAPPERS = {
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.optim.swa_utils.AveragedModel": "module",
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",  # which is imported late
}


def _held(model: Any) -> str | None:
    """The name of the module in what only runs it."""
    return _WRAPPERS.get(f"{type(model).__module__}.{type(model).__qualname__}")


def unwrapped(model: Any, place: str = "model") -> Any:
    """The module in what only runs it: DataParallel, torch.compile, an average of weights."""
    while name := _held(model):
        if model._forward_hooks or model._forward_pre_hooks:
            where = "" if place == "model" else f"{place}: "
            raise ConversionError(
                f"{where}{type(model).__name__} has forward hooks, which can change what it does: "
                f"remove them, or give the module inside, {place}.{name}"
            )
        model = getattr(model, name)
    return model


def names(model: Any) -> dict[str, str | None]:
    """What torch names otherwise than its modules without what only runs them.

    By its name in the state dict, the name that an array has without; None for what such a wrapper
    has itself, as the number of averages.
    """
    out: dict[str, str | None] = {}

    def under(module: Any, full: str, inner: str, above: tuple[int, ...] = ()) -> None:
        while name := _held(module):
            out.update({full + own: None for own in module._buffers})
            full, module = f"{full}{name}.", getattr(module, name)
        if id(module) in above:
            return
        arrays = (*module._parameters.keys(), *module._buffers.keys())  # a scripted one has no iter
        out.update({full + own: inner + own for own in arrays})
        for name, child in module._modules.items():
            if child is not None:
                under(child, f"{full}{name}.", f"{inner}{name}.", (*above, id(module)))

    under(model, "", "")
    return {full: inner for full, inner in out.items() if full != inner}


def plain(model: Any) -> Any:
    """A model, and what its Sequentials hold, without what only runs a module."""
    model = unwrapped(model)
    hooks = model._forward_hooks or model._forward_pre_hooks
    if hooks or not isinstance(model, torch.nn.Sequential) or not is_container(model):
        return model
    parts = OrderedDict((name, plain(m)) for name, m in model._modules.items())
    if all(parts[name] is m for name, m in model._modules.items()):
        return model
    made = torch.nn.Sequential(parts)
    made.training = model.training
    return made


def is_container(module: torch.nn.Module) -> bool:
    """A Sequential, whatever its class, or a list of modules, which is used in order."""
    if isinstance(module, torch.nn.Sequential):
        return type(module).forward is torch.nn.Sequential.forward
    return type(module) is torch.nn.ModuleList


def quiet(model: Any) -> Any:
    """A context for a call that may fail, in which a graph does not print where it did."""
    graph = isinstance(model, torch.fx.GraphModule)
    return contextlib.redirect_stderr(io.StringIO()) if graph else contextlib.nullcontext()
