"""What the runtime needs of a model. A model is any class with these members; nothing inherits from them.

``docs/add-a-model.md`` shows how the pieces fit together.
"""

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from bagel_rt.runtime.batch import ForwardBatch, Rope
from bagel_rt.runtime.slots import KVCache

if TYPE_CHECKING:
    from bagel_rt.runtime.context import Content
    from bagel_rt.runtime.denoise import PackedBranches


class Decoder(Protocol):
    """A decoder stack."""

    def forward(self, hidden: torch.Tensor, batch: ForwardBatch, cache: KVCache) -> torch.Tensor:
        """Hidden states [T, H] of packed rows -> [T, H] before the final norm; keys and values go into the cache.

        ``batch.lengths`` says whether this is a decoding step (one row per text) or a packed forward.
        """


class Model(Protocol):
    """A network on one device.

    Attributes:
        device: of the weights.
        rope: rotary tables of its positions.
        transformer: the decoder stack.
    """

    device: torch.device
    rope: Rope
    transformer: Decoder

    def make_cache(self, slots: int = 0) -> KVCache:
        """An empty KV cache of the model's shape."""

    def embed(self, contents: Sequence["Content"]) -> torch.Tensor:
        """Rows of contents in order, [T, H]. Rows that are recomputed at every step may have any value."""

    def embed_tokens(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids int64 [n] -> [n, H]."""


class GuidanceStep(Protocol):
    """Static buffers of a denoising and the three functions that a step is made of, which may be captured."""

    def encode(self, state: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """State of all images, number of the step int64 [1] -> (recomputed rows [n, H], anything for ``outputs``)."""

    def outputs(self, hidden: torch.Tensor, carry: Any, packed: "PackedBranches") -> torch.Tensor:
        """Last hidden states of the recomputed rows in every branch in turn -> the model's outputs for them."""

    def update(
        self, state: torch.Tensor, outputs: torch.Tensor, packed: "PackedBranches", index: torch.Tensor, guided: bool
    ) -> None:
        """Combine the branches' outputs and advance the state in place."""


class Guidance(Protocol):
    """The schedule, the combination of branches and the update rule of one denoising. Its length is its steps.

    Attributes:
        guided: for each step, whether it runs all branches; otherwise only the first of every image.
        key: everything that the buffers of a step and its launches depend on.
    """

    guided: Sequence[bool]
    key: Hashable

    def __len__(self) -> int:
        """Evaluations of the model."""

    def uses(self, image: int, branch: int) -> bool:
        """Whether any step runs this branch of this image. The first branch is always used."""

    def allocate(self) -> GuidanceStep:
        """Buffers of this structure."""

    def fill(self, step: Any) -> None:
        """Put this run's numbers into buffers of this structure."""

    def estimates(
        self, states: Sequence[torch.Tensor], noises: Sequence[torch.Tensor], next_step: int
    ) -> list[torch.Tensor]:
        """The clean states that the images are heading for, ahead of step ``next_step``."""
