"""Atomic file writes: a reader finds the old file or the complete new one, never a part of it."""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from bagel_rt import __version__

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)

IMAGE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}  # suffix -> format of Pillow
QUALITY = 95  # of JPEG and WebP, by default
_EXIF_LIMIT = 65_000  # bytes; a JPEG segment has at most 65,535
_EXIF_SOFTWARE, _EXIF_IFD, _EXIF_USER_COMMENT = 0x0131, 0x8769, 0x9286


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


def write_image(image: "Image.Image", path: Path, parameters: dict[str, Any], quality: int = QUALITY) -> None:
    """Write an image atomically with :func:`save_image`, in the format of the path's suffix, in any case.

    Raises:
        KeyError: the suffix is not in ``IMAGE_FORMATS``.
    """
    image_format = IMAGE_FORMATS[path.suffix.lower()]
    with atomic_write(path) as file:
        save_image(image, file, image_format, parameters, quality)


def save_image(
    image: "Image.Image", file: BinaryIO, image_format: str, parameters: dict[str, Any], quality: int = QUALITY
) -> None:
    """Encode an image, with ``parameters`` as JSON in its metadata.

    PNG has them in the tEXt chunk "parameters", JPEG and WebP in the EXIF tag UserComment.

    Args:
        image_format: a value of ``IMAGE_FORMATS``.
        quality: from 1 to 100, of JPEG and WebP.
    """
    from PIL.Image import Exif  # imported here to keep ``bagel-rt --help`` fast
    from PIL.PngImagePlugin import PngInfo

    software, text = f"bagel_rt {__version__}", json.dumps(parameters)
    if image_format == "PNG":
        metadata = PngInfo()
        metadata.add_text("Software", software)
        metadata.add_text("parameters", text)
        image.save(file, format="PNG", pnginfo=metadata)
        return
    exif = Exif()
    exif[_EXIF_SOFTWARE] = software
    if len(text) <= _EXIF_LIMIT:
        exif.get_ifd(_EXIF_IFD)[_EXIF_USER_COMMENT] = b"ASCII\0\0\0" + text.encode()  # JSON escapes the rest
    else:
        log.warning(
            "the image has no parameters: their %d bytes exceed what EXIF can hold. PNG has no limit.", len(text)
        )
    subsampling = {"subsampling": "4:4:4"} if image_format == "JPEG" else {}  # keeps the edges of colored areas
    image.save(file, format=image_format, quality=quality, exif=exif, **subsampling)
