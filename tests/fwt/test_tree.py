"""Paths, where and the containers that transforms take."""

from collections import OrderedDict

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict, freeze
from hypothesis import given
from hypothesis import strategies as st

import fwt
from fwt import _tree


def test_paths_are_in_natural_order(params):
    assert fwt.paths(params) == [
        "dense_2/bias",
        "dense_2/kernel",
        "dense_10/bias",
        "dense_10/kernel",
        "embed/embedding",
        "norm/bias",
        "norm/scale",
    ]


@given(st.lists(st.text(alphabet="ab/\\*?[]!1 .", min_size=1, max_size=5), min_size=1, max_size=3))
def test_any_name_is_found_under_its_own_path_only(parts):
    tree = np.ones(2, np.float32)
    for part in reversed(parts):
        tree = {part: tree}
    other = {"zz": np.ones(1)}
    (path,) = fwt.paths(tree)
    assert [_tree.unescape(p) for p in _tree.split(path)] == parts
    assert list(fwt.select({**tree, **other}, path)) == [path]
    assert _tree.matches("**", path)
    assert _tree.matches("/".join(["*"] * len(parts)), path)
    assert not _tree.matches("/".join(["*"] * (len(parts) + 1)), path)


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("dense_*/kernel", "dense_1/kernel", True),
        ("dense_*/kernel", "a/dense_1/kernel", False),
        ("**/kernel", "kernel", True),
        ("**/kernel", "a/b/kernel", True),
        ("a/**", "a/b/c", True),
        ("a/**", "a", False),
        ("a/**/c", "a/c", True),
        ("**/b/**", "a/b/c", True),
        ("*", "a/b", False),
        ("layer_[0-3]/k", "layer_2/k", True),
        ("layer_[!0-3]/k", "layer_2/k", False),
        ("layer_?/k", "layer_12/k", False),
        ("a*c", "a/c", False),
        ("**/b", "a\\/b", False),
    ],
)
def test_globs(pattern, path, expected):
    assert _tree.matches(pattern, path) is expected


@pytest.mark.parametrize(
    ("pattern", "paths", "expected"),
    [
        ("0.weight", ["0/weight", "0/bias"], ["0/weight"]),
        ("0/weight", ["0.weight", "1.weight"], ["0.weight"]),
        ("**.weight", ["a/0/weight", "a/0/bias"], ["a/0/weight"]),
        ("*.weight", ["a/0/weight", "0/weight"], None),
        ("a.[0.1]/w", ["a/0/w", "a/2/w"], ["a/0/w"]),
        ("d/kernel:0", ["d/kernel"], ["d/kernel"]),
        ("d/kernel", ["d/kernel:0", "d/bias:0"], ["d/kernel:0"]),
        ("bert/kernel", ["bert\\/kernel", "bert\\/bias"], ["bert\\/kernel"]),
        ("bert/*", ["bert\\/kernel", "x/kernel"], ["bert\\/kernel"]),
        ("bert.**", ["bert\\/kernel/0", "x/kernel"], ["bert\\/kernel/0"]),
        # The tree's own spelling comes first, and that of files may not name two leaves as one.
        ("a/b", ["a/b", "a\\/b"], ["a/b"]),
        ("a\\/b", ["a/b", "a\\/b"], ["a\\/b"]),
        ("a.b", ["a.b", "a/b"], ["a.b"]),
        ("a/*", ["a/b", "a\\/b"], ["a/b"]),
        ("**/linear/w", ["linear/w", "mlp\\/linear/w"], ["linear/w"]),
        ("a.b", ["a/b", "a\\/b"], None),
        ("**/kernel", ["a.1/kernel", "b/kernel"], ["a.1/kernel", "b/kernel"]),
        ("**", ["a.b", "a/b"], ["a.b", "a/b"]),
    ],
)
def test_the_spelling_of_files_is_taken(pattern, paths, expected):
    if expected is None:
        with pytest.raises(fwt.WhereError, match=r"write (which|that)"):
            _tree.named(pattern, paths)
    else:
        assert _tree.named(pattern, paths) == expected


ZERO = np.zeros((2, 3), np.float32)


def test_every_name_may_be_spelled_as_in_a_file():
    tree = {"f": {"0": {"weight": jnp.arange(1.0, 7).reshape(2, 3), "bias": jnp.ones(2)}}}
    name = "f.0.weight"
    own = ["f/0/weight"]
    assert list(fwt.select(tree, name)) == list(fwt.select(tree, [fwt.kernels, name])) == own
    assert list(fwt.select(tree, [fwt.biases, fwt.kernels])) == ["f/0/bias", *own]
    for transform in (
        fwt.prune(0.5, where=name),
        fwt.prune(scope={name: 0.5}),
        fwt.at(name, fwt.prune(0.5)),
        fwt.prune(pattern=fwt.patterns.n_m(1, 3, order="chw", flattened={name: (1, 1, 3)})),
        fwt.project(fwt.constraints.unit_norm, axes={name: "out in"}),
        fwt.assign({name: ZERO}),
    ):
        new = transform(tree)["f"]["0"]
        assert not np.array_equal(new["weight"], tree["f"]["0"]["weight"])
        assert new["bias"] is tree["f"]["0"]["bias"]
    with pytest.raises(fwt.LeafError, match="given twice"):
        fwt.assign({name: ZERO, own[0]: ZERO})(tree)
    # A tie is named by one of its names in the other spelling too.
    tied = {"e": {"embedding": tree["f"]["0"]["weight"]}, "h": {"w": tree["f"]["0"]["weight"]}}
    assert fwt.select(fwt.prune(0.5, where="h.w")(tied), "e.embedding")["e/embedding"][0, 0] == 0


def test_where_in_every_form(params):
    expected = ["dense_2/kernel", "dense_10/kernel"]
    bools = jax.tree.map(lambda _: False, params)
    bools["dense_10"]["kernel"] = bools["dense_2"]["kernel"] = True
    for where in (
        "dense_*/kernel",
        ["dense_2/kernel", "dense_10/*el"],
        lambda path, x: path.endswith("kernel") and len(x.shape) == 2,
        bools,
        fwt.kernels,
        fwt.kernels(),
    ):
        assert list(fwt.select(params, where)) == expected
    assert "norm/scale" not in fwt.select(params, fwt.biases)
    assert list(fwt.select({"params": params}, {"params": bools})) == expected
    coarse = {"dense_2": True, "dense_10": False, "norm": False, "embed": False}
    assert list(fwt.select(params, coarse)) == ["dense_2/bias", "dense_2/kernel"]


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("dense_2/kernal", "close: 'dense_2/kernel'"),
        ("kernel", "dense_2/kernel"),
        (["dense_2/kernel", "dens_10/kernel"], "dens_10/kernel"),
        (lambda p, x: False, "matches none of the 7 leaves"),
        (lambda p, x: np.ones(2), "must return True or False"),
        ({"dense_2": True}, "says nothing of"),
        ({"dense_3": True}, "says nothing of"),
        ({"dense_2": 3}, "must be a glob"),
        (7, "must be a glob"),
        ([], "matches none"),
    ],
)
def test_where_that_selects_nothing_says_so(params, where, said):
    with pytest.raises(fwt.WhereError) as caught:
        fwt.select(params, where)
    assert said in str(caught.value)


def test_where_of_traced_bools_is_refused(params):
    with pytest.raises(fwt.WhereError, match="trace time"):
        jax.jit(lambda m: fwt.select(params, {"dense_2": m}))(jnp.array(True))


def containers():
    kernel = np.arange(-6, 6, dtype=np.float32).reshape(3, 4)
    linen = {"dense": {"kernel": kernel, "bias": np.ones(4, np.float32)}}
    yield "dict", linen, "dense/kernel"
    yield "FrozenDict", freeze(linen), "dense/kernel"
    yield "variables", {"params": linen, "batch_stats": {"n": {"mean": kernel}}}, "dense/kernel"
    yield "frozen variables", freeze({"params": linen}), "dense/kernel"
    module = fwt.Sequential([("dense", nn.Dense(4))])
    yield "Model", fwt.Model(module, {"params": linen}), "dense/kernel"

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(3, 4, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

    state = nnx.state(Net(nnx.Rngs(0)))
    yield "nnx.State", state, "dense/kernel"
    yield "equinox", eqx.nn.MLP(3, 4, 5, 1, key=jax.random.key(0)), "layers/0/weight"
    yield "list", [np.ones(2), {"kernel": kernel, "name": "text", "none": None}], "1/kernel"


CONTAINERS = list(containers())


@pytest.mark.parametrize(("name", "tree", "path"), CONTAINERS, ids=[c[0] for c in CONTAINERS])
def test_every_container_keeps_its_kind(name, tree, path):
    new = fwt.prune(0.5, where=path)(tree)
    assert jax.tree.structure(new) == jax.tree.structure(tree)
    assert type(new) is type(tree)
    before, after = fwt.select(tree, "**"), fwt.select(new, "**")
    assert int(np.sum(np.asarray(after[path]) == 0)) >= before[path].size // 2
    for other in before:
        if other != path:
            assert after[other] is before[other]
    if name != "equinox" and name != "list":
        jitted = jax.jit(fwt.prune(0.5, where=path))(tree)
        assert jnp.array_equal(fwt.select(jitted, path)[path], after[path])
    masks = fwt.masks(0.5, where=path)(tree)
    assert jnp.array_equal(fwt.select(masks, path)[path], np.asarray(after[path]) != 0)
    masked = fwt.apply_masks(masks)(tree)
    assert jnp.array_equal(fwt.select(masked, path)[path], after[path])


def test_equinox_under_filter_jit():
    mlp = eqx.nn.MLP(3, 4, 5, 1, key=jax.random.key(0))
    new = eqx.filter_jit(fwt.prune(0.5))(mlp)
    assert [int((x == 0).sum()) for x in fwt.select(new, fwt.kernels).values()] == [8, 10]
    assert new(jnp.ones(3)).shape == (4,)


def test_linen_and_nnx_have_the_same_paths():
    net = fwt.Sequential([("hidden", nn.Dense(3))])
    variables = net.init(jax.random.key(0), jnp.ones((1, 2)))

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.Linear(2, 3, rngs=rngs)

    state = nnx.state(Net(nnx.Rngs(0)), nnx.Param)
    assert fwt.paths(state) == fwt.paths(variables)
    one = fwt.initialize(fwt.initializers.normal(), 3)(variables)
    two = fwt.initialize(fwt.initializers.normal(), 3)(state)
    assert jnp.array_equal(
        fwt.select(one, fwt.kernels)["hidden/kernel"], fwt.select(two, fwt.kernels)["hidden/kernel"]
    )


def test_a_leaf_named_value_keeps_its_path():
    assert fwt.paths({"a": {"value": np.ones(2)}}) == ["a/value"]
    assert isinstance(freeze({}), FrozenDict)


def test_inputs_are_never_changed(params):
    before = jax.tree.map(np.copy, params)
    for t in (
        fwt.prune(0.5, where="**"),
        fwt.initialize(fwt.initializers.ones, 0, "**"),
        fwt.project(fwt.constraints.non_negative, "**"),
    ):
        t(params)
    assert jax.tree.all(jax.tree.map(np.array_equal, before, params))


def test_summary_counts(params):
    text = str(fwt.summary(fwt.prune(0.5)(params)))
    assert "dense_10/kernel" in text
    assert "( 50.0%)" in text
    model = fwt.Model(None, {"params": params, "batch_stats": {"norm": {"mean": np.ones(3)}}})
    lines = fwt.summary(model).lines
    assert lines[-1].path == "batch_stats/norm/mean"
    assert sum(line.size for line in lines) == fwt.summary(model).size
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    assert fwt.summary(shapes).lines[0].zeros is None


@pytest.mark.parametrize(("name", "tree", "path"), CONTAINERS, ids=[c[0] for c in CONTAINERS])
def test_a_tree_of_bools_has_the_shape_of_its_container(name, tree, path):
    if name in ("list", "equinox", "nnx.State"):
        arrays = jax.tree.map(_tree.is_array, tree)
    else:
        arrays = jax.tree.map(lambda _: True, tree)
    assert list(fwt.select(tree, arrays)) == fwt.paths(tree)


def test_unusual_keys():
    tree = {"a\nb": {"kernel": np.ones(2)}, "x" + "9" * 5000: np.ones(1), "x10": np.ones(1)}
    for path in fwt.paths(tree):
        assert list(fwt.select(tree, path)) == [path]
    assert fwt.paths(tree)[1] == "x10"
    with pytest.raises(fwt.WhereError, match="no glob"):
        fwt.select(tree, "[z-a]")
    with pytest.raises(fwt.LeafError, match="same path"):
        fwt.paths(OrderedDict([("1", np.ones(1)), (1, np.ones(1))]))


def test_what_jax_lacks_is_refused_by_name():
    w = np.ones((2, 3), np.float32)
    with pytest.raises(fwt.LeafError, match=r"the keys '10', 10.*no order"):
        fwt.paths({"10": {"kernel": w}, 10: {"kernel": w}})
    wide = w.astype(np.longdouble)
    with pytest.raises(fwt.LeafError, match=r"d/kernel is .*, which JAX lacks"):
        fwt.prune(0.5)({"d": {"kernel": wide}})
    for other in (wide, w.astype(object), np.zeros((2, 2), [("a", "f4")])):
        new = fwt.prune(0.5, where="e/*")({"d": {"kernel": other}, "e": {"kernel": w}})
        assert new["d"]["kernel"] is other
        assert int((new["e"]["kernel"] == 0).sum()) == 3
