"""What a Functional model takes and gives, one tensor, several or several by key, and in which
order Keras counts them."""

from collections.abc import Iterable, Mapping
from typing import Any

from fwt.converters.frameworks import keras_ops

Ref = tuple[str, int, int]  # a layer, the number of its call, and that of its output


def _is_one(ends: Any) -> bool:
    """Whether a form is one reference or name."""
    return isinstance(ends, str) or (
        isinstance(ends, tuple) and len(ends) == 3 and type(ends[1]) is int
    )


def names_in_form(ends: Any) -> list[Any]:
    """The references or names of a form, in its own order."""
    if _is_one(ends):
        return [ends]
    return list(ends.values() if isinstance(ends, Mapping) else ends)


def form_of(ends: Any, f: Any) -> Any:
    """A form of references or names with each replaced."""
    if isinstance(ends, Mapping):
        return {k: f(v) for k, v in ends.items()}
    return f(ends) if _is_one(ends) else tuple(f(v) for v in ends)


def in_order(keys: Iterable[Any]) -> list[Any]:
    """The keys of a dict in the order in which Keras counts its values, whatever its own is."""
    return sorted(keys, key=lambda k: (type(k).__qualname__, k))


def flat(ends: Any) -> list[Any]:
    """The references or names of a form as Keras numbers them: those of a dict by sorted keys."""
    if isinstance(ends, Mapping):
        return [ends[k] for k in in_order(ends)]
    return names_in_form(ends)


def taken(entry: Mapping[str, Any], node: Mapping[str, Any]) -> list[Ref]:
    """What a call takes, in the order in which it goes to the inputs of a model."""
    given = next(iter(node.get("args") or []), (node.get("kwargs") or {}).get("inputs"))
    tensor = isinstance(given, Mapping) and given.get("class_name") == "__keras_tensor__"
    if entry.get("class_name") != "Functional" or not isinstance(given, Mapping) or tensor:
        return keras_ops.histories(node)
    ends = (entry.get("config") or {}).get("input_layers")
    keys = in_order(given)
    if isinstance(ends, list | tuple) and ends:  # those that its inputs are called
        starts = [ends] if isinstance(ends[0], str) else ends
        names = [x[0] for x in starts if isinstance(x, list | tuple) and x]
        keys = names if set(names) <= set(given) else keys
    return [ref for k in keys for ref in keras_ops.histories(given[k])]
