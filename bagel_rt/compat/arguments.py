"""Reading and checking the arguments of the official entry points."""

import operator
from collections.abc import Sequence

import torch

from bagel_rt.models.bagel.config import BagelConfig
from bagel_rt.models.bagel.embed import position_ids
from bagel_rt.validation import invalid


def grid_from_position_ids(name: str, ids: torch.Tensor, max_side: int, interpolate: bool) -> tuple[int, int]:
    """(grid_h, grid_w) of the grid with these flattened position ids; the other arguments as for ``position_ids``.

    Raises:
        ValueError: no grid has these ids; the message begins with ``name``, the argument.
    """
    count, ids = len(ids), ids.cpu()
    for grid_h in range(1, count + 1):
        grid_w, remainder = divmod(count, grid_h)
        fits = remainder == 0 and (interpolate or max(grid_h, grid_w) <= max_side)
        if fits and torch.equal(position_ids(grid_h, grid_w, max_side, interpolate), ids):
            return grid_h, grid_w
    raise ValueError(
        f"{name} must be the ids of a grid in a {max_side}x{max_side} position table, got {count} ids: "
        f"{ids[:8].tolist()}, .... Pass what the official prepare_* function returns."
    )


def check_latent_position_ids(ids: torch.Tensor, grid: tuple[int, int], max_side: int, interpolate: bool) -> None:
    """Raise ValueError unless these are the flattened position ids of the grid (grid_h, grid_w)."""
    if not torch.equal(ids.cpu(), position_ids(*grid, max_side, interpolate)):
        raise ValueError(
            f"packed_vae_position_ids must be the ids of a grid of {grid[0]} rows and {grid[1]} columns in a "
            f"{max_side}x{max_side} position table, got {ids[:8].tolist()}, .... Pass what prepare_vae_images returns."
        )


def first_position(positions: torch.Tensor, step: int) -> int:
    """The first of the RoPE positions of one text (``step`` 1) or one image (``step`` 0).

    Raises:
        ValueError: the positions do not go up by ``step`` from token to token.
    """
    first = int(positions[0])
    if not torch.equal(positions, first + step * torch.arange(len(positions)).to(positions)):
        allowed = "consecutive in a text" if step else "equal in an image"
        raise ValueError(
            f"RoPE positions must be {allowed}, got {positions[:4].tolist()}, .... Pass what the official prepare_* "
            "function returns."
        )
    return first


def extract_answer(text: str) -> str:
    """The text between the first pair of start and end markers, as the official code cuts it."""
    return text.split("<|im_end|>", maxsplit=1)[0].split("<|im_start|>")[1]


def reject_taylorseer(enabled: bool) -> None:
    """Raise ValueError if ``enable_taylorseer`` is set."""
    if enabled:
        raise ValueError("enable_taylorseer must be False, got True. Step caching changes images and is not supported.")


def floor_size(config: BagelConfig, size: Sequence[int]) -> tuple[int, int]:
    """(height, width) rounded down to multiples of the latent stride, as the official code does by integer division.

    Raises:
        ValueError: not a pair of integers.
    """
    try:
        height, width = (operator.index(side) // config.latent_stride * config.latent_stride for side in size)
    except (TypeError, ValueError):
        raise invalid("image_shapes", size, "(height, width)") from None
    return height, width
