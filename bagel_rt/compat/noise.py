"""Random numbers from torch's generators, as official code draws them."""

import torch
from torch import nn

from bagel_rt.models.bagel.model import BagelModel


def noise_dtype(official: nn.Module) -> torch.dtype:
    """The dtype in which the official autoencoder draws its noise at this point: autocast's, or its parameters'."""
    parameter = next(official.parameters())
    device = parameter.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return parameter.dtype


def draw_posterior_noise(official: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """What the official ``randn_like`` draws for a mean of this shape: the same numbers in the same places.

    Numbers are drawn in the order of memory. The mean is channels-last if the convolutions of the official autoencoder
    are.
    """
    parameter = next(parameter for parameter in official.parameters() if parameter.ndim == 4)
    if parameter.is_contiguous():  # also where the two layouts are one
        return torch.randn(shape, device=parameter.device, dtype=dtype)
    noise = torch.empty(shape, device=parameter.device, dtype=dtype, memory_format=torch.channels_last)
    return noise.normal_()


def draw_sampling_seed(model: BagelModel) -> int:
    """A seed from the torch generator of the model's device, with which the official code samples tokens.

    On a GPU, latent noise comes from the CPU generator, so it is the same with and without sampled text.
    """
    return int(torch.randint(2**62, (), device=model.device))
