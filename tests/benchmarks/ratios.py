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
import optax

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


def projecting():
    rng = np.random.default_rng(0)
    tree = {
        f"d{i}": {"kernel": jnp.asarray(rng.normal(size=s).astype(np.float32))}
        for i, s in enumerate(SHAPES)
    }
    copy = jax.jit(lambda t: jax.tree.map(lambda x: x + 0, t))

    def ours(constraint):
        f = jax.jit(fwt.project(constraint))
        return lambda: f(tree)

    def each(function):  # optax on each column
        f = jax.jit(lambda t: jax.tree.map(jax.vmap(function, 1, 1), t))
        return lambda: f(tree)

    c, p = fwt.constraints, optax.projections
    print("projections of 5 M float32 in 10 leaves, by output unit:")
    for name, constraint, theirs in (
        ("non_negative", c.non_negative, each(p.projection_non_negative)),
        ("max_norm", c.max_norm(1.0), each(p.projection_l2_ball)),
        ("simplex", c.simplex(), each(p.projection_simplex)),
        ("l1_ball", c.l1_ball(), each(p.projection_l1_ball)),
        ("hyperplane", c.hyperplane(), each(lambda w: p.projection_hyperplane(w, w * 0 + 1, 0.0))),
        ("weight_standardization", c.weight_standardization, None),
        ("k_sparse", c.k_sparse(100), None),
        ("quantized", c.quantized, None),
    ):
        a, b, d = clock(ours(constraint), theirs or (lambda: copy(tree)), lambda: copy(tree))
        against = f"   optax / ours {b / a:5.2f}" if theirs else ""
        print(f"  {name:24} ours / copy {a / d:7.1f}{against}")
    w = {"d": {"kernel": tree["d0"]["kernel"]}}
    svd, qr, cubic = (jax.jit(fwt.project(c.orthogonal(m))) for m in ("svd", "qr", "newton_schulz"))
    a, b, d = clock(lambda: svd(w), lambda: qr(w), lambda: cubic(w), rounds=3)
    print(f"  orthogonal of 1000 x 500: qr / svd {b / a:.2f}, newton_schulz / svd {d / a:.2f}")


def drawing():
    shape = (3, 3, 3, 64, 128)
    tree = {"c": {"kernel": np.zeros(shape, np.float32)}}

    def compile_ours():
        fwt.initialize(fwt.initializers.keras.he_normal, 0, dtype=next(dtypes))(tree)

    def compile_theirs():
        kind = next(others)
        jax.jit(lambda k: jax.nn.initializers.he_normal()(k, shape, kind))(jax.random.key(0))

    dtypes, others = (iter([jnp.float32, jnp.float16, jnp.bfloat16]) for _ in range(2))
    a, b = clock(compile_ours, compile_theirs, rounds=2)
    print(f"first draw of a Conv3D kernel, compiled: jax / ours {b / a:.1f}")


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
    projecting()
    drawing()
    files()
