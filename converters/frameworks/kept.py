"""What the forward of a user's module may change of what it keeps between calls, so that it can be
undone: attributes, and the lists, dicts, sets and NumPy arrays among them, at any depth."""

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

# The attributes, and each container with a copy of it.
Held = tuple[dict[str, Any], list[tuple[Any, Any]]]

_KINDS: tuple[tuple[type, type], ...] = ((dict, dict), (list, list), (set, set), (deque, list))


def held(owner: Any, leaf: Callable[[Any], object] = lambda x: None) -> Held:
    """What an object keeps; ``leaf`` is called with whatever is neither a container nor an array
    of NumPy."""
    own, inside, seen = dict(vars(owner)), list[tuple[Any, Any]](), set[int]()
    waiting = list(own.values())
    while waiting:
        value = waiting.pop()
        copy = next((kind for cls, kind in _KINDS if isinstance(value, cls)), None)
        if isinstance(value, np.ndarray):
            inside.append((value, value.copy()))
        elif isinstance(value, tuple):
            waiting += value
        elif copy is None:
            leaf(value)
        elif id(value) not in seen:
            seen.add(id(value))
            inside.append((value, copy(value)))
            waiting += value.values() if isinstance(value, dict) else value
    return own, inside


def put_back(owner: Any, before: Held) -> list[str]:
    """Undoes what a forward changed; leaves the names of the numbers among it."""
    own, inside = before
    changed = []
    for name in [n for n in vars(owner) if n not in own]:
        del vars(owner)[name]
    for name, was in own.items():
        now = vars(owner).get(name)
        if now is not was:
            if type(was) in (int, float) and now != was:
                changed.append(name)
            vars(owner)[name] = was
    for value, was in inside:
        if isinstance(value, np.ndarray):
            if value.tobytes() != was.tobytes():
                value[...] = was
        elif _items(value) != _items(was):
            value.clear()
            if isinstance(value, dict | set):
                value.update(was)
            else:
                value.extend(was)
    return changed


def _items(value: Any) -> Any:
    if isinstance(value, dict):
        return [*value], [*map(id, value.values())]
    return set(map(id, value)) if isinstance(value, set) else [*map(id, value)]
