"""Run ``bagel-rt`` commands in the test process."""

from typer.testing import CliRunner

from bagel_rt.cli import app

WIDE = {"COLUMNS": "300"}  # wide enough that help texts are not wrapped


def run(*args, **options):
    """Run a command and return its result."""
    return CliRunner().invoke(app, [str(arg) for arg in args], **options)


def good(*args, **options):
    """Run a command that must succeed without output on stderr, and return its stdout."""
    result = run(*args, **options)
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    return result.stdout
