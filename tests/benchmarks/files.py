"""What reading and writing a file costs beside ``cp`` of it: ``python tests/benchmarks/files.py``.

Ratios of one run, the medians of interleaved rounds; the cache of the system is warm.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from fwt import converters

SUFFIXES = (".safetensors", ".pt", ".npz", ".msgpack", ".orbax")


def clock(run, *arguments):
    begun = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - begun


def copied(source, target):
    """A copy that is on the disk, as a save is."""
    if source.is_dir():
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
        return
    shutil.copyfile(source, target)
    with open(target, "rb+") as file:
        os.fsync(file.fileno())


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    rng = np.random.default_rng(0)
    count = given.megabytes * 250_000 // 20
    tree = {"params": {f"layer_{i}": {"kernel": rng.normal(size=count).astype(np.float32)}
                       for i in range(20)}}  # fmt: skip
    print("| file | read / cp | written / cp |")
    print("|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for suffix in SUFFIXES:
            path, other = Path(folder) / f"w{suffix}", Path(folder) / f"copy{suffix}"
            converters.save(path, None, tree)
            times = {"copy": [], "read": [], "write": []}
            for _ in range(given.rounds):
                times["copy"].append(clock(copied, path, other))
                times["read"].append(clock(converters.load, path))
                times["write"].append(clock(converters.save, path, None, tree))
            copy, read, write = (statistics.median(t) for t in times.values())
            print(f"| `{suffix}` | {read / copy:.2f} | {write / copy:.2f} |")


if __name__ == "__main__":
    main()
