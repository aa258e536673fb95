"""Rendered scenes spoilt as a small autoencoder would, for the tests of the shapes' sight and judge."""

import numpy as np
import pytest
from PIL import Image, ImageFilter


def like_an_autoencoder(image, rng):
    """The picture blurred, with smooth and with rough noise."""
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(1.0)), dtype=np.float32)
    smooth = Image.fromarray(rng.normal(0, 8, (16, 16)).astype(np.float32)).resize(image.size)
    noisy = pixels + np.asarray(smooth)[..., None] + 12 * rng.standard_normal(pixels.shape, dtype=np.float32)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


spoilt = pytest.mark.parametrize("spoil", [pytest.param(lambda image, rng: image, id="clean"), like_an_autoencoder])
