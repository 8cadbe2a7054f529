"""Layers of several tensors: their axes are brought into one order in the target, and made one."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from fwt import layers as fl
from fwt.converters.rows import table
from fwt.converters.rows.row import At, Layer, Row, read_settings, refuse
from fwt.converters.walk.arrays import letter_sizes, moved
from fwt.converters.walk.axis import Axis, Value
from fwt.converters.walk.shapes import Restart, Shapes
from fwt.converters.walk.write import reindex

_MAY_BE_NEGATIVE = (fl.Subtract, fl.Divide, fl.MatMul)

# Arrays of which Keras has no such layer.
_IN_KERAS = {"Indexed": "Parameter", "IndexedBuffer": "Constant", "Buffer": "Constant"}


class Merges(Shapes):
    """Writes layers of several tensors, and learned arrays, which take none."""

    def _parameter(self, layer: Layer) -> None:
        """A learned array: its axes are its own until a merge tells what they stand for."""
        if self.target == "keras" and layer.kind in _IN_KERAS:
            (value,) = layer.arrays.values()
            if "table" in layer.settings:
                value = layer.settings["table"].reshape(-1)[value]
            layer = dataclasses.replace(layer, kind=_IN_KERAS[layer.kind], arrays={"value": value},
                                        settings={"shape": value.shape})  # fmt: skip
        row = table.rows_of(self.source, layer.kind)[0]
        if len(layer.arrays) != 1:
            raise refuse(str(layer), f"expected one array, found {sorted(layer.arrays)}")
        (value,) = layer.arrays.values()
        have = [Axis(size) for size in np.shape(value)]
        self._load(Value((), have, list(have), dtype=layer.dtype))
        fields = {**layer.settings, "shape": tuple(np.shape(value))}
        self._emit(row, layer.name, fields, At(str(layer), ()), {"value": np.array(value)})

    def _merge(self, layer: Layer, values: list[Value]) -> None:
        """A layer of several tensors, by its row."""
        place = str(layer)
        # It casts them to the dtype that it computes in.
        values = [dataclasses.replace(v, dtype=layer.dtype or v.dtype) for v in values]
        found = table.rows_of(self.source, layer.kind)
        row = next((r for r in found if r.kind in ("merge", "join")), None)
        if row is not None:
            return self._elementwise(layer, row, values)
        if not found:
            raise table.unknown(self.source, layer)
        # Torch's attention has the time first, unless it is told otherwise.
        time_first = self.source == "torch" and layer.settings.get("batch_first") is False
        if time_first:
            layer = dataclasses.replace(layer, settings={**layer.settings, "batch_first": True})
        for lowered in found:
            parts = lowered.lower(self.source, layer, 3) if lowered.lower else None
            if parts is not None and len(parts) == 1:
                rows = table.rows_of(self.source, parts[0].kind)
                layer, found = dataclasses.replace(parts[0], inputs=layer.inputs), rows
                break
        row = next((r for r in found if r.several or r.kind == "contract"), None)
        if row is not None and row.kind == "contract":
            row = dataclasses.replace(row, several=self._equation(layer, row, values))
        if row is None:
            raise refuse(place, f"it takes {len(values)} tensors, and its row one")
        return self._several(layer, row, values, time_first)

    # -- entry by entry, and one after the other ----------------------------------------------

    def _elementwise(self, layer: Layer, row: Row, values: list[Value]) -> None:
        place = str(layer)
        fields = read_settings(row, self.source, layer, At(place, ()))
        ranks = {len(v.have) for v in values if v.have is not None}
        unknown = {i for v in values if v.have is None for i in v.roots}
        if ranks and unknown:
            raise Restart("rank", dict.fromkeys(unknown, max(ranks)))
        if not ranks:
            if row.kind == "join":
                raise refuse(place, "the rank of its inputs is not known", "give input_shape=")
            self._meet(values)
            self._emit(row, layer.name, fields, At(place, ()))
            return
        rank = max(ranks)
        joins = fields["axis"] if row.kind == "join" else None
        if joins is not None:
            if not isinstance(joins, int) or not -rank <= joins < rank or len(ranks) > 1:
                raise refuse(place, f"axis={joins!r} of tensors of rank {sorted(ranks)}")
            joins %= rank
        values = self._same_rank(values, rank, place)
        order = self._cheapest(values, rank)
        laid: list[Value] = []
        for value in values:
            self._load(value)
            assert value.have is not None
            own = value.have if len(value.have) == rank else [None] * (rank - len(value.have))
            own = own if len(own) == rank else [*own, *value.have]
            self._arrange([a for p in order if (a := own[p]) is not None], layer.name)
            laid.append(self._saved())
        columns = [[v.have[i - rank] for v in laid if v.have and i - rank >= -len(v.have)]
                   for i in range(rank)]  # fmt: skip
        have = [
            _joined(axes, place) if i == joins else _united(axes, place)
            for i, axes in enumerate(columns)
        ]
        batched = [v for v in laid if v.n is not None]
        at = {v.have.index(v.n) for v in batched if v.have is not None and v.n is not None}
        if len(at) > 1:
            raise refuse(place, "the batch stands at different places of its inputs")
        # What the model has itself stands for each example.
        alone = [v.have for v in laid if v.n is None and v.have is not None]
        fits = all(len(have) == rank and have[i].size == 1 for have in alone for i in at)
        if joins is not None and not fits:
            raise refuse(place, "it joins what has a batch with what has none")
        self._meet(laid)
        self.have, self.want = have, [have[p] for p in order]
        self.n = have[next(iter(at))] if at else None
        if joins is not None:
            if have[joins] is self.n:
                raise refuse(place, "it would join along the batch axis")
            fields["axis"] = have[joins]
        self._learn(have)
        if isinstance(row.flax, type) and issubclass(row.flax, _MAY_BE_NEGATIVE):
            self.non_negative = False
        self._emit(row, layer.name, fields, At(place, (), rank=rank))

    def _meet(self, values: Sequence[Value]) -> None:
        """The state that follows from several: where they are, and what all of them are."""
        self._load(values[0])
        self.tips = tuple(v.tips[0] for v in values)
        self.roots = frozenset().union(*(v.roots for v in values))
        self.non_negative = all(v.non_negative for v in values)
        self.permute_name = None

    def _learn(self, axes: Sequence[Axis]) -> None:
        """What one branch proves of an axis holds for the inputs of the others."""
        if self.layout == "source":
            return
        new = {i: a for x in axes if x.channel for i, a in x.origin if i not in self.channel}
        if new and len(axes) > 2:
            raise Restart("channel", new)

    def _same_rank(self, values: list[Value], rank: int, place: str) -> list[Value]:
        """The values, one with fewer axes only if it has no batch, so that its last stand for the
        last of the others, and only if these stand last in the target too."""
        short = [v for v in values if v.have is not None and len(v.have) < rank]
        if any(v.n is not None for v in short):
            found = sorted(len(v.have or ()) for v in values)
            raise refuse(place, f"its inputs have {' and '.join(map(str, found))} axes",
                         "give all of them one rank, with a Reshape")  # fmt: skip
        if not short:
            return values
        order = self._cheapest(values, rank)
        out = []
        for value in values:
            own = len(value.have or ())
            if value in short and sorted(order[rank - own :]) != list(range(rank - own, rank)):
                value = self._widened(value, rank, place)
            out.append(value)
        return out

    def _widened(self, value: Value, rank: int, place: str) -> Value:
        """A learned array with axes of size 1 before its own."""
        made = next((x for x in self.out if x.name == value.tips[0]), None)
        if made is None or made.inputs or value.have != value.want:
            raise refuse(place, "one of its inputs has fewer axes, which stand elsewhere in the "
                         "target", "give all of them one rank, with a Reshape")  # fmt: skip
        assert value.have is not None
        ones = [1] * (rank - len(value.have))
        reindex(made, lambda array: array.reshape(*ones, *array.shape), self.target)
        have = [*map(Axis, ones), *value.have]
        return dataclasses.replace(value, have=have, want=list(have))

    def _cheapest(self, values: Sequence[Value], rank: int) -> tuple[int, ...]:
        """The order of the target that moves the least, as numbers of the source's axes."""

        def order_of(value: Value) -> tuple[int, ...]:
            assert value.have is not None
            assert value.want is not None
            return tuple(value.have.index(a) for a in value.want)

        def cost(order: tuple[int, ...]) -> int:
            total = 0
            for value in whole:
                mine = order_of(value)
                dims = tuple(mine.index(p) for p in order)
                if mine != order and (value.tips, dims) not in self.turned and value.n is not None:
                    total += math.prod(a.size or 64 for a in value.have or ())
            return total

        short = [v for v in values if v.have is not None and len(v.have) < rank]
        if any(v.tips[0] in self.several for v in short):  # which stand as they are for each
            return tuple(range(rank))
        whole = [v for v in values if v.have is not None and len(v.have) == rank]
        found = [order_of(v) for v in whole if v.n is not None]
        return min(dict.fromkeys([*found, tuple(range(rank))]), key=cost)

    # -- by a row that says the axes of each ---------------------------------------------------

    def _equation(self, layer: Layer, row: Row, values: list[Value]) -> str:
        """What an einsum says of the axes, as a row says it."""
        (equation,) = read_settings(row, self.source, layer, At(str(layer), ())).values()
        equation = str(equation).replace(" ", "")
        left, arrow, right = equation.partition("->")
        parts = [*left.split(","), right]
        plain = arrow and len(parts) == 3 and all(p.isalpha() and len(set(p)) == len(p)
                                                  for p in parts)  # fmt: skip
        if not plain or not set(right) <= set(left):
            raise refuse(str(layer), f"equation={equation!r}: only of two tensors, without dots, "
                         "with an arrow and each axis once in a tensor")  # fmt: skip
        if any(p[0] != parts[0][0] for p in parts) or any(v.n is None for v in values):
            raise refuse(str(layer), f"equation={equation!r} does not keep the batch first")
        letters = [["n", *(f"x{x}" for x in p[1:])] for p in parts]
        one, two, out = (" ".join(x) for x in letters)
        return f"{one}, {two} -> {out}"

    def _several(self, layer: Layer, row: Row, values: list[Value], time_first: bool) -> None:
        place = str(layer)
        (specs, result), (wanted, after) = map(row.several_spec, (self.source, self.target))

        def as_given(letters: list[str]) -> list[str]:
            return [letters[1], letters[0], *letters[2:]] if time_first else letters

        if not row.several_least <= len(values) <= len(specs):
            raise refuse(place, f"it takes {len(values)} tensors, expected {len(specs)}")
        unknown = {i for v in values if v.have is None for i in v.roots}
        if unknown and not any(x.startswith("*") for x in specs[0]):
            raise Restart("rank", dict.fromkeys(unknown, len(specs[0])))
        if unknown:
            raise refuse(place, "the rank of its inputs is not known", "give input_shape=")
        binds = [self._bind(place, as_given(left), v.have)
                 for left, v in zip(specs, values, strict=False)]  # fmt: skip
        bound: dict[str, Axis] = {}
        for letter in dict.fromkeys(x for b in binds for x in b):
            axes = [b[letter] for b in binds if letter in b]
            bound[letter] = axes[0] if len(set(map(id, axes))) == 1 else _united(axes, place)
        for value, left in zip(values, specs, strict=False):
            if (
                "n" in left
                and value.have is not None
                and value.have[left.index("n")] is not value.n
            ):
                raise refuse(place, "an input of it has its batch elsewhere than first")
        fields = read_settings(row, self.source, layer, At(place, ()))
        sizes = letter_sizes(row, self.source, layer, fields)
        for letter, axis in bound.items():
            if axis.size is not None and sizes.setdefault(letter, axis.size) != axis.size:
                raise refuse(place, f"its arrays expect {sizes[letter]} inputs, found {axis.size}",
                             "check input_shape= and the layers before it")  # fmt: skip
        tips: list[str] = []
        stars: list[list[Axis]] = []
        for left, b, value in zip(wanted, binds, values, strict=False):
            self._load(value)
            assert value.have is not None
            named = list(b.values())
            stars.append([a for a in value.have if a not in named])
            order: list[Axis] = []
            for letter in left:
                order += stars[-1] if letter.startswith("*") else [b[letter]]
            self._arrange(order, layer.name)
            tips.append(self.tips[0])
            self._saved()
        if len({len(s) for s in stars}) > 1:
            raise refuse(place, "its inputs have different ranks")
        if len(stars[0]) and not all(_batch_first(v) for v in values):
            raise refuse(place, "an input of it has its batch elsewhere than first")
        star = [_united(list(axes), place) for axes in zip(*stars, strict=True)]
        if any(a.scrambled for a in bound.values()):
            raise refuse(place, "it takes a flattened axis in another order than the target's")
        arrays = moved(row, self.source, self.target, layer, fields, bound, None, self.dry)
        made: dict[str, Axis] = {}
        for letter in result:
            if not letter.startswith("*"):
                found = bound.get(letter) or Axis(sizes.get(letter))
                # Of the product of a tensor and its transposition both axes are one of it.
                made[letter] = dataclasses.replace(found) if found in made.values() else found

        def order_of(letters: list[str]) -> list[Axis]:
            return [a for x in letters for a in (star if x.startswith("*") else [made[x]])]

        self._meet(values)
        self.tips = tuple(tips)
        self.have, self.want = order_of(as_given(result)), order_of(after)
        self.n = self.want[0]
        self.non_negative = False
        self._emit(row, layer.name, fields, At(place, (), rank=len(after)), arrays, sizes)


def _batch_first(value: Value) -> bool:
    """Whether a value has its batch first, or is an array that is the same for each example."""
    first = None if value.have is None else value.have[0]
    return first is not None and (first is value.n or (value.n is None and first.size == 1))


def _united(axes: list[Axis], place: str) -> Axis:
    """One axis of several tensors, some of which may have one entry there for all."""
    sizes = {a.size for a in axes if a.size not in (None, 1)}
    if len(sizes) > 1:
        raise refuse(place, f"its inputs have {' and '.join(map(str, sorted(map(int, sizes))))} "
                     "entries along one axis")  # fmt: skip
    if any(a.scrambled for a in axes):
        raise refuse(place, "its inputs are flattened in another order in the target")
    unknown = any(a.size is None for a in axes)
    return Axis(
        sizes.pop() if sizes else None if unknown else 1,
        frozenset().union(*(a.origin for a in axes)),
        any(a.channel for a in axes),
        spatial=any(a.spatial for a in axes),
    )


def _joined(axes: list[Axis], place: str) -> Axis:
    """Axes one after the other; those that are flattened stay as its parts."""
    sizes = [a.size for a in axes]
    parts = tuple(axes) if any(a.scrambled for a in axes) else ()
    return Axis(
        None if None in sizes else sum(s or 0 for s in sizes),
        frozenset().union(*(a.origin for a in axes)),
        any(a.channel for a in axes),
        spatial=any(a.spatial for a in axes),
        joined=parts,
    )
