"""From latents to a picture: the autoencoder's decoder, captured like any other work that repeats."""

from dataclasses import dataclass

import torch
from PIL import Image

from bagel_rt.models.bagel.embed import unpatchify
from bagel_rt.models.bagel.images import tensor_to_image
from bagel_rt.models.bagel.model import BagelModel
from bagel_rt.runtime.graphs import GraphCache


@dataclass(frozen=True, eq=False)
class _Buffers:
    """What decoding reads and writes: latent [1, z, h, w] and pixels [1, 3, H, W], float32."""

    latent: torch.Tensor
    pixels: torch.Tensor


class _Decoding:
    """Takes the workspace of a grid while its latents are decoded."""


@torch.inference_mode()
def decode_picture(
    model: BagelModel, latents: torch.Tensor, rows: int, columns: int, graphs: GraphCache
) -> Image.Image:
    """Latent tokens [rows * columns, features] -> the picture they stand for."""
    config, decoding = model.config, _Decoding()
    latent = unpatchify(latents, rows, columns, config.latent_patch_size)[None]

    def make():
        sides = (rows * config.latent_stride, columns * config.latent_stride)
        return _Buffers(torch.empty_like(latent), latent.new_empty(1, config.vae.out_channels, *sides))

    key = ("picture", rows, columns, torch.backends.cudnn.allow_tf32)
    workspace = graphs.workspace(key, make, decoding)
    buffers: _Buffers = workspace.buffers
    try:
        buffers.latent.copy_(latent)
        graphs.run(workspace, "decode", lambda: buffers.pixels.copy_(model.vae.decode(buffers.latent)))
        return tensor_to_image(buffers.pixels[0])
    finally:
        workspace.give_back()
