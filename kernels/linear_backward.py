"""Gradient of the routed linear layer. With x, w and dy of each group's rows:

    dx = dy w        dw = dy^T x        dbias = sum of dy over the rows        dresidual = dy

Each product is written in place, without gathers or copies. With SwiGLU, dy is the gradient of the product before it,
which is recomputed. (:func:`.linear.linear` avoids that: under autograd it deinterleaves gate and up in the weight and
lets PyTorch differentiate SwiGLU.)
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_backward(
    grad: Tensor, x: Tensor, w_first: Tensor, w_rest: Tensor, G: int, needs_dx: bool = True
) -> tuple[Tensor | None, Tensor, Tensor]:
    """The formula, in PyTorch, for any device and dtype.

    Args:
        grad: [T, N], gradient of the result.
        x, w_first, w_rest, G: arguments of :func:`.linear.linear`.
        needs_dx: whether to compute dx; otherwise it is None.

    Returns:
        (dx [T, K], dw_first [N, K], dw_rest [N, K]).
    """
    T, K = x.shape
    groups, grad = (G, T - G), grad.contiguous()
    dx = x.new_empty(T, K) if needs_dx else None
    dw = []
    for group, w in enumerate((w_first, w_rest)):
        group_grad, group_x = (rows.split_with_sizes(groups)[group] for rows in (grad, x))
        dw.append(group_grad.t() @ group_x)
        if dx is not None:
            torch.mm(group_grad, w, out=dx.split_with_sizes(groups)[group])
    dw_first, dw_rest = dw
    return dx, dw_first, dw_rest


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *operands, residual, ctx.G, ctx.swiglu = inputs
    ctx.save_for_backward(*operands)
    ctx.adds_residual = residual is not None


def _swiglu_backward(grad: Tensor, *operands: Tensor | None, G: int) -> Tensor:
    """Gradient [T, N] of the product from that of the SwiGLU output, [T, N // 2]. Recomputes the product."""
    gate, up = torch.ops.bagel_rt.linear(*operands, None, G, False).unflatten(1, (-1, 2)).unbind(2)
    return torch.stack([torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)], 2).flatten(1)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, w_first, w_rest, bias, _ = operands = ctx.saved_tensors
    if ctx.swiglu:
        grad = _swiglu_backward(grad, *operands, G=ctx.G)
    dx, dw_first, dw_rest = linear_backward(grad, x, w_first, w_rest, ctx.G, ctx.needs_input_grad[0])
    biases: list[Tensor | None] = [None, None]
    if bias is not None:
        biases = [rows.sum(0) for rows in grad.split_with_sizes((ctx.G, len(grad) - ctx.G))]
    return dx, dw_first, dw_rest, *biases, grad if ctx.adds_residual else None, None, None


linear_gradient = _backward, _setup_context
