"""Pruning against what else there is, side by side in one run: ``python
tests/benchmarks/pruning.py`` prints the table, with ``--write`` into the guide, with ``--small``
at a tenth of the size.

No figure here is an assertion: seconds belong to a machine. Each is the median of interleaved
rounds. "In place" is with donated arguments, whose copy is made outside the clock; "new arrays"
includes what the allocator asks of the system.
"""

import argparse
import datetime
import functools
import os
import re
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pages
import torch
import torch.nn.utils.prune as torch_prune

import fwt


def clock(rounds, **functions):
    """The median seconds of each; one that makes its own input returns the function to time."""
    times = {name: [] for name in functions}
    for index in range(rounds + 1):
        for name, function in functions.items():
            run = function()
            start = time.perf_counter()
            jax.block_until_ready(run())
            if index:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}


def fresh(function, tree):
    """A donated call: its input is a copy that is made before the clock starts."""

    def ready():
        own = jax.block_until_ready(jax.tree.map(jnp.array, tree))
        return lambda: function(own)

    return ready


def steady(function, *arguments):
    return lambda: lambda: function(*arguments)


def leaves(millions, count=20):
    rng = np.random.default_rng(0)
    columns = int(millions * 1e6 / count / 1250)
    return [rng.normal(size=(1250, columns)).astype(np.float32) for _ in range(count)]


def selection(millions, slow_rounds):
    weights = leaves(millions)
    tree = {f"d{i}": {"kernel": jnp.asarray(w)} for i, w in enumerate(weights)}
    n = sum(w.size for w in weights)
    k = round(0.9 * n)
    prune = fwt.prune(0.9, scope="global")
    ours = jax.jit(prune)
    start = time.perf_counter()
    lowered = jax.jit(prune, donate_argnums=0).lower(tree)
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    flat = np.abs(np.concatenate([w.ravel() for w in weights]))
    found = clock(
        7,
        place=fresh(compiled, tree),
        new=steady(ours, tree),
        partition=steady(np.partition, flat, k),
    )
    stored = compiled.memory_analysis().temp_size_in_bytes / (4 * n)
    argsort = jax.jit(lambda x: jnp.argsort(jnp.abs(x)))
    joined = jnp.asarray(flat)
    others = clock(slow_rounds, torch=functools.partial(torch_call, weights),
                   argsort=steady(argsort, joined))  # fmt: skip
    copy = clock(7, copy=steady(jax.jit(lambda t: jax.tree.map(lambda x: x + 0, t)), tree))["copy"]
    name = f"exact global pruning at 90 % of {millions} M float32 in 20 leaves"
    place, new = found["place"], found["new"]
    return [
        (f"{name}, in place / `numpy.partition` of the joined array",
         place / found["partition"], "at most 1.1"),
        (f"{name}, new arrays / `numpy.partition`", new / found["partition"], "at most 1.0"),
        (f"a copy of the {millions} M into new arrays / `numpy.partition`",
         copy / found["partition"], ""),
        (f"`torch.nn.utils.prune.global_unstructured` of {millions} M / ours in new arrays",
         others["torch"] / new, "at least 30"),
        (f"`jnp.argsort` of {millions} M / ours in new arrays",
         others["argsort"] / new, "at least 50"),
        (f"temporaries beyond input and output / the tree of {millions} M", stored, "below 0.3"),
        (f"seconds to trace and compile it, 20 leaves of {millions} M", seconds, "at most 2"),
    ]  # fmt: skip


def torch_call(weights):
    layers = [torch.nn.Linear(*w.shape, bias=False) for w in weights]
    for layer, w in zip(layers, weights, strict=True):
        layer.weight.data = torch.from_numpy(w.T.copy())
    pairs = [(layer, "weight") for layer in layers]
    return lambda: torch_prune.global_unstructured(pairs, torch_prune.L1Unstructured, amount=0.9)


def compiling():
    def seconds(count):  # of a shape that nothing else here has, or parts are traced already
        shape = (1251, 1000 + count)
        tree = {f"d{i}": {"kernel": jax.ShapeDtypeStruct(shape, "f")} for i in range(count)}
        start = time.perf_counter()
        jax.jit(fwt.prune(0.9, scope="global")).lower(tree).compile()
        return time.perf_counter() - start

    seconds(2)
    return [("compile time of 80 leaves / 20 leaves", seconds(80) / seconds(20), "at most 4")]


def thresholds(millions):
    tree = {f"d{i}": {"kernel": jnp.asarray(w)} for i, w in enumerate(leaves(millions))}
    copy = jax.jit(lambda t: jax.tree.map(lambda x: x + 0, t))
    above = jax.jit(fwt.prune(threshold=1.0), donate_argnums=0)
    found = clock(9, above=fresh(above, tree), copy=steady(copy, tree))
    name = f"threshold pruning of {millions} M, in place / a copy of the tree"
    return [(name, found["above"] / found["copy"], "at most 1.5")]


def several(millions):
    tree = {f"d{i}": {"kernel": jnp.asarray(w)} for i, w in enumerate(leaves(millions))}

    def prune(t, s):
        return fwt.prune(s, scope="global")(t)

    one, many = jax.jit(prune), jax.jit(jax.vmap(prune, (None, 0)))
    sparsities = jnp.linspace(0.5, 0.95, 8)
    found = clock(
        5,
        each=lambda: lambda: [one(tree, s) for s in sparsities],
        many=steady(many, tree, sparsities),
    )
    name = f"`vmap` over 8 sparsities of {millions} M / one of them"
    return [(name, 8 * found["many"] / found["each"], "at most 10")]


def steps(width):
    """Of a net of 4 layers under Adam, plain, under a schedule, and with masks that stay: a train
    step, its params and its state."""
    rng = np.random.default_rng(0)
    start = {
        f"d{i}": {
            "kernel": jnp.asarray(rng.normal(size=(width, width)).astype("f") / width**0.5),
            "bias": jnp.zeros(width),
        }
        for i in range(4)
    }
    x, y = (jnp.asarray(rng.normal(size=(256, width)).astype("f")) for _ in range(2))

    def loss(params):
        h = x
        for i in range(4):
            h = h @ params[f"d{i}"]["kernel"] + params[f"d{i}"]["bias"]
            h = jax.nn.relu(h) if i < 3 else h
        return ((h - y) ** 2).mean()

    def compiled(tx):
        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params, state):
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        params = jax.tree.map(jnp.array, start)
        return [step, params, tx.init(params)]

    def gradual(n):
        return 0.9 * jnp.clip(n / 5000, 0, 1)

    adam = optax.adam(1e-3)
    return {
        "plain": compiled(adam),
        "masked": compiled(fwt.optim.sparsify(adam, gradual, every=100)),
        "static": compiled(fwt.optim.sparsify(adam, masks=fwt.masks_of)),
    }


def queued(width=1024, rounds=20, count=20):
    """Steps that do not wait for each other, as a training loop queues them."""
    runs = steps(width)
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            step, params, state = run
            params, state = jax.block_until_ready(step(params, state))
            begin = time.perf_counter()
            for _ in range(count):
                params, state = step(params, state)
            jax.block_until_ready(params)
            times[name].append(time.perf_counter() - begin)
            run[1:] = params, state
    for name in ("static", "masked"):
        ratio = statistics.median(a / b for a, b in zip(times[name], times["plain"], strict=True))
        yield f"queued steps, {name} / plain (4 x {width}² with Adam, batch 256)", ratio, ""


def training(width=1024, rounds=20):
    runs = steps(width)
    del runs["static"]
    times = {"plain": [], "masked": [], "update": []}
    for index in range(rounds):
        for name, run in runs.items():
            step, params, state = run
            each = []
            for _ in range(5):
                begin = time.perf_counter()
                params, state = jax.block_until_ready(step(params, state))
                each.append(time.perf_counter() - begin)
            if name == "masked":  # on to the next update of the masks
                state = state._replace(count=jnp.asarray(100 * index + 99, jnp.int32))
                begin = time.perf_counter()
                params, state = jax.block_until_ready(step(params, state))
                times["update"].append(time.perf_counter() - begin)
            run[1:] = params, state
            times[name].append(statistics.median(each))
    ratios = {
        name: statistics.median(a / b for a, b in zip(times[name], times["plain"], strict=True))
        for name in ("masked", "update")
    }
    net = f"4 x {width}² with Adam, batch 256"
    return [
        (f"a train step with masks / a plain one ({net})", ratios["masked"], "at most 1.05"),
        ("a step that draws new masks / a plain one", ratios["update"], "at most 1.5"),
    ]


def table(small):
    rows = []
    sizes = ((2.5, 3), (10, 1)) if small else ((25, 3), (100, 1))
    for millions, slow_rounds in sizes:
        rows += selection(millions, slow_rounds)
        print(f"{millions} M done", file=sys.stderr)
    rows += compiling() + thresholds(sizes[0][0]) + several(10) + several(25) + training()
    lines = ["| what | measured | wanted |", "|---|---|---|"]
    lines += [f"| {name} | {value:.2f} | {wanted} |" for name, value, wanted in rows]
    day = datetime.date.today()
    return "\n".join([*lines, "", f"Measured on {processor()}, on {day:%-d %B %Y}."])


def processor():
    listed = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"^model name\s*: (.*)", listed, re.M)
    wide = "with" if " avx512f" in listed else "without"
    return f"{name[1] if name else 'a processor'} {wide} AVX-512, {os.cpu_count()} cores"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    result = table(options.small)
    print(result)
    if options.write:
        pages.write("speed.md", "pruning", result)
