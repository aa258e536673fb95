"""``bagel-rt eval``: accuracy on the world of colored shapes, as a table, a contact sheet and JSON."""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Column, Table
from tqdm import tqdm

from bagel_rt.cli import options as cli_options
from bagel_rt.cli.options import RunOptions
from bagel_rt.cli.outputs import Overwrite, check_file
from bagel_rt.cli.parsing import OptionGroup, image_settings, with_options
from bagel_rt.cli.report import plain_text
from bagel_rt.cli.run import Run
from bagel_rt.files import IMAGE_FORMATS, atomic_write, write_image
from bagel_rt.models.bagel.settings import MAX_BATCH, check_seed, resolve_settings
from bagel_rt.validation import integer

if TYPE_CHECKING:  # imported inside the command only, to keep ``bagel-rt --help`` fast
    import torch
    from PIL import Image

    from bagel_rt.tiny.contact_sheet import Tile
    from bagel_rt.tiny.evaluate import Trial

_TILES = {"generate": 8, "edit": 8, "ask": 16}  # per section of the contact sheet: one or two full rows
_DRAWN = ("generate", "edit")
_SECTIONS = {"edit": "edits", "ask": "questions"}


_Tasks = Annotated[
    list[str] | None,
    typer.Option(
        "--task", metavar="NAME", show_default="all", help="Evaluate only this task: generate, edit or ask. Repeatable."
    ),
]
_Prompts = Annotated[int, typer.Option(help="Number of examples per category."), integer(1, 100_000)]
_Seed = Annotated[int, typer.Option(help="Seed of the examples and of the model's noise.")]
_Batch = Annotated[int, typer.Option(help="Images generated in one batch."), integer(1, MAX_BATCH)]
_Sheet = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Write a contact sheet of the first examples: .png, .jpg, .jpeg or .webp."),
]
_Report = Annotated[
    Path | None,
    typer.Option(metavar="FILE.json", help="Write the JSON report, with every example."),
]


@with_options(
    chosen=image_settings("cfg_text_scale", "cfg_img_scale", "timestep_shift", "num_timesteps"), options=RunOptions
)
def evaluate(
    prompts: _Prompts = 20,
    seed: _Seed = 0,
    task: _Tasks = None,
    batch: _Batch = 16,
    sheet: _Sheet = None,
    report: _Report = None,
    overwrite: Overwrite = False,
    *,
    chosen: OptionGroup,
    options: RunOptions,
) -> None:
    """Measure how often a model generates, edits and answers correctly, on examples of a world of colored shapes.

    The examples are combinations of shapes, colors and places that were held out from training. A program judges them:
    an image is right if it shows what its prompt says and nothing else; an edit must also leave the rest unchanged.
    Shares have 95% intervals. The same seed gives the same examples; --prompts 20 gives the first 20 of --prompts 100.
    Ctrl-C stops the evaluation and reports the results so far.
    """
    from bagel_rt.tiny.evaluate import CATEGORIES, choose_problems, scores
    from bagel_rt.tiny.evaluate import evaluate as solve

    if sheet is not None:
        check_file("--sheet", sheet, tuple(IMAGE_FORMATS), overwrite)
    if report is not None:
        check_file("--report", report, (".json",), overwrite)
    settings = chosen.as_arguments()
    resolved = {name: image for name in _DRAWN if (image := resolve_settings(name, settings).image)}
    check_seed(seed)
    problems = choose_problems(prompts, seed, task or tuple(CATEGORIES))
    tried = {problem.example.task for problem in problems}
    with Run("eval", options) as run:
        start, bars = time.perf_counter(), cli_options.shows_progress(options.progress)
        trials, ended = _collect(solve(run.bagel, problems, batch, run.bars, **settings), len(problems), bars)
        if ended is not None and not trials:
            raise ended
        run.report.pop("outputs")
        run.report |= {
            "backend": _backend(run.bagel.model.device),
            "seconds": time.perf_counter() - start,
            "seed": seed,
            "prompts": prompts,
            "batch": batch,
            "settings": {name: asdict(image) for name, image in resolved.items() if name in tried},
            "complete": ended is None,
            "scores": [asdict(score) for score in scores(trials)],
            "trials": [_trial_report(trial) for trial in trials],
        }
        if report is not None:
            with atomic_write(report) as file:
                file.write((json.dumps(run.report, indent=1) + "\n").encode())
        if sheet is not None:
            parameters = {name: value for name, value in run.report.items() if name != "trials"}
            write_image(_contact_sheet(run.report, trials), sheet, parameters)
        run.print(_table(run.report))
    if ended is not None:
        raise ended


def _collect(trials: "Iterator[Trial]", total: int, shown: bool) -> "tuple[list[Trial], BaseException | None]":
    """Run the trials behind a progress bar; return them, and the error that ended the run early or None."""
    done: list[Trial] = []
    right = 0
    with tqdm(total=total, desc="eval", unit="example", disable=not shown) as bar:
        try:
            for trial in trials:
                done.append(trial)
                right += trial.correct
                bar.set_description(trial.problem.example.task, refresh=False)
                bar.set_postfix_str(f"{right} right", refresh=False)
                bar.update()
        except BaseException as error:  # including Ctrl-C: the caller reports these trials, then raises it
            return done, error
    return done, None


def _backend(device: "torch.device") -> str:
    """The backends of the ops on a device: "reference", "triton", "cuda, triton", ..."""
    from bagel_rt.kernels.registry import OPS, implementation

    return ", ".join(sorted({implementation(op, device) for op in OPS}))


def _trial_report(trial: "Trial") -> dict[str, Any]:
    problem, example = trial.problem, trial.problem.example
    report = {"task": example.task, "category": problem.category, "text": example.text, "seed": problem.seed}
    if example.task == "ask":
        report |= {"answer": trial.result, "expected": example.answer}
    return report | {"correct": trial.correct, "failures": list(trial.failures), "seconds": trial.seconds}


def _conditions(report: dict[str, Any]) -> str:
    """One line: dtype, device, seed, steps, time."""
    steps = {settings["num_timesteps"] - 1 for settings in report["settings"].values()}
    parts = [f"{report['dtype']} on {report['device']} ({report['backend']})", f"seed {report['seed']}"]
    parts += [f"{step} steps" if step > 1 else "1 step" for step in steps]
    parts += [f"{report['seconds']:.0f} s"] + ([] if report["complete"] else ["ended early"])
    return ", ".join(parts)


def _interval(score: dict[str, Any]) -> str:
    return f"{100 * score['low']:.1f} - {100 * score['high']:.1f}%"


def _table(report: dict[str, Any]) -> str:
    """The scores as a text table."""
    numbers = (Column(name, justify="right") for name in ("right", "share", "95% interval", "seconds"))
    table = Table("task", "category", *numbers, box=None, pad_edge=False)
    for score in report["scores"]:
        right, share = f"{score['correct']}/{score['total']}", f"{100 * score['share']:.1f}%"
        category = score["category"] or "all"
        table.add_row(score["task"], category, right, share, _interval(score), f"{score['seconds']:.1f}")
    return f"{report['model']}: {_conditions(report)}\n{plain_text(table)}"


def _contact_sheet(report: dict[str, Any], trials: "Sequence[Trial]") -> "Image.Image":
    """The first trials of each category of prompts, of all edits and of all questions."""
    from bagel_rt.tiny.contact_sheet import Section, contact_sheet

    sections = []
    for score in report["scores"]:
        task, category = score["task"], score["category"]
        if (task == "generate") != (category is not None):
            continue  # generate has a section per category, the other tasks one each
        chosen = [trial for trial in trials if trial.problem.example.task == task]
        chosen = [trial for trial in chosen if category in (None, trial.problem.category)]
        tiles = [_tile(trial) for trial in chosen[: _TILES[task]]]
        note = f"{score['correct']} of {score['total']} right, 95% interval {_interval(score)}"
        share = (score["low"], score["share"], score["high"])
        sections.append(Section(category or _SECTIONS[task], note, tiles, share))
    right = sum(trial.correct for trial in trials)
    title = f"{report['model']}: {right} of {len(trials)} right"
    return contact_sheet(title, _conditions(report), sections)


def _tile(trial: "Trial") -> "Tile":
    from bagel_rt.tiny.contact_sheet import INK, RIGHT, WRONG, Tile
    from bagel_rt.tiny.evaluate import SIDE
    from bagel_rt.tiny.render import render

    example = trial.problem.example
    shown = () if example.before is None else (render(example.before, SIDE),)
    lines = [(example.text, INK)]
    if isinstance(trial.result, str):
        lines.append((trial.result or "(no answer)", RIGHT if trial.correct else WRONG))
        if example.task == "ask" and not trial.correct:
            lines.append((f"right: {example.answer}", INK))
        return Tile(shown, tuple(lines), trial.correct)
    return Tile((*shown, trial.result), (*lines, *((failure, WRONG) for failure in trial.failures[:1])), trial.correct)
