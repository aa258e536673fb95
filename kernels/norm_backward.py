"""Gradient of the routed RMSNorm. With n = x / rms(x), s = 1 / rms(x), H columns, and dy of the result n w:

    dx = s (dy w - n (dy w . n) / H)        dw = sum of dy n over the rows of its group

x is what was normalised, residual included; if x + r is used besides, its gradient comes on top. Arithmetic is float32
or wider, rounded once. The forward keeps x alone.
"""

import torch
import torch.nn.functional as F


def rms_norm_backward(grad, x, w_first, w_rest, G, eps):
    """The formula, in PyTorch, for any device and dtype.

    Args:
        grad: [T, H], of the normalised rows.
        x: [T, H], the rows that were normalised.
        w_first, w_rest, G, eps: as given to :func:`.norm.rms_norm`.

    Returns:
        (dx [T, H], dw_first [H], dw_rest [H]), in the dtype of ``x``.
    """
    T, H = x.shape
    groups, wide = (G, T - G), torch.promote_types(x.dtype, torch.float32)
    weights = [w.to(wide) for w in (w_first, w_rest)]
    x_wide, grad = x.to(wide), grad.to(wide)
    normed = F.rms_norm(x_wide, (H,), None, eps)
    scale = torch.linalg.vector_norm(x_wide, dim=1).square_().div_(H).add_(eps).rsqrt_()
    products = (normed * grad).split_with_sizes(groups)
    dots = torch.cat([own @ w for own, w in zip(products, weights, strict=True)])
    dx = normed.mul_(dots.div_(-H).unsqueeze(1))
    for part, own, w in zip(torch.split(dx, groups), grad.split_with_sizes(groups), weights, strict=True):
        part.addcmul_(own, w)
    return dx.mul_(scale.unsqueeze(1)).to(x.dtype), *(own.sum(0).to(x.dtype) for own in products)


def _keep(ctx, inputs, output):
    x, w_first, w_rest, ctx.G, ctx.eps = inputs
    ctx.save_for_backward(x, w_first, w_rest)


def _backward(ctx, grad):
    return *rms_norm_backward(grad, *ctx.saved_tensors, ctx.G, ctx.eps), None, None


def _keep_sum(ctx, inputs, output):
    _, _, w_first, w_rest, ctx.G, ctx.eps = inputs
    ctx.save_for_backward(output[1], w_first, w_rest)


def _backward_sum(ctx, grad, grad_summed):
    dx, *dw = rms_norm_backward(grad, *ctx.saved_tensors, ctx.G, ctx.eps)
    dx = dx + grad_summed
    return dx, dx, *dw, None, None


rms_norm_gradient = _backward, _keep
add_rms_norm_gradient = _backward_sum, _keep_sum
