"""Checkpoints of torch that hold more than a state dict, and torch's older format."""

import argparse
import collections
import json
import warnings
import zipfile

import numpy as np
import pytest
import torch
from command import cli

import fwt
from fwt import converters


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))


class Config:
    """A user's own class, which is not to be imported."""

    def __init__(self):
        self.steps = [1, 2]

    def __reduce__(self):
        return (_called, (1,), {"steps": self.steps})


def _called(_):
    raise AssertionError("a file has called a function")


def same(path, state, **how):
    """The weights of a file are these tensors."""
    found = fwt.select(converters.load(path, **how).variables, "**")
    names = {name.replace(".", "/"): value for name, value in state.items()}
    names = {n: v for n, v in names.items() if isinstance(v, torch.Tensor)}
    assert found.keys() == names.keys()
    for name, value in names.items():
        np.testing.assert_array_equal(found[name], value.detach().resolve_conj().numpy())


BESIDE = {
    "a Namespace": argparse.Namespace(lr=1e-3, layers=[1, 2]),
    "NumPy scalars": {"best": np.float64(0.9), "mean": np.float32(0.5)},
    "an array": np.arange(6.0).reshape(2, 3),
    "a set": {1, "a", (2, 3)},
    "a Counter": collections.Counter("aab"),
    "a defaultdict": collections.defaultdict(list, a=[1]),
    "a module": torch.nn.Sequential(torch.nn.Conv1d(2, 3, 1), torch.nn.ReLU()),
    "a class": Config,
    "a user's object": Config(),
    "a dtype, a size, a device": [torch.float16, torch.Size([1, 2]), torch.device("cpu")],
    "an optimizer": torch.optim.Adam(torch.nn.Linear(2, 2).parameters()).state_dict(),
    "a generator's state": torch.get_rng_state(),
    "a sparse tensor": torch.eye(3).to_sparse(),
    "a quantised tensor": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    "complex32": torch.ones(2, dtype=torch.complex32),
}


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("name", BESIDE)
def test_what_stands_beside_the_weights_does_nothing(tmp_path, name, older):
    state = net().state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of quantised tensors
        checkpoint = {"epoch": 3, "more": BESIDE[name], "model": {"weights": state}}
        torch.save(checkpoint, tmp_path / "c.ckpt", _use_new_zipfile_serialization=not older)
    same(tmp_path / "c.ckpt", state, key="model/weights")
    with pytest.raises(converters.FileFormatError, match="expected a state dict of tensors, but"):
        converters.load(tmp_path / "c.ckpt")


@pytest.mark.parametrize("older", [False, True])
def test_an_object_under_the_key_is_refused_by_its_class(tmp_path, older):
    how = {"_use_new_zipfile_serialization": not older}
    torch.save({"model": net(), **net().state_dict(), "config": Config()}, tmp_path / "c.pt", **how)
    with pytest.raises(
        converters.FileFormatError, match=r"'model' is a torch.nn.modules.container"
    ):
        converters.load(tmp_path / "c.pt")
    with pytest.raises(
        converters.FileFormatError, match=r"found a torch.*Sequential; save model.st"
    ):
        converters.load(tmp_path / "c.pt", key="model")
    torch.save({**net().state_dict(), "config": Config()}, tmp_path / "c.pt", **how)
    with pytest.raises(
        converters.FileFormatError, match=r"'config' is a .*test_torch_files\._call"
    ):
        converters.load(tmp_path / "c.pt")


def test_torchscript_is_refused_by_its_class(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(net()).save(tmp_path / "j.pt")
    with pytest.raises(converters.FileFormatError, match=r"found a __torch__.*Sequential"):
        converters.load(tmp_path / "j.pt")


def test_plain_values_beside_tensors_are_left_out_with_a_warning(tmp_path):
    state = {**net().state_dict(), "tags": {"a"}, "step": 3, "_extra_state": None}
    torch.save(state, tmp_path / "s.pt")
    with pytest.warns(UserWarning, match=r"'tags' \(a set\), 'step' \(an int\), '_extra_state'"):
        same(tmp_path / "s.pt", state)


TENSORS = {
    "dtypes": {
        str(d).removeprefix("torch."): torch.arange(6).to(d).reshape(2, 3)
        for d in (torch.float64, torch.float16, torch.int16, torch.bool, torch.complex64,
                  torch.uint8, torch.int64)
    },
    "views": {"a": torch.arange(12.0).reshape(3, 4).T, "b": torch.arange(9.0)[2:8:3],
              "c": torch.ones(()), "d": torch.zeros(0, 3)},
    "conj": {"a": torch.view_as_complex(torch.randn(3, 2)).conj()},
}  # fmt: skip


@pytest.mark.parametrize("name", TENSORS)
def test_the_format_before_1_6(tmp_path, name):
    torch.save(TENSORS[name], tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    same(tmp_path / "old.pth", TENSORS[name])


def test_the_older_format_keeps_order_and_ties(tmp_path):
    model = torch.nn.Sequential(torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5, bias=False))
    model[1].weight = model[0].weight
    torch.save(model.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    loaded = converters.load(tmp_path / "old.pt")
    params = loaded.variables["params"]
    assert params["0"]["weight"] is params["1"]["weight"]
    converters.save(tmp_path / "new.pt", *loaded)
    new = torch.load(tmp_path / "new.pt", weights_only=True)
    assert list(new) == ["0.weight", "1.weight"]
    assert new["0.weight"].data_ptr() == new["1.weight"].data_ptr()


def test_parameters_with_attributes(tmp_path):
    layer = torch.nn.Linear(2, 3)
    layer.weight.tag = "mine"
    state = layer.state_dict(keep_vars=True)
    torch.save(state, tmp_path / "p.pt")
    same(tmp_path / "p.pt", state)


def test_big_endian_numbers(tmp_path):
    state = {
        "a": torch.randn(3, 2), "b": torch.arange(5), "c": torch.view_as_complex(torch.randn(3, 2)),
        "d": torch.arange(6).to(torch.uint16).reshape(2, 3), "e": torch.ones(3).bfloat16(),
    }  # fmt: skip
    torch.save(state, tmp_path / "little.pt")
    sizes = {"0": 4, "1": 8, "2": 4, "3": 2, "4": 2}  # of one number in each storage
    with (
        zipfile.ZipFile(tmp_path / "little.pt") as old,
        zipfile.ZipFile(tmp_path / "big.pt", "w") as new,
    ):
        for info in old.infolist():
            data = old.read(info)
            if info.filename.endswith("byteorder"):
                data = b"big"
            elif "/data/" in info.filename:
                data = np.frombuffer(data, f"u{sizes[info.filename.split('/')[-1]]}").byteswap()
            new.writestr(info.filename, bytes(data))
    state["e"] = state["e"].float()
    found = fwt.select(converters.load(tmp_path / "big.pt").variables, "**")
    for name, value in state.items():
        np.testing.assert_array_equal(np.asarray(found[name]).astype(value.numpy().dtype), value)


def test_an_older_file_that_lies(tmp_path):
    torch.save({"a": torch.ones(300)}, tmp_path / "o.pt", _use_new_zipfile_serialization=False)
    data = (tmp_path / "o.pt").read_bytes()
    for wrong in (data[:-8], data[:-1208] + (1 << 62).to_bytes(8, "little") + data[-1200:]):
        (tmp_path / "o.pt").write_bytes(wrong)
        with pytest.raises(
            converters.FileFormatError, match=r"storage '.*' declares|not a readable"
        ):
            converters.load(tmp_path / "o.pt")


def test_shards_and_folders_of_hugging_face(tmp_path):
    import json

    state = net().state_dict()
    where = {n: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, n in enumerate(state)}
    for shard in set(where.values()):
        torch.save({n: state[n] for n, s in where.items() if s == shard}, tmp_path / shard)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    same(index, state)
    same(tmp_path, state)
    loaded = converters.load(tmp_path)
    converters.save(tmp_path / "one.pt", *loaded)
    assert list(torch.load(tmp_path / "one.pt", weights_only=True)) == list(where)
    where["more"] = where.pop("0.bias")
    index.write_text(json.dumps({"weight_map": where}))
    with pytest.raises(converters.FileFormatError, match="holds other names than the index says"):
        converters.load(index)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_with_one_file_of_weights(tmp_path, name):
    state = net().state_dict()
    torch.save(state, tmp_path / "pytorch_model.bin")
    if name == "model.safetensors":
        converters.save(tmp_path / name, *converters.load(tmp_path))
        same(tmp_path, state)  # of the two it is the one that runs no code
        (tmp_path / "pytorch_model.bin").unlink()
    (tmp_path / "config.json").write_text("{}")
    torch.save({"lr": 1}, tmp_path / "training_args.bin")
    same(tmp_path, state)
    assert "0/weight" in cli("inspect", tmp_path, cwd=tmp_path).stdout
    model = converters.load(tmp_path, architecture=net())
    np.testing.assert_array_equal(model.variables["params"]["0"]["bias"], state["0.bias"])


def test_other_views_of_one_memory_are_told(tmp_path):
    a = torch.arange(1.0, 7).reshape(2, 3)
    for other in (a.t(), a[:1]):
        torch.save({"a": a, "b": other}, tmp_path / "v.pt")
        with pytest.warns(UserWarning, match=r"another view of the memory of one before it"):
            converters.load(tmp_path / "v.pt")
    parts = torch.arange(10.0)
    whole = {"a": parts[:4], "b": parts[4:], **torch.nn.LSTM(3, 4).state_dict(), "same": a, "a2": a}
    torch.save(whole, tmp_path / "v.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        converters.load(tmp_path / "v.pt")


def pickle_with(*parts):
    return b"\x80\x02" + b"".join(parts) + b"."


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ((b")" + b"\x85" * 1000, b"q\x00}h\x00Ns"), "nested 501 times"),
        ((b"}q\x00(", b"".join(b"K%cN" % i for i in range(200)), b"u0",
          b"".join(b"ccollections\ndefaultdict\nh\x00\x85R0" for _ in range(9000)), b"}"),
         "repeats others too often|more than such a file may hold"),
    ],
)  # fmt: skip
def test_pickles_that_are_deep_or_copy_much_are_refused(tmp_path, body, said):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("a/data.pkl", pickle_with(*body))
    with pytest.raises(converters.FileFormatError, match=said):
        converters.load(tmp_path / "x.pt")


def test_one_memory_of_two_dtypes(tmp_path):
    """Two views of an untyped storage, the first of smaller numbers."""
    storage = torch.UntypedStorage(64)
    small, large = torch.tensor([], dtype=torch.float8_e5m2), torch.tensor([], dtype=torch.uint64)
    state = {"a": small.set_(storage, 0, (64,)), "b": large.set_(storage, 0, (8,))}
    for tensor in state.values():
        tensor.untyped_storage().fill_(0)
    torch.save(state, tmp_path / "v.pt")
    found = converters.load(tmp_path / "v.pt").variables["params"]
    assert {n: x.shape for n, x in found.items()} == {"a": (64,), "b": (8,)}


def test_many_tensors_and_deep_configs_are_no_attack(tmp_path):
    one = torch.ones(1)
    model = {f"layer.{i}.weight": one.clone() for i in range(3000)}
    state = {i: {"step": one.clone(), "mean": one.clone()} for i in range(5000)}
    config = {}
    for _ in range(100):
        config = {"inner": config, "more": [1, {"a": 2}]}
    more = {"optimizer": {"groups": {"state": state}}, "config": config}
    torch.save({"model": model, **more}, tmp_path / "m.pt")
    same(tmp_path / "m.pt", model, key="model")


def test_parts_with_numbers_as_names(tmp_path):
    net = torch.nn.Linear(3, 2)
    torch.save({"of": {0: net.state_dict(), "1": {"w": torch.ones(2)}}}, tmp_path / "w.pt")
    found = converters.load(tmp_path / "w.pt", key="of/0").variables["params"]
    assert np.array_equal(found["weight"], net.weight.detach())
    assert fwt.paths(converters.load(tmp_path / "w.pt", key="of/1")) == ["w"]


class Extra(torch.nn.Sequential):
    """A model that keeps more than tensors in its state dict."""

    def __init__(self, extra):
        super().__init__(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        self.extra = extra

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


EXTRA = {
    "none": None, "object": {"scale": 1.5, "seen": [torch.ones(2)]}, "numbers": np.arange(3.0),
    "tensor": torch.arange(3.0), "bytes": torch.zeros(0, dtype=torch.uint8), "text": "v2",
}  # fmt: skip


@pytest.mark.parametrize("name", EXTRA)
@pytest.mark.filterwarnings("ignore:.*left out, since they are no tensors")
def test_the_extra_state_of_a_module_is_no_weight(tmp_path, name):
    model = torch.nn.Sequential(Extra(EXTRA[name]), torch.nn.Linear(2, 5)).eval()
    state = model.state_dict()
    assert "0._extra_state" in state
    torch.save(state, tmp_path / "w.pt")
    torch.save({"model": state, "step": 3}, tmp_path / "c.pt")
    torch.save({n: v for n, v in state.items() if n[0] == "0"}, tmp_path / "a.bin")
    torch.save({n: v for n, v in state.items() if n[0] == "1"}, tmp_path / "b.bin")
    where = {n: "a.bin" if n[0] == "0" else "b.bin" for n in state}
    index = tmp_path / "model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    known = converters.from_torch(model, input_shape=(4,))
    x = np.random.default_rng(0).normal(size=(1, 4)).astype(np.float32)
    wanted = model(torch.from_numpy(x)).detach().numpy()
    files = {"w.pt": {}, "c.pt": {"key": "model"}, index.name: {}}
    for file, how in files.items():
        weights = converters.load(tmp_path / file, **how)
        converters.save(tmp_path / "out.pt", *weights)
        found = torch.load(tmp_path / "out.pt", weights_only=True)
        assert found.keys() | {"0._extra_state"} == state.keys()
        if isinstance(EXTRA[name], torch.Tensor):  # kept as it was
            torch.testing.assert_close(found["0._extra_state"], EXTRA[name])
        for more in ({}, {"match": "order"}, {"strict": False}):
            filled = converters.load(tmp_path / file, architecture=known, **how, **more)
            np.testing.assert_allclose(filled(x), wanted, rtol=1e-5, atol=1e-6)
    fwt.converters.transform(model, fwt.prune(0.5))
    assert model[0].extra is EXTRA[name]
