"""The command line on every format, in one process."""

import io
import json
import re
import sys
import warnings

import flax.linen as nn
import jax
import keras
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from command import cli, fwt_command
from file_cases import image_net, random_model
from flax import serialization

import fwt
from fwt import _diff, _terminal, converters
from fwt.converters import io as _io


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    model = random_model(image_net())
    for name in (
        "net.keras",
        "net.h5",
        "net.safetensors",
        "net.npz",
        "net.orbax",
        "w.weights.h5",
        "w.pt",
        "w.msgpack",
    ):
        converters.save(folder / name, *model)
    converters.save(folder / "shards.safetensors", *model, shard_bytes=300)
    converters.save(folder / "pieces.weights.h5", *model, shard_bytes=300)
    return folder


def names(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        ("prune", "--sparsity", 0.5),
        ("project", "--constraint", "unit_norm"),
        ("initialize", "--initializer", "ones"),
    ],
)
def test_changed_weights_are_written_in_shards(there, tmp_path, words):
    """With the arrays that one file gets, as safetensors and Keras read them."""
    verb, *how = words
    for name in ("net.safetensors", "shards.safetensors"):
        whole, folder = tmp_path / f"whole_{name}", tmp_path / f"{name[0]}.safetensors"
        assert fwt_command(verb, there / name, whole, *how)[0] == 0
        assert fwt_command(verb, there / name, folder, *how, "--shard-bytes", 300)[0] == 0
        held = {}
        for shard in folder.glob("model-*.safetensors"):
            held |= safetensors.numpy.load_file(shard)
        assert len(list(folder.iterdir())) > 3
        expected = {}
        for one in whole.glob("model-*.safetensors") if whole.is_dir() else [whole]:
            expected |= safetensors.numpy.load_file(one)
        assert whole.is_dir() == (there / name).is_dir()
        assert set(held) == set(expected)
        assert all(np.array_equal(held[n], v) for n, v in expected.items())
    assert fwt_command(verb, there / "net.keras", tmp_path / "k.keras", *how)[0] == 0
    split = tmp_path / "w.weights.h5"
    assert fwt_command(verb, there / "net.keras", split, *how, "--shard-bytes", 300)[0] == 0
    expected = keras.saving.load_model(tmp_path / "k.keras")
    found = keras.models.clone_model(expected)
    found.load_weights(split / "model.weights.json")
    for mine, theirs in zip(found.get_weights(), expected.get_weights(), strict=True):
        assert np.array_equal(mine, theirs)
    with pytest.raises(fwt.ConversionError, match="have shards"):
        fwt_command(verb, there / "net.keras", tmp_path / "no.npz", *how, "--shard-bytes", 300)


def test_inspect_and_diff_read_every_format(there):
    for name in names(there):
        code, said = fwt_command("inspect", there / name)
        assert code == 0
        assert said.startswith(f"{there / name}: ")
        told = json.loads(fwt_command("inspect", there / name, "--json")[1])
        assert told["weights"] == sum(leaf["size"] for leaf in told["leaves"])
        assert (told["module"] is None) == name.startswith(("w.", "pieces"))
        more = ("-a", there / "net.keras")
        code, said = fwt_command("diff", there / name, there / "net.orbax", *more)
        assert (code, said) == (0, "equal: 8 arrays, bit for bit\n")
        told = json.loads(fwt_command("diff", there / name, there / "net.npz", *more, "--json")[1])
        assert told == {"equal": True, "same": 8, "changes": [], "layers": []}


def test_convert_from_each_format_to_each(there, tmp_path):
    for number, name in enumerate(names(there)):
        more = ("-a", there / "net.h5") if name.startswith(("w.", "pieces")) else ()
        targets = [
            "out.keras",
            "out.h5",
            "out.safetensors",
            "out.npz",
            "out.orbax",
            "out.weights.h5",
            "out.pt",
            "out.msgpack",
        ]
        for suffix in targets if number == 0 else targets[number % 8 :][:1]:
            code, said = fwt_command("convert", there / name, tmp_path / suffix, *more)
            assert code == 0
            assert said.startswith(str(tmp_path / suffix))
            bare = ("-a", there / "net.keras")
            assert fwt_command("diff", tmp_path / suffix, there / "net.keras", *bare)[0] == 0
    code, _ = fwt_command(
        "convert", there / "net.keras", tmp_path / "s.safetensors", "--shard-bytes", 200
    )
    assert code == 0
    assert (tmp_path / "s.safetensors").is_dir()


def trained_net():
    """Layers that fwt keeps as others of Keras, and settings that it does not know at all."""
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((9, 7, 3), name="picture"),
            layers.SeparableConv2D(4, 3, bias_regularizer="l2", pointwise_constraint="non_neg"),
            layers.BatchNormalization(trainable=False, beta_regularizer="l1"),
            layers.Dropout(0.3, seed=5),
            layers.LeakyReLU(0.2, trainable=False),
            layers.GlobalAveragePooling2D(),
            layers.Dense(3, kernel_initializer=keras.initializers.HeNormal(seed=3), name="d"),
        ],
        name="of_mine",
    )  # fmt: skip


def nested_net():
    """A Functional model, and one in it whose layers are not all trained."""
    x = first = keras.Input((6,), name="inside")
    for index, trained in enumerate((True, False, True)):
        x = keras.layers.Dense(4, name=f"d{index}", trainable=trained)(x)
    inner = keras.Model(first, keras.layers.BatchNormalization(name="norm")(x), name="inner")
    first = keras.Input((6,), name="outside")
    x = keras.layers.Dense(2, activity_regularizer="l2", name="last")(inner(first))
    return keras.Model(first, x, name="outer")


def series_net():
    layers = keras.layers
    x = first = keras.Input((5, 6))
    x = layers.MultiHeadAttention(2, 3, kernel_constraint="max_norm")(x, x)
    lstm = layers.LSTM(4, recurrent_regularizer="l2", dropout=0.2, seed=4, return_sequences=True)
    x = layers.TimeDistributed(layers.Dense(3, kernel_regularizer="l2"))(
        layers.Bidirectional(lstm)(x)
    )
    return keras.Model(first, layers.GRU(3, kernel_constraint="non_neg")(x), name="series")


VERBS = {
    "convert": (),
    "prune": ("--sparsity", 0.5),
    "initialize": ("--initializer", "keras.he_normal"),
    "project": ("--constraint", "unit_norm"),
}


def as_lists(config):
    return json.loads(json.dumps(config))


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.parametrize("make", [trained_net, nested_net, series_net])
def test_nothing_is_lost_between_two_files_of_keras(tmp_path, make, suffix):
    net = make()
    loss, metrics = keras.losses.Huber(2.0), [keras.metrics.MeanAbsoluteError(name="off")]
    net.compile(keras.optimizers.Adam(3e-4, weight_decay=0.01), loss, metrics=metrics)
    net.save(tmp_path / f"net{suffix}")
    before = keras.saving.load_model(tmp_path / f"net{suffix}")
    x = np.random.default_rng(0).normal(size=(2, *net.input_shape[1:])).astype(np.float32)
    for verb, more in VERBS.items() if make is trained_net else [("convert", ())]:
        out = tmp_path / f"{verb}{suffix}"
        code, said = fwt_command(verb, tmp_path / f"net{suffix}", out, *more)
        assert code == 0, said
        after = keras.saving.load_model(out)
        assert type(after) is type(before)
        assert as_lists(after.get_config()) == as_lists(before.get_config())
        assert as_lists(after.get_compile_config()) == as_lists(before.get_compile_config())
        own, theirs = ([v.path for v in m.trainable_variables] for m in (after, before))
        assert own == theirs
        if verb == "convert":
            for own, theirs in zip(after.get_weights(), before.get_weights(), strict=True):
                np.testing.assert_array_equal(own, theirs)
            np.testing.assert_array_equal(after(x), before(x))


def test_what_keras_says_goes_through_other_formats(tmp_path):
    """Into an .h5 file too, in which Keras itself can't read the short name of a loss."""
    net = nested_net()
    net.compile("sgd", "mse", metrics=["mae"])
    net.save(tmp_path / "net.keras")
    for first, second in (("net.keras", "a.safetensors"), ("a.safetensors", "b.h5"),
                          ("b.h5", "c.npz"), ("c.npz", "d.keras")):  # fmt: skip
        assert fwt_command("convert", tmp_path / first, tmp_path / second)[0] == 0
    # Weights alone come back into what their architecture's file says.
    assert fwt_command("convert", tmp_path / "net.keras", tmp_path / "w.pt")[0] == 0
    own = ("-a", tmp_path / "net.keras")
    assert fwt_command("convert", tmp_path / "w.pt", tmp_path / "e.keras", *own)[0] == 0
    for name in ("b.h5", "d.keras", "e.keras"):
        after = keras.saving.load_model(tmp_path / name)
        assert as_lists(after.get_config())["name"] == "outer"
        assert keras.losses.get(after.loss) is keras.losses.mean_squared_error
        assert [len(x.trainable_weights) for x in after.layers] == [0, 6, 2]
        np.testing.assert_array_equal(after(np.ones((2, 6))), net(np.ones((2, 6))))


def test_steps_of_an_optimizer_are_said_to_be_left_out(tmp_path):
    net = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    net.compile("adam", "mean_squared_error", jit_compile=False)
    for steps, suffix in ((0, ".keras"), (2, ".keras"), (2, ".h5")):
        if steps:
            net.fit(np.ones((2, 3)), np.ones((2, 2)), batch_size=1, verbose=0)
        steps = int(net.optimizer.iterations)
        net.save(tmp_path / f"net{suffix}")
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            assert fwt_command("convert", tmp_path / f"net{suffix}", tmp_path / "out.keras")[0] == 0
        said = [str(w.message) for w in found if "the optimizer" in str(w.message)]
        assert len(said) == bool(steps)
        assert not steps or f"(after {steps} steps) is not written" in said[0]


def test_a_model_with_other_layers_is_written_as_it_is(tmp_path):
    """Under the name, and with what it was compiled with."""
    net = trained_net()
    net.compile("sgd", "mean_squared_error")
    net.save(tmp_path / "net.keras")
    module, variables = converters.load(tmp_path / "net.keras", sidecar=True)
    kept = [(n.name, n.layer) for n in module.layers if not n.name.startswith("leaky")]
    other = fwt.Sequential(kept, module.input_shape, module.sidecar)
    converters.save(tmp_path / "out.keras", other, variables)
    after = keras.saving.load_model(tmp_path / "out.keras")
    assert (after.name, after.loss) == ("of_mine", "mean_squared_error")
    assert len(after.layers) == len(net.layers) - 1
    x = np.random.default_rng(0).normal(size=(2, 9, 7, 3)).astype(np.float32)
    np.testing.assert_allclose(after(x), other.apply(variables, x), rtol=1e-5, atol=1e-6)


def test_what_a_sidecar_says_of_the_whole_is_checked(tmp_path):
    """A config of other layers is not written, and what is no config is refused."""
    trained_net().save(tmp_path / "net.keras")
    module, variables = converters.load(tmp_path / "net.keras", sidecar=True)
    told = json.loads(module.sidecar)
    told["whole"]["config"]["config"]["layers"][1]["config"]["strides"] = [2, 2]
    lies = module.clone(sidecar=json.dumps(told))
    converters.save(tmp_path / "out.keras", lies, variables)
    x = np.random.default_rng(0).normal(size=(2, 9, 7, 3)).astype(np.float32)
    after = keras.saving.load_model(tmp_path / "out.keras")
    np.testing.assert_allclose(after(x), module.apply(variables, x), rtol=1e-5, atol=1e-6)
    nameless = {"config": {"config": {"name": 1}}}
    for whole in (3, {"config": 3}, nameless, {**told["whole"], "steps": "many"}):
        wrong = module.clone(sidecar=json.dumps({**told, "whole": whole}))
        with pytest.raises(converters.ConversionError, match="sidecar"):
            converters.save(tmp_path / "out.keras", wrong, variables)


def test_spectral_norms_of_keras_are_written_as_what_they_compute(tmp_path):
    """Whose vector is for training only, and was not read."""
    norm = keras.layers.SpectralNormalization(keras.layers.Dense(3))
    net = keras.Sequential([keras.Input((4,)), norm], name="normed")
    net.save(tmp_path / "net.keras")
    assert fwt_command("convert", tmp_path / "net.keras", tmp_path / "out.keras")[0] == 0
    after = keras.saving.load_model(tmp_path / "out.keras")
    np.testing.assert_array_equal(after(np.ones((2, 4))), net(np.ones((2, 4))))
    assert after.name == "normed"


def test_files_of_torch_and_safetensors_keep_what_they_say(tmp_path):
    net = torch.nn.Sequential()
    net.add_module("z", torch.nn.Linear(3, 3))
    net.add_module("a", torch.nn.BatchNorm1d(3))
    net.add_module("b", torch.nn.Linear(3, 3))
    net.b.weight = net.z.weight
    torch.save(net.state_dict(), tmp_path / "net.pt")
    tensors = {n: v.clone() for n, v in net.state_dict().items()}
    safetensors.torch.save_file(tensors, tmp_path / "net.safetensors", {"format": "pt", "by": "me"})
    for verb, more in VERBS.items():
        axes = ("--where", "[zb]/weight", "--axes", "[zb]/weight=out in") if more else ()
        out = tmp_path / f"{verb}.pt"
        assert fwt_command(verb, tmp_path / "net.pt", out, *more, *axes)[0] == 0
        state = torch.load(out)
        assert list(state) == list(net.state_dict())
        assert state._metadata == net.state_dict()._metadata
        assert state["z.weight"].data_ptr() == state["b.weight"].data_ptr()
        out = tmp_path / f"{verb}.safetensors"
        assert fwt_command(verb, tmp_path / "net.safetensors", out, *more, *axes)[0] == 0
        with safetensors.safe_open(out, "np") as file:
            assert file.metadata() == {"format": "pt", "by": "me"}
            assert set(file.keys()) == set(tensors)


def test_what_differs_is_told(there, tmp_path):
    module, variables = converters.load(there / "net.keras")
    variables["params"]["conv"]["kernel"][0, 0, 0, :2] += 0.5
    variables["params"]["norm"]["bias"] = variables["params"]["norm"]["bias"].astype(np.float64)
    layers = dict(module.layers[i].__dict__.values() for i in range(len(module.layers)))
    layers["drop"] = fwt.layers.Identity()
    variables["params"].pop("dense_10")
    layers.pop("dense_10")
    other = fwt.Sequential(list(layers.items()), module.input_shape)
    converters.save(tmp_path / "b.safetensors", other, variables)
    code, said = fwt_command("diff", there / "net.keras", tmp_path / "b.safetensors")
    assert code == 3
    for text in (
        "params/conv/kernel",
        "other values",
        "2",
        "0.5",
        "float32[4] and float64[4]",
        "only in the first: float32[5, 3]",
        "drop: Dropout(rate=0.25) and Identity()",
        "4 arrays are equal, 4 differ",
    ):
        assert text in said
    code, said = fwt_command("diff", there / "w.pt", there / "net.keras")
    assert code == 3
    assert "only in the second" in said
    dense = {
        "params": {"d": {"kernel": np.ones((3, 2), np.float32), "bias": np.ones(2, np.float32)}}
    }
    for name, shape in (("one", (3,)), ("other", (7, 3))):
        net = fwt.Sequential([("d", nn.Dense(2))], shape)
        converters.save(tmp_path / f"{name}.safetensors", net, dense)
    code, said = fwt_command("diff", tmp_path / "one.safetensors", tmp_path / "other.safetensors")
    assert (code, "input_shape (3,) and (7, 3)" in said) == (3, True)
    empty = {"params": {"a": np.zeros((0, 3)), "b": np.array([np.nan])}}
    converters.save(tmp_path / "e.npz", None, empty)
    assert fwt_command("diff", tmp_path / "e.npz", tmp_path / "e.npz")[0] == 0
    empty["params"]["b"] = np.array([1.0])
    converters.save(tmp_path / "f.npz", None, empty)
    told = json.loads(fwt_command("diff", tmp_path / "e.npz", tmp_path / "f.npz", "--json")[1])
    assert told["changes"] == [
        {"path": "params/b", "what": "other values", "count": 1, "largest": None}
    ]
    nan = {"params": {"a": np.array([np.nan, 1], np.float32)}}
    converters.save(tmp_path / "n.npz", None, nan)
    converters.save(tmp_path / "n.msgpack", None, nan)
    assert fwt_command("diff", tmp_path / "n.npz", tmp_path / "n.msgpack")[0] == 0


@pytest.mark.parametrize(
    ("dtype", "a", "b", "largest"),
    [
        (np.int64, [2**63 - 1, 0], [-(2**63), 0], 2**64 - 1),
        (np.int64, [2**63 - 1], [2**63 - 2], 1),
        (np.uint64, [2**64 - 1, 3], [0, 4], 2**64 - 1),
        (np.uint64, [2**64 - 1], [2**64 - 2], 1),
        (np.int8, [-128, 5], [127, 6], 255),
        (np.bool_, [True], [False], 1.0),
        (np.float16, [6e4], [-6e4], 120000.0),
        (np.float32, [1.0, np.nan], [2.5, 1.0], 1.5),
    ],
)
def test_the_largest_gap_is_exact(dtype, a, b, largest):
    one, other = (fwt.Model(None, {"params": {"w": np.array(x, dtype)}}) for x in (a, b))
    (change,) = _diff.diff(one, other).changes
    assert change.largest == largest
    assert not isinstance(change.largest, np.generic)


def test_one_seed_serves_both_commands(there, tmp_path):
    """By default both have the seed 0."""
    start = ("initialize", there / "net.keras", tmp_path / "a.npz")
    assert fwt_command(*start, "--initializer", "normal(1.0)")[0] == 0
    options = ("--sparsity", "0.5", "--score", "random")
    assert fwt_command("prune", tmp_path / "a.npz", tmp_path / "b.npz", *options)[0] == 0
    kept = fwt.select(converters.load(tmp_path / "b.npz"), fwt.kernels).values()
    kept = np.concatenate([x[x != 0] for x in kept])
    assert abs((kept > 0).mean() - 0.5) < 4 * 0.5 / len(kept) ** 0.5


def test_options_of_reading(there, tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(3, 2))
    torch.nn.utils.parametrizations.weight_norm(net[0])
    torch.save({"model": net.state_dict()}, tmp_path / "c.pt")
    told = json.loads(fwt_command("inspect", tmp_path / "c.pt", "--key", "model", "--json")[1])
    assert [leaf["path"] for leaf in told["leaves"]] == ["0/bias", "0/weight"]
    told = json.loads(
        fwt_command("inspect", tmp_path / "c.pt", "--key", "model", "--keep-parts", "--json")[1]
    )
    assert len(told["leaves"]) == 3
    dense = fwt.Sequential([("d", fwt.layers.Flatten()), ("e", nn.Dense(2))], (3,))
    converters.save(tmp_path / "net.keras", dense, dense.init(jax.random.key(0), np.ones((1, 3))))
    for how in (("--rename", "0=e"), ("--match", "order")):
        code, _ = fwt_command(
            "convert",
            tmp_path / "c.pt",
            tmp_path / "o.keras",
            "--key",
            "model",
            "-a",
            tmp_path / "net.keras",
            *how,
        )
        assert code == 0
        kernel = converters.load(tmp_path / "o.keras").variables["params"]["e"]["kernel"]
        np.testing.assert_allclose(kernel, net[0].weight.detach().T, rtol=1e-6)
    assert fwt_command("inspect", tmp_path / "c.pt", "--rename", "x")[0] == 2
    assert fwt_command("inspect", tmp_path / "c.pt", "--match", "x")[0] == 2
    np.savez_compressed(tmp_path / "z.npz", a=np.zeros(10**6))
    with pytest.raises(converters.FileFormatError, match="max_bytes=1,000 "):
        fwt_command("inspect", tmp_path / "z.npz", "--max-bytes", "1000")


def test_weights_of_keras_are_not_converted_blindly(there, tmp_path):
    for name in ("w.weights.h5", "pieces.weights.h5"):
        with pytest.raises(fwt.FwtError, match=r"--architecture net\.keras"):
            fwt_command("convert", there / name, tmp_path / "x.pt")
    assert not (tmp_path / "x.pt").exists()
    (tmp_path / "m.msgpack").write_bytes(serialization.to_bytes({"params": {"a": np.ones(2)}}))
    assert fwt_command("convert", tmp_path / "m.msgpack", tmp_path / "m.npz")[0] == 0


def test_a_bar_is_shown_past_a_second_on_a_terminal_only(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    now = [0.0]
    monkeypatch.setattr(_terminal.time, "monotonic", lambda: now[0])
    for kind, seconds, shown in (
        (Terminal, 3, True),
        (Terminal, 0.5, False),
        (io.StringIO, 3, False),
    ):
        monkeypatch.setattr(sys, "stderr", kind())
        with _terminal.progress("reading net.keras", 4_000_000):
            for _ in range(4):
                now[0] += seconds / 4
                _io.progress(1_000_000)
        said = sys.stderr.getvalue()
        assert ("reading net.keras" in said) == shown
        if shown:
            assert "MB" in said


COMMANDS = ("inspect", "convert", "verify", "diff", "prune", "initialize", "project")


def test_every_command_that_reads_takes_the_options_of_reading(tmp_path):
    """And uses them: the weights of a checkpoint become those of an architecture."""
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    held = {f"module.{n}": v for n, v in net.state_dict().items()} | {"extra": torch.ones(2)}
    torch.save({"model": held}, tmp_path / "c.pt")
    model = converters.from_torch(net, (4,))
    converters.save(tmp_path / "net.keras", *model)
    how = ["-a", tmp_path / "net.keras", "--key", "model", "--rename", "module.=", "--json"]
    for command in COMMANDS:
        words = [tmp_path / "c.pt"]
        if command in ("verify", "diff"):
            words += [tmp_path / "net.keras"]
        elif command != "inspect":
            words += [tmp_path / f"{command}.npz"]
        words += VERBS.get(command, ())
        assert fwt_command(command, *words, *how, "--drop", "extra")[0] == 0, command
        found = fwt_command(command, *words, *how, "--no-strict", "--max-bytes", 10**6)
        assert found[0] == 0, command
        told = json.loads(found[1])
        assert told.get("module", True), command
        with pytest.raises(converters.FileFormatError, match="unexpected: extra"):
            fwt_command(command, *words, *how)
    converters.save(tmp_path / "w.pt", *model)
    # One has such a part, and the other is compared as it is.
    code, said = fwt_command("diff", tmp_path / "c.pt", tmp_path / "w.pt", "--key", "model")
    assert (code, "module/0/weight" in said) == (3, True)
    with pytest.raises(converters.FileFormatError, match=r"c\.pt: .* there is no 'x'"):
        fwt_command("diff", tmp_path / "c.pt", tmp_path / "w.pt", "--key", "x")


def test_names_of_weights_alone_on_every_command(tmp_path):
    """An option that only one of two files has a use for is for that one."""
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    state = net.state_dict()
    held = {f"module.{n}": v for n, v in state.items()}
    torch.save({"state_dict": held, "epoch": 3}, tmp_path / "c.pt")
    torch.save(state, tmp_path / "w.pt")
    how = ("--key", "state_dict", "--rename", "module.=", "--drop", "*.num_batches_tracked")
    for first, second in (("c.pt", "w.pt"), ("w.pt", "c.pt")):
        code, said = fwt_command("diff", tmp_path / first, tmp_path / second, *how)
        assert (code, said) == (0, "equal: 6 arrays, bit for bit\n")
    with pytest.raises(converters.FileFormatError, match=r"c\.pt: rename: no name starts with 'x'"):
        fwt_command("diff", tmp_path / "c.pt", tmp_path / "w.pt", *how, "--rename", "x=")
    told = json.loads(fwt_command("inspect", tmp_path / "c.pt", *how, "--json")[1])
    assert [leaf["path"] for leaf in told["leaves"]][:2] == ["0/bias", "0/weight"]
    out = tmp_path / "out.safetensors"
    assert fwt_command("convert", tmp_path / "c.pt", out, *how)[0] == 0
    assert set(safetensors.numpy.load_file(out)) == {n for n in state if "num_" not in n}
    # The default where by its name, and a name as torch spells it.
    more = ("--where", "kernels", "--where", "1.weight", "--sparsity", "0.5")
    assert fwt_command("prune", tmp_path / "c.pt", tmp_path / "p.pt", *how, *more)[0] == 0
    pruned = torch.load(tmp_path / "p.pt")
    zeros = {n: int((v == 0).sum()) for n, v in pruned.items()}
    assert (zeros["0.weight"], zeros["1.weight"], zeros["0.bias"]) == (6, 2, 0)
    # Of several files, those without parts are read as they are, once one has the part.
    out = tmp_path / "out"
    words = (tmp_path / "w.pt", tmp_path / "c.pt", out, "--to", "npz")
    assert fwt_command("convert", *words, *how)[0] == 0
    assert fwt_command("diff", out / "w.npz", out / "c.npz")[0] == 0
    found = cli("inspect", "w.pt", "w.pt", "--key", "state_dict", cwd=tmp_path, code=1)
    assert found.stderr.count("there is no 'state_dict', but '0.weight'") == 2
    # A part that neither file has, or that the second lacks beside other parts, is refused.
    torch.save({"ema": held, "epoch": 3}, tmp_path / "e.pt")
    with pytest.raises(converters.FileFormatError, match=r"e\.pt: .* there is no 'state_dict'"):
        fwt_command("diff", tmp_path / "c.pt", tmp_path / "e.pt", "--key", "state_dict")
    found = cli("inspect", "c.pt", "e.pt", "--key", "state_dict", cwd=tmp_path, code=1)
    assert "error: e.pt: --key state_dict: there is no 'state_dict', but 'ema'" in found.stderr


@pytest.mark.parametrize("where", [(), ("--where", "kernels", "--where", "body.weight")])
def test_what_is_said_of_a_tie_takes_it(tmp_path, where):
    net = torch.nn.Module()
    net.emb, net.head = torch.nn.Embedding(5, 4), torch.nn.Linear(4, 5, bias=False)
    net.body, net.head.weight = torch.nn.Linear(4, 4), net.emb.weight
    torch.save(net.state_dict(), tmp_path / "t.pt")
    words = ("prune", "t.pt", "o.pt", "--sparsity", "0.5")
    said = cli(*words, *where, cwd=tmp_path).stderr
    assert len(said.splitlines()) == 1
    way = said.partition("takes it alone, ")[2].partition(" beside the rest")[0].split()
    assert way == [*(where or ("--where", "kernels")), "--where", "emb/weight"]
    assert not cli(*words, *way, cwd=tmp_path).stderr
    pruned = torch.load(tmp_path / "o.pt")
    assert {n: int((v == 0).sum()) for n, v in pruned.items() if n.endswith("weight")} == {
        "emb.weight": 10, "head.weight": 10, "body.weight": 8}  # fmt: skip


def test_what_holds_weights_only_says_so(there, tmp_path):
    for suffix in (".pt", ".msgpack", ".weights.h5", ".npz"):
        only = suffix != ".npz"
        words = ("convert", there / "net.keras", tmp_path / f"out{suffix}")
        said = fwt_command(*words)[1].splitlines()[0]
        assert ("weights only" in said) == only
        assert ("9 layers" in said) != only
        assert (json.loads(fwt_command(*words, "--json")[1])["module"] is None) == only
    said = fwt_command("inspect", there / "w.pt", "-a", there / "net.keras")[1].splitlines()[0]
    assert "weights only, 9 layers of " in said


def test_several_files_at_once(there, tmp_path):
    broken = tmp_path / "broken.keras"
    broken.write_text("nothing")
    files = ["net.keras", "net.h5", broken, "w.pt", "none.keras"]
    found = cli("inspect", *files, "--json", cwd=there, code=1)
    told = [json.loads(line) for line in found.stdout.splitlines()]
    assert [t["file"] for t in told] == ["net.keras", "net.h5", "w.pt"]
    first, second = found.stderr.splitlines()
    assert first.startswith(f"error: {broken}: not a readable .keras file")
    assert second == "error: none.keras: no such file"

    out = tmp_path / "out"
    found = cli(
        "convert", "net.keras", "w.pt", broken, out, "--to", "safetensors", cwd=there, code=1
    )
    assert len(found.stderr.splitlines()) == 1
    assert names(out) == ["net.safetensors", "w.safetensors"]
    assert fwt_command("diff", out / "net.safetensors", there / "net.keras")[0] == 0
    # One of the same name is not written over one that was just written, nor a file over itself.
    found = cli("convert", "net.keras", "net.h5", out, "--to", ".npz", cwd=there, code=1)
    assert f"net.h5: {out / 'net.npz'} is written from net.keras already" in found.stderr
    for verb in ("prune", "initialize", "project"):
        out = tmp_path / verb
        cli(verb, "net.keras", "net.npz", out, *VERBS[verb], cwd=there)
        assert names(out) == ["net.keras", "net.npz"]
    assert fwt_command("diff", out / "net.npz", out / "net.keras")[0] == 0
    words = (out / "net.keras", out / "net.npz", out)
    found = cli("project", *words, *VERBS["project"], cwd=there, code=1)
    assert found.stderr.count("it would be written over itself") == 2
    twice = tmp_path / "twice"
    words = ("net.npz", "net.npz", twice)
    found = cli("project", *words, *VERBS["project"], cwd=there, code=1)
    assert f"net.npz: {twice / 'net.npz'} is written from net.npz already" in found.stderr
    assert names(twice) == ["net.npz"]
    (tmp_path / "run.pth.tar").write_bytes((there / "w.pt").read_bytes())
    cli("project", "net.keras", out, *VERBS["project"], "--to", ".pt", cwd=there)
    cli("convert", tmp_path / "run.pth.tar", out, "--to", ".pt", cwd=there)
    assert {"net.pt", "run.pt"} <= set(names(out))
    for words in (("net.keras", "net.h5", "x.keras"), ("net.keras", "x.keras", "--to", "pt"),
                  ("net.keras", "net.h5", out), ("net.keras", out, "--to", ".foo")):  # fmt: skip
        cli("convert", *words, cwd=there, code=2)
    assert not (there / "x.keras").exists()


def test_a_slash_at_the_end_says_that_the_target_is_a_folder(there, tmp_path):
    out = f"{tmp_path / 'new' / 'one'}/"
    cli("prune", "w.pt", out, "--sparsity", "0.5", "--where", "**/weight", cwd=there)
    assert names(tmp_path / "new" / "one") == ["w.pt"]
    found = cli("convert", "w.pt", f"{tmp_path / 'other'}/", cwd=there, code=2)
    assert "--to .keras" in found.stderr
    cli("convert", "net.npz", f"{tmp_path / 'o.orbax'}/", cwd=there)  # a folder of one model
    assert fwt_command("diff", there / "net.npz", tmp_path / "o.orbax")[0] == 0


@pytest.mark.parametrize("verb", ["convert", "prune", "initialize", "project"])
def test_what_is_missing_is_said(there, verb):
    more = VERBS.get(verb, ())
    for words, missing in ((("net.keras",), "target"), ((), "sources")):
        found = cli(verb, *words, *more, cwd=there, code=2)
        assert f"missing argument '{missing}" in found.stderr.lower(), words


def test_external_data_of_onnx_on_every_command(tmp_path):
    """As torch's exporter writes it: another file in the folder."""
    net = random_model(fwt.Sequential([("d", nn.Dense(30)), ("e", nn.Dense(3))], (25,)))
    converters.to_onnx(*net, tmp_path / "n.onnx", external_data=True)
    for command in COMMANDS:
        words = ["n.onnx"]
        if command in ("verify", "diff"):
            words += ["n.onnx"]
        elif command != "inspect":
            words += [f"{command}.npz"]
        words += VERBS.get(command, ())
        found = cli(command, *words, cwd=tmp_path, code=1)
        assert "in another file" in found.stderr, command
        assert "give --external-data" in found.stderr, command
        cli(command, *words, "--external-data", cwd=tmp_path)
    assert (
        fwt_command("diff", tmp_path / "n.onnx", tmp_path / "convert.npz", "--external-data")[0]
        == 0
    )
    converters.save(tmp_path / "w.pt", *net)
    words = ("convert", "w.pt", "w.keras", "-a", "n.onnx")
    cli(*words, cwd=tmp_path, code=1)
    cli(*words, "--external-data", cwd=tmp_path)


def test_half_precision_is_read_in_float32(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(4, 3)).half()
    converters.save(tmp_path / "h.npz", converters.from_torch(net, (4,)))
    found = cli("convert", "h.npz", "h.keras", cwd=tmp_path, code=1)
    assert "net.float() in torch, or --dtype float32" in found.stderr
    cli("convert", "h.npz", "h.keras", "--dtype", "float32", "--verify", cwd=tmp_path)
    kernel = keras.saving.load_model(tmp_path / "h.keras").layers[0].kernel
    assert np.array_equal(keras.ops.convert_to_numpy(kernel).T, net[0].weight.detach().float())
    assert kernel.dtype == "float32"
    cli("inspect", "h.npz", "--dtype", "int8", cwd=tmp_path, code=2)


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Files that a command meets with an error."""
    folder = tmp_path_factory.mktemp("odd")
    model = fwt.Sequential([("a", nn.Dense(3)), ("b", nn.Dense(2))], (4,))
    variables = model.init(jax.random.key(0), np.ones((1, 4)))
    converters.save(folder / "net.keras", model, variables)
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    torch.save(net.state_dict(), folder / "w.pt")
    torch.save({"model": net.state_dict(), "epoch": 3}, folder / "c.pt")
    torch.save(net, folder / "whole.pt")
    torch.save([1], folder / "list.pt")
    wide = {"bert/kernel": np.ones((3, 2), np.float32), "bert/bias": np.ones(2)}
    safetensors.numpy.save_file(wide, folder / "tf.safetensors")
    np.savez(folder / "wide.npz", a=np.ones((3, 2)))
    (folder / "j.json").write_text("{}")
    (folder / "text.keras").write_text("text")
    (folder / "empty").mkdir()
    return folder


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("convert w.pt o.keras", "--architecture net.keras says which model"),
        ("convert w.pt o.keras --match order", "--match and --no-strict need --architecture"),
        ("convert w.pt o.npz --rename 7=a", "--rename: no name starts with '7'; close: '0.weight'"),
        ("convert w.pt o.npz --rename 0=1", "two arrays are named '1.weight'; --rename or --drop"),
        ("inspect w.pt --drop *.b", "--drop: no name matches '*.b'; close"),
        ("convert c.pt o.ckpt --key model", "o.pt takes any weights"),
        ("diff w.pt net.keras --drop *.b", "w.pt: --drop: no name matches '*.b'"),
        ("prune net.keras o.keras --sparsity 0.5 --rename a=b", "it holds a model, whose layers"),
        ("convert w.pt o.keras -a net.keras --rename 7=a", "--rename: no name starts with '7'"),
        ("convert w.pt o.keras -a net.keras", "--match order takes them in the file's order"),
        ("inspect c.pt", "--key model picks a part of it"),
        ("inspect c.pt --key ema", "--key ema: there is no 'ema', but 'model', 'epoch'"),
        ("inspect list.pt --key a", "there is no 'a', and nothing else"),
        ("inspect whole.pt", "expected a state dict, found a torch.nn.modules.container"),
        ("inspect j.json", "it lacks 'weight_map'"),
        ("inspect text.keras", "not a readable .keras file"),
        ("inspect empty", "a folder of no known format"),
        ("prune net.keras o.keras", "--sparsity 0.8 or --threshold 0.1"),
        ("prune net.keras o.keras --sparsity 0.5 --scope all", "--scope must be one of"),
        ("prune net.keras o.keras --pattern n_m", "expected n_m(n, m"),
        ("prune net.keras o.keras --pattern n_m(2,4)", "--pattern n_m(2, 4): b/kernel of shape"),
        ("prune w.pt o.pt --sparsity 0.5 --where x", "fwt inspect lists them all"),
        ("prune wide.npz o.npz --sparsity 0.5", "--where kernels, the default, matches none"),
        ("prune wide.npz o.npz --sparsity 0.5 --where a", "--dtype float32 reads it in float32"),
        ("prune tf.safetensors o.npz --sparsity 0.5 --where bert/kernl", "close: 'bert/kernel'"),
        ("project tf.safetensors o.npz --constraint unit_norm --where bert/kernel",
         "say so with --axes 'bert/kernel=out in'"),
        ("project net.keras o.keras --constraint max_norm(1,2,3)", "expected max_norm(max_value="),
        ("project w.pt o.pt --constraint unit_norm --axes x/*=out", "--axes 'x/*' matches no leaf"),
        ("inspect wide.npz --key nope", "it holds one model, or one set of weights, only"),
        ("verify net.keras w.pt", "--architecture says which model they are of"),
        ("verify net.keras net.keras --tolerance -1", "--tolerance -1.0"),
    ],
)  # fmt: skip
def test_errors_speak_the_language_of_the_command_line(odd, line, said):
    found = cli(*line.split(), cwd=odd, code=1)
    assert said in found.stderr
    assert len(found.stderr.splitlines()) == 1
    for foreign in ("={", "=[", "fwt.", "jax.", "NEWOBJ", "NoneType", "\\", "Ellipsis", "module("):
        assert foreign not in found.stderr.replace("fwt.Seq", "")


def test_a_slash_in_a_name_is_shown_and_taken_as_it_is(odd):
    more = ("--where", "bert/kernel", "--axes", "bert/kernel=in out", "--sparsity", "0.5")
    found = cli("prune", "tf.safetensors", "s.safetensors", *more, cwd=odd)
    assert "bert/kernel  3 x 2" in found.stdout
    with safetensors.safe_open(odd / "s.safetensors", "np") as file:
        assert np.count_nonzero(file.get_tensor("bert/kernel")) == 3
        assert np.count_nonzero(file.get_tensor("bert/bias")) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--pattern", "2:4"], "write 'n_m(2, 4)'"),
        (["--pattern", "2 4"], "there are block, channel, n_m, unstructured"),
        (["--sparsity", "0.5", "--where", "*.weight"], "'**.weight' does"),
    ],
)
def test_first_guesses_of_prune_are_told_what_to_write(tmp_path, options, said):
    inner = torch.nn.Sequential(torch.nn.Linear(4, 4))
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), inner)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    with pytest.raises(fwt.FwtError, match=re.escape(said)):
        fwt_command("prune", tmp_path / "net.pt", tmp_path / "out.pt", *options)
    assert not (tmp_path / "out.pt").exists()
