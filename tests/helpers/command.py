"""The command line, in this process."""

import contextlib
import io
import sys
import types
import warnings
from unittest import mock

import pytest
from typer.testing import CliRunner

from fwt import cli as _cli


def cli(*words, cwd, code=0):
    """What ``fwt`` prints to stdout and stderr, run in a folder; it ends with the exit code."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(cwd),
        mock.patch.object(sys, "argv", ["fwt", *map(str, words)]),
        mock.patch.dict("os.environ", {"COLUMNS": "100"}),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        warnings.simplefilter("default")
        with pytest.raises(SystemExit) as end:
            _cli.main()
    assert (end.value.code or 0) == code, out.getvalue() + err.getvalue()
    return types.SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue())


def fwt_command(*words):
    """Exit code and output; an error of ours is raised as such."""
    done = CliRunner().invoke(_cli.app, [str(w) for w in words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout
