"""Tiling shared by the attention kernels: query blocks into (row, head) pairs, spans into tiles of slots.

Each of the two spans of a query block (see :mod:`.attention`) is split into whole tiles of BLOCK_N slots, visible to
every row, followed by tail tiles of BLOCK_TAIL slots, in which a row attends to the slots below a bound. A loop index
counts the tiles of the prefix first, then those of the own span:

    prefix  |   whole   |   whole   |tail|tail|       whole tiles end at full_end // BLOCK_N * BLOCK_N,
    own     |   whole   |tail|                        tail tiles cover the rest, up to part_end or own_end
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import runs_kernel
from .configs import Tiles
from .triton_language import INTERPRETED, TensorDescriptor, descriptor_memory, jit, tl, triton

Spans = tuple[int, int, int, int, int]
"""key_start, full_end, part_end, own_start, own_end of a query block."""

RowRange = tuple[int, int]
"""[start, end) of adjacent rows."""

MAX_BLOCK_ROWS = 128
"""Maximum rows of a query block."""

MAX_HEAD_DIM = 128
"""Maximum head dimension of the kernels; wider heads run the reference."""


@jit
def load_tile(
    source: tl.tensor, start: tl.tensor, end: tl.tensor, head: tl.tensor, row_stride: tl.tensor, head_stride: tl.tensor,
    D: tl.constexpr, D_BLOCK: tl.constexpr, ROWS: tl.constexpr, DESCRIPTOR: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Load slots [start, start + ROWS) of a KV head, [ROWS, D_BLOCK]; zero beyond channel D and, if set, ``end``."""
    if DESCRIPTOR:
        tile = source.load([start, head, 0]).reshape(ROWS, D_BLOCK)
    else:
        slot = start + tl.arange(0, ROWS)
        channel = tl.arange(0, D_BLOCK)
        address = source + slot[:, None].to(tl.int64) * row_stride + head * head_stride + channel[None, :]
        if end is not None:
            tile = tl.load(address, mask=(slot < end)[:, None] & (channel < D)[None, :], other=0.0)
        elif D != D_BLOCK:
            tile = tl.load(address, mask=(channel < D)[None, :], other=0.0)
        else:
            tile = tl.load(address)
    return tile


@jit
def query_tile(
    fields: tl.tensor, kv_head: tl.tensor, tile: tl.tensor, GROUP: tl.constexpr, BLOCK_M: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """(row, head, inside) of a tile's (row, query head) pairs, row-major: GROUP query heads per row of the block."""
    row_start = tl.load(fields)
    pair = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = pair < (tl.load(fields + 1) - row_start) * GROUP
    return row_start + pair // GROUP, kv_head * GROUP + pair % GROUP, inside


@jit
def load_spans(fields: tl.tensor) -> tl.tuple:
    """Load key_start, full_end, part_end, own_start, own_end of a query block."""
    return tl.load(fields + 2), tl.load(fields + 3), tl.load(fields + 4), tl.load(fields + 5), tl.load(fields + 6)


@jit
def whole_tiles(spans: tl.tuple, BLOCK_N: tl.constexpr) -> tl.tensor:
    """Number of whole tiles of both spans. Every row of the block attends to all their slots."""
    _, full_end, _, own_start, own_end = spans
    return full_end // BLOCK_N + (own_end - own_start) // BLOCK_N


@jit
def whole_tile(i: tl.tensor, spans: tl.tuple, BLOCK_N: tl.constexpr) -> tl.tensor:
    """First slot of the i-th whole tile; tiles of the prefix come first."""
    key_start, full_end, _, own_start, _ = spans
    of_prefix = full_end // BLOCK_N
    return tl.where(i < of_prefix, key_start + i * BLOCK_N, own_start + (i - of_prefix) * BLOCK_N)


@jit
def tail_tiles(spans: tl.tuple, BLOCK_N: tl.constexpr, BLOCK_TAIL: tl.constexpr) -> tl.tensor:
    """Number of tail tiles of both spans."""
    _, full_end, part_end, own_start, own_end = spans
    of_prefix = tl.cdiv(part_end - full_end // BLOCK_N * BLOCK_N, BLOCK_TAIL)
    return of_prefix + tl.cdiv((own_end - own_start) % BLOCK_N, BLOCK_TAIL)


@jit
def tail_tile(
    i: tl.tensor, limit: tl.tensor, spans: tl.tuple, BLOCK_N: tl.constexpr, BLOCK_TAIL: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """(first slot, end of its span, number of its slots visible to each row) of the i-th tail tile."""
    key_start, full_end, part_end, own_start, own_end = spans
    prefix = key_start + full_end // BLOCK_N * BLOCK_N
    own = own_start + (own_end - own_start) // BLOCK_N * BLOCK_N
    end = key_start + part_end
    of_prefix = tl.cdiv(end - prefix, BLOCK_TAIL)
    start = tl.where(i < of_prefix, prefix + i * BLOCK_TAIL, own + (i - of_prefix) * BLOCK_TAIL)
    seen = tl.where(i < of_prefix, key_start + limit, own_end) - start
    return start, tl.where(i < of_prefix, end, own_end), seen


def runs_attention_kernel(q: Tensor) -> bool:
    """Whether attention launches kernels. The interpreter also runs float64, for exact gradient checks."""
    return q.shape[-1] <= MAX_HEAD_DIM and runs_kernel(q, float64=INTERPRETED)


def rows_by_spans(blocks: list[list[int]]) -> dict[Spans, list[RowRange]]:
    """Group rows by spans (the last five columns): spans -> [start, end) row ranges, adjacent ranges merged."""
    groups: dict[Spans, list[RowRange]] = {}
    for start, end, key_start, full_end, part_end, own_start, own_end in blocks:
        ranges = groups.setdefault((key_start, full_end, part_end, own_start, own_end), [])
        if ranges and ranges[-1][1] == start:
            start, _ = ranges.pop()
        ranges.append((start, end))
    return groups


def visible_keys(cache: Tensor, spans: Spans, Hq: int) -> Tensor:
    """Gather the slots of both spans, [n, Hq, D], each KV head repeated for its group."""
    key_start, _, part_end, own_start, own_end = spans
    keys = torch.cat([cache[key_start : key_start + part_end], cache[own_start:own_end]])
    return keys.repeat_interleave(Hq // cache.shape[1], 1)


def masked_scores(q: Tensor, k: Tensor, limits: Tensor, spans: Spans, scale: float) -> Tensor:
    """Scaled scores [Hq, rows, n] of rows with these spans over :func:`visible_keys`, -inf where masked."""
    _, _, part_end, own_start, own_end = spans
    wide = torch.promote_types(q.dtype, torch.float32)
    seen = F.pad(torch.arange(part_end, device=q.device) < limits[:, None], (0, own_end - own_start), value=True)
    scores = torch.einsum("thd,shd->hts", q.to(wide), k.to(wide)) * scale
    return scores.masked_fill(~seen, -torch.inf)


def wide_dtype(x: Tensor) -> torch.dtype:
    """Dtype of softmax statistics over ``x``: float32 or wider."""
    return torch.promote_types(x.dtype, torch.float32)


def channel_block(D: int) -> int:
    """Channels of a tile: D padded to a power of two, at least the 16 that ``tl.dot`` needs."""
    power: int = triton.next_power_of_2(D)
    return max(16, power)


def shape_class(q: Tensor, block_rows: int = MAX_BLOCK_ROWS) -> str:
    """Shape class of the tile table for these queries."""
    if q.dtype.itemsize > 2:
        return "wide dtype"
    if block_rows * q.shape[1] <= 64:
        return "decode"
    return "head_dim 64" if q.shape[2] <= 64 else "head_dim 128"


def describe_tiles(
    k_cache: Tensor, v_cache: Tensor, D_BLOCK: int, tiles: Tiles
) -> tuple[Tensor | TensorDescriptor, Tensor | TensorDescriptor, Tiles]:
    """(K, V, tiles) for the kernel: TMA descriptors if the tiles use them and the caches allow it, else tensors."""
    if tiles["LOADS"] == "pointers" or not all(map(_fits_descriptor, (k_cache, v_cache))):
        return k_cache, v_cache, tiles | {"LOADS": "pointers"}
    if tiles["LOADS"] == "device descriptors":
        descriptor_memory(k_cache.device)
        return k_cache, v_cache, tiles
    block = [tiles["BLOCK_N"], 1, D_BLOCK]
    described = (TensorDescriptor(c, list(c.shape), list(c.stride()), block) for c in (k_cache, v_cache))
    return *described, tiles


def _fits_descriptor(cache: Tensor) -> bool:
    """TMA needs at least one slot, and a base address and strides that are multiples of 16 bytes."""
    aligned = all(stride * cache.itemsize % 16 == 0 for stride in cache.stride()[:2])
    return cache.shape[0] > 0 and cache.data_ptr() % 16 == 0 and aligned
