"""The size of a request in tokens, rows and branches, computed as the runtime computes them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bagel_rt.models.bagel.config import BagelConfig
from bagel_rt.models.bagel.contents import image_rows
from bagel_rt.models.bagel.guidance import branches_of, is_guided, schedule
from bagel_rt.models.bagel.settings import CHAT, EDIT, GENERATE, MAX_BATCH, MAX_INPUTS, ImageSettings
from bagel_rt.runtime.context import MAX_ROWS
from bagel_rt.validation import check, integer, one_of

DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
    "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
}  # fmt: skip
"""Dtypes of a model by name."""


def resolve_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """The dtype of this name, as in :data:`DTYPES` or with the prefix ``torch.``. ValueError if it is not supported."""
    resolved = DTYPES.get(str(dtype).removeprefix("torch."))
    if resolved is None:
        raise ValueError(f"dtype must be float32, bfloat16 or float16 (fp32, bf16 or fp16), got {dtype}.")
    return resolved


@dataclass(frozen=True)
class Workload:
    """A request in numbers. ValueError if it could not run.

    Attributes:
        config: of the model.
        dtype: of the weights; the autoencoder is float32 in any case.
        task: "generate", "edit" or "chat". For an interleaved answer use "edit".
        size: (height, width) of the images to generate without input images. An edit has the size of its last input.
        images: (height, width) of each input image before the resize rule.
        batch: number of requests run together.
        text_tokens: tokens of the texts of a request, including the system prompt and all frames.
        max_think_token_n: tokens that the model may generate before an image, or as an answer.
        settings: how images are denoised; not used by a chat.
        graphs: whether steps are captured as CUDA graphs.
    """

    config: BagelConfig
    dtype: torch.dtype
    task: str
    size: tuple[int, int]
    images: tuple[tuple[int, int], ...]
    batch: int
    text_tokens: int
    max_think_token_n: int
    settings: ImageSettings
    graphs: bool

    @classmethod
    def with_defaults(
        cls,
        config: BagelConfig,
        *,
        dtype: torch.dtype | str = torch.bfloat16,
        task: str = "generate",
        size: tuple[int, int] | None = None,
        images: Sequence[tuple[int, int]] | None = None,
        batch: int = 1,
        text_tokens: int = 256,
        max_think_token_n: int | None = None,
        settings: ImageSettings | None = None,
        graphs: bool = True,
    ) -> "Workload":
        """A workload with the defaults of its task.

        They are the default resolution of the model, one input image of ``size`` for an edit, and the text length of
        the task for a chat; other tasks generate no text.
        """
        side = config.default_resolution
        height, width = size or (side, side)
        if images is None:
            images = [(height, width)] if task == "edit" else []
        if max_think_token_n is None:
            max_think_token_n = CHAT.text.max_think_token_n if task == "chat" else 0
        return cls(
            config,
            resolve_dtype(dtype),
            task,
            (height, width),
            tuple((height, width) for height, width in images),
            batch,
            text_tokens,
            max_think_token_n,
            settings or (EDIT if task == "edit" else GENERATE).image,
            graphs,
        )

    def __post_init__(self) -> None:
        check("task", self.task, one_of(("generate", "edit", "chat")))
        check("batch", self.batch, integer(1, MAX_BATCH))
        limit = self.config.llm.max_position_embeddings
        check("text_tokens", self.text_tokens, integer(1, limit))
        check("max_think_token_n", self.max_think_token_n, integer(0, limit))
        self.config.check_size(*self.size)
        if (self.task == "edit") > len(self.images) or (self.task == "generate" and self.images):
            raise ValueError(
                f"images must have at least one entry for an edit and none to generate, got {len(self.images)}."
            )
        if len(self.images) > MAX_INPUTS or any(side < 1 for pair in self.images for side in pair):
            raise ValueError(
                f"images must be up to {MAX_INPUTS} sizes (height, width) of at least 1, got {self.images}."
            )

    @property
    def draws(self) -> bool:
        """Whether images are generated."""
        return self.task != "chat"

    @property
    def written(self) -> int:
        """Tokens that the model generates, including the frame of a thought."""
        return self.max_think_token_n + 2 * (self.draws and self.max_think_token_n > 0)

    @property
    def resized(self) -> list[tuple[int, int]]:
        """(height, width) of the input images after the autoencoder's resize rule."""
        sizes = [self.config.vae_transform.output_size(width, height) for height, width in self.images]
        return [(height, width) for width, height in sizes]

    @property
    def drawn(self) -> tuple[int, int]:
        """(height, width) of the generated images."""
        return self.resized[-1] if self.images else self.size

    @property
    def latents(self) -> int:
        """Latent tokens of a generated image, excluding its markers."""
        return math.prod(self.config.latent_grid(self.drawn))

    @property
    def rows(self) -> int:
        """Rows of a generated image in one branch."""
        return image_rows(*self.config.latent_grid(self.drawn))

    @property
    def patches(self) -> int:
        """ViT patches of one request's images."""
        return sum(math.prod(self.config.patch_grid(size)) for size in self.resized)

    @property
    def image_tokens(self) -> int:
        """Tokens of one request's input images: ViT patches and, where images are generated, latents."""
        grids = [self.config.patch_grid(size) for size in self.resized]
        grids += [self.config.latent_grid(size) for size in self.resized] if self.draws else []
        return sum(image_rows(*grid) for grid in grids)

    @property
    def guided_steps(self) -> tuple[int, int]:
        """(steps with guidance, all steps)."""
        t = schedule(self.settings.num_timesteps, self.settings.timestep_shift)[:-1]
        return int(is_guided(t, self.settings).sum()), len(t)

    @property
    def branches(self) -> int:
        """Branches of a guided step with different contexts."""
        count = branches_of(self.settings, guided=self.guided_steps[0] > 0)
        # Without images and thoughts, the context without images equals the conditional one and is computed once.
        return count if self.images or self.written else min(count, 2)

    @property
    def group(self) -> int:
        """Images per packed forward of denoising, as the engine groups them."""
        branches = branches_of(self.settings, guided=self.guided_steps[0] > 0)
        return max(1, min(self.batch, MAX_ROWS // (branches * self.rows)))
