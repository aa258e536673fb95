"""Scenes: generation, train/test split and rendering."""

from collections import Counter

import numpy as np
import pytest

from bagel_rt.tiny.examples import make_example
from bagel_rt.tiny.render import OUTLINES, render
from bagel_rt.tiny.scene import (
    BACKGROUNDS,
    CELLS,
    COLORS,
    GRID,
    PLACES,
    REACH,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    combination,
    draw_scene,
    fits,
    groups_of,
    place_of,
    relation_between,
    split_of,
)

RED_CIRCLE = Thing("circle", "red", "small", 0.25, 0.5)
BLUE_STAR = Thing("star", "blue", "large", 0.7, 0.55)


@pytest.fixture(scope="module")
def scenes():
    rng = np.random.default_rng(0)
    return [draw_scene(rng) for _ in range(4000)]


def test_things_fit_and_do_not_overlap(scenes):
    assert all(fits(scene.things) for scene in scenes)


def test_group_counts(scenes):
    numbers = Counter(tuple(len(group) for group in groups_of(scene.things)) for scene in scenes)
    assert set(numbers) == {(1,), (2,), (3,), (1, 1), (1, 2), (2, 1), (2, 2), (1, 3), (3, 1)}
    assert min(numbers.values()) > 200


def test_two_groups_have_a_relation(scenes):
    relations = Counter(relation_between(*groups) for scene in scenes if len(groups := groups_of(scene.things)) == 2)
    assert set(relations) == {"above", "left of"}  # the order of generation; captions also use the opposite


def test_positions_are_determined_by_counts_sizes_and_place_or_relation(scenes):
    positions_by_key = {}
    for scene in scenes:
        groups = groups_of(scene.things)
        where = relation_between(*groups) if len(groups) == 2 else place_of(groups[0])
        key = where, *((len(group), group[0].size) for group in groups)
        positions = [(thing.x, thing.y) for thing in scene.things]
        assert positions_by_key.setdefault(key, positions) == positions
    assert len(positions_by_key) > 50


def test_every_value_of_every_attribute_occurs(scenes):
    things = [thing for scene in scenes for thing in scene.things]
    assert {thing.shape for thing in things} == set(SHAPES) == set(OUTLINES)
    assert {thing.color for thing in things} == set(COLORS)
    assert {thing.size for thing in things} == set(SIZES)
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)
    assert {place_of(scene.things) for scene in scenes if len(groups_of(scene.things)) == 1} == set(PLACES)


def test_scenes_are_deterministic():
    one, other = np.random.default_rng(7), np.random.default_rng(7)
    assert [draw_scene(one) for _ in range(20)] == [draw_scene(other) for _ in range(20)]


def test_a_tenth_of_the_combinations_is_in_the_test_split(scenes):
    splits = {combination(scene): split_of(scene) for scene in scenes}
    share = Counter(splits.values())["test"] / len(splits)
    assert 0.08 < share < 0.12


@pytest.mark.parametrize(
    ("things", "split"),
    [
        pytest.param((RED_CIRCLE,), "train", id="a red circle on the left"),
        pytest.param((RED_CIRCLE, BLUE_STAR), "train", id="a red circle left of a blue star"),
        pytest.param((Thing("star", "yellow", "small", 0.25, 0.5),), "test", id="a small yellow star on the left"),
        pytest.param((RED_CIRCLE, Thing("triangle", "blue", "small", 0.7, 0.5)), "test", id="one left of a triangle"),
    ],
)
def test_split_is_stable(things, split):
    """A model trained with one version must be evaluated with the same split in later versions."""
    assert split_of(Scene("white", things)) == split


def test_combination_ignores_the_order_of_groups():
    one, other = Scene("white", (RED_CIRCLE, BLUE_STAR)), Scene("white", (BLUE_STAR, RED_CIRCLE))
    assert combination(one) == combination(other) == (1, "red", "circle", "left of", 1, "blue", "star")


def test_combination_of_one_group_has_place_size_and_background():
    assert combination(Scene("white", (RED_CIRCLE,))) == (1, "red", "circle", "small", "white", "left")


@pytest.mark.parametrize(
    "things",
    [
        pytest.param((), id="no things"),
        pytest.param((RED_CIRCLE, Thing("star", "blue", "small", 0.3, 0.5)), id="two groups without a relation"),
        pytest.param((RED_CIRCLE, BLUE_STAR, Thing("star", "red", "small", 0.5, 0.1)), id="three groups"),
    ],
)
def test_combination_rejects_invalid_scene(things):
    with pytest.raises(ValueError, match="scene.things must be one group, or two groups"):
        combination(Scene("white", things))


def test_draw_scene_rejects_three_groups():
    with pytest.raises(ValueError, match="groups must be 1 or 2, got 3"):
        draw_scene(np.random.default_rng(0), 3)


@pytest.mark.parametrize(
    ("x", "y", "relation"),
    [
        (0.5, 0.9, "above"),
        (0.5, 0.1, "below"),
        (0.9, 0.5, "left of"),
        (0.1, 0.5, "right of"),
        (0.8, 0.7, "left of"),
        (0.55, 0.5, None),
    ],
)
def test_relation_uses_the_longer_axis(x, y, relation):
    assert (
        relation_between([Thing("circle", "red", "small", 0.5, 0.5)], [Thing("star", "red", "small", x, y)]) == relation
    )


def test_outlines_are_centered_and_within_reach():
    for outline in OUTLINES.values():
        corners = np.array(outline)
        np.testing.assert_allclose(corners.min(0), -corners.max(0), atol=1e-9)
        assert 0.85 < corners.max() <= REACH + 1e-9


def test_render_draws_colors_at_positions():
    image = np.asarray(render(Scene("beige", (RED_CIRCLE, BLUE_STAR))))
    assert image.shape == (128, 128, 3) and image.dtype == np.uint8
    assert tuple(image[64, 32]) == COLORS["red"]
    assert tuple(image[70, 90]) == COLORS["blue"]
    assert tuple(image[2, 2]) == BACKGROUNDS["beige"]


@pytest.mark.parametrize("shape", SHAPES)
def test_rendered_thing_has_the_area_and_box_of_its_outline(shape):
    image = np.asarray(render(Scene("black", (Thing(shape, "yellow", "large", 0.41, 0.57),))), dtype=float)
    black, yellow = np.array(BACKGROUNDS["black"]), np.array(COLORS["yellow"])
    covered = ((image - black) @ (yellow - black) / np.sum((yellow - black) ** 2)).clip(0, 1)
    corners = np.array(OUTLINES[shape]) * SIZES["large"] * 128
    x, y = corners[:, 0], corners[:, 1]
    area = abs(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y)) / 2
    assert covered.sum() == pytest.approx(area, rel=0.06)  # Pillow grows polygons by half a canvas pixel
    rows, columns = np.nonzero(covered > 0.3)
    box = [(columns.min() + columns.max() + 1) / 2, (rows.min() + rows.max() + 1) / 2]
    np.testing.assert_allclose(box, [0.41 * 128, 0.57 * 128], atol=0.8)


@pytest.mark.parametrize("side", [1, 64, 200])
def test_render_is_deterministic_at_any_size(side):
    scene = Scene("grey", (RED_CIRCLE,))
    assert render(scene, side).size == (side, side)
    assert render(scene, side).tobytes() == render(scene, side).tobytes()


def test_render_rejects_side_zero():
    with pytest.raises(ValueError, match="side must be an integer >= 1, got 0"):
        render(Scene("grey", (RED_CIRCLE,)), 0)


def test_things_are_aligned_to_cells_before_and_after_edits():
    rng = np.random.default_rng(4)
    examples = [make_example(rng, "edit", "train") for _ in range(400)]
    for thing in (thing for e in examples for scene in (e.before, e.after) for thing in scene.things):
        for at in (thing.x, thing.y):
            first = at * GRID - CELLS[thing.size] / 2
            assert first == round(first) and 0 <= first <= GRID - CELLS[thing.size], thing
