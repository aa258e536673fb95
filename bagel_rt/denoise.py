"""Rectified-flow denoising: the schedule, the guidance branches and the loop over packed forwards.

All branches of a step run as one packed forward. Branches of one image whose contexts are equal are computed once: the
official text-to-image defaults ask for three of which two are the same. Which branches a step needs is known before the
first step, so buffers, positions and attention plans are made once and every step only overwrites them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from bagel_rt.cache import KVCache
from bagel_rt.context import Context
from bagel_rt.kernels import guided_step
from bagel_rt.models.bagel.model import BagelModel
from bagel_rt.plan import Segment, build_plan
from bagel_rt.settings import ImageSettings


@dataclass(frozen=True)
class ImageTask:
    """One image to denoise.

    Attributes:
        rows, columns: its grid of latent tokens.
        noise: float32 [rows * columns, features], the latent at t = 1.
        cond, no_text, no_img: the contexts of the three guidance branches.
    """

    rows: int
    columns: int
    noise: torch.Tensor
    cond: Context
    no_text: Context
    no_img: Context


def schedule(num_timesteps: int, shift: float) -> torch.Tensor:
    """All timesteps from 1 to 0, float32 [num_timesteps]: t = s u / (1 + (s - 1) u) of u = linspace(1, 0).

    The last one is where the flow ends, not a place where the model is evaluated.
    """
    u = torch.linspace(1, 0, num_timesteps)
    return shift * u / (1 + (shift - 1) * u)


class PackedBranches:
    """One packed forward over (image, context) pairs, with everything but the latents fixed.

    Args:
        grids: (rows, columns) of every image of the batch.
        branches: (index of the image, context, holder of the slots for its rows * columns + 2 tokens, as
            :meth:`Context.borrow` gives it), in the order of the outputs.
    """

    def __init__(self, model: BagelModel, cache: KVCache, grids: Sequence[tuple[int, int]], branches):
        self.model, self.cache = model, cache
        self.branches = branches  # their holders keep the slots taken
        tokens = [rows * columns for rows, columns in grids]
        starts = np.cumsum([0, *tokens])
        segments, positions, source = [], [], []
        for image, context, holder in branches:
            length = tokens[image] + 2
            gen = np.ones(length, dtype=bool)
            gen[[0, -1]] = False
            write = holder.key_start + holder.length - length
            key_start = context.key_start if context.length else write
            segments.append(Segment("noise", gen, key_start, context.length, write))
            positions.append(np.full(length, context.position))
            source.append(np.arange(starts[image], starts[image + 1]))
        plan = build_plan(segments)
        self.rows = model.rows(plan, np.concatenate(positions))
        self.sizes = [len(rows) for rows in source]
        self._source = torch.from_numpy(np.concatenate(source)).to(model.device)
        self._is_batch = len(branches) == len(grids)  # every image once, in order: nothing to repeat
        markers = model.embed_markers().repeat(len(branches), 1)
        self._hidden = torch.cat([markers.new_empty(plan.G, markers.shape[1]), markers])

    def velocities(self, embedded: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Embedded latents of all images [sum n, H] -> the velocity of each branch, [n, features]."""
        G = self.rows.G
        if self._is_batch:
            self._hidden[:G] = embedded
        else:
            torch.index_select(embedded, 0, self._source, out=self._hidden[:G])
        hidden = self.model.transformer.forward(self._hidden, self.rows, self.cache)
        return self.model.velocity(hidden[:G]).split(self.sizes)


class Denoiser:
    """The denoising of a batch of images under one schedule; call :meth:`step` with 0, 1, ... ``len(denoiser) - 1``.

    Use it under ``torch.inference_mode()``.

    Attributes:
        timesteps: float32 [steps] on the host, t at which each step evaluates the model.
        guided: whether each step runs the guidance branches.
        latents: float32 [sum n, features] on the device, the state, overwritten by every step.
    """

    def __init__(
        self, model: BagelModel, cache: KVCache, tasks: Sequence[ImageTask], settings: ImageSettings, deduplicate=True
    ):
        self.model, self.tasks, self.settings = model, tasks, settings
        points = schedule(settings.num_timesteps, settings.timestep_shift)
        self.timesteps, self.dts = points[:-1], (points[:-1] - points[1:]).tolist()
        low, high = torch.tensor(settings.cfg_interval)
        guides = settings.cfg_text_scale > 1  # without text guidance the official code drops image guidance too
        self.guided = ((self.timesteps > low) & (self.timesteps <= high) & guides).tolist()
        self.latents = torch.cat([task.noise.to(model.device, torch.float32) for task in tasks])

        grids = [(task.rows, task.columns) for task in tasks]
        self._time = model.time_embedding(self.timesteps.to(model.device))
        self._positions = torch.cat([model.latent_positions(*grid) for grid in grids])
        branches, self._branch_of = self._distinct_branches(any(self.guided), deduplicate)
        self._guided = PackedBranches(model, cache, grids, branches)
        plain = branches[: len(tasks)]
        same = len(branches) == len(plain) or all(self.guided)  # then no step runs the conditional branches alone
        self._plain = self._guided if same else PackedBranches(model, cache, grids, plain)

    def __len__(self) -> int:
        return len(self.dts)

    def step(self, index: int) -> None:
        """Evaluate the velocity at ``timesteps[index]`` and move the latents to the next timestep."""
        settings = self.settings
        scales = (settings.cfg_text_scale, settings.cfg_img_scale) if self.guided[index] else (1.0, 1.0)
        renorm = (settings.cfg_renorm_type, settings.cfg_renorm_min)
        for x, velocities in zip(self.images(), self.branch_velocities(index), strict=True):
            x.copy_(guided_step(x, *velocities, *scales, *renorm, self.dts[index]))

    def branch_velocities(self, index: int) -> list[tuple[torch.Tensor | None, ...]]:
        """The model's velocities (cond, no_text, no_img) of each image at ``timesteps[index]``, [n, features] each.

        None stands for a branch that this step's guidance does not use.
        """
        guided = self.guided[index]
        packed = self._guided if guided else self._plain
        velocities = packed.velocities(self.embedded(index))
        return [
            tuple(velocities[b] if b is not None and (guided or kind == 0) else None for kind, b in enumerate(branches))
            for branches in self._branch_of
        ]

    def embedded(self, index: int) -> torch.Tensor:
        """The latents as hidden states at ``timesteps[index]``, [sum n, H]; the same for every branch."""
        return self.model.embed_latents(self.latents, self._positions + self._time[index])

    def images(self) -> tuple[torch.Tensor, ...]:
        """The latents of each image, [n, features] views of the state."""
        return self.latents.split([task.rows * task.columns for task in self.tasks])

    def _distinct_branches(self, guided: bool, deduplicate: bool):
        """The branches to compute, the conditional one of every image first, and for each image which of them are its
        (cond, no_text, no_img), None for one that guidance does not use."""
        branches, branch_of = [], [[] for _ in self.tasks]
        kinds = ["cond"] + ["no_text"] * guided + ["no_img"] * (guided and self.settings.cfg_img_scale > 1)
        for kind in kinds:
            for image, task in enumerate(self.tasks):
                context = getattr(task, kind)
                twins = [b for b in branch_of[image] if deduplicate and branches[b][1].same_as(context)]
                if not twins:
                    tokens = task.rows * task.columns + 2
                    branches.append((image, context, context.borrow(tokens)))
                branch_of[image].append(twins[0] if twins else len(branches) - 1)
        return branches, [of + [None] * (3 - len(of)) for of in branch_of]
