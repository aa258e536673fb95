"""The ops of the runtime: one file each, holding contract, PyTorch reference and launcher.

Rows of a packed batch come in up to two groups, each with weights of its own: [0, G) and [G, T).
Every op is registered as ``torch.ops.bagel_rt.<name>`` with shapes for ``torch.compile``; the functions exported here
check their arguments first, and call the launcher itself unless they are being compiled: the dispatcher takes longer
than everything else they do. They know tensors only: no model, no checkpoint, no context.
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
