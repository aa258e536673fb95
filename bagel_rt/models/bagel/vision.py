"""The SigLIP vision tower over packed images of any aspect ratio (NaViT packing), and its connector to the LLM.

The patches of all images form one packed sequence; attention stays within an image. Learned 2-D positions,
pre-LayerNorm blocks, tanh-GELU, no class token, no pooling.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from bagel_rt.kernels import attention
from bagel_rt.models.bagel.config import ViTConfig
from bagel_rt.models.bagel.weights import Affine, ViTLayerWeights, ViTWeights
from bagel_rt.runtime.plan import Segment, build_plan

AttentionOp = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(q, k, v, limits, blocks) -> output, as :func:`bagel_rt.kernels.attention`."""


def vision_tower(
    weights: ViTWeights,
    config: ViTConfig,
    patches: torch.Tensor,
    position_ids: torch.Tensor,
    lengths: list[int],
    attention: AttentionOp = attention,
) -> torch.Tensor:
    """Encode packed patches.

    Args:
        patches: [n, patch * patch * channels], the patches of all images in order; pixels in [-1, 1].
        position_ids: int64 [n], indices into the learned position table.
        lengths: patches per image, with sum n.
        attention: the attention op; training passes a differentiable one.

    Returns:
        [n, V] after the last LayerNorm.
    """
    limits, blocks = image_attention_plan(lengths, patches.device)
    x = embed_patches(weights, patches, position_ids)
    for layer in weights.layers:
        x = encoder_layer(layer, config, x, limits, blocks, attention)
    return F.layer_norm(x, (config.hidden_size,), *weights.post_norm, config.layer_norm_eps)


def embed_patches(weights: ViTWeights, patches: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """Patches [n, features] -> [n, V], with learned position embeddings."""
    return F.linear(patches, *weights.patch_embedding) + weights.position_embedding[position_ids]


def encoder_layer(
    layer: ViTLayerWeights,
    config: ViTConfig,
    x: torch.Tensor,
    limits: torch.Tensor,
    blocks: torch.Tensor,
    attention: AttentionOp = attention,
) -> torch.Tensor:
    """One pre-LayerNorm block, [n, V] -> [n, V]; limits and blocks from :func:`image_attention_plan`."""
    V, eps = config.hidden_size, config.layer_norm_eps
    qkv = F.linear(F.layer_norm(x, (V,), *layer.norm1, eps), *layer.qkv)
    q, k, v = qkv.view(-1, 3, config.num_heads, config.head_dim).unbind(1)
    x = x + F.linear(attention(q, k, v, limits, blocks).flatten(1), *layer.out)
    hidden = F.gelu(F.linear(F.layer_norm(x, (V,), *layer.norm2, eps), *layer.fc1), approximate="tanh")
    return x + F.linear(hidden, *layer.fc2)


def connect(connector: tuple[Affine, Affine], x: torch.Tensor) -> torch.Tensor:
    """Project vision features to the LLM, [n, V] -> [n, H]: linear, tanh-GELU, linear."""
    return F.linear(F.gelu(F.linear(x, *connector[0]), approximate="tanh"), *connector[1])


def image_attention_plan(lengths: list[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Limits and blocks for the attention op with full attention within each image."""
    segments, start = [], 0
    for length in lengths:
        segments.append(Segment("full", np.zeros(length, dtype=bool), start, 0, start))
        start += length
    plan = build_plan(segments)
    return torch.from_numpy(plan.limits).to(device), torch.from_numpy(plan.blocks).to(device)
