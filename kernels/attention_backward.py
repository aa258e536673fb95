"""Gradient of attention with respect to q, k and v, from the saved output and log-sum-exp.

With P = exp(scale q . K - lse) over the visible slots (see :mod:`.attention`), dO and dlse the gradients of the
outputs, and delta[r, h] = dO[r, h] . O[r, h] - dlse[h, r]:

    dV = P^T dO        dS = P * (dO V^T - delta)        dQ = scale dS K        dK = scale dS^T Q

dK and dV are summed over the query heads of a KV head and are zero for slots that no row attends to
(FlashAttention-2, Dao 2023, arXiv:2307.08691). Arithmetic is float32 or wider. P and dS are rounded to the input dtype
before a product.

Two kernels without atomics, so results are deterministic. The dQ kernel loops over the keys of each query tile, as the
forward does. The dK/dV kernel loops, for each tile of slots, over the query blocks that attend to it. That list is
built on the device (:func:`visits`): blocks for which the whole tile is visible come first and need no mask.

Work: 10 Hq D flops per visible pair, 14 with recomputation.
"""

from typing import Any

import torch
from torch import Tensor

from . import configs
from .attention_tiles import (
    MAX_BLOCK_ROWS,
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
from .registry import op
from .triton_language import dot, jit, tl, triton


def attention_backward_reference(
    grad: Tensor, grad_lse: Tensor | None, q: Tensor, k_cache: Tensor, v_cache: Tensor, out: Tensor, lse: Tensor,
    limits: Tensor, blocks: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The formula, in PyTorch, for any device and dtype. Shapes as in :func:`attention_backward`."""
    T, Hq, D = q.shape
    S, Hkv, _ = k_cache.shape
    wide = wide_dtype(q)
    delta = _delta(grad, grad_lse, out)
    dq = torch.zeros(T, Hq, D, dtype=wide, device=q.device)
    dk, dv = dq.new_zeros(S, Hkv, D), dq.new_zeros(S, Hkv, D)
    for spans, ranges in rows_by_spans(blocks.tolist()).items():
        key_start, _, part_end, own_start, own_end = spans
        k, v = (visible_keys(cache, spans, Hq).to(wide) for cache in (k_cache, v_cache))
        for start, end in ranges:
            rows = slice(start, end)
            scores = masked_scores(q[rows], k, limits[rows], spans, scale)
            p = (scores - lse[:, rows, None]).exp().nan_to_num(0)  # no key: -inf - -inf
            dp = torch.einsum("thd,shd->hts", grad[rows].to(wide), v)
            ds = p * (dp - delta[:, rows, None]) * scale
            dq[rows] = torch.einsum("hts,shd->thd", ds, k)
            dk_heads = torch.einsum("hts,thd->shd", ds, q[rows].to(wide))
            dv_heads = torch.einsum("hts,thd->shd", p, grad[rows].to(wide))
            for total, part in ((dk, dk_heads), (dv, dv_heads)):
                part = part.view(-1, Hkv, Hq // Hkv, D).sum(2)
                total[key_start : key_start + part_end] += part[:part_end]
                total[own_start:own_end] += part[part_end:]
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def _delta(grad: Tensor, grad_lse: Tensor | None, out: Tensor) -> Tensor:
    """delta [Hq, T] of the module docstring, contiguous."""
    wide = wide_dtype(out)
    delta = torch.einsum("thd,thd->ht", grad.to(wide), out.to(wide))
    return (delta if grad_lse is None else delta - grad_lse).contiguous()


@jit
def _load_queries(
    q_ptr: tl.tensor, grad_ptr: tl.tensor, lse_ptr: tl.tensor, delta_ptr: tl.tensor, row: tl.tensor, head: tl.tensor,
    inside: tl.tensor, T: tl.tensor, q_row: tl.tensor, grad_row: tl.tensor,
    q_head: tl.constexpr, grad_head: tl.constexpr, D: tl.constexpr, D_BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """(q, dO, lse times log2(e), delta) of a tile's pairs. Without a pair or a visible key lse is inf, so P = 0."""
    channel = tl.arange(0, D_BLOCK)
    stored = inside[:, None] & (channel < D)[None, :]
    row64 = row.to(tl.int64)
    q = tl.load(q_ptr + row64[:, None] * q_row + head[:, None] * q_head + channel[None, :], mask=stored, other=0.0)
    address = grad_ptr + row64[:, None] * grad_row + head[:, None] * grad_head + channel[None, :]
    grad = tl.load(address, mask=stored, other=0.0)
    statistic = head.to(tl.int64) * T + row
    lse = tl.load(lse_ptr + statistic, mask=inside, other=float("inf")) * 1.4426950408889634
    delta = tl.load(delta_ptr + statistic, mask=inside, other=0.0)
    return q, grad, tl.where(lse == float("-inf"), float("inf"), lse), delta


@jit(do_not_specialize=["T", "slots"])
def _dq_kernel(
    q_ptr: tl.tensor, k_ptr: tl.tensor, v_ptr: tl.tensor, k_tiles: tl.tensor, v_tiles: tl.tensor, grad_ptr: tl.tensor,
    lse_ptr: tl.tensor, delta_ptr: tl.tensor, limits_ptr: tl.tensor, blocks_ptr: tl.tensor, dq_ptr: tl.tensor,
    T: tl.tensor, slots: tl.tensor, q_row: tl.tensor, k_row: tl.tensor, v_row: tl.tensor, grad_row: tl.tensor,
    q_head: tl.constexpr, k_head: tl.constexpr, v_head: tl.constexpr, grad_head: tl.constexpr, SCALE: tl.constexpr,
    Hq: tl.constexpr, Hkv: tl.constexpr, D: tl.constexpr, D_BLOCK: tl.constexpr, TILES: tl.constexpr,
    LOADS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_TAIL: tl.constexpr,
) -> None:  # fmt: skip
    GROUP: tl.constexpr = Hq // Hkv
    WIDE: tl.constexpr = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    SCALE_LOG2: tl.constexpr = SCALE * 1.4426950408889634
    DESCRIPTOR: tl.constexpr = LOADS != "pointers"
    if LOADS == "device descriptors":
        k_tiles = tl.make_tensor_descriptor(k_ptr, [slots, Hkv, D], [k_row, k_head, 1], [BLOCK_N, 1, D_BLOCK])
        v_tiles = tl.make_tensor_descriptor(v_ptr, [slots, Hkv, D], [v_row, v_head, 1], [BLOCK_N, 1, D_BLOCK])
    fields = blocks_ptr + tl.program_id(0) // TILES * 7
    kv_head = tl.program_id(1)
    if tl.program_id(0) % TILES * BLOCK_M >= (tl.load(fields + 1) - tl.load(fields)) * GROUP:
        return
    row, head, inside = query_tile(fields, kv_head, tl.program_id(0) % TILES, GROUP, BLOCK_M)
    q, grad, lse, delta = _load_queries(q_ptr, grad_ptr, lse_ptr, delta_ptr, row, head, inside, T,
                                        q_row, grad_row, q_head, grad_head, D, D_BLOCK)  # fmt: skip
    limit = tl.load(limits_ptr + row, mask=inside, other=0)
    spans = load_spans(fields)
    dq = tl.zeros([BLOCK_M, D_BLOCK], WIDE)

    for i in tl.range(0, whole_tiles(spans, BLOCK_N)):
        start = whole_tile(i, spans, BLOCK_N)
        k = load_tile(k_tiles, start, None, kv_head, k_row, k_head, D, D_BLOCK, BLOCK_N, DESCRIPTOR)
        v = load_tile(v_tiles, start, None, kv_head, v_row, v_head, D, D_BLOCK, BLOCK_N, DESCRIPTOR)
        p = tl.exp2(dot(q, k.T, tl.zeros([BLOCK_M, BLOCK_N], WIDE)) * SCALE_LOG2 - lse[:, None])
        ds = p * (dot(grad, v.T, tl.zeros([BLOCK_M, BLOCK_N], WIDE)) - delta[:, None])
        dq = dot(ds.to(k.dtype), k, dq)

    for i in tl.range(0, tail_tiles(spans, BLOCK_N, BLOCK_TAIL)):
        start, end, seen = tail_tile(i, limit, spans, BLOCK_N, BLOCK_TAIL)
        visible = tl.arange(0, BLOCK_TAIL)[None, :] < seen[:, None]
        k = load_tile(k_ptr, start, end, kv_head, k_row, k_head, D, D_BLOCK, BLOCK_TAIL, False)
        v = load_tile(v_ptr, start, end, kv_head, v_row, v_head, D, D_BLOCK, BLOCK_TAIL, False)
        p = tl.exp2(dot(q, k.T, tl.zeros([BLOCK_M, BLOCK_TAIL], WIDE)) * SCALE_LOG2 - lse[:, None])
        ds = p * (dot(grad, v.T, tl.zeros([BLOCK_M, BLOCK_TAIL], WIDE)) - delta[:, None])
        dq = dot(tl.where(visible, ds, 0.0).to(k.dtype), k, dq)

    row, head, inside = query_tile(fields, kv_head, tl.program_id(0) % TILES, GROUP, BLOCK_M)
    channel = tl.arange(0, D_BLOCK)
    address = dq_ptr + (row.to(tl.int64) * Hq + head)[:, None] * D + channel[None, :]
    tl.store(address, (dq * SCALE).to(dq_ptr.dtype.element_ty), mask=inside[:, None] & (channel < D)[None, :])


@jit
def _visit(
    dk: tl.tensor, dv: tl.tensor, k: tl.tensor, v: tl.tensor, slot: tl.tensor, block: tl.tensor, kv_head: tl.tensor,
    q_ptr: tl.tensor, grad_ptr: tl.tensor, lse_ptr: tl.tensor, delta_ptr: tl.tensor, limits_ptr: tl.tensor,
    blocks_ptr: tl.tensor, T: tl.tensor, q_row: tl.tensor, grad_row: tl.tensor,
    q_head: tl.constexpr, grad_head: tl.constexpr, SCALE_LOG2: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    D_BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Accumulate the contribution of one query block to dk and dv of a tile of slots."""
    fields = blocks_ptr + block * 7
    pairs = (tl.load(fields + 1) - tl.load(fields)) * GROUP
    key_start, _, _, own_start, own_end = load_spans(fields)
    for tile in tl.range(0, tl.cdiv(pairs, BLOCK_M)):
        row, head, inside = query_tile(fields, kv_head, tile, GROUP, BLOCK_M)
        q, grad, lse, delta = _load_queries(q_ptr, grad_ptr, lse_ptr, delta_ptr, row, head, inside, T,
                                            q_row, grad_row, q_head, grad_head, D, D_BLOCK)  # fmt: skip
        p = tl.exp2(dot(k, q.T, tl.zeros([BLOCK_N, BLOCK_M], dk.dtype)) * SCALE_LOG2 - lse[None, :])
        if MASKED:
            limit = key_start + tl.load(limits_ptr + row, mask=inside, other=0)
            prefix = (slot >= key_start)[:, None] & (slot[:, None] < limit[None, :])
            visible = prefix | ((slot >= own_start) & (slot < own_end))[:, None]
            p = tl.where(visible, p, 0.0)
        dv = dot(p.to(grad.dtype), grad, dv)
        ds = p * (dot(v, grad.T, tl.zeros([BLOCK_N, BLOCK_M], dk.dtype)) - delta[None, :])
        if MASKED:
            ds = tl.where(visible, ds, 0.0)  # masked keys may hold NaN, and 0 * NaN is NaN
        dk = dot(ds.to(q.dtype), q, dk)
    return dk, dv


@jit(do_not_specialize=["T", "slots", "blocks"])
def _dk_dv_kernel(
    q_ptr: tl.tensor, k_ptr: tl.tensor, v_ptr: tl.tensor, grad_ptr: tl.tensor, lse_ptr: tl.tensor, delta_ptr: tl.tensor,
    limits_ptr: tl.tensor, blocks_ptr: tl.tensor, order_ptr: tl.tensor, counts_ptr: tl.tensor, dk_ptr: tl.tensor,
    dv_ptr: tl.tensor, T: tl.tensor, slots: tl.tensor, blocks: tl.tensor, q_row: tl.tensor, k_row: tl.tensor,
    v_row: tl.tensor, grad_row: tl.tensor,
    q_head: tl.constexpr, k_head: tl.constexpr, v_head: tl.constexpr, grad_head: tl.constexpr, SCALE: tl.constexpr,
    Hq: tl.constexpr, Hkv: tl.constexpr, D: tl.constexpr, D_BLOCK: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:  # fmt: skip
    GROUP: tl.constexpr = Hq // Hkv
    WIDE: tl.constexpr = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    SCALE_LOG2: tl.constexpr = SCALE * 1.4426950408889634
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    slot = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = load_tile(k_ptr, tile * BLOCK_N, slots, kv_head, k_row, k_head, D, D_BLOCK, BLOCK_N, False)
    v = load_tile(v_ptr, tile * BLOCK_N, slots, kv_head, v_row, v_head, D, D_BLOCK, BLOCK_N, False)
    dk = tl.zeros([BLOCK_N, D_BLOCK], WIDE)
    dv = tl.zeros([BLOCK_N, D_BLOCK], WIDE)
    full, seen = tl.load(counts_ptr + 2 * tile), tl.load(counts_ptr + 2 * tile + 1)
    order = order_ptr + tile.to(tl.int64) * blocks
    for i in range(full):
        dk, dv = _visit(dk, dv, k, v, slot, tl.load(order + i), kv_head, q_ptr, grad_ptr, lse_ptr, delta_ptr,
                        limits_ptr, blocks_ptr, T, q_row, grad_row, q_head, grad_head, SCALE_LOG2, GROUP, D, D_BLOCK,
                        BLOCK_M, BLOCK_N, False)  # fmt: skip
    for i in range(full, seen):
        dk, dv = _visit(dk, dv, k, v, slot, tl.load(order + i), kv_head, q_ptr, grad_ptr, lse_ptr, delta_ptr,
                        limits_ptr, blocks_ptr, T, q_row, grad_row, q_head, grad_head, SCALE_LOG2, GROUP, D, D_BLOCK,
                        BLOCK_M, BLOCK_N, True)  # fmt: skip
    channel = tl.arange(0, D_BLOCK)
    address = (slot.to(tl.int64) * Hkv + kv_head)[:, None] * D + channel[None, :]
    stored = (slot < slots)[:, None] & (channel < D)[None, :]
    tl.store(dk_ptr + address, (dk * SCALE).to(dk_ptr.dtype.element_ty), mask=stored)
    tl.store(dv_ptr + address, dv.to(dv_ptr.dtype.element_ty), mask=stored)


def visits(blocks: Tensor, slots: int, tile: int) -> tuple[Tensor, Tensor]:
    """List the query blocks that attend to each tile of slots. Runs on the device without a host synchronization.

    Args:
        blocks: [n, 7] int32, query blocks as in :func:`.attention.attention`.
        slots: number of slots of the cache.
        tile: slots per tile; the last tile may have fewer.

    Returns:
        order: int32 [tiles, n], block indices in three groups, each ascending: blocks whose rows all attend to the
            whole tile (no mask needed), blocks that may attend to part of it, and the rest.
        counts: int32 [tiles, 2], the size of the first group, and of the first two together.
    """
    start = torch.arange(0, slots, tile, device=blocks.device)[:, None]
    end = (start + tile).clamp(max=slots)
    _, _, key_start, full_end, part_end, own_start, own_end = blocks.unbind(1)
    full = ((start >= key_start) & (end <= key_start + full_end)) | ((start >= own_start) & (end <= own_end))
    seen = full | ((start < key_start + part_end) & (end > key_start)) | ((start < own_end) & (end > own_start))
    order = (2 - full.int() - seen.int()).argsort(dim=1, stable=True)
    return order.int(), torch.stack([full.sum(1), seen.sum(1)], 1).int()


def _launch_kernels(
    grad: Tensor, grad_lse: Tensor | None, q: Tensor, k_cache: Tensor, v_cache: Tensor, out: Tensor, lse: Tensor,
    limits: Tensor, blocks: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    T, Hq, D = q.shape
    S, Hkv, _ = k_cache.shape
    q, k_cache, v_cache, grad = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k_cache, v_cache, grad))
    limits, blocks, delta = limits.contiguous(), blocks.contiguous(), _delta(grad, grad_lse, out)
    dq = torch.empty(T, Hq, D, dtype=q.dtype, device=q.device)
    dk, dv = dq.new_empty(S, Hkv, D), dq.new_empty(S, Hkv, D)
    D_BLOCK = channel_block(D)
    strides = [x.stride(dim) for dim in (0, 1) for x in (q, k_cache, v_cache, grad)]
    sizes = {"SCALE": scale, "Hq": Hq, "Hkv": Hkv, "D": D, "D_BLOCK": D_BLOCK}
    if T:
        tiles = configs.tiles("attention_dq", shape_class(q), q.device)
        k_tiles, v_tiles, tiles = describe_tiles(k_cache, v_cache, D_BLOCK, tiles)
        tiles_of_block = triton.cdiv(MAX_BLOCK_ROWS * (Hq // Hkv), tiles["BLOCK_M"])
        _dq_kernel[(blocks.shape[0] * tiles_of_block, Hkv)](
            q, k_cache, v_cache, k_tiles, v_tiles, grad, lse, delta, limits, blocks, dq, T, S, *strides,
            TILES=tiles_of_block, **sizes, **tiles,
        )  # fmt: skip
    if S:
        tiles = configs.tiles("attention_dk_dv", shape_class(q), q.device)
        order, counts = visits(blocks, S, tiles["BLOCK_N"])
        _dk_dv_kernel[(order.shape[0], Hkv)](
            q, k_cache, v_cache, grad, lse, delta, limits, blocks, order, counts, dk, dv, T, S, len(blocks), *strides,
            **sizes, **tiles,
        )  # fmt: skip
    return dq, dk, dv


def _fake(
    grad: Tensor, grad_lse: Tensor | None, q: Tensor, k_cache: Tensor, v_cache: Tensor, out: Tensor, lse: Tensor,
    limits: Tensor, blocks: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), q.new_empty(k_cache.shape), q.new_empty(k_cache.shape)


@op(
    "attention_backward",
    "(Tensor grad, Tensor? grad_lse, Tensor q, Tensor k_cache, Tensor v_cache, Tensor out, Tensor lse, Tensor limits, "
    "Tensor blocks, float scale) -> (Tensor, Tensor, Tensor)",
    kernel="triton",
    fake=_fake,
)
def attention_backward(
    grad: Tensor, grad_lse: Tensor | None, q: Tensor, k_cache: Tensor, v_cache: Tensor, out: Tensor, lse: Tensor,
    limits: Tensor, blocks: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of :func:`.attention.attention`. Called by autograd.

    Args:
        grad: [T, Hq, D], gradient of ``out``; dtype of ``q``.
        grad_lse: [Hq, T], gradient of ``lse``, or None.
        q, k_cache, v_cache, limits, blocks, scale: the arguments of the forward.
        out, lse: [T, Hq, D] and [Hq, T], the results of the forward.

    Returns:
        (dq [T, Hq, D], dk [S, Hkv, D], dv [S, Hkv, D]), contiguous, in the dtype of ``q``.
    """
    launch = _launch_kernels if runs_attention_kernel(q) else attention_backward_reference
    return launch(grad, grad_lse, q, k_cache, v_cache, out, lse, limits, blocks, scale)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k_cache, v_cache, limits, blocks, out, lse = ctx.saved_tensors
    grad = torch.zeros_like(out) if grad is None else grad
    # Call the registered op: under torch.compile the backward is traced, and a direct call could not be.
    arguments = grad, grad_lse, q, k_cache, v_cache, out, lse, limits, blocks, ctx.scale
    gradients = torch.ops.bagel_rt.attention_backward(*arguments)
    return *gradients, None, None, None


attention_lse_gradient = _backward, _setup_context
