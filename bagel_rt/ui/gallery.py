"""The pictures that each page has made, as PNG files that tell what they were made of; and previews.

Every file has a folder of its own whose name nobody can guess: whoever knows a file's address can have it.
"""

import secrets
import shutil
import threading
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from bagel_rt.files import write_png
from bagel_rt.request import ImageResult

SHOWN = 24  # pictures in a page's gallery
KEPT = 200  # files of a page; beyond them the oldest go
_PREVIEWS = 3  # files of one place: a browser may still be loading the last one
_PREVIEW_SIDE = 640  # pixels; what is shown for a moment need not be larger


@dataclass(eq=False)
class _Files:
    """A page's, the newest first.

    Attributes:
        pictures: (path, caption).
        previews: place -> (path, what was written there).
    """

    pictures: list[tuple[Path, str]] = field(default_factory=list)
    previews: dict[str, list[tuple[Path, Image.Image]]] = field(default_factory=dict)


class Album:
    """Files in a folder, by page. From any thread: a page may be closed while a picture of it is being written, and
    what is made for one that has left is not kept."""

    def __init__(self, folder: Path, source: dict):
        """
        Args:
            folder: for the files; whoever made it takes it away.
            source: what every file says of the model.
        """
        self._folder, self._source = folder, source
        self._lock = threading.Lock()
        self._pages: dict[Hashable, _Files] = {}

    def enter(self, page: Hashable) -> None:
        """Keep files of this page, until it leaves."""
        with self._lock:
            self._pages.setdefault(page, _Files())

    def leave(self, page: Hashable) -> None:
        """Forget a page that was closed, and its files."""
        with self._lock:
            files = self._pages.pop(page, _Files())
        for entries in (files.pictures, *files.previews.values()):
            _remove(path for path, _ in entries)

    def add(self, page: Hashable, made: ImageResult, caption: str, **request) -> str | None:
        """Write a picture; the path of its file, or None if the page has left."""
        path = self._new(f"bagel-seed-{made.seed}.png")
        parameters = self._source | {"seed": made.seed} | request | made.parameters
        if made.thought is not None:
            parameters["thought"] = made.thought
        write_png(made.image, path, parameters)
        with self._lock:
            files = self._pages.get(page)
            pictures = [] if files is None else files.pictures
            pictures.insert(0, (path, f"{caption:.120} · seed {made.seed}"))
            gone = _cut(pictures, 0 if files is None else KEPT)
        _remove(gone)
        return None if files is None else str(path)

    def pictures(self, page: Hashable) -> list[tuple[str, str]]:
        """(path, caption) of a page's newest pictures."""
        with self._lock:
            files = self._pages.get(page, _Files())
            return [(str(path), caption) for path, caption in files.pictures[:SHOWN]]

    def preview(self, page: Hashable, place: str, picture: Image.Image) -> str | None:
        """Write a preview, to be shown at a place of the page until the next one; the path of its file, or None if the
        page has left."""
        with self._lock:
            files = self._pages.get(page)
            if files is None:
                return None
            previews = files.previews.setdefault(place, [])
            if previews and previews[0][1] is picture:
                return str(previews[0][0])
        path, small = self._new("preview.jpg"), picture.copy()
        small.thumbnail((_PREVIEW_SIDE, _PREVIEW_SIDE))
        small.save(path, quality=90)
        with self._lock:
            stays = self._pages.get(page) is files
            previews.insert(0, (path, picture))
            gone = _cut(previews, _PREVIEWS if stays else 0)
        _remove(gone)
        return str(path) if stays else None

    def _new(self, name: str) -> Path:
        folder = self._folder / secrets.token_hex(16)
        folder.mkdir()
        return folder / name


def _cut(entries: list[tuple[Path, object]], most: int) -> list[Path]:
    """The paths of the last ones, those beyond ``most``, which are taken out."""
    gone = [path for path, _ in entries[most:]]
    del entries[most:]
    return gone


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        shutil.rmtree(path.parent, ignore_errors=True)
