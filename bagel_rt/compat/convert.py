"""Convert the configuration and the tokenizer of the official code."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

import tokenizers
from tokenizers import models
from torch import nn

from bagel_rt.models.bagel.config import BagelConfig, TransformerConfig, VAEConfig, ViTConfig
from bagel_rt.models.bagel.images import ResizeRule
from bagel_rt.models.bagel.tokenizer import Tokenizer
from bagel_rt.models.bagel.tokenizer_files import qwen2_backend
from bagel_rt.validation import invalid

VISUAL_GEN_MODULES = ("vae2llm", "llm2vae", "time_embedder", "latent_pos_embed")  # absent with visual_gen=False
T = TypeVar("T")
_REQUIRED = ("config", "language_model", "vit_model", "connector", "vit_pos_embed")


def has_visual_gen(official: nn.Module) -> bool:
    """Whether the module can generate images; the official understanding evaluation loads it with visual_gen=False."""
    return bool(getattr(getattr(official, "config", None), "visual_gen", True))


def convert_config(official: nn.Module, vae_transform: object = None, vit_transform: object = None) -> BagelConfig:
    """Convert the configuration of an official ``Bagel`` module.

    Args:
        official: has ``config.llm_config``, ``config.vit_config`` and, with ``visual_gen``, ``config.vae_config``.
        vae_transform, vit_transform: official ``ImageTransform``; None for the published resize rules, with the
            module's patch sizes as strides and sizes rounded down to multiples of them.

    Raises:
        TypeError: not an official ``Bagel`` module or ``ImageTransform``.
        ValueError: the architecture is not supported, or a value is out of range.
    """
    visual_gen = has_visual_gen(official)
    if not getattr(getattr(official, "config", None), "visual_und", True):
        raise invalid("visual_und", False, "True", "Load the module with visual_und=True")
    required = _REQUIRED + VISUAL_GEN_MODULES if visual_gen else _REQUIRED
    missing = [name for name in required if not hasattr(official, name)]
    if missing:
        raise TypeError(
            f"model must be an official Bagel module, got {type(official).__name__} without {', '.join(missing)}. Pass "
            "the module that the official repository loads."
        )
    config: Any = official.config
    llm, vit = config.llm_config, config.vit_config
    _check_architecture(config, llm, vit)
    vae = _convert(VAEConfig, config.vae_config) if visual_gen else VAEConfig()
    latent_stride = vae.downsample * config.latent_patch_size
    vae_rule = _convert_transform("vae_transform", vae_transform, latent_stride)
    max_latent_size = config.max_latent_size
    if not visual_gen:
        # Without a latent position table, only the resize rule limits the image size.
        max_latent_size = max(max_latent_size, vae_rule.max_size // latent_stride)
    return BagelConfig(
        llm=_convert(TransformerConfig, llm, head_dim=llm.hidden_size // llm.num_attention_heads),
        vit=_convert(ViTConfig, vit, max_patches_per_side=config.vit_max_num_patch_per_side),
        vae=vae,
        latent_patch_size=config.latent_patch_size,
        max_latent_size=max_latent_size,
        vae_transform=vae_rule,
        vit_transform=_convert_transform("vit_transform", vit_transform, vit.patch_size),
        interpolate_pos=config.interpolate_pos,
    )


def _convert(kind: type[T], source: object, **values: Any) -> T:
    """A config dataclass from an official config object, whose attributes have the names of the JSON keys."""
    for item in fields(kind):  # type: ignore[arg-type]  # typeshed has no bound for the class of a dataclass
        if item.name not in values:
            value = getattr(source, item.metadata.get("key", item.name))
            values[item.name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


def _check_architecture(config: object, llm: object, vit: object) -> None:
    """Raise ValueError unless the module computes what the published model computes."""
    remedy = "Only the published architecture is supported"
    for name, source, key, allowed in (
        ("llm_config", llm, "layer_module", "Qwen2MoTDecoderLayer"),
        ("llm_config", llm, "qk_norm", True),
        ("llm_config", llm, "hidden_act", "silu"),
        ("vit_config", vit, "hidden_act", "gelu_pytorch_tanh"),
        ("vit_config", vit, "rope", False),
        ("config", config, "connector_act", "gelu_pytorch_tanh"),
    ):
        value = getattr(source, key, allowed)
        if value != allowed:
            raise invalid(f"{name}.{key}", value, repr(allowed), remedy)
    scaling = getattr(llm, "rope_scaling", None)
    if scaling is not None and scaling.get("rope_type", scaling.get("type")) != "default":
        raise invalid("llm_config.rope_scaling", scaling, "None", remedy)


def _convert_transform(name: str, transform: object, unit: int) -> ResizeRule:
    """Resize rule of an official ``ImageTransform``; for None, the published one in multiples of ``unit`` pixels."""
    if transform is None:
        published = getattr(BagelConfig, name)
        max_size, min_size = (max(1, side // unit) * unit for side in (published.max_size, published.min_size))
        return ResizeRule(max_size, min_size, unit)
    resize = getattr(transform, "resize_transform", None)
    names = [item.name for item in fields(ResizeRule)]
    if not all(hasattr(resize, name) for name in names):
        raise TypeError(
            f"{name} must be an official ImageTransform, got {type(transform).__name__}. Pass the transform of the "
            "official scripts."
        )
    return ResizeRule(*(getattr(resize, name) for name in names))


def convert_tokenizer(official: Any, new_token_ids: Mapping[str, int]) -> Tokenizer:
    """Convert the tokenizer of the official scripts.

    Args:
        official: a Hugging Face Qwen2 tokenizer, fast or slow, with the official special tokens added.
        new_token_ids: token ids of the markers, as ``add_special_tokens`` returns them.

    Raises:
        TypeError: not a Qwen2 tokenizer.
        ValueError: the ids are not those of the tokenizer.
    """
    if hasattr(official, "backend_tokenizer"):
        # A copy, because Tokenizer disables truncation and padding.
        backend = tokenizers.Tokenizer.from_str(official.backend_tokenizer.to_str())
    elif hasattr(official, "bpe_ranks"):
        merges = sorted(official.bpe_ranks, key=official.bpe_ranks.get)
        backend = qwen2_backend(models.BPE(vocab=dict(official.encoder), merges=merges))
        for token in sorted(official.added_tokens_decoder):
            added = official.added_tokens_decoder[token]
            backend.add_tokens([tokenizers.AddedToken(str(added), special=True, normalized=False)])
    else:
        raise TypeError(
            f"tokenizer must be a Hugging Face Qwen2 tokenizer, got {type(official).__name__}. Pass the one that the "
            "official scripts load."
        )
    tokenizer = Tokenizer(backend, "tokenizer")
    expected = {
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.eos,
        "start_of_image": tokenizer.start_of_image,
        "end_of_image": tokenizer.end_of_image,
    }
    wrong = {name: new_token_ids.get(name) for name in expected if new_token_ids.get(name) != expected[name]}
    if wrong:
        raise ValueError(
            f"new_token_ids must be {expected}, the tokenizer's ids, got {wrong}. Pass what add_special_tokens "
            "returned for this tokenizer."
        )
    return tokenizer
