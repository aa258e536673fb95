"""The FLUX autoencoder (BAGEL's ``ae.safetensors``): pixels in [-1, 1] to scaled latents and back.

A convolutional VAE after Rombach et al. 2022 (arXiv:2112.10752): ``ch_mult`` levels of residual blocks with 2x
downsampling between levels, single-head attention over all positions in the middle, GroupNorm and SiLU before every
convolution. Submodules have the names of the checkpoint and are registered in execution order.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from bagel_rt.models.bagel.autoencoder_blocks import (
    AttentionBlock,
    Block,
    Downsample,
    Norm,
    ResBlock,
    Upsample,
    conv3x3,
    norm_conv,
    norm_conv_peak_elements,
)
from bagel_rt.models.bagel.config import VAEConfig


class NamedSequential(nn.Sequential):
    """An ``nn.Sequential`` with the modules named by keyword."""

    def __init__(self, **modules: nn.Module):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


def _mid_block(channels: int) -> NamedSequential:
    return NamedSequential(
        block_1=ResBlock(channels, channels), attn_1=AttentionBlock(channels), block_2=ResBlock(channels, channels)
    )


def _res_blocks(count: int, inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(*(ResBlock(inputs if index == 0 else outputs, outputs) for index in range(count)))


def _flatten(modules: nn.Sequential) -> Iterator[nn.Module]:
    """The modules of nested ``nn.Sequential`` in execution order."""
    for module in modules:
        if isinstance(module, nn.Sequential):
            yield from _flatten(module)
        else:
            yield module


class ConvStack(NamedSequential):
    """Base of encoder and decoder: a convolution, blocks, a norm and a convolution."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        conv_in, blocks, norm, conv_out = self._layers()
        x = conv_in(x.contiguous(memory_format=torch.channels_last))
        for block in blocks:  # a flat loop, because a nested nn.Sequential keeps its input alive until it returns
            x = block(x)
        return norm_conv(norm, conv_out, x)

    def _layers(self) -> tuple[nn.Conv2d, list[Block], Norm, nn.Conv2d]:
        """The layers in execution order."""
        layers = list(_flatten(self))
        conv_in, conv_out = (layer for layer in layers if isinstance(layer, nn.Conv2d))
        (norm,) = (layer for layer in layers if isinstance(layer, Norm))
        return conv_in, [layer for layer in layers if isinstance(layer, Block)], norm, conv_out

    def peak_elements(self, batch: int, height: int, width: int) -> int:
        """Upper bound of the elements alive at once for an input of this size, including input and output."""
        conv_in, blocks, _, conv_out = self._layers()
        inputs = 2 * batch * height * width * conv_in.in_channels  # the input and its channels-last copy
        peak = batch * height * width * conv_in.out_channels
        for block in blocks:
            peak = max(peak, block.peak_elements(batch, height, width))
            if isinstance(block, Downsample):
                height, width = height // 2, width // 2
            elif isinstance(block, Upsample):
                height, width = 2 * height, 2 * width
        return inputs + max(peak, norm_conv_peak_elements(conv_out, batch, height, width))


class Encoder(ConvStack):
    """[B, in_channels, H, W] -> [B, 2 z_channels, H / downsample, W / downsample]: mean and log variance."""

    def __init__(self, config: VAEConfig):
        widths = [config.ch * factor for factor in config.ch_mult]
        down = nn.Sequential()
        for level, width in enumerate(widths):
            inputs = widths[level - 1] if level else config.ch
            stage = NamedSequential(block=_res_blocks(config.num_res_blocks, inputs, width))
            if level < len(widths) - 1:
                stage.add_module("downsample", Downsample(width))
            down.append(stage)
        super().__init__(
            conv_in=conv3x3(config.in_channels, config.ch),
            down=down,
            mid=_mid_block(widths[-1]),
            norm_out=Norm(widths[-1]),
            conv_out=conv3x3(widths[-1], 2 * config.z_channels),
        )


class Decoder(ConvStack):
    """[B, z_channels, h, w] -> [B, out_channels, h * downsample, w * downsample]."""

    def __init__(self, config: VAEConfig):
        widths = [config.ch * factor for factor in config.ch_mult]
        up = {}
        for level in reversed(range(len(widths))):  # level 0 has the full resolution and runs last
            inputs = widths[min(level + 1, len(widths) - 1)]
            stage = NamedSequential(block=_res_blocks(config.num_res_blocks + 1, inputs, widths[level]))
            if level:
                stage.add_module("upsample", Upsample(widths[level]))
            up[str(level)] = stage
        super().__init__(
            conv_in=conv3x3(config.z_channels, widths[-1]),
            mid=_mid_block(widths[-1]),
            up=NamedSequential(**up),
            norm_out=Norm(widths[0]),
            conv_out=conv3x3(widths[0], config.out_channels),
        )


def decode_memory(config: VAEConfig, height: int, width: int, itemsize: int = 4, batch: int = 1) -> int:
    """Peak bytes of :meth:`AutoEncoder.decode` without gradients, beyond the weights.

    An upper bound computed from the sizes. Workspaces of libraries (cuDNN) are not included.

    Args:
        config: configuration of the autoencoder.
        height, width: size of the image in pixels.
        itemsize: bytes per element.
        batch: number of images decoded together.
    """
    latent_h, latent_w = height // config.downsample, width // config.downsample
    with torch.device("meta"):
        elements = Decoder(config).peak_elements(batch, latent_h, latent_w)
    latents = batch * config.z_channels * latent_h * latent_w
    # decode also holds its argument and latent / scale_factor; peak_elements counts the shifted latent.
    return itemsize * (elements + 2 * latents)


def encode_memory(config: VAEConfig, height: int, width: int, itemsize: int = 4, batch: int = 1) -> int:
    """Peak bytes of :meth:`AutoEncoder.encode`; see :func:`decode_memory`."""
    with torch.device("meta"):
        elements = Encoder(config).peak_elements(batch, height, width)
    pixels = batch * config.in_channels * height * width
    latents = batch * config.z_channels * (height // config.downsample) * (width // config.downsample)
    # The noise stays alive throughout. After the encoder returns, the pixels, the mean, the log variance and two
    # intermediate results of sampling are alive.
    return itemsize * (latents + max(elements, pixels + 4 * latents))


class AutoEncoder(nn.Module):
    """The variational autoencoder. Parameters have the names of the checkpoint; the memory format is channels-last.

    On CUDA, convolutions in float32 use TF32 unless ``torch.backends.cudnn.allow_tf32`` is set to False.
    """

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        # cuDNN's tensor-core convolutions need channels-last. It also helps on a CPU: on one core, decoding 256x256
        # takes 6.3 s with it and 6.8 s without it.
        module: Any = self  # stubs of torch 2.13 and older lack memory_format
        module.to(memory_format=torch.channels_last)

    def moments(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the posterior of images.

        Args:
            pixels: [B, in_channels, H, W] in [-1, 1]; H and W are multiples of ``config.downsample``.

        Returns:
            (mean, log variance), both [B, z_channels, H / downsample, W / downsample], without shift and scale.

        Raises:
            ValueError: wrong shape.
        """
        self._latent_shape(pixels)
        mean, logvar = self.encoder(pixels).chunk(2, dim=1)
        return mean, logvar

    def encode(self, pixels: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Sample the posterior, as the official model always does, then shift and scale the sample.

        Args:
            pixels: as in :meth:`moments`.
            noise: standard normal, [B, z_channels, H / downsample, W / downsample].

        Returns:
            (mean + exp(logvar / 2) * noise - shift) * scale, with the shape of the noise.

        Raises:
            ValueError: wrong shape of pixels or noise.
        """
        shape = self._latent_shape(pixels)
        if noise.shape != shape:
            raise ValueError(f"noise must have the shape of the latent, {list(shape)}, got {list(noise.shape)}.")
        mean, logvar = self.moments(pixels)
        return (mean + torch.exp(logvar / 2) * noise - self.config.shift_factor) * self.config.scale_factor

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """Decode latents [B, z_channels, h, w] to pixels [B, out_channels, h * downsample, w * downsample].

        Pixels are nominally in [-1, 1], but not clamped.

        Raises:
            ValueError: wrong shape.
        """
        channels = self.config.z_channels
        if latent.ndim != 4 or latent.shape[1] != channels or not latent.numel():
            raise ValueError(f"latent must be a non-empty tensor [B, {channels}, h, w], got {list(latent.shape)}.")
        return self.decoder(latent / self.config.scale_factor + self.config.shift_factor)

    def _latent_shape(self, pixels: torch.Tensor) -> tuple[int, int, int, int]:
        """Return the shape of the latent for these pixels. Raise ValueError if the pixels have a wrong shape."""
        channels, factor = self.config.in_channels, self.config.downsample
        valid = pixels.ndim == 4 and pixels.shape[1] == channels and pixels.numel()
        if not valid or any(side % factor for side in pixels.shape[2:]):
            raise ValueError(
                f"pixels must be a non-empty tensor [B, {channels}, H, W] with H and W multiples of {factor}, "
                f"got {list(pixels.shape)}. Resize the image first."
            )
        batch, _, height, width = pixels.shape
        return batch, self.config.z_channels, height // factor, width // factor
