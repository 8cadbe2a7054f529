"""Small torch modules for what torch.nn lacks. They have no weights that need fwt to be read."""

from collections.abc import Sequence
from typing import Any

import torch

from fwt._types import ConversionError


class Permute(torch.nn.Module):
    """Moves axes, ``x.permute(dims)``; torch.nn has no such layer."""

    def __init__(self, dims: Sequence[int]):
        super().__init__()
        self.dims = tuple(dims)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(self.dims)

    def extra_repr(self) -> str:
        return f"dims={self.dims}"


class EinsumDense(torch.nn.Module):
    """``torch.einsum(equation, x, weight)`` and a bias, as Keras has it; see fwt.layers."""

    def __init__(
        self,
        equation: str,
        output_shape: Sequence[int | None],
        weight_shape: Sequence[int],
        bias_axes: str | None = None,
        bias_shape: Sequence[int] | None = None,
        device: Any = None,
    ):
        super().__init__()
        self.equation, self.output_shape, self.bias_axes = equation, output_shape, bias_axes
        self.weight_shape, self.bias_shape = weight_shape, bias_shape
        self.weight = torch.nn.Parameter(torch.zeros(*weight_shape, device=device))
        self.bias: Any = None
        if bias_shape is not None:
            self.bias = torch.nn.Parameter(torch.zeros(*bias_shape, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.einsum(self.equation, x, self.weight)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"equation={self.equation!r}, bias_axes={self.bias_axes!r}"


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
            dtype = x.dtype if x.is_floating_point() else torch.float32
            tensor = torch.tensor(value, dtype=dtype, device=x.device)
            return tensor.reshape(-1, *[1] * (x.ndim - 2))

        return x * shaped(self.scale) + shaped(self.offset)

    def extra_repr(self) -> str:
        return f"scale={self.scale}, offset={self.offset}"


class Masking(torch.nn.Module):
    """Zeros where every entry of axis 1 equals ``mask_value``."""

    def __init__(self, mask_value: float = 0.0):
        super().__init__()
        self.mask_value = mask_value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (x != self.mask_value).any(1, keepdim=True).to(x.dtype)

    def extra_repr(self) -> str:
        return f"mask_value={self.mask_value}"


class Normalization(torch.nn.Module):
    """(x - mean) / max(sqrt(variance), 1e-7) along axis 1; ``invert`` undoes it."""

    def __init__(self, size: int, invert: bool = False, device: Any = None):
        super().__init__()
        self.size, self.invert = size, invert
        self.mean: torch.Tensor
        self.variance: torch.Tensor
        self.register_buffer("mean", torch.zeros(size, device=device))
        self.register_buffer("variance", torch.ones(size, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (-1, *[1] * (x.ndim - 2))
        mean = self.mean.reshape(shape)
        width = self.variance.sqrt().clamp(min=1e-7).reshape(shape)
        return mean + x * width if self.invert else (x - mean) / width

    def extra_repr(self) -> str:
        return f"{self.size}, invert={self.invert}"


class Flip(torch.nn.Module):
    """An axis from its end to its start."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flip(self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class Select(torch.nn.Module):
    """What a torch recurrent layer gives as one tensor.

    "sequence" is its output, "last" the output of each direction's last step, for which a
    bidirectional one needs a ``merge``: how its two halves are joined, "concat", "sum", "mul" or
    "ave". ``batch_first`` is that of the recurrent layer.
    """

    def __init__(self, what: str = "sequence", merge: str | None = None, batch_first: bool = True):
        super().__init__()
        if what not in ("sequence", "last") or merge not in (None, "concat", "sum", "mul", "ave"):
            raise ConversionError(
                f"Select({what!r}, {merge!r}): what is 'sequence' or 'last', merge None, 'concat', "
                "'sum', 'mul' or 'ave'"
            )
        self.what, self.merge, self.batch_first = what, merge, batch_first

    def forward(self, given: Any) -> torch.Tensor:
        x: torch.Tensor = given[0]
        if self.merge is None:
            return x if self.what == "sequence" else x.select(int(self.batch_first), -1)
        first, second = x.chunk(2, dim=-1)
        if self.what == "last":
            time = int(self.batch_first)
            first, second = first.select(time, -1), second.select(time, 0)
        if self.merge == "concat":
            return torch.cat([first, second], dim=-1)
        if self.merge == "mul":
            return first * second
        return first + second if self.merge == "sum" else (first + second) / 2

    def extra_repr(self) -> str:
        return f"what={self.what!r}, merge={self.merge!r}"


class SelfAttention(torch.nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention`` of one tensor with itself, which is all that it gives."""

    def forward(self, x: Any) -> torch.Tensor:  # type: ignore[override]  # one tensor, not three
        return super().forward(x, x, x, need_weights=False)[0]


class CausalSelfAttention(torch.nn.MultiheadAttention):
    """The same, in which no step attends to a later one."""

    def forward(self, x: Any) -> torch.Tensor:  # type: ignore[override]  # one tensor, not three
        later = torch.full((x.shape[1], x.shape[1]), -torch.inf, dtype=x.dtype, device=x.device)
        mask = later.triu(1)
        return super().forward(x, x, x, attn_mask=mask, need_weights=False)[0]


_POINTWISE = ("abs", "acos", "acosh", "asin", "asinh", "atan", "atanh", "ceil", "cos", "cosh",
              "erf", "exp", "expm1", "floor", "log", "log1p", "reciprocal", "round", "sign", "sin",
              "sinh", "sqrt", "square", "tan")  # fmt: skip


class Pointwise(torch.nn.Module):
    """A function of each entry by its name, such as "abs", which is torch's too."""

    def __init__(self, function: str):
        super().__init__()
        if function not in _POINTWISE:
            raise ConversionError(f"Pointwise({function!r}): known are {', '.join(_POINTWISE)}")
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = getattr(torch, self.function)(x)
        # torch's sign of NaN is 0
        return torch.where(torch.isnan(x), x, y) if self.function == "sign" else y

    def extra_repr(self) -> str:
        return f"function={self.function!r}"


class Reduce(torch.nn.Module):
    """The sum, mean, max, min, prod or logsumexp along an axis, which stays with size 1."""

    def __init__(self, function: str, dim: int = -1):
        super().__init__()
        known = ("sum", "mean", "max", "min", "prod", "logsumexp")
        if function not in known:
            raise ConversionError(f"Reduce({function!r}): known are {', '.join(known)}")
        self.function, self.dim = function, dim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        names = {"max": "amax", "min": "amin"}
        function = getattr(torch, names.get(self.function, self.function))
        y: torch.Tensor = function(x, dim=self.dim, keepdim=True)
        return y

    def extra_repr(self) -> str:
        return f"function={self.function!r}, dim={self.dim}"


_ALL = (CausalSelfAttention, EinsumDense, Flip, Masking, Normalization, Permute, Pointwise, Reduce,
        RepeatVector, Rescaling, Select, SelfAttention)  # fmt: skip
OURS: dict[str, type] = {c.__name__: c for c in _ALL}
