"""Attention where PyTorch differentiates: the rows of a plan in few batches of products.

Groups of rows that see nearly the same keys, padded to common lengths near their own, are a batch of two products: a
call per group takes ten times as long on a CPU, where the samples of a training batch are short. Scores are rounded to
the input dtype, as this is also the faster way in bfloat16: PyTorch's own attention has a slow bfloat16 gradient there.

Masks and indexes depend on the plan alone. They are kept for the plan that was seen last: every layer has the same.
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
"""Groups share a batch whose numbers of rows and keys lie between the same multiples of these."""


class Batch(NamedTuple):
    """Groups of one batch: B of them, with at most R rows and K keys.

    A tensor of n heads a row is taken as rows of one KV head each, so that what is gathered lies as products want it.
    """

    rows: torch.Tensor  # int64 [B * Hkv * R], row of q times Hkv plus KV head; padded by the group's first row
    keys: torch.Tensor  # int64 [B * Hkv * K], slot times Hkv plus KV head; padded by the group's first slot
    shape: tuple[int, int, int]  # B, R, K
    hidden: torch.Tensor | None  # bool [B, 1, R, 1, K], True where not visible; None if everything is


class Batches(NamedTuple):
    """A plan's batches, and where the output of each row and KV head lies among theirs, int64 [T * Hkv], from 1.

    0 of rows without keys.
    """

    batches: list[Batch]
    position: torch.Tensor


def training_attention(q, k_cache, v_cache, limits, blocks):
    """As :func:`bagel_rt.kernels.attention.attention`; where it has no kernel, PyTorch differentiates batches."""
    if wants_gradient(q, k_cache, v_cache) and not runs_attention_kernel(q.detach()):
        return attention_batched(q, k_cache, v_cache, limits, blocks, q.shape[-1] ** -0.5)
    return attention(q, k_cache, v_cache, limits, blocks)


def attention_batched(q, k_cache, v_cache, limits, blocks, scale):
    """As :func:`bagel_rt.kernels.attention.attention_reference`; autograd differentiates it."""
    T, Hq, D = q.shape
    Hkv = k_cache.shape[1]
    group = Hq // Hkv
    q = (q * scale).view(T * Hkv, group * D)
    k, v = (cache.reshape(-1, D) for cache in (k_cache, v_cache))
    plan = _planned(limits, blocks, Hkv)
    outputs = [q.new_zeros(1, group * D)]  # of the rows without keys
    for rows, keys, (B, R, K), hidden in plan.batches:
        own_q = q.index_select(0, rows).view(B * Hkv, R * group, D)
        own_k, own_v = (x.index_select(0, keys).view(B * Hkv, K, D) for x in (k, v))
        scores = torch.bmm(own_q, own_k.transpose(1, 2))
        if hidden is not None:
            scores.view(B, Hkv, R, group, K).masked_fill_(hidden, -torch.inf)
        outputs.append(torch.bmm(scores.softmax(-1), own_v).view(B * Hkv * R, group * D))
    return torch.cat(outputs).index_select(0, plan.position).view(T, Hq, D)


_last: tuple = (lambda: None, lambda: None, None, None)  # weak references to limits and blocks, versions, batches


def _planned(limits, blocks, Hkv) -> Batches:
    """The batches of a plan, kept while the next one asked for is the same."""
    global _last
    versions = (limits._version, blocks._version, Hkv)
    of_limits, of_blocks, kept, batches = _last
    if of_limits() is not limits or of_blocks() is not blocks or kept != versions:
        batches = plan_batches(limits.cpu().numpy(), blocks.cpu().numpy(), limits.device, Hkv)
        _last = (weakref.ref(limits), weakref.ref(blocks), versions, batches)
    return batches


def plan_batches(limits: np.ndarray, blocks: np.ndarray, device, Hkv: int) -> Batches:
    """The batches of a plan; ``limits`` and ``blocks`` as in :func:`bagel_rt.kernels.attention.attention`."""
    alike: dict[tuple[int, int], list[_Group]] = {}
    for group in _groups(limits, blocks):
        size = (-(-len(group.rows) // ROWS_STEP), -(-len(group.keys) // KEYS_STEP))
        alike.setdefault(size, []).append(group)
    heads = np.arange(Hkv)[:, None]
    position, batches, offset = np.zeros((len(limits), Hkv), np.int64), [], 1
    for groups in alike.values():
        B, R, K = len(groups), max(len(group.rows) for group in groups), max(len(group.keys) for group in groups)
        rows, keys, hidden = np.zeros((B, R), np.int64), np.zeros((B, K), np.int64), np.zeros((B, R, K), bool)
        for b, group in enumerate(groups):
            n, m = group.hidden.shape
            rows[b], keys[b] = group.rows[0], group.keys[0]
            rows[b, :n], keys[b, :m] = group.rows, group.keys
            hidden[b, :, m:], hidden[b, :n, :m] = True, group.hidden
            position[group.rows] = offset + (b * Hkv + heads.T) * R + np.arange(n)[:, None]
        offset += B * Hkv * R
        indexes = [torch.from_numpy((index[:, None] * Hkv + heads).reshape(-1)).to(device) for index in (rows, keys)]
        hidden = torch.from_numpy(hidden[:, None, :, None]).to(device) if hidden.any() else None
        batches.append(Batch(*indexes, (B, R, K), hidden))
    return Batches(batches, torch.from_numpy(position.reshape(-1)).to(device))


class _Group(NamedTuple):
    rows: np.ndarray  # [n]
    keys: np.ndarray  # [m], slots
    hidden: np.ndarray  # bool [n, m]


def _groups(limits: np.ndarray, blocks: np.ndarray) -> Iterator[_Group]:
    """Rows that see nearly the same keys, at least one: those of an image exactly the same, those of texts together."""
    by_spans: dict[tuple[int, int, int], list[np.ndarray]] = {}
    for start, end, key_start, _, _, own_start, own_end in blocks.tolist():
        by_spans.setdefault((key_start, own_start, own_end), []).append(np.arange(start, end))
    for (key_start, own_start, own_end), parts in by_spans.items():
        rows = np.concatenate(parts)
        rows = rows[(limits[rows] > 0) | (own_end > own_start)]
        _, which, counts = np.unique(limits[rows], return_inverse=True, return_counts=True)
        of_images = np.flatnonzero(counts >= ROWS_STEP // 2)
        for own in [which == value for value in of_images] + [~np.isin(which, of_images)]:
            if own.any():
                own_limits = limits[rows[own]]
                prefix = np.arange(own_limits.max())
                keys = np.concatenate([key_start + prefix, np.arange(own_start, own_end)])
                hidden = np.zeros((len(own_limits), len(keys)), bool)
                hidden[:, : len(prefix)] = prefix >= own_limits[:, None]
                yield _Group(rows[own], keys, hidden)
