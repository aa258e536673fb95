"""Gradient of the routed linear layer without SwiGLU. With x, w and dy of each expert's rows:

    dx = dy w        dw = dy^T x        dbias = sum of dy over the rows        dresidual = dy

Each product is made where it belongs, without gathers or copies. SwiGLU is differentiated by PyTorch, behind a linear
layer whose weight holds all gates before all ups (:func:`bagel_rt.kernels.linear.linear`).
"""

import torch


def linear_backward(grad, x, w_gen, w_und, G, needs_dx=True):
    """The formula, in PyTorch, for any device and dtype.

    Args:
        grad: [T, N], of the result.
        x, w_gen, w_und, G: as given to :func:`bagel_rt.kernels.linear.linear`.
        needs_dx: whether dx is wanted; None otherwise.

    Returns:
        (dx [T, K], dw_gen [N, K], dw_und [N, K]).
    """
    T, K = x.shape
    experts, grad = (G, T - G), grad.contiguous()
    dx = x.new_empty(T, K) if needs_dx else None
    dw = []
    for number, w in enumerate((w_gen, w_und)):
        own_grad, own_x = (rows.split_with_sizes(experts)[number] for rows in (grad, x))
        dw.append(own_grad.t() @ own_x)
        if needs_dx:
            torch.mm(own_grad, w, out=dx.split_with_sizes(experts)[number])
    return dx, *dw


def _keep(ctx, inputs, output):
    x, w_gen, w_und, bias, _, residual, ctx.G, swiglu = inputs
    if swiglu:
        raise NotImplementedError("the op bagel_rt::linear has no gradient with swiglu; the function linear has")
    ctx.save_for_backward(x, w_gen, w_und)
    ctx.adds_bias, ctx.adds_residual = bias is not None, residual is not None


def _backward(ctx, grad):
    x, w_gen, w_und = ctx.saved_tensors
    dx, dw_gen, dw_und = linear_backward(grad, x, w_gen, w_und, ctx.G, ctx.needs_input_grad[0])
    biases = [None, None]
    if ctx.adds_bias:
        biases = [own.sum(0) for own in grad.split_with_sizes((ctx.G, len(grad) - ctx.G))]
    return dx, dw_gen, dw_und, *biases, grad if ctx.adds_residual else None, None, None


torch.library.register_autograd("bagel_rt::linear", _backward, setup_context=_keep)
