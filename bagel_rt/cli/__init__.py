"""The command line, ``bagel-rt``: pictures and texts from a model, and the checks and tools around it.

Results go to stdout, progress bars and errors to stderr; with ``--json`` stdout is one JSON object and nothing else.
Exit codes: 0 done; 1 the work failed; 2 wrong usage or bad input; 130 interrupted. Whatever can be checked is checked
before a model is loaded, and PyTorch is imported inside the commands only, so that ``--help`` and mistakes are answered
at once.
"""

import fnmatch
import json
import os
import signal
import sys
import threading
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from bagel_rt import __version__
from bagel_rt.cli import options as cli_options
from bagel_rt.cli.evaluate import evaluate
from bagel_rt.cli.memory import memory
from bagel_rt.cli.options import read_images, read_part, read_seed, read_size, with_hyperparameters
from bagel_rt.cli.report import CASE_LINE, CHECK_LINE, case_lines, case_result, check_line, finite
from bagel_rt.cli.serve import serve
from bagel_rt.cli.ui import ui
from bagel_rt.models.bagel.settings import MAX_ROUNDS, check_seed, resolve_settings

_INPUT_ERRORS = (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)


class _Commands(TyperGroup):
    """All commands; whatever goes wrong in one becomes a line on stderr and an exit code."""

    def main(self, *args, standalone_mode=True, **kwargs):
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that half-written files are taken away
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.reconfigure(errors="backslashreplace")  # a terminal may lack a character of an answer
        try:
            code = super().main(*args, standalone_mode=False, **kwargs) or 0
        except (KeyboardInterrupt, typer.Abort):
            code = 130
        except Exception as error:
            if os.environ.get("BAGEL_RT_DEBUG"):
                traceback.print_exc()
            message, code = _explained(error)
            typer.echo(f"bagel-rt: error: {message}", err=True)
        sys.exit(code)


def _explained(error: Exception) -> tuple[str, int]:
    """What to say about an error that ended a command, and the exit code."""
    if hasattr(error, "format_message"):  # wrong usage, found by typer
        command = getattr(getattr(error, "ctx", None), "command_path", "bagel-rt")
        return f"{error.format_message()} (see {command} --help)", error.exit_code
    if isinstance(error, _INPUT_ERRORS):
        return str(error), 2
    summary = next(iter(str(error).splitlines()), "no reason given")
    return f"{type(error).__name__}: {summary} (with BAGEL_RT_DEBUG=1 in the environment: where)", 1


app = typer.Typer(
    name="bagel-rt",
    cls=_Commands,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 the work failed, 2 wrong usage or bad input, 130 interrupted. "
    "With BAGEL_RT_DEBUG=1 in the environment errors show where they come from.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"bagel_rt {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """BAGEL, the unified text and image model: draw, edit, look and talk.

    Without --model, commands run a small model that comes along and knows one thing: a world of coloured shapes.
    """


@app.command()
@with_hyperparameters("generate")
def generate(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="What to draw; put each in quotes.")],
    output: cli_options.Outputs,
    width: cli_options.Side = None,
    height: cli_options.Side = None,
    seed: cli_options.Seed = None,
    negative_prompt: cli_options.Negative = None,
    think: cli_options.Think = False,
    model: cli_options.Model = None,
    device: cli_options.Device = None,
    dtype: cli_options.DType = None,
    as_json: cli_options.Json = False,
    progress: cli_options.Progress = None,
    **hyperparameters,
) -> None:
    """Draw a picture from a text; or from each of several, as one batch.

    The PNG's "parameters" tell the prompt, the seed and all settings. Of several prompts, each has the seed after that
    of the one before it. The options under Text matter with --think.
    """
    from bagel_rt.cli.run import Run, numbered

    resolve_settings("generate", hyperparameters)
    size, seed = read_size(model, width, height), read_seed(seed)
    with Run("generate", model, device, dtype, as_json, progress) as run:
        results = run.bagel.generate(
            prompts,
            size=size,
            seed=seed,
            negative_prompt=negative_prompt,
            think=think,
            progress=run.bars,
            **hyperparameters,
        )
        for number, (prompt, result) in enumerate(zip(prompts, results, strict=True), start=1):
            path = numbered(output, number) if len(prompts) > 1 else output
            run.picture(result, path, prompt=prompt, think=think)


@app.command()
@with_hyperparameters("edit")
def edit(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="The picture.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to change, in quotes.")],
    output: cli_options.Output,
    more: cli_options.MoreImages = None,
    seed: cli_options.Seed = None,
    negative_prompt: cli_options.Negative = None,
    think: cli_options.Think = False,
    model: cli_options.Model = None,
    device: cli_options.Device = None,
    dtype: cli_options.DType = None,
    as_json: cli_options.Json = False,
    progress: cli_options.Progress = None,
    **hyperparameters,
) -> None:
    """Change a picture as a text says, or combine it with those given by --image.

    The result has the size of the last picture given, after the model's resize rule. The PNG's "parameters" tell the
    prompt, the seed and all settings. The options under Text matter with --think.
    """
    from bagel_rt.cli.run import Run

    resolve_settings("edit", hyperparameters)
    paths, seed = [image, *(more or ())], read_seed(seed)
    pictures = read_images(paths)
    with Run("edit", model, device, dtype, as_json, progress) as run:
        result = run.bagel.edit(
            pictures,
            prompt,
            seed=seed,
            negative_prompt=negative_prompt,
            think=think,
            progress=run.bars,
            **hyperparameters,
        )
        run.picture(result, output, prompt=prompt, images=[path.name for path in paths], think=think)


@app.command()
@with_hyperparameters("chat")
def chat(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The question, in quotes.")],
    images: cli_options.MoreImages = None,
    seed: cli_options.Seed = None,
    think: cli_options.Think = False,
    model: cli_options.Model = None,
    device: cli_options.Device = None,
    dtype: cli_options.DType = None,
    as_json: cli_options.Json = False,
    progress: cli_options.Progress = None,
    **hyperparameters,
) -> None:
    """Ask about pictures, or about anything; the answer appears as it is written."""
    from bagel_rt.cli.run import Run

    resolve_settings("chat", hyperparameters)
    paths, seed = images or [], read_seed(seed)
    pictures = read_images(paths)
    with Run("chat", model, device, dtype, as_json, progress) as run:
        bars = run.bars if as_json or not sys.stdout.isatty() else None  # on a terminal the answer is the progress
        pieces = []
        for piece in run.bagel.stream(prompt, pictures, think=think, seed=seed, progress=bars, **hyperparameters):
            pieces.append(piece)
            run.say(piece, end="")
        run.say("")
        run.text("".join(pieces))
        asked = {"prompt": prompt, "images": [path.name for path in paths], "think": think}
        run.report |= {"seed": seed, "parameters": asked | hyperparameters}


@app.command()
@with_hyperparameters("interleave")
def interleave(
    parts: Annotated[
        list[str],
        typer.Argument(
            metavar="PART...",
            help="Texts, in quotes, and picture files, in order. A part that names a file is a picture, any other is a "
            "text; image:PART and text:PART say so.",
        ),
    ],
    output: cli_options.Numbered,
    max_rounds: Annotated[int, typer.Option(min=1, max=MAX_ROUNDS, metavar="N", help="Pictures at most.")] = 3,
    width: cli_options.Side = None,
    height: cli_options.Side = None,
    seed: cli_options.Seed = None,
    think: cli_options.Think = True,
    model: cli_options.Model = None,
    device: cli_options.Device = None,
    dtype: cli_options.DType = None,
    as_json: cli_options.Json = False,
    progress: cli_options.Progress = None,
    **hyperparameters,
) -> None:
    """Texts and pictures in, texts and pictures out; for models that were trained to draw in between (ThinkMorph).

    Texts are printed when all is done, and each picture's file name in its place. Pictures have the size of the last
    one given; --width and --height count where none is.
    """
    from bagel_rt.cli.run import Run, numbered

    resolve_settings("interleave", hyperparameters)
    size, seed = read_size(model, width, height), read_seed(seed)
    inputs = [read_part(part) for part in parts]
    told = [made if isinstance(made, str) else Path(part).name for part, made in zip(parts, inputs, strict=True)]
    with Run("interleave", model, device, dtype, as_json, progress) as run:
        outputs = run.bagel.interleave(
            inputs, think=think, max_rounds=max_rounds, size=size, seed=seed, progress=run.bars, **hyperparameters
        )
        pictures = 0
        for made in outputs:
            if isinstance(made, str):
                run.say(made)
                run.text(made)
            else:
                pictures += 1
                run.picture(made, numbered(output, pictures), parts=told, think=think)
        run.report |= {"seed": seed, "parameters": {"parts": told, "think": think} | hyperparameters}


@app.command()
def info(model: cli_options.Model = None, as_json: cli_options.Json = False) -> None:
    """Show versions, devices, the compiled extension and the ops' backends; with --model also a checkpoint's sizes."""
    from bagel_rt.check.info import collect, text

    report = collect(model)
    typer.echo(json.dumps(report) if as_json else text(report))


app.command()(memory)
app.command("eval")(evaluate)
app.command()(serve)
app.command()(ui)


@app.command()
def check(
    op: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Only this one. Repeatable.")] = None,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", show_default="cuda if there is one", help="cpu, cuda or cuda:N.")
    ] = None,
    as_json: cli_options.Json = False,
) -> None:
    """Run every kernel on this machine's GPU beside its reference; exit code 1 if one fails or differs.

    What to run first on a card that nobody has tried. On a CPU the kernels run in Triton's interpreter, at small sizes,
    if TRITON_INTERPRET=1 is in the environment.
    """
    import torch

    from bagel_rt.check import run as checks

    cases = checks.choose_cases(op)
    chosen = cli_options.read_device(device) or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = checks.run(chosen, cases)
    report = checks.machine(chosen)
    if not as_json:
        typer.echo(CHECK_LINE.format("result", "op", "dtype", "error", "allowed", "case"))
    done = []
    for result in results:
        done.append(result)
        if not as_json:
            typer.echo(check_line(result))
    failed = sum(result.result == "FAIL" for result in done)
    left_out = len(cases) - len({(result.op, result.case) for result in done})
    if as_json:
        found = [finite(asdict(result)) | {"result": result.result.lower()} for result in done]
        typer.echo(json.dumps(report | {"failed": failed, "for_gpus_only": left_out, "cases": found}))
    else:
        counts = {name: sum(result.result == name for result in done) for name in ("pass", "FAIL", "not run")}
        typer.echo(", ".join(f"{count} {name}" for name, count in counts.items()))
        if left_out:
            typer.echo(f"{left_out} cases left out: the model's own sizes need a GPU, CUDA kernels a built extension")
        typer.echo(f"{report['device']}, tile sizes of {report['table']}")
        typer.echo(", ".join(f"{name} {version}" for name, version in report["versions"].items()))
    if failed:
        raise typer.Exit(1)


@app.command()
def conformance(
    pack: Annotated[Path, typer.Argument(metavar="PACK", help="Folder with checkpoint, images and cases.")],
    case: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only this one; * stands for anything. Repeatable.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="List every comparison.")] = False,
    device: Annotated[str, typer.Option(metavar="NAME", help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[cli_options.DTypeName, typer.Option(help="Of the weights.")] = "float32",
    as_json: cli_options.Json = False,
) -> None:
    """Compare with recorded behaviour of the official code; exit code 1 if anything differs."""
    from bagel_rt.conformance import find_cases, run_case
    from bagel_rt.pipeline import Bagel

    folders = {folder.name: folder for folder in find_cases(pack)}
    chosen = {name: fnmatch.filter(folders, name) for name in case or ["*"]}
    for name, matches in chosen.items():
        if not matches:
            raise ValueError(f"--case {name}: no such case in {pack}; it has {', '.join(folders)}")
    bagel = Bagel.from_pretrained(pack / "checkpoint", cli_options.read_device(device), cli_options.read_dtype(dtype))
    if not as_json:
        typer.echo(CASE_LINE.format("result", "case", "compared", "worst", "allowed", "of"))
    reports = []
    for name in sorted(set().union(*chosen.values())):
        reports.append(run_case(bagel, pack, folders[name]))
        if not as_json:
            typer.echo(case_lines(reports[-1], verbose))
    counts = {
        result: sum(case_result(report) == result for report in reports) for result in ("pass", "FAIL", "skipped")
    }
    if as_json:
        cases = [asdict(report) | {"result": case_result(report).lower()} for report in reports]
        typer.echo(json.dumps({"pack": pack.resolve().name, "failed": counts["FAIL"], "cases": finite(cases)}))
    else:
        typer.echo(", ".join(f"{count} {result}" for result, count in counts.items()))
    if counts["FAIL"]:
        raise typer.Exit(1)


@app.command()
def make_random_checkpoint(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="New, or empty.")],
    like: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", show_default="BAGEL-7B-MoT", help="A model that gives shapes and tokenizer."),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the weights.")] = 0,
    shard_gib: Annotated[float, typer.Option(min=0, max=1024, metavar="X", help="Size at which a file is full.")] = 4.0,
    as_json: cli_options.Json = False,
    progress: cli_options.Progress = None,
) -> None:
    """Write a model folder of random weights (29 GB by default), to measure speed and memory with.

    Its tokenizer is that of --like, or the built-in model's, of a few hundred tokens. Equal seeds give equal weights.
    """
    from bagel_rt.models.bagel.config import BAGEL_7B_MOT, BagelConfig
    from bagel_rt.models.bagel.random_checkpoint import make_random_checkpoint as make

    check_seed(seed)
    config = BAGEL_7B_MOT if like is None else BagelConfig.from_folder(like)
    tokenizer = {} if like is None else {"tokenizer": like}
    size = make(folder, config, seed, int(shard_gib * 2**30), cli_options.shows_progress(progress), **tokenizer)
    report = {"folder": str(folder), "seed": seed, "bytes": size}
    typer.echo(json.dumps(report) if as_json else f"{folder}: {size:,} bytes of random weights, seed {seed}")


if __name__ == "__main__":
    app(prog_name="bagel-rt")
