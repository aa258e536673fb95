"""Official objects as this runtime has them: configuration, tokenizer, and weights in the same memory.

The runtime fuses parameters that the official modules keep apart. So a module's values move into fused tensors, one of
these at a time, and its parameters become views of them: there is one copy before, during (but for one tensor) and
after, and the module computes as before.
"""

from collections import defaultdict

import tokenizers
import torch
from tokenizers import models
from torch import nn

from bagel_rt.checkpoint import Destination
from bagel_rt.config import BagelConfig, TransformerConfig, VAEConfig, ViTConfig
from bagel_rt.images import ResizeRule
from bagel_rt.models.bagel.model import BagelModel
from bagel_rt.models.bagel.vae import AutoEncoder
from bagel_rt.models.bagel.weights import BagelWeights, map_weights
from bagel_rt.tokenizer import Tokenizer, qwen2_backend

_PARTS = ("language_model", "vit_model", "connector", "vae2llm", "llm2vae", "time_embedder")
_SHOWN = 3  # names of a list of wrong parameters


def adopt_config(official: nn.Module, vae_transform=None, vit_transform=None) -> BagelConfig:
    """The configuration of an official ``Bagel`` module.

    Args:
        official: with ``config.llm_config``, ``config.vit_config`` and ``config.vae_config``.
        vae_transform, vit_transform: official ``ImageTransform``; None for the published resize rules.

    Raises:
        TypeError: it is no such module.
        ValueError: it computes something else than this runtime does, or a number is out of range.
    """
    missing = [name for name in (*_PARTS, "config") if not hasattr(official, name)]
    if missing:
        raise TypeError(
            f"a {type(official).__name__} is no official Bagel module: it lacks {', '.join(missing)}. Give the module "
            "that the official repository loads"
        )
    config, llm, vit = official.config, official.config.llm_config, official.config.vit_config
    if getattr(llm, "layer_module", "Qwen2MoTDecoderLayer") != "Qwen2MoTDecoderLayer":
        raise ValueError(f"llm_config.layer_module is {llm.layer_module!r}; allowed: 'Qwen2MoTDecoderLayer'")
    if not getattr(llm, "qk_norm", True):
        raise ValueError("llm_config.qk_norm is False; allowed: True, as in the published model")
    rules = {
        f"{name}_transform": _rule(transform)
        for name, transform in (("vae", vae_transform), ("vit", vit_transform))
        if transform is not None
    }
    return BagelConfig(
        llm=TransformerConfig(
            hidden_size=llm.hidden_size,
            num_layers=llm.num_hidden_layers,
            num_heads=llm.num_attention_heads,
            num_kv_heads=llm.num_key_value_heads,
            head_dim=llm.hidden_size // llm.num_attention_heads,
            intermediate_size=llm.intermediate_size,
            vocab_size=llm.vocab_size,
            rope_theta=llm.rope_theta,
            rms_norm_eps=llm.rms_norm_eps,
            max_position_embeddings=llm.max_position_embeddings,
        ),
        vit=ViTConfig(
            hidden_size=vit.hidden_size,
            num_layers=vit.num_hidden_layers,
            num_heads=vit.num_attention_heads,
            intermediate_size=vit.intermediate_size,
            patch_size=vit.patch_size,
            layer_norm_eps=vit.layer_norm_eps,
            max_patches_per_side=config.vit_max_num_patch_per_side,
        ),
        vae=_vae_config(config.vae_config),
        latent_patch_size=config.latent_patch_size,
        max_latent_size=config.max_latent_size,
        interpolate_pos=config.interpolate_pos,
        **rules,
    )


def _vae_config(params) -> VAEConfig:
    return VAEConfig(
        ch=params.ch,
        ch_mult=tuple(params.ch_mult),
        num_res_blocks=params.num_res_blocks,
        z_channels=params.z_channels,
        scale_factor=params.scale_factor,
        shift_factor=params.shift_factor,
    )


def _rule(transform) -> ResizeRule:
    """The resize rule of an official ``ImageTransform``."""
    rule = getattr(transform, "resize_transform", None)
    names = ("max_size", "min_size", "stride", "max_pixels")
    if not all(hasattr(rule, name) for name in names):
        raise TypeError(f"a {type(transform).__name__} is no official ImageTransform: it has no resize_transform")
    return ResizeRule(*(getattr(rule, name) for name in names))


def adopt_tokenizer(official, ids: dict[str, int]) -> Tokenizer:
    """The tokenizer of the official scripts, and the ids of its markers.

    Args:
        official: a Hugging Face Qwen2 tokenizer, fast or slow, with the official special tokens added.
        ids: the official ``new_token_ids``.

    Raises:
        TypeError: another kind of tokenizer.
        ValueError: the ids are not those that this tokenizer gives its markers.
    """
    if hasattr(official, "backend_tokenizer"):
        backend = tokenizers.Tokenizer.from_str(official.backend_tokenizer.to_str())  # truncation is switched off
    elif hasattr(official, "bpe_ranks"):
        merges = sorted(official.bpe_ranks, key=official.bpe_ranks.get)
        backend = qwen2_backend(models.BPE(vocab=dict(official.encoder), merges=merges))
        for token in sorted(official.added_tokens_decoder):
            added = official.added_tokens_decoder[token]
            backend.add_tokens([tokenizers.AddedToken(str(added), special=True, normalized=False)])
    else:
        raise TypeError(f"a {type(official).__name__} is no Qwen2 tokenizer; give the one that the scripts load")
    tokenizer = Tokenizer(backend, "the given tokenizer")
    known = {
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.eos,
        "start_of_image": tokenizer.start_of_image,
        "end_of_image": tokenizer.end_of_image,
    }
    wrong = {name: ids.get(name) for name in known if ids.get(name) != known[name]}
    if wrong:
        raise ValueError(
            f"new_token_ids has {wrong}, the tokenizer {known}: give what add_special_tokens returned for it"
        )
    return tokenizer


def adopt_model(
    official: nn.Module, vae: nn.Module | None, config: BagelConfig, markers: tuple[int, int] | None = None
) -> BagelModel:
    """A model of an official module's weights; the module's parameters become views of them.

    Args:
        official: all its parameters on one device, of one dtype.
        vae: the official autoencoder; its float32 parameters are shared, others converted. Without one, the model's is
            None, and it can neither encode nor decode pictures.
        config: of the module.
        markers: token ids of the start and end of an image; None to set them before the first image.

    Raises:
        ValueError: a parameter is missing, elsewhere, or of another shape or dtype; nothing was changed.
    """
    like = official.language_model.model.embed_tokens.weight
    layout = BagelWeights.allocate(config, "meta", like.dtype)
    named = dict(official.named_parameters()) | dict(official.named_buffers())
    _check(named, layout.destinations(config), like)
    autoencoder = None if vae is None else adopt_autoencoder(vae, config.vae)
    parts = defaultdict(list)
    for name, place in layout.destinations(config).items():
        whole = place.view if place.view._base is None else place.view._base
        parts[id(whole)].append((named[name], place))

    def fused(_, shape: torch.Tensor) -> torch.Tensor:
        whole = torch.empty(shape.shape, dtype=like.dtype, device=like.device)
        for parameter, place in parts[id(shape)]:
            _move(parameter, place, whole)
        return whole

    with torch.no_grad():
        weights = map_weights(layout, fused)
    return BagelModel(config, weights, autoencoder, markers)


def _move(parameter: torch.Tensor, place: Destination, whole: torch.Tensor) -> None:
    """Copy a parameter to its place in a fused tensor, and make it a view of that."""
    meta = place.view
    view = whole.as_strided(meta.shape, meta.stride(), meta.storage_offset())
    view.copy_(parameter)
    parameter.data = view if parameter.shape == view.shape else view[0]  # of QK-norm, which has a row for each head


def _check(named: dict[str, torch.Tensor], places: dict[str, Destination], like: torch.Tensor) -> None:
    missing = [name for name in places if name not in named]
    if missing:
        raise ValueError(f"the module lacks {_listed(missing)}: give the official Bagel with both vision parts")
    for name, place in places.items():
        tensor = named[name]
        if tensor.device != like.device or tensor.device.type == "meta":
            raise ValueError(
                f"{name} is on {tensor.device}, embed_tokens on {like.device}: load the whole module onto one device, "
                "without offloading"
            )
        if tensor.dtype != like.dtype or tuple(tensor.shape) != place.shape:
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}, must be {like.dtype} {list(place.shape)}: load the "
                "module unquantised, in one dtype"
            )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def adopt_autoencoder(official: nn.Module, config: VAEConfig) -> AutoEncoder:
    """The autoencoder with an official one's parameters, float32 and channels-last.

    Parameters that are float32 are shared, laid out anew; those of another dtype are converted, and stay as they are.

    Raises:
        ValueError: they have other names or shapes; nothing was changed.
    """
    with torch.device("meta"):
        autoencoder = AutoEncoder(config)
    named = dict(official.named_parameters())
    values = {
        name: value.contiguous(memory_format=torch.channels_last) if value.ndim == 4 else value
        for name, value in ((name, parameter.detach().float()) for name, parameter in named.items())
    }
    try:
        autoencoder.load_state_dict(values, assign=True)
    except RuntimeError as error:
        raise ValueError(f"vae_model is no FLUX autoencoder of this shape: {error}") from None
    for name, parameter in named.items():
        if parameter.dtype == torch.float32:
            parameter.data = values[name]
    return autoencoder.requires_grad_(False)
