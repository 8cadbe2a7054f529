"""Mutants of files of every format against the readers.

``python tests/helpers/fuzz.py --count 100000`` tries that many of each.

With ``--edit`` each is edited too: pruned from its file to another, which has to hold what the same
transform gives of what was read. Each mutant is read in a child process whose address space may
grow by the budget and little more, so that a crash of a C library, a hang or an allocation too
large is seen as such. A reader may load it or raise FileFormatError, an edit raise any error of
ours; anything else is a failure. It goes on where it stopped (``--state``).
"""

import argparse
import contextlib
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np

MAX_BYTES = 32 << 20
SECONDS = 20  # of one mutant; most take milliseconds
SLACK = {"Orbax": 1 << 30}  # for the threads of its library


def originals(folder):
    """One small file or folder of each format."""
    import flax.linen as nn
    import jax
    import ml_dtypes

    import fwt
    from fwt import converters
    from fwt import layers as fl

    net = fwt.Sequential(
        [("conv", nn.Conv(2, (2, 2))), ("norm", nn.BatchNorm()), ("flat", fl.Flatten()),
         ("dense", nn.Dense(3)), ("end", fl.Softmax())], (4, 3, 2))  # fmt: skip
    variables = net.init(jax.random.key(0), np.ones((1, 4, 3, 2), np.float32))
    variables = jax.tree.map(np.asarray, variables)
    odd = {"params": {"a": {"b": np.ones((2, 3), ml_dtypes.bfloat16), "c": np.arange(4)},
                      "d": np.zeros((0, 2), bool)}}  # fmt: skip
    out = {}
    for name, suffix, more in (
        ("keras", ".keras", {}), ("Keras weights", ".weights.h5", {}), ("Keras HDF5", ".h5", {}),
        ("torch", ".pt", {}), ("safetensors", ".safetensors", {}), ("NumPy", ".npz", {}),
        ("msgpack", ".msgpack", {}), ("Orbax", ".orbax", {}),
        ("safetensors in shards", ".safetensors", {"shard_bytes": 60}),
        ("Keras weights in shards", ".weights.h5", {"shard_bytes": 60}),
    ):  # fmt: skip
        path = Path(folder) / f"{name}{suffix}"
        converters.save(path, net, variables, **more)
        out[name] = [path]
        if suffix in (".safetensors", ".npz", ".msgpack", ".pt") and not more:
            converters.save(path.with_stem(f"{name} odd"), None, odd)
            out[name].append(path.with_stem(f"{name} odd"))
    import torch

    older = Path(folder) / "older.pt"
    state = {"a": torch.ones(3, 2), "b": torch.arange(4), "more": {1}}
    torch.save(state, older, _use_new_zipfile_serialization=False)
    out["torch"].append(older)
    index = Path(folder) / "torch shards" / "pytorch_model.bin.index.json"
    index.parent.mkdir()
    where = {"a.b": "one.bin", "c": "two.bin"}
    for name, shard in where.items():
        torch.save({name: torch.ones(2, 3)}, index.parent / shard)
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    out["torch"].append(index.parent)
    import h5py

    packed = Path(folder) / "packed.weights.h5"
    with h5py.File(packed, "w") as file:  # in chunks, and with texts of any length
        file.attrs["dtype"] = ["some", "texts"]
        how = {"compression": "gzip", "shuffle": True, "chunks": (4, 3)}
        file.create_dataset("layers/d/vars/0", data=np.ones((9, 7), np.float32), **how)
    out["Keras weights"].append(packed)
    import onnx

    path = Path(folder) / "net.onnx"
    converters.save(path, net, variables)
    proto = onnx.load(path)
    del proto.metadata_props[:]  # which says what the layers are: the graph must
    onnx.save(proto, path.with_stem("bare"))
    out["ONNX"] = [path, path.with_stem("bare")]
    packed = Path(folder) / "packed.npz"
    np.savez_compressed(packed, **{"a/b": np.ones((3, 4)), "c": np.arange(5)})
    out["NumPy"].append(packed)
    return out


# -- mutations --------------------------------------------------------------------------------

EXTREMES = [
    0,
    1,
    255,
    256,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**53,
    2**63 - 1,
    2**64 - 1,
]
WORDS = [
    b"-1",
    b"0",
    b"99999999999999999999",
    b"1e999",
    b"null",
    b"[]",
    b"{}",
    b'""',
    b"NaN",
    b"true",
]


def mutated(data, rng):
    """A few changes of the bytes: truncated, flipped, spliced, repeated, swapped, extreme."""
    data = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        if not data:
            return bytes(data)
        kind = int(rng.integers(9))
        at, other = (int(n) for n in rng.integers(0, len(data), 2))
        size = int(rng.integers(1, 1 + min(64, len(data))))
        if kind == 0 and rng.integers(4) == 0:
            del data[at:]
        elif kind == 1:
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 2:
            data[at : at + size] = data[other : other + size]
        elif kind == 3:
            data[at:at] = data[other : other + size]
        elif kind == 4:
            first, second = data[at : at + size], data[other : other + size]
            if abs(at - other) >= size:
                data[at : at + size], data[other : other + size] = second, first
        elif kind == 5:
            width = int(2 ** rng.integers(4))
            number = EXTREMES[rng.integers(len(EXTREMES))] % 2 ** (8 * width)
            order = "little" if rng.integers(3) else "big"
            data[at : at + width] = number.to_bytes(width, order)
        elif kind == 6:
            del data[at : at + size]
        elif kind == 7:  # a number or word of a text
            found = [m.span() for m in re.finditer(rb"-?\d+|true|false|null|\"[a-z_]*\"", data)]
            if found:
                start, end = found[rng.integers(len(found))]
                data[start:end] = WORDS[rng.integers(len(WORDS))]
        else:
            data[at] = int(rng.integers(256))
    return bytes(data)


def mutant_of_file(data, rng):
    """Of an archive mostly what is in it, under a checksum that is right again."""
    if data[:2] != b"PK" or rng.integers(4) == 0:
        return mutated(data, rng)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(info, archive.read(info)) for info in archive.infolist()]
    target = int(rng.integers(len(members)))
    small = [i for i, (_, held) in enumerate(members) if len(held) > 8]
    if rng.integers(4) and small:
        target = small[rng.integers(len(small))]
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for index, (info, held) in enumerate(members):
            if index == target:
                held = mutated(held, rng)
                if rng.integers(8) == 0:
                    continue
            packed = zipfile.ZIP_DEFLATED if rng.integers(6) == 0 else info.compress_type
            archive.writestr(info.filename, held, packed)
    return out.getvalue()


def write_mutant(original, target, rng):
    if original.is_file():
        target.write_bytes(mutant_of_file(original.read_bytes(), rng))
        return
    shutil.copytree(original, target)
    files = sorted(p for p in target.rglob("*") if p.is_file())
    for _ in range(int(rng.integers(1, 3))):
        chosen = files[rng.integers(len(files))]
        if not chosen.exists():
            continue
        if rng.integers(12) == 0:
            chosen.unlink()
        elif rng.integers(12) == 0:
            chosen.write_bytes(files[rng.integers(len(files))].read_bytes()
                               if all(f.exists() for f in files) else b"")  # fmt: skip
        else:
            chosen.write_bytes(mutated(chosen.read_bytes(), rng))


# -- the child --------------------------------------------------------------------------------


def edited(source, work):
    """Whether a file is edited as what is read of it is changed; raises where it is refused."""
    import jax

    import fwt
    from fwt import converters

    target = work / f"edited{''.join(source.suffixes)}"
    before = {p: p.read_bytes() for p in (source, *source.rglob("*")) if p.is_file()}
    floats = ("float32", "float16", "bfloat16")
    transform = fwt.prune(0.5, where=lambda path, leaf: str(leaf.dtype) in floats)
    try:
        converters.transform(source, transform, out=target, max_bytes=MAX_BYTES)
        if any(p.read_bytes() != held for p, held in before.items()):
            return "changed what it was given"
        found = converters.load(target, max_bytes=MAX_BYTES)
        expected = transform(converters.load(source, max_bytes=MAX_BYTES))
        names = [sorted(fwt.select(x)) for x in (found, expected)]
        leaves = [[np.asarray(x) for x in fwt.select(y).values()] for y in (found, expected)]
        same = all(a.tobytes() == b.tobytes() for a, b in zip(*leaves, strict=False))
        return "loaded" if same and names[0] == names[1] else f"gave {jax.tree.structure(found)}"
    finally:
        if target.is_dir():
            shutil.rmtree(target)
        target.unlink(missing_ok=True)
        left = [p.name for p in work.iterdir() if p.name.startswith(".fwt-")]
        assert not left, left


def child(folder, name, start, stop, edit=False):
    """Reads mutants start to stop of a format and prints an outcome for each."""
    import warnings

    import jax

    from fwt import converters
    from fwt._errors import FwtError

    warnings.simplefilter("ignore")
    allowed = FwtError if edit else converters.FileFormatError
    paths = json.loads((Path(folder) / "originals.json").read_text())[name]
    for path in paths:
        converters.load(path, max_bytes=MAX_BYTES)  # what libraries load once
        if edit:
            with contextlib.suppress(FwtError):  # of one without floats
                edited(Path(path), Path(tempfile.mkdtemp(dir=folder)))
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    limit = used + (64 << 20) + 2 * MAX_BYTES + SLACK.get(name, 0)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    work = Path(tempfile.mkdtemp(dir=folder))
    for number in range(start, stop):
        rng = np.random.default_rng([number, len(name)])
        original = Path(paths[rng.integers(len(paths))])
        target = work / f"mutant{''.join(original.suffixes)}"
        write_mutant(original, target, rng)
        signal.alarm(SECONDS)
        try:
            if edit:
                outcome = edited(target, work)
            else:
                found = converters.load(target, max_bytes=MAX_BYTES)
                kinds = {str(v.dtype) for v in jax.tree.leaves(found.variables)}
                outcome = "loaded" if "object" not in kinds else f"gave {kinds}"
        except allowed as error:
            outcome = "refused"
            cause = error
            while cause is not None:
                if isinstance(cause, MemoryError):
                    outcome = "memory"
                cause = cause.__cause__ or cause.__context__
        except BaseException as error:  # noqa: BLE001 - what a reader must never raise
            outcome = f"raised {type(error).__name__}: {error!s:.200}"
        signal.alarm(0)
        print(json.dumps([number, outcome]), flush=True)
        if target.is_dir():
            shutil.rmtree(target)
        elif target.exists():
            target.unlink()
    print(json.dumps([stop, "end"]), flush=True)


def run(name, start, stop, folder, edit=False):
    """Outcomes of mutants start to stop, and the numbers of those that are failures."""
    counts, failures = Counter(), []
    at = start
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    while at < stop:
        command = [sys.executable, __file__, "--child", folder, name, str(at), str(stop)]
        command += ["--edit"] * edit
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        lines = [json.loads(x) for x in done.stdout.splitlines() if x.startswith("[")]
        for number, outcome in lines:
            if outcome == "end":
                continue
            kind = outcome.split()[0]
            counts[kind] += 1
            if kind not in ("loaded", "refused"):
                failures.append((number, outcome))
        last = lines[-1] if lines else None
        if last is not None and last[1] == "end":
            break
        at = at if last is None else last[0] + 1
        if last is None and done.returncode > 0:
            raise RuntimeError(done.stderr[-2000:])
        why = "hung" if done.returncode == -signal.SIGALRM else "crashed"
        counts[why] += 1
        failures.append((at, f"{why} with {done.returncode}: {done.stderr[-300:]}"))
        at += 1
    return counts, failures


def prepared(folder):
    """The originals, and the names of their formats."""
    found = {name: [str(p) for p in paths] for name, paths in originals(folder).items()}
    (Path(folder) / "originals.json").write_text(json.dumps(found))
    return list(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2_000)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--formats", nargs="*")
    parser.add_argument("--state", type=Path)
    parser.add_argument("--edit", action="store_true")
    parser.add_argument("--child", nargs=4)
    given = parser.parse_args()
    if given.child:
        folder, name, start, stop = given.child
        return child(folder, name, int(start), int(stop), given.edit)
    state = json.loads(given.state.read_text()) if given.state and given.state.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for name in given.formats or prepared(folder):
            if given.formats and name == given.formats[0]:
                prepared(folder)
            done = state.setdefault(name, {"next": given.start})
            while done["next"] < given.start + given.count:
                at = done["next"]
                stop = min(at + 1_000, given.start + given.count)
                begun = time.time()
                counts, failures = run(name, at, stop, folder, given.edit)
                for kind, count in counts.items():
                    done[kind] = done.get(kind, 0) + count
                for number, outcome in failures:
                    print(f"{name} {number}: {outcome}", flush=True)
                done["next"] = stop
                each = (time.time() - begun) / (stop - at)
                print(f"{name}: {done}, {1000 * each:.1f} ms each", flush=True)
                if given.state:
                    given.state.write_text(json.dumps(state))
    return None


if __name__ == "__main__":
    main()
