"""The options of the command line: what each is called, and what its text means."""

import ast
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from fwt._errors import FwtError

In = Annotated[Path, typer.Argument(help="A file or folder; its content tells the format.")]
Ins = Annotated[
    list[Path], typer.Argument(help="Files or folders; their content tells the format.")
]
Out = Annotated[
    str,  # a Path forgets the slash at its end
    typer.Argument(
        help="The file to write; its suffix is the format. Of several files, or with a slash at "
        "its end: a folder. Of one folder, such as one of Hugging Face, a name without such a "
        "suffix is a copy of it with the new weights."
    ),
]
ToOption = Annotated[
    str | None, typer.Option("--to", help="Write into a folder, files of this suffix.")
]
ShardsOption = Annotated[
    int | None, typer.Option(help="Write a folder of shards of at most this many bytes each.")
]
MemoryOption = Annotated[
    int | None,
    typer.Option(
        help="How many bytes of weights may be in memory at once; a quarter of the machine's by "
        "default."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, one line for each file.")]
WhereOption = Annotated[
    list[str] | None,
    typer.Option(
        "--where",
        "-w",
        help="Which weights: kernels, biases, or a glob on the path, such as 'dense_*/kernel'; "
        "repeatable.",
    ),
]
AxesOption = Annotated[
    list[str] | None,
    typer.Option(help="What the axes of weights mean, such as '**/weight=out in h w'; repeatable."),
]
WeightsOption = Annotated[
    bool, typer.Option("--weights-only", help="Take the arrays alone, by the file's own names.")
]
LayoutOption = Annotated[
    str | None,
    typer.Option(
        help="Images of a .pt model: channels_first (the default), or source, as in the file."
    ),
]

# The transform of some globs and roles (none are the verb's own choice) and axes.
Make = Callable[[list[Any], dict[str, str] | None], Any]
_FRONT = ("sources", "target")
# The options of a command that changes weights, and their defaults.
_CHANGING: dict[str, tuple[Any, Any]] = {
    "where": (WhereOption, None),
    "axes": (AxesOption, None),
    "to": (ToOption, None),
    "layout": (LayoutOption, None),
    "shard_bytes": (ShardsOption, None),
    "max_memory": (MemoryOption, None),
    "as_json": (JsonOption, False),
}


def _flag(name: str, told: str) -> Any:
    """An option that is there or not, without an option that says not."""
    return Annotated[bool, typer.Option(name, help=told)]


_FLOATS = ("float32", "float16", "bfloat16", "float64")
# The options of reading a file: what each says, and its default.
_READING: dict[str, tuple[Any, Any]] = {
    "architecture": (
        Annotated[
            Path | None,
            typer.Option(
                "--architecture", "-a", help="The file of the model that weights alone are of."
            ),
        ],
        None,
    ),
    "key": (
        Annotated[
            list[str] | None,
            typer.Option(help="The part of the file to read, such as 'model'; repeatable."),
        ],
        None,
    ),
    "rename": (
        Annotated[
            list[str] | None,
            typer.Option(help="Rename weights: OLD=NEW changes the start of names; repeatable."),
        ],
        None,
    ),
    "drop": (
        Annotated[
            list[str] | None,
            typer.Option(help="Leave out weights whose names match this glob; repeatable."),
        ],
        None,
    ),
    "match": (
        Annotated[
            str,
            typer.Option(help="With --architecture: by name, or in the file's order."),
        ],
        "name",
    ),
    "strict": (
        Annotated[
            bool,
            typer.Option(help="With --architecture: all weights must fit; or take those that do."),
        ],
        True,
    ),
    "keep_parts": (
        _flag(
            "--keep-parts",
            "Keep the parts that torch's prune, weight_norm, ... compute a weight from.",
        ),
        False,
    ),
    "dtype": (
        Annotated[
            str | None,
            typer.Option(help="float32, float16, ...: compute in it, with floating weights in it."),
        ],
        None,
    ),
    "external_data": (
        _flag(
            "--external-data",
            "Read the weights of an ONNX file from the file in its folder that it names.",
        ),
        False,
    ),
    "max_bytes": (
        Annotated[
            int | None,
            typer.Option(help="How many bytes the compressed parts of a file may grow to."),
        ],
        None,
    ),
}


def reads(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options of reading a file. It takes them as ``how``, which is what
    ``load`` is called with."""

    def run(**given: Any) -> None:
        how = {name: given.pop(name) for name in _READING}
        how["fold"] = not how.pop("keep_parts")
        how["drop"] = how["drop"] or ()
        if how["match"] not in ("name", "order"):
            raise typer.BadParameter(f"--match {how['match']}: expected name or order")
        if how["dtype"] not in (None, *_FLOATS):
            raise typer.BadParameter(f"--dtype {how['dtype']}: expected {', '.join(_FLOATS)}")
        keys = how["key"] or [None]
        how["key"] = keys[0] if len(keys) == 1 else tuple(keys)
        pairs = [text.partition("=") for text in how["rename"] or ()]
        if not all(found for _, found, _ in pairs):
            raise typer.BadParameter(f"--rename {' '.join(how['rename'])}: expected OLD=NEW")
        how["rename"] = {old: new for old, _, new in pairs} or None
        command(how=how, **given)

    options = [_option(name, kind, default) for name, (kind, default) in _READING.items()]
    taken = [p for p in inspect.signature(command).parameters.values() if p.name != "how"]
    return _presented(run, command, [*taken, *options])


def changes(
    write: Callable[..., None],
) -> Callable[[Callable[..., Make]], Callable[..., None]]:
    """Makes a command that changes weights of a function that gives the transform, for the globs
    and axes; ``write`` does the rest with the options that all of them have."""

    def decorator(command: Callable[..., Make]) -> Callable[..., None]:
        def run(where: Any, axes: Any, **given: Any) -> None:
            make = command(**{name: given.pop(name) for name in own})
            write(transform=make(globs_of(where), _axes(axes)), **given)

        own = dict(inspect.signature(command).parameters)
        front = [p for p in inspect.signature(write).parameters.values() if p.name in _FRONT]
        options = [_option(name, kind, default) for name, (kind, default) in _CHANGING.items()]
        how = inspect.Parameter("how", inspect.Parameter.KEYWORD_ONLY)
        return reads(_presented(run, command, [*front, *own.values(), *options, how]))

    return decorator


class WithTarget(TyperCommand):
    """A command of sources and a target, whose one path is the source."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The arguments; an error says that the target is missing, and not the sources."""
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            by_name: dict[str | None, Any] = {p.name: p for p in self.params}
            if getattr(error, "param", None) is by_name["sources"]:
                found, _, _ = self.make_parser(ctx).parse_args(given)
                error.param = by_name["target" if found.get("target") else "sources"]
            raise


def _option(name: str, kind: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)


def _presented(run: Any, command: Any, parameters: list[inspect.Parameter]) -> Any:
    """A function that looks to typer like a command of these parameters."""
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature(
        [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    )
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def globs_of(texts: list[str] | None) -> list[Any]:
    """Globs, of which the name of a role is that role."""
    if not texts:
        return []
    import fwt

    if not texts:  # to name the roles imports JAX
        return []
    roles: dict[str, Any] = {role.name: role for role in (fwt.kernels, fwt.biases)}
    return [roles.get(text, text) for text in texts]


def _axes(texts: list[str] | None) -> dict[str, str] | None:
    out = {}
    for text in texts or ():
        glob, found, names = text.rpartition("=")
        if not found:
            raise FwtError(f"--axes {text!r}: expected GLOB=NAMES, such as '**/weight=out in h w'")
        out[glob] = names
    return out or None


def named(module: Any, text: str, what: str) -> Any:
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
        if isinstance(error, SyntaxError):
            why = f"it can't be read; there are {', '.join(module.__all__)}"
        if pair := re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text):
            why = f"write 'n_m({pair[1]}, {pair[2]})'"
        raise FwtError(f"{text!r} is no {what} such as name or name(1.0): {why}") from error
    if name.id not in module.__all__:
        raise FwtError(f"{name.id!r} is no {what}{_tree.near(name.id, module.__all__)}")
    noun = getattr(module, name.id)
    if call is None and (hasattr(noun, "settings") or getattr(noun, "__fwt_noun__", False)):
        return noun
    try:
        return noun(*arguments, **keywords)
    except TypeError as error:
        given = inspect.signature(noun).parameters.values()
        said = ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default}" for p in given)
        raise FwtError(f"{what} {text!r}: expected {name.id}({said})") from error
