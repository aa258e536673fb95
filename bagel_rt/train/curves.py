"""Loss curves as a picture."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

_WIDTH, _HEIGHT = 520, 260  # of a panel, pixels
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 32, 32
_POINTS = 200  # of a curve; a point is the mean of as many steps as it takes


def draw_curves(path: Path | str, curves: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    """Write a PNG of one panel for each curve, two beside each other; values on a logarithmic scale.

    Args:
        path: of the PNG.
        curves: title -> (step, positive value) in the order of steps; empty ones are left out.

    Raises:
        ValueError: a value is not positive and finite.
    """
    shown = {title: list(points) for title, points in curves.items() if points}
    for title, points in shown.items():
        for step, value in points:
            if not 0 < value < math.inf:
                raise ValueError(f"{title} is {value} at step {step}; a logarithmic scale has positive numbers only")
    columns = min(2, max(1, len(shown)))
    rows = -(-max(1, len(shown)) // columns)
    canvas = Image.new("RGB", (columns * _WIDTH, rows * _HEIGHT), "white")
    for number, (title, points) in enumerate(shown.items()):
        corner = (number % columns * _WIDTH, number // columns * _HEIGHT)
        canvas.paste(_panel(title, _means(points)), corner)
    canvas.save(path, format="PNG")


def _means(points: list[tuple[int, float]]) -> list[tuple[float, float]]:
    """At most _POINTS points, each the mean of neighbouring ones."""
    size = -(-len(points) // _POINTS)
    parts = [points[first : first + size] for first in range(0, len(points), size)]
    return [tuple(sum(numbers) / len(part) for numbers in zip(*part, strict=True)) for part in parts]


def _panel(title: str, points: list[tuple[float, float]]) -> Image.Image:
    panel = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
    draw, font = ImageDraw.Draw(panel), ImageFont.load_default()
    last = max(step for step, _ in points)
    logs = [math.log10(value) for _, value in points]
    low, high = min(logs), max(logs)
    low, high = low - 0.05 * (high - low) - 0.01, high + 0.05 * (high - low) + 0.01
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def place(step: float, log: float) -> tuple[float, float]:
        across = _LEFT + (right - _LEFT) * step / max(last, 1)
        return across, bottom - (bottom - _TOP) * (log - low) / (high - low)

    for log in _ticks(low, high):
        y = place(0, log)[1]
        draw.line([(_LEFT, y), (right, y)], fill=(225, 225, 225))
        draw.text((_LEFT - 6, y), f"{10**log:.3g}", fill="black", font=font, anchor="rm")
    draw.rectangle([_LEFT, _TOP, right, bottom], outline=(150, 150, 150))
    line = [place(step, log) for (step, _), log in zip(points, logs, strict=True)]
    draw.line(line if len(line) > 1 else line * 2, fill=(35, 85, 220), width=2, joint="curve")
    draw.text((_LEFT, _TOP // 2), title, fill="black", font=font, anchor="lm")
    for step in (0, last / 2, last):
        draw.text((place(step, low)[0], bottom + 8), f"{step:.0f}", fill="black", font=font, anchor="mt")
    return panel


def _ticks(low: float, high: float) -> list[float]:
    """Logarithms of round numbers in a range: 1, 2, 5 times powers of ten; where that is too few, evenly spaced."""
    decades = range(math.floor(low), math.ceil(high) + 1)
    ticks = [power + math.log10(digit) for power in decades for digit in (1, 2, 5)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    return ticks if len(ticks) > 2 else [low + (high - low) * part / 4 for part in range(5)]
