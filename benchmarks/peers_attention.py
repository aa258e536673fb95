"""What else computes attention: the official composition, torch's SDPA with each backend, FlexAttention.

As in :mod:`benchmarks.peers`, what can be done once per request is done beforehand and not timed: K and V are gathered
or expanded, masks are built.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from bagel_rt.kernels.attention import attention_reference, rows_by_spans
from bagel_rt.kernels.decode_attention import decode_attention_reference
from benchmarks.peers import Contender, Unsuitable, one


class _Group(NamedTuple):
    """Rows that see the same spans: their queries, keys and values, [1, heads, n, D] each, and their mask."""

    ranges: list[list[int]]
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: object
    spans: list[tuple[int, int]]


def _groups(q, k_cache, v_cache, limits, blocks) -> list[_Group]:
    """One call of SDPA each. The mask is None, torch's lower-right causal bias where it is that, or bool."""
    groups = []
    for (key_start, full_end, part_end, own_start, own_end), ranges in rows_by_spans(blocks.tolist()).items():
        rows = torch.cat([torch.arange(start, end, device=q.device) for start, end in ranges])
        spans = [(key_start, key_start + part_end), (own_start, own_end)]
        k, v = (
            torch.cat([cache[start:end] for start, end in spans]).transpose(0, 1)[None] for cache in (k_cache, v_cache)
        )
        mask = None
        if full_end < part_end:
            seen = limits[rows].long()
            if own_start == own_end and torch.equal(seen, part_end - len(rows) + 1 + torch.arange(len(rows)).to(seen)):
                mask = causal_lower_right(len(rows), part_end)
            else:
                mask = torch.arange(part_end, device=q.device) < seen[:, None]
                mask = F.pad(mask, (0, own_end - own_start), value=True)
        groups.append(_Group(ranges, q[rows].transpose(0, 1)[None], k, v, mask, spans))
    return groups


def _ungrouped(q, groups):
    def outputs(made):
        out = torch.empty_like(q)
        for group, part in zip(groups, made, strict=True):
            part = part[0].transpose(0, 1)
            sizes = [end - start for start, end in group.ranges]
            for (start, end), rows in zip(group.ranges, part.split(sizes), strict=True):
                out[start:end] = rows
        return (out,)

    return outputs


def sdpa(backend: SDPBackend | None, expand: bool = False):
    """torch's SDPA, one call per group of rows with equal spans, K and V gathered beforehand."""

    def make(q, k_cache, v_cache, limits, blocks, scale=None, return_lse=False):
        if return_lse:
            raise Unsuitable("gives no log-sum-exp")
        if backend is SDPBackend.MATH and q.shape[0] * k_cache.shape[0] > 2**26:
            raise Unsuitable("would hold every score at once")
        groups = _groups(q, k_cache, v_cache, limits, blocks)
        if expand:
            share = q.shape[1] // k_cache.shape[1]
            groups = [g._replace(k=g.k.repeat_interleave(share, 1), v=g.v.repeat_interleave(share, 1)) for g in groups]

        def run():
            return [
                F.scaled_dot_product_attention(g.q, g.k, g.v, g.mask, scale=scale, enable_gqa=not expand)
                for g in groups
            ]

        return Contender(_with_backend(backend, run), _ungrouped(q, groups))

    make.__doc__ = sdpa.__doc__
    return make


def _with_backend(backend, run):
    if backend is None:
        return run

    def chosen():
        with sdpa_kernel(backend):
            return run()

    return chosen


def official_attention(q, k_cache, v_cache, limits, blocks, scale=None, return_lse=False):
    """Keys and values of context and step merged into new buffers by index, then SDPA, branch by branch."""
    if return_lse:
        raise Unsuitable("gives no log-sum-exp")
    groups = _groups(q, k_cache, v_cache, limits, blocks)
    parts = []
    for group in groups:
        sizes = [end - start for start, end in group.spans]
        numbers = torch.arange(sum(sizes), device=q.device)
        caches = [[cache[start:end] for start, end in group.spans] for cache in (k_cache, v_cache)]
        parts.append((group, numbers.split(sizes), caches))

    def merge(numbers, pieces):
        merged = pieces[0].new_zeros(sum(map(len, numbers)), *pieces[0].shape[1:])
        for at, piece in zip(numbers, pieces, strict=True):
            merged[at] = piece
        return merged.transpose(0, 1)[None]

    def layer():
        made = []
        for group, numbers, (keys, values) in parts:
            k, v = merge(numbers, keys), merge(numbers, values)
            made.append(F.scaled_dot_product_attention(group.q, k, v, group.mask, scale=scale, enable_gqa=True))
        return made

    return Contender(layer, _ungrouped(q, groups))


def reference_attention(q, k_cache, v_cache, limits, blocks, scale=None, return_lse=False):
    """The op's reference, which gathers K and V in every call."""
    scale = q.shape[2] ** -0.5 if scale is None else scale
    return Contender(lambda: attention_reference(q, k_cache, v_cache, limits, blocks, scale), one)


def row_spans(limits, blocks):
    """key_start, limit, own_start, own_end of every row, each int32 [T] on the device."""
    spans = blocks.repeat_interleave((blocks[:, 1] - blocks[:, 0]).long(), 0)
    return spans[:, 2].contiguous(), limits, spans[:, 5].contiguous(), spans[:, 6].contiguous()


def _flex(q, k_cache, v_cache, limits, blocks, scale, wrap):
    key_start, limit, own_start, own_end = row_spans(limits, blocks)

    def visible(batch, head, row, slot):
        key = slot - key_start[row]
        prefix = (key >= 0) & (key < limit[row])
        return prefix | ((slot >= own_start[row]) & (slot < own_end[row]))

    mask = create_block_mask(visible, None, None, q.shape[0], k_cache.shape[0], device=q.device)
    run = wrap(flex_attention)
    return lambda q, k, v: run(*(x.transpose(0, 1)[None] for x in (q, k, v)), block_mask=mask, scale=scale,
                               enable_gqa=True)[0].transpose(0, 1)  # fmt: skip


def flex(q, k_cache, v_cache, limits, blocks, scale=None, return_lse=False, wrap=lambda f: f):
    """FlexAttention under the plan's rule, its block mask built beforehand."""
    attend = _flex(q, k_cache, v_cache, limits, blocks, scale, wrap)
    return Contender(lambda: attend(q, k_cache, v_cache), one)


def flex_gradients(q, k_cache, v_cache, limits, blocks, gradient, wrap=lambda f: f):
    """FlexAttention and its gradients."""
    attend = _flex(q, k_cache, v_cache, limits, blocks, None, wrap)

    def run():
        inputs = [tensor.detach().requires_grad_() for tensor in (q, k_cache, v_cache)]
        out = attend(*inputs)
        return out.detach(), *torch.autograd.grad(out, inputs, gradient)

    return Contender(run, tuple)


def sdpa_decode(backend: SDPBackend | None):
    """torch's SDPA, one call per sequence."""

    def make(q, k_cache, v_cache, starts, lengths, scale=None):
        spans = [(start, start + length) for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)]
        if any(start == end for start, end in spans):
            raise Unsuitable("has no answer for a row without keys")
        caches = [[cache[a:b].transpose(0, 1)[None] for cache in (k_cache, v_cache)] for a, b in spans]

        def run():
            return [
                F.scaled_dot_product_attention(row[None, :, None], k, v, scale=scale, enable_gqa=True)
                for row, (k, v) in zip(q, caches, strict=True)
            ]

        return Contender(_with_backend(backend, run), lambda made: (torch.cat(made)[:, :, 0],))

    make.__doc__ = sdpa_decode.__doc__
    return make


def reference_decode_attention(q, k_cache, v_cache, starts, lengths, scale=None):
    """The op's reference, which reads the lengths on the host."""
    scale = q.shape[2] ** -0.5 if scale is None else scale
    return Contender(lambda: decode_attention_reference(q, k_cache, v_cache, starts, lengths, scale), one)
