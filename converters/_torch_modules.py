"""Small torch modules for what torch.nn lacks. They have no weights that need fwt to be read."""

from collections.abc import Sequence
from typing import Any

import torch


class Permute(torch.nn.Module):
    """Moves axes, ``x.permute(dims)``; torch.nn has no such layer."""

    def __init__(self, dims: Sequence[int]):
        super().__init__()
        self.dims = tuple(dims)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(self.dims)

    def extra_repr(self) -> str:
        return f"dims={self.dims}"


class RepeatVector(torch.nn.Module):
    """(n, c) -> (n, times, c)."""

    def __init__(self, times: int):
        super().__init__()
        self.times = times

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, None].expand(-1, self.times, -1)

    def extra_repr(self) -> str:
        return f"times={self.times}"


class Rescaling(torch.nn.Module):
    """x scale + offset; lists hold one for each entry of axis 1."""

    def __init__(self, scale: Any, offset: Any = 0.0):
        super().__init__()
        self.scale, self.offset = scale, offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def shaped(value: Any) -> Any:
            if not isinstance(value, list | tuple):
                return value
            tensor = torch.tensor(value, dtype=x.dtype, device=x.device)
            return tensor.reshape(-1, *[1] * (x.ndim - 2))

        return x * shaped(self.scale) + shaped(self.offset)

    def extra_repr(self) -> str:
        return f"scale={self.scale}, offset={self.offset}"


OURS = {c.__name__: c for c in (Permute, RepeatVector, Rescaling)}
