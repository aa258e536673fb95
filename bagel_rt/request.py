"""What a caller gives and gets: requests, results, progress, and the checks that run before any work."""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

from bagel_rt.models.bagel.images import open_image
from bagel_rt.models.bagel.settings import MAX_CHARACTERS, MAX_INPUTS, ImageSettings, TextSettings, check_seed
from bagel_rt.validation import per_prompt

ImageSource = Image.Image | str | Path | bytes


@dataclass(frozen=True)
class Progress:
    """Where a request stands; given to the ``progress`` callback after every step.

    Attributes:
        stage: "text" while tokens are decoded, "image" while an image is denoised.
        step: steps done in this stage, from 1.
        total: steps of this stage; of text, the most there can be.
        preview: call it within the callback to see what there is so far: for each prompt that is worked on just now,
            its place in the batch -> the text, or the picture that the denoising is heading for. A picture takes what
            decoding one takes, time and memory; without the call nothing is done. At the last step it returns the
            finished picture. Called after the request, that of a picture raises RuntimeError.
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
        image: the picture.
        seed: what its noise was drawn with; the same seed and parameters give the same picture.
        parameters: every hyper-parameter in force.
        latents: float32 [tokens, features] on the model's device, the picture before the autoencoder's decoder.
        thought: the text the model wrote before drawing, or None.
    """

    image: Image.Image
    seed: int
    parameters: dict
    latents: torch.Tensor
    thought: str | None = None


@dataclass
class Request:
    """What one user sends: texts and images in order, with the noise that its pictures are made of.

    Attributes:
        inputs: strings and RGB-convertible PIL images.
        size: (height, width) of the pictures to draw; an input image overrides it.
        seed: of noise and sampling.
        image: how pictures are denoised; None where none is drawn.
        text: how texts are decoded.
        noise: draws to use in place of the seed's; see :class:`~bagel_rt.models.bagel.contexts.Noise`.
        system: the system prompt; with one, a thought is written before a picture is drawn.
        negative_prompt: what text guidance moves away from, in place of nothing.
        rounds: pictures at most, where the model itself decides when it draws; else None.
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
    def writes(self) -> bool:
        """Whether the model writes text for it."""
        return self.image is None or self.system is not None or self.rounds is not None


def is_size(size) -> bool:
    """Whether it is a pair of integers."""
    return isinstance(size, (tuple, list)) and len(size) == 2 and all(type(side) is int for side in size)


def seeds_for(seed, count: int) -> list[int]:
    """A seed for each prompt: those given, or consecutive ones from the one given, or from a random one."""
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
    """The text; ValueError if it is none, or too long to be worth counting its tokens."""
    if not isinstance(text, str):
        raise ValueError(f"{name} is a {type(text).__name__}: give a str")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"{name} has {len(text)} characters: allowed are {MAX_CHARACTERS}; shorten it")
    return text


def check_list(name: str, values, kinds, most: int) -> list:
    """A list of 1 to ``most`` entries of these types; ValueError if it is not."""
    if not isinstance(values, (list, tuple)) or not 1 <= len(values) <= most:
        raise ValueError(f"{name}: give a list of 1 to {most} entries")
    for value in values:
        if not isinstance(value, kinds):
            raise ValueError(f"{name}: an entry is a {type(value).__name__}, which is not allowed here")
    return list(values)


def open_images(images: ImageSource | Sequence[ImageSource], least: int = 0) -> list[Image.Image]:
    """One image or a list of them, opened; ValueError or FileNotFoundError if one cannot be."""
    if not isinstance(images, (list, tuple)):
        images = [images]
    if not least <= len(images) <= MAX_INPUTS:
        raise ValueError(f"images: {len(images)} given, allowed are at least {least} and at most {MAX_INPUTS}")
    return [open_image(image) for image in images]
