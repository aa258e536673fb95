"""The contents of a BAGEL context: text, an image for either expert, latents being denoised.

An image is a start marker, its tokens row by row, and an end marker. The markers belong to the understanding expert in
every image, and all rows of an image share one RoPE position and see each other.
"""

from dataclasses import dataclass

import numpy as np
import torch

from bagel_rt.runtime.context import ContentRows

MARKERS = 2
"""Rows of an image besides its tokens: the start marker and the end marker."""


@dataclass(frozen=True)
class Text:
    """Token ids including the frame (<|im_start|> ... <|im_end|>). Causal, one RoPE position per token."""

    ids: tuple[int, ...]

    def rows(self, position: int) -> ContentRows:
        """One row of the understanding expert per token."""
        count = len(self.ids)
        none = np.zeros(count, dtype=bool)
        return ContentRows(none, position + np.arange(count), causal=True, advance=count, recomputed=none)


@dataclass(frozen=True, eq=False)
class ViTImage:
    """An image for the understanding expert: patches [grid_h * grid_w, features]."""

    patches: torch.Tensor
    grid_h: int
    grid_w: int

    def rows(self, position: int) -> ContentRows:
        """The markers and the patches between them, all for the understanding expert."""
        return _image_rows(self.grid_h, self.grid_w, position, gen=False)


@dataclass(frozen=True, eq=False)
class VAEImage:
    """A clean image for the generation expert: latent tokens [grid_h * grid_w, features]."""

    latents: torch.Tensor
    grid_h: int
    grid_w: int

    def rows(self, position: int) -> ContentRows:
        """The markers, and between them the latents for the generation expert."""
        return _image_rows(self.grid_h, self.grid_w, position, gen=True)


@dataclass(frozen=True)
class NoisedImage:
    """Latents being denoised: every step embeds them again, and they never become part of their context."""

    grid_h: int
    grid_w: int

    def rows(self, position: int) -> ContentRows:
        """The rows of a :class:`VAEImage`, with the latents recomputed."""
        return _image_rows(self.grid_h, self.grid_w, position, gen=True, recomputed=True)


Content = Text | ViTImage | VAEImage | NoisedImage


def image_rows(grid_h: int, grid_w: int) -> int:
    """Number of rows of an image with this grid of tokens, including its markers."""
    return grid_h * grid_w + MARKERS


def _image_rows(grid_h: int, grid_w: int, position: int, gen: bool, recomputed: bool = False) -> ContentRows:
    count = image_rows(grid_h, grid_w)
    tokens = np.ones(count, dtype=bool)
    tokens[[0, -1]] = False
    return ContentRows(
        gen=tokens & gen,
        positions=np.full(count, position),
        causal=False,
        advance=1,
        recomputed=tokens & recomputed,
    )
