"""The tables of the guide that are made from the code: ``python tests/helpers/tables.py`` writes
them.

Names, arguments, kinds and what a set is come from the code; only which name means the same
elsewhere is written here, and tested against the libraries.
"""

import inspect
import re
import tempfile
from pathlib import Path

import numpy as np

import fwt
from fwt.converters.walk import opened

GUIDE = Path(__file__).resolve().parents[2] / "examples" / "guide"

# name -> Keras's, torch's and optax's name
CONSTRAINTS = {
    "non_negative": ("NonNeg", "", "projection_non_negative"),
    "max_norm": ("MaxNorm", "", ""),
    "unit_norm": ("UnitNorm", "", ""),
    "min_max_norm": ("MinMaxNorm", "", ""),
    "radial": ("", "", ""),
    "box": ("", "", "projection_box"),
    "hypercube": ("", "", "projection_hypercube"),
    "linf_ball": ("", "", "projection_linf_ball"),
    "linf_sphere": ("", "", ""),
    "l2_ball": ("", "", "projection_l2_ball"),
    "l2_sphere": ("", "", "projection_l2_sphere"),
    "l1_ball": ("", "", "projection_l1_ball"),
    "l1_sphere": ("", "", "projection_l1_sphere"),
    "simplex": ("", "", "projection_simplex"),
    "hyperplane": ("", "", "projection_hyperplane"),
    "halfspace": ("", "", "projection_halfspace"),
    "zero_mean": ("", "", ""),
    "weight_standardization": ("", "", ""),
    "k_sparse": ("", "", ""),
    "quantized": ("", "", ""),
    "orthogonal": ("", "parametrizations.orthogonal", ""),
    "spectral_ball": ("", "", ""),
    "low_rank": ("", "", ""),
    "symmetric": ("", "", ""),
    "positive_semidefinite": ("", "", ""),
    "doubly_stochastic": ("", "", ""),
}
# One distribution a row: JAX's name, Keras's, torch's; several names of one are one cell.
INITIALIZERS = [
    ("zeros", "zeros", "zeros"),
    ("ones", "ones", "ones"),
    ("constant", "constant", "constant"),
    ("", "identity", "eye"),
    ("uniform", "random_uniform", "uniform"),
    ("normal", "random_normal", "normal"),
    ("truncated_normal", "truncated_normal", "trunc_normal"),
    ("variance_scaling", "variance_scaling", ""),
    ("glorot_uniform xavier_uniform", "glorot_uniform", "xavier_uniform"),
    ("glorot_normal xavier_normal", "glorot_normal", ""),
    ("", "", "xavier_normal"),
    ("he_uniform kaiming_uniform", "he_uniform", "kaiming_uniform"),
    ("he_normal kaiming_normal", "he_normal", ""),
    ("", "", "kaiming_normal"),
    ("lecun_uniform", "lecun_uniform", ""),
    ("lecun_normal", "lecun_normal", ""),
    ("orthogonal", "orthogonal", "orthogonal"),
    ("delta_orthogonal", "", ""),
    ("", "", "dirac"),
    ("", "", "sparse"),
]


def call(prefix, module, name):
    """``name(arguments)`` with their defaults, as the signature has them."""
    noun = getattr(module, name)
    if not inspect.isfunction(noun):
        return f"`{prefix}{name}`"
    parts = []
    for p in inspect.signature(noun).parameters.values():
        default = "" if p.default is p.empty else f"={p.default!r}".replace("'", '"')
        parts.append(p.name + default)
    return f"`{prefix}{name}({', '.join(parts)})`" if parts else f"`{prefix}{name}`"


def about(noun):
    """The first line of the docstring."""
    line = (noun.__doc__ or "").split("\n")[0].rstrip(".")
    line = re.sub(r":func:`(\w+)`", r"`\1`", line).replace("``", "`")
    return line.replace("|", "&#124;")


def code(*names):
    return ", ".join(f"`{name}`" for name in names if name)


def made(name):
    """A constraint with the least arguments."""
    arguments = {"box": (-1.0, 1.0), "k_sparse": (1,), "low_rank": (1,)}.get(name, ())
    return getattr(fwt.constraints, name)(*arguments)


def camel(name):
    return name.title().replace("_", "")


def table():
    lines = ["| what | fwt | Keras | torch | JAX, optax |", "|---|---|---|---|---|"]
    inits = fwt.initializers
    prefixes = ("initializers.", "initializers.keras.", "initializers.torch.")
    for row in INITIALIZERS:
        jax_names, keras_name, torch_name = row[0].split(), row[1], row[2]
        calls, docs = [], []
        for prefix, space, names in zip(
            prefixes, (inits, inits.keras, inits.torch), row, strict=True
        ):
            for name in names.split():
                calls.append(call(prefix, space, name))
                if inspect.isfunction(getattr(space, name)):
                    docs.append(about(getattr(space, name)))
        what = docs[0]
        theirs = camel(keras_name), torch_name and torch_name + "_"
        cells = [what, "<br>".join(calls), *map(code, theirs), code(*jax_names)]
        lines.append(f"| {' | '.join(cells)} |")
    for name, elsewhere in CONSTRAINTS.items():
        constraint = made(name)
        masks = "" if constraint.keeps_zeros else ", no masks"
        what = f"{about(getattr(fwt.constraints, name))} *({constraint.kind}{masks})*"
        theirs = [code(x) for x in elsewhere]
        cells = [what, call("constraints.", fwt.constraints, name), *theirs]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# What no row says.
HELD = {
    ("keras", "Activation"): "every function of keras.activations but threshold",
    ("keras", "InputLayer"): "the shape of the input",
    ("torch", "Sequential"): "one inside another too",
    ("torch", "ModuleList"): "used in order",
    ("torch", "TransformerEncoder"): "its layers, under their paths",
    **{
        ("torch", name): "in a module: its layers and what it computes between them"
        for name in ("Transformer", "TransformerDecoder", "TransformerDecoderLayer")
    },
    **{
        ("torch", name): "in a module: what it computes"
        for name in ("Bilinear", "CosineSimilarity", "PairwiseDistance")
    },
}


def classes(framework):
    """The names of a framework's classes, each once."""
    import keras
    import torch

    space = keras.layers if framework == "keras" else torch.nn
    found = {n: getattr(space, n) for n in dir(space) if isinstance(getattr(space, n), type)}
    return sorted({n for n, c in found.items() if c.__name__ == n or c.__name__ not in found})


def layer_line(framework, name):
    """What a class is elsewhere, whether it crosses, and a note or the reason."""
    from fwt.converters.rows import table as _table

    if (framework, name) in HELD:
        return "", True, HELD[framework, name]
    if name.startswith("Lazy"):
        return "", True, "once it has seen an input"
    rows = _table.rows_of(framework, name)
    if not rows:
        return "", False, _table.REFUSED[framework][name]
    other = "torch" if framework == "keras" else "keras"
    notes = list(dict.fromkeys(r.note for r in rows if r.note))
    ours = sorted({r.flax.__name__ for r in rows if r.flax})
    twins = [
        t for name in ours for t in _table.rows_of("flax", name) if set(t.ranks) & _ranks(rows)
    ]
    there = {r.class_in(other) for r in [*rows, *twins] if r.class_in(other)}
    operations = {kind for kind in there if kind.startswith("ops.")}
    there -= operations
    if not there and other == "keras":
        there = {f"`Activation({r.function[0]!r})`" for r in rows if r.function}
    if not there and any((kind, other) in opened.APART for kind in ours):
        notes.append(f"in {other} the layers that it is made of")
    silent = any(r.flax is None or r.kind for r in rows) or "identity" in "".join(notes)
    if operations and not there:
        notes.append("in keras an operation")
    if not there and not silent and f"in {other}" not in "".join(notes):
        reason = next((r.lacks.get(other) for r in rows if r.lacks), None)
        notes.append(f"{other}: refused, {reason}")
    return (
        " / ".join(filter(None, [", ".join(ours), ", ".join(sorted(there))])),
        True,
        "; ".join(notes),
    )


def _ranks(rows):
    return {rank for r in rows for rank in r.ranks} or {None}


def layers():
    lines = []
    for framework, title in (("keras", "keras.layers"), ("torch", "torch.nn")):
        other = "torch" if framework == "keras" else "Keras"
        lines += ["", f"| {title} | Flax / {other} | exact, and what to know |", "|---|---|---|"]
        groups, reasons = {}, {}
        for name in classes(framework):
            to, crosses, note = layer_line(framework, name)
            if not crosses:
                reasons.setdefault(note, []).append(f"`{name}`")
                continue
            plain = re.sub(r"[123](?=[dD])", "", name), re.sub(r"[123](?=[dD])", "", to), note
            training = note.startswith("the identity at inference, kept")
            groups.setdefault(note if training else plain, []).append((name, to, note))
        for entries in groups.values():
            names = ", ".join(f"`{name}`" for name, _, _ in entries)
            lines.append(f"| {names} | {entries[0][1]} | {entries[0][2]} |")
        lines += ["", f"Refused of {title}:", ""]
        lines += [f"- {', '.join(names)}: {note}" for note, names in reasons.items()]
    return "\n".join(lines[1:])


DTYPES = (
    *("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8"),
    *("uint64", "uint32", "uint16", "uint8", "bool", "complex128", "complex64"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
)


def lossless(form, suffix, shards):
    """Which dtypes come back bit for bit, by trying."""
    import flax.linen as nn
    import ml_dtypes

    import fwt
    from fwt import converters

    kept = []
    for name in DTYPES:
        dtype = np.dtype(getattr(ml_dtypes, name, name))
        keras = form.framework == "Keras"  # which computes in the dtype of the weights
        half = dtype if keras and name in ("float16", "bfloat16") else None
        net = fwt.Sequential([("d", nn.Dense(2, use_bias=False, dtype=half))], (3,))
        raw = np.random.default_rng(0).integers(0, 256, (3, 2 * dtype.itemsize), dtype=np.uint8)
        leaf = (raw % 2).astype(bool) if name == "bool" else raw.view(dtype)
        leaf = leaf[:, :2]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"w{suffix}"
            module = net if form.framework in ("Keras", "PyTorch", "ONNX") else None
            how = {"architecture": net} if form.framework in ("Keras", "PyTorch") else {}
            try:
                converters.save(path, module, {"params": {"d": {"kernel": leaf}}}, **shards)
                found = converters.load(path, **how).variables["params"]["d"]["kernel"]
            except converters.ConversionError:
                continue
            if found.dtype == leaf.dtype and found.tobytes() == leaf.tobytes():
                kept.append(name)
    if len(kept) == len(DTYPES):
        return "every dtype"
    left = [name for name in DTYPES if name not in kept]
    if left == [name for name in DTYPES if name.startswith("float8")]:
        return "every dtype but the 8-bit floats"
    if len(left) < 3:
        return f"every dtype but {' and '.join(left)}"
    return ", ".join(kept)


def formats():
    from fwt.converters.files import formats as _formats

    lines = [
        "| file | what it holds | read | written | bit for bit | needs |",
        "|---|---|---|---|---|---|",
    ]
    for form in _formats.FORMATS:
        suffix, shards = form.suffixes[0], {}
        if form.save is None and form.save_folder is None:
            suffix = next(f.suffixes[0] for f in _formats.FORMATS
                          if f.save_shards and f.framework == form.framework)  # fmt: skip
            shards = {"shard_bytes": 1}
        names = ", ".join(f"`{s}`" for s in form.suffixes)
        own = {"Keras": "Keras", "PyTorch": "torch"}.get(form.framework)
        needs = f"no {own}" if own else "nothing more"
        needs = "`fwt[onnx]`" if form.framework == "ONNX" else needs
        lines.append(
            f"| {names} | {form.holds} | yes | yes | {lossless(form, suffix, shards)} | {needs} |"
        )
    return "\n".join(lines)


# page -> the name of its table and what makes it
PAGES = {
    "initializers.md": ("the table", table),
    "layers.md": ("the layers", layers),
    "files.md": ("the formats", formats),
}


def start(page):
    return f"<!-- {PAGES[page][0]}: python tests/helpers/tables.py -->"


def block(page):
    """The table of a page, between its two comments."""
    return f"{start(page)}\n{PAGES[page][1]()}\n<!-- end -->"


def stands(page):
    """Whether the table of a page is that of the code."""
    return block(page) in (GUIDE / page).read_text()


def write(page):
    text = (GUIDE / page).read_text()
    pattern = f"{re.escape(start(page))}.*?<!-- end -->"
    new, count = re.subn(pattern, lambda _: block(page), text, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"{page} has no place for its table")
    (GUIDE / page).write_text(new)


if __name__ == "__main__":
    for page in PAGES:
        write(page)
