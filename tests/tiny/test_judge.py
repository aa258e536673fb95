"""The judge accepts images and answers that match the text, and rejects all others."""

from dataclasses import replace

import numpy as np
import pytest
from degradations import degradations

from bagel_rt.tiny.claims import Claims, GroupClaim
from bagel_rt.tiny.examples import make_example
from bagel_rt.tiny.judge import judge, judge_answer
from bagel_rt.tiny.render import render
from bagel_rt.tiny.scene import BACKGROUNDS, Scene, Thing, groups_of, relation_between

RED = Thing("circle", "red", "large", 0.26, 0.3)
OTHER_RED = Thing("circle", "red", "large", 0.26, 0.72)
BLUE = Thing("square", "blue", "small", 0.74, 0.5)
SCENE = Scene("white", (RED, OTHER_RED, BLUE))
CLAIMS = Claims((GroupClaim(2, "circle", "red", "large"), GroupClaim(1, "square", "blue")), "left of", "white")


@pytest.mark.parametrize("task", ["generate", "edit"])
@degradations
def test_accepts_correct_images(task, degrade):
    rng = np.random.default_rng(4)
    examples = [make_example(rng, task, "train") for _ in range(300)]
    verdicts = [judge(example.claims, degrade(render(example.after), rng)) for example in examples]
    assert sum(verdict.correct for verdict in verdicts) >= 297
    assert all(verdict.correct == (not verdict.failures) for verdict in verdicts)


def test_rejects_unedited_images():
    rng = np.random.default_rng(5)
    for _ in range(300):
        example = make_example(rng, "edit", "train")
        assert not judge(example.claims, render(example.before)).correct, example


def true_of(claims, scene):
    """Whether claims are true of a scene, computed from the scene itself."""
    groups = {(group[0].shape, group[0].color): group for group in groups_of(scene.things)}
    if {(claim.shape, claim.color) for claim in claims.groups} != set(groups):
        return False
    ordered = [groups[claim.shape, claim.color] for claim in claims.groups]
    return (
        all(claim.count == len(group) for claim, group in zip(claims.groups, ordered, strict=True))
        and all(claim.size in (None, group[0].size) for claim, group in zip(claims.groups, ordered, strict=True))
        and claims.background in (None, scene.background)
        and claims.relation in (None, relation_between(*ordered[:2]) if len(ordered) == 2 else None)
    )


def test_verdict_on_edited_scenes_matches_the_claims():
    """An edited scene satisfies a caption of the original scene only if the caption does not mention the change."""
    rng = np.random.default_rng(6)
    verdicts = {True: 0, False: 0}
    while min(verdicts.values()) < 40:
        edit = make_example(rng, "edit", "train")
        if edit.text.startswith(("move", "put the")):
            continue  # places are tested on their own
        claims = claims_of(rng, edit.before)
        expected = true_of(claims, edit.after)
        assert judge(claims, render(edit.after)).correct == expected, (claims, edit)
        verdicts[expected] += 1


def claims_of(rng, scene):
    """The claims of a caption, without the place."""
    groups = tuple(
        GroupClaim(len(group), group[0].shape, group[0].color, group[0].size if rng.random() < 0.4 else None)
        for group in groups_of(scene.things)
    )
    relation = relation_between(*groups_of(scene.things)) if len(groups) == 2 else None
    return Claims(groups, relation, scene.background if rng.random() < 0.4 else None)


@pytest.mark.parametrize(
    ("things", "background", "failure"),
    [
        pytest.param((RED, BLUE), "white", "expected 2 red circles, found 1", id="missing thing"),
        pytest.param((RED, OTHER_RED), "white", "expected 1 blue square, found 0", id="missing group"),
        pytest.param((), "white", "expected 2 red circles, found 0", id="empty image"),
        pytest.param(
            (RED, OTHER_RED, replace(BLUE, color="green")),
            "white",
            "unexpected small green square",
            id="color",
        ),
        pytest.param((RED, OTHER_RED, replace(BLUE, shape="star")), "white", "unexpected small blue star", id="shape"),
        pytest.param(
            (RED, replace(OTHER_RED, size="small"), BLUE),
            "white",
            "expected large red circles, found a small",
            id="size",
        ),
        pytest.param((RED, OTHER_RED, BLUE), "beige", "expected a white background, found beige", id="background"),
        pytest.param(
            tuple(replace(thing, x=1 - thing.x) for thing in SCENE.things),
            "white",
            "expected the first left of the second, found right of",
            id="relation",
        ),
        pytest.param(
            (*SCENE.things, Thing("star", "pink", "small", 0.75, 0.85)),
            "white",
            "unexpected small pink star",
            id="extra thing",
        ),
        pytest.param(
            (*SCENE.things, replace(BLUE, y=0.8)), "white", "expected 1 blue square, found 2", id="extra square"
        ),
    ],
)
def test_rejects_image_that_differs_in(things, background, failure):
    verdict = judge(CLAIMS, render(Scene(background, things)))
    assert not verdict.correct
    assert any(failure in actual for actual in verdict.failures), verdict.failures


@pytest.mark.parametrize(
    ("claims", "scene"),
    [
        pytest.param(replace(CLAIMS, background=None), replace(SCENE, background="black"), id="background"),
        pytest.param(CLAIMS, replace(SCENE, things=(RED, OTHER_RED, replace(BLUE, size="large"))), id="size"),
        pytest.param(CLAIMS, replace(SCENE, things=(RED, OTHER_RED, replace(BLUE, y=0.3))), id="height"),
    ],
)
def test_ignores_unclaimed(claims, scene):
    assert judge(claims, render(scene)).correct


@pytest.mark.parametrize(
    ("place", "x", "y", "right"),
    [
        ("left", 0.25, 0.5, True),
        ("left", 0.25, 0.8, True),  # "on the left" does not constrain y
        ("left", 0.5, 0.5, False),
        ("top left", 0.25, 0.25, True),
        ("top left", 0.25, 0.5, False),
        ("bottom", 0.5, 0.75, True),
        ("bottom", 0.5, 0.25, False),
        ("center", 0.55, 0.45, True),
        ("center", 0.25, 0.5, False),
    ],
)
def test_judges_place(place, x, y, right):
    claims = Claims((GroupClaim(1, "star", "pink", place=place),))
    assert judge(claims, render(Scene("grey", (Thing("star", "pink", "small", x, y),)))).correct == right


@pytest.mark.parametrize(
    ("after", "right"),
    [
        pytest.param((RED, OTHER_RED, replace(BLUE, color="green")), True, id="nothing else changed"),
        pytest.param((replace(RED, x=0.31), OTHER_RED, replace(BLUE, color="green")), True, id="one shifted slightly"),
        pytest.param((replace(RED, x=0.37), OTHER_RED, replace(BLUE, color="green")), False, id="one moved"),
        pytest.param((RED, OTHER_RED, replace(BLUE, color="green", y=0.65)), False, id="the changed one moved"),
        pytest.param((RED, OTHER_RED, replace(BLUE, color="green", size="large")), False, id="size changed too"),
        pytest.param((RED, replace(OTHER_RED, size="small"), replace(BLUE, color="green")), False, id="another shrunk"),
        pytest.param(
            (replace(RED, color="pink"), OTHER_RED, replace(BLUE, color="green")), False, id="another recolored"
        ),
        pytest.param(SCENE.things, False, id="nothing changed"),
    ],
)
def test_edit_must_keep_everything_else(after, right):
    claims = Claims(
        (
            GroupClaim(2, "circle", "red", "large", at=((RED.x, RED.y), (OTHER_RED.x, OTHER_RED.y))),
            GroupClaim(1, "square", "green", "small", at=((BLUE.x, BLUE.y),)),
        ),
        background="white",
    )
    assert judge(claims, render(Scene("white", after))).correct == right


def test_edit_must_keep_the_background():
    rng = np.random.default_rng(8)
    example = make_example(rng, "edit", "train")
    other = next(name for name in BACKGROUNDS if name != example.after.background)
    (failure,) = judge(example.claims, render(replace(example.after, background=other))).failures
    assert failure == f"expected a {example.after.background} background, found {other}"


@pytest.mark.parametrize("text", ["two blue stars", " Two  blue stars. ", "TWO BLUE STARS\n"])
def test_answer_ignores_case_and_whitespace(text):
    assert judge_answer("two blue stars", text)


@pytest.mark.parametrize("text", ["", "blue stars", "two blue star", "two blue stars two", "yes"])
def test_answer_must_match_in_words(text):
    assert not judge_answer("two blue stars", text)
