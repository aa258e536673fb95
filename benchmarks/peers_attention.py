"""Peers of attention: the official composition, SDPA with each backend, FlexAttention.

As in :mod:`benchmarks.peers`, work needed only once per request is not timed: gathering or expanding K and V, building
masks.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from bagel_rt.kernels.attention import attention_lse_reference, attention_reference
from bagel_rt.kernels.decode_attention import decode_attention_reference
from benchmarks.peers import PreparedCall, Unsupported, as_tuple


class _Group(NamedTuple):
    """Inputs of one SDPA call: rows that attend to the same keys.

    Attributes:
        rows: indices of the rows.
        q, k, v: [1, heads, n, D].
        mask: None if every row sees all keys, otherwise PyTorch's lower-right causal bias.
        spans: (start, end) slots of the keys.
    """

    rows: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: object
    spans: list[tuple[int, int]]


def visible_groups(limits, blocks) -> list[tuple[tuple[int, int, int, int], list[int]]]:
    """Group rows by visible keys: ((key_start, limit, own_start, own_end), rows). Rows without keys are left out.

    Rows whose limits increase by one form one causal group (text) with the limit of the last row.
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
    """Inputs of the fewest SDPA calls that cover all rows."""
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


def _ungroup(q, groups):
    """A function that scatters the results of the SDPA calls back to [T, heads, D]."""

    def outputs(results):
        out = torch.zeros_like(q)
        for group, part in zip(groups, results, strict=True):
            out[group.rows] = part[0].transpose(0, 1)
        return (out,)

    return outputs


def _expand_heads(groups: list[_Group], repeats: int) -> list[_Group]:
    """Repeat keys and values for every query head, for backends without grouped-query attention."""
    return [g._replace(k=g.k.repeat_interleave(repeats, 1), v=g.v.repeat_interleave(repeats, 1)) for g in groups]


def sdpa(backend: SDPBackend, expand: bool = False):
    """SDPA with one call per group of rows that see the same keys; K and V are gathered beforehand."""

    def make(q, k_cache, v_cache, limits, blocks, scale=None, return_lse=False):
        if return_lse:
            raise Unsupported("does not return the log-sum-exp")
        if backend is SDPBackend.MATH and q.shape[0] * k_cache.shape[0] > 2**26:
            raise Unsupported("would materialize all scores")
        groups = _groups(q, k_cache, v_cache, limits, blocks)
        if expand:
            groups = _expand_heads(groups, q.shape[1] // k_cache.shape[1])

        def run():
            return [
                F.scaled_dot_product_attention(g.q, g.k, g.v, g.mask, scale=scale, enable_gqa=not expand)
                for g in groups
            ]

        return PreparedCall(_with_backend(backend, run), _ungroup(q, groups))

    make.__doc__ = sdpa.__doc__
    return make


def sdpa_gradients(backend: SDPBackend, expand: bool = False):
    """SDPA forward and backward. Summing the gradients of keys shared by several calls is not timed."""

    def make(q, k_cache, v_cache, limits, blocks, gradient):
        groups, repeats = _groups(q, k_cache, v_cache, limits, blocks), q.shape[1] // k_cache.shape[1]
        if expand:
            groups = _expand_heads(groups, repeats)
        gradients = [gradient[group.rows].transpose(0, 1)[None] for group in groups]

        def run():
            results = []
            for group, out_gradient in zip(groups, gradients, strict=True):
                inputs = [tensor.detach().requires_grad_() for tensor in (group.q, group.k, group.v)]
                out = F.scaled_dot_product_attention(*inputs, group.mask, enable_gqa=not expand)
                results.append((out.detach(), *torch.autograd.grad(out, inputs, out_gradient)))
            return results

        def outputs(results):
            out, dq, dk, dv = (torch.zeros_like(tensor) for tensor in (q, q, k_cache, v_cache))
            for group, parts in zip(groups, results, strict=True):
                for whole, part in zip((out, dq), parts[:2], strict=True):
                    whole[group.rows] = part[0].transpose(0, 1)
                slots = torch.cat([torch.arange(start, end, device=q.device) for start, end in group.spans])
                for whole, part in zip((dk, dv), parts[2:], strict=True):
                    part = part[0].transpose(0, 1)
                    whole.index_add_(0, slots, part.unflatten(1, (-1, repeats)).sum(2) if expand else part)
            return out, dq, dk, dv

        return PreparedCall(_with_backend(backend, run), outputs)

    make.__doc__ = sdpa_gradients.__doc__
    return make


def _with_backend(backend, run):
    def run_with_backend():
        with sdpa_kernel(backend):
            return run()

    return run_with_backend


def official_attention(q, k_cache, v_cache, limits, blocks, scale=None, return_lse=False):
    """For each branch: copy the keys and values of the context and of the step into new buffers by index, then SDPA."""
    if return_lse:
        raise Unsupported("does not return the log-sum-exp")
    groups = _groups(q, k_cache, v_cache, limits, blocks)
    parts = []
    for group in groups:
        sizes = [end - start for start, end in group.spans]
        indices = torch.arange(sum(sizes), device=q.device)
        caches = [[cache[start:end] for start, end in group.spans] for cache in (k_cache, v_cache)]
        parts.append((group, indices.split(sizes), caches))

    def merge(indices, pieces):
        merged = pieces[0].new_zeros(sum(map(len, indices)), *pieces[0].shape[1:])
        for index, piece in zip(indices, pieces, strict=True):
            merged[index] = piece
        return merged.transpose(0, 1)[None]

    def layer():
        results = []
        for group, indices, (keys, values) in parts:
            k, v = merge(indices, keys), merge(indices, values)
            results.append(F.scaled_dot_product_attention(group.q, k, v, group.mask, scale=scale, enable_gqa=True))
        return results

    return PreparedCall(layer, _ungroup(q, groups))


def reference_attention(q, k_cache, v_cache, limits, blocks, scale=None, return_lse=False):
    """The op's reference, which gathers K and V on every call."""
    scale = q.shape[2] ** -0.5 if scale is None else scale
    if return_lse:
        return PreparedCall(lambda: attention_lse_reference(q, k_cache, v_cache, limits, blocks, scale), tuple)
    return PreparedCall(lambda: attention_reference(q, k_cache, v_cache, limits, blocks, scale), as_tuple)


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
        result = run(q, k, v, block_mask=mask, scale=scale, enable_gqa=True, return_aux=aux)
        out, log_sum_exp = (result[0], result[1].lse[0]) if lse else (result, None)
        return out[0].transpose(0, 1), log_sum_exp

    return attend


def flex(q, k_cache, v_cache, limits, blocks, scale=None, return_lse=False, wrap=lambda f: f):
    """FlexAttention with the plan's visibility rule as a prebuilt block mask."""
    attend = _flex(q, k_cache, v_cache, limits, blocks, scale, wrap, return_lse)
    return PreparedCall(lambda: attend(q, k_cache, v_cache), tuple if return_lse else lambda result: result[:1])


def flex_gradients(q, k_cache, v_cache, limits, blocks, gradient, wrap=lambda f: f):
    """FlexAttention forward and backward."""
    attend = _flex(q, k_cache, v_cache, limits, blocks, None, wrap)

    def run():
        inputs = [tensor.detach().requires_grad_() for tensor in (q, k_cache, v_cache)]
        out, _ = attend(*inputs)
        return out.detach(), *torch.autograd.grad(out, inputs, gradient)

    return PreparedCall(run, tuple)


def sdpa_decode(backend: SDPBackend):
    """SDPA with one call per sequence."""

    def make(q, k_cache, v_cache, starts, lengths, scale=None):
        spans = [(start, start + length) for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)]
        if any(start == end for start, end in spans):
            raise Unsupported("does not support rows without keys")
        caches = [[cache[a:b].transpose(0, 1)[None] for cache in (k_cache, v_cache)] for a, b in spans]

        def run():
            return [
                F.scaled_dot_product_attention(row[None, :, None], k, v, scale=scale, enable_gqa=True)
                for row, (k, v) in zip(q, caches, strict=True)
            ]

        return PreparedCall(_with_backend(backend, run), lambda results: (torch.cat(results)[:, :, 0],))

    make.__doc__ = sdpa_decode.__doc__
    return make


def reference_decode_attention(q, k_cache, v_cache, starts, lengths, scale=None):
    """The op's reference, which copies the lengths to the host."""
    scale = q.shape[2] ** -0.5 if scale is None else scale
    return PreparedCall(lambda: decode_attention_reference(q, k_cache, v_cache, starts, lengths, scale), as_tuple)
