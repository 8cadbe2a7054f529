"""For which sizes of its inputs the layers of a model are right that were read for an example.

What a model computes from the sizes of its input is a number there. So it is read once more at
other sizes that it takes: where its layers stay the same, they are right at any.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

Place = tuple[int, int]  # the number of an input, and an axis of it
Sizes = Mapping[Place, int]
Shapes = Sequence[Sequence[int]]


def other_sizes(
    shapes: Shapes, runs: Callable[[Sizes], bool], first: int | None = None
) -> tuple[list[dict[Place, int]], list[list[Place]]]:
    """Other sizes at which a model runs, of one axis or of all of one size; and the axes, of one
    size each, that it takes at this size alone.

    Args:
        shapes: those of its inputs, the batch first.
        runs: whether it runs at other sizes.
        first: a size to try before others.
    """
    free: list[dict[Place, int]] = []
    equal: dict[int, list[Place]] = {}
    for place in ((i, axis) for i, shape in enumerate(shapes) for axis in range(1, len(shape))):
        size = shapes[place[0]][place[1]]
        if found := _runs_at([place], size, runs, first):
            free.append(found)
        else:
            equal.setdefault(size, []).append(place)
    alone = []
    for size, places in equal.items():
        found = _runs_at(places, size, runs, first) if len(places) > 1 else {}
        if found:
            free.append(found)
        else:
            alone.append(places)
    return free, alone


def _runs_at(
    places: Sequence[Place], size: int, runs: Callable[[Sizes], bool], first: int | None
) -> dict[Place, int]:
    tried = (dict.fromkeys(places, other) for other in tried_for(size, first))
    return next((sizes for sizes in tried if runs(sizes)), {})


def tried_for(size: int, first: int | None = None) -> list[int]:
    """The sizes that are tried in the place of one."""
    # First a prime number more: any rest, and any half or third rounded, is another then.
    tried = (size + _prime(size + 1), 2 * size, size // 2, size - 1)
    return [n for n in dict.fromkeys((first or tried[0], *tried)) if n >= 1 and n != size]


def _prime(least: int) -> int:
    """The first prime number of at least 7 and of at least this."""
    return next(p for p in itertools.count(max(least, 7)) if all(p % k for k in range(2, p)))


def together(
    free: Sequence[Mapping[Place, int]], shapes: Shapes, runs: Callable[[Sizes], bool]
) -> dict[Place, int]:
    """Other sizes of all axes at once, those of one size made different ones if the model runs."""
    out: dict[Place, int] = {}
    for sizes in free:
        (size,) = {shapes[i][axis] for i, axis in sizes}
        (other,) = set(sizes.values())
        apart = other
        while apart in out.values():
            apart = size + _prime(apart - size + 1)
        if apart != other and runs({**out, **dict.fromkeys(sizes, apart)}):
            other = apart
        out |= dict.fromkeys(sizes, other)
    return out


def by_input(
    bound: Iterable[Place], names: Sequence[str], shapes: Shapes
) -> dict[str, tuple[int | None, ...]]:
    """By name of an input, the sizes without the batch axis that it must have, None for any."""
    bound = set(bound)
    return {
        name: tuple(s if (i, axis) in bound else None for axis, s in enumerate(shape) if axis)
        for i, (name, shape) in enumerate(zip(names, shapes, strict=True))
        if any(i == at for at, _ in bound)
    }
