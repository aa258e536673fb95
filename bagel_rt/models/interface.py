"""The members of a model that the engine uses, in addition to those of ``bagel_rt.runtime.interface``.

``docs/add-a-model.md`` shows how both are used.
"""

import threading
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from PIL import Image

from bagel_rt.runtime.context import Context, Prefill
from bagel_rt.runtime.decode import TokenMode
from bagel_rt.runtime.denoise import DenoisingTask
from bagel_rt.runtime.graphs import GraphCache
from bagel_rt.runtime.interface import Guidance, Model


class TextStream(Protocol):
    """Converts tokens to text incrementally; incomplete characters are held back until their last byte."""

    def feed(self, token: int) -> str:
        """Add a token and return the text that is complete with it."""

    def finish(self) -> str:
        """The remaining text."""


class Tokenizer(Protocol):
    """Converts text to tokens and back. ``bos`` starts a generated text, ``eos`` ends it."""

    bos: int
    eos: int

    def stream(self) -> TextStream:
        """A converter for a new text."""


class RequestContexts(Protocol):
    """The contexts of one request, one for each guidance branch.

    Attributes:
        cond: the context that generated texts continue.
        image_size: (height, width) of the images to generate, if the inputs determine it; else None.
    """

    cond: Context
    image_size: tuple[int, int] | None

    def add_thought(self, text: str) -> None:
        """Append a generated text."""

    def add_negative(self, text: str) -> None:
        """Append a negative prompt, which guidance moves away from."""

    def add_image(self, image: Image.Image, updates_guidance: bool = True) -> None:
        """Append an image."""


class ImageTextModel(Model, Protocol):
    """A model that :class:`~bagel_rt.engine.Engine` can run.

    Attributes:
        image_request: the text by which an interleaved answer requests an image.
        lock: a reentrant lock, held by the thread in which the model computes.
    """

    image_request: str
    lock: threading.RLock

    @property
    def text(self) -> TokenMode:
        """The token mode of text."""

    def open_contexts(
        self,
        prefill: Prefill,
        tokenizer: Any,
        inputs: Sequence[str | Image.Image],
        *,
        system: str | None,
        seed: int,
        noise: Sequence[torch.Tensor] | torch.Tensor | None,
        size: tuple[int, int] | None,
        draws: bool,
        written: int,
    ) -> RequestContexts:
        """The contexts of a request with its system prompt and inputs, with slots for ``written`` generated tokens."""

    def denoising_task(self, contexts: Any, size: tuple[int, int]) -> DenoisingTask[Any]:
        """The next image of a request, of (height, width) pixels."""

    def guidance(self, tasks: Sequence[DenoisingTask[Any]], settings: Sequence[Any]) -> Guidance:
        """Schedule, guidance and update rule of one denoising; ``settings`` are the requests' image settings."""

    def decode_image(self, latents: torch.Tensor, content: Any, graphs: GraphCache) -> Image.Image:
        """Decode a clean state; ``content`` is that of the task."""

    def explain_memory(self, tokenizer: Any, requests: Sequence[Any], available: int | None, graphs: bool) -> str:
        """The expected memory of requests and how to reduce it, for an out-of-memory error."""
