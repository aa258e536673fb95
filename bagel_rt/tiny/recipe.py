"""Train the small model of the world of shapes: ``python -m bagel_rt.tiny.recipe OUT``.

Stages, each skipped where its results are in OUT, and resumed where it was stopped:

    tokenizer/     a byte-level BPE of the world's texts
    autoencoder/   trained on the world's pictures, then measured: scale and shift of its latents
    latents/       posteriors of a pool of pictures
    sight/         of the model on questions, descriptions and texts: what it sees and reads, the other tasks build on
    training/      of the model on all tasks, from there on
    model/         the model folder, in the official layout

``curves.png`` and ``report.json`` (seconds of each stage, figures of the autoencoder, bytes of every file) tell of it.
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
from bagel_rt.models.bagel.config import BagelConfig, VAEConfig
from bagel_rt.models.bagel.model import BagelModel
from bagel_rt.models.bagel.tokenizer import Tokenizer
from bagel_rt.tiny.curves import draw_curves
from bagel_rt.tiny.data import Shares, World, encode_pool
from bagel_rt.tiny.examples import texts
from bagel_rt.tiny.model import initialize_, tiny_config
from bagel_rt.tiny.tokenizer import learn_tokenizer, write_tokenizer
from bagel_rt.tiny.train_autoencoder import load_autoencoder, save_autoencoder, train_autoencoder
from bagel_rt.train.autoencoder import AutoencoderSettings
from bagel_rt.train.export import save_checkpoint
from bagel_rt.train.packing import SpecialTokens
from bagel_rt.train.trainer import Trainer, TrainingSettings


@dataclass(frozen=True)
class Recipe:
    """All that decides the model.

    Attributes:
        texts: that the tokenizer is learnt on.
        vocabulary: its size at most.
        vae: shape of the autoencoder.
        autoencoder: its training.
        measured: pictures that scale and shift of its latents, and its reconstructions, are measured on.
        pool: examples whose pictures are encoded once.
        widths: of the model, as :func:`tiny_config` takes them.
        sight: training on questions, descriptions and texts alone.
        training: on all tasks.
        sight_shares, training_shares: of the tasks in either.
        seed: of texts, pool and weights; the settings have their own.
    """

    texts: int = 20_000
    vocabulary: int = 600
    vae: VAEConfig = VAEConfig(ch=32, ch_mult=(2, 1, 1, 2), num_res_blocks=1, z_channels=4)
    autoencoder: AutoencoderSettings = AutoencoderSettings(steps=5_500)
    measured: int = 512
    pool: int = 10_000
    widths: dict[str, int] = field(default_factory=dict)
    sight: TrainingSettings = TrainingSettings(
        steps=3_500, tokens=1024, parts=2, warmup_steps=200, ce_reweighting=True, bfloat16=True
    )
    sight_shares: Shares = Shares(ask=3, describe=1, foresee=1, read=4)
    training: TrainingSettings = TrainingSettings(
        steps=19_500,
        tokens=1024,
        parts=2,
        learning_rate=1.5e-3,
        warmup_steps=200,
        decay_steps=6_500,
        ce_weight=0.25,
        ce_reweighting=True,  # a description's twenty tokens would drown a yes or no
        timestep_shift=4.0,  # what is where is decided near the noise
        bfloat16=True,
    )
    training_shares: Shares = Shares(generate=4, edit=5, ask=3, read=1)
    seed: int = 0


class Run:
    """A recipe carried out in a folder."""

    def __init__(self, folder: Path, recipe: Recipe, progress: bool = True, device: torch.device | str = "cpu"):
        self.folder, self.recipe, self.progress, self.device = folder, recipe, progress, torch.device(device)

    def run(self, seconds: float | None = None) -> bool:
        """Carry on until all is done (True) or ``seconds`` are over (False)."""
        start = time.monotonic()
        for stage in (self._tokenizer, self._autoencoder, self._latents, self._sight, self._training, self._model):
            began = time.monotonic()
            left = None if seconds is None else max(0.0, seconds - (began - start))
            try:
                done = stage(left)
            finally:
                self._report(stage.__name__.strip("_"), time.monotonic() - began)
            if not done:
                return False
        return True

    def _tokenizer(self, seconds: float | None) -> bool:
        folder, rng = self.folder / "tokenizer", np.random.default_rng(self.recipe.seed)
        if not (folder / "generation_config.json").exists():  # the last one that is written
            folder.mkdir(parents=True, exist_ok=True)
            write_tokenizer(folder, learn_tokenizer(texts(rng, self.recipe.texts), self.recipe.vocabulary))
        return True

    def _autoencoder(self, seconds: float | None) -> bool:
        recipe = self.recipe
        return train_autoencoder(
            self.folder / "autoencoder",
            recipe.vae,
            recipe.autoencoder,
            recipe.measured,
            seconds,
            self.progress,
            self.device,
        )

    def _latents(self, seconds: float | None) -> bool:
        autoencoder = load_autoencoder(self.folder / "autoencoder", self.recipe.vae).to(self.device)
        return encode_pool(
            autoencoder, self.folder / "latents", self.recipe.pool, self.recipe.seed, seconds, self.progress
        )

    def _sight(self, seconds: float | None) -> bool:
        return self._train("sight", seconds)

    def _training(self, seconds: float | None) -> bool:
        return self._train("training", seconds)

    def _model(self, seconds: float | None) -> bool:
        trained, folder = self.trainer("training").averaged(), self.folder / "model"
        save_checkpoint(trained, folder, self.folder / "tokenizer")
        save_autoencoder(trained.vae, folder / "ae.safetensors")  # in the place of a float32 one of twice the size
        return True

    def _train(self, stage: str, seconds: float | None) -> bool:
        trainer = self.trainer(stage)
        return trainer.done or trainer.run(seconds, self.progress)

    def trainer(self, stage: str) -> Trainer:
        """Of the stage ``sight``, or of ``training``, which starts from the average of the former's weights."""
        recipe, tokenizer = self.recipe, Tokenizer.from_folder(self.folder / "tokenizer")
        if stage == "sight":
            model = untrained_model(recipe, tokenizer, self.folder / "autoencoder", self.device)
            shares, settings = recipe.sight_shares, recipe.sight
        else:
            model = self.trainer("sight").averaged()
            shares, settings = recipe.training_shares, recipe.training
        world = World(model.config, tokenizer, self.folder / "latents", recipe.pool, recipe.seed, shares)
        return Trainer(model, SpecialTokens.of(tokenizer), world.draw, settings, self.folder / stage)

    def _report(self, stage: str, seconds: float) -> None:
        """Add a stage's time to ``report.json``, bring its figures up to date, and draw the curves."""
        file, measured = self.folder / "report.json", self.folder / "autoencoder" / "ae.json"
        report = json.loads(file.read_text()) if file.exists() else {"seconds": {}}
        report["recipe"] = repr(self.recipe)
        report["seconds"][stage] = round(report["seconds"].get(stage, 0.0) + seconds, 1)
        if measured.exists():
            report["autoencoder"] = json.loads(measured.read_text())
        report["bytes"] = {path.name: path.stat().st_size for path in sorted(self.folder.glob("model/*"))}
        with atomic_write(file) as partial:
            partial.write(json.dumps(report, indent=2).encode())
        draw_curves(self.folder / "curves.png", _curves(self.folder))


def untrained_model(
    recipe: Recipe, tokenizer: Tokenizer, autoencoder: Path, device: torch.device | str = "cpu"
) -> BagelModel:
    """The model before training, float32, with the trained autoencoder of that folder."""
    vae = load_autoencoder(autoencoder, recipe.vae)
    config: BagelConfig = tiny_config(len(tokenizer), vae.config, **recipe.widths)
    markers = (tokenizer.start_of_image, tokenizer.end_of_image)
    model = BagelModel.allocate(config, markers, torch.device(device), torch.float32)
    model.vae.load_state_dict(vae.state_dict())
    initialize_(model, recipe.seed)
    return model


def _curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every positive number in the logs of the trainings, by stage and name."""
    curves = {}
    for stage in ("autoencoder", "sight", "training"):
        log = folder / stage / "log.jsonl"
        for line in log.read_text().splitlines() if log.exists() else ():
            entry = json.loads(line)
            for name, value in entry.items():
                if name != "step" and isinstance(value, float) and value > 0:
                    curves.setdefault(f"{stage}: {name}", []).append((entry["step"], value))
    return curves


def main(
    out: Annotated[Path, typer.Argument(help="Folder of the run; made if it is not there, carried on if it is.")],
    minutes: Annotated[float | None, typer.Option(help="Stop after so many; the same command carries on.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
) -> None:
    """Train the small model of the world of shapes."""
    done = Run(out, Recipe(), device=device).run(None if minutes is None else 60 * minutes)
    typer.echo(f"the model is in {out / 'model'}" if done else f"stopped; carry on with the same command on {out}")


if __name__ == "__main__":
    typer.run(main)
