"""A file or folder with other values of its arrays: all else stays as it is, to the byte. Truth is
what safetensors, NumPy, Flax, Orbax and torch read."""

import errno
import filecmp
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from command import cli, fwt_command
from flax import serialization
from flax.training import train_state

import fwt
from fwt import converters
from fwt.converters import io as _io

RNG = np.random.default_rng(0)
NAMES = ("b.0.weight", "b.0.bias", "a.weight", "a.bias", "norm.weight")


def tensors(dtype=torch.float32):
    shapes = {"b.0.weight": (8, 4), "b.0.bias": (8,), "a.weight": (4, 8), "a.bias": (4,),
              "norm.weight": (4,)}  # fmt: skip
    return {n: torch.from_numpy(RNG.normal(size=s)).to(dtype) for n, s in shapes.items()}


def split(path):
    """The header of a file, as it is and parsed, and the bytes of each tensor."""
    data = path.read_bytes()
    size = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:size])
    parts = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            parts[name] = data[size + start : size + end]
    return data[:size], header, parts


def differing(one, other):
    assert one.keys() == other.keys()
    return {name for name in one if one[name] != other[name]}


def put_in_order(path, order, metadata):
    """A file whose tensors stand in an order that no package writes, with spaces behind the header
    as others pad it."""
    _, header, parts = split(path)
    new, start = {"__metadata__": metadata}, 0
    for name in order:
        new[name] = {**header[name], "data_offsets": [start, start + len(parts[name])]}
        start += len(parts[name])
    shuffled = {name: new[name] for name in ("__metadata__", *sorted(order))}
    text = json.dumps(shuffled).encode()
    text += b" " * (-len(text) % 64)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts[n] for n in order))


@pytest.fixture
def there(tmp_path):
    """A folder as Hugging Face has it, whose weights are in two shards."""
    folder = tmp_path / "Net-1.5"
    folder.mkdir()
    held, where = tensors(torch.bfloat16), {}
    for number, names in ((1, NAMES[:2]), (2, NAMES[2:])):
        shard = f"model-0000{number}-of-00002.safetensors"
        safetensors.torch.save_file({n: held[n] for n in names}, folder / shard, {"format": "pt"})
        where |= dict.fromkeys(names, shard)
    size = sum(x.nbytes for x in held.values())
    told = {"metadata": {"total_size": size, "of": "others"}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(told, indent=2) + "\n")
    (folder / "config.json").write_text('{"model_type": "other",\n "hidden_size": 4}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "original").mkdir()
    (folder / "original" / "params.json").write_text("[1]")
    os.chmod(folder / "tokenizer.json", 0o640)
    (folder / "link.json").symlink_to("config.json")
    return folder


def files(folder):
    """All files below a folder with their bytes, and links with what they say."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_file():
            found[name] = path.read_bytes()
    return found


def nothing_left(folder):
    return not [p for p in folder.iterdir() if p.name.startswith(".fwt")]


def test_a_safetensors_file_keeps_its_order_and_metadata(tmp_path):
    source, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    safetensors.torch.save_file(tensors(), source)
    order = ("norm.weight", "a.weight", "b.0.bias", "b.0.weight", "a.bias")
    put_in_order(source, order, {"made": "by others", "format": "pt"})
    converters.transform(source, lambda model: model, out=out)
    assert filecmp.cmp(source, out, shallow=False)
    converters.transform(source, fwt.prune(0.5, where="a.weight"), out=out)
    before, after = split(source), split(out)
    assert before[0] == after[0]
    assert differing(before[2], after[2]) == {"a.weight"}
    expected = fwt.prune(0.5, where="a.weight")(converters.load(source))
    read = safetensors.numpy.load_file(out)
    np.testing.assert_array_equal(read["a.weight"], expected.variables["params"]["a"]["weight"])


def test_other_shapes_and_dtypes_of_a_safetensors_file(tmp_path):
    """The header says them, and each tensor is aligned to its own width, as torch needs it."""
    source, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    held = {"a": torch.ones(3, dtype=torch.float16), "b": torch.ones(5, dtype=torch.float16)}
    safetensors.torch.save_file(held, source, {"format": "pt", "é": "ü"})

    def wider(model):
        params = model.variables["params"]
        new = {**params, "b": np.arange(5, dtype=np.float64), "a": np.zeros((2, 1), np.float16)}
        return fwt.Model(None, {**model.variables, "params": type(params)(new, params.told)})

    converters.transform(source, wider, out=out)
    read = safetensors.torch.load_file(out)
    assert set(read) == {"a", "b"}
    assert torch.equal(read["b"], torch.arange(5, dtype=torch.float64))
    assert torch.equal(read["a"], torch.zeros(2, 1, dtype=torch.float16))
    assert split(out)[1]["__metadata__"] == {"format": "pt", "é": "ü"}
    assert split(out)[1]["b"]["data_offsets"][0] % 8 == 0


def test_a_tie_in_the_metadata_stays_one(tmp_path):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.embed = torch.nn.Linear(4, 8, bias=False), torch.nn.Embedding(8, 4)
            self.body = torch.nn.Linear(4, 4)
            self.head.weight = self.embed.weight

    source, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    safetensors.torch.save_model(Net(), str(source))
    both = ["head.weight", "embed.weight"]
    converters.transform(source, fwt.prune(0.5, where=both), out=out)
    assert split(source)[0] == split(out)[0]
    net = Net()
    safetensors.torch.load_model(net, str(out))
    assert int((net.head.weight == 0).sum()) == 16
    assert net.head.weight is net.embed.weight

    def apart(model):
        params = dict(model.variables["params"])
        params["head"] = {"weight": params["head"]["weight"] + 1}
        return fwt.Model(None, {"params": params})

    converters.transform(source, apart, out=out)  # which a copy of the file can't say
    assert set(safetensors.numpy.load_file(out)) == {*both, "body.weight", "body.bias"}


def test_a_file_of_ours_stays_in_its_shards(tmp_path):
    model = converters.load(_own(tmp_path))
    converters.save(tmp_path / "s.safetensors", *model, shard_bytes=100)
    half = fwt.prune(0.5)
    converters.transform(tmp_path / "s.safetensors", half, out=tmp_path / "t.safetensors")
    one, other = files(tmp_path / "s.safetensors"), files(tmp_path / "t.safetensors")
    assert one.keys() == other.keys()
    assert one["model.safetensors.index.json"] == other["model.safetensors.index.json"]
    again = converters.load(tmp_path / "t.safetensors")
    assert again.module == model.module
    assert fwt.diff(again, half(model)).equal


def _own(folder):
    import flax.linen as nn

    net = fwt.Sequential([("a", nn.Dense(8)), ("b", nn.Dense(4))], input_shape=(6,))
    path = folder / "own.npz"
    converters.save(path, net, net.init(jax.random.key(0), jnp.ones((1, 6))))
    return path


def test_a_folder_is_copied_with_other_values(there, tmp_path):
    out = tmp_path / "Net-1.5-sparse"
    converters.transform(there, lambda model: model, out=out)
    assert files(there) == files(out)
    assert (out / "tokenizer.json").stat().st_mode & 0o777 == 0o640
    again = tmp_path / "again"
    t = fwt.prune(pattern=fwt.patterns.n_m(2, 4), where="b.0.weight")
    converters.transform(there, t, out=again)
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    assert differing(files(there), files(again)) == {first}
    assert split(there / first)[0] == split(again / first)[0]
    assert differing(split(there / first)[2], split(again / first)[2]) == {"b.0.weight"}
    weight = safetensors.torch.load_file(again / first)["b.0.weight"]
    assert weight.dtype == torch.bfloat16
    before = safetensors.torch.load_file(there / first)["b.0.weight"].float()
    groups = before.abs().reshape(8, 1, 4)
    kept = groups >= groups.sort(-1, descending=True).values[..., 1:2]
    assert torch.equal(weight.float(), torch.where(kept, before.reshape(8, 1, 4), 0).reshape(8, 4))
    assert (again / second).exists()


@pytest.mark.parametrize("verb", ["prune", "initialize", "project"])
def test_commands_copy_a_folder(there, tmp_path, verb):
    how = {"prune": ("--sparsity", "0.5", "--scope", "global"),
           "initialize": ("--initializer", "zeros", "--where", "a.weight"),
           "project": ("--constraint", "unit_norm")}[verb]  # fmt: skip
    code, text = fwt_command(verb, there, f"{tmp_path / 'new'}/", *how)[:2]
    assert code == 0
    changed = differing(files(there), files(tmp_path / "new"))
    assert changed == {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)} - (
        {"model-00001-of-00002.safetensors"} if verb == "initialize" else set()
    )
    assert "b/0/weight" in text
    assert fwt_command("diff", there, there)[0] == 0
    assert fwt_command("diff", there, tmp_path / "new")[0] == 3
    assert fwt_command("inspect", tmp_path / "new")[0] == 0
    # Several folders go into one.
    (tmp_path / "all").mkdir()
    code = fwt_command(verb, there, tmp_path / "new", tmp_path / "all", *how)[0]
    assert code == 0
    assert files(tmp_path / "all" / "Net-1.5") == files(tmp_path / "new")
    # A suffix says a format, and one file is written.
    assert fwt_command(verb, there, tmp_path / "one.safetensors", *how)[0] == 0
    held = safetensors.numpy.load_file(tmp_path / "one.safetensors")
    assert set(held) == set(NAMES)


def test_a_folder_in_its_own_place(there, tmp_path):
    before = files(there)

    def fails(model):
        raise fwt.FwtError("no")

    with pytest.raises(fwt.FwtError, match="no"):
        converters.transform(there, fails, out=there)
    assert files(there) == before
    converters.transform(there, fwt.prune(0.5, where="a.weight"), out=there)
    assert differing(before, files(there)) == {"model-00002-of-00002.safetensors"}
    assert nothing_left(tmp_path)
    (tmp_path / "other").symlink_to("Net-1.5")
    converters.transform(tmp_path / "other", fwt.prune(1.0, where="a.weight"), out=there)
    found = safetensors.torch.load_file(there / "model-00002-of-00002.safetensors")
    assert not found["a.weight"].any()


def test_a_full_disk_leaves_everything_as_it_was(there, tmp_path, monkeypatch):
    before, write, calls = files(there), _io.write_array, []

    def full(file, value):
        calls.append(value)
        if len(calls) % 3 == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, value)

    monkeypatch.setattr(_io, "write_array", full)
    for out in (there, tmp_path / "new"):
        with pytest.raises(fwt.FileFormatError, match="No space left"):
            converters.transform(there, fwt.prune(0.5, where="a.weight"), out=out)
    assert files(there) == before
    assert not (tmp_path / "new").exists()
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("name", ["../out.safetensors", "/etc/passwd", "missing.safetensors", 3])
def test_an_index_that_names_what_is_not_there(there, tmp_path, name):
    safetensors.torch.save_file({"a.weight": torch.ones(4, 8)}, tmp_path / "out.safetensors")
    path = there / "model.safetensors.index.json"
    told = json.loads(path.read_text())
    told["weight_map"]["a.weight"] = name
    path.write_text(json.dumps(told))
    with pytest.raises(fwt.FileFormatError):
        converters.transform(there, fwt.prune(0.5, where="a.weight"), out=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_links_and_what_is_no_file(there, tmp_path):
    away = tmp_path / "elsewhere"
    away.mkdir()
    (away / "vocab.txt").write_text("words")
    (there / "vocab.txt").symlink_to("../elsewhere/vocab.txt")
    (there / "more").symlink_to("../elsewhere")
    (there / "gone").symlink_to("nowhere")
    (there / "whole").symlink_to(away / "vocab.txt")
    out = tmp_path / "deep" / "er" / "new"
    out.parent.mkdir(parents=True)
    converters.transform(there, fwt.prune(0.5, where="a.weight"), out=out)
    assert (out / "vocab.txt").is_symlink()
    assert (out / "vocab.txt").read_text() == "words"
    assert (out / "more" / "vocab.txt").read_text() == "words"
    assert os.readlink(out / "gone") == "nowhere"
    assert os.readlink(out / "link.json") == "config.json"
    os.mkfifo(there / "pipe")
    with pytest.raises(fwt.FileFormatError, match="pipe: a special file"):
        converters.transform(there, fwt.prune(0.5, where="a.weight"), out=tmp_path / "other")


def test_a_snapshot_in_the_cache_of_hugging_face(there, tmp_path):
    """Its files are links to others, which come along."""
    cache, before = tmp_path / "hub" / "models--net", files(there)
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots").mkdir()
    for number, path in enumerate(p for p in sorted(there.iterdir()) if p.is_file()):
        if not path.is_symlink():
            path.rename(cache / "blobs" / str(number))
            path.symlink_to(f"../../blobs/{number}")
    source = there.rename(cache / "snapshots" / "abc")
    out = tmp_path / "new"
    converters.transform(source, fwt.prune(0.5, where="a.weight"), out=out)
    assert differing(before, files(out)) == {"model-00002-of-00002.safetensors"}
    assert not (out / "config.json").is_symlink()
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.json").symlink_to("../../blobs/nothing")
    converters.transform(source, lambda model: model, out=tmp_path / "other")
    assert (tmp_path / "other" / "tokenizer.json").is_symlink()


def test_a_folder_that_is_in_the_way(there, tmp_path):
    t = fwt.prune(0.5, where="a.weight")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("two years")
    with pytest.raises(fwt.FileFormatError, match="other things is in the way"):
        converters.transform(there, t, out=tmp_path / "mine")
    for out in (there / "inner", tmp_path):
        with pytest.raises(fwt.FileFormatError, match="inside the other"):
            converters.transform(there, t, out=out)
    (tmp_path / "empty").mkdir()
    for _ in range(2):  # what came of it before is replaced
        converters.transform(there, t, out=tmp_path / "empty")
    assert files(there).keys() == files(tmp_path / "empty").keys()


def test_two_copies_of_one_model(there, tmp_path):
    """transformers would take the file before the shards; other copies stay, and are named."""
    (there / "original" / "consolidated.pth").write_bytes(b"")
    (there / "optimizer.bin").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"stay as they are: original/consolidated\.pth$"):
        converters.transform(there, fwt.prune(0.5, where="a.weight"), out=tmp_path / "new")
    safetensors.torch.save_file(tensors(), there / "model.safetensors")
    with pytest.raises(fwt.FileFormatError, match="two copies of one model"):
        converters.transform(there, fwt.prune(0.5, where="a.weight"), out=tmp_path / "other")


def test_what_a_folder_can_not_become(there, tmp_path):
    out, t = tmp_path / "new", fwt.prune(0.5, where="a.weight")
    for how in ({"rename": {"a": "c"}}, {"drop": ["norm.**"]}, {"dtype": "float32"}):
        name = next(iter(how))
        with pytest.raises(
            fwt.ConversionError, match=rf"{name}= makes other arrays.*new\.safetensors"
        ):
            converters.transform(there, lambda model: model, out=out, **how)
    words = ("prune", there, out, "--sparsity", 0.5, "--drop", "norm.weight")
    assert "--drop makes other arrays" in cli(*words, cwd=tmp_path, code=1).stderr

    def less(model):
        params = dict(model.variables["params"])
        del params["norm"]
        return fwt.Model(None, {"params": params})

    with pytest.raises(fwt.ConversionError, match=r"norm\.weight is in it, and not among"):
        converters.transform(there, less, out=out)
    assert not out.exists()
    converters.save(out, *t(converters.load(there)), source=there)  # what transform does
    assert differing(files(there), files(out)) == {"model-00002-of-00002.safetensors"}

    def larger(model):
        params = dict(model.variables["params"])
        params["norm"] = {"weight": np.ones((2, 6), np.float32)}
        return fwt.Model(None, {"params": params})

    converters.transform(there, larger, out=out)
    told = json.loads((out / "model.safetensors.index.json").read_text())
    assert told["metadata"] == {"total_size": 2 * (32 + 8 + 32 + 4) + 48, "of": "others"}


@pytest.mark.parametrize("shards", [False, True])
def test_a_folder_of_torch_files(tmp_path, shards):
    folder, out = tmp_path / "net", tmp_path / "new"
    folder.mkdir()
    held = tensors()
    held["head.weight"] = held["b.0.weight"]
    (folder / "config.json").write_text("{}")
    names = [*held]
    if shards:
        where = {}
        for i, own in enumerate((names[:3], names[3:])):
            torch.save({n: held[n] for n in own}, folder / f"pytorch_model-{i}.bin")
            where |= dict.fromkeys(own, f"pytorch_model-{i}.bin")
        told = {"metadata": {}, "weight_map": where}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(told))
    else:
        torch.save(held, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    converters.transform(folder, fwt.prune(0.5, where=["a.weight"]), out=out)
    read = {}
    for path in sorted(out.glob("*.bin")):
        read |= torch.load(path)
    assert list(read) == names
    assert {n for n in names if not torch.equal(read[n], held[n])} == {"a.weight"}
    assert int((read["a.weight"] == 0).sum()) == 16
    one = read["head.weight"].data_ptr() == read["b.0.weight"].data_ptr()
    assert one == (not shards)

    def cut(model):
        return jax.tree.map(lambda x: x[:1], model)

    with pytest.raises(fwt.ConversionError, match=r"is float32.*became"):
        converters.transform(folder, cut, out=tmp_path / "cut")
    assert not (tmp_path / "cut").exists()


# -- the parts of a train state ---------------------------------------------------------------


def state():
    keys = jax.random.split(jax.random.key(0), 2)
    params = {
        "dense": {"kernel": jax.random.normal(keys[0], (8, 4)), "bias": jnp.zeros(4)},
        "blocks": [
            {"kernel": jax.random.normal(keys[1], (3, 3), jnp.bfloat16)},
            {"n": jnp.ones(2)},
        ],
    }
    return train_state.TrainState.create(apply_fn=None, params=params, tx=optax.adam(1e-3)).replace(
        step=7
    )


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.asarray(a).dtype == np.asarray(b).dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("key", ["params", None])
def test_a_msgpack_file_keeps_the_rest(tmp_path, key):
    whole = state()
    source, out = tmp_path / "a.msgpack", tmp_path / "b.msgpack"
    tree = whole if key else whole.params
    source.write_bytes(serialization.to_bytes(tree))
    converters.transform(source, lambda model: model, out=out, key=key)
    assert filecmp.cmp(source, out, shallow=False)
    half = fwt.prune(0.5)
    converters.transform(source, half, out=out, key=key)
    read = serialization.from_bytes(tree, out.read_bytes())
    same(read, whole.replace(params=half(whole.params)) if key else half(whole.params))

    def other(model):
        params = dict(model.variables["params"])
        params["dense"] = {"kernel": np.ones((2, 300), np.float16), "bias": np.zeros(300)}
        return fwt.Model(None, {"params": params})

    converters.transform(source, other, out=out, key=key)
    read = serialization.msgpack_restore(out.read_bytes())
    dense = (read["params"] if key else read)["dense"]
    assert (dense["kernel"].dtype, dense["kernel"].shape) == (np.float16, (2, 300))
    assert np.array_equal(dense["bias"], np.zeros(300))
    assert not key or read["step"] == 7


def test_a_large_array_of_msgpack_stays_in_its_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 40)
    held = {"step": 3, "params": {"d": {"kernel": np.arange(64, dtype=np.float32).reshape(8, 8)}}}
    source, out = tmp_path / "a.msgpack", tmp_path / "b.msgpack"
    source.write_bytes(serialization.msgpack_serialize(held))
    assert b"__msgpack_chunked_array__" in source.read_bytes()
    converters.transform(source, fwt.prune(0.5), out=out, key="params")
    assert len(source.read_bytes()) == len(out.read_bytes())
    read = serialization.msgpack_restore(out.read_bytes())
    assert read["step"] == 3
    same(read["params"], fwt.prune(0.5)(held["params"]))


def test_several_parts_of_a_train_state(tmp_path):
    held = {"params": {"d": {"kernel": np.arange(8.0, dtype=np.float32).reshape(4, 2)}},
            "batch_stats": {"n": {"mean": np.ones(2, np.float32)}},
            "opt": {"m": np.ones(3)}, "step": 3}  # fmt: skip
    source, out = tmp_path / "a.msgpack", tmp_path / "b.msgpack"
    source.write_bytes(serialization.msgpack_serialize(held))
    converters.transform(source, fwt.prune(0.5), out=out, key=("params", "batch_stats"))
    same(
        serialization.msgpack_restore(out.read_bytes()),
        {**held, "params": fwt.prune(0.5)(held["params"])},
    )


@pytest.mark.parametrize("packed", [False, True])
def test_an_npz_file_keeps_the_rest(tmp_path, packed):
    held = {"params/d/kernel": RNG.normal(size=(4, 6)).astype(np.float32),
            "params/d/turned": np.asfortranarray(RNG.normal(size=(4, 6)).astype(np.float32)),
            "params/d/big": np.arange(3, dtype=">i4"), "opt/m": RNG.normal(size=5),
            "step": 3}  # fmt: skip
    source, out = tmp_path / "a.npz", tmp_path / "b.npz"
    (np.savez_compressed if packed else np.savez)(source, **held)
    converters.transform(source, fwt.prune(0.5, where="d/kernel"), out=out, key="params")
    with np.load(source) as before, np.load(out) as after:
        assert list(before) == list(after)
        assert {n for n in before if not np.array_equal(before[n], after[n])} == {"params/d/kernel"}
        assert int((after["params/d/kernel"] == 0).sum()) == 12
        assert after["params/d/big"].dtype == ">i4"
        assert np.isfortran(after["params/d/turned"])
    assert out.stat().st_size < source.stat().st_size * 1.05


def test_what_a_key_can_not_keep_is_said(tmp_path):
    source, out = tmp_path / "a.npz", tmp_path / "b.npz"
    np.savez(source, **{"params/a": np.ones((2, 2), np.float32), "opt/m": np.ones(3)})

    def half(model):
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)

    with pytest.warns(UserWarning, match="only the part under key= is written: .*bfloat16"):
        converters.transform(source, half, out=out, key="params")


@pytest.mark.parametrize("kind", ["ocdbt", "folders", "zarr3"])
def test_a_step_of_orbax_keeps_the_rest(tmp_path, kind):
    whole = state()
    tree = {"params": whole.params, "opt": whole.opt_state, "step": 7, "note": "text", "no": None}
    how = {"ocdbt": {}, "folders": {"use_ocdbt": False}, "zarr3": {"use_zarr3": True}}[kind]
    handler = ocp.PyTreeCheckpointHandler(**how)
    with ocp.Checkpointer(
        ocp.CompositeCheckpointHandler(state=handler, extra=ocp.JsonCheckpointHandler())
    ) as saver:
        saver.save(
            tmp_path / "run" / "10",
            ocp.args.Composite(
                state=ocp.args.PyTreeSave(tree), extra=ocp.args.JsonSave({"epoch": 2})
            ),
        )
    source, out, t = tmp_path / "run" / "10", tmp_path / "out", fwt.prune(0.5)
    converters.transform(source, t, out=out, key="state/params")
    own = {p.relative_to(source): p.read_bytes() for p in source.rglob("*") if p.is_file()}
    kept = ("_METADATA", "_sharding", "_CHECKPOINT_METADATA", "metadata", "process_0")
    assert {p.name for p in own} >= {*kept, "_strings.json"}
    for name, data in own.items():
        assert name.name not in (*kept, "_strings.json") or (out / name).read_bytes() == data
    with ocp.PyTreeCheckpointer() as reader:
        before, after = reader.restore(source / "state"), reader.restore(out / "state")
    same(after, {**before, "params": t(before["params"])})
    assert type(after["params"]["dense"]["kernel"]) is type(before["params"]["dense"]["kernel"])
    assert json.loads((out / "extra" / "metadata").read_text()) == {"epoch": 2}
    converters.transform(source, t, out=source, key="state/params")
    with ocp.PyTreeCheckpointer() as reader:
        same(reader.restore(source / "state"), after)
    assert nothing_left(tmp_path / "run")
    with pytest.raises(fwt.ConversionError, match="became"):
        converters.transform(
            source,
            lambda m: jax.tree.map(lambda x: x[:1], m),
            out=tmp_path / "x",
            key="state/params",
        )


def test_a_manager_of_orbax_restores_the_step(tmp_path):
    whole = state()
    tree = {"params": whole.params, "opt": whole.opt_state, "step": 7}
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        for step in (9, 10):
            manager.save(step, args=ocp.args.StandardSave(tree))
    words = ("--sparsity", 0.5, "--key", "10/params")
    assert fwt_command("prune", tmp_path / "run", tmp_path / "new", *words)[0] == 0
    template = jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
    with ocp.CheckpointManager(tmp_path / "new") as manager:
        assert manager.all_steps() == [9, 10]
        same(manager.restore(9, args=ocp.args.StandardRestore(template)), tree)
        half = {**tree, "params": fwt.prune(0.5)(whole.params)}
        same(manager.restore(10, args=ocp.args.StandardRestore(template)), half)


@pytest.mark.parametrize("end", [".ckpt", ".pth.tar"])
def test_a_checkpoint_of_a_run_is_edited(end, tmp_path):
    path, net = tmp_path / f"run{end}", torch.nn.Linear(5, 4)
    run = {"state_dict": net.state_dict(), "epoch": 3, "hparams": {"lr": 0.1}}
    torch.save(run, path)
    for target in (path, tmp_path / f"other{end}"):
        converters.transform(path, fwt.prune(0.5), out=target, key="state_dict")
        found = torch.load(target, weights_only=False)
        assert (found["epoch"], found["hparams"]) == (3, {"lr": 0.1})
        assert int((found["state_dict"]["weight"] == 0).sum()) == 10
    with pytest.raises(fwt.FileFormatError, match="only written as a copy of one of torch"):
        converters.save(path, None, {"params": {"weight": np.ones((2, 2))}})
