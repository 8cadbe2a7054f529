"""The command line: the verbs of fwt on files.

Exit codes: 0 done (of diff: equal), 1 the input or the request is wrong (one line says what), 2
wrong usage, 3 the two files of diff or verify differ, or what convert --verify read again does.
"""

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
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from fwt._types import FwtError

if TYPE_CHECKING:
    from fwt import Model

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Functional weight transforms: change the weights of Keras, PyTorch and Flax models.",
)


def _version(asked: bool) -> None:
    if asked:
        import fwt

        print(f"fwt {fwt.__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


In = Annotated[Path, typer.Argument(help="A file or folder of any format, told by its content.")]
Out = Annotated[Path, typer.Argument(help="Where to write; the suffix is the format.")]
ArchitectureOption = Annotated[
    Path | None,
    typer.Option("--architecture", "-a", help="For weights alone: the file with their model."),
]
KeyOption = Annotated[
    str | None, typer.Option(help="Which part of the file, such as 'model' or 'state/params'.")
]
RenameOption = Annotated[
    list[str] | None,
    typer.Option(help="With --architecture: OLD=NEW, the start of names; repeatable."),
]
MatchOption = Annotated[
    str, typer.Option(help="With --architecture: name, or order to take arrays as they come.")
]
DropOption = Annotated[
    list[str] | None,
    typer.Option(help="With --architecture: a glob of names that are not wanted; repeatable."),
]
StrictOption = Annotated[
    bool,
    typer.Option(help="With --architecture: whether all names and shapes must fit."),
]
KeepOption = Annotated[
    bool, typer.Option("--keep-parts", help="Keep the parts of torch's prune, weight_norm, ...")
]
MaxOption = Annotated[int | None, typer.Option(help="How many bytes compressed parts may grow to.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
WhereOption = Annotated[
    list[str] | None,
    typer.Option("--where", "-w", help="A glob on the path, such as 'dense_*/kernel'; repeatable."),
]
AxesOption = Annotated[
    list[str] | None,
    typer.Option(help="What the axes of leaves mean, such as '**/weight=out in h w'; repeatable."),
]
LayoutOption = Annotated[
    str | None,
    typer.Option(help="For .pt: channels_first (the default) or source, the order of its ends."),
]


def _where(globs: list[str] | None) -> Any:
    import fwt

    return globs or fwt.kernels


def _axes(texts: list[str] | None) -> dict[str, str] | None:
    out = {}
    for text in texts or ():
        glob, found, names = text.rpartition("=")
        if not found:
            raise FwtError(f"--axes {text!r}: expected GLOB=NAMES, such as '**/weight=out in h w'")
        out[glob] = names
    return out or None


def _changed(source: Path, target: Path, t: Any, layout: str | None) -> None:
    """Load, transform, save, and the table of what came out."""
    model = t(_load(source, sidecar=True))
    _save(target, model, layout=layout)
    _print_summary(target, model)


def _load(path: Path, **how: Any) -> "Model":
    from fwt import converters

    if how.get("match", "name") not in ("name", "order"):
        raise typer.BadParameter(f"--match {how['match']}: expected name or order")
    rename = how.pop("rename", None)
    if rename:
        pairs = [text.partition("=") for text in rename]
        if not all(found for _, found, _ in pairs):
            raise typer.BadParameter(f"--rename {' '.join(rename)}: expected OLD=NEW")
        how["rename"] = {old: new for old, _, new in pairs}
    with _progress(f"reading {path.name}", _size(path)):
        return converters.load(path, **how)


def _save(path: Path, model: "Model", **how: Any) -> None:
    from fwt import converters

    sizes = [getattr(x, "nbytes", 0) for x in _leaves(model)]
    with _progress(f"writing {path.name}", sum(sizes)):
        converters.save(path, *model, **how)


def _leaves(model: "Model") -> list[Any]:
    import jax

    return jax.tree.leaves(model.variables)


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):
        if path.is_dir():
            return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
        return path.stat().st_size
    return 0


@contextlib.contextmanager
def _progress(what: str, total: int) -> Iterator[None]:
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


def _print_summary(path: Path, model: "Model") -> None:
    from rich.console import Console

    import fwt

    console = Console() if sys.stdout.isatty() else Console(soft_wrap=True, width=160)
    module = model.module
    kind = "weights only" if module is None else f"{len(module.layers)} layers"
    shape = None if module is None else module.input_shape
    about = f"{path}: {_format(path).name}, {kind}"
    if shape is not None:
        about += f", input {' x '.join('any' if s is None else str(s) for s in shape)}"
    console.print(about, highlight=False, markup=False)
    console.print(fwt.summary(model), highlight=False)


def _format(path: Path) -> Any:
    from fwt.converters.files import formats

    return formats.format_of(formats.inside(path))


def _print_json(path: Path, model: "Model") -> None:
    """The file, its format, its layers and its leaves."""
    import fwt
    from fwt.converters.frameworks import architecture as _architecture

    told = fwt.summary(model)
    leaves = [{**dataclasses.asdict(line), "shape": list(line.shape)} for line in told.lines]
    module = None
    if model.module is not None:
        module = _architecture.module_to_json(model.module)
    print(json.dumps({
        "file": os.fspath(path), "format": _format(path).name, "bytes": _size(path),
        "module": module, "weights": told.size, "zeros": told.zeros, "leaves": leaves,
    }))  # fmt: skip


@app.command()
def inspect(
    file: In,
    architecture: ArchitectureOption = None,
    key: KeyOption = None,
    rename: RenameOption = None,
    drop: DropOption = None,
    match: MatchOption = "name",
    strict: StrictOption = True,
    keep_parts: KeepOption = False,
    max_bytes: MaxOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a file holds: layers, shapes, dtypes, zeros."""
    model = _load(
        file, architecture=architecture, key=key, rename=rename, drop=drop or (), match=match,
        strict=strict, fold=not keep_parts, max_bytes=max_bytes,
    )  # fmt: skip
    (_print_json if as_json else _print_summary)(file, model)


@app.command()
def convert(
    source: In,
    target: Out,
    architecture: ArchitectureOption = None,
    key: KeyOption = None,
    rename: RenameOption = None,
    drop: DropOption = None,
    match: MatchOption = "name",
    strict: StrictOption = True,
    keep_parts: KeepOption = False,
    max_bytes: MaxOption = None,
    shard_bytes: Annotated[
        int | None, typer.Option(help="Write a folder of files of at most so many bytes.")
    ] = None,
    layout: LayoutOption = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read the target again and compare the predictions.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Convert a file to another format: exactly, or not at all."""
    model = _load(
        source, architecture=architecture, key=key, rename=rename, drop=drop or (), match=match,
        strict=strict, fold=not keep_parts, max_bytes=max_bytes, sidecar=True,
    )  # fmt: skip
    if model.module is None and _format(source).fill is not None:
        raise FwtError(
            f"{source}: only their model says what these weights are: --architecture net.keras"
        )
    _save(target, model, layout=layout, shard_bytes=shard_bytes)
    if verify:
        if model.module is None:
            raise FwtError("--verify runs the model: --architecture says which one it is")
        # onnxruntime says what an ONNX file computes, not our reading of it.
        own: Any = target if _is_onnx(target) else _load(target)
        if not _is_onnx(target) and own.module is None:
            own = _load(target, architecture=model)
        _report(source if _is_onnx(source) else model, own, as_json)
    else:
        (_print_json if as_json else _print_summary)(target, model)


def _both(first: Path, second: Path, architecture: Path | None, **how: Any) -> list["Model"]:
    """Two files, and weights alone as the model that the architecture says they are."""
    out = []
    for path in (first, second):
        own = _load(path, **how)
        if own.module is None and architecture is not None:
            own = _load(path, architecture=architecture, **how)
        out.append(own)
    return out


def _is_onnx(path: Path) -> bool:
    return path.is_file() and _format(path).name == "ONNX"


def _report(a: Any, b: Any, as_json: bool, tolerance: float | None = None) -> None:
    from fwt import converters

    found = converters.verify(a, b, tolerance=tolerance)
    print(found.to_json() if as_json else found)
    if not found.ok:
        raise typer.Exit(3)


@app.command()
def verify(
    first: In,
    second: In,
    architecture: ArchitectureOption = None,
    key: KeyOption = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="How far a row may be off, relative to its largest value; by default ten "
            "roundings."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare the predictions of two models, layer by layer; exit code 3 if they differ."""
    one, other = (
        path if _is_onnx(path) else _both(path, path, architecture, key=key)[0]
        for path in (first, second)
    )
    for path, found in ((first, one), (second, other)):
        if not isinstance(found, Path) and found.module is None:
            raise FwtError(
                f"{path}: weights alone can't run: --architecture says which model they are of; "
                "fwt diff compares the weights of two files"
            )
    _report(one, other, as_json, tolerance)


@app.command()
def diff(
    first: In,
    second: In,
    architecture: ArchitectureOption = None,
    key: KeyOption = None,
    max_bytes: MaxOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare two files bit for bit, whatever their formats; exit code 3 if they differ."""
    from rich.console import Console
    from rich.table import Table

    from fwt import _diff

    models = _both(first, second, architecture, key=key, max_bytes=max_bytes)
    found = _diff.diff(*models)
    if as_json:
        changes = [
            {
                **dataclasses.asdict(c),
                "largest": c.largest if math.isfinite(c.largest or 0) else None,
            }
            for c in found.changes
        ]
        print(json.dumps({"equal": found.equal, "same": found.same, "changes": changes,
                          "layers": list(found.layers)}))  # fmt: skip
    else:
        console = Console() if sys.stdout.isatty() else Console(soft_wrap=True, width=160)
        table = Table(box=None, pad_edge=False, header_style="bold")
        for title in ("path", "what differs", "entries", "by at most"):
            table.add_column(title)
        for c in found.changes:
            numbers = ["" if c.count is None else f"{c.count:,}",
                       "" if c.largest is None else f"{c.largest:.3g}"]  # fmt: skip
            table.add_row(c.path, c.what, *numbers)
        if found.changes:
            console.print(table, highlight=False)
        for line in found.layers:
            console.print(line, highlight=False, markup=False)
        said = f"equal: {found.same} arrays, bit for bit"
        if not found.equal:
            said = f"{found.same} arrays are equal, {len(found.changes)} differ"
        if not found.same and architecture is None and len({m.module is None for m in models}) > 1:
            said += "; --architecture gives weights alone the names of their model"
        console.print(said, highlight=False)
    if not found.equal:
        raise typer.Exit(3)


@app.command()
def prune(
    source: In,
    target: Out,
    sparsity: Annotated[
        float | None, typer.Option(help="The share of weights to prune, 0 to 1.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Instead: keep the weights with |w| > threshold.")
    ] = None,
    scope: Annotated[
        str, typer.Option(help="Where to count: layer, global, normalized, erk or lamp.")
    ] = "layer",
    pattern: Annotated[
        str,
        typer.Option(help="What falls together: n_m(2, 4), block((4, 1)), channel."),
    ] = "unstructured",
    score: Annotated[
        str, typer.Option(help="What a weight is worth: magnitude or random.")
    ] = "magnitude",
    like: Annotated[
        str | None, typer.Option(help="Count as torch, jaxpruner or tfmot does.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The seed of random scores.")] = 0,
    where: WhereOption = None,
    axes: AxesOption = None,
    layout: LayoutOption = None,
) -> None:
    """Set the smallest weights to zero (kernels, unless --where says otherwise)."""
    import fwt

    if score not in ("magnitude", "random"):
        raise FwtError(
            f"--score {score}: a file holds no gradients and no data, so the command line knows "
            "magnitude and random"
        )
    if like == "torch" and sparsity is not None and sparsity > 1 and sparsity.is_integer():
        sparsity = int(sparsity)  # a number of weights, as torch takes it
    checked: Any = scope  # by prune, whose error names the choices
    whose: Any = like
    t = fwt.prune(
        sparsity,
        _named(fwt.scores, score, "score"),
        threshold=threshold,
        scope=checked,
        pattern=_named(fwt.patterns, pattern, "pattern"),
        where=_where(where),
        like=whose,
        key=seed,
        axes=_axes(axes),
    )
    _changed(source, target, t, layout)


@app.command()
def initialize(
    source: In,
    target: Out,
    initializer: Annotated[
        str | None,
        typer.Option(
            help="A name in fwt.initializers, or a call of it: uniform(1.0), keras.he_normal, "
            "torch.kaiming_uniform(2.236)."
        ),
    ] = None,
    like: Annotated[
        str | None,
        typer.Option(help="Instead: as 'keras', 'torch' or 'flax' gives them to new layers."),
    ] = None,
    seed: Annotated[int, typer.Option(help="The seed of the random numbers.")] = 0,
    where: WhereOption = None,
    axes: AxesOption = None,
    layout: LayoutOption = None,
) -> None:
    """Give weights new values: kernels, with --like all, unless --where says otherwise."""
    import fwt

    if (initializer is None) == (like is None):
        raise FwtError("initialize takes --initializer or --like, one of them")
    if initializer is None:
        checked: Any = like  # by reset, whose error names the choices
        t = fwt.reset(seed, checked, where or "**", axes=_axes(axes))
    else:
        chosen = _named(fwt.initializers, initializer, "initializer")
        t = fwt.initialize(chosen, seed, _where(where), axes=_axes(axes))
    _changed(source, target, t, layout)


@app.command()
def project(
    source: In,
    target: Out,
    constraint: Annotated[
        str, typer.Option(help="A name in fwt.constraints, or a call of it: max_norm(2.0).")
    ],
    where: WhereOption = None,
    axes: AxesOption = None,
    layout: LayoutOption = None,
) -> None:
    """Move weights into the set of a constraint (kernels, unless --where says otherwise)."""
    import fwt

    chosen = _named(fwt.constraints, constraint, "constraint")
    _changed(source, target, fwt.project(chosen, _where(where), axes=_axes(axes)), layout)


def _named(module: Any, text: str, what: str) -> Any:
    """``name`` or ``name(arguments)``, of literals only; ``keras.name`` is in a namespace."""
    from fwt import _tree

    try:
        parsed = ast.parse(text, mode="eval").body
        call = parsed if isinstance(parsed, ast.Call) else None
        name = call.func if call else parsed
        if isinstance(name, ast.Attribute) and isinstance(name.value, ast.Name):
            if name.value.id not in ("keras", "torch") or not hasattr(module, name.value.id):
                raise ValueError("a name, or 'keras' or 'torch' and a name, is expected")
            module, name = getattr(module, name.value.id), ast.Name(name.attr)
        if not isinstance(name, ast.Name):
            raise ValueError("a name is expected")
        arguments = [ast.literal_eval(a) for a in call.args] if call else []
        keywords = {k.arg or "**": ast.literal_eval(k.value) for k in call.keywords} if call else {}
    except (SyntaxError, ValueError) as error:
        why = "arguments must be literals" if "malformed" in str(error) else error
        raise FwtError(f"{text!r} is no {what} such as name or name(1.0): {why}") from error
    if name.id not in module.__all__:
        raise FwtError(f"{name.id!r} is no {what}{_tree.near(name.id, module.__all__)}")
    noun = getattr(module, name.id)
    if call is None and (hasattr(noun, "settings") or getattr(noun, "__fwt_noun__", False)):
        return noun
    try:
        return noun(*arguments, **keywords)
    except TypeError as error:
        raise FwtError(f"{what} {text!r}: {error}") from error


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The folder for the models and the picture.")] = Path(
        "fwt-demo"
    ),
) -> None:
    """Train, prune and convert a digit classifier: the whole path on real data."""
    from fwt import _demo

    _demo.run(out)


_OPTIONS = "architecture|key|match|max_bytes|shard_bytes|where|tolerance|layout|scope"


def _in_options(text: str) -> str:
    """An error in Python's words as one line in those of the command line."""

    def each(option: str, join: str) -> Callable[[re.Match[str]], str]:
        def said(found: re.Match[str]) -> str:
            given = re.findall(r"'([^']*)'(?:: '([^']*)')?", found[1])
            return " ".join(f"--{option} {shlex.quote(a + join + b)}" for a, b in given)

        return said

    text = " ".join(text.split())
    start = r"(?<![\w/\\.-])"  # not in a path
    for option, join in (("rename", "="), ("axes", "=")):
        text = re.sub(rf"{start}{option}=(\{{'[^{{}}]*\}})", each(option, join), text)
    for option in ("drop", "where"):
        text = re.sub(rf"{start}{option}=(\['[^\[\]\"]*\])", each(option, ""), text)
    text = re.sub(rf"{start}strict=False", "--no-strict", text)
    text = re.sub(rf"{start}fold=False", "--keep-parts", text)
    text = re.sub(rf"{start}strict=(?=$|[ ,;:])", "--no-strict", text)
    text = re.sub(rf"{start}({_OPTIONS})=(?=['\d])", lambda m: f"--{m[1].replace('_', '-')} ", text)
    return re.sub(rf"{start}({_OPTIONS}|rename|drop|axes)=(?=$|[ ,;:]|\.(?!\.))",
                  lambda m: f"--{m[1].replace('_', '-')}", text)  # fmt: skip


def main() -> NoReturn:
    """The ``fwt`` command: one clear line for anything that is wrong."""

    def line(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"warning: {_in_options(str(message))}", file=sys.stderr)

    warnings.showwarning = line
    try:
        app(standalone_mode=True)
    except FwtError as error:
        print(f"error: {_in_options(str(error))}", file=sys.stderr)
        sys.exit(1)
    except (TypeError, ValueError, ArithmeticError, OSError) as error:
        # Some library's word on a value that nobody checked before it: still one line.
        print(f"error: {type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
    except ImportError as error:
        if error.name not in ("keras", "torch", "sklearn", "matplotlib"):
            raise
        print(f"error: this needs {error.name}: pip install 'fwt[demo]'", file=sys.stderr)
        sys.exit(1)
    sys.exit(0)


if __name__ == "__main__":
    main()
