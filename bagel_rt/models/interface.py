"""What the engine asks of a model, beyond what the runtime needs. ``docs/add-a-model.md`` shows how both are used."""

from collections.abc import Hashable, Sequence
from typing import Any, Protocol

import torch
from PIL import Image

from bagel_rt.runtime.context import Context, Prefill
from bagel_rt.runtime.decode import TokenMode
from bagel_rt.runtime.denoise import DenoisingTask
from bagel_rt.runtime.graphs import GraphCache
from bagel_rt.runtime.interface import Guidance, Model


class TextStream(Protocol):
    """Tokens to text, piece by piece; characters that are not complete wait for their other bytes."""

    def feed(self, token: int) -> str:
        """The text that the next token completes."""

    def finish(self) -> str:
        """The rest."""


class Tokenizer(Protocol):
    """Text to tokens and back. ``bos`` begins a text that the model writes, ``eos`` ends it."""

    bos: int
    eos: int

    def stream(self) -> TextStream:
        """A new text."""


class RequestContexts(Protocol):
    """The contexts of one request, as the model's guidance rules want them.

    Attributes:
        cond: the context that texts continue.
        image_size: (height, width) of the images to generate, if the inputs decide it.
    """

    cond: Context
    image_size: tuple[int, int] | None

    def add_thought(self, text: str) -> None:
        """Append a text that the model wrote."""

    def add_negative(self, text: str) -> None:
        """Append a text that guidance moves away from."""

    def add_image(self, image: Image.Image, updates_guidance: bool = True) -> None:
        """Append an image."""


class ImageTextModel(Model, Protocol):
    """A model that :class:`~bagel_rt.engine.Engine` can run.

    Attributes:
        image_request: what the model writes, in an interleaved answer, when it wants an image.
    """

    image_request: str

    @property
    def text(self) -> TokenMode:
        """How text is read and drawn."""

    def open_contexts(
        self,
        prefill: Prefill,
        tokenizer: Any,
        inputs: Sequence[str | Image.Image],
        *,
        system: str | None,
        seed: int,
        noise: Any,
        size: tuple[int, int] | None,
        draws: bool,
        written: int,
    ) -> RequestContexts:
        """The contexts of a request that was shown a system prompt and its inputs, with room for ``written`` tokens."""

    def denoising_task(self, contexts: Any, size: tuple[int, int]) -> DenoisingTask:
        """The next image of a request, of (height, width) pixels."""

    def guidance(self, tasks: Sequence[DenoisingTask], settings: Sequence[Any]) -> Guidance:
        """Schedule, guidance and update rule of one denoising; ``settings`` are the requests' image settings."""

    def decode_image(self, latents: torch.Tensor, content: Hashable, graphs: GraphCache) -> Image.Image:
        """The image of a clean state; ``content`` is the task's."""

    def explain_memory(self, tokenizer: Any, requests: Sequence[Any], available: int | None, graphs: bool) -> str:
        """The memory that requests are expected to need, and what would need less, for an out-of-memory error."""
