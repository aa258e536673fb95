"""Guidance with one norm for a whole batch of images, as the official ``generate_image`` takes it.

Its renormalization "global" divides two norms over all latents of the call. The product takes them over each image, so
that an image does not depend on its batch.
"""

from collections.abc import Sequence
from dataclasses import fields

import torch

from bagel_rt.kernels import cfg_euler_step
from bagel_rt.models.bagel.contents import NoisedImage
from bagel_rt.models.bagel.guidance import FlowGuidance, FlowStep
from bagel_rt.models.bagel.model import BagelModel
from bagel_rt.models.bagel.settings import ImageSettings
from bagel_rt.runtime.denoise import DenoisingTask, PackedBranches


class _BatchStep(FlowStep):
    """The buffers of :class:`BatchGuidance`."""

    def update(
        self, state: torch.Tensor, outputs: torch.Tensor, packed: PackedBranches, index: torch.Tensor, guided: bool
    ) -> None:
        """Take the Euler step as if the batch were one image: its rows follow each other in every branch."""
        table = packed.image_table[:1].clone()
        table[:, 1] = len(state)  # first row, number of rows, first output row of each branch
        cfg_euler_step(state, outputs, table, self.cfg_table.index_select(0, index)[0, :1], len(state), guided)


class BatchGuidance(FlowGuidance):
    """The flow of images of equal settings.

    Every image must run the same branches: create the ``Denoiser`` with ``deduplicate=False``.
    """

    def __init__(self, model: BagelModel, contents: Sequence[NoisedImage], settings: Sequence[ImageSettings]) -> None:
        super().__init__(model, contents, settings)
        self.key = ("batch", self.key)  # other steps than those of FlowGuidance

    def allocate(self) -> FlowStep:
        """Buffers for images of these sizes."""
        step = super().allocate()
        return _BatchStep(**{field.name: getattr(step, field.name) for field in fields(step)})


def official_guidance(model: BagelModel, tasks: Sequence[DenoisingTask], settings: ImageSettings) -> FlowGuidance:
    """The guidance of images that the official code denoises together, with the same settings."""
    one_norm = len(tasks) > 1 and settings.cfg_renorm_type == "global"
    guidance = BatchGuidance if one_norm else FlowGuidance
    return guidance(model, [task.content for task in tasks], [settings] * len(tasks))
