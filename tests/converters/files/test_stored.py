"""Files that are edited and converted a piece at a time: the same as in memory, and never held."""

import os
import shutil
import warnings
import zipfile

import cases
import flax.linen as nn
import jax
import keras
import layer_cases
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file

import fwt
from fwt import _stored, constraints, converters
from fwt._types import does_stream
from fwt.converters.files import stored

TRANSFORMS = {
    "layer": fwt.prune(0.5),
    "global": fwt.prune(0.3, scope="global"),
    "threshold": fwt.prune(threshold=0.1),
    "max_norm": fwt.project(constraints.max_norm(0.5)),
    "normal": fwt.initialize(fwt.initializers.normal(0.1), 0),
    "identity": fwt.chain(),
    "biases too": fwt.prune(0.5, where="**"),
}
ENDS = (".safetensors", ".npz", ".pt", ".msgpack")


def net():
    torch.manual_seed(0)
    made = torch.nn.Sequential(
        torch.nn.Linear(13, 7), torch.nn.BatchNorm1d(7), torch.nn.Linear(7, 5)
    )
    made[1].running_mean += 3
    return made


def tied():
    made = torch.nn.ModuleDict({"a": torch.nn.Linear(7, 7), "b": torch.nn.Linear(7, 7)})
    made["b"].weight = made["a"].weight
    return made


def numbers(*shape):
    return torch.from_numpy(np.random.default_rng(1).normal(size=shape).astype(np.float32))


def _run(path):
    made = net()
    adam = torch.optim.Adam(made.parameters())
    made(torch.ones(3, 13)).sum().backward()
    adam.step()
    held = {"model": made.state_dict(), "adam": adam.state_dict(), "of": object, "step": 3}
    torch.save(held, path)


def _views(path):
    big = numbers(40, 30)
    torch.save(
        {
            "a.weight": big[:20],
            "b.weight": big[20:],
            "turned.weight": numbers(30, 40).t(),
            "half.weight": big.bfloat16(),
            "whole.weight": (big * 10).to(torch.int8),
            "scalar": torch.tensor(3.0),
            "empty": torch.zeros(0, 3),
        },
        path,
    )


def _compressed(path):
    torch.save(net().state_dict(), path)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(f"{path}.new", "w", 8) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    os.replace(f"{path}.new", path)


def _weight_norm(path):
    made = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 5))
    torch.save(made.state_dict(), path)


def _ours(path):
    module = fwt.Sequential([("dense", nn.Dense(5))], (3,))
    converters.save(path, module, module.init(jax.random.key(0), np.ones((1, 3))))


def _shards(path):
    whole = path.with_name("whole.safetensors")
    save_file(net().state_dict(), whole)
    converters.save(path, *converters.load(whole), shard_bytes=200)
    whole.unlink()


def _npz(path):
    big = numbers(40, 30).numpy()
    np.savez(path, **{"d/kernel": big, "d/bias": big[0], "turned/kernel": np.asfortranarray(big)})


FILES = {
    "net.pt": lambda path: torch.save(net().state_dict(), path),
    "run.pt": _run,
    "older.pt": lambda path: torch.save(
        net().state_dict(), path, _use_new_zipfile_serialization=False
    ),
    "tied.pt": lambda path: torch.save(tied().state_dict(), path),
    "views.pt": _views,
    "compressed.pt": _compressed,
    "weight_norm.pt": _weight_norm,
    "conjugated.pt": lambda path: torch.save(
        {"c": numbers(3, 4).to(torch.complex64).mul(1j).conj(), "d.weight": numbers(5, 4)}, path
    ),
    "net.safetensors": lambda path: save_file(net().state_dict(), path, {"format": "pt", "a": "b"}),
    "halves.safetensors": lambda path: save_file(
        {"a.weight": numbers(9, 5).half(), "b.weight": numbers(7, 3), "c": numbers(3).bfloat16()},
        path,
    ),
    "shards.safetensors": _shards,
    "plain.npz": _npz,
    "whole.npz": lambda path: np.savez(path, **{"d/kernel": numbers(9, 4).numpy()}),
    "compressed.npz": lambda path: np.savez_compressed(path, **{"d/kernel": numbers(9, 4).numpy()}),
    "bfloat16.npz": lambda path: converters.save(
        path, None, {"params": {"d": {"kernel": numbers(9, 4).numpy().astype(ml_dtypes.bfloat16)}}}
    ),
    "ours.npz": _ours,
    "ours.safetensors": _ours,
    "ours.pt": _ours,
}


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch):
    """Pieces so short that each tensor has several."""
    monkeypatch.setattr(_stored, "PIECE", 1 << 7)
    monkeypatch.setattr(stored, "PIECE", 1 << 7)


def edited(source, transform, target, **how):
    """What is written, or what is said instead."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of views, which are two arrays in other formats
            converters.transform(source, transform, out=target, **how)
    except fwt.FwtError as error:
        assert not target.exists()
        return str(error).replace(str(target), "")
    with stored.wanted(False):
        key = how.get("key") if target.suffix == source.suffix == ".pt" else None
        found = converters.load(target, key=key)
    size = target.stat().st_size if target.is_file() else 0
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    return found, size


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_as_in_memory(name, transform, tmp_path):
    source = tmp_path / name
    FILES[name](source)
    t = TRANSFORMS[transform]
    assert does_stream(t)
    assert not does_stream(lambda model: t(model))
    how = {"key": "model"} if name == "run.pt" else {}
    before = source.read_bytes() if source.is_file() else b""
    for end in ENDS:
        one = edited(source, lambda model: t(model), tmp_path / f"one{end}", **how)
        other = edited(source, t, tmp_path / f"two{end}", **how)
        if isinstance(one, str) or isinstance(other, str):
            assert one == other
            continue
        assert one[1] == other[1], end
        assert jax.tree.structure(one[0]) == jax.tree.structure(other[0])
        assert fwt.diff(one[0], other[0]).equal, end
    assert not before or source.read_bytes() == before


@pytest.mark.parametrize("name", ["net.pt", "run.pt", "views.pt", "tied.pt", "compressed.pt"])
def test_torch_opens_what_was_edited(name, tmp_path):
    """All other bytes stay, and the archive's checksums are right."""
    source, target = tmp_path / name, tmp_path / "out.pt"
    FILES[name](source)
    how = {"key": "model"} if name == "run.pt" else {}
    converters.transform(source, fwt.prune(0.5), out=target, **how)
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target) as new:
        assert new.testzip() is None
        assert old.namelist() == new.namelist()
        same = [n for n in old.namelist() if old.read(n) == new.read(n)]
    if name != "compressed.pt":
        pair = source.read_bytes(), target.read_bytes()
        assert len(pair[0]) == len(pair[1])
    assert any("data.pkl" in n for n in same)
    states = [torch.load(p, weights_only=False) for p in (source, target)]
    if name == "run.pt":
        assert states[0]["step"] == states[1]["step"]
        assert states[1]["of"] is object
        for key, moments in states[0]["adam"]["state"].items():
            for part, value in moments.items():
                assert torch.equal(value, states[1]["adam"]["state"][key][part])
        states = [state["model"] for state in states]
    for key, value in states[0].items():
        expected = value
        if key.endswith("weight") and value.ndim == 2 and value.is_floating_point():
            flat = value.float().flatten().clone()
            flat[flat.abs().argsort()[: round(0.5 * flat.numel())]] = 0
            expected = flat.reshape(value.shape).to(value.dtype)
        elif key.endswith("weight") and value.ndim == 2:
            assert int((states[1][key] == 0).sum()) >= value.numel() // 2
            continue
        if value.dtype == torch.bfloat16:  # of ties torch's order says nothing
            assert int((states[1][key] == 0).sum()) == int((expected == 0).sum())
            continue
        assert torch.equal(expected, states[1][key]), key
    if name == "tied.pt":
        assert states[1]["a.weight"].data_ptr() == states[1]["b.weight"].data_ptr()


@pytest.mark.parametrize("name", ["net.pt", "net.safetensors", "shards.safetensors", "whole.npz"])
@pytest.mark.parametrize("end", [".pt", ".safetensors", ".npz"])
def test_nothing_is_held(name, end, tmp_path, monkeypatch):
    source = tmp_path / name
    FILES[name](source)

    def held(self, *_, **__):
        raise AssertionError(f"{self} came into memory")

    monkeypatch.setattr(stored.InFile, "__array__", held)
    for transform in ("layer", "global", "threshold", "identity"):
        converters.transform(source, TRANSFORMS[transform], out=tmp_path / f"out{end}")
    with stored.wanted():
        converters.save(tmp_path / f"again{end}", *converters.load(source, dtype="bfloat16"))
        fwt.summary(converters.load(source))
        assert fwt.diff(*[converters.load(source) for _ in "ab"]).equal


def test_a_cast_that_would_be_infinite_is_refused(tmp_path):
    path, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file({"w.weight": torch.tensor([[1.0, 1e30]])}, path)
    with pytest.raises(fwt.ConversionError, match="w/weight: 1e\\+30 is beyond float16"):
        converters.transform(path, fwt.chain(), out=target, dtype="float16")
    assert not target.exists()


@pytest.mark.parametrize("end", [".pt", ".safetensors", ".npz"])
def test_a_file_that_changes_meanwhile(end, tmp_path):
    name = {".pt": "net.pt", ".safetensors": "net.safetensors", ".npz": "whole.npz"}[end]
    source, target = tmp_path / name, tmp_path / f"out{end}"
    FILES[name](source)
    whole = source.read_bytes()

    def changing(how):
        def change(model):
            how()
            return fwt.prune(0.5)(model)

        change.__fwt_streams__ = True
        return change

    def shorter():
        os.truncate(source, 300)

    def other():
        source.write_bytes(whole[:-1] + b"x")
        os.utime(source, ns=(1, 1))

    for how in (shorter, other):
        source.write_bytes(whole)
        with pytest.raises(
            fwt.FileFormatError, match=r"changed while it was read|truncated|not a readable"
        ):
            converters.transform(source, changing(how), out=target)
        assert not target.exists()
        assert [p.name for p in tmp_path.iterdir()] == [name]

    def replaced():  # by a whole new one, as a training run saves
        new = tmp_path / "new"
        new.write_bytes(whole)
        os.replace(new, source)

    source.write_bytes(whole)
    if end == ".safetensors":  # whose header was read with its tensors
        converters.transform(source, changing(replaced), out=target)
        assert target.exists()
    else:
        with pytest.raises(fwt.FileFormatError, match="changed while it was read"):
            converters.transform(source, changing(replaced), out=target)


def test_a_full_disk_leaves_all_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "net.safetensors"
    FILES[path.name](path)
    before = path.read_bytes()

    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fwt.converters.io.Counted.write", full)
    with pytest.raises(fwt.FileFormatError, match=r"can't write it \(No space left on device\)"):
        converters.transform(path, fwt.prune(0.5), out=path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_over_itself(tmp_path):
    for name in ("net.safetensors", "run.pt", "plain.npz"):
        path = tmp_path / name
        FILES[name](path)
        how = {"key": "model"} if name == "run.pt" else {}
        converters.transform(path, fwt.prune(0.5), out=tmp_path / f"other{path.suffix}", **how)
        converters.transform(path, fwt.prune(0.5), out=path, **how)
        one, other = (
            converters.load(path, **how),
            converters.load(
                tmp_path / f"other{path.suffix}", **(how if path.suffix == ".pt" else {})
            ),
        )
        assert fwt.diff(one, other).equal


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("end", [".pt", ".safetensors"])
def test_a_wrong_checksum_is_found(turned, end, tmp_path):
    path, target, weight = tmp_path / "net.pt", tmp_path / f"out{end}", numbers(9, 13)
    torch.save({"a.weight": weight.t() if turned else weight}, path)
    whole = bytearray(path.read_bytes())
    whole[whole.find(weight.numpy().tobytes()) + 5] ^= 1
    path.write_bytes(whole)
    with pytest.raises(fwt.FileFormatError, match="another checksum"):
        converters.transform(path, fwt.prune(0.5), out=target)
    assert not target.exists()


def test_as_much_as_memory_may_hold(tmp_path):
    path, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file({"a.weight": numbers(40, 30), "b.weight": numbers(30, 40)}, path)
    converters.transform(path, fwt.prune(0.5, scope="global"), out=target, max_memory=100)
    pruned = load_file(target)
    both = np.concatenate([np.abs(x).ravel() for x in load_file(path).values()])
    cut = np.sort(both)[both.size // 2]
    for name, x in load_file(path).items():
        np.testing.assert_array_equal(pruned[name], np.where(np.abs(x) >= cut, x, 0))
    with pytest.raises(fwt.LeafError, match=r"scope='lamp'.*max_memory=100 is less"):
        converters.transform(path, fwt.prune(0.5, scope="lamp"), out=target, max_memory=100)
    for wrong in (0, 1.5, "1 GB"):
        with pytest.raises(fwt.FileFormatError, match=r"max_memory=.*: expected a number of bytes"):
            converters.transform(path, fwt.prune(0.5), out=target, max_memory=wrong)
    with pytest.raises(TypeError, match="max_memory= is for files"):
        converters.transform(net(), fwt.prune(0.5), max_memory=100)


@pytest.mark.parametrize("compressed", [False, True])
def test_conjugated_and_negated_tensors_stay(compressed, tmp_path):
    """The file holds other numbers than such a tensor has, and says so."""
    path, target = tmp_path / "a.pt", tmp_path / "b.pt"
    held = {
        "filter": numbers(5, 3).to(torch.complex64).mul(1 + 2j).conj(),
        "turned": numbers(5, 3).to(torch.complex64).mul(1 + 2j).mH,
        "neg.weight": torch._neg_view(numbers(4, 3)),
        "part.weight": numbers(4, 3).to(torch.complex64).mul(1j).conj().imag,
        "a.weight": numbers(4, 4),
    }
    torch.save(held, path)
    if compressed:
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(f"{path}.new", "w", 8) as new:
            for info in old.infolist():
                new.writestr(info.filename, old.read(info))
        os.replace(f"{path}.new", path)
    for where in ("a.weight", "neg.weight"):
        converters.transform(path, fwt.prune(0.5, where=where), out=target)
        found = torch.load(target)
        assert int((found[where] == 0).sum()) == held[where].numel() // 2
        for name, value in held.items():
            kept = found[name] != 0 if name == where else torch.ones_like(value, dtype=torch.bool)
            assert torch.equal(found[name][kept], value[kept]), name
        zeros = found[where][found[where] == 0]
        assert not torch.signbit(zeros).any()
    converters.transform(path, fwt.chain(), out=target)
    if not compressed:
        assert path.read_bytes() == target.read_bytes()


def test_other_parts_of_a_checkpoint_stay(tmp_path):
    """Also those that have the same memory, which can't be written alone."""
    path, target = tmp_path / "run.pt", tmp_path / "out.pt"
    module = net()
    state, weight = module.state_dict(), numbers(4, 4)
    for held in (
        {"model": state, "ema": state},
        {"model": state, "best": dict(state)},
        {"model": state, "last": module.state_dict()},
        {"model": state, "module": module},
        {"model": state, "several": [state["0.weight"][:2]]},
        {"model": {"a.weight": weight[:2]}, "whole": weight},
    ):
        torch.save(held, path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that in memory they are two
            with pytest.raises(fwt.ConversionError, match="memory that other parts of the file"):
                converters.transform(path, fwt.prune(0.5), out=target, key="model")
        assert not target.exists()
    copies = {name: value.clone() for name, value in state.items()}
    torch.save({"model": state, "ema": copies}, path)
    converters.transform(path, fwt.prune(0.5), out=target, key="model")
    found = torch.load(target)
    assert all(torch.equal(found["ema"][name], value) for name, value in copies.items())
    assert int((found["model"]["0.weight"] == 0).sum()) == round(0.5 * 13 * 7)


# -- files of Keras -------------------------------------------------------------------------------


def check_keras(model, folder, end):
    """Edited in its place, it is what it is when it is written anew, and all else stays."""
    source, one, other = (folder / f"{name}{end}" for name in ("model", "one", "other"))
    model.save(source)
    t = fwt.prune(0.5, where="**")
    whole = converters.load(source, sidecar=True)
    if not fwt.paths(whole):
        return
    converters.transform(source, lambda model: t(model), out=one)
    converters.transform(source, t, out=other)
    with stored.wanted():
        later = converters.load(source, sidecar=True)
        assert later.module == whole.module
        assert fwt.diff(later, whole).equal
        for form in ENDS:
            try:
                converters.save(folder / f"plain{form}", *whole)
            except fwt.ConversionError:
                continue
            converters.save(folder / f"later{form}", *later)
            assert fwt.diff(folder / f"plain{form}", folder / f"later{form}").equal
    pair = [converters.load(path, sidecar=True) for path in (one, other)]
    assert fwt.diff(*pair).equal
    assert pair[0].module == pair[1].module
    keras.saving.load_model(other)


@pytest.mark.parametrize("end", [".keras", ".h5"])
@pytest.mark.parametrize("name", cases.KERAS)
def test_keras_models_as_in_memory(name, end, tmp_path):
    model = cases.KERAS[name][1]()
    cases.randomise_keras(model, 1)
    check_keras(model, tmp_path, end)


@pytest.mark.thorough
@pytest.mark.parametrize("end", [".keras", ".h5"])
@pytest.mark.parametrize("name", layer_cases.KERAS)
def test_layers_of_keras_as_in_memory(name, end, tmp_path):
    shape, layer = layer_cases.KERAS[name].make(np.random.default_rng(1))
    model = keras.Sequential([keras.layers.Input(shape), layer])
    cases.randomise_keras(model, 1)
    try:
        model.save(tmp_path / f"tried{end}")
        converters.load(tmp_path / f"tried{end}", sidecar=True)
    except (fwt.FwtError, NotImplementedError, TypeError, ValueError):
        return  # which test_layers looks at
    check_keras(model, tmp_path, end)


@pytest.mark.parametrize("end", [".keras", ".h5"])
def test_a_keras_file_is_edited_to_the_byte(end, tmp_path):
    source, target = tmp_path / f"a{end}", tmp_path / f"b{end}"
    model = keras.Sequential(
        [keras.layers.Input((5,)), keras.layers.Dense(4), keras.layers.Dense(3)]
    )
    model.compile("adam", keras.losses.MeanSquaredError())
    model.fit(np.ones((8, 5)), np.ones((8, 3)), verbose=0)
    model.save(source)
    converters.transform(source, fwt.prune(0.5, where="dense*/kernel"), out=target)
    pair = [np.frombuffer(path.read_bytes(), np.uint8) for path in (source, target)]
    assert pair[0].size == pair[1].size
    # 16 of 32 weights, and checksums.
    assert 0 < np.count_nonzero(pair[0] != pair[1]) <= 16 * 4 + 8
    again = keras.saving.load_model(target)
    for old, new in zip(model.weights, again.weights, strict=True):
        old, new = np.asarray(old), np.asarray(new)
        if old.ndim == 2:
            old = np.where(np.abs(old) > np.sort(np.abs(old).ravel())[old.size // 2 - 1], old, 0)
        np.testing.assert_array_equal(old, new)
    if end == ".keras":  # from the other Keras itself reads no state of an optimizer
        for old, new in zip(model.optimizer.variables, again.optimizer.variables, strict=True):
            np.testing.assert_array_equal(np.asarray(old), np.asarray(new))
        whole = bytearray(source.read_bytes())
        at = whole.find(np.asarray(model.layers[0].kernel).tobytes())
        whole[at] ^= 1
        source.write_bytes(whole)
        with pytest.raises(fwt.FileFormatError, match="another checksum"):
            converters.transform(source, fwt.prune(0.5), out=target)
