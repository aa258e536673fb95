"""Write weights as one safetensors file, or as shards with an index, with one tensor in memory at a time."""

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import torch

from bagel_rt.checkpoint.header import DTYPES
from bagel_rt.files import atomic_write
from bagel_rt.validation import check, one_of

LazyTensor: TypeAlias = tuple[str, Callable[[], torch.Tensor], tuple[int, ...], torch.dtype]
"""Name, function that returns the tensor, its shape, its dtype."""


def save_weights(
    folder: Path | str, stem: str, tensors: Iterable[LazyTensor], max_shard_bytes: int | None = None
) -> Path:
    """Write ``<stem>.safetensors``, or shards ``<stem>-0000k-of-0000N.safetensors`` and their ``.index.json``.

    One tensor is in memory at a time. Files are written atomically, the index last.

    Args:
        folder: created if it does not exist.
        stem: "ema" or "ae".
        tensors: in the order of the files; dtypes bf16, fp16, fp32 or fp64. Each function is called once, in order.
        max_shard_bytes: maximum tensor bytes per shard; a larger tensor gets its own shard. Default: a single file.

    Returns:
        The path of the single file or of the index.

    Raises:
        ValueError: no tensors, a duplicate name, an unsupported dtype, or a tensor that differs from its declared
            shape or dtype.
    """
    folder = Path(folder)
    shards = _plan_shards(tensors, math.inf if max_shard_bytes is None else max_shard_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    if max_shard_bytes is None:
        with atomic_write(folder / f"{stem}.safetensors") as file:
            _write_shard(file, shards[0])
        return folder / f"{stem}.safetensors"
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file_name = f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        with atomic_write(folder / file_name) as file:
            _write_shard(file, shard)
        weight_map |= dict.fromkeys((tensor.name for tensor in shard), file_name)
    total = sum(tensor.size for shard in shards for tensor in shard)
    index = folder / f"{stem}.safetensors.index.json"
    with atomic_write(index) as file:
        file.write(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2).encode())
    return index


class _TensorSpec(NamedTuple):
    name: str
    make: Callable[[], torch.Tensor]
    shape: tuple[int, ...]
    dtype: torch.dtype
    size: int  # bytes


def _plan_shards(tensors: Iterable[LazyTensor], max_shard_bytes: float) -> list[list[_TensorSpec]]:
    """Split the tensors, in order, into shards of at most ``max_shard_bytes``."""
    shards: list[list[_TensorSpec]] = []
    names: set[str] = set()
    room = 0.0
    for name, make, shape, dtype in tensors:
        check(f"dtype of {name}", dtype, one_of(tuple(DTYPES.values())))
        if name in names:
            raise ValueError(f"tensor names must be unique, got {name} twice.")
        names.add(name)
        size = math.prod(shape) * dtype.itemsize
        if not shards or size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(_TensorSpec(name, make, tuple(shape), dtype, size))
        room -= size
    if not shards:
        raise ValueError("tensors must not be empty.")
    return shards


def _write_shard(file: BinaryIO, shard: list[_TensorSpec]) -> None:
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, _, shape, dtype, size in shard:
        header[name] = {"dtype": names[dtype], "shape": shape, "data_offsets": (end, end + size)}
        end += size
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # align the tensor data to 8 bytes
    file.write(len(raw).to_bytes(8, "little") + raw)
    file.writelines(_tensor_bytes(spec) for spec in shard)


def _tensor_bytes(spec: _TensorSpec) -> memoryview:
    tensor = spec.make()
    if tensor.shape != spec.shape or tensor.dtype != spec.dtype:
        raise ValueError(
            f"{spec.name} must be {list(spec.shape)} {spec.dtype} as declared, got {list(tensor.shape)} {tensor.dtype}."
        )
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
