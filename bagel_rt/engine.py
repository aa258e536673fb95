"""Requests end to end: contexts filled, text decoded, latents denoised, pictures decoded. Arguments come checked."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import torch
from PIL import Image

from bagel_rt.cache import KVCache
from bagel_rt.context import MAX_ROWS, Prefill
from bagel_rt.conversation import Conversation, Noise, count_tokens
from bagel_rt.decode import generate_tokens
from bagel_rt.denoise import Denoiser, ImageTask
from bagel_rt.images import tensor_to_image
from bagel_rt.models.bagel.embed import unpatchify
from bagel_rt.models.bagel.model import BagelModel
from bagel_rt.prompts import IMAGE_REQUEST
from bagel_rt.request import ImageResult, Progress, ProgressCallback, Request
from bagel_rt.settings import ImageSettings, TextSettings
from bagel_rt.tokenizer import TextStream, Tokenizer


def _frees_on_failure(run):
    """Give back at once what a failed request took: the frames of its exception would hold it as long as they live."""

    @functools.wraps(run)
    def wrapped(self, *args, **kwargs):
        others = set(self.cache.storages)
        try:
            return run(self, *args, **kwargs)
        except BaseException:
            for storage in set(self.cache.storages) - others:
                storage.release()
            raise

    return wrapped


class Engine:
    """A model, its tokenizer and its KV cache. One request at a time; whatever ends one frees the slots it held."""

    def __init__(self, model: BagelModel, tokenizer: Tokenizer):
        self.model = model
        self.tokenizer = tokenizer
        self.cache: KVCache = model.make_cache()

    @_frees_on_failure
    @torch.inference_mode()
    def run_images(
        self,
        requests: Sequence[Request],
        system: str | None,
        negative_prompt: str | None,
        image: ImageSettings,
        text: TextSettings,
        progress: ProgressCallback | None = None,
    ) -> list[ImageResult]:
        """One picture for each request: packed prefill, thoughts one after another, packed denoising.

        Inputs may be texts and images in any order; guidance follows the official rules (see
        :class:`~bagel_rt.conversation.Conversation`). With a ``system`` prompt each request's plan is written first.
        """
        prefill = Prefill(self.model, self.cache)
        written = text.max_think_token_n + 2 if system is not None else 0
        conversations = [self._open(request, system, prefill, True, written) for request in requests]
        if negative_prompt is not None:
            for conversation in conversations:
                conversation.add_negative(negative_prompt)
        prefill.run()
        thoughts = [None] * len(requests)
        if system is not None:
            for index, (request, conversation) in enumerate(zip(requests, conversations, strict=True)):
                thoughts[index] = "".join(self._decode(conversation, text, request.seed, progress))
                conversation.add_thought(thoughts[index])
            prefill.run()
        sizes = [c.image_size or request.size for c, request in zip(conversations, requests, strict=True)]
        drawn = self._denoise(conversations, sizes, image, progress)
        return [
            ImageResult(
                picture,
                request.seed,
                _parameters(image, size, text if system is not None else None, negative_prompt),
                latents,
                thought,
            )
            for (picture, latents), request, size, thought in zip(drawn, requests, sizes, thoughts, strict=True)
        ]

    def run_answer(
        self, request: Request, system: str | None, text: TextSettings, progress: ProgressCallback | None = None
    ) -> Iterator[str]:
        """Text about the request's inputs, piece by piece."""
        others, taken = set(self.cache.storages), set()
        try:
            with torch.inference_mode():
                prefill = Prefill(self.model, self.cache)
                conversation = self._open(request, system, prefill, False, text.max_think_token_n)
                prefill.run()
                pieces = self._decode(conversation, text, request.seed, progress)
                taken = set(self.cache.storages) - others
            while True:
                with torch.inference_mode():  # entered per piece: the mode must not leak into the consumer's code
                    piece = next(pieces, None)
                if piece is None:
                    return
                yield piece
        except BaseException:
            for storage in taken:
                storage.release()
            raise

    @_frees_on_failure
    @torch.inference_mode()
    def run_interleaved(
        self,
        request: Request,
        system: str | None,
        max_rounds: int,
        image: ImageSettings,
        text: TextSettings,
        progress: ProgressCallback | None = None,
    ) -> list[str | ImageResult]:
        """Text, and as long as it asks for an image, a picture and more text.

        Guidance stays with the contexts of the inputs: neither the model's texts nor its pictures enter them.
        """
        prefill = Prefill(self.model, self.cache)
        conversation = self._open(request, system, prefill, True, text.max_think_token_n + 2)
        size = conversation.image_size or request.size
        parts = []
        for turn in range(max_rounds):
            prefill.run()
            written = "".join(self._decode(conversation, text, (request.seed + turn) % 2**63, progress))
            parts.append(written)
            if IMAGE_REQUEST not in written:
                break
            conversation.add_thought(written)
            prefill.run()
            [(picture, latents)] = self._denoise([conversation], [size], image, progress)
            parts.append(ImageResult(picture, request.seed, _parameters(image, size, text, None), latents))
            if turn + 1 < max_rounds:
                conversation.add_image(picture, updates_guidance=False)
        return parts

    def _open(self, request: Request, system: str | None, prefill: Prefill, guided: bool, written: int) -> Conversation:
        """A conversation holding the system prompt and the request's inputs, with room for ``written`` tokens."""
        config = self.model.config
        parts = [*request.inputs, *([system] if system is not None else [])]
        texts, images, size = count_tokens(config, self.tokenizer, parts, guided)
        height, width = size or request.size or (0, 0)
        drawn = height * width // config.latent_stride**2 + 2 if guided else 0
        room = (texts + images + written + drawn, texts + drawn)
        noise = Noise(request.seed, request.noise)
        shown = (self.model, self.tokenizer, self.cache, prefill, noise, guided, room)
        conversation = Conversation(*shown, expects_images=images > 0)
        if system is not None:
            conversation.add_system(system)
        for part in request.inputs:
            if isinstance(part, str):
                conversation.add_text(part)
            else:
                conversation.add_image(part, generates=guided)
        return conversation

    def _decode(self, conversation: Conversation, text: TextSettings, seed: int, progress) -> Iterator[str]:
        stream = TextStream(self.tokenizer)
        temperature = text.text_temperature if text.do_sample else 0.0
        tokens = generate_tokens(
            self.model,
            conversation.gen,
            self.tokenizer.bos,
            self.tokenizer.eos,
            text.max_think_token_n,
            temperature,
            seed,
        )
        for count, token in enumerate(tokens, start=1):
            _report(progress, Progress("text", count, text.max_think_token_n - 1))
            if piece := stream.feed(token):
                yield piece
        if piece := stream.finish():
            yield piece

    def _denoise(
        self, conversations, sizes, settings: ImageSettings, progress
    ) -> list[tuple[Image.Image, torch.Tensor]]:
        """(picture, latents) of each conversation's next image."""
        config, groups = self.model.config, [[]]
        for conversation, size in zip(conversations, sizes, strict=True):
            rows, columns = (side // config.latent_stride for side in size)
            noise = conversation.noise.draw(rows * columns, config.latent_features)
            task = ImageTask(rows, columns, noise, conversation.gen, conversation.no_text, conversation.no_img)
            branches = 1 + (settings.cfg_text_scale > 1) + (settings.cfg_text_scale > 1 and settings.cfg_img_scale > 1)
            if groups[-1] and branches * sum(t.rows * t.columns + 2 for t in (*groups[-1], task)) > MAX_ROWS:
                groups.append([])
            groups[-1].append(task)
        drawn = [self._draw(group, settings, progress, number, len(groups)) for number, group in enumerate(groups)]
        return [result for results in drawn for result in results]

    def _draw(self, tasks: list[ImageTask], settings: ImageSettings, progress, group: int, groups: int):
        """(picture, latents) of each task, one packed forward a step for all."""
        denoiser = Denoiser(self.model, self.cache, tasks, settings)
        steps = len(denoiser)
        for index in range(steps):
            denoiser.step(index)
            _report(progress, Progress("image", group * steps + index + 1, groups * steps))
        with torch.inference_mode(False):  # the caller's tensors are ordinary ones
            drawn = [latents.clone() for latents in denoiser.images()]
        return [(self.picture(x, task.rows, task.columns), x) for x, task in zip(drawn, tasks, strict=True)]

    @torch.inference_mode()
    def picture(self, latents: torch.Tensor, rows: int, columns: int) -> Image.Image:
        """Latent tokens [rows * columns, features] -> the picture they stand for."""
        latent = unpatchify(latents, rows, columns, self.model.config.latent_patch_size)
        return tensor_to_image(self.model.vae.decode(latent[None])[0])


def _report(progress: ProgressCallback | None, where: Progress) -> None:
    if progress:
        with torch.inference_mode(False):  # the caller's code runs as outside
            progress(where)


def _parameters(image: ImageSettings, size, text: TextSettings | None, negative_prompt: str | None) -> dict:
    parameters = {**asdict(image), "height": size[0], "width": size[1]}
    if text is not None:
        parameters |= asdict(text)
    if negative_prompt is not None:
        parameters["negative_prompt"] = negative_prompt
    return parameters
