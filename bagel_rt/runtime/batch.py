"""The inputs of a decoder's layers besides the hidden states: positions, KV cache slots and attention plans."""

from dataclasses import dataclass, fields

import numpy as np
import torch

from bagel_rt.runtime.plan import Plan

_MIN_TABLE = 4096  # positions; 2 MiB for heads of 128 channels


class Rope:
    """Rotary position tables in the half-split layout: angle = position * theta ** (-2 i / head_dim), i < head_dim / 2.

    Source: Su et al. 2021, arXiv:2104.09864; the half-split layout repeats each column for both halves of a head
    (transformers Qwen2RotaryEmbedding).
    """

    def __init__(self, head_dim: int, theta: float, max_positions: int, device: torch.device) -> None:
        self.head_dim, self.theta, self.max_positions, self.device = head_dim, theta, max_positions, device
        self._tables: dict[int, torch.Tensor] = {}  # by number of positions

    def __call__(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tables cos, sin float32 [T, head_dim / 2] of integer positions [T], on the model's device."""
        positions = positions.to(self.device)
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=self.device) / self.head_dim
        angles = positions.to(torch.float32)[:, None] * (1.0 / self.theta**exponents)
        return angles.cos(), angles.sin()

    def table(self, positions: int) -> torch.Tensor:
        """Tables (cos, sin) of at least the first ``positions`` positions, float32 [2, table_size, head_dim / 2].

        The same tensor for every call of equal :func:`table_size`, because captured steps read it.

        Raises:
            ValueError: ``positions`` exceeds ``max_positions``.
        """
        if positions > self.max_positions:
            raise ValueError(
                f"text must end by position {self.max_positions}, got {positions}. Lower max_think_token_n."
            )
        size = table_size(positions)
        if size not in self._tables:
            self._tables[size] = torch.stack(self(torch.arange(size)))
        return self._tables[size]


def table_size(positions: int) -> int:
    """Positions in a table: a power of two, so that texts of different lengths share captured steps. All tables of a
    model together take at most twice the memory of the largest."""
    return max(_MIN_TABLE, 1 << (positions - 1).bit_length())


@dataclass(slots=True)
class ForwardBatch:
    """T packed rows on the device, generation rows first.

    Attributes:
        G: number of generation rows; a model with one expert has 0 or T.
        cos, sin: float32 [T, head_dim / 2], rotary tables at each row's position.
        slots: int64 [T], the cache slot that each row's key and value are written to.
        limits, blocks: int32 [T] and [n, 7], the attention plan (see ``bagel_rt.runtime.plan``).
    """

    G: int
    cos: torch.Tensor
    sin: torch.Tensor
    slots: torch.Tensor
    limits: torch.Tensor
    blocks: torch.Tensor

    @classmethod
    def from_plan(cls, plan: Plan, positions: np.ndarray, rope: Rope) -> "ForwardBatch":
        """Put a plan on the device of ``rope``.

        Args:
            plan: as built from segments.
            positions: integers [T], the RoPE position of every row in segment order.
        """
        cos, sin = rope(torch.from_numpy(np.asarray(positions, dtype=np.int64)[plan.order]))
        slots, limits, blocks = (torch.from_numpy(a).to(rope.device) for a in (plan.slots, plan.limits, plan.blocks))
        return cls(plan.G, cos, sin, slots, limits, blocks)

    def copy_(self, other: "ForwardBatch") -> None:
        """Overwrite the tensors with those of a batch of the same shapes; captured steps keep the addresses."""
        for field in fields(self):
            if isinstance(tensor := getattr(self, field.name), torch.Tensor):
                tensor.copy_(getattr(other, field.name))


@dataclass(slots=True)
class DecodeBatch:
    """The next token of each of B texts.

    Attributes:
        cos, sin, slots: as of :class:`ForwardBatch`, one row per text.
        starts, lengths: int64 [B]; row b sees slots [starts[b], starts[b] + lengths[b]), its own included.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    slots: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
