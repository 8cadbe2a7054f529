"""Every architecture of keras.applications, Keras -> Flax -> torch -> Flax -> Keras, by a .keras
file, and to ONNX and back.

    python tests/graphs.py [--out graphs.json] [--size 96] [name ...]
    python tests/graphs.py --torch [--out torch.json] [name ...]
    python tests/graphs.py --random keras|torch COUNT [--first 0] [--jobs 1] [--out random.jsonl]

Weights are random, running statistics away from 0 and 1. A line of the table says how far each
model's outputs are from Keras's, relative to the largest, and whether the weights came back bit
for bit. With ``--torch`` it is the nets of tests/helpers/torch_nets.py, and how far Flax, torch,
Keras and ONNX are from torch, or by what they are refused. With ``--random`` it is that many drawn
graphs of tests/helpers/dags.py or torch_dags.py, and the table counts them: exact on every way,
exact but for a way that is refused by name, wrong. What ``--out`` names is read first and written
after each model, so that the command can be stopped and run again; what was wrong is tried again.
"""

import argparse
import concurrent.futures
import importlib
import json
import multiprocessing
import os
import re
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "tensorflow")  # which compiles nothing

import jax
import keras
import numpy as np
import torch

from fwt import converters

ONNX = 100_000_000  # parameters, beyond which a model goes to no ONNX file here
# Names that say with which sizes a model is built where any others are refused.
SIZES = {"NASNetLarge": 96, "InceptionV3": 96, "InceptionResNetV2": 96, "Xception": 96}


def names():
    """The functions of keras.applications that build a model."""
    return sorted(n for n, f in vars(keras.applications).items() if n[0].isupper() and callable(f))


def build(name, size):
    """A model with random weights that keep their signals' size."""
    keras.utils.clear_session()
    make = getattr(keras.applications, name)
    size = SIZES.get(name, size)
    model = make(weights=None, input_shape=(size, size, 3), classes=10, classifier_activation=None)
    return randomised(model)


def randomised(model, seed=0):
    rng = np.random.default_rng(seed)
    for v in model.variables:
        shape, own = tuple(v.shape), v.path.rpartition("/")[2]
        if not keras.backend.is_float_dtype(v.dtype):
            continue
        if own in ("moving_variance", "variance"):
            value = rng.uniform(0.5, 1.5, shape)
        elif own in ("gamma", "mean", "moving_mean"):
            value = rng.normal(0.8 if own == "gamma" else 0.1, 0.1, shape)
        elif len(shape) > 1:
            axes = shape[:-2] if own == "depthwise_kernel" else shape[:-1]
            value = rng.normal(0, np.sqrt(1.5 / max(np.prod(axes), 1)), shape)
        else:
            value = rng.normal(0.05, 0.1, shape)
        v.assign(value.astype("float32"))
    return model


def images(shape, count=2, seed=1):
    return np.random.default_rng(seed).uniform(0, 255, (count, *shape)).astype("float32")


def error(found, expected):
    """The largest difference, relative to the largest expected entry."""
    flat = [np.asarray(x, "float64") for x in (found, expected)]
    if not all(np.isfinite(x).all() for x in flat):
        return float("nan")
    return float(np.abs(flat[0] - flat[1]).max() / max(np.abs(flat[1]).max(), 1e-30))


def held(model):
    """Each array of the layers; those of a Normalization come back as settings."""
    return Counter(
        np.ravel(v).tobytes()
        for layer in model._flatten_layers()
        if not isinstance(layer, keras.Model | keras.layers.Normalization)
        for v in layer.variables
        if keras.backend.is_float_dtype(v.dtype)
    )


def bits(again, model):
    """Whether all arrays of a model came back bit for bit, and beside them nothing but ones, which
    torch has where Keras's BatchNormalization is told scale=False."""
    one, two = held(again), held(model)
    return not two - one and all((np.frombuffer(x, "float32") == 1).all() for x in one - two)


def named(again, model):
    """The share of layers with weights whose names came back."""
    own = {x.name for x in model._flatten_layers() if x.variables and not hasattr(x, "layers")}
    return len(own & {x.name for x in again._flatten_layers()}) / len(own)


def in_keras(model, x):
    return keras.ops.convert_to_numpy(model(x, training=False))


@jax.jit
def in_flax(model, x):
    return model(x)


def tour(model):
    """What came of the model on its way round."""
    start = time.perf_counter()
    shape = model.input_shape[1:]
    x = images(shape)
    expected = in_keras(model, x)
    turned = torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))
    out = {"parameters": model.count_params()}
    clock = time.perf_counter()
    there = converters.from_keras(model)
    out["seconds in"] = round(time.perf_counter() - clock, 2)
    out["flax"] = error(in_flax(there, x), expected)
    net = converters.to_torch(there)
    with torch.no_grad():
        out["torch"] = error(net(turned).numpy(), expected)
    back = converters.from_torch(net, input_shape=(shape[-1], *shape[:-1]))
    out["flax again"] = error(in_flax(back, x), expected)
    again = converters.to_keras(back)
    out["keras again"] = error(in_keras(again, x), expected)
    out["bits"], out["names"] = bits(again, model), round(named(again, model), 3)
    with tempfile.TemporaryDirectory() as folder:
        out |= by_files(there, x, expected, Path(folder))
    out["seconds"] = round(time.perf_counter() - start, 1)
    out["GiB"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    return out


def by_files(there, x, expected, folder):
    """How far a .keras file written without Keras, and an ONNX file, lead."""
    out = {}
    converters.save(folder / "net.keras", there)
    again = keras.saving.load_model(folder / "net.keras", compile=False)
    out["by .keras"] = error(in_keras(again, x), expected)
    if sum(v.size for v in jax.tree.leaves(there.variables)) > ONNX:
        return out | {"by ONNX": "not tried"}
    try:
        converters.to_onnx(there, path=folder / "net.onnx")
        back = converters.from_onnx(folder / "net.onnx")
        out["by ONNX"] = error(in_flax(back, x), expected)
    except converters.ConversionError as problem:
        out["by ONNX"] = str(problem)[:300]
    return out


def torch_names():
    from helpers import torch_nets

    return list(torch_nets.NETS)


def tour_of_torch(name):
    """What came of a torch net in Flax, torch, Keras and ONNX."""
    from helpers.torch_nets import made

    net, xs = made(name)
    with torch.no_grad():
        expected = listed(net(*xs))
    shapes = [tuple(x.shape[1:]) for x in xs]
    given = [x.numpy() for x in xs]
    model = converters.from_torch(net, shapes if len(xs) > 1 else shapes[0], layout="source")
    out = {"flax": worst(listed(model.module.apply(model.variables, *given)), expected)}

    def back():
        again = converters.to_torch(model, layout="source")
        state, found = net.state_dict(), again.state_dict()
        out["bits"] = all(torch.equal(v, state[k]) for k, v in found.items() if k in state)
        out["keys"] = len(set(state) & set(found)) / len(state)
        with torch.no_grad():
            return listed(again(*xs))

    def in_onnx():
        import onnxruntime

        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "net.onnx")
            kinds = ["int32" if x.dtype.kind == "i" else str(x.dtype) for x in given]
            converters.to_onnx(model, path=path, input_dtype=kinds)
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            wanted = session.get_inputs()
            kinds = {"tensor(int64)": "int64", "tensor(int32)": "int32", "tensor(float)": "float32"}
            feed = {i.name: x.astype(kinds[i.type]) for i, x in zip(wanted, given, strict=True)}
            return session.run(None, feed)

    def in_keras_():
        return listed(converters.to_keras(model)(given[0] if len(given) == 1 else given))

    for target, run in (("torch", back), ("keras", in_keras_), ("onnx", in_onnx)):
        try:
            out[target] = worst(run(), expected)
        except Exception as problem:  # noqa: BLE001 - which the table tells
            out[target] = f"{type(problem).__name__}: {problem}"[:300]
    return out


def listed(outputs):
    many = list(outputs.values()) if isinstance(outputs, dict) else outputs
    return list(many) if isinstance(many, list | tuple) else [many]


def worst(found, expected):
    plain = [keras.ops.convert_to_numpy(x) for x in found]
    return max(error(a, b.numpy()) for a, b in zip(plain, expected, strict=True))


PART = 150  # graphs of one process
DRAWN = {"keras": "dags", "torch": "torch_dags"}


def alone():
    """A process that only computes what others hand to it, one graph at a time."""
    sys.path.insert(0, str(Path(__file__).parent / "helpers"))
    jax.config.update("jax_disable_most_optimizations", True)  # each program runs once or twice
    if keras.backend.backend() == "tensorflow":
        # Whose add takes (2, 1) beside (3, 2, 2, 1) for a bias of the axis behind the batch.
        numpy = importlib.import_module("keras.src.backend.tensorflow.numpy")
        numpy.add = lambda a, b: numpy.subtract(a, numpy.negative(b))
    torch.set_num_threads(1)


def outcome(kind, seed):
    """What came of the drawn graph of a seed: the refusals on its way, or what is wrong."""
    try:
        said = importlib.import_module(DRAWN[kind]).run(seed)
    except Exception as problem:  # noqa: BLE001 - which the table tells
        return {"seed": seed, "wrong": f"{type(problem).__name__}: {problem}"[:600]}
    return {"seed": seed, "said": said}


def outcomes(kind, seeds, jobs):
    """Those of some seeds, as they come; one that ends its process is found by itself."""
    left = set(seeds)
    spawn = multiprocessing.get_context("spawn")
    try:
        with concurrent.futures.ProcessPoolExecutor(jobs, spawn, alone) as pool:
            these = [pool.submit(outcome, kind, seed) for seed in seeds]
            for done in concurrent.futures.as_completed(these):
                result = done.result()
                left.discard(result["seed"])
                yield result
    except concurrent.futures.process.BrokenProcessPool:
        if len(seeds) == 1:
            yield {"seed": seeds[0], "wrong": "it ends the process"}
            return
        for seed in sorted(left):
            yield from outcomes(kind, [seed], 1)


def drawn(kind, count, first, jobs, path):
    """Runs the seeds that a file of lines does not have yet, and gives the outcome of each."""
    told = {}
    if path.exists():
        lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
        found = [x for x in map(json.loads, lines) if x.pop("kind") == kind]
        told = {x["seed"]: x for x in found if "said" in x}
    seeds = range(first, first + count)
    left = [seed for seed in seeds if seed not in told]
    part = PART * jobs
    with path.open("a") as file:
        for at in range(0, len(left), part):  # new processes, since what they compile is kept
            for result in outcomes(kind, left[at : at + part], jobs):
                told[result["seed"]] = result
                file.write(json.dumps({"kind": kind, **result}) + "\n")
                file.flush()
                if "wrong" in result:
                    print(result["seed"], result["wrong"], flush=True)
    return [told[seed] for seed in seeds]


def reason(text):
    """What a refusal says, without the names and numbers of one graph."""
    way, _, rest = text.partition(": ")
    place, _, found = rest.partition(": ")
    found = re.sub(r"'[^']*'|\"[^\"]*\"", "'...'", (found or place).partition(";")[0])
    return f"{way}: {re.sub(r'[0-9]+', 'n', found)[:90]}"


def counts_of(kind, results):
    """The table of drawn graphs."""
    wrong = [x["seed"] for x in results if "wrong" in x]
    exact = sum(x.get("said") == [] for x in results)
    lines = [f"| random graphs of {kind} | {len(results):,} |", "|---|---|",
             f"| exact on every way | {exact:,} |",
             f"| exact, and a way refused by name | {len(results) - exact - len(wrong):,} |",
             f"| wrong | {len(wrong):,} |"]  # fmt: skip
    ways = Counter(w for x in results for w in {t.partition(": ")[0] for t in x.get("said", ())})
    lines += [f"| of these, refused on the way {w} | {n:,} |" for w, n in ways.most_common()]
    why = Counter(r for x in results for r in {reason(text) for text in x.get("said", ())})
    lines += ["", "| refused | graphs |", "|---|---|"]
    lines += [f"| {text} | {n:,} |" for text, n in why.most_common()]
    return "\n".join([*lines, *([f"\nwrong: {wrong}"] if wrong else [])])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--out")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--torch", action="store_true", help="nets of torch in place of Keras's")
    parser.add_argument("--random", nargs=2, metavar=("KIND", "COUNT"), help="drawn graphs")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--jobs", type=int, default=1, help="how many processes")
    given = parser.parse_args()
    if given.random:
        kind, count = given.random[0], int(given.random[1])
        path = Path(given.out or "random.jsonl")
        print(counts_of(kind, drawn(kind, count, given.first, given.jobs, path)))
        return
    path = Path(given.out or "graphs.json")
    told = json.loads(path.read_text()) if path.exists() else {}
    for name in given.names or (torch_names() if given.torch else names()):
        if "bits" in told.get(name, {}):
            continue
        try:
            told[name] = tour_of_torch(name) if given.torch else tour(build(name, given.size))
        except Exception as problem:  # noqa: BLE001 - which the table tells
            told[name] = {"refused": f"{type(problem).__name__}: {problem}"[:500]}
            if given.names:
                traceback.print_exc()
        path.write_text(json.dumps(told, indent=1))
        print(name, told[name], flush=True)
    print(rows_of(told, TORCH if given.torch else KERAS))


TORCH = {"Flax": "flax", "torch": "torch", "Keras": "keras", "ONNX": "onnx"}
KERAS = {
    "Flax": "flax",
    "torch": "torch",
    "Keras again": "keras again",
    "`.keras`": "by .keras",
    "ONNX and back": "by ONNX",
}


def rows_of(told, table):
    """The table of the guide."""
    columns = table.values()
    lines = [f"| net | {' | '.join(table)} |", "|---" * (len(table) + 1) + "|"]
    for name, found in told.items():
        cells = [found.get(c, found.get("refused", "")) for c in columns]
        cells = [f"{c:.0e}".replace("e-0", "e-").replace("0e+00", "0") if isinstance(c, float)
                 else c.partition(": ")[2] or c for c in cells]  # fmt: skip
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
