"""Contact sheets: rows of small images with captions, optionally marked as right or wrong.

All lengths are in pixels. Images are laid out in columns; a before/after pair takes two columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

COLUMNS = 8
SIDE, PADDING, GAP, MARGIN = 128, 8, 12, 32
COLUMN = SIDE + 2 * PADDING
WIDTH = 2 * MARGIN + COLUMNS * COLUMN + (COLUMNS - 1) * GAP
FRAME, BADGE = 3, 22
BAR = (160, 8)
PAGE, CARD, EDGE, TRACK = "#f6f5f1", "#ffffff", "#e1dfd8", "#dcd9d0"
INK, FAINT, RIGHT, WRONG = "#24292f", "#6b7178", "#2c8a4b", "#c8373f"
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True, eq=False)
class Tile:
    """One image, or an image and its edited version, with a caption.

    Attributes:
        images: one or two; shown as squares.
        lines: (text, color) of each paragraph of the caption, wrapped to the tile's width.
        correct: True marks the last image as right, False as wrong; None draws no mark.
    """

    images: tuple[Image.Image, ...]
    lines: tuple[tuple[str, str], ...]
    correct: bool | None = None


@dataclass(frozen=True, eq=False)
class Section:
    """Tiles under a heading, with an optional bar for a share and its confidence interval.

    Attributes:
        title, note: the heading, and small text to its right.
        tiles: at least one.
        share: (low, share, high) in [0, 1], with the ends of the confidence interval; None for no bar.
    """

    title: str
    note: str
    tiles: Sequence[Tile]
    share: tuple[float, float, float] | None = None


def contact_sheet(title: str, note: str, sections: Sequence[Section]) -> Image.Image:
    """Draw a sheet as an RGB image of width ``WIDTH``."""
    blocks = [_heading(title, note)]
    for section in sections:
        blocks.append(_section_heading(section))
        blocks += [_row(tiles) for tiles in _rows(section.tiles)]
    height = sum(block.height + GAP for block in blocks) + 2 * MARGIN - GAP
    sheet = Image.new("RGB", (WIDTH, height), PAGE)
    top = MARGIN
    for block in blocks:
        sheet.paste(block, (MARGIN, top))
        top += block.height + GAP
    return sheet


def wrap_lines(text: str, font: Font, width: int) -> list[str]:
    """Wrap a text to lines of at most ``width``; a word wider than that is broken."""
    lines, line = [], ""
    for word in text.split():
        while font.getlength(word) > width:
            fits = max(1, sum(font.getlength(word[:end]) <= width for end in range(1, len(word))))
            lines += [line] if line else []
            lines.append(word[:fits])
            line, word = "", word[fits:]
        joined = f"{line} {word}".strip()
        if font.getlength(joined) > width:
            lines.append(line)
            joined = word
        line = joined
    return [*lines, line] if line else lines


def _font(size: int) -> Font:
    return ImageFont.load_default(size)  # bundled with Pillow: sheets look the same on every machine


def _block(height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """An empty strip across the page, without the margins."""
    image = Image.new("RGB", (WIDTH - 2 * MARGIN, height), PAGE)
    return image, ImageDraw.Draw(image)


def _heading(title: str, note: str) -> Image.Image:
    image, draw = _block(62)
    draw.text((0, 0), title, INK, _font(30))
    draw.text((0, 42), note, FAINT, _font(14))
    return image


def _section_heading(section: Section) -> Image.Image:
    image, draw = _block(40)
    draw.text((0, 32), section.title, INK, _font(19), anchor="ls")
    left = max(2 * (COLUMN + GAP), int(draw.textlength(section.title, _font(19))) + 2 * GAP)
    if section.share is not None:
        _draw_share(draw, left, section.share)
        left += BAR[0] + GAP
    draw.text((left, 32), section.note, FAINT, _font(14), anchor="ls")
    return image


def _draw_share(draw: ImageDraw.ImageDraw, left: int, share: tuple[float, float, float]) -> None:
    low, filled, high = (round(value * BAR[0]) for value in share)
    top = 32 - BAR[1] - 3
    draw.rounded_rectangle((left, top, left + BAR[0], top + BAR[1]), BAR[1] // 2, TRACK)
    if filled:
        draw.rounded_rectangle((left, top, left + max(filled, BAR[1]), top + BAR[1]), BAR[1] // 2, RIGHT)
    middle = top + BAR[1] // 2
    draw.line((left + low, middle, left + high, middle), INK)
    for end in (low, high):
        draw.line((left + end, middle - 3, left + end, middle + 3), INK)


def _rows(tiles: Sequence[Tile]) -> list[list[Tile]]:
    """Distribute tiles over rows of ``COLUMNS`` columns."""
    rows: list[list[Tile]] = [[]]
    columns = 0
    for tile in tiles:
        if columns + len(tile.images) > COLUMNS:
            rows.append([])
            columns = 0
        rows[-1].append(tile)
        columns += len(tile.images)
    return rows


def _row(tiles: Sequence[Tile]) -> Image.Image:
    """Draw tiles side by side, as cards of equal height."""
    texts = [_lines(tile) for tile in tiles]
    height = max(map(len, texts)) * 16 + SIDE + 3 * PADDING + 4
    image, draw = _block(height)
    left = 0
    for tile, lines in zip(tiles, texts, strict=True):
        width = _width(tile)
        draw.rounded_rectangle((left, 0, left + width - 1, height - 1), 8, CARD, EDGE)
        _draw_images(image, draw, tile, left + PADDING)
        for number, (line, color) in enumerate(lines):
            draw.text((left + PADDING, SIDE + 2 * PADDING + 4 + 16 * number), line, color, _font(13))
        left += width + GAP
    return image


def _width(tile: Tile) -> int:
    return len(tile.images) * (COLUMN + GAP) - GAP


def _lines(tile: Tile) -> list[tuple[str, str]]:
    width = _width(tile) - 2 * PADDING
    return [(line, color) for text, color in tile.lines for line in wrap_lines(text, _font(13), width)]


def _draw_images(image: Image.Image, draw: ImageDraw.ImageDraw, tile: Tile, left: int) -> None:
    for number, tile_image in enumerate(tile.images):
        resized = tile_image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        image.paste(resized, (left, PADDING))
        if number < len(tile.images) - 1:
            draw.rectangle((left, PADDING, left + SIDE - 1, PADDING + SIDE - 1), outline=EDGE)
            start, middle = left + SIDE + 7, PADDING + SIDE // 2
            left += SIDE + 2 * PADDING + GAP
            draw.line((start, middle, left - 8, middle), FAINT, 2)
            draw.line((left - 13, middle - 5, left - 8, middle, left - 13, middle + 5), FAINT, 2, joint="curve")
    if tile.correct is None:
        draw.rectangle((left, PADDING, left + SIDE - 1, PADDING + SIDE - 1), outline=EDGE)
        return
    color, edge = RIGHT if tile.correct else WRONG, FRAME // 2
    box = (left - edge, PADDING - edge, left + SIDE - 1 + edge, PADDING + SIDE - 1 + edge)
    draw.rounded_rectangle(box, 3, None, color, FRAME)
    badge = _badge(tile.correct)
    image.paste(badge, (left + SIDE - BADGE + 5, PADDING - 5), badge)


def _badge(correct: bool) -> Image.Image:
    """A round badge with a tick or a cross, drawn at four times the size and scaled down for antialiasing."""
    side = 4 * BADGE
    image = Image.new("RGBA", (side, side))
    draw = ImageDraw.Draw(image)
    draw.ellipse((2, 2, side - 3, side - 3), RIGHT if correct else WRONG, "white", 6)
    strokes = [((26, 46), (39, 59), (63, 31))] if correct else [((30, 30), (58, 58)), ((58, 30), (30, 58))]
    for points in strokes:
        draw.line(points, "white", 10, joint="curve")
    return image.resize((BADGE, BADGE), Image.Resampling.LANCZOS)
