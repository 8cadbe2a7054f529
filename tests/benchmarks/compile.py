"""How long a first call takes: CPU seconds to trace and compile, by the number of leaves.

``python tests/benchmarks/compile.py`` prints, for each verb, what 8 leaves and what more leaves of
the same 8 shapes take, and how often the program then runs in a second.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fwt

SHAPES = [(16 + 4 * i, 24 + 8 * (i % 3)) for i in range(8)]


def tree(count, shapes=SHAPES):
    rng = np.random.default_rng(0)
    return {
        f"l{i}": {"kernel": rng.normal(size=shapes[i % len(shapes)]).astype(np.float32)}
        for i in range(count)
    }


def sparse_step(params):
    tx = fwt.optim.sparsify(optax.adam(1e-3), 0.8, **SPARSIFY)
    return lambda state, grads, params: tx.update(grads, state, params), tx.init(params)


SPARSIFY = {}
VERBS = {
    "prune by layer": lambda: fwt.prune(0.8),
    "prune globally": lambda: fwt.prune(0.8, scope="global"),
    "lamp": lambda: fwt.prune(0.8, scope="lamp"),
    "initialize": lambda: fwt.initialize(fwt.initializers.glorot_uniform(), key=0),
    "project": lambda: fwt.project(fwt.constraints.max_norm(1.0)),
    "adam": None,
    "sparsify": None,
}


def first_call(name, count):
    params = tree(count)
    arguments, function = (params,), None
    if name in ("adam", "sparsify"):
        tx = optax.adam(1e-3)
        if name == "sparsify":
            tx = fwt.optim.sparsify(tx, 0.8)
        state = jax.jit(tx.init)(params) if name == "adam" else tx.init(params)
        function, arguments = tx.update, (params, state, params)
    else:
        function = VERBS[name]()
    jax.clear_caches()
    begun = time.process_time()
    lowered = jax.jit(function).lower(*arguments)
    traced = time.process_time()
    compiled = lowered.compile()
    done = time.process_time()
    jax.block_until_ready(compiled(*arguments))
    start = time.perf_counter()
    for _ in range(5):
        jax.block_until_ready(compiled(*arguments))
    return traced - begun, done - traced, (time.perf_counter() - start) / 5


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--counts", nargs="*", type=int, default=[8, 200])
    parser.add_argument("--verbs", nargs="*", default=list(VERBS))
    given = parser.parse_args()
    jax.jit(lambda x: jnp.sin(x))(1.0)
    for name in given.verbs:
        rows = [first_call(name, count) for count in given.counts]
        told = ", ".join(
            f"{c}: {t:.1f} + {k:.1f} s, {1e3 * r:.1f} ms"
            for c, (t, k, r) in zip(given.counts, rows, strict=True)
        )
        print(f"{name}: {told}", flush=True)
