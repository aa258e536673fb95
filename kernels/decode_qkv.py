"""QKV projection for decoding: RMSNorm, product, bias, QK-norm, RoPE and the KV-cache write in one launch.

    h   = RMSNorm(x) with weight norm              as in kernels/norm.py
    qkv = h w^T + bias, rounded                    as in kernels/linear.py
    q   = normalized and rotated query heads       as in kernels/qk_norm_rope.py;
    keys, treated likewise, and values are written to slot slots[b] of the caches

The kernel (csrc/decode_qkv.cu) supports up to 8 rows, with a bias, an RMSNorm as QK-norm, and heads of 16 i <= 128
channels. Each block computes 16 channels of a head; the last block of a head to finish applies QK-norm and RoPE, which
need the whole head. Other calls, and the reference, compose the three ops. A row's results are bitwise independent of
the other rows.

Traffic: w once; memory-bound.
"""

import torch
from torch import Tensor

from . import extension
from .backend import check_devices, mismatch
from .decode_linear import gemv_args
from .linear import linear
from .norm import rms_norm
from .qk_norm_rope import qk_norm_rope
from .registry import op

BLOCK_CHANNELS = 16  # channels of a head per block of the kernel
MAX_CHANNELS = 128  # maximum head dimension of the kernel


def decode_qkv_reference(
    x: Tensor, norm: Tensor, w: Tensor, bias: Tensor | None, qk_norm: Tensor | None, cos: Tensor, sin: Tensor,
    slots: Tensor, k_cache: Tensor, v_cache: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    """The formula, composed of other ops, for any device and dtype. Shapes as in :func:`decode_qkv`."""
    h, _ = rms_norm(x, None, norm, eps=eps)
    qkv = linear(h, w, None, bias)
    return qk_norm_rope(qkv, qk_norm, None, cos, sin, slots, k_cache, v_cache, None, eps)


def _fake(
    x: Tensor, norm: Tensor, w: Tensor, bias: Tensor | None, qk_norm: Tensor | None, cos: Tensor, sin: Tensor,
    slots: Tensor, k_cache: Tensor, v_cache: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    _, Hkv, D = k_cache.shape
    return x.new_empty(x.shape[0], w.shape[0] // D - 2 * Hkv, D)


@op(
    "decode_qkv",
    "(Tensor x, Tensor norm, Tensor w, Tensor? bias, Tensor? qk_norm, Tensor cos, Tensor sin, Tensor slots, "
    "Tensor(a!) k_cache, Tensor(b!) v_cache, float eps) -> Tensor",
    kernel="cuda",
    fake=_fake,
)
def _decode_qkv(
    x: Tensor, norm: Tensor, w: Tensor, bias: Tensor | None, qk_norm: Tensor | None, cos: Tensor, sin: Tensor,
    slots: Tensor, k_cache: Tensor, v_cache: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    S, Hkv, D = k_cache.shape
    if (
        bias is not None
        and qk_norm is not None
        and qk_norm.dim() == 2
        and extension.runs_extension(x, norm, w, bias, qk_norm, k_cache, v_cache)
        and D % BLOCK_CHANNELS == 0
        and D <= MAX_CHANNELS
        and k_cache.stride(2) == v_cache.stride(2) == 1
        and (packed := gemv_args(x, norm, w, eps))
    ):
        args, tensors = packed
        B, heads = x.shape[0], qk_norm.shape[0] + Hkv
        copies = [tensor.contiguous() for tensor in (bias, qk_norm, cos, sin, slots)]
        q, workspace = x.new_empty(B, heads - 2 * Hkv, D), x.new_empty(B, heads * D)
        qkv_args = extension.EXTENSION.QkvArgs(
            heads - 2 * Hkv, Hkv, D, *[tensor.data_ptr() for tensor in (*copies, q, k_cache, v_cache)],
            S, *k_cache.stride()[:2], *v_cache.stride()[:2],
        )  # fmt: skip
        counters = extension.counters(x, heads)
        extension.EXTENSION.decode_qkv(args, qkv_args, workspace.data_ptr(), counters.data_ptr(), extension.stream(x))
        del tensors, copies  # keep contiguous copies alive until the kernel that reads them is enqueued
        return q
    return decode_qkv_reference(x, norm, w, bias, qk_norm, cos, sin, slots, k_cache, v_cache, eps)


def decode_qkv(
    x: Tensor, norm: Tensor, w: Tensor, bias: Tensor | None, qk_norm: Tensor | None, cos: Tensor, sin: Tensor,
    slots: Tensor, k_cache: Tensor, v_cache: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    """Compute one query row per sequence and store its key and value in the cache.

    Args:
        x: [B, H], floating point; the kernel supports B <= 8 in float32 or bfloat16.
        norm: [H], dtype of ``x``: weight of the RMSNorm applied to ``x``.
        w: [(Hq + 2 Hkv) * D, H], dtype of ``x``: query, key, value heads.
        bias: [(Hq + 2 Hkv) * D] like ``w``, or None.
        qk_norm: [Hq + Hkv, D], dtype of ``x``: one RMSNorm weight row per query head, then per key head; or
            [2, Hq + Hkv, D], weights and biases of LayerNorm; None for no QK-norm.
        cos, sin: [B, D / 2] float32 (or float64 with float64 ``x``), at each row's RoPE position.
        slots: [B] int64, distinct: the cache slot of each row's key and value.
        k_cache, v_cache: [S, Hkv, D], dtype of ``x``; written in place.
        eps: added to the mean squares.

    Returns:
        q: [B, Hq, D], contiguous.

    Raises:
        ValueError: a shape, dtype or device does not match. The message names the argument.
        IndexError: a slot is outside [0, S); raised by the reference on the CPU only. Kernels skip the write of such a
            row.
    """
    B, H = x.shape
    _, Hkv, D = k_cache.shape
    dtype = x.dtype
    if D == 0 or D % 2:
        raise ValueError(f"decode_qkv: head_dim must be positive and even, got {D}.")
    N = w.shape[0]
    heads = N // D - Hkv
    if heads <= Hkv or N % D:
        raise ValueError(f"decode_qkv: w must have (Hq + 2*{Hkv}) * {D} rows with Hq >= 1, got {N}.")
    for name, tensor, shape in (
        ("norm", norm, (H,)),
        ("w", w, (N, H)),
        ("bias", bias, (N,)),
        ("qk_norm", qk_norm, (2, heads, D) if qk_norm is not None and qk_norm.dim() == 3 else (heads, D)),
        ("k_cache", k_cache, k_cache.shape),
        ("v_cache", v_cache, k_cache.shape),
    ):
        if tensor is not None and (tensor.shape != shape or tensor.dtype != dtype):
            raise mismatch("decode_qkv", name, tensor, shape, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape != (B, D // 2) or table.dtype not in (torch.float32, wide):
            raise mismatch("decode_qkv", name, table, (B, D // 2), torch.float32)
    if slots.shape != (B,) or slots.dtype != torch.int64:
        raise mismatch("decode_qkv", "slots", slots, (B,), torch.int64)
    check_devices("decode_qkv", x=x, norm=norm, w=w, bias=bias, qk_norm=qk_norm, k_cache=k_cache, v_cache=v_cache)
    check_devices("decode_qkv", x=x, cos=cos, sin=sin, slots=slots)
    return _decode_qkv(x, norm, w, bias, qk_norm, cos, sin, slots, k_cache, v_cache, eps)
