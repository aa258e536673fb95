"""GPU ops. Each file holds one op: its contract, its PyTorch reference, its kernel and its launcher.

The rows of a packed batch form up to two groups, [0, G) and [G, T), each with its own weights.

Every op is registered as ``torch.ops.bagel_rt.<name>`` with a fake implementation for ``torch.compile``. The functions
exported here check their arguments and then call the launcher directly, except under ``torch.compile``: the dispatcher
costs more host time than the rest of the call. Ops depend on tensors only, not on a model or a checkpoint.
"""

from .attention import attention, attention_dense_reference
from .attention_backward import attention_backward
from .decode_attention import decode_attention
from .decode_linear import decode_linear
from .decode_qkv import decode_qkv
from .group_norm import group_norm, group_norm_moments
from .guidance import cfg_euler_step, guided_velocity
from .linear import linear
from .linear_backward import linear_backward
from .norm import rms_norm
from .norm_backward import rms_norm_backward
from .qk_norm_rope import qk_norm_rope
from .sample import sample

__all__ = [
    "attention",
    "attention_backward",
    "attention_dense_reference",
    "decode_attention",
    "decode_linear",
    "decode_qkv",
    "group_norm",
    "group_norm_moments",
    "cfg_euler_step",
    "guided_velocity",
    "linear",
    "linear_backward",
    "qk_norm_rope",
    "rms_norm",
    "rms_norm_backward",
    "sample",
]
