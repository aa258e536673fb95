"""Rendering of scenes to images."""

import math

from PIL import Image, ImageDraw

from bagel_rt.tiny.scene import BACKGROUNDS, COLORS, SIZES, Scene
from bagel_rt.validation import check, integer

_SUPERSAMPLING = 4


def _star() -> list[tuple[float, float]]:
    """Ten corners, point up, the inner ones at half the outer radius."""
    return [
        (radius * math.sin(math.pi * index / 5), -radius * math.cos(math.pi * index / 5))
        for index, radius in enumerate((1.0, 0.5) * 5)
    ]


def _circle() -> list[tuple[float, float]]:
    return [(math.cos(math.pi * index / 60), math.sin(math.pi * index / 60)) for index in range(120)]


def _centered(points: list[tuple[float, float]], half_width: float) -> tuple[tuple[float, float], ...]:
    """Scale and shift an outline so that its bounding box is centerd at the origin, 2 * ``half_width`` wide."""
    columns, rows = zip(*points, strict=True)
    x, y = (min(columns) + max(columns)) / 2, (min(rows) + max(rows)) / 2
    scale = 2 * half_width / (max(columns) - min(columns))
    return tuple(((column - x) * scale, (row - y) * scale) for column, row in points)


# Corners in units of the radius. The half widths are chosen to make the shapes look equally large.
OUTLINES = {
    "circle": _centered(_circle(), 1.0),
    "square": _centered([(-1, -1), (1, -1), (1, 1), (-1, 1)], 0.88),
    "triangle": _centered([(0, -math.sqrt(3)), (1, 0), (-1, 0)], 1.15),
    "star": _centered(_star(), 1.15),
}


def render(scene: Scene, side: int = 128) -> Image.Image:
    """Draw a scene as an antialiased RGB image of side x side pixels. Deterministic.

    Raises:
        ValueError: ``side`` is below 1.
    """
    check("side", side, integer(1))
    canvas_side = side * _SUPERSAMPLING
    canvas = Image.new("RGB", (canvas_side, canvas_side), BACKGROUNDS[scene.background])
    draw = ImageDraw.Draw(canvas)
    for thing in scene.things:
        radius = SIZES[thing.size]
        # Pillow puts pixel centers at integers; scenes put them at half-integers.
        corners = [
            ((thing.x + radius * x) * canvas_side - 0.5, (thing.y + radius * y) * canvas_side - 0.5)
            for x, y in OUTLINES[thing.shape]
        ]
        draw.polygon(corners, fill=COLORS[thing.color])
    return canvas.reduce(_SUPERSAMPLING)
