"""The detector finds everything that was rendered, and reports unknown attributes as None."""

import numpy as np
import pytest
from degradations import degradations
from PIL import Image

from bagel_rt.tiny.detector import detect
from bagel_rt.tiny.render import render
from bagel_rt.tiny.scene import BACKGROUNDS, COLORS, SHAPES, SIZES, Scene, Thing, draw_scene, split_of

SCENE = Scene(
    "white",
    (
        Thing("circle", "red", "large", 0.26, 0.3),
        Thing("circle", "red", "large", 0.26, 0.72),
        Thing("square", "blue", "small", 0.74, 0.5),
    ),
)


def agrees(detected, scene):
    """Whether exactly the things of the scene were detected, each within 2% of the image side."""
    if detected.background != scene.background or len(detected.things) != len(scene.things):
        return False
    for thing in scene.things:
        near = [one for one in detected.things if max(abs(one.x - thing.x), abs(one.y - thing.y)) < 0.02]
        if [(one.shape, one.color, one.size) for one in near] != [(thing.shape, thing.color, thing.size)]:
            return False
    return True


@pytest.mark.slow
@degradations
def test_detects_99_percent_of_2000_test_scenes(degrade):
    rng = np.random.default_rng(2)
    scenes = []
    while len(scenes) < 2000:
        if split_of(scene := draw_scene(rng)) == "test":
            scenes.append(scene)
    right = sum(agrees(detect(degrade(render(scene), rng)), scene) for scene in scenes)
    assert right >= 1980


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize("background", BACKGROUNDS)
def test_detects_every_shape_and_size_in_every_color_on_every_background(background, color):
    for shape in SHAPES:
        for size in SIZES:
            scene = Scene(background, (Thing(shape, color, size, 0.4, 0.55),))
            assert agrees(detect(render(scene)), scene)


@pytest.mark.parametrize("side", [64, 100, 256])
def test_detects_in_images_of_other_sizes(side):
    assert agrees(detect(render(SCENE, side)), SCENE)


def test_boxes_enclose_things():
    (box,) = [thing.box for thing in detect(render(SCENE)).things if thing.shape == "square"]
    half = 0.88 * SIZES["small"]
    np.testing.assert_allclose(box, [0.74 - half, 0.5 - half, 0.74 + half, 0.5 + half], atol=0.02)


def painted(background, *boxes):
    """An image with rectangles (color, left, top, right, bottom), in pixels."""
    image = Image.new("RGB", (128, 128), background)
    for color, *box in boxes:
        image.paste(color, tuple(box))
    return image


def test_separates_touching_things_of_different_colors():
    detected = detect(painted((255, 255, 255), (COLORS["red"], 30, 40, 54, 64), (COLORS["blue"], 54, 40, 78, 64)))
    assert [(thing.shape, thing.color) for thing in detected.things] == [("square", "red"), ("square", "blue")]


@pytest.mark.parametrize(
    ("image", "shape", "color", "size"),
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
def test_unknown_attributes_are_none(image, shape, color, size):
    (thing,) = detect(image).things
    assert (thing.shape, thing.color, thing.size) == (shape, color, size)


def test_unknown_background_is_none():
    assert detect(Image.new("RGB", (128, 128), (90, 10, 10))).background is None
    assert detect(Image.new("RGB", (128, 128), COLORS["red"])).background is None


@pytest.mark.parametrize(
    "color",
    [
        pytest.param((248, 212, 214), id="a fifth of red"),
        pytest.param((238, 175, 180), id="a third of red"),
        pytest.param(BACKGROUNDS["beige"], id="beige"),
    ],
)
def test_detects_faint_patches_as_things_without_color(color):
    (thing,) = detect(painted("white", (color, 40, 40, 70, 70))).things
    assert thing.color is None
    np.testing.assert_allclose([thing.x, thing.y], 55 / 128, atol=0.02)


def test_ignores_specks_and_finds_no_shapes_in_noise():
    assert detect(painted("white", (COLORS["red"], 40, 40, 45, 45))).things == ()
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    assert all(thing.shape is None for thing in detect(Image.fromarray(noise)).things)


@pytest.mark.parametrize("mode", ["RGBA", "P", "L"])
def test_detects_in_images_of_other_modes(mode):
    assert len(detect(render(SCENE).convert(mode)).things) == 3
