"""GroupNorm with an optional SiLU: ``y = silu((x - mean) / sqrt(var + eps) * weight + bias)``.

x is a feature map [B, C, H, W]. Mean and variance are taken over a group of C / groups consecutive channels and all
H x W positions of one image (Wu & He 2018, arXiv:1803.08494). They are float32 (float64 for float64 maps); the result
is rounded once. :func:`group_norm_moments` computes the statistics alone, to normalize a large map in strips.

The kernels support channels-last maps. The first computes the mean and the sum of squared deviations of each part of
the positions, which avoids the cancellation of E[x^2] - E[x]^2. The second combines the parts in order. The third
normalizes. An image's result does not depend on the rest of the batch. Traffic: reads x twice, writes y; memory-bound.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import configs
from .backend import mismatch, runs_kernel, wants_gradient
from .registry import op
from .triton_language import jit, tl, triton

MAX_GROUP_CHANNELS = 4096
"""Maximum channels per group of the kernels, which keep them in registers; wider groups run the reference."""


REFERENCE_ELEMENTS = 2**18
"""Elements that the reference centers at a time: small enough for a CPU cache, and no copy of a large map is made."""


def group_norm_moments_reference(x: Tensor, groups: int, eps: float) -> Tensor:
    """The formula, in PyTorch, for any device and dtype. Shapes as in :func:`group_norm_moments`."""
    size = x.shape[1] // groups
    count = size * x.shape[2] * x.shape[3]
    mean = x.sum((2, 3), dtype=torch.promote_types(x.dtype, torch.float32)).unflatten(1, (groups, size)).sum(2) / count
    center = mean.repeat_interleave(size, dim=1)[:, :, None, None]
    strips = x.split(max(REFERENCE_ELEMENTS // max(x[:, :, 0].numel(), 1), 1), dim=2)
    deviations = sum((strip - center).square_().sum((2, 3)) for strip in strips)
    variance = deviations.unflatten(1, (groups, size)).sum(2) / count
    return torch.stack([mean, torch.rsqrt(variance + eps)], dim=2)


def affine_of_moments(moments: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, shift) of each channel, [B, C] in the moments' dtype: normalized x is x * scale + shift."""
    mean, inverse = moments.repeat_interleave(len(weight) // moments.shape[1], dim=1).unbind(2)
    scale = inverse * weight
    return scale, bias - mean * scale


def group_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, moments: Tensor | None = None
) -> Tensor:
    """The formula, in PyTorch, for any device and dtype. Shapes as in :func:`group_norm`."""
    if moments is None and x.is_contiguous():
        y = torch.group_norm(x, groups, weight, bias, eps)  # channels-last it takes E[x^2] - E[x]^2: cancellation
    else:
        moments = group_norm_moments_reference(x, groups, eps) if moments is None else moments
        scale, shift = affine_of_moments(moments, weight, bias)
        y = torch.addcmul(shift[:, :, None, None], x, scale[:, :, None, None]).to(x.dtype)
    return F.silu(y, inplace=True) if silu else y


class _Differentiated(torch.autograd.Function):
    """The formula with its gradient, in PyTorch, for any device and dtype; scale and shift have the dtype of x.

    With n elements in a group, x^ = (x - mean) / sqrt(var + eps), u = weight x^ + bias, y = silu(u):

        du = dy silu'(u),   g = weight du,   dx = (g - sum(g) / n - x^ sum(g x^) / n) / sqrt(var + eps).

    u is recomputed from x, the only map saved for backward; differentiating the reference saves three. In bfloat16 this
    reduces a training step of the autoencoder to three quarters of the time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
        moments = group_norm_moments_reference(x, groups, eps)
        ctx.save_for_backward(x, weight, bias, moments)
        ctx.silu = silu
        u = _affine(x, *affine_of_moments(moments, weight, bias))
        return F.silu(u, inplace=True) if silu else u

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, moments = ctx.saved_tensors
        groups, count = moments.shape[1], x[0].numel() // moments.shape[1]
        scale, shift = affine_of_moments(moments, weight, bias)
        du = torch.ops.aten.silu_backward(dy, _affine(x, scale, shift)) if ctx.silu else dy
        mean, inverse = moments.repeat_interleave(x.shape[1] // groups, dim=1).unbind(2)
        sums = du.sum((2, 3), dtype=moments.dtype)
        sums_normed = ((du * x).sum((2, 3), dtype=moments.dtype) - mean * sums) * inverse  # sum(du x^)

        def group_mean(channel_sums: Tensor) -> Tensor:
            means = (channel_sums * weight).unflatten(1, (groups, -1)).sum(2) / count
            return means.repeat_interleave(x.shape[1] // groups, dim=1)

        slope = -inverse.square() * group_mean(sums_normed)
        dx = _affine(x, slope, -slope * mean - inverse * group_mean(sums)).addcmul_(du, _broadcast(scale, x))
        return dx, sums_normed.sum(0).to(weight.dtype), sums.sum(0).to(bias.dtype), None, None, None


def _broadcast(values: Tensor, x: Tensor) -> Tensor:
    """Per-channel values [B, C] -> [B, C, 1, 1] in the dtype of ``x``."""
    return values.to(x.dtype)[:, :, None, None]


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.addcmul(_broadcast(shift, x), x, _broadcast(scale, x))


@jit
def _columns(
    GROUPS: tl.constexpr, SIZE: tl.constexpr, BLOCK_GROUPS: tl.constexpr, BLOCK_SIZE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """(group, channel, whether the channel exists) of each column of a tile, BLOCK_SIZE columns per group."""
    column = tl.program_id(1) * (BLOCK_GROUPS * BLOCK_SIZE) + tl.arange(0, BLOCK_GROUPS * BLOCK_SIZE)
    group = column // BLOCK_SIZE
    if BLOCK_SIZE == SIZE:  # a plain arange lets the compiler see contiguity and emit 16-byte loads
        return group, column, column < GROUPS * SIZE
    return group, group * SIZE + column % BLOCK_SIZE, (group < GROUPS) & (column % BLOCK_SIZE < SIZE)


@jit(do_not_specialize=["cells", "cells_per_part"])
def _group_norm_parts_kernel(
    x_ptr: tl.tensor, parts_ptr: tl.tensor, batch_stride: tl.tensor, cells: tl.tensor, cells_per_part: tl.tensor,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, CELLS: tl.constexpr, BLOCK_GROUPS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
) -> None:  # fmt: skip
    """Mean and sum of squared deviations of each group over a part of the positions (cells); [B, 2, GROUPS, parts].

    Every element of the tile keeps its own running mean and deviations (Welford), so the loop has no reduction. After
    the loop they are combined by the parallel formula: total deviation = deviations within + weighted deviations of the
    means from the group's mean.
    """
    part, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    _, channel, exists = _columns(GROUPS, SIZE, BLOCK_GROUPS, BLOCK_SIZE)
    cell = tl.arange(0, CELLS)[:, None]
    first = part * cells_per_part
    count = tl.minimum(cells_per_part, cells - first)
    x_ptr += batch * batch_stride + first.to(tl.int64) * (GROUPS * SIZE)
    mean = tl.zeros((CELLS, BLOCK_GROUPS * BLOCK_SIZE), tl.float32)
    deviations = tl.zeros((CELLS, BLOCK_GROUPS * BLOCK_SIZE), tl.float32)
    seen = 0.0
    for start in range(0, count, CELLS):
        inside = exists[None, :] & (start + cell < count)
        offset = (start + cell) * (GROUPS * SIZE) + channel[None, :]
        x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        seen += 1.0
        difference = tl.where(inside, x - mean, 0.0)
        mean += difference * (1.0 / seen)
        deviations += difference * (x - mean)
    # An element's weight is the number of positions it has accumulated; the last iteration may be partial.
    weight = tl.where(exists[None, :], (count - cell + CELLS - 1) // CELLS, 0).to(tl.float32)
    group_mean = _of_groups(mean * weight, BLOCK_GROUPS, BLOCK_SIZE) / (count * SIZE).to(tl.float32)
    center = tl.broadcast_to(group_mean[:, None], (BLOCK_GROUPS, BLOCK_SIZE)).reshape(BLOCK_GROUPS * BLOCK_SIZE)
    difference = mean - center[None, :]
    deviations = _of_groups(deviations + weight * difference * difference, BLOCK_GROUPS, BLOCK_SIZE)
    group = tl.program_id(1) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)
    parts = tl.num_programs(0)
    parts_ptr += (batch * 2 * GROUPS + group) * parts + part
    tl.store(parts_ptr, group_mean, mask=group < GROUPS)
    tl.store(parts_ptr + GROUPS * parts, deviations, mask=group < GROUPS)


@jit
def _of_groups(x: tl.tensor, BLOCK_GROUPS: tl.constexpr, BLOCK_SIZE: tl.constexpr) -> tl.tensor:
    """Sum a tile over its positions and over the columns of each group."""
    return tl.sum(tl.sum(x, axis=0).reshape(BLOCK_GROUPS, BLOCK_SIZE), axis=1)


@jit(do_not_specialize=["cells", "cells_per_part", "parts"])
def _group_norm_moments_kernel(
    parts_ptr: tl.tensor, moments_ptr: tl.tensor, cells: tl.tensor, cells_per_part: tl.tensor, parts: tl.tensor,
    eps: tl.tensor,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, BLOCK_PARTS: tl.constexpr,
) -> None:  # fmt: skip
    """Combine the parts of one group of one image into mean and 1 / sqrt(var + eps); moments [B, GROUPS, 2]."""
    group, batch = tl.program_id(0), tl.program_id(1)
    part = tl.arange(0, BLOCK_PARTS)
    exists = part < parts
    parts_ptr += (batch * 2 * GROUPS + group) * parts + part
    means = tl.load(parts_ptr, mask=exists, other=0.0)
    deviations = tl.load(parts_ptr + GROUPS * parts, mask=exists, other=0.0)
    share = tl.where(exists, tl.minimum(cells_per_part, cells - part * cells_per_part), 0).to(tl.float32) / cells
    mean = tl.sum(means * share)
    difference = means - mean
    variance = tl.sum(deviations) / cells / SIZE + tl.sum(share * difference * difference)
    moments_ptr += (batch * GROUPS + group) * 2
    tl.store(moments_ptr, mean)
    tl.store(moments_ptr + 1, tl.rsqrt(variance + eps))


@jit(do_not_specialize=["cells"])
def _group_norm_kernel(
    x_ptr: tl.tensor, weight_ptr: tl.tensor, bias_ptr: tl.tensor, moments_ptr: tl.tensor, y_ptr: tl.tensor,
    x_batch_stride: tl.tensor, y_batch_stride: tl.tensor, cells: tl.tensor,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, SILU: tl.constexpr, CELLS: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
) -> None:  # fmt: skip
    """Normalize CELLS positions of one image per program."""
    first, batch = tl.program_id(0).to(tl.int64) * CELLS, tl.program_id(2).to(tl.int64)
    group, channel, exists = _columns(GROUPS, SIZE, BLOCK_GROUPS, BLOCK_SIZE)
    cell = tl.arange(0, CELLS)[:, None]
    inside = exists[None, :] & (first + cell < cells)
    offset = first * (GROUPS * SIZE) + cell * (GROUPS * SIZE) + channel[None, :]
    x = tl.load(x_ptr + batch * x_batch_stride + offset, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + channel, mask=exists, other=0.0, eviction_policy="evict_last").to(tl.float32)
    bias = tl.load(bias_ptr + channel, mask=exists, other=0.0, eviction_policy="evict_last").to(tl.float32)
    moments_ptr += (batch * GROUPS + group) * 2
    mean = tl.load(moments_ptr, mask=exists, other=0.0)
    inverse = tl.load(moments_ptr + 1, mask=exists, other=0.0)
    y = (x - mean[None, :]) * (inverse * weight)[None, :] + bias[None, :]
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    tl.store(y_ptr + batch * y_batch_stride + offset, y.to(y_ptr.dtype.element_ty), mask=inside)


def _blocks(groups: int, size: int, elements: int) -> dict[str, int]:
    """Tile shape of about ``elements``: all channels of several positions if they fit, else some groups of one."""
    block_size = triton.next_power_of_2(size)
    block_groups = min(triton.next_power_of_2(groups), max(elements // block_size, 1))
    return {"CELLS": max(elements // (block_size * block_groups), 1), "BLOCK_GROUPS": block_groups,
            "BLOCK_SIZE": block_size}  # fmt: skip


def _run_moments_kernels(x: Tensor, groups: int, eps: float) -> Tensor:
    batch, channels, height, width = x.shape
    size, cells = channels // groups, height * width
    tiles = dict(configs.tiles("group_norm_moments", "maps", x.device))
    blocks, max_parts = _blocks(groups, size, tiles.pop("ELEMENTS")), tiles.pop("PARTS")
    cells_per_part = triton.cdiv(triton.cdiv(cells, max_parts), blocks["CELLS"]) * blocks["CELLS"]
    count = triton.cdiv(cells, cells_per_part)
    parts = x.new_empty(batch, 2, groups, count, dtype=torch.float32)
    moments = x.new_empty(batch, groups, 2, dtype=torch.float32)
    _group_norm_parts_kernel[(count, triton.cdiv(groups, blocks["BLOCK_GROUPS"]), batch)](
        x, parts, x.stride(0), cells, cells_per_part, GROUPS=groups, SIZE=size, **blocks, **tiles
    )
    _group_norm_moments_kernel[(groups, batch)](
        parts, moments, cells, cells_per_part, count, eps,
        GROUPS=groups, SIZE=size, BLOCK_PARTS=triton.next_power_of_2(max_parts), num_warps=4,
    )  # fmt: skip
    return moments


def _run_kernel(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, moments: Tensor | None = None
) -> Tensor:
    if moments is None:
        moments = _run_moments_kernels(x, groups, eps)
    batch, channels, height, width = x.shape
    tiles = dict(configs.tiles("group_norm", "maps", x.device))
    blocks = _blocks(groups, channels // groups, tiles.pop("ELEMENTS"))
    y = torch.empty_like(x)
    grid = triton.cdiv(height * width, blocks["CELLS"]), triton.cdiv(groups, blocks["BLOCK_GROUPS"]), batch
    _group_norm_kernel[grid](
        x, weight.contiguous(), bias.contiguous(), moments.contiguous(), y, x.stride(0), y.stride(0), height * width,
        GROUPS=groups, SIZE=channels // groups, SILU=silu, **blocks, **tiles,
    )  # fmt: skip
    return y


def _has_kernel(x: Tensor, groups: int) -> bool:
    """Whether the kernels support the layout: each image contiguous in channels-last order."""
    return x.shape[0] > 0 and x.permute(0, 2, 3, 1)[0].is_contiguous() and x.shape[1] // groups <= MAX_GROUP_CHANNELS


def _fake_group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, moments: Tensor | None
) -> Tensor:
    return torch.empty_like(x)


@op(
    "group_norm",
    "(Tensor x, Tensor weight, Tensor bias, SymInt groups, float eps, bool silu, Tensor? moments) -> Tensor",
    kernel="triton",
    fake=_fake_group_norm,
)
def _group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, moments: Tensor | None
) -> Tensor:
    kernel = runs_kernel(x, weight, bias, moments) and _has_kernel(x, groups)
    return (_run_kernel if kernel else group_norm_reference)(x, weight, bias, groups, eps, silu, moments)


def _fake_group_norm_moments(x: Tensor, groups: int, eps: float) -> Tensor:
    return x.new_empty(x.shape[0], groups, 2, dtype=torch.promote_types(x.dtype, torch.float32))


@op(
    "group_norm_moments",
    "(Tensor x, SymInt groups, float eps) -> Tensor",
    kernel="triton",
    fake=_fake_group_norm_moments,
)
def _group_norm_moments(x: Tensor, groups: int, eps: float) -> Tensor:
    kernel = runs_kernel(x) and _has_kernel(x, groups)
    return (_run_moments_kernels if kernel else group_norm_moments_reference)(x, groups, eps)


def group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool = False, moments: Tensor | None = None
) -> Tensor:
    """Normalize the channel groups of each image. Differentiable in x, weight, bias and moments.

    Args:
        x: [B, C, H, W], floating point. Kernels support channels-last maps and strips of their rows.
        weight, bias: [C], dtype of ``x``.
        groups: number of groups, a divisor of C; group i is channels [i C / groups, (i + 1) C / groups).
        eps: added to the variance.
        silu: apply SiLU to the result.
        moments: result of :func:`group_norm_moments` for the map of which x is a strip; by default computed from x.

    Returns:
        [B, C, H, W] in the dtype and memory format of ``x``.

    Raises:
        ValueError: a shape or dtype does not match, or groups is not a divisor of C. The message names the argument.
    """
    _check_map("group_norm", x, groups)
    for name, tensor in ("weight", weight), ("bias", bias):
        if tensor.shape != x.shape[1:2] or tensor.dtype != x.dtype:
            raise mismatch("group_norm", name, tensor, x.shape[1:2], x.dtype)
    if moments is not None:
        shape, dtype = (x.shape[0], groups, 2), torch.promote_types(x.dtype, torch.float32)
        if moments.shape != shape or moments.dtype != dtype:
            raise mismatch("group_norm", "moments", moments, shape, dtype)
    if moments is None and wants_gradient(x, weight, bias):
        return _Differentiated.apply(x, weight, bias, groups, eps, silu)
    return _group_norm(x, weight, bias, groups, eps, silu, moments)


def group_norm_moments(x: Tensor, groups: int, eps: float) -> Tensor:
    """Statistics of :func:`group_norm`.

    Args:
        x, groups, eps: as for :func:`group_norm`.

    Returns:
        Mean and 1 / sqrt(var + eps) of each group, [B, groups, 2], float32 (float64 for float64 maps).

    Raises:
        ValueError: x is not a non-empty [B, C, H, W], or groups is not a divisor of C.
    """
    _check_map("group_norm_moments", x, groups)
    return _group_norm_moments(x, groups, eps)


def _check_map(op: str, x: Tensor, groups: int) -> None:
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise ValueError(f"{op}: x must be [B, C, H, W] with C, H, W > 0, got {tuple(x.shape)}.")
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"{op}: groups must be a divisor of the {x.shape[1]} channels of x, got {groups}.")
