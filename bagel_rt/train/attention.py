"""Differentiable attention over a plan, as a few batched matrix products.

Rows that see nearly the same keys form a group. Groups of similar size are padded to a common size and computed as one
batch of two matrix products: one call per group takes ten times as long on a CPU, because training samples are short.
Scores are rounded to the input dtype. In bfloat16 this is faster than PyTorch's attention, whose backward is slow.

Masks and indexes depend only on the plan. Those of the latest plan are cached, because every layer uses the same plan.
"""

import weakref
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from bagel_rt.kernels import attention
from bagel_rt.kernels.attention_tiles import runs_attention_kernel
from bagel_rt.kernels.backend import wants_gradient

ROWS_STEP, KEYS_STEP = 16, 32
"""Groups share a batch if their row and key counts round up to the same multiples of these."""


class Batch(NamedTuple):
    """A batch of B groups, padded to R rows and K keys.

    Tensors are indexed as rows of one KV head each ([T, Hkv, ...] flattened), so that the gathered rows have the layout
    that ``bmm`` needs.
    """

    rows: torch.Tensor  # int64 [B * Hkv * R], row of q * Hkv + KV head; padded with the group's first row
    keys: torch.Tensor  # int64 [B * Hkv * K], slot * Hkv + KV head; padded with the group's first slot
    shape: tuple[int, int, int]  # B, R, K
    hidden: torch.Tensor | None  # bool [B, 1, R, 1, K], True = masked out; None without a mask


class Batches(NamedTuple):
    """The batches of a plan, and the index of each row and KV head in their concatenated outputs.

    ``position`` is int64 [T * Hkv]. Index 0 is a row of zeros, for rows without keys.
    """

    batches: list[Batch]
    position: torch.Tensor


def training_attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, limits: torch.Tensor, blocks: torch.Tensor
) -> torch.Tensor:
    """:func:`bagel_rt.kernels.attention.attention`, but batched and differentiable where no attention kernel runs."""
    if wants_gradient(q, k_cache, v_cache) and not runs_attention_kernel(q.detach()):
        return attention_batched(q, k_cache, v_cache, limits, blocks, q.shape[-1] ** -0.5)
    return attention(q, k_cache, v_cache, limits, blocks)


def attention_batched(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    limits: torch.Tensor,
    blocks: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """:func:`bagel_rt.kernels.attention.attention_reference` in operations that autograd differentiates."""
    T, Hq, D = q.shape
    Hkv = k_cache.shape[1]
    group = Hq // Hkv
    q = (q * scale).view(T * Hkv, group * D)
    k, v = (cache.reshape(-1, D) for cache in (k_cache, v_cache))
    plan = _cached_batches(limits, blocks, Hkv)
    outputs = [q.new_zeros(1, group * D)]  # output of rows without keys
    for rows, keys, (B, R, K), hidden in plan.batches:
        own_q = q.index_select(0, rows).view(B * Hkv, R * group, D)
        own_k, own_v = (x.index_select(0, keys).view(B * Hkv, K, D) for x in (k, v))
        scores = torch.bmm(own_q, own_k.transpose(1, 2))
        if hidden is not None:
            scores.view(B, Hkv, R, group, K).masked_fill_(hidden, -torch.inf)
        outputs.append(torch.bmm(scores.softmax(-1), own_v).view(B * Hkv * R, group * D))
    return torch.cat(outputs).index_select(0, plan.position).view(T, Hq, D)


class _CachedPlan(NamedTuple):
    """The batches of a plan, with weak references to its tensors. Versions detect in-place changes."""

    limits: weakref.ref[torch.Tensor]
    blocks: weakref.ref[torch.Tensor]
    versions: tuple[int, int, int]  # of limits and blocks, and Hkv
    batches: Batches


_latest: _CachedPlan | None = None


def _cached_batches(limits: torch.Tensor, blocks: torch.Tensor, Hkv: int) -> Batches:
    """The batches of a plan, reused while the plan stays the same."""
    global _latest
    versions = (limits._version, blocks._version, Hkv)
    if (
        _latest is None
        or _latest.limits() is not limits
        or _latest.blocks() is not blocks
        or _latest.versions != versions
    ):
        batches = plan_batches(limits.cpu().numpy(), blocks.cpu().numpy(), limits.device, Hkv)
        _latest = _CachedPlan(weakref.ref(limits), weakref.ref(blocks), versions, batches)
    return _latest.batches


def plan_batches(limits: np.ndarray, blocks: np.ndarray, device: torch.device, Hkv: int) -> Batches:
    """Plan the batches; ``limits`` and ``blocks`` as in :func:`bagel_rt.kernels.attention.attention`."""
    by_size: dict[tuple[int, int], list[_Group]] = {}
    for group in _groups(limits, blocks):
        size = (-(-len(group.rows) // ROWS_STEP), -(-len(group.keys) // KEYS_STEP))
        by_size.setdefault(size, []).append(group)
    heads = np.arange(Hkv)[:, None]
    position, batches, offset = np.zeros((len(limits), Hkv), np.int64), [], 1
    for groups in by_size.values():
        B, R, K = len(groups), max(len(group.rows) for group in groups), max(len(group.keys) for group in groups)
        rows, keys, hidden = np.zeros((B, R), np.int64), np.zeros((B, K), np.int64), np.zeros((B, R, K), bool)
        for b, group in enumerate(groups):
            n, m = group.hidden.shape
            rows[b], keys[b] = group.rows[0], group.keys[0]
            rows[b, :n], keys[b, :m] = group.rows, group.keys
            hidden[b, :, m:], hidden[b, :n, :m] = True, group.hidden
            position[group.rows] = offset + (b * Hkv + heads.T) * R + np.arange(n)[:, None]
        offset += B * Hkv * R
        row_index, key_index = (
            torch.from_numpy((index[:, None] * Hkv + heads).reshape(-1)).to(device) for index in (rows, keys)
        )
        mask = torch.from_numpy(hidden[:, None, :, None]).to(device) if hidden.any() else None
        batches.append(Batch(row_index, key_index, (B, R, K), mask))
    return Batches(batches, torch.from_numpy(position.reshape(-1)).to(device))


class _Group(NamedTuple):
    rows: np.ndarray  # [n]
    keys: np.ndarray  # [m], slots
    hidden: np.ndarray  # bool [n, m]


def _groups(limits: np.ndarray, blocks: np.ndarray) -> Iterator[_Group]:
    """Groups of rows with nearly the same keys: one per image, whose rows share all keys, and one for the text rows.

    Rows without keys are in no group.
    """
    by_spans: dict[tuple[int, int, int], list[np.ndarray]] = {}
    for start, end, key_start, _, _, own_start, own_end in blocks.tolist():
        by_spans.setdefault((key_start, own_start, own_end), []).append(np.arange(start, end))
    for (key_start, own_start, own_end), parts in by_spans.items():
        rows = np.concatenate(parts)
        rows = rows[(limits[rows] > 0) | (own_end > own_start)]
        # Many rows with the same limit are an image; text rows each have their own limit.
        _, limit_index, counts = np.unique(limits[rows], return_inverse=True, return_counts=True)
        images = np.flatnonzero(counts >= ROWS_STEP // 2)
        for selected in [limit_index == value for value in images] + [~np.isin(limit_index, images)]:
            if selected.any():
                group_limits = limits[rows[selected]]
                prefix = np.arange(group_limits.max())
                keys = np.concatenate([key_start + prefix, np.arange(own_start, own_end)])
                hidden = np.zeros((len(group_limits), len(keys)), bool)
                hidden[:, : len(prefix)] = prefix >= group_limits[:, None]
                yield _Group(rows[selected], keys, hidden)
