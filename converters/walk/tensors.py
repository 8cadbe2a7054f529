"""Tensors between the layers of a net that is being read, whose batch may stand elsewhere.

A tensor between layers has the batch first. What a framework has otherwise, the batch behind
another axis or merged with one, is a ``Value``, which says where the axes of the framework's are.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fwt.converters.rows.row import Layer, refuse

Batched = tuple[int, bool]  # a size, and whether it counts that many examples
Axes = tuple[tuple[int, ...], ...]
Piece = tuple[int | None, int | None]  # of which axis, None for a new one, and its size


@dataclasses.dataclass(frozen=True)
class Value:
    """A tensor that follows from the input.

    Attributes:
        name: of the layer, or the input, that gives it.
        shape: of what that gives; the batch, None, is first.
        axes: by axis of the framework's tensor, the axes of this shape that it is: (0, 1) where the
            batch is merged with what follows.
    """

    name: str
    shape: tuple[Any, ...]
    axes: Axes

    @property
    def is_plain(self) -> bool:
        return self.axes == plain_axes(len(self.shape))

    @property
    def last(self) -> bool:
        """Whether the last axis is the last in both."""
        return bool(self.axes) and self.axes[-1] == (len(self.shape) - 1,)

    @property
    def sizes(self) -> list[Batched]:
        """The shape that the framework has."""
        out = []
        for part in self.axes:
            known = [s for s in (self.shape[a] for a in part if a) if s is not None]
            out.append((math.prod(known), 0 in part))
        return out


def plain_axes(rank: int) -> Axes:
    return tuple((i,) for i in range(rank))


def wider(*values: Value) -> tuple[Any, ...]:
    """The shape of tensors that broadcast."""
    rank = max(len(v.shape) for v in values)
    shapes = [(1,) * (rank - len(v.shape)) + v.shape for v in values]
    return tuple(next((s for s in sizes if s != 1), 1) for sizes in zip(*shapes, strict=True))


class Names:
    """The names of layers and inputs, and how often each was asked for."""

    def __init__(self) -> None:
        self.taken: dict[str, int] = {}

    def unique(self, name: str) -> str:
        """The name, or one like it that is free."""
        count = self.taken.get(name, 0)
        self.taken[name] = count + 1
        return self.unique(f"{name}__{count}") if count else name


class Tensors(Names):
    """The layers read so far, in torch's terms; ``usual`` gives the defaults of the settings of one
    of a kind."""

    def __init__(self, usual: Callable[[str], Mapping[str, Any]]):
        super().__init__()
        self.layers: list[Layer] = []
        self.usual = usual

    def emit(
        self,
        kind: str,
        settings: Mapping[str, Any],
        inputs: Sequence[Value],
        name: str,
        shape: Sequence[Any],
        axes: Axes | None = None,
        arrays: Mapping[str, Any] | None = None,
    ) -> Value:
        """A layer, and what it gives."""
        shape = tuple(shape)
        own = shape[1:] if shape[:1] == (None,) else shape
        layer = Layer(
            self.unique(name), kind, dict(settings), dict(arrays or {}), self.usual(kind),
            inputs=tuple(v.name for v in inputs), shape=own,
        )  # fmt: skip
        self.layers.append(layer)
        return Value(layer.name, shape, plain_axes(len(shape)) if axes is None else axes)

    # -- the order of axes ---------------------------------------------------------------------

    def ordered(self, value: Value, dims: Sequence[int], name: str) -> Value:
        """The value with the axes of what it is made of in another order, the batch first."""
        dims = tuple(dims)
        if dims == tuple(range(len(dims))):
            return value
        shape = [value.shape[d] for d in dims]
        axes = tuple(tuple(dims.index(a) for a in part) for part in value.axes)
        return self.emit("Permute", {"dims": dims}, [value], f"{name}__permute", shape, axes)

    def lined_up(self, value: Value, name: str) -> Value:
        """The value with its axes in the framework's order but for the batch, which is first."""
        order = [a for part in value.axes for a in part if a != 0]
        return self.ordered(value, (0, *order), name)

    def plain(self, value: Value, name: str) -> Value:
        """The value with its axes as the framework has them."""
        if value.is_plain:
            return value
        if any(len(a) != 1 for a in value.axes):
            if all(value.shape[a] in (1, None) for part in value.axes for a in part):
                raise refuse(name, "it takes a tensor of the batch alone, (n,)",
                             "keep an axis: (n, 1)")  # fmt: skip
            raise refuse(name, "it takes a tensor whose batch is merged with another axis")
        if value.axes[0] != (0,):
            raise refuse(name, "it takes a tensor whose first axis is not the batch")
        return self.ordered(value, [a for (a,) in value.axes], name)

    def at_end(self, value: Value, name: str) -> Value:
        """The same of an output, which may be of the batch alone."""
        alone = len(value.axes) == 1 and all(s in (1, None) for s in value.shape)
        if value.is_plain or not alone:
            return self.plain(value, name)
        settings = {"start_dim": 0, "end_dim": -1}
        return self.emit("Flatten", settings, [value], f"{value.name}__alone", (None,))

    def alike(self, a: Value, b: Value, name: str) -> tuple[Value, Value]:
        """Two values whose axes are in one order."""

        def coarse(value: Value, name: str) -> Value:
            return self.reshaped(value, value.sizes, name, whole=True)

        for bring in (self.lined_up, coarse, self.plain):
            if a.axes != b.axes or len(a.shape) != len(b.shape):
                a, b = bring(a, name), bring(b, name)
        return a, b

    def axis(self, value: Value, dim: int, name: str) -> int:
        """The axis that one of the framework's is."""
        found = value.axes[dim % len(value.axes)]
        if len(found) != 1 or found == (0,):
            raise refuse(name, f"it works along axis {dim}, which is the batch")
        return found[0]

    # -- shapes --------------------------------------------------------------------------------

    def reshaped(
        self, value: Value, sizes: Sequence[Batched], name: str, whole: bool = False
    ) -> Value:
        """The value in another shape: its axes are split and merged, each as little as need be;
        ``whole`` merges what stands for one axis beside the batch too."""
        value = self.lined_up(value, name)
        order = [a for part in value.axes for a in part]
        found = _refined([(a, value.shape[a]) for a in order], sizes)
        if found is None and value.is_plain and sizes[0] == (1, True) and len(value.shape) > 2:
            value = self._merged(value, 1, len(value.shape) - 1, name)
            found = _refined(list(enumerate(value.shape)), sizes)
        if found is not None and whole:
            found = [_one_group(part) for part in found]
        if found is None:
            said = ", ".join("batch" if b and n == 1 else f"{n} * batch" if b else str(n)
                             for n, b in sizes)  # fmt: skip
            raise refuse(name, f"it makes ({said}) of a tensor whose axes don't divide so")
        pieces = [p for part in found for group in part for p in group]
        # A new axis of one entry is split off the axis behind it, or before it.
        where: list[int | None] = []
        for index, (axis, _) in enumerate(pieces):
            behind = [a for a, _ in (*pieces[index:], *reversed(pieces[:index])) if a]
            where.append(axis if axis is not None else behind[0] if behind else None)
        if None in where:
            raise refuse(name, "it adds an axis to a tensor of the batch alone")
        for axis in reversed(range(1, len(value.shape))):
            own = [
                n for w, (_, n) in zip(where, pieces, strict=True) if w == axis and n is not None
            ]
            if len(own) > 1:
                shape = (*value.shape[:axis], *own, *value.shape[axis + 1 :])
                settings = {"dim": axis, "unflattened_size": tuple(own)}
                value = self.emit("Unflatten", settings, [value], name, shape)
        # What stands in one group is merged, from the last so that the numbers before it stay.
        last = sum(axis != 0 for axis, _ in pieces)
        for group in reversed([group for part in found for group in part]):
            if group[0][0] != 0:
                first = last - len(group) + 1
                if first < last:
                    value = self._merged(value, first, last, name)
                last = first - 1
        axes: list[tuple[int, ...]] = []
        count = 1
        for part in found:
            own_axes: list[int] = []
            for group in part:
                own_axes.append(0 if group[0][0] == 0 else count)
                count += group[0][0] != 0
            axes.append(tuple(own_axes))
        return Value(value.name, value.shape, tuple(axes))

    def _merged(self, value: Value, start: int, end: int, name: str) -> Value:
        sizes = [s for s in value.shape[start : end + 1] if s is not None]
        shape = (*value.shape[:start], math.prod(sizes), *value.shape[end + 1 :])
        last = end == len(value.shape) - 1
        settings = {"start_dim": start, "end_dim": -1 if last else end}
        return self.emit("Flatten", settings, [value], name, shape)

    def cut(
        self, value: Value, dim: int, start: int, stop: int | None, name: str, step: int = 1
    ) -> Value:
        """From ``start`` to ``stop`` along an axis of the framework's. What is negative counts from
        the end of that, whatever its size, and None is the end."""
        axis = self.axis(value, dim, name)
        size = value.shape[axis]
        if (start, step) == (0, 1) and stop in (None, size):
            return value
        count = len(range(size)[start:stop:step])
        shape = (*value.shape[:axis], count, *value.shape[axis + 1 :])
        settings = {"dim": axis, "start": start, "stop": stop, "step": step}
        return self.emit("Slice", settings, [value], name, shape, value.axes)

    def entry(self, value: Value, dim: int, index: int, name: str) -> Value:
        """One entry of an axis of the framework's, which goes."""
        dim %= len(value.axes)
        size = value.shape[self.axis(value, dim, name)]
        if not -size <= index < size:
            raise refuse(name, f"it takes entry {index} of {size}")
        value = self.cut(value, dim, index, index + 1 or None, name)
        sizes = value.sizes
        return self.reshaped(value, [*sizes[:dim], *sizes[dim + 1 :]], name)

    def entries(self, value: Value, dim: int, at: Any, name: str) -> Value:
        """The entries at constant positions along one axis, each run of them cut out at once."""
        axis = self.axis(value, dim, name)
        size = value.shape[axis]
        if any(not -size <= i < size for i in at):
            raise refuse(name, f"it takes entries beyond {size}")
        runs: list[list[int]] = []
        for one in map(int, at):
            if runs and one == runs[-1][1] and one:  # from -1 to 0 is no run
                runs[-1][1] += 1
            else:
                runs.append([one, one + 1])
        return self.along([self.cut(value, dim, a, b or None, name) for a, b in runs], axis, name)

    def along(self, parts: Sequence[Value], axis: int, name: str) -> Value:
        """Values one after the other along an axis of what they are made of."""
        if len(parts) == 1:
            return parts[0]
        like = next((v for v in parts if v.shape[:1] == (None,)), parts[0])
        shape = list(like.shape)
        sizes = [v.shape[axis] for v in parts]
        shape[axis] = None if None in sizes else sum(sizes)
        return self.emit("Concatenate", {"dim": axis}, parts, name, shape, like.axes)

    def product(self, a: Value, b: Value, name: str) -> Value:
        """The matrix product over the last two axes of the framework's."""

        def at_end(v: Value) -> bool:
            return v.axes[-2:] == plain_axes(len(v.shape))[-2:]

        if not at_end(a) or not at_end(b):
            a, b = self.lined_up(a, name), self.lined_up(b, name)
        a, b = self.alike(a, b, name)
        if a.axes != b.axes or not at_end(a) or len(a.axes) < 3:
            a, b = self.plain(a, name), self.plain(b, name)
        if len(a.shape) != len(b.shape) or len(a.shape) < 3:
            raise refuse(name, f"a product of tensors of ranks {len(a.shape)} and {len(b.shape)}")
        shape = (*wider(a, b)[:-2], a.shape[-2], b.shape[-1])
        return self.emit("MatMul", {}, [a, b], name, shape, a.axes)


def _one_group(part: list[list[Piece]]) -> list[list[Piece]]:
    """The groups of an axis but the batch as one."""
    start = 1 if part and part[0][0][0] == 0 else 0
    if any(g[0][0] == 0 for g in part[start:]) or len(part) <= start + 1:
        return part
    return [*part[:start], [p for g in part[start:] for p in g]]


def _refined(
    old: Sequence[tuple[int, int | None]], new: Sequence[Batched]
) -> list[list[list[Piece]]] | None:
    """For each new axis the groups of pieces of old ones that it is, one but for the batch merged
    with others; None if an old one would have to be cut in another way than by division."""
    left: list[tuple[int, int | None]] = list(old)
    ones: list[Piece] = []  # which go with the next piece but the batch
    out: list[list[list[Piece]]] = []
    for size, batched in new:
        mine: list[list[Piece]] = []
        merged = not batched
        if (size, batched) == (1, False):
            mine.append([left.pop(0) if left and left[0][1] == 1 else (None, 1)])
        while size != 1 or batched:
            if not left:
                return None
            axis, found = left.pop(0)
            if found == 1:
                ones.append((axis, found))
                continue
            if found is None:
                if not batched:
                    return None
                batched = False
                mine.append([(axis, found)])
                continue
            if size % found == 0:
                size //= found
            elif found % size == 0 and not batched:
                left.insert(0, (axis, found // size))
                found, size = size, 1
            else:
                return None
            if merged and mine:
                mine[0] += [*ones, (axis, found)]
            else:
                mine.append([*ones, (axis, found)])
            ones = []
        if merged and ones:
            mine[0], ones = [*ones, *mine[0]], []
        out.append(mine)
    last: list[Piece] = [*ones, *left]
    if any(found != 1 for _, found in last) or (last and not out):
        return None
    if last and out[-1][-1][0][0] == 0:  # nothing but the batch is left
        out[-1].append(last)
    elif last:
        out[-1][-1] += last
    return out
