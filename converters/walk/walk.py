"""One pass over the layers of a model, with the axes of the tensor between them.

It carries these axes twice: as the source orders them and as the target does. A layer that needs
another order in the target gets a transposition before it; a parameter that indexes an axis is
permuted by comparing the two orders. Flatten makes one axis that keeps its factors, ordered in
each framework's way.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fwt import layers as fl
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
)
from fwt.converters.walk.arrays import letter_sizes, moved
from fwt.converters.walk.axis import Axis, atoms, place_channel
from fwt.converters.walk.write import Writer
from fwt.layers.einsum import einsum_axes

CONVENTION = {"torch": "channels_first", "keras": "channels_last", "flax": "channels_last"}
SPATIAL = ("d", "h", "w")
_NON_NEGATIVE = (fl.ReLU, fl.ReLU6, fl.Sigmoid, fl.HardSigmoid, fl.Softmax, fl.Exponential)
_KEEPS_SIGN = (fl.MaxPool, fl.AvgPool, fl.GlobalAvgPool, fl.GlobalMaxPool, fl.Identity, fl.ZeroPad)


class Restart(Exception):  # noqa: N818 - it is no error, but how the walk starts again
    """The walk learned how the input looks, and starts again with that."""

    def __init__(
        self, rank: int | None = None, channel: int | None = None, batch: int | None = None
    ):
        self.learned = {"rank": rank, "channel": channel, "batch": batch}


class Walk(Writer):
    """One pass over the layers. ``have`` and ``want`` are the axes in the source's and in the
    target's order; both are None while the rank is unknown, when every order stays as it is."""

    def __init__(
        self,
        source: Framework,
        target: Framework,
        shape: tuple[int | None, ...] | None,
        layout: str,
        rank: int | None = None,
        channel: int | None = None,
        batch: int | None = None,
    ):
        super().__init__(target)
        self.source, self.layout = source, layout
        self.channel, self.batch = channel, batch or 0
        self.permute_name: str | None = None
        self.non_negative = False
        self.have: list[Axis] | None = None
        self.want: list[Axis] | None = None
        self.n: Axis | None = None  # the batch axis
        if rank is not None:
            sizes = (None,) * (rank - 1) if shape is None else shape
            if len(sizes) != rank - 1:
                raise ConversionError(
                    f"input_shape={shape} has {len(sizes)} axes, but the model takes {rank - 1} "
                    "(the batch axis is left out)"
                )
            self.have = [Axis(size, origin) for origin, size in enumerate((None, *sizes))]
            self.n = self.have[self.batch]
            self.want = self._laid_out(self.have, channel)
        self.input = self.want

    def _laid_out(self, axes: list[Axis], channel: int | None) -> list[Axis]:
        if self.layout == "source":
            return list(axes)
        if channel is not None:
            axes = place_channel(axes, channel, self.layout)
        if self.batch:
            assert self.n is not None
            axes = [self.n, *(a for a in axes if a is not self.n)]
        return list(axes)

    def run(self, layers: Sequence[Layer]) -> tuple[list[Layer], tuple[int | None, ...] | None]:
        self.taken = {layer.name for layer in layers}
        if len(self.taken) < len(layers):
            names = [layer.name for layer in layers]
            twice = next(n for n in names if names.count(n) > 1)
            raise ConversionError(f"two layers are named {twice!r}: give each its own name")
        for index, layer in enumerate(layers):
            self._step(layer, layers[index + 1 :])
        if self.have is not None and self.want is not None:
            proven = [i for i, a in enumerate(self.have) if a.channel]
            end = self._laid_out(self.have, proven[0] if len(proven) == 1 else None)
            self._arrange(end, layers[-1].name if layers else "input")
        shape = None if self.input is None else tuple(a.size for a in self.input[1:])
        return self.out, shape

    # -- one layer ----------------------------------------------------------------------------

    def _step(self, layer: Layer, following: Sequence[Layer]) -> None:
        row, given = self._row(layer)
        place = str(layer)
        self.dtype = layer.dtype or self.dtype
        rank = None if self.have is None else len(self.have)
        parts = row.lower(self.source, layer, rank) if row.lower else None
        if parts is not None:
            for index, part in enumerate(parts):
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
            elif row.kind == "flatten":
                self._flatten(layer, row, fields, self._consumed(following))
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
        self._arrange_for(row, bound, numbered, layer)
        orders = None
        if numbered is not None and self.want is not None:
            sides: list[list[Axis]] = [before, self.want]
            orders = tuple([a for a in axes if a in numbered] for axes in sides)
        arrays = moved(row, self.source, self.target, layer, fields, bound, orders)
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
                raise Restart(rank=ranks.pop())
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
                "check input_shape= and the layers before it",
            )
        return fitting[0], None

    # -- axes ---------------------------------------------------------------------------------

    def _bind(self, place: str, left: list[str], axes: list[Axis] | None) -> dict[str, Axis]:
        """Which axis each letter is, in the source's order."""
        if axes is None or not left:
            return {}
        fixed = sum(not x.startswith("*") for x in left)
        star = len(axes) - fixed
        if star < 0 or (star and fixed == len(left)):
            raise refuse(place, f"expected axes {' '.join(left)}, found rank {len(axes)}")
        bound, index = {}, 0
        for letter in left:
            if letter.startswith("*"):
                index += star
            else:
                bound[letter] = axes[index]
                index += 1
        return bound

    def _axis(self, number: Any, setting: str, place: str) -> Axis:
        assert self.have is not None
        if not isinstance(number, int) or isinstance(number, bool):
            raise refuse(place, f"{setting}={number!r}: expected the number of an axis")
        if not -len(self.have) <= number < len(self.have):
            raise refuse(
                place, f"{setting}={number} is no axis of an input of rank {len(self.have)}"
            )
        axis = self.have[number]
        if axis is self.n:
            raise refuse(place, f"{setting}={number} is the batch axis")
        return axis

    def _bind_axis_settings(
        self, row: Row, fields: dict[str, Any], bound: dict[str, Axis], place: str
    ) -> list[Axis] | None:
        """Axis numbers become axes, so that they cross; those of an AxesSetting are returned."""
        numbered = None
        for setting in row.settings:
            if isinstance(setting, AxesSetting):
                numbers = fl.tuples(fields[setting.flax])
                numbers = numbers if isinstance(numbers, tuple) else (numbers,)
                fields[setting.flax] = numbers
                if self.have is None:
                    if len(numbers) > 1 or any(n != -1 for n in numbers):
                        raise refuse(
                            place,
                            f"{setting.flax}={numbers} on an input of unknown rank",
                            "give input_shape= (without the batch axis)",
                        )
                    continue
                numbered = [self._axis(n, setting.flax, place) for n in numbers]
                if numbered != [a for a in self.have if a in numbered]:
                    raise refuse(place, f"{setting.flax}={numbers} must rise, each axis once")
                fields[setting.flax] = numbered
            if not isinstance(setting, AxisSetting):
                continue
            number = fields[setting.flax]
            if isinstance(number, list | tuple) and len(number) == 1:
                number = number[0]
            if not isinstance(number, int):
                raise refuse(place, f"{setting.flax}={number!r}: one axis only")
            fields[setting.flax] = number
            if self.have is None:
                continue
            fields[setting.flax] = axis = self._axis(number, setting.flax, place)
            if setting.letter:
                bound[setting.letter] = axis
        return numbered

    def _prove(self, row: Row, bound: dict[str, Axis]) -> None:
        if row.channel is None or row.channel not in bound or not self.have:
            return
        axis = bound[row.channel]
        if self.source != "torch" and axis is not self.have[-1]:
            return  # a BatchNorm over another axis than the last says nothing of images
        if len(self.have) < 3:
            return
        axis.channel = True
        if axis.origin and self.channel is None and self.layout != "source":
            raise Restart(channel=axis.origin)

    def _arrange_for(
        self, row: Row, bound: dict[str, Axis], numbered: list[Axis] | None, layer: Layer
    ) -> None:
        """Brings the target's axes into the order that its layer takes."""
        if self.want is None:
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
                    str(layer), f"torch has one {setting.flax} only, found {len(among)} axes"
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

    def _arrange(self, order: list[Axis], name: str) -> None:
        assert self.want is not None
        if order == self.want:
            return
        dims = tuple(self.want.index(a) for a in order)
        if dims[0] != 0 and self.target == "keras":
            raise refuse(name, "the batch axis would have to move, which Keras can't do")
        # A transposition of the source that waited until now keeps its name.
        label = self.permute_name or self._fresh(f"{name}__permute")
        self.permute_name = None
        self._emit(table.PERMUTE, label, {"dims": dims}, At(name, ()))
        self.want = list(order)

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
                if self.target == "keras" and axis not in (self.input or ()):
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
            new = Axis(size, axis.origin, axis.channel)
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
                after[letter] = Axis(found.get(letter), bound[letter].origin)
            else:
                proven = False
                if letter == "o" and before is not None:
                    proven = before.channel or row.channel is not None
                after[letter] = Axis(found.get(letter), None, proven)
        if fields.get("keepdims"):
            after |= {x: Axis(1) for x in left if x in SPATIAL}

        def side(axes: list[Axis], framework: Framework) -> list[Axis]:
            letters, out = row.spec(framework)[0], row.right(framework, fields)
            fixed = [bound[x] for x in letters if x in bound]
            rest = [a for a in axes if a not in fixed]
            new: list[Axis] = []
            for letter in out:
                new += rest if letter.startswith("*") else [after.get(letter) or bound[letter]]
            return new

        return side(self.have, self.source), side(self.want, self.target)

    # -- the shape layers ---------------------------------------------------------------------

    def _consumed(self, following: Sequence[Layer]) -> bool:
        """Whether a Dense takes up the flattened axis, so that its kernel can be permuted."""
        for layer in following:
            if self.source == "keras" and layer.kind == "Activation":
                name = layer.settings.get("activation")
                row = table.row_of_function(name) if isinstance(name, str) else None
                rows: tuple[Row, ...] = (row,) if row else ()
            else:
                rows = table.rows_of(self.source, layer.kind)
            if not rows or rows[0].kind or rows[0].ordered:
                return False
            if "o" in rows[0].spec(self.source)[1]:
                # A kernel with groups has no letter for all inputs that could be permuted.
                return any("i" in p.of("flax")[1] for p in rows[0].params)
        return False

    def _check_proven(self, layer: Layer) -> None:
        """Raises where the order of the values depends on which axis holds the channels, no layer
        has proved it, and the ends are to be moved."""
        if self.layout == "source":
            return
        if self.have is None:
            raise refuse(
                str(layer),
                "the rank of its input is not known",
                "give input_shape= (without the batch axis), or layout='source' to keep the "
                "input's axes as they are",
            )
        proven = self.channel is not None or any(a.channel for a in self.have) or self.batch
        if len(self.have) > 2 and any(a.origin for a in self.have[1:]) and not proven:
            raise refuse(
                str(layer),
                f"no layer before it proves which of the {len(self.have) - 1} axes holds the "
                f"channels, so the order for layout={self.layout!r} is not known",
                "give layout='source' to keep the input's axes as they are",
            )

    def _einsum(self, layer: Layer, row: Row, fields: dict[str, Any]) -> None:
        """Its equation counts the axes of the source, whose order the target takes."""
        place = str(layer)
        if self.have is None and "..." in fields["equation"]:
            raise refuse(place, "the rank of its input is not known", "give input_shape=")
        try:
            rank = None if self.have is None else len(self.have)
            inputs, kernel, output = einsum_axes(fields["equation"], rank)
        except (ValueError, AttributeError) as error:
            raise refuse(place, str(error)) from error
        if self.have is None:
            raise Restart(rank=len(inputs))
        kept = self.have[0] is self.n and output[:1] == inputs[:1] and output[0] not in kernel
        if not kept:
            raise refuse(place, f"equation={fields['equation']!r} does not keep the batch first")
        arrays = moved(row, self.source, self.target, layer, fields, {}, None)
        bound = dict(zip(inputs, self.have, strict=True))
        for name, size in zip(kernel, next(iter(arrays.values())).shape, strict=True):
            if bound.setdefault(name, Axis(size)).size not in (None, size):
                raise refuse(place, f"its kernel has {size} at {name!r}, found {bound[name].size}",
                             "check input_shape= and the layers before it")  # fmt: skip
        if len(self.have) > 2 or len(output) > 2:
            self._check_proven(layer)
        self._arrange(list(self.have), layer.name)
        self._emit(row, layer.name, fields, At(place, ()), arrays)
        self.have = [bound[name] for name in output]
        self.want = list(self.have)

    def _flatten(self, layer: Layer, row: Row, fields: dict[str, Any], consumed: bool) -> None:
        start, end = fields["start"], fields["end"]
        if self.have is None or self.want is None:
            self._check_proven(layer)
            if (start, end) != (1, -1):
                raise refuse(str(layer), "the rank of its input is not known", "give input_shape=")
            self._emit(row, layer.name, fields, At(str(layer), ()))
            self.n, flat = Axis(origin=0), Axis()
            self.have, self.want = [self.n, flat], [self.n, flat]
            return
        rank = len(self.have)
        first, last = start % rank, end % rank
        group = self.have[first : last + 1]
        if self.n in group or len(group) < 1:
            raise refuse(str(layer), f"it would merge axes {start} to {end} with the batch axis")
        if len(group) == rank - 1:
            self._check_proven(layer)
        places = sorted(self.want.index(a) for a in group)
        together = places == list(range(places[0], places[0] + len(group)))
        # What comes out flattened keeps the source's order, unless a Dense takes it up.
        in_order = together and [self.want[i] for i in places] == group
        if (len(group) < rank - 1 and not in_order) or (len(group) == rank - 1 and not consumed):
            self._arrange(list(self.have), layer.name)
        sizes = [a.size for a in group]
        known = all(s is not None for s in sizes)
        if self.target == "keras" and not known:
            raise refuse(
                str(layer), "Keras needs the sizes of what it flattens", "give input_shape="
            )
        places = sorted(self.want.index(a) for a in group)
        ordered = [self.want[i] for i in places]
        axis = Axis(
            math.prod(s for s in sizes if s is not None) if known else None,
            source=atoms(group, "source"),
            target=atoms(ordered, "target"),
        )
        begin = places[0]
        new = [*self.want[:begin], axis, *self.want[begin + len(group) :]]
        if len(group) == rank - 1:
            self._emit(row, layer.name, {"start": 1, "end": -1}, At(str(layer), ()))
        elif self.target == "keras":
            shape = tuple(-1 if a.size is None else a.size for a in new[1:])
            self._emit(table.RESHAPE, layer.name, {"shape": shape}, At(str(layer), ()))
        else:
            stop = begin + len(group) - 1
            at = At(str(layer), ())
            self._emit(row, layer.name, {"start": begin, "end": -1 if stop == rank - 1 else stop},
                       at)  # fmt: skip
        self.have = [*self.have[:first], axis, *self.have[last + 1 :]]
        self.want = new

    def _permute(self, layer: Layer, dims: tuple[int, ...]) -> None:
        """Only the source's order changes; the target follows when a layer needs it to."""
        numbers = all(isinstance(d, int) for d in dims)
        if not dims or not numbers or sorted(dims) != list(range(len(dims))):
            raise refuse(str(layer), f"dims={dims!r} must be an order of all axes")
        if dims[0] != 0 and not layer.fused and self.layout != "source":
            raise refuse(
                str(layer),
                f"dims={dims!r} moves the batch, so where the ends have it is not known",
                "give layout='source' to keep them as they are",
            )
        if self.have is None:
            raise Restart(rank=len(dims))
        if len(dims) != len(self.have):
            raise refuse(str(layer), f"dims={dims!r} does not fit rank {len(self.have)}")
        if dims[0] != 0 and not layer.fused and self.target == "keras":
            raise refuse(str(layer), "the batch axis would have to move, which Keras can't do")
        together = self.have == self.want
        self.have = [self.have[d] for d in dims]
        if dims[0] != 0 and self.n is not self.have[0] and not self.batch:
            # The layer after it takes the batch first, so that is what this axis is.
            if self.have[0].origin is None:
                raise refuse(str(layer), "it takes another axis as the batch than those before it")
            raise Restart(batch=self.have[0].origin)
        if layer.fused:
            return
        if together and CONVENTION[self.source] == CONVENTION[self.target] == "channels_last":
            self._emit(table.PERMUTE, layer.name, {"dims": dims}, At(str(layer), ()))
            self.want = list(self.have)
        else:
            self.permute_name = layer.name

    def _reshape(self, layer: Layer, row: Row, fields: dict[str, Any]) -> None:
        shape, dim = list(fields["shape"]), fields.get("dim")
        if dim is None or self.have is None or len(self.have) == 2:
            self._check_proven(layer)
        kept: tuple[list[Axis], list[Axis]] = ([], [])
        if self.have is not None:
            self._arrange(list(self.have), layer.name)
            rest = [a.size for a in self.have[1:]]
            if dim is not None:  # one axis is split, the others stay
                dim = dim % len(self.have)
                if self.have[dim] is self.n:
                    raise refuse(str(layer), "it would split the batch axis")
                rest = [self.have[dim].size]
                kept = self.have[1:dim], self.have[dim + 1 :]
            if all(s is not None for s in rest):
                total = math.prod(s for s in rest if s is not None)
                if -1 in shape:
                    shape[shape.index(-1)] = total // max(-math.prod(shape), 1)
                if math.prod(shape) != total:
                    raise refuse(
                        str(layer), f"shape={fields['shape']} does not hold {total} values"
                    )
        rank = None if self.have is None else len(self.have)
        batch = Axis(origin=0) if self.have is None else self.have[0]
        around = [[-1 if a.size is None else a.size for a in part] for part in kept]
        full = (*around[0], *shape, *around[1])
        if sum(s < 0 for s in full) > 1:
            raise refuse(str(layer), "more than one size is not known", "give input_shape=")
        self._emit(row, layer.name, {"shape": full}, At(str(layer), (), rank=rank))
        new = [Axis(s if s >= 0 else None) for s in shape]
        self.have = [batch, *kept[0], *new, *kept[1]]
        self.want = list(self.have)
        self.n = batch


def _entries(value: Any) -> int | None:
    return len(value) if isinstance(value, list | tuple) else None
