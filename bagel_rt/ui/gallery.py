"""Files of each page: generated images as PNG with their parameters as metadata, and previews.

Every file has a folder with an unguessable name, because anyone who knows its URL can download it.
"""

import secrets
import shutil
import threading
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from bagel_rt.files import write_image
from bagel_rt.request import ImageResult

SHOWN = 24  # images in a page's gallery
KEPT = 200  # images of a page; older ones are deleted
_PREVIEWS = 3  # files of one control: a browser may still be loading the previous one
_PREVIEW_SIDE = 640  # pixels, of the longer side
Entry = TypeVar("Entry", tuple[Path, str], tuple[Path, Image.Image])


@dataclass(eq=False)
class _Files:
    """Files of one page, newest first.

    Attributes:
        images: (path, caption).
        previews: control -> (path, image in that file).
    """

    images: list[tuple[Path, str]] = field(default_factory=list)
    previews: dict[str, list[tuple[Path, Image.Image]]] = field(default_factory=dict)


class Gallery:
    """Files in one folder, by page. Thread-safe: a page may leave while its image is being written; then the file is
    deleted."""

    def __init__(self, folder: Path, source: dict[str, Any]):
        """
        Args:
            folder: for the files; its creator deletes it.
            source: metadata about the model, written to every file.
        """
        self._folder, self._source = folder, source
        self._lock = threading.Lock()
        self._pages: dict[Hashable, _Files] = {}

    def enter(self, page: Hashable) -> None:
        """Keep files of this page until it leaves."""
        with self._lock:
            self._pages.setdefault(page, _Files())

    def leave(self, page: Hashable) -> None:
        """Delete a page's files."""
        with self._lock:
            files = self._pages.pop(page, _Files())
        _delete(files.images)
        for previews in files.previews.values():
            _delete(previews)

    def add(self, page: Hashable, result: ImageResult, caption: str, **request: Any) -> str | None:
        """Write an image. Returns its path, or None if the page has left."""
        path = self._new_path(f"bagel-seed-{result.seed}.png")
        parameters = self._source | {"seed": result.seed} | request | result.parameters
        if result.thought is not None:
            parameters["thought"] = result.thought
        write_image(result.image, path, parameters)
        files = self._pages.get(page, _Files())
        return self._keep(page, files, files.images, (path, f"{caption:.120} · seed {result.seed}"), KEPT)

    def images(self, page: Hashable) -> list[tuple[str, str]]:
        """(path, caption) of a page's newest images."""
        with self._lock:
            files = self._pages.get(page, _Files())
            return [(str(path), caption) for path, caption in files.images[:SHOWN]]

    def preview(self, page: Hashable, control: str, image: Image.Image) -> str | None:
        """Write a preview for a control of the page. Returns its path, or None if the page has left."""
        with self._lock:
            files = self._pages.get(page)
            if files is None:
                return None
            previews = files.previews.setdefault(control, [])
            if previews and previews[0][1] is image:
                return str(previews[0][0])
        path, small = self._new_path("preview.jpg"), image.copy()
        small.thumbnail((_PREVIEW_SIDE, _PREVIEW_SIDE))
        small.save(path, quality=90)
        return self._keep(page, files, previews, (path, image), _PREVIEWS)

    def _keep(self, page: Hashable, files: _Files, entries: list[Entry], entry: Entry, length: int) -> str | None:
        """Add a written file and delete those beyond ``length``; delete all if the page has left."""
        with self._lock:
            stays = self._pages.get(page) is files
            entries.insert(0, entry)
            length = length if stays else 0
            removed, entries[length:] = entries[length:], []
        _delete(removed)
        return str(entry[0]) if stays else None

    def _new_path(self, name: str) -> Path:
        folder = self._folder / secrets.token_hex(16)
        folder.mkdir()
        return folder / name


def _delete(entries: list[Entry]) -> None:
    for path, _ in entries:
        shutil.rmtree(path.parent, ignore_errors=True)
