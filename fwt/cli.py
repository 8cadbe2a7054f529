"""The command line: the verbs of fwt on files.

Exit codes: 0 done, 1 the input or the request is wrong (one line says what), 2 wrong usage.
"""

import ast
import sys
import warnings
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

In = Annotated[Path, typer.Argument(help="A .keras, .safetensors or .pt file.")]
Out = Annotated[Path, typer.Argument(help="Where to write; the suffix is the format.")]
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
    from fwt import converters

    model = t(converters.load(source))
    converters.save(target, *model, layout=layout)
    _print_summary(target, model)


def _print_summary(path: Path, model: "Model") -> None:
    from rich.console import Console

    import fwt

    console = Console(soft_wrap=True) if not sys.stdout.isatty() else Console()
    module = model.module
    kind = "weights only" if module is None else f"{len(module.layers)} layers"
    shape = None if module is None else module.input_shape
    about = f"{path}: {kind}"
    if shape is not None:
        about += f", input {' x '.join('any' if s is None else str(s) for s in shape)}"
    console.print(about, highlight=False, markup=False)
    console.print(fwt.summary(model), highlight=False)


@app.command()
def inspect(file: In) -> None:
    """Show what a file holds: layers, shapes, dtypes, zeros."""
    from fwt import converters

    _print_summary(file, converters.load(file))


@app.command()
def convert(source: In, target: Out, layout: LayoutOption = None) -> None:
    """Convert a file to another format: exactly, or not at all."""
    from fwt import converters

    model = converters.load(source)
    converters.save(target, *model, layout=layout)
    _print_summary(target, model)


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


def main() -> NoReturn:
    """The ``fwt`` command: one clear line for anything that is wrong."""

    def line(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"warning: {message}", file=sys.stderr)

    warnings.showwarning = line
    try:
        app(standalone_mode=True)
    except FwtError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
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
