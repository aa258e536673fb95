"""Linear layer for decoding: ``y = h w^T`` for a few rows, h = x or RMSNorm(x), with residual or SwiGLU.

    h = x, or round(x / sqrt(mean(x^2) + eps)) * norm, rounded
    y = h w^T                       none
    y = residual + h w^T            residual
    y = silu(z_2i) * z_2i+1         swiglu, z = h w^T; rows of w alternate gate and up

h is computed and rounded as in :mod:`.norm`, the epilogues as in the kernel of :mod:`.linear`: products accumulate in
float32 and y is rounded once. A row's result is bitwise independent of the other rows.

The kernel (csrc/decode_linear.cu) supports up to 8 rows. Other calls, and the reference, compose those two ops.
Traffic: w once; memory-bound.
"""

from typing import Any

import torch
from torch import Tensor

from . import extension
from .backend import check_devices, mismatch
from .linear import linear
from .norm import rms_norm, rows_contiguous
from .registry import op

MAX_ROWS = 8
"""Maximum rows of x of the decode GEMV kernels."""

_STATIC_SHARED_MEMORY = 1024  # bytes, an upper bound for what a kernel needs besides the normalized rows


def decode_linear_reference(
    x: Tensor, w: Tensor, norm: Tensor | None, eps: float, residual: Tensor | None, swiglu: bool
) -> Tensor:
    """The formula, composed of other ops, for any device and dtype. Shapes as in :func:`decode_linear`."""
    if norm is not None:
        x, _ = rms_norm(x, None, norm, eps=eps)
    return linear(x, w, residual=residual, swiglu=swiglu)


def gemv_args(x: Tensor, norm: Tensor | None, w: Tensor, eps: float) -> tuple[Any, tuple[Tensor, ...]] | None:
    """(GemvArgs of ``h w^T`` for the extension, the tensors it points to); None if the kernels do not support the call.

    Unsupported are: too many rows, rows that 16-byte loads cannot read, normalized rows beyond a block's shared memory,
    and a norm that is not contiguous. The kernel reads w and norm before earlier kernels have finished (programmatic
    dependent launch), so it could read a copy of the norm before that copy is written.
    """
    (B, K), N, size = x.shape, w.shape[0], x.itemsize
    if not (0 < B <= MAX_ROWS and N and K and K * size % 16 == 0 and w.stride(1) == 1 and w.stride(0) * size % 16 == 0):
        return None
    x = rows_contiguous(x)
    if x.stride(0) * size % 16:
        x = x.contiguous()
    if norm is not None and not norm.is_contiguous():
        return None
    tensors = (x, w) if norm is None else (x, w, norm)
    if any(tensor.data_ptr() % 16 for tensor in tensors):
        return None
    args = extension.EXTENSION.GemvArgs(
        x.dtype == torch.bfloat16, x.data_ptr(), 0 if norm is None else norm.data_ptr(), w.data_ptr(),
        x.stride(0), w.stride(0), B, K, N, eps,
    )  # fmt: skip
    if norm is not None:
        needed = extension.EXTENSION.norm_shared_bytes(args) + _STATIC_SHARED_MEMORY
        if needed > extension.shared_memory(x):
            return None
    return args, tensors


def _fake(x: Tensor, w: Tensor, norm: Tensor | None, eps: float, residual: Tensor | None, swiglu: bool) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[0] // 2 if swiglu else w.shape[0])


@op(
    "decode_linear",
    "(Tensor x, Tensor w, Tensor? norm, float eps, Tensor? residual, bool swiglu) -> Tensor",
    kernel="cuda",
    fake=_fake,
)
def _decode_linear(
    x: Tensor, w: Tensor, norm: Tensor | None, eps: float, residual: Tensor | None, swiglu: bool
) -> Tensor:
    if extension.runs_extension(x, w, norm, residual) and (packed := gemv_args(x, norm, w, eps)):
        args, tensors = packed
        residual = None if residual is None else residual.contiguous()
        y = x.new_empty(x.shape[0], w.shape[0] // 2 if swiglu else w.shape[0])
        extension.EXTENSION.decode_linear(
            args, 0 if residual is None else residual.data_ptr(), swiglu, y.data_ptr(), extension.stream(x)
        )
        del tensors  # keep a contiguous copy of x alive until the kernel that reads it is enqueued
        return y
    return decode_linear_reference(x, w, norm, eps, residual, swiglu)


def decode_linear(
    x: Tensor,
    w: Tensor,
    *,
    norm: Tensor | None = None,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    swiglu: bool = False,
) -> Tensor:
    """Multiply a few rows, optionally normalized, by a weight matrix.

    Args:
        x: [B, K], floating point; the kernel supports B <= 8 in float32 or bfloat16.
        w: [N, K], dtype of ``x``; with ``swiglu`` rows alternate gate and up. On CUDA, ``w`` and ``norm`` may be read
            while earlier kernels of the stream still run, so those must not write them.
        norm: [K], dtype of ``x``: weight of an RMSNorm applied to ``x``; None skips the norm.
        eps: added to the mean square in the norm.
        residual: [B, N] like ``x``, added to the product. Not together with ``swiglu``.
        swiglu: fold pairs of outputs into silu(gate) * up.

    Returns:
        [B, N], contiguous; [B, N // 2] with ``swiglu``.

    Raises:
        ValueError: a shape, dtype or device does not match, or the epilogues exclude each other. The message names the
            argument.
    """
    B, K = x.shape
    N = w.shape[0]
    if w.shape != (N, K) or w.dtype != x.dtype:
        raise mismatch("decode_linear", "w", w, (N, K), x.dtype)
    if norm is not None and (norm.shape != (K,) or norm.dtype != x.dtype):
        raise mismatch("decode_linear", "norm", norm, (K,), x.dtype)
    if residual is not None:
        if residual.shape != (B, N) or residual.dtype != x.dtype:
            raise mismatch("decode_linear", "residual", residual, (B, N), x.dtype)
        if swiglu:
            raise ValueError("decode_linear: residual must be None with swiglu. Add it afterward.")
    if swiglu and N % 2:
        raise ValueError(f"decode_linear: w must have an even number of rows with swiglu, got {N}.")
    check_devices("decode_linear", x=x, w=w, norm=norm, residual=residual)
    return _decode_linear(x, w, norm, eps, residual, swiglu)
