"""Scores: what a weight is worth; higher = keep. They are float32, where (1e-20)**2 is 0.

A score is ``(params, *, grads=None, key=None, ...) -> Scores``, the same tree of real numbers, or
these by path. It names the context that it needs, and whoever calls it supplies that. Called
without params, one of ours is itself with that context bound: ``saliency(grads=g)``.
"""

import functools
import inspect
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fwt import _apart, _calls, _keys, _live, _mesh, _nodes, _paths, _tree
from fwt._types import FwtError, LeafError, Model, Params, Score, Scores
from fwt.selection.keys import magnitude_key

__all__ = [
    "fisher",
    "gradient",
    "grasp",
    "magnitude",
    "movement",
    "obd",
    "random",
    "saliency",
    "second_order_taylor",
    "snip",
    "synflow",
    "taylor",
    "wanda",
]


def _noun(function: Callable[..., Any]) -> Score:
    """A score that may be written bare, called, or called with its context."""

    @functools.wraps(function)
    def score(params: Params = None, **context: Any) -> Any:
        if params is None:
            return functools.partial(score, **context) if context else score
        return function(params, **context)

    return score


def _map(function: Callable[..., Any], params: Params, **others: Any) -> Scores:
    """``function(path, leaf, other leaves...)`` on every floating leaf, in float32 at least, for a
    product of two small numbers is 0 in half precision; the rest stay."""
    tree = _tree.Tree(params)
    if "grads" in others:
        others["grads"] = _live.of_ties(tree, others["grads"])
    trees = {name: _tree.Tree(other).leaves for name, other in others.items()}
    new = {}
    for path, leaf in tree.leaves.items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating) or _tree.cut_by_jax(leaf.dtype):
            continue
        found = []
        for name, leaves in trees.items():
            if path not in leaves:
                raise LeafError(f"{name}: nothing for {path!r}{_tree.near(path, leaves)}")
            found.append(leaves[path])
        new[path] = function(path, *map(_wide, (leaf, *found)))
    return tree.replace(new)


def called(score: Score, tree: _tree.Tree, params: Params, context: Any) -> Mapping[str, Any]:
    """What a score gives, by path; ``tree`` is that of the params."""
    if score is gradient and "grads" in context:  # of whose magnitude no array is made
        return _tree.Tree(context["grads"]).leaves
    try:
        found = score(params, **context)
    except (TypeError, ValueError, AttributeError) as error:
        other = next((x for x in jax.tree.leaves(params) if not _nodes.is_array(x)), None)
        kind, said = type(params).__name__, " ".join(str(error).split())
        if isinstance(error, FwtError) or (other is None and not re.search(f"pytree|{kind}", said)):
            raise
        raise LeafError(
            f"the score {getattr(score, '__name__', score)} failed on a {kind}: it gets all of the "
            "params, which may hold more than arrays or be of another structure than grads; in the "
            "score, fwt.select(params) and fwt.select(grads) are arrays by path, and it may return "
            f"such a dict ({said[:200] or type(error).__name__})"
        ) from error

    if isinstance(found, dict) and found and all(path in tree.leaves for path in found):
        return {path: x for path, x in found.items() if _nodes.is_array(x)}
    return _tree.Tree(found).leaves


def _wide(x: Any) -> Any:
    x = jnp.asarray(x)
    return x.astype(_tree.wide_dtype(x.dtype)) if _tree.is_narrow(x.dtype) else x


def _same(path: str, leaf: Any, other: Any, name: str) -> None:
    if other.shape != leaf.shape:
        raise LeafError(f"{name}: {path} expected shape {leaf.shape}, found {other.shape}")


def _times(
    function: Callable[[Any, Any], Any], params: Params, other: Any, name: str = "grads"
) -> Scores:
    def each(path: str, w: Any, x: Any) -> Any:
        _same(path, w, x, name)
        return function(w, x)

    return _map(each, params, **{name: other})


@_noun
def magnitude(params: Params) -> Scores:
    """The absolute value of each weight (Han et al., "Learning both Weights and Connections",
    2015).

    Args:
        params: any pytree of arrays. Without it, the score itself: a noun may be written bare
            or called.

    Returns:
        The same tree of absolute values; those of signed integers are unsigned.

    Example:
        >>> import numpy as np
        >>> magnitude({"dense": {"kernel": np.array([[-2.0, 1.0]], np.float32)}})
        {'dense': {'kernel': Array([[2., 1.]], dtype=float32)}}
    """
    tree = _tree.Tree(params)
    kept = {p: x for p, x in tree.leaves.items() if not _tree.cut_by_jax(x.dtype)}
    return tree.replace({p: _absolute(x) for p, x in kept.items()})


def _absolute(x: Any) -> Any:
    """``|x|``; that of a signed integer is unsigned, for ``|-128|`` is no int8."""
    if not jnp.issubdtype(x.dtype, jnp.signedinteger):
        return jnp.abs(x)
    return magnitude_key(x).astype(f"u{x.dtype.name}")


@_noun
def random(params: Params, *, key: Any) -> Scores:
    """Uniform random numbers, from a key folded for each leaf from its path, which are those of no
    other function of fwt: one seed may serve for the weights and for what is pruned of them.

    Inside ``jax.shard_map`` each shard of a leaf has numbers of its own, and a leaf that is whole
    on each device has the same ones everywhere. With ``check_vma=False`` JAX does not tell the one
    from the other: all shards get the same numbers, unless the key differs between them.

    Args:
        params: any pytree of arrays.
        key: a JAX key, or an int seed.

    Returns:
        The same tree of float32 numbers in [0, 1).

    Example:
        >>> import fwt, numpy as np
        >>> params = {"dense": {"kernel": np.ones((10, 10), np.float32)}}
        >>> float(fwt.prune(0.3, random, key=0)(params)["dense"]["kernel"].sum())
        70.0
    """
    tree = _tree.Tree(params)
    keys = _keys.leaf_keys(key, "random", tree.leaves)
    columns, calls = _apart.Columns(keys), []
    for i, leaf in enumerate(tree.leaves.values()):
        shards = _mesh.varies(leaf) or not isinstance(keys, jax.core.Tracer)
        small = not shards and _apart.joins(leaf.size, len(keys))
        draw = functools.partial(_uniform, leaf)
        calls.append(_apart.Call(leaf.shape if small else None, draw, (), _apart.Row(columns, i)))
    return tree.replace(dict(zip(tree.leaves, _apart.each(calls, in_turn=True), strict=True)))


def _uniform(leaf: Any, key: Any) -> Any:
    return jax.random.uniform(_mesh.key_of_shard(key, leaf), leaf.shape, jnp.float32)


@_noun
def gradient(params: Params, *, grads: Any) -> Scores:
    """The absolute value of the gradient: where RigL lets weights grow back (Evci et al.,
    "Rigging the Lottery", 2020).

    Args:
        params: any pytree of arrays.
        grads: the gradients of the loss, the same tree.

    Returns:
        ``|g|`` for each weight.
    """
    return _times(lambda w, g: jnp.abs(g), params, grads)


@_noun
def saliency(params: Params, *, grads: Any) -> Scores:
    """How much the loss changes, to first order, if the weight goes: ``|w * g|``.

    On a network that is not trained yet it is SNIP (Lee et al., "SNIP: Single-shot Network
    Pruning", 2019), there with ``scope="global"``; :func:`snip` is another name for it.

    Args:
        params: any pytree of arrays.
        grads: the gradients of the loss, the same tree.

    Returns:
        ``|w * g|`` for each weight.

    Example:
        >>> import fwt, numpy as np
        >>> params = {"d": {"kernel": np.array([[1.0, -3.0]], np.float32)}}
        >>> grads = {"d": {"kernel": np.array([[2.0, 0.5]], np.float32)}}
        >>> fwt.prune(0.5, saliency, grads=grads)(params)["d"]["kernel"].tolist()
        [[1.0, 0.0]]
    """
    return _times(lambda w, g: jnp.abs(w * g), params, grads)


snip = saliency


@_noun
def taylor(params: Params, *, grads: Any) -> Scores:
    """The squared first-order change of the loss, ``(w * g)**2`` (Molchanov et al., "Importance
    Estimation for Neural Network Pruning", 2019).

    The same order of single weights as :func:`saliency`, another one of blocks and channels.

    Args:
        params: any pytree of arrays.
        grads: the gradients of the loss, the same tree.

    Returns:
        ``(w * g)**2`` for each weight.
    """
    return _times(lambda w, g: (w * g) ** 2, params, grads)


@_noun
def movement(params: Params, *, grads: Any = None, accumulated: Any = None) -> Scores:
    """How far weights move away from zero, ``-w * g`` summed over training (Sanh et al.,
    "Movement Pruning", 2020). Scores are signed.

    :func:`fwt.optim.sparsify` keeps the sum over all steps; with one gradient it is that of one
    step.

    Args:
        params: any pytree of arrays.
        grads: the gradients of the loss, the same tree.
        accumulated: the sum so far, instead of ``grads``.

    Returns:
        ``-w * g`` for each weight.
    """
    if accumulated is not None:
        return accumulated
    return _times(lambda w, g: -w * g, params, _needed("movement", grads))


@_noun
def fisher(params: Params, *, grads: Any = None, accumulated: Any = None) -> Scores:
    """Optimal Brain Damage with the diagonal of the empirical Fisher information in the place of
    the Hessian's: ``w**2 * mean(g**2) / 2`` (Theis et al., "Faster gaze prediction with dense
    networks and Fisher pruning", 2018).

    Args:
        params: any pytree of arrays.
        grads: one gradient, the same tree; or one for each example, with an axis in front, as
            ``jax.vmap(jax.grad(loss), (None, 0))`` gives them.
        accumulated: the sum of squared gradients, which :func:`fwt.optim.sparsify` keeps over all
            steps, instead of ``grads``.

    Returns:
        The scores; a constant factor does not matter.

    Example:
        >>> import numpy as np
        >>> params = {"d": {"kernel": np.array([[2.0]], np.float32)}}
        >>> fisher(params, grads={"d": {"kernel": np.array([[[1.0]], [[3.0]]])}})
        {'d': {'kernel': Array([[10.]], dtype=float32)}}
    """
    if accumulated is None:
        accumulated = _squares(params, _needed("fisher", grads))
    return _times(lambda w, h: w * w * h / 2, params, accumulated, "accumulated")


def _squares(params: Params, grads: Any) -> Scores:
    def each(path: str, w: Any, g: Any) -> Any:
        if g.ndim == w.ndim + 1:
            _same(path, w, g[0], "grads")
            return jnp.mean(g * g, 0)
        _same(path, w, g, "grads")
        return g * g

    return _map(each, params, grads=grads)


def _needed(name: str, grads: Any) -> Any:
    if grads is None:
        raise FwtError(f"the score {name} needs grads=, which fwt.optim.sparsify gives it")
    return grads


def _moved(params: Params, grads: Any) -> Scores:
    return movement(params, grads=grads)


# What sparsify sums over the steps for a score that takes `accumulated`: an attribute of the
# function, which type checkers don't know.
movement.__dict__["accumulate"] = _moved
fisher.__dict__["accumulate"] = _squares


@_noun
def obd(params: Params, *, hessian: Any) -> Scores:
    """Optimal Brain Damage: ``h * w**2 / 2`` (LeCun, Denker and Solla, 1989).

    Args:
        params: any pytree of arrays.
        hessian: the diagonal of the loss's Hessian, the same tree.

    Returns:
        The scores.

    Example:
        >>> import numpy as np
        >>> params = {"d": {"kernel": np.array([[2.0, 4.0]], np.float32)}}
        >>> obd(params, hessian={"d": {"kernel": np.array([[3.0, 0.5]], np.float32)}})
        {'d': {'kernel': Array([[6., 4.]], dtype=float32)}}
    """
    return _times(lambda w, h: w * w * h / 2, params, hessian, "hessian")


def _gradient_and_product(loss: Callable[..., Any], params: Params, along: str) -> Any:
    """The gradient, and the Hessian times the gradient or the weights, by path; of a tie by its
    first path."""
    tree = _tree.Tree(params)
    _refuse_hidden(tree)
    own = {p: jnp.asarray(x) for p, x in tree.untied().items() if _differentiable(x)}
    moving = {p: _wide(x) for p, x in own.items()}

    def slope(leaves: Mapping[str, Any]) -> Any:
        def of(new: Mapping[str, Any]) -> Any:
            given = tree.replace({p: x.astype(own[p].dtype) for p, x in new.items()})
            try:
                found = loss(_nodes.apart_in(given))
            except Exception as error:  # a user's loss may raise any class
                if not isinstance(given, Model):
                    raise
                raise FwtError(
                    "the loss of a score gets a Model where prune does: lambda model: "
                    f"loss_of(model(x), y); it failed on one ({' '.join(str(error).split())[:150]})"
                ) from error
            if (shape := () if isinstance(found, float) else getattr(found, "shape", None)) != ():
                said = type(found).__name__ if shape is None else f"an array of the shape {shape}"
                raise FwtError(
                    f"the loss of a score gives one number for the params, found {said}: take its "
                    "mean or its sum, and nothing beside it"
                )
            return found

        return jax.grad(of)(leaves)

    grads = slope(moving)
    product = jax.jvp(slope, (moving,), (grads if along == "grads" else moving,))[1]
    return tree, moving, grads, product


def _refuse_hidden(tree: _tree.Tree) -> None:
    """Raises for what a file calls one array, where a trace hides whether it still is."""
    for group in tree.perhaps:
        raise LeafError(_paths.hidden_tie(group, "this score is that of one weight or of two"))


def _differentiable(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating) and not _tree.cut_by_jax(x.dtype)


def grasp(loss: Callable[[Any], Any]) -> Score:
    """What the weight does for the flow of gradients, ``w * (H g)`` (Wang et al., "Picking
    Winning Tickets Before Training by Preserving Gradient Flow", 2020).

    Args:
        loss: ``params -> scalar``, on a batch that it holds, with what :func:`fwt.prune` is
            given: ``lambda v: loss_of(net.apply(v, x), y)`` for variables,
            ``net.apply({"params": p}, x)`` for the params alone, and ``model(x)`` for a Model.

    Returns:
        A score; scores are signed.

    Example:
        >>> import numpy as np
        >>> params = {"d": {"kernel": np.array([[1.0, 2.0]], np.float32)}}
        >>> grasp(lambda p: (p["d"]["kernel"] ** 2).sum())(params)["d"]["kernel"].tolist()
        [[4.0, 16.0]]
    """

    def score(params: Params) -> Scores:
        tree, w, _, product = _gradient_and_product(loss, params, "grads")
        return tree.replace({p: w[p] * product[p] for p in w})

    return _called("grasp", loss, score)


def second_order_taylor(loss: Callable[[Any], Any]) -> Score:
    """The squared change of the loss to second order, ``(w * g - w * (H w) / 2)**2`` (Molchanov et
    al., "Importance Estimation for Neural Network Pruning", 2019).

    Args:
        loss: ``params -> scalar``, as for :func:`grasp`.

    Returns:
        A score.

    Example:
        >>> import numpy as np
        >>> params = {"d": {"kernel": np.array([[1.0, 2.0]], np.float32)}}
        >>> score = second_order_taylor(lambda p: (p["d"]["kernel"] ** 2).sum())
        >>> score(params)["d"]["kernel"].tolist()
        [[1.0, 16.0]]
    """

    def score(params: Params) -> Scores:
        tree, w, grads, product = _gradient_and_product(loss, params, "weights")
        return tree.replace({p: (w[p] * grads[p] - w[p] * product[p] / 2) ** 2 for p in w})

    return _called("second_order_taylor", loss, score)


def _called(name: str, loss: Any, score: Score) -> Score:
    if not callable(loss):
        raise FwtError(f"{name} takes a loss, a function of the params; found {loss!r:.80}")
    takes: Any = None  # a function may have no signature
    try:
        (takes := inspect.signature(loss)).bind(None)
    except (TypeError, ValueError) as error:
        if takes is not None:
            way = f"found {takes}: {name}(lambda params: loss(params, batch))"
            raise FwtError(f"{name}'s loss takes the params alone, {way}") from error
    score.__name__ = name
    return score


def synflow(
    module: Any, input_shape: Any = None, *, input_dtype: Any = None, **collections: Any
) -> Score:
    """How much flows through the weight, without data: ``|w| * dR/d|w|`` for ``R`` the sum of the
    outputs for an input of ones, with every weight made positive (Tanaka et al., "Pruning neural
    networks without any data by iteratively conserving synaptic flow", 2020).

    Use it with ``scope="global"``, in many rounds of rising sparsity. ``R`` is a product over the
    layers, in the dtype of the weights, so that a deep net may overflow it.

    Args:
        module: a linen module, such as :class:`fwt.Sequential`, or a Model; or an nnx module, which
            runs in eval mode, and the score is then of such a module, or of its state.
        input_shape: of one input, without the batch axis; None takes the Sequential's own.
        input_dtype: None is int32 where a table takes the input (its row 1 alone counts), or
            float32.
        **collections: what the module needs beside params (``batch_stats=...``), where the score
            is not made from a Model, or called with one or with variables that hold it.

    Returns:
        A score.

    Raises:
        FwtError: without an input shape, or where ``R`` overflows (not under ``jit``, where
            nothing can be raised).

    Example:
        >>> import fwt, flax.linen as nn, jax, jax.numpy as jnp
        >>> net = fwt.Sequential([("a", nn.Dense(3)), ("b", nn.Dense(2))], input_shape=(4,))
        >>> variables = net.init(jax.random.key(0), jnp.ones((1, 4)))
        >>> pruned = fwt.prune(0.5, synflow(net), scope="global")(variables)
        >>> sum(int((x == 0).sum()) for x in fwt.select(pruned, fwt.kernels).values())
        9
    """
    module, beside = _calls.parted(module)
    shape = getattr(module, "input_shape", None) if input_shape is None else input_shape
    several: Any = shape if any(isinstance(s, tuple) for s in shape or ()) else (shape,)
    if any(s is None or None in s for s in several):
        raise FwtError("synflow needs the shape of one input: synflow(module, input_shape=(...))")
    from fwt import _graph

    dtypes = _graph.input_dtypes(module) if input_dtype is None else [input_dtype]
    dtypes = dtypes if len(dtypes) == len(several) else dtypes[:1] * len(several)

    def score(params: Params) -> Scores:
        ones = [jnp.ones((1, *s), d) for s, d in zip(several, dtypes, strict=True)]
        graph = _nodes.is_graph(module)
        variables = (
            _calls.copied(module, params)
            if graph
            else _calls.variables("synflow", module, params, collections, beside)
        )
        tree = _calls.whole("synflow", params)
        weights = _tree.Tree(variables)
        weights = _tree.Tree(weights.replace({p: _absolute(x) for p, x in weights.leaves.items()}))
        _refuse_hidden(tree)
        kept = tree.untied()
        moving = {p: x for p, x in weights.leaves.items() if p in kept and _differentiable(x)}

        def flow(leaves: Mapping[str, Any]) -> Any:
            own = weights.replace(tree.with_ties(leaves))
            found = own(*ones) if graph else module.apply(own, *ones)
            return sum(map(jnp.sum, jax.tree.leaves(found)))

        given, whole = f"ones of {[x.shape for x in ones]}", 'input_dtype="int32"'
        with _calls.explained("synflow", module, given, "another input_shape=", whole):
            total, slopes = jax.value_and_grad(flow)(moving)
        if not isinstance(total, jax.core.Tracer) and not jnp.isfinite(total):
            raise FwtError("synflow: the flow overflows float32; run it with jax.enable_x64(True)")
        return tree.replace({p: jnp.abs(w * slopes[p]) for p, w in moving.items()})

    score.__name__ = "synflow"
    return score


def wanda(module: Any, batch: Any, **collections: Any) -> Score:
    """The weight times the norm of the inputs that it meets, ``|w| * ||x||`` (Sun et al., "A Simple
    and Effective Pruning Approach for Large Language Models", 2024).

    For a convolution the norm is over all positions that the weight meets in its window. The
    paper compares the weights of one output: ``fwt.prune(0.5, wanda(model, batch),
    scope="output")``, and so does ``pattern=n_m(...)``.

    Args:
        module: a linen module, such as :class:`fwt.Sequential`, or a Model; or an nnx module, which
            runs in eval mode, and the score is then of such a module, or of its state.
        batch: calibration inputs, as ``module.apply`` takes them.
        **collections: what the module needs beside params (``batch_stats=...``), where the score
            is not made from a Model, or called with one or with variables that hold it.

    Returns:
        A score; the params that belong to no linear layer (biases, norms) get their magnitude.

    Raises:
        LeafError: in use, for inputs that are not finite, or a kernel of a layer that is not
            linear or that runs inside a lifted transformation (a scan, but not remat); in ``prune``
            only where its ``where`` takes that kernel.

    Example:
        >>> import fwt, flax.linen as nn, jax.numpy as jnp
        >>> net = fwt.Sequential([("d", nn.Dense(1))])
        >>> params = {"d": {"kernel": jnp.array([[3.0], [1.0]]), "bias": jnp.zeros(1)}}
        >>> wanda(net, jnp.array([[1.0, 5.0]]))(params)["d"]["kernel"].tolist()
        [[3.0], [5.0]]
    """
    module, beside = _calls.parted(module)

    def score(params: Params) -> Scores:
        graph = _nodes.is_graph(module)
        variables = (
            params if graph else _calls.variables("wanda", module, params, collections, beside)
        )
        squares: dict[str, Any] = {}
        shapes = {p: x.shape for p, x in _tree.Tree(variables).leaves.items()}

        def see(path: str, layer: Any, x: Any) -> None:
            found = _squared_inputs(layer, x, shapes[path])
            squares[path] = squares[path] + found if path in squares else found

        tree = _calls.whole("wanda", params)
        _calls.run("wanda", module, variables, batch, see, _calls.ASKED.get())
        for path, square in squares.items():
            if not isinstance(square, jax.core.Tracer) and not jnp.isfinite(square).all():
                raise LeafError(f"wanda: the inputs of {path} on the batch are not finite")
        _refuse_hidden(tree)
        for group in tree.ties:  # which meets the inputs of all its layers
            one, met = tree.leaves[group[0]], [p for p in group if p in squares]
            parts = [_nodes.turned(tree.leaves[p], one, squares.pop(p)) for p in met]
            if parts:
                squares[group[0]] = functools.reduce(operator.add, parts)
        new = {p: jnp.abs(x) for p, x in tree.untied().items() if _differentiable(x)}
        asked = _calls.ASKED.get()
        if asked is not None:  # a kernel that met no inputs has no score, whoever takes it
            new |= {p: new[p] * jnp.nan for p in new if p not in asked and p.endswith("/kernel")}
        return tree.replace(
            {p: x * jnp.sqrt(squares[p]) if p in squares else x for p, x in new.items()}
        )

    score.__name__ = "wanda"
    return score


def _squared_inputs(layer: Any, x: Any, shape: Any) -> Any:
    """For each weight of a linear layer, the sum of the squares of the inputs that it meets: the
    derivative of the summed outputs by the kernel, at inputs squared."""
    # In float32, whatever the layer computes in: squares of half precision overflow, or are 0.
    squared = _wide(x) ** 2
    bare = layer.clone(dtype=squared.dtype)

    def summed(kernel: Any) -> Any:
        return jnp.sum(bare.apply({"params": {"kernel": kernel}}, squared))

    return jax.grad(summed)(jnp.zeros(shape, squared.dtype))


FACTORIES = (grasp, second_order_taylor, synflow, wanda)  # what has to be called first
