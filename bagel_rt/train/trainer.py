"""The training loop. A step depends only on the seed, the step number and the state, so a run can stop at any step.

The data of step n is drawn from generators seeded with (seed, n, micro_batch). The saved state has the weights, their
moving average, the optimizer moments and the step number: everything that a step changes.

AdamW: Loshchilov & Hutter 2019 (arXiv:1711.05101), with the official trainer's betas and epsilon, without weight decay.
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from bagel_rt.models.bagel.model import BagelModel
from bagel_rt.train.batch import TrainingBatch
from bagel_rt.train.objective import training_losses
from bagel_rt.train.packing import DrawSample, DropRates, SpecialTokens, fill_batch, noised_splits, pack
from bagel_rt.train.parameters import Parameters
from bagel_rt.train.run import MOMENTS, TrainingRun, allocate_moments
from bagel_rt.train.workers import MicroBatchWorkers
from bagel_rt.validation import check_fields, checked, integer, number


@dataclass(frozen=True)
class TrainingSettings:
    """Hyper-parameters of a training run.

    Attributes:
        steps: total number of optimizer steps.
        tokens: minimum number of rows in a packed batch.
        micro_batches: batches per step; their losses and gradients are averaged. On a CPU they run in parallel, in
            processes that share the threads. Two then take 1.1 times as long as one.
        learning_rate: peak value.
        warmup_steps: first steps, in which the learning rate rises linearly from 0.
        decay_steps: last steps, in which the learning rate falls linearly to 0.
        clip: maximum global gradient norm.
        ema: decay of the moving average of the weights, capped at (1 + step) / (10 + step) early in the run.
        ce_weight, mse_weight: weights of the two losses in the total.
        ce_reweighting: weight each token's cross-entropy by 1 / sqrt(length of its text). Off by default, as in the
            official trainer.
        timestep_shift: s in t = s u / (1 + (s - 1) u).
        drop: probabilities of dropping conditions.
        seed: seed of all random draws.
        bfloat16: run forward and backward in bfloat16; weights, moments and losses stay float32.

    Raises:
        ValueError: a value is out of range.
    """

    steps: int = checked(integer(1))
    tokens: int = checked(integer(1), 4096)
    micro_batches: int = checked(integer(1, 64), 1)
    learning_rate: float = checked(number(0, above=True), 1e-3)
    warmup_steps: int = checked(integer(0), 100)
    decay_steps: int = checked(integer(0), 0)
    clip: float = checked(number(0, above=True), 1.0)
    ema: float = checked(number(0, 1), 0.999)
    ce_weight: float = checked(number(0), 1.0)
    mse_weight: float = checked(number(0), 1.0)
    ce_reweighting: bool = False
    timestep_shift: float = checked(number(0, above=True), 1.0)
    drop: DropRates = DropRates()
    seed: int = checked(integer(0), 0)
    bfloat16: bool = False

    def __post_init__(self) -> None:
        check_fields(self)

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        warm = min(1.0, (step + 1) / max(self.warmup_steps, 1))
        left = min(1.0, (self.steps - step) / max(self.decay_steps, 1)) if self.decay_steps else 1.0
        return self.learning_rate * warm * max(left, 0.0)

    def ema_at(self, step: int) -> float:
        """The decay of the moving average after a step, counted from 0."""
        return min(self.ema, (1 + step) / (10 + step))


class Trainer(TrainingRun):
    """Trains a model in a folder; resumes if the folder has a saved state.

    Attributes:
        parameters: the weights being trained.
    """

    name, progress_losses = "training", ("ce", "mse")

    def __init__(
        self, model: BagelModel, tokens: SpecialTokens, draw: DrawSample, settings: TrainingSettings, folder: str | Path
    ):
        """
        Args:
            model: the initial weights; copied. The autoencoder is not used.
            tokens: ids of the markers around texts and images.
            draw: generator -> sample; must depend on the generator only. Called in forked processes if
                ``micro_batches`` is above 1.
            settings: only ``steps`` and ``decay_steps`` may change when a run is resumed.
            folder: created if missing.

        Raises:
            CheckpointError: the folder has a state of another model or other settings.
        """
        super().__init__(folder, settings.steps)
        self.settings, self.tokens, self.draw, self.parameters = settings, tokens, draw, Parameters(model)
        self._trained = self.parameters.trained()
        self._average = {name: leaf.detach().clone() for name, leaf in self._trained.items()}
        self._optimizer = torch.optim.AdamW(
            self._trained.values(), lr=0.0, betas=(0.9, 0.95), eps=1e-15, weight_decay=0.0, fused=True
        )
        allocate_moments(self._optimizer, self._trained.values())
        self._gradients = self._allocate_gradients()
        self._workers = self._make_workers() if settings.micro_batches > 1 and model.device.type == "cpu" else None
        self._resume(self._optimizer)

    def run(self, seconds: float | None = None, progress: bool = True, save_every: float = 300.0) -> bool:
        threads = torch.get_num_threads()
        if self._workers is not None:
            torch.set_num_threads(1)  # idle OpenMP threads of this process would spin and slow down the workers
        try:
            return super().run(seconds, progress, save_every)
        finally:
            torch.set_num_threads(threads)
            if self._workers is not None:
                self._workers.close()

    def train_step(self) -> dict:
        settings, start = self.settings, time.perf_counter()
        if self._workers is None:
            results = [self._compute_micro_batch(self.step, index) for index in range(settings.micro_batches)]
        else:
            results = self._workers.run(self.step)
        for leaf, gradient in zip(self._trained.values(), self._leaves_of(self._gradients.mean(0)), strict=True):
            leaf.grad = gradient
        norm = torch.nn.utils.clip_grad_norm_(self._trained.values(), settings.clip, error_if_nonfinite=True)
        rate = settings.learning_rate_at(self.step)
        self._updating = True
        self._optimizer.param_groups[0]["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._update_average()
        self.step += 1
        self._updating = False
        losses = {name: sum(getattr(result, name) for result in results) / len(results) for name in ("ce", "mse")}
        return {**losses, "norm": float(norm), "rate": rate, "tokens": sum(result.rows for result in results),
                "seconds": round(time.perf_counter() - start, 4)}  # fmt: skip

    def _compute_micro_batch(self, step: int, micro_batch: int) -> "_MicroBatchResult":
        """Forward and backward of one micro-batch. The gradients go to its row of ``_gradients``."""
        settings = self.settings
        batch, latents, noise = self.data(step, micro_batch)
        model = self.parameters.model(dtype=torch.bfloat16 if settings.bfloat16 else None)
        losses = training_losses(model, batch, latents, noise, settings.timestep_shift)
        ce = losses.ce_reweighted if settings.ce_reweighting and losses.ce_reweighted is not None else losses.ce
        total = settings.ce_weight * ce + settings.mse_weight * losses.mse
        # Parameters that this batch does not use get zero gradients: AdamW would skip None.
        gradients = torch.autograd.grad(total, list(self._trained.values()), materialize_grads=True)
        for buffer, gradient in zip(self._leaves_of(self._gradients[micro_batch]), gradients, strict=True):
            buffer.copy_(gradient)
        return _MicroBatchResult(float(ce.detach()), float(losses.mse.detach()), len(batch))

    def _make_workers(self) -> MicroBatchWorkers:
        """One process per micro-batch, sharing the threads equally. Moves weights and gradients to shared memory."""
        for tensor in (*self.parameters.leaves.values(), self._gradients):
            tensor.share_memory_()
        count = self.settings.micro_batches
        return MicroBatchWorkers(self._compute_micro_batch, count, max(1, torch.get_num_threads() // count))

    def _leaves_of(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Views of a flat tensor in the shapes of the trained leaves."""
        leaves = self._trained.values()
        views = flat.split([leaf.numel() for leaf in leaves])
        return [view.view(leaf.shape) for view, leaf in zip(views, leaves, strict=True)]

    def data(self, step: int, micro_batch: int = 0) -> tuple[TrainingBatch, torch.Tensor, torch.Tensor]:
        """(batch, clean latents, noise) of a micro-batch; a function of the seed, the step and the index."""
        rng = np.random.default_rng((self.settings.seed, step, micro_batch))
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        samples = fill_batch(self.draw, self.settings.drop, self.settings.tokens, rng)
        timesteps = torch.randn(noised_splits(samples), generator=generator)
        batch, latents = pack(samples, self.parameters.config, self.tokens, timesteps)
        return batch, latents, torch.randn(latents.shape, generator=generator)

    def averaged(self) -> BagelModel:
        """A float32 model with a copy of the averaged weights."""
        with torch.no_grad():
            leaves = {**self.parameters.leaves, **self._average}
            return self.parameters.model({name: leaf.detach().clone() for name, leaf in leaves.items()})

    def _identity(self) -> dict:
        settings = {
            name: value for name, value in asdict(self.settings).items() if name not in ("steps", "decay_steps")
        }
        return json.loads(json.dumps(settings))

    def _tensors(self) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        for name, leaf in self._trained.items():
            moments = {kind: self._optimizer.state[leaf][kind] for kind in MOMENTS}
            kinds = {"weight": leaf.detach(), "average": self._average[name], **moments}
            tensors |= {f"{kind}/{name}": tensor for kind, tensor in kinds.items()}
        return tensors

    def _allocate_gradients(self) -> torch.Tensor:
        """Zeros [micro-batches, trained parameters]: one flat gradient per micro-batch."""
        leaves = list(self._trained.values())
        return leaves[0].new_zeros(self.settings.micro_batches, sum(leaf.numel() for leaf in leaves))

    def _update_average(self) -> None:
        weight = 1 - self.settings.ema_at(self.step)
        leaves = [leaf.detach() for leaf in self._trained.values()]
        torch._foreach_lerp_(list(self._average.values()), leaves, weight)


class _MicroBatchResult(NamedTuple):
    """Losses and row count of one micro-batch."""

    ce: float
    mse: float
    rows: int
