"""A packed batch of training samples, and the plan of its forward.

A batch is a concatenation of samples. A sample is a list of *splits*: a text (mode "causal"), a clean image or a video
("full"), or an image to denoise ("noise"). Row q attends to row k iff (1) both are in the same sample, (2) k <= q or
both are in the same full or noise split, and (3) k is not in a noise split other than q's own.

No row outside a noise split attends to it. So the *clean* rows of a sample (all others) take the first slots of its
KV-cache range, in sequence order, and the noise splits take the slots after them. Every row then attends to a prefix of
the clean rows, and a noised row also to its own split. This is the two-span mask of :mod:`bagel_rt.runtime.plan`, so a
training forward is one packed forward of the runtime.

Sources: Deng et al. 2025 (arXiv:2505.14683) and the official BAGEL data packing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from bagel_rt.runtime.plan import Plan, Segment, build_plan
from bagel_rt.validation import check, invalid, one_of

# Index field -> the fields with one entry per index.
_PER_ROW = {
    "packed_text_indexes": ("packed_text_ids",),
    "packed_vit_token_indexes": ("packed_vit_tokens", "packed_vit_position_ids"),
    "packed_vae_token_indexes": ("packed_latent_position_ids", "packed_timesteps"),
    "ce_loss_indexes": ("packed_label_ids", "ce_loss_weights"),
    "mse_loss_indexes": (),
}
MODES = ("causal", "full", "noise")  # the official names
_FLOATING = ("packed_vit_tokens", "packed_timesteps", "ce_loss_weights")


@dataclass(frozen=True, eq=False)
class TrainingBatch:
    """One packed batch of L rows, with the official field names. Tensors are on the CPU; indexes are int64.

    Every row is a text token, a ViT token or a VAE token; markers around images are text tokens. Text and ViT rows go
    through the understanding expert, VAE rows through the generation expert. The padding that the official loader
    appends for its attention kernel is omitted.

    Attributes:
        sample_lens: rows per sample; the sum is L.
        split_lens: rows per split; every sample ends at the end of a split.
        attn_modes: "causal", "full" or "noise" per split. (The official packing labels the frames of a noised video as
            one "full" split, to which later rows attend.)
        packed_position_ids: [L] RoPE positions.
        packed_text_indexes, packed_text_ids: [text] row and token id of each text token.
        packed_vit_token_indexes, packed_vit_position_ids: [patches] row and flattened 2-D position of each ViT token.
        packed_vit_tokens: floating [patches, patch features], pixels in [-1, 1].
        vit_token_seqlens: patches per ViT image; the sum is the number of ViT tokens.
        packed_vae_token_indexes, packed_latent_position_ids: [latents] row and flattened position of each VAE token.
        packed_timesteps: floating [latents], before sigmoid and shift; -inf for clean latents.
        ce_loss_indexes, packed_label_ids: [ce] text rows that predict a token, and the token.
        mse_loss_indexes: [mse] rows of the VAE tokens that are not clean, in the order of packed_vae_token_indexes.
        ce_loss_weights: floating [ce], positive weights of the reweighted cross-entropy; or None.

    Raises:
        ValueError: the fields are inconsistent; the message names the field and the entry.
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

    def __post_init__(self) -> None:
        self._check_shapes()
        self._check_rows()
        self._check_losses()

    def __len__(self) -> int:
        """The number of rows L."""
        return sum(self.sample_lens)

    @property
    def token_rows(self) -> torch.Tensor:
        """Rows of all text, then ViT, then VAE tokens: a permutation of [0, L)."""
        return torch.cat([self.packed_text_indexes, self.packed_vit_token_indexes, self.packed_vae_token_indexes])

    @property
    def noised(self) -> torch.Tensor:
        """Which VAE tokens are noised, bool [latents]."""
        return self.packed_timesteps > -torch.inf

    def plan(self) -> Plan:
        """Plan the packed forward, with L slots. ``plan.order`` maps packed rows to rows of the batch."""
        gen = np.zeros(len(self), bool)
        gen[self.packed_vae_token_indexes.numpy()] = True
        return build_plan(training_segments(self.split_lens, self.attn_modes, self.sample_lens, gen))

    def _check_shapes(self) -> None:
        sizes = {"packed_position_ids": (len(self), "row in sample_lens")}
        for name, others in _PER_ROW.items():
            count = len(getattr(self, name))
            sizes |= {name: (count, name), **dict.fromkeys(others, (count, name))}
        for name, (count, source) in sizes.items():
            tensor = getattr(self, name)
            if tensor is None and name == "ce_loss_weights":
                continue
            floating, dims = name in _FLOATING, 2 if name == "packed_vit_tokens" else 1
            if tensor.dim() != dims or not (tensor.is_floating_point() if floating else tensor.dtype == torch.int64):
                kind = "floating-point" if floating else "int64"
                raise ValueError(f"{name} must be a {dims}-D {kind} tensor, got {tuple(tensor.shape)} {tensor.dtype}.")
            if len(tensor) != count:
                raise ValueError(f"{name} must have {count} entries, one per {source}, got {len(tensor)}.")
        lengths, patches = list(self.vit_token_seqlens), len(self.packed_vit_token_indexes)
        if any(length < 1 for length in lengths) or sum(lengths) != patches:
            allowed = f"positive and add up to {patches}, the number of packed_vit_token_indexes"
            raise ValueError(f"vit_token_seqlens must be {allowed}, got {lengths}.")
        _split_samples(self.split_lens, self.attn_modes, self.sample_lens)

    def _check_rows(self) -> None:
        for name in _PER_ROW:
            check_range(name, getattr(self, name), len(self), "rows of the batch")
        counts = np.bincount(self.token_rows.numpy(), minlength=len(self))
        for row in np.flatnonzero(counts != 1)[:1]:
            fields = [name for name in list(_PER_ROW)[:3] if bool((getattr(self, name) == row).any())]
            where = f", in {' and '.join(fields)}" if fields else ""
            raise ValueError(f"row {row} must be in the token indexes once, got {counts[row]} times{where}.")

    def _check_losses(self) -> None:
        stray = ~torch.isin(self.ce_loss_indexes, self.packed_text_indexes)
        if stray.any():
            raise ValueError(f"ce_loss_indexes must be rows of text tokens, got {self.ce_loss_indexes[stray][0]}.")
        if len(self.ce_loss_indexes.unique()) < len(self.ce_loss_indexes):
            raise ValueError("ce_loss_indexes must be unique, got the same row twice. A row predicts one token.")
        if self.ce_loss_weights is not None and not (self.ce_loss_weights > 0).all():
            raise ValueError(f"ce_loss_weights must be > 0, got {self.ce_loss_weights.min().item()}.")
        if (self.packed_timesteps.isnan() | (self.packed_timesteps == torch.inf)).any():
            raise ValueError("packed_timesteps must be finite, or -inf for clean tokens, got NaN or +inf.")
        if not torch.equal(self.mse_loss_indexes, self.packed_vae_token_indexes[self.noised]):
            raise ValueError(
                "mse_loss_indexes must be the rows of the VAE tokens whose packed_timesteps is above -inf, in order "
                f"({int(self.noised.sum())} rows), got {len(self.mse_loss_indexes)} rows."
            )


def training_segments(
    split_lens: Sequence[int], attn_modes: Sequence[str], sample_lens: Sequence[int], gen: np.ndarray
) -> list[Segment]:
    """Convert the splits of a packed batch to plan segments, in order.

    A sample uses the slots of its own row numbers: first its clean rows, then its noise splits in reverse order. A
    noise split at the end of its sample is then adjacent to the rows that it attends to.

    Args:
        split_lens, attn_modes, sample_lens: as in :class:`TrainingBatch`.
        gen: bool [L], True for rows of the generation expert.

    Raises:
        ValueError: a length is not positive, lengths do not add up, a mode is unknown, or ``gen`` does not have L rows.
    """
    samples = _split_samples(split_lens, attn_modes, sample_lens)
    if len(gen) != sum(sample_lens):
        raise ValueError(f"gen must have {sum(sample_lens)} entries, one per row in sample_lens, got {len(gen)}.")
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


def _split_samples(
    split_lens: Sequence[int], attn_modes: Sequence[str], sample_lens: Sequence[int]
) -> list[list[tuple[int, str]]]:
    """(length, mode) of every split of every sample. ValueError if lengths or modes are inconsistent."""
    if len(split_lens) != len(attn_modes):
        raise ValueError(f"attn_modes must have {len(split_lens)} entries, one per split, got {len(attn_modes)}.")
    for name, lengths in (("split_lens", split_lens), ("sample_lens", sample_lens)):
        for number, length in enumerate(lengths):
            if length < 1:
                raise invalid(f"{name}[{number}]", length, "an integer >= 1")
    for number, mode in enumerate(attn_modes):
        check(f"attn_modes[{number}]", mode, one_of(MODES))
    if sum(split_lens) != sum(sample_lens):
        raise ValueError(
            f"split_lens must add up to {sum(sample_lens)}, the sum of sample_lens, got {sum(split_lens)}."
        )
    samples: list[list[tuple[int, str]]] = []
    splits = iter(zip(split_lens, attn_modes, strict=True))
    for number, length in enumerate(sample_lens):
        samples.append([])
        while length > 0:
            samples[-1].append(next(splits))
            length -= samples[-1][-1][0]
        if length < 0:
            raise ValueError(f"sample {number} must end at the end of a split, got an end {-length} rows before it.")
    return samples


def check_range(name: str, ids: torch.Tensor, size: int, things: str) -> None:
    """Raise ValueError if an id is outside [0, size). The message says that there are ``size`` ``things``."""
    outside = ids[(ids < 0) | (ids >= size)]
    if len(outside):
        raise invalid(name, outside[0].item(), f"from 0 to {size - 1}", f"There are {size} {things}")
