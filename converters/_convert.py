"""The one algorithm that walks the rows: any framework -> Flax -> any framework.

It carries the axes of the tensor between layers twice: as the source orders them and as the
target does. A layer that needs another order in the target gets a transposition before it; a
parameter that indexes an axis is permuted by comparing the two orders. Flatten makes one axis
that keeps its factors, ordered in each framework's way.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from fwt.converters import _layers
from fwt.converters._axis import Axis, atoms, permuted, place_channel
from fwt.converters._row import (
    STATE,
    Around,
    At,
    AxisSetting,
    Framework,
    Layer,
    P,
    Row,
    Size,
    Take,
    flax_default,
    letter_sizes,
    order,
    output_shape,
    read_settings,
    refuse,
    same,
)

from fwt import layers as fl
from fwt._types import ConversionError

Layout = Literal["channels_last", "channels_first", "source"]
CONVENTION = {"torch": "channels_first", "keras": "channels_last", "flax": "channels_last"}
LAYOUTS = ("channels_last", "channels_first", "source")


class _Restart(Exception):  # noqa: N818 - not an error: the walk learned how the input looks
    def __init__(self, rank: int | None = None, channel: int | None = None):
        self.rank, self.channel = rank, channel


def convert(
    layers: Sequence[Layer],
    source: Framework,
    target: Framework,
    input_shape: Sequence[int | None] | None,
    layout: str,
) -> tuple[list[Layer], tuple[int | None, ...] | None]:
    """The layers of ``source`` as layers of ``target``, and the shape of its input."""
    if layout not in LAYOUTS:
        raise ConversionError(f"layout must be one of {', '.join(LAYOUTS)}, found {layout!r}")
    if layout == CONVENTION[source]:
        layout = "source"  # the ends are as they should be already
    if input_shape is not None and not isinstance(input_shape, list | tuple):
        raise ConversionError(
            f"input_shape is a tuple without the batch axis, such as (3, 32, 48), "
            f"found {input_shape!r}"
        )
    shape = None if input_shape is None else tuple(input_shape)
    if shape is not None and any(
        s is not None and (not isinstance(s, int) or isinstance(s, bool) or s < 1) for s in shape
    ):
        raise ConversionError(f"input_shape={shape}: expected sizes of at least 1, or None")
    rank = None if shape is None else len(shape) + 1
    channel = None
    # Each restart fixes the rank or the channel axis, so three rounds settle both.
    for _ in range(3):
        try:
            return _Walk(source, target, shape, rank, channel, layout).run(layers)
        except _Restart as learned:
            rank = rank if learned.rank is None else learned.rank
            channel = channel if learned.channel is None else learned.channel
    raise AssertionError("the walk did not settle")


_NON_NEGATIVE = (fl.ReLU, fl.ReLU6, fl.Sigmoid, fl.HardSigmoid, fl.Softmax, fl.Exponential)
_KEEPS_SIGN = (fl.MaxPool, fl.AvgPool, fl.GlobalAvgPool, fl.GlobalMaxPool, fl.Identity, fl.ZeroPad)


class _Walk:
    """One pass over the layers. ``have`` and ``want`` are the axes in the source's and in the
    target's order; both are None while the rank is unknown, when every order stays as it is."""

    def __init__(
        self,
        source: Framework,
        target: Framework,
        shape: tuple[int | None, ...] | None,
        rank: int | None,
        channel: int | None,
        layout: str,
    ):
        self.source, self.target, self.layout = source, target, layout
        self.channel = channel
        self.out: list[Layer] = []
        self.taken: set[str] = set()
        self.permute_name: str | None = None
        self.non_negative = False
        self.have: list[Axis] | None = None
        self.want: list[Axis] | None = None
        if rank is not None:
            sizes = (None,) * (rank - 1) if shape is None else shape
            if len(sizes) != rank - 1:
                raise ConversionError(
                    f"input_shape={shape} has {len(sizes)} axes, but the model takes {rank - 1} "
                    "(the batch axis is left out)"
                )
            self.have = [Axis(size, origin) for origin, size in enumerate((None, *sizes))]
            self.want = self._laid_out(self.have, channel)
        self.input = self.want

    def _laid_out(self, axes: list[Axis], channel: int | None) -> list[Axis]:
        if self.layout == "source" or channel is None:
            return list(axes)
        return place_channel(axes, channel, self.layout)

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
        if row.kind == "flatten":
            read_settings(row, self.source, layer, At(place, ()))
            self._flatten(layer, row, self._consumed(following))
            return
        if row.kind == "permute":
            self._permute(layer, read_settings(row, self.source, layer, At(place, ()))["dims"])
            return
        if row.kind == "reshape":
            rank = None if self.have is None else len(self.have)
            self._reshape(
                layer, row, read_settings(row, self.source, layer, At(place, (), rank=rank))
            )
            return
        left, right = row.spec(self.source)
        bound = self._bind(place, left, self.have)
        spatial = tuple(bound[x].size for x in left if x in "hwd" and x in bound)
        at = At(place, spatial, self.non_negative)
        fields = dict(given) if given is not None else read_settings(row, self.source, layer, at)
        self._bind_axis_settings(row, fields, bound, place)
        self._prove(row, bound)
        sizes = self._sizes(row, layer, fields, bound)
        self._arrange_for(row, bound, layer.name)
        arrays = self._arrays(row, layer, fields, bound)
        new = self._advance(row, fields, bound, sizes, right, layer)
        self._emit(row, layer.name, fields, at, arrays, sizes)
        self.have, self.want = new
        if row.flax in _NON_NEGATIVE:
            self.non_negative = True
        elif row.flax not in _KEEPS_SIGN:
            self.non_negative = False

    def _row(self, layer: Layer) -> tuple[Row, Mapping[str, Any] | None]:
        """The row of a layer, and its fields where the class alone settles them."""
        if self.source == "keras" and layer.kind == "Activation":
            name = layer.settings.get("activation")
            row = _layers.row_of_function(name) if isinstance(name, str) else None
            if row is None or row.function is None:
                raise refuse(str(layer), f"activation={name!r} has no row")
            take = Take(str(layer), "keras", layer.settings, {})
            take("activation")
            take.check_all_taken()
            return row, row.function[1]
        rows = _layers.rows_of(self.source, layer.kind)
        if not rows:
            raise refuse(
                str(layer),
                f"the {self.source} layer {layer.kind!r} is not known, so it can't be converted",
            )
        if self.have is None:
            ranks = {r for row in rows for r in row.ranks}
            if len(ranks) == 1:
                raise _Restart(rank=ranks.pop())
            return rows[0], None
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

    def _bind_axis_settings(
        self, row: Row, fields: dict[str, Any], bound: dict[str, Axis], place: str
    ) -> None:
        """Axis numbers become axes, so that they cross."""
        for setting in row.settings:
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
            if not -len(self.have) <= number < len(self.have):
                raise refuse(
                    place,
                    f"{setting.flax}={number} is no axis of an input of rank {len(self.have)}",
                )
            axis = self.have[number]
            if axis is self.have[0]:
                raise refuse(place, f"{setting.flax}={number} is the batch axis")
            fields[setting.flax] = axis
            if setting.letter:
                bound[setting.letter] = axis

    def _prove(self, row: Row, bound: dict[str, Axis]) -> None:
        if row.channel is None or row.channel not in bound:
            return
        axis = bound[row.channel]
        if self.source != "torch" and self.have is not None and axis is not self.have[-1]:
            return  # a BatchNorm over another axis than the last says nothing of images
        axis.channel = True
        if axis.origin and self.channel is None and self.layout != "source":
            raise _Restart(channel=axis.origin)

    def _arrange_for(self, row: Row, bound: dict[str, Axis], name: str) -> None:
        """Brings the target's axes into the order that its layer takes."""
        left, _ = row.spec(self.target)
        if self.want is None or not left:
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
        self._arrange(order, name)

    def _arrange(self, order: list[Axis], name: str) -> None:
        assert self.want is not None
        if order == self.want:
            return
        dims = tuple(self.want.index(a) for a in order)
        if dims[0] != 0:
            raise refuse(name, "the batch axis would have to move")
        # A transposition of the source that waited until now keeps its name.
        label = self.permute_name or self._fresh(f"{name}__permute")
        self.permute_name = None
        self._emit(_layers.PERMUTE, label, {"dims": dims}, At(name, ()))
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

    def _arrays(
        self, row: Row, layer: Layer, fields: dict[str, Any], bound: dict[str, Axis]
    ) -> dict[str, Any]:
        """The arrays under the target's names and in its axes."""
        left = dict(layer.arrays)
        for name in STATE[self.source]:
            left.pop(name, None)
        new: dict[str, Any] = {}
        missing: list[P] = []
        for p in row.params:
            name, letters = p.of(self.source)
            if p.when is not None and not fields[p.when]:
                if self.source == "torch" or self.target != "torch":
                    continue
                missing.append(p)
                continue
            if name not in left:
                raise refuse(
                    str(layer), f"the array {name!r} is missing", f"found {sorted(layer.arrays)}"
                )
            value = left.pop(name)
            target_name, target_letters = p.of(self.target)
            value = np.transpose(value, order(letters, target_letters, np.ndim(value)))
            for index, letter in enumerate(target_letters):
                axis = bound.get(letter)
                if axis is not None and axis.scrambled:
                    given = value
                    value = permuted(value, index, axis, str(layer))
                    self._report_groups(layer, given, value, index)
            new[target_name] = np.array(value, order="C")  # a copy: the source may live on
        for p in missing:
            if p.fill is not None and any(fields[q.when] for q in row.params if q.when):
                like = next(q for q in row.params if q.when is None).of("torch")[0]
                new[p.of("torch")[0]] = np.full_like(new[like], p.fill)
        if left:
            raise refuse(
                str(layer),
                f"the array {sorted(left)[0]!r} is not known to this layer",
                f"it has {sorted(p.of(self.source)[0] for p in row.params)}",
            )
        names = [p.of(self.target)[0] for p in row.params]
        return {n: new[n] for n in names if n in new}

    def _report_groups(self, layer: Layer, given: Any, value: Any, index: int) -> None:
        """Warns where zeros that were n:m along the inputs are so no longer in the new order."""
        for n, m in ((1, 4), (2, 4), (1, 2), (4, 8)):
            if value.ndim < 2 or value.shape[index] % m:
                continue
            most = [
                np.count_nonzero(np.moveaxis(x, index, -1).reshape(-1, m), axis=1).max(initial=0)
                for x in (given, value)
            ]
            if most[0] <= n < most[1]:
                order = "chw" if self.target == "torch" else "hwc"
                warnings.warn(
                    f"{layer}: its kernel is {n}:{m} sparse, but no longer in the order in which "
                    f"{self.target} counts the inputs behind a Flatten: prune it with "
                    f"fwt.patterns.n_m({n}, {m}, order={order!r}) for that",
                    stacklevel=2,
                )
                return

    def _advance(
        self,
        row: Row,
        fields: dict[str, Any],
        bound: dict[str, Axis],
        sizes: dict[str, int],
        right: list[str],
        layer: Layer,
    ) -> tuple[list[Axis] | None, list[Axis] | None]:
        """The axes after the layer, in both orders."""
        if self.have is None or self.want is None:
            return None, None
        if not right:
            return self.have, self.want
        left, _ = row.spec(self.source)
        after: dict[str, Axis] = {}
        old: dict[int, Axis] = {}
        spatial = [x for x in left if x in ("h", "w", "d")]
        for letter in right:
            if letter == "o":
                before = bound["i"]
                after[letter] = Axis(sizes["o"], None, before.channel or row.channel is not None)
                old[id(before)] = after[letter]
            elif letter in spatial:
                after[letter] = Axis(None, bound[letter].origin)
                old[id(bound[letter])] = after[letter]
        if spatial and spatial[0] in right:
            letters = row.spec("flax")[0][1:]
            shape = output_shape(row, fields, [bound[x].size for x in letters], str(layer))
            for letter in spatial:
                after[letter].size = shape[letters.index(letter)]
        if fields.get("keepdims"):
            for letter in spatial:
                old[id(bound[letter])] = Axis(1)
        elif spatial and spatial[0] not in right:
            gone = {id(bound[x]) for x in spatial}
            return (
                [a for a in self.have if id(a) not in gone],
                [a for a in self.want if id(a) not in gone],
            )
        return (
            [old.get(id(a), a) for a in self.have],
            [old.get(id(a), a) for a in self.want],
        )

    # -- the shape layers ---------------------------------------------------------------------

    def _consumed(self, following: Sequence[Layer]) -> bool:
        """Whether a Dense takes up the flattened axis, so that its kernel can be permuted."""
        for layer in following:
            rows = _layers.rows_of(self.source, layer.kind)
            if rows and rows[0].kind:
                return False
            if rows and "o" in rows[0].spec(self.source)[1]:
                return True
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
        proven = self.channel is not None or any(a.channel for a in self.have)
        if len(self.have) > 2 and any(a.origin for a in self.have[1:]) and not proven:
            raise refuse(
                str(layer),
                f"no layer before it proves which of the {len(self.have) - 1} axes holds the "
                f"channels, so the order for layout={self.layout!r} is not known",
                "give layout='source' to keep the input's axes as they are",
            )

    def _flatten(self, layer: Layer, row: Row, consumed: bool) -> None:
        self._check_proven(layer)
        if self.have is None or self.want is None:
            axis = Axis()
        else:
            rest = [a.size for a in self.have[1:]]
            known = all(s is not None for s in rest)
            if self.target == "keras" and not known:
                raise refuse(
                    str(layer), "Keras needs the sizes of what it flattens", "give input_shape="
                )
            if not consumed:  # what comes out flattened keeps the source's order
                self._arrange(list(self.have), layer.name)
            axis = Axis(
                math.prod(s for s in rest if s is not None) if known else None,
                channel=False,
                source=atoms(self.have[1:], "source"),
                target=atoms(self.want[1:], "target"),
            )
        self._emit(row, layer.name, {}, At(str(layer), ()))
        batch = Axis(origin=0) if self.have is None else self.have[0]
        self.have, self.want = [batch, axis], [batch, axis]

    def _permute(self, layer: Layer, dims: tuple[int, ...]) -> None:
        """Only the source's order changes; the target follows when a layer needs it to."""
        if sorted(dims) != list(range(len(dims))) or dims[0] != 0:
            raise refuse(
                str(layer), f"dims={dims!r} must be an order of all axes that keeps the batch first"
            )
        if self.have is None:
            raise _Restart(rank=len(dims))
        if len(dims) != len(self.have):
            raise refuse(str(layer), f"dims={dims!r} does not fit rank {len(self.have)}")
        together = self.have == self.want
        self.have = [self.have[d] for d in dims]
        if together and CONVENTION[self.source] == CONVENTION[self.target] == "channels_last":
            self._emit(_layers.PERMUTE, layer.name, {"dims": dims}, At(str(layer), ()))
            self.want = list(self.have)
        else:
            self.permute_name = layer.name

    def _reshape(self, layer: Layer, row: Row, fields: dict[str, Any]) -> None:
        shape = list(fields["shape"])
        self._check_proven(layer)
        if self.have is not None:
            self._arrange(list(self.have), layer.name)
            rest = [a.size for a in self.have[1:]]
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
        self._emit(row, layer.name, {"shape": tuple(shape)}, At(str(layer), (), rank=rank))
        self.have = [batch, *(Axis(s if s >= 0 else None) for s in shape)]
        self.want = list(self.have)

    # -- writing ------------------------------------------------------------------------------

    def _fresh(self, name: str) -> str:
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        return name

    def _emit(
        self,
        row: Row,
        name: str,
        fields: dict[str, Any],
        at: At,
        arrays: dict[str, Any] | None = None,
        sizes: Mapping[str, int] | None = None,
    ) -> None:
        """Appends the layer in the target's terms, with what it needs around it."""
        settings: dict[str, Any] = {}
        numbers = dict(fields)
        for setting in row.settings:
            if isinstance(setting, Size):
                if self.target == "torch":
                    if sizes is None or setting.letter not in sizes:
                        raise refuse(at.place, f"{setting.torch} is not known", "give input_shape=")
                    settings[setting.torch] = sizes[setting.letter]
                continue
            value, key = fields[setting.flax], setting.name(self.target)
            if isinstance(setting, AxisSetting):
                if isinstance(value, Axis):
                    assert self.want is not None
                    value = self.want.index(value)
                    value = -1 if value == len(self.want) - 1 else value
                numbers[setting.flax] = value
                if self.target == "torch" and setting.torch_fixed is not None:
                    if self.want is None and value != setting.torch_fixed:
                        raise refuse(
                            at.place,
                            f"{setting.flax}={value} on an input of unknown rank",
                            "give input_shape= (without the batch axis)",
                        )
                    continue
            elif key is None:
                if not same(value, flax_default(row, setting.flax)):
                    raise refuse(at.place, f"{self.target} can't say {setting.flax}={value!r}")
                continue
            elif self.target == "torch" and setting.torch_io:
                value = setting.torch_io[1](value)
            if key is not None:
                settings[key] = value
        kind = row.class_in(self.target)
        around = row.special.write(self.target, fields, settings, at)
        if self.target == "keras" and row.function is not None:
            function, stands_for = row.function
            if all(same(numbers[k], v) for k, v in stands_for.items()):
                kind, settings = "Activation", {"activation": function}
        if kind is None:
            raise refuse(
                at.place,
                f"{self.target} has no {row.flax.__name__ if row.flax else 'such layer'}"
                + (f" with {numbers}" if numbers else ""),
            )
        for extra in around:
            if extra.before:
                self._emit_around(extra, name, at)
        bad = {"torch": ".", "keras": "/"}.get(self.target)
        if not name or (bad and bad in name):
            raise refuse(at.place, f"{name!r} can't be the name of a {self.target} layer")
        if self.target == "keras" and "data_format" in row.keras_defaults:
            settings["data_format"] = "channels_last"  # whatever the user's keras.json says
        self.out.append(Layer(name, kind, settings, arrays or {}))
        for extra in around:
            if not extra.before:
                self._emit_around(extra, name, at)

    def _emit_around(self, extra: Around, name: str, at: At) -> None:
        row = _layers.rows_of("flax", extra.flax.__name__)[0]
        self._emit(row, self._fresh(name + extra.suffix), dict(extra.fields), at)
