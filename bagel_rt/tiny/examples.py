"""Random examples of the three tasks, from the train or the test split.

All scenes of an example, including the scene after an edit, belong to the same split (:func:`.scene.combination`): no
training example shows, describes or produces a combination of the test split.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from bagel_rt.tiny.claims import Claims
from bagel_rt.tiny.edits import EDITS
from bagel_rt.tiny.language import caption, describe
from bagel_rt.tiny.questions import (
    QUESTIONS,
    Question,
    ask_count,
    ask_description,
    ask_existence,
    ask_relation,
    ask_side,
    ask_which,
)
from bagel_rt.tiny.scene import Scene, draw_scene, groups_of, pick, split_of
from bagel_rt.validation import check, one_of

TASKS = ("generate", "edit", "ask")
SPLITS = ("train", "test")


@dataclass(frozen=True)
class GenerateExample:
    """A caption. Any image that satisfies ``claims`` is correct, such as that of the scene ``after``."""

    task: ClassVar[Literal["generate"]] = "generate"
    before: ClassVar[None] = None
    text: str
    after: Scene
    claims: Claims


@dataclass(frozen=True)
class EditExample:
    """A scene and an instruction. Any image that satisfies ``claims`` is correct, such as that of the scene ``after``.

    The claims cover what must stay unchanged.
    """

    task: ClassVar[Literal["edit"]] = "edit"
    text: str
    before: Scene
    after: Scene
    claims: Claims


@dataclass(frozen=True)
class AskExample:
    """A question about a scene, and its answer."""

    task: ClassVar[Literal["ask"]] = "ask"
    after: ClassVar[None] = None
    text: str
    before: Scene
    answer: str


Example = GenerateExample | EditExample | AskExample


def make_example(rng: np.random.Generator, task: str | None, split: str) -> Example:
    """Draw an example. The result depends only on the arguments, on every machine.

    Args:
        rng: the source of all randomness.
        task: "generate", "edit" or "ask", or None for a random one.
        split: "train" or "test".

    Raises:
        ValueError: the task or the split is unknown.
    """
    check("split", split, one_of(SPLITS))
    task = pick(rng, TASKS) if task is None else task
    check("task", task, one_of(TASKS, "None draws a random task"))
    if task == "generate":
        return draw_generate(rng, split)
    return draw_edit(rng, split) if task == "edit" else _draw_ask(rng, split)


def _scene_of(rng: np.random.Generator, split: str, groups: int) -> Scene:
    """Draw a scene of the split by rejection sampling."""
    while True:
        scene = draw_scene(rng, groups)
        if split_of(scene) == split:
            return scene


def draw_generate(rng: np.random.Generator, split: str) -> GenerateExample:
    """Draw an example of the task "generate"; see :func:`make_example`."""
    scene = _scene_of(rng, split, pick(rng, (1, 2)))
    text, claims = caption(rng, scene)
    return GenerateExample(text, scene, claims)


def draw_edit(rng: np.random.Generator, split: str) -> EditExample:
    """Draw an example of the task "edit"; see :func:`make_example`."""
    # The kind of edit and the number of groups are drawn outside the loop: rejection must not change their frequencies.
    make_edit = pick(rng, list(EDITS))
    groups = pick(rng, EDITS[make_edit])
    while True:
        before = _scene_of(rng, split, groups)
        edit = make_edit(rng, before)
        if edit is not None and split_of(edit.after) == split:
            return EditExample(edit.text, before, edit.after, edit.claims)


def _draw_ask(rng: np.random.Generator, split: str) -> AskExample:
    ask = pick(rng, list(QUESTIONS))
    while True:
        scene = _scene_of(rng, split, pick(rng, QUESTIONS[ask]))
        if (question := ask(rng, scene)) is not None:
            return AskExample(question[0], scene, question[1])


def make_questions(rng: np.random.Generator, split: str, count: int) -> tuple[Scene, list[Question]]:
    """Draw a scene of the split and ``count`` different questions about it, at most 16.

    Questions with a yes, no or number as the answer are the hardest, so they get three times the usual weight. Training
    adds two kinds: on which side a group is (weight 2), and which of three kinds of things exist (weight 8). The last
    question asks for the full description. Asked earlier, its answer would give away the others.
    """
    scene = _scene_of(rng, split, pick(rng, (1, 2)))
    suitable = [ask for ask, groups in QUESTIONS.items() if len(groups_of(scene.things)) in groups]
    suitable.remove(ask_description)
    suitable += 8 * [ask_which] + 2 * [ask for ask in suitable if ask in (ask_existence, ask_relation, ask_count)]
    if ask_relation in suitable:
        suitable += [ask_side, ask_side]
    answers: dict[str, str] = {}
    while len(answers) < count - 1:
        if (question := pick(rng, suitable)(rng, scene)) is not None:
            answers.setdefault(*question)
    return scene, [*answers.items(), ask_description(rng, scene)]


def make_text_task(rng: np.random.Generator, split: str, count: int) -> tuple[str | None, list[Question]]:
    """Draw a text-only task: (context or None, [(text, expected answer), ...]).

    There are three kinds, equally likely: a caption and the description of its scene; the description of a scene as
    context, an instruction and the description after the edit; a description as context and ``count`` different
    questions.
    """
    kind = pick(rng, ("caption", "edit", "questions"))
    if kind == "caption":
        caption_of = draw_generate(rng, split)
        description = describe(caption_of.after)
        if caption_of.claims.background is None:  # the caption does not mention it
            description = description.removesuffix(f" on {caption_of.after.background}")
        return None, [(caption_of.text, description)]
    if kind == "edit":
        edit = draw_edit(rng, split)
        return describe(edit.before), [(edit.text, describe(edit.after))]
    scene, questions = make_questions(rng, split, count + 1)
    return describe(scene), questions[:-1]


def texts(rng: np.random.Generator, n: int) -> Iterator[str]:
    """Yield ``n`` texts of the training split, to train a tokenizer: captions, instructions, questions and answers."""
    pending: list[str] = []
    for _ in range(n):
        if not pending:
            example = make_example(rng, None, "train")
            pending = [example.text, example.answer] if isinstance(example, AskExample) else [example.text]
        yield pending.pop(0)
