"""The same for pytest-benchmark, which compares runs over time:
``pytest tests/benchmarks/bench_pruning.py --benchmark-only -n 0``.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fwt


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    shapes = {f"d{i}": (1250, 200) for i in range(10)}
    return {n: {"kernel": jnp.asarray(rng.normal(size=s).astype("f"))} for n, s in shapes.items()}


@pytest.mark.parametrize(
    "settings",
    [
        {"sparsity": 0.9, "scope": "global"},
        {"sparsity": 0.9, "scope": "layer"},
        {"sparsity": 0.9, "scope": "lamp"},
        {"threshold": 1.0},
        {"pattern": fwt.patterns.n_m(2, 5)},
        {"sparsity": 0.5, "pattern": fwt.patterns.block((5, 4))},
    ],
    ids=str,
)
@pytest.mark.parametrize("compiled", [True, False], ids=["jit", "eager"])
def test_prune(benchmark, params, settings, compiled):
    prune = jax.jit(fwt.prune(**settings)) if compiled else fwt.prune(**settings)
    prune(params)
    benchmark(lambda: jax.block_until_ready(prune(params)))


@pytest.mark.parametrize("name", ["plain", "static", "gradual", "rigl"])
def test_step(benchmark, params, name):
    adam = optax.adam(1e-3)
    tx = {
        "plain": adam,
        "static": fwt.optim.sparsify(adam, masks=fwt.masks(0.9)),
        "gradual": fwt.optim.sparsify(adam, lambda n: 0.9 * jnp.clip(n / 1000, 0, 1)),
        "rigl": fwt.optim.sparsify(adam, 0.9, regrow="rigl"),
    }[name]
    update, state = jax.jit(tx.update), tx.init(params)
    update(params, state, params)
    benchmark(lambda: jax.block_until_ready(update(params, state, params)))
