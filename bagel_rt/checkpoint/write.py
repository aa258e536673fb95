"""Write weights as sharded safetensors files with an index, one tensor in memory at a time."""

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch

from bagel_rt.checkpoint.read import DTYPES
from bagel_rt.files import atomic_write


def save_sharded(
    folder: Path | str,
    stem: str,
    tensors: Iterable[tuple[str, Callable[[], torch.Tensor], tuple[int, ...], torch.dtype]],
    max_shard_bytes: int,
) -> Path:
    """Write ``<stem>-0000k-of-0000N.safetensors`` and ``<stem>.safetensors.index.json``.

    One tensor is in memory at a time. Every file appears under its name only when it is complete, the index last.

    Args:
        folder: exists, or is made.
        stem: "ema" or "ae".
        tensors: (name, function that makes the tensor, its shape, its dtype: bf16, fp16, fp32 or fp64). The functions
            are called once each, in order.
        max_shard_bytes: most tensor bytes per shard; a larger tensor gets a shard of its own.

    Returns:
        The index file's path.

    Raises:
        ValueError: no tensors, a name twice, a dtype that is not allowed, or a tensor other than announced.
    """
    folder = Path(folder)
    shards = _shards(tensors, max_shard_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file_name = f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        with atomic_write(folder / file_name) as file:
            _write_shard(file, shard)
        weight_map |= dict.fromkeys((planned.name for planned in shard), file_name)
    total = sum(planned.size for shard in shards for planned in shard)
    index = folder / f"{stem}.safetensors.index.json"
    with atomic_write(index) as file:
        file.write(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2).encode())
    return index


class _Planned(NamedTuple):
    name: str
    make: Callable[[], torch.Tensor]
    shape: tuple[int, ...]
    dtype: torch.dtype
    size: int


def _shards(tensors, max_shard_bytes: int) -> list[list[_Planned]]:
    """Tensors in their order, cut into shards of at most ``max_shard_bytes``."""
    shards, names, room = [], set(), 0
    for name, make, shape, dtype in tensors:
        if dtype not in DTYPES.values() or name in names:
            raise ValueError(f"{name} is {dtype}; allowed: each name once, with dtype {', '.join(DTYPES)}")
        names.add(name)
        size = math.prod(shape) * dtype.itemsize
        if not shards or size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(_Planned(name, make, tuple(shape), dtype, size))
        room -= size
    if not shards:
        raise ValueError("there are no tensors to save")
    return shards


def _write_shard(file: BinaryIO, shard: list[_Planned]) -> None:
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, _, shape, dtype, size in shard:
        header[name] = {"dtype": names[dtype], "shape": shape, "data_offsets": (end, end + size)}
        end += size
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # tensors start at a multiple of 8 bytes
    file.write(len(raw).to_bytes(8, "little") + raw)
    for planned in shard:
        file.write(_bytes(planned))


def _bytes(planned: _Planned):
    tensor = planned.make()
    if tensor.shape != planned.shape or tensor.dtype != planned.dtype:
        raise ValueError(
            f"{planned.name} is {list(tensor.shape)} {tensor.dtype}, announced as {list(planned.shape)} {planned.dtype}"
        )
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
