"""``hold``: a transform after each step of a torch optimizer."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fwt._types import ConversionError
from fwt.converters.frameworks.repeated import Repeated

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def hold(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, t: Any, every: int = 1
) -> "Held":
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
            as updates, and gets the gradients of the step.
        every: how many steps there are from one run to the next.

    Returns:
        A handle: ``handle.remove()`` ends it. It is a context manager too. Its ``state_dict()``,
        tensors and a number, goes into a checkpoint beside that of the optimizer; after both were
        loaded, ``hold(...).load_state_dict(state)`` goes on where that one was.

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
        raise TypeError(
            "hold takes a torch optimizer after the model, hold(model, optimizer, t), found "
            f"{type(optimizer).__name__}"
        )
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise TypeError(f"hold: every must be a whole number of steps from 1 on, found {every!r}")
    run = Repeated(model, t, "hold", zeroing)
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in known for p in model.parameters()):
        raise ConversionError(
            "hold: the optimizer has none of the model's parameters: give the one that trains it"
        )
    return Held(optimizer, run, every)


class Held:
    """What :func:`hold` gives: it runs after each step until it is removed."""

    def __init__(self, optimizer: torch.optim.Optimizer, run: Repeated, every: int) -> None:
        self._run, self._every, self._steps = run, every, 0
        self._handle = optimizer.register_step_post_hook(self._after)

    def _after(self, *_: Any) -> None:
        self._steps += 1
        if self._steps % self._every == 0:
            self._run()

    def remove(self) -> None:
        """Ends it."""
        self._handle.remove()

    def __enter__(self) -> "Held":
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()

    def state_dict(self) -> dict[str, Any]:
        """How many steps there were, and the state of an optax transformation, as tensors that are
        copies; for ``torch.save``."""
        state = {name: torch.from_numpy(np.array(x)) for name, x in self._run.state().items()}
        return {"steps": self._steps, "state": state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where another was, which :meth:`state_dict` tells.

        Raises:
            ConversionError: if it is that of another transformation, or of another model.
        """
        self._run.restore({n: x.detach().cpu().numpy() for n, x in state["state"].items()})
        self._steps = int(state["steps"])


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
