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
from bagel_rt.train.attention import training_attention
from bagel_rt.train.batch import TrainingBatch, check_range
from bagel_rt.validation import check, number


@dataclass(frozen=True, eq=False)
class Losses:
    """What a forward on a :class:`TrainingBatch` gives. Losses are float32 or wider, on the model's device.

    Attributes:
        ce_per_token: [ce] cross-entropy at each of ``ce_loss_indexes``, in nats.
        mse_per_token: [mse] squared velocity error at each of ``mse_loss_indexes``, mean over the latent's features.
        ce, mse: scalar means over tokens; 0 where there is no token.
        ce_reweighted: mean weighted by ``ce_loss_weights``; None without weights.
        last_hidden: [L, H] after the final norm, in the batch's row order.
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
    """Both losses of one packed batch.

    Args:
        latents: [latents, features] clean latent tokens, as :func:`latent_tokens` gives them, noised here.
        noise: [latents, features] standard normal; clean tokens ignore theirs.
        timestep_shift: s in t = s u / (1 + (s - 1) u), u = sigmoid(packed_timesteps); positive.

    Raises:
        ValueError: the batch does not fit the model, or latents and noise the batch; the message names the offender.
    """
    _check_fit(model.config, batch, latents, noise)
    device = model.device
    t = flow_timesteps(batch.packed_timesteps, timestep_shift).to(device)
    x, target = flow_pair(latents.to(device), noise.to(device), t)

    plan = batch.plan()
    order = torch.from_numpy(plan.order).to(device)
    rows = ForwardBatch.from_plan(plan, batch.packed_position_ids.numpy(), model.rope)
    hidden = _embed(model, batch, x, t)[order]
    hidden = model.transformer.forward(hidden, rows, _Slots(model, len(batch)), training_attention)
    last_hidden = model.transformer.final_norm(hidden, plan.G)[order.argsort()]

    logits = F.linear(last_hidden[batch.ce_loss_indexes.to(device)], model.weights.lm_head)
    ce = F.cross_entropy(_wide(logits), batch.packed_label_ids.to(device), reduction="none")
    velocity = F.linear(last_hidden[batch.mse_loss_indexes.to(device)], *model.weights.llm2vae)
    mse = (_wide(velocity) - target[batch.noised.to(device)]).square().mean(dim=1)
    weights = None if batch.ce_loss_weights is None else batch.ce_loss_weights.to(device, torch.float32)
    ce_reweighted = None if weights is None else _mean(ce, weights)
    return Losses(ce, mse, _mean(ce), _mean(mse), ce_reweighted, last_hidden)


class _Slots:
    """In place of a KV cache: keys and values of one forward. Every layer has its own, for autograd keeps them."""

    def __init__(self, model: BagelModel, slots: int):
        llm = model.config.llm
        self._like = torch.empty(slots, llm.num_kv_heads, llm.head_dim, dtype=model.dtype, device=model.device)

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.empty_like(self._like), torch.empty_like(self._like)


def flow_timesteps(raw: torch.Tensor, shift: float) -> torch.Tensor:
    """Timesteps t in [0, 1], float32, of raw normal draws: u = sigmoid(raw), t = shift u / (1 + (shift - 1) u).

    -inf gives 0, the clean end of the flow.

    Raises:
        ValueError: shift is not positive.
    """
    check("timestep_shift", shift, number(0, above=True, remedy="1 leaves the timesteps as they are"))
    u = raw.float().sigmoid()
    return shift * u / (1 + (shift - 1) * u)


def flow_pair(latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(x, target), float32 [n, features]: x = (1 - t) z + t noise at timesteps [n], and the velocity noise - z."""
    z, noise, t = latents.float(), noise.float(), t[:, None]
    return (1 - t) * z + t * noise, noise - z


def encode_padded(model: BagelModel, pictures: Sequence[torch.Tensor], noise: torch.Tensor) -> torch.Tensor:
    """Encode the pictures of a batch together, as the official trainer does.

    All lie in the top left corner of a common canvas of zeros (grey). The padding reaches into the latents of smaller
    pictures, so this is not the same as encoding one by one.

    Args:
        pictures: [3, height, width] each, in [-1, 1]; at least one. Sides are multiples of the autoencoder's stride.
        noise: [n, z, canvas height / stride, canvas width / stride], for the sample of the posterior.

    Returns:
        Latents [n, z, canvas height / stride, canvas width / stride] after shift and scale, float32.

    Raises:
        ValueError: no pictures, or noise of another shape.
    """
    if not pictures:
        raise ValueError("pictures is empty: a batch without images has no latents to encode")
    height, width = (max(picture.shape[axis] for picture in pictures) for axis in (1, 2))
    vae = model.config.vae
    shape = (len(pictures), vae.z_channels, height // vae.downsample, width // vae.downsample)
    if noise.shape != shape:
        raise ValueError(f"noise is {tuple(noise.shape)}, must be {shape} for a canvas of {height} x {width} pixels")
    canvas = torch.stack([F.pad(p, (0, width - p.shape[2], 0, height - p.shape[1])) for p in pictures])
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
        ValueError: another number of grids than images, or a grid larger than the latents.
    """
    if len(grids) != len(latents):
        raise ValueError(f"{len(grids)} grids for the latents of {len(latents)} images")
    tokens = [latents.new_empty(0, patch * patch * latents.shape[1])]
    for latent, (rows, columns) in zip(latents, grids, strict=True):
        height, width = rows * patch, columns * patch
        if height > latent.shape[1] or width > latent.shape[2]:
            raise ValueError(f"a grid of {height} x {width} cells exceeds latents of {tuple(latent.shape)}")
        tokens.append(patchify(latent[:, :height, :width], patch))
    return torch.cat(tokens)


def _embed(model: BagelModel, batch: TrainingBatch, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Hidden states of every row of the batch, in its order, [L, H]."""
    weights, device = model.weights, model.device
    text = model.embed_tokens(batch.packed_text_ids.to(device))
    patches, ids = batch.packed_vit_tokens.to(device, model.dtype), batch.packed_vit_position_ids.to(device)
    seen = vision_tower(weights.vit, model.config.vit, patches, ids, list(batch.vit_token_seqlens), training_attention)
    seen = connect(weights.connector, seen) + weights.vit_positions[ids]
    positions = weights.latent_positions[batch.packed_latent_position_ids.to(device)] + weights.vae2llm.bias
    latents = model.embed_latents(x, positions + model.time_embedding(t))
    return torch.cat([text, seen, latents])[batch.token_rows.argsort().to(device)]


def _check_fit(config: BagelConfig, batch: TrainingBatch, latents: torch.Tensor, noise: torch.Tensor) -> None:
    """Refuse a batch that points outside the model's tables, and tensors of another shape than the batch asks for."""
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
            raise ValueError(f"{name} is {tuple(tensor.shape)}, must be {shape}")


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _mean(values: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Mean, weighted if need be; 0 of no values, so that a batch without them adds nothing to a total."""
    if not len(values):
        return values.sum()
    return values.mean() if weights is None else (values * weights).sum() / weights.sum()
