"""Examples of the three tasks, drawn at random from one split of the world.

Every scene of an example, that after an edit too, is of a combination of its split (:func:`.scene.combination`):
nothing of the test split is ever drawn, described, asked about or made by an edit in training.
"""

from collections.abc import Iterator
from dataclasses import dataclass

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

TASKS = ("generate", "edit", "ask")
SPLITS = ("train", "test")


@dataclass(frozen=True)
class Example:
    """What is given and what is wanted.

    generate: the caption ``text``; wanted is a picture like ``after``, of which only ``claims`` are said.
    edit: the scene ``before`` and the instruction ``text``; wanted is a picture like ``after``, of which ``claims``
        are said or follow from "and nothing else".
    ask: the scene ``before`` and the question ``text``; wanted is ``answer``. There are no claims.
    """

    task: str
    text: str
    before: Scene | None
    after: Scene | None
    answer: str | None
    claims: Claims


def make_example(rng: np.random.Generator, task: str | None, split: str) -> Example:
    """Draws an example; one seed gives the same examples everywhere.

    Args:
        rng: where all randomness comes from.
        task: "generate", "edit" or "ask", or None for any of them, equally often.
        split: "train" or "test".

    Raises:
        ValueError: an unknown task or split.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r}, expected one of {', '.join(SPLITS)}")
    task = pick(rng, TASKS) if task is None else task
    if task == "generate":
        return _generate(rng, split)
    if task == "edit":
        return _edit(rng, split)
    if task == "ask":
        return _ask(rng, split)
    raise ValueError(f"task={task!r}, expected one of {', '.join(TASKS)}, or None for any")


def _scene_of(rng: np.random.Generator, split: str, groups: int) -> Scene:
    """A scene of the split."""
    while True:
        scene = draw_scene(rng, groups)
        if split_of(scene) == split:
            return scene


def _generate(rng: np.random.Generator, split: str) -> Example:
    scene = _scene_of(rng, split, pick(rng, (1, 2)))
    text, claims = caption(rng, scene)
    return Example("generate", text, None, scene, None, claims)


def _edit(rng: np.random.Generator, split: str) -> Example:
    """The kind of edit and the number of groups are drawn only once, so that both splits have as many of each."""
    change = pick(rng, list(EDITS))
    groups = pick(rng, EDITS[change])
    while True:
        before = _scene_of(rng, split, groups)
        edit = change(rng, before)
        if edit is not None and split_of(edit.after) == split:
            return Example("edit", edit.text, before, edit.after, None, edit.claims)


def _ask(rng: np.random.Generator, split: str) -> Example:
    ask = pick(rng, list(QUESTIONS))
    while True:
        scene = _scene_of(rng, split, pick(rng, QUESTIONS[ask]))
        if (question := ask(rng, scene)) is not None:
            return Example("ask", question[0], scene, None, question[1], Claims())


def make_questions(rng: np.random.Generator, split: str, count: int) -> tuple[Scene, list[Question]]:
    """A scene of the split and ``count`` different questions about it, at most 16, each of any kind that suits it.

    Those that are answered by yes, no or a number are the hardest, and thrice as likely as others; on which side
    something is, twice, and which of three kinds of things are there, eight times. The last one asks for everything;
    before others, its answer would be theirs.
    """
    scene = _scene_of(rng, split, pick(rng, (1, 2)))
    suitable = [ask for ask, groups in QUESTIONS.items() if len(groups_of(scene.things)) in groups]
    suitable.remove(ask_description)
    suitable += 8 * [ask_which] + 2 * [ask for ask in suitable if ask in (ask_existence, ask_relation, ask_count)]
    if ask_relation in suitable:
        suitable += [ask_side, ask_side]
    found: dict[str, str] = {}
    while len(found) < count - 1:
        if (question := pick(rng, suitable)(rng, scene)) is not None:
            found.setdefault(*question)
    return scene, [*found.items(), ask_description(rng, scene)]


def make_readings(rng: np.random.Generator, split: str, count: int) -> tuple[str | None, list[Question]]:
    """Texts to be understood without a picture: what comes first, if anything, then texts with what follows from them.

    A third each: a caption, and the description of the picture it is of; the description of a picture, an instruction,
    and the description after that edit; a description, and ``count`` different questions about the picture.
    """
    kind = pick(rng, ("caption", "edit", "questions"))
    if kind == "caption":
        example = _generate(rng, split)
        said = describe(example.after)
        if example.claims.background is None:  # nobody knows it
            said = said.removesuffix(f" on {example.after.background}")
        return None, [(example.text, said)]
    if kind == "edit":
        example = _edit(rng, split)
        return describe(example.before), [(example.text, describe(example.after))]
    scene, questions = make_questions(rng, split, count + 1)
    return describe(scene), questions[:-1]


def texts(rng: np.random.Generator, n: int) -> Iterator[str]:
    """``n`` texts of the training split for learning a tokenizer: captions, instructions, questions and answers."""
    waiting: list[str] = []
    for _ in range(n):
        if not waiting:
            example = make_example(rng, None, "train")
            waiting = [example.text] if example.answer is None else [example.text, example.answer]
        yield waiting.pop(0)
