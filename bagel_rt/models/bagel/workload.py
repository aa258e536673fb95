"""The size of a request in tokens, rows and branches, derived as the runtime derives them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bagel_rt.models.bagel.config import BagelConfig
from bagel_rt.models.bagel.contents import image_rows
from bagel_rt.models.bagel.guidance import branches_of, is_guided, schedule
from bagel_rt.models.bagel.settings import MAX_BATCH, MAX_INPUTS, TASKS, ImageSettings
from bagel_rt.runtime.context import MAX_ROWS
from bagel_rt.validation import check, check_fields, checked, integer, one_of


@dataclass(frozen=True)
class Workload:
    """A request in numbers. ValueError if it could not run.

    Attributes:
        config: of the model.
        dtype: of the weights; the autoencoder is float32 in any case.
        task: "generate", "edit" or "chat"; an interleaved answer needs what an edit needs.
        size: (height, width) of the images to generate; default the model's largest square. An edit has the size of its
            last input.
        images: (height, width) of each input image before the resize rule; default none, for an edit one of ``size``.
        batch: number of requests run together.
        text_tokens: tokens of a request's texts, a system prompt and all frames included.
        max_think_token_n: tokens that the model may write before it draws, or as an answer; default none, for a chat
            the task's.
        settings: how images are denoised; default the task's.
        graphs: whether steps are captured as CUDA graphs.
    """

    config: BagelConfig
    dtype: torch.dtype = checked(one_of((torch.float32, torch.bfloat16, torch.float16)), torch.bfloat16)
    task: str = checked(one_of(("generate", "edit", "chat")), "generate")
    size: tuple[int, int] | None = None
    images: Sequence[tuple[int, int]] | None = None
    batch: int = checked(integer(1, MAX_BATCH), 1)
    text_tokens: int = 256
    max_think_token_n: int | None = None
    settings: ImageSettings | None = None
    graphs: bool = True

    def __post_init__(self):
        check_fields(self)
        size = self.size or (self.config.default_resolution,) * 2
        images = tuple(map(tuple, (size,) if self.images is None and self.task == "edit" else self.images or ()))
        written = TASKS["chat"].text.max_think_token_n if self.task == "chat" else 0
        for name, value in (
            ("size", tuple(size)),
            ("images", images),
            ("max_think_token_n", written if self.max_think_token_n is None else self.max_think_token_n),
            ("settings", self.settings or TASKS["edit" if self.task == "edit" else "generate"].image),
        ):
            object.__setattr__(self, name, value)
        limit = self.config.llm.max_position_embeddings
        check("text_tokens", self.text_tokens, integer(1, limit))
        check("max_think_token_n", self.max_think_token_n, integer(0, limit))
        self.config.check_size(*self.size)
        if (self.task == "edit") > len(self.images) or (self.task == "generate" and self.images):
            raise ValueError(
                f"images must have at least one entry for an edit and none to generate, got {len(self.images)}"
            )
        if len(self.images) > MAX_INPUTS or any(side < 1 for pair in self.images for side in pair):
            raise ValueError(
                f"images must be up to {MAX_INPUTS} sizes (height, width) of at least 1, got {self.images}"
            )

    @property
    def draws(self) -> bool:
        """Whether images are generated."""
        return self.task != "chat"

    @property
    def written(self) -> int:
        """Tokens that the model writes, with the frame of a thought."""
        return self.max_think_token_n + 2 * (self.draws and self.max_think_token_n > 0)

    @property
    def resized(self) -> list[tuple[int, int]]:
        """(height, width) of the input images after the autoencoder's resize rule."""
        return [self.config.vae_transform.output_size(width, height)[::-1] for height, width in self.images]

    @property
    def drawn(self) -> tuple[int, int]:
        """(height, width) of the generated images."""
        return self.resized[-1] if self.images else self.size

    @property
    def latents(self) -> int:
        """Latent tokens of a generated image, without its markers."""
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
        return is_guided(t, self.settings).sum().item(), len(t)

    @property
    def branches(self) -> int:
        """Branches of a guided step that see different contexts."""
        count = branches_of(self.settings, guided=self.guided_steps[0] > 0)
        # Without images and thoughts the context without images equals the conditional one, and is computed once.
        return count if self.images or self.written else min(count, 2)

    @property
    def group(self) -> int:
        """Images that are denoised in one packed forward, as the engine groups them."""
        branches = branches_of(self.settings, guided=self.guided_steps[0] > 0)
        return max(1, min(self.batch, MAX_ROWS // (branches * self.rows)))
