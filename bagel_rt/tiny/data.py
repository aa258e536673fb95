"""Training data of the embedded model: tasks of the world of shapes, packed like the prompts of the runtime.

    generate      text                                   -> the image, noised
    edit          image (clean latents, ViT), text       -> the image after the edit, noised; then its description, with
                                                            loss, which does not attend to the noised image
    ask           image (ViT), question                  -> the answer, with loss; then further questions and answers
    describe      image (ViT), "describe the picture"    -> the description, with loss
    predict_edit  image (ViT), instruction               -> the description of the image after the edit, with loss
    text_only     text                                   -> a paraphrase or a consequence of it, with loss

The posterior of an image is encoded once and stored on disk; its latents are sampled again at each use. Captions and
questions are drawn again too. The instruction of an edit is fixed, because it belongs to a pair of images.
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
from bagel_rt.tiny.examples import (
    EditExample,
    GenerateExample,
    draw_edit,
    draw_generate,
    make_questions,
    make_text_task,
)
from bagel_rt.tiny.language import caption, describe
from bagel_rt.tiny.model import SIDE
from bagel_rt.tiny.render import render
from bagel_rt.tiny.scene import Scene, pick
from bagel_rt.train.packing import Clean, Noised, Part, Sample, Text, ViT

_QUESTIONS_PER_IMAGE = 7  # in the task "ask": only answers have a loss, and one answer is far shorter than an image
_NOISED_COPIES = 3  # copies of the image after an edit in one sample, each at its own timestep
_SHARD_SIZE = 512  # examples per file of posteriors
_IMAGE_BATCH = 4  # images per forward of the autoencoder; larger batches exceed the CPU cache


def pool_example(seed: int, index: int) -> GenerateExample | EditExample:
    """The ``index``-th example of the pool, a function of the seed: every third is a single scene, the rest edits."""
    rng = np.random.default_rng((seed, index))
    return draw_generate(rng, "train") if index % 3 == 0 else draw_edit(rng, "train")


def scenes_of(example: GenerateExample | EditExample) -> list[Scene]:
    """The scenes of an example whose images are encoded: before the edit, if any, and after."""
    return [example.after] if isinstance(example, GenerateExample) else [example.before, example.after]


@torch.inference_mode()
def encode_pool(
    autoencoder: AutoEncoder, folder: Path, size: int, seed: int, seconds: float | None = None, progress: bool = True
) -> bool:
    """Encode the images of the pool and write their posteriors; existing files are kept.

    Args:
        autoencoder: float32.
        folder: created if missing.
        size: number of examples in the pool.
        seed: seed of the pool.
        seconds: time limit; a later call continues.
        progress: show a progress bar on stderr.

    Returns:
        Whether all files are written.
    """
    stop = time.monotonic() + (math.inf if seconds is None else seconds)
    folder.mkdir(parents=True, exist_ok=True)
    with tqdm(total=size, unit="example", desc="latents", disable=not progress) as bar:
        for number, file in enumerate(_shard_files(folder, size)):
            indexes = range(number * _SHARD_SIZE, min((number + 1) * _SHARD_SIZE, size))
            if not file.exists():
                if time.monotonic() > stop:
                    return False
                scenes = [scene for index in indexes for scene in scenes_of(pool_example(seed, index))]
                with atomic_write(file) as partial:
                    partial.write(save({"posterior": encode_scenes(autoencoder, scenes)}))
            bar.update(len(indexes))
    return True


def encode_scenes(autoencoder: AutoEncoder, scenes: Sequence[Scene]) -> torch.Tensor:
    """Mean and standard deviation of each posterior, before shift and scale; float16 [n, 2, z, h, w] on the CPU."""
    posteriors, device = [], next(autoencoder.parameters()).device
    for first in range(0, len(scenes), _IMAGE_BATCH):
        pixels = torch.stack([pixels_of(scene) for scene in scenes[first : first + _IMAGE_BATCH]])
        mean, logvar = autoencoder.moments(pixels.to(device))
        posteriors.append(torch.stack([mean, torch.exp(logvar / 2)], dim=1).half().cpu())
    return torch.cat(posteriors)


def pixels_of(scene: Scene) -> torch.Tensor:
    """Render a scene as pixels [3, SIDE, SIDE] in [-1, 1]."""
    return image_to_tensor(render(scene, SIDE))


class TaskMixture(NamedTuple):
    """Relative sampling weights of the tasks."""

    generate: float = 0.0
    edit: float = 0.0
    ask: float = 0.0
    describe: float = 0.0
    predict_edit: float = 0.0
    text_only: float = 0.0


class TaskSampler:
    """Draws samples of the training split. A sample depends only on the generator passed to :meth:`draw`."""

    def __init__(
        self, config: BagelConfig, tokenizer: Tokenizer, folder: Path, size: int, seed: int, mixture: TaskMixture
    ):
        """
        Args:
            config: the model configuration; scale and shift of its autoencoder are applied to the latents.
            tokenizer: the model's tokenizer.
            folder, size, seed: as passed to :func:`encode_pool`.
            mixture: sampling weights of the tasks.

        Raises:
            ValueError: the folder has the posteriors of another pool.
        """
        self.config, self.tokenizer, self.seed = config, tokenizer, seed
        self._limits = np.cumsum(mixture) / sum(mixture)
        self._posteriors = torch.cat([load_file(file)["posterior"] for file in _shard_files(folder, size)])
        # The images of example i start at row _rows[i] of _posteriors.
        pool = [pool_example(seed, index) for index in range(size)]
        self._rows = np.cumsum([0, *(len(scenes_of(example)) for example in pool)])
        if self._rows[-1] != len(self._posteriors):
            raise ValueError(
                f"{folder} must have {self._rows[-1]} posteriors, for {size} examples of seed {seed}, "
                f"got {len(self._posteriors)}. Remove the folder to encode the pool again."
            )
        rows = zip(self._rows[:-1], pool, strict=True)
        self._edits = [(row, example) for row, example in rows if isinstance(example, EditExample)]

    def draw(self, rng: np.random.Generator) -> Sample:
        """Draw a sample of a random task."""
        tasks = (self.generate, self.edit, self.ask, self.describe, self.predict_edit, self.text_only)
        return tasks[int(np.searchsorted(self._limits, rng.random(), side="right"))](rng)

    def generate(self, rng: np.random.Generator) -> Sample:
        """A random image of the pool with a new caption."""
        row = int(rng.integers(len(self._posteriors)))
        index = int(np.searchsorted(self._rows, row, side="right")) - 1
        scene = scenes_of(pool_example(self.seed, index))[row - self._rows[index]]
        return generate_sample(self._ids(caption(rng, scene)[0]), self._latents(row, rng))

    def edit(self, rng: np.random.Generator) -> Sample:
        """A random edit of the pool."""
        row, example = pick(rng, self._edits)
        before, after = self._latents(row, rng), self._latents(row + 1, rng)
        patches, text = self._patches(example.before), self._ids(example.text)
        return edit_sample(before, patches, text, after, _NOISED_COPIES, self._ids(describe(example.after)))

    def ask(self, rng: np.random.Generator) -> Sample:
        """New questions about a new image."""
        return self._question_sample(rng, _QUESTIONS_PER_IMAGE)

    def describe(self, rng: np.random.Generator) -> Sample:
        """A new image and its description."""
        return self._question_sample(rng, 1)

    def predict_edit(self, rng: np.random.Generator) -> Sample:
        """A new image and a new instruction, with the description of the image after the edit."""
        example = draw_edit(rng, "train")
        return ask_sample(self._patches(example.before), self._encode([(example.text, describe(example.after))]))

    def text_only(self, rng: np.random.Generator) -> Sample:
        """New texts without an image."""
        context, turns = make_text_task(rng, "train", _QUESTIONS_PER_IMAGE - 1)
        return text_sample(None if context is None else self._ids(context), self._encode(turns))

    def _question_sample(self, rng: np.random.Generator, count: int) -> Sample:
        scene, questions = make_questions(rng, "train", count)
        return ask_sample(self._patches(scene), self._encode(questions))

    def _encode(self, questions: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        return [(self._ids(text), self._ids(answer)) for text, answer in questions]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def _patches(self, scene: Scene) -> torch.Tensor:
        return patchify(pixels_of(scene), self.config.vit.patch_size)

    def _latents(self, row: int, rng: np.random.Generator) -> torch.Tensor:
        """Latent tokens of a posterior sample, after shift and scale."""
        vae = self.config.vae
        mean, deviation = self._posteriors[row].float()
        noise = torch.from_numpy(rng.standard_normal(mean.shape, dtype=np.float32))
        latent = (mean + deviation * noise - vae.shift_factor) * vae.scale_factor
        return patchify(latent, self.config.latent_patch_size)


def generate_sample(text: Sequence[int], image: torch.Tensor) -> Sample:
    """A caption (ids without markers) and the image to generate, as latent tokens [n * n, features]."""
    return Sample([Text(text, droppable=True), Noised(image, *_grid(image))])


def edit_sample(
    before: torch.Tensor,
    patches: torch.Tensor,
    text: Sequence[int],
    after: torch.Tensor,
    noised_copies: int = 1,
    description: Sequence[int] = (),
) -> Sample:
    """An image, as latent tokens and as ViT patches, an instruction, and the image to generate.

    Args:
        before, patches, text: the conditions.
        after: latent tokens of the image to generate.
        noised_copies: copies of ``after``, each at its own timestep. They do not attend to each other, and the
            conditions, which are most of the tokens, are computed once for all of them.
        description: a text about the image after the edit, with loss, at the end. It does not attend to the noised
            copies, so the model must derive it from the conditions.
    """
    parts: list[Part] = [
        Clean(before, *_grid(before), droppable=True),
        ViT(patches, *_grid(patches), droppable=True),
        Text(text, droppable=True),
    ]
    parts += [Noised(after, *_grid(after))] * noised_copies
    parts += [Text(description, loss=True)] if description else []
    return Sample(parts)


def ask_sample(patches: torch.Tensor, questions: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Sample:
    """An image as ViT patches, then questions and answers in turn, as ids without markers."""
    return Sample([ViT(patches, *_grid(patches)), *_turns(questions)])


def text_sample(context: Sequence[int] | None, questions: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Sample:
    """An optional context, then texts and answers in turn, as ids without markers."""
    return Sample([*([] if context is None else [Text(context)]), *_turns(questions)])


def _turns(questions: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Part]:
    """Questions and answers in turn; answers have a loss."""
    return [part for text, answer in questions for part in (Text(text), Text(answer, loss=True))]


def _grid(tokens: torch.Tensor) -> tuple[int, int]:
    """(rows, columns) of a square image, in tokens."""
    return math.isqrt(len(tokens)), math.isqrt(len(tokens))


def _shard_files(folder: Path, size: int) -> list[Path]:
    return [folder / f"pool-{start:06}.safetensors" for start in range(0, size, _SHARD_SIZE)]
