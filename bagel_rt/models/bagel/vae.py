"""The FLUX autoencoder (BAGEL's ``ae.safetensors``): pixels in [-1, 1] to scaled latents and back.

Convolutional, after Rombach et al. 2022 (arXiv:2112.10752): ``ch_mult`` levels of residual blocks that halve the sides
between them, one attention head over all cells in the middle, GroupNorm and SiLU before every convolution. Submodules
are named as in the checkpoint, and stand in the order in which they run.
"""

import torch
import torch.nn.functional as F
from torch import nn

from bagel_rt.config import VAEConfig


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


def _conv3x3(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution on x where the channels change."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.norm1 = _norm(inputs)
        self.conv1 = _conv3x3(inputs, outputs)
        self.norm2 = _norm(outputs)
        self.conv2 = _conv3x3(outputs, outputs)
        self.nin_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, inputs, H, W] -> [B, outputs, H, W]."""
        y = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class AttentionBlock(nn.Module):
    """x + proj(attention(norm(x))): every cell attends to every cell, one head as wide as the channels."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> the same."""
        y = self.norm(x)
        # [B, 1, HW, C]; unless C is contiguous, the fused kernels decline and all HW x HW scores are stored.
        q, k, v = (project(y).flatten(2).mT[:, None].contiguous() for project in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)[:, 0].mT.unflatten(2, x.shape[2:])
        return x + self.proj_out(y)


class Downsample(nn.Module):
    """Half the sides: a 3x3 convolution of stride 2 over zeros added at the right and bottom only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, C, H / 2, W / 2], even sides."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the sides: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = _conv3x3(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, C, 2 H, 2 W]."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


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


class Encoder(Chain):
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
            conv_in=_conv3x3(config.in_channels, config.ch),
            down=down,
            mid=_middle(widths[-1]),
            norm_out=_norm(widths[-1]),
            silu=nn.SiLU(),
            conv_out=_conv3x3(widths[-1], 2 * config.z_channels),
        )


class Decoder(Chain):
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
            conv_in=_conv3x3(config.z_channels, widths[-1]),
            mid=_middle(widths[-1]),
            up=Chain(**up),
            norm_out=_norm(widths[0]),
            silu=nn.SiLU(),
            conv_out=_conv3x3(widths[0], config.out_channels),
        )


class AutoEncoder(nn.Module):
    """The variational autoencoder; its parameters' names are the checkpoint's.

    On CUDA, convolutions in float32 use TF32 unless ``torch.backends.cudnn.allow_tf32`` is set to False.
    """

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

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
