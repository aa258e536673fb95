"""Attention of packed query rows over KV-cache slots, masked by the query blocks of a plan.

Row r attends to exactly two spans of slots: its prefix [key_start, key_start + limits[r]) and its own span
[own_start, own_end). key_start, own_start and own_end come from the query block of the row. The spans do not overlap.
Query head h reads KV head h // (Hq // Hkv).

    out[r, h] = softmax(scale * q[r, h] . K) V   over the visible slots, zero for a row with no visible slot
    lse[h, r] = log sum exp(scale * q[r, h] . K), -inf for a row with no visible slot

A query block is a row of ``blocks``: row_start, row_end, key_start, full_end, part_end, own_start, own_end. Prefix keys
are counted from key_start. Keys below full_end are visible to every row of the block, keys in [full_end, part_end) to
rows with ``key < limits[row]``, and later keys to no row. The own span is visible to every row. Full tiles therefore
need no mask, and one integer per row covers every mask of the model: causal text, bidirectional images, and latents
that are being denoised. Scores and softmax are float32 or wider. Probabilities are rounded to the input dtype before
the product with V.

Kernel: a program processes BLOCK_M (row, query head) pairs of one KV head, row-major, so a tile of K and V serves all
query heads of its group. The whole tiles of both spans run in one software-pipelined loop, loaded by TMA if possible.
The remainder of each span runs in smaller tiles with a mask. Their loads are bounded, so slots outside the spans are
never read. Softmax is online (Milakov & Gimelshein 2018, arXiv:1805.02867; tiled as in FlashAttention-2, Dao 2023,
arXiv:2307.08691) in base 2. Warp specialization is off: Triton 3.6 and 3.7 fail to compile a specialized loop next to
another loop with ``tl.dot``, and one whose queries are not loaded by a descriptor.

Work: 4 Hq D flops per visible pair. Each query block reads K and V of its context once per KV head, mostly from L2.
The gradient is in :mod:`.attention_backward`.
"""

from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from . import configs
from .attention_backward import attention_lse_gradient
from .attention_tiles import (
    MAX_BLOCK_ROWS,
    RowRange,
    Spans,
    channel_block,
    describe_tiles,
    load_spans,
    load_tile,
    masked_scores,
    query_tile,
    rows_by_spans,
    runs_attention_kernel,
    shape_class,
    tail_tile,
    tail_tiles,
    visible_keys,
    whole_tile,
    whole_tiles,
    wide_dtype,
)
from .backend import mismatch, wants_gradient
from .registry import op
from .triton_language import dot, jit, tl, triton


def attention_reference(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, limits: Tensor, blocks: Tensor, scale: float
) -> Tensor:
    """The formula, in PyTorch, for any device and dtype. Shapes as in :func:`attention`."""
    groups = rows_by_spans(blocks.tolist())
    if len(groups) == 1:
        return _attend(q, k_cache, v_cache, limits, next(iter(groups)), scale)
    out = q.new_empty(q.shape)
    for spans, ranges in groups.items():
        attended = _attend(_concat_ranges(q, ranges), k_cache, v_cache, _concat_ranges(limits, ranges), spans, scale)
        for (start, end), part in zip(ranges, attended.split([end - start for start, end in ranges]), strict=True):
            out[start:end] = part
    return out


def _concat_ranges(rows: Tensor, ranges: list[RowRange]) -> Tensor:
    parts = [rows[start:end] for start, end in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _attend(q: Tensor, k_cache: Tensor, v_cache: Tensor, limits: Tensor, spans: Spans, scale: float) -> Tensor:
    """Attention of rows with the same spans. Each row has its own limit within the prefix."""
    key_start, full_end, part_end, own_start, own_end = spans
    own = own_end - own_start
    visible = [(start, size) for start, size in ((key_start, part_end), (own_start, own)) if size]
    if not visible:
        return q.new_zeros(q.shape)
    k, v = (_gather(cache, visible) for cache in (k_cache, v_cache))
    mask = None
    if full_end < part_end:
        mask = torch.arange(part_end, device=q.device) < limits.unsqueeze(1)
        if own:
            mask = F.pad(mask, (0, own), value=True)
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1).unsqueeze(0),
        k.transpose(0, 1).unsqueeze(0),
        v.transpose(0, 1).unsqueeze(0),
        attn_mask=mask,
        scale=scale,
        enable_gqa=True,
    )
    return out.squeeze(0).transpose(0, 1).contiguous()


def _gather(cache: Tensor, spans: list[tuple[int, int]]) -> Tensor:
    parts = [cache.narrow(0, start, size) for start, size in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def attention_lse_reference(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, limits: Tensor, blocks: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute (out, lse) by the formula, in PyTorch. Shapes as in :func:`attention`."""
    T, Hq, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    out, lse = q.new_empty(q.shape), q.new_empty(Hq, T, dtype=wide)
    for spans, ranges in rows_by_spans(blocks.tolist()).items():
        for start, end in ranges:
            k, v = (visible_keys(cache, spans, Hq) for cache in (k_cache, v_cache))
            scores = masked_scores(q[start:end], k, limits[start:end], spans, scale)
            lse[:, start:end] = scores.logsumexp(-1)
            weights = (scores - lse[:, start:end, None]).exp().nan_to_num(0)  # no key: -inf - -inf
            out[start:end] = torch.einsum("hts,shd->thd", weights.to(q.dtype).to(wide), v.to(wide))
    return out, lse


def attention_dense_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """Softmax attention under an explicit mask: the ground truth for every other implementation.

    Args:
        q: [T, Hq, D]; k, v: [S, Hkv, D]; mask: bool [T, S], True where row t attends to slot s.
        scale: multiplies the scores; D ** -0.5 when None.

    Returns:
        [T, Hq, D], zero for rows with no visible slot. Computed in the dtype of ``q``.
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("thd,shd->hts", q, k) * (q.shape[2] ** -0.5 if scale is None else scale)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1).masked_fill(~mask, 0)  # no key: softmax is nan
    return torch.einsum("hts,shd->thd", weights, v)


@jit(do_not_specialize=["T", "slots"])
def _attention_kernel(
    q_ptr: tl.tensor, k_ptr: tl.tensor, v_ptr: tl.tensor, k_tiles: tl.tensor, v_tiles: tl.tensor, limits_ptr: tl.tensor,
    blocks_ptr: tl.tensor, out_ptr: tl.tensor, lse_ptr: tl.tensor, T: tl.tensor, slots: tl.tensor, q_row: tl.tensor,
    k_row: tl.tensor, v_row: tl.tensor,
    q_head: tl.constexpr, k_head: tl.constexpr, v_head: tl.constexpr, SCALE: tl.constexpr, Hq: tl.constexpr,
    Hkv: tl.constexpr, D: tl.constexpr, D_BLOCK: tl.constexpr, TILES: tl.constexpr, WITH_LSE: tl.constexpr,
    LOADS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_TAIL: tl.constexpr,
) -> None:  # fmt: skip
    GROUP: tl.constexpr = Hq // Hkv
    WIDE: tl.constexpr = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    SCALE_LOG2: tl.constexpr = SCALE * 1.4426950408889634  # exp(x) = exp2(x log2(e)), folded into the scale
    DESCRIPTOR: tl.constexpr = LOADS != "pointers"
    if LOADS == "device descriptors":
        k_tiles = tl.make_tensor_descriptor(k_ptr, [slots, Hkv, D], [k_row, k_head, 1], [BLOCK_N, 1, D_BLOCK])
        v_tiles = tl.make_tensor_descriptor(v_ptr, [slots, Hkv, D], [v_row, v_head, 1], [BLOCK_N, 1, D_BLOCK])

    fields = blocks_ptr + tl.program_id(0) // TILES * 7
    kv_head = tl.program_id(1)
    if tl.program_id(0) % TILES * BLOCK_M >= (tl.load(fields + 1) - tl.load(fields)) * GROUP:
        return  # the grid has TILES tiles per block; a block with fewer rows leaves the last ones empty
    row, head, inside = query_tile(fields, kv_head, tl.program_id(0) % TILES, GROUP, BLOCK_M)
    channel = tl.arange(0, D_BLOCK)
    q_address = q_ptr + row.to(tl.int64)[:, None] * q_row + head[:, None] * q_head + channel[None, :]
    q = tl.load(q_address, mask=inside[:, None] & (channel < D)[None, :], other=0.0)
    limit = tl.load(limits_ptr + row, mask=inside, other=0)
    spans = load_spans(fields)

    largest = tl.full([BLOCK_M], float("-inf"), WIDE)  # running maximum of the scores, times log2(e)
    total = tl.zeros([BLOCK_M], WIDE)
    out = tl.zeros([BLOCK_M, D_BLOCK], WIDE)

    for i in tl.range(0, whole_tiles(spans, BLOCK_N)):
        start = whole_tile(i, spans, BLOCK_N)
        k = load_tile(k_tiles, start, None, kv_head, k_row, k_head, D, D_BLOCK, BLOCK_N, DESCRIPTOR)
        scores = dot(q, k.T, tl.zeros([BLOCK_M, BLOCK_N], WIDE))
        larger = tl.maximum(largest, tl.max(scores, 1) * SCALE_LOG2)
        p = tl.exp2(scores * SCALE_LOG2 - larger[:, None])
        shrink = tl.exp2(largest - larger)
        total = total * shrink + tl.sum(p, 1)
        v = load_tile(v_tiles, start, None, kv_head, v_row, v_head, D, D_BLOCK, BLOCK_N, DESCRIPTOR)
        out = dot(p.to(v.dtype), v, out * shrink[:, None])
        largest = larger

    for i in tl.range(0, tail_tiles(spans, BLOCK_N, BLOCK_TAIL)):
        start, end, seen = tail_tile(i, limit, spans, BLOCK_N, BLOCK_TAIL)
        k = load_tile(k_ptr, start, end, kv_head, k_row, k_head, D, D_BLOCK, BLOCK_TAIL, False)
        scores = dot(q, k.T, tl.zeros([BLOCK_M, BLOCK_TAIL], WIDE))
        scores = tl.where(tl.arange(0, BLOCK_TAIL)[None, :] < seen[:, None], scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1) * SCALE_LOG2)
        base = tl.where(larger == float("-inf"), 0.0, larger)  # no key yet: -inf - -inf is nan
        p = tl.exp2(scores * SCALE_LOG2 - base[:, None])
        shrink = tl.exp2(largest - base)
        total = total * shrink + tl.sum(p, 1)
        v = load_tile(v_ptr, start, end, kv_head, v_row, v_head, D, D_BLOCK, BLOCK_TAIL, False)
        out = dot(p.to(v.dtype), v, out * shrink[:, None])
        largest = larger

    # Recompute the indices: keeping them live across both loops would cost registers.
    row, head, inside = query_tile(fields, kv_head, tl.program_id(0) % TILES, GROUP, BLOCK_M)
    total = tl.where(total == 0, 1.0, total)  # no visible slot: out 0, lse -inf
    out = out / total[:, None]
    out_address = out_ptr + (row.to(tl.int64) * Hq + head)[:, None] * D + channel[None, :]
    tl.store(out_address, out.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (channel < D)[None, :])
    if WITH_LSE:
        lse = (largest + tl.log2(total)) * 0.6931471805599453
        tl.store(lse_ptr + head.to(tl.int64) * T + row, lse, mask=inside)


def launch_kernel(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, limits: Tensor, blocks: Tensor, scale: float,
    lse: Tensor | None = None, block_rows: int = MAX_BLOCK_ROWS,
) -> Tensor:  # fmt: skip
    """Launch the kernel; return ``out``, and write ``lse`` if it is given. ``block_rows`` bounds a block's rows."""
    T, Hq, D = q.shape
    S, Hkv, _ = k_cache.shape
    q, k_cache, v_cache = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k_cache, v_cache))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not T:
        return out
    tiles = configs.tiles("attention", shape_class(q, block_rows), q.device)
    D_BLOCK = channel_block(D)
    k_tiles, v_tiles, tiles = describe_tiles(k_cache, v_cache, D_BLOCK, tiles)
    tiles_of_block = triton.cdiv(block_rows * (Hq // Hkv), tiles["BLOCK_M"])
    _attention_kernel[(blocks.shape[0] * tiles_of_block, Hkv)](
        q, k_cache, v_cache, k_tiles, v_tiles, limits.contiguous(), blocks.contiguous(), out, lse, T, S,
        *(x.stride(0) for x in (q, k_cache, v_cache)), *(x.stride(1) for x in (q, k_cache, v_cache)),
        SCALE=scale, Hq=Hq, Hkv=Hkv, D=D, D_BLOCK=D_BLOCK, TILES=tiles_of_block, WITH_LSE=lse is not None, **tiles,
    )  # fmt: skip
    return out


_ARGUMENTS = "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor limits, Tensor blocks, float scale)"


def _fake(q: Tensor, k_cache: Tensor, v_cache: Tensor, limits: Tensor, blocks: Tensor, scale: float) -> Tensor:
    return q.new_empty(q.shape)


@op("attention", f"{_ARGUMENTS} -> Tensor", kernel="triton", fake=_fake)
def _attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, limits: Tensor, blocks: Tensor, scale: float) -> Tensor:
    if runs_attention_kernel(q):
        return launch_kernel(q, k_cache, v_cache, limits, blocks, scale)
    return attention_reference(q, k_cache, v_cache, limits, blocks, scale)


def _fake_lse(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, limits: Tensor, blocks: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=wide_dtype(q))


@op(
    "attention_lse",
    f"{_ARGUMENTS} -> (Tensor, Tensor)",
    kernel="triton",
    fake=_fake_lse,
    gradient=attention_lse_gradient,
)
def _attention_lse(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, limits: Tensor, blocks: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    if runs_attention_kernel(q):
        lse = torch.empty(q.shape[1], q.shape[0], dtype=wide_dtype(q), device=q.device)
        return launch_kernel(q, k_cache, v_cache, limits, blocks, scale, lse), lse
    return attention_lse_reference(q, k_cache, v_cache, limits, blocks, scale)


@overload
def attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, limits: Tensor, blocks: Tensor, scale: float | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, limits: Tensor, blocks: Tensor, scale: float | None = None,
    *, return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, limits: Tensor, blocks: Tensor, scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Attend packed query rows to the cache slots that the plan makes visible to each row.

    Differentiable in q, k_cache and v_cache.

    Args:
        q: [T, Hq, D], floating point.
        k_cache, v_cache: [S, Hkv, D], dtype of ``q``, Hkv a divisor of Hq.
        limits: [T] int32, number of prefix keys visible to each row.
        blocks: [n, 7] int32, the plan's query blocks, at most 128 rows each. They partition [0, T) in order.
        scale: multiplies the scores, positive; D ** -0.5 when None.
        return_lse: also return the log-sum-exp of each row's scores.

    Returns:
        out [T, Hq, D], contiguous; with ``return_lse`` (out, lse [Hq, T] float32, or float64 for float64 queries).

    Raises:
        ValueError: a shape or dtype does not match, or the scale is not positive. The message names the argument.
    """
    T, _, D = q.shape
    check_heads("attention", q, k_cache, v_cache)
    if limits.shape != (T,) or limits.dtype != torch.int32:
        raise mismatch("attention", "limits", limits, (T,), torch.int32)
    if blocks.dim() != 2 or blocks.shape[1] != 7 or blocks.dtype != torch.int32:
        raise mismatch("attention", "blocks", blocks, ("n", 7), torch.int32)
    scale = check_scale("attention", scale, D)
    if return_lse or wants_gradient(q, k_cache, v_cache):  # the backward needs the log-sum-exp
        out, lse = _attention_lse(q, k_cache, v_cache, limits, blocks, scale)
        return (out, lse) if return_lse else out
    return _attention(q, k_cache, v_cache, limits, blocks, scale)


def check_scale(op: str, scale: float | None, D: int) -> float:
    """Return the scale to use, D ** -0.5 by default. Raise ValueError for one that is not positive and finite."""
    if scale is None:
        return D**-0.5
    if not 0 < scale < float("inf"):
        raise ValueError(f"{op}: scale must be positive and finite, got {scale}.")
    return scale


def check_heads(op: str, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    """Raise ValueError if the shapes or dtypes of queries and caches do not match."""
    _, Hq, D = q.shape
    S, Hkv, _ = k_cache.shape
    if Hkv == 0 or Hq % Hkv:
        raise ValueError(f"{op}: query heads must be a multiple of KV heads, got {Hq} and {Hkv}.")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.shape != (S, Hkv, D) or cache.dtype != q.dtype:
            raise mismatch(op, name, cache, (S, Hkv, D), q.dtype)
