"""Train the embedded model on the world of colored shapes: ``python -m bagel_rt.tiny.recipe OUT``.

Finished stages are skipped; a stopped stage is resumed. Each stage writes a folder in OUT:

    tokenizer/       a byte-level BPE of the world's texts
    autoencoder/     trained on the world's images, with the measured scale and shift of its latents
    latents/         posteriors of a pool of images
    understanding/   training on questions, descriptions and texts; the next stage builds on what it learns
    training/        training on all tasks
    model/           the model folder, in the official layout

``report.json`` has the seconds of each stage, the figures of the autoencoder and the size of every model file;
``curves.png`` has the losses.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from bagel_rt.files import atomic_write
from bagel_rt.models.bagel.config import VAEConfig
from bagel_rt.models.bagel.model import BagelModel
from bagel_rt.models.bagel.tokenizer import Tokenizer
from bagel_rt.models.bagel.weights import BagelWeights
from bagel_rt.tiny.curves import draw_curves
from bagel_rt.tiny.data import TaskMixture, TaskSampler, encode_pool
from bagel_rt.tiny.examples import texts
from bagel_rt.tiny.model import initialize_, tiny_config
from bagel_rt.tiny.tokenizer import train_tokenizer, write_tokenizer
from bagel_rt.tiny.train_autoencoder import load_autoencoder, save_autoencoder, train_autoencoder
from bagel_rt.train.autoencoder import AutoencoderSettings
from bagel_rt.train.export import save_checkpoint
from bagel_rt.train.packing import SpecialTokens
from bagel_rt.train.trainer import Trainer, TrainingSettings


@dataclass(frozen=True)
class Recipe:
    """The hyper-parameters of all stages.

    Attributes:
        texts: number of texts that the tokenizer is trained on.
        vocabulary: maximum size of the vocabulary.
        vae: architecture of the autoencoder.
        autoencoder: its training settings.
        eval_images: number of images to measure its latents and reconstructions on.
        pool: number of examples whose images are encoded once.
        model_sizes: keyword arguments of :func:`tiny_config`.
        understanding: settings of the first stage, on questions, descriptions and texts.
        training: settings of the second stage, on all tasks.
        understanding_mixture, training_mixture: sampling weights of the tasks in each stage.
        seed: seed of texts, pool and initial weights; the training settings have their own.
    """

    texts: int = 20_000
    vocabulary: int = 600
    vae: VAEConfig = VAEConfig(ch=32, ch_mult=(2, 1, 1, 2), num_res_blocks=1, z_channels=4)
    autoencoder: AutoencoderSettings = AutoencoderSettings(steps=5_500)
    eval_images: int = 512
    pool: int = 10_000
    model_sizes: dict[str, int] = field(default_factory=dict)
    understanding: TrainingSettings = TrainingSettings(
        steps=3_500, tokens=1024, micro_batches=2, warmup_steps=200, ce_reweighting=True, bfloat16=True
    )
    understanding_mixture: TaskMixture = TaskMixture(ask=3, describe=1, predict_edit=1, text_only=4)
    training: TrainingSettings = TrainingSettings(
        steps=19_500,
        tokens=1024,
        micro_batches=2,
        learning_rate=1.5e-3,
        warmup_steps=200,
        decay_steps=6_500,
        ce_weight=0.25,
        ce_reweighting=True,  # otherwise descriptions of 20 tokens dominate the loss over "yes" and "no"
        timestep_shift=4.0,  # the layout of an image is decided at high noise
        bfloat16=True,
    )
    training_mixture: TaskMixture = TaskMixture(generate=4, edit=5, ask=3, text_only=1)
    seed: int = 0


class RecipeRun:
    """Runs the stages of a recipe in a folder; resumes where a previous run stopped."""

    def __init__(self, folder: Path, recipe: Recipe, progress: bool = True, device: torch.device | str = "cpu"):
        self.folder, self.recipe, self.progress, self.device = folder, recipe, progress, torch.device(device)

    def run(self, seconds: float | None = None) -> bool:
        """Run the remaining stages. Returns whether all are done; False if the time limit was reached."""
        start = time.monotonic()
        for stage in (
            self._tokenizer,
            self._autoencoder,
            self._latents,
            self._understanding,
            self._training,
            self._model,
        ):
            stage_start = time.monotonic()
            remaining = None if seconds is None else max(0.0, seconds - (stage_start - start))
            try:
                done = stage(remaining)
            finally:
                self._report(stage.__name__.strip("_"), time.monotonic() - stage_start)
            if not done:
                return False
        return True

    def _tokenizer(self, seconds: float | None) -> bool:
        folder, rng = self.folder / "tokenizer", np.random.default_rng(self.recipe.seed)
        if not (folder / "generation_config.json").exists():  # the last file written
            folder.mkdir(parents=True, exist_ok=True)
            write_tokenizer(folder, train_tokenizer(texts(rng, self.recipe.texts), self.recipe.vocabulary))
        return True

    def _autoencoder(self, seconds: float | None) -> bool:
        recipe = self.recipe
        return train_autoencoder(
            self.folder / "autoencoder",
            recipe.vae,
            recipe.autoencoder,
            recipe.eval_images,
            seconds,
            self.progress,
            self.device,
        )

    def _latents(self, seconds: float | None) -> bool:
        autoencoder = load_autoencoder(self.folder / "autoencoder", self.recipe.vae).to(self.device)
        return encode_pool(
            autoencoder, self.folder / "latents", self.recipe.pool, self.recipe.seed, seconds, self.progress
        )

    def _understanding(self, seconds: float | None) -> bool:
        return self._train("understanding", seconds)

    def _training(self, seconds: float | None) -> bool:
        return self._train("training", seconds)

    def _model(self, seconds: float | None) -> bool:
        folder = self.folder / "model"
        save_checkpoint(self.trainer("training").averaged(), folder, self.folder / "tokenizer")
        autoencoder = load_autoencoder(self.folder / "autoencoder", self.recipe.vae)
        save_autoencoder(autoencoder, folder / "ae.safetensors")  # float16 replaces float32: half the size
        return True

    def _train(self, stage: str, seconds: float | None) -> bool:
        trainer = self.trainer(stage)
        return trainer.done or trainer.run(seconds, self.progress)

    def trainer(self, stage: str) -> Trainer:
        """The trainer of "understanding", or of "training", which starts from the averaged weights of the former."""
        recipe, tokenizer = self.recipe, Tokenizer.from_folder(self.folder / "tokenizer")
        if stage == "understanding":
            model = untrained_model(recipe, tokenizer, self.folder / "autoencoder", self.device)
            mixture, settings = recipe.understanding_mixture, recipe.understanding
        else:
            model = self.trainer("understanding").averaged()
            mixture, settings = recipe.training_mixture, recipe.training
        sampler = TaskSampler(model.config, tokenizer, self.folder / "latents", recipe.pool, recipe.seed, mixture)
        return Trainer(model, SpecialTokens.of(tokenizer), sampler.draw, settings, self.folder / stage)

    def _report(self, stage: str, seconds: float) -> None:
        """Update ``report.json`` (adding the time of a stage) and the loss curves."""
        file, figures = self.folder / "report.json", self.folder / "autoencoder" / "ae.json"
        report = json.loads(file.read_text()) if file.exists() else {"seconds": {}}
        report["recipe"] = repr(self.recipe)
        report["seconds"][stage] = round(report["seconds"].get(stage, 0.0) + seconds, 1)
        if figures.exists():
            report["autoencoder"] = json.loads(figures.read_text())
        report["bytes"] = {path.name: path.stat().st_size for path in sorted(self.folder.glob("model/*"))}
        with atomic_write(file) as partial:
            partial.write(json.dumps(report, indent=2).encode())
        draw_curves(self.folder / "curves.png", _curves(self.folder))


def untrained_model(
    recipe: Recipe, tokenizer: Tokenizer, autoencoder: Path, device: torch.device | str = "cpu"
) -> BagelModel:
    """The initial float32 model, with the trained autoencoder from a folder."""
    vae = load_autoencoder(autoencoder, recipe.vae)
    config = tiny_config(len(tokenizer), vae.config, **recipe.model_sizes)
    weights = BagelWeights.allocate(config, torch.device(device), torch.float32)
    model = BagelModel(config, weights, vae.to(device), (tokenizer.start_of_image, tokenizer.end_of_image))
    initialize_(model, recipe.seed)
    return model


def _curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """All positive values in the training logs, by stage and name."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for stage in ("autoencoder", "understanding", "training"):
        log = folder / stage / "log.jsonl"
        for line in log.read_text().splitlines() if log.exists() else ():
            entry = json.loads(line)
            for name, value in entry.items():
                if name != "step" and isinstance(value, float) and value > 0:
                    curves.setdefault(f"{stage}: {name}", []).append((entry["step"], value))
    return curves


def main(
    out: Annotated[Path, typer.Argument(help="Folder of the run; an existing run is resumed.")],
    minutes: Annotated[float | None, typer.Option(help="Time limit; the same command resumes the run.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
) -> None:
    """Train the embedded model on the world of colored shapes."""
    done = RecipeRun(out, Recipe(), device=device).run(None if minutes is None else 60 * minutes)
    typer.echo(f"wrote {out / 'model'}" if done else f"stopped; run the same command again to resume in {out}")


if __name__ == "__main__":
    typer.run(main)
