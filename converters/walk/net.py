"""A model as one framework says it: layers that name what they take."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from fwt._graph import INPUT, names_in, renamed, unfit
from fwt._types import ConversionError
from fwt.converters.rows.row import Layer, parts_of

Shape = tuple[int | None, ...] | None


@dataclasses.dataclass
class Net:
    """The layers of a model in an order in which each takes what stands before it.

    Attributes:
        layers: each says in ``inputs`` whose outputs it takes, in ``of`` the layer that it calls
            again (then it has the settings and arrays of that), in ``shape`` what it gives without
            the batch axis, where that is known.
        inputs: by name, the shape of each input of the model without the batch axis, or None.
        outputs: the name of the layer that gives the output, or several in a tuple or a dict.
        takes: the names of the inputs in the form in which the model takes them, like ``outputs``.
        orders: by name of a layer whose weights count several axes of what it takes, where each of
            these axes is in the model that it was converted from, or is to be in one of torch; None
            where that can't be.
        fixed: by name of an input, the sizes without the batch axis that it must have for the
            layers to be those of the model, None where any is right; an input of any size is left
            out.
    """

    layers: list[Layer]
    inputs: dict[str, Shape]
    outputs: Any
    takes: Any = None
    orders: Mapping[str, tuple[int, ...] | None] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, tuple[int | None, ...]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.takes is None:
            names = tuple(self.inputs)
            self.takes = names[0] if len(names) == 1 else names

    @classmethod
    def line(cls, layers: Sequence[Layer], shape: Any = None) -> "Net":
        """The net of layers each of which takes what the one before it gives."""
        start = fresh(INPUT, {x.name for x in layers})
        before, out = start, []
        for layer in layers:
            out.append(dataclasses.replace(layer, inputs=(before,)))
            before = layer.name
        return cls(out, {start: None if shape is None else tuple(shape)}, before)

    @property
    def is_line(self) -> bool:
        """Whether each layer takes what the one before it gives, and the last gives the output."""
        if not isinstance(self.outputs, str) or not isinstance(self.takes, str):
            return False
        before = self.takes
        for layer in self.layers:
            if layer.inputs != (before,) or layer.of:
                return False
            before = layer.name
        return before == self.outputs

    @property
    def shape(self) -> Any:
        """The shape of its input; of several inputs a tuple of shapes."""
        if isinstance(self.takes, str):
            return self.inputs[self.takes]
        shapes = tuple(self.inputs[name] for name in names_in(self.takes))
        return None if all(s is None for s in shapes) else shapes

    def given(self, shape: Any) -> "Net":
        """The net with this shape of its input, or shapes of its inputs; None leaves it."""
        if shape is None:
            return self
        if isinstance(self.takes, str):
            return self._of_shapes(dict.fromkeys(self.inputs, shape))
        if isinstance(shape, Mapping):
            keys = self.takes if isinstance(self.takes, Mapping) else dict.fromkeys(self.inputs)
            shape = [shape.get(key) for key in keys]
        if not isinstance(shape, list | tuple) or len(shape) != len(self.inputs):
            raise ConversionError(
                f"input_shape={shape!r}: expected one shape for each input, "
                f"{', '.join(names_in(self.takes))}"
            )
        places = dict(zip(names_in(self.takes), shape, strict=True))
        return self._of_shapes({n: places[n] for n in self.inputs})

    def _of_shapes(self, shapes: dict[str, Shape]) -> "Net":
        for name, sizes in self.fixed.items():
            if told := unfit(name, shapes[name], sizes):
                raise ConversionError(f"input_shape=: {told}")
        return dataclasses.replace(self, inputs=shapes)

    def readers(self) -> dict[str, list[Layer]]:
        """By name, the layers that take what a layer or an input gives."""
        out: dict[str, list[Layer]] = {}
        for layer in self.layers:
            for name in layer.inputs:
                out.setdefault(name, []).append(layer)
        return out


def nests(layers: Sequence[Layer]) -> bool:
    """Whether the layers of each path stand beside each other, as in models inside each other."""

    def under(entries: list[list[str]]) -> bool:
        names: set[str] = set()
        for first, together in itertools.groupby(entries, key=lambda parts: parts[0]):
            group = [parts[1:] for parts in together]
            if first in names or (len(group) > 1 and not all(group)):
                return False
            names.add(first)
            if group[0] and not under(group):
                return False
        return True

    return under([parts_of(x.name) for x in layers])


def fresh(name: str, taken: Iterable[str]) -> str:
    while name in taken:
        name += "_"
    return name


def folded(net: Net, fold: Callable[[list[Layer]], list[Layer]]) -> Net:
    """The net with each run of layers folded: those that follow each other, where nothing else
    takes what stands between two of them. Of layers that are called several times all calls are
    folded alike, or none."""
    runs = _runs(net)
    made = {run[0].name: fold([dataclasses.replace(x) for x in run]) for run in runs
            if not run[0].of}  # fmt: skip
    again = [made[run[0].of] for run in runs if run[0].of]
    for run in runs:  # what a fold gave another name than one of its layers' is not called again
        new = made.get(run[0].name, run)
        other = {x.name for x in new} - {x.name for x in run}
        if other and any(first is new for first in again):
            made[run[0].name] = run
    alias: dict[str, str] = {}
    out: list[Layer] = []
    for run in runs:
        inputs, end = tuple(alias.get(i, i) for i in run[0].inputs), run[-1].name
        new = made[run[0].of or run[0].name]
        own = {x.of: x.name for x in run} if run[0].of else {}
        for layer in new:
            call = dataclasses.replace(layer, inputs=inputs)
            if own:
                call.name, call.of = own[layer.name], layer.name
            out.append(call)
            inputs = (out[-1].name,)
        if len(inputs) == 1 and inputs[0] != end:
            alias[end] = inputs[0]
    return dataclasses.replace(net, layers=out, outputs=renamed(net.outputs, alias))


def _runs(net: Net) -> list[list[Layer]]:
    """The layers of a net in runs, each where its last layer stands, by when all that it takes is
    there."""
    readers, ends = net.readers(), set(names_in(net.outputs))
    calls: dict[str, list[Layer]] = {}
    for layer in net.layers:
        calls.setdefault(layer.of or layer.name, []).append(layer)

    def follows(before: Layer, layer: Layer) -> bool:
        pairs = [calls[x.of or x.name] for x in (before, layer)]
        return len(pairs[0]) == len(pairs[1]) and all(
            x.inputs == (b.name,) and len(readers[b.name]) == 1 and b.name not in ends
            for b, x in zip(*pairs, strict=True)
        )

    runs: list[list[Layer]] = []
    last: dict[str, list[Layer]] = {}  # by the name of its last layer
    for layer in net.layers:
        before = last.get(layer.inputs[0]) if len(layer.inputs) == 1 else None
        if before is not None and follows(before[-1], layer):
            del last[layer.inputs[0]]
            before.append(layer)
        else:
            before = [layer]
            runs.append(before)
        last[layer.name] = before
    order = {layer.name: index for index, layer in enumerate(net.layers)}
    return sorted(runs, key=lambda run: order[run[-1].name])
