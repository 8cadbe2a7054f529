"""What a live layer does beside what its class and its settings say: refused by name."""

import inspect
from collections.abc import Collection
from typing import Any

from fwt.converters.rows.row import refuse, same


def check_methods(thing: Any, place: str, but: Collection[str] = ()) -> None:
    """Raises where a method of its class was replaced on the layer or model itself."""
    for name in vars(thing):
        if inspect.isfunction(getattr(type(thing), name, None)) and name not in but:
            raise refuse(place, f"its {name} is a function of the user's own")


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return value is None or isinstance(value, bool | int | float | str) or inspect.isfunction(value)


def check_as_new(live: Any, new: Any, place: str, but: Collection[str] = ()) -> None:
    """Raises where a layer keeps another number, name or function than a new one of its settings:
    what it made of a setting that was changed since, say."""
    mine = vars(live)
    for name, value in vars(new).items():
        if name in but or name not in mine or not _plain(value) or not _plain(mine[name]):
            continue
        if not same(mine[name], value):
            raise refuse(
                place,
                f"it keeps {name}={mine[name]!r:.80}, but a new layer of its settings has "
                f"{value!r:.80}",
                "make a new layer of the settings that are meant, and give it the weights",
            )
