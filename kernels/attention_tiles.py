"""How the kernels of attention walk a plan: query blocks in tiles of (row, head) pairs, their spans in tiles of slots.

The spans of a query block (see :mod:`.attention`) are cut into whole tiles of BLOCK_N slots that every
row sees, and small tiles of BLOCK_TAIL slots for what is left of both, where a row sees only the slots below a bound.
"""

import torch
import torch.nn.functional as F

from .backend import runs_kernel
from .triton_language import INTERPRETED, TensorDescriptor, descriptor_memory, jit, tl, triton

MAX_BLOCK_ROWS = 128
"""Most rows of a query block."""

MAX_HEAD_DIM = 128
"""Widest head the kernels take; the reference takes any."""


@jit
def load_tile(source, start, end, head, row_stride, head_stride, D: tl.constexpr, D_BLOCK: tl.constexpr,
              ROWS: tl.constexpr, DESCRIPTOR: tl.constexpr):  # fmt: skip
    """Slots [start, start + ROWS) of a KV head, [ROWS, D_BLOCK]; zero from channel D and, where given, slot ``end``."""
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
def query_tile(fields, kv_head, tile, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """(row, head, inside) of a tile's (row, query head) pairs: GROUP heads of the block's first row, then the next."""
    row_start = tl.load(fields)
    pair = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = pair < (tl.load(fields + 1) - row_start) * GROUP
    return row_start + pair // GROUP, kv_head * GROUP + pair % GROUP, inside


@jit
def load_spans(fields):
    """key_start, full_end, part_end, own_start, own_end of a block."""
    return tl.load(fields + 2), tl.load(fields + 3), tl.load(fields + 4), tl.load(fields + 5), tl.load(fields + 6)


@jit
def whole_tiles(spans, BLOCK_N: tl.constexpr):
    """Number of whole tiles that every row of the block sees: of the prefix, then of its own span."""
    _, full_end, _, own_start, own_end = spans
    return full_end // BLOCK_N + (own_end - own_start) // BLOCK_N


@jit
def whole_tile(i, spans, BLOCK_N: tl.constexpr):
    """First slot of the i-th whole tile."""
    key_start, full_end, _, own_start, _ = spans
    of_prefix = full_end // BLOCK_N
    return tl.where(i < of_prefix, key_start + i * BLOCK_N, own_start + (i - of_prefix) * BLOCK_N)


@jit
def tail_tiles(spans, BLOCK_N: tl.constexpr, BLOCK_TAIL: tl.constexpr):
    """Number of small tiles behind the whole ones: of the prefix, then of its own span."""
    _, full_end, part_end, own_start, own_end = spans
    of_prefix = tl.cdiv(part_end - full_end // BLOCK_N * BLOCK_N, BLOCK_TAIL)
    return of_prefix + tl.cdiv((own_end - own_start) % BLOCK_N, BLOCK_TAIL)


@jit
def tail_tile(i, limit, spans, BLOCK_N: tl.constexpr, BLOCK_TAIL: tl.constexpr):
    """(first slot, slot where its span ends, number of its slots that each row sees) of the i-th small tile."""
    key_start, full_end, part_end, own_start, own_end = spans
    prefix = key_start + full_end // BLOCK_N * BLOCK_N
    own = own_start + (own_end - own_start) // BLOCK_N * BLOCK_N
    end = key_start + part_end
    of_prefix = tl.cdiv(end - prefix, BLOCK_TAIL)
    start = tl.where(i < of_prefix, prefix + i * BLOCK_TAIL, own + (i - of_prefix) * BLOCK_TAIL)
    seen = tl.where(i < of_prefix, key_start + limit, own_end) - start
    return start, tl.where(i < of_prefix, end, own_end), seen


def runs_attention_kernel(q):
    """Whether attention launches kernels; in the interpreter also in float64, where gradients show exact."""
    return q.shape[-1] <= MAX_HEAD_DIM and runs_kernel(q, float64=INTERPRETED)


def rows_by_spans(blocks):
    """Spans (the last five columns) -> [start, end) ranges of the rows that have them, neighbours joined."""
    groups = {}
    for start, end, *spans in blocks:
        ranges = groups.setdefault(tuple(spans), [])
        if ranges and ranges[-1][1] == start:
            ranges[-1][1] = end
        else:
            ranges.append([start, end])
    return groups


def visible_keys(cache, spans, Hq):
    """The slots of a cache that the rows with these spans may see, [n, Hq, D]; each head repeated for its group."""
    key_start, _, part_end, own_start, own_end = spans
    keys = torch.cat([cache[key_start : key_start + part_end], cache[own_start:own_end]])
    return keys.repeat_interleave(Hq // cache.shape[1], 1)


def masked_scores(q, k, limits, spans, scale):
    """Scaled scores [Hq, rows, n] of rows with these spans over their :func:`visible_keys`, -inf where unseen."""
    _, _, part_end, own_start, own_end = spans
    wide = torch.promote_types(q.dtype, torch.float32)
    seen = F.pad(torch.arange(part_end, device=q.device) < limits[:, None], (0, own_end - own_start), value=True)
    scores = torch.einsum("thd,shd->hts", q.to(wide), k.to(wide)) * scale
    return scores.masked_fill(~seen, -torch.inf)


def wide_dtype(x):
    """The dtype of statistics over ``x``."""
    return torch.promote_types(x.dtype, torch.float32)


def block_of_channels(D):
    """Channels of a tile: a power of two that holds D, and that a matrix product can take."""
    return max(16, triton.next_power_of_2(D))


def shape_class(q, block_rows=MAX_BLOCK_ROWS):
    """Which entry of the table serves these queries."""
    if q.dtype.itemsize > 2:
        return "wide dtype"
    if block_rows * q.shape[1] <= 64:
        return "decode"
    return "head_dim 64" if q.shape[2] <= 64 else "head_dim 128"


def describe_tiles(k_cache, v_cache, D_BLOCK, tiles):
    """(K, V, tiles) as the kernel takes whole tiles: descriptors where wanted and possible, else the caches."""
    if tiles["LOADS"] == "pointers" or not all(map(_fits_descriptor, (k_cache, v_cache))):
        return k_cache, v_cache, tiles | {"LOADS": "pointers"}
    if tiles["LOADS"] == "device descriptors":
        descriptor_memory(k_cache.device)
        return k_cache, v_cache, tiles
    block = [tiles["BLOCK_N"], 1, D_BLOCK]
    described = (TensorDescriptor(c, list(c.shape), list(c.stride()), block) for c in (k_cache, v_cache))
    return *described, tiles


def _fits_descriptor(cache):
    """TMA wants at least one slot, and a base and strides that are multiples of 16 bytes."""
    aligned = all(stride * cache.itemsize % 16 == 0 for stride in cache.stride()[:2])
    return cache.shape[0] > 0 and cache.data_ptr() % 16 == 0 and aligned
