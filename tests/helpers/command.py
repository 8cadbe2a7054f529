"""The command line, in this process."""

from typer.testing import CliRunner

from fwt import cli


def fwt_command(*words):
    """Exit code and output; an error of ours is raised as such."""
    done = CliRunner().invoke(cli.app, [str(w) for w in words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout
