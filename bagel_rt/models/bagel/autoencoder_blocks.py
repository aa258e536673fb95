"""The blocks of the autoencoder, and the memory each of them needs.

The largest feature maps of decoding a 2048x2048 image have 2 to 4 GB each in float32, and a plain block holds three of
them. Feature maps of more than ``STRIP_ELEMENTS`` elements are therefore processed in horizontal strips, unless
gradients are needed: GroupNorm needs the whole map for its statistics only, and a 3x3 convolution needs its strip and
one row above and below. The result is the same; the intermediate results of a block are strips instead of whole maps.

``peak_elements(batch, height, width)`` of a block is an upper bound of the elements that are allocated at once while it
runs on an input of that size, including its input and its output. Multiply by the itemsize for bytes. Workspaces of
libraries (cuDNN) are not included.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import zip_longest

import torch
import torch.nn.functional as F
from torch import nn

from bagel_rt.kernels import group_norm, group_norm_moments

STRIP_ELEMENTS = 2**25
"""The largest feature map that is processed as a whole, and the size of a strip of larger ones: 128 MiB in float32, or
512x512 pixels of 128 channels. A convolution of a strip of this size has 2000 tiles, enough to fill any GPU."""

QUERY_CHUNK = 4096
"""Queries per attention call. They give the fused kernel 128 blocks, enough to fill a GPU, and bound the score matrix
where torch has no fused kernel and stores it."""


class Norm(nn.GroupNorm):
    """GroupNorm over 32 groups, by default followed by SiLU."""

    def __init__(self, channels: int, silu: bool = True):
        super().__init__(32, channels, eps=1e-6)
        self.silu = silu

    def forward(self, x: torch.Tensor, moments: torch.Tensor | None = None) -> torch.Tensor:
        """[B, C, H, W] -> [B, C, H, W]; if x is a strip, pass the moments of the whole feature map."""
        return group_norm(x, self.weight, self.bias, self.num_groups, self.eps, self.silu, moments)

    def moments(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the statistics of a whole feature map, which normalize each of its strips."""
        return group_norm_moments(x, self.num_groups, self.eps)


def conv3x3(inputs: int, outputs: int) -> nn.Conv2d:
    """A 3x3 convolution that keeps height and width."""
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def _runs_in_strips(conv: nn.Conv2d, x: torch.Tensor, output_elements: int) -> bool:
    """Whether the input or the output of a convolution is too large to be processed as a whole."""
    if torch.is_grad_enabled() and (x.requires_grad or conv.weight.requires_grad):
        return False  # autograd would keep every strip, and does not allow the in-place writes
    return max(x.numel(), output_elements) > STRIP_ELEMENTS


def _strip_height(row_elements: int, even: bool = False) -> int:
    """Rows per strip, at least one; ``even`` rounds up to an even number."""
    rows = max(1, STRIP_ELEMENTS // row_elements)
    return rows + rows % 2 if even else rows


def _strip_ranges(height: int, row_elements: int, even: bool = False) -> Iterator[tuple[int, int]]:
    """(first row, end row) of every strip of a feature map."""
    step = _strip_height(row_elements, even)
    for start in range(0, height, step):
        yield start, min(start + step, height)


def _empty_channels_last(x: torch.Tensor, channels: int, height: int, width: int) -> torch.Tensor:
    return x.new_empty(x.shape[0], height, width, channels).permute(0, 3, 1, 2)


def _pad_outer_rows(rows: torch.Tensor, start: int, end: int, height: int) -> torch.Tensor:
    """Complete a strip to rows [start - 1, end + 1): add the row of zeros above or below the whole feature map."""
    above, below = int(start == 0), int(end == height)
    return F.pad(rows, (0, 0, above, below)) if above or below else rows


def _normalized_rows(norm: Norm, x: torch.Tensor, moments: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """Normalized rows [start - 1, end + 1), the input of a 3x3 convolution for its output rows [start, end)."""
    return _pad_outer_rows(norm(x[:, :, max(start - 1, 0) : end + 1], moments), start, end, x.shape[2])


def _convolve_into(out: torch.Tensor, conv: nn.Conv2d, rows: torch.Tensor, padding: int = 1) -> None:
    """Write the convolution of a strip to ``out``.

    ``rows`` includes the rows above and below the strip; ``padding`` is added to the left and the right only.
    """
    assert conv.bias is not None
    # The bias is added by the op that copies the strip to its position in the output.
    torch.add(F.conv2d(rows, conv.weight, None, conv.stride, (0, padding)), conv.bias[:, None, None], out=out)


def norm_conv(norm: Norm, conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """``conv(norm(x))`` for a 3x3 convolution."""
    batch, _, height, width = x.shape
    channels = max(conv.in_channels, conv.out_channels)
    if not _runs_in_strips(conv, x, batch * height * width * conv.out_channels):
        return conv(norm(x))
    y, moments = _empty_channels_last(x, conv.out_channels, height, width), norm.moments(x)
    for start, end in _strip_ranges(height, batch * width * channels):
        _convolve_into(y[:, :, start:end], conv, _normalized_rows(norm, x, moments, start, end))
    return y


def norm_conv_peak_elements(conv: nn.Conv2d, batch: int, height: int, width: int) -> int:
    """``peak_elements`` of :func:`norm_conv`."""
    inputs, outputs, row = conv.in_channels, conv.out_channels, batch * width
    if row * height * max(inputs, outputs) <= STRIP_ELEMENTS:
        return row * height * (2 * inputs + outputs)  # input, normalized input, output
    rows = min(_strip_height(row * max(inputs, outputs)), height)
    # Beside input and output: the normalized strip, and either its padded copy or the convolved strip.
    normalized = (rows + 2) * inputs
    return row * (height * (inputs + outputs) + normalized + max(normalized, rows * outputs))


class Block(nn.Module, ABC):
    """A layer of encoder and decoder between their first and their last convolution."""

    @abstractmethod
    def peak_elements(self, batch: int, height: int, width: int) -> int:
        """The memory for an input of this size; see the module's docstring."""


class ResBlock(Block):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution on x if the number of channels changes."""

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
        # The second convolution writes its output over its input y, strip by strip, which saves a feature map. The
        # normalized rows of the next strip include the last row of this strip, so read them before overwriting it.
        moments = self.norm2.moments(y)
        strips = list(_strip_ranges(height, batch * width * max(inputs, outputs)))
        rows = [_normalized_rows(self.norm2, y, moments, *strips[0])]
        for (start, end), next_strip in zip_longest(strips, strips[1:]):
            # Popped, so that this strip is freed before the next one is allocated.
            convolved = F.conv2d(rows.pop(), self.conv2.weight, self.conv2.bias, padding=(0, 1))
            if next_strip:
                rows.append(_normalized_rows(self.norm2, y, moments, *next_strip))
            torch.add(self.nin_shortcut(x[:, :, start:end]), convolved, out=y[:, :, start:end])
            del convolved
        return y

    def peak_elements(self, batch: int, height: int, width: int) -> int:
        inputs, outputs, row = self.conv1.in_channels, self.conv1.out_channels, batch * width
        if row * height * max(inputs, outputs) <= STRIP_ELEMENTS:
            # Input, first result, and a second map: the normalized input or, in the second half, the output.
            return row * height * (inputs + outputs + max(inputs, outputs))
        rows = min(_strip_height(row * max(inputs, outputs)), height)
        # Beside the two maps: the strip of x for the shortcut, the convolved strip, and the next normalized strip with
        # its padded copy.
        second = row * (height * (inputs + outputs) + rows * inputs + (rows + 2 * (rows + 2)) * outputs)
        return max(norm_conv_peak_elements(self.conv1, batch, height, width), second)


class AttentionBlock(Block):
    """x + proj(attention(norm(x))): full attention over all H x W positions, one head as wide as the channels."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = Norm(channels, silu=False)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        y = self.norm(x)
        # [B, 1, H * W, C]. Unless C is contiguous, torch does not select a fused kernel and stores all scores.
        q, k, v = (project(y).flatten(2).mT[:, None].contiguous() for project in (self.q, self.k, self.v))
        # The list is an argument and not a variable, so that it is freed before the projection.
        y = torch.cat([F.scaled_dot_product_attention(chunk, k, v) for chunk in q.split(QUERY_CHUNK, dim=2)], dim=2)
        return x + self.proj_out(y[:, 0].mT.unflatten(2, x.shape[2:]))

    def peak_elements(self, batch: int, height: int, width: int) -> int:
        # x, y, q, k, v, the chunks and their concatenation. Fused kernels take float32 heads of any width: no scores.
        return batch * height * width * 7 * self.q.in_channels


class Downsample(Block):
    """Halve height and width: a 3x3 convolution of stride 2, with zero padding at the right and the bottom only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, C, H / 2, W / 2]; H and W are even."""
        if not _runs_in_strips(self.conv, x, 0):
            return self.conv(F.pad(x, (0, 1, 0, 1)))
        batch, channels, height, width = x.shape
        y = _empty_channels_last(x, channels, height // 2, width // 2)
        for start, end in _strip_ranges(height // 2, 2 * batch * width * channels):
            # Output rows [start, end) read input rows [2 start, 2 end + 1); the last of them may be the padding.
            rows = F.pad(x[:, :, 2 * start : 2 * end + 1], (0, 1, 0, int(2 * end == height)))
            _convolve_into(y[:, :, start:end], self.conv, rows, padding=0)
        return y

    def peak_elements(self, batch: int, height: int, width: int) -> int:
        channels, rows = self.conv.in_channels, height // 2
        if batch * height * width * channels > STRIP_ELEMENTS:
            rows = min(_strip_height(2 * batch * width * channels), rows)
        maps = height * width + height // 2 * (width // 2)
        padded = (2 * rows + 1) * (width + 1)
        convolved = rows * (width // 2) if rows < height // 2 else 0  # with a single strip this is the output
        return batch * channels * (maps + padded + convolved)


class Upsample(Block):
    """Double height and width: nearest neighbor, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, C, 2 H, 2 W]."""
        if not _runs_in_strips(self.conv, x, 4 * x.numel()):
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        batch, channels, height, width = x.shape
        y = _empty_channels_last(x, channels, 2 * height, 2 * width)
        # Strips start at even rows, so that start / 2 is an input row.
        for start, end in _strip_ranges(2 * height, 2 * batch * width * channels, even=True):
            # Upsampled rows [start - 1, end + 1) come from input rows [start / 2 - 1, end / 2 + 1). Those give one row
            # too many at either end, which the second slice drops.
            first = max(start // 2 - 1, 0)
            rows = F.interpolate(x[:, :, first : end // 2 + 1], scale_factor=2.0, mode="nearest")
            rows = rows[:, :, max(start - 1, 0) - 2 * first : end + 1 - 2 * first]
            _convolve_into(y[:, :, start:end], self.conv, _pad_outer_rows(rows, start, end, 2 * height))
        return y

    def peak_elements(self, batch: int, height: int, width: int) -> int:
        channels, pixels = self.conv.in_channels, height * width
        if 4 * batch * pixels * channels <= STRIP_ELEMENTS:
            return 9 * batch * pixels * channels  # input, upsampled input, output
        rows = min(_strip_height(2 * batch * width * channels, even=True), 2 * height)
        # Beside input and output: the upsampled strip with two rows more at either end, its padded copy, and the
        # convolved strip.
        return batch * channels * (5 * pixels + 2 * width * (2 * (rows + 4) + rows))
