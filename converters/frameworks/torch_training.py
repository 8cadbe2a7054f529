"""``hold``: a transform after each step of a torch optimizer."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from fwt._types import ConversionError
from fwt.converters.frameworks.repeated import Repeated

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def hold(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, t: Any, every: int = 1
) -> torch.utils.hooks.RemovableHandle:
    """Runs a transform on a torch module after each step of its optimizer.

    It is a hook of the optimizer, so that closures, parameter groups and
    ``torch.amp.GradScaler`` work as without it; a step that the scaler skips is none. Masks
    (:func:`fwt.apply_masks`) are applied in place, without a copy. Other transforms run in JAX, as
    in :func:`transform`.

    Args:
        model: the module; or what runs it, such as DistributedDataParallel or ``torch.compile``.
        optimizer: the optimizer of its parameters.
        t: any transform, which is tried on the weights at once, without writing; or an optax
            transformation around ``optax.set_to_zero()`` that is made by ``fwt.optim.sparsify`` or
            ``constrain``, for schedules of sparsity and dynamic sparse training: it counts its runs
            as updates, and gets the gradients of the step. Its state lasts as long as the handle:
            to go on after a checkpoint, give ``masks=fwt.masks_of``, and a schedule that begins
            where the last one was, ``lambda n: schedule(n + 500)``.
        every: how many steps there are from one run to the next.

    Returns:
        A handle: ``handle.remove()`` ends it. It is a context manager too.

    Raises:
        FwtError: what the transform says of these weights, at once; nothing is written then.
        ConversionError: if the optimizer has none of the model's parameters.

    Example:
        >>> import fwt, torch
        >>> net = torch.nn.Linear(4, 2)
        >>> sgd = torch.optim.SGD(net.parameters(), 0.1)
        >>> masks = fwt.masks(0.5)(net)
        >>> handle = hold(net, sgd, fwt.apply_masks(masks))
        >>> net(torch.ones(3, 4)).sum().backward()
        >>> sgd.step()
        >>> int((net.weight == 0).sum())
        4
        >>> handle.remove()
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"hold takes a torch optimizer, found {type(optimizer).__name__}")
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise TypeError(f"hold: every must be a whole number of steps from 1 on, found {every!r}")
    run = Repeated(model, t, "hold", zeroing)
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in known for p in model.parameters()):
        raise ConversionError(
            "hold: the optimizer has none of the model's parameters: give the one that trains it"
        )
    steps = 0

    def after(*_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps % every == 0:
            run()

    return optimizer.register_step_post_hook(after)


def zeroing(pairs: Sequence[tuple[Any, np.ndarray]]) -> Callable[[], None]:
    """Sets the entries of tensors to +0.0 whose mask is False, and leaves all others as they are.

    A product with zeros would leave NaN and -0.0; zeros in all bits are +0.0.
    """
    held = [(tensor, torch.from_numpy(np.where(kept, -1, 0))) for tensor, kept in pairs]

    def run() -> None:
        for i, (variable, kept) in enumerate(held):
            tensor = getattr(variable, "value", variable).data  # of a variable of Keras
            bits = _BITS[tensor.element_size()]
            if kept.device != tensor.device or kept.dtype != bits:  # at first, and when it moves
                kept = kept.to(tensor.device, bits)
                held[i] = variable, kept
            tensor.view(bits).bitwise_and_(kept)

    return run
