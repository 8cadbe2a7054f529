"""What the conversion of ResNet-50 costs, each way: ``python tests/benchmarks/converting.py``.

Each way runs in a process of its own: seconds of CPU of the first conversion after imports, and
by how much memory grows at its peak, in multiples of the weights, the result included.
Other tools stand beside it where they are installed; ``--model VGG16`` takes a chain instead.
``--write`` puts the table into the guide.
"""

import argparse
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pages

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
SHAPE = (224, 224, 3)


def keras_model(name, folder):
    import keras

    return getattr(keras.applications, name)(weights=None)


def flax_model(name, folder):
    from fwt import converters

    return converters.load(folder / "net.safetensors")


def torch_model(name, folder):
    import torch

    return torch.load(folder / "module.pt", weights_only=False)


def path(suffix):
    return lambda name, folder: folder / f"net{suffix}"


def tf2onnx_keras(model, folder):
    import tensorflow as tf
    import tf2onnx

    wanted = [tf.TensorSpec((None, *SHAPE), tf.float32, name="x")]
    function = tf.function(lambda x: model(x, training=False), input_signature=wanted)
    tf2onnx.convert.from_function(function, wanted, output_path=str(folder / "theirs.onnx"))


def torch_onnx(model, folder):
    import torch

    x = torch.zeros(1, SHAPE[2], *SHAPE[:2])
    torch.onnx.export(model, (x,), folder / "theirs.onnx", dynamo=True, verbose=False)


def onnx2torch(path, folder):
    import onnx2torch

    return onnx2torch.convert(str(path))


def ours(name, *more):
    def run(source, folder):
        from fwt import converters

        return getattr(converters, name)(source, *more)

    return run


def through(first, *more):
    """A way over Flax: into it by one function, and out of it to an ONNX file."""

    def run(source, folder):
        from fwt import converters

        converters.to_onnx(getattr(converters, first)(source, *more), folder / "out.onnx")

    return run


def onnx_to_torch(path, folder):
    from fwt import converters

    return converters.to_torch(converters.from_onnx(path))


def written(model, folder):
    from fwt import converters

    converters.to_onnx(model, folder / "out.onnx")


def unchecked(model, folder):
    from fwt import converters

    converters.to_onnx(model, folder / "out.onnx", check=False)


def saved(model, folder):
    from fwt import converters

    converters.save(folder / "out.keras", model)


FIRST = (SHAPE[2], *SHAPE[:2])
WAYS = {
    "Keras to Flax": (keras_model, ours("from_keras")),
    "Flax to Keras": (flax_model, ours("to_keras")),
    "Flax to a `.keras` file": (flax_model, saved),
    "a `.keras` file to Flax": (path(".keras"), ours("load")),
    "Flax to torch": (flax_model, ours("to_torch")),
    "torch to Flax": (torch_model, ours("from_torch", FIRST)),
    "Flax to ONNX": (flax_model, written),
    "Flax to ONNX, check=False": (flax_model, unchecked),
    "torch to ONNX": (torch_model, through("from_torch", FIRST)),
    "torch to ONNX, `torch.onnx.export`": (torch_model, torch_onnx),
    "Keras to ONNX": (keras_model, through("from_keras")),
    "Keras to ONNX, tf2onnx": (keras_model, tf2onnx_keras),
    "ONNX to Flax": (path(".onnx"), ours("from_onnx")),
    "ONNX to torch": (path(".onnx"), onnx_to_torch),
    "ONNX to torch, onnx2torch": (path(".onnx"), onnx2torch),
}


def memory(key):
    """MiB that this process holds (VmRSS), or held at most (VmHWM)."""
    found = re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024


def measured(way, name, folder):
    """One conversion, in this process."""
    made, convert = WAYS[way]
    source = made(name, folder)
    imports()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the most held is counted from now
    before, begun, clock = memory("VmRSS"), time.process_time(), time.perf_counter()
    result = convert(source, folder)
    spent = time.process_time() - begun, time.perf_counter() - clock
    del result
    return {"cpu": spent[0], "wall": spent[1], "peak": memory("VmHWM") - before}


def imports():
    """What the tools import at their first conversion stands outside of its time and memory."""
    import torch

    from fwt import converters

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one = torch.nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.one(x) + x

    there = converters.from_torch(Net().eval(), (3, 4, 5))
    converters.to_keras(there)
    converters.to_torch(there)
    with tempfile.TemporaryDirectory() as folder:
        converters.to_onnx(there, path=Path(folder) / "net.onnx")


def sources(name, folder):
    """The files from which the ways start; the weights' MiB."""
    import torch

    from fwt import converters

    model = keras_model(name, folder)
    there = converters.from_keras(model)
    converters.save(folder / "net.safetensors", there)
    converters.save(folder / "net.keras", there)
    converters.to_onnx(there, path=folder / "net.onnx")
    torch.save(converters.to_torch(there), folder / "module.pt")
    return model.count_params() * 4 / 2**20


def child(*arguments):
    run = subprocess.run(
        [sys.executable, __file__, *map(str, arguments)], capture_output=True, text=True
    )
    if run.returncode:
        return {"failed": run.stderr.strip().splitlines()[-1][:100]}
    return json.loads(run.stdout.strip().splitlines()[-1])


def rows(name, ways, rounds):
    with tempfile.TemporaryDirectory() as folder:
        weights = child("--sources", folder, "--model", name)
        yield "| way | seconds of CPU | memory at its peak, of the weights |"
        yield "|---|---|---|"
        for way in ways:
            found = [child("--one", way, folder, "--model", name) for _ in range(rounds)]
            found = min(found, key=lambda f: f.get("cpu", 0))
            if "failed" in found:
                yield f"| {way} | {found['failed']} | |"
            else:
                yield f"| {way} | {found['cpu']:.1f} | {found['peak'] / weights:.1f} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ways", nargs="*", default=list(WAYS))
    parser.add_argument("--model", default="ResNet50")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--sources", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.sources:
        print(json.dumps(sources(given.model, given.sources)))
    elif given.one:
        print(json.dumps(measured(given.one[0], given.model, Path(given.one[1]))))
    else:
        lines = []
        for line in rows(given.model, given.ways, given.rounds):
            print(line, flush=True)
            lines.append(line)
        if given.write:
            pages.write("conversion.md", "converting", "\n".join(lines))
