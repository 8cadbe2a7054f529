"""What the command line prints: bars, tables and JSON, and errors in the words of its options."""

import ast
import contextlib
import dataclasses
import json
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fwt._errors import FwtError

if TYPE_CHECKING:
    from fwt import Model


def size_of(path: Path) -> int:
    """The bytes of a file or of all files in a folder; 0 for what can't be read."""
    with contextlib.suppress(OSError):
        if path.is_dir():
            return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
        return path.stat().st_size
    return 0


def format_of(path: Path) -> Any:
    """The format of a file, or of the one file of weights in a folder."""
    from fwt.converters.files import formats

    return formats.format_of(formats.inside(path))


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[None]:
    """A bar with bytes and speed once it takes more than a second, on a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    from fwt.converters.io import PROGRESS

    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(what, total=max(total, 1))
    begun = time.monotonic()

    def watch(count: int) -> None:
        bar.advance(task, count)
        if not bar.live.is_started and time.monotonic() - begun > 1:
            bar.start()

    token = PROGRESS.set(watch)
    try:
        yield
    finally:
        PROGRESS.reset(token)
        bar.stop()


def _console() -> Any:
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(soft_wrap=True, width=160)


def print_model(
    path: Path,
    model: "Model",
    as_json: bool,
    architecture: Any = None,
    refused: str = "",
    where: Any = None,
) -> None:
    """What a file holds. ``architecture`` is the file that says what layers its weights are of,
    ``refused`` why its model can't be converted, so that these are its arrays alone, and ``where``
    which weights are listed."""
    import fwt

    form, module, told = format_of(path), model.module, fwt.summary(model)
    told = _those(told, model, where) if where else told
    bare = form.weights_only and architecture is None
    if as_json:
        layers = None
        if module is not None and not bare:
            from fwt.converters.frameworks import architecture as _architecture

            layers = _architecture.module_to_json(module.clone(sidecar=""))
        leaves = [{**dataclasses.asdict(line), "shape": list(line.shape)} for line in told.lines]
        print(json.dumps({
            "file": os.fspath(path), "format": form.name, "bytes": size_of(path),
            "module": layers, "weights": told.size, "zeros": told.zeros, "leaves": leaves,
            **({"refused": refused} if refused else {}),
        }))  # fmt: skip
        return
    about = f"{path}: {form.name}"
    if module is None or form.weights_only:
        own = form.knowing is not None and not refused  # a model all the same
        about += ", by the names in the file" if own else ", weights only"
    about += f", {by_own_names(refused)}" if refused else ""
    if module is not None and not bare:
        about += f", {len(fwt.nodes_of(module))} layers"
        about += f" of {architecture}" if form.weights_only else ""
        if (shape := module.input_shape) is not None:
            about += f", input {' x '.join('any' if s is None else str(s) for s in shape)}"
    console = _console()
    console.print(about, highlight=False, markup=False)
    lines = (dataclasses.replace(x, path=x.path.replace("\\/", "/")) for x in told.lines)
    console.print(dataclasses.replace(told, lines=tuple(lines)), highlight=False)


def _those(told: Any, model: "Model", where: Any) -> Any:
    """The lines of the weights that are named, of which each that is tied counts once."""
    from fwt import _tree

    named = set(_tree.Tree(model).named(where))
    lines, first = [], dict[str, str]()
    for line in told.lines:
        if line.path in named:
            one = first.setdefault(line.tied or line.path, line.path)
            lines.append(dataclasses.replace(line, tied="" if one == line.path else one))
    return dataclasses.replace(told, lines=tuple(lines))


def by_own_names(refused: str) -> str:
    """What is said of arrays alone, of a file whose model is refused."""
    return f"by the names in the file, since its model can't be converted ({refused})"


def print_diff(found: Any, as_json: bool, hint: str, refused: str = "") -> None:
    """What differs between two files, a line for each array and layer."""
    if as_json:
        changes = [
            {
                **dataclasses.asdict(c),
                "largest": c.largest if math.isfinite(c.largest or 0) else None,
            }
            for c in found.changes
        ]
        print(
            json.dumps(
                {
                    "equal": found.equal,
                    "same": found.same,
                    "changes": changes,
                    "layers": list(found.layers),
                    **({"refused": refused} if refused else {}),
                }
            )
        )
        return
    console = _console()
    if not found.equal:
        console.print(found, highlight=False)
    said = found.verdict if found.equal else f"{found.verdict}{hint}"
    said += (
        f"; by the names in the files, since a model can't be converted ({refused})"
        if refused
        else ""
    )
    console.print(said, highlight=False, markup=False)


# -- errors -----------------------------------------------------------------------------------

# What a command may end with: an error of ours, or some library's word on a value that nobody
# checked before it.
ERRORS = (FwtError, TypeError, ValueError, ArithmeticError, OSError, ImportError)


def line_of(error: Exception) -> str | None:
    """An error as one line in the words of the command line; None for one of our own making."""
    if isinstance(error, FwtError):
        return in_options(str(error))
    if isinstance(error, ImportError):
        known = error.name in ("keras", "torch", "sklearn", "matplotlib")
        return f"this needs {error.name}: pip install 'fwt[demo]'" if known else None
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


_OPTIONS = "architecture|key|match|max_bytes|shard_bytes|where|tolerance|layout|scope|like"
_AT = r"(?<![\w/\\.-])"  # not in a path

# What Python's words are on the command line.
_WORDS: tuple[tuple[str, Any], ...] = (
    (r"where=fwt\.kernels", "--where kernels, the default,"),
    (r"where=fwt\.biases", "--where biases"),
    (r"fwt\.paths\(params\)", "fwt inspect"),
    (r"fwt\.(initialize|prune|project)\b(?!\()", r"fwt \1"),
    (r"fwt\.(pattern|score|constraint|initializer)s\.", r"--\1 "),
    (r"; give a module", ": --architecture net.keras says which model they are of"),
    (r"give the module,", "give their model with --architecture,"),
    (r"run (it )?with jax\.enable_x64\(True\)( \(or .*?\)\))?(, or, on a tree, give dtype=.*)?$",
     "--dtype float32 reads it in float32, and JAX_ENABLE_X64=1 in the environment keeps it"),
    (r"; load\(path, module=False\) reads its arrays alone",
     "; fwt inspect shows its arrays, fwt convert --weights-only takes them"),
    (rf"{_AT}module=False", "--weights-only"),
    (r"set jax_enable_x64", "set JAX_ENABLE_X64=1 in the environment"),
    (r"use (converters\.transform\(model, t\))", r"use \1 in Python"),
    (r"^prune needs a sparsity or a threshold.*", "prune takes --sparsity 0.8 or --threshold 0.1, "
     "one of the two (--pattern 'n_m(2, 4)' gives a sparsity)"),
    (r"^(scope|like|layout|sparsity|threshold|tolerance)(?= (must|is) )", r"--\1"),
    (r": (drop|rename): ", r": --\1: "),
    (r", or source=, the file that they come from", ""),
    (r" or a dict( \{glob: sparsity\})?(?=$|,)| or None(?=, found)", ""),
    (r"where=lambda path, leaf: path != '(.*?)' leaves it out",
     r"--where kernels, or other globs that \1 is none of, leaves it out"),
    (r"; make a jax\.random\.key of it", ""),
    (r" \(https://flax\.readthedocs[^)\s]*\)", ""),
    (rf"{_AT}strict=False", "--no-strict"),
    (rf"{_AT}fold=False", "--keep-parts"),
    (rf"{_AT}external_data=True", "--external-data"),
    (r"load\(path, dtype='float32'\)( and from_keras\(.*?\) drop )?",
     lambda m: "--dtype float32" + (" drops " if m[1] else "")),
    (rf"{_AT}strict=(?=$|[ ,;:])", "--no-strict"),
    (r"\\+/", "/"),
)  # fmt: skip


def in_options(text: str) -> str:
    """An error in Python's words as one line in those of the command line."""
    text = " ".join(text.split())
    text = re.sub(r"(?<=[\[ ])fwt\.(kernels|biases)(?=[,\]])", r"'\1'", text)  # in a list
    # Values in Python's spelling: a dict, a list, a text, a number.
    value = r"(\{'[^{}]*\}|\['[^\[\]]*\]|'[^']*'|-?\d[\d,_]*)"
    text = re.sub(rf"{_AT}({_OPTIONS}|rename|axes|drop)={value}", _given, text)
    for found, said in _WORDS:
        text = re.sub(found, said, text)
    return re.sub(rf"{_AT}({_OPTIONS}|rename|drop|axes|dtype)=(?=$|[ ,;:]|\.(?!\.))",
                  lambda m: f"--{m[1].replace('_', '-')}", text)  # fmt: skip


def _given(found: re.Match[str]) -> str:
    """An argument in Python's spelling as options."""
    option, text = f"--{found[1].replace('_', '-')}", found[2]
    if text[0] in "-0123456789":
        return f"{option} {text}"
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return found[0]
    if isinstance(value, dict):
        value = [a if b is ... else f"{a}={b}" for a, b in value.items()]
    texts = [str(v).replace("\\/", "/") for v in ([value] if isinstance(value, str) else value)]
    return " ".join(f"{option} {shlex.quote(v)}" for v in texts)
