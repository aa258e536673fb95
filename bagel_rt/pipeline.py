"""The Python API: ``Bagel`` loads a checkpoint folder and generates, edits, answers and interleaves."""

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from PIL import Image

from bagel_rt.checkpoint import DEFAULT_MODEL
from bagel_rt.checkpoint.find import describe_missing_folder
from bagel_rt.engine import Engine
from bagel_rt.errors import CheckpointError
from bagel_rt.kernels.backend import check_backend, choose_backend
from bagel_rt.models.bagel.checks import check_image_sizes, check_length, check_noise
from bagel_rt.models.bagel.config import BagelConfig
from bagel_rt.models.bagel.images import open_image
from bagel_rt.models.bagel.model import BagelModel
from bagel_rt.models.bagel.prompts import THINK_BEFORE_ANSWER, THINK_BEFORE_IMAGE, THINK_INTERLEAVED
from bagel_rt.models.bagel.settings import (
    MAX_BATCH,
    MAX_INPUTS,
    MAX_ROUNDS,
    ImageTask,
    resolve_settings,
    settings_per_prompt,
)
from bagel_rt.models.bagel.tokenizer import Tokenizer
from bagel_rt.models.bagel.workload import resolve_dtype
from bagel_rt.request import (
    ImageRequest,
    ImageResult,
    ImageSource,
    InterleavedRequest,
    Noise,
    ProgressCallback,
    Request,
    as_size,
    check_list,
    check_prompt,
    check_text,
    open_images,
    resolve_seeds,
)
from bagel_rt.validation import BOOLEAN, check, integer, invalid, per_prompt


class Bagel:
    """A loaded model. Runs one request at a time; a call raises RuntimeError while a request runs in another thread.

    Attributes:
        engine: runs requests after they are checked.
        model, tokenizer, cache: the model, tokenizer and KV cache of the engine.
    """

    def __init__(self, model: BagelModel, tokenizer: Tokenizer, graphs: bool = True) -> None:
        """Wrap a loaded model; for ``graphs`` see :meth:`from_pretrained`."""
        self.engine = Engine(model, tokenizer, graphs)
        self.model, self.tokenizer, self.cache = model, tokenizer, self.engine.cache

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        backend: str | None = None,
        graphs: bool = True,
        progress: bool = False,
        weights: str | None = None,
    ) -> "Bagel":
        """Load an official checkpoint folder.

        Args:
            folder: contains config.json, llm_config.json, vit_config.json, ema.safetensors, ae.safetensors and the
                tokenizer files. Default: the small model embedded in the package.
            device: "cpu", "cuda" or "cuda:N"; default "cuda" if available, else "cpu". A GPU becomes torch's current
                device.
            dtype: float32, bfloat16 or float16, as a ``torch.dtype`` or by name ("bfloat16", "bf16"); default bfloat16
                on CUDA, float32 on the CPU.
            backend: "auto" runs Triton kernels on CUDA and the PyTorch reference of every op elsewhere; "reference"
                runs the PyTorch references everywhere; "triton" requires the kernels. It applies to the whole process.
                Default: the environment variable BAGEL_RT_BACKEND, else "auto".
            graphs: on CUDA, capture steps as CUDA graphs and replay them. False runs eagerly, with the same results,
                for debugging.
            progress: show a progress bar while the weights are loaded.
            weights: file name, or its stem, of the weights to load if the folder contains several, such as "model" or
                "model_bf16.safetensors". Default: ``ema``, else ``model``.

        Raises:
            FileNotFoundError: the folder or its tokenizer does not exist.
            CheckpointError: another file is missing, or a file is malformed or does not match the others.
            ValueError: the device, dtype or backend is not supported.
        """
        folder = Path(folder) if folder is not None else DEFAULT_MODEL
        if not folder.is_dir():
            raise FileNotFoundError(describe_missing_folder(folder))
        device = resolve_device(device)
        if dtype is None:
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        dtype = resolve_dtype(dtype)
        check_backend(device, backend)
        choose_backend(backend)
        if device.index is not None and device.type == "cuda":
            torch.cuda.set_device(device)  # Triton launches kernels on the current device
        config = BagelConfig.from_folder(folder)
        tokenizer = Tokenizer.from_folder(folder)
        if len(tokenizer) > config.llm.vocab_size:
            raise CheckpointError(
                f"{folder}: vocab_size in llm_config.json must be at least {len(tokenizer)}, the number of tokens of "
                f"the tokenizer, got {config.llm.vocab_size}. Use both from the same published folder."
            )
        markers = (tokenizer.start_of_image, tokenizer.end_of_image)
        with torch.inference_mode():
            model = BagelModel.from_folder(folder, config, markers, device, dtype, progress, weights)
            return cls(model, tokenizer, graphs)

    @overload
    def generate(self, prompt: str, **arguments: Any) -> ImageResult: ...
    @overload
    def generate(self, prompt: Sequence[str], **arguments: Any) -> list[ImageResult]: ...
    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        size: tuple[int, int] | Sequence[tuple[int, int]] | None = None,
        seed: int | Sequence[int] | None = None,
        negative_prompt: str | Sequence[str | None] | None = None,
        think: bool | Sequence[bool] = False,
        noise: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
        progress: ProgressCallback | None = None,
        **hyperparameters: Any,
    ) -> ImageResult | list[ImageResult]:
        """Generate an image from a prompt, or a batch of images from a list of prompts.

        For a list of prompts every argument except ``progress`` may be a list with one value per prompt.

        Args:
            prompt: description of the image. A list is generated as one batch and returns a list.
            size: (height, width) in pixels, height first, unlike in texts such as "1024x768". Both are multiples of the
                latent stride, 16 for BAGEL-7B-MoT. Default: the default resolution of the model, a square of 1024
                pixels per side for BAGEL-7B-MoT.
            seed: for the noise and for sampled thoughts. One seed for a batch gives prompt i the seed ``seed + i``.
                Default: random, returned in the result.
            negative_prompt: used for the branch without text of classifier-free guidance. Default: no text.
            think: write a plan before the image.
            noise: float32 [tokens, features] to use instead of the noise drawn from the seed.
            progress: called after every step; may raise :class:`Cancelled`.
            **hyperparameters: fields of :class:`ImageSettings` and :class:`TextSettings`, with the official names and
                defaults.

        Raises:
            ValueError, TypeError: an argument is invalid. Arguments are checked before any computation.
        """
        if not isinstance(prompt, (str, list, tuple)):
            raise invalid("prompt", prompt, f"a str or a list of 1 to {MAX_BATCH} str")
        batch = [prompt] if isinstance(prompt, str) else check_list("prompt", prompt, str, MAX_BATCH)
        batch = [check_prompt("prompt", text, "Describe the image") for text in batch]
        count, single = len(batch), isinstance(prompt, str)
        if single:
            settings = [resolve_settings("generate", hyperparameters)]
        else:
            settings = settings_per_prompt("generate", hyperparameters, count)

        def expand(name: str, value: Any, is_shared: bool) -> list[Any]:
            """One value per prompt."""
            return [value] * count if single or is_shared else per_prompt(name, value, count)

        arguments = (
            batch,
            expand("size", size, size is None or as_size(size) is not None),
            resolve_seeds(seed, count),
            settings,
            expand("noise", noise, noise is None),
            expand("think", think, not isinstance(think, (list, tuple))),
            expand("negative_prompt", negative_prompt, not isinstance(negative_prompt, (list, tuple))),
        )
        requests = [
            self._image_request(
                [text], size, seed, settings, noise, _system_prompt(THINK_BEFORE_IMAGE, think), negative
            )
            for text, size, seed, settings, noise, think, negative in zip(*arguments, strict=True)
        ]
        results = self.engine.run_images(requests, progress)
        return results[0] if single else results

    def edit(
        self,
        images: ImageSource | Sequence[ImageSource],
        prompt: str,
        *,
        seed: int | None = None,
        negative_prompt: str | None = None,
        think: bool = False,
        noise: Noise = None,
        progress: ProgressCallback | None = None,
        **hyperparameters: Any,
    ) -> ImageResult:
        """Edit an image, or combine several, as the prompt instructs. The result has the size of the last image.

        Args:
            images: a PIL image, an array, a path or encoded bytes, or a list of them; see
                :func:`~bagel_rt.models.bagel.images.open_image`.
            prompt: the instruction.
            noise: tensors to use instead of the noise drawn from the seed: one [1, z, height / 8, width / 8] per input
                image for the autoencoder, then one [tokens, features] for the generated image.

        Other arguments: see :meth:`generate`; the defaults are the official ones of editing.
        """
        settings = resolve_settings("edit", hyperparameters)
        inputs: list[str | Image.Image] = [
            *open_images(images, minimum=1),
            check_prompt("prompt", prompt, "Describe the change"),
        ]
        system = _system_prompt(THINK_BEFORE_IMAGE, think)
        seed = resolve_seeds(seed, 1)[0]
        request = self._image_request(inputs, None, seed, settings, noise, system, negative_prompt)
        return self.engine.run_images([request], progress)[0]

    def chat(self, prompt: str, images: ImageSource | Sequence[ImageSource] = (), **options: Any) -> str:
        """Answer a prompt, with or without images, and return the whole text. Options as in :meth:`stream`."""
        return "".join(self.stream(prompt, images, **options))

    def stream(
        self,
        prompt: str,
        images: ImageSource | Sequence[ImageSource] = (),
        *,
        think: bool = False,
        seed: int | None = None,
        progress: ProgressCallback | None = None,
        **hyperparameters: Any,
    ) -> Generator[str, None, None]:
        """Stream the answer to a prompt as pieces of text.

        Arguments are checked at the call; computation starts with the first ``next()``.

        Args:
            prompt: the question.
            images: placed before the prompt, in order.
            think: reason before answering; the reasoning is part of the text.
            seed: for sampling, if ``do_sample`` is set.
            progress: called after every token; may raise :class:`Cancelled`.
            **hyperparameters: fields of :class:`TextSettings`.
        """
        settings = resolve_settings("chat", hyperparameters)
        inputs: list[str | Image.Image] = [*open_images(images), check_prompt("prompt", prompt, "Ask a question")]
        system = _system_prompt(THINK_BEFORE_ANSWER, think)
        request = Request(inputs=inputs, seed=resolve_seeds(seed, 1)[0], text=settings.text, system=system)
        self.check_request(request)
        return self.engine.run_answer(request, progress)

    def interleave(
        self,
        inputs: Sequence[str | ImageSource],
        *,
        think: bool = True,
        max_rounds: int = 3,
        size: tuple[int, int] | None = None,
        seed: int | None = None,
        noise: Noise = None,
        progress: ProgressCallback | None = None,
        **hyperparameters: Any,
    ) -> list[str | ImageResult]:
        """Generate interleaved texts and images, with models trained to request images (ThinkMorph).

        The model generates text. If the text contains ``<image_start>``, the model generates an image, which becomes
        part of its context, and continues with text, up to ``max_rounds`` images.

        Args:
            inputs: texts as str; images as PIL images, arrays, :class:`~pathlib.Path` or bytes. A str is always a text.
            think: start with the interleaved-thinking system prompt.
            max_rounds: maximum number of images, from 1 to 16.
            size: (height, width) of the images, if the inputs contain none; else they have the size of the last input
                image.
            noise: tensors to use instead of the noise drawn from the seed, in the order of encoding and generation.

        Other arguments: see :meth:`generate`.
        """
        settings = resolve_settings("interleave", hyperparameters)
        max_rounds = check("max_rounds", max_rounds, integer(1, MAX_ROUNDS))
        sources = check_list("inputs", inputs, (str, Image.Image, np.ndarray, Path, bytes), MAX_INPUTS)
        parts = [part if isinstance(part, str) else open_image(part) for part in sources]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) == len(parts):
            check_prompt("inputs", "".join(texts), "Add a text or an image")
        system = _system_prompt(THINK_INTERLEAVED, think)
        request = InterleavedRequest(
            inputs=parts,
            seed=resolve_seeds(seed, 1)[0],
            text=settings.text,
            system=system,
            size=self.check_size(size),
            image=settings.image,
            noise=noise,
            rounds=max_rounds,
        )
        self.check_request(request)
        return self.engine.run_interleaved(request, progress)

    def release_memory(self) -> None:
        """Free cached CUDA graphs and their buffers, and the KV cache if no request is running.

        The next request allocates and captures them again.
        """
        self.engine.release_memory()

    def _image_request(
        self,
        inputs: list[str | Image.Image],
        size: object,
        seed: int,
        settings: ImageTask,
        noise: Noise,
        system: str | None,
        negative_prompt: str | None,
    ) -> ImageRequest:
        """Create and check a request for an image."""
        request = ImageRequest(
            inputs=inputs,
            seed=seed,
            text=settings.text,
            system=system,
            size=self.check_size(size),
            image=settings.image,
            noise=noise,
            negative_prompt=negative_prompt,
        )
        self.check_request(request)
        return request

    def check_request(self, request: Request) -> None:
        """Raise ValueError if a request does not fit the model: its length, its image sizes or its noise."""
        config = self.model.config
        for part in request.parts:
            if not isinstance(part, Image.Image):
                check_text("a text", part)
        generated = request.text.max_think_token_n if request.generates_text else 0
        rounds = request.rounds if isinstance(request, InterleavedRequest) else None
        check_length(config, self.tokenizer, request.parts, generated, rounds)
        check_image_sizes(config, request.inputs)
        if isinstance(request, ImageRequest) and request.noise is not None:
            check_noise(config, request.noise, request.inputs, request.size, exact=rounds is None)

    def check_size(self, size: object) -> tuple[int, int]:
        """The (height, width) of an image to generate, checked; None is the default resolution of the model.

        Raises:
            ValueError: not a pair of integers, or not a size that the model can generate.
        """
        config = self.model.config
        if size is None:
            return (config.default_resolution, config.default_resolution)
        sides = as_size(size)
        if sides is None:
            raise invalid("size", size, "a pair of integers (height, width) in pixels")
        try:
            config.check_size(*sides)
        except ValueError as error:
            raise ValueError(f"{error} As an argument it is (height, width).") from None
        return sides


def resolve_device(device: torch.device | str | None) -> torch.device:
    """The device, by default a GPU if there is one; ValueError if this machine does not have it."""
    try:
        resolved = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise invalid("device", str(device), "cpu, cuda or cuda:N") from None
    if resolved.type not in ("cpu", "cuda"):
        raise invalid("device", str(device), "cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if resolved.type == "cuda" and (resolved.index or 0) >= count:
        remedy = "Use device='cpu', or install a CUDA build of torch and a driver"
        raise invalid("device", str(device), f"cpu or one of the {count} GPUs that torch sees", remedy)
    return resolved


def _system_prompt(prompt: str, think: object) -> str | None:
    """The system prompt of a request: ``prompt`` with ``think``, else none."""
    check("think", think, BOOLEAN)
    return prompt if think else None
