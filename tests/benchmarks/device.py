"""Pruning on the device that JAX finds, beside torch and, where it is installed, jaxpruner on the
same device: ``python tests/benchmarks/device.py`` prints a table for the guide, with the device's
name. ``--millions`` gives the numbers of parameters, 25 and 1,000 unless told otherwise.

What is pruned is compared first with what NumPy selects: a wrong weight ends the script.
"""

import argparse
import contextlib
import datetime
import math
import time

import compile as compiling
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torch.nn.utils.prune as torch_prune
from pruning import clock, fresh, queued, steady, training

import fwt
from fwt.selection import passes

CUDA = torch.cuda.is_available()
SHAPES = [(64, 64), (64, 256), (256, 64)]  # of 224 kernels, as a transformer has them


def leaves(millions, count=20):
    width = int(millions * 1e6 / count / 1250)
    keys = jax.random.split(jax.random.key(0), count)
    return {  # with names whose order is the same as text and as numbers
        f"d{i:02}": {"kernel": jax.random.normal(key, (1250, width))} for i, key in enumerate(keys)
    }


def compiled(function, tree, **options):
    begun = time.perf_counter()
    found = jax.jit(function, **options).lower(tree).compile()
    return found, time.perf_counter() - begun


@contextlib.contextmanager
def packing(on):
    """With the counts of several sparsities in one number, or each in its own."""
    before, passes.packs = passes.packs, lambda: on
    yield
    passes.packs = before


def exact(tree, pruned, sparsity):
    """Raises unless the smallest magnitudes, and of equal ones the last, are zeros."""
    flat, found = (
        np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(t)]) for t in (tree, pruned)
    )
    k = round(sparsity * flat.size)
    limit = np.partition(np.abs(flat), k - 1)[k - 1]
    drop = np.abs(flat) < limit
    equal = np.flatnonzero(np.abs(flat) == limit)
    drop[equal[len(equal) - (k - drop.sum()) :]] = True
    if not np.array_equal(found, np.where(drop, 0, flat)):
        raise SystemExit(f"{flat.size} weights: not those that NumPy selects")


def selecting(millions):
    tree = leaves(millions)
    prune = fwt.prune(0.9, scope="global")
    found, said = {}, f"{millions:g} M in 20 leaves at 90 %"
    place, seconds = compiled(prune, tree, donate_argnums=0)
    yield f"{said}: global, to trace and compile, s", seconds
    new = jax.jit(prune)
    if millions <= 100:
        exact(tree, new(tree), 0.9)
    found["global, in place"] = fresh(place, tree)
    found["global, new arrays"] = steady(new, tree)
    found["by layer, new arrays"] = steady(jax.jit(fwt.prune(0.9)), tree)
    found["by threshold, in place"] = fresh(
        jax.jit(fwt.prune(threshold=1.0), donate_argnums=0), tree
    )
    found["a copy"] = steady(jax.jit(lambda t: jax.tree.map(lambda x: x + 0, t)), tree)
    found |= dict(by_jaxpruner(tree))
    yield from timed(said, found)
    del tree, found
    yield from timed(said, dict(by_torch(millions)))


def timed(said, calls):
    fit = {}
    for name, call in calls.items():
        try:
            jax.block_until_ready(call()())
            fit[name] = call
        except RuntimeError as error:  # jaxlib's and torch's, out of memory
            yield f"{said}: {name}: {str(error)[:60]}", math.nan
    for name, seconds in clock(5, **fit).items():
        yield f"{said}: {name}, ms", 1e3 * seconds


def several(millions):
    """Eight sparsities of the same weights under vmap."""
    tree = leaves(millions)
    sparsities = jnp.linspace(0.5, 0.95, 8)
    calls = {}
    for name, on in (("packed", True), ("plain", False)):
        many = jax.vmap(lambda t, s: fwt.prune(s, scope="global")(t), (None, 0))
        with packing(on):
            call = jax.jit(many).lower(tree, sparsities).compile()
        calls[f"{name} counts"] = steady(call, tree, sparsities)
    yield from timed(f"8 sparsities of {millions:g} M under vmap", calls)


def by_torch(millions):
    """What torch does: its pruning of layers, and the k-th magnitude of the joined weights."""
    device = "cuda" if CUDA else "cpu"
    sizes = [(1250, int(millions * 1e6 / 20 / 1250))] * 20
    weights = [torch.randn(*size, device=device) for size in sizes]
    k = round(0.9 * sum(w.numel() for w in weights))

    def masked(limit_of):
        def run():
            limit = limit_of(torch.cat([w.abs().flatten() for w in weights]))
            for w in weights:
                w * (w.abs() > limit)
            return done()

        return lambda: run

    def done():
        if CUDA:
            torch.cuda.synchronize()
        return jnp.zeros(())

    def layers():
        pairs = []
        for w in weights:
            layer = torch.nn.Linear(1, 1, bias=False)
            layer.weight = torch.nn.Parameter(w.clone())
            pairs.append((layer, "weight"))
        done()

        def run():
            torch_prune.global_unstructured(pairs, torch_prune.L1Unstructured, amount=0.9)
            return done()

        return run

    yield f"torch on {device}: prune.global_unstructured", layers
    yield f"torch on {device}: sort and masks", masked(lambda x: x.sort().values[k - 1])
    yield f"torch on {device}: kthvalue and masks", masked(lambda x: x.kthvalue(k).values)


def by_jaxpruner(tree):
    try:
        jax.tree_map = jax.tree.map
        from jaxpruner.algorithms import global_pruners
    except ImportError:
        return
    updater = global_pruners.GlobalMagnitudePruning(sparsity=0.9)
    prune = jax.jit(lambda t: updater.instant_sparsify(t)[0])
    yield "jaxpruner's global pruning", steady(prune, tree)


def first_calls():
    """To trace and compile what a model of 224 kernels of three shapes meets first."""
    params = jax.device_put(compiling.tree(224, SHAPES))
    for name, verb in compiling.VERBS.items():
        function, arguments = verb(), (params,)
        if isinstance(function, optax.GradientTransformation):
            function, arguments = function.update, (params, function.init(params), params)
        jax.clear_caches()
        begun = time.perf_counter()
        run = jax.jit(function).lower(*arguments).compile()
        yield f"224 kernels, {name}: to trace and compile, s", time.perf_counter() - begun
        yield from timed(f"224 kernels, {name}", {"a call": steady(run, *arguments)})


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--millions", type=float, nargs="*", default=[25, 1000])
    given = parser.parse_args()
    [kind] = {d.device_kind for d in jax.devices()}
    print(f"| {kind}, JAX {jax.__version__}, torch {torch.__version__}, "
          f"{datetime.date.today():%-d %B %Y} | |\n|---|---|")  # fmt: skip
    parts = [selecting(size) for size in given.millions]
    for part in [*parts, several(min(given.millions)), first_calls()]:
        for name, value in part:
            print(f"| {name} | {value:.2f} |", flush=True)
    for name, ratio, _ in [*training(), *queued(), *queued(4096)]:
        print(f"| {name} | {ratio:.2f} |", flush=True)
