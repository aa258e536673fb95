"""Open the files of a model folder: regular files only, JSON objects of bounded size."""

import json
import reprlib
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from bagel_rt.errors import CheckpointError

_JSON_LIMIT = 16 << 20  # bytes; the largest weight index of a published model has a few hundred kilobytes
DOWNLOAD = "hf download ByteDance-Seed/BAGEL-7B-MoT --local-dir"
REMEDY = "Fix the file, or download it again from the published model folder"


@contextmanager
def open_file(path: Path) -> Iterator[BufferedReader]:
    """Open a regular file for reading. An OSError on opening or reading it becomes a CheckpointError."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # checked before open, which blocks on a FIFO without a writer
            raise CheckpointError(f"{path} is not a file. Put the published file there.")
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}. Put the published file there.") from None


def check_content(start: bytes, source: Path | str) -> None:
    """Raise CheckpointError if the first bytes of a file are something that downloads leave in place of the file."""
    text = start[:64].lstrip().lower()
    if not start:
        raise CheckpointError(f"{source} is empty. Download it again.")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{source} is a Git LFS pointer, not the file itself. Run `git lfs pull` in its folder, or download it "
            "with `hf download`."
        )
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        raise CheckpointError(
            f"{source} is a web page, such as an error or login page, saved in place of the file. Download it again "
            "with `hf download`."
        )


def parse_json_object(raw: bytes, source: Path | str) -> dict[str, Any]:
    """Parse a JSON object; CheckpointError, naming ``source``, for anything else."""
    try:
        value = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source} is not JSON in UTF-8: {error}. {REMEDY}.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{source} must be a JSON object, got {type(value).__name__}. {REMEDY}.")
    return value


def read_file(path: Path, max_bytes: int) -> bytes:
    """Read a regular file of at most ``max_bytes``; CheckpointError for anything else."""
    with open_file(path) as file:
        raw = file.read(max_bytes + 1)
    if len(raw) > max_bytes:
        raise CheckpointError(f"{path} must have at most {max_bytes} bytes, got more. {REMEDY}.")
    check_content(raw, path)
    return raw


def read_json(path: Path, max_bytes: int = _JSON_LIMIT) -> dict[str, Any]:
    """Read the JSON object in a file; CheckpointError if it holds anything else or has more than ``max_bytes``."""
    return parse_json_object(read_file(path, max_bytes), path)


def printable(name: str) -> str:
    """A tensor or file name from an untrusted file, safe to print on a terminal."""
    return name if name.isprintable() and len(name) <= 200 else reprlib.repr(name)
