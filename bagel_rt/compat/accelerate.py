"""Accelerate official modules: replace their inference methods, keep their weights."""

import torch
from torch import nn

from bagel_rt.compat.convert import convert_config, has_visual_gen
from bagel_rt.compat.entry_points import EntryPoints
from bagel_rt.compat.exclusive import exclusive
from bagel_rt.compat.weight_sharing import build_shared_model
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
        replacements = {model: {name: getattr(self.entry_points, name) for name in ENTRY_POINTS}}
        if vae_model is not None:
            replacements[vae_model] = {"encode": _vae_encode(shared, vae_model), "decode": _vae_decode(shared)}
        self._originals = {
            module: {name: vars(module).get(name) for name in methods} for module, methods in replacements.items()
        }
        for module, methods in replacements.items():
            vars(module).update(methods)
        vars(model)[_MARKER] = self

    def restore(self) -> None:
        """Put the official entry points back.

        The parameters stay views of fused tensors, with which the module computes as before. The KV cache and the CUDA
        graphs are freed when the last of their contexts is.
        """
        for module, methods in self._originals.items():
            for name, method in methods.items():
                vars(module).pop(name, None)
                if method is not None:
                    vars(module)[name] = method
            vars(module).pop(_MARKER, None)
        self._originals, self.entry_points = {}, None


def accelerate(model: nn.Module, vae_model: nn.Module | None = None) -> Acceleration:
    """Run the inference of an official ``Bagel`` module on this runtime, without a second copy of its weights.

    The module's cache updates, ``generate_image``, ``generate_text`` and ``chat`` keep their arguments and results, so
    scripts and the official inferencer and app run unchanged. A cache that was filled before cannot be used.

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


def _vae_encode(model: BagelModel, official: nn.Module):
    """The replacement of ``encode``. Like the official one, it samples with the torch generator of the official
    autoencoder's device."""

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        config = model.vae.config
        batch, _, height, width = pixels.shape
        shape = (batch, config.z_channels, height // config.downsample, width // config.downsample)
        with exclusive(model), torch.no_grad():
            noise = torch.randn(shape, device=next(official.parameters()).device).to(model.device)
            return model.vae.encode(pixels.to(model.device, torch.float32), noise).to(pixels.device)

    return encode


def _vae_decode(model: BagelModel):
    """The replacement of ``decode``."""

    def decode(latent: torch.Tensor) -> torch.Tensor:
        with exclusive(model), torch.no_grad():
            return model.vae.decode(latent.to(model.device, torch.float32)).to(latent.device)

    return decode
