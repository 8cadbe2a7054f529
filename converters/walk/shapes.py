"""The layers that only say in which order values stand: Flatten, Reshape, Permute and their like.

Flatten makes one axis that keeps its factors, ordered in each framework's way.
"""

import math
from collections.abc import Mapping
from typing import Any

from fwt import layers as fl
from fwt.converters.rows import table
from fwt.converters.rows.row import (
    At,
    AxesSetting,
    AxisSetting,
    Framework,
    Layer,
    Row,
    refuse,
)
from fwt.converters.walk.arrays import moved
from fwt.converters.walk.axis import Axis, atoms
from fwt.converters.walk.write import Writer
from fwt.layers.einsum import einsum_axes

CONVENTION = {"torch": "channels_first", "keras": "channels_last", "flax": "channels_last"}


class Restart(Exception):  # noqa: N818 - it is no error, but how the walk starts again
    """The walk learned how its inputs look, and starts again with that."""

    def __init__(self, what: str, learned: Mapping[Any, int]):
        self.what, self.learned = what, dict(learned)  # by the number of the input


class Shapes(Writer):
    """Reads the axes of the value that a layer takes, and writes what only moves them."""

    def __init__(
        self, source: Framework, target: Framework, layout: str, channel: Mapping[int, int],
        batch: Mapping[int, int],
    ):  # fmt: skip
        super().__init__(target)
        self.source, self.layout = source, layout
        self.channel, self.batches = channel, batch
        self.lines = set[int]()  # inputs of one axis beside the batch, which none can move
        # By layer, the order of the axes that it takes; that which it is to have; see ``Net``.
        self.orders: dict[str, tuple[int, ...] | None] = {}
        self.told: Mapping[str, tuple[int, ...] | None] = {}

    @property
    def batch(self) -> bool:
        """Whether an input that the value follows from has its batch elsewhere than first."""
        return any(self.batches.get(i) for i in self.roots)

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
        roots = {i for a in self.have if a is not self.n for i, _ in a.origin}
        proven = any(a.channel for a in self.have) or roots <= {
            *self.channel, *self.batches, *self.lines}  # fmt: skip
        if len(self.have) > 2 and not proven:
            raise refuse(
                str(layer),
                f"no layer before it proves which of the {len(self.have) - 1} axes holds the "
                f"channels, so the order for layout={self.layout!r} is not known",
                "give layout='source' to keep the input's axes as they are",
            )

    def _as_told(self, layer: Layer) -> None:
        """Brings the axes into the order in which the model of torch had them that the weights of a
        layer are of, so that these are the same again."""
        if layer.name not in self.told or self.have is None:
            return
        order = self.told[layer.name]
        if order is None or len(order) != len(self.have):
            raise refuse(
                str(layer),
                "the order in which torch had the axes that its weights count does not come back",
                "module.clone(sidecar='') gives the same outputs, with weights in another order",
            )
        if self.have[0] is self.n:
            self._arrange([self.have[i] for i in order], layer.name)

    def _note(self, layer: Layer) -> None:
        """Notes where the axes that a layer takes are in the target."""
        if self.have is not None and self.want is not None and self.have[0] is self.n:
            self.orders[layer.name] = tuple(self.want.index(a) for a in self.have)

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
            raise Restart("rank", dict.fromkeys(self.roots, len(inputs)))
        kept = self.have[0] is self.n and output[:1] == inputs[:1] and output[0] not in kernel
        if not kept:
            raise refuse(place, f"equation={fields['equation']!r} does not keep the batch first")
        arrays = moved(row, self.source, self.target, layer, fields, {}, None, self.dry)
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
            self.n, flat = Axis(), Axis()
            self.have, self.want = [self.n, flat], [self.n, flat]
            return
        rank = len(self.have)
        first, last = start % rank, end % rank
        group = self.have[first : last + 1]
        if len(group) == rank and self._is_alone():
            self._alone(layer)
            return
        if self.n in group or len(group) < 1:
            raise refuse(str(layer), f"it would merge axes {start} to {end} with the batch axis")
        several = [a for a in group if a.size != 1]
        whole = len(group) == rank - 1 and len(several) > 1
        if whole:
            self._check_proven(layer)
            self._as_told(layer)
        places = sorted(self.want.index(a) for a in group)
        together = places == list(range(places[0], places[0] + len(group)))
        # What comes out flattened keeps the source's order, unless a Dense takes it up.
        in_order = together and [self.want[i] for i in places] == group
        if len(group) == rank - 1:
            in_order = consumed or [a for a in self.want if a in several] == several
        if not in_order:
            self._arrange(list(self.have), layer.name)
        if whole:
            self._note(layer)
        sizes = [a.size for a in group]
        known = all(s is not None for s in sizes)
        if self.whole_keras and not known:
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
        if len(several) < 2:  # the one axis that holds more than one entry stays what it is
            axis = several[0] if several else Axis(1)
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
        alone = self.have is not None and self.n is None  # an array of the model, without a batch
        moves = dims[0] != 0 and not alone
        if moves and not layer.fused and self.layout != "source":
            raise refuse(
                str(layer),
                f"dims={dims!r} moves the batch, so where the ends have it is not known",
                "give layout='source' to keep them as they are",
            )
        if self.have is None:
            raise Restart("rank", dict.fromkeys(self.roots, len(dims)))
        if len(dims) != len(self.have):
            raise refuse(str(layer), f"dims={dims!r} does not fit rank {len(self.have)}")
        if moves and not layer.fused and self.target == "keras":
            raise refuse(str(layer), "the batch axis would have to move, which Keras can't do")
        together = self.have == self.want
        self.have = [self.have[d] for d in dims]
        if moves and self.n is not self.have[0] and not self.batch:
            # The layer after it takes the batch first, so that is what this axis is.
            new = dict(self.have[0].origin)
            if not new or set(new) & set(self.batches):
                raise refuse(str(layer), "it takes another axis as the batch than those before it")
            raise Restart("batch", new)
        if layer.fused:
            return
        if alone:
            self._arrange(list(self.have), layer.name)
        elif together and CONVENTION[self.source] == CONVENTION[self.target] == "channels_last":
            self._emit(table.PERMUTE, layer.name, {"dims": dims}, At(str(layer), ()))
            self.want = list(self.have)
        else:
            self.permute_name = layer.name

    def _is_alone(self) -> bool:
        """Whether each example of the value is one number."""
        if self.have is None or not any(a is self.n for a in self.have):
            return False
        return all(a is self.n or a.size == 1 for a in self.have)

    def _alone(self, layer: Layer) -> None:
        """Writes what leaves the batch alone, (n,)."""
        place = At(str(layer), ())
        if self.target == "torch":
            self._emit(table.FLATTEN, layer.name, {"start": 0, "end": -1}, place)
        else:
            self._emit(table.RESHAPE, layer.name, {"shape": ()}, place)
        self.have = [a for a in self.have or () if a is self.n]
        self.want = list(self.have)

    def _only_ones(self, layer: Layer, row: Row, shape: list[int], dim: int | None) -> bool:
        """Writes a reshape that adds or drops axes of size 1 alone, so that the others stay what
        they are, in the target's order; tells whether it was one."""
        if self.have is None or self.want is None or self.have[0] is not self.n:
            return False
        axes = self.have[1:]
        if dim is not None:
            at = dim % len(self.have) - 1
            if at < 0:
                return False
            before, after = ([a.size or 0 for a in part] for part in (axes[:at], axes[at + 1 :]))
            shape = [*before, *shape, *after]
        old = [a for a in axes if a.size != 1]
        new = [s for s in shape if s != 1]
        if len(old) != len(new) or len(shape) == len(axes):
            return False
        if any(s > 0 and a.size != s for a, s in zip(old, new, strict=True)) or new.count(-1) > 1:
            return False
        left = iter(old)
        have = [self.n, *(Axis(1) if s == 1 else next(left) for s in shape)]
        moves = [a for a in self.want if a in old] != old
        image = len(have) > 3 and CONVENTION[self.source] != CONVENTION[self.target]
        if moves or image:  # where the target's images have them
            ones = [a for a in have if a.size == 1 and a is not self.n]
            rest = [a for a in self.want if a in old]
            first = CONVENTION[self.target] == "channels_last"
            want = [self.n, *(ones if first else rest), *(rest if first else ones)]
        else:
            want = list(have)
        full = tuple(-1 if a.size is None else a.size for a in want[1:])
        if full.count(-1) > 1:
            return False
        rank, at_ = len(self.want), str(layer)
        self.have, self.want = have, want
        if len(have) == 2:
            self._emit(table.FLATTEN, layer.name, {"start": 1, "end": -1}, At(at_, ()))
        else:
            self._emit(row, layer.name, {"shape": full}, At(at_, (), rank=rank))
        return True

    def _slice(self, layer: Layer, row: Row, fields: dict[str, Any]) -> None:
        """Some of the entries along an axis, which is another axis then."""
        place = str(layer)
        self._bind_axis_settings(row, fields, {}, place)
        axis = fields["axis"]
        if self.have is None or self.want is None or not isinstance(axis, Axis):
            raise refuse(place, "the rank of its input is not known", "give input_shape=")
        if axis.size is None or axis.scrambled:
            raise refuse(place, "the size of the axis that it cuts is not known",
                         "give input_shape=")  # fmt: skip
        start, stop, step = slice(fields["start"], fields["stop"], fields["step"]).indices(
            axis.size
        )
        size = len(range(start, stop, step))
        if step < 1 or not size:
            raise refuse(place, f"it takes {start} to {stop} by {step} of {axis.size}")
        new = Axis(size, axis.origin, axis.channel, axis.spatial)
        self.have = [new if a is axis else a for a in self.have]
        self.want = [new if a is axis else a for a in self.want]
        # What counts from the end does so at any size.
        fields = {**fields, "axis": new, "start": fields["start"] or 0}
        self._emit(row, layer.name, fields, At(place, (), rank=len(self.have)))

    def _reshape(self, layer: Layer, row: Row, fields: dict[str, Any]) -> None:
        shape, dim = list(fields["shape"]), fields.get("dim")
        if not shape and self._is_alone():
            self._alone(layer)
            return
        if self._only_ones(layer, row, shape, dim):
            return
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
        batch = Axis() if self.have is None else self.have[0]
        around = [[-1 if a.size is None else a.size for a in part] for part in kept]
        full = (*around[0], *shape, *around[1])
        if sum(s < 0 for s in full) > 1:
            raise refuse(str(layer), "more than one size is not known", "give input_shape=")
        self._emit(row, layer.name, {"shape": full}, At(str(layer), (), rank=rank))
        new = [Axis(s if s >= 0 else None) for s in shape]
        self.have = [batch, *kept[0], *new, *kept[1]]
        self.want = list(self.have)
        self.n = batch
