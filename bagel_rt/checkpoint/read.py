"""Read weights from safetensors files, checked whole before the first byte is copied, streamed in bounded memory.

A safetensors file is an 8-byte little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, and the
tensors' bytes without gaps. The header is read and judged here rather than by the safetensors package, for three
reasons: an error can then name the tensor; file contents are read into one reused (on CUDA: pinned) buffer instead of
being mapped, so a 29 GB file never counts against host memory; and a file that shrinks meanwhile raises an error
instead of killing the process. Nothing here can execute what a file contains: pickles are refused.
"""

import fnmatch
import itertools
import math
import operator
import os
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from tqdm import tqdm

from bagel_rt.checkpoint.files import REMEDY, json_object, opened, read_json
from bagel_rt.errors import CheckpointError

_HEADER_LIMIT = 16 << 20  # bytes; the 7B model's header has 200 kilobytes
_STAGING = 64 << 20  # bytes read at once
_MAX_DIMENSIONS = 8
_LISTED = 5000  # mismatches spelled out in one error
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_FALLBACK_STEMS = {"ema": ("model",)}


@dataclass(frozen=True)
class WeightSlot:
    """Where a tensor of the checkpoint goes.

    Args:
        view: the copy target, possibly a strided part of a fused parameter; its dtype and device are free.
        shape: the shape that the file must have; it broadcasts to ``view.shape`` (one QK-norm row for all heads).

    Raises:
        ValueError: ``shape`` does not broadcast to ``view.shape``.
    """

    view: torch.Tensor
    shape: tuple[int, ...]

    def __post_init__(self):
        padded = (1,) * (self.view.ndim - len(self.shape)) + self.shape
        if len(padded) != self.view.ndim or any(n not in (1, m) for n, m in zip(padded, self.view.shape, strict=True)):
            raise ValueError(f"a tensor of shape {list(self.shape)} does not broadcast to {list(self.view.shape)}")


class StoredTensor(NamedTuple):
    """A tensor's place in a safetensors file: ``start`` is the absolute byte, ``size`` the number of bytes."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


def find_weights(folder: Path | str, stem: str) -> Path:
    """The file that :func:`load_weights` takes for ``stem`` ("ema", "ae"): one file if there is one, else an index.

    ``ema`` falls back on ``model``. The single file comes first because the published folder holds, beside
    ``ema.safetensors``, an index of shards that are not there.

    Raises:
        CheckpointError: nothing was found; the message lists what was looked for, and pickles that are there.
    """
    folder = Path(folder)
    stems = (stem, *_FALLBACK_STEMS.get(stem, ()))
    names = [f"{stem}.safetensors{suffix}" for stem in stems for suffix in ("", ".index.json")]
    for name in names:
        if os.path.lexists(folder / name):
            return folder / name
    pickles = sorted(file.name for file in folder.glob("*") if file.suffix in _PICKLES)
    refused = f"{', '.join(pickles[:5])}: a pickle can run code when it is opened, and is refused. " if pickles else ""
    raise CheckpointError(
        f"{folder} holds none of {', '.join(names)}. {refused}Download safetensors from the published model folder."
    )


def load_weights(
    path: Path | str, destinations: Mapping[str, WeightSlot], ignore: tuple[str, ...] = (), progress: bool = True
) -> None:
    """Copy every tensor of a checkpoint to its destination, converting to the destination's dtype.

    Beyond the destinations this takes 64 MB of host memory, or one row of the widest tensor, whatever the checkpoint.

    Args:
        path: a ``.safetensors`` file, or an index ``.json`` that names shards beside it.
        destinations: by tensor name; the checkpoint must hold exactly these.
        ignore: shell-style patterns of names that the checkpoint may hold besides.
        progress: show a progress bar on stderr.

    Raises:
        CheckpointError: as :func:`check_weights`, before anything is copied; or a file changed while it was read.
    """
    stored = check_weights(path, destinations, ignore)
    copies = sorted((stored[name].file, stored[name].start, name) for name in destinations)  # the disk's order
    total = sum(stored[name].size for _, _, name in copies)
    pinned = any(target.view.is_cuda for target in destinations.values())
    staging = torch.empty(_STAGING, dtype=torch.uint8, pin_memory=pinned)
    # Inference mode, because targets may be parameters that require gradients, or inference tensors themselves.
    with (
        torch.inference_mode(),
        tqdm(total=total, unit="B", unit_scale=True, desc=Path(path).name, disable=not progress) as bar,
    ):
        for shard, group in itertools.groupby(copies, key=operator.itemgetter(0)):
            with opened(shard) as file:
                for _, _, name in group:
                    _copy(file, name, stored[name], destinations[name].view, staging, bar)


def check_weights(
    path: Path | str, destinations: Mapping[str, WeightSlot], ignore: tuple[str, ...] = ()
) -> dict[str, StoredTensor]:
    """Compare a checkpoint's headers with the destinations, which may be meta tensors: nothing else is read.

    Returns:
        Every tensor of the checkpoint by name.

    Raises:
        CheckpointError: a file is missing, truncated, malformed or a pickle, or tensors are missing, left over, or of
            another shape or dtype than expected; one message lists all such tensors, with file and remedy.
    """
    path = Path(path)
    stored = _read_index(path) if path.suffix == ".json" else read_header(path)
    problems = []
    for name, target in destinations.items():
        expected = list(target.shape)
        if name not in stored:
            problems.append(f"{path.name} lacks {name}, expected with shape {expected}")
            continue
        file, dtype, shape = stored[name][:3]
        if shape != target.shape:
            problems.append(f"{file.name}: {name} has shape {list(shape)}, expected {expected}")
        if dtype not in DTYPES:
            problems.append(f"{file.name}: {name} has dtype {_shown(dtype)}, allowed: {', '.join(DTYPES)}")
    for name in sorted(stored.keys() - destinations.keys()):
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in ignore):
            file, _, shape = stored[name][:3]
            problems.append(f"{file.name}: {_shown(name)} {list(shape)} has no place in the model")
    _refuse(path, problems, "Take the configuration and the weights from the same model folder.")
    return stored


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file by name; CheckpointError if it is not a whole, well-formed one."""
    with opened(path) as file:
        file_size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if not 2 <= length <= min(file_size - 8, _HEADER_LIMIT):
            # A pickle's or zip's first bytes, read as a length, are huge; a small length may begin with the same byte.
            if path.suffix in _PICKLES or (length > _HEADER_LIMIT and start.startswith((b"PK", b"\x80"))):
                raise CheckpointError(
                    f"{path} is a pickle: it can run code when it is opened, and is refused. Convert it to safetensors."
                )
            raise CheckpointError(
                f"{path} is truncated or not a safetensors file: it has {file_size} bytes and claims a header of "
                f"{length}; allowed: up to {_HEADER_LIMIT}, inside the file. {REMEDY}."
            )
        raw = file.read(length)
    header = json_object(raw, f"{path}: the header")
    header.pop("__metadata__", None)
    tensors = {name: _stored(path, name, entry, 8 + length) for name, entry in header.items()}
    end = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].size)):
        if tensor.start != end:
            raise CheckpointError(
                f"{path}: {_shown(name)} starts at byte {tensor.start}, the tensor before it ends at {end}; "
                f"neither gaps nor overlaps are allowed. {REMEDY}."
            )
        end += tensor.size
        if end > file_size:
            raise CheckpointError(
                f"{path} is truncated: it has {file_size} bytes, but {_shown(name)} ends at byte {end}. {REMEDY}."
            )
    if end != file_size:
        raise CheckpointError(f"{path} has {file_size} bytes, but its tensors end at byte {end}. {REMEDY}.")
    return tensors


def _shown(name: str) -> str:
    """A tensor or file name that a stranger chose, fit for a terminal."""
    return name if name.isprintable() and len(name) <= 200 else reprlib.repr(name)


def _refuse(path: Path, problems: list[str], remedy: str) -> None:
    if problems:
        listed = problems[:_LISTED]
        if len(problems) > _LISTED:
            listed.append(f"and {len(problems) - _LISTED} more")
        raise CheckpointError("\n  ".join([f"{path} cannot be loaded:", *listed]) + f"\n{remedy}")


def _stored(path: Path, name: str, entry, data_start: int) -> StoredTensor:
    """One header entry, checked against itself."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        good = isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in (*shape, begin, end))
        good = good and begin <= end and len(shape) <= _MAX_DIMENSIONS
        if good and dtype in DTYPES:
            good = end - begin == math.prod(shape) * DTYPES[dtype].itemsize
    except (TypeError, KeyError, ValueError):
        good = False
    if not good:
        raise CheckpointError(
            f"{path}: the header's entry for {_shown(name)} is {reprlib.repr(entry)}; allowed: dtype, shape and two "
            f"data_offsets that agree with them. {REMEDY}."
        )
    return StoredTensor(path, dtype, shape, data_start + begin, end - begin)


def _read_index(path: Path) -> dict[str, StoredTensor]:
    """The tensors of all shards that an index names, all of which must agree with the index."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map is missing or empty; allowed: tensor name -> shard file. {REMEDY}.")
    for shard in weight_map.values():
        # A bare name cannot leave the folder. Links may: download caches are made of them.
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or set(shard) & set("/\\\0"):
            raise CheckpointError(
                f"{path} names the shard {reprlib.repr(shard)}; allowed: .safetensors files beside it. {REMEDY}."
            )
    shards = {shard: path.parent / shard for shard in sorted(set(weight_map.values()))}
    missing = [f"the shard {_shown(shard)} is missing" for shard, file in shards.items() if not os.path.lexists(file)]
    _refuse(path, missing, "Download the missing shards from where the index came from, or remove a stale index.")
    held = {shard: read_header(file) for shard, file in shards.items()}
    problems = [
        f"{_shown(shard)} lacks {_shown(name)}, which the index places there"
        for name, shard in weight_map.items()
        if name not in held[shard]
    ] + [
        f"{_shown(shard)} holds {_shown(name)}, which the index does not place there"
        for shard, tensors in held.items()
        for name in tensors
        if weight_map.get(name) != shard
    ]
    _refuse(path, problems, f"Index and shards do not belong together. {REMEDY}.")
    return {name: held[shard][name] for name, shard in weight_map.items()}


def _copy(
    file: BinaryIO, name: str, tensor: StoredTensor, view: torch.Tensor, staging: torch.Tensor, bar: tqdm
) -> None:
    """Copy one tensor through the staging buffer, as many rows at a time as fit; in one piece if it is broadcast."""
    shape = tensor.shape
    if not shape or shape != view.shape:
        shape, view = (1, *shape), view[None]
    row = tensor.size // max(1, shape[0])
    step = max(1, len(staging) // max(1, row))
    file.seek(tensor.start)
    for first in range(0, shape[0], step):
        rows = view[first : first + step]
        count = row * len(rows)
        buffer = staging[:count] if count <= len(staging) else torch.empty(count, dtype=torch.uint8)
        if file.readinto(buffer.numpy()) != count:
            raise CheckpointError(f"{tensor.file} was changed while it was read: {name} is cut off. {REMEDY}.")
        rows.copy_(buffer.view(DTYPES[tensor.dtype]).view(len(rows), *shape[1:]))
        bar.update(count)
