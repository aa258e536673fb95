"""Attention of one query row per sequence: row b sees the slots [starts[b], starts[b] + lengths[b]).

    out[b, h] = softmax(scale * q[b, h] . K) V   over the visible slots, zero for a row that sees none

Query head h reads KV head h // (Hq // Hkv). The Hq // Hkv queries of a KV head are the rows of one small matrix, so
each key and value is read once per sequence, not once per query head. Rounding as in :mod:`bagel_rt.kernels.attention`.

Its kernel is that of :mod:`bagel_rt.kernels.attention`, on blocks of one row.

Traffic: K and V of every sequence once; memory-bound.
"""

import torch
import torch.nn.functional as F
from torch.compiler import is_compiling

from bagel_rt.kernels.attention import check_heads, check_scale, launch_kernel, runs_attention_kernel


def decode_attention_reference(q, k_cache, v_cache, starts, lengths, scale):
    """The formula, in PyTorch, for any device and dtype. Shapes as in :func:`decode_attention`."""
    B, Hq, D = q.shape
    Hkv = k_cache.shape[1]
    q = q.reshape(B, Hkv, 1, Hq // Hkv, D)
    rows = []
    for row, start, length in zip(q.unbind(0), starts.tolist(), lengths.tolist(), strict=True):
        if length:
            k = k_cache.narrow(0, start, length).transpose(0, 1).unsqueeze(1)
            v = v_cache.narrow(0, start, length).transpose(0, 1).unsqueeze(1)
            row = F.scaled_dot_product_attention(row, k, v, scale=scale)
        else:
            row = torch.zeros_like(row)
        rows.append(row.reshape(1, Hq, D))
    if B == 1:
        return rows[0]
    return torch.cat(rows) if rows else q.new_empty(0, Hq, D)


torch.library.define(
    "bagel_rt::decode_attention",
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor starts, Tensor lengths, float scale) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


def _launch(q, k_cache, v_cache, starts, lengths, scale):
    if runs_attention_kernel(q):
        rows, none = torch.arange(len(q), device=q.device), torch.zeros_like(starts)
        blocks = torch.stack([rows, rows + 1, starts, lengths, lengths, none, none], 1).int()
        return launch_kernel(q, k_cache, v_cache, lengths.int(), blocks, scale, block_rows=1)[0]
    return decode_attention_reference(q, k_cache, v_cache, starts, lengths, scale)


torch.library.impl("bagel_rt::decode_attention", "default", _launch)


@torch.library.register_fake("bagel_rt::decode_attention")
def _fake(q, k_cache, v_cache, starts, lengths, scale):
    return q.new_empty(q.shape)


_decode_attention = torch.ops.bagel_rt.decode_attention.default


def decode_attention(q, k_cache, v_cache, starts, lengths, scale=None):
    """Attend one query row per sequence to its contiguous range of cache slots.

    Args:
        q: [B, Hq, D], floating point.
        k_cache, v_cache: [S, Hkv, D], dtype of ``q``, Hkv a divisor of Hq.
        starts, lengths: [B] int32 or int64, first slot and number of slots of each sequence.
        scale: multiplies the scores, positive; D ** -0.5 when None.

    Returns:
        [B, Hq, D], contiguous.

    Raises:
        ValueError: shapes or dtypes disagree, or the scale is not positive; the message names the offender.
    """
    B, _, D = q.shape
    check_heads("decode_attention", q, k_cache, v_cache)
    for name, bound in (("starts", starts), ("lengths", lengths)):
        if bound.shape != (B,) or bound.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"decode_attention: {name} is {tuple(bound.shape)} {bound.dtype}, expected {(B,)} int32 or int64"
            )
    scale = check_scale("decode_attention", scale, D)
    run = _decode_attention if is_compiling() else _launch
    return run(q, k_cache, v_cache, starts, lengths, scale)
