"""Routed RMSNorm with residual: ``y = (x + r) / rms(x + r) * w``, ``rms(a) = sqrt(mean(a^2) + eps)``.

Rows [0, G) of a packed batch belong to the generation expert and take ``w_gen``; rows [G, T) belong to the
understanding expert and take ``w_und``. Statistics are float32 (float64 for float64 rows); the normalised value is
rounded to the input dtype *before* the weight, as in Qwen2 (Zhang & Sennrich 2019, arXiv:1910.07467; order:
transformers Qwen2RMSNorm).

Traffic: reads x and r, writes y and x + r, each [T, H]; memory-bound.
"""

import torch
import torch.nn.functional as F
from torch.compiler import is_compiling


def rms_norm_reference(x, residual, w_gen, w_und, G, eps):
    """The formula, in PyTorch, for any device and dtype. Shapes as in :func:`rms_norm`."""
    summed = x if residual is None else x + residual
    normed = F.rms_norm(summed, summed.shape[1:], None, eps)  # without a weight it rounds once, after the division
    return scale_rows_(normed, w_gen, w_und, G), summed


def scale_rows_(x, w_gen, w_und, G):
    """Multiply rows [0, G) by ``w_gen`` and the others by ``w_und``, in place; return ``x``."""
    if G == 0:
        return x.mul_(w_und)
    if G == x.shape[0]:
        return x.mul_(w_gen)
    gen, und = x.split_with_sizes((G, x.shape[0] - G))
    gen.mul_(w_gen)
    und.mul_(w_und)
    return x


torch.library.define(
    "bagel_rt::rms_norm",
    "(Tensor x, Tensor w_gen, Tensor w_und, SymInt G, float eps) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "bagel_rt::add_rms_norm",
    "(Tensor x, Tensor residual, Tensor w_gen, Tensor w_und, SymInt G, float eps) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


def _launch_rms_norm(x, w_gen, w_und, G, eps):
    return rms_norm_reference(x, None, w_gen, w_und, G, eps)[0]


torch.library.impl("bagel_rt::rms_norm", "default", _launch_rms_norm)


def _launch_add_rms_norm(x, residual, w_gen, w_und, G, eps):
    return rms_norm_reference(x, residual, w_gen, w_und, G, eps)


torch.library.impl("bagel_rt::add_rms_norm", "default", _launch_add_rms_norm)


@torch.library.register_fake("bagel_rt::rms_norm")
def _fake_rms_norm(x, w_gen, w_und, G, eps):
    return x.new_empty(x.shape)


@torch.library.register_fake("bagel_rt::add_rms_norm")
def _fake_add_rms_norm(x, residual, w_gen, w_und, G, eps):
    return x.new_empty(x.shape), x + residual


_rms_norm = torch.ops.bagel_rt.rms_norm.default
_add_rms_norm = torch.ops.bagel_rt.add_rms_norm.default


def rms_norm(x, residual, w_gen, w_und, G, eps):
    """Normalise packed rows, each with its expert's weight.

    Args:
        x: [T, H], floating point.
        residual: [T, H] like ``x``, or None.
        w_gen, w_und: [H], dtype of ``x``.
        G: number of generation rows, 0 <= G <= T.
        eps: added to the mean square.

    Returns:
        (y, x + residual), both [T, H]; without a residual the second is ``x`` itself.

    Raises:
        ValueError: shapes, dtypes or G disagree; the message names the offender.
    """
    T, H = shape = x.shape
    if not 0 <= G <= T:
        raise ValueError(f"rms_norm: G={G} generation rows, but x has {T} rows")
    for name, w in ("w_gen", w_gen), ("w_und", w_und):
        if w.shape != (H,) or w.dtype != x.dtype:
            raise ValueError(f"rms_norm: {name} is {tuple(w.shape)} {w.dtype}, expected {(H,)} {x.dtype}")
    if residual is None:
        run = _rms_norm if is_compiling() else _launch_rms_norm
        return run(x, w_gen, w_und, G, eps), x
    if residual.shape != shape or residual.dtype != x.dtype:
        raise ValueError(f"rms_norm: residual is {tuple(residual.shape)} {residual.dtype}, expected {(T, H)} {x.dtype}")
    run = _add_rms_norm if is_compiling() else _launch_add_rms_norm
    return run(x, residual, w_gen, w_und, G, eps)
