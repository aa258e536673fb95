"""Models of random weights made on their device, in seconds: for shapes whose published weights are not at hand."""

import math

import torch

from bagel_rt.checkpoint import DEFAULT_MODEL
from bagel_rt.models.bagel.config import BagelConfig, TransformerConfig, VAEConfig, ViTConfig
from bagel_rt.models.bagel.embed import sincos_table
from bagel_rt.models.bagel.images import ResizeRule
from bagel_rt.models.bagel.model import BagelModel
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
"""A model whose arithmetic costs next to nothing: what its runs take is the host's work."""


@torch.inference_mode()
def random_model(config: BagelConfig, device: torch.device, dtype: torch.dtype) -> tuple[BagelModel, Tokenizer]:
    """Weights drawn on the device, and the embedded model's tokenizer, all of whose plain tokens the model can write.

    Deviations are those of ``bagel_rt.models.bagel.random_checkpoint``, which draws on the CPU and takes minutes. No
    text ends before its length: special tokens have logits of zero.
    """
    tokenizer = Tokenizer.from_folder(DEFAULT_MODEL)
    model = BagelModel.allocate(config, (tokenizer.start_of_image, tokenizer.end_of_image), device, dtype)
    generator = torch.Generator(device).manual_seed(0)
    for places in model.destinations().values():
        for name, place in places.items():
            drawn = torch.empty(place.shape, dtype=place.view.dtype, device=device)
            if name.endswith("pos_embed"):
                drawn.copy_(sincos_table(place.shape[1], math.isqrt(place.shape[0])))
            elif name.endswith(".bias"):
                drawn.normal_(0, 0.02, generator=generator)
            elif len(place.shape) == 1:
                drawn.normal_(1, 0.1, generator=generator)
            else:
                drawn.normal_(0, math.prod(place.shape[1:]) ** -0.5, generator=generator)
            place.view.copy_(drawn)  # a weight of QK-norm goes to every head
    plain = [token for token in range(len(tokenizer)) if (tokenizer.spell(token) or b"<")[:1] != b"<"]
    kept = torch.zeros(config.llm.vocab_size, 1, dtype=dtype, device=device)
    kept[plain] = 1
    model.weights.lm_head.mul_(kept)
    return model, tokenizer
