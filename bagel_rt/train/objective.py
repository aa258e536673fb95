"""The training objective on packed sequences: cross-entropy of text tokens, flow matching of latent tokens.

Sources: Deng et al. 2025 (arXiv:2505.14683) and the official BAGEL forward; rectified flow: Liu et al. 2022
(arXiv:2209.03003), with the timestep shift of Esser et al. 2024 (arXiv:2403.03206).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from bagel_rt.models.bagel.config import BagelConfig
from bagel_rt.models.bagel.embed import patchify
from bagel_rt.models.bagel.model import BagelModel
from bagel_rt.models.bagel.vision import connect, vision_tower
from bagel_rt.runtime.batch import ForwardBatch
from bagel_rt.runtime.slots import KVCache
from bagel_rt.train.attention import training_attention
from bagel_rt.train.batch import TrainingBatch, check_range
from bagel_rt.validation import check, number


@dataclass(frozen=True, eq=False)
class Losses:
    """Losses and hidden states of a forward on a :class:`TrainingBatch`, on the model's device, float32 or wider.

    Attributes:
        ce_per_token: [ce] cross-entropy at each of ``ce_loss_indexes``, in nats.
        mse_per_token: [mse] squared velocity error at each of ``mse_loss_indexes``, mean over the latent's features.
        ce, mse: scalar means over tokens; 0 without tokens.
        ce_reweighted: mean weighted by ``ce_loss_weights``; None without weights.
        last_hidden: [L, H] hidden states after the final norm, in the row order of the batch.
    """

    ce_per_token: torch.Tensor
    mse_per_token: torch.Tensor
    ce: torch.Tensor
    mse: torch.Tensor
    ce_reweighted: torch.Tensor | None
    last_hidden: torch.Tensor


def training_losses(
    model: BagelModel, batch: TrainingBatch, latents: torch.Tensor, noise: torch.Tensor, timestep_shift: float = 1.0
) -> Losses:
    """Compute both losses of one packed batch.

    Args:
        latents: [latents, features] clean latent tokens, as from :func:`latent_tokens`; noised here.
        noise: [latents, features] standard normal; ignored at clean tokens.
        timestep_shift: s in t = s u / (1 + (s - 1) u), u = sigmoid(packed_timesteps); positive.

    Raises:
        ValueError: the batch does not match the model, or latents or noise do not match the batch.
    """
    _check_fit(model.config, batch, latents, noise)
    device = model.device
    t = flow_timesteps(batch.packed_timesteps, timestep_shift).to(device)
    x, target = flow_pair(latents.to(device), noise.to(device), t)

    plan = batch.plan()
    order = torch.from_numpy(plan.order).to(device)
    rows = ForwardBatch.from_plan(plan, batch.packed_position_ids.numpy(), model.rope)
    hidden = _embed(model, batch, x, t)[order]
    hidden = model.transformer.forward(hidden, rows, _FreshCache(model, len(batch)), training_attention)
    last_hidden = model.transformer.final_norm(hidden, plan.G)[order.argsort()]

    logits = F.linear(last_hidden[batch.ce_loss_indexes.to(device)], model.weights.lm_head)
    ce = F.cross_entropy(_at_least_float32(logits), batch.packed_label_ids.to(device), reduction="none")
    velocity = F.linear(last_hidden[batch.mse_loss_indexes.to(device)], *model.weights.llm2vae)
    mse = (_at_least_float32(velocity) - target[batch.noised.to(device)]).square().mean(dim=1)
    weights = None if batch.ce_loss_weights is None else batch.ce_loss_weights.to(device, torch.float32)
    ce_reweighted = None if weights is None else _mean(ce, weights)
    return Losses(ce, mse, _mean(ce), _mean(mse), ce_reweighted, last_hidden)


class _FreshCache(KVCache):
    """A KV cache for one forward. Every layer gets new tensors, because autograd keeps them."""

    def __init__(self, model: BagelModel, slots: int):
        llm = model.config.llm
        super().__init__(llm.num_layers, llm.num_kv_heads, llm.head_dim, model.dtype, model.device)
        self._layer_shape = (slots, llm.num_kv_heads, llm.head_dim)

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.k.new_empty(self._layer_shape), self.v.new_empty(self._layer_shape)


def flow_timesteps(raw: torch.Tensor, shift: float) -> torch.Tensor:
    """Convert normal samples to float32 timesteps in [0, 1]: u = sigmoid(raw), t = shift u / (1 + (shift - 1) u).

    -inf gives 0, the clean end of the flow.

    Raises:
        ValueError: shift is not positive.
    """
    check("timestep_shift", shift, number(0, above=True, remedy="1 disables the shift"))
    u = raw.float().sigmoid()
    return shift * u / (1 + (shift - 1) * u)


def flow_pair(latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(x, target), float32 [n, features]: x = (1 - t) z + t noise for timesteps [n], target = noise - z (velocity)."""
    z, noise, t = latents.float(), noise.float(), t[:, None]
    return (1 - t) * z + t * noise, noise - z


def encode_padded(model: BagelModel, images: Sequence[torch.Tensor], noise: torch.Tensor) -> torch.Tensor:
    """Encode the images of a batch together, as the official trainer does.

    Each image is in the top left corner of a common canvas of zeros (gray). The padding changes the latents of smaller
    images near its border, so the result differs from encoding the images one by one.

    Args:
        images: at least one, each [3, height, width] in [-1, 1]. Sides are multiples of the autoencoder's stride.
        noise: [n, z, canvas height / stride, canvas width / stride], for the posterior sample.

    Returns:
        Latents [n, z, canvas height / stride, canvas width / stride] after shift and scale, float32.

    Raises:
        ValueError: ``images`` is empty, ``noise`` has the wrong shape, or the model has no autoencoder.
    """
    if model.vae is None:
        raise ValueError("the model must have an autoencoder to encode images, got none.")
    if not images:
        raise ValueError("images must not be empty, got 0 images.")
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    vae = model.config.vae
    shape = (len(images), vae.z_channels, height // vae.downsample, width // vae.downsample)
    if noise.shape != shape:
        size = f"{width}x{height} canvas"
        raise ValueError(f"noise must be of shape {shape} for a {size}, got {tuple(noise.shape)}.")
    canvas = torch.stack([F.pad(p, (0, width - p.shape[2], 0, height - p.shape[1])) for p in images])
    return model.vae.encode(canvas.to(model.device), noise.to(model.device))


def latent_tokens(latents: torch.Tensor, grids: Sequence[tuple[int, int]], patch: int) -> torch.Tensor:
    """Cut each image's own tokens out of padded latents.

    Args:
        latents: [n, z, height, width] from :func:`encode_padded`.
        grids: (rows, columns) of each image in tokens (official ``patchified_vae_latent_shapes``).
        patch: latent cells per token and side.

    Returns:
        [sum of rows * columns, patch * patch * z].

    Raises:
        ValueError: there is not one grid per image, or a grid is larger than the latents.
    """
    if len(grids) != len(latents):
        raise ValueError(f"grids must have {len(latents)} entries, one per image, got {len(grids)}.")
    tokens = [latents.new_empty(0, patch * patch * latents.shape[1])]
    for latent, (rows, columns) in zip(latents, grids, strict=True):
        height, width = rows * patch, columns * patch
        if height > latent.shape[1] or width > latent.shape[2]:
            limit = f"{latent.shape[1]} rows and {latent.shape[2]} columns of latent cells"
            raise ValueError(f"a grid must be at most {limit}, got {height} and {width}.")
        tokens.append(patchify(latent[:, :height, :width], patch))
    return torch.cat(tokens)


def _embed(model: BagelModel, batch: TrainingBatch, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Input hidden states [L, H], in the row order of the batch."""
    weights, device = model.weights, model.device
    text = model.embed_tokens(batch.packed_text_ids.to(device))
    patches, ids = batch.packed_vit_tokens.to(device, model.dtype), batch.packed_vit_position_ids.to(device)
    vit = vision_tower(weights.vit, model.config.vit, patches, ids, list(batch.vit_token_seqlens), training_attention)
    vit = connect(weights.connector, vit) + weights.vit_positions[ids]
    positions = weights.latent_positions[batch.packed_latent_position_ids.to(device)] + weights.vae2llm.bias
    latents = model.embed_latents(x, positions + model.time_embedding(t))
    return torch.cat([text, vit, latents])[batch.token_rows.argsort().to(device)]


def _check_fit(config: BagelConfig, batch: TrainingBatch, latents: torch.Tensor, noise: torch.Tensor) -> None:
    """Raise ValueError if an id is outside the model's tables or a tensor has the wrong shape."""
    side, latent_side = config.vit.max_patches_per_side, config.max_latent_size
    for name, size, table in (
        ("packed_text_ids", config.llm.vocab_size, "tokens of the vocabulary"),
        ("packed_label_ids", config.llm.vocab_size, "tokens of the vocabulary"),
        ("packed_vit_position_ids", side**2, "ViT positions of the model"),
        ("packed_latent_position_ids", latent_side**2, "latent positions of the model"),
        ("packed_position_ids", config.llm.max_position_embeddings, "RoPE positions of the model"),
    ):
        check_range(name, getattr(batch, name), size, table)
    patches, features = len(batch.packed_vit_token_indexes), len(batch.packed_vae_token_indexes)
    for name, tensor, shape in (
        ("packed_vit_tokens", batch.packed_vit_tokens, (patches, config.patch_features)),
        ("latents", latents, (features, config.latent_features)),
        ("noise", noise, (features, config.latent_features)),
    ):
        if tensor.shape != shape:
            raise ValueError(f"{name} must be of shape {shape}, got {tuple(tensor.shape)}.")


def _at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _mean(values: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Mean, optionally weighted. 0 without values, so that a batch without such tokens adds nothing to the total."""
    if not len(values):
        return values.sum()
    return values.mean() if weights is None else (values * weights).sum() / weights.sum()
