"""The QKV projection of a decoded token: RMSNorm, product, bias, QK-norm, RoPE and the cache write, in one launch.

    h   = RMSNorm(x) with weight norm              as in kernels/norm.py
    qkv = h w^T + bias, rounded                    as in kernels/linear.py
    q   = rotated and normalised query heads       as in kernels/qk_norm_rope.py;
    keys, likewise, and values go to slot slots[b] of the caches

The kernel (csrc/decode_qkv.cu) takes up to 8 rows, a bias, RMSNorm as QK-norm and heads of 16 i <= 128 channels: each
block makes 16 channels of a head, and the last block of a head to finish does what needs the whole head. Other calls
are composed of the three ops, which is also the reference. A row's results do not depend on the rows beside it, bit
for bit.

Traffic: w once; memory-bound.
"""

import torch

from . import extension
from .backend import check_devices, mismatch
from .decode_linear import gemv_args
from .linear import linear
from .norm import rms_norm
from .qk_norm_rope import qk_norm_rope
from .registry import op

BLOCK_CHANNELS = 16  # of a head, made by one block of the kernel
MAX_CHANNELS = 128


def decode_qkv_reference(x, norm, w, bias, qk_norm, cos, sin, slots, k_cache, v_cache, eps):
    """The formula, composed of other ops, for any device and dtype. Shapes as in :func:`decode_qkv`."""
    h, _ = rms_norm(x, None, norm, eps=eps)
    qkv = linear(h, w, None, bias)
    return qk_norm_rope(qkv, qk_norm, None, cos, sin, slots, k_cache, v_cache, None, eps)


def _fake(x, norm, w, bias, qk_norm, cos, sin, slots, k_cache, v_cache, eps):
    _, Hkv, D = k_cache.shape
    return x.new_empty(x.shape[0], w.shape[0] // D - 2 * Hkv, D)


@op(
    "decode_qkv",
    "(Tensor x, Tensor norm, Tensor w, Tensor? bias, Tensor? qk_norm, Tensor cos, Tensor sin, Tensor slots, "
    "Tensor(a!) k_cache, Tensor(b!) v_cache, float eps) -> Tensor",
    kernel="cuda",
    fake=_fake,
)
def _decode_qkv(x, norm, w, bias, qk_norm, cos, sin, slots, k_cache, v_cache, eps):
    S, Hkv, D = k_cache.shape
    if (
        bias is not None
        and qk_norm is not None
        and qk_norm.dim() == 2
        and extension.runs_extension(x, norm, w, bias, qk_norm, k_cache, v_cache)
        and D % BLOCK_CHANNELS == 0
        and D <= MAX_CHANNELS
        and k_cache.stride(2) == v_cache.stride(2) == 1
        and (made := gemv_args(x, norm, w, eps))
    ):
        given, held = made
        B, heads = x.shape[0], qk_norm.shape[0] + Hkv
        others = [tensor.contiguous() for tensor in (bias, qk_norm, cos, sin, slots)]
        q, workspace = x.new_empty(B, heads - 2 * Hkv, D), x.new_empty(B, heads * D)
        described = extension.EXTENSION.Heads(
            heads - 2 * Hkv, Hkv, D, *[tensor.data_ptr() for tensor in (*others, q, k_cache, v_cache)],
            S, *k_cache.stride()[:2], *v_cache.stride()[:2],
        )  # fmt: skip
        counters = extension.counters(x, heads)
        extension.EXTENSION.decode_qkv(given, described, workspace.data_ptr(), counters.data_ptr(), extension.stream(x))
        del held, others  # until here: a copy among them must not be freed before its kernel is in the stream
        return q
    return decode_qkv_reference(x, norm, w, bias, qk_norm, cos, sin, slots, k_cache, v_cache, eps)


def decode_qkv(x, norm, w, bias, qk_norm, cos, sin, slots, k_cache, v_cache, eps):
    """Make one query row per sequence, and store its key and value in the cache.

    Args:
        x: [B, H], floating point; the kernel takes B <= 8 in float32 or bfloat16.
        norm: [H], dtype of ``x``: the weight of the RMSNorm of ``x``.
        w: [(Hq + 2 Hkv) * D, H], dtype of ``x``: query, key, value heads.
        bias: [(Hq + 2 Hkv) * D] like ``w``, or None.
        qk_norm: [Hq + Hkv, D], dtype of ``x``: one RMSNorm weight row per query head, then per key head; or
            [2, Hq + Hkv, D], weights and biases of LayerNorm; None for no QK-norm.
        cos, sin: [B, D / 2] float32 (or float64 with float64 ``x``), at each row's RoPE position.
        slots: [B] int64, distinct: the cache slot each row's key and value go to.
        k_cache, v_cache: [S, Hkv, D], dtype of ``x``; written in place.
        eps: added to the mean squares.

    Returns:
        q: [B, Hq, D], contiguous.

    Raises:
        ValueError: shapes, dtypes or devices disagree; the message names the offender.
        IndexError: a slot outside [0, S), from the reference on the CPU. Kernels cannot tell: they store neither the
            key nor the value of such a row.
    """
    B, H = x.shape
    _, Hkv, D = k_cache.shape
    dtype = x.dtype
    if D == 0 or D % 2:
        raise ValueError(f"decode_qkv: head_dim D={D} is not a positive even number; RoPE rotates pairs of channels")
    N = w.shape[0]
    heads = N // D - Hkv
    if heads <= Hkv or N % D:
        raise ValueError(f"decode_qkv: w must have (Hq + 2*{Hkv}) * {D} rows with Hq >= 1, got {N}")
    for name, tensor, shape in (
        ("norm", norm, (H,)),
        ("w", w, (N, H)),
        ("bias", bias, (N,)),
        ("qk_norm", qk_norm, (2, heads, D) if qk_norm is not None and qk_norm.dim() == 3 else (heads, D)),
        ("k_cache", k_cache, k_cache.shape),
        ("v_cache", v_cache, k_cache.shape),
    ):
        if tensor is None and name in ("bias", "qk_norm"):
            continue
        if tensor.shape != shape or tensor.dtype != dtype:
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
