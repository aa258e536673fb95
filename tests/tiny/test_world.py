"""The embedded model's words, and the hint for prompts that leave its world."""

import re

import numpy as np
import pytest

from bagel_rt.tiny.examples import make_questions, texts
from bagel_rt.tiny.world import WORDS, prompt_hint


def test_words_are_those_of_the_training_texts():
    rng = np.random.default_rng(0)
    lines = [*texts(rng, 6000)]
    for _ in range(100):
        lines += [text for question in make_questions(rng, "train", 16)[1] for text in question]
    assert {word for line in lines for word in re.findall(r"\w+", line)} == WORDS


@pytest.mark.parametrize(
    "prompt",
    [
        "a large red star on black",
        "A Large Red Star.",
        "make the star blue, please!",
        "What color is the star?",
        "describe this",
        "two blue stars and a red circle",
    ],
)
def test_no_hint_for_prompts_about_colored_shapes(prompt):
    assert prompt_hint([prompt]) is None


@pytest.mark.parametrize(
    "prompts, named",
    [
        (["a red boat on a river"], ', not "boat", "river".'),
        (["a red star", "Eine Katze"], ', not "eine", "katze".'),
        (["one ox, two emus, three bees and four rats"], ', not "ox", "emus", "bees" and other words.'),
        (["x" * 99], f', not "{"x" * 20}…".'),
        (["你好"], ', not "你好".'),
        (["Who are you?"], ', not "who".'),
        (["🦊"], ' on black".'),
        (["could you please"], ' on black".'),
    ],
)
def test_hint_names_the_words_outside_the_world(prompts, named):
    hint = prompt_hint(prompts)
    assert hint.startswith("The demo model only knows colored shapes") and hint.endswith(named)
    assert "\n" not in hint
