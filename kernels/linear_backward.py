"""Gradient of the routed linear layer. With x, w and dy of each group's rows:

    dx = dy w        dw = dy^T x        dbias = sum of dy over the rows        dresidual = dy

Each product is made where it belongs, without gathers or copies. With SwiGLU dy is that of the product before it,
which is computed again. (:func:`.linear.linear` keeps it instead: its layer has all gates before all
ups in the weight, and PyTorch differentiates SwiGLU behind it.)
"""

import torch
import torch.nn.functional as F


def linear_backward(grad, x, w_first, w_rest, G, needs_dx=True):
    """The formula, in PyTorch, for any device and dtype.

    Args:
        grad: [T, N], of the result.
        x, w_first, w_rest, G: as given to :func:`.linear.linear`.
        needs_dx: whether dx is wanted; None otherwise.

    Returns:
        (dx [T, K], dw_first [N, K], dw_rest [N, K]).
    """
    T, K = x.shape
    groups, grad = (G, T - G), grad.contiguous()
    dx = x.new_empty(T, K) if needs_dx else None
    dw = []
    for number, w in enumerate((w_first, w_rest)):
        own_grad, own_x = (rows.split_with_sizes(groups)[number] for rows in (grad, x))
        dw.append(own_grad.t() @ own_x)
        if needs_dx:
            torch.mm(own_grad, w, out=dx.split_with_sizes(groups)[number])
    return dx, *dw


def _keep(ctx, inputs, output):
    *given, residual, ctx.G, ctx.swiglu = inputs
    ctx.save_for_backward(*given)
    ctx.adds_residual = residual is not None


def _before_swiglu(grad, *given, G):
    """The gradient [T, N] of the product that SwiGLU folds in pairs of columns, from its result's, [T, N // 2]."""
    gate, up = torch.ops.bagel_rt.linear(*given, None, G, False).unflatten(1, (-1, 2)).unbind(2)
    return torch.stack([torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)], 2).flatten(1)


def _backward(ctx, grad):
    x, w_first, w_rest, bias, _ = given = ctx.saved_tensors
    if ctx.swiglu:
        grad = _before_swiglu(grad, *given, G=ctx.G)
    dx, dw_first, dw_rest = linear_backward(grad, x, w_first, w_rest, ctx.G, ctx.needs_input_grad[0])
    biases = [None, None]
    if bias is not None:
        biases = [own.sum(0) for own in grad.split_with_sizes((ctx.G, len(grad) - ctx.G))]
    return dx, dw_first, dw_rest, *biases, grad if ctx.adds_residual else None, None, None


linear_gradient = _backward, _keep
