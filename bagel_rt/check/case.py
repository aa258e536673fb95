"""A case of ``bagel-rt check``: inputs, the kernel's call, its float64 reference, and the error bound."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bagel_rt.kernels.triton_language import INTERPRETED

ROUNDING = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-7 if INTERPRETED else 2**-8}
"""Maximum relative error of one rounding to the dtype. Triton's interpreter truncates to bfloat16."""
ROUNDINGS = {
    "rms_norm": 2,
    "add_rms_norm": 3,
    "attention": 3,
    "attention_lse": 3,
    "attention_backward": 8,
    "decode_attention": 3,
    "decode_linear": 3,
    "decode_qkv": 4,
    "cfg_euler_step": 0,
    "group_norm_moments": 0,
    "sample": 0,
}
"""Maximum number of roundings behind an output, per op; 1 for the others."""
FLOAT32_ARITHMETIC = 3e-5
"""Added to the bound: error of a few thousand float32 additions."""

QUERY_STD = 2.0
"""Standard deviation of queries for keys of 1: softmax is peaked, yet the keys of every tile matter in some row."""

Outputs = tuple[torch.Tensor, ...]
CallAndReference = tuple[Callable[[], Outputs], Callable[[], Outputs]]
"""The kernel's call and its float64 reference."""

EPS = 1e-6
ALL = tuple(ROUNDING)
HALF = (torch.bfloat16, torch.float16)
BFLOAT16 = (torch.bfloat16,)
SWIGLU = 4  # roundings of an unfused SwiGLU: gate, up, silu(gate), and their product


class Values:
    """Creates the input tensors of a call on one device and in one dtype, reproducibly from a fixed seed.

    ``random`` tensors are normally distributed. Otherwise they are left uninitialized, so that large ones on the CPU
    commit no memory.
    """

    def __init__(self, device: torch.device | str, dtype: torch.dtype, random: bool = True) -> None:
        self.device, self.dtype, self._random = torch.device(device), dtype, random
        self._generator = torch.Generator(self.device).manual_seed(0)

    def __call__(self, *shape: int, deviation: float = 1.0, dtype: torch.dtype | None = None) -> torch.Tensor:
        values = torch.empty(shape, device=self.device, dtype=dtype or self.dtype)
        return values.normal_(0.0, deviation, generator=self._generator) if self._random else values

    def of(self, values: np.ndarray | torch.Tensor) -> torch.Tensor:
        """Copy an array or list to the device in its own dtype."""
        return torch.as_tensor(values).to(self.device)


@dataclass(frozen=True)
class Case:
    """One call of an op.

    Attributes:
        op: name in ``bagel_rt.kernels.registry.OPS``.
        name: description of the inputs.
        build: creates the inputs; returns the kernel's call and its float64 reference.
        dtypes: input dtypes to run.
        interpreted: whether the case also runs in Triton's interpreter.
        roundings: overrides ``ROUNDINGS`` if not 0.
    """

    op: str
    name: str
    build: Callable[[Values], CallAndReference]
    dtypes: tuple[torch.dtype, ...] = BFLOAT16
    interpreted: bool = False
    roundings: int = 0

    def allowed(self, dtype: torch.dtype) -> float:
        """Error bound: maximum |actual - expected| / (|expected| + rms of its row)."""
        return (self.roundings or ROUNDINGS.get(self.op, 1)) * ROUNDING[dtype] + FLOAT32_ARITHMETIC


def to_float64(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def call_and_reference(
    call: Callable[..., Outputs], reference: Callable[..., Outputs], arguments: tuple[Any, ...]
) -> CallAndReference:
    """The result of ``Case.build`` for a reference with the arguments of the call."""
    return lambda: call(*arguments), lambda: reference(*map(to_float64, arguments))
