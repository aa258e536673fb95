"""For code that was written for the official repository: its inferencer, and its modules with this runtime inside."""

from bagel_rt.compat.accelerate import Acceleration, accelerate
from bagel_rt.compat.inferencer import InterleaveInferencer

__all__ = ["Acceleration", "InterleaveInferencer", "accelerate"]
