"""What a written file takes and gives: the name, the shape and the dtype of each input, and the
names of its outputs."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fwt._graph import Graph, counts_of, end_of, names_in
from fwt._sequential import Sequential, call
from fwt._types import ConversionError
from fwt.converters.frameworks import linen_trace


class Input(NamedTuple):
    """An input: its shape without the batch axis, and, where it takes whole numbers, below which
    they must be."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    below: int


def inputs(module: Any, variables: Any, shape: Any, dtype: Any) -> list[Input]:
    """The inputs of a module, from what a user says of them.

    Args:
        module: a Sequential, a Graph, or any other linen module.
        variables: its variables.
        shape: of one input without the batch axis, or a list or a dict of them; or an example of
            each, batch first. None takes the module's own.
        dtype: of all inputs, or a list or a dict of them; None finds it out.
    """
    takes = module.inputs if isinstance(module, Graph) else None
    keys = list(takes if isinstance(takes, Mapping) else names_in(takes or "input"))
    if shape is None:
        shape = getattr(module, "input_shape", None)
    given = _each(shape, keys, takes, "input_shape")
    if takes is None and len(given) > 1:
        keys = linen_trace.arguments_of(type(module), len(given))
        if isinstance(module, Sequential):
            raise ConversionError(f"to_onnx: a Sequential takes one array, found {len(given)}")
    elif len(given) != len(keys):
        raise ConversionError(
            f"to_onnx: it takes {', '.join(keys)}: expected one shape for each in input_shape=, "
            f"found {shape!r:.100}"
        )
    if isinstance(takes, str):
        keys = ["input"]
    dtypes = _each(dtype, keys, takes, "input_dtype") if _are_several(dtype) else [dtype]
    dtypes = dtypes * len(keys) if len(dtypes) == 1 else dtypes
    if len(dtypes) != len(keys):
        raise ConversionError(f"input_dtype={dtype!r}: expected one for each of {', '.join(keys)}")
    shapes = [_sizes(one, key if len(keys) > 1 else "") for one, key in zip(given, keys)]
    told = [
        _dtype(d if d is not None else getattr(x, "dtype", None))
        for d, x in zip(dtypes, given, strict=True)
    ]
    ours = isinstance(module, Sequential | Graph)
    counts = counts_of(module) if ours else [0] * len(keys)
    found = _fitting(module, variables, shapes, told, counts)
    least = _least(module, variables)
    return [Input(k, s, d, c or least)
            for k, s, d, c in zip(keys, shapes, found, counts, strict=True)]  # fmt: skip


def _are_several(given: Any) -> bool:
    return isinstance(given, list | tuple | Mapping)


def _is_example(given: Any) -> bool:
    return hasattr(given, "shape") and hasattr(given, "dtype")


def _each(given: Any, keys: Sequence[str], takes: Any, what: str) -> list[Any]:
    """What is said of each input, in their order."""
    if isinstance(given, Mapping):
        if set(given) != set(keys):
            raise ConversionError(
                f"{what}= names {', '.join(map(str, given))}, and the inputs are {', '.join(keys)}"
            )
        return [given[key] for key in keys]
    if what == "input_dtype":
        return list(given)
    several = isinstance(given, list | tuple) and any(
        _is_example(s) or isinstance(s, list | tuple) for s in given
    )
    several = several or (takes is not None and not isinstance(takes, str) and len(keys) == 1
                          and isinstance(given, list | tuple) and not given)  # fmt: skip
    return list(given) if several else [given]


def _sizes(given: Any, name: str) -> tuple[int, ...]:
    sizes: Any = given.shape[1:] if _is_example(given) else given
    sizes = sizes if isinstance(sizes, tuple | list) else (None,)
    if any(type(s) is not int or s < 1 for s in sizes):
        which = f"the input {name}'s" if name else "the input's"
        raise ConversionError(
            f"to_onnx: {which} sizes must be known, found {given}: give input_shape= "
            "(without the batch axis)"
        )
    return tuple(sizes)


def _dtype(given: Any) -> np.dtype | None:
    if given is None:
        return None
    try:
        found = np.dtype(given)
    except TypeError as error:
        raise ConversionError(f"input_dtype={given!r} is no dtype") from error
    if found != jax.dtypes.canonicalize_dtype(found):
        raise ConversionError(f"input_dtype={found}: set jax_enable_x64")
    return found


def _least(module: Any, variables: Any) -> int:
    """The fewest rows that a table of embeddings has: what a whole number may be if nothing tells
    into which table it goes."""
    flat = jax.tree_util.tree_flatten_with_path(variables)[0]
    rows = [len(v) for path, v in flat if str(getattr(path[-1], "key", "")) == "embedding"]
    return min(rows, default=2)


def _fitting(
    module: Any,
    variables: Any,
    shapes: Sequence[tuple[int, ...]],
    told: Sequence[np.dtype | None],
    counts: Sequence[int],
) -> list[np.dtype]:
    """The dtype of each input: float32, or int32 where the module takes nothing else."""
    single, whole = np.dtype(np.float32), np.dtype(np.int32)
    ways = [
        [d] if d is not None else [whole] if c else [single, whole] for d, c in zip(told, counts)
    ]
    first = [way[0] for way in ways]
    if all(len(way) == 1 for way in ways):
        return first
    for dtypes in itertools.product(*ways):
        xs = [jax.ShapeDtypeStruct((2, *s), d) for s, d in zip(shapes, dtypes, strict=True)]
        try:
            jax.eval_shape(lambda v, *ys: call(module, v, *ys), variables, *xs)
        except Exception:  # noqa: BLE001 - a module raises what it likes; other dtypes may fit
            continue
        return list(dtypes)
    return first  # the writer names the layer that does not run


def outputs(module: Any, found: Any) -> list[str]:
    """The names of what a module gives; ``found`` is it, in the form in which the module gives it.
    One array is called "output", several by their keys or their nodes."""
    if isinstance(module, Sequential | Graph):
        end = end_of(module)
        return ["output"] if isinstance(end, str) else list(
            end if isinstance(end, Mapping) else names_in(end))  # fmt: skip
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(found)[0]]
    if paths == [()]:
        return ["output"]
    return [_said(path) for path in paths]


def flat(module: Any, found: Any) -> list[Any]:
    """What a module gives, one array after the other, in the order of :func:`outputs`."""
    if isinstance(module, Graph) and isinstance(module.outputs, Mapping):
        return [found[key] for key in module.outputs]
    return list(jax.tree.leaves(found))


def _said(path: Sequence[Any]) -> str:
    parts = [getattr(p, "key", getattr(p, "name", getattr(p, "idx", ""))) for p in path]
    text = "/".join(map(str, parts))
    return f"output_{text}" if text[:1].isdigit() else text


def unlike(names: Sequence[str], taken: set[str]) -> Iterator[str]:
    """The names, each with a number behind it where another has it."""
    for name in names:
        new, count = name, 1
        while new in taken:
            count += 1
            new = f"{name}:{count}"
        taken.add(new)
        yield new
