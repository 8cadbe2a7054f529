"""How long a first call takes: CPU seconds to trace and to compile, by the number of leaves.

``python tests/benchmarks/compile.py`` prints the table, with ``--write`` into the guide.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pages

import fwt

EIGHT = [(16 + 4 * i, 24 + 8 * (i % 3)) for i in range(8)]
MANY = [(16 + i, 24 + i % 7) for i in range(120)]
ADAM = optax.adam(1e-3)
VERBS = {
    "`prune` by layer": lambda: fwt.prune(0.8),
    "`prune` globally": lambda: fwt.prune(0.8, scope="global"),
    "`prune` by LAMP": lambda: fwt.prune(0.8, scope="lamp"),
    "`initialize`": lambda: fwt.initialize(fwt.initializers.glorot_uniform(), key=0),
    "`project`, `max_norm`": lambda: fwt.project(fwt.constraints.max_norm(1.0)),
    "a step of `sparsify(adam)`": lambda: fwt.optim.sparsify(ADAM, 0.8),
    "a step of Adam alone": lambda: ADAM,
}


def tree(count, shapes):
    rng = np.random.default_rng(0)
    return {
        f"l{i}": {"kernel": rng.normal(size=shapes[i % len(shapes)]).astype(np.float32)}
        for i in range(count)
    }


def seconds(name, count, shapes):
    """CPU seconds until the first call of a verb under jit is compiled."""
    params = tree(count, shapes)
    function, arguments = VERBS[name](), (params,)
    if isinstance(function, optax.GradientTransformation):
        function, arguments = function.update, (params, function.init(params), params)
    jax.clear_caches()
    begun = time.process_time()
    jax.jit(function).lower(*arguments).compile()
    return time.process_time() - begun


def rows(names):
    yield "| seconds of CPU | 8 leaves | 400 leaves of their 8 shapes | ratio | 120 shapes |"
    yield "|---|---|---|---|---|"
    for name in names:
        few, many = (seconds(name, count, EIGHT) for count in (8, 400))
        apart = seconds(name, len(MANY), MANY)
        yield f"| {name} | {few:.1f} | {many:.1f} | {many / few:.1f} | {apart:.1f} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--verbs", nargs="*", default=list(VERBS))
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    jax.jit(lambda x: jnp.sin(x))(1.0)
    lines = []
    for line in rows(given.verbs):
        print(line, flush=True)
        lines.append(line)
    if given.write:
        pages.write("speed.md", "compile", "\n".join(lines))
