"""Gradient of QK-norm and RoPE. A head's gradient is rotated back, then passed through the norm.

h is a head before the norm, w the norm's weight, n = h / rms(h), and (ga, gb) are the halves of the output's gradient:

    (da, db) = (ga cos + gb sin, gb cos - ga sin)        g = (da, db), the gradient of n w
    dh = s (g w - n (g w . n) / D), s = 1 / rms(h)       dw = sum of g n over the rows of its group, for each head

With LayerNorm, n = (h - mean(h)) / std(h), s = 1 / std(h) and dh = s (g w - mean(g w) - n (g w . n) / D). The gradient
of its bias is the sum of g over the same rows.

Gradients of values are copied. Arithmetic is in float32 or wider and rounded once. The forward saves its input ``qkv``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def qk_norm_rope_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, norm_first: Tensor | None, norm_rest: Tensor | None, cos: Tensor,
    sin: Tensor, slots: Tensor, G: int, eps: float,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """The formula, in PyTorch, for any device and dtype.

    Args:
        dq: [T, Hq, D], gradient of the queries.
        dk, dv: [S, Hkv, D], gradients of the caches after the op.
        qkv, norm_first, norm_rest, cos, sin, slots, G, eps: arguments of :func:`.qk_norm_rope.qk_norm_rope`.

    Returns:
        (dqkv like ``qkv``, dnorm_first, dnorm_rest like the norms), in the dtype of ``qkv``; the norms' gradients are
        None without QK-norm.
    """
    T, Hq, D = dq.shape
    Hkv, half = dk.shape[1], D // 2
    heads = Hq + Hkv
    wide = torch.promote_types(qkv.dtype, torch.float32)
    groups = [G, T - G]
    g = torch.cat([dq, dk.index_select(0, slots)], 1).to(wide).view(T, heads, 2, half)
    ga, gb = g.unbind(2)
    sin = sin.unsqueeze(1)
    rotated = g * cos.view(T, 1, 1, half)
    rotated[:, :, 0].addcmul_(gb, sin)
    rotated[:, :, 1].addcmul_(ga, sin, value=-1)
    g = rotated.view(T, heads, D)

    dqkv = torch.empty_like(qkv).view(T, heads + Hkv, D)
    dqkv[:, heads:] = dv.index_select(0, slots)
    if norm_first is None or norm_rest is None:
        dqkv[:, :heads] = g
        return dqkv.view_as(qkv), None, None
    layer_norm = norm_first.dim() == 3
    x = qkv.view(T, heads + Hkv, D)[:, :heads].to(wide)
    if layer_norm:
        x = x - x.mean(2, keepdim=True)
    normed = F.rms_norm(x, (D,), None, eps)
    scale = torch.linalg.vector_norm(x, dim=2, keepdim=True).square_().div_(D).add_(eps).rsqrt_()
    dnorm = [rows.sum(0).to(qkv.dtype) for rows in (g * normed).split_with_sizes(groups)]
    if layer_norm:
        dbias = [rows.sum(0).to(qkv.dtype) for rows in g.split_with_sizes(groups)]
        dnorm = [torch.stack(pair) for pair in zip(dnorm, dbias, strict=True)]
    for part, norm in zip(torch.split(g, groups), (norm_first, norm_rest), strict=True):
        part.mul_(norm[0] if layer_norm else norm)
    if layer_norm:
        g = g - g.mean(2, keepdim=True)  # the dot product with normed stays the same: normed has mean 0
    normed.mul_(torch.linalg.vecdot(g, normed).div_(-D).unsqueeze(2))
    dqkv[:, :heads] = normed.add_(g).mul_(scale)
    dnorm_first, dnorm_rest = dnorm
    return dqkv.view_as(qkv), dnorm_first, dnorm_rest
