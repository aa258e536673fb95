"""The command line, ``bagel-rt``.

Results go to stdout, progress bars and errors to stderr; with ``--json`` stdout is one JSON object and nothing else.
Exit codes: 0 success; 1 failure; 2 usage error or invalid input; 130 interrupted. Inputs are checked before a model is
loaded. PyTorch is imported inside the commands only, so that ``--help`` and usage errors do not wait for it.
"""

import io
import os
import signal
import sys
import threading
import traceback
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from bagel_rt import __version__
from bagel_rt.cli.check import check, conformance, info
from bagel_rt.cli.checkpoint import make_random_checkpoint
from bagel_rt.cli.evaluate import evaluate
from bagel_rt.cli.generate import chat, edit, generate, interleave
from bagel_rt.cli.memory import memory
from bagel_rt.cli.serve import serve
from bagel_rt.cli.ui import ui

_INPUT_ERRORS = (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)


class _Commands(TyperGroup):
    """The command group: an error in any command becomes one line on stderr and an exit code."""

    def main(self, *args: Any, **options: Any) -> NoReturn:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwind, so that partial files are removed
        for stream in filter(None, (sys.stdout, sys.stderr)):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # the terminal's encoding may lack a character
        try:
            code = super().main(*args, **options | {"standalone_mode": False}) or 0
        except (KeyboardInterrupt, typer.Abort):
            code = 130
        except Exception as error:
            if os.environ.get("BAGEL_RT_DEBUG"):
                traceback.print_exc()
            arguments = options.get("args") or (args[0] if args else None) or sys.argv[1:]
            name = arguments[0] if arguments and arguments[0] in self.commands else None
            message, code = _error_message(error, " ".join(filter(None, ("bagel-rt", name))))
            typer.echo(f"bagel-rt: error: {message}", err=True)
        sys.exit(code)


def _error_message(error: Exception, command: str) -> tuple[str, int]:
    """The text that describes an error, and the exit code. One line, unless the error has advice on more."""
    if hasattr(error, "format_message"):  # a usage error, raised by typer
        message = error.format_message().rstrip(".")
        if "unexpected extra argument" in message:
            message += ". Put a prompt of several words in quotes"
        return f"{message}. See {command} --help.", 2
    if isinstance(error, _INPUT_ERRORS):
        return str(error), 2
    name = type(error).__name__
    if name == "OutOfMemoryError":  # torch's, which is not imported here; the engine adds advice to it
        return f"{name}: {error}", 1
    summary = next(iter(str(error).splitlines()), "no reason given")
    return f"{name}: {summary} (set BAGEL_RT_DEBUG=1 for a traceback)", 1


app = typer.Typer(
    name="bagel-rt",
    cls=_Commands,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 success, 1 failure, 2 usage error or invalid input, 130 interrupted. "
    "Set BAGEL_RT_DEBUG=1 for the traceback of an error.",
)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"bagel_rt {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """BAGEL, the unified text and image model: generate and edit images, ask about them, chat.

    Without --model, commands run the small embedded model, which knows only a world of colored shapes.
    """


for command in (generate, edit, chat, interleave, info, memory):
    app.command()(command)
app.command("eval")(evaluate)
for command in (serve, ui, check, conformance, make_random_checkpoint):
    app.command()(command)
