"""The command line on every format, in one process."""

import io
import json
import sys

import flax.linen as nn
import jax
import keras
import numpy as np
import pytest
import torch
from command import fwt_command
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


def test_what_keras_trains_with_stays_in_its_files(tmp_path):
    layer = keras.layers.Dense(3, kernel_regularizer="l2", trainable=False, name="d")
    keras.Sequential([keras.Input((4,)), layer]).save(tmp_path / "net.keras")
    verbs = {
        "convert": (),
        "prune": ("--sparsity", 0.5),
        "initialize": ("--initializer", "keras.he_normal"),
        "project": ("--constraint", "unit_norm"),
    }
    for verb, more in verbs.items():
        code, said = fwt_command(verb, tmp_path / "net.keras", tmp_path / f"{verb}.keras", *more)
        assert code == 0, said
        found = keras.saving.load_model(tmp_path / f"{verb}.keras").get_layer("d")
        assert not found.trainable
        assert isinstance(found.kernel_regularizer, keras.regularizers.L2)


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
