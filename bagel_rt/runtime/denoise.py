"""The denoising loop: packed forwards over guidance branches, on static buffers.

All branches of a step run as one packed forward. Branches of one image with equal contexts are computed once. For
example, two of the three branches of BAGEL's official text-to-image defaults are equal. The branches of every step are
known before the first one, so buffers, positions and attention plans are built once. Every step then repeats the same
launches on the same addresses and can be replayed: one CUDA graph for guided steps and one for the others (see
``bagel_rt.runtime.graphs``).

The model's guidance defines the schedule and the update rule (``bagel_rt.runtime.interface``).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from bagel_rt.runtime.batch import ForwardBatch
from bagel_rt.runtime.context import Content, Context
from bagel_rt.runtime.graphs import GraphCache
from bagel_rt.runtime.interface import Guidance, GuidanceStep, Model
from bagel_rt.runtime.plan import Plan, build_plan
from bagel_rt.runtime.slots import KVCache

Branch = tuple[int, Context, Context]
"""(index of the image, context, holder of the slots for the rows: see :meth:`Context.borrow`)."""


C = TypeVar("C", bound=Content, covariant=True)


@dataclass(frozen=True)
class DenoisingTask(Generic[C]):
    """One image to denoise.

    Attributes:
        content: its rows in one branch; those marked ``recomputed`` are embedded again at every step.
        noise: float32 [n, ...], the state before the first step.
        branches: the contexts that guidance combines, the conditional one first.
    """

    content: C
    noise: torch.Tensor
    branches: tuple[Context, ...]


class PackedBranches:
    """One packed forward over branches, in buffers that keep their addresses when it is refilled.

    Attributes:
        sizes, starts: for each branch, the number of its recomputed rows and its first row in the output.
        image_table: int32 [images, 2 + branches]: first state row of an image, number of its rows, first output row of
            each branch. The column of an absent branch repeats the first branch of the image.
        max_rows: the largest number of rows of an image.
    """

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        contents: Sequence[Content],
        branches: Sequence[Branch],
        table: Sequence[Sequence[int | None]],
    ) -> None:
        """
        Args:
            contents: of every image of the batch.
            branches: in the order of the outputs. The caller must keep the holders alive.
            table: for each image, the index of each of its branches in ``branches``. A branch is absent if its index
                is None or past the end.
        """
        self.model, self.cache, self._contents = model, cache, contents
        plan, positions, recomputed = self._plan(branches)
        counts = [int(content.rows(0).recomputed.sum()) for content in contents]
        images = [image for image, _, _ in branches]
        self.sizes = [counts[image] for image in images]
        self.starts = [sum(self.sizes[:branch]) for branch in range(len(images))]
        self.max_rows = max(self.sizes)
        self.image_table = self._image_table(counts, table)
        self._batch = ForwardBatch.from_plan(plan, positions, model.rope)
        hidden = model.embed([contents[image] for image in images])
        self._hidden = hidden[torch.from_numpy(plan.order).to(model.device)]
        # Packed rows of the recomputed rows, branch by branch. If one expert takes them all they are contiguous, and a
        # slice replaces the index tensor.
        packed = np.empty(len(plan.order), dtype=np.int64)
        packed[plan.order] = np.arange(len(packed))
        where = packed[recomputed]
        first = int(where[0])
        contiguous = bool((where == np.arange(first, first + len(where))).all())
        self._where = slice(first, first + len(where)) if contiguous else torch.from_numpy(where).to(model.device)
        # Row of the encoded state that each recomputed row is copied from; None if these are all rows once, in order.
        offsets = np.cumsum([0, *counts])
        source = np.concatenate([np.arange(offsets[image], offsets[image + 1]) for image in images])
        in_order = images == list(range(len(contents)))
        self._source = None if in_order else torch.from_numpy(source).to(model.device)

    def refill(self, branches: Sequence[Branch]) -> None:
        """Switch to other contexts of the same structure: overwrite the plan and positions in place."""
        plan, positions, _ = self._plan(branches)
        self._batch.copy_(ForwardBatch.from_plan(plan, positions, self.model.rope))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Encoded rows of all images [n, H] -> their last hidden states, branch by branch, [R, H].

        Branch b has rows ``starts[b]`` to ``starts[b] + sizes[b]``.
        """
        where, source = self._where, self._source
        if not isinstance(where, slice):
            self._hidden.index_copy_(0, where, rows if source is None else rows.index_select(0, source))
        elif source is None:
            self._hidden[where] = rows
        else:
            torch.index_select(rows, 0, source, out=self._hidden[where])
        hidden = self.model.transformer.forward(self._hidden, self._batch, self.cache)
        return hidden[where] if isinstance(where, slice) else hidden.index_select(0, where)

    def _plan(self, branches: Sequence[Branch]) -> tuple[Plan, np.ndarray, np.ndarray]:
        """The plan; position of every row and whether it is recomputed, in segment order."""
        segments, positions, recomputed = [], [], []
        for image, context, holder in branches:
            rows = self._contents[image].rows(context.position)
            write = holder.key_start + holder.length - len(rows.gen)
            key_start = context.key_start if context.length else write
            segments.append(rows.segment(key_start, context.length, write))
            positions.append(rows.positions)
            recomputed.append(rows.recomputed)
        return build_plan(segments), np.concatenate(positions), np.concatenate(recomputed)

    def _image_table(self, counts: Sequence[int], table: Sequence[Sequence[int | None]]) -> torch.Tensor:
        rows, first = [], 0
        for count, of_image in zip(counts, table, strict=True):
            starts = [None if b is None or b >= len(self.starts) else self.starts[b] for b in of_image]
            rows.append([first, count, *(starts[0] if start is None else start for start in starts)])
            first += count
        return torch.tensor(rows, dtype=torch.int32).to(self.model.device)


@dataclass(frozen=True)
class _Buffers:
    """The static buffers of the steps.

    Attributes:
        state: the tasks' states, concatenated along the first dimension: noise at first, then updated by each step.
        index: int64 [1], the step to run.
        guided, plain: packed forwards of guided steps and of the others; one object if they run the same branches.
        step: the guidance's buffers.
    """

    state: torch.Tensor
    index: torch.Tensor
    guided: PackedBranches
    plain: PackedBranches
    step: GuidanceStep


class Denoiser:
    """The denoising of a batch of images; call :meth:`step` with 0, 1, ... ``len(denoiser) - 1``.

    Use it under ``torch.inference_mode()``.

    Attributes:
        tasks, guidance: the arguments.
        closed: whether the buffers were released, so that another denoising may use them.
    """

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        tasks: Sequence[DenoisingTask[Any]],
        guidance: Guidance,
        graphs: GraphCache | None = None,
        deduplicate: bool = True,
    ) -> None:
        """
        Args:
            guidance: of these tasks.
            graphs: keeps buffers and captured steps for the next denoising of the same structure.
            deduplicate: compute branches of one image whose contexts are equal once.
        """
        self.model, self.cache, self.tasks, self.guidance = model, cache, tasks, guidance
        self._graphs = graphs or GraphCache(None)
        branches, self._branch_of = self._distinct_branches(deduplicate)
        self._holders = [holder for _, _, holder in branches]
        first = branches[: len(tasks)]
        apart = len(branches) > len(first) and not all(guidance.guided)  # some steps run fewer branches
        key = ("denoise", guidance.key, tuple(map(tuple, self._branch_of)), apart)
        self._static = self._graphs.acquire(key, lambda: self._allocate(branches, first if apart else None), self)
        self._buffers = self._static.buffers
        self.closed = False
        self._fill(branches, first)

    def __len__(self) -> int:
        return len(self.guidance)

    @property
    def state(self) -> torch.Tensor:
        """The state of all images, overwritten by every step."""
        return self._buffers.state

    def step(self, index: int) -> None:
        """Run step ``index``: one evaluation of the model and one update of the state."""
        self._go_to(index)
        self._next = index + 1
        guided = self.guidance.guided[index]
        self._graphs.run(self._static, "guided" if guided else "plain", lambda: self._step(guided))

    def close(self) -> None:
        """Release the buffers. Do not read the state afterwards: another denoising may overwrite it."""
        self.closed = True
        self._static.release()

    def images(self) -> tuple[torch.Tensor, ...]:
        """The state of each image, as views."""
        return self.state.split([len(task.noise) for task in self.tasks])

    def estimates(self) -> list[torch.Tensor]:
        """The clean states predicted from the current ones. Call it after a step and before :meth:`close`."""
        return self.guidance.estimates(self.images(), [task.noise for task in self.tasks], self._next)

    def branch_outputs(self, index: int) -> list[tuple[torch.Tensor | None, ...]]:
        """The model's outputs for each image at step ``index``, one per branch; None if the step does not run it."""
        guided = self.guidance.guided[index]
        packed = self._buffers.guided if guided else self._buffers.plain
        outputs = self._evaluate(packed, index).split(packed.sizes)
        return [
            tuple(outputs[b] if b is not None and (guided or n == 0) else None for n, b in enumerate(branches))
            for branches in self._branch_of
        ]

    def outputs_of(self, contexts: Sequence[Context], index: int) -> list[torch.Tensor]:
        """The model's output for each image at step ``index``, with these contexts instead of the guidance branches."""
        branches = [self._borrow(image, context) for image, context in enumerate(contexts)]
        contents = [task.content for task in self.tasks]
        packed = PackedBranches(self.model, self.cache, contents, branches, [[image] for image in range(len(branches))])
        return list(self._evaluate(packed, index).split(packed.sizes))

    def _evaluate(self, packed: PackedBranches, index: int) -> torch.Tensor:
        self._go_to(index)
        buffers = self._buffers
        rows, carry = buffers.step.encode(buffers.state, buffers.index)
        return buffers.step.outputs(packed.forward(rows), carry, packed)

    def _step(self, guided: bool) -> None:
        """Run one step. It reads and writes only static buffers, so that it can be captured."""
        buffers = self._buffers
        packed = buffers.guided if guided else buffers.plain
        rows, carry = buffers.step.encode(buffers.state, buffers.index)
        outputs = buffers.step.outputs(packed.forward(rows), carry, packed)
        buffers.step.update(buffers.state, outputs, packed, buffers.index, guided)
        buffers.index.add_(1)

    def _go_to(self, index: int) -> None:
        if index != self._next:
            self._buffers.index.fill_(index)
            self._next = index

    def _allocate(self, branches: list[Branch], first: list[Branch] | None) -> _Buffers:
        contents, device = [task.content for task in self.tasks], self.model.device
        guided = PackedBranches(self.model, self.cache, contents, branches, self._branch_of)
        plain = guided
        if first is not None:
            plain = PackedBranches(self.model, self.cache, contents, first, self._branch_of)
        shape = (sum(len(task.noise) for task in self.tasks), *self.tasks[0].noise.shape[1:])
        state, index = torch.empty(shape, device=device), torch.zeros(1, dtype=torch.int64, device=device)
        return _Buffers(state, index, guided, plain, self.guidance.allocate())

    def _fill(self, branches: list[Branch], first: list[Branch]) -> None:
        """Copy the noise, the guidance values and the plans of this denoising into the buffers."""
        buffers = self._buffers
        torch.cat([task.noise.to(buffers.state) for task in self.tasks], out=buffers.state)
        self.guidance.fill(buffers.step)
        buffers.guided.refill(branches)
        if buffers.plain is not buffers.guided:
            buffers.plain.refill(first)
        buffers.index.zero_()
        self._next = 0

    def _distinct_branches(self, deduplicate: bool) -> tuple[list[Branch], list[list[int | None]]]:
        """Return the branches to compute, and for each image the index of each of its branches among them.

        The first branches of all images come first. The index is None for a branch that guidance does not use.
        """
        branches: list[Branch] = []
        branch_of: list[list[int | None]] = [[] for _ in self.tasks]
        for number in range(max(len(task.branches) for task in self.tasks)):
            for image, task in enumerate(self.tasks):
                if not self.guidance.uses(image, number):
                    branch_of[image].append(None)
                    continue
                context = task.branches[number]
                present = [b for b in branch_of[image] if b is not None]
                equal = [b for b in present if deduplicate and branches[b][1].same_as(context)]
                if not equal:
                    branches.append(self._borrow(image, context))
                branch_of[image].append(equal[0] if equal else len(branches) - 1)
        return branches, branch_of

    def _borrow(self, image: int, context: Context) -> Branch:
        count = len(self.tasks[image].content.rows(context.position).gen)
        return image, context, context.borrow(count)
