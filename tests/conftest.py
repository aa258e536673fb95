"""What every test relies on: one thread per operator (the shapes are tiny), and the same examples on every machine."""

import os

from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch

settings.register_profile("bagel_rt", deadline=None, derandomize=True)
settings.load_profile("bagel_rt")
