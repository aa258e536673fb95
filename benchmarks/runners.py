"""Requests of the end-to-end benchmark and the implementations that run them.

All runners share the same weights:

- ``graphs`` and ``eager``: this runtime with and without CUDA graphs;
- ``official``: ``benchmarks.official``, which takes one request at a time;
- ``official-compiled``: the same with its layers under ``torch.compile``.
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
from bagel_rt.request import ImageRequest
from benchmarks.official import OfficialInferencer

PROMPT = "a red boat on a river in the morning, seen from a bridge; two birds above it"
RUNNERS = ("graphs", "eager", "official", "official-compiled")
SEED = 7


@dataclass(frozen=True)
class RequestCase:
    """A benchmarked request.

    Attributes:
        name: shown in tables.
        task: "generate", "edit" or "chat".
        size: (height, width) of input and output images.
        timesteps: number of denoising timesteps.
        tokens: maximum number of tokens of the thought or the answer; 0 for no text.
    """

    name: str
    task: str
    size: tuple[int, int] = (1024, 1024)
    timesteps: int = 50
    tokens: int = 0

    @property
    def settings(self) -> ImageSettings | None:
        """Denoising settings; None for chat."""
        if self.task == "chat":
            return None
        return replace(TASKS[self.task].image, num_timesteps=self.timesteps)

    def workload(self, model: BagelModel, tokenizer: Tokenizer, batch: int) -> Workload:
        """Token and image counts, for the roofline."""
        texts = [PROMPT, *([THINK_BEFORE_IMAGE] if self.task == "generate" and self.tokens else [])]
        count = sum(len(frame_text(tokenizer, text).ids) for text in texts)
        images = [] if self.task == "generate" else [self.size]
        return Workload.with_defaults(model.config, dtype=model.dtype, task=self.task, size=self.size, images=images,
                                      batch=batch, text_tokens=count, max_think_token_n=self.tokens,
                                      settings=self.settings)  # fmt: skip

    def input_image(self) -> Image.Image:
        """An image of noise."""
        levels = np.random.default_rng(0).integers(0, 256, (*self.size, 3), dtype=np.uint8)
        return Image.fromarray(levels)


CASES = (
    RequestCase("text-to-image", "generate"),
    RequestCase("edit", "edit"),
    RequestCase("chat with an image", "chat", tokens=256),
    RequestCase("think then draw", "generate", tokens=256),
)
TINY_CASES = tuple(replace(case, size=(64, 96), timesteps=20, tokens=case.tokens and 32) for case in CASES)


class Runner:
    """Runs cases with one implementation; ``name`` is one of ``RUNNERS``."""

    def __init__(self, name: str, model: BagelModel, tokenizer: Tokenizer, compiler: Callable = torch.compile):
        self.name, self.device = name, model.device
        self.official = (
            OfficialInferencer(model, tokenizer, compiler if "compiled" in name else None)
            if "official" in name
            else None
        )
        self.bagel = None if self.official else Bagel(model, tokenizer, graphs=name == "graphs")

    def __call__(self, case: RequestCase, batch: int, progress=None, tokens: int | None = None, **image):
        """Run a batch of one case and return a list of :class:`ImageResult`, or the answer of a chat.

        Args:
            case: the request.
            batch: number of copies of it, with different seeds.
            progress: called after each step and token.
            tokens: overrides ``case.tokens``.
            image: image hyper-parameters that override the case's.
        """
        pipeline = self.official or self.bagel
        texts = {"max_think_token_n": tokens or case.tokens} if case.tokens else {}
        if case.task == "chat":
            return pipeline.chat(PROMPT, case.input_image(), progress=progress, **texts)
        settings = {"num_timesteps": case.timesteps} | image | texts
        if case.task == "generate":
            options = {"size": case.size, "seed": SEED, "think": case.tokens > 0, "progress": progress}
            return pipeline.generate([PROMPT] * batch, **options, **settings)
        if self.official:
            return [pipeline.edit(case.input_image(), PROMPT, seed=SEED + i, progress=progress, **settings)
                    for i in range(batch)]  # fmt: skip
        resolved = resolve_settings("edit", settings)
        inputs = [case.input_image(), PROMPT]
        requests = [ImageRequest(inputs=inputs, seed=SEED + i, text=resolved.text, size=case.size, image=resolved.image)
                    for i in range(batch)]  # fmt: skip
        return pipeline.engine.run_images(requests, progress)

    def seconds(self, *arguments, **options) -> float:
        """Wall time of a call, including the device work that it enqueued."""
        start = time.perf_counter()
        self(*arguments, **options)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start

    def release(self) -> None:
        """Free cached memory and CUDA graphs."""
        if self.bagel:
            self.bagel.release_memory()
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
