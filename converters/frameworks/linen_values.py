"""What a jaxpr of a linen module is made of: flat equations, and what is known of their values."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np
from jax.extend.core import Literal

from fwt.converters.rows.row import joined, refuse


@dataclasses.dataclass(frozen=True)
class Layered:
    """One call of a layer that stays whole."""

    layer: Any
    path: tuple[str, ...]
    names: tuple[str, ...]  # of the arguments that it is given
    held: tuple[tuple[str, ...], ...]  # the paths of its variables, which it is given after them

    def has_its_own(self, given: Sequence["Slot"]) -> bool:
        """Whether those variables are the model's, as they are: nn.WeightNorm and the like call a
        layer with others, which are computed from them."""
        return all(
            slot.held is not None
            and slot.held.path == (collection, *self.path, *inside)
            and np.array_equal(slot.held.where.reshape(-1), np.arange(slot.held.array.size))
            and slot.held.where.shape == slot.held.array.shape
            for slot, (collection, *inside) in zip(given, self.held, strict=True)
        )


LAYER = "fwt_layer"  # the operation that such a call is


class Reopen(Exception):  # noqa: N818 - no error but a signal, which the reader always catches
    """A layer whose row can't say this call: its parts are read instead."""

    def __init__(self, path: str, why: str = ""):
        super().__init__(path)
        self.path, self.why = path, why


@dataclasses.dataclass(eq=False)
class Held:
    """An array of the model, or entries of one.

    Attributes:
        path: where it stands, the collection first.
        array: all of it.
        positions: of the entries, in the array made flat; None for all of them as they are.
    """

    path: tuple[str, ...]
    array: np.ndarray
    positions: np.ndarray | None = None

    @property
    def learned(self) -> bool:
        return self.path[0] == "params"

    @property
    def where(self) -> np.ndarray:
        """The position of each entry."""
        if self.positions is None:
            return np.arange(self.array.size, dtype=np.int32).reshape(self.array.shape)
        return self.positions


@dataclasses.dataclass(eq=False)
class Slot:
    """What one equation gives: a tensor that follows from the input, or a known array.

    Attributes:
        shape: with the batch as it is in the jaxpr, a symbol.
        known: its value for one example, where it does not follow from the input.
        held: the array of the model whose entries a known value is.
        learned: whether a known value follows from weights in any way.
        why_not: why a known value can't be told.
    """

    shape: tuple[Any, ...]
    dtype: Any
    known: np.ndarray | None = None
    held: Held | None = None
    learned: bool = False
    why_not: str = ""

    @property
    def follows(self) -> bool:
        """Whether it follows from the input."""
        return self.known is None and not self.why_not

    @property
    def number(self) -> float | None:
        """The one number that all its entries are, where it is known and not learned."""
        if self.known is None or self.learned or not self.known.size:
            return None
        first = self.known.reshape(-1)[0]
        alike = bool((self.known == first).all()) or bool(np.isnan(self.known).all())
        return float(first) if alike else None


@dataclasses.dataclass(eq=False)
class Equation:
    """One operation on tensors that follow from the input, beside which known ones may stand."""

    name: str
    params: Mapping[str, Any]
    ins: list[Slot]
    outs: list[Slot]
    place: str


# What holds a jaxpr that is computed as it stands.
_CALLS = ("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint",
          "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")  # fmt: skip
_SAME = ("stop_gradient", "copy", "copy_p", "optimization_barrier", "sharding_constraint", "name")
# What gives entries of its first argument as they are.
_SELECTS = ("reshape", "transpose", "broadcast_in_dim", "slice", "squeeze", "rev", "gather",
            "dynamic_slice", "split", "expand_dims", "tile")  # fmt: skip
_LOOPS = {
    "scan": "nn.scan and jax.lax.scan are not taken apart: write the loop out, or use a layer of "
    "fwt.layers for recurrence",
    "while": "how often it runs may depend on the input",
    "cond": "what it does depends on the input",
}


class Equations:
    """A jaxpr as a list of equations, one after the other, without what is known beforehand.

    Attributes:
        all: the equations whose results follow from the input.
        inputs: the inputs of the model.
        outs: its outputs.
        held: the arrays of the model.
    """

    def __init__(self, closed: Any, held: Sequence[Held], count: int):
        self.all: list[Equation] = []
        jaxpr = closed.jaxpr
        slots = [_slot(v.aval) for v in jaxpr.invars]
        arrays, self.inputs = slots[: len(held)], slots[len(held) :]
        assert len(self.inputs) == count
        self.batches = {str(s.shape[0]) for s in self.inputs if s.shape}
        for slot, array in zip(arrays, held, strict=True):
            slot.known, slot.held, slot.learned = array.array, array, array.learned
        self.held = {h.path: h for h in held}
        self.outs = self._run(jaxpr, closed.consts, slots, "")

    def _run(self, jaxpr: Any, consts: Sequence[Any], given: Sequence[Slot], inside: str) -> Any:
        env: dict[Any, Slot] = dict(zip(jaxpr.invars, given, strict=True))
        for var, value in zip(jaxpr.constvars, consts, strict=True):
            env[var] = _slot(var.aval, np.asarray(value))

        def read(atom: Any) -> Slot:
            return (
                _slot(atom.aval, np.asarray(atom.val)) if isinstance(atom, Literal) else env[atom]
            )

        for eqn in jaxpr.eqns:
            ins = [read(a) for a in eqn.invars]
            place = "/".join(x for x in (inside, str(eqn.source_info.name_stack)) if x)
            for var, slot in zip(eqn.outvars, self._one(eqn, ins, place), strict=True):
                env[var] = slot
        return [read(a) for a in jaxpr.outvars]

    def _one(self, eqn: Any, ins: list[Slot], place: str) -> list[Slot]:
        name = eqn.primitive.name
        if name in _CALLS:
            inner = eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr")
            consts = getattr(inner, "consts", ())
            result: list[Slot] = self._run(getattr(inner, "jaxpr", inner), consts, ins, place)
            return result
        outs = [_slot(v.aval) for v in eqn.outvars]
        if name in _SAME:
            return ins
        if name == "convert_element_type" and ins[0].dtype == outs[0].dtype:
            return ins
        if not any(s.follows for s in ins):
            self._known(eqn, ins, outs)
            return outs
        if name == "select_n" and ins[0].number is not None:
            return [ins[1 + int(ins[0].number)]]
        if name in _LOOPS:
            raise refuse(clean(place, name), _LOOPS[name])
        self.all.append(Equation(name, eqn.params, ins, outs, clean(place, name)))
        return outs

    def _known(self, eqn: Any, ins: list[Slot], outs: list[Slot]) -> None:
        """Computes what does not follow from the input, for one example."""
        why = next((s.why_not for s in ins if s.why_not), "")
        values: list[np.ndarray] = []
        params, name = dict(eqn.params), eqn.primitive.name
        for key in ("shape", "new_sizes", "slice_sizes", "reps") if not why else ():
            if key in params:
                params[key] = tuple(self._one_example(s) for s in params[key])
        if not why and ("call" in params or any(_symbolic(v) for v in params.values())):
            why = "it computes with the number of examples"
        if "call" in params:
            return self._called(params["call"], ins, outs)
        if name == "iota" and any(not isinstance(s, int | np.integer) for s in eqn.params["shape"]):
            why = "it counts the examples"
        if name.startswith(("random_", "threefry")):
            why = "it draws random numbers"
        if not why:
            try:
                values = self._bound(eqn.primitive, [s.known for s in ins], params)
            except Exception:  # noqa: BLE001 - JAX's share no class, and each is kept as why
                why = "it can't be computed for one example"
        if not why:
            wanted = [tuple(self._one_example(n) for n in s.shape) for s in outs]
            if [v.shape for v in values] != wanted:
                why = "it does not do the same for each example"
        learned = any(s.learned for s in ins)
        for index, slot in enumerate(outs):
            slot.learned, slot.why_not = learned, why
            if why:
                continue
            slot.known = values[index]
            held = ins[0].held if ins else None
            if held is not None and name in _SELECTS:
                others = [s.known for s in ins[1:]]
                found = self._bound(eqn.primitive, [held.where, *others], params)
                slot.held = Held(held.path, held.array, found[index])
        return None

    def _called(self, call: Layered, ins: list[Slot], outs: list[Slot]) -> None:
        """A layer of what is known: an Embed of positions gives entries of its table."""
        table = self.held.get(("params", *call.path, "embedding"))
        (out,) = outs
        own = call.has_its_own(ins[len(call.names) :])
        if not isinstance(call.layer, nn.Embed) or table is None or ins[0].known is None or not own:
            raise Reopen(joined(call.path))
        out.held = Held(table.path, table.array, table.where[ins[0].known])
        out.known, out.learned = table.array[ins[0].known], True

    def _bound(self, primitive: Any, values: Sequence[Any], params: Any) -> list[np.ndarray]:
        if (plain := _NUMPY.get(primitive.name)) is not None:  # which compiles nothing
            return [np.asarray(plain(params, *values))]
        found = primitive.bind(*values, **params)
        return [np.asarray(v) for v in (found if primitive.multiple_results else [found])]

    def _one_example(self, size: Any) -> Any:
        if isinstance(size, int | np.integer):
            return int(size)
        return 1 if str(size) in self.batches else size


def _broadcast(params: Mapping[str, Any], x: np.ndarray) -> np.ndarray:
    shape = [1] * len(params["shape"])
    for dim, size in zip(params["broadcast_dimensions"], x.shape, strict=True):
        shape[dim] = size
    return np.broadcast_to(x.reshape(shape), params["shape"])


def _select(params: Mapping[str, Any], which: np.ndarray, *cases: np.ndarray) -> np.ndarray:
    return np.choose(which.astype(np.int32), cases).astype(cases[0].dtype)


# What JAX would compile for each shape, as NumPy has it.
_NUMPY: dict[str, Any] = {
    "broadcast_in_dim": _broadcast,
    "select_n": _select,
    "convert_element_type": lambda params, x: x.astype(params["new_dtype"]),
    "reshape": lambda params, x: x.reshape(params["new_sizes"]),
    "squeeze": lambda params, x: x.squeeze(tuple(params["dimensions"])),
    "transpose": lambda params, x: x.transpose(params["permutation"]),
    "add": lambda params, a, b: a + b,
    "sub": lambda params, a, b: a - b,
    "mul": lambda params, a, b: a * b,
    "max": lambda params, a, b: np.maximum(a, b),
    "min": lambda params, a, b: np.minimum(a, b),
    "lt": lambda params, a, b: a < b,
    "gt": lambda params, a, b: a > b,
    "ge": lambda params, a, b: a >= b,
    "le": lambda params, a, b: a <= b,
    "eq": lambda params, a, b: a == b,
    "ne": lambda params, a, b: a != b,
    "and": lambda params, a, b: a & b,
}


def _symbolic(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(_symbolic(v) for v in value)
    return type(value).__name__ == "_DimExpr"


def _slot(aval: Any, known: Any = None) -> Slot:
    return Slot(
        tuple(aval.shape), np.dtype(aval.dtype) if _plain(aval.dtype) else aval.dtype, known
    )


def _plain(dtype: Any) -> bool:
    try:
        np.dtype(dtype)
    except TypeError:
        return False
    return True


def clean(place: str, name: str) -> str:
    """The path of a module and the name of an operation in it: linen says by a named scope in
    which module it is, its own class first and a method behind a dot."""
    parts = [p.partition(".")[0] for p in place.split("/")[1:]]
    parts = [p for p in parts if p and not p.startswith(("jvp(", "remat("))]
    return joined([*parts, *([] if parts and name == LAYER else [name])])
