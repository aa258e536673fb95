"""Requests, results and progress reports, and the checks of a request's arguments."""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from PIL import Image

from bagel_rt.models.bagel.images import open_image
from bagel_rt.models.bagel.settings import MAX_CHARACTERS, MAX_INPUTS, ImageSettings, TextSettings, check_seed
from bagel_rt.validation import check, integer, invalid, per_prompt

ImageSource = Image.Image | NDArray[Any] | str | Path | bytes


@dataclass(frozen=True)
class Progress:
    """Progress of a request, passed to the ``progress`` callback after every step.

    Attributes:
        stage: "text" while tokens are decoded, "image" while an image is denoised.
        step: completed steps of this stage, from 1.
        total: steps of this stage; for text, the maximum.
        preview: returns the intermediate result of every prompt in this step: index in the batch -> the text so far,
            or an estimate of the final image; after the last step, the final image. Call it inside the callback only:
            a preview of an image raises RuntimeError afterwards. It decodes the images, which costs the time and memory
            of an autoencoder pass; without a call there is no cost.
    """

    stage: str
    step: int
    total: int
    preview: Callable[[], dict[int, str | Image.Image]] | None = field(default=None, repr=False, compare=False)


ProgressCallback = Callable[[Progress], None]


@dataclass
class ImageResult:
    """A generated image.

    Attributes:
        image: RGB.
        seed: of the noise; the same seed and parameters give the same image on the same machine.
        parameters: the value of every hyper-parameter.
        latents: float32 [tokens, features] on the model's device, the input of the autoencoder's decoder.
        thought: the text generated before the image, or None.
    """

    image: Image.Image
    seed: int
    parameters: dict
    latents: torch.Tensor
    thought: str | None = None


@dataclass
class Request:
    """A request with resolved settings.

    Attributes:
        inputs: texts and images in order: strings, and PIL images that can be converted to RGB.
        size: (height, width) of the images to generate; an input image overrides it.
        seed: for noise and sampling.
        image: settings of denoising; None if the request generates no image.
        text: settings of text decoding.
        noise: tensors to use instead of the noise drawn from the seed; see
            :class:`~bagel_rt.models.bagel.contexts.Noise`.
        system: the system prompt. A request for an image with a system prompt generates a thought first.
        negative_prompt: used for the branch without text of classifier-free guidance. Default: no text.
        rounds: maximum number of images of an interleaved request; None for other requests.
    """

    inputs: list[str | Image.Image]
    size: tuple[int, int] | None
    seed: int
    image: ImageSettings | None
    text: TextSettings
    noise: Sequence[torch.Tensor] | torch.Tensor | None = None
    system: str | None = None
    negative_prompt: str | None = None
    rounds: int | None = None

    @property
    def generates_text(self) -> bool:
        """Whether the request generates text: an answer, a thought or interleaved text."""
        return self.image is None or self.system is not None or self.rounds is not None


def is_size(size) -> bool:
    """Whether a value is a pair of integers."""
    return isinstance(size, (tuple, list)) and len(size) == 2 and all(type(side) is int for side in size)


def resolve_seeds(seed, count: int) -> list[int]:
    """One seed per prompt: a list is used as it is, a single seed (or a random one) starts consecutive seeds."""
    if isinstance(seed, (list, tuple)):
        seeds = per_prompt("seed", seed, count)
    else:
        check_seed(seed)
        first = secrets.randbelow(2**32) if seed is None else seed
        seeds = [first + index for index in range(count)]
    for value in seeds:
        check_seed(value)
    return [secrets.randbelow(2**32) if value is None else value for value in seeds]


def check_text(name: str, text) -> str:
    """Return the text; ValueError if it is not a str, or too long to tokenize just for an exact error message."""
    if not isinstance(text, str):
        raise invalid(name, text, "a str")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"{name} must have at most {MAX_CHARACTERS} characters, got {len(text)}. Shorten it.")
    return text


def check_list(name: str, values, types: type | tuple[type, ...], maximum: int) -> list:
    """Return the values as a list; ValueError unless they are 1 to ``maximum`` entries of these types."""
    if not isinstance(values, (list, tuple)) or not 1 <= len(values) <= maximum:
        raise invalid(name, values, f"a list of 1 to {maximum} entries")
    types = types if isinstance(types, tuple) else (types,)
    for value in values:
        if not isinstance(value, types):
            raise invalid(f"an entry of {name}", value, "of type " + ", ".join(kind.__name__ for kind in types))
    return list(values)


def open_images(images: ImageSource | Sequence[ImageSource], minimum: int = 0) -> list[Image.Image]:
    """Open one image or a list of them; ValueError or FileNotFoundError if that fails."""
    if not isinstance(images, (list, tuple)):
        images = [images]
    check("the number of images", len(images), integer(minimum, MAX_INPUTS))
    return [open_image(image) for image in images]
