"""Split a text into thought and answer: a thought stands between <think> and </think>."""

import re

_MARKS = re.compile(r"</?(?:think|answer|image_start|image_end)>")


def split_thought(text: str) -> tuple[str, str]:
    """Return (thought, answer) of a text, which may be incomplete."""
    before, opened, rest = text.partition("<think>")
    if not opened:
        return "", strip_markers(text)
    thought, _, after = rest.partition("</think>")
    return strip_markers(thought), strip_markers(before + after)


def strip_markers(text: str) -> str:
    """Remove the markers from a text."""
    return _MARKS.sub("", text).strip()
