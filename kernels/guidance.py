"""Classifier-free guidance with two conditions, renormalised, and the Euler step of a flow: ``x' = x - v dt``.

c, u, w are the velocities with every condition, without the text, without the images; a and b the text and image
scales; m = renorm_min. As in BAGEL (Deng et al. 2025, arXiv:2505.14683; guidance: Ho & Salimans 2022,
arXiv:2207.12598, two conditions as in InstructPix2Pix, arXiv:2211.09800), with f(g) = clamp(|c| / (|g| + 1e-8), m, 1):

    a <= 1                         v = c, whatever b
    renorm global or channel       g = u + a (c - u);  if b > 1: g = w + b (g - w);  v = f(g) g
    renorm text_channel            g = u + a (c - u);  g = f(g) g;  v = w + b (g - w) if b > 1, else g

``global`` takes one L2 norm over all rows given (one image), the other two one norm per row. f never amplifies.
Arithmetic is float32, or float64 for float64 velocities; x' is float32 or wider.

The kernels take one launch; ``global`` takes two, of which the first leaves sums of squares, one a program, and every
program of the second adds them up in the same order, so that results repeat. Traffic: reads x and the velocities
(``global``: the velocities twice), writes x', each [N, C]; memory-bound.
"""

import torch
from torch.compiler import is_compiling

from bagel_rt.kernels import configs
from bagel_rt.kernels.backend import runs_kernel
from bagel_rt.kernels.norm import rows_contiguous
from bagel_rt.kernels.triton_language import jit, tl, triton


def guided_velocity_reference(v_cond, v_no_text, v_no_img, text_scale, image_scale, renorm, renorm_min):
    """The formula, in PyTorch, for any device and dtype. Shapes as in :func:`guided_velocity`."""
    cond = _widen(v_cond)
    if not text_scale > 1:
        return cond
    guided = _extrapolate(_widen(v_no_text), cond, text_scale)
    if renorm == "text_channel":
        guided = _renormalise(guided, cond, -1, renorm_min)
    if image_scale > 1:
        guided = _extrapolate(_widen(v_no_img), guided, image_scale)
    if renorm != "text_channel":
        guided = _renormalise(guided, cond, None if renorm == "global" else -1, renorm_min)
    return guided


def _widen(v):
    return v.float() if v.dtype.itemsize < 4 else v


def _extrapolate(origin, target, scale):
    return torch.add(origin, target - origin, alpha=scale)


def _renormalise(guided, cond, dim, smallest):
    norm_cond = torch.linalg.vector_norm(cond, dim=dim, keepdim=True)
    norm_guided = torch.linalg.vector_norm(guided, dim=dim, keepdim=True)
    return guided * (norm_cond / (norm_guided + 1e-8)).clamp(smallest, 1)


def guided_step_reference(x, v_cond, v_no_text, v_no_img, text_scale, image_scale, renorm, renorm_min, dt):
    """The formula, in PyTorch, for any device and dtype. Shapes as in :func:`guided_step`."""
    x = _widen(x)
    v = guided_velocity_reference(v_cond, v_no_text, v_no_img, text_scale, image_scale, renorm, renorm_min)
    return torch.sub(x, v.to(x.dtype), alpha=dt).contiguous()


@jit
def _guided_tile(
    cond, no_text_ptr, no_img_ptr, no_text_stride, no_img_stride, row, column, inside, text_scale, image_scale,
    renorm_min, IMAGE: tl.constexpr, RENORM: tl.constexpr,
):  # fmt: skip
    """The guided velocity of a tile of rows, renormalised by row; ``global`` is left to the caller."""
    no_text = tl.load(no_text_ptr + row * no_text_stride + column, mask=inside, other=0.0).to(tl.float32)
    if IMAGE:
        no_img = tl.load(no_img_ptr + row * no_img_stride + column, mask=inside, other=0.0).to(tl.float32)
    guided = no_text + text_scale * (cond - no_text)
    if RENORM == "text_channel":
        guided *= _row_factor(cond, guided, renorm_min)
    if IMAGE:
        guided = no_img + image_scale * (guided - no_img)
    if RENORM == "channel":
        guided *= _row_factor(cond, guided, renorm_min)
    return guided


@jit
def _row_factor(cond, guided, renorm_min):
    squares_cond = tl.sum(cond * cond, axis=1, keep_dims=True)
    return _factor(squares_cond, tl.sum(guided * guided, axis=1, keep_dims=True), renorm_min)


@jit
def _factor(squares_cond, squares_guided, renorm_min):
    ratio = tl.sqrt(squares_cond) / (tl.sqrt(squares_guided) + 1e-8)
    ratio = tl.maximum(ratio, renorm_min, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(ratio, 1.0, propagate_nan=tl.PropagateNan.ALL)


@jit(do_not_specialize=["N"])
def _squares_kernel(
    cond_ptr, no_text_ptr, no_img_ptr, squares_ptr, cond_stride, no_text_stride, no_img_stride, N,
    text_scale, image_scale, C: tl.constexpr, IMAGE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """squares [2, programs]: each program's share of |c|^2, then of |g|^2."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, COLUMNS)[None, :]
    squares_cond = 0.0
    squares_guided = 0.0
    for tile in range(program, tl.cdiv(N, ROWS), programs):
        row = (tile * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        inside = (row < N) & (column < C)
        cond = tl.load(cond_ptr + row * cond_stride + column, mask=inside, other=0.0).to(tl.float32)
        guided = _guided_tile(
            cond, no_text_ptr, no_img_ptr, no_text_stride, no_img_stride, row, column, inside, text_scale,
            image_scale, 1.0, IMAGE, "global",
        )  # fmt: skip
        squares_cond += tl.sum(cond * cond)
        squares_guided += tl.sum(guided * guided)
    tl.store(squares_ptr + program, squares_cond)
    tl.store(squares_ptr + programs + program, squares_guided)


@jit(do_not_specialize=["N", "parts"])
def _step_kernel(
    x_ptr, cond_ptr, no_text_ptr, no_img_ptr, squares_ptr, out_ptr,
    x_stride, cond_stride, no_text_stride, no_img_stride, N, parts, text_scale, image_scale, renorm_min, dt,
    C: tl.constexpr, TEXT: tl.constexpr, IMAGE: tl.constexpr, RENORM: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """ROWS tokens of C <= COLUMNS channels a program; squares [2, parts], parts <= PARTS, for ``global`` only."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < N) & (column < C)
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(cond_ptr + row * cond_stride + column, mask=inside, other=0.0).to(tl.float32)
    if TEXT:
        v = _guided_tile(
            v, no_text_ptr, no_img_ptr, no_text_stride, no_img_stride, row, column, inside, text_scale, image_scale,
            renorm_min, IMAGE, RENORM,
        )  # fmt: skip
        if RENORM == "global":
            part = tl.arange(0, PARTS)
            squares_cond = tl.sum(tl.load(squares_ptr + part, mask=part < parts, other=0.0))
            squares_guided = tl.sum(tl.load(squares_ptr + parts + part, mask=part < parts, other=0.0))
            v *= _factor(squares_cond, squares_guided, renorm_min)
    tl.store(out_ptr + row * C + column, x - v * dt, mask=inside)


def _run_kernels(x, v_cond, v_no_text, v_no_img, text_scale, image_scale, renorm, renorm_min, dt):
    N, C = x.shape
    out = x.new_empty(N, C, dtype=torch.float32)
    if N == 0 or C == 0:
        return out
    text, image = text_scale > 1, text_scale > 1 and image_scale > 1
    velocities, strides = [], []
    for v in (v_cond, v_no_text if text else None, v_no_img if image else None):
        v = v if v is None else rows_contiguous(v)
        velocities.append(v)
        strides.append(0 if v is None else v.stride(0))
    x = rows_contiguous(x)

    tiles = dict(configs.tiles("guided_step", "narrow" if C <= 4096 else "wide", x.device))
    columns, most_parts = triton.next_power_of_2(C), tiles.pop("PARTS")
    rows = max(1, tiles.pop("ELEMENTS") // columns)
    tiles |= {"C": C, "IMAGE": image, "ROWS": rows, "COLUMNS": columns}
    programs = triton.cdiv(N, rows)
    squares, parts, scales = None, 0, (float(text_scale), float(image_scale))
    if text and renorm == "global":
        parts = min(programs, most_parts)
        squares = out.new_empty(2, parts)
        _squares_kernel[(parts,)](*velocities, squares, *strides, N, *scales, **tiles)
    _step_kernel[(programs,)](
        x, *velocities, squares, out, x.stride(0), *strides, N, parts, *scales, float(renorm_min), float(dt),
        TEXT=text, RENORM=renorm if text else None, PARTS=most_parts, **tiles,
    )  # fmt: skip
    return out


torch.library.define(
    "bagel_rt::guided_step",
    "(Tensor x, Tensor v_cond, Tensor? v_no_text, Tensor? v_no_img, float text_scale, float image_scale, str renorm, "
    "float renorm_min, float dt) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


def _launch(x, v_cond, v_no_text, v_no_img, text_scale, image_scale, renorm, renorm_min, dt):
    kernels = runs_kernel(x) and runs_kernel(v_cond, v_no_text, v_no_img)  # x or the velocities may be float64
    run = _run_kernels if kernels else guided_step_reference
    return run(x, v_cond, v_no_text, v_no_img, text_scale, image_scale, renorm, renorm_min, dt)


torch.library.impl("bagel_rt::guided_step", "default", _launch)


@torch.library.register_fake("bagel_rt::guided_step")
def _fake(x, v_cond, v_no_text, v_no_img, text_scale, image_scale, renorm, renorm_min, dt):
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, torch.float32))


_guided_step = torch.ops.bagel_rt.guided_step.default


def guided_velocity(v_cond, v_no_text, v_no_img, text_scale, image_scale, renorm, renorm_min):
    """Combine the branches' velocities of one image into the one to follow.

    Args:
        v_cond: [N, C] velocity under every condition, floating point.
        v_no_text: [N, C] without the text; needed when ``text_scale`` > 1, otherwise ignored.
        v_no_img: [N, C] without the images; needed when both scales are > 1, otherwise ignored.
        text_scale, image_scale: guidance scales; 1 or less switches a guidance off, and no text guidance means none.
        renorm: "global", "channel" or "text_channel".
        renorm_min: the least factor a renorm may shrink by; 1 switches it off.

    Returns:
        [N, C], float32 (float64 for float64 velocities); without guidance this may be ``v_cond`` itself.

    Raises:
        ValueError: a needed velocity is missing, shapes or dtypes disagree, or ``renorm`` is unknown.
    """
    _check("guided_velocity", v_cond.shape, v_cond, v_no_text, v_no_img, text_scale, image_scale, renorm)
    return guided_velocity_reference(v_cond, v_no_text, v_no_img, text_scale, image_scale, renorm, renorm_min)


def guided_step(x, v_cond, v_no_text, v_no_img, text_scale, image_scale, renorm, renorm_min, dt):
    """Take one Euler step of one image along the guided velocity.

    Args:
        x: [N, C] latents, floating point.
        v_cond, v_no_text, v_no_img, text_scale, image_scale, renorm, renorm_min: as in :func:`guided_velocity`,
            velocities shaped like ``x``.
        dt: time from this step down to the next, positive when denoising.

    Returns:
        x - v dt: [N, C], contiguous, float32 (float64 for float64 ``x``), a new tensor.

    Raises:
        ValueError: as :func:`guided_velocity`.
    """
    _check("guided_step", x.shape, v_cond, v_no_text, v_no_img, text_scale, image_scale, renorm)
    run = _guided_step if is_compiling() else _launch
    return run(x, v_cond, v_no_text, v_no_img, text_scale, image_scale, renorm, renorm_min, dt)


def _check(op, shape, v_cond, v_no_text, v_no_img, text_scale, image_scale, renorm):
    if renorm not in ("global", "channel", "text_channel"):
        raise ValueError(f"{op}: renorm={renorm!r} is not one of 'global', 'channel', 'text_channel'")
    if text_scale > 1 and v_no_text is None:
        raise ValueError(f"{op}: text_scale={text_scale} guides away from v_no_text, which is None")
    if text_scale > 1 and image_scale > 1 and v_no_img is None:
        raise ValueError(f"{op}: image_scale={image_scale} guides away from v_no_img, which is None")
    for name, v in (("v_cond", v_cond), ("v_no_text", v_no_text), ("v_no_img", v_no_img)):
        if v is not None and (v.shape != shape or v.dtype != v_cond.dtype):
            raise ValueError(f"{op}: {name} is {tuple(v.shape)} {v.dtype}, expected {tuple(shape)} {v_cond.dtype}")
