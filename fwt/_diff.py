"""What differs between two models or trees."""

import dataclasses
import os
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from fwt import _nodes, _stored, _tree
from fwt._graph import Graph, nodes_of
from fwt._sequential import Sequential, settings_of
from fwt._types import FwtError, Model

if TYPE_CHECKING:
    import jax
    import jax.numpy as jnp
else:
    from fwt._later import jax, jnp


@dataclasses.dataclass(frozen=True)
class Change:
    """A leaf that differs: how, in how many entries, and by how much at most."""

    path: str
    what: str
    count: int | None = None
    largest: float | None = None  # of integers an int, which holds it exactly


@dataclasses.dataclass(frozen=True)
class Diff:
    """What :func:`diff` gives: fields to compute with, ``print`` for a table.

    Attributes:
        same: how many arrays are equal.
        changes: those that are not, in path order.
        layers: how the layers of two Models differ, a line each.
    """

    same: int
    changes: tuple[Change, ...]
    layers: tuple[str, ...]

    @property
    def equal(self) -> bool:
        return not (self.changes or self.layers)

    @property
    def verdict(self) -> str:
        """How many arrays are equal, and how many differ."""
        if self.equal:
            return f"equal: {self.same} arrays, bit for bit"
        return f"{self.same} arrays are equal, {len(self.changes)} differ"

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="bold")
        for title in ("path", "what differs", "entries", "by at most"):
            table.add_column(title)
        for c in self.changes:
            numbers = ["" if c.count is None else f"{c.count:,}",
                       "" if c.largest is None else f"{c.largest:.3g}"]  # fmt: skip
            table.add_row(*map(Text, [c.path.replace("\\/", "/"), c.what, *numbers]))
        return Group(*([table] if self.changes else []), *map(Text, self.layers))

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=200, color_system=None)
        with console.capture() as captured:
            console.print(self)
        return "\n".join([*(x.rstrip() for x in captured.get().splitlines()), self.verdict])


def diff(a: Any, b: Any) -> Diff:
    """Compares two models bit for bit.

    Args:
        a: a :class:`fwt.Model`, a tree of arrays or a variables dict, a live Keras, torch or nnx
            model, or the path of a file.
        b: another.

    Returns:
        A :class:`Diff`, to print or to read: the leaves that differ, by their paths with the
        collection in front; of two live models also their buffers and other variables; and of two
        Models the layers that differ.

    Example:
        >>> import numpy as np
        >>> one, other = ({"d": {"kernel": np.float32([1, x])}} for x in (2, 2.5))
        >>> found = diff(one, other)
        >>> found.equal, found.changes[0].path, found.changes[0].largest
        (False, 'params/d/kernel', 0.5)
    """
    files = [isinstance(x, str | os.PathLike) for x in (a, b)]
    live = all(_nodes.foreign(x)[1] == "model" or _nodes.is_graph(x) for x in (a, b))
    given = (a, b)
    if all(files):
        from fwt.converters.files.formats import looked_at

        a, b = looked_at(a, b)
    a, b = (_read(x, live) for x in (a, b))
    one, other = (
        _tree.Tree({"params": _keys_as_data(dict(m.variables))}, whole=True).leaves for m in (a, b)
    )
    if files[0] != files[1] and (a, b)[files[1]].module is None:
        layers = [{p.rpartition("/")[0] for p in x if p not in y}
                  for x, y in ((one, other), (other, one))]  # fmt: skip
        if layers[0] & layers[1] or (one and not one.keys() & other.keys()):
            raise FwtError(
                f"diff: {os.fspath(given[files[1]])} holds weights alone, under other names than "
                "the model: converters.load(path, architecture=model) gives them its names"
            )
    changes, same = [], 0
    for path in [*one, *(p for p in other if p not in one)]:
        change = _change(path, one.get(path), other.get(path))
        same += change is None
        changes += [] if change is None else [change]
    return Diff(same, tuple(changes), tuple(_layers(a.module, b.module)))


def _read(x: Any, live: bool) -> Model:
    """What holds the leaves; with ``live`` those of a live model that are no weights too."""
    if isinstance(x, Model):
        return x
    if isinstance(x, str | os.PathLike):
        from fwt.converters.files.formats import load

        return load(x)
    if _nodes.foreign(x)[1] == "model" or _nodes.is_graph(x):
        from fwt.converters import values

        return Model(None, {**values.weights(x), **(values.beside(x) if live else {})})
    return Model(None, x if _tree.is_variables(x) else {"params": x})


def _keys_as_data(tree: Any) -> Any:
    """A tree with the numbers of each typed PRNG key, which is no array of numbers itself."""

    def is_key(x: Any) -> bool:
        return _nodes.is_jax(x) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)

    if "jax" not in sys.modules or not any(map(is_key, jax.tree.leaves(tree))):
        return tree
    return jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree)


def _change(path: str, a: Any, b: Any) -> Change | None:
    if a is None or b is None:
        there = b if a is None else a
        where = "second" if a is None else "first"
        return Change(path, f"only in the {where}: {there.dtype}{list(there.shape)}")
    if a.shape != b.shape or a.dtype != b.dtype:
        return Change(path, f"{a.dtype}{list(a.shape)} and {b.dtype}{list(b.shape)}")
    count, gaps = 0, list[float]()
    for x, y in _stored.pairs(a, b):
        differs = np.any(np.not_equal(_stored.bits(x), _stored.bits(y)), axis=1)
        if differs.any():
            count += int(differs.sum())
            gaps.append(_largest(x[differs], y[differs]))
    if not count:
        return None
    known = [gap for gap in gaps if gap == gap]
    return Change(path, "other values", count, max(known) if known else gaps[0])


def _largest(x: np.ndarray, y: np.ndarray) -> float:
    """The largest gap between two arrays."""
    if x.dtype.kind in "iu":  # a gap may need one bit more than they have
        high, low = (f(x, y).astype(np.uint64) for f in (np.maximum, np.minimum))
        return int(np.max(high - low))
    wide = complex if x.dtype.kind == "c" else float
    with np.errstate(invalid="ignore", over="ignore"):
        gaps = np.abs(x.astype(wide) - y.astype(wide))
    return float("nan") if np.isnan(gaps).all() else float(np.nanmax(gaps))


def _layers(a: Any, b: Any) -> list[str]:
    """How the layers of two models differ."""
    if not all(isinstance(m, Sequential | Graph) for m in (a, b)):
        return []
    one, other = ({n.name: n for n in nodes_of(m)} for m in (a, b))
    out = [] if list(one) == list(other) else [f"the model: {list(one)} and {list(other)}"]
    if a.input_shape != b.input_shape:
        out.append(f"the model: input_shape {a.input_shape} and {b.input_shape}")
    for name, node in one.items():
        there = other.get(name)
        if there is None or node == there:
            continue
        if node.layer != there.layer:
            said = [_said(x.layer) for x in (node, there)]
            out.append(f"{name}: {said[0]} and {said[1]}")
        elif list(one) == list(other):
            said = [", ".join(x.inputs) + f" by {x.of}" * bool(x.of) for x in (node, there)]
            out.append(f"{name}: of {said[0]} and of {said[1]}")
    return out


def _said(layer: Any) -> str:
    if layer is None:
        return "a layer that is called again"
    return (
        f"{type(layer).__name__}({', '.join(f'{k}={v!r}' for k, v in settings_of(layer).items())})"
    )
