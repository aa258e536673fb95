"""Routed linear layer: ``y = x w^T`` with a bias, a residual or a SwiGLU epilogue.

Rows [0, G) of ``x`` multiply ``w_gen``, rows [G, T) multiply ``w_und``: two contiguous row ranges, no gather.

    none      y = x w^T + bias
    residual  y = residual + x w^T
    swiglu    z = x w^T + bias, y[:, i] = silu(z[:, 2i]) * z[:, 2i+1], silu(a) = a / (1 + exp(-a))

SwiGLU weights (Shazeer 2020, arXiv:2002.05202) hold row 2i = gate i and row 2i+1 = up i, so that both halves of one
output meet in one tile of the product. Products accumulate in float32 or wider; the sum with bias or residual is
rounded once to the input dtype; the reference rounds ``z`` and ``silu`` as well, as unfused layers do.

Work: 2 T K N flops; traffic: both experts' weights once, x and y once.
"""

import torch
import torch.nn.functional as F
from torch.compiler import is_compiling


def linear_reference(x, w_gen, w_und, bias_gen, bias_und, residual, G, swiglu):
    """The formula, in PyTorch, for any device and dtype. Shapes as in :func:`linear`."""
    T = x.shape[0]
    if G == 0:
        y = _product(x, w_und, bias_und if residual is None else residual)
    elif G == T:
        y = _product(x, w_gen, bias_gen if residual is None else residual)
    else:
        y = x.new_empty(T, w_gen.shape[0])
        experts = (G, T - G)
        x_gen, x_und = x.split_with_sizes(experts)
        y_gen, y_und = y.split_with_sizes(experts)
        add_gen, add_und = (bias_gen, bias_und) if residual is None else residual.split_with_sizes(experts)
        _product(x_gen, w_gen, add_gen, y_gen)
        _product(x_und, w_und, add_und, y_und)
    if swiglu:
        gate, up = y.view(T, y.shape[1] // 2, 2).unbind(-1)
        y = F.silu(gate.contiguous(), inplace=True).mul_(up)  # exp of every second number would take twice the time
    return y


def _product(x, w, addend, out=None):
    if addend is None:
        return torch.mm(x, w.t(), out=out)
    return torch.addmm(addend, x, w.t(), out=out)


torch.library.define(
    "bagel_rt::linear",
    "(Tensor x, Tensor w_gen, Tensor w_und, Tensor? bias_gen, Tensor? bias_und, Tensor? residual, SymInt G, "
    "bool swiglu) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


def _launch(x, w_gen, w_und, bias_gen, bias_und, residual, G, swiglu):
    return linear_reference(x, w_gen, w_und, bias_gen, bias_und, residual, G, swiglu)


torch.library.impl("bagel_rt::linear", "default", _launch)


@torch.library.register_fake("bagel_rt::linear")
def _fake(x, w_gen, w_und, bias_gen, bias_und, residual, G, swiglu):
    N = w_gen.shape[0]
    return x.new_empty(x.shape[0], N // 2 if swiglu else N)


_linear = torch.ops.bagel_rt.linear.default


def linear(x, w_gen, w_und, bias_gen=None, bias_und=None, *, G, residual=None, swiglu=False):
    """Multiply packed rows, each with its expert's weight.

    Args:
        x: [T, K], floating point.
        w_gen, w_und: [N, K], dtype of ``x``; with ``swiglu`` N is even and rows alternate gate, up.
        bias_gen, bias_und: [N] like the weights, or both None. Not together with ``residual``.
        G: number of generation rows, 0 <= G <= T.
        residual: [T, N] like ``x``, added to the product, or None. Not together with ``swiglu``.
        swiglu: fold pairs of columns into silu(gate) * up.

    Returns:
        [T, N], contiguous; [T, N // 2] with ``swiglu``.

    Raises:
        ValueError: shapes, dtypes or G disagree, or the epilogues exclude each other; the message names the offender.
    """
    T, K = x.shape
    N = w_gen.shape[0]
    dtype = x.dtype
    if not 0 <= G <= T:
        raise ValueError(f"linear: G={G} generation rows, but x has {T} rows")
    for name, w in (("w_gen", w_gen), ("w_und", w_und)):
        if w.shape != (N, K) or w.dtype != dtype:
            raise ValueError(f"linear: {name} is {tuple(w.shape)} {w.dtype}, expected {(N, K)} {dtype}")
    if bias_gen is not None or bias_und is not None:
        for name, bias in (("bias_gen", bias_gen), ("bias_und", bias_und)):
            if bias is None:
                raise ValueError(f"linear: {name} is None but the other bias is given; pass both or neither")
            if bias.shape != (N,) or bias.dtype != dtype:
                raise ValueError(f"linear: {name} is {tuple(bias.shape)} {bias.dtype}, expected {(N,)} {dtype}")
    if residual is not None:
        if bias_gen is not None or swiglu:
            raise ValueError(f"linear: residual excludes {'swiglu' if swiglu else 'a bias'}; apply them in two calls")
        if residual.shape != (T, N) or residual.dtype != dtype:
            raise ValueError(f"linear: residual is {tuple(residual.shape)} {residual.dtype}, expected {(T, N)} {dtype}")
    if swiglu and N % 2:
        raise ValueError(f"linear: swiglu pairs weight rows (gate, up), but there are {N} rows")
    run = _linear if is_compiling() else _launch
    return run(x, w_gen, w_und, bias_gen, bias_und, residual, G, swiglu)
