"""Layer-sequential unit variance: an initialisation that looks at data."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fwt import _axes, _initialize, _tree, initializers
from fwt._types import LeafError, Model, Where


def lsuv(
    module: Any,
    variables: Any,
    batch: Any,
    key: Any,
    where: Where = _axes.kernels,
    *,
    axes: Mapping[str, str] | None = None,
    **kwargs: Any,
) -> Any:
    """Orthogonal kernels, scaled so that each layer's output has variance 1 on a batch.

    In the order in which the layers run, each kernel is drawn by
    :func:`fwt.initializers.orthogonal` and then scaled so that the output before the activation
    has variance 1 over all of the batch, positions and units. Biases stay: the output is affine
    in the kernel, so the scale is solved for with them in place, and one forward pass is enough.
    A layer that runs twice is scaled where it runs first. Source: Mishkin and Matas, "All you
    need is a good init", 2016.

    Args:
        module: any linen module; a :class:`fwt.Sequential` or the module of a Model.
        variables: its variables.
        batch: its input; some hundred samples are usual.
        key: a JAX key, or an int seed.
        where: which kernels; the layers of the others run as they are.
        axes: ``{glob: names}`` for leaves whose axes nothing else tells.
        **kwargs: what ``module.apply`` needs besides, such as ``train=False``.

    Returns:
        New variables.

    Raises:
        WhereError: if ``where`` matches nothing.
        LeafError: for a kernel whose layer does not run, whose output does not vary or varies too
            much by its bias alone, or that runs inside a lifted transformation (an RNN's scan).

    Example:
        >>> import fwt, jax, flax.linen as nn
        >>> net = fwt.Sequential([("a", nn.Dense(30)), fwt.layers.ReLU(), ("b", nn.Dense(20))])
        >>> x = jax.random.normal(jax.random.key(1), (256, 10)) * 5
        >>> variables = lsuv(net, net.init(jax.random.key(0), x), x, key=0)
        >>> round(float(net.apply(variables, x).var()), 3)
        1.0
    """
    import flax.linen as nn

    tree = _tree.Tree(variables)
    names = tree.select(where)
    draw = _initialize.initialize(initializers.orthogonal, key, names, axes=axes)
    start = draw(Model(module, variables)).variables  # the module tells axes
    scales: dict[str, Any] = {}

    def interceptor(run: Any, args: Any, kwds: Any, context: Any) -> Any:
        out = run(*args, **kwds)
        owner = context.module
        path = "/".join(_tree.escape(str(p)) for p in (*owner.path, "kernel"))
        if context.method_name != "__call__" or path not in names:
            return out
        bias = owner.get_variable("params", "bias")
        shift = 0.0 if bias is None else jnp.asarray(bias, out.dtype)
        signal = (out - shift).astype(jnp.promote_types(out.dtype, jnp.float32))
        if path not in scales:
            if isinstance(out, jax.core.Tracer) and not isinstance(batch, jax.core.Tracer):
                raise LeafError(
                    f"{path} runs inside a lifted transformation, such as an RNN's scan, where "
                    "its output can't be measured: leave it out with where="
                )
            scales[path] = _scale(signal, shift, path)
        return (signal * scales[path] + shift).astype(out.dtype)

    with nn.intercept_methods(interceptor):
        module.apply(start, batch, **kwargs)
    missing = [p for p in names if p not in scales]
    if missing:
        raise LeafError(
            f"{missing[0]}: no layer with this kernel ran on the batch; leave it out with where="
        )
    new = _tree.Tree(start)
    return new.replace(
        {p: (new.leaves[p] * s).astype(new.leaves[p].dtype) for p, s in scales.items()}
    )


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
        raise LeafError(f"{path} can't get an output of variance 1: {why}")
    return found
