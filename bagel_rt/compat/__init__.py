"""Drop-in replacements for the official repository: its inferencer class, and its modules accelerated in place."""

from bagel_rt.compat.accelerate import Acceleration, accelerate
from bagel_rt.compat.inferencer import InterleaveInferencer

__all__ = ["Acceleration", "InterleaveInferencer", "accelerate"]
