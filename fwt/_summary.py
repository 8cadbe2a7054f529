"""Tables of what a tree holds."""

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fwt import _tree
from fwt._stored import Stored
from fwt._types import Model, Params

if TYPE_CHECKING:
    import jax
else:
    from fwt._later import jax


@dataclasses.dataclass(frozen=True)
class Line:
    """One leaf: its path, layer class, shape, dtype, number of weights, and how many are zero.

    Attributes:
        tied: the path of the line above with which this one is one array; "" for none.
    """

    path: str
    layer: str
    shape: tuple[int, ...]
    dtype: str
    size: int
    zeros: int | None
    tied: str = ""


@dataclasses.dataclass(frozen=True)
class Summary:
    """What :func:`summary` gives: ``lines`` to compute with, ``print`` for a table.

    Attributes:
        lines: one for each leaf, in path order.
    """

    lines: tuple[Line, ...]

    @property
    def size(self) -> int:
        """The number of weights; one array under several paths counts once."""
        return sum(line.size for line in self.lines if not line.tied)

    @property
    def zeros(self) -> int:
        """How many of them are zero, as far as their values are known."""
        return sum(line.zeros or 0 for line in self.lines if not line.tied)

    def __rich__(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        layered = any(line.layer for line in self.lines)
        dtypes = {line.dtype for line in self.lines}
        table = Table(box=None, pad_edge=False, header_style="bold")
        for title, right in (
            ("path", False),
            *((("layer", False),) if layered else ()),
            ("shape", False),
            *((("dtype", False),) if len(dtypes) > 1 else ()),
            ("weights", True),
            ("zeros", True),
        ):
            table.add_column(
                title,
                justify="right" if right else "left",
                no_wrap=title != "path",
                overflow="fold",
            )
        for line in self.lines:
            path = f"{line.path} (is {line.tied})" if line.tied else line.path
            cells = [path, *([line.layer] if layered else []), _shape(line.shape)]
            cells += [line.dtype] if len(dtypes) > 1 else []
            table.add_row(*map(Text, [*cells, f"{line.size:,}", _share(line.zeros, line.size)]))
        blank = [""] * (len(table.columns) - 3)
        total = "total" if len(dtypes) != 1 else f"total, {next(iter(dtypes))}"
        table.add_row(Text(total, "bold"), *blank, f"{self.size:,}", _share(self.zeros, self.size))
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=200, color_system=None)
        with console.capture() as captured:
            console.print(self)
        return "\n".join(line.rstrip() for line in captured.get().splitlines())


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def _share(zeros: int | None, size: int) -> str:
    if zeros is None:
        return "unknown"
    return f"{zeros:,} ({zeros / size:6.1%})" if size else "0"


@_tree.reads
def summary(params: Params) -> Summary:
    """A table of the leaves: path, shape, dtype, number of weights and of zeros.

    Args:
        params: any pytree of arrays, or a live Keras or torch model. Other
            collections, such as ``batch_stats``, are listed below the params, with their names in
            front.

    Returns:
        A :class:`Summary` to print, or to read line by line. Zeros of ``ShapeDtypeStruct`` leaves
        are unknown. One array under several paths has a line for each and counts once in the total.

    Example:
        >>> import numpy as np
        >>> print(summary({"dense": {"kernel": np.array([[0.0, 1.0]], np.float32)}}))
        path            shape  weights       zeros
        dense/kernel    1 x 2        2  1 ( 50.0%)
        total, float32               2  1 ( 50.0%)
    """
    tree = _tree.Tree(params)
    layers = {}
    if isinstance(params, Model) and params.module is not None:
        layers = {
            _tree.escape(n.name): type(n.layer).__name__
            for n in getattr(params.module, "layers", ())
            if hasattr(n, "layer")
        }
    tied = {p: group[0] for group in tree.ties for p in group[1:]}
    lines = [_line(p, x, layers, "", tied.get(p, "")) for p, x in tree.leaves.items()]
    variables = params.variables if isinstance(params, Model) else params
    if _tree.is_variables(variables):
        for collection in variables:
            if collection != "params":
                found = _tree.Tree({"params": variables[collection]}, whole=True).leaves
                lines += [_line(p, x, layers, f"{collection}/") for p, x in found.items()]
    return Summary(tuple(lines))


def _line(path: str, leaf: Any, layers: Mapping[str, str], prefix: str, tied: str = "") -> Line:
    if isinstance(leaf, Stored) and leaf.zeros is None:
        for _ in leaf.counted():
            pass
    here = isinstance(leaf, np.ndarray | Stored)  # which most are, and which needs no JAX
    abstract = not here and isinstance(leaf, jax.ShapeDtypeStruct | jax.core.Tracer)
    size = math.prod(leaf.shape)
    if isinstance(leaf, Stored):
        zeros = leaf.zeros
    else:
        zeros = None if abstract else size - int(np.count_nonzero(np.asarray(leaf)))
    layer = layers.get(path.rpartition("/")[0], "")
    return Line(prefix + path, layer, tuple(leaf.shape), str(leaf.dtype), size, zeros, tied)
