"""Scenes as pictures."""

import math

from PIL import Image, ImageDraw

from bagel_rt.tiny.scene import BACKGROUNDS, COLORS, SIZES, Scene

_SUPERSAMPLING = 4


def _star() -> list[tuple[float, float]]:
    """Ten corners, point up, the inner ones at half the outer radius."""
    return [
        (radius * math.sin(math.pi * index / 5), -radius * math.cos(math.pi * index / 5))
        for index, radius in enumerate((1.0, 0.5) * 5)
    ]


def _circle() -> list[tuple[float, float]]:
    return [(math.cos(math.pi * index / 60), math.sin(math.pi * index / 60)) for index in range(120)]


def _centred(points: list[tuple[float, float]], half_width: float) -> tuple[tuple[float, float], ...]:
    """The outline with its bounding box around the origin and ``half_width`` wide to each side."""
    columns, rows = zip(*points, strict=True)
    x, y = (min(columns) + max(columns)) / 2, (min(rows) + max(rows)) / 2
    scale = 2 * half_width / (max(columns) - min(columns))
    return tuple(((column - x) * scale, (row - y) * scale) for column, row in points)


# Corners in units of the radius. The widths make the shapes look equally large.
OUTLINES = {
    "circle": _centred(_circle(), 1.0),
    "square": _centred([(-1, -1), (1, -1), (1, 1), (-1, 1)], 0.88),
    "triangle": _centred([(0, -math.sqrt(3)), (1, 0), (-1, 0)], 1.15),
    "star": _centred(_star(), 1.15),
}


def render(scene: Scene, side: int = 128) -> Image.Image:
    """The picture of a scene, RGB, side x side pixels, antialiased; the same bytes whenever it is called.

    Raises:
        ValueError: ``side`` is less than one pixel.
    """
    if side < 1:
        raise ValueError(f"render: side={side}, expected at least 1 pixel")
    fine = side * _SUPERSAMPLING
    canvas = Image.new("RGB", (fine, fine), BACKGROUNDS[scene.background])
    draw = ImageDraw.Draw(canvas)
    for thing in scene.things:
        radius = SIZES[thing.size]
        # Pillow's pixel centres are at whole numbers, ours at halves.
        corners = [
            ((thing.x + radius * x) * fine - 0.5, (thing.y + radius * y) * fine - 0.5) for x, y in OUTLINES[thing.shape]
        ]
        draw.polygon(corners, fill=COLORS[thing.color])
    return canvas.reduce(_SUPERSAMPLING)
