"""Attention of one query row per sequence: row b sees the slots [starts[b], starts[b] + lengths[b]).

    out[b, h] = softmax(scale * q[b, h] . K) V   over the visible slots, zero for a row that sees none

Query head h reads KV head h // (Hq // Hkv). The Hq // Hkv queries of a KV head are the rows of one small matrix, so
each key and value is read once per sequence, not once per query head. Rounding as in :mod:`.attention`;
the CUDA kernel leaves probabilities in float32.

The CUDA kernel splits the keys of a sequence among up to 32 blocks; the last of them to finish joins the partial
softmaxes, in order (split-KV as in Flash-Decoding, Dao et al. 2023). How it splits depends on the sequence's length
alone, so what else is in the batch changes no bit. Where the extension has no kernel (float16, head widths that do not
make a power of two of 16-byte vectors), the Triton kernel of :mod:`.attention` runs, on blocks of one
row.

Traffic: K and V of every sequence once, with more than 8 query heads a KV head once for every 8; memory-bound.
"""

import math

import torch
import torch.nn.functional as F

from . import extension
from .attention import check_heads, check_scale, launch_kernel, runs_attention_kernel
from .backend import check_devices, mismatch, wants_gradient
from .registry import op


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


_SPLITS, _MAX_HEADS = 32, 8  # blocks a sequence and KV head at most, and query heads a block, in decode_attention.cu


def _runs(q, k_cache):
    """How many runs of query heads that share a KV head the CUDA kernel makes of all sequences."""
    return q.shape[0] * k_cache.shape[1] * -(-q.shape[1] // k_cache.shape[1] // _MAX_HEADS)


def _takes(q, k_cache, v_cache):
    """Whether the CUDA kernel takes these: vectors of 16 bytes, of which a power of two of up to 32 make a head."""
    vectors, rest = divmod(q.shape[2] * q.itemsize, 16)
    return (
        rest == 0
        and vectors in (1, 2, 4, 8, 16, 32)
        and _runs(q, k_cache) <= extension.COUNTERS
        and all(
            x.stride(2) == 1 and not (x.data_ptr() | x.stride(0) * x.itemsize | x.stride(1) * x.itemsize) % 16
            for x in (q, k_cache, v_cache)
        )
    )


def _run_extension(q, k_cache, v_cache, starts, lengths, scale):
    B, Hq, D = q.shape
    Hkv = k_cache.shape[1]
    group = Hq // Hkv
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if runs := _runs(q, k_cache):
        workspace = q.new_empty(runs * _SPLITS * min(group, _MAX_HEADS) * (D + 2), dtype=torch.float32)
        starts, lengths = starts.contiguous(), lengths.contiguous()
        args = extension.EXTENSION.DecodeAttentionArgs(
            q.dtype == torch.bfloat16, B, Hq, Hkv, D, *(x.data_ptr() for x in (q, k_cache, v_cache, out)),
            *(stride for x in (q, k_cache, v_cache) for stride in x.stride()[:2]),
            *(x.data_ptr() for x in (starts, lengths)), *(x.dtype == torch.int64 for x in (starts, lengths)),
            scale * math.log2(math.e),
        )  # fmt: skip
        counters = extension.counters(q, runs)
        extension.EXTENSION.decode_attention(args, workspace.data_ptr(), counters.data_ptr(), extension.stream(q))
    return out


def _fake(q, k_cache, v_cache, starts, lengths, scale):
    return q.new_empty(q.shape)


@op(
    "decode_attention",
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor starts, Tensor lengths, float scale) -> Tensor",
    kernel="cuda, triton",
    fake=_fake,
)
def _decode_attention(q, k_cache, v_cache, starts, lengths, scale):
    if extension.runs_extension(q, k_cache, v_cache) and _takes(q, k_cache, v_cache):
        return _run_extension(q, k_cache, v_cache, starts, lengths, scale)
    if runs_attention_kernel(q) and not wants_gradient(k_cache, v_cache):
        rows, none = torch.arange(len(q), device=q.device), torch.zeros_like(starts)
        blocks = torch.stack([rows, rows + 1, starts, lengths, lengths, none, none], 1).int()
        return launch_kernel(q, k_cache, v_cache, lengths.int(), blocks, scale, block_rows=1)[0]
    return decode_attention_reference(q, k_cache, v_cache, starts, lengths, scale)


def decode_attention(q, k_cache, v_cache, starts, lengths, scale=None):
    """Attend one query row per sequence to its contiguous range of cache slots.

    Args:
        q: [B, Hq, D], floating point.
        k_cache, v_cache: [S, Hkv, D], dtype of ``q``, Hkv a divisor of Hq.
        starts, lengths: [B] int32 or int64, first slot and number of slots of each sequence, within the caches.
        scale: multiplies the scores, positive; D ** -0.5 when None.

    Returns:
        [B, Hq, D], contiguous.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or the scale is not positive; the message names the offender.
        RuntimeError: a range that leaves the caches, from the reference. Kernels, whose launch nothing waits for, read
            what is there.
    """
    B, _, D = q.shape
    check_heads("decode_attention", q, k_cache, v_cache)
    for name, bound in (("starts", starts), ("lengths", lengths)):
        if bound.shape != (B,) or bound.dtype not in (torch.int32, torch.int64):
            raise mismatch("decode_attention", name, bound, (B,), "int32 or int64")
    scale = check_scale("decode_attention", scale, D)
    check_devices("decode_attention", q=q, k_cache=k_cache, v_cache=v_cache, starts=starts, lengths=lengths)
    return _decode_attention(q, k_cache, v_cache, starts, lengths, scale)
