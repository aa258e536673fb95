"""Official objects as this runtime has them: configuration, tokenizer, and weights in the same memory.

The runtime fuses parameters that the official modules keep apart. So a module's values move into fused tensors, one of
these at a time, and its parameters become views of them: there is one copy before, during (but for one tensor) and
after, and the module computes as before. Whoever adopts the module again gets the same tensors.
"""

import warnings
from collections import defaultdict
from dataclasses import replace
from weakref import WeakKeyDictionary, WeakSet, ref

import tokenizers
import torch
from tokenizers import models
from torch import nn

from bagel_rt.checkpoint.read import WeightSlot
from bagel_rt.compat.exclusive import share_lock
from bagel_rt.models.bagel.autoencoder import AutoEncoder
from bagel_rt.models.bagel.config import BagelConfig, TransformerConfig, VAEConfig, ViTConfig
from bagel_rt.models.bagel.images import ResizeRule
from bagel_rt.models.bagel.model import BagelModel
from bagel_rt.models.bagel.tokenizer import Tokenizer, qwen2_backend
from bagel_rt.models.bagel.weights import BagelWeights, map_weights

_PARTS = ("config", "language_model", "vit_model", "connector", "vit_pos_embed")
_GENERATION = ("vae2llm", "llm2vae", "time_embedder", "latent_pos_embed")  # absent with visual_gen=False
_SHOWN = 3  # names of a list of wrong parameters

# What was made of official modules, and is in use still.
_MODELS: WeakKeyDictionary[nn.Module, WeakSet[BagelModel]] = WeakKeyDictionary()
_AUTOENCODERS: WeakKeyDictionary[nn.Module, ref[AutoEncoder]] = WeakKeyDictionary()


def generates(official: nn.Module) -> bool:
    """Whether the module can draw: the official evaluation of understanding loads it without these parts."""
    return bool(getattr(getattr(official, "config", None), "visual_gen", True))


def adopt_config(official: nn.Module, vae_transform=None, vit_transform=None) -> BagelConfig:
    """The configuration of an official ``Bagel`` module.

    Args:
        official: with ``config.llm_config``, ``config.vit_config`` and, if it generates, ``config.vae_config``.
        vae_transform, vit_transform: official ``ImageTransform``; None for the published resize rules, in steps of the
            module's own patches.

    Raises:
        TypeError: it is no such module.
        ValueError: it computes something else than this runtime does, or a number is out of range.
    """
    if not getattr(getattr(official, "config", None), "visual_und", True):
        raise ValueError("the module was loaded with visual_und=False; load it with visual_und=True")
    parts = _PARTS + _GENERATION if generates(official) else _PARTS
    missing = [name for name in parts if not hasattr(official, name)]
    if missing:
        raise TypeError(
            f"a {type(official).__name__} is no official Bagel module: it lacks {', '.join(missing)}. Give the module "
            "that the official repository loads"
        )
    config, llm, vit = official.config, official.config.llm_config, official.config.vit_config
    _check_computation(config, llm, vit)
    vae = _vae_config(config.vae_config) if generates(official) else VAEConfig()
    units = {"vae": vae.downsample * config.latent_patch_size, "vit": vit.patch_size}
    rules = {}
    for name, transform in (("vae", vae_transform), ("vit", vit_transform)):
        published = getattr(BagelConfig, f"{name}_transform")
        rules[f"{name}_transform"] = _in_steps(published, units[name]) if transform is None else _rule(transform)
    latent_side = config.max_latent_size
    if not generates(official):  # there is no table that would bound pictures; the rule alone does
        latent_side = max(latent_side, rules["vae_transform"].max_size // units["vae"])
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
        vae=vae,
        latent_patch_size=config.latent_patch_size,
        max_latent_size=latent_side,
        interpolate_pos=config.interpolate_pos,
        **rules,
    )


def _check_computation(config, llm, vit) -> None:
    """ValueError if the module computes something else than the published one."""
    for name, holder, key, allowed in (
        ("llm_config", llm, "layer_module", "Qwen2MoTDecoderLayer"),
        ("llm_config", llm, "qk_norm", True),
        ("llm_config", llm, "hidden_act", "silu"),
        ("vit_config", vit, "hidden_act", "gelu_pytorch_tanh"),
        ("vit_config", vit, "rope", False),
        ("config", config, "connector_act", "gelu_pytorch_tanh"),
    ):
        found = getattr(holder, key, allowed)
        if found != allowed:
            raise ValueError(f"{name}.{key} is {found!r}; allowed: {allowed!r}, as in the published model")
    scaling = getattr(llm, "rope_scaling", None)
    if scaling is not None and scaling.get("rope_type", scaling.get("type")) != "default":
        raise ValueError(f"llm_config.rope_scaling is {scaling!r}; allowed: None, as in the published model")


def _in_steps(rule: ResizeRule, unit: int) -> ResizeRule:
    """A resize rule with sides in multiples of ``unit``."""
    largest, smallest = (max(1, side // unit) * unit for side in (rule.max_size, rule.min_size))
    return ResizeRule(largest, smallest, unit)


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

    Where they are views already, because the module was adopted before and that model is in use, the weights are the
    same tensors again. What a module of ``visual_gen=False`` lacks is zero.

    Args:
        official: all its parameters on one device, of one dtype.
        vae: the official autoencoder; see :func:`adopt_autoencoder`. Without one, the model's is None, and it can
            neither encode nor decode pictures.
        config: of the module.
        markers: token ids of the start and end of an image; None to set them before the first image.

    Raises:
        ValueError: a parameter is missing, elsewhere, or of another shape or dtype; nothing was changed.
    """
    like = official.language_model.model.embed_tokens.weight
    layout = BagelWeights.allocate(config, "meta", like.dtype)
    places = layout.weight_slots(config)
    if not generates(official):
        places = {name: place for name, place in places.items() if name.split(".")[0] not in _GENERATION}
    named = dict(official.named_parameters()) | dict(official.named_buffers())
    _check(named, places, like)
    warn_of_float32(like.device, like.dtype)
    autoencoder = None if vae is None else adopt_autoencoder(vae, config.vae, like.device)
    known = _known(official, config, {name: named[name] for name in places})
    weights = _fuse(layout, named, places, like) if known is None else known.weights
    model = BagelModel(config, weights, autoencoder, markers)
    if known is not None:
        share_lock(model, known)
    _MODELS.setdefault(official, WeakSet()).add(model)
    return model


def warn_of_float32(device: torch.device, dtype: torch.dtype) -> None:
    """Tell whoever relies on autocast, as the official evaluation scripts do, that it plays no part here."""
    if device.type == "cuda" and dtype == torch.float32:
        warnings.warn(
            "the module is float32, and so will be its inference: autocast is not followed. Call "
            "model.to(torch.bfloat16) first for the official scripts' speed, and half the memory",
            stacklevel=4,
        )


def _known(official: nn.Module, config: BagelConfig, named: dict[str, torch.Tensor]) -> BagelModel | None:
    """A model that was made of the module before, if its parameters are views of that model's weights still."""
    for model in list(_MODELS.get(official, ())):
        free = {name: getattr(config, name) for name in ("vae_transform", "vit_transform", "max_latent_size")}
        if replace(model.config, **free) == config:  # of what differs, weights that are there do not depend
            places = model.weights.weight_slots(config)
            if all(_lies_in(parameter, places[name]) for name, parameter in named.items()):
                return model
    return None


def _lies_in(parameter: torch.Tensor, place: WeightSlot) -> bool:
    view = _part_of(parameter, place.view)
    return parameter.device == view.device and (parameter.data_ptr(), parameter.stride(), parameter.dtype) == (
        view.data_ptr(),
        view.stride(),
        view.dtype,
    )


def _part_of(parameter: torch.Tensor, view: torch.Tensor) -> torch.Tensor:
    """What of a place a parameter is a view of: all, but of QK-norm, which has a row for each head, the first row."""
    return view if parameter.shape == view.shape else view[0]


def _fuse(layout: BagelWeights, named: dict, places: dict[str, WeightSlot], like: torch.Tensor) -> BagelWeights:
    """The weights of a layout, made of a module's parameters, which become views of them."""
    parts = defaultdict(list)
    for name, place in places.items():
        whole = place.view if place.view._base is None else place.view._base
        parts[id(whole)].append((named[name], place))

    def fused(_, shape: torch.Tensor) -> torch.Tensor:
        make = torch.empty if parts[id(shape)] else torch.zeros
        whole = make(shape.shape, dtype=like.dtype, device=like.device)
        for parameter, place in parts[id(shape)]:
            meta = place.view
            view = whole.as_strided(meta.shape, meta.stride(), meta.storage_offset())
            view.copy_(parameter)
            parameter.data = _part_of(parameter, view)
        return whole

    with torch.no_grad():
        return map_weights(layout, fused)


def _check(named: dict[str, torch.Tensor], places: dict[str, WeightSlot], like: torch.Tensor) -> None:
    missing = [name for name in places if name not in named]
    if missing:
        raise ValueError(f"the module lacks {_listed(missing)}: give the official Bagel as its scripts load it")
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


def adopt_autoencoder(official: nn.Module, config: VAEConfig, device: torch.device) -> AutoEncoder:
    """The autoencoder with an official one's parameters, on a device, float32 and channels-last.

    Parameters that are float32 and on the device are shared, laid out anew. Others are copied and stay as they are; one
    copy serves all who adopt the autoencoder, and takes its values again each time.

    Raises:
        ValueError: they have other names or shapes; nothing was changed.
    """
    named = dict(official.named_parameters())
    with torch.no_grad():
        values = {name: parameter.detach().to(device, torch.float32) for name, parameter in named.items()}
        known = _AUTOENCODERS.get(official, lambda: None)()
        if known is not None and _fits(known, config, values):
            for name, value in values.items():
                known.get_parameter(name).copy_(value)
            return known
    with torch.device("meta"):
        autoencoder = AutoEncoder(config)
    for name, value in values.items():
        if value.ndim == 4:
            values[name] = value.contiguous(memory_format=torch.channels_last)
    try:
        autoencoder.load_state_dict(values, assign=True)
    except RuntimeError as error:
        raise ValueError(f"vae_model is no FLUX autoencoder of this shape: {error}") from None
    for name, parameter in named.items():
        if parameter.dtype == torch.float32 and parameter.device == device:
            parameter.data = values[name]
    _AUTOENCODERS[official] = ref(autoencoder)
    return autoencoder.requires_grad_(False)


def _fits(autoencoder: AutoEncoder, config: VAEConfig, values: dict[str, torch.Tensor]) -> bool:
    """Whether the autoencoder has these parameters, but for their values."""
    found = dict(autoencoder.named_parameters())
    return (
        autoencoder.config == config
        and found.keys() == values.keys()
        and all(
            (found[name].shape, found[name].device) == (value.shape, value.device) for name, value in values.items()
        )
    )
