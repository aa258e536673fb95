"""Runs requests end to end: prefill, think, denoise, decode.

Requests are already checked. The model is used only through its interface (``bagel_rt.models.interface``).
"""

import functools
import weakref
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import asdict
from typing import Any, TypeVar

import torch
from PIL import Image

from bagel_rt.models.interface import ImageTextModel, RequestContexts, Tokenizer
from bagel_rt.request import ImageRequest, ImageResult, InterleavedRequest, Progress, ProgressCallback, Request
from bagel_rt.runtime.context import MAX_ROWS, Prefill
from bagel_rt.runtime.decode import MAX_TEXTS, Sampling, generate_tokens
from bagel_rt.runtime.denoise import Denoiser, DenoisingTask
from bagel_rt.runtime.graphs import GraphCache, run_pipelined
from bagel_rt.runtime.interface import Guidance
from bagel_rt.runtime.slots import KVCache, SlotRange

Results = list[str] | list[Image.Image]
Report = Callable[[int, Callable[[], Results]], None]  # (steps done, function that returns the results so far)
T = TypeVar("T")


class Engine:
    """A model, its tokenizer and its KV cache. Runs one request at a time and always frees its slots.

    A call raises RuntimeError while the model runs in another thread.

    Attributes:
        graphs: captured steps, and the buffers that outlive a request.
    """

    def __init__(self, model: ImageTextModel, tokenizer: Tokenizer, graphs: bool = True) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.cache: KVCache = model.make_cache()
        self.graphs = GraphCache.for_device(model.device, graphs)
        self.cache.moved.append(self.graphs.invalidate)

    def run_images(
        self, requests: Sequence[ImageRequest], progress: ProgressCallback | None = None
    ) -> list[ImageResult]:
        """Generate one image per request; each stage runs all requests together."""

        def run() -> list[ImageResult]:
            prefill = Prefill(self.model, self.cache)
            contexts = self._prefill(requests, prefill)
            thoughts = self._think(requests, contexts, prefill, progress)
            sizes = [one.image_size or request.size for one, request in zip(contexts, requests, strict=True)]
            tasks = [self.model.denoising_task(one, size) for one, size in zip(contexts, sizes, strict=True)]
            latents = self._denoise(tasks, requests, progress)
            images = self._decode(tasks, latents)
            return [
                ImageResult(image, request.seed, _parameters(request, size, thought is not None), x, thought)
                for image, request, size, thought, x in zip(images, requests, sizes, thoughts, latents, strict=True)
            ]

        return self._run_with_retry(requests, run, weakref.WeakSet())

    def run_answer(self, request: Request, progress: ProgressCallback | None = None) -> Generator[str, None, None]:
        """Stream the answer to a request as pieces of text."""
        ranges: weakref.WeakSet[SlotRange] = weakref.WeakSet()
        length = request.text.max_think_token_n

        def begin() -> tuple[Generator[str, None, None], str | None]:
            prefill = Prefill(self.model, self.cache)
            contexts = self._open(request, prefill, written=length)
            prefill.run()
            pieces = self._stream_text(contexts, request, request.seed, _reporter(progress, "text", [length - 1]))
            return pieces, next(pieces, None)

        pieces, piece = self._run_with_retry([request], begin, ranges)
        try:
            while piece is not None:
                yield piece
                with self._guard([request], ranges):
                    piece = next(pieces, None)
        finally:
            pieces.close()
            _release(ranges)

    def run_interleaved(
        self, request: InterleavedRequest, progress: ProgressCallback | None = None
    ) -> list[str | ImageResult]:
        """Generate text; if it requests an image, generate the image and continue, at most ``request.rounds`` times.

        Generated texts and images are appended to the conditional context only. The contexts of the other guidance
        branches hold the inputs only.
        """

        def run() -> list[str | ImageResult]:
            length = request.text.max_think_token_n
            parts: list[str | ImageResult] = []
            prefill = Prefill(self.model, self.cache)
            contexts = self._open(request, prefill, written=length + 2)
            size = contexts.image_size or request.size
            for turn in range(request.rounds):
                prefill.run()
                seed = (request.seed + turn) % 2**63
                report = _reporter(progress, "text", [length - 1])
                written = "".join(self._stream_text(contexts, request, seed, report))
                parts.append(written)
                if self.model.image_request not in written:
                    break
                contexts.add_thought(written)
                prefill.run()
                task = self.model.denoising_task(contexts, size)
                latents = self._denoise([task], [request], progress)
                [image] = self._decode([task], latents)
                parts.append(ImageResult(image, request.seed, _parameters(request, size, wrote=True), latents[0]))
                if turn + 1 < request.rounds:
                    contexts.add_image(image, updates_guidance=False)
            return parts

        return self._run_with_retry([request], run, weakref.WeakSet())

    def release_memory(self) -> None:
        """Drop captured graphs, their buffers, and the KV cache if no context uses it."""
        with self._one_thread():
            self.graphs.clear()
            self.cache.trim()
            if self.model.device.type == "cuda":
                torch.cuda.empty_cache()

    # The stages

    def _prefill(self, requests: Sequence[ImageRequest], prefill: Prefill) -> list[RequestContexts]:
        """Compute the contexts of all requests."""
        opened = []
        for request in requests:
            written = request.text.max_think_token_n + 2 if request.system is not None else 0
            opened.append(self._open(request, prefill, written=written))
            if request.negative_prompt is not None:
                opened[-1].add_negative(request.negative_prompt)
        prefill.run()
        return opened

    def _think(
        self,
        requests: Sequence[Request],
        contexts: Sequence[RequestContexts],
        prefill: Prefill,
        progress: ProgressCallback | None,
    ) -> list[str | None]:
        """Decode a thought for each request with a system prompt and append it to its contexts; None for the others."""
        thoughts: list[str | None] = [None] * len(requests)
        thinking = [index for index, request in enumerate(requests) if request.system is not None]
        groups = list(_grouped(thinking, lambda i: requests[i].text.max_think_token_n, lambda i: 1, MAX_TEXTS))
        lengths = [requests[group[0]].text.max_think_token_n - 1 for group in groups]
        for number, group in enumerate(groups):
            report = _reporter(progress, "text", lengths, number, group)
            texts = self._write([contexts[i] for i in group], [requests[i] for i in group], report)
            for index, text in zip(group, texts, strict=True):
                thoughts[index] = text
                contexts[index].add_thought(text)
        prefill.run()
        return thoughts

    def _denoise(
        self, tasks: Sequence[DenoisingTask], requests: Sequence[ImageRequest], progress: ProgressCallback | None
    ) -> list[torch.Tensor]:
        """The final state of each task. Tasks with equally many steps run together, up to MAX_ROWS rows."""
        settings = [request.image for request in requests]
        alone = [self.model.guidance([task], [one]) for task, one in zip(tasks, settings, strict=True)]

        def rows(index: int) -> int:
            branches = sum(alone[index].uses(0, branch) for branch in range(len(tasks[index].branches)))
            return branches * len(tasks[index].content.rows(0).gen)

        groups = list(_grouped(range(len(tasks)), lambda index: len(alone[index]), rows, MAX_ROWS))
        steps = [len(alone[group[0]]) for group in groups]
        latents: dict[int, torch.Tensor] = {}
        for number, group in enumerate(groups):
            report = _reporter(progress, "image", steps, number, group)
            members = [tasks[index] for index in group]
            guidance = self.model.guidance(members, [settings[index] for index in group])
            latents |= zip(group, self._denoise_together(members, guidance, report), strict=True)
        return [latents[index] for index in range(len(tasks))]

    def _denoise_together(
        self, tasks: Sequence[DenoisingTask], guidance: Guidance, report: Report
    ) -> list[torch.Tensor]:
        """Denoise all tasks with one packed forward per step, and return their final states."""
        with closing(Denoiser(self.model, self.cache, tasks, guidance, self.graphs)) as denoiser:
            preview = functools.partial(self._preview, weakref.ref(denoiser))  # weak: a preview must not keep slots
            work = (functools.partial(denoiser.step, index) for index in range(len(denoiser)))
            for done in run_pipelined(self.model.device, work):
                report(done, preview)
            with torch.inference_mode(False):  # return ordinary tensors, not inference tensors
                return [state.clone() for state in denoiser.images()]

    def _decode(self, tasks: Sequence[DenoisingTask], latents: Sequence[torch.Tensor]) -> list[Image.Image]:
        """Decode final states to images."""
        return [self.model.decode_image(x, task.content, self.graphs) for x, task in zip(latents, tasks, strict=True)]

    # Parts of the stages

    def _open(self, request: Request, prefill: Prefill, written: int) -> RequestContexts:
        """Contexts with the system prompt and the inputs of a request, and slots for ``written`` tokens."""
        noise, size = (request.noise, request.size) if isinstance(request, ImageRequest) else (None, None)
        return self.model.open_contexts(
            prefill,
            self.tokenizer,
            request.inputs,
            system=request.system,
            seed=request.seed,
            noise=noise,
            size=size,
            draws=request.draws,
            written=written,
        )

    def _write(self, contexts: Sequence[RequestContexts], requests: Sequence[Request], report: Report) -> list[str]:
        """The next text of each request, decoded together. All requests have the same maximum length."""
        if len(requests) == 1:
            return ["".join(self._stream_text(contexts[0], requests[0], requests[0].seed, report))]
        streams = [self.tokenizer.stream() for _ in requests]
        texts: list[list[str]] = [[] for _ in requests]
        counts = [0] * len(requests)
        with closing(self._tokens(contexts, requests, [request.seed for request in requests])) as tokens:
            for number, token in tokens:
                counts[number] += 1
                texts[number].append(streams[number].feed(token))
                if counts[number] > max(counts[:number] + counts[number + 1 :]):  # report each length once
                    report(counts[number], lambda: list(map("".join, texts)))
        return ["".join([*pieces, stream.finish()]) for pieces, stream in zip(texts, streams, strict=True)]

    def _stream_text(
        self, contexts: RequestContexts, request: Request, seed: int, report: Report
    ) -> Generator[str, None, None]:
        """The next text of a request, piece by piece."""
        stream = self.tokenizer.stream()
        pieces: list[str] = []
        with closing(self._tokens([contexts], [request], [seed])) as tokens:
            for count, (_, token) in enumerate(tokens, start=1):
                pieces.append(stream.feed(token))
                report(count, lambda: ["".join(pieces)])
                if pieces[-1]:
                    yield pieces[-1]
        if piece := stream.finish():
            yield piece

    def _tokens(
        self, contexts: Sequence[RequestContexts], requests: Sequence[Request], seeds: Sequence[int]
    ) -> Generator[tuple[int, int], None, None]:
        texts = [request.text for request in requests]
        sampling = [
            Sampling(text.text_temperature if text.do_sample else 0.0, text.top_k, text.top_p, seed)
            for text, seed in zip(texts, seeds, strict=True)
        ]
        return generate_tokens(
            self.model,
            self.model.text,
            [one.cond for one in contexts],
            self.tokenizer.bos,
            self.tokenizer.eos,
            texts[0].max_think_token_n,
            sampling,
            self.graphs,
        )

    @torch.inference_mode()
    def _preview(self, running: weakref.ref[Denoiser]) -> list[Image.Image]:
        """The images predicted from the current step of a denoising."""
        denoiser = running()
        if denoiser is None or denoiser.closed:
            raise RuntimeError("preview() must be called within the progress callback, got a call after it.")
        return self._decode(denoiser.tasks, denoiser.estimates())

    # Memory

    def _run_with_retry(
        self, requests: Sequence[Request], run: Callable[[], T], ranges: "weakref.WeakSet[SlotRange]"
    ) -> T:
        """Run requests with ``run()``. On out-of-memory, drop caches and retry once, if there was anything to drop.

        Raises:
            torch.OutOfMemoryError: the last try failed. The message states the expected memory and how to reduce it;
                the caches are dropped.
        """
        if self.graphs.kept or self.cache.slots:
            with suppress(torch.OutOfMemoryError), self._guard(requests, ranges):
                return run()
        with self._guard(requests, ranges):  # outside the block above, whose exception would keep tensors alive
            return run()

    @contextmanager
    def _guard(self, requests: Sequence[Request], ranges: "weakref.WeakSet[SlotRange]") -> Iterator[None]:
        """Run work for requests and collect the slot ranges that it allocates.

        If the work fails, free them at once: the exception's frames would hold them for as long as it is alive.

        Raises:
            torch.OutOfMemoryError: replaces the original one, with the expected memory and advice; caches are dropped.
        """
        with self._one_thread():
            try:
                with torch.inference_mode(), self.cache.track(ranges):
                    yield
            except BaseException as error:
                _release(ranges)
                if not isinstance(error, torch.OutOfMemoryError):
                    raise
                self.release_memory()
                available = None
                if self.model.device.type == "cuda":
                    available = torch.cuda.get_device_properties(self.model.device).total_memory
                advice = self.model.explain_memory(
                    self.tokenizer, requests, available, graphs=self.graphs.capture is not None
                )
                raise torch.OutOfMemoryError(f"{error}\n{advice}") from error

    @contextmanager
    def _one_thread(self) -> Iterator[None]:
        """Hold the model's lock, so that one thread at a time uses its buffers, and make its GPU the current one.

        It is held while the model computes. A stream that waits for its next piece does not hold it, and the thread
        that holds it may start another request, as in a progress callback.

        Raises:
            RuntimeError: another thread holds it. Waiting instead would hide that a model serves one call at a time.
        """
        if not self.model.lock.acquire(blocking=False):
            raise RuntimeError(
                "a model must be used by one thread at a time, got a call while it runs in another thread. Load one "
                "Bagel per thread, hold a lock around every call, or send requests to the server (bagel-rt serve)."
            )
        device = self.model.device
        try:
            # Kernels launch on the current device, which every thread has of its own.
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                yield
        finally:
            self.model.lock.release()


def _grouped(
    items: Iterable[int], key: Callable[[int], Hashable], weight: Callable[[int], int], limit: int
) -> Iterator[list[int]]:
    """Group items by key, in order. A group is split where its total weight would exceed the limit."""
    groups: dict[Hashable, list[list[int]]] = {}
    for item in items:
        cuts = groups.setdefault(key(item), [[]])
        if cuts[-1] and sum(map(weight, cuts[-1])) + weight(item) > limit:
            cuts.append([])
        cuts[-1].append(item)
    for cuts in groups.values():
        yield from cuts


def _reporter(
    progress: ProgressCallback | None,
    stage: str,
    lengths: Sequence[int],
    number: int = 0,
    members: Sequence[int] = (0,),
) -> Report:
    """Make a :data:`Report` for one group of requests in a stage.

    Args:
        lengths: number of steps of each group of the stage; progress counts through all of them.
        number: index of this group.
        members: indexes of its requests, the keys of the results.
    """
    before, total = sum(lengths[:number]), sum(lengths)

    def report(step: int, results: Callable[[], Results]) -> None:
        if progress:
            with torch.inference_mode(False):  # the callback runs in ordinary mode
                progress(Progress(stage, before + step, total, lambda: dict(zip(members, results(), strict=True))))

    return report


def _release(ranges: Iterable[SlotRange]) -> None:
    for one in list(ranges):
        one.release()


def _parameters(request: ImageRequest, size: tuple[int, int], wrote: bool) -> dict[str, Any]:
    """Every hyper-parameter of an image, including those of text decoding if the model ``wrote`` a text."""
    parameters = {**asdict(request.image), "height": size[0], "width": size[1]}
    if wrote:
        parameters |= asdict(request.text)
    if request.negative_prompt is not None:
        parameters["negative_prompt"] = request.negative_prompt
    return parameters
