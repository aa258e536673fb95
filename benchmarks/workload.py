"""The type of an op workload, and the sizes of BAGEL-7B-MoT.

A layer has hidden size 3584, 28 query heads and 4 key/value heads of 128 channels, and SwiGLU width 18944. The vision
tower has 16 heads of 72 channels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from bagel_rt.check.case import Values

HIDDEN, FEED_FORWARD, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 3584, 18944, 28, 4, 128, 152064
VIT_HEADS, VIT_HEAD_DIM = 16, 72
EPS = 1e-6


@dataclass(frozen=True)
class OpWorkload:
    """One call of an op with given sizes.

    Attributes:
        name: op and size, unique.
        op: name of the public op; "attention_backward" is attention and its gradients.
        flops: floating-point operations; 0 if the op is memory-bound.
        bytes: minimum memory traffic: each input read once, each output written once.
        build: Values -> (public function, arguments, keyword arguments).
        dtype: dtype of the inputs.
    """

    name: str
    op: str
    flops: int
    bytes: int
    build: Callable[[Values], tuple[Callable, tuple, dict]]
    dtype: torch.dtype = torch.bfloat16

    @property
    def entries(self) -> tuple[str, ...]:
        """Ops of the table of tiles (``bagel_rt.kernels.configs``) that this workload tunes.

        Empty for ops with CUDA kernels. Their Triton fallbacks have separate workloads.
        """
        exceptions = {
            "decode_linear": (),
            "decode_qkv": (),
            "sample": (),
            "decode_attention": ("attention",),
            "attention_backward": ("attention_dq", "attention_dk_dv"),
            "group_norm": ("group_norm_moments", "group_norm"),
        }
        return exceptions.get(self.op, (self.op,))
