"""Prompts and images of a command: from its arguments, from files, or from stdin for ``-``."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bagel_rt.models.bagel.settings import MAX_CHARACTERS

if TYPE_CHECKING:  # imported inside the functions, to keep ``bagel-rt --help`` fast
    from PIL import Image

STDIN = "-"
_MAX_IMAGE_BYTES = 1 << 28  # of an image from stdin
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def check_stdin(inputs: Sequence[str]) -> None:
    """Raise ValueError if more than one input is stdin, which can be read once only."""
    count = sum(entry.removeprefix("text:").removeprefix("image:") == STDIN for entry in inputs)
    if count > 1:
        raise ValueError(f"- must be given once at most, got {count}. stdin can be read once only; use files.")


def _read_stdin(limit: int) -> bytes:
    if sys.stdin is None:
        raise ValueError("stdin must be open to read from -, got a closed one. Redirect a file to it.")
    content = sys.stdin.buffer.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"stdin must have at most {limit} bytes, got more. Shorten the input.")
    return content


def read_prompt(prompt: str, remedy: str = "Describe the image") -> str:
    """Return the prompt; for ``-`` the text on stdin, without line ends behind it.

    Raises:
        ValueError: it is not UTF-8, or has no visible character. The error ends with ``remedy``.
    """
    from bagel_rt.request import check_prompt

    return check_prompt("PROMPT", _read_text(prompt), remedy)


def _read_text(text: str) -> str:
    if text != STDIN:
        if any("\ud800" <= character <= "\udfff" for character in text):  # a byte of the argument that is not UTF-8
            raise ValueError(f"a prompt must be text in UTF-8, got {text!a:.80}. Check the terminal's encoding.")
        return text
    content = _read_stdin(4 * MAX_CHARACTERS)  # UTF-8 has at most four bytes per character
    try:
        return content.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"stdin must be text in UTF-8, got the byte 0x{content[error.start]:02x} at position {error.start}. "
            "Convert the text."
        ) from None


def read_image(path: Path | str) -> "Image.Image":
    """Open an image file; for ``-`` the image on stdin."""
    from bagel_rt.models.bagel.images import open_image

    if str(path) != STDIN:
        return open_image(path)
    content = _read_stdin(_MAX_IMAGE_BYTES)
    if not content:
        raise ValueError("stdin must be an image, got no bytes. Redirect an image file to it.")
    return open_image(content)


def read_parts(parts: Sequence[str]) -> "list[str | Image.Image]":
    """Read the texts and images of ``interleave``'s input; ValueError if they are blank texts only."""
    from bagel_rt.request import check_prompt

    contents = [_read_part(part) for part in parts]
    texts = [content for content in contents if isinstance(content, str)]
    if len(texts) == len(contents):
        check_prompt("PART", "".join(texts), "Add a text or an image")
    return contents


def _read_part(part: str) -> "str | Image.Image":
    """Read a text, or the image in a file."""
    kind, colon, rest = part.partition(":")
    if colon and kind == "text":
        return _read_text(rest)
    if colon and kind == "image":
        return read_image(rest)
    if os.path.isfile(part):
        return read_image(part)
    if part.lower().endswith(_IMAGE_SUFFIXES) and not any(map(str.isspace, part)):
        raise ValueError(f"{part}: no such file. For a text, write text:{part}")
    return _read_text(part)
