"""Gradient of the routed RMSNorm. With n = x / rms(x), s = 1 / rms(x), H columns, and dy the gradient of n w:

    dx = s (dy w - n (dy w . n) / H)        dw = sum of dy n over the rows of its group

x is the normalized input, including the residual; the gradient of the second output x + r is added. Arithmetic is
float32 or wider, rounded once. The forward saves only x and the weights.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm_backward(
    grad: Tensor, x: Tensor, w_first: Tensor, w_rest: Tensor, G: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The formula, in PyTorch, for any device and dtype.

    Args:
        grad: [T, H], gradient of the normalized rows.
        x: [T, H], the rows that were normalized.
        w_first, w_rest, G, eps: arguments of :func:`.norm.rms_norm`.

    Returns:
        (dx [T, H], dw_first [H], dw_rest [H]), in the dtype of ``x``.
    """
    T, H = x.shape
    groups, wide = [G, T - G], torch.promote_types(x.dtype, torch.float32)
    weights = [w.to(wide) for w in (w_first, w_rest)]
    x_wide, grad = x.to(wide), grad.to(wide)
    normed = F.rms_norm(x_wide, (H,), None, eps)
    scale = torch.linalg.vector_norm(x_wide, dim=1).square_().div_(H).add_(eps).rsqrt_()
    products = (normed * grad).split_with_sizes(groups)
    dots = torch.cat([rows @ w for rows, w in zip(products, weights, strict=True)])
    dx = normed.mul_(dots.div_(-H).unsqueeze(1))
    for dx_rows, grad_rows, w in zip(torch.split(dx, groups), grad.split_with_sizes(groups), weights, strict=True):
        dx_rows.addcmul_(grad_rows, w)
    dw_first, dw_rest = (rows.sum(0).to(x.dtype) for rows in products)
    return dx.mul_(scale.unsqueeze(1)).to(x.dtype), dw_first, dw_rest


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, w_first, w_rest, ctx.G, ctx.eps = inputs
    ctx.save_for_backward(x, w_first, w_rest)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, w_first, w_rest = ctx.saved_tensors
    return *rms_norm_backward(grad, x, w_first, w_rest, ctx.G, ctx.eps), None, None


def _setup_add_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, _, w_first, w_rest, ctx.G, ctx.eps = inputs
    ctx.save_for_backward(output[1], w_first, w_rest)


def _add_backward(ctx: Any, grad: Tensor, grad_summed: Tensor) -> tuple[Tensor | None, ...]:
    x, w_first, w_rest = ctx.saved_tensors
    dx, dw_first, dw_rest = rms_norm_backward(grad, x, w_first, w_rest, ctx.G, ctx.eps)
    dx = dx + grad_summed
    return dx, dx, dw_first, dw_rest, None, None


rms_norm_gradient = _backward, _setup_context
add_rms_norm_gradient = _add_backward, _setup_add_context
