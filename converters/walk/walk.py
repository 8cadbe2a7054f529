"""One pass over the layers of a net, with the axes of the tensors between them.

It carries these axes twice: as the source orders them and as the target does. A layer that needs
another order in the target gets a transposition before it; a parameter that indexes an axis is
permuted by comparing the two orders. Flatten makes one axis that keeps its factors, ordered in
each framework's way.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fwt import layers as fl
from fwt._graph import names_in, renamed
from fwt._types import ConversionError
from fwt.converters.rows import table
from fwt.converters.rows.row import (
    At,
    AxesSetting,
    AxisSetting,
    Framework,
    Layer,
    Row,
    Take,
    output_sizes,
    read_settings,
    refuse,
    same,
)
from fwt.converters.walk.arrays import letter_sizes, moved
from fwt.converters.walk.axis import Axis, Value, place_channel
from fwt.converters.walk.merges import Merges
from fwt.converters.walk.net import Net
from fwt.converters.walk.shapes import Restart

SPATIAL = ("d", "h", "w")
_NON_NEGATIVE = (fl.ReLU, fl.ReLU6, fl.Sigmoid, fl.HardSigmoid, fl.Softmax, fl.Exponential)
_KEEPS_SIGN = (fl.MaxPool, fl.AvgPool, fl.GlobalAvgPool, fl.GlobalMaxPool, fl.Identity, fl.ZeroPad)


class Walk(Merges):
    """One pass over the layers of a net. What each gives is kept by its name as a ``Value``.

    ``rank``, ``channel`` and ``batch`` are what is known of each input by its number: its rank,
    which of its axes holds the channels, and which the batch. ``plain`` are the layers that several
    call and that take no flattened axis in another order than the source's.
    """

    def __init__(
        self,
        net: Net,
        source: Framework,
        target: Framework,
        layout: str,
        rank: Mapping[int, int],
        channel: Mapping[int, int],
        batch: Mapping[int, int],
        plain: Mapping[str, int],
    ):
        super().__init__(source, target, layout, channel, batch)
        self.net, self.plain = net, plain
        self.told = net.orders if target == "torch" else {}
        self.readers, self.ends = net.readers(), set(names_in(net.outputs))
        self.several = {name for name, found in self.readers.items() if len(found) > 1} | self.ends
        self.whole = ""  # the layer of the net whose part is being written
        self.values: dict[str, Value] = {}
        self.first: dict[str, list[Layer]] = {}  # by layer, what it was written as
        for number, (name, shape) in enumerate(net.inputs.items()):
            value = Value((name,), roots=frozenset([number]))
            if number in rank:
                sizes = (None,) * (rank[number] - 1) if shape is None else shape
                if len(sizes) != rank[number] - 1:
                    raise ConversionError(
                        f"input_shape={shape} has {len(sizes)} axes, but the model takes "
                        f"{rank[number] - 1} (the batch axis is left out)"
                    )
                moved_to = batch.get(number, 0)
                value.have = [
                    Axis(size, frozenset() if axis == moved_to else frozenset([(number, axis)]))
                    for axis, size in enumerate((None, *sizes))
                ]
                value.n = value.have[moved_to]
                if len(sizes) <= 1 and not moved_to:
                    self.lines.add(number)
                self._load(value)
                value.want = self._laid_out(value.have, channel.get(number))
            self.values[name] = value
        self.given = {name: v.have for name, v in self.values.items()}
        self.starts = {name: v.want for name, v in self.values.items()}

    def _laid_out(self, axes: list[Axis], channel: int | None) -> list[Axis]:
        if self.layout == "source":
            return list(axes)
        if channel is not None:
            axes = place_channel(axes, channel, self.layout)
        if self.batch:
            assert self.n is not None
            axes = [self.n, *(a for a in axes if a is not self.n)]
        return list(axes)

    def run(self) -> Net:
        """The net of the target."""
        names = [layer.name for layer in self.net.layers]
        self.taken = {*names, *self.values}
        if len(self.taken) < len(names) + len(self.values):
            twice = next(n for n in names if names.count(n) > 1 or n in self.values)
            raise ConversionError(f"two layers are named {twice!r}: give each its own name")
        for layer in self.net.layers:
            self._call(layer)
        alias: dict[str, str] = {}
        for name in self.ends:
            self._load(self.values[name])
            if self.have is not None and self.want is not None:
                proven = [i for i, a in enumerate(self.have) if a.channel]
                others = [a for a in self.have if not a.channel and a is not self.n]
                # What is no image any more, such as the tokens made of one, stays as it is.
                image = len(proven) == 1 and all(a.origin or a.spatial for a in others)
                self._arrange(self._laid_out(self.have, proven[0] if image else None), name)
                self._saved()
            alias[name] = self.tips[0]
        for layer in self.out:
            layer.shape = self.shapes.get(layer.name)
        inputs = {
            name: None if want is None else tuple(a.size for a in want[1:])
            for name, want in self.starts.items()
        }
        outputs, fixed = renamed(self.net.outputs, alias), self._fixed()
        return Net(self.out, inputs, outputs, self.net.takes, self.orders, fixed)

    def _fixed(self) -> dict[str, tuple[int | None, ...]]:
        """The sizes that the inputs must have, in the target's order of axes."""
        out = {}
        for name, sizes in self.net.fixed.items():
            have, want = self.given[name], self.starts[name]
            if have is not None and want is not None:
                sizes = tuple((None, *sizes)[have.index(a)] for a in want[1:])
            out[name] = sizes
        return out

    def _call(self, layer: Layer) -> None:
        """One layer of the net, and what it gives."""
        count, self.whole = len(self.out), layer.name
        values = [self.values[name] for name in layer.inputs]
        if not values:
            self._parameter(layer)
        elif len(values) == 1:
            self._load(values[0])
            self._step(layer, ())
        else:
            self._merge(layer, values)
        self.values[layer.name] = self._saved()
        made = [x for x in self.out[count:] if x.kind != "Permute"]
        if layer.of:
            self._share(layer, self.first[layer.of], made)
        else:
            self.first[layer.name] = made

    def _share(self, layer: Layer, first: list[Layer], again: list[Layer]) -> None:
        """What a further call of a layer is written as calls what the first one was written as."""
        mine, theirs = ([x for x in made if x.arrays] for made in (again, first))
        same = len(mine) == len(theirs) and all(map(_alike, theirs, mine))
        if not same and layer.of not in self.plain:
            raise Restart("plain", {layer.of: 1})
        if not same:
            raise refuse(
                str(layer),
                f"it has the weights of {layer.of}, but would need others here in {self.target}",
                "give it weights of its own",
            )
        for one, other in zip(theirs, mine, strict=True):
            other.of = one.name
        # What has no weights is called again where it says the same, and else stands by itself.
        main = [x for x in again if x.name == layer.name and not x.arrays]
        for other in main:
            namesake = next((x for x in first if x.name == layer.of), None)
            if namesake is not None and not namesake.arrays and _alike(namesake, other):
                other.of = namesake.name

    # -- one layer ----------------------------------------------------------------------------

    def _step(self, layer: Layer, following: Sequence[Layer]) -> None:
        row, given = self._row(layer)
        place = str(layer)
        self.dtype = layer.dtype or self.dtype
        rank = None if self.have is None else len(self.have)
        parts = row.lower(self.source, layer, rank) if row.lower else None
        if parts is not None:
            for index, part in enumerate(parts):
                if part.name != layer.name:
                    part.name = self._fresh(part.name)
                self._step(part, [*parts[index + 1 :], *following])
            return
        if row.kind == "permute":
            fields = read_settings(row, self.source, layer, At(place, ()))
            self._permute(layer, fields["dims"])
            return
        if row.kind:
            fields = read_settings(row, self.source, layer, At(place, (), rank=rank))
            if row.kind == "einsum":
                self._einsum(layer, row, fields)
            elif row.kind == "slice":
                self._slice(layer, row, fields)
            elif row.kind == "flatten":
                self._flatten(layer, row, fields, self._consumed(following, self.whole))
            else:
                self._reshape(layer, row, fields)
            return
        left, _ = row.spec(self.source)
        bound = self._bind(place, left, self.have)
        spatial = tuple(bound[x].size for x in left if x in SPATIAL and x in bound)
        at = At(place, spatial, self.non_negative, rank)
        fields = dict(given) if given is not None else read_settings(row, self.source, layer, at)
        numbered = self._bind_axis_settings(row, fields, bound, place)
        self._prove(row, bound)
        sizes = self._sizes(row, layer, fields, bound)
        before = list(self.have) if self.have is not None else []
        several = numbered is not None and len(numbered) > 1
        if several:
            self._as_told(layer)
        self._arrange_for(row, bound, numbered, layer)
        if several:
            self._note(layer)
        orders = None
        if numbered is not None and self.want is not None:
            sides: list[list[Axis]] = [before, self.want]
            orders = tuple([a for a in axes if a in numbered] for axes in sides)
        arrays = moved(row, self.source, self.target, layer, fields, bound, orders, self.dry)
        after = self._advance(row, fields, bound, sizes, layer)
        self._emit(row, layer.name, fields, at, arrays, sizes)
        self.have, self.want = after
        if row.flax in _NON_NEGATIVE:
            self.non_negative = True
        elif row.flax not in _KEEPS_SIGN:
            self.non_negative = False

    def _row(self, layer: Layer) -> tuple[Row, Mapping[str, Any] | None]:
        """The row of a layer, and its fields where the class alone settles them."""
        if self.source == "keras" and layer.kind == "Activation":
            name = layer.settings.get("activation")
            row = table.row_of_function(name) if isinstance(name, str) else None
            if row is None or row.function is None:
                raise refuse(str(layer), f"activation={name!r} has no row")
            take = Take(str(layer), "keras", layer.settings, {})
            take("activation")
            take.check_all_taken()
            return row, row.function[1]
        rows = [
            row
            for row in table.rows_of(self.source, layer.kind)
            if row.fits is None or row.fits(self.source, layer)
        ]
        if not rows:
            raise table.unknown(self.source, layer)
        if self.have is None:
            ranks = {r for row in rows for r in row.ranks}
            if len(ranks) > 1 and self.source == "flax":
                counts = {_entries(layer.settings.get(r.rank_of)) for r in rows if r.rank_of}
                ranks = {count + 2 for count in counts if count}
            if len(ranks) == 1:
                raise Restart("rank", dict.fromkeys(self.roots, ranks.pop()))
            row = rows[0]
            fixed = any(isinstance(s, AxisSetting) and s.torch_fixed for s in row.settings)
            same_axes = not row.ranks and row.spec(self.source) == row.spec(self.target)
            if not (row.kind or row.flax is None or fixed or same_axes):
                raise refuse(
                    str(layer),
                    "the rank of its input is not known, nor so which axis holds the channels",
                    "give input_shape= (without the batch axis)",
                )
            return row, None
        fitting = [r for r in rows if not r.ranks or len(self.have) in r.ranks]
        if not fitting:
            expected = sorted({r for row in rows for r in row.ranks})
            raise refuse(
                str(layer),
                f"expected an input of rank {' or '.join(map(str, expected))} (batch included), "
                f"found rank {len(self.have)}",
                "check input_shape= (without the batch axis) and the layers before it",
            )
        return fitting[0], None

    def _prove(self, row: Row, bound: dict[str, Axis]) -> None:
        if row.channel is None or row.channel not in bound or not self.have:
            return
        axis = bound[row.channel]
        if self.source != "torch" and axis is not self.have[-1]:
            return  # a BatchNorm over another axis than the last says nothing of images
        if len(self.have) < 3:
            return
        axis.channel = True
        for other in self.have:
            other.spatial |= other is not axis and other is not self.n
        new = {i: a for i, a in axis.origin if i not in self.channel}
        if new and self.layout != "source":
            raise Restart("channel", new)

    def _arrange_for(
        self, row: Row, bound: dict[str, Axis], numbered: list[Axis] | None, layer: Layer
    ) -> None:
        """Brings the target's axes into the order that its layer takes."""
        if self.want is None or self._left_out(row):
            return
        setting = next((s for s in row.settings if isinstance(s, AxesSetting)), None)
        moves = self.target == "torch" or (setting is not None and setting.keras_last)
        if numbered is not None and setting is not None and moves and self.target != "flax":
            rest = [a for a in self.want if a not in numbered]
            among = [a for a in self.want if a in numbered]
            if self.target == "keras" or not setting.torch_second:
                self._arrange([*rest, *among], layer.name)
            elif len(among) > 1:
                raise refuse(
                    str(layer), f"torch's has numbers along one axis only, found {len(among)} axes"
                )
            elif among:
                self._arrange([rest[0], *among, *rest[1:]], layer.name)
            return
        left, _ = row.spec(self.target)
        if not left:
            return
        named = [bound[x] for x in left if x in bound]
        rest = [a for a in self.want if a not in named]
        order: list[Axis] = []
        for letter in left:
            if letter.startswith("*"):
                order += rest
            elif letter == "n" and "n" not in bound:
                order.append(rest.pop(0))
            else:
                order.append(bound[letter])
        self._arrange(order, layer.name)

    def _sizes(
        self, row: Row, layer: Layer, fields: dict[str, Any], bound: dict[str, Axis]
    ) -> dict[str, int]:
        """The size of each letter that the arrays tell, checked against the axes."""
        sizes = letter_sizes(row, self.source, layer, fields)
        for letter, axis in bound.items():
            if letter not in sizes:
                if axis.size is not None:
                    sizes[letter] = axis.size
            elif axis.size is None:
                if self.whole_keras and not self._is_input(axis):
                    raise refuse(
                        str(layer),
                        "Keras needs the sizes before it",
                        "give input_shape= (without the batch axis)",
                    )
                axis.size = sizes[letter]
            elif axis.size != sizes[letter]:
                raise refuse(
                    str(layer),
                    f"its arrays expect {sizes[letter]} inputs, found {axis.size}",
                    "check input_shape= and the layers before it",
                )
        return sizes

    def _is_input(self, axis: Axis) -> bool:
        return any(axis in want for want in self.starts.values() if want)

    def _advance(
        self,
        row: Row,
        fields: dict[str, Any],
        bound: dict[str, Axis],
        sizes: dict[str, int],
        layer: Layer,
    ) -> tuple[list[Axis] | None, list[Axis] | None]:
        """The axes after the layer, in both orders."""
        if self.have is None or self.want is None:
            return None, None
        if changes := row.halves or row.single:
            axis = fields[changes]
            if row.halves and axis.size is not None and axis.size % 2:
                raise refuse(str(layer), f"it halves an axis of {axis.size}")
            size = 1 if row.single else None if axis.size is None else axis.size // 2
            new = Axis(size, axis.origin, axis.channel, axis.spatial)
            first, second = (
                [new if a is axis else a for a in side] for side in (self.have, self.want)
            )
            return first, second
        left = row.spec(self.source)[0]
        right = row.right(self.source, fields)
        if not right or not row.spec(self.target)[1]:
            return self.have, self.want
        if row.sizes is not None:
            sizes = sizes | row.sizes(fields)
        changed = [x for x in right if not x.startswith("*") and (x in SPATIAL or x not in left)]
        found: Mapping[str, int | None] = sizes
        if any(x in SPATIAL or x not in sizes for x in changed):
            letters = row.spec("flax")[0][1:]
            inputs = [bound[x].size for x in letters]
            found = {**output_sizes(row, fields, inputs, str(layer)), **{
                x: size for x, size in sizes.items() if x not in SPATIAL
            }}  # fmt: skip
        after: dict[str, Axis] = {}
        before = bound.get("i", bound.get("c"))
        for letter in changed:
            if letter in SPATIAL:
                after[letter] = Axis(found.get(letter), bound[letter].origin, spatial=True)
            else:
                proven = False
                if letter == "o" and before is not None:
                    proven = before.channel or row.channel is not None
                after[letter] = Axis(found.get(letter), channel=proven)
        if fields.get("keepdims"):
            after |= {x: Axis(1, bound[x].origin, spatial=True) for x in left if x in SPATIAL}

        def side(axes: list[Axis], framework: Framework) -> list[Axis]:
            letters, out = row.spec(framework)[0], row.right(framework, fields)
            fixed = [bound[x] for x in letters if x in bound]
            rest = [a for a in axes if a not in fixed]
            new: list[Axis] = []
            for letter in out:
                new += rest if letter.startswith("*") else [after.get(letter) or bound[letter]]
            return new

        return side(self.have, self.source), side(self.want, self.target)

    def _consumed(self, following: Sequence[Layer], name: str) -> bool:
        """Whether Dense layers take up the flattened axis, so that their kernels can be permuted:
        all that takes it, and it is no output."""
        for layer in following:
            found = self._takes_up(layer)
            if found is not None:
                return found
        readers = self.readers.get(name, [])
        if name in self.ends or not readers:
            return False
        for layer in readers:
            found = self._takes_up(layer)
            if found is False or (found is None and not self._consumed((), layer.name)):
                return False
        return True

    def _takes_up(self, layer: Layer) -> bool | None:
        """Whether a layer takes up a flattened axis; None if it leaves it to those after it."""
        if self.source == "keras" and layer.kind == "Activation":
            name = layer.settings.get("activation")
            row = table.row_of_function(name) if isinstance(name, str) else None
            rows: tuple[Row, ...] = (row,) if row else ()
        else:
            rows = table.rows_of(self.source, layer.kind)
        if rows and rows[0].kind == "join":
            return None
        if len(layer.inputs) > 1:
            return False
        if not rows or rows[0].kind or rows[0].ordered or (layer.of or layer.name) in self.plain:
            return False
        if "o" in rows[0].spec(self.source)[1]:
            # A kernel with groups has no letter for all inputs that could be permuted.
            return any("i" in p.of("flax")[1] for p in rows[0].params)
        return None


def _alike(one: Layer, other: Layer) -> bool:
    """Whether two layers are one but for their names and what they take."""
    return (
        one.kind == other.kind
        and one.settings.keys() == other.settings.keys()
        and all(same(v, other.settings[k]) for k, v in one.settings.items())
        and one.arrays.keys() == other.arrays.keys()
        and all(np.array_equal(v, other.arrays[k], equal_nan=v.dtype.kind == "f")
                for k, v in one.arrays.items())
    )  # fmt: skip


def _entries(value: Any) -> int | None:
    return len(value) if isinstance(value, list | tuple) else None
