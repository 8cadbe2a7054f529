"""Any linen module as a graph: its layers stay whole, and what it computes between them is read
from its jaxpr.

A layer that has a row is one opaque primitive there. What stands between is made of layers without
weights by ``linen_windows``, which knows functions such as ``nn.gelu`` again, and by the rules of
``linen_rules``, one for each primitive. Open ``traced`` first.
"""

import dataclasses
import inspect
import itertools
import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.extend.core import Primitive

from fwt import _nodes, _tree
from fwt._graph import Graph, names_in
from fwt._sequential import Sequential, bare, flags
from fwt._types import ConversionError, Model
from fwt.converters import judge
from fwt.converters.frameworks import linen_rules, linen_values
from fwt.converters.frameworks.linen_nodes import Reader
from fwt.converters.frameworks.linen_sizes import AtExample, at_sizes
from fwt.converters.frameworks.linen_values import Equations, Held, Layered, Reopen
from fwt.converters.rows import table
from fwt.converters.rows.row import joined, refuse
from fwt.converters.tried import Tried
from fwt.converters.walk.net import fresh

LAYER = Primitive(linen_values.LAYER)
LAYER.def_abstract_eval(lambda *xs, out, **told: jax.core.ShapedArray(out.shape, out.dtype))

# How a module is told that it does not train.
INFERENCE = {
    **dict.fromkeys(("train", "training", "is_training", "is_train"), False),
    **dict.fromkeys(("deterministic", "use_running_average", "inference", "is_eval"), True),
}


def is_own(module: Any) -> bool:
    """Whether it is a linen module that is none of fwt's and no chain of layers."""
    own = not isinstance(module, Sequential | Graph) and type(module) is not nn.Sequential
    return isinstance(module, nn.Module) and own


def traced(module: Any, variables: Any, input_shape: Any, sizes: bool = True) -> Model:
    """A linen module as a Graph with the same predictions.

    Args:
        module: any linen module, whose ``__call__`` takes arrays with the batch first.
        variables: its variables.
        input_shape: the shape of its input without the batch axis, or a list of shapes, or an
            example of each input; a dict of them, by the names of its arguments or, where it takes
            one dict, by the keys of that.
        sizes: whether the graph is to be right at other sizes too, or to refuse them.

    Returns:
        ``Model(graph, variables)`` with NumPy leaves, under the paths that they have.

    Raises:
        ConversionError: for what can't be said by layers, by the name of the operation.
    """
    name = type(module).__name__
    if input_shape is None:
        raise ConversionError(
            f"{name} is a linen module of one's own, which is traced for a shape of its input: "
            "give input_shape= (without the batch axis), or build it as "
            "fwt.Sequential([(name, layer), ...])"
        )
    variables = _nodes.unboxed(_tree.as_variables(variables))
    variables = jax.tree.map(np.asarray, variables)
    told = inference_of(type(module).__call__)
    form = form_of(type(module), input_shape)

    def run(variables: Any, *xs: Any) -> Any:
        args, kwds = form.arguments(xs)
        return module.apply(variables, *args, **kwds, **told)

    def tracing(opened: Collection[str]) -> Any:
        return nn.intercept_methods(_Whole(opened))

    return traced_call(run, tracing, variables, form, type(module), sizes)


class Form(NamedTuple):
    """How a module takes its inputs: ``keys`` are the names of its arguments, or with ``whole``
    the keys of the one dict that it takes; without keys they follow each other."""

    shapes: Any
    keys: tuple[str, ...] = ()
    whole: bool = False

    def arguments(self, xs: Sequence[Any]) -> tuple[Sequence[Any], dict[str, Any]]:
        named = dict(zip(self.keys, xs, strict=bool(self.keys)))
        return ((named,), {}) if self.whole else ((), named) if named else (xs, {})


def form_of(cls: Any, input_shape: Any) -> Form:
    """What ``input_shape`` says of the inputs of a class of modules."""
    if not isinstance(input_shape, Mapping):
        return Form(input_shape)
    keys = tuple(input_shape)
    if not keys or not all(isinstance(key, str) and key for key in keys):
        raise ConversionError(f"input_shape={input_shape!r}: expected {_SHAPES}")
    named = [n for n in inspect.signature(cls.__call__).parameters if n in keys]
    whole = len(named) < len(keys)
    keys = keys if whole else tuple(named)
    return Form([input_shape[key] for key in keys], keys, whole)


_SHAPES = (
    "the shape of its input without the batch axis, such as (32, 48, 3), or of several inputs a "
    "list of shapes, or a dict of them by the names of arguments, or by the keys of one dict"
)


def arguments_of(cls: Any, count: int) -> list[str]:
    """What a module's ``__call__`` calls its inputs, of which there are several."""
    found = list(inspect.signature(cls.__call__).parameters.values())[1:]
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in found if p.kind in plain and p.name not in INFERENCE]
    return names[:count] if len(names) >= count else [f"input_{i}" for i in range(count)]


def inference_of(call: Any) -> dict[str, bool]:
    """The flags of a ``__call__``, as they are at inference."""
    return {n: INFERENCE[n] for n in inspect.signature(call).parameters if n in INFERENCE}


def traced_call(
    run: Callable[..., Any],
    tracing: Callable[[Collection[str]], Any],
    variables: Mapping[str, Any],
    form: Form,
    cls: Any,
    sizes: bool = True,
) -> Model:
    """A function of variables and inputs as a Graph; ``tracing`` gives the context in which the
    layers are opaque but those of the paths that it is given, and ``cls`` is the class of the
    module."""
    name, opened = cls.__name__, dict[str, str]()  # by path, why
    inputs = _inputs(run, variables, form.shapes, name)
    names = form.keys or (arguments_of(cls, len(inputs)) if len(inputs) > 1 else ["input"])

    def read(inputs: Sequence[Any]) -> tuple[AtExample, list[str]]:
        return _opening(run, tracing, variables, inputs, name, names, opened)

    def runs(inputs: Sequence[Any]) -> None:
        jax.eval_shape(run, variables, *inputs)

    def check(model: Model, inputs: Sequence[Any]) -> None:
        _check(run, variables, model, inputs, name)

    one, left = read(inputs)
    check(one.model, inputs)
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        warnings.warn(
            f"the new model has no {left[0]}{more} of {name}: its output does not follow from "
            "them, or only by arrays that are computed from weights and stand there as they are",
            stacklevel=5,
        )
    model = one.model
    if sizes:
        model = at_sizes(one, inputs, runs, lambda inputs: read(inputs)[0], check)
    if form.whole:
        graph: Any = model.module
        shapes = graph.input_shape if len(form.keys) > 1 else (graph.input_shape,)
        ends = dict(zip(form.keys, names_in(graph.inputs), strict=True))
        model = Model(graph.clone(inputs=ends, input_shape=shapes), model.variables)
    return model


def _opening(
    run: Any,
    tracing: Any,
    variables: Any,
    inputs: Sequence[Any],
    name: str,
    names: Sequence[str],
    opened: dict[str, str],
) -> tuple[AtExample, list[str]]:
    """The graph, with the parts of those layers whose rows can't say their calls, which are noted
    in ``opened``; and the paths of the weights that it lacks."""
    (batch,) = export.symbolic_shape("b")
    while True:
        try:
            specs = [jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype) for x in inputs]
            forms: list[Any] = []

            def flat(variables: Any, *xs: Any, forms: list[Any] = forms) -> list[Any]:
                with tracing(opened):
                    leaves, form = jax.tree.flatten(run(variables, *xs))
                forms.append(form)
                return leaves

            closed = jax.make_jaxpr(flat)(variables, *specs)
        except ConversionError:
            raise
        except Exception as error:  # a user's module may raise any class: it becomes ours
            raise refuse(
                name,
                f"JAX can't trace it for any number of examples ({_first_line(error)})",
                "what it does may not depend on the values of its input, nor on how many examples "
                "there are; that number is x.shape[0], where len(x) asks for an int",
            ) from error
        try:
            return _read(closed, forms[-1], variables, inputs, name, names)
        except Reopen as found:
            if found.path in opened:
                raise AssertionError(f"{found.path} stays closed") from found
            opened[found.path] = found.why
        except ConversionError as error:
            why = next((w for p, w in opened.items() if w and str(error).startswith(p)), "")
            if not why:
                raise
            raise ConversionError(f"{error}; as a whole layer: {why}") from error


def _read(
    closed: Any, form: Any, variables: Any, inputs: Sequence[Any], name: str, names: Sequence[str]
) -> tuple[AtExample, list[str]]:
    flat, _ = jax.tree_util.tree_flatten_with_path(variables)
    held = [Held(tuple(str(k.key) for k in path), value) for path, value in flat]
    taken = {path[1] for path in (h.path for h in held) if len(path) > 1}
    names = [fresh(n, taken) for n in names]
    equations = Equations(closed, held, len(inputs))
    reader = Reader(equations, variables, names)
    linen_rules.read(reader)
    if any(slot.follows and reader.batch_of(slot) for slot in equations.outs):
        raise refuse(name, "the first axis of its output is not the batch")
    ends = [reader.value(slot, "the output").name for slot in equations.outs]
    outputs: Any = jax.tree.unflatten(form, ends)
    if isinstance(outputs, list):
        outputs = tuple(outputs)
    several = outputs.values() if isinstance(outputs, Mapping) else outputs
    if not isinstance(outputs, str) and not (
        isinstance(outputs, Mapping | tuple) and all(isinstance(x, str) for x in several)
    ):
        raise refuse(name, "its outputs are nested", "give one array, a tuple or a dict of them")
    nodes, outputs = reader.apart(reader.used(ends), outputs)
    kept, left = reader.variables(nodes)
    shapes = tuple(tuple(x.shape[1:]) for x in inputs)
    ins: Any = names[0] if len(names) == 1 else tuple(names)
    graph = Graph(nodes, ins, outputs, shapes[0] if len(shapes) == 1 else shapes)
    return AtExample(Model(graph, kept), reader.lengths(nodes)), left


# -- inputs ---------------------------------------------------------------------------------------


def _inputs(run: Any, variables: Any, given: Any, name: str) -> list[Any]:
    """What each input looks like, for a batch of two; whole numbers are found by trying."""
    several = given if isinstance(given, list | tuple) else (given,)
    if several and all(hasattr(x, "shape") and hasattr(x, "dtype") for x in several):
        if any(len(x.shape) < 1 for x in several):
            raise ConversionError("an example of an input has a batch axis")
        return [jax.ShapeDtypeStruct((2, *x.shape[1:]), x.dtype) for x in several]
    shapes = several if several and isinstance(several[0], list | tuple) else (several,)
    for shape in shapes:
        if not isinstance(shape, list | tuple) or not all(
            isinstance(s, int) and not isinstance(s, bool) and s > 0 for s in shape
        ):
            raise ConversionError(f"input_shape={given!r}: expected {_SHAPES}")
    failed: Exception | None = None
    for dtypes in itertools.product((jnp.float32, jnp.int32), repeat=len(shapes)):
        inputs = [
            jax.ShapeDtypeStruct((2, *shape), dtype)
            for shape, dtype in zip(shapes, dtypes, strict=True)
        ]
        try:
            jax.eval_shape(run, variables, *inputs)
        except Exception as error:  # noqa: BLE001 - a user's module may raise any class; the next may fit
            failed = failed or error
        else:
            return inputs
    if type(failed).__name__ == "ScopeCollectionNotFound":
        raise ConversionError(
            f"{name} needs more than params: give its variables, such as {{'params': params, "
            f"'batch_stats': ...}}, found {', '.join(variables) or 'nothing'} "
            f"({str(failed).partition(' (http')[0]:.150})"
        ) from failed
    raise ConversionError(
        f"{name} can't be run on input_shape={given!r}: {_first_line(failed)}; give the shape of "
        "an input without the batch axis, a list of several, or a dict of them by name"
    ) from failed


def _first_line(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"


# -- layers ---------------------------------------------------------------------------------------


class _Whole:
    """Keeps each layer that has a row whole, but those of some paths."""

    def __init__(self, opened: Collection[str]):
        self.opened = opened
        self.inside = False

    def __call__(self, run: Any, args: Any, kwargs: Any, context: Any) -> Any:
        layer = context.module
        path = joined(layer.path)
        if (
            self.inside
            or path in self.opened
            or context.method_name != "__call__"
            or not has_row(layer)
            or is_odd(*args, *kwargs.values(), *jax.tree.leaves(layer.variables))
        ):
            return run(*args, **kwargs)
        self.inside = True
        try:
            return bound(layer, layer.path, layer.variables, args, kwargs)
        finally:
            self.inside = False


def is_odd(*given: Any) -> bool:
    """Whether some array is one example of a vmap, or its batch is not the first axis alone."""
    return any(
        type(x).__name__ == "BatchTracer"  # which has no public name
        or (hasattr(x, "shape") and not all(map(_is_number, x.shape[1:])))
        for x in given
    )


def has_row(layer: Any) -> bool:
    """Whether a linen layer is of a class that the table knows."""
    return any(r.flax is type(layer) for r in table.rows_of("flax", type(layer).__name__))


def bound(
    layer: Any, path: Sequence[str], variables: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """One call of a linen layer as one primitive of its inputs and its variables."""
    place = f"{joined(path)} ({type(layer).__name__})"
    signature = inspect.signature(type(layer).__call__)
    given = signature.bind(layer, *args, **kwargs).arguments
    given.pop(next(iter(signature.parameters)))
    told = {n: given.pop(n) for n in list(given) if n in INFERENCE}
    for name, value in told.items():
        if value is not None and value is not INFERENCE[name] and not _inert(layer):
            raise refuse(place, f"it is called with {name}={value}, as in training")
    given = {n: v for n, v in given.items() if v is not None}
    for name, value in given.items():
        if not isinstance(value, jax.Array | np.ndarray | jax.core.Tracer):
            raise refuse(place, f"it is called with {name}={value!r:.80}")
    fields = {f.name: getattr(layer, f.name) for f in dataclasses.fields(layer)}
    flag = next((n for n in INFERENCE if fields.get(n) is not None), None)
    if flag is not None and fields[flag] is not INFERENCE[flag] and not _inert(layer):
        raise refuse(place, f"its {flag} is {fields[flag]}, as in training")
    plain: Any = bare(layer)
    plain = plain.clone(**{flag: None}) if flag else plain
    names = tuple(given)

    def example(variables: Any, *xs: Any) -> Any:
        named = dict(zip(names, xs, strict=True))
        return plain.apply(variables, **named, **flags(plain, False))

    batch = next(
        (x.shape[0] for x in given.values() if x.ndim and not _is_number(x.shape[0])), None
    )
    specs = [jax.ShapeDtypeStruct([s if _is_number(s) else 2 for s in x.shape], x.dtype)
             for x in given.values()]  # fmt: skip
    out = jax.eval_shape(example, jax.tree.map(_like, variables), *specs)
    if not hasattr(out, "shape"):
        raise refuse(place, "it gives several arrays")
    if batch is not None:
        out = jax.ShapeDtypeStruct((batch, *out.shape[1:]), out.dtype)
    leaves, _ = jax.tree_util.tree_flatten_with_path(variables)
    held = tuple(tuple(str(k.key) for k in where) for where, _ in leaves)
    call = Layered(plain, tuple(path), names, held)
    arrays = [value for _, value in leaves]
    return LAYER.bind(*given.values(), *arrays, call=call, out=_Static(out.shape, out.dtype))


def _inert(layer: Any) -> bool:
    return isinstance(layer, nn.Dropout) and layer.rate == 0


def _is_number(size: Any) -> bool:
    return isinstance(size, int | np.integer)


def _like(x: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


@dataclasses.dataclass(frozen=True)
class _Static:
    shape: Any
    dtype: Any


# -- the comparison -------------------------------------------------------------------------------


@judge.full_products()
def _check(run: Any, variables: Any, made: Model, inputs: Sequence[Any], name: str) -> None:
    """Raises unless both give the same on random inputs, but for rounding."""
    tables = [n.layer.num_embeddings for n in made.module.nodes if isinstance(n.layer, nn.Embed)]
    xs = [
        judge.numbers(x.shape[1:])[:7].astype(x.dtype)
        if jnp.issubdtype(x.dtype, jnp.floating)
        else judge.whole_numbers(min(tables, default=2), x.shape[1:]).astype(x.dtype)
        for x in inputs
    ]
    first = min(len(x) for x in xs)
    xs = [x[:first] for x in xs]
    wanted = [np.asarray(y) for y in jax.tree.leaves(jax.jit(run)(variables, *xs))]
    large = sum(math.prod(x.shape[1:]) for x in inputs) > judge.LARGE
    apply = made.module.apply
    model = Tried(lambda v, *xs: jax.tree.leaves(apply(v, *xs)), made.variables, large)
    found = model.outputs(xs)
    eps = judge.eps_of([y.dtype for y in wanted])
    by = "has another shape"
    if [a.shape for a in wanted] == [b.shape for b in found]:
        told = model.judged(xs, found, wanted, eps, _apart)
        if all(t.excess <= 1 for t in told):
            return
        by = f"differs by {max(told, key=lambda t: t.excess).absolute:.3g}"
    raise refuse(
        name,
        f"the output of its graph {by}, and no rounding explains it, so nothing is given back",
        "report it, please: fwt reads an operation of it in another way than JAX",
    )


def _apart(a: np.ndarray, b: np.ndarray, noise: Sequence[Any] = (), *, eps: float) -> judge.Apart:
    found = judge.apart(a, b, noise, eps=eps)
    # The first input is an ordinary one: what is a number there is none by rounding.
    lost = len(a) and np.any(np.isfinite(a[0]) & ~np.isfinite(b[0]))
    return found._replace(excess=np.inf, absolute=np.inf) if lost else found
