"""Rectified-flow denoising: the schedule, the guidance branches and the loop over packed forwards.

All branches of a step run as one packed forward. Branches of one image whose contexts are equal are computed once: the
official text-to-image defaults ask for three of which two are the same. Which branches a step needs is known before the
first step, so buffers, positions and attention plans are made once and every step only overwrites them: a step is the
same launches on the same addresses, one CUDA graph for guided steps and one for the others (see
``bagel_rt.runtime.graphs``).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from bagel_rt.kernels import cfg_euler_step
from bagel_rt.kernels.guidance import RENORMS
from bagel_rt.models.bagel.model import BagelModel
from bagel_rt.models.bagel.settings import ImageSettings
from bagel_rt.runtime.context import Context
from bagel_rt.runtime.graphs import GraphCache
from bagel_rt.runtime.plan import Plan, Segment, build_plan
from bagel_rt.runtime.slots import KVCache


@dataclass(frozen=True)
class ImageTask:
    """One image to denoise.

    Attributes:
        rows, columns: its grid of latent tokens.
        noise: float32 [rows * columns, features], the latent at t = 1.
        cond, no_text, no_img: the contexts of the three guidance branches.
        settings: its schedule and guidance.
    """

    rows: int
    columns: int
    noise: torch.Tensor
    cond: Context
    no_text: Context
    no_img: Context
    settings: ImageSettings


def schedule(num_timesteps: int, shift: float) -> torch.Tensor:
    """All timesteps from 1 to 0, float32 [num_timesteps]: t = s u / (1 + (s - 1) u) of u = linspace(1, 0).

    The last one is where the flow ends, not a place where the model is evaluated.
    """
    u = torch.linspace(1, 0, num_timesteps)
    return shift * u / (1 + (shift - 1) * u)


class PackedBranches:
    """One packed forward over (image, context) pairs, in buffers that keep their addresses when it is refilled."""

    def __init__(self, model: BagelModel, cache: KVCache, grids: Sequence[tuple[int, int]], branches):
        """
        Args:
            grids: (rows, columns) of every image of the batch.
            branches: (index of the image, context, holder of the slots for its rows * columns + 2 tokens, as
                :meth:`Context.borrow` gives it), in the order of the outputs. The caller keeps the holders.
        """
        self.model, self.cache = model, cache
        self._tokens = [rows * columns for rows, columns in grids]
        starts = np.cumsum([0, *self._tokens])
        images = [image for image, _, _ in branches]
        self.sizes = [self._tokens[image] for image in images]
        self.starts = [sum(self.sizes[:branch]) for branch in range(len(images))]
        source = np.concatenate([np.arange(starts[image], starts[image + 1]) for image in images])
        self._source = torch.from_numpy(source).to(model.device)
        self._is_batch = images == list(range(len(grids)))  # every image once, in order: nothing to repeat
        self.rows = model.rows(*self._plan(branches))
        markers = model.embed_markers().repeat(len(branches), 1)
        self._hidden = torch.cat([markers.new_empty(self.rows.G, markers.shape[1]), markers])

    def refill(self, branches) -> None:
        """Take the same images' branches over other contexts."""
        rows = self.model.rows(*self._plan(branches))
        for name in ("cos", "sin", "slots", "limits", "blocks"):
            getattr(self.rows, name).copy_(getattr(rows, name))

    def _plan(self, branches) -> tuple[Plan, np.ndarray]:
        """The plan, and the RoPE position of every row in segment order."""
        segments, positions = [], []
        for image, context, holder in branches:
            length = self._tokens[image] + 2
            gen = np.ones(length, dtype=bool)
            gen[[0, -1]] = False
            write = holder.key_start + holder.length - length
            key_start = context.key_start if context.length else write
            segments.append(Segment("noise", gen, key_start, context.length, write))
            positions.append(np.full(length, context.position))
        return build_plan(segments), np.concatenate(positions)

    def velocities(self, embedded: torch.Tensor) -> torch.Tensor:
        """Embedded latents of all images [sum n, H] -> the velocities of all branches in turn, [R, features].

        Branch b has rows ``starts[b]`` to ``starts[b] + sizes[b]``.
        """
        G = self.rows.G
        if self._is_batch:
            self._hidden[:G] = embedded
        else:
            torch.index_select(embedded, 0, self._source, out=self._hidden[:G])
        hidden = self.model.transformer.forward(self._hidden, self.rows, self.cache)
        return self.model.velocity(hidden[:G])


@dataclass(frozen=True)
class _Buffers:
    """What steps read and write. I images of N latent tokens in all, S steps at most.

    Attributes:
        latents: float32 [N, features], the state.
        positions: [N, H], the constant part of the latents' embedding.
        time: [S, schedules, H], time embeddings.
        schedule_of_row: int64 [N], which schedule each token follows; None if there is one.
        parameters: float32 [S, I, 5], what cfg_euler_step takes at each step.
        step: int64 [1], the step to be done.
        guided, plain: the packed forwards of guided steps and of the others; the same where they do not differ.
        guided_rows, plain_rows: int32 [I, 5], what cfg_euler_step takes of each.
    """

    latents: torch.Tensor
    positions: torch.Tensor
    time: torch.Tensor
    schedule_of_row: torch.Tensor | None
    parameters: torch.Tensor
    step: torch.Tensor
    guided: PackedBranches
    plain: PackedBranches
    guided_rows: torch.Tensor
    plain_rows: torch.Tensor


class Denoiser:
    """The denoising of a batch of images; call :meth:`step` with 0, 1, ... ``len(denoiser) - 1``.

    Each image has settings of its own; only the number of timesteps is common. Use it under ``torch.inference_mode()``.

    Attributes:
        timesteps: float32 [steps, images] on the host, t at which each step evaluates the model.
        dts: float32 [steps, images], from there down to the next.
        guided: for each step, whether any image is guided.
        latents: float32 [sum n, features] on the device, the state, overwritten by every step.
        closed: True once the buffers were given back and may be reused.
    """

    def __init__(
        self,
        model: BagelModel,
        cache: KVCache,
        tasks: Sequence[ImageTask],
        graphs: GraphCache | None = None,
        deduplicate: bool = True,
    ):
        """
        Args:
            graphs: where buffers and captured steps are kept for the next denoising of the same structure.
            deduplicate: compute branches of one image whose contexts are equal once.

        Raises:
            ValueError: numbers of timesteps differ.
        """
        lengths = {task.settings.num_timesteps for task in tasks}
        if len(lengths) != 1:
            raise ValueError(f"images of one denoising have num_timesteps {sorted(lengths)}: denoise them apart")
        self.model, self.tasks = model, tasks
        self._graphs = graphs or GraphCache(None)
        points = torch.stack([schedule(*s) for s in map(_schedule_of, tasks)], dim=1)
        self.timesteps, self.dts = points[:-1], points[:-1] - points[1:]
        guided = torch.stack([_guided(t, task.settings) for t, task in zip(self.timesteps.T, tasks, strict=True)], 1)
        self.guided = guided.any(1).tolist()

        branches, self._branch_of = self._distinct_branches(guided.any(0).tolist(), deduplicate)
        self._holders = [holder for _, _, holder in branches]
        plain = branches[: len(tasks)]
        apart = len(branches) > len(plain) and not all(self.guided)  # some steps run the conditional branches alone
        schedules = list(dict.fromkeys(map(_schedule_of, tasks)))
        capacity = 1 << max(6, (len(self) - 1).bit_length())
        grids = tuple((task.rows, task.columns) for task in tasks)
        key = ("denoise", grids, tuple(map(tuple, self._branch_of)), apart, len(schedules), capacity)

        def make():
            packed = PackedBranches(model, cache, grids, branches)
            alone = PackedBranches(model, cache, grids, plain) if apart else packed
            return self._allocate(capacity, schedules, packed, alone)

        self._workspace = self._graphs.workspace(key, make, self)
        self._buffers, self.closed = self._workspace.buffers, False
        self._fill(schedules, guided, branches, plain)

    def __len__(self) -> int:
        return len(self.dts)

    @property
    def latents(self) -> torch.Tensor:
        return self._buffers.latents

    def step(self, index: int) -> None:
        """Take the latents from ``timesteps[index]`` to the next timestep."""
        self._go_to(index)
        self._next = index + 1
        guided = self.guided[index]
        self._graphs.run(self._workspace, "guided" if guided else "plain", lambda: self._step(guided))

    def close(self) -> None:
        """Give the buffers back; the latents are no longer this denoising's."""
        self.closed = True
        self._workspace.give_back()

    def branch_velocities(self, index: int) -> list[tuple[torch.Tensor | None, ...]]:
        """The model's velocities (cond, no_text, no_img) of each image at ``timesteps[index]``, [n, features] each.

        None stands for a branch that this step's guidance does not use.
        """
        guided = self.guided[index]
        packed = self._buffers.guided if guided else self._buffers.plain
        velocities = packed.velocities(self.embedded(index)).split(packed.sizes)
        return [
            tuple(velocities[b] if b is not None and (guided or kind == 0) else None for kind, b in enumerate(branches))
            for branches in self._branch_of
        ]

    def embedded(self, index: int) -> torch.Tensor:
        """The latents as hidden states at ``timesteps[index]``, [sum n, H]; the same for every branch."""
        self._go_to(index)
        return self._embed()

    def images(self) -> tuple[torch.Tensor, ...]:
        """The latents of each image, [n, features] views of the state."""
        return self.latents.split([task.rows * task.columns for task in self.tasks])

    def estimates(self) -> list[torch.Tensor]:
        """The clean latents that each image is heading for, float32 [n, features]; after a step, and before the close.

        The state is (1 - t) z + t noise of the z at which the straight line from the noise through the state ends. It
        is the average of what the model took for clean at every step so far, a step from s to s' weighing
        1 / s' - 1 / s; at t = 0 it is the state. It takes the state and the noise alone, so that steps keep nothing
        for it.
        """
        ends = torch.cat([self.timesteps, torch.zeros_like(self.timesteps[:1])])[self._next].tolist()
        return [
            (x - t * task.noise.to(x)) / (1 - t) for x, t, task in zip(self.images(), ends, self.tasks, strict=True)
        ]

    def _step(self, guided: bool) -> None:
        """One step, on buffers alone."""
        buffers = self._buffers
        packed, rows = (buffers.guided, buffers.guided_rows) if guided else (buffers.plain, buffers.plain_rows)
        velocities = packed.velocities(self._embed())
        parameters = buffers.parameters.index_select(0, buffers.step)[0]
        cfg_euler_step(buffers.latents, velocities, rows, parameters, max(packed.sizes), guided)
        buffers.step.add_(1)

    def _embed(self) -> torch.Tensor:
        buffers = self._buffers
        time = buffers.time.index_select(0, buffers.step)[0]
        if buffers.schedule_of_row is not None:
            time = time.index_select(0, buffers.schedule_of_row)
        return self.model.embed_latents(buffers.latents, buffers.positions + time)

    def _go_to(self, index: int) -> None:
        if index != self._next:
            self._buffers.step.fill_(index)
            self._next = index

    def _allocate(self, capacity: int, schedules: list, guided: PackedBranches, plain: PackedBranches) -> _Buffers:
        """Buffers of these tasks' structure, with what depends on the structure alone."""
        model, tasks = self.model, self.tasks
        counts = [task.rows * task.columns for task in tasks]
        positions = torch.cat([model.latent_positions(task.rows, task.columns) for task in tasks])
        of_image = torch.tensor([schedules.index(_schedule_of(task)) for task in tasks])
        of_row = of_image.repeat_interleave(torch.tensor(counts)).to(model.device)
        return _Buffers(
            latents=torch.empty(sum(counts), model.config.latent_features, device=model.device),
            positions=positions,
            time=positions.new_zeros(capacity, len(schedules), positions.shape[1]),
            schedule_of_row=of_row if len(schedules) > 1 else None,
            parameters=torch.zeros(capacity, len(tasks), 5, device=model.device),
            step=torch.zeros(1, dtype=torch.int64, device=model.device),
            guided=guided,
            plain=plain,
            guided_rows=self._rows_of_images(guided),
            plain_rows=self._rows_of_images(plain),
        )

    def _rows_of_images(self, packed: PackedBranches) -> torch.Tensor:
        """int32 [I, 5]: first row of each image's latents, their number, first row of each branch's velocities."""
        rows, first = [], 0
        for task, of_image in zip(self.tasks, self._branch_of, strict=True):
            count = task.rows * task.columns
            present = [b if b is not None and b < len(packed.starts) else of_image[0] for b in of_image]
            rows.append([first, count, *(packed.starts[b] for b in present)])
            first += count
        return torch.tensor(rows, dtype=torch.int32).to(self.model.device)

    def _fill(self, schedules: list, guided: torch.Tensor, branches, plain) -> None:
        """Put this run's numbers into the buffers."""
        model, buffers, steps = self.model, self._buffers, len(self)
        torch.cat([task.noise.to(model.device, torch.float32) for task in self.tasks], out=buffers.latents)
        for number, points in enumerate(schedules):
            buffers.time[:steps, number] = model.time_embedding(schedule(*points)[:-1].to(model.device))
        if buffers.schedule_of_row is not None:
            of_image = torch.tensor([schedules.index(_schedule_of(task)) for task in self.tasks])
            counts = torch.tensor([task.rows * task.columns for task in self.tasks])
            buffers.schedule_of_row.copy_(of_image.repeat_interleave(counts))
        parameters = torch.empty(steps, len(self.tasks), 5)
        parameters[..., 0] = self.dts
        for image, task in enumerate(self.tasks):
            settings = task.settings
            parameters[:, image, 1] = torch.where(guided[:, image], settings.cfg_text_scale, 1.0)
            parameters[:, image, 2] = settings.cfg_img_scale
            parameters[:, image, 3] = settings.cfg_renorm_min
            parameters[:, image, 4] = RENORMS.index(settings.cfg_renorm_type)
        buffers.parameters[:steps] = parameters.to(model.device)
        buffers.guided.refill(branches)
        if buffers.plain is not buffers.guided:
            buffers.plain.refill(plain)
        buffers.step.zero_()
        self._next = 0

    def _distinct_branches(self, guided: list[bool], deduplicate: bool):
        """The branches to compute, the conditional one of every image first, and for each image which of them are its
        (cond, no_text, no_img), None for one that guidance does not use."""
        branches, branch_of = [], [[] for _ in self.tasks]
        for kind in ("cond", "no_text", "no_img"):
            for image, task in enumerate(self.tasks):
                used = kind == "cond" or (guided[image] and (kind == "no_text" or task.settings.cfg_img_scale > 1))
                if not used:
                    branch_of[image].append(None)
                    continue
                context = getattr(task, kind)
                twins = [b for b in branch_of[image] if deduplicate and branches[b][1].same_as(context)]
                if not twins:
                    tokens = task.rows * task.columns + 2
                    branches.append((image, context, context.borrow(tokens)))
                branch_of[image].append(twins[0] if twins else len(branches) - 1)
        return branches, branch_of


def _schedule_of(task: ImageTask) -> tuple[int, float]:
    return task.settings.num_timesteps, task.settings.timestep_shift


def _guided(t: torch.Tensor, settings: ImageSettings) -> torch.Tensor:
    """Which of the timesteps are guided, bool like ``t``."""
    low, high = torch.tensor(settings.cfg_interval)
    # Without text guidance the official code drops image guidance too.
    return (t > low) & (t <= high) & (settings.cfg_text_scale > 1)
