"""README.md and the guide: every block runs, every link leads somewhere, the README is short."""

import contextlib
import doctest
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
GUIDE = sorted((ROOT / "examples" / "guide").glob("*.md"))
# Commands that no block runs here: they install, they are this suite, or test_package runs them.
SKIPPED = ("pip install", "pytest", "fwt demo")
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def blocks(page):
    """Line number, language and text of each fenced block of a page."""
    text = page.read_text()
    fences = re.findall(r"^\s*(?:```|~~~)", text, re.MULTILINE)
    found = re.findall(r"^```(?:.*)\n(?:(?:.*\n)*?)```$", text, re.MULTILINE)
    assert len(fences) == 2 * len(found), f"{page}: a fence that no test sees"
    for found in re.finditer(r"^```(.*)\n((?:.*\n)*?)```$", text, re.MULTILINE):
        yield text[: found.start()].count("\n") + 2, found[1], found[2]


def shell(code):
    """The lines of a bash block without the commands that are skipped."""
    kept = []
    for line in code.splitlines():
        skipped = [part.strip().startswith(SKIPPED) for part in line.split("&&")]
        assert all(skipped) or not any(skipped), f"half of it would run: {line}"
        kept += [] if all(skipped) else [line]
    return "\n".join(kept)


def run_shell(code, folder):
    code = shell(code)
    if not code.strip():
        return ""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", f"set -e\n{code}"],
        cwd=folder,
        env={**os.environ, "PATH": path, "COLUMNS": "100", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{code}\n{done.stdout}{done.stderr}"
    return done.stdout


def run_python(code, names, place, line):
    """What the block prints; one with ``>>>`` is compared with what it shows."""
    said = io.StringIO()
    if ">>>" in code:
        test = doctest.DocTestParser().get_doctest(code, names, place, place, line - 1)
        runner = doctest.DocTestRunner(optionflags=FLAGS)
        failed = runner.run(test, out=said.write, clear_globs=False).failed
        assert not failed, said.getvalue()
        names.update(test.globs)
        return ""
    with contextlib.redirect_stdout(said):
        exec(compile("\n" * (line - 1) + code, place, "exec"), names)
    return said.getvalue()


@pytest.fixture
def _as_it_was():
    """A page may register a layer, which the other tests must not see."""
    from fwt.converters.rows import table

    rows, custom = list(table.LAYERS), {f: dict(c) for f, c in table.CUSTOM.items()}
    yield
    if len(rows) != len(table.LAYERS):  # emptying the caches costs the tests that come later
        table.LAYERS[:] = rows
        for framework, classes in custom.items():
            table.CUSTOM[framework] = classes
        table.rows_of.cache_clear()
        table.row_of_function.cache_clear()


@pytest.mark.usefixtures("_as_it_was")
@pytest.mark.parametrize("page", [README, *GUIDE], ids=lambda p: p.stem)
def test_every_block_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names, said, place = {"__name__": "__main__"}, None, str(page.relative_to(ROOT))
    for line, language, code in blocks(page):
        if language == "python":
            said = run_python(code, names, place, line)
        elif language == "bash":
            said = run_shell(code, tmp_path)
        else:  # what the block before it prints
            assert language == "text", f"{place}:{line}: a block of {language!r} runs nowhere"
            assert said is not None, f"{place}:{line}: no block before it prints this"
            same = doctest.OutputChecker().check_output(code, said, FLAGS)
            assert same, f"{place}:{line}: shown\n{code}\nprinted\n{said}"
            said = None


@pytest.mark.parametrize("page", [README, *GUIDE], ids=lambda p: p.stem)
def test_every_link_leads_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = unquote(target).partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        assert there.is_relative_to(ROOT), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}
            assert anchor in anchors, target


def test_the_readme_is_short_and_leads_to_every_page():
    text = README.read_text()
    assert len(text.splitlines()) <= 180
    for page in GUIDE:
        assert f"({page.relative_to(ROOT).as_posix()})" in text, page.name
    for skipped in SKIPPED:
        assert skipped in text  # no rule without a use


def test_the_picture_is_small():
    assert (ROOT / "examples" / "demo.png").stat().st_size < 150_000
