"""What fwt calls a noun of Keras or torch, or one that is given as text: for errors."""

import re
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from fwt import _paths
from fwt._errors import INJECTED, FwtError

_OTHERWISE = {
    "non_neg": "non_negative", "l1_unstructured": "magnitude", "random_unstructured": "random",
    "identity_initializer": "identity",
}  # fmt: skip


def library(noun: Any) -> str | None:
    """The library of a noun that is not ours, or of the class that the user's own is made of."""
    classes = noun.__mro__ if isinstance(noun, type) else type(noun).__mro__
    homes = [getattr(noun, "__module__", None), *(c.__module__ for c in classes)]
    return next((h.split(".")[0] for h in homes if h and h.split(".")[0] in _paths.LIBRARIES), None)


LIVE = "converters.transform(model, t) after each step, as the guide's page on live models shows"


def check_optimizer(wrapper: str, given: Any) -> None:
    """Raises for what is no optax optimizer, such as that of another framework."""
    if hasattr(given, "update") and hasattr(given, "init"):
        return
    home = library(given)
    way = f"; in {home}, call {LIVE}" if home else ", such as optax.adam(1e-3)"
    found = repr(given) if home is None else f"{type(given).__name__} of {home}"
    raise TypeError(f"{wrapper} takes an optax optimizer{way}; found {found}")


def no_number(given: Any) -> str:
    """What to do with what was given as a sparsity or a threshold, as the end of an error."""
    if _paths.foreign(given):
        return ": converters.transform(model, fwt.prune(0.5)) takes the model"
    if isinstance(given, Mapping):
        return ": scope= takes a dict, prune(scope={glob: sparsity})"
    if callable(given):
        return ": fwt.optim.sparsify takes a schedule, and prune a value of it, schedule(n)"
    return ""


def refuse_injected(**settings: Any) -> None:
    """Raises for a setting that ``optax.inject_hyperparams`` has made an array of."""
    for name, value in settings.items():
        one = getattr(value, "shape", None) == () and hasattr(value, "weak_type")
        if one and "key<" not in str(value.dtype):
            raise FwtError(f"{name} does not change, and was found as an array: {INJECTED}")


def _places() -> dict[str, tuple[ModuleType, ...]]:
    from fwt import constraints, initializers, patterns, scores  # which only an error needs
    from fwt.initializers import keras, torch

    return {
        "initializer": (initializers, keras, torch),
        "constraint": (constraints,),
        "score": (scores,),
        "pattern": (patterns,),
    }


def hint(noun: Any, kind: str) -> str:
    """How fwt calls what was given, as the end of an error; "" where nothing is known of it.

    Args:
        noun: what was given as an initializer, a constraint, a score or a pattern.
        kind: which of these.
    """
    home = library(noun)
    if home is None and not isinstance(noun, str):
        return ""
    said = noun if isinstance(noun, str) else getattr(noun, "__name__", type(noun).__name__)
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", said).lower().strip("_ ").removesuffix(f"_{kind}")
    name = _OTHERWISE.get(name, name)
    found = [f"{m.__name__}.{name}" for m in _places()[kind] if name in m.__all__]
    own = [f for f in found if home and f.split(".")[-2] == home.removeprefix("tf_")]
    if found:
        return f": fwt has its own, {' or '.join(own or found)}"
    if kind == "constraint" and home is not None:
        return ": write it as a function (leaf, axes) -> leaf"
    if kind == "initializer" and home is not None:
        return ": write it as a function (key, shape, dtype) -> array"
    return ""
