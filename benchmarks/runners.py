"""The requests that are measured end to end, and who answers them.

Every contender runs the same weights: ``graphs`` and ``eager`` are this runtime with CUDA graphs and without,
``official`` is ``benchmarks.official``, which takes one request at a time, ``official-compiled`` the same under
``torch.compile``.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

from bagel_rt import Bagel
from bagel_rt.models.bagel.contexts import frame_text
from bagel_rt.models.bagel.model import BagelModel
from bagel_rt.models.bagel.prompts import THINK_BEFORE_IMAGE
from bagel_rt.models.bagel.settings import TASKS, ImageSettings, resolve_settings
from bagel_rt.models.bagel.tokenizer import Tokenizer
from bagel_rt.models.bagel.workload import Workload
from bagel_rt.request import Request
from benchmarks.official import Official

PROMPT = "a red boat on a river in the morning, seen from a bridge; two birds above it"
WHO = ("graphs", "eager", "official", "official-compiled")
SEED = 7


@dataclass(frozen=True)
class Case:
    """A request.

    Attributes:
        name: in tables.
        task: "generate", "edit" or "chat".
        size: (height, width) of the pictures, those that are shown too.
        timesteps: of the denoising.
        tokens: most that the model writes, as a thought or an answer; 0 for none.
    """

    name: str
    task: str
    size: tuple[int, int] = (1024, 1024)
    timesteps: int = 50
    tokens: int = 0

    @property
    def settings(self) -> ImageSettings | None:
        """Of the denoising; None if nothing is drawn."""
        if self.task == "chat":
            return None
        return replace(TASKS[self.task].image, num_timesteps=self.timesteps)

    def workload(self, model: BagelModel, tokenizer: Tokenizer, batch: int) -> Workload:
        """It in numbers."""
        texts = [PROMPT, *([THINK_BEFORE_IMAGE] if self.task == "generate" and self.tokens else [])]
        count = sum(len(frame_text(tokenizer, text).ids) for text in texts)
        images = [] if self.task == "generate" else [self.size]
        return Workload(model.config, model.dtype, self.task, self.size, images, batch, count, self.tokens,
                        self.settings)  # fmt: skip

    def picture(self) -> Image.Image:
        """What is shown: noise."""
        levels = np.random.default_rng(0).integers(0, 256, (*self.size, 3), dtype=np.uint8)
        return Image.fromarray(levels)


CASES = (
    Case("text-to-image", "generate"),
    Case("edit", "edit"),
    Case("chat with an image", "chat", tokens=256),
    Case("think then draw", "generate", tokens=256),
)
TINY_CASES = tuple(replace(case, size=(64, 96), timesteps=20, tokens=case.tokens and 32) for case in CASES)


class Contender:
    """Runs cases one way; ``who`` is one of ``WHO``."""

    def __init__(self, who: str, model: BagelModel, tokenizer: Tokenizer, compiler: Callable = torch.compile):
        self.who, self.device = who, model.device
        self.official = (
            Official(model, tokenizer, compiler if "compiled" in who else None) if "official" in who else None
        )
        self.bagel = None if self.official else Bagel(model, tokenizer, graphs=who == "graphs")

    def __call__(self, case: Case, batch: int, progress=None, tokens: int | None = None, **image):
        """The results of a batch of one case: a list of :class:`ImageResult`, or the answer.

        Args:
            tokens: at most, instead of the case's.
            image: hyper-parameters instead of the case's.
        """
        runs = self.official or self.bagel
        texts = {"max_think_token_n": tokens or case.tokens} if case.tokens else {}
        if case.task == "chat":
            return runs.chat(PROMPT, case.picture(), progress=progress, **texts)
        settings = {"num_timesteps": case.timesteps} | image | texts
        if case.task == "generate":
            options = {"size": case.size, "seed": SEED, "think": case.tokens > 0, "progress": progress}
            return runs.generate([PROMPT] * batch, **options, **settings)
        if self.official:
            return [runs.edit(case.picture(), PROMPT, seed=SEED + i, progress=progress, **settings)
                    for i in range(batch)]  # fmt: skip
        chosen = resolve_settings("edit", settings)
        requests = [Request([case.picture(), PROMPT], None, SEED + i, *chosen) for i in range(batch)]
        return runs.engine.run_images(requests, progress)

    def seconds(self, *arguments, **options) -> float:
        """Wall time of a call, to the end of what it began on the device."""
        start = time.perf_counter()
        self(*arguments, **options)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start

    def release(self) -> None:
        """Give back what is kept between requests."""
        if self.bagel:
            self.bagel.release_memory()
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
