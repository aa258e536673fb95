"""The data of the small model: tasks of the world of shapes, as the samples that its runtime would make of them.

    generate    text                                   -> the picture, noised
    edit        picture (clean latents, ViT), text     -> the picture after the edit, noised; then, not having seen it,
                                                          its description, with loss
    ask         picture (ViT), question                -> the answer, with loss; then further questions about it
    describe    picture (ViT), "describe the picture"  -> the description, with loss
    foresee     picture (ViT), instruction             -> the description of the picture after the edit, with loss
    read        text                                   -> what it means in other words, or what follows, with loss

A picture's posterior is encoded once and kept on disk; its latents are sampled anew at each use. Questions and captions
are made anew too, instructions belong to a pair of pictures.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save
from tqdm import tqdm

from bagel_rt.files import atomic_write
from bagel_rt.models.bagel.autoencoder import AutoEncoder
from bagel_rt.models.bagel.config import BagelConfig
from bagel_rt.models.bagel.embed import patchify
from bagel_rt.models.bagel.images import image_to_tensor
from bagel_rt.models.bagel.tokenizer import Tokenizer
from bagel_rt.tiny.examples import Example, make_example, make_questions, make_readings
from bagel_rt.tiny.language import caption, describe
from bagel_rt.tiny.model import SIDE
from bagel_rt.tiny.render import render
from bagel_rt.tiny.scene import Scene, pick
from bagel_rt.train.packing import Clean, Noised, Part, Sample, Text, ViT

_QUESTIONS = (
    7  # of the task "ask", about a picture: its patches would be most of the tokens, answers are all of the loss
)
_NOISED = 3  # timesteps that the picture after an edit is seen at, each time
_SHARD = 512  # examples of a file of posteriors
_PICTURES = 4  # encoded together: more leave a CPU's cache


def pool_example(seed: int, index: int) -> Example:
    """The ``index``-th example of the pool, a function of the seed: two of three are edits, the others scenes."""
    rng = np.random.default_rng((seed, index))
    return make_example(rng, "generate" if index % 3 == 0 else "edit", "train")


def pictures_of(example: Example) -> list[Scene]:
    """What there is to encode of an example, in order."""
    return [scene for scene in (example.before, example.after) if scene is not None]


@torch.inference_mode()
def encode_pool(
    autoencoder: AutoEncoder, folder: Path, size: int, seed: int, seconds: float | None = None, progress: bool = True
) -> bool:
    """Write the posteriors of the pool's pictures; files that are there are left alone.

    Args:
        autoencoder: float32.
        folder: made if it is not there.
        size: examples of the pool.
        seed: of the pool.
        seconds: after which it stops; called again it carries on.
        progress: show a bar on stderr.

    Returns:
        Whether all are there.
    """
    stop = time.monotonic() + (math.inf if seconds is None else seconds)
    folder.mkdir(parents=True, exist_ok=True)
    with tqdm(total=size, unit="example", desc="latents", disable=not progress) as bar:
        for number, file in enumerate(_shard_files(folder, size)):
            indexes = range(number * _SHARD, min((number + 1) * _SHARD, size))
            if not file.exists():
                if time.monotonic() > stop:
                    return False
                scenes = [scene for index in indexes for scene in pictures_of(pool_example(seed, index))]
                with atomic_write(file) as partial:
                    partial.write(save({"posterior": encode_scenes(autoencoder, scenes)}))
            bar.update(len(indexes))
    return True


def encode_scenes(autoencoder: AutoEncoder, scenes: Sequence[Scene]) -> torch.Tensor:
    """Mean and standard deviation of each posterior, neither shifted nor scaled; float16 [n, 2, z, h, w], CPU."""
    posteriors, device = [], next(autoencoder.parameters()).device
    for first in range(0, len(scenes), _PICTURES):
        pixels = torch.stack([pixels_of(scene) for scene in scenes[first : first + _PICTURES]])
        mean, logvar = autoencoder.moments(pixels.to(device))
        posteriors.append(torch.stack([mean, torch.exp(logvar / 2)], dim=1).half().cpu())
    return torch.cat(posteriors)


def pixels_of(scene: Scene) -> torch.Tensor:
    """[3, SIDE, SIDE] in [-1, 1]."""
    return image_to_tensor(render(scene, SIDE))


class Shares(NamedTuple):
    """How often each task is drawn, in proportion."""

    generate: float = 0.0
    edit: float = 0.0
    ask: float = 0.0
    describe: float = 0.0
    foresee: float = 0.0
    read: float = 0.0


class World:
    """Samples of the training split. ``world.draw`` makes one from a generator and from nothing else."""

    def __init__(self, config: BagelConfig, tokenizer: Tokenizer, folder: Path, size: int, seed: int, shares: Shares):
        """
        Args:
            config: of the model; its autoencoder's scale and shift are applied here.
            tokenizer: of the model.
            folder, size, seed: as given to :func:`encode_pool`.
            shares: of the tasks.

        Raises:
            ValueError: the folder holds another pool.
        """
        self.config, self.tokenizer, self.seed = config, tokenizer, seed
        self._limits = np.cumsum(shares) / sum(shares)
        self._posteriors = torch.cat([load_file(file)["posterior"] for file in _shard_files(folder, size)])
        # Example i has its pictures from row _rows[i] on.
        self._rows = np.cumsum([0, *(len(pictures_of(pool_example(seed, index))) for index in range(size))])
        if self._rows[-1] != len(self._posteriors):
            raise ValueError(
                f"{folder} holds {len(self._posteriors)} posteriors, but {size} examples of seed {seed} have "
                f"{self._rows[-1]} pictures: remove the folder, so that it is made anew"
            )
        self._edits = [index for index in range(size) if self._rows[index + 1] - self._rows[index] == 2]

    def draw(self, rng: np.random.Generator) -> Sample:
        """One sample of a random task."""
        tasks = (self.generate, self.edit, self.ask, self.describe, self.foresee, self.read)
        return tasks[int(np.searchsorted(self._limits, rng.random(), side="right"))](rng)

    def generate(self, rng: np.random.Generator) -> Sample:
        """A new caption of any of the pool's pictures."""
        row = int(rng.integers(len(self._posteriors)))
        index = int(np.searchsorted(self._rows, row, side="right")) - 1
        scene = pictures_of(pool_example(self.seed, index))[row - self._rows[index]]
        return generate_sample(self._ids(caption(rng, scene)[0]), self._latents(row, rng))

    def edit(self, rng: np.random.Generator) -> Sample:
        """Any of the pool's edits."""
        index = pick(rng, self._edits)
        row, example = self._rows[index], pool_example(self.seed, index)
        before, after = self._latents(row, rng), self._latents(row + 1, rng)
        shown, text = self._patches(example.before), self._ids(example.text)
        return edit_sample(before, shown, text, after, _NOISED, self._ids(describe(example.after)))

    def ask(self, rng: np.random.Generator) -> Sample:
        """New questions about a new picture."""
        return self._asked(rng, _QUESTIONS)

    def describe(self, rng: np.random.Generator) -> Sample:
        """A new picture, to be described."""
        return self._asked(rng, 1)

    def foresee(self, rng: np.random.Generator) -> Sample:
        """A new picture and a new instruction: what the picture would be after it."""
        example = make_example(rng, "edit", "train")
        return ask_sample(self._patches(example.before), self._encode([(example.text, describe(example.after))]))

    def read(self, rng: np.random.Generator) -> Sample:
        """New texts, and no picture."""
        given, asked = make_readings(rng, "train", _QUESTIONS - 1)
        return read_sample(None if given is None else self._ids(given), self._encode(asked))

    def _asked(self, rng: np.random.Generator, count: int) -> Sample:
        scene, questions = make_questions(rng, "train", count)
        return ask_sample(self._patches(scene), self._encode(questions))

    def _encode(self, questions: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        return [(self._ids(text), self._ids(answer)) for text, answer in questions]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def _patches(self, scene: Scene) -> torch.Tensor:
        return patchify(pixels_of(scene), self.config.vit.patch_size)

    def _latents(self, row: int, rng: np.random.Generator) -> torch.Tensor:
        """Tokens of a sample of a posterior, after shift and scale."""
        vae = self.config.vae
        mean, deviation = self._posteriors[row].float()
        noise = torch.from_numpy(rng.standard_normal(mean.shape, dtype=np.float32))
        latent = (mean + deviation * noise - vae.shift_factor) * vae.scale_factor
        return patchify(latent, self.config.latent_patch_size)


def generate_sample(text: Sequence[int], picture: torch.Tensor) -> Sample:
    """A text, and the picture to be generated: ids without frame, latent tokens [n * n, features]."""
    return Sample([Text(text, droppable=True), Noised(picture, *_grid(picture))])


def edit_sample(
    before: torch.Tensor,
    patches: torch.Tensor,
    text: Sequence[int],
    after: torch.Tensor,
    noised: int = 1,
    description: Sequence[int] = (),
) -> Sample:
    """A picture, as latent tokens and as ViT patches, an instruction, and the picture to be generated.

    With ``noised`` above 1 that many times, each at a timestep of its own: none sees the others, and all that goes
    before, most of the tokens, is computed once. A ``description`` of the picture after the edit comes last, with loss:
    it sees no noised picture, so it must be told from what the noised ones see too.
    """
    shown = [Clean(before, *_grid(before), droppable=True), ViT(patches, *_grid(patches), droppable=True)]
    told = [Text(description, loss=True)] if description else []
    return Sample([*shown, Text(text, droppable=True), *[Noised(after, *_grid(after))] * noised, *told])


def ask_sample(patches: torch.Tensor, questions: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Sample:
    """A picture as ViT patches, and (question, answer to be written) in turn, as ids without frame."""
    return Sample([ViT(patches, *_grid(patches)), *_answered(questions)])


def read_sample(given: Sequence[int] | None, questions: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Sample:
    """A text that comes first, or none, and (text, what follows from it) in turn, as ids without frame."""
    return Sample([*([] if given is None else [Text(given)]), *_answered(questions)])


def _answered(questions: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Part]:
    """Questions and answers in turn, the latter with loss."""
    return [part for text, answer in questions for part in (Text(text), Text(answer, loss=True))]


def _grid(tokens: torch.Tensor) -> tuple[int, int]:
    """(rows, columns) of a square picture."""
    return math.isqrt(len(tokens)), math.isqrt(len(tokens))


def _shard_files(folder: Path, size: int) -> list[Path]:
    return [folder / f"pool-{start:06}.safetensors" for start in range(0, size, _SHARD)]
