"""Reading the files of a model folder: regular files only, JSON objects of bounded size."""

import json
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from bagel_rt.errors import CheckpointError

_JSON_LIMIT = 16 << 20  # bytes; the largest weight index of a published model has a few hundred kilobytes
REMEDY = "Correct the file, or take it from the published model folder again"


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The regular file ``path``, open for reading. An OSError, now or while it is read, becomes a CheckpointError."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # asked before open, which would wait for the writer of a FIFO
            raise CheckpointError(f"{path} is not a file. Put the published file there.")
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}. Put the published file there.") from None


def json_object(raw: bytes, source) -> dict:
    """The JSON object in ``raw``; CheckpointError, naming ``source``, if that is something else."""
    try:
        value = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source} is not JSON in UTF-8: {error}. {REMEDY}.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{source} holds a JSON {type(value).__name__}; allowed: an object. {REMEDY}.")
    return value


def read_json(path: Path) -> dict:
    """The JSON object in the file ``path``; CheckpointError if there is none."""
    with opened(path) as file:
        raw = file.read(_JSON_LIMIT + 1)
    if len(raw) > _JSON_LIMIT:
        raise CheckpointError(f"{path} is too large; allowed: up to {_JSON_LIMIT} bytes. {REMEDY}.")
    return json_object(raw, path)
