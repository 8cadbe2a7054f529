"""``weights`` and ``assign``: the weights of a model as a tree, and the way back."""

import json
import zipfile

import cases
import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
import torch
from compare import in_keras, in_torch
from flax import nnx

import fwt
from fwt import converters

FRAMEWORKS = {
    "keras": (cases.KERAS, cases.randomise_keras, in_keras, converters.from_keras),
    "torch": (cases.TORCH, cases.randomise_torch, in_torch, converters.from_torch),
}
MODELS = [(f, n) for f, (table, *_) in FRAMEWORKS.items() for n in table]


def same(one, other):
    assert one.keys() == other.keys()
    for path, x in one.items():
        assert np.asarray(x).tobytes() == np.asarray(other[path]).tobytes(), path


@pytest.mark.parametrize(("framework", "name"), MODELS)
def test_weights_come_back_as_they_were(framework, name):
    table, randomise, run, _ = FRAMEWORKS[framework]
    shape, make = table[name]
    model = make()
    x = np.random.default_rng(3).normal(size=(2, *shape)).astype(np.float32)
    if name.startswith("embedding"):
        x = np.abs(x * 3).astype(np.int32)
    before = run(model, x)
    if not model.state_dict() if framework == "torch" else not model.variables:
        with pytest.raises(fwt.ConversionError, match="has no floating weights"):
            converters.weights(model)
        return
    held = converters.weights(model)
    kept = jax.tree.map(np.array, held)
    randomise(model, 1)
    assert any(
        y.tobytes() != np.asarray(z).tobytes()
        for y, z in zip(
            jax.tree.leaves(kept), jax.tree.leaves(converters.weights(model)), strict=True
        )
    )
    same(fwt.select({"params": held}), fwt.select({"params": kept}))  # no views of the model
    assert converters.assign(model, held) is model
    np.testing.assert_array_equal(run(model, x), before)
    assert fwt.diff(model, kept).equal


@pytest.mark.parametrize(
    ("framework", "name"), [("keras", "mlp"), ("torch", "mlp"), ("torch", "conv_groups_same")]
)
def test_names_and_axes_are_those_of_the_converted_model(framework, name):
    table, _, _, convert = FRAMEWORKS[framework]
    shape, make = table[name]
    model = make()
    given = {"input_shape": shape} if framework == "torch" else {}
    found, wanted = converters.weights(model), convert(model, **given).variables
    for part in wanted:
        mine = {p: x for p, x in fwt.select({"params": found[part]}).items() if "batches" not in p}
        same(mine, fwt.select({"params": wanted[part]}))


class Twice(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, use_running_average=True, rngs=rngs)
        self.drop = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
        self.second = self.first

    def __call__(self, x):
        return self.second(self.drop(self.norm(self.first(x))))


def test_an_nnx_module():
    model = Twice(nnx.Rngs(0))
    model.norm.mean[...] = np.arange(3.0)
    x = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    before, held = np.asarray(model(x)), converters.weights(model)
    assert sorted(held["params"]) == ["first", "norm", "second"]
    other = Twice(nnx.Rngs(1))
    assert converters.assign(other, held) is other
    np.testing.assert_array_equal(other(x), before)
    assert other.second is other.first
    converters.assign(other, {"second/kernel": np.ones((3, 3), np.float32)})
    assert other.first.kernel[...].min() == 1
    apart = {
        p: np.full((3, 3), i, np.float32) for i, p in enumerate(["first/kernel", "second/kernel"])
    }
    with pytest.raises(fwt.LeafError, match="one array"):
        converters.assign(other, apart)


def test_a_file_and_a_model(tmp_path):
    net = fwt.Sequential([("d", nn.Dense(2)), ("n", nn.BatchNorm())], (3,))
    model = fwt.Model(net, net.init(jax.random.key(0), np.ones((1, 3), np.float32)))
    converters.save(tmp_path / "net.keras", model)
    held = converters.weights(tmp_path / "net.keras")
    same(fwt.select(held), fwt.select(converters.weights(model)))
    assert fwt.diff(tmp_path / "net.keras", model).equal
    new = converters.assign(model, {"batch_stats": {"n": {"mean": np.full(2, 3, np.float32)}}})
    assert new.variables["batch_stats"]["n"]["mean"].tolist() == [3, 3]
    assert new.module == net
    assert np.asarray(model.variables["batch_stats"]["n"]["mean"]).tolist() == [0, 0]


def test_what_is_no_weight_of_an_nnx_module_is_left_out():
    model = nnx.MultiHeadAttention(2, 4, decode=True, rngs=nnx.Rngs(0))
    model.init_cache((1, 5, 4))
    assert {p.split("/")[0] for p in fwt.paths(converters.weights(model))} == {
        "query", "key", "value", "out"
    }  # fmt: skip


class Plain(nnx.Module):
    """Variables of all kinds."""

    def __init__(self, seed=0):
        made = nnx.Rngs(seed)
        self.dense = nnx.WeightNorm(nnx.Linear(3, 3, rngs=made), rngs=made)
        self.norm = nnx.BatchNorm(3, rngs=made)
        self.shift = nnx.Variable(jax.random.normal(made.params(), (3,)))
        self.table = nnx.data(jnp.arange(3.0) + seed)
        self.held = nnx.data(np.full(3, seed, np.float32))
        self.cache = nnx.Cache(jnp.float32(0))
        self.note = nnx.Intermediate(jnp.float32(0))
        self.key = nnx.Variable(jax.random.key(1))
        self.rngs = nnx.Rngs(3)

    def __call__(self, x):
        return self.norm(self.dense(x)) * self.table + self.shift[...] + self.held


def test_weights_of_an_nnx_module_are_what_a_transform_sees():
    one, other = Plain(0), Plain(1)
    one.eval()
    other.eval()
    held = converters.weights(one)
    assert fwt.paths(held) == fwt.paths(one)
    assert {"shift", "table", "held"} <= set(held["params"])
    assert sorted(held["batch_stats"]["norm"]) == ["mean", "var"]
    x = jnp.ones((2, 3))
    assert not np.array_equal(one(x), other(x))
    converters.assign(other, held)
    np.testing.assert_array_equal(one(x), other(x))  # all that it computes with
    assert fwt.diff(one, other).equal
    with pytest.raises(ValueError, match="read-only"):
        held["params"]["held"][0] = 1
    one.held[0] = 7
    assert held["params"]["held"][0] == 0  # a copy


CHANGES = {
    "params/shift": lambda m: m.shift.set_value(m.shift[...] + 1),
    "params/table": lambda m: setattr(m, "table", m.table + 1),
    "params/dense/scales/('kernel',)": lambda m: converters.assign(
        m, {"dense/scales/('kernel',)": np.full(3, 5, np.float32)}
    ),
    "batch_stats/norm/mean": lambda m: m.norm.mean.set_value(m.norm.mean[...] + 1),
    "beside/cache": lambda m: m.cache.set_value(m.cache[...] + 1),
    "beside/note": lambda m: m.note.set_value(m.note[...] + 1),
    "beside/key": lambda m: m.key.set_value(jax.random.key(2)),
    "beside/rngs/default/count": lambda m: m.rngs.params(),
    "beside/rngs/default/key": lambda m: m.rngs.default.key.set_value(jax.random.key(4)),
}


@pytest.mark.parametrize("path", CHANGES)
def test_what_differs_of_nnx_modules_is_told(path):
    one, other = Plain(), Plain()
    assert fwt.diff(one, other).equal
    CHANGES[path](other)
    assert [c.path for c in fwt.diff(one, other).changes] == [path]


def test_typed_keys_are_compared_by_their_numbers():
    one, other = ({"rng": jax.random.key(i), "w": np.ones(2)} for i in range(2))
    assert fwt.diff(one, one).same == 2
    assert [c.path for c in fwt.diff(one, other).changes] == ["params/rng"]


def test_what_is_assigned_to_an_nnx_module_is_what_it_held():
    model = Plain()
    device = jax.devices()[0]
    model.shift.set_value(jax.device_put(model.shift[...], device))  # where a user wants it
    same_as = {p: type(x) for p, x in fwt.select(model).items()}
    untouched = model.norm.mean[...]
    converters.assign(model, converters.weights(Plain(1))["params"])
    assert {p: type(x) for p, x in fwt.select(model).items()} == same_as
    assert model.norm.mean[...] is untouched
    assert isinstance(model.held, np.ndarray)
    assert model.shift[...].at[0].set(0).sharding == model.shift[...].sharding
    assert model.shift[...].committed
    # JAX's dtypes: NumPy's would make float64 of these.
    assert (model.shift[...] + np.arange(3)).dtype == jnp.float32
    copied = nnx.clone(model)
    copied.shift[...] += 1
    assert not np.array_equal(copied.shift[...], model.shift[...])


def test_files_where_models_are_read(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    torch.save(net.state_dict(), tmp_path / "net.pt")
    assert fwt.paths(tmp_path / "net.pt") == ["0/bias", "0/weight", "1/bias", "1/weight"]
    assert fwt.summary(str(tmp_path / "net.pt")).lines[1].shape == (3, 4)
    with pytest.raises(fwt.FwtError, match=r"under other names.*load\(path, architecture=model\)"):
        fwt.diff(tmp_path / "net.pt", net)
    trees = ({"d": {"kernel": np.ones((2, 3), np.float32), "bias": np.ones(3, np.float32)}},
             {"d": {"kernel": np.ones((2, 3), np.float32)}})  # fmt: skip
    converters.save(tmp_path / "some.npz", None, {"params": trees[0]})
    (change,) = fwt.diff(tmp_path / "some.npz", trees[1]).changes  # one more is no other spelling
    assert change.what.startswith("only in the first")
    named = converters.load(tmp_path / "net.pt", architecture=net)
    assert not [c for c in fwt.diff(named, net).changes if "batches" not in c.path]


def test_what_is_no_weight_of_live_models_differs_too():
    class Shifted(torch.nn.Module):
        def __init__(self, value):
            super().__init__()
            torch.manual_seed(0)
            self.dense = torch.nn.Linear(2, 2)
            self.register_buffer("shift", torch.full((2,), value))
            self.variables = "a name of the user's own"

    assert fwt.diff(Shifted(1.0), Shifted(1.0)).equal
    assert [c.path for c in fwt.diff(Shifted(1.0), Shifted(2.0)).changes] == ["beside/shift"]

    def adapted(value):
        layer = keras.layers.Normalization(name="n")
        ones = keras.layers.Dense(1, name="d", kernel_initializer="ones")
        model = keras.Sequential([keras.Input((2,)), layer, ones])
        layer.adapt(np.float32([[value, 2], [3, 4]]))
        return model

    assert fwt.diff(adapted(1.0), adapted(1.0)).equal
    assert not fwt.diff(adapted(1.0), adapted(5.0)).equal


class Numbers(torch.nn.Module):
    """Parameters of each dtype that is no float, a buffer that is not saved, and extra state."""

    DTYPES = ("int8", "uint8", "int64", "bool", "complex64", "complex128", "complex32")

    def __init__(self, **other):
        super().__init__()
        torch.manual_seed(0)
        self.dense, self.extra = torch.nn.Linear(2, 2), other.get("extra", 1)
        for name in self.DTYPES:
            value = torch.tensor([1, other.get(name, 1)]).to(getattr(torch, name))
            self.register_parameter(name, torch.nn.Parameter(value, requires_grad=False))
        self.register_buffer("unsaved", torch.tensor([other.get("unsaved", 1)]), persistent=False)

    def get_extra_state(self):
        return {"scale": torch.tensor([float(self.extra)]), "several": [self.extra, "a text"]}


@pytest.mark.parametrize("name", [*Numbers.DTYPES, "unsaved", "extra"])
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_no_number_of_a_torch_module_is_overlooked(name):
    assert fwt.diff(Numbers(), Numbers()).equal
    found = [c.path for c in fwt.diff(Numbers(), Numbers(**{name: 0})).changes]
    extra = ["beside/_extra_state.scale", "beside/_extra_state.several.0"]
    assert found == (extra if name == "extra" else [f"beside/{name}"])


def test_what_a_weight_is_computed_from_is_told():
    def made(how):
        torch.manual_seed(0)
        return how(torch.nn.Linear(3, 4))

    parametrizations = torch.nn.utils.parametrizations
    one, other = made(parametrizations.weight_norm), made(parametrizations.weight_norm)
    assert fwt.diff(one, other).equal
    with torch.no_grad():  # twice as long, and the same weight
        other.parametrizations.weight.original1.mul_(2)
    assert [c.path for c in fwt.diff(one, other).changes] == [
        "beside/parametrizations.weight.original1"
    ]
    tied = torch.nn.Sequential(torch.nn.Embedding(3, 3), torch.nn.Linear(3, 3, bias=False))
    tied[1].weight = torch.nn.Parameter(tied[0].weight.data)  # one memory
    assert fwt.diff(tied, tied).same == 1


def test_variables_of_keras_are_told_by_what_they_are_and_not_by_their_names():
    class Counts(keras.layers.Layer):
        def __init__(self, value, **settings):
            super().__init__(**settings)
            self.value = value

        def build(self, shape):
            for name in ("seeds", "seeds"):  # of one path
                self.add_weight(shape=(2,), dtype="int32", name=name, trainable=False,
                                initializer=lambda *_, **__: keras.ops.convert_to_tensor(
                                    [1, self.value], "int32"))  # fmt: skip
            self.truth = self.add_weight(shape=(), dtype="bool", name="t", initializer="ones")

        def call(self, x):
            return x

    def net(value, seed=0):
        layers = [Counts(value, name="c"), keras.layers.Dropout(0.5, seed=seed)]
        layers += [keras.layers.Dense(1, name="d", kernel_initializer="ones")]
        return keras.Sequential([keras.Input((2,)), *layers])

    found = fwt.diff(net(1), net(1, seed=5))
    assert found.equal
    assert found.same == 5
    assert [c.path for c in fwt.diff(net(1), net(2)).changes if c.count] == [
        r"beside/c\/seeds", r"beside/c\/seeds_1"
    ]  # fmt: skip


def test_masks_of_a_live_model_are_those_of_its_axes():
    grouped = torch.nn.Sequential(torch.nn.ConvTranspose2d(4, 6, 3, groups=2))
    kept = fwt.masks(0.5, scope="output")(grouped)
    inside = {}
    converters.transform(
        grouped, lambda tree: inside.update(m=fwt.masks(0.5, scope="output")(tree)) or tree
    )
    same(fwt.select(kept), fwt.select(inside["m"]))
    converters.transform(grouped, fwt.apply_masks(kept))
    assert int((grouped[0].weight == 0).sum()) == grouped[0].weight.numel() // 2
    same(fwt.select(fwt.masks_of(grouped)), fwt.select(kept))


KERAS = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="d")])
TORCH = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
BAD = [
    (TORCH, {"0/kernel": np.zeros((2, 3), np.float32)}, r"0/kernel expected shape \(3, 2\)"),
    (TORCH, {"0": {"kernel": np.zeros((3, 2))}}, "expected dtype float32, found float64"),
    (TORCH, {"0/kernle": np.zeros(2)}, "no leaf '0/kernle'; close: '0/kernel'"),
    (TORCH, {"params": {}, "states": {}}, "'states' is neither"),
    (KERAS, {"params": {}, "batch_stats": {}}, "the model has no batch_stats"),
    (TORCH, 3, "assign takes a tree, .* found int"),
    ({"a": np.ones(2)}, {"a": np.ones(2)}, r"assign takes .*call fwt.assign\(values\) on it"),
]


@pytest.mark.parametrize(("model", "tree", "match"), BAD)
def test_what_does_not_fit_changes_nothing(model, tree, match):
    before = [] if isinstance(model, dict) else fwt.select(converters.weights(model))
    with pytest.raises((fwt.FwtError, TypeError), match=match):
        converters.assign(model, tree)
    if before:
        same(fwt.select(converters.weights(model)), before)
    with pytest.raises(fwt.FwtError, match=r"weights takes .*the path of a file"):
        converters.weights([model])


# -- files --------------------------------------------------------------------------------------


def zero_first(tree):
    path = next(iter(fwt.select(tree, "**")))
    return fwt.assign({path: np.zeros_like(fwt.select(tree, path)[path])})(tree)


def keras_with_regularizer():
    net = keras.Sequential(
        [
            keras.Input((5,)),
            keras.layers.Dense(4, "relu", kernel_regularizer="l2", name="a"),
            keras.layers.BatchNormalization(name="n"),
            keras.layers.Dense(3, name="b", trainable=False),
        ]
    )
    net.compile("adam", "mse")
    return cases.randomise_keras(net)


def test_a_keras_file_is_edited(tmp_path):
    net = keras_with_regularizer()
    net.save(tmp_path / "net.keras")
    out = tmp_path / "new.keras"
    assert converters.transform(tmp_path / "net.keras", fwt.prune(0.5), out=out) == out
    again = keras.models.load_model(out)
    before, after = (json.loads(json.dumps(m.get_config())) for m in (net, again))
    assert before == after
    assert again.loss == "mse"
    converters.transform(net, fwt.prune(0.5))  # the same by hand
    x = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    np.testing.assert_array_equal(in_keras(again, x), in_keras(net, x))


def test_a_keras_file_whose_model_is_not_known_is_edited(tmp_path):
    @keras.saving.register_keras_serializable(package="tests")
    class Own(keras.layers.Layer):
        def build(self, shape):
            self.w = self.add_weight(shape=(shape[-1],), initializer="ones")

        def call(self, x):
            return x * self.w

    net = keras.Sequential([keras.Input((5,)), Own(), keras.layers.Dense(3, name="b")])
    net.save(tmp_path / "net.keras")
    halved = lambda tree: jax.tree.map(lambda x: x / 2, tree)  # noqa: E731 - one of a user's
    path = tmp_path / "net.keras"
    converters.transform(path, halved, out=path)
    with pytest.raises(fwt.ConversionError, match=r"dtype=: the model that its weights are of"):
        converters.transform(path, halved, out=tmp_path / "no.keras", dtype="float16")
    assert not (tmp_path / "no.keras").exists()
    x = np.ones((2, 5), np.float32)
    # Half the weights of two layers in a row; the biases are zero.
    found = in_keras(keras.models.load_model(path), x)
    np.testing.assert_allclose(found, in_keras(net, x) / 4, rtol=1e-6)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".npz", ".msgpack"])
def test_a_file_of_weights_is_edited(suffix, tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    path, out = tmp_path / f"net{suffix}", tmp_path / f"new{suffix}"
    if suffix == ".pt":
        torch.save({"state_dict": net.state_dict(), "epoch": 3}, path)
        converters.transform(path, fwt.prune(0.5), out=out, key="state_dict")
        again = torch.load(out, weights_only=True)
        assert list(again["state_dict"]) == list(net.state_dict())
        assert again["epoch"] == 3
        assert int((again["state_dict"]["0.weight"] == 0).sum()) == 6
        return
    converters.save(path, None, converters.weights(net))
    converters.transform(path, fwt.prune(0.5), out=out)
    found = fwt.diff(path, out)
    assert [c.path.rpartition("params/")[2] for c in found.changes] == ["0/kernel"]
    assert found.changes[0].count == 6


class Own:
    def __init__(self):
        self.text = "a class of a user"


def members(path):
    with zipfile.ZipFile(path) as archive:
        return {n: archive.read(n) for n in archive.namelist()}


def test_a_checkpoint_of_torch_keeps_all_else_to_the_byte(tmp_path):
    table = torch.nn.Embedding(5, 4)
    net = torch.nn.Sequential(table, torch.nn.Linear(4, 5, bias=False), torch.nn.LayerNorm(5))
    net[1].weight = table.weight
    adam = torch.optim.Adam(net.parameters())
    net(torch.arange(5)).sum().backward()
    adam.step()
    whole = {"net": {"ema": net.state_dict()}, "adam": adam.state_dict(), "own": Own(), "n": 3}
    path, out = tmp_path / "run.pt", tmp_path / "new.pt"
    torch.save(whole, path)
    norm = fwt.prune(0.5, where="2.weight")
    converters.transform(path, norm, out=out, key="net/ema")
    before, after = members(path), members(out)
    assert list(before) == list(after)
    assert len([n for n in before if before[n] != after[n]]) == 1
    again = torch.load(out, weights_only=False)
    assert again["own"].text == "a class of a user"
    new = again["net"]["ema"]
    assert new["0.weight"].data_ptr() == new["1.weight"].data_ptr()
    converters.transform(net, norm)  # the same by hand
    for name, value in net.state_dict().items():
        torch.testing.assert_close(new[name], value, rtol=0, atol=0)
    for a, b in zip(*(x["adam"]["state"].values() for x in (whole, again)), strict=True):
        assert torch.equal(a["exp_avg"], b["exp_avg"])
    assert torch.load(out, weights_only=False, mmap=True)["n"] == 3


def test_a_checkpoint_that_is_compressed(tmp_path):
    path, packed = tmp_path / "net.pt", tmp_path / "packed.pt"
    torch.save(torch.nn.Linear(4, 3).state_dict(), path)
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members(path).items():
            archive.writestr(name, data)
    for source in (path, packed):
        converters.transform(source, fwt.prune(0.5, where="weight"), out=source)
    assert fwt.diff(path, packed).equal
    assert int((converters.weights(packed)["params"]["weight"] == 0).sum()) == 6


def test_views_and_weights_that_hooks_compute(tmp_path):
    """Tensors that are parts of one storage, and a file whose weights are computed from others."""
    path, out = tmp_path / "net.pt", tmp_path / "new.pt"
    both = torch.arange(24.0).reshape(6, 4)
    torch.save({"a.weight": both[:3].T, "b.weight": both[3:], "c.bias": torch.ones(2)}, path)
    double = lambda tree: jax.tree.map(lambda x: 2 * x, tree)  # noqa: E731 - one of a user's
    converters.transform(path, double, out=out)
    new = torch.load(out, weights_only=True)
    assert torch.equal(new["a.weight"], 2 * both[:3].T)
    assert torch.equal(new["b.weight"], 2 * both[3:])
    torch.save({"a.weight": both[:3], "b.weight": both[1:]}, path)
    with (
        pytest.warns(UserWarning, match="another view"),
        pytest.raises(fwt.ConversionError, match=r"a.weight is a view of memory.*clone\(\)"),
    ):
        converters.transform(path, fwt.prune(1.0, where="b.weight"), out=out)
    layer = torch.nn.Linear(4, 3)
    torch.nn.utils.prune.random_unstructured(layer, "weight", 0.5)
    torch.save(layer.state_dict(), path)
    converters.transform(path, double, out=out)  # written anew, with the weight that it computes
    new = torch.load(out, weights_only=True)
    assert sorted(new) == ["bias", "weight"]
    torch.testing.assert_close(new["weight"], 2 * layer.weight.detach())


def test_what_is_wrong_writes_no_file(tmp_path):
    path, out = tmp_path / "net.npz", tmp_path / "new.npz"
    converters.save(path, None, {"params": {"d": {"kernel": np.ones((2, 3), np.float32)}}})
    before = path.read_bytes()
    with pytest.raises(TypeError, match=r"is a file: out= says where"):
        converters.transform(path, fwt.prune(0.5))
    with pytest.raises(TypeError, match=r"out= is for files"):
        converters.transform(TORCH, fwt.prune(0.5), out="x")
    with pytest.raises(fwt.FwtError, match="takes a transform"):
        converters.transform(path, fwt.constraints.max_norm(1.0), out=out)
    with pytest.raises(fwt.WhereError, match="matches none"):
        converters.transform(path, fwt.prune(0.5, where="e/*"), out=out)
    with pytest.raises(fwt.LeafError, match="called with the Model that the file holds"):
        converters.transform(path, lambda model: dict(model.variables), out=out)
    with pytest.raises(fwt.FileFormatError, match="no such file"):
        converters.transform(tmp_path / "no.npz", fwt.prune(0.5), out=out)
    assert not out.exists()
    assert path.read_bytes() == before
    converters.transform(path, fwt.prune(0.5), out=path)  # over itself
    assert int((converters.weights(path)["params"]["d"]["kernel"] == 0).sum()) == 3
