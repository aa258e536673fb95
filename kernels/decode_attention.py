"""Attention of one query row per sequence: row b attends to the slots [starts[b], starts[b] + lengths[b]).

    out[b, h] = softmax(scale * q[b, h] . K) V   over the visible slots, zero for a row with no visible slot

Query head h reads KV head h // (Hq // Hkv). The query heads that share a KV head are processed together, so each key
and value is read once per sequence, not once per query head. Rounding as in :mod:`.attention`, except that the CUDA
kernel keeps probabilities in float32.

The CUDA kernel splits the keys of a sequence over up to 32 blocks. The last block to finish combines the partial
softmaxes in a fixed order (split-KV as in Flash-Decoding, Dao et al. 2023). The split depends only on the sequence
length, so results are bitwise independent of the rest of the batch. The Triton kernel of :mod:`.attention`, with query
blocks of one row, is the fallback where the CUDA kernel does not apply: float16, and heads that are not 1, 2, 4, ... 32
vectors of 16 bytes.

Traffic: K and V of every sequence once per 8 query heads of a KV head; memory-bound.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import extension
from .attention import check_heads, check_scale, launch_kernel
from .attention_tiles import runs_attention_kernel
from .backend import check_devices, mismatch, wants_gradient
from .registry import op


def decode_attention_reference(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, starts: Tensor, lengths: Tensor, scale: float
) -> Tensor:
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


_MAX_SPLITS, _MAX_HEADS = 32, 8  # as in csrc/decode_attention.cu: blocks per head tile, query heads per head tile


def _head_tiles(q: Tensor, k_cache: Tensor) -> int:
    """Number of head tiles of all sequences: groups of up to 8 query heads that share a KV head."""
    return q.shape[0] * k_cache.shape[1] * -(-q.shape[1] // k_cache.shape[1] // _MAX_HEADS)


def _kernel_supports(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> bool:
    """Whether the CUDA kernel supports these: a head is 1, 2, 4, ... 32 aligned vectors of 16 bytes."""
    vectors, rest = divmod(q.shape[2] * q.itemsize, 16)
    return (
        rest == 0
        and vectors in (1, 2, 4, 8, 16, 32)
        and _head_tiles(q, k_cache) <= extension.COUNTERS
        and all(
            x.stride(2) == 1 and not (x.data_ptr() | x.stride(0) * x.itemsize | x.stride(1) * x.itemsize) % 16
            for x in (q, k_cache, v_cache)
        )
    )


def _run_extension(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, starts: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    B, Hq, D = q.shape
    Hkv = k_cache.shape[1]
    group = Hq // Hkv
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if head_tiles := _head_tiles(q, k_cache):
        # Of each split and query head: D sums, the largest score and the sum of exponentials.
        workspace = q.new_empty(head_tiles * _MAX_SPLITS * min(group, _MAX_HEADS) * (D + 2), dtype=torch.float32)
        starts, lengths = starts.contiguous(), lengths.contiguous()
        args = extension.EXTENSION.DecodeAttentionArgs(
            q.dtype == torch.bfloat16, B, Hq, Hkv, D, *(x.data_ptr() for x in (q, k_cache, v_cache, out)),
            *(stride for x in (q, k_cache, v_cache) for stride in x.stride()[:2]),
            *(x.data_ptr() for x in (starts, lengths)), *(x.dtype == torch.int64 for x in (starts, lengths)),
            scale * math.log2(math.e),
        )  # fmt: skip
        counters = extension.counters(q, head_tiles)
        extension.EXTENSION.decode_attention(args, workspace.data_ptr(), counters.data_ptr(), extension.stream(q))
    return out


def _fake(q: Tensor, k_cache: Tensor, v_cache: Tensor, starts: Tensor, lengths: Tensor, scale: float) -> Tensor:
    return q.new_empty(q.shape)


@op(
    "decode_attention",
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor starts, Tensor lengths, float scale) -> Tensor",
    kernel="cuda, triton",
    fake=_fake,
)
def _decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, starts: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    if extension.runs_extension(q, k_cache, v_cache) and _kernel_supports(q, k_cache, v_cache):
        return _run_extension(q, k_cache, v_cache, starts, lengths, scale)
    if runs_attention_kernel(q) and not wants_gradient(k_cache, v_cache):
        rows, zeros = torch.arange(len(q), device=q.device), torch.zeros_like(starts)
        blocks = torch.stack([rows, rows + 1, starts, lengths, lengths, zeros, zeros], 1).int()
        return launch_kernel(q, k_cache, v_cache, lengths.int(), blocks, scale, block_rows=1)
    return decode_attention_reference(q, k_cache, v_cache, starts, lengths, scale)


def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, starts: Tensor, lengths: Tensor, scale: float | None = None
) -> Tensor:
    """Attend one query row per sequence to its contiguous range of cache slots.

    Args:
        q: [B, Hq, D], floating point.
        k_cache, v_cache: [S, Hkv, D], dtype of ``q``, Hkv a divisor of Hq.
        starts, lengths: [B] int32 or int64, first slot and number of slots of each sequence.
        scale: multiplies the scores, positive; D ** -0.5 when None.

    Returns:
        [B, Hq, D], contiguous.

    Raises:
        ValueError: a shape, dtype or device does not match, or the scale is not positive. The message names the
            argument.
        RuntimeError: a range exceeds the caches; raised by the reference only. Kernels do not check ranges, since that
            would synchronize the host.
    """
    B, _, D = q.shape
    check_heads("decode_attention", q, k_cache, v_cache)
    for name, bound in (("starts", starts), ("lengths", lengths)):
        if bound.shape != (B,) or bound.dtype not in (torch.int32, torch.int64):
            raise mismatch("decode_attention", name, bound, (B,), "int32 or int64")
    scale = check_scale("decode_attention", scale, D)
    check_devices("decode_attention", q=q, k_cache=k_cache, v_cache=v_cache, starts=starts, lengths=lengths)
    return _decode_attention(q, k_cache, v_cache, starts, lengths, scale)
