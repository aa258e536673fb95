"""Atomic file writes: a reader finds the old file or the complete new one, never a part of it."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from bagel_rt import __version__

if TYPE_CHECKING:
    from PIL import Image


def partial_path(path: Path) -> Path:
    """The temporary file that is renamed to ``path``: hidden, in the same folder, one per process."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary binary file that replaces ``path`` when the block succeeds; on an error ``path`` is unchanged.

    The content is synced to disk before the rename, so a crash leaves the old file or the new one.

    Raises:
        OSError: the folder is not writable or the disk is full.
    """
    partial = partial_path(path)
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_png(image: "Image.Image", path: Path, parameters: dict) -> None:
    """Write an image atomically, with ``parameters`` as JSON in the tEXt chunk of that name."""
    from PIL.PngImagePlugin import PngInfo  # imported here to keep ``bagel-rt --help`` fast

    metadata = PngInfo()
    metadata.add_text("Software", f"bagel_rt {__version__}")
    metadata.add_text("parameters", json.dumps(parameters))
    with atomic_write(path) as file:
        image.save(file, format="PNG", pnginfo=metadata)
