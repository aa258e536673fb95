"""The official module, loaded by the official code, with this runtime behind its entry points."""

import torch
from torch import nn

from bagel_rt.compat.adopt import adopt_config, adopt_model
from bagel_rt.compat.entry_points import EntryPoints

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
        entry_points: what replaces them.
    """

    def __init__(self, model: nn.Module, vae_model: nn.Module | None = None):
        """See :func:`accelerate`."""
        if _MARK in vars(model):
            raise ValueError("the module is accelerated already; restore() it before")
        config = adopt_config(model)
        adopted = adopt_model(model, vae_model, config)
        self.entry_points = EntryPoints(adopted)
        self._replaced = {model: {name: getattr(self.entry_points, name) for name in ENTRY_POINTS}}
        if vae_model is not None:
            self._replaced[vae_model] = {"encode": _sampling(adopted.vae), "decode": _decoding(adopted.vae)}
        self._before = {module: {n: vars(module).get(n) for n in names} for module, names in self._replaced.items()}
        for module, names in self._replaced.items():
            vars(module).update(names)
        vars(model)[_MARK] = self

    def restore(self) -> None:
        """Put the official entry points back. Weights stay where they are: the module computes with them as before."""
        for module, names in self._before.items():
            for name, value in names.items():
                vars(module).pop(name, None)
                if value is not None:
                    vars(module)[name] = value
            vars(module).pop(_MARK, None)
        self._before = {}


def accelerate(model: nn.Module, vae_model: nn.Module | None = None) -> Acceleration:
    """Let this runtime do the inference of an official ``Bagel`` module, without a second copy of its weights.

    The module's cache updates, ``generate_image``, ``generate_text`` and ``chat`` keep their arguments and results;
    scripts, and the official inferencer and app, go on as they are. A cache that was filled before cannot be used.

    Args:
        model: loaded by the official code, whole, on one device, in one dtype.
        vae_model: the official autoencoder; with it, its ``encode`` and ``decode`` are replaced too.

    Returns:
        What :meth:`~Acceleration.restore` undoes it with.

    Raises:
        TypeError, ValueError: the module is another one, quantised or offloaded, or accelerated already; nothing was
            changed.
    """
    return Acceleration(model, vae_model)


def _sampling(autoencoder):
    """``encode`` as officially: the posterior is sampled with torch's generator of the device."""

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        weight, config = autoencoder.decoder.conv_in.weight, autoencoder.config
        batch, _, height, width = pixels.shape
        shape = (batch, config.z_channels, height // config.downsample, width // config.downsample)
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            return autoencoder.encode(pixels.to(weight), torch.randn(shape, device=weight.device))

    return encode


def _decoding(autoencoder):
    def decode(latent: torch.Tensor) -> torch.Tensor:
        weight = autoencoder.decoder.conv_in.weight
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            return autoencoder.decode(latent.to(weight))

    return decode
