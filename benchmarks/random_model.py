"""Models with random weights, generated on the device in seconds."""

from functools import partial

import torch

from bagel_rt.checkpoint import DEFAULT_MODEL
from bagel_rt.models.bagel.config import BagelConfig, TransformerConfig, VAEConfig, ViTConfig
from bagel_rt.models.bagel.images import ResizeRule
from bagel_rt.models.bagel.model import BagelModel
from bagel_rt.models.bagel.random_checkpoint import random_weight
from bagel_rt.models.bagel.tokenizer import Tokenizer

THREE_LAYERS = BagelConfig(
    TransformerConfig(
        hidden_size=64,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        intermediate_size=96,
        vocab_size=640,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        max_position_embeddings=32768,
    ),
    ViTConfig(hidden_size=48, num_layers=2, num_heads=4, intermediate_size=88, patch_size=14, max_patches_per_side=10),
    VAEConfig(ch=32, ch_mult=(1, 2, 1, 1), num_res_blocks=1),
    max_latent_size=16,
    vae_transform=ResizeRule(128, 64, 16),
    vit_transform=ResizeRule(140, 56, 14),
)
"""A model so small that its time is almost entirely host overhead."""


@torch.inference_mode()
def random_model(config: BagelConfig, device: torch.device, dtype: torch.dtype) -> tuple[BagelModel, Tokenizer]:
    """A model with random weights, and the embedded model's tokenizer.

    The weights follow the distributions of ``bagel_rt.models.bagel.random_checkpoint``, which generates them on the CPU
    in minutes. Rows of ``lm_head`` are zero except for plain tokens, so special tokens are never the most likely and
    every text reaches its maximum length.
    """
    tokenizer = Tokenizer.from_folder(DEFAULT_MODEL)
    model = BagelModel.allocate(config, (tokenizer.start_of_image, tokenizer.end_of_image), device, dtype)
    generator = torch.Generator(device).manual_seed(0)
    for slots in model.weight_slots().values():
        for name, slot in slots.items():
            buffer = torch.empty(slot.shape, dtype=slot.view.dtype, device=device)
            normal = partial(buffer.normal_, generator=generator)
            slot.view.copy_(random_weight(name, slot.shape, normal))  # broadcasts a QK-norm weight to all heads
    plain = [token for token in range(len(tokenizer)) if (tokenizer.spell(token) or b"<")[:1] != b"<"]
    mask = torch.zeros(config.llm.vocab_size, 1, dtype=dtype, device=device)
    mask[plain] = 1
    model.weights.lm_head.mul_(mask)
    return model, tokenizer
