"""Bagel: text-to-image, editing, understanding and interleaved output from one official checkpoint folder."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image

from bagel_rt.checkpoint import DEFAULT_MODEL
from bagel_rt.engine import Engine
from bagel_rt.errors import CheckpointError
from bagel_rt.kernels.backend import check_backend, choose_backend
from bagel_rt.models.bagel.config import BagelConfig
from bagel_rt.models.bagel.contexts import count_tokens, noise_shapes
from bagel_rt.models.bagel.images import open_image
from bagel_rt.models.bagel.model import BagelModel
from bagel_rt.models.bagel.prompts import THINK_BEFORE_ANSWER, THINK_BEFORE_IMAGE, THINK_INTERLEAVED
from bagel_rt.models.bagel.settings import MAX_BATCH, MAX_INPUTS, MAX_ROUNDS, resolve_settings, settings_per_prompt
from bagel_rt.models.bagel.tokenizer import Tokenizer
from bagel_rt.request import (
    ImageResult,
    ImageSource,
    ProgressCallback,
    Request,
    check_list,
    check_text,
    is_size,
    open_images,
    seeds_for,
)
from bagel_rt.validation import BOOLEAN, check, integer, invalid, per_prompt

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Bagel:
    """A loaded model and everything it can do. One request at a time; not thread-safe.

    Attributes:
        engine: runs requests that are already checked.
        model, tokenizer, cache: the engine's.
    """

    def __init__(self, model: BagelModel, tokenizer: Tokenizer, graphs: bool = True):
        """``graphs=False`` runs every step as it is, on CUDA too; see :meth:`from_pretrained`."""
        self.engine = Engine(model, tokenizer, graphs)
        self.model, self.tokenizer, self.cache = model, tokenizer, self.engine.cache

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path | None = None,
        device=None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
        graphs: bool = True,
        progress: bool = False,
    ) -> "Bagel":
        """Load an official checkpoint folder.

        Args:
            folder: with config.json, llm_config.json, vit_config.json, ema.safetensors, ae.safetensors and the
                tokenizer's files. Without one, the small model that the package carries.
            device: default "cuda" where there is one, else "cpu". A GPU becomes torch's current one.
            dtype: default bfloat16 on CUDA, float32 on the CPU.
            backend: "auto" runs Triton kernels on CUDA and the ops' PyTorch formulas elsewhere, "reference" formulas
                everywhere, "triton" kernels or nothing; for the whole process. Default: the environment variable
                BAGEL_RT_BACKEND, else "auto".
            graphs: on CUDA, capture steps as CUDA graphs and replay them; False launches every kernel by itself, with
                the same results, for debugging.
            progress: show a bar while weights are read.

        Raises:
            FileNotFoundError, ValueError, CheckpointError: a file is missing or wrong; the message says which and what
                to do.
        """
        folder = Path(folder) if folder is not None else DEFAULT_MODEL
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder; give the path of a downloaded BAGEL checkpoint folder")
        try:
            device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        except RuntimeError as error:
            raise ValueError(f"device is {device!r}: allowed are 'cpu', 'cuda' and 'cuda:N' ({error})") from None
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"device is {device}: allowed are 'cpu', 'cuda' and 'cuda:N'")
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(
                f"device is {device}, but torch sees {torch.cuda.device_count()} GPUs: use device='cpu', or a torch "
                "build with CUDA on a machine that has one"
            )
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype}: allowed are {', '.join(map(str, DTYPES))}")
        check_backend(device, backend)
        choose_backend(backend)
        if device.index is not None and device.type == "cuda":
            torch.cuda.set_device(device)  # kernels are launched on the current one
        config = BagelConfig.from_folder(folder)
        tokenizer = Tokenizer.from_folder(folder)
        if len(tokenizer) > config.llm.vocab_size:
            raise CheckpointError(
                f"{folder}: the tokenizer has {len(tokenizer)} tokens, but llm_config.json says vocab_size "
                f"{config.llm.vocab_size}; take both from the same published folder"
            )
        markers = (tokenizer.start_of_image, tokenizer.end_of_image)
        with torch.inference_mode():
            return cls(BagelModel.from_folder(folder, config, markers, device, dtype, progress), tokenizer, graphs)

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        size: tuple[int, int] | Sequence[tuple[int, int]] | None = None,
        seed: int | Sequence[int] | None = None,
        negative_prompt: str | None | Sequence[str | None] = None,
        think: bool | Sequence[bool] = False,
        noise=None,
        progress: ProgressCallback | None = None,
        **hyperparameters,
    ) -> ImageResult | list[ImageResult]:
        """Text to image.

        Args:
            prompt: what to draw; a list draws them all in one batch and returns a list.
            size: (height, width), multiples of the latent stride [16]; a list gives each prompt its own. Default: the
                largest square the model was made for [1024 x 1024].
            seed: of the noise (and of sampled thoughts); a list gives each prompt its own. With one seed for a batch,
                prompt i takes seed + i. Default: random, returned in the result.
            negative_prompt: what the text guidance moves away from, in place of nothing; a list gives each prompt its
                own.
            think: let the model write a plan first; a list says it of each prompt.
            noise: float32 [tokens, features] instead of the seed's noise (a list of them for a batch).
            progress: called after every step; may raise :class:`Cancelled`.
            **hyperparameters: fields of :class:`ImageSettings` and :class:`TextSettings`, official names and defaults;
                a list gives each prompt its own.

        Raises:
            ValueError, TypeError: something is out of range; nothing was computed.
        """
        batch = [prompt] if isinstance(prompt, str) else check_list("prompt", prompt, str, MAX_BATCH)
        count, single = len(batch), isinstance(prompt, str)
        if single:
            settings = [resolve_settings("generate", hyperparameters)]
        else:
            settings = settings_per_prompt("generate", hyperparameters, count)

        def each(name: str, value, shared: bool) -> list:
            return [value] * count if single or shared else per_prompt(name, value, count)

        columns = (
            batch,
            each("size", size, size is None or is_size(size)),
            seeds_for(seed, count),
            settings,
            each("noise", noise, noise is None),
            each("think", think, not isinstance(think, (list, tuple))),
            each("negative_prompt", negative_prompt, not isinstance(negative_prompt, (list, tuple))),
        )
        requests = [
            self._request(
                [text], self.check_size(size), seed, settings, noise, _system(THINK_BEFORE_IMAGE, think), negative
            )
            for text, size, seed, settings, noise, think, negative in zip(*columns, strict=True)
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
        noise=None,
        progress: ProgressCallback | None = None,
        **hyperparameters,
    ) -> ImageResult:
        """Redraw an image (or combine several) as the prompt says; the result has the last one's size.

        Args:
            images: a PIL image, a path or encoded bytes; or a list of them.
            prompt: the instruction.
            noise: tensors instead of the seed's draws, one [1, z, height / 8, width / 8] per input image, then one
                [tokens, features].

        The rest is as in :meth:`generate`, with the official defaults of editing.
        """
        settings = resolve_settings("edit", hyperparameters)
        inputs = [*open_images(images, least=1), check_text("prompt", prompt)]
        system = _system(THINK_BEFORE_IMAGE, think)
        request = self._request(inputs, None, seeds_for(seed, 1)[0], settings, noise, system, negative_prompt)
        return self.engine.run_images([request], progress)[0]

    def chat(self, prompt: str, images: ImageSource | Sequence[ImageSource] = (), **options) -> str:
        """Answer a question about images, or about none. Options as in :meth:`stream`."""
        return "".join(self.stream(prompt, images, **options))

    def stream(
        self,
        prompt: str,
        images: ImageSource | Sequence[ImageSource] = (),
        *,
        think: bool = False,
        seed: int | None = None,
        progress: ProgressCallback | None = None,
        **hyperparameters,
    ) -> Iterator[str]:
        """Answer piece by piece. Arguments are checked at the call, work begins with the first piece.

        Args:
            prompt: the question.
            images: shown before it, in order.
            think: let the model reason first; the reasoning is part of the answer.
            seed: of the sampler, where ``do_sample`` is set.
            progress: called after every token; may raise :class:`Cancelled`.
            **hyperparameters: fields of :class:`TextSettings`.
        """
        settings = resolve_settings("chat", hyperparameters)
        inputs = [*open_images(images), check_text("prompt", prompt)]
        system = _system(THINK_BEFORE_ANSWER, think)
        return self.engine.run_answer(
            self._request(inputs, None, seeds_for(seed, 1)[0], settings, None, system), progress
        )

    def interleave(
        self,
        inputs: Sequence[str | ImageSource],
        *,
        think: bool = True,
        max_rounds: int = 3,
        size: tuple[int, int] | None = None,
        seed: int | None = None,
        noise=None,
        progress: ProgressCallback | None = None,
        **hyperparameters,
    ) -> list[str | ImageResult]:
        """Texts and images in, texts and images out, for models trained to ask for images (ThinkMorph).

        The model writes; when its text contains ``<image_start>`` it draws, sees its drawing and writes on, up to
        ``max_rounds`` images.

        Args:
            inputs: texts as str; images as PIL images, :class:`~pathlib.Path` or bytes (a str is always a text).
            think: put the interleaved-thinking system prompt first.
            max_rounds: images at most, [1, 16].
            size: (height, width) of the images if no input is one; else they take the last input image's.
            noise: tensors instead of the seed's draws, in the order of encoding and drawing.
        """
        settings = resolve_settings("interleave", hyperparameters)
        check("max_rounds", max_rounds, integer(1, MAX_ROUNDS))
        inputs = check_list("inputs", inputs, (str, Image.Image, Path, bytes), MAX_INPUTS)
        inputs = [part if isinstance(part, str) else open_image(part) for part in inputs]
        system = _system(THINK_INTERLEAVED, think)
        request = self._request(
            inputs, self.check_size(size), seeds_for(seed, 1)[0], settings, noise, system, rounds=max_rounds
        )
        return self.engine.run_interleaved(request, progress)

    def release_memory(self) -> None:
        """Give back what is kept for the next request: captured graphs, their buffers, and the KV cache if no request
        is under way. The next request makes them anew."""
        self.engine.release_memory()

    def _request(
        self,
        inputs,
        size,
        seed: int,
        settings,
        noise,
        system: str | None,
        negative_prompt=None,
        rounds: int | None = None,
    ) -> Request:
        """A request that :meth:`check` has nothing against."""
        image, text = settings
        request = Request(inputs, size, seed, image, text, noise, system, negative_prompt, rounds)
        self.check(request)
        return request

    def check(self, request: Request) -> None:
        """Refuse a request that does not fit the model: texts, images, and the tokens that the model writes (of
        ``rounds`` texts and pictures, if the model decides when it draws) beyond its positions; noise of another shape.

        Raises:
            ValueError: says what does not fit.
        """
        config, limit = self.model.config, self.model.config.llm.max_position_embeddings
        parts = [*request.inputs, *(part for part in (request.negative_prompt, request.system) if part is not None)]
        texts = [check_text("a text", part) for part in parts if not isinstance(part, Image.Image)]
        written = request.text.max_think_token_n if request.writes else 0
        if request.rounds is not None:
            written = request.rounds * (written + 4)  # a text in its frame, a picture in two blocks
        positions = count_tokens(config, self.tokenizer, texts, False)[0] + 2 * len(request.inputs) + written
        if positions > limit:
            raise ValueError(
                f"the request takes up to {positions} positions, {written} of them for text to be written; the model "
                f"has {limit}: shorten the prompt or lower max_think_token_n"
            )
        self._check_grids(request.inputs)
        if request.noise is not None:
            _check_noise(request.noise, noise_shapes(config, request.inputs, request.size), request.rounds is None)

    def _check_grids(self, inputs) -> None:
        """Refuse images that the resize rules make larger than the position tables."""
        config = self.model.config
        for image in (part for part in inputs if isinstance(part, Image.Image)):
            for_vae = config.vae_transform.output_size(*image.size)
            for_vit = config.vit_transform.output_size(*for_vae)
            patches = config.vit.patch_size * config.vit.max_patches_per_side
            if not config.interpolate_pos and (max(for_vae) > config.largest_side or max(for_vit) > patches):
                raise ValueError(
                    f"an image of {image.width} x {image.height} pixels becomes {for_vae} and {for_vit}, more than the "
                    f"position tables hold ({config.largest_side} and {patches} pixels): use one of another shape"
                )

    def check_size(self, size) -> tuple[int, int]:
        """(height, width) of an image to draw, by default the model's square; ValueError if the model has no such."""
        config = self.model.config
        if size is None:
            return (config.default_resolution, config.default_resolution)
        if not is_size(size):
            raise invalid("size", size, "(height, width)")
        config.check_size(*size)
        return tuple(size)


def _system(prompt: str, think) -> str | None:
    """The system prompt of a request that is to think."""
    check("think", think, BOOLEAN)
    return prompt if think else None


def _check_noise(noise, shapes: list[tuple], exact: bool) -> None:
    """Refuse noise that the first picture cannot be made of; unless ``exact``, there may be more for later ones."""
    given = [noise] if isinstance(noise, torch.Tensor) else noise
    if not isinstance(given, (list, tuple)) or not all(isinstance(tensor, torch.Tensor) for tensor in given):
        raise ValueError("noise: give a torch tensor, or a list of them in the order of drawing")
    if not all(tensor.isfinite().all() for tensor in given):
        raise ValueError("noise: a tensor holds NaN or infinity; give standard normal numbers")
    found = [tuple(tensor.shape) for tensor in given]
    if (found if exact else found[: len(shapes)]) != shapes:
        raise ValueError(f"noise: tensors of shape {found} were given where {shapes} are drawn")
