"""Leaves on meshes of several devices: the values are those of one device, spread as before."""

import contextlib
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from marks import OLDER

import fwt

START = """
import contextlib, sys
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import fwt

C, S, patterns = fwt.constraints, fwt.scores, fwt.patterns
rng = np.random.default_rng(0)


def draw(*shape):
    return rng.normal(size=shape).astype("f")


AXES = {"s/kernel": "stack in out"}
# The verbs of a test, by whether their results are the same bit for bit.
EXACT = {
    "global": lambda g: fwt.prune(0.4, scope="global", axes=AXES),
    "lamp": lambda g: fwt.prune(0.4, scope="lamp", axes=AXES),
    "dict": lambda g: fwt.prune(scope={"b/*": 0.3, "**": 0.6}, axes=AXES),
    "block": lambda g: fwt.prune(0.5, pattern=patterns.block((4, 2)), axes=AXES),
    "n_m": lambda g: fwt.prune(pattern=patterns.n_m(2, 4), axes=AXES),
    "saliency": lambda g: fwt.masks(0.5, S.saliency, grads=g, axes=AXES),
    "traced": lambda g: lambda p: jax.jit(
        lambda p, s: fwt.prune(s, S.random, scope="erk", key=1, axes=AXES)(p)
    )(p, jnp.float32(0.5)),
    "apply_masks": lambda g: fwt.apply_masks(jax.tree.map(lambda x: x > 0, g)),
    "masks_of": lambda g: fwt.masks_of,
    "simplex": lambda g: fwt.project(C.simplex, axes=AXES),
    "l1_ball": lambda g: fwt.project(C.l1_ball(3.0, axis="all"), axes=AXES),
    "assign": lambda g: fwt.assign({"a/kernel": np.arange(512, dtype="f").reshape(16, 32)}),
}
CLOSE = {
    "k_sparse": lambda g: fwt.project(C.k_sparse(20, axis="all"), axes=AXES),
    "spectral_ball": lambda g: fwt.project(C.spectral_ball(1.0), axes=AXES),
    "own": lambda g: fwt.project(lambda w, axes: w / jnp.sqrt((w * w).sum()), axes=AXES),
    "initialize": lambda g: fwt.initialize(fwt.initializers.orthogonal, 0, "**/kernel", axes=AXES),
    "reset": lambda g: fwt.reset(0, like="torch", axes=AXES),
}


def spread(tree, mesh, specs):
    return jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), tree, specs)


def sparsify(**settings):
    def run(p, g):
        tx = fwt.optim.sparsify(optax.adam(0.1), 0.5, axes=AXES, **settings)
        state = tx.init(p)
        for _ in range(2):
            updates, state = tx.update(g, state, p)
            p = optax.apply_updates(p, updates)
        return p
    return run
"""

VERBS = """
kinds = tuple(getattr(AxisType, k) for k in sys.argv[1].split(","))
contexts = sys.argv[2].split(",")
host = {"a": {"kernel": draw(16, 32), "bias": draw(32)}, "b": {"kernel": draw(32, 8)},
        "s": {"kernel": draw(4, 16, 8)}}
grads = jax.tree.map(lambda x: draw(*x.shape), host)
mesh = jax.make_mesh((2, 2), ("d", "e"), axis_types=kinds)
specs = {"a": {"kernel": P("d", "e"), "bias": P("e")}, "b": {"kernel": P(None, ("d", "e"))},
         "s": {"kernel": P("e", "d")}}
p, g = spread(host, mesh, specs), spread(grads, mesh, specs)


def check(name, found, want):
    exact = name in EXACT
    for (path, x), y, old in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(want),
                                 jax.tree.leaves(p), strict=True):
        told = f"{name} {jax.tree_util.keystr(path)}"
        np.testing.assert_allclose(x, y, rtol=0, atol=0 if exact else 1e-5, err_msg=told)
        # A function of one's own gives what it gives; of a stack it is put together by us.
        if x.ndim:
            assert x.sharding.is_equivalent_to(old.sharding, x.ndim), (told, x.sharding)
            assert jax.typeof(x).sharding.mesh == jax.typeof(old).sharding.mesh, told


quick, outside = sys.argv[3:], ("global", "block", "simplex", "spectral_ball", "reset", "assign")
for name, verb in (EXACT | CLOSE).items():
    if quick and name not in quick:
        continue
    want = verb(grads)(host)
    for context in contexts:
        with jax.set_mesh(mesh) if context == "set" else contextlib.nullcontext():
            if name in outside:  # of a jit, where each operation is compiled by itself
                check(name, verb(g)(p), want)
            check(name, jax.jit(lambda p, g: verb(g)(p))(p, g), want)
tied = fwt.prune(0.5)({"a": p["a"], "c": {"kernel": p["a"]["kernel"]}})
assert tied["a"]["kernel"] is tied["c"]["kernel"]
run = jax.jit(sparsify(regrow="rigl", every=2, scope="erk"))
pairs = [] if quick else zip(jax.tree.leaves(run(p, g)), jax.tree.leaves(run(host, grads)))
for x, y in pairs:
    np.testing.assert_allclose(x, y, atol=1e-5)
print("fine")
"""

SHARDS = """
mesh = jax.make_mesh((4,), ("d",))
host = {"a": {"kernel": draw(8, 32)}, "b": {"kernel": draw(8, 4)}, "s": {"kernel": draw(3, 16, 8)}}
grads = jax.tree.map(lambda x: draw(*x.shape), host)
# The kernel of b is whole on each device.
specs = {"a": {"kernel": P(None, "d")}, "b": {"kernel": P()}, "s": {"kernel": P(None, "d")}}
p, g = spread(host, mesh, specs), spread(grads, mesh, specs)


def shard(tree, i):
    def one(x, spec):
        return x if spec == P() else np.split(x, 4, list(spec).index("d"))[i]
    return jax.tree.map(one, tree, specs)


verbs = {n: EXACT[n] for n in ("lamp", "block", "n_m")}
verbs["traced"] = lambda g: lambda p: jax.jit(
    lambda p, s: fwt.prune(s, scope="erk", axes=AXES)(p)
)(p, jnp.float32(0.5))
verbs["k_sparse"], verbs["simplex"] = CLOSE["k_sparse"], EXACT["simplex"]
verbs["layer"] = lambda g: fwt.prune(0.4, axes=AXES)
verbs["sparsify"] = lambda g: lambda p: sparsify()(p, g)
for name, verb in verbs.items():
    def each(p, g):
        return jax.tree.map(lambda x: x[None], verb(g)(p))
    found = jax.jit(jax.shard_map(each, mesh=mesh, in_specs=(specs, specs), out_specs=P("d")))(p, g)
    alone = jax.jit(lambda p, g: verb(g)(p))
    for i in range(4):
        want = alone(shard(host, i), shard(grads, i))
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(np.asarray(x)[i], y, atol=1e-5, err_msg=name)
    if name in ("layer", "k_sparse", "simplex", "sparsify"):  # what is whole stays so
        same = jax.shard_map(lambda p, g: verb(g)(p), mesh=mesh, in_specs=(specs, specs),
                             out_specs=specs)
        jax.tree.map(lambda x: x, jax.jit(same)(p, g))
try:
    jax.jit(jax.shard_map(fwt.initialize(fwt.initializers.normal, 0), mesh=mesh,
                          in_specs=(specs,), out_specs=specs))(p)
except fwt.FwtError as error:
    assert "axis_index" in str(error) and "a/kernel" in str(error), error
else:
    raise AssertionError("each shard would get the same numbers")


def folded(p):
    key = jax.random.fold_in(jax.random.key(0), jax.lax.axis_index("d"))
    return fwt.initialize(fwt.initializers.normal, key, ["a/kernel", "s/kernel"], axes=AXES)(p)


random = {n: np.asarray(x["kernel"]) for n, x in jax.jit(jax.shard_map(
    lambda p: S.random(p, key=0), mesh=mesh, in_specs=(specs,), out_specs=specs))(p).items()}
assert len(np.unique(random["a"])) > 250  # each shard has its own, and what is whole has one
assert np.array_equal(random["b"], S.random(host, key=0)["b"]["kernel"])
new = jax.jit(jax.shard_map(folded, mesh=mesh, in_specs=(specs,), out_specs=specs))(p)
assert len(np.unique(new["a"]["kernel"])) > 250
print("fine")
"""


def run(code, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", START + code, *arguments],
        env={
            **{n: v for n, v in os.environ.items() if not n.startswith("COVERAGE_")},
            "XLA_FLAGS": f"--xla_force_host_platform_device_count=4 {OLDER}",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        },
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "fine", done.stderr[-3000:]


SOME = ("global", "block", "simplex", "spectral_ball", "reset")


@pytest.mark.parametrize(
    ("kinds", "contexts", "names"),
    [
        pytest.param("Explicit,Explicit", "set", (), marks=pytest.mark.thorough),
        pytest.param("Explicit,Explicit", "none", SOME, marks=pytest.mark.thorough),
        pytest.param("Explicit,Auto", "none", SOME[:3], marks=pytest.mark.thorough),
        pytest.param("Auto,Auto", "none", SOME[2:], marks=pytest.mark.thorough),
    ],
)
def test_on_a_mesh_all_is_as_on_one_device(kinds, contexts, names):
    run(VERBS, kinds, contexts, *names)


def test_a_mesh_of_one_device():
    """There small leaves are joined, which JAX refuses along its Explicit axes."""
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    rng = np.random.default_rng(0)
    host = {f"a{i}": {"kernel": rng.normal(size=(4 + i % 2, 8)).astype("f")} for i in range(6)}
    params = jax.device_put(host, spread)
    for verb in (
        fwt.prune(0.5),
        fwt.prune(0.5, fwt.scores.random, key=0, scope="global"),
        fwt.project(fwt.constraints.simplex),
        fwt.initialize(fwt.initializers.he_normal, 0),
    ):
        for context in (contextlib.nullcontext, lambda: jax.set_mesh(mesh)):
            with context():
                found = jax.jit(verb)(params)
            for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(verb(host)), strict=True):
                np.testing.assert_allclose(x, y, atol=1e-6)
                assert x.sharding.is_equivalent_to(spread, 2)


@pytest.mark.thorough
def test_inside_shard_map_a_leaf_is_a_shard():
    run(SHARDS)
