"""Draw ``docs/diagrams/spans.svg``, the attention spans of packed rows: ``python docs/diagrams.py``.

SVG is written directly: the diagram shares its style sheet, with dark mode, with the hand-written ones. All lengths are
pixels. Cells of a row: s is a slot visible without a mask, b one visible below the row's limit, n one not visible.
"""

import re
from pathlib import Path

FOLDER = Path(__file__).parent / "diagrams"
HEIGHT, TOP, CELL = 408, 100, 20
ARIA_LABEL = "Attention by two spans a row: which slots of the cache each packed row sees"
CELL_CLASSES = {"s": "seen", "b": "bounded", "n": "none"}

PREFILL_ROWS = [("gen", "ssssssnnnn")] * 4 + [("und", f"ssssss{seen}") for seen in ("nnnn", "nnnn")]
PREFILL_ROWS += [("und", f"ssssss{seen:n<4}") for seen in ("b", "bb", "bbb", "bbbb")]
WITH, WITHOUT = "ssssssssssssssssnnnnnn", "ssssssnnnnnnnnnnssssss"
STEP_ROWS = [("gen", WITH)] * 4 + [("gen", WITHOUT)] * 4 + [("und", WITH)] * 2 + [("und", WITHOUT)] * 2
LEGEND = (  # (class, x, words)
    ("seen", 24, "seen by every row of its query block: no mask"),
    ("bounded", 330, "seen where the slot is below the row's limit"),
    ("gen", 640, "generation rows"),
    ("und", 790, "understanding rows"),
)


def rect(name: str, x: int, y: int, width: int, height: int) -> str:
    return f'<rect class="{name}" x="{x}" y="{y}" width="{width}" height="{height}"/>'


def text(x: float, y: float, names: str, words: str) -> str:
    return f'<text x="{x}" y="{y}" class="{names}">{words}</text>'


def table(left: int, title: str, columns, rows, blocks, labels) -> list[str]:
    """Draw rows of cells with labels above and beside them.

    Args:
        left: x of the first cell.
        columns: (label, number of slots), in order.
        rows: (class of the row's mark, its cells).
        blocks: (first row, end row) of each query block.
        labels: (label, first row, end row).
    """
    lines, start = [text(left, 42, "title", title)], left
    for words, slots in columns:
        first, last = start + 2, start + CELL * slots - 2
        lines.append(f'<path class="faint" d="M{first} 92 L{first} 88 L{last} 88 L{last} 92"/>')
        lines.append(text((first + last) / 2, 80, "small middle", words))
        start += CELL * slots
    for number, (mark, cells) in enumerate(rows):
        y = TOP + CELL * number
        lines.append(rect(mark, left - 22, y, 14, CELL))
        lines += [rect(CELL_CLASSES[cell], left + CELL * slot, y, CELL, CELL) for slot, cell in enumerate(cells)]
    outer, inner = left - 38, left - 34
    for first, end in blocks:
        top, bottom = TOP + CELL * first + 2, TOP + CELL * end - 2
        lines.append(f'<path class="faint" d="M{inner} {top} L{outer} {top} L{outer} {bottom} L{inner} {bottom}"/>')
    for words, first, end in labels:
        lines.append(text(left - 46, TOP + CELL * (first + end) / 2 + 5, "small end", words))
    return lines


def spans(style: str) -> str:
    """The diagram, after the shared ``style``."""
    lines = [rect("page", 0.5, 0.5, 979, HEIGHT - 1).replace("/>", ' rx="8"/>')]
    columns, labels = [("image", 6), ("text", 4)], [("latents", 0, 4), ("markers", 4, 6), ("text", 6, 10)]
    lines += table(150, "Filling a context", columns, PREFILL_ROWS, [(0, 4), (4, 10)], labels)
    columns += [("own, with", 6), ("own, without", 6)]
    blocks = [(0, 4), (4, 8), (8, 10), (10, 12)]
    labels = [(("with the text", "without")[number % 2], *block) for number, block in enumerate(blocks)]
    lines += table(520, "A step of two branches", columns, STEP_ROWS, blocks, labels)
    lines.append(text(150, 322, "small", "columns: slots of the KV cache"))
    lines.append(text(520, 358, "small", "Both branches read one copy of the image."))
    for name, x, words in LEGEND:
        lines += [rect(name, x, 374, 14, 14), text(x + 22, 386, "small", words)]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 980 {HEIGHT}" role="img" aria-label="{ARIA_LABEL}">'
    return "\n".join([head, style, *(f"  {line}" for line in lines), "</svg>"]) + "\n"


def shared_style() -> str:
    """The style sheet of the hand-written diagrams."""
    diagram = (FOLDER / "loop.svg").read_text(encoding="utf-8")
    return re.search(r"^  <style>.*</defs>$", diagram, re.MULTILINE | re.DOTALL).group()


if __name__ == "__main__":
    (FOLDER / "spans.svg").write_text(spans(shared_style()), encoding="utf-8")
