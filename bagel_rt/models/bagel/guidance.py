"""Rectified flow with classifier-free guidance by text and by images: BAGEL's schedule, branches and update rule.

Source: semantics of the official sampler (Deng et al. 2025, arXiv:2505.14683); Liu et al. 2022, arXiv:2209.03003.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from bagel_rt.kernels import cfg_euler_step
from bagel_rt.kernels.guidance import RENORMS
from bagel_rt.models.bagel.contents import NoisedImage
from bagel_rt.models.bagel.settings import ImageSettings
from bagel_rt.runtime.denoise import PackedBranches

if TYPE_CHECKING:
    from bagel_rt.models.bagel.model import BagelModel

BRANCHES = ("cond", "no_text", "no_img")
"""The branches of an image, in the order of a task's contexts."""


def schedule(num_timesteps: int, shift: float) -> torch.Tensor:
    """All timesteps from 1 to 0, float32 [num_timesteps]: t = s u / (1 + (s - 1) u) of u = linspace(1, 0).

    The flow ends at the last one; the model is not evaluated there.
    """
    u = torch.linspace(1, 0, num_timesteps)
    return shift * u / (1 + (shift - 1) * u)


def is_guided(t: torch.Tensor, settings: ImageSettings) -> torch.Tensor:
    """Which of the timesteps ``t`` are guided, bool like ``t``."""
    low, high = torch.tensor(settings.cfg_interval)
    # Without text guidance the official code drops image guidance too.
    return (t > low) & (t <= high) & (settings.cfg_text_scale > 1)


def branches_of(settings: ImageSettings, guided: bool = True) -> int:
    """Number of branches of a step if their contexts all differ; 1 without guidance."""
    text = guided and settings.cfg_text_scale > 1
    return 1 + text + (text and settings.cfg_img_scale > 1)


def step_capacity(steps: int) -> int:
    """Capacity of the buffers in steps: a power of two, so that runs of similar length share buffers and graphs."""
    return 1 << max(6, (steps - 1).bit_length())


@dataclass(frozen=True)
class FlowStep:
    """The static inputs of the steps of a batch besides the state. N latent tokens in I images, at most S steps.

    Attributes:
        positions: [N, H], the constant part of the latents' embedding.
        time: [S, schedules, H], time embeddings.
        schedule_of_row: int64 [N], which schedule each token follows; None if there is one.
        cfg_table: float32 [S, I, 5], the ``cfg_table`` argument of ``cfg_euler_step`` for each step.
    """

    model: "BagelModel"
    positions: torch.Tensor
    time: torch.Tensor
    schedule_of_row: torch.Tensor | None
    cfg_table: torch.Tensor

    def encode(self, state: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Latent tokens [N, features] -> [N, H]; the same rows for every branch."""
        time = self.time.index_select(0, index)[0]
        if self.schedule_of_row is not None:
            time = time.index_select(0, self.schedule_of_row)
        return self.model.embed_latents(state, self.positions + time), None

    def outputs(self, hidden: torch.Tensor, carry: None, packed: PackedBranches) -> torch.Tensor:
        """Last hidden states [R, H] -> velocities [R, features]."""
        return self.model.velocity(hidden)

    def update(
        self, state: torch.Tensor, outputs: torch.Tensor, packed: PackedBranches, index: torch.Tensor, guided: bool
    ) -> None:
        """Guidance, renormalization and the Euler step, in place."""
        cfg_table = self.cfg_table.index_select(0, index)[0]
        cfg_euler_step(state, outputs, packed.image_table, cfg_table, packed.max_rows, guided)


class FlowGuidance:
    """The flow of a batch of images. Each has its own settings, with an equal number of timesteps.

    Attributes:
        timesteps: float32 [steps, images] on the host, the t at which each step evaluates the model.
        dts: float32 [steps, images], difference to the next timestep.
        guided: for each step, whether any image is guided.
    """

    def __init__(self, model: "BagelModel", contents: Sequence[NoisedImage], settings: Sequence[ImageSettings]) -> None:
        """
        Raises:
            ValueError: the settings differ in num_timesteps.
        """
        lengths = sorted({one.num_timesteps for one in settings})
        if len(lengths) != 1:
            raise ValueError(
                f"num_timesteps must be equal for all images of a denoising, got {lengths}. Denoise them separately."
            )
        self._model, self._contents, self.settings = model, contents, settings
        self._schedules = list(dict.fromkeys((one.num_timesteps, one.timestep_shift) for one in settings))
        self._schedule_of = [self._schedules.index((one.num_timesteps, one.timestep_shift)) for one in settings]
        points = torch.stack([schedule(one.num_timesteps, one.timestep_shift) for one in settings], dim=1)
        self.timesteps, self.dts = points[:-1], points[:-1] - points[1:]
        self._guided = torch.stack([is_guided(t, one) for t, one in zip(self.timesteps.T, settings, strict=True)], 1)
        self.guided: list[bool] = self._guided.any(1).tolist()
        self._guided_images: list[bool] = self._guided.any(0).tolist()
        self._capacity = step_capacity(len(self))
        self.key: Hashable = (tuple(contents), len(self._schedules), self._capacity)

    def __len__(self) -> int:
        return len(self.dts)

    def uses(self, image: int, branch: int) -> bool:
        """Whether any step of the image runs the branch, an index into ``BRANCHES``."""
        return branch < branches_of(self.settings[image], self._guided_images[image])

    def allocate(self) -> FlowStep:
        """Buffers for images of these sizes; fills those that depend on the sizes only."""
        model = self._model
        positions = torch.cat([model.latent_positions(one.grid_h, one.grid_w) for one in self._contents])
        return FlowStep(
            model,
            positions,
            time=positions.new_zeros(self._capacity, len(self._schedules), positions.shape[1]),
            schedule_of_row=self._schedule_of_row().to(model.device) if len(self._schedules) > 1 else None,
            cfg_table=torch.zeros(self._capacity, len(self._contents), 5, device=model.device),
        )

    def fill(self, step: FlowStep) -> None:
        """Write the schedules and scales into the buffers."""
        steps = len(self)
        for number, points in enumerate(self._schedules):
            step.time[:steps, number] = self._model.time_embedding(schedule(*points)[:-1].to(self._model.device))
        if step.schedule_of_row is not None:
            step.schedule_of_row.copy_(self._schedule_of_row())
        table = torch.empty(steps, len(self.settings), 5)
        table[..., 0] = self.dts
        for image, one in enumerate(self.settings):
            table[:, image, 1] = torch.where(self._guided[:, image], one.cfg_text_scale, 1.0)
            table[:, image, 2] = one.cfg_img_scale
            table[:, image, 3] = one.cfg_renorm_min
            table[:, image, 4] = RENORMS.index(one.cfg_renorm_type)
        step.cfg_table[:steps] = table.to(step.cfg_table.device)

    def estimates(
        self, states: Sequence[torch.Tensor], noises: Sequence[torch.Tensor], next_step: int
    ) -> list[torch.Tensor]:
        """The predicted clean latents of each image, float32 [n, features].

        The prediction z solves state = (1 - t) z + t noise: the straight line from the noise through the state ends in
        z. It is the average of the model's predictions at every step so far, with weight 1 / s' - 1 / s for a step from
        s to s'. At t = 0 it is the state. It is computed from the state and the noise, so steps store nothing for it.
        """
        ends = torch.cat([self.timesteps, torch.zeros_like(self.timesteps[:1])])[next_step].tolist()
        return [(x - t * noise.to(x)) / (1 - t) for x, t, noise in zip(states, ends, noises, strict=True)]

    def _schedule_of_row(self) -> torch.Tensor:
        """Which schedule each latent token follows, int64 [N]."""
        counts = torch.tensor([one.grid_h * one.grid_w for one in self._contents])
        return torch.tensor(self._schedule_of).repeat_interleave(counts)
