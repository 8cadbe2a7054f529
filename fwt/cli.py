"""The command line: the verbs of fwt on files.

Exit codes: 0 done (of diff: equal), 1 the input or the request is wrong (one line says what; of
several files, a line for each that failed, while the others are done), 2 wrong usage, 3 the two
files of diff or verify differ, or what convert --verify read again does.
"""

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from fwt import _refused, _several, _terminal
from fwt._errors import FwtError, WhereError
from fwt._options import (
    In,
    Ins,
    JsonOption,
    LayoutOption,
    Make,
    MemoryOption,
    Out,
    ShardsOption,
    ToOption,
    WeightsOption,
    WhereOption,
    WithTarget,
    changes,
    globs_of,
    named,
    reads,
)

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


def _load(path: Path, **how: Any) -> "Model":
    from fwt import converters

    with _terminal.progress(f"reading {path.name}", _terminal.size_of(path)):
        return converters.load(path, **how)


def _save(path: Path, model: "Model", write: Callable[[], None] | None = None, **how: Any) -> None:
    """Writes a model, or what ``write`` writes of it."""
    import jax

    from fwt import converters

    sizes = [getattr(x, "nbytes", 0) for x in jax.tree.leaves(model.variables)]
    missing = [p for p in path.parents if not p.exists()]
    try:
        if missing:
            path.parent.mkdir(parents=True, exist_ok=True)
        with _terminal.progress(f"writing {path.name}", sum(sizes)):
            write() if write else converters.save(path, *model, **how)
    except BaseException:
        for made in missing:  # what is empty, from the innermost on
            with contextlib.suppress(OSError):
                made.rmdir()
        raise


@app.command()
@reads
def inspect(
    files: Ins,
    how: dict[str, Any],
    where: WhereOption = None,
    weights_only: WeightsOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show what files hold: layers, shapes, dtypes, zeros."""
    from fwt.converters.files import edit, formats

    def show(path: Path, how: dict[str, Any]) -> None:
        refused = ""
        try:
            model = _load(path, **how, **({"module": False} if weights_only else {}))
        except FwtError as error:
            if weights_only:
                raise
            model, refused = _refused.alone(path, how, error), _refused.why(path, error)
        globs = globs_of(where)
        with edit.knowing(formats.inside(path), model) if globs else contextlib.nullcontext():
            _terminal.print_model(path, model, as_json, how["architecture"], refused, globs)

    with _streaming(True, how, None):
        _several.each(files, how, show)


@app.command(cls=WithTarget)
@reads
def convert(
    sources: Ins,
    target: Out,
    how: dict[str, Any],
    to: ToOption = None,
    shard_bytes: ShardsOption = None,
    layout: LayoutOption = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read the target again and compare the predictions.")
    ] = False,
    weights_only: WeightsOption = False,
    max_memory: MemoryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Convert files to another format: exactly, or not at all."""
    from fwt.converters.files import formats

    def one(source: Path, target: Path, how: dict[str, Any]) -> None:
        form = formats.by_suffix(target)
        if weights_only and form is not None and form.needs_module:
            raise FwtError(
                f"{target}: it holds a model: leave --weights-only out, or write .safetensors, "
                ".npz, .pt or .msgpack"
            )
        try:
            model = _load(
                source, **how, **({"module": False} if weights_only else {"sidecar": True})
            )
        except FwtError as error:
            if weights_only:
                raise
            arrays, refused = _refused.alone(source, how, error), _refused.why(source, error)
            raise _refused.error_of(source, arrays, refused, changed=False) from error
        filled = _terminal.format_of(source).fill is not None
        if model.module is None and filled and not weights_only:
            raise FwtError(
                f"{source}: only their model says what these weights are: --architecture "
                "net.keras; --weights-only takes them by the file's own names"
            )
        _save(target, model, layout=layout, shard_bytes=shard_bytes)
        if not verify:
            _terminal.print_model(target, model, as_json)
            return
        if model.module is None:
            way = (
                "leave --weights-only out"
                if weights_only
                else "--architecture says which one it is"
            )
            raise FwtError(f"--verify runs the model: {way}")
        # onnxruntime says what an ONNX file computes, not our reading of it.
        own: Any = target if _is_onnx(target) else _load(target)
        if not _is_onnx(target) and own.module is None:
            own = _load(target, architecture=model)
        external = how["external_data"] or not _is_onnx(source)  # the target is of our own making
        _report(source if _is_onnx(source) else model, own, as_json, external=external)

    if to is None and _several.into(sources, target, to):
        raise typer.BadParameter(
            f"{target}: into a folder, --to .keras or the like says the format"
        )
    with _streaming(not verify, how, max_memory):
        _several.each_to(sources, target, to, how, one)


def _changed(
    sources: Ins,
    target: Out,
    transform: Callable[["Model"], Any],
    to: str | None,
    how: dict[str, Any],
    layout: str | None,
    shard_bytes: int | None,
    max_memory: int | None,
    as_json: bool,
) -> None:
    """Load, transform, save, and the table of what came out."""
    from fwt._types import does_stream
    from fwt.converters.files import edit, formats, h5_names

    def one(source: Path, target: Path, how: dict[str, Any]) -> None:
        refused = ""
        edited = shard_bytes is None and edit.is_edited(target, source, how, transform)
        try:
            model = _load(source, **how, **({"module": False} if edited else {"sidecar": True}))
        except FwtError as error:
            if edited:
                raise
            model, refused = _refused.alone(source, how, error), _refused.why(source, error)
            own = formats.is_written_into(target, source)
            if not (own and h5_names.says_no_axes(model.variables)):
                raise _refused.error_of(source, model, refused, changed=True) from error
        before = model
        try:
            with edit.knowing(source, model) as model:
                model = transform(model)
        except FwtError as error:
            if not refused:
                raise
            if isinstance(error, WhereError) and "where=fwt." in str(error):  # which no name tells
                raise _refused.error_of(source, model, refused, changed=True) from error
            raise FwtError(f"{source}: {error}; {_terminal.by_own_names(refused)}") from error
        anew = {"layout": layout, "shard_bytes": shard_bytes}
        given = any(value is not None for value in anew.values())
        copy = None if given else edit.copied(source, target, model, before, how)
        _save(target, model, copy, **anew)
        _terminal.print_model(target, model, as_json, None, refused)

    with _streaming(does_stream(transform), how, max_memory):
        _several.each_to(sources, target, to, how, one, edits=True)


@contextlib.contextmanager
def _streaming(can: bool, how: dict[str, Any], max_memory: int | None) -> Iterator[None]:
    """In it, weights stay in their file until they are written, where the task allows it."""
    from fwt.converters.files import stored

    with stored.wanted(can and how["architecture"] is None, max_memory):
        yield


def _both(first: Path, second: Path, how: dict[str, Any], run: bool = False) -> list[Any]:
    """Two files, of which weights alone are the model that --architecture says they are. --key,
    --rename and --drop are for each file that has what they name. An ONNX file that is to run stays
    a path."""
    from fwt.converters.io import UnusedError

    out: list[Any] = []
    unused: dict[tuple[str, str], UnusedError] = {}
    for path in (first, second):
        own, found = dict(how), None
        while found is None:
            try:
                found = path if run and _is_onnx(path) else _as_model(path, own)
            except UnusedError as error:
                if (error.option, error.value) in unused:  # neither file has it
                    raise unused[error.option, error.value] from error
                unused[error.option, error.value] = error
                own = _several.without(own, error)
            except FwtError as error:
                key = unused.get(("key", how["key"]))
                raise (error if key is None or own["key"] is not None else key) from None
        out.append(found)
    return out


def _as_model(path: Path, how: dict[str, Any]) -> "Model":
    """A file, whose weights are those of --architecture if it has no layers itself."""
    if how["architecture"] is None:
        return _load(path, **how)
    try:
        model = _load(path, **{name: how[name] for name in _refused.ITS_OWN})
    except FwtError as error:
        if _refused.is_final(error):
            raise
        return _load(path, **how)  # its model can't be converted, and need not be
    return _load(path, **how) if model.module is None else model


def _is_onnx(path: Path) -> bool:
    return path.is_file() and bool(_terminal.format_of(path).name == "ONNX")


def _report(
    a: Any, b: Any, as_json: bool, tolerance: float | None = None, external: bool = False
) -> None:
    from fwt import converters

    found = converters.verify(a, b, tolerance=tolerance, external_data=external)
    print(found.to_json() if as_json else found)
    if not found.ok:
        raise typer.Exit(3)


@app.command()
@reads
def verify(
    first: In,
    second: In,
    how: dict[str, Any],
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="How far a row of outputs may be off, of its largest value, such as 1e-3; "
            "ten roundings if not given."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare the predictions of two models, layer by layer; exit code 3 if they differ."""
    pair = _both(first, second, how, run=True)
    for path, found in zip((first, second), pair, strict=True):
        if not isinstance(found, Path) and found.module is None:
            raise FwtError(
                f"{path}: weights alone can't run: --architecture says which model they are of; "
                "fwt diff compares the weights of two files"
            )
    _report(pair[0], pair[1], as_json, tolerance, how["external_data"])


@app.command()
@reads
def diff(first: In, second: In, how: dict[str, Any], as_json: JsonOption = False) -> None:
    """Compare the weights of two files bit for bit, of any formats; exit code 3 if they differ."""
    from fwt import _diff

    refused = hint = ""
    with _streaming(True, how, None):
        try:
            models = _both(first, second, how)
        except FwtError as error:
            models = [_refused.alone(path, how, error) for path in (first, second)]
            refused = _terminal.in_options(str(error))
        found = _diff.diff(*models)
    bare = len({m.module is None for m in models}) > 1
    if not found.same and how["architecture"] is None and bare:
        hint = "; --architecture gives weights alone the names of their model"
    _terminal.print_diff(found, as_json, hint, refused)
    if not found.equal:
        raise typer.Exit(3)


@app.command(cls=WithTarget)
@changes(_changed)
def prune(
    sparsity: Annotated[
        float | None,
        typer.Option(
            help="The share of weights to prune, 0 to 1; with --like torch also a number from 2 on."
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="Instead of --sparsity: keep the weights with |w| > threshold."),
    ] = None,
    scope: Annotated[
        str,
        typer.Option(
            help="What is compared: each layer, or output, global, normalized, erk, lamp."
        ),
    ] = "layer",
    pattern: Annotated[
        str,
        typer.Option(help="What is pruned together: n_m(2, 4), block((4, 1)), channel."),
    ] = "unstructured",
    score: Annotated[
        str, typer.Option(help="What a weight is worth: magnitude or random.")
    ] = "magnitude",
    like: Annotated[
        str | None,
        typer.Option(help="Count the weights to prune as torch, jaxpruner or tfmot does."),
    ] = None,
    seed: Annotated[int, typer.Option(help="The seed of random scores.")] = 0,
) -> Make:
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

    def make(globs: list[Any], axes: Any) -> Any:
        return fwt.prune(
            sparsity,
            named(fwt.scores, score, "score"),
            threshold=threshold,
            scope=checked,
            pattern=named(fwt.patterns, pattern, "pattern"),
            where=globs or fwt.kernels,
            like=whose,
            key=seed,
            axes=axes,
        )

    return make


@app.command(cls=WithTarget)
@changes(_changed)
def initialize(
    initializer: Annotated[
        str | None,
        typer.Option(
            help="A name in fwt.initializers, or a call of it: uniform(1.0), keras.he_normal, "
            "torch.kaiming_uniform(2.236)."
        ),
    ] = None,
    like: Annotated[
        str | None,
        typer.Option(
            help="Instead of --initializer: as keras, torch or flax gives them to new layers."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="The seed of the random numbers.")] = 0,
) -> Make:
    """Draw new values: of kernels, with --like of all weights, unless --where says otherwise."""
    import fwt

    if (initializer is None) == (like is None):
        raise FwtError("initialize takes --initializer or --like, one of them")
    checked: Any = like  # by reset, whose error names the choices

    def make(globs: list[Any], axes: Any) -> Any:
        if initializer is None:
            return fwt.reset(seed, checked, globs or "**", axes=axes)
        chosen = named(fwt.initializers, initializer, "initializer")
        return fwt.initialize(chosen, seed, globs or fwt.kernels, axes=axes)

    return make


@app.command(cls=WithTarget)
@changes(_changed)
def project(
    constraint: Annotated[
        str, typer.Option(help="A name in fwt.constraints, or a call of it: max_norm(2.0).")
    ],
) -> Make:
    """Move weights into the set of a constraint (kernels, unless --where says otherwise)."""
    import fwt

    chosen = named(fwt.constraints, constraint, "constraint")

    def make(globs: list[Any], axes: Any) -> Any:
        return fwt.project(chosen, globs or fwt.kernels, axes=axes)

    return make


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The folder for the models and the picture.")] = Path(
        "fwt-demo"
    ),
) -> None:
    """Train, prune and convert a digit classifier: the whole path on real data."""
    from fwt import _demo

    _demo.run(out)


def main() -> NoReturn:
    """The ``fwt`` command: one clear line for anything that is wrong."""

    def line(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"warning: {_terminal.in_options(str(message))}", file=sys.stderr)

    warnings.showwarning = line
    try:
        app(standalone_mode=True)
    except _terminal.ERRORS as error:
        said = _terminal.line_of(error)
        if said is None:
            raise
        print(f"error: {said}", file=sys.stderr)
        sys.exit(1)
    sys.exit(0)


if __name__ == "__main__":
    main()
