"""Ratios measured side by side in one run: ``python tests/benchmarks/ratios.py``.

No figure here is an assertion: seconds belong to a machine. Each line is the median of
interleaved rounds.
"""

import statistics
import tempfile
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.utils.prune as torch_prune

import fwt
from fwt import converters

SHAPES = [(1000, 500)] * 10


def clock(*functions, rounds=5):
    """The median seconds of each function, in interleaved rounds after one to warm up."""
    times = [[] for _ in functions]
    for index in range(rounds + 1):
        for function, found in zip(functions, times, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(function())
            if index:
                found.append(time.perf_counter() - start)
    return [statistics.median(found) for found in times]


def pruning():
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=s).astype(np.float32) for s in SHAPES]
    tree = {f"d{i}": {"kernel": jnp.asarray(w)} for i, w in enumerate(weights)}
    ours = jax.jit(fwt.prune(0.9, scope="global"))

    def theirs():
        layers = [torch.nn.Linear(s[0], s[1], bias=False) for s in SHAPES]
        for layer, w in zip(layers, weights, strict=True):
            layer.weight.data = torch.from_numpy(w.T.copy())
        torch_prune.global_unstructured(
            [(layer, "weight") for layer in layers], torch_prune.L1Unstructured, amount=0.9
        )

    def partition():
        flat = np.abs(np.concatenate([w.ravel() for w in weights]))
        np.partition(flat, int(0.9 * flat.size))

    copy = jax.jit(lambda t: jax.tree.map(lambda x: x + 0, t))
    a, b, c = clock(lambda: ours(tree), theirs, partition)
    print(f"global prune of 5 M float32 in 10 leaves: {a * 1e3:.0f} ms")
    print(f"  torch global_unstructured / ours   {b / a:6.1f}")
    print(f"  ours / numpy.partition             {a / c:6.1f}")
    above = jax.jit(fwt.prune(threshold=1.0))
    e, f = clock(lambda: above(tree), lambda: copy(tree))
    print(f"  threshold prune / copy             {e / f:6.1f}")


def files():
    net = fwt.Sequential([(f"d{i}", nn.Dense(2000)) for i in range(6)], input_shape=(2000,))
    variables = jax.device_get(net.init(jax.random.key(0), jnp.ones((1, 2000))))
    folder = Path(tempfile.mkdtemp())
    size = sum(x.nbytes for x in jax.tree.leaves(variables)) / 2**20
    converters.save(folder / "net.keras", net, variables)

    def copy():
        (folder / "copy").write_bytes((folder / "net.keras").read_bytes())

    print(f"files, {size:.0f} MiB:")
    for suffix in ("keras", "safetensors", "pt"):
        path = folder / f"net.{suffix}"
        a, b, c = clock(
            lambda path=path: converters.save(path, net, variables),
            lambda path=path: converters.load(path) and None,
            copy,
            rounds=3,
        )
        print(f"  .{suffix:12} save / copy {a / c:5.1f}   load / copy {b / c:5.1f}")


if __name__ == "__main__":
    pruning()
    files()
