"""What is seen in a picture: all that was drawn, and of other things that they are none of the world's."""

import numpy as np
import pytest
from pictures import spoilt
from PIL import Image

from bagel_rt.tiny.render import render
from bagel_rt.tiny.scene import BACKGROUNDS, COLORS, SHAPES, SIZES, Scene, Thing, draw_scene, split_of
from bagel_rt.tiny.sight import see

SCENE = Scene(
    "white",
    (
        Thing("circle", "red", "large", 0.26, 0.3),
        Thing("circle", "red", "large", 0.26, 0.72),
        Thing("square", "blue", "small", 0.74, 0.5),
    ),
)


def agrees(seen, scene):
    """Whether exactly the scene's things were seen, each within a fiftieth of the side."""
    if seen.background != scene.background or len(seen.things) != len(scene.things):
        return False
    for thing in scene.things:
        near = [one for one in seen.things if max(abs(one.x - thing.x), abs(one.y - thing.y)) < 0.02]
        if [(one.shape, one.color, one.size) for one in near] != [(thing.shape, thing.color, thing.size)]:
            return False
    return True


@pytest.mark.slow
@spoilt
def test_sees_at_least_99_percent_of_2000_test_scenes(spoil):
    rng = np.random.default_rng(2)
    scenes = []
    while len(scenes) < 2000:
        if split_of(scene := draw_scene(rng)) == "test":
            scenes.append(scene)
    right = sum(agrees(see(spoil(render(scene), rng)), scene) for scene in scenes)
    assert right >= 1980


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("background", BACKGROUNDS)
def test_sees_every_shape_and_size_in_every_colour_on_every_background(background, color):
    for shape in SHAPES:
        for size in SIZES:
            scene = Scene(background, (Thing(shape, color, size, 0.4, 0.55),))
            assert agrees(see(render(scene)), scene)


@pytest.mark.parametrize("side", [64, 100, 256])
def test_sees_pictures_of_other_sizes(side):
    assert agrees(see(render(SCENE, side)), SCENE)


def test_boxes_are_around_the_things():
    (box,) = [thing.box for thing in see(render(SCENE)).things if thing.shape == "square"]
    half = 0.88 * SIZES["small"]
    np.testing.assert_allclose(box, [0.74 - half, 0.5 - half, 0.74 + half, 0.5 + half], atol=0.02)


def painted(background, *boxes):
    """A picture with rectangles (color, left, top, right, bottom), in pixels."""
    image = Image.new("RGB", (128, 128), background)
    for color, *box in boxes:
        image.paste(color, tuple(box))
    return image


def test_things_that_touch_are_seen_apart_if_their_colours_differ():
    seen = see(painted((255, 255, 255), (COLORS["red"], 30, 40, 54, 64), (COLORS["blue"], 54, 40, 78, 64)))
    assert [(thing.shape, thing.color) for thing in seen.things] == [("square", "red"), ("square", "blue")]


@pytest.mark.parametrize(
    ("picture", "shape", "color", "size"),
    [
        pytest.param(painted("white", (COLORS["red"], 20, 40, 100, 60)), None, "red", None, id="a long bar"),
        pytest.param(painted("white", ((90, 60, 40), 40, 40, 64, 64)), "square", None, "small", id="a brown square"),
        pytest.param(
            painted("white", (COLORS["red"], 40, 40, 70, 70)), "square", "red", None, id="neither small nor large"
        ),
        pytest.param(painted("white", (COLORS["red"], 40, 40, 52, 52)), "square", "red", None, id="too small"),
        pytest.param(painted("white", (COLORS["red"], 20, 20, 100, 100)), "square", "red", None, id="too large"),
    ],
)
def test_what_is_not_of_this_world_is_seen_as_such(picture, shape, color, size):
    (thing,) = see(picture).things
    assert (thing.shape, thing.color, thing.size) == (shape, color, size)


def test_a_background_that_is_not_of_this_world_has_no_name():
    assert see(Image.new("RGB", (128, 128), (90, 10, 10))).background is None
    assert see(Image.new("RGB", (128, 128), COLORS["red"])).background is None


@pytest.mark.parametrize(
    "color",
    [
        pytest.param((248, 212, 214), id="a fifth of red"),
        pytest.param((238, 175, 180), id="a third of red"),
        pytest.param(BACKGROUNDS["beige"], id="beige"),
    ],
)
def test_patches_of_the_background_are_things_too(color):
    (thing,) = see(painted("white", (color, 40, 40, 70, 70))).things
    assert thing.color is None
    np.testing.assert_allclose([thing.x, thing.y], 55 / 128, atol=0.02)


def test_specks_are_nothing_and_rough_noise_has_no_shapes():
    assert see(painted("white", (COLORS["red"], 40, 40, 45, 45))).things == ()
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    assert all(thing.shape is None for thing in see(Image.fromarray(noise)).things)


@pytest.mark.parametrize("mode", ["RGBA", "P", "L"])
def test_sees_pictures_of_other_modes(mode):
    assert len(see(render(SCENE).convert(mode)).things) == 3
