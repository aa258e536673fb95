"""Load weights from safetensors files: validate every header first, then stream the tensors in bounded memory.

A safetensors file is an 8-byte little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, and the
tensors' bytes without gaps. This module parses the header itself instead of using the safetensors package, for three
reasons:

- An error can name the tensor.
- File contents are read into one reused staging buffer (pinned on CUDA) instead of being memory-mapped, so a 29 GB file
  does not count against host memory.
- A file that is truncated during loading raises an error; with a memory map it would crash the process.

Loading a file never executes code: pickles are not supported.
"""

import fnmatch
import itertools
import math
import operator
import os
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from bagel_rt.checkpoint.files import REMEDY, open_file, parse_json_object, read_json
from bagel_rt.errors import CheckpointError

_HEADER_LIMIT = 16 << 20  # bytes; the 7B model's header has 200 kilobytes
_STAGING_BYTES = 64 << 20  # read at once
_MAX_DIMENSIONS = 8
_MAX_LISTED = 5000  # mismatches listed in one error
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
_DTYPE_NAMES = "BF16, F16, F32 or F64"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_PICKLES_UNSUPPORTED = "pickles can execute code when loaded and are not supported"
_FALLBACK_STEMS = {"ema": ("model",)}


@dataclass(frozen=True)
class WeightSlot:
    """Where a tensor of the checkpoint goes.

    Args:
        view: the copy target, possibly a strided view into a fused parameter; any dtype and device.
        shape: the shape stored in the file. It broadcasts to ``view.shape``: one QK-norm vector fills the row of every
            head.

    Raises:
        ValueError: ``shape`` does not broadcast to ``view.shape``.
    """

    view: torch.Tensor
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        padded = (1,) * (self.view.ndim - len(self.shape)) + self.shape
        if len(padded) != self.view.ndim or any(n not in (1, m) for n, m in zip(padded, self.view.shape, strict=True)):
            raise ValueError(f"shape must broadcast to {list(self.view.shape)}, got {list(self.shape)}.")


class StoredTensor(NamedTuple):
    """Location of a tensor in a safetensors file: ``start`` is its byte offset in the file, ``size`` its bytes."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


def find_weights(folder: Path | str, stem: str) -> Path:
    """Find the file to pass to :func:`load_weights` for ``stem`` ("ema" or "ae"): a single file, else an index.

    ``ema`` falls back to ``model``. The single file has priority because the published folder contains, beside
    ``ema.safetensors``, an index of shards that it does not contain.

    Raises:
        CheckpointError: no such file. The message lists the expected names and any pickles in the folder.
    """
    folder = Path(folder)
    stems = (stem, *_FALLBACK_STEMS.get(stem, ()))
    names = [f"{stem}.safetensors{suffix}" for stem in stems for suffix in ("", ".index.json")]
    for name in names:
        if os.path.lexists(folder / name):
            return folder / name
    pickles = sorted(file.name for file in folder.glob("*") if file.suffix in _PICKLES)
    found = f" It contains {', '.join(pickles[:5])}, but {_PICKLES_UNSUPPORTED}." if pickles else ""
    raise CheckpointError(
        f"{folder} must contain one of {', '.join(names)}.{found} Download safetensors from the published model folder."
    )


def load_weights(
    path: Path | str, slots: Mapping[str, WeightSlot], ignore: tuple[str, ...] = (), progress: bool = True
) -> None:
    """Copy every tensor of a checkpoint into its slot, converting to the slot's dtype.

    Host memory beyond the slots: 64 MB, or one row of the widest tensor if that is larger, for any checkpoint size.

    Args:
        path: a ``.safetensors`` file, or an index ``.json`` of shards in the same folder.
        slots: by tensor name; the checkpoint must contain exactly these tensors.
        ignore: shell-style patterns of additional names that the checkpoint may contain.
        progress: show a progress bar on stderr.

    Raises:
        CheckpointError: as :func:`check_weights`, before anything is copied; or a file changed during reading.
    """
    stored = check_weights(path, slots, ignore)
    copies = sorted((stored[name].file, stored[name].start, name) for name in slots)  # sequential reads
    total = sum(stored[name].size for _, _, name in copies)
    pinned = any(slot.view.is_cuda for slot in slots.values())
    staging = torch.empty(_STAGING_BYTES, dtype=torch.uint8, pin_memory=pinned)
    # Inference mode: slots may be parameters that require gradients, or inference tensors themselves.
    with (
        torch.inference_mode(),
        tqdm(total=total, unit="B", unit_scale=True, desc=Path(path).name, disable=not progress) as bar,
    ):
        for shard, group in itertools.groupby(copies, key=operator.itemgetter(0)):
            with open_file(shard) as file:
                for _, _, name in group:
                    _copy_tensor(file, name, stored[name], slots[name].view, staging, bar)


def check_weights(
    path: Path | str, slots: Mapping[str, WeightSlot], ignore: tuple[str, ...] = ()
) -> dict[str, StoredTensor]:
    """Compare the headers of a checkpoint with the slots, which may be meta tensors. Reads no tensor data.

    Returns:
        Every tensor of the checkpoint by name.

    Raises:
        CheckpointError: a file is missing, truncated, malformed or a pickle; or tensors are missing, unexpected, or of
            the wrong shape or dtype. One message lists all such tensors.
    """
    path = Path(path)
    stored = _read_index(path) if path.suffix == ".json" else read_header(path)
    problems = []
    for name, slot in slots.items():
        if name not in stored:
            problems.append(f"{path.name}: missing tensor {name} of shape {list(slot.shape)}")
            continue
        file, dtype, shape = stored[name][:3]
        if shape != slot.shape:
            problems.append(f"{file.name}: shape of {name} must be {list(slot.shape)}, got {list(shape)}")
        if dtype not in DTYPES:
            problems.append(f"{file.name}: dtype of {name} must be {_DTYPE_NAMES}, got {_printable(dtype)}")
    for name in sorted(stored.keys() - slots.keys()):
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in ignore):
            file, _, shape = stored[name][:3]
            problems.append(f"{file.name}: unexpected tensor {_printable(name)} of shape {list(shape)}")
    _raise_if_any(path, problems, "Use the configuration and the weights of the same model folder.")
    return stored


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Locate the tensors of one safetensors file by name; CheckpointError if it is truncated or malformed."""
    with open_file(path) as file:
        file_size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if not 2 <= length <= min(file_size - 8, _HEADER_LIMIT):
            # The magic bytes of a pickle or zip file give a huge length. Without that test, a valid file whose header
            # length starts with the byte 0x80 would be reported as a pickle.
            if path.suffix in _PICKLES or (length > _HEADER_LIMIT and start.startswith((b"PK", b"\x80"))):
                raise CheckpointError(f"{path} is a pickle: {_PICKLES_UNSUPPORTED}. Convert it to safetensors.")
            raise CheckpointError(
                f"{path} is truncated or not a safetensors file: the header must have at most {_HEADER_LIMIT} bytes "
                f"and end within the file's {file_size} bytes, got a header length of {length}. {REMEDY}."
            )
        raw = file.read(length)
    header = parse_json_object(raw, f"{path}: the header")
    header.pop("__metadata__", None)
    tensors = {name: _parse_entry(path, name, entry, 8 + length) for name, entry in header.items()}
    end = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].size)):
        if tensor.start != end:
            raise CheckpointError(
                f"{path}: {_printable(name)} must start at byte {end}, without gap or overlap, got {tensor.start}. "
                f"{REMEDY}."
            )
        end += tensor.size
        if end > file_size:
            raise CheckpointError(
                f"{path} is truncated: it has {file_size} bytes, but {_printable(name)} ends at byte {end}. {REMEDY}."
            )
    if end != file_size:
        raise CheckpointError(f"{path} has {file_size} bytes, but its tensors end at byte {end}. {REMEDY}.")
    return tensors


def _printable(name: str) -> str:
    """A tensor or file name from an untrusted file, safe to print on a terminal."""
    return name if name.isprintable() and len(name) <= 200 else reprlib.repr(name)


def _raise_if_any(path: Path, problems: list[str], remedy: str) -> None:
    if problems:
        listed = problems[:_MAX_LISTED]
        if len(problems) > _MAX_LISTED:
            listed.append(f"and {len(problems) - _MAX_LISTED} more")
        raise CheckpointError("\n  ".join([f"{path} cannot be loaded:", *listed]) + f"\n{remedy}")


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
            f"{path}: the header entry of {_printable(name)} must be a dtype, a shape and two data_offsets that match "
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
    files = {shard: path.parent / shard for shard in sorted(set(weight_map.values()))}
    missing = [f"shard {_printable(shard)} is missing" for shard, file in files.items() if not os.path.lexists(file)]
    _raise_if_any(path, missing, "Download the missing shards, or delete the index if it is outdated.")
    stored = {shard: read_header(file) for shard, file in files.items()}
    problems = [
        f"{_printable(shard)}: missing tensor {_printable(name)}, which the index lists for this shard"
        for name, shard in weight_map.items()
        if name not in stored[shard]
    ] + [
        f"{_printable(shard)}: unexpected tensor {_printable(name)}, which the index does not list for this shard"
        for shard, tensors in stored.items()
        for name in tensors
        if weight_map.get(name) != shard
    ]
    _raise_if_any(path, problems, f"The index does not match its shards. {REMEDY}.")
    return {name: stored[shard][name] for name, shard in weight_map.items()}


def _copy_tensor(
    file: BufferedReader, name: str, tensor: StoredTensor, view: torch.Tensor, staging: torch.Tensor, bar: tqdm
) -> None:
    """Copy one tensor from the file to ``view`` through the staging buffer, in chunks of whole rows (dimension 0).

    A row larger than the staging buffer gets a temporary buffer of its own.
    """
    shape = tensor.shape
    if not shape or shape != view.shape:
        # A scalar has no rows, and a tensor that is broadcast to the view has other rows than the view: copy it whole,
        # as the only row of a tensor with one more dimension.
        shape, view = (1, *shape), view[None]
    row_bytes = tensor.size // max(1, shape[0])
    step = max(1, len(staging) // max(1, row_bytes))
    file.seek(tensor.start)
    for first in range(0, shape[0], step):
        rows = view[first : first + step]
        count = row_bytes * len(rows)
        buffer = staging[:count] if count <= len(staging) else torch.empty(count, dtype=torch.uint8)
        if file.readinto(buffer.numpy().data) != count:
            raise CheckpointError(f"{tensor.file} changed while it was being read: {name} is truncated. {REMEDY}.")
        # Converts the dtype and, for a CUDA view, transfers. The copy is synchronous, so that the next chunk can
        # overwrite the staging buffer.
        rows.copy_(buffer.view(DTYPES[tensor.dtype]).view(len(rows), *shape[1:]))
        bar.update(count)
