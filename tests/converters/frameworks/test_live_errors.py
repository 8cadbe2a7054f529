"""What converters.transform says of what it can't do; nothing is passed over in silence."""

import dataclasses

import keras
import numpy as np
import optax
import pytest
import torch

import fwt
from fwt import constraints, converters, initializers
from fwt.converters.frameworks import live

L = keras.layers


@pytest.fixture
def net():
    keras.utils.clear_session(free_memory=False)  # or it looks for circles, a second each time
    return keras.Sequential(
        [keras.Input((8,)), L.Dense(5, name="a"), L.BatchNormalization(name="bn")]
    )


@pytest.mark.parametrize(
    ("t", "said"),
    [
        (lambda tree: {**tree, "a/kernel": np.zeros((8, 5), np.float32)}, "'a/kernel' beside it"),
        (lambda tree: {**tree, "a": {"kernel": np.zeros((8, 5), np.float32)}}, "'a' beside it"),
        (lambda tree: {**tree, "nonsense": 5}, "change what is inside of tree\\['params'\\]"),
        (lambda tree: print(end=""), "gave nothing: return the tree"),
        (lambda tree: fwt.prune(0.5), "gave a function, .*: call it on the tree"),
        (fwt.masks(0.8), "apply_masks"),
        (fwt.masks_of, "apply_masks"),
        (constraints.max_norm(1.0), r"fwt.project\(fwt.constraints.max_norm\(...\)\) is one"),
        (constraints.max_norm, "fwt.project"),
        (initializers.he_normal, r"fwt.initialize\(fwt.initializers.he_normal, key=0\) is one"),
        (initializers.zeros, "fwt.initialize"),
        (fwt.assign({"bn/moving_mean": np.zeros(5, np.float32)}), "'bn/mean' is a running stat"),
        (fwt.prune(0.5, where="bn/moving_mean"), "'bn/mean' is a running statistic"),
        (fwt.prune(0.5, where="bn/mean"), "'bn/mean' is a running statistic"),
        (fwt.prune(0.5, where=L.Dense), "found the class Dense: list them"),
    ],
)
def test_each_wrong_answer_of_a_transform_is_named(net, t, said):
    before = net.get_weights()
    with pytest.raises(fwt.FwtError, match=said):
        converters.transform(net, t)
    for old, new in zip(before, net.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_layer_or_a_weight_as_where_is_told_its_path(net):
    layer = net.get_layer("a")
    for given, path in ((layer, layer.path + "/**"), (layer.kernel, layer.kernel.path)):
        with pytest.raises(fwt.WhereError, match="where takes paths") as told:
            converters.transform(net, fwt.prune(0.5, where=given))
        assert f"where={path!r}" in str(told.value)
        converters.transform(net, fwt.prune(1.0, where=path))  # the way out
    assert not net.get_layer("a").kernel.numpy().any()
    linear = torch.nn.Linear(3, 2)
    for given in (linear, linear.weight):
        with pytest.raises(fwt.WhereError, match="such as where='0/kernel'"):
            converters.transform(torch.nn.Sequential(linear), fwt.prune(0.5, where=given))


@pytest.mark.parametrize("part", ["params", "all"])
def test_assign_takes_params_as_they_are(net, part):
    pruned = fwt.prune(0.5)(converters.from_keras(net))
    given = {"params": pruned.variables["params"], "all": fwt.select(pruned, "**")}[part]
    converters.transform(net, fwt.assign(given))
    np.testing.assert_array_equal(
        net.get_layer("a").kernel, pruned.variables["params"]["a"]["kernel"]
    )
    for whole in (pruned, pruned.variables):
        with pytest.raises(fwt.LeafError, match="'batch_stats' is beside them"):
            fwt.assign(whole)
    same = fwt.assign({"params": pruned.variables["params"]})(pruned)
    assert same.variables["batch_stats"].keys() == {"bn"}


def test_what_stands_in_a_slot_of_keras_says_where_it_goes(net):
    def fits(**settings):
        model = keras.Sequential([keras.Input((8,)), L.Dense(3, **settings)])
        model.compile("sgd", "mse")
        model.fit(np.ones((2, 8)), np.ones((2, 3)), verbose=0)

    with pytest.raises(TypeError, match=r"converters.transform\(model, fwt.project"):
        fits(kernel_constraint=constraints.max_norm(1.0))
    with pytest.raises(TypeError, match=r"converters.transform\(model, fwt.initialize"):
        fits(kernel_initializer=initializers.he_normal())
    bound = fwt.project(constraints.max_norm(1.0))
    for adam in (keras.optimizers.Adam(), torch.optim.Adam(torch.nn.Linear(2, 2).parameters())):
        with pytest.raises(TypeError, match=r"after each step, .*; found Adam of"):
            fwt.optim.constrain(adam, bound)
        with pytest.raises(TypeError, match=r"after each step, .*; found Adam of"):
            fwt.optim.sparsify(adam, 0.8)
    with pytest.raises(TypeError, match=r"such as optax\.adam"):
        fwt.optim.sparsify("adam", 0.8)
    fwt.optim.sparsify(optax.adam(1e-3), 0.8)
    with pytest.raises(fwt.FwtError, match=r"transform\(model, fwt.prune\(0.5\)\) takes the model"):
        fwt.prune(net, 0.5)


def test_in_a_compiled_step_of_training_it_says_so():
    class Net(keras.Model):
        def train_step(self, *given):
            told = super().train_step(*given)
            converters.transform(self, fwt.prune(0.5))
            return told

    x = keras.Input((8,))
    net = Net(x, L.Dense(3, name="d")(x))
    net.compile("sgd", "mse")
    with pytest.raises(converters.ConversionError, match="call it in a callback"):
        net.fit(np.ones((2, 8)), np.ones((2, 3)), verbose=0)


def test_what_was_made_for_inference_is_left_whole():
    with torch.inference_mode():
        net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(converters.ConversionError, match=r"under torch\.inference_mode"):
        converters.transform(net, fwt.prune(0.5))
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    with torch.inference_mode():
        converters.transform(net, fwt.prune(0.5))
    assert [int((x.weight == 0).sum()) for x in net] == [32, 32]


def test_a_write_that_changes_and_then_fails_is_undone(monkeypatch):
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    before = {k: v.clone() for k, v in net.state_dict().items()}

    backend = live._backend(net)
    found = backend.leaves

    def leaves(model):
        out = found(model)
        last = next(x for x in out if x.path == "1/kernel")

        def write(value, write=last.write):
            write(value)
            raise RuntimeError("too late")

        return [dataclasses.replace(x, write=write) if x is last else x for x in out]

    monkeypatch.setattr(backend, "leaves", leaves)
    with pytest.raises(converters.ConversionError, match="1/kernel can't be written"):
        converters.transform(net, fwt.prune(0.5))
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_globs_that_match_nothing_are_told_a_glob_of_all_depths():
    def kernel():
        return {"kernel": np.ones((3, 2), np.float32)}

    tree = {"conv1": kernel(), "block": {"conv2": kernel(), "deep": {"conv3": kernel()}}}
    for glob in ("*conv*", "**conv**", "**/*conv*"):
        with pytest.raises(fwt.WhereError, match=r"'\*\*/\*conv\*/\*\*' .*at any depth"):
            fwt.prune(0.5, where=glob)(tree)
    assert len(fwt.select(tree, "**/*conv*/**")) == 3


def test_a_star_stays_within_one_part_of_a_files_names_too(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Sequential(torch.nn.Linear(4, 4)))
    torch.save({**net.state_dict(), "head.weight": torch.ones(3, 4)}, tmp_path / "net.pt")
    weights = converters.load(tmp_path / "net.pt")
    with pytest.raises(fwt.WhereError, match=r"does not name 1.0.weight.*'\*\*.weight' does"):
        fwt.prune(0.5, where="*.weight", axes={"**/weight": "out in"})(weights)
    assert len(fwt.select(weights, "**.weight")) == 3


def test_masks_come_back_from_a_file_of_paths(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 4))
    model = converters.from_torch(net, input_shape=(6,))
    masks = fwt.masks(0.5)(model)
    converters.save(tmp_path / "masks.safetensors", None, fwt.select(masks, "**"))
    found = fwt.apply_masks(converters.load(tmp_path / "masks.safetensors"))(model)
    want = fwt.prune(0.5)(model)
    for path, value in fwt.select(want, "**").items():
        np.testing.assert_array_equal(fwt.select(found, "**")[path], value)


def test_the_lengths_of_a_weight_norm_are_no_kernels(tmp_path):
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(8, 4))
    for layer in net:
        torch.nn.utils.parametrizations.weight_norm(layer)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    parts = converters.load(tmp_path / "net.pt", fold=False)
    kernels = fwt.select(parts, fwt.kernels)
    assert [p.rpartition("/")[2] for p in kernels] == ["original1", "original1"]
    assert all((np.asarray(v) != 0).all() for p, v in fwt.select(
        fwt.prune(0.5)(parts), "**/original0").items())  # fmt: skip


def test_a_score_that_runs_the_model_is_told_of_another_order():
    """Behind a Flatten a live torch model counts its inputs with the channels first, and the Flax
    model that the score runs with the channels last."""
    x = np.random.default_rng(0).normal(size=(6, 5, 4, 2)).astype(np.float32)
    ends = torch.nn.Flatten(), torch.nn.Linear(24, 3)
    net = torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3), *ends).eval()
    model = converters.from_torch(net, (2, 5, 4))
    for score in (fwt.scores.wanda(model, x), fwt.scores.synflow(model)):
        with pytest.raises(fwt.LeafError, match=r"channels last.*load_state_dict"):
            converters.transform(net, fwt.prune(0.5, score))
        new = fwt.prune(0.5, score)(model)
        net.load_state_dict(converters.to_torch(new).state_dict())
        found = net(torch.tensor(x).movedim(-1, 1)).detach().numpy()
        np.testing.assert_allclose(found, new(x), atol=1e-5)
    pooled = torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
        torch.nn.Linear(4, 3),
    )  # fmt: skip
    model = converters.from_torch(pooled.eval(), (2, 5, 4))
    wanted = fwt.prune(0.5, fwt.scores.wanda(model, x))(model)
    converters.transform(pooled, fwt.prune(0.5, fwt.scores.wanda(model, x)))
    np.testing.assert_array_equal(
        pooled[3].weight.detach().numpy().T, fwt.select(wanted)["3/kernel"]
    )
