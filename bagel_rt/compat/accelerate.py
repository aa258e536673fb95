"""Accelerate official modules: replace their inference methods, keep their weights."""

from collections.abc import Callable

import torch
from torch import nn

from bagel_rt.compat.convert import convert_config, has_visual_gen
from bagel_rt.compat.entry_points import EntryPoints
from bagel_rt.compat.exclusive import exclusive
from bagel_rt.compat.noise import draw_posterior_noise, noise_dtype
from bagel_rt.compat.weight_sharing import build_shared_model, restore_weights
from bagel_rt.models.bagel.autoencoder import AutoEncoder
from bagel_rt.models.bagel.model import BagelModel

ENTRY_POINTS = (
    "forward_cache_update_text",
    "forward_cache_update_vit",
    "forward_cache_update_vae",
    "generate_image",
    "generate_text",
    "chat",
)
_MARKER = "_bagel_rt_acceleration"  # attribute of an accelerated module
_Method = Callable[..., object]


class Acceleration:
    """An official module with replaced entry points; :meth:`restore` puts the official ones back.

    Attributes:
        entry_points: the replacements; None after :meth:`restore`.
    """

    def __init__(self, model: nn.Module, vae_model: nn.Module | None = None):
        """Arguments as for :func:`accelerate`."""
        if _MARKER in vars(model):
            raise ValueError("model must not be accelerated already. Call restore() on its Acceleration first.")
        shared = build_shared_model(model, vae_model, convert_config(model))
        self.entry_points: EntryPoints | None = EntryPoints(shared, visual_gen=has_visual_gen(model))
        replacements: dict[nn.Module, dict[str, _Method]]
        replacements = {model: {name: getattr(self.entry_points, name) for name in ENTRY_POINTS}}
        if vae_model is not None and shared.vae is not None:
            encode, decode = _vae_encode(shared, shared.vae, vae_model), _vae_decode(shared, shared.vae)
            replacements[vae_model] = {"encode": encode, "decode": decode}
        self._model: nn.Module | None = model
        self._originals = {
            module: {name: vars(module).get(name) for name in methods} for module, methods in replacements.items()
        }
        for module, methods in replacements.items():
            vars(module).update(methods)
        vars(model)[_MARKER] = self

    def restore(self) -> None:
        """Put the official entry points back, and give the module its weights back.

        Every parameter gets memory of its own, with the strides it had before and its present values. The KV cache and
        the CUDA graphs are freed when the last of their contexts is. An inferencer on the same module no longer follows
        changes of the weights: create a new one. A second call does nothing.
        """
        for module, methods in self._originals.items():
            for name, method in methods.items():
                vars(module).pop(name, None)
                if method is not None:
                    vars(module)[name] = method
            vars(module).pop(_MARKER, None)
        model, self._model = self._model, None
        self._originals, self.entry_points = {}, None  # frees each fused tensor as soon as no parameter is a view of it
        if model is not None:
            restore_weights(model)


def accelerate(model: nn.Module, vae_model: nn.Module | None = None) -> Acceleration:
    """Run the inference of an official ``Bagel`` module on this runtime, without a second copy of its weights.

    The module's cache updates, ``generate_image``, ``generate_text`` and ``chat`` keep their arguments and results, so
    scripts and the official inferencer and app run unchanged.

    Args:
        model: loaded by the official code, not offloaded, on one device, in one dtype. With ``visual_gen=False`` it
            generates text only.
        vae_model: the official autoencoder. If given, its ``encode`` and ``decode`` are replaced too and run on the
            model's device in float32, on a copy if the autoencoder has another device or dtype.

    Returns:
        The handle to undo it with: :meth:`~Acceleration.restore`.

    Raises:
        TypeError, ValueError: not an official module, quantized or offloaded, or already accelerated; nothing was
            changed.
    """
    return Acceleration(model, vae_model)


def _vae_encode(model: BagelModel, vae: AutoEncoder, official: nn.Module) -> _Method:
    """The replacement of ``encode``, with the noise that the official one would draw."""

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        batch, _, height, width = pixels.shape
        shape = (batch, vae.config.z_channels, height // vae.config.downsample, width // vae.config.downsample)
        dtype = noise_dtype(official)  # outside exclusive(), which disables autocast
        with exclusive(model), torch.no_grad():
            noise = draw_posterior_noise(official, shape, dtype)
            return vae.encode(pixels.to(model.device, torch.float32), noise.to(model.device)).to(pixels.device)

    return encode


def _vae_decode(model: BagelModel, vae: AutoEncoder) -> _Method:
    """The replacement of ``decode``."""

    def decode(latent: torch.Tensor) -> torch.Tensor:
        with exclusive(model), torch.no_grad():
            return vae.decode(latent.to(model.device, torch.float32)).to(latent.device)

    return decode
