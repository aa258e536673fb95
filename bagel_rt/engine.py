"""Requests end to end: contexts filled, text decoded, latents denoised, pictures decoded. Arguments come checked."""

import functools
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict

import torch
from PIL import Image

from bagel_rt.models.bagel.contexts import Conversation, Noise, count_tokens
from bagel_rt.models.bagel.memory import explain
from bagel_rt.models.bagel.model import BagelModel
from bagel_rt.models.bagel.picture import decode_picture
from bagel_rt.models.bagel.prompts import IMAGE_REQUEST
from bagel_rt.models.bagel.settings import ImageSettings, TextSettings
from bagel_rt.models.bagel.tokenizer import TextStream, Tokenizer
from bagel_rt.request import ImageResult, Progress, ProgressCallback, Request
from bagel_rt.runtime.context import MAX_ROWS, Prefill
from bagel_rt.runtime.decode import MAX_TEXTS, Sampling, generate_tokens
from bagel_rt.runtime.denoise import Denoiser, ImageTask
from bagel_rt.runtime.graphs import GraphCache, run_pipelined
from bagel_rt.runtime.slots import KVCache, SlotRange

Report = Callable[[int, Callable[[], list]], None]  # takes the steps done, and what tells what each request has by then


def _attempted(run):
    """Run requests under :meth:`Engine._working`; where memory runs out, once more without what was only kept."""

    @functools.wraps(run)
    def wrapped(self, requests, *args, **kwargs):
        return self._attempt(functools.partial(run, self, requests, *args, **kwargs), requests, weakref.WeakSet())

    return wrapped


class Engine:
    """A model, its tokenizer and its KV cache. One request at a time; whatever ends one frees the slots it held.

    Attributes:
        graphs: what was captured, and the buffers that outlive a request.
    """

    def __init__(self, model: BagelModel, tokenizer: Tokenizer, graphs: bool = True):
        self.model = model
        self.tokenizer = tokenizer
        self.cache: KVCache = model.make_cache()
        self.graphs = GraphCache.on(model.device, graphs)
        self.cache.moved.append(self.graphs.forget)

    @_attempted
    def run_images(self, requests: Sequence[Request], progress: ProgressCallback | None = None) -> list[ImageResult]:
        """One picture for each request: packed prefill, thoughts decoded together, packed denoising.

        Inputs may be texts and images in any order; guidance follows the official rules (see
        :class:`~bagel_rt.models.bagel.contexts.Conversation`). A request with a system prompt has its plan written
        first.
        """
        prefill = Prefill(self.model, self.cache)
        conversations = []
        for request in requests:
            written = request.text.max_think_token_n + 2 if request.system is not None else 0
            conversations.append(self._open(request, prefill, True, written))
            if request.negative_prompt is not None:
                conversations[-1].add_negative(request.negative_prompt)
        prefill.run()
        thinking = [index for index, request in enumerate(requests) if request.system is not None]
        thoughts: list[str | None] = [None] * len(requests)
        groups = list(_grouped(thinking, lambda i: requests[i].text.max_think_token_n, lambda i: 1, MAX_TEXTS))
        lengths = [requests[group[0]].text.max_think_token_n - 1 for group in groups]
        for number, group in enumerate(groups):
            report = _reporter(progress, "text", lengths, number, group)
            texts = self._write([conversations[i] for i in group], [requests[i] for i in group], report)
            for index, text in zip(group, texts, strict=True):
                thoughts[index] = text
                conversations[index].add_thought(text)
        prefill.run()
        sizes = [c.image_size or request.size for c, request in zip(conversations, requests, strict=True)]
        drawn = self._denoise(conversations, sizes, [request.image for request in requests], progress)
        return [
            ImageResult(picture, request.seed, _parameters(request, size, thought is not None), latents, thought)
            for (picture, latents), request, size, thought in zip(drawn, requests, sizes, thoughts, strict=True)
        ]

    def run_answer(self, request: Request, progress: ProgressCallback | None = None) -> Iterator[str]:
        """Text about the request's inputs, piece by piece."""
        storages = weakref.WeakSet()
        pieces, piece = self._attempt(lambda: self._begin_answer(request, progress), request, storages)
        try:
            while piece is not None:
                yield piece
                with self._working(request, storages):
                    piece = next(pieces, None)
        finally:
            pieces.close()
            _release(storages)

    def _begin_answer(self, request: Request, progress) -> tuple[Iterator[str], str | None]:
        """The pieces of an answer, and the first of them."""
        prefill = Prefill(self.model, self.cache)
        conversation = self._open(request, prefill, False, request.text.max_think_token_n)
        prefill.run()
        pieces = self._decode(
            conversation, request.text, request.seed, _reporter(progress, "text", [request.text.max_think_token_n - 1])
        )
        return pieces, next(pieces, None)

    @_attempted
    def run_interleaved(self, request: Request, progress: ProgressCallback | None = None) -> list[str | ImageResult]:
        """Text, and as long as it asks for an image, a picture and more text.

        Guidance stays with the contexts of the inputs: neither the model's texts nor its pictures enter them.
        """
        prefill = Prefill(self.model, self.cache)
        conversation = self._open(request, prefill, True, request.text.max_think_token_n + 2)
        size = conversation.image_size or request.size
        parts = []
        for turn in range(request.rounds):
            prefill.run()
            seed = (request.seed + turn) % 2**63
            report = _reporter(progress, "text", [request.text.max_think_token_n - 1])
            written = "".join(self._decode(conversation, request.text, seed, report))
            parts.append(written)
            if IMAGE_REQUEST not in written:
                break
            conversation.add_thought(written)
            prefill.run()
            [(picture, latents)] = self._denoise([conversation], [size], [request.image], progress)
            parts.append(ImageResult(picture, request.seed, _parameters(request, size, wrote=True), latents))
            if turn + 1 < request.rounds:
                conversation.add_image(picture, updates_guidance=False)
        return parts

    def release_memory(self) -> None:
        """Give up graphs, their buffers, and the KV cache if nothing is in it."""
        self.graphs.clear()
        self.cache.trim()
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    def _attempt(self, run: Callable, requests: Request | Sequence[Request], storages: weakref.WeakSet):
        """``run()`` for requests. Where memory runs out though some was only kept, that is given up, and it runs again.

        Raises:
            torch.OutOfMemoryError: with the expected memory and advice; nothing is kept any more.
        """
        if self.graphs.kept or self.cache.slots:
            try:
                with self._working(requests, storages):
                    return run()
            except torch.OutOfMemoryError:
                pass  # the second attempt must not run in here: the first one's frames hold its tensors
        with self._working(requests, storages):
            return run()

    @contextmanager
    def _working(self, requests: Request | Sequence[Request], storages: weakref.WeakSet) -> Iterator[None]:
        """Work for requests, whose storages are collected. If it fails, their slots are free again at once: the frames
        of its exception would hold them as long as it lives.

        Raises:
            torch.OutOfMemoryError: in the place of one, with the expected memory and advice; what was only kept is
                given up.
        """
        try:
            with torch.inference_mode(), self.cache.claim(storages):
                yield
        except BaseException as error:
            _release(storages)
            if not isinstance(error, torch.OutOfMemoryError):
                raise
            self.release_memory()
            requests = [requests] if isinstance(requests, Request) else requests
            raise torch.OutOfMemoryError(f"{error}\n{self._explain(requests)}") from error

    def _explain(self, requests: Sequence[Request]) -> str:
        """What requests were expected to take, counted as if all were like the largest; and what would take less."""

        def counted(request):
            parts = [*request.inputs, *(part for part in (request.system, request.negative_prompt) if part is not None)]
            return count_tokens(self.model.config, self.tokenizer, parts, request.image is not None)

        request = max(requests, key=lambda request: sum(counted(request)[:2]))
        images = [part.size[::-1] for part in request.inputs if isinstance(part, Image.Image)]
        draws = request.image is not None
        available = None
        if self.model.device.type == "cuda":
            available = torch.cuda.get_device_properties(self.model.device).total_memory
        return explain(
            self.model.config,
            self.model.dtype,
            available=available,
            task="chat" if not draws else "edit" if images else "generate",
            size=request.size,
            images=images,
            batch=len(requests),
            text_tokens=max(1, counted(request)[0]),
            max_think_token_n=request.text.max_think_token_n if request.writes else 0,
            settings=request.image,
            graphs=self.graphs.capture is not None,
        )

    def _open(self, request: Request, prefill: Prefill, guided: bool, written: int) -> Conversation:
        """A conversation holding the system prompt and the request's inputs, with room for ``written`` tokens."""
        config, system = self.model.config, request.system
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

    def _write(self, conversations, requests: Sequence[Request], report: Report) -> list[str]:
        """The next text of each conversation, decoded together; the lengths allowed are equal."""
        if len(requests) == 1:
            [conversation], [request] = conversations, requests
            return ["".join(self._decode(conversation, request.text, request.seed, report))]
        streams = [TextStream(self.tokenizer) for _ in requests]
        texts, counts = [[] for _ in requests], [0] * len(requests)
        settings = [(request.text, request.seed) for request in requests]
        with closing(self._tokens(conversations, settings)) as tokens:
            for number, token in tokens:
                counts[number] += 1
                texts[number].append(streams[number].feed(token))
                if counts[number] > max(counts[:number] + counts[number + 1 :]):  # the first text to get that far
                    report(counts[number], lambda: list(map("".join, texts)))
        return ["".join([*pieces, stream.finish()]) for pieces, stream in zip(texts, streams, strict=True)]

    def _decode(self, conversation: Conversation, text: TextSettings, seed: int, report: Report) -> Iterator[str]:
        """The next text of a conversation, piece by piece."""
        stream, pieces = TextStream(self.tokenizer), []
        with closing(self._tokens([conversation], [(text, seed)])) as tokens:
            for count, (_, token) in enumerate(tokens, start=1):
                pieces.append(stream.feed(token))
                report(count, lambda: ["".join(pieces)])
                if pieces[-1]:
                    yield pieces[-1]
        if piece := stream.finish():
            yield piece

    def _tokens(
        self, conversations, settings: Sequence[tuple[TextSettings, int]]
    ) -> Generator[tuple[int, int], None, None]:
        sampling = [
            Sampling(text.text_temperature if text.do_sample else 0.0, text.top_k, text.top_p, seed)
            for text, seed in settings
        ]
        return generate_tokens(
            self.model,
            [conversation.gen for conversation in conversations],
            self.tokenizer.bos,
            self.tokenizer.eos,
            settings[0][0].max_think_token_n,
            sampling,
            self.graphs,
        )

    def _denoise(
        self, conversations, sizes, settings: Sequence[ImageSettings], progress
    ) -> list[tuple[Image.Image, torch.Tensor]]:
        """(picture, latents) of each conversation's next image. Those with equally many timesteps share their steps."""
        config, tasks = self.model.config, []
        for conversation, size, image in zip(conversations, sizes, settings, strict=True):
            rows, columns = (side // config.latent_stride for side in size)
            noise = conversation.noise.draw(rows * columns, config.latent_features)
            tasks.append(
                ImageTask(rows, columns, noise, conversation.gen, conversation.no_text, conversation.no_img, image)
            )
        length = lambda i: tasks[i].settings.num_timesteps  # noqa: E731
        groups = list(_grouped(range(len(tasks)), length, lambda i: _rows(tasks[i]), MAX_ROWS))
        steps = [tasks[group[0]].settings.num_timesteps - 1 for group in groups]
        drawn: list[tuple[Image.Image, torch.Tensor] | None] = [None] * len(tasks)
        for number, group in enumerate(groups):
            report = _reporter(progress, "image", steps, number, group)
            for index, result in zip(group, self._draw([tasks[index] for index in group], report), strict=True):
                drawn[index] = result
        return drawn

    def _draw(self, tasks: list[ImageTask], report: Report) -> list[tuple[Image.Image, torch.Tensor]]:
        """(picture, latents) of each task, one packed forward a step for all."""
        with closing(Denoiser(self.model, self.cache, tasks, self.graphs)) as denoiser:
            preview = functools.partial(self._preview, weakref.ref(denoiser))  # who keeps it keeps no slots
            steps = (functools.partial(denoiser.step, index) for index in range(len(denoiser)))
            for done in run_pipelined(self.model.device, steps):
                report(done, preview)
            with torch.inference_mode(False):  # the caller's tensors are ordinary ones
                drawn = [latents.clone() for latents in denoiser.images()]
        return list(zip(self._pictures(drawn, tasks), drawn, strict=True))

    @torch.inference_mode()
    def _preview(self, drawing: weakref.ref[Denoiser]) -> list[Image.Image]:
        """What the images of a denoising are heading for."""
        denoiser = drawing()
        if denoiser is None or denoiser.closed:
            raise RuntimeError("the picture is no longer worked on: call preview() within the progress callback")
        return self._pictures(denoiser.estimates(), denoiser.tasks)

    def _pictures(self, latents: Sequence[torch.Tensor], tasks: Sequence[ImageTask]) -> list[Image.Image]:
        return [
            decode_picture(self.model, x, task.rows, task.columns, self.graphs)
            for x, task in zip(latents, tasks, strict=True)
        ]


def _grouped(items: Iterable, key: Callable, weight: Callable, limit: int) -> Iterator[list]:
    """Items of equal key together, in their order, cut where their weights would exceed the limit."""
    groups = {}
    for item in items:
        cuts = groups.setdefault(key(item), [[]])
        if cuts[-1] and sum(map(weight, cuts[-1])) + weight(item) > limit:
            cuts.append([])
        cuts[-1].append(item)
    for cuts in groups.values():
        yield from cuts


def _rows(task: ImageTask) -> int:
    """Rows of a packed forward that a guided step of this image takes, if no branches are equal."""
    settings = task.settings
    guided = settings.cfg_text_scale > 1
    return (1 + guided + (guided and settings.cfg_img_scale > 1)) * (task.rows * task.columns + 2)


def _reporter(
    progress: ProgressCallback | None,
    stage: str,
    lengths: Sequence[int],
    number: int = 0,
    members: Sequence[int] = (0,),
) -> Report:
    """Reports steps of a part of a stage, the ``number``-th of those that have so many steps, for these requests."""
    before, total = sum(lengths[:number]), sum(lengths)

    def report(step: int, made: Callable[[], list]) -> None:
        if progress:
            with torch.inference_mode(False):  # the caller's code runs as outside
                progress(Progress(stage, before + step, total, lambda: dict(zip(members, made(), strict=True))))

    return report


def _release(storages: Iterable[SlotRange]) -> None:
    for storage in list(storages):
        storage.release()


def _parameters(request: Request, size: tuple[int, int], wrote: bool) -> dict:
    """Every hyper-parameter of a picture, those of texts if the model ``wrote`` one."""
    parameters = {**asdict(request.image), "height": size[0], "width": size[1]}
    if wrote:
        parameters |= asdict(request.text)
    if request.negative_prompt is not None:
        parameters["negative_prompt"] = request.negative_prompt
    return parameters
