"""``bagel-rt eval``: how often a model is right on the world of shapes, as a table, a contact sheet and JSON."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from bagel_rt.cli import options as cli_options
from bagel_rt.cli.options import RunOptions, with_options
from bagel_rt.cli.run import Run
from bagel_rt.files import atomic_write, write_png
from bagel_rt.models.bagel.settings import MAX_BATCH, check_seed, resolve_settings

_ROW = "{:9} {:23} {:>9} {:>9}  {:>15} {:>9}"
_SHOWN = {"generate": 8, "edit": 8, "ask": 16}  # tiles of a section of the contact sheet: one or two full rows
_DRAWN = ("generate", "edit")
_SECTIONS = {"edit": "edits", "ask": "questions"}


def _writable_report(path: Path | None) -> Path | None:
    return path and cli_options.writable_file(path)


def _writable_sheet(path: Path | None) -> Path | None:
    return path and cli_options.writable_png(path)


_Tasks = Annotated[
    list[str] | None,
    typer.Option("--task", metavar="NAME", show_default="all", help="Only generate, edit or ask. Repeatable."),
]
_Prompts = Annotated[int, typer.Option(min=1, max=100_000, metavar="N", help="Examples of each category.")]
_Seed = Annotated[int, typer.Option(metavar="N", help="Of the examples and of the model's noise.")]
_Batch = Annotated[int, typer.Option(min=1, max=MAX_BATCH, metavar="N", help="Texts drawn at once.")]
_Sheet = Annotated[
    Path | None,
    typer.Option(metavar="FILE.png", callback=_writable_sheet, help="Write a contact sheet: the first of each kind."),
]
_Report = Annotated[
    Path | None,
    typer.Option(metavar="FILE.json", callback=_writable_report, help="Write what --json prints: every example too."),
]


def _setting(kind, metavar: str, help: str):
    option = typer.Option(metavar=metavar, show_default="the task's", help=help, rich_help_panel="Denoising")
    return Annotated[kind | None, option]


@with_options
def evaluate(
    prompts: _Prompts = 20,
    seed: _Seed = 0,
    task: _Tasks = None,
    batch: _Batch = 16,
    sheet: _Sheet = None,
    report: _Report = None,
    cfg_text_scale: _setting(float, "X", "Guidance by the last text; at 1 or less no guidance at all.") = None,
    cfg_img_scale: _setting(float, "X", "Guidance by the input picture; at 1 or less none.") = None,
    timestep_shift: _setting(float, "X", "Above 1 more of the steps are near the noise.") = None,
    num_timesteps: _setting(int, "N", "Points of the schedule; N make N - 1 steps.") = None,
    *,
    options: RunOptions,
) -> None:
    """Measure how often a model draws, edits and answers right, on examples of a world of coloured shapes.

    Combinations of shapes, colours and places are those that training on this world leaves out. A program judges: a
    picture is right if everything that its text says is there, and nothing else; an edit, if also all the rest was
    kept. Shares have 95% intervals. Equal seeds give equal examples, and --prompts 20 the first 20 of --prompts 100.
    Ctrl-C ends the measurement; what was done until then is reported.
    """
    from bagel_rt.tiny.evaluate import CATEGORIES, choose_problems, scores
    from bagel_rt.tiny.evaluate import evaluate as solve

    given = {
        "cfg_text_scale": cfg_text_scale,
        "cfg_img_scale": cfg_img_scale,
        "timestep_shift": timestep_shift,
        "num_timesteps": num_timesteps,
    }
    settings = {name: value for name, value in given.items() if value is not None}
    for name in _DRAWN:
        resolve_settings(name, settings)
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
            "settings": {name: asdict(resolve_settings(name, settings).image) for name in _DRAWN if name in tried},
            "complete": ended is None,
            "scores": [asdict(score) for score in scores(trials)],
            "trials": [_told(trial) for trial in trials],
        }
        if report is not None:
            with atomic_write(report) as file:
                file.write((json.dumps(run.report, indent=1) + "\n").encode())
        if sheet is not None:
            told = {name: value for name, value in run.report.items() if name != "trials"}
            write_png(_contact_sheet(run.report, trials), sheet, told)
        run.say(_table(run.report))
    if ended is not None:
        raise ended


def _collect(trials, total: int, shown: bool) -> tuple[list, BaseException | None]:
    """The trials, with a bar; and what ended them early, if anything did."""
    done, right = [], 0
    with tqdm(total=total, desc="eval", unit="example", disable=not shown) as bar:
        try:
            for trial in trials:
                done.append(trial)
                right += trial.correct
                bar.set_description(trial.problem.example.task, refresh=False)
                bar.set_postfix_str(f"{right} right", refresh=False)
                bar.update()
        except BaseException as error:  # also Ctrl-C: minutes of work are reported before it takes its course
            return done, error
    return done, None


def _backend(device) -> str:
    """What runs the ops on a device: "reference", "triton", "cuda, triton", ..."""
    from bagel_rt.kernels.backend import OPS, implementation

    return ", ".join(sorted({implementation(op, device) for op in OPS}))


def _told(trial) -> dict:
    example = trial.problem.example
    told = {"task": example.task, "category": trial.problem.category, "text": example.text, "seed": trial.problem.seed}
    if example.task == "ask":
        told |= {"answer": trial.result, "expected": example.answer}
    return told | {"correct": trial.correct, "failures": list(trial.failures), "seconds": trial.seconds}


def _circumstances(report: dict) -> str:
    """Where and how it was measured, in a line."""
    steps = {settings["num_timesteps"] - 1 for settings in report["settings"].values()}
    parts = [f"{report['dtype']} on {report['device']} ({report['backend']})", f"seed {report['seed']}"]
    parts += [f"{step} steps" if step > 1 else "1 step" for step in steps]
    parts += [f"{report['seconds']:.0f} s"] + ([] if report["complete"] else ["ended early"])
    return ", ".join(parts)


def _interval(score: dict) -> str:
    return f"{100 * score['low']:.1f} - {100 * score['high']:.1f}%"


def _table(report: dict) -> str:
    """The scores for people."""
    lines = [f"{report['model']}: {_circumstances(report)}"]
    lines.append(_ROW.format("task", "category", "right", "share", "95% interval", "seconds"))
    for score in report["scores"]:
        right, share = f"{score['correct']}/{score['total']}", f"{100 * score['share']:.1f}%"
        category = score["category"] or "all"
        lines.append(_ROW.format(score["task"], category, right, share, _interval(score), f"{score['seconds']:.1f}"))
    return "\n".join(lines)


def _contact_sheet(report: dict, trials: Sequence):
    """The first trials: of texts to draw by category, of edits and questions all kinds together."""
    from bagel_rt.tiny.contact_sheet import Section, contact_sheet

    sections = []
    for score in report["scores"]:
        task, category = score["task"], score["category"]
        if (task == "generate") != (category is not None):
            continue  # texts to draw have a section for each category, the other tasks one for all
        chosen = [trial for trial in trials if trial.problem.example.task == task]
        chosen = [trial for trial in chosen if category in (None, trial.problem.category)]
        tiles = [_tile(trial) for trial in chosen[: _SHOWN[task]]]
        note = f"{score['correct']} of {score['total']} right, 95% interval {_interval(score)}"
        share = (score["low"], score["share"], score["high"])
        sections.append(Section(category or _SECTIONS[task], note, tiles, share))
    right = sum(trial.correct for trial in trials)
    title = f"{report['model']}: {right} of {len(trials)} right"
    return contact_sheet(title, _circumstances(report), sections)


def _tile(trial):
    from bagel_rt.tiny.contact_sheet import INK, RIGHT, WRONG, Tile
    from bagel_rt.tiny.evaluate import SIDE
    from bagel_rt.tiny.render import render

    example = trial.problem.example
    shown = () if example.before is None else (render(example.before, SIDE),)
    lines = [(example.text, INK)]
    if example.task == "ask":
        lines.append((trial.result or "(no answer)", RIGHT if trial.correct else WRONG))
        lines += [] if trial.correct else [(f"right: {example.answer}", INK)]
        return Tile(shown, tuple(lines), trial.correct)
    return Tile((*shown, trial.result), (*lines, *((failure, WRONG) for failure in trial.failures[:1])), trial.correct)
