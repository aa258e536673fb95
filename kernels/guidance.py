"""Classifier-free guidance with two conditions and renormalization, and the Euler step of a flow: ``x' = x - v dt``.

c, u, w are the velocities under all conditions, without the text, and without the images; a and b are the text and
image scales; m = renorm_min. As in BAGEL (Deng et al. 2025, arXiv:2505.14683; guidance: Ho & Salimans 2022,
arXiv:2207.12598, two conditions as in InstructPix2Pix, arXiv:2211.09800), with f(g) = clamp(|c| / (|g| + 1e-8), m, 1):

    a <= 1                         v = c for any b
    renorm global or channel       g = u + a (c - u);  if b > 1: g = w + b (g - w);  v = f(g) g
    renorm text_channel            g = u + a (c - u);  g = f(g) g;  v = w + b (g - w) if b > 1, else g

``global`` takes one L2 norm over all rows of an image, the other two one norm per row. f never amplifies. Arithmetic is
float32, or float64 for float64 velocities.

One call steps a whole batch of images. The kernels read each image's rows and settings from tensors, so a captured CUDA
graph can be replayed with other values, and nothing synchronizes the host. A guided step takes two launches: the first
stores partial sums of squares of the images with ``global`` renorm, one per program; every program of the second adds
the sums of its image in the same order. Results are therefore deterministic and do not depend on the rest of the batch.
An unguided step takes one launch. Traffic: reads x and the velocities (``global``: the velocities twice), writes x,
each [N, C]; memory-bound.
"""

import torch
from torch import Tensor

from . import configs
from .backend import check_devices, mismatch, runs_kernel
from .norm import rows_contiguous
from .registry import op
from .triton_language import jit, tl, triton

RENORMS = ("global", "channel", "text_channel")
"""Renormalization modes. The ``cfg_table`` of :func:`cfg_euler_step` contains their indices."""


def guided_velocity_reference(
    v_cond: Tensor, v_no_text: Tensor, v_no_img: Tensor, text_scale: float, image_scale: float, renorm: str,
    renorm_min: float,
) -> Tensor:  # fmt: skip
    """The formula, in PyTorch, for any device and dtype. Shapes as in :func:`guided_velocity`, none missing."""
    cond = _widen(v_cond)
    if not text_scale > 1:
        return cond
    guided = _extrapolate(_widen(v_no_text), cond, text_scale)
    if renorm == "text_channel":
        guided = _renormalize(guided, cond, -1, renorm_min)
    if image_scale > 1:
        guided = _extrapolate(_widen(v_no_img), guided, image_scale)
    if renorm != "text_channel":
        guided = _renormalize(guided, cond, None if renorm == "global" else -1, renorm_min)
    return guided


def _widen(v: Tensor) -> Tensor:
    return v.float() if v.dtype.itemsize < 4 else v


def _extrapolate(origin: Tensor, target: Tensor, scale: float) -> Tensor:
    return torch.add(origin, target - origin, alpha=scale)


def _renormalize(guided: Tensor, cond: Tensor, dim: int | None, smallest: float) -> Tensor:
    norm_cond = torch.linalg.vector_norm(cond, dim=dim, keepdim=True)
    norm_guided = torch.linalg.vector_norm(guided, dim=dim, keepdim=True)
    return guided * (norm_cond / (norm_guided + 1e-8)).clamp(smallest, 1)


def cfg_euler_step_reference(
    x: Tensor, v: Tensor, image_table: Tensor, cfg_table: Tensor, max_rows: int, guided: bool = True
) -> None:
    """The formula, image by image, in PyTorch, for any device and dtype. Shapes as in :func:`cfg_euler_step`."""
    for (first, rows, *branches), settings in zip(image_table.tolist(), cfg_table.tolist(), strict=True):
        dt, text_scale, image_scale, renorm_min, renorm = settings
        cond, no_text, no_img = (v.narrow(0, branch, rows) for branch in branches)
        if not guided:
            text_scale = image_scale = 1.0
        velocity = guided_velocity_reference(
            cond, no_text, no_img, text_scale, image_scale, RENORMS[int(renorm)], renorm_min
        )
        x.narrow(0, first, rows).sub_(velocity.to(x.dtype), alpha=dt)


_GLOBAL, _TEXT_CHANNEL = tl.constexpr(RENORMS.index("global")), tl.constexpr(RENORMS.index("text_channel"))


@jit
def _branch(
    v_ptr: tl.tensor, v_stride: tl.tensor, first: tl.tensor, row: tl.tensor, rows: tl.tensor, column: tl.tensor,
    C: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Load a tile of the branch at rows [first, first + rows) of v. Elements outside it are 0 and not read."""
    at = v_ptr + (first + row).to(tl.int64) * v_stride + column
    return tl.load(at, mask=(row < rows) & (column < C), other=0.0).to(tl.float32)


@jit
def _scales(parameters: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """(text scale, image scale) of an image; 1 if that guidance is off."""
    text_scale, image_scale = tl.load(parameters + 1), tl.load(parameters + 2)
    image_scale = tl.where((text_scale > 1) & (image_scale > 1), image_scale, 1.0)
    return tl.where(text_scale > 1, text_scale, 1.0), image_scale


@jit
def _extrapolated(origin: tl.tensor, target: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """Move from ``origin`` past ``target``. Exactly ``target`` if guidance is off: ``origin`` is 0, ``scale`` is 1."""
    return origin + scale * (target - origin)


@jit
def _factor(squares_cond: tl.tensor, squares_guided: tl.tensor, renorm_min: tl.tensor) -> tl.tensor:
    ratio = tl.sqrt(squares_cond) / (tl.sqrt(squares_guided) + 1e-8)
    ratio = tl.maximum(ratio, renorm_min, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(ratio, 1.0, propagate_nan=tl.PropagateNan.ALL)


@jit
def _squares_kernel(
    v_ptr: tl.tensor, images_ptr: tl.tensor, parameters_ptr: tl.tensor, squares_ptr: tl.tensor, v_stride: tl.tensor,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
) -> None:  # fmt: skip
    """Partial sums of |c|^2 and |g|^2 per image: program (part, image) writes squares [images, 2, PARTS].

    Tile t of an image belongs to part t mod PARTS, whatever else is in the batch. Parts without a tile, and images
    without global renorm, are neither written here nor read by the step kernel.
    """
    part, image = tl.program_id(0), tl.program_id(1)
    images, parameters = images_ptr + image * 5, parameters_ptr + image * 5
    rows, cond_row = tl.load(images + 1), tl.load(images + 2)
    no_text_row, no_img_row = tl.load(images + 3), tl.load(images + 4)
    text_scale, image_scale = _scales(parameters)
    tiles = tl.cdiv(rows, ROWS)
    if (text_scale == 1) | (tl.load(parameters + 4) != _GLOBAL) | (part >= tiles):
        return
    no_img_rows = tl.where(image_scale > 1, rows, 0)
    column = tl.arange(0, COLUMNS)[None, :]
    squares_cond = 0.0
    squares_guided = 0.0
    for tile in range(part, tiles, PARTS):
        row = tile * ROWS + tl.arange(0, ROWS)[:, None]
        cond = _branch(v_ptr, v_stride, cond_row, row, rows, column, C)
        no_text = _branch(v_ptr, v_stride, no_text_row, row, rows, column, C)
        no_img = _branch(v_ptr, v_stride, no_img_row, row, no_img_rows, column, C)
        guided = _extrapolated(no_img, _extrapolated(no_text, cond, text_scale), image_scale)
        squares_cond += tl.sum(cond * cond)
        squares_guided += tl.sum(guided * guided)
    tl.store(squares_ptr + image * 2 * PARTS + part, squares_cond)
    tl.store(squares_ptr + image * 2 * PARTS + PARTS + part, squares_guided)


@jit
def _step_kernel(
    x_ptr: tl.tensor, v_ptr: tl.tensor, images_ptr: tl.tensor, parameters_ptr: tl.tensor, squares_ptr: tl.tensor,
    v_stride: tl.tensor,
    C: tl.constexpr, GUIDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
) -> None:  # fmt: skip
    """Step ROWS rows of C <= COLUMNS channels per program (tile, image); squares come from :func:`_squares_kernel`.

    Disabled guidance takes the same path, with an empty branch and scale 1. In straight-line code all loads can be
    issued before the first reduction, so none waits for it. The exception is ROWS == 1, where a row fills the
    registers: there x is loaded last.
    """
    tile, image = tl.program_id(0), tl.program_id(1)
    images, parameters = images_ptr + image * 5, parameters_ptr + image * 5
    rows = tl.load(images + 1)
    row = tile * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < C)
    moved = x_ptr + (tl.load(images) + row).to(tl.int64) * C + column
    if ROWS > 1:
        x = tl.load(moved, mask=inside, other=0.0)
    v = _branch(v_ptr, v_stride, tl.load(images + 2), row, rows, column, C)
    if GUIDED:
        text_scale, image_scale = _scales(parameters)
        renorm_min, renorm = tl.load(parameters + 3), tl.load(parameters + 4)
        no_text_rows, no_img_rows = tl.where(text_scale > 1, rows, 0), tl.where(image_scale > 1, rows, 0)
        no_text = _branch(v_ptr, v_stride, tl.load(images + 3), row, no_text_rows, column, C)
        no_img = _branch(v_ptr, v_stride, tl.load(images + 4), row, no_img_rows, column, C)
        part = tl.arange(0, PARTS)
        parts = tl.where(renorm == _GLOBAL, tl.cdiv(no_text_rows, ROWS), 0)
        squares = squares_ptr + image * 2 * PARTS + part
        squares_of_cond = tl.load(squares, mask=part < parts, other=0.0)
        squares_of_guided = tl.load(squares + PARTS, mask=part < parts, other=0.0)

        text = _extrapolated(no_text, v, text_scale)
        measured = tl.where(renorm == _TEXT_CHANNEL, text, _extrapolated(no_img, text, image_scale))
        squares_cond = tl.sum(v * v, axis=1, keep_dims=True)
        squares_guided = tl.sum(measured * measured, axis=1, keep_dims=True)
        squares_cond = tl.where(renorm == _GLOBAL, tl.sum(squares_of_cond), squares_cond)
        squares_guided = tl.where(renorm == _GLOBAL, tl.sum(squares_of_guided), squares_guided)
        factor = tl.where(text_scale > 1, _factor(squares_cond, squares_guided, renorm_min), 1.0)
        before = tl.where(renorm == _TEXT_CHANNEL, factor, 1.0)
        behind = tl.where(renorm == _TEXT_CHANNEL, 1.0, factor)
        v = _extrapolated(no_img, text * before, image_scale) * behind
    if ROWS == 1:
        x = tl.load(moved, mask=inside, other=0.0)
    tl.store(moved, x - v * tl.load(parameters), mask=inside)


def _run_kernels(x: Tensor, v: Tensor, image_table: Tensor, cfg_table: Tensor, max_rows: int, guided: bool) -> None:
    C = x.shape[1]
    if not (len(image_table) and max_rows and C):
        return
    v, image_table, cfg_table = rows_contiguous(v), image_table.contiguous(), cfg_table.contiguous()
    tiles = dict(configs.tiles("cfg_euler_step", "narrow" if C <= 4096 else "wide", x.device))
    columns, max_parts = triton.next_power_of_2(C), tiles["PARTS"]
    rows = max(1, tiles.pop("ELEMENTS") // columns)
    tiles |= {"C": C, "ROWS": rows, "COLUMNS": columns}
    programs = triton.cdiv(max_rows, rows)
    squares = None
    if guided:
        squares = x.new_empty(len(image_table), 2, max_parts)
        grid = min(programs, max_parts), len(image_table)
        _squares_kernel[grid](v, image_table, cfg_table, squares, v.stride(0), **tiles)
    grid = programs, len(image_table)
    _step_kernel[grid](x, v, image_table, cfg_table, squares, v.stride(0), GUIDED=guided, **tiles)


def _fake(x: Tensor, v: Tensor, image_table: Tensor, cfg_table: Tensor, max_rows: int, guided: bool) -> None:
    return None


@op(
    "cfg_euler_step",
    "(Tensor(a!) x, Tensor v, Tensor image_table, Tensor cfg_table, SymInt max_rows, bool guided) -> ()",
    kernel="triton",
    fake=_fake,
)
def _cfg_euler_step(x: Tensor, v: Tensor, image_table: Tensor, cfg_table: Tensor, max_rows: int, guided: bool) -> None:
    kernels = runs_kernel(x) and runs_kernel(v)  # checked separately: either may be float64
    run = _run_kernels if kernels else cfg_euler_step_reference
    run(x, v, image_table, cfg_table, max_rows, guided)


def guided_velocity(
    v_cond: Tensor, v_no_text: Tensor | None, v_no_img: Tensor | None, text_scale: float, image_scale: float,
    renorm: str, renorm_min: float,
) -> Tensor:  # fmt: skip
    """Combine the velocities of one image's branches into the guided velocity.

    Args:
        v_cond: [N, C] velocity under all conditions, floating point.
        v_no_text: [N, C] velocity without the text; required if ``text_scale`` > 1, else ignored.
        v_no_img: [N, C] velocity without the images; required if both scales are > 1, else ignored.
        text_scale, image_scale: guidance scales. 1 or less disables the guidance; a text scale of 1 or less disables
            both.
        renorm: "global", "channel" or "text_channel".
        renorm_min: lower bound of the renormalization factor; 1 disables renormalization.

    Returns:
        [N, C], float32 (float64 for float64 velocities). Without guidance this may be ``v_cond`` itself.

    Raises:
        ValueError: a required velocity is missing, a shape or dtype does not match, or ``renorm`` is unknown.
    """
    if renorm not in RENORMS:
        raise ValueError(f"guided_velocity: renorm must be {', '.join(map(repr, RENORMS))}, got {renorm!r}.")
    if text_scale > 1 and v_no_text is None:
        raise ValueError(f"guided_velocity: v_no_text must be given with text_scale={text_scale}, got None.")
    if text_scale > 1 and image_scale > 1 and v_no_img is None:
        raise ValueError(f"guided_velocity: v_no_img must be given with image_scale={image_scale}, got None.")
    for name, v in (("v_no_text", v_no_text), ("v_no_img", v_no_img)):
        if v is not None and (v.shape != v_cond.shape or v.dtype != v_cond.dtype):
            raise mismatch("guided_velocity", name, v, v_cond.shape, v_cond.dtype)
    v_no_text, v_no_img = (v_cond if v is None else v for v in (v_no_text, v_no_img))  # a missing one is not read
    return guided_velocity_reference(v_cond, v_no_text, v_no_img, text_scale, image_scale, renorm, renorm_min)


def cfg_euler_step(
    x: Tensor, v: Tensor, image_table: Tensor, cfg_table: Tensor, max_rows: int, guided: bool = True
) -> None:
    """Take one Euler step of every image along its guided velocity, in place: x becomes x - v dt.

    The values of both tables are not checked, since that would synchronize the host. Rows must lie inside ``x`` and
    ``v``, and images must not share rows of ``x``. Rows of ``x`` outside all images are left unchanged.

    Args:
        x: [N, C] latents of all images, float32 or float64, contiguous; overwritten.
        v: [R, C] velocities of all branches, floating point.
        image_table: int32 [I, 5], per image: first row in ``x``, number of rows, and first row in ``v`` of the branches
            with all conditions, without the text, and without the images. Branches that the guidance of an image does
            not use are not read; any row index is valid there.
        cfg_table: float32 [I, 5], per image: dt (time from this step to the next, positive when denoising),
            text_scale, image_scale, renorm_min as in :func:`guided_velocity`, and the index of the renorm in
            ``RENORMS``.
        max_rows: an upper bound of the number of rows of an image; sizes the grid.
        guided: False to skip guidance for all images at this step; only dt of ``cfg_table`` is read.

    Raises:
        ValueError: a shape, dtype, layout or device does not match. The message names the argument.
    """
    if x.dtype not in (torch.float32, torch.float64) or x.dim() != 2 or not x.is_contiguous():
        layout = "" if x.is_contiguous() else ", not contiguous"
        raise ValueError(
            "cfg_euler_step: x must be a contiguous [N, C] of float32 or float64, since it is updated in place, "
            f"got {tuple(x.shape)} {x.dtype}{layout}."
        )
    if v.dim() != 2 or v.shape[1] != x.shape[1] or not v.is_floating_point():
        raise mismatch("cfg_euler_step", "v", v, ("R", x.shape[1]), "of a floating-point dtype")
    shape = (image_table.shape[0] if image_table.dim() else 0, 5)
    for name, tensor, dtype in (("image_table", image_table, torch.int32), ("cfg_table", cfg_table, torch.float32)):
        if tensor.shape != shape or tensor.dtype != dtype:
            raise mismatch("cfg_euler_step", name, tensor, shape, dtype)
    check_devices("cfg_euler_step", x=x, v=v, image_table=image_table, cfg_table=cfg_table)
    if max_rows < 0:
        raise ValueError(f"cfg_euler_step: max_rows must be 0 or more, got {max_rows}.")
    _cfg_euler_step(x, v, image_table, cfg_table, max_rows, guided)
