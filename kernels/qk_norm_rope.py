"""QK-norm, RoPE and the KV-cache write for the rows of a fused QKV projection.

Each row of ``qkv`` consists of Hq query heads, Hkv key heads and Hkv value heads of D channels. Every query and key
head ``h`` becomes

    x = h / sqrt(mean(h^2) + eps) * w                RMSNorm; w: [D] per head, from norm_first for rows [0, G),
                                                     from norm_rest for the others
    x = (h - mean(h)) / sqrt(var(h) + eps) * w + c   LayerNorm; c: [D] per head
    x = h                                            without QK-norm
    (a, b) = halves of x  ->  (a cos - b sin, b cos + a sin)

(QK-norm: Henry et al. 2020, arXiv:2010.04245, with RMSNorm in BAGEL and LayerNorm in Chameleon, arXiv:2405.09818; RoPE:
Su et al. 2021, arXiv:2104.09864, half-split pairing as in GPT-NeoX and Qwen2). Arithmetic is float32 (float64
for float64 rows), rounded once to the dtype of ``qkv``.

Values are copied. Keys and values of row r are written to slot ``slots[r]`` of the caches; other slots are unchanged.

The kernel processes one row per program. Traffic: reads qkv, writes q, k and v; memory-bound. The gradient is in
:mod:`.qk_norm_rope_backward`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import configs
from .backend import mismatch, runs_kernel, wants_gradient
from .norm import rows_contiguous, scale_rows_
from .qk_norm_rope_backward import qk_norm_rope_backward
from .registry import op
from .triton_language import jit, tl, triton


def qk_norm_rope_reference(
    qkv: Tensor, norm_first: Tensor | None, norm_rest: Tensor | None, cos: Tensor, sin: Tensor, slots: Tensor,
    k_cache: Tensor, v_cache: Tensor, G: int, eps: float,
) -> Tensor:  # fmt: skip
    """The formula, in PyTorch, for any device and dtype. Shapes as in :func:`qk_norm_rope`."""
    T = qkv.shape[0]
    _, Hkv, D = k_cache.shape
    heads = qkv.shape[1] // D - Hkv
    qk, v = qkv.view(T, heads + Hkv, D).split_with_sizes((heads, Hkv), 1)
    if qk.dtype.itemsize < 4:
        qk = qk.float()
    if norm_first is not None and norm_rest is not None:
        if norm_first.dim() == 3:
            qk = scale_rows_(F.layer_norm(qk, (D,), None, None, eps), norm_first[0], norm_rest[0], G)
            qk[:G] += norm_first[1]
            qk[G:] += norm_rest[1]
        else:
            qk = scale_rows_(F.rms_norm(qk, (D,), None, eps), norm_first, norm_rest, G)
    x = qk.reshape(T, heads, 2, D // 2)

    rotated = x * cos.view(T, 1, 1, D // 2)
    a, b = x.unbind(2)
    a_rotated, b_rotated = rotated.unbind(2)
    sin = sin.unsqueeze(1)
    a_rotated.addcmul_(b, sin, value=-1)
    b_rotated.addcmul_(a, sin)

    rotated = rotated.view(T, heads, D)
    if rotated.dtype != qkv.dtype:
        rotated = rotated.to(qkv.dtype)
    q, k = rotated.split_with_sizes((heads - Hkv, Hkv), 1)
    k_cache.index_copy_(0, slots, k)
    v_cache.index_copy_(0, slots, v)
    return q.contiguous()


@jit(do_not_specialize=["G", "S"], do_not_specialize_on_alignment=["slots_ptr"])  # slots may be a view
def _qk_norm_rope_kernel(
    qkv_ptr: tl.tensor, norm_first_ptr: tl.tensor, norm_rest_ptr: tl.tensor, cos_ptr: tl.tensor, sin_ptr: tl.tensor,
    slots_ptr: tl.tensor, q_ptr: tl.tensor, k_ptr: tl.tensor, v_ptr: tl.tensor, qkv_stride: tl.tensor,
    k_slot_stride: tl.tensor, k_head_stride: tl.tensor, k_column_stride: tl.tensor, v_slot_stride: tl.tensor,
    v_head_stride: tl.tensor, v_column_stride: tl.tensor, S: tl.tensor, G: tl.tensor, eps: tl.tensor,
    HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
    KV_HEADS: tl.constexpr, CHANNELS: tl.constexpr, LAYER_NORM: tl.constexpr,
) -> None:  # fmt: skip
    """One row per program: query and key heads as two tiles of half heads [HEADS, HALF], value heads as a third tile.

    Sizes are padded to powers of two. All loads precede the reduction, so none waits for it.
    """
    dtype = q_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    qkv_ptr += row * qkv_stride
    slot = tl.load(slots_ptr + row)
    stored_heads = tl.where((slot >= 0) & (slot < S), HKV, 0)  # an invalid slot must not write outside the cache

    head, i = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside = (head < HQ + HKV) & (i < D // 2)
    a = tl.load(qkv_ptr + head * D + i, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(qkv_ptr + head * D + D // 2 + i, mask=inside, other=0.0).to(tl.float32)
    if norm_first_ptr is not None:
        norm_ptr = tl.where(row < G, norm_first_ptr, norm_rest_ptr) + head * D + i
        norm_a = tl.load(norm_ptr, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
        norm_b = tl.load(norm_ptr + D // 2, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
        if LAYER_NORM:
            bias_ptr = norm_ptr + (HQ + HKV) * D
            bias_a = tl.load(bias_ptr, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
            bias_b = tl.load(bias_ptr + D // 2, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
    cos = tl.load(cos_ptr + row * (D // 2) + i, mask=i < D // 2, other=0.0)
    sin = tl.load(sin_ptr + row * (D // 2) + i, mask=i < D // 2, other=0.0)
    kv_head, channel = tl.arange(0, KV_HEADS)[:, None], tl.arange(0, CHANNELS)[None, :]
    kept = (kv_head < HKV) & (channel < D)
    v = tl.load(qkv_ptr + (HQ + HKV + kv_head) * D + channel, mask=kept)

    if norm_first_ptr is not None:
        if LAYER_NORM:
            mean = tl.sum(a + b, axis=1, keep_dims=True) / D
            a = tl.where(inside, a - mean, 0.0)
            b = tl.where(inside, b - mean, 0.0)
        scale = tl.rsqrt(tl.sum(a * a + b * b, axis=1, keep_dims=True) / D + eps)
        a *= scale * norm_a
        b *= scale * norm_b
        if LAYER_NORM:
            a += bias_a
            b += bias_b
    rotated_a = (a * cos - b * sin).to(dtype)
    rotated_b = (b * cos + a * sin).to(dtype)

    q_ptr += row * (HQ * D) + head * D + i
    tl.store(q_ptr, rotated_a, mask=inside & (head < HQ))
    tl.store(q_ptr + D // 2, rotated_b, mask=inside & (head < HQ))
    k_ptr += slot * k_slot_stride + (head - HQ) * k_head_stride + i * k_column_stride
    cached = inside & (head >= HQ) & (head < HQ + stored_heads)
    tl.store(k_ptr, rotated_a, mask=cached)
    tl.store(k_ptr + D // 2 * k_column_stride, rotated_b, mask=cached)
    v_ptr += slot * v_slot_stride + kv_head * v_head_stride + channel * v_column_stride
    tl.store(v_ptr, v, mask=kept & (kv_head < stored_heads))


def _run_kernel(
    qkv: Tensor, norm_first: Tensor | None, norm_rest: Tensor | None, cos: Tensor, sin: Tensor, slots: Tensor,
    k_cache: Tensor, v_cache: Tensor, G: int, eps: float,
) -> Tensor:  # fmt: skip
    T, (S, Hkv, D) = qkv.shape[0], k_cache.shape
    Hq = qkv.shape[1] // D - 2 * Hkv
    q = qkv.new_empty(T, Hq, D)
    if T == 0:
        return q
    heads, half = triton.next_power_of_2(Hq + Hkv), triton.next_power_of_2(D // 2)
    tiles = configs.tiles("qk_norm_rope", "narrow" if heads * half <= 2048 else "wide", qkv.device)
    qkv = rows_contiguous(qkv)
    norms = (norm if norm is None else norm.contiguous() for norm in (norm_first, norm_rest))
    _qk_norm_rope_kernel[(T,)](
        qkv, *norms, cos.contiguous(), sin.contiguous(), slots.contiguous(),
        q, k_cache, v_cache, qkv.stride(0), *k_cache.stride(), *v_cache.stride(), S, G, eps,
        HQ=Hq, HKV=Hkv, D=D, HEADS=heads, HALF=half, KV_HEADS=triton.next_power_of_2(Hkv),
        CHANNELS=triton.next_power_of_2(D), LAYER_NORM=norm_first is not None and norm_first.dim() == 3, **tiles,
    )  # fmt: skip
    return q


def _fake(
    qkv: Tensor, norm_first: Tensor | None, norm_rest: Tensor | None, cos: Tensor, sin: Tensor, slots: Tensor,
    k_cache: Tensor, v_cache: Tensor, G: int, eps: float,
) -> Tensor:  # fmt: skip
    _, Hkv, D = k_cache.shape
    return qkv.new_empty(qkv.shape[0], qkv.shape[1] // D - 2 * Hkv, D)


@op(
    "qk_norm_rope",
    "(Tensor qkv, Tensor? norm_first, Tensor? norm_rest, Tensor cos, Tensor sin, Tensor slots, Tensor(a!) k_cache, "
    "Tensor(b!) v_cache, SymInt G, float eps) -> Tensor",
    kernel="triton",
    fake=_fake,
)
def _qk_norm_rope(
    qkv: Tensor, norm_first: Tensor | None, norm_rest: Tensor | None, cos: Tensor, sin: Tensor, slots: Tensor,
    k_cache: Tensor, v_cache: Tensor, G: int, eps: float,
) -> Tensor:  # fmt: skip
    run = _run_kernel if runs_kernel(qkv, norm_first, norm_rest) else qk_norm_rope_reference
    return run(qkv, norm_first, norm_rest, cos, sin, slots, k_cache, v_cache, G, eps)


class _Differentiable(torch.autograd.Function):
    """The op with its gradient. ``torch.library`` does not support gradients of ops that mutate their arguments."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, norm_first: Tensor | None, norm_rest: Tensor | None, cos: Tensor, sin: Tensor,
        slots: Tensor, k_cache: Tensor, v_cache: Tensor, G: int, eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        q = _qk_norm_rope(qkv, norm_first, norm_rest, cos, sin, slots, k_cache, v_cache, G, eps)
        ctx.save_for_backward(qkv, norm_first, norm_rest, cos, sin, slots)
        ctx.numbers = (G, eps)
        ctx.mark_dirty(k_cache, v_cache)
        return q, k_cache, v_cache

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        qkv, norm_first, norm_rest, cos, sin, slots = ctx.saved_tensors
        gradients = qk_norm_rope_backward(dq, dk, dv, qkv, norm_first, norm_rest, cos, sin, slots, *ctx.numbers)
        caches: list[Tensor | None] = [None, None]
        if ctx.needs_input_grad[6] or ctx.needs_input_grad[7]:
            caches = [grad.index_fill(0, slots, 0) for grad in (dk, dv)]  # the op overwrote these slots
        return *gradients, None, None, None, *caches, None, None


def qk_norm_rope(
    qkv: Tensor, norm_first: Tensor | None, norm_rest: Tensor | None, cos: Tensor, sin: Tensor, slots: Tensor,
    k_cache: Tensor, v_cache: Tensor, G: int | None, eps: float,
) -> Tensor:  # fmt: skip
    """Normalize and rotate query and key heads; store keys and values in the cache.

    Differentiable, also through the caches unless they are leaves that require a gradient, or views.

    Args:
        qkv: [T, (Hq + 2 Hkv) * D], floating point: query heads, key heads, value heads.
        norm_first, norm_rest: [Hq + Hkv, D], dtype of ``qkv``, for rows [0, G) and [G, T): one RMSNorm weight row per
            query head, then per key head; or [2, Hq + Hkv, D], weights and biases of a LayerNorm. Without ``norm_rest``
            all rows use ``norm_first``; with neither, no QK-norm.
        cos, sin: [T, D / 2] float32 (or float64 with float64 ``qkv``), at each row's RoPE position.
        slots: [T] int64, distinct: the cache slot of each row's key and value.
        k_cache, v_cache: [S, Hkv, D], dtype of ``qkv``; written in place.
        G: number of rows of the first group, 0 <= G <= T; ignored without ``norm_rest``.
        eps: added to the mean square or the variance.

    Returns:
        q: [T, Hq, D], contiguous.

    Raises:
        ValueError: a shape, dtype or G does not match. The message names the argument.
        IndexError: a slot is outside [0, S); raised by the reference on the CPU. On CUDA the reference fails with a
            device-side assertion. The kernel skips the write of such a row.
    """
    T, width = qkv.shape
    _, Hkv, D = k_cache.shape
    dtype = qkv.dtype
    if norm_rest is None:
        norm_rest, G = norm_first, T
    if G is None or not 0 <= G <= T:
        raise ValueError(f"qk_norm_rope: G must be from 0 to {T}, the rows of qkv, got {G}.")
    if D == 0 or D % 2:
        raise ValueError(f"qk_norm_rope: head_dim must be positive and even, got {D}.")
    heads = width // D - Hkv
    if heads <= Hkv or width % D:
        raise ValueError(f"qk_norm_rope: qkv must have (Hq + 2*{Hkv}) * {D} columns with Hq >= 1, got {width}.")
    _check_norms(norm_first, norm_rest, heads, D, dtype)
    if v_cache.shape != k_cache.shape or v_cache.dtype != dtype:
        raise mismatch("qk_norm_rope", "v_cache", v_cache, k_cache.shape, dtype)
    if k_cache.dtype != dtype:
        raise mismatch("qk_norm_rope", "k_cache", k_cache, k_cache.shape, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape != (T, D // 2) or table.dtype not in (torch.float32, wide):
            raise mismatch("qk_norm_rope", name, table, (T, D // 2), torch.float32)
    if slots.shape != (T,) or slots.dtype != torch.int64:
        raise mismatch("qk_norm_rope", "slots", slots, (T,), torch.int64)
    if wants_gradient(qkv, norm_first, norm_rest, k_cache, v_cache):
        return _Differentiable.apply(qkv, norm_first, norm_rest, cos, sin, slots, k_cache, v_cache, G, eps)[0]
    return _qk_norm_rope(qkv, norm_first, norm_rest, cos, sin, slots, k_cache, v_cache, G, eps)


def _check_norms(norm_first: Tensor | None, norm_rest: Tensor | None, heads: int, D: int, dtype: torch.dtype) -> None:
    layer_norm = norm_first is not None and norm_first.dim() == 3
    shape = (2, heads, D) if layer_norm else (heads, D)
    for name, norm in (("norm_first", norm_first), ("norm_rest", norm_rest)):
        if norm is not None and (norm.shape != shape or norm.dtype != dtype):
            raise mismatch("qk_norm_rope", name, norm, shape, dtype)
    if norm_first is None and norm_rest is not None:
        raise ValueError("qk_norm_rope: norm_first must be given with norm_rest, got None.")
