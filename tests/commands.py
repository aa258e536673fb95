"""The command line in the process of the tests."""

from typer.testing import CliRunner

from bagel_rt.cli import app

WIDE = {"COLUMNS": "300"}  # nothing in a help text is wrapped


def run(*args, **options):
    """The result of a command."""
    return CliRunner().invoke(app, [str(arg) for arg in args], **options)


def good(*args, **options):
    """The output of a command that succeeds and logs nothing."""
    result = run(*args, **options)
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    return result.stdout
