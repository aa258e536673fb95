"""The contexts of one request, updated by the official guidance rules, and token counts of its inputs."""

from collections.abc import Callable, Sequence

import torch
from PIL import Image

from bagel_rt.models.bagel.config import BagelConfig
from bagel_rt.models.bagel.contents import Content, Text, image_rows
from bagel_rt.models.bagel.tokenizer import Tokenizer
from bagel_rt.runtime.context import Context, Prefill


class Noise:
    """The Gaussian draws of one request, float32, in the official order: one of the autoencoder's mean shape per
    encoded image, one [tokens, features] per generated image.

    A seed gives the numbers that ``torch.manual_seed(seed)`` gives the official code on the CPU, on any device.
    """

    def __init__(self, seed: int, draws: Sequence[torch.Tensor] | torch.Tensor | None = None) -> None:
        """``draws`` replace those of the seed, in order; a single tensor is the latent noise of the only image."""
        self._generator = torch.Generator().manual_seed(seed)
        self._draws = None if draws is None else [draws] if isinstance(draws, torch.Tensor) else list(draws)

    def draw(self, *shape: int) -> torch.Tensor:
        """The next draw.

        Raises:
            ValueError: the next tensor that replaces a draw is missing or has another shape.
        """
        if self._draws is None:
            return torch.randn(shape, generator=self._generator)
        if not self._draws:
            raise ValueError(
                f"noise must have a tensor for every encoded and every generated image, got none for a draw of {shape}."
            )
        noise = self._draws.pop(0)
        if tuple(noise.shape) != shape:
            raise ValueError(f"noise must have shape {shape} for this draw, got {tuple(noise.shape)}.")
        return noise.float()


class GuidanceContexts:
    """The contexts of one request.

    Contents are written to the KV cache when the prefill runs.

    Attributes:
        cond: everything.
        no_text: ``cond`` as it was before the last text (after the last image).
        no_img: the texts only.
        image_size: (height, width) of the last image, after the resize rule; None before the first.
    """

    def __init__(
        self,
        prefill: Prefill,
        encode_text: Callable[[str], Text],
        encode_image: Callable[[Image.Image, bool], tuple[list[Content], tuple[int, int]]],
        noise: Noise,
        guided: bool,
        room: tuple[int, int] = (0, 0),
        expects_images: bool = False,
    ) -> None:
        """Start empty.

        Args:
            prefill: runs the contents.
            encode_text: frames and tokenizes a text.
            encode_image: (image, whether images will be generated) -> its contents, and (height, width) after the
                resize rule.
            noise: the request's draws.
            guided: whether images will be generated; if not, only ``cond`` is updated.
            room: total slots that cond and no_img will need, allocated at once so that they need not move (see
                :func:`count_tokens`).
            expects_images: whether an input is an image. If not, no_img equals cond and shares its slots.
        """
        self._prefill, self._encode_text, self._encode_image = prefill, encode_text, encode_image
        self.noise, self._guided, self._expects_images = noise, guided, expects_images
        cache = prefill.cache
        self.cond, self.no_text, self.no_img = Context(cache, room[0]), Context(cache), Context(cache, room[1])
        self.image_size: tuple[int, int] | None = None

    def add_system(self, text: str) -> None:
        """Append a system prompt: part of cond and of no_img."""
        self._append_text(text)

    def add_text(self, text: str) -> None:
        """Append a text of the user."""
        if self._guided:
            self.no_text = self.cond.clone()
        self._append_text(text)

    def add_thought(self, text: str) -> None:
        """Append a generated text, tokenized again, to ``cond`` only."""
        self._prefill.append(self.cond, self._encode_text(text))

    def add_negative(self, text: str) -> None:
        """Append a negative prompt to ``no_text``, so that text guidance moves away from it."""
        self.no_text = self.no_text.clone()
        self._prefill.append(self.no_text, self._encode_text(text))

    def add_image(self, image: Image.Image, updates_guidance: bool = True) -> None:
        """Append an image: clean latents and ViT patches if images will be generated, else the patches only."""
        contents, size = self._encode_image(image, self._guided)
        for content in contents:
            self._prefill.append(self.cond, content)
        if updates_guidance:
            self.no_text = self.cond.clone()
            self.image_size = size

    @property
    def branches(self) -> tuple[Context, Context, Context]:
        """The contexts of the guidance branches (see ``bagel_rt.models.bagel.guidance.BRANCHES``)."""
        return self.cond, self.no_text, self.no_img

    def _append_text(self, text: str) -> None:
        content = self._encode_text(text)
        shared = not self._expects_images and self.cond.same_as(self.no_img)
        self._prefill.append(self.cond, content)
        if self._guided and shared:
            self.no_img = self.cond.clone()
        elif self._guided:
            self._prefill.append(self.no_img, content)


def frame_text(tokenizer: Tokenizer, text: str) -> Text:
    """Tokenize ``<|im_start|> text <|im_end|>``; no roles, no template."""
    return Text((tokenizer.bos, *tokenizer.encode(text), tokenizer.eos))


def count_tokens(
    config: BagelConfig, tokenizer: Tokenizer, parts: Sequence[str | Image.Image], guided: bool
) -> tuple[int, int, tuple[int, int] | None]:
    """(tokens of the texts, tokens of the images, (height, width) of the last image or None), without encoding any."""
    texts = sum(len(frame_text(tokenizer, part).ids) for part in parts if isinstance(part, str))
    images = 0
    size: tuple[int, int] | None = None
    for part in parts:
        if not isinstance(part, str):
            width, height = config.vae_transform.output_size(*part.size)
            size = (height, width)
            images += image_rows(*config.patch_grid(size))
            images += guided * image_rows(*config.latent_grid(size))
    return texts, images, size


def noise_shapes(
    config: BagelConfig, parts: Sequence[str | Image.Image], size: tuple[int, int]
) -> list[tuple[int, ...]]:
    """The shapes of the draws for generating one image from these parts, in order.

    ``size`` is the (height, width) of the image if no part is an image.
    """
    shapes: list[tuple[int, ...]] = []
    for part in parts:
        if not isinstance(part, str):
            width, height = config.vae_transform.output_size(*part.size)
            size = (height, width)
            shapes.append((1, config.vae.z_channels, height // config.vae.downsample, width // config.vae.downsample))
    grid_h, grid_w = config.latent_grid(size)
    return [*shapes, (grid_h * grid_w, config.latent_features)]
