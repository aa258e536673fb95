"""How often a model is right: held-out examples of the world of shapes, drawn, edited and answered, and judged.

Examples come in categories (one object, two with a relation, ...; kinds of edits; kinds of questions), as many of
each, so that a figure does not depend on how often the world happens to ask something. A seed and a number name them:
the first N of each category are the same whatever larger number is asked for, so two models, or two settings of one,
can be compared example by example. Shares come with 95% intervals (Wilson 1927, J. Am. Stat. Assoc. 22, 209-212).
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from PIL import Image

from bagel_rt.models.bagel.settings import MAX_BATCH, resolve_settings
from bagel_rt.tiny.examples import Example, make_example
from bagel_rt.tiny.judge import judge, judge_answer
from bagel_rt.tiny.render import render
from bagel_rt.tiny.scene import COLORS, SHAPES, SIZES
from bagel_rt.validation import check, integer, one_of

CATEGORIES = {
    "generate": ("one object", "two or three alike", "two with a relation", "groups with a relation"),
    "edit": ("recolor", "reshape", "resize", "move", "add", "remove", "background"),
    "ask": (
        "color",
        "shape",
        "size",
        "count",
        "existence",
        "background",
        "place",
        "relation",
        "neighbor",
        "description",
    ),
}
"""Task -> its categories."""

SIDE = 128  # of the pictures that are shown and judged, in pixels
ANSWER_TOKENS = 16  # the longest right answer is shorter
_NORMAL_QUANTILE = 1.959963984540054  # of 0.975


@dataclass(frozen=True)
class Problem:
    """An example to solve, its category, and the seed of the model's noise."""

    category: str
    example: Example
    seed: int


@dataclass(frozen=True, eq=False)
class Trial:
    """A problem and what a model made of it.

    Attributes:
        problem: what was asked.
        result: the picture, ``SIDE`` x ``SIDE``, or the answer.
        failures: what is wrong with it; nothing if it is right.
        seconds: its share of the time that its batch took.
    """

    problem: Problem
    result: Image.Image | str
    failures: tuple[str, ...]
    seconds: float

    @property
    def correct(self) -> bool:
        return not self.failures


@dataclass(frozen=True)
class Score:
    """How many of a task's trials are right, in one category or, if that is None, in all.

    ``low`` and ``high`` are the 95% interval of the share.
    """

    task: str
    category: str | None
    correct: int
    total: int
    share: float
    low: float
    high: float
    seconds: float


def choose_problems(count: int, seed: int, tasks: Sequence[str] = tuple(CATEGORIES)) -> list[Problem]:
    """``count`` held-out problems of each category, task by task, the categories of a task taking turns.

    Raises:
        ValueError: a count below 1, or an unknown task.
    """
    check("count", count, integer(1))
    for task in tasks:
        check("task", task, one_of(tuple(CATEGORIES)))
    problems = []
    for task in dict.fromkeys(tasks):
        rng = np.random.default_rng([seed, list(CATEGORIES).index(task)])
        found = {category: [] for category in CATEGORIES[task]}
        while any(len(chosen) < count for chosen in found.values()):
            problem = _next_problem(rng, task)
            if len(found[problem.category]) < count:
                found[problem.category].append(problem)
        problems += [chosen[number] for number in range(count) for chosen in found.values()]
    return problems


def _next_problem(rng: np.random.Generator, task: str) -> Problem:
    example = make_example(rng, task, "test")
    return Problem(category_of(example), example, int(rng.integers(2**31)))


def category_of(example: Example) -> str:
    """Which of its task's ``CATEGORIES`` an example is of."""
    return {"generate": _kind_of_scene, "edit": _kind_of_edit, "ask": _kind_of_question}[example.task](example)


def _kind_of_scene(example: Example) -> str:
    counts = [group.count for group in example.claims.groups]
    one, several = CATEGORIES["generate"][:2], CATEGORIES["generate"][2:]
    return (one if len(counts) == 1 else several)[max(counts) > 1]


def _kind_of_edit(example: Example) -> str:
    before, after = example.before, example.after
    if before.background != after.background:
        return "background"
    if len(before.things) != len(after.things):
        return "add" if len(before.things) < len(after.things) else "remove"
    pairs = list(zip(before.things, after.things, strict=True))
    for attribute, kind in (("color", "recolor"), ("shape", "reshape"), ("size", "resize")):
        if any(getattr(old, attribute) != getattr(new, attribute) for old, new in pairs):
            return kind
    return "move"


def _kind_of_question(example: Example) -> str:
    text, answer = example.text, example.answer
    for words, kind in (
        ("how many ", "count"),
        ("where ", "place"),
        ("is there ", "existence"),
        ("are there ", "existence"),
        ("describe ", "description"),
        ("what is in the picture", "description"),
    ):
        if text.startswith(words):
            return kind
    if text.endswith("background"):
        return "background"
    for answers, kind in ((("yes", "no"), "relation"), (COLORS, "color"), (SHAPES, "shape"), (SIZES, "size")):
        if answer in answers:
            return kind
    return "neighbor"


def evaluate(bagel, problems: Sequence[Problem], batch: int = 16, progress=None, **image_settings) -> Iterator[Trial]:
    """Let a model solve problems, and judge it; trials come as they are done, in order.

    Args:
        bagel: a :class:`~bagel_rt.pipeline.Bagel`, or whatever has its ``generate``, ``edit`` and ``chat``. Pictures
            of another size than ``SIDE`` are resized before they are judged.
        batch: texts that are drawn at once; edits and questions run one by one. [1, MAX_BATCH]
        progress: for the model to call after every step.
        **image_settings: fields of ``ImageSettings`` in place of each task's defaults.

    Raises:
        ValueError, TypeError: a setting is out of range or unknown; nothing was computed.
    """
    check("batch", batch, integer(1, MAX_BATCH))
    for task in ("generate", "edit"):
        resolve_settings(task, image_settings)
    return _trials(bagel, problems, batch, progress, image_settings)


def _trials(bagel, problems, batch: int, progress, image_settings: dict) -> Iterator[Trial]:
    for task, group in groupby(problems, lambda problem: problem.example.task):
        same_task, size = list(group), batch if task == "generate" else 1
        for first in range(0, len(same_task), size):
            together = same_task[first : first + size]
            start = time.perf_counter()
            results = _solve(bagel, task, together, progress, image_settings)
            seconds = (time.perf_counter() - start) / len(together)
            for problem, result in zip(together, results, strict=True):
                yield Trial(problem, result, _failures(problem.example, result), seconds)


def _solve(bagel, task: str, problems: list[Problem], progress, image_settings: dict) -> list[Image.Image | str]:
    """What the model makes of problems of one task; only of "generate" there may be several."""
    if task == "generate":
        prompts, seeds = [problem.example.text for problem in problems], [problem.seed for problem in problems]
        drawn = bagel.generate(prompts, seed=seeds, progress=progress, **image_settings)
        return [_resized(result.image) for result in drawn]
    (problem,) = problems
    shown, asked = render(problem.example.before, SIDE), {"seed": problem.seed, "progress": progress}
    if task == "edit":
        return [_resized(bagel.edit(shown, problem.example.text, **asked, **image_settings).image)]
    return [bagel.chat(problem.example.text, [shown], max_think_token_n=ANSWER_TOKENS, **asked)]


def _resized(image: Image.Image) -> Image.Image:
    return image if image.size == (SIDE, SIDE) else image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def _failures(example: Example, result: Image.Image | str) -> tuple[str, ...]:
    if example.task == "ask":
        return () if judge_answer(example, result) else (f"{result!r} in place of {example.answer!r}",)
    verdict = judge(example, result)
    return () if verdict.correct else tuple(verdict.failures)


def scores(trials: Sequence[Trial]) -> list[Score]:
    """A score for each category that was tried, and before them, if a task has several, one for all its trials."""
    found = []
    for task, categories in CATEGORIES.items():
        rows = [(None, [trial for trial in trials if trial.problem.example.task == task])]
        rows += [(name, [trial for trial in rows[0][1] if trial.problem.category == name]) for name in categories]
        found += [_score(task, name, chosen) for name, chosen in rows if chosen]
    return found


def _score(task: str, category: str | None, trials: list[Trial]) -> Score:
    correct, total = sum(trial.correct for trial in trials), len(trials)
    seconds = sum(trial.seconds for trial in trials)
    return Score(task, category, correct, total, correct / total, *wilson(correct, total), seconds)


def wilson(correct: int, total: int) -> tuple[float, float]:
    """The 95% interval of a share of which ``correct`` of ``total`` were seen.

    Raises:
        ValueError: not 0 <= correct <= total, or no trials.
    """
    if not 0 <= correct <= total or total < 1:
        raise ValueError(f"{correct} of {total}: allowed are 0 <= correct <= total and 1 <= total")
    share, z = correct / total, _NORMAL_QUANTILE
    middle = share + z * z / (2 * total)
    reach = z * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2)
    low, high = ((middle + sign * reach) / (1 + z * z / total) for sign in (-1, 1))
    return (low if correct else 0.0), (high if correct < total else 1.0)  # exact at the ends, where rounding is not
