"""Paths and globs as text."""

import difflib
import functools
import re
import types
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

from fwt._types import WhereError


def escape(part: str) -> str:
    r"""A path part with ``/``, ``\`` and glob characters escaped by a backslash."""
    return re.sub(r"([\\/*?\[\]])", r"\\\1", part)


def split(path: str) -> list[str]:
    """The parts of a path or glob, cut at each unescaped ``/``, escapes kept."""
    parts = []
    for part, cut in re.findall(r"((?:\\[\s\S]|[^\\/])*)(/|\Z)", path):
        parts.append(part)
        if not cut:
            break
    return parts if path else []


def unescape(part: str) -> str:
    return re.sub(r"\\([\s\S])", r"\1", part)


def natural(path: str) -> list[Any]:
    """A sort key under which ``layer_2`` comes before ``layer_10``."""
    return [
        # A run of digits by its length and then its text, however long it is.
        [
            (len(s.lstrip("0")), s.lstrip("0")) if i % 2 else (0, s)
            for i, s in enumerate(re.split("([0-9]+)", part))
        ]
        for part in split(path)
    ] + [[(0, path)]]


_ANY = r"\\[\s\S]|[^\\/]"  # one character of a part, which may be escaped


@functools.lru_cache(maxsize=1024)
def _glob(pattern: str) -> re.Pattern[str]:
    """A glob as a regular expression on whole paths: ``*`` within one part, ``**`` across."""
    out: list[str] = []
    for part in split(pattern):
        if part == "**":
            out.append(f"(?:(?:{_ANY})*/)*")
            continue
        text = ""
        for token in re.findall(r"\\.|\[!?\]?[^\]]*\]|.", part, re.DOTALL):
            if token == "*":
                text += f"(?:{_ANY})*"
            elif token == "?":
                text += f"(?:{_ANY})"
            elif len(token) > 1 and token[0] == "[":
                body = token[1:-1]
                negated = body.startswith("!")
                body = re.sub(r"([\\\[^])", r"\\\1", body[negated:])
                text += f"[{'^/' if negated else ''}{body}]"
            else:
                # A path holds its parts escaped, so a literal is compared in that form.
                text += re.escape(escape(unescape(token)))
        out.append(text + "/")
    # The path is given a final "/", so that "**" at the end takes whole parts too.
    try:
        return re.compile("".join(out))
    except re.error as error:
        raise WhereError(f"where={pattern!r} is no glob ({error})") from error


def matches(pattern: str, path: str) -> bool:
    """Whether a path matches a glob.

    Example:
        >>> matches("dense_*/kernel", "dense_1/kernel"), matches("**/kernel", "a/b/kernel")
        (True, True)
        >>> matches("*", "a/b")
        False
    """
    if pattern == "**":
        return True
    if split(pattern)[-1:] == ["**"]:
        pattern += "/*"
    return _glob(pattern).fullmatch(path + "/") is not None


def is_exact(pattern: str) -> bool:
    """Whether a glob is a name, without wildcards."""
    return not re.search(r"[*?\[]", re.sub(r"\\[\s\S]", "", pattern))


def pieces(part: str) -> list[str]:
    """What a name in a file is made of, whose parts end at dots or slashes; Keras 2's ``:0`` is no
    part of it."""
    return re.split(r"[./]", re.sub(r":\d+$", "", part))


@functools.lru_cache(maxsize=1 << 16)
def _in_pieces(path: str) -> str:
    return "/".join(escape(x) for part in split(path) for x in pieces(unescape(part)))


# What the framework of a live model calls the weights at these paths, with slashes between parts:
# first the name that its layer gives it there, then others. Set while a transform runs on a model.
OWN: ContextVar[Mapping[str, Sequence[str]]] = ContextVar(
    "own names", default=types.MappingProxyType({})
)
# The same of its running statistics, where a transform does not see them.
STATISTICS: ContextVar[Mapping[str, Sequence[str]]] = ContextVar(
    "own names of statistics", default=types.MappingProxyType({})
)


def named(pattern: str, paths: Collection[str], *, own: bool = True) -> list[str]:
    r"""The paths that a glob names: as they are spelled or, where that is none of them, as the
    framework of a live model calls them, or as files spell them, with dots between the parts, with
    slashes inside a part, or with Keras 2's ``:0``.

    Args:
        pattern: a glob.
        paths: the paths.
        own: whether the names of the framework count, whose axes may be in another order, and a
            star that would take more beyond a dot is refused.

    Raises:
        WhereError: if the glob may be read in two ways.

    Example:
        >>> named("0.weight", ["0/bias", "0/weight"]), named("bert/*", [r"bert\/kernel"])
        (['0/weight'], ['bert\\/kernel'])
    """
    exact = is_exact(pattern)
    if exact and pattern in paths:
        return [pattern]
    theirs = OWN.get() if own else {}
    found = [p for p in paths if matches(pattern, p)]
    if found:
        for path in paths if theirs and not exact else ():
            name = next(iter(theirs.get(path, ())), path)
            if name != path and matches(pattern, name) and path not in found:
                raise WhereError(
                    f"{pattern!r} names {found[0]} by its path, and {name} by the name that its "
                    f"framework has for {path}: with dots, {dotted(pattern)!r}, it is read as such "
                    "names; for paths, write these one by one, or a predicate"
                )
        return found
    cut = _cut(pattern)
    if cut == pattern and not theirs and not any("." in p or "\\" in p or ":" in p for p in paths):
        return []
    for each in ({p: theirs.get(p, ()) for p in paths}, {p: (p,) for p in paths}):
        spelled = {p: [_in_pieces(n) for n in names] for p, names in each.items()}
        other = [p for p, names in spelled.items() if any(matches(cut, n) for n in names)]
        mixed = not theirs and not other and any("**" in x and x != "**" for x in split(cut))
        if own and cut != pattern and not exact and not mixed:
            _refuse_longer(pattern, cut, spelled, other)
        if (exact and len(other) > 1) or len({_in_pieces(p) for p in other}) < len(other):
            one, two = other[0], other[-1]
            raise WhereError(
                f"{pattern!r}, as files and frameworks spell it, names {one} and {two}: write "
                f"which is meant, {one!r} or {two!r}"
            )
        if other:
            return other
    return []


def _cut(pattern: str) -> str:
    """A glob as files spell it, with slashes; dots and slashes in brackets are characters."""
    cut = re.sub(r"\[!?\]?[^\]]*\]|\\/|\.", lambda m: m[0] if m[0][0] == "[" else "/", pattern)
    return re.sub(r":\d+$", "", cut)


def dotted(path: str) -> str:
    return ".".join(split(path))


def _refuse_longer(
    pattern: str, cut: str, spelled: Mapping[str, Sequence[str]], found: Collection[str]
) -> None:
    """Raises for a ``*`` that would name more if it went beyond a dot, as it does elsewhere."""
    if len(split(pattern)) > 1:
        return
    plain = re.sub(r":\d+$", "", pattern)
    parts = split(cut)
    if "*" in parts:
        way = "/".join("**" if part == "*" else part for part in parts)
    else:
        way = re.sub(r"/(?=[^/]*$)", "/**/", cut)
    for path, names in spelled.items():
        beyond = [n for n in names if path not in found and matches(plain, escape(dotted(n)))]
        if not beyond:
            continue
        said = f", and {dotted(way)!r} does" if any(matches(way, n) for n in beyond) else ""
        raise WhereError(
            f"{pattern!r} does not name {dotted(beyond[0])}, since * stays within one part"
            f"{said}: write that, or slashes, {cut!r}, if one part is meant"
        )


LIBRARIES = ("keras", "tf_keras", "torch", "tensorflow")


def foreign(value: Any) -> str | None:
    """The framework of a layer or a weight that is not JAX's."""
    classes = value.__mro__ if isinstance(value, type) else type(value).__mro__
    homes = (c.__module__.partition(".")[0] for c in classes)
    return next((h for h in homes if h in LIBRARIES), None)


def no_name(where: Any) -> str | None:
    """What is said of a layer or a weight of another framework that is given as ``where=``."""
    if foreign(where) is None:
        return None
    if isinstance(where, type):
        return (
            f"where takes paths, found the class {where.__name__}: list them, such as where="
            '[f"{n}.weight" for n, m in model.named_modules() if isinstance(m, ...)] in PyTorch, '
            '[f"{x.path}/kernel" for x in model.layers if isinstance(x, ...)] in Keras'
        )
    kind, path = type(where).__name__, getattr(where, "path", None)
    if not isinstance(path, str):
        return f"where takes paths, found a {kind}: name it, such as where='0/kernel' or '0/**'"
    said = path if hasattr(where, "shape") else f"{path}/**"
    return f"where takes paths, found a {kind}: give its own, where={said!r}"


# What other frameworks call the leaves of Flax.
_FLAX = {
    "weight": ("kernel", "embedding", "scale", "negative_slope"),
    "gamma": ("scale",),
    "beta": ("bias",),
    "alpha": ("negative_slope",),
    "embeddings": ("embedding",),
    "running_mean": ("mean",),
    "running_var": ("var",),
    "moving_mean": ("mean",),
    "moving_variance": ("var",),
}


def near(path: str, known: Iterable[str]) -> str:
    """``; in the names of Flax that is 'a'``, ``; close: 'a', 'b'``, or nothing."""
    known = list(known)
    cut = _cut(path)
    for hidden, names in STATISTICS.get().items():
        if path and any(matches(cut, n) for n in (hidden, *map(_in_pieces, names))):
            return (
                f"; {hidden!r} is a running statistic, which no transform but fwt.reset sees: give "
                "it a value in its own framework"
            )
    own = {p: [_in_pieces(n) for n in OWN.get().get(p, ())] for p in known}
    if path and (hits := [p for p, names in own.items() if any(matches(cut, n) for n in names)]):
        return f"; the path of that is {hits[0]!r}, with the axes of Flax"
    inside = [p for p, names in own.items() if any(matches(f"**/{cut}", n) for n in names)]
    if path and inside:
        return f"; close: {', '.join(map(repr, inside[:3]))}"
    *above, last = split(cut) or [""]
    for name in _FLAX.get(last, ()):
        if any(matches(flax := "/".join([*above, name]), p) for p in known):
            return f"; in the names of Flax that is {flax!r}"
    if any("**" in part and part != "**" for part in split(path)):
        parts = re.sub("/+", "/", path.replace("**", "/**/").replace(".", "/")).strip("/")
        if fits := [p for p in known if matches(parts, p)]:
            return f"; ** is a part of its own, between slashes: {parts!r} takes {fits[0]!r}"
    plain = re.sub(r"\*\*+", "*", cut.removeprefix("**/"))
    whole, deep = (
        [g, *(p for p in known if matches(g, p))] for g in (f"{plain}/**", f"**/{plain}/**")
    )
    if path and len(deep) > 1:
        more = f", at any depth ({len(deep) - 1} leaves)" if len(deep) > len(whole) else ""
        return f"; {(deep if more else whole)[0]!r} takes all that is inside of it{more}"
    plain = path.replace("**/", "").replace("*", "")
    lower = {p.lower(): p for p in known}
    close = [p for p in known if matches("**/" + path, p)] if path else []
    close += _of_its_layer(cut, known)
    close += [lower[p] for p in difflib.get_close_matches(plain.lower(), lower, n=3, cutoff=0.5)]
    close = list(dict.fromkeys(close))[:3] or known[:3]
    return f"; close: {', '.join(map(repr, close))}" if close else ""


def _of_its_layer(path: str, known: Iterable[str]) -> list[str]:
    """What is inside the layer that a path names first, by how many of its parts are there too."""
    first, *rest = split(path) or [""]
    inside = {p: split(p)[1:] for p in known if rest and split(p)[0] == first}

    def shared(p: str) -> tuple[int, float]:
        parts = inside[p]
        found = sum(2 if x in parts else any(x in own for own in parts) for x in rest)
        return -found, -difflib.SequenceMatcher(None, path, p).ratio()

    return sorted(inside, key=shared)


def of_keras(where: Any, known: Iterable[str]) -> str:
    """What is said of a role among the arrays of Keras's files alone, whose names tell none."""
    older = any(re.search(r"kernel:\d+$", p) for p in known)
    numbered = [p for p in known if re.search(r"(^|/)vars/\d+$", p)]
    if not hasattr(where, "paths_of") or not (older or numbered):
        return ""
    named = "**/kernel:0" if older else numbered[0]
    return (
        "; the names of Keras's files don't say which these are: architecture='net.keras', the "
        f"model of these weights, does, or where={named!r} takes what is called so there"
    )


def of_no_role(paths: Sequence[str]) -> str:
    """What is said of weights that may be kernels."""
    more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    return (
        f"{paths[0]}{more}: read by operators that are not known, so nothing tells whether these "
        f"are kernels, and they are left as they are: where={paths[0]!r} takes one by name"
    )


def tied_in_part(where: Any, group: Sequence[str], named: Sequence[str]) -> str:
    """What is said of a tie of which ``where`` names some paths."""
    said = repr(where) if isinstance(where, str | list | tuple) else f"{where}"
    beside = ""
    if isinstance(where, str | list | tuple) or hasattr(where, "paths_of"):
        given = [*where] if isinstance(where, list | tuple) else [where]
        beside = f" alone, where={[*given, group[0]]!r} beside the rest"
    return (
        f"{' and '.join(group)} are one array (they are tied), of which where={said:.80} names "
        f"{' and '.join(named)} only, so it is left as it is: where={group[0]!r} takes it{beside}"
    )


def hidden_tie(group: Sequence[str], why: str) -> str:
    """What is said of a tie of a file where a trace hides whether it still is one."""
    return (
        f"{' and '.join(group)} are one array in the file that they come from, and inside jit "
        f"nothing tells whether they still are, but {why}: call it outside of jit, or make the "
        "tree plain dicts, as the docstring of load does, to treat them as two"
    )
