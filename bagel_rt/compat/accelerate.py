"""The official module, loaded by the official code, with this runtime behind its entry points."""

import torch
from torch import nn

from bagel_rt.compat.adopt import adopt_config, adopt_model, generates
from bagel_rt.compat.entry_points import EntryPoints
from bagel_rt.compat.exclusive import exclusive
from bagel_rt.models.bagel.model import BagelModel

ENTRY_POINTS = (
    "forward_cache_update_text",
    "forward_cache_update_vit",
    "forward_cache_update_vae",
    "generate_image",
    "generate_text",
    "chat",
)
_MARK = "_bagel_rt_acceleration"


class Acceleration:
    """An official module whose entry points are replaced, until :meth:`restore`.

    Attributes:
        entry_points: what replaces them; None after :meth:`restore`.
    """

    def __init__(self, model: nn.Module, vae_model: nn.Module | None = None):
        """See :func:`accelerate`."""
        if _MARK in vars(model):
            raise ValueError("the module is accelerated already; restore() it before")
        config = adopt_config(model)
        adopted = adopt_model(model, vae_model, config)
        self.entry_points: EntryPoints | None = EntryPoints(adopted, generates=generates(model))
        replaced = {model: {name: getattr(self.entry_points, name) for name in ENTRY_POINTS}}
        if vae_model is not None:
            replaced[vae_model] = {"encode": _sampling(adopted, vae_model), "decode": _decoding(adopted)}
        self._before = {module: {n: vars(module).get(n) for n in names} for module, names in replaced.items()}
        for module, names in replaced.items():
            vars(module).update(names)
        vars(model)[_MARK] = self

    def restore(self) -> None:
        """Put the official entry points back. Weights stay where they are: the module computes with them as before.

        The KV cache and what was captured are given up, as soon as no context of them is held.
        """
        for module, names in self._before.items():
            for name, value in names.items():
                vars(module).pop(name, None)
                if value is not None:
                    vars(module)[name] = value
            vars(module).pop(_MARK, None)
        self._before, self.entry_points = {}, None


def accelerate(model: nn.Module, vae_model: nn.Module | None = None) -> Acceleration:
    """Let this runtime do the inference of an official ``Bagel`` module, without a second copy of its weights.

    The module's cache updates, ``generate_image``, ``generate_text`` and ``chat`` keep their arguments and results;
    scripts, and the official inferencer and app, go on as they are. A cache that was filled before cannot be used.

    Args:
        model: loaded by the official code, whole, on one device, in one dtype. With ``visual_gen=False`` it answers and
            cannot draw.
        vae_model: the official autoencoder; with it, its ``encode`` and ``decode`` are replaced too, and run on the
            model's device, in float32: where it is elsewhere or of another dtype, on a copy of it.

    Returns:
        What :meth:`~Acceleration.restore` undoes it with.

    Raises:
        TypeError, ValueError: the module is another one, quantised or offloaded, or accelerated already; nothing was
            changed.
    """
    return Acceleration(model, vae_model)


def _sampling(model: BagelModel, official: nn.Module):
    """``encode`` as officially: the posterior is sampled with torch's generator of the official module's device."""

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        config = model.vae.config
        batch, _, height, width = pixels.shape
        shape = (batch, config.z_channels, height // config.downsample, width // config.downsample)
        with exclusive(model), torch.no_grad():
            noise = torch.randn(shape, device=next(official.parameters()).device).to(model.device)
            return model.vae.encode(pixels.to(model.device, torch.float32), noise).to(pixels.device)

    return encode


def _decoding(model: BagelModel):
    def decode(latent: torch.Tensor) -> torch.Tensor:
        with exclusive(model), torch.no_grad():
            return model.vae.decode(latent.to(model.device, torch.float32)).to(latent.device)

    return decode
