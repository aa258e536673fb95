"""Texts that end before a stop string."""

from collections.abc import Sequence


class StoppedText:
    """A text that arrives in pieces and ends before the first stop string, however the pieces cut it.

    Of several stop strings the one that is complete first counts, as if the text arrived letter by letter.

    Attributes:
        stopped: whether a stop string has been found.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops, self._held, self.stopped = stops, "", False

    def feed(self, piece: str) -> str:
        """The text that is certain after this piece: without an end that may be the start of a stop string."""
        text = self._held + piece
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        self.stopped = bool(found)
        certain = min(found)[1] if found else len(text) - self._uncertain(text)
        self._held = "" if found else text[certain:]
        return text[:certain]

    def finish(self) -> str:
        """The rest of a text that has ended."""
        return self._held

    def _uncertain(self, text: str) -> int:
        """The number of letters at the end that some stop string starts with."""
        longest = max(map(len, self._stops), default=0) - 1
        lengths = range(min(longest, len(text)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self._stops)), 0)
