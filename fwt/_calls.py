"""The linear layers of a linen or nnx module while it runs, and what each of them is given."""

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, TypeVar

import jax
import numpy as np

from fwt import _axes, _live, _nodes, _tree
from fwt._types import FwtError, LeafError, Model

# Takes the path of a kernel, its layer as a linen module without a bias, and the layer's input;
# gives a kernel that the layer takes instead, or None. Without a layer, it takes why there is none.
See = Callable[[str, Any, Any], Any]
# By the id of an nnx layer, what is called with each of its inputs.
_WATCHED: ContextVar[Mapping[int, Callable[[Any], Any]] | None] = ContextVar(
    "watched", default=None
)
# The kernels that the scores are asked for, where not all are.
ASKED: ContextVar[Collection[str] | None] = ContextVar("asked", default=None)


Function = TypeVar("Function", bound=Callable[..., Any])


def of_model(function: Function) -> Function:
    """A function of a module, its variables and more, which gives new variables, that takes a Model
    in the place of the first two too, and gives a Model then; or an nnx module, which holds its
    variables."""
    name: str = function.__name__

    @functools.wraps(function)
    def taken(module: Any, *args: Any, **kwds: Any) -> Any:
        _check_flax(name, module)
        second = kwds.get("variables", args[0] if args else None)
        graph = _nodes.is_graph(module) and not isinstance(module, Mapping)
        if graph and "variables" not in kwds and (not args or _nodes.is_array(second)):
            return function(module, module, *args, **kwds)
        if not isinstance(module, Model):
            return function(module, *args, **kwds)
        if isinstance(second, Model) or "variables" in kwds or _tree.is_variables(second):
            raise FwtError(
                f"a Model holds its variables, so {type(second).__name__} after it is one argument "
                f"too many: {name}(model, batch, ...)"
            )
        return Model(module.module, function(module.module, module.variables, *args, **kwds))

    made: Any = taken
    return made


def parted(model: Any) -> tuple[Any, Mapping[str, Any]]:
    """The module of a Model, and what it holds beside params; of any other module, nothing."""
    if not isinstance(model, Model):
        return model, {}
    return model.module, {k: v for k, v in model.variables.items() if k != "params"}


def variables(
    what: str,
    module: Any,
    params: Any,
    collections: Mapping[str, Any],
    beside: Mapping[str, Any],
) -> Any:
    """The variables that a module runs with: these params, or these variables, and what is beside
    them where they don't hold it."""
    _check_flax(what, module)
    if not hasattr(module, "apply"):
        raise FwtError(f"{what} takes a Flax module, found {type(module).__name__}")
    params = params.variables if isinstance(params, Model) else params
    own = params if _tree.is_variables(params) else {"params": params}
    return {**beside, **own, **collections}


def whole(what: str, params: Any) -> _tree.Tree:
    """The tree of params that a module runs with.

    Raises:
        LeafError: where :func:`fwt.at` holds leaves of it back.
    """
    tree = _tree.Tree(params)
    for path in tree.hidden:
        raise LeafError(
            f"{what} runs the whole module, and fwt.at holds {path} back: "
            "fwt.prune(..., where=) prunes a part of it"
        )
    return tree


def _check_flax(what: str, module: Any) -> None:
    framework, _ = _nodes.foreign(module)
    if framework:
        raise FwtError(
            f"{what} takes a Flax module, found a {type(module).__name__} of {framework}: "
            f"fwt.converters.from_{framework}(model) gives a Model, which it takes too"
        )


class UnfitError(LeafError):
    """Says of one kernel why it can't be taken, without its path and the way out."""


def run(
    what: str,
    module: Any,
    variables: Any,
    batch: Any,
    see: See,
    wanted: Collection[str] | None = None,
    wrong: dict[str, str] | None = None,
) -> None:
    """Runs a module on a batch and shows each call of a layer with a kernel.

    Args:
        what: who asks, for errors.
        module: a linen module, or an nnx module.
        variables: its variables; of an nnx module, this itself or its state.
        batch: what the module takes.
        see: is called before the layer runs; an UnfitError of it counts as below.
        wanted: the kernels that are asked for; all by default. Others are shown where they can be.
        wrong: gets, by path, why kernels that are asked for can't be shown: those of a layer that
            is not linear, or whose inputs are hidden by a lifted transformation.

    Raises:
        FwtError: for another module, or a batch without samples.
        LeafError: for all kernels that can't be shown, unless ``wrong`` gets them.
    """
    unfit: dict[str, str] = {} if wrong is None else wrong
    for x in jax.tree.leaves(batch):
        if framework := _nodes.foreign(x)[0]:
            raise FwtError(
                f"{what}: the batch is a {type(x).__name__} of {framework}, and a module of Flax "
                "takes arrays of JAX and NumPy: give it np.asarray(x)"
            )
    if any(0 in getattr(x, "shape", ()) for x in jax.tree.leaves(batch)):
        raise FwtError(f"{what}: the batch has no samples, so nothing tells what the layers meet")
    traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((variables, batch)))

    def told(path: str, layer: Any, x: Any) -> Any:
        asked = wanted is None or path in wanted
        try:
            if layer is None:
                raise UnfitError(x)
            if isinstance(x, jax.core.Tracer) and not traced:
                raise UnfitError(
                    "runs inside a lifted transformation (scan, vmap, jit, an RNN), where its "
                    "inputs can't be kept"
                )
            return see(path, layer, x)
        except UnfitError as error:
            if asked:
                unfit.setdefault(path, str(error))
            return None

    graph = _nodes.is_graph(module)
    _check_flax(what, module)
    if not graph and not hasattr(module, "apply"):
        raise FwtError(f"{what} takes a Flax module, found {module!r:.80}")
    with (
        explained(
            what,
            module,
            "the batch alone",
            _batch_of(module),
        ),
        forward(),
    ):
        (_run_nnx if graph else _run_linen)(module, variables, batch, told)
    if wrong is None:
        refuse(what, unfit, wanted)


def _batch_of(module: Any) -> str:
    """What to give a module that does not run on a batch."""
    shape = getattr(module, "input_shape", None)
    if isinstance(shape, tuple) and not any(isinstance(s, tuple) for s in shape):
        sizes = ", ".join("n" if s is None else str(s) for s in shape)
        return f"an array of shape (n, {sizes}), as the module itself takes it"
    return "a module around it that takes the batch and nothing more"


def refuse(what: str, wrong: Mapping[str, str], wanted: Collection[str] | None) -> None:
    """Raises for kernels that can't be taken, with the ``where`` that leaves all of them out."""
    if not wrong:
        return
    left = [path for path in wanted or () if path not in wrong]
    said = "; ".join([f"{path} {why}" for path, why in wrong.items()][:8])
    more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
    way = f"leave {'it' if len(wrong) == 1 else 'them'} out with where={left!r}"
    if wanted is None:
        way = "take another score"
    elif not left:
        way = "no leaf is left, and fwt.prune takes them by magnitude"
    if any("lifted" in why for why in wrong.values()):
        way += "; or give a module that calls each of its layers itself"
    raise LeafError(f"{what}: {said}{more}: {way}")


@contextlib.contextmanager
def forward() -> Iterator[None]:
    """In it, ``nn.remat`` runs its functions as they are: all that it changes is what is kept for a
    gradient. Those of nnx take a module apart, so that its layers are others."""
    global _running
    token = _PLAIN.set(True)
    with _LOCK:
        _running += 1
        vars(jax)["remat"] = _remat  # which Flax looks up where it calls it
    try:
        yield
    finally:
        _PLAIN.reset(token)
        with _LOCK:
            _running -= 1
            if not _running:
                vars(jax)["remat"] = _REMAT


_REMAT: Any = jax.remat
_LOCK, _running = threading.Lock(), 0
_PLAIN: ContextVar[bool] = ContextVar("plain", default=False)


def _remat(function: Any = None, **how: Any) -> Any:
    """``jax.remat``, or in a context of :func:`forward` the function as it is."""
    if function is None:
        return functools.partial(_remat, **how)
    return function if _PLAIN.get() else _REMAT(function, **how)


def _check_order(what: str, module: Any) -> None:
    """Raises for a converted torch model in which layers count an image's entries in Flax's order:
    converters.transform gives the weights in that of torch."""
    if name := _axes.reordering(module):
        raise LeafError(
            f"{what} runs the Flax model, which counts what {name} takes with the channels last, "
            "and converters.transform gives the weights of a torch model with the channels first: "
            "change the Model, and net.load_state_dict(converters.to_torch(model).state_dict()) "
            "takes it back"
        )


@contextlib.contextmanager
def explained(what: str, module: Any, given: str, way: str, whole: str = "") -> Iterator[None]:
    """Whatever a user's module says of what it is given becomes an error of ours.

    Args:
        what: who runs it.
        module: what runs.
        given: what it is given, as a noun.
        way: what to give instead.
        whole: what to give to a module that takes whole numbers alone.

    Raises:
        LeafError: where a live torch model's weights would be run in another order.
    """
    if any(_nodes.foreign(k.owner)[0] == "torch" for k in _live.KNOWN.get().values()):
        _check_order(what, module)
    try:
        yield
    except FwtError:
        raise
    except Exception as error:  # a user's module raises what it likes: it becomes ours
        why = " ".join(str(error).split())
        if type(error).__name__ == "ScopeCollectionNotFound":
            way = "what it needs beside params: fwt.Model(module, variables), or batch_stats=..."
        if "must be an integer" in why:
            way = whole or "a batch of whole numbers, of the dtype int32"
        raise FwtError(
            f"{what}: {type(module).__name__} does not run on {given} "
            f"({type(error).__name__}: {why:.200}): give {way}"
        ) from error


def _not_linear(layer: Any) -> str:
    return f"is of a {type(layer).__name__}, which is no linear layer"


_OTHER = "is of a layer that computes with another kernel than this (as in nn.WeightNorm)"


def _run_linen(module: Any, variables: Any, batch: Any, told: See) -> None:
    import flax.linen as nn

    from fwt.layers import GroupedConvTranspose

    linear = (nn.Dense, nn.DenseGeneral, nn.Einsum, nn.Conv, nn.ConvLocal, nn.ConvTranspose,
              GroupedConvTranspose)  # fmt: skip
    kernels = _tree.Tree(variables).leaves
    inside: list[str] = []  # a layer that is called once more, under this interceptor

    def interceptor(call: Any, args: Any, kwds: Any, context: Any) -> Any:
        layer = context.module
        path = "/".join(_tree.escape(str(p)) for p in (*layer.path, "kernel"))
        if inside or context.method_name != "__call__" or path not in kernels:
            return call(*args, **kwds)
        x = args[0] if args else next(iter(kwds.values()))
        if not isinstance(layer, linear):
            told(path, None, _not_linear(layer))
            return call(*args, **kwds)
        held: Any = jax.tree.leaves(layer.variables["params"]["kernel"])[0]  # of a box
        known = not any(isinstance(v, jax.core.Tracer) for v in (held, kernels[path]))
        if known and not np.array_equal(held, kernels[path], equal_nan=True):
            told(path, None, _OTHER)
            return call(*args, **kwds)
        inside.append(path)
        try:
            new = told(path, layer.clone(parent=None, name=None, use_bias=False), x)
            if new is None:
                return call(*args, **kwds)
            own = {**layer.variables["params"], "kernel": new}
            return layer.clone(parent=None, name=None).apply({"params": own}, *args, **kwds)
        finally:
            inside.pop()

    with nn.intercept_methods(interceptor):
        module.apply(variables, batch)


# -- nnx ----------------------------------------------------------------------------------------

# The linen class of an nnx layer, and what it calls its settings.
_SAME = {n: n for n in ("kernel_size", "strides", "padding", "kernel_dilation", "mask")}
_TWINS: dict[str, tuple[str, dict[str, str]]] = {
    "Linear": ("Dense", {"features": "out_features"}),
    "LinearGeneral": (
        "DenseGeneral",
        {"features": "out_features", "axis": "axis", "batch_dims": "batch_axis"},
    ),
    "Einsum": ("Einsum", {"shape": "kernel_shape", "einsum_str": "einsum_str"}),
    "Conv": (
        "Conv",
        {"features": "out_features", "input_dilation": "input_dilation",
         "feature_group_count": "feature_group_count", **_SAME},
    ),
    "ConvTranspose": (
        "ConvTranspose",
        {"features": "out_features", "transpose_kernel": "transpose_kernel", **_SAME},
    ),
}  # fmt: skip


def _twin(layer: Any) -> Any:
    """An nnx layer as a linen layer without a bias; None of a layer that is not linear."""
    import flax.linen as nn
    from flax import nnx

    cls, names = _TWINS.get(type(layer).__name__, ("", {}))
    if not cls or type(layer) is not getattr(nnx, type(layer).__name__):
        return None
    settings = {ours: getattr(layer, theirs) for ours, theirs in names.items()}
    if "batch_dims" in settings:  # of nnx, with the sizes of these axes
        settings["batch_dims"] = tuple(settings["batch_dims"])
    return getattr(nn, cls)(use_bias=False, **settings)


@functools.cache  # JAX never forgets a class that nnx made a node
def _watching(cls: Any) -> Any:
    def call(self: Any, *args: Any, **kwds: Any) -> Any:
        watch = (_WATCHED.get() or {}).get(id(self))
        new = None if watch is None else watch(args[0] if args else next(iter(kwds.values())))
        if new is not None:
            self.kernel = sys.modules["flax.nnx"].Param(new)
        return cls.__call__(self, *args, **kwds)

    made = type(cls)  # of nnx
    return made(cls.__name__, (cls,), {"__call__": call})


def copied(module: Any, params: Any) -> Any:
    """A copy of an nnx module in eval mode, with the values of another or of a state."""
    from flax import nnx

    own = _nodes.apart(params if _nodes.is_graph(params) else module)
    if not _nodes.is_graph(params):
        nnx.update(own, _nodes.unshared(params))
    own.eval()
    return own


def _run_nnx(module: Any, params: Any, batch: Any, told: See) -> None:
    own = copied(module, params)
    tree = _tree.Tree(own)
    layers = [
        ("/".join(map(_tree.escape, (*parts, "kernel"))), layer)
        for parts, layer in tree.layers.items()
        if hasattr(layer, "kernel")
    ]
    paths = {id(layer.kernel): path for path, layer in layers if path in tree.leaves}
    met: set[str] = set()

    def shown(path: str, layer: Any, x: Any) -> Any:
        met.add(path)
        return told(path, layer, x)

    watched = {}
    for _, layer in layers:
        path = paths.get(id(layer.kernel), "")  # a shared kernel is one
        twin = _twin(layer)
        if path and twin is None:
            shown(path, None, _not_linear(layer))
        elif path:
            watched[id(layer)] = functools.partial(shown, path, twin)
            cls: Any = type(layer)
            layer.__class__ = _watching(cls)
    token = _WATCHED.set(watched)
    try:
        own(batch)
    finally:
        _WATCHED.reset(token)
    for path in paths.values():
        if path not in met:
            told(path, None, "meets no inputs on the batch: its layer does not run, or runs inside "
                 "a lifted transformation (scan, vmap, jit, remat, nnx.RNN), where these can't be "
                 "kept")  # fmt: skip
