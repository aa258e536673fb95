"""Split a text into thought and answer: a thought stands between <think> and </think>."""

import re

_MARKS = re.compile(r"</?(?:think|answer|image_start|image_end)>")


def split_thought(text: str) -> tuple[str, str]:
    """Return (thought, answer) of a text, which may be incomplete."""
    before, opened, rest = text.partition("<think>")
    if not opened:
        return "", _plain(text)
    thought, _, after = rest.partition("</think>")
    return _plain(thought), _plain(before + after)


def thought_of(text: str) -> str:
    """Return the thought that precedes an image: the whole text, without markers."""
    return _plain(text)


def _plain(text: str) -> str:
    return _MARKS.sub("", text).strip()
