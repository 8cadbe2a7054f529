"""Pruning that mends what is left: SparseGPT."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from fwt import _axes, _calls, _nodes, _tree, patterns
from fwt._types import FwtError, LeafError, Model, Where, resolve
from fwt.selection import select
from fwt.selection.keys import sources


@_calls.of_model
def sparsegpt(
    module: Any,
    variables: Any = None,
    batch: Any = None,
    sparsity: float | None = None,
    *,
    pattern: patterns.Pattern = patterns.unstructured,
    where: Where = _axes.kernels,
    damping: float = 0.01,
    block: int = 128,
) -> Any:
    """Prunes each layer and moves its other weights so that its outputs on a batch stay as near
    as they can.

    Layer after layer as they run, each on what those before it, pruned already, give. Inputs are
    taken in turn: the error of a pruned weight is made good by those of later inputs, by the
    inverse of the inputs' second moments. Source: Frantar and Alistarh, "SparseGPT: Massive
    Language Models Can be Accurately Pruned in One-Shot", 2023.

    Args:
        module: a linen module, such as :class:`fwt.Sequential`, or an nnx module, which runs in
            eval mode; or a Model, ``sparsegpt(model, batch, 0.5)``.
        variables: its variables, ``{"params": ...}``; a Model and an nnx module have their own. Of
            an nnx module another one of the kind, or its state, may be given.
        batch: calibration inputs; more samples than a layer has inputs, if it can be.
        sparsity: the share to prune in each layer, 0 to 1; None with ``n_m``.
        pattern: ``fwt.patterns.unstructured`` or ``n_m``.
        where: which kernels: of Dense and DenseGeneral, and of Conv without groups.
        damping: what is added to the second moments, as a share of their mean.
        block: how many inputs are decided on at once, a multiple of m; each such block loses the
            same share. For layers of a hundred inputs, 8 to 16 are often nearer.

    Returns:
        New variables, or a new Model, nnx module or state. Of n weights of a layer exactly
        ``round(sparsity * n)`` are zero.

    Raises:
        LeafError: for kernels of other layers, of one that runs twice or inside a lifted
            transformation (a scan, but not remat), all of which it names; or for inputs that are
            not finite.
        FwtError: for another pattern, a sparsity that does not go with it, or a batch without
            samples.

    Example:
        >>> import fwt, flax.linen as nn, jax, jax.numpy as jnp
        >>> net = fwt.Sequential([("d", nn.Dense(8))])
        >>> x = jax.random.normal(jax.random.key(0), (99, 16)) @ jnp.tri(16)
        >>> variables = net.init(jax.random.key(1), x)
        >>> def error(v):
        ...     return float(jnp.mean((net.apply(v, x) - net.apply(variables, x)) ** 2))
        >>> error(sparsegpt(net, variables, x, 0.5)) < error(fwt.prune(0.5)(variables)) / 2
        True
    """
    if isinstance(variables, Model):
        variables = variables.variables
    graph = _nodes.is_graph(module)
    if not graph and not (isinstance(variables, Mapping) and "params" in variables):
        raise LeafError(
            "sparsegpt takes variables as module.init gives them, {'params': ...}, after the "
            "module, or a Model: sparsegpt(model, batch, 0.5)"
        )
    if batch is None:
        raise FwtError("sparsegpt needs a batch of inputs: sparsegpt(model, batch, 0.5)")
    pattern = resolve(pattern)
    settings: dict[str, Any] = dict(getattr(pattern, "settings", ()))
    groups = getattr(pattern, "name", "") == "n_m"
    if (not groups and pattern != patterns.unstructured) or settings.get("order"):
        raise FwtError(f"sparsegpt takes fwt.patterns.unstructured or n_m(n, m), found {pattern!r}")
    if groups == (sparsity is not None):
        raise FwtError("sparsegpt takes a sparsity, or n_m without one")
    if not groups and not (isinstance(sparsity, int | float) and 0 <= sparsity <= 1):
        raise FwtError(f"sparsity is the share of weights to prune, 0 to 1; found {sparsity!r}")
    m = settings.get("m", 1)
    if block < 1 or block % m:
        raise FwtError(f"block must be a multiple of {m}, found {block}")
    tree = _tree.Tree(variables)
    chosen = tree.select(where)
    for path in chosen:
        _tree.computable(path, tree.leaves[path])
    pattern.fits(list(map(_axes.Places(tree, None, module), chosen)), {})
    new: dict[str, Any] = {}
    wrong: dict[str, str] = {}
    met: set[str] = set()

    def see(path: str, layer: Any, x: Any) -> Any:
        if path not in chosen:
            return None
        if path in met:
            raise _calls.UnfitError("meets inputs in two places, and is mended for one")
        met.add(path)
        _check_layer(layer)
        if wrong:  # all are named, and none is mended
            return None
        kernel = jnp.asarray(tree.leaves[path])
        inputs = _inputs(layer, x)
        count = None if groups else float(sparsity or 0)
        flat = kernel.reshape(inputs.shape[1], -1).astype(jnp.float32)
        found = _mended(flat, inputs, damping, count, (settings.get("n", 1), m), block)
        if not isinstance(found, jax.core.Tracer) and not jnp.isfinite(found).all():
            raise LeafError(f"{path}: its inputs on the batch, or it itself, are not finite")
        new[path] = found.reshape(kernel.shape).astype(kernel.dtype)
        return new[path]

    # On GPUs and TPUs products of float32 are rounded by default, which no inverse bears.
    with jax.default_matmul_precision("highest"):
        _calls.run("sparsegpt", module, variables, batch, see, chosen, wrong)
    for path in chosen:
        if path not in met:
            wrong.setdefault(path, "is no kernel of a linear layer that runs on the batch")
    _calls.refuse("sparsegpt", wrong, chosen)
    return tree.replace(new)


def _check_layer(layer: Any) -> None:
    fits = type(layer) is nn.Dense
    fits |= type(layer) is nn.DenseGeneral and not layer.batch_dims
    if not fits and (
        type(layer) is not nn.Conv or layer.feature_group_count != 1 or layer.mask is not None
    ):
        raise _calls.UnfitError(
            f"is of a {type(layer).__name__}, and only Dense, DenseGeneral and Conv without groups "
            "or a mask can be mended"
        )


def _inputs(layer: Any, x: Any) -> Any:
    """What each weight of one output meets: (samples, inputs), in the order of the kernel."""
    if type(layer) is nn.Dense:
        return x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    if type(layer) is nn.DenseGeneral:
        axes = (layer.axis,) if isinstance(layer.axis, int) else tuple(layer.axis)
        axes = tuple(sorted(a % x.ndim for a in axes))  # as Flax lays out the kernel
        x = jnp.moveaxis(x, axes, range(-len(axes), 0))
        return x.reshape(-1, math.prod(x.shape[-len(axes) :])).astype(jnp.float32)
    # A convolution with one output for each weight reads its inputs out.
    size = layer.kernel_size
    size = (size,) if isinstance(size, int) else tuple(size)
    n = math.prod(size) * x.shape[-1]
    eye = jnp.eye(n, dtype=x.dtype).reshape(*size, x.shape[-1], n)
    read: Any = layer.clone(features=n).apply({"params": {"kernel": eye}}, x)
    return read.reshape(-1, n).astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _mended(
    w: Any, x: Any, damping: float, sparsity: float | None, cut: tuple[int, int], block: int
) -> Any:
    """The weights (inputs, outputs) after pruning; ``cut`` is n:m where there is no sparsity."""
    size, outputs = w.shape
    moments = x.T @ x
    silent = jnp.diag(moments) == 0  # its weights do nothing, and are the first to go
    moments = moments + jnp.eye(size) * jnp.maximum(damping * jnp.mean(jnp.diag(moments)), 1e-20)
    inverse = jnp.linalg.inv(moments)
    upper = jnp.linalg.cholesky((inverse + inverse.T) / 2).T
    n, m = cut
    for start in range(0, size, block):
        stop = min(start + block, size)
        here, part = upper[start:stop, start:stop], w[start:stop]
        scale = jnp.diag(here)[:, None] ** 2
        keep = jnp.ones(part.shape, bool)
        if sparsity is not None:
            k = round(sparsity * stop * outputs) - round(sparsity * start * outputs)
            worth = jnp.where(silent[start:stop, None], 0, part**2 / scale)
            (source,) = sources([worth], True)
            keep = select.kept(source, select.one_cut(source, k))

        # Of a group too: what is silent is worth nothing.
        scale = jnp.where(silent[start:stop, None], jnp.inf, scale)

        def step(i: Any, state: Any, here: Any = here, scale: Any = scale) -> Any:
            part, keep, errors = state
            if sparsity is None:
                group = i - i % m
                worth = lax.dynamic_slice_in_dim(part, group, m) ** 2 / lax.dynamic_slice_in_dim(
                    scale, group, m
                )
                (source,) = sources([worth], True)
                may_go = patterns.Groups(n, m, (0,)).candidates(source.keys())
                fresh = lax.dynamic_update_slice_in_dim(keep, ~may_go, group, 0)
                keep = jnp.where(i % m == 0, fresh, keep)
            error = jnp.where(keep[i], 0, part[i]) / here[i, i]
            later = jnp.where(jnp.arange(here.shape[0]) >= i, here[i], 0)
            return part - later[:, None] * error, keep, errors.at[i].set(error)

        state = (part, keep, jnp.zeros_like(part))
        part, keep, errors = lax.fori_loop(0, stop - start, step, state)
        w = w.at[start:stop].set(jnp.where(keep, part, 0))
        w = w.at[stop:].add(-upper[start:stop, stop:].T @ errors)
    return w
