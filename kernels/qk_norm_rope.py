"""QK-norm, RoPE and the KV-cache write, on the rows of one fused projection.

Each row of ``qkv`` holds Hq query heads, then Hkv key heads, then Hkv value heads, of D channels. Every query and key
head ``h`` becomes

    x = h / sqrt(mean(h^2) + eps) * w          w: one [D] row per head, from norm_gen for rows [0, G), else norm_und
    (a, b) = halves of x  ->  (a cos - b sin, b cos + a sin)

(QK-norm: Henry et al. 2020, arXiv:2010.04245, with RMSNorm; RoPE: Su et al. 2021, arXiv:2104.09864, half-split pairing
as in GPT-NeoX and Qwen2). All of it in float32 (float64 for float64 rows), rounded once to the dtype of ``qkv``.
Values pass untouched. Keys and values of row r go to slot ``slots[r]`` of the caches; other slots stay as they are.

Traffic: reads qkv once, writes q, k and v once; memory-bound.
"""

import torch
import torch.nn.functional as F
from torch.compiler import is_compiling

from bagel_rt.kernels.norm import scale_rows_


def qk_norm_rope_reference(qkv, norm_gen, norm_und, cos, sin, slots, k_cache, v_cache, G, eps):
    """The formula, in PyTorch, for any device and dtype. Shapes as in :func:`qk_norm_rope`."""
    T = qkv.shape[0]
    _, Hkv, D = k_cache.shape
    heads = norm_gen.shape[0]
    qk, v = qkv.view(T, heads + Hkv, D).split_with_sizes((heads, Hkv), 1)
    if qk.dtype.itemsize < 4:
        qk = qk.float()
    x = scale_rows_(F.rms_norm(qk, (D,), None, eps), norm_gen, norm_und, G).view(T, heads, 2, D // 2)

    rotated = x * cos.view(T, 1, 1, D // 2)
    a, b = x.unbind(2)
    a_rotated, b_rotated = rotated.unbind(2)
    sin = sin.unsqueeze(1)
    a_rotated.addcmul_(b, sin, value=-1)
    b_rotated.addcmul_(a, sin)

    rotated = rotated.view(T, heads, D)
    if rotated.dtype != qkv.dtype:
        rotated = rotated.to(qkv.dtype)
    q, k = rotated.split_with_sizes((heads - Hkv, Hkv), 1)
    k_cache.index_copy_(0, slots, k)
    v_cache.index_copy_(0, slots, v)
    return q.contiguous()


torch.library.define(
    "bagel_rt::qk_norm_rope",
    "(Tensor qkv, Tensor norm_gen, Tensor norm_und, Tensor cos, Tensor sin, Tensor slots, Tensor(a!) k_cache, "
    "Tensor(b!) v_cache, SymInt G, float eps) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


def _launch(qkv, norm_gen, norm_und, cos, sin, slots, k_cache, v_cache, G, eps):
    return qk_norm_rope_reference(qkv, norm_gen, norm_und, cos, sin, slots, k_cache, v_cache, G, eps)


torch.library.impl("bagel_rt::qk_norm_rope", "default", _launch)


@torch.library.register_fake("bagel_rt::qk_norm_rope")
def _fake(qkv, norm_gen, norm_und, cos, sin, slots, k_cache, v_cache, G, eps):
    _, Hkv, D = k_cache.shape
    return qkv.new_empty(qkv.shape[0], norm_gen.shape[0] - Hkv, D)


_qk_norm_rope = torch.ops.bagel_rt.qk_norm_rope.default


def qk_norm_rope(qkv, norm_gen, norm_und, cos, sin, slots, k_cache, v_cache, G, eps):
    """Normalise and rotate query and key heads; store keys and values in the cache.

    Args:
        qkv: [T, (Hq + 2 Hkv) * D], floating point: query heads, key heads, value heads.
        norm_gen, norm_und: [Hq + Hkv, D], dtype of ``qkv``: one weight row per query head, then per key head.
        cos, sin: [T, D / 2] float32 (or float64 with float64 ``qkv``), at each row's RoPE position.
        slots: [T] int64, distinct: the cache slot each row's key and value go to.
        k_cache, v_cache: [S, Hkv, D], dtype of ``qkv``; written in place.
        G: number of generation rows, 0 <= G <= T.
        eps: added to the mean square.

    Returns:
        q: [T, Hq, D], contiguous.

    Raises:
        ValueError: shapes, dtypes or G disagree; the message names the offender.
        IndexError: a slot outside [0, S), on the CPU; CUDA stops with a device-side assertion instead.
    """
    T, width = qkv.shape
    _, Hkv, D = k_cache.shape
    dtype = qkv.dtype
    if not 0 <= G <= T:
        raise ValueError(f"qk_norm_rope: G={G} generation rows, but qkv has {T} rows")
    if D == 0 or D % 2:
        raise ValueError(f"qk_norm_rope: head_dim D={D} is not a positive even number; RoPE rotates pairs of channels")
    heads = width // D - Hkv
    if heads <= Hkv or width % D:
        raise ValueError(f"qk_norm_rope: qkv has {width} columns, expected (Hq + 2*{Hkv}) * {D} with Hq >= 1")
    for name, tensor, shape in (
        ("norm_gen", norm_gen, (heads, D)),
        ("norm_und", norm_und, (heads, D)),
        ("v_cache", v_cache, k_cache.shape),
    ):
        if tensor.shape != shape or tensor.dtype != dtype:
            raise ValueError(
                f"qk_norm_rope: {name} is {tuple(tensor.shape)} {tensor.dtype}, expected {tuple(shape)} {dtype}"
            )
    if k_cache.dtype != dtype:
        raise ValueError(f"qk_norm_rope: k_cache is {k_cache.dtype}, expected {dtype} like qkv")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape != (T, D // 2) or table.dtype not in (torch.float32, wide):
            raise ValueError(
                f"qk_norm_rope: {name} is {tuple(table.shape)} {table.dtype}, expected {(T, D // 2)} torch.float32"
            )
    if slots.shape != (T,) or slots.dtype != torch.int64:
        raise ValueError(f"qk_norm_rope: slots is {tuple(slots.shape)} {slots.dtype}, expected {(T,)} torch.int64")
    run = _qk_norm_rope if is_compiling() else _launch
    return run(qkv, norm_gen, norm_und, cos, sin, slots, k_cache, v_cache, G, eps)
