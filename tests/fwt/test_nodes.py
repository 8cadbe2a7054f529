"""What is no part of the params, or of a path: boxes, optimizer states; and what is one array."""

import dataclasses
import sys
import warnings
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx, serialization, struct
from flax.training.train_state import TrainState

import fwt
from fwt import _nodes, _states, converters

W = jax.random.normal(jax.random.key(0), (4, 6))
PARAMS = {"d": {"kernel": W, "bias": jnp.ones(6)}}
TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))
STATE = TX.init(PARAMS)


def zeros(tree):
    return [int((np.asarray(x) == 0).sum()) for x in jax.tree.leaves(tree)]


# -- boxes --------------------------------------------------------------------------------------


@jax.tree_util.register_pytree_node_class
class Unnamed:
    def __init__(self, inner):
        self.inner = inner

    def tree_flatten(self):
        return (self.inner,), "static"

    @classmethod
    def tree_unflatten(cls, aux, children):
        return cls(*children)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Named:  # as haliax has it, but no module
    array: Any
    axes: str = dataclasses.field(metadata={"static": True}, default="embed mlp")


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Wrapped:
    parameter: Any


class HaliaxLike(eqx.Module):
    array: Any
    axes: str = eqx.field(static=True, default="embed mlp")


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Quantised:  # as qwix has it
    qvalue: Any
    scale: Any


class Lora(eqx.Module):
    w: Any
    a: Any
    b: Any


class OneArray(eqx.Module):  # a layer
    weight: Any


NAMES = ("embed", "mlp")
BOXES = [
    lambda w: nn.Partitioned(w, NAMES),
    lambda w: nn.LogicallyPartitioned(w, NAMES),
    nnx.Param,
    lambda w: nnx.Param(nn.Partitioned(w, NAMES)),
    Unnamed,
    Named,
    Wrapped,
    HaliaxLike,
    lambda w: nn.LogicallyPartitioned(Named(w), NAMES),
]


@pytest.mark.parametrize("box", BOXES)
def test_a_box_is_no_part_of_a_path(box):
    boxed = {"d": {"kernel": box(W), "bias": jnp.ones(6)}}
    assert fwt.paths(boxed) == fwt.paths(PARAMS)
    for t in (
        fwt.prune(0.5),
        fwt.initialize(fwt.initializers.normal(), 0),
        fwt.project(fwt.constraints.unit_norm),
        fwt.at("d/kernel", fwt.prune(0.5)),
        fwt.assign({"d/kernel": np.zeros((4, 6), np.float32)}),
        jax.jit(fwt.prune(0.5)),
    ):
        new = t(boxed)
        assert jax.tree.structure(new) == jax.tree.structure(boxed)
        assert zeros(new) == zeros(t(PARAMS))
    ours, plain = fwt.masks(0.5)(boxed), fwt.masks(0.5)(PARAMS)
    assert jax.tree.structure(ours) == jax.tree.structure(boxed)
    for masks, tree in ((ours, boxed), (plain, boxed), (ours, PARAMS)):
        assert zeros(fwt.apply_masks(masks)(tree)) == [0, 12]
    for bools in (jax.tree.map(lambda _: True, boxed), jax.tree.map(lambda _: True, PARAMS)):
        assert list(fwt.select(boxed, bools)) == fwt.paths(PARAMS)


@pytest.mark.parametrize("box", BOXES[:6])
def test_an_optimizer_wrapper_reaches_into_boxes(box):
    boxed = {"d": {"kernel": box(W), "bias": jnp.ones(6)}}
    tx = fwt.optim.sparsify(optax.adam(1e-2), 0.75)
    tx = fwt.optim.constrain(tx, fwt.project(fwt.constraints.max_norm(1.0)))
    updates, _ = tx.update(boxed, tx.init(boxed), boxed)
    new = optax.apply_updates(boxed, updates)
    assert jax.tree.structure(new) == jax.tree.structure(boxed)
    kernel = fwt.select(new)["d/kernel"]
    assert int((kernel == 0).sum()) == 18
    assert float(jnp.linalg.norm(kernel, axis=0).max()) <= 1 + 1e-6


def test_a_layer_with_one_array_is_no_box():
    layer = {"tok": OneArray(W), "embedding": eqx.nn.Embedding(4, 6, key=jax.random.key(1))}
    assert fwt.paths(layer) == ["embedding/weight", "tok/weight"]
    assert fwt.paths({"a": {"value": W}}) == ["a/value"]


@pytest.mark.parametrize(
    "leaf",
    [
        Quantised(W.astype(jnp.int8), jnp.ones(6)),
        Named(Quantised(W.astype(jnp.int8), jnp.ones(6))),
        nnx.Param(Quantised(W.astype(jnp.int8), jnp.ones(6))),
        {"qvalue": W, "scale": jnp.ones(6)},  # as a checkpoint gives it back
        Lora(W, W[:, :2], W[:2]),
    ],
)
def test_a_weight_in_several_arrays_is_refused_where_it_is_selected(leaf):
    tree = {"d": {"kernel": leaf}, "e": {"kernel": W + 1}}
    for where in (fwt.kernels, "**", "d/*"):
        with pytest.raises(fwt.LeafError, match=r"d/kernel is a .*one weight in several arrays"):
            fwt.prune(0.5, where=where)(tree)
    new = fwt.prune(0.5, where="e/*")(tree)
    assert int((new["e"]["kernel"] == 0).sum()) == 12
    assert jax.tree.leaves(new["d"])[0] is jax.tree.leaves(tree["d"])[0]


# -- train states -------------------------------------------------------------------------------


class Both(NamedTuple):
    params: Any
    opt_state: Any
    ema_params: Any


@struct.dataclass
class OtherNames:
    weights: Any
    opt: Any
    step: Any


class Slow(NamedTuple):  # a wrapper of optimizers with an average of the weights
    slow: Any
    inner: Any


VARIABLES = {"params": PARAMS, "batch_stats": {"n": {"mean": jnp.ones(3)}}}
ADAM = {"count": np.int32(1), "mu": PARAMS, "nu": PARAMS}
FLAX = TrainState.create(apply_fn=None, params=PARAMS, tx=TX)
HELD = {
    "TrainState": (FLAX, "d/"),
    "of variables": (TrainState.create(apply_fn=None, params=VARIABLES, tx=TX), "d/"),
    "sgd": (TrainState.create(apply_fn=None, params=PARAMS, tx=optax.sgd(1.0)), "d/"),
    "dict": ({"params": PARAMS, "opt_state": STATE, "ema": PARAMS, "step": 3}, "d/"),
    "named tuple": (Both(PARAMS, STATE, PARAMS), "d/"),
    "tuple": ((PARAMS, STATE), "0/d/"),
    "tuple with a step": ((jnp.int32(3), PARAMS, STATE), "1/d/"),
    "dataclass": (OtherNames(PARAMS, STATE, jnp.int32(0)), "weights/d/"),
    "restored": (
        {"net": PARAMS, "opt": {"0": None, "1": {"0": ADAM, "1": {"count": 1}}}},
        "net/d/",
    ),
    "named optimizer": ({"net": PARAMS, "optimizer": {"m": PARAMS, "v": PARAMS}}, "net/d/"),
    "within": ({"state": FLAX, "epoch": 3}, "state/params/d/"),
    "ours": ((PARAMS, fwt.optim.sparsify(TX, 0.5).init(PARAMS)), "0/d/"),
}


@pytest.mark.parametrize("name", HELD)
def test_of_a_train_state_the_params_alone_are_transformed(name):
    tree, start = HELD[name]
    assert fwt.paths(tree) == [f"{start}bias", f"{start}kernel"]
    for t in (fwt.prune(0.5, scope="global"), lambda s: fwt.apply_masks(fwt.masks(0.5)(s))(s)):
        new = t(tree)
        assert jax.tree.structure(new) == jax.tree.structure(tree)
        changed = [a is not b for a, b in zip(*map(jax.tree.leaves, (tree, new)), strict=True)]
        assert sum(changed) == 1
        assert int((fwt.select(new)[f"{start}kernel"] == 0).sum()) == 12


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ((PARAMS, {"m": jnp.ones(3)}, STATE), "beside '0', '1' in a tuple"),
        ((PARAMS, Slow(PARAMS, STATE)), "1: .*'inner', stands beside 'slow' in a Slow"),
        ({"a": PARAMS, "b": PARAMS, "opt_state": STATE}, "beside 'a', 'b' in a dict"),
        (STATE, "nothing that could be params"),
        (STATE[1][0], "nothing that could be params"),
    ],
)
def test_where_the_params_can_not_be_told_it_is_refused(tree, said):
    with pytest.raises(fwt.LeafError, match=said):
        fwt.prune(0.5)(tree)


def test_statistics_and_keys_of_an_nnx_module_are_no_params():
    class Normed(nnx.Module):
        def __init__(self, rngs):
            self.norm, self.dropout = nnx.BatchNorm(3, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    net = Normed(nnx.Rngs(0))
    for tree in (net, nnx.state(net)):
        assert fwt.paths(tree) == ["norm/bias", "norm/scale"]
        new = fwt.prune(1.0, where="**")(tree)
        assert float(new["norm"]["var"][...].sum() if tree is not net else new.norm.var.sum()) == 3
        fwt.reset(0, "torch")(tree)


def test_masked_and_partitioned_params_are_no_states():
    masked = optax.masked(fwt.optim.sparsify(optax.adam(1e-2), 0.5), {"d": True, "e": False})
    tree = {**PARAMS, "e": {"kernel": W}}
    updates, _ = masked.update(tree, masked.init(tree), tree)
    new = optax.apply_updates(tree, updates)
    assert int((new["d"]["kernel"] == 0).sum()) == 12
    assert not (new["e"]["kernel"] == 0).any()


# -- ties ---------------------------------------------------------------------------------------


class Net(nnx.Module):
    def __init__(self, rngs):
        self.a, self.b = nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)
        self.b.kernel = self.a.kernel
        self.blocks = nnx.List([nnx.Linear(8, 8, rngs=rngs)])
        self.blocks.append(self.blocks[0])
        self.emb, self.head = nnx.Embed(8, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)
        self.head.kernel = self.emb.embedding
        self.me = self


def is_tied(net):
    return (
        net.a.kernel is net.b.kernel
        and net.blocks[0] is net.blocks[1]
        and net.head.kernel is net.emb.embedding
        and len(jax.tree.leaves(nnx.state(net))) == 7
    )


TWICE = ["a/kernel", "blocks/0/kernel"]
VERBS = {
    "prune": fwt.prune(0.5, where=TWICE),
    "global": fwt.prune(0.5, scope="global", where=TWICE),
    "initialize": fwt.initialize(fwt.initializers.normal(), 0, where=TWICE),
    "reset": fwt.reset(0, "torch", where=TWICE),
    "project": fwt.project(fwt.constraints.unit_norm, where=TWICE),
    "at": fwt.at("a/kernel", fwt.prune(0.5)),
    "assign": fwt.assign({"a/kernel": np.ones((8, 8), np.float32)}),
    "straight_through": fwt.straight_through(fwt.prune(0.5, where=TWICE)),
    "apply_masks": lambda net: fwt.apply_masks(fwt.masks(0.5, where=TWICE)(net))(net),
    "nnx.jit": nnx.jit(fwt.prune(0.5, where=TWICE)),
}


@pytest.mark.parametrize("verb", VERBS)
def test_an_nnx_module_stays_tied(verb):
    net = Net(nnx.Rngs(0))
    new = VERBS[verb](net)
    assert type(new) is Net
    assert is_tied(new)
    assert is_tied(net)
    assert not np.array_equal(new.b.kernel[...], net.b.kernel[...])
    assert np.array_equal(new.emb.embedding[...], net.emb.embedding[...])


def test_two_nnx_modules_that_share_and_an_optimizer():
    one, other = Net(nnx.Rngs(0)), Net(nnx.Rngs(1))
    other.a.bias = one.a.bias
    new = fwt.prune(0.5, where=["x/a/kernel", "y/a/kernel"])({"x": one, "y": other})
    assert new["x"].a.bias is new["y"].a.bias
    assert is_tied(new["y"])
    held = nnx.ModelAndOptimizer(nnx.Linear(4, 6, rngs=nnx.Rngs(0)), TX, wrt=nnx.Param)
    new = fwt.prune(0.5)(held)
    assert int((new.model.kernel[...] == 0).sum()) == 12
    assert fwt.paths(held) == ["model/bias", "model/kernel"]


def tied_trees():
    w = np.asarray(W)
    yield "jax", {"emb": {"embedding": W}, "head": {"kernel": W}, "body": {"kernel": W + 1}}
    yield "NumPy", {"emb": {"embedding": w}, "head": {"kernel": w[:]}, "body": {"kernel": w + 1}}
    yield "turned", {"emb": {"embedding": w}, "head": {"kernel": w.T}, "body": {"kernel": w + 1}}


def share(tree):
    """Whether embedding and head are one still."""
    one, other = tree["emb"]["embedding"], tree["head"]["kernel"]
    return np.array_equal(one, other if one.shape == other.shape else other.T)


@pytest.mark.parametrize("name", dict(tied_trees()))
def test_one_array_at_two_paths(name):
    tree = dict(tied_trees())[name]
    both = ["emb/embedding", "head/kernel"]
    with pytest.warns(UserWarning, match="emb/embedding and head/kernel .*where='emb/embedding'"):
        new = fwt.prune(0.5)(tree)  # the stricter role: an embedding is not pruned
    assert zeros(new) == [12, 0, 0]
    with pytest.raises(fwt.WhereError, match="are one array"):
        fwt.prune(0.5, where="head/*")(tree)
    for where in ("**", both, "head/kernel"):
        for t in (
            fwt.prune(0.5, where=where),
            fwt.straight_through(fwt.prune(0.5, where=where)),
            fwt.initialize(fwt.initializers.normal(), 0, where=where),
            fwt.at(where, lambda tree: jax.tree.map(lambda x: x * 2, tree)),
            lambda tree, where=where: fwt.apply_masks(fwt.masks(0.5, where=where)(tree))(tree),
        ):
            new = t(tree)
            assert share(new)
            assert not np.array_equal(new["emb"]["embedding"], tree["emb"]["embedding"])
    assert share(fwt.straight_through(lambda t: jax.tree.map(lambda x: x * 2, t))(tree))
    assert set(fwt.paths(tree)) == {*both, "body/kernel"}
    masks = fwt.masks(0.5, where="body/*")(tree)
    masks["head"]["kernel"] = np.zeros(tree["head"]["kernel"].shape, bool)
    with pytest.raises(fwt.LeafError, match="only head/kernel has a mask"):
        fwt.apply_masks(masks)(tree)


def outcome(t, tree):
    """What a transform gives: values or an error, and warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            new = [np.asarray(x).tolist() for x in jax.tree.leaves(t(tree))]
        except fwt.FwtError as error:
            new = str(error)
    return new, [str(w.message) for w in caught]


@pytest.mark.parametrize("name", dict(tied_trees()))
@pytest.mark.parametrize(
    "t",
    [
        fwt.prune(0.5),
        fwt.prune(0.5, where="head/kernel"),
        fwt.prune(0.5, where="head/*"),
        fwt.initialize(fwt.initializers.normal(), 0, where="**"),
        fwt.project(fwt.constraints.unit_norm),
        fwt.at("head/kernel", fwt.prune(0.5)),
    ],
)
def test_at_everything_is_the_transform_itself_on_ties_too(name, t):
    tree = dict(tied_trees())[name]
    assert outcome(fwt.at("**", t), tree) == outcome(t, tree)


def test_assign_gives_a_tie_one_value():
    for name, tree in tied_trees():
        head = tree["head"]["kernel"]
        one, other = np.ones(W.shape, np.float32), np.zeros(head.shape, np.float32)
        with pytest.raises(fwt.LeafError, match="were given different values"):
            fwt.assign({"emb/embedding": one, "head/kernel": other})(tree)
        new = fwt.assign({"emb/embedding": one, "head/kernel": other + 1})(tree)
        assert share(new), name
        assert new["head"]["kernel"].all()


def test_ties_that_a_transform_of_the_users_own_would_undo():
    def different(tree):
        return jax.tree_util.tree_map_with_path(lambda keys, x: x + len(str(keys)), tree)

    tree = dict(tied_trees())["jax"]
    with pytest.raises(fwt.LeafError, match="were given different values"):
        fwt.straight_through(different)(tree)
    with pytest.raises(fwt.LeafError, match="were given different values"):
        fwt.at("**", different)(tree)
    for _, tree in tied_trees():  # what is left alone comes back as the same objects
        new = fwt.at("**", fwt.prune(0.5, where="body/*"))(tree)
        assert new["head"]["kernel"] is tree["head"]["kernel"]


def test_globs_find_a_tie_by_each_of_its_paths():
    for name, tree in tied_trees():
        head = tree["head"]["kernel"].shape
        where = ["head/kernel", "body/kernel"]
        new = fwt.prune(scope={"head/*": 0.25, "**": 0.5}, where=where)(tree)
        assert zeros(new) == [12, 6, 6], name  # body, emb, head
        names = "out in" if head == (4, 6) else "in out"
        unit = fwt.project(fwt.constraints.unit_norm, where="head/kernel", axes={"head/*": names})
        rows = np.linalg.norm(unit(tree)["emb"]["embedding"], axis=1)
        np.testing.assert_allclose(rows, 1, rtol=1e-5)
        for t in (
            fwt.prune(scope={"tail/*": 0.5, "**": 0.5}, where="**"),
            fwt.project(fwt.constraints.unit_norm, where="**", axes={"tail/*": names}),
        ):
            with pytest.raises(fwt.FwtError, match="matches no"):
                t(tree)
    net = Net(nnx.Rngs(0))
    new = fwt.prune(scope={"b/*": 0.25}, where="b/kernel")(net)
    assert int((new.a.kernel[...] == 0).sum()) == 16
    ours = fwt.project(fwt.constraints.unit_norm, where="b/kernel", axes={"b/*": "out in"})(net)
    np.testing.assert_allclose(np.linalg.norm(ours.a.kernel[...], axis=1), 1, rtol=1e-5)


def test_a_summary_counts_a_tie_once():
    for name, tree in tied_trees():
        told = fwt.summary(tree)
        assert [line.tied for line in told.lines] == ["", "", "emb/embedding"], name
        assert told.size == 48
        assert "head/kernel (is emb/embedding)" in str(told)
    pruned = fwt.prune(0.5, where="head/kernel")(dict(tied_trees())["jax"])
    assert fwt.summary(pruned).zeros == 12


def test_a_filling_of_a_template_is_no_tie():
    z = jnp.zeros((4, 6))
    tree = {"a": {"kernel": z}, "b": {"kernel": z}}
    t = fwt.initialize(fwt.initializers.normal(), 0)
    eager, jitted = t(tree), jax.jit(t)(tree)
    assert not np.array_equal(eager["a"]["kernel"], eager["b"]["kernel"])
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, eager, jitted)))
    view = np.zeros((4, 6), np.float32)  # memory that can be written to is shared on purpose
    new = t({"a": {"kernel": view}, "b": {"kernel": view[:]}})
    assert np.array_equal(new["a"]["kernel"], new["b"]["kernel"])
    one = jnp.zeros((4, 6)).at[1, 1].set(1)
    new = t({"a": {"kernel": one}, "b": {"kernel": one}})
    assert np.array_equal(new["a"]["kernel"], new["b"]["kernel"])


def test_values_are_compared_only_where_ties_are_asked_for(monkeypatch):
    calls = []
    same = _nodes.same_values
    monkeypatch.setattr(_nodes, "same_values", lambda *x: calls.append(x) or same(*x))
    told = '{"ties": [["a.kernel", "b.kernel"]]}'
    tree = _nodes.FromFile({"a": {"kernel": W}, "b": {"kernel": W + 0}}, told)
    assert len(fwt.paths(tree)) == 2
    assert not calls
    new = fwt.prune(0.5)(tree)
    assert len(calls) == 1
    assert zeros(new) == [12, 12]


def test_what_is_no_tie():
    true, one = np.ones((), bool), np.float32(1.0)
    seen = np.broadcast_to(np.float32(1.0), (2, 2))  # has no memory of its own
    tree = {"a": {"kernel": seen, "t": true, "s": one}, "b": {"bias": seen, "t": true, "s": one}}
    new = fwt.prune(0.5)(tree)
    assert int((new["a"]["kernel"] == 0).sum()) == 2
    assert new["b"]["bias"] is seen
    parts = np.arange(24, dtype=np.float32).reshape(4, 6)
    views = {"a": {"kernel": parts[:2]}, "b": {"bias": parts[2:]}}
    new = fwt.prune(1.0)(views)
    assert not new["a"]["kernel"].any()
    assert new["b"]["bias"] is views["b"]["bias"]


def test_an_optimizer_gives_each_of_a_tie_its_own_update():
    tree = {"a": {"kernel": W}, "b": {"kernel": W}}
    tx = fwt.optim.sparsify(optax.sgd(0.1), 0.5)
    state = tx.init(tree)
    for _ in range(2):
        updates, state = tx.update({"a": {"kernel": W}, "b": {"kernel": -W}}, state, tree)
        tree = optax.apply_updates(tree, updates)
    assert zeros(tree) == [12, 12]


def test_equinox_shared():
    class Model(eqx.Module):
        shared: eqx.nn.Shared

        def __init__(self, key):
            emb = eqx.nn.Embedding(6, 4, key=key)
            head = eqx.nn.Linear(4, 6, use_bias=False, key=key)
            self.shared = eqx.nn.Shared(
                (emb, head), where=lambda p: p[1].weight, get=lambda p: p[0].weight
            )

    model = Model(jax.random.key(0))
    new = fwt.prune(0.5, where="**/weight")(model)
    emb, head = new.shared()
    assert head.weight is emb.weight
    assert int((head.weight == 0).sum()) == 12


def test_the_gradient_of_a_tie_is_the_sum_of_both():
    key = jax.random.split(jax.random.key(0), 2)
    shared, x = (jax.random.normal(k, (8, 8)) for k in key)
    tree = {"a": {"kernel": shared}, "b": {"kernel": shared}}
    grads = jax.grad(lambda p: (jnp.tanh(x @ p["a"]["kernel"]) @ p["b"]["kernel"]).sum())(tree)
    truth = jax.grad(lambda w: (jnp.tanh(x @ w) @ w).sum())(shared)
    found = fwt.prune(0.5, fwt.scores.gradient, grads=grads)(tree)
    kept = jnp.argsort(-jnp.abs(truth).ravel())[:32]
    assert (np.flatnonzero(found["a"]["kernel"]) == np.sort(kept)).all()
    assert found["b"]["kernel"] is found["a"]["kernel"]


def test_a_transposed_view_has_the_axes_of_the_path_that_is_named():
    w = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    tree = {"a": {"kernel": w}, "b": {"kernel": w.T}}
    for where, axis in (("a/kernel", 0), ("b/kernel", 0)):
        new = fwt.project(fwt.constraints.unit_norm, where=where)(tree)
        assert np.array_equal(new["a"]["kernel"], new["b"]["kernel"].T)
        name = where[0]
        np.testing.assert_allclose(np.linalg.norm(new[name]["kernel"], axis=axis), 1, rtol=1e-6)


def test_assign_keeps_nothing_of_the_users_own_array():
    for leaf in (np.zeros(9, np.float32), jnp.zeros(9)):
        mine = np.ones(9, np.float32)
        new = fwt.assign({"a": mine})({"a": leaf})["a"]
        mine[:] = 5
        assert np.all(np.asarray(new) == 1)


def is_matrix(params):
    return jax.tree.map(lambda x: x.ndim > 1, params)


def by_rank(params):
    return jax.tree.map(lambda x: "matrix" if x.ndim > 1 else "vector", params)


# Each optimizer that optax exports, and each wrapper, with settings under which it has a state.
RATES = [
    "adabelief", "adadelta", "adafactor", "adagrad", "adam", "adamax", "adamaxw", "adamw",
    "adan", "amsgrad", "fromage", "lamb", "lars", "lbfgs", "lion", "nadam", "nadamw",
    "novograd", "optimistic_adam_v2", "optimistic_gradient_descent", "polyak_sgd", "radam",
    "rmsprop", "rprop", "signum", "sm3", "yogi", "scale_by_zoom_linesearch",
]  # fmt: skip
PLAIN = [
    "scale_by_adadelta", "scale_by_adam", "scale_by_adamax", "scale_by_adan",
    "scale_by_amsgrad", "scale_by_belief", "scale_by_distance_over_gradients",
    "scale_by_factored_rms", "scale_by_lbfgs", "scale_by_lion", "scale_by_novograd",
    "scale_by_optimistic_gradient", "scale_by_radam", "scale_by_rms", "scale_by_rss",
    "scale_by_sm3", "scale_by_stddev", "scale_by_yogi",
]  # fmt: skip
OPTIMIZERS = (
    {name: getattr(optax, name)(0.1) for name in RATES if hasattr(optax, name)}
    | {name: getattr(optax, name)() for name in PLAIN if hasattr(optax, name)}
    | {
        name: getattr(optax.contrib, name)(0.1)
        for name in (
            "acprop",
            "ademamix",
            "adopt",
            "dadapt_adamw",
            "dog",
            "galore",
            "madgrad",
            "momo",
            "momo_adam",
            "muon",
            "schedule_free_sgd",
            "simplified_ademamix",
            "sophia",
        )
        if hasattr(optax.contrib, name)
    }
    | {
        name: getattr(optax.contrib, name)()
        for name in ("cocob", "dowg", "prodigy", "reduce_on_plateau", "schedule_free_adamw")
        if hasattr(optax.contrib, name)
    }
    | {
        "accumulated": optax.MultiSteps(optax.sgd(0.1, 0.9), 2),
        "backtracking": optax.scale_by_backtracking_linesearch(5, store_grad=True),
        "ema": optax.ema(0.9),
        "every": optax.chain(optax.adam(0.1), optax.apply_every(3)),
        "finite": optax.apply_if_finite(optax.adam(0.1), 3),
        "flat": optax.flatten(optax.adam(0.1)),
        "injected": optax.inject_hyperparams(optax.sgd)(learning_rate=0.1, momentum=0.9),
        "lbfgs alone": optax.lbfgs(0.1, linesearch=None),
        "masked": optax.masked(optax.adam(0.1), is_matrix),
        "masked trace": optax.masked(optax.trace(0.9), is_matrix),
        "mechanized": optax.contrib.mechanize(optax.sgd(0.1)),
        "momentum": optax.sgd(0.1, 0.9),
        "sometimes": optax.conditionally_mask(optax.adam(0.1), lambda step: step < 3),
        "constrained": fwt.optim.constrain(
            optax.adam(0.1), fwt.project(fwt.constraints.non_negative)
        ),
        "sparse": fwt.optim.sparsify(optax.adam(0.1), 0.5),
        "regrown": fwt.optim.sparsify(optax.sgd(0.1, 0.9), 0.5, regrow="rigl"),
    }
)
if hasattr(optax, "partition"):  # from 0.2.5 on
    OPTIMIZERS["measured"] = optax.measure_with_ema(lambda updates, **_: updates, 0.9)
    both = {"matrix": optax.adam(0.1), "vector": optax.sgd(0.1, 0.9)}
    OPTIMIZERS["partitioned"] = optax.partition(both, by_rank)
    twice = optax.chain(optax.contrib.normalize(), optax.sgd(0.1))
    OPTIMIZERS["sam"] = optax.contrib.sam(optax.adam(0.1), twice)


def fields(tree):
    """As Orbax gives a tree back: fields are keys, and tuples are lists."""
    if hasattr(tree, "_fields"):
        return {name: fields(getattr(tree, name)) for name in tree._fields}
    if isinstance(tree, dict):
        return {name: fields(value) for name, value in tree.items()}
    return [fields(x) for x in tree] if isinstance(tree, tuple) else tree


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_that_a_checkpoint_gives_back_is_no_weight(name):
    kernel = jnp.arange(1.0, 21).reshape(5, 4)
    flat = {"d": {"kernel": kernel, "bias": jnp.ones(4)}}
    deep = {"block": {"d": flat["d"]}, "head": {"kernel": kernel + 20}}

    def moved(x):  # so that no moment is zero
        return x + 1 if jnp.issubdtype(x.dtype, jnp.floating) else x

    def through(tree):
        return serialization.msgpack_restore(serialization.to_bytes(tree))

    for params in (flat, deep):
        state = jax.tree.map(moved, jax.tree.map(jnp.asarray, OPTIMIZERS[name].init(params)))
        for tree in (
            (params, state),
            through((params, state)),
            through({"model": params, "opt": state}),
            through({"weights": params, "optimizer": state}),
            through({"params": params, "opt_state": state}),
            {"net": params, "other": fields(state)},
        ):
            assert len(fwt.paths(tree)) == len(jax.tree.leaves(params)), name
    pruned = jax.tree.leaves(fwt.prune(0.5, scope="global")(tree))
    zeros = [
        int((np.asarray(a) == 0).sum()) - int((np.asarray(b) == 0).sum())
        for a, b in zip(pruned, jax.tree.leaves(tree), strict=True)
        if jnp.issubdtype(a.dtype, jnp.floating)
    ]
    assert sum(zeros) == max(zeros) == 20, name


def test_all_that_optax_calls_a_part_of_a_state_is_known():
    modules = [m for name, m in sys.modules.items() if name.startswith("optax.")]
    states = {x for m in modules for x in vars(m).values() if isinstance(x, type)}
    states = {s for s in states if s.__name__.endswith("State") and hasattr(s, "_fields")}
    inside = {"BacktrackingLineSearchState", "ZoomLinesearchState"}  # within one update alone
    known = _states.FIELDS.union(*_states.BESIDE.values())
    for state in states:
        if state.__name__ not in inside:
            assert known.issuperset(state._fields), state
    assert len(states) > 40


def test_the_state_of_equinox_holds_statistics_and_no_weights():
    layer = eqx.nn.make_with_state(eqx.nn.BatchNorm)(4, "batch")
    assert fwt.paths(layer) == ["0/bias", "0/weight"]
    new = fwt.initialize(fwt.initializers.constant(3.0), 0, where="**")(layer)
    assert float(new[0].weight[0]) == 3
    for x, y in zip(jax.tree.leaves(new[1]), jax.tree.leaves(layer[1]), strict=True):
        assert x is y


@pytest.mark.parametrize(
    ("leaf", "told"),
    [
        (np.ma.masked_array(np.ones((4, 6), "f"), mask=False), r"kernel is a masked.*filled\(0\)"),
        (np.ones((4, 6), np.dtype("f").newbyteorder("S")), "kernel is .*byte order.*astype"),
    ],
)
def test_arrays_of_numpy_that_jax_lacks_are_refused_by_name(leaf, told):
    with pytest.raises(fwt.LeafError, match=told):
        fwt.prune(0.5)({"d": {"kernel": leaf}})


def test_a_layer_may_be_called_as_a_state_is():
    layer = {"kernel": jnp.ones((3, 2))}
    params = {
        "optimizer": layer,
        "dec": {"mu": layer, "count": layer},
        "normal": {"mu": jnp.ones((4, 2)), "nu": jnp.ones((4, 2))},
        "0": {"trace": jnp.ones((3, 2))},
        "1": {"mu": layer},
        "2": {"z": layer, "n": layer},
        "3": {"v": jnp.ones((3, 2)), "g": jnp.ones(2), "t": jnp.float32(1)},
        "4": {"trace": {"inner": layer}},
        "5": {"v_row": layer},
    }
    vae = [layer, {"mu": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}, "count": np.int32(3)}]
    assert fwt.paths(vae) == ["0/kernel", "1/count", "1/mu/bias", "1/mu/kernel"]
    for tree in (params, {"params": params}):
        assert len(fwt.paths(tree)) == 14
        pruned = fwt.select(fwt.prune(0.5, where="**")(tree)).values()
        assert all(int((x == 0).sum()) == x.size // 2 for x in pruned)
    net, other = ({"a": layer, "b": {"kernel": jnp.ones((2, n))}} for n in (4, 1))
    for name in ("value", "projector", "reward", "z", "ema", "mu"):
        heads = {"actor": net, "critic": {name: other}}
        assert len(fwt.paths(heads)) == 4, name
    # Among params nothing is a state, whatever its name.
    named = {"params": {"opt_state": layer, "1": {"trace": {"d": layer}}}}
    assert fwt.paths(named) == ["1/trace/d/kernel", "opt_state/kernel"]
    net = torch.nn.Sequential()
    net.add_module("optimizer", torch.nn.Linear(3, 2))
    converters.transform(net, fwt.prune(0.5))
    assert int((net.optimizer.weight == 0).sum()) == 3
