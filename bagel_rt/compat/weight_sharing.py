"""Models that share the memory of official modules' weights.

This runtime stores some parameters fused (query, key and value; gate and up; QK-norms) that the official modules keep
apart. :func:`build_shared_model` therefore moves their values into fused tensors, one tensor at a time, and turns the
official parameters into views of them. All other parameters are used where they are. Besides one fused tensor in the
making there is never a second copy, and the official module computes as before. Sharing a module again reuses the same
tensors; :func:`restore_weights` moves the values back.
"""

import warnings
from collections import defaultdict
from dataclasses import replace
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import nn

from bagel_rt.checkpoint.read import WeightSlot
from bagel_rt.compat.convert import VISUAL_GEN_MODULES, has_visual_gen
from bagel_rt.models.bagel.autoencoder import AutoEncoder
from bagel_rt.models.bagel.config import BagelConfig, VAEConfig
from bagel_rt.models.bagel.model import BagelModel
from bagel_rt.models.bagel.weights import BagelWeights, map_weights
from bagel_rt.runtime.graphs import GraphCache

_LISTED = 3  # missing parameters named in one error

_ALIGNMENT = 16  # bytes; kernels load weights in vectors of this size

# Official module -> what shares its weights and is still in use.
_MODELS: WeakKeyDictionary[nn.Module, WeakSet[BagelModel]] = WeakKeyDictionary()
_AUTOENCODERS: WeakKeyDictionary[nn.Module, ref[AutoEncoder]] = WeakKeyDictionary()

# Official module -> the strides of the parameters that became views, before they did.
_STRIDES: WeakKeyDictionary[nn.Module, dict[str, tuple[int, ...]]] = WeakKeyDictionary()


def build_shared_model(
    official: nn.Module, vae: nn.Module | None, config: BagelConfig, markers: tuple[int, int] | None = None
) -> BagelModel:
    """A model over an official module's weights, whose parameters become views of the model's fused tensors.

    Args:
        official: all its parameters on one device, of one dtype. Weights that ``visual_gen=False`` leaves out are zero
            in the model.
        vae: the official autoencoder, see :func:`build_shared_autoencoder`. Without one, the model can neither encode
            nor decode images.
        config: the configuration of ``official``.
        markers: token ids of the start and end of an image; None to set them before the first image.

    Raises:
        ValueError: a parameter is missing, on another device, or of another shape or dtype; nothing was changed.
    """
    layout = BagelWeights.allocate(config, "meta", torch.float32)
    slots = layout.weight_slots(config)
    if not has_visual_gen(official):
        slots = {name: slot for name, slot in slots.items() if name.split(".")[0] not in VISUAL_GEN_MODULES}
    parameters = _tensors_of(official)
    device, dtype = _check_parameters(parameters, slots)
    parameters = {name: parameters[name] for name in slots}
    warn_about_float32(device, dtype)
    autoencoder = None if vae is None else build_shared_autoencoder(vae, config.vae, device)
    existing = _find_shared(official, config, parameters)
    if existing is None:
        # A module that is shared again, for example after it was moved, keeps the strides that it was loaded with.
        weights = _fuse(layout, parameters, slots, device, dtype, _STRIDES.setdefault(official, {}))
    else:
        weights = existing.weights
    model = BagelModel(config, weights, autoencoder, markers)
    if existing is not None:
        model.lock = existing.lock
    _MODELS.setdefault(official, WeakSet()).add(model)
    return model


def restore_weights(official: nn.Module) -> None:
    """Give a module memory of its own for the parameters that :func:`build_shared_model` made views.

    Each gets the strides that it had before. One tensor at a time; a fused tensor is freed with the last of its views,
    unless a model still uses it, which then no longer follows changes of the module.
    """
    parameters = _tensors_of(official)
    with torch.no_grad():
        for name, stride in _STRIDES.pop(official, {}).items():
            if name in parameters and parameters[name].ndim == len(stride):
                shared = parameters[name]
                own = torch.empty_strided(shared.shape, stride, dtype=shared.dtype, device=shared.device)
                shared.data = own.copy_(shared)


def _tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def warn_about_float32(device: torch.device, dtype: torch.dtype) -> None:
    """Warn about a float32 module on a GPU: the official evaluation scripts load one and rely on autocast."""
    if device.type == "cuda" and dtype == torch.float32:
        warnings.warn(
            "The module is float32 and will run in float32, because autocast has no effect here. Call "
            "model.to(torch.bfloat16) first to match the speed of the official scripts and to halve the memory.",
            stacklevel=4,
        )


def _find_shared(official: nn.Module, config: BagelConfig, parameters: dict[str, torch.Tensor]) -> BagelModel | None:
    """A model in use whose weights the module's parameters are still views of; not after e.g. ``official.to()``."""
    for model in list(_MODELS.get(official, ())):
        # Two models of a module may differ in what does not shape the module's own weights.
        free = {name: getattr(config, name) for name in ("vae_transform", "vit_transform", "max_latent_size")}
        if replace(model.config, **free) == config:
            slots = model.weights.weight_slots(config)
            if all(_is_view_of(parameter, slots[name]) for name, parameter in parameters.items()):
                return model
    return None


def _is_view_of(parameter: torch.Tensor, slot: WeightSlot) -> bool:
    view = _parameter_view(parameter, slot.view)
    return parameter.device == view.device and (parameter.data_ptr(), parameter.stride(), parameter.dtype) == (
        view.data_ptr(),
        view.stride(),
        view.dtype,
    )


def _parameter_view(parameter: torch.Tensor, view: torch.Tensor) -> torch.Tensor:
    """The part of a slot's view that an official parameter uses: all of it, but one row of a QK-norm weight, which is
    repeated for every head."""
    return view if parameter.shape == view.shape else view[0]


def _fuse(
    layout: BagelWeights,
    parameters: dict[str, torch.Tensor],
    slots: dict[str, WeightSlot],
    device: torch.device,
    dtype: torch.dtype,
    strides: dict[str, tuple[int, ...]],
) -> BagelWeights:
    """Copy parameters into fused weights and turn them into views of these.

    A parameter that is a weight of its own, with the layout that the kernels need, becomes that weight as it is.

    Args:
        layout: the fused weights as meta tensors; the views of ``slots`` are views of these.
        strides: gets the strides of the parameters that become views.
    """
    # The parameters that each fused tensor is made of, by the identity of its meta tensor.
    parts: defaultdict[int, list[tuple[str, torch.Tensor]]] = defaultdict(list)
    for name, slot in slots.items():
        fused = slot.view if slot.view._base is None else slot.view._base
        parts[id(fused)].append((name, slot.view))

    # One fused tensor at a time: once its parameters point into it, their old storage is free for the next one.
    def fuse(_: str, meta: torch.Tensor) -> torch.Tensor:
        names = parts[id(meta)]
        if not names:  # left out by visual_gen=False
            return torch.zeros(meta.shape, dtype=dtype, device=device)
        if len(names) == 1:
            weight = parameters[names[0][0]].detach()
            if weight.shape == meta.shape and weight.is_contiguous() and weight.data_ptr() % _ALIGNMENT == 0:
                return weight
        fused = torch.empty(meta.shape, dtype=dtype, device=device)
        for name, meta_view in names:
            parameter = parameters[name]
            view = fused.as_strided(meta_view.shape, meta_view.stride(), meta_view.storage_offset())
            view.copy_(parameter)
            strides.setdefault(name, parameter.stride())
            parameter.data = _parameter_view(parameter, view)
        return fused

    with torch.no_grad():
        return map_weights(layout, fuse)


def _check_parameters(
    parameters: dict[str, torch.Tensor], slots: dict[str, WeightSlot]
) -> tuple[torch.device, torch.dtype]:
    """The device and dtype of all parameters; ValueError if one is missing or differs from ``slots`` or the others."""
    missing = [name for name in slots if name not in parameters]
    if missing:
        more = f" and {len(missing) - _LISTED} more" if len(missing) > _LISTED else ""
        raise ValueError(
            f"model must have all parameters of the official Bagel module, got none named "
            f"{', '.join(missing[:_LISTED])}{more}. Load it with the official code."
        )
    embed_tokens = parameters["language_model.model.embed_tokens.weight"]
    device, dtype = embed_tokens.device, embed_tokens.dtype
    for name, slot in slots.items():
        parameter = parameters[name]
        if parameter.device != device or parameter.is_meta:
            raise ValueError(
                f"{name} must be on the device of embed_tokens, {device}, got {parameter.device}. Load the whole "
                "module onto one device, without offloading."
            )
        if parameter.dtype != dtype or tuple(parameter.shape) != slot.shape:
            raise ValueError(
                f"{name} must be {dtype} {list(slot.shape)}, got {parameter.dtype} {list(parameter.shape)}. Load the "
                "module unquantized, in one dtype."
            )
    return device, dtype


def build_shared_autoencoder(official: nn.Module, config: VAEConfig, device: torch.device) -> AutoEncoder:
    """The autoencoder with an official one's parameters, on ``device``, in float32.

    Parameters that already are float32 and on the device are shared as they are. Their strides must not change: the
    noise that the official encoder draws depends on them, through ``randn_like``. Convolutions of channels-last feature
    maps copy a contiguous weight to channels-last in passing, which takes about 0.1 ms per image on a GPU. Other
    parameters are copied to channels-last. One copy serves all models that use the autoencoder, and is refreshed by
    every call.

    Raises:
        ValueError: the parameters have other names or shapes; nothing was changed.
    """
    parameters = dict(official.named_parameters())
    values = {name: parameter.detach().to(device, torch.float32) for name, parameter in parameters.items()}
    shared = {name for name, value in values.items() if value.data_ptr() == parameters[name].data_ptr()}
    existing = _AUTOENCODERS.get(official, lambda: None)()
    if existing is not None and _has_parameters_like(existing, config, values, shared):
        with torch.no_grad():
            for name in values.keys() - shared:
                existing.get_parameter(name).copy_(values[name])
        return existing
    with torch.device("meta"):
        autoencoder = AutoEncoder(config)
    for name, value in values.items():
        if value.ndim == 4 and name not in shared:
            values[name] = value.contiguous(memory_format=torch.channels_last)
    try:
        autoencoder.load_state_dict(values, assign=True)
    except RuntimeError as error:
        raise ValueError(f"vae_model must be the FLUX autoencoder of config.vae_config: {error}") from None
    _AUTOENCODERS[official] = ref(autoencoder)
    return autoencoder.requires_grad_(False)


def _has_parameters_like(
    autoencoder: AutoEncoder, config: VAEConfig, values: dict[str, torch.Tensor], shared: set[str]
) -> bool:
    """Whether the autoencoder has parameters of these names, shapes and devices, and shares those that it should."""
    parameters = dict(autoencoder.named_parameters())
    return (
        autoencoder.config == config
        and parameters.keys() == values.keys()
        and all(
            (parameters[name].shape, parameters[name].device) == (value.shape, value.device)
            for name, value in values.items()
        )
        and all(parameters[name].data_ptr() == values[name].data_ptr() for name in shared)
    )


class WeightSync:
    """Keeps values derived from shared weights up to date, because the owner of the official module may change weights
    in place (``load_state_dict``, merging a LoRA)."""

    def __init__(self, model: BagelModel, graphs: GraphCache):
        """
        Args:
            model: the model whose weights may change.
            graphs: cleared when its static buffers hold outdated values.
        """
        self.model, self.graphs = model, graphs
        self._last_values: list[torch.Tensor] = []

    def sync(self) -> None:
        """Update derived values. Cheap: a few row copies per layer and three comparisons."""
        weights, heads = self.model.weights, self.model.config.llm.num_heads
        for layer in weights.layers:
            # One row per head; only the first query row and the first key row are official parameters.
            for norm in layer.qk_norm:
                for rows in (norm[:heads], norm[heads:]):
                    rows[1:] = rows[:1]
        # Static buffers keep these from one denoising to the next; all other weights are read by every step.
        values = [weights.vae2llm.bias, weights.latent_positions]
        if self.model.markers is not None:
            values.append(self.model.embed_markers())
        # map() stops at the shorter list: markers that became known only now have no last value to differ from.
        if not all(map(torch.equal, self._last_values, values)):
            self.graphs.clear()
            self._last_values = []
        self._last_values += [value.clone() for value in values[len(self._last_values) :]]
