"""Layer-sequential unit variance: an initialisation that looks at data."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fwt import _axes, _calls, _draw, _tree, initializers
from fwt._types import FwtError, LeafError, Where


@_calls.of_model
def lsuv(
    module: Any,
    variables: Any = None,
    batch: Any = None,
    key: Any = None,
    where: Where = _axes.kernels,
    *,
    axes: Mapping[str, str] | None = None,
    **kwargs: Any,
) -> Any:
    """Orthogonal kernels, scaled so that each layer's output has variance 1 on a batch.

    In the order in which the layers run, each kernel is drawn by
    :func:`fwt.initializers.orthogonal` and then scaled so that the output before the activation
    has variance 1 over all of the batch, positions and units. Biases stay: the output is affine
    in the kernel, so the scale is solved for with them in place, in one forward pass; a second one
    checks it (but not under ``jit``, where nothing can be raised).
    A layer that runs twice is scaled where it runs first. Source: Mishkin and Matas, "All you
    need is a good init", 2016.

    Args:
        module: any linen module, such as a :class:`fwt.Sequential`; or a Model,
            ``lsuv(model, batch, key)``.
        variables: its variables; a Model has its own.
        batch: its input; some hundred samples are usual.
        key: a JAX key, or an int seed.
        where: which kernels; the layers of the others run as they are.
        axes: ``{glob: names}`` for leaves whose axes nothing else tells.
        **kwargs: what ``module.apply`` needs besides, such as ``train=False``.

    Returns:
        New variables, or a new Model.

    Raises:
        WhereError: if ``where`` matches nothing.
        LeafError: for a stack of layers, or a kernel whose layer does not run, whose output does
            not vary, varies too much by its bias alone or is not affine in the kernel, or that
            runs inside a lifted transformation (a scan, but not remat).

    Example:
        >>> import fwt, jax, flax.linen as nn
        >>> net = fwt.Sequential([("a", nn.Dense(30)), fwt.layers.ReLU(), ("b", nn.Dense(20))])
        >>> x = jax.random.normal(jax.random.key(1), (256, 10)) * 5
        >>> variables = lsuv(net, net.init(jax.random.key(0), x), x, key=0)
        >>> round(float(net.apply(variables, x).var()), 3)
        1.0
    """
    import flax.linen as nn

    if not isinstance(variables, Mapping) or "params" not in variables:
        raise LeafError(
            "lsuv takes variables as module.init gives them, {'params': ...}, after a linen "
            "module, or a Model: lsuv(model, batch, key)"
        )
    if batch is None or key is None:
        raise FwtError("lsuv needs a batch of inputs and a key: lsuv(model, batch, key)")
    tree = _tree.Tree(variables)
    names = tree.select(where)
    places = _axes.Places(tree, axes, module)
    places.check_used(names)

    def choose(path: str, shape: tuple[int, ...]) -> tuple[Any, str]:
        place = places(path)
        if place.stack:
            raise LeafError(
                f"{path} of shape {shape} is a stack of layers (nn.scan, nn.vmap), whose outputs "
                "can't be measured one by one: leave it out with where="
            )
        return initializers.orthogonal().at(place), path

    start = _draw.drawn(tree, names, key, "lsuv", None, choose)
    traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((variables, batch, key)))
    scales: dict[str, Any] = {}
    variances: dict[str, Any] = {}

    def run(values: Any, visit: Any) -> None:
        """The model on the batch, with ``visit(path, layer, out)`` for the output of each layer."""

        def interceptor(call: Any, args: Any, kwds: Any, context: Any) -> Any:
            out = call(*args, **kwds)
            path = "/".join(_tree.escape(str(p)) for p in (*context.module.path, "kernel"))
            mine = context.method_name == "__call__" and path in names
            return visit(path, context.module, out) if mine else out

        way = "what else module.apply takes, such as train=False"
        told = _calls.explained("lsuv", module, "the batch", way)
        with nn.intercept_methods(interceptor), told, _calls.forward():
            module.apply(values, batch, **kwargs)

    def scaled(path: str, layer: Any, out: Any) -> Any:
        bias = layer.get_variable("params", "bias")
        shape = getattr(out, "shape", None)
        if shape is None or (bias is not None and bias.shape != shape[len(shape) - bias.ndim :]):
            raise LeafError(
                f"lsuv: {path} is of a {type(layer).__name__}, whose output is not the kernel "
                "times the input plus the bias: leave it out with where="
            )
        shift = 0.0 if bias is None else jnp.asarray(bias, out.dtype)
        signal = (out - shift).astype(_tree.wide_dtype(out.dtype))
        if path not in scales:
            if isinstance(out, jax.core.Tracer) and not traced:
                raise LeafError(
                    f"{path} runs inside a lifted transformation (scan, vmap, jit, an RNN), "
                    "where its output can't be measured: leave it out with where="
                )
            scales[path] = _scale(signal, shift, path)
        return (signal * scales[path] + shift).astype(out.dtype)

    def measured(path: str, layer: Any, out: Any) -> Any:
        variances.setdefault(path, jnp.var(out.astype(_tree.wide_dtype(out.dtype))))
        return out

    run(start, scaled)
    missing = [p for p in names if p not in scales]
    if missing:
        raise LeafError(
            f"{missing[0]}: no layer with this kernel ran on the batch; leave it out with where="
        )
    leaves = _tree.Tree(start).leaves
    changed = {
        p: _tree.rounded(leaves[p].astype(_tree.wide_dtype(leaves[p].dtype)) * s, leaves[p].dtype)
        for p, s in scales.items()
    }
    new = _tree.Tree(start).replace(changed)
    if traced:
        return new
    run(new, measured)
    for path, variance in variances.items():
        rounding = float(jnp.finfo(leaves[path].dtype).eps)  # of an 8-bit float, an eighth
        if not abs(variance - 1) < max(0.02, rounding):
            raise LeafError(
                f"{path}: its output has variance {float(variance):.3g} after scaling, so it is "
                "not affine in the kernel (a WeightNorm?): leave it out with where="
            )
    return new


def _scale(signal: Any, shift: Any, path: str) -> Any:
    """The s > 0 for which ``s * signal + shift`` has variance 1, a quadratic equation."""
    shift = jnp.broadcast_to(jnp.asarray(shift, signal.dtype), signal.shape)
    size = jnp.maximum(jnp.max(jnp.abs(signal)), jnp.finfo(signal.dtype).tiny)
    centred = signal / size - jnp.mean(signal / size)
    about = shift - jnp.mean(shift)
    a, b = jnp.mean(centred**2), jnp.mean(centred * about)
    rest = 1 - jnp.mean(about**2)
    root = b * b + a * rest
    found = (jnp.sqrt(jnp.maximum(root, 0)) - b) / jnp.where(a > 0, a, 1) / size
    legal = (a > 0) & (rest > 0) & jnp.isfinite(found) & (found > 0)
    if not isinstance(legal, jax.core.Tracer) and not legal:
        why = "its output does not vary on the batch" if rest > 0 else "its bias alone varies more"
        why = why if jnp.isfinite(a) else "its output is not finite"
        raise LeafError(f"{path} can't get an output of variance 1: {why}")
    return found
