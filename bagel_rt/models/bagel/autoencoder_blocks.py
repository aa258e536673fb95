"""The blocks of the autoencoder, and how much memory each takes.

A block works on whole maps as long as they are small. Without gradients, maps of more than ``STRIP_ELEMENTS`` run in
horizontal strips: GroupNorm needs the whole map for its statistics only, a convolution its strip and a row on either
side. The result is the same; what lives between two convolutions of a block are strips instead of maps.

``elements(batch, height, width)`` of a block is how many elements are alive at most while it runs, its input and result
included, for an input of that size. It does not know what libraries take for themselves (cuDNN's workspaces).
"""

from collections.abc import Iterator
from itertools import zip_longest

import torch
import torch.nn.functional as F
from torch import nn

from bagel_rt.kernels import group_norm, group_norm_moments

STRIP_ELEMENTS = 2**25
"""Of the largest map that is worked on as a whole, and of the strips of larger ones: 128 MiB in float32, 512 x 512
pixels of 128 channels. A strip of this size is 2000 tiles of a convolution, which keep any GPU busy."""

QUERIES = 4096
"""Cells that attend at once: 128 blocks of the fused kernel; where torch has none, it stores scores of so many rows."""


class Norm(nn.GroupNorm):
    """GroupNorm over 32 groups, followed by SiLU unless told otherwise."""

    def __init__(self, channels: int, silu: bool = True):
        super().__init__(32, channels, eps=1e-6)
        self.silu = silu

    def forward(self, x: torch.Tensor, moments: torch.Tensor | None = None) -> torch.Tensor:
        """[B, C, H, W] -> the same; ``moments`` are those of the map that x is a strip of, by default of x."""
        return group_norm(x, self.weight, self.bias, self.num_groups, self.eps, self.silu, moments)

    def moments(self, x: torch.Tensor) -> torch.Tensor:
        """Of a whole map, for its strips."""
        return group_norm_moments(x, self.num_groups, self.eps)


def conv3x3(inputs: int, outputs: int) -> nn.Conv2d:
    """A convolution that keeps the sides."""
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def _runs_in_strips(conv: nn.Conv2d, x: torch.Tensor, result: int) -> bool:
    """Whether ``x`` or the result, of so many elements, is too large for the plain way."""
    if torch.is_grad_enabled() and (x.requires_grad or conv.weight.requires_grad):
        return False  # autograd would keep the strips, and forbids writing over what it keeps
    return max(x.numel(), result) > STRIP_ELEMENTS


def _strip_rows(row: int, even: bool = False) -> int:
    """Rows of a strip, given the elements of one row."""
    rows = max(1, STRIP_ELEMENTS // row)
    return rows + rows % 2 if even else rows


def _strips(rows: int, row: int, even: bool = False) -> Iterator[tuple[int, int]]:
    """(start, end) of the strips of a map."""
    step = _strip_rows(row, even)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _new_map(x: torch.Tensor, channels: int, height: int, width: int) -> torch.Tensor:
    return x.new_empty(x.shape[0], height, width, channels).permute(0, 3, 1, 2)  # channels last


def _with_edges(strip: torch.Tensor, start: int, end: int, height: int) -> torch.Tensor:
    """Rows [start - 1, end + 1) of a map, given those that it has: zeros beyond."""
    above, below = int(start == 0), int(end == height)
    return F.pad(strip, (0, 0, above, below)) if above or below else strip


def _normed_rows(norm: Norm, x: torch.Tensor, moments: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """What a 3x3 convolution reads for its rows [start, end): the normalised rows [start - 1, end + 1)."""
    return _with_edges(norm(x[:, :, max(start - 1, 0) : end + 1], moments), start, end, x.shape[2])


def _convolve_into(place: torch.Tensor, conv: nn.Conv2d, rows: torch.Tensor) -> None:
    """Write the convolution of rows that have their edges above and below to its place in the result."""
    padding = (0, conv.padding[1])
    torch.add(F.conv2d(rows, conv.weight, None, conv.stride, padding), conv.bias[:, None, None], out=place)


def norm_conv(norm: Norm, conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """``conv(norm(x))`` for a 3x3 convolution."""
    batch, _, height, width = x.shape
    widest = max(conv.in_channels, conv.out_channels)
    if not _runs_in_strips(conv, x, batch * height * width * conv.out_channels):
        return conv(norm(x))
    y, moments = _new_map(x, conv.out_channels, height, width), norm.moments(x)
    for start, end in _strips(height, batch * width * widest):
        _convolve_into(y[:, :, start:end], conv, _normed_rows(norm, x, moments, start, end))
    return y


def norm_conv_elements(conv: nn.Conv2d, batch: int, height: int, width: int) -> int:
    """Of :func:`norm_conv`, as of the blocks."""
    inputs, outputs, row = conv.in_channels, conv.out_channels, batch * width
    if row * height * max(inputs, outputs) <= STRIP_ELEMENTS:
        return row * height * (2 * inputs + outputs)
    rows = min(_strip_rows(row * max(inputs, outputs)), height)
    normed = (rows + 2) * inputs  # once more where zeros are put beside it, before the product is there
    return row * (height * (inputs + outputs) + normed + max(normed, rows * outputs))


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution on x where the channels change."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.norm1 = Norm(inputs)
        self.conv1 = conv3x3(inputs, outputs)
        self.norm2 = Norm(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        self.nin_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, inputs, H, W] -> [B, outputs, H, W]."""
        batch, inputs, height, width = x.shape
        outputs = self.conv2.out_channels
        y = norm_conv(self.norm1, self.conv1, x)
        if not _runs_in_strips(self.conv2, x, y.numel()):
            y = self.norm2(y)
            y = self.conv2(y)
            return y.add_(self.nin_shortcut(x))
        moments = self.norm2.moments(y)
        strips = list(_strips(height, batch * width * max(inputs, outputs)))
        rows = _normed_rows(self.norm2, y, moments, *strips[0])
        for (start, end), following in zip_longest(strips, strips[1:]):
            made = F.conv2d(rows, self.conv2.weight, self.conv2.bias, padding=(0, 1))
            rows = None  # of which there is to be one strip at a time
            if following:  # it reads a row that is written over below
                rows = _normed_rows(self.norm2, y, moments, *following)
            torch.add(self.nin_shortcut(x[:, :, start:end]), made, out=y[:, :, start:end])
            del made
        return y

    def elements(self, batch: int, height: int, width: int) -> int:
        """See the module."""
        inputs, outputs, row = self.conv1.in_channels, self.conv1.out_channels, batch * width
        if row * height * max(inputs, outputs) <= STRIP_ELEMENTS:
            return row * height * (inputs + outputs + max(inputs, outputs))
        rows = min(_strip_rows(row * max(inputs, outputs)), height)
        second = row * (height * (inputs + outputs) + rows * inputs + (rows + 2 * (rows + 2)) * outputs)
        return max(norm_conv_elements(self.conv1, batch, height, width), second)


class AttentionBlock(nn.Module):
    """x + proj(attention(norm(x))): every cell attends to every cell, one head as wide as the channels."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = Norm(channels, silu=False)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> the same."""
        y = self.norm(x)
        # [B, 1, HW, C]; unless C is contiguous, the fused kernels decline and all scores are stored.
        q, k, v = (project(y).flatten(2).mT[:, None].contiguous() for project in (self.q, self.k, self.v))
        y = torch.cat([F.scaled_dot_product_attention(some, k, v) for some in q.split(QUERIES, dim=2)], dim=2)
        return x + self.proj_out(y[:, 0].mT.unflatten(2, x.shape[2:]))

    def elements(self, batch: int, height: int, width: int) -> int:
        """See the module; scores are not stored, because fused kernels take float32 heads of any width."""
        return batch * height * width * 7 * self.q.in_channels


class Downsample(nn.Module):
    """Half the sides: a 3x3 convolution of stride 2 over zeros added at the right and bottom only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, C, H / 2, W / 2], even sides."""
        if not _runs_in_strips(self.conv, x, 0):
            return self.conv(F.pad(x, (0, 1, 0, 1)))
        batch, channels, height, width = x.shape
        y = _new_map(x, channels, height // 2, width // 2)
        for start, end in _strips(height // 2, 2 * batch * width * channels):
            rows = F.pad(x[:, :, 2 * start : 2 * end + 1], (0, 1, 0, int(2 * end == height)))
            _convolve_into(y[:, :, start:end], self.conv, rows)
        return y

    def elements(self, batch: int, height: int, width: int) -> int:
        """See the module."""
        channels, rows = self.conv.in_channels, height // 2
        if batch * height * width * channels > STRIP_ELEMENTS:
            rows = min(_strip_rows(2 * batch * width * channels), rows)
        maps = height * width + height // 2 * (width // 2)
        strip = (2 * rows + 1) * (width + 1)
        result = rows * (width // 2) if rows < height // 2 else 0
        return batch * channels * (maps + strip + result)


class Upsample(nn.Module):
    """Twice the sides: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, C, 2 H, 2 W]."""
        if not _runs_in_strips(self.conv, x, 4 * x.numel()):
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        batch, channels, height, width = x.shape
        y = _new_map(x, channels, 2 * height, 2 * width)
        for start, end in _strips(2 * height, 2 * batch * width * channels, even=True):
            first = max(start // 2 - 1, 0)
            rows = F.interpolate(x[:, :, first : end // 2 + 1], scale_factor=2.0, mode="nearest")
            rows = rows[:, :, max(start - 1, 0) - 2 * first : end + 1 - 2 * first]
            _convolve_into(y[:, :, start:end], self.conv, _with_edges(rows, start, end, 2 * height))
        return y

    def elements(self, batch: int, height: int, width: int) -> int:
        """See the module."""
        channels, cells = self.conv.in_channels, height * width
        if 4 * batch * cells * channels <= STRIP_ELEMENTS:
            return 9 * batch * cells * channels
        rows = min(_strip_rows(2 * batch * width * channels, even=True), 2 * height)
        return batch * channels * (5 * cells + 2 * width * (2 * (rows + 4) + rows))  # with and without edges, product
