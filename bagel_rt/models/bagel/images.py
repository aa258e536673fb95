"""Open, convert and resize images, and convert them to tensors and back, as in the official code.

Two deviations, where the official result is wrong: EXIF orientation is applied, and every mode becomes 8-bit RGB by its
own range. The official code leaves photos sideways, drops the alpha channel of LA and PA, and clips 16-bit and
floating-point images to black and white.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.Image import Transpose

from bagel_rt.errors import NonFiniteError

if TYPE_CHECKING:  # the functions that need torch import it: the server's decoder processes do not
    import torch

MAX_IMAGE_PIXELS = 1 << 26  # 8192 x 8192, 256 MiB when decoded
MAX_IMAGE_SIDE = 1 << 16  # bounds the intermediate image between the two passes of resizing a thin image
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # other formats can make Pillow run Ghostscript

_ORIENTATION = 0x0112  # the EXIF tag
_TRANSPOSE = {  # EXIF orientation -> how to transpose the stored pixels to see them upright
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
_ORIENTATION_SOURCES = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")  # keys of Image.info
_GRAY_SCALES = {"L;2": 85, "L;4": 17}  # raw mode of a file -> 8-bit level of its level 1
_ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")


def open_image(
    source: Image.Image | NDArray[Any] | str | Path | bytes,
    max_pixels: int = MAX_IMAGE_PIXELS,
    formats: tuple[str, ...] = FORMATS,
) -> Image.Image:
    """Decode an image, turn it upright and scale 16-bit and floating-point modes to 8 bits.

    Other modes are kept; of an animation, the first frame is used.

    Args:
        source: a path, the bytes of an encoded file, a PIL image (returned as it is if nothing changes), or an array
            [H, W] or [H, W, C] of 1 to 4 channels: uint8, uint16, or floats from 0 to 1.
        max_pixels: maximum width x height.
        formats: allowed formats of a file, from ``FORMATS``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an image in one of the formats; truncated or damaged; 32-bit integers or floats outside 0 to 1;
            or empty, with more than ``max_pixels`` pixels or a side over ``MAX_IMAGE_SIDE``, which is checked before
            decoding. The message names the source.
    """
    if isinstance(source, np.ndarray):
        source = _array_to_image(source, max_pixels)
    if isinstance(source, Image.Image):
        return _decode(source, f"the {source.mode} image", max_pixels)
    file: io.BytesIO | str | Path
    if isinstance(source, bytes):
        name, file = f"the image of {len(source)} bytes", io.BytesIO(source)
    elif isinstance(source, (str, Path)):
        name, file = f"{source!s:.200}", source
        if not os.path.exists(source):  # False also for a string that cannot be a path
            raise FileNotFoundError(f"{name}: no such file. Give the path of an image.")
        if not os.path.isfile(source):
            raise ValueError(f"{name} is not a file. Give the path of an image.")
    else:
        raise ValueError(
            f"an image must be a PIL image, an array, a path or encoded bytes, got {type(source).__name__}."
        )
    try:
        image = Image.open(file, formats=formats)
    except UnidentifiedImageError:
        raise ValueError(f"{name}: not an image in one of the formats {', '.join(formats)}. Convert it.") from None
    except Exception as error:  # Pillow's parsers raise OSError, ValueError, struct.error and others
        raise ValueError(f"{name} cannot be opened: {error}. Save or download it again.") from error
    gray = image.info.get("transparency")
    if isinstance(gray, int) and image.tile:
        # Pillow scales gray levels of 2 and 4 bits to 8 bits, but not the transparent one among them.
        image.info["transparency"] = gray * _GRAY_SCALES.get(str(image.tile[0].args), 1)
    with image:
        return _decode(image, name, max_pixels)


def _decode(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    _check_size(name, *image.size, max_pixels)
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # as in open_image
        raise ValueError(f"{name} is truncated or damaged: {error}. Save or download it again.") from error
    try:
        return _to_8_bit(_turn_upright(image))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _check_size(name: str, width: int, height: int, max_pixels: int) -> None:
    if not 1 <= width * height <= max_pixels or max(width, height) > MAX_IMAGE_SIDE:
        raise ValueError(
            f"{name} must have 1 to {max_pixels} pixels and sides up to {MAX_IMAGE_SIDE}, got {width}x{height}."
        )


def _turn_upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation and remove it, so that a second call changes nothing.

    ``ImageOps.exif_transpose`` also writes the other EXIF tags again, which fails if one of them is damaged.
    """
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # damaged EXIF data; Pillow's parsers raise all kinds of exceptions
        return image
    if orientation not in _TRANSPOSE:
        return image
    upright = image.transpose(_TRANSPOSE[orientation])
    for key in _ORIENTATION_SOURCES:
        upright.info.pop(key, None)
    return upright


def _array_to_image(array: NDArray[Any], max_pixels: int) -> Image.Image:
    if array.ndim not in (2, 3) or (array.ndim == 3 and not 1 <= array.shape[2] <= 4):
        raise ValueError(
            f"the shape of an image array must be [H, W] or [H, W, C] with 1 to 4 channels, got {list(array.shape)}. "
            "Move the channels to the last dimension."
        )
    _check_size("the image array", array.shape[1], array.shape[0], max_pixels)
    return Image.fromarray(np.ascontiguousarray(_to_levels(array[..., 0] if array.shape[2:] == (1,) else array)))


def _to_levels(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Scale uint8, uint16, or floats from 0 to 1, to 256 levels; ValueError for other dtypes or values."""
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind == "u" and values.itemsize == 2:  # in either byte order
        return (values // 257 + (values % 257 > 128)).astype(np.uint8)  # rounded; 65535 = 255 * 257
    if values.dtype.kind != "f":
        raise ValueError(
            f"the pixels of an image must be uint8, uint16 or floats from 0 to 1, got {values.dtype}, which does not "
            "define the value of white. Convert it to uint8 or uint16."
        )
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 1):  # also if they are NaN
        raise ValueError(
            f"the floating-point pixels of an image must be from 0 (black) to 1 (white), got {low:g} to {high:g}. "
            "Scale them."
        )
    return np.rint(values * 255).astype(np.uint8)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert to 8-bit RGB; images with an alpha channel or a transparent color are composited on white.

    Raises:
        ValueError: 32-bit integers (I), floats (F) outside 0 to 1, or Pillow cannot convert the mode.
    """
    image = _to_8_bit(image)
    transparent = image.info.get("transparency") is not None or image.mode in _ALPHA_MODES
    if image.mode == "P" and image.palette is not None:
        transparent = transparent or image.palette.mode == "RGBA"
    try:
        if not transparent:
            return image.convert("RGB")
        if image.mode == "La":  # has no direct conversion
            image = image.convert("LA")
        image = _with_8_bit_transparency(image).convert("RGBA")
    except ValueError as error:
        raise ValueError(f"the image's mode must be convertible to RGB, got {image.mode}: {error}.") from error
    canvas = Image.new("RGB", image.size, "white")
    canvas.paste(image, mask=image)
    return canvas


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Convert I;16 (in any byte order) and F to L, or to LA if they have a transparent gray level; keep other modes."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    levels = Image.fromarray(_to_levels(values))
    gray = image.info.get("transparency")
    if isinstance(gray, int):
        levels.putalpha(Image.fromarray(np.where(values == gray, 0, 255).astype(np.uint8)))
    return levels


def _with_8_bit_transparency(image: Image.Image) -> Image.Image:
    """Reduce the transparent color of a 16-bit RGB file to 8 bits, as Pillow does with its pixels only."""
    color = image.info.get("transparency")
    if image.mode != "RGB" or not isinstance(color, tuple) or max(color) <= 255:
        return image
    image = image.copy()
    image.info["transparency"] = tuple(level >> 8 for level in color)
    return image


def official_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB as the official ``pil_img2rgb``, which differs from :func:`to_rgb` for some modes.

    An image with a transparent color or in mode RGBA is composited on white. Other modes are converted by Pillow, which
    drops the alpha channel of LA and clips 16-bit levels. EXIF orientation is not applied.
    """
    if image.mode == "RGBA" or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        canvas = Image.new("RGB", image.size, "white")
        canvas.paste(image, mask=image)
        return canvas
    return image.convert("RGB")


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
        NonFiniteError: the tensor contains NaN or infinity.
    """
    import torch

    if tensor.ndim != 3 or tensor.shape[0] != 3:
        raise ValueError(f"tensor must be [3, H, W], got {list(tensor.shape)}.")
    if not tensor.isfinite().all():
        raise NonFiniteError("an image")
    levels = (tensor.float() * 0.5 + 0.5).clamp(0, 1).permute(1, 2, 0) * 255
    return Image.fromarray(levels.to(torch.uint8).contiguous().cpu().numpy())


def _require_rgb(image: Image.Image) -> Image.Image:
    if image.mode != "RGB":
        raise ValueError(f"the image's mode must be RGB, got {image.mode}. Convert it with to_rgb.")
    return image
