"""What every layer of fwt.layers is."""

from typing import Any

import flax.linen as nn


def tuples(x: Any) -> Any:
    """Lists as tuples, so that equal layers are equal and hashable."""
    return tuple(map(tuples, x)) if isinstance(x, list | tuple) else x


class Layer(nn.Module):
    """A layer whose settings are made hashable."""

    def __post_init__(self) -> None:
        for field in self.__dataclass_fields__:
            if field not in ("parent", "name"):
                object.__setattr__(self, field, tuples(getattr(self, field)))
        super().__post_init__()
