"""Checks of a request against the sizes of a model."""

from collections.abc import Sequence

import torch
from PIL import Image

from bagel_rt.models.bagel.config import BagelConfig
from bagel_rt.models.bagel.contexts import count_tokens, noise_shapes
from bagel_rt.models.bagel.tokenizer import Tokenizer
from bagel_rt.validation import invalid


def check_length(
    config: BagelConfig,
    tokenizer: Tokenizer,
    parts: Sequence[str | Image.Image],
    generated: int,
    rounds: int | None = None,
) -> None:
    """Raise ValueError if texts, images and the text to generate need more positions than the model has.

    Args:
        parts: all texts and images of the request.
        generated: maximum tokens of a generated text.
        rounds: maximum number of images of an interleaved request; None for other requests.
    """
    limit = config.llm.max_position_embeddings
    texts = [part for part in parts if isinstance(part, str)]
    if rounds is not None:
        # Per round: the text with its start and end token, and an image, which takes one position as VAE and one as
        # ViT tokens.
        generated = rounds * (generated + 4)
    images = 2 * (len(parts) - len(texts))
    positions = count_tokens(config, tokenizer, texts, False)[0] + images + generated
    if positions > limit:
        raise ValueError(
            f"the request must take at most {limit} positions, the limit of the model, got {positions}, of which "
            f"{generated} are for generated text. Shorten the prompt or lower max_think_token_n."
        )


def check_image_sizes(config: BagelConfig, parts: Sequence[str | Image.Image]) -> None:
    """Raise ValueError if a resized image is larger than the position tables."""
    if config.interpolate_pos:
        return
    vit_side = config.vit.patch_size * config.vit.max_patches_per_side
    for image in (part for part in parts if isinstance(part, Image.Image)):
        vae_size = config.vae_transform.output_size(*image.size)
        vit_size = config.vit_transform.output_size(*vae_size)
        if max(vae_size) > config.largest_side or max(vit_size) > vit_side:
            sizes = ["{}x{}".format(*size) for size in (vae_size, vit_size, image.size)]
            raise ValueError(
                f"a resized image must have sides of at most {config.largest_side} (VAE) and {vit_side} (ViT) pixels, "
                f"got {sizes[0]} and {sizes[1]} from {sizes[2]}. Use an image of another aspect ratio."
            )


def check_noise(
    config: BagelConfig, noise: object, parts: Sequence[str | Image.Image], size: tuple[int, int], exact: bool
) -> None:
    """Raise ValueError unless the noise consists of finite tensors of the shapes that a request draws.

    Args:
        parts: texts and images of the request.
        size: (height, width) of the image to generate if no part is an image.
        exact: whether the request draws nothing else. The number of images of an interleaved request is not known.
    """
    tensors = [noise] if isinstance(noise, torch.Tensor) else noise
    if not isinstance(tensors, (list, tuple)) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors):
        raise invalid("noise", noise, "a torch.Tensor or a list of them")
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise ValueError("noise must be finite, got NaN or infinity. Use standard normal numbers.")
    shapes = noise_shapes(config, parts, size)
    actual = [tuple(tensor.shape) for tensor in tensors]
    if (actual if exact else actual[: len(shapes)]) != shapes:
        raise ValueError(f"noise must have tensors of shape {shapes}, got {actual}.")
