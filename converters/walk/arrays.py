"""The arrays of a layer under another framework's names and in its axes."""

import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from fwt._stored import Unread
from fwt.converters.rows.row import STATE, Framework, Layer, P, Row, order, refuse
from fwt.converters.walk.axis import Axis, permuted


def letter_sizes(
    row: Row, framework: Framework, layer: Layer, fields: Mapping[str, Any]
) -> dict[str, int]:
    """The size of each letter that the arrays tell, which must agree among them and with the
    settings."""
    sizes: dict[str, int] = {}
    for p in row.params:
        name, letters = p.of(framework)
        if name not in layer.arrays:
            continue
        shape = np.shape(layer.arrays[name])
        stars = len(shape) - sum(not x.startswith("*") for x in letters)
        if stars < 0 or (stars and not any(x.startswith("*") for x in letters)):
            raise refuse(str(layer), f"{name} has shape {shape}, expected {' '.join(letters)}")
        index = 0
        for letter in letters:
            if letter.startswith("*"):
                window = tuple(shape[index : index + stars])
                if letter == "*k" and fields.get("kernel_size", window) != window:
                    raise refuse(
                        str(layer),
                        f"{name} has a window of {window}, expected {fields['kernel_size']}",
                    )
                index += stars
                continue
            if sizes.setdefault(letter, shape[index]) != shape[index]:
                raise refuse(
                    str(layer),
                    f"{name} has shape {shape}, expected {sizes[letter]} at axis {index}",
                )
            index += 1
    if fields.get("features", sizes.get("o")) != sizes.get("o", fields.get("features")):
        raise refuse(
            str(layer), f"its arrays have {sizes['o']} outputs, expected {fields['features']}"
        )
    if "j" in sizes:
        sizes["i"] = sizes["j"] * fields.get("feature_group_count", 1)
    return sizes


def moved(
    row: Row,
    source: Framework,
    target: Framework,
    layer: Layer,
    fields: Mapping[str, Any],
    bound: Mapping[str, Axis],
    orders: Any,
    dry: bool = False,
) -> dict[str, Any]:
    """The arrays under the target's names and in its axes.

    ``orders`` are the axes of the letter ``*a`` in the source's and in the target's order; ``dry``
    leaves what stands in them.
    """
    left = dict(layer.arrays)
    for name in STATE[source]:
        left.pop(name, None)
    new: dict[str, Any] = {}
    missing: list[P] = []
    for p in row.params:
        name, letters = p.of(source)
        if p.when is not None and not fields[p.when]:
            if source == "torch" or target != "torch":
                continue
            missing.append(p)
            continue
        if name not in left:
            raise refuse(
                str(layer), f"the array {name!r} is missing", f"found {sorted(layer.arrays)}"
            )
        value = left.pop(name)
        target_name, target_letters = p.of(target)
        if target_name == "-":  # the target has no such layer, which is said where it is written
            continue
        value = np.transpose(value, order(letters, target_letters, np.ndim(value)))
        if "*a" in target_letters and orders is not None:
            there, here = orders
            if len(there) != value.ndim:
                raise refuse(
                    str(layer), f"{name} has shape {value.shape}, expected {len(there)} axes"
                )
            value = np.transpose(value, [there.index(a) for a in here])
            follows = dict(enumerate(here))
        else:
            stars = value.ndim - len(target_letters)  # how many more axes a star stands for
            follows, index = {}, 0
            for x in target_letters:
                if x in bound:
                    follows[index] = bound[x]
                index += 1 + (stars if x.startswith("*") else 0)
        for index, axis in follows.items():
            if axis.scrambled and not dry:
                given = value
                value = permuted(value, index, axis, str(layer))
                _report_groups(layer, target, given, value, index)
        # A copy: the source may live on, unless it is a file's.
        kept = dry or isinstance(value, Unread)
        new[target_name] = value if kept else np.array(value, order="C")
    for p in missing:
        if p.fill is not None and any(fields[q.when] for q in row.params if q.when):
            like = next(q for q in row.params if q is not p and q.of("torch")[0] in new)
            new[p.of("torch")[0]] = np.full_like(new[like.of("torch")[0]], p.fill)
    if left:
        raise refuse(
            str(layer),
            f"the array {sorted(left)[0]!r} is not known to this layer",
            f"it has {sorted(p.of(source)[0] for p in row.params)}",
        )
    names = [p.of(target)[0] for p in row.params]
    return {n: new[n] for n in names if n in new}


_CHANCE = 1e-4  # below this, groups are no accident of a plain pruning


def _report_groups(layer: Layer, target: Framework, given: Any, value: Any, index: int) -> None:
    """Warns where zeros that were n:m along the inputs are so no longer in the new order."""
    share = np.count_nonzero(given) / max(given.size, 1)
    for n, m in ((1, 4), (2, 4), (1, 2), (4, 8)):
        if value.ndim < 2 or value.shape[index] % m or share > n / m:
            continue
        most = [
            np.count_nonzero(np.moveaxis(x, index, -1).reshape(-1, m), axis=1).max(initial=0)
            for x in (given, value)
        ]
        # As many may fall so by chance.
        fits = sum(math.comb(m, k) * share**k * (1 - share) ** (m - k) for k in range(n + 1))
        if most[0] <= n < most[1] and fits ** (given.size // m) < _CHANCE:
            order = "chw" if target == "torch" else "hwc"
            warnings.warn(
                f"{layer}: its kernel is {n}:{m} sparse, but no longer in the order in which "
                f"{target} counts the inputs behind a Flatten: prune the converted model with "
                f"fwt.patterns.n_m({n}, {m}, order={order!r}) for that",
                stacklevel=2,
            )
            return
