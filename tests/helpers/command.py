"""The command line: in this process, or in one of its own, in which no framework is imported."""

import atexit
import contextlib
import functools
import io
import json
import subprocess
import sys
import types
import warnings
from unittest import mock

from typer.testing import CliRunner

from fwt import cli as _cli

FRAMEWORKS = ("keras", "torch", "tensorflow")


@functools.cache
def _server():
    server = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(server.kill)
    return server


def cli(*words, cwd, code=0):
    """What ``fwt`` prints to stdout and stderr in a folder. It ends with the exit code, and
    imports no framework."""
    server = _server()
    print(json.dumps([list(map(str, words)), str(cwd)]), file=server.stdin, flush=True)
    found, out, err, imported = json.loads(server.stdout.readline())
    assert found == code, out + err
    assert not imported, words
    return types.SimpleNamespace(stdout=out, stderr=err)


def _answer(words, cwd):
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        contextlib.chdir(cwd),
        mock.patch.object(sys, "argv", ["fwt", *words]),
        mock.patch.dict("os.environ", {"COLUMNS": "100"}),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        warnings.simplefilter("default")
        try:
            _cli.main()
        except SystemExit as end:
            code = end.code or 0
    return code, out.getvalue(), err.getvalue(), [f for f in FRAMEWORKS if f in sys.modules]


def fwt_command(*words):
    """Exit code and output; an error of ours is raised as such."""
    done = CliRunner().invoke(_cli.app, [str(w) for w in words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(_answer(*json.loads(line))), flush=True)
