"""Pruning on the device that JAX finds, beside torch and, where it is installed, jaxpruner on the
same device: ``python tests/benchmarks/device.py`` prints a table for the guide, with the device's
name. ``--millions`` gives the numbers of parameters, 25 and 1,000 unless told otherwise.
"""

import argparse
import contextlib
import time

import jax
import jax.numpy as jnp
import torch
from pruning import clock, fresh, steady, training

import fwt
from fwt.selection import passes

CUDA = torch.cuda.is_available()


def leaves(millions, count=20):
    width = int(millions * 1e6 / count / 1250)
    keys = jax.random.split(jax.random.key(0), count)
    return {
        f"d{i}": {"kernel": jax.random.normal(key, (1250, width))} for i, key in enumerate(keys)
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


def selecting(millions):
    tree = leaves(millions)
    prune = fwt.prune(0.9, scope="global")
    found, said = {}, f"{millions:g} M in 20 leaves at 90 %"
    place, seconds = compiled(prune, tree, donate_argnums=0)
    yield f"{said}: global, to trace and compile, s", seconds
    found["global, in place"] = fresh(place, tree)
    found["global, new arrays"] = steady(jax.jit(prune), tree)
    found["by layer, new arrays"] = steady(jax.jit(fwt.prune(0.9)), tree)
    found["by threshold, in place"] = fresh(
        jax.jit(fwt.prune(threshold=1.0), donate_argnums=0), tree
    )
    found["a copy"] = steady(jax.jit(lambda t: jax.tree.map(lambda x: x + 0, t)), tree)
    found |= dict(by_torch(millions))
    found |= dict(by_jaxpruner(tree))
    for name, seconds in clock(5, **found).items():
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
        calls[name] = steady(call, tree, sparsities)
    for name, seconds in clock(5, **calls).items():
        yield f"8 sparsities of {millions:g} M under vmap, {name} counts, ms", 1e3 * seconds


def by_torch(millions):
    """What torch does: join all magnitudes, take the k-th, mask."""
    device = "cuda" if CUDA else "cpu"
    weights = [torch.randn(1250, int(millions * 1e6 / 20 / 1250), device=device) for _ in range(20)]

    def joined():
        flat = torch.cat([w.abs().flatten() for w in weights])
        limit = torch.kthvalue(flat, round(0.9 * flat.numel())).values
        return [w * (w.abs() > limit) for w in weights]

    def run():
        joined()
        if CUDA:
            torch.cuda.synchronize()
        return jnp.zeros(())

    yield f"torch.kthvalue and masks, its {device}", lambda: run


def by_jaxpruner(tree):
    try:
        jax.tree_map = jax.tree.map
        import jaxpruner
        import ml_collections
    except ImportError:
        return
    told = {"algorithm": "global_magnitude", "dist_type": "erk", "sparsity": 0.9,
            "update_freq": 10, "update_end_step": 1000, "update_start_step": 0}  # fmt: skip
    updater = jaxpruner.create_updater_from_config(ml_collections.ConfigDict(told))
    prune = jax.jit(lambda t: updater.instant_sparsify(t)[0])
    yield "jaxpruner's global pruning", steady(prune, tree)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--millions", type=float, nargs="*", default=[25, 1000])
    given = parser.parse_args()
    [kind] = {d.device_kind for d in jax.devices()}
    print(f"| {kind} | |\n|---|---|")
    rows = [row for size in given.millions for row in selecting(size)]
    for name, value in [*rows, *several(min(given.millions))]:
        print(f"| {name} | {value:.2f} |", flush=True)
    for name, ratio, _ in training():
        print(f"| {name} | {ratio:.2f} |", flush=True)
