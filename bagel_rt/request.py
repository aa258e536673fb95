"""Requests, results and progress reports, and the checks of a request's arguments."""

import secrets
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from numpy.typing import NDArray
from PIL import Image

from bagel_rt.models.bagel.images import open_image
from bagel_rt.models.bagel.settings import MAX_CHARACTERS, MAX_INPUTS, ImageSettings, TextSettings, check_seed
from bagel_rt.validation import as_integer, check, integer, invalid, per_prompt

ImageSource = Image.Image | NDArray[Any] | str | Path | bytes
_BLANKS = "\u115f\u1160\u2800\u3164\uffa0"  # letters and symbols without a glyph: Hangul fillers, blank Braille
Noise = Sequence[torch.Tensor] | torch.Tensor | None


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
        parameters: every hyper-parameter of the image, by name.
        latents: float32 [tokens, features] on the model's device, the input of the autoencoder's decoder.
        thought: the text generated before the image, or None.
    """

    image: Image.Image
    seed: int
    parameters: dict[str, Any]
    latents: torch.Tensor
    thought: str | None = None


@dataclass(kw_only=True)
class Request:
    """A request with resolved settings; this class is a request for an answer in text.

    Attributes:
        inputs: texts and images in order: strings, and PIL images that can be converted to RGB.
        seed: for noise and sampling.
        text: settings of text decoding.
        system: the system prompt.
    """

    inputs: list[str | Image.Image]
    seed: int
    text: TextSettings
    system: str | None = None

    @property
    def draws(self) -> bool:
        """Whether the request generates images."""
        return False

    @property
    def generates_text(self) -> bool:
        """Whether the request generates text: an answer, a thought or interleaved text."""
        return True

    @property
    def parts(self) -> list[str | Image.Image]:
        """The inputs and all other texts that a context holds."""
        return self.inputs if self.system is None else [*self.inputs, self.system]


@dataclass(kw_only=True)
class ImageRequest(Request):
    """A request for an image. With a system prompt the model generates a thought first.

    Attributes:
        size: (height, width) of the images to generate; an input image overrides it.
        image: settings of denoising.
        noise: tensors to use instead of the noise drawn from the seed; see
            :class:`~bagel_rt.models.bagel.contexts.Noise`.
        negative_prompt: used for the branch without text of classifier-free guidance. Default: no text.
    """

    size: tuple[int, int]
    image: ImageSettings
    noise: Noise = None
    negative_prompt: str | None = None

    @property
    def draws(self) -> bool:
        return True

    @property
    def generates_text(self) -> bool:
        return self.system is not None

    @property
    def parts(self) -> list[str | Image.Image]:
        parts = super().parts
        return parts if self.negative_prompt is None else [*parts, self.negative_prompt]


@dataclass(kw_only=True)
class InterleavedRequest(ImageRequest):
    """A request for texts and images in turn.

    Attributes:
        rounds: maximum number of images.
    """

    rounds: int

    @property
    def generates_text(self) -> bool:
        return True


def as_size(size: object) -> tuple[int, int] | None:
    """A pair of integers as a tuple of int; None for other values."""
    if not isinstance(size, (tuple, list)) and getattr(size, "ndim", None) != 1:
        return None
    sides = [as_integer(side) for side in cast(Iterable[object], size)]
    if len(sides) != 2 or sides[0] is None or sides[1] is None:
        return None
    return sides[0], sides[1]


def resolve_seeds(seed: Any, count: int) -> list[int]:
    """One seed per prompt: a list is used as it is, a single seed (or a random one) starts consecutive seeds."""
    if getattr(seed, "ndim", None) == 1:  # an array of seeds
        seed = list(seed)
    if isinstance(seed, (list, tuple)):
        seeds = [check_seed(value) for value in per_prompt("seed", seed, count)]
    else:
        value = check_seed(seed)
        first = secrets.randbelow(2**32) if value is None else value
        seeds = [check_seed(first + index) for index in range(count)]
    return [secrets.randbelow(2**32) if value is None else value for value in seeds]


def check_text(name: str, text: object) -> str:
    """Return the text; ValueError if it is not a str, or too long to be tokenized for an exact error message."""
    if not isinstance(text, str):
        raise invalid(name, text, "a str")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"{name} must have at most {MAX_CHARACTERS} characters, got {len(text)}. Shorten it.")
    return text


def check_prompt(name: str, text: object, remedy: str) -> str:
    """Return the text of :func:`check_text`; ValueError if it has no visible character."""
    prompt = check_text(name, text)
    if not is_visible(prompt):
        raise invalid(name, prompt, "a text with at least one visible character", remedy)
    return prompt


def is_visible(text: str) -> bool:
    """Whether a text has a character besides spaces, control and format characters, and combining marks."""
    return any(
        unicodedata.category(character)[0] not in "ZM"
        and unicodedata.category(character) not in ("Cc", "Cf", "Cs")
        and character not in _BLANKS
        for character in text
    )


def check_list(name: str, values: object, types: type | tuple[type, ...], maximum: int) -> list[Any]:
    """Return the values as a list; ValueError unless they are 1 to ``maximum`` entries of these types."""
    if not isinstance(values, (list, tuple)) or not 1 <= len(values) <= maximum:
        raise invalid(name, values, f"a list of 1 to {maximum} entries")
    types = types if isinstance(types, tuple) else (types,)
    for value in values:
        if not isinstance(value, types):
            raise invalid(f"an entry of {name}", value, "of type " + ", ".join(kind.__name__ for kind in types))
    return list(values)


def open_images(images: Any, minimum: int = 0) -> list[Image.Image]:
    """Open one image or a list of them; ValueError or FileNotFoundError if that fails."""
    sources = images if isinstance(images, (list, tuple)) else [images]
    check("the number of images", len(sources), integer(minimum, MAX_INPUTS))
    return [open_image(image) for image in sources]
