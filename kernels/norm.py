"""Routed RMSNorm with residual: ``y = (x + r) / rms(x + r) * w``, ``rms(a) = sqrt(mean(a^2) + eps)``.

Rows [0, G) of a packed batch use ``w_first``, rows [G, T) use ``w_rest``: the two experts of a mixture of transformers.
Statistics are float32 (float64 for float64 rows). The normalized value is rounded to the input dtype *before* the
weight is applied, as in Qwen2 (Zhang & Sennrich 2019, arXiv:1910.07467; order: transformers Qwen2RMSNorm).

The kernel keeps whole rows in registers, one row per program, or several narrow ones. Traffic: reads x and r, writes y
and x + r, each [T, H]; memory-bound. The gradient is in :mod:`.norm_backward`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import configs
from .backend import mismatch, runs_kernel
from .norm_backward import add_rms_norm_gradient, rms_norm_gradient
from .registry import op
from .triton_language import jit, tl, triton


def rms_norm_reference(
    x: Tensor, residual: Tensor | None, w_first: Tensor, w_rest: Tensor, G: int, eps: float
) -> tuple[Tensor, Tensor]:
    """The formula, in PyTorch, for any device and dtype. Shapes as in :func:`rms_norm`."""
    summed = x if residual is None else (x + residual).contiguous()
    normed = F.rms_norm(summed, summed.shape[1:], None, eps)  # without a weight, so it rounds before the weight
    return scale_rows_(normed, w_first, w_rest, G), summed


def scale_rows_(x: Tensor, w_first: Tensor, w_rest: Tensor, G: int) -> Tensor:
    """Multiply rows [0, G) by ``w_first`` and the others by ``w_rest``, in place. Return ``x``."""
    if G == 0:
        return x.mul_(w_rest)
    if G == x.shape[0]:
        return x.mul_(w_first)
    first, rest = x.split_with_sizes((G, x.shape[0] - G))
    first.mul_(w_first)
    rest.mul_(w_rest)
    return x


@jit(do_not_specialize=["T", "G"])
def _rms_norm_kernel(
    x_ptr: tl.tensor, residual_ptr: tl.tensor, w_first_ptr: tl.tensor, w_rest_ptr: tl.tensor, y_ptr: tl.tensor,
    summed_ptr: tl.tensor, x_stride: tl.tensor, residual_stride: tl.tensor, T: tl.tensor, G: tl.tensor, eps: tl.tensor,
    H: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
) -> None:  # fmt: skip
    """Normalize ROWS rows of H <= BLOCK columns per program. All loads precede the reduction, so none waits for it."""
    dtype = y_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < T) & (column < H)
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row * residual_stride + column, mask=inside, other=0.0)
    w_ptr = tl.where(row < G, w_first_ptr, w_rest_ptr)
    w = tl.load(w_ptr + column, mask=inside, other=0.0, eviction_policy="evict_last")  # reused by every row
    if HAS_RESIDUAL:
        summed = (x + residual.to(tl.float32)).to(dtype)
        tl.store(summed_ptr + row * H + column, summed, mask=inside)
        x = summed.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / H + eps)
    normed = (x * scale).to(dtype).to(tl.float32)
    tl.store(y_ptr + row * H + column, (normed * w.to(tl.float32)).to(dtype), mask=inside)


def _run_kernel(
    x: Tensor, residual: Tensor | None, w_first: Tensor, w_rest: Tensor, G: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Launch the kernel; return (y, x + residual)."""
    T, H = x.shape
    x = rows_contiguous(x)
    y = x.new_empty(T, H)
    summed = x
    if residual is not None:
        residual, summed = rows_contiguous(residual), torch.empty_like(y)
    if T and H:
        tiles = configs.tiles("rms_norm", "narrow" if H <= 1024 else "wide" if H <= 8192 else "widest", x.device)
        _rms_norm_kernel[(triton.cdiv(T, tiles["ROWS"]),)](
            x, residual, w_first.contiguous(), w_rest.contiguous(), y, None if residual is None else summed,
            x.stride(0), 0 if residual is None else residual.stride(0), T, G, eps,
            H=H, HAS_RESIDUAL=residual is not None, BLOCK=triton.next_power_of_2(H), **tiles,
        )  # fmt: skip
    return y, summed


def rows_contiguous(x: Tensor) -> Tensor:
    """Return ``x`` [T, H] if each of its rows is contiguous, else a contiguous copy."""
    return x if x.stride(1) == 1 else x.contiguous()


def _fake_rms_norm(x: Tensor, w_first: Tensor, w_rest: Tensor, G: int, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@op(
    "rms_norm",
    "(Tensor x, Tensor w_first, Tensor w_rest, SymInt G, float eps) -> Tensor",
    kernel="triton",
    fake=_fake_rms_norm,
    gradient=rms_norm_gradient,
)
def _rms_norm(x: Tensor, w_first: Tensor, w_rest: Tensor, G: int, eps: float) -> Tensor:
    run = _run_kernel if runs_kernel(x, w_first, w_rest) else rms_norm_reference
    return run(x, None, w_first, w_rest, G, eps)[0]


def _fake_add_rms_norm(
    x: Tensor, residual: Tensor, w_first: Tensor, w_rest: Tensor, G: int, eps: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@op(
    "add_rms_norm",
    "(Tensor x, Tensor residual, Tensor w_first, Tensor w_rest, SymInt G, float eps) -> (Tensor, Tensor)",
    kernel="triton",
    fake=_fake_add_rms_norm,
    gradient=add_rms_norm_gradient,
)
def _add_rms_norm(
    x: Tensor, residual: Tensor, w_first: Tensor, w_rest: Tensor, G: int, eps: float
) -> tuple[Tensor, Tensor]:
    run = _run_kernel if runs_kernel(x, residual, w_first, w_rest) else rms_norm_reference
    return run(x, residual, w_first, w_rest, G, eps)


def rms_norm(
    x: Tensor, residual: Tensor | None, w_first: Tensor, w_rest: Tensor | None = None, G: int | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Normalize packed rows with their group's weight, or all with one. Differentiable.

    Args:
        x: [T, H], floating point.
        residual: [T, H] like ``x``, or None.
        w_first, w_rest: [H], dtype of ``x``, for rows [0, G) and [G, T). Without ``w_rest`` all rows use ``w_first``.
        G: number of rows of the first group, 0 <= G <= T; ignored without ``w_rest``.
        eps: added to the mean square.

    Returns:
        (y, x + residual), both [T, H], contiguous; without a residual the second is ``x`` itself.

    Raises:
        ValueError: a shape, dtype or G does not match. The message names the argument.
    """
    T, H = shape = x.shape
    if w_rest is None:
        w_rest, G = w_first, T
    if G is None or not 0 <= G <= T:
        raise ValueError(f"rms_norm: G must be from 0 to {T}, the rows of x, got {G}.")
    for name, w in ("w_first", w_first), ("w_rest", w_rest):
        if w.shape != (H,) or w.dtype != x.dtype:
            raise mismatch("rms_norm", name, w, (H,), x.dtype)
    if residual is None:
        return _rms_norm(x, w_first, w_rest, G, eps), x
    if residual.shape != shape or residual.dtype != x.dtype:
        raise mismatch("rms_norm", "residual", residual, (T, H), x.dtype)
    return _add_rms_norm(x, residual, w_first, w_rest, G, eps)
