"""Layers in the target's terms, with what they need around them."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fwt._types import ConversionError
from fwt.converters.rows import table
from fwt.converters.rows.row import (
    Around,
    At,
    AxesSetting,
    AxisSetting,
    Framework,
    Layer,
    Row,
    Size,
    flax_default,
    refuse,
    same,
)
from fwt.converters.walk.axis import Axis, Value

_BUFFER = {"flax": "Buffer", "torch": "PersistentBuffer", "keras": "Buffer"}


def reindex(made: Layer, change: Callable[[Any], Any], target: Framework) -> None:
    """Has an array between layers stand in another order or shape. One that a state dict holds is
    kept as other files of the model have it, and its positions are turned instead; Keras has no
    layer for these."""
    (value,) = made.arrays.values()
    whole = {"Indexed": "Parameter", "IndexedBuffer": _BUFFER[target]}
    kept = next((kind for kind, plain in whole.items() if plain == made.kind), None)
    if kept is not None and target != "keras":
        made.kind, made.settings = kept, {**made.settings, "table": value}
        value = np.arange(value.size, dtype=np.int32).reshape(value.shape)
    value = np.asarray(change(value), order="C")
    table = made.settings.get("table")
    every = np.array_equal(value.reshape(-1), np.arange(value.size))
    if table is not None and table.shape == value.shape and every:
        made.kind, value = whole[made.kind], table
        made.settings = {k: v for k, v in made.settings.items() if k != "table"}
    made.arrays = dict.fromkeys(made.arrays, value)
    made.settings = {**made.settings, "shape": value.shape}


class Writer:
    """What is written so far, and the value that the next layer takes (see :class:`Value`)."""

    arrays_only = False  # what has none is left out where the target can't say it
    dry = False  # the arrays are not copied, since only what is noted of the axes is asked for

    def __init__(self, target: Framework):
        self.target = target
        self.out: list[Layer] = []
        self.taken: set[str] = set()
        self.shapes: dict[str, tuple[int | None, ...]] = {}  # of what the target's layers give
        self.turned: dict[Any, str] = {}  # by what was turned and how, the transposition
        self.several: set[str] = set()  # what more than one layer takes
        self._load(Value(()))

    def _load(self, value: Value) -> None:
        """Makes a value the one that the next layer takes."""
        self.tips, self.roots, self.dtype = value.tips, value.roots, value.dtype
        self.have, self.want, self.n = value.have, value.want, value.n
        self.non_negative, self.permute_name = value.non_negative, value.permute_name

    def _saved(self) -> Value:
        if self.want is not None and len(self.tips) == 1:
            self.shapes[self.tips[0]] = tuple(a.size for a in self.want[1:])
        return Value(self.tips, self.have, self.want, self.n, self.non_negative,
                     self.permute_name, self.roots, self.dtype)  # fmt: skip

    def _arrange(self, order: list[Axis], name: str) -> None:
        """Brings the target's axes into an order, by a transposition if need be."""
        assert self.want is not None
        if order == self.want:
            return
        dims = tuple(self.want.index(a) for a in order)
        made = next((x for x in reversed(self.out) if x.name == self.tips[0]), None)
        own = made is not None and not made.inputs and made.name not in self.several
        if self.n is None and made is not None and own:  # is turned itself
            reindex(made, lambda value: value.transpose(dims), self.target)
            self.want = list(order)
            return
        if self.n is None and dims[0] != 0 and self.whole_keras:
            what = made.name if made is not None and not made.inputs else "an array of the model"
            raise refuse(
                name,
                f"it takes {what} transposed, which another layer takes as it is: layers of Keras "
                "don't share an array so",
                "give each a weight of its own (untie them), or keep the tie in ONNX or torch",
            )
        if dims[0] != 0 and self.whole_keras:
            raise refuse(name, "the batch axis would have to move, which Keras can't do")
        done = (self.tips, dims)
        if done in self.turned:  # another layer took it so before
            self.tips = (self.turned[done],)
        else:
            # A transposition of the source that waited until now keeps its name.
            label = self.permute_name
            if label is None or label in self.turned.values():
                label = self._fresh(f"{label or name}__permute")
            self._emit(table.PERMUTE, label, {"dims": dims}, At(name, ()))
            self.turned[done] = label
        self.permute_name = None
        self.want = list(order)
        self.shapes[self.tips[0]] = tuple(a.size for a in order[1:])

    @property
    def whole_keras(self) -> bool:
        """Whether a model of Keras is written, which needs all sizes."""
        return self.target == "keras" and not self.arrays_only

    def _left_out(self, row: Row) -> bool:
        """Whether a layer of the row, which keeps all axes, is passed over for the arrays."""
        keeps = not row.spec(self.target)[0] and not row.params
        return self.arrays_only and keeps and row.class_in(self.target) is None

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
        try:
            self._append(row, name, fields, at, arrays or {}, sizes)
        except ConversionError:
            if arrays or not self.arrays_only:
                raise
            self.tips = self.tips[:1]

    def _append(
        self,
        row: Row,
        name: str,
        fields: dict[str, Any],
        at: At,
        arrays: dict[str, Any],
        sizes: Mapping[str, int] | None,
    ) -> None:
        settings: dict[str, Any] = {}
        fields = dict(fields)
        for setting in row.settings:
            if isinstance(setting, Size):
                if self.target == "torch":
                    if sizes is None or setting.letter not in sizes:
                        raise refuse(at.place, f"{setting.torch} is not known", "give input_shape=")
                    settings[setting.torch] = sizes[setting.letter]
                continue
            value, key = fields.get(setting.flax), setting.name(self.target)
            if isinstance(setting, AxesSetting):
                shape = next((v.shape for v in arrays.values()), (None,))
                at = dataclasses.replace(at, numbered=shape)
                if self.want is not None:
                    rank = len(self.want)
                    axes = sorted(self.want.index(a) for a in fields[setting.flax])
                    value = tuple(-1 if i == rank - 1 and len(axes) == 1 else i for i in axes)
                    at = dataclasses.replace(at, numbered=tuple(self.want[i].size for i in axes))
                fields[setting.flax] = value
            elif isinstance(setting, AxisSetting):
                if isinstance(value, Axis):
                    assert self.want is not None
                    value = self.want.index(value)
                    value = -1 if value == len(self.want) - 1 else value
                fields[setting.flax] = value
                if self.target == "torch" and setting.torch_fixed is not None:
                    if self.want is None and value != setting.torch_fixed:
                        raise refuse(
                            at.place,
                            f"{setting.flax}={value} on an input of unknown rank",
                            "give input_shape= (without the batch axis)",
                        )
                    continue
            elif key == "":
                continue
            elif key is None:
                if not same(value, flax_default(row, setting.flax)):
                    raise self._lacking(row, at, f"{setting.flax}={value!r}")
                continue
            elif self.target == "torch" and setting.torch_io:
                value = setting.torch_io[1](value)
            if key is not None:
                settings[key] = value
        kind = row.class_in(self.target)
        around = row.special.write(self.target, fields, settings, at)
        if self.target == "keras" and row.function is not None:
            function, stands_for = row.function
            if all(same(fields[k], v) for k, v in stands_for.items()):
                kind, settings = "Activation", {"activation": function}
        layer = Layer(name, kind or "", settings, arrays)
        if self.target == "keras" and "data_format" in row.keras_defaults:
            layer.settings["data_format"] = "channels_last"  # whatever the user's keras.json says
        found = row.special.finish(self.target, layer, fields, sizes or {}, at)
        made = found if isinstance(found, list) else [found]
        for part in made:
            part.dtype = self.dtype
            if part.name != name:
                part.name = self._fresh(part.name)
        if not all(x.kind for x in made):
            said = {k: v for k, v in fields.items() if not isinstance(v, Axis)}
            raise self._lacking(row, at, str(said) if said else "")
        for extra in around:
            if extra.before:
                self._emit_around(extra, name, at)
        for part in made:
            part.inputs, self.tips = self.tips, (part.name,)
            self.out.append(part)
        for extra in around:
            if not extra.before:
                self._emit_around(extra, name, at)

    def _lacking(self, row: Row, at: At, said: str) -> ConversionError:
        reason = row.lacks.get(self.target)
        what = row.flax.__name__ if row.flax else "such layer"
        return refuse(
            at.place,
            f"{self.target} has no {what}" + (f" with {said}" if said else ""),
            reason or "",
        )

    def _emit_around(self, extra: Around, name: str, at: At) -> None:
        row = table.rows_of("flax", extra.flax.__name__)
        rank = {len(v) + 2 for v in extra.fields.values() if isinstance(v, tuple)}
        fitting = [r for r in row if not r.ranks or rank & set(r.ranks)]
        self._emit(fitting[0], self._fresh(name + extra.suffix), dict(extra.fields), at)
