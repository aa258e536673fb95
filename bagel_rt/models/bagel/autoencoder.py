"""The FLUX autoencoder (BAGEL's ``ae.safetensors``): pixels in [-1, 1] to scaled latents and back.

Convolutional, after Rombach et al. 2022 (arXiv:2112.10752): ``ch_mult`` levels of residual blocks that halve the sides
between them, one attention head over all cells in the middle, GroupNorm and SiLU before every convolution. Submodules
are named as in the checkpoint, and stand in the order in which they run.
"""

from collections.abc import Iterator

import torch
from torch import nn

from bagel_rt.models.bagel.autoencoder_blocks import (
    AttentionBlock,
    Downsample,
    Norm,
    ResBlock,
    Upsample,
    conv3x3,
    norm_conv,
    norm_conv_elements,
)
from bagel_rt.models.bagel.config import VAEConfig


class Chain(nn.Sequential):
    """Named modules, run in the order in which they are given."""

    def __init__(self, **modules: nn.Module):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


def _middle(channels: int) -> Chain:
    return Chain(
        block_1=ResBlock(channels, channels), attn_1=AttentionBlock(channels), block_2=ResBlock(channels, channels)
    )


def _blocks(count: int, inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(*(ResBlock(inputs if index == 0 else outputs, outputs) for index in range(count)))


def _steps(chain: nn.Sequential) -> Iterator[nn.Module]:
    """The modules of a chain, and of the chains in it, in the order in which they run."""
    for module in chain:
        if isinstance(module, nn.Sequential):
            yield from _steps(module)
        else:
            yield module


class Coder(Chain):
    """A chain that begins with a convolution and ends with a norm and a convolution."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        *steps, norm, conv = _steps(self)
        x = x.contiguous(memory_format=torch.channels_last)
        for step in steps:  # in one loop: a chain within a chain would hold its input until it ends
            x = step(x)
        return norm_conv(norm, conv, x)

    def elements(self, batch: int, height: int, width: int) -> int:
        """How many elements are alive at most, for an input of that size, input and result included."""
        first, *blocks, _, last = _steps(self)
        kept = 2 * batch * height * width * first.in_channels  # the input, and if it was not channels-last, its copy
        most = batch * height * width * first.out_channels
        for block in blocks:
            most = max(most, block.elements(batch, height, width))
            if isinstance(block, Downsample):
                height, width = height // 2, width // 2
            elif isinstance(block, Upsample):
                height, width = 2 * height, 2 * width
        return kept + max(most, norm_conv_elements(last, batch, height, width))


class Encoder(Coder):
    """[B, in_channels, H, W] -> [B, 2 z_channels, H / downsample, W / downsample]: mean and log variance."""

    def __init__(self, config: VAEConfig):
        widths = [config.ch * factor for factor in config.ch_mult]
        down = nn.Sequential()
        for level, width in enumerate(widths):
            stage = Chain(block=_blocks(config.num_res_blocks, widths[level - 1] if level else config.ch, width))
            if level < len(widths) - 1:
                stage.add_module("downsample", Downsample(width))
            down.append(stage)
        super().__init__(
            conv_in=conv3x3(config.in_channels, config.ch),
            down=down,
            mid=_middle(widths[-1]),
            norm_out=Norm(widths[-1]),
            conv_out=conv3x3(widths[-1], 2 * config.z_channels),
        )


class Decoder(Coder):
    """[B, z_channels, h, w] -> [B, out_channels, h * downsample, w * downsample]."""

    def __init__(self, config: VAEConfig):
        widths = [config.ch * factor for factor in config.ch_mult]
        up = {}
        for level in reversed(range(len(widths))):  # counted from the pixels, run from the latents
            inputs = widths[min(level + 1, len(widths) - 1)]
            stage = Chain(block=_blocks(config.num_res_blocks + 1, inputs, widths[level]))
            if level:
                stage.add_module("upsample", Upsample(widths[level]))
            up[str(level)] = stage
        super().__init__(
            conv_in=conv3x3(config.z_channels, widths[-1]),
            mid=_middle(widths[-1]),
            up=Chain(**up),
            norm_out=Norm(widths[0]),
            conv_out=conv3x3(widths[0], config.out_channels),
        )


def decode_memory(config: VAEConfig, height: int, width: int, itemsize: int = 4, batch: int = 1) -> int:
    """Bytes that :meth:`AutoEncoder.decode` has alive at most without gradients, beyond the weights.

    An upper bound from the sizes alone, without what libraries take for themselves (cuDNN's workspaces).

    Args:
        config: the autoencoder's.
        height, width: of the picture in pixels.
        itemsize: bytes of an element.
        batch: pictures decoded together.
    """
    rows, columns = height // config.downsample, width // config.downsample
    with torch.device("meta"):
        elements = Decoder(config).elements(batch, rows, columns)
    latents = batch * config.z_channels * rows * columns
    return itemsize * (elements + 2 * latents)  # the latent while it is scaled and shifted


def encode_memory(config: VAEConfig, height: int, width: int, itemsize: int = 4, batch: int = 1) -> int:
    """Bytes that :meth:`AutoEncoder.encode` has alive at most; as :func:`decode_memory`."""
    with torch.device("meta"):
        elements = Encoder(config).elements(batch, height, width)
    pixels = batch * config.in_channels * height * width
    latents = batch * config.z_channels * (height // config.downsample) * (width // config.downsample)
    # The noise is there all the while; at the end mean, variance and two intermediates of the sample are.
    return itemsize * (latents + max(elements, pixels + 4 * latents))


class AutoEncoder(nn.Module):
    """The variational autoencoder; its parameters' names are the checkpoint's, weights and maps are channels-last.

    On CUDA, convolutions in float32 use TF32 unless ``torch.backends.cudnn.allow_tf32`` is set to False.
    """

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        # cuDNN's tensor-core convolutions want it; on a CPU core a decode of 256 x 256 takes 6.3 s instead of 6.8.
        self.to(memory_format=torch.channels_last)

    def moments(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The posterior of a picture.

        Args:
            pixels: [B, in_channels, H, W] in [-1, 1]; sides are multiples of ``config.downsample``.

        Returns:
            (mean, log variance), both [B, z_channels, H / downsample, W / downsample], neither shifted nor scaled.

        Raises:
            ValueError: another shape.
        """
        self._latent_shape(pixels)
        mean, logvar = self.encoder(pixels).chunk(2, dim=1)
        return mean, logvar

    def encode(self, pixels: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """A sample of the posterior (the official model never takes its mean), shifted and scaled.

        Args:
            pixels: as in :meth:`moments`.
            noise: standard normal, [B, z_channels, H / downsample, W / downsample].

        Returns:
            (mean + exp(logvar / 2) * noise - shift) * scale, of the noise's shape.

        Raises:
            ValueError: another shape of either.
        """
        shape = self._latent_shape(pixels)
        if noise.shape != shape:
            raise ValueError(f"noise is {list(noise.shape)}; allowed: {list(shape)}, the shape of the latent")
        mean, logvar = self.moments(pixels)
        return (mean + torch.exp(logvar / 2) * noise - self.config.shift_factor) * self.config.scale_factor

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """[B, z_channels, h, w] as :meth:`encode` makes it -> [B, out_channels, h * downsample, w * downsample].

        Pixels are nominally in [-1, 1], not clamped.

        Raises:
            ValueError: another shape.
        """
        channels = self.config.z_channels
        if latent.ndim != 4 or latent.shape[1] != channels or not latent.numel():
            raise ValueError(f"latent is {list(latent.shape)}; allowed: [B, {channels}, h, w], none of them 0")
        return self.decoder(latent / self.config.scale_factor + self.config.shift_factor)

    def _latent_shape(self, pixels: torch.Tensor) -> tuple[int, int, int, int]:
        channels, factor = self.config.in_channels, self.config.downsample
        fits = pixels.ndim == 4 and pixels.shape[1] == channels and pixels.numel()
        if not fits or any(side % factor for side in pixels.shape[2:]):
            raise ValueError(
                f"pixels are {list(pixels.shape)}; allowed: [B, {channels}, H, W], none of them 0, "
                f"H and W multiples of {factor}. Resize the picture before"
            )
        batch, _, height, width = pixels.shape
        return batch, self.config.z_channels, height // factor, width // factor
