"""What a model thought and what it answers, apart: thoughts stand between <think> and </think>."""

import re

_MARKS = re.compile(r"</?(?:think|answer|image_start|image_end)>")


def split_thought(text: str) -> tuple[str, str]:
    """(thought, answer) of a text, which may be unfinished."""
    before, opened, rest = text.partition("<think>")
    if not opened:
        return "", _plain(text)
    thought, _, after = rest.partition("</think>")
    return _plain(thought), _plain(before + after)


def thought_of(text: str) -> str:
    """The thought of a text that is nothing else, as it is written before a picture."""
    return _plain(text)


def _plain(text: str) -> str:
    return _MARKS.sub("", text).strip()
