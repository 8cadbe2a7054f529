"""Files that are edited a piece at a time, beside ``cp`` and beside what people write by hand:
``python tests/benchmarks/streaming.py --gigabytes 4``.

Each row is a process of its own. Times are ratios to a ``cp`` of the same file in the same round,
the medians of the rounds, with start-up; the cache of the system is warm. The peak is what the
process had in memory at most, beyond a run on a file of some bytes. ``--json`` prints all of it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SIDE = 4096
FWT = [sys.executable, "-m", "fwt.cli"]
MEASURED = """
import os, resource, subprocess, sys, time
begun = time.perf_counter()
run = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
_, status, used = os.wait4(run.pid, 0)
print(time.perf_counter() - begun, used.ru_utime + used.ru_stime, used.ru_maxrss, status)
"""
BY_HAND = {
    "safetensors": """
import sys, torch
from safetensors.torch import load_file, save_file
state = load_file(sys.argv[1])
for x in state.values():
    x[x.abs() <= 0.03] = 0
save_file(state, sys.argv[2])
""",
    "torch": """
import sys, torch
from safetensors.torch import save_file
save_file(torch.load(sys.argv[1]), sys.argv[2])
""",
    "keras": """
import sys, keras, numpy as np
model = keras.saving.load_model(sys.argv[1])
for v in model.trainable_variables:
    w = np.array(v)
    v.assign(np.where(np.abs(w) > 0.03, w, 0))
model.save(sys.argv[2])
""",
}


def tensors(count):
    """Some gigabytes, of which no two tensors are the same."""
    one = np.random.default_rng(0).standard_normal(SIDE * SIDE, dtype=np.float32) * 0.05
    for i in range(count):
        yield np.roll(one, 1001 * i).reshape(SIDE, SIDE) * np.float32(1 + i / 97)


def make(folder, count):
    """The same weights as .safetensors, .pt and .keras."""
    os.environ["KERAS_BACKEND"] = "jax"
    import keras
    import torch
    from safetensors.numpy import save_file

    held = {f"layers.{i}.weight": x for i, x in enumerate(tensors(count))}
    save_file(held, folder / "w.safetensors")
    torch.save({n: torch.from_numpy(x) for n, x in held.items()}, folder / "w.pt")
    layers = [keras.layers.Dense(SIDE, use_bias=False, kernel_initializer="zeros") for _ in held]
    model = keras.Sequential([keras.layers.Input((SIDE,)), *layers])
    for layer, x in zip(layers, held.values(), strict=True):
        layer.kernel.assign(x)
    model.save(folder / "w.keras")
    save_file({"a.weight": np.ones((4, 4), np.float32)}, folder / "tiny.safetensors")


def measured(command):
    found = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, command)], stdout=subprocess.PIPE, check=True
    )
    wall, cpu, peak, status = map(float, found.stdout.split())
    assert status == 0, command
    return wall, cpu, peak / 1024


def rows(folder):
    safe, torch_file, keras_file = (folder / f"w.{end}" for end in ("safetensors", "pt", "keras"))
    out = {x.suffix: folder / f"out{x.suffix}" for x in (safe, torch_file, keras_file)}
    prune = [*FWT, "prune"]
    hand = {name: [sys.executable, "-c", text] for name, text in BY_HAND.items()}
    threshold, whole = ["--threshold", "0.03"], ["--sparsity", "0.5", "--scope", "global"]
    layer, s = ["--sparsity", "0.5"], out[".safetensors"]
    return {
        "`.safetensors`, threshold": (safe, [*prune, safe, s, *threshold]),
        "the same by hand": (safe, [*hand["safetensors"], safe, s]),
        "`.safetensors`, by layer": (safe, [*prune, safe, s, *layer]),
        "`.safetensors`, globally": (safe, [*prune, safe, s, *whole]),
        "`.safetensors`, max_norm": (
            safe,
            [*FWT, "project", safe, s, "--constraint", "max_norm(1.0)"],
        ),
        "`.safetensors` to bfloat16": (safe, [*FWT, "convert", safe, s, "--dtype", "bfloat16"]),
        "`.pt`, by layer": (torch_file, [*prune, torch_file, out[".pt"], *layer]),
        "`.pt` to `.safetensors`": (torch_file, [*FWT, "convert", torch_file, s]),
        "the same by hand, in torch": (torch_file, [*hand["torch"], torch_file, s]),
        "`.keras`, threshold": (keras_file, [*prune, keras_file, out[".keras"], *threshold]),
        "the same by hand, in Keras": (keras_file, [*hand["keras"], keras_file, out[".keras"]]),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="rows whose names have this in them")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        child = os.fork()  # whose memory is given back
        if not child:
            make(folder, max(round(given.gigabytes * 2**28 / SIDE**2), 1))
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        start = [*FWT, "prune", folder / "tiny.safetensors", folder / "t.safetensors"]
        empty = measured([*start, "--threshold", "0.03"])
        table = {}
        for _ in range(given.rounds):
            for row, (source, command) in rows(folder).items():
                if given.only in row:
                    copied = measured(["cp", source, folder / f"copy{source.suffix}"])
                    time.sleep(1)  # what is written back meanwhile is that of both
                    table.setdefault(row, []).append((copied, measured(command)))
    if given.json:
        print(json.dumps({"start": empty, "rows": table}))
        return
    print(f"start-up: {empty[0]:.1f} s, {empty[1]:.1f} s of CPU, {empty[2]:.0f} MB")
    print("| file | seconds | of `cp` | MB beyond start-up |")
    print("|---|---|---|---|")
    for row, found in table.items():
        seconds = statistics.median(own[0] for _, own in found)
        ratio = statistics.median(own[0] / copied[0] for copied, own in found)
        peak = max(own[2] for _, own in found) - empty[2]
        print(f"| {row} | {seconds:.1f} | {ratio:.1f} | {peak:,.0f} |")


if __name__ == "__main__":
    main()
