"""Position ids, sinusoidal embeddings and patches.

Sources: the official BAGEL modeling code (position ids, TimestepEmbedder), Vaswani et al. 2017 (sinusoids).
"""

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:  # weights imports this module
    from bagel_rt.models.bagel.weights import Affine

TIME_FREQUENCIES = 256  # width of the sinusoid that enters the time embedder (official TimestepEmbedder)


def position_ids(grid_h: int, grid_w: int, max_side: int, interpolate: bool = False) -> torch.Tensor:
    """Row-major position ids of a patch grid, int64 [grid_h * grid_w].

    Args:
        grid_h, grid_w: patches per column and per row.
        max_side: side of the square position table; id = row * max_side + column.
        interpolate: spread the grid over the whole table (config key ``interpolate_pos``, false in the published
            model).

    Raises:
        ValueError: the grid is larger than the table. The official code wraps columns into the next row and then
            indexes out of range.
    """
    if interpolate:
        edges = torch.arange(1 / max_side, 1.0, 1 / max_side)
        row, column = (
            torch.bucketize(torch.arange(0, 1 - 1e-6, 1 / side), edges, right=True) for side in (grid_h, grid_w)
        )
    elif max(grid_h, grid_w) > max_side:
        raise ValueError(
            f"the patch grid must be at most {max_side}x{max_side}, the size of the position table, got "
            f"{grid_w}x{grid_h}. Use a smaller image."
        )
    else:
        row, column = torch.arange(grid_h), torch.arange(grid_w)
    return (row[:, None] * max_side + column).flatten()


def sincos_table(dim: int, side: int) -> torch.Tensor:
    """2-D sine-cosine position embeddings, float32 [side * side, dim].

    The first half of the channels encodes the column, the second half the row. Each half is [sin | cos] over dim / 4
    frequencies 10000 ** (-i / (dim / 4)).
    """
    frequencies = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    by_column = axis.repeat(side, 1)
    by_row = axis.repeat_interleave(side, dim=0)
    return torch.cat([by_column, by_row], dim=1).float()


def time_sinusoid(t: torch.Tensor) -> torch.Tensor:
    """[cos | sin] features of timesteps t in [0, 1], float32 [n, 256]. Unlike in DiT, t is not scaled by 1000."""
    half = TIME_FREQUENCIES // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.to(torch.float32)[:, None] * torch.exp(-math.log(10000) * exponents / half)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def time_embedding(layers: "tuple[Affine, Affine]", t: torch.Tensor) -> torch.Tensor:
    """Timesteps [n] in [0, 1] -> [n, H]: sinusoid, linear, SiLU, linear."""
    first, second = layers
    return F.linear(F.silu(F.linear(time_sinusoid(t).to(first.weight.dtype), *first)), *second)


def patchify(image: torch.Tensor, patch: int) -> torch.Tensor:
    """[C, grid_h * p, grid_w * p] -> [grid_h * grid_w, p * p * C]; features in the order (row, column, channel)."""
    C, height, width = image.shape
    tiles = image.reshape(C, height // patch, patch, width // patch, patch)
    return tiles.permute(1, 3, 2, 4, 0).reshape(-1, patch * patch * C)


def unpatchify(tokens: torch.Tensor, grid_h: int, grid_w: int, patch: int) -> torch.Tensor:
    """Inverse of :func:`patchify`: [grid_h * grid_w, p * p * C] -> [C, grid_h * p, grid_w * p]."""
    C = tokens.shape[1] // (patch * patch)
    tiles = tokens.reshape(grid_h, grid_w, patch, patch, C)
    return tiles.permute(4, 0, 2, 1, 3).reshape(C, grid_h * patch, grid_w * patch)
