"""Image degradations like those of a small autoencoder, for the tests of detector and judge."""

import numpy as np
import pytest
from PIL import Image, ImageFilter


def like_an_autoencoder(image, rng):
    """Blur an image and add low-frequency and white noise."""
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(1.0)), dtype=np.float32)
    smooth = Image.fromarray(rng.normal(0, 8, (16, 16)).astype(np.float32)).resize(image.size)
    noisy = pixels + np.asarray(smooth)[..., None] + 12 * rng.standard_normal(pixels.shape, dtype=np.float32)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


degradations = pytest.mark.parametrize(
    "degrade", [pytest.param(lambda image, rng: image, id="clean"), like_an_autoencoder]
)
