"""The pictures that each page has made, as PNG files that tell what they were made of; and previews.

Every file has a folder of its own whose name nobody can guess: whoever knows a file's address can have it.
"""

import secrets
import shutil
from collections.abc import Hashable
from pathlib import Path

from PIL import Image

from bagel_rt.cli_run import write_png
from bagel_rt.request import ImageResult

SHOWN = 24  # pictures in a page's gallery
KEPT = 200  # files of a page; beyond them the oldest go
_PREVIEWS = 3  # files of one place: a browser may still be loading the last one
_PREVIEW_SIDE = 640  # pixels; what is shown for a moment need not be larger


class Album:
    """Files in a folder, by page, the newest first."""

    def __init__(self, folder: Path, source: dict):
        """
        Args:
            folder: for the files; whoever made it takes it away.
            source: what every file says of the model.
        """
        self._folder, self._source = folder, source
        self._pictures: dict[Hashable, list[tuple[Path, str]]] = {}
        self._previews: dict[Hashable, dict[str, list[Path]]] = {}
        self._newest: dict[tuple[Hashable, str], Image.Image] = {}

    def add(self, page: Hashable, made: ImageResult, caption: str, **request) -> str:
        """Write a picture; the path of its file."""
        path = self._new(f"bagel-seed-{made.seed}.png")
        parameters = self._source | {"seed": made.seed} | request | made.parameters
        if made.thought is not None:
            parameters["thought"] = made.thought
        write_png(made.image, path, parameters)
        pictures = [(path, f"{caption:.120} · seed {made.seed}"), *self._pictures.get(page, [])]
        self._pictures[page] = pictures[:KEPT]
        _remove(path for path, _ in pictures[KEPT:])
        return str(path)

    def pictures(self, page: Hashable) -> list[tuple[str, str]]:
        """(path, caption) of a page's newest pictures."""
        return [(str(path), caption) for path, caption in self._pictures.get(page, [])[:SHOWN]]

    def preview(self, page: Hashable, place: str, picture: Image.Image) -> str:
        """Write a preview, to be shown at a place of the page until the next one; the path of its file."""
        before = self._previews.setdefault(page, {}).setdefault(place, [])
        if before and self._newest[page, place] is picture:
            return str(before[0])
        path, small = self._new("preview.jpg"), picture.copy()
        small.thumbnail((_PREVIEW_SIDE, _PREVIEW_SIDE))
        small.save(path, quality=90)
        self._newest[page, place] = picture
        self._previews[page][place] = [path, *before][:_PREVIEWS]
        _remove(before[_PREVIEWS - 1 :])
        return str(path)

    def leave(self, page: Hashable) -> None:
        """Forget a page that was closed, and its files."""
        _remove(path for path, _ in self._pictures.pop(page, []))
        for place, previews in self._previews.pop(page, {}).items():
            _remove(previews)
            del self._newest[page, place]

    def _new(self, name: str) -> Path:
        folder = self._folder / secrets.token_hex(16)
        folder.mkdir()
        return folder / name


def _remove(paths) -> None:
    for path in paths:
        shutil.rmtree(path.parent, ignore_errors=True)
