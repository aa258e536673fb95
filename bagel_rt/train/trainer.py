"""The training loop: a step is a function of the seed, its number and the state, so that a run can stop anywhere.

The data of step n is drawn from generators that are seeded with (seed, n, part). What a step changes is the weights,
their average, the optimizer's moments and the step's number, and these are what is saved: a resumed run goes on as if
it had not been stopped.

AdamW: Loshchilov & Hutter 2019 (arXiv:1711.05101), with the official trainer's betas, epsilon and no decay of weights.
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
from bagel_rt.train.packing import Draw, DropRates, SpecialTokens, fill, noised_splits, pack
from bagel_rt.train.parameters import Parameters
from bagel_rt.train.parts import PartProcesses
from bagel_rt.train.run import MOMENTS, TrainingRun, allocate_moments
from bagel_rt.validation import check_fields, checked, integer, number


@dataclass(frozen=True)
class TrainingSettings:
    """What decides a run, beside model and data.

    Attributes:
        steps: of the whole run.
        tokens: rows of a packed batch, at least.
        parts: batches of a step, whose losses and gradients are averaged. On a CPU they are computed side by side, by
            processes that share the threads: the gradients of twice as many rows in 1.1 times the time of one.
        learning_rate: the largest.
        warmup_steps: in which the rate grows linearly from 0.
        decay_steps: the last ones, in which it falls linearly to 0.
        clip: largest global norm of the gradient.
        ema: decay of the average of the weights, a step; while there are few steps, less: (1 + step) / (10 + step).
        ce_weight, mse_weight: of the two losses in the total.
        ce_reweighting: the cross-entropy is the mean over tokens weighted by 1 / sqrt(length of their text), not the
            plain one; the official trainer's switch, off there too.
        timestep_shift: s in t = s u / (1 + (s - 1) u).
        drop: probabilities of dropping conditions.
        seed: of everything that is drawn.
        bfloat16: the forward and its gradient are computed in bfloat16; weights, moments and losses stay float32.

    Raises:
        ValueError: a number out of range.
    """

    steps: int = checked(integer(1))
    tokens: int = checked(integer(1), 4096)
    parts: int = checked(integer(1, 64), 1)
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

    def __post_init__(self):
        check_fields(self)

    def learning_rate_at(self, step: int) -> float:
        """The rate of the step with this number, from 0 on."""
        warm = min(1.0, (step + 1) / max(self.warmup_steps, 1))
        left = min(1.0, (self.steps - step) / max(self.decay_steps, 1)) if self.decay_steps else 1.0
        return self.learning_rate * warm * max(left, 0.0)

    def ema_at(self, step: int) -> float:
        """Decay of the average after the step with this number, from 0 on."""
        return min(self.ema, (1 + step) / (10 + step))


class Trainer(TrainingRun):
    """The training of a model in a folder, resumed if it holds the state of one.

    Attributes:
        parameters: the weights being trained.
    """

    name, shown = "training", ("ce", "mse")

    def __init__(
        self, model: BagelModel, tokens: SpecialTokens, draw: Draw, settings: TrainingSettings, folder: str | Path
    ):
        """
        Args:
            model: where training starts; not changed. Its autoencoder is not used.
            tokens: the markers of texts and pictures.
            draw: makes one sample from a generator, and from nothing else. With ``parts``, forked processes call it.
            settings: of the run; a resumed run may only have other ``steps`` and ``decay_steps``.
            folder: made if it is not there.

        Raises:
            CheckpointError: the folder holds the state of a run of another model or other settings.
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
        self._processes = self._side_by_side() if settings.parts > 1 and model.device.type == "cpu" else None
        self._resume(self._optimizer)

    def run(self, seconds: float | None = None, progress: bool = True, save_every: float = 300.0) -> bool:
        threads = torch.get_num_threads()
        if self._processes is not None:
            torch.set_num_threads(1)  # others would spin between their turns, in the way of the parts
        try:
            return super().run(seconds, progress, save_every)
        finally:
            torch.set_num_threads(threads)
            if self._processes is not None:
                self._processes.close()

    def train_step(self) -> dict:
        settings, begun = self.settings, time.perf_counter()
        if self._processes is None:
            parts = [self._part(self.step, part) for part in range(settings.parts)]
        else:
            parts = self._processes.run(self.step)
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
        losses = {name: sum(getattr(part, name) for part in parts) / settings.parts for name in ("ce", "mse")}
        return {**losses, "norm": float(norm), "rate": rate, "tokens": sum(p.rows for p in parts),
                "seconds": round(time.perf_counter() - begun, 4)}  # fmt: skip

    def _part(self, step: int, part: int) -> "_Part":
        """One batch of a step; its gradients are left where all parts have theirs."""
        settings = self.settings
        batch, latents, noise = self.data(step, part)
        model = self.parameters.model(dtype=torch.bfloat16 if settings.bfloat16 else None)
        losses = training_losses(model, batch, latents, noise, settings.timestep_shift)
        ce = losses.ce_reweighted if settings.ce_reweighting else losses.ce
        total = settings.ce_weight * ce + settings.mse_weight * losses.mse
        # Zeros for what this batch had no use for: AdamW would pass over it.
        gradients = torch.autograd.grad(total, list(self._trained.values()), materialize_grads=True)
        for place, gradient in zip(self._leaves_of(self._gradients[part]), gradients, strict=True):
            place.copy_(gradient)
        return _Part(float(ce.detach()), float(losses.mse.detach()), len(batch))

    def _side_by_side(self) -> PartProcesses:
        """A process for each part of a step, with its share of the threads; what they read and write is shared."""
        for tensor in (*self.parameters.leaves.values(), self._gradients):
            tensor.share_memory_()
        count = self.settings.parts
        return PartProcesses(self._part, count, max(1, torch.get_num_threads() // count))

    def _leaves_of(self, numbers: torch.Tensor) -> list[torch.Tensor]:
        """Views of as many numbers as are trained, in the shapes of the leaves."""
        leaves = self._trained.values()
        views = numbers.split([leaf.numel() for leaf in leaves])
        return [view.view(leaf.shape) for view, leaf in zip(views, leaves, strict=True)]

    def data(self, step: int, part: int = 0) -> tuple[TrainingBatch, torch.Tensor, torch.Tensor]:
        """(batch, clean latents, noise) of a part of the step with this number: a function of the seed and the two."""
        rng = np.random.default_rng((self.settings.seed, step, part))
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        samples = fill(self.draw, self.settings.drop, self.settings.tokens, rng)
        timesteps = torch.randn(noised_splits(samples), generator=generator)
        batch, latents = pack(samples, self.parameters.config, self.tokens, timesteps)
        return batch, latents, torch.randn(latents.shape, generator=generator)

    def averaged(self) -> BagelModel:
        """A model of the averaged weights, float32, that later steps do not change."""
        with torch.no_grad():
            leaves = {**self.parameters.leaves, **self._average}
            return self.parameters.model({name: leaf.detach().clone() for name, leaf in leaves.items()})

    def _identity(self) -> dict:
        settings = {
            name: value for name, value in asdict(self.settings).items() if name not in ("steps", "decay_steps")
        }
        return json.loads(json.dumps(settings))

    def _tensors(self) -> dict[str, torch.Tensor]:
        tensors = {}
        for name, leaf in self._trained.items():
            moments = {kind: self._optimizer.state[leaf][kind] for kind in MOMENTS}
            kinds = {"weight": leaf.detach(), "average": self._average[name], **moments}
            tensors |= {f"{kind}/{name}": tensor for kind, tensor in kinds.items()}
        return tensors

    def _allocate_gradients(self) -> torch.Tensor:
        """[parts, numbers that are trained], of each part of a step."""
        leaves = list(self._trained.values())
        return leaves[0].new_zeros(self.settings.parts, sum(leaf.numel() for leaf in leaves))

    def _update_average(self) -> None:
        weight = 1 - self.settings.ema_at(self.step)
        leaves = [leaf.detach() for leaf in self._trained.values()]
        torch._foreach_lerp_(list(self._average.values()), leaves, weight)


class _Part(NamedTuple):
    """What one batch tells of itself: its losses and its rows."""

    ce: float
    mse: float
    rows: int
