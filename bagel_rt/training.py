"""The training objective on packed sequences: cross-entropy of text tokens, flow matching of latent tokens.

A batch packs samples one behind another; a sample is a list of *splits*: a text (mode "causal"), a clean image or a
video ("full"), an image to be denoised ("noise"). Row q sees row k iff both belong to one sample, and k <= q or both
belong to one full or noise split, and k is not in a noise split other than q's own.

Nobody outside a noise split sees it. So a sample's other rows, its *clean* rows, can take the first slots of its range
in a KV cache, in sequence order, and its noise splits the slots behind them; then every row sees a prefix of the clean
rows, and a noised row its own split besides. That is the two-span mask of :mod:`bagel_rt.plan`, and a training forward
is one packed forward of the runtime.

Sources: Deng et al. 2025 (arXiv:2505.14683) and the official BAGEL data packing and forward; rectified flow: Liu et al.
2022 (arXiv:2209.03003), with the timestep shift of Esser et al. 2024 (arXiv:2403.03206).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from bagel_rt.config import BagelConfig
from bagel_rt.models.bagel.embed import patchify
from bagel_rt.models.bagel.model import BagelModel
from bagel_rt.models.bagel.vit import connect, vision_tower
from bagel_rt.plan import MODES, Plan, Segment, build_plan

# Index field -> the fields that give one entry for each of its rows.
_PER_ROW = {
    "packed_text_indexes": ("packed_text_ids",),
    "packed_vit_token_indexes": ("packed_vit_tokens", "packed_vit_position_ids"),
    "packed_vae_token_indexes": ("packed_latent_position_ids", "packed_timesteps"),
    "ce_loss_indexes": ("packed_label_ids", "ce_loss_weights"),
    "mse_loss_indexes": (),
}
_FLOATING = ("packed_vit_tokens", "packed_timesteps", "ce_loss_weights")


@dataclass(frozen=True, eq=False)
class TrainingBatch:
    """One packed batch of L rows, under the official field names. Tensors live on the host; indexes are int64.

    Every row is a text token, a ViT token or a VAE token; markers around images are text tokens. Text and ViT rows go
    through the understanding expert, VAE rows through the generation expert. Padding that the official loader appends
    for its attention kernel is left out.

    Attributes:
        sample_lens: rows of each sample; they add up to L.
        split_lens: rows of each split; a sample ends where a split ends.
        attn_modes: "causal", "full" or "noise" for each split. (The official packing labels the frames of a noised
            video as one "full" split, which later rows do see.)
        packed_position_ids: [L] RoPE positions.
        packed_text_indexes, packed_text_ids: [text] row and token id of each text token.
        packed_vit_token_indexes, packed_vit_position_ids: [patches] row and flattened 2-D position of each ViT token.
        packed_vit_tokens: floating [patches, patch features], pixels in [-1, 1].
        vit_token_seqlens: patches of each ViT image; they add up to the ViT tokens.
        packed_vae_token_indexes, packed_latent_position_ids: [latents] row and flattened position of each VAE token.
        packed_timesteps: floating [latents], before sigmoid and shift; -inf for clean latents.
        ce_loss_indexes, packed_label_ids: [ce] text rows that predict a token, and the token.
        mse_loss_indexes: [mse] rows of the VAE tokens that are not clean, in the order of packed_vae_token_indexes.
        ce_loss_weights: floating [ce], positive, of the reweighted cross-entropy; or None.

    Raises:
        ValueError: the fields contradict each other; the message names the field and the entry.
    """

    sample_lens: Sequence[int]
    split_lens: Sequence[int]
    attn_modes: Sequence[str]
    packed_position_ids: torch.Tensor
    packed_text_indexes: torch.Tensor
    packed_text_ids: torch.Tensor
    packed_vit_token_indexes: torch.Tensor
    packed_vit_position_ids: torch.Tensor
    packed_vit_tokens: torch.Tensor
    vit_token_seqlens: Sequence[int]
    packed_vae_token_indexes: torch.Tensor
    packed_latent_position_ids: torch.Tensor
    packed_timesteps: torch.Tensor
    ce_loss_indexes: torch.Tensor
    packed_label_ids: torch.Tensor
    mse_loss_indexes: torch.Tensor
    ce_loss_weights: torch.Tensor | None = None

    def __post_init__(self):
        self._check_shapes()
        self._check_rows()
        self._check_losses()

    def __len__(self) -> int:
        """L, the number of rows."""
        return sum(self.sample_lens)

    @property
    def token_rows(self) -> torch.Tensor:
        """Row of every text, then every ViT, then every VAE token: a permutation of [0, L)."""
        return torch.cat([self.packed_text_indexes, self.packed_vit_token_indexes, self.packed_vae_token_indexes])

    @property
    def noised(self) -> torch.Tensor:
        """Which VAE tokens are noised, bool [latents]."""
        return self.packed_timesteps > -torch.inf

    def plan(self) -> Plan:
        """The packed forward of the batch. ``plan.order`` maps packed rows to rows of the batch; L slots."""
        gen = np.zeros(len(self), bool)
        gen[self.packed_vae_token_indexes.numpy()] = True
        return build_plan(training_segments(self.split_lens, self.attn_modes, self.sample_lens, gen))

    def _check_shapes(self) -> None:
        sizes = {"packed_position_ids": (len(self), "rows in sample_lens")}
        for name, others in _PER_ROW.items():
            count = len(getattr(self, name))
            sizes |= {name: (count, name), **{other: (count, name) for other in others}}
        for name, (count, source) in sizes.items():
            tensor = getattr(self, name)
            if tensor is None and name == "ce_loss_weights":
                continue
            floating, dims = name in _FLOATING, 2 if name == "packed_vit_tokens" else 1
            if tensor.dim() != dims or not (tensor.is_floating_point() if floating else tensor.dtype == torch.int64):
                given, wanted = f"{tuple(tensor.shape)} {tensor.dtype}", "floating" if floating else "torch.int64"
                raise ValueError(f"{name} is {given}, must be {dims}-dimensional and {wanted}")
            if len(tensor) != count:
                raise ValueError(f"{name} has {len(tensor)} entries, but there are {count} {source}")
        lengths, patches = list(self.vit_token_seqlens), len(self.packed_vit_token_indexes)
        if any(length < 1 for length in lengths) or sum(lengths) != patches:
            raise ValueError(
                f"vit_token_seqlens is {lengths}, must be positive and add up to the {patches} packed_vit_token_indexes"
            )
        _split_samples(self.split_lens, self.attn_modes, self.sample_lens)

    def _check_rows(self) -> None:
        for name in _PER_ROW:
            _check_range(name, getattr(self, name), len(self), "rows of the batch")
        claims = np.bincount(self.token_rows.numpy(), minlength=len(self))
        for row in np.flatnonzero(claims != 1)[:1]:
            fields = [name for name in list(_PER_ROW)[:3] if bool((getattr(self, name) == row).any())]
            claimed = f"{claims[row]} times, by {' and '.join(fields)}" if fields else "by none of the token indexes"
            raise ValueError(f"row {row} is claimed {claimed}; every row must be one text, ViT or VAE token")

    def _check_losses(self) -> None:
        stray = ~torch.isin(self.ce_loss_indexes, self.packed_text_indexes)
        if stray.any():
            raise ValueError(f"ce_loss_indexes has row {self.ce_loss_indexes[stray][0]}, which is not a text token")
        if len(self.ce_loss_indexes.unique()) < len(self.ce_loss_indexes):
            raise ValueError("ce_loss_indexes has a row twice; a row predicts one token")
        if self.ce_loss_weights is not None and not (self.ce_loss_weights > 0).all():
            raise ValueError("ce_loss_weights has an entry that is not positive")
        if (self.packed_timesteps.isnan() | (self.packed_timesteps == torch.inf)).any():
            raise ValueError("packed_timesteps has a NaN or +inf; allowed are numbers, and -inf for clean tokens")
        if not torch.equal(self.mse_loss_indexes, self.packed_vae_token_indexes[self.noised]):
            raise ValueError(
                "mse_loss_indexes must be the rows of the VAE tokens whose packed_timesteps is above -inf, in order; "
                f"it has {len(self.mse_loss_indexes)} rows, packed_timesteps {int(self.noised.sum())} such entries"
            )


@dataclass(frozen=True, eq=False)
class Losses:
    """What a forward on a :class:`TrainingBatch` gives. Losses are float32, on the model's device.

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
    rows = model.rows(plan, batch.packed_position_ids.numpy())
    hidden = _embed(model, batch, x, t)[order]
    hidden = model.transformer.forward(hidden, rows, model.make_cache(len(batch)))
    last_hidden = model.transformer.final_norm(hidden, plan.G)[order.argsort()]

    logits = F.linear(last_hidden[batch.ce_loss_indexes.to(device)], model.weights.lm_head)
    ce = F.cross_entropy(logits.float(), batch.packed_label_ids.to(device), reduction="none")
    velocity = F.linear(last_hidden[batch.mse_loss_indexes.to(device)], *model.weights.llm2vae)
    mse = (velocity.float() - target[batch.noised.to(device)]).square().mean(dim=1)
    weights = None if batch.ce_loss_weights is None else batch.ce_loss_weights.to(device, torch.float32)
    ce_reweighted = None if weights is None else _mean(ce, weights)
    return Losses(ce, mse, _mean(ce), _mean(mse), ce_reweighted, last_hidden)


def training_segments(
    split_lens: Sequence[int], attn_modes: Sequence[str], sample_lens: Sequence[int], gen: np.ndarray
) -> list[Segment]:
    """The splits of a packed batch as segments of a plan, in order.

    A sample takes as many slots as it has rows, from its first row's number on: first its clean rows, then its noise
    splits, the last one first, so that a noise split which ends its sample lies right behind all that it sees.

    Args:
        split_lens, attn_modes, sample_lens: as in :class:`TrainingBatch`.
        gen: bool [L], which rows the generation expert takes.

    Raises:
        ValueError: lengths that are not positive or do not add up, an unknown mode, gen not of L rows.
    """
    samples = _split_samples(split_lens, attn_modes, sample_lens)
    if len(gen) != sum(sample_lens):
        raise ValueError(f"gen has {len(gen)} entries, but there are {sum(sample_lens)} rows in sample_lens")
    segments, row = [], 0
    for splits in samples:
        start, clean, end = row, 0, row + sum(length for length, _ in splits)
        for length, mode in splits:
            experts = gen[row : row + length]
            if mode == "noise":
                end -= length
                segments.append(Segment(mode, experts, start, clean, end))
            else:
                segments.append(Segment(mode, experts, start, clean, start + clean))
                clean += length
            row += length
    return segments


def flow_timesteps(raw: torch.Tensor, shift: float) -> torch.Tensor:
    """Timesteps t in [0, 1], float32, of raw normal draws: u = sigmoid(raw), t = shift u / (1 + (shift - 1) u).

    -inf gives 0, the clean end of the flow.

    Raises:
        ValueError: shift is not positive.
    """
    if not shift > 0:
        raise ValueError(f"timestep_shift is {shift}, must be positive; 1 leaves the timesteps as they are")
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
    seen = vision_tower(weights.vit, model.config.vit, patches, ids, list(batch.vit_token_seqlens))
    seen = connect(weights.connector, seen) + weights.vit_positions[ids]
    positions = weights.latent_positions[batch.packed_latent_position_ids.to(device)] + weights.vae2llm.bias
    latents = model.embed_latents(x, positions + model.time_embedding(t))
    return torch.cat([text, seen, latents])[batch.token_rows.argsort().to(device)]


def _split_samples(split_lens, attn_modes, sample_lens) -> list[list[tuple[int, str]]]:
    """(length, mode) of every split of every sample. ValueError if lengths or modes are impossible."""
    if len(split_lens) != len(attn_modes):
        raise ValueError(f"attn_modes has {len(attn_modes)} entries, but there are {len(split_lens)} split_lens")
    for name, lengths in (("split_lens", split_lens), ("sample_lens", sample_lens)):
        for number, length in enumerate(lengths):
            if length < 1:
                raise ValueError(f"{name}[{number}] is {length}, must be at least 1")
    for number, mode in enumerate(attn_modes):
        if mode not in MODES:
            raise ValueError(f"attn_modes[{number}] is {mode!r}, must be one of {', '.join(MODES)}")
    if sum(split_lens) != sum(sample_lens):
        raise ValueError(f"split_lens add up to {sum(split_lens)} rows, sample_lens to {sum(sample_lens)}")
    samples, splits = [], iter(zip(split_lens, attn_modes, strict=True))
    for number, length in enumerate(sample_lens):
        samples.append([])
        while length > 0:
            samples[-1].append(next(splits))
            length -= samples[-1][-1][0]
        if length < 0:
            raise ValueError(f"sample {number} ends {-length} rows before the split it ends in; a split has one sample")
    return samples


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
        _check_range(name, getattr(batch, name), size, table)
    patches, features = len(batch.packed_vit_token_indexes), len(batch.packed_vae_token_indexes)
    for name, tensor, shape in (
        ("packed_vit_tokens", batch.packed_vit_tokens, (patches, config.patch_features)),
        ("latents", latents, (features, config.latent_features)),
        ("noise", noise, (features, config.latent_features)),
    ):
        if tensor.shape != shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, must be {shape}")


def _check_range(name: str, ids: torch.Tensor, size: int, things: str) -> None:
    outside = ids[(ids < 0) | (ids >= size)]
    if len(outside):
        raise ValueError(f"{name} has {outside[0]}, but there are {size} {things}: allowed are 0 to {size - 1}")


def _mean(values: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Mean, weighted if need be; 0 of no values, so that a batch without them adds nothing to a total."""
    if not len(values):
        return values.sum()
    return values.mean() if weights is None else (values * weights).sum() / weights.sum()
