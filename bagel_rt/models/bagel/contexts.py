"""One request's contexts, kept by the official guidance rules, and the encoding of what is put into them."""

from collections.abc import Sequence

import torch
from PIL import Image

from bagel_rt.models.bagel.config import BagelConfig
from bagel_rt.models.bagel.embed import patchify
from bagel_rt.models.bagel.images import image_to_tensor, to_rgb
from bagel_rt.models.bagel.model import BagelModel
from bagel_rt.models.bagel.tokenizer import Tokenizer
from bagel_rt.runtime.context import Context, Prefill, Text, VAEImage, ViTImage
from bagel_rt.runtime.slots import KVCache


class Noise:
    """The Gaussian draws of one request, float32, in the official order: one of the autoencoder's mean shape per
    encoded image, one [tokens, features] per generated image.

    A seed gives the numbers that ``torch.manual_seed(seed)`` gives the official code on the CPU, on any device.
    """

    def __init__(self, seed: int, given: Sequence[torch.Tensor] | torch.Tensor | None = None):
        """``given`` tensors replace the draws, in order; a single tensor is the latent noise of the only image."""
        self._generator = torch.Generator().manual_seed(seed)
        self._given = None if given is None else [given] if isinstance(given, torch.Tensor) else list(given)

    def draw(self, *shape: int) -> torch.Tensor:
        """The next draw.

        Raises:
            ValueError: the next given tensor is missing or of another shape.
        """
        if self._given is None:
            return torch.randn(shape, generator=self._generator)
        if not self._given:
            raise ValueError(
                f"noise: no tensor left for a draw of shape {shape}; give one per encoded and generated image"
            )
        noise = self._given.pop(0)
        if tuple(noise.shape) != shape:
            raise ValueError(f"noise: a tensor of shape {tuple(noise.shape)} was given where {shape} is drawn")
        return noise.float()


class Conversation:
    """The contexts of one request.

    ``gen`` sees everything. ``no_text`` is gen as it was before the last text (after the last image). ``no_img`` sees
    the texts alone. Contents reach the KV cache when the prefill is run.
    """

    def __init__(
        self,
        model: BagelModel,
        tokenizer: Tokenizer,
        cache: KVCache,
        prefill: Prefill,
        noise: Noise,
        guided: bool,
        room: tuple[int, int] = (0, 0),
        expects_images: bool = False,
    ):
        """Start with nothing said.

        Args:
            prefill: what the contents are appended to.
            noise: for the images that are encoded.
            guided: whether images will be generated; without it only ``gen`` is kept.
            room: slots that gen and no_img will need in all, taken at once so that they need not move (see
                :func:`count_tokens`).
            expects_images: without images no_img is what gen is, and shares its slots.
        """
        self.expects_images = expects_images
        self.model, self.tokenizer, self.prefill, self.noise, self.guided = model, tokenizer, prefill, noise, guided
        self.gen, self.no_text, self.no_img = Context(cache, room[0]), Context(cache), Context(cache, room[1])
        self.image_size: tuple[int, int] | None = None  # (height, width) of the last image, after the resize rule

    def add_system(self, text: str) -> None:
        """A system prompt: part of gen and of no_img."""
        self._append_text(text)

    def add_text(self, text: str) -> None:
        """A text of the user."""
        if self.guided:
            self.no_text = self.gen.clone()
        self._append_text(text)

    def add_thought(self, text: str) -> None:
        """A text of the model's own, re-tokenised: it never enters a guidance context."""
        self.prefill.append(self.gen, frame_text(self.tokenizer, text))

    def add_negative(self, text: str) -> None:
        """A negative prompt: what the text guidance moves away from, in the place of the last text."""
        self.no_text = self.no_text.clone()
        self.prefill.append(self.no_text, frame_text(self.tokenizer, text))

    def add_image(self, image: Image.Image, generates: bool = True, updates_guidance: bool = True) -> None:
        """An image: for generation its clean latents and its ViT patches, for understanding the patches alone.

        The ViT sees the picture that the autoencoder's resize rule made (the official inferencer resizes twice).
        """
        config = self.model.config
        resized = config.vae_transform.resize(to_rgb(image))
        if generates:
            self.prefill.append(self.gen, encode_latents(self.model, resized, self.noise))
        self.prefill.append(self.gen, encode_patches(config, config.vit_transform.resize(resized)))
        if updates_guidance:
            self.no_text = self.gen.clone()
            self.image_size = (resized.height, resized.width)

    def _append_text(self, text: str) -> None:
        content = frame_text(self.tokenizer, text)
        shared = not self.expects_images and self.gen.same_as(self.no_img)
        self.prefill.append(self.gen, content)
        if self.guided and shared:
            self.no_img = self.gen.clone()
        elif self.guided:
            self.prefill.append(self.no_img, content)


def frame_text(tokenizer: Tokenizer, text: str) -> Text:
    """Token ids in their frame: <|im_start|> text <|im_end|>; no roles, no template."""
    return Text((tokenizer.bos, *tokenizer.encode(text), tokenizer.eos))


def encode_latents(model: BagelModel, image: Image.Image, noise: Noise) -> VAEImage:
    """A resized RGB picture as clean latent tokens; the official model samples the posterior, never takes its mode."""
    config = model.config
    pixels = image_to_tensor(image)[None].to(model.device)
    height, width = pixels.shape[2:]
    eps = noise.draw(1, config.vae.z_channels, height // config.vae.downsample, width // config.vae.downsample)
    latent = model.vae.encode(pixels, eps.to(model.device))
    tokens = patchify(latent[0], config.latent_patch_size)
    return VAEImage(tokens, height // config.latent_stride, width // config.latent_stride)


def encode_patches(config: BagelConfig, image: Image.Image) -> ViTImage:
    """A resized RGB picture as ViT patches."""
    patch = config.vit.patch_size
    return ViTImage(patchify(image_to_tensor(image), patch), image.height // patch, image.width // patch)


def count_tokens(
    config: BagelConfig, tokenizer: Tokenizer, parts: Sequence[str | Image.Image], guided: bool
) -> tuple[int, int, tuple[int, int] | None]:
    """(tokens of the texts, tokens of the images, (height, width) of the last image or None) before any is encoded."""
    texts = sum(len(frame_text(tokenizer, part).ids) for part in parts if isinstance(part, str))
    images, size = 0, None
    for part in parts:
        if not isinstance(part, str):
            width, height = config.vae_transform.output_size(*part.size)
            vit_width, vit_height = config.vit_transform.output_size(width, height)
            images += vit_width * vit_height // config.vit.patch_size**2 + 2
            images += guided * (width * height // config.latent_stride**2 + 2)
            size = (height, width)
    return texts, images, size


def noise_shapes(config: BagelConfig, parts: Sequence[str | Image.Image], size: tuple[int, int] | None) -> list[tuple]:
    """The shapes that drawing one picture from these parts takes from :class:`Noise`, in order."""
    shapes = []
    for part in parts:
        if not isinstance(part, str):
            width, height = config.vae_transform.output_size(*part.size)
            size = (height, width)
            shapes.append((1, config.vae.z_channels, height // config.vae.downsample, width // config.vae.downsample))
    rows, columns = (side // config.latent_stride for side in size)
    return [*shapes, (rows * columns, config.latent_features)]
