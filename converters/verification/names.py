"""The names under which ``verify`` compares layers, whatever each framework calls their parts and
their further calls."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from fwt.converters.rows.row import joined, parts_of

_AGAIN = re.compile(r"__(call_)?(\d+)(?=__|$)")
_COUNTED = re.compile(r"(.+)_(\d+)")


def layer_name(parts: Sequence[str]) -> str:
    """The name that the parts of one layer share."""
    return joined((*parts[:-1], parts[-1].split("__")[0]))


def call_of(name: str, count: int) -> str:
    """The name of a further call of a layer, from the second on."""
    return name if count < 2 else f"{name} (call {count})"


def of_call(name: str) -> str:
    """The layer that a name is of, whichever call of it."""
    return name.rpartition(" (call ")[0] or name


def first_call(name: str) -> str:
    """What the first call of a node is named, whose own name may say that it is a further one."""
    return _AGAIN.sub("", name)


def call_name(name: str, inputs: Iterable[str], again: bool) -> str:
    """The name of a node. One with a number behind two underscores is a further call of a layer or
    a further part of it, which takes what the part before gives.

    Args:
        name: its own.
        inputs: the nodes that it takes.
        again: whether the layer is the one of the node of :func:`first_call`.
    """
    parts, found = parts_of(name), _AGAIN.search(name)
    base = first_call(name)
    before = next((i for i in inputs if first_call(i) == base and i != name), None)
    if before is not None and _AGAIN.search(before):  # a further part of a further call
        return call_name(before, (), True)
    if found is None or not again or before is not None:
        return layer_name(parts)
    count = int(found[2]) + (0 if found[1] else 1)
    return call_of(layer_name(parts_of(base)), count)


def as_known(names: Iterable[str], known: Collection[str]) -> Mapping[str, str]:
    """Names of an ONNX file as another model has them: exporters put the model's name before, and
    number the calls of a layer in their order. Where the numbers of calls differ they stay."""
    names, groups = list(names), dict[str, list[tuple[int, str]]]()
    for name in names:
        for base, number in _bases(name):
            if base in known:
                groups.setdefault(base, []).append((number, name))
                break
    out: dict[str, str] = {}
    for base, found in groups.items():
        calls = [base]
        while (more := call_of(base, len(calls) + 1)) in known:
            calls.append(more)
        if len(found) == len(calls):
            out |= {n: c for (_, n), c in zip(sorted(found), calls, strict=True) if n != c}
    return out if not set(out.values()) & set(names) else {}


def _bases(name: str) -> Iterator[tuple[str, int]]:
    """What a layer may be called elsewhere, and which number its name ends with."""
    yield name, -1
    parts = parts_of(name)
    for start in range(min(len(parts), 3)):
        some = parts[start:]
        if start:
            yield joined(some), -1
        for at in reversed(range(len(some))):
            counted = _COUNTED.fullmatch(some[at])
            if counted:
                yield joined((*some[:at], counted[1], *some[at + 1 :])), int(counted[2])
