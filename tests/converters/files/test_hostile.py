"""Attacks on the readers, one by hand for each way in, and mutants; saves that are killed."""

import contextlib
import io
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
import zlib

import flax.linen as nn
import fuzz
import h5py
import keras
import numpy as np
import pytest
from file_cases import DENSE, image_net, kernel, pt, random_model, tensor_pickle, write_keras
from marks import DRAWS, thorough_but

import fwt
from fwt import converters

MUTANTS = 100 * DRAWS
FORMATS = (
    *("keras", "Keras weights", "Keras HDF5", "torch", "safetensors", "NumPy", "msgpack", "Orbax"),
    *("safetensors in shards", "Keras weights in shards"),
)
QUICK = ("keras", "torch", "safetensors", "msgpack")  # a process for each format takes a second


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    fuzz.prepared(folder)
    return folder


@pytest.mark.parametrize(
    ("count", "name"),
    thorough_but(
        lambda case: case[0] == 20, [*((20, n) for n in QUICK), *((MUTANTS, n) for n in FORMATS)]
    ),
)
def test_mutants_load_or_are_refused(originals, name, count):
    """What crashes, hangs, takes too much memory or raises anything else is listed."""
    counts, failures = fuzz.run(name, 0, count, str(originals))
    assert failures == []
    assert counts["loaded"] + counts["refused"] == count
    assert min(counts["loaded"], counts["refused"]) > count // 100


@pytest.mark.parametrize(
    ("count", "name"),
    thorough_but(
        lambda case: case[0] == 20,
        [*((20, n) for n in ("torch", "safetensors")), *((MUTANTS, n) for n in FORMATS)],
    ),
)
def test_mutants_are_edited_as_they_are_read(originals, name, count):
    """What is written is what the transform makes of what is read, or there is nothing."""
    counts, failures = fuzz.run(name, 0, count, str(originals), edit=True)
    assert failures == []
    assert counts["loaded"] + counts["refused"] == count
    assert counts["refused"] > count // 100


def test_every_format_has_mutants(originals):
    from fwt.converters.files import formats

    assert set(json.loads((originals / "originals.json").read_text())) == {
        f.name for f in formats.FORMATS
    }


def refused(path, said, **how):
    before = sorted(str(p) for p in path.parent.rglob("*"))
    with pytest.raises(converters.FileFormatError, match=said):
        converters.load(path, **how)
    assert sorted(str(p) for p in path.parent.rglob("*")) == before  # nothing was written


# -- configs that name code -------------------------------------------------------------------


def layer(kind, module="keras.layers", registered=None, **config):
    entry = {
        "class_name": kind,
        "module": module,
        "config": {"name": "d", **config},
        "registered_name": registered,
    }
    return {
        "class_name": "Sequential",
        "config": {"layers": [entry], "build_input_shape": [None, 3]},
    }


CODE = {
    "Lambda": layer("Lambda", function={"class_name": "__lambda__", "config": {"code": "4wA="}}),
    "TFSMLayer": layer("TFSMLayer", filepath="saved", call_endpoint="serve"),
    "another module": layer("Popen", module="subprocess", args=["touch", "x"]),
    "a function of Keras": layer("get_file", module="keras.utils", origin="http://x"),
    "an operation": layer("Add", module="keras.src.ops.numpy"),
    "registered": layer("Thing", registered="package>Thing"),
    "torch": layer("TorchModuleWrapper", module_config="x"),
    "activation": layer(
        "Dense",
        units=2,
        activation={
            "class_name": "function",
            "module": "os",
            "config": "system",
            "registered_name": "system",
        },
    ),
    "a wrapped Lambda": layer(
        "TimeDistributed",
        layer={
            "class_name": "Lambda",
            "module": "keras.layers",
            "config": {"name": "l"},
            "registered_name": None,
        },
    ),
}


@pytest.mark.parametrize("name", CODE)
def test_no_config_names_code(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    weights = kernel(data=np.ones((3, 2), np.float32))
    write_keras(tmp_path / "x.keras", CODE[name], weights)
    why = "can't be converted|custom|function of the user|has no row|wraps Lambda"
    refused(tmp_path / "x.keras", why)
    with h5py.File(tmp_path / "x.h5", "w") as file:  # which once ignored safe_mode
        file.attrs["model_config"], file.attrs["keras_version"] = json.dumps(CODE[name]), "3.0"
        file.create_group("model_weights").attrs["layer_names"] = [b"d"]
        file["model_weights"].create_group("d").attrs["weight_names"] = np.zeros(0)
    refused(tmp_path / "x.h5", f"{why}|d holds")


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@pytest.mark.parametrize("kind", ["Module", "Lambda", "system", "Sequential2", "__class__"])
def test_no_architecture_names_code(tmp_path, suffix, kind):
    net = random_model(image_net())
    converters.save(tmp_path / f"net{suffix}", *net)
    data = (tmp_path / f"net{suffix}").read_bytes()
    if suffix == ".npz":
        out = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
            for info in old.infolist():
                new.writestr(info, old.read(info).replace(b'"Conv"', f'"{kind}"'.encode()))
        data = out.getvalue()
    else:
        size = int.from_bytes(data[:8], "little")
        header = data[8 : 8 + size].replace(b'\\"Conv\\"', f'\\"{kind}\\"'.encode())
        data = len(header).to_bytes(8, "little") + header + data[8 + size :]
    (tmp_path / f"net{suffix}").write_bytes(data)
    refused(tmp_path / f"net{suffix}", f"'{kind}' is not known|belongs to no layer")


@contextlib.contextmanager
def in_time():
    """Stops what would take ages, long after what it should take."""

    def late(*_):
        raise AssertionError("it takes ages")

    held = signal.signal(signal.SIGALRM, late)
    signal.alarm(120)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, held)


# -- pickles ----------------------------------------------------------------------------------


def test_pickles_that_grow_are_refused_in_time(tmp_path):
    laughs = b"\x80\x02)q\x00" + b"".join(
        b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(120)
    )
    for name, data in {
        "a key": b"\x80\x02}" + laughs[2:] + b"K\x01s.",
        "a value": b"\x80\x02}X\x01\0\0\0a" + laughs[2:] + b"s.",
        "a storage": laughs + b"Q.",
    }.items():
        (tmp_path / f"{name}.pt").write_bytes(pt(data))
        with in_time():
            refused(tmp_path / f"{name}.pt", "repeats others|a pickle memo|truncated|not a")


def test_pickles_that_call_or_change_things_are_refused(tmp_path):
    from fwt.converters.files import torch_pickle

    name = b"X\x01\0\0\0w"
    bad = {
        "eval": b"cbuiltins\neval\n" + name + b"\x85R",
        "getattr": b"cbuiltins\ngetattr\n(" + name + name + b"tR",
        "another of torch": b"ctorch.hub\nload\n" + name + b"\x85R",
        "jit": b"ctorch.jit._pickle\nrestore_type_tag\n" + name + b"\x85R",
        "numpy": b"cnumpy.core.multiarray\n_reconstruct\n" + name + b"\x85R",
        "an instance": b"(ios\nsystem\n",
        "an object": b"cos\nsystem\n" + name + b"\x85\x81",
        "an extension": b"\x82\x01",
        "a set": b"\x8f",
        "a state": b"ctorch._utils\n_rebuild_tensor_v2\n}" + name + name + b"sb",
        "a state of a dtype": b"ctorch\nFloatStorage\n}" + name + name + b"sb",
        "an item of a list": b"]K\x00" + name + b"s",
        "an item of a number": b"K\x01K\x00" + name + b"s",
        "no dict": b"]" + name + b"a",
    }
    for what, data in bad.items():
        (tmp_path / "x.pt").write_bytes(pt(b"\x80\x02}" + name + data + b"s."))
        with pytest.raises(converters.FileFormatError):
            converters.load(tmp_path / "x.pt")
        assert what
    assert not vars(torch_pickle._Unpickler._tensor_v2)


def test_a_small_torch_file_can_not_ask_for_much(tmp_path):
    for count in (2**31 - 1, 6):
        state = tensor_pickle(count, (2**31 - 1, 25), (25, 1))
        (tmp_path / "x.pt").write_bytes(pt(state, [b"\0" * 24]))
        refused(tmp_path / "x.pt", "storage 0 has 24 bytes|is larger than its storage")
    shared = tensor_pickle(250_000, (250_000,), (1,))
    body = b"".join(b"X\x04\0\0\0" + b"%04d" % i + shared[9:-2] for i in range(400))
    many = b"\x80\x02}" + body.replace(b"R" + b"X", b"RsX") + b"s."
    (tmp_path / "many.pt").write_bytes(pt(many, [b"\0" * 10**6]))
    refused(tmp_path / "many.pt", "more than such a file may hold|not a readable")


def test_torchs_tar_and_foreign_pickles_are_told_by_name(tmp_path):
    import pickle
    import tarfile

    (tmp_path / "old.pt").write_bytes(pickle.dumps({"a": 1}, 2))
    refused(tmp_path / "old.pt", "a pickle that torch.save did not write")
    with tarfile.open(tmp_path / "t.pt", "w") as tar:
        tar.add(tmp_path / "old.pt", "pickle")
    refused(tmp_path / "t.pt", "torch's oldest format, a tar archive")


def deflated(path, members, zeros=300_000_000):
    """An archive whose last member goes on with so many zeros."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, start in members.items():
            with archive.open(name, "w") as stream:
                stream.write(start)
                for _ in range(zeros >> 20 if name == list(members)[-1] else 0):
                    stream.write(bytes(1 << 20))


def test_what_is_no_hdf5_is_not_decompressed(tmp_path):
    net = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    net.save(tmp_path / "net.keras")
    with zipfile.ZipFile(tmp_path / "net.keras") as archive:
        held = {n: archive.read(n) for n in archive.namelist()}
    weights = held.pop("model.weights.h5")
    assert weights[8] == 0  # such a superblock has the file's end at 40, its root group at 64
    rootless = struct.pack("<QQQQ", 299_000_000, 2**64 - 1, 0, 96)
    cases = {
        "no HDF5": {**held, "model.weights.h5": b""},
        "without a root group": {**held, "model.weights.h5": weights[:40] + rootless},
        "of which HDF5 uses": {**held, "model.weights.h5": weights},
        "of JSON": {"model.weights.h5": weights, "config.json": b"{"},
        "no array of NumPy": {"a.npy": b"PK"},
    }
    for why, members in cases.items():
        path = tmp_path / ("w.npz" if "a.npy" in members else "w.keras")
        deflated(path, members)
        tracemalloc.start()
        refused(path, why)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 100_000_000 + path.stat().st_size, why


# -- archives ---------------------------------------------------------------------------------


def test_archives_that_lie_or_climb(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bomb = np.zeros(1 << 24)
    np.savez_compressed(tmp_path / "bomb.npz", a=bomb, b=bomb)
    refused(
        tmp_path / "bomb.npz",
        r"max_bytes=200,000,000 once decompressed; load\(path, max_b",
        max_bytes=200_000_000,
    )
    assert converters.load(tmp_path / "bomb.npz", max_bytes=1 << 29).variables["params"]["a"].size
    pruned = np.zeros((1000, 1000), np.float32)
    pruned[::7, ::9] = 1.5  # honest weights, compressed far
    np.savez_compressed(tmp_path / "pruned.npz", w=pruned)
    assert np.array_equal(converters.load(tmp_path / "pruned.npz").variables["params"]["w"], pruned)

    data = bytearray((tmp_path / "bomb.npz").read_bytes())
    at = data.rfind(b"PK\x01\x02")
    data[at + 24 : at + 28] = struct.pack("<I", 0xFFFFFFF0)
    (tmp_path / "lie.npz").write_bytes(data)
    refused(tmp_path / "lie.npz", "no compression does that|truncated|declares|not a readable")

    for name in ("../up.npy", "/abs.npy", "a\\..\\b.npy"):
        with zipfile.ZipFile(tmp_path / "climb.npz", "w") as archive:
            header = io.BytesIO()
            np.save(header, np.ones(2))
            archive.writestr(name, header.getvalue())
        with contextlib.suppress(converters.FileFormatError):
            converters.load(tmp_path / "climb.npz")
        assert not (tmp_path.parent / "up.npy").exists()

    with zipfile.ZipFile(tmp_path / "packed.keras", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("config.json", json.dumps(DENSE))
        archive.writestr("model.weights.h5", b"")
    refused(tmp_path / "packed.keras", "compressed in an unknown way")
    write_keras(tmp_path / "locked.keras", DENSE, kernel(data=np.ones((3, 2), np.float32)))
    data = bytearray((tmp_path / "locked.keras").read_bytes())
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = 0
        while (start := data.find(mark, start)) >= 0:
            data[start + at] |= 1
            start += 4
    (tmp_path / "locked.keras").write_bytes(data)
    refused(tmp_path / "locked.keras", "encrypted")


def test_npz_of_objects_and_lies(tmp_path):
    np.savez(tmp_path / "o.npz", a=np.array([{"a": 1}], dtype=object))
    refused(tmp_path / "o.npz", "holds objects, text or bytes")
    with zipfile.ZipFile(tmp_path / "p.npz", "w") as archive:
        archive.writestr("a.npy", b"\x93NUMPY\x01\x00v\x00" + pickle.dumps(os.system))
    refused(tmp_path / "p.npz", "not a readable|header")
    for shape in ("(99999999999, 999999)", "(-1, 2)", "(2**60,)", "(2,)"):
        text = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
        with zipfile.ZipFile(tmp_path / "s.npz", "w") as archive:
            archive.writestr("a.npy", b"\x93NUMPY\x01\x00v\x00" + text.encode() + b"\0" * 24)
        refused(tmp_path / "s.npz", "has 24 bytes|not a readable")


# -- HDF5 -------------------------------------------------------------------------------------


def test_hdf5_that_points_elsewhere_or_to_itself(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    with h5py.File(outside / "o.h5", "w") as file:
        file["secret"] = np.ones((3, 2), np.float32)
    (outside / "raw").write_bytes(b"\1" * 24)

    def external(group):
        group["0"] = h5py.ExternalLink(str(outside / "o.h5"), "secret")

    def soft(group):
        group["0"] = h5py.SoftLink("/there")

    def raw(group):
        group.create_dataset("0", (3, 2), "f4", external=[(str(outside / "raw"), 0, 24)])

    def virtual(group):
        layout = h5py.VirtualLayout((3, 2), "f4")
        layout[:] = h5py.VirtualSource(str(outside / "o.h5"), "secret", shape=(3, 2))
        group.create_virtual_dataset("0", layout)

    def cycle(group):
        group["again"] = group
        group["more"] = group.parent

    def twice(group):
        group["0"] = np.ones(3)
        group["1"] = group["0"]

    def bomb(group):
        group.create_dataset("0", (1 << 40, 1 << 10), "f4", chunks=(1 << 10, 1))

    def late(group):
        group.create_dataset("0", (1 << 30,), "f4")

    def zeros(group):
        group.create_dataset("0", data=np.zeros(1 << 22), compression="gzip", compression_opts=9)

    def text(group):
        group["0"] = "text"

    def compound(group):
        group.create_dataset("0", (3,), np.dtype([("a", "f4"), ("b", "i4")]))

    def reference(group):
        group.create_dataset("0", (3,), h5py.ref_dtype)

    said = {
        external: "outside",
        soft: "outside",
        raw: "outside",
        virtual: "outside",
        cycle: "twice",
        twice: "twice",
        bomb: "no compression",
        late: "no compression",
        text: "dtype",
        compound: "what it means|dtype",
        reference: "dtype",
        zeros: "max_bytes",
    }
    for attack, why in said.items():
        for suffix in (".weights.h5", ".h5"):
            path = tmp_path / f"x{suffix}"
            with h5py.File(path, "w") as file:
                file["there"] = np.ones(3)
                if suffix == ".h5":
                    group = file.create_group("d")
                    file.attrs["layer_names"] = [b"d"]
                    group.attrs["weight_names"] = [b"0"]
                else:
                    group = file.create_group("layers/dense/vars")
                attack(group)
            if suffix == ".h5" and attack in (cycle, twice):
                continue  # it reads what its lists name
            refused(path, why, max_bytes=1 << 24)


def test_texts_of_hdf5_that_lie(tmp_path):
    net = random_model(image_net())
    converters.save(tmp_path / "a.h5", *net)
    data = (tmp_path / "a.h5").read_bytes()
    heap = data.index(b"GCOL")
    for at, value in ((heap + 8, 2**63), (heap + 24, 0), (heap + 24, 2**64 - 16), (heap + 16, 0)):
        broken = bytearray(data)
        broken[at : at + 8] = struct.pack("<Q", value)
        (tmp_path / "b.h5").write_bytes(broken)
        with contextlib.suppress(converters.FileFormatError):
            converters.load(tmp_path / "b.h5")
    with h5py.File(tmp_path / "n.h5", "w") as file:
        file.attrs["layer_names"] = np.arange(3)
    refused(tmp_path / "n.h5", "layer_names is no text")


# -- folders, shards, msgpack, safetensors ----------------------------------------------------


def test_indices_and_folders_that_point_elsewhere(tmp_path):
    net = random_model(image_net())
    converters.save(tmp_path / "s.safetensors", *net, shard_bytes=300)
    converters.save(tmp_path / "w.weights.h5", *net, shard_bytes=300)
    converters.save(tmp_path / "o.orbax", *net)
    (tmp_path / "secret.safetensors").write_bytes(b"secret")
    index = next((tmp_path / "s.safetensors").glob("*.json"))
    told = index.read_text()
    shard = sorted((tmp_path / "s.safetensors").glob("*-of-*"))[0]
    for name in ("../secret.safetensors", "/etc/passwd", ".", "", "..", ".hidden"):
        index.write_text(told.replace(shard.name, name))
        refused(index, "no file beside it")
    index.write_text(told)
    shutil.move(shard, tmp_path / "moved")
    refused(index, "missing beside it, or a link")
    shard.symlink_to(tmp_path / "moved")
    refused(index, "missing beside it, or a link")
    shard.unlink()
    shutil.move(tmp_path / "moved", shard)
    index.write_text(told.replace('"params/conv/kernel"', '"params/conv/other"'))
    refused(index, "stands in one of the index and")
    index.write_text('{"weight_map": ' + "[" * 100_000)
    refused(index, "not a readable")

    where = tmp_path / "w.weights.h5" / "model.weights.json"
    told = where.read_text()
    where.write_text(told.replace("model_00000", "../model_00000"))
    refused(where, "no file beside it")

    piece = max(
        (p for p in (tmp_path / "o.orbax").rglob("*") if p.is_file()),
        key=lambda p: p.stat().st_size,
    )
    shutil.move(piece, tmp_path / "chunk")
    piece.symlink_to(tmp_path / "chunk")
    refused(tmp_path / "o.orbax", "a link or special file")
    piece.unlink()
    os.mkfifo(piece)
    refused(tmp_path / "o.orbax", "a link or special file")


def test_orbax_is_held_to_max_bytes(tmp_path):
    converters.save(tmp_path / "z.orbax", None, {"params": {"a": np.zeros(1 << 22)}})
    refused(tmp_path / "z.orbax", "max_bytes=1,000,000", max_bytes=1_000_000)
    assert converters.load(tmp_path / "z.orbax").variables["params"]["a"].size == 1 << 22


def test_msgpack_and_safetensors_that_lie(tmp_path):
    for data in (
        b"\xdf\xff\xff\xff\xff",
        b"\x81\xa1a\xdd\xff\xff\xff\xff",
        b"\x81\xa1a\xc6\xff\xff\xff\xff",
        b"\x81\xa1a" + b"\x91" * 5000 + b"\xc0",
        b"\x81\xa1a\xc7\x05\x07hello",
        b"\x81\xc0\xc0",
        b"\x81\xa1a\xc7\x03\x02abc",
        b"\x81\xa1a\xc1",
        b"\x81\xa1a\xc0junk",
    ):
        (tmp_path / "x.msgpack").write_bytes(data)
        refused(tmp_path / "x.msgpack", "")

    def safetensors(header, body=b""):
        raw = header if isinstance(header, bytes) else json.dumps(header).encode()
        (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + body)
        refused(tmp_path / "x.safetensors", "")

    one = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    safetensors({"a": one}, b"\0" * 4)
    safetensors({"a": one}, b"\0" * 12)
    safetensors({"a": one, "b": {**one, "data_offsets": [4, 12]}}, b"\0" * 12)
    safetensors({"a": {**one, "shape": [1 << 62, 4]}}, b"\0" * 8)
    safetensors({"a": {**one, "dtype": "F99"}}, b"\0" * 8)
    safetensors(
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],'
        b'"data_offsets":[0,8]}}',
        b"\0" * 8,
    )
    safetensors(b"{" * 1000)


# -- what two readers of the code found -------------------------------------------------------


def test_hdf5_texts_and_chunks_that_grow_are_refused(tmp_path):
    with h5py.File(tmp_path / "t.h5", "w") as file:
        file.attrs["layer_names"] = ["x" * 60_000] + [f"n{i}" for i in range(2_000)]
    data = bytearray((tmp_path / "t.h5").read_bytes())
    length = struct.pack("<I", 60_000)
    places = [i for i in range(len(data) - 16) if data[i : i + 4] == length]
    heaps = {i: int.from_bytes(data[i + 4 : i + 12], "little") for i in places}
    first = next(i for i, heap in heaps.items() if data[heap : heap + 4] == b"GCOL")
    data[first : first + 16 * 2_001] = data[first : first + 16] * 2_001
    (tmp_path / "t.h5").write_bytes(data)
    with in_time():
        refused(tmp_path / "t.h5", "more than such a file may hold")

    with h5py.File(tmp_path / "c.weights.h5", "w") as file:
        how = {"maxshape": (None,), "chunks": (1 << 24,), "compression": "gzip"}
        file.create_dataset("layers/dense/vars/0", data=np.ones(2, np.float32), **how)
    refused(tmp_path / "c.weights.h5", "a chunk of .* max_bytes", max_bytes=1 << 20)
    with h5py.File(tmp_path / "d.weights.h5", "w") as file:
        made = file.create_dataset("w", (1000,), "f4", chunks=(1000,), compression="gzip")
        made.id.write_direct_chunk((0,), zlib.compress(bytes(1 << 24)))
    refused(tmp_path / "d.weights.h5", "a chunk of w has another size", max_bytes=1 << 20)
    with h5py.File(tmp_path / "l.weights.h5", "w") as file:
        file.create_dataset("w", data=np.ones(1000), compression="lzf")
    refused(tmp_path / "l.weights.h5", "compressed in an unknown way")
    with h5py.File(tmp_path / "g.weights.h5", "w") as file:
        how = {"compression": "gzip", "shuffle": True, "chunks": (7, 3)}
        file.create_dataset("w", data=np.arange(90.0).reshape(9, 10), **how)
        file.create_dataset("empty", (0,))
    found = converters.load(tmp_path / "g.weights.h5").variables["params"]
    assert np.array_equal(found["w"], np.arange(90.0).reshape(9, 10))
    assert found["empty"].shape == (0,)
    for how in ({"compression": "gzip"}, {"shuffle": True}, {}):
        with h5py.File(tmp_path / "g.weights.h5", "w") as file:
            file.create_dataset(
                "w", data=np.arange(90, dtype=">i4").reshape(9, 10), chunks=(4, 3), **how
            )
        found = converters.load(tmp_path / "g.weights.h5").variables["params"]["w"]
        assert np.array_equal(found, np.arange(90).reshape(9, 10))


def test_orbax_that_grows_or_lies_is_refused(tmp_path):
    converters.save(tmp_path / "e.orbax", None, {"params": {"a": np.ones(3), "b": np.zeros(0)}})
    told = json.loads((tmp_path / "e.orbax" / "fwt.json").read_text())
    for shape, dtype in (([150_000_000], "float32"), ([0], "object"), ([3, 2], "float32")):
        told["empty"] = {"params/b": [shape, dtype]}
        (tmp_path / "e.orbax" / "fwt.json").write_text(json.dumps(told))
        refused(tmp_path / "e.orbax", "is said to be empty")

    import orbax.checkpoint as ocp

    tree = {"params": {"a": np.ones(4, np.float32)}}
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
    handler.save(tmp_path / "z", args=ocp.args.PyTreeSave(tree))
    handler.finalize(tmp_path / "z")
    assert converters.load(tmp_path / "z").variables["params"]["a"].sum() == 4
    array = tmp_path / "z" / "params.a" / ".zarray"
    array.write_text(json.dumps({**json.loads(array.read_text()), "chunks": [400_000_000]}))
    refused(tmp_path / "z", "a piece of .* max_bytes", max_bytes=1 << 24)


@pytest.mark.thorough
def test_many_small_things_are_held_to_the_budget(tmp_path):
    many = 3_000_000
    for name, data in {
        "x.msgpack": b"\x81\xa1a\xdd" + struct.pack(">I", many) + b"\x80" * many,
        "x.pt": pt(b"\x80\x02(" + b"}" * many + b"t."),
    }.items():
        (tmp_path / name).write_bytes(data)
        refused(tmp_path / name, "more than such a file may hold")
    with zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\x80\x02(" + b"}" * many + b"t.")
    refused(tmp_path / "packed.pt", "more than such a file may hold")
    config = {**DENSE, "more": [[]] * many}
    with zipfile.ZipFile(tmp_path / "x.keras", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", json.dumps(config))
        archive.writestr("model.weights.h5", kernel(data=np.ones((3, 2), np.float32)))
    refused(tmp_path / "x.keras", "config.json declares .* more than such a file may hold")
    nested = {"class_name": "Dense", "config": {"name": "d", "units": 2}}
    for _ in range(60):
        nested = {"class_name": "Sequential", "config": [nested]}
    with h5py.File(tmp_path / "deep.h5", "w") as file:
        file.attrs["model_config"], file.attrs["keras_version"] = json.dumps(nested), "2.1"
        file.create_group("model_weights").attrs["layer_names"] = np.zeros(0)
    with in_time():
        refused(tmp_path / "deep.h5", "")
    header = json.dumps({".".join(["a"] * 50_000): {"dtype": "F32", "shape": [1],
                                                    "data_offsets": [0, 4]}}).encode()  # fmt: skip
    (tmp_path / "deep.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    refused(tmp_path / "deep.safetensors", "more than 64 parts")


def test_a_folder_with_anything_else_in_it_is_not_replaced(tmp_path):
    tree = {"params": {"a": np.ones(2)}}
    for name, more in (("m.orbax", {}), ("m.safetensors", {"shard_bytes": 100})):
        converters.save(tmp_path / name, None, tree, **more)
        converters.save(tmp_path / name, None, tree, **more)
        (tmp_path / name / "precious.txt").write_text("x")
        with pytest.raises(converters.FileFormatError, match="a folder with other things"):
            converters.save(tmp_path / name, None, tree, **more)
        assert (tmp_path / name / "precious.txt").exists()
    (tmp_path / "run.orbax").mkdir()
    shutil.copytree(tmp_path / "m.orbax", tmp_path / "run.orbax" / "100")
    with pytest.raises(converters.FileFormatError, match="a folder with other things"):
        converters.save(tmp_path / "run.orbax", None, tree)
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(converters.FileFormatError, match="something that is no file"):
        converters.save(tmp_path / "pipe.npz", None, tree)


def test_what_a_file_could_not_give_back_is_not_written(tmp_path):
    one, two = np.ones(2), np.zeros(2)
    for suffix, tree, said in (
        (".orbax", {"a.b": one, "a": {"b": two}}, "two arrays would be named"),
        (".orbax", {"a": np.zeros(0)}, "no tree without values"),
        (".pt", {"a.b": one, "a": {"b": two}}, "two arrays would be named"),
        (".npz", {"a\0b": one, "a": two}, "a zero byte"),
        (".npz", {"a\ud800": one}, "can't be a name"),
        (".safetensors", {"a\ud800": one}, "can't be a name"),
        (".msgpack", {"": one}, "can't be a name"),
    ):
        with pytest.raises(converters.ConversionError, match=said):
            converters.save(tmp_path / f"x{suffix}", None, {"params": tree})
        assert not list(tmp_path.iterdir())
    with pytest.raises(converters.ConversionError, match="can't be a name"):
        converters.save(tmp_path / "x.npz", None, {"params": {"a": one}, "w": two})


def test_shards_are_of_one_save(tmp_path):
    """Read while another process replaces them."""
    path = tmp_path / "shards.safetensors"
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    pids = []
    for seed in (1, 2):
        server.stdin.write(f"{path} {seed}\n")
        server.stdin.flush()
        pids.append(int(server.stdout.readline()))
    while not path.exists():
        time.sleep(0.01)
    read = 0
    for tries in range(600):
        with contextlib.suppress(converters.FileFormatError):
            read += only(path) in (1.0, 2.0)
        if tries > 50 and read > 5:
            break
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    server.stdin.close()
    server.wait()
    assert read > 5


# -- saves ------------------------------------------------------------------------------------

# One import, and a process of its own for each writer, which saves until it is killed.
SERVER = """
import os, signal, sys, traceback
import numpy as np
import orbax.checkpoint, safetensors
from fwt import converters
converters.save  # what is imported lazily is there before the first fork
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    path, seed = line.split()
    tree = {"params": {f"a{i}": np.full(300_000, int(seed), np.float32) for i in range(6)}}
    more = {"shard_bytes": 2_000_000} if "shards" in path else {}
    pid = os.fork()
    if not pid:
        try:
            while True:
                converters.save(path, None, tree, **more)
        finally:
            traceback.print_exc()
            os._exit(1)
    print(pid, flush=True)
"""


def only(path):
    """The one value that stands everywhere in a saved tree."""
    leaves = fwt.select(converters.load(path).variables, "**").values()
    found = {float(x) for v in leaves for x in np.unique(v)}
    assert len(found) == 1, found
    return found.pop()


@pytest.mark.parametrize(
    ("name", "kills"),
    thorough_but(
        1,
        [
            ("w.safetensors", 20),
            ("w.pt", 40),
            ("w.safetensors", 40),
            ("shards.safetensors", 20),
            ("w.orbax", 20),
        ],
    ),
)
def test_a_kill_at_any_moment_leaves_the_old_or_the_new(tmp_path, name, kills):
    """Each writer replaces what the one before it wrote, until it is killed."""
    path = tmp_path / name
    tree = {"params": {f"a{i}": np.full(300_000, 3, np.float32) for i in range(6)}}
    more = {"shard_bytes": 2_000_000} if "shards" in name else {}
    converters.save(path, None, tree, **more)
    rng = np.random.default_rng(len(name))
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    longest, value, replaced, midway = 0.05, 3, 0, 0
    for number in range(4, 20 * kills):
        server.stdin.write(f"{path} {number}\n")
        server.stdin.flush()
        pid = int(server.stdout.readline())
        time.sleep(float(rng.uniform(0, longest)))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        while os.path.exists(f"/proc/{pid}"):
            time.sleep(0.001)
        before, value = value, only(path)
        assert value in (before, number)
        # About half are to be replaced before the kill, however slow the machine is.
        replaced += value == number
        longest *= 0.8 if value == number else 1.25
        for rest in tmp_path.glob(".fwt-*"):  # what a kill leaves beside the target
            midway += 1
            shutil.rmtree(rest) if rest.is_dir() else rest.unlink()
        if number >= kills + 4 and replaced > kills // 10 and midway > kills // 10:
            break
    server.stdin.close()
    server.wait()
    assert replaced > kills // 10, replaced
    assert midway > kills // 10, midway


FULL_DISK = """
import resource, signal, sys, numpy as np, jax
import fwt, flax.linen as nn
from fwt import converters
leaf = np.random.default_rng(0).normal(size=(512, 512)).astype(np.float32)
leaf[0, 0] = 1
trees = [{"params": {"d": {"kernel": x, "bias": leaf[0]}}} for x in (leaf, leaf * 2)]

def save(name, tree):
    net = fwt.Sequential([("d", nn.Dense(512))], (512,)) if "net" in name else None
    converters.save(name, net, tree, **({"shard_bytes": 10**9} if "shards" in name else {}))

for name in sys.argv[1:]:
    save(name, trees[0])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
for name in sys.argv[1:]:
    try:
        save(name, trees[1])
        print("saved")
    except converters.FileFormatError as error:
        print(error)
"""


def test_a_full_disk_is_one_clear_line(tmp_path):
    """A limit on the size of files stands for the disk's."""
    names = ["w.pt", "w.safetensors", "w.npz", "w.msgpack", "w.orbax", "net.keras", "net.h5",
             "net.weights.h5", "shards.safetensors"]  # fmt: skip
    paths = [tmp_path / str(i) / name for i, name in enumerate(names)]
    for path in paths:
        path.parent.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, *map(str, paths)],
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.strip().splitlines()
    assert len(lines) == len(names), done.stdout + done.stderr[-2000:]
    module = fwt.Sequential([("d", nn.Dense(512))], (512,))
    for path, line in zip(paths, lines, strict=True):
        assert path.name in line
        assert "can't write it" in line
        how = {"architecture": module} if path.name == "net.weights.h5" else {}
        model = converters.load(path, **how)
        assert float(model.variables["params"]["d"]["kernel"][0, 0]) == 1.0
        assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing is left beside it


def test_places_that_can_not_be_written(tmp_path):
    tree = {"params": {"a": np.ones(2)}}
    (tmp_path / "dir.npz").mkdir()
    (tmp_path / "file.orbax").write_text("mine")
    for path, said in (
        ("dir.npz", "a directory is in the way"),
        ("file.orbax", "a file is in the way"),
        ("none/w.npz", "can't write it"),
        ("none/w.orbax", "can't write it"),
    ):
        with pytest.raises(converters.FileFormatError, match=said):
            converters.save(tmp_path / path, None, tree)
    if os.getuid():  # root may write anywhere
        (tmp_path / "locked").mkdir(mode=0o555)
        with pytest.raises(converters.FileFormatError, match="Permission denied"):
            converters.save(tmp_path / "locked" / "w.npz", None, tree)
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] < 0
