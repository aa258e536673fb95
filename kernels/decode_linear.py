"""Linear layer of a decoded token: ``y = h w^T`` for a few rows, h = x or RMSNorm(x), with residual or SwiGLU.

    h = x, or round(x / sqrt(mean(x^2) + eps)) * norm, rounded
    y = h w^T                       none
    y = residual + h w^T            residual
    y = silu(z_2i) * z_2i+1         swiglu, z = h w^T; rows of w alternate gate and up

Formulas and rounding of h as in :mod:`.norm`, of the epilogues as in the kernel of
:mod:`.linear`: products accumulate in float32 and y is rounded once. A row's result does not depend on
the rows beside it, bit for bit.

The kernel (csrc/decode_linear.cu) takes up to 8 rows. Other calls are composed of those two ops, which is also the
reference. Traffic: w once; memory-bound.
"""

import torch

from . import extension
from .backend import check_devices, mismatch
from .linear import linear
from .norm import rms_norm, rows_contiguous
from .registry import op

MAX_ROWS = 8
"""Rows of x that the kernels of the one-token path take."""

_STATIC_SHARED_MEMORY = 1024  # bytes that a kernel may need besides the normalised rows


def decode_linear_reference(x, w, norm, eps, residual, swiglu):
    """The formula, composed of other ops, for any device and dtype. Shapes as in :func:`decode_linear`."""
    if norm is not None:
        x, _ = rms_norm(x, None, norm, eps=eps)
    return linear(x, w, residual=residual, swiglu=swiglu)


def gemv_args(x, norm, w, eps):
    """``h w^T`` as the extension's kernels take it, and the tensors whose addresses it holds.

    None if they do not: too many rows, rows that 16-byte loads cannot read, a norm that would have to be copied (it is
    read before the copy need be done), or more normalised rows than a block's shared memory holds.
    """
    (B, K), N, size = x.shape, w.shape[0], x.itemsize
    if not (0 < B <= MAX_ROWS and N and K and K * size % 16 == 0 and w.stride(1) == 1 and w.stride(0) * size % 16 == 0):
        return None
    x = rows_contiguous(x)
    if x.stride(0) * size % 16:
        x = x.contiguous()
    if norm is not None and not norm.is_contiguous():
        return None
    held = (x, w) if norm is None else (x, w, norm)
    if any(tensor.data_ptr() % 16 for tensor in held):
        return None
    made = extension.EXTENSION.GemvArgs(
        x.dtype == torch.bfloat16, x.data_ptr(), 0 if norm is None else norm.data_ptr(), w.data_ptr(),
        x.stride(0), w.stride(0), B, K, N, eps,
    )  # fmt: skip
    if norm is not None:
        needed = extension.EXTENSION.normalised_bytes(made) + _STATIC_SHARED_MEMORY
        if needed > extension.shared_memory(x):
            return None
    return made, held


def _fake(x, w, norm, eps, residual, swiglu):
    return x.new_empty(x.shape[0], w.shape[0] // 2 if swiglu else w.shape[0])


@op(
    "decode_linear",
    "(Tensor x, Tensor w, Tensor? norm, float eps, Tensor? residual, bool swiglu) -> Tensor",
    kernel="cuda",
    fake=_fake,
)
def _decode_linear(x, w, norm, eps, residual, swiglu):
    if extension.runs_extension(x, w, norm, residual) and (made := gemv_args(x, norm, w, eps)):
        given, held = made
        residual = None if residual is None else residual.contiguous()
        y = x.new_empty(x.shape[0], w.shape[0] // 2 if swiglu else w.shape[0])
        extension.EXTENSION.decode_linear(
            given, 0 if residual is None else residual.data_ptr(), swiglu, y.data_ptr(), extension.stream(x)
        )
        del held  # until here: a copy among them must not be freed before its kernel is in the stream
        return y
    return decode_linear_reference(x, w, norm, eps, residual, swiglu)


def decode_linear(x, w, *, norm=None, eps=1e-6, residual=None, swiglu=False):
    """Multiply a few rows, normalised first if there is a ``norm``, by one weight.

    Args:
        x: [B, K], floating point; the kernel takes B <= 8 in float32 or bfloat16.
        w: [N, K], dtype of ``x``; with ``swiglu`` rows alternate gate and up. On CUDA ``w`` and ``norm`` are read while
            work queued before may still run, so none of that may write them.
        norm: [K], dtype of ``x``: the weight of an RMSNorm of ``x``; None multiplies ``x`` as it is.
        eps: of the norm, added to the mean square.
        residual: [B, N] like ``x``, added to the product.
        swiglu: whether to combine pairs of outputs; not with a residual.

    Returns:
        [B, N], with ``swiglu`` [B, N // 2], contiguous.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or the epilogues exclude each other; the message names the
            offender.
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
            raise ValueError("decode_linear: swiglu and residual exclude each other; call linear for both")
    if swiglu and N % 2:
        raise ValueError(f"decode_linear: w has {N} rows, but swiglu needs pairs of gate and up")
    check_devices("decode_linear", x=x, w=w, norm=norm, residual=residual)
    return _decode_linear(x, w, norm, eps, residual, swiglu)
