"""The Mixture-of-Transformers decoder over a packed, expert-major batch of rows.

Rows [0, G) belong to the generation expert, rows [G, T) to the understanding expert, in every op of every layer; the
order is made once, at entry, by the plan. A layer is eight ops: norm, QKV, QK-norm + RoPE + cache write, attention,
output + residual, norm, gate/up + SwiGLU, down + residual.
"""

from dataclasses import dataclass

import torch

from bagel_rt.cache import KVCache
from bagel_rt.config import TransformerConfig
from bagel_rt.kernels import attention, decode_attention, linear, qk_norm_rope, rms_norm
from bagel_rt.models.bagel.weights import DecoderLayerWeights, Pair


@dataclass(slots=True)
class Rows:
    """What the layers need to know of T packed rows, on the device.

    Attributes:
        G: number of generation rows; they come first.
        cos, sin: float32 [T, head_dim / 2], rotary tables at each row's position.
        slots: int64 [T], the cache slot that each row's key and value are written to.
        limits, blocks: int32 [T] and [n, 7], the attention plan (see ``bagel_rt.plan``). None when decoding.
        starts, lengths: int64 [T], when decoding: row b sees slots [starts[b], starts[b] + lengths[b]). Else None.
    """

    G: int
    cos: torch.Tensor
    sin: torch.Tensor
    slots: torch.Tensor
    limits: torch.Tensor | None = None
    blocks: torch.Tensor | None = None
    starts: torch.Tensor | None = None
    lengths: torch.Tensor | None = None


class Transformer:
    """The decoder stack. Stateless: hidden states and rows in, hidden states out, keys and values into the cache."""

    def __init__(self, config: TransformerConfig, layers: list[DecoderLayerWeights], norm: Pair):
        self.config = config
        self.layers = layers
        self.norm = norm

    def forward(self, hidden: torch.Tensor, rows: Rows, cache: KVCache) -> torch.Tensor:
        """Run every layer.

        Args:
            hidden: [T, H], packed expert-major. Not modified.
            rows: the plan of these rows.
            cache: receives the rows' keys and values at ``rows.slots``.

        Returns:
            [T, H], before the final norm (see :meth:`final_norm`).
        """
        for index, layer in enumerate(self.layers):
            hidden = self.attend(layer, hidden, rows, *cache.layer(index))
            hidden = self.feed_forward(layer, hidden, rows.G)
        return hidden

    def attend(self, layer: DecoderLayerWeights, hidden: torch.Tensor, rows: Rows, k_cache, v_cache) -> torch.Tensor:
        """The attention half of a layer, residual included."""
        G, eps = rows.G, self.config.rms_norm_eps
        x, residual = rms_norm(hidden, None, *layer.input_norm, G, eps)
        qkv = linear(x, *layer.qkv, *layer.qkv_bias, G=G)
        q = qk_norm_rope(qkv, *layer.qk_norm, rows.cos, rows.sin, rows.slots, k_cache, v_cache, G, eps)
        if rows.lengths is None:
            x = attention(q, k_cache, v_cache, rows.limits, rows.blocks)
        else:
            x = decode_attention(q, k_cache, v_cache, rows.starts, rows.lengths)
        return linear(x.flatten(1), *layer.o, G=G, residual=residual)

    def feed_forward(self, layer: DecoderLayerWeights, hidden: torch.Tensor, G: int) -> torch.Tensor:
        """The SwiGLU half of a layer, residual included."""
        x, residual = rms_norm(hidden, None, *layer.post_norm, G, self.config.rms_norm_eps)
        x = linear(x, *layer.gate_up, G=G, swiglu=True)
        return linear(x, *layer.down, G=G, residual=residual)

    def final_norm(self, hidden: torch.Tensor, G: int) -> torch.Tensor:
        """The last RMSNorm, routed as every other; [T, H] of which the first G rows are generation rows."""
        return rms_norm(hidden, None, *self.norm, G, self.config.rms_norm_eps)[0]


def rope_tables(positions: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """cos, sin float32 [T, head_dim / 2] of integer positions [T]: angle = position * theta ** (-2 i / head_dim).

    Source: Qwen2RotaryEmbedding; the half-split layout repeats each column for both halves of a head.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions.to(torch.float32)[:, None] * (1.0 / theta**exponents)
    return angles.cos(), angles.sin()
