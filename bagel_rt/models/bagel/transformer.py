"""The Mixture-of-Transformers decoder over a packed batch of rows.

The plan sorts the rows by expert once per forward pass: in every op, rows [0, G) use the generation expert and rows
[G, T) the understanding expert. A layer is eight ops: norm, QKV, QK-norm + RoPE + cache write, attention, output +
residual, norm, gate/up + SwiGLU, down + residual. Text decoding has few rows and is memory-bound; its layers are five
ops, each of which reads its weights once.
"""

from typing import Protocol

import torch

from bagel_rt.kernels import (
    attention,
    decode_attention,
    decode_linear,
    decode_qkv,
    linear,
    qk_norm_rope,
    rms_norm,
)
from bagel_rt.models.bagel.config import TransformerConfig
from bagel_rt.models.bagel.weights import DecoderLayerWeights, Pair
from bagel_rt.runtime.batch import DecodeBatch, ForwardBatch
from bagel_rt.runtime.slots import KVCache


class Attention(Protocol):
    """The attention op, or a differentiable one with the same arguments."""

    def __call__(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        limits: torch.Tensor,
        blocks: torch.Tensor,
        /,
    ) -> torch.Tensor:
        """Queries [T, heads, head_dim] -> outputs of the same shape."""


class Transformer:
    """The decoder layers. Stateless except for the keys and values, which are written to the KV cache."""

    def __init__(self, config: TransformerConfig, layers: list[DecoderLayerWeights], norm: Pair) -> None:
        self.config = config
        self.layers = layers
        self.norm = norm

    def forward(
        self, hidden: torch.Tensor, batch: ForwardBatch | DecodeBatch, cache: KVCache, attention: Attention = attention
    ) -> torch.Tensor:
        """Run every layer.

        Args:
            hidden: [T, H], sorted by expert; not modified.
            batch: positions, slots and attention plan of the rows; a :class:`DecodeBatch` if every row is the next
                token of a text.
            cache: the keys and values of the rows are written to ``batch.slots``.
            attention: the attention op; training passes a differentiable one.

        Returns:
            [T, H], before the final norm (see :meth:`final_norm`).
        """
        for index, layer in enumerate(self.layers):
            if isinstance(batch, DecodeBatch):
                hidden = self.decode(layer, hidden, batch, *cache.layer(index))
            else:
                hidden = self.attend(layer, hidden, batch, *cache.layer(index), attention)
                hidden = self.feed_forward(layer, hidden, batch.G)
        return hidden

    def attend(
        self,
        layer: DecoderLayerWeights,
        hidden: torch.Tensor,
        batch: ForwardBatch,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        attention: Attention = attention,
    ) -> torch.Tensor:
        """The attention half of a layer, with its residual connection."""
        G, eps = batch.G, self.config.rms_norm_eps
        x, residual = rms_norm(hidden, None, *layer.input_norm, G, eps)
        qkv = linear(x, *layer.qkv, *layer.qkv_bias, G=G)
        q = qk_norm_rope(qkv, *layer.qk_norm, batch.cos, batch.sin, batch.slots, k_cache, v_cache, G, eps)
        x = attention(q, k_cache, v_cache, batch.limits, batch.blocks)
        return linear(x.flatten(1), *layer.o, G=G, residual=residual)

    def feed_forward(self, layer: DecoderLayerWeights, hidden: torch.Tensor, G: int) -> torch.Tensor:
        """The SwiGLU half of a layer, with its residual connection."""
        x, residual = rms_norm(hidden, None, *layer.post_norm, G, self.config.rms_norm_eps)
        x = linear(x, *layer.gate_up, G=G, swiglu=True)
        return linear(x, *layer.down, G=G, residual=residual)

    def decode(
        self,
        layer: DecoderLayerWeights,
        hidden: torch.Tensor,
        batch: DecodeBatch,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
    ) -> torch.Tensor:
        """A whole layer for one token per text, [B, H]. Text uses the understanding expert only."""
        eps = self.config.rms_norm_eps
        weights = (layer.input_norm.und, layer.qkv.und, layer.qkv_bias.und, layer.qk_norm.und)
        q = decode_qkv(hidden, *weights, batch.cos, batch.sin, batch.slots, k_cache, v_cache, eps)
        x = decode_attention(q, k_cache, v_cache, batch.starts, batch.lengths)
        hidden = decode_linear(x.flatten(1), layer.o.und, residual=hidden)
        x = decode_linear(hidden, layer.gate_up.und, norm=layer.post_norm.und, eps=eps, swiglu=True)
        return decode_linear(x, layer.down.und, residual=hidden)

    def final_norm(self, hidden: torch.Tensor, G: int) -> torch.Tensor:
        """The last RMSNorm, [T, H]; the first G rows use the generation expert."""
        return rms_norm(hidden, None, *self.norm, G, self.config.rms_norm_eps)[0]
