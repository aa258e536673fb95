"""Load weights from safetensors files: validate every header first, then stream the tensors in bounded memory.

This package reads the files itself instead of using the safetensors package, for three reasons:

- An error can name the tensor.
- File contents are read into one reused staging buffer (pinned on CUDA) instead of being memory-mapped, so a 29 GB file
  does not count against host memory.
- A file that is truncated during loading raises an error; with a memory map it would crash the process.

Loading a file never executes code: pickles are not supported.
"""

import fnmatch
import itertools
import operator
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import torch
from tqdm import tqdm

from bagel_rt.checkpoint.files import REMEDY, open_file
from bagel_rt.checkpoint.header import DTYPES, StoredTensor, locate_tensors
from bagel_rt.checkpoint.mismatch import explain_mismatch
from bagel_rt.errors import CheckpointError

_STAGING_BYTES = 64 << 20  # read at once
_MAX_PREFIXED = 200  # characters of a name that is searched for a prefix


@dataclass(frozen=True)
class WeightSlot:
    """Where a tensor of the checkpoint goes.

    Args:
        view: the copy target, possibly a strided view into a fused parameter; any dtype and device.
        shape: the shape stored in the file. It broadcasts to ``view.shape``: one QK-norm vector fills the row of every
            head.
        part: the part of the model that the tensor belongs to, for error messages.
        default: makes the tensor if the checkpoint does not contain it. Default: it must.

    Raises:
        ValueError: ``shape`` does not broadcast to ``view.shape``.
    """

    view: torch.Tensor
    shape: tuple[int, ...]
    part: str = ""
    default: Callable[[], torch.Tensor] | None = None

    def __post_init__(self) -> None:
        padded = (1,) * (self.view.ndim - len(self.shape)) + self.shape
        if len(padded) != self.view.ndim or any(n not in (1, m) for n, m in zip(padded, self.view.shape, strict=True)):
            raise ValueError(f"shape must broadcast to {list(self.view.shape)}, got {list(self.shape)}.")


def load_weights(
    path: Path | str, slots: Mapping[str, WeightSlot], ignore: tuple[str, ...] = (), progress: bool = True
) -> None:
    """Copy every tensor of a checkpoint into its slot, converting to the slot's dtype.

    Host memory beyond the slots: 64 MB, or one row of the widest tensor if that is larger, for any checkpoint size.

    Args:
        path: as in :func:`~bagel_rt.checkpoint.header.locate_tensors`.
        slots: by tensor name; the checkpoint must contain exactly these tensors, except those with a default. All names
            in the checkpoint may have the same prefix.
        ignore: shell-style patterns of additional names that the checkpoint may contain.
        progress: show a progress bar on stderr.

    Raises:
        CheckpointError: as :func:`check_weights`, before anything is copied; a file changed during reading; or a value
            is NaN or infinite, or overflows the dtype of its slot. Values that are neither converted nor copied to a
            GPU are not checked, because that would slow the copy by half.
    """
    stored = check_weights(path, slots, ignore)
    copies = sorted((stored[name].file, stored[name].start, name) for name in slots if name in stored)
    total = sum(stored[name].size for _, _, name in copies)
    pinned = any(slot.view.is_cuda for slot in slots.values())
    staging = torch.empty(_STAGING_BYTES, dtype=torch.uint8, pin_memory=pinned)
    # Inference mode: slots may be parameters that require gradients, or inference tensors themselves.
    with (
        torch.inference_mode(),
        tqdm(total=total, unit="B", unit_scale=True, desc=Path(path).name, disable=not progress) as bar,
    ):
        for name, slot in slots.items():
            if name not in stored and slot.default is not None:
                slot.view.copy_(slot.default())
        for shard, group in itertools.groupby(copies, key=operator.itemgetter(0)):
            with open_file(shard) as file:
                for _, _, name in group:
                    _copy_tensor(file, name, stored[name], slots[name].view, staging, bar)


def check_weights(
    path: Path | str, slots: Mapping[str, WeightSlot], ignore: tuple[str, ...] = ()
) -> dict[str, StoredTensor]:
    """Compare the headers of a checkpoint with the slots, which may be meta tensors. Reads no tensor data.

    Returns:
        Every tensor of the checkpoint by name, without a common prefix.

    Raises:
        CheckpointError: a file is missing, truncated, malformed or a pickle; or tensors are missing, unexpected, or of
            the wrong shape or dtype. The message states the cause and lists a few of these tensors.
    """
    path = Path(path)
    stored = _strip_prefix(locate_tensors(path), slots)
    missing = [name for name, slot in slots.items() if name not in stored and slot.default is None]
    unexpected = [
        name
        for name in sorted(stored.keys() - slots.keys())
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in ignore)
    ]
    error = explain_mismatch(path, stored, slots, missing, unexpected)
    if error is not None:
        raise error
    return stored


def _strip_prefix(stored: dict[str, StoredTensor], slots: Mapping[str, WeightSlot]) -> dict[str, StoredTensor]:
    """Remove the prefix, such as "module.", that most names have in the checkpoint, unless names would collide."""
    prefixes: Counter[str] = Counter()
    for name in stored:
        if len(name) <= _MAX_PREFIXED:  # bounds the search, which is quadratic in the length
            cuts = [0, *(index + 1 for index, character in enumerate(name) if character == ".")]
            prefixes.update(name[:cut] for cut in cuts if name[cut:] in slots)
    prefix = max(prefixes, key=lambda prefix: (prefixes[prefix], prefix == ""), default="")
    stripped = {name.removeprefix(prefix): tensor for name, tensor in stored.items()}
    return stripped if len(stripped) == len(stored) else stored


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
        values = buffer.view(DTYPES[tensor.dtype]).view(len(rows), *shape[1:])
        rows.copy_(values)
        _check_finite(tensor.file, name, values, rows)
        bar.update(count)


def _check_finite(file: Path, name: str, values: torch.Tensor, rows: torch.Tensor) -> None:
    """Raise CheckpointError if ``rows``, the copy of ``values``, is not finite.

    A copy on the CPU without conversion is not checked: that would slow it by half. A GPU does it in negligible time.
    """
    if not rows.numel() or (values.dtype == rows.dtype and not rows.is_cuda):
        return
    narrower = rows.is_cuda or rows.dtype.itemsize <= values.dtype.itemsize
    if _is_finite(rows if narrower else values):  # the check of fewer bytes has the same result
        return
    if _is_finite(values):
        limit = f"{torch.finfo(rows.dtype).max:g}"
        dtype = str(rows.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{file}: values of {name} must be from -{limit} to {limit} to be loaded as {dtype}, got "
            f"{values.abs().max().item():g}. Use dtype bfloat16 or float32."
        )
    raise CheckpointError(f"{file}: {name} contains NaN or infinity. {REMEDY}.")


def _is_finite(tensor: torch.Tensor) -> bool:
    # Both extremes are NaN if any value is; this is 30 times as fast as torch.isfinite on a CPU.
    return bool(torch.stack(torch.aminmax(tensor)).isfinite().all())
