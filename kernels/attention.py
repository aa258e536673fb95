"""Attention of packed rows over KV-cache slots, under the generalised causal mask of a plan.

Row r sees exactly the slots [key_start, key_start + limits[r]) and [own_start, own_end); the spans key_start and own
come from the query block the row is in. Query head h reads KV head h // (Hq // Hkv).

    out[r, h] = softmax(scale * q[r, h] . K) V   over the visible slots, zero for a row that sees none

A block is a row of ``blocks``: row_start, row_end, key_start, full_end, part_end, own_start, own_end. Of its keys,
counted from key_start, those below full_end are visible to every row of the block, those in [full_end, part_end) to
rows with ``key < limits[row]``, the rest to none; own keys are visible to all. So full tiles take no mask arithmetic,
and one integer per row replaces every mask the model needs: causal text, full images, latents being denoised.
Scores and softmax are float32 or wider; probabilities are rounded to the input dtype before they meet V.

Work: 4 Hq D flops per visible pair; K and V of a context are read once per block of queries.
"""

import torch
import torch.nn.functional as F
from torch.compiler import is_compiling


def attention_reference(q, k_cache, v_cache, limits, blocks, scale):
    """The formula, in PyTorch, for any device and dtype. Shapes as in :func:`attention`."""
    groups = _rows_by_spans(blocks.tolist())
    if len(groups) == 1:
        return _attend(q, k_cache, v_cache, limits, *groups, scale)
    out = q.new_empty(q.shape)
    for spans, ranges in groups.items():
        attended = _attend(_pick(q, ranges), k_cache, v_cache, _pick(limits, ranges), spans, scale)
        for (start, end), part in zip(ranges, attended.split([end - start for start, end in ranges]), strict=True):
            out[start:end] = part
    return out


def _rows_by_spans(blocks):
    """Spans (the last five columns) -> [start, end) ranges of the rows that have them, neighbours joined."""
    groups = {}
    for start, end, *spans in blocks:
        ranges = groups.setdefault(tuple(spans), [])
        if ranges and ranges[-1][1] == start:
            ranges[-1][1] = end
        else:
            ranges.append([start, end])
    return groups


def _pick(rows, ranges):
    parts = [rows[start:end] for start, end in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _attend(q, k_cache, v_cache, limits, spans, scale):
    """All rows of ``q`` see the same spans, each its own part of the prefix."""
    key_start, full_end, part_end, own_start, own_end = spans
    own = own_end - own_start
    spans = [(start, size) for start, size in ((key_start, part_end), (own_start, own)) if size]
    if not spans:
        return q.new_zeros(q.shape)
    k, v = (_gather(cache, spans) for cache in (k_cache, v_cache))
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


def _gather(cache, spans):
    parts = [cache.narrow(0, start, size) for start, size in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def attention_dense_reference(q, k, v, mask, scale=None):
    """Softmax attention under an explicit mask, written out: the judge of every other implementation.

    Args:
        q: [T, Hq, D]; k, v: [S, Hkv, D]; mask: bool [T, S], True where row t sees slot s.
        scale: multiplies the scores; D ** -0.5 when None.

    Returns:
        [T, Hq, D], zero for rows that see nothing. Computed in the dtype of ``q``.
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("thd,shd->hts", q, k) * (q.shape[2] ** -0.5 if scale is None else scale)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1).masked_fill(~mask, 0)  # no key: softmax is nan
    return torch.einsum("hts,shd->thd", weights, v)


torch.library.define(
    "bagel_rt::attention",
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor limits, Tensor blocks, float scale) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


def _launch(q, k_cache, v_cache, limits, blocks, scale):
    return attention_reference(q, k_cache, v_cache, limits, blocks, scale)


torch.library.impl("bagel_rt::attention", "default", _launch)


@torch.library.register_fake("bagel_rt::attention")
def _fake(q, k_cache, v_cache, limits, blocks, scale):
    return q.new_empty(q.shape)


_attention = torch.ops.bagel_rt.attention.default


def attention(q, k_cache, v_cache, limits, blocks, scale=None):
    """Attend packed query rows to cache slots, each row to the slots the plan shows it.

    Args:
        q: [T, Hq, D], floating point.
        k_cache, v_cache: [S, Hkv, D], dtype of ``q``, Hkv a divisor of Hq.
        limits: [T] int32, how many keys of its context each row sees.
        blocks: [n, 7] int32, the plan's query blocks; they cover [0, T) once, in order.
        scale: multiplies the scores; D ** -0.5 when None.

    Returns:
        [T, Hq, D], contiguous.

    Raises:
        ValueError: shapes or dtypes disagree; the message names the offender.
    """
    T, Hq, D = q.shape
    check_heads("attention", q, k_cache, v_cache)
    if limits.shape != (T,) or limits.dtype != torch.int32:
        raise ValueError(f"attention: limits is {tuple(limits.shape)} {limits.dtype}, expected {(T,)} torch.int32")
    if blocks.dim() != 2 or blocks.shape[1] != 7 or blocks.dtype != torch.int32:
        raise ValueError(f"attention: blocks is {tuple(blocks.shape)} {blocks.dtype}, expected (n, 7) torch.int32")
    run = _attention if is_compiling() else _launch
    return run(q, k_cache, v_cache, limits, blocks, D**-0.5 if scale is None else scale)


def check_heads(op, q, k_cache, v_cache):
    """Refuse queries and caches that do not fit together, in the name of ``op``."""
    _, Hq, D = q.shape
    S, Hkv, _ = k_cache.shape
    if Hkv == 0 or Hq % Hkv:
        raise ValueError(f"{op}: {Hq} query heads do not divide into groups over {Hkv} KV heads")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.shape != (S, Hkv, D) or cache.dtype != q.dtype:
            raise ValueError(f"{op}: {name} is {tuple(cache.shape)} {cache.dtype}, expected {(S, Hkv, D)} {q.dtype}")
