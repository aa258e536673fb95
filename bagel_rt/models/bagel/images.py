"""Open, convert and resize images, and convert them to tensors and back, as in the official code.

EXIF orientation is not applied, because the official code does not apply it: the model gets the pixels as stored
(Pillow itself rotates TIFF files). To apply it, pass ``PIL.ImageOps.exif_transpose(image)``.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, UnidentifiedImageError

if TYPE_CHECKING:  # the functions that need torch import it: the server's decoder processes do not
    import torch

MAX_IMAGE_PIXELS = 1 << 26  # 8192 x 8192, 256 MiB when decoded
MAX_IMAGE_SIDE = 1 << 16  # bounds the intermediate image between the two passes of resizing a thin image
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # other formats can make Pillow run Ghostscript


def open_image(
    source: Image.Image | str | Path | bytes, max_pixels: int = MAX_IMAGE_PIXELS, formats: Sequence[str] = FORMATS
) -> Image.Image:
    """Decode an image without converting its mode; for an animation, the first frame.

    Args:
        source: a PIL image (returned as it is), a path, or the bytes of an encoded file.
        max_pixels: maximum width x height.
        formats: allowed formats of a file, from ``FORMATS``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an image in one of the formats; truncated or damaged; or empty, with more than ``max_pixels``
            pixels or a side over ``MAX_IMAGE_SIDE``, which is checked before decoding. The message names the source.
    """
    if isinstance(source, Image.Image):
        return _decode(source, f"the given {source.mode} image", max_pixels)
    file: io.BytesIO | str | Path
    if isinstance(source, bytes):
        name, file = f"the given {len(source)} bytes", io.BytesIO(source)
    elif isinstance(source, (str, Path)):
        name, file = f"{source!s:.200}", source
        if not os.path.exists(source):  # False also for a string that cannot be a path
            raise FileNotFoundError(f"{name}: no such file. Give the path of an image.")
        if not os.path.isfile(source):
            raise ValueError(f"{name} is not a file. Give the path of an image.")
    else:
        raise ValueError(f"an image must be a PIL image, a path or encoded bytes, got {type(source).__name__}.")
    try:
        image = Image.open(file, formats=formats)
    except UnidentifiedImageError:
        raise ValueError(f"{name}: not an image in one of the formats {', '.join(formats)}. Convert it.") from None
    except Exception as error:  # Pillow's parsers raise OSError, ValueError, struct.error and others
        raise ValueError(f"{name} cannot be opened: {error}. Save or download it again.") from error
    with image:
        return _decode(image, name, max_pixels)


def _decode(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    width, height = image.size
    if not 1 <= width * height <= max_pixels or max(width, height) > MAX_IMAGE_SIDE:
        raise ValueError(
            f"{name} must have 1 to {max_pixels} pixels and sides up to {MAX_IMAGE_SIDE}, got {width}x{height}."
        )
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # as in open_image
        raise ValueError(f"{name} is truncated or damaged: {error}. Save or download it again.") from error
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB as in the official code: RGBA and images with a transparent color are composited on white.

    Every other mode is converted directly, which drops the alpha channel of LA.

    Raises:
        ValueError: Pillow cannot convert the mode.
    """
    try:
        if image.mode != "RGBA" and image.info.get("transparency") is None:
            return image.convert("RGB")
        canvas = Image.new("RGB", image.size, "white")
        image = image.convert("RGBA")
    except ValueError as error:
        raise ValueError(f"the image's mode must be convertible to RGB, got {image.mode}: {error}.") from error
    canvas.paste(image, mask=image)
    return canvas


@dataclass(frozen=True)
class ResizeRule:
    """The rule by which an image is resized for the model. ValueError if the values contradict each other.

    Attributes:
        max_size: maximum of the long side in pixels.
        min_size: minimum of the short side in pixels, unless ``max_size`` prevents it: 4000x100 becomes 1024x32.
        stride: both sides become multiples of it.
        max_pixels: maximum area, shared by the images of a request.
    """

    max_size: int
    min_size: int
    stride: int
    max_pixels: int = 14 * 14 * 9 * 1024

    def __post_init__(self) -> None:
        if not 1 <= self.stride <= self.min_size <= self.max_size or self.max_pixels < 1:
            raise ValueError(
                f"ResizeRule must have 1 <= stride <= min_size <= max_size and max_pixels >= 1, got {self}."
            )

    def output_size(self, width: int, height: int, img_num: int = 1) -> tuple[int, int]:
        """The (width, height) after resizing an image, one of ``img_num`` images that share ``max_pixels``.

        Raises:
            ValueError: an argument below 1.
        """
        if min(width, height, img_num) < 1:
            raise ValueError(f"width, height and img_num must be at least 1, got {width}, {height} and {img_num}.")
        scale = max(min(self.max_size / max(width, height), 1.0), self.min_size / min(width, height))
        width, height = self._scale(width, height, scale)
        budget, area = self.max_pixels / img_num, width * height
        if area > budget:
            # The official code scales both sides by the ratio of the areas, without a square root. The result is
            # smaller than the budget allows.
            width, height = self._scale(width, height, budget / area)
        if max(width, height) > self.max_size:
            width, height = self._scale(width, height, self.max_size / max(width, height))
        return width, height

    def _scale(self, width: int, height: int, scale: float) -> tuple[int, int]:
        # As in the official code: rounded to pixels, then to strides, half to even both times.
        width, height = (max(1, round(round(side * scale) / self.stride)) * self.stride for side in (width, height))
        return width, height

    def resize(self, image: Image.Image, img_num: int = 1) -> Image.Image:
        """Resize an RGB image to :meth:`output_size`, bicubic with antialiasing on uint8. ValueError if not RGB."""
        return _require_rgb(image).resize(self.output_size(*image.size, img_num), Image.Resampling.BICUBIC)


def image_to_tensor(image: Image.Image) -> torch.Tensor:
    """Convert an RGB image to float32 [3, H, W] in [-1, 1]. ValueError if it is not RGB."""
    import torch

    levels = torch.from_numpy(np.array(_require_rgb(image))).permute(2, 0, 1).contiguous()
    return (levels / 255 - 0.5) / 0.5


def tensor_to_image(tensor: torch.Tensor) -> Image.Image:
    """Convert [3, H, W] on any device to an RGB image; values are clamped to [-1, 1].

    The 256 levels are truncated, not rounded, as in the official code.

    Raises:
        ValueError: wrong shape.
        FloatingPointError: the tensor contains NaN.
    """
    import torch

    if tensor.ndim != 3 or tensor.shape[0] != 3:
        raise ValueError(f"tensor must be [3, H, W], got {list(tensor.shape)}.")
    levels = (tensor.float() * 0.5 + 0.5).clamp(0, 1).permute(1, 2, 0) * 255
    if levels.isnan().any():
        raise FloatingPointError("the decoded image contains NaN. Check the model's weights or the latents.")
    return Image.fromarray(levels.to(torch.uint8).contiguous().cpu().numpy())


def _require_rgb(image: Image.Image) -> Image.Image:
    if image.mode != "RGB":
        raise ValueError(f"the image's mode must be RGB, got {image.mode}. Convert it with to_rgb.")
    return image
