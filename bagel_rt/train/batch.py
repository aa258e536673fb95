"""A packed batch of training samples, and its forward's plan.

A batch packs samples one behind another; a sample is a list of *splits*: a text (mode "causal"), a clean image or a
video ("full"), an image to be denoised ("noise"). Row q sees row k iff both belong to one sample, and k <= q or both
belong to one full or noise split, and k is not in a noise split other than q's own.

Nobody outside a noise split sees it. So a sample's other rows, its *clean* rows, can take the first slots of its range
in a KV cache, in sequence order, and its noise splits the slots behind them; then every row sees a prefix of the clean
rows, and a noised row its own split besides. That is the two-span mask of :mod:`bagel_rt.runtime.plan`, and a training
forward is one packed forward of the runtime.

Sources: Deng et al. 2025 (arXiv:2505.14683) and the official BAGEL data packing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from bagel_rt.runtime.plan import Plan, Segment, build_plan
from bagel_rt.validation import invalid

# Index field -> the fields that give one entry for each of its rows.
_PER_ROW = {
    "packed_text_indexes": ("packed_text_ids",),
    "packed_vit_token_indexes": ("packed_vit_tokens", "packed_vit_position_ids"),
    "packed_vae_token_indexes": ("packed_latent_position_ids", "packed_timesteps"),
    "ce_loss_indexes": ("packed_label_ids", "ce_loss_weights"),
    "mse_loss_indexes": (),
}
MODES = ("causal", "full", "noise")  # the official names of splits
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
            check_range(name, getattr(self, name), len(self), "rows of the batch")
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
                segments.append(Segment("full", experts, start, clean, end))
            else:
                segments.append(Segment(mode, experts, start, clean, start + clean))
                clean += length
            row += length
    return segments


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


def check_range(name: str, ids: torch.Tensor, size: int, things: str) -> None:
    """Raise ValueError, naming ``name``, for ids outside [0, size): there are ``size`` ``things``."""
    outside = ids[(ids < 0) | (ids >= size)]
    if len(outside):
        raise invalid(name, outside[0].item(), f"from 0 to {size - 1}", f"There are {size} {things}")
