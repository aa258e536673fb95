"""Locate tensors in safetensors files: one file, an index with its shards, or shards without an index.

A safetensors file is an 8-byte little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, and the
tensors' bytes without gaps.
"""

import math
import os
import re
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bagel_rt.checkpoint.files import (
    DOWNLOAD,
    REMEDY,
    check_content,
    open_file,
    parse_json_object,
    printable,
    read_json,
)
from bagel_rt.errors import CheckpointError

_HEADER_LIMIT = 16 << 20  # bytes; the header of the 7B model takes 200 kB
_MAX_DIMENSIONS = 8
_MAX_LISTED = 8  # detail lines of an error
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
PICKLES_UNSUPPORTED = "pickles can execute code when loaded and are not supported"


class StoredTensor(NamedTuple):
    """Location of a tensor in a safetensors file: ``start`` is its byte offset in the file, ``size`` its bytes."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


def locate_tensors(path: Path) -> dict[str, StoredTensor]:
    """Locate tensors by name.

    Args:
        path: a ``.safetensors`` file, an index ``.json`` of shards in the same folder, or a shard whose name ends in
            ``-0000k-of-0000N.safetensors``, which selects all N shards.

    Raises:
        CheckpointError: a file is missing, truncated or malformed, or index and shards list different tensors.
    """
    if path.suffix == ".json":
        return _read_index(path)
    shard = _SHARD.fullmatch(path.name)
    return _read_shards(path, shard[1], int(shard[3])) if shard else read_header(path)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Locate the tensors of one safetensors file by name; CheckpointError if it is truncated or malformed."""
    with open_file(path) as file:
        file_size = os.fstat(file.fileno()).st_size
        start = file.read(64)
        length = int.from_bytes(start[:8], "little")
        if not 2 <= length <= min(file_size - 8, _HEADER_LIMIT):
            check_content(start, path)
            _reject_other_formats(path, start, length)
            if not any(start) or (2 <= length <= _HEADER_LIMIT and start[8:9] in (b"{", b"")):
                raise _truncated(path, file_size, 8 + length if length else None)
            raise CheckpointError(
                f"{path} is not a safetensors file: the header must have at most {_HEADER_LIMIT} bytes and end within "
                f"the file's {file_size} bytes, got a header length of {length}. {REMEDY}."
            )
        file.seek(8)
        raw = file.read(length)
    header = parse_json_object(raw, f"{path}: the header")
    header.pop("__metadata__", None)
    tensors = {name: _parse_entry(path, name, entry, 8 + length) for name, entry in header.items()}
    end = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].size)):
        if tensor.start != end:
            raise CheckpointError(
                f"{path}: {printable(name)} must start at byte {end}, without gap or overlap, got {tensor.start}. "
                f"{REMEDY}."
            )
        end += tensor.size
    if end > file_size:
        raise _truncated(path, file_size, end)
    if end != file_size:
        raise CheckpointError(f"{path} has {file_size} bytes, but its tensors end at byte {end}. {REMEDY}.")
    return tensors


def _truncated(path: Path, size: int, expected: int | None) -> CheckpointError:
    """The error for a file with ``size`` of ``expected`` bytes; ``expected`` is None if it starts with zeros."""
    cause = (
        "contains only zeros at its start" if expected is None else f"is truncated: it has {size} of {expected} bytes"
    )
    return CheckpointError(
        f"{path} {cause}. The download did not finish; download it again, for example with `{DOWNLOAD} {path.parent}`."
    )


def error_report(sentence: str, details: Sequence[str], note: str = "") -> CheckpointError:
    """An error of one sentence, a few detail lines and an optional closing note."""
    lines = list(details[:_MAX_LISTED])
    if len(details) > _MAX_LISTED:
        lines[-1:] = [f"and {len(details) - _MAX_LISTED + 1} more"]
    return CheckpointError("\n  ".join([sentence, *lines, *([note] if note else [])]))


def _reject_other_formats(path: Path, start: bytes, length: int) -> None:
    """Raise CheckpointError for a pickle, GGUF or text; ``length`` is the first 8 bytes as a header length."""
    # The magic bytes of a pickle or zip file give a huge length. Without the length test, a valid file whose header
    # length starts with the byte 0x80 would be reported as a pickle.
    if path.suffix in PICKLES or (length > _HEADER_LIMIT and start.startswith((b"PK", b"\x80"))):
        raise CheckpointError(f"{path} is a pickle: {PICKLES_UNSUPPORTED}. Convert it to safetensors.")
    if start.startswith(b"GGUF"):
        raise CheckpointError(
            f"{path} is a GGUF file, a format that is not supported. Download the published weights: "
            f"{DOWNLOAD} {path.parent}"
        )
    if start.isascii() and start.decode().rstrip().replace("\n", " ").isprintable():
        raise CheckpointError(
            f"{path} is a text file, not a safetensors file. It starts with {reprlib.repr(start.decode())}. Download "
            "it again."
        )


def _parse_entry(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    """Parse one header entry; its offsets must match its shape and dtype."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        valid = isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in (*shape, begin, end))
        valid = valid and begin <= end and len(shape) <= _MAX_DIMENSIONS
        if valid and dtype in DTYPES:
            valid = end - begin == math.prod(shape) * DTYPES[dtype].itemsize
    except (TypeError, KeyError, ValueError):
        valid = False
    if not valid:
        raise CheckpointError(
            f"{path}: the header entry of {printable(name)} must be a dtype, a shape and two data_offsets that match "
            f"them, got {reprlib.repr(entry)}. {REMEDY}."
        )
    return StoredTensor(path, dtype, shape, data_start + begin, end - begin)


def _read_index(path: Path) -> dict[str, StoredTensor]:
    """Locate the tensors of all shards of an index; index and shards must list the same tensors."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{path}: weight_map must map tensor names to shard files, got {reprlib.repr(weight_map)}. {REMEDY}."
        )
    for shard in weight_map.values():
        # A plain file name cannot point outside the folder. A symbolic link may: download caches consist of them.
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or set(shard) & set("/\\\0"):
            raise CheckpointError(
                f"{path}: a shard must be a .safetensors file in the same folder, got {reprlib.repr(shard)}. {REMEDY}."
            )
    stored = _read_all(path, sorted(set(weight_map.values())), "or delete the index if it is outdated")
    problems = [
        f"{printable(shard)}: missing tensor {printable(name)}, which the index lists for this shard"
        for name, shard in weight_map.items()
        if name not in stored[shard]
    ] + [
        f"{printable(shard)}: unexpected tensor {printable(name)}, which the index does not list for this shard"
        for shard, tensors in stored.items()
        for name in tensors
        if weight_map.get(name) != shard
    ]
    if problems:
        raise error_report(f"{path} does not match its shards. {REMEDY}.", problems)
    return {name: stored[shard][name] for name, shard in weight_map.items()}


def _read_shards(path: Path, stem: str, count: int) -> dict[str, StoredTensor]:
    """Locate the tensors of all shards of a set that has no index."""
    shards = _read_all(path, [f"{stem}-{k:05}-of-{count:05}.safetensors" for k in range(1, count + 1)], "")
    tensors: dict[str, StoredTensor] = {}
    for shard, stored in shards.items():
        repeated = next((name for name in stored if name in tensors), None)
        if repeated is not None:
            first = tensors[repeated].file.name
            raise CheckpointError(f"{path.parent}: {printable(repeated)} is in both {first} and {shard}. {REMEDY}.")
        tensors |= stored
    return tensors


def _read_all(path: Path, names: Sequence[str], alternative: str) -> dict[str, dict[str, StoredTensor]]:
    """Locate the tensors of every shard, by file name; ``alternative`` extends the remedy for missing shards."""
    missing = [f"shard {printable(name)} is missing" for name in names if not os.path.lexists(path.parent / name)]
    if missing:
        remedy = ", ".join(filter(None, ["Download the missing shards", alternative]))
        raise error_report(f"{path}: {len(missing)} of {len(names)} shards are missing. {remedy}.", missing)
    return {name: read_header(path.parent / name) for name in names}
