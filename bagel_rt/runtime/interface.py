"""The members of a model that the runtime uses. A model is any class with these members; nothing inherits from them.

``docs/add-a-model.md`` shows how the pieces fit together.
"""

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from bagel_rt.runtime.batch import DecodeBatch, ForwardBatch, Rope
from bagel_rt.runtime.slots import KVCache

if TYPE_CHECKING:
    from bagel_rt.runtime.denoise import PackedBranches


class Decoder(Protocol):
    """A decoder stack."""

    def forward(self, hidden: torch.Tensor, batch: ForwardBatch | DecodeBatch, cache: KVCache) -> torch.Tensor:
        """Hidden states [T, H] of packed rows, or of one token per text, -> [T, H] before the final norm.

        Keys and values are written to the cache.
        """


class Model(Protocol):
    """A network on one device.

    Attributes:
        device: of the weights.
        rope: rotary tables of its positions.
    """

    device: torch.device
    rope: Rope

    @property
    def transformer(self) -> Decoder:
        """The decoder stack."""

    def make_cache(self, slots: int = 0) -> KVCache:
        """An empty KV cache of the model's shape."""

    def embed(self, contents: Sequence[Any]) -> torch.Tensor:
        """Rows of the model's own contents in order, [T, H]. Rows recomputed at every step may have any value."""

    def embed_tokens(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids int64 [n] -> [n, H]."""


class GuidanceStep(Protocol):
    """The static buffers of a denoising, and the three parts of a step, which may be captured."""

    def encode(self, state: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """State of all images, index of the step int64 [1] -> (recomputed rows [n, H], a value for ``outputs``)."""

    def outputs(self, hidden: torch.Tensor, carry: Any, packed: "PackedBranches") -> torch.Tensor:
        """Last hidden states of the recomputed rows in every branch in turn -> the model's outputs for them."""

    def update(
        self, state: torch.Tensor, outputs: torch.Tensor, packed: "PackedBranches", index: torch.Tensor, guided: bool
    ) -> None:
        """Combine the outputs of the branches and advance the state in place."""


class Guidance(Protocol):
    """The schedule, the combination of branches and the update rule of one denoising."""

    @property
    def guided(self) -> Sequence[bool]:
        """For each step, whether it runs all branches; otherwise it runs only the first of every image."""

    @property
    def key(self) -> Hashable:
        """Everything that the buffers and launches of a step depend on."""

    def __len__(self) -> int:
        """Number of steps; each evaluates the model once."""

    def uses(self, image: int, branch: int) -> bool:
        """Whether any step runs this branch of this image. The first branch is always used."""

    def allocate(self) -> GuidanceStep:
        """Buffers for denoisings with this ``key``."""

    def fill(self, step: Any) -> None:
        """Write the values of this denoising into buffers from :meth:`allocate`."""

    def estimates(
        self, states: Sequence[torch.Tensor], noises: Sequence[torch.Tensor], next_step: int
    ) -> list[torch.Tensor]:
        """The clean states predicted from the states before step ``next_step``."""
