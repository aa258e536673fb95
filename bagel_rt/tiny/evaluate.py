"""Accuracy of a model on held-out examples of the world of shapes, for generation, editing and questions.

Every category (one object, two with a relation, ...; kinds of edits; kinds of questions) has the same number of
examples, so that scores do not depend on how often a category is drawn. Examples are determined by a seed: the first N
of each category are the same for every larger number, so two models or two settings can be compared example by example.
Shares have 95% confidence intervals (Wilson 1927, J. Am. Stat. Assoc. 22, 209-212).
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from PIL import Image

from bagel_rt.models.bagel.settings import MAX_BATCH, resolve_settings
from bagel_rt.tiny.examples import AskExample, EditExample, Example, GenerateExample, make_example
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

SIDE = 128  # pixels, of the images that the model gets and of those that are judged
ANSWER_TOKENS = 16  # longer than the longest correct answer
_NORMAL_QUANTILE = 1.959963984540054  # at 0.975


@dataclass(frozen=True)
class Problem:
    """An example to solve, its category, and the seed of the model's noise."""

    category: str
    example: Example
    seed: int


@dataclass(frozen=True, eq=False)
class Trial:
    """A problem and the result of a model.

    Attributes:
        problem: the problem.
        result: an image of ``SIDE`` x ``SIDE`` pixels, or an answer.
        failures: descriptions of what is wrong; empty if the result is correct.
        seconds: run time of its batch, divided by the batch size.
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
    """The score of one category of a task, or of the whole task if ``category`` is None.

    ``low`` and ``high`` are the 95% confidence interval of ``share``.
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
    """Choose ``count`` held-out problems of each category, grouped by task, with the categories interleaved.

    Raises:
        ValueError: ``count`` is below 1, or a task is unknown.
    """
    check("count", count, integer(1))
    for task in tasks:
        check("task", task, one_of(tuple(CATEGORIES)))
    problems = []
    for task in dict.fromkeys(tasks):
        rng = np.random.default_rng([seed, list(CATEGORIES).index(task)])
        by_category: dict[str, list[Problem]] = {category: [] for category in CATEGORIES[task]}
        while any(len(chosen) < count for chosen in by_category.values()):
            problem = _next_problem(rng, task)
            if len(by_category[problem.category]) < count:
                by_category[problem.category].append(problem)
        problems += [chosen[number] for number in range(count) for chosen in by_category.values()]
    return problems


def _next_problem(rng: np.random.Generator, task: str) -> Problem:
    example = make_example(rng, task, "test")
    return Problem(category_of(example), example, int(rng.integers(2**31)))


def category_of(example: Example) -> str:
    """The category of an example, from the ``CATEGORIES`` of its task."""
    if isinstance(example, GenerateExample):
        return _kind_of_scene(example)
    return _kind_of_edit(example) if isinstance(example, EditExample) else _kind_of_question(example)


def _kind_of_scene(example: GenerateExample) -> str:
    counts = [group.count for group in example.claims.groups]
    one, several = CATEGORIES["generate"][:2], CATEGORIES["generate"][2:]
    return (one if len(counts) == 1 else several)[max(counts) > 1]


def _kind_of_edit(example: EditExample) -> str:
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


def _kind_of_question(example: AskExample) -> str:
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


def evaluate(
    bagel: Any,
    problems: Sequence[Problem],
    batch: int = 16,
    progress: Callable[[Any], None] | None = None,
    **image_settings: Any,
) -> Iterator[Trial]:
    """Run a model on problems and judge the results. Yields trials in order, as they complete.

    Args:
        bagel: a :class:`~bagel_rt.pipeline.Bagel`, or an object with its ``generate``, ``edit`` and ``chat``. Images
            of another size than ``SIDE`` are resized before they are judged.
        batch: prompts per batch of image generation, from 1 to MAX_BATCH. Edits and questions run one at a time.
        progress: callback that the model calls after every step.
        **image_settings: fields of ``ImageSettings`` that override the defaults of each task.

    Raises:
        ValueError, TypeError: a setting is out of range or unknown. Raised before any computation.
    """
    check("batch", batch, integer(1, MAX_BATCH))
    for task in ("generate", "edit"):
        resolve_settings(task, image_settings)
    return _trials(bagel, problems, batch, progress, image_settings)


def _trials(
    bagel: Any,
    problems: Sequence[Problem],
    batch: int,
    progress: Callable[[Any], None] | None,
    image_settings: dict[str, Any],
) -> Iterator[Trial]:
    for task, group in groupby(problems, lambda problem: problem.example.task):
        same_task, size = list(group), batch if task == "generate" else 1
        for first in range(0, len(same_task), size):
            chunk = same_task[first : first + size]
            start = time.perf_counter()
            results = _solve(bagel, chunk, progress, image_settings)
            seconds = (time.perf_counter() - start) / len(chunk)
            for problem, result in zip(chunk, results, strict=True):
                yield Trial(problem, result, _failures(problem.example, result), seconds)


def _solve(
    bagel: Any, problems: list[Problem], progress: Callable[[Any], None] | None, image_settings: dict[str, Any]
) -> list[Image.Image | str]:
    """The model's results for problems of one task; only "generate" takes several problems."""
    example, options = problems[0].example, {"seed": problems[0].seed, "progress": progress}
    if isinstance(example, EditExample):
        image = render(example.before, SIDE)
        return [_resized(bagel.edit(image, example.text, **options, **image_settings).image)]
    if isinstance(example, AskExample):
        image = render(example.before, SIDE)
        return [bagel.chat(example.text, [image], max_think_token_n=ANSWER_TOKENS, **options)]
    prompts, seeds = [problem.example.text for problem in problems], [problem.seed for problem in problems]
    results = bagel.generate(prompts, seed=seeds, progress=progress, **image_settings)
    return [_resized(result.image) for result in results]


def _resized(image: Image.Image) -> Image.Image:
    return image if image.size == (SIDE, SIDE) else image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def _failures(example: Example, result: Image.Image | str) -> tuple[str, ...]:
    if isinstance(example, AskExample):
        answer = str(result)
        return () if judge_answer(example.answer, answer) else (f"expected {example.answer!r}, got {answer!r}",)
    assert isinstance(result, Image.Image)
    return tuple(judge(example.claims, result).failures)


def scores(trials: Sequence[Trial]) -> list[Score]:
    """For each task with trials: the score of the task, then the scores of its categories."""
    result = []
    for task, categories in CATEGORIES.items():
        of_task = [trial for trial in trials if trial.problem.example.task == task]
        for name in (None, *categories):
            chosen = [trial for trial in of_task if name in (None, trial.problem.category)]
            result += [_score(task, name, chosen)] if chosen else []
    return result


def _score(task: str, category: str | None, trials: list[Trial]) -> Score:
    correct, total = sum(trial.correct for trial in trials), len(trials)
    seconds = sum(trial.seconds for trial in trials)
    return Score(task, category, correct, total, correct / total, *wilson_interval(correct, total), seconds)


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """The 95% Wilson score interval of a proportion, from ``correct`` successes in ``total`` trials.

    Raises:
        ValueError: ``total`` is below 1, or ``correct`` is not from 0 to ``total``.
    """
    check("total", total, integer(1))
    check("correct", correct, integer(0, total))
    share, z = correct / total, _NORMAL_QUANTILE
    middle = share + z * z / (2 * total)
    reach = z * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2)
    low, high = ((middle + sign * reach) / (1 + z * z / total) for sign in (-1, 1))
    return (low if correct else 0.0), (high if correct < total else 1.0)  # exact at 0 and 1, without rounding errors
