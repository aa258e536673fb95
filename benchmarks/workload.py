"""What a workload is: one call of an op, made at the sizes of BAGEL-7B-MoT.

A layer has hidden size 3584, 28 query heads and 4 key/value heads of 128 channels, SwiGLU width 18944; its vision tower
16 heads of 72.
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
    """One call of an op.

    Attributes:
        name: op and size, unique.
        op: the public op's name; "attention_backward" is attention and its gradients.
        flops: multiplications and additions of the formula; 0 where memory is the limit.
        bytes: least traffic in ``dtype``, each input read and each output written once.
        build: Values -> (public function, arguments, keyword arguments).
        dtype: what the model runs it in.
    """

    name: str
    op: str
    flops: int
    bytes: int
    build: Callable[[Values], tuple[Callable, tuple, dict]]
    dtype: torch.dtype = torch.bfloat16

    @property
    def entries(self) -> tuple[str, ...]:
        """The ops of the table of tiles (``bagel_rt.kernels.configs``) that the workload is about.

        None for ops whose kernels are CUDA: what runs in their place has workloads of its own.
        """
        others = {
            "decode_linear": (),
            "decode_qkv": (),
            "sample": (),
            "decode_attention": ("attention",),
            "attention_backward": ("attention_dq", "attention_dk_dv"),
            "group_norm": ("group_norm_moments", "group_norm"),
        }
        return others.get(self.op, (self.op,))
