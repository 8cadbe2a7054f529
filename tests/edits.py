"""Whole models edited as files and live, against the same change made by hand in their framework.

    python tests/edits.py [--kind keras|torch|folder] [--max-mb 400] [--until 19:00] [name ...]

Each architecture of keras.applications as a ``.keras`` file, each net of helpers/torch_nets.py in a
checkpoint with its optimizer, and folders of Hugging Face, if transformers is installed; all with
random weights. Each goes through ``summary``, a global prune, a projection and ``diff``. The
framework opens what was written: its weights have to be those that NumPy makes of the framework's
arrays, to the bit for prune, and its predictions those of the live model with these weights. The
live model, given the same transform, has to hold what the file holds.
"""

import argparse
import copy
import filecmp
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import defaultdict
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "tensorflow")  # which compiles nothing

sys.path.pop(0)  # the folder of this file, which has one that is named fwt

import fwt
from fwt import converters

sys.path.extend(str(Path(__file__).parent / p) for p in (".", "helpers", "converters/files"))

import graphs
import keras
import ml_dtypes
import numpy as np
import torch
import torch_nets

SPARSITY, RADIUS = 0.5, 0.5
PRUNE = fwt.prune(SPARSITY, scope="global")
WORDS = {
    "prune": ["prune", "--sparsity", str(SPARSITY), "--scope", "global"],
    "project": ["project", "--constraint", f"max_norm({RADIUS})"],
}
# The applications from small to large; one that is not here comes last.
SIZES = """MobileNetV3Small MobileNetV2 MobileNet EfficientNetB0 NASNetMobile EfficientNetV2B0
MobileNetV3Large EfficientNetB1 EfficientNetV2B1 DenseNet121 EfficientNetB2 EfficientNetV2B2
EfficientNetB3 DenseNet169 EfficientNetV2B3 EfficientNetB4 DenseNet201 EfficientNetV2S Xception
InceptionV3 ResNet50 ResNet50V2 ConvNeXtTiny EfficientNetB5 EfficientNetB6 VGG16 VGG19 ResNet101
ResNet101V2 ConvNeXtSmall EfficientNetV2M InceptionResNetV2 ResNet152 ResNet152V2 EfficientNetB7
NASNetLarge ConvNeXtBase EfficientNetV2L ConvNeXtLarge ConvNeXtXLarge""".split()  # noqa: SIM905 - five lines in place of forty


class Keras:
    """A Functional model in a ``.keras`` file."""

    target, how = "net.keras", {}

    @staticmethod
    def names():
        known = [*SIZES, *graphs.names()]
        return sorted(graphs.names(), key=known.index)

    def __init__(self, name):
        self.net = graphs.build(name, 64)
        self.x = graphs.images(self.net.input_shape[1:])
        parts = {keras.layers.DepthwiseConv2D: "kernel",
                 keras.layers.SeparableConv2D: "depthwise_kernel"}  # fmt: skip
        layers = self.net._flatten_layers()
        self.settings = {x.name for x in layers if isinstance(x, keras.layers.Normalization)}
        own = {id(getattr(x, parts[type(x)])) for x in layers if type(x) in parts}
        self.depthwise = {n for n, v in self.variables(self.net).items() if id(v) in own}

    def save(self, path):
        self.net.save(path)

    def opened(self, path, before=None):
        """``before`` was opened from a file that says the same model, which spares its making."""
        if before is None:
            return keras.saving.load_model(path, compile=False)
        before.load_weights(path)
        return before

    def arrays(self, net):
        return {n: keras.ops.convert_to_numpy(v) for n, v in self.variables(net).items()}

    def variables(self, net):
        """Under the paths that they have in the first model; those of a copy may be others."""
        names, these = ([v for v in x.weights if keras.backend.is_float_dtype(v.dtype)]
                        for x in (self.net, net))  # fmt: skip
        return {f"{k} {n.path}": v for k, (n, v) in enumerate(zip(names, these, strict=True))}

    def assign(self, net, arrays):
        for n, v in self.variables(net).items():
            v.assign(arrays[n])

    def count(self):
        """Without those of Normalization, which are settings where they are given."""
        layers = [x for x in self.net._flatten_layers() if x.name in self.settings]
        settings = {id(v) for x in layers for v in x.variables}
        return sum(int(np.prod(v.shape)) for v in self.net.weights if id(v) not in settings)

    def kernels(self, net):
        return {n for n in self.variables(net) if n.endswith("kernel")}

    def inner(self, name, array):
        """The axes of the vector of one output unit."""
        return (0, 1) if name in self.depthwise else tuple(range(array.ndim - 1))

    def axes(self, names):
        """What a file doesn't tell of its axes."""
        return None

    def predicted(self, net):
        return graphs.in_keras(net, self.x)

    def rest(self, path):
        """All that the file has beside the weights."""
        with zipfile.ZipFile(path) as file:
            return {n: file.read(n) for n in file.namelist() if not n.endswith(".h5")}


class Torch:
    """A state dict and that of an optimizer in one ``.pt`` file."""

    target, how, settings = "net.pt", {"key": "model"}, ()

    @staticmethod
    def names():
        return list(torch_nets.NETS)

    def __init__(self, name):
        self.net, self.x = torch_nets.made(name)

    def save(self, path):
        optimizer = torch.optim.AdamW(self.net.parameters())
        for p in self.net.parameters():
            p.grad = torch.ones_like(p)
        saved = self.net.state_dict()
        held = {k: v.clone() for k, v in saved.items()}
        optimizer.step()  # so that it has a state
        self.net.load_state_dict(held)
        self.net.zero_grad()
        saved = self.net.state_dict()
        torch.save({"model": saved, "optimizer": optimizer.state_dict(), "epoch": 3}, path)

    def opened(self, path, before=None):
        net = copy.deepcopy(self.net)
        net.load_state_dict(torch.load(path)["model"])
        return net

    def arrays(self, net):
        return {n: in_numpy(x) for n, x in net.state_dict().items()}

    def assign(self, net, arrays):
        with torch.no_grad():
            for n, x in net.state_dict().items():
                if x.is_floating_point():
                    x.copy_(torch.from_numpy(arrays[n].astype("float32")))

    def count(self):
        return sum({x.data_ptr(): x.numel() for x in self.net.state_dict().values()}.values())

    def kernels(self, net):
        """The weights of more than one axis of the modules that are no norm and no embedding."""
        tables = [m.weight for m in net.modules() if isinstance(m, torch.nn.Embedding)]
        return {
            f"{name}.{own}" if name else own
            for name, module in net.named_modules()
            for own, p in module.named_parameters(recurse=False)
            if ("weight" in own and p.ndim > 1 and not any(p is t for t in tables))
        }

    def inner(self, name, array):
        module = self.net.get_submodule(name.rpartition(".")[0])
        out = 0
        if isinstance(module, torch.nn.modules.conv._ConvTransposeNd):
            assert module.groups == 1
            out = 1
        if type(module).__name__ == "Conv1D":  # of Hugging Face
            out = 1
        return tuple(k for k in range(array.ndim) if k != out)

    def axes(self, names):
        """A state dict tells nothing of a kernel with more than two axes."""
        found = {}
        for path, name in names.items():
            module = self.net.get_submodule(name.rpartition(".")[0])
            turned = isinstance(module, torch.nn.modules.conv._ConvTransposeNd)
            window = ["h", "w", "d"][: len(module.kernel_size)]
            found[path] = " ".join([*(["in", "out"] if turned else ["out", "in"]), *window])
        return found

    def predicted(self, net):
        with torch.no_grad():
            return np.concatenate([np.ravel(x) for x in graphs.listed(net(*self.x))])

    def rest(self, path):
        held = torch.load(path)
        del held["model"]
        return repr(held)


class Folder(Torch):
    """A folder that save_pretrained wrote."""

    target, how = "net", {}

    @staticmethod
    def names():
        return ["bert", "gpt2", "llama", "tied_llama", "vit", "t5"]

    def __init__(self, name):
        import test_hugging_face

        self.tests = test_hugging_face
        torch.manual_seed(0)
        net = getattr(test_hugging_face, name)()
        with torch.no_grad():
            for p in net.parameters():
                if p.ndim > 1:
                    p.mul_(8)  # so that norms lie on both sides of the radius
        with tempfile.TemporaryDirectory() as folder:
            net.save_pretrained(folder)
            self.net = type(net).from_pretrained(folder).eval()  # whose buffers are float32

    def save(self, path):
        self.net.save_pretrained(path)

    def axes(self, names):
        return None  # which config.json tells

    def opened(self, path, before=None):
        return type(self.net).from_pretrained(path).eval()

    def predicted(self, net):
        return self.tests.outputs(net).float().numpy()

    def rest(self, path):
        return {f.name: f.read_bytes() for f in path.iterdir() if f.suffix != ".safetensors"}


KINDS = {"torch": Torch, "folder": Folder, "keras": Keras}


def in_numpy(tensor):
    if tensor.dtype == torch.bfloat16:
        return tensor.float().numpy().astype(ml_dtypes.bfloat16)
    return tensor.detach().numpy().copy()


def content(array):
    return array.size, hash(np.ascontiguousarray(array).tobytes())


def same(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def pruned(kernels, sparsity=SPARSITY):
    """Of the weights of all kernels together those of least size are 0, of equals the last."""
    sizes = np.concatenate([np.abs(np.ravel(x)).astype("float32") for x in kernels.values()])
    count = round(sparsity * sizes.size)
    edge = np.partition(sizes, count - 1)[count - 1]
    gone = sizes < edge
    equal = np.flatnonzero(sizes == edge)
    gone[equal[len(equal) - (count - int(gone.sum())) :]] = True
    out, at = {}, 0
    for name, x in kernels.items():
        out[name] = np.where(gone[at : at + x.size].reshape(x.shape), np.zeros_like(x), x)
        at += x.size
    return out, float(edge), len(equal)


def projected(kind, kernels):
    out = {}
    for name, x in kernels.items():
        wide = x.astype("float64")
        norms = np.sqrt((wide * wide).sum(kind.inner(name, x), keepdims=True))
        out[name] = np.where(norms <= RADIUS, wide, wide * RADIUS / np.maximum(norms, 1e-300))
    return out


def close(found, expected):
    rounding = 2**-8 if found.dtype == ml_dtypes.bfloat16 else 1e-6
    gap = np.abs(found.astype("float64") - expected)
    return bool((gap <= rounding * np.abs(expected) + 1e-37).all())


def few(names):
    names = sorted(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def loaded(kind, path):
    return converters.load(path, **kind.how) if kind.how else path


def tour(kind, folder, command):
    """What differs, a line each; nothing where all is as it should be."""
    wrong = []

    def check(fine, said):
        if not fine:
            wrong.append(said)
        return fine

    path = folder / "before" / kind.target
    path.parent.mkdir()
    kind.save(path)
    before = kind.arrays(kind.net)
    names = defaultdict(list)
    for name, x in before.items():
        names[content(x)].append(name)

    lines = fwt.summary(loaded(kind, path)).lines
    own = [x for x in lines if not x.tied and x.path.split("/")[-2:][0] not in kind.settings]
    size = sum(x.size for x in own)
    count = kind.count()
    check(size == count, f"summary: {size} weights, the framework has {count}")

    chosen = {p: names[content(x)] for p, x in fwt.select(loaded(kind, path), fwt.kernels).items()}
    check(all(chosen.values()), f"selected, but not in the framework: "
          f"{few(p for p, n in chosen.items() if not n)}")  # fmt: skip
    chosen = {p: n[0] for p, n in chosen.items() if len(n) == 1}  # the tied ones are left alone
    own = {n for n in kind.kernels(kind.net) if len(names[content(before[n])]) == 1}
    check(own == set(chosen.values()), f"kernels: only the file {few(set(chosen.values()) - own)}; "
          f"only the framework {few(own - set(chosen.values()))}")  # fmt: skip
    kernels = {n: before[n] for n in chosen.values()}
    by_hand, edge, ties = pruned(kernels)
    bound = fwt.constraints.max_norm(RADIUS)
    axes = kind.axes({p: n for p, n in chosen.items() if before[n].ndim > 2})
    changes = {
        "prune": (PRUNE, PRUNE, by_hand),
        "project": (fwt.project(bound, axes=axes), fwt.project(bound), projected(kind, kernels)),
    }

    same_file = folder / "copy" / kind.target
    (shutil.copytree if path.is_dir() else shutil.copy)(path, make(same_file))
    check(fwt.diff(loaded(kind, path), loaded(kind, same_file)).equal, "diff: a copy is no equal")
    net, live = None, kind.net
    for verb, (t, of_live, expected) in changes.items():
        out = make(folder / verb / kind.target)
        converters.transform(path, t, out, **kind.how)
        check(kind.rest(path) == kind.rest(out), f"{verb}: more than the weights is other")
        net = kind.opened(out, net)
        after = kind.arrays(net)
        other = [n for n in before if n not in kernels and not same(after[n], before[n])]
        check(not other and after.keys() == before.keys(), f"{verb}: changed {few(other)}")
        if verb == "prune":
            bad = [n for n in kernels if not same(after[n], expected[n])]
        else:
            bad = [n for n in kernels if not close(after[n], expected[n])]
        check(not bad, f"{verb}: other weights than by hand: {few(bad)}")

        differ = fwt.diff(loaded(kind, path), loaded(kind, out)).changes
        told = {c.path.removeprefix("params/") for c in differ}
        moved = {p for p, n in chosen.items() if not same(after[n], before[n])}
        check(told == moved, f"diff: {verb} changed {few(moved - told)}; said {few(told - moved)}")
        check(moved, f"{verb}: nothing changed")

        hand = before | (expected if verb == "prune" else {n: after[n] for n in kernels})
        kind.assign(live, hand)
        gap = graphs.error(kind.predicted(net), kind.predicted(live))
        check(gap <= 1e-6, f"{verb}: predictions are {gap:.0e} from those by hand")

        kind.assign(live, before)
        converters.transform(live, of_live)
        found = kind.arrays(live)
        bad = [n for n in after if not same(found[n], after[n])]
        if bad and verb == "project":
            bad = [n for n in bad if not close(found[n], after[n].astype("float64"))]
        elif bad and ties > 1:  # the axes of live models are others, and so the order of equals
            bad = [n for n in bad if not equal_but_for(edge, found[n], after[n])]
        check(not bad, f"{verb}: live and by file differ in {few(bad)}")
        if not bad and all(same(found[n], after[n]) for n in after):
            check(fwt.diff(net, live).equal, f"diff: {verb}, live, is no equal of the file")
        kind.assign(live, before)
        if command:
            wrong.extend(by_command(kind, folder, path, verb, out, axes))
        shutil.rmtree(out.parent)
    return wrong


def equal_but_for(edge, a, b):
    a, b = a.astype("float32"), b.astype("float32")
    return bool((np.maximum(np.abs(a), np.abs(b))[a != b] == edge).all())


def make(path):
    path.parent.mkdir(exist_ok=True)
    return path


def by_command(kind, folder, path, verb, out, axes):
    """The command line in a process of its own, which has to write the same bytes."""
    key = [f"--{k}={v}" for k, v in kind.how.items()]
    again = make(folder / "command" / kind.target)
    verb, *words = WORDS[verb]
    if axes and verb == "project":
        words += [x for p, names in axes.items() for x in ("--axes", f"{p}={names}")]

    def run(*words):
        code = "import sys; from fwt.cli import main; sys.argv[0] = 'fwt'; main()"
        env = {**os.environ, "PYTHONPATH": ""}
        return subprocess.run([sys.executable, "-c", code, *map(str, words)], cwd=folder, env=env,
                              capture_output=True, text=True, check=False)  # fmt: skip

    steps = {
        "inspect": (0, [path, *key]),
        verb: (0, [path, again, *words, *key]),
        "diff": (3, [path, again, *key]),
        "diff of equals": (0, [path, path, *key]),
    }
    wrong = []
    for step, (code, given) in steps.items():
        done = run(step.split()[0], *given)
        if done.returncode != code:
            wrong.append(
                f"fwt {step}: exit {done.returncode}: {(done.stdout + done.stderr)[-300:]}"
            )
    if not wrong:
        files = [p.name for p in path.iterdir()] if path.is_dir() else [""]
        if not all(filecmp.cmp(again / f, out / f, shallow=False) for f in files):
            wrong.append(f"fwt {verb}: other bytes than by transform")
    shutil.rmtree(again.parent)
    return wrong


def megabytes(path):
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(f.stat().st_size for f in files if f.is_file()) / 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--kind", choices=KINDS, action="append")
    parser.add_argument("--max-mb", type=float, default=400)
    parser.add_argument("--until", help="no model is begun after that time of the day")
    given = parser.parse_args()
    told = {}
    for label in given.kind or KINDS:
        kind = KINDS[label]
        if kind is Folder and not importlib.util.find_spec("transformers"):
            print("transformers is not installed: no folders", flush=True)
            continue
        command = True
        for name in kind.names():
            if given.names and name not in given.names:
                continue
            if given.until and time.strftime("%H:%M") >= given.until:
                break
            told[f"{label} {name}"] = line = one(kind, name, command, given.max_mb, given.names)
            print(f"{label} {name}: {line}", flush=True)
            command = False
    done = {k: v for k, v in told.items() if not v.endswith("skipped")}
    fine = [k for k, v in done.items() if v.endswith("ok")]
    for label in KINDS:
        mine = [k for k in done if k.startswith(label)]
        print(f"{label}: {len([k for k in mine if k in fine])} ok of {len(mine)}")
    sys.exit(len(fine) < len(done))


def one(kind, name, command, most, verbose):
    start = time.perf_counter()
    try:
        model = kind(name)
        size = sum(x.nbytes for x in model.arrays(model.net).values()) / 1e6
        if size > most:
            return f"{size:.0f} MB, skipped"
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrong = tour(model, Path(folder), command)
    except Exception as problem:  # noqa: BLE001 - which the table tells
        if verbose:
            traceback.print_exc()
        return f"{type(problem).__name__}: {problem}"[:500]
    said = "; ".join(wrong) or "ok"
    return f"{size:.1f} MB, {time.perf_counter() - start:.0f} s, {said}"


if __name__ == "__main__":
    main()
