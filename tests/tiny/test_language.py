"""Captions, questions and instructions are short, correct and unambiguous. The tests parse them word by word."""

import re
from collections import Counter

import numpy as np
import pytest

from bagel_rt.tiny.claims import is_at
from bagel_rt.tiny.examples import SPLITS, TASKS, make_example, make_questions, make_text_task, texts
from bagel_rt.tiny.scene import (
    BACKGROUNDS,
    COLORS,
    PLACES,
    SHAPES,
    Scene,
    Thing,
    fits,
    groups_of,
    pick,
    place_of,
    relation_between,
    split_of,
)

NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3}
SIZES = {"small": "small", "little": "small", "large": "large", "big": "large"}
RELATIONS = {
    "above": "above",
    "over": "above",
    "below": "below",
    "under": "below",
    "left of": "left of",
    "right of": "right of",
}


@pytest.fixture(scope="module", params=SPLITS)
def split(request):
    return request.param


@pytest.fixture(scope="module")
def examples(split):
    rng = np.random.default_rng(3)
    return {task: [make_example(rng, task, split) for _ in range(500)] for task in TASKS}


def parse(phrase):
    """(number, size, color, shape) of a noun phrase; None for what it does not mention."""
    words = phrase.split()
    number = next((NUMBERS[word] for word in words if word in NUMBERS), None)
    size = next((SIZES[word] for word in words if word in SIZES), None)
    color = next((word for word in words if word in COLORS), None)
    shape = next((word.removesuffix("s") for word in words if word.removesuffix("s") in SHAPES), None)
    return number, size, color, shape


def matches(thing, color, shape):
    return color in (None, thing.color) and shape in (None, thing.shape)


def the_group(scene, phrase):
    """The group that a definite noun phrase refers to; fails if it is ambiguous or its number is wrong."""
    _, _, color, shape = parse(phrase)
    (group,) = [group for group in groups_of(scene.things) if matches(group[0], color, shape)]
    is_plural = phrase.split()[-1].endswith("s")
    assert is_plural == (len(group) > 1), phrase
    return group


def relation_in(text):
    """(before, relation, after) of a text with one of the relation words."""
    text = text.replace("to the left of", "left of").replace("to the right of", "right of")
    words = next(words for words in RELATIONS if f" {words} " in text)
    before, after = text.split(f" {words} ")
    return before, RELATIONS[words], after


def test_all_scenes_belong_to_the_split(examples, split):
    scenes = [scene for kind in examples.values() for one in kind for scene in (one.before, one.after) if scene]
    assert len(scenes) == 2000
    assert {split_of(scene) for scene in scenes} == {split}
    assert all(fits(scene.things) for scene in scenes)


def test_texts_are_short_lower_case_words(examples):
    for example in (one for kind in examples.values() for one in kind):
        words = example.text.split(" ")
        assert len(words) <= 16 and all(word.isalpha() and word.islower() for word in words), example.text
        assert not any(
            word in ("a", "an") and (word == "an") != (after[0] in "aeiou")
            for word, after in zip(words, words[1:], strict=False)
        )


def test_the_vocabulary_is_small():
    words = {word for text in texts(np.random.default_rng(0), 8000) for word in text.split()}
    assert 80 < len(words) <= 150


def test_captions_mention_all_claims(examples):
    for example in examples["generate"]:
        groups = example.claims.groups
        phrases = [example.text]
        if len(groups) == 2:
            before, relation, after = relation_in(example.text)
            if " with " in before and not before.startswith(tuple(f"a {name} background" for name in BACKGROUNDS)):
                phrases = before.split(" with ")
                relation = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}[relation]
            else:
                phrases = [before, after]
            assert relation == example.claims.relation, example.text
        for phrase, claim in zip(phrases, groups, strict=True):
            for name in BACKGROUNDS:
                phrase = phrase.replace(f"a {name} background", "")
            phrase = phrase.replace("a picture", "").replace("an image", "")
            assert parse(phrase) == (claim.count, claim.size, claim.color, claim.shape), example.text
        mentioned = [name for name in BACKGROUNDS if name in example.text.split()]
        assert mentioned == ([] if example.claims.background is None else [example.claims.background])


def test_captions_are_true(examples):
    for example in examples["generate"]:
        groups = {(group[0].color, group[0].shape): group for group in groups_of(example.after.things)}
        claimed = [groups.pop((claim.color, claim.shape)) for claim in example.claims.groups]
        assert not groups
        for claim, group in zip(example.claims.groups, claimed, strict=True):
            assert len(group) == claim.count and claim.size in (None, group[0].size)
            assert claim.place in (None, place_of(group)) and claim.at is None
        assert example.claims.background in (None, example.after.background)
        assert len(claimed) == 1 or relation_between(*claimed) == example.claims.relation


def test_optional_attributes_are_sometimes_omitted(examples):
    claims = [example.claims for example in examples["generate"]]
    singles = [claim.groups[0] for claim in claims if len(claim.groups) == 1]
    for values in (
        [claim.background for claim in claims],
        [group.size for claim in claims for group in claim.groups],
        [group.place for group in singles],
    ):
        assert 0.1 < Counter(values)[None] / len(values) < 0.8


def test_omitted_attributes_have_default_values(examples):
    for example in examples["generate"]:
        groups = groups_of(example.after.things)
        for claim in example.claims.groups:
            (group,) = [group for group in groups if (group[0].color, group[0].shape) == (claim.color, claim.shape)]
            assert claim.size or group[0].size == ("small" if len(group) == 3 else "large")
            assert claim.place or len(groups) == 2 or place_of(group) == "center"


def answer_to(question, scene):
    """The answer to a question, derived from its words only."""
    words = question.split()
    if "picture" in words:
        return described(scene)
    if "background" in words:
        return scene.background
    if words[1] == "color":
        _, _, _, shape = parse(question)
        (color,) = {thing.color for thing in scene.things if thing.shape == shape}
        return color
    if words[1] == "shape":
        _, _, color, _ = parse(question)
        (shape,) = {thing.shape for thing in scene.things if thing.color == color}
        return shape
    if words[1] == "there" and "or" in words:
        names = question.removeprefix("are there ").replace(" or ", ", ").split(", ")
        return ", ".join(f"{name} {answer_to(f'are there any {name}', scene)}" for name in names)
    if sides := re.search(" (above or below|below or above|left or right of|right or left of) ", question):
        first, second = (the_group(scene, who) for who in question.split(sides[0]))
        assert relation_between(first, second).split()[0] in sides[0].split()
        return relation_between(first, second).split()[0]
    if words[1] == "size" or "or" in words:
        return the_group(scene, question.removesuffix(" small or large"))[0].size
    if words[:2] == ["how", "many"] or {"there", "any"} & set(words):
        _, _, color, shape = parse(question)
        number = sum(matches(thing, color, shape) for thing in scene.things)
        return ("zero", "one", "two", "three", "four")[number] if words[0] == "how" else "yes" if number else "no"
    if words[0] == "where":
        return place_of(the_group(scene, question))
    before, relation, after = relation_in(question)
    whom = the_group(scene, after)
    (other,) = [group for group in groups_of(scene.things) if group != whom]
    holds = relation_between(other, whom) == relation
    if words[0] in ("is", "are"):
        assert the_group(scene, before) == other
        return "yes" if holds else "no"
    if not holds:
        return "nothing"
    return named(other, other[0].color)


def named(group, adjectives):
    number = ("an" if adjectives.startswith("orange") else "a", "two", "three")[len(group) - 1]
    return f"{number} {adjectives} {group[0].shape}{'s' if len(group) > 1 else ''}"


def described(scene):
    """The full description, upper or left group first."""
    groups = sorted(groups_of(scene.things), key=lambda group: min((thing.y, thing.x) for thing in group))
    if len(groups) == 2 and relation_between(*groups) == "right of":
        groups.reverse()
    names = [named(group, f"{group[0].size} {group[0].color}") for group in groups]
    if len(groups) == 2:
        return f"{names[0]} {relation_between(*groups)} {names[1]} on {scene.background}"
    place = place_of(groups[0])
    where = {"center": "in the center", "left": "on the left", "right": "on the right"}
    where |= {"top": "at the top", "bottom": "at the bottom"}
    return f"{names[0]} {where.get(place, f'in the {place}')} on {scene.background}"


def test_answers_are_correct(examples):
    for example in examples["ask"]:
        assert answer_to(example.text, example.before) == example.answer, example


def test_yes_and_no_are_balanced(examples):
    answers = Counter(example.answer for example in examples["ask"])
    assert answers["yes"] + answers["no"] > 60
    assert 0.3 < answers["yes"] / (answers["yes"] + answers["no"]) < 0.7


def test_yes_and_no_are_balanced_for_each_form_of_question():
    """Of questions with a color, a shape or both, half have the answer yes."""
    rng, answers, counts = np.random.default_rng(3), Counter(), Counter()
    while sum(counts.values()) < 1200:
        example = make_example(rng, "ask", "train")
        if {"there", "how"} & set(example.text.split()) == {"there"}:
            _, _, color, shape = parse(example.text)
            form = (color is None, shape is None)
            counts[form] += 1
            answers[form] += example.answer == "yes"
    assert len(counts) == 3
    assert all(0.42 < answers[form] / counts[form] < 0.58 for form in counts), (answers, counts)


def things_after(text, before):
    """The (color, shape, size) of all things after an instruction, derived from its words only."""
    words = text.split()
    things = list(before.things)
    if "background" in words:
        (name,) = [word for word in words if word in BACKGROUNDS]
        return [(thing.color, thing.shape, thing.size) for thing in things], name
    if words[0] in ("add", "draw") or (words[0] == "put" and words[1] in NUMBERS):
        what, _, whom = relation_in(text)
        assert the_group(before, whom) == before.things
        _, size, color, shape = parse(what)
        return [(thing.color, thing.shape, thing.size) for thing in things] + [(color, shape, size)], before.background
    if words[0] in ("move", "put"):
        who = text.split(" to the ")[0].split(" in the ")[0].split(" at the ")[0]
        assert the_group(before, who) == before.things
        return [(thing.color, thing.shape, thing.size) for thing in things], before.background
    if words[0] in ("remove", "delete", "take"):
        gone = the_group(before, text)
        return [(thing.color, thing.shape, thing.size) for thing in things if thing not in gone], before.background
    who = text.split("the color of ")[-1].split("the ")[-1].split()
    last = next(index for index, word in enumerate(who) if word.removesuffix("s") in (*SHAPES, "thing"))
    group, rest = the_group(before, " ".join(who[: last + 1])), who[last + 1 :]
    _, _, color, shape = parse(" ".join(rest))
    size = {
        "small": "small",
        "smaller": "small",
        "big": "large",
        "bigger": "large",
        "large": "large",
        "larger": "large",
    }
    new_size = size.get(rest[-1])
    assert sum(value is not None for value in (color, shape, new_size)) == 1, text
    changed = [(color or thing.color, shape or thing.shape, new_size or thing.size) for thing in group]
    return changed + [
        (thing.color, thing.shape, thing.size) for thing in things if thing not in group
    ], before.background


def test_scene_after_edit_matches_the_instruction(examples):
    for example in examples["edit"]:
        kinds, background = things_after(example.text, example.before)
        actual = Counter((thing.color, thing.shape, thing.size) for thing in example.after.things)
        expected = Counter(
            next(other for other in actual if other[:2] == kind[:2]) if kind[2] is None else kind for kind in kinds
        )
        assert actual == expected, example
        assert example.after.background == background == example.claims.background
        assert example.after != example.before


def test_edits_keep_other_things_in_place(examples):
    for example in examples["edit"]:
        kept = set(example.before.things) & set(example.after.things)
        assert kept or len(groups_of(example.before.things)) == 1
        for group, claim in zip(groups_of(example.after.things), sorted_claims(example), strict=True):
            moves = example.text.startswith(("move", "put the"))
            added = group[0] not in example.before.things and len(example.after.things) > len(example.before.things)
            assert (claim.at is None) == (moves or added), example.text
            assert claim.at is None or claim.at == tuple((thing.x, thing.y) for thing in group)


def sorted_claims(example):
    """The claims in the order of the groups of the scene."""
    order = [(group[0].color, group[0].shape) for group in groups_of(example.after.things)]
    return sorted(example.claims.groups, key=lambda claim: order.index((claim.color, claim.shape)))


def test_every_kind_of_edit_occurs(examples):
    kinds = Counter(example.text.split()[0] for example in examples["edit"])
    assert set(kinds) == set("make paint change turn remove delete take add put draw use move".split())


def test_examples_are_deterministic():
    one, other = np.random.default_rng(5), np.random.default_rng(5)
    assert [make_example(one, None, "train") for _ in range(30)] == [
        make_example(other, None, "train") for _ in range(30)
    ]
    assert list(texts(one, 50)) == list(texts(other, 50))


def test_questions_about_a_scene_are_distinct_and_correct():
    rng, kinds, each = np.random.default_rng(0), Counter(), Counter()
    for _ in range(300):
        scene, questions = make_questions(rng, "train", 6)
        assert split_of(scene) == "train" and len({text for text, _ in questions}) == 6
        answers = [answer for _, answer in questions]
        assert answers[-1] == described(scene) and described(scene) not in answers[:-1]
        assert all(answer == answer_to(text, scene) for text, answer in questions)
        kinds.update((len(groups_of(scene.things)), text.split()[0]) for text, _ in questions)
        each.update(word for _, answer in questions if "," in answer for word in re.findall("yes|no", answer))
        each.update(answer for _, answer in questions if answer in ("above", "below", "left", "right"))
    assert kinds[1, "where"] > 30 and kinds[2, "where"] == 0  # a place is asked of a single group
    assert all(each[side] > 5 for side in ("above", "below", "left", "right"))
    assert each["yes"] + each["no"] > 300 and 0.4 < each["yes"] / (each["yes"] + each["no"]) < 0.6
    assert {words for groups, words in kinds if groups == 2} == {"what", "which", "how", "is", "are", "describe"}


def test_text_tasks_are_correct(split):
    """Compare with the same example, drawn again and described by the test."""
    kinds = Counter()
    for seed in range(300):
        context, turns = make_text_task(np.random.default_rng(seed), split, 6)
        again = np.random.default_rng(seed)
        kind = pick(again, ("caption", "edit", "questions"))
        kinds[kind] += 1
        if kind == "questions":
            scene, questions = make_questions(again, split, 7)
            assert context == described(scene) and turns == questions[:-1] and len(turns) == 6
            assert context not in [answer for _, answer in turns]
            continue
        example = make_example(again, "generate" if kind == "caption" else "edit", split)
        known = kind == "edit" or example.claims.background is not None
        description = described(example.after) if known else described(example.after).rsplit(" on ", 1)[0]
        assert turns == [(example.text, description)]
        assert context == (described(example.before) if kind == "edit" else None)
    assert all(70 < kinds[kind] < 130 for kind in ("caption", "edit", "questions"))


def test_texts_yields_n_texts():
    assert len(list(texts(np.random.default_rng(0), 17))) == 17
    assert list(texts(np.random.default_rng(0), 0)) == []


@pytest.mark.parametrize("place", PLACES)
def test_center_of_a_place_is_at_no_contradicting_place(place):
    column, row = PLACES[place]
    x, y = 0.25 + 0.25 * column, 0.25 + 0.25 * row
    there = {name for name in PLACES if is_at(name, x, y)}
    assert place in there
    sides = {*place.split(), place}  # the top left corner is also at the top and on the left
    assert there == sides
    assert place_of([Thing("star", "red", "small", x, y)]) == place


@pytest.mark.parametrize(
    ("task", "split", "message"),
    [
        ("paint", "train", "task must be generate, edit or ask, got 'paint'. None draws a random task."),
        ("edit", "validation", "split must be train or test, got 'validation'"),
    ],
)
def test_rejects_unknown_tasks_and_splits(task, split, message):
    with pytest.raises(ValueError, match=message):
        make_example(np.random.default_rng(0), task, split)


def test_scenes_are_compared_and_hashed_by_value():
    thing = Thing("star", "red", "small", 0.5, 0.5)
    assert Scene("white", (thing,)) == Scene("white", (Thing("star", "red", "small", 0.5, 0.5),))
    assert hash(Scene("white", (thing,))) == hash(Scene("white", (thing,)))
