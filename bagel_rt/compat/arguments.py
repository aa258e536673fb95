"""What official callers pass from call to call, and what of their arguments is read or refused."""

from collections.abc import Sequence

import torch

from bagel_rt.models.bagel.embed import position_ids
from bagel_rt.runtime.context import Context


class Contexts:
    """What the official code keeps in its ``NaiveCache``: here contexts, one for each sample of a batch.

    ``copy.deepcopy`` of it costs nothing: copies share their slots until one of them goes another way.
    """

    def __init__(self, contexts: Sequence[Context]):
        self.contexts = list(contexts)

    def __deepcopy__(self, memo) -> "Contexts":
        return Contexts([context.clone() for context in self.contexts])

    @property
    def seq_lens(self) -> int:
        """Tokens of all samples together."""
        return sum(context.length for context in self.contexts)


def grid_of(ids: torch.Tensor, side: int, interpolate: bool) -> tuple[int, int]:
    """(rows, columns) of the grid whose flattened position ids these are.

    Raises:
        ValueError: there is none.
    """
    count, ids = len(ids), ids.cpu()
    for rows in range(1, count + 1):
        if count % rows == 0 and (interpolate or max(rows, count // rows) <= side):
            if torch.equal(position_ids(rows, count // rows, side, interpolate), ids):
                return rows, count // rows
    raise ValueError(f"{count} position ids that are no grid of a table of {side} x {side}: {ids[:8].tolist()}, ...")


def check_grid(ids: torch.Tensor, grid: tuple[int, int], side: int, interpolate: bool) -> None:
    """ValueError if these are not the flattened position ids of a grid."""
    if not torch.equal(ids.cpu(), position_ids(*grid, side, interpolate)):
        raise ValueError(
            f"packed_vae_position_ids {ids[:8].tolist()}, ... are not those of a grid of {grid[0]} x {grid[1]} in a "
            f"table of {side} x {side}: give what prepare_vae_images returns"
        )


def check_positions(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """ValueError if RoPE positions are others than those of a content."""
    if not torch.equal(found.cpu(), wanted.cpu()):
        raise ValueError(f"position ids {found[:4].tolist()}, ... are not those of one content behind another")


def answer_of(text: str) -> str:
    """What stands between the first frame's markers, by the official rule."""
    return text.split("<|im_end|>")[0].split("<|im_start|>")[1]


def refuse_taylorseer(enabled: bool) -> None:
    """ValueError if it is asked for."""
    if enabled:
        raise ValueError("enable_taylorseer is True: step caching is not supported, and changes pictures; leave it off")
