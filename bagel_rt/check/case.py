"""One case of ``bagel-rt check``: the inputs, the call and its reference, and how far apart the two may be."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from bagel_rt.kernels.triton_language import INTERPRETED

ROUNDING = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-7 if INTERPRETED else 2**-8}
"""Largest relative error of one rounding to the dtype; Triton's interpreter truncates to bfloat16."""
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
"""How many of them an output has behind it at most; 1 of the others."""
FLOAT32_ARITHMETIC = 3e-5
"""Allowed on top: what a few thousand float32 additions may lose."""

QUERY_DEVIATION = 2.0
"""Of queries whose keys have 1: softmax is peaked, yet the keys of every tile weigh in some row."""

EPS = 1e-6
ALL = tuple(ROUNDING)
HALF = (torch.bfloat16, torch.float16)
BFLOAT16 = (torch.bfloat16,)
SWIGLU = 4  # roundings where torch does it: the product, silu, times up


class Values:
    """Makes the tensors of a call on one device, floating ones in one dtype; the same whenever it is made anew.

    ``random`` ones are normal. Others are left unwritten, so that gigabytes on the CPU take no memory.
    """

    def __init__(self, device: torch.device | str, dtype: torch.dtype, random: bool = True):
        self.device, self.dtype, self._random = torch.device(device), dtype, random
        self._generator = torch.Generator(self.device).manual_seed(0)

    def __call__(self, *shape: int, deviation: float = 1.0, dtype: torch.dtype | None = None) -> torch.Tensor:
        values = torch.empty(shape, device=self.device, dtype=dtype or self.dtype)
        return values.normal_(0.0, deviation, generator=self._generator) if self._random else values

    def of(self, values) -> torch.Tensor:
        """An array or list on the device, in its own dtype."""
        return torch.as_tensor(values).to(self.device)


@dataclass(frozen=True)
class Case:
    """One call of an op.

    Attributes:
        op: a name in ``bagel_rt.kernels.registry.OPS``.
        name: what is special about it.
        build: Values -> (function giving the kernel's outputs, function giving the same in float64).
        dtypes: of the inputs.
        interpreted: whether Triton's interpreter runs it too.
        roundings: where there may be more than ``ROUNDINGS``.
    """

    op: str
    name: str
    build: Callable[[Values], tuple[Callable[[], Sequence[torch.Tensor]], Callable[[], Sequence[torch.Tensor]]]]
    dtypes: tuple[torch.dtype, ...] = BFLOAT16
    interpreted: bool = False
    roundings: int = 0

    def allowed(self, dtype: torch.dtype) -> float:
        """Largest |got - want| / (|want| + rms of its row) that passes."""
        return (self.roundings or ROUNDINGS.get(self.op, 1)) * ROUNDING[dtype] + FLOAT32_ARITHMETIC


def wide(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def both(call: Callable, reference: Callable, arguments: tuple):
    """A case whose reference takes the arguments of the call."""
    return lambda: call(*arguments), lambda: reference(*map(wide, arguments))
