"""What every test relies on: one thread per operator (the shapes are tiny), and the same examples on every machine."""

import os

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch

settings.register_profile("bagel_rt", deadline=None, derandomize=True)
settings.load_profile("bagel_rt")


@pytest.fixture(scope="session")
def bagel():
    """The embedded default model, in float32 on the CPU."""
    from bagel_rt import Bagel  # imports torch, which reads the environment set above

    return Bagel.from_pretrained(device="cpu")


@pytest.fixture
def photo():
    """A picture of noise, 90 x 70 pixels."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8))
