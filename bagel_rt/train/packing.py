"""Packing of samples into a :class:`TrainingBatch`, with the layout of the official loader.

A sample is a list of parts. Markers enclose every text (bos, eos) and every image (start and end of image):

    part    rows             mode     RoPE positions   next part's position
    Text    bos, ids, eos    causal   p, p + 1, ...    p + rows
    ViT     markers, patches full     all p            p + 1
    Clean   markers, latents full     all p            p + 1
    Noised  markers, latents noise    all p            p        (its clean copy has the same position)

The frames of a video (``frame_delta``) form one split with one timestep; each frame advances the position by its delta.
Conditions are dropped at random to train the unconditional branches of classifier-free guidance: a dropped text leaves
nothing, a dropped image leaves its position. Timesteps are logit-normal, one per noised split; with several noised
splits in a sample this is diffusion forcing (Chen et al. 2024, arXiv:2407.01392).

Sources: Deng et al. 2025 (arXiv:2505.14683) and the official BAGEL data packing.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from bagel_rt.models.bagel.config import BagelConfig
from bagel_rt.models.bagel.embed import position_ids
from bagel_rt.models.bagel.tokenizer import Tokenizer
from bagel_rt.train.batch import TrainingBatch
from bagel_rt.validation import check, integer, invalid


class SpecialTokens(NamedTuple):
    """Ids of the markers, named as in :class:`bagel_rt.models.bagel.tokenizer.Tokenizer`."""

    bos: int
    eos: int
    start_of_image: int
    end_of_image: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "SpecialTokens":
        """Get the marker ids from a tokenizer."""
        return cls(*(getattr(tokenizer, name) for name in cls._fields))


@dataclass(frozen=True, eq=False)
class Text:
    """A text: ids without bos and eos, which packing adds. With ``loss``, its rows predict the next token."""

    ids: Sequence[int]
    loss: bool = False
    droppable: bool = False


@dataclass(frozen=True, eq=False)
class ViT:
    """An image for the understanding expert: patches [rows * columns, patch features], pixels in [-1, 1]."""

    patches: torch.Tensor
    rows: int
    columns: int
    droppable: bool = False


@dataclass(frozen=True, eq=False)
class Clean:
    """An image for the generation expert: latents [rows * columns, features], after scale and shift.

    With ``frame_delta``, the next part is the next frame of a video, ``frame_delta`` positions later.
    """

    latents: torch.Tensor
    rows: int
    columns: int
    droppable: bool = False
    frame_delta: int | None = None


@dataclass(frozen=True, eq=False)
class Noised:
    """An image to generate: clean latents [rows * columns, features]; the training step adds noise.

    With ``frame_delta``, the next part is the next frame of a video, ``frame_delta`` positions later, at the same
    timestep. Later parts attend to a noised video, which the official packing labels "full", but not to a noised image.
    """

    latents: torch.Tensor
    rows: int
    columns: int
    frame_delta: int | None = None


@dataclass(frozen=True)
class Dropped:
    """A dropped image, which still takes one position."""


Part = Text | ViT | Clean | Noised | Dropped
DrawSample = Callable[[np.random.Generator], "Sample"]


@dataclass(frozen=True, eq=False)
class Sample:
    """A list of parts. ValueError if a tensor does not match its grid, or the next frame of a video is missing."""

    parts: Sequence[Part]

    def __post_init__(self) -> None:
        for number, part in enumerate(self.parts):
            _check_part(number, part, self.parts[number + 1] if number + 1 < len(self.parts) else None)

    def __len__(self) -> int:
        """The number of rows in a batch."""
        return sum(map(_rows, self.parts))


class DropRates(NamedTuple):
    """Probability of dropping each droppable part, by kind; defaults from Deng et al. 2025."""

    text: float = 0.1
    vit: float = 0.5
    clean: float = 0.1


def drop_conditions(sample: Sample, rates: DropRates, rng: np.random.Generator) -> Sample:
    """Drop droppable parts independently at random. The frames of a video are never droppable."""
    probability = {Text: rates.text, ViT: rates.vit, Clean: rates.clean}
    kept: list[Part] = []
    for part in sample.parts:
        if getattr(part, "droppable", False) and rng.random() < probability[type(part)]:
            kept += [] if isinstance(part, Text) else [Dropped()]
        else:
            kept.append(part)
    return replace(sample, parts=kept)


def fill_batch(draw: DrawSample, rates: DropRates, tokens: int, rng: np.random.Generator) -> list[Sample]:
    """Draw samples, with conditions dropped, until they have at least ``tokens`` rows.

    Raises:
        ValueError: ``tokens`` is not positive, or a sample has no rows.
    """
    check("tokens", tokens, integer(1))
    samples, rows = [], 0
    while rows < tokens:
        samples.append(drop_conditions(draw(rng), rates, rng))
        if not len(samples[-1]):
            raise ValueError("a sample must have at least 1 row, got 0. Add a part that is not droppable.")
        rows += len(samples[-1])
    return samples


def noised_splits(samples: Sequence[Sample]) -> int:
    """The number of timesteps that :func:`pack` needs: one per noised image or video."""
    return sum(isinstance(part, Noised) and part.frame_delta is None for sample in samples for part in sample.parts)


def pack(
    samples: Sequence[Sample], config: BagelConfig, tokens: SpecialTokens, timesteps: torch.Tensor
) -> tuple[TrainingBatch, torch.Tensor]:
    """Pack samples into one batch.

    Args:
        samples: each with at least one row.
        config: the model configuration, for position tables and token sizes.
        tokens: ids of the markers.
        timesteps: floating [noised_splits(samples)], before sigmoid and shift; standard normal in training.

    Returns:
        The batch, with weights 1 / sqrt(targets of the text) for the reweighted cross-entropy, and the clean latents
        of all its VAE tokens, [latents, features].

    Raises:
        ValueError: the number of timesteps is wrong, a sample has no rows, or a grid is larger than the model's table.
    """
    if timesteps.shape != (noised_splits(samples),):
        shape = f"({noised_splits(samples)},), one per noised split"
        raise ValueError(f"timesteps must be of shape {shape}, got {tuple(timesteps.shape)}.")
    builder = _Builder(config, tokens, timesteps.tolist())
    for number, sample in enumerate(samples):
        if not len(sample):
            raise ValueError(f"sample {number} must have at least 1 row, got 0. Remove it.")
        builder.add(sample)
    return builder.batch()


def _rows(part: Part) -> int:
    if isinstance(part, Dropped):
        return 0
    return 2 + (len(part.ids) if isinstance(part, Text) else part.rows * part.columns)


def _check_part(number: int, part: Part, following: Part | None) -> None:
    if not isinstance(part, Part):
        kinds = "a Text, ViT, Clean, Noised or Dropped of bagel_rt.train.packing"
        raise ValueError(f"part {number} must be {kinds}, got a {type(part).__name__}.")
    if isinstance(part, ViT | Clean | Noised):
        tensor = part.patches if isinstance(part, ViT) else part.latents
        if part.rows < 1 or part.columns < 1 or tensor.dim() != 2 or len(tensor) != part.rows * part.columns:
            raise ValueError(
                f"the tensor of part {number}, {type(part).__name__}, must be [rows * columns, features] with rows and "
                f"columns >= 1, got {tuple(tensor.shape)} for {part.rows} rows and {part.columns} columns."
            )
    if isinstance(part, Clean | Noised) and part.frame_delta is not None:
        name, kind = f"frame_delta of part {number}", type(part).__name__
        if part.frame_delta < 0:
            raise invalid(name, part.frame_delta, "an integer >= 0")
        if type(following) is not type(part):
            raise invalid(name, part.frame_delta, "None", f"The next part is not a frame of the same kind, {kind}")
        if getattr(part, "droppable", False):
            raise invalid(name, part.frame_delta, "None", f"The part, {kind}, is droppable")


class _Builder:
    """Accumulates the fields of a batch, sample by sample."""

    def __init__(self, config: BagelConfig, tokens: SpecialTokens, timesteps: list[float]):
        self.config, self.tokens, self.timesteps = config, tokens, iter(timesteps)
        self.modes: list[str] = []
        self.sample_lens: list[int] = []
        self.split_lens: list[int] = []
        self.vit_lens: list[int] = []
        self.positions: list[int] = []
        self.text_rows: list[int] = []
        self.text_ids: list[int] = []
        self.vit_rows: list[int] = []
        self.vae_rows: list[int] = []
        self.target_rows: list[int] = []
        self.labels: list[int] = []
        self.weights: list[float] = []
        self.raws: list[float] = []
        self.patches: list[torch.Tensor] = []
        self.latents: list[torch.Tensor] = []
        self.vit_ids: list[torch.Tensor] = []
        self.vae_ids: list[torch.Tensor] = []

    def add(self, sample: Sample) -> None:
        first, position = len(self.positions), 0
        frame = None  # the timestep of the video whose next frame this is
        for part in sample.parts:
            if isinstance(part, Dropped):
                position += 1
            elif isinstance(part, Text):
                position = self._add_text(part, position)
            elif isinstance(part, ViT):
                self._add_vit(part, position)
                position += 1
            else:
                frame = self._add_latents(part, position, frame)
                advance = part.frame_delta
                position += isinstance(part, Clean) if advance is None else advance
        self.sample_lens.append(len(self.positions) - first)

    def _add_text(self, part: Text, position: int) -> int:
        ids, start = [self.tokens.bos, *part.ids, self.tokens.eos], len(self.positions)
        self.text_rows += range(start, start + len(ids))
        self.text_ids += ids
        self.positions += range(position, position + len(ids))
        if part.loss:
            targets = len(ids) - 1
            self.target_rows += range(start, start + targets)
            self.labels += ids[1:]
            self.weights += [targets**-0.5] * targets
        self._add_split(len(ids), "causal")
        return position + len(ids)

    def _add_vit(self, part: ViT, position: int) -> None:
        self.vit_rows += self._frame(part, position)
        self.vit_lens.append(part.rows * part.columns)
        self.patches.append(part.patches)
        self.vit_ids.append(self._ids(part, self.config.vit.max_patches_per_side))
        self._add_split(_rows(part), "full")

    def _add_latents(self, part: Clean | Noised, position: int, video: float | None) -> float | None:
        """Add latents; ``video`` is the timestep if this is a later frame. Returns it for the next frame, else None."""
        raw = video
        if raw is None:
            raw = next(self.timesteps) if isinstance(part, Noised) else -math.inf
        self.vae_rows += self._frame(part, position)
        self.raws += [raw] * (part.rows * part.columns)
        self.latents.append(part.latents)
        self.vae_ids.append(self._ids(part, self.config.max_latent_size))
        if video is not None:
            self.split_lens[-1] += _rows(part)
        else:
            still = isinstance(part, Noised) and part.frame_delta is None
            self._add_split(_rows(part), "noise" if still else "full")
        return None if part.frame_delta is None else raw

    def _frame(self, part: ViT | Clean | Noised, position: int) -> range:
        """Add the markers of an image; returns the rows of the tokens between them."""
        start, end = len(self.positions), len(self.positions) + _rows(part) - 1
        self.text_rows += [start, end]
        self.text_ids += [self.tokens.start_of_image, self.tokens.end_of_image]
        self.positions += [position] * _rows(part)
        return range(start + 1, end)

    def _ids(self, part: ViT | Clean | Noised, side: int) -> torch.Tensor:
        return position_ids(part.rows, part.columns, side, self.config.interpolate_pos)

    def _add_split(self, rows: int, mode: str) -> None:
        self.split_lens.append(rows)
        self.modes.append(mode)

    def batch(self) -> tuple[TrainingBatch, torch.Tensor]:
        """Build the batch and its clean latents."""

        def integers(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int64)

        def joined(tensors: list[torch.Tensor], *empty: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.cat([torch.empty(*empty, dtype=dtype), *tensors])

        raws, vae_rows = torch.tensor(self.raws, dtype=torch.float32), integers(self.vae_rows)
        batch = TrainingBatch(
            sample_lens=self.sample_lens,
            split_lens=self.split_lens,
            attn_modes=self.modes,
            packed_position_ids=integers(self.positions),
            packed_text_indexes=integers(self.text_rows),
            packed_text_ids=integers(self.text_ids),
            packed_vit_token_indexes=integers(self.vit_rows),
            packed_vit_position_ids=joined(self.vit_ids, 0, dtype=torch.int64),
            packed_vit_tokens=joined(self.patches, 0, self.config.patch_features),
            vit_token_seqlens=self.vit_lens,
            packed_vae_token_indexes=vae_rows,
            packed_latent_position_ids=joined(self.vae_ids, 0, dtype=torch.int64),
            packed_timesteps=raws,
            ce_loss_indexes=integers(self.target_rows),
            packed_label_ids=integers(self.labels),
            mse_loss_indexes=vae_rows[raws > -math.inf],
            ce_loss_weights=torch.tensor(self.weights, dtype=torch.float32),
        )
        return batch, joined(self.latents, 0, self.config.latent_features)
