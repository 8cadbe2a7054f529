"""One command on several files: each by itself, and where what it writes goes."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer

from fwt import _terminal
from fwt._errors import FwtError


def each(
    paths: Sequence[Path], how: dict[str, Any], do: Callable[[Path, dict[str, Any]], None]
) -> None:
    """One file as it is. Of several, each that fails gives one line, and the others are done. What
    one of them is read with, such as --key, may be of no use to another."""
    from fwt.converters.io import UnusedError

    if len(paths) == 1:
        do(paths[0], how)
        return
    codes = set()

    def tried(path: Path, own: dict[str, Any]) -> Exception | None:
        try:
            do(path, own)
        except typer.Exit as end:
            codes.add(end.exit_code)
        except _terminal.ERRORS as error:
            return error
        return None

    def tell(path: Path, error: Exception) -> None:
        line = _terminal.line_of(error)
        if line is None:
            raise error
        about = "" if str(path) in line else f"{path}: "
        print(f"error: {about}{line}", file=sys.stderr)
        codes.add(1)

    waiting: list[tuple[Path, UnusedError]] = []
    needed = False  # all that they are read with, by one of them
    for path in paths:
        error = tried(path, how)
        needed = needed or error is None
        if isinstance(error, UnusedError):
            waiting.append((path, error))
        elif error is not None:
            tell(path, error)
    for path, first in waiting:
        own, error = how, first
        while needed and isinstance(error, UnusedError):
            own = without(own, error)
            error = tried(path, own)
        if error is not None:
            tell(path, first)
    if codes:
        raise typer.Exit(min(codes))


def into(sources: Sequence[Path], target: str, to: str | None) -> bool:
    """Whether the target is a folder for the files, and not one of a format, such as .orbax. It
    may be missing: a slash at the end says that it is one."""
    from fwt.converters.files import formats

    if target == "-":
        raise typer.BadParameter("-: a file is written whole or not at all: give its name")
    folder = target.endswith(("/", os.sep)) or Path(target).is_dir()
    folder = folder and formats.by_suffix(Path(target)) is None
    return len(sources) > 1 or to is not None or folder


def each_to(
    sources: Sequence[Path],
    target: str,
    to: str | None,
    how: dict[str, Any],
    do: Callable[[Path, Path, dict[str, Any]], None],
    edits: bool = False,
) -> None:
    """Each source to its target: as with cp, the last path may be a folder, in which each file
    keeps its name, with the suffix ``to``. With ``edits``, a folder of no format is copied."""
    from fwt.converters.files import formats

    def plain(path: Path) -> bool:
        return path.is_dir() and formats.by_suffix(path) is None

    folder = Path(target)
    known = formats.by_suffix(folder) is not None or folder.is_file() or target == "-"
    if edits and len(sources) == 1 and to is None and plain(sources[0]) and not known:
        do(sources[0], folder, how)
        return
    if not into(sources, target, to):
        if not formats.suffix(folder):
            raise typer.BadParameter(
                f"{target}: its suffix says the format, such as {target}.safetensors; with a slash "
                f"at its end, {target}/, it is a folder for files that keep their names, and --to "
                "says their format"
            )
        do(sources[0], folder, how)
        return
    if formats.by_suffix(folder) is not None or folder.is_file():
        what = "several files" if len(sources) > 1 else "--to"
        raise typer.BadParameter(f"{target}: with {what}, the last path is a folder")
    if to is not None and formats.by_suffix(Path(f"x.{to.lstrip('.')}")) is None:
        raise typer.BadParameter(f"--to {to}: expected one of {', '.join(formats.SUFFIXES)}")
    made: dict[Path, Path] = {}

    def place(source: Path, own: dict[str, Any]) -> None:
        name, end = source.name, formats.suffix(source)
        if to is None and plain(source) and not edits:
            raise FwtError(
                f"{source}: a folder whose name says no format: --to safetensors, or another "
                f"suffix, says in which it is written to {folder / name}"
            )
        if to is not None:
            name = f"{name[: len(name) - len(end)]}.{to.lstrip('.')}"
        there = folder / name
        if there.exists() and there.samefile(source):
            raise FwtError(f"{source}: it would be written over itself: give another folder")
        again = own is not how  # the same source, with what it has a use for
        if there in made and not (again and made[there] == source):
            raise FwtError(f"{source}: {there} is written from {made[there]} already")
        made[there] = source
        do(source, there, own)

    each(sources, how, place)


def without(how: dict[str, Any], error: Any) -> dict[str, Any]:
    """The options of reading without the one that a file has no use for."""
    given = how[error.option]
    left: Any = None
    if error.option == "rename":
        left = {old: new for old, new in given.items() if old != error.value}
    elif error.option == "drop":
        left = [glob for glob in given if glob != error.value]
    return {**how, error.option: left}
