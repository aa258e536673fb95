"""What else computes attention: the official composition, torch's SDPA with each backend, FlexAttention.

As in :mod:`benchmarks.peers`, what can be done once per request is done beforehand and not timed: K and V are gathered
or expanded, masks are built.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from bagel_rt.kernels.attention import attention_lse_reference, attention_reference
from bagel_rt.kernels.decode_attention import decode_attention_reference
from benchmarks.peers import Contender, Unsuitable, one


class _Group(NamedTuple):
    """Rows for one call of SDPA: their queries, keys and values, [1, heads, n, D] each, and their mask.

    The mask is None where all rows see all keys, or torch's lower-right causal bias.
    """

    rows: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: object
    spans: list[tuple[int, int]]


def visible_groups(limits, blocks) -> list[tuple[tuple[int, int, int, int], list[int]]]:
    """((key_start, limit, own_start, own_end), the rows that see just these), without the rows that see nothing.

    Rows whose limits rise by one are one group, causal text, and the limit is the last one's.
    """
    seen = {}
    spans = zip(*(column.tolist() for column in row_spans(limits, blocks)), strict=True)
    for row, (key_start, limit, own_start, own_end) in enumerate(spans):
        own = (own_start, own_end) if own_start < own_end else (0, 0)
        if limit or any(own):
            seen.setdefault((*own, key_start, limit), []).append(row)
    groups, last = [], None
    for (*own, key_start, limit), rows in sorted(seen.items()):
        if not any(own) and len(rows) == 1 and last == (key_start, limit - 1):
            groups[-1] = ((key_start, limit, 0, 0), groups[-1][1] + rows)
        else:
            groups.append(((key_start, limit, *own), rows))
        last = (key_start, limit) if not any(own) and len(rows) == 1 else None
    return groups


def _groups(q, k_cache, v_cache, limits, blocks) -> list[_Group]:
    """One call of SDPA each, as few as the rows' visible keys allow."""
    limit_of, groups = limits.tolist(), []
    for (key_start, limit, own_start, own_end), rows in visible_groups(limits, blocks):
        causal = len(rows) > 1 and limit_of[rows[0]] < limit
        rows = torch.tensor(rows, device=q.device)
        spans = [(key_start, key_start + limit), (own_start, own_end)]
        k, v = (
            torch.cat([cache[start:end] for start, end in spans]).transpose(0, 1)[None] for cache in (k_cache, v_cache)
        )
        mask = causal_lower_right(len(rows), limit) if causal else None
        groups.append(_Group(rows, q[rows].transpose(0, 1)[None], k, v, mask, spans))
    return groups


def _ungrouped(q, groups):
    def outputs(made):
        out = torch.zeros_like(q)
        for group, part in zip(groups, made, strict=True):
            out[group.rows] = part[0].transpose(0, 1)
        return (out,)

    return outputs


def _expanded(groups: list[_Group], share: int) -> list[_Group]:
    """Keys and values repeated for every query head, for backends that know no groups of heads."""
    return [g._replace(k=g.k.repeat_interleave(share, 1), v=g.v.repeat_interleave(share, 1)) for g in groups]


def sdpa(backend: SDPBackend, expand: bool = False):
    """torch's SDPA, one call per group of rows that see the same, K and V gathered beforehand."""

    def make(q, k_cache, v_cache, limits, blocks, scale=None, return_lse=False):
        if return_lse:
            raise Unsuitable("gives no log-sum-exp")
        if backend is SDPBackend.MATH and q.shape[0] * k_cache.shape[0] > 2**26:
            raise Unsuitable("would hold every score at once")
        groups = _groups(q, k_cache, v_cache, limits, blocks)
        if expand:
            groups = _expanded(groups, q.shape[1] // k_cache.shape[1])

        def run():
            return [
                F.scaled_dot_product_attention(g.q, g.k, g.v, g.mask, scale=scale, enable_gqa=not expand)
                for g in groups
            ]

        return Contender(_with_backend(backend, run), _ungrouped(q, groups))

    make.__doc__ = sdpa.__doc__
    return make


def sdpa_gradients(backend: SDPBackend, expand: bool = False):
    """torch's SDPA and its gradients, call by call; adding up what several calls give to a key is not timed."""

    def make(q, k_cache, v_cache, limits, blocks, gradient):
        groups, share = _groups(q, k_cache, v_cache, limits, blocks), q.shape[1] // k_cache.shape[1]
        if expand:
            groups = _expanded(groups, share)
        gradients = [gradient[group.rows].transpose(0, 1)[None] for group in groups]

        def run():
            made = []
            for group, given in zip(groups, gradients, strict=True):
                inputs = [tensor.detach().requires_grad_() for tensor in (group.q, group.k, group.v)]
                out = F.scaled_dot_product_attention(*inputs, group.mask, enable_gqa=not expand)
                made.append((out.detach(), *torch.autograd.grad(out, inputs, given)))
            return made

        def outputs(made):
            out, dq, dk, dv = (torch.zeros_like(tensor) for tensor in (q, q, k_cache, v_cache))
            for group, parts in zip(groups, made, strict=True):
                for whole, part in zip((out, dq), parts[:2], strict=True):
                    whole[group.rows] = part[0].transpose(0, 1)
                slots = torch.cat([torch.arange(start, end, device=q.device) for start, end in group.spans])
                for whole, part in zip((dk, dv), parts[2:], strict=True):
                    part = part[0].transpose(0, 1)
                    whole.index_add_(0, slots, part.unflatten(1, (-1, share)).sum(2) if expand else part)
            return out, dq, dk, dv

        return Contender(_with_backend(backend, run), outputs)

    make.__doc__ = sdpa_gradients.__doc__
    return make


def _with_backend(backend, run):
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
    if return_lse:
        return Contender(lambda: attention_lse_reference(q, k_cache, v_cache, limits, blocks, scale), tuple)
    return Contender(lambda: attention_reference(q, k_cache, v_cache, limits, blocks, scale), one)


def row_spans(limits, blocks):
    """key_start, limit, own_start, own_end of every row, each int32 [T] on the device."""
    spans = blocks.repeat_interleave((blocks[:, 1] - blocks[:, 0]).long(), 0)
    return spans[:, 2].contiguous(), limits, spans[:, 5].contiguous(), spans[:, 6].contiguous()


def _flex(q, k_cache, v_cache, limits, blocks, scale, wrap, lse=False):
    key_start, limit, own_start, own_end = row_spans(limits, blocks)

    def visible(batch, head, row, slot):
        key = slot - key_start[row]
        prefix = (key >= 0) & (key < limit[row])
        return prefix | ((slot >= own_start[row]) & (slot < own_end[row]))

    mask = create_block_mask(visible, None, None, q.shape[0], k_cache.shape[0], device=q.device)
    run = wrap(flex_attention)

    def attend(q, k, v):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        aux = AuxRequest(lse=True) if lse else None
        made = run(q, k, v, block_mask=mask, scale=scale, enable_gqa=True, return_aux=aux)
        out, sums = (made[0], made[1].lse[0]) if lse else (made, None)
        return out[0].transpose(0, 1), sums

    return attend


def flex(q, k_cache, v_cache, limits, blocks, scale=None, return_lse=False, wrap=lambda f: f):
    """FlexAttention under the plan's rule, its block mask built beforehand."""
    attend = _flex(q, k_cache, v_cache, limits, blocks, scale, wrap, return_lse)
    return Contender(lambda: attend(q, k_cache, v_cache), tuple if return_lse else lambda made: made[:1])


def flex_gradients(q, k_cache, v_cache, limits, blocks, gradient, wrap=lambda f: f):
    """FlexAttention and its gradients."""
    attend = _flex(q, k_cache, v_cache, limits, blocks, None, wrap)

    def run():
        inputs = [tensor.detach().requires_grad_() for tensor in (q, k_cache, v_cache)]
        out, _ = attend(*inputs)
        return out.detach(), *torch.autograd.grad(out, inputs, gradient)

    return Contender(run, tuple)


def sdpa_decode(backend: SDPBackend):
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
